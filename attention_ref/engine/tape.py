"""Reverse-mode differentiation of ordinary NumPy code: a tape in five steps.

1. A `Traced` array is a NumPy value together with its place on a `Tape`. NumPy asks every argument
   of its functions whether it wants to handle the call (`__array_ufunc__`, `__array_function__`);
   a traced array says yes, so `np.exp(x)` in an unchanged program arrives here.
2. `apply` computes the value with plain NumPy, looks up the rule of the function in `rules.py`, and
   writes one `Step` on the tape: from which earlier steps the value came, and for each of them a
   *pull*, the function that turns the gradient of the result into the gradient of that argument.
3. The tape is a list in the order of computation. A step depends only on steps before it, so
   reading the list backwards meets every step after all its readers: no search and no recursion.
4. `Tape.backward` reads it backwards. A value that was used several times receives the sum of what
   its readers send; a value that NumPy repeated by broadcasting receives the sum over the copies.
5. What would break the record is refused with the reason: writing into a traced array, turning it
   into a number or a truth value, a function without a rule.
"""

import contextlib
import gc
import inspect
import operator
from collections.abc import Callable
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from .rules import CONSTANT, LIKE, RULES, SCIPY, SENTENCES, At


class TracedError(TypeError):
    """A traced array was used in a way that the tape cannot follow."""


class NoGradientRule(TracedError):
    """A NumPy function without a rule in `engine/rules.py` was called on a traced array."""


# ---- the tape ------------------------------------------------------------------------------------


class Step(NamedTuple):
    """One line of the tape: the form of a value and where it came from."""

    shape: tuple
    dtype: np.dtype
    edges: tuple[tuple[int, Callable], ...]  # (earlier step, pull); empty for an input


class Tape:
    """The steps of one computation, in order."""

    def __init__(self):
        self.steps = []

    def record(self, value, edges=()):
        """Write one step and return its value as a `Traced`."""
        self.steps.append(Step(value.shape, value.dtype, tuple(edges)))
        return Traced(value, self, len(self.steps) - 1)

    def backward(self, seeds):
        """Send gradients from the outputs to the inputs.

        Parameters
        ----------
        seeds : list of (int, ndarray)
            Steps of outputs, each with the gradient that arrives there.

        Returns
        -------
        dict of int to ndarray
            Step of an input to its gradient; inputs that nothing was sent to are absent.
        """
        totals = {}

        def send(index, part):
            if index not in totals:
                totals[index] = Total(self.steps[index])
            totals[index].add(part)

        for index, seed in seeds:
            send(index, seed)
        for index in reversed(range(len(self.steps))):
            edges = self.steps[index].edges
            if edges and index in totals:
                grad = totals.pop(index).value  # complete: all readers of this step came later
                for parent, pull in edges:
                    send(parent, pull(grad))
        return {index: total.own() for index, total in totals.items()}


@contextlib.contextmanager
def collector_paused():
    """Stop Python's search for reference cycles while a tape is recorded.

    A tape is many small objects without a cycle; each search would walk over all of it again and
    find nothing, which takes longer than the recording.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Total:
    """The sum of the gradients that the readers of one value send.

    The first part is only borrowed, because it may be a view of another gradient. The first
    addition makes a buffer of our own, and later parts are added in place. An `At` part touches
    only its own slice of the buffer: a loop that reads `x[t]` at each step stays linear.
    """

    def __init__(self, step):
        self.shape, self.dtype = step.shape, step.dtype
        self.value, self.owned = None, False

    def add(self, part):
        if isinstance(part, At):
            self._add_at(*part)
            return
        part = np.asarray(unbroadcast(part, self.shape), self.dtype)
        if self.value is None:
            self.value = part
        else:
            out = self.value if self.owned else np.empty(self.shape, self.dtype)
            self.value, self.owned = np.add(self.value, part, out=out), True

    def _add_at(self, index, part):
        total = self.own()
        if reads_each_place_once(index):
            total[index] += part
        else:
            np.add.at(total, index, part)

    def own(self):
        """The sum in a buffer that nobody else holds."""
        if not self.owned:
            empty = self.value is None
            self.value = np.zeros(self.shape, self.dtype) if empty else np.array(self.value)
            self.owned = True
        return self.value


def unbroadcast(grad, shape):
    """Sum a gradient over the axes along which a value of this shape was repeated.

    Examples
    --------
    >>> unbroadcast(np.ones((2, 3, 4)), (3, 1))
    array([[8.],
           [8.],
           [8.]])
    """
    if np.shape(grad) == shape:
        return grad
    new = np.ndim(grad) - len(shape)
    repeated = [new + i for i, n in enumerate(shape) if n == 1 and grad.shape[new + i] != 1]
    return np.sum(grad, axis=(*range(new), *repeated), keepdims=True).reshape(shape)


def reads_each_place_once(index):
    """True unless the index holds integer arrays or lists, which may name a place twice."""
    items = index if isinstance(index, tuple) else (index,)
    basic = (int, np.integer, slice, type(None), type(...))
    return all(isinstance(i, basic) or getattr(i, "dtype", None) == np.bool_ for i in items)


# ---- recording -----------------------------------------------------------------------------------


def apply(function, args, kwargs):
    """Call a NumPy function whose arguments hold traced arrays, and record the step."""
    if kwargs.get("out") is not None:
        raise TracedError(
            f"{name_of(function)}(..., out=) writes into an existing array, and `x += y` does the "
            "same; the tape would still hold the old value. Write x = x + y instead."
        )
    if function in LIKE:  # the first argument lends its form only; a traced fill value is refused
        named = {key: plain(x) if key in ("a", "prototype") else x for key, x in kwargs.items()}
        return function(*plain(args[:1]), *args[1:], **named)
    if function in CONSTANT:
        return function(*plain(args), **{name: plain(a) for name, a in kwargs.items()})
    if function in SENTENCES:
        return call(SENTENCES[function], function, args, kwargs)
    rule = RULES.get(function) or SCIPY.get(name_of(function))
    if rule is None:
        raise NoGradientRule(f"{name_of(function)} has no gradient rule. {hint(function)}")

    bare, bare_kwargs = plain(args), {name: plain(a) for name, a in kwargs.items()}
    value = function(*bare, **bare_kwargs)
    if value.dtype.kind == "c":
        raise TracedError(f"{name_of(function)} made complex numbers; the tape is for real ones.")
    if value.dtype.kind != "f":
        return value  # whole numbers and truth values do not vary
    pulls = call(rule, function, (value, *bare), bare_kwargs)
    edges = list(pair(function, in_order(rule, args, kwargs), pulls))
    tape = edges[0][0].tape
    if any(parent.tape is not tape for parent, _ in edges):
        raise TracedError(f"{name_of(function)} mixes traced arrays of two different tapes.")
    return tape.record(value, [(parent.index, pull) for parent, pull in edges])


def plain(x):
    """Replace traced arrays by their values, also inside lists and tuples."""
    if isinstance(x, Traced):
        return x.value
    if type(x) in (list, tuple):
        return type(x)([plain(item) for item in x])
    return x


def pair(function, args, pulls):
    """Yield (traced argument, its pull); a list of arrays goes with a list of pulls."""
    for place, (arg, pull) in enumerate(zip_longest(args, pulls)):
        if isinstance(arg, (list, tuple)) and isinstance(pull, list):
            yield from pair(function, arg, pull)
        elif isinstance(arg, Traced):
            if not callable(pull):
                wanted = "a list of arrays" if pull else "a plain array or number"
                raise NoGradientRule(f"{name_of(function)} takes {wanted} as argument {place + 1}.")
            yield arg, pull


def in_order(rule, args, kwargs):
    """The arguments in the order of the rule's parameters, traced ones given by name included."""
    if not any(isinstance(a, Traced) for a in kwargs.values()):
        return args
    names = list(inspect.signature(rule).parameters)[1 + len(args) :]  # the first one is `out`
    return [*args, *map(kwargs.get, names)]


def call(rule, function, args, kwargs):
    """Call a rule; a keyword that it does not know is reported as a missing rule."""
    try:
        return rule(*args, **kwargs)
    except TypeError as error:
        try:
            inspect.signature(rule).bind(*args, **kwargs)
        except TypeError:
            raise NoGradientRule(
                f"{name_of(function)} has a gradient rule, but not for this form of call: {error}"
            ) from None
        raise


def name_of(function):
    """The name under which users know a function: `np.exp`, `np.linalg.solve`, `x[index]`."""
    if function is operator.getitem:
        return "x[index]"
    if isinstance(function, np.ufunc):
        known = getattr(np, function.__name__, None) is function
        return ("np." if known else "scipy.special.") + function.__name__
    return f"{function.__module__}.{function.__name__}".replace("numpy", "np", 1)


HINTS = {
    np.linalg.norm: "Write np.sqrt(np.sum(x * x, axis)), which every reading follows.",
    np.var: "Write the mean of squares, np.mean((x - mean) ** 2, axis).",
    np.std: "Write the root of the mean of squares.",
    np.array: "Build arrays from traced ones with np.stack or np.concatenate.",
    np.copyto: "It writes into an array; use np.where, or np.full_like with a Python number.",
    np.put_along_axis: "It writes into an array; gather with the inverse permutation instead.",
}


def hint(function):
    """What to write instead of a function without a rule."""
    return HINTS.get(function, "Use another function, or add a line to engine/rules.py.")


# ---- the array -----------------------------------------------------------------------------------


class Traced(NDArrayOperatorsMixin):
    """A NumPy array whose computations are recorded on a tape.

    Made by `attention_ref.engine.vjp`; operators, indexing and NumPy functions work as on an array.
    Comparisons, `np.argsort`, `np.isfinite` and the like return plain arrays.

    Parameters
    ----------
    value : ndarray
        The value itself.
    tape : Tape
        Where the computation is recorded.
    index : int
        The step on the tape that made the value.
    """

    __slots__ = ("index", "tape", "value")

    def __init__(self, value, tape, index):
        self.value, self.tape, self.index = value, tape, index

    shape = property(lambda self: self.value.shape)
    dtype = property(lambda self: self.value.dtype)
    ndim = property(lambda self: self.value.ndim)
    size = property(lambda self: self.value.size)
    T = property(lambda self: np.transpose(self))

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        if method != "__call__":
            raise NoGradientRule(
                f"{name_of(ufunc)}.{method} has no gradient rule; use np.sum, np.prod, np.max, "
                "np.cumsum or np.where."
            )
        for keyword in kwargs.keys() - {"out"}:
            raise NoGradientRule(
                f"{name_of(ufunc)} has a gradient rule, but not with {keyword}=; use np.where."
            )
        return apply(ufunc, inputs, kwargs)

    def __array_function__(self, function, types, args, kwargs):
        return apply(function, args, kwargs)

    def __getitem__(self, index):
        return apply(operator.getitem, (self, index), {})

    def __len__(self):
        return len(self.value)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __repr__(self):
        return f"Traced(shape={self.shape}, dtype={self.dtype}, step={self.index})"

    def __setitem__(self, index, new):
        raise TracedError(
            "x[index] = ... writes into a traced array; the tape would still hold the old value. "
            "Use np.where, or collect the parts and join them with np.stack or np.concatenate."
        )

    def __array__(self, *args, **kwargs):
        raise TracedError(
            "a traced array cannot become a plain one: its gradient would be lost. This happens in "
            "np.asarray(x), in np.array([x, y]) (use np.stack) and in buffer[index] = x (collect "
            "the parts, then np.stack)."
        )

    def __bool__(self):
        raise TracedError(
            "a traced array has no truth value: the tape would record one branch only. "
            "Use np.where(condition, x, y)."
        )

    def _number(self, *args):
        raise TracedError(
            "a traced array cannot become a Python number: its gradient would be lost. "
            "Use NumPy functions (np.sqrt, not math.sqrt)."
        )

    __float__ = __int__ = __index__ = __complex__ = __round__ = _number

    def __getattr__(self, name):
        known = not name.startswith("_") and hasattr(np, name)
        advice = f"; use the function np.{name}(x)" if known else ""
        raise AttributeError(f"a traced array has no attribute or method '{name}'{advice}")
