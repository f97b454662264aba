r"""Text infilling: blanks of unknown length, with positions that do not betray the length.

A sequence of T numbers in arithmetic progression loses b runs; what is left is the template. Text
segments and blanks are numbered 0, 1, ..., 2b in turn, blanks have odd numbers.

.. math::

    x_i &= (a + d\, i) \bmod V, \quad a \in \{0, \dots, V-1\}, \; d \in \{1, \dots, D\}   &(1)\\
    \text{blank of } n &: \quad \text{reads } \langle blank \rangle, x_1, \dots, x_n, \quad
        \text{writes } x_1, \dots, x_n, \langle end \rangle                              &(2)\\
    \pi &= 256 \cdot \text{segment} + \text{offset in the segment}                        &(3)\\
    e_\pi &= [\sin(\pi / \tau_i), \; \cos(\pi / \tau_i)]_i, \quad
        \tau_i = 10^{4 i / (C/2 - 1)}                                                    &(4)\\
    s \text{ is seen by } t &\iff s \text{ is text, or } t, s \text{ are in blanks and }
        s \le t                                                                          &(5)

By (3) the places to the right of a blank do not depend on how long it is, so they can be known
before it is filled. By (5) a blank is filled with both sides in view, blanks in order, each from
left to right, and the template never sees a filling. The step d follows from any two neighbours
of the template, the length of a blank from the number behind it: a model that reads from left to
right may know neither.

Source: Zhu, Hu, Xing 2019, *Text Infilling*; official code of VegB/Text_Infilling read for (2) to
(4), texar/modules/embedders/position_embedders.py, texar/utils/transformer_utils.py and
texar/modules/decoders/template_transformer_decoder.py; grade A for these. The task (1) is ours.
"""

import math
from typing import NamedTuple

import numpy as np

from attention_ref import core


class Sample(NamedTuple):
    """Templates with their fillings, b slots longer than the sequences: the markers."""

    tokens: np.ndarray  # (B, T + b), int64, what is read; V is <blank>
    target: np.ndarray  # (B, T + b), int64, what is written; V + 1 is <end>; text repeats itself
    blank: np.ndarray  # (B, T + b), bool, True in blanks: the slots that are judged
    segment: np.ndarray  # (B, T + b), int64, 0 to 2b
    offset: np.ndarray  # (B, T + b), int64, from 0 in every segment


def segments(blank):
    """Number of the segment and place in it, from which slots are blank.

    Parameters
    ----------
    blank : bool ndarray, shape (..., N)
        True in blanks; two blanks have text between them.

    Returns
    -------
    segment, offset : int ndarray, shape (..., N)
        Text has even numbers, so a sequence that begins with a blank begins with segment 1.
    """
    core.check.boolean("blank", blank)
    slot = np.arange(blank.shape[-1])
    before = np.concatenate([np.zeros_like(blank[..., :1]), blank[..., :-1]], axis=-1)
    change = blank != before
    start = np.maximum.accumulate(np.where(change, slot, 0), axis=-1)
    return np.cumsum(change, axis=-1), slot - start


def position_code(segment, offset, width, *, base=256):
    """Sinusoids of base * segment + offset, steps (3) and (4).

    Parameters
    ----------
    segment, offset : int ndarray, shape (..., N)
        From :func:`segments`.
    width : int, even, >= 4, channels
        C: first all sines, then all cosines, time scales from 1 to 10000.
    base : int, > 0
        Segments shorter than this have positions of their own.

    Returns
    -------
    ndarray, shape (..., N, width), float64
    """
    core.check.integer("segment", segment, 0)
    core.check.integer("offset", offset, 0)
    core.check.count("width", width, low=4, unit="channels")
    core.check.count("base", base, low=1)
    if width % 2:
        raise core.errors.ParameterError(f"width is {width}, expected an even number")
    rate = np.exp(np.arange(width // 2) * (-math.log(1e4) / (width // 2 - 1)))
    angle = (base * segment + offset)[..., None] * rate
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=-1)


def visible(blank):
    """Who sees whom, step (5); a mask for any attention.

    Parameters
    ----------
    blank : bool ndarray, shape (..., N)
        True in blanks.

    Returns
    -------
    bool ndarray, shape (..., N, N)
        Row t, column s: True where slot t may read slot s.
    """
    core.check.boolean("blank", blank)
    query, key = blank[..., :, None], blank[..., None, :]
    return ~key | (query & np.tri(blank.shape[-1], dtype=bool))


def _parts(rng, total, parts, longest):
    """Split numbers into parts of at least 1, every split equally likely: (B,) -> (B, parts)."""
    keys = rng.random((len(total), longest))
    keys = np.where(np.arange(longest) < total[:, None] - 1, keys, 2.0)
    cuts = np.sort(np.argsort(keys, axis=1)[:, : parts - 1], axis=1) + 1
    return np.diff(cuts, axis=1, prepend=0, append=total[:, None])


def segment_positions_generate(rng, *, T=12, V=13, D=3, b=2, fewest=4, most=6, B=1):
    """Draw arithmetic progressions with runs missing, and their fillings.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of the samples.
    T : int, <= V, tokens
        Length of a sequence.
    V : int, prime
        Numbers are 0 to V - 1.
    D : int, 1 <= D < V
        The step is drawn from 1 to D.
    b : int, >= 1
        Number of blanks.
    fewest, most : int, tokens
        How many are missing in all, drawn between these; at least b, and b + 2 must be left.
    B : int, >= 0
        Number of samples.

    Returns
    -------
    Sample
        Slots in the order of the sequence; every blank has a slot more than tokens.

    Raises
    ------
    DTypeError
        When ``rng`` is no generator.
    ParameterError
        When a number is outside its range, or V is not prime.

    Notes
    -----
    The paper masks words of reviews and stories, 30 to 50 % of them in one to three blanks, lets a
    text begin and end as it happens, and marks a blank by one token; in the official code that
    token stands in the template for everybody to see. Here the marker belongs to its blank, which
    keeps the template free of fillings in every layer; where the blanks are is told by the segment
    numbers. Text stands on both sides of every blank, and two neighbours are left somewhere, so
    that all is determined. The order of draws is a, d, number of missing tokens, splits of the
    text, splits of the blanks.

    Source
    ------
    scores/segment_positions in the catalog; the official files named above; grade A, the task
    itself ours.

    References
    ----------
    Zhu, Hu, Xing 2019, Text Infilling.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(1)
    >>> sample = segment_positions_generate(rng, T=7, V=7, b=1, fewest=2, most=3)
    >>> sample.tokens[0].tolist(), sample.target[0, sample.blank[0]].tolist()
    ([3, 7, 5, 0, 2, 4, 6, 1], [5, 0, 2, 8])
    """
    core.check.generator("rng", rng)
    core.check.count("V", V, low=2)
    core.check.count("T", T, low=1, high=V, unit="tokens")
    core.check.count("D", D, low=1, high=V - 1)
    core.check.count("b", b, low=1)
    core.check.count("B", B)
    core.check.count("fewest", fewest, low=b, unit="tokens")
    core.check.count("most", most, low=fewest, high=T - b - 2, unit="tokens")
    if any(V % n == 0 for n in range(2, V)):
        raise core.errors.ParameterError(f"V is {V}, expected a prime: steps must have an inverse")
    a, d = rng.integers(V, size=(B, 1)), rng.integers(1, D + 1, size=(B, 1))
    missing = rng.integers(fewest, most + 1, size=B)
    lengths = np.zeros((B, 2 * b + 1), dtype=np.int64)
    lengths[:, 0::2] = _parts(rng, T - missing, b + 1, T)
    lengths[:, 1::2] = _parts(rng, missing, b, T) + 1

    slot, ends = np.arange(T + b), np.cumsum(lengths, axis=1)
    segment = np.sum(slot[None, :, None] >= ends[:, None, :], axis=2)
    last = np.take_along_axis(ends, segment, axis=1) - 1
    offset = slot - (last + 1 - np.take_along_axis(lengths, segment, axis=1))
    blank = segment % 2 == 1
    number = (a + d * (slot - segment // 2)) % V  # (1)
    tokens = np.where(blank, (number - d) % V, number)  # (2)
    tokens = np.where(blank & (offset == 0), V, tokens)
    target = np.where(blank & (slot == last), V + 1, number)
    return Sample(tokens, target, blank, segment, offset)


def segment_positions_solve(sample, V):
    """The perfect solver: it reads only what (5) lets a blank see.

    Parameters
    ----------
    sample : Sample
        From the generator.
    V : int
        As there.

    Returns
    -------
    int ndarray, shape (B, T + b)
        What to write in every slot of a blank; elsewhere 0.
    """
    tokens, blank = sample.tokens, sample.blank
    slot = np.arange(blank.shape[1])
    pair = ~blank[:, 1:] & ~blank[:, :-1]
    first = np.argmax(pair, axis=1)[:, None]
    d = np.take_along_axis(np.diff(tokens, axis=1), first, axis=1)
    latest = np.where(tokens == V, np.roll(tokens, 1, axis=1), tokens)
    behind = np.where(blank, len(slot) - 1, slot)[:, ::-1]
    behind = np.minimum.accumulate(behind, axis=1)[:, ::-1]
    number = (latest + d) % V
    answer = np.where(number == np.take_along_axis(tokens, behind, axis=1), V + 1, number)
    return np.where(blank, answer, 0)


def segment_positions_accuracy(answer, sample):
    """Share of the blanks' slots that are written correctly.

    Parameters
    ----------
    answer : int ndarray, shape (B, T + b)
        What a model writes; only blanks count.
    sample : Sample
        From the generator.

    Returns
    -------
    float
        Between 0 and 1; 1 where nothing is judged.
    """
    core.check.integer("answer", answer, 0)
    right = (answer == sample.target) & sample.blank
    judged = np.sum(sample.blank)
    return float(np.sum(right) / judged) if judged else 1.0


def examples(rng):
    """Settings: the default, one long blank, three, one that leaves no choice, and no sample.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of the seeds.

    Returns
    -------
    dict
        Case -> keyword arguments.
    """
    seed = [int(s) for s in rng.integers(0, 2**31, 5)]
    return {
        "plain": {"rng": seed[0], "B": 6},
        "one-blank": {
            "rng": seed[1],
            "T": 10,
            "V": 11,
            "D": 10,
            "b": 1,
            "fewest": 5,
            "most": 7,
            "B": 4,
        },
        "three": {
            "rng": seed[2],
            "T": 17,
            "V": 23,
            "D": 5,
            "b": 3,
            "fewest": 3,
            "most": 12,
            "B": 5,
        },
        "tight": {"rng": seed[3], "T": 6, "V": 7, "D": 1, "b": 2, "fewest": 2, "most": 2, "B": 7},
        "long": {"rng": seed[4], "T": 30, "V": 31, "D": 7, "b": 2, "fewest": 9, "most": 15, "B": 3},
    }


SPEC = core.Task(
    key="scores/segment_positions",
    generate=segment_positions_generate,
    example=examples,
    flags=frozenset({"no_foreign"}),
    claim=(
        "A model that sees the template on both sides fills every blank exactly; one that reads "
        "from left to right guesses where the evidence lies to the right."
    ),
    verified_by=("rules, by a scalar walk",),
)
