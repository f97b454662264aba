r"""Recurrences over a state S of shape (D, E): the decay scan and the delta rule.

    decay:  S~ = a_t S_{t-1},  S_t = S~ + k_t v_t^T
    delta:  S~ = a_t S_{t-1},  u_t = v_t - S~^T k_t,  S_t = S~ + b_t k_t u_t^T
    both:   out_t = c S_t^T q_t

a_t is 1, one number a token, or one number a token and key channel. One kernel does both: without
the erasing term the delta rule with b = 1 is the decay scan.

Forward: one item is a head of a sequence and a block of 64 columns of the state, which do not
depend on one another. Loop order: tokens one after another; inside a token the state four rows at a
time, and in the innermost loop the 64 columns. One pass over the state a token: the pass that
writes token t and reads it also decays the state for token t + 1 and compares it with k_{t+1}, so
that every number is loaded and stored once a token, with eight operations in between. Traffic: the
block (64 D numbers, 16 KB for D = 64 in float32) stays in the first-level cache, q, k, v, out pass
through once.

Backward, t downwards, G the gradient of S_t (equations of the delta rule; without erasing the
terms in brackets are absent):

    dq = c S_t dout,  G += c q dout^T,  g = G^T k,  db = g . u,  du = b g,  dv = du
    dk = b G u [- S~ du],  G [-= k du^T],  da = rowsum(G * S_{t-1}),  G <- a G

It needs the states again. The forward keeps every P-th one, P about sqrt(T); the backward walks
over segments of P tokens from the last to the first, makes the segment's states again and keeps
them while it is there. Memory: T / P states a head in the cache and P + 2 blocks of states a
thread, that is O(sqrt(T) D E) instead of O(T D E); one extra forward in time. One item is a head;
its blocks of columns follow one another, because dq, dk, db and da are sums over all of them.
"""

import math
from typing import NamedTuple

import numpy as np

from attention_ref.core import check
from attention_ref.core.errors import ShapeError
from attention_ref.kernels.door import expect, float_dtype, prepare, sum_to
from attention_ref.kernels.numba import jit, sums, threads


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


COLUMNS = 64  # of the state, the lanes of the forward
# Places inside the hot loops are unsigned: the compiler then knows that none counts from the end.
# (Slices say that too, but a slice counts its references, which costs as much as the loop.)
WIDE = np.uintp(COLUMNS)


@jit
def _delta_pass(s, w, k, q, a, after):
    """Over the state once: write u at k, read with q, decay by a, compare with the key after.

    w holds u, the output and what will be the next u, one behind the other; rows go four by four.
    """
    for d in range(0, k.size, 4):
        k0, k1, k2, k3 = k[d], k[d + 1], k[d + 2], k[d + 3]
        q0, q1, q2, q3 = q[d], q[d + 1], q[d + 2], q[d + 3]
        a0, a1, a2, a3 = a[d], a[d + 1], a[d + 2], a[d + 3]
        n0, n1, n2, n3 = after[d], after[d + 1], after[d + 2], after[d + 3]
        r0 = np.uintp(d) * WIDE
        r1, r2, r3 = r0 + WIDE, r0 + WIDE + WIDE, r0 + WIDE + WIDE + WIDE
        for x in range(WIDE):
            u, y, z = w[x], w[WIDE + x], w[WIDE + WIDE + x]
            s0, s1 = s[r0 + x] + k0 * u, s[r1 + x] + k1 * u
            s2, s3 = s[r2 + x] + k2 * u, s[r3 + x] + k3 * u
            y += q0 * s0
            y += q1 * s1
            y += q2 * s2
            y += q3 * s3
            s0, s1, s2, s3 = a0 * s0, a1 * s1, a2 * s2, a3 * s3
            z -= n0 * s0
            z -= n1 * s1
            z -= n2 * s2
            z -= n3 * s3
            s[r0 + x], s[r1 + x], s[r2 + x], s[r3 + x] = s0, s1, s2, s3
            w[WIDE + x], w[WIDE + WIDE + x] = y, z


@jit
def _decay_pass(s, w, k, q, a):
    """The same without erasing: decay by a, write v at k, read with q; w holds v and the output."""
    for d in range(0, k.size, 4):
        k0, k1, k2, k3 = k[d], k[d + 1], k[d + 2], k[d + 3]
        q0, q1, q2, q3 = q[d], q[d + 1], q[d + 2], q[d + 3]
        a0, a1, a2, a3 = a[d], a[d + 1], a[d + 2], a[d + 3]
        r0 = np.uintp(d) * WIDE
        r1, r2, r3 = r0 + WIDE, r0 + WIDE + WIDE, r0 + WIDE + WIDE + WIDE
        for x in range(WIDE):
            v, y = w[x], w[WIDE + x]
            s0, s1 = a0 * s[r0 + x] + k0 * v, a1 * s[r1 + x] + k1 * v
            s2, s3 = a2 * s[r2 + x] + k2 * v, a3 * s[r3 + x] + k3 * v
            y += q0 * s0
            y += q1 * s1
            y += q2 * s2
            w[WIDE + x] = y + q3 * s3
            s[r0 + x], s[r1 + x], s[r2 + x], s[r3 + x] = s0, s1, s2, s3


@jit
def _scaled(target, source, start, width, factor):
    at = np.uintp(start)
    for d in range(np.uintp(width)):
        target[d] = source[at + d] * factor


@jit
def _columns(w, place, source, start, columns):
    """A row of values into a line of w; what lies behind it stays zero."""
    at, line = np.uintp(start), np.uintp(place) * WIDE
    for x in range(np.uintp(columns)):
        w[line + x] = source[at + x]


@jit
def _gates(a, gate, at, channels, width):
    """The decay of every key channel at one token; without a gate they stay what they are."""
    if channels == 1:
        one = gate[at]
        for d in range(np.uintp(width)):
            a[d] = one
    elif channels > 1:
        _scaled(a, gate, at * channels, width, a.dtype.type(1))


@jit
def _move(target, start, w, place, columns):
    """A line of w into a row of the outputs."""
    at, line = np.uintp(start), np.uintp(place) * WIDE
    for x in range(np.uintp(columns)):
        target[at + x] = w[line + x]


@jit
def _line(w, place, other):
    """A line of w becomes another, or zero (other = -1)."""
    line, source, zero = np.uintp(place) * WIDE, np.uintp(max(other, 0)) * WIDE, w.dtype.type(0)
    for x in range(WIDE):
        w[line + x] = w[source + x] if other >= 0 else zero


@jit
def _forward(first, last, q, k, v, b, gate, state, kept, scale, erase, sizes, out):
    tokens, width, depth, channels, segment = sizes
    blocks, segments = (depth + COLUMNS - 1) // COLUMNS, (tokens + segment - 1) // segment
    kind, padded = q.dtype, (width + 3) // 4 * 4
    one = kind.type(1)
    s, w = np.empty(padded * COLUMNS, kind), np.zeros(3 * COLUMNS, kind)
    key, query, ones = np.zeros(padded, kind), np.zeros(padded, kind), np.ones(padded, kind)
    a, after, none = np.ones(padded, kind), np.zeros(padded, kind), np.zeros(padded, kind)
    for item in range(first, last):
        n, e = item // blocks, item % blocks * COLUMNS
        columns = min(COLUMNS, depth - e)
        s[:], w[:] = 0, 0
        for d in range(width):
            _columns(s, d, state, (n * width + d) * depth + e, columns)
        for t in range(tokens):
            at = n * tokens + t
            if t % segment == 0:
                for d in range(width):
                    _move(kept, ((n * segments + t // segment) * width + d) * depth + e, s, d,
                          columns)  # fmt: skip
                if erase:  # decay and compare: nothing is written, nothing read
                    _gates(a, gate, at, channels, width)
                    _scaled(after, k, at * width, width, one)
                    _columns(w, 2, v, at * depth + e, columns)
                    _delta_pass(s, w, none, none, a, after)
            _scaled(key, k, at * width, width, b[at])
            _scaled(query, q, at * width, width, scale)
            _line(w, 1, -1)
            if not erase:
                _gates(a, gate, at, channels, width)
                _columns(w, 0, v, at * depth + e, columns)
                _decay_pass(s, w, key, query, a)
            else:
                _line(w, 0, 2)
                if (t + 1) % segment == 0 or t + 1 == tokens:
                    _delta_pass(s, w, key, query, ones, none)
                else:
                    _gates(a, gate, at + 1, channels, width)
                    _scaled(after, k, (at + 1) * width, width, one)
                    _columns(w, 2, v, (at + 1) * depth + e, columns)
                    _delta_pass(s, w, key, query, a, after)
            _move(out, at * depth + e, w, 1, columns)
        for d in range(width):
            _move(state, (n * width + d) * depth + e, s, d, columns)


@sums
def _answer(u, states, i, k, t, a, width, size):
    """u -= S~^T k, where S~ = a S and S is the state i of the segment."""
    for d in range(width):
        row, key = np.uintp(i) * size + np.uintp(d) * WIDE, k[t * width + d] * a[d]
        for x in range(WIDE):
            u[x] -= key * states[row + x]


@sums
def _step_again(u, states, i, k, t, beta, a, width, size):
    """State i + 1 of the segment: a S + b k u^T."""
    for d in range(width):
        old = np.uintp(i) * size + np.uintp(d) * WIDE
        new, key, factor = old + size, k[t * width + d] * beta, a[d]
        for x in range(WIDE):
            states[new + x] = factor * states[old + x] + key * u[x]


@sums
def _read_backward(g, states, i, q, k, t, y, gu, scale, width, size, dq):
    """dq += c S dout,  G += c q dout^T,  g = G^T k; y holds dout."""
    gu[:] = 0
    for d in range(width):
        row, query, key = np.uintp(d) * WIDE, q[t * width + d] * scale, k[t * width + d]
        line = np.uintp(i + 1) * size + row
        total = y.dtype.type(0)
        for x in range(WIDE):
            total += states[line + x] * y[x]
            grown = g[row + x] + query * y[x]
            g[row + x] = grown
            gu[x] += grown * key
        dq[t * width + d] += scale * total


@sums
def _write_backward(g, states, i, u, du, k, t, beta, a, width, size, dk, da):
    """dk += b G u - S~ du,  G -= k du^T,  da = rowsum(G * S),  G <- a G."""
    for d in range(width):
        row, key, factor = np.uintp(d) * WIDE, k[t * width + d], a[d]
        line = np.uintp(i) * size + row
        gained, lost, total = u.dtype.type(0), u.dtype.type(0), u.dtype.type(0)
        for x in range(WIDE):
            old, grown = states[line + x], g[row + x]
            gained += grown * u[x]
            lost += old * du[x]
            left = grown - key * du[x]
            total += left * old
            g[row + x] = left * factor
        dk[t * width + d] += beta * gained - factor * lost
        da[d] = total


@jit
def _backward(first, last, q, k, v, b, gate, kept, dout, dstate, scale, erase, sizes, dq, dk, dv,
              db, dgate):  # fmt: skip
    tokens, width, depth, channels, segment = sizes
    segments, kind = (tokens + segment - 1) // segment, q.dtype
    size = np.uintp(width) * WIDE
    states = np.empty((segment + 1) * width * COLUMNS, kind)
    us, u, y = np.empty(segment * COLUMNS, kind), np.zeros(COLUMNS, kind), np.zeros(COLUMNS, kind)
    g, gu, du = np.empty(width * COLUMNS, kind), np.empty(COLUMNS, kind), np.zeros(COLUMNS, kind)
    a, da = np.ones(width, kind), np.empty(width, kind)
    for n in range(first, last):
        dq[n * tokens * width : (n + 1) * tokens * width] = 0
        dk[n * tokens * width : (n + 1) * tokens * width] = 0
        db[n * tokens : (n + 1) * tokens] = 0
        for e in range(0, depth, COLUMNS):
            columns = min(COLUMNS, depth - e)
            states[:], g[:], u[:], y[:] = 0, 0, 0, 0
            for d in range(width):
                _columns(g, d, dstate, (n * width + d) * depth + e, columns)
            for part in range(segments - 1, -1, -1):
                start, end = part * segment, min(tokens, (part + 1) * segment)
                for d in range(width):
                    _columns(states, d, kept, ((n * segments + part) * width + d) * depth + e,
                             columns)  # fmt: skip
                for i in range(end - start):
                    t = n * tokens + start + i
                    _gates(a, gate, t, channels, width)
                    _columns(u, 0, v, t * depth + e, columns)
                    if erase:
                        _answer(u, states, i, k, t, a, width, size)
                    us[i * COLUMNS : (i + 1) * COLUMNS] = u
                    _step_again(u, states, i, k, t, b[t], a, width, size)
                for i in range(end - start - 1, -1, -1):
                    t = n * tokens + start + i
                    _gates(a, gate, t, channels, width)
                    _columns(y, 0, dout, t * depth + e, columns)
                    _read_backward(g, states, i, q, k, t, y, gu, scale, width, size, dq)
                    u[:] = us[i * COLUMNS : (i + 1) * COLUMNS]
                    for x in range(COLUMNS):
                        db[t] += gu[x] * u[x]
                        gu[x] *= b[t]
                        du[x] = gu[x] if erase else 0
                    _move(dv, t * depth + e, gu, 0, columns)
                    _write_backward(g, states, i, u, du, k, t, b[t], a, width, size, dk, da)
                    for d in range(width if channels > 0 else 0):
                        dgate[t * channels + (d if channels > 1 else 0)] += da[d]
            for d in range(width):
                _move(dstate, (n * width + d) * depth + e, g, d, columns)


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
        _forward, heads * -(-depth // COLUMNS), 6 * out.size * width, q.ravel(), k.ravel(),
        v.ravel(), b.ravel(), gate.ravel(), start.ravel(), kept.ravel(), scale, erase, sizes,
        out.ravel(),
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
