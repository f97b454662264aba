"""Adaptive filter attention: slow loop, worked example, limits, reductions, the filter, oracle."""

import math

import numpy as np
import pytest

import attention_ref
from attention_ref import core, engine
from attention_ref.kit.checks import cases
from attention_ref.methods.scores.adaptive_filter import (
    adaptive_filter_backward,
    adaptive_filter_forward,
    growth_forward,
)

SPEC = attention_ref.get("scores/adaptive_filter")
ROTARY = attention_ref.get("scores/rotary")
EQUIVALENT = {
    "growth_forward: core.absolute(x) < 0.5  ->  core.absolute(x) <= 0.5": "both are right at 1/2",
    "growth_forward: 1.0  ->  2.0": "stands in where the series is taken",
    "growth_forward: 0.0  ->  1.0": "stands in where the formula is taken",
    "growth_forward: 16  ->  17": "one more term, below rounding",
    "_turns: True  ->  False": "both have three entries",
    "adaptive_filter_backward: True  ->  False": "all have three entries",
}


def slow_adaptive_filter(
    q, k, v, mu, sigma, eta, gamma, omega, nu, tau, robust=True, ahead=0.0, mask=None,
    causal=False, align="lower_right",
):  # fmt: skip
    """One number at a time, in complex numbers; the variance by stepping through the formula."""
    lead = np.broadcast_shapes(
        q.shape[:-2], k.shape[:-2], v.shape[:-2], mu.shape, sigma.shape, eta.shape, gamma.shape,
        omega.shape[:-1], nu.shape, tau.shape,
    )  # fmt: skip
    T, S, M = q.shape[-2], k.shape[-2], q.shape[-1] // 2
    q = np.broadcast_to(q, (*lead, T, 2 * M))
    k = np.broadcast_to(k, (*lead, S, 2 * M))
    v = np.broadcast_to(v, (*lead, S, 2 * M))
    omega = np.broadcast_to(omega, (*lead, M))
    mu, sigma, eta = (np.broadcast_to(a, lead) for a in (mu, sigma, eta))
    gamma, nu, tau = (np.broadcast_to(a, lead) for a in (gamma, nu, tau))
    mask = None if mask is None else np.broadcast_to(mask, (*lead, T, S))
    first = S - T if align == "lower_right" else 0
    out = np.zeros((*lead, T, 2 * M))
    for place in np.ndindex(*lead):
        decay = float(mu[place])
        for t in range(T):
            weight, forecast = {}, {}
            for s in range(S):
                delta = t + first - s
                if causal and delta < 0:
                    continue
                if mask is not None and not mask[place][t, s]:
                    continue
                far = max(delta, -delta)
                if decay == 0.0:
                    grown = float(far)
                else:
                    grown = math.expm1(2 * decay * far) / (2 * decay)
                V = float(sigma[place]) ** 2 * grown + float(gamma[place]) ** 2
                V += float(eta[place]) ** 2 * math.exp(2 * decay * far)
                r2, forecast[s] = 0.0, []
                for i in range(M):
                    angle = float(omega[place][i]) * delta
                    move = math.exp(decay * far) * complex(math.cos(angle), math.sin(angle))
                    key = complex(k[place][s, i], k[place][s, i + M])
                    query = complex(q[place][t, i], q[place][t, i + M])
                    gap = query - move * key
                    r2 += gap.real**2 + gap.imag**2
                    angle = float(omega[place][i]) * ahead
                    step = math.exp(decay * ahead) * complex(math.cos(angle), math.sin(angle))
                    forecast[s].append(step * move * complex(v[place][s, i], v[place][s, i + M]))
                u = r2 / (float(nu[place]) * M * V)
                off = math.log1p(u) if robust else u
                weight[s] = math.exp(-(float(tau[place]) ** 2) * (math.log(V) + off))
            total = math.fsum(weight.values())
            for i in range(M):
                x = sum((w * forecast[s][i] for s, w in weight.items()), 0j)
                x = x / total if weight else x
                out[place][t, i], out[place][t, i + M] = x.real, x.imag
    return out


@pytest.mark.parametrize("case", cases(SPEC))
def test_equals_the_slow_loop(case):
    kwargs = cases(SPEC)[case]
    out, _ = adaptive_filter_forward(**kwargs)
    np.testing.assert_allclose(out, slow_adaptive_filter(**kwargs), rtol=0, atol=1e-14)


HALF = math.log(2.0)
ROUND = {
    "q": np.array([[[0.0, 1.0]]]),
    "k": np.array([[[2.0, 0.0], [0.0, 0.0]]]),
    "v": np.array([[[4.0, 0.0], [0.0, 8.0]]]),
    "mu": np.array([-HALF]),
    "sigma": np.array([0.0]),
    "eta": np.array([math.sqrt(3.0)]),
    "gamma": np.array([0.5]),
    "omega": np.array([[math.pi / 2]]),
    "nu": np.array([4 / 13]),
    "tau": np.array([1.0]),
}
"""In one token the state halves and turns by 90 degrees: the key 2 forecasts i, just the query."""


def test_worked_example_forward():
    """V = 3/4 + 1/4 and 3 + 1/4; r2 = 0 and 1, u = 0 and 1: weights 1 and 1 / (2 * 13/4)."""
    out, cache = adaptive_filter_forward(**ROUND)
    np.testing.assert_allclose(cache.V, [[[1.0, 3.25]]], rtol=1e-14)
    np.testing.assert_allclose(cache.r2, [[[0.0, 1.0]]], rtol=1e-14, atol=1e-15)
    np.testing.assert_allclose(cache.p, [[[13 / 15, 2 / 15]]], rtol=1e-14)
    np.testing.assert_allclose(out, [[[0.0, 42 / 15]]], rtol=1e-14, atol=1e-15)
    np.testing.assert_allclose(cache.lse, [[math.log(15 / 13)]], rtol=1e-13)


def test_worked_example_ahead():
    """A token later the mean of the forecasts, 2.8 i, has halved and turned to -1.4."""
    out, _ = adaptive_filter_forward(**ROUND, ahead=1.0)
    np.testing.assert_allclose(out, [[[-1.4, 0.0]]], rtol=1e-14, atol=1e-15)


def test_worked_example_backward():
    """L = imaginary part of the output. dp E v = (2, 8), o = 2.8: dz = (26/225)(-6, 6).

    The second key: u = 1, so dr2 = -dz/2 / (nu V) = -dz/2, V = 13/4. The query there is i off 0.
    """
    out, cache = adaptive_filter_forward(**ROUND)
    dz = 26 / 225 * 6
    g = adaptive_filter_backward(np.array([[[0.0, 1.0]]]), cache)
    np.testing.assert_allclose(g["v"][0, 1], [0.0, 2 / 15], rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(g["v"][0, 0], [13 / 30, 0.0], rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(g["q"], [[[0.0, -dz]]], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(g["nu"], [dz / 2 * 13 / 4], rtol=1e-12)
    np.testing.assert_allclose(g["tau"], [-2 * dz * math.log(6.5)], rtol=1e-12)
    dV = np.array([dz, -dz * (1 - 0.5) / 3.25])
    np.testing.assert_allclose(g["gamma"], [np.sum(dV)], rtol=1e-12)
    np.testing.assert_allclose(g["eta"], [2 * math.sqrt(3) * (dV[0] / 4 + dV[1])], rtol=1e-12)
    assert g["sigma"].item() == 0.0
    assert out.shape == (1, 1, 2)


def test_the_growth_of_variance():
    """(e^x - 1)/x and its derivative on both sides of the seam at 1/2, and at 0."""
    x = np.array([-40.0, -3.0, -0.51, -0.5, -0.49, -1e-3, 0.0, 1e-9, 0.3, 0.499, 0.501, 2.0])
    wide = x.astype(np.longdouble)
    safe = np.where(x == 0, np.longdouble(1), wide)
    want = np.where(x == 0, np.longdouble(1), np.expm1(safe) / safe)
    np.testing.assert_allclose(growth_forward(x), want.astype(float), rtol=4e-16)
    slope = (np.exp(safe) - np.expm1(safe) / safe) / safe
    slope = np.where(np.abs(x) < 1e-2, 0.5 + wide / 3 + wide**2 / 8 + wide**3 / 30, slope)
    np.testing.assert_allclose(growth_forward(x, slope=True), slope.astype(float), rtol=2e-13)
    step = engine.jvp(lambda x: growth_forward(x), {"x": x}, {"x": np.ones_like(x)})
    np.testing.assert_allclose(growth_forward(x, slope=True), step, rtol=4e-15)
    assert growth_forward(np.zeros(1, np.float32)).dtype == np.float32
    with np.errstate(over="raise", invalid="raise"):
        np.testing.assert_allclose(growth_forward(np.array([-1e30])), [1e-30], rtol=1e-15)


def test_mu_zero_is_continuous():
    kwargs = cases(SPEC)["plain"]
    still, cache = adaptive_filter_forward(**(kwargs | {"mu": np.zeros(2)}))
    near, _ = adaptive_filter_forward(**(kwargs | {"mu": np.full(2, -1e-12)}))
    np.testing.assert_allclose(near, still, rtol=0, atol=1e-10)
    d = np.abs(np.arange(5)[:, None] + 1 - np.arange(6))
    one = {n: kwargs[n][0] ** 2 for n in ("sigma", "eta", "gamma")}
    want = one["sigma"] * d + one["eta"] + one["gamma"]
    np.testing.assert_allclose(cache.V[0], want, rtol=1e-14)


def test_variance_of_a_stationary_process():
    """Long ago: V tends to sigma^2 / (-2 mu) + gamma^2 and the forecast to 0."""
    kwargs = cases(SPEC)["plain"] | {"mu": np.array([-8.0, -8.0])}
    _, cache = adaptive_filter_forward(**kwargs)
    want = kwargs["sigma"] ** 2 / 16 + kwargs["gamma"] ** 2
    np.testing.assert_allclose(cache.V[:, 4, 0], want, rtol=1e-12)


def test_the_residual_is_that_of_the_forecast():
    kwargs = cases(SPEC)["plain"]
    _, cache = adaptive_filter_forward(**kwargs)
    q, k = (kwargs[n][0, 1, :, :2] + 1j * kwargs[n][0, 1, :, 2:] for n in "qk")
    delta = np.arange(5)[:, None] + 1 - np.arange(6)
    move = np.exp(kwargs["mu"][1] * np.abs(delta)[..., None] + 1j * delta[..., None]
                  * kwargs["omega"][1])  # fmt: skip
    want = np.sum(np.abs(q[:, None] - move * k) ** 2, axis=-1)
    np.testing.assert_allclose(cache.r2[0, 1], want, rtol=1e-13)


def test_gaussian_without_dynamics_and_keys_of_one_length_is_rotary_attention():
    """mu = sigma = 0: the score is 2 Re(q conj(k) e^...) / (nu M V) plus what a row shares."""
    rng = np.random.default_rng(0)
    kwargs = core.examples.qkv(rng, lead=(1,), T=5, S=7, D=6, E=6)
    kwargs["k"] /= np.sqrt(np.sum(kwargs["k"] ** 2, axis=-1, keepdims=True))
    omega = 10000.0 ** (-np.arange(3) / 3)
    one = {"mu": 0.0, "sigma": 0.0, "eta": 0.6, "gamma": 0.8, "nu": 0.5, "tau": 1.0}
    one = {n: np.array([x]) for n, x in one.items()} | {"omega": omega[None]}
    out, cache = adaptive_filter_forward(**kwargs, **one, robust=False, causal=True)
    places = {"pos_q": -np.arange(2.0, 7.0), "pos_k": -np.arange(7.0)}  # angles have other signs
    _, same = ROTARY.forward(**kwargs, **places, scale=2 / 1.5, causal=True)
    np.testing.assert_allclose(cache.p, same.p, rtol=0, atol=1e-14)
    turned = core.mix_forward(same.p, cache.v)
    w = (turned[..., :3] + 1j * turned[..., 3:]) * np.exp(1j * omega * np.arange(2, 7)[:, None])
    np.testing.assert_allclose(out, np.concatenate([w.real, w.imag], -1), rtol=0, atol=1e-14)


def test_large_nu_leaves_the_precisions():
    """What is off does not count: p is 1 / V, normalised; also the limit of the Gaussian."""
    for robust in (True, False):
        kwargs = cases(SPEC)["plain"] | {"nu": np.full(2, 1e12), "tau": np.ones(2)}
        _, cache = adaptive_filter_forward(**(kwargs | {"robust": robust}))
        want = 1 / cache.V
        want = want / want.sum(-1, keepdims=True)
        np.testing.assert_allclose(cache.p[0], want, rtol=1e-10)


def test_tau_zero_is_the_mean_of_all_forecasts():
    kwargs = cases(SPEC)["plain"] | {"tau": np.zeros(2)}
    out, cache = adaptive_filter_forward(**kwargs)
    np.testing.assert_allclose(cache.p, 1 / 6, rtol=1e-14)
    g = adaptive_filter_backward(np.ones_like(out), cache)
    for name in ("q", "k", "sigma", "eta", "gamma", "nu", "tau"):
        assert not np.any(g[name])
    assert np.all(g["mu"] != 0) and np.all(g["omega"] != 0)


def test_signs_of_the_noises_do_not_count():
    kwargs = cases(SPEC)["plain"]
    out, _ = adaptive_filter_forward(**kwargs)
    turned = {n: -kwargs[n] for n in ("sigma", "eta", "gamma", "tau")}
    np.testing.assert_array_equal(adaptive_filter_forward(**(kwargs | turned))[0], out)


def test_only_differences_of_places_count():
    kwargs = cases(SPEC)["plain"]
    late = {n: np.concatenate([np.zeros((1, 2, 3, 4)), kwargs[n]], axis=-2) for n in "qkv"}
    mask = np.zeros((8, 9), bool)
    mask[3:, 3:] = True
    out, _ = adaptive_filter_forward(**(kwargs | late), mask=mask)
    want, _ = adaptive_filter_forward(**kwargs)
    np.testing.assert_allclose(out[..., 3:, :], want, rtol=0, atol=1e-14)


def test_ahead_is_a_step_of_the_dynamics():
    kwargs = cases(SPEC)["causal"] | {"ahead": 0.0}
    now, _ = adaptive_filter_forward(**kwargs)
    later, _ = adaptive_filter_forward(**(kwargs | {"ahead": 2.5}))
    x = now[..., :2] + 1j * now[..., 2:]
    step = np.exp(2.5 * (kwargs["mu"][:, None] + 1j * kwargs["omega"]))[:, None]
    x = x * step
    np.testing.assert_allclose(later, np.concatenate([x.real, x.imag], -1), rtol=0, atol=1e-14)


def test_without_noise_every_forecast_is_the_truth():
    """A trajectory of the system itself, as q, k and v: the output is the next state."""
    x = np.exp((-0.1 + 0.7j) * np.arange(9)) * (1 + 2j)
    x = np.stack([x.real, x.imag], axis=-1)[None]
    one = {n: np.array([0.5]) for n in ("sigma", "eta", "gamma", "nu", "tau")}
    dynamics = {"mu": np.array([-0.1]), "omega": np.array([[0.7]])}
    out, cache = adaptive_filter_forward(x, x, x, **one, **dynamics, causal=True, ahead=1.0)
    np.testing.assert_allclose(out[:, :-1], x[:, 1:], rtol=0, atol=1e-14)
    assert np.max(np.abs(cache.r2[np.tril(np.ones((1, 9, 9), bool))])) < 1e-14


def test_a_robust_score_forgives_an_outlier():
    """One key far off: the Gaussian forgets it altogether, the robust score falls as its log."""
    kwargs = cases(SPEC)["plain"]
    k = kwargs["k"].copy()
    k[..., 4, :] = 30.0
    heavy, light = (
        adaptive_filter_forward(**(kwargs | {"k": k, "robust": robust}))[1].p[..., 4, 4]
        for robust in (True, False)
    )
    assert np.all(heavy > 1e-5) and np.all(heavy < 1e-2) and np.all(light < 1e-50)


def test_gradients_where_contents_have_fewer_leading_axes():
    """Queries of three sequences, keys and values of one: what is shared collects."""
    rng = np.random.default_rng(1)
    kwargs = cases(SPEC)["plain"] | {"q": rng.standard_normal((3, 2, 5, 4)), "ahead": 1.0}
    out, cache = adaptive_filter_forward(**kwargs)
    dout = rng.standard_normal(out.shape)
    g = adaptive_filter_backward(dout, cache)
    total = {n: np.zeros_like(kwargs[n]) for n in g if n != "q"}
    for b in range(3):
        one, c = adaptive_filter_forward(**(kwargs | {"q": kwargs["q"][b : b + 1]}))
        np.testing.assert_allclose(one, out[b : b + 1], rtol=0, atol=1e-14)
        part = adaptive_filter_backward(dout[b : b + 1], c)
        np.testing.assert_allclose(part["q"], g["q"][b : b + 1], rtol=0, atol=1e-13)
        total = {n: total[n] + part[n] for n in total}
    for n in total:
        np.testing.assert_allclose(g[n], total[n], rtol=0, atol=1e-12, err_msg=n)


def test_a_poisoned_row_sends_nothing_back():
    kwargs = cases(SPEC)["plain"]
    bad = kwargs["q"].copy()
    bad[0, 1, 2, 0] = np.nan
    out, cache = adaptive_filter_forward(**(kwargs | {"q": bad}))
    assert np.all(np.isnan(out[0, 1, 2])) and np.sum(np.isnan(out)) == 4
    assert np.isnan(cache.lse[0, 1, 2]) and np.sum(np.isnan(cache.lse)) == 1
    dout = np.random.default_rng(2).standard_normal(out.shape)
    g = adaptive_filter_backward(dout, cache)
    dout[0, 1, 2] = 0.0
    want = adaptive_filter_backward(dout, adaptive_filter_forward(**kwargs)[1])
    for name in g:
        np.testing.assert_allclose(g[name], want[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"mu": np.ones(3)}, core.errors.ShapeError, "mu has H = 3 .* expected 2 as in q"),
        ({"omega": np.ones((2, 3))}, core.errors.ShapeError, "omega has M = 3, expected D / 2"),
        ({"v": np.ones((1, 2, 6, 3))}, core.errors.ShapeError, "v has D = 3 .* expected 4 as in q"),
        ({"q": np.ones((5, 4))}, core.errors.ShapeError, "q has shape .5, 4., expected"),
        ({"mask": np.ones((6, 5), bool)}, core.errors.ShapeError, "looks transposed"),
        ({"align": "lower-right"}, core.errors.ParameterError, "did you mean 'lower_right'"),
        ({"ahead": -1.0}, core.errors.ParameterError, "ahead is -1.0"),
    ],
)
def test_errors_name_argument_and_expectation(change, error, says):
    with pytest.raises(error, match=says):
        adaptive_filter_forward(**(cases(SPEC)["plain"] | change))


def test_other_errors():
    kwargs = cases(SPEC)["plain"]
    out, cache = adaptive_filter_forward(**kwargs)
    with pytest.raises(core.errors.ShapeError, match="dout has shape"):
        adaptive_filter_backward(out[0], cache)
    wide = np.broadcast_to(np.float64(0.0), (1, 2, 13000, 4))
    with pytest.raises(core.errors.MemoryLimitError, match=r"the scores .* 2\.5 GiB"):
        adaptive_filter_forward(**(kwargs | {"q": wide, "k": wide, "v": wide}))


@pytest.mark.oracle
@pytest.mark.parametrize("case", cases(SPEC))
def test_pytorch_agrees(case):
    """Complex tensors: the forecasts of all keys for all queries, and its autograd."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")
    kwargs = cases(SPEC)[case]
    out, cache = adaptive_filter_forward(**kwargs)
    dout = np.random.default_rng(3).standard_normal(out.shape)
    mine = adaptive_filter_backward(dout, cache)
    given = {n: torch.tensor(kwargs[n], requires_grad=True) for n in mine}
    T, S = kwargs["q"].shape[-2], kwargs["k"].shape[-2]
    first = 0 if kwargs.get("align") == "upper_left" else S - T
    delta = (torch.arange(T)[:, None] + first - torch.arange(S)).double()
    q, k, v = (torch.complex(*given[n].chunk(2, dim=-1)) for n in "qkv")
    at = {n: given[n][..., None, None] for n in ("mu", "sigma", "eta", "gamma", "nu", "tau")}
    angle = given["omega"][..., None, None, :] * delta[..., None]
    E = torch.exp(at["mu"] * delta.abs())
    move = torch.polar(E[..., None].expand(*E.shape, 2), angle)
    series = delta.abs() * (1 + at["mu"] * delta.abs())  # at mu = 0: value and slope
    safe = torch.where(at["mu"] == 0, torch.ones_like(at["mu"]), at["mu"])
    grown = torch.where(at["mu"] == 0, series, torch.expm1(2 * safe * delta.abs()) / (2 * safe))
    V = at["sigma"] ** 2 * grown + at["eta"] ** 2 * E**2 + at["gamma"] ** 2
    gap = q.unsqueeze(-2) - move * k.unsqueeze(-3)
    u = (gap.real**2 + gap.imag**2).sum(-1) / (at["nu"] * 2 * V)
    z = -(at["tau"] ** 2) * (torch.log(V) + (torch.log1p(u) if kwargs.get("robust", True) else u))
    rule = {n: kwargs[n] for n in ("mask", "causal", "align") if n in kwargs}
    live = torch.tensor(np.array(core.visible(kwargs["q"], kwargs["k"], **rule)))
    alive = live.any(-1, keepdim=True)
    p = torch.softmax(torch.where(live | ~alive, z, -torch.inf), -1)
    p = torch.where(alive, p, 0.0)
    x = torch.einsum("...ts,...tsi->...ti", p.to(torch.complex128), move * v.unsqueeze(-3))
    ahead = kwargs.get("ahead", 0.0)
    step = torch.polar(
        torch.exp(given["mu"] * ahead)[..., None].expand(-1, 2), given["omega"] * ahead
    )
    x = x * step[..., None, :]
    theirs = torch.cat([x.real, x.imag], dim=-1)
    theirs.backward(torch.tensor(dout))
    np.testing.assert_allclose(out, theirs.detach().numpy(), rtol=0, atol=1e-14)
    for n, g in mine.items():
        size = max(1.0, np.max(np.abs(g)))
        np.testing.assert_allclose(g, given[n].grad.numpy(), rtol=0, atol=1e-13 * size)
