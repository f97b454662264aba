"""The low-rank bottleneck: construction by elimination, hand example, bound, limit, failure."""

import math

import numpy as np
import pytest

import attention_ref
from attention_ref import core
from attention_ref.kit.checks import cases
from attention_ref.methods.theory.low_rank_bottleneck import (
    centred_logits,
    low_rank_bottleneck_construct,
    low_rank_bottleneck_counterexample,
    low_rank_bottleneck_fit,
    low_rank_bottleneck_limit,
    low_rank_bottleneck_map,
    softmax_columns,
    zero_sum_basis,
)

SPEC = attention_ref.get("theory/low_rank_bottleneck")


def slow_inverse(X):
    """The left inverse by Gauss-Jordan elimination of the normal equations X^T X Y = X^T."""
    d, n = len(X), len(X[0])
    rows = []
    for i in range(n):
        gram = [math.fsum(X[a][i] * X[a][j] for a in range(d)) for j in range(n)]
        rows.append(gram + [X[a][i] for a in range(d)])
    for i in range(n):
        pivot = rows[i][i]
        rows[i] = [x / pivot for x in rows[i]]
        for j in range(n):
            if j != i:
                factor = rows[j][i]
                rows[j] = [x - factor * y for x, y in zip(rows[j], rows[i], strict=True)]
    return [row[n:] for row in rows]


def slow_low_rank_bottleneck(X, P, d_k=None):
    """One number at a time: left inverse, basis, two projections."""
    lead = np.broadcast_shapes(X.shape[:-2], P.shape[:-2])
    d, n = X.shape[-2], X.shape[-1]
    width = n if d_k is None else d_k
    W_q, W_k = np.zeros((*lead, width, d)), np.zeros((*X.shape[:-2], width, d))
    Xs, Ps = np.broadcast_to(X, (*lead, d, n)), np.broadcast_to(P, (*lead, n, n))
    for place in np.ndindex(*lead):
        tokens = [[float(Xs[place][a, i]) for i in range(n)] for a in range(d)]
        inverse = slow_inverse(tokens)
        basis = []  # one vector a row of the projections
        for m in range(min(width, n)):
            if width >= n:
                basis.append([1.0 if i == m else 0.0 for i in range(n)])
            else:
                size = math.sqrt((m + 1) * (m + 2))
                vector = [1.0] * (m + 1) + [-(m + 1.0)] + [0.0] * (n - m - 2)
                basis.append([x / size for x in vector])
        own = place[len(lead) - len(X.shape[:-2]) :]
        for m, vector in enumerate(basis):
            for a in range(d):
                W_k[own][m, a] = math.fsum(vector[i] * inverse[i][a] for i in range(n))
                W_q[place][m, a] = math.sqrt(width) * math.fsum(
                    vector[i] * math.log(Ps[place][i, j]) * inverse[j][a]
                    for i in range(n)
                    for j in range(n)
                )
    return {"W_q": W_q, "W_k": W_k}


def drawn(seed, n, lead=(), height=1.0):
    """Random positive maps."""
    return softmax_columns(height * np.random.default_rng(seed).standard_normal((*lead, n, n)))


@pytest.mark.parametrize("case", cases(SPEC))
def test_equals_the_slow_loop(case):
    kwargs = cases(SPEC)[case]
    found, slow = low_rank_bottleneck_construct(**kwargs), slow_low_rank_bottleneck(**kwargs)
    for name, a in found._asdict().items():
        np.testing.assert_allclose(a, slow[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", cases(SPEC))
def test_the_head_realises_the_map(case):
    kwargs = cases(SPEC)[case]
    W_q, W_k = low_rank_bottleneck_construct(**kwargs)
    n = kwargs["P"].shape[-1]
    assert W_q.shape[-2] == W_k.shape[-2] == kwargs.get("d_k", n)
    found = low_rank_bottleneck_map(kwargs["X"], W_q, W_k)
    np.testing.assert_allclose(found, np.broadcast_to(kwargs["P"], found.shape), rtol=1e-13)


def test_worked_example_of_the_theorem():
    """X = diag(2, 1): W_k = diag(1/2, 1), W_q = sqrt(2) log P diag(1/2, 1)."""
    X = np.diag([2.0, 1.0])
    P = np.array([[0.75, 0.5], [0.25, 0.5]])
    W_q, W_k = low_rank_bottleneck_construct(X, P)
    np.testing.assert_allclose(W_k, [[0.5, 0.0], [0.0, 1.0]], rtol=1e-15)
    logs = math.sqrt(2) * np.array([[math.log(0.75) / 2, math.log(0.5)],
                                    [math.log(0.25) / 2, math.log(0.5)]])  # fmt: skip
    np.testing.assert_allclose(W_q, logs, rtol=1e-15)


def test_worked_example_with_one_dimension_less():
    """B = (1, -1) / sqrt(2): W_k = (1/2, -1) / sqrt(2), W_q = (log 3 / 2, 0) / sqrt(2)."""
    X = np.diag([2.0, 1.0])
    P = np.array([[0.75, 0.5], [0.25, 0.5]])
    W_q, W_k = low_rank_bottleneck_construct(X, P, d_k=1)
    np.testing.assert_allclose(W_k, np.array([[0.5, -1.0]]) / math.sqrt(2), rtol=1e-15)
    want = np.array([[math.log(3) / 2, 0.0]]) / math.sqrt(2)
    np.testing.assert_allclose(W_q, want, rtol=0, atol=1e-15)


def test_fit_by_hand():
    """log P = I + column shifts: C = I - 1/3, singular values 1, 1, 0."""
    P, residual = low_rank_bottleneck_counterexample(3, 1)
    e = math.e
    np.testing.assert_allclose(P[0], [e / (e + 2), 1 / (e + 2), 1 / (e + 2)], rtol=1e-15)
    assert residual == 1.0
    np.testing.assert_allclose(centred_logits(P), np.eye(3) - 1 / 3, rtol=0, atol=1e-15)
    for d_k, want in ((0, math.sqrt(2)), (1, 1.0), (2, 0.0), (3, 0.0), (9, 0.0)):
        fit = low_rank_bottleneck_fit(P, d_k)
        np.testing.assert_allclose(fit.residual, want, rtol=0, atol=1e-15)
    none = low_rank_bottleneck_fit(P, 0)
    np.testing.assert_array_equal(none.Z, 0.0)  # every weight 1/3, off by e / (e + 2) - 1/3
    np.testing.assert_allclose(none.error, e / (e + 2) - 1 / 3, rtol=1e-14)


def test_map_by_hand():
    """Logits 1 * 2 / sqrt(4) for the one pair of tokens that is not 0."""
    X = np.array([[1.0, 0.0]])
    W_q, W_k = np.array([[2.0], [0.0], [0.0], [0.0]]), np.array([[1.0], [0.0], [5.0], [0.0]])
    e = math.e
    np.testing.assert_allclose(
        low_rank_bottleneck_map(X, W_q, W_k), [[e / (e + 1), 0.5], [1 / (e + 1), 0.5]], rtol=1e-15
    )


@pytest.mark.parametrize("n", [2, 3, 7])
def test_helmert_basis(n):
    B = zero_sum_basis(n, np.ones(1))
    np.testing.assert_allclose(B.T @ B, np.eye(n - 1), rtol=0, atol=1e-15)
    np.testing.assert_allclose(B.sum(0), 0.0, rtol=0, atol=1e-15)
    first = np.zeros(n)
    first[:2] = 1 / math.sqrt(2), -1 / math.sqrt(2)
    np.testing.assert_allclose(B[:, 0], first, rtol=1e-15)


def test_column_shifts_of_the_logits_change_nothing():
    Z = np.random.default_rng(0).standard_normal((4, 6, 6))
    shift = np.random.default_rng(1).standard_normal((4, 1, 6))
    np.testing.assert_allclose(softmax_columns(Z + shift), softmax_columns(Z), rtol=1e-14)
    np.testing.assert_allclose(softmax_columns(Z + 1e4), softmax_columns(Z), rtol=1e-10)
    np.testing.assert_allclose(softmax_columns(Z).sum(-2), 1.0, rtol=1e-15)
    rows = softmax_columns(Z + np.swapaxes(shift, -1, -2))
    assert np.max(np.abs(rows - softmax_columns(Z))) > 0.1


def test_logits_of_a_head_have_its_rank():
    rng = np.random.default_rng(2)
    X, W_q, W_k = (rng.standard_normal(shape) for shape in ((9, 8), (3, 9), (3, 9)))
    P = low_rank_bottleneck_map(X, W_q, W_k)
    assert np.linalg.matrix_rank(centred_logits(P), tol=1e-12) == 3
    np.testing.assert_allclose(low_rank_bottleneck_fit(P, 3).residual, 0.0, rtol=0, atol=1e-13)
    assert low_rank_bottleneck_fit(P, 2).residual > 0.1


def alternate(P, d_k, shift, steps):
    """Truncate log P + shift to rank d_k, choose the best shifts, repeat: the residuals."""
    missed = []
    for _ in range(steps):
        U, sigma, V = np.linalg.svd(np.log(P) + shift)
        Z = U[:, :d_k] * sigma[:d_k] @ V[:d_k]
        shift = np.mean(Z - np.log(P), axis=0, keepdims=True)
        missed.append(np.linalg.norm(np.log(P) + shift - Z))
    return np.array(missed)


@pytest.mark.parametrize("d_k", range(6))
def test_alternating_svd_and_shifts_agrees(d_k):
    """From no shifts at all it descends to (4), slowly when d_k is near n."""
    P = drawn(3, 8)
    missed = alternate(P, d_k, np.zeros((1, 8)), 2000)
    fit = low_rank_bottleneck_fit(P, d_k)
    np.testing.assert_allclose(missed[-1], fit.residual, rtol=1e-3)
    assert np.linalg.matrix_rank(fit.Z, tol=1e-12) == d_k


@pytest.mark.parametrize("d_k", range(9))
def test_alternating_stays_above_and_ends_where_the_fit_begins(d_k):
    P = drawn(3, 8)
    residual = low_rank_bottleneck_fit(P, d_k).residual
    assert np.all(alternate(P, d_k, np.zeros((1, 8)), 50) >= residual - 1e-12)
    at_once = alternate(P, d_k, -np.log(P).mean(0, keepdims=True), 1)[0]
    np.testing.assert_allclose(at_once, residual, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("d_k", [1, 3, 6])
def test_no_head_does_better_than_the_bound(d_k):
    """Heads near the best one miss more, and as little more as one likes."""
    P, rng = drawn(4, 8), np.random.default_rng(5)
    fit = low_rank_bottleneck_fit(P, d_k)
    U, sigma, V = np.linalg.svd(fit.Z)
    left, right = U[:, :d_k] * sigma[:d_k], V[:d_k]
    missed = []
    for scale in (1.0, 0.1, 0.001):
        for _ in range(50):
            Z = (left + scale * rng.standard_normal(left.shape)) @ (
                right + scale * rng.standard_normal(right.shape)
            )
            missed.append(np.linalg.norm(centred_logits(P) - (Z - Z.mean(0))))
    assert fit.residual < min(missed) < 1.01 * fit.residual


@pytest.mark.parametrize("seed", range(3))
def test_the_error_falls_to_zero_at_n_minus_one(seed):
    fits = [low_rank_bottleneck_fit(drawn(seed, 8), d_k) for d_k in range(9)]
    residuals = [float(f.residual) for f in fits]
    assert residuals == sorted(residuals, reverse=True)
    assert fits[6].error > 1e-3 and fits[7].error < 1e-14


def test_batches_are_their_members():
    P = drawn(6, 5, lead=(2, 3))
    whole = low_rank_bottleneck_fit(P, 2)
    assert whole.residual.shape == whole.error.shape == (2, 3)
    one = low_rank_bottleneck_fit(P[1, 2], 2)
    for mine, theirs in zip(whole, one, strict=True):
        np.testing.assert_allclose(mine[1, 2], theirs, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("n", "d_k"), [(3, 1), (5, 0), (8, 4), (8, 6)])
def test_the_counterexample_fails(n, d_k):
    P, residual = low_rank_bottleneck_counterexample(n, d_k, height=2.5)
    fit = low_rank_bottleneck_fit(P, d_k)
    np.testing.assert_allclose(fit.residual, residual, rtol=1e-13)
    assert residual == 2.5 * math.sqrt(n - 1 - d_k) and fit.error > 0.01
    with pytest.raises(core.errors.ParameterError, match="d_k"):
        low_rank_bottleneck_construct(np.eye(n), P, d_k=d_k)
    np.testing.assert_allclose(
        low_rank_bottleneck_map(np.eye(n), *low_rank_bottleneck_construct(np.eye(n), P)), P,
        rtol=1e-14,
    )  # fmt: skip


@pytest.mark.parametrize("n", [3, 4, 5, 8])
def test_the_limit_is_approached_at_the_stated_rate(n):
    """Hard attention with rank 2: 1 - P_ii falls like 2 exp(-g beta)."""
    _, rate = low_rank_bottleneck_limit(n, 1.0)
    assert math.isclose(rate, 1 - math.cos(2 * math.pi / n), rel_tol=1e-15)
    for lead in (12.0, 16.0):
        Z, _ = low_rank_bottleneck_limit(n, lead / rate)
        assert np.linalg.matrix_rank(Z, tol=1e-10) == 2
        lacking = 1 - np.diagonal(softmax_columns(Z))
        np.testing.assert_allclose(lacking, 2 * math.exp(-lead), rtol=1e-4)
    assert low_rank_bottleneck_counterexample(n, 1)[1] > 0


def test_single_precision():
    kwargs = {k: a.astype(np.float32) for k, a in cases(SPEC)["plain"].items()}
    W_q, W_k = low_rank_bottleneck_construct(**kwargs)
    assert W_q.dtype == W_k.dtype == np.float32
    found = low_rank_bottleneck_map(kwargs["X"], W_q, W_k)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, kwargs["P"], rtol=1e-5)
    assert low_rank_bottleneck_fit(kwargs["P"], 2).Z.dtype == np.float32


DEPENDENT = np.array([[1.0, 1.0, 0.0], [2.0, 2.0, 1.0], [0.5, 0.5, 3.0], [1.0, 1.0, 1.0]])


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"X": np.ones((2, 3))}, core.errors.ShapeError, r"X has shape \(2, 3\), expected"),
        ({"X": np.ones((4, 0)), "P": np.ones((0, 0))}, core.errors.ShapeError, "X has shape"),
        ({"P": np.ones((2, 3)) / 3}, core.errors.ShapeError, "P has n = 2"),
        ({"P": np.eye(3)}, core.errors.ParameterError, "P has an entry that is not positive"),
        ({"P": drawn(0, 3).T}, core.errors.ParameterError, "hint: np.swapaxes"),
        ({"P": 1.0001 * drawn(0, 3)}, core.errors.ParameterError, "P has an entry"),
        ({"P": 0.9999 * drawn(0, 3)}, core.errors.ParameterError, "P has an entry"),
        ({"P": drawn(0, 3) + np.nan}, core.errors.ParameterError, "P has an entry"),
        ({"X": DEPENDENT}, core.errors.ParameterError, "X has dependent columns"),
        ({"d_k": 1}, core.errors.ParameterError, "d_k is 1, expected an integer 2 <= d_k"),
        ({"d_k": 2.0}, core.errors.ParameterError, "d_k is 2.0"),
    ],
)
def test_errors_name_argument_and_expectation(change, error, says):
    X = np.eye(4)[:, :3]
    with pytest.raises(error, match=says):
        low_rank_bottleneck_construct(**({"X": X, "P": drawn(0, 3)} | change))


def test_nearly_equal_tokens_are_refused_and_merely_skewed_ones_are_not():
    X = np.eye(3)
    X[:, 1] = X[:, 0] + 1e-6 * X[:, 1]
    P = drawn(1, 3)
    found = low_rank_bottleneck_map(X, *low_rank_bottleneck_construct(X, P))
    np.testing.assert_allclose(found, P, rtol=0, atol=1e-3)
    X[:, 1] = X[:, 0] * (1 + 1e-16)
    with pytest.raises(core.errors.ParameterError, match="dependent"):
        low_rank_bottleneck_construct(X, P)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: low_rank_bottleneck_counterexample(4, 3), "d_k is 3, expected"),
        (lambda: low_rank_bottleneck_counterexample(1, 0), "n is 1, expected"),
        (lambda: low_rank_bottleneck_counterexample(4, 1, height=0), "height is 0, expected"),
        (lambda: low_rank_bottleneck_limit(2, 1.0), "n is 2, expected"),
        (lambda: low_rank_bottleneck_limit(3, 0.0), "beta is 0.0, expected"),
        (lambda: low_rank_bottleneck_fit(np.eye(3), 1), "P has an entry"),
        (lambda: low_rank_bottleneck_fit(drawn(0, 3), -1), "d_k is -1, expected"),
    ],
)
def test_quantities_refuse_what_makes_no_sense(call, says):
    with pytest.raises(core.errors.ParameterError, match=says):
        call()
