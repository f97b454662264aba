r"""Recurrences over a state S of shape (D, E): the decay scan and the delta rule.

    decay:  S~ = a_t S_{t-1},  S_t = S~ + k_t v_t^T
    delta:  S~ = a_t S_{t-1},  u_t = v_t - S~^T k_t,  S_t = S~ + b_t k_t u_t^T
    both:   out_t = c S_t^T q_t

a_t is 1, one number a token, or one number a token and key channel. One kernel does both: without
the erasing term the delta rule with b = 1 is the decay scan.

Loop order: one item a head of a sequence; tokens one after another; inside a token the rows d of
the state, and in the innermost loop its E columns; two passes over the state a token. Traffic: the
state (D E numbers, 16 KB for 64 x 64 in float32) stays in the first-level cache, q, k, v, out pass
through once.

Backward, t downwards, G the gradient of S_t (equations of the delta rule; without erasing the
terms in brackets are absent):

    dq = c S_t dout,  G += c q dout^T,  g = G^T k,  db = g . u,  du = b g,  dv = du
    dk = b G u [- S~ du],  G [-= k du^T],  da = rowsum(G * S_{t-1}),  G <- a G

It needs the states again. The forward keeps every P-th one, P about sqrt(T); the backward walks
over segments of P tokens from the last to the first, makes the segment's states again and keeps
them while it is there. Memory: T / P states a head in the cache and P + 2 states a thread, that is
O(sqrt(T) D E) instead of O(T D E); one extra forward in time. Here the states lie as (E, D), so
that all sums but two run down the rows and the innermost loop is over D.
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
def _decay_and_read(state, u, k, a, width, depth):
    """S~ = a S in place and u -= S~^T k."""
    for d in range(width):
        row, factor, key = state[d * depth : (d + 1) * depth], a[d], k[d]
        for e in range(depth):
            x = row[e] * factor
            row[e] = x
            u[e] -= x * key


@jit
def _write_and_read(state, u, y, k, q, beta, scale, width, depth):
    """S = S~ + b k u^T in place and y += c S^T q."""
    for d in range(width):
        row, key, query = state[d * depth : (d + 1) * depth], k[d] * beta, q[d] * scale
        for e in range(depth):
            x = row[e] + key * u[e]
            row[e] = x
            y[e] += query * x


@jit
def _spread_gate(a, gate, at, channels, width):
    """The decay of every key channel at one token."""
    one = a.dtype.type(1)
    for d in range(width):
        a[d] = gate[at * channels + (d if channels > 1 else 0)] if channels > 0 else one


@jit
def _forward(first, last, q, k, v, b, gate, state, kept, scale, erase, sizes, out):
    tokens, width, depth, channels, segment = sizes
    area, segments = width * depth, (tokens + segment - 1) // segment
    u, nowhere = np.empty(depth, q.dtype), np.empty(depth, q.dtype)
    a = np.empty(width, q.dtype)
    for n in range(first, last):
        s = state[n * area : (n + 1) * area]
        for t in range(tokens):
            if t % segment == 0:
                at = (n * segments + t // segment) * area
                kept[at : at + area] = s
            at = n * tokens + t
            u[:] = v[at * depth : (at + 1) * depth]
            y, key = out[at * depth : (at + 1) * depth], k[at * width : (at + 1) * width]
            y[:] = 0
            if erase or channels > 0:
                _spread_gate(a, gate, at, channels, width)
                _decay_and_read(s, u if erase else nowhere, key, a, width, depth)
            _write_and_read(s, u, y, key, q[at * width : (at + 1) * width], b[at], scale, width,
                            depth)  # fmt: skip


@jit
def _dot(x, y, lanes):
    """Sum of x * y: sixteen sums side by side (the compiler may not reorder a single one)."""
    lanes[:] = 0
    whole = x.size - x.size % 16
    for i in range(0, whole, 16):
        xi, yi = x[i : i + 16], y[i : i + 16]
        for j in range(16):
            lanes[j] += xi[j] * yi[j]
    for j in range(8):
        lanes[j] += lanes[j + 8]
    for j in range(4):
        lanes[j] += lanes[j + 4]
    total = (lanes[0] + lanes[2]) + (lanes[1] + lanes[3])
    for i in range(whole, x.size):
        total += x[i] * y[i]
    return total


@jit
def _step_again(before, after, u, k, v, beta, a, erase, lanes, width, depth):
    """S_t from S_{t-1}, both as (E, D); u = v - S~^T k."""
    for e in range(depth):
        old, new = before[e * width : (e + 1) * width], after[e * width : (e + 1) * width]
        for d in range(width):
            new[d] = old[d] * a[d]
        u[e] = v[e] - _dot(new, k, lanes) if erase else v[e]
        factor = beta * u[e]
        for d in range(width):
            new[d] += factor * k[d]


@jit
def _token_backward(g, before, after, u, gu, lanes, q, k, beta, a, dout, scale, erase, width,
                    depth, dq, dk, da):  # fmt: skip
    """One token downwards; g, the gradient of S_t as (E, D), becomes that of S_{t-1}."""
    for e in range(depth):
        row, line = g[e * width : (e + 1) * width], after[e * width : (e + 1) * width]
        factor = scale * dout[e]
        for d in range(width):
            row[d] += factor * q[d]
            dq[d] += factor * line[d]
        gu[e] = _dot(row, k, lanes)
    for e in range(depth):
        row, line = g[e * width : (e + 1) * width], before[e * width : (e + 1) * width]
        gain, loss = beta * u[e], beta * gu[e]
        loss = loss if erase else loss * 0
        # two loops: the compiler gives up on one with too many arrays that might overlap
        for d in range(width):
            dk[d] += gain * row[d] - loss * (a[d] * line[d])
        for d in range(width):
            x = row[d] - loss * k[d]
            da[d] += x * line[d]
            row[d] = x * a[d]


@jit
def _turned(source, rows, columns, target):
    """target (columns, rows) = source (rows, columns) transposed."""
    for i in range(columns):
        for j in range(rows):
            target[i * rows + j] = source[j * columns + i]


@jit
def _backward(first, last, q, k, v, b, gate, kept, dout, dstate, scale, erase, sizes, dq, dk, dv,
              db, dgate):  # fmt: skip
    tokens, width, depth, channels, segment = sizes
    area, segments = width * depth, (tokens + segment - 1) // segment
    kind = q.dtype
    states, us = np.empty((segment + 1) * area, kind), np.empty(segment * depth, kind)
    gu, lanes, g = np.empty(depth, kind), np.empty(16, kind), np.empty(area, kind)
    a, da = np.empty(width, kind), np.empty(width, kind)
    for n in range(first, last):
        _turned(dstate[n * area : (n + 1) * area], width, depth, g)
        for part in range(segments - 1, -1, -1):
            start, end = n * tokens + part * segment, n * tokens + min(tokens, (part + 1) * segment)
            at = (n * segments + part) * area
            _turned(kept[at : at + area], width, depth, states[:area])
            for t in range(start, end):
                i = t - start
                _spread_gate(a, gate, t, channels, width)
                _step_again(states[i * area : (i + 1) * area],
                            states[(i + 1) * area : (i + 2) * area],
                            us[i * depth : (i + 1) * depth], k[t * width : (t + 1) * width],
                            v[t * depth : (t + 1) * depth], b[t], a, erase, lanes, width,
                            depth)  # fmt: skip
            for t in range(end - 1, start - 1, -1):
                i = t - start
                u, dkt, dqt = us[i * depth : (i + 1) * depth], dk[t * width :], dq[t * width :]
                _spread_gate(a, gate, t, channels, width)
                da[:], dkt[:width], dqt[:width] = 0, 0, 0
                _token_backward(
                    g, states[i * area : (i + 1) * area], states[(i + 1) * area : (i + 2) * area],
                    u, gu, lanes, q[t * width : (t + 1) * width], k[t * width : (t + 1) * width],
                    b[t], a, dout[t * depth : (t + 1) * depth], scale, erase, width, depth, dqt,
                    dkt, da,
                )  # fmt: skip
                db[t] = _dot(gu, u, lanes)
                for e in range(depth):
                    dv[t * depth + e] = b[t] * gu[e]
                for d in range(width if channels > 0 else 0):
                    dgate[t * channels + (d if channels > 1 else 0)] += da[d]
        _turned(g, depth, width, dstate[n * area : (n + 1) * area])


def _spread(name, x, lead, inner, dtype, letters):
    """Broadcast to (*lead, *inner), flatten the leading axes; a copy only where it must be."""
    expect(name, x, lead + inner, letters)
    if x.shape != lead + inner:
        x = np.broadcast_to(x, lead + inner)
    return prepare(x.reshape(math.prod(lead), *inner), dtype)


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
