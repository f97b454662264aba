"""Gradient regularisation: slow loop, hand example, closed form on a quadratic, limits, SAM."""

import math

import numpy as np
import pytest

import attention_ref
from attention_ref import core, nn
from attention_ref.kit.checks import cases
from attention_ref.methods.training.gradient_regularization import (
    gradient_regularization_step,
    quartic_gradient,
    quartic_hessian_product,
)

SPEC = attention_ref.get("training/gradient_regularization")


def slow_slope(theta, matrix, weight):
    """Gradient of sum weight theta^4 / 4 + theta matrix theta / 2, one coordinate at a time."""
    n = len(theta)
    return [
        math.fsum(float(matrix[i, j]) * theta[j] for j in range(n))
        + float(weight[i]) * theta[i] ** 3
        for i in range(n)
    ]


def slow_gradient_regularization(
    theta, gradient, eta, gamma, matrix, weight, eps=0.05, variant="forward",
    hessian_product=None,
):  # fmt: skip
    """One vector of the batch after the other, with the gradient written out."""
    out = np.zeros(theta.shape)
    n = theta.shape[-1]
    for place in np.ndindex(*theta.shape[:-1]):
        x = [float(theta[(*place, i)]) for i in range(n)]
        g = slow_slope(x, matrix, weight)
        if variant == "exact":
            product = [
                math.fsum(float(matrix[i, j]) * g[j] for j in range(n))
                + 3.0 * float(weight[i]) * x[i] ** 2 * g[i]
                for i in range(n)
            ]
        else:
            sign = 1.0 if variant == "forward" else -1.0
            moved = slow_slope([x[i] + sign * eps * g[i] for i in range(n)], matrix, weight)
            product = [sign * (moved[i] - g[i]) / eps for i in range(n)]
        for i in range(n):
            out[(*place, i)] = x[i] - eta * (g[i] + gamma * product[i])
    return out


def drawn(seed, N=5, quartic=1.0):
    """Parameters, a positive definite matrix and weights."""
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((N, N))
    return rng.standard_normal(N), {"matrix": root @ root.T / N, "weight": quartic * rng.random(N)}


def step(theta, batch, **options):
    """One step on the quartic loss."""
    options = {"eta": 0.1, "gamma": 0.3, "eps": 0.2} | options
    if options.get("variant") == "exact":
        options["hessian_product"] = quartic_hessian_product
    return gradient_regularization_step(theta, quartic_gradient, **options, **batch)


@pytest.mark.parametrize("case", cases(SPEC))
def test_equals_the_slow_loop(case):
    kwargs = cases(SPEC)[case]
    found = gradient_regularization_step(**kwargs)
    np.testing.assert_allclose(found, slow_gradient_regularization(**kwargs), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("forward", 1 - 0.1 * (1 + 0.2 * 4.75)),  # (1.5^3 - 1) / 0.5
        ("backward", 1 - 0.1 * (1 + 0.2 * 1.75)),  # (1 - 0.5^3) / 0.5
        ("exact", 1 - 0.1 * (1 + 0.2 * 3.0)),
    ],
)
def test_worked_example(variant, expected):
    """L = theta^4 / 4 at theta = 1, eps = 1/2."""
    found = gradient_regularization_step(
        np.array([1.0]), lambda x: x**3, eta=0.1, gamma=0.2, eps=0.5, variant=variant,
        hessian_product=lambda x, direction: 3 * x**2 * direction,
    )  # fmt: skip
    np.testing.assert_allclose(found, [expected], rtol=1e-15)


@pytest.mark.parametrize("variant", ["forward", "backward", "exact"])
@pytest.mark.parametrize("eps", [1e-3, 0.5, 7.0])
def test_closed_form_on_a_quadratic(variant, eps):
    """g = A theta, H g = A^2 theta whatever eps is: theta' = (I - eta (A + gamma A^2)) theta."""
    theta, batch = drawn(0, quartic=0.0)
    A = batch["matrix"]
    want = (np.eye(5) - 0.1 * (A + 0.3 * A @ A)) @ theta
    np.testing.assert_allclose(step(theta, batch, variant=variant, eps=eps), want, atol=1e-12)


def test_many_steps_on_a_quadratic_shrink_each_eigenvector_at_its_rate():
    """Along an eigenvector of value a: factor 1 - eta (a + gamma a^2) a step."""
    _, batch = drawn(1, quartic=0.0)
    values, vectors = np.linalg.eigh(batch["matrix"])
    theta = vectors.sum(1)
    for _ in range(30):
        theta = step(theta, batch)
    want = (1 - 0.1 * (values + 0.3 * values**2)) ** 30
    np.testing.assert_allclose(vectors.T @ theta, want, rtol=0, atol=1e-12)


def test_differences_approach_the_product_from_both_sides_at_rate_eps():
    """Forward and backward are off by terms of order eps, opposite; their mean by eps^2."""
    theta, batch = drawn(2)
    exact = step(theta, batch, variant="exact")
    gaps = []
    for eps in (1e-2, 1e-3):
        ahead = step(theta, batch, eps=eps) - exact
        behind = step(theta, batch, eps=eps, variant="backward") - exact
        gaps.append([np.max(np.abs(x)) for x in (ahead, behind, ahead + behind)])
    rates = np.log10(np.array(gaps[0]) / np.array(gaps[1]))
    np.testing.assert_allclose(rates, [1.0, 1.0, 2.0], atol=0.05)


def test_gamma_equal_to_eps_is_sharpness_aware_minimisation():
    """Forward with gamma = eps = rho / norm g descends along the gradient at theta + rho g / |g|"""
    theta, batch = drawn(3)
    g = quartic_gradient(theta, **batch)
    norm = np.linalg.norm(g)
    top = theta + 0.4 * g / norm
    want = theta - 0.1 * quartic_gradient(top, **batch)
    found = step(theta, batch, gamma=0.4 / norm, eps=0.4 / norm)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-14)
    other = step(theta, batch, gamma=0.4 / norm, eps=0.2 / norm)
    assert np.max(np.abs(other - want)) > 1e-3


def test_flooding_twice_is_a_backward_difference():
    """A descent step, then an ascent step: theta changes by -eta^2 Delta_B, with eps = eta."""
    theta, batch = drawn(4)
    eta = 0.05
    below = theta - eta * quartic_gradient(theta, **batch)
    back = below + eta * quartic_gradient(below, **batch)
    both = step(theta, batch, eta=eta, gamma=1.0, eps=eta, variant="backward")
    plain = step(theta, batch, eta=eta, gamma=0.0)
    np.testing.assert_allclose(back - theta, eta * (both - plain), rtol=0, atol=1e-14)


@pytest.mark.parametrize("variant", ["forward", "backward", "exact"])
def test_no_penalty_is_gradient_descent_with_one_gradient(variant):
    theta, batch = drawn(5)
    calls = []

    def counted(x, **given):
        calls.append(x)
        return quartic_gradient(x, **given)

    found = gradient_regularization_step(
        theta, counted, eta=0.1, gamma=0.0, variant=variant,
        hessian_product=quartic_hessian_product, **batch,
    )  # fmt: skip
    want, _ = nn.optim.sgd({"x": theta}, {"x": quartic_gradient(theta, **batch)}, rate=0.1)
    np.testing.assert_array_equal(found, want["x"])
    assert len(calls) == 1


def test_the_objective_falls_and_its_gradient_is_the_exact_direction():
    theta, batch = drawn(6)

    def objective(x):
        loss = np.sum(batch["weight"] * x**4) / 4 + x @ batch["matrix"] @ x / 2
        return loss + 0.15 * np.sum(quartic_gradient(x, **batch) ** 2)

    direction = (theta - step(theta, batch, variant="exact")) / 0.1
    for i, unit in enumerate(np.eye(5)):
        slope = (objective(theta + 1e-5 * unit) - objective(theta - 1e-5 * unit)) / 2e-5
        assert math.isclose(direction[i], slope, rel_tol=1e-7, abs_tol=1e-7)
    assert objective(step(theta, batch, variant="exact", eta=1e-3)) < objective(theta)


@pytest.mark.parametrize("variant", ["forward", "backward", "exact"])
def test_a_dict_of_parameters_is_one_long_vector(variant):
    """Also with a loss that joins the parts: g of one depends on the other."""
    theta, batch = drawn(7, N=6)
    whole = step(theta, batch, variant=variant)

    def split(x):
        return {"a": x[:2], "b": x[2:]}

    def joined(parts):
        return np.concatenate([parts["a"], parts["b"]])

    found = gradient_regularization_step(
        split(theta), lambda parts: split(quartic_gradient(joined(parts), **batch)),
        eta=0.1, gamma=0.3, eps=0.2, variant=variant,
        hessian_product=lambda parts, way: split(
            quartic_hessian_product(joined(parts), joined(way), **batch)
        ),
    )  # fmt: skip
    assert list(found) == ["a", "b"]
    np.testing.assert_allclose(joined(found), whole, rtol=0, atol=1e-15)


def test_a_dict_keeps_single_precision():
    theta = {"w": np.ones((2, 3), np.float32), "b": np.ones(3, np.float32)}
    found = gradient_regularization_step(theta, lambda p: p, eta=0.1, gamma=0.2)
    assert {x.dtype for x in found.values()} == {np.dtype(np.float32)}
    np.testing.assert_allclose(found["w"], 1 - 0.1 * 1.2, rtol=1e-6)


def test_the_default_is_a_forward_difference_at_one_twentieth():
    theta, batch = drawn(9)
    found = gradient_regularization_step(theta, quartic_gradient, eta=0.1, gamma=0.3, **batch)
    np.testing.assert_array_equal(found, step(theta, batch, eps=0.05, variant="forward"))


def test_a_single_precision_array_stays_single():
    theta, batch = drawn(8)
    single = {k: x.astype(np.float32) for k, x in batch.items()}
    found = step(theta.astype(np.float32), single)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, step(theta, batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"eta": 0.0}, core.errors.ParameterError, "eta is 0.0, expected"),
        ({"gamma": -0.1}, core.errors.ParameterError, "gamma is -0.1, expected"),
        ({"eps": 0.0}, core.errors.ParameterError, "eps is 0.0, expected"),
        ({"variant": "forwards"}, core.errors.ParameterError, "did you mean 'forward'"),
        ({"variant": "exact"}, core.errors.ParameterError, "hessian_product is None, expected"),
        ({"theta": {"w": [1.0]}}, core.errors.DTypeError, "'w'.* is a list"),
        ({"theta": np.array(1.0)}, core.errors.ShapeError, "theta has shape"),
        ({"gradient": lambda x: x[:2]}, core.errors.ShapeError, "gradient of theta has shape"),
        ({"gradient": lambda x: {"x": x}}, core.errors.ParameterError, "gradient returned"),
        ({"gradient": lambda x: x.tolist()}, core.errors.DTypeError, "gradient of theta is a list"),
        (
            {"theta": {"w": np.ones(2), "b": np.ones(1)}, "gradient": lambda p: {"w": p["w"]}},
            core.errors.ParameterError,
            r"gradient returned theta\['w'\], expected theta\['b'\], theta\['w'\]",
        ),
        (
            {"variant": "exact", "hessian_product": lambda x, way: way[:1]},
            core.errors.ShapeError,
            "hessian_product of theta has shape",
        ),
    ],
)
def test_errors_name_argument_and_expectation(change, error, says):
    given = {"theta": np.ones(3), "gradient": lambda x: x, "eta": 0.1, "gamma": 0.2} | change
    with pytest.raises(error, match=says):
        gradient_regularization_step(**given)
