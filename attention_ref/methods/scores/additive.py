r"""Additive attention: a small network with one hidden layer scores each query and key.

.. math::

    a_t    &= q_t W_q, \qquad h_s = k_s W_k + b                                        &(1)\\
    u_{ts} &= \tanh(a_t + h_s)                                                         &(2)\\
    z_{ts} &= \kappa \tanh(u_{ts} \cdot w / \kappa) + \text{bias}_{ts}                 &(3)\\
    p_{ts} &= e^{z_{ts}} / \textstyle\sum_{s'} e^{z_{ts'}}                             &(4)\\
    o_t    &= \textstyle\sum_s p_{ts}\, v_s                                            &(5)

There is no scale: :math:`|u \cdot w| \le \sum_m |w_m|` whatever the widths of q and k, which may
differ. The price is a hidden vector of M numbers for every pair of a query and a key.

Source: Bahdanau, Cho, Bengio 2015, section 3.1 and appendix A.1.2 (without b); grade C (well
known). Called "concat" in Luong et al. 2015: :math:`w \cdot \tanh([q; k] W)` with W cut in two.
"""

from typing import NamedTuple

import numpy as np

from attention_ref import core


class Cache(NamedTuple):
    """What the backward needs, and what implementers compare with (``p``, ``lse``)."""

    q: np.ndarray  # (..., T, D), rows with NaN or infinity replaced by zeros
    k: np.ndarray  # (..., S, Dk), likewise
    v: np.ndarray  # (..., S, E), likewise
    Wq: np.ndarray  # (..., D, M)
    Wk: np.ndarray  # (..., Dk, M)
    w: np.ndarray  # (..., M)
    u: np.ndarray  # (..., T, S, M), hidden units
    capped: np.ndarray  # (..., T, S), scores after the softcap, before bias and mask
    p: np.ndarray  # (..., T, S), weights
    lse: np.ndarray  # (..., T), log of the sum of exponentials, nats; -inf for an empty row
    live: np.ndarray  # (..., T, S), True = may attend
    poison: np.ndarray  # (..., T, 1), rows that are NaN
    softcap: float | None
    b_shape: tuple | None
    bias_shape: tuple | None


def hidden_forward(q, k, Wq, Wk, b):
    """u = tanh(q Wq + k Wk + b) for every pair: shapes (..., T, D), (..., S, Dk) -> (..., T, S, M).

    Parameters
    ----------
    q, k, Wq, Wk : ndarray
        As in :func:`additive_forward`.
    b : ndarray, shape (..., M), or None
        Bias of the hidden layer.

    Returns
    -------
    ndarray, shape (..., T, S, M)
    """
    a, h = q @ Wq, k @ Wk
    if b is not None:
        h = h + b[..., None, :]
    return np.tanh(a[..., :, None, :] + h[..., None, :, :])


def hidden_backward(du, u, q, k, Wq, Wk, b_shape):
    """Through tanh, then each sum to its side: over s for the query, over t for the key.

    Parameters
    ----------
    du : ndarray, shape (..., T, S, M)
        Gradient of u.
    u, q, k, Wq, Wk : ndarray
        From the forward.
    b_shape : tuple of int or None
        Shape of the bias.

    Returns
    -------
    dict
        Under "q", "k", "Wq", "Wk" and, when a bias was given, "b".
    """
    dpre = du * (1.0 - np.square(u))
    da, dh = np.sum(dpre, axis=-2), np.sum(dpre, axis=-3)
    gradients = {
        "q": core.sum_to(da @ np.swapaxes(Wq, -1, -2), q.shape),
        "k": core.sum_to(dh @ np.swapaxes(Wk, -1, -2), k.shape),
        "Wq": core.sum_to(np.swapaxes(q, -1, -2) @ da, Wq.shape),
        "Wk": core.sum_to(np.swapaxes(k, -1, -2) @ dh, Wk.shape),
    }
    if b_shape is not None:
        gradients["b"] = core.sum_to(np.sum(dh, axis=-2), b_shape)
    return gradients


def _check(q, k, v, Wq, Wk, w, b, mask, bias, align, softcap, empty_row):
    """The checks at the door; the broadcast shape of the scores."""
    n = core.check.shapes(
        q=(q, "... T D"), k=(k, "... S Dk"), v=(v, "... S E"), Wq=(Wq, "... D M"),
        Wk=(Wk, "... Dk M"), w=(w, "... M"), b=(b, "... M"),
    )  # fmt: skip
    full = (*n["..."], n["T"], n["S"])
    core.check.check_mask(mask, full)
    core.check.check_bias(bias, full)
    core.check.option("align", align, core.check.ALIGNMENTS)
    core.check.option("empty_row", empty_row, core.check.EMPTY_ROWS)
    core.check.number("softcap", softcap, low=0, open_low=True)
    hint = "a slice of the queries at a time"
    core.check.memory((*full, n["M"]), q.dtype, "the hidden units", hint)


def additive_forward(
    q, k, v, Wq, Wk, w, b=None, *, mask=None, causal=False, align="lower_right", softcap=None,
    bias=None, empty_row="zero",
):  # fmt: skip
    """Mix the values with softmax weights of the scores of a one-layer network.

    Parameters
    ----------
    q : ndarray, shape (..., T, D)
        Queries; originally the state of a decoder.
    k : ndarray, shape (..., S, Dk)
        Keys; originally the states of an encoder, and the values too.
    v : ndarray, shape (..., S, E)
        Values.
    Wq : ndarray, shape (..., D, M)
        Projection of the queries to M hidden units; leading axes broadcast, one a head.
    Wk : ndarray, shape (..., Dk, M)
        Projection of the keys.
    w : ndarray, shape (..., M)
        Read-out of the hidden units.
    b : ndarray, shape (..., M), optional
        Bias of the hidden units.
    mask : bool ndarray, broadcast to (..., T, S), optional
        True = may attend.
    causal : bool
        Hide the keys behind each query.
    align : {"lower_right", "upper_left"}
        Where the causal diagonal lies when T != S.
    softcap : float, > 0, nats, optional
        Bound on the scores before bias and mask.
    bias : ndarray, broadcast to (..., T, S), nats, optional
        Added to the scores after the softcap; -inf gives a weight of 0.
    empty_row : {"zero", "nan", "uniform", "raise"}
        Output of a query that may see no key.

    Returns
    -------
    out : ndarray, shape (..., T, E)
        Outputs.
    cache : Cache
        For the backward; holds ``p`` and ``lse``.

    Raises
    ------
    ShapeError
        When widths, lengths or leading axes do not fit.
    DTypeError
        When an argument is no float32 or float64 array, or the mask is not boolean.
    ParameterError
        When an option or a number is outside its domain, or a row is empty under "raise".
    MemoryLimitError
        When the hidden units would take more than 2 GiB.

    Notes
    -----
    When the same array is given as k and v, its gradient is the sum of both. k Wk + b depends on
    the keys only; a decoder computes it once.

    Source
    ------
    scores/additive in the catalog; section 3.1 of the paper; grade C.

    References
    ----------
    Bahdanau, Cho, Bengio 2015, Neural Machine Translation by Jointly Learning to Align and
    Translate.

    Examples
    --------
    >>> import numpy as np
    >>> q, k = np.array([[0.0]]), np.array([[0.0], [np.log(2.0)]])
    >>> v, one = np.array([[0.0], [4.0]]), np.ones((1, 1))
    >>> w = np.array([np.log(3.0) / 0.6])
    >>> out, cache = additive_forward(q, k, v, one, one, w)
    >>> out.round(12).tolist(), cache.p.round(12).tolist()
    ([[3.0]], [[0.25, 0.75]])
    """
    _check(q, k, v, Wq, Wk, w, b, mask, bias, align, softcap, empty_row)
    live = core.visible(q, k, mask=mask, causal=causal, align=align, empty_row=empty_row)
    q, k, v, poison = core.quarantine(q, k, v, live, empty_row)

    u = hidden_forward(q, k, Wq, Wk, b)  # (1) (2)
    z = np.sum(u * w[..., None, None, :], axis=-1)  # (3)
    z = capped = core.softcap_forward(z, softcap)
    if bias is not None:
        clean, poison = core.quarantine_bias(bias, live, poison)
        z = z + clean
    p, lse = core.softmax_forward(z, live, empty_row)  # (4)
    out = core.mix_forward(p, v)  # (5)

    out = np.where(poison, np.nan, out)
    lse = np.where(poison[..., 0], np.nan, lse)
    shapes = (None if b is None else b.shape, None if bias is None else bias.shape)
    return out, Cache(q, k, v, Wq, Wk, w, u, capped, p, lse, live, poison, softcap, *shapes)


def additive_backward(dout, cache):
    """Gradients of :func:`additive_forward`, its steps read from the bottom up.

    Parameters
    ----------
    dout : ndarray, shape (..., T, E)
        Gradient of the output.
    cache : Cache
        From the forward.

    Returns
    -------
    dict
        Under "q", "k", "v", "Wq", "Wk", "w" and, when given, "b" and "bias".
    """
    q, k, v, Wq, Wk, w, u, capped, p, _, live, poison, softcap, b_shape, bias_shape = cache
    lead = np.broadcast_shapes(p.shape[:-2], v.shape[:-2])
    core.check.cotangent(dout, (*lead, p.shape[-2], v.shape[-1]))
    dout = np.where(poison, 0.0, dout)

    dp, dv = core.mix_backward(dout, p, v)  # (5')
    dz = core.softmax_backward(dp, p, live)  # (4')
    gradients = {} if bias_shape is None else {"bias": core.sum_to(dz, bias_shape)}  # (3')
    dz = core.softcap_backward(dz, capped, softcap)[..., None]
    dw = core.sum_to(np.sum(dz * u, axis=(-3, -2)), w.shape)
    du = dz * w[..., None, None, :]
    gradients |= hidden_backward(du, u, q, k, Wq, Wk, b_shape)  # (2') (1')

    return {"v": dv, "w": dw, **gradients}


M, DK = 5, 2
"""Hidden units, and a width of the keys that is not that of the queries."""


def _parameters(rng, kwargs):
    """One network for all heads; half of the cases have a bias of the hidden layer.

    Entries of size 1/2 keep the differences of the checks, with steps of 1e-3, exact enough.
    """
    width, lead = kwargs["q"].shape[-1], kwargs["k"].shape[:-1]
    extra = {
        "q": 0.5 * kwargs["q"],
        "k": 0.5 * rng.standard_normal((*lead, DK)),
        "Wq": 0.5 * rng.standard_normal((width, M)),
        "Wk": 0.5 * rng.standard_normal((DK, M)),
        "w": 0.5 * rng.standard_normal(M),
    }
    bare = "causal" in kwargs or kwargs["q"].shape[-2] == 6
    return extra if bare else extra | {"b": 0.5 * rng.standard_normal(M)}


def _example(rng):
    cases = core.examples.attention(rng, extra=_parameters, scale=False)
    heads = {n: 0.5 * rng.standard_normal(s) for n, s in (
        ("Wq", (2, 4, M)), ("Wk", (2, DK, M)), ("w", (2, M)), ("b", (2, M)),
    )}  # fmt: skip
    cases["batch"] |= heads  # a network of its own for each of two heads
    del cases["causal-long-queries"]  # keeps the golden file small; "mask" has an empty row too
    return cases


def _equal_scores(rng):
    kwargs = core.examples.qkv(rng) | {"w": np.zeros(M), "causal": True}
    return kwargs | {n: rng.standard_normal((4, M)) for n in ("Wq", "Wk")}


def _mean(kwargs):
    return {n: kwargs[n] for n in ("q", "k", "v", "causal")} | {"scale": 0.0}


SPEC = core.Mechanism(
    key="scores/additive",
    forward=additive_forward,
    backward=additive_backward,
    example=_example,
    flags=frozenset(core.SOFTMAX_FLAGS) - {"scaled", "shift_invariant"},
    reduces_to=(
        core.Reduction(
            key="scores/dot_product",
            says="w = 0 makes all scores equal: the mean of the visible values",
            kwargs=_equal_scores,
            other=_mean,
        ),
    ),
    claim=(
        "As the width D grows, dot products without a scale saturate the softmax; additive "
        "scores do not, because they stay below the sum of |w|."
    ),
    verified_by=("slow loop", "PyTorch"),
)
