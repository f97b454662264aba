r"""
Relative position scores
========================

**The question.** Attention does not know where its tokens stand. The first transformers added a
vector of the place to every token: one learned for place 0, one for place 1, and so on. What such
a model knows about place 70 it must have seen at place 70. But what a head wants to say is rarely
"the token at 67"; it is "the token three places back".

**The idea.** Let the score see the *difference* of the two places, and nothing else of them. Three
ways to do so shaped the field: Shaw, Uszkoreit and Vaswani (2018) learn a vector for each clipped
distance and add it to the key; Transformer-XL (Dai et al. 2019) projects a sinusoid of the
distance; T5 (Raffel et al. 2020) adds one learned number for each bucket of distances. They are
one formula with different parts left out.

You need ``scores/dot_product``; ``scores/alibi`` is the relative with nothing to learn.
"""

# %%
# Definition
# ----------
# Query :math:`t` and key :math:`s` stand :math:`r_{ts} = s - t - a` tokens apart, with
# :math:`a = S - T`: the last query stands at the last key. A table has :math:`N` entries, and
# every pair an index :math:`i_{ts}` into it:
#
# .. math::
#
#    i_{ts} &= \text{index of the distance } r_{ts}                                          &(1)\\
#    g_{tn} &= c\, (q_t + w) \cdot \rho_n + \beta_n                                          &(2)\\
#    z_{ts} &= c\, (q_t + u) \cdot k_s + g_{t, i_{ts}}                                       &(3)\\
#    p_{ts} &= e^{z_{ts}} / \textstyle\sum_{s'} e^{z_{ts'}}, \qquad
#    P_{tn} = \textstyle\sum_{s:\, i_{ts} = n} p_{ts}                                        &(4)\\
#    o_t    &= \textstyle\sum_s p_{ts}\, v_s + \sum_n P_{tn}\, a^V_n                         &(5)
#
# =============== ==================================== ===================== =====================
# variant         index                                rows                  besides
# =============== ==================================== ===================== =====================
# shaw            r clipped to [-K, K], plus K         rho = aK, learned     aV, learned
# transformer_xl  one for every distance               rho = R Wr, R a       u and w, learned
#                                                      sinusoid
# t5              a bucket                             none                  beta, learned; c = 1
# =============== ==================================== ===================== =====================
#
# (2) asks each query once for its opinion on every distance, (3) looks it up for every key. The
# sum :math:`P_{tn}` in (4) collects the weight that a query spends on distance :math:`n`; it is
# the lookup turned round.

import math

import numpy as np

import attention_ref
from attention_ref import nn
from attention_ref.kit.tutorial import BLUE, GREEN, GREY, ORANGE, Tutorial
from attention_ref.methods.scores.relative_bias import t5_bucket
from attention_ref.nn.model import cross_entropy
from attention_ref.nn.train import train

tutorial = Tutorial(__file__)
spec = attention_ref.get("scores/relative_bias")
EPS = np.finfo(np.float64).eps

# %%
# The buckets of T5
# -----------------
# T5 has 32 numbers for all distances. In one direction half of the buckets belong to one distance
# each; the other half widen in equal steps of the logarithm, and everything from 128 tokens on
# shares the last one.

for r in (-200, -64, -20, -8, -1, 0, 1, 8, 128):
    both, past = (int(t5_bucket(np.array(r), bidirectional=b)) for b in (True, False))
    print(f"key {r:4d} tokens from the query: bucket {both:2d}, in a causal model {past:2d}")

# %%
# An example by hand
# ------------------
# Shaw, one query :math:`q = 1` at the second of two keys, both keys 0, :math:`c = 1`,
# :math:`K = 1`. The distances are :math:`-1` and :math:`0`, their indices 0 and 1. With
# :math:`a^K = (0, \ln 3, \cdot)` the scores are 0 and :math:`\ln 3`, the weights
# :math:`\tfrac14, \tfrac34`. With :math:`v = (4, 8)` and :math:`a^V = (2, 0, \cdot)` the output is
# :math:`\tfrac14 (4 + 2) + \tfrac34 (8 + 0) = 7.5`.

small = {
    "q": np.array([[1.0]]),
    "k": np.zeros((2, 1)),
    "v": np.array([[4.0], [8.0]]),
    "aK": np.array([[0.0], [math.log(3)], [9.0]]),
    "aV": np.array([[2.0], [0.0], [9.0]]),
}
out, small_cache = spec.forward(**small, causal=True, scale=1.0)
print("index", small_cache.place.tolist(), "weights", small_cache.p.round(4).tolist())
tutorial.check("the output is 7.5", abs(out.item() - 7.5), 32 * EPS)

# %%
# The forward
# -----------


def forward(q, k, v, u, w, rows, beta, aV, place, c, live):
    """Steps (2) to (5) for one head; everything that a variant lacks is zero."""
    T, N = len(q), len(rows)
    g = c * (q + w) @ rows.T + beta  # (2)
    z = c * (q + u) @ k.T + np.take_along_axis(g, place, axis=1)  # (3)
    z = np.where(live, z, -np.inf)
    e = np.exp(z - z.max(axis=1, keepdims=True))
    p = e / e.sum(axis=1, keepdims=True)  # (4)
    P = np.zeros((T, N))
    np.add.at(P, (np.arange(T)[:, None], place), p)
    return p @ v + P @ aV, p, P  # (5)


rng = np.random.default_rng(0)
T, S, D, E, K, M = 4, 6, 3, 2, 2, 4
q, k, v = rng.standard_normal((T, D)), rng.standard_normal((S, D)), rng.standard_normal((S, E))
aK, aV = rng.standard_normal((2 * K + 1, D)), rng.standard_normal((2 * K + 1, E))
r = np.arange(S) - np.arange(T)[:, None] - (S - T)
live, c, nil = r <= 0, 0.6, np.zeros(D)
place = np.clip(r, -K, K) + K  # (1)
out, p, P = forward(q, k, v, nil, nil, aK, 0.0, aV, place, c, live)
library, cache = spec.forward(q, k, v, aK, aV, causal=True, scale=c)
tutorial.check("shaw against the library", np.max(np.abs(out - library)), 8 * EPS)

Wr, u, w = rng.standard_normal((M, D)), rng.standard_normal(D), rng.standard_normal(D)
distance = np.arange(T + S - 1) - (T - 1)  # of the rows: T - 1 ahead to S - 1 back
angle = distance[:, None] / 10000 ** (np.arange(0, M, 2) / M)
R = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
xl, _, _ = forward(q, k, v, u, w, R @ Wr, 0.0, np.zeros((T + S - 1, E)), T - 1 - r, c, live)
kwargs = {"Wr": Wr, "u": u, "w": w, "variant": "transformer_xl", "causal": True, "scale": c}
error = np.max(np.abs(xl - spec.forward(q, k, v, **kwargs)[0]))
tutorial.check("Transformer-XL against the library", error, 32 * EPS)

beta = rng.standard_normal(8)
bucket = t5_bucket(r, 8, 6, bidirectional=False)
t5, _, _ = forward(q, k, v, nil, nil, np.zeros((8, D)), beta, np.zeros((8, E)), bucket, 1.0, live)
kwargs_t5 = {"table": beta, "variant": "t5", "causal": True, "max_distance": 6}
error = np.max(np.abs(t5 - spec.forward(q, k, v, **kwargs_t5)[0]))
tutorial.check("T5 against the library", error, 32 * EPS)

# %%
# The backward, line by line
# --------------------------
# **(5')** Two mixtures: :math:`dv = p^\top do` and :math:`dp_{ts} = do_t \cdot v_s`; likewise
# :math:`da^V = P^\top do` and :math:`dP_{tn} = do_t \cdot a^V_n`.
#
# **(4')** :math:`P` is a sum of weights, so each weight receives what its index received:
# :math:`dp_{ts} \leftarrow dp_{ts} + dP_{t, i_{ts}}`, a lookup. Then the softmax:
# :math:`dz = p\,(dp - \sum_s p\, dp)`.
#
# **(3')** The content part is that of every dot product,
# :math:`dk = c\, dz^\top (q + u)`, :math:`dq = c\, dz\, k`, :math:`du = \sum_t dq_t`. The lookup
# turns into the sum: :math:`dg_{tn} = \sum_{s:\, i_{ts} = n} dz_{ts}`.
#
# **(2')** Another dot product: :math:`d\rho = c\, dg^\top (q + w)`,
# :math:`dq \leftarrow dq + c\, dg\, \rho`, :math:`dw = \sum_t c\, dg_t\, \rho`, and
# :math:`d\beta_n = \sum_t dg_{tn}`.
#
# **(1')** The index has no gradient. For Transformer-XL :math:`dW_r = R^\top d\rho`.
#
# Lookup and sum are each other's transposes: (4) sums and (4') looks up, (3) looks up and (3')
# sums.


def backward(dout, q, k, v, rows, aV, place, c, p, P):
    """Steps (5') to (2') with u = w = 0."""
    rowwise = np.arange(len(q))[:, None], place
    dv, dp = p.T @ dout, dout @ v.T  # (5')
    daV, dP = P.T @ dout, dout @ aV.T
    dp = dp + np.take_along_axis(dP, place, axis=1)  # (4')
    dz = p * (dp - np.sum(p * dp, axis=1, keepdims=True))
    dq, dk = c * dz @ k, c * dz.T @ q  # (3')
    dg = np.zeros(P.shape)
    np.add.at(dg, rowwise, dz)
    return {"q": dq + c * dg @ rows, "k": dk, "v": dv, "aK": c * dg.T @ q, "aV": daV}  # (2')


dout = rng.standard_normal((T, E))
theirs = spec.backward(dout, cache)
for name, ours in backward(dout, q, k, v, aK, aV, place, c, p, P).items():
    error = np.max(np.abs(ours - theirs[name]))
    tutorial.check(f"d{name} from the board against the library", error, 64 * EPS)

# %%
# *The example backwards*, :math:`L = o`: :math:`dp = (4 + 2,\ 8 + 0)`, whose mean under the
# weights is 7.5, so :math:`dz = (\tfrac14 (6 - 7.5),\ \tfrac34 (8 - 7.5)) = (-\tfrac38,
# \tfrac38)`. Each index stands once: :math:`da^K = (-\tfrac38, \tfrac38, 0)` and :math:`da^V =
# (\tfrac14, \tfrac34, 0)`.

gradient = spec.backward(np.ones((1, 1)), small_cache)
for name, want in {"aK": [-3 / 8, 3 / 8, 0.0], "aV": [1 / 4, 3 / 4, 0.0]}.items():
    error = np.max(np.abs(gradient[name][:, 0] - want))
    tutorial.check(f"d{name} of the example", error, 32 * EPS)

# %%
# Four roads to the same gradient, for each variant:

content = {"q": q, "k": k, "v": v}
for variant, given in {
    "shaw": {"aK": aK, "aV": aV, "scale": c}, "transformer_xl": kwargs, "t5": kwargs_t5,
}.items():  # fmt: skip
    print(variant)
    tutorial.gradients(spec, content | given | {"variant": variant})

# %%
# Experiment: train short, test long
# ----------------------------------
# Sequences of 64 random tokens, 16 different ones; at every place the model must say which token
# stood three places back. One layer, two heads, width 32. Then the trained model reads 256 tokens.
# Nothing new happens there: three places back is three places back. A learned vector for place 200
# was never trained. A distance of three was.
#
# Of the three variants we claim for the plainest, T5 with its published 32 buckets and 128 tokens.
# (Pilots on other seeds showed that this half of the claim may fail; the threshold stayed. After
# a first run the steps for absolute positions and for Shaw were raised, because on one seed they
# had not learned the task at length 64.)

tutorial.claim(
    "A model with T5 buckets that learned at length 64 to repeat the token three places back "
    "keeps its accuracy at four times the length; learned absolute positions do not.",
    criterion="on each of three seeds both reach an accuracy of 0.99 at length 64; over the last "
    "32 of 256 tokens T5 buckets stay at 0.95 or more, absolute positions fall to 0.3 or less "
    "(chance is 1/16); one half of that is 'partly'",
)

TOKENS, BACK, LENGTH, LONG, HEADS, WIDTH = 16, 3, 64, 256, 2, 32


def model(which):
    """One layer with learned places, or with one of the three variants."""
    shape = {"vocabulary": TOKENS, "context": LONG, "width": WIDTH, "heads": HEADS, "layers": 1}
    d = WIDTH // HEADS
    extra = {
        "absolute": {},
        "t5": {"table": lambda rng, m: np.zeros((HEADS, 32))},
        "shaw": {"aK": lambda rng, m: rng.standard_normal((33, d)) / 4},
        "transformer_xl": {"Wr": lambda rng, m: rng.standard_normal((HEADS, d, d)) / 4}
        | {n: lambda rng, m: np.zeros((HEADS, d)) for n in "uw"},
    }[which]
    if which == "absolute":
        return nn.Model(**shape)
    options = {"variant": which}
    return nn.Model(**shape, key=spec.key, options=options, extra=extra, positions=False)


def right(net, parameters, tokens):
    """Where the token BACK places back was named: (B, T - BACK) of bool."""
    z = net.logits(parameters, tokens)
    return np.argmax(z, axis=-1)[:, BACK:] == tokens[:, :-BACK]


def learn(which, seed, steps):
    """Train at LENGTH; the model, its parameters, accuracy at LENGTH, and by place at LONG."""
    rng, net = np.random.default_rng(seed), model(which)
    batches = iter(lambda: (rng.integers(0, TOKENS, (8, LENGTH)),), None)

    def loss(parameters, tokens):
        return cross_entropy(net.logits(parameters, tokens)[:, BACK:], tokens[:, :-BACK])

    parameters, _ = train(loss, net.initial(rng), batches, steps=steps, rate=1e-2, label=which)
    short, long = (rng.integers(0, TOKENS, (16, n)) for n in (LENGTH, LONG))
    return net, parameters, np.mean(right(net, parameters, short)), long


STEPS = {"absolute": 300, "t5": 300, "shaw": 300, "transformer_xl": 100}
by_place, tables, records = {which: [] for which in STEPS}, [], []
for seed in range(3) if not tutorial.quick else ():
    record = {}
    for which, steps in STEPS.items():
        net, parameters, short, long = learn(which, seed, steps)
        hit = right(net, parameters, long)
        by_place[which].append(np.mean(hit, axis=0))
        record |= {f"{which}, 64": short, f"{which}, last 32 of 256": np.mean(hit[:, -32:])}
        if which == "t5":
            tables.append(parameters["0.extra.table"])
            filled = tables[-1].copy()
            filled[:, 27:] = filled[:, 26:27]  # the buckets that no sequence of 64 tokens reaches
            hit = right(net, parameters | {"0.extra.table": filled}, long)
            record["t5, unseen buckets filled"] = np.mean(hit[:, -32:])
            record["t5, bias of 3 back above the rest"] = np.mean(
                filled[:, 3] - np.mean(np.delete(filled[:, :27], 3, axis=1), axis=1)
            )
    records.append(record)

if not tutorial.quick:
    learned = all(row[f"{n}, 64"] >= 0.99 for row in records for n in ("t5", "absolute"))
    keeps = learned and all(row["t5, last 32 of 256"] >= 0.95 for row in records)
    falls = learned and all(row["absolute, last 32 of 256"] <= 0.3 for row in records)
    verdict = {2: "reproduced", 1: "partly", 0: "not reproduced"}[keeps + falls]
    tutorial.measured(ours=records, verdict=verdict, tolerance=0.2)

# %%
# What is behind the numbers
# --------------------------
# Absolute positions are at chance beyond the places they were trained on. Shaw and Transformer-XL
# do not notice the length: what they reach at 64 tokens they reach at 256. T5 lies between, for two
# reasons that can be seen in its table (right panel):
#
# *Unseen buckets.* No pair of tokens of a sequence of 64 is more than 63 apart, so the buckets 27
# to 31 still have their initial bias of 0, while nearly all seen ones but that of distance 3 were
# pushed below. At length 256 most keys stand in those buckets, and each gets a larger bias than it
# should. Filling them with the bias of bucket 26, without training, shows how much that costs (the
# line "filled"); ``max_distance=64`` would have avoided it.
#
# *Dilution.* The rest is the softmax. The wanted key leads the others by a gap of :math:`\Delta`
# nats, so its weight is about :math:`1 / (1 + (n - 1)\, e^{-\Delta})`. The bias is one number that
# grows until the loss is small at 64 tokens, and no further; at 256 tokens four times as many
# keys share the rest. The other variants multiply with the query, and reach larger gaps sooner.

for row in records:
    gap = row["t5, bias of 3 back above the rest"]
    at = [1 / (1 + (n - 1) * math.exp(-gap)) for n in (LENGTH, LONG)]
    print(f"a gap of {gap:.1f} nats: weight {at[0]:.2f} among 64 keys, {at[1]:.2f} among 256")

# %%
# The figure
# ----------

figure = None
if not tutorial.quick:
    plt = tutorial.pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(11.5, 3.8))
    r = np.arange(0, 200)
    for two, colour, label in ((False, BLUE, "causal"), (True, ORANGE, "one of two directions")):
        axes[0].step(r, t5_bucket(-r, bidirectional=two), where="post", color=colour, label=label)
    axes[0].set(title="Buckets of T5", xlabel="tokens back", ylabel="bucket", ylim=(-1, 33))
    axes[0].axvline(128, color=GREY, linestyle=":")
    axes[0].legend(loc="lower right", frameon=True, framealpha=1, edgecolor="none")

    edges = np.arange(0, LONG - BACK + 1, 16)
    names = {"shaw": (GREEN, "Shaw"), "transformer_xl": (GREY, "Transformer-XL"),
             "t5": (BLUE, "T5 buckets"), "absolute": (ORANGE, "absolute")}  # fmt: skip
    for which, (colour, label) in names.items():
        share = np.mean(by_place[which], axis=0)
        binned = [np.mean(share[a : a + 16]) for a in edges[:-1]]
        dash = "--" if which == "transformer_xl" else "-"
        axes[1].plot(edges[:-1] + BACK + 8, binned, dash, color=colour, label=label, marker=".")
    axes[1].axvline(LENGTH, color="black", linestyle=":")
    axes[1].set(title="Trained at 64, read to 256", xlabel="place in the sequence (tokens)",
                ylabel="accuracy", ylim=(0, 1.08))  # fmt: skip
    axes[1].legend(loc="center right", bbox_to_anchor=(1, 0.72), fontsize=8)

    for table in tables:
        for head in range(HEADS):
            axes[2].plot(table[head], ".-", color=BLUE, alpha=0.5, linewidth=0.8)
    axes[2].axvspan(26.5, 31.5, color=ORANGE, alpha=0.2)
    axes[2].text(29, 1.0, "never\nseen", ha="center", fontsize=9)
    axes[2].set(title="T5 table after training", xlabel="bucket", ylabel="bias (nats)")

# %%
# Exercises
# ---------
# **1. Write this backward yourself.** For Shaw: given the gradient :math:`dz` of the scores, the
# queries, the table, the index of every pair and :math:`c`, return what the *distance part*
# :math:`c\, q_t \cdot a^K_{i_{ts}}` sends to the queries and to the table.


def my_backward(dz, q, aK, place, c):
    """Return dq and daK of the distance part."""
    # solution: return None, None
    picked = aK[place]  # one row a pair, (T, S, D)
    dq = c * np.einsum("ts,tsd->td", dz, picked)
    daK = np.zeros_like(aK)
    np.add.at(daK, place, c * dz[:, :, None] * q[:, None, :])
    return dq, daK
    # end of solution


fresh = np.random.default_rng(7)
q7, k7, v7 = (fresh.standard_normal(shape) for shape in ((4, 3), (5, 3), (5, 2)))
table7, bias7 = fresh.standard_normal((3, 3)), np.zeros((4, 5))
_, cache = spec.forward(q7, k7, v7, table7, bias=bias7, scale=0.5)
whole = spec.backward(fresh.standard_normal((4, 2)), cache)
distance_part = {"q": whole["q"] - 0.5 * whole["bias"] @ k7, "aK": whole["aK"]}
answer = my_backward(whole["bias"], q7, table7, cache.place, 0.5)
tutorial.exercise(1, dict(zip(("q", "aK"), answer, strict=True)), distance_part)

# %%
# **2. The trick of Transformer-XL.** For :math:`T = S` and a causal model, let column :math:`n` of
# a :math:`T \times T` matrix :math:`g` hold the distance :math:`T - 1 - n`. The official code
# never computes an index: it puts a column of zeros before :math:`g`, reads the :math:`T \times (T
# + 1)` numbers in order as a :math:`(T + 1) \times T` matrix, and drops its first row. Why does
# the entry :math:`(t, s)` then hold the distance :math:`t - s`? What stands above the diagonal?

# %%
# **Solution 2.** Entry :math:`(t, s)` after dropping a row is number :math:`(t + 1) T + s` in the
# order; in the padded matrix, with :math:`T + 1` numbers a row, that is row :math:`t`, column
# :math:`T + s - t` as long as :math:`s \le t`, because :math:`t (T + 1) + T + s - t = (t + 1) T +
# s`. Column :math:`T + s - t` of the padded matrix is column :math:`T - 1 - (t - s)` of :math:`g`,
# the distance :math:`t - s`. For :math:`s = t + 1` the zero of the next row stands there, further
# right the next row's own numbers: they belong to another query, and only the causal mask makes it
# harmless.

g = fresh.standard_normal((4, 4))
shifted = np.concatenate([np.zeros((4, 1)), g], axis=1).reshape(5, 4)[1:]
direct = np.array([[g[t, 3 - (t - s)] if s <= t else shifted[t, s] for s in range(4)]
                   for t in range(4)])  # fmt: skip
tutorial.check("exercise 2: below the diagonal", np.max(np.abs(shifted - direct)), 0.0)
tutorial.check("exercise 2: zeros beside it", np.max(np.abs(np.diagonal(shifted, 1))), 0.0)

# %%
# **3. How large must the gap be?** A head wants to spend half of its weight on one key; all others
# have equal scores. By how many nats must the key lead among :math:`n` keys? By how much must the
# lead grow from 64 to 256 keys, and why can a table of biases not do that by itself?

# %%
# **Solution 3.** :math:`1 / (1 + (n - 1) e^{-\Delta}) = \tfrac12` at
# :math:`\Delta = \ln (n - 1)`: 4.14 nats among 64 keys, 5.54 among 256, about :math:`\ln 4 = 1.39`
# more. The bias depends on the distance alone; it does not know :math:`n`. A scale that grows with
# :math:`\ln n`, or larger gaps from the start, would.

table = np.zeros(32)
table[3] = math.log(63)
for n, want in ((64, 0.5), (256, 63 / (63 + 255))):
    x = np.zeros((n, 1))
    _, cache = spec.forward(x[:1], x, x, table=table, variant="t5", causal=True)
    tutorial.check(f"exercise 3: weight among {n} keys", abs(cache.p[0, -4] - want), 32 * EPS)

# %%
tutorial.finish(figure)
