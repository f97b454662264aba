"""The dense steps of attention, each with its backward: scores, softcap, softmax, mix.

    z = c q k^T     z = cap tanh(z / cap)     p = softmax_s(z)     out = p v

A gradient is named after what it is the gradient of: ``dz`` belongs to ``z``.
"""

import math

import numpy as np


def sum_to(dx, shape):
    """Sum a gradient back to the shape its input had before NumPy broadcast it.

    Parameters
    ----------
    dx : ndarray
        Gradient in the broadcast shape.
    shape : tuple of int
        Shape of the input.

    Returns
    -------
    ndarray, shape ``shape``
    """
    extra = dx.ndim - len(shape)
    if extra:
        dx = np.sum(dx, axis=tuple(range(extra)))
    wide = tuple(i for i, n in enumerate(shape) if n == 1 and dx.shape[i] != 1)
    return np.sum(dx, axis=wide, keepdims=True) if wide else dx


def default_scale(width, scale=None):
    """The score scale, 1/sqrt(D) by default; a Python number, so that float32 stays float32."""
    return 1.0 / math.sqrt(width) if scale is None else float(scale)


def scores_forward(q, k, scale):
    """z = scale * q k^T: shapes (..., T, D), (..., S, D) -> (..., T, S)."""
    return (q @ np.swapaxes(k, -1, -2)) * scale


def scores_backward(dz, q, k, scale):
    """dq = scale dz k, dk = scale dz^T q, summed back to the shapes of q and k."""
    dq = (dz @ k) * scale
    dk = (np.swapaxes(dz, -1, -2) @ q) * scale
    return sum_to(dq, q.shape), sum_to(dk, k.shape)


def softcap_forward(z, softcap):
    """z = cap tanh(z / cap): scores stay inside (-cap, cap). None is the identity."""
    return z if softcap is None else softcap * np.tanh(z / softcap)


def softcap_backward(dz, capped, softcap):
    """d/dz of cap tanh(z / cap) is 1 - tanh^2, written with the capped scores."""
    return dz if softcap is None else dz * (1.0 - np.square(capped / softcap))


def row_max(z):
    """The largest score of every row, 0 for a row of -inf or without keys; shape (..., T, 1)."""
    if z.shape[-1] == 0:
        return np.zeros_like(z, shape=(*z.shape[:-1], 1))
    top = np.max(z, axis=-1, keepdims=True)
    return np.where(np.isfinite(top), top, 0.0)


def softmax_forward(z, live, empty_row="zero"):
    """Softmax over the visible keys of every row.

    Parameters
    ----------
    z : ndarray, shape (..., T, S)
        Scores, in nats.
    live : bool ndarray, broadcast to (..., T, S)
        True = may attend.
    empty_row : {"zero", "nan", "uniform", "raise"}
        A row that the mask leaves without keys gets weights 0, or 1/S under "uniform"; one whose
        scores are all -inf gets weights 0.

    Returns
    -------
    p : ndarray, shape (..., T, S)
        Weights; each row sums to 1, or to 0 when it has no key.
    lse : ndarray, shape (..., T)
        Log of the sum of exponentials, in nats; -inf for a row without keys.
    """
    z = np.where(live, z, -np.inf)
    top = row_max(z)
    e = np.exp(z - top)
    total = np.sum(e, axis=-1, keepdims=True)
    empty = total == 0
    total = np.where(empty, 1.0, total)
    p = np.where(live, e / total, 0.0)
    if empty_row == "uniform":
        p = np.where(np.any(live, axis=-1, keepdims=True), p, 1.0 / max(z.shape[-1], 1))
    lse = np.where(empty, -np.inf, top + np.log(total))
    return p, lse[..., 0]


def softmax_backward(dp, p, live):
    """dz = p (dp - sum_s p dp); masked entries and rows without keys get exactly 0."""
    dz = p * (dp - np.sum(p * dp, axis=-1, keepdims=True))
    return np.where(live, dz, 0.0)


def mix_forward(p, v):
    """out = p v: shapes (..., T, S), (..., S, E) -> (..., T, E)."""
    return p @ v


def mix_backward(dout, p, v):
    """dp = dout v^T, dv = p^T dout, dv summed back to the shape of v."""
    dp = dout @ np.swapaxes(v, -1, -2)
    dv = np.swapaxes(p, -1, -2) @ dout
    return dp, sum_to(dv, v.shape)
