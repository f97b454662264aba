r"""
Flip-flop language
==================

**The question.** Language models copy a name from the page before and get it right nearly always.
*Nearly*: now and then one slips, with no visible reason. To find out why, take the smallest task
that has the difficulty and nothing else: remember a single bit, while noise goes by. Can one head
of attention do it without ever failing?

**The idea.** A sequence gives orders to a memory of one bit: *write* this bit, *ignore* this bit,
*read*. After *read* there is exactly one right answer. A machine with two states solves it for
ever. Attention has no state: it must look back and find the last *write* among everything else,
with weights that are never exactly zero. We build such a head by hand and look where it breaks.

You need to know softmax attention (``scores/dot_product``). Nothing is trained here.
"""

# %%
# Definition
# ----------
# A sequence of length :math:`T` is :math:`T/2` pairs of an instruction :math:`a_j` and a bit
# :math:`b_j`:
#
# .. math::
#
#    a_0 = w, \quad a_{T/2-1} = r, \quad
#    P(a_j = i) = p_i, \quad P(a_j = w) = P(a_j = r) = (1 - p_i)/2      &(1)\\
#    b_j \text{ uniform after w and i}                                  &(2)\\
#    b_j = b_{m(j)}, \quad m(j) = \max \{ l < j : a_l = w \}
#        \quad\text{after r}                                            &(3)
#
# Only the bits of (3) can be predicted, so only they are judged: a model that always says 1 is
# right half of the time, and whoever averages over all bits hides the failures among coin tosses.

import math

import numpy as np

import attention_ref
from attention_ref.kit.tutorial import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, Tutorial
from attention_ref.methods.tasks.flip_flop import (
    TOKENS,
    flip_flop_error,
    flip_flop_generate,
    flip_flop_head,
    flip_flop_solve,
)

tutorial = Tutorial(__file__)
spec = attention_ref.get("tasks/flip_flop")
LN2 = math.log(2)


def text(tokens):
    """A sequence as letters."""
    return "".join("wri01"[token] for token in tokens)


def encode(letters):
    """Letters as a batch of one sequence."""
    return np.array([[TOKENS[letter] for letter in letters]])


rng = np.random.default_rng(0)
for p_i in (0.1, 0.8, 0.98):
    sample = flip_flop_generate(rng, T=48, p_i=p_i)
    print(f"p_i = {p_i:4}: {text(sample.tokens[0])}")

# %%
# A solver that never fails
# -------------------------
# One bit of memory, one rule: after *write*, store. It needs a step for each token, and that is
# what attention was invented to avoid.

for p_i in (0.1, 0.8, 0.98):
    sample = flip_flop_generate(rng, T=512, p_i=p_i, B=50)
    error = flip_flop_error(flip_flop_solve(sample.tokens), sample)
    tutorial.check(f"errors of the two-state machine, p_i = {p_i}", error, 0.0)

# %%
# One head, by hand
# -----------------
# Give every pair :math:`s` before the read a score: a bonus :math:`c` when it is a write, and a
# slope :math:`a` with its place. Its value is :math:`y_s = +1` for the bit 1 and :math:`-1` for 0:
#
# .. math::
#
#    z_s = c\,[a_s = w] + a\, s, \qquad
#    o_j = \sum_{s<j} p_s\, y_s, \qquad \text{answer 1 when } o_j > 0.                    &(4)
#
# **Example.** ``w1 i0 i0 r?`` with :math:`e^c = 6` and :math:`a = 0`. The weights are in the
# proportion :math:`6 : 1 : 1`, the output is :math:`(6 - 1 - 1)/8 = \tfrac12 > 0`, so the answer
# is 1: right. With :math:`e^c = \tfrac32` it is :math:`(\tfrac32 - 2)/\tfrac72 = -\tfrac17`:
# wrong.

answer, mean = flip_flop_head(encode("w1i0i0r1"), c=math.log(6))
tutorial.check("the output is 1/2", abs(mean[0, 3] - 1 / 2), 1e-15)
answer, mean = flip_flop_head(encode("w1i0i0r1"), c=math.log(1.5))
tutorial.check("with the smaller bonus it is -1/7", abs(mean[0, 3] + 1 / 7), 1e-15)

# %%
# How far does it reach?
# ----------------------
# **One write, no slope.** After the write come :math:`g` ignored pairs, the *gap*. At worst all
# their bits are the opposite one: :math:`o \propto e^c - g`. So
#
# .. math:: \text{no sequence is answered wrongly while } g < e^c .                      \tag{5}
#
# With random bits the noise is a sum of :math:`g` signs. Its size grows like :math:`\sqrt g`, and
# errors become *common* only when :math:`\sqrt g \approx e^c`, that is :math:`g \approx e^{2c}`.
# Either way the reach is exponential in :math:`c`. This looks good.
#
# **Two writes, no slope.** ``w1 w1 w0 r?``: all three have the same score, and the head takes a
# vote: :math:`1`. Wrong, for every :math:`c`. Softmax over equal scores cannot know which came
# last.
#
# **With a slope** each write weighs :math:`e^a` times as much as one that stands a pair earlier.
# All earlier writes together weigh, relative to the last, at most
#
# .. math:: \sum_{k \ge 1} e^{-ak} = \frac{1}{e^a - 1} \le 1
#           \quad\Longleftrightarrow\quad a \ge \ln 2 .                                  \tag{6}
#
# **But the noise climbs too.** With :math:`a = \ln 2` the :math:`k`-th pair after the last write
# weighs :math:`2^k`, where that write weighs :math:`e^c`. Suppose there is no earlier write to
# help or to harm, and all bits of the noise are against us: they weigh :math:`2 + 4 + \dots + 2^g
# = 2^{g+1} - 2`. The answer is right only while
#
# .. math:: 2^{g+1} - 2 < e^c
#           \quad\Longleftrightarrow\quad g < \log_2(e^c + 2) - 1 \approx c / \ln 2 - 1 ,    \tag{7}
#
# and the reach is now *linear* in :math:`c`. The slope that finds the last write spoils the bonus
# that finds the writes.
#
# **With earlier writes not even (7) is promised.** If m of them, one after the other, hold the
# other bit, they weigh :math:`e^c (1 - 2^{-m})`, and of the last write's :math:`e^c` a margin of
# only :math:`2^{-m} e^c` is left for the noise. At :math:`c = 4`, five ``w0`` and then ``w1 i0 r?``
# have :math:`e^4 / 32 \approx 1.7` against 2: wrong at a gap of 1. A promise for all sequences
# takes a steeper slope, :math:`e^a > 2`: however many writes came before, the margin is at least
# :math:`e^c (e^a - 2) / (e^a - 1)`, the noise at most :math:`e^a + \dots + e^{ag}`, and the answer
# is right while
#
# .. math:: e^{a (g + 1)} - e^a < e^c\, (e^a - 2) .                                      \tag{8}
#
# This reach, too, is linear in :math:`c`.

answer, mean = flip_flop_head(encode("w0w0w0w0w0w1i0r1"), c=4.0, slope=LN2)
margin, total = math.exp(4) / 32 - 2, math.exp(4) * (2 - 1 / 32) + 2
tutorial.check("five writes before", abs(mean[0, -1] - margin / total), 1e-15)
print("w0w0w0w0w0w1i0r? with slope ln 2:", text(answer[0])[-1])
for gap in (1, 2, 3):  # (8) at e^a = 3, c = 4: 3^(g + 1) < e^4 + 3, so g = 1, 2
    tokens = encode("w0" * 30 + "w1" + "i0" * gap + "r1")
    said = text(flip_flop_head(tokens, c=4.0, slope=math.log(3))[0][0])[-1]
    tutorial.check(f"(8), gap {gap}: {said}", float((said == "1") != (3 ** (gap + 1) < 57.6)), 0)

answer, _ = flip_flop_head(encode("w1w1w0r0"), c=10.0)
print("w1w1w0r? without slope:", text(answer[0])[-1], " with slope ln 2:", end=" ")
answer, _ = flip_flop_head(encode("w1w1w0r0"), c=10.0, slope=LN2)
print(text(answer[0])[-1])


def reach_at_worst(c, slope):
    """The largest gap that is still right when a single write has all the noise against it."""
    gap = 0
    while True:
        tokens = encode("w1" + "i0" * (gap + 1) + "r1")
        if text(flip_flop_head(tokens, c=c, slope=slope)[0][0])[-1] == "0":
            return gap
        gap += 1


for c in (1.0, 2.0, 3.0, 4.0):
    flat, steep = reach_at_worst(c, 0.0), reach_at_worst(c, LN2)
    tutorial.check(f"(5) for c = {c}: {flat} pairs", flat - math.floor(math.exp(c)), 0)
    bound = math.ceil(math.log2(math.exp(c) + 2) - 1) - 1
    tutorial.check(f"(7) for c = {c}: {steep} pairs", abs(steep - bound), 0)

# %%
# The claim
# ---------
# It says "exponentially", and (5) and (7) tell us to ask: with the slope or without? So we measure
# both, in random sequences. The *reach* :math:`G(c)` is the smallest gap at which an error is seen.
# For the head without slope we take sequences with a single write, the only ones it can do; for the
# head with slope :math:`\ln 2` the sequences of the language, with many writes.

BONUSES = (2.0, 3.0, 4.0, 5.0)
tutorial.claim(
    spec.claim,
    criterion="on each of three seeds, for c = 2, 3, 4, 5: (a) without slope and with one write, "
    "no error at gaps below e^c, and ln G grows by at least 1 a unit of c on average; (b) the same "
    "rate with slope ln 2 on sequences with many writes; (c) the two-state machine makes no error. "
    "All three: reproduced; (a) and (c) only: partly; else not reproduced",
)


def one_write(rng, c, gaps, samples):
    """Share of wrong answers after each gap, one write, no slope: running sums of signs."""
    signs = 2 * rng.integers(0, 2, (samples, gaps), dtype=np.int8) - 1
    noise = np.cumsum(signs, axis=1, dtype=np.int32)  # relative to the written bit
    return np.mean(math.exp(c) + noise <= 0, axis=0)


# %%
# The running sum is the head's output without its positive denominator. Before we trust it, the
# library's head on the same bits:

tokens = flip_flop_generate(np.random.default_rng(1), T=100, p_i=1.0, B=40).tokens
_, mean = flip_flop_head(tokens, c=1.5)
sign = np.where(tokens[:, 1::2] == TOKENS["1"], 1, -1)
running = math.exp(1.5) * sign[:, :1] + np.cumsum(sign[:, 1:-1], axis=1)
tutorial.check("signs of running sum and head", np.sum((running > 0) != (mean[:, 2:] > 0)), 0)


def many_writes(rng, c, samples, slope=LN2):
    """Gap and failure of every read in sequences of the language."""
    sample = flip_flop_generate(rng, T=256, p_i=0.9, B=samples)
    answer, _ = flip_flop_head(sample.tokens, c=c, slope=slope)
    word = sample.tokens[:, 0::2]
    place = np.arange(word.shape[1])
    last = np.maximum.accumulate(np.where(word == TOKENS["w"], place, 0), axis=1)
    read = sample.judged[:, 1::2]
    wrong = (answer != sample.tokens)[:, 1::2]
    return (place - last - 1)[read], wrong[read]


# %%
# The experiment
# --------------

seeds = range(3)
longest, walks, texts = (400, 200, 20) if tutorial.quick else (6000, 1500, 400)
records, reach_flat, reach_steep, machine = [], [], [], []
for seed in seeds:
    rng = np.random.default_rng(seed)
    flat, steep, clean = [], [], True
    for c in BONUSES:
        wrong = one_write(rng, c, longest, walks)
        gaps = np.flatnonzero(wrong) + 1
        flat.append(gaps[0] if len(gaps) else np.inf)
        clean &= flat[-1] >= math.exp(c)
        gap, failed = many_writes(rng, c, texts)
        steep.append(np.min(gap[failed]) if np.any(failed) else np.inf)
    sample = flip_flop_generate(rng, T=512, p_i=0.98, B=texts)
    machine.append(flip_flop_error(flip_flop_solve(sample.tokens), sample))
    reach_flat.append(flat)
    reach_steep.append(steep)
    records.append(
        {f"no slope, c={c:.0f}": g for c, g in zip(BONUSES, flat, strict=True)}
        | {f"slope ln 2, c={c:.0f}": g for c, g in zip(BONUSES, steep, strict=True)}
        | {"machine, errors": machine[-1]}
    )
    assert clean, "(5) is a theorem"
reach_flat, reach_steep = np.array(reach_flat), np.array(reach_steep)
rate_flat = np.log(reach_flat[:, -1] / reach_flat[:, 0]) / 3
rate_steep = np.log(reach_steep[:, -1] / reach_steep[:, 0]) / 3
print("growth of ln G a unit of c, no slope:  ", rate_flat.round(2).tolist())
print("growth of ln G a unit of c, slope ln 2:", rate_steep.round(2).tolist())
first, second = bool(np.all(rate_flat >= 1)), bool(np.all(rate_steep >= 1))
third = max(machine) == 0
verdict = "reproduced" if first and second and third else "not reproduced"
if first and third and not second:
    verdict = "partly"
if not tutorial.quick:
    tutorial.measured(ours=records, verdict=verdict, tolerance=0.5)

# %%
# The claim holds for a head that may rely on there being one write. As soon as it must find the
# *last* of several, the slope eats the bonus, and the reach is about that of (7), one or two pairs
# more for each unit of :math:`c`. A real model sits between the two: its scores are bounded, its
# notion of "last" is soft, and which of the two failures shows depends on the sequence. That is
# what a *glitch* looks like from outside.
#
# The figure
# ----------

figure = None
if not tutorial.quick:
    plt = tutorial.pyplot()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.9))
    rng = np.random.default_rng(9)
    colours = dict(zip(BONUSES, (BLUE, GREEN, ORANGE, RED), strict=True))
    points = np.unique(np.geomspace(1, longest, 60).astype(int))
    for c, colour in colours.items():
        curve = one_write(rng, c, longest, 3000)[points - 1]
        left.plot(points, curve, color=colour, label=f"c = {c:.0f}")
        left.plot([math.exp(c)], [0], "v", color=colour, clip_on=False, markersize=7)
        tokens = flip_flop_generate(rng, T=30, p_i=1.0, B=4000).tokens
        answer, mean = flip_flop_head(tokens, c=c, slope=LN2)
        wrong = np.mean(answer[:, 3::2] != tokens[:, 1:2], axis=0)
        middle.plot(np.arange(len(wrong)), wrong, "o-", color=colour, markersize=3)
    left.set_xscale("log")
    left.legend(loc="upper left")
    left.set(title="No slope, one write", xlabel="gap (ignored pairs); triangles: $e^c$",
             ylim=(0, 0.55), ylabel="share of wrong answers")  # fmt: skip
    middle.set_xticks(range(0, 14, 2))
    middle.set(title=r"Slope $\ln 2$", xlabel="gap (ignored pairs)", ylim=(0, 0.55))
    dense = np.linspace(2, 5, 50)
    right.plot(dense, np.exp(dense), "--", color=GREY, linewidth=1)
    right.text(3.7, 30, "$e^c$", color=GREY, fontsize=9, va="top")
    right.plot(dense, np.log2(np.exp(dense) + 2) - 1, "--", color=GREY, linewidth=1)
    right.text(4.0, 3.9, r"$c/\ln 2 - 1$", color=GREY, fontsize=9, va="top")
    for values, colour, name in (
        (reach_flat, BLUE, "no slope, one write"),
        (reach_steep, PURPLE, r"slope $\ln 2$, many writes"),
    ):
        right.plot(BONUSES, values.T, "o", color=colour, alpha=0.6)
        right.plot(BONUSES, values.mean(axis=0), color=colour, label=name)
    right.set_yscale("log")
    right.set_xticks(BONUSES)
    right.set(title="Reach", xlabel="bonus c (nats)", ylabel="smallest gap with an error",
              ylim=(1, 9000))  # fmt: skip
    right.legend(loc="upper left")

# %%
# Exercises
# ---------
# **1. Write this score yourself.** Give the slope to the writes only: :math:`z_s = [a_s = w](c + a
# s)` and 0 for everything else. Which of (5) to (8) change? Fill in the function; a head with
# your score answers all reads of sequences with long gaps and is compared with the machine of two
# states.


def my_score(write, place, c, slope):
    """Scores of all pairs; ``write`` is boolean, ``place`` counts from 0, both of shape (n,)."""
    # solution: return None
    return write * (c + slope * place)
    # end of solution


def answers(score, sample, c=5.0, slope=1.0):
    """Bits that a head with that score answers to all reads, or None."""
    word, bits = sample.tokens[:, 0::2], sample.tokens[:, 1::2]
    found = []
    for line, value in zip(word, np.where(bits == TOKENS["1"], 1.0, -1.0), strict=True):
        for j in np.flatnonzero(line == TOKENS["r"]):
            z = score(line[:j] == TOKENS["w"], np.arange(j), c, slope)
            if z is None:
                return None
            found.append(np.sum(np.exp(z - np.max(z)) * value[:j]) > 0)
    return np.where(found, TOKENS["1"], TOKENS["0"])


sample = flip_flop_generate(np.random.default_rng(7), T=120, p_i=0.9, B=60)
right = flip_flop_solve(sample.tokens)[sample.judged]
tutorial.exercise(1, answers(my_score, sample), right)
share = np.mean(answers(lambda w, s, c, a: c * w + a * s, sample) != right)
print(f"exercise 1: the head of (4) is wrong in {share:.1%}")

# %%
# **Solution 1.** Let the last write stand at place m. No pair before it can weigh more than a write
# at its place, so at worst all are writes of the other bit; with :math:`a = \ln 2` they weigh
# :math:`e^c (1 + 2 + \dots + 2^{m-1}) = e^c (2^m - 1)` against :math:`e^c 2^m`. What is left,
# :math:`e^c`, meets g ignored pairs of weight 1: right while :math:`g < e^c`. (6) is still what the
# slope needs, but (5) now holds for all sequences, (7) and (8) are gone: the reach is exponential
# again. The price is in the scores, which grow with the length of the text: see exercise 2.

longest = reach = 0
while reach == longest:
    longest += 1
    write = np.arange(4 + longest) < 4  # three writes of 0, a write of 1, then noise of 0
    z = write * (3.0 + LN2 * np.arange(4 + longest))
    reach += np.exp(z[3]) > np.sum(np.exp(z)) / 2
print(f"exercise 1: at worst, c = 3, right up to {reach} pairs")
tutorial.check("exercise 1: as (5) says", abs(reach - math.floor(math.exp(3))), 0)

# %%
# **2. Bounded scores must fail.** Let all scores lie between :math:`-M` and :math:`M`. Show that
# the weight of the last write is at most :math:`e^{2M} / (e^{2M} + g)`, so that *every* such head,
# trained or not, is wrong on some sequence with :math:`g > e^{2M}`. How large must :math:`M` be
# for :math:`g = 10^6`?

# %%
# **Solution 2.** The write has at most :math:`e^M`, each of the g pairs after it at least
# :math:`e^{-M}`: its weight is at most :math:`e^M / (e^M + g e^{-M})`. For :math:`g > e^{2M}` that
# is less than one half, and if all other bits are the opposite one, the output has the wrong sign.
# This holds whatever the scores depend on. For :math:`g = 10^6` we need
# :math:`M \ge \tfrac12 \ln 10^6 = 6.91` nats. The bound is sharp: the scores c and 0 lie within
# :math:`M = c/2` of :math:`c/2`, a shift that the softmax does not see, and reach :math:`e^c`.

print(f"exercise 2: M = {math.log(1e6) / 2:.2f} nats")
single = encode("w1" + "i0" * 20 + "r1")
for c, answer in ((math.log(20.5), "1"), (math.log(19.5), "0")):
    said = text(flip_flop_head(single, c=c)[0][0])[-1]
    print(f"exercise 2: 20 pairs, e^c = {math.exp(c):.1f}: the head says {said}")
    tutorial.check("exercise 2: as expected", float(said != answer), 0)

# %%
# **3. Why only the judged bits?** A model answers all judged bits wrongly and tosses a coin
# elsewhere. What is its error over *all* bits for :math:`p_i = 0.98` and :math:`T = 512`, and how
# far is that from a perfect model's?

# %%
# **Solution 3.** Of the 256 pairs the first is a write, the last a read, and each of the others a
# read with probability 0.01: the share of reads is :math:`\rho = (254 \cdot 0.01 + 1) / 256`. On
# the other bits half of the guesses are wrong. The worst model has the error
# :math:`\tfrac12 (1 - \rho) + \rho`, a perfect one :math:`\tfrac12 (1 - \rho)`: the whole
# difference between always and never is :math:`\rho`, little more than one percent.

pairs = 256
reads = (0.01 * (pairs - 2) + 1) / pairs
bad, best = 0.5 * (1 - reads) + reads, 0.5 * (1 - reads)
print(f"exercise 3: error over all bits {bad:.4f} for the worst, {best:.4f} for the best")
tutorial.check("exercise 3: the difference is the share of reads", bad - best - reads, 1e-15)
counted = flip_flop_generate(np.random.default_rng(8), T=512, p_i=0.98, B=200).judged[:, 1::2]
print(f"exercise 3: share of reads {reads:.4f}, counted in 200 sequences {counted.mean():.4f}")

# %%
tutorial.finish(figure)
