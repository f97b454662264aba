"""Entropy scale: slow loop, worked example, the scale of the scores, limits, entropy, oracle."""

import math

import numpy as np
import pytest

import attention_ref
from attention_ref import core
from attention_ref.kit.checks import cases
from attention_ref.methods.normalizers.resolution_entropy_scale import (
    entropy_gain,
    entropy_scale,
    resolution_entropy_scale_backward,
    resolution_entropy_scale_edit,
)

SPEC = attention_ref.get("normalizers/resolution_entropy_scale")
DOT = attention_ref.get("scores/dot_product")
EQUIVALENT = {
    "resolution_entropy_scale_edit: 0.0  ->  1.0 (2)": "stands in for a row that becomes NaN",
    "resolution_entropy_scale_edit: 1.0  ->  2.0 (2)": "its logarithm is masked by the softmax",
    "resolution_entropy_scale_backward: 1.0  ->  2.0 (2)": "divides what is replaced by 0",
}


def slow_resolution_entropy_scale(p, trained, N=None, strength=1.0, mask=None):
    """One row at a time: powers of the weights, brought to the old sum."""
    mask = None if mask is None else np.broadcast_to(mask, p.shape)
    ratio = math.log(p.shape[-1] if N is None else N) / math.log(trained)
    out = np.zeros(p.shape)
    for place in np.ndindex(*p.shape[:-1]):
        seen = [s for s in range(p.shape[-1]) if mask is None or mask[place][s]]
        seen = [s for s in seen if p[place][s] != 0]
        power = {s: float(p[place][s]) ** (ratio ** (strength / 2)) for s in seen}
        before = math.fsum(float(p[place][s]) for s in seen)
        after = math.fsum(power.values())
        for s in seen:
            out[place][s] = power[s] * before / after
    return out


@pytest.mark.parametrize("case", cases(SPEC))
def test_equals_the_slow_loop(case):
    kwargs = cases(SPEC)[case]
    out, _ = resolution_entropy_scale_edit(**kwargs)
    np.testing.assert_allclose(out, slow_resolution_entropy_scale(**kwargs), rtol=0, atol=1e-15)


def test_worked_example():
    """N_0 = 2, N = 16: g = sqrt(4) = 2; (1/4, 3/4) squared is 1 to 9. Back with g = 1/2."""
    p = np.array([[0.25, 0.75], [0.5, 0.5]])
    out, cache = resolution_entropy_scale_edit(p, trained=2, N=16)
    assert cache.gain == 2.0
    np.testing.assert_allclose(out, [[0.1, 0.9], [0.5, 0.5]], rtol=0, atol=1e-15)
    back, cache = resolution_entropy_scale_edit(out, trained=16)  # N = S = 2
    assert cache.gain == 0.5
    np.testing.assert_allclose(back, p, rtol=0, atol=1e-15)


def test_worked_example_backward():
    """y = (0.1, 0.9); dout = (1, 0): dz = (0.09, -0.09), dp = 2 dz / p + 0.1."""
    _, cache = resolution_entropy_scale_edit(np.array([[0.25, 0.75]]), trained=2, N=16)
    g = resolution_entropy_scale_backward(np.array([[1.0, 0.0]]), cache)
    np.testing.assert_allclose(g["p"], [[0.82, -0.14]], rtol=0, atol=1e-15)


def test_the_gain_in_numbers():
    assert entropy_gain(4096, 4096) == 1.0 and entropy_gain(1, 4096) == 0.0
    assert entropy_gain(16, 2) == 2.0 and entropy_gain(16, 2, 2.0) == 4.0
    assert entropy_gain(16, 2, 0.0) == 1.0 and entropy_gain(1, 2, 0.0) == 1.0
    np.testing.assert_allclose(entropy_gain(64**2, 64), math.sqrt(2.0), rtol=1e-15)
    assert entropy_scale(64, 4096, 4096) == 0.125  # the standard scale
    np.testing.assert_allclose(entropy_scale(4, 81, 3), 1.0, rtol=1e-15)


@pytest.mark.parametrize("N", [3, 9, 200])
def test_it_is_another_scale_of_the_scores(N):
    """Maps with the standard scale, edited, are the maps with lambda."""
    kwargs = core.examples.qkv(np.random.default_rng(N), T=4, S=9, D=5)
    _, before = DOT.forward(**kwargs)
    _, after = DOT.forward(**kwargs, scale=entropy_scale(5, N, 9))
    out, _ = resolution_entropy_scale_edit(before.p, trained=9, N=N)
    np.testing.assert_allclose(out, after.p, rtol=0, atol=2e-15)


def test_the_gradient_runs_through_the_softmax_as_that_of_the_scale():
    """d of the scores: through the edit and the softmax, or through the softmax with lambda."""
    rng = np.random.default_rng(0)
    z, dout = rng.standard_normal((2, 4, 6)), rng.standard_normal((2, 4, 6))
    live = np.ones((4, 6), bool)
    p, _ = core.softmax_forward(z, live)
    _, cache = resolution_entropy_scale_edit(p, trained=6, N=50)
    dp = resolution_entropy_scale_backward(dout, cache)["p"]
    dz = core.softmax_backward(dp, p, live)
    sharp, _ = core.softmax_forward(cache.gain * z, live)
    want = cache.gain * core.softmax_backward(dout, sharp, live)
    np.testing.assert_allclose(dz, want, rtol=0, atol=2e-15)


@pytest.mark.parametrize("case", cases(SPEC))
def test_strength_0_is_the_identity_bit_by_bit(case):
    kwargs = cases(SPEC)[case] | {"strength": 0.0}
    out, cache = resolution_entropy_scale_edit(**kwargs)
    np.testing.assert_array_equal(out, kwargs["p"])
    dout = np.random.default_rng(1).standard_normal(out.shape)
    live = np.broadcast_to(cache.live, out.shape)
    dp = resolution_entropy_scale_backward(dout, cache)["p"]
    np.testing.assert_array_equal(dp, np.where(live, dout, 0.0))


def test_the_size_of_training_changes_no_bit():
    kwargs = cases(SPEC)["same"]
    out, cache = resolution_entropy_scale_edit(**kwargs)
    assert cache.gain == 1.0
    np.testing.assert_array_equal(out, kwargs["p"])
    near, _ = resolution_entropy_scale_edit(kwargs["p"], trained=4, strength=1e-12, N=5)
    np.testing.assert_allclose(near, kwargs["p"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", cases(SPEC))
def test_rows_keep_their_sum_and_their_order(case):
    kwargs = cases(SPEC)[case]
    out, cache = resolution_entropy_scale_edit(**kwargs)
    np.testing.assert_allclose(out.sum(-1), kwargs["p"].sum(-1), rtol=0, atol=1e-15)
    assert np.all(out >= 0) and not np.any(out[kwargs["p"] == 0])
    if cache.gain > 0:
        a, b = np.argsort(out, axis=-1), np.argsort(kwargs["p"], axis=-1)
        np.testing.assert_array_equal(a, b)


def test_one_token_gives_equal_weights():
    out, cache = resolution_entropy_scale_edit(**cases(SPEC)["one"])
    assert cache.gain == 0.0
    np.testing.assert_allclose(out, 0.25, rtol=1e-15)


def test_a_large_gain_leaves_the_largest_weight():
    p = np.array([[0.3, 0.5, 0.2]])
    out, cache = resolution_entropy_scale_edit(p, trained=2, N=4, strength=24.0)
    assert cache.gain == 2.0**12
    np.testing.assert_array_equal(out, [[0.0, 1.0, 0.0]])


def test_two_edits_are_one():
    """From 4 to 16 and from 16 to 64 is from 4 to 64: the gains multiply."""
    p = cases(SPEC)["plain"]["p"]
    step, _ = resolution_entropy_scale_edit(p, trained=4, N=16)
    step, _ = resolution_entropy_scale_edit(step, trained=16, N=64)
    once, _ = resolution_entropy_scale_edit(p, trained=4, N=64)
    np.testing.assert_allclose(step, once, rtol=0, atol=1e-15)


def test_more_tokens_lower_the_entropy_and_fewer_raise_it():
    p = cases(SPEC)["plain"]["p"]

    def entropy(x):
        return -np.sum(x * np.log(x), axis=-1)

    more, _ = resolution_entropy_scale_edit(p, trained=16, N=17)
    fewer, _ = resolution_entropy_scale_edit(p, trained=16, N=15)
    assert np.all(entropy(more) < entropy(p)) and np.all(entropy(fewer) > entropy(p))


def test_entropy_of_gaussian_scores():
    """ln N - s^2 / 2 for scores of variance s^2, of which the edit makes g^2 s^2."""
    z = np.random.default_rng(2).standard_normal((200, 4096))
    p, _ = core.softmax_forward(0.9 * z, np.ones(4096, bool))
    out, cache = resolution_entropy_scale_edit(p, trained=64)
    assert abs(cache.gain**2 - 2) < 1e-12
    for weights, variance in ((p, 0.81), (out, 1.62)):
        entropy = -np.sum(weights * np.log(weights), axis=-1).mean()
        assert abs(entropy - (math.log(4096) - variance / 2)) < 0.01


def test_hidden_weights_have_no_effect_and_empty_rows_stay_zero():
    kwargs = cases(SPEC)["mask"]
    out, cache = resolution_entropy_scale_edit(**kwargs)
    assert not np.any(out[0, 1])
    for bad in (np.nan, np.inf, -1.0, 0.7):
        given = np.where(kwargs["mask"], kwargs["p"], bad)
        found, again = resolution_entropy_scale_edit(**(kwargs | {"p": given}))
        np.testing.assert_array_equal(found, out)
        dp = resolution_entropy_scale_backward(np.ones_like(out), again)["p"]
        assert not np.any(dp[~kwargs["mask"]])
        np.testing.assert_array_equal(
            dp, resolution_entropy_scale_backward(np.ones_like(out), cache)["p"]
        )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.1])
@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_what_is_no_weight_makes_its_row_nan_alone(bad, strength):
    kwargs = cases(SPEC)["plain"] | {"strength": strength}
    p = kwargs["p"].copy()
    p[1, 2, 3] = bad
    out, cache = resolution_entropy_scale_edit(**(kwargs | {"p": p}))
    want, _ = resolution_entropy_scale_edit(**kwargs)
    assert np.all(np.isnan(out[1, 2])) and np.sum(np.isnan(out)) == 5
    np.testing.assert_array_equal(out[0], want[0])
    dp = resolution_entropy_scale_backward(np.ones_like(out), cache)["p"]
    assert not np.any(dp[1, 2]) and np.all(np.isfinite(dp))


def test_a_weight_of_zero_stays_zero():
    p = np.array([[0.0, 0.25, 0.75], [0.0, 0.0, 0.0]])
    for N in (16, 1):
        out, cache = resolution_entropy_scale_edit(p, trained=2, N=N)
        want = [[0.0, 0.1, 0.9], [0, 0, 0]] if N == 16 else [[0.0, 0.5, 0.5], [0, 0, 0]]
        np.testing.assert_allclose(out, want, rtol=0, atol=1e-15)
        dp = resolution_entropy_scale_backward(np.ones_like(out), cache)["p"]
        assert not np.any(dp[:, 0]) and not np.any(dp[1]) and np.all(np.isfinite(dp))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"trained": 1}, core.errors.ParameterError, "trained is 1, expected an integer 2 <="),
        ({"trained": 64.0}, core.errors.ParameterError, "trained is 64.0"),
        ({"N": 0}, core.errors.ParameterError, "N is 0, expected an integer 1 <="),
        ({"strength": -1.0}, core.errors.ParameterError, "strength is -1.0"),
        ({"mask": np.ones((5, 4), bool)}, core.errors.ShapeError, "looks transposed"),
        ({"p": np.ones(4)}, core.errors.ShapeError, "p has shape .4,., expected"),
    ],
)
def test_errors(change, error, says):
    with pytest.raises(error, match=says):
        resolution_entropy_scale_edit(**(cases(SPEC)["plain"] | change))


def test_other_errors():
    out, cache = resolution_entropy_scale_edit(**cases(SPEC)["plain"])
    with pytest.raises(core.errors.ShapeError, match="dout has shape"):
        resolution_entropy_scale_backward(out[0], cache)
    with pytest.raises(core.errors.ParameterError, match="D is 0"):
        entropy_scale(0, 2, 2)


def test_one_key_and_no_keys():
    out, cache = resolution_entropy_scale_edit(np.full((2, 3, 1), 0.8), trained=4)
    assert cache.gain == 0.0
    np.testing.assert_array_equal(out, 0.8)
    out, cache = resolution_entropy_scale_edit(np.zeros((2, 3, 0)), trained=4)
    assert cache.gain == 0.0
    assert out.shape == (2, 3, 0)
    assert resolution_entropy_scale_backward(out, cache)["p"].shape == (2, 3, 0)


@pytest.mark.oracle
def test_pytorch_agrees():
    """Its scaled_dot_product_attention with scale lambda; values and gradients of q and k."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")
    kwargs = core.examples.qkv(np.random.default_rng(3), T=5, S=12, D=4)
    _, cache = DOT.forward(**kwargs)
    edited, mine = resolution_entropy_scale_edit(cache.p, trained=5)
    given = {n: torch.tensor(a, requires_grad=True) for n, a in kwargs.items()}
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *given.values(), scale=math.sqrt(math.log(12, 5) / 4)
    )
    out, dp_edited = edited @ kwargs["v"], np.ones((2, 5, 3)) @ np.swapaxes(kwargs["v"], -1, -2)
    np.testing.assert_allclose(out, theirs.detach().numpy(), rtol=0, atol=4e-15)
    theirs.backward(torch.ones_like(theirs))
    dp = resolution_entropy_scale_backward(dp_edited, mine)["p"]
    dz = core.softmax_backward(dp, cache.p, cache.live)
    dq, dk = core.scores_backward(dz, kwargs["q"], kwargs["k"], 0.5)
    np.testing.assert_allclose(dq, given["q"].grad.numpy(), rtol=0, atol=1e-14)
    np.testing.assert_allclose(dk, given["k"].grad.numpy(), rtol=0, atol=1e-14)
