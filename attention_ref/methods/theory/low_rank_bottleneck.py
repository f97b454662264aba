r"""The low-rank bottleneck: which attention maps a head of width d_k can express.

Columns of X are tokens, columns of P are the weights of one query over the n keys:

.. math::

    Z      &= (W_k X)^\top (W_q X) / \sqrt{d_k}, \qquad \operatorname{rank} Z \le d_k       &(1)\\
    P_{ij} &= e^{Z_{ij}} / \textstyle\sum_k e^{Z_{kj}}                                      &(2)

A constant added to a column of Z changes nothing, so Z realises P exactly when both have the same
centred part :math:`C = (I - \tfrac1n 1 1^\top) \log P`. If X has full column rank and left inverse
:math:`X^+`, then for any n x m basis B whose columns are orthonormal and whose span holds C

.. math::

    W_k = B^\top X^+, \qquad W_q = \sqrt{d_k}\, B^\top \log P\, X^+                         (3)

realises P: with B = I for :math:`d_k \ge n` (the theorem), and with a basis of the vectors that
sum to 0 already for :math:`d_k = n - 1`. Below that the best logits in the least-squares sense are
the truncated singular value decomposition of C, and what they miss is

.. math::

    \min_{\operatorname{rank} Z \le d_k,\ c} \lVert \log P + 1 c^\top - Z \rVert_F
      = \Bigl(\textstyle\sum_{i > d_k} \sigma_i(C)^2\Bigr)^{1/2}                            (4)

so P is out of reach, at any size of the weights, exactly when :math:`\operatorname{rank} C > d_k`.

Source: Bhojanapalli et al. 2020, Theorem 1 (B = I); (4) and the case n - 1 are derived here;
grade C.
"""

import math
from typing import NamedTuple

import numpy as np

from attention_ref import core


class Projections(NamedTuple):
    """The head that realises a map."""

    W_q: np.ndarray  # (..., d_k, d)
    W_k: np.ndarray  # (..., d_k, d)


class Fit(NamedTuple):
    """The best logits of a given rank."""

    Z: np.ndarray  # (..., n, n), of rank at most d_k, columns with mean 0
    residual: np.ndarray  # (...), what (4) says, nats
    error: np.ndarray  # (...), largest difference between the softmax of Z and P


def softmax_columns(Z):
    """Weights of every query: each column of the result sums to 1 (2).

    Parameters
    ----------
    Z : ndarray, shape (..., n, n)
        Logits, nats.

    Returns
    -------
    ndarray, shape (..., n, n)
    """
    e = np.exp(Z - np.max(Z, axis=-2, keepdims=True))
    return e / np.sum(e, axis=-2, keepdims=True)


def centred_logits(P):
    """C: the logarithm of P with the mean of every column taken out.

    Parameters
    ----------
    P : ndarray, shape (..., n, n)
        Positive.

    Returns
    -------
    ndarray, shape (..., n, n)
    """
    logits = np.log(P)
    return logits - np.mean(logits, axis=-2, keepdims=True)


def zero_sum_basis(n, like):
    """Helmert's orthonormal basis of the vectors that sum to 0.

    Column j is (1, ..., 1, -j - 1, 0, ..., 0) / sqrt((j + 1) (j + 2)), j + 1 ones.

    Parameters
    ----------
    n : int
        Length of the vectors.
    like : ndarray
        Gives the kind and dtype of the result.

    Returns
    -------
    ndarray, shape (n, n - 1)
    """
    one = np.ones_like(like, shape=(n, n - 1))
    i = np.cumsum(one, axis=0)
    j = np.cumsum(one, axis=1)
    return np.where(i <= j, 1.0, np.where(i == j + 1.0, -j, 0.0)) / np.sqrt(j * (j + 1.0))


def low_rank_bottleneck_construct(X, P, *, d_k=None):
    """Projections with which a head attends exactly as asked (3).

    Parameters
    ----------
    X : ndarray, shape (..., d, n)
        Tokens as columns, linearly independent.
    P : ndarray, shape (..., n, n)
        The map to realise: positive, every column sums to 1.
    d_k : int, >= n - 1, optional
        Width of the head; n by default.

    Returns
    -------
    Projections
        ``W_q`` and ``W_k``, shape (..., d_k, d).

    Raises
    ------
    ShapeError
        When d < n or the shapes do not fit.
    DTypeError
        When an argument is no float32 or float64 array.
    ParameterError
        When P is not positive and column-stochastic, the columns of X are (nearly) dependent, or
        d_k < n - 1.

    Notes
    -----
    The theorem asks for d_k >= n and that is what the default gives, with W_k = X^+. The shift
    that a column of logits is free to make saves one dimension, so d_k = n - 1 is enough too; for
    d_k <= n - 2 there are maps that no head reaches (:func:`low_rank_bottleneck_counterexample`).
    The rows of the projections beyond n are 0. The projections are not unique: any invertible M
    turns them into M W_q and M^-T W_k.

    Source
    ------
    theory/low_rank_bottleneck in the catalog; Theorem 1 of the paper; grade C.

    References
    ----------
    Bhojanapalli, Yun, Rawat, Reddi and Kumar 2020, Low-Rank Bottleneck in Multi-head Attention
    Models.

    Examples
    --------
    >>> import numpy as np
    >>> X, P = np.eye(2), np.array([[0.75, 0.5], [0.25, 0.5]])
    >>> W_q, W_k = low_rank_bottleneck_construct(X, P, d_k=1)
    >>> np.round(low_rank_bottleneck_map(X, W_q, W_k), 12).tolist()
    [[0.75, 0.5], [0.25, 0.5]]
    """
    n = core.check.shapes(X=(X, "... d n"), P=(P, "... n n"))
    d_k = n["n"] if d_k is None else d_k
    _check_map(P)
    if not 0 < n["n"] <= n["d"]:
        raise core.errors.ShapeError(
            f"X has shape {tuple(X.shape)}, expected (..., d, n) with 0 < n <= d: n columns of "
            "fewer than n numbers are never independent"
        )
    core.check.count("d_k", d_k, low=max(1, n["n"] - 1))

    Q, R = np.linalg.qr(X)
    size = core.absolute(np.diagonal(R, axis1=-2, axis2=-1))
    limit = n["d"] * float(np.finfo(X.dtype).eps)
    if np.any(np.min(size, axis=-1) <= limit * np.max(size, axis=-1)).item():
        raise core.errors.ParameterError(
            "X has dependent columns, expected full column rank; hint: two equal tokens always "
            "attend and are attended to alike"
        )
    inverse = np.linalg.solve(R, np.swapaxes(Q, -1, -2))  # X^+ of X = Q R
    keys, logits = inverse, np.log(P)
    if d_k < n["n"]:
        basis = np.swapaxes(zero_sum_basis(n["n"], X), -1, -2)
        keys, logits = basis @ inverse, basis @ logits
    queries = math.sqrt(d_k) * (logits @ inverse)
    return Projections(_more_rows(queries, d_k), _more_rows(keys, d_k))


def _check_map(P):
    """Refuse what is no positive column-stochastic matrix."""
    off = core.absolute(np.sum(P, axis=-2) - 1.0)
    if not (np.all(P > 0).item() and np.all(off <= 1e-5).item()):
        raise core.errors.ParameterError(
            "P has an entry that is not positive or a column whose sum is not 1 within 1e-5, "
            "expected the weights of one query in every column; hint: np.swapaxes(P, -1, -2)"
        )


def _more_rows(W, d_k):
    """Rows of zeros below, up to d_k."""
    missing = np.zeros_like(W, shape=(*W.shape[:-2], d_k - W.shape[-2], W.shape[-1]))
    return np.concatenate([W, missing], axis=-2)


def low_rank_bottleneck_map(X, W_q, W_k):
    """The map of a head: (1) and (2).

    Parameters
    ----------
    X : ndarray, shape (..., d, n)
        Tokens as columns.
    W_q, W_k : ndarray, shape (..., d_k, d)
        Projections.

    Returns
    -------
    ndarray, shape (..., n, n)
        Entry (i, j): weight of key i for query j.
    """
    n = core.check.shapes(X=(X, "... d n"), W_q=(W_q, "... D d"), W_k=(W_k, "... D d"))
    Z = np.swapaxes(W_k @ X, -1, -2) @ (W_q @ X)
    return softmax_columns(Z / math.sqrt(n["D"]))


def low_rank_bottleneck_fit(P, d_k):
    """The best logits of rank d_k for a map, and how much they miss (4).

    Parameters
    ----------
    P : ndarray, shape (..., n, n)
        Positive, every column sums to 1.
    d_k : int, >= 0
        Width of the head.

    Returns
    -------
    Fit
        ``Z``, ``residual`` in the logits (nats), and ``error`` in the weights.
    """
    core.check.shapes(P=(P, "... n n"))
    core.check.count("d_k", d_k)
    _check_map(P)
    U, sigma, V = np.linalg.svd(centred_logits(P))
    rank = np.arange(P.shape[-1], like=P)
    kept = np.where(rank < d_k, sigma, 0.0)
    Z = (U * kept[..., None, :]) @ V
    residual = np.sqrt(np.sum(np.square(sigma - kept), axis=-1))
    error = np.max(core.absolute(softmax_columns(Z) - P), axis=(-1, -2))
    return Fit(Z, residual, error)


def low_rank_bottleneck_counterexample(n, d_k, height=1.0):
    """A map out of reach of a head of width d_k <= n - 2, and by how much (4).

    Parameters
    ----------
    n : int, tokens
        Length.
    d_k : int, 0 <= d_k <= n - 2
        Width of the head.
    height : float, > 0, nats
        By how much every token prefers itself.

    Returns
    -------
    P : ndarray, shape (n, n)
        Softmax of height I: the centred logits have n - 1 singular values, all equal to height.
    residual : float, nats
        height sqrt(n - 1 - d_k).
    """
    core.check.count("n", n, low=2)
    core.check.count("d_k", d_k, high=n - 2)
    core.check.number("height", height, low=0, open_low=True)
    return softmax_columns(height * np.eye(n)), height * math.sqrt(n - 1 - d_k)


def low_rank_bottleneck_limit(n, beta):
    """Rank 2 comes as near as one likes to hard attention, the identity.

    Tokens sit on a circle, :math:`Z_{ij} = \\beta \\cos(2 \\pi (i - j) / n)`: the best key leads
    the next one by :math:`g = 1 - \\cos(2 \\pi / n)` times beta.

    Parameters
    ----------
    n : int, tokens, at least 3
        Length.
    beta : float, > 0, nats
        Height of the logits.

    Returns
    -------
    Z : ndarray, shape (n, n)
        Logits of rank 2.
    rate : float
        g: for large beta the diagonal of the softmax of Z lacks 2 exp(-g beta) to 1.
    """
    core.check.count("n", n, low=3)
    core.check.number("beta", beta, low=0, open_low=True)
    angle = 2.0 * math.pi / n * np.arange(n)
    return beta * np.cos(angle[:, None] - angle), 1.0 - math.cos(2.0 * math.pi / n)


def _example(rng):
    """Square and tall X, the three cases of d_k, batches of maps and of both."""

    def case(d, n, lead=(), **options):
        X = rng.standard_normal((*lead, d, n))
        X = 0.2 * X - np.linalg.qr(X)[0]  # well away from dependent columns
        return {"X": X, "P": softmax_columns(rng.standard_normal((*lead, n, n)))} | options

    return {
        "plain": case(7, 5),
        "square": case(4, 4, d_k=4),
        "shift-saves-one": case(6, 4, d_k=3),
        "wide-head": case(5, 3, d_k=6),
        "two-tokens": case(3, 2, d_k=1),
        "one-token": case(2, 1),
        "batch": case(6, 5, lead=(2, 3), d_k=4),
        "batch-of-maps": {"X": case(5, 4)["X"], "P": case(5, 4, lead=(3,))["P"]},
    }


SPEC = core.Theory(
    key="theory/low_rank_bottleneck",
    construct=low_rank_bottleneck_construct,
    quantities={
        "map": low_rank_bottleneck_map,
        "fit": low_rank_bottleneck_fit,
        "counterexample": low_rank_bottleneck_counterexample,
        "limit": low_rank_bottleneck_limit,
    },
    example=_example,
    claim=(
        "The best logits of rank d_k miss a random map for d_k <= n - 2 and reach it from "
        "d_k = n - 1 on."
    ),
    verified_by=("slow loop", "alternating SVD and shifts"),
)
