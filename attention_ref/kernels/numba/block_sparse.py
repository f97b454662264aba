"""Block-sparse attention: a table says which blocks of queries see which blocks of keys.

The kernel of ``dense`` over index lists that ``kernels.plan`` makes from the table: adjacent blocks
become one run of keys, and the lists of the other side serve the gradients of keys and values. What
no block holds is never touched: the work is that of the blocks that exist. Blocks of fewer than 128
tokens leave lanes idle; blocks of 64 cost about twice as much a pair as blocks of 128.
"""

from attention_ref.core import check
from attention_ref.kernels import plan
from attention_ref.kernels.numba import dense

backward = dense.backward


def forward(q, k, v, blocks, block, *, causal=False, align="lower_right", left=None, right=None,
            mask=None, scale=None, softcap=None, bias=None, empty_row="zero"):  # fmt: skip
    """Softmax attention over the pairs of blocks that exist.

    Parameters
    ----------
    q, k, v, mask, scale, softcap, bias, empty_row
        As in ``kernels.softmax.forward``; an inner mask is one more restriction.
    blocks : bool ndarray, shape (T / block, S / block), or with axes (N,) H before
        True = these queries see these keys. The last block of a side may be shorter.
    block : int, tokens
        Side of a block.
    causal, align, left, right
        Causality and a window inside the blocks that exist.

    Returns
    -------
    out : ndarray, shape (..., H, T, E)
    cache : softmax.Cache
        For :func:`backward`.
    """
    check.option("align", align, check.ALIGNMENTS)
    queries, keys = q.shape[-2], k.shape[-2]
    seen = plan.interval(queries, keys, causal=causal, align=align, left=left, right=right)
    return dense.forward(
        q, k, v, mask=mask, scale=scale, softcap=softcap, bias=bias, empty_row=empty_row,
        seen=plan.restrict(seen, blocks, block, queries, keys),
    )  # fmt: skip
