"""Dense softmax attention around the kernels: what the CPU and the GPU share.

Checks, the flat layout (N, H, T, D), quarantine of non-finite rows, rows without a key, and the
shapes of the gradients. A kernel object has ``dtypes``, ``forward(cache, k, out, lse)`` and
``backward(cache, dout, lse, delta, dq, dk, dv, dbias)``; it fills arrays made here. One with
``quarantines`` set finds non-finite keys by itself. One with ``halves``, names of dtypes of 16
bits, takes those too: q, k, v, out and their gradients are then stored so, all else is float32.

Non-finite numbers: a key whose k or v holds one enters the forward as k = NaN, v = 0, so that a
query that sees it becomes NaN and a query that does not sees the -inf of the mask. In the backward
such keys are zeros and the poisoned queries have no gradient, as in scores/dot_product.
"""

import math
from typing import NamedTuple

import numpy as np

from attention_ref.core import check
from attention_ref.core.errors import DTypeError, ParameterError, ShapeError
from attention_ref.kernels import plan
from attention_ref.kernels.door import expect, float_dtype, prepare, sum_to


class Cache(NamedTuple):
    """What the backward needs; N stands for all leading axes flattened."""

    out: np.ndarray  # (..., H, T, E), as returned
    lse: np.ndarray  # (..., H, T), log of the sum of exponentials, nats; -inf for an empty row
    q: np.ndarray  # (N, H, T, D), rows with NaN or infinity replaced by zeros
    k: np.ndarray  # (N, G, S, D), likewise
    v: np.ndarray  # (N, G, S, E), likewise
    mask: np.ndarray  # (N or 1, H or 1, T or 1, S or 1), bool
    bias: np.ndarray  # likewise, nats
    scale: float
    softcap: float | None
    causal: bool
    shift: int  # query t sees key s when s <= t + shift
    masked: bool
    biased: bool
    empty_row: str
    seen: plan.Seen | None  # a pattern beyond causality; it holds that too
    clean: bool  # k and v hold zeros for rows that are not finite; else the backward sees to it
    shapes: dict  # name -> shape of the argument as given
    dtypes: dict  # name -> dtype of the argument as given


def lengths(cache):
    """N, H, T, S, D, E."""
    batch, heads, queries, width = cache.q.shape
    return batch, heads, queries, cache.k.shape[2], width, cache.v.shape[3]


def strides(x, given):
    """Steps in numbers along N, H, T, S (0 where x broadcasts) and whether it was given at all."""
    steps = [s // x.itemsize if n > 1 else 0 for s, n in zip(x.strides, x.shape, strict=True)]
    return (*steps, int(given))


def _heads(x):
    """At least (H, T, D): an array without a head axis has one head."""
    return x if x.ndim > 2 else x[None]


def _flat(x, lead, dtype, heads=None):
    """(..., H, T, D) -> (N, H, T, D), leading axes broadcast, one head to ``heads`` of them."""
    x = _heads(x)
    inner = (heads or x.shape[-3], *x.shape[-2:])
    if x.shape != lead + inner:
        x = np.broadcast_to(x, lead + inner)  # read-only, so prepare copies it
    return prepare(x.reshape(math.prod(lead), *inner), dtype)


def _thin(name, x, lead, inner, dtype, q):
    """A mask or bias as (N or 1, H or 1, T or 1, S or 1): axes it broadcasts over stay thin."""
    if x is None:
        return np.ones_like(q, shape=(1, 1, 1, 1), dtype=dtype)
    expect(name, x, lead + inner, "(..., H, T, S)")
    x = x.reshape((1,) * (len(lead) + 3 - x.ndim) + x.shape)
    if any(n != 1 for n in x.shape[:-3]):
        x = np.broadcast_to(x, lead + x.shape[-3:])
    return prepare(x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:]), dtype)


def _dtypes(kernel, q, k, v, bias):
    """The dtype in which q, k, v are stored, and that of the sums, lse and the bias."""
    halves = getattr(kernel, "halves", ())
    names = [getattr(getattr(x, "dtype", None), "name", None) for x in (q, k, v)]
    if any(n in halves for n in names):
        if len(set(names)) > 1:
            raise DTypeError(f"q, k, v have dtypes {', '.join(map(str, names))}, expected one")
        if bias is not None and bias.dtype.name not in ("float32", names[0]):
            raise DTypeError(f"bias has dtype {bias.dtype}, expected float32 or {names[0]}")
        return q.dtype.newbyteorder("="), np.dtype(np.float32)
    if halves and "uint16" in names:
        raise DTypeError(
            f"q, k, v have dtypes {', '.join(map(str, names))}, expected floating-point numbers; "
            "hint: bits of bfloat16 are x.view(ml_dtypes.bfloat16)"
        )
    dtype = float_dtype(q=q, k=k, v=v, bias=bias)
    if dtype not in kernel.dtypes:
        takes = " or ".join(map(str, (*kernel.dtypes, *halves)))
        raise DTypeError(f"q, k, v promote to {dtype}, this kernel takes {takes}; hint: .astype()")
    return dtype, dtype


def _arrange(q, k, v, mask, bias, dtype, sums):
    """Check the shapes, flatten the leading axes."""
    for name, x in {"q": q, "k": k, "v": v}.items():
        if x.ndim < 2:
            raise ShapeError(f"{name} has shape {x.shape}, expected at least 2 axes")
    heads, groups = _heads(q).shape[-3], _heads(k).shape[-3]
    (queries, width), keys = q.shape[-2:], k.shape[-2]
    if k.shape[-1] != width or v.shape[-2] != keys or _heads(v).shape[-3] != groups:
        raise ShapeError(
            f"k has shape {k.shape} and v {v.shape}, expected (..., G, S, D) and (..., G, S, E) "
            f"for q of shape {q.shape}"
        )
    heads = groups if heads == 1 else heads  # one query head meets every key head
    if not groups or heads % groups:
        raise ShapeError(f"q has H = {heads} heads, k has G = {groups}, expected a multiple")
    if mask is not None:
        check.boolean("mask", mask)
    lead = np.broadcast_shapes(*(_heads(x).shape[:-3] for x in (q, k, v)))
    mask = _thin("mask", mask, lead, (heads, queries, keys), np.bool_, q)
    bias = _thin("bias", bias, lead, (heads, queries, keys), sums, q)
    q = _flat(q, lead, dtype, heads)
    k, v = (_flat(x, lead, dtype) for x in (k, v))
    return q, k, v, mask, bias, lead


def _finite_rows(x):
    """True for rows without NaN and infinity; None when all are."""
    return None if np.isfinite(x).all() else np.isfinite(x).all(axis=-1, keepdims=True)


def _where(keep, x, value):
    """x where ``keep`` holds, else a number, in x's dtype.

    Numbers of 16 bits go through float32 and back, which changes none: CuPy has no ``where`` for
    bfloat16.
    """
    y = x.astype(np.float32) if x.dtype.itemsize == 2 else x
    return np.where(keep, y, y.dtype.type(value)).astype(x.dtype, copy=False)


def forward(kernel, q, k, v, mask, causal, align, scale, softcap, bias, empty_row, seen=None):
    """Softmax attention without ever holding the scores.

    Parameters
    ----------
    kernel : object
        The launches, see the head of this file; the wrappers fill it in.
    q : ndarray, shape (..., H, T, D)
        Queries; with two axes, one head.
    k, v : ndarray, shapes (..., G, S, D), (..., G, S, E)
        Keys and values; query head h uses key head h // (H // G).
    mask, causal, align, scale, softcap, bias, empty_row
        As in ``scores/dot_product``.
    seen : plan.Seen, optional
        A pattern; ``causal`` and ``align`` then say nothing.

    Returns
    -------
    out : ndarray, shape (..., H, T, E)
        Outputs.
    cache : Cache
        For :func:`backward`; holds ``lse``.
    """
    check.option("align", align, check.ALIGNMENTS)
    check.option("empty_row", empty_row, check.EMPTY_ROWS)
    check.number("scale", scale)
    check.number("softcap", softcap, low=0, open_low=True)
    given = {"q": q, "k": k, "v": v, **({} if bias is None else {"bias": bias})}
    masked, biased = mask is not None, bias is not None
    headed = max(q.ndim, k.ndim) > 2
    dtype, sums = _dtypes(kernel, q, k, v, bias)
    q, k, v, mask, bias, lead = _arrange(q, k, v, mask, bias, dtype, sums)
    (batch, heads, queries, width), keys, depth = q.shape, k.shape[2], v.shape[3]

    raw = getattr(kernel, "quarantines", False)
    good = (None, None) if raw else (_finite_rows(k), _finite_rows(v))
    marked = k
    if good[0] is not None or good[1] is not None:
        both = np.logical_and(*(True if g is None else g for g in good))
        marked = _where(both, k, np.nan)
        k, v = (
            x if g is None else _where(g, x, 0)
            for x, g in zip((k, v), good, strict=True)
        )  # fmt: skip
    out = np.empty_like(q, shape=(batch, heads, queries, depth))
    lse = np.empty_like(q, shape=(batch, heads, queries), dtype=sums)
    shape = (*lead, heads, queries) if headed else (queries,)
    cache = Cache(
        out.reshape(*shape, depth), lse.reshape(shape), q, k, v, mask, bias,
        1.0 / math.sqrt(width) if scale is None else float(scale), softcap, bool(causal),
        keys - queries if align == "lower_right" else 0, masked, biased, empty_row,
        seen, not raw, {name: x.shape for name, x in given.items()},
        {name: x.dtype for name, x in given.items()},
    )  # fmt: skip
    kernel.forward(cache, marked, out, lse)
    good_q = _finite_rows(q)
    if good_q is not None:  # scores of -inf alone would look like a row without keys
        lost = ~good_q[..., 0] & _has_key(cache, lse)
        out[lost], lse[lost] = np.nan, np.nan
        cache = cache._replace(q=_where(good_q, q, 0))
    if empty_row != "zero":
        empty = (lse == -np.inf) & _without_key(cache, lse)
        _fill_empty_rows(out, lse, empty, marked, v, heads // max(k.shape[1], 1), empty_row)
    return cache.out, cache


def _has_key(c, lse):
    """Rows (N, H, T) to which mask, causality or pattern leave a key; a bias says nothing here."""
    _, _, queries, keys, _, _ = lengths(c)
    s = np.arange(keys, like=lse)
    if c.seen is None:
        place = np.arange(queries, like=lse)[:, None] + c.shift
        seen = c.mask & (s <= (place if c.causal else keys))
    else:
        low, high = (np.asarray(x, like=lse)[:, None, :, None] for x in c.seen[:2])
        seen = c.mask & (s >= low) & (s < high)
        if c.seen.blocks is not None:
            wide = np.repeat(np.repeat(c.seen.blocks, c.seen.block, -2), c.seen.block, -1)
            seen = seen & np.asarray(wide[..., :queries, :keys], like=lse)
    return np.broadcast_to(np.any(seen, axis=-1), lse.shape)


def _without_key(c, lse):
    """Rows without a key, among those whose weights are all 0: -inf in a bias is still a key."""
    return ~_has_key(c, lse) if c.biased else np.ones_like(lse, dtype=bool)


def _fill_empty_rows(out, lse, empty, k, v, share, empty_row):
    """Queries without a key: zeros are there already, the other choices are written here."""
    if not empty.any():
        return
    if empty_row == "raise":
        raise ParameterError(
            "mask leaves at least one query without a key, expected none with "
            "empty_row='raise'; hint: empty_row='zero' gives such rows zeros"
        )
    fill_with = np.full_like(v[:, :, :1], np.nan)
    if empty_row == "uniform" and v.shape[2]:
        good = (np.isfinite(x).all(axis=(2, 3), keepdims=True) for x in (k, v))
        poison = ~np.logical_and(*good)
        mean = v.astype(lse.dtype, copy=False).mean(axis=2, keepdims=True)
        fill_with = np.where(poison, np.nan, mean).astype(out.dtype, copy=False)
    fill_with = np.broadcast_to(np.repeat(fill_with, share, axis=1), out.shape)
    out[empty] = fill_with[empty]
    lost = np.isnan(fill_with).any(axis=-1) | (empty_row == "nan")
    lse[empty & lost] = np.nan  # so that no gradient passes there


def backward(kernel, dout, cache, dlse):
    """Gradients of :func:`forward`.

    Parameters
    ----------
    kernel : object
        As in :func:`forward`.
    dout : ndarray, shape (..., H, T, E)
        Gradient of the output.
    cache : Cache
        From the forward.
    dlse : ndarray, shape (..., H, T), optional
        Gradient of ``cache.lse``.

    Returns
    -------
    dict
        Under "q", "k", "v" and, when a bias was given, "bias".
    """
    c = cache
    batch, heads, queries, keys, _, depth = lengths(c)
    if dout.shape != c.out.shape:
        raise ShapeError(f"dout has shape {dout.shape}, expected {c.out.shape}, that of the output")
    dtype, sums = c.q.dtype, c.lse.dtype
    out, lse = c.out.reshape(*c.q.shape[:3], depth), c.lse.reshape(c.q.shape[:3])
    dout = prepare(dout, dtype).reshape(out.shape)
    empty, poison = lse == -np.inf, np.isnan(lse)
    if poison.any():
        dout = _where(~poison[..., None], dout, 0)
        out = _where(~poison[..., None], out, 0)
    pair = (x.astype(sums, copy=False) for x in (dout, out))
    delta = np.einsum("nhte,nhte->nht", *pair)
    if dlse is not None:
        delta -= np.where(empty | poison, sums.type(0), np.reshape(dlse, delta.shape))
    lse = np.where(empty | poison, sums.type(np.inf), lse)  # their weights are exp(-inf) = 0

    if not c.clean:
        k, v = (x if g is None else _where(g, x, 0)
                for x, g in ((x, _finite_rows(x)) for x in (c.k, c.v)))  # fmt: skip
        c = c._replace(k=k, v=v)
    dq, dk, dv = np.empty_like(c.q), np.empty_like(c.k), np.empty_like(c.v)
    full = (batch, heads, queries, keys) if c.biased else (1, 1, 1, 1)
    dbias = np.zeros_like(c.q, shape=full, dtype=sums)
    kernel.backward(c, dout, lse, delta, dq, dk, dv, dbias)
    if c.empty_row == "uniform" and empty.any():
        empty = empty & _without_key(c, lse)
        spread = np.where(empty[..., None], dout.astype(sums, copy=False), sums.type(0))
        spread, groups = spread.sum(axis=2, keepdims=True) / keys, c.k.shape[1]
        spread = spread.reshape(batch, groups, heads // groups, 1, depth).sum(axis=2)
        dv = (dv.astype(sums, copy=False) + spread).astype(dtype, copy=False)
    gradients = {"q": dq, "k": dk, "v": dv, **({"bias": dbias} if c.biased else {})}
    return {name: _give_back(dx, c, name) for name, dx in gradients.items()}


def _give_back(dx, cache, name):
    """From (N, H, T, D) to the shape and dtype the argument had."""
    shape = cache.shapes[name]
    lead = cache.out.shape[: max(cache.out.ndim - 3, 0)]
    dx = dx.reshape(*lead, *dx.shape[1:])
    if dx.shape != shape:
        dx = dx.astype(cache.lse.dtype, copy=False)
    dx = sum_to(dx, shape) if len(shape) <= dx.ndim else dx.reshape(shape)
    return dx.astype(cache.dtypes[name], copy=False)
