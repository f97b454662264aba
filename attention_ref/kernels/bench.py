"""How fast the kernels are, as ratios measured side by side in one run.

Ours and the others take turns, so that a busy machine slows both; a number is the median of at
least seven turns. Every row carries the error against float64 truth: speed that costs accuracy
does not count. Others that are not installed are left out. Times in seconds; ``ratio`` is their
time over ours, so above 1 we are faster.
"""

import functools
import importlib
import math
import time

import numpy as np

from attention_ref.kernels.numba import dense, row_projection, scan, threads

TURNS = 7


def _module(name):
    """An optional library, None where it is missing or broken."""
    try:
        return importlib.import_module(name)
    except Exception:
        return None


@functools.cache
def _torch():
    """PyTorch with as many threads as our kernels, or None."""
    torch = _module("torch")
    if torch is not None:
        torch.set_num_threads(threads.count())
    return torch


def _seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _compare(pattern, shape, dtype, ours, others, truth, part=lambda out: out):
    """One row for every other: ``ours`` and the others are calls that return the output.

    Parameters
    ----------
    truth : ndarray
        In float64, for the part of the output that ``part`` selects.
    """
    calls = {"ours": ours, **others}
    size = float(np.max(np.abs(truth)))
    errors = {
        name: float(np.max(np.abs(part(np.asarray(call())).astype(np.float64) - truth))) / size
        for name, call in calls.items()
    }  # also the first call, which compiles
    times = {name: [] for name in calls}
    for _ in range(TURNS):
        for name, call in calls.items():
            times[name].append(_seconds(call))
    median = {name: float(np.median(t)) for name, t in times.items()}
    return [
        {
            "pattern": pattern, "shape": shape, "dtype": np.dtype(dtype).name,
            "ours_s": median["ours"], "other": name, "other_s": median[name],
            "ratio": median[name] / median["ours"], "error_vs_float64": errors["ours"],
            "other_error": errors[name], "threads": threads.count(),
        }
        for name in others
    ]  # fmt: skip


def _dense_formula(q, k, v, dout, causal):
    """Attention with the full matrix: out, dq, dk, dv."""
    scale = 1.0 / math.sqrt(q.shape[-1])
    z = (q @ np.swapaxes(k, -1, -2)) * scale
    if causal:
        z = np.where(np.tri(*z.shape[-2:], dtype=bool), z, -np.inf)
    z = np.exp(z - np.max(z, axis=-1, keepdims=True))
    p = z / np.sum(z, axis=-1, keepdims=True)
    out = p @ v
    if dout is None:
        return (out,)
    dz = dout @ np.swapaxes(v, -1, -2)
    dz = p * (dz - np.sum(p * dz, axis=-1, keepdims=True))
    dk = np.swapaxes(dz, -1, -2) @ q * scale
    return out, dz @ k * scale, dk, np.swapaxes(p, -1, -2) @ dout


def bench_dense(length=2048, width=64, heads=8, causal=False, backward=False, dtype=np.float32):
    """Dense attention against the NumPy formula and PyTorch's ``scaled_dot_product_attention``.

    With ``backward`` a turn is forward and backward, and the error is that of dq.
    """
    rng = np.random.default_rng(0)
    shape = (1, heads, length, width)
    q, k, v, dout = (rng.standard_normal(shape).astype(dtype) for _ in range(4))
    last = 1 if backward else 0

    def ours():
        out, cache = dense.forward(q, k, v, causal=causal)
        return dense.backward(dout, cache)["q"] if backward else out

    others = {"numpy": lambda: _dense_formula(q, k, v, dout if backward else None, causal)[last]}
    torch = _torch()
    if torch is not None:
        tensors = [torch.from_numpy(x).requires_grad_(backward) for x in (q, k, v)]
        up = torch.from_numpy(dout)

        def sdpa():
            with torch.set_grad_enabled(backward):
                out = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=causal)
            return torch.autograd.grad(out, tensors, up)[0] if backward else out

        others["torch sdpa"] = sdpa
    one = [x[:, :1].astype(np.float64) for x in (q, k, v, dout)]
    truth = _dense_formula(*one[:3], one[3] if backward else None, causal)[last]
    name = "dense" + (" causal" if causal else "") + (" forward+backward" if backward else "")
    return _compare(name, f"B1 H{heads} N{length} D{width}", dtype, ours, others, truth,
                    lambda out: out[:, :1])  # fmt: skip


def _token_loop(q, k, v, b, gate, state, scale, erase, stack):
    """The recurrence as one writes it down; NumPy and PyTorch arrays alike."""
    out = []
    for t in range(q.shape[-2]):
        state = gate[..., t, None, None] * state
        u = v[..., t, :]
        if erase:
            u = b[..., t, None] * (u - (k[..., t, None, :] @ state)[..., 0, :])
        state = state + k[..., t, :, None] * u[..., None, :]
        out.append(scale * (q[..., t, None, :] @ state)[..., 0, :])
    return stack(out, -2)


def bench_scan(length=4096, width=64, heads=8, erase=True, backward=False, dtype=np.float32):
    """The delta rule (``erase``) or the decay scan against token loops in NumPy and PyTorch."""
    rng = np.random.default_rng(0)
    q, k, v, dout = rng.standard_normal((4, 1, heads, length, width))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    b, gate = rng.uniform(0.2, 1.0, (2, 1, heads, length))
    state, scale = np.zeros((1, heads, width, width)), 1.0 / math.sqrt(width)
    wide = (q, k, v, b, gate, state)
    q, k, v, b, gate, state, dout = (x.astype(dtype) for x in (*wide, dout))

    def ours():
        if erase:
            out, _, cache = scan.delta_forward(q, k, v, b, gate)
            return scan.delta_backward(dout, None, cache)["q"] if backward else out
        out, _, cache = scan.decay_forward(q, k, v, gate)
        return scan.decay_backward(dout, None, cache)["q"] if backward else out

    others = {}
    if not backward:
        others["numpy token loop"] = lambda: _token_loop(q, k, v, b, gate, state, dtype(scale),
                                                         erase, np.stack)  # fmt: skip
    torch = _torch()
    if torch is not None:
        tensors = [torch.from_numpy(x) for x in (q, k, v, b, gate, state)]
        tensors[0].requires_grad_(backward)

        def loop():
            with torch.set_grad_enabled(backward):
                out = _token_loop(*tensors, scale, erase, torch.stack)
            wanted = [tensors[0]]
            return torch.autograd.grad(out, wanted, torch.from_numpy(dout))[0] if backward else out

        others["torch token loop"] = loop
    one = [x[:, :1] for x in wide]
    if backward:  # dq_t = c S_t dout_t: the same loop with the state read by dout
        truth = _token_loop_states(*one, scale, erase, dout[:, :1].astype(np.float64))
    else:
        truth = _token_loop(*one, scale, erase, np.stack)
    name = ("delta" if erase else "decay") + " scan" + (" forward+backward" if backward else "")
    return _compare(name, f"B1 H{heads} N{length} D{width}", dtype, ours, others, truth,
                    lambda out: out[:, :1])  # fmt: skip


def _token_loop_states(q, k, v, b, gate, state, scale, erase, dout):
    """dq of the recurrence: scale S_t dout_t."""
    out = []
    for t in range(q.shape[-2]):
        state = gate[..., t, None, None] * state
        u = v[..., t, :]
        if erase:
            u = b[..., t, None] * (u - (k[..., t, None, :] @ state)[..., 0, :])
        state = state + k[..., t, :, None] * u[..., None, :]
        out.append(scale * (state @ dout[..., t, :, None])[..., 0])
    return np.stack(out, -2)


def _sparsemax_formula(z):
    """Sparsemax by sorting."""
    z = z - np.max(z, axis=-1, keepdims=True)
    order = np.sort(z, axis=-1)[..., ::-1]
    thresholds = (np.cumsum(order, axis=-1) - 1) / np.arange(1, z.shape[-1] + 1, dtype=z.dtype)
    count = np.sum(order > thresholds, axis=-1, keepdims=True)
    return np.maximum(z - np.take_along_axis(thresholds, count - 1, axis=-1), 0)


def bench_row_projection(rows=8192, length=2048, dtype=np.float32):
    """Sparsemax rows against sorting in NumPy and the entmax package."""
    z = np.random.default_rng(0).standard_normal((rows, length)).astype(dtype)
    others = {"numpy sort": lambda: _sparsemax_formula(z)}
    torch, entmax = _torch(), _module("entmax")
    if torch is not None and entmax is not None:
        tensor = torch.from_numpy(z)
        others["entmax"] = lambda: entmax.sparsemax(tensor, dim=-1)
    truth = _sparsemax_formula(z[:64].astype(np.float64))
    return _compare("sparsemax rows", f"{rows} x {length}", dtype,
                    lambda: row_projection.sparsemax_rows(z), others, truth,
                    lambda out: out[:64])  # fmt: skip


def run_benchmarks(quick=False):
    """All patterns.

    Parameters
    ----------
    quick : bool
        Small sizes, a few seconds in all; the ratios then say little about large ones.

    Returns
    -------
    list of dict
        pattern, shape, dtype, ours_s, other, other_s, ratio, error_vs_float64, other_error,
        threads.
    """
    rows, length = [], 512 if quick else 2048
    for width in (64,) if quick else (64, 128):
        for backward in (False, True):
            for causal in (False, True):
                rows += bench_dense(length, width, causal=causal, backward=backward)
    length = 256 if quick else 4096
    rows += bench_scan(length)
    rows += bench_scan(length, erase=False)
    rows += bench_scan(length // 4, backward=True)
    rows += bench_row_projection(*((512, 512) if quick else (8192, 2048)))
    return rows
