"""Parity on a real GPU: the CUDA kernels, and plain methods on CuPy arrays.

``make gpu`` runs it; without a GPU every test is skipped with the reason.
"""

import numpy as np
import pytest

import attention_ref
from attention_ref.core.errors import BackendUnavailable, DTypeError
from attention_ref.kernels import cuda
from tests.kernels import formulas, halves

pytestmark = pytest.mark.gpu
BOUND = 64


@pytest.fixture(scope="module")
def cupy():
    try:
        return cuda.require()
    except BackendUnavailable as error:
        print(error)
        pytest.skip("no GPU, or no CuPy to reach it")


def draw(batch, heads, groups, queries, keys, width, depth):
    rng = np.random.default_rng(5)
    shapes = {
        "q": (batch, heads, queries, width), "k": (batch, groups, keys, width),
        "v": (batch, groups, keys, depth), "dout": (batch, heads, queries, depth),
    }  # fmt: skip
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


@pytest.mark.parametrize("case", ["plain", "causal", "upper", "all"])
@pytest.mark.parametrize(
    "sizes",
    [(2, 4, 2, 33, 70, 5, 9), (1, 2, 1, 300, 257, 64, 64), (1, 8, 2, 129, 640, 128, 128),
     (1, 1, 1, 1, 1, 1, 1)],
    ids=str,
)  # fmt: skip
def test_dense(case, sizes, cupy):
    from attention_ref.kernels.cuda import dense

    x = draw(*sizes)
    batch, heads, _, queries, keys = sizes[:5]
    options = {"scale": 0.3, "causal": case != "plain"}
    if case == "upper":
        options["align"] = "upper_left"
    if case == "all":
        rng = np.random.default_rng(0)
        options["softcap"] = 1.3
        options["mask"] = rng.random((batch, 1, queries, keys)) < 0.6
        options["bias"] = rng.standard_normal((heads, queries, keys)).astype(np.float32)
    there = {n: cupy.asarray(y) for n, y in x.items()}
    moved = {n: cupy.asarray(y) if isinstance(y, np.ndarray) else y for n, y in options.items()}
    out, cache = dense.forward(there["q"], there["k"], there["v"], **moved)
    gradients = dense.backward(there["dout"], cache)
    true_out, true_lse, true = formulas.dense(**x, **options)
    alive = np.isfinite(true_lse)
    assert formulas.distance(cupy.asnumpy(out), true_out, np.float32) < BOUND
    lse = cupy.asnumpy(cache.lse)
    assert formulas.distance(lse[alive], true_lse[alive], np.float32) < BOUND
    assert gradients.keys() == true.keys()
    for name, truth in true.items():
        assert formulas.distance(cupy.asnumpy(gradients[name]), truth, np.float32) < BOUND, name


def band(queries, keys, left, right):
    """The mask of a window, aligned at the lower right."""
    step = np.arange(keys) - (np.arange(queries)[:, None] + keys - queries)
    return (step >= -left) & (step <= right)


@pytest.mark.parametrize("sizes", [(2, 4, 2, 300, 257, 64, 64), (1, 2, 1, 65, 333, 5, 9)], ids=str)
def test_window(sizes, cupy):
    from attention_ref.kernels.cuda import window

    x = draw(*sizes)
    there = {n: cupy.asarray(y) for n, y in x.items()}
    out, cache = window.forward(there["q"], there["k"], there["v"], left=70, right=9, scale=0.3)
    gradients = window.backward(there["dout"], cache)
    true_out, _, true = formulas.dense(**x, scale=0.3, mask=band(*sizes[3:5], 70, 9))
    assert formulas.distance(cupy.asnumpy(out), true_out, np.float32) < BOUND
    for name, truth in true.items():
        assert formulas.distance(cupy.asnumpy(gradients[name]), truth, np.float32) < BOUND, name


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_dense_in_16_bits(storage, causal, cupy):
    """Twice (gradients: three times) the error of the plain formula stored in the same 16 bits."""
    from attention_ref.kernels.cuda import dense

    kind = halves.dtype(storage)
    x = {n: y.astype(kind) for n, y in draw(1, 4, 2, 130, 190, 64, 64).items()}
    there = {n: cupy.asarray(y) for n, y in x.items()}
    out, cache = dense.forward(there["q"], there["k"], there["v"], causal=causal, scale=0.2)
    gradients = dense.backward(there["dout"], cache)
    live = np.tri(130, 190, 60, dtype=bool) if causal else np.True_
    assert out.dtype == kind and cache.lse.dtype == np.float32
    gradients = {n: cupy.asnumpy(dx) for n, dx in gradients.items()}
    ratios = halves.ratios(cupy.asnumpy(out), gradients, x, live, 0.2)
    assert max(ratios.values()) <= 1, ratios


@pytest.mark.parametrize(
    "sizes", [(2, 32, 4, 1, 4097, 128, 128), (1, 6, 1, 3, 700, 5, 9), (1, 1, 1, 1, 1, 1, 1)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("causal", [False, True])
def test_decode(sizes, causal, cupy):
    from attention_ref.kernels.cuda import decode

    x = draw(*sizes)
    there = {n: cupy.asarray(y) for n, y in x.items()}
    out, cache = decode.forward(there["q"], there["k"], there["v"], causal=causal, scale=0.2)
    gradients = decode.backward(there["dout"], cache)
    truth, true_lse, true = formulas.dense(**x, causal=causal, scale=0.2)
    assert formulas.distance(cupy.asnumpy(out), truth, np.float32) < BOUND
    assert formulas.distance(cupy.asnumpy(cache.lse), true_lse, np.float32) < BOUND
    for name, want in true.items():
        assert formulas.distance(cupy.asnumpy(gradients[name]), want, np.float32) < BOUND, name


@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_decode_in_16_bits(storage, cupy):
    from attention_ref.kernels.cuda import decode

    kind = halves.dtype(storage)
    x = {n: y.astype(kind) for n, y in draw(1, 8, 2, 2, 1500, 64, 64).items()}
    q, k, v = (cupy.asarray(x[n]) for n in "qkv")
    out, _ = decode.forward(q, k, v, scale=0.2)
    assert out.dtype == kind
    ratios = halves.ratios(cupy.asnumpy(out), {}, x, np.True_, 0.2)
    assert ratios["out"] <= 1, ratios


def test_decode_lets_nothing_leak_through_a_mask(cupy):
    from attention_ref.kernels.cuda import decode

    x = draw(1, 4, 1, 2, 300, 64, 64)
    x["v"][0, 0, 7, 3] = np.inf
    mask = np.ones((2, 300), bool)
    mask[0, 7] = False
    out, _ = decode.forward(*(cupy.asarray(x[n]) for n in "qkv"), mask=cupy.asarray(mask))
    out = cupy.asnumpy(out)
    assert np.isfinite(out[:, :, 0]).all() and np.isnan(out[:, :, 1]).all()


def test_dense_gives_the_same_bits_twice(cupy):
    from attention_ref.kernels.cuda import dense

    x = {n: cupy.asarray(y) for n, y in draw(2, 4, 2, 333, 321, 64, 64).items()}
    runs = []
    for _ in range(2):
        out, cache = dense.forward(x["q"], x["k"], x["v"], causal=True)
        runs.append([out, *dense.backward(x["dout"], cache).values()])
    assert all(cupy.array_equal(a, b) for a, b in zip(*runs, strict=True))


def test_numpy_arrays_are_refused(cupy):
    from attention_ref.kernels.cuda import dense

    with pytest.raises(DTypeError, match="CuPy array"):
        dense.forward(*np.zeros((3, 1, 2, 2), np.float32))
    assert cupy.cuda.is_available()


def arrays_to(module, value):
    """Move the arrays of an example; everything else stays."""
    return module.asarray(value) if isinstance(value, np.ndarray) else value


def outputs(out):
    return list(out) if isinstance(out, tuple) else [out]


@pytest.mark.parametrize("key", attention_ref.keys())
def test_methods_on_cupy_arrays(key, cupy):
    spec = attention_ref.get(key)
    if not hasattr(spec, "forward"):
        pytest.skip("no forward to run on a GPU")
    for case, arguments in spec.example(np.random.default_rng(0)).items():
        there = {n: arrays_to(cupy, v) for n, v in arguments.items()}
        here, moved = spec.forward(**arguments)[0], spec.forward(**there)[0]
        for a, b in zip(outputs(here), outputs(moved), strict=True):
            assert np.allclose(a, cupy.asnumpy(b), rtol=1e-10, atol=1e-10, equal_nan=True), case
