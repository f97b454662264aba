r"""Recurrences over a state S of shape (D, E): the decay scan and the delta rule.

    decay:  S~ = a_t S_{t-1},  S_t = S~ + k_t v_t^T
    delta:  S~ = a_t S_{t-1},  u_t = v_t - S~^T k_t,  S_t = S~ + b_t k_t u_t^T
    both:   out_t = c S_t^T q_t

a_t is 1, one number a token, or one number a token and key channel. One kernel does both: without
the erasing term the delta rule with b = 1 is the decay scan.

Loop order: one item a head of a sequence; tokens one after another; inside a token the rows d of
the state, and in the innermost loop its E columns. Traffic: the state (D E numbers, 16 KB for
64 x 64 in float32) stays in the first-level cache, q, k, v, out pass through once.

Backward, t downwards, G the gradient of S_t (equations of the delta rule; without erasing the
terms in brackets are absent):

    dq = c S_t dout,  G += c q dout^T,  g = G^T k,  db = g . u,  du = b g,  dv = du
    dk = b G u [- S~ du],  G [-= k du^T],  da = rowsum(G * S_{t-1}),  G <- a G

It needs the states again. The forward keeps every P-th one, P about sqrt(T); the backward walks
over segments of P tokens from the last to the first, makes the segment's states again and keeps
them while it is there. Memory: T / P states a head in the cache and P + 2 states a thread, that is
O(sqrt(T) D E) instead of O(T D E); one extra forward in time.
"""

import math
from typing import NamedTuple

import numpy as np

from attention_ref.core import check
from attention_ref.core.errors import ShapeError
from attention_ref.kernels.door import expect, float_dtype, prepare, sum_to
from attention_ref.kernels.numba import jit, threads


class Cache(NamedTuple):
    """What the backward needs; N stands for all leading axes (heads too) flattened."""

    q: np.ndarray  # (N, T, D)
    k: np.ndarray  # (N, T, D)
    v: np.ndarray  # (N, T, E)
    b: np.ndarray  # (N, T), ones for the decay scan
    gate: np.ndarray  # (N, T, 1 or D)
    kept: np.ndarray  # (N, segments, D, E), the state before each segment
    scale: float
    erase: bool
    lead: tuple
    shapes: dict  # name -> shape of each argument that was given
    dtypes: dict


@jit
def _token(state, u, q, k, v, b, gate, at, erase, width, depth, channels):
    """S_{t-1} -> S_t in place; u = v - S~^T k. ``at`` is the number of the token."""
    one = v.dtype.type(1)
    values = v[at * depth : (at + 1) * depth]
    for e in range(depth):
        u[e] = values[e]
    for d in range(width):
        a = gate[at * channels + d % channels] if channels > 0 else one
        row, key = state[d * depth : (d + 1) * depth], k[at * width + d]
        if erase:
            for e in range(depth):
                x = row[e] * a
                row[e] = x
                u[e] -= x * key
        elif channels > 0:
            for e in range(depth):
                row[e] *= a
    for d in range(width):
        row, key = state[d * depth : (d + 1) * depth], k[at * width + d] * b[at]
        for e in range(depth):
            row[e] += key * u[e]


@jit
def _forward(first, last, q, k, v, b, gate, state, kept, scale, erase, sizes, out):
    tokens, width, depth, channels, segment = sizes
    area, segments = width * depth, (tokens + segment - 1) // segment
    u = np.empty(depth, q.dtype)
    for n in range(first, last):
        s = state[n * area : (n + 1) * area]
        for t in range(tokens):
            if t % segment == 0:
                at = (n * segments + t // segment) * area
                kept[at : at + area] = s
            at = n * tokens + t
            _token(s, u, q, k, v, b, gate, at, erase, width, depth, channels)
            y = out[at * depth : (at + 1) * depth]
            y[:] = 0
            for d in range(width):
                row, factor = s[d * depth : (d + 1) * depth], q[at * width + d] * scale
                for e in range(depth):
                    y[e] += factor * row[e]


@jit
def _dot(x, y, lanes):
    """Sum of x * y, eight partial sums side by side (the compiler may not reorder one sum)."""
    lanes[:] = 0
    whole = x.size - x.size % 8
    for i in range(0, whole, 8):
        xi, yi = x[i : i + 8], y[i : i + 8]
        for j in range(8):
            lanes[j] += xi[j] * yi[j]
    total = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + (
        (lanes[4] + lanes[5]) + (lanes[6] + lanes[7])
    )
    for i in range(whole, x.size):
        total += x[i] * y[i]
    return total


@jit
def _token_backward(g, before, after, u, gu, lanes, q, k, b, gate, dout, at, scale, erase, width,
                    depth, channels, dq, dk, dv, db, dgate):  # fmt: skip
    """One token downwards; g is the gradient of S_t and becomes that of S_{t-1}."""
    one, beta = g.dtype.type(1), b[at]
    dy = dout[at * depth : (at + 1) * depth]
    gu[:] = 0
    for d in range(width):
        row, line = g[d * depth : (d + 1) * depth], after[d * depth : (d + 1) * depth]
        query, key = q[at * width + d] * scale, k[at * width + d]
        dq[at * width + d] = scale * _dot(line, dy, lanes)
        for e in range(depth):
            row[e] += query * dy[e]
            gu[e] += row[e] * key
    db[at] = _dot(gu, u, lanes)
    for e in range(depth):
        gu[e] *= beta
        dv[at * depth + e] = gu[e]
    for d in range(width):
        row, line = g[d * depth : (d + 1) * depth], before[d * depth : (d + 1) * depth]
        a = gate[at * channels + d % channels] if channels > 0 else one
        slope = beta * _dot(row, u, lanes)
        if erase:
            key = k[at * width + d]
            slope -= a * _dot(line, gu, lanes)
            for e in range(depth):
                row[e] -= key * gu[e]
        dk[at * width + d] = slope
        if channels > 0:
            dgate[at * channels + d % channels] += _dot(row, line, lanes)
            for e in range(depth):
                row[e] *= a


@jit
def _backward(first, last, q, k, v, b, gate, kept, dout, dstate, scale, erase, sizes, dq, dk, dv,
              db, dgate):  # fmt: skip
    tokens, width, depth, channels, segment = sizes
    area, segments = width * depth, (tokens + segment - 1) // segment
    kind = q.dtype
    states, us = np.empty((segment + 1) * area, kind), np.empty(segment * depth, kind)
    gu, lanes = np.empty(depth, kind), np.empty(8, kind)
    for n in range(first, last):
        g = dstate[n * area : (n + 1) * area]
        for part in range(segments - 1, -1, -1):
            start, end = part * segment, min(tokens, (part + 1) * segment)
            at = (n * segments + part) * area
            states[:area] = kept[at : at + area]
            for i in range(end - start):
                s = states[(i + 1) * area : (i + 2) * area]
                s[:] = states[i * area : (i + 1) * area]
                _token(s, us[i * depth : (i + 1) * depth], q, k, v, b, gate,
                       n * tokens + start + i, erase, width, depth, channels)  # fmt: skip
            for i in range(end - start - 1, -1, -1):
                _token_backward(
                    g, states[i * area : (i + 1) * area], states[(i + 1) * area : (i + 2) * area],
                    us[i * depth : (i + 1) * depth], gu, lanes, q, k, b, gate, dout,
                    n * tokens + start + i, scale, erase, width, depth, channels, dq, dk, dv, db,
                    dgate,
                )  # fmt: skip


def _spread(name, x, lead, inner, dtype, letters):
    """Broadcast to (*lead, *inner), flatten the leading axes; always a fresh or native array."""
    expect(name, x, lead + inner, letters)
    return prepare(np.broadcast_to(x, lead + inner).reshape(math.prod(lead), *inner), dtype)


def _run(q, k, v, b, gate, state, scale, erase, names):
    """The checks and the forward of both scans."""
    dtype = float_dtype(q=q, k=k, v=v, b=b, **{names: gate}, state=state)
    check.number("scale", scale)
    if min(q.ndim, k.ndim, v.ndim) < 2:
        raise ShapeError(f"q has shape {q.shape}, expected (..., H, T, D)")
    (tokens, width), depth = q.shape[-2:], v.shape[-1]
    if k.shape[-2:] != (tokens, width) or v.shape[-2] != tokens:
        raise ShapeError(
            f"k has shape {k.shape} and v {v.shape}, expected (..., H, T, D) and (..., H, T, E) "
            f"for q of shape {q.shape}"
        )
    lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    given = {"q": q, "k": k, "v": v, "b": b, names: gate, "state": state}
    given = {name: x for name, x in given.items() if x is not None}
    channels = 0
    if gate is not None:
        if gate.ndim not in (q.ndim - 1, q.ndim):
            raise ShapeError(f"{names} has shape {gate.shape}, expected (..., H, T) or (..., T, D)")
        channels = width if gate.ndim == q.ndim else 1
        gate = gate if gate.ndim == q.ndim else gate[..., None]
    q = _spread("q", q, lead, (tokens, width), dtype, "(..., H, T, D)")
    k = _spread("k", k, lead, (tokens, width), dtype, "(..., H, T, D)")
    v = _spread("v", v, lead, (tokens, depth), dtype, "(..., H, T, E)")
    one = np.ones((1,) * 2, dtype)
    b = one[0] if b is None else b
    b = _spread("b", b, lead, (tokens,), dtype, "(..., H, T)")
    gate = _spread(names, one if gate is None else gate, lead, (tokens, max(channels, 1)), dtype,
                   "(..., H, T) or (..., H, T, D)")  # fmt: skip
    start = np.zeros((width, depth), dtype) if state is None else state
    start = np.array(_spread("state", start, lead, (width, depth), dtype, "(..., H, D, E)"))

    scale = dtype.type(1.0 / math.sqrt(width) if scale is None else scale)
    segment = max(16, math.isqrt(max(tokens, 1)))
    heads, segments = q.shape[0], -(-tokens // segment)
    kept, out = np.empty((heads, segments, width, depth), dtype), np.empty_like(v)
    sizes = (tokens, width, depth, channels, segment)
    threads.share(
        _forward, heads, 6 * out.size * width, q.ravel(), k.ravel(), v.ravel(), b.ravel(),
        gate.ravel(), start.ravel(), kept.ravel(), scale, erase, sizes, out.ravel(),
    )  # fmt: skip
    cache = Cache(q, k, v, b, gate, kept, scale, erase, lead,
                  {name: x.shape for name, x in given.items()},
                  {name: x.dtype for name, x in given.items()})  # fmt: skip
    return out.reshape(*lead, tokens, depth), start.reshape(*lead, width, depth), cache


def _gradients(dout, dstate, cache, names):
    """The backward of both scans."""
    c = cache
    (heads, tokens, width), depth, dtype = c.q.shape, c.v.shape[-1], c.q.dtype
    for name, x, inner in (("dout", dout, (tokens, depth)), ("dstate", dstate, (width, depth))):
        if x is not None and x.shape != (*c.lead, *inner):
            raise ShapeError(f"{name} has shape {x.shape}, expected {(*c.lead, *inner)}")
    dout = np.zeros_like(c.v) if dout is None else prepare(dout, dtype)
    g = np.zeros((heads, width, depth), dtype)
    if dstate is not None:
        g[...] = dstate.reshape(g.shape)
    channels = c.gate.shape[-1] if names in c.shapes else 0
    segment = max(16, math.isqrt(max(tokens, 1)))
    dq, dk, dv = np.empty_like(c.q), np.empty_like(c.k), np.empty_like(c.v)
    db, dgate = np.empty_like(c.b), np.zeros_like(c.gate)
    threads.share(
        _backward, heads, 16 * dv.size * width, c.q.ravel(), c.k.ravel(), c.v.ravel(),
        c.b.ravel(), c.gate.ravel(), c.kept.ravel(), dout.ravel(), g.ravel(), c.scale, c.erase,
        (tokens, width, depth, channels, segment), dq.ravel(), dk.ravel(), dv.ravel(), db.ravel(),
        dgate.ravel(),
    )  # fmt: skip
    if names in c.shapes and len(c.shapes[names]) == len(c.shapes["q"]) - 1:
        dgate = dgate[..., 0]
    result = {"q": dq, "k": dk, "v": dv, "b": db, names: dgate, "state": g}
    return {
        name: sum_to(dx.reshape(*c.lead, *dx.shape[1:]), c.shapes[name]).astype(
            c.dtypes[name], copy=False
        )
        for name, dx in result.items()
        if name in c.shapes
    }


def delta_forward(q, k, v, b, gate=None, state=None, *, scale=None):
    """The (gated) delta rule, one token after another.

    Parameters
    ----------
    q, k, v : ndarray, shapes (..., H, T, D), (..., H, T, D), (..., H, T, E)
        Queries, keys (normalised by the caller), values.
    b : ndarray, shape (..., H, T)
        Strength of each write.
    gate : ndarray, shape (..., H, T) or (..., H, T, D), optional
        Decay of the state before each write, one a token or one a key channel.
    state : ndarray, shape (..., H, D, E), optional
        State before the first token.
    scale : float, optional
        Factor of the queries; 1/sqrt(D) by default.

    Returns
    -------
    out : ndarray, shape (..., H, T, E)
    state : ndarray, shape (..., H, D, E)
        State after the last token.
    cache : Cache
        For :func:`delta_backward`.
    """
    return _run(q, k, v, b, gate, state, scale, True, "gate")


def delta_backward(dout, dstate, cache):
    """Gradients of :func:`delta_forward`; ``dout`` or ``dstate`` may be None (no gradient there).

    Returns
    -------
    dict
        Under "q", "k", "v", "b" and, when they were given, "gate" and "state".
    """
    return _gradients(dout, dstate, cache, "gate")


def decay_forward(q, k, v, decay=None, state=None, *, scale=None):
    """Linear attention with decay: S_t = a_t S_{t-1} + k_t v_t^T, out_t = c S_t^T q_t.

    Parameters
    ----------
    q, k, v : ndarray, shapes (..., H, T, D), (..., H, T, D), (..., H, T, E)
        Queries, keys, values (features already applied).
    decay : ndarray, shape (..., H, T) or (..., H, T, D), optional
        a_t itself, not its logarithm.
    state, scale
        As in :func:`delta_forward`.

    Returns
    -------
    out, state, cache
        As in :func:`delta_forward`.
    """
    return _run(q, k, v, None, decay, state, scale, False, "decay")


def decay_backward(dout, dstate, cache):
    """Gradients of :func:`decay_forward`: "q", "k", "v" and, when given, "decay" and "state"."""
    return _gradients(dout, dstate, cache, "decay")
