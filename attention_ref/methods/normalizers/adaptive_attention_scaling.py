r"""Adaptive attention scaling: the temperature of softmax follows the logarithm of the length.

.. math::

    a_t    &= \ln n_t / \ln \bar n                                                  &(1)\\
    z_{ts} &= \kappa \tanh(a_t\, c\, q_t \cdot k_s / \kappa) + b_{ts}               &(2)\\
    p_{ts} &= e^{z_{ts}} / \textstyle\sum_{s'} e^{z_{ts'}}                          &(3)\\
    o_t    &= \textstyle\sum_s p_{ts}\, v_s                                         &(4)

with :math:`n_t` the number of keys at run time and :math:`\bar n` the average number in training,
a constant. Where :math:`n_t = \bar n` nothing changes. With more keys the scores are stretched, so
that the entropy of the weights grows less with the length than it would at a fixed temperature.

The same network places its tokens by coordinates in the camera's frustum, brought to 0 to 1, and
encodes them by sines: :func:`frustum_position_forward`, :func:`frustum_position_backward`.

Source: Cao, Ren, Fu 2024, *MVSFormer++*; the official models/dino/layers/attention.py,
models/position_encoding.py and config/mvsformer++.json read; grade A.
"""

import math
from typing import NamedTuple

import numpy as np

from attention_ref import core

COUNTS = ("all", "visible")
"""What n counts: every key that is there, or for each query the keys that it may see."""


class Cache(NamedTuple):
    """What the backward needs, and what implementers compare with (``factor``, ``p``, ``lse``)."""

    q: np.ndarray  # (..., T, D), rows with NaN or infinity replaced by zeros
    k: np.ndarray  # (..., S, D), likewise
    v: np.ndarray  # (..., S, E), likewise
    factor: np.ndarray | float  # (..., T, 1) under "visible", a number under "all"
    capped: np.ndarray  # (..., T, S), scores after the softcap, before bias and mask
    p: np.ndarray  # (..., T, S), weights
    lse: np.ndarray  # (..., T), log of the sum of exponentials, nats; -inf for an empty row
    live: np.ndarray  # (..., T, S), True = may attend
    poison: np.ndarray  # (..., T, 1), rows that are NaN
    scale: float
    softcap: float | None
    bias_shape: tuple | None


def frustum_position_forward(x, width, *, rescale=4.0):
    """Sines and cosines of coordinates between 0 and 1, one group of channels an axis.

    Parameters
    ----------
    x : ndarray, shape (..., N, D)
        Points, each coordinate brought to 0 to 1; D = 3 for a frustum: right, down, depth.
    width : int, even, > 0, channels
        C, channels an axis: 2i is a sine, 2i + 1 the cosine of r x 10000^(-2i/C).
    rescale : float, radians
        The factor r.

    Returns
    -------
    out : ndarray, shape (..., N, D C)
        Encodings, axis after axis.
    cache : tuple
        For the backward.

    Raises
    ------
    ShapeError, DTypeError, ParameterError
        For a wrong array, an odd width, a factor that is not finite.
    """
    core.check.shapes(x=(x, "... N D"))
    core.check.count("width", width, low=2, unit="channels")
    core.check.number("rescale", rescale, unit="radians")
    if width % 2:
        raise core.errors.ParameterError(f"width is {width}, expected an even number: sine, cosine")
    pairs = np.cumsum(np.ones_like(x, shape=(width // 2,))) - 1.0
    rate = float(rescale) * np.exp(pairs * (-2.0 * math.log(10000.0) / width))
    angle = x[..., None] * rate
    sine, cosine = np.sin(angle), np.cos(angle)
    out = np.reshape(np.stack([sine, cosine], axis=-1), (*x.shape[:-1], x.shape[-1] * width))
    return out, (rate, sine, cosine)


def frustum_position_backward(dout, cache):
    """dx = sum_i rate_i (cos dsin - sin dcos), for every coordinate.

    Parameters
    ----------
    dout : ndarray, shape (..., N, D C)
        Gradient of the encodings.
    cache : tuple
        From the forward.

    Returns
    -------
    dict
        Under "x".
    """
    rate, sine, cosine = cache
    core.check.cotangent(dout, (*sine.shape[:-2], 2 * sine.shape[-2] * sine.shape[-1]))
    pairs = np.reshape(dout, (*sine.shape, 2))
    return {"x": np.sum(rate * (cosine * pairs[..., 0] - sine * pairs[..., 1]), axis=-1)}


def adaptive_attention_scaling_forward(
    q, k, v, *, n_train=12185, count="all", mask=None, causal=False, align="lower_right",
    scale=None, softcap=None, bias=None, empty_row="zero",
):  # fmt: skip
    """Mix the values with softmax weights whose temperature depends on the number of keys.

    Parameters
    ----------
    q : ndarray, shape (..., T, D)
        Queries.
    k : ndarray, shape (..., S, D)
        Keys.
    v : ndarray, shape (..., S, E)
        Values.
    n_train : float, > 1, tokens
        Average number of keys in training; the paper's network over cost volumes has 12185.
    count : {"all", "visible"}
        Whether n is S for every query, hidden keys included, or the number of keys it may see.
    mask : bool ndarray, broadcast to (..., T, S), optional
        True = may attend.
    causal : bool
        Hide the keys behind each query.
    align : {"lower_right", "upper_left"}
        Where the causal diagonal lies when T != S.
    scale : float, dimensionless, optional
        The factor c, that of a query with n_train keys; 1/sqrt(D) by default.
    softcap : float, > 0, nats, optional
        Bound on the stretched scores before bias and mask.
    bias : ndarray, broadcast to (..., T, S), nats, optional
        Added to the scores after the softcap, not stretched; -inf gives a weight of 0.
    empty_row : {"zero", "nan", "uniform", "raise"}
        Output of a query that may see no key.

    Returns
    -------
    out : ndarray, shape (..., T, E)
        Outputs.
    cache : Cache
        For the backward; holds ``factor``, ``p`` and ``lse``.

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
    The official code has no mask here: every token counts, padding included, and that is "all".
    Then adding hidden keys sharpens the weights. "visible" is ours: hidden keys do not count, and
    under ``causal`` each row has the temperature of its own length. One key gives a = 0, harmless
    as its weight is 1 anyway; no key counts as one. In the code's cross-attention n is the number
    of queries, not of keys; here it is that of keys. Its published setting gives the factor to
    the decoder (762 tokens) and the feature network (12185) too, but both use linear attention
    there, which ignores it. One class that also returns a map of the class token has an operator
    precedence slip that makes the map the bare scale; it is not followed.

    Source
    ------
    normalizers/adaptive_attention_scaling in the catalog; official code; grade A.

    References
    ----------
    Cao, Ren, Fu 2024, MVSFormer++: Revealing the Devil in Transformer's Details for Multi-View
    Stereo.

    Examples
    --------
    Four keys after training with two: the factor is 2.

    >>> import numpy as np
    >>> q, k = np.array([[1.0]]), np.array([[np.log(3.0)], [0.0], [0.0], [0.0]])
    >>> v = np.array([[4.0], [0.0], [0.0], [0.0]])
    >>> out, cache = adaptive_attention_scaling_forward(q, k, v, n_train=2)
    >>> out.round(12).tolist(), cache.factor
    ([[3.0]], 2.0)
    """
    n = core.check.attention(
        q, k, v, mask=mask, bias=bias, align=align, scale=scale, softcap=softcap,
        empty_row=empty_row,
    )  # fmt: skip
    core.check.option("count", count, COUNTS)
    core.check.number("n_train", n_train, low=1, open_low=True, unit="tokens")
    scale = core.default_scale(n["D"], scale)
    live = core.visible(q, k, mask=mask, causal=causal, align=align, empty_row=empty_row)
    q, k, v, poison = core.quarantine(q, k, v, live, empty_row)

    z = core.scores_forward(q, k, scale)
    if count == "all":
        factor = math.log(max(n["S"], 1)) / math.log(n_train)  # (1)
    else:
        seen = np.sum(np.where(live, np.ones_like(z), 0.0), axis=-1, keepdims=True)
        factor = np.log(np.maximum(seen, 1.0)) / math.log(n_train)
    z = capped = core.softcap_forward(factor * z, softcap)  # (2)
    if bias is not None:
        clean, poison = core.quarantine_bias(bias, live, poison)
        z = z + clean
    p, lse = core.softmax_forward(z, live, empty_row)  # (3)
    out = core.mix_forward(p, v)  # (4)

    out = np.where(poison, np.nan, out)
    lse = np.where(poison[..., 0], np.nan, lse)
    bias_shape = None if bias is None else bias.shape
    return out, Cache(
        q, k, v, factor, capped, p, lse, live, poison, scale, softcap, bias_shape
    )  # fmt: skip


def adaptive_attention_scaling_backward(dout, cache):
    """Gradients of :func:`adaptive_attention_scaling_forward`, read from the bottom up.

    Parameters
    ----------
    dout : ndarray, shape (..., T, E)
        Gradient of the output.
    cache : Cache
        From the forward.

    Returns
    -------
    dict
        Under "q", "k", "v" and, when given, "bias"; n is a count and has none.
    """
    q, k, v, factor, capped, p, _, live, poison, scale, softcap, bias_shape = cache
    lead = np.broadcast_shapes(p.shape[:-2], v.shape[:-2])
    core.check.cotangent(dout, (*lead, p.shape[-2], v.shape[-1]))
    dout = np.where(poison, 0.0, dout)

    dp, dv = core.mix_backward(dout, p, v)  # (4')
    dz = core.softmax_backward(dp, p, live)  # (3')
    gradients = {} if bias_shape is None else {"bias": core.sum_to(dz, bias_shape)}
    dz = factor * core.softcap_backward(dz, capped, softcap)  # (2') (1')
    dq, dk = core.scores_backward(dz, q, k, scale)

    return {"q": dq, "k": dk, "v": dv, **gradients}


def _count_numba(q, k, mask, causal, align):
    """Keys that each query may see, (..., T, 1); only a mask needs an array of (T, S) booleans."""
    if mask is not None:
        live = core.visible(q, k, mask=mask, causal=causal, align=align)
        return np.count_nonzero(live, axis=-1, keepdims=True)
    queries, keys = q.shape[-2], k.shape[-2]
    place = np.arange(queries) + (keys - queries if align == "lower_right" else 0)
    return np.clip(place + 1 if causal else place * 0 + keys, 0, keys)[:, None]


def adaptive_attention_scaling_numba(
    q, k, v, *, n_train=12185, count="all", mask=None, causal=False, align="lower_right",
    scale=None, **options,
):  # fmt: skip
    """The same call by the compiled dense pattern: the factor goes into the scale or the queries.

    Parameters
    ----------
    q, k, v, n_train, count, mask, causal, align, scale, **options
        As in :func:`adaptive_attention_scaling_forward`.

    Returns
    -------
    out : ndarray, shape (..., T, E)
        Outputs.
    cache : tuple
        For :func:`adaptive_attention_scaling_numba_backward`.
    """
    from attention_ref.kernels.numba import decode

    n = core.check.shapes(q=(q, "... T D"), k=(k, "... S D"), v=(v, "... S E"))
    core.check.check_mask(mask, (*n["..."], n["T"], n["S"]))
    core.check.option("align", align, core.check.ALIGNMENTS)
    core.check.option("count", count, COUNTS)
    core.check.number("n_train", n_train, low=1, open_low=True, unit="tokens")
    core.check.number("scale", scale)
    scale, factor, shape = core.default_scale(n["D"], scale), None, q.shape
    if count == "all":
        scale = scale * (math.log(max(n["S"], 1)) / math.log(n_train))  # (1)
    else:
        seen = _count_numba(q, k, mask, causal, align)
        factor = (np.log(np.maximum(seen, 1.0)) / math.log(n_train)).astype(q.dtype)
        with np.errstate(invalid="ignore"):  # 0 times infinity: the kernel finds the row
            q = factor * q
    options |= {"mask": mask, "causal": causal, "align": align, "scale": scale}
    out, cache = decode.best(q, k)(q, k, v, **options)  # (2) (3) (4)
    return out, (cache, factor, shape)


def adaptive_attention_scaling_numba_backward(dout, cache):
    """Gradients of :func:`adaptive_attention_scaling_numba`.

    Parameters
    ----------
    dout, cache
        As in :func:`adaptive_attention_scaling_backward`.

    Returns
    -------
    dict
        As there.
    """
    from attention_ref.kernels.numba import dense

    cache, factor, shape = cache
    gradients = dense.backward(dout, cache)  # (4') (3') (2')
    if factor is not None:
        gradients["q"] = core.sum_to(factor * gradients["q"], shape)  # (1')
    return gradients


def _example(rng):
    """Trained on 3.5 keys; hidden keys count wherever the case is not compared with fewer keys."""

    def extra(rng, kwargs):
        every = any(n in kwargs for n in ("mask", "causal", "bias")) and "softcap" not in kwargs
        return {"n_train": 3.5, "count": "all" if every else "visible"}

    cases = core.examples.attention(rng, extra=extra)
    cases["causal"] |= {"count": "visible"}
    cases["packed"] |= {"count": "visible", "n_train": 9.0}
    return cases


def _at_home(rng):
    return core.examples.qkv(rng) | {"n_train": 6, "causal": True}


def _longer(rng):
    return core.examples.qkv(rng) | {"n_train": 3.0, "scale": 0.7}


def _plain(kwargs):
    return {n: a for n, a in kwargs.items() if n not in ("n_train", "count")}


def _stretched(kwargs):
    return _plain(kwargs) | {"scale": 0.7 * math.log(6) / math.log(3)}


SPEC = core.Mechanism(
    key="normalizers/adaptive_attention_scaling",
    forward=adaptive_attention_scaling_forward,
    backward=adaptive_attention_scaling_backward,
    numba=core.Backend(
        adaptive_attention_scaling_numba, adaptive_attention_scaling_numba_backward
    ),
    example=_example,
    flags=frozenset(core.SOFTMAX_FLAGS),
    reduces_to=(
        core.Reduction("scores/dot_product", "n is that of training", _at_home, _plain),
        core.Reduction("scores/dot_product", "another scale", _longer, _stretched),
    ),
    claim=(
        "For Gaussian scores of standard deviation 2, 3 and 4 the mean entropy of the weights "
        "changes less than half as much from 512 to 8192 keys with the factor ln n / ln 512 as "
        "without it."
    ),
    verified_by=("slow loop", "PyTorch"),
)  # fmt: skip
