r"""Few queries over many keys: reading a KV cache.

    z = c q k^T (softcap, bias, mask),  p = softmax(z),  out = p v,  lse = log sum exp z

All query heads that share a key head, and all their queries, make the rows of one tile (at most a
few dozen), so that every key and value is read from memory once however many heads share it. One
item is a key head and a portion of 1024 keys; portions are independent and put together at the end,
so one sequence keeps all threads busy.

Loop order: item, block of 128 keys; z by dot products along the width (key after key, four rows at
a time), running maximum and sum a row, then out <- out e^(m_old - m) + p v, four keys at a time
along the depth. Traffic: k and v once; a block of v is read a second time from cache. Whether a row
of k or v is finite is found out on the way, because a pass of its own would cost as much as the
kernel. Backward: that of ``dense``.
"""

import numpy as np

from attention_ref.kernels import softmax
from attention_ref.kernels.numba import dense, jit, sums, threads
from attention_ref.kernels.numba.elementary import exp, tanh

BLOCK = 128  # keys whose scores are held at once
PORTION = 1024  # keys an item
MOST = 64  # rows of a tile; more queries are work for the dense kernel


@sums
def _four_scores(q, r, k, s, width):
    """q . k for the rows r to r + 3, and 0, or NaN where k is not finite."""
    a, b, n = np.uintp(r), np.uintp(s), np.uintp(width)
    z0 = z1 = z2 = z3 = odd = q.dtype.type(0)
    for d in range(n):
        x = k[b + d]
        z0 += q[a + d] * x
        z1 += q[a + n + d] * x
        z2 += q[a + n + n + d] * x
        z3 += q[a + n + n + n + d] * x
        odd += x - x
    return z0, z1, z2, z3, odd


@sums
def _finite(v, at, depth):
    """0, or NaN where v is not finite."""
    a, odd = np.uintp(at), v.dtype.type(0)
    for e in range(np.uintp(depth)):
        odd += v[a + e] - v[a + e]
    return odd


@jit
def _four_values(acc, p, j, rows, v, at, depth, odd):
    """acc += p v for four keys; keys that are not finite have made their rows NaN already."""
    n, first = np.uintp(depth), np.uintp(at)
    clean = odd[j] + odd[j + 1] + odd[j + 2] + odd[j + 3] == 0
    for r in range(rows):
        p0, p1, p2, p3 = (p[r * BLOCK + j], p[r * BLOCK + j + 1], p[r * BLOCK + j + 2],
                          p[r * BLOCK + j + 3])  # fmt: skip
        line = np.uintp(r) * n
        if clean:
            for e in range(n):
                y = acc[line + e] + p0 * v[first + e]
                y += p1 * v[first + n + e]
                y += p2 * v[first + n + n + e]
                acc[line + e] = y + p3 * v[first + n + n + n + e]
        else:
            for i in range(4):
                if odd[j + i] == 0:
                    for e in range(n):
                        acc[line + e] += p[r * BLOCK + j + i] * v[first + np.uintp(i) * n + e]


@jit
def _one_value(acc, p, j, rows, v, at, depth, odd):
    n, first = np.uintp(depth), np.uintp(at)
    for r in range(rows if odd[j] == 0 else 0):
        weight, line = p[r * BLOCK + j], np.uintp(r) * n
        for e in range(n):
            acc[line + e] += weight * v[first + e]


@jit
def _finish_scores(z, rows, count, n, first_head, s, queries, keys, mask, bias, masks, biases, cap,
                   causal, shift, odd):  # fmt: skip
    """Softcap, bias, mask and causality on a block; a visible key that is not finite gives NaN."""
    dead = z.dtype.type(-np.inf)
    for r in range(rows):
        h, t, line = first_head + r // queries, r % queries, np.uintp(r * BLOCK)
        if cap > 0:
            for j in range(np.uintp(count)):
                z[line + j] = cap * tanh(z[line + j] / cap)
        if biases[4] > 0:
            at = n * biases[0] + h * biases[1] + t * biases[2] + s * biases[3]
            for j in range(count):
                b = bias[at + j * biases[3]]
                z[r * BLOCK + j] += (b - b) + b if b > 0 else b
        for j in range(np.uintp(count)):
            z[line + j] += odd[j]
        if masks[4] > 0:
            at = n * masks[0] + h * masks[1] + t * masks[2] + s * masks[3]
            for j in range(count):
                z[r * BLOCK + j] = z[r * BLOCK + j] if mask[at + j * masks[3]] else dead
        end = min(max(t + shift + 1 - s, 0), count) if causal else count
        for j in range(end, BLOCK):
            z[r * BLOCK + j] = dead


@jit
def _online(z, rows, count, top, total, acc, depth):
    """z becomes weights; maximum, sum and output of every row move on."""
    lowest, zero, n = z.dtype.type(-np.inf), z.dtype.type(0), np.uintp(depth)
    for r in range(rows):
        line, best, bad = np.uintp(r * BLOCK), top[r], zero
        for j in range(np.uintp(count)):
            x = z[line + j]
            best = x if x > best else best
            bad += x - x if x != lowest else zero
        safe = best if best > lowest else zero
        alpha = exp(top[r] - safe) if top[r] > lowest else zero
        top[r] = best
        for j in range(np.uintp(BLOCK)):
            z[line + j] = exp(z[line + j] - safe)
        block = zero
        for j in range(np.uintp(count)):
            block += z[line + j]
        total[r] = total[r] * alpha + (block + bad)
        if alpha != 1:
            for e in range(n):
                acc[np.uintp(r) * n + e] *= alpha


@jit
def _forward(first, last, q, k, v, mask, bias, masks, biases, sizes, scale, cap, causal, shift,
             tops, totals, parts):  # fmt: skip
    heads, groups, queries, keys, width, depth = sizes
    share = heads // groups
    rows, portions, kind = share * queries, (keys + PORTION - 1) // PORTION, q.dtype
    padded = (rows + 3) // 4 * 4
    own, z = np.zeros(padded * width, kind), np.empty(padded * BLOCK, kind)
    odd = np.empty(BLOCK, kind)
    top, total, acc = np.empty(rows, kind), np.empty(rows, kind), np.empty(rows * depth, kind)
    for item in range(first, last):
        n, g, portion = item // portions // groups, item // portions % groups, item % portions
        at = (n * heads + g * share) * queries
        for i in range(rows * width):
            own[i] = q[at * width + i] * scale
        top[:], total[:], acc[:] = -np.inf, 0, 0
        column = (n * groups + g) * keys
        end = min(keys, (portion + 1) * PORTION)
        for s in range(portion * PORTION, end, BLOCK):
            count = min(BLOCK, end - s)
            for j in range(count):
                key, value = (column + s + j) * width, (column + s + j) * depth
                odd[j] = _finite(v, value, depth)
                for r in range(0, padded, 4):
                    z0, z1, z2, z3, strange = _four_scores(own, r * width, k, key, width)
                    z[r * BLOCK + j], z[(r + 1) * BLOCK + j] = z0, z1
                    z[(r + 2) * BLOCK + j], z[(r + 3) * BLOCK + j] = z2, z3
                    odd[j] += strange
            _finish_scores(z, rows, count, n, g * share, s, queries, keys, mask, bias, masks,
                           biases, cap, causal, shift, odd)  # fmt: skip
            _online(z, rows, count, top, total, acc, depth)
            fours = count - count % 4
            for j in range(0, fours, 4):
                _four_values(acc, z, j, rows, v, (column + s + j) * depth, depth, odd)
            for j in range(fours, count):
                _one_value(acc, z, j, rows, v, (column + s + j) * depth, depth, odd)
        place = item * rows
        tops[place : place + rows], totals[place : place + rows] = top, total
        parts[place * depth : (place + rows) * depth] = acc


class _Kernel:
    """The launches that ``softmax`` calls."""

    dtypes = dense.DTYPES
    quarantines = True

    @staticmethod
    def forward(c, k, out, lse):
        """Portions side by side, then their sum."""
        batch, heads, queries, keys, width, depth = softmax.lengths(c)
        groups, dtype = k.shape[1], c.q.dtype
        portions, rows = -(-keys // PORTION), heads // max(groups, 1) * queries
        tops, totals = np.empty((2, batch, groups, portions, rows), dtype)
        parts = np.empty((batch, groups, portions, rows, depth), dtype)
        work = 2 * batch * heads * queries * keys * (width + depth)
        threads.share(
            _forward, batch * groups * portions, work, c.q.ravel(), k.ravel(), c.v.ravel(),
            c.mask.ravel(), c.bias.ravel(),
            softmax.strides(c.mask, c.masked), softmax.strides(c.bias, c.biased),
            (heads, groups, queries, keys, width, depth), dtype.type(c.scale),
            dtype.type(c.softcap or 0), c.causal, c.shift, tops.ravel(), totals.ravel(),
            parts.ravel(),
        )  # fmt: skip
        top = np.max(tops, axis=2, keepdims=True, initial=-np.inf)
        safe = np.where(np.isfinite(top), top, dtype.type(0))
        share = np.exp(tops - safe)
        total = np.sum(share * totals, axis=2)
        mixed = np.sum(share[..., None] * parts, axis=2)
        with np.errstate(divide="ignore", invalid="ignore"):
            y = np.where(total[..., None] == 0, dtype.type(0), mixed / total[..., None])
            y = np.where(np.isnan(total)[..., None], dtype.type(np.nan), y)
            out[...] = y.reshape(out.shape)
            lse[...] = (safe[:, :, 0] + np.log(total)).reshape(lse.shape)


KERNEL = _Kernel


def fits(q, k):
    """Whether these shapes are work for this kernel: few queries a key head, more keys."""
    heads = q.shape[-3] if q.ndim > 2 else 1
    groups = k.shape[-3] if k.ndim > 2 else 1
    rows = heads // max(groups, 1) * q.shape[-2]
    return 0 < rows <= MOST and k.shape[-2] >= 4 * q.shape[-2]


def best(q, k):
    """The forward for these shapes, this one or that of ``dense``; they share the backward."""
    return forward if fits(q, k) else dense.forward


def forward(q, k, v, *, mask=None, causal=False, align="lower_right", scale=None, softcap=None,
            bias=None, empty_row="zero"):  # fmt: skip
    """Softmax attention of few queries; arguments and results as in ``kernels.softmax.forward``."""
    return softmax.forward(KERNEL, q, k, v, mask, causal, align, scale, softcap, bias, empty_row)


backward = dense.backward
