"""Optimisers as pure functions: parameters, gradients and state in, new ones out."""

import math
from typing import NamedTuple

import numpy as np


class Moments(NamedTuple):
    """What AdamW remembers."""

    step: int
    mean: dict  # of the gradients
    square: dict  # of their squares


def adamw(parameters, gradients, state=None, *, rate, betas=(0.9, 0.99), eps=1e-8, decay=0.01):
    """One step of Adam with decoupled weight decay.

    Parameters
    ----------
    parameters, gradients : dict of ndarray
        By the same names.
    state : Moments, optional
        From the last step; None at the first.
    rate : float, > 0
        Learning rate.
    betas : tuple of float
        Memory of the two moments.
    eps : float
        Keeps the division finite.
    decay : float
        Weight decay, applied to matrices only.

    Returns
    -------
    parameters : dict of ndarray
    state : Moments
    """
    if state is None:
        zeros = {name: np.zeros_like(x) for name, x in parameters.items()}
        state = Moments(0, zeros, zeros)
    step, (b1, b2) = state.step + 1, betas
    mean = {k: b1 * state.mean[k] + (1 - b1) * g for k, g in gradients.items()}
    square = {k: b2 * state.square[k] + (1 - b2) * np.square(g) for k, g in gradients.items()}
    rate1, root2 = rate / (1 - b1**step), math.sqrt(1 - b2**step)
    new = {}
    for name, x in parameters.items():
        kept = 1 - rate * decay if x.ndim > 1 else 1.0
        new[name] = kept * x - rate1 * mean[name] / (np.sqrt(square[name]) / root2 + eps)
    return new, Moments(step, mean, square)


def sgd(parameters, gradients, state=None, *, rate, momentum=0.0):
    """One step of gradient descent, with heavy-ball momentum if asked.

    Parameters
    ----------
    parameters, gradients : dict of ndarray
        By the same names.
    state : dict of ndarray, optional
        The velocity; None at the first step.
    rate : float, > 0
        Learning rate.
    momentum : float
        Share of the velocity kept.

    Returns
    -------
    parameters, state : dict of ndarray
    """
    velocity = {k: g if state is None else momentum * state[k] + g for k, g in gradients.items()}
    return {k: x - rate * velocity[k] for k, x in parameters.items()}, velocity


def clip(gradients, norm):
    """Scale all gradients by one factor so that their joint norm is at most ``norm``."""
    squares = (np.sum(np.square(g, dtype=np.float64)) for g in gradients.values())
    total = math.sqrt(sum(squares))
    factor = min(1.0, norm / total) if total > 0 else 1.0
    return {name: g * factor for name, g in gradients.items()}


def cosine(step, steps, *, rate, warmup=20, last=0.1):
    """A learning rate that climbs for ``warmup`` steps, then falls along a cosine to ``last``."""
    if step < warmup:
        return rate * (step + 1) / warmup
    turn = min(1.0, (step - warmup) / max(1, steps - warmup))
    return rate * (last + (1 - last) * 0.5 * (1 + math.cos(math.pi * turn)))
