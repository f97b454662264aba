"""The CUDA text of dense attention without a GPU: executed on the CPU.

float32, and float16 and bfloat16 under the ratio protocol: at most twice (gradients: three times)
the error of the plain formula whose every intermediate is stored in the same 16 bits.
"""

import ctypes

import numpy as np
import pytest

from attention_ref.core.errors import BackendUnavailable, DTypeError, ParameterError, ShapeError
from attention_ref.kernels import cuda, plan, softmax
from attention_ref.kernels.cuda import dense, window
from tests.kernels import formulas, halves, on_cpu

BOUND = 64
needs_compiler = pytest.mark.skipif(
    on_cpu.COMPILER is None, reason="no g++ to run CUDA text on the CPU"
)


def kernel(side):
    """The shipped kernel object with its launch on the CPU, in blocks of side * side threads."""

    def launch(name, blocks, arguments, storage, width, depth):
        only = () if side == 4 else ("-DONLY_FLOAT32",)
        sizes = (f"-DSIDE={side}", f"-DHEAD_D={width}", f"-DHEAD_E={depth}")
        on_cpu.call(on_cpu.library("dense", *sizes, *only), f"{storage}_{name}", blocks, arguments)

    return dense._Kernel(launch, 4 * side)


def draw(batch, heads, groups, queries, keys, width, depth, mask=False, bias=None):
    rng = np.random.default_rng(5)
    shapes = {
        "q": (batch, heads, queries, width), "k": (batch, groups, keys, width),
        "v": (batch, groups, keys, depth), "dout": (batch, heads, queries, depth),
    }  # fmt: skip
    x = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    options = {"mask": None, "bias": None}
    if mask:
        options["mask"] = rng.random((batch, 1, queries, keys)) < 0.6
        options["mask"][..., queries // 2, :] = False
    if bias is not None:
        options["bias"] = rng.standard_normal(bias).astype(np.float32)
    return x, options


def compare(run, x, options, causal=False, align="lower_right", scale=0.6, softcap=None,
            seen=None, truth_mask=None):  # fmt: skip
    """Forward and backward against the full matrix in float64: the largest distance, in eps."""
    arguments = (options["mask"], causal, align, scale, softcap, options["bias"], "zero")
    dlse = np.random.default_rng(1).standard_normal(x["dout"].shape[:-1]).astype(np.float32)
    out, cache = softmax.forward(run, x["q"], x["k"], x["v"], *arguments, seen)
    gradients = softmax.backward(run, x["dout"], cache, dlse)
    if seen is not None:
        both = truth_mask if options["mask"] is None else truth_mask & options["mask"]
        options, causal = options | {"mask": both}, False
    true_out, true_lse, true = formulas.dense(
        **x, **options, causal=causal, align=align, scale=scale, softcap=softcap, dlse=dlse
    )
    alive = np.isfinite(true_lse)
    assert np.array_equal(alive, np.isfinite(cache.lse))
    assert gradients.keys() == true.keys()
    pairs = [(out, true_out), (cache.lse[alive], true_lse[alive])]
    pairs += [(gradients[name], truth) for name, truth in true.items()]
    return max(formulas.distance(*pair, np.float32) for pair in pairs)


@needs_compiler
@pytest.mark.parametrize("lengths", [(1, 1), (5, 13), (33, 17), (13, 33)], ids=str)
@pytest.mark.parametrize("case", ["plain", "causal", "upper", "mask", "all"])
def test_values_and_gradients_on_the_cpu(case, lengths):
    queries, keys = lengths
    x, options = draw(
        2, 4, 2, queries, keys, 5, 9, case in ("mask", "all"),
        (4, queries, keys) if case == "all" else (queries, 1) if case == "mask" else None,
    )  # fmt: skip
    distance = compare(
        kernel(4), x, options, case in ("causal", "upper", "all"),
        "upper_left" if case == "upper" else "lower_right",
        softcap=1.3 if case == "all" else None,
    )  # fmt: skip
    assert distance < BOUND


@needs_compiler
def test_the_block_size_that_is_shipped():
    x, options = draw(1, 2, 1, 70, 67, 33, 13, True)
    assert compare(kernel(dense.SIDE), x, options, causal=True) < BOUND


def near(queries, keys, left=None, right=None, causal=False, align="lower_right"):
    """The mask of a window, one pair at a time."""
    mask = np.zeros((queries, keys), bool)
    for t in range(queries):
        place = t + (keys - queries if align == "lower_right" else 0)
        for s in range(keys):
            mask[t, s] = (
                (left is None or s >= place - left) and (right is None or s <= place + right)
                and (s <= place or not causal)
            )  # fmt: skip
    return mask


WINDOWS = {
    "both": {"left": 8, "right": 5},
    "causal": {"left": 19, "causal": True},
    "upper": {"left": 3, "right": 0, "align": "upper_left"},
    "one-sided": {"right": 5},
}


@needs_compiler
@pytest.mark.parametrize("lengths", [(37, 70), (70, 37)], ids=str)
@pytest.mark.parametrize("case", WINDOWS)
def test_windows_on_the_cpu(case, lengths):
    """70 queries over 37 keys: the first ones stand before all keys and see none."""
    given, inner = WINDOWS[case], case == "both"
    x, options = draw(2, 4, 2, *lengths, 5, 9, inner, (4, *lengths) if inner else None)
    order = ("left", "right", "dilation", "causal", "align")
    defaults = {"left": None, "right": None, "dilation": 1, "causal": False, "align": "lower_right"}
    seen = window.intervals(*lengths, *((defaults | given)[n] for n in order))
    distance = compare(kernel(4), x, options, seen=seen, truth_mask=near(*lengths, **given),
                       softcap=1.3 if inner else None)  # fmt: skip
    assert distance < BOUND


@needs_compiler
def test_packed_sequences_with_intervals_for_every_n():
    pairs = [((5, 1, 31), (9, 30, 2)), ((0, 30, 7), (7, 0, 34))]
    seen = [plan.packed(*pair, causal=True) for pair in pairs]
    seen = plan.Seen(*(np.concatenate([getattr(s, n) for s in seen]) for n in ("low", "high")),
                     None, 0)  # fmt: skip
    mask = np.zeros((2, 1, 37, 41), bool)
    for n, pair in enumerate(pairs):
        t = s = 0
        for a, b in zip(*pair, strict=True):
            mask[n, 0, t : t + a, s : s + b] = near(a, b, causal=True)
            t, s = t + a, s + b
    x, options = draw(2, 4, 2, 37, 41, 5, 9)
    assert compare(kernel(4), x, options, seen=seen, truth_mask=mask) < BOUND


@needs_compiler
def test_tiles_outside_of_a_window_are_not_read():
    """A key that no query sees may hold anything, and the work is that of the runs."""
    x, options = draw(1, 2, 1, 70, 70, 5, 9)
    seen = plan.interval(70, 70, causal=True, left=3)
    watched, asked = kernel(4), []
    run = watched.run
    watched.run = lambda name, blocks, arguments, *key: (
        asked.append([x for x in arguments if getattr(x, "dtype", None) == np.int32 and x.ndim]),
        run(name, blocks, arguments, *key),
    )
    assert compare(watched, x, options, seen=seen, truth_mask=near(70, 70, 3, 0)) < BOUND
    for _low, _high, first, last in asked:
        assert (last - first).max() <= 16 + 3  # of 70


def test_refuses_patterns_it_cannot_follow():
    rest = (None, False, "lower_right", None, None, None, "zero")
    seen = plan.restrict(plan.interval(2, 2), np.ones((1, 1), bool), 2, 2, 2)
    with pytest.raises(BackendUnavailable, match="tables of blocks"):
        softmax.forward(kernel(4), *np.zeros((3, 1, 2, 2), np.float32), *rest, seen)
    with pytest.raises(BackendUnavailable, match="dilation = 3"):
        window.intervals(4, 4, 1, 1, 3, False, "lower_right")
    with pytest.raises(ParameterError, match="left"):
        window.intervals(4, 4, -1, 1, 1, False, "lower_right")


@needs_compiler
def test_nothing_leaks_through_a_mask():
    x, options = draw(1, 2, 1, 9, 11, 5, 9, True)
    mask = options["mask"]
    mask[..., 4], mask[..., 6, 4] = False, True
    x["k"][0, 0, 4, 1] = np.nan
    rest = (mask, True, "lower_right", None, None, None, "zero")
    out, cache = softmax.forward(kernel(4), x["q"], x["k"], x["v"], *rest)
    assert np.isnan(out).all(axis=(0, 1, 3)).tolist() == [t == 6 for t in range(9)]
    gradients = softmax.backward(kernel(4), x["dout"], cache, None)
    assert all(np.isfinite(g).all() for g in gradients.values())


SMALL = ("-O1", "-DSHIM_MAIN", "-DDEPTH=4", "-DHEAD_D=5", "-DHEAD_E=7")
SIDES = {"thread": "-DSIDE=8", "address": "-DSIDE=4"}  # two threads a row of the softmax, or one


@needs_compiler
@pytest.mark.parametrize("sanitizer, storage", [("thread", "float16"), ("address", "float32")])
def test_no_race_and_no_step_outside(sanitizer, storage, tmp_path):
    more = ("-DONLY_FLOAT32",) if storage == "float32" else (f"-DSTORE={storage}",)
    program = on_cpu.build(tmp_path / "dense", "dense", *SMALL, *more, SIDES[sanitizer],
                           f"-fsanitize={sanitizer}")  # fmt: skip
    run = on_cpu.run(program)
    assert run.returncode == 0 and run.stdout == "finished 1\n", run.stderr[-2000:]


@needs_compiler
def test_a_missing_barrier_is_reported(tmp_path):
    program = on_cpu.build(tmp_path / "dense", "dense", *SMALL, "-DONLY_FLOAT32",
                           SIDES["address"], "-DSHIM_NO_SYNC", "-fsanitize=thread")  # fmt: skip
    run = on_cpu.run(program)
    assert run.returncode != 0 and "data race" in run.stderr


@needs_compiler
def test_a_block_too_many_is_reported(tmp_path):
    text = (on_cpu.SHIM / "dense.cpp").read_text().replace("(keys + TILE - 1) / TILE", "keys")
    program = on_cpu.build(tmp_path / "dense", "dense", *SMALL, "-DONLY_FLOAT32",
                           SIDES["address"], "-fsanitize=address", text=text)  # fmt: skip
    run = on_cpu.run(program)
    assert run.returncode != 0 and "heap-buffer-overflow" in run.stderr


def converted(storage, x):
    """Bits of the shim's rounding, and the numbers they stand for."""
    sizes = ("-DSIDE=4", "-DHEAD_D=5", "-DHEAD_E=9")
    bits, back = np.empty(x.size, np.uint16), np.empty(x.size, np.float32)
    cells = [ctypes.c_void_p(a.ctypes.data) for a in (x, bits, back)]
    getattr(on_cpu.library("dense", *sizes), f"convert_{storage}")(x.size, *cells)
    return bits, back


def spread():
    """float32 numbers of all sizes, ties of both formats, subnormal ones, NaN and infinity."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2**32, 20000, dtype=np.uint32).view(np.float32)
    near = np.ldexp(rng.integers(0, 2**13, 20000), rng.integers(-28, 6, 20000)).astype(np.float32)
    edges = np.array([0, -0.0, 65504, 65519.996, 65520, -65520, np.inf, -np.inf, np.nan, 2.0**-25,
                      3 * 2.0**-25, 2.0**-14, 3.3895314e38, 3.4e38], np.float32)  # fmt: skip
    return np.concatenate([x, near, -near, edges])


@needs_compiler
def test_float16_of_the_shim_is_that_of_numpy():
    x = spread()
    bits, back = converted("float16", x)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        want = x.astype(np.float16)
    number = ~np.isnan(x)
    assert np.array_equal(bits[number], want[number].view(np.uint16)) and np.isnan(back[-6])
    np.testing.assert_array_equal(back, want.astype(np.float32))


@needs_compiler
def test_bfloat16_rounds_to_eight_digits_and_ties_to_even():
    x = spread()
    bits, back = converted("bfloat16", x)
    finite = np.isfinite(x)
    exact = x[finite].astype(np.float64)
    unit = np.ldexp(1.0, np.maximum(np.frexp(exact)[1], -125) - 8)  # of the last binary digit
    want = np.rint(exact / unit) * unit
    want = np.where(np.abs(want) >= 2.0**128, np.copysign(np.inf, want), want)
    assert np.array_equal(back[finite], want)
    assert np.array_equal(np.isnan(back), np.isnan(x))
    assert np.array_equal(bits[finite] >> 15, np.signbit(x[finite]))


@needs_compiler
@pytest.mark.parametrize("case", ["plain", "causal", "all", "window"])
@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_half_storage_against_the_plain_formula(storage, case):
    kind = halves.dtype(storage)
    sizes, everything = (37, 70), case == "all"
    x, options = draw(2, 4, 2, *sizes, 5, 9, everything, (4, *sizes) if everything else None)
    x = {name: y.astype(kind) for name, y in x.items()}
    softcap = 1.3 if everything else None
    given = WINDOWS["both"] if case == "window" else {}
    seen = plan.interval(*sizes, **given) if given else None
    live = near(*sizes, causal=case in ("causal", "all"), **given)
    live = live if options["mask"] is None else live & options["mask"]
    out, cache = softmax.forward(kernel(4), x["q"], x["k"], x["v"], options["mask"],
                                 case in ("causal", "all"), "lower_right", 0.6, softcap,
                                 options["bias"], "zero", seen)  # fmt: skip
    gradients = softmax.backward(kernel(4), x["dout"], cache, None)
    assert out.dtype == kind and cache.lse.dtype == np.float32
    true_lse = formulas.dense(**x, mask=live, scale=0.6, softcap=softcap, bias=options["bias"])[1]
    alive = np.isfinite(true_lse)
    assert formulas.distance(cache.lse[alive], true_lse[alive], np.float32) < BOUND
    for name, dx in gradients.items():
        assert dx.dtype == (np.float32 if name == "bias" else kind)
    ratios = halves.ratios(out, gradients, x, live, 0.6, softcap, options["bias"])
    assert max(ratios.values()) <= 1, ratios


@needs_compiler
@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
@pytest.mark.parametrize("empty_row", ["zero", "nan", "uniform"])
def test_half_storage_with_empty_rows_and_poison(empty_row, storage, monkeypatch):
    """Also that no ``where`` meets 16 bits, for which CuPy has none."""
    kind, where = halves.dtype(storage), np.where

    def where_of_cupy(condition, x, y):
        assert all(np.asarray(a).dtype.name not in ("float16", "bfloat16") for a in (x, y))
        return where(condition, x, y)

    monkeypatch.setattr(np, "where", where_of_cupy)
    x, options = draw(1, 2, 1, 9, 11, 5, 9, True)
    options["mask"][..., 4], options["mask"][..., 6, 4] = False, True
    x = {name: y.astype(kind) for name, y in x.items()}
    x["k"][0, 0, 4, 1] = np.inf
    rest = (options["mask"], False, "lower_right", None, None, None, empty_row)
    out, cache = softmax.forward(kernel(4), x["q"], x["k"], x["v"], *rest)
    gone = [t == 6 or (t == 4 and empty_row != "zero") for t in range(9)]
    assert np.isnan(out).all(axis=(0, 1, 3)).tolist() == gone
    gradients = softmax.backward(kernel(4), x["dout"], cache, None)
    assert all(np.isfinite(g).all() and g.dtype == kind for g in gradients.values())


def test_refuses_storages_it_cannot_take():
    rest = (None, False, "lower_right", None, None)
    q, k, v = np.zeros((3, 1, 2, 2), np.float16)
    with pytest.raises(DTypeError, match="float16, float32, float16, expected one"):
        softmax.forward(kernel(4), q, k.astype(np.float32), v, *rest, None, "zero")
    with pytest.raises(DTypeError, match="bias has dtype float64"):
        softmax.forward(kernel(4), q, k, v, *rest, np.zeros((2, 2)), "zero")
    with pytest.raises(DTypeError, match=r"view\(ml_dtypes.bfloat16\)"):
        softmax.forward(kernel(4), *np.zeros((3, 1, 2, 2), np.uint16), *rest, None, "zero")


def test_without_a_gpu_the_reason_and_the_pip_line_are_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cupy", None)
    with pytest.raises(BackendUnavailable, match="pip install"):
        dense.forward(*np.zeros((3, 1, 2, 2), np.float32))


def test_a_driver_without_a_gpu_is_not_enough(monkeypatch):
    from types import SimpleNamespace

    fake = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False))
    monkeypatch.setitem(__import__("sys").modules, "cupy", fake)
    with pytest.raises(BackendUnavailable, match="no GPU"):
        cuda.require()


def test_refuses_what_it_cannot_take():
    rest = (None, False, "lower_right", None, None, None, "zero")
    with pytest.raises(DTypeError, match="float32"):
        softmax.forward(kernel(4), *np.zeros((3, 1, 2, 2)), *rest)
    with pytest.raises(ShapeError, match="at most 256"):
        softmax.forward(kernel(4), *np.zeros((3, 1, 2, 300), np.float32), *rest)
    with pytest.raises(ShapeError, match="E = 0, expected at least 1"):
        q, k, v = np.zeros((3, 1, 2, 3), np.float32)
        softmax.forward(kernel(4), q, k, v[..., :0], *rest)
