r"""
Multi-token attention: scores that look at their neighbours
===========================================================

**The question.** A score says how well *one* query fits *one* key. Now you look for the sentence in
which "rabbit" and "garden" occur together. One query can find rabbits, another gardens, but who
finds the place where both are? Softmax attention needs a second layer for that.

**The idea.** Golovneva et al. treat the map of scores as a picture, queries down and keys across,
and run a small convolution over it before the softmax. A weight then depends on the scores of
neighbouring keys *and* of the queries just before: two words of the question, several words of the
text, combined where they stand together.

You need to know softmax attention (``scores/dot_product``).
"""

# %%
# Definition
# ----------
# Let hidden pairs (t, s) have the score 0. With a kernel :math:`\theta` of A queries and B keys, B
# odd,
#
# .. math::
#
#    z_{ts} &= c\, q_t \cdot k_s \quad\text{where t may see s, else 0}                  &(1)\\
#    y_{ts} &= \textstyle\sum_{a=0}^{A-1} \sum_{b=0}^{B-1}
#              \theta_{A-1-a,\,b}\; z_{t-a,\,s+b-\lfloor B/2 \rfloor}                   &(2)\\
#    p_{ts} &= e^{y_{ts}} / \textstyle\sum_{s'} e^{y_{ts'}} \quad\text{where t may see s}   &(4)\\
#    o_t    &= \textstyle\sum_s p_{ts}\, v_s                                            &(7)
#
# The numbers of the equations are those of the method's file. It has three further steps, each of
# which may be left out: a mixing of heads before the softmax (3), a second convolution after it
# (5), a mixing of heads at the end (6).
#
# Two masks do different work. *Zero before* the convolution: a score that t may not see must not
# enter the sum of one that it may. *Minus infinity after* it: a hidden place has received a number
# from its neighbours, and must get no weight all the same.

import math

import numpy as np

import attention_ref
from attention_ref import nn
from attention_ref.kit.tutorial import BLUE, GREY, ORANGE, Tutorial
from attention_ref.methods.scores.multi_token import identity_kernel
from attention_ref.nn.model import cross_entropy

tutorial = Tutorial(__file__)
spec = attention_ref.get("scores/multi_token")
softmax = attention_ref.get("scores/dot_product")
EPS = np.finfo(np.float64).eps

# %%
# An example by hand
# ------------------
# The text is "a b x", and the question "a", "b". Each letter has the key :math:`\ln 2` in a place
# of its own, each query asks for its letter. The kernel adds to a score that of the query before
# and the key before:
#
# .. math::
#
#    q = \begin{pmatrix} 1 & 0 \\ 0 & 1 \end{pmatrix}, \quad
#    k = \ln 2 \begin{pmatrix} 1 & 0 \\ 0 & 1 \\ 0 & 0 \end{pmatrix}, \quad
#    v = \begin{pmatrix} 0 \\ 6 \\ 12 \end{pmatrix}, \quad
#    \theta = \begin{pmatrix} 1 & 0 & 0 \\ 0 & 1 & 0 \end{pmatrix}, \quad c = 1 .
#
# .. math::
#
#    z = \ln 2 \begin{pmatrix} 1 & 0 & 0 \\ 0 & 1 & 0 \end{pmatrix}, \qquad
#    y = \ln 2 \begin{pmatrix} 1 & 0 & 0 \\ 0 & 2 & 0 \end{pmatrix}, \qquad
#    p = \begin{pmatrix} \tfrac12 & \tfrac14 & \tfrac14 \\ \tfrac16 & \tfrac23 & \tfrac16
#        \end{pmatrix} .
#
# The second query has found "b *after a*": its score has doubled. The outputs are
# :math:`\tfrac{6 + 12}{4} = 4.5` and :math:`4 + 2 = 6`.

LN2 = math.log(2.0)
q, k = np.eye(2), LN2 * np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
v, theta = np.array([[0.0], [6.0], [12.0]]), np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])


def convolve(z, theta):
    """Step (2), one window at a time."""
    A, B = theta.shape
    padded = np.pad(z, ((A - 1, 0), (B // 2, B // 2)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (A, B))
    return np.einsum("tsab,ab->ts", windows, theta)


z = q @ k.T  # (1)
y = convolve(z, theta)  # (2)
p = np.exp(y)
p = p / np.sum(p, axis=1, keepdims=True)  # (4)
out = p @ v  # (7)
print("weights", p.round(4).tolist(), "outputs", out.ravel().round(4).tolist())
tutorial.check("outputs are 4.5 and 6", np.max(np.abs(out.ravel() - [4.5, 6])), 16 * EPS)
library, cache = spec.forward(q, k, v, theta, scale=1.0)
tutorial.check("the library says the same", np.max(np.abs(library - out)), 16 * EPS)

# %%
# The backward, line by line
# --------------------------
# **(7'), (4')** As in softmax attention: :math:`dv = p^\top do`, :math:`dp = do\, v^\top`,
# :math:`dy_{ts} = p_{ts} (dp_{ts} - \sum_j p_{tj} dp_{tj})`.
#
# **(2')** Each y is a sum of products of one entry of the kernel with one score, so each gradient
# is a sum of products with the *other* factor. For the kernel: how do dy and the shifted picture
# of z agree?
#
# .. math::
#
#    d\theta_{A-1-a,\,b} = \textstyle\sum_{ts} dy_{ts}\; z_{t-a,\,s+b-\lfloor B/2 \rfloor} .
#
# For the scores: which y has read :math:`z_{ts}`? Those with queries t to t + A - 1, *after* t:
#
# .. math::
#
#    dz_{ts} = \textstyle\sum_{a,b} \theta_{A-1-a,\,b}\; dy_{t+a,\,s-b+\lfloor B/2 \rfloor} ,
#
# the same convolution with the kernel turned by 180 degrees, the zeros now below the last query.
#
# **(1')** :math:`dz` is set to zero where t may not see s; then :math:`dq = c\, dz\, k` and
# :math:`dk = c\, dz^\top q`.


def backward(dout, q, k, v, z, theta, p, c):
    """Steps (7') to (1') for one head, without masks."""
    A, B = theta.shape
    T, S = z.shape
    dp, dv = dout @ v.T, p.T @ dout  # (7')
    dy = p * (dp - np.sum(p * dp, axis=1, keepdims=True))  # (4')
    padded = np.pad(z, ((A - 1, 0), (B // 2, B // 2)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (T, S))
    dtheta = np.einsum("abts,ts->ab", windows, dy)  # (2')
    dz = np.flip(convolve(np.flip(dy), theta))  # turning the picture turns the kernel
    return {"q": c * dz @ k, "k": c * dz.T @ q, "v": dv, "theta": dtheta}  # (1')


# %%
# The example backwards, for :math:`L = o_1 + o_2`. The rows of :math:`dy` are
# :math:`p_1 (v - 4.5) = (-2.25, 0.375, 1.875)` and :math:`p_2 (v - 6) = (-1, 0, 1)`. The score of
# the first query for key s receives its own :math:`dy_{1s}` and, through the kernel,
# :math:`dy_{2,s+1}`: :math:`dz_1 = (-2.25, 1.375, 1.875)`.

ours = backward(np.ones((2, 1)), q, k, v, z, theta, p, 1.0)
theirs = spec.backward(np.ones((2, 1)), cache)
board = {
    "q": LN2 * np.array([[-2.25, 1.375], [-1, 0]]), "k": [[-2.25, -1], [1.375, 0], [1.875, 1]],
    "v": [[2 / 3], [11 / 12], [5 / 12]], "theta": LN2 * np.array([[0, -1, 0], [1.375, -2.25, -1]]),
}  # fmt: skip
for name, expected in board.items():
    tutorial.check(f"d{name}, by hand", np.max(np.abs(ours[name] - expected)), 64 * EPS)
    tutorial.check(f"d{name}, library", np.max(np.abs(theirs[name] - expected)), 64 * EPS)

# %%
# In general four roads must lead to the same gradient. A causal case with a mixing of heads, and
# one with all that comes after the softmax, under a mask of its own for each head.

cases = spec.example(np.random.default_rng(3))
tutorial.gradients(spec, cases["causal"])
tutorial.gradients(spec, cases["mask"])

# %%
# Experiment: find the block
# --------------------------
# The paper's toy task: a text of blocks of five letters, then two letters, and the answer is the
# block that holds both. Ours differs in one thing, so that a single step of attention can answer:
# each block ends in a name of its own, and the name is the answer. Five blocks, 26 letters, eight
# names; no other block holds both letters.
#
# One layer: queries for the two letters at the end, keys and values for each symbol of the text,
# four heads that are added up, no positions. Once with softmax; once with a kernel of 2 queries and
# 11 keys a head, which begins as the identity, that is as softmax. To be fair to softmax, which
# needs a second layer for this, also a whole transformer of two layers (``nn.Model``) with learned
# positions, for as many steps.
#
# A guess among the five names of the text errs four times in five. The paper's models have four
# layers and 100,000 steps: softmax errs in 51.6 % (mean of 77.7, 75.3 and 1.9), multi-token
# attention in 0.1 %. Sizes and thresholds were found on other seeds.

tutorial.claim(
    "Told to find the block of letters that holds two given letters, a small model with "
    "multi-token attention errs less after the same training than one with softmax attention.",
    criterion="share of wrong answers on unseen texts, on each of three seeds: at most 0.05 with "
    "one layer of multi-token attention, at least 0.5 with one layer of softmax and with a "
    "transformer of two",
    paper=0.001,
)

BLOCKS, LENGTH, LETTERS, KINDS = 5, 5, 26, 8
SYMBOLS, WIDTH, HEADS, KEYS = LETTERS + KINDS + 1, 16, 4, 2 * LENGTH + 1


def texts(rng, count):
    """Symbols (count, 33): blocks with their names, a bar, two letters; the name, (count,)."""
    letters = np.argsort(rng.random((count, BLOCKS, LETTERS)), axis=-1)[..., :LENGTH]
    right, rows = rng.integers(BLOCKS, size=count), np.arange(count)
    pair = rng.permuted(letters[rows, right], axis=1)[:, :2]
    while True:
        both = np.all(np.any(letters[..., None] == pair[:, None, None, :], axis=2), axis=-1)
        both[rows, right] = False
        if not np.any(both):
            break
        letters[both] = np.argsort(rng.random((np.sum(both), LETTERS)), axis=-1)[:, :LENGTH]
    names = LETTERS + np.argsort(rng.random((count, KINDS)), axis=-1)[:, :BLOCKS]
    body = np.reshape(np.concatenate([letters, names[..., None]], axis=-1), (count, -1))
    bar = np.full((count, 1), SYMBOLS - 1)
    return np.concatenate([body, bar, pair], axis=1), names[rows, right]


def attend(parameters, symbols):
    """One layer, (count, SYMBOLS) logits and the cache."""
    text, pair = symbols[:, :-3], symbols[:, -2:]
    q, k, v = (
        np.swapaxes(parameters[name][:, rows], 0, 1)
        for name, rows in (("q", pair), ("k", text), ("v", text))
    )
    if "theta" in parameters:
        out, cache = spec.forward(q, k, v, parameters["theta"], scale=1.0)
    else:
        out, cache = softmax.forward(q, k, v, scale=1.0)
    return np.sum(out[:, :, -1], axis=1), cache


def one_layer(rng, multi_token):
    """Parameters and logits of a single layer."""
    start = {
        "q": rng.standard_normal((HEADS, SYMBOLS, WIDTH)) / math.sqrt(WIDTH),
        "k": rng.standard_normal((HEADS, SYMBOLS, WIDTH)) / math.sqrt(WIDTH),
        "v": rng.standard_normal((HEADS, SYMBOLS, SYMBOLS)) / 10,
    }
    if multi_token:
        start["theta"] = np.tile(identity_kernel(2, KEYS), (HEADS, 1, 1))
    return start, lambda parameters, symbols: attend(parameters, symbols)[0]


def two_layers(rng):
    """Parameters and logits of a small transformer with softmax attention."""
    length = BLOCKS * (LENGTH + 1) + 3
    model = nn.Model(SYMBOLS, length, width=32, heads=2, layers=2)
    return model.initial(rng), lambda parameters, symbols: model.logits(parameters, symbols)[:, -1]


def experiment(name, seed, steps):
    """Train; share of wrong answers, the losses, and the parameters."""
    rng = np.random.default_rng(seed)
    start, logits = two_layers(rng) if name == TWO else one_layer(rng, name == MULTI)

    def draw():
        while True:
            yield texts(rng, 32)

    def loss(parameters, symbols, answer):
        return cross_entropy(logits(parameters, symbols), answer)

    rate = 5e-3 if name == TWO else 3e-2
    parameters, losses = nn.train(loss, start, draw(), steps=steps, rate=rate, progress=False)
    symbols, answer = texts(np.random.default_rng(seed + 100), 20 if tutorial.quick else 1000)
    wrong = np.mean(np.argmax(logits(parameters, symbols), axis=-1) != answer)
    return float(wrong), losses, parameters


ONE, TWO, MULTI = "softmax, 1 layer", "softmax, 2 layers", "multi-token, 1 layer"
steps = 2 if tutorial.quick else 400
found = {name: [experiment(name, seed, steps) for seed in range(3)] for name in (ONE, TWO, MULTI)}
records = [{name: runs[seed][0] for name, runs in found.items()} for seed in range(3)]
whole = all(r[MULTI] <= 0.05 and min(r[ONE], r[TWO]) >= 0.5 for r in records)
ratio = max(r[MULTI] / min(r[ONE], r[TWO]) for r in records)
print(f"errors of multi-token attention over those of the better rival: at most {ratio:.2f}")
verdict = "reproduced" if whole else "not reproduced"
tutorial.measured(ours=records, verdict=verdict, tolerance=0.5)

# %%
# What the seeds show
# -------------------
# The kernels show how it is done (figure, middle). What was a single 1 now has five companions of
# about equal size, on the keys *before* the key in question, for both queries. At the name of a
# block such a head adds up how well the block's letters fit the first letter asked for, and how
# well they fit the second. (Blue is negative: in this head equal letters have a score far *below*
# that of different ones, and minus times minus is a fit. Other heads have found it with two plus
# signs.) On one seed the errors do not vanish, and half as many steps again did not change that:
# it misses the threshold, so the verdict is *not reproduced*, although multi-token attention errs
# far less than softmax on every seed, as the line above the table says.
#
# One layer of softmax cannot do this at all: the key of a name knows nothing of the letters before
# it. Two layers can; they had too few steps to find it. So what is shown is that the kernel makes
# the right solution *near*, as in the paper, where softmax with four layers gets there on one seed
# of three. It is not shown that softmax would not get there, and the kernel's shape, which spans a
# block, suits the task.
#
# The figure
# ----------
# Left: training loss, three seeds each. Middle: the kernel of one head on seed 0 after training,
# the head with the largest sum of absolute values away from the middle. Right: wrong answers.

figure = None
if not tutorial.quick:
    plt = tutorial.pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), width_ratios=(1, 1.2, 0.85))
    for (name, runs), colour in zip(found.items(), (GREY, ORANGE, BLUE), strict=True):
        for seed, (_, losses, _) in enumerate(runs):
            smooth = np.convolve(losses, np.ones(20) / 20, mode="valid")
            axes[0].plot(np.arange(len(smooth)) + 20, smooth, color=colour, linewidth=1.2,
                         label=name if seed == 0 else None)  # fmt: skip
    axes[0].axhline(math.log(BLOCKS), color="black", linestyle="--", linewidth=1)
    axes[0].text(400, math.log(BLOCKS) - 0.2, "guess among the five", ha="right", fontsize=8)
    axes[0].set(title="Training loss", xlabel="step", ylabel="nats", ylim=(0, 4))
    axes[0].legend(loc="upper right", fontsize=8)
    kernels = found[MULTI][0][2]["theta"]
    away = np.sum(np.abs(kernels), axis=(1, 2)) - np.sum(np.abs(kernels[:, :, LENGTH]), axis=1)
    kernel = kernels[np.argmax(away)]
    top = np.max(np.abs(kernel))
    image = axes[1].imshow(kernel, cmap="RdBu_r", vmin=-top, vmax=top, aspect="auto")
    axes[1].grid(False)
    axes[1].set_xticks(range(0, KEYS, 2), [f"{b - LENGTH:+d}" for b in range(0, KEYS, 2)])
    axes[1].set_yticks((0, 1), ("before", "last"))
    axes[1].set(title="One kernel after training", xlabel="key, relative to the weighed one",
                ylabel="query")  # fmt: skip
    figure.colorbar(image, ax=axes[1], shrink=0.8)
    for i, (runs, colour) in enumerate(zip(found.values(), (GREY, ORANGE, BLUE), strict=True)):
        errors = [wrong for wrong, _, _ in runs]
        axes[2].bar(i, np.mean(errors), width=0.6, color=colour)
        axes[2].plot(i + np.array([-0.12, 0, 0.12]), errors, "o", color="black", markersize=4)
    axes[2].set_xticks(range(3), [name.replace(", ", "\n") for name in found], fontsize=8)
    axes[2].set(title="Wrong answers", ylabel="share", ylim=(0, 1))
    axes[2].grid(False, axis="x")

# %%
# Exercises
# ---------
# **1. Write this backward yourself.** Given ``dy`` (T, S), the scores ``z`` (T, S) and the kernel
# ``theta`` (A, B), return ``dz`` (T, S) and ``dtheta`` (A, B). No masks.


def my_backward(dy, z, theta):
    """Return dz, dtheta."""
    # solution: return None, None
    (T, S), (A, B) = z.shape, theta.shape
    dz, dtheta = np.zeros_like(z), np.zeros_like(theta)
    for t, s, a, b in np.ndindex(T, S, A, B):
        i, j = t - a, s + b - B // 2
        if i >= 0 and 0 <= j < S:
            dz[i, j] += theta[A - 1 - a, b] * dy[t, s]
            dtheta[A - 1 - a, b] += z[i, j] * dy[t, s]
    return dz, dtheta
    # end of solution


fresh = np.random.default_rng(11)
q7, k7, v7 = fresh.standard_normal((5, 3)), np.eye(6)[:, :3], fresh.standard_normal((6, 2))
theta7, dout = fresh.standard_normal((3, 5)), fresh.standard_normal((5, 2))
_, cache = spec.forward(q7, k7, v7, theta7, scale=1.0)
dp = dout @ v7.T
dy = cache.soft * (dp - np.sum(cache.soft * dp, axis=-1, keepdims=True))
dz, dtheta = my_backward(dy, cache.z, theta7)
expected = spec.backward(dout, cache)  # the keys are unit vectors: dq is the left half of dz
answer = {"dq": None if dz is None else dz[:, :3], "theta": dtheta}
tutorial.exercise(1, answer, {"dq": expected["q"], "theta": expected["theta"]})

# %%
# **2. Why two masks?** Leave out the first one: convolve *all* scores, and hide the future after
# it only. Find a kernel with which the output of a query changes when a key behind it does. Why
# can the *first* query not show it?

# %%
# **Solution 2.** Any kernel with an entry right of the middle: counted from 0, :math:`y_{tt}` then
# reads :math:`z_{t,t+1}`. Row 0 sees one key alone, whose weight is 1 in any case: its output
# cannot change, only its log-sum-exp does. From row 1 on the outputs change too.

rng = np.random.default_rng(5)
q5, k5, v5 = rng.standard_normal((4, 3)), rng.standard_normal((4, 3)), rng.standard_normal((4, 2))
ahead = np.array([[0.0, 1.0, 1.0]])
future = k5 + np.array([[0.0], [0.0], [0.0], [1.0]])
hidden = np.where(np.tri(4) > 0, 0.0, -np.inf)


def with_one_mask(k):
    """Softmax attention over scores that were convolved without the first mask."""
    y = convolve(q5 @ k.T, ahead) + hidden
    p = np.exp(y - np.max(y, axis=1, keepdims=True))
    return p / np.sum(p, axis=1, keepdims=True) @ v5


leak = np.max(np.abs(with_one_mask(future) - with_one_mask(k5))[2])
print(f"exercise 2: with one mask the third row moves by {leak:.2f} when the fourth key does")
assert leak > 1e-3
both = [spec.forward(q5, k, v5, ahead, causal=True)[0][:3] for k in (k5, future)]
tutorial.check("exercise 2: with two masks it does not", np.max(np.abs(both[0] - both[1])), 0.0)

# %%
# **3. What comes after?** In "x y a b z a" the last token would like to know what followed the
# first "a". Softmax attention needs two layers for this (an *induction head*). Which kernel of one
# query and three keys does it in one?

# %%
# **Solution 3.** A 1 left of the middle, :math:`\theta = (1, 0, 0)`: the score of a key is that of
# the key before it. The last token asks for "a", and the weight falls on what comes after an "a".

letters = np.eye(5)[[0, 1, 2, 3, 4, 2]]
out, cache = spec.forward(letters, letters, letters, np.array([[1.0, 0.0, 0.0]]), scale=20.0,
                          causal=True)  # fmt: skip
print("exercise 3: weights of the last token", (cache.p[-1].round(3) + 0.0).tolist())
tutorial.check("exercise 3: it reads what followed", np.max(np.abs(out[-1] - letters[3])), 1e-7)

# %%
tutorial.finish(figure)
