r"""Softplus attention with re-weighting: positive scores, then a power of what is above average.

.. math::

    \hat q_t &= q_t / \lVert q_t \rVert, \qquad \hat k_s = k_s / \lVert k_s \rVert          &(1)\\
    z_{ts}   &= c\, \ln N_t\; \hat q_t \cdot \hat k_s                                       &(2)\\
    a_{ts}   &= \ln(1 + e^{z_{ts}}) / \textstyle\sum_{s'} \ln(1 + e^{z_{ts'}})              &(3)\\
    r_{ts}   &= \max(N_t\, a_{ts} - o_t,\, 0), \qquad
    p_{ts} = r_{ts}^{m} / \textstyle\sum_{s'} r_{ts'}^{m}                                   &(4)\\
    o^{out}_t &= \textstyle\sum_s p_{ts}\, v_s                                              &(5)

N is the number of keys that a query sees, c the logarithm of the width D, o is 1, or 0 in rows of
at most three keys. (3) alone is LSSA, with (4) it is LSSAR. A row of N a has the mean 1, so (4)
drops every key below average and sharpens the rest by the power m, 3 or 15 in the paper: what
stands out keeps its weight as N grows, where a softmax of bounded scores flattens.

Source: Gao, Spratling, Gionfrida 2026, *Softplus Attention with Re-weighting Boosts Length
Extrapolation in Large Language Models*, version 5, from detailed notes with its equations and
tables; grade B.
"""

import math
from typing import NamedTuple

import numpy as np

from attention_ref import core

FLAT = 1e-5
"""A row whose largest N a is above 1 by less than this is even, and (4) leaves it as it is."""


class Cache(NamedTuple):
    """What the backward needs, and what implementers compare with (``a``, ``p``)."""

    q: np.ndarray  # (..., T, D), unit vectors
    k: np.ndarray  # (..., S, D), unit vectors
    v: np.ndarray  # (..., S, E), rows with NaN or infinity replaced by zeros
    lengths: tuple  # of q and k, (..., T, 1) and (..., S, 1); 1 for a zero vector
    count: np.ndarray  # (..., T, 1), N
    factor: np.ndarray  # (..., T, 1), c ln N
    z: np.ndarray  # (..., T, S), scores, nats
    total: np.ndarray  # (..., T, 1), sum of the softplus
    a: np.ndarray  # (..., T, S), weights after (3)
    u: np.ndarray | None  # (..., T, S), r over its largest; None without (4)
    slope: np.ndarray | None  # (..., T, 1), m / (largest r times the sum of u^m); 0 in even rows
    p: np.ndarray  # (..., T, S), weights
    live: np.ndarray  # (..., T, S), True = may attend
    poison: np.ndarray  # (..., T, 1), rows that are NaN
    power: float | None


def normalise_forward(x):
    """Step (1); a zero vector stays zero.

    Parameters
    ----------
    x : ndarray, shape (..., T, D)
        Queries or keys.

    Returns
    -------
    y : ndarray, shape (..., T, D)
        Unit vectors.
    length : ndarray, shape (..., T, 1)
        What x was divided by.
    """
    square = np.sum(np.square(x), axis=-1, keepdims=True)
    length = np.sqrt(np.where(square > 0, square, 1.0))
    return x / length, length


def normalise_backward(dy, y, length):
    """dx = (dy - y (y.dy)) / length: what points along y is lost.

    Parameters
    ----------
    dy, y : ndarray, shape (..., T, D)
        Gradient of the unit vectors, and they.
    length : ndarray, shape (..., T, 1)
        From the forward.

    Returns
    -------
    ndarray, shape (..., T, D)
    """
    return (dy - y * np.sum(y * dy, axis=-1, keepdims=True)) / length


def reweight_forward(a, count, power, few):
    """Step (4), with the powers of r over its largest: r^15 would underflow or overflow.

    Parameters
    ----------
    a : ndarray, shape (..., T, S)
        Weights after (3).
    count : ndarray, shape (..., T, 1)
        N.
    power : float
        m.
    few : int
        Rows of at most so many keys keep o = 0.

    Returns
    -------
    p, u : ndarray, shape (..., T, S)
        Weights, and r over its largest.
    slope : ndarray, shape (..., T, 1)
        m / (largest r times the sum of u^m), 0 in even rows.
    """
    r = core.relu(count * a - np.where(count > few, np.ones_like(count), 0.0))
    top = core.row_max(r)
    even = top < FLAT
    top = np.where(even, 1.0, top)
    u = r / top
    raised = u**power
    total = np.where(even, 1.0, np.sum(raised, axis=-1, keepdims=True))
    p = np.where(even, a, raised / total)
    return p, u, np.where(even, 0.0, power / (top * total))


def reweight_backward(dp, p, u, slope, count, power):
    """da = N slope u^(m-1) (dp - sum_s p dp), where the largest r counts as a constant.

    It may: p does not change when all r of a row are multiplied by one number. Even rows
    hand dp on.

    Parameters
    ----------
    dp, p, u : ndarray, shape (..., T, S)
        Gradient of the weights, and what the forward gave.
    slope, count : ndarray, shape (..., T, 1)
        From the forward.
    power : float
        m.

    Returns
    -------
    ndarray, shape (..., T, S)
    """
    kept = np.where(u > 0, u ** (power - 1.0), 0.0)
    dr = slope * kept * (dp - np.sum(p * dp, axis=-1, keepdims=True))
    return np.where(slope == 0, dp, count * dr)


def softplus_reweighted_forward(
    q, k, v, *, power=3.0, few=3, mask=None, causal=False, align="lower_right", scale=None,
    empty_row="zero",
):  # fmt: skip
    """Mix the values with re-weighted, normalised softplus scores of cosines.

    Parameters
    ----------
    q : ndarray, shape (..., H, T, D)
        Queries; the head axis may be absent.
    k : ndarray, shape (..., H, S, D)
        Keys.
    v : ndarray, shape (..., H, S, E)
        Values.
    power : float, >= 1, or None
        m; the paper trains with 3 and extrapolates best with 15. None leaves (4) out: LSSA.
    few : int, keys
        Rows of at most so many visible keys are raised to the power without dropping any.
    mask : bool ndarray, broadcast to (..., H, T, S), optional
        True = may attend.
    causal : bool
        Hide the keys behind each query; the paper's models are causal.
    align : {"lower_right", "upper_left"}
        Where the causal diagonal lies when T != S.
    scale : float, dimensionless, optional
        The factor c; ln D by default.
    empty_row : {"zero", "nan", "uniform", "raise"}
        Output of a query that may see no key.

    Returns
    -------
    out : ndarray, shape (..., H, T, E)
        Outputs.
    cache : Cache
        For the backward; holds ``a`` and ``p``.

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
    The paper counts the rows of a causal model: N is the place of the query, from 1. Here N is the
    number of keys that a row sees under any mask, and "the first three rows" are the rows of at
    most ``few`` keys; without a mask both are the same. The first row has ln N = 0 and one key.

    Keys of equal scores have N a = 1 up to rounding, and (4) would divide noise by noise. The
    paper adds a small number below the line, which sends such rows to zero; here they stay even,
    so that every row with a key sums to 1. Earlier versions of the paper scale the scores in
    another way. A zero vector stays zero: its cosines are 0. Softplus is taken with log1p: a row
    whose scores are all far below 0 would lose its digits in log(1 + e^z).

    Source
    ------
    normalizers/softplus_reweighted in the catalog; notes on version 5; grade B.

    References
    ----------
    Gao, Spratling, Gionfrida 2026, Softplus Attention with Re-weighting Boosts Length
    Extrapolation in Large Language Models.

    Examples
    --------
    >>> import numpy as np
    >>> q, k = np.array([[2.0, 0.0]]), np.array([[0.0, 1.0], [5.0, 0.0]])
    >>> c = np.log(7.0) / np.log(2.0)  # z = 0 and ln 7: softplus ln 2 and ln 8
    >>> v = np.array([[0.0], [28.0]])
    >>> out, cache = softplus_reweighted_forward(q, k, v, scale=c)
    >>> out.round(12).tolist(), cache.a.round(12).tolist()  # 1 to 27
    ([[27.0]], [[0.25, 0.75]])
    """
    n = core.check.attention(q, k, v, mask=mask, align=align, scale=scale, empty_row=empty_row)
    core.check.number("power", power, low=1)
    core.check.count("few", few, low=1, unit="keys")
    scale = math.log(n["D"]) if scale is None else float(scale)
    live = core.visible(q, k, mask=mask, causal=causal, align=align, empty_row=empty_row)
    q, k, v, poison = core.quarantine(q, k, v, live, empty_row)

    (q, length_q), (k, length_k) = normalise_forward(q), normalise_forward(k)  # (1)
    one = np.ones_like(q, shape=(1,))
    count = np.sum(np.where(live, one, 0.0), axis=-1, keepdims=True)
    factor = scale * np.log(np.maximum(count, 1.0))
    z = core.scores_forward(q, k, 1.0) * factor  # (2)
    positive = np.where(live, core.softplus(z), 0.0)
    total = np.sum(positive, axis=-1, keepdims=True)
    total = np.where(total > 0, total, 1.0)
    p = a = positive / total  # (3)
    u = slope = None
    if power is not None:
        p, u, slope = reweight_forward(a, count, power, few)  # (4)
    if empty_row == "uniform":
        p = np.where(count > 0, p, 1.0 / max(n["S"], 1))
    out = core.mix_forward(p, v)  # (5)

    out = np.where(poison, np.nan, out)
    lengths = (length_q, length_k)
    return out, Cache(
        q, k, v, lengths, count, factor, z, total, a, u, slope, p, live, poison, power
    )


def softplus_reweighted_backward(dout, cache):
    """Gradients of :func:`softplus_reweighted_forward`, its steps read from the bottom up.

    Parameters
    ----------
    dout : ndarray, shape (..., H, T, E)
        Gradient of the output.
    cache : Cache
        From the forward.

    Returns
    -------
    dict
        Under "q", "k", "v".
    """
    q, k, v, lengths, count, factor, z, total, a, u, slope, p, live, poison, power = cache
    lead = np.broadcast_shapes(p.shape[:-2], v.shape[:-2])
    core.check.cotangent(dout, (*lead, p.shape[-2], v.shape[-1]))
    dout = np.where(poison, 0.0, dout)

    dp, dv = core.mix_backward(dout, p, v)  # (5')
    da = core.sum_to(dp, p.shape)
    if power is not None:
        da = reweight_backward(da, p, u, slope, count, power)  # (4')
    ds = (da - np.sum(a * da, axis=-1, keepdims=True)) / total  # (3')
    dz = np.where(live, ds * core.logistic(z), 0.0)
    dq, dk = core.scores_backward(dz * factor, q, k, 1.0)  # (2')
    dq, dk = normalise_backward(dq, q, lengths[0]), normalise_backward(dk, k, lengths[1])  # (1')

    return {"q": dq, "k": dk, "v": dv}


def _clear(rng, kwargs):
    """Of 64 queries for a row one whose N a lie away from 1, the largest above 1.7.

    Differences with steps of 1e-3 need this, and lengths of 5 and more.
    """
    k, length = normalise_forward(kwargs["k"])
    kwargs["k"] = k * np.maximum(length, 5.0)
    q, length = normalise_forward(rng.standard_normal((64, *kwargs["q"].shape)))
    q = q * np.maximum(length, 5.0)
    _, cache = softplus_reweighted_forward(**(kwargs | {"q": q}))
    r = np.where(cache.live, cache.count * cache.a - 1.0, 9.0)
    near = np.any(np.abs(r) < 0.16, axis=-1, keepdims=True)
    near = near | (np.max(np.where(cache.live, r, 0.0), axis=-1, keepdims=True) < 0.7)
    near = near & (cache.count > 2)
    return np.take_along_axis(q, np.argmin(near, axis=0)[None], axis=0)[0]


def _example(rng):
    """Powers that differ; LSSA alone once; rows of at most three keys in the masks."""
    cases = core.examples.attention(rng, options=("causal", "mask"))
    for i, kwargs in enumerate(cases.values()):
        kwargs |= {"power": (3.0, 2.5, 4.0)[i % 3], "scale": 1.5}
    del cases["no-heads"]["scale"]
    cases["batch"]["few"] = 2
    cases["lssa"] = core.examples.qkv(rng) | {"power": None, "scale": 2.0}
    for kwargs in cases.values():
        kwargs["q"] = _clear(rng, kwargs)
    return cases


def _flat(rng):
    return _example(rng)["mask"] | {"scale": 0.0, "power": None}


def _mean(kwargs):
    return {n: a for n, a in kwargs.items() if n not in ("power", "few")}


SPEC = core.Mechanism(
    key="normalizers/softplus_reweighted",
    forward=softplus_reweighted_forward,
    backward=softplus_reweighted_backward,
    example=_example,
    flags=frozenset(core.SOFTMAX_FLAGS) - {"scaled", "shift_invariant"},
    reduces_to=(
        core.Reduction("scores/dot_product", "scale 0 is the mean of the values", _flat, _mean),
    ),
    claim=(
        "The weight of a key that stands out stays nearly constant as keys are added under "
        "re-weighted softplus attention with the power 15; under a softmax it vanishes."
    ),
    verified_by=("slow loop", "PyTorch"),
)
