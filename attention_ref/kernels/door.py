"""The door of every kernel: dtypes, shapes, layout. NumPy and CuPy arrays pass alike."""

import numpy as np

from attention_ref.core.errors import DTypeError, ShapeError


def prepare(x, dtype):
    """A contiguous, aligned, writable array of a native dtype, so that a kernel has one signature
    a dtype; the caller's own array where it already is one."""
    if isinstance(x, np.ndarray):
        return np.require(x, dtype, ["C", "A", "W"])
    return x.astype(dtype, order="C", copy=False)


def float_dtype(**arrays):
    """The one dtype that all given arrays promote to; float32 or float64, or a DTypeError."""
    for name, x in arrays.items():
        if x is None:
            continue
        if not hasattr(x, "__array_function__"):
            raise DTypeError(
                f"{name} is a {type(x).__name__}, expected an array; hint: np.asarray({name})"
            )
        if x.dtype.kind != "f" or x.dtype.itemsize not in (4, 8):
            raise DTypeError(
                f"{name} has dtype {x.dtype}, expected float32 or float64; "
                f"hint: {name}.astype(np.float32)"
            )
    return np.result_type(*(x.dtype.newbyteorder("=") for x in arrays.values() if x is not None))


def expect(name, x, shape, letters):
    """Refuse an array whose shape does not broadcast to ``shape``."""
    try:
        fits = np.broadcast_shapes(x.shape, shape) == tuple(shape)
    except ValueError:
        fits = False
    if not fits:
        raise ShapeError(
            f"{name} has shape {x.shape}, expected one that broadcasts to {tuple(shape)}, "
            f"that is {letters}"
        )


def sum_to(dx, shape):
    """Sum a gradient back to the shape its argument had before broadcasting."""
    if dx.ndim > len(shape):
        dx = dx.sum(axis=tuple(range(dx.ndim - len(shape))))
    wide = tuple(i for i, n in enumerate(shape) if n == 1 and dx.shape[i] != 1)
    return dx.sum(axis=wide, keepdims=True) if wide else dx
