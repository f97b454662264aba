"""The training loop: loss and gradient by the tape, one optimiser step, a bar on stderr."""

import os
import sys

import numpy as np

from attention_ref import engine
from attention_ref.nn.optim import adamw, clip, cosine


def train(
    loss, parameters, batches, *, steps, rate=3e-3, optimizer=adamw, warmup=20, norm=1.0,
    progress=None, label="training",
):  # fmt: skip
    """Minimise ``loss(parameters, *batch)``.

    Parameters
    ----------
    loss : callable
        Takes a dict of (traced) arrays and the parts of a batch, returns a single number.
    parameters : dict of ndarray
        Where to begin; not modified.
    batches : iterator
        Yields tuples.
    steps : int
        How many.
    rate : float
        Largest learning rate; it follows :func:`attention_ref.nn.optim.cosine`.
    optimizer : callable
        Like :func:`attention_ref.nn.optim.adamw`.
    warmup : int
        Steps until the largest rate.
    norm : float
        Bound on the joint norm of the gradients.
    progress : bool, optional
        A bar on stderr; by default where stderr is a terminal and NO_COLOR is not set.
    label : str
        Shown at the bar.

    Returns
    -------
    parameters : dict of ndarray
        After the last step.
    losses : ndarray, shape (steps,)
        The loss of each batch before its step, nats.
    """
    state, losses = None, np.zeros(steps)
    with bar(steps, label, progress) as shown:
        for step in range(steps):
            batch = next(batches)
            losses[step], gradients = value_and_gradient(loss, parameters, *batch)
            now = cosine(step, steps, rate=rate, warmup=warmup)
            parameters, state = optimizer(parameters, clip(gradients, norm), state, rate=now)
            shown.set_postfix_str(f"loss {losses[step]:.3f}", refresh=False)
            shown.update()
    return parameters, losses


def value_and_gradient(loss, parameters, *batch):
    """The loss as a number and its gradient by the tape, a dict like the parameters."""
    value, pull = engine.vjp(lambda **traced: loss(traced, *batch), parameters)
    return float(value), pull(np.ones_like(value))


class _Silent:
    """A progress bar that shows nothing."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def update(self, n=1):
        """Nothing."""

    def set_postfix_str(self, text, refresh=True):
        """Nothing."""


def bar(total, label, progress=None):
    """A tqdm bar on stderr, or a silent one: without a terminal, under NO_COLOR, without tqdm."""
    if progress is None:
        progress = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    if not progress:
        return _Silent()
    try:
        from tqdm import tqdm
    except ImportError:
        return _Silent()
    return tqdm(total=total, desc=label, unit="step", file=sys.stderr, dynamic_ncols=True)
