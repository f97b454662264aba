r"""
Gated attention: a head that can be switched off
================================================

**The question.** Softmax attention always hands out a full helping: its weights sum to 1, whether
or not the token needs anything. A token that needs nothing then has to look at something harmless,
and trained models keep the first token of a text for this. Can the token simply say *no, thanks*?

**The idea.** Multiply what the head gives by a number between 0 and 1 that the token itself
computes: :math:`\sigma(x_t W_g)`, with the same :math:`x_t` that the query is made of. Qiu et al.
tried five places for such a gate in large language models and found the output of each head, just
before the output projection, the best.

You need to know softmax attention (``scores/dot_product``); compare ``normalizers/sink``.
"""

# %%
# Definition
# ----------
# .. math::
#
#    s_t    &= \sigma(x_t W_g)                                                        &(1)\\
#    z_{ts} &= c\, q_t \cdot k_s                                                      &(2)\\
#    p_{ts} &= e^{z_{ts}} / \textstyle\sum_{s'} e^{z_{ts'}}                           &(3)\\
#    y_t    &= s_t \odot \textstyle\sum_s p_{ts}\, v_s                                &(4)\\
#    o_t    &= \textstyle\sum_h y_{ht} W_{O,h}                                        &(5)
#
# *Head-wise*: :math:`W_g` has one column, and one number switches the whole head. *Element-wise*:
# as many columns as the head has outputs. The five places of the study, and their names here:
#
# ==== ============= ================================== =========================
# G1   ``output``    output of the head, step (4)       gate of the query's token
# G2   ``value``     values, before the mixing          gate of the key's token
# G3   ``key``       keys, before the scores            gate of the key's token
# G4   ``query``     queries, before the scores         gate of the query's token
# G5   ``projected`` after step (5), all heads together gate of the query's token
# ==== ============= ================================== =========================

import math

import numpy as np

import attention_ref
from attention_ref import nn
from attention_ref.kit.tutorial import BLUE, GREEN, GREY, ORANGE, RED, Tutorial

tutorial = Tutorial(__file__)
spec = attention_ref.get("normalizers/gated")
softmax = attention_ref.get("scores/dot_product")
EPS = np.finfo(np.float64).eps

# %%
# An example by hand
# ------------------
# Two queries, two keys that are zero, so all weights are one half:
#
# .. math::
#
#    q = \begin{pmatrix} 1 \\ 1 \end{pmatrix}, \quad
#    k = \begin{pmatrix} 0 \\ 0 \end{pmatrix}, \quad
#    v = \begin{pmatrix} 4 \\ 12 \end{pmatrix}, \quad
#    x = \begin{pmatrix} 1 \\ -1 \end{pmatrix}, \quad W_g = \ln 3 .
#
# (1) The gates are :math:`1 / (1 + e^{-\ln 3}) = \tfrac34` and :math:`1 / (1 + 3) = \tfrac14`.
# (4) The mixture is 8 for both queries, the outputs are 6 and 2.

q, k = np.ones((2, 1)), np.zeros((2, 1))
v, x = np.array([[4.0], [12.0]]), np.array([[1.0], [-1.0]])
w_g = np.array([[math.log(3)]])

s = 1 / (1 + np.exp(-x @ w_g))  # (1)
p = np.exp(q @ k.T)  # (2)
p = p / np.sum(p, axis=1, keepdims=True)  # (3)
y = s * (p @ v)  # (4)
print("gates", s.ravel().round(4).tolist(), "outputs", y.ravel().round(4).tolist())
tutorial.check("outputs are 6 and 2", np.max(np.abs(y.ravel() - [6, 2])), 16 * EPS)
library, cache = spec.forward(q, k, v, x, w_g, scale=1.0)
tutorial.check("the library says the same", np.max(np.abs(library - y)), 16 * EPS)

# %%
# The backward, line by line
# --------------------------
# **(5')** :math:`dy_h = do\, W_{O,h}^\top` and :math:`dW_{O,h} = y_h^\top do`.
#
# **(4')** Call the mixture :math:`m = p v`, so that :math:`y = s \odot m`. The product rule gives
#
# .. math:: dm = dy \odot s, \qquad ds = dy \odot m .
#
# From there :math:`dv = p^\top dm` and :math:`dp = dm\, v^\top`, as without a gate.
#
# **(3'), (2')** As in softmax attention: :math:`dz_s = p_s (dp_s - \sum_j p_j\, dp_j)` in each row,
# :math:`dq = c\, dz\, k`, :math:`dk = c\, dz^\top q`.
#
# **(1')** The slope of the logistic function is :math:`\sigma' = \sigma (1 - \sigma)`. With
# :math:`g = x W_g`,
#
# .. math::
#
#    dg = ds \odot s \odot (1 - s) = dy \odot m \odot s \odot (1 - s) = dy \odot y \odot (1 - s),
#    \qquad dW_g = x^\top dg, \qquad dx = dg\, W_g^\top .
#
# The last form of :math:`dg` needs only what was gated, *after* the gate: one rule for all five
# places. Read it aloud: an open gate (:math:`s = 1`) and a closed one (:math:`y = 0`) do not learn.
# For a head-wise gate :math:`dg` is summed over the numbers of the head.


def backward(dy, q, k, v, x, w_g, s, p, c):
    """Steps (4') to (1') for a gate on the output."""
    y = s * (p @ v)
    dm = dy * s  # (4')
    dv, dp = p.T @ dm, dm @ v.T
    dz = p * (dp - np.sum(p * dp, axis=1, keepdims=True))  # (3')
    dq, dk = c * dz @ k, c * dz.T @ q  # (2')
    dg = np.sum(dy * y * (1 - s), axis=1, keepdims=True)  # (1')
    return {"q": dq, "k": dk, "v": dv, "x": dg @ w_g.T, "w_g": x.T @ dg}


# %%
# The example backwards, for :math:`L = o_1 + 3 o_2`. :math:`dm = (\tfrac34, 3 \cdot \tfrac14)`, so
# :math:`dv` is :math:`\tfrac34` for both values, and :math:`dp = (3, 9)` in both rows,
# :math:`dz = \tfrac12 (3 - 6, 9 - 6)`. The gates: :math:`dg_1 = 6 \cdot \tfrac14 = \tfrac32`,
# :math:`dg_2 = 3 \cdot 2 \cdot \tfrac34 = \tfrac92`, so :math:`dW_g = \tfrac32 - \tfrac92 = -3`.

dy = np.array([[1.0], [3.0]])
ours, theirs = backward(dy, q, k, v, x, w_g, s, p, 1.0), spec.backward(dy, cache)
board = {
    "q": [[0], [0]], "k": [[-3], [3]], "v": [[3 / 4], [3 / 4]], "w_g": -3,
    "x": [[1.5 * math.log(3)], [4.5 * math.log(3)]],
}  # fmt: skip
for name, expected in board.items():
    tutorial.check(f"d{name}, by hand", np.max(np.abs(ours[name] - expected)), 64 * EPS)
    tutorial.check(f"d{name}, library", np.max(np.abs(theirs[name] - expected)), 64 * EPS)

# %%
# In general four roads must lead to the same gradient. Gates on the output, element-wise with a
# mask of packed sequences; then on the sum of the heads.

cases = spec.example(np.random.default_rng(3))
tutorial.gradients(spec, cases["packed"])
tutorial.gradients(spec, cases["causal-long-queries"])

# %%
# Experiment: does the gate relieve the first token?
# --------------------------------------------------
# A text has a first token that is always the same and eleven others, each of one of eight classes
# with four random numbers as its load; every class asked for occurs once. The query names a class.
# In half of the texts it also carries a flag: *idle*. A query without the flag must answer with the
# load of the token of its class, an idle one with zero. One head, mean squared error, once with
# plain softmax and once with a head-wise gate that reads the query's token (:math:`W_g = 0` at the
# start: all gates one half).
#
# The flag is what makes this a fair task for a gate. It sees its own token only, not the keys: it
# can know that nothing is *wanted*, never that nothing is *found*.

tutorial.claim(
    "When a query matches nothing, a gated head closes its gate and leaves the first token alone, "
    "where plain softmax attention puts its weight.",
    criterion="on each of three seeds, for idle queries of unseen texts: the mean gate is below "
    "0.1, the mean weight of the first token is below 0.3 with a gate, and above 0.5 without "
    "(partly: only the first two)",
)

TOKENS, CLASSES, LOAD, WIDTH = 12, 8, 4, 8


def texts(rng, n, waste=True):
    """Query (n, 1, CLASSES + 1), tokens (n, TOKENS, CLASSES + 1 + LOAD), answers, place, idle."""
    wanted = rng.integers(CLASSES, size=n)
    kinds = (wanted[:, None] + rng.integers(1, CLASSES, size=(n, TOKENS))) % CLASSES  # others
    place = rng.integers(1, TOKENS, size=n)
    kinds[np.arange(n), place] = wanted
    x = np.zeros((n, TOKENS, CLASSES + 1 + LOAD))
    x[..., :CLASSES] = np.eye(CLASSES)[kinds]
    x[..., CLASSES + 1 :] = rng.standard_normal((n, TOKENS, LOAD))
    if waste:
        x[:, 0] = 0.0
        x[:, 0, CLASSES] = 1.0
    idle = rng.random(n) < 0.5
    answer = np.where(idle[:, None], 0.0, x[np.arange(n), place, CLASSES + 1 :])
    query = np.concatenate([np.eye(CLASSES)[wanted], idle[:, None]], axis=1)
    return query[:, None], x, answer, place, idle


def predict(parameters, query, x):
    """One head; returns the outputs and the cache."""
    q, k, v = query @ parameters["q"], x @ parameters["k"], x @ parameters["v"]
    q, k, v = q[:, None], k[:, None], v[:, None]
    if "w_g" in parameters:
        out, cache = spec.forward(q, k, v, query[:, None], parameters["w_g"])
    else:
        out, cache = softmax.forward(q, k, v)
    return out[:, 0, 0], cache


def experiment(seed, gated, steps, waste=True):
    """Train; mean weights of idle and asking queries, gates, and the squared error."""
    rng = np.random.default_rng(seed)
    start = {
        "q": rng.standard_normal((CLASSES + 1, WIDTH)),
        "k": rng.standard_normal((CLASSES + 1 + LOAD, WIDTH)) / 2,
        "v": rng.standard_normal((CLASSES + 1 + LOAD, LOAD)) / 2,
    }
    if gated:
        start["w_g"] = np.zeros((CLASSES + 1, 1))

    def draw():
        while True:
            yield texts(rng, 64, waste)[:3]

    def loss(parameters, query, x, answer):
        return np.mean(np.square(predict(parameters, query, x)[0] - answer))

    parameters, _ = nn.train(loss, start, draw(), steps=steps, rate=2e-2, progress=False)
    query, x, answer, place, idle = texts(np.random.default_rng(seed + 100), 4000, waste)
    out, cache = predict(parameters, query, x)
    weight = cache.p[:, 0, 0]
    shares = {}
    for word, rows in (("idle", idle), ("asking", ~idle)):
        asked, first = weight[rows, place[rows]], weight[rows, 0]
        shares[word] = [float(np.mean(part)) for part in (asked, first, 1 - first - asked)]
    gate = cache.gate[:, 0, 0, 0] if gated else np.ones(len(idle))
    return shares, gate, idle, float(np.mean(np.square(out - answer)))


records, bars, gates = [], {"softmax": [], "gated": []}, {"idle": [], "asking": []}
steps = 5 if tutorial.quick else 1500
for seed in range(3):
    plain, _, _, plain_error = experiment(seed, False, steps)
    shares, gate, idle, error = experiment(seed, True, steps)
    bars["softmax"].append(plain)
    bars["gated"].append(shares)
    gates["idle"].append(gate[idle])
    gates["asking"].append(gate[~idle])
    records.append({
        "gate, idle": np.mean(gate[idle]),
        "gate, asking": np.mean(gate[~idle]),
        "first token, idle, gated": shares["idle"][1],
        "first token, idle, softmax": plain["idle"][1],
        "squared error, gated": error,
        "squared error, softmax": plain_error,
    })  # fmt: skip
closed = all(r["gate, idle"] < 0.1 and r["first token, idle, gated"] < 0.3 for r in records)
sunk = all(r["first token, idle, softmax"] > 0.5 for r in records)
verdict = "reproduced" if closed and sunk else "partly" if closed else "not reproduced"
tutorial.measured(ours=records, verdict=verdict, tolerance=0.2)

# %%
# What the seeds show
# -------------------
# Plain softmax does what the claim says. The gated head closes its gate only part of the way, and
# it looks at the first token as well. What follows was looked at after the verdict, to explain it:
# the same experiment without a first token of its own kind, so that there is no waste bin.

gates["idle, no waste bin"] = []
for seed in range(3):
    _, _, _, alone = experiment(seed, False, steps, waste=False)
    _, gate, idle, error = experiment(seed, True, steps, waste=False)
    gates["idle, no waste bin"].append(gate[idle])
    print(
        f"seed {seed}, no waste bin: gate {np.mean(gate[idle]):.3f} idle, "
        f"{np.mean(gate[~idle]):.3f} asking; squared error {error:.1e} gated, {alone:.1e} softmax"
    )

# %%
# Where there is no waste bin, the gate closes almost fully and the task is solved; plain softmax
# fails, because it cannot say nothing. So the gate makes the first token *unnecessary*. It does
# not forbid it: with a first token at hand that can be given a value near zero, both ways lead to
# the answer, the weights of the head learn the old way too, and then nothing asks the gate to
# close further. In large language models, the study found the weight of the first token to fall;
# this toy, where everything is learned at once on an easy task, does not show it.
#
# The figure
# ----------
# Left and middle: where the weight goes, mean over three seeds; dots are the weight of the first
# token on each seed. Right: the gates of all unseen queries, three seeds
# together, and those of idle queries where there was no waste bin.

figure = None
if not tutorial.quick:
    plt = tutorial.pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6))
    names, colours = ("token of the class", "first token", "other tokens"), (GREEN, ORANGE, GREY)
    for ax, word in zip(axes, ("idle", "asking"), strict=False):
        means = {m: np.mean([one[word] for one in seeds], axis=0) for m, seeds in bars.items()}
        below = np.zeros(2)
        for i, (name, colour) in enumerate(zip(names, colours, strict=True)):
            height = np.array([means["softmax"][i], means["gated"][i]])
            ax.bar((0, 1), height, bottom=below, color=colour, width=0.6, label=name)
            below += height
        for i, seeds in enumerate(bars.values() if word == "idle" else ()):
            seen = [one[word][1] for one in seeds]
            ax.plot(i + np.array([-0.1, 0, 0.1]), seen, "o", color="black", markersize=4)
        ax.set_xticks((0, 1), ("softmax", "gated"))
        ax.grid(False, axis="x")
        ax.set(title=f"Where the weight goes: {word}", ylabel="mean weight", ylim=(0, 1.05))
    for (word, values), colour in zip(gates.items(), (BLUE, GREEN, RED), strict=True):
        values = np.concatenate(values)
        density, edges = np.histogram(values, bins=40, range=(0, 1))
        axes[2].stairs(density / len(values), edges, color=colour, label=word, fill=True, alpha=0.7)
    axes[2].set(title="Gates", xlabel="gate", ylabel="share of queries", ylim=(0, 1.05))
    axes[2].legend(loc="upper right")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)

# %%
# Exercises
# ---------
# **1. Write this backward yourself.** Given ``dy`` (T, E), the *gated* output ``y`` (T, E), the
# gates ``s``, (T, 1) or (T, E), the tokens ``x`` (T, C) and ``w_g``, (C, 1) or (C, E): return
# ``dx`` and ``dw_g``. It is tried with one gate for the head and with one for each number.


def my_backward(dy, y, s, x, w_g):
    """Return dx, shape (T, C), and dw_g, the shape of w_g."""
    # solution: return None, None
    dg = dy * y - s * dy * y
    if s.shape[1] == 1:  # one logit for all numbers of the head
        dg = dg @ np.ones((y.shape[1], 1))
    return np.einsum("te,ce->tc", dg, w_g), np.einsum("tc,te->ce", x, dg)
    # end of solution


fresh, answer, expected = np.random.default_rng(7), {}, {}
for kind, columns in (("head-wise", 1), ("element-wise", 2)):
    shapes = ((4, 3), (6, 3), (6, 2), (4, 5), (5, columns))
    given = [fresh.standard_normal(shape) for shape in shapes]
    y, cache = spec.forward(*given)
    dy = fresh.standard_normal((4, 2))
    right, mine = spec.backward(dy, cache), my_backward(dy, y, cache.gate, *given[3:])
    answer |= {f"{name}, {kind}": part for name, part in zip(("x", "w_g"), mine, strict=True)}
    expected |= {f"{name}, {kind}": right[name] for name in ("x", "w_g")}
tutorial.exercise(1, answer, expected)

# %%
# **2. A sink is a gate, a gate is no sink.** Show that a gate with the logit
# :math:`\lambda_t - b`, where :math:`\lambda` is the log-sum-exp of the row, is a sink with logit b
# (``normalizers/sink``). Which of the two can know that nothing was found?

# %%
# **Solution 2.** With a sink the weights are :math:`e^{z_s} / (e^b + e^\lambda)`. Split off the
# weights of softmax, :math:`e^{z_s} / e^\lambda`: the factor that is left,
# :math:`e^\lambda / (e^b + e^\lambda) = \sigma(\lambda - b)`, is the same for the whole row, a gate
# on the output. It knows what was found, because :math:`\lambda` is made of the scores. The gate
# (1) is computed from :math:`x_t` alone, before a single key has been looked at: it knows whether
# the token wants something, not whether there is something to be had.

rng = np.random.default_rng(5)
q, k, v = (rng.standard_normal((2, *shape)) for shape in ((5, 4), (7, 4), (7, 3)))
lse = softmax.forward(q, k, v)[1].lse[..., None]
mine, _ = spec.forward(q, k, v, lse - 0.7, np.ones((1, 1)))
sunk, _ = attention_ref.get("normalizers/sink").forward(q, k, v, 0.7)
tutorial.check("exercise 2: gate and sink", np.max(np.abs(mine - sunk)), 32 * EPS)

# %%
# **3. What a gate does to rank.** Without a gate the map from values to output is
# :math:`v \mapsto p\, v W_O`. Show that the gated head is still linear in v when x is held fixed,
# but not in x when :math:`v = x W_V`, not even with a single token, where p = 1. Without the gate
# :math:`x \mapsto x W_V W_O` is a linear map of rank at most E. What is left of this?

# %%
# **Solution 3.** :math:`o = (s \odot p\, v) W_O` with fixed s: two values added give two outputs
# added. With one token, :math:`o(x) = (\sigma(x W_g) \odot x W_V) W_O`, so :math:`o(2x) =
# 2\, (\sigma(2 x W_g) \odot x W_V) W_O`, which is :math:`2\, o(x)` only where the gates do not
# change. No matrix in place of :math:`W_V W_O` does this. The outputs still lie in the E dimensions
# that the rows of :math:`W_O` span; what is no longer linear is the way there.

rng = np.random.default_rng(6)
tokens = rng.standard_normal((50, 4))
w_v, w_g, w_o = (rng.standard_normal(shape) for shape in ((4, 2), (4, 2), (2, 4)))
single, double = (
    np.concatenate([spec.forward(a, a, a @ w_v, a, w_g, w_o)[0] for a in factor * tokens[:, None]])
    for factor in (1, 2)
)
print(f"exercise 3: |o(2x) - 2 o(x)| is up to {np.max(np.abs(double - 2 * single)):.3f}")
sizes = np.linalg.svd(single, compute_uv=False)
tutorial.check("exercise 3: the outputs have rank E = 2", sizes[2] / sizes[0], 64 * EPS)
matrix, *_ = np.linalg.lstsq(tokens, single)
missed = np.linalg.norm(tokens @ matrix - single) / np.linalg.norm(single)
print(f"exercise 3: the best linear map from x misses {missed:.0%} of the outputs")

# %%
tutorial.finish(figure)
