"""Packed sequences: many sequences one behind the other, none sees another.

The kernel of ``dense`` with an interval of keys for every query (``kernels.plan``): 128 queries
walk over the keys of the sequences they belong to and no others. No mask of T x S is ever made, no
sequence is padded; work and memory grow with the sum of the products of lengths, not with T S.
"""

from attention_ref.core.errors import ShapeError
from attention_ref.kernels import plan
from attention_ref.kernels.numba import dense

backward = dense.backward


def forward(q, k, v, lengths_q, lengths_k, *, causal=False, align="lower_right", left=None,
            right=None, mask=None, scale=None, softcap=None, bias=None,
            empty_row="zero"):  # fmt: skip
    """Softmax attention within sequences that are packed along the token axis.

    Parameters
    ----------
    q, k, v, mask, scale, softcap, bias, empty_row
        As in ``kernels.softmax.forward``; T and S are the sums of the lengths.
    lengths_q, lengths_k : sequence of int, tokens
        Queries and keys of every sequence.
    causal, align, left, right
        Causality and window, counted within each sequence.

    Returns
    -------
    out : ndarray, shape (..., H, T, E)
    cache : softmax.Cache
        For :func:`backward`.
    """
    for name, lengths, x in (("lengths_q", lengths_q, q), ("lengths_k", lengths_k, k)):
        if sum(lengths) != x.shape[-2]:
            raise ShapeError(
                f"{name} adds up to {sum(lengths)} tokens, expected {x.shape[-2]}, those of "
                f"{name[-1]} with shape {x.shape}"
            )
    seen = plan.packed(lengths_q, lengths_k, causal=causal, align=align, left=left, right=right)
    return dense.forward(q, k, v, mask=mask, scale=scale, softcap=softcap, bias=bias,
                         empty_row=empty_row, seen=seen)  # fmt: skip
