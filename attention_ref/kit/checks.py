"""The generic checks: every relation of the correctness protocol that applies by kind and flag.

A check is a function ``check_<name>(spec, case, kwargs)`` whose docstring's first line says what it
holds; it raises :class:`CheckFailure` or returns. ``NEEDS`` says to which rows a check applies. A
row opts out with a reason in ``SPEC.opt_out`` and the reason is printed.

Flags a SPEC may carry:

attention
    takes q, k, v and the keywords of the contract; (..., T, S) weights over keys
causal
    has ``causal=True``; ``always_causal`` when it cannot be otherwise
masked
    takes a boolean ``mask`` over keys
permutation_equivariant
    the order of the keys does not matter when nothing positional is given
query_equivariant
    permuting the queries permutes the outputs (follows from permutation_equivariant)
row_stochastic
    weights of a row with keys sum to 1 and are not negative
linear_in_v
    the output is linear in v
scaled
    scores are scale * q.k: doubling q and halving the scale changes no bit
shift_invariant
    adding one vector to all keys changes nothing
positional
    places count: a hidden key is not the same as a missing one
no_foreign
    works on NumPy arrays only, by design (graph algorithms, generators)
"""

import zlib
from typing import NamedTuple

import numpy as np

from attention_ref.core.errors import DTypeError, ParameterError, ShapeError
from attention_ref.core.masks import visible
from attention_ref.kit import tree
from attention_ref.kit.compare import CheckFailure, close, different, equal, error, scales

GRADIENT_EPS = 64.0
DIFFERENCE_RTOL = 1e-9
ORDER_EPS = 64.0  # two orders of the same sum
MAX_OPT_OUTS = 2


class Result(NamedTuple):
    """Outcome of one check on one case."""

    check: str
    case: str
    ok: bool
    message: str  # the failure, the reason of an opt-out, or ""
    opted_out: bool = False


# ------------------------------------------------------------------------------ the cases


def seed_of(key, draw=0):
    """A seed that depends on the key alone, so that adding a row changes no other row's draws."""
    return zlib.crc32(f"{key}#{draw}".encode())


def cases(spec, draw=0):
    """The example set of a row: name -> keyword arguments, float64."""
    return spec.example(np.random.default_rng(seed_of(spec.key, draw)))


def _rng(spec, case):
    return np.random.default_rng(seed_of(f"{spec.key}-{case}", 1))


def _cast(kwargs, dtype):
    return {
        k: a.astype(dtype) if isinstance(a, np.ndarray) and a.dtype.kind == "f" else a
        for k, a in kwargs.items()
    }


def _copy(kwargs):
    return {k: a.copy() if isinstance(a, np.ndarray) else a for k, a in kwargs.items()}


def _out(spec, kwargs):
    return tree.flatten(spec.call(kwargs)[0])


def _both(spec, kwargs, dout=None):
    """Outputs, and gradients under a cotangent that is the same for equal output shapes."""
    out, cache = spec.call(kwargs)
    if spec.backward_function is None:
        return tree.flatten(out), {}
    if dout is None:
        dout = tree.cotangents(np.random.default_rng(7), out)
    return tree.flatten(out), spec.backward_function(dout, cache)


def _bounds(spec, dtype):
    from attention_ref.kit.golden import bounds

    return bounds(spec.key).get(np.dtype(dtype).name, {})


# ------------------------------------------------------------------------------ A, E: values


def check_dtypes(spec, case, kwargs):
    """float32 and float64 come out as they went in, within the measured bounds of the truth."""
    truth = _out(spec, _cast(_cast(kwargs, np.float32), np.float64))
    for dtype in (np.float32, np.float64):
        given = _cast(kwargs, dtype)
        found = _out(spec, given)
        bound = _bounds(spec, dtype)
        for name, a in found.items():
            if a.dtype.kind == "f" and tree.arrays(kwargs) and a.dtype != dtype:
                raise CheckFailure(f"{name} has dtype {a.dtype} for {np.dtype(dtype)} inputs")
            if a.dtype.kind == "f" and dtype == np.float32:
                close(f"{name} in float32", a, truth[name], bound.get(name, 256.0), eps=2**-23)


def check_gradient_dtypes(spec, case, kwargs):
    """Every float array argument has a gradient of its own shape and dtype."""
    for dtype in (np.float32, np.float64):
        given = _cast(kwargs, dtype)
        _, gradients = _both(spec, given)
        owed = tree.arrays(given)
        if set(gradients) != set(owed):
            raise CheckFailure(f"gradients for {sorted(gradients)}, expected {sorted(owed)}")
        for name, g in gradients.items():
            if g.shape != owed[name].shape or g.dtype != owed[name].dtype:
                raise CheckFailure(
                    f"gradient of {name} is {g.dtype}{g.shape}, "
                    f"expected {owed[name].dtype}{owed[name].shape}"
                )


def check_gradient_bounds(spec, case, kwargs):
    """float32 gradients stay within the measured bounds of the float64 ones."""
    single = _cast(kwargs, np.float32)
    out, cache = spec.call(single)
    dout = tree.cotangents(_rng(spec, case), out)
    found = spec.backward_function(dout, cache)
    wide_out, wide_cache = spec.call(_cast(single, np.float64))
    wide = {k: a.astype(np.float64) for k, a in tree.floats(dout).items()}
    truth = spec.backward_function(tree.like(wide_out, wide), wide_cache)
    bound = _bounds(spec, np.float32)
    scale = scales(truth)
    for name, g in found.items():
        limit = bound.get("d" + name, 512.0)
        close(f"d{name} in float32", g, truth[name], limit, scale[name], eps=2**-23)


def check_golden(spec, case, kwargs):
    """Outputs and gradients equal the golden file, within its bounds."""
    from attention_ref.kit import golden

    golden.compare(spec, case)


# ------------------------------------------------------------------------------ B: gradients


def check_gradients(spec, case, kwargs):
    """Hand, tape, complex step and finite differences give the same gradient."""
    from attention_ref import engine

    rng = _rng(spec, case)
    out, cache = spec.call(kwargs)
    dout = tree.cotangents(rng, out)
    hand = spec.backward_function(dout, cache)
    if not any(np.any(g != 0) for g in hand.values()):
        raise CheckFailure("every gradient is zero: a check on zeros checks nothing")
    scale = scales(hand)
    bound = max(GRADIENT_EPS, *_bounds(spec, np.float64).values(), 0.0)

    def f(**arrays):
        return spec.call(kwargs | arrays)[0]

    inputs = tree.arrays(kwargs)
    taped, pull = engine.vjp(f, inputs)
    for name, a in tree.floats(taped).items():
        close(f"{name} on the tape", a, tree.flatten(out)[name], 0.0)
    for name, g in pull(dout).items():
        close(f"d{name}, hand against tape", hand[name], g, bound, scale[name])
    for _ in range(3):
        tangents = {k: rng.standard_normal(a.shape) * _size(a) for k, a in inputs.items()}
        want = sum(float(np.sum(hand[k] * t)) for k, t in tangents.items())
        size = sum(float(np.sum(np.abs(hand[k] * t))) for k, t in tangents.items())
        if "complex_step" not in spec.opt_out:
            got = _inner(dout, engine.jvp(f, inputs, tangents))
            close("hand against complex step, one direction", got, want, bound, size)
        got = _inner(dout, engine.difference(f, inputs, tangents))
        close("hand against differences, one direction", got, want, 1, size, DIFFERENCE_RTOL)


def _size(a):
    """Root mean square of an array, at most 1: steps of differences must suit small inputs."""
    size = float(np.sqrt(np.mean(np.square(a)))) if a.size else 0.0
    return size if 0 < size < 1 else 1.0


def check_every_coordinate(spec, case, kwargs):
    """On the smallest case, coordinate by coordinate, by complex step (or differences)."""
    from attention_ref import engine

    inputs = tree.arrays(kwargs)
    if case != next(iter(cases(spec))) or sum(a.size for a in inputs.values()) > 300:
        return
    out, cache = spec.call(kwargs)
    dout = tree.cotangents(_rng(spec, case), out)
    hand = spec.backward_function(dout, cache)

    def f(**arrays):
        return spec.call(kwargs | arrays)[0]

    if "complex_step" in spec.opt_out:
        want, bound, eps = _difference_gradient(f, inputs, dout), 1, DIFFERENCE_RTOL
    else:
        want, bound, eps = engine.complex_gradient(f, inputs, dout), GRADIENT_EPS, None
    scale = scales(want)
    for name, g in hand.items():
        close(f"d{name}, every coordinate", g, want[name], bound, scale[name], eps)


def _difference_gradient(f, inputs, dout):
    from attention_ref import engine

    gradients = {k: np.zeros_like(a) for k, a in inputs.items()}
    for name, a in inputs.items():
        for place in np.ndindex(a.shape):
            tangents = {k: np.zeros_like(b) for k, b in inputs.items()}
            tangents[name][place] = 1.0
            gradients[name][place] = _inner(dout, engine.difference(f, inputs, tangents))
    return gradients


def _inner(dout, tangent):
    a, b = tree.floats(dout), tree.floats(tangent)
    return np.float64(sum(float(np.sum(a[k] * b[k])) for k in a))


def check_backward_is_linear(spec, case, kwargs):
    """The gradient is linear in the cotangent, and doubling it doubles every bit."""
    out, cache = spec.call(kwargs)
    dout = tree.cotangents(_rng(spec, case), out)
    once = spec.backward_function(dout, cache)
    doubled = tree.like(out, {k: 2 * a for k, a in tree.floats(dout).items()})
    for name, g in spec.backward_function(doubled, cache).items():
        equal(f"d{name} for 2 * dout", g, 2 * once[name])


# ------------------------------------------------------------------------------ habits


def check_inputs_unmodified(spec, case, kwargs):
    """Neither forward nor backward writes into its arguments, and both repeat bit by bit."""
    given = _copy(kwargs)
    out, cache = spec.call(given)
    dout = tree.cotangents(_rng(spec, case), out)
    kept = {k: a.copy() for k, a in tree.floats(dout).items()}
    first = spec.backward_function(dout, cache) if spec.backward_function else {}
    first = {k: np.array(g) for k, g in first.items()}
    second = spec.backward_function(dout, cache) if spec.backward_function else {}
    for name, g in first.items():
        equal(f"d{name} of a second backward", second[name], g)
    for name, a in tree.floats(dout).items():
        equal(f"{name}'s cotangent after the backward", a, kept[name])
    for name, a in given.items():
        if isinstance(a, np.ndarray):
            equal(f"{name} after the call", a, kwargs[name])
    again = _out(spec, _copy(kwargs))
    for name, a in tree.flatten(out).items():
        equal(f"{name} of a second call", again[name], a)


def check_layouts(spec, case, kwargs):
    """Strided, reversed, Fortran, read-only and big-endian inputs give the same."""
    want = _out(spec, kwargs)
    variants = {
        "read-only": _read_only,
        "strided": lambda a: np.repeat(a, 2, axis=-1)[..., ::2] if a.ndim else a,
        "reversed": lambda a: a[..., ::-1].copy()[..., ::-1] if a.ndim else a,
        "Fortran order": np.asfortranarray,
        "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    }
    for word, change in variants.items():
        given = {k: change(a) if isinstance(a, np.ndarray) else a for k, a in kwargs.items()}
        for name, a in _out(spec, given).items():
            if a.dtype.kind in "fc":
                close(f"{name} for {word} inputs", a, want[name], ORDER_EPS, eps=2**-52)
            else:
                equal(f"{name} for {word} inputs", a, want[name])


def _read_only(a):
    b = a.copy()
    b.flags.writeable = False
    return b


def check_foreign(spec, case, kwargs):
    """The forward runs on arrays that refuse whatever CuPy refuses, bit by bit the same."""
    from attention_ref import engine

    given = {k: engine.Foreign(a) if isinstance(a, np.ndarray) else a for k, a in kwargs.items()}
    out, cache = spec.call(given)
    want = spec.call(kwargs)
    for name, a in tree.flatten(out).items():
        if not isinstance(a, engine.Foreign):
            raise CheckFailure(f"{name} left the other library: it is a {type(a).__name__}")
        equal(f"{name} on foreign arrays", engine.value(a), tree.flatten(want[0])[name])
    if spec.backward_function is None:
        return
    dout = tree.cotangents(_rng(spec, case), want[0])
    wrapped = {k: engine.Foreign(a) for k, a in tree.floats(dout).items()}
    found = spec.backward_function(tree.like(want[0], wrapped), cache)
    for name, g in spec.backward_function(dout, want[1]).items():
        equal(f"d{name} on foreign arrays", engine.value(found[name]), g)


def check_bad_input(spec, case, kwargs):
    """Wrong kinds, dtypes, shapes and numbers raise one clear error that names the argument."""
    if case != next(iter(cases(spec))):
        return
    for name, a in kwargs.items():
        if isinstance(a, np.ndarray) and a.dtype.kind == "f":
            _refused(spec, kwargs, name, a.tolist(), DTypeError)
            _refused(spec, kwargs, name, a.astype(np.float16), DTypeError)
            _refused(spec, kwargs, name, a.astype(np.complex128), DTypeError)
            _refused(spec, kwargs, name, np.ones(a.shape, np.int64), DTypeError)
            _refused(spec, kwargs, name, np.zeros((0,) * 0), (ShapeError, DTypeError))
    wrong = {"scale": np.nan, "softcap": -1.0, "align": "left", "empty_row": "none"}
    for name, bad in wrong.items():
        if name in _parameters(spec):
            _refused(spec, kwargs, name, bad, ParameterError)
    if "mask" in _parameters(spec):
        live = np.ones(_map_shape(kwargs))
        _refused(spec, kwargs, "mask", live.astype(np.int64), DTypeError)
        _refused(spec, kwargs, "mask", live, DTypeError)
        queries, keys = live.shape
        _refused(spec, kwargs, "mask", np.ones((queries + 1, keys), bool), ShapeError)
        if "bias" in _parameters(spec) and "attention" in spec.flags:
            _refused(spec, kwargs, "bias", np.ones((queries, keys + 1)), ShapeError)


def _map_shape(kwargs):
    """(T, S), from queries and keys, or from the first array of a row that takes maps."""
    if "q" in kwargs and "k" in kwargs:
        return kwargs["q"].shape[-2], kwargs["k"].shape[-2]
    return next(iter(tree.arrays(kwargs).values())).shape[-2:]


def _refused(spec, kwargs, name, bad, kind):
    """Calling with one bad argument must raise ``kind``, and the message must name it."""
    try:
        spec.call(kwargs | {name: bad})
    except kind as refusal:
        if name not in str(refusal):
            raise CheckFailure(f"the error for a bad {name} does not name it: {refusal}") from None
        return
    except Exception as other:
        raise CheckFailure(
            f"a bad {name} ({_brief(bad)}) raised {type(other).__name__}: {other}"
        ) from None
    raise CheckFailure(f"a bad {name} ({_brief(bad)}) was accepted")


def _brief(x):
    return f"{x.dtype}{x.shape}" if isinstance(x, np.ndarray) else repr(x)[:40]


def _parameters(spec):
    import inspect

    return inspect.signature(spec.main).parameters


# ------------------------------------------------------------------------------ C: relations


def check_causal(spec, case, kwargs):
    """Changing what lies ahead changes no bit; changing what may be seen changes the output."""
    if not (kwargs.get("causal") or "always_causal" in spec.flags):
        return
    live = _live(spec, kwargs | {"causal": True, "mask": None})
    live = live.reshape(-1, *live.shape[-2:]).any(axis=0)
    before = _out(spec, kwargs)["out"]
    rng = _rng(spec, case)
    for s in range(kwargs["k"].shape[-2]):
        changed = dict(kwargs)
        for name, axis in _tokens(spec, kwargs).items():
            if name != "q":
                changed[name] = _redraw(rng, kwargs[name], axis, s)
        after = _out(spec, changed)["out"]
        blind, sees = np.where(~live[:, s])[0], np.where(live[:, s])[0]
        equal(f"rows that may not see key {s}", after[..., blind, :], before[..., blind, :])
        if len(sees) and kwargs.get("mask") is None:
            different(f"rows that see key {s}", after[..., sees, :], before[..., sees, :])


def _tokens(spec, kwargs):
    """Arguments with a token axis; the SPEC may name more than q, k, v."""
    known = {"q": -2, "k": -2, "v": -2} | spec.tokens
    return {
        n: axis(kwargs) if callable(axis) else axis
        for n, axis in known.items()
        if isinstance(kwargs.get(n), np.ndarray)
    }


def _live(spec, kwargs):
    """Who sees whom under the call's options: the row's own pattern, or mask and causality."""
    if spec.visible is not None:
        return spec.visible(kwargs)
    rule = {k: kwargs[k] for k in ("mask", "causal", "align") if k in kwargs}
    return visible(kwargs["q"], kwargs["k"], **rule)


def _redraw(rng, a, axis, place):
    """A copy with one slice along an axis drawn anew, within the range of the old values."""
    b = np.moveaxis(a.copy(), axis, 0)
    low, high = float(np.min(a)), float(np.max(a))
    b[place] = rng.uniform(low, high, b[place].shape)
    return np.moveaxis(b, 0, axis)


def check_key_order(spec, case, kwargs):
    """Permuting keys, values and mask columns together changes nothing."""
    if kwargs.get("causal"):
        return
    order = _rng(spec, case).permutation(kwargs["k"].shape[-2])
    changed = dict(kwargs)
    for name, axis in _tokens(spec, kwargs).items():
        if name != "q":
            changed[name] = np.take(kwargs[name], order, axis=axis)
    for name in ("mask", "bias"):
        a = kwargs.get(name)
        if a is not None and a.shape[-1] == len(order):
            changed[name] = a[..., order]
    _agree("keys permuted", _out(spec, changed), _out(spec, kwargs), ["out"])


def check_query_order(spec, case, kwargs):
    """Permuting the queries permutes the outputs."""
    if kwargs.get("causal"):
        return
    order = _rng(spec, case).permutation(kwargs["q"].shape[-2])
    changed = kwargs | {"q": kwargs["q"][..., order, :]}
    for name in ("mask", "bias"):
        a = kwargs.get(name)
        if a is not None and a.ndim > 1 and a.shape[-2] == len(order):
            changed[name] = a[..., order, :]
    want = _out(spec, kwargs)["out"][..., order, :]
    close("queries permuted", _out(spec, changed)["out"], want, ORDER_EPS)


def check_row_stochastic(spec, case, kwargs):
    """A constant value comes out unchanged, and no output leaves the range of the values."""
    out = _out(spec, kwargs)["out"]
    v = _heads(kwargs["v"], out)
    alive = np.any(_live(spec, kwargs), axis=-1, keepdims=True)
    flat = _out(spec, kwargs | {"v": np.ones_like(kwargs["v"]) * 1.5})["out"]
    close("out for constant v", flat, np.where(alive, 1.5, 0.0) * np.ones_like(flat), 16.0)
    low = np.min(v, axis=-2, keepdims=True) - 1e-12
    high = np.max(v, axis=-2, keepdims=True) + 1e-12
    if np.any(alive & ((out < low) | (out > high))):
        raise CheckFailure("an output lies outside the range of the values")
    if out.size > 1 and np.ptp(out) == 0:
        raise CheckFailure("all outputs are equal: the check would pass for a constant")


def _heads(v, out):
    """Grouped values as every query head sees them."""
    if v.ndim < 3 or out.ndim < 3 or v.shape[-3] == 1 or v.shape[-3] == out.shape[-3]:
        return v
    return np.repeat(v, out.shape[-3] // v.shape[-3], axis=-3)


def check_linear_in_v(spec, case, kwargs):
    """The output is linear in v."""
    v = kwargs["v"]
    other = _rng(spec, case).standard_normal(v.shape)
    a, b = _out(spec, kwargs)["out"], _out(spec, kwargs | {"v": other})["out"]
    both = _out(spec, kwargs | {"v": 2.0 * v - 3.0 * other})["out"]
    close("out for 2 v - 3 w", both, 2.0 * a - 3.0 * b, ORDER_EPS)


def check_scale(spec, case, kwargs):
    """2 q with half the scale is the same bit by bit; another scale is not."""
    scale = kwargs.get("scale") or 1.0 / np.sqrt(kwargs["q"].shape[-1]).item()
    base = _out(spec, kwargs | {"scale": scale})["out"]
    moved = _out(spec, kwargs | {"scale": scale / 2, "q": kwargs["q"] * 2})["out"]
    equal("out for 2 q and scale / 2", moved, base)
    different("out for another scale", _out(spec, kwargs | {"scale": scale * 1.5})["out"], base)


def check_shift(spec, case, kwargs):
    """Adding one vector to all keys shifts each row of scores by a constant: nothing changes."""
    if kwargs.get("softcap") is not None:
        return
    step = _rng(spec, case).standard_normal(kwargs["k"].shape[-1])
    moved = _out(spec, kwargs | {"k": kwargs["k"] + step})
    _agree("keys shifted", moved, _out(spec, kwargs), ["out"], 16 * ORDER_EPS)


def _agree(what, got, want, names, bound=ORDER_EPS):
    for name in names:
        close(f"{name}, {what}", got[name], want[name], bound)


def check_batch(spec, case, kwargs):
    """A batch is its members one by one, heads included; a batch of size 0 gives size 0."""
    names = [*_tokens(spec, kwargs), *(n for n in ("mask", "bias") if kwargs.get(n) is not None)]
    axes = _tokens(spec, kwargs)
    ranks = {n: kwargs[n].ndim - (-axes[n] if n in spec.tokens else 2) for n in names}
    lead = max(ranks.values(), default=0)
    if lead == 0 or "attention" not in spec.flags:
        return
    split = [n for n in names if ranks[n] == lead]
    size = max(kwargs[n].shape[0] for n in split)
    whole = _out(spec, kwargs)["out"]
    for i in range(size):
        one = kwargs | {n: kwargs[n][i % kwargs[n].shape[0]] for n in split}
        if whole.shape[0] == size:
            close(f"member {i}", _out(spec, one)["out"], whole[i], 8.0)
    if case != "batch":
        return
    none = kwargs | {n: kwargs[n][:0] for n in split if kwargs[n].shape[0] == size}
    found = _out(spec, none)["out"]
    if found.shape != (0, *whole.shape[1:]):
        raise CheckFailure(f"a batch of size 0 gave shape {found.shape}")


def check_broadcast(spec, case, kwargs):
    """Values with a leading axis of their own are mixed with the same weights; gradients sum."""
    v = kwargs["v"]
    if kwargs["q"].ndim < 3:
        return  # the new axis would be one of heads
    both = kwargs | {"v": np.stack([v, 2.0 * v - 1.0])}
    out, cache = spec.call(both)
    found = tree.flatten(out)["out"]
    for i in range(2):
        close(f"values {i} of two", found[i], _out(spec, kwargs | {"v": both["v"][i]})["out"], 8.0)
    if spec.backward_function is None:
        return
    dout = tree.cotangents(_rng(spec, case), out)
    gradients = spec.backward_function(dout, cache)
    want = {n: 0.0 for n in gradients if n != "v"}
    size = {n: 0.0 for n in want}
    for i in range(2):
        one, cache = spec.call(kwargs | {"v": both["v"][i]})
        part = {n: a[i] for n, a in tree.floats(dout).items()}
        for name, g in spec.backward_function(tree.like(one, part), cache).items():
            if name == "v":
                close(f"dv of values {i}", gradients["v"][i], g, ORDER_EPS)
            else:
                want[name] = want[name] + g
                size[name] += float(np.max(np.abs(g), initial=0.0))
    bound = max(ORDER_EPS, *_bounds(spec, np.float64).values())
    for name, g in want.items():
        close(f"d{name} for two sets of values", gradients[name], g, bound, size[name])


# ------------------------------------------------------------------------------ D: special values


def check_all_true_mask(spec, case, kwargs):
    """A mask of True is no mask, bit by bit; one False in use changes the output."""
    if kwargs.get("mask") is not None or kwargs.get("causal"):
        return
    shape = (kwargs["q"].shape[-2], kwargs["k"].shape[-2])
    base, gradients = _both(spec, kwargs)
    found, same = _both(spec, kwargs | {"mask": np.ones(shape, bool)})
    equal("out under a mask of True", found["out"], base["out"])
    for name, g in gradients.items():
        equal(f"d{name} under a mask of True", same[name], g)
    holed = np.ones(shape, bool)
    holed[:, 0] = False
    different("out with key 0 hidden", _out(spec, kwargs | {"mask": holed})["out"], base["out"])


def check_hidden_key(spec, case, kwargs):
    """A hidden key equals a missing one, and NaN or infinity in it reaches nothing."""
    if kwargs.get("causal") or kwargs.get("mask") is not None:
        return
    queries, keys = kwargs["q"].shape[-2], kwargs["k"].shape[-2]
    hidden = keys // 2
    mask = np.ones((queries, keys), bool)
    mask[:, hidden] = False
    base, gradients = _both(spec, kwargs | {"mask": mask})
    for bad in (np.nan, np.inf):
        poisoned = kwargs | {"mask": mask}
        for name, axis in _tokens(spec, kwargs).items():
            if name != "q":
                poisoned[name] = _put(kwargs[name], axis, hidden, bad)
        found, same = _both(spec, poisoned)
        equal(f"out with {bad} behind the mask", found["out"], base["out"])
        for name, g in gradients.items():
            equal(f"d{name} with {bad} behind the mask", same[name], g)
    for name, axis in _tokens(spec, kwargs).items():
        if name != "q" and np.any(np.take(gradients[name], hidden, axis=axis)):
            raise CheckFailure(f"d{name} of a hidden key is not zero")
    kept = [s for s in range(keys) if s != hidden]
    if kwargs.get("bias") is None and "positional" not in spec.flags:
        fewer = dict(kwargs)
        for name, axis in _tokens(spec, kwargs).items():
            if name != "q":
                fewer[name] = np.take(kwargs[name], kept, axis=axis)
        _agree("the key hidden or missing", _out(spec, fewer), base, ["out"])


def _put(a, axis, place, value):
    b = np.moveaxis(a.copy(), axis, 0)
    b[place] = value
    return np.moveaxis(b, 0, axis)


def check_live_nan(spec, case, kwargs):
    """A NaN or infinity that a query may see makes that row NaN alone and passes no gradient."""
    base = _out(spec, kwargs)["out"]
    live = _live(spec, kwargs)
    live = np.broadcast_to(live, (*base.shape[:-1], kwargs["k"].shape[-2]))
    last = kwargs["k"].shape[-2] - 1
    query = np.zeros(live.shape[:-1], bool)
    query[..., 0] = np.any(live[..., 0, :], axis=-1)
    for name, place, bad, rows in (
        ("k", last, np.nan, live[..., last]),
        ("v", last, np.inf, live[..., last]),
        ("q", 0, np.nan, query),
    ):
        given = kwargs | {name: _put_one(kwargs[name], place, bad)}
        out, cache = spec.call(given)
        found = tree.flatten(out)["out"]
        if not np.all(np.isnan(found[rows])):
            raise CheckFailure(f"{bad} in a live row of {name} did not make its rows NaN")
        equal(f"rows that do not see {bad} in {name}", found[~rows], base[~rows])
        if spec.backward_function is None:
            continue
        dout = tree.cotangents(_rng(spec, case), out)
        quiet = {n: np.where(rows[..., None], 0.0, a) for n, a in tree.floats(dout).items()}
        _, clean = spec.call(kwargs)
        want = spec.backward_function(tree.like(out, quiet), clean)
        size = scales(want)
        for argument, g in spec.backward_function(dout, cache).items():
            what = f"d{argument} with {bad} in {name}"
            close(what, g, want[argument], ORDER_EPS, size[argument])


def _put_one(a, place, value):
    """A copy with one number of one row replaced."""
    b = a.copy()
    b[..., place, -1] = value
    return b


def check_empty_rows(spec, case, kwargs):
    """A query without keys gives zeros, in output and gradients, or what it was told."""
    shape = (kwargs["q"].shape[-2], kwargs["k"].shape[-2])
    mask = np.ones(shape, bool)
    mask[0] = False
    plain = {n: a for n, a in kwargs.items() if n not in ("mask", "causal", "align")}
    out, cache = spec.call(plain | {"mask": mask})
    value = tree.flatten(out)["out"]
    equal("a row without keys", value[..., 0, :], np.zeros_like(value[..., 0, :]))
    dout = tree.cotangents(_rng(spec, case), out)
    if spec.backward_function is not None:
        gradients = spec.backward_function(dout, cache)
        if np.any(gradients["q"][..., 0, :]):
            raise CheckFailure("dq of a row without keys is not zero")
        if any(not np.all(np.isfinite(g)) for g in gradients.values()):
            raise CheckFailure("a row without keys made a gradient non-finite")
    if "empty_row" not in _parameters(spec):
        return
    found = _out(spec, plain | {"mask": mask, "empty_row": "nan"})["out"]
    if not np.all(np.isnan(found[..., 0, :])) or np.any(np.isnan(found[..., 1:, :])):
        raise CheckFailure("empty_row='nan' must give NaN in that row alone")
    found = _out(spec, plain | {"mask": mask, "empty_row": "uniform"})["out"]
    mean = np.mean(_heads(kwargs["v"], found), axis=-2)
    mean = np.broadcast_to(mean, found[..., 0, :].shape)
    close("empty_row='uniform'", found[..., 0, :], mean, 16.0)
    _refused(spec, plain | {"empty_row": "raise"}, "mask", mask, ParameterError)


def check_no_keys(spec, case, kwargs):
    """Without any key, and without any query, the shapes are right and nothing fails."""
    if case != "plain":
        return
    few = {n: a for n, a in kwargs.items() if n not in ("mask", "bias")}
    for which in ("keys", "queries"):
        cut = dict(few)
        for name, axis in _tokens(spec, kwargs).items():
            if (name == "q") == (which == "queries"):
                cut[name] = np.take(kwargs[name], [], axis=axis)
        found, gradients = _both(spec, cut)
        if np.any(found["out"]) or any(np.any(g) for g in gradients.values()):
            raise CheckFailure(f"without {which} something is not zero")


def check_huge(spec, case, kwargs):
    """Scores of +-1e4 (float32 too) overflow nothing and stay finite, forward and backward."""
    for dtype in (np.float32, np.float64):
        given = _cast(kwargs, dtype)
        given["q"] = given["q"] * np.asarray(1e4, dtype)
        with np.errstate(over="raise", invalid="raise", divide="raise"):
            found, gradients = _both(spec, given)
        for name, a in (found | gradients).items():
            if a.dtype.kind == "f" and name != "lse" and not np.all(np.isfinite(a)):
                raise CheckFailure(f"{name} is not finite for scores of 1e4 in {np.dtype(dtype)}")


# ------------------------------------------------------------------------------ identities


def check_forms(spec, case, kwargs):
    """Every form of the method gives the same output."""
    want = _out(spec, kwargs)
    for form, function in spec.forms.items():
        result = function(**kwargs)
        out = result[0] if spec.backward_function is not None else result
        for name, a in tree.flatten(out).items():
            if a.dtype.kind in "fc":
                close(f"{name} of the {form} form", a, want[name], 4 * ORDER_EPS)
            else:
                equal(f"{name} of the {form} form", a, want[name])


def check_reductions(spec, case, kwargs):
    """Where the SPEC says the method equals another one, it does, outputs and gradients."""
    from attention_ref.core.registry import get

    if case != next(iter(cases(spec))):
        return
    for reduction in spec.reduces_to:
        other = get(reduction.key)
        mine = reduction.kwargs(_rng(spec, reduction.says))
        theirs = reduction.other(mine)
        out, cache = spec.call(mine)
        other_out, other_cache = other.call(theirs)
        a, b = reduction.compare(out, other_out)
        for name, x in tree.floats(a).items():
            close(f"{reduction.says}: {name}", x, tree.floats(b)[name], reduction.eps)
        if not reduction.gradients or spec.backward_function is None:
            continue
        dout = tree.cotangents(_rng(spec, reduction.says), other_out)
        hers = other.backward(dout, other_cache)
        ours = spec.backward_function(tree.like(out, tree.floats(dout)), cache)
        size = scales(hers)
        for name in sorted(set(hers) & set(ours)):
            if hers[name].shape == ours[name].shape:
                what = f"{reduction.says}: d{name}"
                close(what, ours[name], hers[name], reduction.eps, size[name])


def check_backends(spec, case, kwargs):
    """The Numba path meets the float64 truth within the bounds, forward and backward."""
    if spec.numba is None:
        return
    for dtype in (np.float64, np.float32):
        given, eps = _cast(kwargs, dtype), float(np.finfo(dtype).eps)
        want, gradients = _both(spec, _cast(given, np.float64))
        out, cache = spec.numba.forward(**given)
        for name, a in tree.floats(out).items():
            if a.dtype != dtype:
                raise CheckFailure(f"{name} by Numba has dtype {a.dtype}, expected {dtype}")
            close(f"{name} by Numba in {np.dtype(dtype)}", a, want[name], 256.0, eps=eps)
        if spec.numba.backward is None:
            continue
        dout = tree.cotangents(np.random.default_rng(7), out)
        found = spec.numba.backward(dout, cache)
        size = scales(gradients)
        if set(found) != set(gradients):
            raise CheckFailure(f"Numba gradients for {sorted(found)}, not {sorted(gradients)}")
        for name, g in found.items():
            what = f"d{name} by Numba in {np.dtype(dtype)}"
            close(what, g, gradients[name], 512.0, size[name], eps)


def check_docstrings(spec, case, kwargs):
    """The docstring of the main function has the numpydoc sections, and its examples run."""
    import doctest
    import inspect

    if case != next(iter(cases(spec))):
        return
    text = inspect.getdoc(spec.main) or ""
    for section in ("Parameters", "Returns", "Raises", "Notes", "Source", "References", "Examples"):
        if f"\n{section}\n---" not in text:
            raise CheckFailure(f"{spec.main.__name__} has no section {section}")
    names = dict(vars(inspect.getmodule(spec.main)))
    example = doctest.DocTestParser().get_doctest(text, names, spec.main.__name__, None, 0)
    report = []
    runner = doctest.DocTestRunner(verbose=False)
    runner.run(example, out=report.append)
    if runner.failures or not example.examples:
        raise CheckFailure("the docstring's example: " + ("".join(report) or "there is none"))


def check_record(spec, case, kwargs):
    """The SPEC itself: a claim, an independent route, at most two opt-outs, each with a reason."""
    if not spec.claim or not spec.verified_by:
        raise CheckFailure("SPEC needs a claim and at least one independent route")
    if len(spec.opt_out) > MAX_OPT_OUTS:
        raise CheckFailure(f"{len(spec.opt_out)} opt-outs, at most {MAX_OPT_OUTS}")
    unknown = set(spec.opt_out) - set(names()) - {"complex_step"}
    if unknown:
        raise CheckFailure(f"opt-out of unknown checks {sorted(unknown)}")
    if any(len(reason) < 10 for reason in spec.opt_out.values()):
        raise CheckFailure("an opt-out needs a reason")


# ------------------------------------------------------------------------------ running them

GRADIENT = ("gradient_dtypes", "gradient_bounds", "gradients", "every_coordinate",
            "backward_is_linear")  # fmt: skip

NEEDS = {
    "causal": ("causal", "always_causal"),
    "key_order": ("permutation_equivariant",),
    "query_order": ("permutation_equivariant", "query_equivariant"),
    "row_stochastic": ("row_stochastic",),
    "linear_in_v": ("linear_in_v",),
    "scale": ("scaled",),
    "shift": ("shift_invariant",),
    "batch": ("attention",),
    "broadcast": ("attention",),
    "all_true_mask": ("masked",),
    "hidden_key": ("masked",),
    "live_nan": ("attention",),
    "empty_rows": ("masked",),
    "no_keys": ("attention",),
    "huge": ("attention",),
}
"""Check -> flags of which one must be set; checks that are not listed apply to every row."""


def names():
    """Every check by name, in the order written."""
    return [n.removeprefix("check_") for n in globals() if n.startswith("check_")]


def applies(spec, name):
    """Whether a check concerns a row: by kind (gradients) and by flag (relations)."""
    if name in GRADIENT:
        return spec.backward_function is not None
    if name == "forms":
        return bool(spec.forms)
    if name == "backends":
        return spec.numba is not None
    if name == "foreign":
        return "no_foreign" not in spec.flags
    if name == "layouts":
        return any(tree.arrays(kwargs) for kwargs in cases(spec).values())
    return name not in NEEDS or bool(spec.flags & set(NEEDS[name]))


def run_one(spec, name, case, kwargs):
    """One check on one case, as a :class:`Result`; it never raises."""
    if name in spec.opt_out:
        return Result(name, case, True, spec.opt_out[name], True)
    try:
        globals()[f"check_{name}"](spec, case, kwargs)
    except CheckFailure as failure:
        return Result(name, case, False, str(failure))
    except Exception as failure:
        return Result(name, case, False, f"{type(failure).__name__}: {failure}")
    return Result(name, case, True, "")


def run(spec, only=None, draws=1, stop=False):
    """All checks that apply to a row.

    Parameters
    ----------
    spec : Spec
        The row.
    only : collection of str, optional
        Names of checks; all by default.
    draws : int
        How many example sets to draw; golden files belong to the first one.
    stop : bool
        Stop at the first failure.

    Returns
    -------
    list of Result
    """
    results = []
    for draw in range(draws):
        for case, kwargs in cases(spec, draw).items():
            for name in names():
                if (only is not None and name not in only) or not applies(spec, name):
                    continue
                if draw and name in ("golden", "docstrings", "record"):
                    continue
                results.append(run_one(spec, name, case, kwargs))
                if stop and not results[-1].ok:
                    return results
    return results


__all__ = ["CheckFailure", "Result", "applies", "cases", "error", "names", "run", "run_one"]
