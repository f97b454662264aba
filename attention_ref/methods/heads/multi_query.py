r"""Multi-query and grouped-query attention: H query heads share G heads of keys and values.

.. math::

    g(h) &= \lfloor h / (H / G) \rfloor                                                &(1)\\
    z_{hts} &= \kappa \tanh(c\, q_{ht} \cdot k_{g(h) s} / \kappa) + b_{hts}            &(2)\\
    p_{hts} &= e^{z_{hts}} / \textstyle\sum_{s'} e^{z_{hts'}}                          &(3)\\
    o_{ht} &= \textstyle\sum_s p_{hts}\, v_{g(h) s}                                    &(4)

G = 1 is multi-query attention, G = H multi-head attention, anything between grouped-query
attention. The memory of past keys and values, and the time to read it, fall by the factor H/G.

Source: Shazeer 2019, *Fast Transformer Decoding*, section 3; Ainslie et al. 2023, *GQA*,
section 2 (groups of consecutive heads, conversion by the mean); grade C (well known).
"""

from typing import NamedTuple

import numpy as np

from attention_ref import core


class Cache(NamedTuple):
    """What the backward needs, and what implementers compare with (``p``, ``lse``)."""

    q: np.ndarray  # (..., G, H/G, T, D), rows with NaN or infinity replaced by zeros
    k: np.ndarray  # (..., G, 1, S, D), likewise
    v: np.ndarray  # (..., G, 1, S, E), likewise
    capped: np.ndarray  # (..., G, H/G, T, S), scores after the softcap, before bias and mask
    p: np.ndarray  # (..., H, T, S), weights
    lse: np.ndarray  # (..., H, T), log of the sum of exponentials, nats; -inf for an empty row
    live: np.ndarray  # (T, S) or (..., G, H/G, T, S), True = may attend
    poison: np.ndarray  # (..., G, H/G, T, 1), rows that are NaN
    scale: float
    softcap: float | None
    bias_shape: tuple | None


def split_forward(x, groups):
    """Heads to groups: (..., H, T, S) -> (..., G, H/G, T, S), one head to (..., 1, 1, T, S).

    Parameters
    ----------
    x : ndarray
        With a head axis of length H or 1 at -3, or without any.
    groups : int
        G.

    Returns
    -------
    ndarray
    """
    if x.ndim < 3:
        return x
    heads = x.shape[-3]
    parts = (groups, heads // groups) if heads % groups == 0 else (1, 1)
    return np.reshape(x, (*x.shape[:-3], *parts, *x.shape[-2:]))


def split_backward(dx, shape):
    """Groups to heads: the inverse of :func:`split_forward`, also used forward.

    Parameters
    ----------
    dx : ndarray, shape (..., G, H/G, T, S)
        What to merge.
    shape : tuple of int
        The shape before the split.

    Returns
    -------
    ndarray
    """
    return np.reshape(dx, shape)


def _check(q, k, v, mask, bias, align, scale, softcap, empty_row):
    """The checks of ``core.check.attention`` for two numbers of heads; the lengths by letter."""
    n = core.check.shapes(q=(q, "... H T D"), k=(k, "... G S D"), v=(v, "... G S E"))
    if n["G"] == 0 or n["H"] % n["G"]:
        raise core.errors.ShapeError(
            f"k has G = {n['G']} heads in shape {tuple(k.shape)}, expected a divisor of the "
            f"H = {n['H']} heads of q {tuple(q.shape)}"
        )
    if n["D"] == 0:
        raise core.errors.ShapeError(f"q has width D = 0 in shape {tuple(q.shape)}")
    full = (*n["..."], n["H"], n["T"], n["S"])
    core.check.check_mask(mask, full, axes="(..., H, T, S)")
    core.check.check_bias(bias, full, axes="(..., H, T, S)")
    core.check.option("align", align, core.check.ALIGNMENTS)
    core.check.option("empty_row", empty_row, core.check.EMPTY_ROWS)
    core.check.number("scale", scale)
    core.check.number("softcap", softcap, low=0, open_low=True)
    core.check.memory(full, q.dtype)
    return n


def multi_query_forward(
    q, k, v, *, mask=None, causal=False, align="lower_right", scale=None, softcap=None,
    bias=None, empty_row="zero",
):  # fmt: skip
    """Softmax attention of H query heads over G heads of keys and values.

    Parameters
    ----------
    q : ndarray, shape (..., H, T, D)
        Queries.
    k : ndarray, shape (..., G, S, D)
        Keys; G divides H, and query head h reads group h // (H // G).
    v : ndarray, shape (..., G, S, E)
        Values.
    mask : bool ndarray, broadcast to (..., H, T, S), optional
        True = may attend.
    causal : bool
        Hide the keys behind each query.
    align : {"lower_right", "upper_left"}
        Where the causal diagonal lies when T != S.
    scale : float, dimensionless, optional
        The factor c; 1/sqrt(D) by default.
    softcap : float, > 0, nats, optional
        Bound on the scores before bias and mask.
    bias : ndarray, broadcast to (..., H, T, S), nats, optional
        Added to the scores after the softcap; -inf gives a weight of 0.
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
        When widths, lengths or leading axes do not fit, or G does not divide H.
    DTypeError
        When an argument is no float32 or float64 array, or the mask is not boolean.
    ParameterError
        When an option or a number is outside its domain, or a row is empty under "raise".
    MemoryLimitError
        When the scores would take more than 2 GiB.

    Notes
    -----
    Keys and values are never repeated in memory: the queries are seen as (G, H/G) heads and each
    group broadcasts. Consecutive heads share a group (0, 0, 1, 1), as in the paper and in
    PyTorch's ``enable_gqa``; some tensor-parallel codes interleave (0, 1, 0, 1).

    Source
    ------
    heads/multi_query in the catalog; both papers; grade C.

    References
    ----------
    Shazeer 2019, Fast Transformer Decoding. Ainslie et al. 2023, GQA.

    Examples
    --------
    >>> import numpy as np
    >>> q = np.array([[[0.0]], [[1.0]]])
    >>> k = np.array([[[0.0], [np.log(3.0)]]])
    >>> v = np.array([[[0.0], [4.0]]])
    >>> out, cache = multi_query_forward(q, k, v)
    >>> out.round(12).tolist()
    [[[2.0]], [[3.0]]]
    """
    n = _check(q, k, v, mask, bias, align, scale, softcap, empty_row)
    scale, groups = core.default_scale(n["D"], scale), n["G"]
    q, k, v = split_forward(q, groups), k[..., :, None, :, :], v[..., :, None, :, :]  # (1)
    mask = None if mask is None else split_forward(mask, groups)
    live = core.visible(q, k, mask=mask, causal=causal, align=align, empty_row=empty_row)
    q, k, v, poison = core.quarantine(q, k, v, live, empty_row)

    z = capped = core.softcap_forward(core.scores_forward(q, k, scale), softcap)  # (2)
    if bias is not None:
        clean, poison = core.quarantine_bias(split_forward(bias, groups), live, poison)
        z = z + clean
    p, lse = core.softmax_forward(z, live, empty_row)  # (3)
    out = core.mix_forward(p, v)  # (4)

    out = np.where(poison, np.nan, out)
    lse = np.where(poison[..., 0], np.nan, lse)
    out, p = (np.reshape(x, (*x.shape[:-4], n["H"], *x.shape[-2:])) for x in (out, p))
    lse = np.reshape(lse, (*lse.shape[:-3], n["H"], n["T"]))
    bias_shape = None if bias is None else bias.shape
    return out, Cache(q, k, v, capped, p, lse, live, poison, scale, softcap, bias_shape)


def multi_query_backward(dout, cache):
    """Gradients of :func:`multi_query_forward`: those of a group sum over its H/G heads.

    Parameters
    ----------
    dout : ndarray, shape (..., H, T, E)
        Gradient of the output.
    cache : Cache
        From the forward.

    Returns
    -------
    dict
        Under "q", "k", "v" and, when a bias was given, "bias".
    """
    q, k, v, capped, p, _, live, poison, scale, softcap, bias_shape = cache
    lead = np.broadcast_shapes(p.shape[:-3], v.shape[:-4])
    core.check.cotangent(dout, (*lead, *p.shape[-3:-1], v.shape[-1]))
    p = np.reshape(p, (*p.shape[:-3], *capped.shape[-4:]))
    dout = np.reshape(dout, (*lead, *p.shape[-4:-1], v.shape[-1]))
    dout = np.where(poison, 0.0, dout)

    dp, dv = core.mix_backward(dout, p, v)  # (4')
    dz = core.softmax_backward(dp, p, live)  # (3')
    gradients = {}  # (2')
    if bias_shape is not None:
        split = _split_shape(bias_shape, capped.shape[-4])
        gradients = {"bias": split_backward(core.sum_to(dz, split), bias_shape)}
    dz = core.softcap_backward(dz, capped, softcap)
    dq, dk = core.scores_backward(dz, q, k, scale)
    dq = split_backward(dq, (*q.shape[:-4], q.shape[-4] * q.shape[-3], *q.shape[-2:]))  # (1')

    return {"q": dq, "k": dk[..., 0, :, :], "v": dv[..., 0, :, :], **gradients}


def _split_shape(shape, groups):
    """The shape that :func:`split_forward` gives."""
    if len(shape) < 3:
        return shape
    parts = (groups, shape[-3] // groups) if shape[-3] % groups == 0 else (1, 1)
    return (*shape[:-3], *parts, *shape[-2:])


def multi_query_convert(w, groups):
    """Turn the key or value projections of H heads into those of G groups: the mean of each.

    Parameters
    ----------
    w : ndarray, shape (..., H, C, D)
        One matrix a head; consecutive heads form a group.
    groups : int
        G, a divisor of H.

    Returns
    -------
    ndarray, shape (..., G, C, D)
        Where to begin further training.
    """
    n = core.check.shapes(w=(w, "... H C D"))
    core.check.count("groups", groups, low=1)
    if n["H"] % groups:
        raise core.errors.ParameterError(f"groups is {groups}, expected a divisor of H = {n['H']}")
    return np.mean(split_forward(w, groups), axis=-3)


def multi_query_cache_bytes(layers, groups, width, itemsize=2):
    """Bytes that the keys and values of one past token take.

    Parameters
    ----------
    layers, groups, width : int
        Layers of the model, G, and D = E.
    itemsize : int, bytes
        Of one number; 2 for half precision.

    Returns
    -------
    int, bytes
    """
    return 2 * layers * groups * width * itemsize


HEADS = {"plain": (2, 4, 2), "mask": (1, 4, 1), "bias": (1, 2, 2), "batch": (2, 4, 2)}
"""Case -> batch, H, G of the example; (1, 4, 2) elsewhere."""


def _example(rng):
    cases = core.examples.attention(rng, scale=False)
    for name, kwargs in cases.items():
        batch, heads, groups = HEADS.get(name, (1, 4, 2))
        for n, many in (("q", heads), ("k", groups), ("v", groups)):
            kwargs[n] = rng.standard_normal((batch, many, *kwargs[n].shape[-2:]))
        T, S = kwargs["q"].shape[-2], kwargs["k"].shape[-2]
        if name == "mask":
            kwargs["mask"] = rng.random((1, 4, T, S)) < 0.6
            kwargs["mask"][0, 1, 2] = False
        if name == "softcap":
            kwargs["mask"], kwargs["bias"] = rng.random((4, T, S)) < 0.7, kwargs["bias"][:1]
        if name != "no-heads":
            kwargs["scale"] = core.examples.DEFAULT_SCALE
    cases["one-group"] = cases.pop("no-heads")
    cases["one-group"] |= {n: cases["one-group"][n][:, :1] for n in ("k", "v")}
    return cases


def _repeated(kwargs):
    times = kwargs["q"].shape[-3] // kwargs["k"].shape[-3]
    return kwargs | {n: np.repeat(kwargs[n], times, axis=-3) for n in ("k", "v")}


def _drawn(groups):
    def kwargs(rng):
        q, kv = core.examples.qkv(rng, lead=(2, 4)), core.examples.qkv(rng, lead=(2, groups))
        return {"q": q["q"], "k": kv["k"], "v": kv["v"], "causal": True, "scale": 0.7}

    return kwargs



def multi_query_numba(q, k, v, **options):
    """The same call by the compiled dense pattern, which reads a key head once for its group.

    Parameters
    ----------
    q, k, v, **options
        As in :func:`multi_query_forward`.

    Returns
    -------
    out : ndarray, shape (..., H, T, E)
        Outputs.
    cache : NamedTuple
        For :func:`multi_query_numba_backward`.
    """
    from attention_ref.kernels.numba import decode

    return decode.best(q, k)(q, k, v, **options)


def multi_query_numba_backward(dout, cache):
    """Gradients of :func:`multi_query_numba`.

    Parameters
    ----------
    dout, cache
        As in :func:`multi_query_backward`.

    Returns
    -------
    dict
        As there.
    """
    from attention_ref.kernels.numba import dense

    return dense.backward(dout, cache)


SPEC = core.Mechanism(
    key="heads/multi_query",
    forward=multi_query_forward,
    backward=multi_query_backward,
    numba=core.Backend(multi_query_numba, multi_query_numba_backward),
    example=_example,
    flags=frozenset(core.SOFTMAX_FLAGS),
    reduces_to=(
        core.Reduction(
            key="scores/dot_product",
            says="G = H is softmax attention head by head",
            kwargs=_drawn(4),
            other=dict,
        ),
        core.Reduction(
            key="scores/dot_product",
            says="G = 2 is softmax attention with every key head repeated",
            kwargs=_drawn(2),
            other=_repeated,
        ),
    ),
    claim=(
        "Converting multi-head attention whose heads come in clusters to one key head a cluster "
        "by the mean loses less than keeping one head of each, and less than random heads."
    ),
    verified_by=("slow loop", "PyTorch", "JAX"),
)
