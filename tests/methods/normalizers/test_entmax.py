"""Entmax attention: slow loop, worked examples, exact algorithms, limits, oracle."""

import math

import mpmath
import numpy as np
import pytest

import attention_ref
from attention_ref import core, engine
from attention_ref.kit.checks import cases
from attention_ref.methods.normalizers.entmax import (
    entmax_backward,
    entmax_forward,
    normalise_forward,
    slope_of_log,
)
from attention_ref.methods.normalizers.sparsemax import project_forward

SPEC = attention_ref.get("normalizers/entmax")


def slow_weights(scores, alpha):
    """The threshold of the papers by halving an interval until it is empty."""
    if not scores:
        return {}
    r = alpha - 1.0
    x = {s: r * z for s, z in scores.items()}
    low, high = max(x.values()) - 1.0, max(x.values())

    def weights(tau):
        return {s: max(a - tau, 0.0) ** (1.0 / r) for s, a in x.items()}

    while low < (low + high) / 2 < high:
        middle = (low + high) / 2
        if math.fsum(weights(middle).values()) > 1.0:
            low = middle
        else:
            high = middle
    p = weights(low)
    total = math.fsum(p.values())
    return {s: w / total for s, w in p.items()}


def slow_entmax(
    q, k, v, alpha=1.5, mask=None, causal=False, align="lower_right", scale=None, softcap=None,
    bias=None,
):  # fmt: skip
    """One number at a time."""
    lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    T, D, S, E = q.shape[-2], q.shape[-1], k.shape[-2], v.shape[-1]
    q = np.broadcast_to(q, (*lead, T, D))
    k = np.broadcast_to(k, (*lead, S, D))
    v = np.broadcast_to(v, (*lead, S, E))
    alpha = np.broadcast_to(alpha, lead)
    mask = None if mask is None else np.broadcast_to(mask, (*lead, T, S))
    bias = None if bias is None else np.broadcast_to(bias, (*lead, T, S))
    c = 1.0 / math.sqrt(D) if scale is None else scale
    first = S - T if align == "lower_right" else 0
    out = np.zeros((*lead, T, E))
    for place in np.ndindex(*lead):
        for t in range(T):
            scores = {}
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
                scores[s] = z
            weight = slow_weights(scores, float(alpha[place]))
            for e in range(E):
                out[place][t, e] = math.fsum(w * float(v[place][s, e]) for s, w in weight.items())
    return out


def normalise(z, alpha):
    """The weights of rows of scores, all visible."""
    rate = np.full((1, 1), alpha - 1.0)
    return normalise_forward(z, np.ones_like(z, bool), rate)[0]


@pytest.mark.parametrize("case", cases(SPEC))
def test_equals_the_slow_loop(case):
    kwargs = cases(SPEC)[case]
    out, _ = entmax_forward(**kwargs)
    np.testing.assert_allclose(out, slow_entmax(**kwargs), rtol=0, atol=2e-14)


def test_the_examples_are_sparse_and_not_trivial():
    for kwargs in cases(SPEC).values():
        assert (
            0.1 < np.mean(entmax_forward(**kwargs)[1].support) < (0.9 if "mask" in kwargs else 1.01)
        )


def board():
    """z = (0.4, 0, -3) at alpha = 3/2: theta = 0.8, p = (0.8^2, 0.6^2, 0)."""
    k = np.array([[[0.4], [0.0], [-3.0]]])
    return {"q": np.array([[[1.0]]]), "k": k, "v": np.array([[[100.0], [0.0], [7.0]]])}


def test_worked_example_forward():
    out, cache = entmax_forward(**board())
    np.testing.assert_allclose(cache.p, [[[0.64, 0.36, 0.0]]], rtol=1e-15)
    np.testing.assert_allclose(cache.theta, [[0.8]], rtol=1e-15)
    np.testing.assert_array_equal(cache.support, [[[True, True, False]]])
    np.testing.assert_allclose(out, [[[64.0]]], rtol=1e-15)


def test_worked_example_backward():
    """w = (0.8, 0.6), mean of dp under w 400/7: dz = (240/7, -240/7, 0); alpha by its series."""
    _, cache = entmax_forward(**board(), alpha=np.array([1.5]), bias=np.zeros((1, 1, 3)))
    g = entmax_backward(np.ones((1, 1, 1)), cache)
    np.testing.assert_allclose(g["bias"], [[[240 / 7, -240 / 7, 0.0]]], rtol=1e-14)
    np.testing.assert_allclose(g["v"], [[[0.64], [0.36], [0.0]]], rtol=1e-15)
    np.testing.assert_allclose(g["k"], [[[240 / 7], [-240 / 7], [0.0]]], rtol=1e-14)
    np.testing.assert_allclose(g["q"], [[[96 / 7]]], rtol=1e-14)
    first = 0.64 * 4 * (-0.25 - math.log(0.8)) * 300 / 7
    second = 0.36 * 4 * (-2 / 3 - math.log(0.6)) * -400 / 7
    np.testing.assert_allclose(g["alpha"], [first + second], rtol=1e-13)


def test_the_exact_algorithm_for_three_halves():
    z = np.random.default_rng(0).standard_normal((50, 9)) * 2
    for row, p in zip(z, normalise(z, 1.5), strict=True):
        x = sorted(((a - row.max()) / 2 for a in row), reverse=True)
        size, taus = 0, []
        for n in range(1, 10):
            mean, square = sum(x[:n]) / n, sum(a * a for a in x[:n]) / n
            taus.append(mean - math.sqrt(max((1 - n * (square - mean * mean)) / n, 0.0)))
            size += taus[-1] <= x[n - 1]
        exact = np.maximum((row - row.max()) / 2 - taus[size - 1], 0.0) ** 2
        np.testing.assert_allclose(p, exact, rtol=0, atol=2e-15)


def test_the_exact_algorithm_for_two():
    z = np.random.default_rng(1).standard_normal((50, 9)) * 2
    exact, tau, _ = project_forward(z, np.ones_like(z, bool))
    p, _, _, theta, _ = normalise_forward(z, np.ones_like(z, bool), np.ones((1, 1)))
    np.testing.assert_allclose(p, exact, rtol=0, atol=2e-15)
    np.testing.assert_allclose(theta, tau + 1.0, rtol=0, atol=2e-15)


@pytest.mark.parametrize("alpha", [1.1, 1.5, 2.0, 3.0])
def test_maximises_inner_product_plus_entropy(alpha):
    rng = np.random.default_rng(2)
    z = rng.standard_normal((20, 6))

    def value(p):
        return np.sum(p * z, -1) + np.sum(p - p**alpha, -1) / (alpha * (alpha - 1))

    p = normalise(z, alpha)
    np.testing.assert_allclose(p.sum(-1), 1.0, rtol=0, atol=1e-14)
    others = rng.dirichlet(np.full(6, 0.5), size=(2000, 20))
    assert np.all(value(others) < value(p))
    assert np.all(value(p + 1e-3 * (others - p)) <= value(p) + 1e-15)


@pytest.mark.parametrize("alpha", [1.0, 1.0 + 1e-12, 1.0 + 1e-9, 1.0 + 1e-6, 1.001])
def test_near_one_is_softmax_and_a_little_more(alpha):
    """p(alpha) = p + (alpha - 1) dp/dalpha + ..., with dp/dalpha = -p (ln^2 p - mean) / 2."""
    z = np.random.default_rng(3).standard_normal((20, 8)) * 2
    soft = np.exp(z) / np.sum(np.exp(z), -1, keepdims=True)
    square = np.log(soft) ** 2
    slope = -soft / 2 * (square - np.sum(soft * square, -1, keepdims=True))
    expected = soft + (alpha - 1) * slope
    tolerance = 2e-15 + 20 * (alpha - 1) ** 2
    np.testing.assert_allclose(normalise(z, alpha), expected, rtol=0, atol=tolerance)


def test_gradient_of_alpha_at_one_and_beside_it():
    kwargs = cases(SPEC)["plain"] | {"alpha": np.array([1.0, 1.0])}
    out, cache = entmax_forward(**kwargs)
    dout = np.random.default_rng(4).standard_normal(out.shape)
    dp = dout @ np.swapaxes(kwargs["v"], -1, -2)
    square = np.log(cache.p) ** 2
    mean = np.sum(cache.p * square, -1, keepdims=True)
    expected = np.sum(dp * -cache.p / 2 * (square - mean), axis=(0, 2, 3))
    at_one = entmax_backward(dout, cache)["alpha"]
    np.testing.assert_allclose(at_one, expected, rtol=1e-13)
    for step in (1e-12, 1e-8, 1e-5):
        _, cache = entmax_forward(**(kwargs | {"alpha": np.array([1.0, 1.0]) + step}))
        beside = entmax_backward(dout, cache)["alpha"]
        np.testing.assert_allclose(beside, expected, rtol=0, atol=1e-12 + 100 * step)

    def f(alpha):
        return entmax_forward(**(kwargs | {"alpha": alpha}))[0]

    both = engine.complex_gradient(f, {"alpha": np.array([1.0, 1.6])}, dout)["alpha"]
    _, cache = entmax_forward(**(kwargs | {"alpha": np.array([1.0, 1.6])}))
    np.testing.assert_allclose(entmax_backward(dout, cache)["alpha"], both, rtol=1e-12)
    np.testing.assert_allclose(both[0], expected[0], rtol=1e-12)
    _, pull = engine.vjp(f, {"alpha": np.array([1.0, 1.6])})
    np.testing.assert_allclose(pull(dout)["alpha"], both, rtol=1e-12)


@pytest.mark.parametrize("rate", [0.0, 1e-12, 1e-6, 1e-3, 0.5, 3.0])
def test_slope_of_the_logarithm_has_all_digits(rate):
    """Against fifty digits: the two large terms of the formula cancel near alpha = 1."""
    u = -np.geomspace(1e-6, 0.95 / max(rate, 0.03), 40)
    found = slope_of_log(1 + rate * u, u, np.full(1, rate))
    with mpmath.workdps(50):
        for a, got in zip(u, found, strict=True):
            x = mpmath.mpf(rate) * mpmath.mpf(a)
            exact = -(mpmath.mpf(a) ** 2) / 2
            if rate:
                exact = (x / (1 + x) - mpmath.log(1 + x)) / mpmath.mpf(rate) ** 2
            assert abs(got - exact) <= 2e-14 * abs(exact)


def test_shift_moves_theta_only():
    z = np.random.default_rng(5).standard_normal((4, 6))
    live, rate = np.ones_like(z, bool), np.full((1, 1), 0.6)
    p, _, _, theta, _ = normalise_forward(z, live, rate)
    moved, _, _, moved_theta, _ = normalise_forward(z + 3.0, live, rate)
    np.testing.assert_allclose(moved, p, rtol=0, atol=4e-15)
    np.testing.assert_allclose(moved_theta, theta + 3.0, rtol=0, atol=4e-15)


@pytest.mark.parametrize("alpha", [1.0, 1.2, 1.5, 2.0, 4.0, 50.0, 1e4])
def test_equal_scores_and_the_best_key(alpha):
    np.testing.assert_allclose(normalise(np.full((2, 7), 3.0), alpha), 1 / 7, rtol=1e-13)
    np.testing.assert_array_equal(normalise(np.full((2, 1), 3.0), alpha), 1.0)
    z = np.random.default_rng(6).permuted(np.tile(np.arange(6.0), (4, 1)), axis=1)
    sharp = normalise(z * 1e4, alpha)
    np.testing.assert_array_equal(sharp, np.eye(6)[np.argmax(z, -1)])


def test_larger_alpha_is_sparser():
    z = 2 * np.random.default_rng(7).standard_normal((200, 30))
    zeros = [np.mean(normalise(z, alpha) == 0) for alpha in (1.0, 1.1, 1.3, 1.5, 1.7, 2.0)]
    np.testing.assert_allclose(zeros, [0, 0.005, 0.72, 0.87, 0.91, 0.93], rtol=0, atol=0.02)


def test_a_score_on_the_kink_has_neither_weight_nor_gradient():
    """alpha = 2, z = (0, -1): the second key lies exactly 1 below theta - ... its weight is 0."""
    z = np.array([[0.0, -1.0]])
    p, _, u, theta, support = normalise_forward(z, np.ones_like(z, bool), np.ones((1, 1)))
    np.testing.assert_array_equal(p, [[1.0, 0.0]])
    np.testing.assert_array_equal(theta, [[0.0]] * 1)
    np.testing.assert_array_equal(support, [[True, False]])
    np.testing.assert_array_equal(u, 0.0)


def test_rows_without_keys():
    kwargs = cases(SPEC)["bias"]
    bias = kwargs["bias"].copy()
    bias[0, 1] = -np.inf
    out, cache = entmax_forward(**(kwargs | {"bias": bias}))
    assert not np.any(out[0, 0, 1]) and cache.theta[0, 0, 1] == -np.inf
    assert np.sum(np.isfinite(cache.theta)) == cache.theta.size - 1
    g = entmax_backward(np.ones_like(out), cache)
    assert all(np.all(np.isfinite(x)) for x in g.values()) and not np.any(g["q"][0, 0, 1])
    out, cache = entmax_forward(**(kwargs | {"bias": bias, "empty_row": "uniform"}))
    np.testing.assert_allclose(out[0, 0, 1], kwargs["v"][0, 0].mean(0), rtol=0, atol=1e-15)
    np.testing.assert_array_equal(out[0, 1], entmax_forward(**kwargs)[0][0, 1])
    dout = np.ones_like(out) * np.arange(3.0)
    g = entmax_backward(dout, cache)
    assert not np.any(g["bias"][0, 1]) and np.any(g["bias"][1])
    single = {n: kwargs[n][..., :1, :] for n in ("k", "v")} | {"q": kwargs["q"]}
    alone, _ = entmax_forward(**single, mask=np.zeros((5, 1), bool), empty_row="uniform")
    np.testing.assert_array_equal(alone, np.broadcast_to(single["v"], alone.shape))


def test_minus_infinity_in_a_bias_is_a_mask():
    kwargs = cases(SPEC)["mask"]
    plain = {n: a for n, a in kwargs.items() if n != "mask"}
    for alpha in (1.0, 1.5):
        given = {"alpha": np.full(2, alpha)}
        out, cache = entmax_forward(**(kwargs | given))
        bias = np.where(kwargs["mask"], 0.0, -np.inf)
        same, other = entmax_forward(**(plain | given), bias=bias)
        np.testing.assert_array_equal(out, same)
        dout = np.random.default_rng(4).standard_normal(out.shape)
        mine, theirs = entmax_backward(dout, cache), entmax_backward(dout, other)
        for n in mine:
            np.testing.assert_array_equal(mine[n], theirs[n])


def test_non_finite_numbers_poison_what_sees_them():
    kwargs = cases(SPEC)["mask"]
    clean, _ = entmax_forward(**kwargs)
    for bad in (np.nan, np.inf):
        out, cache = entmax_forward(**(kwargs | {"alpha": np.array([bad, kwargs["alpha"][1]])}))
        live = np.any(kwargs["mask"][0], axis=-1)
        assert np.all(np.isnan(out[:, 0, live])) and not np.any(out[:, 0, ~live])
        assert np.all(np.isnan(cache.theta[:, 0, live]))
        np.testing.assert_array_equal(out[:, 1], clean[:, 1])
        g = entmax_backward(np.ones_like(out), cache)
        assert all(np.all(np.isfinite(x)) for x in g.values()) and g["alpha"][0] == 0
        assert not np.any(g["q"][:, 0])
    kwargs = cases(SPEC)["bias"]
    bias = kwargs["bias"].copy()
    bias[1, 2, 3] = np.nan
    out, _ = entmax_forward(**(kwargs | {"bias": bias}))
    assert np.all(np.isnan(out[:, 1, 2])) and np.sum(np.isnan(out)) == 3


def test_broadcast_alpha_and_values_with_a_batch_of_their_own():
    kwargs = cases(SPEC)["batch"]
    for shape in ((3, 2), (3, 1), (1,)):
        given = kwargs | {"alpha": np.random.default_rng(0).uniform(1.1, 2.5, shape)}
        out, cache = entmax_forward(**given)
        np.testing.assert_allclose(out, slow_entmax(**given), rtol=0, atol=2e-14)
        assert entmax_backward(np.ones_like(out), cache)["alpha"].shape == shape
    flat = cases(SPEC)["no-heads"]
    out, cache = entmax_forward(**(flat | {"v": np.stack([flat["v"], 2 * flat["v"]])}))
    np.testing.assert_allclose(out[1], 2 * out[0], rtol=0, atol=1e-15)
    g = entmax_backward(np.ones_like(out), cache)
    assert g["q"].shape == flat["q"].shape and "alpha" not in g


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"alpha": np.full(3, 1.5)}, core.errors.ShapeError, r"alpha has shape \(3,\).*H\)"),
        ({"alpha": 0.9}, core.errors.ParameterError, "alpha is 0.9, expected a finite number 1"),
        ({"alpha": math.inf}, core.errors.ParameterError, "alpha is inf"),
        ({"alpha": np.array([1.5, 0.5])}, core.errors.ParameterError, "alpha holds 0.5, expected"),
        ({"alpha": [1.5, 1.5]}, core.errors.DTypeError, "alpha is a list"),
        ({"softcap": 0.0}, core.errors.ParameterError, "softcap is 0.0, expected"),
    ],
)  # fmt: skip
def test_errors_name_argument_and_expectation(change, error, says):
    with pytest.raises(error, match=says):
        entmax_forward(**(cases(SPEC)["plain"] | change))


def test_a_foreign_cotangent_is_refused():
    out, cache = entmax_forward(**cases(SPEC)["plain"])
    with pytest.raises(core.errors.ShapeError, match="dout has shape"):
        entmax_backward(out[0], cache)


@pytest.mark.oracle
@pytest.mark.parametrize("case", cases(SPEC))
def test_entmax_agrees(case):
    entmax = pytest.importorskip("entmax", reason="entmax is not installed: make oracles")
    import torch

    kwargs = cases(SPEC)[case]
    if kwargs["q"].ndim == 2:
        kwargs |= {n: kwargs[n][None] for n in ("q", "k", "v")} | {"alpha": np.array([1.2])}
    out, cache = entmax_forward(**kwargs)
    dout = np.random.default_rng(5).standard_normal(out.shape)
    mine = entmax_backward(dout, cache)
    live = core.visible(kwargs["q"], kwargs["k"], **{
        n: kwargs[n] for n in ("mask", "causal", "align") if n in kwargs
    })  # fmt: skip
    names = [n for n in ("q", "k", "v", "alpha", "bias") if n in kwargs]
    given = {n: torch.tensor(kwargs[n], requires_grad=True) for n in names}
    z = given["q"] @ given["k"].mT * kwargs.get("scale", kwargs["q"].shape[-1] ** -0.5)
    if "softcap" in kwargs:
        z = kwargs["softcap"] * torch.tanh(z / kwargs["softcap"])
    if "bias" in kwargs:
        z = z + given["bias"]
    live = torch.tensor(np.broadcast_to(live, z.shape).copy())
    alive = live.any(-1, keepdim=True)
    z = torch.where(live | ~alive, z, -1e9)  # far below, where entmax knows no masks
    alpha = given["alpha"][..., None, None].expand(*z.shape[:-1], 1)
    p = torch.where(alive, entmax.entmax_bisect(z, alpha, dim=-1, n_iter=80), 0.0)
    theirs = p @ given["v"]
    theirs.backward(torch.tensor(dout))
    np.testing.assert_allclose(out, theirs.detach().numpy(), rtol=0, atol=2e-14)
    for n in names:
        np.testing.assert_allclose(mine[n], given[n].grad.numpy(), rtol=0, atol=1e-12)
