r"""Soft-capped scores: a hyperbolic tangent keeps every score inside (-cap, cap).

.. math::

    z_{ts} &= c\, q_t \cdot k_s                                                 &(1)\\
    y_{ts} &= \text{cap}\, \tanh(z_{ts} / \text{cap})                           &(2)\\
    p_{ts} &= e^{y_{ts} + b_{ts}} / \textstyle\sum_{s'} e^{y_{ts'} + b_{ts'}}   &(3)\\
    o_t    &= \textstyle\sum_s p_{ts}\, v_s                                     &(4)

Without a bias no weight can exceed another by more than the factor :math:`e^{2\,\text{cap}}`; the
slope :math:`1 - (y / \text{cap})^2` vanishes for large scores, so these stop learning.

Source: Gemma Team 2024, *Gemma 2*, section 2; official code google/gemma_pytorch, gemma/model.py
(after the scale, before the mask); grade A. The idea of capping by tanh is older (Bello et al.
2016, pointer networks).
"""

import math
from typing import NamedTuple

import numpy as np

from attention_ref import core


class Cache(NamedTuple):
    """What the backward needs, and what implementers compare with (``p``, ``lse``)."""

    q: np.ndarray  # (..., H, T, D), rows with NaN or infinity replaced by zeros
    k: np.ndarray  # (..., H, S, D), likewise
    v: np.ndarray  # (..., H, S, E), likewise
    z: np.ndarray  # (..., H, T, S), scores before the cap
    u: np.ndarray  # (..., H, T, S), tanh(z / cap)
    p: np.ndarray  # (..., H, T, S), weights
    lse: np.ndarray  # (..., H, T), log of the sum of exponentials, nats; -inf for an empty row
    live: np.ndarray  # (..., T, S), True = may attend
    poison: np.ndarray  # (..., H, T, 1), rows that are NaN
    scale: float
    cap: float | np.ndarray  # a number, or (..., H, 1, 1)
    cap_shape: tuple | None
    bias_shape: tuple | None


def cap_forward(z, cap):
    """y = cap tanh(z / cap).

    Parameters
    ----------
    z : ndarray, shape (..., T, S)
        Scores, nats.
    cap : float or ndarray, broadcast to z
        Bound, nats.

    Returns
    -------
    y : ndarray, shape (..., T, S)
        Capped scores.
    u : ndarray, shape (..., T, S)
        y / cap, for the backward.
    """
    u = np.tanh(z / cap)
    return cap * u, u


def cap_backward(dy, z, u, cap):
    """dz = dy (1 - u^2), and for each score dy (u - (z / cap) (1 - u^2)), its part of dcap.

    Parameters
    ----------
    dy, z, u : ndarray, shape (..., T, S)
        Gradient of y, scores, y / cap.
    cap : float or ndarray
        As in the forward.

    Returns
    -------
    dz, dcap : ndarray, shape (..., T, S)
        dcap is not summed yet.
    """
    slope = 1.0 - np.square(u)
    return dy * slope, dy * (u - z / cap * slope)


def _check_cap(cap, lead):
    """A positive number, or an array whose axes are leading axes of the scores."""
    if isinstance(cap, (int, float, np.number)):
        core.check.number("cap", cap, low=0, open_low=True, unit="nats")
        return
    core.check.kind("cap", cap)
    core.check.shapes(cap=(cap, "... H"))
    got = tuple(cap.shape)
    pairs = zip(got[::-1], lead[::-1], strict=False)
    if len(got) > len(lead) or any(x not in (1, y) for x, y in pairs):
        raise core.errors.ShapeError(
            f"cap has shape {got}, expected to broadcast to {lead}, that is (..., H), "
            "the leading axes of q, k, v"
        )


def softcap_forward(
    q, k, v, cap=50.0, *, mask=None, causal=False, align="lower_right", scale=None, bias=None,
    empty_row="zero",
):  # fmt: skip
    """Mix the values with softmax weights of scores that cannot leave (-cap, cap).

    Parameters
    ----------
    q : ndarray, shape (..., H, T, D)
        Queries; the head axis may be absent.
    k : ndarray, shape (..., H, S, D)
        Keys.
    v : ndarray, shape (..., H, S, E)
        Values.
    cap : float, > 0, or ndarray, shape (..., H), nats
        Bound on the scores before bias and mask; an array has a gradient and must not hold 0.
    mask : bool ndarray, broadcast to (..., H, T, S), optional
        True = may attend.
    causal : bool
        Hide the keys behind each query.
    align : {"lower_right", "upper_left"}
        Where the causal diagonal lies when T != S.
    scale : float, dimensionless, optional
        The factor c; 1/sqrt(D) by default.
    bias : ndarray, broadcast to (..., H, T, S), nats, optional
        Added to the capped scores; -inf gives a weight of 0.
    empty_row : {"zero", "nan", "uniform", "raise"}
        Output of a query that may see no key.

    Returns
    -------
    out : ndarray, shape (..., H, T, E)
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
        When the scores would take more than 2 GiB.

    Notes
    -----
    The default cap is that of Gemma 2's attention; its final logits use 30. Gemma's scale is
    query_pre_attn_scalar^-1/2, which is not 1/sqrt(D) in every size. The order is scale, cap,
    bias, mask: a mask of -inf before the cap would become -cap. ``scores/dot_product`` has the same
    cap as the keyword ``softcap``; here it may be an array, one a head, and be learned. tanh is
    odd, so -cap in an array is the same as cap.

    Source
    ------
    scores/softcap in the catalog; section 2 of the report, official code; grade A.

    References
    ----------
    Gemma Team 2024, Gemma 2: Improving Open Language Models at a Practical Size.

    Examples
    --------
    >>> import numpy as np
    >>> q, k = np.array([[9e9]]), np.array([[0.0], [1.0]])
    >>> v = np.array([[0.0], [4.0]])
    >>> out, cache = softcap_forward(q, k, v, cap=np.log(3.0))
    >>> out.round(12).tolist(), cache.p.round(12).tolist()
    ([[3.0]], [[0.25, 0.75]])
    """
    n = core.check.attention(
        q, k, v, mask=mask, bias=bias, align=align, scale=scale, empty_row=empty_row
    )
    _check_cap(cap, n["..."])
    number = isinstance(cap, (int, float, np.number))
    cap_shape, cap = (None, float(cap)) if number else (cap.shape, cap[..., None, None])
    scale = core.default_scale(n["D"], scale)
    live = core.visible(q, k, mask=mask, causal=causal, align=align, empty_row=empty_row)
    q, k, v, poison = core.quarantine(q, k, v, live, empty_row)

    z = core.scores_forward(q, k, scale)  # (1)
    y, u = cap_forward(z, cap)  # (2)
    if bias is not None:
        clean, poison = core.quarantine_bias(bias, live, poison)
        y = y + clean
    p, lse = core.softmax_forward(y, live, empty_row)  # (3)
    out = core.mix_forward(p, v)  # (4)

    out = np.where(poison, np.nan, out)
    lse = np.where(poison[..., 0], np.nan, lse)
    bias_shape = None if bias is None else bias.shape
    return out, Cache(q, k, v, z, u, p, lse, live, poison, scale, cap, cap_shape, bias_shape)


def softcap_backward(dout, cache):
    """Gradients of :func:`softcap_forward`, its steps read from the bottom up.

    Parameters
    ----------
    dout : ndarray, shape (..., H, T, E)
        Gradient of the output.
    cache : Cache
        From the forward.

    Returns
    -------
    dict
        Under "q", "k", "v", under "cap" when it was an array, under "bias" when given.
    """
    q, k, v, z, u, p, _, live, poison, scale, cap, cap_shape, bias_shape = cache
    lead = np.broadcast_shapes(p.shape[:-2], v.shape[:-2])
    core.check.cotangent(dout, (*lead, p.shape[-2], v.shape[-1]))
    dout = np.where(poison, 0.0, dout)

    dp, dv = core.mix_backward(dout, p, v)  # (4')
    dy = core.softmax_backward(dp, p, live)  # (3')
    gradients = {} if bias_shape is None else {"bias": core.sum_to(dy, bias_shape)}
    dz, dcap = cap_backward(dy, z, u, cap)  # (2')
    if cap_shape is not None:
        gradients["cap"] = core.sum_to(np.sum(dcap, axis=(-2, -1)), cap_shape)
    dq, dk = core.scores_backward(dz, q, k, scale)  # (1')

    return {"q": dq, "k": dk, "v": dv, **gradients}


def softcap_numba(q, k, v, cap=50.0, *, mask=None, bias=None, **options):
    """The same call by the compiled dense pattern, which has one cap a call.

    An array of caps is one call for each of its leading places.

    Parameters
    ----------
    q, k, v, cap, mask, bias, **options
        As in :func:`softcap_forward`.

    Returns
    -------
    out : ndarray, shape (..., H, T, E)
        Outputs.
    cache : tuple
        For :func:`softcap_numba_backward`.
    """
    from attention_ref.kernels.numba import decode, dense

    n = core.check.shapes(q=(q, "... T D"), k=(k, "... S D"), v=(v, "... S E"))
    lead = n["..."]
    _check_cap(cap, lead)
    given = {"q": q, "k": k, "v": v, "mask": mask, "bias": bias}
    if isinstance(cap, (int, float, np.number)):
        out, cache = decode.best(q, k)(**given, softcap=float(cap), **options)
        return out, (cache, None, None)
    core.check.check_mask(mask, (*lead, n["T"], n["S"]))
    core.check.check_bias(bias, (*lead, n["T"], n["S"]))
    given = {name: x for name, x in given.items() if x is not None}
    shapes = {name: x.shape for name, x in given.items() if name != "mask"} | {"cap": cap.shape}
    wide = {name: np.atleast_2d(x) for name, x in given.items()}
    wide = {name: np.broadcast_to(x, (*lead, *x.shape[-2:])) for name, x in wide.items()}
    caps, caches = np.broadcast_to(cap, lead), []
    out = np.empty((*lead, n["T"], n["E"]), np.result_type(q, k, v))
    for place in np.ndindex(*lead):
        own = {name: x[place] for name, x in wide.items()}
        out[place], cache = dense.forward(**own, softcap=math.fabs(caps[place]), **options)
        caches.append(cache)
    return out, (caches, caps, shapes)


def softcap_numba_backward(dout, cache):
    """Gradients of :func:`softcap_numba`.

    Parameters
    ----------
    dout, cache
        As in :func:`softcap_backward`.

    Returns
    -------
    dict
        As there.
    """
    from attention_ref.kernels.numba import dense

    caches, caps, shapes = cache
    if caps is None:
        return dense.backward(dout, caches)
    found = {name: [] for name in shapes}
    for place, one in zip(np.ndindex(*caps.shape), caches, strict=True):
        parts = dense.backward(dout[place], one)
        parts["cap"] = _learn_numba(dout[place], one, caps[place])
        for name, dx in parts.items():
            found[name].append(dx)
    wide = {name: np.reshape(dx, (*caps.shape, *dx[0].shape)) for name, dx in found.items()}
    return {name: core.sum_to(dx, shapes[name]) for name, dx in wide.items()}


def _learn_numba(dout, c, cap):
    """dcap of one head from the dense cache, 128 queries at a time: no (T, S) array."""
    (q,), (k,), (v,) = c.q[0], c.k[0], c.v[0]
    good = np.isfinite(c.lse)[:, None]
    dout, out = np.where(good, dout, 0.0), np.where(good, c.out, 0.0)
    delta = np.sum(dout * out, axis=-1, keepdims=True)
    mask, bias = (np.broadcast_to(x[0, 0], (len(q), len(k))) for x in (c.mask, c.bias))
    t, s = np.arange(len(q))[:, None], np.arange(len(k))
    total = np.zeros_like(q, shape=())
    for first in range(0, len(q), 128):
        rows = slice(first, first + 128)
        z = core.scores_forward(q[rows], k, c.scale)
        y, u = cap_forward(z, cap)
        live = good[rows] & mask[rows]
        live = live & (s <= t[rows] + c.shift) if c.causal else live
        y = np.where(live, y + bias[rows] if c.biased else y, -np.inf)
        p = np.exp(y - np.where(good, c.lse[:, None], 0.0)[rows])
        dy = p * (dout[rows] @ v.T - delta[rows])
        total = total + np.sum(cap_backward(dy, z, u, cap)[1])
    return total


def _caps(rng, kwargs):
    """Small caps that bite: arrays for two heads, a number, and the default of 50.

    The axis of length 2 becomes the heads, with a batch of 1 before it.
    """
    if kwargs["q"].ndim == 2:
        return {"cap": 1.3}
    more = {n: kwargs[n][None] for n in "qkv" if kwargs[n].ndim == 3}
    if "causal" in kwargs and "align" not in kwargs:
        return more
    return more | {"cap": rng.uniform(0.8, 2.0, 2)}


def _example(rng):
    return core.examples.attention(rng, options=("causal", "mask", "bias"), extra=_caps)


def _small(rng):
    return _example(rng)["causal-upper-left"] | {"cap": 0.9}


def _renamed(kwargs):
    return {"softcap" if n == "cap" else n: a for n, a in kwargs.items()}


def _large(rng):
    return _example(rng)["mask"] | {"cap": np.full(2, 1e8)}


def _without(kwargs):
    return {n: a for n, a in kwargs.items() if n != "cap"}


SPEC = core.Mechanism(
    key="scores/softcap",
    forward=softcap_forward,
    backward=softcap_backward,
    numba=core.Backend(softcap_numba, softcap_numba_backward),
    example=_example,
    flags=frozenset(core.SOFTMAX_FLAGS) - {"shift_invariant"},
    reduces_to=(
        core.Reduction("scores/dot_product", "its keyword softcap", _small, _renamed),
        core.Reduction("scores/dot_product", "a cap far above all scores", _large, _without),
    ),
    claim=(
        "Capped scores bound the ratio of two weights by e^(2 cap); a score far beyond the cap "
        "stops learning, while those within it still learn."
    ),
    verified_by=("slow loop", "PyTorch"),
)
