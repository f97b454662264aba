r"""
Affine-scaled attention: rows that need not sum to one
======================================================

**The question.** Softmax hands out exactly one unit of weight in each row. A token that needs
nothing must still spend it somewhere. A gate (``normalizers/gated``) or a sink
(``normalizers/sink``) takes weight away; what if we let the token choose how *sharp* its helping
is, and keep the size of the helping in place by a constant?

**The idea.** Bae et al. multiply the softmax weights by a number between 0 and 1 that the token
computes, and add to every weight the same small number, such that over all keys the row still
sums to what it sums to on average. A scale near 0 means: give me a little of everything.

You need to know softmax attention (``scores/dot_product``).
"""

# %%
# Definition
# ----------
# .. math::
#
#    z_{ts}   &= c\, q_t \cdot k_s                                                    &(1)\\
#    s_{ts}   &= e^{z_{ts}} / \textstyle\sum_{s'} e^{z_{ts'}}                         &(2)\\
#    \alpha_t &= \phi(x_t \cdot w_\alpha), \qquad \phi(a) = \min(\max(0.1 a + 0.5, 0), 1) &(3)\\
#    \beta_t  &= (\bar\alpha - \alpha_t) / n                                          &(4)\\
#    p_{ts}   &= \alpha_t s_{ts} + \beta_t                                            &(5)\\
#    o_t      &= \textstyle\sum_s p_{ts}\, v_s                                        &(6)
#
# The number :math:`\bar\alpha` is a running mean of :math:`\alpha` over the batches seen in
# training, :math:`\bar\alpha \leftarrow 0.9\, \bar\alpha + 0.1 \operatorname{mean}(\alpha)`: a
# buffer, through which no gradient flows. Keys that t may not see get no :math:`\beta`. If t sees m
# of the n keys, its row sums to
#
# .. math:: \textstyle\sum_s p_{ts} = \alpha_t + m\, \beta_t
#           = \tfrac{m}{n}\, \bar\alpha + (1 - \tfrac{m}{n})\, \alpha_t .
#
# Over all keys (m = n) that is :math:`\bar\alpha`, whatever the token wants; under a causal mask it
# lies between :math:`\bar\alpha` and :math:`\alpha_t`. That is the first surprise of this method:
# the sum is free only as far as there are keys that the token does *not* see.

import math

import numpy as np

import attention_ref
from attention_ref import engine, nn
from attention_ref.kit.tutorial import BLUE, GREY, ORANGE, Tutorial
from attention_ref.methods.normalizers.affine_scaled import affine_scaled_update

tutorial = Tutorial(__file__)
spec = attention_ref.get("normalizers/affine_scaled")
softmax = attention_ref.get("scores/dot_product")
sink = attention_ref.get("normalizers/sink")
EPS = np.finfo(np.float64).eps

# %%
# An example by hand
# ------------------
# Two queries that are alike, two keys, two tokens that differ:
#
# .. math::
#
#    q = \begin{pmatrix} 1 \\ 1 \end{pmatrix}, \quad
#    k = \begin{pmatrix} 0 \\ \ln 3 \end{pmatrix}, \quad
#    v = \begin{pmatrix} 4 \\ 12 \end{pmatrix}, \quad
#    x = \begin{pmatrix} 1 \\ -1 \end{pmatrix}, \quad
#    w_\alpha = 2.5, \quad \bar\alpha = \tfrac12, \quad n = 4, \quad c = 1 .
#
# (2) Both rows of the softmax are :math:`(\tfrac14, \tfrac34)`. (3) The logits 2.5 and -2.5 give
# :math:`\alpha = \tfrac34, \tfrac14`. (4) :math:`\beta = -\tfrac1{16}, \tfrac1{16}`. (5) The
# weights are :math:`(\tfrac18, \tfrac12)` and :math:`(\tfrac18, \tfrac14)`. (6) The outputs are 6.5
# and 3.5.

q, k = np.ones((2, 1)), np.array([[0.0], [math.log(3.0)]])
v, x = np.array([[4.0], [12.0]]), np.array([[1.0], [-1.0]])
w_a, alpha_ma, n = np.array([2.5]), 0.5, 4

soft = np.exp(q @ k.T)  # (1)
soft = soft / np.sum(soft, axis=1, keepdims=True)  # (2)
alpha = np.clip(0.1 * (x @ w_a[:, None]) + 0.5, 0, 1)  # (3)
beta = (alpha_ma - alpha) / n  # (4)
p = alpha * soft + beta  # (5)
out = p @ v  # (6)
print("weights", p.round(4).tolist(), "outputs", out.ravel().round(4).tolist())
tutorial.check("outputs are 6.5 and 3.5", np.max(np.abs(out.ravel() - [6.5, 3.5])), 16 * EPS)
library, cache = spec.forward(q, k, v, x, w_a, alpha_ma, n=n, scale=1.0)
tutorial.check("the library says the same", np.max(np.abs(library - out)), 16 * EPS)

# %%
# The backward, line by line
# --------------------------
# **(6')** :math:`dp = do\, v^\top` and :math:`dv = p^\top do`, as ever, with the *affine* weights.
#
# **(5')** On visible keys :math:`p = \alpha s + \beta`, so
#
# .. math::
#
#    ds_{ts} = \alpha_t\, dp_{ts}, \qquad
#    d\alpha_t = \textstyle\sum_s s_{ts}\, dp_{ts}, \qquad d\beta_t = \textstyle\sum_s dp_{ts} .
#
# **(4')** :math:`\alpha` acts a second time, through :math:`\beta`:
# :math:`d\alpha_t \mathrel{+}= -d\beta_t / n`. Together
#
# .. math:: d\alpha_t = \textstyle\sum_s dp_{ts} (s_{ts} - \tfrac1n) ,
#
# the scale is pulled by how much better the softmax does than the plain mean.
#
# **(3')** The slope of :math:`\phi` is 0.1 between -5 and 5 and 0 outside. With
# :math:`a_t = x_t \cdot w_\alpha`: :math:`da_t = 0.1\, d\alpha_t`, and then
# :math:`dw_\alpha = \sum_t da_t x_t`, :math:`dx_t = da_t w_\alpha`.
#
# **(2'), (1')** :math:`dz_s = s_s (ds_s - \sum_j s_j\, ds_j)` in each row,
# :math:`dq = c\, dz\, k` and :math:`dk = c\, dz^\top q`. A row with :math:`\alpha_t = 0` does not
# teach queries and keys anything.


def backward(dout, q, k, v, x, w_a, soft, alpha, p, n, c):
    """Steps (6') to (1') for one head, without masks."""
    dp, dv = dout @ v.T, p.T @ dout  # (6')
    ds, dalpha = alpha * dp, np.sum(soft * dp, axis=1, keepdims=True)  # (5')
    dalpha = dalpha - np.sum(dp, axis=1, keepdims=True) / n  # (4')
    da = np.where((alpha > 0) & (alpha < 1), 0.1 * dalpha, 0.0)  # (3')
    dz = soft * (ds - np.sum(soft * ds, axis=1, keepdims=True))  # (2')
    dq, dk = c * dz @ k, c * dz.T @ q  # (1')
    return {"q": dq, "k": dk, "v": dv, "x": da * w_a, "w_a": np.sum(da * x, axis=0)}


# %%
# The example backwards, for :math:`L = o_1 + o_2`. :math:`dp = (4, 12)` in both rows, so
# :math:`d\alpha = (1 + 9) - 16 / 4 = 6` and :math:`da = 0.6`, twice. The two tokens are opposite:
# :math:`dw_\alpha = 0.6 - 0.6 = 0`. And :math:`dz_t = \alpha_t \tfrac3{16} (-8, 8)`.

ours = backward(np.ones((2, 1)), q, k, v, x, w_a, soft, alpha, p, n, 1.0)
theirs = spec.backward(np.ones((2, 1)), cache)
board = {
    "q": [[9 / 8 * math.log(3)], [3 / 8 * math.log(3)]], "k": [[-3 / 2], [3 / 2]],
    "v": [[1 / 4], [3 / 4]], "x": [[3 / 2], [3 / 2]], "w_a": [0.0],
}  # fmt: skip
for name, expected in board.items():
    tutorial.check(f"d{name}, by hand", np.max(np.abs(ours[name] - expected)), 64 * EPS)
    tutorial.check(f"d{name}, library", np.max(np.abs(theirs[name] - expected)), 64 * EPS)

# %%
# In general four roads must lead to the same gradient: a causal case with a running mean for each
# of two heads, and one with a mask, a bias and the logistic function as :math:`\phi`.

cases = spec.example(np.random.default_rng(3))
tutorial.gradients(spec, cases["causal"])
tutorial.gradients(spec, cases["softcap"])

# %%
# Experiment: what does a token do that needs nothing?
# ----------------------------------------------------
# A text has 16 tokens, each of one of six classes with four random numbers as its load. Half of
# the tokens *ask*: they must answer with the mean load of all tokens of their class so far,
# themselves included. The others carry a flag, *idle*, and must answer zero. One causal head; the
# query, the key, the value and :math:`\alpha` are all made of the same token.
#
# Twice: once the first token is one of the others; once it is a token of its own kind without a
# load, a *waste bin* to which an idle query can turn. Three mechanisms: softmax, softmax with a
# learned sink, affine-scaled.
#
# The paper shows histograms of row sums and less weight on the first token. A row whose weights
# are all halved has less weight on the first token too, so we look at the first token's *share*
# of the row's absolute weight, and print the weight as well. The thresholds were written down after
# a pilot on other seeds.

tutorial.claim(
    "Under a causal mask the rows of affine-scaled attention have sums of their own instead of 1, "
    "and a query that needs nothing leaves less weight on the first token.",
    criterion="on each of three seeds, unseen texts. (a) Without a waste bin: the standard "
    "deviation of the row sums is above 0.05, and the squared error at most a fifth of that of "
    "softmax. (b) With it: the first token's share of the weight of idle queries is at most half "
    "of that under softmax (partly: only one of a and b)",
)

TOKENS, CLASSES, LOAD, WIDTH = 16, 6, 4, 8
FEATURES = CLASSES + 2 + LOAD
SEEN = np.arange(TOKENS)[None, :] <= np.arange(TOKENS)[:, None]


def texts(rng, count, bin_first):
    """Tokens (count, TOKENS, FEATURES), answers (count, TOKENS, LOAD), idle (count, TOKENS)."""
    kind = rng.integers(CLASSES, size=(count, TOKENS))
    idle = rng.random((count, TOKENS)) < 0.5
    x = np.zeros((count, TOKENS, FEATURES))
    x[..., :CLASSES] = np.eye(CLASSES)[kind]
    x[..., CLASSES] = idle
    x[..., CLASSES + 2 :] = rng.standard_normal((count, TOKENS, LOAD))
    if bin_first:
        x[:, 0] = 0.0
        x[:, 0, CLASSES + 1] = 1.0
        kind[:, 0], idle[:, 0] = -1, True
    same = (kind[:, :, None] == kind[:, None, :]) & SEEN & ~idle[:, :, None]
    share = same / np.maximum(1, np.sum(same, axis=-1, keepdims=True))
    return x, share @ x[..., CLASSES + 2 :], idle


def attend(name, parameters, x, mean):
    """One causal head; outputs (count, TOKENS, LOAD) and the cache."""
    q, k, v = ((x @ parameters[n])[:, None] for n in "qkv")
    if name == "affine-scaled":
        own = x[:, None], parameters["w_a"], mean
        out, cache = spec.forward(q, k, v, *own, causal=True)
    elif name == "sink":
        out, cache = sink.forward(q, k, v, parameters["b"], causal=True)
    else:
        out, cache = softmax.forward(q, k, v, causal=True)
    return out[:, 0], cache


def experiment(name, seed, bin_first, steps):
    """Train; squared error, row sums, and weight and share of the first token for idle queries."""
    rng = np.random.default_rng(seed)
    start = {n: rng.standard_normal((FEATURES, m)) / 2 for n, m in zip("qkv", (WIDTH, WIDTH, LOAD))}
    start |= {"affine-scaled": {"w_a": np.zeros((1, FEATURES))}, "sink": {"b": np.zeros(1)}}.get(
        name, {}
    )
    state = {"mean": 0.0}

    def draw():
        while True:
            yield texts(rng, 32, bin_first)[:2]

    def loss(parameters, x, answer):
        out, cache = attend(name, parameters, x, state["mean"])
        if name == "affine-scaled":
            state["mean"] = affine_scaled_update(state["mean"], engine.value(cache.alpha))
        return np.mean(np.square(out[:, 1:] - answer[:, 1:]))

    parameters, _ = nn.train(loss, start, draw(), steps=steps, rate=2e-2, progress=False)
    x, answer, idle = texts(np.random.default_rng(seed + 100), 500, bin_first)
    out, cache = attend(name, parameters, x, state["mean"])
    p, late = cache.p[:, 0], idle & (np.arange(TOKENS) >= TOKENS // 2)
    size = np.sum(np.abs(p[late]), axis=-1)
    return {
        "error": np.mean(np.square(out[:, 1:] - answer[:, 1:])),
        "sums": np.sum(p, axis=-1)[:, 1:].ravel(),
        "first": np.mean(p[late][:, 0]),
        "share": np.mean(np.abs(p[late][:, 0]) / size),
        "alpha": [np.mean(cache.alpha[:, 0, :, 0][rows]) for rows in (idle, ~idle)]
        if name == "affine-scaled" else None,
    }  # fmt: skip


NAMES = ("softmax", "sink", "affine-scaled")
steps = 3 if tutorial.quick else 1000
found = {
    (name, bin_first): [experiment(name, seed, bin_first, steps) for seed in range(3)]
    for name in NAMES for bin_first in (False, True)
}  # fmt: skip

records = []
for seed in range(3):
    plain, ours = found["softmax", False][seed], found["affine-scaled", False][seed]
    binned, kept = found["softmax", True][seed], found["affine-scaled", True][seed]
    records.append({
        "no bin: deviation of row sums": np.std(ours["sums"]),
        "no bin: squared error": ours["error"],
        "no bin: squared error, softmax": plain["error"],
        "no bin: squared error, sink": found["sink", False][seed]["error"],
        "bin: first token's share": kept["share"],
        "bin: its share, softmax": binned["share"],
        "bin: first token's weight": kept["first"],
        "bin: its weight, softmax": binned["first"],
    })  # fmt: skip
    print(
        f"seed {seed}, no bin: alpha {ours['alpha'][0]:.3f} idle, {ours['alpha'][1]:.3f} asking; "
        f"bin: {kept['alpha'][0]:.3f} and {kept['alpha'][1]:.3f}"
    )
spread = all(
    r["no bin: deviation of row sums"] > 0.05
    and r["no bin: squared error"] <= r["no bin: squared error, softmax"] / 5
    for r in records
)
relieved = all(r["bin: first token's share"] <= r["bin: its share, softmax"] / 2 for r in records)
verdict = ("not reproduced", "partly", "reproduced")[spread + relieved]
tutorial.measured(ours=records, verdict=verdict, tolerance=0.3)

# %%
# What the seeds show
# -------------------
# Without a waste bin plain softmax cannot say nothing. Affine-scaled attention closes
# :math:`\alpha` for idle queries; what remains is the constant :math:`\bar\alpha / n` on every key
# seen, and the error that is left is the noise this lets in. The row sums are those of the formula
# above: the fewer keys are seen, the smaller for idle queries (:math:`\alpha` below the mean), the
# larger for asking ones. A sink does better on this task: it lets a row go to zero, and
# affine-scaled rows do not get there unless :math:`\bar\alpha` does.
#
# With a waste bin all three use it, and :math:`\alpha` hardly differs between idle and asking
# queries: an output of zero costs nothing there, a constant on all keys costs noise, so the scale
# is set to its own mean and :math:`\beta` to zero. The *weight* of the first token is smaller than
# under softmax only because the whole row is; its *share* is not. In large language models the
# paper found the weight of the first token to fall. What this toy says is that the falling weight
# alone does not show that the token is used less.
#
# The figure
# ----------
# Left: row sums without a waste bin, three seeds together. Middle: squared error there, dots are
# seeds. Right: weight and share of the first token for idle queries, with a waste bin.

figure = None
if not tutorial.quick:
    plt = tutorial.pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6))
    for name, colour in zip(NAMES, (GREY, ORANGE, BLUE), strict=True):
        sums = np.concatenate([one["sums"] for one in found[name, False]])
        height, edges = np.histogram(sums, bins=44, range=(-0.0125, 1.0875))
        axes[0].stairs(height / len(sums), edges, fill=True, alpha=0.6, color=colour, label=name)
    axes[0].set(title="Row sums, no waste bin", xlabel="sum of a row's weights",
                ylabel="share of rows", ylim=(0, 1.05))  # fmt: skip
    axes[0].legend(loc="upper center")
    for i, (name, colour) in enumerate(zip(NAMES, (GREY, ORANGE, BLUE), strict=True)):
        errors = [one["error"] for one in found[name, False]]
        axes[1].bar(i, np.mean(errors), width=0.6, color=colour)
        axes[1].plot(i + np.array([-0.1, 0, 0.1]), errors, "o", color="black", markersize=4)
        for j, what in enumerate(("first", "share")):
            seeds = [one[what] for one in found[name, True]]
            place = j + 0.28 * (i - 1)
            axes[2].bar(place, np.mean(seeds), width=0.25, color=colour)
            axes[2].plot(place + np.array([-0.06, 0, 0.06]), seeds, "o", color="black",
                         markersize=3)  # fmt: skip
    axes[1].set_yscale("log")
    axes[1].set_xticks(range(3), NAMES)
    axes[1].set(title="Error, no waste bin", ylabel="mean squared error")
    axes[2].set_xticks((0, 1), ("weight", "share of the row"))
    axes[2].set(title="First token as a bin, idle", ylim=(0, 1.1))
    for ax in axes[1:]:
        ax.grid(False, axis="x")

# %%
# Exercises
# ---------
# **1. Write this backward yourself.** One head without masks. Given ``dout`` (T, E), ``v`` (S, E),
# the softmax weights ``soft`` (T, S), the logits ``a`` (T,), the tokens ``x`` (T, C) and n, return
# ``dw_a`` (C,).


def my_backward(dout, v, soft, a, x, n):
    """Return dw_a."""
    # solution: return None
    better = soft @ v - np.sum(v, axis=0) / n  # softmax over plain mean
    da = 0.1 * np.einsum("te,te->t", dout, better) * (np.abs(a) < 5)
    return da @ x
    # end of solution


fresh = np.random.default_rng(11)
q4, k4, v4, x4 = (fresh.standard_normal(shape) for shape in ((4, 3), (6, 3), (6, 2), (4, 5)))
w4, dout = 2 * fresh.standard_normal(5), fresh.standard_normal((4, 2))
_, cache = spec.forward(q4, k4, v4, x4, w4, 0.3, n=9)
answer = my_backward(dout, v4, cache.soft, x4 @ w4, x4, 9)
tutorial.exercise(1, answer, spec.backward(dout, cache)["w_a"])

# %%
# **2. Which n?** Let n in (4) be the number m of keys that the query sees, instead of the length.
# What does every row sum to then, and what would the left panel of the figure look like?

# %%
# **Solution 2.** With n = m the sum :math:`\alpha_t + m \beta_t` is :math:`\bar\alpha` in every
# row: a single bar at :math:`\bar\alpha`. The spread that the paper shows needs the full length.

rng = np.random.default_rng(5)
q5, k5, v5, x5 = (rng.standard_normal(shape) for shape in ((6, 3), (6, 3), (6, 2), (6, 4)))
w5 = rng.standard_normal(4)
for m in range(1, 7):
    _, cache = spec.forward(q5[m - 1 : m], k5[:m], v5[:m], x5[m - 1 : m], w5, 0.3)
    tutorial.check(f"exercise 2: sum of row {m} - 0.3", abs(np.sum(cache.p) - 0.3), 16 * EPS)

# %%
# **3. Negative weights.** When is a weight negative? What does the head compute for
# :math:`\alpha_t = 1`, :math:`\bar\alpha = 0` without masks, and what happens to its output when
# one vector is added to all values?

# %%
# **Solution 3.** :math:`p_{ts} < 0` when :math:`s_{ts} < (\alpha_t - \bar\alpha) / (n \alpha_t)`:
# only tokens with a scale above the mean, on keys that the softmax weighs less than that. For
# :math:`\alpha = 1`, :math:`\bar\alpha = 0` the output is the softmax attention *minus the mean of
# the values*: a contrast. Its weights sum to 0, so a vector on all values changes nothing.

ones, w_one = np.ones((6, 1)), np.array([9.0])
contrast, _ = spec.forward(q5, k5, v5, ones, w_one, 0.0)
plain, _ = softmax.forward(q5, k5, v5)
error = np.max(np.abs(contrast - (plain - np.mean(v5, axis=0))))
tutorial.check("exercise 3: softmax minus the mean", error, 32 * EPS)
moved, _ = spec.forward(q5, k5, v5 + np.array([3.0, -1.0]), ones, w_one, 0.0)
tutorial.check("exercise 3: values moved", np.max(np.abs(moved - contrast)), 32 * EPS)

# %%
tutorial.finish(figure)
