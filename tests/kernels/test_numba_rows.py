"""Sparsemax rows, exp and tanh in Numba."""

import numpy as np
import pytest

from attention_ref.core.errors import BackendUnavailable, DTypeError, ShapeError
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
