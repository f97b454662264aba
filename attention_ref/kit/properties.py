"""Properties of a foreign function that hold whatever the numbers: who sees whom, and manners.

Who sees whom is measured, not read: the values of one key are changed, and the queries whose output
moves are those that see it. The same is done to the reference.
"""

import warnings
from typing import NamedTuple

import numpy as np

from attention_ref.kit import tree
from attention_ref.kit.adapters import Refusal
from attention_ref.kit.inputs import is_float
from attention_ref.kit.lowp import EPS

MOVE = 1e3


class _Dtype(NamedTuple):
    given: str
    inside: str


class Property(NamedTuple):
    """One property: its name, "ok", "WRONG", "skipped" or "not supported", and what was seen."""

    name: str
    verdict: str
    says: str


def measured(spec, foreign, cases, rule, dtype, inside=None):
    """Every property that is measured by calls of its own.

    Parameters
    ----------
    spec : Spec
        The row.
    foreign : Foreign
        Their function.
    cases : dict
        Case -> arguments that the function has.
    rule : dict
        Arguments of the reference that its conventions set.
    dtype : str
        In which the function is called.
    inside : str, optional
        In which it computes, where that is rougher.

    Returns
    -------
    list of Property
    """
    found, dtype = [], _Dtype(dtype, inside or dtype)
    if "attention" in spec.flags and foreign.names.get("v"):
        for name, test in (("causality", _causality), ("causal alignment", _alignment),
                           ("mask polarity", _polarity), ("grouped heads", _groups),
                           ("batch independence", _batch)):  # fmt: skip
            found.append(_guarded(name, test, spec, foreign, cases, rule, dtype))
    for name, test in (("determinism", _determinism), ("non-contiguous input", _strided),
                       ("read-only input", _read_only)):  # fmt: skip
        found.append(_guarded(name, test, spec, foreign, cases, rule, dtype))
    return found


def _guarded(name, test, *args):
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Property(name, *test(*args))
    except Refusal as failure:
        return Property(name, failure.verdict, str(failure))
    except (IndexError, TypeError, ValueError):  # the output has other axes than it should
        return Property(name, "WRONG", "not measured: the output has not the axes of one")


SKIPPED = ("skipped", "no case for it that the function takes")


# ------------------------------------------------------------------------------ who sees whom


def sees(call, kwargs, eps):
    """Which query sees which key.

    Parameters
    ----------
    call : callable
        ``call(kwargs) -> output``, shape (..., T, E).
    kwargs : dict
        With values v of shape (..., S, E).
    eps : float
        Rounding of the outputs.

    Returns
    -------
    bool ndarray, shape (..., T, S)
    """
    base, columns = call(kwargs), []
    for s in range(kwargs["v"].shape[-2]):
        v = kwargs["v"].copy()
        v[..., s, :] += MOVE
        with np.errstate(invalid="ignore"):
            gap = np.abs(call(kwargs | {"v": v}) - base)
        columns.append(np.any(~(gap <= MOVE * 1e3 * eps), axis=-1) & ~np.all(
            np.isnan(base), axis=-1))  # fmt: skip
    return np.stack(columns, axis=-1)


def _reference(spec, rule):
    return lambda kwargs: tree.flatten(spec.call(kwargs | rule)[0])["out"]


def _theirs(foreign, dtype):
    return lambda kwargs: foreign(kwargs, dtype=dtype.given).outs[0].astype(np.float64)


def _both(spec, foreign, kwargs, rule, dtype):
    want = sees(_reference(spec, rule), kwargs, EPS[dtype.inside])
    return sees(_theirs(foreign, dtype), kwargs, EPS[dtype.inside]), want


def _pick(cases, fits):
    return next((kwargs for kwargs in cases.values() if fits(kwargs)), None)


def _unequal(kwargs):
    return kwargs["q"].shape[-2] != kwargs["k"].shape[-2]


def _causality(spec, foreign, cases, rule, dtype):
    always = "always_causal" in spec.flags
    chosen = [k for k in cases.values() if k.get("causal") or always]
    chosen = [k for k in chosen if not _unequal(k)] or chosen[:1]
    if not chosen:
        return SKIPPED
    found, want = _both(spec, foreign, chosen[0], rule, dtype)
    if found.shape != want.shape:
        return "WRONG", f"output has rows {found.shape[:-1]}, expected {want.shape[:-1]}"
    leak, blind = found & ~want, want & ~found
    if np.any(leak):
        t, s = _first(leak)
        return "WRONG", f"query {t} sees key {s}, which is hidden from it: {int(leak.sum())} leaks"
    if np.any(blind):
        t, s = _first(blind)
        return "WRONG", f"query {t} does not see key {s}, which it may see"
    return "ok", ""


def _first(pairs):
    return tuple(int(i) for i in np.argwhere(pairs)[0][-2:])


def _alignment(spec, foreign, cases, rule, dtype):
    kwargs = _pick(cases, lambda k: k.get("causal") and _unequal(k) and k.get("mask") is None)
    if kwargs is None:
        return SKIPPED
    found, want = _both(spec, foreign, kwargs, rule, dtype)
    T, S = kwargs["q"].shape[-2], kwargs["k"].shape[-2]
    expected = rule.get("align", kwargs.get("align", "lower_right"))
    looks = [
        name for name, shift in (("lower_right", S - T), ("upper_left", 0))
        if found.shape == want.shape and np.all(found == np.tri(T, S, shift, dtype=bool))
    ]  # fmt: skip
    seen = f"{looks[0]}, T={T}, S={S}" if looks else f"neither corner, T={T}, S={S}"
    if found.shape == want.shape and np.array_equal(found, want):
        return "ok", seen
    return "WRONG", f"{seen}; expected {expected}"


def _polarity(spec, foreign, cases, rule, dtype):
    kwargs = _pick(
        cases, lambda k: isinstance(k.get("mask"), np.ndarray) and not k.get("causal")
        and np.any(k["mask"]) and not np.all(k["mask"])
    )  # fmt: skip
    if kwargs is None:
        return SKIPPED
    found, want = _both(spec, foreign, kwargs, rule, dtype)
    if found.shape == want.shape and np.array_equal(found, want):
        return "ok", "True = may attend"
    if found.shape != want.shape:
        return "WRONG", f"output has rows {found.shape[:-1]}, expected {want.shape[:-1]}"
    mask = np.broadcast_to(kwargs["mask"], found.shape)
    some = np.any(mask, -1) & ~np.all(mask, -1)
    if np.array_equal(found[some], ~mask[some]):
        return "WRONG", "True = is blocked; conventions={'mask': 'blocked'} if that is meant"
    if np.all(found):
        return "WRONG", "the mask hides nothing"
    t, s = _first(found != want)
    return "WRONG", f"query {t} {'sees' if found[..., t, s].any() else 'does not see'} key {s}"


def _groups(spec, foreign, cases, rule, dtype):
    kwargs = _pick(cases, lambda k: k["q"].ndim > 3 and k["k"].ndim > 3
                   and 1 < k["k"].shape[-3] < k["q"].shape[-3])  # fmt: skip
    if kwargs is None:
        return "skipped", "no grouped heads in this row: check against heads/multi_query"
    H, G = kwargs["q"].shape[-3], kwargs["k"].shape[-3]
    call, reads = _theirs(foreign, dtype), np.zeros((H, G), bool)
    base = call(kwargs)
    if base.ndim < 3 or base.shape[-3] != H:
        return "WRONG", f"output has shape {base.shape}, expected {H} heads at axis -3"
    for g in range(G):
        v = kwargs["v"].copy()
        v[..., g, :, :] += MOVE
        gap = np.abs(call(kwargs | {"v": v}) - base)
        axes = tuple(i for i in range(gap.ndim) if i != gap.ndim - 3)
        reads[:, g] = np.max(gap, axis=axes) > 1.0
    heads, groups = np.arange(H)[:, None], np.arange(G)
    if np.array_equal(reads, heads // (H // G) == groups):
        return "ok", "interleaved: head h reads key head h // (H // G)"
    if np.array_equal(reads, heads % G == groups):
        return "WRONG", "tiled: head h reads key head h % G; expected h // (H // G)"
    pairs = {int(h): np.flatnonzero(reads[h]).tolist() for h in range(H)}
    return "WRONG", f"heads read key heads {pairs}"


def _batch(spec, foreign, cases, rule, dtype):
    def alone(kwargs):
        four = all(kwargs[n].ndim == 4 and kwargs[n].shape[0] == 1 for n in "qkv")
        rest = [a for n, a in kwargs.items() if isinstance(a, np.ndarray) and n not in "qkv"]
        return four and all(a.ndim < 4 for a in rest)

    kwargs = _pick(cases, lambda k: {"q", "k", "v"} <= set(k) and alone(k))
    if kwargs is None:
        return SKIPPED
    call = _theirs(foreign, dtype)
    one = call(kwargs)
    pair = kwargs | {n: np.concatenate([kwargs[n], 50.0 - 9.0 * kwargs[n]]) for n in "qkv"}
    both = call(pair)
    if both.shape[0] != 2:
        return "WRONG", f"two sequences give shape {both.shape}"
    size = max(float(np.nanmax(np.abs(one))), 1e-300)
    gap = float(np.nanmax(np.abs(both[:1] - one)))
    if np.array_equal(np.isnan(both[:1]), np.isnan(one)) and gap <= 256 * EPS[dtype.inside] * size:
        return "ok", ""
    return "WRONG", f"the first sequence changes by {gap:.2g} when a second one is added"


# ------------------------------------------------------------------------------ manners


def _base(cases):
    for name in ("square", "plain"):
        if name in cases:
            return cases[name]
    return next(iter(cases.values()), None)


def _determinism(spec, foreign, cases, rule, dtype):
    kwargs = _base(cases)
    if kwargs is None:
        return SKIPPED
    one, two = (foreign(kwargs, dtype=dtype.given).outs[0] for _ in range(2))
    if one.shape == two.shape and np.array_equal(one, two, equal_nan=one.dtype.kind == "f"):
        return "ok", "two calls are bit-equal"
    with np.errstate(invalid="ignore"):
        return "WRONG", f"two calls differ by {np.nanmax(np.abs(one - two)):.2g}"


def _same_as_plain(how):
    def test(spec, foreign, cases, rule, dtype):
        kwargs = _base(cases)
        if kwargs is None or not any(is_float(a) for a in kwargs.values()):
            return SKIPPED
        if foreign.framework == "jax" or (how == "read-only" and foreign.framework != "numpy"):
            return "skipped", f"{foreign.framework} arrays have no such thing"
        plain = foreign(kwargs, dtype=dtype.given).outs[0]
        other = foreign(kwargs, dtype=dtype.given, how=how).outs[0]
        size = max(float(np.max(np.abs(plain), initial=0.0)), 1e-300)
        fits = plain.shape == other.shape and np.allclose(
            other, plain, rtol=0, atol=64 * EPS[dtype.inside] * size, equal_nan=True
        )
        return ("ok", "") if fits else ("WRONG", f"another result for {how} arrays")

    return test


_strided, _read_only = _same_as_plain("strided"), _same_as_plain("read-only")
