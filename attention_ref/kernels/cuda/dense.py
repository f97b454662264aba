"""Dense softmax attention on the GPU: what ``dense.cu`` needs before and after its launches.

Takes CuPy arrays (float32), the arguments and results of ``kernels.numba.dense``. The module is
compiled once for every pair of widths D, E, which are constants of the CUDA text.
"""

import functools

import numpy as np

from attention_ref.core.errors import DTypeError, ShapeError
from attention_ref.kernels import cuda, softmax

SIDE = 16  # threads along one side of a block
TILE = 4 * SIDE  # rows of one block
WIDEST = 256  # of D and E: the tile of v has to fit into shared memory


@functools.cache
def module(width, depth):
    """The compiled module for one pair of widths."""
    options = ("--std=c++17", f"-DHEAD_D={width}", f"-DHEAD_E={depth}", f"-DSIDE={SIDE}")
    return cuda.require().RawModule(code=cuda.source("dense"), options=options)


def launch(name, blocks, arguments, width, depth):
    """Run one kernel of the module on the GPU; ``blocks`` of SIDE * SIDE threads."""
    if blocks:
        module(width, depth).get_function(name)((blocks,), (SIDE * SIDE,), arguments)


class _Kernel:
    """The launches that ``softmax`` calls."""

    dtypes = (np.dtype(np.float32),)

    def __init__(self, run=launch, tile=TILE):
        self.run, self.tile = run, tile

    def forward(self, c, k, out, lse):
        batch, heads, queries, _, width, depth = softmax.lengths(c)
        _check_width(width, depth)
        self.run("dense_forward", batch * heads * -(-queries // self.tile),
                 (c.q, k, c.v, *_optional(c), out, lse, *_common(c)), width, depth)  # fmt: skip

    def backward(self, c, dout, lse, delta, dq, dk, dv, dbias):
        batch, heads, queries, keys, width, depth = softmax.lengths(c)
        inputs = (c.q, c.k, c.v, *_optional(c), dout, lse, delta)
        self.run("dense_backward_queries", batch * heads * -(-queries // self.tile),
                 (*inputs, dq, dbias if c.biased else np.intp(0), *_common(c)),
                 width, depth)  # fmt: skip
        self.run("dense_backward_keys", batch * c.k.shape[1] * -(-keys // self.tile),
                 (*inputs, dk, dv, *_common(c)), width, depth)  # fmt: skip


def _optional(c):
    """Mask and bias; a null pointer where there is none."""
    return c.mask if c.masked else np.intp(0), c.bias if c.biased else np.intp(0)


def _common(c):
    """Sizes, numbers and strides, in the order and the types of the CUDA text."""
    _, heads, queries, keys, _, _ = softmax.lengths(c)
    steps = softmax.strides(c.mask, c.masked)[:4] + softmax.strides(c.bias, c.biased)[:4]
    sizes = (np.int32(n) for n in (heads, c.k.shape[1], queries, keys))
    numbers = (np.float32(c.scale), np.float32(c.softcap or 0))
    return (*sizes, *numbers, np.int32(c.causal), np.int32(c.shift), *map(np.int64, steps))


def _check_width(width, depth):
    if max(width, depth) > WIDEST:
        raise ShapeError(f"D = {width}, E = {depth}, expected at most {WIDEST} on the GPU")


def _check_arrays(cupy, **arrays):
    for name, x in arrays.items():
        if x is not None and not isinstance(x, cupy.ndarray):
            raise DTypeError(
                f"{name} is a {type(x).__name__}, expected a CuPy array; hint: cupy.asarray({name})"
            )


def forward(q, k, v, *, mask=None, causal=False, align="lower_right", scale=None, softcap=None,
            bias=None, empty_row="zero"):  # fmt: skip
    """Softmax attention on the GPU; arguments and results as in ``kernels.softmax.forward``."""
    _check_arrays(cuda.require(), q=q, k=k, v=v, mask=mask, bias=bias)
    kernel = _Kernel()
    return softmax.forward(kernel, q, k, v, mask, causal, align, scale, softcap, bias, empty_row)


def backward(dout, cache, dlse=None):
    """Gradients of :func:`forward`; as in ``kernels.softmax.backward``."""
    _check_arrays(cuda.require(), dout=dout, dlse=dlse)
    return softmax.backward(_Kernel(), dout, cache, dlse)
