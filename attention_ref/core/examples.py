"""Example inputs: every length different, scale not 1, float64, all options of the contract."""

import numpy as np

DEFAULT_SCALE = 0.7
"""Neither 1 nor 1/sqrt(D), so that a forgotten or doubled scale shows."""


def qkv(rng, lead=(2,), T=5, S=6, D=4, E=3):
    """Standard normal queries, keys and values of the given lengths."""
    return {
        "q": rng.standard_normal((*lead, T, D)),
        "k": rng.standard_normal((*lead, S, D)),
        "v": rng.standard_normal((*lead, S, E)),
    }


def packed_mask(lengths_q, lengths_k):
    """Block-diagonal mask of sequences packed one behind the other: (T, S), True = same one."""
    q = np.repeat(np.arange(len(lengths_q)), lengths_q)
    k = np.repeat(np.arange(len(lengths_k)), lengths_k)
    return q[:, None] == k[None, :]


def attention(rng, *, options=("causal", "mask", "bias", "softcap"), extra=None, scale=True, **n):
    """The standard example set of a method that takes q, k, v.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of the numbers.
    options : tuple of str
        Which keywords of the contract the method has.
    extra : callable, optional
        ``extra(rng, kwargs) -> dict`` adds a method's own parameters to a case.
    scale : bool
        Whether the method has a score scale.
    **n : int
        Lengths that override the defaults (D, E).

    Returns
    -------
    dict
        Case name -> keyword arguments of the forward.
    """
    cases = {
        "plain": qkv(rng, **n),
        "long-queries": qkv(rng, T=7, S=5, **n),
        "batch": qkv(rng, lead=(3, 2), T=1, S=5, **n),
        "no-heads": qkv(rng, lead=(), T=5, S=7, **n),
    }
    if "causal" in options:
        cases["causal"] = qkv(rng, T=5, S=7, **n) | {"causal": True}
        cases["causal-upper-left"] = qkv(rng, T=5, S=7, **n) | {
            "causal": True,
            "align": "upper_left",
        }
        if "bias" in options:
            cases["causal-upper-left"]["bias"] = rng.standard_normal((1, 7))
        cases["causal-long-queries"] = qkv(rng, T=7, S=5, **n) | {"causal": True}
    if "mask" in options:
        mask = rng.random((2, 5, 7)) < 0.6
        mask[0, 1] = False
        cases["mask"] = qkv(rng, T=5, S=7, **n) | {"mask": mask}
        cases["packed"] = qkv(rng, T=6, S=7, **n) | {"mask": packed_mask([1, 3, 2], [2, 1, 4])}
    if "bias" in options:
        cases["bias"] = qkv(rng, T=5, S=6, **n) | {"bias": rng.standard_normal((2, 5, 6))}
    if "softcap" in options:
        cases["softcap"] = qkv(rng, T=5, S=6, **n) | {
            "softcap": 1.3,
            "bias": rng.standard_normal((2, 5, 6)),
            "mask": rng.random((5, 6)) < 0.7,
        }
    for name, kwargs in cases.items():
        if scale and name != "no-heads":
            kwargs["scale"] = DEFAULT_SCALE
        if extra is not None:
            kwargs.update(extra(rng, kwargs))
    return cases
