r"""Selective self-attention: each query has a temperature of its own, and each value a volume.

.. math::

    \tau_t &= 1 + \tanh f_t + \rho \ln n_t, \qquad \rho = \sigma(\alpha)                    &(1)\\
    z_{ts} &= \kappa \tanh(\tau_t\, c\, q_t \cdot k_s / \kappa) + b_{ts}                    &(2)\\
    p_{ts} &= e^{z_{ts}} / \textstyle\sum_{s'} e^{z_{ts'}}                                  &(3)\\
    \nu_s  &= 1 + \tanh g_s                                                                 &(4)\\
    o_t    &= \textstyle\sum_s p_{ts}\, \nu_s v_s                                           &(5)

with :math:`n_t` the number of keys that query t may see, and f, g made of the tokens by small
networks. The inverse temperature separates *what* a query likes (its direction) from *how
selective* it is (:math:`\tau`), and grows with the context: a key whose score is ahead by a gap
:math:`\Delta \ge 1/\rho` keeps its weight however long the context is. A token with
:math:`\nu = 0` is looked at and says nothing.

Source: Zhang et al. 2024; the sum in (1) from descriptions of the paper (grade B), its position
part from the official code lit_gpt/gpt_2_PTS.py and model_finetune_att.py, which were read and have
nothing else.
"""

from typing import NamedTuple

import numpy as np

from attention_ref import core

RATES = ("logistic", "gumbel")
"""How alpha becomes a rate between 0 and 1: the paper's sigmoid, or the code's exp(-exp(alpha))."""


class Cache(NamedTuple):
    """What the backward needs, and what implementers compare with (``tau``, ``p``, ``lse``)."""

    q: np.ndarray  # (..., T, D), rows with NaN or infinity replaced by zeros
    k: np.ndarray  # (..., S, D), likewise
    v: np.ndarray  # (..., S, E), likewise
    given: dict  # f_q, f_v, alpha: those that are not None, NaN and infinity replaced by zeros
    logs: np.ndarray  # (..., T, 1), ln n
    tau: np.ndarray  # (..., T, 1), inverse temperatures
    volume: np.ndarray | float  # (..., S, 1), nu; 1 without f_v
    scores: np.ndarray  # (..., T, S), before the temperature
    capped: np.ndarray  # (..., T, S), scores after the softcap, before bias and mask
    p: np.ndarray  # (..., T, S), weights
    lse: np.ndarray  # (..., T), log of the sum of exponentials, nats; -inf for an empty row
    live: np.ndarray  # (..., T, S), True = may attend
    poison: np.ndarray  # (..., T, 1), rows that are NaN
    scale: float
    softcap: float | None
    rate: str
    bias_shape: tuple | None


def rate_forward(alpha, rate):
    """alpha to a rate between 0 and 1, rising ("logistic") or falling ("gumbel").

    Parameters
    ----------
    alpha : ndarray
        Any number.
    rate : {"logistic", "gumbel"}
        Which curve.

    Returns
    -------
    ndarray, shape of alpha
    """
    return core.logistic(alpha) if rate == "logistic" else np.exp(-np.exp(alpha))


def rate_backward(drate, alpha, rate):
    """The slopes: r (1 - r) for the sigmoid, -exp(alpha) r for the other.

    Parameters
    ----------
    drate, alpha : ndarray
        Gradient of the rate, and alpha.
    rate : {"logistic", "gumbel"}
        As in the forward.

    Returns
    -------
    ndarray, shape of alpha
    """
    r = rate_forward(alpha, rate)
    return drate * r * (1.0 - r) if rate == "logistic" else -drate * np.exp(alpha) * r


def _check(q, k, v, f_q, f_v, alpha, rate, options):
    """The checks at the door; the lengths."""
    n = core.check.attention(q, k, v, **options)
    core.check.option("rate", rate, RATES)
    core.check.shapes(f_q=(f_q, "... R"), f_v=(f_v, "... R2"), alpha=(alpha, "... 1"))
    core.check.check_bias(f_q, (*n["..."], n["T"]), "f_q", "(..., T)")
    core.check.check_bias(f_v, (*n["..."], n["S"]), "f_v", "(..., S)")
    core.check.check_bias(alpha, (*n["..."], 1), "alpha", "(..., 1)")
    return n


def selective_temperature_forward(
    q, k, v, f_q=None, f_v=None, alpha=None, *, rate="logistic", mask=None, causal=False,
    align="lower_right", scale=None, softcap=None, bias=None, empty_row="zero",
):  # fmt: skip
    """Softmax attention whose queries set their temperature and whose values set their volume.

    Parameters
    ----------
    q : ndarray, shape (..., T, D)
        Queries.
    k : ndarray, shape (..., S, D)
        Keys.
    v : ndarray, shape (..., S, E)
        Values.
    f_q : ndarray, broadcast to (..., T), optional
        Logits of the queries' temperatures, f; 0 when left out.
    f_v : ndarray, broadcast to (..., S), optional
        Logits of the values' volumes, g; 0 when left out.
    alpha : ndarray, broadcast to (..., 1), optional
        How much the temperature follows the length; one number a layer in the code, one a head
        here if wanted. Left out, it does not.
    rate : {"logistic", "gumbel"}
        How alpha becomes rho: the paper's sigmoid, or the code's exp(-exp(alpha)).
    mask : bool ndarray, broadcast to (..., T, S), optional
        True = may attend.
    causal : bool
        Hide the keys behind each query.
    align : {"lower_right", "upper_left"}
        Where the causal diagonal lies when T != S.
    scale : float, dimensionless, optional
        The factor c; 1/sqrt(D) by default.
    softcap : float, > 0, nats, optional
        Bound on the scores, temperature included, before bias and mask.
    bias : ndarray, broadcast to (..., T, S), nats, optional
        Added to the scores after temperature and softcap; -inf gives a weight of 0.
    empty_row : {"zero", "nan", "uniform", "raise"}
        Output of a query that may see no key.

    Returns
    -------
    out : ndarray, shape (..., T, E)
        Outputs.
    cache : Cache
        For the backward; holds ``tau``, ``volume``, ``p`` and ``lse``.

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
    The networks that make f and g of the token are the caller's; the paper shares their weights
    with the projections. tau is at least 0, and 0 only in the limit. Values have no position part
    and keys no temperature: a choice that the descriptions leave open. The official code has the
    position part alone, with rho = exp(-exp(alpha)) and alpha starting at 1.5 or 2, and counts
    the row's place; a row without keys counts as 1 here. "Selective attention" is also the name of
    another method, which masks tokens.

    Source
    ------
    normalizers/selective_temperature in the catalog; descriptions of the paper, official code for
    the position part; grade B.

    References
    ----------
    Zhang et al. 2024, Selective Attention: Enhancing Transformer through Principled Context
    Control.

    Examples
    --------
    >>> import numpy as np
    >>> q, k, v = np.ones((1, 1)), np.array([[np.log(3.0)], [0.0]]), np.array([[10.0], [0.0]])
    >>> sharp = np.array([np.arctanh(0.5)])  # tau = 3/2
    >>> out, cache = selective_temperature_forward(q, k, v, np.zeros(1))
    >>> cache.p.round(12).tolist(), out.round(12).tolist()
    ([[0.75, 0.25]], [[7.5]])
    >>> selective_temperature_forward(q, k, v, sharp)[1].tau.round(12).tolist()
    [[1.5]]
    """
    n = _check(q, k, v, f_q, f_v, alpha, rate, {
        "mask": mask, "bias": bias, "align": align, "scale": scale, "softcap": softcap,
        "empty_row": empty_row,
    })  # fmt: skip
    scale = core.default_scale(n["D"], scale)
    live = core.visible(q, k, mask=mask, causal=causal, align=align, empty_row=empty_row)
    given = {"f_q": f_q, "f_v": f_v, "alpha": alpha}
    given = {name: x for name, x in given.items() if x is not None}
    good = {name: np.isfinite(x)[..., None] for name, x in given.items()}
    q = np.where(good["f_q"], q, np.nan) if "f_q" in given else q
    v = np.where(good["f_v"], v, np.nan) if "f_v" in given else v
    q, k, v, poison = core.quarantine(q, k, v, live, empty_row)
    given = {name: np.where(good[name][..., 0], x, 0.0) for name, x in given.items()}

    count = np.sum(np.where(live, np.ones_like(q, shape=(1,)), 0.0), axis=-1, keepdims=True)
    logs = np.log(np.maximum(count, 1.0))
    tau = np.ones_like(logs)  # (1)
    if "alpha" in given:
        tau = tau + rate_forward(given["alpha"], rate)[..., None] * logs
        poison = poison | ~good["alpha"]
    if "f_q" in given:
        tau = tau + np.tanh(given["f_q"])[..., None]
    scores = core.scores_forward(q, k, scale)
    z = capped = core.softcap_forward(tau * scores, softcap)  # (2)
    if bias is not None:
        clean, poison = core.quarantine_bias(bias, live, poison)
        z = z + clean
    p, lse = core.softmax_forward(z, live, empty_row)  # (3)
    volume = 1.0 + np.tanh(given["f_v"])[..., None] if "f_v" in given else 1.0  # (4)
    out = core.mix_forward(p, volume * v)  # (5)

    out = np.where(poison, np.nan, out)
    lse = np.where(poison[..., 0], np.nan, lse)
    return out, Cache(
        q, k, v, given, logs, tau, volume, scores, capped, p, lse, live, poison, scale, softcap,
        rate, None if bias is None else bias.shape,
    )  # fmt: skip


def selective_temperature_backward(dout, cache):
    """Gradients of :func:`selective_temperature_forward`, its steps read from the bottom up.

    Parameters
    ----------
    dout : ndarray, shape (..., T, E)
        Gradient of the output.
    cache : Cache
        From the forward.

    Returns
    -------
    dict
        Under "q", "k", "v" and, when given, "f_q", "f_v", "alpha", "bias".
    """
    q, k, v, given, logs, tau, volume, scores, capped, p, _, live, poison = cache[:13]
    core.check.cotangent(dout, (*poison.shape[:-1], v.shape[-1]))
    dout = np.where(poison, 0.0, dout)

    dp, dloud = core.mix_backward(dout, p, volume * v)  # (5')
    gradients = {"v": core.sum_to(dloud * volume, v.shape)}
    if "f_v" in given:  # (4')
        dg = np.sum(dloud * v, axis=-1) * (1.0 - np.square(np.tanh(given["f_v"])))
        gradients["f_v"] = core.sum_to(dg, given["f_v"].shape)
    dz = core.softmax_backward(dp, p, live)  # (3')
    if cache.bias_shape is not None:
        gradients["bias"] = core.sum_to(dz, cache.bias_shape)
    dz = core.softcap_backward(dz, capped, cache.softcap)  # (2')
    gradients["q"], gradients["k"] = core.scores_backward(dz * tau, q, k, cache.scale)
    dtau = np.sum(dz * scores, axis=-1)  # (1')
    if "f_q" in given:
        df = dtau * (1.0 - np.square(np.tanh(given["f_q"])))
        gradients["f_q"] = core.sum_to(df, given["f_q"].shape)
    if "alpha" in given:
        drate = core.sum_to(dtau * logs[..., 0], given["alpha"].shape)
        gradients["alpha"] = rate_backward(drate, given["alpha"], cache.rate)
    return gradients


def _temperatures(rng, kwargs):
    """A batch axis of 1 before the heads where there is none; one f_q for all queries in "plain".

    The number a head or layer, alpha, and both curves of it; "softcap" has no alpha, "bias" no f.
    """
    if kwargs["q"].ndim == 2:
        return {"f_q": rng.standard_normal(5), "f_v": rng.standard_normal(7)}
    T, S = kwargs["q"].shape[-2], kwargs["k"].shape[-2]
    rows = 1 if kwargs.keys() <= set("qkv") | {"scale"} and S == 6 else T
    more = {n: kwargs[n][None] for n in "qkv" if kwargs[n].ndim == 3}
    if "bias" not in kwargs or "softcap" in kwargs:
        lead = kwargs["q"].shape[:-2] if kwargs["q"].ndim == 4 else (1, 2)
        more |= {"f_q": rng.standard_normal((2, rows)), "f_v": rng.standard_normal((*lead, S))}
    if "softcap" not in kwargs:
        more["alpha"] = rng.standard_normal((1,) if "causal" in kwargs else (2, 1))
    return more | ({"rate": "gumbel"} if "mask" in kwargs else {})


def _example(rng):
    cases = core.examples.attention(rng, extra=_temperatures)
    del cases["causal-long-queries"]  # keeps the golden file small; "mask" has an empty row too
    return cases


def _even(rng):
    """f = g = 0 and a rate of 0."""
    zero = {"f_q": np.zeros((2, 5)), "f_v": np.zeros((1, 2, 7)), "alpha": np.full(1, -800.0)}
    return _example(rng)["causal"] | zero


def _cold(rng):
    """tanh f = 1/2 for all: one and a half times the scale."""
    kwargs = core.examples.qkv(rng) | {"scale": 0.7, "causal": True}
    return kwargs | {"f_q": np.full((1,), np.arctanh(0.5))}


def _plain(kwargs):
    names = ("q", "k", "v", "causal")
    return {n: kwargs[n] for n in names} | {"scale": 0.7 if "f_v" in kwargs else 1.05}


SPEC = core.Mechanism(
    key="normalizers/selective_temperature", forward=selective_temperature_forward,
    backward=selective_temperature_backward, example=_example,
    flags=frozenset({
        "attention", "causal", "masked", "linear_in_v", "scaled", "shift_invariant",
    }),
    tokens={"f_v": -1},
    opt_out={"empty_rows": "the mean under 'uniform' has volumes; the row's tests do all four"},
    reduces_to=(
        core.Reduction("scores/dot_product", "logits 0 and a rate of 0", _even, _plain),
        core.Reduction("scores/dot_product", "one temperature for all is a scale", _cold, _plain),
    ),
    claim=(
        "Trained on short contexts, plain attention spreads its weight as the context grows; with "
        "a temperature that follows ln n the weight on the right key stays."
    ),
    verified_by=("slow loop", "PyTorch"),
)  # fmt: skip
