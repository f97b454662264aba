r"""Flip-flop language: copy the bit that was written last, however much noise lies between.

A sequence is T/2 pairs of an instruction and a bit. With :math:`a_j` the instruction and
:math:`b_j` the bit of pair j,

.. math::

    a_0 = w, \quad a_{T/2-1} = r, \quad
    P(a_j = i) = p_i, \quad P(a_j = w) = P(a_j = r) = (1 - p_i)/2      &(1)\\
    b_j \text{ uniform after w and i}                                  &(2)\\
    b_j = b_{m(j)}, \quad m(j) = \max \{ l < j : a_l = w \}
        \quad\text{after r}                                            &(3)

Only the bits of (3) follow from the prefix, so only they are judged. One head of attention can
try it with :math:`z_{js} = c\, [a_s = w] + \text{slope} \cdot s` and values :math:`\pm 1` (4): the
bonus c finds the writes, the slope finds the last of them, and each spoils the other.

Source: Liu et al. 2023, *Exposing Attention Glitches with Flip-Flop Language Modeling*; the card
of the authors' data set was read (256 pairs, the three settings of p_i); grade B. The head (4) is
ours, after the paper's remark that a single layer suffices.
"""

from typing import NamedTuple

import numpy as np

from attention_ref import core

TOKENS = {"w": 0, "r": 1, "i": 2, "0": 3, "1": 4}
"""The vocabulary: write, read, ignore, the two bits."""

WRITE, READ, IGNORE, ZERO, ONE = TOKENS.values()


class Sample(NamedTuple):
    """Sequences, and where their tokens follow from what stands before them."""

    tokens: np.ndarray  # (B, T), int64, pairs of an instruction and a bit
    judged: np.ndarray  # (B, T), bool, True at the bits after a read


def flip_flop_generate(rng, *, T=512, p_i=0.8, B=1):
    """Draw sequences of the flip-flop language FFL(T, p_i).

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of the sequences.
    T : int, >= 4 and even, tokens
        Length of a sequence.
    p_i : float, in [0, 1]
        Probability that an inner instruction is "ignore"; the rest is half "write", half "read".
    B : int, >= 0
        Number of sequences.

    Returns
    -------
    Sample
        ``tokens`` of shape (B, T) in the numbers of ``TOKENS``; ``judged`` of the same shape, True
        at the bits that are determined.

    Raises
    ------
    DTypeError
        When ``rng`` is no generator.
    ParameterError
        When T is odd or too small, p_i is no probability, or B is negative.

    Notes
    -----
    The authors train on p_i = 0.8 and test on 0.98 (sparse: long gaps) and on 0.1 (dense). A model
    that always answers the same bit is right half of the time. The order of draws is: all
    instructions, then all bits, so that two settings with one seed share the bits.

    Source
    ------
    tasks/flip_flop in the catalog; definition 1 and the authors' data card; grade B.

    References
    ----------
    Liu, Ash, Goel, Krishnamurthy, Zhang 2023, Exposing Attention Glitches with Flip-Flop Language
    Modeling.

    Examples
    --------
    >>> import numpy as np
    >>> sample = flip_flop_generate(np.random.default_rng(3), T=12, p_i=0.5)
    >>> "".join("wri01"[token] for token in sample.tokens[0])
    'w1i0r1w0i1r0'
    >>> sample.judged[0].nonzero()[0].tolist()
    [5, 11]
    """
    core.check.generator("rng", rng)
    core.check.count("T", T, low=4, unit="tokens")
    core.check.number("p_i", p_i, low=0, high=1)
    core.check.count("B", B)
    if T % 2:
        raise core.errors.ParameterError(f"T is {T}, expected an even number: pairs of tokens")
    pairs = T // 2
    draw = rng.random((B, pairs))
    word = np.where(draw < p_i, IGNORE, np.where(draw < (1 + p_i) / 2, WRITE, READ))
    word[:, 0], word[:, -1] = WRITE, READ  # (1)
    bits = rng.integers(0, 2, (B, pairs))  # (2)
    bits = np.where(word == READ, np.take_along_axis(bits, _last_write(word), axis=1), bits)  # (3)
    tokens = np.stack([word, ZERO + bits], axis=-1)
    judged = np.stack([np.zeros_like(word, dtype=bool), word == READ], axis=-1)
    return Sample(np.reshape(tokens, (B, T)), np.reshape(judged, (B, T)))


def _last_write(word):
    """m(j) of every pair: the index of the last write up to there."""
    place = np.where(word == WRITE, np.arange(word.shape[1]), 0)
    return np.maximum.accumulate(place, axis=1)


def flip_flop_solve(tokens):
    """The perfect solver: a machine with one bit of memory.

    Parameters
    ----------
    tokens : int ndarray, shape (B, T)
        Sequences; every prefix is read from the left.

    Returns
    -------
    int ndarray, shape (B, T)
        The memory before each token, as a token; before the first write "0".
    """
    core.check.integer("tokens", tokens, 0, len(TOKENS))
    answers, memory = [], np.full(len(tokens), ZERO)
    for word, bit in zip(tokens.T[0::2], tokens.T[1::2], strict=True):
        answers += [memory, memory]
        memory = np.where(word == WRITE, bit, memory)
    return np.stack(answers, axis=1)


def flip_flop_head(tokens, *, c, slope=0.0):
    """Answers of one hand-built head of softmax attention, equation (4).

    At the bit of pair j the head looks at the pairs before j: key ``c [write] + slope * s``,
    value +1 or -1 for the bit of pair s.

    Parameters
    ----------
    tokens : int ndarray, shape (B, T)
        Sequences.
    c : float, nats
        How much more a write scores than any other pair.
    slope : float, nats a pair
        How much more each pair scores than the one before it.

    Returns
    -------
    answer : int ndarray, shape (B, T)
        At the bits the head's answer as a token, elsewhere "0".
    mean : ndarray, shape (B, T // 2), float64
        The head's output: the weighted mean of the values, 0 at the first pair.
    """
    core.check.integer("tokens", tokens, 0, len(TOKENS))
    core.check.number("c", c, unit="nats")
    core.check.number("slope", slope, unit="nats a pair")
    word, bits = tokens[:, 0::2], tokens[:, 1::2]
    pairs = word.shape[1]
    z = np.where(word == WRITE, float(c), 0.0) + slope * np.arange(pairs)
    live = np.tri(pairs, k=-1, dtype=bool)
    p, _ = core.softmax_forward(np.broadcast_to(z[:, None, :], (len(z), pairs, pairs)), live)
    mean = core.mix_forward(p, np.where(bits == ONE, 1.0, -1.0)[..., None])[..., 0]
    answer = np.full_like(tokens, ZERO)
    answer[:, 1::2] = np.where(mean > 0, ONE, ZERO)
    return answer, mean


def flip_flop_error(answer, sample):
    """Share of the judged bits that are wrong.

    Parameters
    ----------
    answer : int ndarray, shape (B, T)
        What a model says at each place, as tokens; only the judged places count.
    sample : Sample
        From :func:`flip_flop_generate`.

    Returns
    -------
    float
        Between 0 and 1; 0 where nothing is judged.
    """
    core.check.integer("answer", answer, 0, len(TOKENS))
    wrong = (answer != sample.tokens) & sample.judged
    return float(np.sum(wrong) / max(np.sum(sample.judged), 1))


def examples(rng):
    """Settings: the authors' three at small length, and both ends of p_i.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of the seeds.

    Returns
    -------
    dict
        Case -> keyword arguments.
    """
    seed = [int(s) for s in rng.integers(0, 2**31, 6)]
    return {
        "plain": {"rng": seed[0], "T": 24, "p_i": 0.8, "B": 5},
        "dense": {"rng": seed[1], "T": 40, "p_i": 0.1, "B": 3},
        "sparse": {"rng": seed[2], "T": 128, "p_i": 0.98, "B": 4},
        "only-ignore": {"rng": seed[3], "T": 18, "p_i": 1.0, "B": 6},
        "no-ignore": {"rng": seed[4], "T": 30, "p_i": 0.0, "B": 2},
        "shortest": {"rng": seed[5], "T": 4, "p_i": 0.5, "B": 7},
    }


SPEC = core.Task(
    key="tasks/flip_flop",
    generate=flip_flop_generate,
    example=examples,
    flags=frozenset({"no_foreign"}),
    claim=(
        "The hand-built head has no error up to a gap that grows exponentially in c, then fails; "
        "a machine with two states has none."
    ),
    verified_by=("rules, by a scalar walk",),
)
