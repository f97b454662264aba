"""The decode kernels without a GPU: executed on the CPU, float32 and 16 bits.

Truth is the full matrix in float64; the backward is that of the dense kernels.
"""

import numpy as np
import pytest

from attention_ref.core.errors import BackendUnavailable, ParameterError
from attention_ref.kernels import softmax
from attention_ref.kernels.cuda import decode, window
from tests.kernels import formulas, halves, on_cpu
from tests.kernels.test_cuda_dense import draw, needs_compiler
from tests.kernels.test_cuda_dense import kernel as dense_kernel

BOUND = 64
CUT = ("-DDEPTH=4", "-DTHREADS=16", "-DKEYS=8", "-DROWS=4")


def kernel(shipped=False):
    """The shipped kernel object with its launch on the CPU, in small blocks or in its own."""

    def launch(name, blocks, arguments, storage, width, depth, rows):
        sizes = (f"-DHEAD_D={width}", f"-DHEAD_E={depth}")
        cut = (*decode.options("float32", width, depth, rows)[2:], "-DONLY_FLOAT32")
        shared = on_cpu.library("decode", *sizes, *(cut if shipped else CUT))
        on_cpu.call(shared, f"{storage}_{name}", blocks, arguments)

    return decode._Kernel(launch) if shipped else decode._Kernel(launch, (4,), 8, 12)


def forward(x, options, causal=False, align="lower_right", softcap=None, empty_row="zero",
            shipped=False):  # fmt: skip
    return softmax.forward(kernel(shipped), x["q"], x["k"], x["v"], options["mask"], causal, align,
                           0.6, softcap, options["bias"], empty_row)  # fmt: skip


SIZES = [(2, 4, 2, 1, 70), (1, 6, 1, 3, 131), (2, 3, 3, 2, 7), (1, 1, 1, 1, 1)]
CASES = {
    "plain": {},
    "causal": {"causal": True},
    "upper": {"causal": True, "align": "upper_left"},
    "softcap": {"softcap": 1.3},
}


def check(sizes, more, mask=False, biased=False, shipped=False):
    heads, queries, keys = sizes[1], *sizes[3:]
    x, options = draw(*sizes, 5, 9, mask, (heads, queries, keys) if biased else None)
    dlse = np.random.default_rng(1).standard_normal(x["dout"].shape[:-1]).astype(np.float32)
    out, cache = forward(x, options, **more, shipped=shipped)
    gradients = softmax.backward(dense_kernel(4), x["dout"], cache, dlse)
    true_out, true_lse, true = formulas.dense(**x, **options, **more, scale=0.6, dlse=dlse)
    alive = np.isfinite(true_lse)
    assert np.array_equal(alive, np.isfinite(cache.lse))
    assert formulas.distance(out, true_out, np.float32) < BOUND
    assert formulas.distance(cache.lse[alive], true_lse[alive], np.float32) < BOUND
    for name, truth in true.items():
        assert formulas.distance(gradients[name], truth, np.float32) < BOUND, name


@needs_compiler
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, sizes):
    check(sizes, CASES[case])


@needs_compiler
@pytest.mark.parametrize("sizes", SIZES[:3], ids=lambda s: "x".join(map(str, s)))
def test_mask_bias_and_all_together(sizes):
    check(sizes, {"causal": True, "softcap": 2.1}, mask=True, biased=True)


@needs_compiler
def test_the_block_size_that_is_shipped():
    check((1, 12, 1, 1, 300), {"causal": True}, mask=False, biased=True, shipped=True)


@needs_compiler
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["k", "v"])
def test_nothing_leaks_through_a_mask(bad, name):
    x, options = draw(1, 4, 1, 2, 61, 5, 9)
    options["mask"] = np.ones((2, 61), bool)
    options["mask"][0, [5, 50]] = False
    clean, _ = forward(x, options)
    x[name][0, 0, [5, 50], 1] = bad
    out, cache = forward(x, options)
    assert np.array_equal(out[:, :, 0], clean[:, :, 0])
    assert np.isnan(out[:, :, 1]).all() and np.isnan(cache.lse[:, :, 1]).all()
    gradients = softmax.backward(dense_kernel(4), x["dout"], cache, None)
    assert all(np.isfinite(g).all() for g in gradients.values())
    assert gradients["q"][:, :, 0].any() and not gradients["q"][:, :, 1].any()


@needs_compiler
@pytest.mark.parametrize("place", ["q", "bias"])
def test_a_non_finite_query_or_bias_poisons_its_row_alone(place):
    x, options = draw(1, 4, 2, 2, 41, 5, 9, bias=(4, 2, 41))
    clean, _ = forward(x, options)
    target = x["q"][0] if place == "q" else options["bias"]
    target[2, 1, 0] = np.inf
    out, _ = forward(x, options)
    bad = np.isnan(out).all(axis=-1)
    assert np.argwhere(bad).tolist() == [[0, 2, 1]]
    assert np.array_equal(out[~bad], clean[~bad])


@needs_compiler
def test_rows_without_a_key():
    x, options = draw(1, 4, 2, 3, 41, 5, 9)
    options["mask"] = np.ones((3, 41), bool)
    options["mask"][1] = False
    mean = np.repeat(x["v"].astype(np.float64).mean(axis=2), 2, axis=1)
    for empty_row, want in (("zero", np.zeros_like(mean)), ("uniform", mean)):
        out, _ = forward(x, options, empty_row=empty_row)
        assert formulas.distance(out[:, :, 1], want, np.float32) < BOUND
    assert np.isnan(forward(x, options, empty_row="nan")[0][:, :, 1]).all()
    with pytest.raises(ParameterError, match="without a key"):
        forward(x, options, empty_row="raise")


@needs_compiler
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_half_storage_against_the_plain_formula(storage, everything):
    """Error at most twice that of the formula whose every intermediate is stored in 16 bits."""
    kind = halves.dtype(storage)
    x, options = draw(2, 4, 2, 2, 131, 5, 9, everything, (4, 2, 131) if everything else None)
    x = {name: y.astype(kind) for name, y in x.items()}
    more = {"softcap": 1.3} if everything else {}
    out, cache = forward(x, options, **more)
    assert out.dtype == kind
    true_lse = formulas.dense(**x, **options, **more, scale=0.6)[1]
    alive = np.isfinite(true_lse)
    assert formulas.distance(cache.lse[alive], true_lse[alive], np.float32) < BOUND
    live = np.True_ if options["mask"] is None else options["mask"]
    ratios = halves.ratios(out, {}, x, live, 0.6, more.get("softcap"), options["bias"])
    assert ratios["out"] <= 1, ratios


SMALL = ("-O1", "-DSHIM_MAIN", "-DONLY_FLOAT32", "-DHEAD_D=5", "-DHEAD_E=7", *CUT)


@needs_compiler
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_no_race_and_no_step_outside(sanitizer, tmp_path):
    run = on_cpu.run(
        on_cpu.build(tmp_path / "decode", "decode", *SMALL, f"-fsanitize={sanitizer}")
    )
    assert run.returncode == 0 and run.stdout == "finished 1\n", run.stderr[-2000:]


def test_portions_fill_the_gpu_and_are_whole_tiles():
    shipped = decode._Kernel()
    for items, keys in ((1, 32768), (64, 1000), (4096, 77), (8, 0), (1, 1)):
        portions, length = shipped.portions(items, keys)
        assert length % decode.KEYS == 0 and portions * length >= keys > (portions - 1) * length
        assert items * portions <= 2 * decode.BLOCKS or portions == 1
    assert shipped.portions(1, 32768)[0] == 256


def test_which_shapes_are_work_for_it():
    q, k = np.zeros((2, 32, 1, 4)), np.zeros((2, 4, 100, 4))
    assert decode.fits(q, k) and decode.best(q, k) is decode.forward
    assert not decode.fits(np.zeros((32, 9, 4)), k) and not decode.fits(q, k[:, :, :3])


@pytest.mark.parametrize("module", [decode, window])
def test_without_a_gpu_the_reason_and_the_pip_line_are_named(module, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cupy", None)
    with pytest.raises(BackendUnavailable, match="pip install"):
        module.forward(*np.zeros((3, 1, 2, 2), np.float32))
