"""Entropy-aware ABF: slow loops, worked example, identities, decoding, errors, oracle."""

import math

import numpy as np
import pytest

import attention_ref
from attention_ref import core
from attention_ref.kit.checks import cases
from attention_ref.methods.scores.entropy_abf import (
    entropy_abf_attend,
    entropy_abf_select,
    turn,
)

SPEC = attention_ref.get("scores/entropy_abf")
ROTARY = attention_ref.get("scores/rotary")


def slow_entropy_abf(pos, R, layer=2, budget=4096, base=500000.0, skip=2):
    """One place and one pair at a time."""
    omega, factor = np.zeros(R // 2), np.zeros(pos.shape)
    for i in range(R // 2):
        omega[i] = math.exp(-2 * i / R * math.log(base))
    for place in np.ndindex(*pos.shape):
        factor[place] = 1.0
        if layer >= skip and pos[place] + 1 > budget:
            factor[place] = math.log(float(pos[place]) + 1) / math.log(budget)
    return {"omega": omega, "factor": factor}


def slow_attend(q, k, v, layer, budget, base, causal=True, mask=None):
    """One query at a time; scores by the difference of the angles."""
    T, S, D, E = q.shape[0], k.shape[0], q.shape[1], v.shape[1]
    out = np.zeros((T, E))
    for t in range(T):
        place = t + S - T
        s = max(1.0, math.log(place + 1) / math.log(budget)) if layer > 1 else 1.0
        weight = {}
        for u in range(S):
            if (causal and u > place) or (mask is not None and not mask[t, u]):
                continue
            z = 0.0
            for i in range(D // 2):
                angle = (place - u) * base ** (-2 * i / D)
                qa, qb = float(q[t, i]), float(q[t, i + D // 2])
                ka, kb = float(k[u, i]), float(k[u, i + D // 2])
                z += (qa * ka + qb * kb) * math.cos(angle) + (qa * kb - qb * ka) * math.sin(angle)
            weight[u] = math.exp(s * z / math.sqrt(D))
        total = math.fsum(weight.values())
        for e in range(E):
            out[t, e] = math.fsum(w * float(v[u, e]) for u, w in weight.items()) / (total or 1.0)
    return out


def stream(seed, T, S=None, lead=(), D=6, E=3):
    rng = np.random.default_rng(seed)
    S = T if S is None else S
    return tuple(rng.standard_normal((*lead, *s)) for s in ((T, D), (S, D), (S, E)))


@pytest.mark.parametrize("case", cases(SPEC))
def test_equals_the_slow_loop(case):
    kwargs = cases(SPEC)[case]
    found, slow = entropy_abf_select(**kwargs), slow_entropy_abf(**kwargs)
    np.testing.assert_allclose(found.omega, slow["omega"], rtol=4e-15)
    np.testing.assert_allclose(found.factor, slow["factor"], rtol=2e-15)


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize(("T", "S"), [(12, 12), (3, 15), (1, 9)])
def test_attend_equals_the_slow_loop(T, S, layer):
    q, k, v = stream(0, T, S)
    mask = np.random.default_rng(1).random((T, S)) < 0.7
    mask[0] = False
    for given in ({}, {"mask": mask}, {"causal": False}):
        found = entropy_abf_attend(q, k, v, layer=layer, budget=4, base=50.0, **given)
        slow = slow_attend(q, k, v, layer, 4, 50.0, **given)
        np.testing.assert_allclose(found.out, slow, rtol=0, atol=2e-14)


def test_worked_example():
    """Trained on 2 tokens, D = 2, so omega = 1: the third query has s = ln 3 / ln 2.

    All keys are (1, 0), so with q = (y / s, 0) the scores are y cos(2 - u). Key 0 is hidden, and y
    (1 - cos 1) = ln 4: weights 1/5 and 4/5.
    """
    s, y = math.log(3) / math.log(2), math.log(4) / (1 - math.cos(1))
    q = np.array([[y / s, 0.0]])
    k = np.tile([1.0, 0.0], (3, 1))
    v = np.array([[100.0], [0.0], [5.0]])
    mask = np.array([[False, True, True]])
    found = entropy_abf_attend(q, k, v, budget=2, mask=mask, scale=1.0)
    np.testing.assert_allclose(found.p, [[0.0, 0.2, 0.8]], rtol=1e-14)
    np.testing.assert_allclose(found.out, [[4.0]], rtol=1e-14)
    np.testing.assert_array_equal(found.selected.omega, [1.0])
    np.testing.assert_allclose(found.selected.factor, [s], rtol=1e-15)


def test_numbers_of_the_paper():
    """16384 tokens with a model trained on 4096: 14/12 at the end; 1 up to place 4095."""
    found = entropy_abf_select(np.array([0.0, 4095.0, 4096.0, 16383.0]), R=128)
    np.testing.assert_allclose(found.factor[[0, 1, 3]], [1.0, 1.0, 14 / 12], rtol=1e-15)
    assert 1.0 < found.factor[2] < 1.0001
    assert found.omega[0] == 1.0 and found.omega.shape == (64,)
    np.testing.assert_allclose(found.omega[32], 500000**-0.5, rtol=1e-15)


@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_within_the_trained_length_it_is_rotary_with_another_base(base):
    q, k, v = stream(1, 20, lead=(2,))
    for given in ({"budget": 20}, {"budget": 3, "layer": 0}, {"budget": 3, "layer": 6, "skip": 7}):
        found = entropy_abf_attend(q, k, v, base=base, **given)
        want, cache = ROTARY.forward(q, k, v, base=base, causal=True)
        np.testing.assert_allclose(found.out, want, rtol=0, atol=4e-15)
        np.testing.assert_allclose(found.p, cache.p, rtol=0, atol=4e-15)


def test_beyond_it_is_rotary_with_scaled_queries():
    q, k, v = stream(2, 20, lead=(2,))
    found = entropy_abf_attend(q, k, v, budget=5, base=300.0)
    s = np.maximum(1, np.log(np.arange(1, 21)) / math.log(5))
    want, _ = ROTARY.forward(q * s[:, None], k, v, base=300.0, causal=True)
    np.testing.assert_allclose(found.out, want, rtol=0, atol=1e-14)


def test_with_one_frequency_left_the_angles_hardly_count():
    """base -> infinity: only pair 0 turns; with pair 0 empty it is plain attention."""
    q, k, v = stream(3, 9)
    q[:, [0, 3]] = 0.0
    found = entropy_abf_attend(q, k, v, base=1e300, budget=100)
    want, _ = attention_ref.run("scores/dot_product", q, k, v, causal=True)
    np.testing.assert_allclose(found.out, want, rtol=0, atol=1e-14)


def test_decoding_token_by_token_is_one_pass():
    q, k, v = stream(4, 30)
    whole = entropy_abf_attend(q, k, v, budget=7)
    for t in range(30):
        step = entropy_abf_attend(q[t : t + 1], k[: t + 1], v[: t + 1], budget=7)
        np.testing.assert_allclose(step.out[0], whole.out[t], rtol=0, atol=4e-15)
        np.testing.assert_array_equal(step.selected.factor, whole.selected.factor[t : t + 1])


def test_what_comes_later_changes_no_bit():
    q, k, v = stream(5, 12)
    base = entropy_abf_attend(q, k, v, budget=4).out
    k[7:], v[7:] = 3.0, -1.0
    after = entropy_abf_attend(q, k, v, budget=4).out
    np.testing.assert_array_equal(after[:7], base[:7])
    assert np.all(np.any(after[8:] != base[8:], axis=-1))


def test_only_distances_count_but_for_the_factor():
    q, k, v = stream(6, 4, 10)
    early = entropy_abf_attend(q[-1:], k[-3:], v[-3:], budget=100).out
    mask = np.arange(10)[None, :] >= 7
    late = entropy_abf_attend(q[-1:], k, v, mask=mask, budget=100).out
    np.testing.assert_allclose(early, late, rtol=0, atol=1e-14)
    sharp = entropy_abf_attend(q[-1:], k, v, mask=mask, budget=4)
    assert np.max(np.abs(sharp.out - late)) > 1e-3
    assert sharp.selected.factor[0] == pytest.approx(math.log(10) / math.log(4), rel=1e-15)


def test_turning_keeps_lengths_and_turns_back():
    q, _, _ = stream(7, 5)
    pos, omega = np.arange(5.0), np.array([1.0, 0.3, 0.01])
    turned = turn(q, pos, omega)
    np.testing.assert_allclose(np.sum(turned**2, axis=-1), np.sum(q**2, axis=-1), rtol=1e-14)
    np.testing.assert_allclose(turn(turned, -pos, omega), q, rtol=0, atol=1e-15)


def test_defaults_are_the_official_constants_and_layer_two():
    q, k, v = stream(10, 1, 5000)
    chosen = entropy_abf_attend(q, k, v).selected
    np.testing.assert_allclose(chosen.factor, [math.log(5000) / math.log(4096)], rtol=4e-16)
    np.testing.assert_allclose(chosen.omega[1], 500000 ** (-1 / 3), rtol=4e-16)
    assert entropy_abf_attend(q, k, v, skip=3).selected.factor[0] == 1.0
    assert entropy_abf_select(np.array([9e9]), R=2, skip=3).factor[0] == 1.0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_numbers_reach_only_who_sees_them(bad):
    clean = stream(8, 8)
    base = entropy_abf_attend(*clean, budget=3).out
    for name in range(3):
        given = [x.copy() for x in clean]
        given[name][4, 1] = bad
        out = entropy_abf_attend(*given, budget=3).out
        hit = np.arange(8) == 4 if name == 0 else np.arange(8) >= 4
        assert np.all(np.isnan(out[hit]))
        np.testing.assert_array_equal(out[~hit], base[~hit])


def test_float32_stays():
    q, k, v = (x.astype(np.float32) for x in stream(9, 9))
    found = entropy_abf_attend(q, k, v, budget=3)
    kinds = {found.out.dtype, found.p.dtype, *(x.dtype for x in found.selected)}
    assert kinds == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"R": 5}, core.errors.ParameterError, "R is 5, expected an even"),
        ({"R": 0}, core.errors.ParameterError, "R is 0"),
        ({"layer": -1}, core.errors.ParameterError, "layer is -1"),
        ({"skip": -1}, core.errors.ParameterError, "skip is -1"),
        ({"budget": 1}, core.errors.ParameterError, "budget is 1, expected .* 1 < budget"),
        ({"base": 1.0}, core.errors.ParameterError, "base is"),
        ({"pos": np.array([3.0, -1.0])}, core.errors.ParameterError, "pos holds -1, expected 0 <="),
        ({"pos": np.arange(3)}, core.errors.DTypeError, "pos has dtype int64"),
    ],
)
def test_errors_name_argument_and_expectation(change, error, says):
    with pytest.raises(error, match=says):
        entropy_abf_select(**(cases(SPEC)["plain"] | change))


def test_attend_checks_its_arguments():
    q, k, v = stream(0, 3)
    with pytest.raises(core.errors.ShapeError, match=r"q has T = 3 .* expected at most S = 2"):
        entropy_abf_attend(q, k[:2], v[:2])
    with pytest.raises(core.errors.ParameterError, match="R is 5, expected an even"):
        entropy_abf_attend(q[:, :5], k[:, :5], v)
    with pytest.raises(core.errors.ShapeError, match="mask has shape"):
        entropy_abf_attend(q, k, v, mask=np.ones((3, 4), bool))
    with pytest.raises(core.errors.ParameterError, match="scale is nan"):
        entropy_abf_attend(q, k, v, scale=math.nan)


@pytest.mark.oracle
def test_pytorch_agrees():
    """Complex multiplication and PyTorch's own attention; scores scaled through the queries."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")
    q, k, v = stream(3, 40, lead=(2, 3), D=8)
    pos = torch.arange(40, dtype=torch.float64)
    omega = 500000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    wheel = torch.polar(torch.ones(40, 4, dtype=torch.float64), pos[:, None] * omega)

    def turned(x):
        y = torch.complex(torch.tensor(x[..., :4]), torch.tensor(x[..., 4:])) * wheel
        return torch.cat([y.real, y.imag], dim=-1)

    factor = torch.clamp(torch.log(pos + 1) / math.log(16), min=1.0)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        turned(q) * factor[:, None], turned(k), torch.tensor(v), is_causal=True
    )
    found = entropy_abf_attend(q, k, v, budget=16)
    np.testing.assert_allclose(found.out, theirs.numpy(), rtol=0, atol=1e-14)
