r"""Softmax attention that never holds more than a tile of the scores: dense, or only where a
pattern lets queries see keys.

    z = c q k^T,  z <- cap tanh(z / cap),  z <- z + bias,  -inf where masked
    p = softmax(z),  out = p v,  lse = log sum exp z

Forward: one work item owns up to 128 queries of one head; they lie in the lanes (see ``tiles``).
Loop order: item, its runs of keys (``kernels.plan``), 96 keys at a time, then the tile steps
z = k q^T, running maximum m and sum l down the keys, out <- out e^(m_old - m) + v^T p. What no run
holds is never touched, so time grows with the pairs that a pattern keeps; within a tile the
interval of each query cuts what is left, and tiles that the mask leaves empty are skipped.
Traffic an item: q once, k and v once (96 keys at a time, from the second-level cache when it holds
them), so S (D + E) + 128 (D + E) numbers an item, and T / 128 items a head.

Backward, from q, k, v, out, lse (the weights are made again, nothing of size T x S is kept):

    delta_t = dout_t . out_t - dlse_t,  p = exp(z - lse),  dz = p (dout v^T - delta)
    dq = c dz k     (one item owns 128 queries, walks over the keys)
    dk = c dz^T q,  dv = p^T dout     (one item owns 128 keys of a key head, walks over its query
                                       heads and their queries)

Seven tile products instead of the five a single pass would need, and in exchange every item owns
its rows: no atomics, the same bits with any number of threads. Extra memory O((T + S) (D + E)) a
head; a bias adds its gradient in full, (N, H, T, S). Quarantine and layout: ``kernels.softmax``.
"""

import numpy as np

from attention_ref.kernels import plan, softmax
from attention_ref.kernels.numba import jit, threads
from attention_ref.kernels.numba.elementary import exp, tanh
from attention_ref.kernels.numba.tiles import (
    LANES,
    ROWS,
    fill,
    load_lanes,
    multiply,
    store_lanes,
)


@jit
def _mask_tile(z, mask, at, down, right, rows, lanes):
    """z = -inf where the mask says no."""
    dead = z.dtype.type(-np.inf)
    for r in range(rows):
        for x in range(lanes):
            z[r * LANES + x] = z[r * LANES + x] if mask[at + r * down + x * right] else dead


@jit
def _mask_any(mask, at, down, right, rows, lanes):
    """Whether the mask leaves anything in this block."""
    for r in range(rows):
        for x in range(lanes):
            if mask[at + r * down + x * right]:
                return True
    return False


@jit
def _bias_tile(z, bias, at, down, right, rows, lanes):
    """z += bias; +inf becomes NaN (inf - inf), so that like NaN it poisons whoever sees it."""
    for r in range(rows):
        for x in range(lanes):
            b = bias[at + r * down + x * right]
            z[r * LANES + x] += (b - b) + b if b > 0 else b


@jit
def _cap_tile(z, rows, cap, slope):
    """z = cap tanh(z / cap); slope = its derivative, 1 - tanh^2."""
    one = z.dtype.type(1)
    for x in range(rows * LANES):
        t = tanh(z[x] / cap)
        z[x] = cap * t
        slope[x] = one - t * t


@jit
def _cut_lanes(z, s, rows, lanes, low, high):
    """Rows are keys from s on; lane x keeps those with low[x] <= key < high[x]."""
    dead, inside = z.dtype.type(-np.inf), True
    for x in range(lanes):
        inside = inside and low[x] <= s and s + rows <= high[x]
    if inside:
        return
    for r in range(rows):
        line, key = z[r * LANES : (r + 1) * LANES], np.int32(s + r)
        for x in range(LANES):
            keep = (low[x] <= key) & (key < high[x])
            line[x] = line[x] if keep else dead


@jit
def _cut_rows(z, s, rows, lanes, low, high, at):
    """Lanes are keys from s on; row r keeps those from low[at + r] to high[at + r]."""
    dead = z.dtype.type(-np.inf)
    for r in range(rows):
        begin, end = low[at + r] - s, high[at + r] - s
        if begin > 0 or end < lanes:
            line = z[r * LANES : (r + 1) * LANES]
            for x in range(LANES):
                line[x] = line[x] if begin <= x and x < end else dead


@jit
def _softmax_tile(z, rows, top, safe, total, alpha, block):
    """Online softmax down the rows: z becomes p, the running maximum and sum move on."""
    zero, lowest = z.dtype.type(0), z.dtype.type(-np.inf)
    for x in range(LANES):
        safe[x] = top[x]
    for r in range(rows):
        row = z[r * LANES : (r + 1) * LANES]
        for x in range(LANES):
            safe[x] = row[x] if row[x] > safe[x] else safe[x]
    for x in range(LANES):
        old = top[x]
        top[x] = safe[x]
        safe[x] = safe[x] if safe[x] > lowest else zero
        alpha[x] = exp(old - safe[x])
        block[x] = zero
    for r in range(rows):
        row = z[r * LANES : (r + 1) * LANES]
        for x in range(LANES):
            p = exp(row[x] - safe[x])
            row[x] = p
            block[x] += p
    for x in range(LANES):
        total[x] = total[x] * alpha[x] + block[x]


@jit
def _score_tile(z, slope, a, start, width, b, rows, lanes, mask, bias, cap, masks, biases):
    """Scores of ``rows`` rows of a against the lanes of b, with softcap, bias and mask."""
    fill(z, rows * LANES, 0)
    multiply(a, start, width, 1, rows, width, b, z)
    if cap > 0:
        _cap_tile(z, rows, cap, slope)
    if biases[0] >= 0:
        _bias_tile(z, bias, biases[0], biases[1], biases[2], rows, lanes)
    if masks[0] >= 0:
        _mask_tile(z, mask, masks[0], masks[1], masks[2], rows, lanes)


@jit
def _block(strides, n, h, t, s, keys_in_rows):
    """Where a block of the mask or the bias starts, and its strides down and across the lanes."""
    if strides[4] == 0:
        return -1, 0, 0
    at = n * strides[0] + h * strides[1] + t * strides[2] + s * strides[3]
    if keys_in_rows:
        return at, strides[3], strides[2]
    return at, strides[2], strides[3]


@jit
def _add_block(acc, part, alpha, a, start, width, terms, b):
    """acc = alpha * acc + a^T b. The block is summed by itself first: the error of a sum grows
    with the number of its terms, so two short sums err less than a long one."""
    fill(part, width * LANES, 0)
    multiply(a, start, 1, width, width, terms, b, part)
    for d in range(width):
        line, new = acc[d * LANES : (d + 1) * LANES], part[d * LANES : (d + 1) * LANES]
        for x in range(LANES):
            line[x] = line[x] * alpha[x] + new[x]


@jit
def _intervals(plan, steps, n, t, lanes, queries, low, high):
    """The intervals of the queries in the lanes; lanes without a query see nothing."""
    at = n * steps[2] * queries + t
    for x in range(LANES):
        low[x] = plan[5][at + x] if x < lanes else 0
        high[x] = plan[6][at + x] if x < lanes else 0


@jit
def _forward_item(n, h, item, q, k, v, mask, bias, mask_strides, bias_strides, sizes, scale, cap,
                  plan, steps, out, lse):  # fmt: skip
    """One block of queries of one head."""
    heads, groups, queries, keys, width, depth = sizes
    start, stop, runs, first, last = plan[:5]
    t, lanes = start[item], stop[item] - start[item]
    pattern = (n * steps[0] + h * steps[1]) * start.size + item
    key_head = n * groups + h // (heads // groups)
    row = (n * heads + h) * queries + t
    kind = q.dtype
    qt, acc = np.empty(width * LANES, kind), np.empty(depth * LANES, kind)
    z, slope = np.empty(ROWS * LANES, kind), np.empty(ROWS * LANES, kind)
    top, safe, total = np.empty(LANES, kind), np.empty(LANES, kind), np.empty(LANES, kind)
    alpha, block, part = np.empty(LANES, kind), np.empty(LANES, kind), np.empty(acc.size, kind)
    low, high = np.empty(LANES, np.int32), np.empty(LANES, np.int32)
    _intervals(plan, steps, n, t, lanes, queries, low, high)
    load_lanes(q, row * width, width, lanes, scale, qt)
    fill(acc, depth * LANES, 0)
    fill(total, LANES, 0)
    fill(top, LANES, -np.inf)
    for run in range(runs[pattern], runs[pattern + 1]):
        for s in range(first[run], last[run], ROWS):
            rows, at = min(ROWS, last[run] - s), key_head * keys + s
            masks = _block(mask_strides, n, h, t, s, True)
            if masks[0] >= 0 and not _mask_any(mask, masks[0], masks[1], masks[2], rows, lanes):
                continue
            biases = _block(bias_strides, n, h, t, s, True)
            _score_tile(z, slope, k, at * width, width, qt, rows, lanes, mask, bias, cap, masks,
                        biases)  # fmt: skip
            _cut_lanes(z, s, rows, lanes, low, high)
            _softmax_tile(z, rows, top, safe, total, alpha, block)
            _add_block(acc, part, alpha, v, at * depth, depth, rows, z)
    for x in range(lanes):
        lse[row + x] = top[x] + np.log(total[x])
    for x in range(LANES):
        total[x] = 1 / total[x] if total[x] != 0 else total[x]
    for e in range(depth):
        line = acc[e * LANES : (e + 1) * LANES]
        for x in range(LANES):
            line[x] *= total[x]
    store_lanes(acc, depth, lanes, kind.type(1), out, row * depth)


@jit
def _turn(i, blocks):
    """Early and late blocks by turns: a causal row is short at the start, long at the end."""
    return i // 2 if i % 2 == 0 else blocks - 1 - i // 2


@jit
def _forward(first, last, q, k, v, mask, bias, mask_strides, bias_strides, sizes, scale, cap, plan,
             steps, out, lse):  # fmt: skip
    heads, blocks = sizes[0], plan[0].size
    for i in range(first, last):
        head, item = i // blocks, _turn(i % blocks, blocks)
        _forward_item(head // heads, head % heads, item, q, k, v, mask, bias, mask_strides,
                      bias_strides, sizes, scale, cap, plan, steps, out, lse)  # fmt: skip


@jit
def _gradient_tile(p, dp, slope, cap, rows):
    """dz = p (dp - delta), where dp already lacks delta, then through the softcap."""
    zero = p.dtype.type(0)
    for x in range(rows * LANES):
        dp[x] = p[x] * dp[x] if p[x] != 0 else zero
    if cap > 0:
        for x in range(rows * LANES):
            dp[x] *= slope[x]


@jit
def _queries_item(n, h, item, q, k, v, dout, lse, delta, mask, bias, mask_strides, bias_strides,
                  sizes, scale, cap, plan, steps, dq):  # fmt: skip
    """dq of one block of queries of one head."""
    heads, groups, queries, keys, width, depth = sizes
    start, stop, runs, first, last = plan[:5]
    t, lanes = start[item], stop[item] - start[item]
    pattern = (n * steps[0] + h * steps[1]) * start.size + item
    key_head = n * groups + h // (heads // groups)
    row = (n * heads + h) * queries + t
    kind = q.dtype
    qt, dt = np.empty(width * LANES, kind), np.empty(depth * LANES, kind)
    acc, slope = np.empty(width * LANES, kind), np.empty(ROWS * LANES, kind)
    z, dz = np.empty(ROWS * LANES, kind), np.empty(ROWS * LANES, kind)
    logs, deltas, ones = np.empty(LANES, kind), np.empty(LANES, kind), np.ones(LANES, kind)
    part = np.empty(acc.size, kind)
    low, high = np.empty(LANES, np.int32), np.empty(LANES, np.int32)
    _intervals(plan, steps, n, t, lanes, queries, low, high)
    load_lanes(q, row * width, width, lanes, scale, qt)
    load_lanes(dout, row * depth, depth, lanes, kind.type(1), dt)
    load_lanes(lse, row, 1, lanes, kind.type(1), logs)
    load_lanes(delta, row, 1, lanes, kind.type(1), deltas)
    fill(acc, width * LANES, 0)
    for run in range(runs[pattern], runs[pattern + 1]):
        for s in range(first[run], last[run], ROWS):
            rows, at = min(ROWS, last[run] - s), key_head * keys + s
            masks = _block(mask_strides, n, h, t, s, True)
            if masks[0] >= 0 and not _mask_any(mask, masks[0], masks[1], masks[2], rows, lanes):
                continue
            biases = _block(bias_strides, n, h, t, s, True)
            _score_tile(z, slope, k, at * width, width, qt, rows, lanes, mask, bias, cap, masks,
                        biases)  # fmt: skip
            _cut_lanes(z, s, rows, lanes, low, high)
            for r in range(rows):
                line, dline = z[r * LANES : (r + 1) * LANES], dz[r * LANES : (r + 1) * LANES]
                for x in range(LANES):
                    line[x] = exp(line[x] - logs[x])
                    dline[x] = -deltas[x]
            multiply(v, at * depth, depth, 1, rows, depth, dt, dz)
            _gradient_tile(z, dz, slope, cap, rows)
            _add_block(acc, part, ones, k, at * width, width, rows, dz)
    store_lanes(acc, width, lanes, scale, dq, row * width)


@jit
def _keys_item(n, g, item, q, k, v, dout, lse, delta, mask, bias, mask_strides, bias_strides, sizes,
               scale, cap, plan, steps, dk, dv, dbias):  # fmt: skip
    """dk and dv of a block of keys of one key head, over all its query heads; dz for the bias."""
    heads, groups, queries, keys, width, depth = sizes
    start, stop, runs, first, last, low, high = plan
    s, lanes = start[item], stop[item] - start[item]
    column = (n * groups + g) * keys + s
    kind, share = q.dtype, heads // groups
    kt, vt = np.empty(width * LANES, kind), np.empty(depth * LANES, kind)
    dkt, dvt = np.empty(width * LANES, kind), np.empty(depth * LANES, kind)
    z, dz = np.empty(ROWS * LANES, kind), np.empty(ROWS * LANES, kind)
    slope, ones = np.empty(ROWS * LANES, kind), np.ones(LANES, kind)
    part = np.empty(max(width, depth) * LANES, kind)
    load_lanes(k, column * width, width, lanes, scale, kt)
    load_lanes(v, column * depth, depth, lanes, kind.type(1), vt)
    fill(dkt, width * LANES, 0)
    fill(dvt, depth * LANES, 0)
    for h in range(g * share, (g + 1) * share):
        pattern = (n * steps[0] + h * steps[1]) * start.size + item
        for run in range(runs[pattern], runs[pattern + 1]):
            for t in range(first[run], last[run], ROWS):
                rows = min(ROWS, last[run] - t)
                masks = _block(mask_strides, n, h, t, s, False)
                if masks[0] >= 0 and not _mask_any(mask, masks[0], masks[1], masks[2], rows, lanes):
                    continue
                biases = _block(bias_strides, n, h, t, s, False)
                row = (n * heads + h) * queries + t
                _score_tile(z, slope, q, row * width, width, kt, rows, lanes, mask, bias, cap,
                            masks, biases)  # fmt: skip
                _cut_rows(z, s, rows, lanes, low, high, n * steps[2] * queries + t)
                _weigh(z, dz, lse, delta, row, rows)
                _add_block(dvt, part, ones, dout, row * depth, depth, rows, z)
                multiply(dout, row * depth, depth, 1, rows, depth, vt, dz)
                if biases[0] >= 0:
                    _gradient_tile(z, dz, slope, cap - cap, rows)
                    for r in range(rows):
                        for x in range(lanes):
                            dbias[(row + r) * keys + s + x] = dz[r * LANES + x]
                    if cap > 0:
                        for x in range(rows * LANES):
                            dz[x] *= slope[x]
                else:
                    _gradient_tile(z, dz, slope, cap, rows)
                _add_block(dkt, part, ones, q, row * width, width, rows, dz)
    store_lanes(dkt, width, lanes, scale, dk, column * width)
    store_lanes(dvt, depth, lanes, kind.type(1), dv, column * depth)


@jit
def _weigh(z, dz, lse, delta, row, rows):
    """Rows are queries: z becomes the weights exp(z - lse), dz starts from -delta."""
    for r in range(rows):
        line, dline = z[r * LANES : (r + 1) * LANES], dz[r * LANES : (r + 1) * LANES]
        log, negative = lse[row + r], -delta[row + r]
        for x in range(LANES):
            line[x] = exp(line[x] - log)
            dline[x] = negative


@jit
def _backward_queries(first, last, q, k, v, dout, lse, delta, mask, bias, mask_strides,
                      bias_strides, sizes, scale, cap, plan, steps, dq):  # fmt: skip
    heads, blocks = sizes[0], plan[0].size
    for i in range(first, last):
        head, item = i // blocks, _turn(i % blocks, blocks)
        _queries_item(head // heads, head % heads, item, q, k, v, dout, lse, delta, mask, bias,
                      mask_strides, bias_strides, sizes, scale, cap, plan, steps, dq)  # fmt: skip


@jit
def _backward_keys(first, last, q, k, v, dout, lse, delta, mask, bias, mask_strides, bias_strides,
                   sizes, scale, cap, plan, steps, dk, dv, dbias):  # fmt: skip
    groups, blocks = sizes[1], plan[0].size
    for i in range(first, last):
        head, item = i // blocks, _turn(i % blocks, blocks)
        _keys_item(head // groups, head % groups, item, q, k, v, dout, lse, delta, mask, bias,
                   mask_strides, bias_strides, sizes, scale, cap, plan, steps, dk, dv,
                   dbias)  # fmt: skip


DTYPES = (np.dtype(np.float32), np.dtype(np.float64))


class _Kernel:
    """The launches that ``softmax`` calls; every array is contiguous and owned."""

    dtypes = DTYPES

    @staticmethod
    def forward(c, k, out, lse):
        """Fill out and lse; ``k`` holds NaN in the rows nobody may see without becoming NaN."""
        batch, heads, _, _, width, depth = softmax.lengths(c)
        by_query, _, steps = _plan(c)
        threads.share(
            _forward, batch * heads * by_query[0].size,
            2 * batch * heads * LANES * _walked(by_query) * (width + depth), c.q.ravel(),
            k.ravel(), c.v.ravel(), *_common(c), by_query, steps, out.ravel(), lse.ravel(),
        )  # fmt: skip

    @staticmethod
    def backward(c, dout, lse, delta, dq, dk, dv, dbias):
        """Fill dq, dk, dv and, when there is a bias, dbias (N, H, T, S), which holds zeros."""
        batch, heads, _, _, width, depth = softmax.lengths(c)
        by_query, by_key, steps = _plan(c)
        inputs = (c.q, c.k, c.v, dout, lse, delta)
        inputs = (*(x.ravel() for x in inputs), *_common(c))
        work = 4 * batch * heads * LANES * _walked(by_query) * (width + depth)
        threads.share(_backward_queries, batch * heads * by_query[0].size, work, *inputs, by_query,
                      steps, dq.ravel())  # fmt: skip
        threads.share(_backward_keys, batch * c.k.shape[1] * by_key[0].size, work, *inputs, by_key,
                      steps, dk.ravel(), dv.ravel(), dbias.ravel())  # fmt: skip


def _plan(c):
    """Both sides of the pattern as the kernels take them, and the steps between patterns."""
    batch, heads, queries, keys, _, _ = softmax.lengths(c)
    seen = c.seen
    if seen is None:
        align = "upper_left" if c.shift == 0 else "lower_right"
        seen = plan.interval(queries, keys, causal=c.causal, align=align)
    plan.fits(seen, batch, heads)
    ends = seen.low.ravel(), seen.high.ravel()
    one, other = plan.sides(seen, queries, keys, LANES)
    return (*one, *ends), (*other, *ends), plan.steps(seen)


def _walked(side):
    """Keys that all blocks of queries walk over, on average over the patterns."""
    patterns = max((side[2].size - 1) // max(side[0].size, 1), 1)
    return int(np.sum(side[4] - side[3])) // patterns


def _common(c):
    """What all three kernels take after their arrays."""
    _, heads, queries, keys, width, depth = softmax.lengths(c)
    kind = c.q.dtype.type
    return (
        c.mask.ravel(), c.bias.ravel(), softmax.strides(c.mask, c.masked),
        softmax.strides(c.bias, c.biased), (heads, c.k.shape[1], queries, keys, width, depth),
        kind(c.scale), kind(c.softcap or 0),
    )  # fmt: skip


KERNEL = _Kernel


def forward(q, k, v, *, mask=None, causal=False, align="lower_right", scale=None, softcap=None,
            bias=None, empty_row="zero", seen=None):  # fmt: skip
    """Softmax attention on the CPU; arguments and results as in ``kernels.softmax.forward``."""
    return softmax.forward(KERNEL, q, k, v, mask, causal, align, scale, softcap, bias, empty_row,
                           seen)  # fmt: skip


def backward(dout, cache, dlse=None):
    """Gradients of :func:`forward`; as in ``kernels.softmax.backward``."""
    return softmax.backward(KERNEL, dout, cache, dlse)
