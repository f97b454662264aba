"""Plain NumPy formulas in float64 that the kernels are compared with; they share no code with them.

Also the distance: largest difference in units of eps times the size of what was summed.
"""

import numpy as np


def distance(got, truth, dtype, size=None):
    """Largest |got - truth| in eps of ``dtype`` times ``size`` (the largest truth, at least 1)."""
    size = max(1.0, float(np.max(np.abs(truth), initial=0.0))) if size is None else size
    assert got.shape == truth.shape
    return float(np.max(np.abs(got.astype(np.float64) - truth), initial=0.0)) / (
        np.finfo(dtype).eps * size
    )


def summed(x, shape):
    """Sum a gradient over the axes its argument broadcast over."""
    x = x.sum(axis=tuple(range(x.ndim - len(shape))))
    for axis, n in enumerate(shape):
        if n == 1:
            x = x.sum(axis=axis, keepdims=True)
    return x


def folded(x, share):
    """Sum over the query heads that share a key head."""
    return x.reshape(*x.shape[:-3], x.shape[-3] // share, share, *x.shape[-2:]).sum(axis=-3)


def dense(q, k, v, dout, mask=None, causal=False, align="lower_right", scale=1.0, softcap=None,
          bias=None, dlse=None):  # fmt: skip
    """Attention with the full matrix of scores: out, lse and the four gradients."""
    shapes = [x.shape for x in (q, k, v)]
    q, k, v, dout = (x.astype(np.float64) for x in (q, k, v, dout))
    share = q.shape[-3] // k.shape[-3]
    k, v = np.repeat(k, share, axis=-3), np.repeat(v, share, axis=-3)
    z = scale * np.einsum("...td,...sd->...ts", q, k)
    steep = 1.0
    if softcap is not None:
        steep = 1.0 / np.cosh(z / softcap) ** 2
        z = softcap * np.tanh(z / softcap)
    z = z if bias is None else z + bias
    queries, keys = z.shape[-2:]
    live = np.ones(z.shape, bool) if mask is None else np.broadcast_to(mask, z.shape).copy()
    if causal:
        live &= np.tri(queries, keys, keys - queries if align == "lower_right" else 0, dtype=bool)
    weight = np.where(live, np.exp(np.where(live, z, 0.0)), 0.0)
    total = weight.sum(axis=-1, keepdims=True)
    p = np.divide(weight, total, out=np.zeros_like(weight), where=total > 0)
    lse = np.log(total, out=np.full_like(total, -np.inf), where=total > 0)[..., 0]
    out = np.einsum("...ts,...se->...te", p, v)
    dp = np.einsum("...te,...se->...ts", dout, v)
    dz = p * (dp - (p * dp).sum(axis=-1, keepdims=True))
    if dlse is not None:
        dz = dz + p * dlse[..., None]
    gradients = {} if bias is None else {"bias": summed(dz, bias.shape)}
    dz = dz * steep
    dk = folded(scale * np.einsum("...ts,...td->...sd", dz, q), share)
    dv = folded(np.einsum("...ts,...te->...se", p, dout), share)
    dq = scale * np.einsum("...ts,...sd->...td", dz, k)
    gradients |= {n: summed(x, s) for n, x, s in zip("qkv", (dq, dk, dv), shapes, strict=True)}
    return out, lse, gradients


def scan(q, k, v, b=None, gate=None, state=None, scale=1.0, erase=True):
    """One head, one token at a time, in any dtype (complex too): outputs and the last state."""
    tokens, width = q.shape
    state = np.zeros((width, v.shape[1])) if state is None else state
    out = []
    for t in range(tokens):
        a = 1.0 if gate is None else gate[t]
        state = np.reshape(a, (-1, 1)) * state
        u = v[t] - (k[t] @ state if erase else 0.0)
        state = state + (1.0 if b is None else b[t]) * np.outer(k[t], u)
        out.append(scale * (q[t] @ state))
    return np.array(out), state


def sparsemax(z, live):
    """One row at a time by sorting."""
    p = np.zeros_like(z)
    for at in np.ndindex(z.shape[:-1]):
        keep = live[at]
        if keep.any():
            top = z[at][keep].max()
            x = np.sort(z[at][keep].astype(np.longdouble) - top)[::-1]
            thresholds = (np.cumsum(x) - 1.0) / np.arange(1, x.size + 1)
            tau = thresholds[np.flatnonzero(x > thresholds)[-1]]
            p[at] = np.where(keep, np.maximum(z[at] - top - tau, 0.0), 0.0)
    return p


def entmax(z, alpha, live):
    """One row at a time by bisection on tau, in the dtype of z (extended precision)."""
    p, rate = np.zeros_like(z), z.dtype.type(alpha) - 1
    for at in np.ndindex(z.shape[:-1]):
        keep = live[at]
        if keep.any():
            x = rate * (z[at][keep] - z[at][keep].max())
            low, high = z.dtype.type(-1), z.dtype.type(0)
            for _ in range(80):
                tau = (low + high) / 2
                total = np.sum(np.maximum(x - tau, 0) ** (1 / rate))
                low, high = (tau, high) if total >= 1 else (low, tau)
            w = np.maximum(x - low, 0) ** (1 / rate)
            p[at][keep] = w / w.sum()
    return p
