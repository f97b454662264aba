"""Outputs as a flat dict of arrays: an array, a NamedTuple, a tuple, a dict, a number."""

import numpy as np


def flatten(value, name="out"):
    """Name -> array for everything a method returned.

    Parameters
    ----------
    value : object
        Array, number, (Named)tuple, list or dict of such; None is left out.
    name : str
        The name of a single array; inner parts are named after fields, keys or positions.

    Returns
    -------
    dict
    """
    if value is None:
        return {}
    if isinstance(value, dict):
        parts = value.items()
    elif hasattr(value, "_fields"):
        parts = zip(value._fields, value, strict=True)
    elif isinstance(value, (tuple, list)):
        parts = ((str(i), item) for i, item in enumerate(value))
    else:
        return {name: value if hasattr(value, "shape") else np.asarray(value)}
    flat = {}
    for key, item in parts:
        for inner, array in flatten(item, str(key)).items():
            flat[str(key) if inner == str(key) else f"{key}.{inner}"] = array
    return flat


def floats(value, name="out"):
    """Only the floating arrays of :func:`flatten`."""
    return {k: a for k, a in flatten(value, name).items() if np.dtype(a.dtype).kind in "fc"}


def like(value, arrays, name="out"):
    """Rebuild the structure of ``value`` with the arrays of a flat dict (missing ones: None)."""
    if value is None:
        return None
    if isinstance(value, dict):
        return {k: like(v, arrays, _inner(name, k)) for k, v in value.items()}
    if hasattr(value, "_fields"):
        return type(value)(
            *(like(v, arrays, _inner(name, k)) for k, v in zip(value._fields, value, strict=True))
        )
    if isinstance(value, (tuple, list)):
        return type(value)(like(v, arrays, _inner(name, str(i))) for i, v in enumerate(value))
    return arrays.get(name)


def _inner(name, key):
    return str(key) if name == "out" else f"{name}.{key}"


def cotangents(rng, out):
    """Random cotangents of the same structure as an output, for its floating parts."""
    drawn = {
        k: rng.standard_normal(a.shape).astype(a.dtype, copy=False) for k, a in floats(out).items()
    }
    return like(out, drawn)


def arrays(kwargs):
    """The floating array arguments of a call, those that owe a gradient."""
    return {k: a for k, a in kwargs.items() if isinstance(a, np.ndarray) and a.dtype.kind == "f"}
