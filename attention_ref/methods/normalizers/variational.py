r"""Variational attention: the weights are a distribution over which key is meant, not over a mean.

With a class y in place of a mixed value, :math:`\ell_{sj}` the log of the probability that the
value of key s gives to class j, and W the decoder's matrix:

.. math::

    z_{ts} &= c\, q_t \cdot k_s + b_{ts}, \qquad
        p_{ts} = e^{z_{ts}} / \textstyle\sum_{s'} e^{z_{ts'}}                              &(1)\\
    \ell_{sj} &= \log \text{softmax}_j (v_s W)                                             &(2)\\
    o_{tj} &= \log \textstyle\sum_s p_{ts}\, e^{\ell_{sj}}
        \quad\text{or}\quad \textstyle\sum_s p_{ts}\, \ell_{sj}
        \quad\text{or}\quad \log \text{softmax}_j (\textstyle\sum_s p_{ts} v_s W)          &(3)

"exact" is the log of the marginal probability, "hard" the mean of the log, never larger (Jensen),
"soft" what ordinary attention does: the likelihood of a mean value, on either side of "exact", but
never below "hard", as log softmax is concave and W linear. A second distribution :math:`\rho` that
may see y gives a lower bound on "exact", "hard" at :math:`\rho = p` and tight at the posterior:

.. math:: B_t = \textstyle\sum_s \rho_{ts} \ell_{ts} - \beta\,
    \textstyle\sum_s \rho_{ts} \log (\rho_{ts} / p_{ts}), \qquad
    \rho_{ts} = e^{r_{ts}} / \textstyle\sum_{s'} e^{r_{ts'}} .

:func:`elbo_forward` enumerates it, :func:`reinforce` samples it, and :func:`relaxed` draws
a weight vector from the interior of the simplex, through which gradients pass.

Source: Deng, Kim, Chiu, Guo, Rush 2018; official code read: harvardnlp/var-attn,
onmt/modules/VariationalAttention.py and onmt/Loss.py; grade A.
"""

from typing import NamedTuple

import numpy as np

from attention_ref import core


class Cache(NamedTuple):
    """What the backward needs, and what implementers compare with (``p``, ``posterior``)."""

    q: np.ndarray  # (..., T, D), rows with NaN or infinity replaced by zeros
    k: np.ndarray  # (..., S, D), likewise
    v: np.ndarray  # (..., S, E), likewise
    w: np.ndarray  # (E, M), zeros when it holds NaN or infinity
    p: np.ndarray  # (..., T, S), the prior
    loglik: np.ndarray  # (..., S, M), as in (2); of the mean values, (..., T, M), under "soft"
    posterior: np.ndarray | None  # (..., T, M, S), of each class, under "exact"
    live: np.ndarray  # (..., T, S), True = may attend
    poison: np.ndarray  # (..., T, 1), rows that are NaN
    scale: float
    objective: str
    bias_shape: tuple | None


class ElboCache(NamedTuple):
    """What :func:`elbo_backward` needs; ``q`` is rho."""

    p: np.ndarray  # (..., T, S)
    q: np.ndarray  # (..., T, S)
    gain: np.ndarray  # (..., T, S), loglik - weight log(q / p), 0 behind the mask
    live: np.ndarray  # (..., T, S)
    weight: float


def decode_forward(u, w):
    """log softmax(u w) over the classes.

    Parameters
    ----------
    u, w : ndarray, shapes (..., E), (E, M)
        Values, and the decoder's matrix.

    Returns
    -------
    ndarray, shape (..., M), nats
    """
    logits = u @ w
    logits = logits - np.max(logits, axis=-1, keepdims=True)
    return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))


def decode_backward(dloglik, loglik, u, w):
    """Gradients of :func:`decode_forward`: the logits get dloglik - softmax sum(dloglik).

    Parameters
    ----------
    dloglik, loglik : ndarray, shape (..., S, M)
        Gradient of the log-likelihoods, and they.
    u, w : ndarray, shapes (..., S, E), (E, M)
        As in the forward.

    Returns
    -------
    du, dw : ndarray, shapes of u and w
    """
    dlogits = dloglik - np.exp(loglik) * np.sum(dloglik, axis=-1, keepdims=True)
    return dlogits @ np.swapaxes(w, 0, 1), core.sum_to(np.swapaxes(u, -1, -2) @ dlogits, w.shape)


def variational_forward(
    q, k, v, w, *, objective="exact", mask=None, causal=False, align="lower_right", scale=None,
    bias=None, empty_row="zero",
):  # fmt: skip
    """Log-likelihood of every class when attention is a latent choice of one key.

    Parameters
    ----------
    q : ndarray, shape (..., T, D)
        Queries.
    k : ndarray, shape (..., S, D)
        Keys.
    v : ndarray, shape (..., S, E)
        Values.
    w : ndarray, shape (E, M)
        The decoder: logits of the M classes from a value.
    objective : {"exact", "hard", "soft"}
        Log of the mean, mean of the log, log at the mean.
    mask : bool ndarray, broadcast to (..., T, S), optional
        True = may attend.
    causal : bool
        Hide the keys behind each query.
    align : {"lower_right", "upper_left"}
        Where the causal diagonal lies when T != S.
    scale : float, dimensionless, optional
        The factor c; 1/sqrt(D) by default.
    bias : ndarray, broadcast to (..., T, S), nats, optional
        Added to the scores; -inf gives a weight of 0.
    empty_row : {"zero", "nan", "uniform", "raise"}
        Output of a query that may see no key; "uniform" chooses among all keys.

    Returns
    -------
    out : ndarray, shape (..., T, M), nats
        Log-likelihoods, under "hard" a lower bound on those of "exact" and "soft".
    cache : Cache
        For the backward; holds ``p`` and, under "exact", ``posterior``.

    Raises
    ------
    ShapeError
        When widths, lengths or leading axes do not fit.
    DTypeError
        When an argument is no float32 or float64 array, or the mask is not boolean.
    ParameterError
        When an option or a number is outside its domain, or a row is empty under "raise".
    MemoryLimitError
        When the joint of queries, classes and keys would take more than 2 GiB.

    Notes
    -----
    The decoder of the paper's models reads the query too, through a tanh layer; here it is a
    matrix and the value alone decides, so that all of S x M likelihoods are one product. The
    paper's relaxed attention is a Dirichlet; the Gumbel-softmax of :func:`relaxed` is the
    other usual reparametrisation, and the importance-weighted estimator of the code ("wsram") is
    left out. With their decoder "hard" is no bound on "soft". As in the code, the divergence in the
    bound is always enumerated.

    Source
    ------
    normalizers/variational in the catalog; the official files named above; grade A.

    References
    ----------
    Deng, Kim, Chiu, Guo, Rush 2018, Latent Alignment and Variational Attention.

    Examples
    --------
    Two keys, even odds; one says class 0 with 0.9, the other class 1 with 0.9.

    >>> import numpy as np
    >>> q, k, v = np.zeros((1, 1)), np.zeros((2, 1)), np.array([[1.0], [-1.0]])
    >>> w = np.array([[np.log(3.0), -np.log(3.0)]])
    >>> for objective in ("exact", "hard", "soft"):
    ...     out, _ = variational_forward(q, k, v, w, objective=objective)
    ...     print(objective, np.exp(out).round(6).tolist())
    exact [[0.5, 0.5]]
    hard [[0.3, 0.3]]
    soft [[0.5, 0.5]]
    """
    n = core.check.attention(
        q, k, v, mask=mask, bias=bias, align=align, scale=scale, empty_row=empty_row
    )
    M = core.check.shapes(v=(v, "... S E"), w=(w, "E M"))["M"]
    core.check.option("objective", objective, ("exact", "hard", "soft"))
    core.check.memory((*n["..."], n["T"], M, n["S"]), q.dtype, "the joint probabilities")
    scale = core.default_scale(n["D"], scale)
    live = core.visible(q, k, mask=mask, causal=causal, align=align, empty_row=empty_row)
    q, k, v, poison = core.quarantine(q, k, v, live, empty_row)
    poison, w = poison | np.any(~np.isfinite(w)), np.where(np.all(np.isfinite(w)), w, 0.0)
    alive = np.any(live, axis=-1, keepdims=True)
    seen = live | ~alive if empty_row == "uniform" else live

    z = core.scores_forward(q, k, scale)  # (1)
    if bias is not None:
        clean, poison = core.quarantine_bias(bias, live, poison)
        z = z + clean
    z = np.where(alive, z, 0.0)
    p, lse = core.softmax_forward(z, seen)
    posterior, loglik = None, decode_forward(v if objective != "soft" else p @ v, w)  # (2)
    if objective == "exact":
        logp = z - np.where(np.isfinite(lse), lse, 0.0)[..., None]
        joint = logp[..., None, :] + np.swapaxes(loglik, -1, -2)[..., None, :, :]
        posterior, out = core.softmax_forward(joint, seen[..., None, :])  # (3)
    else:
        out = p @ loglik if objective == "hard" else loglik

    out = np.where(np.any(p > 0, axis=-1, keepdims=True), out, 0.0)
    return np.where(poison, np.nan, out), Cache(
        q, k, v, w, p, loglik, posterior, live, poison, scale, objective,
        None if bias is None else bias.shape,
    )  # fmt: skip


def variational_backward(dout, cache):
    """Gradients of :func:`variational_forward`, its steps read from the bottom up.

    Parameters
    ----------
    dout : ndarray, shape (..., T, M)
        Gradient of the log-likelihoods.
    cache : Cache
        From the forward.

    Returns
    -------
    dict
        Under "q", "k", "v", "w" and, when given, "bias".
    """
    q, k, v, w, p, loglik, posterior, live, poison, scale, objective, bias_shape = cache
    M = w.shape[-1]
    core.check.cotangent(dout, (*np.broadcast_shapes(p.shape[:-2], v.shape[:-2]), p.shape[-2], M))
    dout = np.where(poison, 0.0, dout)

    if objective == "exact":
        djoint = dout[..., None] * posterior  # (3')
        dz = np.sum(djoint, axis=-2) - p * np.sum(dout, axis=-1, keepdims=True)
        dloglik = np.swapaxes(np.sum(djoint, axis=-3), -1, -2)
    elif objective == "hard":
        dp, dloglik = core.mix_backward(dout, p, loglik)
    if objective == "soft":
        du, dw = decode_backward(dout, loglik, p @ v, w)  # (2')
        dp, dv = core.mix_backward(du, p, v)
    else:
        dloglik = core.sum_to(dloglik, loglik.shape)
        dv, dw = decode_backward(dloglik, loglik, v, w)
    if objective != "exact":
        dz = core.softmax_backward(dp, p, live)  # (1')
    dz = np.where(live, dz, 0.0)
    gradients = {} if bias_shape is None else {"bias": core.sum_to(dz, bias_shape)}
    dq, dk = core.scores_backward(dz, q, k, scale)
    return {"q": dq, "k": dk, "v": dv, "w": dw, **gradients}


def relaxed(rng, q, k, v, w, *, temperature=1.0, scale=None, **options):
    """A relaxed sample (Gumbel-softmax): the soft objective with noise on the scores.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of the noise.
    q, k, v, w, scale, **options
        As in :func:`variational_forward`; no bias.
    temperature : float, > 0
        Towards 0 the weights become one-hot, distributed as p.

    Returns
    -------
    out, cache
        As under "soft"; :func:`variational_backward` gives its gradients for this draw, under
        "bias" that of the noise divided by the temperature.
    """
    core.check.generator("rng", rng)
    core.check.number("temperature", temperature, low=0, open_low=True)
    n = core.check.attention(q, k, v, scale=scale)
    noise = np.asarray(rng.gumbel(size=(*n["..."], n["T"], n["S"])) / temperature, q.dtype)
    scale = core.default_scale(n["D"], scale) / temperature
    return variational_forward(q, k, v, w, objective="soft", scale=scale, bias=noise, **options)


def elbo_forward(z, r, loglik, *, weight=1.0, mask=None):
    """The bound B, by enumeration.

    Parameters
    ----------
    z, r : ndarray, shape (..., T, S), nats
        Scores of the prior and of the inference network, which may have seen the class.
    loglik : ndarray, shape (..., T, S), nats
        Log-likelihood of the observed class under each key.
    weight : float, >= 0
        beta, 1 for a bound; smaller while it warms up.
    mask : bool ndarray, broadcast to (..., T, S), optional
        True = may attend; a row without keys gives 0.

    Returns
    -------
    bound : ndarray, shape (..., T), nats
        B.
    cache : ElboCache
        For :func:`elbo_backward`.
    """
    core.check.shapes(z=(z, "... T S"), r=(r, "... T S"), loglik=(loglik, "... T S"))
    core.check.check_mask(mask, z.shape)
    core.check.number("weight", weight, low=0)
    live = np.ones_like(z, dtype=bool) if mask is None else np.broadcast_to(mask, z.shape)
    (p, lse_p), (q, lse_q) = core.softmax_forward(z, live), core.softmax_forward(r, live)
    shift = core.row_max(lse_q[..., None]) - core.row_max(lse_p[..., None])  # 0 without keys
    ratio = np.where(live, r - z - shift, 0.0)  # log q / p
    gain = np.where(live, loglik, 0.0) - weight * ratio
    return np.sum(q * gain, axis=-1), ElboCache(p, q, gain, live, weight)


def elbo_backward(dbound, cache):
    """dr = q (gain - sum q gain), dz = weight (q - p), dloglik = q, each times dbound.

    Parameters
    ----------
    dbound : ndarray, shape (..., T)
        Gradient of the bound.
    cache : ElboCache
        From the forward.

    Returns
    -------
    dict
        Under "z", "r", "loglik".
    """
    core.check.cotangent(dbound, cache.q.shape[:-1], "dbound")
    d, q = dbound[..., None], cache.q
    dr = core.softmax_backward(d * cache.gain, q, cache.live)
    return {"z": d * cache.weight * (q - cache.p), "r": dr, "loglik": d * q}


def reinforce(rng, z, r, loglik, *, baseline=0.0, samples=1, weight=1.0, mask=None):
    """The same bound and its gradients from sampled keys, by the score function.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of the samples.
    z, r, loglik, weight, mask
        As in :func:`elbo_forward`. Of loglik only what was sampled is used.
    baseline : float, or ndarray, broadcast to (..., T), nats
        Subtracted from the reward; must not depend on the samples. The paper's is the soft
        objective.
    samples : int, >= 1
        How many are averaged.

    Returns
    -------
    bound : ndarray, shape (..., T), nats
        Unbiased, as the gradients are; the divergence in it is exact.
    gradients : dict
        Of the sum of the bounds, under "z", "r", "loglik".
    """
    core.check.generator("rng", rng)
    core.check.count("samples", samples, low=1)
    quiet, cache = elbo_forward(z, r, np.zeros_like(loglik), weight=weight, mask=mask)
    gradients = elbo_backward(np.ones_like(quiet), cache)
    below = np.cumsum(cache.q, axis=-1)[..., None, :]
    u = rng.random((*quiet.shape, samples, 1)) * below[..., -1:]
    choice = np.minimum(np.sum(below <= u, axis=-1), z.shape[-1] - 1)  # (..., T, samples)
    reward = np.take_along_axis(np.where(cache.live, loglik, 0.0), choice, axis=-1)
    hot = choice[..., None] == np.arange(z.shape[-1])
    hot = np.where(hot & cache.live[..., None, :], np.ones_like(z[..., :1, None]), 0.0)
    excess = reward - np.asarray(baseline, loglik.dtype)[..., None]
    gradients["r"] = gradients["r"] + np.mean(excess[..., None] * (hot - cache.q[..., None, :]), -2)
    gradients["loglik"] = np.mean(hot, axis=-2)
    return quiet + np.mean(reward, axis=-1), gradients


def _example(rng):
    """The standard set with five classes; objectives in turn."""
    cases = core.examples.attention(rng, options=("causal", "mask", "bias"))
    for i, kwargs in enumerate(cases.values()):
        kwargs["w"] = rng.standard_normal((3, 5))
        kwargs["objective"] = ("exact", "soft", "hard")[i % 3]
    return cases


def _case(objective):
    drawn = {"objective": objective}
    return lambda rng: core.examples.qkv(rng) | {"w": rng.standard_normal((3, 5))} | drawn


def _values(change):
    """Softmax attention whose values are likelihoods, or their logarithms."""
    return lambda a: {"q": a["q"], "k": a["k"], "v": change(decode_forward(a["v"], a["w"]))}


SPEC = core.Mechanism(
    key="normalizers/variational",
    forward=variational_forward, backward=variational_backward, example=_example,
    flags=frozenset(core.SOFTMAX_FLAGS) - {"row_stochastic", "linear_in_v"},
    opt_out={"empty_rows": "'uniform' gives no mean value; test_variational.py does all four"},
    reduces_to=(
        core.Reduction(
            "scores/dot_product", "exact is attention over likelihoods", _case("exact"),
            _values(np.exp), compare=lambda out, other: (np.exp(out), other), gradients=False,
        ),
        core.Reduction("scores/dot_product", "hard mixes logs", _case("hard"), _values(np.copy)),
    ),
    claim="Where one of several items is meant, training by the marginal likelihood or by the "
    "bound predicts new data better than soft or hard attention.",
    verified_by=("slow loop", "PyTorch"),
)  # fmt: skip
