r"""Gated attention: a sigmoid of the token itself multiplies what a head gives, or what it takes.

.. math::

    s_t    &= \sigma(x_t W_g)                                                        &(1)\\
    z_{ts} &= \kappa \tanh(c\, q_t \cdot k_s / \kappa) + b_{ts}                      &(2)\\
    p_{ts} &= e^{z_{ts}} / \textstyle\sum_{s'} e^{z_{ts'}}                           &(3)\\
    y_t    &= s_t \odot \textstyle\sum_s p_{ts}\, v_s                                &(4)\\
    o_t    &= \textstyle\sum_h y_{ht} W_{O,h}                                        &(5)

with the same x that q is made of, and a gate for each number of a head (element-wise) or one for
the head (head-wise). Step (5) is left out without :math:`W_O`. The study names five places: the
gate on the output of a head (G1, as above), on the values (G2), the keys (G3), the queries (G4),
before step (2), or on o after step (5) (G5). A head that finds nothing closes its gate; the
product of the value's and the output's matrix, linear and of low rank without a gate, becomes
non-linear in x.

Source: Qiu et al. 2025; the official modeling_qwen3.py (``headwise_attn_output_gate`` and
``elementwise_attn_output_gate``) read, which has G1 alone; grade A for G1. G2 to G5 follow
summaries of the paper, which name the place and no more: a reconstruction.
"""

from typing import NamedTuple

import numpy as np

from attention_ref import core

POSITIONS = ("output", "value", "key", "query", "projected")
"""The study's G1 to G5, in this order."""


class Cache(NamedTuple):
    """What the backward needs, and what implementers compare with (``gate``, ``p``, ``lse``)."""

    q: np.ndarray  # (..., T, D), gated under "query", rows with NaN or infinity zero
    k: np.ndarray  # (..., S, D), likewise, under "key"
    v: np.ndarray  # (..., S, E), likewise, under "value"
    x: np.ndarray  # (..., T or S or 1, C), rows with NaN or infinity zero
    w_g: np.ndarray  # (..., C, N), a head with NaN or infinity zero
    w_o: np.ndarray | None  # (..., E, M), likewise
    gate: np.ndarray  # (..., T or S or 1, N)
    capped: np.ndarray  # (..., T, S), scores after the softcap, before bias and mask
    p: np.ndarray  # (..., T, S), weights
    lse: np.ndarray  # (..., T), log of the sum of exponentials, nats
    y: np.ndarray  # (..., T, E), outputs of the heads, gated under "output"
    out: np.ndarray  # the outputs, without NaN
    live: np.ndarray  # (..., T, S), True = may attend
    poison: np.ndarray  # rows of the output that are NaN, last axis 1
    scale: float
    softcap: float | None
    position: str
    shapes: dict  # of q, k, v and bias as given


def gate_backward(dy, y, gate):
    """Gradients of y = a s with s = sigma(g): da = dy s, dg = dy y (1 - s).

    Parameters
    ----------
    dy, y : ndarray
        Gradient of the gated array, and this array.
    gate : ndarray, broadcast to y
        The gate s.

    Returns
    -------
    da : ndarray, shape of y
        Gradient of what was gated.
    dg : ndarray, shape of gate
        Gradient of the gate's logits.
    """
    return dy * gate, core.sum_to(dy * y * (1.0 - gate), gate.shape)


def _check(q, k, v, x, w_g, w_o, position, **options):
    """The checks of ``core.check.attention``, and those of gate and projection."""
    n = core.check.attention(q, k, v, **options)
    core.check.option("position", position, POSITIONS)
    lead, width = n["..."], n["D"] if position in ("query", "key") else n["E"]
    if w_o is not None:
        core.check.shapes(v=(v, "... S E"), w_o=(w_o, "... E M"))
        core.check.check_bias(w_o, (*lead, *w_o.shape[-2:]), "w_o", "(..., H, E, M)")
    elif position == "projected":
        raise core.errors.ParameterError(
            "w_o is None, expected an array: it is what 'projected' gates"
        )
    C = core.check.shapes(x=(x, "... R C"), w_g=(w_g, "... C N"))["C"]
    if position == "projected":
        lead, width = lead[:-1], w_o.shape[-1]
    rows = n["S"] if position in ("key", "value") else n["T"]
    core.check.check_bias(x, (*lead, rows, C), "x", "(..., tokens, C)")
    core.check.check_bias(w_g, (*lead, C, width), "w_g", "(..., C, N), N = 1 or this width")
    return n


def gated_forward(
    q, k, v, x, w_g, w_o=None, *, position="output", mask=None, causal=False,
    align="lower_right", scale=None, softcap=None, bias=None, empty_row="zero",
):  # fmt: skip
    """Softmax attention with a sigmoid gate at one of five places.

    Parameters
    ----------
    q : ndarray, shape (..., H, T, D)
        Queries; the head axis may be absent.
    k : ndarray, shape (..., H, S, D)
        Keys.
    v : ndarray, shape (..., H, S, E)
        Values.
    x : ndarray, broadcast to (..., H, T, C)
        What the gates read: the tokens that q is made of, (T, C), or (B, 1, T, C) in a batch; S
        rows at "key" and "value", no axis of heads at "projected", (B, T, C). One row is a gate
        that does not depend on the token.
    w_g : ndarray, broadcast to (..., H, C, N)
        The gate's matrix, without a head axis at "projected". N is 1 for one gate a head, or the
        width of what is gated: E, at "key" and "query" D, at "projected" M.
    w_o : ndarray, broadcast to (..., H, E, M), optional
        Output projection; with it the heads are added up. Needed at "projected".
    position : {"output", "value", "key", "query", "projected"}
        What is gated, the study's G1 to G5.
    mask : bool ndarray, broadcast to (..., H, T, S), optional
        True = may attend.
    causal : bool
        Hide the keys behind each query.
    align : {"lower_right", "upper_left"}
        Where the causal diagonal lies when T != S.
    scale : float, dimensionless, optional
        The factor c; 1/sqrt(D) by default.
    softcap : float, > 0, nats, optional
        Bound on the scores before bias and mask.
    bias : ndarray, broadcast to (..., H, T, S), nats, optional
        Added to the scores after the softcap; -inf gives a weight of 0.
    empty_row : {"zero", "nan", "uniform", "raise"}
        Output of a query that may see no key, before the gate at "output" and "projected".

    Returns
    -------
    out : ndarray, shape (..., H, T, E), or (..., T, M) with w_o
        Outputs.
    cache : Cache
        For the backward; holds ``gate``, ``p`` and ``lse``.

    Raises
    ------
    ShapeError
        When widths, lengths or leading axes do not fit.
    DTypeError
        When an argument is no float32 or float64 array, or the mask is not boolean.
    ParameterError
        When an option or a number is outside its domain, w_o is missing at "projected", or a row
        is empty under "raise".
    MemoryLimitError
        When the scores would take more than 2 GiB.

    Notes
    -----
    The gate has no bias. In the official code its columns stand in an enlarged matrix of the
    queries, grouped by key head: the queries of a group, then the gates of that group. Queries and
    keys are normalised and rotated there before the scores, which is the caller's affair here, and
    so are grouped heads (heads/multi_query). The paper's additive gate (SiLU) is left out. A w_g
    without a head axis is its gate shared by the heads.

    Source
    ------
    normalizers/gated in the catalog; the official modeling_qwen3.py for G1; grade A (G2 to G5:
    reconstruction).

    References
    ----------
    Qiu et al. 2025, Gated Attention for Large Language Models.

    Examples
    --------
    >>> import numpy as np
    >>> q, k = np.zeros((1, 1)), np.zeros((2, 1))
    >>> v, x = np.array([[4.0], [12.0]]), np.ones((1, 1))
    >>> out, cache = gated_forward(q, k, v, x, np.array([[np.log(3.0)]]))
    >>> cache.gate.round(12).tolist(), out.round(12).tolist()
    ([[0.75]], [[6.0]])
    """
    n = _check(
        q, k, v, x, w_g, w_o, position, mask=mask, bias=bias, align=align, scale=scale,
        softcap=softcap, empty_row=empty_row,
    )  # fmt: skip
    scale = core.default_scale(n["D"], scale)
    live = core.visible(q, k, mask=mask, causal=causal, align=align, empty_row=empty_row)
    shapes = {n: a.shape for n, a in zip("qkvb", (q, k, v, bias), strict=True) if a is not None}
    x, bad_x = _clean(x, -1)
    w_g, bad_w = _clean(w_g, (-2, -1))
    bad = bad_x | bad_w

    gate = core.logistic(x @ w_g)  # (1)
    inputs = {"query": q, "key": k, "value": v}
    if position in inputs:
        inputs[position] = np.where(bad, np.nan, inputs[position] * gate)
    q, k, v, poison = core.quarantine(*inputs.values(), live, empty_row)
    z = capped = core.softcap_forward(core.scores_forward(q, k, scale), softcap)  # (2)
    if bias is not None:
        clean, poison = core.quarantine_bias(bias, live, poison)
        z = z + clean
    p, lse = core.softmax_forward(z, live, empty_row)  # (3)
    lse = np.where(poison[..., 0], np.nan, lse)
    out = y = core.mix_forward(p, v)  # (4)
    if position == "output":
        out = y = y * gate
        poison = poison | bad
    if w_o is not None:  # (5)
        w_o, bad_o = _clean(w_o, (-2, -1))
        out, poison = y @ w_o, poison | bad_o
        if n["..."]:
            out, poison = np.sum(out, axis=-3), np.any(poison, axis=-3)
        if position == "projected":
            out, poison = out * gate, poison | bad

    return np.where(poison, np.nan, out), Cache(
        q, k, v, x, w_g, w_o, gate, capped, p, lse, y, out, live, poison, scale, softcap,
        position, shapes,
    )  # fmt: skip


def _clean(a, axis):
    """Rows or matrices with NaN or infinity become zeros; where that was, in a's rank."""
    good = np.all(np.isfinite(a), axis=axis, keepdims=True)
    return np.where(good, a, 0.0), ~good


def gated_backward(dout, cache):
    """Gradients of :func:`gated_forward`, its steps read from the bottom up.

    Parameters
    ----------
    dout : ndarray, shape of the output
        Gradient of the output.
    cache : Cache
        From the forward.

    Returns
    -------
    dict
        Under "q", "k", "v", "x", "w_g" and, when given, "w_o", "bias".
    """
    q, k, v, x, w_g, w_o, gate, capped, p, _, y, out, live, poison, scale, softcap = cache[:16]
    position, shapes = cache.position, cache.shapes
    core.check.cotangent(dout, out.shape)
    dy = np.where(poison, 0.0, dout)
    gradients = {}

    if position == "projected":
        dy, dg = gate_backward(dy, out, gate)
    if w_o is not None:  # (5')
        dy = dy[..., None, :, :] if y.ndim > 2 else dy
        gradients["w_o"] = core.sum_to(np.swapaxes(y, -1, -2) @ dy, w_o.shape)
        dy = np.broadcast_to(dy @ np.swapaxes(w_o, -1, -2), y.shape)
    if position == "output":
        dy, dg = gate_backward(dy, y, gate)
    dp, dv = core.mix_backward(dy, p, v)  # (4')
    dz = core.softmax_backward(dp, p, live)  # (3')
    if "b" in shapes:
        gradients["bias"] = core.sum_to(dz, shapes["b"])
    dz = core.softcap_backward(dz, capped, softcap)  # (2')
    dq, dk = core.scores_backward(dz, q, k, scale)
    inputs = {"query": dq, "key": dk, "value": dv}
    if position in inputs:
        gated = {"query": q, "key": k, "value": v}[position]
        inputs[position], dg = gate_backward(inputs[position], gated, gate)
    gradients |= {n[0]: core.sum_to(g, shapes[n[0]]) for n, g in inputs.items()}
    gradients["x"] = core.sum_to(dg @ np.swapaxes(w_g, -1, -2), x.shape)  # (1')
    gradients["w_g"] = core.sum_to(np.swapaxes(x, -1, -2) @ dg, w_g.shape)
    return gradients


def _example(rng):
    """All five positions, both widths, tokens of 2 channels; a batch of 1 before two heads.

    Without mask and causality the gates are those of queries; in "plain" one row serves all.
    """
    places = {
        "plain": ("output", 3, 1), "long-queries": ("query", 1, 7), "batch": ("output", 1, 1),
        "no-heads": ("output", 3, 5), "causal": ("key", 4, 7), "causal-upper-left": ("key", 1, 7),
        "causal-long-queries": ("projected", 2, 7), "mask": ("value", 3, 7),
        "packed": ("output", 3, 6), "bias": ("projected", 1, 5), "softcap": ("value", 1, 6),
    }  # fmt: skip
    cases = core.examples.attention(rng)
    for name, (position, width, rows) in places.items():
        case = cases[name]
        if case["q"].ndim == 3:
            case |= {n: case[n][None] for n in "qkv"}
        heads = () if name == "no-heads" or position == "projected" else (2,)
        w_g = rng.standard_normal((*heads, 2, width))
        case |= {"x": rng.standard_normal((rows, 2)), "w_g": w_g, "position": position}
        if position == "projected" or name == "causal":
            case["w_o"] = rng.standard_normal((2, 3, 2))
    return cases


def _open(rng):
    """Gates of exactly 1."""
    tokens = {"x": 0.5 + rng.random((5, 2)), "w_g": np.full((2, 2, 3), 40.0)}
    return core.examples.qkv(rng) | tokens | {"causal": True}


def _plain(kwargs):
    return {n: a for n, a in kwargs.items() if n not in ("x", "w_g")}


SPEC = core.Mechanism(
    key="normalizers/gated",
    forward=gated_forward, backward=gated_backward, example=_example,
    flags=frozenset({"attention", "causal", "masked", "linear_in_v", "scaled"}),
    opt_out={"empty_rows": "the mean under 'uniform' is gated; test_gated.py does all four"},
    reduces_to=(core.Reduction("scores/dot_product", "open gates of 1", _open, _plain),),
    claim="When a query matches nothing, a gated head closes its gate and leaves the first token "
    "alone, where plain softmax attention puts its weight.",
    verified_by=("slow loop", "PyTorch"),
    reconstruction="positions G2 to G5, from summaries of the paper; G1 is the official code's",
)  # fmt: skip
