"""One gradient rule for each NumPy function: the derivative table of the library.

How to read a line:

1. `np.multiply: lambda out, x, y: [lambda g: g * y, lambda g: g * x]` says: where `out = x * y` and
   the gradient `g` of `out` arrives, send `g * y` to `x` and `g * x` to `y`. The parameters after
   `out` are those of the NumPy function; there is one *pull* for each of them, in order, and None
   (or nothing) for one that must not be traced. A list of arrays has a list of pulls.
2. Inside a rule all arrays are plain. Only the pulls of traced arguments are called.
3. Broadcasting and dtypes are the business of the tape: a pull may return the shape of `out`, and
   the tape sums it back to the shape of the argument.
4. `At(index, g)` is a gradient that is zero outside `x[index]`; only that place is touched.
5. Where a function has a kink, ties share: `maximum(x, x)` sends half to each side, `max` an equal
   part to each maximum, `abs` nothing at zero. Wherever a gradient is masked it is selected by
   `np.where`, never multiplied by a mask, because 0 * inf is not 0.

Then come `SENTENCES`, functions that are written with other functions and need no rule, and
`CONSTANT`, functions whose result does not vary with their arguments.
"""

import operator
import string
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view


class At(NamedTuple):
    """The gradient of `x[index]`: `part` at `index`, zero elsewhere; repeated places add up."""

    index: object
    part: np.ndarray


# ---- steps that several rules share --------------------------------------------------------------


def widen(g, a, axis, keepdims=False):
    """Put the axes that a reduction of `a` removed back into `g`, with length 1."""
    if axis is None:
        return np.reshape(g, (1,) * a.ndim)
    return g if keepdims else np.expand_dims(g, axis)


def count(a, out):
    """How many elements of `a` make one element of a reduction."""
    return a.size // max(out.size, 1)


def invert(axes, ndim):
    """The permutation that undoes `np.transpose(a, axes)`."""
    return None if axes is None else np.argsort(np.arange(ndim)[list(axes)])


def along(axis, ndim, index):
    """The index that applies `index` to one axis and leaves the others."""
    return (slice(None),) * (axis % ndim) + (index,)


def swap(a):
    """The transpose of the last two axes."""
    return np.swapaxes(a, -1, -2)


def larger(g, x, y):
    """The share of `x` in the gradient of `maximum(x, y)`."""
    return np.where(x > y, g, np.where(x == y, g / 2, 0))


def fit(g, a):
    """`g` in the shape of `a`."""
    return np.reshape(g, np.shape(a))


# ---- rules that do not fit on a line -------------------------------------------------------------


def power(out, x, y):
    """x^y; the slope in y is taken as zero where x is not positive."""
    if isinstance(y, (int, float)):  # a Python number keeps float32 what it is
        return [lambda g: g * y * x ** (y - 1) if y else np.zeros_like(g)]
    return [
        lambda g: g * np.where(y == 0, 0, y * x ** np.where(y == 0, 1, y - 1)),
        lambda g: g * out * np.log(np.where(x > 0, x, 1)),
    ]


def matmul(out, a, b):
    """A vector is a row on the left and a column on the right; then both are matrices."""
    rows = a[None, :] if a.ndim == 1 else a
    columns = b[:, None] if b.ndim == 1 else b

    def matrix(g):
        g = np.expand_dims(g, -1) if b.ndim == 1 else g
        return np.expand_dims(g, -2) if a.ndim == 1 else g

    def pull_b(g):
        db = swap(rows) @ matrix(g)
        return db[..., 0] if b.ndim == 1 else db

    def pull_a(g):
        da = matrix(g) @ swap(columns)
        return da[..., 0, :] if a.ndim == 1 else da

    return [pull_a, pull_b]


def spell_out(subscripts, ndims):
    """Einsum subscripts with letters for `...` and with the result written out.

    Examples
    --------
    >>> spell_out("...ij,jk", [3, 2])
    (['aij', 'jk'], 'aik')
    """
    left, arrow, result = subscripts.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow:
        once = sorted(c for c in set(left) - set(".,") if left.count(c) == 1)
        result = ("..." if "..." in left else "") + "".join(once)
    unused = [c for c in string.ascii_letters if c not in subscripts]
    hidden = [n - len(term.replace("...", "")) for term, n in zip(terms, ndims)]
    dots = "".join(unused[: max(hidden)])
    terms = [t.replace("...", dots[len(dots) - n :]) for t, n in zip(terms, hidden)]
    return terms, result.replace("...", dots)


def einsum(out, subscripts, *operands, optimize=False):
    """The gradient of one operand is an einsum of `g` with all the others."""
    if not isinstance(subscripts, str):
        raise TypeError("np.einsum: write the subscripts as a string, 'ij,jk->ik'")
    terms, result = spell_out(subscripts, [np.ndim(x) for x in operands])

    def pull_for(i):
        term, shape = terms[i], np.shape(operands[i])
        others = [t for j, t in enumerate(terms) if j != i]
        rest = [x for j, x in enumerate(operands) if j != i]
        letters = list(dict.fromkeys(term))
        known = [c for c in letters if c in "".join([result, *others])]
        back = ",".join([result, *others]) + "->" + "".join(known)

        def pull(g):
            part = np.einsum(back, g, *rest, optimize=optimize)
            part = part[tuple(slice(None) if c in known else None for c in letters)]
            if len(letters) < len(term):  # "ii->i": the gradient lies on the diagonal
                full = np.zeros(shape, g.dtype)
                np.einsum(term + "->" + "".join(letters), full)[...] = part
                return full
            return np.broadcast_to(part, np.broadcast_shapes(part.shape, shape))

        return pull

    return [None, *map(pull_for, range(len(operands)))]


def tensordot(out, a, b, axes=2):
    """An einsum whose letters are those of `axes`."""
    if isinstance(axes, (int, np.integer)):
        axes = range(-axes, 0), range(axes)
    letters_a = string.ascii_lowercase[: np.ndim(a)]
    letters_b = list(string.ascii_uppercase[: np.ndim(b)])
    for i, j in zip(np.atleast_1d(axes[0]), np.atleast_1d(axes[1])):
        letters_b[j] = letters_a[i]
    letters_b = "".join(letters_b)
    result = [c for c in letters_a + letters_b if (letters_a + letters_b).count(c) == 1]
    subscripts = f"{letters_a},{letters_b}->{''.join(result)}"
    return einsum(out, subscripts, a, b, optimize=True)[1:]


def dot(out, a, b):
    """The last axis of `a` with the last but one of `b`."""
    if np.ndim(a) == 0 or np.ndim(b) == 0:
        return RULES[np.multiply](out, a, b)
    return tensordot(out, a, b, ([-1], [max(np.ndim(b) - 2, 0)]))


def inner(out, a, b):
    """The last axis of `a` with the last of `b`."""
    if np.ndim(a) == 0 or np.ndim(b) == 0:
        return RULES[np.multiply](out, a, b)
    return tensordot(out, a, b, ([-1], [-1]))


def extreme(out, a, axis=None, keepdims=False):
    """max and min: an equal share for each of the places that hold the extreme value."""
    hit = a == widen(out, a, axis, keepdims)
    ties = np.maximum(np.sum(hit, axis=axis, keepdims=True), 1).astype(a.dtype)
    return [lambda g: np.where(hit, widen(g, a, axis, keepdims) / ties, 0)]


def prod(out, a, axis=None, dtype=None, keepdims=False):
    """The product of all others is (those before) times (those after): right also at zeros."""
    axes = np.arange(a.ndim)[list(np.atleast_1d(axis))] if axis is not None else np.arange(a.ndim)
    moved = np.moveaxis(a, axes, range(-len(axes), 0))
    rows = moved.reshape(moved.shape[: a.ndim - len(axes)] + (-1,))
    one = np.ones_like(rows[..., :1])
    before = np.cumprod(np.concatenate([one, rows[..., :-1]], -1), -1)
    after = np.cumprod(np.concatenate([one, rows[..., :0:-1]], -1), -1)[..., ::-1]
    others = np.moveaxis((before * after).reshape(moved.shape), range(-len(axes), 0), axes)
    return [lambda g: widen(g, a, axis, keepdims) * others]


def cumprod(out, a, axis=None, dtype=None):
    """Backwards in time, later = g + (next factor) * later: right also at zeros."""
    where = 0 if axis is None else axis
    factors = np.moveaxis(a.reshape(out.shape), where, 0)
    before = np.concatenate([np.ones_like(factors[:1]), np.moveaxis(out, where, 0)[:-1]])

    def pull(g):
        later = np.moveaxis(np.array(g), where, 0)
        for t in range(len(later) - 2, -1, -1):
            later[t] += factors[t + 1] * later[t + 1]
        return fit(np.moveaxis(before * later, 0, where), a)

    return [pull]


def concatenate(out, arrays, axis=0):
    """Each array gets its own span of `g`."""
    if axis is None:
        ends = np.cumsum([0] + [np.size(a) for a in arrays])
    else:
        ends = np.cumsum([0] + [np.shape(a)[axis] for a in arrays])

    def pull_for(a, start, stop):
        return lambda g: fit(g[along(axis or 0, g.ndim, slice(start, stop))], a)

    return [list(map(pull_for, arrays, ends[:-1].tolist(), ends[1:].tolist()))]


def stack(out, arrays, axis=0):
    """Each array gets its own place of `g`, a view."""

    def pull_for(i):
        return lambda g: g[along(axis, g.ndim, i)]

    return [[pull_for(i) for i in range(len(arrays))]]


def repeat(out, a, repeats, axis=None):
    """The copies of an element are neighbours: sum over them."""
    flat = a.reshape(-1) if axis is None else a
    axis = 0 if axis is None else axis % a.ndim
    if np.size(repeats) == 1:
        shape = (*flat.shape[: axis + 1], -1, *flat.shape[axis + 1 :])
        return [lambda g: fit(np.sum(g.reshape(shape), axis + 1), a)]
    places = np.repeat(np.arange(flat.shape[axis]), repeats)

    def pull(g):
        total = np.zeros(flat.shape, g.dtype)
        np.add.at(total, along(axis, flat.ndim, places), g)
        return fit(total, a)

    return [pull]


def pad(out, array, pad_width, mode="constant", constant_values=0):
    """The inside of `g`."""
    if mode != "constant":
        raise TypeError("np.pad has a gradient rule for mode='constant' only")
    widths = np.broadcast_to(np.asarray(pad_width), (array.ndim, 2)).tolist()
    inside = tuple(slice(w[0], w[0] + n) for w, n in zip(widths, array.shape))
    return [lambda g: g[inside]]


def sliding(out, x, window_shape, axis=None):
    """An element stands in several windows: add up, one place of the window at a time."""

    def pull(g):
        total = np.zeros(x.shape, g.dtype)
        windows = sliding_window_view(total, window_shape, axis, writeable=True)
        for place in np.ndindex(g.shape[x.ndim :]):  # one place of the window: no overlap
            windows[(..., *place)] += g[(..., *place)]
        return total

    return [pull]


def diagonal_places(shape, offset):
    """Row and column indices of a diagonal of a matrix that need not be square."""
    length = max(0, min(shape[-2] + min(offset, 0), shape[-1] - max(offset, 0)))
    steps = np.arange(length)
    return steps - min(offset, 0), steps + max(offset, 0)


def on_diagonal(g, shape, offset, axis1, axis2):
    """Zeros of this shape with `g` on a diagonal."""
    full = np.zeros(shape, g.dtype)
    matrix = np.moveaxis(full, (axis1, axis2), (-2, -1))  # a view: what we write reaches `full`
    matrix[(..., *diagonal_places(matrix.shape, offset))] = g
    return full


def diag(out, v, k=0):
    """A vector becomes a diagonal, a diagonal becomes a vector."""
    if v.ndim == 1:
        return [lambda g: np.diagonal(g, k)]
    return [lambda g: on_diagonal(g, v.shape, k, 0, 1)]


def take(out, a, indices, axis=None):
    """`a[indices]` along one axis, or on the flat array."""
    if axis is None:
        places = np.unravel_index(np.asarray(indices) % a.size, a.shape)
        return [lambda g: At(places, g)]
    return [lambda g: At(along(axis, a.ndim, indices), g)]


def places_along(shape, indices, axis):
    """The index by which `np.take_along_axis` reads."""
    index = list(np.ogrid[tuple(slice(n) for n in shape)])
    index[axis] = indices
    return tuple(index)


def take_along_axis(out, arr, indices, axis=-1):
    """Where `arr` was read, the gradient goes."""
    if axis is None:
        return take(out, arr, indices)
    return [lambda g: At(places_along(arr.shape, indices, axis), g)]


def reorder(out, a, axis):
    """sort and partition: the r-th smallest of `a` is the r-th smallest of `out`."""
    flat, axis = (a.reshape(-1), 0) if axis is None else (a, axis)
    source = np.empty(flat.shape, int)
    here, there = (np.argsort(x, axis=axis, kind="stable") for x in (out, flat))
    np.put_along_axis(source, here, there, axis)

    def pull(g):
        total = np.empty(flat.shape, g.dtype)
        np.put_along_axis(total, source, g, axis)
        return fit(total, a)

    return [pull]


def tile(out, A, reps):
    """Apart into (copies, size, copies, size, ...), then summed over the copies."""
    reps = np.atleast_1d(reps).tolist()
    shape = (1,) * (len(reps) - A.ndim) + A.shape
    reps = [1] * (len(shape) - len(reps)) + reps
    apart = [n for pair in zip(reps, shape) for n in pair]
    copies = tuple(range(0, len(apart), 2))
    return [lambda g: fit(np.sum(g.reshape(apart), axis=copies), A)]


def diff(out, a, n=1, axis=-1):
    """Each number is added once and subtracted once, n times over."""

    def pull(g):
        widths = np.zeros((a.ndim, 2), int)
        widths[axis] = 1
        for _ in range(n):
            g = -np.diff(np.pad(g, widths), axis=axis)
        return g

    return [pull]


def solve(out, a, b):
    """out = a^-1 b: the gradient of b is a^-T g, that of a is minus (gradient of b) out^T."""

    def column(x):
        return x[..., None] if b.ndim == 1 else x

    def column_b(g):
        return np.linalg.solve(swap(a), column(g))

    return [
        lambda g: -column_b(g) @ swap(column(out)),
        lambda g: column_b(g)[..., 0] if b.ndim == 1 else column_b(g),
    ]


# ---- the table -----------------------------------------------------------------------------------

RULES = {
    # arithmetic
    np.add: lambda out, x, y: [lambda g: g, lambda g: g],
    np.subtract: lambda out, x, y: [lambda g: g, lambda g: -g],
    np.multiply: lambda out, x, y: [lambda g: g * y, lambda g: g * x],
    np.divide: lambda out, x, y: [lambda g: g / y, lambda g: -g * out / y],
    np.remainder: lambda out, x, y: [lambda g: g, lambda g: -g * np.floor_divide(x, y)],
    np.negative: lambda out, x: [lambda g: -g],
    np.positive: lambda out, x: [lambda g: g],
    np.conjugate: lambda out, x: [lambda g: g],
    np.absolute: lambda out, x: [lambda g: g * np.sign(x)],
    np.reciprocal: lambda out, x: [lambda g: -g * out * out],
    np.square: lambda out, x: [lambda g: 2 * g * x],
    np.sqrt: lambda out, x: [lambda g: g / (2 * out)],
    np.cbrt: lambda out, x: [lambda g: g / (3 * out * out)],
    np.power: power,
    # exponentials and logarithms
    np.exp: lambda out, x: [lambda g: g * out],
    np.exp2: lambda out, x: [lambda g: g * out * float(np.log(2))],
    np.expm1: lambda out, x: [lambda g: g * (out + 1)],
    np.log: lambda out, x: [lambda g: g / x],
    np.log2: lambda out, x: [lambda g: g / (x * float(np.log(2)))],
    np.log10: lambda out, x: [lambda g: g / (x * float(np.log(10)))],
    np.log1p: lambda out, x: [lambda g: g / (1 + x)],
    np.logaddexp: lambda out, x, y: [
        lambda g: g * np.exp(x - np.where(np.isfinite(out), out, 0)),
        lambda g: g * np.exp(y - np.where(np.isfinite(out), out, 0)),
    ],
    # trigonometry
    np.sin: lambda out, x: [lambda g: g * np.cos(x)],
    np.cos: lambda out, x: [lambda g: -g * np.sin(x)],
    np.tan: lambda out, x: [lambda g: g * (1 + out * out)],
    np.sinh: lambda out, x: [lambda g: g * np.cosh(x)],
    np.cosh: lambda out, x: [lambda g: g * np.sinh(x)],
    np.tanh: lambda out, x: [lambda g: g * (1 - out * out)],
    np.arcsin: lambda out, x: [lambda g: g / np.sqrt(1 - x * x)],
    np.arccos: lambda out, x: [lambda g: -g / np.sqrt(1 - x * x)],
    np.arctan: lambda out, x: [lambda g: g / (1 + x * x)],
    np.arctan2: lambda out, y, x: [
        lambda g: g * x / (x * x + y * y),
        lambda g: -g * y / (x * x + y * y),
    ],
    np.arcsinh: lambda out, x: [lambda g: g / np.sqrt(x * x + 1)],
    np.arccosh: lambda out, x: [lambda g: g / np.sqrt(x * x - 1)],
    np.arctanh: lambda out, x: [lambda g: g / (1 - x * x)],
    # choices
    np.maximum: lambda out, x, y: [lambda g: larger(g, x, y), lambda g: larger(g, y, x)],
    np.minimum: lambda out, x, y: [lambda g: larger(g, y, x), lambda g: larger(g, x, y)],
    np.where: lambda out, condition, x, y: [
        None,
        lambda g: np.where(condition, g, 0),
        lambda g: np.where(condition, 0, g),
    ],
    np.nan_to_num: lambda out, x, nan=0.0, posinf=None, neginf=None: [
        lambda g: np.where(np.isfinite(x), g, 0)
    ],
    # sums, means, products, extremes
    np.sum: lambda out, a, axis=None, dtype=None, keepdims=False: [
        lambda g: np.broadcast_to(widen(g, a, axis, keepdims), a.shape)
    ],
    np.mean: lambda out, a, axis=None, dtype=None, keepdims=False: [
        lambda g: np.broadcast_to(widen(g, a, axis, keepdims) / count(a, out), a.shape)
    ],
    np.prod: prod,
    np.max: extreme,
    np.amax: extreme,
    np.min: extreme,
    np.amin: extreme,
    np.cumsum: lambda out, a, axis=None, dtype=None: [
        lambda g: fit(np.flip(np.cumsum(np.flip(g, axis), axis), axis), a)
    ],
    np.cumprod: cumprod,
    # products of arrays
    np.matmul: matmul,
    np.einsum: einsum,
    np.tensordot: tensordot,
    np.dot: dot,
    np.inner: inner,
    np.linalg.inv: lambda out, a: [lambda g: -swap(out) @ g @ swap(out)],
    np.linalg.solve: solve,
    # the same numbers in another shape or order
    np.reshape: lambda out, a, shape=None, order="C": [
        lambda g: np.reshape(g, a.shape, order=order)
    ],
    np.ravel: lambda out, a, order="C": [lambda g: np.reshape(g, a.shape, order=order)],
    np.expand_dims: lambda out, a, axis: [lambda g: fit(g, a)],
    np.squeeze: lambda out, a, axis=None: [lambda g: fit(g, a)],
    np.atleast_1d: lambda out, a: [lambda g: fit(g, a)],
    np.atleast_2d: lambda out, a: [lambda g: fit(g, a)],
    np.atleast_3d: lambda out, a: [lambda g: fit(g, a)],
    np.transpose: lambda out, a, axes=None: [lambda g: np.transpose(g, invert(axes, a.ndim))],
    np.swapaxes: lambda out, a, axis1, axis2: [lambda g: np.swapaxes(g, axis1, axis2)],
    np.moveaxis: lambda out, a, source, destination: [
        lambda g: np.moveaxis(g, destination, source)
    ],
    np.flip: lambda out, m, axis=None: [lambda g: np.flip(g, axis)],
    np.roll: lambda out, a, shift, axis=None: [lambda g: np.roll(g, np.negative(shift), axis)],
    np.sort: lambda out, a, axis=-1, kind=None: reorder(out, a, axis),
    np.partition: lambda out, a, kth, axis=-1: reorder(out, a, axis),
    np.copy: lambda out, a, order="K": [lambda g: g],
    np.astype: lambda out, x, dtype, copy=True: [lambda g: g],
    # parts, copies, joins
    operator.getitem: lambda out, a, index: [lambda g: At(index, g)],
    np.broadcast_to: lambda out, array, shape: [lambda g: g],
    np.repeat: repeat,
    np.tile: tile,
    np.take: take,
    np.take_along_axis: take_along_axis,
    np.concatenate: concatenate,
    np.stack: stack,
    np.pad: pad,
    np.tril: lambda out, m, k=0: [lambda g: np.tril(g, k)],
    np.triu: lambda out, m, k=0: [lambda g: np.triu(g, k)],
    np.diag: diag,
    np.diagonal: lambda out, a, offset=0, axis1=0, axis2=1: [
        lambda g: on_diagonal(g, a.shape, offset, axis1, axis2)
    ],
    np.trace: lambda out, a, offset=0, axis1=0, axis2=1: [
        lambda g: on_diagonal(g[..., None], a.shape, offset, axis1, axis2)
    ],
    np.diff: diff,
    sliding_window_view: sliding,
}

# ufuncs of scipy.special, found by name so that SciPy need not be imported
SCIPY = {
    "scipy.special.erf": lambda out, x: [lambda g: g * np.exp(-x * x) * (2 / np.pi**0.5)],
    "scipy.special.expit": lambda out, x: [lambda g: g * out * (1 - out)],
}


# ---- functions written with other functions ------------------------------------------------------


def split(how):
    """The parts that `how` makes, as slices."""

    def parts(ary, indices_or_sections, axis=0):
        places = how(np.arange(ary.shape[axis]), indices_or_sections)
        spans = [slice(p[0], p[-1] + 1) if len(p) else slice(0, 0) for p in places]
        return [ary[along(axis, ary.ndim, span)] for span in spans]

    return parts


def clip(a, a_min=None, a_max=None, *, min=None, max=None):
    """A maximum, then a minimum."""
    low, high = (a_min if min is None else min), (a_max if max is None else max)
    a = a if low is None else np.maximum(a, low)
    return a if high is None else np.minimum(a, high)


def hstack(tup):
    """Joined along the second axis, or along the first where there is only one."""
    parts = [np.atleast_1d(a) for a in tup]
    return np.concatenate(parts, 0 if parts[0].ndim == 1 else 1)


SENTENCES = {
    np.matrix_transpose: lambda x: np.swapaxes(x, -1, -2),
    np.outer: lambda a, b: np.ravel(a)[:, None] * np.ravel(b),
    np.split: split(np.split),
    np.array_split: split(np.array_split),
    np.vstack: lambda tup: np.concatenate([np.atleast_2d(a) for a in tup], 0),
    np.hstack: hstack,
    np.clip: clip,
    np.ptp: lambda a, axis=None, keepdims=False: (
        np.max(a, axis=axis, keepdims=keepdims) - np.min(a, axis=axis, keepdims=keepdims)
    ),
    np.broadcast_arrays: lambda *args: tuple(
        np.broadcast_to(a, np.broadcast_shapes(*map(np.shape, args))) for a in args
    ),
}

# ---- functions whose result does not vary --------------------------------------------------------

# Arrays made in the form of the first argument, or by `like=`; plain whatever they are made from.
LIKE = {np.zeros_like, np.ones_like, np.empty_like, np.full_like}

CONSTANT = {
    np.arange, np.zeros, np.empty, np.ones, np.full, np.eye, np.identity, np.tri,
    np.shape, np.ndim, np.size, np.result_type, np.iscomplexobj, np.isrealobj, np.can_cast,
    np.equal, np.not_equal, np.less, np.less_equal, np.greater, np.greater_equal,
    np.logical_and, np.logical_or, np.logical_xor, np.logical_not,
    np.isfinite, np.isinf, np.isnan, np.signbit, np.isclose, np.allclose, np.array_equal,
    np.all, np.any, np.count_nonzero, np.nonzero, np.flatnonzero, np.argwhere,
    np.sign, np.heaviside, np.floor, np.ceil, np.trunc, np.rint, np.round, np.around,
    np.floor_divide,
    np.argmax, np.argmin, np.argsort, np.argpartition, np.searchsorted, np.lexsort, np.digitize,
    np.unique, np.shares_memory, np.may_share_memory,
}  # fmt: skip
