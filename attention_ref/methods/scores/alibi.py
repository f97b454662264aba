r"""Linear biases: a score falls by a fixed amount for every token between query and key.

.. math::

    z_{hts} &= \kappa \tanh(c\, q_{ht} \cdot k_{hs} / \kappa)                  &(1)\\
    z_{hts} &\leftarrow z_{hts} + b_{hts} - m_h\, |t + a - s|                  &(2)\\
    p_{hts} &= e^{z_{hts}} / \textstyle\sum_{s'} e^{z_{hts'}}                  &(3)\\
    o_{ht}  &= \textstyle\sum_s p_{hts}\, v_{hs}                               &(4)

The slope m of a head is :math:`2^{-8 (h+1) / H}` unless it is given; a = S - T when the last query
stands at the last key ("lower_right"), 0 when the first ones meet. There is no other sense of
position: :math:`e^{-m d}` bounds how far a head looks, in tokens, whatever the length.

Source: Press, Smith, Lewis 2022, *Train Short, Test Long*, section 3; official code
fairseq/models/transformer.py (slopes, also for a number of heads that is no power of two); grade A.
"""

import math
from typing import NamedTuple

import numpy as np

from attention_ref import core


class Cache(NamedTuple):
    """What the backward needs, and what implementers compare with (``p``, ``lse``)."""

    q: np.ndarray  # (..., H, T, D), rows with NaN or infinity replaced by zeros
    k: np.ndarray  # (..., H, S, D), likewise
    v: np.ndarray  # (..., H, S, E), likewise
    distance: np.ndarray  # (T, S), tokens between query and key
    capped: np.ndarray  # (..., H, T, S), scores after the softcap, before biases and mask
    p: np.ndarray  # (..., H, T, S), weights
    lse: np.ndarray  # (..., H, T), log of the sum of exponentials, nats; -inf for an empty row
    live: np.ndarray  # (..., T, S), True = may attend
    poison: np.ndarray  # (..., H, T, 1), rows that are NaN
    scale: float
    softcap: float | None
    m_shape: tuple | None
    bias_shape: tuple | None


def alibi_slopes(heads):
    """The slopes of the official code, in nats a token.

    Parameters
    ----------
    heads : int
        H. For a power of two the slopes are 2^(-8/H), 2^(-16/H), ..., 2^-8. Otherwise those of
        the largest power of two below H, then every second slope of twice as many heads.

    Returns
    -------
    list of float
        One slope a head; from head to head steep to flat, and over again for the added ones.
    """
    core.check.count("heads", heads, low=1, unit="heads")
    n = 2 ** (int(heads).bit_length() - 1)
    steps = [*range(2, 2 * n + 1, 2), *range(1, 2 * (heads - n), 2)]
    return [2.0 ** (-4.0 * step / n) for step in steps]


def slopes_forward(m, q, lead):
    """The slopes as an array that broadcasts with the scores.

    Parameters
    ----------
    m : ndarray, shape (..., H), or None
        None gives those of :func:`alibi_slopes`.
    q : ndarray
        For the kind of array and the dtype.
    lead : tuple of int
        Leading axes of the scores, the last one is H; a single head may have none.

    Returns
    -------
    ndarray, shape (..., H, 1, 1), or (1, 1) for a single head
    """
    if m is not None:
        return m[..., None, None]
    heads, shape = (lead[-1], (1, 1, 1)) if lead else (1, (1, 1))
    rows = [np.full_like(q, slope, shape=shape) for slope in alibi_slopes(max(heads, 1))]
    return np.concatenate(rows)[:heads]


def distance_forward(q, k, align):
    """``|t + a - s|`` in the dtype of q, shape (T, S): tokens between each query and each key.

    Parameters
    ----------
    q, k : ndarray, shapes (..., T, D), (..., S, D)
        Only their lengths, dtype and kind count.
    align : {"lower_right", "upper_left"}
        Which corners meet.

    Returns
    -------
    ndarray, shape (T, S)
    """
    queries, keys = q.shape[-2], k.shape[-2]
    first = keys - queries if align == "lower_right" else 0
    t = np.arange(queries, dtype=q.dtype, like=q) + first
    s = np.arange(keys, dtype=q.dtype, like=q)
    return core.absolute(t[:, None] - s[None, :])


def _check(q, k, v, m, options):
    """The checks at the door; the lengths."""
    n = core.check.attention(q, k, v, **options)
    if m is not None:
        core.check.shapes(m=(m, "... H"))
        lead, got = n["..."], tuple(m.shape)
        pairs = zip(got[::-1], lead[::-1], strict=False)
        if len(got) > len(lead) or any(x not in (1, y) for x, y in pairs):
            raise core.errors.ShapeError(
                f"m has shape {got}, expected to broadcast to {lead}, that is (..., H), "
                "the leading axes of q, k, v"
            )
    return n


def alibi_forward(
    q, k, v, m=None, *, mask=None, causal=False, align="lower_right", scale=None, softcap=None,
    bias=None, empty_row="zero",
):  # fmt: skip
    """Mix the values with softmax weights that fall off exponentially with the distance.

    Parameters
    ----------
    q : ndarray, shape (..., H, T, D)
        Queries; without a head axis H is 1.
    k : ndarray, shape (..., H, S, D)
        Keys.
    v : ndarray, shape (..., H, S, E)
        Values.
    m : ndarray, shape (..., H), nats a token, optional
        Slopes; those of :func:`alibi_slopes` by default.
    mask : bool ndarray, broadcast to (..., H, T, S), optional
        True = may attend.
    causal : bool
        Hide the keys behind each query; the paper's models are causal.
    align : {"lower_right", "upper_left"}
        Where the causal diagonal and distance 0 lie when T != S.
    scale : float, dimensionless, optional
        The factor c; 1/sqrt(D) by default.
    softcap : float, > 0, nats, optional
        Bound on the scores before the biases and the mask.
    bias : ndarray, broadcast to (..., H, T, S), nats, optional
        A further bias; -inf gives a weight of 0.
    empty_row : {"zero", "nan", "uniform", "raise"}
        Output of a query that may see no key.

    Returns
    -------
    out : ndarray, shape (..., H, T, E)
        Outputs.
    cache : Cache
        For the backward; holds ``p`` and ``lse``.

    Raises
    ------
    ShapeError
        When widths, lengths or leading axes do not fit.
    DTypeError
        When an argument is no float32 or float64 array, or the mask is not boolean.
    ParameterError
        When an option or a number is outside its domain, or a row is empty under "raise".
    MemoryLimitError
        When the scores would take more than 2 GiB.

    Notes
    -----
    The paper is causal and says nothing of keys ahead; without ``causal`` they count by the same
    distance, as bidirectional models do. The official code and BLOOM add + m s instead: under a
    causal mask that differs by a constant of the row and gives the same weights, but another
    ``lse``. The bias is not multiplied by the scale. It comes after the softcap; some kernels add
    it before. Only differences of places count, so left padding needs a mask and nothing else.
    The slopes are fixed in the paper; when m is given it has a gradient.

    Source
    ------
    scores/alibi in the catalog; section 3 of the paper, official code; grade A.

    References
    ----------
    Press, Smith, Lewis 2022, Train Short, Test Long.

    Examples
    --------
    >>> import numpy as np
    >>> q, k, v = np.zeros((1, 1, 1)), np.zeros((1, 2, 1)), np.array([[[4.0], [8.0]]])
    >>> out, cache = alibi_forward(q, k, v, np.array([np.log(3.0)]), causal=True)
    >>> out.round(12).tolist(), cache.p.round(12).tolist()
    ([[[7.0]]], [[[0.25, 0.75]]])
    """
    n = _check(q, k, v, m, {
        "mask": mask, "bias": bias, "align": align, "scale": scale, "softcap": softcap,
        "empty_row": empty_row,
    })  # fmt: skip
    scale = core.default_scale(n["D"], scale)
    live = core.visible(q, k, mask=mask, causal=causal, align=align, empty_row=empty_row)
    q, k, v, poison = core.quarantine(q, k, v, live, empty_row)

    capped = core.softcap_forward(core.scores_forward(q, k, scale), softcap)  # (1)
    distance = distance_forward(q, k, align)
    linear = -slopes_forward(m, q, n["..."]) * distance
    linear = linear if bias is None else linear + bias
    clean, poison = core.quarantine_bias(linear, live, poison)
    p, lse = core.softmax_forward(capped + clean, live, empty_row)  # (2) (3)
    out = core.mix_forward(p, v)  # (4)

    out = np.where(poison, np.nan, out)
    lse = np.where(poison[..., 0], np.nan, lse)
    shapes = (None if m is None else m.shape, None if bias is None else bias.shape)
    return out, Cache(q, k, v, distance, capped, p, lse, live, poison, scale, softcap, *shapes)


def alibi_backward(dout, cache):
    """Gradients of :func:`alibi_forward`, its steps read from the bottom up.

    Parameters
    ----------
    dout : ndarray, shape (..., H, T, E)
        Gradient of the output.
    cache : Cache
        From the forward.

    Returns
    -------
    dict
        Under "q", "k", "v" and, when given, "m" and "bias".
    """
    q, k, v, distance, capped, p, _, live, poison, scale, softcap, m_shape, bias_shape = cache
    lead = np.broadcast_shapes(p.shape[:-2], v.shape[:-2])
    core.check.cotangent(dout, (*lead, p.shape[-2], v.shape[-1]))
    dout = np.where(poison, 0.0, dout)

    dp, dv = core.mix_backward(dout, p, v)  # (4')
    dz = core.softmax_backward(dp, p, live)  # (3')
    gradients = {} if bias_shape is None else {"bias": core.sum_to(dz, bias_shape)}  # (2')
    if m_shape is not None:
        gradients["m"] = core.sum_to(-np.sum(dz * distance, axis=(-2, -1)), m_shape)
    dz = core.softcap_backward(dz, capped, softcap)
    dq, dk = core.scores_backward(dz, q, k, scale)  # (1')

    return {"q": dq, "k": dk, "v": dv, **gradients}


def _blocks_numba(q, k, m, mask, causal, align, bias, lead):
    """Blocks of queries: their places, distances, both biases together, and who is visible."""
    queries, keys = q.shape[-2], k.shape[-2]
    step = 128 * max(1, 16 // max(math.prod(lead), 1))  # few heads: more work a call
    s, slopes = np.arange(keys), slopes_forward(m, q, lead)
    for first in range(0, max(queries, 1), step):
        rows = slice(first, first + step)
        mine = [
            x[..., rows, :] if x is not None and x.ndim > 1 and x.shape[-2] > 1 else x
            for x in (mask, bias)
        ]
        t = np.arange(queries)[rows, None] + (keys - queries if align == "lower_right" else 0)
        distance = np.abs(t - s).astype(q.dtype)
        linear = -slopes * distance
        linear = linear if bias is None else linear + mine[1]
        seen = mine[0] if not causal else s <= t if mask is None else mine[0] & (s <= t)
        yield rows, distance, linear, seen


def alibi_numba(
    q, k, v, m=None, *, mask=None, causal=False, align="lower_right", bias=None, **options
):
    """The same call by the compiled dense pattern, a block of queries with its bias at a time.

    Parameters
    ----------
    q, k, v, m, mask, causal, align, bias, **options
        As in :func:`alibi_forward`.

    Returns
    -------
    out : ndarray, shape (..., H, T, E)
        Outputs.
    cache : tuple
        For :func:`alibi_numba_backward`: the arguments, no bias of T x S.
    """
    from attention_ref.kernels.numba import decode

    n = core.check.shapes(q=(q, "... T D"), k=(k, "... S D"), v=(v, "... S E"))
    _check(q[..., :1, :], k, v, m, {"align": align})
    core.check.check_mask(mask, (*n["..."], n["T"], n["S"]))
    core.check.check_bias(bias, (*n["..."], n["T"], n["S"]))
    out, pattern = [], (m, mask, causal, align, bias, n["..."])
    for rows, _, linear, seen in _blocks_numba(q, k, *pattern):
        mine = q[..., rows, :]
        part, _ = decode.best(mine, k)(mine, k, v, mask=seen, bias=linear, **options)
        out.append(part)
    return np.concatenate(out, axis=-2), (q, k, v, pattern, options)


def alibi_numba_backward(dout, cache):
    """Gradients of :func:`alibi_numba`; the outputs of a block are made again before them.

    Parameters
    ----------
    dout, cache
        As in :func:`alibi_backward`.

    Returns
    -------
    dict
        As there.
    """
    from attention_ref.kernels.numba import dense

    q, k, v, pattern, options = cache
    m, *_, bias, lead = pattern
    core.check.cotangent(dout, (*lead, q.shape[-2], v.shape[-1]))
    dq, dbias, total = [], [], {}
    for rows, distance, linear, seen in _blocks_numba(q, k, *pattern):
        _, one = dense.forward(q[..., rows, :], k, v, mask=seen, bias=linear, **options)
        found = dense.backward(dout[..., rows, :], one)
        dq.append(found.pop("q"))
        dz = found.pop("bias")
        if m is not None:
            found |= {"m": core.sum_to(-np.sum(dz * distance, axis=(-2, -1)), m.shape)}
        if bias is not None and bias.ndim > 1 and bias.shape[-2] > 1:
            dbias.append(core.sum_to(dz, (*bias.shape[:-2], *dz.shape[-2:-1], bias.shape[-1])))
        elif bias is not None:
            found |= {"bias": core.sum_to(dz, bias.shape)}
        total = {name: total[name] + dx if total else dx for name, dx in found.items()}
    gradients = {"q": np.concatenate(dq, axis=-2), **total}
    return gradients | {"bias": np.concatenate(dbias, axis=-2)} if dbias else gradients


def _heads(rng, kwargs):
    """A batch axis before the axis of length 2, which becomes the heads; slopes in most cases."""
    if kwargs["q"].ndim == 2:
        return {}  # one head
    more = {n: kwargs[n][None] for n in "qkv" if kwargs[n].ndim == 3}
    fixed = "causal" in kwargs and "align" not in kwargs
    return more if fixed else more | {"m": rng.uniform(0.1, 0.9, 2)}


def _example(rng):
    return core.examples.attention(rng, extra=_heads)


def _flat(rng):
    return _example(rng)["softcap"] | {"m": np.zeros(2)}


def _steep(rng):
    return _example(rng)["causal"] | {"m": np.array([0.3, 0.8])}


def _without(kwargs):
    return {n: a for n, a in kwargs.items() if n != "m"}


def _key_side(kwargs):
    """+ m s, the bias of the official code."""
    places = np.arange(kwargs["k"].shape[-2])
    return _without(kwargs) | {"bias": kwargs["m"][:, None, None] * places}


SPEC = core.Mechanism(
    key="scores/alibi",
    forward=alibi_forward,
    backward=alibi_backward,
    numba=core.Backend(alibi_numba, alibi_numba_backward),
    example=_example,
    flags=frozenset(core.SOFTMAX_FLAGS) - {"permutation_equivariant"} | {"positional"},
    reduces_to=(
        core.Reduction("scores/dot_product", "slopes 0 are no bias", _flat, _without),
        core.Reduction("scores/dot_product", "causal: the bias + m s alone", _steep, _key_side),
    ),
    claim=(
        "With equal content scores the mean distance a head attends to tends to 1/(e^m - 1) "
        "tokens, whatever the length; without the bias it grows with the length."
    ),
    verified_by=("slow loop", "PyTorch"),
)
