r"""Entropy scale: with another number of tokens than in training, scores get another scale.

.. math::

    g &= \Bigl(\frac{\ln N}{\ln N_0}\Bigr)^{\text{strength} / 2}, \qquad
         \lambda = \frac{g}{\sqrt D} = \sqrt{\frac{\log_{N_0} N}{D}}                      &(1)\\
    z_{ts} &= g \ln p_{ts}                                                                &(2)\\
    y_{ts} &= e^{z_{ts}} / \textstyle\sum_{s'} e^{z_{ts'}}                                &(3)\\
    p'_{ts} &= y_{ts} \textstyle\sum_{s'} p_{ts'}                                         &(4)

N_0 is the number of tokens in training, N that at inference, p a map made with the scale
:math:`1/\sqrt D`. As :math:`\ln p` is the scores minus a constant of the row, (2) and (3) are the
softmax with the scale lambda: maps in, maps out. More tokens than in training make rows sharper
(g > 1), fewer make them smoother; for Gaussian scores the entropy stays nearly the same share of
its largest value ln N.

Source: Jin, Shen, Li, Xue 2023, *Training-free Diffusion Model Adaptation for Variable-Sized
Text-to-Image Synthesis*; the formula is well known and stands so in public re-implementations, the
paper's derivation was not read; grade C.
"""

import math
from typing import NamedTuple

import numpy as np

from attention_ref import core


class Cache(NamedTuple):
    """What the backward needs, and what implementers compare with (``gain``)."""

    p: np.ndarray  # (..., T, S), weights; hidden ones and NaN rows set to 0
    y: np.ndarray  # (..., T, S), softmax of g ln p
    total: np.ndarray  # (..., T, 1), sums of the rows
    some: np.ndarray  # (..., T, S), True = visible and not 0
    live: np.ndarray  # broadcast to (..., T, S), True = may attend
    poison: np.ndarray  # (..., T, 1), rows that are NaN
    gain: float  # g of equation (1)


def entropy_gain(N, trained, strength=1.0):
    """The factor g of equation (1): 1 at the size of training, 0 for a single token.

    Parameters
    ----------
    N : int
        Tokens at inference.
    trained : int
        Tokens in training, at least 2.
    strength : float, >= 0, dimensionless
        0 changes nothing, 1 is the paper's square root, 2 the ratio of the logarithms itself.

    Returns
    -------
    float
    """
    core.check.count("N", N, low=1, unit="tokens")
    core.check.count("trained", trained, low=2, unit="tokens")
    core.check.number("strength", strength, low=0)
    return float((math.log(N) / math.log(trained)) ** (strength / 2.0))


def entropy_scale(D, N, trained):
    """The score scale lambda = sqrt(log_{N_0} N / D), for an attention with a ``scale``.

    Parameters
    ----------
    D : int
        Width of queries and keys.
    N, trained : int
        As in :func:`entropy_gain`.

    Returns
    -------
    float
    """
    core.check.count("D", D, low=1, unit="channels")
    return entropy_gain(N, trained) / math.sqrt(D)


def resolution_entropy_scale_edit(p, *, trained, N=None, strength=1.0, mask=None):
    """Turn maps made with the scale of training into those of the scale for N tokens.

    Parameters
    ----------
    p : ndarray, shape (..., T, S)
        Attention weights, not negative; softmax maps whose scores have no bias.
    trained : int
        Tokens N_0 in training, at least 2; in a U-Net a number for each level.
    N : int, tokens, optional
        Tokens at inference; S by default.
    strength : float, >= 0, dimensionless
        0 changes nothing, 1 is the paper's square root, 2 the ratio of the logarithms itself.
    mask : bool ndarray, broadcast to (..., T, S), optional
        True = may attend. Hidden weights are taken as 0 and stay 0.

    Returns
    -------
    out : ndarray, shape (..., T, S)
        The edited weights; each row keeps its sum.
    cache : Cache
        For the backward; holds ``gain``.

    Raises
    ------
    ShapeError
        When p has fewer than two axes, or the mask does not fit it.
    DTypeError
        When p is no float32 or float64 array, or the mask is not boolean.
    ParameterError
        When trained, N or strength is outside its domain.

    Notes
    -----
    The paper changes the scale inside the self-attention layers of a diffusion model (not the
    cross-attention, whose number of text tokens does not change). Where the scores can be reached,
    :func:`entropy_scale` gives that scale and saves the logarithm. On maps the same is (2) to (4);
    a bias in the scores would be scaled with them. A weight that has underflowed to 0 stays 0.

    ``strength`` is ours: the paper has 1. The sum of a row is kept, so that g = 1 is the identity
    for any row, bit by bit. Maps with one token have g = 0 and become equal weights. A negative or
    NaN weight that may be seen makes its row NaN.

    Source
    ------
    normalizers/resolution_entropy_scale in the catalog; grade C.

    References
    ----------
    Jin, Shen, Li, Xue 2023, Training-free Diffusion Model Adaptation for Variable-Sized
    Text-to-Image Synthesis.

    Examples
    --------
    >>> import numpy as np
    >>> p = np.array([[0.25, 0.75]])
    >>> out, cache = resolution_entropy_scale_edit(p, trained=2, N=16)
    >>> cache.gain, out.round(12).tolist()
    (2.0, [[0.1, 0.9]])
    """
    n = core.check.shapes(p=(p, "... T S"))
    core.check.check_mask(mask, p.shape)
    gain = entropy_gain(max(n["S"], 1) if N is None else N, trained, strength)  # (1)
    live = core.visible(p, np.swapaxes(p, -1, -2), mask=mask)

    p = np.where(live, p, 0.0)
    poison = ~np.all(np.isfinite(p) & (p >= 0), axis=-1, keepdims=True)
    p = np.where(poison, 0.0, p)
    some = p != 0
    z = gain * np.log(np.where(some, p, 1.0))  # (2)
    y, _ = core.softmax_forward(z, some)  # (3)
    total = np.sum(p, axis=-1, keepdims=True)
    out = p if gain == 1.0 else y * total  # (4)

    out = np.where(poison, np.nan, out)
    return out, Cache(p, y, total, some, live, poison, gain)


def resolution_entropy_scale_backward(dout, cache):
    """Gradient of :func:`resolution_entropy_scale_edit`, its steps read from the bottom up.

    Parameters
    ----------
    dout : ndarray, shape (..., T, S)
        Gradient of the edited weights.
    cache : Cache
        From the edit.

    Returns
    -------
    dict
        Under "p"; 0 for hidden weights and for weights of 0.
    """
    p, y, total, some, live, poison, gain = cache
    core.check.cotangent(dout, p.shape)
    dout = np.where(poison, 0.0, dout)
    if gain == 1.0:
        return {"p": np.where(live, dout, 0.0)}

    dy = dout * total  # (4')
    dtotal = np.sum(dout * y, axis=-1, keepdims=True)
    dz = core.softmax_backward(dy, y, some)  # (3')
    dp = gain * dz / np.where(some, p, 1.0) + dtotal  # (2')
    return {"p": np.where(some, dp, 0.0)}


def examples(rng):
    """Maps well away from 0, larger and smaller than in training; a mask; the other strengths.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of the numbers.

    Returns
    -------
    dict
        Case -> keyword arguments.
    """

    def maps(*shape):
        weight = rng.uniform(0.6, 1.4, shape)
        return weight / np.sum(weight, axis=-1, keepdims=True)

    mask = rng.random((2, 5, 6)) < 0.7
    mask[0, 1], mask[1, 2, 3] = False, True
    masked = np.where(mask, maps(2, 5, 6), 0.0)
    return {
        "plain": {"p": maps(2, 4, 5), "trained": 64, "N": 4096},
        "smaller": {"p": maps(2, 5, 5), "trained": 16},
        "batch": {"p": maps(3, 2, 4, 6), "trained": 2, "strength": 0.5},
        "same": {"p": maps(5, 4), "trained": 4},
        "log": {"p": maps(3, 7), "trained": 5, "N": 60, "strength": 2.0},
        "sums": {"p": maps(2, 4, 3) * rng.uniform(0.5, 1.5, (2, 4, 1)), "trained": 9, "N": 90},
        "mask": {"p": masked, "trained": 4, "N": 36, "mask": mask},
        "one": {"p": maps(2, 3, 4), "trained": 4, "N": 1},
    }


def _maps(rng):
    return {"p": examples(rng)["plain"]["p"][0], "trained": 3, "N": 12}


def _scores(kwargs):
    """ln p as queries against unit vectors: the scale of dot-product attention is the gain."""
    p, unit = kwargs["p"], np.eye(kwargs["p"].shape[-1])
    gain = entropy_gain(kwargs["N"], kwargs["trained"])
    return {"q": np.log(p), "k": unit, "v": unit, "scale": gain}


SPEC = core.Edit(
    key="normalizers/resolution_entropy_scale",
    edit=resolution_entropy_scale_edit,
    backward=resolution_entropy_scale_backward,
    example=examples,
    reduces_to=(
        core.Reduction("scores/dot_product", "g is a score scale", _maps, _scores),
    ),
    claim=(
        "For Gaussian queries and keys the entropy of a row rises as ln N at a fixed scale; with "
        "the proposed scale it rises more slowly and keeps its share of ln N."
    ),
    verified_by=("slow loop", "PyTorch"),
)  # fmt: skip
