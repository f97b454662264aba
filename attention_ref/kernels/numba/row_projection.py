r"""Rows projected onto the probability simplex: sparsemax, and alpha-entmax for 1 < alpha <= 2.

    sparsemax  p_s = max(z_s - tau, 0),  tau such that sum_s p_s = 1
               dz_s = dp_s - mean of dp over the support, where p_s > 0; 0 elsewhere
    entmax     p_s = max((alpha - 1) z_s - tau, 0)^(1 / (alpha - 1))
               dz_s = w_s (dp_s - <w, dp> / sum w),  w = p^(2 - alpha) on the support

Algorithm of sparsemax, without sorting: tau lies in [max - 1, max), so only scores above max - 1
can be in the support. They are copied into a short list; then (Michelot) tau = (sum - 1) / count of
the list and everything at or below tau leaves it, until nothing leaves. tau only rises, the list
only shrinks, and on usual scores it is short from the start: expected O(S) a row, O(S^2) at worst
for scores crowded below max. Sums are float64 for both dtypes. Scores are taken relative to the
maximum.

Loop order: one item a row; three passes over the row (maximum, list, output). Traffic: z and the
mask once from memory and twice from cache, p once. A row with a NaN or an infinity in a live place
is NaN; a row without a live place is zeros.

Entmax shares the list. The sum of the weights falls with tau from at least 1 at tau = -1 to 0 at
tau = 0 (relative to the maximum of (alpha - 1) z) and is convex for alpha <= 2, so that Newton's
method from the left cannot overshoot. Beyond 2 the weights have an infinite slope at the edge of
the support and lose digits; the kernel refuses.
"""

from typing import NamedTuple

import numpy as np

from attention_ref import core
from attention_ref.core import check
from attention_ref.core.errors import ShapeError
from attention_ref.kernels.door import expect, float_dtype, prepare
from attention_ref.kernels.numba import jit, threads

LANES = 16


@jit
def _highest(z, live, masked, lanes):
    """Largest live score, or NaN when a live score is not finite; -inf for an empty row.

    ``lanes`` holds 16 running maxima, then 16 running sums of z - z (0, or NaN once not finite).
    """
    zero, lowest = z.dtype.type(0), z.dtype.type(-np.inf)
    top, odd = lanes[:LANES], lanes[LANES : 2 * LANES]
    top[:], odd[:] = lowest, zero
    whole = z.size - z.size % LANES
    for i in range(0, whole, LANES):
        zi = z[i : i + LANES]
        if masked:
            keep = live[i : i + LANES]
            for j in range(LANES):
                x = zi[j] if keep[j] else lowest
                top[j] = x if x > top[j] else top[j]
                odd[j] += zi[j] - zi[j] if keep[j] else zero
        else:
            for j in range(LANES):
                top[j] = zi[j] if zi[j] > top[j] else top[j]
                odd[j] += zi[j] - zi[j]
    for i in range(whole, z.size):
        if not masked or live[i]:
            top[0] = z[i] if z[i] > top[0] else top[0]
            odd[0] += z[i] - z[i]
    best, bad = top[0], odd[0]
    for j in range(1, LANES):
        best = top[j] if top[j] > best else best
        bad += odd[j]
    return best + bad


@jit
def _candidates(z, live, masked, top, short):
    """Copy what may be in the support, relative to the maximum; how many there are."""
    count, one = 0, z.dtype.type(1)
    for i in range(z.size):
        short[count] = z[i] - top
        if masked:
            count += short[count] > -one and live[i]
        else:
            count += short[count] > -one
    return count


@jit
def _threshold(short, count):
    """tau of sparsemax, relative to the maximum, from the candidates."""
    while True:
        total = 0.0
        for i in range(count):
            total += short[i]
        tau = (total - 1.0) / count
        left = 0
        for i in range(count):
            x = short[i]
            short[left] = x
            left += x > tau
        if left == count:
            return tau
        count = left


@jit
def _mass(short, count, tau, power):
    """Sum of (x - tau)_+^power over the list, and minus its derivative by tau."""
    total, slope = 0.0, 0.0
    for i in range(count):
        gap = np.float64(short[i]) - tau
        if gap > 0.0:
            root = gap if power == 2.0 else 1.0 if power == 1.0 else gap ** (power - 1.0)
            total += gap * root
            slope += power * root
    return total, slope


@jit
def _entmax_threshold(short, count, power):
    """tau of entmax, relative to the maximum, from the candidates, which are not positive."""
    tau = -1.0
    for _ in range(200):
        total, slope = _mass(short, count, tau, power)
        step = tau + (total - 1.0) / slope
        if total - 1.0 < 4e-16 or step <= tau:
            return tau
        tau = step
    return tau


@jit
def _entmax_forward(first, last, z, live, masked, size, rate, p):
    zero, power = z.dtype.type(0), 1.0 / rate
    short, lanes = np.empty(size + 1, z.dtype), np.empty(2 * LANES, z.dtype)
    scaled = np.empty(size, z.dtype)
    for n in range(first, last):
        row, out = z[n * size : (n + 1) * size], p[n * size : (n + 1) * size]
        keep = live[n * size : (n + 1) * size] if masked else live
        top = _highest(row, keep, masked, lanes)
        if top - top != zero:  # NaN: a live score is not finite; -inf: no live score
            out[:] = zero if top < zero else z.dtype.type(np.nan)
            continue
        for i in range(size):
            scaled[i] = (row[i] - top) * z.dtype.type(rate)
        count = _candidates(scaled, keep, masked, zero, short)
        tau = _entmax_threshold(short, count, power)
        total, _ = _mass(short, count, tau, power)
        for i in range(size):
            gap = np.float64(scaled[i]) - tau
            if gap > 0.0 and (not masked or keep[i]):
                weight = gap * gap if power == 2.0 else gap if power == 1.0 else gap**power
                out[i] = weight / total
            else:
                out[i] = zero


@jit
def _entmax_backward(first, last, dp, p, size, rate, dz):
    zero = p.dtype.type(0)
    w = np.empty(size, np.float64)
    for n in range(first, last):
        row, up = p[n * size : (n + 1) * size], dp[n * size : (n + 1) * size]
        out = dz[n * size : (n + 1) * size]
        total, mixed = 0.0, 0.0
        for i in range(size):
            w[i] = 0.0
            if row[i] > zero:
                x = np.float64(row[i])
                w[i] = np.sqrt(x) if rate == 0.5 else x ** (1.0 - rate)
                total += w[i]
                mixed += w[i] * up[i]
        mixed = mixed / total if total > 0.0 else 0.0
        for i in range(size):
            out[i] = w[i] * (up[i] - mixed) if row[i] > zero else zero


@jit
def _forward(first, last, z, live, masked, size, p):
    zero = z.dtype.type(0)
    short, lanes = np.empty(size + 1, z.dtype), np.empty(2 * LANES, z.dtype)
    for n in range(first, last):
        row, out = z[n * size : (n + 1) * size], p[n * size : (n + 1) * size]
        keep = live[n * size : (n + 1) * size] if masked else live
        top = _highest(row, keep, masked, lanes)
        if top - top != zero:  # NaN: a live score is not finite; -inf: no live score
            out[:] = zero if top < zero else z.dtype.type(np.nan)
            continue
        count = _candidates(row, keep, masked, top, short)
        tau = z.dtype.type(_threshold(short, count))
        for i in range(size):
            x = (row[i] - top) - tau
            out[i] = x if x > zero else zero
        if masked:
            for i in range(size):
                out[i] = out[i] if keep[i] else zero


@jit
def _backward(first, last, dp, p, size, dz):
    zero = p.dtype.type(0)
    for n in range(first, last):
        row, up = p[n * size : (n + 1) * size], dp[n * size : (n + 1) * size]
        out = dz[n * size : (n + 1) * size]
        total, count = 0.0, 0
        for i in range(size):
            if row[i] > zero:
                total += up[i]
                count += 1
        mean = p.dtype.type(total / max(count, 1))
        for i in range(size):
            out[i] = up[i] - mean if row[i] > zero else zero


def _rows(kernel, z, live, work, *numbers):
    """Checks, layout and launch of a forward."""
    dtype = float_dtype(z=z)
    if z.ndim < 1:
        raise ShapeError("z has no axes, expected (..., S)")
    if live is not None:
        check.boolean("live", live)
        expect("live", live, z.shape, "(..., S)")
    p = np.empty(z.shape, dtype)
    if not z.size:
        return p
    masked = live is not None
    if masked and live.shape != z.shape:
        live = np.broadcast_to(live, z.shape)
    live = prepare(live if masked else np.ones(1, bool), np.bool_)
    size = z.shape[-1]
    threads.share(kernel, z.size // size, work * z.size, prepare(z, dtype).ravel(), live.ravel(),
                  masked, size, *numbers, p.ravel())  # fmt: skip
    return p


def _rows_backward(kernel, dp, p, *numbers):
    """Checks, layout and launch of a backward."""
    dtype = float_dtype(dp=dp, p=p)
    if dp.shape != p.shape:
        raise ShapeError(f"dp has shape {dp.shape}, expected {p.shape}, that of p")
    dz = np.empty(p.shape, dtype)
    if p.size:
        size = p.shape[-1]
        threads.share(kernel, p.size // size, 4 * p.size, prepare(dp, dtype).ravel(),
                      prepare(p, dtype).ravel(), size, *numbers, dz.ravel())  # fmt: skip
    return dz


def sparsemax_rows(z, live=None):
    """Project every row of scores onto the probability simplex.

    Parameters
    ----------
    z : ndarray, shape (..., S)
        Scores.
    live : bool ndarray, broadcast to (..., S), optional
        True = may have weight.

    Returns
    -------
    ndarray, shape (..., S)
        Weights; each row sums to 1, or to 0 when it has no live place.
    """
    return _rows(_forward, z, live, 10)


def sparsemax_rows_backward(dp, p):
    """Gradient of :func:`sparsemax_rows` from its output alone.

    Parameters
    ----------
    dp, p : ndarray, shape (..., S)
        Gradient of the weights, and the weights.

    Returns
    -------
    ndarray, shape (..., S)
        Gradient of the scores.
    """
    return _rows_backward(_backward, dp, p)


def entmax_rows(z, alpha=1.5, live=None):
    """The alpha-entmax of every row of scores.

    Parameters
    ----------
    z, live
        As in :func:`sparsemax_rows`.
    alpha : float, 1 < alpha <= 2
        2 is sparsemax; towards 1 lies softmax, which is the dense kernel's.

    Returns
    -------
    ndarray, shape (..., S)
        Weights; each row sums to 1, or to 0 when it has no live place.
    """
    check.number("alpha", alpha, low=1, high=2, open_low=True)
    return _rows(_entmax_forward, z, live, 20, float(alpha) - 1.0)


def entmax_rows_backward(dp, p, alpha=1.5):
    """Gradient of :func:`entmax_rows` by the scores, from its output alone.

    Parameters
    ----------
    dp, p : ndarray, shape (..., S)
        Gradient of the weights, and the weights.
    alpha : float, 1 < alpha <= 2
        As in the forward.

    Returns
    -------
    ndarray, shape (..., S)
        Gradient of the scores.
    """
    check.number("alpha", alpha, low=1, high=2, open_low=True)
    return _rows_backward(_entmax_backward, dp, p, float(alpha) - 1.0)


class Cache(NamedTuple):
    """What :func:`backward` needs."""

    q: np.ndarray  # (..., T, D), rows with NaN or infinity replaced by zeros; so for k, v
    k: np.ndarray  # (..., S, D)
    v: np.ndarray  # (..., S, E)
    capped: np.ndarray  # (..., T, S), scores after the softcap
    p: np.ndarray  # (..., T, S), weights
    uniform: np.ndarray  # (..., T, 1), rows without a key under "uniform"
    poison: np.ndarray  # (..., T, 1), rows that are NaN
    scale: float
    softcap: float | None
    bias_shape: tuple | None


def forward(q, k, v, *, mask=None, causal=False, align="lower_right", scale=None, softcap=None,
            bias=None, empty_row="zero"):  # fmt: skip
    """Attention with sparsemax rows: matrix products of NumPy around the compiled projection.

    Parameters
    ----------
    q, k, v, mask, causal, align, scale, softcap, bias, empty_row
        As in ``normalizers/sparsemax``.

    Returns
    -------
    out : ndarray, shape (..., T, E)
    cache : Cache
        For :func:`backward`; holds ``p``.
    """
    n = core.check.attention(
        q, k, v, mask=mask, bias=bias, align=align, scale=scale, softcap=softcap,
        empty_row=empty_row,
    )  # fmt: skip
    scale = core.default_scale(n["D"], scale)
    live = core.visible(q, k, mask=mask, causal=causal, align=align, empty_row=empty_row)
    q, k, v, poison = core.quarantine(q, k, v, live, empty_row)
    z = capped = core.softcap_forward(core.scores_forward(q, k, scale), softcap)
    if bias is not None:
        clean, poison = core.quarantine_bias(bias, live, poison)
        z = z + clean
    seen = np.broadcast_to(live, z.shape)
    uniform = ~np.any(seen, axis=-1, keepdims=True) & (empty_row == "uniform")
    p = sparsemax_rows(z, seen & (z > -np.inf))
    p = np.where(uniform, z.dtype.type(1.0 / max(n["S"], 1)), p)
    out = np.where(poison, z.dtype.type(np.nan), core.mix_forward(p, v))
    bias_shape = None if bias is None else bias.shape
    return out, Cache(q, k, v, capped, p, uniform, poison, scale, softcap, bias_shape)


def backward(dout, cache):
    """Gradients of :func:`forward`.

    Parameters
    ----------
    dout : ndarray, shape (..., T, E)
        Gradient of the output.
    cache : Cache
        From the forward.

    Returns
    -------
    dict
        Under "q", "k", "v" and, when a bias was given, "bias".
    """
    c = cache
    lead = np.broadcast_shapes(c.p.shape[:-2], c.v.shape[:-2])
    core.check.cotangent(dout, (*lead, c.p.shape[-2], c.v.shape[-1]))
    dp, dv = core.mix_backward(np.where(c.poison, dout.dtype.type(0), dout), c.p, c.v)
    dp = core.sum_to(dp, c.p.shape)
    dz = np.where(c.uniform, dp.dtype.type(0), sparsemax_rows_backward(dp, c.p))
    gradients = {} if c.bias_shape is None else {"bias": core.sum_to(dz, c.bias_shape)}
    dq, dk = core.scores_backward(core.softcap_backward(dz, c.capped, c.softcap), c.q, c.k, c.scale)
    return {"q": dq, "k": dk, "v": dv, **gradients}
