r"""
Outlier-driven rescaling: why networks grow one huge number
===========================================================

In large language models a few channels of the residual stream are thousands of times larger than
the others, on nearly every token; and a few tokens take most of the attention of every query. Both
look like accidents of training. This study says that they are tools: a normalisation divides by a
sum, and whoever controls one large term of it controls the size of all the rest. If so, a network
that is given a proper tool, a gate, should have no need of the large numbers.

You need to know softmax attention (``scores/dot_product``); a sink (``normalizers/sink``) helps.
"""

# %%
# Definition
# ----------
# For every token x of C channels:
#
# .. math::
#
#    u &= \lambda \odot x                                                              &(1)\\
#    r &= \sqrt{\tfrac1C \textstyle\sum_c u_c^2 + \varepsilon}, \qquad
#    y  = g \odot u / r                                                                &(2)\\
#    s &= \sigma\bigl(\mathrm{silu}(y W_\downarrow)\, W_\uparrow\bigr), \qquad
#         \mathrm{silu}(h) = h\, \sigma(h)                                             &(3)\\
#    o &= s \odot y                                                                    &(4)
#
# Step (2) alone is RMSNorm. With (1) it is *PreAffine*: a learned :math:`\lambda` makes a channel
# count as large that is not large. With (3) and (4) it is *GatedNorm*: every token decides
# by itself how much of each channel passes, through two matrices of low rank.

import math

import numpy as np

import attention_ref
from attention_ref import core, nn
from attention_ref.kit.tutorial import BLUE, GREEN, ORANGE, Tutorial
from attention_ref.methods.normalizers.outlier_rescaling import residual_factor, sink_factor

tutorial = Tutorial(__file__)
spec = attention_ref.get("normalizers/outlier_rescaling")
EPS = np.finfo(np.float64).eps

# %%
# An example by hand
# ------------------
# .. math::
#
#    x = (1, \tfrac72), \quad \lambda = (1, 2), \quad g = (5, 5), \quad \varepsilon = 0, \quad
#    W_\downarrow = \begin{pmatrix} \ln 3 \\ 0 \end{pmatrix}, \quad
#    W_\uparrow = (\tfrac43, -\tfrac43) .
#
# (1) :math:`u = (1, 7)`. (2) The mean square is :math:`50/2 = 25`, so :math:`r = 5` and
# :math:`y = (1, 7)`. (3) :math:`h = \ln 3`, :math:`\sigma(h) = \tfrac34`, so
# :math:`\mathrm{silu}(h) = \tfrac34 \ln 3` and the gates are :math:`\sigma(\pm \ln 3)`:
# :math:`\tfrac34` and :math:`\tfrac14`. (4) :math:`o = (\tfrac34, \tfrac74)`.

LOG3 = math.log(3)
x, lam, g = np.array([[1.0, 3.5]]), np.array([1.0, 2.0]), np.array([5.0, 5.0])
w_down, w_up = np.array([[LOG3], [0.0]]), np.array([[4.0, -4.0]]) / 3


def logistic(a):
    """1 / (1 + exp(-a))."""
    return 1 / (1 + np.exp(-a))


u = lam * x  # (1)
r = np.sqrt(np.mean(u**2, axis=-1, keepdims=True))  # (2)
y = g * u / r
h = y @ w_down  # (3)
s = logistic(h * logistic(h) @ w_up)
o = s * y  # (4)
print("y", y.tolist(), "gates", s.round(12).tolist(), "output", o.round(12).tolist())
tutorial.check("the output is (3, 7)/4", np.max(np.abs(o - [[0.75, 1.75]])), 8 * EPS)
library, cache = spec.forward(x, g, lam, w_down, w_up, eps=0.0)
tutorial.check("the library says the same", np.max(np.abs(library - o)), 8 * EPS)

# %%
# The backward, line by line
# --------------------------
# **(4')** The product rule: :math:`ds = do \odot y` and a first part of :math:`dy = do \odot s`.
#
# **(3')** With :math:`t = \mathrm{silu}(h)` and :math:`a = t W_\uparrow`:
#
# .. math::
#
#    da = ds \odot s \odot (1 - s), \quad dW_\uparrow = t^\top da, \quad
#    dh = (da\, W_\uparrow^\top) \odot \sigma(h) \bigl(1 + h (1 - \sigma(h))\bigr), \quad
#    dW_\downarrow = y^\top dh ,
#
# and the second part of :math:`dy` is :math:`dh\, W_\downarrow^\top`.
#
# **(2')** By :math:`\partial r / \partial u_c = u_c / (C r)`,
#
# .. math::
#
#    du = \frac{g \odot dy}{r} - \frac{u}{r^3} \cdot \frac1C \sum_c u_c\, g_c\, dy_c, \qquad
#    dg = \sum_{\text{tokens}} dy \odot u / r .
#
# For :math:`\varepsilon = 0`, :math:`u \cdot du = 0`: the length of a token cannot be learned
# through the norm. Now let one channel of u be huge. Its own :math:`du` is small in proportion, and
# the first term, :math:`1/r`, is small for *all* channels: an outlier also turns down the gradient.
#
# **(1')** :math:`d\lambda = \sum_\text{tokens} du \odot x` and :math:`dx = \lambda \odot du`.


def backward(do, x, lam, g, w_down, w_up, u, r, y, h, s):
    """Steps (4') to (1') for tokens as rows."""
    ds, dy = do * y, do * s  # (4')
    da, t = ds * s * (1 - s), h * logistic(h)  # (3')
    dh = (da @ w_up.T) * logistic(h) * (1 + h * (1 - logistic(h)))
    dy = dy + dh @ w_down.T
    du = g * dy / r - u * np.mean(u * g * dy, axis=-1, keepdims=True) / r**3  # (2')
    return {
        "x": lam * du, "lam": np.sum(du * x, axis=0), "g": np.sum(dy * u / r, axis=0),  # (1')
        "w_down": y.T @ dh, "w_up": t.T @ da,
    }  # fmt: skip


# %%
# The example backwards, for :math:`L = o_1`: :math:`da = (\tfrac3{16}, 0)`,
# :math:`dh = b = \tfrac3{16} (1 + \tfrac14 \ln 3)`, :math:`dy = (e, 0)` with
# :math:`e = \tfrac34 + b \ln 3`, and :math:`du = \tfrac{e}{50} (49, -7)`, orthogonal to
# :math:`(1, 7)`.

do = np.array([[1.0, 0.0]])
ours, theirs = backward(do, x, lam, g, w_down, w_up, u, r, y, h, s), spec.backward(do, cache)
b = 3 / 16 * (1 + LOG3 / 4)
e = 3 / 4 + b * LOG3
board = {
    "x": [[0.98 * e, -0.28 * e]], "lam": [0.98 * e, -0.49 * e], "g": [e / 5, 0],
    "w_down": [[b], [7 * b]], "w_up": [[9 / 64 * LOG3, 0]],
}  # fmt: skip
for name, expected in board.items():
    tutorial.check(f"d{name}, by hand", np.max(np.abs(ours[name] - expected)), 32 * EPS)
    tutorial.check(f"d{name}, library", np.max(np.abs(theirs[name] - expected)), 32 * EPS)

# %%
# In general four roads must lead to the same gradient.

tutorial.gradients(spec, spec.example(np.random.default_rng(3))["both"])

# %%
# One mechanism, two sinks
# ------------------------
# Split a token into one channel M and the rest. By (2) the rest leaves RMSNorm multiplied by
#
# .. math::
#
#    \frac{r(\text{without } M)}{r(\text{with } M)} =
#    \frac{\lVert x_\text{rest} \rVert}{\sqrt{\lVert x_\text{rest} \rVert^2 + M^2}}
#    \qquad (\varepsilon = 0),
#
# relative to the same token with M set to zero. Split a row of scores into one logit m and the
# rest. The weights of the rest are multiplied by :math:`Z / (Z + e^m)`, with Z the sum of their
# exponentials. Same figure: a sum in the denominator, one term that nobody reads. Both formulas,
# against what the norm and a softmax really do:

rng = np.random.default_rng(0)
token, row = rng.standard_normal(64), rng.standard_normal(64)
sizes, logits = np.geomspace(0.1, 1000, 25), np.linspace(-4, 12, 25)
curves = {"norm": [], "norm, formula": [], "softmax": [], "softmax, formula": []}
for size, m in zip(sizes, logits, strict=True):
    with_it, without = token.copy(), token.copy()
    with_it[0], without[0] = size, 0.0
    big, small = (spec.forward(t, np.ones(64), eps=0.0)[0][1:] for t in (with_it, without))
    curves["norm"].append(np.mean(big / small))
    curves["norm, formula"].append(residual_factor(with_it, 0, eps=0.0))
    z = np.concatenate([[m], row])
    full, alone = np.exp(z) / np.sum(np.exp(z)), np.exp(row) / np.sum(np.exp(row))
    curves["softmax"].append(np.mean(full[1:] / alone))
    curves["softmax, formula"].append(sink_factor(z, 0))
for name in ("norm", "softmax"):
    gap = np.max(np.abs(np.subtract(curves[name], curves[f"{name}, formula"])))
    tutorial.check(f"{name}: formula and measurement", gap, 1e-14)

# %%
# Experiment: does a network grow an outlier, and does a gate make it superfluous?
# ---------------------------------------------------------------------------------
# The smallest task that needs rescaling. The input is a direction of 16 numbers and a logarithm l;
# the network must write the direction with the length :math:`e^l`, where l is uniform between -2
# and 1. It has a linear map, a hidden layer, a sum of the two (the *stream*), and then a norm, with
# nothing behind it. RMSNorm gives every token the same length; to make a token short, the stream
# must hide length in a channel whose gain has been closed. There are 16 targets, so this costs one
# of them. GatedNorm has rank 8 and starts with its gates at one half.
#
# The measure is the largest :math:`|x_c|` over the median :math:`|x_c|` of the stream, averaged
# over unseen tokens. Gaussian numbers have about 3.

tutorial.claim(
    "A small network that must write tokens of very different length through an RMSNorm makes one "
    "channel large; through a GatedNorm it does not.",
    criterion="on each of three seeds the mean ratio of largest to median channel is above 10 "
    "with RMSNorm and below 5 with GatedNorm (partly: with GatedNorm it is at most half of "
    "that with RMSNorm on each seed)",
)

C, RANK, HIDDEN = 16, 8, 64


def batch(rng, n):
    """Inputs (n, C + 1): direction and log length; what shall come out (n, C)."""
    d = rng.standard_normal((n, C))
    d = d / np.sqrt(np.mean(d**2, axis=1, keepdims=True))
    length = rng.uniform(-2, 1, (n, 1))
    return np.concatenate([d, length], axis=1), np.exp(length) * d


def initial(rng, kind):
    """Parameters of the stream and of the norm."""
    parameters = {
        "w0": np.eye(C + 1, C), "w1": rng.standard_normal((C + 1, HIDDEN)) / math.sqrt(C),
        "b1": np.zeros(HIDDEN), "w2": 0.3 * rng.standard_normal((HIDDEN, C)) / math.sqrt(HIDDEN),
        "g": np.ones(C),
    }  # fmt: skip
    if kind == "PreAffine":
        parameters["lam"] = np.ones(C)
    if kind == "GatedNorm":
        parameters["w_down"] = rng.standard_normal((C, RANK)) / math.sqrt(C)
        parameters["w_up"] = np.zeros((RANK, C))
    return parameters


def stream(parameters, inputs):
    """What stands before the norm."""
    hidden = core.relu(inputs @ parameters["w1"] + parameters["b1"])
    return inputs @ parameters["w0"] + hidden @ parameters["w2"]


def norm(parameters, x):
    """The norm with the parameters it has."""
    own = {n: parameters[n] for n in ("lam", "w_down", "w_up") if n in parameters}
    return spec.forward(x, parameters["g"], **own)[0]


def ratio(x):
    """Mean over the tokens of the largest over the median channel."""
    size = np.abs(x)
    return float(np.mean(np.max(size, axis=1) / np.median(size, axis=1)))


def loss(parameters, inputs, target):
    """Mean squared error."""
    return np.mean(np.square(norm(parameters, stream(parameters, inputs)) - target))


def experiment(seed, kind, steps):
    """Train; the ratio on the way, the parameters, unseen inputs and targets."""
    rng, state, path = np.random.default_rng(seed), None, []
    parameters = initial(rng, kind)
    inputs, target = batch(np.random.default_rng(seed + 50), 2000)
    for step in range(steps):
        if step % 25 == 0:
            path.append(ratio(stream(parameters, inputs)))
        _, gradients = nn.value_and_gradient(loss, parameters, *batch(rng, 128))
        rate = nn.cosine(step, steps, rate=1e-2, warmup=20)
        parameters, state = nn.adamw(parameters, nn.clip(gradients, 1.0), state, rate=rate)
    return path, parameters, inputs, target


KINDS = {"RMSNorm": ORANGE, "PreAffine": GREEN, "GatedNorm": BLUE}
steps = 5 if tutorial.quick else 1500
paths, channels, records = {kind: [] for kind in KINDS}, {}, []
for seed in range(3):
    record = {}
    for kind in KINDS:
        path, parameters, inputs, target = experiment(seed, kind, steps)
        x = stream(parameters, inputs)
        paths[kind].append([*path, ratio(x)])
        channels.setdefault(kind, []).append(np.sort(np.mean(np.abs(x), axis=0))[::-1])
        record[f"{kind}: largest over median"] = ratio(x)
        record[f"{kind}: squared error"] = loss(parameters, inputs, target)
        if kind != "RMSNorm":
            continue
        top = int(np.argmax(np.mean(np.abs(x), axis=0)))
        record["RMSNorm: gain of the largest channel"] = abs(parameters["g"][top])
        record["RMSNorm: median gain"] = np.median(np.abs(parameters["g"]))
        bound = 3 * np.median(np.abs(x), axis=1)
        clipped = x.copy()
        clipped[:, top] = np.clip(x[:, top], -bound, bound)
        record["RMSNorm: squared error, channel clipped"] = np.mean(
            np.square(norm(parameters, clipped) - target)
        )
    records.append(record)
grown = all(r["RMSNorm: largest over median"] > 10 for r in records)
quiet = all(r["GatedNorm: largest over median"] < 5 for r in records)
less = all(
    r["GatedNorm: largest over median"] <= r["RMSNorm: largest over median"] / 2 for r in records
)
verdict = "reproduced" if grown and quiet else "partly" if less else "not reproduced"
tutorial.measured(ours=records, verdict=verdict, tolerance=0.5)

# %%
# What the seeds show
# -------------------
# RMSNorm: one channel, always the same one, grows to many times the others, and its gain falls to
# nearly zero. It writes nothing; it exists to be divided by. Who "repairs" the network by clipping
# that channel takes away its control of length: the error is then larger than that of writing
# zeros, which is the mean of :math:`e^{2l}`, 1.23. PreAffine moves part of the job into
# :math:`\lambda`. GatedNorm leaves the stream as Gaussian numbers would be, and its error is a
# little lower, as it need not give up a target.
#
# Two pilots on other seeds came before the criterion. Both had RMSNorm near 33. GatedNorm had 3.3
# once and 8.3 once: a gate makes the outlier unnecessary, it does not forbid it, and a network that
# has found the old way early may keep it.
#
# The toy demands what it shows: lengths must vary, so something must rescale. That real networks
# need rescaling is the study's finding, on models of billions of parameters, and not tested here.
#
# The figure
# ----------
# Left: the factor by which an outlier multiplies the rest, for a token of 64 Gaussian channels and
# a row of 64 Gaussian scores; lines are formulas, dots measurements. Middle: largest over median
# channel during training, three seeds. Right: mean :math:`|x_c|` of the stream after training, in
# falling order, three seeds.

figure = None
if not tutorial.quick:
    plt = tutorial.pyplot()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.7))
    left.plot(sizes, curves["norm, formula"], color=ORANGE, label="RMSNorm, channel M")
    left.plot(sizes, curves["norm"], "o", color=ORANGE, markersize=3)
    bare = np.exp(logits)
    left.plot(bare, curves["softmax, formula"], color=BLUE, label=r"softmax, $e^m$")
    left.plot(bare, curves["softmax"], "o", color=BLUE, markersize=3)
    left.set_xscale("log")
    left.set(title="One large term", xlabel=r"$M$ or $e^m$", ylabel="factor on the rest",
             ylim=(0, 1.3), xlim=(0.1, 1e4))  # fmt: skip
    left.legend(loc="upper right", fontsize=9)
    for kind, colour in KINDS.items():
        for i, path in enumerate(paths[kind]):
            middle.plot(25 * np.arange(len(path)), path, color=colour, linewidth=1.2,
                        label=None if i else kind)  # fmt: skip
            right.plot(np.arange(1, C + 1), channels[kind][i], "o-", color=colour, markersize=3,
                       linewidth=1)  # fmt: skip
    middle.set(title="Largest over median channel", xlabel="training step", ylabel="ratio",
               ylim=(0, 46))  # fmt: skip
    middle.legend(loc="upper left", fontsize=9)
    right.set_yscale("log")
    right.set_xticks((1, 4, 8, 12, 16))
    right.set(title="Channels of the stream", xlabel="channel, in falling order",
              ylabel="mean size")  # fmt: skip

# %%
# Exercises
# ---------
# **1. Write this backward yourself.** RMSNorm alone: given ``dy`` (n, C), ``u`` (n, C), the gain
# ``g`` (C,) and ``eps``, return ``du`` (n, C) and ``dg`` (C,).


def my_backward(dy, u, g, eps):
    """Return du and dg."""
    # solution: return None, None
    squared = eps + np.einsum("nc,nc->n", u, u) / u.shape[1]
    unit = u / np.sqrt(squared)[:, None]
    back = dy * g
    along = np.einsum("nc,nc->n", unit, back) / u.shape[1]
    du = (back - along[:, None] * unit) / np.sqrt(squared)[:, None]
    return du, np.einsum("nc,nc->c", dy, unit)
    # end of solution


fresh = np.random.default_rng(11)
u7, g7, dy7 = (fresh.standard_normal(shape) for shape in ((5, 6), (6,), (5, 6)))
_, cache = spec.forward(u7, g7, eps=0.2)
expected = spec.backward(dy7, cache)
answer = dict(zip("xg", my_backward(dy7, u7, g7, 0.2), strict=True))
tutorial.exercise(1, answer, {name: expected[name] for name in "xg"})

# %%
# **2. Is PreAffine new at all?** Let the norm stand directly behind a matrix, :math:`x = a W`. Show
# that :math:`\lambda` can be folded into W, so that nothing new can be computed. What did the study
# gain by it, then? And why can it *not* be folded in a transformer with a residual stream?

# %%
# **Solution 2.** :math:`\lambda \odot (a W) = a (W \operatorname{diag} \lambda)`. The set of
# functions is the same; what changes is where the large number lives: in a parameter, which is one
# row to store, and not in every activation, which has to be kept in few bits at run time. A
# residual stream is read by many norms and written by many matrices. One :math:`\lambda` for each
# norm lets each reader see another channel as large; folding it into the writers would serve all
# readers alike.

a7, w7, lam7 = (fresh.standard_normal(shape) for shape in ((5, 3), (3, 6), (6,)))
open_form, _ = spec.forward(a7 @ w7, g7, lam7)
folded, _ = spec.forward(a7 @ (w7 * lam7), g7)
tutorial.check("exercise 2: folded", np.max(np.abs(open_form - folded)), 64 * EPS)

# %%
# **3. How large must a sink be?** A row has n Gaussian scores of variance 1, and a key with the
# value zero shall halve the output. Which logit must it have? What does a channel need to do the
# same to a token of C Gaussian channels? Which of the two grows faster with size?

# %%
# **Solution 3.** :math:`Z / (Z + e^m) = \tfrac12` needs :math:`m = \ln Z \approx \ln n + \tfrac12`,
# a logarithm. The channel needs :math:`M^2 = 3 \lVert x_\text{rest} \rVert^2`, so
# :math:`M \approx \sqrt{3 C}`, a square root. An attention sink is cheap: the exponential does the
# work. In the norm only the square does, so residual sinks are the numbers that look frightening.

n = 4096
m = math.log(n) + 0.5
halved = sink_factor(np.concatenate([[m], fresh.standard_normal(n)]), 0)
M = math.sqrt(3 * n)
shrunk = residual_factor(np.concatenate([[M], fresh.standard_normal(n)]), 0)
print(f"exercise 3: n = C = {n}: logit {m:.2f} leaves {halved:.3f}, channel {M:.0f} {shrunk:.3f}")
tutorial.check("exercise 3: one half, twice", max(abs(halved - 0.5), abs(shrunk - 0.5)), 0.05)

# %%
tutorial.finish(figure)
