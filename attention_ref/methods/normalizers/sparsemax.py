r"""Sparsemax attention: the softmax is replaced by the nearest point of the simplex.

.. math::

    z_{ts} &= \kappa \tanh(c\, q_t \cdot k_s / \kappa) + b_{ts}                        &(1)\\
    \tau_t &= \Bigl(\textstyle\sum_{s \in S_t} z_{ts} - 1\Bigr) / |S_t|                &(2)\\
    p_{ts} &= \max(z_{ts} - \tau_t,\ 0)                                                &(3)\\
    o_t    &= \textstyle\sum_s p_{ts}\, v_s                                            &(4)

The support :math:`S_t` holds the n largest visible scores, n the largest number with
:math:`1 + n\, z_{(n)} > \sum_{j \le n} z_{(j)}`, scores in descending order. A key whose score
lies 1 or more below the best one has weight exactly 0, in the output and in every gradient.

The loss that belongs to it, for a target distribution y (a label is a unit vector):

.. math::

    L(z; y) = -y \cdot z + \tfrac12 \textstyle\sum_{j \in S} (z_j^2 - \tau^2)
              + \tfrac12 \lVert y \rVert^2
            = \tfrac12 \lVert p - y \rVert^2 + \textstyle\sum_j y_j (\tau - z_j)_+

Source: Martins and Astudillo 2016, Algorithm 1, Proposition 1 and the loss of section 3;
code of the author's group read: entmax/activations.py, entmax/losses.py of
deep-spin/entmax; grade A.
"""

from typing import NamedTuple

import numpy as np

from attention_ref import core


class Cache(NamedTuple):
    """What the backward needs, and what implementers compare with (``p``, ``tau``)."""

    q: np.ndarray  # (..., T, D), rows with NaN or infinity replaced by zeros
    k: np.ndarray  # (..., S, D), likewise
    v: np.ndarray  # (..., S, E), likewise
    capped: np.ndarray  # (..., T, S), scores after the softcap, before bias and mask
    p: np.ndarray  # (..., T, S), weights
    tau: np.ndarray  # (..., T), threshold in the unit of the scores; inf for an empty row
    support: np.ndarray  # (..., T, S), bool: keys with a positive weight
    poison: np.ndarray  # (..., T, 1), rows that are NaN
    scale: float
    softcap: float | None
    bias_shape: tuple | None


class LossCache(NamedTuple):
    """What the backward of the loss needs."""

    z: np.ndarray  # (..., C), scores
    y: np.ndarray  # (..., C), target distribution
    p: np.ndarray  # (..., C), sparsemax of the scores
    tau: np.ndarray  # (..., 1)
    good: np.ndarray  # (...), rows without NaN or infinity
    target_shape: tuple | None  # None for integer labels


def project_forward(z, live, empty_row="zero"):
    """The nearest point of the simplex over the visible entries of every row.

    Parameters
    ----------
    z : ndarray, shape (..., T, S)
        Scores; -inf is never in the support.
    live : bool ndarray, broadcast to (..., T, S)
        True = may attend.
    empty_row : {"zero", "nan", "uniform", "raise"}
        A row without entries gets weights 0, or 1/S under "uniform".

    Returns
    -------
    p : ndarray, shape (..., T, S)
        Weights.
    tau : ndarray, shape (..., T, 1)
        Thresholds; inf for a row without entries.
    support : bool ndarray, shape (..., T, S)
        Where p > 0.
    """
    top = core.row_max(np.where(live, z, -np.inf))
    near = live & (z - top > -1.0)  # p <= 1, so tau >= max z - 1
    u = np.where(near, z - top, -2.0)
    ordered = -np.sort(-u, axis=-1)
    one = np.ones_like(u)
    inside = 1.0 + np.cumsum(one, axis=-1) * ordered > np.cumsum(ordered, axis=-1)
    size = np.maximum(np.sum(np.where(inside, one, 0.0), axis=-1, keepdims=True), 1.0)
    tau = (np.sum(np.where(inside, ordered, 0.0), axis=-1, keepdims=True) - 1.0) / size
    support = near & (u > tau)
    p = np.where(support, u - tau, 0.0)
    empty = ~np.any(near, axis=-1, keepdims=True)
    if empty_row == "uniform":
        p = np.where(empty, 1.0 / max(z.shape[-1], 1), p)
    return p, np.where(empty, np.inf, tau + top), support


def project_backward(dp, support):
    """dz = dp - mean of dp over the support, and 0 outside of it.

    Parameters
    ----------
    dp : ndarray, shape (..., T, S)
        Gradient of the weights.
    support : bool ndarray, shape (..., T, S)
        From :func:`project_forward`.

    Returns
    -------
    ndarray, shape (..., T, S)
    """
    size = np.sum(np.where(support, np.ones_like(dp), 0.0), axis=-1, keepdims=True)
    mean = np.sum(np.where(support, dp, 0.0), axis=-1, keepdims=True) / np.maximum(size, 1.0)
    return np.where(support, dp - mean, 0.0)


def sparsemax_forward(
    q, k, v, *, mask=None, causal=False, align="lower_right", scale=None, softcap=None,
    bias=None, empty_row="zero",
):  # fmt: skip
    """Mix the values with the projection of the scores onto the simplex.

    Parameters
    ----------
    q : ndarray, shape (..., T, D)
        Queries.
    k : ndarray, shape (..., S, D)
        Keys.
    v : ndarray, shape (..., S, E)
        Values.
    mask : bool ndarray, broadcast to (..., T, S), optional
        True = may attend.
    causal : bool
        Hide the keys behind each query.
    align : {"lower_right", "upper_left"}
        Where the causal diagonal lies when T != S.
    scale : float, dimensionless, optional
        The factor c; 1/sqrt(D) by default.
    softcap : float, > 0, optional
        Bound on the scores before bias and mask.
    bias : ndarray, broadcast to (..., T, S), optional
        Added to the scores after the softcap; -inf gives a weight of 0.
    empty_row : {"zero", "nan", "uniform", "raise"}
        Output of a query that may see no key.

    Returns
    -------
    out : ndarray, shape (..., T, E)
        Outputs.
    cache : Cache
        For the backward; holds ``p`` and ``tau``.

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
    The scale sets the temperature: scores are compared with the fixed width 1 of the support. At a
    kink, where a score equals tau, the derivative is that of the side on which the weight is 0.
    The paper has neither softcap nor bias nor masks; a hidden key is left out of the projection.

    Source
    ------
    normalizers/sparsemax in the catalog; Algorithm 1 of the paper; grade A.

    References
    ----------
    Martins and Astudillo 2016, From Softmax to Sparsemax.

    Examples
    --------
    >>> import numpy as np
    >>> q = np.array([[1.0]])
    >>> k = np.array([[1.0], [0.5], [-1.0]])
    >>> v = np.array([[4.0], [0.0], [100.0]])
    >>> out, cache = sparsemax_forward(q, k, v)
    >>> out.tolist(), cache.p.tolist(), cache.tau.tolist()
    ([[3.0]], [[0.75, 0.25, 0.0]], [0.25])
    """
    n = core.check.attention(
        q, k, v, mask=mask, bias=bias, align=align, scale=scale, softcap=softcap,
        empty_row=empty_row,
    )  # fmt: skip
    scale = core.default_scale(n["D"], scale)
    live = core.visible(q, k, mask=mask, causal=causal, align=align, empty_row=empty_row)
    q, k, v, poison = core.quarantine(q, k, v, live, empty_row)

    z = capped = core.softcap_forward(core.scores_forward(q, k, scale), softcap)  # (1)
    if bias is not None:
        clean, poison = core.quarantine_bias(bias, live, poison)
        z = z + clean
    p, tau, support = project_forward(z, live, empty_row)  # (2) (3)
    out = core.mix_forward(p, v)  # (4)

    out = np.where(poison, np.nan, out)
    tau = np.where(poison, np.nan, tau)[..., 0]
    bias_shape = None if bias is None else bias.shape
    return out, Cache(q, k, v, capped, p, tau, support, poison, scale, softcap, bias_shape)


def sparsemax_backward(dout, cache):
    """Gradients of :func:`sparsemax_forward`, its steps read from the bottom up.

    Parameters
    ----------
    dout : ndarray, shape (..., T, E)
        Gradient of the output.
    cache : Cache
        From the forward.

    Returns
    -------
    dict
        Under "q", "k", "v" and, when a bias was given, "bias".
    """
    q, k, v, capped, p, _, support, poison, scale, softcap, bias_shape = cache
    lead = np.broadcast_shapes(p.shape[:-2], v.shape[:-2])
    core.check.cotangent(dout, (*lead, p.shape[-2], v.shape[-1]))
    dout = np.where(poison, 0.0, dout)

    dp, dv = core.mix_backward(dout, p, v)  # (4')
    dz = project_backward(dp, support)  # (3') (2')
    gradients = {} if bias_shape is None else {"bias": core.sum_to(dz, bias_shape)}  # (1')
    dz = core.softcap_backward(dz, capped, softcap)
    dq, dk = core.scores_backward(dz, q, k, scale)

    return {"q": dq, "k": dk, "v": dv, **gradients}


def sparsemax_numba(q, k, v, **options):
    """The same call; the rows are projected by the compiled kernel, without sorting.

    Parameters
    ----------
    q, k, v, **options
        As in :func:`sparsemax_forward`.

    Returns
    -------
    out, cache
        As there; the cache holds ``p`` but no ``tau``.
    """
    from attention_ref.kernels.numba import row_projection

    return row_projection.forward(q, k, v, **options)


def sparsemax_numba_backward(dout, cache):
    """Gradients of :func:`sparsemax_numba`.

    Parameters
    ----------
    dout, cache
        As in :func:`sparsemax_backward`.

    Returns
    -------
    dict
        As there.
    """
    from attention_ref.kernels.numba import row_projection

    return row_projection.backward(dout, cache)


def sparsemax_loss_forward(z, y):
    """The sparsemax loss of each row of scores: 0 once the right class leads by 1.

    Parameters
    ----------
    z : ndarray, shape (..., C)
        Scores of C classes.
    y : int ndarray, shape (...), or float ndarray, shape (..., C)
        Labels, or target distributions, each row not negative with sum 1.

    Returns
    -------
    loss : ndarray, shape (...)
        Not averaged; NaN where a score is not finite.
    cache : LossCache
        For the backward.
    """
    core.check.shapes(z=(z, "... C"))
    core.check.kind("y", y)
    if np.dtype(y.dtype).kind in "iu":
        core.check.integer("y", y, low=0, high=z.shape[-1])
        if tuple(y.shape) != tuple(z.shape[:-1]):
            raise core.errors.ShapeError(
                f"y has shape {tuple(y.shape)}, expected {tuple(z.shape[:-1])}, one label a row"
            )
        target_shape, hit = None, np.arange(z.shape[-1], like=y) == y[..., None]
        y = np.where(hit, np.ones_like(z), 0.0)
    else:
        core.check.shapes(z=(z, "... C"), y=(y, "... C"))
        target_shape = y.shape
    good = np.all(np.isfinite(z), axis=-1)
    z = np.where(good[..., None], z, 0.0)
    p, tau, _ = project_forward(z, np.ones_like(z, dtype=bool))
    behind = np.sum(y * np.maximum(tau - z, 0.0), axis=-1)
    loss = np.sum(np.square(p - y), axis=-1) / 2.0 + behind
    loss = loss + tau[..., 0] * (1.0 - np.sum(y, axis=-1))
    return np.where(good, loss, np.nan), LossCache(z, y, p, tau, good, target_shape)


def sparsemax_loss_backward(dloss, cache):
    """Gradients of :func:`sparsemax_loss_forward`: dz = p - y, dy = y - z.

    Parameters
    ----------
    dloss : ndarray, shape (...)
        Gradient of each row's loss.
    cache : LossCache
        From the forward.

    Returns
    -------
    dict
        Under "z" and, for a target distribution, "y".
    """
    z, y, p, _, good, target_shape = cache
    core.check.cotangent(dloss, np.broadcast_shapes(z.shape, y.shape)[:-1], "dloss")
    dloss = np.where(good, dloss, 0.0)
    gradients = {"z": core.sum_to(dloss[..., None] * (p - y), z.shape)}
    if target_shape is not None:
        gradients["y"] = core.sum_to(dloss[..., None] * (y - z), target_shape)
    return gradients


def _example(rng):
    """The standard set, drawn again until no score is near a kink and every key is used."""

    def extra(_, kwargs):
        return {"scale": 0.3} if "scale" in kwargs else {}

    def clear(kwargs):
        _, c = sparsemax_forward(**kwargs)
        z = c.capped + kwargs.get("bias", 0.0)
        live = core.visible(kwargs["q"], kwargs["k"], **{
            n: kwargs[n] for n in ("mask", "causal", "align") if n in kwargs
        })  # fmt: skip
        gap = np.where(live, np.abs(z - c.tau[..., None]), 1.0)
        seen = np.any(np.reshape(c.support, (-1, z.shape[-1])), axis=0)
        return np.min(gap) > 0.03 and np.all(seen | ~np.any(live, axis=tuple(range(live.ndim - 1))))

    found = {}
    for _ in range(1000):
        drawn = core.examples.attention(rng, extra=extra)
        found |= {n: case for n, case in drawn.items() if n not in found and clear(case)}
        if len(found) == len(drawn):
            return {n: found[n] for n in drawn}
    raise core.errors.ParameterError("rng gave no example away from kinks in 1000 draws")


SPEC = core.Mechanism(
    key="normalizers/sparsemax",
    forward=sparsemax_forward,
    backward=sparsemax_backward,
    numba=core.Backend(sparsemax_numba, sparsemax_numba_backward),
    example=_example,
    flags=frozenset(core.SOFTMAX_FLAGS),
    reduces_to=(
        core.Reduction(
            key="scores/dot_product",
            says="equal scores give the mean of the values",
            kwargs=lambda rng: core.examples.qkv(rng) | {"scale": 0.0},
            other=dict,
        ),
        core.Reduction(
            key="scores/dot_product",
            says="far apart scores give the value of the best key",
            kwargs=lambda rng: core.examples.qkv(rng) | {"scale": 1e6},
            other=dict,
        ),
    ),
    claim=(
        "In an attention classifier sparsemax gives most tokens a weight of exactly zero and "
        "classifies as well as softmax."
    ),
    verified_by=("slow loop", "entmax"),
)
