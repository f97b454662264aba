r"""Rows projected onto the probability simplex: sparsemax.

    p_s = max(z_s - tau, 0),  tau such that sum_s p_s = 1
    dz_s = dp_s - mean of dp over the support, where p_s > 0; 0 elsewhere

Algorithm, without sorting: tau lies in [max - 1, max), so only scores above max - 1 can be in the
support. They are copied into a short list; then (Michelot) tau = (sum - 1) / count of the list and
everything at or below tau leaves it, until nothing leaves. tau only rises, the list only shrinks,
and on usual scores it is short from the start: expected O(S) a row, O(S^2) at worst for scores
crowded below max. Sums are float64 for both dtypes. Scores are taken relative to the maximum.

Loop order: one item a row; three passes over the row (maximum, list, output). Traffic: z and the
mask once from memory and twice from cache, p once. A row with a NaN or an infinity in a live place
is NaN; a row without a live place is zeros.

Other projections (entmax, top-k) share everything but :func:`_threshold`.
"""

import numpy as np

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
    threads.share(_forward, z.size // size, 10 * z.size, prepare(z, dtype).ravel(), live.ravel(),
                  masked, size, p.ravel())  # fmt: skip
    return p


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
    dtype = float_dtype(dp=dp, p=p)
    if dp.shape != p.shape:
        raise ShapeError(f"dp has shape {dp.shape}, expected {p.shape}, that of p")
    dz = np.empty(p.shape, dtype)
    if p.size:
        size = p.shape[-1]
        threads.share(_backward, p.size // size, 4 * p.size, prepare(dp, dtype).ravel(),
                      prepare(p, dtype).ravel(), size, dz.ravel())  # fmt: skip
    return dz
