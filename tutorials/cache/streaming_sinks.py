r"""
Attention sinks and endless streams
===================================

**The question.** A language model that talks all day must forget: each token adds a key and a value
to its cache, and each new token must look at all of them. Keeping only the last :math:`L`
tokens seems the obvious way. Yet as soon as the *first* token of the text falls out of this window,
models collapse, although that token is often no more than a mark for "here it begins". Why, and
what does it take to go on for ever?

**The idea.** Keep the first few tokens as well. Not because of what they say, but because the
weights of a softmax must sum to one: a head that has nothing to look for puts its weight on a token
that everybody can see and whose value does no harm, and learns this in training. Take this token
away, and its weight goes to tokens that do matter.

You need to know softmax attention (``scores/dot_product``).
"""

# %%
# Definition
# ----------
# With :math:`n` tokens seen, :math:`s` sinks, a window of :math:`L` tokens and :math:`C = s + L`,
# slot :math:`i` of the cache holds the token :math:`k_n(i)`:
#
# .. math::
#
#    k_n(i) = i + [\, i \ge s \,] \max(n - C, 0), \qquad i < \min(n, C)       &(1)\\
#    z_{ti} = c\, R(\min(n, C) - 1)\, q_t \cdot R(i)\, k_{k_n(i)}             &(2)\\
#    o_t = \textstyle\sum_i p_{ti}\, v_{k_n(i)}, \qquad p = \text{softmax}(z) &(3)
#
# (1) The first :math:`s` slots never change. The others hold the last :math:`L` tokens: the number
# of dropped tokens, :math:`n - C`, is added to the slot. (2) :math:`R(i)` is the positional
# encoding, and it sees the *slot*, not the place in the text. So the largest place is :math:`C -
# 1` for ever, however long the stream.

import math

import numpy as np

import attention_ref
from attention_ref.kit.tutorial import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, Tutorial

tutorial = Tutorial(__file__)
spec = attention_ref.get("cache/streaming_sinks")
dense = attention_ref.get("scores/dot_product")
EPS = np.finfo(np.float64).eps

# %%
# An example by hand
# ------------------
# Two sinks and a window of three, so :math:`C = 5`. After nine tokens, :math:`n - C = 4` were
# dropped: slots 0 and 1 hold tokens 0 and 1, slots 2, 3, 4 hold tokens :math:`2 + 4,\ 3 + 4,\ 4 +
# 4`. The newest token, 8, sits in slot 4, so its query is encoded with place 4. Here is the whole
# trace, one row a step; -1 is an empty slot.

trace = spec.select(np.arange(1, 10), sinks=2, window=3)
for n, row in enumerate(trace, start=1):
    print(f"after {n} tokens:", row.tolist())
by_hand = np.array([0, 1, 6, 7, 8])
tutorial.check("after nine tokens", np.max(np.abs(trace[-1] - by_hand)), 0)

# %%
# The same in words of a program: append the token; when there are more than :math:`C`, drop the
# oldest one that is no sink. Nothing that was dropped ever returns, so keys and values can be
# thrown away.

cache, worst = [], 0
for n in range(1, 200):
    cache.append(n - 1)
    if len(cache) > 5:
        del cache[2]
    kept = spec.select(np.array([n]), sinks=2, window=3)[0]
    worst = max(worst, np.max(np.abs(kept[: len(cache)] - cache)), len(cache) - 5)
tutorial.check("the rule (1) and the program keep the same, 200 steps", worst, 0)

# %%
# What is lost when a sink is dropped
# -----------------------------------
# Write a row of softmax weights before and after a key with weight :math:`p_0` is taken away. The
# sum of exponentials falls from :math:`Z` to :math:`Z (1 - p_0)`, so every other weight grows:
#
# .. math:: p_s \;\to\; \frac{p_s}{1 - p_0} .                                             \tag{4}
#
# Let the dropped value be :math:`v_0 = 0`, as for a token that is only a resting place. Then
# :math:`o = \sum_{s>0} p_s v_s` keeps its direction and is multiplied by :math:`1/(1 - p_0)`: a
# head that rested with :math:`p_0 = 0.9` now shouts ten times as loud. In general
#
# .. math:: o' - o = \frac{p_0}{1 - p_0}\, (o - v_0) .                                    \tag{5}
#
# *Derivation:* :math:`o' = (o - p_0 v_0)/(1 - p_0)`; subtract :math:`o`. So dropping a key costs
# nothing when it has little weight, and everything when it has nearly all of it. Which tokens are
# *far away* does not matter, only which are *heavy*.

rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal(shape) for shape in ((1, 8), (20, 8), (20, 3)))
o, row = dense.forward(q, k, v)
less, _ = dense.forward(q, k[1:], v[1:])
p_0 = row.p[0, 0]
right = p_0 / (1 - p_0) * (o - v[0])
tutorial.check("equation (5)", np.max(np.abs(less - o - right)), 8 * EPS)

# %%
# Keep-all is dense attention
# ---------------------------

q, k, v = (rng.standard_normal(shape) for shape in ((2, 40, 8), (2, 40, 8), (2, 40, 3)))
out, _ = dense.forward(q, k, v, causal=True)
for sinks, window in ((4, 36), (0, 40), (4, 1020)):
    kept = spec.attend(q, k, v, sinks=sinks, window=window).out
    tutorial.check(f"sinks {sinks}, window {window}", np.max(np.abs(kept - out)), 16 * EPS)

# %%
# The claim
# ---------
# A trained head that rests looks like this: it reads what is near, and the more it finds there the
# more it says; what it does not spend goes to the first tokens. We build one. The content scores
# are :math:`N(0, 1)`. They fall off linearly with the distance, one nat in 16 tokens, and the
# first four tokens share a bonus: together they get :math:`e^5` where a near token gets 1. All
# values are normal, those of the four sinks are zero. Linear decay and bonus are written into a
# few extra channels of :math:`q` and :math:`k`, so that the library's attention runs as it is.
#
# The truth is attention over everything. Compared are policies with the *same* budget of 64: a
# window of 64; four sinks and a window of 60; and one or two sinks, with the rest as window.

N, BUDGET, DECAY, BONUS = 512, 64, 1 / 16, 5.0
tutorial.claim(
    spec.claim,
    criterion="on each of three seeds, with the relative error |o' - o| / |o| averaged over the "
    "stated tokens: (a) the plain window is exact before token 0 leaves and above 1 on the 60 "
    "tokens from 70 on; (b) 4 sinks stay below 0.2 over all tokens from 64 on; (c) their error "
    "over the last 100 of 512 tokens is at most twice that over tokens 64 to 163. All three: "
    "reproduced; (a) and one other: partly",
)


def head(rng, D=16):
    """Queries, keys, values of a local head with four sinks."""
    place = np.arange(N, dtype=float)
    sink = place < 4
    # score of a sink: content + DECAY * t + BONUS - ln 4; of another token: content + DECAY * s
    ones, here = np.ones((N, 1)), DECAY * place[:, None]
    near = np.where(sink, BONUS - math.log(4), DECAY * place)[:, None]
    q = np.hstack([rng.standard_normal((N, D)), ones, here])
    k = np.hstack([rng.standard_normal((N, D)) / math.sqrt(D), near, 1.0 * sink[:, None]])
    return q, k, rng.standard_normal((N, 8)) * ~sink[:, None]


def relative(out, truth):
    """Relative error of each token's output."""
    return np.linalg.norm(out - truth, axis=-1) / np.linalg.norm(truth, axis=-1)


# %%
# The experiment
# --------------

POLICIES = {"window": (0, 64), "1 sink": (1, 63), "2 sinks": (2, 62), "4 sinks": (4, 60)}
records, held, curves = [], [], {}
for seed in range(3):
    rng = np.random.default_rng(seed)
    q, k, v = head(rng)
    truth, row = dense.forward(q, k, v, causal=True, scale=1.0)
    error = {
        name: relative(spec.attend(q, k, v, sinks=s, window=w, scale=1.0).out[4:], truth[4:])
        for name, (s, w) in POLICIES.items()
    }
    error = {name: np.concatenate([np.zeros(4), e]) for name, e in error.items()}
    curves[seed] = error
    late, early = np.mean(error["4 sinks"][-100:]), np.mean(error["4 sinks"][64:164])
    records.append(
        {f"{name}, tokens 70 to 129": np.mean(e[70:130]) for name, e in error.items()}
        | {"4 sinks, tokens 64 to 163": early, "4 sinks, last 100 tokens": late}
    )
    held.append(
        (
            np.max(error["window"][:64]) < 1e-12 and np.mean(error["window"][70:130]) > 1,
            np.mean(error["4 sinks"][64:]) < 0.2,
            late <= 2 * early,
        )
    )
a, b, c = np.all(held, axis=0)
verdict = "reproduced" if a and b and c else "partly" if a and (b or c) else "not reproduced"
tutorial.measured(ours=records, verdict=verdict, tolerance=0.1)
weight = np.sum(row.p[:, :4], axis=1)
print(f"weight on the four sinks: {weight[63]:.2f} at token 63, {weight[-1]:.2f} at the end")

# %%
# Every sink that is dropped hurts, because here all four carry a quarter of the weight. That is by
# construction; the paper found the same in models that were trained without a token of their own
# for this purpose, and that one sink is enough for a model trained with such a token.
#
# Places in the cache, not in the text
# ------------------------------------
# Rotary encoding turns each pair of channels by an angle proportional to the place, so the score
# of a query for the sink depends on their distance. In training this distance is never more than
# :math:`C - 1`. With places of the *text* it grows without bound and the score goes anywhere. With
# places in the cache it stops growing. A single pair of channels shows it; its frequency is such
# that distances up to :math:`C` turn it by at most a quarter.

FREQUENCY = 0.5 * math.pi / BUDGET


def rotate(x, place):
    """Turn the two channels by the angle FREQUENCY * place."""
    angle = FREQUENCY * place
    a, b = x[..., 0], x[..., 1]
    return np.stack(
        [a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)], axis=-1
    )


tokens = np.arange(N)
kept = spec.select(tokens + 1, sinks=4, window=60)
distance = {
    "places in the text": tokens,
    "places in the cache": np.minimum(tokens, BUDGET - 1),
}
q, k = np.tile([3.0, 0.0], (N, 1)), np.zeros((N, 2))
k[:4] = [2.0, 0.0]
scores = {}
for name, place in distance.items():
    turned = rotate(q, place)
    scores[name] = np.sum(turned * k[0], axis=-1)
    print(f"score of the first sink, {name}: between {scores[name].min():.2f} and 6")
attended = spec.attend(q, k, np.zeros((N, 1)), sinks=4, window=60, rotate=rotate, scale=1.0)
ratio = np.log(attended.p[:, 0] / attended.p[np.arange(N), np.minimum(tokens, BUDGET - 1)])
found = ratio[4:] - scores["places in the cache"][4:]  # the newest key is zero: its score is 0
tutorial.check("the library's score of the first sink", np.max(np.abs(found)), 64 * EPS)

# %%
# The figure
# ----------
# Left: what the cache holds, one row a step of the example with budget 5. Middle: the error of each
# policy along the stream, mean of three seeds and of 8 neighbours; the line marks the moment when
# token 0 leaves the window of 64. Right: the score of the first sink under rotary encoding.

figure = None
if not tutorial.quick:
    plt = tutorial.pyplot()
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(11, 3.7), width_ratios=(0.75, 1.3, 1)
    )
    steps = spec.select(np.arange(1, 17), sinks=2, window=3)
    for n, row in enumerate(steps, start=1):
        row = row[row >= 0]
        left.plot(row[row < 2], np.full(np.sum(row < 2), n), "s", color=ORANGE, markersize=7)
        left.plot(row[row >= 2], np.full(np.sum(row >= 2), n), "s", color=BLUE, markersize=7)
    left.invert_yaxis()
    left.set(title="Kept: 2 sinks, window 3", xlabel="token", ylabel="tokens seen")
    colours = (RED, PURPLE, ORANGE, GREEN)
    for name, colour in zip(POLICIES, colours, strict=True):
        mean = np.mean([curves[seed][name] for seed in curves], axis=0)
        smooth = np.convolve(mean, np.ones(8) / 8, mode="valid")
        shown = np.arange(8, N + 1)[smooth > 1e-3]
        middle.plot(shown, smooth[smooth > 1e-3], color=colour, label=name)
    middle.axvline(64, color=GREY, linewidth=1, linestyle="--")
    middle.set_yscale("log")
    middle.set(title="Error against full attention", xlabel="token", xlim=(0, N),
               ylabel="relative error of the output", ylim=(1e-3, 200))  # fmt: skip
    middle.legend(loc="upper right", ncols=2)
    for (name, curve), colour in zip(scores.items(), (RED, GREEN), strict=True):
        right.plot(tokens, curve, color=colour, label=name)
    right.axvline(64, color=GREY, linewidth=1, linestyle="--")
    right.set(title="Score of the first sink", xlabel="token", ylabel="score (nats)", ylim=(-7, 10))
    right.legend(loc="upper right")

# %%
# Exercises
# ---------
# **1. Write this selection yourself.** Return the tokens that (1) keeps after n tokens, ascending,
# without empty slots. It is tried on whole traces of random budgets.


def my_select(n, sinks, window):
    """Return a list of the tokens that are kept after n tokens."""
    # solution: return None
    return [token for token in range(n) if token < sinks or token >= n - window]
    # end of solution


fresh, answer, expected = np.random.default_rng(7), {}, {}
for _ in range(4):
    sinks, window, last = (int(n) for n in fresh.integers((0, 1, 15), (5, 9, 40)))
    case = f"sinks {sinks}, window {window}, up to {last} tokens"
    rows = [my_select(n, sinks, window) for n in range(1, last + 1)]
    told = None if rows[0] is None else np.concatenate([[len(row), *row] for row in rows])
    trace = spec.select(np.arange(1, last + 1), sinks=sinks, window=window)
    kept = [row[row >= 0] for row in trace]
    answer[case], expected[case] = told, np.concatenate([[len(row), *row] for row in kept])
tutorial.exercise(1, answer, expected)

# %%
# **2. A sink that needs no token.** Add 1 to the sum of exponentials, :math:`p_s = e^{z_s} / (1 +
# \sum e^{z})`. Show that this is softmax attention with one more key whose score and value are 0,
# and that (5) still says what the loss of the first token costs. Why is it now cheap for a head
# that rests, if the first token was only a resting place? (The row ``normalizers/sink`` makes the 1
# a learned number.)

# %%
# **Solution 2.** A key of zeros has the score 0 with every query, so its exponential is 1: it adds
# 1 to the denominator, and with the value 0 nothing to the sum of values. So this is softmax
# attention over one more key, and the derivation of (5) holds as it stands. A head that has nothing
# to look for now lets all its scores fall, and the weight goes to the key of zeros, which never
# leaves. The first token has a weight :math:`p_0` near 0 like all others, and so is the factor
# :math:`p_0 / (1 - p_0)`.

rng = np.random.default_rng(2)
q, k, v = (rng.standard_normal(shape) for shape in ((3, 4), (6, 4), (6, 2)))
e = np.exp(q @ k.T)
off_by_one = e @ v / (1 + e.sum(axis=1, keepdims=True))
longer, _ = dense.forward(q, np.vstack([k, np.zeros(4)]), np.vstack([v, np.zeros(2)]), scale=1.0)
tutorial.check("exercise 2: a key of zeros", np.max(np.abs(longer - off_by_one)), 16 * EPS)
for level in (0, -6):
    e = np.exp(q @ k.T + level)
    total = 1 + e.sum(axis=1, keepdims=True)
    before, p_0 = e @ v / total, e[:, :1] / total
    after = e[:, 1:] @ v[1:] / (total - e[:, :1])
    error = np.max(np.abs(after - before - p_0 / (1 - p_0) * (before - v[0])))
    print(f"exercise 2: level {level}: losing token 0 costs {np.max(np.abs(after - before)):.4f}")
    tutorial.check("exercise 2: equation (5)", error, 16 * EPS)

# %%
# **3. What it cannot do.** A fact stands at token 100, the question comes at token 400, the budget
# is 64. Which weight can the fact get? So for what kind of work is a stream with sinks enough, and
# for what is it not?

# %%
# **Solution 3.** None: with 4 sinks and a window of 60, token 100 is kept until 160 tokens have
# been seen, and what has left the cache never returns, in no head and no layer. Something of it can
# travel in the states of later tokens, at most 59 places a layer, if a token on the way happens to
# take it along (compare ``patterns/sliding_window``). So the stream is enough where the next word
# follows from the last page, as in talk or in fluent text, for ever; it is not enough to look
# something up, or to sum up a text that is longer than the cache.

held = [n for n in range(101, 402) if 100 in spec.select(np.array([n]), sinks=4, window=60)]
print(f"exercise 3: token 100 is kept until {held[-1]} tokens have been seen")
tutorial.check("exercise 3: so says (1)", abs(held[-1] - 160), 0)

# %%
tutorial.finish(figure)
