"""What a correct implementation in float16 or bfloat16 gets wrong, emulated on any row.

:class:`Rounded` is an array that rounds the result of every NumPy call to the target dtype and
sums in float32, as matrix units do. A reference that runs on it is the plain low-precision
implementation whose error a kernel is measured by.
"""

import numpy as np

from attention_ref.kit import tree

EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""Machine epsilon by name; NumPy knows no bfloat16."""


def round_to(a, dtype):
    """Round an array to a dtype's grid, kept as float32 (or float64 for the wide ones).

    Parameters
    ----------
    a : ndarray
        Floating.
    dtype : {"float64", "float32", "float16", "bfloat16"}
        The grid.

    Returns
    -------
    ndarray
        float64 for "float64", float32 otherwise.
    """
    if dtype in ("float64", "float32"):
        return a.astype(dtype)
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return a.astype(np.float16).astype(np.float32)
    return from_bits(to_bits(a))


def to_bits(a):
    """The 16 bits of bfloat16, rounded to nearest, ties to even."""
    a = np.asarray(a)
    single = a.astype(np.float32)
    bits = single.view(np.uint32).astype(np.uint64)
    if a.dtype.itemsize > 4:  # round to odd first, so that rounding twice does no harm
        wide, back = a.astype(np.float64), single.astype(np.float64)
        inexact = (back != wide) & np.isfinite(wide) & np.isfinite(back)
        toward = np.abs(back) > np.abs(wide)
        bits = np.where(inexact & toward, bits - 1, bits)
        bits = np.where(inexact, bits | 1, bits)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | 0x40
    return np.where(np.isnan(single), quiet, rounded).astype(np.uint16)


def from_bits(bits):
    """float32 numbers of bfloat16 bits."""
    return (np.asarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)


class Rounded(np.ndarray):
    """A float32 array whose every operation is rounded to ``dtype_name``."""

    dtype_name = "float16"

    def __array_finalize__(self, source):
        self.dtype_name = getattr(source, "dtype_name", self.dtype_name)

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **kwargs):
        if out is not None:
            kwargs["out"] = tuple(_plain(x) for x in out)
        result = getattr(ufunc, method)(*(_plain(x) for x in inputs), **kwargs)
        return _wrap(result, self.dtype_name)

    def __array_function__(self, function, types, args, kwargs):
        result = function(*_deep(args), **_deep(kwargs))
        return _wrap(result, self.dtype_name)


def _plain(x):
    return x.view(np.ndarray) if isinstance(x, Rounded) else x


def _deep(x):
    if isinstance(x, dict):
        return {k: _deep(v) for k, v in x.items()}
    if isinstance(x, (tuple, list)):
        return type(x)(_deep(v) for v in x)
    return _plain(x)


def _wrap(x, name):
    if isinstance(x, (tuple, list)):
        return type(x)(_wrap(v, name) for v in x)
    if isinstance(x, (np.ndarray, np.floating)) and x.dtype.kind == "f":
        rounded = round_to(np.asarray(x, np.float32), name).view(Rounded)
        rounded.dtype_name = name
        return rounded
    return x


def plain(spec, kwargs, dout, dtype):
    """Output and gradients of a row computed in a dtype by the plain implementation.

    Parameters
    ----------
    spec : Spec
        The row.
    kwargs : dict
        Arguments, already on the grid of the dtype.
    dout : ndarray or None
        Upstream gradient of the main output; None for no gradients.
    dtype : {"float64", "float32", "float16", "bfloat16"}
        Of every step.

    Returns
    -------
    out : dict
        Name -> ndarray.
    gradients : dict or None
    """
    narrow = dtype in ("float16", "bfloat16")

    def given(a):
        a = round_to(a, dtype)
        return _wrap(a, dtype) if narrow else a

    ready = {n: given(a) if getattr(a, "dtype", np.dtype(int)).kind == "f" else a
             for n, a in kwargs.items()}  # fmt: skip
    with np.errstate(all="ignore"):
        out, cache = spec.call(ready)
        flat = {n: _plain(np.asarray(a)) if narrow else np.asarray(a)
                for n, a in tree.flatten(out).items()}  # fmt: skip
        if dout is None or spec.backward_function is None:
            return flat, None
        upstream = tree.like(out, {next(iter(flat)): given(np.asarray(dout, np.float64))})
        gradients = spec.backward_function(upstream, cache)
    return flat, {n: np.asarray(_plain(g)) for n, g in gradients.items()}
