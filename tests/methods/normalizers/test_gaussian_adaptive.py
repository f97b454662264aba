"""Gaussian adaptive attention: slow loop, worked examples, limits, invariances, errors, oracle."""

import math

import numpy as np
import pytest

import attention_ref
from attention_ref import core
from attention_ref.kit.checks import cases
from attention_ref.methods.normalizers.gaussian_adaptive import (
    gaussian_adaptive_backward,
    gaussian_adaptive_forward,
)

SPEC = attention_ref.get("normalizers/gaussian_adaptive")


def slow_gaussian_adaptive(x, delta, c, theta=None, variant="sum", axis=-1, eps=1e-8):
    """One head of one slice at a time."""
    axis = axis % x.ndim
    others = [x.shape[i] for i in range(x.ndim) if i != axis]
    (H, K), out = delta.shape, np.zeros(x.shape)
    n = x.shape[axis] // H
    for place in np.ndindex(*others):
        for h in range(H):
            where = [(*place[:axis], h * n + i, *place[axis:]) for i in range(n)]
            a = [float(x[w]) for w in where]
            mean = math.fsum(a) / n
            s = math.sqrt(math.fsum((b - mean) ** 2 for b in a) / (n - 1) + eps)
            logits = [0.0 if theta is None else float(theta[h, k]) for k in range(K)]
            total = math.fsum(math.exp(t) for t in logits)
            g = []
            for b in a:
                e = [
                    math.exp(-(((b - mean - delta[h, k]) / s) ** 2) / (2 * c[h, k] ** 2))
                    for k in range(K)
                ]
                if variant == "sum":
                    g.append(math.fsum(math.exp(logits[k]) / total * e[k] for k in range(K)))
                else:
                    g.append(math.prod(e[k] / math.sqrt(2 * math.pi * c[h, k] ** 2)
                                       for k in range(K)))  # fmt: skip
            divisor = max(math.fsum(g), eps)
            for i in range(n):
                out[where[i]] = a[i] * g[i] / divisor
    return out


@pytest.mark.parametrize("case", cases(SPEC))
def test_equals_the_slow_loop(case):
    kwargs = cases(SPEC)[case]
    out, _ = gaussian_adaptive_forward(**kwargs)
    np.testing.assert_allclose(out, slow_gaussian_adaptive(**kwargs), rtol=0, atol=1e-14)


def test_worked_example():
    """x = (-1, 0, 1): mean 0, s = 1; 2 c^2 = 1 / ln 2, so g = (1/2, 1, 1/2), a = (1/4, 1/2, 1/4).

    With dout = (0, 0, 1): da = (0, 0, 1), the share is 1/4, dg = (-1/8, -1/8, 3/8); with L = ln 2
    the exponent's gradient is dg g = (-1, -2, 3) / 16, dy = -2 L y dg g = L (-1, 0, -3) / 8. Its
    mean is -L/6, so without it L (1, 4, -5) / 24; sum dy y = -L/4, and its share of x is
    +L/4 x / 2 = L (-3, 0, 3) / 24. dx = L (-2, 4, -2) / 24 + (0, 0, 1/4). ddelta = L/2;
    dc = sum dg g y^2 / c^3 = (1/8) (2 L)^(3/2).
    """
    L = math.log(2)
    x, c = np.array([-1.0, 0.0, 1.0]), np.array([[math.sqrt(0.5 / L)]])
    out, cache = gaussian_adaptive_forward(x, np.zeros((1, 1)), c, np.ones((1, 1)), eps=1e-300)
    np.testing.assert_allclose(cache.weights, [[0.25, 0.5, 0.25]], rtol=1e-15)
    np.testing.assert_allclose(out, [-0.25, 0.0, 0.25], rtol=1e-15)
    g = gaussian_adaptive_backward(np.array([0.0, 0.0, 1.0]), cache)
    np.testing.assert_allclose(g["x"], [-L / 12, L / 6, 0.25 - L / 12], rtol=1e-14)
    np.testing.assert_allclose(g["delta"], [[L / 2]], rtol=1e-14)
    np.testing.assert_allclose(g["c"], [[(2 * L) ** 1.5 / 8]], rtol=1e-14)
    np.testing.assert_allclose(g["theta"], [[0.0]], atol=1e-16)


def test_worked_example_of_weights():
    """Two Gaussians, one at 1 and one of infinite width; w = (3/4, 1/4).

    x = (-1, 1), s^2 = 2, the first centred at +1: exponents -4 / (4 c^2) = -ln 2 at -1, 0 at 1
    with c^2 = 1 / ln 2. g = (3/8 + 1/4, 1), a = (5/13, 8/13).
    """
    c = np.array([[math.sqrt(1 / math.log(2)), 1e200]])
    theta = np.array([[math.log(3), 0.0]])
    x, delta = np.array([-1.0, 1.0]), np.array([[1.0, 0.0]])
    out, cache = gaussian_adaptive_forward(x, delta, c, theta, eps=1e-300)
    np.testing.assert_allclose(cache.w, [[0.75, 0.25]], rtol=1e-15)
    np.testing.assert_allclose(out, [-5 / 13, 8 / 13], rtol=1e-14)


@pytest.mark.parametrize("case", [c for c in cases(SPEC) if "clamp" not in c])
def test_weights_sum_to_one(case):
    _, cache = gaussian_adaptive_forward(**cases(SPEC)[case])
    np.testing.assert_allclose(cache.weights.sum(axis=-1), 1.0, rtol=1e-15)


@pytest.mark.parametrize("case", ["clamp", "product-clamp"])
def test_a_small_total_is_divided_by_eps(case):
    kwargs = cases(SPEC)[case]
    _, cache = gaussian_adaptive_forward(**kwargs)
    assert np.all(cache.clamped)
    np.testing.assert_allclose(cache.weights, cache.g / 9.0, rtol=1e-15)


def test_the_clamp_is_decided_head_by_head():
    """Height 1 / sqrt(2 pi c^2): a wide Gaussian's total lies below eps, a narrow one's above."""
    x = np.tile([-1.0, 0.0, 1.0], 2)
    c = np.array([[1.0], [1e4]])
    _, cache = gaussian_adaptive_forward(x, np.zeros((2, 1)), c, variant="product", eps=0.01)
    assert cache.clamped.ravel().tolist() == [False, True]
    assert abs(cache.weights[0].sum() - 1.0) < 1e-15
    np.testing.assert_allclose(cache.weights[1].sum(), 3e-4 / math.sqrt(2 * math.pi) / 0.01, 1e-6)
    exact, _ = gaussian_adaptive_forward(
        x[:3], np.zeros((1, 1)), c[:1], variant="product", eps=0.01
    )
    np.testing.assert_array_equal(
        gaussian_adaptive_forward(x, np.zeros((2, 1)), c, variant="product", eps=0.01)[0][:3], exact
    )


def test_wide_gaussians_weigh_everything_alike():
    for variant in ("sum", "product"):
        x = np.random.default_rng(0).standard_normal((3, 7))
        c = np.full((1, 2), 1e9 if variant == "sum" else 1e3)
        out, _ = gaussian_adaptive_forward(x, np.zeros((1, 2)), c, variant=variant)
        np.testing.assert_allclose(out, x / 7, rtol=1e-5)


@pytest.mark.parametrize("case", ["plain", "product", "heads"])
def test_a_shift_leaves_the_weights(case):
    kwargs = cases(SPEC)[case]
    _, cache = gaussian_adaptive_forward(**kwargs)
    _, moved = gaussian_adaptive_forward(**(kwargs | {"x": kwargs["x"] + 5.0}))
    np.testing.assert_allclose(moved.weights, cache.weights, rtol=0, atol=1e-14)


@pytest.mark.parametrize("case", ["plain", "product", "heads"])
def test_a_scale_of_numbers_and_offsets_leaves_the_weights(case):
    """Only with a small eps; offsets are in the unit of x."""
    kwargs = cases(SPEC)[case] | {"eps": 1e-30}
    _, cache = gaussian_adaptive_forward(**kwargs)
    larger = kwargs | {"x": 64 * kwargs["x"], "delta": 64 * kwargs["delta"]}
    _, scaled = gaussian_adaptive_forward(**larger)
    np.testing.assert_allclose(scaled.weights, cache.weights, rtol=0, atol=1e-15)
    _, other = gaussian_adaptive_forward(**(larger | {"delta": kwargs["delta"]}))
    assert np.max(np.abs(other.weights - cache.weights)) > 1e-3


def test_without_offsets_the_weights_are_even():
    kwargs = cases(SPEC)["plain"]
    centred = kwargs["x"] - kwargs["x"].mean(axis=-1, keepdims=True)
    _, one = gaussian_adaptive_forward(**(kwargs | {"x": centred, "delta": np.zeros((1, 3))}))
    _, two = gaussian_adaptive_forward(**(kwargs | {"x": -centred, "delta": np.zeros((1, 3))}))
    np.testing.assert_allclose(one.weights, two.weights, rtol=0, atol=1e-15)


def test_equal_logits_are_no_logits():
    kwargs = cases(SPEC)["bare"]
    out, cache = gaussian_adaptive_forward(**kwargs)
    same, _ = gaussian_adaptive_forward(**kwargs, theta=np.full((1, 2), 7.0))
    np.testing.assert_array_equal(out, same)
    assert set(gaussian_adaptive_backward(out, cache)) == {"x", "delta", "c"}


def test_large_logits_overflow_nothing():
    kwargs = cases(SPEC)["plain"]
    with np.errstate(over="raise", invalid="raise"):
        out, _ = gaussian_adaptive_forward(**(kwargs | {"theta": np.array([[1e4, 0.0, 1e4]])}))
    halves = kwargs | {n: kwargs[n][:, [0, 2]] for n in ("delta", "c")}
    del halves["theta"]
    np.testing.assert_allclose(out, gaussian_adaptive_forward(**halves)[0], rtol=1e-14)


def test_equal_gaussians_get_equal_gradients():
    """So with the official starts they stay the same for ever."""
    x = np.random.default_rng(0).standard_normal((4, 6))
    _, cache = gaussian_adaptive_forward(x, np.zeros((1, 3)), np.full((1, 3), 2.0), np.ones((1, 3)))
    g = gaussian_adaptive_backward(x**2, cache)
    for name in ("delta", "c"):
        np.testing.assert_allclose(g[name], g[name][:, :1] * np.ones(3), rtol=1e-14)
    np.testing.assert_allclose(g["theta"], 0.0, atol=1e-15)


def test_heads_know_nothing_of_each_other():
    kwargs = cases(SPEC)["heads"]
    out, _ = gaussian_adaptive_forward(**kwargs)
    for h in range(2):
        part = {n: kwargs[n][h : h + 1] for n in ("delta", "c", "theta")}
        alone, _ = gaussian_adaptive_forward(kwargs["x"][:, 4 * h : 4 * h + 4], **part)
        np.testing.assert_allclose(out[:, 4 * h : 4 * h + 4], alone, rtol=0, atol=1e-16)


def test_axis_is_where_it_says():
    kwargs = cases(SPEC)["axis"]
    out, _ = gaussian_adaptive_forward(**kwargs)
    moved = kwargs | {"x": np.moveaxis(kwargs["x"], 1, 2), "axis": -1}
    last, _ = gaussian_adaptive_forward(**moved)
    np.testing.assert_array_equal(out, np.moveaxis(last, 2, 1))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["x", "delta", "c", "theta"])
def test_a_non_finite_number_reaches_its_head_alone(name, bad):
    kwargs = cases(SPEC)["heads"]
    clean, clean_cache = gaussian_adaptive_forward(**kwargs)
    a = kwargs[name].copy()
    a[1, 1] = bad
    out, cache = gaussian_adaptive_forward(**(kwargs | {name: a}))
    hit = np.zeros(clean.shape, bool)
    if name == "x":
        hit[1, :4] = True
    else:
        hit[:, 4:] = True
    assert np.all(np.isnan(out[hit]))
    np.testing.assert_array_equal(out[~hit], clean[~hit])
    g = gaussian_adaptive_backward(np.ones_like(out), cache)
    want = gaussian_adaptive_backward(np.where(hit, 0.0, 1.0), clean_cache)
    for key in g:
        np.testing.assert_allclose(g[key], want[key], rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"variant": "mean"}, core.errors.ParameterError, "variant is 'mean', expected one of"),
        ({"variant": "product"}, core.errors.ParameterError, "theta is an array, expected None"),
        ({"eps": 0.0}, core.errors.ParameterError, "eps is 0.0"),
        ({"axis": 2}, core.errors.ParameterError, "axis is 2, expected an integer -2 <= axis <= 1"),
        ({"c": np.zeros((2, 2))}, core.errors.ParameterError, "c holds 0"),
        ({"c": np.ones((2, 3))}, core.errors.ShapeError, "c has K = 3 .* expected 2 as in delta"),
        ({"x": np.ones((3, 7))}, core.errors.ShapeError, "x has length 7 .* multiple of H = 2"),
        ({"x": np.ones((3, 2))}, core.errors.ShapeError, "x has length 2 .* at least 2 H"),
    ],
)
def test_errors_name_argument_and_expectation(change, error, says):
    with pytest.raises(error, match=says):
        gaussian_adaptive_forward(**(cases(SPEC)["heads"] | change))


def test_a_foreign_cotangent_is_refused():
    out, cache = gaussian_adaptive_forward(**cases(SPEC)["axis"])
    with pytest.raises(core.errors.ShapeError, match=r"dout has shape \(6, 3\)"):
        gaussian_adaptive_backward(out[0], cache)


@pytest.mark.oracle
@pytest.mark.parametrize("case", cases(SPEC))
def test_pytorch_agrees(case):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")
    kwargs = cases(SPEC)[case]
    given = {
        n: torch.tensor(a, requires_grad=True)
        for n, a in kwargs.items()
        if isinstance(a, np.ndarray)
    }
    eps, dim = kwargs.get("eps", 1e-8), kwargs.get("axis", -1)
    parts = []
    for h, x in enumerate(torch.chunk(given["x"], len(kwargs["c"]), dim=dim)):
        root = torch.sqrt(x.var(dim=dim, keepdim=True) + eps)
        c, off = given["c"][h], x - x.mean(dim=dim, keepdim=True)
        e = [torch.exp(-(((off - d) / root) ** 2) / (2 * b**2))
             for d, b in zip(given["delta"][h], c, strict=True)]  # fmt: skip
        if kwargs.get("variant") == "product":
            heights = torch.sqrt(2 * torch.pi * c**2)
            g = torch.prod(torch.stack([a / b for a, b in zip(e, heights, strict=True)]), 0)
        else:
            w = torch.softmax(given["theta"][h] if "theta" in given else torch.zeros(len(c)), 0)
            g = sum(a * b for a, b in zip(e, w, strict=True))
        parts.append(x * g / g.sum(dim=dim, keepdim=True).clamp(min=eps))
    theirs = torch.cat(parts, dim=dim)
    out, cache = gaussian_adaptive_forward(**kwargs)
    np.testing.assert_allclose(out, theirs.detach().numpy(), rtol=0, atol=5e-15)
    dout = np.random.default_rng(5).standard_normal(out.shape)
    theirs.backward(torch.tensor(dout))
    for name, g in gaussian_adaptive_backward(dout, cache).items():
        np.testing.assert_allclose(g, given[name].grad.numpy(), rtol=0, atol=2e-14)
