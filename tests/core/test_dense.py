"""The shared steps: absolute values, adjoints, empty rows, and every reading of the helpers."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attention_ref import core, engine

SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.integers(1, 6)


def test_softmax_by_hand():
    z = np.log(np.array([[1.0, 2.0, 5.0]]))
    p, lse = core.softmax_forward(z, np.array([True, True, False]))
    np.testing.assert_allclose(p, [[1 / 3, 2 / 3, 0.0]], rtol=1e-15)
    np.testing.assert_allclose(lse, [math.log(3.0)], rtol=1e-15)


@pytest.mark.parametrize(("rule", "row"), [("zero", 0.0), ("nan", 0.0), ("uniform", 1 / 3)])
def test_softmax_of_an_empty_row(rule, row):
    p, lse = core.softmax_forward(np.ones((2, 3)), np.array([[False] * 3, [True] * 3]), rule)
    np.testing.assert_array_equal(p, [[row] * 3, [1 / 3] * 3])
    assert lse[0] == -np.inf and lse[1] == 1 + math.log(3)


def test_a_row_of_minus_infinity_has_no_weight_and_no_gradient():
    """Under "uniform" too: the mean is for rows that the mask empties."""
    z, live = np.array([[-np.inf, -np.inf]]), np.ones((1, 2), bool)
    p, lse = core.softmax_forward(z, live, "uniform")
    assert not np.any(p) and lse[0] == -np.inf
    assert not np.any(core.softmax_backward(np.array([[1.0, 2.0]]), p, live))


def test_softmax_of_no_keys_at_all():
    p, lse = core.softmax_forward(np.ones((2, 0)), np.ones((2, 0), bool))
    assert p.shape == (2, 0) and np.all(lse == -np.inf)


def test_softmax_survives_huge_scores():
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        p, lse = core.softmax_forward(np.array([[1e300, -1e300, 1e300]]), np.ones(3, bool))
    np.testing.assert_array_equal(p, [[0.5, 0.0, 0.5]])
    assert lse[0] == 1e300


def test_softcap_by_hand():
    np.testing.assert_allclose(core.softcap_forward(np.array([2.0]), 4.0), [4 * math.tanh(0.5)])
    slope = core.softcap_backward(np.ones(1), np.array([4 * math.tanh(0.5)]), 4.0)
    np.testing.assert_allclose(slope, [1 - math.tanh(0.5) ** 2])


@given(SEEDS, SIZES, SIZES, SIZES)
def test_adjoints_of_the_bilinear_steps(seed, T, S, D):
    """<u, J w> = <J^T u, w> for scores and mix."""
    rng = np.random.default_rng(seed)
    q, k, dz = rng.standard_normal((T, D)), rng.standard_normal((S, D)), rng.standard_normal((T, S))
    wq, wk = rng.standard_normal(q.shape), rng.standard_normal(k.shape)
    forward = core.scores_forward(wq, k, 0.3) + core.scores_forward(q, wk, 0.3)
    dq, dk = core.scores_backward(dz, q, k, 0.3)
    assert math.isclose(np.sum(dz * forward), np.sum(dq * wq) + np.sum(dk * wk), abs_tol=1e-12)


@given(SEEDS, SIZES, SIZES)
def test_softmax_jacobian(seed, T, S):
    rng = np.random.default_rng(seed)
    z, dp = rng.standard_normal((2, T, S))
    live = rng.random((T, S)) < 0.8
    p, _ = core.softmax_forward(z, live)
    dz = core.softmax_backward(dp, p, live)
    for t in range(T):
        jacobian = np.diag(p[t]) - np.outer(p[t], p[t])
        np.testing.assert_allclose(dz[t], jacobian @ dp[t], rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("shape", "wide"),
    [((3,), (2, 3)), ((1, 3), (4, 3)), ((2, 1, 3), (2, 5, 3)), ((), (2, 3)), ((2, 3), (2, 3))],
)
def test_sum_to_is_the_adjoint_of_broadcasting(shape, wide):
    rng = np.random.default_rng(0)
    x, dx = rng.standard_normal(shape), rng.standard_normal(wide)
    back = core.sum_to(dx, shape)
    assert back.shape == shape
    assert math.isclose(np.sum(np.broadcast_to(x, wide) * dx), np.sum(x * back), abs_tol=1e-12)


HELPERS = {
    "absolute": (core.absolute, np.abs, np.sign),
    "logistic": (core.logistic, lambda x: 0.5 + 0.5 * np.tanh(x / 2),
                 lambda x: 0.25 / np.cosh(x / 2) ** 2),
    "softplus": (core.softplus, lambda x: np.logaddexp(0, x), lambda x: 0.5 + 0.5 * np.tanh(x / 2)),
    "relu": (core.relu, lambda x: np.maximum(x, 0), lambda x: (x > 0) * 1.0),
    "norm": (core.norm, lambda x: np.linalg.norm(x, axis=-1, keepdims=True), None),
}  # fmt: skip


@pytest.mark.parametrize("name", HELPERS)
def test_helpers_in_every_reading(name):
    helper, value, slope = HELPERS[name]
    x = np.array([[-3.0, -0.5, 0.25, 2.0]])
    np.testing.assert_allclose(helper(x), value(x), rtol=4e-16, atol=1e-16)
    assert helper(x.astype(np.float32)).dtype == np.float32
    out, pull = engine.vjp(lambda x: helper(x), {"x": x})
    tape = pull(np.ones_like(out))["x"]
    exact = engine.complex_gradient(lambda x: helper(x), {"x": x}, np.ones_like(out))["x"]
    np.testing.assert_allclose(tape, exact, rtol=1e-14)
    if slope is not None:
        np.testing.assert_allclose(tape, slope(x), rtol=1e-14)
    assert isinstance(helper(engine.Foreign(x)), engine.Foreign)


def test_logistic_and_softplus_at_the_ends():
    x = np.array([-1e4, -800.0, 800.0, 1e4])
    with np.errstate(over="raise", invalid="raise"):
        np.testing.assert_array_equal(core.logistic(x), [0.0, 0.0, 1.0, 1.0])
        np.testing.assert_array_equal(core.softplus(x), [0.0, 0.0, 800.0, 1e4])
        small = core.softplus(np.array([-40.0, -100.0, -700.0]))
    np.testing.assert_allclose(small, np.exp([-40.0, -100.0, -700.0]), rtol=4e-16)


def test_scatter_is_assignment():
    values, index = np.array([[5.0, 7.0]]), np.array([[3, 0]])
    np.testing.assert_array_equal(core.scatter(values, index, 4), [[7.0, 0.0, 0.0, 5.0]])
    np.testing.assert_array_equal(
        core.scatter(values.T, index.T, 4, axis=0), [[7.0], [0.0], [0.0], [5.0]]
    )
