r"""Entmax attention: a family of normalizers with softmax at alpha = 1 and sparsemax at alpha = 2.

.. math::

    z_{ts} &= \kappa \tanh(c\, q_t \cdot k_s / \kappa) + a_{ts}                          &(1)\\
    \textstyle\sum_s p_{ts} &= 1 \quad\text{fixes}\ \theta_t                              &(2)\\
    p_{ts} &= [1 + (\alpha - 1)(z_{ts} - \theta_t)]_+^{1/(\alpha - 1)}                   &(3)\\
    o_t    &= \textstyle\sum_s p_{ts}\, v_s                                              &(4)

with an additive bias a where one is given and one :math:`\alpha \ge 1` for each head; at
:math:`\alpha = 1` (3) is :math:`e^{z - \theta}` and theta the log-sum-exp. For alpha > 1 a key
that lies :math:`1/(\alpha - 1)` or more below theta has weight 0, in the output and in the
gradients. Alpha can be learned: it has a gradient, also at 1.

Source: Peters et al. 2019 (the family, bisection), Correia et al. 2019 (gradient of alpha); code
of the authors' group read: entmax/root_finding.py of deep-spin/entmax; grade A.
"""

import math
from typing import NamedTuple

import numpy as np

from attention_ref import core

HALVINGS = 52  # steps of the bisection; one Newton step follows
NEAR = 1e-9  # alpha - 1 below which two terms of the series of the logarithm are exact
LOWEST = -80.0  # bound on (alpha - 1) l: its exponential must not vanish in float32


class Cache(NamedTuple):
    """What the backward needs, and what implementers compare with (``p``, ``theta``)."""

    q: np.ndarray  # (..., T, D), rows with NaN or infinity replaced by zeros
    k: np.ndarray  # (..., S, D), likewise
    v: np.ndarray  # (..., S, E), likewise
    capped: np.ndarray  # (..., T, S), scores after the softcap, before bias and mask
    p: np.ndarray  # (..., T, S), weights
    theta: np.ndarray  # (..., T), as in (2), nats; -inf for an empty row
    support: np.ndarray  # (..., T, S), bool: keys with a positive weight
    base: np.ndarray  # (..., T, S), 1 + (alpha - 1)(z - theta) on the support, 1 elsewhere
    u: np.ndarray  # (..., T, S), z - theta on the support, 0 elsewhere
    rate: np.ndarray  # (..., 1, 1), alpha - 1
    poison: np.ndarray  # (..., T, 1), rows that are NaN
    scale: float
    softcap: float | None
    alpha_shape: tuple | None  # None for a number
    bias_shape: tuple | None


def power_forward(log_top, below, live, rate):
    """Weights of all keys from the largest one: p = [e^(rate l) + rate below]_+^(1/rate).

    Written with the logarithm l of the largest weight, which lies in [-ln S, 0], because
    1 + rate (z - theta) has no digits left where alpha is large and scores are equal.

    Parameters
    ----------
    log_top : ndarray, shape (..., T, 1), nats
        l, not positive.
    below : ndarray, shape (..., T, S), nats
        Scores minus the largest of the row, not positive.
    live : bool ndarray, broadcast to (..., T, S)
        Elsewhere p = 0.
    rate : ndarray, broadcast to (..., 1, 1)
        alpha - 1, not negative.

    Returns
    -------
    p, base, u : ndarray, shape (..., T, S)
        Weights; p^rate, or 1 outside of the support; z - theta, or 0 there.
    support : bool ndarray, shape (..., T, S)
        Where p > 0.
    """
    near, level = rate < NEAR, np.maximum(rate * log_top, LOWEST)
    base = np.exp(level) + rate * below
    support = live & (base > 0.0)
    base, x = np.where(support, base, 1.0), np.expm1(level) + rate * below
    divisor = np.where(near, 1.0, rate)
    u = np.where(near, log_top + below, x / divisor)
    log = np.where(x > -0.5, np.log1p(np.where(x > -0.5, x, 0.0)), np.log(base)) / divisor
    p = np.exp(np.where(near, u * (1.0 - x / 2.0), log))
    return np.where(support, p, 0.0), base, np.where(support, u, 0.0), support


def normalise_forward(z, live, rate, empty_row="zero"):
    """Entmax over the visible keys of every row.

    The bisection only decides on numbers: no derivative passes through it. The Newton step after
    it is plain arithmetic on the found support, and carries the derivative of theta.

    Parameters
    ----------
    z : ndarray, shape (..., T, S), nats
        Scores; -inf is never in the support.
    live : bool ndarray, broadcast to (..., T, S)
        True = may attend.
    rate : ndarray, broadcast to (..., 1, 1)
        alpha - 1, not negative.
    empty_row : {"zero", "nan", "uniform", "raise"}
        A row without keys gets weights 0, or 1/S under "uniform".

    Returns
    -------
    p, base, u : ndarray, shape (..., T, S)
        Weights; p^rate, or 1 outside of the support; z - theta, or 0 there.
    theta : ndarray, shape (..., T, 1)
        As in (2); -inf for an empty row.
    support : bool ndarray, shape (..., T, S)
        Where p > 0.
    """
    live = live & (z > -np.inf)
    top = core.row_max(np.where(live, z, -np.inf))
    below, empty = np.where(live, z - top, 0.0), ~np.any(live, axis=-1, keepdims=True)
    log_top = np.zeros_like(top)  # the logarithm of the largest weight
    step = math.log(max(z.shape[-1], 1))
    for _ in range(HALVINGS):
        step = step / 2.0
        p = power_forward(log_top - step, below, live, rate)[0]
        log_top = np.where(np.sum(p, axis=-1, keepdims=True) > 1.0, log_top - step, log_top)

    p, base, _, _ = power_forward(log_top, below, live, rate)  # (2)
    slope = np.sum(p / base, axis=-1, keepdims=True) * np.exp(np.maximum(rate * log_top, LOWEST))
    excess = np.sum(p, axis=-1, keepdims=True) - 1.0
    log_top = log_top - excess / np.where(empty, 1.0, slope)
    p, base, u, support = power_forward(log_top, below, live, rate)  # (3)
    p = p / np.where(empty, 1.0, np.sum(p, axis=-1, keepdims=True))
    if empty_row == "uniform":
        p = np.where(empty, 1.0 / max(z.shape[-1], 1), p)
    theta = np.where(empty, -np.inf, top - core.row_max(np.where(support, u, -np.inf)))
    return p, base, u, theta, support


def normalise_backward(dp, p, base, u, rate, support):
    """Gradients of :func:`normalise_forward`.

    With w = dp/du = p / base and g = d ln p / d alpha at fixed theta,
    dz = w (dp - <w, dp> / sum w) and dalpha = <dp, p g> - <w, dp> <p, g> / sum w.

    Parameters
    ----------
    dp : ndarray, shape (..., T, S)
        Gradient of the weights.
    p, base, u, rate, support : ndarray
        From the forward.

    Returns
    -------
    dz : ndarray, shape (..., T, S)
        Gradient of the scores.
    dalpha : ndarray, shape (...)
        Gradient of alpha.
    """
    w = np.where(support, p / base, 0.0)
    total = np.sum(w, axis=-1, keepdims=True)
    dtheta = -np.sum(w * dp, axis=-1, keepdims=True) / np.where(total == 0.0, 1.0, total)
    change = p * slope_of_log(base, u, rate)
    return w * (dp + dtheta), np.sum(change * (dp + dtheta), axis=(-2, -1))


def slope_of_log(base, u, rate):
    """d/drate of log(1 + rate u) / rate = (x/(1 + x) - log(1 + x)) / rate^2, x = rate u.

    The two terms nearly cancel for small x; there the series u^2 (-1/2 + 2x/3 - 3x^2/4 ...) is
    summed, so that the gradient of alpha is exact down to alpha = 1.

    Parameters
    ----------
    base, u, rate : ndarray
        As in :func:`power_forward`, on the support.

    Returns
    -------
    ndarray, shape (..., T, S)
    """
    x, series = rate * u, np.zeros_like(u)
    for m in range(28, 1, -1):
        series = (m - 1) / m - x * series
    far = (x / base - np.log(base)) / np.where(rate < NEAR, 1.0, rate * rate)
    return np.where(x > -0.25, -u * u * series, far)


def _check(q, k, v, alpha, **options):
    """The checks of ``core.check.attention``, and those of alpha; the lengths by letter."""
    n = core.check.attention(q, k, v, **options)
    array = None if isinstance(alpha, (int, float, np.number)) else alpha
    core.check.number("alpha", alpha if array is None else None, low=1)
    core.check.shapes(alpha=(array, "... H"))
    core.check.check_bias(array, n["..."], "alpha", "(..., H)")
    if isinstance(alpha, np.ndarray) and np.any(alpha < 1.0).item():
        raise core.errors.ParameterError(f"alpha holds {np.min(alpha):g}, expected 1 <= alpha")
    return n


def entmax_forward(
    q, k, v, alpha=1.5, *, mask=None, causal=False, align="lower_right", scale=None,
    softcap=None, bias=None, empty_row="zero",
):  # fmt: skip
    """Mix the values with the alpha-entmax of the scores.

    Parameters
    ----------
    q : ndarray, shape (..., T, D)
        Queries.
    k : ndarray, shape (..., S, D)
        Keys.
    v : ndarray, shape (..., S, E)
        Values.
    alpha : float, or ndarray, broadcast to (..., H), >= 1, dimensionless
        1 is softmax, 2 is sparsemax; larger is sparser.
    mask : bool ndarray, broadcast to (..., T, S), optional
        True = may attend.
    causal : bool
        Hide the keys behind each query.
    align : {"lower_right", "upper_left"}
        Where the causal diagonal lies when T != S.
    scale : float, dimensionless, optional
        The factor c; 1/sqrt(D) by default.
    softcap : float, > 0, optional
        Bound on the scores before bias and mask.
    bias : ndarray, broadcast to (..., T, S), optional
        Added to the scores after the softcap; -inf gives a weight of 0.
    empty_row : {"zero", "nan", "uniform", "raise"}
        Output of a query that may see no key.

    Returns
    -------
    out : ndarray, shape (..., T, E)
        Outputs.
    cache : Cache
        For the backward; holds ``p`` and ``theta``.

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
    The last leading axis of q is the head's. The papers' threshold is tau = (alpha - 1) theta - 1
    and belongs to the scores times alpha - 1; theta stays finite at alpha = 1. The official code
    ends with the last midpoint of its bisection and divides by the sum; here a Newton step ends
    it. At a kink the derivative is that of the side on which the weight is 0. Hidden keys are
    left out before the threshold is sought.

    Source
    ------
    normalizers/entmax in the catalog; entmax/root_finding.py; grade A.

    References
    ----------
    Peters et al. 2019, Sparse Sequence-to-Sequence Models. Correia et al. 2019, Adaptively Sparse
    Transformers.

    Examples
    --------
    >>> import numpy as np
    >>> q = np.array([[1.0]])
    >>> k = np.array([[0.4], [0.0], [-3.0]])
    >>> v = np.array([[100.0], [0.0], [7.0]])
    >>> out, cache = entmax_forward(q, k, v)
    >>> out.round(9).tolist(), cache.p.round(9).tolist()
    ([[64.0]], [[0.64, 0.36, 0.0]])
    """
    n = _check(
        q, k, v, alpha, mask=mask, bias=bias, align=align, scale=scale, softcap=softcap,
        empty_row=empty_row,
    )  # fmt: skip
    scale = core.default_scale(n["D"], scale)
    live = core.visible(q, k, mask=mask, causal=causal, align=align, empty_row=empty_row)
    q, k, v, poison = core.quarantine(q, k, v, live, empty_row)
    alpha_shape = getattr(alpha, "shape", None) or None
    rate = alpha[..., None, None] if alpha_shape else np.zeros_like(q, shape=(1, 1)) + float(alpha)
    good = np.isfinite(rate)
    poison = poison | np.any(live & ~good, axis=-1, keepdims=True)
    rate = np.where(good, rate - 1.0, 0.0)

    z = capped = core.softcap_forward(core.scores_forward(q, k, scale), softcap)  # (1)
    if bias is not None:
        clean, poison = core.quarantine_bias(bias, live, poison)
        z = z + clean
    p, base, u, theta, support = normalise_forward(z, live, rate, empty_row)  # (2) (3)
    out = core.mix_forward(p, v)  # (4)

    out, theta = (np.where(poison, np.nan, x) for x in (out, theta))
    shapes = alpha_shape, None if bias is None else bias.shape
    return out, Cache(
        q, k, v, capped, p, theta[..., 0], support, base, u, rate, poison, scale, softcap, *shapes
    )


def entmax_backward(dout, cache):
    """Gradients of :func:`entmax_forward`, its steps read from the bottom up.

    Parameters
    ----------
    dout : ndarray, shape (..., T, E)
        Gradient of the output.
    cache : Cache
        From the forward.

    Returns
    -------
    dict
        Under "q", "k", "v" and, when given as arrays, "alpha" and "bias".
    """
    q, k, v, capped, p, _, support, base, u, rate, poison, scale, softcap, *shapes = cache
    alpha_shape, bias_shape = shapes
    lead = np.broadcast_shapes(p.shape[:-2], v.shape[:-2])
    core.check.cotangent(dout, (*lead, p.shape[-2], v.shape[-1]))
    dout = np.where(poison, 0.0, dout)

    dp, dv = core.mix_backward(dout, p, v)  # (4')
    dz, dalpha = normalise_backward(dp, p, base, u, rate, support)  # (3') (2')
    gradients = {} if bias_shape is None else {"bias": core.sum_to(dz, bias_shape)}  # (1')
    if alpha_shape is not None:
        gradients["alpha"] = core.sum_to(dalpha, alpha_shape)
    dz = core.softcap_backward(dz, capped, softcap)
    dq, dk = core.scores_backward(dz, q, k, scale)

    return {"q": dq, "k": dk, "v": dv, **gradients}


ALPHAS = {"plain": (1.2, 1.6), "batch": (1.3, 2.0), "bias": (2.2, 1.1)}
"""Case -> alpha of its two heads; (1.1, 1.7) elsewhere, one number where there are no heads."""


def _example(rng):
    """The standard set; queries drawn again until no score is near a kink."""
    cases = core.examples.attention(rng)
    for name, kwargs in cases.items():
        if kwargs["q"].ndim == 3:  # one batch of two heads
            kwargs |= {n: kwargs[n][None] for n in ("q", "k", "v")}
        alpha = ALPHAS.get(name, (1.1, 1.7))
        kwargs["alpha"] = np.array(alpha) if name != "no-heads" else 1.2
        kwargs["q"] = _clear(rng, kwargs)
    return cases


def _clear(rng, kwargs):
    """Of 24 queries for every row, the first whose weights are 0 or not small."""
    while True:
        q = rng.standard_normal((24, *kwargs["q"].shape))
        _, c = entmax_forward(**(kwargs | {"q": q}))
        base = 1.0 + c.rate * (c.capped + kwargs.get("bias", 0.0) - c.theta[..., None])
        clear = np.all((base > 0.25) | (base < -0.05), axis=-1, keepdims=True)
        if np.all(np.any(clear, axis=0)):
            return np.take_along_axis(q, np.argmax(clear, axis=0)[None], axis=0)[0]


def _with_alpha(alpha):
    return lambda rng: core.examples.qkv(rng) | {"alpha": np.full(2, alpha), "causal": True}


def _without(kwargs):
    return {n: a for n, a in kwargs.items() if n != "alpha"}


SPEC = core.Mechanism(
    key="normalizers/entmax",
    forward=entmax_forward,
    backward=entmax_backward,
    example=_example,
    flags=frozenset(core.SOFTMAX_FLAGS),
    reduces_to=(
        core.Reduction("scores/dot_product", "1 is softmax", _with_alpha(1.0), _without),
        core.Reduction("normalizers/sparsemax", "2 is sparsemax", _with_alpha(2.0), _without),
    ),
    claim="A head that must copy a token learns a larger alpha than one that must average many.",
    verified_by=("slow loop", "entmax"),
)
