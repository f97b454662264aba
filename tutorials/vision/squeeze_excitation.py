r"""
Squeeze and excitation
======================

**The question.** A convolution gives every feature, edges, colours, textures, its own channel and
treats all channels alike in every image. But which features count may depend on the image: in a
photograph taken at night colours mean little. How can a network turn its own channels up and down
while it looks?

**The idea.** Summarise the image, one number a channel (*squeeze*); let a small network decide from
this summary how much each channel counts (*excite*); multiply.

You need to know the chain rule.
"""

# %%
# Definition
# ----------
# An image has :math:`C` channels on a grid of :math:`X \times Y` places:
#
# .. math::
#
#    m_c &= \tfrac{1}{XY} \textstyle\sum_{xy} x_{cxy}                       &(1)\\
#    z   &= W_2\, \mathrm{relu}(W_1 m + b_1) + b_2
#        \quad\text{or}\quad z_c = \textstyle\sum_j w_j\, m_{c + j - K//2}   &(2)\\
#    g   &= 1 / (1 + e^{-z})                                                &(3)\\
#    o_{cxy} &= g_c\, x_{cxy}                                               &(4)
#
# (1) squeezes. (2) is the small network, in two variants. "se" has one hidden layer of only
# :math:`C/r` units, 16 times fewer than channels in the paper, which costs :math:`2 C^2 / r`
# weights. "eca" finds that too many: every gate looks at the :math:`K` channels around it, with
# one and the same kernel, :math:`K` weights in all. (3) makes gates between 0 and 1, and (4)
# applies them, one gate for a whole channel. Compare with softmax attention: these weights do not
# compete, all of them may be 1.

import math

import numpy as np

import attention_ref
from attention_ref import nn
from attention_ref.kit.tutorial import BLUE, GREEN, GREY, ORANGE, Tutorial

tutorial = Tutorial(__file__)
spec = attention_ref.get("vision/squeeze_excitation")
EPS = np.finfo(np.float64).eps

# %%
# An example by hand
# ------------------
# Two channels with two pixels each, one hidden unit, :math:`b_2 = 0`:
#
# .. math::
#
#    x_1 = (0, 2), \quad x_2 = (3, 3), \qquad
#    W_1 = (-1, 1), \quad b_1 = -1, \qquad
#    W_2 = \begin{pmatrix} \ln 3 \\ 0 \end{pmatrix}.
#
# The means are :math:`m = (1, 3)`. The hidden unit sees :math:`-1 + 3 - 1 = 1`, so
# :math:`z = (\ln 3, 0)` and the gates are :math:`g = (\tfrac34, \tfrac12)`. The output is
# :math:`(0, 1.5)` and :math:`(1.5, 1.5)`.

x = np.array([[[0.0, 2.0]], [[3.0, 3.0]]])
parts = np.array([[-1.0, 1.0]]), np.array([-1.0]), np.array([[math.log(3)], [0.0]]), np.zeros(2)
out, cache = spec.forward(x, *parts)
print("gates", cache.gate.round(4).tolist(), "outputs", out[:, 0].round(4).tolist())
tutorial.check("the gates are 3/4 and 1/2", np.max(np.abs(cache.gate - [0.75, 0.5])), 4 * EPS)
by_hand = np.array([[[0.0, 1.5]], [[1.5, 1.5]]])
tutorial.check("the outputs are those above", np.max(np.abs(out - by_hand)), 8 * EPS)

# %%
# Forward and backward, line by line
# ----------------------------------
# For one image; :math:`do` is given.
#
# **(4')** :math:`o_{cxy} = g_c x_{cxy}`: the gate of a channel is used at all its places, so
# :math:`dg_c = \sum_{xy} do_{cxy}\, x_{cxy}`, and :math:`x` gets a first part
# :math:`g_c\, do_{cxy}`.
#
# **(3')** The slope of the logistic is :math:`g (1 - g)`, so :math:`dz = dg\, g\, (1 - g)`. A
# gate that is quite open or quite closed hardly learns any more.
#
# **(2')** For "se", write :math:`h = W_1 m + b_1` and :math:`a = \mathrm{relu}(h)`. Two linear
# maps, with a relu in between that lets through where :math:`h > 0`:
#
# .. math::
#
#    dW_2 = dz\, a^\top, \quad db_2 = dz, \quad da = W_2^\top dz, \quad
#    dh = da \cdot [h > 0], \quad dW_1 = dh\, m^\top, \quad db_1 = dh, \quad dm = W_1^\top dh .
#
# For "eca", :math:`z_c = \sum_j w_j\, m_{c + j - K//2}`. The weight :math:`w_j` is used by all
# channels, :math:`dw_j = \sum_c dz_c\, m_{c + j - K//2}`; the mean of channel :math:`i` is used
# by the channels :math:`c = i - j + K//2`, so :math:`dm_i = \sum_j w_j\, dz_{i - j + K//2}`: the
# same sum with the kernel turned round.
#
# **(1')** Every place has the share :math:`1/(XY)` in the mean:
#
# .. math::
#
#    dx_{cxy} = g_c\, do_{cxy} + \frac{dm_c}{XY} .
#
# The first part says what the place does for its own output, the second what it does for all gates.


def excite(x, W1, b1, W2, b2):
    """Steps (1) to (4), for one image."""
    m = x.mean(axis=(1, 2))  # (1)
    a = np.maximum(W1 @ m + b1, 0)
    z = W2 @ a + b2  # (2)
    g = 1 / (1 + np.exp(-z))  # (3)
    return g[:, None, None] * x, (m, a, g)  # (4)


def excite_backward(do, x, W1, W2, m, a, g):
    """Steps (4') to (1')."""
    dg = np.sum(do * x, axis=(1, 2))  # (4')
    dz = dg * g * (1 - g)  # (3')
    dh = (W2.T @ dz) * (a > 0)  # (2')
    dm = W1.T @ dh
    dx = g[:, None, None] * do + dm[:, None, None] / x[0].size  # (1')
    return {"x": dx, "W1": np.outer(dh, m), "b1": dh, "W2": np.outer(dz, a), "b2": dz}


rng = np.random.default_rng(0)
C, M, X, Y = 6, 3, 4, 5
x, W1, b1 = rng.standard_normal((C, X, Y)), rng.standard_normal((M, C)), rng.standard_normal(M)
W2, b2 = rng.standard_normal((C, M)), rng.standard_normal(C)
out, (m, a, g) = excite(x, W1, b1, W2, b2)
library, cache = spec.forward(x, W1, b1, W2, b2)
tutorial.check("forward against the library", np.max(np.abs(out - library)), 16 * EPS)
do = rng.standard_normal(x.shape)
ours, theirs = excite_backward(do, x, W1, W2, m, a, g), spec.backward(do, cache)
for name in ours:
    error = np.max(np.abs(ours[name] - theirs[name]))
    tutorial.check(f"d{name} from the board against the library", error, 64 * EPS)

# %%
# Four roads to the same gradient, for both variants: by hand, tape, complex step, differences.

tutorial.gradients(spec, {"x": x, "W1": W1, "b1": b1, "W2": W2, "b2": b2})
tutorial.gradients(spec, {"x": x, "w": rng.standard_normal(3), "variant": "eca"})

# %%
# Experiment: a context that says whom to believe
# -----------------------------------------------
# Images with 64 channels on a grid of :math:`4 \times 4`, all noise, except for five channels.
# Channels 10 and 11 hold the number :math:`A = \pm 1`, channels 40 and 41 the number :math:`B =
# \pm 1`, channel 60 the context: +1 at day, -1 at night. By day the class is :math:`A`, by night
# it is :math:`B`. The classifier behind the gates is linear: it weighs the means of the gated
# channels and takes the sign.
#
# Where :math:`A = B` everybody is right. Where they *conflict*, a linear classifier cannot know:
# the class is :math:`A` or :math:`B` with even odds, and the context, added with any weight,
# favours +1 or -1 and not one of the two. Without gates, we expect 50 % on conflicting images. An
# *oracle* that is given the right gates (the other pair of channels closed) shows what is
# possible. "eca" with :math:`K = 3` sees only the neighbours of a channel, so it cannot see the
# context from there.

tutorial.claim(
    "Where a context channel says which channels matter, gates from the channel means "
    "reach the accuracy of an oracle, and without gates the class cannot be told.",
    criterion="accuracy on 4000 new images where A and B conflict, each of three seeds: the oracle "
    "above 95 %, se (r = 16) at most 3 points below the oracle, no gates within 5 points of 50 %",
)

CHANNELS, HIDDEN = 64, 4


def images(rng, number, conflict=False):
    """Images, classes +-1, and the gates of an oracle."""
    a, b, day = rng.choice((-1.0, 1.0), (3, number))
    b = np.where(conflict, -a, b)
    x = rng.standard_normal((number, CHANNELS, 4, 4))
    for channel, value in ((10, a), (11, a), (40, b), (41, b), (60, day)):
        x[:, channel] += value[:, None, None]
    gates = np.zeros((number, CHANNELS))
    gates[:, 10:12] = (day > 0)[:, None]
    gates[:, 40:42] = (day < 0)[:, None]
    return x, np.where(day > 0, a, b), gates


def gated(kind, parameters, x, gates):
    """The gated image, and the cache of the method where it has one."""
    if kind == "none":
        return x, None
    if kind == "oracle":
        return x * gates[..., None, None], None
    names = ("w",) if kind == "eca" else ("W1", "b1", "W2", "b2")
    return spec.forward(x, **{n: parameters[n] for n in names}, variant=kind)


def learn(kind, seed, steps):
    """Train gates and a linear classifier with Adam; returns parameters and the losses."""
    rng = np.random.default_rng(seed)
    p = {"read": np.zeros(CHANNELS)}
    if kind == "se":
        W1, W2 = 0.3 * rng.standard_normal((2, HIDDEN, CHANNELS))
        p |= {"W1": W1, "b1": np.zeros(HIDDEN), "W2": W2.T, "b2": np.zeros(CHANNELS)}
    elif kind == "eca":
        p |= {"w": 0.3 * rng.standard_normal(3)}
    state, losses = None, []
    for _ in range(steps):
        x, y, gates = images(rng, 128)
        out, cache = gated(kind, p, x, gates)
        mean = out.mean(axis=(2, 3))
        margin = y * (mean @ p["read"])
        losses.append(np.mean(np.log1p(np.exp(-margin))))
        slope = -y / (1 + np.exp(margin)) / len(y)
        d = {"read": mean.T @ slope}
        if cache is not None:
            dout = np.broadcast_to((slope[:, None] * p["read"])[..., None, None] / 16, out.shape)
            d |= {n: g for n, g in spec.backward(dout, cache).items() if n != "x"}
        p, state = nn.adamw(p, d, state, rate=0.02)
    return p, losses


KINDS = ("oracle", "se", "eca", "none")
steps = 20 if tutorial.quick else 400
records, histories, last = [], {}, None
for seed in range(3):
    test, answers, gates = images(np.random.default_rng(100 + seed), 4000, conflict=True)
    record = {}
    for kind in KINDS:
        p, losses = learn(kind, seed, steps)
        out, cache = gated(kind, p, test, gates)
        record[kind] = float(np.mean(np.sign(out.mean(axis=(2, 3)) @ p["read"]) == answers))
        histories[kind, seed] = losses
        if kind == "se" and seed == 0:
            last = (cache.gate, test[:, 60].mean(axis=(1, 2)) > 0)
    records.append(record)
table = {kind: np.array([record[kind] for record in records]) for kind in KINDS}
held = (
    np.all(table["oracle"] > 0.95)
    and np.all(table["se"] > table["oracle"] - 0.03)
    and np.all(np.abs(table["none"] - 0.5) < 0.05)
)
verdict = "reproduced" if held else "not reproduced"
tutorial.measured(ours=records, verdict=verdict, tolerance=0.03)

# %%
# How did "se" do it? Look at its gates, by day and by night. Nobody told it which channels hold
# the numbers. It does not close those of the wrong number, it turns them down, to about one half:
# that is what a gate says whose hidden units are all off, :math:`z = 0`, and it is enough for the
# other number to win the vote.

signal = [10, 11, 40, 41]
gate, day = last
print("channel          " + "".join(f"{c:7}" for c in signal))
print("mean gate, day   " + "".join(f"{x:7.2f}" for x in gate[day][:, signal].mean(axis=0)))
print("mean gate, night " + "".join(f"{x:7.2f}" for x in gate[~day][:, signal].mean(axis=0)))
print(f"weights of the gates: se {2 * CHANNELS * HIDDEN + CHANNELS + HIDDEN}, eca 3")

# %%
# The figure
# ----------
# Left: the training loss. Without gates, and with "eca", it stays just above half of
# :math:`\ln 2` (dashed): the half of the images with :math:`A = B` is solved, the other half a coin
# toss. Middle: accuracy on conflicting images. Right: the gates that "se" has learned, one point a
# channel.

figure = None
if not tutorial.quick:
    plt = tutorial.pyplot()
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.6), width_ratios=(1.2, 0.8, 1))
    colours = dict(zip(KINDS, (GREY, BLUE, ORANGE, GREEN), strict=True))
    names = {"oracle": "oracle", "se": "se", "eca": "eca, K = 3", "none": "no gates"}
    for kind in KINDS:
        mean = np.mean([histories[kind, seed] for seed in range(3)], axis=0)
        smooth = np.convolve(mean, np.ones(10) / 10, mode="valid")
        panels[0].plot(smooth[::4], color=colours[kind], label=names[kind])
    panels[0].set_xticks(np.arange(0, 101, 25), [str(4 * t) for t in range(0, 101, 25)])
    panels[0].axhline(math.log(2) / 2, color=GREY, linestyle="--", linewidth=1)
    panels[0].set(title="Training", xlabel="step", ylabel="loss (nats)", ylim=(0, 0.75))
    panels[0].legend(ncols=2)
    for i, kind in enumerate(KINDS):
        panels[1].bar(i, table[kind].mean(), color=colours[kind], width=0.65)
        panels[1].plot([i] * 3, table[kind], "o", color="black", markersize=3)
    panels[1].axhline(0.5, color="black", linestyle="--", linewidth=1)
    panels[1].set_xticks(range(4), ("oracle", "se", "eca", "none"))
    panels[1].set(title="When A and B conflict", ylabel="accuracy", ylim=(0, 1.05))
    by_day, by_night = gate[day].mean(axis=0), gate[~day].mean(axis=0)
    rest = np.setdiff1d(np.arange(CHANNELS), signal)
    panels[2].plot([0, 1], [0, 1], color=GREY, linewidth=1)
    panels[2].plot(by_day[rest], by_night[rest], "o", color=GREY, alpha=0.4, label="noise, context")
    panels[2].plot(by_day[[10, 11]], by_night[[10, 11]], "o", color=BLUE, label="A")
    panels[2].plot(by_day[[40, 41]], by_night[[40, 41]], "o", color=ORANGE, label="B")
    panels[2].set(title="Gates of se, one seed", xlabel="mean gate by day",
                  ylabel="mean gate by night", xlim=(-0.05, 1.05), ylim=(-0.05, 1.2))  # fmt: skip
    panels[2].set_yticks(np.arange(6) / 5)
    panels[2].legend(loc="upper center", ncols=3, fontsize=8, columnspacing=0.8, handletextpad=0.1)

# %%
# Exercises
# ---------
# **1. Write this backward yourself**, for "eca": :math:`m` are the means, :math:`z_c = \sum_j w_j\,
# m_{c + j - K//2}` with an odd number :math:`K` of weights and zeros beyond the ends. Given
# :math:`dz`, return :math:`dw` and :math:`dm`; the library's :math:`dw` and :math:`dx` are
# compared. (Both sums are correlations or convolutions.)


def my_backward(dz, m, w):
    """Return dw, shape (K,), and dm, shape (C,)."""
    # solution: return None, None
    half = len(w) // 2
    dw = np.correlate(np.pad(m, half), dz, "valid")
    return dw, np.convolve(dz, w)[half : half + len(m)]
    # end of solution


fresh = np.random.default_rng(7)
image, kernel = fresh.standard_normal((7, 2, 3)), fresh.standard_normal(5)
up = fresh.standard_normal(image.shape)
_, cache = spec.forward(image, w=kernel, variant="eca")
right, gates = spec.backward(up, cache), cache.gate
dz = np.sum(up * image, axis=(1, 2)) * gates * (1 - gates)
dw, dm = my_backward(dz, image.mean(axis=(1, 2)), kernel)
dx = None if dm is None else gates[:, None, None] * up + dm[:, None, None] / 6
tutorial.exercise(1, {"w": dw, "x": dx}, right)

# %%
# **2. One is a case of the other.** Find :math:`W_1` and :math:`W_2` with which "se" does what
# "eca" does with a given kernel. (Hint: :math:`\mathrm{relu}(y) - \mathrm{relu}(-y) = y`. How
# many hidden units do you need?)

# %%
# **Solution 2.** "eca" multiplies the means by a matrix B with the kernel along its diagonals,
# :math:`B_{c,\, c + j - K//2} = w_j`. With :math:`W_1` made of B and below it -B,
# :math:`W_2 = (I, -I)` and no biases, :math:`z = \mathrm{relu}(Bm) - \mathrm{relu}(-Bm) = Bm`. That
# is :math:`2C` units, and :math:`4 C^2` weights in place of K. If B is invertible, fewer do not
# suffice for all images: where a unit has its kink, another must have the opposite one, so units
# come in pairs, and each pair gives one dimension of :math:`Bm`.

w = np.array([0.5, -1.0, 2.0])
band = w[0] * np.eye(6, k=-1) + w[1] * np.eye(6) + w[2] * np.eye(6, k=1)
one, _ = spec.forward(x, w=w, variant="eca")
two, _ = spec.forward(x, np.concatenate([band, -band]), W2=np.hstack([np.eye(6), -np.eye(6)]))
tutorial.check("exercise 2: the same output", np.max(np.abs(one - two)), 16 * EPS)

# %%
# **3. Order matters, or not.** Permute the channels, and the weights of "se" with them: the
# output is permuted. Why is there no such thing for "eca"? Permute the places of the image
# instead: what happens to the gates of both?

# %%
# **Solution 3.** Every channel has a column of :math:`W_1`, a row of :math:`W_2` and an entry of
# :math:`b_2` of its own; permute these with the channels, and the hidden units see the same
# numbers. The kernel of "eca" belongs to no channel. It says what a neighbour counts, and a
# permutation makes other neighbours; only turning round channels and kernel together does no harm.
# The places enter by their mean alone: both gates stay what they are.

draw = np.random.default_rng(1)
order, places = draw.permutation(C), draw.permutation(X * Y)
here, _ = spec.forward(x, W1, b1, W2, b2)
there, _ = spec.forward(x[order], W1[:, order], b1, W2[order], b2[order])
tutorial.check("exercise 3: se, permuted channels", np.max(np.abs(here[order] - there)), 16 * EPS)
kernel3 = np.array([0.5, -1.0, 2.0])
here, before = spec.forward(x, w=kernel3, variant="eca")
there, _ = spec.forward(x[order], w=kernel3, variant="eca")
print(f"exercise 3: eca, permuted channels: off by {np.max(np.abs(here[order] - there)):.2f}")
there, _ = spec.forward(x[::-1], w=kernel3[::-1].copy(), variant="eca")
tutorial.check("exercise 3: eca, all turned round", np.max(np.abs(here[::-1] - there)), 16 * EPS)
moved = x.reshape(C, 1, -1)[..., places]
_, after = spec.forward(moved, w=kernel3, variant="eca")
gap = np.max(np.abs(before.gate - after.gate))
tutorial.check("exercise 3: eca, gates of permuted places", gap, 16 * EPS)
one, two = (spec.forward(picture, W1, b1, W2, b2)[1].gate for picture in (x, moved))
tutorial.check("exercise 3: se, gates of permuted places", np.max(np.abs(one - two)), 16 * EPS)

# %%
tutorial.finish(figure)
