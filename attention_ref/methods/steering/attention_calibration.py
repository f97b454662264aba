r"""Attention calibration: take weight from tokens that attract it without meaning anything.

A *sink* is a key that most queries attend to. With :math:`n_j` the number of queries that may see
key j,

.. math::

    c_j &= \textstyle\sum_t p_{tj} / n_j                                       &(1)\\
    Z &= \{ j : c_j > \text{threshold} \} \text{ without its first element}    &(2)\\
    r_t &= \textstyle\sum_{j \notin Z} p_{tj}                                  &(3)\\
    m_t &= (1 - \beta) \textstyle\sum_{j \in Z} p_{tj}                         &(4)\\
    p'_{tj} &= \beta\, p_{tj} \;(j \in Z), \qquad
    p'_{tj} = p_{tj} + m_t\, p_{tj} / r_t \;(j \notin Z)                       &(5)

Sinks keep the share beta of their weight, the rest goes to the other keys in proportion to what
they have: each row keeps its sum. The first sink, as a rule the first token, stays: models need it.

Source: Yu et al. 2024, *Unveiling and Harnessing Hidden Attention Sinks*; official code read:
GATECH-EIC/ACT, ``models/llama_modelling_aug.py`` and ``scripts/evaluation.sh``; grade A.
"""

from typing import NamedTuple

import numpy as np

from attention_ref import core


class Cache(NamedTuple):
    """What the backward needs; ``sinks`` is what implementers compare."""

    p: np.ndarray  # (..., T, S), weights, hidden ones and rows with NaN set to 0
    sinks: np.ndarray  # (..., 1, S), True = the set Z of equation (2)
    rest: np.ndarray  # (..., T, 1), r of equation (3), 1 where it is 0
    keep: np.ndarray  # (..., T, 1), beta, or 1 where r is 0: such a row stays
    freed: np.ndarray  # (..., T, 1), m of equation (4)
    live: np.ndarray  # broadcast to (..., T, S), True = may attend
    poison: np.ndarray  # (..., T, 1), rows that are NaN
    chosen: np.ndarray | None  # broadcast to (..., 1, 1), True = an edited head


def attention_calibration_edit(
    p, *, beta=0.4, alpha=5.0, threshold=None, heads=None, mask=None, causal=True,
    align="lower_right",
):  # fmt: skip
    """Move a part of the weight of all sinks but the first to the other keys.

    Parameters
    ----------
    p : ndarray, shape (..., T, S)
        Attention weights; not negative, rows with sum 1 where the model is a softmax.
    beta : float, in [0, 1], dimensionless
        What a sink keeps of its weight; 1 changes nothing.
    alpha : float, > 0, dimensionless
        A sink has more than ``alpha`` times the weight 1/S; only without ``threshold``.
    threshold : float, dimensionless, optional
        Mean weight above which a key is a sink; ``alpha / S`` by default.
    heads : bool ndarray, broadcast to the leading axes of p, optional
        True = edit this head; all by default.
    mask : bool ndarray, broadcast to (..., T, S), optional
        True = may attend. Says which rows count in the mean of a key.
    causal : bool
        The weights are those of a causal model.
    align : {"lower_right", "upper_left"}
        Where the causal diagonal lies when T != S.

    Returns
    -------
    out : ndarray, shape (..., T, S)
        The edited weights.
    cache : Cache
        For the backward; holds ``sinks``.

    Raises
    ------
    ShapeError
        When p has fewer than two axes, or mask or heads do not fit it.
    DTypeError
        When p is no float32 or float64 array, or mask or heads are not boolean.
    ParameterError
        When beta, alpha or threshold is outside its domain, or align is unknown.

    Notes
    -----
    The official code works on one sequence, in place, and takes beta = 0.4 and threshold = 0.1
    from the environment; here the threshold follows the paper's alpha / S unless it is given. The
    code feeds all keys outside Z, the first sink included; so do we. It sets p'[0, 0] = 1, which
    changes nothing for causal weights and is left out. Where all the weight of a row lies on sinks
    the code divides by zero; here such a row stays as it is. A key that no query may see is no
    sink. Hidden weights are taken as 0; a row with NaN is left out of (1) and comes out as NaN.
    Which heads to edit the authors find by trying each head on held-out data: ``heads``.

    The set Z jumps when c_j crosses the threshold. The backward is the gradient with Z held fixed,
    which is the derivative wherever no c_j lies on the threshold.

    Source
    ------
    steering/attention_calibration in the catalog; GATECH-EIC/ACT, ``atten_process_eval``; grade A.

    References
    ----------
    Yu, Wang, Fu, Shi, Shaikh, Lin 2024, Unveiling and Harnessing Hidden Attention Sinks: Enhancing
    Large Language Models without Training through Attention Calibration.

    Examples
    --------
    >>> import numpy as np
    >>> p = np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.25, 0.5, 0.25]])
    >>> out, cache = attention_calibration_edit(p, beta=0.5, threshold=0.4)
    >>> cache.sinks[0].tolist(), out[2].tolist()
    ([False, True, False], [0.375, 0.25, 0.375])
    """
    n = core.check.shapes(p=(p, "... T S"))
    core.check.number("beta", beta, low=0, high=1)
    core.check.number("alpha", alpha, low=0, open_low=True)
    core.check.number("threshold", threshold, low=0)
    core.check.option("align", align, core.check.ALIGNMENTS)
    core.check.check_mask(mask, p.shape)
    core.check.check_mask(heads, n["..."], "heads", "the leading axes of p")
    live = core.visible(p, np.swapaxes(p, -1, -2), mask=mask, causal=causal, align=align)
    threshold = alpha / max(n["S"], 1) if threshold is None else threshold

    p = np.where(live, p, 0.0)
    poison = ~np.all(np.isfinite(p), axis=-1, keepdims=True)
    p = np.where(poison, 0.0, p)
    seen = np.sum(np.where(live & ~poison, np.ones_like(p), 0.0), axis=-2, keepdims=True)
    mean = np.sum(p, axis=-2, keepdims=True) / np.where(seen == 0, 1.0, seen)  # (1)
    above = mean > threshold
    sinks = above & (np.cumsum(above, axis=-1) > 1)  # (2)
    rest = np.sum(np.where(sinks, 0.0, p), axis=-1, keepdims=True)  # (3)
    keep = np.where(rest == 0, np.ones_like(rest), beta)
    rest = np.where(rest == 0, 1.0, rest)
    freed = (1.0 - keep) * np.sum(np.where(sinks, p, 0.0), axis=-1, keepdims=True)  # (4)
    out = np.where(sinks, keep * p, p + freed * (p / rest))  # (5)

    chosen = None if heads is None else heads[..., None, None]
    out = out if chosen is None else np.where(chosen, out, p)
    out = np.where(poison, np.nan, out)
    return out, Cache(p, sinks, rest, keep, freed, live, poison, chosen)


def attention_calibration_backward(dout, cache):
    """Gradient of :func:`attention_calibration_edit` with the set of sinks held fixed.

    Parameters
    ----------
    dout : ndarray, shape (..., T, S)
        Gradient of the edited weights.
    cache : Cache
        From the edit.

    Returns
    -------
    dict
        Under "p".
    """
    p, sinks, rest, keep, freed, live, poison, chosen = cache
    core.check.cotangent(dout, p.shape)
    dout = np.where(poison, 0.0, dout)

    outside = np.where(sinks, 0.0, dout)
    dshare = freed * outside  # (5'), share = p / rest
    dfreed = np.sum(outside * (p / rest), axis=-1, keepdims=True)
    inside = keep * dout + (1.0 - keep) * dfreed  # (4')
    drest = -np.sum(dshare * (p / rest), axis=-1, keepdims=True) / rest
    dp = np.where(sinks, inside, dout + dshare / rest + drest)  # (3')
    dp = dp if chosen is None else np.where(chosen, dp, dout)
    return {"p": np.where(live, dp, 0.0)}


def causal_maps(rng, lead=(), T=6, S=6, sinks=(3,), strength=6.0, align="lower_right"):
    """Random causal weights in which the first key and some later ones are sinks.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of the numbers.
    lead : tuple of int
        Leading axes.
    T, S : int
        Queries and keys.
    sinks : tuple of int
        The later sinks.
    strength : float, > 0
        How many times heavier than an ordinary key a sink is.
    align : {"lower_right", "upper_left"}
        Where the diagonal lies.

    Returns
    -------
    ndarray, shape (..., T, S)
        Rows with sum 1, or 0 without keys.
    """
    weight = rng.uniform(0.8, 1.2, (*lead, T, S))
    weight[..., list(sinks)] *= strength
    weight[..., 0] *= strength
    weight *= np.tri(T, S, S - T if align == "lower_right" else 0)
    total = np.sum(weight, axis=-1, keepdims=True)
    return weight / np.where(total == 0, 1.0, total)


def examples(rng):
    """Maps with late sinks, well away from the threshold; all options.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of the numbers.

    Returns
    -------
    dict
        Case -> keyword arguments.
    """
    mask = np.ones((9, 9), bool)
    mask[6:, :2] = mask[4, 3] = mask[8] = False
    masked = np.where(mask, causal_maps(rng, (2,), 9, 9, (3,)), 0.0)
    wide = rng.uniform(0.5, 1.5, (2, 4, 8)) * np.array([1, 1, 9, 1, 1, 9, 1, 1.0])
    batch = [causal_maps(rng, (2, 1), 9, 9, sinks) for sinks in ((3, 5), (4,), (3, 6))]
    return {
        "plain": {"p": causal_maps(rng, (2,), 7, 7, (3,)), "threshold": 0.2},
        "batch": {
            "p": np.concatenate(batch, axis=1),
            "threshold": 0.16,
            "beta": 0.25,
            "heads": np.array([True, False, True]),
        },
        "long-keys": {"p": causal_maps(rng, (), 5, 12, (4, 7)), "alpha": 1.5},
        "long-queries": {"p": causal_maps(rng, (2,), 8, 6, (3,)), "threshold": 0.2},
        "upper-left": {
            "p": causal_maps(rng, (1,), 6, 11, (3,), align="upper_left"),
            "align": "upper_left",
            "threshold": 0.2,
            "beta": 0.0,
        },
        "mask": {"p": masked, "mask": mask, "threshold": 0.2, "beta": 0.7},
        "both-ways": {
            "p": wide / np.sum(wide, axis=-1, keepdims=True),
            "causal": False,
            "alpha": 1.2,
        },
        "no-sink": {"p": causal_maps(rng, (), 5, 5, (), 1.0), "threshold": 0.9},
    }


SPEC = core.Edit(
    key="steering/attention_calibration",
    edit=attention_calibration_edit,
    backward=attention_calibration_backward,
    example=examples,
    claim=(
        "In maps with a meaningless late sink, calibration moves weight back to the informative "
        "keys, which outrank the sink again; every row keeps its sum."
    ),
    verified_by=("slow loop",),
)
