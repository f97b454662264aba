"""Window attention: every query sees the keys near it, at every d-th place.

Without dilation this is the kernel of ``dense`` with an interval of keys for every query
(``kernels.plan``): 128 queries walk over the 128 + left + right keys that any of them sees, so the
work of N tokens is N (128 + left + right), whatever N is. With dilation d the tokens fall into d
classes that never meet, by place modulo d; each class is a window of its own without dilation, and
its tokens are copied together first. Extra memory O((T + S) (D + E)).
"""

from typing import NamedTuple

import numpy as np

from attention_ref.core import check
from attention_ref.kernels import plan
from attention_ref.kernels.door import sum_to
from attention_ref.kernels.numba import dense


class Cache(NamedTuple):
    """What the backward needs."""

    out: np.ndarray  # (..., H, T, E)
    lse: np.ndarray  # (..., H, T), nats
    parts: tuple  # one dense cache a class of places
    slices: tuple  # (queries, keys) of every class
    shapes: dict  # argument -> its shape


def _cut(x, queries, keys):
    """A mask or bias of one class; axes that broadcast stay as they are."""
    if x is None:
        return None
    rows = queries if x.ndim > 1 and x.shape[-2] != 1 else slice(None)
    columns = keys if x.ndim and x.shape[-1] != 1 else slice(None)
    return x[..., rows, columns] if x.ndim > 1 else x[..., columns]


def forward(
    q, k, v, *, left=None, right=None, dilation=1, mask=None, causal=False, align="lower_right",
    scale=None, softcap=None, bias=None, empty_row="zero",
):  # fmt: skip
    """Window attention on the CPU.

    Parameters
    ----------
    q, k, v, mask, causal, align, scale, softcap, bias, empty_row
        As in ``kernels.softmax.forward``.
    left, right : int, tokens, optional
        How far a query sees to either side, its own place not counted; None is without bound.
    dilation : int, >= 1, tokens
        Only keys at multiples of this distance are seen.

    Returns
    -------
    out : ndarray, shape (..., H, T, E)
    cache : Cache
        For :func:`backward`.
    """
    check.option("align", align, check.ALIGNMENTS)
    for name, n in (("left", left), ("right", right)):
        if n is not None:
            check.count(name, n, low=0, unit="tokens")
    check.count("dilation", dilation, low=1, unit="tokens")
    queries, keys = q.shape[-2], k.shape[-2]
    shift = keys - queries if align == "lower_right" else 0
    near = {"left": left, "right": right}
    near = {name: None if n is None else n // dilation for name, n in near.items()}
    options = {"scale": scale, "softcap": softcap, "empty_row": empty_row}
    parts, slices, outs = [], [], []
    for first in range(dilation):
        one, other = slice((first - shift) % dilation, None, dilation), slice(first, None, dilation)
        place = (np.arange(queries)[one] + shift - first) // dilation
        seen = plan.around(place, k[..., other, :].shape[-2], causal=causal, **near)
        out, cache = dense.forward(
            q[..., one, :], k[..., other, :], v[..., other, :], mask=_cut(mask, one, other),
            bias=_cut(bias, one, other), seen=seen, **options,
        )  # fmt: skip
        outs.append(out)
        parts.append(cache)
        slices.append((one, other))
    given = {"q": q, "k": k, "v": v, **({} if bias is None else {"bias": bias})}
    shapes = {name: x.shape for name, x in given.items()}
    if dilation == 1:
        return outs[0], Cache(outs[0], parts[0].lse, tuple(parts), tuple(slices), shapes)
    out = np.empty((*outs[0].shape[:-2], queries, v.shape[-1]), outs[0].dtype)
    lse = np.empty(out.shape[:-1], out.dtype)
    for x, cache, (one, _) in zip(outs, parts, slices, strict=True):
        out[..., one, :], lse[..., one] = x, cache.lse
    return out, Cache(out, lse, tuple(parts), tuple(slices), shapes)


def backward(dout, cache, dlse=None):
    """Gradients of :func:`forward`; as in ``kernels.softmax.backward``."""
    if len(cache.parts) == 1:
        return dense.backward(dout, cache.parts[0], dlse)
    check.cotangent(dout, cache.out.shape)
    total = {name: np.zeros(shape, cache.out.dtype) for name, shape in cache.shapes.items()}
    for part, (one, other) in zip(cache.parts, cache.slices, strict=True):
        up = None if dlse is None else dlse[..., one]
        for name, dx in dense.backward(dout[..., one, :], part, up).items():
            if name == "bias":
                target = _cut(total[name], one, other)
                target += sum_to(dx, target.shape)
            else:
                total[name][..., one if name == "q" else other, :] += dx
    return {name: dx.astype(cache.parts[0].dtypes[name], copy=False) for name, dx in total.items()}
