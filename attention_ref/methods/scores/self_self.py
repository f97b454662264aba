r"""Self-self attention (GEM): queries attend to queries, keys to keys, values to values.

.. math::

    y_t    &= x_t / \lVert x_t \rVert                                                       &(1)\\
    B_{ts} &= e^{\tau\, y_t \cdot y_s} / \textstyle\sum_{s'} e^{\tau\, y_t \cdot y_{s'}}    &(2)\\
    x_t    &\leftarrow \textstyle\sum_s B_{ts}\, y_s                                        &(3)\\
    p      &= (B^q + B^k + B^v) / 3                                                         &(4)\\
    o_t    &= \textstyle\sum_s p_{ts}\, v_s                                                 &(5)

for each of x = q, k, v in turn: (1) to (3) are repeated I times, then (1) and (2) once more give
the map of (4), which mixes the values as they came. A map of a set of vectors with itself is
symmetric before the softmax, and every token is nearest to itself: (3) pulls similar tokens
together and sharpens the groups that a frozen transformer already has. The inverse temperature is
:math:`\tau = \frac1N \sum_n \lVert X_n \rVert / \sqrt D` of the block's input X unless it is given.

Source: Bousselham, Petersen, Ferrari, Kuehne 2024, *Grounding Everything*; official code
WalBouss/GEM, gem/gem_utils.py, read; grade A.
"""

from typing import NamedTuple

import numpy as np

from attention_ref import core


class Step(NamedTuple):
    """One passage through (1) and (2)."""

    y: np.ndarray  # (..., N, D), unit vectors
    length: np.ndarray  # (..., N, 1), of what was normalised; 1 for a zero vector
    gram: np.ndarray  # (..., N, N), cosines
    b: np.ndarray  # (..., N, N), weights


class Cache(NamedTuple):
    """What the backward needs, and what implementers compare with (``p``, ``maps``, ``tau``)."""

    v: np.ndarray  # (..., N, E), zeros where a non-finite number stood
    direction: np.ndarray | None  # (..., N, C), x with rows of length 1
    steps: dict  # "q", "k", "v" -> list of Step, I + 1 of them
    maps: dict  # "q", "k", "v" -> (..., N, N), B of the last step
    p: np.ndarray  # (..., N, N), mean of the maps
    factor: float  # what the sum of the lengths of x was multiplied by
    tau: np.ndarray | float  # (..., 1, 1) when it was made from x
    poison: np.ndarray  # (..., 1, 1), heads that are NaN
    shapes: dict  # of the array arguments that were given


def normalise_forward(x):
    """Step (1); a zero vector stays zero.

    Parameters
    ----------
    x : ndarray, shape (..., N, D)
        Tokens.

    Returns
    -------
    y : ndarray, shape (..., N, D)
        Unit vectors.
    length : ndarray, shape (..., N, 1)
        What x was divided by.
    """
    square = np.sum(np.square(x), axis=-1, keepdims=True)
    length = np.sqrt(np.where(square > 0, square, 1.0))
    return x / length, length


def normalise_backward(dy, y, length):
    """dx = (dy - y (y.dy)) / length: what points along y is lost.

    Parameters
    ----------
    dy, y : ndarray, shape (..., N, D)
        Gradient of the unit vectors, and they.
    length : ndarray, shape (..., N, 1)
        From the forward.

    Returns
    -------
    ndarray, shape (..., N, D)
    """
    return (dy - y * np.sum(y * dy, axis=-1, keepdims=True)) / length


def step_forward(x, tau):
    """Steps (1) and (2).

    Parameters
    ----------
    x : ndarray, shape (..., N, D)
        Tokens.
    tau : ndarray or float, broadcast to (..., 1, 1)
        Inverse temperature, nats.

    Returns
    -------
    Step
    """
    y, length = normalise_forward(x)  # (1)
    gram = core.scores_forward(y, y, 1.0)
    b, _ = core.softmax_forward(tau * gram, core.visible(y, y))  # (2)
    return Step(y, length, gram, b)


def step_backward(db, dy, step, tau):
    """(2') and (1'): the gram matrix is symmetric in its two arguments, so dz counts both ways.

    Parameters
    ----------
    db : ndarray, shape (..., N, N)
        Gradient of the map.
    dy : ndarray, shape (..., N, D), or 0
        Gradient of the unit vectors from (3).
    step : Step
        From the forward.
    tau : ndarray or float
        Inverse temperature.

    Returns
    -------
    dx : ndarray, shape (..., N, D)
        Gradient of the tokens.
    dtau : ndarray, shape (..., 1, 1)
        Gradient of tau.
    """
    dz = core.softmax_backward(db, step.b, core.visible(step.y, step.y))  # (2')
    dtau = np.sum(dz * step.gram, axis=(-2, -1), keepdims=True)
    dy = dy + (tau * (dz + np.swapaxes(dz, -1, -2))) @ step.y
    return normalise_backward(dy, step.y, step.length), dtau  # (1')


def path_backward(db, steps, tau):
    """All steps of one path from the last to the first.

    Parameters
    ----------
    db : ndarray, shape (..., N, N)
        Gradient of the last map.
    steps : list of Step
        From the forward.
    tau : ndarray or float
        Inverse temperature.

    Returns
    -------
    dx : ndarray, shape (..., N, D)
        Gradient of q, k or v as the source of a path.
    dtau : ndarray, shape (..., 1, 1)
        Gradient of tau.
    """
    dx, dtau = step_backward(core.sum_to(db, steps[-1].b.shape), 0.0, steps[-1], tau)
    for step in steps[-2::-1]:
        db, dy = core.mix_backward(dx, step.b, step.y)  # (3')
        dx, more = step_backward(db, dy, step, tau)
        dtau = dtau + more
    return dx, dtau


def self_self_forward(q, k, v, x=None, *, tau=None, iterations=1, paths="qkv"):
    """Mix the values with the mean of three maps of queries, keys and values with themselves.

    Parameters
    ----------
    q : ndarray, shape (..., H, N, D)
        Queries of the frozen model, after the projection; the head axis may be absent.
    k : ndarray, shape (..., H, N, D)
        Keys.
    v : ndarray, shape (..., H, N, E)
        Values.
    x : ndarray, shape (..., 1, N, C), optional
        What the block's projections read, after its layer norm; its mean length makes tau.
    tau : float, >= 0, nats, optional
        Inverse temperature of cosines, instead of x.
    iterations : int
        How often (1) to (3) are repeated, I.
    paths : str
        Which of q, k, v are used; their maps are averaged.

    Returns
    -------
    out : ndarray, shape (..., H, N, E)
        Outputs.
    cache : Cache
        For the backward; holds ``p``, ``maps`` and ``tau``.

    Raises
    ------
    ShapeError
        When widths, lengths or leading axes do not fit.
    DTypeError
        When an argument is no float32 or float64 array.
    ParameterError
        When an option or a number is outside its domain, or not one of tau and x is given.
    MemoryLimitError
        When a map would take more than 2 GiB.

    Notes
    -----
    The method is free of training; the gradients are for those who train through it. There is no
    mask: every token is query and key at once, and a non-finite number makes its whole head NaN.
    The official code divides by max(length, 1e-12); here a zero vector stays zero and gets the
    gradient of a division by 1. Its block runs two streams: the model's own, and one to which only
    these outputs are added, projected, without the MLP, in the last blocks; both are the caller's.

    Source
    ------
    scores/self_self in the catalog; official code; grade A.

    References
    ----------
    Bousselham, Petersen, Ferrari, Kuehne 2024, Grounding Everything: Emerging Localization
    Properties in Vision-Language Transformers.

    Examples
    --------
    >>> import numpy as np
    >>> q, v = np.eye(2), np.array([[4.0], [8.0]])
    >>> out, cache = self_self_forward(q, 5.0 * q, v, tau=np.log(3.0), iterations=0, paths="qk")
    >>> out.round(12).tolist(), cache.p.round(12).tolist()
    ([[5.0], [7.0]], [[0.75, 0.25], [0.25, 0.75]])
    """
    n = core.check.shapes(q=(q, "... N D"), k=(k, "... N D"), v=(v, "... N E"), x=(x, "... N C"))
    core.check.number("tau", tau, low=0, unit="nats")
    core.check.count("iterations", iterations)
    if not paths or set(paths) - set("qkv") or len(set(paths)) < len(paths):
        raise core.errors.ParameterError(f"paths is {paths!r}, expected some letters of 'qkv'")
    if (tau is None) == (x is None):
        raise core.errors.ParameterError(
            f"tau is {tau!r} and x is {'not ' * (x is None)}given, expected one of the two"
        )
    core.check.memory((*n["..."], n["N"], n["N"]), q.dtype, "the maps", "fewer tokens")
    given = {"q": q, "k": k, "v": v} | ({} if x is None else {"x": x})
    shapes = {name: a.shape for name, a in given.items()}
    poison = np.zeros_like(q, shape=(1, 1), dtype=bool)
    for a in given.values():
        poison = poison | np.any(~np.isfinite(a), axis=(-2, -1), keepdims=True)
    given = {name: np.where(np.isfinite(a), a, 0.0) for name, a in given.items()}

    direction, factor = None, core.default_scale(n["D"]) / max(n["N"], 1)
    if x is not None:
        direction, _ = normalise_forward(given["x"])
        total = np.sum(direction * given["x"], axis=(-2, -1), keepdims=True)
        tau = total * factor
    steps = {}
    for path in paths:
        steps[path] = [step_forward(given[path], tau)]  # (1) (2)
        for _ in range(iterations):
            moved = core.mix_forward(steps[path][-1].b, steps[path][-1].y)  # (3)
            steps[path].append(step_forward(moved, tau))
    maps = {path: passed[-1].b for path, passed in steps.items()}
    p = sum(maps.values()) / len(paths)  # (4)
    out = core.mix_forward(p, given["v"])  # (5)

    out = np.where(poison, np.nan, out)
    return out, Cache(given["v"], direction, steps, maps, p, factor, tau, poison, shapes)


def self_self_backward(dout, cache):
    """Gradients of :func:`self_self_forward`, its steps read from the bottom up.

    Parameters
    ----------
    dout : ndarray, shape (..., H, N, E)
        Gradient of the output.
    cache : Cache
        From the forward.

    Returns
    -------
    dict
        Under "q", "k", "v" and, when given, "x"; v is a source of a path and is mixed.
    """
    v, direction, steps, _, p, factor, tau, poison, shapes = cache
    lead = np.broadcast_shapes(p.shape[:-2], v.shape[:-2])
    core.check.cotangent(dout, (*lead, p.shape[-2], v.shape[-1]))
    dout = np.where(poison, 0.0, dout)

    gradients = {name: np.zeros_like(v, shape=shapes[name]) for name in "qk"}
    dp, gradients["v"] = core.mix_backward(dout, p, v)  # (5')
    dtau = 0.0
    for path, passed in steps.items():
        dx, more = path_backward(dp / len(steps), passed, tau)  # (4') (3') (2') (1')
        gradients[path] = gradients[path] + core.sum_to(dx, shapes[path])
        dtau = dtau + (core.sum_to(more, tau.shape) if direction is not None else 0.0)
    if direction is not None:
        gradients["x"] = direction * dtau * factor
    return gradients


def _example(rng):
    """Widths, lengths and options differ from case to case; half of them make tau from x.

    Tokens lie to one side of the origin: averages of length 0 have no direction to differ in.
    """
    sizes = {  # case: leading axes, N, D, E, width of x, options
        "plain": ((2,), 5, 4, 3, None, {"tau": 2.0}),
        "no-heads": ((), 6, 3, 5, 7, {"iterations": 2}),
        "no-iteration": ((2,), 7, 4, 2, 3, {"iterations": 0}),
        "batch": ((3, 2), 3, 5, 4, 2, {"iterations": 1}),
        "one-path": ((2,), 5, 3, 4, 2, {"paths": "k"}),
        "values-alone": ((2,), 4, 3, 6, None, {"tau": 0.7, "paths": "v", "iterations": 3}),
    }
    cases = {}
    for name, (lead, N, D, E, C, options) in sizes.items():
        tokens = core.examples.qkv(rng, lead, N, N, D, E)
        cases[name] = {n: a + 1.0 for n, a in tokens.items()} | options
        if C is not None:
            shared = (*lead[:-1], *(1 for _ in lead[-1:]))  # one block input for all heads
            cases[name]["x"] = rng.standard_normal((*shared, N, C))
    return cases


def _unit(rng):
    """Three equal unit arrays: three equal maps."""
    y, _ = normalise_forward(rng.standard_normal((2, 5, 4)))
    return {"q": y, "k": y, "v": y, "tau": 1.3, "iterations": 0}


def _flat(rng):
    return _example(rng)["plain"] | {"tau": 0.0}


def _dot(kwargs):
    return {n: kwargs[n] for n in "qkv"} | {"scale": kwargs["tau"]}


SPEC = core.Mechanism(
    key="scores/self_self",
    forward=self_self_forward,
    backward=self_self_backward,
    example=_example,
    flags=frozenset({"row_stochastic"}),
    reduces_to=(
        core.Reduction(
            "scores/dot_product", "equal unit q, k, v, no iteration: one map", _unit, _dot,
            gradients=False,  # the unit vectors are normalised again, which takes a part away
        ),
        core.Reduction("scores/dot_product", "tau = 0 is the mean of the values", _flat, _dot),
    ),
    claim=(
        "Self-self attention clusters: at the right temperature its iterations draw tokens of one "
        "group together and leave groups apart; too warm, all collapse; too cold, nothing moves."
    ),
    verified_by=("slow loop", "PyTorch"),
)  # fmt: skip
