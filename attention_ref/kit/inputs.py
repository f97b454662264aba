"""The inputs a foreign function is tried on: a row's examples, and those that tell mistakes apart.

``check``, ``cases`` and ``golden export`` all draw from here, so that a case has the same numbers
wherever its name stands.
"""

import inspect

import numpy as np

from attention_ref.core.errors import ParameterError
from attention_ref.kit import checks, tree

SEPARATED = ("scores/dot_product", "heads/multi_query")
"""Rows with cases of their own beyond the examples."""

AXES = {
    "q": "BHTD", "k": "BGSD", "v": "BGSE", "mask": "BHTS", "bias": "BHTS",
}  # fmt: skip
"""Letters of the axes of what can be cut to a smaller size, right-aligned."""


def is_float(a):
    """Whether an argument is a floating array."""
    return isinstance(a, np.ndarray) and a.dtype.kind == "f"


def examples(spec, conventions=None):
    """Every case of a row: name -> keyword arguments, float64.

    Parameters
    ----------
    spec : Spec
        The row.
    conventions : dict, optional
        ``align``: cases that ask for this alignment lose the argument; ``same_width``: values get
        the width of the keys.

    Returns
    -------
    dict
    """
    conventions = conventions or {}
    chosen = {n: four_axes(spec, dict(kwargs)) for n, kwargs in checks.cases(spec).items()}
    if "attention" in spec.flags:
        chosen |= _extreme(spec, chosen)
    chosen |= _defaults(spec, chosen)
    if spec.key in SEPARATED:
        chosen |= _separating(spec)
    for kwargs in chosen.values():
        if kwargs.get("align") == conventions.get("align", "lower_right"):
            del kwargs["align"]
        if conventions.get("same_width") and {"k", "v"} <= set(kwargs):
            v = kwargs["v"]
            more = -(-kwargs["k"].shape[-1] // v.shape[-1])
            kwargs["v"] = np.concatenate([v + i for i in range(more)], -1)
            kwargs["v"] = kwargs["v"][..., : kwargs["k"].shape[-1]]
    return chosen


def four_axes(spec, kwargs):
    """(H, T, D) to (1, H, T, D) where that changes nothing: most kernels take four axes only."""
    q = kwargs.get("q")
    missing = 4 - q.ndim if isinstance(q, np.ndarray) else 0
    if missing <= 0:
        return kwargs
    want = tree.flatten(spec.call(kwargs)[0])
    every = [n for n, a in kwargs.items() if is_float(a) and n != "bias"]
    for names in ("qkv", every):
        wider = {
            n: a.reshape((1,) * missing + a.shape) if n in names else a for n, a in kwargs.items()
        }
        try:
            got = tree.flatten(spec.call(wider)[0])
        except (ValueError, TypeError):
            continue
        if all(
            got[n].size == a.size and np.array_equal(got[n].ravel(), a.ravel(), equal_nan=True)
            for n, a in want.items()
        ) and got["out"].ndim == 4:  # fmt: skip
            return wider
    return kwargs


def _defaults(spec, chosen):
    """The first example without its options: what a function with few arguments can do."""
    parameters = inspect.signature(spec.main).parameters
    base = next(iter(chosen.values()))
    bare = {n: a for n, a in base.items() if n == "rng" or (
        n in parameters and parameters[n].default is inspect.Parameter.empty)}  # fmt: skip
    if not is_float(next(iter(bare.values()), None)) or any(
        set(k) == set(bare) for k in chosen.values()
    ):
        return {}
    try:
        out = tree.flatten(spec.call(bare)[0])
    except (ValueError, TypeError):
        return {}
    return {"defaults": bare} if all(np.all(np.isfinite(a)) for a in out.values()) else {}


def _extreme(spec, chosen):
    """The first example with queries thirty times as large, and with tiny ones."""
    base = next(iter(chosen.values()))
    made = {}
    for name, factor, names in (("large", 30.0, "q"), ("tiny", 1e-3, "qk")):
        kwargs = base | {n: factor * base[n] for n in names if n in base}
        try:
            out = tree.flatten(spec.call(kwargs)[0])
        except (ValueError, TypeError):
            continue
        if all(np.all(np.isfinite(a)) for a in out.values()):
            made[name] = kwargs
    return made


def _separating(spec):
    """Cases in which two readings of the same word give different numbers."""
    rng = np.random.default_rng(checks.seed_of(spec.key, 2))
    square = {n: rng.standard_normal((1, 2, 5, 4)) for n in "qkv"}
    made = {"square": square | {"scale": 0.7},
            "square-causal": square | {"scale": 0.7, "causal": True}}  # fmt: skip
    huge = {n: a.copy() for n, a in square.items()} | {"scale": 0.7}
    huge["q"][..., 0], huge["k"][..., 0] = 1000.0, 1.5  # all scores near 1050
    made["huge"] = huge
    live = np.ones((5, 5), bool)
    live[2] = False
    made["empty-row"] = square | {"scale": 0.7, "mask": live}
    made["read-only"] = {n: _frozen(a) for n, a in square.items()} | {"scale": 0.7}
    wide = np.zeros((1, 2, 5, 4)) + np.arange(4.0)
    made["odd"] = {"q": wide[..., :3] * 0.1 + square["q"][..., :3],
                   "k": square["k"][..., :3], "v": square["v"][..., :1]}  # fmt: skip
    for name in ("one-by-one", "odd-17"):
        T, S, D = (1, 1, 1) if name == "one-by-one" else (9, 13, 17)
        lengths = {"q": (T, D), "k": (S, D), "v": (S, 3)}
        drawn = {n: rng.standard_normal((2, 2, *shape)) for n, shape in lengths.items()}
        made[name] = drawn | {"scale": 0.4}
    made["order"] = square | {
        "scale": 0.7, "softcap": 0.8, "bias": 2.0 * rng.standard_normal((2, 5, 5)),
        "mask": np.tri(5, dtype=bool),
    }  # fmt: skip
    return made


def _frozen(a):
    a = a.copy()
    a.flags.writeable = False
    return a


def cotangent(spec, case, shape):
    """The random upstream gradient of a case: the same wherever its name stands."""
    return np.random.default_rng(checks.seed_of(f"{spec.key}-{case}", 3)).standard_normal(shape)


# ------------------------------------------------------------------------------ sizes


def sizes(kwargs):
    """The lengths of a case by letter, for those arguments whose axes are known."""
    found = {}
    for name, letters in AXES.items():
        a = kwargs.get(name)
        if isinstance(a, np.ndarray) and name in "qkv":
            found |= dict(zip(reversed(letters), reversed(a.shape), strict=False))
    if found.get("G") == found.get("H"):
        found.pop("G", None)
    return found


def resize(kwargs, wanted):
    """A case with other lengths: its first rows, or more of them that look like its own.

    Parameters
    ----------
    kwargs : dict
        Arguments of a case that has q, k, v.
    wanted : dict
        Letter -> length; letters as in the notation: B, H, G, T, S, D, E.

    Returns
    -------
    dict
        An entry depends on its place alone, so that the first rows of a longer case are the same;
        a given scale follows 1/sqrt(D).

    Raises
    ------
    ParameterError
        For a letter that the case does not have, or a length below 1.
    """
    have = sizes(kwargs)
    for letter, n in wanted.items():
        if letter not in have or n < 1:
            raise ParameterError(f"sizes has {letter}={n}, expected 1 <= n for one of {have}")
    if "H" in wanted and "G" not in have:
        wanted = wanted | {"G": wanted["H"]}
    other = dict(kwargs)
    for name, letters in AXES.items():
        a = kwargs.get(name)
        if not isinstance(a, np.ndarray):
            continue
        shape = list(a.shape)
        for i, letter in enumerate(letters[max(len(letters) - a.ndim, 0) :]):
            if letter in wanted and (shape[i] > 1 or name in "qkv"):
                shape[i] = wanted[letter]
        other[name] = _grown(a, tuple(shape), name in "qkv")
    if other.get("scale") is not None and "D" in wanted:  # scores of the same size
        other["scale"] = other["scale"] * (have["D"] / wanted["D"]) ** 0.5
    return other


def _grown(a, shape, channels):
    """The array repeated periodically to a shape and disturbed; new channels are noise alone."""
    place = np.ix_(*(np.arange(n) % m for n, m in zip(shape, a.shape, strict=True)))
    grown = np.ascontiguousarray(a[place])
    if a.dtype.kind != "f" or all(n <= m for n, m in zip(shape, a.shape, strict=True)):
        return grown
    new = np.zeros(shape, bool)
    for axis, (n, m) in enumerate(zip(shape, a.shape, strict=True)):
        new |= (np.arange(n) >= m).reshape([-1 if i == axis else 1 for i in range(len(shape))])
    spread = min(float(np.std(a)) if a.size > 1 else 1.0, 1.0)
    if channels:  # repeated ones would add up to scores that grow with D
        grown = np.where(np.arange(shape[-1]) < a.shape[-1], grown, 0.0)
    return np.where(new, grown + spread * _noise(shape), grown)


def _noise(shape):
    """Numbers of variance 1 that depend on the place alone: a hash of the indices."""
    h = np.zeros(shape, np.uint64)
    with np.errstate(over="ignore"):
        for axis, n in enumerate(shape):
            i = np.arange(1, n + 1, dtype=np.uint64).reshape(
                [-1 if a == axis else 1 for a in range(len(shape))]
            )
            h = h + i * np.uint64(0x9E3779B97F4A7C15)
            for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
                h = (h ^ (h >> np.uint64(shift))) * np.uint64(factor)
            h = h ^ (h >> np.uint64(31))
    return ((h >> np.uint64(11)).astype(float) / 2.0**53 - 0.5) * 12**0.5
