r"""Attention with a sink: one more term in the denominator, so that a query may take nothing.

.. math::

    z_{ts} &= \kappa \tanh(c\, q_t \cdot k_s / \kappa) + a_{ts}                          &(1)\\
    \ell_t &= \ln \bigl(e^{b} + \textstyle\sum_s e^{z_{ts}}\bigr)                        &(2)\\
    p_{ts} &= e^{z_{ts} - \ell_t}, \qquad r_t = e^{b - \ell_t}                           &(3)\\
    o_t    &= \textstyle\sum_s p_{ts}\, v_s + r_t\, e                                    &(4)

with a logit b for each head, an additive bias a where one is given, and a sink value e, zero
unless given. The sums run over the keys that query t may see; the sink is seen by every query and
has neither scale nor softcap nor bias. The weights of a row sum to :math:`1 - r_t`. A fixed
:math:`b = 0` is softmax-off-by-one, :math:`b \to -\infty` softmax attention.

Source: OpenAI 2025, gpt_oss/torch/model.py (``sdpa``: a column of logits appended before the
softmax and dropped after it), read; Miller 2023, *Attention Is Off By One*, for b = 0; grade A.
"""

import math
from typing import NamedTuple

import numpy as np

from attention_ref import core


class Cache(NamedTuple):
    """What the backward needs, and what implementers compare with (``p``, ``p_sink``, ``lse``)."""

    q: np.ndarray  # (..., T, D), rows with NaN or infinity replaced by zeros
    k: np.ndarray  # (..., S, D), likewise
    v: np.ndarray  # (..., S, E), likewise
    e: np.ndarray | None  # (..., E), value of the sink
    capped: np.ndarray  # (..., T, S), scores after the softcap, before bias and mask
    p: np.ndarray  # (..., T, S), weights of the keys
    p_sink: np.ndarray  # (..., T), weight of the sink
    lse: np.ndarray  # (..., T), log of the sum of exponentials with the sink's, nats
    live: np.ndarray  # (..., T, S), True = may attend
    poison: np.ndarray  # (..., T, 1), rows that are NaN
    scale: float
    softcap: float | None
    b_shape: tuple | None  # None for a number
    bias_shape: tuple | None


def normalise_forward(z, live, b, empty_row="zero"):
    """Softmax over the visible keys of every row and a sink with logit b.

    Parameters
    ----------
    z : ndarray, shape (..., T, S), nats
        Scores.
    live : bool ndarray, broadcast to (..., T, S)
        True = may attend.
    b : float, or ndarray, broadcast to (..., T, 1), nats
        Logit of the sink; -inf for none.
    empty_row : {"zero", "nan", "uniform", "raise"}
        Under "uniform" a row without keys gets weights 1/S and nothing for the sink.

    Returns
    -------
    p : ndarray, shape (..., T, S)
        Weights of the keys.
    r : ndarray, shape (..., T, 1)
        Weight of the sink.
    lse : ndarray, shape (..., T, 1)
        Log of the sum of all exponentials, nats.
    """
    z = np.where(live, z, -np.inf)
    top = core.row_max(np.maximum(z, b))
    keys, sink = np.exp(z - top), np.exp(b - top)
    total = np.sum(keys, axis=-1, keepdims=True) + sink
    none = total == 0.0
    total = np.where(none, 1.0, total)
    p, r = keys / total, sink / total
    if empty_row == "uniform":
        empty = ~np.any(live, axis=-1, keepdims=True)
        p = np.where(empty, 1.0 / max(z.shape[-1], 1), p)
        r = np.where(empty, 0.0, r)
    return p, r, np.where(none, -np.inf, top + np.log(total))


def normalise_backward(dp, dr, p, r, live):
    """dz = p (dp - rho) and db = r (dr - rho) in every row, rho = sum_s p dp + r dr.

    Parameters
    ----------
    dp, dr : ndarray, shapes (..., T, S), (..., T, 1)
        Gradients of the weights; ``dr`` may be the number 0.
    p, r, live : ndarray
        As in :func:`normalise_forward`.

    Returns
    -------
    dz, db : ndarray, shapes (..., T, S), (..., T, 1)
        Gradients of the scores and of the sink's logit, row by row.
    """
    rho = np.sum(p * dp, axis=-1, keepdims=True) + r * dr
    return np.where(live, p * (dp - rho), 0.0), r * (dr - rho)


def _check(q, k, v, b, e, **options):
    """The checks of ``core.check.attention``, and those of the sink; the lengths by letter."""
    n = core.check.attention(q, k, v, **options)
    if isinstance(b, (int, float, np.number)):
        core.check.number("b", None if b == -math.inf else b, unit="nats")
    else:
        core.check.shapes(b=(b, "... H"))
        core.check.check_bias(b, n["..."], "b", "(..., H)")
    if e is not None:
        core.check.shapes(e=(e, "... E"))
        core.check.check_bias(e, (*n["..."], n["E"]), "e", "(..., H, E)")
    return n


def sink_forward(
    q, k, v, b=0.0, e=None, *, mask=None, causal=False, align="lower_right", scale=None,
    softcap=None, bias=None, empty_row="zero",
):  # fmt: skip
    """Mix the values with softmax weights of which a sink takes its share.

    Parameters
    ----------
    q : ndarray, shape (..., T, D)
        Queries.
    k : ndarray, shape (..., S, D)
        Keys.
    v : ndarray, shape (..., S, E)
        Values.
    b : float, or ndarray, broadcast to (..., H), nats
        Logit of the sink, one a head; 0 is softmax-off-by-one, -inf no sink.
    e : ndarray, broadcast to (..., H, E), optional
        Value of the sink; zero when not given.
    mask : bool ndarray, broadcast to (..., T, S), optional
        True = may attend; the sink is never hidden.
    causal : bool
        Hide the keys behind each query.
    align : {"lower_right", "upper_left"}
        Where the causal diagonal lies when T != S.
    scale : float, dimensionless, optional
        The factor c; 1/sqrt(D) by default.
    softcap : float, > 0, nats, optional
        Bound on the scores of the keys before bias and mask.
    bias : ndarray, broadcast to (..., T, S), nats, optional
        Added to the scores after the softcap; -inf gives a weight of 0.
    empty_row : {"zero", "nan", "uniform", "raise"}
        Weights of a query that may see no key; under "zero" all goes to the sink, and the output
        is e, or 0 without one.

    Returns
    -------
    out : ndarray, shape (..., T, E)
        Outputs.
    cache : Cache
        For the backward; holds ``p``, ``p_sink`` and ``lse``.

    Raises
    ------
    ShapeError
        When widths, lengths or leading axes do not fit.
    DTypeError
        When an argument is no float32 or float64 array, or the mask is not boolean.
    ParameterError
        When an option or a number is outside its domain, or a row is empty under "raise".
    MemoryLimitError
        When the scores would take more than 2 GiB.

    Notes
    -----
    The last leading axis of q is the head's. The logit is learned in gpt-oss and constant in
    Miller's form; there the 1 in the denominator becomes exp(-m) once the largest score m is
    taken out. gpt-oss has no sink value: e is an extension, as a learned extra value. "Sink" also
    means the first tokens that a cache keeps, which is something else (cache/streaming_sinks).
    ``lse`` contains the sink; that of the keys alone is ``lse + log1p(-p_sink)``.

    Source
    ------
    normalizers/sink in the catalog; gpt_oss/torch/model.py; grade A.

    References
    ----------
    Miller 2023, Attention Is Off By One. OpenAI 2025, gpt-oss.

    Examples
    --------
    >>> import numpy as np
    >>> q = np.array([[1.0]])
    >>> k = np.array([[0.0], [np.log(2.0)]])
    >>> v = np.array([[4.0], [8.0]])
    >>> out, cache = sink_forward(q, k, v)
    >>> out.round(12).tolist(), cache.p.round(12).tolist(), cache.p_sink.round(12).tolist()
    ([[5.0]], [[0.25, 0.5]], [0.25])
    """
    n = _check(
        q, k, v, b, e, mask=mask, bias=bias, align=align, scale=scale, softcap=softcap,
        empty_row=empty_row,
    )  # fmt: skip
    scale = core.default_scale(n["D"], scale)
    live = core.visible(q, k, mask=mask, causal=causal, align=align, empty_row=empty_row)
    q, k, v, poison = core.quarantine(q, k, v, live, empty_row)
    b_shape = getattr(b, "shape", None) or None
    if b_shape is None:
        logit = float(b)
    else:
        good = np.isfinite(b) | (b == -np.inf)
        logit, poison = np.where(good, b, 0.0)[..., None, None], poison | ~good[..., None, None]
    if e is not None:
        good = np.all(np.isfinite(e), axis=-1)[..., None]
        e, poison = np.where(good, e, 0.0), poison | ~good[..., None]

    z = capped = core.softcap_forward(core.scores_forward(q, k, scale), softcap)  # (1)
    if bias is not None:
        clean, poison = core.quarantine_bias(bias, live, poison)
        z = z + clean
    p, r, lse = normalise_forward(z, live, logit, empty_row)  # (2) (3)
    out = core.mix_forward(p, v)  # (4)
    if e is not None:
        out = out + r * e[..., None, :]

    out = np.where(poison, np.nan, out)
    lse = np.where(poison, np.nan, lse)[..., 0]
    bias_shape = None if bias is None else bias.shape
    return out, Cache(
        q, k, v, e, capped, p, r[..., 0], lse, live, poison, scale, softcap, b_shape, bias_shape
    )


def sink_backward(dout, cache):
    """Gradients of :func:`sink_forward`, its steps read from the bottom up.

    Parameters
    ----------
    dout : ndarray, shape (..., T, E)
        Gradient of the output.
    cache : Cache
        From the forward.

    Returns
    -------
    dict
        Under "q", "k", "v" and, when given as arrays, "b", "e", "bias".
    """
    q, k, v, e, capped, p, r, _, live, poison, scale, softcap, b_shape, bias_shape = cache
    lead = np.broadcast_shapes(p.shape[:-2], v.shape[:-2])
    core.check.cotangent(dout, (*lead, p.shape[-2], v.shape[-1]))
    dout, r = np.where(poison, 0.0, dout), r[..., None]

    dp, dv = core.mix_backward(dout, p, v)  # (4')
    gradients, dr = {}, 0.0
    if e is not None:
        dr = np.sum(dout * e[..., None, :], axis=-1, keepdims=True)
        gradients["e"] = core.sum_to(np.sum(r * dout, axis=-2), e.shape)
    dz, db = normalise_backward(dp, dr, p, r, live)  # (3') (2')
    if b_shape is not None:
        gradients["b"] = core.sum_to(np.sum(db, axis=(-2, -1)), b_shape)
    if bias_shape is not None:  # (1')
        gradients["bias"] = core.sum_to(dz, bias_shape)
    dz = core.softcap_backward(dz, capped, softcap)
    dq, dk = core.scores_backward(dz, q, k, scale)

    return {"q": dq, "k": dk, "v": dv, **gradients}


def _example(rng):
    """Two heads with a logit each; off-by-one where there are no heads; a value in two cases."""

    def extra(rng, kwargs):
        if kwargs["q"].ndim == 2:
            return {}
        more = {"b": rng.standard_normal(2)}
        if kwargs["q"].ndim == 3:  # one batch of two heads
            more |= {n: kwargs[n][None] for n in ("q", "k", "v")}
        if "softcap" in kwargs or kwargs["q"].ndim == 4:
            more["e"] = rng.standard_normal((2, 3))
        return more

    return core.examples.attention(rng, extra=extra)


def _two_heads(rng, **more):
    return core.examples.qkv(rng) | more


def _one_more_key(kwargs):
    """A key of zeros whose bias is the sink's logit, and the sink's value."""
    b, e = kwargs.pop("b"), kwargs.pop("e")
    column = np.broadcast_to(b[:, None, None], (2, 5, 1))
    return kwargs | {
        "k": np.concatenate([kwargs["k"], np.zeros((2, 1, 4))], axis=1),
        "v": np.concatenate([kwargs["v"], e[:, None, :]], axis=1),
        "bias": np.concatenate([np.zeros((2, 5, 6)), column], axis=2),
    }


SPEC = core.Mechanism(
    key="normalizers/sink",
    forward=sink_forward,
    backward=sink_backward,
    example=_example,
    flags=frozenset(core.SOFTMAX_FLAGS) - {"row_stochastic", "shift_invariant", "linear_in_v"},
    opt_out={
        "empty_rows": "with a sink value e a query without keys gets e, not 0; "
        "tests/methods/normalizers/test_sink.py does both"
    },
    reduces_to=(
        core.Reduction(
            key="scores/dot_product",
            says="a logit of -inf is softmax attention",
            kwargs=lambda rng: _two_heads(rng, b=np.full(2, -np.inf), causal=True),
            other=lambda kwargs: {n: a for n, a in kwargs.items() if n != "b"},
        ),
        core.Reduction(
            key="scores/dot_product",
            says="the sink is one more key, with logit b and value e",
            kwargs=lambda rng: _two_heads(rng, b=rng.normal(size=2), e=rng.normal(size=(2, 3))),
            other=lambda kwargs: _one_more_key(dict(kwargs)),
        ),
    ),
    claim=(
        "When a query matches nothing, a model with a sink leaves the first token alone, and plain "
        "softmax attention puts its weight there."
    ),
    verified_by=("slow loop", "PyTorch"),
)
