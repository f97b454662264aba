r"""
Multi-query and grouped-query attention
=======================================

**The question.** A language model writes one token at a time, and at every step it reads the keys
and values of all tokens before: those of every head in every layer. They fill the memory, and
reading them takes longer than computing with them. Do all heads need keys and values of their
own?

**The idea.** Heads differ in what they *ask*. Let every head keep its own queries, but let
several heads share one set of keys and values. With a single set for all heads this is
*multi-query* attention; with a set for each group of heads, *grouped-query* attention.

You need to know softmax attention (``scores/dot_product``) and that a layer runs it several times
side by side, in heads.
"""

# %%
# Definition
# ----------
# There are :math:`H` heads of queries, :math:`q_h` of shape :math:`(T, D)`, and :math:`G` heads
# of keys and values, :math:`k_g` of shape :math:`(S, D)` and :math:`v_g` of shape :math:`(S, E)`.
# :math:`G` divides :math:`H`. Consecutive heads share:
#
# .. math::
#
#    g(h) &= \lfloor h / (H / G) \rfloor                                                &(1)\\
#    z_{hts} &= \kappa \tanh(c\, q_{ht} \cdot k_{g(h) s} / \kappa) + b_{hts}            &(2)\\
#    p_{hts} &= e^{z_{hts}} / \textstyle\sum_{s'} e^{z_{hts'}}                          &(3)\\
#    o_{ht} &= \textstyle\sum_s p_{hts}\, v_{g(h) s}                                    &(4)
#
# Softcap :math:`\kappa`, bias :math:`b` and mask are those of softmax attention, one for each
# query head if you like. :math:`G = H` is the attention that you know, :math:`G = 1` is
# multi-query attention.

import math

import numpy as np

import attention_ref
from attention_ref.kit.tutorial import BLUE, GREEN, GREY, ORANGE, Tutorial
from attention_ref.methods.heads.multi_query import multi_query_cache_bytes, multi_query_convert

tutorial = Tutorial(__file__)
spec = attention_ref.get("heads/multi_query")
softmax = attention_ref.get("scores/dot_product")
EPS = np.finfo(np.float64).eps

# %%
# An example by hand
# ------------------
# Four heads, one query each (a single number): :math:`q = (0, 1, 1, -1)`. Two groups with two
# keys and two values each:
#
# .. math::
#
#    k_0 = (0,\ \ln 3),\quad v_0 = (0,\ 4), \qquad k_1 = (\ln 7,\ 0),\quad v_1 = (8,\ 16).
#
# By (1) heads 0 and 1 read group 0, heads 2 and 3 read group 1. Head 0 scores :math:`(0, 0)`:
# weights :math:`(\tfrac12, \tfrac12)`, output 2. Head 1 scores :math:`(0, \ln 3)`, exponentials
# :math:`(1, 3)`: weights :math:`(\tfrac14, \tfrac34)`, output 3. Head 2: exponentials
# :math:`(7, 1)`, weights :math:`(\tfrac78, \tfrac18)`, output :math:`7 + 2 = 9`. Head 3 has the
# opposite query: :math:`(\tfrac17, 1)`, weights :math:`(\tfrac18, \tfrac78)`, output
# :math:`1 + 14 = 15`.

q = np.array([0.0, 1.0, 1.0, -1.0]).reshape(4, 1, 1)
k = np.array([[0.0, math.log(3)], [math.log(7), 0.0]]).reshape(2, 2, 1)
v = np.array([[0.0, 4.0], [8.0, 16.0]]).reshape(2, 2, 1)

out, cache = spec.forward(q, k, v)
print("weights", cache.p[:, 0].round(4).tolist())
print("outputs", out.round(4).ravel().tolist())
tutorial.check("outputs are 2, 3, 9, 15", np.max(np.abs(out.ravel() - [2, 3, 9, 15])), 32 * EPS)

# %%
# The forward, without copies
# ---------------------------
# The obvious program repeats every key head :math:`H/G` times and calls ordinary attention. Then
# the memory that we wanted to save is spent again. The better program gives the *queries* one
# more axis: :math:`(H, T, D)` is seen as :math:`(G, H/G, T, D)`, the keys as
# :math:`(G, 1, S, D)`, and broadcasting does (1). Reshaping costs nothing: no number moves.


def grouped(q, k, v, c):
    """Steps (1) to (4) without softcap, bias and mask; returns the output and the weights."""
    H, T, D = q.shape
    G = k.shape[0]
    q = q.reshape(G, H // G, T, D)  # (1)
    z = c * q @ k[:, None].transpose(0, 1, 3, 2)  # (2)
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    p = e / e.sum(axis=-1, keepdims=True)  # (3)
    out = p @ v[:, None]  # (4)
    return out.reshape(H, T, -1), p


rng = np.random.default_rng(0)
H, G, T, S, D, E, c = 6, 2, 4, 5, 3, 2, 0.7
q, k, v = (rng.standard_normal(s) for s in ((H, T, D), (G, S, D), (G, S, E)))
out, p = grouped(q, k, v, c)
library, cache = spec.forward(q, k, v, scale=c)
tutorial.check("forward against the library", np.max(np.abs(out - library)), 8 * EPS)
wide, wide_cache = softmax.forward(q, np.repeat(k, H // G, 0), np.repeat(v, H // G, 0), scale=c)
tutorial.check("and against repeated keys", np.max(np.abs(out - wide)), 8 * EPS)

# %%
# The backward, line by line
# --------------------------
# Nothing is new within a head, so what changes? Only *who* uses a key. A key :math:`k_{gs}`
# appears in the scores of all heads of its group, so its gradient is a sum over them.
#
# **(4')** In :math:`o_{hte} = \sum_s p_{hts} v_{g(h) s e}` the value :math:`v_{gse}` appears for
# every query :math:`t` of every head with :math:`g(h) = g`:
#
# .. math::
#
#    dv_{gse} = \sum_{h:\, g(h) = g}\ \sum_t p_{hts}\, do_{hte},
#    \qquad dp_{hts} = \sum_e do_{hte}\, v_{g(h) s e} .
#
# **(3')** The softmax of each head by itself: :math:`dz = p\,(dp - \sum_s p\, dp)`.
#
# **(2')** The query belongs to one head, the key to the group:
#
# .. math::
#
#    dq_{ht} = c \sum_s dz_{hts}\, k_{g(h) s},
#    \qquad dk_{gs} = c \sum_{h:\, g(h) = g}\ \sum_t dz_{hts}\, q_{ht} .
#
# **(1')** Reshape :math:`dq` back to :math:`H` heads. Two remarks. Broadcasting forwards is
# summing backwards; that is a rule worth remembering. And the sum over :math:`h` and :math:`t`
# together is one matrix product, if the :math:`H/G \cdot T` queries of a group are seen as the
# rows of one table: for its keys, a group of heads is *one* head with more queries.


def grouped_backward(dout, q, k, v, p, c):
    """Steps (4') to (1')."""
    H, T, D = q.shape
    G = k.shape[0]
    dout = dout.reshape(G, H // G, T, -1)
    dp = dout @ v[:, None].transpose(0, 1, 3, 2)  # (4')
    dv = np.sum(p.transpose(0, 1, 3, 2) @ dout, axis=1)
    dz = p * (dp - np.sum(p * dp, axis=-1, keepdims=True))  # (3')
    dq = c * dz @ k[:, None]  # (2')
    dk = c * np.sum(dz.transpose(0, 1, 3, 2) @ q.reshape(G, H // G, T, D), axis=1)
    return {"q": dq.reshape(H, T, D), "k": dk, "v": dv}  # (1')


dout = rng.standard_normal(out.shape)
ours, theirs = grouped_backward(dout, q, k, v, p, c), spec.backward(dout, cache)
repeated = softmax.backward(dout, wide_cache)
for name in ours:
    error = np.max(np.abs(ours[name] - theirs[name]))
    tutorial.check(f"d{name} from the board against the library", error, 64 * EPS)
for name in "kv":
    summed = repeated[name].reshape(G, H // G, *repeated[name].shape[1:]).sum(axis=1)
    error = np.max(np.abs(ours[name] - summed))
    tutorial.check(f"d{name} is the sum over repeated heads", error, 64 * EPS)

# %%
# *The example backwards*, for :math:`L` the sum of the outputs. The values collect weights:
# :math:`dv_0 = (\tfrac12 + \tfrac14,\ \tfrac12 + \tfrac34)`,
# :math:`dv_1 = (\tfrac78 + \tfrac18,\ \tfrac18 + \tfrac78) = (1, 1)`. With
# :math:`dz = p\,(v - o)` heads 2 and 3 get the same :math:`dz = (-\tfrac78, \tfrac78)`, but their
# queries are opposite, so in :math:`dk_1` they cancel: two heads that want opposite things from a
# shared key leave it where it is. This is what sharing costs.

small = {
    "q": np.array([0.0, 1.0, 1.0, -1.0]).reshape(4, 1, 1),
    "k": np.array([[0.0, math.log(3)], [math.log(7), 0.0]]).reshape(2, 2, 1),
    "v": np.array([[0.0, 4.0], [8.0, 16.0]]).reshape(2, 2, 1),
}
_, small_cache = spec.forward(**small)
gradient = spec.backward(np.ones((4, 1, 1)), small_cache)
by_hand = {"v": [[0.75, 1.25], [1, 1]], "k": [[-0.75, 0.75], [0, 0]]}
for name, expected in by_hand.items():
    error = np.max(np.abs(gradient[name][..., 0] - expected))
    tutorial.check(f"d{name} of the example", error, 32 * EPS)

# %%
# Four roads to the same gradient, with a bias of its own for every query head, a causal mask, and
# more keys than queries:

tutorial.gradients(
    spec,
    {"q": q, "k": k, "v": v, "bias": rng.standard_normal((H, T, S))}
    | {"causal": True, "softcap": 1.5},
)

# %%
# What it saves
# -------------
# For each past token a layer keeps :math:`G` keys and :math:`G` values. In bytes, for :math:`N`
# layers, width :math:`D` and numbers of 2 bytes: :math:`2 \cdot N \cdot G \cdot D \cdot 2`. The
# queries are used once and forgotten.

GROUPS = (32, 16, 8, 4, 2, 1)
kib = [multi_query_cache_bytes(layers=32, groups=g, width=128) / 1024 for g in GROUPS]
for g, size in zip(GROUPS, kib, strict=True):
    print(f"32 layers, D = 128, G = {g:2}: {size:5.0f} KiB a token, {size * 8:5.0f} MiB "
          "for 8192 tokens")  # fmt: skip
tutorial.check("512, 128 and 16 KiB", abs(kib[0] - 512) + abs(kib[2] - 128) + abs(kib[5] - 16), 0)

# %%
# Experiment: converting a trained model
# --------------------------------------
# Nobody wants to train a large model again. Ainslie et al. convert it: the projections
# :math:`W_k, W_v` of the heads of a group are replaced by their **mean**, and some further
# training repairs the rest. They compare with keeping the **first** head of each group and with
# **random** new matrices. How much is lost before any training?
#
# We can say in advance what to expect. Let the heads come in clusters,
# :math:`W_h = M_{g(h)} + \sigma N_h` with independent standard normal :math:`N_h`, and :math:`n`
# heads in a cluster. From the mean of its group a head differs by :math:`\sigma (N_h - \bar N)`,
# whose entries have the variance :math:`\sigma^2 (1 - \tfrac1n)`. From the first head it differs
# by :math:`\sigma (N_h - N_1)`, with variance :math:`2 \sigma^2` for the :math:`n - 1` others and
# 0 for the first itself: on average :math:`2 \sigma^2 (1 - \tfrac1n)`, twice as much, for every
# :math:`n`. As long as the outputs depend on the matrices nearly linearly, their errors should
# stand in the ratio :math:`1/\sqrt2 \approx 0.71`. With groups larger than the clusters all bets
# are off: the mean of unlike heads is like none of them.

tutorial.claim(
    "Converting multi-head attention whose heads come in clusters to one key head a cluster "
    "by the mean loses less than keeping one head of each, and less than random heads.",
    criterion="8 heads in 4 clusters of 2, converted to G = 4: on each of three seeds the relative "
    "error of the outputs by the mean is at most 0.85 times that by the first head, and that by "
    "the first head at most 0.85 times that by random matrices",
)

HEADS, WIDTH, SIGMA = 8, 32, 0.4


def draw(rng, clusters=4):
    """Projections (H, C, D) of heads in clusters, entries of variance (1 + sigma^2) / C."""
    middle = np.repeat(rng.standard_normal((clusters, WIDTH, 8)), HEADS // clusters, axis=0)
    return (middle + SIGMA * rng.standard_normal(middle.shape)) / math.sqrt(WIDTH)


def convert(rng, w, groups, how):
    """The projections of G groups from those of H heads."""
    if how == "mean":
        return multi_query_convert(w, groups)
    if how == "first head":
        return w[:: HEADS // groups]
    return rng.standard_normal((groups, *w.shape[1:])) * np.std(w)


def loss_of_conversion(seed, groups, how):
    """Relative distance of the outputs before and after, over 16 random sequences."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((16, 1, 40, WIDTH))
    wq = rng.standard_normal((HEADS, WIDTH, 8)) / math.sqrt(WIDTH)
    wk, wv = draw(rng), draw(rng)
    before, _ = spec.forward(x @ wq, x @ wk, x @ wv, causal=True)
    wk, wv = (convert(rng, w, groups, how) for w in (wk, wv))
    after, _ = spec.forward(x @ wq, x @ wk, x @ wv, causal=True)
    return float(np.linalg.norm(after - before) / np.linalg.norm(before))


WAYS, TO = ("mean", "first head", "random"), (8, 4, 2, 1)
table = {
    how: np.array([[loss_of_conversion(seed, g, how) for g in TO] for seed in range(3)])
    for how in WAYS
}
for how in WAYS:
    row = ", ".join(f"G = {g}: {x:.3f}" for g, x in zip(TO, table[how].mean(axis=0), strict=True))
    print(f"{how:10} {row}")
records = [{how: table[how][seed, TO.index(4)] for how in WAYS} for seed in range(3)]
held = all(
    r["mean"] <= 0.85 * r["first head"] and r["first head"] <= 0.85 * r["random"] for r in records
)
ratio = np.mean([r["mean"] / r["first head"] for r in records])
print(f"mean / first head: {ratio:.3f}; expected near {1 / math.sqrt(2):.3f}")
tutorial.measured(ours=records, verdict="reproduced" if held else "not reproduced", tolerance=0.02)

# %%
# The figure
# ----------
# Left: who reads whom for :math:`H = 8`. Middle: what a token of the past costs. Right: the error
# of the conversion; the clusters have two heads, so :math:`G = 4` is the last honest step.

figure = None
if not tutorial.quick:
    plt = tutorial.pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(11.5, 3.9), width_ratios=(1, 1, 1.15))
    for row, groups in enumerate((8, 4, 2, 1)):
        base = -row * 1.6
        middle = (np.arange(groups) + 0.5) * 8 / groups - 0.5
        for head in range(8):
            axes[0].plot([head, middle[head * groups // 8]], [base, base - 0.7], color=GREY,
                         linewidth=1)  # fmt: skip
        axes[0].plot(range(8), [base] * 8, "o", color=BLUE, label="query heads" * (row == 0))
        axes[0].plot(middle, [base - 0.7] * groups, "s", color=ORANGE, markersize=7,
                     label="key and value heads" * (row == 0))  # fmt: skip
        axes[0].text(8, base - 0.35, f"G = {groups}", va="center")
    axes[0].set(title="Who reads whom", xlim=(-0.6, 10), ylim=(-6, 1.6))
    axes[0].axis("off")
    axes[0].legend(loc="upper left", ncols=2, fontsize=8, columnspacing=0.8, handletextpad=0.2)

    axes[1].bar(range(len(GROUPS)), kib, color=ORANGE, width=0.6)
    for place, size in enumerate(kib):
        axes[1].text(place, size + 6, f"{size:.0f}", ha="center", fontsize=9)
    axes[1].set_xticks(range(len(GROUPS)), GROUPS)
    axes[1].grid(False, axis="x")
    axes[1].set(title="Keys and values of one token", ylabel="KiB, 32 layers, D = 128, 2 bytes",
                xlabel="G, for H = 32")  # fmt: skip

    for how, colour in zip(WAYS, (GREEN, BLUE, GREY), strict=True):
        axes[2].plot(range(4), table[how].T, "o", color=colour, markersize=3.5, alpha=0.6)
        axes[2].plot(range(4), table[how].mean(axis=0), color=colour, label=how)
    axes[2].set_xticks(range(4), TO)
    axes[2].set(title="Error of the conversion", xlabel="G, from H = 8 in 4 clusters",
                ylabel="relative error of the outputs", ylim=(0, None))  # fmt: skip
    axes[2].legend(loc="lower right")

# %%
# Exercises
# ---------
# **1. Write this backward yourself.** Close the derivation above and fill in the function, without
# softcap, bias and mask. ``dout`` is (H, T, E), ``p`` (H, T, S); ``q``, ``k`` and ``v`` have the
# shapes of the definition. (It is shortest head by head.)


def my_backward(dout, q, k, v, p, c):
    """Return dq (H, T, D), dk (G, S, D) and dv (G, S, E)."""
    # solution: return None, None, None
    dq, dk, dv = (np.zeros_like(x) for x in (q, k, v))
    for h in range(len(q)):
        g = h * len(k) // len(q)  # who is asked
        dp = dout[h] @ v[g].T
        dz = c * p[h] * (dp - np.einsum("ts,ts->t", p[h], dp)[:, None])
        dq[h] = dz @ k[g]
        dk[g] += dz.T @ q[h]
        dv[g] += p[h].T @ dout[h]
    return dq, dk, dv
    # end of solution


fresh = np.random.default_rng(7)
given = {name: fresh.standard_normal(shape)
         for name, shape in (("q", (6, 4, 7)), ("k", (3, 5, 7)), ("v", (3, 5, 2)))}  # fmt: skip
up = fresh.standard_normal((6, 4, 2))
_, cache = spec.forward(**given, scale=0.5)
answer = dict(zip("qkv", my_backward(up, **given, p=cache.p, c=0.5), strict=True))
tutorial.exercise(1, answer, spec.backward(up, cache))

# %%
# **2. One head with more queries.** For :math:`G = 1` show that the :math:`H \cdot T` queries can
# be stacked into a single head without changing any output. Why does this need no mask, and what
# must happen to a causal mask?

# %%
# **Solution 2.** The output of a query depends on this query and on the keys and values, never on
# other queries: (2) to (4) work row by row. With :math:`G = 1` all rows of all heads see the same
# keys, so they may stand in one table in any order, and nothing has to be hidden. A causal mask
# knows a query by its row. Row :math:`hT + t` of the stack must get row t of the mask: repeat the
# mask H times, one below the other.

out, _ = spec.forward(q, k[:1], v[:1])
stacked, _ = softmax.forward(q.reshape(1, H * T, D), k[:1], v[:1])
error = np.max(np.abs(out - stacked.reshape(out.shape)))
tutorial.check("exercise 2: stacked queries", error, 8 * EPS)
past = np.arange(S) <= np.arange(T)[:, None] + (S - T)
out, _ = spec.forward(q, k[:1], v[:1], causal=True)
stacked, _ = softmax.forward(q.reshape(1, H * T, D), k[:1], v[:1], mask=np.tile(past, (H, 1)))
error = np.max(np.abs(out - stacked.reshape(out.shape)))
tutorial.check("exercise 2: with the mask repeated", error, 8 * EPS)

# %%
# **3. A wrong order.** Some programs share in turns, :math:`g(h) = h \bmod G`, instead of (1).
# Loading weights of one kind into a program of the other kind raises no error. Which permutation
# of the query heads repairs it, and what else must be permuted?

# %%
# **Solution 3.** Put together what shares a key: first all heads with :math:`h \bmod G = 0`, then
# those with 1, and so on. At place i then stands the head :math:`(i \bmod n)\, G + \lfloor i / n
# \rfloor` with :math:`n = H / G`, and (1) gives this place the group :math:`\lfloor i / n \rfloor`,
# which is that head modulo G. Permute the query projections of the heads, and in the same way the
# rows of the output projection that belong to them; keys and values stay where they are.

turns, _ = softmax.forward(q, np.tile(k, (H // G, 1, 1)), np.tile(v, (H // G, 1, 1)))
order = np.arange(H).reshape(H // G, G).T.ravel()
repaired, _ = spec.forward(q[order], k, v)
error = np.max(np.abs(repaired - turns[order]))
tutorial.check("exercise 3: permuted heads", error, 8 * EPS)

# %%
tutorial.finish(figure)
