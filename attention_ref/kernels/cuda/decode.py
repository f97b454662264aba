"""Few queries over many keys on the GPU: what ``decode.cu`` needs before and after its launches.

Arguments and results of ``kernels.numba.decode``, on CuPy arrays of the dtypes that ``cuda.dense``
takes. The keys are cut into as many portions as give the GPU BLOCKS blocks; how many depends on
the shapes alone, so the bits do too. Backward: that of ``dense``.
"""

import numpy as np

from attention_ref.kernels import cuda, softmax
from attention_ref.kernels.cuda import dense

THREADS = 128  # of one block
KEYS = 64  # keys whose scores a block holds at once
ROWS = (1, 2, 4, 8, 16)  # rows of one block: the smallest that holds all, else the largest
BLOCKS = 512  # several for each multiprocessor of a large GPU
MOST = 64  # rows a key head; more queries are work for the dense kernel


def options(storage, width, depth, rows):
    """The constants of the CUDA text."""
    sizes = {"HEAD_D": width, "HEAD_E": depth, "ROWS": rows, "KEYS": KEYS, "THREADS": THREADS}
    return (*(f"-D{name}={n}" for name, n in sizes.items()), *cuda.STORAGE[storage])


def launch(name, blocks, arguments, *key):
    """Run one kernel of the module on the GPU."""
    if blocks:
        cuda.load("decode", *options(*key)).get_function(name)((blocks,), (THREADS,), arguments)


class _Kernel(dense._Kernel):
    """The launches that ``softmax`` calls."""

    quarantines = True

    def __init__(self, run=launch, sizes=ROWS, keys=KEYS, blocks=BLOCKS):
        self.run, self.sizes, self.keys, self.blocks = run, sizes, keys, blocks

    def forward(self, c, k, out, lse):
        """Portions side by side, then their sum."""
        batch, heads, queries, keys, width, depth = softmax.lengths(c)
        dense.check_width(width, depth)
        groups = k.shape[1]
        rows = heads // max(groups, 1) * queries
        size = next((n for n in self.sizes if n >= rows), self.sizes[-1])
        items = batch * groups * -(-rows // size)
        portions, length = self.portions(items, keys)
        shape = (batch, groups, portions, rows)
        tops, totals = (np.empty_like(lse, shape=shape) for _ in range(2))
        parts = np.empty_like(lse, shape=(*shape, depth))
        key = (c.q.dtype.name, width, depth, size)
        sizes = (heads, groups, queries, keys, portions, length)
        numbers = (np.float32(c.scale), np.float32(c.softcap or 0))
        self.run("decode_portion", items * portions,
                 (c.q, k, c.v, *dense.optional(c), tops, totals, parts, *map(np.int32, sizes),
                  *numbers, np.int32(c.causal), np.int32(c.shift), *dense.steps(c)),
                 *key)  # fmt: skip
        self.run("decode_combine", batch * groups * rows,
                 (tops, totals, parts, out, lse, np.int32(portions), np.int32(rows)),
                 *key)  # fmt: skip

    def portions(self, items, keys):
        """How many portions a key head has, and the keys of one: whole tiles, at least two."""
        want = -(-self.blocks // max(items, 1))
        length = max(-(-keys // (want * self.keys)), 2) * self.keys
        return -(-keys // length), length


def fits(q, k):
    """Whether these shapes are work for this kernel: few queries a key head, more keys."""
    heads = q.shape[-3] if q.ndim > 2 else 1
    groups = k.shape[-3] if k.ndim > 2 else 1
    rows = heads // max(groups, 1) * q.shape[-2]
    return 0 < rows <= MOST and k.shape[-2] >= 4 * q.shape[-2]


def best(q, k):
    """The forward for these shapes, this one or that of ``dense``; they share the backward."""
    return forward if fits(q, k) else dense.forward


def forward(q, k, v, *, mask=None, causal=False, align="lower_right", scale=None, softcap=None,
            bias=None, empty_row="zero"):  # fmt: skip
    """Softmax attention of few queries; arguments and results as in ``kernels.softmax.forward``."""
    dense.check_arrays(cuda.require(), q=q, k=k, v=v, mask=mask, bias=bias)
    return softmax.forward(_Kernel(), q, k, v, mask, causal, align, scale, softcap, bias, empty_row)


backward = dense.backward
