"""Window attention on the GPU: ``dense.cu`` with an interval of keys for every query.

Every block of 64 queries walks over the 64 + left + right keys that any of them sees. Dilation is
left to the CPU.
"""

from attention_ref.core import check
from attention_ref.core.errors import BackendUnavailable
from attention_ref.kernels import cuda, plan, softmax
from attention_ref.kernels.cuda import dense


def intervals(queries, keys, left, right, dilation, causal, align):
    """The pattern of these arguments, after their checks."""
    check.option("align", align, check.ALIGNMENTS)
    for name, n in (("left", left), ("right", right)):
        if n is not None:
            check.count(name, n, low=0, unit="tokens")
    check.count("dilation", dilation, low=1, unit="tokens")
    if dilation > 1:
        raise BackendUnavailable(
            f"backend 'cuda' cannot run: dilation = {dilation}, expected 1 on the GPU; "
            "hint: backend='numba'"
        )
    return plan.interval(queries, keys, causal=causal, align=align, left=left, right=right)


def forward(
    q, k, v, *, left=None, right=None, dilation=1, mask=None, causal=False, align="lower_right",
    scale=None, softcap=None, bias=None, empty_row="zero",
):  # fmt: skip
    """Window attention on the GPU.

    Parameters
    ----------
    q, k, v, mask, causal, align, scale, softcap, bias, empty_row
        As in ``kernels.softmax.forward``.
    left, right : int, tokens, optional
        How far a query sees to either side, its own place not counted; None is without bound.
    dilation : int, tokens
        1; other values raise BackendUnavailable.

    Returns
    -------
    out : ndarray, shape (..., H, T, E)
    cache : softmax.Cache
        For :func:`backward`.
    """
    dense.check_arrays(cuda.require(), q=q, k=k, v=v, mask=mask, bias=bias)
    seen = intervals(q.shape[-2], k.shape[-2], left, right, dilation, causal, align)
    return softmax.forward(dense._Kernel(), q, k, v, mask, causal, align, scale, softcap, bias,
                           empty_row, seen)  # fmt: skip


backward = dense.backward
