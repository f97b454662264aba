r"""Sigmoid attention: every key is weighed by itself, without a sum over the others.

.. math::

    z_{ts} &= \kappa \tanh(c\, q_t \cdot k_s / \kappa) + a_{ts} + b                      &(1)\\
    p_{ts} &= \sigma(z_{ts}) = 1 / (1 + e^{-z_{ts}})                                     &(2)\\
    o_t    &= \textstyle\sum_s p_{ts}\, v_s                                              &(3)

with an additive bias a where one is given and a number b for each head, :math:`-\ln n` for n keys
unless given. A weight depends on its own score alone: a further key changes no other weight, and
the rows do not sum to 1. The :math:`-\ln n` keeps their sums bounded as n grows.

Source: Ramapuram et al. 2024, section 2; code read: attention.py of the simulator and
flash_sigmoid/README.md of apple/ml-sigmoid-attention; grade B.
"""

import math
from typing import NamedTuple

import numpy as np

from attention_ref import core


class Cache(NamedTuple):
    """What the backward needs, and what implementers compare with (``p``)."""

    q: np.ndarray  # (..., T, D), rows with NaN or infinity replaced by zeros
    k: np.ndarray  # (..., S, D), likewise
    v: np.ndarray  # (..., S, E), likewise
    capped: np.ndarray  # (..., T, S), scores after the softcap, before bias, b and mask
    p: np.ndarray  # (..., T, S), weights, each in [0, 1]
    poison: np.ndarray  # (..., T, 1), rows that are NaN
    scale: float
    softcap: float | None
    b_shape: tuple | None  # None for a number
    bias_shape: tuple | None


def _check(q, k, v, b, count, **options):
    """The checks of ``core.check.attention``, and those of b and n; the lengths by letter."""
    lengths = core.check.attention(q, k, v, **options)
    core.check.count("n", count, low=1, unit="tokens")
    if b is not None and count is not None:
        raise core.errors.ParameterError(
            f"n is {count!r} and b is given too, expected one of them; hint: n only sets b = -ln n"
        )
    if b is None or isinstance(b, (int, float, np.number)):
        core.check.number("b", None if b == -math.inf else b, unit="nats")
    else:
        core.check.shapes(b=(b, "... H"))
        core.check.check_bias(b, lengths["..."], "b", "(..., H)")
    return lengths


def sigmoid_forward(
    q, k, v, b=None, *, n=None, mask=None, causal=False, align="lower_right", scale=None,
    softcap=None, bias=None,
):  # fmt: skip
    """Sum the values with weights that are the logistic function of the scores.

    Parameters
    ----------
    q : ndarray, shape (..., T, D)
        Queries.
    k : ndarray, shape (..., S, D)
        Keys.
    v : ndarray, shape (..., S, E)
        Values.
    b : float, or ndarray, broadcast to (..., H), nats, optional
        Added to all scores of a head; -ln n when not given.
    n : int, >= 1, tokens, optional
        The number of keys that the default of b is for; S when not given.
    mask : bool ndarray, broadcast to (..., T, S), optional
        True = may attend.
    causal : bool
        Hide the keys behind each query.
    align : {"lower_right", "upper_left"}
        Where the causal diagonal lies when T != S.
    scale : float, dimensionless, optional
        The factor c; 1/sqrt(D) by default.
    softcap : float, > 0, nats, optional
        Bound on the scores before bias, b and mask.
    bias : ndarray, broadcast to (..., T, S), nats, optional
        Added to the scores after the softcap; -inf gives a weight of 0.

    Returns
    -------
    out : ndarray, shape (..., T, E)
        Outputs; zero for a query that may see no key.
    cache : Cache
        For the backward; holds ``p``.

    Raises
    ------
    ShapeError
        When widths, lengths or leading axes do not fit.
    DTypeError
        When an argument is no float32 or float64 array, or the mask is not boolean.
    ParameterError
        When an option or a number is outside its domain, or both b and n are given.
    MemoryLimitError
        When the scores would take more than 2 GiB.

    Notes
    -----
    The last leading axis of q is the head's. b counts all S keys, also in causal attention where
    the first queries see few: their row sums are small. In the official code b is a constant, 0
    by default in the kernel. A model trained at length n and used at another keeps its n. What
    assumes rows that sum to 1 (rollout, entropy) does not apply.

    Source
    ------
    normalizers/sigmoid in the catalog; section 2 of the paper, official code; grade B.

    References
    ----------
    Ramapuram et al. 2024, Theory, Analysis, and Best Practices for Sigmoid Self-Attention.

    Examples
    --------
    >>> import numpy as np
    >>> q = np.array([[1.0]])
    >>> k = np.array([[np.log(2.0)], [np.log(6.0)]])
    >>> v = np.array([[4.0], [12.0]])
    >>> out, cache = sigmoid_forward(q, k, v)
    >>> out.round(12).tolist(), cache.p.round(12).tolist()
    ([[11.0]], [[0.5, 0.75]])
    """
    lengths = _check(q, k, v, b, n, mask=mask, bias=bias, align=align, scale=scale, softcap=softcap)
    scale = core.default_scale(lengths["D"], scale)
    live = core.visible(q, k, mask=mask, causal=causal, align=align)
    q, k, v, poison = core.quarantine(q, k, v, live)
    b = -math.log(n or max(lengths["S"], 1)) if b is None else b
    b_shape = getattr(b, "shape", None) or None
    if b_shape is None:
        level = float(b)
    else:
        level = b[..., None, None]
        good = np.isfinite(level) | (level == -np.inf)
        level, poison = np.where(good, level, 0.0), poison | np.any(live & ~good, -1, keepdims=True)

    z = capped = core.softcap_forward(core.scores_forward(q, k, scale), softcap)  # (1)
    if bias is not None:
        clean, poison = core.quarantine_bias(bias, live, poison)
        z = z + clean
    p = np.where(live, core.logistic(z + level), 0.0)  # (2)
    out = core.mix_forward(p, v)  # (3)

    out = np.where(poison, np.nan, out)
    bias_shape = None if bias is None else bias.shape
    return out, Cache(q, k, v, capped, p, poison, scale, softcap, b_shape, bias_shape)


def sigmoid_backward(dout, cache):
    """Gradients of :func:`sigmoid_forward`, its steps read from the bottom up.

    Parameters
    ----------
    dout : ndarray, shape (..., T, E)
        Gradient of the output.
    cache : Cache
        From the forward.

    Returns
    -------
    dict
        Under "q", "k", "v" and, when given as arrays, "b" and "bias".
    """
    q, k, v, capped, p, poison, scale, softcap, b_shape, bias_shape = cache
    lead = np.broadcast_shapes(p.shape[:-2], v.shape[:-2])
    core.check.cotangent(dout, (*lead, p.shape[-2], v.shape[-1]))
    dout = np.where(poison, 0.0, dout)

    dp, dv = core.mix_backward(dout, p, v)  # (3')
    dz = dp * p * (1.0 - p)  # (2')
    gradients = {} if bias_shape is None else {"bias": core.sum_to(dz, bias_shape)}  # (1')
    if b_shape is not None:
        gradients["b"] = core.sum_to(np.sum(dz, axis=(-2, -1)), b_shape)
    dz = core.softcap_backward(dz, capped, softcap)
    dq, dk = core.scores_backward(dz, q, k, scale)

    return {"q": dq, "k": dk, "v": dv, **gradients}


def _example(rng):
    """Two heads with a b each; n where there are no heads; the default in the causal cases."""

    def extra(rng, kwargs):
        if kwargs["q"].ndim == 2:
            return {"n": 9}
        more = {} if kwargs["q"].ndim == 4 else {n: kwargs[n][None] for n in ("q", "k", "v")}
        return more if "causal" in kwargs else more | {"b": rng.standard_normal(2) - 1.0}

    return core.examples.attention(rng, extra=extra)


def _rare(rng):
    """b = -50, and a further channel of ones among the values, which sums the rows."""
    kwargs = core.examples.qkv(rng)
    ones = np.ones((*kwargs["v"].shape[:-1], 1))
    return kwargs | {"v": np.concatenate([kwargs["v"], ones], axis=-1), "b": -50.0}


def _without(kwargs, *names):
    return {n: a for n, a in kwargs.items() if n not in names}


def _one_key_each(kwargs):
    """Every key alone in a batch of its own, beside a sink with logit -b."""
    return {
        "q": kwargs["q"][..., None, :, :],
        "k": kwargs["k"][..., :, None, :],
        "v": kwargs["v"][..., :, None, :],
        "b": -kwargs["b"],
    }


SPEC = core.Mechanism(
    key="normalizers/sigmoid",
    forward=sigmoid_forward,
    backward=sigmoid_backward,
    example=_example,
    flags=frozenset(core.SOFTMAX_FLAGS) - {"row_stochastic", "shift_invariant"},
    reduces_to=(
        core.Reduction(
            key="normalizers/sink",
            says="one key is softmax over this key and a sink with logit -b",
            kwargs=lambda rng: core.examples.qkv(rng, S=1) | {"b": 0.3},
            other=lambda kwargs: kwargs | {"b": -0.3},
        ),
        core.Reduction(
            key="normalizers/sink",
            says="every key has a softmax of its own with a sink of its own",
            kwargs=lambda rng: core.examples.qkv(rng) | {"b": -0.8},
            other=_one_key_each,
            compare=lambda out, other: (out, np.sum(other, axis=-3)),
            gradients=False,
        ),
        core.Reduction(
            key="scores/dot_product",
            says="for very negative b, outputs over row sums are softmax attention",
            kwargs=_rare,
            other=lambda kwargs: _without(kwargs, "b") | {"v": kwargs["v"][..., :-1]},
            compare=lambda out, other: (out[..., :-1] / out[..., -1:], other),
            gradients=False,
        ),
    ),
    claim=(
        "With b = -ln n the outputs of sigmoid attention keep the size of those of softmax "
        "attention as the number of keys grows; without it they grow with it."
    ),
    verified_by=("slow loop", "PyTorch"),
)
