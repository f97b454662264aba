"""Dense attention in Numba: values and gradients against the full matrix, in eps."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from attention_ref.core.errors import DTypeError, ParameterError, ShapeError
from attention_ref.kernels.numba import decode, dense, threads
from tests.kernels import formulas

BOUND = 64  # eps, times the largest truth
CASES = {
    "plain": {},
    "causal": {"causal": True},
    "upper": {"causal": True, "align": "upper_left"},
    "mask": {"mask": True},
    "softcap": {"softcap": 1.3, "causal": True},
    "bias": {"bias": (1, 1, 0, 0)},
    "bias-row": {"bias": (1, 0, 1, 0), "mask": True},
    "all": {"bias": (0, 1, 0, 0), "mask": True, "causal": True, "softcap": 2.1},
}
SIZES = [(2, 4, 2, 33, 70, 5, 9), (1, 2, 1, 131, 101, 13, 6), (3, 3, 3, 1, 1, 1, 1)]


def draw(sizes, dtype, mask=None, bias=None, **options):
    """Arrays for one case; nothing is symmetric, square or a multiple of a tile."""
    batch, heads, groups, queries, keys, width, depth = sizes
    rng = np.random.default_rng(7)
    shapes = {
        "q": (batch, heads, queries, width), "k": (batch, groups, keys, width),
        "v": (batch, groups, keys, depth), "dout": (batch, heads, queries, depth),
    }  # fmt: skip
    x = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    if mask:
        options["mask"] = rng.random((batch, 1, queries, keys)) < 0.6
        options["mask"][..., queries // 2, :] = False
    if bias:
        full = (batch, heads, queries, keys)
        shape = [n if one == 0 else 1 for n, one in zip(full, bias, strict=True)]
        options["bias"] = rng.standard_normal(shape).astype(dtype)
    return x, {"scale": 0.6, **options}


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, sizes, dtype):
    x, options = draw(sizes, dtype, **CASES[case])
    dlse = np.random.default_rng(3).standard_normal(x["dout"].shape[:-1]).astype(dtype)
    out, cache = dense.forward(x["q"], x["k"], x["v"], **options)
    gradients = dense.backward(x["dout"], cache, dlse)
    true_out, true_lse, true = formulas.dense(**x, dlse=dlse, **options)
    alive = np.isfinite(true_lse)
    assert out.dtype == dtype
    assert formulas.distance(out, true_out, dtype) < BOUND
    assert np.array_equal(alive, np.isfinite(cache.lse))
    assert formulas.distance(cache.lse[alive], true_lse[alive], dtype) < BOUND
    assert gradients.keys() == true.keys()
    for name, truth in true.items():
        assert gradients[name].dtype == dtype
        assert formulas.distance(gradients[name], truth, dtype) < BOUND, name


def test_an_absolute_value():
    q, k = np.array([[2.0]]), np.array([[0.0], [np.log(3.0)]])
    out, cache = dense.forward(q, k, np.array([[0.0], [4.0]]), scale=0.5)
    assert out.shape == (1, 1) and abs(out[0, 0] - 3.0) < 1e-15
    assert abs(cache.lse[0] - np.log(4.0)) < 1e-15


def test_leading_axes_broadcast():
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 3, 4, 5, 6)), rng.standard_normal((3, 2, 7, 6))
    v, mask = rng.standard_normal((1, 1, 2, 7, 3)), rng.random((3, 1, 5, 7)) < 0.7
    dout = rng.standard_normal((2, 3, 4, 5, 3))
    out, cache = dense.forward(q, k, v, mask=mask, scale=0.6)
    true_out, _, true = formulas.dense(q, k, v, dout, mask=mask, scale=0.6)
    assert formulas.distance(out, true_out, np.float64) < BOUND
    for name, gradient in dense.backward(dout, cache).items():
        assert formulas.distance(gradient, true[name], np.float64) < BOUND, name


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nothing_leaks_through_a_mask(bad):
    x, options = draw((1, 2, 1, 9, 11, 5, 3), np.float64, mask=True, causal=True)
    options["mask"][..., 4], options["mask"][..., 6, 4] = False, True
    clean = dense.forward(x["q"], x["k"], x["v"], **options)
    for name in "kv":
        y = {n: a.copy() for n, a in x.items()}
        y[name][0, 0, 4, 1] = bad
        out, cache = dense.forward(y["q"], y["k"], y["v"], **options)
        assert np.isnan(out[:, :, 6]).all() and np.isnan(cache.lse[:, :, 6]).all()
        rest = np.arange(9) != 6
        assert np.array_equal(out[:, :, rest], clean[0][:, :, rest])
        gradients = dense.backward(y["dout"], cache)
        assert all(np.isfinite(g).all() for g in gradients.values())
        assert not gradients["q"][:, :, 6].any() and gradients["q"][:, :, 5].any()


def test_a_non_finite_query_or_bias_poisons_its_row_alone():
    x, options = draw((1, 2, 2, 9, 11, 5, 3), np.float32, mask=True, bias=(0, 0, 0, 0))
    live = np.flatnonzero(options["mask"][0, 0, 2])[0]
    dead = np.flatnonzero(~options["mask"][0, 0, 3])[0]
    clean, _ = dense.forward(x["q"], x["k"], x["v"], **options)
    x["q"][0, 1, 5, 0], x["q"][0, 1, 4, 0] = np.nan, np.nan  # row 4 has no key
    options["bias"][0, 0, 2, live], options["bias"][0, 0, 3, dead] = np.inf, np.nan
    out, _ = dense.forward(x["q"], x["k"], x["v"], **options)
    bad = np.isnan(out).all(axis=-1)
    assert np.argwhere(bad).tolist() == [[0, 0, 2], [0, 1, 5]]
    assert np.array_equal(out[~bad], clean[~bad])


@pytest.mark.parametrize("module", [dense, decode])
@pytest.mark.parametrize("place", ["k", "v"])
def test_the_mean_over_a_key_that_is_not_finite_is_nan_and_passes_no_gradient(module, place):
    """An empty row under "uniform" sees every value, the spoilt one too."""
    x, options = draw((1, 2, 1, 3, 40, 5, 2), np.float64, empty_row="uniform")
    options["mask"] = np.ones((3, 40), bool)
    options["mask"][1], options["mask"][0, 7] = False, False
    x[place][0, 0, 7, 0] = np.inf
    out, cache = module.forward(x["q"], x["k"], x["v"], **options)
    assert np.isnan(out[0, :, 1:]).all() and np.isfinite(out[0, :, 0]).all()
    g = dense.backward(x["dout"], cache)
    want = {n: a.copy() for n, a in x.items()}
    want[place][0, 0, 7, 0], want["dout"][0, :, 1:] = 0.0, 0.0
    _, clean = module.forward(want["q"], want["k"], want["v"], **options)
    for name, dx in dense.backward(want["dout"], clean).items():
        assert np.allclose(g[name], dx, rtol=0, atol=1e-13), name


@pytest.mark.parametrize("module", [dense, decode])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_query_that_is_not_finite_is_nan_whatever_its_scores(module, bad):
    """All its scores may be -inf: that is no row without keys."""
    q, k = np.ones((1, 2, 3, 1)), np.ones((1, 2, 40, 1))
    mask = np.ones((3, 40), bool)
    mask[1] = False
    q[0, 1, :2] = bad
    v = np.random.default_rng(0).standard_normal((1, 2, 40, 2))
    out, cache = module.forward(q, k, v, mask=mask)
    assert np.isnan(out[0, 1, 0]).all() and np.isnan(cache.lse[0, 1, 0])
    assert not out[0, 1, 1].any() and np.isfinite(out[0, [0, 1], 2]).all()
    g = dense.backward(np.ones_like(out), cache)
    assert all(np.isfinite(x).all() for x in g.values()) and not g["q"][0, 1, 0].any()


def test_a_bias_of_minus_infinity_is_a_mask():
    x, options = draw((1, 2, 1, 9, 11, 5, 3), np.float64, mask=True)
    bias = np.where(options["mask"], 0.0, -np.inf)
    out, cache = dense.forward(x["q"], x["k"], x["v"], scale=0.6, bias=bias)
    assert np.array_equal(out, dense.forward(x["q"], x["k"], x["v"], **options)[0])
    assert all(np.isfinite(g).all() for g in dense.backward(x["dout"], cache).values())


def test_rows_without_a_key():
    x, options = draw((1, 4, 2, 9, 11, 5, 3), np.float64, mask=True)
    run = [dense.forward(x["q"], x["k"], x["v"], empty_row=e, **options) for e in
           ("zero", "nan", "uniform")]  # fmt: skip
    (zero, _), (nan, _), (uniform, cache) = run
    assert not zero[:, :, 4].any() and zero[:, :, 3].any()
    assert np.isnan(nan[:, :, 4]).all() and np.isfinite(nan[:, :, 3]).all()
    mean = np.repeat(x["v"].mean(axis=2), 2, axis=1)
    assert np.allclose(uniform[:, :, 4], mean, rtol=0, atol=1e-15)
    with pytest.raises(ParameterError, match="without a key"):
        dense.forward(x["q"], x["k"], x["v"], empty_row="raise", **options)
    more = dense.backward(x["dout"], cache)["v"] - dense.backward(x["dout"], run[0][1])["v"]
    spread = x["dout"][:, :, 4].reshape(1, 2, 2, 3).sum(axis=2)[:, :, None] / 11
    assert np.allclose(more, spread, rtol=0, atol=1e-14)


@pytest.mark.parametrize("empty_row", ["zero", "nan", "uniform", "raise"])
@pytest.mark.parametrize("module", [dense, decode])
def test_a_bias_of_minus_infinity_is_no_empty_row(module, empty_row):
    """The mask leaves keys, all of weight 0: zeros, as in the reference, under every empty_row."""
    x, options = draw((1, 2, 1, 3, 40, 5, 2), np.float64, bias=(0, 0, 0, 0), empty_row=empty_row)
    options["bias"][:, :, 1] = -np.inf
    out, _ = module.forward(x["q"], x["k"], x["v"], **options)
    assert not out[:, :, 1].any() and np.isfinite(out).all()


def test_one_query_head_meets_every_key_head():
    x, options = draw((2, 1, 3, 9, 11, 5, 3), np.float64, causal=True)
    dout = np.random.default_rng(1).standard_normal((2, 3, 9, 3))
    out, cache = dense.forward(x["q"], x["k"], x["v"], **options)
    wide = np.repeat(x["q"], 3, axis=1)
    want, same = dense.forward(wide, x["k"], x["v"], **options)
    assert np.array_equal(out, want)
    g, h = dense.backward(dout, cache), dense.backward(dout, same)
    assert np.allclose(g["q"], h["q"].sum(axis=1, keepdims=True), rtol=0, atol=1e-14)
    assert np.array_equal(g["k"], h["k"]) and np.array_equal(g["v"], h["v"])
    bare, _ = dense.forward(x["q"][0, 0], x["k"][0], x["v"][0], **options)
    assert np.array_equal(bare, out[0])


@pytest.mark.parametrize("sizes", [(1, 2, 1, 0, 5, 3, 2), (1, 2, 1, 5, 0, 3, 2),
                                   (0, 2, 1, 5, 4, 3, 2)])  # fmt: skip
def test_sizes_of_zero(sizes):
    x, options = draw(sizes, np.float64, causal=True)
    out, cache = dense.forward(x["q"], x["k"], x["v"], **options)
    assert out.shape == x["dout"].shape and not out.any()
    assert not any(g.any() for g in dense.backward(x["dout"], cache).values())


def test_causal_outputs_do_not_see_the_future():
    x, options = draw((1, 2, 1, 260, 260, 5, 3), np.float32, causal=True)
    before, _ = dense.forward(x["q"], x["k"], x["v"], **options)
    x["k"][:, :, 133:] += 3
    x["v"][:, :, 133:] -= 2
    after, _ = dense.forward(x["q"], x["k"], x["v"], **options)
    assert np.array_equal(before[:, :, :133], after[:, :, :133])
    assert not np.array_equal(before[:, :, 133:], after[:, :, 133:])


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_one_thread_and_two_give_the_same_bits(dtype):
    x, options = draw((2, 4, 2, 300, 310, 9, 7), dtype, causal=True, mask=True)
    results = []
    for number in (1, 2):
        with threads.use(number):
            out, cache = dense.forward(x["q"], x["k"], x["v"], **options)
            results.append([out, *dense.backward(x["dout"], cache).values()])
    for one, two in zip(*results, strict=True):
        assert np.array_equal(one, two)


def test_layouts_and_inputs_left_alone():
    x, options = draw((2, 4, 2, 33, 70, 5, 9), np.float64, mask=True, bias=(0, 0, 0, 0))
    clean, _ = dense.forward(x["q"], x["k"], x["v"], **options)
    q = np.asfortranarray(x["q"])
    k = np.repeat(x["k"], 2, axis=2)[:, :, ::2]
    v = x["v"][..., ::-1].copy()[..., ::-1]
    for y in (q, k, v, options["mask"], options["bias"]):
        y.flags.writeable = False
    copies = [y.copy() for y in (q, k, v)]
    out, cache = dense.forward(q, k, v, **options)
    dense.backward(np.asfortranarray(x["dout"]), cache)
    assert np.array_equal(out, clean)
    assert all(np.array_equal(a, b) for a, b in zip((q, k, v), copies, strict=True))
    swapped, _ = dense.forward(q.astype(">f8"), k, v, **options)
    assert np.array_equal(swapped, clean)


def test_large_scores_stay_finite():
    x, _ = draw((1, 1, 1, 5, 7, 3, 2), np.float32)
    out, cache = dense.forward(x["q"], x["k"], x["v"], scale=1e4)
    truth = formulas.dense(**x, scale=1.0)[0]
    assert np.isfinite(out).all() and out.shape == truth.shape
    assert all(np.isfinite(g).all() for g in dense.backward(x["dout"], cache).values())


def test_bad_arguments():
    x, _ = draw((1, 3, 1, 5, 7, 3, 2), np.float64)
    q, k, v = x["q"], x["k"], x["v"]
    for call, error in [
        (lambda: dense.forward(q, np.repeat(k, 2, axis=1), np.repeat(v, 2, axis=1)), ShapeError),
        (lambda: dense.forward(q, k[..., :2], v), ShapeError),
        (lambda: dense.forward(q, k, v, mask=np.ones((7, 5), bool)), ShapeError),
        (lambda: dense.forward(q, k, v, mask=np.ones((5, 7))), DTypeError),
        (lambda: dense.forward(q.astype(int), k, v), DTypeError),
        (lambda: dense.forward(q, k, v, softcap=-1.0), ParameterError),
        (lambda: dense.forward(q, k, v, align="right"), ParameterError),
        (lambda: dense.backward(q, dense.forward(q, k, v)[1]), ShapeError),
    ]:
        with pytest.raises(error):
            call()


CHECKED = """
import numpy as np
from attention_ref.kernels.numba import (
    block_sparse, decode, dense, row_projection, scan, segments, window,
)
rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((1, 2, n, d)) for n, d in ((5, 7), (131, 7), (131, 3)))
out, cache = dense.forward(q, k, v, causal=True, softcap=2.0, mask=np.ones((5, 131), bool),
                           bias=np.zeros((5, 131)))
dense.backward(out, cache)
decode.forward(q, k, v, causal=True, softcap=2.0, mask=np.ones((5, 131), bool),
               bias=np.zeros((5, 131)))
decode.forward(q, np.where(k > 2, np.nan, k), v)
out, cache = window.forward(k, k, v, left=20, right=3, dilation=2)
window.backward(out, cache)
out, cache = segments.forward(q, k, v, [2, 3], [100, 31], causal=True)
segments.backward(out, cache)
table = np.array([[True, False, True], [False, True, False], [True, True, True]])
out, cache = block_sparse.forward(k, k, v, table, 50)
block_sparse.backward(out, cache)
k, v = k[..., :20, :], v[..., :20, :]
b, gate = np.full((1, 2, 20), 0.5), np.full((1, 2, 20, 7), 0.9)
out, state, cache = scan.delta_forward(k, k, v, b, gate)
scan.delta_backward(out, state, cache)
p = row_projection.sparsemax_rows(k, k > -1)
row_projection.sparsemax_rows_backward(k, p)
p = row_projection.entmax_rows(k, 1.3, k > -1)
row_projection.entmax_rows_backward(k, p, 1.3)
k, v = np.repeat(k, 10, axis=-1), np.repeat(v, 25, axis=-1)
b, gate = b[..., :20], np.full((1, 2, 20), 0.9)
out, state, cache = scan.decay_forward(k, k, v, gate)
scan.decay_backward(out, state, cache)
print("within bounds")
"""


@pytest.mark.slow
def test_with_bounds_checks(tmp_path):
    root = Path(__file__).resolve().parents[2]
    environment = {
        **os.environ, "NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(root), "NUMBA_OPT": "1",
    }  # fmt: skip
    run = subprocess.run([sys.executable, "-c", CHECKED], env=environment, capture_output=True,
                         text=True, timeout=300, check=False)  # fmt: skip
    assert run.stdout.strip() == "within bounds", run.stderr[-2000:]
