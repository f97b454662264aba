r"""
Scaled dot-product attention
============================

**The question.** A sequence is a table: one row of numbers for each position. At every position
we want to collect something from the other positions, but *which* of them matter depends on
what stands there. A fixed matrix cannot know that. How can the content itself decide who
listens to whom, and how can this decision be learned by gradient descent?

**The idea.** Every position asks a question (its *query*), offers a label (its *key*) and
carries a content (its *value*). A query is compared with all keys; where they point in the same
direction, the value of that position is taken with a large weight.

You need to know what a product of matrices is, and the chain rule. Nothing about attention is
assumed. All code below is plain NumPy; the library is used to check it.
"""

# %%
# Definition
# ----------
# There are :math:`T` queries :math:`q_t \in \mathbb{R}^D`, and :math:`S` keys
# :math:`k_s \in \mathbb{R}^D` with values :math:`v_s \in \mathbb{R}^E`. The output for query
# :math:`t` is a weighted mean of the values:
#
# .. math::
#
#    z_{ts} &= c\, q_t \cdot k_s                                      &(1)\\
#    z_{ts} &\leftarrow \kappa \tanh(z_{ts} / \kappa)                 &(2)\\
#    z_{ts} &\leftarrow z_{ts} + b_{ts}                               &(3)\\
#    p_{ts} &= e^{z_{ts}} / \textstyle\sum_{s'} e^{z_{ts'}}           &(4)\\
#    o_t    &= \textstyle\sum_s p_{ts}\, v_s                          &(5)
#
# Step (1) measures how well query and key agree; the *scale* is :math:`c = 1/\sqrt{D}` unless
# we say otherwise, and experiment A will show why. (2) and (3) are optional: a *softcap*
# :math:`\kappa` that bounds the scores, and a *bias* :math:`b` that knows something about the
# pair :math:`(t, s)` beyond its content, its distance for example. (4), the *softmax*, makes
# positive weights that sum to one. (5) mixes. A *mask* says which keys a query may see; a
# hidden key takes no part in the sums.

import math

import numpy as np

import attention_ref
from attention_ref import nn
from attention_ref.kit.tutorial import BLUE, GREEN, GREY, ORANGE, RED, Tutorial

tutorial = Tutorial(__file__)
spec = attention_ref.get("scores/dot_product")
EPS = np.finfo(np.float64).eps

# %%
# An example by hand
# ------------------
# Two queries, three keys, values with a single channel. To keep the numbers round we take
# :math:`c = 1` and keys made of logarithms, because the softmax will exponentiate them:
#
# .. math::
#
#    q = \begin{pmatrix} 1 & 0 \\ 0 & 1 \end{pmatrix}, \qquad
#    k = \begin{pmatrix} 0 & \ln 3 \\ \ln 2 & 0 \\ 0 & 0 \end{pmatrix}, \qquad
#    v = \begin{pmatrix} 4 \\ 8 \\ 0 \end{pmatrix}.
#
# The first query reads off the first column of the keys: its scores are :math:`(0, \ln 2, 0)`.
# Their exponentials are :math:`(1, 2, 1)`, with sum 4, so the weights are
# :math:`(\tfrac14, \tfrac12, \tfrac14)` and the output is :math:`1 + 4 + 0 = 5`. The second
# query has the scores :math:`(\ln 3, 0, 0)`, exponentials :math:`(3, 1, 1)`, weights
# :math:`(\tfrac35, \tfrac15, \tfrac15)` and output :math:`\tfrac{12}{5} + \tfrac85 = 4`.

q = np.array([[1.0, 0.0], [0.0, 1.0]])
k = np.array([[0.0, math.log(3)], [math.log(2), 0.0], [0.0, 0.0]])
v = np.array([[4.0], [8.0], [0.0]])

z = q @ k.T  # (1), c = 1
e = np.exp(z)
p = e / e.sum(axis=1, keepdims=True)  # (4)
out = p @ v  # (5)
print("weights", p.round(4).tolist())
print("outputs", out.round(4).ravel().tolist())

by_hand = np.array([[1 / 4, 1 / 2, 1 / 4], [3 / 5, 1 / 5, 1 / 5]])
tutorial.check("the weights are those worked out above", np.max(np.abs(p - by_hand)), 4 * EPS)
tutorial.check("the outputs are 5 and 4", np.max(np.abs(out.ravel() - [5, 4])), 32 * EPS)
library, cache = spec.forward(q, k, v, scale=1.0)
tutorial.check("the library says the same", np.max(np.abs(library - out)), 32 * EPS)

# %%
# The forward
# -----------
# Now in general, one line for each step. Two remarks before we write it down.
#
# *Softmax without overflow.* Adding a constant to all scores of a row multiplies numerator and
# denominator of (4) by the same factor, so it changes nothing. We use this freedom to subtract
# the largest score: then every exponent is at most zero and :math:`e^{z}` cannot overflow.
#
# *Masks.* A hidden key gets the score :math:`-\infty`, and :math:`e^{-\infty} = 0` removes it
# from both sums. In a language model the mask is *causal*: position :math:`t` sees only
# :math:`s \le t`, because it must not look at the text that it is to predict.


def attention(q, k, v, c, cap, b, live):
    """Steps (1) to (5) for one sequence; returns the output and what the backward needs."""
    z = c * q @ k.T  # (1)
    z = capped = cap * np.tanh(z / cap)  # (2)
    z = z + b  # (3)
    z = np.where(live, z, -np.inf)
    e = np.exp(z - z.max(axis=1, keepdims=True))
    p = e / e.sum(axis=1, keepdims=True)  # (4)
    return p @ v, p, capped  # (5)


rng = np.random.default_rng(0)
T, S, D, E = 4, 6, 3, 2
q, k, v = rng.standard_normal((T, D)), rng.standard_normal((S, D)), rng.standard_normal((S, E))
b, c, cap = rng.standard_normal((T, S)), 0.7, 1.3
live = np.arange(S) <= np.arange(T)[:, None] + (S - T)  # the last query sees the last key

options = {"scale": c, "softcap": cap, "bias": b, "causal": True}
out, p, capped = attention(q, k, v, c, cap, b, live)
library, cache = spec.forward(q, k, v, **options)
tutorial.check("forward against the library", np.max(np.abs(out - library)), 8 * EPS)
tutorial.check("every row of weights sums to one", np.max(np.abs(p.sum(axis=1) - 1)), 4 * EPS)

# %%
# The backward, line by line
# --------------------------
# Training asks: how does a number :math:`L` (the loss) that is computed from the outputs change
# when the inputs change? Write :math:`dx` for the table of all :math:`\partial L / \partial x`.
# Somebody hands us :math:`do`; we want :math:`dq, dk, dv` and :math:`db`. The plan never
# changes: **read the forward from the bottom up**, and for each line ask what its inputs have
# to do with its output.
#
# **(5')** The last line is :math:`o_{te} = \sum_s p_{ts} v_{se}`. The value :math:`v_{se}`
# appears in the output of every query :math:`t`, each time with the factor :math:`p_{ts}`. The
# chain rule adds up all these ways to the loss:
#
# .. math::
#
#    dv_{se} = \sum_t p_{ts}\, do_{te}, \qquad\text{that is}\qquad dv = p^\top do .
#
# The weight :math:`p_{ts}` appears in :math:`o_{te}` for all :math:`e`, with the factor
# :math:`v_{se}`:
#
# .. math::
#
#    dp_{ts} = \sum_e do_{te}\, v_{se}, \qquad\text{that is}\qquad dp = do\, v^\top .
#
# **(4')** One row at a time; drop the index :math:`t`. Let :math:`Z = \sum_r e^{z_r}`, so
# :math:`p_s = e^{z_s}/Z`. By the quotient rule, with :math:`\delta_{sr} = 1` if :math:`s = r`
# and 0 otherwise,
#
# .. math::
#
#    \frac{\partial p_s}{\partial z_r}
#      = \frac{\delta_{sr}\, e^{z_s}\, Z - e^{z_s} e^{z_r}}{Z^2}
#      = p_s\,(\delta_{sr} - p_r).
#
# This is the *softmax Jacobian* :math:`J = \mathrm{diag}(p) - p\,p^\top`. Raising one score
# raises its own weight and lowers all others. The chain rule sums over the :math:`s` that
# :math:`z_r` reaches:
#
# .. math::
#
#    dz_r = \sum_s dp_s\, p_s (\delta_{sr} - p_r)
#         = p_r \Bigl( dp_r - \sum_s p_s\, dp_s \Bigr).
#
# In words: raising a score raises :math:`L` when its weight counts for more than the average
# does. A hidden key has :math:`p_r = 0`, so its :math:`dz_r` is zero: nothing flows through a
# mask. And the average is something that we know already:
# :math:`\sum_s p_s\, dp_s = \sum_s p_s \sum_e do_e\, v_{se} = \sum_e do_e\, o_e`.
#
# **(3')** The bias is just added, so :math:`db = dz`, and :math:`dz` passes on unchanged.
#
# **(2')** :math:`y = \kappa \tanh(z/\kappa)` has the slope
# :math:`1 - \tanh^2(z/\kappa) = 1 - (y/\kappa)^2`: multiply :math:`dz` by it.
#
# **(1')** The first line is :math:`z_{ts} = c \sum_d q_{td} k_{sd}`. The query :math:`q_{td}`
# appears in the scores with all keys, the key :math:`k_{sd}` in the scores with all queries:
#
# .. math::
#
#    dq = c\; dz\; k, \qquad dk = c\; dz^\top q .


def attention_backward(dout, q, k, v, c, cap, p, capped):
    """Steps (5') to (1')."""
    dv = p.T @ dout  # (5')
    dp = dout @ v.T
    dz = p * (dp - (p * dp).sum(axis=1, keepdims=True))  # (4')
    db = dz  # (3')
    dz = dz * (1 - (capped / cap) ** 2)  # (2')
    dq = c * dz @ k  # (1')
    dk = c * dz.T @ q
    return {"q": dq, "k": dk, "v": dv, "bias": db}


dout = rng.standard_normal((T, E))
ours = attention_backward(dout, q, k, v, c, cap, p, capped)
theirs = spec.backward(dout, cache)
for name in ours:
    error = np.max(np.abs(ours[name] - theirs[name]))
    tutorial.check(f"d{name} from the board against the library", error, 32 * EPS)
average = np.max(np.abs(np.sum(p * (dout @ v.T), axis=1) - np.sum(dout * out, axis=1)))
tutorial.check("the average is do . o", average, 16 * EPS)

# %%
# The example by hand, backwards
# ------------------------------
# Two queries, three keys, as above, and let :math:`L = o_1 + o_2`, so :math:`do = (1, 1)^\top`.
# Step (5') gives
# :math:`dv = (\tfrac14 + \tfrac35,\ \tfrac12 + \tfrac15,\ \tfrac14 + \tfrac15)`, which is
# :math:`(0.85,\ 0.7,\ 0.45)`, and :math:`dp = (4, 8, 0)` in both rows. The averages are the
# outputs, 5 and 4. Step (4') gives
#
# .. math::
#
#    dz = \begin{pmatrix}
#      \tfrac14 (4-5) & \tfrac12 (8-5) & \tfrac14 (0-5) \\
#      \tfrac35 (4-4) & \tfrac15 (8-4) & \tfrac15 (0-4)
#    \end{pmatrix}
#    = \begin{pmatrix} -\tfrac14 & \tfrac32 & -\tfrac54 \\ 0 & \tfrac45 & -\tfrac45 \end{pmatrix}.
#
# Both rows sum to zero, as they must: adding a constant to a row of scores changes nothing. The
# keys read their gradient from the columns, because :math:`dk = dz^\top q` and :math:`q` is the
# unit matrix.

small = {
    "q": np.eye(2),
    "k": np.array([[0.0, math.log(3)], [math.log(2), 0.0], [0.0, 0.0]]),
    "v": np.array([[4.0], [8.0], [0.0]]),
}
_, cache = spec.forward(**small, scale=1.0)
gradient = spec.backward(np.ones((2, 1)), cache)
board = {
    "v": np.array([[0.85], [0.7], [0.45]]),
    "k": np.array([[-1 / 4, 0], [3 / 2, 4 / 5], [-5 / 4, -4 / 5]]),
    "q": np.array([[1.5 * math.log(2), -0.25 * math.log(3)], [0.8 * math.log(2), 0]]),
}
for name, expected in board.items():
    error = np.max(np.abs(gradient[name] - expected))
    tutorial.check(f"d{name} of the example", error, 32 * EPS)

# %%
# Four roads to the same gradient
# -------------------------------
# A derivation can be wrong in a way that looks right. So the library computes every gradient by
# four roads that share nothing: the backward **by hand**; a **tape** that records each NumPy
# operation of the forward and plays it backwards; the **complex step**, which evaluates the
# forward at :math:`x + ih` with a tiny :math:`h` and reads the derivative off the imaginary
# part, without any subtraction; and plain **differences** of the forward (of fourth order). The
# table holds the largest deviation from the gradient by hand, relative to its largest entry.
# The first two columns should be near the rounding error :math:`2 \cdot 10^{-16}`, the last one
# below :math:`10^{-9}`.

tutorial.gradients(spec, {"q": q, "k": k, "v": v} | options)

# %%
# Experiment A: why divide by :math:`\sqrt{D}`?
# ---------------------------------------------
# Let the entries of :math:`q` and :math:`k` be independent with mean 0 and variance 1. Then
# :math:`q \cdot k` is a sum of :math:`D` such products: its mean is 0 and its variance
# :math:`D`. With growing :math:`D` the scores spread out, the softmax turns into "winner takes
# all", and a winner that has all the weight does not react to small changes. The size of the
# Jacobian says how much gradient still gets through. Its trace is
#
# .. math::
#
#    \operatorname{tr} J = \sum_s p_s (1 - p_s) = 1 - \sum_s p_s^2 ,
#
# which is 0 for a single winner and :math:`1 - 1/S` for equal weights. With
# :math:`c = 1/\sqrt{D}` the variance of the scores is 1 for every :math:`D`. What should we
# see? For normal scores of variance 1,
#
# .. math::
#
#    \sum_s p_s^2 \approx \frac{1}{S}\, \frac{E[e^{2z}]}{E[e^z]^2}
#      = \frac{1}{S}\, \frac{e^2}{e} = \frac{e}{S},
#
# so with :math:`S = 64` the trace should stay near :math:`1 - e/64 = 0.958`.

tutorial.claim(
    "Without the scale 1/sqrt(D) the trace of the softmax Jacobian falls as D grows; "
    "with it, it stays where it was.",
    criterion="for S = 64 and standard normal q and k, on each of three seeds: without scale the "
    "trace at D = 1024 is below a quarter of that at D = 16; with scale the traces at D = 16, 64, "
    "256, 1024 lie within 0.02 of 1 - e/64",
)

WIDTHS = (16, 64, 256, 1024)


def trace(rng, D, scale, S=64, T=1000):
    """Mean of 1 - sum p^2 over T random queries."""
    q, k = rng.standard_normal((T, D)), rng.standard_normal((S, D))
    _, cache = spec.forward(q, k, np.zeros((S, 1)), scale=scale)
    return float(np.mean(1 - np.sum(cache.p**2, axis=-1)))


raw, scaled, records = [], [], []
for seed in range(3):
    rng = np.random.default_rng(seed)
    raw.append([trace(rng, D, 1.0) for D in WIDTHS])
    scaled.append([trace(rng, D, D**-0.5) for D in WIDTHS])
    records.append(
        {f"without, D={D}": x for D, x in zip(WIDTHS, raw[-1], strict=True)}
        | {f"with, D={D}": x for D, x in zip(WIDTHS, scaled[-1], strict=True)}
    )
raw, scaled = np.array(raw), np.array(scaled)
held = np.all(raw[:, -1] < raw[:, 0] / 4) and np.all(np.abs(scaled - (1 - math.e / 64)) < 0.02)
tutorial.measured(ours=records, verdict="reproduced" if held else "not reproduced", tolerance=0.05)

# %%
# Experiment B: attention learns English
# --------------------------------------
# Now let attention learn something. The text is the help that comes with Python itself, about
# 400,000 characters. A small transformer reads 64 characters and guesses each next one. Its two
# layers have four heads each: every head has matrices of its own that turn a position into
# query, key and value, and its attention is the forward from above, under a causal mask.
#
# The loss is the mean of :math:`-\ln(\text{probability given to the right character})`, in
# nats. Two lines tell whether attention does anything. A model that ignores the context cannot
# get below the *unigram entropy*, the entropy of a single character. A model that looks at the
# last character only cannot get below the *bigram entropy*. Whoever does better must collect
# information from further away. The gradient comes from the tape; a progress bar is shown when
# this runs in a terminal.

text = nn.english()
seen, held_out = text.split(0.9)
unigram, bigram = text.entropy(1), text.entropy(2)
print(f"text: {len(text.ids)} characters, {len(text.alphabet)} different ones")
print(f"its sha256 begins with {text.sha256[:16]}; it differs between Python versions")
print(f"unigram entropy {unigram:.2f} nats, bigram entropy {bigram:.2f} nats")

model = nn.Model(vocabulary=len(text.alphabet), context=64, width=64, heads=4, layers=2)
steps = 3 if tutorial.quick else 500
rng = np.random.default_rng(0)
parameters = model.initial(rng)
print(f"parameters: {sum(x.size for x in parameters.values())}")

parameters, losses = nn.train(
    model.loss, parameters, nn.batches(rng, seen, size=16, context=64), steps=steps, rate=6e-3,
    label="characters",
)  # fmt: skip


def test_loss(windows=200):
    """Loss on windows of the text that training never saw."""
    tokens, targets = next(nn.batches(np.random.default_rng(1), held_out, size=windows, context=64))
    return float(model.loss(parameters, tokens, targets))


if not tutorial.quick:
    unseen = test_loss()
    print(f"loss before training {losses[0]:.2f}, after {steps} steps {np.mean(losses[-20:]):.2f}")
    print(f"loss on text never seen {unseen:.2f}")
    assert unseen < bigram < unigram, "it should have learned more than pairs of characters"
    start = text.encode("The value of the ")
    sample = model.sample(parameters, start, 120, np.random.default_rng(3), 0.5)
    print(f"the model writes: {text.decode(sample)}")

# %%
# The words are invented, but their shapes are English: after a few seconds of training it has
# learned spaces, endings and common words. Let us look at *what* the heads attend to, in a
# sentence that they have never seen. Each row is a position, its weights over the past sum to
# one.

sentence = "Dictionaries preserve insertion order."
maps = model.maps(parameters, text.encode(sentence)).reshape(-1, len(sentence), len(sentence))
tutorial.check("no head looks ahead", np.max(np.triu(maps, 1)), 0.0)

# %%
# To choose which heads to show, describe each by three numbers: the mean distance to what it
# attends to, in characters; the weight of its favourite key; and the weight that the positions
# after the first space give to spaces. A head that spread its weight evenly would give them
# about 0.1. Spaces are where words begin, so a head that finds them knows where it is within a
# word. We show the head that looks nearest, two in between, and the one with most weight on
# spaces.

positions = np.arange(len(sentence))
space = np.array([character == " " for character in sentence])
distance = np.mean(np.sum(maps * (positions[:, None] - positions), axis=-1), axis=-1)
favourite = np.mean(np.max(maps, axis=-1), axis=-1)
on_spaces = np.mean(np.sum(maps[:, np.argmax(space) :, space], axis=-1), axis=-1)
if not tutorial.quick:
    print("layer head  mean distance  largest weight  on spaces")
    for i in range(len(maps)):
        print(f"{i // 4 + 1:5} {i % 4 + 1:4} {distance[i]:14.1f} {favourite[i]:15.2f}"
              f" {on_spaces[i]:10.2f}")  # fmt: skip
order = [head for head in np.argsort(distance) if head != np.argmax(on_spaces)]
shown = [order[0], order[2], order[5], np.argmax(on_spaces)]

# %%
# The figure
# ----------
# Top left: the loss falls below both lines, so the model uses more than one character of
# context. Top right: without the scale the softmax saturates as the width grows; with it,
# nothing happens. Below: what four heads attend to, one row a position of the sentence. The
# heads of the first layer mostly look at the last few characters; those of the second use what
# the first has gathered and look further back.

figure = None
if not tutorial.quick:
    plt = tutorial.pyplot()
    figure = plt.figure(figsize=(11, 6.9))
    grid = figure.add_gridspec(2, 1, height_ratios=(1, 1.02))
    top = grid[0].subgridspec(1, 2, width_ratios=(1.35, 1), wspace=0.12)

    axes = figure.add_subplot(top[0])
    smooth = np.convolve(losses, np.ones(15) / 15, mode="valid")
    axes.plot(range(0, steps, 2), losses[::2], color=BLUE, alpha=0.25, linewidth=0.8)
    axes.plot(np.arange(len(smooth))[::4] + 7, smooth[::4], color=BLUE, label="training loss")
    axes.plot([steps], [unseen], "o", color=RED, clip_on=False, label="text never seen")
    for height, name in ((unigram, "unigram entropy"), (bigram, "bigram entropy")):
        axes.axhline(height, color=GREY, linestyle="--", linewidth=1)
        axes.text(steps, height + 0.04, name, ha="right", va="bottom", color=GREY, fontsize=9)
    axes.set(title="A small transformer learns English characters", xlabel="training step",
             ylabel="loss (nats a character)", ylim=(1.5, 5), xlim=(0, steps))  # fmt: skip
    axes.legend(loc="upper right")

    axes = figure.add_subplot(top[1])
    axes.axhline(1 - math.e / 64, color=GREY, linestyle="--", linewidth=1)
    axes.text(16, 1 - math.e / 64 - 0.02, r"expected, $1 - e/64$", color=GREY, fontsize=9, va="top")
    for values, colour, label in (
        (scaled, GREEN, r"$c = 1/\sqrt{D}$"),
        (raw, ORANGE, r"$c = 1$"),
    ):
        axes.plot(WIDTHS, values.T, "o", color=colour, alpha=0.6)
        axes.plot(WIDTHS, values.mean(axis=0), color=colour, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(WIDTHS, [str(D) for D in WIDTHS])
    axes.set(title="The scale keeps gradients alive", xlabel="width D of queries and keys",
             ylabel=r"trace of the softmax Jacobian, $1 - \sum p^2$", ylim=(0, 1.05))  # fmt: skip
    axes.legend(loc="center right")

    bottom = grid[1].subgridspec(1, 4, wspace=0.03)
    panels = [figure.add_subplot(place) for place in bottom]
    for axes, head in zip(panels, shown, strict=True):
        image = axes.imshow(maps[head], vmin=0, vmax=1)
        axes.grid(False)
        axes.set_xticks(positions, sentence, fontsize=6)
        axes.set_yticks(positions, sentence if axes is panels[0] else [""] * len(sentence),
                        fontsize=5)  # fmt: skip
        axes.tick_params(length=0, pad=1)
        axes.set_title(f"Layer {head // 4 + 1}, head {head % 4 + 1}", fontsize=10)
        axes.set_xlabel(
            f"key; {distance[head]:.1f} back, {on_spaces[head]:.2f} on spaces", fontsize=9
        )
    panels[0].set_ylabel("query", fontsize=9)
    figure.colorbar(image, ax=panels, label="weight p", shrink=0.75, pad=0.01, aspect=30)

# %%
# Exercises
# ---------
# **1. Write this backward yourself.** Close the derivation above and fill in the function,
# without softcap and bias: the output is ``p @ v``, the scores are ``c * q @ k.T``. Run the
# tutorial again: your three gradients are compared with the library's.


def my_backward(dout, q, k, v, p, c):
    """Return dq, dk, dv."""
    # solution: return None, None, None
    dv = p.T @ dout
    dp = dout @ v.T
    dz = p * (dp - np.sum(p * dp, axis=-1, keepdims=True))
    return c * dz @ k, c * dz.T @ q, dv
    # end of solution


fresh = np.random.default_rng(7)
q7, k7, v7 = (fresh.standard_normal(shape) for shape in ((4, 3), (5, 3), (5, 2)))
dout = fresh.standard_normal((4, 2))
_, cache = spec.forward(q7, k7, v7, scale=0.5)
answer = dict(zip("qkv", my_backward(dout, q7, k7, v7, cache.p, 0.5), strict=True))
tutorial.exercise(1, answer, spec.backward(dout, cache))

# %%
# **2. What the softmax cannot see.** Show with (4') that every row of :math:`dz` sums to zero.
# Then show that, without a softcap, adding one and the same vector to *all* keys changes no
# output, and conclude that the :math:`dk_s` add up to zero. Why must a softcap spoil this?

# %%
# **Solution 2.** In (4') the bracket subtracts from :math:`dp` its mean under :math:`p`, so
# :math:`\sum_s dz_{ts} = \sum_s p_{ts} dp_{ts} - \sum_s p_{ts} \sum_{s'} p_{ts'} dp_{ts'} = 0`. A
# vector :math:`a` on all keys adds :math:`c\, q_t \cdot a` to the whole row of scores, which
# cancels in the softmax; the derivative in that direction, :math:`a \cdot \sum_s dk_s`, is zero
# for every :math:`a`. A softcap bends each score by another amount, so the row no longer moves as
# one.

out, cache = spec.forward(q, k, v)
shifted, _ = spec.forward(q, k + np.array([1.0, -2.0, 0.5]), v)
dk = spec.backward(rng.standard_normal(out.shape), cache)["k"]
tutorial.check("exercise 2: shifted keys, same output", np.max(np.abs(out - shifted)), 64 * EPS)
tutorial.check("exercise 2: the sum of dk over the keys", np.max(np.abs(dk.sum(axis=0))), 64 * EPS)

# %%
# **3. Too much of a good thing.** Replace :math:`c = 1/\sqrt{D}` by :math:`c = 1/D` in
# experiment A. The trace now rises with :math:`D`. Towards which number, and why is a model
# with that scale also hard to train at the beginning? (Hint: what are the weights when all
# scores are nearly equal, and how large is :math:`dq = c\, dz\, k` then?)

# %%
# **Solution 3.** Scores then have the standard deviation :math:`1/\sqrt{D}` and vanish: all
# weights become :math:`1/S` and the trace tends to :math:`1 - 1/S`. The softmax passes gradients
# as well as it can, but :math:`dq = c\, dz\, k` is smaller by :math:`\sqrt{D}`: queries and keys
# learn slowly.

limit = trace(np.random.default_rng(0), 4096, 1 / 4096, T=50)
tutorial.check("exercise 3: distance from 1 - 1/64", abs(limit - (1 - 1 / 64)), 1e-4)

# %%
tutorial.finish(figure)
