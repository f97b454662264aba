"""What a correct implementation in float16 or bfloat16 gets wrong, emulated on any row.

:class:`Rounded` is an array that rounds the result of every NumPy call to the target dtype and
sums in float32, as matrix units do. A reference that runs on it is the plain low-precision
implementation whose error a kernel is measured by.
"""

import contextlib

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
    """A float array whose every operation is rounded to ``grid``, or disturbed a little."""

    grid = "float16"
    noise = None

    def __array_finalize__(self, source):
        self.grid = getattr(source, "grid", self.grid)
        self.noise = getattr(source, "noise", self.noise)

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **kwargs):
        if out is not None:
            kwargs["out"] = tuple(_plain(x) for x in out)
        result = getattr(ufunc, method)(*(_plain(x) for x in inputs), **kwargs)
        terms = inputs[0].shape[-1] if ufunc.__name__ == "matmul" else 1
        return _wrap(result, self.grid, self.noise, ufunc.__name__ not in EXACT and terms)

    def __array_function__(self, function, types, args, kwargs):
        result = function(*_deep(args), **_deep(kwargs))
        return _wrap(result, self.grid, self.noise, function.__name__ in SUMS)


ROUNDINGS = 4.0
"""Disturbance of a step: a backward that makes the weights again from the log-sum-exp rounds the
score, the log-sum-exp and their difference where a softmax rounds the difference alone."""

EXACT = {"maximum", "minimum", "fmax", "fmin", "negative", "positive", "absolute", "sign",
         "floor", "ceil", "rint", "trunc", "copysign"}  # fmt: skip
SUMS = {"sum", "mean", "einsum", "cumsum", "prod", "cumprod", "dot", "tensordot", "average"}
"""Calls that round; what only selects or moves numbers is never disturbed."""


def _plain(x):
    return x.view(np.ndarray) if isinstance(x, Rounded) else x


def _deep(x):
    if isinstance(x, dict):
        return {k: _deep(v) for k, v in x.items()}
    if isinstance(x, (tuple, list)):
        return type(x)(_deep(v) for v in x)
    return _plain(x)


def _wrap(x, grid, noise, disturb=False):
    if isinstance(x, (tuple, list)):
        return type(x)(_wrap(v, grid, noise, disturb) for v in x)
    if not (isinstance(x, (np.ndarray, np.floating)) and x.dtype.kind == "f"):
        return x
    a = round_to(np.asarray(x), grid)
    if noise is not None and disturb:
        most = max(ROUNDINGS, disturb**0.5)  # a long sum rounds once a term, up and down
        off = noise.uniform(-most, most, a.shape) * EPS[grid]
        a = round_to(np.where(np.isfinite(a), a * (1.0 + off), a), grid)
    a = a.view(Rounded)
    a.grid, a.noise = grid, noise
    return a


def plain(spec, kwargs, dout, dtype, noise=None):
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
    noise : numpy.random.Generator, optional
        Disturb the result of every step by up to four roundings: what another order of the same
        steps may do.

    Returns
    -------
    out : dict
        Name -> ndarray.
    gradients : dict or None
    """
    wrapped = dtype in ("float16", "bfloat16") or noise is not None

    def given(a):
        return _wrap(a, dtype, noise) if wrapped else round_to(a, dtype)

    ready = {n: given(a) if getattr(a, "dtype", np.dtype(int)).kind == "f" else a
             for n, a in kwargs.items()}  # fmt: skip
    with np.errstate(all="ignore"):
        out, cache = spec.call(ready)
        flat = {n: _plain(np.asarray(a)) for n, a in tree.flatten(out).items()}
        if dout is None or spec.backward_function is None:
            return flat, None
        upstream = tree.like(out, {next(iter(flat)): given(np.asarray(dout, np.float64))})
        gradients = spec.backward_function(upstream, cache)
    return flat, {n: np.asarray(_plain(g)) for n, g in gradients.items()}


def runs(spec, kwargs, dout, dtype, seed):
    """The plain implementation, as it is and disturbed: name -> list of arrays, twice.

    A disturbed run that ends elsewhere (a row that sorts or thresholds may take another branch) is
    left out.

    Parameters
    ----------
    spec, kwargs, dout, dtype
        As in :func:`plain`.
    seed : int
        Of the disturbance.

    Returns
    -------
    outs : dict
    gradients : dict
        Empty without ``dout``.
    """
    found = [plain(spec, kwargs, dout, dtype)]
    if dtype in ("float64", "float32") and spec.kind in ("mechanism", "module", "regularizer"):
        with contextlib.suppress(TypeError, ValueError, AttributeError):  # takes no subclass
            found.append(plain(spec, kwargs, dout, dtype, np.random.default_rng(seed)))
    near = EPS[dtype] ** (1 / 3)
    sets = []
    for part in (0, 1):
        first = {n: a for n, a in (found[0][part] or {}).items() if a.dtype.kind == "f"}
        most = max((_size(a) for a in first.values()), default=0.0)
        sets.append({
            n: [a, *(f[part][n] for f in found[1:] if n in first
                     and _close(f[part][n], a, near * max(_size(a), most / 100)))]
            for n, a in (found[0][part] or {}).items()
        })  # fmt: skip
    return sets


def _size(a):
    return float(np.max(np.abs(a[np.isfinite(a)]), initial=0.0))


def _close(a, b, atol):
    return a.shape == b.shape and np.allclose(a, b, rtol=0, atol=atol, equal_nan=True)
