r"""Two normalizers of a speech recogniser: learned sparsity inside, monotonic alignment across.

Scores become weights in one of two ways. Sparse, for self-attention, with a learned number a for
each head:

.. math::

    z_{ts} &= c\, q_t \cdot k_s                                                           &(1)\\
    p_{ts} &= [1 + \eta\, (z_{ts} - \theta_t)]_+^{1/\eta}, \qquad \eta = 1 / (1 + e^{-a}), \qquad
        \textstyle\sum_s p_{ts} = 1 \text{ fixes } \theta_t                                &(2)

which is alpha-entmax with :math:`\alpha = 1 + \eta` between softmax and sparsemax. Monotonic, for
the decoder, with a learned offset r for each head: output t starts at the key where output t - 1
stopped, with :math:`p_{-1,s} = [s = 0]`, and at every key stops with probability :math:`\sigma`, or
else goes on:

.. math::

    \sigma_{ts} &= 1 / (1 + e^{-z_{ts} - r}), \qquad
    f_{ts} = (1 - \sigma_{t,s-1})\, f_{t,s-1} + p_{t-1,s}, \qquad
    p_{ts} = \sigma_{ts}\, f_{ts}                                                          &(2)\\
    o_t &= \textstyle\sum_s p_{ts}\, v_s                                                   &(3)

(3) is common to both. f is the probability to reach a key, p the probability to stop there, in
expectation over all runs: so there is a gradient. Weights of the monotonic part sum to at most 1;
the rest ran off the end.

Source: Zhao et al. 2022, abstract; *reconstruction* from its components: Correia et al. 2019
(learned alpha), Raffel et al. 2017 (expected alignment), dropping of heads as it is known for
monotonic heads; grade D.
"""

import math
from typing import NamedTuple

import numpy as np

from attention_ref import core

HALVINGS = 52  # steps of the bisection; one Newton step follows
ALMOST_SOFTMAX = 1e-18  # the least eta: softmax up to rounding, where eta itself would underflow


class Cache(NamedTuple):
    """What the backward needs, and what implementers compare with (``p``)."""

    q: np.ndarray  # (..., T, D), rows with NaN or infinity replaced by zeros
    k: np.ndarray  # (..., S, D), likewise
    v: np.ndarray  # (..., S, E), likewise
    p: np.ndarray  # (..., T, S), weights
    steps: tuple  # of arrays, what the backward of the part needs
    poison: np.ndarray  # (..., T, 1), rows that are NaN
    scale: float
    name: str  # of the part's parameter, "a" or "r"
    shape: tuple  # its shape


def power_forward(u, live, eta):
    """p = [1 + eta u]_+^(1/eta).

    Parameters
    ----------
    u : ndarray, shape (..., T, S), nats
        z - theta.
    live : bool ndarray, broadcast to (..., T, S)
        Elsewhere p = 0.
    eta : ndarray, broadcast to (..., 1, 1)
        alpha - 1.

    Returns
    -------
    p, base, u : ndarray, shape (..., T, S)
        Outside of the support base = 1 and u = 0.
    """
    support = live & (1.0 + eta * u > 0.0)
    u = np.where(support, u, 0.0)
    return np.where(support, np.exp(np.log1p(eta * u) / eta), 0.0), 1.0 + eta * u, u


def sparse_forward(z, live, eta):
    """Entmax with alpha = 1 + eta, 0 < eta < 1.

    Parameters
    ----------
    z : ndarray, shape (..., T, S), nats
        Scores.
    live : bool ndarray, broadcast to (..., T, S)
        True = may attend.
    eta : ndarray, broadcast to (..., 1, 1)
        alpha - 1.

    Returns
    -------
    p, base, u : ndarray, shape (..., T, S)
        Weights; p^eta; z - theta. The bisection only decides, the Newton step after it carries
        the derivative of theta.
    """
    below = np.where(live, z - core.row_max(np.where(live, z, -np.inf)), 0.0)
    step = -np.expm1(-eta * math.log(max(z.shape[-1], 1))) / eta  # of equal scores
    theta = core.row_max(below)  # 0
    for _ in range(HALVINGS):
        step = step / 2.0
        p, _, _ = power_forward(below - theta - step, live, eta)
        theta = np.where(np.sum(p, axis=-1, keepdims=True) > 1.0, theta + step, theta)
    p, base, _ = power_forward(below - theta, live, eta)
    excess, slope = np.sum(p, axis=-1, keepdims=True) - 1.0, np.sum(p / base, -1, keepdims=True)
    theta = theta + excess / np.where(slope == 0.0, 1.0, slope)
    return power_forward(below - theta, live, eta)


def sparse_backward(dp, p, base, u, eta):
    """dz = w (dp - <w, dp> / sum w) with w = p / base; the same bracket times dp/deta gives deta.

    d log p / deta at fixed theta is (x/(1 + x) - log(1 + x)) / eta^2 with x = eta u, which nearly
    cancels for small x; there its series in x is summed.

    Parameters
    ----------
    dp : ndarray, shape (..., T, S)
        Gradient of the weights.
    p, base, u, eta : ndarray
        From the forward.

    Returns
    -------
    dz : ndarray, shape (..., T, S)
    deta : ndarray, shape (...)
    """
    w, x, series = p / base, eta * u, np.zeros_like(u)
    total = np.sum(w, axis=-1, keepdims=True)
    dp = dp - np.sum(w * dp, axis=-1, keepdims=True) / np.where(total == 0.0, 1.0, total)
    for m in range(28, 1, -1):
        series = (m - 1) / m - x * series
    far = (x / base - np.log(base)) / np.square(eta)
    change = p * np.where(x > -0.25, -u * u * series, far)
    return w * dp, np.sum(change * dp, axis=(-2, -1))


def scan(gain, source):
    """x_s = gain_s x_{s-1} + source_s along the last axis.

    Parameters
    ----------
    gain, source : ndarray, shape (..., S)
        The first gain does not matter.

    Returns
    -------
    ndarray, shape (..., S)
    """
    x, rows = 0.0, []
    for s in range(source.shape[-1]):
        x = gain[..., s] * x + source[..., s]
        rows.append(x)
    return np.stack(rows, axis=-1) if rows else source


def monotonic_forward(e, live):
    """Expected monotonic alignment.

    Parameters
    ----------
    e : ndarray, shape (..., T, S)
        Scores plus offset, the logits of stopping.
    live : bool ndarray, broadcast to (..., T, S)
        A hidden key is passed; an output without keys leaves the alignment where it was.

    Returns
    -------
    p, stop, stay, reach : ndarray, shape (..., T, S)
        Weights, sigma, 1 - sigma, f.
    """
    stop, stay = np.where(live, core.logistic(e), 0.0), np.where(live, core.logistic(-e), 1.0)
    gain = np.concatenate([stay[..., :1], stay[..., :-1]], axis=-1)
    alive = np.broadcast_to(np.any(live, axis=-1)[..., None], e.shape)
    state = np.where(np.arange(e.shape[-1], like=e) == 0, np.ones_like(e[..., :1, :]), 0.0)
    state, reach = np.sum(state, axis=-2), []
    for t in range(e.shape[-2]):
        reach.append(scan(gain[..., t, :], state))
        state = np.where(alive[..., t, :], stop[..., t, :] * reach[-1], state)
    reach = np.stack(reach, axis=-2) if reach else np.zeros_like(e)
    return stop * reach, stop, stay, reach


def monotonic_backward(dp, stop, stay, reach, live):
    """Gradient of e, both recurrences run backwards.

    Parameters
    ----------
    dp : ndarray, shape (..., T, S)
        Gradient of the weights.
    stop, stay, reach, live : ndarray
        From the forward.

    Returns
    -------
    ndarray, shape (..., T, S)
    """
    alive = np.broadcast_to(np.any(live, axis=-1)[..., None], dp.shape)
    rows, dstate = [], np.sum(np.zeros_like(dp), axis=-2)
    for t in range(dp.shape[-2] - 1, -1, -1):
        here = dp[..., t, :] + dstate
        turned = np.flip(stay[..., t, :], -1), np.flip(here * stop[..., t, :], -1)
        dreach = np.flip(scan(*turned), -1)
        later = np.concatenate([dreach[..., 1:], np.zeros_like(dreach[..., :1])], axis=-1)
        rows.append((here - later) * reach[..., t, :])
        dstate = np.where(alive[..., t, :], 0.0, dstate) + dreach
    return np.stack(rows[::-1], axis=-2) * stop * stay if rows else dp


def head_drop(rng, heads, drop=0.5):
    """Factors for the outputs of the monotonic heads in training: 0, or heads / heads kept.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of the draw.
    heads : int
        How many.
    drop : float, in [0, 1]
        Probability to drop a head.

    Returns
    -------
    ndarray, shape (heads,)
        All zeros where no head was kept.
    """
    core.check.generator("rng", rng)
    core.check.number("drop", drop, low=0, high=1)
    kept = rng.random(heads) >= drop
    return kept * (heads / max(int(np.sum(kept)), 1))


def adaptive_sparse_monotonic_forward(
    q, k, v, a=None, r=None, *, mask=None, causal=False, align="lower_right", scale=None
):  # fmt: skip
    """Mix the values with sparse weights, given a, or along a monotonic alignment, given r.

    Parameters
    ----------
    q : ndarray, shape (..., H, T, D)
        Queries; in the monotonic part in the order of the outputs.
    k : ndarray, shape (..., H, S, D)
        Keys; in the monotonic part in the order of time.
    v : ndarray, shape (..., H, S, E)
        Values.
    a : ndarray, broadcast to (..., H), optional
        Sparse part: alpha = 1 + 1/(1 + e^-a); the usual start is 0, alpha = 1.5.
    r : ndarray, broadcast to (..., H), nats, optional
        Monotonic part: offset of the logit to stop; the usual start is -4.
    mask : bool ndarray, broadcast to (..., H, T, S), optional
        True = may attend.
    causal : bool
        Hide the keys behind each query.
    align : {"lower_right", "upper_left"}
        Where the causal diagonal lies when T != S.
    scale : float, dimensionless, optional
        The factor c; 1/sqrt(D) by default.

    Returns
    -------
    out : ndarray, shape (..., H, T, E)
        Outputs, zeros for a query that may see no key.
    cache : Cache
        For the backward; holds ``p``.

    Raises
    ------
    ShapeError
        When widths, lengths or leading axes do not fit.
    DTypeError
        When an argument is no float32 or float64 array, or the mask is not boolean.
    ParameterError
        When an option or a number is outside its domain, or both or none of a and r are given.
    MemoryLimitError
        When the scores would take more than 2 GiB.

    Notes
    -----
    Reconstructed are: that the two parts are used in this form and at these places, the range (1,
    2) of alpha, the starts, and :func:`head_drop` for the paper's pruning of monotonic heads. The
    recurrence replaces the usual quotient of cumulative products and sums, whose denominators
    underflow. A monotonic row depends on the rows before it, so a NaN that one of them sees makes
    NaN of all later ones. Other rows of the family: normalizers/entmax has any alpha from 1 on.

    Source
    ------
    normalizers/adaptive_sparse_monotonic in the catalog; a reconstruction; grade D.

    References
    ----------
    Zhao et al. 2022, Adaptive Sparse and Monotonic Attention for Transformer-based Automatic
    Speech Recognition. Correia et al. 2019, Adaptively Sparse Transformers. Raffel et al. 2017,
    Online and Linear-Time Attention by Enforcing Monotonic Alignments.

    Examples
    --------
    Every key stops with probability 1/2: the first output reaches key s with 2^-s.

    >>> import numpy as np
    >>> q, k, v = np.zeros((1, 2, 1)), np.zeros((1, 3, 1)), np.eye(3)[None]
    >>> adaptive_sparse_monotonic_forward(q, k, v, r=np.zeros(1))[0].tolist()
    [[[0.5, 0.25, 0.125], [0.25, 0.25, 0.1875]]]
    """
    n = core.check.attention(q, k, v, mask=mask, align=align, scale=scale)
    if (a is None) == (r is None):
        raise core.errors.ParameterError(
            f"a and r are {'both None' if a is None else 'both given'}, expected one: "
            "a for the sparse, r for the monotonic part"
        )
    name, knob = ("a", a) if r is None else ("r", r)
    core.check.shapes(**{name: (knob, "... H")})
    core.check.check_bias(knob, n["..."], name, "(..., H)")
    scale, shape = core.default_scale(n["D"], scale), knob.shape
    live = core.visible(q, k, mask=mask, causal=causal, align=align)
    q, k, v, poison = core.quarantine(q, k, v, live)
    good, knob = np.isfinite(knob)[..., None, None], knob[..., None, None]
    poison = poison | (np.any(live, axis=-1, keepdims=True) & ~good)
    knob = np.where(good, knob, 0.0)

    z = core.scores_forward(q, k, scale)  # (1)
    if name == "a":
        eta = np.maximum(core.logistic(knob), ALMOST_SOFTMAX)
        p, *steps = *sparse_forward(z, live, eta), eta  # (2)
    else:
        p, *steps = *monotonic_forward(z + knob, live), live
        poison = np.cumsum(poison, axis=-2) > 0
    out = np.where(poison, np.nan, core.mix_forward(p, v))  # (3)
    return out, Cache(q, k, v, p, tuple(steps), poison, scale, name, shape)


def adaptive_sparse_monotonic_backward(dout, cache):
    """Gradients of :func:`adaptive_sparse_monotonic_forward`, its steps from the bottom up.

    Parameters
    ----------
    dout : ndarray, shape (..., T, E)
        Gradient of the output.
    cache : Cache
        From the forward.

    Returns
    -------
    dict
        Under "q", "k", "v" and the one of "a" and "r" that was given.
    """
    q, k, v, p, steps, poison, scale, name, shape = cache
    lead = np.broadcast_shapes(p.shape[:-2], v.shape[:-2])
    core.check.cotangent(dout, (*lead, p.shape[-2], v.shape[-1]))
    dp, dv = core.mix_backward(np.where(poison, 0.0, dout), p, v)  # (3')
    if name == "a":
        dz, deta = sparse_backward(dp, p, *steps)  # (2')
        dknob = deta * (steps[-1] * (1.0 - steps[-1]))[..., 0, 0]
    else:
        dz = monotonic_backward(dp, *steps)
        dknob = np.sum(dz, axis=(-2, -1))
    dq, dk = core.scores_backward(dz, q, k, scale)  # (1')
    return {"q": dq, "k": dk, "v": dv, name: core.sum_to(dknob, shape)}


def _example(rng):
    """Both parts in turn, two heads in a batch of 1; queries drawn away from the kinks."""
    cases = core.examples.attention(rng, options=("causal", "mask"))
    del cases["no-heads"]
    cases["causal-run"], cases["masked-run"] = dict(cases["causal"]), dict(cases["mask"])
    for i, kwargs in enumerate(cases.values()):
        if kwargs["q"].ndim == 3:
            kwargs |= {n: kwargs[n][None] for n in "qkv"}
        kwargs["ar"[i % 2]] = np.array((-1.5, 0.5) if i % 2 == 0 else (-0.6, 0.8))
        kwargs["q"] = kwargs["q"] if i % 2 else _clear(rng, kwargs)
    return cases


def _clear(rng, kwargs):
    """Of 24 queries for every row, the first whose bases are positive or clearly not."""
    q = rng.standard_normal((24, *kwargs["q"].shape))
    _, c = adaptive_sparse_monotonic_forward(**(kwargs | {"q": q}))
    clear = np.all((c.p == 0) | (c.steps[0] > 0.25), axis=-1, keepdims=True)
    return np.take_along_axis(q, np.argmax(clear, axis=0)[None], axis=0)[0]


def _sparse(*a):
    return lambda rng: core.examples.qkv(rng, lead=(1, 2)) | {"causal": True, "a": np.array(a)}


def _plain(kwargs):
    return {n: x for n, x in kwargs.items() if n != "a"}


SPEC = core.Mechanism(
    key="normalizers/adaptive_sparse_monotonic", example=_example,
    forward=adaptive_sparse_monotonic_forward, backward=adaptive_sparse_monotonic_backward,
    flags=frozenset({"attention", "causal", "masked", "linear_in_v", "scaled"}),
    opt_out={"live_nan": "a monotonic row depends on those before; tested beside the method"},
    reduces_to=(
        core.Reduction(
            "normalizers/entmax", "the sparse part is entmax", _sparse(-0.5, 1.0),
            lambda kw: _plain(kw) | {"alpha": 1.0 + 1.0 / (1.0 + np.exp(-kw["a"]))},
        ),
        core.Reduction("scores/dot_product", "at a = -40 softmax", _sparse(-40.0, -40.0), _plain),
    ),
    claim="Where segments differ in length only the monotonic alignment finds them; the learned "
    "alpha stays high, with most weights zero, only where the place is certain.",
    verified_by=("slow loop", "PyTorch", "entmax"),
    reconstruction="which parts go where, the range of alpha, the starts, the dropping of heads",
)  # fmt: skip
