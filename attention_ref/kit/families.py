"""What the lectures on families measure of every member: how its cost grows, and its identities.

growth(spec.forward, arguments, (32, 64, 128))   # exponents of N
identities(spec, seed)                           # every reduces_to, with its error in eps
"""

import numpy as np

from attention_ref.core.registry import get
from attention_ref.engine.differentiate import is_float, map_leaves
from attention_ref.engine.tape import Tape, Traced, collector_paused
from attention_ref.kit import tree
from attention_ref.kit.checks import seed_of
from attention_ref.kit.compare import error, scales


class _Meter(Tape):
    """A tape that remembers sizes and forgets how to go back."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def record(self, value, edges=()):
        self.sizes.append(value.size)
        return Traced(value, self, len(self.sizes) - 1)


def elements(forward, kwargs):
    """Count the floating numbers that a forward computes from its floating arrays.

    Parameters
    ----------
    forward : callable
        Written with NumPy functions.
    kwargs : dict
        Its arguments, also inside lists, tuples and dicts.

    Returns
    -------
    total, largest : int
        Numbers in all intermediate arrays together, and in the largest; arguments do not count,
        nor do truth values, integers and what depends on the lengths alone.
    """
    meter = _Meter()
    given = map_leaves(lambda x: meter.record(x) if is_float(x) else x, kwargs)
    meter.sizes.clear()
    with collector_paused():
        forward(**given)
    return sum(meter.sizes), max(meter.sizes, default=0)


def growth(forward, arguments, lengths):
    """The exponents with which the cost of a forward grows, fitted on a double logarithmic scale.

    Parameters
    ----------
    forward : callable
        As in :func:`elements`.
    arguments : callable
        ``arguments(N)`` gives the call at length N.
    lengths : sequence of int
        Two or more.

    Returns
    -------
    work, largest : float
        Of all numbers together and of the largest array; 2.0 is N^2.

    Examples
    --------
    >>> growth(lambda x: np.sum(x[:, None] * x, axis=1), lambda n: {"x": np.ones(n)}, (64, 128))[1]
    2.0
    """
    counts = np.array([elements(forward, arguments(n)) for n in lengths], float)
    slopes = np.polyfit(np.log(lengths), np.log(counts), 1)[0]
    return tuple(float(x) for x in np.round(slopes, 4))


def identities(spec, seed=0):
    """Run every identity that a SPEC states, outputs and gradients.

    Parameters
    ----------
    spec : Spec
        The member.
    seed : int
        Of the arguments and the upstream gradient.

    Returns
    -------
    list of dict
        "key", "says", "bound" and "eps", the largest error in roundings of the largest entry.
    """
    found = []
    for r in spec.reduces_to:
        rng, other = np.random.default_rng(seed_of(f"{spec.key}-{r.says}", 2 + seed)), get(r.key)
        mine = r.kwargs(rng)
        theirs = r.other(mine)
        (out, cache), (other_out, other_cache) = spec.call(mine), other.call(theirs)
        a, b = (tree.floats(x) for x in r.compare(out, other_out))
        errors = [error(a[name], b[name]) for name in a]
        if r.gradients and spec.backward_function is not None:
            dout = tree.cotangents(rng, other_out)
            hers = other.backward(dout, other_cache)
            ours = spec.backward_function(tree.like(out, tree.floats(dout)), cache)
            size = scales(hers)
            errors += [error(ours[name], hers[name], size[name])
                       for name in sorted(set(hers) & set(ours))
                       if hers[name].shape == ours[name].shape]  # fmt: skip
        found.append({"key": r.key, "says": r.says, "eps": round(max(errors), 3), "bound": r.eps})
    return found
