r"""StreamingLLM: keep the first few tokens and the last ones, and count places inside the cache.

With n tokens seen, s sinks, a window of L tokens and C = s + L, slot i of the cache holds the token

.. math::

    k_n(i) = i + [\, i \ge s \,] \max(n - C, 0), \qquad i < \min(n, C)       &(1)\\
    z_{ti} = c\, R(\min(n, C) - 1)\, q_t \cdot R(i)\, k_{k_n(i)}             &(2)\\
    o_t = \textstyle\sum_i p_{ti}\, v_{k_n(i)}, \qquad p = \text{softmax}(z) &(3)

R rotates by the place *inside the cache*, not in the text, so no place is ever larger than C - 1
and a stream has no end. Memory and time a token are constant. The first tokens hold weight that
softmax cannot put anywhere else; dropping them changes every other weight.

Source: Xiao et al. 2024, *Efficient Streaming Language Models with Attention Sinks*; official code
read: mit-han-lab/streaming-llm, ``streaming_llm/kv_cache.py`` and ``pos_shift/modify_llama.py``;
grade A.
"""

from typing import NamedTuple

import numpy as np

from attention_ref import core


class Attended(NamedTuple):
    """Attention over what was kept, for each query."""

    out: np.ndarray  # (..., T, E)
    p: np.ndarray  # (..., T, sinks + window), weights by slot, 0 in empty slots
    kept: np.ndarray  # (T, sinks + window), int, token in each slot, -1 in empty slots


def streaming_sinks_select(length, *, sinks=4, window=1020):
    """Which tokens the cache holds after ``length`` tokens; give all lengths for the whole trace.

    Parameters
    ----------
    length : int ndarray, shape (...)
        Tokens seen so far, the newest one included; ``np.arange(1, n + 1)`` walks all steps.
    sinks : int, >= 0, tokens
        How many of the first tokens stay for ever.
    window : int, >= 1, tokens
        How many of the last tokens are kept.

    Returns
    -------
    int ndarray, shape (..., sinks + window)
        Token in each slot, ascending, and -1 in slots that are still empty. The slot is the place
        that positional encodings see.

    Raises
    ------
    DTypeError
        When ``length`` is no integer array.
    ParameterError
        When a length or ``sinks`` is negative, or ``window`` is not positive.

    Notes
    -----
    No scores and no ties: the choice depends on places only. The budget counts the newest token,
    as ``evict_for_space`` of the official code does; its evaluation script evicts after each
    token, so that there attention sees one key more. The official defaults are 4 sinks and, for a
    model trained on 1024 tokens, a window of 1020; with fewer tokens than the budget all are kept.

    Source
    ------
    cache/streaming_sinks in the catalog; ``StartRecentKVCache`` of the official code; grade A.

    References
    ----------
    Xiao, Tian, Chen, Han, Lewis 2024, Efficient Streaming Language Models with Attention Sinks.

    Examples
    --------
    >>> import numpy as np
    >>> streaming_sinks_select(np.array([2, 5, 9]), sinks=2, window=3).tolist()
    [[0, 1, -1, -1, -1], [0, 1, 2, 3, 4], [0, 1, 6, 7, 8]]
    """
    core.check.integer("length", length, 0)
    core.check.count("sinks", sinks, unit="tokens")
    core.check.count("window", window, low=1, unit="tokens")
    slot = np.arange(sinks + window, like=length)
    dropped = np.maximum(length[..., None] - (sinks + window), 0)
    kept = slot + np.where(slot < sinks, 0, dropped)  # (1)
    return np.where(slot < length[..., None], kept, -1)


def streaming_sinks_walk_select(length, *, sinks=4, window=1020):
    """The same by a cache that takes one token after the other and drops one when it is full.

    Parameters
    ----------
    length : int ndarray, shape (...)
        Tokens seen so far.
    sinks, window : int, tokens
        The budget.

    Returns
    -------
    int ndarray, shape (..., sinks + window)
        As :func:`streaming_sinks_select`.
    """
    slot = np.arange(sinks + window, like=length)
    cache = np.zeros_like(length, shape=(*length.shape, sinks + window)) - 1
    for token in range(np.max(length).item() if length.size else 0):
        newest = np.full_like(cache[..., :1], token)
        later = np.where(slot == token, token, cache)
        if token >= sinks + window:
            later = np.concatenate([cache[..., :sinks], cache[..., sinks + 1 :], newest], axis=-1)
        cache = np.where(token < length[..., None], later, cache)
    return cache


def streaming_sinks_attend(q, k, v, *, sinks=4, window=1020, rotate=None, scale=None):
    """Causal attention of every query over the tokens that the cache holds when it comes.

    Parameters
    ----------
    q : ndarray, shape (..., T, D)
        Queries, the last of which belongs to the last key.
    k : ndarray, shape (..., S, D)
        Keys of the whole stream, not rotated.
    v : ndarray, shape (..., S, E)
        Values.
    sinks, window : int, tokens
        The budget, as in :func:`streaming_sinks_select`.
    rotate : callable, optional
        ``rotate(x, place)`` with x of shape (..., n, D) and place of n integers gives x with the
        positional encoding of these places, tokens inside the cache; none by default.
    scale : float, dimensionless, optional
        The factor c; 1/sqrt(D) by default.

    Returns
    -------
    Attended
        ``out``, and ``p`` and ``kept`` by slot.
    """
    n = core.check.shapes(q=(q, "... T D"), k=(k, "... S D"), v=(v, "... S E"))
    core.check.count("D", n["D"], low=1)
    core.check.number("scale", scale)
    scale = core.default_scale(n["D"], scale)
    slots, first = sinks + window, n["S"] - n["T"] + 1
    core.check.memory((*n["..."], n["T"], slots, n["D"]), q.dtype, "the gathered keys")
    seen = np.maximum(np.arange(n["T"], like=q) + first, 0)
    kept = streaming_sinks_select(seen, sinks=sinks, window=window)
    live, index = kept >= 0, np.maximum(kept, 0)
    if n["S"] == 0:
        out, p = (np.zeros_like(q, shape=(*n["..."], n["T"], m)) for m in (n["E"], slots))
        return Attended(out, p, kept)
    if rotate is not None:
        q = rotate(q, np.maximum(np.minimum(seen, slots) - 1, 0))
    k, v = k[..., index, :], v[..., index, :]  # (..., T, C, D), (..., T, C, E)
    if rotate is not None:
        k = rotate(k, np.arange(slots, like=kept))
    q, k, v, poison = core.quarantine(q[..., None, :], k, v, live[:, None, :])
    z = core.scores_forward(q, k, scale)  # (2)
    p, _ = core.softmax_forward(z, live[:, None, :])
    out = np.where(poison, np.nan, core.mix_forward(p, v))  # (3)
    return Attended(out[..., 0, :], p[..., 0, :], kept)


def examples(rng):
    """Traces: every step of a stream, single steps, no sinks, everything kept.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of the single lengths.

    Returns
    -------
    dict
        Case -> keyword arguments.
    """
    return {
        "plain": {"length": np.arange(1, 20), "sinks": 4, "window": 5},
        "window-only": {"length": np.arange(1, 14), "sinks": 0, "window": 6},
        "newest-only": {"length": np.arange(1, 9), "sinks": 2, "window": 1},
        "keep-all": {"length": np.arange(1, 11), "sinks": 3, "window": 7},
        "batch": {"length": rng.integers(0, 60, (3, 2)), "sinks": 1, "window": 8},
    }


SPEC = core.Policy(
    key="cache/streaming_sinks",
    select=streaming_sinks_select,
    attend=streaming_sinks_attend,
    example=examples,
    forms={"walk": streaming_sinks_walk_select},
    claim=(
        "When the first tokens leave a plain window the output of a head with sinks is lost; at "
        "the same budget with 4 sinks it stays close to full attention for as long as one likes."
    ),
    verified_by=("slow loop",),
)
