r"""Adaptive filter attention: keys are old measurements of a system whose dynamics are known.

A channel pair (i, i + M), M = D/2, is a complex number. The state follows
:math:`dx = (\mu + i \omega)\, x\, dt + \sigma\, dw`. With :math:`\Delta = t + a - s`, a = S - T
or 0:

.. math::

    E_{ts} &= e^{\mu |\Delta|}, \quad
    V_{ts} = \sigma^2 \frac{e^{2 \mu |\Delta|} - 1}{2 \mu} + \eta^2 E_{ts}^2 + \gamma^2      &(1)\\
    r_{ts}^2 &= \bigl|\, q_t - E_{ts}\, e^{i \omega \Delta} k_s \,\bigr|^2                   &(2)\\
    z_{ts} &= -\tau^2 \Bigl[ \ln V_{ts}
              + \ln\Bigl(1 + \frac{r_{ts}^2}{\nu M V_{ts}}\Bigr) \Bigr]                      &(3)\\
    p_{ts} &= e^{z_{ts}} / \textstyle\sum_{s'} e^{z_{ts'}}                                   &(4)\\
    o_t &= e^{(\mu + i \omega) h} \textstyle\sum_s p_{ts} E_{ts}\, e^{i \omega \Delta} v_s   &(5)

A key says where the state should be by now; V is how uncertain that is, r how far from the query.
Keys that are old (V large) or off (r large) weigh less. The output is the mean of the forecasts, h
tokens ahead. Without dynamics and noise (mu = sigma = 0) V is a constant.

Source: Racioppo 2025, *Attention as an Adaptive Filter*; official code
PCR-git/Adaptive-Filter-Attention read: multihead_isotropic_AFA.py, simplified_precision_utils.py;
grade A.
"""

import math
from typing import NamedTuple

import numpy as np

from attention_ref import core

DYNAMICS = ("mu", "sigma", "eta", "gamma")


class Cache(NamedTuple):
    """What the backward needs; implementers compare ``p``, ``lse``, ``V``, ``r2``."""

    q: np.ndarray  # (..., H, T, D), turned to time 0; rows with NaN or infinity were set to 0
    k: np.ndarray  # (..., H, S, D), likewise
    v: np.ndarray  # (..., H, S, D), likewise
    turns: list  # cos, sin, places: of queries, of keys and values, of outputs
    at: dict  # mu, sigma, eta, gamma, nu, tau, each (..., H, 1, 1)
    kernel: tuple  # E, distance, x, F: decay, tokens, 2 mu distance, factor of sigma^2
    V: np.ndarray  # (..., H, T, S), variance
    r2: np.ndarray  # (..., H, T, S), squared residual
    u: np.ndarray  # (..., H, T, S), r2 / (nu M V)
    base: np.ndarray  # (..., H, T, S), z / tau^2
    p: np.ndarray  # (..., H, T, S), weights
    lse: np.ndarray  # (..., H, T), log of the sum of exponentials, nats; -inf for an empty row
    live: np.ndarray  # (..., T, S), True = may attend
    poison: np.ndarray  # (..., H, T, 1), rows that are NaN
    out: np.ndarray  # (..., H, T, D), outputs before NaN is put in
    options: tuple  # robust, ahead, shapes of all arguments


def growth_forward(x, slope=False):
    """(e^x - 1) / x, 1 at 0, or its derivative; near 0 by power series, so that the tape is right.

    Parameters
    ----------
    x : ndarray
        Any real numbers.
    slope : bool
        The derivative, (e^x - (e^x - 1) / x) / x, 1/2 at 0.

    Returns
    -------
    ndarray
    """
    near = core.absolute(x) < 0.5
    far, close, small = np.where(near, 1.0, x), np.where(near, x, 0.0), np.zeros_like(x)
    for n in reversed(range(16)):
        small = small * close + ((n + 1) / (n + 2) if slope else 1.0) / math.factorial(n + 1)
    large = np.expm1(far) / far
    return np.where(near, small, (np.exp(far) - large) / far if slope else large)


def kernel_forward(distance, mu, sigma, eta, gamma):
    """Step (1).

    Parameters
    ----------
    distance : ndarray, shape (T, S), tokens
        Not negative.
    mu, sigma, eta, gamma : ndarray, shape (..., 1, 1)
        Decay and noises.

    Returns
    -------
    E, V, x, F : ndarray, shape (..., T, S)
        Decay, variance, 2 mu distance, factor of sigma^2.
    """
    E, x = np.exp(mu * distance), 2.0 * mu * distance
    F = distance * growth_forward(x)
    V = np.square(sigma) * F + np.square(eta) * np.square(E) + np.square(gamma)
    return E, V, x, F


def kernel_backward(dE, dV, E, distance, x, F, mu, sigma, eta, gamma):
    """Gradients of the four parameters, not summed over the tokens yet.

    Parameters
    ----------
    dE, dV : ndarray, shape (..., T, S)
        Gradients of decay and variance.
    E, distance, x, F, mu, sigma, eta, gamma : ndarray
        From the forward.

    Returns
    -------
    dict
        Under "mu", "sigma", "eta", "gamma".
    """
    dE = dE + 2.0 * np.square(eta) * E * dV
    return {
        "mu": distance
        * (dE * E + 2.0 * np.square(sigma) * dV * distance * growth_forward(x, True)),
        "sigma": 2.0 * sigma * dV * F,
        "eta": 2.0 * eta * dV * np.square(E),
        "gamma": 2.0 * gamma * dV,
    }


def turn_forward(x, cos, sin):
    """e^(i a) x for every pair of channels.

    Parameters
    ----------
    x : ndarray, shape (..., T, D)
        Complex numbers as channels i and i + M.
    cos, sin : ndarray, shape (..., T, M)
        Of the angles.

    Returns
    -------
    ndarray, shape (..., T, D)
    """
    half = cos.shape[-1]
    x1, x2 = x[..., :half], x[..., half:]
    return np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


def turn_backward(dy, y, cos, sin, places):
    """Turn back, and collect the frequencies: domega = sum of places (dy2 y1 - dy1 y2).

    Parameters
    ----------
    dy, y : ndarray, shape (..., T, D)
        Gradient of the turned array, and that array.
    cos, sin : ndarray, shape (..., T, M)
        Of the angles.
    places : ndarray, shape (T,)
        Angle over omega.

    Returns
    -------
    dx, domega : ndarray, shapes (..., T, D), (..., M)
    """
    half = cos.shape[-1]
    da = dy[..., half:] * y[..., :half] - dy[..., :half] * y[..., half:]
    return turn_forward(dy, cos, -sin), np.sum(da * places[:, None], axis=-2)


def _turns(q, k, omega, align, ahead):
    """Cos, sin and place: queries and keys (turned back, so with a minus), and outputs."""
    T, S = q.shape[-2], k.shape[-2]
    here = np.arange(T, dtype=q.dtype, like=q) + (S - T if align == "lower_right" else 0)
    all_places = (-here, -np.arange(S, dtype=q.dtype, like=q), here + ahead)
    angles = [omega[..., None, :] * places[:, None] for places in all_places]
    return [(np.cos(a), np.sin(a), places) for a, places in zip(angles, all_places, strict=True)]


def _check(given, mask, align, ahead):
    """The checks at the door; one set of parameters for each head."""
    axes = {"q": "... H T D", "k": "... H S D", "v": "... H S D", "omega": "... H M"}
    n = core.check.shapes(**{name: (a, axes.get(name, "... H")) for name, a in given.items()})
    if n["D"] != 2 * n["M"]:
        raise core.errors.ShapeError(f"omega has M = {n['M']}, expected D / 2 for D = {n['D']}")
    full = (*n["..."], n["H"], n["T"], n["S"])
    core.check.check_mask(mask, full)
    core.check.option("align", align, core.check.ALIGNMENTS)
    core.check.number("ahead", ahead, low=0, unit="tokens")
    core.check.memory(full, given["q"].dtype)


def adaptive_filter_forward(
    q, k, v, mu, sigma, eta, gamma, omega, nu, tau, *, robust=True, ahead=0.0, mask=None,
    causal=False, align="lower_right",
):  # fmt: skip
    """Mix forecasts made from the values, each weighted by how certain and how fitting it is.

    Parameters
    ----------
    q : ndarray, shape (..., H, T, D)
        Queries, D even; channels i and i + M are real and imaginary part.
    k, v : ndarray, shape (..., H, S, D)
        Keys and values, likewise.
    mu : ndarray, shape (..., H), nats a token
        Decay of each head, not positive.
    sigma, eta, gamma : ndarray, shape (..., H)
        Standard deviations: noise of the process, in a token; of a key; of the query. gamma or
        eta is not 0.
    omega : ndarray, shape (..., H, M), radians a token
        Frequencies of each head.
    nu : ndarray, shape (..., H)
        How many standard deviations count as off, squared; positive.
    tau : ndarray, shape (..., H)
        Root of the inverse temperature.
    robust : bool
        The logarithm of equation (3); False is the Gaussian -r^2 / (nu M V).
    ahead : float, >= 0, tokens
        h: how far beyond the query the output is forecast.
    mask : bool ndarray, broadcast to (..., H, T, S), optional
        True = may attend.
    causal : bool
        Hide the keys behind each query; the official code always does.
    align : {"lower_right", "upper_left"}
        Where the causal diagonal and distance 0 lie when T != S.

    Returns
    -------
    out : ndarray, shape (..., H, T, D)
        Outputs; 0 for a query without keys.
    cache : Cache
        For the backward; holds ``p``, ``lse``, ``V`` and ``r2``.

    Raises
    ------
    ShapeError
        When widths, lengths or leading axes do not fit.
    DTypeError
        When an argument is no float32 or float64 array, or the mask is not boolean.
    ParameterError
        When align or ahead is outside its domain.
    MemoryLimitError
        When the scores would take more than 2 GiB.

    Notes
    -----
    The repository moves and has many switches. This is its isotropic form with both biases taken
    from V, one set of parameters for scores and values, values turned, the full residual. Left out:
    the linear maps around it and what follows the output (residual connection, gate, norm), the
    small constants added to V, the clamp of exponents. Its parametrisation was mu = -softplus(.) at
    first and (sigmoid(.) - 1) * 10 / (2 L) - 1e-5 later, variances and nu are softplus: all of that
    stays outside, parameters here are effective ones, with standard deviations.

    (2) is computed as |q|^2 + E^2 |k|^2 - 2 E Re(q conj(e^{i omega Delta} k)), with q, k, v turned
    to time 0 first: T S numbers, as in rotary attention, whose angles have the other sign.

    Keys ahead of the query, without ``causal``, count by their distance. A row without keys is 0;
    other rules for it would need a forecast of nothing.

    Source
    ------
    scores/adaptive_filter in the catalog; official code of December 2025; grade A.

    References
    ----------
    Racioppo 2025, Attention as an Adaptive Filter.

    Examples
    --------
    >>> import numpy as np
    >>> q, k, v = np.zeros((1, 1, 2)), np.zeros((1, 2, 2)), np.array([[[4.0, 0.0], [8.0, 0.0]]])
    >>> one, zero, omega = np.ones(1), np.zeros(1), np.zeros((1, 1))
    >>> sigma = np.array([2.0 ** 0.5])  # V = 2 |Delta| + 1 is 3 and 1
    >>> out, cache = adaptive_filter_forward(q, k, v, zero, sigma, zero, one, omega, one, one)
    >>> out.round(12).tolist(), cache.p.round(12).tolist()
    ([[[7.0, 0.0]]], [[[0.25, 0.75]]])
    """
    scalars = {"mu": mu, "sigma": sigma, "eta": eta, "gamma": gamma, "nu": nu, "tau": tau}
    given = {"q": q, "k": k, "v": v, "omega": omega} | scalars
    _check(given, mask, align, ahead)
    options = (robust, ahead, {name: a.shape for name, a in given.items()})
    live = core.visible(q, k, mask=mask, causal=causal, align=align)
    q, k, v, poison = core.quarantine(q, k, v, live)

    at = {name: a[..., None, None] for name, a in scalars.items()}
    turns = _turns(q, k, omega, align, ahead)
    q, k, v = (turn_forward(x, *turns[i][:2]) for x, i in ((q, 0), (k, 1), (v, 1)))
    distance = core.absolute(turns[0][2][:, None] - turns[1][2])
    E, V, x, F = kernel_forward(distance, *map(at.get, DYNAMICS))  # (1)
    qq, kk = (np.sum(np.square(a), axis=-1) for a in (q, k))
    r2 = qq[..., :, None] + np.square(E) * kk[..., None, :]  # (2)
    r2 = r2 - 2.0 * E * core.scores_forward(q, k, 1.0)
    u = r2 / (at["nu"] * omega.shape[-1] * V)
    base = -np.log(V) - (np.log(1.0 + u) if robust else u)  # (3)
    p, lse = core.softmax_forward(np.square(at["tau"]) * base, live)  # (4)
    out = turn_forward(core.mix_forward(p * E, v), *turns[2][:2]) * np.exp(at["mu"] * ahead)  # (5)

    lse = np.where(poison[..., 0], np.nan, lse)
    parts = (q, k, v, turns, at, (E, distance, x, F), V, r2, u, base, p, lse, live, poison, out)
    return np.where(poison, np.nan, out), Cache(*parts, options)


def adaptive_filter_backward(dout, cache):
    """Gradients of :func:`adaptive_filter_forward`, its steps read from the bottom up.

    Parameters
    ----------
    dout : ndarray, shape (..., H, T, D)
        Gradient of the output.
    cache : Cache
        From the forward.

    Returns
    -------
    dict
        Under "q", "k", "v", "mu", "sigma", "eta", "gamma", "omega", "nu" and "tau".
    """
    q, k, v, turns, at, kernel, V, _, u, base, p, _, live, poison, out, options = cache
    (robust, ahead, shapes), E = options, kernel[0]
    core.check.cotangent(dout, out.shape)
    dout = np.where(poison, 0.0, dout)

    found = {"mu": ahead * dout * out}  # (5')
    dy, domega = turn_backward(dout, out, *turns[2])
    dweight, dv = core.mix_backward(dy * np.exp(at["mu"] * ahead), p * E, v)
    dz = core.softmax_backward(dweight * E, p, live)  # (4')
    found["tau"] = 2.0 * at["tau"] * dz * base  # (3')
    dbase = np.square(at["tau"]) * dz
    du = -dbase / (1.0 + u) if robust else -dbase
    found["nu"], dV = -du * u / at["nu"], -(dbase + du * u) / V
    dr2 = du / (at["nu"] * (q.shape[-1] // 2) * V)
    kk = np.sum(np.square(k), axis=-1)[..., None, :]  # (2')
    dE = dweight * p + 2.0 * dr2 * (E * kk - core.scores_forward(q, k, 1.0))
    mixed = -2.0 * E * dr2
    dq = mixed @ k + 2.0 * q * np.sum(dr2, axis=-1)[..., None]
    dk = np.swapaxes(mixed, -1, -2) @ q
    dk = dk + 2.0 * k * np.sum(np.square(E) * dr2, axis=-2)[..., None]
    more = kernel_backward(dE, dV, *kernel, *map(at.get, DYNAMICS))  # (1')
    found = {n: np.sum(d, axis=(-2, -1)) for n, d in found.items()}
    found |= {n: np.sum(d, axis=(-2, -1)) + found.get(n, 0.0) for n, d in more.items()}
    found["omega"] = core.sum_to(domega, shapes["omega"])
    for name, d, x, turn in zip("qkv", (dq, dk, dv), (q, k, v), (0, 1, 1), strict=True):
        found[name], domega = turn_backward(d, x, *turns[turn])
        found["omega"] = found["omega"] + core.sum_to(domega, shapes["omega"])
    return {name: core.sum_to(d, shapes[name]) for name, d in found.items()}


RANGES = {"mu": (-0.6, -0.1), "sigma": (0.3, 0.8), "eta": (0.4, 0.9), "gamma": (0.5, 1.0),
          "nu": (0.7, 1.5), "tau": (0.8, 1.2)}  # fmt: skip


def _parameters(rng, kwargs):
    """A batch axis; values as wide as queries; parameters for each head."""
    q, k = (kwargs[n] if kwargs[n].ndim == 4 else np.atleast_3d(kwargs[n])[None] for n in "qk")
    extra = {n: rng.uniform(*ends, q.shape[-3]) for n, ends in RANGES.items()}
    extra["omega"] = rng.uniform(0.2, 0.9, (q.shape[-3], 2))
    return extra | {"q": q, "k": k, "v": rng.standard_normal(k.shape)}


def _example(rng):
    cases = core.examples.attention(rng, options=("causal", "mask"), scale=False, extra=_parameters)
    del cases["no-heads"], cases["causal-long-queries"]  # "mask" has an empty row too
    cases["causal"] |= {"robust": False, "ahead": 1.0}
    cases["long-queries"] |= {"mu": np.array([0.0, -2.0]), "ahead": 0.5}
    return cases


STILL = {"mu": 0.0, "sigma": 0.0, "eta": 0.6, "gamma": 0.8, "nu": 1.3, "tau": 0.9}
"""Nothing moves: V = 0.36 + 0.64 everywhere, the score -0.81 r^2 / (1.3 M)."""


def _still(rng):
    parameters = {n: np.full(2, x) for n, x in STILL.items()} | {"omega": np.zeros((2, 2))}
    return core.examples.qkv(rng, E=4) | parameters | {"robust": False, "causal": True}


def _distance(kwargs):
    return {n: kwargs[n] for n in ("q", "k", "v", "causal")} | {"scale": 0.81 / 2.6}


SPEC = core.Mechanism(
    key="scores/adaptive_filter", forward=adaptive_filter_forward,
    backward=adaptive_filter_backward, example=_example,
    flags=frozenset({"attention", "causal", "masked", "linear_in_v", "positional"}),
    reduces_to=(
        core.Reduction("scores/l2_distance", "nothing moves: distances alone", _still, _distance),
    ),
    claim="On a noisy damped oscillation adaptive filter attention forecasts better than rotary "
    "attention with more parameters, and learns the decay and frequency of the system.",
    verified_by=("slow loop", "PyTorch"),
)  # fmt: skip
