"""Broken twins of right methods: each classic mistake must turn the named generic check red.

A check that lets its twin pass checks nothing. The twins are full methods, so that a mistake and
its consistent backward come together: the gradient checks alone cannot see those.
"""

import dataclasses

import numpy as np
import pytest

import attention_ref
from attention_ref import core
from attention_ref.kit import checks
from attention_ref.methods.scores import dot_product as right

SPEC = attention_ref.get("scores/dot_product")
CASES = ("plain", "causal", "mask", "bias", "batch")


def reds(spec, only=None):
    """Names of the checks that fail on a spec."""
    found = set()
    for case in CASES:
        kwargs = checks.cases(spec)[case]
        for name in only or checks.names():
            if name == "docstrings" or not checks.applies(spec, name):
                continue
            if not checks.run_one(spec, name, case, kwargs).ok:
                found.add(name)
    return found


def twin(forward=None, backward=None):
    return dataclasses.replace(
        SPEC,
        forward=forward or right.dot_product_forward,
        backward=backward or right.dot_product_backward,
    )


def test_the_right_method_passes():
    assert reds(SPEC) == set()


# ------------------------------------------------------------------ wrong backwards


def backward_with(change):
    def backward(dout, cache):
        return change(right.dot_product_backward(dout, cache), dout, cache)

    return backward


def no_row_sum(dout, cache):
    q, k, v, p, live = cache.q, cache.k, cache.v, cache.p, cache.live
    dp, dv = core.mix_backward(np.where(cache.poison, 0.0, dout), p, v)
    dz = np.where(live, p * dp, 0.0)
    dq, dk = core.scores_backward(dz, q, k, cache.scale)
    g = right.dot_product_backward(dout, cache)
    return g | {"q": dq, "k": dk, "v": dv}


WRONG_BACKWARDS = {
    "sign": backward_with(lambda g, d, c: g | {"q": -g["q"]}),
    "missing scale": backward_with(lambda g, d, c: g | {"k": g["k"] / c.scale}),
    "row-sum term missing": no_row_sum,
    "dv from dout alone": backward_with(
        lambda g, d, c: g | {"v": np.broadcast_to(d.mean(-2, keepdims=True), g["v"].shape)}
    ),
    "zeros": backward_with(lambda g, d, c: {n: np.zeros_like(a) for n, a in g.items()}),
    "float64 for all": backward_with(lambda g, d, c: {n: a.astype(float) for n, a in g.items()}),
    "a gradient is missing": backward_with(lambda g, d, c: {n: g[n] for n in ("q", "k")}),
}


@pytest.mark.parametrize("name", WRONG_BACKWARDS)
def test_wrong_backwards_are_caught_without_golden_files(name):
    found = reds(twin(backward=WRONG_BACKWARDS[name]), only=checks.GRADIENT)
    assert found, name


def test_dq_and_dk_swapped():
    """On square shapes nothing but the values can tell."""

    def backward(dout, cache):
        g = right.dot_product_backward(dout, cache)
        return g | {"q": g["k"], "k": g["q"]}

    def example(rng):
        return {"plain": core.examples.qkv(rng, T=5, S=5) | {"scale": 0.7}}

    spec = dataclasses.replace(SPEC, backward=backward, example=example)
    kwargs = checks.cases(spec)["plain"]
    assert not checks.run_one(spec, "gradients", "plain", kwargs).ok
    assert not checks.run_one(spec, "every_coordinate", "plain", kwargs).ok


def test_a_backward_that_writes_into_its_cotangent():
    def backward(dout, cache):
        g = right.dot_product_backward(dout, cache)
        dout *= 0.5
        return g

    assert "inputs_unmodified" in reds(twin(backward=backward), only=("inputs_unmodified",))


# ------------------------------------------------------------------ wrong forwards


def forward_with(**replaced):
    """The right forward with some of its core steps replaced, backward by the tape."""

    def forward(*args, **kwargs):
        where = {n: core.dense if n == "row_max" else core for n in replaced}
        saved = {n: getattr(where[n], n) for n in replaced}
        try:
            for n, f in replaced.items():
                setattr(where[n], n, f)
            return right.dot_product_forward(*args, **kwargs)
        finally:
            for n, f in saved.items():
                setattr(where[n], n, f)

    return forward


def wrong_axis(z, live, empty_row="zero"):
    p, _ = core.dense.softmax_forward(
        np.swapaxes(z, -1, -2),
        np.swapaxes(np.broadcast_to(live, z.shape), -1, -2),
        empty_row,
    )
    return np.swapaxes(p, -1, -2), np.zeros_like(z[..., 0])


def mask_ignored(q, k, **rule):
    return np.ones_like(q, shape=(q.shape[-2], k.shape[-2]), dtype=bool)


def mask_inverted(q, k, *, mask=None, **rule):
    return core.masks.visible(q, k, mask=None if mask is None else ~mask, **rule)


def upper_left_always(q, k, **rule):
    return core.masks.visible(q, k, **(rule | {"align": "upper_left"}))


def off_by_one(q, k, *, causal=False, align="lower_right", mask=None, empty_row="zero"):
    live = core.masks.visible(q, k, mask=mask)
    if causal:
        t, s = np.arange(q.shape[-2]), np.arange(k.shape[-2])
        live = live & (s[None] <= t[:, None] + k.shape[-2] - q.shape[-2] + 1)
    return live


def minus_1e9(z, live, empty_row="zero"):
    return core.dense.softmax_forward(np.where(live, z, -1e9), np.ones_like(live), empty_row)


WRONG_FORWARDS = {
    "softmax over queries": ({"softmax_forward": wrong_axis}, {"row_stochastic"}),
    "mask ignored": ({"visible": mask_ignored}, {"hidden_key", "causal", "empty_rows"}),
    "mask inverted": ({"visible": mask_inverted}, {"all_true_mask", "hidden_key"}),
    "sees one key ahead": ({"visible": off_by_one}, {"causal"}),
    "alignment ignored": ({"visible": upper_left_always}, {"causal"}),
    "mask of -1e9": ({"softmax_forward": minus_1e9}, {"empty_rows"}),
    "scale forgotten": (
        {"scores_forward": lambda q, k, c: core.dense.scores_forward(q, k, 1.0)},
        {"scale", "gradients"},
    ),
    "scale twice": (
        {"scores_forward": lambda q, k, c: core.dense.scores_forward(q, k, c * c)},
        {"scale", "gradients"},
    ),
    "output always zero": (
        {"mix_forward": lambda p, v: core.dense.mix_forward(p, v) * 0.0},
        {"row_stochastic", "gradients"},
    ),
    "NaN leaks from behind the mask": (
        {
            "quarantine": lambda q, k, v, live, empty_row: (
                q, k, v, np.zeros_like(q[..., :1], dtype=bool)
            )
        },
        {"hidden_key"},
    ),
    "no maximum subtracted": (
        {"row_max": lambda z: np.zeros_like(z, shape=(*z.shape[:-1], 1))},
        {"huge"},
    ),
    "float64 inside": (
        {"scores_forward": lambda q, k, c: core.dense.scores_forward(q, k, np.float64(c))},
        {"dtypes", "foreign"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_FORWARDS)
def test_wrong_forwards_are_caught(name):
    replaced, expected = WRONG_FORWARDS[name]
    found = reds(twin(forward=forward_with(**replaced)))
    assert found & expected, f"{name}: only {sorted(found)} turned red"
    beyond_values = ("NaN leaks from behind the mask", "mask of -1e9", "float64 inside",
                     "no maximum subtracted")  # fmt: skip
    assert "golden" in found or name in beyond_values


# ------------------------------------------------------------------ a state that is not reset

STATE = []


def leaking_state(q, k, v, **kwargs):
    out, cache = right.dot_product_forward(q, k, v, **kwargs)
    STATE.append(out)
    return out + 1e-9 * len(STATE), cache


def test_a_state_that_is_not_reset_between_calls():
    assert "inputs_unmodified" in reds(twin(forward=leaking_state), only=("inputs_unmodified",))


# ------------------------------------------------------------------ the record itself


def test_too_many_opt_outs_and_missing_reasons():
    three = {name: "a reason of some length" for name in ("huge", "shift", "scale")}
    spec = dataclasses.replace(SPEC, opt_out=three)
    assert not checks.run_one(spec, "record", "plain", {}).ok
    spec = dataclasses.replace(SPEC, opt_out={"huge": ""})
    assert not checks.run_one(spec, "record", "plain", {}).ok
    spec = dataclasses.replace(SPEC, opt_out={"hughe": "a reason of some length"})
    assert not checks.run_one(spec, "record", "plain", {}).ok


def test_an_opt_out_is_reported_with_its_reason():
    spec = dataclasses.replace(SPEC, opt_out={"huge": "a reason of some length"})
    result = checks.run_one(spec, "huge", "plain", checks.cases(spec)["plain"])
    assert result.ok and result.opted_out and result.message == "a reason of some length"


def test_a_wrong_reduction_is_caught():
    reduction = core.Reduction(
        key="scores/dot_product",
        says="twice the scale is the same (it is not)",
        kwargs=lambda rng: core.examples.qkv(rng) | {"scale": 0.5},
        other=lambda kwargs: kwargs | {"scale": 1.0},
    )
    spec = dataclasses.replace(SPEC, reduces_to=(reduction,))
    assert not checks.run_one(spec, "reductions", "plain", checks.cases(spec)["plain"]).ok


def test_a_wrong_form_is_caught():
    def form(**kwargs):
        out, cache = right.dot_product_forward(**kwargs)
        return out * (1 + 1e-10), cache

    spec = dataclasses.replace(SPEC, forms={"parallel": form})
    assert not checks.run_one(spec, "forms", "plain", checks.cases(spec)["plain"]).ok


def test_a_wrong_form_of_a_policy_is_caught():
    """Indices are compared too, not only numbers with a point."""
    policy = attention_ref.get("cache/streaming_sinks")

    def form(length, *, sinks, window):
        return policy.select(length, sinks=sinks + 1, window=window - 1)

    spec = dataclasses.replace(policy, forms={"walk": form})
    kwargs = checks.cases(policy)["plain"]
    assert checks.run_one(policy, "forms", "plain", kwargs).ok
    assert not checks.run_one(spec, "forms", "plain", kwargs).ok


def test_an_edit_of_maps_that_takes_any_mask_is_caught():
    row = attention_ref.get("steering/attention_calibration")
    kwargs = checks.cases(row)["plain"]

    def edit(p, *, beta=0.4, alpha=5.0, threshold=None, heads=None, mask=None, causal=True,
             align="lower_right"):  # fmt: skip
        return row.edit(p, beta=beta, alpha=alpha, threshold=threshold, align=align)

    spec = dataclasses.replace(row, edit=edit)
    assert checks.run_one(row, "bad_input", "plain", kwargs).ok
    assert "mask" in checks.run_one(spec, "bad_input", "plain", kwargs).message


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_wrong_fast_path_is_caught_in_each_dtype(dtype):
    def backward(dout, cache):
        g = SPEC.numba.backward(dout, cache)
        return g | {"k": g["k"] * dtype(1.001)} if dout.dtype == dtype else g

    spec = dataclasses.replace(SPEC, numba=core.Backend(SPEC.numba.forward, backward))
    result = checks.run_one(spec, "backends", "plain", checks.cases(spec)["plain"])
    assert not result.ok and "dk by Numba" in result.message


def test_every_flag_of_a_spec_is_known():
    known = {flag for flags in checks.NEEDS.values() for flag in flags}
    known |= {"no_foreign", "positional"}
    for key in attention_ref.keys():  # noqa: SIM118
        assert attention_ref.get(key).flags <= known, key
