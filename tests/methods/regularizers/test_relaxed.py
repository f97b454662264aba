"""Relaxed attention: slow loop, worked example, identities, limits, errors."""

import math

import numpy as np
import pytest

import attention_ref
from attention_ref import core
from attention_ref.kit.checks import cases
from attention_ref.methods.regularizers.relaxed import (
    relaxed_backward,
    relaxed_draw,
    relaxed_forward,
)

SPEC = attention_ref.get("regularizers/relaxed")
DOT = attention_ref.get("scores/dot_product")

EQUIVALENT = {
    "np.where(good, gamma, 1.0)": "rows with a bad gamma are NaN, or empty with weights 0",
}
"""Mutants of the method that compute the same, and why."""


def slow_relaxed(
    q, k, v, gamma, mask=None, causal=False, align="lower_right", scale=None, softcap=None,
    bias=None,
):  # fmt: skip
    """One number at a time; the mean is formed over the keys that were counted."""
    lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    T, D, S, E = q.shape[-2], q.shape[-1], k.shape[-2], v.shape[-1]
    q = np.broadcast_to(q, (*lead, T, D))
    k = np.broadcast_to(k, (*lead, S, D))
    v = np.broadcast_to(v, (*lead, S, E))
    gamma = np.broadcast_to(gamma, (*lead, T, 1))
    mask = None if mask is None else np.broadcast_to(mask, (*lead, T, S))
    bias = None if bias is None else np.broadcast_to(bias, (*lead, T, S))
    c = 1.0 / math.sqrt(D) if scale is None else scale
    first = S - T if align == "lower_right" else 0
    out = np.zeros((*lead, T, E))
    for place in np.ndindex(*lead):
        for t in range(T):
            weight = {}
            for s in range(S):
                if causal and s > t + first:
                    continue
                if mask is not None and not mask[place][t, s]:
                    continue
                z = c * math.fsum(float(q[place][t, d]) * float(k[place][s, d]) for d in range(D))
                if softcap is not None:
                    z = softcap * math.tanh(z / softcap)
                if bias is not None:
                    z += float(bias[place][t, s])
                weight[s] = math.exp(z)
            total, share = math.fsum(weight.values()), float(gamma[place][t, 0])
            for e in range(E):
                if weight:
                    mixed = math.fsum(w * float(v[place][s, e]) for s, w in weight.items())
                    mean = math.fsum(float(v[place][s, e]) for s in weight) / len(weight)
                    out[place][t, e] = (1.0 - share) * mixed / total + share * mean
    return out


@pytest.mark.parametrize("case", cases(SPEC))
def test_equals_the_slow_loop(case):
    kwargs = cases(SPEC)[case]
    out, _ = relaxed_forward(**kwargs)
    np.testing.assert_allclose(out, slow_relaxed(**kwargs), rtol=0, atol=1e-14)


ROUND = {
    "q": np.array([[1.0]]),
    "k": np.array([[0.0], [math.log(3.0)], [5.0]]),
    "v": np.array([[0.0], [4.0], [100.0]]),
    "mask": np.array([[True, True, False]]),
}
"""Softmax (1/4, 3/4), output 3, mean 2."""


def test_worked_example_forward():
    """gamma = 1/2: p = (3/8, 5/8, 0), o = 5/2; the hidden key is not counted."""
    out, cache = relaxed_forward(**ROUND, gamma=np.array([0.5]))
    np.testing.assert_allclose(cache.softmax, [[0.25, 0.75, 0.0]], rtol=1e-15)
    np.testing.assert_array_equal(cache.even, [[0.5, 0.5, 0.0]])
    np.testing.assert_allclose(cache.p, [[0.375, 0.625, 0.0]], rtol=1e-15)
    np.testing.assert_allclose(out, [[2.5]], rtol=1e-15)


def test_worked_example_backward():
    """dz = (1 - gamma) pi (v - 3) = (-3/8, 3/8), d gamma = mean - softmax output = 2 - 3."""
    out, cache = relaxed_forward(**ROUND, gamma=np.array([0.5]), bias=np.zeros((1, 3)))
    g = relaxed_backward(np.ones_like(out), cache)
    np.testing.assert_allclose(g["bias"], [[-0.375, 0.375, 0.0]], rtol=1e-15)
    np.testing.assert_allclose(g["gamma"], [-1.0], rtol=1e-15)
    np.testing.assert_allclose(g["v"], [[0.375], [0.625], [0.0]], rtol=1e-15)
    np.testing.assert_allclose(g["k"], [[-0.375], [0.375], [0.0]], rtol=1e-15)
    np.testing.assert_allclose(g["q"], [[0.375 * math.log(3.0)]], rtol=1e-15)


@pytest.mark.parametrize("case", cases(SPEC))
def test_is_a_mixture_of_softmax_attention_and_the_mean(case):
    """The whole method from two calls of softmax attention, the second one with scale 0."""
    kwargs = cases(SPEC)[case]
    gamma = kwargs["gamma"]
    plain = {n: a for n, a in kwargs.items() if n != "gamma"}
    flat = {n: a for n, a in plain.items() if n not in ("bias", "softcap")} | {"scale": 0.0}
    sharp, cache = DOT.forward(**plain)
    even, even_cache = DOT.forward(**flat)
    out, mine = relaxed_forward(**kwargs)
    np.testing.assert_allclose(out, (1 - gamma) * sharp + gamma * even, rtol=0, atol=1e-14)
    dout = np.random.default_rng(0).standard_normal(out.shape)
    g = relaxed_backward(dout, mine)
    h, e = DOT.backward((1 - gamma) * dout, cache), DOT.backward(gamma * dout, even_cache)
    for n in set(g) - {"gamma", "v"}:
        np.testing.assert_allclose(g[n], h[n], rtol=0, atol=1e-14)
    np.testing.assert_allclose(g["v"], h["v"] + e["v"], rtol=0, atol=1e-14)
    if "gamma" in g:
        slope = np.sum(dout * (even - sharp), axis=-1, keepdims=True)
        np.testing.assert_allclose(g["gamma"], core.sum_to(slope, gamma.shape), rtol=0, atol=1e-13)
    else:
        assert isinstance(gamma, float)


def test_score_gradients_shrink_by_one_minus_gamma():
    """Doubling 1 - gamma (3/4 to 3/8) halves dq, dk and db bit by bit."""
    kwargs = cases(SPEC)["softcap"]
    out, weak = relaxed_forward(**(kwargs | {"gamma": 0.25}))
    _, strong = relaxed_forward(**(kwargs | {"gamma": 0.625}))
    dout = np.random.default_rng(1).standard_normal(out.shape)
    g, h = relaxed_backward(dout, weak), relaxed_backward(dout, strong)
    for n in ("q", "k", "bias"):
        np.testing.assert_array_equal(g[n], 2 * h[n])
        assert np.any(g[n])


def test_weights_have_a_floor_and_sum_to_one():
    kwargs = cases(SPEC)["mask"] | {"scale": 30.0, "gamma": 0.3}
    _, cache = relaxed_forward(**kwargs)
    live = kwargs["mask"]
    n = live.sum(-1, keepdims=True)
    assert np.all(cache.p[live] >= np.broadcast_to(0.3 / np.maximum(n, 1), live.shape)[live])
    assert not np.any(cache.p[~live])
    np.testing.assert_allclose(cache.p.sum(-1), live.any(-1), rtol=0, atol=1e-15)


def test_gamma_one_is_the_mean_and_leaves_the_scores_alone():
    kwargs = cases(SPEC)["causal"] | {"gamma": np.ones((5, 1))}
    out, cache = relaxed_forward(**kwargs)
    for t in range(5):
        np.testing.assert_allclose(out[:, t], kwargs["v"][:, : t + 3].mean(-2), atol=1e-15)
    g = relaxed_backward(np.ones_like(out), cache)
    assert not np.any(g["q"]) and not np.any(g["k"]) and np.any(g["gamma"])


def test_relaxing_raises_the_entropy():
    kwargs = cases(SPEC)["plain"]
    entropy = []
    for gamma in (0.0, 0.2, 0.5, 1.0):
        p = relaxed_forward(**(kwargs | {"gamma": gamma}))[1].p
        entropy.append(np.mean(-np.sum(p * np.log(p), axis=-1)))
    assert np.all(np.diff(entropy) > 0)
    np.testing.assert_allclose(entropy[-1], math.log(6), rtol=1e-15)


def test_one_gamma_a_query_and_one_a_head():
    kwargs = cases(SPEC)["batch"] | {"q": cases(SPEC)["plain"]["q"]}
    rows = np.random.default_rng(2).random((2, 5, 1))
    out, cache = relaxed_forward(**(kwargs | {"gamma": rows}))
    for h in range(2):
        for t in range(5):
            one, _ = relaxed_forward(**(kwargs | {"gamma": float(rows[h, t, 0])}))
            np.testing.assert_allclose(out[:, h, t], one[:, h, t], rtol=0, atol=1e-15)
    assert relaxed_backward(np.ones_like(out), cache)["gamma"].shape == (2, 5, 1)


def test_minus_infinity_in_a_bias_hides_a_key_as_the_mask_does():
    kwargs = cases(SPEC)["mask"]
    bias = np.where(kwargs["mask"], 0.0, -np.inf)
    out, cache = relaxed_forward(**kwargs)
    plain = {n: a for n, a in kwargs.items() if n != "mask"}
    v = kwargs["v"].copy()
    v[1, 0] = np.where(kwargs["mask"][1, :, 0].any(), v[1, 0], np.nan)
    same, other = relaxed_forward(**(plain | {"bias": bias, "v": v}))
    np.testing.assert_array_equal(out, same)
    dout = np.random.default_rng(3).standard_normal(out.shape)
    mine, theirs = relaxed_backward(dout, cache), relaxed_backward(dout, other)
    for n in mine:
        np.testing.assert_array_equal(mine[n], theirs[n])
    assert not np.any(theirs["bias"][~kwargs["mask"]])


def test_uniform_empty_rows_do_not_depend_on_gamma_or_scores():
    kwargs = cases(SPEC)["plain"] | {"gamma": np.full((5, 1), 0.4)}
    mask = np.ones((5, 6), bool)
    mask[2], mask[0, 3:] = False, False
    out, cache = relaxed_forward(**kwargs, mask=mask, empty_row="uniform")
    np.testing.assert_allclose(cache.p[:, 2], 1 / 6, rtol=1e-15)
    np.testing.assert_array_equal(out[:, :2], relaxed_forward(**kwargs, mask=mask)[0][:, :2])
    g = relaxed_backward(np.random.default_rng(4).standard_normal(out.shape), cache)
    assert g["gamma"][2] == 0 and not np.any(g["q"][:, 2]) and np.all(g["gamma"][:2] != 0)
    single = {n: a[:, :1] if n in "kv" else a for n, a in kwargs.items()}
    alone, _ = relaxed_forward(**single, mask=np.zeros((5, 1), bool), empty_row="uniform")
    np.testing.assert_allclose(alone, np.broadcast_to(single["v"], alone.shape), rtol=1e-15)


@pytest.mark.parametrize("name", ["q", "gamma", "bias"])
def test_a_poisoned_row_sends_nothing_back(name):
    """NaN or infinity in one row: that row is NaN, all else is as if its dout were 0."""
    kwargs = cases(SPEC)["bias"] | {"gamma": np.full((2, 5, 1), 0.4)}
    kwargs["gamma"][1, 3] = 0.7
    bad = kwargs[name].copy()
    bad[1, 2, 0] = np.inf if name == "gamma" else np.nan
    out, cache = relaxed_forward(**(kwargs | {name: bad}))
    _, same = relaxed_forward(**kwargs)
    assert np.all(np.isnan(out[1, 2])) and np.sum(np.isnan(out)) == 3
    dout = np.random.default_rng(6).standard_normal(out.shape)
    g = relaxed_backward(dout, cache)
    dout[1, 2] = 0.0
    for n, x in relaxed_backward(dout, same).items():
        np.testing.assert_allclose(g[n], x, rtol=0, atol=1e-14)


def test_a_bad_gamma_of_an_empty_row_has_no_effect():
    kwargs = cases(SPEC)["plain"] | {"gamma": np.full((5, 1), 0.4)}
    mask = np.ones((5, 6), bool)
    mask[2] = False
    kwargs["gamma"][2] = np.nan
    out, cache = relaxed_forward(**kwargs, mask=mask)
    assert np.all(np.isfinite(out)) and not np.any(out[:, 2])
    g = relaxed_backward(np.ones_like(out), cache)
    assert all(np.all(np.isfinite(x)) for x in g.values())


def test_values_with_a_batch_of_their_own():
    kwargs = cases(SPEC)["no-heads"]
    single, _ = relaxed_forward(**kwargs)
    out, cache = relaxed_forward(**(kwargs | {"v": np.stack([kwargs["v"], 2 * kwargs["v"]])}))
    np.testing.assert_allclose(out[1], 2 * single, rtol=0, atol=1e-15)
    g = relaxed_backward(np.ones_like(out), cache)
    assert {n: x.shape for n, x in g.items()} == {
        "q": (5, 4), "k": (7, 4), "v": (2, 7, 3), "gamma": (1, 1)
    }  # fmt: skip


def test_fuzzy_draws_are_clipped_and_repeat():
    draws = [relaxed_draw(np.random.default_rng(i), 0.1, 0.2) for i in range(400)]
    assert min(draws) == 0.0 and max(draws) < 1.0
    assert abs(np.median(draws) - 0.1) < 0.04
    inside = [x for x in draws if x > 0.1]
    assert abs(np.sqrt(np.mean(np.square(np.array(inside) - 0.1))) - 0.2) < 0.03
    assert max(relaxed_draw(np.random.default_rng(i), 0.9, 0.5) for i in range(20)) == 1.0
    assert relaxed_draw(np.random.default_rng(0), 0.25, 0.0) == 0.25
    assert isinstance(draws[0], float)


@pytest.mark.parametrize(
    ("gamma", "error", "says"),
    [
        (1.1, core.errors.ParameterError, "gamma is 1.1, expected"),
        (-0.1, core.errors.ParameterError, "gamma is -0.1, expected"),
        (math.nan, core.errors.ParameterError, "gamma is nan, expected"),
        (np.float64(1.5), core.errors.ParameterError, "gamma is .*1.5"),
        (None, core.errors.DTypeError, "gamma is a NoneType"),
        ("0.1", core.errors.DTypeError, "gamma is a str"),
        ([0.1], core.errors.DTypeError, "gamma is a list"),
        (np.array(0.1), core.errors.ShapeError, r"gamma has shape \(\), .* shape \(1,\)"),
        (np.ones(6), core.errors.ShapeError, r"gamma has shape \(6,\).*\(..., T, 1\)"),
        (np.ones((3, 1)), core.errors.ShapeError, r"gamma has shape \(3, 1\)"),
        (np.ones((5, 2)), core.errors.ShapeError, r"gamma has shape \(5, 2\)"),
        (np.ones((5, 1), int), core.errors.DTypeError, "gamma has dtype int64"),
    ],
)
def test_errors_of_gamma(gamma, error, says):
    with pytest.raises(error, match=says):
        relaxed_forward(**(cases(SPEC)["plain"] | {"gamma": gamma}))


def test_both_ends_of_gamma_are_allowed():
    for gamma in (0, 1, 0.0, 1.0):
        out, cache = relaxed_forward(**(cases(SPEC)["plain"] | {"gamma": gamma}))
        assert "gamma" not in relaxed_backward(np.ones_like(out), cache)


def test_other_errors():
    out, cache = relaxed_forward(**cases(SPEC)["plain"])
    with pytest.raises(core.errors.ShapeError, match="dout has shape"):
        relaxed_backward(out[0], cache)
    rng = np.random.default_rng(0)
    for bad in ((7, 0.1, 0.1), (rng, 1.5, 0.1), (rng, -0.5, 0.1), (rng, 0.1, -1.0)):
        with pytest.raises((core.errors.DTypeError, core.errors.ParameterError)):
            relaxed_draw(*bad)
