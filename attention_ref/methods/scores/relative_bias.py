r"""Relative position scores: the distance of key and query is scored beside their product.

.. math::

    i_{ts} &= \text{index of the distance } r_{ts} = s - t - a                              &(1)\\
    g_{tn} &= c\, (q_t + w) \cdot \rho_n + \beta_n                                          &(2)\\
    z_{ts} &= c\, (q_t + u) \cdot k_s + g_{t, i_{ts}} + b_{ts}                              &(3)\\
    p_{ts} &= e^{z_{ts}} / \textstyle\sum_{s'} e^{z_{ts'}}, \qquad
    P_{tn} = \textstyle\sum_{s:\, i_{ts} = n} p_{ts}                                        &(4)\\
    o_t    &= \textstyle\sum_s p_{ts}\, v_s + \sum_n P_{tn}\, a^V_n                         &(5)

with a = S - T when the last query stands at the last key ("lower_right"), else 0. Of u, w, rho,
beta and :math:`a^V` each variant has some: *shaw* clips r to [-K, K] and learns
:math:`\rho = a^K` and :math:`a^V`; *transformer_xl* has a sinusoid R for every distance,
:math:`\rho = R W_r`, and learns :math:`W_r`, u and w; *t5* learns one number :math:`\beta_n` for
each bucket of distances and drops the scale, c = 1. Only differences of places enter, so the same
parameters serve every length.

Source: Shaw et al. 2018, section 3; Dai et al. 2019, section 3.3; Raffel et al. 2020, section 2.1;
official code tensor2tensor/layers/common_attention.py, kimiyoung/transformer-xl tf/model.py,
mesh_tensorflow/transformer/transformer_layers.py; grade A.
"""

import math
from typing import NamedTuple

import numpy as np

from attention_ref import core

VARIANTS = {"shaw": ("aK", "aV"), "transformer_xl": ("Wr", "u", "w"), "t5": ("table",)}
"""The parameters of each variant; the first one is required."""


class Cache(NamedTuple):
    """What the backward needs, and what implementers compare with (``p``, ``lse``, ``place``)."""

    q: np.ndarray  # (..., H, T, D), rows with NaN or infinity replaced by zeros
    k: np.ndarray  # (..., H, S, D), likewise
    v: np.ndarray  # (..., H, S, E), likewise
    u: np.ndarray  # (..., D), zeros unless given
    w: np.ndarray  # (..., D), likewise
    aV: np.ndarray | None  # (..., N, E)
    place: np.ndarray  # (T, S), int, the index i of (1)
    rows: np.ndarray  # (..., H, N, D), rho of (2)
    sinusoid: np.ndarray | None  # (N, M), R; None but for transformer_xl
    pooled: np.ndarray | None  # (..., H, T, N), P of (4); None without aV
    p: np.ndarray  # (..., H, T, S), weights
    lse: np.ndarray  # (..., H, T), log of the sum of exponentials, nats; -inf for an empty row
    live: np.ndarray  # (..., T, S), True = may attend
    poison: np.ndarray  # (..., H, T, 1), rows that are NaN
    scale: float
    shapes: dict  # of the arguments that were given, by name


def t5_bucket(r, buckets=32, max_distance=128, bidirectional=True):
    """Bucket of a distance: near distances have one each, far ones share, on a log scale.

    Bucket e + j of one direction begins where ln(n / e) / ln(max_distance / e) reaches j / m, with
    e + m buckets and e = m or m - 1: at the first n with n^m e^j >= max_distance^j e^m, compared
    as integers.

    Parameters
    ----------
    r : int ndarray, tokens
        Place of the key minus place of the query.
    buckets : int
        Their number; with ``bidirectional`` the second half is for keys after the query.
    max_distance : int, tokens
        From here on all distances share the last bucket.
    bidirectional : bool
        Without it keys after the query count as distance 0.

    Returns
    -------
    int ndarray, like r
    """
    half = buckets // 2 if bidirectional else buckets
    far = core.absolute(r) if bidirectional else np.maximum(-r, 0)
    e, m, L = half // 2, half - half // 2, max_distance
    bucket = np.minimum(far, e)
    for j in range(1, m):
        edge = next(n for n in range(e, L + 1) if n**m * e**j >= L**j * e**m)
        bucket = bucket + np.where(far >= edge, 1, 0)
    return bucket + np.where(r > 0, half, 0) if bidirectional else bucket


def sinusoid_forward(distance, width):
    """R: the sines of d / 10000^(2m/M) for m < M/2, then the cosines.

    Parameters
    ----------
    distance : ndarray, shape (N,), tokens
        Place of the query minus place of the key.
    width : int
        M.

    Returns
    -------
    ndarray, shape (N, M)
    """
    steps = np.arange(width // 2, dtype=distance.dtype, like=distance)
    angle = distance[:, None] * np.exp(steps * (-2.0 * math.log(10000.0) / width))
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=-1)


def rows_forward(q, k, align, given, variant, bidirectional, max_distance):
    """Step (1), and the rows of step (2) with the sinusoid they are made of.

    Parameters
    ----------
    q, k : ndarray
        Only their lengths, dtype and kind count.
    given : dict
        The variant's parameters.
    align, variant, bidirectional, max_distance
        As in :func:`relative_bias_forward`.

    Returns
    -------
    place : int ndarray, shape (T, S)
        Index of every pair.
    rows : ndarray, shape (..., N, D)
        rho; zeros for t5.
    sinusoid : ndarray, shape (N, M), or None
        R.
    """
    queries, keys = q.shape[-2], k.shape[-2]
    first = keys - queries if align == "lower_right" else 0
    r = np.arange(keys, like=q) - np.arange(queries, like=q)[:, None] - first
    if variant == "shaw":
        K = given["aK"].shape[-2] // 2
        return np.clip(r, -K, K) + K, given["aK"], None
    if variant == "t5":
        rows = np.zeros_like(q, shape=(given["table"].shape[-1], q.shape[-1]))
        return t5_bucket(r, rows.shape[0], max_distance, bidirectional), rows, None
    far = np.arange(max(queries + keys - 1, 0), dtype=q.dtype, like=q) + (first - keys + 1)
    sinusoid = sinusoid_forward(far, given["Wr"].shape[-2])
    return keys - 1 - first - r, sinusoid @ given["Wr"], sinusoid


def gather_forward(g, place):
    """From every query's list of indices to its keys.

    Parameters
    ----------
    g : ndarray, shape (..., T, N)
        A number for each index.
    place : int ndarray, shape (T, S)
        Index of every pair.

    Returns
    -------
    ndarray, shape (..., T, S)
    """
    return g[..., np.arange(place.shape[0], like=place)[:, None], place]


def gather_backward(x, place, size):
    """Sum what stands at the keys of equal index; the forward takes P of (4) from it too.

    Parameters
    ----------
    x : ndarray, shape (..., T, S)
        A number for each pair.
    place : int ndarray, shape (T, S)
        Index of every pair.
    size : int
        N.

    Returns
    -------
    ndarray, shape (..., T, N)
    """
    sums = [np.sum(np.where(place == n, x, 0.0), axis=-1) for n in range(size)]
    return np.stack(sums, axis=-1)


def _check(q, k, v, given, variant, max_distance, bidirectional, options):
    """The checks at the door; the width D."""
    n = core.check.attention(q, k, v, **options)
    core.check.option("variant", variant, VARIANTS)
    core.check.count("max_distance", max_distance, low=2, unit="tokens")
    first, *rest = VARIANTS[variant]
    if first not in given or set(given) - {first, *rest}:
        raise core.errors.ParameterError(
            f"variant is {variant!r} with {list(given)}, expected {first}, optionally {rest}"
        )
    axes = {"aK": "... N D", "aV": "... N E", "Wr": "... M D", "table": "... N"}
    axes = {name: (x, axes.get(name, "... D")) for name, x in given.items()}
    core.check.shapes(q=(q, "... T D"), v=(v, "... S E"), **axes)
    size, least = given[first].shape[-1 if variant == "t5" else -2], 4 if bidirectional else 2
    good = {"shaw": size % 2 == 1, "transformer_xl": size > size % 2 == 0}
    if not good.get(variant, least <= size < least * max_distance):
        raise core.errors.ShapeError(
            f"{first} has shape {tuple(given[first].shape)}, expected 2 K + 1 rows (shaw), an even "
            f"number (transformer_xl), {least} to {least * max_distance - 1} buckets (t5)"
        )
    return n["D"]


def relative_bias_forward(
    q, k, v, aK=None, aV=None, Wr=None, u=None, w=None, table=None, *, variant="shaw",
    bidirectional=None, max_distance=128, mask=None, causal=False, align="lower_right", scale=None,
    bias=None, empty_row="zero",
):  # fmt: skip
    """Mix the values with softmax weights of content plus distance.

    Parameters
    ----------
    q : ndarray, shape (..., H, T, D)
        Queries; the head axis may be absent.
    k : ndarray, shape (..., H, S, D)
        Keys.
    v : ndarray, shape (..., H, S, E)
        Values.
    aK : ndarray, shape (..., 2 K + 1, D)
        shaw: a vector for each clipped distance, added to the keys. The row K is distance 0, the
        rows after it belong to keys after the query.
    aV : ndarray, shape (..., 2 K + 1, E), optional
        shaw: the same for the values.
    Wr : ndarray, shape (..., H, M, D)
        transformer_xl: projection of the sinusoid, of even width M.
    u, w : ndarray, shape (..., H, D), optional
        transformer_xl: what all queries share when they meet content, and distance; 0 by default.
    table : ndarray, shape (..., H, N), nats
        t5: a bias for each bucket.
    variant : {"shaw", "transformer_xl", "t5"}
        Which of them.
    bidirectional : bool, optional
        t5: buckets for both directions; by default without ``causal`` only.
    max_distance : int, tokens
        t5: from here on all distances share the last bucket.
    mask : bool ndarray, broadcast to (..., H, T, S), optional
        True = may attend.
    causal : bool
        Hide the keys behind each query.
    align : {"lower_right", "upper_left"}
        Where the causal diagonal and distance 0 lie when T != S.
    scale : float, dimensionless, optional
        The factor c; 1/sqrt(D) by default, 1 for t5.
    bias : ndarray, broadcast to (..., H, T, S), nats, optional
        A further bias; -inf gives a weight of 0.
    empty_row : {"zero", "nan", "uniform", "raise"}
        Output of a query that may see no key; aV adds nothing to it.

    Returns
    -------
    out : ndarray, shape (..., H, T, E)
        Outputs.
    cache : Cache
        For the backward; holds ``place``, ``p`` and ``lse``.

    Raises
    ------
    ShapeError
        When widths, lengths or leading axes do not fit, or the number of rows or buckets.
    DTypeError
        When an argument is no float32 or float64 array, or the mask is not boolean.
    ParameterError
        When an option or a number is outside its domain, a parameter belongs to another variant
        or is missing, or a row is empty under "raise".
    MemoryLimitError
        When the scores would take more than 2 GiB.

    Notes
    -----
    Shaw's tables are shared by the heads in the official code; with a head axis each has its own.
    (2) multiplies each query with the N rows once and (3) picks; that code builds a row for every
    pair, the same numbers in T S D places. Transformer-XL runs causally over a memory; without
    ``causal`` the sinusoid of a negative distance is used, as in XLNet. Its official pad, reshape
    and slice gives (3) below the diagonal and other rows' entries above it, where the causal mask
    hides them. T5's code floors a float32 logarithm; here the edges of the buckets are compared as
    integers, which agrees at every distance up to 10000 for 32 buckets and 128 tokens (tested). T5
    puts the missing scale into its initial weights and shares the table over all layers; its
    cross-attention has none.

    Source
    ------
    scores/relative_bias in the catalog; three papers, official code of each; grade A.

    References
    ----------
    Shaw, Uszkoreit, Vaswani 2018, Self-Attention with Relative Position Representations. Dai et
    al. 2019, Transformer-XL. Raffel et al. 2020, Exploring the Limits of Transfer Learning with a
    Unified Text-to-Text Transformer.

    Examples
    --------
    >>> import numpy as np
    >>> q, k, v = np.zeros((1, 1)), np.zeros((2, 1)), np.array([[4.0], [8.0]])
    >>> table = np.log([3.0, 1.0, 1.0, 1.0])  # bucket 0 is the distance 0
    >>> out, cache = relative_bias_forward(q, k, v, table=table, variant="t5", causal=True)
    >>> out.round(12).tolist(), cache.place.tolist()
    ([[7.0]], [[1, 0]])
    """
    given = {"aK": aK, "aV": aV, "Wr": Wr, "u": u, "w": w, "table": table}
    given = {name: x for name, x in given.items() if x is not None}
    two = not causal if bidirectional is None else bidirectional
    options = {"mask": mask, "bias": bias, "align": align, "scale": scale, "empty_row": empty_row}
    width = _check(q, k, v, given, variant, max_distance, two, options)
    scale = core.default_scale(1 if variant == "t5" else width, scale)
    live = core.visible(q, k, mask=mask, causal=causal, align=align, empty_row=empty_row)
    named = {"q": q, "k": k, "v": v, "bias": bias, **given}.items()
    shapes = {name: x.shape for name, x in named if x is not None}
    q, k, v, poison = core.quarantine(q, k, v, live, empty_row)
    u, w = (np.zeros_like(q, shape=(width,)) if x is None else x for x in (u, w))

    place, rows, sinusoid = rows_forward(q, k, align, given, variant, two, max_distance)  # (1)
    g = core.scores_forward(q + w[..., None, :], rows, scale)  # (2)
    g = gather_forward(g if table is None else g + table[..., None, :], place)
    g, poison = core.quarantine_bias(g if bias is None else g + bias, live, poison)
    z = core.scores_forward(q + u[..., None, :], k, scale) + g  # (3)
    p, lse = core.softmax_forward(z, live, empty_row)  # (4)
    out, pooled = core.mix_forward(p, v), None  # (5)
    if aV is not None:
        pooled = gather_backward(np.where(live, p, 0.0), place, aV.shape[-2])
        out = out + core.mix_forward(pooled, aV)

    out = np.where(poison, np.nan, out)
    lse = np.where(poison[..., 0], np.nan, lse)
    return out, Cache(
        q, k, v, u, w, aV, place, rows, sinusoid, pooled, p, lse, live, poison, scale, shapes
    )


def relative_bias_backward(dout, cache):
    """Gradients of :func:`relative_bias_forward`, its steps read from the bottom up.

    Parameters
    ----------
    dout : ndarray, shape (..., H, T, E)
        Gradient of the output.
    cache : Cache
        From the forward.

    Returns
    -------
    dict
        Under "q", "k", "v", the names of the parameters that were given and, when given, "bias".
    """
    q, k, v, u, w, aV, place, rows, sinusoid, pooled, p, _, live, poison, scale, shapes = cache
    lead = np.broadcast_shapes(*(x.shape[:-2] for x in (p, v, v if aV is None else aV)))
    core.check.cotangent(dout, (*lead, p.shape[-2], v.shape[-1]))
    dout = np.where(poison, 0.0, dout)

    gradients = {}
    dp, gradients["v"] = core.mix_backward(dout, p, v)  # (5')
    if aV is not None:
        dpooled, gradients["aV"] = core.mix_backward(dout, pooled, aV)
        dp = dp + gather_forward(dpooled, place)  # (4')
    gradients["bias"] = dz = core.softmax_backward(dp, p, live)
    dqu, gradients["k"] = core.scores_backward(dz, q + u[..., None, :], k, scale)  # (3')
    dg = gather_backward(dz, place, rows.shape[-2])
    dqw, drows = core.scores_backward(dg, q + w[..., None, :], rows, scale)  # (2')
    if sinusoid is not None:
        gradients["Wr"] = np.swapaxes(sinusoid, -1, -2) @ drows  # (1')
    gradients |= {"aK": drows, "table": np.sum(dg, axis=-2), "q": dqu + dqw}
    gradients |= {"u": np.sum(dqu, axis=-2), "w": np.sum(dqw, axis=-2)}
    return {name: core.sum_to(gradients[name], shape) for name, shape in shapes.items()}


SHAPES = {"aK": (5, 4), "aV": (5, 3), "Wr": (2, 6, 4), "u": (2, 4), "w": (2, 4), "table": (2, 8)}
"""K = 2, shared by the heads; the others for two heads, with M = 6 and N = 8."""


def _example(rng):
    """The variants in turn, the last three without what is optional; heads need a batch axis."""
    cases = core.examples.attention(rng, options=("causal", "mask", "bias"))
    for i, kwargs in enumerate(cases.values()):
        kwargs["variant"] = variant = list(VARIANTS)[i % 3]
        for name in VARIANTS[variant][: 1 if i > 6 else None]:
            kwargs[name] = rng.standard_normal(SHAPES[name])
        kwargs["max_distance"] = 6
        if variant != "shaw":
            kwargs |= {n: kwargs[n][None] for n in "qkv" if kwargs[n].ndim == 3}
    return cases


def _content(kwargs):
    return {n: a for n, a in kwargs.items() if n not in (*SHAPES, "variant", "max_distance")}


def _zeros(case):
    def reduction(rng):
        return {n: 0.0 * x if n in SHAPES else x for n, x in _example(rng)[case].items()}

    return core.Reduction("scores/dot_product", f"{case}: parameters of zeros", reduction, _content)


SPEC = core.Mechanism(
    key="scores/relative_bias",
    forward=relative_bias_forward,
    backward=relative_bias_backward,
    example=_example,
    flags=frozenset({"attention", "causal", "masked", "shift_invariant", "positional"}),
    reduces_to=tuple(_zeros(case) for case in ("plain", "causal", "packed")),
    claim="T5 buckets keep at four times the length what was learned, absolute positions do not.",
    verified_by=("slow loop", "PyTorch"),
)
