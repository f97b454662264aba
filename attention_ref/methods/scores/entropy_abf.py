r"""Entropy-aware ABF: slower rotary frequencies, and scores that grow with the logarithm of place.

For a token at place t (counted from 0) in layer l, with a model trained on L tokens:

.. math::

    \omega_i &= \text{base}^{-2 i / R}, \ i < R/2, \qquad
    s_t = \max(1,\, \ln(t + 1) / \ln L) \text{ if } l \ge 2, \text{ else } 1               &(1)\\
    z_{tu} &= c\, s_t\, (\rho(t)\, q_t) \cdot (\rho(u)\, k_u)                              &(2)\\
    o_t &= \textstyle\sum_u p_{tu} v_u, \qquad p = \text{softmax}(z)                       &(3)

with :math:`\rho(t)` turning pair i of channels by :math:`t\, \omega_i`. The larger base (500000 for
10000) makes distances look shorter; the factor sharpens the softmax of tokens that see more keys
than any in training, whose entropy would otherwise grow like the logarithm of their number. It
belongs to the query alone, so a cache of keys stays valid from step to step.

Source: Zhang, Li, Liu 2024; official code read: GAIR-NLP/Entropy-ABF, ``patch/EABF.py``; grade A.
"""

import math
from typing import NamedTuple

import numpy as np

from attention_ref import core


class Selected(NamedTuple):
    """What the policy decides for a layer."""

    omega: np.ndarray  # (R/2,), radians a token
    factor: np.ndarray  # (..., T), of the scores of each query, at least 1


class Attended(NamedTuple):
    """Attention with it, for each query."""

    out: np.ndarray  # (..., T, E)
    p: np.ndarray  # (..., T, S), weights
    selected: Selected


def entropy_abf_select(pos, *, R, layer=2, budget=4096, base=500000.0, skip=2):
    """Frequencies of the rotary positions, and a factor of the scores for every query.

    Parameters
    ----------
    pos : ndarray, shape (..., T), tokens
        Places of the queries, counted from 0, in the dtype of q.
    R : int, even, channels
        Width of a head.
    layer : int, >= 0
        Which layer, counted from 0.
    budget : float, > 1, tokens
        L, the length that the model was trained on.
    base : float, > 1
        Ratio between the fastest frequency, 1, and the one that would come after the slowest.
    skip : int, >= 0, layers
        How many of the first layers keep their scores.

    Returns
    -------
    Selected
        ``omega`` and ``factor``.

    Raises
    ------
    DTypeError
        When pos is no float32 or float64 array.
    ShapeError
        When pos has no axis of tokens.
    ParameterError
        When R is odd, a place is negative, or a number is outside its domain.

    Notes
    -----
    The first two layers keep their scores because their entropy behaves differently, as the
    authors report; the new base holds in all layers. In the official code L = 4096 and base =
    500000 are constants. Nothing depends on the length of the whole input: the factor of a token
    is the same in one pass as in decoding token by token. A place that is not finite gives a
    factor that is not.

    Source
    ------
    scores/entropy_abf in the catalog; ``patch/EABF.py`` of the official code; grade A.

    References
    ----------
    Zhang, Li, Liu 2024, Extending LLMs' Context Window with 100 Samples.

    Examples
    --------
    Trained on 10 tokens: up to place 9 nothing changes, at place 99 scores are doubled.

    >>> import numpy as np
    >>> chosen = entropy_abf_select(np.array([0.0, 9.0, 99.0]), R=4, budget=10, base=100.0)
    >>> chosen.omega.round(12).tolist(), chosen.factor.round(12).tolist()
    ([1.0, 0.1], [1.0, 1.0, 2.0])
    """
    core.check.shapes(pos=(pos, "... T"))
    core.check.count("R", R, low=2, unit="channels")
    core.check.count("layer", layer)
    core.check.count("skip", skip, unit="layers")
    core.check.number("budget", budget, low=1, open_low=True, unit="tokens")
    core.check.number("base", base, low=1, open_low=True)
    if R % 2:
        raise core.errors.ParameterError(f"R is {R}, expected an even number of channels")
    if isinstance(pos, np.ndarray) and np.any(pos < 0).item():
        raise core.errors.ParameterError(f"pos holds {np.min(pos):g}, expected 0 <= pos")
    pairs = [np.full_like(pos, base ** (-2.0 * i / R), shape=(1,)) for i in range(R // 2)]
    factor = np.maximum(np.log(pos + 1.0) / math.log(budget), 1.0)  # (1)
    return Selected(np.concatenate(pairs), factor if layer >= skip else np.ones_like(pos))


def turn(x, pos, omega):
    """Turn the pairs (i, i + R/2) of the channels by pos omega_i.

    Parameters
    ----------
    x : ndarray, shape (..., T, R)
        Queries or keys.
    pos : ndarray, shape (..., T)
        Their places.
    omega : ndarray, shape (R/2,)
        Radians a token.

    Returns
    -------
    ndarray, shape (..., T, R)
    """
    half, angle = omega.shape[0], pos[..., None] * omega
    a, b, cos, sin = x[..., :half], x[..., half:], np.cos(angle), np.sin(angle)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def entropy_abf_attend(
    q, k, v, *, layer=2, budget=4096, base=500000.0, skip=2, mask=None, causal=True, scale=None
):  # fmt: skip
    """Attention under the policy; the last query stands at the place of the last key.

    Parameters
    ----------
    q : ndarray, shape (..., T, D)
        Queries, not turned.
    k : ndarray, shape (..., S, D)
        Keys of the places 0 ... S - 1, not turned.
    v : ndarray, shape (..., S, E)
        Values.
    layer, budget, base, skip
        As in :func:`entropy_abf_select`.
    mask : bool ndarray, broadcast to (..., T, S), optional
        True = may attend.
    causal : bool
        Hide the keys behind each query.
    scale : float, dimensionless, optional
        The factor c; 1/sqrt(D) by default.

    Returns
    -------
    Attended
        ``out``, ``p``, and what was ``selected``.

    Raises
    ------
    ShapeError
        When lengths do not fit, or there are more queries than keys.
    """
    n = core.check.attention(q, k, v, mask=mask, scale=scale)
    if n["T"] > n["S"]:
        raise core.errors.ShapeError(
            f"q has T = {n['T']} in shape {q.shape}, expected at most S = {n['S']} as in k: a "
            "query has the place of a key"
        )
    live = core.visible(q, k, mask=mask, causal=causal)
    q, k, v, poison = core.quarantine(q, k, v, live)
    places = np.arange(n["S"], dtype=q.dtype, like=q)
    here = places[n["S"] - n["T"] :]
    chosen = entropy_abf_select(here, R=n["D"], layer=layer, budget=budget, base=base, skip=skip)
    q = turn(q, here, chosen.omega) * chosen.factor[..., None]
    k = turn(k, places, chosen.omega)
    z = core.scores_forward(q, k, core.default_scale(n["D"], scale))  # (2)
    p, _ = core.softmax_forward(z, live)
    return Attended(np.where(poison, np.nan, core.mix_forward(p, v)), p, chosen)  # (3)


def examples(rng):
    """Places within and beyond the trained length, first layers, single places, odd lengths.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of the places.

    Returns
    -------
    dict
        Case -> keyword arguments.
    """
    return {
        "plain": {"pos": np.arange(20.0), "R": 6, "budget": 8},
        "official": {"pos": np.floor(65536 * rng.random((2, 5))), "R": 128, "layer": 31},
        "first-layer": {"pos": np.arange(30.0), "R": 4, "layer": 1, "budget": 8},
        "within": {"pos": np.floor(4096 * rng.random(7)), "R": 2, "layer": 5},
        "no-skip": {"pos": np.arange(12.0), "R": 8, "layer": 0, "skip": 0, "budget": 3.5},
        "one-place": {"pos": np.array([[[40.0]]]), "R": 10, "base": 10000.0, "budget": 32},
    }


SPEC = core.Policy(
    key="scores/entropy_abf",
    select=entropy_abf_select,
    attend=entropy_abf_attend,
    example=examples,
    claim="Beyond the length of training entropy grows like the logarithm of the number of keys; "
    "the factor slows it, and with the larger base the sought key keeps more weight than under "
    "position interpolation or the NTK base.",
    verified_by=("slow loop", "PyTorch"),
)
