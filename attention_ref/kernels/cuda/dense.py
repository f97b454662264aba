"""Dense softmax attention on the GPU: what ``dense.cu`` needs before and after its launches.

Takes CuPy arrays, the arguments and results of ``kernels.numba.dense``. q, k, v are float32,
float16 or bfloat16, all three alike; bfloat16 is the dtype of the package ml_dtypes. ``out``,
``dout`` and the gradients are stored like them; lse and every sum are float32; a bias may be
float32 too. The module is compiled once for every pair of widths D, E and every storage, which are
constants of the CUDA text. Intervals of ``kernels.plan`` are followed; tables of blocks run on the
CPU only.
"""

import numpy as np

from attention_ref.core.errors import BackendUnavailable, DTypeError, ShapeError
from attention_ref.kernels import cuda, plan, softmax

SIDE = 16  # threads along one side of a block
TILE = 4 * SIDE  # rows of one block
WIDEST = 256  # of D and E: the tile of v has to fit into shared memory


def options(storage, width, depth):
    """The constants of the CUDA text."""
    sizes = (f"-DHEAD_D={width}", f"-DHEAD_E={depth}", f"-DSIDE={SIDE}")
    return (*sizes, *cuda.STORAGE[storage])


def launch(name, blocks, arguments, *key):
    """Run one kernel of the module on the GPU; ``blocks`` of SIDE * SIDE threads."""
    if blocks:
        module = cuda.load("dense", *options(*key))
        module.get_function(name)((blocks,), (SIDE * SIDE,), arguments)


class _Kernel:
    """The launches that ``softmax`` calls."""

    dtypes = (np.dtype(np.float32),)
    halves = ("float16", "bfloat16")

    def __init__(self, run=launch, tile=TILE):
        self.run, self.tile = run, tile

    def forward(self, c, k, out, lse):
        batch, heads, queries, _, width, depth = softmax.lengths(c)
        check_width(width, depth)
        by_query, _ = _runs(c, self.tile)
        self.run("dense_forward", batch * heads * -(-queries // self.tile),
                 (c.q, k, c.v, *optional(c), *by_query, out, lse, *_common(c)),
                 c.q.dtype.name, width, depth)  # fmt: skip

    def backward(self, c, dout, lse, delta, dq, dk, dv, dbias):
        batch, heads, queries, keys, width, depth = softmax.lengths(c)
        inputs, more = (c.q, c.k, c.v, *optional(c)), (dout, lse, delta)
        by_query, by_key = _runs(c, self.tile)
        self.run("dense_backward_queries", batch * heads * -(-queries // self.tile),
                 (*inputs, *by_query, *more, dq, dbias if c.biased else np.intp(0), *_common(c)),
                 c.q.dtype.name, width, depth)  # fmt: skip
        self.run("dense_backward_keys", batch * c.k.shape[1] * -(-keys // self.tile),
                 (*inputs, *by_key, *more, dk, dv, *_common(c)),
                 c.q.dtype.name, width, depth)  # fmt: skip


def optional(c):
    """Mask and bias; a null pointer where there is none."""
    return c.mask if c.masked else np.intp(0), c.bias if c.biased else np.intp(0)


def _runs(c, tile):
    """For blocks of queries and for blocks of keys: low, high, first, last; null without a pattern.

    Four small arrays of int32, made on the host for every call and copied to the arrays of c.
    """
    if c.seen is None:
        return ((np.intp(0),) * 4,) * 2
    if c.seen.blocks is not None:
        raise BackendUnavailable(
            "backend 'cuda' cannot run: its kernels follow intervals, no tables of blocks; "
            "hint: backend='numba'"
        )
    _, _, queries, keys, _, _ = softmax.lengths(c)
    by_query, by_key = plan.sides(c.seen, queries, keys, tile)
    ends = (c.seen.low, c.seen.high)
    return tuple(
        tuple(np.asarray(x.astype(np.int32), like=c.q) for x in (*ends, side.first, side.last))
        for side in (by_query, by_key)
    )


def _common(c):
    """Sizes, numbers and strides, in the order and the types of the CUDA text."""
    _, heads, queries, keys, _, _ = softmax.lengths(c)
    sizes = (np.int32(n) for n in (heads, c.k.shape[1], queries, keys))
    numbers = (np.float32(c.scale), np.float32(c.softcap or 0))
    patterns = 1 if c.seen is None else c.seen.low.shape[0]
    causal = c.causal and c.seen is None  # a pattern holds causality already
    numbers = (*numbers, np.int32(causal), np.int32(c.shift), np.int32(patterns))
    return (*sizes, *numbers, *steps(c))


def steps(c):
    """Strides of mask and bias along N, H, T, S."""
    both = softmax.strides(c.mask, c.masked)[:4] + softmax.strides(c.bias, c.biased)[:4]
    return tuple(map(np.int64, both))


def check_width(width, depth):
    """Refuse widths for which the text cannot be compiled."""
    if min(width, depth) < 1 or max(width, depth) > WIDEST:
        raise ShapeError(
            f"D = {width}, E = {depth}, expected at least 1 and at most {WIDEST} on the GPU"
        )


def check_arrays(cupy, **arrays):
    """Refuse what does not lie on the GPU."""
    for name, x in arrays.items():
        if x is not None and not isinstance(x, cupy.ndarray):
            raise DTypeError(
                f"{name} is a {type(x).__name__}, expected a CuPy array; hint: cupy.asarray({name})"
            )


def forward(q, k, v, *, mask=None, causal=False, align="lower_right", scale=None, softcap=None,
            bias=None, empty_row="zero", seen=None):  # fmt: skip
    """Softmax attention on the GPU; arguments and results as in ``kernels.softmax.forward``."""
    check_arrays(cuda.require(), q=q, k=k, v=v, mask=mask, bias=bias)
    return softmax.forward(_Kernel(), q, k, v, mask, causal, align, scale, softcap, bias,
                           empty_row, seen)  # fmt: skip


def backward(dout, cache, dlse=None):
    """Gradients of :func:`forward`; as in ``kernels.softmax.backward``."""
    check_arrays(cuda.require(), dout=dout, dlse=dlse)
    return softmax.backward(_Kernel(), dout, cache, dlse)
