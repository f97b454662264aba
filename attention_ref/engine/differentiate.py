"""Four ways to a derivative, for functions of named arrays.

1. `vjp` runs the function on traced arrays and reads the tape backwards: all gradients of one
   number for the price of a few evaluations.
2. `jvp` runs it once at x + i h t with h = 1e-30. For an analytic function the imaginary part is
   h times the derivative along t, and since nothing is subtracted it is exact to rounding.
3. `complex_gradient` does the same for one coordinate after another: the slow and certain gradient.
4. `difference` evaluates at x - 2ht, x - ht, x + ht, x + 2ht, and needs no more than real numbers.

They share no code but the handling of nested results, so where they agree they are right.
"""

import contextlib
import contextvars

import numpy as np

from .foreign import Foreign
from .tape import Tape, Traced, collector_paused

STEP = 1e-30  # far below the rounding of any x, far above the smallest number

_complex_allowed = contextvars.ContextVar("attention_ref_complex_allowed", default=False)


@contextlib.contextmanager
def complex_step():
    """Let argument checks accept complex arrays inside this block, in this thread or task.

    Examples
    --------
    >>> with complex_step():
    ...     complex_allowed()
    True
    >>> complex_allowed()
    False
    """
    token = _complex_allowed.set(True)
    try:
        yield
    finally:
        _complex_allowed.reset(token)


def complex_allowed():
    """Whether the caller runs inside `complex_step`.

    Returns
    -------
    bool
    """
    return _complex_allowed.get()


def value(x):
    """The plain array inside a `Traced` or `Foreign` array; anything else is returned as it is.

    Parameters
    ----------
    x : Traced, Foreign or any object

    Returns
    -------
    ndarray or the object itself
    """
    return x.value if isinstance(x, (Traced, Foreign)) else x


# ---- nested results ------------------------------------------------------------------------------


def map_leaves(function, tree, *others):
    """Apply a function to the leaves of tuples, named tuples, lists and dicts, keeping the form.

    Further trees must have the form of the first, except that None may stand for any part.

    Examples
    --------
    >>> map_leaves(lambda a, b: (a, b), {"x": 1, "y": (2, 3)}, {"x": 4, "y": None})
    {'x': (1, 4), 'y': ((2, None), (3, None))}
    """
    if isinstance(tree, dict):
        parts = [{} if t is None else t for t in others]
        return {k: map_leaves(function, v, *[p.get(k) for p in parts]) for k, v in tree.items()}
    if isinstance(tree, (tuple, list)):
        parts = [[None] * len(tree) if t is None else t for t in others]
        if any(len(p) != len(tree) for p in parts):
            raise ValueError(f"expected {len(tree)} parts, got {[len(p) for p in parts]}")
        items = [map_leaves(function, *row) for row in zip(tree, *parts)]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return function(tree, *others)


def inner_product(dout, out):
    """The sum of products over all leaves; None in `dout` counts as zero."""
    products = []

    def multiply(leaf, g):
        if g is not None:
            products.append(np.sum(g * leaf))

    map_leaves(multiply, out, dout)
    return sum(products)


def is_float(x):
    """Whether this is an array that a gradient can belong to."""
    return isinstance(x, np.ndarray) and x.dtype.kind == "f"


def chosen(kwargs, wrt):
    """The names to differentiate: those given, or those of every float array."""
    names = [name for name, x in kwargs.items() if is_float(x)] if wrt is None else list(wrt)
    for name in names:
        if name not in kwargs:
            raise ValueError(f"wrt: no argument is named {name!r}; there are {sorted(kwargs)}")
        if not is_float(kwargs[name]):
            raise TypeError(f"{name}: only a float32 or float64 array has a gradient")
    return names


# ---- the four ways -------------------------------------------------------------------------------


def vjp(f, kwargs, wrt=None):
    """Value of a function and its pull-back, by the tape.

    Parameters
    ----------
    f : callable
        Called as ``f(**kwargs)``; written with NumPy functions.
    kwargs : dict
        Arguments by name. What is not a float array is passed through untouched.
    wrt : list of str, optional
        Arguments to differentiate; by default every float array.

    Returns
    -------
    out : array, or tuple, named tuple, list or dict of them
        The value, in plain arrays.
    pull : callable
        ``pull(dout)``, with `dout` in the form of `out` and None where nothing arrives, returns a
        dict from name to gradient, in the shape and dtype of the argument.

    Raises
    ------
    NoGradientRule
        If `f` calls a NumPy function that has no rule.
    TracedError
        If `f` writes into a traced array or turns one into a number or a truth value.

    Examples
    --------
    >>> out, pull = vjp(lambda x, y: x * y, {"x": np.array([1.0, 2.0]), "y": np.array(3.0)})
    >>> out
    array([3., 6.])
    >>> {name: grad.tolist() for name, grad in pull(np.array([1.0, 10.0])).items()}
    {'x': [3.0, 30.0], 'y': 21.0}
    """
    tape = Tape()
    traced = {name: tape.record(kwargs[name]) for name in chosen(kwargs, wrt)}
    with collector_paused():
        out = f(**{**kwargs, **traced})

    def pull(dout):
        seeds = []

        def seed(leaf, grad):
            if isinstance(leaf, Traced) and grad is not None:
                if np.shape(grad) != leaf.shape:
                    raise ValueError(
                        f"dout: got shape {np.shape(grad)}, expected that of out, {leaf.shape}"
                    )
                seeds.append((leaf.index, np.asarray(grad)))

        map_leaves(seed, out, dout)
        with collector_paused():
            grads = tape.backward(seeds)
        return {
            name: grads[x.index] if x.index in grads else np.zeros_like(x.value)
            for name, x in traced.items()
        }

    return map_leaves(value, out), pull


def jvp(f, kwargs, tangents):
    """Derivative of a function along a direction, by the complex step.

    Parameters
    ----------
    f : callable
        Called as ``f(**kwargs)``; analytic where it is evaluated.
    kwargs : dict
        Arguments by name.
    tangents : dict of str to ndarray
        The direction, for the arguments that move; each in the shape of its argument.

    Returns
    -------
    array, or tuple, named tuple, list or dict of them
        The derivative, in the form of the result of `f`. float32 is widened to float64.

    Notes
    -----
    `np.abs`, `np.linalg.norm`, `np.var` and `.real` drop the imaginary part: the derivative along
    them comes out as zero, without a warning.

    Examples
    --------
    >>> jvp(lambda x: x ** 3, {"x": np.array([1.0, 2.0])}, {"x": np.array([1.0, 1.0])})
    array([ 3., 12.])
    """
    steps = {name: 1j * STEP * np.asarray(t, np.float64) for name, t in tangents.items()}
    moved = {name: kwargs[name] + step for name, step in steps.items()}
    with complex_step():
        out = f(**{**kwargs, **moved})
    return map_leaves(lambda leaf: None if leaf is None else np.imag(leaf) / STEP, out)


def complex_gradient(f, kwargs, dout, wrt=None):
    """Gradient of ``<dout, f>`` by the complex step, one coordinate after another.

    Parameters
    ----------
    f : callable
        Called as ``f(**kwargs)``; analytic where it is evaluated.
    kwargs : dict
        Arguments by name.
    dout : array, or tuple, named tuple, list or dict of them
        In the form of the result; None where nothing arrives.
    wrt : list of str, optional
        Arguments to differentiate; by default every float array.

    Returns
    -------
    dict of str to ndarray
        Gradients in the shape and dtype of the arguments.

    Examples
    --------
    >>> complex_gradient(lambda x: x ** 3, {"x": np.array([1.0, 2.0])}, np.array([1.0, 10.0]))
    {'x': array([  3., 120.])}
    """
    names = chosen(kwargs, wrt)
    moved = {name: kwargs[name].astype(np.complex128) for name in names}
    grads = {name: np.zeros_like(kwargs[name]) for name in names}
    for name in names:
        for place in np.ndindex(kwargs[name].shape):
            moved[name][place] += 1j * STEP
            with complex_step():
                out = f(**{**kwargs, **moved})
            grads[name][place] = inner_product(dout, map_leaves(np.imag, out)) / STEP
            moved[name][place] = kwargs[name][place]
    return grads


def difference(f, kwargs, tangents, h=1e-3):
    """Derivative of a function along a direction, by a central difference of fourth order.

    Parameters
    ----------
    f : callable
        Called as ``f(**kwargs)``.
    kwargs : dict
        Arguments by name.
    tangents : dict of str to ndarray
        The direction, for the arguments that move.
    h : float, optional
        The step, in the units of the tangents.

    Returns
    -------
    array, or tuple, named tuple, list or dict of them
        The derivative, in the form of the result of `f`.

    Examples
    --------
    >>> slope = difference(lambda x: np.sin(x), {"x": np.zeros(2)}, {"x": np.array([1.0, 2.0])})
    >>> bool(np.max(np.abs(slope - [1.0, 2.0])) < 1e-11)
    True
    """

    def at(step):
        moved = {name: kwargs[name] + step * t for name, t in tangents.items()}
        return f(**{**kwargs, **moved})

    def combine(near_up, near_down, far_up, far_down):
        if near_up is None:
            return None
        near = np.subtract(near_up, near_down, dtype=float)
        far = np.subtract(far_up, far_down, dtype=float)
        return (8 * near - far) / (12 * h)

    return map_leaves(combine, at(h), at(-h), at(2 * h), at(-2 * h))
