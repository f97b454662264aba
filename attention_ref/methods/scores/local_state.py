r"""Local state: each query reads its own decay rates off its token, and never looks at itself.

.. math::

    m_t    &= \frac{1}{2\sqrt{F}} \textstyle\sum_{f=1}^{F} f\, \sigma(r_{tf})               &(1)\\
    z_{ts} &= \kappa \tanh(c\, q_t \cdot k_s / \kappa) + b_{ts} - m_t\, |t + a - s|         &(2)\\
    z_{ts} &\leftarrow \zeta \quad \text{where } s = t + a                                  &(3)\\
    p_{ts} &= e^{z_{ts}} / \textstyle\sum_{s'} e^{z_{ts'}}                                  &(4)\\
    o_t    &= \textstyle\sum_s p_{ts}\, v_s                                                 &(5)

with :math:`\zeta = -100` nats and a as in scores/alibi. There is no other sense of position. The F
logits act only through the one slope m, which lies between 0 and :math:`(F + 1)\sqrt{F}/4` nats a
token: a query may open its window wide, but cannot close it beyond that.

Source: Défossez 2021, section on local attention; the official code demucs/demucs.py,
``LocalState``, was read; grade A.
"""

import math
from typing import NamedTuple

import numpy as np

from attention_ref import core


class Cache(NamedTuple):
    """What the backward needs, and what implementers compare with (``slope``, ``p``, ``lse``)."""

    q: np.ndarray  # (..., T, D), rows with NaN or infinity replaced by zeros
    k: np.ndarray  # (..., S, D), likewise
    v: np.ndarray  # (..., S, E), likewise
    rate: np.ndarray  # (..., T or 1, F), the sigmoid of r
    slope: np.ndarray  # (..., T or 1, 1), nats a token
    distance: np.ndarray  # (T, S), tokens between query and key
    capped: np.ndarray  # (..., T, S), scores after the softcap, before bias, penalty and mask
    p: np.ndarray  # (..., T, S), weights
    lse: np.ndarray  # (..., T), log of the sum of exponentials, nats; -inf for an empty row
    fixed: np.ndarray  # (T, S), True where the score is zeta
    live: np.ndarray  # (..., T, S), True = may attend
    poison: np.ndarray  # (..., T, 1), rows that are NaN
    scale: float
    softcap: float | None
    bias_shape: tuple | None


def slope_forward(r):
    """Step (1): the decay rates, and the slope of each query.

    Parameters
    ----------
    r : ndarray, shape (..., T, F)
        Logits.

    Returns
    -------
    rate : ndarray, shape (..., T, F)
        Between 0 and 1.
    slope : ndarray, shape (..., T, 1), nats a token
    """
    rate, F = core.logistic(r), r.shape[-1]
    f = np.arange(1, F + 1, dtype=r.dtype, like=r)
    return rate, np.sum(rate * f, axis=-1, keepdims=True) / (2.0 * math.sqrt(F))


def slope_backward(dslope, rate):
    """Step (1'): the slope of the sigmoid, times f, over twice the root of F.

    Parameters
    ----------
    dslope : ndarray, shape (..., T, 1)
        Gradient of the slopes.
    rate : ndarray, shape (..., T, F)
        From the forward.

    Returns
    -------
    ndarray, shape (..., T, F)
    """
    F = rate.shape[-1]
    f = np.arange(1, F + 1, dtype=rate.dtype, like=rate)
    return dslope * f / (2.0 * math.sqrt(F)) * rate * (1.0 - rate)


def distance_forward(q, k, align):
    """``|t + a - s|`` in the dtype of q, shape (T, S): tokens between each query and each key.

    Parameters
    ----------
    q, k : ndarray, shapes (..., T, D), (..., S, D)
        Only their lengths, dtype and kind count.
    align : {"lower_right", "upper_left"}
        Which corners meet.

    Returns
    -------
    ndarray, shape (T, S)
    """
    queries, keys = q.shape[-2], k.shape[-2]
    first = keys - queries if align == "lower_right" else 0
    t = np.arange(queries, dtype=q.dtype, like=q) + first
    return core.absolute(t[:, None] - np.arange(keys, dtype=q.dtype, like=q)[None, :])


def _check(q, k, v, r, own, options):
    """The checks at the door; the lengths."""
    n = core.check.attention(q, k, v, **options)
    F = core.check.shapes(r=(r, "... T F"))["F"]
    if F == 0:
        raise core.errors.ShapeError(f"r has F = 0 in shape {tuple(r.shape)}, expected at least 1")
    core.check.check_bias(r, (*n["..."], n["T"], F), "r", "(..., T, F)")
    core.check.number("own", own, unit="nats")
    return n


def local_state_forward(
    q, k, v, r, *, own=-100.0, mask=None, causal=False, align="lower_right", scale=None,
    softcap=None, bias=None, empty_row="zero",
):  # fmt: skip
    """Mix the values of the neighbourhood; each query says by its rates how wide that is.

    Parameters
    ----------
    q : ndarray, shape (..., T, D)
        Queries.
    k : ndarray, shape (..., S, D)
        Keys.
    v : ndarray, shape (..., S, E)
        Values; the code calls them content.
    r : ndarray, broadcast to (..., T, F)
        Logits of the decay rates, a projection of the token that the query is made of. One row,
        (..., 1, F), is a window that does not depend on the token.
    own : float, nats, optional
        The score of the key at the query's own place; None leaves it as (2) gives it.
    mask : bool ndarray, broadcast to (..., T, S), optional
        True = may attend.
    causal : bool
        Hide the keys behind each query; the paper's model is not causal.
    align : {"lower_right", "upper_left"}
        Where the causal diagonal and distance 0 lie when T != S.
    scale : float, dimensionless, optional
        The factor c; 1/sqrt(D) by default.
    softcap : float, > 0, nats, optional
        Bound on the scores before bias, penalty and mask.
    bias : ndarray, broadcast to (..., T, S), nats, optional
        Added to the scores after the softcap, without effect where ``own`` stands; -inf gives a
        weight of 0.
    empty_row : {"zero", "nan", "uniform", "raise"}
        Output of a query that may see no key.

    Returns
    -------
    out : ndarray, shape (..., T, E)
        Outputs.
    cache : Cache
        For the backward; holds ``slope``, ``p`` and ``lse``.

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
    ``own`` is finite: a query whose other keys are hidden, or a sequence of one token, falls back
    on itself. The code adds x + proj(out) around this and makes q, k, v, r by convolutions of
    width 1, which is the caller's affair; it starts r at -2 with small weights, a window of about
    four tokens for F = 4. A distance counts tokens, so the window in seconds depends on the stride
    of the layers before. The code's optional terms cos(2 pi (t - s) / n), called a failed
    experiment there, are left out, and so is the paper's penalty on singular values, which
    concerns convolutions. The transposed layout of the code (keys first) is unified.

    Source
    ------
    scores/local_state in the catalog; the official demucs/demucs.py; grade A.

    References
    ----------
    Défossez 2021, Hybrid Spectrogram and Waveform Source Separation.

    Examples
    --------
    >>> import numpy as np
    >>> q, k, v = np.zeros((1, 1)), np.zeros((3, 1)), np.array([[3.0], [6.0], [100.0]])
    >>> rate = np.log(2.0) / 2.5  # four equal rates: a slope of ln 2 nats a token
    >>> r = np.full((1, 4), np.log(rate / (1 - rate)))
    >>> out, cache = local_state_forward(q, k, v, r)
    >>> cache.p.round(12).tolist(), out.round(12).tolist()
    ([[0.333333333333, 0.666666666667, 0.0]], [[5.0]])
    """
    n = _check(q, k, v, r, own, {
        "mask": mask, "bias": bias, "align": align, "scale": scale, "softcap": softcap,
        "empty_row": empty_row,
    })  # fmt: skip
    scale = core.default_scale(n["D"], scale)
    live = core.visible(q, k, mask=mask, causal=causal, align=align, empty_row=empty_row)
    q, k, v, poison = core.quarantine(q, k, v, live, empty_row)
    good = np.all(np.isfinite(r), axis=-1)[..., None]
    poison = poison | (np.any(live, axis=-1, keepdims=True) & ~good)

    rate, slope = slope_forward(np.where(good, r, 0.0))  # (1)
    capped = core.softcap_forward(core.scores_forward(q, k, scale), softcap)  # (2)
    distance = distance_forward(q, k, align)
    z = capped - slope * distance
    if bias is not None:
        clean, poison = core.quarantine_bias(bias, live, poison)
        z = z + clean
    fixed = (distance == 0) & (own is not None)
    z = np.where(fixed, 0.0 if own is None else float(own), z)  # (3)
    p, lse = core.softmax_forward(z, live, empty_row)  # (4)
    out = core.mix_forward(p, v)  # (5)

    out = np.where(poison, np.nan, out)
    lse = np.where(poison[..., 0], np.nan, lse)
    return out, Cache(
        q, k, v, rate, slope, distance, capped, p, lse, fixed, live, poison, scale, softcap,
        None if bias is None else bias.shape,
    )  # fmt: skip


def local_state_backward(dout, cache):
    """Gradients of :func:`local_state_forward`, its steps read from the bottom up.

    Parameters
    ----------
    dout : ndarray, shape (..., T, E)
        Gradient of the output.
    cache : Cache
        From the forward.

    Returns
    -------
    dict
        Under "q", "k", "v", "r" and, when given, "bias".
    """
    q, k, v, rate, slope, distance, capped, p, _, fixed, live, poison = cache[:12]
    core.check.cotangent(dout, (*poison.shape[:-1], v.shape[-1]))
    dout = np.where(poison, 0.0, dout)

    dp, dv = core.mix_backward(dout, p, v)  # (5')
    dz = core.softmax_backward(dp, p, live)  # (4')
    dz = np.where(fixed, 0.0, dz)  # (3')
    gradients = {"v": dv}
    if cache.bias_shape is not None:
        gradients["bias"] = core.sum_to(dz, cache.bias_shape)
    dslope = core.sum_to(-np.sum(dz * distance, axis=-1, keepdims=True), slope.shape)
    dz = core.softcap_backward(dz, capped, cache.softcap)  # (2')
    gradients["q"], gradients["k"] = core.scores_backward(dz, q, k, cache.scale)
    gradients["r"] = slope_backward(dslope, rate)  # (1')
    return gradients


def _rates(rng, kwargs):
    """A batch axis of 1 before the heads, logits without it; "plain" has one row for all queries.

    The own key keeps its score in two cases; in four it is heavy enough to be missed.
    """
    if kwargs["q"].ndim == 2:
        return {"r": rng.standard_normal((5, 3)) - 1.0, "own": None}
    rows = 1 if kwargs.keys() <= set("qkv") | {"scale"} and kwargs["k"].shape[-2] == 6 else None
    more = {n: kwargs[n][None] for n in "qkv" if kwargs[n].ndim == 3}
    more["r"] = rng.standard_normal((2, rows or kwargs["q"].shape[-2], 3)) - 1.0
    if "softcap" in kwargs:
        more["own"] = None
    elif "causal" in kwargs or "bias" in kwargs:
        more["own"] = -0.4
    return more


def _example(rng):
    return core.examples.attention(rng, extra=_rates)


def _slope(rng):
    """One slope a head: logits equal for all queries."""
    r = rng.standard_normal((2, 1, 3))
    return _example(rng)["causal"] | {"r": r, "own": None}


def _alibi(kwargs):
    m = slope_forward(kwargs["r"])[1][:, 0, 0]
    return {n: a for n, a in kwargs.items() if n not in ("r", "own")} | {"m": m}


def _flat(rng):
    return _example(rng)["plain"] | {"r": np.full((1, 3), -800.0)}


def _others(kwargs):
    """The same without the own key: e^-100 is nothing beside the rest."""
    T, S = kwargs["q"].shape[-2], kwargs["k"].shape[-2]
    other = np.arange(T)[:, None] + S - T != np.arange(S)
    return {n: kwargs[n] for n in ("q", "k", "v", "scale")} | {"mask": other}


SPEC = core.Mechanism(
    key="scores/local_state",
    forward=local_state_forward,
    backward=local_state_backward,
    example=_example,
    flags=frozenset({
        "attention", "causal", "masked", "positional", "row_stochastic", "linear_in_v", "scaled",
    }),
    reduces_to=(
        core.Reduction("scores/alibi", "one rate for all queries of a head", _slope, _alibi),
        core.Reduction("scores/dot_product", "rates 0, own key masked", _flat, _others),
    ),
    claim=(
        "Rates read off the token give a wide window where the signal is slow and a narrow one "
        "where it is fast, and denoise better than one learned window."
    ),
    verified_by=("slow loop", "PyTorch"),
)  # fmt: skip
