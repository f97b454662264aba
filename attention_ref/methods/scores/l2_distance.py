r"""Distance scores: minus the squared distance of query and key instead of their product.

.. math::

    \delta_{ts} &= q_t - k_s                                                    &(1)\\
    z_{ts} &= -c\, \textstyle\sum_d \delta_{tsd}^2                              &(2)\\
    p_{ts} &= e^{z_{ts} + b_{ts}} / \textstyle\sum_{s'} e^{z_{ts'} + b_{ts'}}   &(3)\\
    o_t    &= \textstyle\sum_s p_{ts}\, v_s                                     &(4)

In self-attention with tied projections (the same array as q and k) every token is nearest to
itself and no distant token can win by its length. If moreover the values are a linear function of
the queries, the map has a finite Lipschitz constant; dot-product attention has none. The paper's
second means, spectral normalisation that keeps the largest singular value of the first step, is
the pair :func:`spectral_forward`, :func:`spectral_backward`.

Source: Lee et al. 2022, *ViTGAN*, from a digest of section 3; official code mlpc-ucsd/ViTGAN,
models/gan/stylegan2/vit_common.py, read; sign and square after Kim, Papamakarios, Mnih 2021, *The
Lipschitz Constant of Self-Attention* (see the Notes); grade C.
"""

from typing import NamedTuple

import numpy as np

from attention_ref import core


class Cache(NamedTuple):
    """What the backward needs, and what implementers compare with (``z``, ``p``, ``lse``)."""

    q_shape: tuple
    k_shape: tuple
    v: np.ndarray  # (..., H, S, E), rows with NaN or infinity replaced by zeros
    delta: np.ndarray  # (..., H, T, S, D), q_t - k_s
    z: np.ndarray  # (..., H, T, S), scores before bias and mask, nats
    p: np.ndarray  # (..., H, T, S), weights
    lse: np.ndarray  # (..., H, T), log of the sum of exponentials, nats; -inf for an empty row
    live: np.ndarray  # (..., T, S), True = may attend
    poison: np.ndarray  # (..., H, T, 1), rows that are NaN
    scale: float
    bias_shape: tuple | None


def distance_forward(q, k, scale):
    """Steps (1) and (2).

    Parameters
    ----------
    q, k : ndarray, shapes (..., T, D), (..., S, D)
        Queries, keys.
    scale : float
        The factor c.

    Returns
    -------
    z : ndarray, shape (..., T, S)
        Scores, nats.
    delta : ndarray, shape (..., T, S, D)
        Differences.
    """
    delta = q[..., :, None, :] - k[..., None, :, :]
    return -scale * np.sum(np.square(delta), axis=-1), delta


def distance_backward(dz, delta, scale):
    """ddelta = -2 c dz delta, of which dq is the sum over the keys, -dk that over the queries.

    Parameters
    ----------
    dz : ndarray, shape (..., T, S)
        Gradient of the scores.
    delta : ndarray, shape (..., T, S, D)
        From the forward.
    scale : float
        The factor c.

    Returns
    -------
    dq, dk : ndarray, shapes (..., T, D), (..., S, D)
        Not summed over broadcast leading axes yet.
    """
    ddelta = (-2.0 * scale) * dz[..., None] * delta
    return np.sum(ddelta, axis=-2), -np.sum(ddelta, axis=-3)


def spectral_forward(w, sigma, left, right):
    """Rescale a matrix so that its largest singular value is a given number.

    Parameters
    ----------
    w : ndarray, shape (C, D)
        A projection.
    sigma : float
        What the largest singular value shall be; in the paper that of the initial w, in plain
        spectral normalisation 1.
    left, right : ndarray, shapes (C,), (D,)
        Singular vectors of the largest singular value, constants here as in the power iteration.

    Returns
    -------
    out : ndarray, shape (C, D)
        sigma w / (left w right).
    now : ndarray, shape ()
        left w right, for the backward.
    """
    now = np.sum(left[:, None] * w * right)
    return w * (sigma / now), now


def spectral_backward(dout, w, sigma, left, right, now):
    """dw = (sigma / now) (dout - (sum dout w) / now * left right^T).

    Parameters
    ----------
    dout : ndarray, shape (C, D)
        Gradient of the rescaled matrix.
    w, sigma, left, right, now
        As in the forward.

    Returns
    -------
    ndarray, shape (C, D)
    """
    inner = np.sum(dout * w) / now
    return (dout - inner * left[:, None] * right) * (sigma / now)


def l2_distance_forward(
    q, k, v, *, mask=None, causal=False, align="lower_right", scale=None, bias=None,
    empty_row="zero",
):  # fmt: skip
    """Mix the values with softmax weights that fall with the squared distance.

    Parameters
    ----------
    q : ndarray, shape (..., H, T, D)
        Queries; the head axis may be absent.
    k : ndarray, shape (..., H, S, D)
        Keys; pass q again for tied projections, the gradient of the array is then dq + dk.
    v : ndarray, shape (..., H, S, E)
        Values.
    mask : bool ndarray, broadcast to (..., H, T, S), optional
        True = may attend.
    causal : bool
        Hide the keys behind each query.
    align : {"lower_right", "upper_left"}
        Where the causal diagonal lies when T != S.
    scale : float, nats per squared unit of length, optional
        The factor c; 1/sqrt(D) by default.
    bias : ndarray, broadcast to (..., H, T, S), nats, optional
        Added to the scores; -inf gives a weight of 0.
    empty_row : {"zero", "nan", "uniform", "raise"}
        Output of a query that may see no key.

    Returns
    -------
    out : ndarray, shape (..., H, T, E)
        Outputs.
    cache : Cache
        For the backward; holds ``z``, ``p`` and ``lse``.

    Raises
    ------
    ShapeError
        When widths, lengths or leading axes do not fit.
    DTypeError
        When an argument is no float32 or float64 array, or the mask is not boolean.
    ParameterError
        When an option or a number is outside its domain, or a row is empty under "raise".
    MemoryLimitError
        When the differences, D numbers a score, would take more than 2 GiB.

    Notes
    -----
    ViTGAN writes a distance d(q, k) / sqrt(D) under the softmax, without a sign. Its published
    code takes mean_d q^2 - 2 q.k + mean_d k^2 times 1/sqrt(D), with a plus: that is no distance
    (the squares are averaged, the product is summed), it prefers distant keys, and it takes the
    norms of q for those of k although one projection makes three separate parts. The
    Lipschitz constant that both papers want needs minus the squared distance, as Kim et al. have
    it; so does this row. ``scale=-c`` turns the sign. Projections, their tying and the learned
    temperature of the code are the caller's; without tying, the theorem does not hold. Nor
    does it hold when values see what the tied projection drops, as in heads narrower than the
    tokens with a free projection of the values: two tokens may be near as queries and far apart
    as values, and the largest ratio grows linearly with the inputs (measured in the tutorial).
    Kim et al. build the projection of the values from that of the queries.

    The distance is computed from differences. Its expansion 2 q.k - q.q - k.k is cheaper but
    cancels for tokens far from the origin, and a token's distance to itself may come out negative.

    Source
    ------
    scores/l2_distance in the catalog; official code, and a digest of section 3; grade C.

    References
    ----------
    Lee, Chang, Jiang, Zhang, Tu, Liu 2022, ViTGAN. Kim, Papamakarios, Mnih 2021, The Lipschitz
    Constant of Self-Attention.

    Examples
    --------
    >>> import numpy as np
    >>> q, k = np.array([[7.0]]), np.array([[8.0], [7.0]])
    >>> v = np.array([[0.0], [4.0]])
    >>> out, cache = l2_distance_forward(q, k, v, scale=np.log(3.0))
    >>> out.round(12).tolist(), cache.p.round(12).tolist()
    ([[3.0]], [[0.25, 0.75]])
    """
    n = core.check.attention(
        q, k, v, mask=mask, bias=bias, align=align, scale=scale, empty_row=empty_row
    )
    core.check.memory((*n["..."], n["T"], n["S"], n["D"]), q.dtype, "the differences")
    scale = core.default_scale(n["D"], scale)
    live = core.visible(q, k, mask=mask, causal=causal, align=align, empty_row=empty_row)
    q, k, v, poison = core.quarantine(q, k, v, live, empty_row)

    z, delta = distance_forward(q, k, scale)  # (1) (2)
    y = z
    if bias is not None:
        clean, poison = core.quarantine_bias(bias, live, poison)
        y = z + clean
    p, lse = core.softmax_forward(y, live, empty_row)  # (3)
    out = core.mix_forward(p, v)  # (4)

    out = np.where(poison, np.nan, out)
    lse = np.where(poison[..., 0], np.nan, lse)
    bias_shape = None if bias is None else bias.shape
    return out, Cache(q.shape, k.shape, v, delta, z, p, lse, live, poison, scale, bias_shape)


def l2_distance_backward(dout, cache):
    """Gradients of :func:`l2_distance_forward`, its steps read from the bottom up.

    Parameters
    ----------
    dout : ndarray, shape (..., H, T, E)
        Gradient of the output.
    cache : Cache
        From the forward.

    Returns
    -------
    dict
        Under "q", "k", "v" and, when given, "bias".
    """
    q_shape, k_shape, v, delta, _, p, _, live, poison, scale, bias_shape = cache
    lead = np.broadcast_shapes(p.shape[:-2], v.shape[:-2])
    core.check.cotangent(dout, (*lead, p.shape[-2], v.shape[-1]))
    dout = np.where(poison, 0.0, dout)

    dp, dv = core.mix_backward(dout, p, v)  # (4')
    dz = core.softmax_backward(dp, p, live)  # (3')
    gradients = {} if bias_shape is None else {"bias": core.sum_to(dz, bias_shape)}
    dq, dk = distance_backward(dz, delta, scale)  # (2') (1')

    return {"q": core.sum_to(dq, q_shape), "k": core.sum_to(dk, k_shape), "v": dv, **gradients}


def _example(rng):
    return core.examples.attention(rng, options=("causal", "mask", "bias"))


def _causal(rng):
    return _example(rng)["causal-upper-left"]


def _flat(rng):
    return _example(rng)["mask"] | {"scale": 0.0}


def _key_bias(kwargs):
    """2 c q.k - c k.k, and what the row has in common cancels."""
    c, k = kwargs["scale"], kwargs["k"]
    return kwargs | {"scale": 2 * c, "bias": kwargs["bias"] - c * np.sum(k * k, -1)[:, None, :]}


def _same(kwargs):
    return kwargs


SPEC = core.Mechanism(
    key="scores/l2_distance",
    forward=l2_distance_forward,
    backward=l2_distance_backward,
    example=_example,
    flags=frozenset(core.SOFTMAX_FLAGS) - {"scaled", "shift_invariant"},
    reduces_to=(
        core.Reduction(
            "scores/dot_product", "twice the scale and the bias -c k.k", _causal, _key_bias,
            gradients=False,  # there k stands in the bias too; the row's tests add its part
        ),
        core.Reduction("scores/dot_product", "scale 0 is the mean of the values", _flat, _same),
    ),
    claim=(
        "The largest ratio of output change to input change of dot-product attention grows with "
        "the scale of the input; that of tied distance attention stays bounded if the "
        "projection of queries and keys is square and invertible."
    ),
    verified_by=("slow loop", "PyTorch"),
)  # fmt: skip
