"""English text that every Python carries: the help topics in ``pydoc_data.topics``.

The text differs a little between Python versions, so a result records its hash and asserts trends.
"""

import functools
import hashlib
import re
from typing import NamedTuple

import numpy as np


class Text(NamedTuple):
    """A text as numbers."""

    ids: np.ndarray  # (N,), int64, one a character
    alphabet: str  # alphabet[i] is the character of id i
    sha256: str  # of the text, for the record

    def encode(self, string):
        """Characters to ids; a character outside the alphabet becomes a space."""
        place = {character: i for i, character in enumerate(self.alphabet)}
        blank = place.get(" ", 0)
        return np.array([place.get(character, blank) for character in string], dtype=np.int64)

    def decode(self, ids):
        """Ids to characters."""
        return "".join(self.alphabet[int(i)] for i in np.ravel(ids))

    def split(self, share=0.9):
        """The first part of the ids and the rest, to train and to validate."""
        cut = int(len(self.ids) * share)
        return self.ids[:cut], self.ids[cut:]

    def entropy(self, order=1):
        """Entropy of a character, in nats, given the ``order - 1`` characters before it.

        Order 1 is the unigram entropy: no model that ignores the context can have a smaller loss
        on this text. Order 2 is the same for models that see one character.
        """
        known = np.lib.stride_tricks.sliding_window_view(self.ids, order)
        _, joint = np.unique(known, axis=0, return_counts=True)
        total = np.sum(joint)
        result = -np.sum(joint / total * np.log(joint / total))
        if order > 1:
            _, context = np.unique(known[:, :-1], axis=0, return_counts=True)
            result += np.sum(context / total * np.log(context / total))
        return float(result)


@functools.cache
def english():
    """The help topics of Python in sorted order, runs of white space and rulers shortened.

    Returns
    -------
    Text
        Some 400,000 characters of plain technical English.
    """
    from pydoc_data.topics import topics

    return from_string("\n".join(topics[name] for name in sorted(topics)))


def from_string(string):
    """A text of one's own: white space becomes single spaces, rare characters are left out.

    Parameters
    ----------
    string : str
        The raw text.

    Returns
    -------
    Text
    """
    string = re.sub(r"\s+", " ", re.sub(r"([*=\-~^])\1{2,}", " ", string))
    alphabet, counts = np.unique(list(string), return_counts=True)
    rare = set(alphabet[counts < max(2, len(string) // 50_000)])
    string = "".join(character for character in string if character not in rare)
    alphabet = "".join(sorted(set(string)))
    ids = np.searchsorted(list(alphabet), list(string)).astype(np.int64)
    return Text(ids, alphabet, hashlib.sha256(string.encode()).hexdigest())


def batches(rng, ids, *, size, context):
    """Endless random windows of a text.

    Parameters
    ----------
    rng : numpy.random.Generator
        Where the windows begin.
    ids : int ndarray, shape (N,)
        The text.
    size : int
        Windows a batch.
    context : int, tokens
        Length of a window.

    Yields
    ------
    tokens, targets : int ndarray, shape (size, context)
        ``targets[:, t]`` is the token after ``tokens[:, t]``.
    """
    windows = np.lib.stride_tricks.sliding_window_view(ids, context + 1)
    while True:
        chosen = windows[rng.integers(len(windows), size=size)]
        yield chosen[:, :-1], chosen[:, 1:]
