"""Say what is wrong with a result: compare it with the known mistakes and name the one that fits.

Three nets, from the narrow to the wide: the bug zoo, which is written apart from the library; the
reference itself with one or two arguments changed; what numbers alone show (a constant factor, two
gradients swapped, other axes, fewer digits).
"""

import itertools

import numpy as np

from attention_ref.core.registry import get
from attention_ref.kit import tree, zoo
from attention_ref.kit.inputs import SEPARATED
from attention_ref.kit.lowp import EPS

BLOCKS = (*range(1, 9), 16, 32, 64, 128, 256)
"""Block lengths of an online softmax that are tried."""
PAIRS = 300
"""Pairs of changed arguments that are tried at most."""


def distance(a, b):
    """Largest difference relative to the largest entry; inf where NaNs stand elsewhere."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.shape != b.shape or np.any(np.isnan(a) != np.isnan(b)):
        return np.inf
    with np.errstate(invalid="ignore"):
        gap = np.abs(np.where(np.isnan(a), 0, a) - np.where(np.isnan(b), 0, b))
    gap = np.where(np.isnan(gap), 0.0, gap)  # equal infinities
    return float(np.max(gap, initial=0) / max(np.nanmax(np.abs(b), initial=0.0), 1e-300))


def worst(got, want):
    """The place of the largest difference: (index, got, expected)."""
    with np.errstate(invalid="ignore"):
        gap = np.abs(np.asarray(got, float) - np.asarray(want, float))
    gap = np.where(np.isnan(gap), np.inf, gap)
    gap = np.where((got == want) | (np.isnan(got) & np.isnan(want)), 0.0, gap)
    place = tuple(int(i) for i in np.unravel_index(np.argmax(gap), gap.shape)) if gap.size else ()
    return place, got[place], want[place]


def _outputs(spec, kwargs, bug=None):
    """The main output of the zoo's own attention or delta rule, or None where neither applies."""
    options = {n: a for n, a in kwargs.items() if n != "empty_row"}
    try:
        with np.errstate(all="ignore"):
            if spec.key in SEPARATED:
                return zoo.attend(**options, bug=bug)[0]
            if spec.key == "recurrent/delta_rule":
                return zoo.delta(**options, bug=bug)[0]
    except (TypeError, ValueError):
        pass
    return None


def forward(out, want, spec, kwargs, dtype="float64"):
    """The name of the mistake whose output this is, or what can be said without one.

    Parameters
    ----------
    out, want : ndarray
        Theirs and the truth.
    spec : Spec
        The row.
    kwargs : dict
        Arguments of the case, float64.
    dtype : str
        What was asked for.

    Returns
    -------
    str
    """
    near = max(1e-4, 64 * EPS[dtype])
    if not np.any(out):
        return "output is zero throughout"
    if out.shape != want.shape:
        for says, turned in _turned(want):
            if distance(out, turned) < near:
                return f"right numbers, but {says}"
        if sorted(out.shape) == sorted(want.shape):
            return f"output has shape {out.shape}, expected {want.shape}: axes in another order"
        return f"output has shape {out.shape}, expected {want.shape}"
    right = distance(out, want)
    named = _closest(out, _wrong_outputs(spec, kwargs), near, right)
    named = named or _closest(out, _moved(want, kwargs), near, right)
    if named:
        return named
    if dtype == "float64" and right < 2e-3 and np.all(np.isfinite(out)):
        digits = "float32" if right < 1e-5 else "half precision"
        return f"computes in lower precision inside ({digits}?), or adds an epsilon somewhere"
    if np.any(~np.isfinite(out) & np.isfinite(want)):
        rows = np.argwhere(~np.isfinite(out) & np.isfinite(want))[0].tolist()
        return f"has NaN or infinity where the reference is finite, first at {rows}"
    named = _closest(out, _two_changes(spec, kwargs), near, right)
    if named:
        return named
    factor = ratio(out, want)
    if factor is not None:
        return f"output is {factor:.6g} times the right one"
    place, got, expected = worst(out, want)
    with np.errstate(invalid="ignore"):
        gap = np.abs(out - want) > near * np.nanmax(np.abs(want), initial=0.0)
    rows = int(np.sum(np.any(gap, axis=-1)))
    if rows == 0:
        return f"no known mistake fits: near the truth, but less precise than {dtype} allows"
    return (
        f"no known mistake fits; {rows} of {out[..., 0].size} rows are off, worst at {place}: "
        f"{got:.6g}, expected {expected:.6g}"
    )


def _closest(out, candidates, near, right):
    fitting = [(says, wrong) for says, wrong in candidates if np.shape(wrong) == out.shape]
    best, said = near, ""
    for says, wrong in fitting:
        found = distance(out, wrong)
        if found < best and found < 0.01 * right:
            best, said = found, says
    if said or not np.any(np.isnan(out)):
        return said
    for says, wrong in fitting:  # a softmax over no key divides zero by zero
        empty = np.all(wrong == 0, axis=-1, keepdims=True)
        if np.any(empty) and distance(out, np.where(empty, np.nan, wrong)) < near:
            return says + "; rows without keys give NaN"
    return ""


def _turned(want):
    """(says, output) with other axes."""
    if want.ndim > 2:
        swapped = np.swapaxes(want, -2, -3)
        yield "heads come after the tokens in the output", swapped
        side = swapped.reshape(*swapped.shape[:-2], -1)
        yield "the heads stand side by side in the last axis of the output", side
        yield "the heads are summed up", np.sum(want, axis=-3)
    yield "tokens and channels are swapped in the output", np.swapaxes(want, -1, -2)
    if want.shape[0] == 1:
        yield "the batch axis of length 1 is gone", want[0]


def _wrong_outputs(spec, kwargs):
    """(says, output) of every single mistake."""
    mask = kwargs.get("mask")
    if isinstance(mask, np.ndarray) and not kwargs.get("causal"):
        some = np.any(mask, axis=-1, keepdims=True)
        if not np.all(some):
            says = "a finite number stands for -inf: a query without keys sees all of them"
            yield from _called(spec, says, kwargs | {"mask": mask | ~some})
    if spec.key in SEPARATED:
        options = {n: a for n, a in kwargs.items() if n != "empty_row"}
        for size in (n for n in BLOCKS if n < kwargs["k"].shape[-2]):
            for bug, says in zoo.BLOCKS.items():
                says = says.replace("blocks of 2", f"blocks of {size}")
                yield says, zoo.blocks(**options, size=size, bug=bug)
                if kwargs.get("causal") or mask is not None:
                    wrong = zoo.blocks(**options, size=size, bug=bug, hidden=-1e9)
                    yield says + "; a finite number stands for -inf", wrong
    for bug, says in (zoo.DELTA if spec.key == "recurrent/delta_rule" else zoo.FORWARD).items():
        wrong = _outputs(spec, kwargs, bug)
        if wrong is not None:
            yield says, wrong
    for says, changed in zoo.variants(spec, kwargs):
        yield from _called(spec, says, changed)
    if spec.key not in SEPARATED and {"q", "k", "v"} <= set(kwargs):
        shared = ("q", "k", "v", "mask", "causal", "align", "scale", "softcap", "bias")
        plain = {n: kwargs[n] for n in shared if n in kwargs}
        yield from _called(
            get("scores/dot_product"),
            f"matches plain softmax attention: nothing of {spec.key} has an effect", plain,
        )  # fmt: skip


def _called(spec, says, kwargs):
    try:
        with np.errstate(all="ignore"):
            yield says, tree.flatten(spec.call(kwargs)[0])["out"]
    except Exception:  # a change that this row refuses is no candidate
        return


def _two_changes(spec, kwargs):
    """(says, output) where two arguments are wrong at once."""
    single = list(zoo.variants(spec, kwargs))
    for (a, one), (b, two) in itertools.islice(itertools.combinations(single, 2), PAIRS):
        moved = {n for n in one if one[n] is not kwargs.get(n)} | (set(kwargs) - set(one))
        also = {n for n in two if two[n] is not kwargs.get(n)} | (set(kwargs) - set(two))
        if moved & also:
            continue
        both = {n: x for n, x in one.items() if n not in also}
        both |= {n: two[n] for n in also if n in two}
        yield from _called(spec, f"{a}; and {b}", both)


def _moved(want, kwargs):
    """(says, output) of right numbers in the wrong place."""
    if want.ndim > 2:
        mixed = np.swapaxes(want, -2, -3).reshape(want.shape)
        yield "matches if heads and tokens are mixed up by a reshape without a transpose", mixed
        yield "matches with the heads in reverse order", want[..., ::-1, :, :]
    if want.ndim > 1 and want.shape[-2] > 1:
        yield "matches with the queries in reverse order", want[..., ::-1, :]
        yield "matches with the output one token late", np.roll(want, 1, axis=-2)
        yield "matches with the output one token early", np.roll(want, -1, axis=-2)
    if want.ndim > 3 and want.shape[0] > 1:
        yield "matches with the batch in reverse order", want[::-1]
        yield (
            "every batch element has the result of the first",
            np.broadcast_to(want[:1], want.shape),
        )


def other(name, got, want):
    """What can be said of a further output."""
    factor = ratio(got, want)
    if factor is not None:
        return f"{name} is {factor:.6g} times the right one"
    place, ours, right = worst(got, want)
    return f"{name} is wrong; worst at {place}: {ours:.6g}, expected {right:.6g}"


def lse(found, right, kwargs, spec):
    """The name of the mistake in a returned log-sum-exp."""
    if spec.key in SEPARATED:
        options = {n: a for n, a in kwargs.items() if n != "empty_row"}
        for bug, says in zoo.LSE.items():
            wrong = zoo.logsumexp(**options, bug=bug)[1]
            fine = np.isfinite(wrong) & np.isfinite(right)
            if distance(found[fine], wrong[fine]) < 1e-4:
                return says
    place, got, expected = worst(found, right)
    return f"lse is wrong; worst at {place}: {got:.6g}, expected {expected:.6g}"


def backward(found, right, spec, kwargs, dout):
    """The name of the mistake whose gradients these are.

    Parameters
    ----------
    found, right : dict
        Theirs and the true ones by argument.
    spec, kwargs, dout
        The row, the arguments, the upstream gradient.

    Returns
    -------
    str
    """
    near = 1e-3
    off = [n for n in right if n in found and distance(found[n], right[n]) > near]
    if spec.key in SEPARATED:
        options = {n: a for n, a in kwargs.items() if n != "empty_row"}
        for bug, says in zoo.BACKWARD.items():
            try:
                wrong = zoo.attend(**options, bug=bug)[1](dout)
            except (TypeError, ValueError):
                break
            fits = all(distance(found[n], wrong[n]) < near for n in found if n in wrong)
            if fits and any(distance(wrong[n], right[n]) > near for n in right):
                return says
    for n in off:
        if found[n].shape != right[n].shape:
            return f"d{n} has shape {found[n].shape}, expected {right[n].shape}"
    for n, m in itertools.permutations(off, 2):
        if distance(found[n], right[m]) < near:
            both = distance(found[m], right[n]) < near
            return f"d{n} and d{m} are swapped" if both else f"d{n} holds d{m}"
    for n in off:
        if not np.any(found[n]):
            return f"d{n} is zero throughout"
        if np.any(~np.isfinite(found[n])):
            return f"d{n} has NaN or infinity where the reference is finite"
        factor = ratio(found[n], right[n])
        if factor is not None:
            return f"d{n} is {factor:.6g} times the right one"
    return f"no known mistake fits; wrong are {', '.join('d' + n for n in off) or 'the last bits'}"


def ratio(a, b):
    """The constant factor between two arrays, if there is one."""
    if a.shape != b.shape or not np.any(b) or not np.all(np.isfinite(a) & np.isfinite(b)):
        return None
    factor = float(np.sum(a * b) / np.sum(b * b))
    return factor if np.allclose(a, factor * b, rtol=1e-4, atol=1e-6) else None


# ------------------------------------------------------------------------------ kept indices


def trace(found, want):
    """Where two traces of kept indices part, step by step; "" where they agree.

    Parameters
    ----------
    found, want : int ndarray, shape (..., C)
        Kept places, a step (or a query) a row; -1 fills up.

    Returns
    -------
    str
    """
    if found.shape[:-1] != want.shape[:-1]:
        return f"shape {found.shape}, expected {want.shape}: one row a step"
    rows = list(np.ndindex(*want.shape[:-1]))
    same_sets = True
    for row in rows:
        kept, expected = ({int(i) for i in a[row] if i >= 0} for a in (found, want))
        if kept == expected:
            continue
        same_sets = False
        step = row[0] if len(row) == 1 else row
        more, less = sorted(kept - expected), sorted(expected - kept)
        says = f"first differs at step {step}: keeps {more} and not {less}"
        if len(kept) != len(expected):
            says += f"; {len(kept)} tokens are kept, the budget gives {len(expected)}"
        elif {i + 1 for i in kept} == expected or {i - 1 for i in kept} == expected:
            says += "; off by one"
        return says
    if found.shape != want.shape or not np.array_equal(found, want):
        return "the same tokens in another order" if same_sets else ""
    return ""
