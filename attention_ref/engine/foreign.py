"""A test double for CuPy: NumPy inside, but it refuses what CuPy refuses.

CuPy arrays answer the same two protocols as `Traced` does, so a forward written for NumPy runs on a
GPU as it stands, provided that it keeps to what CuPy implements. `Foreign` makes that provable on a
machine without a GPU:

1. it lets through the functions that CuPy has (`FUNCTIONS`), and no others;
2. it refuses their keywords that CuPy lacks (`KEYWORDS`);
3. it refuses NumPy arrays beside foreign ones: on a GPU they live in another memory. Python numbers
   and NumPy scalars mix freely;
4. it refuses methods and writes into given arrays, which CuPy has and the reference does not use,
   and everything that would copy from the device behind the reader's back: `float(x)`, `if x:`.
   Only a buffer that the program made itself with `np.zeros_like` and the like may be written to,
   as backwards do.
"""

import operator

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from .tape import name_of


class ForeignRefusal(TypeError):
    """CuPy would not run this call; the message says why and what to write instead."""


# NumPy functions that CuPy 14 implements under the same name.
FUNCTIONS = set(
    # one long word list reads better as text
    """
    arange array asarray asanyarray ascontiguousarray copy empty empty_like full_like identity
    meshgrid ones_like tri tril triu vander zeros zeros_like diag diagflat diagonal indices
    tril_indices_from triu_indices_from

    append array_split astype atleast_1d atleast_2d atleast_3d broadcast_arrays broadcast_to
    column_stack concatenate delete dsplit dstack expand_dims flip fliplr flipud hsplit hstack
    matrix_transpose moveaxis pad ravel repeat reshape resize roll rollaxis rot90 split
    squeeze stack swapaxes tile transpose trim_zeros unique vsplit vstack

    choose compress extract ix_ nonzero argwhere flatnonzero select take take_along_axis where
    unravel_index ravel_multi_index

    all allclose any array_equal array_equiv can_cast common_type iscomplex iscomplexobj isreal
    isrealobj isclose isin ndim result_type shape size shares_memory may_share_memory
    isneginf isposinf

    amax amin angle around average bincount clip convolve corrcoef correlate count_nonzero cov cross
    cumprod cumsum cumulative_prod cumulative_sum diff digitize ediff1d fix gradient histogram i0
    imag interp kron max mean median min nan_to_num nanargmax nanargmin nancumprod nancumsum nanmax
    nanmean nanmedian nanmin nanprod nanstd nansum nanvar percentile polyval prod ptp quantile real
    real_if_close round searchsorted sinc std sum trace trapezoid unwrap var

    argmax argmin argpartition argsort lexsort partition sort sort_complex

    dot einsum inner outer tensordot vdot
    linalg.cholesky linalg.cond linalg.cross linalg.det linalg.eig linalg.eigh linalg.eigvals
    linalg.eigvalsh linalg.inv linalg.lstsq linalg.matmul linalg.matrix_power linalg.matrix_rank
    linalg.matrix_transpose linalg.norm linalg.pinv linalg.qr linalg.slogdet linalg.solve linalg.svd
    linalg.tensorinv linalg.tensorsolve
    fft.fft fft.fft2 fft.fftn fft.fftshift fft.hfft fft.ifft fft.ifft2 fft.ifftn fft.ifftshift
    fft.ihfft fft.irfft fft.irfft2 fft.irfftn fft.rfft fft.rfft2 fft.rfftn
    lib.stride_tricks.sliding_window_view

    absolute add arccos arccosh arcsin arcsinh arctan arctan2 arctanh bitwise_and bitwise_count
    bitwise_or bitwise_xor cbrt ceil conjugate copysign cos cosh deg2rad degrees divide divmod equal
    exp exp2 expm1 fabs float_power floor floor_divide fmax fmin fmod frexp gcd greater
    greater_equal heaviside hypot invert isfinite isinf isnan lcm ldexp left_shift less less_equal
    log log10 log1p log2 logaddexp logaddexp2 logical_and logical_not logical_or logical_xor matmul
    maximum minimum modf multiply negative nextafter not_equal positive power rad2deg radians
    reciprocal remainder
    right_shift rint sign signbit sin sinh sqrt square subtract tan tanh trunc

    scipy.special.erf scipy.special.erfc scipy.special.erfinv scipy.special.expit
    scipy.special.gammaln scipy.special.log_ndtr scipy.special.logit scipy.special.ndtr
    """.split()  # noqa: SIM905
)

# Keywords that CuPy's functions of that name do not have.
KEYWORDS = {
    "initial": "CuPy's reductions have no initial=; take np.max(np.where(live, z, -np.inf), axis)",
    "where": "CuPy's reductions have no where=; select with np.where first",
    "device": "CuPy's creation functions have no device=; use np.zeros_like(x, shape=...)",
    "stable": "CuPy has no stable=; write kind='stable'",
    "order": "CuPy has no order= (sort fields)",
    "correction": "CuPy has no correction=; write ddof=",
    "weights": "CuPy has no weights= here",
    "upper": "CuPy has no upper=",
}
HAS_KEYWORD = {
    "order": {"reshape", "ravel", "copy", "array", "asarray", "asanyarray", "astype", "empty",
              "zeros", "zeros_like", "ones_like", "empty_like", "full_like"},
    "weights": {"average", "bincount", "histogram"},
}  # fmt: skip
ONLY_BY_POSITION = {
    ("reshape", "shape"), ("clip", "min"), ("clip", "max"), ("take", "mode"),
    ("take_along_axis", "arr"), ("concatenate", "arrays"), ("stack", "arrays"), ("flip", "m"),
    ("count_nonzero", "keepdims"), ("argpartition", "kind"), ("partition", "kind"),
}  # fmt: skip

# Functions that CuPy lacks or answers differently, with what to write instead.
INSTEAD = {
    "eye": "compare two aranges: np.arange(n, like=x)[:, None] == np.arange(n, like=x)",
    "ones": "np.ones_like(x, shape=...)",
    "full": "np.full_like(x, value, shape=...)",
    "block": "np.concatenate",
    "unstack": "[x[i] for i in range(len(x))]",
    "vecdot": "np.sum(x * y, -1)",
    "insert": "np.concatenate",
    "geomspace": "np.exp of equal steps",
    "linalg.multi_dot": "the products in the order you want",
    "linalg.vector_norm": "np.sqrt(np.sum(x * x, axis))",
    "linalg.matrix_norm": "np.sqrt(np.sum(x * x, axis))",
    "put_along_axis": "a gather by the inverse permutation",
    "copyto": "np.where",
}

# Answers about an array, which are no arrays themselves.
ABOUT = {"shape", "ndim", "size", "result_type", "can_cast", "common_type", "iscomplexobj",
         "isrealobj", "shares_memory", "may_share_memory"}  # fmt: skip

# Functions whose result is a new array that the program may write to.
BUFFERS = {"zeros_like", "ones_like", "empty_like", "full_like", "zeros", "empty", "copy"}


class Foreign(NDArrayOperatorsMixin):
    """An array that behaves as if it lived on a GPU under CuPy.

    Parameters
    ----------
    array : ndarray
        The numbers. They are not copied.

    Attributes
    ----------
    value : ndarray
        The numbers again.

    Examples
    --------
    >>> x = Foreign(np.array([1.0, 2.0]))
    >>> np.exp(x - np.max(x)).value
    array([0.36787944, 1.        ])
    >>> x + np.zeros(2)
    Traceback (most recent call last):
        ...
    attention_ref.engine.foreign.ForeignRefusal: np.add: a NumPy array of shape (2,) meets ...
    """

    __slots__ = ("buffer", "value")

    def __init__(self, array, buffer=False):
        self.value = np.asarray(array)
        self.buffer = buffer  # made by the program itself, so it may be written to

    shape = property(lambda self: self.value.shape)
    dtype = property(lambda self: self.value.dtype)
    ndim = property(lambda self: self.value.ndim)
    size = property(lambda self: self.value.size)
    T = property(lambda self: Foreign(self.value.T))

    def unwrap(self):
        """The numbers as a NumPy array."""
        return self.value

    def item(self):
        """The only element as a Python number, as CuPy's `item` copies it from the device."""
        return self.value.item()

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        name = name_of(ufunc)
        if method != "__call__":
            raise ForeignRefusal(
                f"{name}.{method}: CuPy has no such method for most ufuncs; use "
                "np.sum, np.prod, np.max, np.cumsum, or a step of your own."
            )
        target = kwargs.pop("out", None)
        if target is None:
            return run(ufunc, name, inputs, kwargs)
        if not (isinstance(target[0], Foreign) and target[0].buffer):
            raise ForeignRefusal(f"{name}: out= and x += y write into an array that was given.")
        target[0][...] = run(ufunc, name, inputs, kwargs)
        return target[0]

    def __array_function__(self, function, types, args, kwargs):
        return run(function, name_of(function), args, kwargs)

    def __getitem__(self, index):
        part = run(operator.getitem, "x[index]", (self, index), {})
        part.buffer = self.buffer
        return part

    def __len__(self):
        return len(self.value)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __repr__(self):
        return f"Foreign({self.value!r})"

    def __setitem__(self, index, new):
        if not self.buffer:
            raise ForeignRefusal(
                "x[index] = ... writes into an array that was given; use np.where, np.stack or a "
                "buffer made with np.zeros_like."
            )
        run(operator.setitem, "x[index] = y", (self, index, new), {})

    def __array__(self, *args, **kwargs):
        raise ForeignRefusal(
            "a foreign array does not become a NumPy array by itself: it lives on the device. This "
            "happens in np.asarray(x), np.array([x, y]) (use np.stack) and buffer[index] = x."
        )

    def __bool__(self):
        raise ForeignRefusal(
            "a foreign array has no truth value without a copy from the device; "
            "use np.where(condition, x, y)."
        )

    def _number(self, *args):
        raise ForeignRefusal(
            "a foreign array does not become a Python number without a copy from "
            "the device; stay with NumPy functions (np.sqrt, not math.sqrt)."
        )

    __float__ = __int__ = __index__ = __complex__ = __round__ = _number

    def __getattr__(self, name):
        known = not name.startswith("_") and hasattr(np, name)
        advice = f"; use the function np.{name}(x)" if known else ""
        raise AttributeError(f"a foreign array has no attribute or method '{name}'{advice}")


def run(function, name, args, kwargs):
    """Check a call against the tables, then let NumPy do it."""
    short = name.removeprefix("np.")
    if function in (operator.getitem, operator.setitem):
        refuse_index(args[1])
    else:
        refuse_function(short)
        refuse_keywords(short, args, kwargs)
    mixes = [x for x in leaves((args, kwargs)) if isinstance(x, np.ndarray)]
    if mixes:
        raise ForeignRefusal(
            f"{name}: a NumPy array of shape {mixes[0].shape} meets a foreign array. Make arrays "
            "with np.zeros_like(x, shape=...) or np.arange(n, like=x)."
        )
    out = function(*bare(args), **bare(kwargs))
    return out if short in ABOUT else wrap(out, buffer=short in BUFFERS)


def refuse_index(index):
    """Raise for an index that CuPy does not take."""
    masks = [x for x in leaves(index) if isinstance(x, Foreign) and x.dtype == np.bool_]
    if len(masks) > 1:
        raise ForeignRefusal("x[index]: CuPy takes one boolean array in an index, not several.")


def refuse_function(name):
    """Raise for a function that CuPy lacks."""
    if name not in FUNCTIONS:
        instead = f"; write {INSTEAD[name]}" if name in INSTEAD else ""
        raise ForeignRefusal(f"np.{name}: CuPy has no such function for its arrays{instead}.")


def refuse_keywords(name, args, kwargs):
    """Raise for keywords and argument types that CuPy lacks."""
    for key, given in kwargs.items():
        if key in KEYWORDS and name not in HAS_KEYWORD.get(key, ()):
            raise ForeignRefusal(f"np.{name}: {KEYWORDS[key]}.")
        if (name, key) in ONLY_BY_POSITION:
            raise ForeignRefusal(f"np.{name}: CuPy's function has no {key}=.")
        if key == "out" and given is not None:
            raise ForeignRefusal(f"np.{name}: out= writes in place; a forward does not.")
    if name in ("sort", "argsort"):
        kind = kwargs.get("kind", args[2] if len(args) > 2 else None)
        if kind not in (None, "stable"):
            raise ForeignRefusal(f"np.{name}: CuPy has kind='stable' only, got kind={kind!r}.")
    if name == "repeat" and any(isinstance(x, Foreign) for x in leaves((args[1:], kwargs))):
        raise ForeignRefusal("np.repeat: CuPy wants the number of repeats as Python numbers.")


def leaves(tree):
    """Yield the arguments inside tuples, lists and dicts."""
    if isinstance(tree, dict):
        tree = tuple(tree.values())
    if isinstance(tree, (tuple, list)):
        for item in tree:
            yield from leaves(item)
    else:
        yield tree


def bare(tree):
    """The same arguments with the numbers of foreign arrays in their place."""
    if isinstance(tree, Foreign):
        return tree.value
    if isinstance(tree, dict):
        return {key: bare(item) for key, item in tree.items()}
    if type(tree) in (tuple, list):
        return type(tree)([bare(item) for item in tree])
    return tree


def wrap(tree, buffer=False):
    """The result as foreign arrays; a single number becomes an array without axes, as in CuPy."""
    if isinstance(tree, (np.ndarray, np.generic, bool)):
        return Foreign(tree, buffer)
    if isinstance(tree, (tuple, list)):
        items = [wrap(item) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return tree
