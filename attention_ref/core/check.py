"""Checks at the door: a method checks its arguments once and never converts them.

Shapes are written in the letters of the notation page, one word an axis, ``...`` for leading
axes that broadcast::

    n = check.shapes(q=(q, "... T D"), k=(k, "... S D"), v=(v, "... S E"))
    n["T"], n["D"]

Only ``.shape`` and ``.dtype`` are read, so NumPy, CuPy and traced arrays pass the same door.
"""

import difflib
import math
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np

from attention_ref.core.errors import DTypeError, MemoryLimitError, ParameterError, ShapeError

_extended = ContextVar("extended", default=False)


@contextmanager
def extended():
    """Within this block longdouble arrays pass too: the truth that judges float64."""
    token = _extended.set(True)
    try:
        yield
    finally:
        _extended.reset(token)


MEMORY_LIMIT = 2 * 1024**3
"""Bytes of one score tensor above which a method refuses to start."""


def kind(name, x):
    """Refuse what is not a plain array of the array protocols.

    Parameters
    ----------
    name : str
        The argument's name, for the message.
    x : object
        What the caller passed.

    Raises
    ------
    DTypeError
        For lists, tensors of other frameworks, matrices, masked and sparse arrays.
    """
    if isinstance(x, (np.matrix, np.ma.MaskedArray)):
        raise DTypeError(
            f"{name} is a {type(x).__name__}, expected a plain array; "
            f"hint: np.asarray({name}) and a boolean mask= for what is hidden"
        )
    if isinstance(x, np.generic) or not hasattr(x, "__array_function__"):
        hint = f"np.asarray({name})"
        if hasattr(x, "requires_grad"):
            hint = f"{name}.detach().numpy()"
        elif hasattr(x, "toarray"):
            hint = f"{name}.toarray()"
        raise DTypeError(f"{name} is a {type(x).__name__}, expected a NumPy array; hint: {hint}")


def floating(name, x):
    """Refuse every dtype but float32 and float64 (complex inside ``engine.complex_step()``)."""
    kind(name, x)
    dtype = np.dtype(x.dtype)
    if dtype.kind == "f" and (dtype.itemsize in (4, 8) or _extended.get()):
        return
    if dtype.kind == "c":
        from attention_ref.engine import complex_allowed

        if complex_allowed():
            return
    hint = f"{name}.astype(np.float64)"
    if dtype.kind == "c":
        hint = "take the real part; complex numbers are for engine.complex_step() only"
    elif dtype.itemsize == 2 and dtype.kind == "f":
        hint = f"{name}.astype(np.float32); half precision lives in the kit and the kernels"
    raise DTypeError(f"{name} has dtype {dtype}, expected float32 or float64; hint: {hint}")


def integer(name, x, low=None, high=None):
    """Refuse arrays that are not of an integer dtype (indices, tokens).

    Parameters
    ----------
    name : str
        The argument's name.
    x : ndarray
        The array.
    low, high : int, optional
        Smallest value and one past the largest value; read only for NumPy arrays.
    """
    kind(name, x)
    if np.dtype(x.dtype).kind not in "iu":
        raise DTypeError(
            f"{name} has dtype {x.dtype}, expected integers; hint: {name}.astype(np.int64)"
        )
    if low is not None and isinstance(x, np.ndarray) and x.size:
        least, most = int(np.min(x)), int(np.max(x))
        if least < low or (high is not None and most >= high):
            raise ParameterError(
                f"{name} holds values from {least} to {most}, expected "
                f"{low} <= value{'' if high is None else f' < {high}'}"
            )


def boolean(name, x):
    """Refuse masks that are not boolean."""
    kind(name, x)
    dtype = np.dtype(x.dtype)
    if dtype.kind == "b":
        return
    hint = f"{name}.astype(bool) if 1 means 'may attend' in your code, ~{name}.astype(bool) if not"
    if dtype.kind in "fc":
        hint = "True means 'may attend'; an additive 0/-inf mask becomes mask == 0"
    raise DTypeError(f"{name} has dtype {dtype}, expected bool; hint: {hint}")


def shapes(**named):
    """Match arrays against shapes written in axis letters.

    Parameters
    ----------
    **named : tuple (array or None, str)
        The argument and its axes, e.g. ``k=(k, "... S D")``. A number stands for itself, ``...``
        (first word only) for leading axes that broadcast with those of the other arguments. None
        is skipped.

    Returns
    -------
    dict
        Letter -> length; under ``"..."`` the broadcast leading shape.

    Raises
    ------
    DTypeError
        When one of them is no float array.
    ShapeError
        When a rank or a length does not fit, naming both arguments.
    """
    sizes, owner, lead, lead_owner = {}, {}, (), None
    for name, (x, axes) in named.items():
        if x is None:
            continue
        floating(name, x)
        words = axes.split()
        free = words[:1] == ["..."]
        words = words[1:] if free else words
        shape = tuple(x.shape)
        if len(shape) < len(words) or (not free and len(shape) != len(words)):
            raise ShapeError(
                f"{name} has shape {shape}, expected ({', '.join(axes.split())}), "
                f"that is {'at least ' if free else ''}{len(words)} axes"
            )
        for word, length in zip(words, shape[len(shape) - len(words) :], strict=True):
            _axis(name, x, word, length, sizes, owner, named)
        if free:
            lead = _lead(name, shape[: len(shape) - len(words)], lead, lead_owner)
            lead_owner = name
    sizes["..."] = lead
    return sizes


def _axis(name, x, word, length, sizes, owner, named):
    """One axis against its letter: the first argument that uses a letter fixes its length."""
    expected = int(word) if word.isdigit() else sizes.setdefault(word, length)
    first = owner.setdefault(word, name)
    if length == expected:
        return
    where = f"as in {first} {tuple(named[first][0].shape)}" if first != name else "as written"
    raise ShapeError(
        f"{name} has {word} = {length} in shape {tuple(x.shape)}, expected {expected} {where}; "
        f"{name} is ({', '.join(named[name][1].split())})"
    )


def _lead(name, shape, lead, lead_owner):
    """Broadcast leading axes, with a hint where grouped heads were probably meant."""
    try:
        return np.broadcast_shapes(shape, lead)
    except ValueError:
        hint = "leading axes must be equal or 1"
        grouped = shape and lead and shape[-1] and shape[:-1] == lead[:-1]
        if grouped and lead[-1] % shape[-1] == 0:
            hint = "fewer key heads than query heads are the method heads/multi_query"
        raise ShapeError(
            f"{name} has leading axes {shape}, expected {lead} as in {lead_owner}; hint: {hint}"
        ) from None


def check_mask(x, shape, name="mask", axes="(..., T, S)"):
    """Check a boolean mask against the shape it must broadcast to.

    Parameters
    ----------
    x : bool ndarray or None
        True = may attend.
    shape : tuple of int
        The full shape of the scores, leading axes included.
    """
    if x is None:
        return
    boolean(name, x)
    _broadcasts(name, x, shape, axes)


def check_bias(x, shape, name="bias", axes="(..., T, S)"):
    """Check an additive bias against the shape of the scores it is added to."""
    if x is None:
        return
    floating(name, x)
    _broadcasts(name, x, shape, axes)


def _broadcasts(name, x, shape, axes):
    got = tuple(x.shape)
    try:
        fits = np.broadcast_shapes(got, shape) == tuple(shape)
    except ValueError:
        fits = False
    if not fits:
        hint = f"expected to broadcast to {tuple(shape)}, that is {axes}"
        turned = len(got) > 1 and got[-2:] == tuple(shape[-1:-3:-1]) and got[-2] != got[-1]
        if turned:
            hint += "; hint: it looks transposed, rows are queries and columns are keys"
        raise ShapeError(f"{name} has shape {got}, {hint}")


def option(name, value, choices):
    """Refuse a word that is not one of the choices, with the nearest one as a hint."""
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), [str(c) for c in choices], 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ParameterError(
        f"{name} is {value!r}, expected one of {', '.join(map(repr, choices))}{hint}"
    )


def number(name, value, *, low=None, high=None, open_low=False, open_high=False, unit=""):
    """Refuse a number that is not finite, not real, or outside its interval.

    Parameters
    ----------
    name : str
        The parameter's name.
    value : float or None
        None passes (the default is used).
    low, high : float, optional
        Ends of the interval; ``open_low``, ``open_high`` exclude them.
    unit : str, optional
        For the message: tokens, nats, radians, bytes.
    """
    if value is None:
        return
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.number)):
        raise ParameterError(f"{name} is {value!r}, expected a real number {unit}".rstrip())
    bad = not math.isfinite(value)
    bad = bad or (low is not None and (value < low or (open_low and value == low)))
    bad = bad or (high is not None and (value > high or (open_high and value == high)))
    if bad:
        left = "" if low is None else f"{low} {'<' if open_low else '<='} "
        right = "" if high is None else f" {'<' if open_high else '<='} {high}"
        raise ParameterError(
            f"{name} is {value!r}, expected a finite number {left}{name}{right} {unit}".rstrip()
        )


def count(name, value, *, low=0, high=None, unit=""):
    """Refuse what is not an integer in ``low <= value <= high``."""
    if value is None:
        return
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.bool_))
    if not whole or value < low or (high is not None and value > high):
        right = "" if high is None else f" <= {high}"
        raise ParameterError(
            f"{name} is {value!r}, expected an integer {low} <= {name}{right} {unit}".rstrip()
        )


def generator(name, value):
    """Refuse everything but a ``numpy.random.Generator``: no hidden global seed."""
    if not isinstance(value, np.random.Generator):
        raise DTypeError(
            f"{name} is a {type(value).__name__}, expected a numpy.random.Generator; "
            "hint: np.random.default_rng(seed)"
        )


def memory(shape, dtype, what="the scores", hint="a kernel: attention_ref.run(..., backend=)"):
    """Refuse, before allocating, a tensor of more than 2 GiB."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size > MEMORY_LIMIT:
        raise MemoryLimitError(
            f"{what} of shape {tuple(shape)} need {size / 1024**3:.1f} GiB, "
            f"the limit is {MEMORY_LIMIT / 1024**3:.0f} GiB; hint: {hint}"
        )


EMPTY_ROWS = ("zero", "nan", "uniform", "raise")
ALIGNMENTS = ("lower_right", "upper_left")


def attention(
    q, k, v, *, mask=None, bias=None, align="lower_right", scale=None, softcap=None,
    empty_row="zero",
):  # fmt: skip
    """Check the arguments that every softmax-like attention shares.

    Parameters
    ----------
    q, k, v : ndarray, shapes (..., T, D), (..., S, D), (..., S, E)
        Queries, keys, values.
    mask, bias, align, scale, softcap, empty_row
        As in ``scores/dot_product``.

    Returns
    -------
    dict
        The lengths T, S, D, E and the broadcast leading shape under ``"..."``.
    """
    n = shapes(q=(q, "... T D"), k=(k, "... S D"), v=(v, "... S E"))
    if n["D"] == 0:
        raise ShapeError(f"q has width D = 0 in shape {tuple(q.shape)}, expected at least 1")
    full = (*n["..."], n["T"], n["S"])
    check_mask(mask, full)
    check_bias(bias, full)
    option("align", align, ALIGNMENTS)
    option("empty_row", empty_row, EMPTY_ROWS)
    number("scale", scale)
    number("softcap", softcap, low=0, open_low=True)
    memory(full, q.dtype)
    return n


def cotangent(dout, shape, name="dout"):
    """Check an upstream gradient: exactly the shape of the output it belongs to.

    Parameters
    ----------
    dout : ndarray
        Gradient of an output.
    shape : tuple of int
        That output's shape.
    """
    floating(name, dout)
    if tuple(dout.shape) != tuple(shape):
        raise ShapeError(
            f"{name} has shape {tuple(dout.shape)}, expected {tuple(shape)}, "
            "the shape of the output it is the gradient of"
        )
