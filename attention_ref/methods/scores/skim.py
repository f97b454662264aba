r"""Skim-attention: where a token looks follows from the places on the page alone, for all layers.

.. math::

    u_t    &= X_{x^0_t} + X_{x^1_t} + Y_{y^0_t} + Y_{y^1_t} + U_{y^1_t - y^0_t}
              + W_{x^1_t - x^0_t}                                                        &(1)\\
    l_t    &= \gamma \odot \frac{u_t - \operatorname{mean}(u_t)}
              {\sqrt{\operatorname{var}(u_t) + \varepsilon}} + \delta                    &(2)\\
    q_t    &= l_t W_q + b_q, \qquad k_t = l_t W_k                                        &(3)\\
    z_{ts} &= c\, q_t \cdot k_s + b_{ts}                                                 &(4)\\
    p_{ts} &= e^{z_{ts}} / \textstyle\sum_{s'} e^{z_{ts'}}                               &(5)\\
    o_t    &= \textstyle\sum_s p_{ts}\, v_s                                              &(6)

with one row of the tables X and Y for each coordinate of the token's box, and of U and W for its
height and width. Text and layout never meet in a score. So p is computed once, and every layer
mixes its own values with it: L layers pay for one map.

Source: Nguyen et al. 2021, section 3; official modeling_skim.py read; grade A.
"""

from typing import NamedTuple

import numpy as np

from attention_ref import core


class Cache(NamedTuple):
    """What the backward needs, and what implementers compare with (``p``, ``lse``, ``l``)."""

    box: np.ndarray  # (..., T, 4)
    q: np.ndarray  # (..., H, T, D), rows with NaN or infinity replaced by zeros
    k: np.ndarray  # (..., H, T, D), likewise
    v: np.ndarray  # (..., H, T, E), likewise
    hat: np.ndarray  # (..., T, C), normalised, before gain and shift
    root: np.ndarray  # (..., T, 1), root of variance plus eps
    l: np.ndarray  # (..., T, C), layout embeddings
    given: dict  # the other arrays as given, by name
    p: np.ndarray  # (..., H, T, T), weights
    lse: np.ndarray  # (..., H, T), log of the sum of exponentials, nats
    live: np.ndarray  # (..., T, T), True = may attend
    poison: np.ndarray  # (..., H, T, 1), rows that are NaN
    scale: float


def places(box, tables):
    """Which rows of which table make up the layout embedding.

    Parameters
    ----------
    box : int ndarray, shape (..., T, 4)
        Left, upper, right and lower edge.
    tables : tuple of ndarray or None
        X, Y, U, W. Without U and W (the paper's ablation) X and Y are read at the centre.

    Returns
    -------
    list of (int, ndarray)
        The table's number, and its row for each token, (..., T).
    """
    left, upper, right, lower = (box[..., i] for i in range(4))
    if tables[2] is None:
        return [(0, (left + right) // 2), (1, (upper + lower) // 2)]
    edges = [(0, left), (1, upper), (0, right), (1, lower)]
    return [*edges, (2, lower - upper), (3, right - left)]


def layout_forward(box, tables, gain, shift, eps):
    """Steps (1) and (2).

    Parameters
    ----------
    box, tables
        As for :func:`places`.
    gain, shift : ndarray, shape (C,)
        Of the layer norm.
    eps : float
        Added to the variance.

    Returns
    -------
    l, hat, root : ndarray, shapes (..., T, C), (..., T, C), (..., T, 1)
        The embedding, NaN where a table is; what gain and shift were applied to; the divisor.
    """
    u = sum(np.take(tables[i], rows, axis=0) for i, rows in places(box, tables))  # (1)
    good = np.all(np.isfinite(u), axis=-1, keepdims=True)
    u = np.where(good, u, 0.0)
    u = u - np.mean(u, axis=-1, keepdims=True)  # (2)
    root = np.sqrt(np.mean(np.square(u), axis=-1, keepdims=True) + eps)
    return np.where(good, u / root * gain + shift, np.nan), u / root, root


def layout_backward(dl, box, tables, gain, hat, root):
    """Through the layer norm, then every row of a table gets what was read from it.

    Parameters
    ----------
    dl : ndarray, shape (..., T, C)
        Gradient of l.
    box, tables, gain, hat, root
        From the forward.

    Returns
    -------
    dgain, dshift : ndarray, shape (C,)
        Gradients of the layer norm.
    dtables : list of ndarray
        Of the tables that are there.
    """
    dgain, dshift, dhat = core.sum_to(dl * hat, gain.shape), core.sum_to(dl, gain.shape), dl * gain
    centred = dhat - np.mean(dhat, axis=-1, keepdims=True)
    du = (centred - hat * np.mean(dhat * hat, axis=-1, keepdims=True)) / root  # (2')
    du = np.reshape(du, (-1, du.shape[-1]))
    entry, one = np.arange(tables[0].shape[0], like=box), np.ones_like(du, shape=(1, 1))
    reads = [
        (i, np.where(entry[:, None] == np.reshape(rows, (1, -1)), one, 0.0))
        for i, rows in places(box, tables)
    ]
    present = [i for i in range(4) if tables[i] is not None]
    return dgain, dshift, [sum(read @ du for j, read in reads if j == i) for i in present]  # (1')


def skimming_mask(p, count):
    """The ``count`` keys with the largest weight of every row: a mask for any other attention.

    Parameters
    ----------
    p : ndarray, shape (..., T, S)
        Weights; the official code takes each head's own.
    count : int, >= 0, tokens
        How many keys a row keeps; keys of weight 0 never, equal ones from the left.

    Returns
    -------
    bool ndarray, shape (..., T, S)
        True = may attend.
    """
    core.check.count("count", count, low=0, unit="tokens")
    order = np.argsort(-p, axis=-1, kind="stable")
    return (np.argsort(order, axis=-1, kind="stable") < count) & (p > 0)


def _check(box, v, tables, gain, shift, wq, wk, bq, eps):
    """The checks of what makes queries and keys; the width of a head."""
    names = dict(zip(("e_x", "e_y", "e_h", "e_w"), tables, strict=True))
    n = core.check.shapes(
        **{name: (a, "N C") for name, a in names.items()}, gain=(gain, "C"), shift=(shift, "C"),
        wq=(wq, "... C D"), wk=(wk, "... C D"), bq=(bq, "... D"), v=(v, "... T E"),
    )  # fmt: skip
    if (tables[2] is None) != (tables[3] is None):
        raise core.errors.ParameterError("e_h and e_w are given together or not at all")
    core.check.integer("box", box, 0, n["N"])
    want = (*n["..."], n["T"], 4)
    if box.shape[-2:] != want[-2:] or np.broadcast_shapes(box.shape, want) != want:
        raise core.errors.ShapeError(f"box has shape {box.shape}, expected (..., T, 4) as {want}")
    if isinstance(box, np.ndarray) and np.any(box[..., 2:] < box[..., :2]).item():
        raise core.errors.ParameterError("box has a right or lower edge before the left or upper")
    core.check.number("eps", eps, low=0)
    return n["D"]


def skim_forward(
    box, v, e_x, e_y, e_h, e_w, gain, shift, wq, wk, bq=None, *, mask=None, scale=None, bias=None,
    eps=1e-12, empty_row="zero",
):  # fmt: skip
    """Mix values with weights that are made of the tokens' boxes.

    Parameters
    ----------
    box : int ndarray, broadcast to (..., H, T, 4)
        Left, upper, right and lower edge of each token, from 0 to N - 1; (T, 4), or (B, 1, T, 4)
        in a batch. The paper's pages are 1000 wide and high.
    v : ndarray, shape (..., H, T, E)
        Values. A further leading axis may hold those of several layers.
    e_x, e_y : ndarray, shape (N, C)
        Embeddings of left and right edges, of upper and lower ones.
    e_h, e_w : ndarray, shape (N, C), or None
        Embeddings of heights and widths. None for both reads e_x, e_y once, at the centre.
    gain, shift : ndarray, shape (C,)
        Of the layer norm.
    wq, wk : ndarray, shape (..., H, C, D)
        Projections of each head.
    bq : ndarray, shape (..., H, D), optional
        Bias of the queries.
    mask : bool ndarray, broadcast to (..., H, T, T), optional
        True = may attend.
    scale : float, dimensionless, optional
        The factor c; 1/sqrt(D) by default.
    bias : ndarray, broadcast to (..., H, T, T), nats, optional
        Added to the scores; -inf gives a weight of 0.
    eps : float, >= 0
        Added to the variance in the layer norm.
    empty_row : {"zero", "nan", "uniform", "raise"}
        Output of a token that may see no other.

    Returns
    -------
    out : ndarray, shape (..., H, T, E)
        Outputs.
    cache : Cache
        For the backward; holds ``p``, ``lse`` and the layout embeddings ``l``.

    Raises
    ------
    ShapeError
        When widths, lengths or leading axes do not fit.
    DTypeError
        When an argument is no float32 or float64 array, box holds no integers, or the mask is not
        boolean.
    ParameterError
        When a coordinate is outside the tables, a box is turned, an option or a number is outside
        its domain, or a row is empty under "raise".
    MemoryLimitError
        When the scores would take more than 2 GiB.

    Notes
    -----
    The official code has a bias of the keys too. It adds the same number to a whole row of scores,
    so the softmax does not see it and its gradient is zero: it is left out here. A bias of the
    queries does act. In a stack of layers the values of a layer depend on the layer before. Then
    ``cache.p`` of any call serves them all: ``cache.p @ v`` with each layer's v, and the gradients
    of p, ``dout v^T``, are added up over the layers before one backward. The paper's sizes: N =
    1024, C = 768, 12 heads of D = 64; tables and matrices begin normal with deviation 0.02. Its
    dropout on p is thereby the same in all layers. The official code has an option to run the
    embeddings through a small encoder first, which is the caller's affair. Where a table holds NaN,
    tokens that read it count as non-finite keys and queries; NaN in gain, shift or a projection
    makes everything NaN.

    Source
    ------
    scores/skim in the catalog; section 3 of the paper, official code; grade A.

    References
    ----------
    Nguyen et al. 2021, Skim-Attention: Learning to Focus via Document Layout.

    Examples
    --------
    >>> import numpy as np
    >>> box = np.array([[0, 0, 0, 0], [1, 0, 1, 0]])
    >>> table, one = np.array([[1.0, -1.0], [-1.0, 1.0]]), np.ones(2)
    >>> w = np.array([[np.log(3.0)], [0.0]])
    >>> v, k = np.array([[0.0], [8.0]]), np.array([[1.0], [0.0]])
    >>> out, cache = skim_forward(box, v, table, 0 * table, None, None, one, 0 * one, w, k / 2)
    >>> cache.l.round(9).tolist(), out.round(9).tolist()
    ([[1.0, -1.0], [-1.0, 1.0]], [[2.0], [6.0]])
    """
    tables = (e_x, e_y, e_h, e_w)
    width = _check(box, v, tables, gain, shift, wq, wk, bq, eps)
    l, hat, root = layout_forward(box, tables, gain, shift, eps)  # (1) (2)
    q, k = l @ wq, l @ wk  # (3)
    q, l = q if bq is None else q + bq[..., None, :], np.where(np.isfinite(l), l, 0.0)
    core.check.attention(q, k, v, mask=mask, bias=bias, scale=scale, empty_row=empty_row)
    scale = core.default_scale(width, scale)
    live = core.visible(q, k, mask=mask, empty_row=empty_row)
    q, k, v, poison = core.quarantine(q, k, v, live, empty_row)
    z = core.scores_forward(q, k, scale)  # (4)
    if bias is not None:
        clean, poison = core.quarantine_bias(bias, live, poison)
        z = z + clean
    p, lse = core.softmax_forward(z, live, empty_row)  # (5)
    out = core.mix_forward(p, v)  # (6)

    given = {"e_x": e_x, "e_y": e_y, "e_h": e_h, "e_w": e_w, "gain": gain, "shift": shift}
    given |= {"wq": wq, "wk": wk, "bq": bq, "bias": bias}
    lse = np.where(poison[..., 0], np.nan, lse)
    return np.where(poison, np.nan, out), Cache(
        box, q, k, v, hat, root, l, given, p, lse, live, poison, scale
    )


def skim_backward(dout, cache):
    """Gradients of :func:`skim_forward`, its steps read from the bottom up.

    Parameters
    ----------
    dout : ndarray, shape (..., H, T, E)
        Gradient of the output.
    cache : Cache
        From the forward.

    Returns
    -------
    dict
        Under the name of every float array that was given.
    """
    box, q, k, v, hat, root, l, given, p, _, live, poison, scale = cache
    lead = np.broadcast_shapes(poison.shape[:-2], v.shape[:-2])
    core.check.cotangent(dout, (*lead, p.shape[-2], v.shape[-1]))
    dout = np.where(poison, 0.0, dout)

    dp, dv = core.mix_backward(dout, p, v)  # (6')
    dz = core.softmax_backward(core.sum_to(dp, p.shape), p, live)  # (5')
    dq, dk = core.scores_backward(dz, q, k, scale)  # (4')
    tables = tuple(given[name] for name in ("e_x", "e_y", "e_h", "e_w"))
    wq, wk = given["wq"], given["wk"]
    dl = core.sum_to(dq @ np.swapaxes(wq, -1, -2) + dk @ np.swapaxes(wk, -1, -2), l.shape)  # (3')
    dgain, dshift, dtables = layout_backward(dl, box, tables, given["gain"], hat, root)  # (2') (1')
    rows = np.swapaxes(l, -1, -2)
    found = {
        "v": dv, "gain": dgain, "shift": dshift, "bias": dz, "wq": rows @ dq, "wk": rows @ dk,
        "bq": np.sum(dq, axis=-2),
    } | dict(zip(("e_x", "e_y", "e_h", "e_w"), dtables, strict=False))  # fmt: skip
    shapes = {n: a.shape for n, a in given.items() if a is not None} | {"v": dv.shape}
    return {n: core.sum_to(found[n], shape) for n, shape in shapes.items()}


N, C, D = 6, 4, 3
"""Rows of the tables, width of the layout embedding and of a head."""


def _boxes(rng, *shape):
    """Boxes inside N places, none turned."""
    a, b = rng.integers(N, size=(2, *shape, 2))
    return np.concatenate([np.minimum(a, b), np.maximum(a, b)], axis=-1)


def _case(rng, box=(5,), values=(2, 5, 3), heads=(2,), **options):
    """Two heads, five tokens, a bias of the queries."""
    arrays = {
        "v": values, "e_x": (N, C), "e_y": (N, C), "e_h": (N, C), "e_w": (N, C), "gain": (C,),
        "shift": (C,), "wq": (*heads, C, D), "wk": (*heads, C, D), "bq": (*heads, D),
    }  # fmt: skip
    drawn = {name: rng.standard_normal(shape) for name, shape in arrays.items()}
    drawn |= {name: 0.5 * drawn[name] for name in ("gain", "wq", "wk")}
    return {"box": _boxes(rng, *box)} | drawn | {"scale": 0.7} | options


def _example(rng):
    return {
        "plain": _case(rng, bq=None),
        "batch": _case(rng, box=(3, 1, 4), values=(3, 2, 4, 3), eps=0.1),
        "no-heads": _case(rng, values=(5, 3), heads=(), scale=None),
        "centres": _case(rng, e_h=None, e_w=None),
        "layers": _case(rng, values=(3, 2, 5, 3), bq=None),
        "mask": _case(rng, mask=rng.random((2, 5, 5)) < 0.6, eps=0.5),
        "bias": _case(rng, bias=rng.standard_normal((5, 5))),
    }


def _visible(kwargs):
    tokens = kwargs["v"].shape[-2]
    return kwargs.get("mask", np.ones((tokens, tokens), bool))


def _projected(kwargs):
    """Queries and keys of softmax attention, made of the layout embeddings."""
    tables = tuple(kwargs[name] for name in ("e_x", "e_y", "e_h", "e_w"))
    l, _, _ = layout_forward(kwargs["box"], tables, kwargs["gain"], kwargs["shift"], 1e-12)
    q, k = l @ kwargs["wq"] + kwargs["bq"][:, None], l @ kwargs["wk"]
    return {"q": q, "k": k, "v": kwargs["v"], "scale": kwargs["scale"]}


SPEC = core.Mechanism(
    key="scores/skim",
    forward=skim_forward, backward=skim_backward, example=_example, visible=_visible,
    flags=frozenset({"linear_in_v", "row_stochastic"}),
    reduces_to=(
        core.Reduction("scores/dot_product", "of projected layout embeddings", _case, _projected),
    ),
    claim="Told to copy the label of the token to the right on a page whose tokens come in any "
    "order, a model whose scores see the boxes alone succeeds, and one that sees the text fails.",
    verified_by=("slow loop", "PyTorch"),
)  # fmt: skip
