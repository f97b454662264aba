r"""Affine-scaled attention: the token scales its softmax weights, and a constant makes up for it.

.. math::

    z_{ts}   &= \kappa \tanh(c\, q_t \cdot k_s / \kappa) + b_{ts}                      &(1)\\
    s_{ts}   &= e^{z_{ts}} / \textstyle\sum_{s'} e^{z_{ts'}}                           &(2)\\
    \alpha_t &= \phi(x_t \cdot w_\alpha), \qquad \phi(a) = \min(\max(0.1 a + 0.5, 0), 1) &(3)\\
    \beta_t  &= (\bar\alpha - \alpha_t) / n                                            &(4)\\
    p_{ts}   &= \alpha_t s_{ts} + \beta_t \quad\text{on the keys that t may see}       &(5)\\
    o_t      &= \textstyle\sum_s p_{ts}\, v_s                                          &(6)

with the same x that q is made of, one vector :math:`w_\alpha` and one number
:math:`\bar\alpha` for each head, the running mean of :math:`\alpha`. A row sums to
:math:`\alpha_t + m_t \beta_t` for m visible keys: to :math:`\bar\alpha` where all n are seen,
whatever :math:`\alpha` is, and a weight may be negative.

Source: Bae et al. 2026, sections 3, 5 and 6; no official code; grade B.
"""

from typing import NamedTuple

import numpy as np

from attention_ref import core

PHI = ("clip", "sigmoid")


class Cache(NamedTuple):
    """What the backward needs, and what implementers compare with (``alpha``, ``p``, ``lse``)."""

    q: np.ndarray  # (..., T, D), rows with NaN or infinity replaced by zeros
    k: np.ndarray  # (..., S, D), likewise
    v: np.ndarray  # (..., S, E), likewise
    x: np.ndarray  # (..., T or 1, C), likewise
    w_a: np.ndarray  # (..., C), likewise
    capped: np.ndarray  # (..., T, S), scores after the softcap, before bias and mask
    soft: np.ndarray  # (..., T, S), softmax weights
    alpha: np.ndarray  # (..., T or 1, 1), the scale
    p: np.ndarray  # (..., T, S), weights after (5)
    lse: np.ndarray  # (..., T), log of the sum of exponentials, nats
    live: np.ndarray  # (..., T, S), True = may attend
    shown: np.ndarray  # (..., T, S), likewise, without keys whose bias is -inf
    poison: np.ndarray  # (..., T, 1), rows that are NaN
    n: int
    phi: str
    scale: float
    softcap: float | None
    ma_shape: tuple | None  # None for a number
    bias_shape: tuple | None


def phi_forward(a, phi="clip"):
    """The scale of a logit: a straight line from 0 at -5 to 1 at 5, or the logistic function.

    Parameters
    ----------
    a : ndarray
        Logits.
    phi : {"clip", "sigmoid"}
        Which of the two.

    Returns
    -------
    ndarray, shape of a
        From 0 to 1.
    """
    return core.logistic(a) if phi == "sigmoid" else np.clip(0.1 * a + 0.5, 0.0, 1.0)


def phi_backward(dalpha, alpha, phi="clip"):
    """Gradient of the logit, written with the scale itself; clipped ones get none.

    Parameters
    ----------
    dalpha, alpha : ndarray
        Gradient of the scale, and the scale.
    phi : {"clip", "sigmoid"}
        As in the forward.

    Returns
    -------
    ndarray, shape of dalpha
    """
    if phi == "sigmoid":
        return dalpha * alpha * (1.0 - alpha)
    return np.where((alpha > 0) & (alpha < 1), 0.1 * dalpha, 0.0)


def affine_scaled_update(alpha_ma, alpha, rho=0.9):
    """The running mean after a batch: rho alpha_ma + (1 - rho) mean of alpha, a number a head.

    Parameters
    ----------
    alpha_ma : float or ndarray, shape (H,)
        The running mean so far; the paper begins with 0.
    alpha : ndarray, shape (..., T, 1)
        ``cache.alpha`` of the forward; of shape (B, H, T, 1) for a mean of shape (H,).
    rho : float, from 0 to 1
        What is kept.

    Returns
    -------
    float or ndarray, shape (H,)
        Constant for the gradients.
    """
    core.check.number("rho", rho, low=0, high=1)
    if getattr(alpha_ma, "shape", ()) == ():
        return rho * alpha_ma + (1.0 - rho) * float(np.mean(alpha))
    mean = np.mean(alpha, axis=(*range(alpha.ndim - 3), -2, -1))
    return rho * alpha_ma + (1.0 - rho) * mean


def _check(q, k, v, x, w_a, alpha_ma, n, phi, **options):
    """The checks of ``core.check.attention``, and those of the affine step; lengths by letter."""
    lengths = core.check.attention(q, k, v, **options)
    lead, C = lengths["..."], core.check.shapes(x=(x, "... R C"), w_a=(w_a, "... C"))["C"]
    core.check.check_bias(x, (*lead, lengths["T"], C), "x", "(..., T, C)")
    core.check.check_bias(w_a, (*lead, C), "w_a", "(..., C)")
    core.check.count("n", n, low=1, unit="tokens")
    core.check.option("phi", phi, PHI)
    if isinstance(alpha_ma, (int, float, np.number)):
        core.check.number("alpha_ma", alpha_ma)
    else:
        core.check.shapes(alpha_ma=(alpha_ma, "... H"))
        core.check.check_bias(alpha_ma, lead, "alpha_ma", "(..., H)")
    return lengths


def affine_scaled_forward(
    q, k, v, x, w_a, alpha_ma, *, n=None, phi="clip", mask=None, causal=False,
    align="lower_right", scale=None, softcap=None, bias=None, empty_row="zero",
):  # fmt: skip
    """Softmax attention whose weights are scaled by the query's token and shifted by a constant.

    Parameters
    ----------
    q : ndarray, shape (..., T, D)
        Queries.
    k : ndarray, shape (..., S, D)
        Keys.
    v : ndarray, shape (..., S, E)
        Values.
    x : ndarray, broadcast to (..., T, C)
        What the scale reads: the tokens that q is made of, (T, C), or (B, 1, T, C) in a batch.
    w_a : ndarray, broadcast to (..., C)
        The vector of the scale, one a head, (H, C).
    alpha_ma : float, or ndarray, broadcast to (..., H)
        Running mean of the scale, see :func:`affine_scaled_update`.
    n : int, >= 1, tokens, optional
        The length that the shift is divided by; S, masked keys included, by default.
    phi : {"clip", "sigmoid"}
        From the logit to the scale.
    mask : bool ndarray, broadcast to (..., T, S), optional
        True = may attend.
    causal : bool
        Hide the keys behind each query.
    align : {"lower_right", "upper_left"}
        Where the causal diagonal lies when T != S.
    scale : float, dimensionless, optional
        The factor c; 1/sqrt(D) by default.
    softcap : float, > 0, nats, optional
        Bound on the scores before bias and mask.
    bias : ndarray, broadcast to (..., T, S), nats, optional
        Added to the scores after the softcap; -inf gives a weight of 0, without the shift.
    empty_row : {"zero", "nan", "uniform", "raise"}
        Output of a query that may see no key; "uniform" is the plain mean of the values.

    Returns
    -------
    out : ndarray, shape (..., T, E)
        Outputs.
    cache : Cache
        For the backward; holds ``alpha``, ``soft``, ``p`` and ``lse``.

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
    The paper's N is the length of the key sequence. With the number of *visible* keys in its
    place every row would sum to alpha_ma; the spread of row sums that it shows needs the full
    length under a causal mask, which is the default here. A decoder with a cache passes the n it
    was trained with. The running mean is a buffer: no gradient flows through it into the scale.
    The gradient with respect to the argument is returned where it is an array; training leaves it
    unused. The mean runs over batch and tokens, a number a head, and whether a step uses the mean
    before or after its own update is the caller's affair: choices of this library.

    Source
    ------
    normalizers/affine_scaled in the catalog; sections 3, 5, 6 of the paper; grade B.

    References
    ----------
    Bae et al. 2026, Affine-Scaled Attention: Towards Flexible and Stable Transformer Attention.

    Examples
    --------
    >>> import numpy as np
    >>> q, k = np.zeros((1, 1)), np.zeros((2, 1))
    >>> v, x = np.array([[4.0], [12.0]]), np.ones((1, 1))
    >>> out, cache = affine_scaled_forward(q, k, v, x, np.array([2.5]), 0.5, n=4)
    >>> cache.alpha.tolist(), cache.p.tolist(), out.tolist()
    ([[0.75]], [[0.3125, 0.3125]], [[5.0]])
    """
    lengths = _check(
        q, k, v, x, w_a, alpha_ma, n, phi, mask=mask, bias=bias, align=align, scale=scale,
        softcap=softcap, empty_row=empty_row,
    )  # fmt: skip
    scale, n = core.default_scale(lengths["D"], scale), n or max(lengths["S"], 1)
    live = core.visible(q, k, mask=mask, causal=causal, align=align, empty_row=empty_row)
    q, k, v, poison = core.quarantine(q, k, v, live, empty_row)
    x, bad_x = _clean(x)
    w_a, bad_w = _clean(w_a)
    ma_shape = getattr(alpha_ma, "shape", None) or None
    mean = float(alpha_ma) if ma_shape is None else alpha_ma[..., None, None]
    bad = bad_x | bad_w[..., None]
    if ma_shape is not None:
        bad, mean = bad | ~np.isfinite(mean), np.where(np.isfinite(mean), mean, 0.0)
    poison = poison | (np.any(live, axis=-1, keepdims=True) & bad)

    z = capped = core.softcap_forward(core.scores_forward(q, k, scale), softcap)  # (1)
    shown = live
    if bias is not None:
        clean, poison = core.quarantine_bias(bias, live, poison)
        z, shown = z + clean, live & (clean != -np.inf)
    soft, lse = core.softmax_forward(z, live, empty_row)  # (2)
    alpha = phi_forward(x @ w_a[..., None], phi)  # (3)
    beta = (mean - alpha) / n  # (4)
    p = np.where(shown, alpha * soft + beta, soft)  # (5)
    out = core.mix_forward(p, v)  # (6)

    out = np.where(poison, np.nan, out)
    lse = np.where(poison[..., 0], np.nan, lse)
    bias_shape = None if bias is None else bias.shape
    return out, Cache(
        q, k, v, x, w_a, capped, soft, alpha, p, lse, live, shown, poison, n, phi, scale, softcap,
        ma_shape, bias_shape,
    )  # fmt: skip


def _clean(a):
    """Rows with NaN or infinity become zeros; where that was, with a last axis of 1."""
    good = np.all(np.isfinite(a), axis=-1)[..., None]
    return np.where(good, a, 0.0), ~good


def affine_scaled_backward(dout, cache):
    """Gradients of :func:`affine_scaled_forward`, its steps read from the bottom up.

    Parameters
    ----------
    dout : ndarray, shape (..., T, E)
        Gradient of the output.
    cache : Cache
        From the forward.

    Returns
    -------
    dict
        Under "q", "k", "v", "x", "w_a" and, when given as arrays, "alpha_ma", "bias".
    """
    q, k, v, x, w_a, capped, soft, alpha, p, _, live, shown, poison, n, phi = cache[:15]
    lead = np.broadcast_shapes(p.shape[:-2], v.shape[:-2])
    core.check.cotangent(dout, (*lead, p.shape[-2], v.shape[-1]))
    dout = np.where(poison, 0.0, dout)

    dp, dv = core.mix_backward(dout, p, v)  # (6')
    dp = np.where(shown, dp, 0.0)  # (5')
    dalpha = np.sum(dp * soft, axis=-1, keepdims=True)
    dbeta = np.sum(dp, axis=-1, keepdims=True)
    dalpha = dalpha - dbeta / n  # (4')
    dlogit = phi_backward(core.sum_to(dalpha, alpha.shape), alpha, phi)  # (3')
    gradients = {
        "x": core.sum_to(dlogit * w_a[..., None, :], x.shape),
        "w_a": core.sum_to(np.sum(dlogit * x, axis=-2), w_a.shape),
    }
    if cache.ma_shape is not None:
        gradients["alpha_ma"] = core.sum_to(np.sum(dbeta, axis=(-2, -1)) / n, cache.ma_shape)
    dz = core.softmax_backward(dp * alpha, soft, live)  # (2')
    if cache.bias_shape is not None:
        gradients["bias"] = core.sum_to(dz, cache.bias_shape)
    dz = core.softcap_backward(dz, capped, cache.softcap)  # (1')
    dq, dk = core.scores_backward(dz, q, k, cache.scale)

    return {"q": dq, "k": dk, "v": dv, **gradients}


def _example(rng):
    """Tokens of 2 channels, some logits beyond 5; n unless a mask or causality hides keys.

    In "plain" one row of x serves all queries.
    """

    def extra(rng, kwargs):
        rows, heads = kwargs["q"].shape[-2], () if kwargs["q"].ndim == 2 else (2,)
        more = {n: kwargs[n][None] for n in "qkv"} if kwargs["q"].ndim == 3 else {}
        more |= {"x": 2.0 * rng.standard_normal((rows, 2)), "w_a": rng.standard_normal((*heads, 2))}
        while np.all(more["x"][:1] @ np.swapaxes(np.atleast_2d(more["w_a"]), 0, 1) <= -5.0):
            more["x"] = 2.0 * rng.standard_normal((rows, 2))  # a first row of scale 0 sees no score
        more["alpha_ma"] = rng.random(2) if heads and "softcap" not in kwargs else 0.4
        if "mask" not in kwargs and "causal" not in kwargs:
            more |= {"n": 9}
        return more | ({"phi": "sigmoid"} if "bias" in kwargs else {})

    cases = core.examples.attention(rng, extra=extra)
    cases["plain"]["x"] = cases["plain"]["x"][:1]
    del cases["causal-long-queries"]  # keeps the golden file small
    return cases


def _affine(rng, level, alpha_ma, **options):
    """All logits at one level, without regard to the tokens."""
    tokens = {"x": np.ones((5, 2)), "w_a": np.full(2, level / 2), "alpha_ma": alpha_ma}
    return core.examples.qkv(rng) | tokens | options


def _plain(kwargs, **more):
    return {n: kwargs[n] for n in ("q", "k", "v", "causal") if n in kwargs} | more


SPEC = core.Mechanism(
    key="normalizers/affine_scaled",
    forward=affine_scaled_forward, backward=affine_scaled_backward, example=_example,
    flags=frozenset({"attention", "causal", "masked", "linear_in_v", "scaled", "shift_invariant"}),
    reduces_to=(
        core.Reduction(
            "scores/dot_product", "a scale of 1 and a running mean of 1",
            lambda rng: _affine(rng, 8.0, 1.0, causal=True), _plain,
        ),
        core.Reduction(
            "scores/dot_product", "a scale of 0: the mean of the values, times the running mean",
            lambda rng: _affine(rng, -8.0, 0.4),
            lambda kwargs: _plain(kwargs, scale=0.0, v=0.4 * kwargs["v"]), gradients=False,
        ),
    ),
    claim="Under a causal mask the rows of affine-scaled attention have sums of their own instead "
    "of 1, and a query that needs nothing leaves less weight on the first token.",
    verified_by=("slow loop", "PyTorch"),
)  # fmt: skip
