"""Local state: slow loop, worked example, identities, limits, oracle."""

import math

import numpy as np
import pytest

import attention_ref
from attention_ref import core
from attention_ref.kit.checks import cases
from attention_ref.methods.scores.local_state import (
    local_state_backward,
    local_state_forward,
    slope_forward,
)

SPEC = attention_ref.get("scores/local_state")


def slow_local_state(
    q, k, v, r, own=-100.0, mask=None, causal=False, align="lower_right", scale=None,
    softcap=None, bias=None,
):  # fmt: skip
    """One number at a time; the F penalties are subtracted one by one, as the code does."""
    lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    T, D, S, E, F = q.shape[-2], q.shape[-1], k.shape[-2], v.shape[-1], r.shape[-1]
    q = np.broadcast_to(q, (*lead, T, D))
    k = np.broadcast_to(k, (*lead, S, D))
    v = np.broadcast_to(v, (*lead, S, E))
    r = np.broadcast_to(r, (*lead, T, F))
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
                far = max(t + first - s, s - t - first)
                for f in range(F):
                    rate = 1.0 / (1.0 + math.exp(-float(r[place][t, f])))
                    z -= (f + 1) * far / math.sqrt(F) * rate / 2.0
                if far == 0 and own is not None:
                    z = own
                weight[s] = math.exp(z)
            total = math.fsum(weight.values())
            for e in range(E):
                mixed = math.fsum(w * float(v[place][s, e]) for s, w in weight.items())
                out[place][t, e] = mixed / total if weight else 0.0
    return out


EQUIVALENT = {
    "local_state_forward: 0.0  ->  1.0": "in place of a logit whose row becomes NaN",
    "local_state_forward: 0.0  ->  1.0 (2)": "without own no place is fixed: never read",
}


@pytest.mark.parametrize("case", cases(SPEC))
def test_equals_the_slow_loop(case):
    kwargs = cases(SPEC)[case]
    out, _ = local_state_forward(**kwargs)
    np.testing.assert_allclose(out, slow_local_state(**kwargs), rtol=0, atol=1e-14)


RATE = math.log(2.0) / 2.5
"""Four such rates make the slope (1 + 2 + 3 + 4) / (2 * 2) * RATE = ln 2."""

ROUND = {
    "q": np.zeros((1, 1)),
    "k": np.zeros((3, 1)),
    "v": np.array([[100.0], [3.0], [6.0]]),
    "r": np.full((1, 4), math.log(RATE / (1 - RATE))),
    "align": "upper_left",
}
"""The query stands at the first key; weights fall by half a token: 1/2 and 1/4, that is 2 to 1."""


def test_worked_example_forward():
    """The own key has e^-100; the others share as 2 to 1: the output is 2 + 2 = 4."""
    out, cache = local_state_forward(**ROUND)
    np.testing.assert_allclose(cache.slope, [[math.log(2.0)]], rtol=1e-15)
    np.testing.assert_allclose(cache.p, [[0.0, 2 / 3, 1 / 3]], rtol=1e-15, atol=1e-43)
    np.testing.assert_allclose(cache.p[0, 0], math.exp(-100) / 0.75, rtol=1e-14)
    np.testing.assert_allclose(out, [[4.0]], rtol=1e-15)
    np.testing.assert_allclose(cache.lse, [math.log(0.75)], rtol=1e-15)


def test_worked_example_backward():
    """dz = p (v - o) = (0, -2/3, 2/3); dm = -(-2/3 + 4/3) = -2/3; dr_f = dm f/4 s(1-s)."""
    out, cache = local_state_forward(**ROUND, bias=np.zeros((1, 3)))
    g = local_state_backward(np.ones_like(out), cache)
    np.testing.assert_allclose(g["v"][1:], [[2 / 3], [1 / 3]], rtol=1e-15)
    np.testing.assert_allclose(g["bias"], [[0, -2 / 3, 2 / 3]], rtol=1e-14)
    slope = -np.array([1, 2, 3, 4]) / 6 * RATE * (1 - RATE)
    np.testing.assert_allclose(g["r"], [slope], rtol=1e-14)


def test_zero_content_at_the_code_s_first_bias():
    """r = -2: slope 0.298 nats a token and a mean distance 1/(1 - e^-m) of 3.88 tokens."""
    n = 401
    one, r = np.zeros((1, 1)), np.full((1, 4), -2.0)
    mask = np.arange(n)[None] != n - 1
    _, cache = local_state_forward(one, np.zeros((n, 1)), np.zeros((n, 1)), r, mask=mask)
    m = 2.5 / (1 + math.exp(2.0))
    np.testing.assert_allclose(cache.slope.item(), m, rtol=1e-15)
    assert round(m, 3) == 0.298
    found = np.sum(cache.p * cache.distance)
    np.testing.assert_allclose(found, 1 / (1 - math.exp(-m)), rtol=1e-12)
    assert round(found, 2) == 3.88


def test_slopes_lie_between_zero_and_their_bound():
    """Rates of 0 and 1 are the ends: (F + 1) sqrt(F) / 4 nats a token."""
    for F in (1, 4, 9):
        _, low = slope_forward(np.full((1, F), -800.0))
        _, high = slope_forward(np.full((1, F), 800.0))
        assert low.item() == 0 and high.item() == (F + 1) * math.sqrt(F) / 4


def test_only_the_weighted_sum_of_the_rates_counts():
    """Two sets of rates with the same sum of f * rate give the same output."""
    kwargs = cases(SPEC)["long-queries"]
    a, b = np.array([0.2, 0.5]), np.array([0.6, 0.3])  # 0.2 + 1.0 = 0.6 + 0.6
    outs = [local_state_forward(**(kwargs | {"r": np.log(x / (1 - x))[None]}))[0] for x in (a, b)]
    np.testing.assert_allclose(outs[0], outs[1], rtol=0, atol=1e-15)


def test_a_translation_of_everything_changes_nothing():
    """Two tokens of padding in front, masked: places count only by their differences."""
    kwargs = cases(SPEC)["no-heads"] | {"own": -0.4}
    q, k, v = kwargs["q"], kwargs["k"], kwargs["v"]
    out, _ = local_state_forward(**kwargs)
    pad = {"k": np.concatenate([k[:2], k]), "v": np.concatenate([v[:2], v])}
    mask = np.arange(9)[None] >= 2
    moved, _ = local_state_forward(**(kwargs | pad), mask=np.broadcast_to(mask, (5, 9)))
    np.testing.assert_allclose(moved, out, rtol=0, atol=1e-15)
    assert q.shape == (5, 4)


def test_one_token_falls_back_on_itself():
    """T = S = 1: the weight is 1, whatever own is, and only v gets a gradient."""
    rng = np.random.default_rng(0)
    kwargs = core.examples.qkv(rng, T=1, S=1) | {"r": np.zeros((1, 2))}
    for own in (-100.0, -800.0, None):
        out, cache = local_state_forward(**kwargs, own=own)
        np.testing.assert_array_equal(out, kwargs["v"])
        g = local_state_backward(np.ones_like(out), cache)
        assert np.all(g["v"] == 1) and not any(np.any(g[n]) for n in "qkr")


def test_the_own_score_has_no_gradient():
    """Where own stands, neither content nor bias acts: their gradients there are exactly 0."""
    kwargs = cases(SPEC)["bias"]
    out, cache = local_state_forward(**kwargs)
    g = local_state_backward(np.random.default_rng(1).standard_normal(out.shape), cache)
    for t in range(5):
        assert not np.any(g["bias"][..., t, t + 1])
        assert np.all(g["bias"][..., t, t] != 0)
    high = kwargs["bias"].copy()
    for t in range(5):
        high[:, t, t + 1] = 7.0
    same, _ = local_state_forward(**(kwargs | {"bias": high}))
    np.testing.assert_array_equal(same, out)


def test_rates_of_a_batch_of_their_own():
    """(3, 2) leading axes, logits for each: the members one by one, gradients too."""
    kwargs = cases(SPEC)["batch"]
    rng = np.random.default_rng(2)
    r = rng.standard_normal((3, 2, 1, 4))
    out, cache = local_state_forward(**(kwargs | {"r": r}))
    dout = rng.standard_normal(out.shape)
    g = local_state_backward(dout, cache)
    for i in range(3):
        member = kwargs | {n: kwargs[n][i] for n in "qkv"} | {"r": r[i]}
        one, c = local_state_forward(**member)
        np.testing.assert_allclose(one, out[i], rtol=0, atol=1e-15)
        part = local_state_backward(dout[i], c)
        for n in "qkvr":
            np.testing.assert_allclose(g[n][i], part[n], rtol=0, atol=1e-15)


def test_a_non_finite_logit_poisons_its_row_alone():
    kwargs = cases(SPEC)["long-queries"]
    _, same = local_state_forward(**kwargs)
    bad = kwargs["r"].copy()
    bad[1, 2, 0] = np.nan
    out, cache = local_state_forward(**(kwargs | {"r": bad}))
    assert np.all(np.isnan(out[0, 1, 2])) and np.sum(np.isnan(out)) == 3
    assert np.isnan(cache.lse[0, 1, 2]) and np.sum(np.isnan(cache.lse)) == 1
    dout = np.random.default_rng(6).standard_normal(out.shape)
    g = local_state_backward(dout, cache)
    dout[0, 1, 2] = 0.0
    for n, x in local_state_backward(dout, same).items():
        np.testing.assert_allclose(g[n], x, rtol=0, atol=1e-14)
    hidden = np.ones((7, 5), bool)
    hidden[2, 0] = False
    out, _ = local_state_forward(**(kwargs | {"r": bad}), mask=hidden)
    assert np.all(np.isnan(out[0, 1, 2]))
    hidden[2] = False
    out, _ = local_state_forward(**(kwargs | {"r": bad}), mask=hidden)
    assert not np.any(out[0, 1, 2])  # a row without keys stays zero


def test_a_live_nan_in_the_bias_poisons_its_row():
    kwargs = cases(SPEC)["bias"]
    bad = kwargs["bias"].copy()
    bad[1, 2, 0] = np.nan
    out, cache = local_state_forward(**(kwargs | {"bias": bad}))
    assert np.all(np.isnan(out[0, 1, 2])) and np.sum(np.isnan(out)) == 3
    g = local_state_backward(np.ones_like(out), cache)
    assert all(np.all(np.isfinite(x)) for x in g.values())


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"r": np.ones((2, 4, 3))}, core.errors.ShapeError, r"r has shape \(2, 4, 3\), expected"),
        ({"r": np.ones((3, 7, 3))}, core.errors.ShapeError, "r has"),
        ({"r": np.ones((7, 0))}, core.errors.ShapeError, r"r has F = 0 .* expected at least 1"),
        ({"own": -np.inf}, core.errors.ParameterError, "own is -inf"),
        ({"align": "lower-right"}, core.errors.ParameterError, "did you mean 'lower_right'"),
        ({"softcap": 0.0}, core.errors.ParameterError, "softcap is 0.0"),
    ],
)
def test_errors_name_argument_and_expectation(change, error, says):
    with pytest.raises(error, match=says):
        local_state_forward(**(cases(SPEC)["long-queries"] | change))


def test_the_cotangent_is_checked():
    out, cache = local_state_forward(**cases(SPEC)["plain"])
    with pytest.raises(core.errors.ShapeError, match="dout has shape"):
        local_state_backward(out[0], cache)


@pytest.mark.oracle
@pytest.mark.parametrize("case", cases(SPEC))
def test_pytorch_agrees(case):
    """The formula in PyTorch, penalties term by term by einsum; the gradient by its autograd."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")
    kwargs = cases(SPEC)[case]
    out, cache = local_state_forward(**kwargs)
    dout = np.random.default_rng(5).standard_normal(out.shape)
    mine = local_state_backward(dout, cache)
    given = {n: torch.tensor(kwargs[n], requires_grad=True) for n in mine}
    T, D, S = *kwargs["q"].shape[-2:], kwargs["k"].shape[-2]
    z = given["q"] @ given["k"].transpose(-1, -2) * kwargs.get("scale", D**-0.5)
    if "softcap" in kwargs:
        z = kwargs["softcap"] * torch.tanh(z / kwargs["softcap"])
    if "bias" in given:
        z = z + given["bias"]
    first = 0 if kwargs.get("align") == "upper_left" else S - T
    delta = (torch.arange(T)[:, None] + first - torch.arange(S)[None]).double()
    f = torch.arange(1, given["r"].shape[-1] + 1).double()
    kernel = -f[:, None, None] * delta.abs() / math.sqrt(len(f))
    rates = (torch.sigmoid(given["r"]) / 2).expand(*given["r"].shape[:-2], T, len(f))
    z = z + torch.einsum("fts,...tf->...ts", kernel, rates)
    own = kwargs.get("own", -100.0)
    if own is not None:
        z = z.masked_fill(delta == 0, own)
    rule = {n: kwargs[n] for n in ("mask", "causal", "align") if n in kwargs}
    live = torch.tensor(np.array(core.visible(kwargs["q"], kwargs["k"], **rule)))
    alive = live.any(-1, keepdim=True)
    p = torch.softmax(torch.where(live | ~alive, z, -torch.inf), -1)
    theirs = torch.where(alive, p, 0.0) @ given["v"]
    theirs.backward(torch.tensor(dout))
    np.testing.assert_allclose(out, theirs.detach().numpy(), rtol=0, atol=4e-15)
    for n, g in mine.items():
        np.testing.assert_allclose(g, given[n].grad.numpy(), rtol=0, atol=4e-14)
