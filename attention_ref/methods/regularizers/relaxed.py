r"""Relaxed attention: part of every weight is spread evenly over the visible keys.

.. math::

    z_{ts} &= \kappa \tanh(c\, q_t \cdot k_s / \kappa) + b_{ts}                        &(1)\\
    \pi_{ts} &= e^{z_{ts}} / \textstyle\sum_{s'} e^{z_{ts'}}                           &(2)\\
    p_{ts} &= (1 - \gamma)\, \pi_{ts} + \gamma / n_t                                   &(3)\\
    o_t    &= \textstyle\sum_s p_{ts}\, v_s                                            &(4)

:math:`n_t` is the number of keys that query t may see. So the output is
:math:`(1 - \gamma)` softmax attention plus :math:`\gamma` times the mean of the visible values, and
every gradient of the scores is smaller by the factor :math:`1 - \gamma`.

Source: Lohrenz, Möller, Li, Fingscheidt 2022; abstract read, and the form of (3) in fairseq's
multihead_attention.py (``relaxed_attention_weight``); grade C (the paper's text was not read).
"""

from typing import NamedTuple

import numpy as np

from attention_ref import core


class Cache(NamedTuple):
    """What the backward needs, and what implementers compare with (``p``, ``softmax``)."""

    q: np.ndarray  # (..., T, D), rows with NaN or infinity replaced by zeros
    k: np.ndarray  # (..., S, D), likewise
    v: np.ndarray  # (..., S, E), likewise
    gamma: np.ndarray | float  # number, or broadcast to (..., T, 1)
    capped: np.ndarray  # (..., T, S), scores after the softcap, before bias and mask
    softmax: np.ndarray  # (..., T, S), weights before they are relaxed
    even: np.ndarray  # (..., T, S), 1/n where visible, 0 elsewhere
    p: np.ndarray  # (..., T, S), relaxed weights, those that mix the values
    live: np.ndarray  # (..., T, S), True = may attend
    poison: np.ndarray  # (..., T, 1), rows that are NaN
    scale: float
    softcap: float | None
    bias_shape: tuple | None


def relax_forward(softmax, gamma, live, empty_row="zero"):
    """p = (1 - gamma) softmax + gamma / n over the n visible keys of each row.

    Parameters
    ----------
    softmax : ndarray, shape (..., T, S)
        Weights.
    gamma : float or ndarray, broadcast to (..., T, 1)
        Share that is spread evenly.
    live : bool ndarray, broadcast to (..., T, S)
        True = may attend.
    empty_row : {"zero", "nan", "uniform", "raise"}
        Under "uniform" a row without keys is even over all keys.

    Returns
    -------
    p, even : ndarray, shape (..., T, S)
        Relaxed and even weights.
    """
    seen = np.where(live, np.ones_like(softmax), 0.0)
    count = np.sum(seen, axis=-1, keepdims=True)
    even = seen / np.maximum(count, 1.0)
    if empty_row == "uniform":
        even = np.where(count == 0, 1.0 / max(softmax.shape[-1], 1), even)
    return (1.0 - gamma) * softmax + gamma * even, even


def relax_backward(dp, softmax, even, gamma):
    """d softmax = (1 - gamma) dp and d gamma = sum_s dp (even - softmax), one number a row.

    Parameters
    ----------
    dp, softmax, even : ndarray, shape (..., T, S)
        Gradient of the relaxed weights; from the forward.
    gamma : float or ndarray
        The share.

    Returns
    -------
    dsoftmax : ndarray, shape (..., T, S)
        Gradient of the softmax.
    dgamma : ndarray, shape (..., T, 1)
        Gradient of gamma, not yet summed to its shape.
    """
    return (1.0 - gamma) * dp, np.sum(dp * (even - softmax), axis=-1, keepdims=True)


def relaxed_draw(rng, gamma, sigma):
    """Draw gamma for one batch: normal around ``gamma``, clipped to [0, 1] (fuzzy relaxation).

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of the number.
    gamma : float, in [0, 1]
        Centre.
    sigma : float, >= 0
        Standard deviation.

    Returns
    -------
    float
        Given to :func:`relaxed_forward` as a constant: no gradient flows into the draw.
    """
    core.check.generator("rng", rng)
    core.check.number("gamma", gamma, low=0, high=1)
    core.check.number("sigma", sigma, low=0)
    return min(max(float(rng.normal(gamma, sigma)), 0.0), 1.0)


def _check_gamma(gamma, shape):
    """A number in [0, 1], or a float array that broadcasts to (..., T, 1)."""
    if not hasattr(gamma, "shape") or isinstance(gamma, np.generic):
        if gamma is None or not isinstance(gamma, (int, float, np.number)):
            core.check.kind("gamma", gamma)
        core.check.number("gamma", gamma, low=0, high=1)
        return
    core.check.check_bias(gamma, (*shape[:-1], 1), name="gamma", axes="(..., T, 1)")
    if gamma.ndim == 0:
        raise core.errors.ShapeError(
            "gamma has shape (), expected at least one axis; hint: a Python number for a "
            "constant, shape (1,) for one number that is learned"
        )


def relaxed_forward(
    q, k, v, gamma, *, mask=None, causal=False, align="lower_right", scale=None, softcap=None,
    bias=None, empty_row="zero",
):  # fmt: skip
    """Mix the values with softmax weights of which a share gamma is spread evenly.

    Parameters
    ----------
    q : ndarray, shape (..., T, D)
        Queries.
    k : ndarray, shape (..., S, D)
        Keys.
    v : ndarray, shape (..., S, E)
        Values.
    gamma : float in [0, 1], or ndarray, broadcast to (..., T, 1)
        The share that is spread evenly: a constant, or an array that receives a gradient.
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
        Added to the scores after the softcap; -inf hides a key as the mask does.
    empty_row : {"zero", "nan", "uniform", "raise"}
        Output of a query that may see no key.

    Returns
    -------
    out : ndarray, shape (..., T, E)
        Outputs.
    cache : Cache
        For the backward; holds ``p`` (relaxed) and ``softmax``.

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
    Hidden keys keep the weight 0: n counts the visible keys of each row. The code in fairseq
    divides by the padded length instead and gives padded keys the weight gamma / n too; for
    unpadded sequences both are the same. In self-attention the paper relaxes in training only; in
    cross-attention of a decoder at inference too ("matched inference"). The values of an array
    gamma are not bounded: a step of an optimiser may leave [0, 1], and clipping is the caller's.

    Source
    ------
    regularizers/relaxed in the catalog; grade C.

    References
    ----------
    Lohrenz, Möller, Li, Fingscheidt 2022, Relaxed Attention for Transformer Models.

    Examples
    --------
    >>> import numpy as np
    >>> q, k = np.array([[1.0]]), np.array([[0.0], [np.log(3.0)]])
    >>> v = np.array([[0.0], [4.0]])
    >>> out, cache = relaxed_forward(q, k, v, 0.5)
    >>> out.round(12).tolist(), cache.p.round(12).tolist()
    ([[2.5]], [[0.375, 0.625]])
    """
    n = core.check.attention(
        q, k, v, mask=mask, bias=bias, align=align, scale=scale, softcap=softcap,
        empty_row=empty_row,
    )  # fmt: skip
    _check_gamma(gamma, (*n["..."], n["T"], n["S"]))
    scale = core.default_scale(n["D"], scale)
    live = core.visible(q, k, mask=mask, causal=causal, align=align, empty_row=empty_row)
    if bias is not None:
        live = live & (bias != -np.inf)
    q, k, v, poison = core.quarantine(q, k, v, live, empty_row)
    if hasattr(gamma, "shape"):
        good = np.isfinite(gamma)
        poison = poison | (np.any(live, axis=-1, keepdims=True) & ~good)
        gamma = np.where(good, gamma, 0.0)

    z = capped = core.softcap_forward(core.scores_forward(q, k, scale), softcap)  # (1)
    if bias is not None:
        clean, poison = core.quarantine_bias(bias, live, poison)
        z = z + clean
    softmax, _ = core.softmax_forward(z, live, empty_row)  # (2)
    p, even = relax_forward(softmax, gamma, live, empty_row)  # (3)
    out = core.mix_forward(p, v)  # (4)

    out = np.where(poison, np.nan, out)
    bias_shape = None if bias is None else bias.shape
    parts = (gamma, capped, softmax, even, p, live, poison, scale, softcap, bias_shape)
    return out, Cache(q, k, v, *parts)


def relaxed_backward(dout, cache):
    """Gradients of :func:`relaxed_forward`, its steps read from the bottom up.

    Parameters
    ----------
    dout : ndarray, shape (..., T, E)
        Gradient of the output.
    cache : Cache
        From the forward.

    Returns
    -------
    dict
        Under "q", "k", "v" and, when arrays were given, "gamma" and "bias".
    """
    q, k, v, gamma, capped, softmax, even, p, live, poison, scale, softcap, bias_shape = cache
    lead = np.broadcast_shapes(p.shape[:-2], v.shape[:-2])
    core.check.cotangent(dout, (*lead, p.shape[-2], v.shape[-1]))
    dout = np.where(poison, 0.0, dout)

    dp, dv = core.mix_backward(dout, p, v)  # (4')
    dsoftmax, dgamma = relax_backward(dp, softmax, even, gamma)  # (3')
    gradients = {"v": dv}
    if hasattr(gamma, "shape"):
        gradients["gamma"] = core.sum_to(dgamma, gamma.shape)
    dz = core.softmax_backward(dsoftmax, softmax, live)  # (2')
    if bias_shape is not None:
        gradients["bias"] = core.sum_to(dz, bias_shape)
    dz = core.softcap_backward(dz, capped, softcap)  # (1')
    dq, dk = core.scores_backward(dz, q, k, scale)

    return {"q": dq, "k": dk, **gradients}


SHARES = {"causal": (5, 1), "batch": (2, 1, 1), "bias": (1,), "long-queries": ()}
"""Case -> shape of gamma, () for a number; (1, 1) elsewhere."""


def _example(rng):
    cases = core.examples.attention(rng)
    for name, kwargs in cases.items():
        shape = SHARES.get(name, (1, 1))
        kwargs["gamma"] = rng.uniform(0.2, 0.8, shape) if shape else 0.35
    return cases


def _fixed(gamma):
    return lambda rng: core.examples.qkv(rng) | {"gamma": gamma, "causal": True}


def _without(kwargs):
    return {n: a for n, a in kwargs.items() if n != "gamma"}


SPEC = core.Regularizer(
    key="regularizers/relaxed",
    forward=relaxed_forward,
    backward=relaxed_backward,
    example=_example,
    flags=frozenset(core.SOFTMAX_FLAGS),
    reduces_to=(
        core.Reduction(
            key="scores/dot_product",
            says="gamma = 0 is softmax attention",
            kwargs=_fixed(0.0),
            other=_without,
        ),
        core.Reduction(
            key="scores/dot_product",
            says="gamma = 1 is the mean of the visible values",
            kwargs=_fixed(1.0),
            other=lambda kwargs: _without(kwargs) | {"scale": 0.0},
        ),
    ),
    claim=(
        "On a small training set relaxed attention has a higher entropy and classifies unseen "
        "data at least as well."
    ),
    verified_by=("slow loop",),
)
