"""The benchmark of ``make gpu``: our CUDA kernels beside what users would pick instead.

**It has not run yet**: no GPU was at hand when it was written, and no number of it stands anywhere.

Ours and the others take turns in one run on the same arrays; a number is the median of seven turns,
each waited for. Every row carries both errors against float64 on a few queries. PyTorch's fused
attention, FlexAttention and the Triton kernels of flash-linear-attention are compared with where
they can be imported. For the last one ours is the chunked form of the reference on CuPy arrays:
there is no CUDA kernel of a scan yet.

``pytest tests/gpu/test_benchmark.py`` prints one line of JSON a row.
"""

import importlib
import json
import statistics
import time

import numpy as np
import pytest

import attention_ref
from attention_ref.core.errors import BackendUnavailable
from attention_ref.kernels import cuda
from tests.kernels import formulas, halves

pytestmark = pytest.mark.gpu
TURNS, SHOWN = 7, 64  # SHOWN queries at the end are compared with float64
BOUND = 1e-2  # of the largest number: no parity test, only that the right thing was timed


@pytest.fixture(scope="module")
def cupy():
    try:
        return cuda.require()
    except BackendUnavailable as error:
        print(error)
        pytest.skip("no GPU, or no CuPy to reach it")


def optional(name):
    """A module, or None where it is missing or broken."""
    try:
        return importlib.import_module(name)
    except Exception:
        return None


def on_gpu(*arrays):
    """PyTorch's views of CuPy arrays, or None without a PyTorch that reaches the GPU."""
    torch = optional("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return [torch.from_dlpack(x) for x in arrays]


def seconds(cupy, call):
    """One call, everything on the device waited for before and after it."""
    cupy.cuda.runtime.deviceSynchronize()
    start = time.perf_counter()
    call()
    cupy.cuda.runtime.deviceSynchronize()
    return time.perf_counter() - start


def compare(cupy, capsys, name, ours, others, truth):
    """Print a row for each of the others; our error, relative to the largest truth."""
    calls = {"ours": ours, **others}
    errors = {}
    for who, call in calls.items():  # also the first call, which compiles
        shown = cupy.asnumpy(cupy.from_dlpack(call()))[..., -truth.shape[-2] :, :]
        errors[who] = halves.error(shown, truth) / np.max(np.abs(truth))
    times = {who: [] for who in calls}
    for _ in range(TURNS):
        for who, call in calls.items():
            times[who].append(seconds(cupy, call))
    times = {who: statistics.median(t) for who, t in times.items()}
    with capsys.disabled():
        for who in others or ("ours",):
            print(json.dumps({
                "pattern": name, "ours_s": times["ours"], "other": who, "other_s": times[who],
                "ratio": times[who] / times["ours"], "error_vs_float64": errors["ours"],
                "other_error": errors[who],
            }))  # fmt: skip
    return errors["ours"]


def draw(cupy, heads, groups, queries, keys, width, storage):
    """q, k, v, dout on the GPU, and as float64."""
    rng = np.random.default_rng(0)
    shapes = [(1, heads, queries, width), (1, groups, keys, width), (1, groups, keys, width),
              (1, heads, queries, width)]  # fmt: skip
    x = [rng.standard_normal(s).astype(storage) for s in shapes]
    return [cupy.asarray(a) for a in x], x


def truth_of(x, mask=None):
    """Output of the last queries in float64."""
    q, k, v, dout = x
    q, dout = q[..., -SHOWN:, :], dout[..., -SHOWN:, :]
    return formulas.dense(q, k, v, dout, mask=mask, scale=q.shape[-1] ** -0.5)[0]


def last_rows(keys, near=None):
    """The causal mask of the last queries, within a window."""
    place = np.arange(keys - min(SHOWN, keys), keys)[:, None]
    step = place - np.arange(keys)
    return (step >= 0) & (step < (near or keys))


@pytest.mark.parametrize("storage", ["float32", "float16"])
@pytest.mark.parametrize("backward", [False, True])
def test_dense(storage, backward, cupy, capsys):
    """Causal attention against ``scaled_dot_product_attention``."""
    from attention_ref.kernels.cuda import dense

    (q, k, v, dout), x = draw(cupy, 16, 16, 4096, 4096, 64, storage)
    tensors, others = on_gpu(q, k, v, dout), {}

    def ours():
        out, cache = dense.forward(q, k, v, causal=True)
        if backward:
            dense.backward(dout, cache)
        return out

    def sdpa():
        torch = optional("torch")
        inputs = [y.detach().requires_grad_(backward) for y in tensors[:3]]
        out = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True)
        if backward:
            torch.autograd.grad(out, inputs, tensors[3])
        return out.detach()

    if tensors is not None:
        others["torch sdpa"] = sdpa
    name = f"dense causal {storage}" + (" forward+backward" if backward else "")
    truth = truth_of(x, last_rows(4096))
    assert compare(cupy, capsys, name, ours, others, truth) < BOUND


def test_window(cupy, capsys):
    """A causal window of 256 against FlexAttention."""
    from attention_ref.kernels.cuda import window

    (q, k, v, _), x = draw(cupy, 16, 16, 16384, 16384, 64, "float16")
    tensors, others = on_gpu(q, k, v), {}
    flex = optional("torch.nn.attention.flex_attention")
    if tensors is not None and flex is not None:
        rule = lambda b, h, t, s: (t >= s) & (t - s < 256)
        mask = flex.create_block_mask(rule, None, None, 16384, 16384, device="cuda")
        compiled = optional("torch").compile(flex.flex_attention)
        others["torch flex, compiled"] = lambda: compiled(*tensors, block_mask=mask)
    ours = lambda: window.forward(q, k, v, left=255, right=0)[0]
    truth = truth_of(x, last_rows(16384, 256))
    assert compare(cupy, capsys, "window 256 float16", ours, others, truth) < BOUND


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_decode(storage, cupy, capsys):
    """One query of 32 heads over a cache of 4 key heads, against PyTorch's attention."""
    from attention_ref.kernels.cuda import decode

    (q, k, v, _), x = draw(cupy, 32, 4, 1, 65536, 128, storage)
    tensors, others = on_gpu(q, k, v), {}
    if tensors is not None:
        call = optional("torch").nn.functional.scaled_dot_product_attention
        others["torch sdpa"] = lambda: call(*tensors, enable_gqa=True)
    ours = lambda: decode.forward(q, k, v)[0]
    assert compare(cupy, capsys, f"decode {storage}", ours, others, truth_of(x)) < BOUND


def test_linear(cupy, capsys):
    """Causal linear attention without normaliser: the chunked reference against Triton kernels."""
    spec = attention_ref.get("linear/linear_transformer")
    (q, k, v, _), x = draw(cupy, 8, 8, 4096, 4096, 64, "float32")
    tensors, others = on_gpu(q, k, v), {}
    fla = optional("fla.ops.linear_attn")
    if tensors is not None and fla is not None:
        turned = [y.transpose(1, 2).contiguous() for y in tensors]  # (B, T, H, D)

        def triton():
            out = fla.chunk_linear_attn(*turned, scale=1.0, normalize=False)[0]
            return out.transpose(1, 2).contiguous()

        others["triton linear attention"] = triton
    options = {"causal": True, "normalise": False, "feature_map": "identity"}
    wide = [y.astype(np.float64) for y in x[:3]]
    z = np.einsum("...td,...sd->...ts", wide[0][..., -SHOWN:, :], wide[1])
    truth = np.where(last_rows(4096), z, 0.0) @ wide[2]
    ours = lambda: spec.forms["chunked"](q, k, v, **options)[0]
    assert compare(cupy, capsys, "linear", ours, others, truth) < BOUND
