r"""Soft and hard visual attention: a decoder looks at one place of the image for each word.

.. math::

    a_t    &= q_t W_q, \qquad h_s = k_s W_k + b                                            &(1)\\
    u_{ts} &= \tanh(a_t + h_s)                                                             &(2)\\
    z_{ts} &= u_{ts} \cdot w + \text{bias}_{ts}                                            &(3)\\
    p_{ts} &= e^{z_{ts}} / \textstyle\sum_{s'} e^{z_{ts'}}                                 &(4)\\
    \beta_t &= \sigma(q_t \cdot w_g + b_g)                                                 &(5)\\
    o_t    &= \beta_t \textstyle\sum_s r_{ts}\, v_s, \qquad
    r_{ts} = p_{ts} \text{ (soft)} \text{ or } [s = s_t],\ s_t \sim p_t \text{ (hard)}     &(6)

The query is the decoder's state before word t, keys and values are the annotations of the image.
Two losses act on p: the doubly stochastic penalty, and for hard attention, where (6) has no
derivative, a cost :math:`c_t` of the places drawn (REINFORCE):

.. math::

    L       &= \lambda \textstyle\sum_s (\tau - \sum_t p_{ts})^2                           &(7)\\
    dp_{ts} &= \lambda_r\, c_t\, [s = s_t] / p_{ts} + \lambda_e\, (\ln p_{ts} + 1)         &(8)

The mean of (8) over the draws is the derivative of the expected cost, less :math:`\lambda_e` times
that of the entropy.

Source: Xu et al. 2015, sections 3.1.2, 4.1, 4.2; the official capgen.py was read; grade A.
"""

from typing import NamedTuple

import numpy as np

from attention_ref import core


class Cache(NamedTuple):
    """What the backward needs, and what implementers compare with (``p``, ``gate``, ``lse``)."""

    q: np.ndarray  # (..., T, D), rows with NaN or infinity replaced by zeros
    k: np.ndarray  # (..., S, Dk), likewise
    v: np.ndarray  # (..., S, E), likewise
    given: dict  # the parameters by name, without those that are None
    u: np.ndarray  # (..., T, S, M), hidden units
    p: np.ndarray  # (..., T, S), weights
    r: np.ndarray  # (..., T, S), what mixes the values: p, or the places drawn as 0 and 1
    lse: np.ndarray  # (..., T), log of the sum of exponentials, nats; -inf for an empty row
    gate: np.ndarray | float  # (..., T, 1), beta; 1 without a gate
    mixed: np.ndarray  # (..., T, E), outputs before the gate
    live: np.ndarray  # (..., T, S), True = may attend
    poison: np.ndarray  # (..., T, 1), rows that are NaN
    hard: bool
    bias_shape: tuple | None


def _check(q, k, v, given, rng, mask, bias, empty_row):
    """The checks at the door."""
    axes = {
        "Wq": "... D M", "Wk": "... Dk M", "w": "... M", "b": "... M", "w_g": "... D",
        "b_g": "... 1",
    }  # fmt: skip
    named = {name: (x, axes[name]) for name, x in given.items()}
    n = core.check.shapes(q=(q, "... T D"), k=(k, "... S Dk"), v=(v, "... S E"), **named)
    if "b_g" in given and "w_g" not in given:
        raise core.errors.ParameterError("b_g is given without w_g, expected both or w_g alone")
    if rng is not None:
        core.check.generator("rng", rng)
    full = (*n["..."], n["T"], n["S"])
    core.check.check_mask(mask, full)
    core.check.check_bias(bias, full)
    core.check.option("empty_row", empty_row, core.check.EMPTY_ROWS)
    hint = "a slice of the queries at a time"
    core.check.memory((*full, n["M"]), q.dtype, "the hidden units", hint)


def show_attend_tell_forward(
    q, k, v, Wq, Wk, w, b=None, w_g=None, b_g=None, *, rng=None, mask=None, bias=None,
    empty_row="zero",
):  # fmt: skip
    """Mix the annotations of an image for each state of a decoder, or pick one of them.

    Parameters
    ----------
    q : ndarray, shape (..., T, D)
        States of the decoder, one before each word.
    k : ndarray, shape (..., S, Dk)
        Annotations, one a place of the image.
    v : ndarray, shape (..., S, E)
        What is mixed; in the paper the annotations again.
    Wq : ndarray, shape (..., D, M)
        Projection of the states to M hidden units.
    Wk : ndarray, shape (..., Dk, M)
        Projection of the annotations.
    w : ndarray, shape (..., M)
        Read-out of the hidden units.
    b : ndarray, shape (..., M), optional
        Bias of the hidden units.
    w_g : ndarray, shape (..., D), optional
        Weights of the gate; without them there is no gate.
    b_g : ndarray, shape (..., 1), optional
        Bias of the gate.
    rng : numpy.random.Generator, optional
        With it attention is hard: a place is drawn for each query. None is soft.
    mask : bool ndarray, broadcast to (..., T, S), optional
        True = may attend.
    bias : ndarray, broadcast to (..., T, S), nats, optional
        Added to the scores; -inf gives a weight of 0.
    empty_row : {"zero", "nan", "uniform", "raise"}
        Output of a query that may see no key, before the gate.

    Returns
    -------
    out : ndarray, shape (..., T, E)
        Outputs.
    cache : Cache
        For the backward; holds ``p``, ``r``, ``gate`` and ``lse``.

    Raises
    ------
    ShapeError
        When widths, lengths or leading axes do not fit.
    DTypeError
        When an argument is no float32 or float64 array, the mask is not boolean, or rng is no
        Generator.
    ParameterError
        When an option is outside its domain, b_g comes without w_g, or a row is empty under
        "raise".
    MemoryLimitError
        When the hidden units would take more than 2 GiB.

    Notes
    -----
    The official code calls the gate a selector and can leave it out. It has one more bias, of the
    scores, which moves a whole row and is left out; its optional deeper network and its
    temperature are left out too. Hard attention there flips one coin a batch and uses the soft
    weights half of the time: call with rng or without. Its known gradient of p is (8) with
    lambda_r = 1/10. The states of a decoder depend on the outputs before, so a decoder calls this
    with T = 1 once a word, or with several at once when the states are known.

    Source
    ------
    scores/show_attend_tell in the catalog; sections 3.1.2, 4.1 and 4.2, official capgen.py;
    grade A.

    References
    ----------
    Xu et al. 2015, Show, Attend and Tell.

    Examples
    --------
    >>> import numpy as np
    >>> q, k = np.array([[0.0]]), np.array([[0.0], [np.log(2.0)]])
    >>> v, one = np.array([[0.0], [4.0]]), np.ones((1, 1))
    >>> w = np.array([np.log(3.0) / 0.6])
    >>> out, cache = show_attend_tell_forward(q, k, v, one, one, w, w_g=np.ones(1))
    >>> cache.p.round(12).tolist(), cache.gate.tolist(), out.round(12).tolist()
    ([[0.25, 0.75]], [[0.5]], [[1.5]])
    """
    given = {"Wq": Wq, "Wk": Wk, "w": w, "b": b, "w_g": w_g, "b_g": b_g}
    given = {name: x for name, x in given.items() if x is not None}
    _check(q, k, v, given, rng, mask, bias, empty_row)
    live = core.visible(q, k, mask=mask, empty_row=empty_row)
    q, k, v, poison = core.quarantine(q, k, v, live, empty_row)

    a, h = q @ Wq, k @ Wk  # (1)
    if b is not None:
        h = h + b[..., None, :]
    u = np.tanh(a[..., :, None, :] + h[..., None, :, :])  # (2)
    z = np.sum(u * w[..., None, None, :], axis=-1)  # (3)
    if bias is not None:
        clean, poison = core.quarantine_bias(bias, live, poison)
        z = z + clean
    p, lse = core.softmax_forward(z, live, empty_row)  # (4)
    gate = 1.0 if w_g is None else gate_forward(q, w_g, b_g)  # (5)
    r = p if rng is None else draw_forward(p, rng)
    mixed = core.mix_forward(r, v)  # (6)

    out = np.where(poison, np.nan, gate * mixed)
    lse = np.where(poison[..., 0], np.nan, lse)
    bias_shape = None if bias is None else bias.shape
    hard = rng is not None
    return out, Cache(q, k, v, given, u, p, r, lse, gate, mixed, live, poison, hard, bias_shape)


def gate_forward(q, w_g, b_g):
    """Step (5): one number a query, between 0 and 1.

    Parameters
    ----------
    q, w_g, b_g : ndarray, shapes (..., T, D), (..., D), (..., 1) or None
        Queries, weights and bias.

    Returns
    -------
    ndarray, shape (..., T, 1)
    """
    logit = np.sum(q * w_g[..., None, :], axis=-1, keepdims=True)
    return core.logistic(logit if b_g is None else logit + b_g[..., None, :])


def draw_forward(p, rng):
    """A place for each row of weights, as 0 and 1; rows without weight draw nothing.

    Parameters
    ----------
    p : ndarray, shape (..., T, S)
        Weights.
    rng : numpy.random.Generator
        One uniform number a row.

    Returns
    -------
    ndarray, shape (..., T, S)
    """
    upto, places = np.cumsum(p, axis=-1), np.arange(p.shape[-1], like=p)
    passed = upto <= rng.random((*p.shape[:-1], 1))
    last = np.sum(upto < upto[..., -1:], axis=-1, keepdims=True)  # where rounding passes all
    chosen = np.minimum(np.sum(passed, axis=-1, keepdims=True), last)
    return np.where((places == chosen) & (p > 0), np.ones_like(p), 0.0)


def show_attend_tell_backward(dout, cache, *, dp=None):
    """Gradients of :func:`show_attend_tell_forward`, its steps read from the bottom up.

    Parameters
    ----------
    dout : ndarray, shape (..., T, E)
        Gradient of the output.
    cache : Cache
        From the forward.
    dp : ndarray, shape (..., T, S), optional
        Gradient of the weights ``cache.p`` from elsewhere: (7), (8). Hard attention has no other.

    Returns
    -------
    dict
        Under "q", "k", "v", "Wq", "Wk", "w" and, when given, "b", "w_g", "b_g", "bias".
    """
    q, k, v, given, u, p, r, _, gate, mixed, live, poison, hard, bias_shape = cache
    core.check.cotangent(dout, mixed.shape)
    dout = np.where(poison, 0.0, dout)

    dr, dv = core.mix_backward(dout * gate, r, v)  # (6')
    grads = {"v": dv}
    if "w_g" in given:  # (5')
        dlogit = np.sum(dout * mixed, axis=-1, keepdims=True) * gate * (1.0 - gate)
        grads |= {"w_g": np.sum(dlogit * q, axis=-2), "b_g": np.sum(dlogit, axis=-2)}
    dr = np.zeros_like(dr) if hard else dr
    if dp is not None:
        core.check.cotangent(dp, p.shape, "dp")
        dr = dr + np.where(poison, 0.0, dp)
    dz = core.softmax_backward(dr, p, live)  # (4')
    if bias_shape is not None:
        grads["bias"] = dz
    dz = dz[..., None]  # (3')
    grads["w"] = np.sum(dz * u, axis=(-3, -2))
    dx = dz * given["w"][..., None, None, :] * (1.0 - np.square(u))  # (2')
    da, dh = np.sum(dx, axis=-2), np.sum(dx, axis=-3)
    dq = da @ np.swapaxes(given["Wq"], -1, -2)  # (1')
    grads["q"] = dq + dlogit * given["w_g"][..., None, :] if "w_g" in given else dq
    grads["k"] = dh @ np.swapaxes(given["Wk"], -1, -2)
    grads |= {"Wq": np.swapaxes(q, -1, -2) @ da, "Wk": np.swapaxes(k, -1, -2) @ dh}
    grads["b"] = np.sum(dh, axis=-2)
    shapes = {name: x.shape for name, x in ({"q": q, "k": k, "v": v} | given).items()}
    shapes |= {} if bias_shape is None else {"bias": bias_shape}
    return {name: core.sum_to(grads[name], shape) for name, shape in shapes.items()}


def show_attend_tell_penalty_forward(p, *, target=1.0, weight=1.0):
    """The doubly stochastic penalty: every place should be looked at ``target`` times in all.

    Parameters
    ----------
    p : ndarray, shape (..., T, S)
        Weights of the T words of a caption.
    target : float
        The paper's 1. The weights sum to T, so T / S is what they can reach.
    weight : float
        The factor lambda; 1 in the paper.

    Returns
    -------
    loss : ndarray, shape (...)
        One number a caption.
    cache : tuple
        For the backward.

    Notes
    -----
    The official code sums over the captions of a batch and takes the mean over the places; (7), the
    paper's, sums over the places.
    """
    core.check.shapes(p=(p, "... T S"))
    missing = target - np.sum(p, axis=-2, keepdims=True)  # (7)
    return weight * np.sum(np.square(missing[..., 0, :]), axis=-1), (missing, p.shape, weight)


def show_attend_tell_penalty_backward(dloss, cache):
    """dp = -2 lambda (target - sum_t p) dloss, the same for every word.

    Parameters
    ----------
    dloss : ndarray, shape (...)
        Gradient of the loss.
    cache : tuple
        From the forward.

    Returns
    -------
    dict
        Under "p".
    """
    missing, shape, weight = cache
    core.check.cotangent(dloss, shape[:-2], "dloss")
    dp = -2.0 * weight * dloss[..., None, None] * missing  # (7')
    return {"p": np.broadcast_to(dp, shape)}


def show_attend_tell_surrogate(cost, cache, *, weight=1.0, entropy=0.0):
    """Step (8): the gradient of the weights that a draw of hard attention stands for.

    Parameters
    ----------
    cost : ndarray, shape (..., T)
        Cost of the places drawn, less a baseline that does not depend on them.
    cache : Cache
        From a forward with rng.
    weight : float
        The factor lambda_r.
    entropy : float
        The factor lambda_e, a reward for undecided weights.

    Returns
    -------
    ndarray, shape (..., T, S)
        For ``dp`` of the backward; 0 where the weight is 0.
    """
    some = cache.p > 0
    p = np.where(some, cache.p, 1.0)
    dp = weight * cost[..., None] * cache.r / p + entropy * (np.log(p) + 1.0)  # (8)
    return np.where(some, dp, 0.0)


M, DK = 4, 2


def _parameters(rng, kwargs):
    """One network for all heads; "no-heads" and "bias" go without gate."""
    lead, width = kwargs["k"].shape[:-1], kwargs["q"].shape[-1]
    extra = {
        "q": 0.5 * kwargs["q"], "k": 0.5 * rng.standard_normal((*lead, DK)),
        "Wq": 0.5 * rng.standard_normal((width, M)), "Wk": 0.5 * rng.standard_normal((DK, M)),
        "w": 0.5 * rng.standard_normal(M), "b": 0.5 * rng.standard_normal(M),
    }  # fmt: skip
    if kwargs["q"].ndim > 2 and "bias" not in kwargs:
        extra |= {"w_g": rng.standard_normal(width), "b_g": rng.standard_normal(1)}
    return extra


def _example(rng):
    return core.examples.attention(rng, options=("mask", "bias"), extra=_parameters, scale=False)


def _open(rng):
    return _example(rng)["mask"] | {"w_g": np.zeros(4), "b_g": np.full(1, 40.0)}


def _additive(kwargs):
    return {name: x for name, x in kwargs.items() if name not in ("w_g", "b_g")}


SPEC = core.Mechanism(
    key="scores/show_attend_tell", forward=show_attend_tell_forward,
    backward=show_attend_tell_backward, example=_example,
    flags=frozenset({
        "attention", "masked", "permutation_equivariant", "linear_in_v",
    }),
    opt_out={"empty_rows": "the mean under 'uniform' is gated; the row's tests do all four"},
    reduces_to=(core.Reduction("scores/additive", "an open gate", _open, _additive),),
    claim=(
        "A decoder trained on captions alone looks at each glyph as it names it, and the doubly "
        "stochastic penalty evens out how often each place is looked at."
    ),
    verified_by=("slow loop", "PyTorch"),
)  # fmt: skip
