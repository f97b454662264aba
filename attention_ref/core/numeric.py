"""Elementary functions that keep every reading of a forward right.

``np.abs``, ``np.linalg.norm``, ``np.var`` lose the imaginary part and with it the complex-step
derivative, silently; ``scipy.special.expit`` refuses complex numbers. These do neither.
"""

import numpy as np


def absolute(x):
    """|x| whose derivative survives the complex step (the sign is taken from the real part)."""
    return np.where(x < 0, -x, x)


def norm(x, axis=-1, keepdims=True):
    """Euclidean norm along an axis: the root of a sum of squares, never of moduli."""
    return np.sqrt(np.sum(np.square(x), axis=axis, keepdims=keepdims))


def logistic(x):
    """1 / (1 + exp(-x)) without overflow at either end."""
    e = np.exp(-absolute(x))
    return np.where(x < 0, e / (1.0 + e), 1.0 / (1.0 + e))


def softplus(x):
    """log(1 + exp(x)) without overflow, small values kept: max(x, 0) + log1p(exp(-|x|))."""
    return np.maximum(x, 0.0) + np.log1p(np.exp(-absolute(x)))


def relu(x):
    """max(x, 0); at the kink the derivative is that of the left side, 0."""
    return np.where(x > 0, x, 0.0)


def scatter(values, index, length, axis=-1):
    """Put ``values`` at ``index`` along an axis of zeros: the functional form of x[index] = values.

    Parameters
    ----------
    values : ndarray, shape (..., K)
        What to place.
    index : int ndarray, shape (..., K)
        Where to, without repetition within a row.
    length : int
        Length of the new axis.

    Returns
    -------
    ndarray, shape (..., length)
    """
    if axis != -1:
        values, index = np.moveaxis(values, axis, -1), np.moveaxis(index, axis, -1)
    place = index[..., :, None] == np.arange(length, like=index)
    out = np.sum(np.where(place, values[..., :, None], 0.0), axis=-2)
    return np.moveaxis(out, -1, axis) if axis != -1 else out
