r"""Dense softmax attention that never holds more than a tile of the scores.

    z = c q k^T,  z <- cap tanh(z / cap),  z <- z + bias,  -inf where masked
    p = softmax(z),  out = p v,  lse = log sum exp z

Forward: one work item owns 128 queries of one head; they lie in the lanes (see ``tiles``). Loop
order: item, block of 96 keys, then the tile steps z = k q^T, running maximum m and sum l down the
keys, out <- out e^(m_old - m) + v^T p. Blocks that causality or the mask leaves empty are skipped.
Traffic an item: q once, k and v once (96 keys at a time, from the second-level cache when it holds
them), so S (D + E) + 128 (D + E) numbers an item, and T / 128 items a head.

Backward, from q, k, v, out, lse (the weights are made again, nothing of size T x S is kept):

    delta_t = dout_t . out_t - dlse_t,  p = exp(z - lse),  dz = p (dout v^T - delta)
    dq = c dz k     (one item owns 128 queries, walks over the keys)
    dk = c dz^T q,  dv = p^T dout     (one item owns 128 keys of a key head, walks over its query
                                       heads and their queries)

Seven tile products instead of the five a single pass would need, and in exchange every item owns
its rows: no atomics, the same bits with any number of threads. Extra memory O((T + S) (D + E)) a
head; a bias that needs a gradient adds dz in full, (N, H, T, S).

Non-finite numbers: the wrapper turns a key whose k or v holds one into k = NaN, v = 0, so a query
that sees it becomes NaN and a query that does not sees the -inf of the mask. In the backward these
keys are zeros and their poisoned queries have no gradient, as in scores/dot_product.
"""

import math
from typing import NamedTuple

import numpy as np

from attention_ref.core import check
from attention_ref.core.errors import ParameterError, ShapeError
from attention_ref.kernels.numba import jit, threads
from attention_ref.kernels.numba.elementary import exp, tanh
from attention_ref.kernels.numba.tiles import (
    LANES,
    ROWS,
    expect,
    fill,
    float_dtype,
    load_lanes,
    multiply,
    prepare,
    store_lanes,
    sum_to,
)


class Cache(NamedTuple):
    """What the backward needs; N stands for all leading axes flattened."""

    out: np.ndarray  # (..., H, T, E), as returned
    lse: np.ndarray  # (..., H, T), log of the sum of exponentials, nats; -inf for an empty row
    q: np.ndarray  # (N, H, T, D), rows with NaN or infinity replaced by zeros
    k: np.ndarray  # (N, G, S, D), likewise
    v: np.ndarray  # (N, G, S, E), likewise
    mask: np.ndarray  # (N or 1, H or 1, T or 1, S or 1), bool
    bias: np.ndarray  # likewise, nats
    numbers: tuple  # scale, softcap (0 = none), in the dtype of q
    causal: bool
    shift: int  # query t sees key s when s <= t + shift
    masked: bool
    biased: bool
    empty_row: str
    shapes: dict  # name -> shape of the argument as given
    dtypes: dict  # name -> dtype of the argument as given


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
def _causal_tile(z, rows, first, step):
    """Row r keeps the lanes x >= first + r (step 1: rows are keys) or x < first + r (step -1)."""
    dead = z.dtype.type(-np.inf)
    for r in range(rows):
        edge = min(max(first + r, 0), LANES)
        low, high = (0, edge) if step > 0 else (edge, LANES)
        for x in range(low, high):
            z[r * LANES + x] = dead


@jit
def _softmax_tile(z, rows, top, safe, total, alpha):
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
        total[x] *= alpha[x]
    for r in range(rows):
        row = z[r * LANES : (r + 1) * LANES]
        for x in range(LANES):
            p = exp(row[x] - safe[x])
            row[x] = p
            total[x] += p


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
def _forward_item(n, h, t, q, k, v, mask, bias, mask_strides, bias_strides, sizes, scale, cap,
                  causal, shift, out, lse):  # fmt: skip
    """128 queries of one head, from query t on."""
    heads, groups, queries, keys, width, depth = sizes
    lanes = min(LANES, queries - t)
    key_head = n * groups + h // (heads // groups)
    row = (n * heads + h) * queries + t
    kind = q.dtype
    qt, acc = np.empty(width * LANES, kind), np.empty(depth * LANES, kind)
    z, slope = np.empty(ROWS * LANES, kind), np.empty(ROWS * LANES, kind)
    top, safe, total, alpha = (
        np.empty(LANES, kind), np.empty(LANES, kind), np.empty(LANES, kind), np.empty(LANES, kind)
    )  # fmt: skip
    load_lanes(q, row * width, width, lanes, scale, qt)
    fill(acc, depth * LANES, 0)
    fill(total, LANES, 0)
    fill(top, LANES, -np.inf)
    end = min(keys, max(0, t + lanes + shift)) if causal else keys
    for s in range(0, end, ROWS):
        rows = min(ROWS, end - s)
        masks = _block(mask_strides, n, h, t, s, True)
        if masks[0] >= 0 and not _mask_any(mask, masks[0], masks[1], masks[2], rows, lanes):
            continue
        biases = _block(bias_strides, n, h, t, s, True)
        _score_tile(z, slope, k, (key_head * keys + s) * width, width, qt, rows, lanes, mask, bias,
                    cap, masks, biases)  # fmt: skip
        if causal and s + rows - 1 > t + shift:
            _causal_tile(z, rows, s - shift - t, 1)
        _softmax_tile(z, rows, top, safe, total, alpha)
        for e in range(depth):
            line = acc[e * LANES : (e + 1) * LANES]
            for x in range(LANES):
                line[x] *= alpha[x]
        multiply(v, (key_head * keys + s) * depth, 1, depth, depth, rows, z, acc)
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
def _forward(first, last, q, k, v, mask, bias, mask_strides, bias_strides, sizes, scale, cap,
             causal, shift, out, lse):  # fmt: skip
    heads, blocks = sizes[0], (sizes[2] + LANES - 1) // LANES
    for item in range(first, last):
        head, t = item // blocks, _turn(item % blocks, blocks) * LANES
        _forward_item(head // heads, head % heads, t, q, k, v, mask, bias, mask_strides,
                      bias_strides, sizes, scale, cap, causal, shift, out, lse)  # fmt: skip


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
def _queries_item(n, h, t, q, k, v, dout, lse, delta, mask, bias, mask_strides, bias_strides,
                  sizes, scale, cap, causal, shift, dq):  # fmt: skip
    """dq of 128 queries of one head."""
    heads, groups, queries, keys, width, depth = sizes
    lanes = min(LANES, queries - t)
    key_head = n * groups + h // (heads // groups)
    row = (n * heads + h) * queries + t
    kind = q.dtype
    qt, dt = np.empty(width * LANES, kind), np.empty(depth * LANES, kind)
    acc, slope = np.empty(width * LANES, kind), np.empty(ROWS * LANES, kind)
    z, dz = np.empty(ROWS * LANES, kind), np.empty(ROWS * LANES, kind)
    logs, deltas = np.empty(LANES, kind), np.empty(LANES, kind)
    load_lanes(q, row * width, width, lanes, scale, qt)
    load_lanes(dout, row * depth, depth, lanes, kind.type(1), dt)
    load_lanes(lse, row, 1, lanes, kind.type(1), logs)
    load_lanes(delta, row, 1, lanes, kind.type(1), deltas)
    fill(acc, width * LANES, 0)
    end = min(keys, max(0, t + lanes + shift)) if causal else keys
    for s in range(0, end, ROWS):
        rows = min(ROWS, end - s)
        masks = _block(mask_strides, n, h, t, s, True)
        if masks[0] >= 0 and not _mask_any(mask, masks[0], masks[1], masks[2], rows, lanes):
            continue
        biases = _block(bias_strides, n, h, t, s, True)
        at = key_head * keys + s
        _score_tile(z, slope, k, at * width, width, qt, rows, lanes, mask, bias, cap, masks,
                    biases)  # fmt: skip
        if causal and s + rows - 1 > t + shift:
            _causal_tile(z, rows, s - shift - t, 1)
        for r in range(rows):
            line, dline = z[r * LANES : (r + 1) * LANES], dz[r * LANES : (r + 1) * LANES]
            for x in range(LANES):
                line[x] = exp(line[x] - logs[x])
                dline[x] = -deltas[x]
        multiply(v, at * depth, depth, 1, rows, depth, dt, dz)
        _gradient_tile(z, dz, slope, cap, rows)
        multiply(k, at * width, 1, width, width, rows, dz, acc)
    store_lanes(acc, width, lanes, scale, dq, row * width)


@jit
def _keys_item(n, g, s, q, k, v, dout, lse, delta, mask, bias, mask_strides, bias_strides, sizes,
               scale, cap, causal, shift, dk, dv, dbias):  # fmt: skip
    """dk and dv of 128 keys of one key head, over all its query heads; dz itself for the bias."""
    heads, groups, queries, keys, width, depth = sizes
    lanes = min(LANES, keys - s)
    column = (n * groups + g) * keys + s
    kind, share = q.dtype, heads // groups
    kt, vt = np.empty(width * LANES, kind), np.empty(depth * LANES, kind)
    dkt, dvt = np.empty(width * LANES, kind), np.empty(depth * LANES, kind)
    z, dz = np.empty(ROWS * LANES, kind), np.empty(ROWS * LANES, kind)
    slope = np.empty(ROWS * LANES, kind)
    load_lanes(k, column * width, width, lanes, scale, kt)
    load_lanes(v, column * depth, depth, lanes, kind.type(1), vt)
    fill(dkt, width * LANES, 0)
    fill(dvt, depth * LANES, 0)
    start = max(0, s - shift) if causal else 0
    for h in range(g * share, (g + 1) * share):
        for t in range(start, queries, ROWS):
            rows = min(ROWS, queries - t)
            masks = _block(mask_strides, n, h, t, s, False)
            if masks[0] >= 0 and not _mask_any(mask, masks[0], masks[1], masks[2], rows, lanes):
                continue
            biases = _block(bias_strides, n, h, t, s, False)
            row = (n * heads + h) * queries + t
            _score_tile(z, slope, q, row * width, width, kt, rows, lanes, mask, bias, cap, masks,
                        biases)  # fmt: skip
            if causal and s + LANES - 1 > t + shift:
                _causal_tile(z, rows, t + shift - s + 1, -1)
            for r in range(rows):
                line, dline = z[r * LANES : (r + 1) * LANES], dz[r * LANES : (r + 1) * LANES]
                log, negative = lse[row + r], -delta[row + r]
                for x in range(LANES):
                    line[x] = exp(line[x] - log)
                    dline[x] = negative
            multiply(dout, row * depth, 1, depth, depth, rows, z, dvt)
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
            multiply(q, row * width, 1, width, width, rows, dz, dkt)
    store_lanes(dkt, width, lanes, scale, dk, column * width)
    store_lanes(dvt, depth, lanes, kind.type(1), dv, column * depth)


@jit
def _backward_queries(first, last, q, k, v, dout, lse, delta, mask, bias, mask_strides,
                      bias_strides, sizes, scale, cap, causal, shift, dq):  # fmt: skip
    heads, blocks = sizes[0], (sizes[2] + LANES - 1) // LANES
    for item in range(first, last):
        head, t = item // blocks, _turn(item % blocks, blocks) * LANES
        _queries_item(head // heads, head % heads, t, q, k, v, dout, lse, delta, mask, bias,
                      mask_strides, bias_strides, sizes, scale, cap, causal, shift, dq)  # fmt: skip


@jit
def _backward_keys(first, last, q, k, v, dout, lse, delta, mask, bias, mask_strides, bias_strides,
                   sizes, scale, cap, causal, shift, dk, dv, dbias):  # fmt: skip
    groups, blocks = sizes[1], (sizes[3] + LANES - 1) // LANES
    for item in range(first, last):
        head, s = item // blocks, _turn(item % blocks, blocks) * LANES
        _keys_item(head // groups, head % groups, s, q, k, v, dout, lse, delta, mask, bias,
                   mask_strides, bias_strides, sizes, scale, cap, causal, shift, dk, dv,
                   dbias)  # fmt: skip


def _heads(x):
    """At least (H, T, D): an array without a head axis has one head."""
    return x if x.ndim > 2 else x[None]


def _flat(name, x, lead, dtype):
    """(..., H, T, D) -> (N, H, T, D), leading axes broadcast."""
    x = _heads(x)
    return prepare(np.broadcast_to(x, lead + x.shape[-3:]).reshape(-1, *x.shape[-3:]), dtype)


def _thin(name, x, lead, inner, dtype):
    """A mask or bias as (N or 1, H or 1, T or 1, S or 1): axes it broadcasts over stay thin."""
    if x is None:
        return np.ones((1, 1, 1, 1), dtype)
    expect(name, x, lead + inner, "(..., H, T, S)")
    x = x.reshape((1,) * (len(lead) + 3 - x.ndim) + x.shape)
    if any(n != 1 for n in x.shape[:-3]):
        x = np.broadcast_to(x, lead + x.shape[-3:])
    return prepare(x.reshape(-1, *x.shape[-3:]), dtype)


def _strides(x, given):
    """Steps in numbers along N, H, T, S (0 where x broadcasts) and whether it was given at all."""
    steps = [s // x.itemsize if n > 1 else 0 for s, n in zip(x.strides, x.shape, strict=True)]
    return (*steps, int(given))


def _arrange(q, k, v, mask, bias):
    """Check the shapes, flatten the leading axes, quarantine non-finite rows."""
    dtype = float_dtype(q=q, k=k, v=v, bias=bias)
    for name, x in {"q": q, "k": k, "v": v}.items():
        if x.ndim < 2:
            raise ShapeError(f"{name} has shape {x.shape}, expected at least 2 axes")
    heads, groups = _heads(q).shape[-3], _heads(k).shape[-3]
    (queries, width), keys = q.shape[-2:], k.shape[-2]
    if k.shape[-1] != width or v.shape[-2] != keys or _heads(v).shape[-3] != groups:
        raise ShapeError(
            f"k has shape {k.shape} and v {v.shape}, expected (..., G, S, D) and (..., G, S, E) "
            f"for q of shape {q.shape}"
        )
    if not groups or heads % groups:
        raise ShapeError(f"q has H = {heads} heads, k has G = {groups}, expected a multiple")
    if mask is not None:
        check.boolean("mask", mask)
    lead = np.broadcast_shapes(*(_heads(x).shape[:-3] for x in (q, k, v)))
    mask = _thin("mask", mask, lead, (heads, queries, keys), np.bool_)
    bias = _thin("bias", bias, lead, (heads, queries, keys), dtype)
    q, k, v = _flat("q", q, lead, dtype), _flat("k", k, lead, dtype), _flat("v", v, lead, dtype)
    return q, k, v, mask, bias, lead, dtype


def _finite_rows(x):
    """True for rows without NaN and infinity; None when all are."""
    return None if np.isfinite(x).all() else np.isfinite(x).all(axis=-1, keepdims=True)


def forward(q, k, v, *, mask=None, causal=False, align="lower_right", scale=None, softcap=None,
            bias=None, empty_row="zero"):  # fmt: skip
    """Softmax attention on the CPU, without ever holding the scores.

    Parameters
    ----------
    q : ndarray, shape (..., H, T, D)
        Queries; with two axes, one head.
    k, v : ndarray, shapes (..., G, S, D), (..., G, S, E)
        Keys and values; query head h uses key head h // (H // G).
    mask, causal, align, scale, softcap, bias, empty_row
        As in ``scores/dot_product``.

    Returns
    -------
    out : ndarray, shape (..., H, T, E)
        Outputs.
    cache : Cache
        For :func:`backward`; holds ``lse``.
    """
    check.option("align", align, check.ALIGNMENTS)
    check.option("empty_row", empty_row, check.EMPTY_ROWS)
    check.number("scale", scale)
    check.number("softcap", softcap, low=0, open_low=True)
    given = {"q": q, "k": k, "v": v, **({} if bias is None else {"bias": bias})}
    masked, biased, flat = mask is not None, bias is not None, q.ndim == 2
    q, k, v, mask, bias, lead, dtype = _arrange(q, k, v, mask, bias)
    (batch, heads, queries, width), keys, depth = q.shape, k.shape[2], v.shape[3]
    scale = 1.0 / math.sqrt(width) if scale is None else float(scale)
    numbers = dtype.type(scale), dtype.type(softcap or 0)
    shift = keys - queries if align == "lower_right" else 0

    good = _finite_rows(k), _finite_rows(v)
    marked = k
    if good[0] is not None or good[1] is not None:
        both = np.logical_and(*(True if g is None else g for g in good))
        marked = np.where(both, k, dtype.type(np.nan))
        k, v = (x if g is None else np.where(g, x, dtype.type(0)) for x, g in zip((k, v), good))
    out = np.empty((batch, heads, queries, depth), dtype)
    lse = np.empty((batch, heads, queries), dtype)
    sizes = (heads, k.shape[1], queries, keys, width, depth)
    pairs = batch * heads * queries * keys
    threads.share(
        _forward, batch * heads * -(-queries // LANES), 2 * pairs * (width + depth),
        q.ravel(), marked.ravel(), v.ravel(), mask.ravel(), bias.ravel(), _strides(mask, masked),
        _strides(bias, biased), sizes, *numbers, bool(causal), shift, out.ravel(), lse.ravel(),
    )  # fmt: skip
    good_q = _finite_rows(q)
    q = q if good_q is None else np.where(good_q, q, dtype.type(0))
    _fill_empty_rows(out, lse, marked, v, heads // k.shape[1], empty_row)

    inner = () if flat else (heads,)
    out, lse = out.reshape(*lead, *inner, queries, depth), lse.reshape(*lead, *inner, queries)
    return out, Cache(
        out, lse, q, k, v, mask, bias, numbers, causal, shift, masked, biased, empty_row,
        {name: x.shape for name, x in given.items()}, {name: x.dtype for name, x in given.items()},
    )  # fmt: skip


def _fill_empty_rows(out, lse, k, v, share, empty_row):
    """Queries without a key: zeros are there already, the other choices are written here."""
    empty = np.isneginf(lse)
    if empty_row == "zero" or not empty.any():
        return
    if empty_row == "raise":
        raise ParameterError(
            "mask leaves at least one query without a key, expected none with "
            "empty_row='raise'; hint: empty_row='zero' gives such rows zeros"
        )
    fill_with = np.full_like(v[:, :, :1], np.nan)
    if empty_row == "uniform" and v.shape[2]:
        poison = np.isnan(k).any(axis=(2, 3), keepdims=True)
        fill_with = np.where(poison, np.nan, v.mean(axis=2, keepdims=True))
    fill_with = np.broadcast_to(np.repeat(fill_with, share, axis=1), out.shape)
    out[empty] = fill_with[empty]
    if empty_row == "nan":
        lse[empty] = np.nan


def backward(dout, cache, dlse=None):
    """Gradients of :func:`forward`.

    Parameters
    ----------
    dout : ndarray, shape (..., H, T, E)
        Gradient of the output.
    cache : Cache
        From the forward.
    dlse : ndarray, shape (..., H, T), optional
        Gradient of ``cache.lse``.

    Returns
    -------
    dict
        Under "q", "k", "v" and, when a bias was given, "bias".
    """
    c = cache
    (batch, heads, queries, width), keys, depth = c.q.shape, c.k.shape[2], c.v.shape[3]
    if dout.shape != c.out.shape:
        raise ShapeError(f"dout has shape {dout.shape}, expected {c.out.shape}, that of the output")
    dtype, infinity = c.q.dtype, c.q.dtype.type(np.inf)
    out, lse = c.out.reshape(*c.q.shape[:3], depth), c.lse.reshape(c.q.shape[:3])
    dout = prepare(dout, dtype).reshape(out.shape)
    empty, poison = np.isneginf(lse), np.isnan(lse)
    if poison.any():
        dout = np.where(poison[..., None], dtype.type(0), dout)
        out = np.where(poison[..., None], dtype.type(0), out)
    delta = np.einsum("nhte,nhte->nht", dout, out)
    if dlse is not None:
        delta -= np.where(empty | poison, dtype.type(0), np.reshape(dlse, delta.shape))
    lse = np.where(empty | poison, infinity, lse)  # so that their weights are exp(-inf) = 0

    dq, dk, dv = np.empty_like(c.q), np.empty_like(c.k), np.empty_like(c.v)
    dbias = np.zeros((batch, heads, queries, keys) if c.biased else (1, 1, 1, 1), dtype)
    sizes = (heads, c.k.shape[1], queries, keys, width, depth)
    arguments = (
        c.q.ravel(), c.k.ravel(), c.v.ravel(), dout.ravel(), lse.ravel(), delta.ravel(),
        c.mask.ravel(), c.bias.ravel(), _strides(c.mask, c.masked), _strides(c.bias, c.biased),
        sizes, *c.numbers, bool(c.causal), c.shift,
    )  # fmt: skip
    work = 4 * batch * heads * queries * keys * (width + depth)
    items = batch * heads * -(-queries // LANES)
    threads.share(_backward_queries, items, work, *arguments, dq.ravel())
    items = batch * c.k.shape[1] * -(-keys // LANES)
    threads.share(_backward_keys, items, work, *arguments, dk.ravel(), dv.ravel(), dbias.ravel())
    if c.empty_row == "uniform" and empty.any():
        spread = np.where(empty[..., None], dout, dtype.type(0)).sum(axis=2, keepdims=True) / keys
        groups = c.k.shape[1]
        dv += spread.reshape(batch, groups, heads // groups, 1, depth).sum(axis=2)
    gradients = {"q": dq, "k": dk, "v": dv, **({"bias": dbias} if c.biased else {})}
    return {name: _give_back(dx, c, name) for name, dx in gradients.items()}


def _give_back(dx, cache, name):
    """From (N, H, T, D) to the shape and dtype the argument had."""
    shape = cache.shapes[name]
    lead = cache.out.shape[: max(cache.out.ndim - 3, 0)]
    dx = dx.reshape(*lead, *dx.shape[1:])
    dx = sum_to(dx, shape) if len(shape) <= dx.ndim else dx.reshape(shape)
    return dx.astype(cache.dtypes[name], copy=False)
