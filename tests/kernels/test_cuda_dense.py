"""The CUDA text of dense attention without a GPU: compiled by NVRTC, executed on the CPU.

``shim/`` turns every CUDA thread into a thread of the CPU. The wrapper around the launches is the
shipped one too; only the launch itself is replaced.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from attention_ref.core.errors import BackendUnavailable, DTypeError, ParameterError, ShapeError
from attention_ref.kernels import cuda, plan, softmax
from attention_ref.kernels.cuda import dense, window
from tests.kernels import formulas

SHIM = Path(__file__).parent / "shim"
BOUND = 64
COMPILER = shutil.which("g++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no g++ to run CUDA text on the CPU")


def build(target, side, width, depth, *options):
    """Compile the CUDA text with the host compiler."""
    command = [
        COMPILER, "-std=c++20", "-pthread", "-g", f"-DSIDE={side}", f"-DHEAD_D={width}",
        f"-DHEAD_E={depth}", f"-I{SHIM}", f"-I{cuda.FOLDER}", *options, str(SHIM / "dense.cpp"),
        "-o", str(target),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    return target


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    """The kernels with their launch on the CPU: (side) -> object for kernels.softmax."""
    folder, loaded = tmp_path_factory.mktemp("shim"), {}

    def make(side):
        def launch(name, blocks, arguments, width, depth):
            key = (side, width, depth)
            if key not in loaded:
                file = folder / f"dense_{side}_{width}_{depth}.so"
                build(file, *key, "-O1", "-shared", "-fPIC")
                loaded[key] = ctypes.CDLL(str(file))
            cells = [pointer(x) for x in arguments]
            table = (ctypes.c_void_p * len(cells))(*(ctypes.addressof(c) for c in cells))
            getattr(loaded[key], f"launch_{name}")(blocks, table)

        return dense._Kernel(launch, 4 * side)

    return make


def pointer(x):
    """A cell that holds one argument, as cuLaunchKernel wants it."""
    if isinstance(x, np.ndarray):
        assert x.flags.c_contiguous
        return ctypes.c_void_p(x.ctypes.data)
    kinds = {"int32": ctypes.c_int32, "int64": ctypes.c_int64, "float32": ctypes.c_float}
    return kinds[x.dtype.name](x.item())


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


def compare(kernel, x, options, causal=False, align="lower_right", scale=0.6, softcap=None,
            seen=None, truth_mask=None):  # fmt: skip
    """Forward and backward against the full matrix in float64: the largest distance, in eps."""
    arguments = (options["mask"], causal, align, scale, softcap, options["bias"], "zero")
    dlse = np.random.default_rng(1).standard_normal(x["dout"].shape[:-1]).astype(np.float32)
    out, cache = softmax.forward(kernel, x["q"], x["k"], x["v"], *arguments, seen)
    gradients = softmax.backward(kernel, x["dout"], cache, dlse)
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
def test_values_and_gradients_on_the_cpu(case, lengths, on_cpu):
    queries, keys = lengths
    x, options = draw(
        2, 4, 2, queries, keys, 5, 9, case in ("mask", "all"),
        (4, queries, keys) if case == "all" else (queries, 1) if case == "mask" else None,
    )  # fmt: skip
    distance = compare(
        on_cpu(4), x, options, case in ("causal", "upper", "all"),
        "upper_left" if case == "upper" else "lower_right",
        softcap=1.3 if case == "all" else None,
    )  # fmt: skip
    assert distance < BOUND


@needs_compiler
def test_the_block_size_that_is_shipped(on_cpu):
    x, options = draw(1, 2, 1, 70, 67, 33, 13, True)
    assert compare(on_cpu(dense.SIDE), x, options, causal=True) < BOUND


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
def test_windows_on_the_cpu(case, lengths, on_cpu):
    """70 queries over 37 keys: the first ones stand before all keys and see none."""
    given, inner = WINDOWS[case], case == "both"
    x, options = draw(2, 4, 2, *lengths, 5, 9, inner, (4, *lengths) if inner else None)
    order = ("left", "right", "dilation", "causal", "align")
    defaults = {"left": None, "right": None, "dilation": 1, "causal": False, "align": "lower_right"}
    seen = window.intervals(*lengths, *((defaults | given)[n] for n in order))
    distance = compare(on_cpu(4), x, options, seen=seen, truth_mask=near(*lengths, **given),
                       softcap=1.3 if inner else None)  # fmt: skip
    assert distance < BOUND


@needs_compiler
def test_packed_sequences_with_intervals_for_every_n(on_cpu):
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
    assert compare(on_cpu(4), x, options, seen=seen, truth_mask=mask) < BOUND


@needs_compiler
def test_tiles_outside_of_a_window_are_not_read(on_cpu):
    """A key that no query sees may hold anything, and the work is that of the runs."""
    x, options = draw(1, 2, 1, 70, 70, 5, 9)
    seen = plan.interval(70, 70, causal=True, left=3)
    kernel, asked = on_cpu(4), []
    run = kernel.run
    kernel.run = lambda name, blocks, arguments, *widths: (
        asked.append([x for x in arguments if getattr(x, "dtype", None) == np.int32 and x.ndim]),
        run(name, blocks, arguments, *widths),
    )
    assert compare(kernel, x, options, seen=seen, truth_mask=near(70, 70, 3, 0)) < BOUND
    for _low, _high, first, last in asked:
        assert (last - first).max() <= 16 + 3  # of 70


def test_refuses_patterns_it_cannot_follow(on_cpu):
    rest = (None, False, "lower_right", None, None, None, "zero")
    seen = plan.restrict(plan.interval(2, 2), np.ones((1, 1), bool), 2, 2, 2)
    with pytest.raises(BackendUnavailable, match="tables of blocks"):
        softmax.forward(on_cpu(4), *np.zeros((3, 1, 2, 2), np.float32), *rest, seen)
    with pytest.raises(BackendUnavailable, match="dilation = 3"):
        window.intervals(4, 4, 1, 1, 3, False, "lower_right")
    with pytest.raises(ParameterError, match="left"):
        window.intervals(4, 4, -1, 1, 1, False, "lower_right")


@needs_compiler
def test_nothing_leaks_through_a_mask(on_cpu):
    x, options = draw(1, 2, 1, 9, 11, 5, 9, True)
    mask = options["mask"]
    mask[..., 4], mask[..., 6, 4] = False, True
    x["k"][0, 0, 4, 1] = np.nan
    rest = (mask, True, "lower_right", None, None, None, "zero")
    out, cache = softmax.forward(on_cpu(4), x["q"], x["k"], x["v"], *rest)
    assert np.isnan(out).all(axis=(0, 1, 3)).tolist() == [t == 6 for t in range(9)]
    gradients = softmax.backward(on_cpu(4), x["dout"], cache, None)
    assert all(np.isfinite(g).all() for g in gradients.values())


@needs_compiler
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_no_race_and_no_step_outside(sanitizer, tmp_path):
    program = build(tmp_path / "dense", 4, 5, 7, "-O1", "-DSHIM_MAIN", f"-fsanitize={sanitizer}")
    run = subprocess.run([program], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0 and run.stdout == "finished 1\n", run.stderr[-2000:]


@needs_compiler
def test_a_missing_barrier_is_reported(tmp_path):
    program = build(
        tmp_path / "dense", 4, 5, 7, "-O1", "-DSHIM_MAIN", "-DSHIM_NO_SYNC", "-fsanitize=thread"
    )
    run = subprocess.run([program], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode != 0 and "data race" in run.stderr


@needs_compiler
def test_a_block_too_many_is_reported(tmp_path):
    text = (SHIM / "dense.cpp").read_text().replace("(keys + TILE - 1) / TILE", "keys")
    (tmp_path / "twin.cpp").write_text(text)
    command = [
        COMPILER, "-std=c++20", "-pthread", "-O1", "-fsanitize=address", "-DSIDE=4", "-DHEAD_D=5",
        "-DHEAD_E=7", "-DSHIM_MAIN", f"-I{SHIM}", f"-I{cuda.FOLDER}", str(tmp_path / "twin.cpp"),
        "-o", str(tmp_path / "twin"),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    run = subprocess.run([tmp_path / "twin"], capture_output=True, text=True, timeout=120,
                         check=False)  # fmt: skip
    assert run.returncode != 0 and "heap-buffer-overflow" in run.stderr


def nvrtc():
    """The compiler's library: from CuPy's wheel or from nvidia-cuda-nvrtc-cu12; None without."""
    import importlib.util

    names = ["libnvrtc.so.12", "libnvrtc.so.13", "libnvrtc.so"]
    found = importlib.util.find_spec("nvidia")
    for folder in (found.submodule_search_locations or []) if found else []:
        names = [*map(str, Path(folder).glob("*/lib/libnvrtc.so*")), *names]
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def compile_cubin(library, architecture, width, depth):
    """(status, log, size of the machine code)."""
    program = ctypes.c_void_p()
    text = cuda.source("dense").encode()
    assert library.nvrtcCreateProgram(ctypes.byref(program), text, b"dense.cu", 0, None, None) == 0
    options = [
        f"--gpu-architecture={architecture}", "--std=c++17", f"-DHEAD_D={width}",
        f"-DHEAD_E={depth}", f"-DSIDE={dense.SIDE}",
    ]  # fmt: skip
    table = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
    status = library.nvrtcCompileProgram(program, len(options), table)
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    code = ctypes.c_size_t()
    if status == 0:
        library.nvrtcGetCUBINSize(program, ctypes.byref(code))
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return status, log.value.decode(), code.value


@pytest.mark.parametrize("widths", [(64, 64), (128, 128), (5, 9), (256, 256)], ids=str)
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_compiles_for_the_gpu(architecture, widths):
    library = nvrtc()
    if library is None:
        pytest.skip("NVRTC is not installed: pip install nvidia-cuda-nvrtc-cu12")
    major, minor = ctypes.c_int(), ctypes.c_int()
    library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    if architecture == "sm_100" and (major.value, minor.value) < (12, 8):
        pytest.skip("this NVRTC does not know sm_100")
    status, log, code = compile_cubin(library, architecture, *widths)
    assert status == 0 and "error" not in log, log
    assert code > 1000


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


def test_refuses_what_it_cannot_take(on_cpu):
    kernel = on_cpu(4)
    rest = (None, False, "lower_right", None, None, None, "zero")
    with pytest.raises(DTypeError, match="float32"):
        softmax.forward(kernel, *np.zeros((3, 1, 2, 2)), *rest)
    with pytest.raises(ShapeError, match="at most 256"):
        softmax.forward(kernel, *np.zeros((3, 1, 2, 300), np.float32), *rest)
