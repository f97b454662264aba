"""How fast the kernels are, as ratios measured side by side in one run.

Ours and the others take turns, so that a busy machine slows both; a number is the median of at
least seven turns. Every row carries the error against float64 truth: speed that costs accuracy
does not count. Others that are not installed are left out. Times in seconds; ``ratio`` is their
time over ours, so above 1 we are faster.
"""

import functools
import importlib
import math
import sys
import time
import tracemalloc

import numpy as np

from attention_ref.kernels import plan
from attention_ref.kernels.numba import (
    block_sparse,
    decode,
    dense,
    row_projection,
    scan,
    threads,
    tiles,
    window,
)

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


def _chunked_loop(torch, q, k, v, gate, scale, chunk=64):
    """Linear attention with decay by chunks: matrix products within, a state between them."""
    state = torch.zeros(*q.shape[:-2], q.shape[-1], v.shape[-1])
    lower, out = torch.tril(torch.ones(chunk, chunk, dtype=torch.bool)), []
    for start in range(0, q.shape[-2], chunk):
        part = slice(start, min(start + chunk, q.shape[-2]))
        Q, K, V = q[..., part, :], k[..., part, :], v[..., part, :]
        G = torch.cumsum(torch.log(gate[..., part]), -1)
        low = lower[: G.shape[-1], : G.shape[-1]]
        between = torch.where(low, G[..., :, None] - G[..., None, :], -torch.inf).exp()
        inner = (Q @ K.transpose(-1, -2) * between) @ V
        out.append(inner + G.exp()[..., None] * (Q @ state))
        last = G[..., -1:]
        state = last.exp()[..., None] * state
        state = state + ((last - G).exp()[..., None] * K).transpose(-1, -2) @ V
    return torch.cat(out, -2) * scale


def bench_chunked(length=16384, width=64, heads=8, dtype=np.float32):
    """Linear attention with decay against a PyTorch loop over chunks of 64 tokens."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, heads, length, width)).astype(dtype) for _ in range(3))
    gate = rng.uniform(0.9, 1.0, (1, heads, length)).astype(dtype)
    scale, torch = 1.0 / math.sqrt(width), _torch()
    others = {}
    if torch is not None:
        tensors = [torch.from_numpy(x) for x in (q, k, v, gate)]
        others["torch chunked loop"] = lambda: _chunked_loop(torch, *tensors, scale)
    one = [x[:, :1].astype(np.float64) for x in (q, k, v)]
    b, wide = np.ones((1, 1, length)), gate[:, :1].astype(np.float64)
    truth = _token_loop(*one, b, wide, np.zeros((1, 1, width, width)), scale, False, np.stack)
    return _compare("decay scan", f"B1 H{heads} N{length} D{width}", dtype,
                    lambda: scan.decay_forward(q, k, v, gate)[0], others, truth,
                    lambda out: out[:, :1])  # fmt: skip


def _masked_formula(q, k, v, mask, most=256):
    """Attention under a mask for the last queries of the first head, in float64."""
    q, k, v = (x[:, :1].astype(np.float64) for x in (q[..., -most:, :], k, v))
    z = np.where(mask[-most:], q @ np.swapaxes(k, -1, -2) / math.sqrt(q.shape[-1]), -np.inf)
    z = np.exp(z - np.max(z, axis=-1, keepdims=True))
    return z / np.sum(z, axis=-1, keepdims=True) @ v


def _sparse(pattern, shape, ours, q, k, v, mask, flex=None):
    """One sparse pattern against PyTorch's dense attention with the mask, and FlexAttention."""
    torch, others = _torch(), {}
    if torch is not None:
        tensors, boolean = [torch.from_numpy(x) for x in (q, k, v)], torch.from_numpy(mask)
        call = torch.nn.functional.scaled_dot_product_attention
        others["torch sdpa, mask"] = lambda: call(*tensors, attn_mask=boolean)
        compiled = None if flex is None else _flex(torch, tensors, flex)
        if compiled is not None:
            others["torch flex, compiled"] = compiled
    truth = _masked_formula(q, k, v, mask)
    return _compare(pattern, shape, q.dtype, ours, others, truth,
                    lambda out: out[:, :1, -truth.shape[-2] :])  # fmt: skip


def _flex(torch, tensors, rule):
    """FlexAttention compiled for this machine, or None where it does not run."""
    try:
        from torch.nn.attention import flex_attention as flex

        length = tensors[0].shape[-2]
        mask = flex.create_block_mask(rule, None, None, length, length, device="cpu")
        compiled = torch.compile(flex.flex_attention)

        def call():
            with torch.no_grad():
                return compiled(*tensors, block_mask=mask)

        call()
        return call
    except Exception as failure:  # no compiler, an older PyTorch: said, not hidden
        print(f"FlexAttention does not run here: {type(failure).__name__}", file=sys.stderr)
        return None


def bench_window(length=16384, near=256, width=64, heads=2, dtype=np.float32):
    """A causal window against PyTorch's dense attention with the mask and FlexAttention."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, heads, length, width)).astype(dtype) for _ in range(3))
    step = np.subtract.outer(np.arange(length, dtype=np.int32), np.arange(length, dtype=np.int32))
    return _sparse(
        f"window {near}, causal", f"B1 H{heads} N{length} D{width}",
        lambda: window.forward(q, k, v, left=near - 1, right=0)[0], q, k, v,
        (step >= 0) & (step < near),
        lambda b, h, t, s: (t >= s) & (t - s < near),
    )  # fmt: skip


def bench_block_sparse(length=8192, block=128, density=0.05, width=64, heads=2, dtype=np.float32):
    """Blocks drawn at random, no row without one, against dense attention with the mask."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, heads, length, width)).astype(dtype) for _ in range(3))
    side = -(-length // block)
    table = np.zeros((side, side), bool)
    table.flat[rng.permutation(side * side)[: round(density * side * side)]] = True
    table[np.arange(side), rng.integers(0, side, side)] |= ~table.any(axis=1)
    mask = np.kron(table, np.ones((block, block), bool))[:length, :length]
    return _sparse(f"blocks of {block}, {table.mean():.1%}", f"B1 H{heads} N{length} D{width}",
                   lambda: block_sparse.forward(q, k, v, table, block)[0], q, k, v,
                   mask)  # fmt: skip


def bench_decode(length=32768, width=128, heads=32, groups=4, dtype=np.float32):
    """One query over a long cache, several query heads to a key head."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, heads, 1, width)).astype(dtype)
    k, v = (rng.standard_normal((1, groups, length, width)).astype(dtype) for _ in range(2))
    torch, others = _torch(), {}
    if torch is not None:
        tensors = [torch.from_numpy(x) for x in (q, k, v)]
        call = torch.nn.functional.scaled_dot_product_attention
        others["torch sdpa"] = lambda: call(*tensors, enable_gqa=True)
    wide = [np.repeat(x.astype(np.float64), heads // groups, axis=1) for x in (k, v)]
    truth = _dense_formula(q.astype(np.float64), *wide, None, False)[0]
    return _compare("decode", f"B1 H{heads} G{groups} N{length} D{width}", dtype,
                    lambda: decode.forward(q, k, v)[0], others, truth)  # fmt: skip


def bench_memory(length=16384, width=64):
    """Extra memory of dense attention, forward and backward, beside inputs, output and gradients.

    Measured by the allocator of NumPy; what a kernel holds for itself, a few tiles a thread, is
    not among it.
    """
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((1, 1, length, width), np.float32) for _ in range(4))
    dense.backward(dout[:, :, :8], dense.forward(q[:, :, :8], k, v)[1])  # compiled, not measured
    tracemalloc.start()
    try:
        out, cache = dense.forward(q, k, v)
        gradients = dense.backward(dout, cache)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    kept = out.nbytes + sum(g.nbytes for g in gradients.values())
    return {
        "pattern": "dense forward+backward", "shape": f"B1 H1 N{length} D{width}",
        "dtype": "float32", "extra_mb": (peak - kept) / 2**20,
        "scores_mb": length * length * 4 / 2**20,
    }  # fmt: skip


def bench_ceiling(size=2048, length=16384, near=256, width=64):
    """What this machine can do at all, and how near the dense and the window kernel come to it.

    Returns
    -------
    dict
        Matrix products of NumPy and PyTorch and both kernels in 1e9 operations a second (one
        multiplication and one addition are two), a copy in 1e9 bytes a second, and how many pairs
        the window kernel walks over for each pair that the window keeps.
    """
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, size, size)).astype(np.float32)
    big = np.zeros(2**26, np.float32)
    other = np.empty_like(big)
    q, k, v = (rng.standard_normal((1, 2, length, width), np.float32) for _ in range(3))
    part = [x[:, :, :2048] for x in (q, k, v)]
    calls = {
        "copy": lambda: np.copyto(other, big), "numpy product": lambda: a @ b,
        "dense kernel": lambda: dense.forward(*part),
        "window kernel": lambda: window.forward(q, k, v, left=near - 1, right=0),
    }  # fmt: skip
    torch = _torch()
    if torch is not None:
        x, y = torch.from_numpy(a), torch.from_numpy(b)
        calls["torch product"] = lambda: x @ y
    best = {}
    for name, call in calls.items():
        call()
        best[name] = min(_seconds(call) for _ in range(TURNS))
    one, _ = plan.sides(plan.interval(length, length, causal=True, left=near - 1), length, length,
                        tiles.LANES)  # fmt: skip
    walked = int(np.sum((one.last - one.first) * (one.stop - one.start)))
    kept = near * length - near * (near - 1) // 2
    work = {
        "numpy product": 2 * size**3, "torch product": 2 * size**3,
        "dense kernel": 2 * 4 * part[0].shape[-2] ** 2 * width,
        "window kernel": 2 * 4 * walked * width,
    }  # fmt: skip
    return {
        "gflops": {name: work[name] / best[name] / 1e9 for name in calls if name in work},
        "copy_gb_s": 2 * big.nbytes / best["copy"] / 1e9,
        "window": {"near": near, "walked_for_each_kept": walked / kept},
    }


def bench_growth(lengths=(1024, 2048, 4096, 8192, 16384, 32768, 65536), most=4096, width=64):
    """Time against the number of tokens, one head: ours, and the others up to ``most`` tokens.

    Returns
    -------
    list of dict
        pattern, who, tokens, seconds (the smallest of five), and for the last of a line the
        exponent of a straight line through log time from 2048 tokens on.
    """
    rows, torch = [], _torch()
    for pattern in ("dense, causal", "window 256, causal", "decay scan", "delta scan"):
        for who in ("ours", "torch"):
            line = []
            for tokens in lengths:
                quadratic = pattern.startswith("dense") or (who == "torch" and "window" in pattern)
                if (who == "torch" and torch is None) or (quadratic and tokens > 4 * most):
                    continue
                if who == "torch" and pattern == "delta scan" and tokens > most:
                    continue
                call = _growth_call(pattern, who, tokens, width, torch)
                call()
                line.append((tokens, min(_seconds(call) for _ in range(5 if tokens < 9000 else 3))))
            far = [(math.log(n), math.log(s)) for n, s in line if n >= 2048]
            exponent = float(np.polyfit(*zip(*far, strict=True), 1)[0]) if len(far) > 2 else None
            rows += [{"pattern": pattern, "who": who, "tokens": n, "seconds": s,
                      "exponent": exponent} for n, s in line]  # fmt: skip
    return rows


def _growth_call(pattern, who, tokens, width, torch):
    """One call of one pattern at one length."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 1, tokens, width), np.float32) for _ in range(3))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    b, gate = rng.uniform(0.5, 1.0, (2, 1, 1, tokens)).astype(np.float32)
    if who == "ours":
        return {
            "dense, causal": lambda: dense.forward(q, k, v, causal=True),
            "window 256, causal": lambda: window.forward(q, k, v, left=255, right=0),
            "decay scan": lambda: scan.decay_forward(q, k, v, gate),
            "delta scan": lambda: scan.delta_forward(q, k, v, b, gate),
        }[pattern]
    x = [torch.from_numpy(y) for y in (q, k, v)]
    rates, scale = [torch.from_numpy(y) for y in (b, gate)], width**-0.5
    state, call = torch.zeros(1, 1, width, width), torch.nn.functional.scaled_dot_product_attention
    if pattern == "window 256, causal":
        step = torch.arange(tokens)[:, None] - torch.arange(tokens)
        mask = (step >= 0) & (step < 256)
        return lambda: call(*x, attn_mask=mask)
    return {
        "dense, causal": lambda: call(*x, is_causal=True),
        "decay scan": lambda: _chunked_loop(torch, *x, rates[1], scale),
        "delta scan": lambda: _token_loop(*x, *rates, state, scale, True, torch.stack),
    }[pattern]


def _sparsemax_formula(z):
    """Sparsemax by sorting."""
    z = z - np.max(z, axis=-1, keepdims=True)
    order = np.sort(z, axis=-1)[..., ::-1]
    thresholds = (np.cumsum(order, axis=-1) - 1) / np.arange(1, z.shape[-1] + 1, dtype=z.dtype)
    count = np.sum(order > thresholds, axis=-1, keepdims=True)
    return np.maximum(z - np.take_along_axis(thresholds, count - 1, axis=-1), 0)


def _entmax_formula(z):
    """1.5-entmax by sorting, after Peters et al. 2019."""
    z = (z - np.max(z, axis=-1, keepdims=True)) / 2
    order = np.sort(z, axis=-1)[..., ::-1]
    rho = np.arange(1, z.shape[-1] + 1, dtype=z.dtype)
    mean, square = (np.cumsum(x, axis=-1) / rho for x in (order, order * order))
    thresholds = mean - np.sqrt(np.maximum((1 - rho * (square - mean**2)) / rho, 0))
    count = np.sum(thresholds <= order, axis=-1, keepdims=True)
    return np.maximum(z - np.take_along_axis(thresholds, count - 1, axis=-1), 0) ** 2


def bench_row_projection(rows=8192, length=2048, dtype=np.float32):
    """Sparsemax and 1.5-entmax rows against sorting in NumPy and the entmax package."""
    z = np.random.default_rng(0).standard_normal((rows, length)).astype(dtype)
    torch, entmax, found = _torch(), _module("entmax"), []
    for name, ours, formula, theirs in (
        ("sparsemax", row_projection.sparsemax_rows, _sparsemax_formula, "sparsemax"),
        ("entmax 1.5", row_projection.entmax_rows, _entmax_formula, "entmax15"),
    ):
        others = {"numpy sort": functools.partial(formula, z)}
        if torch is not None and entmax is not None:
            others["entmax"] = functools.partial(getattr(entmax, theirs), torch.from_numpy(z), -1)
        truth = formula(z[:64].astype(np.float64))
        found += _compare(f"{name} rows", f"{rows} x {length}", dtype, functools.partial(ours, z),
                          others, truth, lambda out: out[:64])  # fmt: skip
    return found


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
    rows += bench_window(*((1024, 64) if quick else ()))
    rows += bench_block_sparse(*((512, 64) if quick else ()))
    rows += bench_scan(length)
    rows += bench_chunked(*((512,) if quick else ()))
    rows += bench_scan(length // 4, backward=True)
    rows += bench_row_projection(*((512, 512) if quick else ()))
    rows += bench_decode(*((1024,) if quick else ()))
    return rows


def draw(growth, path):
    """Time against the number of tokens, both axes logarithmic, as an SVG.

    Parameters
    ----------
    growth : list of dict
        From :func:`bench_growth`.
    path : Path
        Where to write.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    from attention_ref.kit import tutorial

    tutorial.style(path.stem)
    patterns = list(dict.fromkeys(row["pattern"] for row in growth))
    figure, axes = plt.subplots(1, len(patterns), figsize=(11, 3.2), sharey=True)
    for ax, pattern in zip(np.atleast_1d(axes), patterns, strict=True):
        for who, color, mark in (("ours", tutorial.BLUE, "o"), ("torch", tutorial.ORANGE, "s")):
            line = [r for r in growth if r["pattern"] == pattern and r["who"] == who]
            if line:
                slope = line[-1]["exponent"]
                ax.loglog([r["tokens"] for r in line], [r["seconds"] for r in line], mark + "-",
                          color=color, label=who + (f", N^{slope:.2f}" if slope else ""))
        ax.set(title=pattern, xlabel="tokens N")
        ax.set_xscale("log", base=2)
        ax.legend(loc="upper left")
    np.atleast_1d(axes)[0].set_ylabel("seconds, one head of width 64")
    tutorial.write_files({path: tutorial._svg(figure, path.stem)})
    plt.close(figure)
