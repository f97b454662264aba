"""Sparsemax rows, exp and tanh in Numba."""

import numpy as np
import pytest

from attention_ref.core.errors import BackendUnavailable, DTypeError, ParameterError, ShapeError
from attention_ref.kernels import numba as package
from attention_ref.kernels.numba import elementary, jit, row_projection, threads
from tests.kernels import formulas


@jit
def exp_of(x, y):
    for i in range(x.size):
        y[i] = elementary.exp(x[i])


@jit
def tanh_of(x, y):
    for i in range(x.size):
        y[i] = elementary.tanh(x[i])


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_exp_and_tanh_within_two_ulp(dtype):
    x = np.concatenate([np.linspace(-86, 88, 20001), np.linspace(-1, 1, 9999), np.logspace(-9, 1)])
    x = x.astype(dtype)
    wide = x.astype(np.longdouble)
    for kernel, function in ((exp_of, np.exp), (tanh_of, np.tanh)):
        y, truth = np.empty_like(x), function(wide)
        kernel(x, y)
        error = np.abs(y - truth)[truth != 0] / np.abs(truth[truth != 0])
        assert error.max() < 2 * np.finfo(dtype).eps
    special = np.array([-np.inf, np.inf, np.nan, 0.0, -1e5, 1e5], dtype)
    y = np.empty_like(special)
    exp_of(special, y)
    assert np.array_equal(y, np.array([0, np.inf, np.nan, 1, 0, np.inf]), equal_nan=True)
    tanh_of(special, y)
    assert np.array_equal(y, np.array([-1, 1, np.nan, 0, -1, 1]), equal_nan=True)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("size", [1, 5, 16, 33, 257])
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("masked", [False, True])
def test_sparsemax(masked, spread, size, dtype):
    rng = np.random.default_rng(size)
    z = (spread * rng.standard_normal((3, 7, size)) + 5).astype(dtype)
    live = rng.random((7, size)) < 0.6 if masked else None
    keep = np.broadcast_to(True if live is None else live, z.shape)
    p = row_projection.sparsemax_rows(z, live)
    truth = formulas.sparsemax(z.astype(np.float64), keep)
    assert p.dtype == dtype and formulas.distance(p, truth, dtype, 1 + spread) < 8
    assert np.array_equal(p.sum(axis=-1) > 0.5, keep.any(axis=-1))
    dp = rng.standard_normal(z.shape).astype(dtype)
    dz = row_projection.sparsemax_rows_backward(dp, p)
    support = p > 0
    count = np.maximum(support.sum(axis=-1, keepdims=True), 1)
    mean = np.where(support, dp.astype(np.float64), 0).sum(axis=-1, keepdims=True) / count
    assert formulas.distance(dz, np.where(support, dp - mean, 0), dtype) < 8


def test_sparsemax_by_hand():
    z = np.array([[1.0, 0.5, -3.0], [0.0, 0.0, 0.0], [9.0, 1.0, 8.5]])
    p = row_projection.sparsemax_rows(z)
    assert np.allclose(p, [[0.75, 0.25, 0], [1 / 3] * 3, [0.75, 0, 0.25]], rtol=0, atol=1e-15)


def test_sparsemax_gradient_by_differences():
    rng = np.random.default_rng(2)
    z, dp, t = rng.standard_normal((3, 4, 11))
    dz = row_projection.sparsemax_rows_backward(dp, row_projection.sparsemax_rows(z))
    h = 1e-6
    ends = [row_projection.sparsemax_rows(z + s * h * t) for s in (1, -1)]
    assert abs(((ends[0] - ends[1]) * dp).sum() / (2 * h) - (dz * t).sum()) < 1e-9


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_sparsemax_of_non_finite_scores(bad):
    z, live = np.zeros((3, 20)), np.ones((3, 20), bool)
    z[0, 3], z[1, 18], live[1, 18], live[2] = bad, bad, False, False
    p = row_projection.sparsemax_rows(z, live)
    assert np.isnan(p[0]).all() and not p[2].any()
    assert np.allclose(p[1], np.where(live[1], 1 / 19, 0))
    z[0, 3], z[0, 19] = 0, bad
    assert np.isnan(row_projection.sparsemax_rows(z)[:2]).all()


def test_sparsemax_threads_layouts_and_errors():
    z = np.random.default_rng(0).standard_normal((700, 900)).astype(np.float32)
    results = []
    for number in (1, 2):
        with threads.use(number):
            p = row_projection.sparsemax_rows(z)
            results.append((p, row_projection.sparsemax_rows_backward(z, p)))
    assert all(np.array_equal(a, b) for a, b in zip(*results, strict=True))
    odd = np.asfortranarray(z)
    odd.flags.writeable = False
    assert np.array_equal(row_projection.sparsemax_rows(odd), results[0][0])
    assert row_projection.sparsemax_rows(z[:0]).shape == (0, 900)
    with pytest.raises(DTypeError):
        row_projection.sparsemax_rows(z.astype(int))
    with pytest.raises(DTypeError):
        row_projection.sparsemax_rows(z, np.ones(900))
    with pytest.raises(ShapeError):
        row_projection.sparsemax_rows(z, np.ones(899, bool))
    with pytest.raises(ShapeError):
        row_projection.sparsemax_rows_backward(z[1:], z)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("alpha", [1.05, 1.5, 1.7, 2.0])
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("masked", [False, True])
def test_entmax(masked, spread, alpha, dtype):
    """The weights solve the definition: by bisection in extended precision, one row at a time."""
    rng = np.random.default_rng(3)
    z = (spread * rng.standard_normal((3, 5, 37)) + 5).astype(dtype)
    live = rng.random((5, 37)) < 0.6 if masked else None
    keep = np.broadcast_to(True if live is None else live, z.shape)
    p = row_projection.entmax_rows(z, alpha, live)
    truth = formulas.entmax(z.astype(np.longdouble), alpha, keep)
    assert p.dtype == dtype and formulas.distance(p, truth, dtype, 2 + 2 * spread) < 16
    assert not p[~keep].any()
    dp = rng.standard_normal(z.shape).astype(dtype)
    w = np.where(truth > 0, np.where(truth > 0, truth, 1.0) ** (2.0 - alpha), 0.0)
    mixed = (w * dp).sum(-1, keepdims=True) / np.maximum(w.sum(-1, keepdims=True), 1e-300)
    dz = row_projection.entmax_rows_backward(dp, truth.astype(dtype), alpha)
    assert formulas.distance(dz, w * (dp - mixed), dtype, 4 * max(1.0, float(w.max()))) < 64


def test_entmax_by_hand_and_its_limits():
    """At alpha = 1.5 the scores 0.4, 0, -3 give 0.64, 0.36, 0; at 2 it is sparsemax."""
    z = np.array([[0.4, 0.0, -3.0]])
    assert np.allclose(row_projection.entmax_rows(z), [[0.64, 0.36, 0.0]], rtol=0, atol=1e-15)
    z = np.random.default_rng(4).standard_normal((9, 50))
    both = row_projection.entmax_rows(z, 2.0), row_projection.sparsemax_rows(z)
    assert np.allclose(*both, rtol=0, atol=1e-15)
    for alpha in (1.0, 2.5):
        with pytest.raises(ParameterError, match=f"alpha is {alpha}"):
            row_projection.entmax_rows(z, alpha)


@pytest.mark.oracle
def test_entmax_package_agrees():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")
    entmax = pytest.importorskip("entmax", reason="entmax is not installed: make oracles")
    z = np.random.default_rng(5).standard_normal((20, 60))
    tensor = torch.tensor(z, requires_grad=True)
    theirs = entmax.entmax15(tensor, dim=-1)
    p = row_projection.entmax_rows(z)
    assert np.allclose(p, theirs.detach().numpy(), rtol=0, atol=1e-14)
    dp = np.random.default_rng(6).standard_normal(z.shape)
    theirs.backward(torch.tensor(dp))
    dz = row_projection.entmax_rows_backward(dp, p)
    assert np.allclose(dz, tensor.grad.numpy(), rtol=0, atol=1e-13)


def test_threads_hand_errors_to_the_caller():
    def kernel(first, last):
        if first > 0:
            raise KeyError(first)

    with threads.use(2), pytest.raises(KeyError):
        threads.share(kernel, 8, 1e9)


def test_without_numba_the_pip_line_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "numba", None)
    with pytest.raises(BackendUnavailable, match="pip install numba"):
        package.require()


def test_compiled_code_is_kept_by_the_hash_of_its_sources(monkeypatch):
    key = package.source_key()
    assert len(key) == 64 and key == package.source_key()
    monkeypatch.setattr(package.require(), "__version__", "0.0")
    assert package.source_key() != key
