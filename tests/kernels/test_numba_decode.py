"""Few queries over a long cache: the decode kernel against the full matrix and the dense kernel."""

import numpy as np
import pytest

from attention_ref.core.errors import ParameterError
from attention_ref.kernels.numba import decode, dense, threads
from tests.kernels import formulas
from tests.kernels.test_numba_dense import BOUND, CASES, draw

SIZES = [(2, 4, 2, 1, 70, 5, 9), (1, 6, 1, 3, 2311, 7, 6), (3, 3, 3, 2, 1030, 4, 17)]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, sizes, dtype):
    x, options = draw(sizes, dtype, **CASES[case])
    dlse = np.random.default_rng(3).standard_normal(x["dout"].shape[:-1]).astype(dtype)
    out, cache = decode.forward(x["q"], x["k"], x["v"], **options)
    gradients = decode.backward(x["dout"], cache, dlse)
    true_out, true_lse, true = formulas.dense(**x, dlse=dlse, **options)
    alive = np.isfinite(true_lse)
    assert out.dtype == dtype and np.array_equal(alive, np.isfinite(cache.lse))
    assert formulas.distance(out, true_out, dtype) < BOUND
    assert formulas.distance(cache.lse[alive], true_lse[alive], dtype) < BOUND
    for name, truth in true.items():
        assert formulas.distance(gradients[name], truth, dtype) < BOUND, name


def test_an_absolute_value():
    """4096 equal keys and one that is ln 4096 nats above: half of the weight on that one."""
    k, v = np.zeros((4097, 1)), np.ones((4097, 1))
    k[3000], v[3000] = np.log(4096.0), 3.0
    out, cache = decode.forward(np.ones((1, 1)), k, v, scale=1.0)
    assert abs(out[0, 0] - 2.0) < 1e-13 and abs(cache.lse[0] - np.log(8192.0)) < 1e-13


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["k", "v"])
def test_nothing_leaks_through_a_mask(bad, name):
    x, options = draw((1, 4, 1, 2, 1300, 5, 3), np.float64)
    options["mask"] = np.ones((2, 1300), bool)
    options["mask"][0, [5, 1200]] = False
    clean, _ = decode.forward(x["q"], x["k"], x["v"], **options)
    x[name][0, 0, [5, 1200], 1] = bad
    out, cache = decode.forward(x["q"], x["k"], x["v"], **options)
    assert np.array_equal(out[:, :, 0], clean[:, :, 0])
    assert np.isnan(out[:, :, 1]).all() and np.isnan(cache.lse[:, :, 1]).all()
    gradients = decode.backward(x["dout"], cache)
    assert all(np.isfinite(g).all() for g in gradients.values())
    assert gradients["q"][:, :, 0].any() and not gradients["q"][:, :, 1].any()


@pytest.mark.parametrize("place", ["q", "bias"])
def test_a_non_finite_query_or_bias_poisons_its_row_alone(place):
    x, options = draw((1, 4, 2, 2, 300, 5, 3), np.float64, bias=(0, 0, 0, 0))
    clean, _ = decode.forward(x["q"], x["k"], x["v"], **options)
    target = x["q"] if place == "q" else options["bias"]
    target[0, 2, 1, 0] = np.inf
    out, _ = decode.forward(x["q"], x["k"], x["v"], **options)
    bad = np.isnan(out).all(axis=-1)
    assert np.argwhere(bad).tolist() == [[0, 2, 1]]
    assert np.array_equal(out[~bad], clean[~bad])


def test_rows_without_a_key():
    x, options = draw((1, 4, 2, 3, 41, 5, 3), np.float64)
    options["mask"] = np.ones((3, 41), bool)
    options["mask"][1] = False
    for empty_row in ("zero", "nan", "uniform"):
        options["empty_row"] = empty_row
        out, cache = decode.forward(x["q"], x["k"], x["v"], **options)
        want, same = dense.forward(x["q"], x["k"], x["v"], **options)
        np.testing.assert_allclose(out, want, rtol=0, atol=1e-14)
        np.testing.assert_allclose(cache.lse, same.lse, rtol=0, atol=1e-14)
    with pytest.raises(ParameterError, match="without a key"):
        decode.forward(x["q"], x["k"], x["v"], **options | {"empty_row": "raise"})


@pytest.mark.parametrize("sizes", [(1, 2, 1, 0, 5, 3, 2), (1, 2, 1, 5, 0, 3, 2),
                                   (0, 2, 1, 5, 4, 3, 2)])  # fmt: skip
def test_sizes_of_zero(sizes):
    x, options = draw(sizes, np.float64, causal=True)
    out, cache = decode.forward(x["q"], x["k"], x["v"], **options)
    assert out.shape == x["dout"].shape and not out.any()
    assert not any(g.any() for g in decode.backward(x["dout"], cache).values())


def test_one_thread_and_two_give_the_same_bits():
    x, options = draw((1, 8, 2, 1, 9000, 16, 16), np.float32)
    results = []
    for number in (1, 2):
        with threads.use(number):
            results.append(decode.forward(x["q"], x["k"], x["v"], **options)[0])
    assert np.array_equal(*results)


def test_large_scores_stay_finite():
    x, _ = draw((1, 1, 1, 2, 700, 3, 2), np.float32)
    out, _ = decode.forward(x["q"], x["k"], x["v"], scale=1e4)
    assert np.isfinite(out).all()
