r"""
Re-weighted softplus attention
==============================

**The question.** A model is trained on a thousand tokens and then reads sixteen thousand. The token
that matters has the same score as before, but it now competes with sixteen times as many others.
A softmax gives every one of them something, and the sum of many small somethings buries the large
one. Can the weights be made so that a key which stands out keeps its weight?

**The idea.** Gao, Spratling and Gionfrida (2026) take the softmax apart. What it needs is a
positive function and a division by the sum; the exponential is only one choice. They take the
softplus of cosines, scaled by the logarithm of the number of keys (LSSA), and then add a second
stage: drop every key below the average of its row, and raise the rest to a power (LSSAR).

You need ``scores/dot_product``.
"""

# %%
# Definition
# ----------
# A query :math:`t` sees :math:`N_t` keys of width :math:`D`. With :math:`c = \ln D`,
#
# .. math::
#
#    \hat q_t &= q_t / \lVert q_t \rVert, \qquad \hat k_s = k_s / \lVert k_s \rVert          &(1)\\
#    z_{ts}   &= c\, \ln N_t\; \hat q_t \cdot \hat k_s                                       &(2)\\
#    a_{ts}   &= \ln(1 + e^{z_{ts}}) / \textstyle\sum_{s'} \ln(1 + e^{z_{ts'}})              &(3)\\
#    r_{ts}   &= \max(N_t\, a_{ts} - o_t,\, 0), \qquad
#    p_{ts} = r_{ts}^{m} / \textstyle\sum_{s'} r_{ts'}^{m}                                   &(4)\\
#    o^{out}_t &= \textstyle\sum_s p_{ts}\, v_s                                              &(5)
#
# A row of :math:`a` sums to 1, so a row of :math:`N a` has the mean 1, whatever :math:`N`: with
# :math:`o_t = 1`, (4) keeps exactly the keys above average. Rows of one, two or three keys keep
# all (:math:`o_t = 0`). The power :math:`m` is 3 or 15.

import math

import numpy as np

import attention_ref
from attention_ref.kit.tutorial import BLUE, GREEN, GREY, ORANGE, SKY, Tutorial

tutorial = Tutorial(__file__)
spec = attention_ref.get("normalizers/softplus_reweighted")
dot = attention_ref.get("scores/dot_product")
EPS = np.finfo(np.float64).eps

# %%
# An example by hand
# ------------------
# Softplus makes round numbers of logarithms: :math:`\ln(1 + e^0) = \ln 2` and
# :math:`\ln(1 + e^{\ln 7}) = \ln 8 = 3 \ln 2`. One query along the first axis, one key along it
# too, three along the second: the cosines are 1, 0, 0, 0. With :math:`c = \ln 7 / \ln 4` the
# scores are :math:`\ln 7, 0, 0, 0`, the softplus stands as 3 to 1 to 1 to 1, so
# :math:`a = (\tfrac12, \tfrac16, \tfrac16, \tfrac16)` and :math:`4 a = (2, \tfrac23, \tfrac23,
# \tfrac23)`: only the first key is above average, and (4) gives it everything. Without the offset
# the third powers stand as 27 to 1 to 1 to 1: :math:`p = (\tfrac9{10}, \tfrac1{30}, \tfrac1{30},
# \tfrac1{30})`.

small = {
    "q": np.array([[2.0, 0.0]]),
    "k": np.array([[5.0, 0.0], [0.0, 1.0], [0.0, 2.0], [0.0, -3.0]]),
    "v": np.array([[8.0], [0.0], [16.0], [-8.0]]),
    "scale": math.log(7) / math.log(4),
}
_, first = spec.forward(**small, power=None)
out, cache = spec.forward(**small)
_, kept = spec.forward(**small, few=4)
print("a", first.p.round(4).tolist(), "p", cache.p.tolist(), "no offset", kept.p.round(4).tolist())
error = np.max(np.abs(first.p - [1 / 2, 1 / 6, 1 / 6, 1 / 6]))
tutorial.check("the first stage", error, 4 * EPS)
tutorial.check("all on the first key", abs(out.item() - 8), 32 * EPS)
error = np.max(np.abs(kept.p - [9 / 10, 1 / 30, 1 / 30, 1 / 30]))
tutorial.check("27 to 1 to 1 to 1", error, 16 * EPS)

# %%
# The forward
# -----------


def attend(q, k, v, c, m, live, few=3):
    """Steps (1) to (5) for one head; the output and what the backward needs."""
    length_q, length_k = (np.linalg.norm(x, axis=1, keepdims=True) for x in (q, k))
    q, k = q / length_q, k / length_k  # (1)
    N = live.sum(axis=1, keepdims=True)
    z = c * np.log(N) * (q @ k.T)  # (2)
    s = np.where(live, np.log1p(np.exp(z)), 0.0)
    total = s.sum(axis=1, keepdims=True)
    a = s / total  # (3)
    r = np.maximum(N * a - (few < N), 0.0)
    u = r / r.max(axis=1, keepdims=True)
    p = u**m / np.sum(u**m, axis=1, keepdims=True)  # (4)
    return p @ v, (q, k, length_q, length_k, N, z, total, a, r, p)  # (5)


# %%
# The largest :math:`r` of a row is divided out before the power: :math:`r^{15}` of
# :math:`r = 400` is :math:`10^{39}`, more than float32 holds, and the quotient does not notice.

rng = np.random.default_rng(0)
T, S, D, E, SCALE, POWER = 5, 7, 4, 3, 1.8, 3.0
q, k, v = rng.standard_normal((T, D)), rng.standard_normal((S, D)), rng.standard_normal((S, E))
live = np.arange(S) <= np.arange(T)[:, None] + (S - T)
out, kept = attend(q, k, v, SCALE, POWER, live)
library, cache = spec.forward(q, k, v, causal=True, scale=SCALE, power=POWER)
tutorial.check("forward against the library", np.max(np.abs(out - library)), 64 * EPS)

# %%
# The backward, line by line
# --------------------------
# **(5')** :math:`dv = p^\top do`, :math:`dp = do\, v^\top`.
#
# **(4')** Take the logarithm: :math:`\ln p = m \ln r - \ln \sum r^m`. As in a softmax, with
# :math:`m\, dr / r` in the place of :math:`dz`:
#
# .. math:: dr = \frac{m}{r}\, p\, (dp - \textstyle\sum_s p\, dp), \qquad da = N\, dr ,
#
# and nothing for the keys that were dropped: they do not know that they exist. :math:`p / r` is
# computed as :math:`u^{m-1} / (r_{max} \sum u^m)`, which needs no division by 0.
#
# **(3')** A division by the row sum, then the slope of the softplus, which is the logistic
# function :math:`\sigma`:
#
# .. math:: ds = (da - \textstyle\sum_s a\, da) / \textstyle\sum_s s, \qquad dz = ds\; \sigma(z) .
#
# **(2')** :math:`d\hat q = c \ln N\; dz\, \hat k`, :math:`d\hat k = dz^\top (c \ln N\; \hat q)`.
# **(1')** The part along the vector is lost:
# :math:`dq = (d\hat q - \hat q\, (\hat q \cdot d\hat q)) / \lVert q \rVert`.


def attend_backward(dout, v, c, m, live, kept):
    """Steps (5') to (1')."""
    q, k, length_q, length_k, N, z, total, a, r, p = kept
    dv, dp = p.T @ dout, dout @ v.T  # (5')
    dr = m * p / np.where(r > 0, r, 1.0) * (dp - np.sum(p * dp, axis=1, keepdims=True))  # (4')
    da = N * dr
    ds = (da - np.sum(a * da, axis=1, keepdims=True)) / total  # (3')
    dz = np.where(live, ds / (1 + np.exp(-z)), 0.0) * c * np.log(N)
    dq, dk = dz @ k, dz.T @ q  # (2')
    dq = (dq - q * np.sum(q * dq, axis=1, keepdims=True)) / length_q  # (1')
    dk = (dk - k * np.sum(k * dk, axis=1, keepdims=True)) / length_k
    return {"q": dq, "k": dk, "v": dv}


dout = rng.standard_normal((T, E))
theirs = spec.backward(dout, cache)
for name, ours in attend_backward(dout, v, SCALE, POWER, live, kept).items():
    error = np.max(np.abs(ours - theirs[name])) / np.max(np.abs(theirs[name]))
    tutorial.check(f"d{name} from the board against the library", error, 256 * EPS)

# %%
# *The example backwards*, only the first stage: the output is :math:`4 + \tfrac{16}6 - \tfrac86 =
# \tfrac{16}3`, so :math:`ds = (v - \tfrac{16}3) / (6 \ln 2)`. The third key has :math:`ds =
# \tfrac{32}{3} / (6 \ln 2)`, the slope :math:`\sigma(0) = \tfrac12`, the factor :math:`c \ln 4 =
# \ln 7` and the length 2: :math:`dk_3 = \tfrac{32}{3} \cdot \tfrac{\ln 7}{24 \ln 2}` along the
# query. With both stages every gradient of q and k is 0: one key has all the weight, and the
# others are below average. That is the price of (4).

gradient = spec.backward(np.ones((1, 1)), first)
want = 32 / 3 * math.log(7) / (24 * math.log(2))
tutorial.check("dk of the third key", abs(gradient["k"][2, 0] - want), 16 * EPS)
gradient = spec.backward(np.ones((1, 1)), spec.forward(**small)[1])
tutorial.check("no gradient behind one key", np.max(np.abs(gradient["q"])), 0.0)

# %%
# Four roads to the same gradient:

tutorial.gradients(
    spec, {"q": 3 * q, "k": 3 * k, "v": v, "mask": live, "scale": SCALE, "power": POWER}
)

# %%
# Experiment: one key that stands out
# -----------------------------------
# Unit queries and keys of width 64 in random directions, and one key with the cosine 0.8 to its
# query. From 64 to 16384 keys, how much weight does it get? The softmax has scores
# :math:`8 \cos`: that is :math:`1/\sqrt{64}` for vectors of length 8, as fresh layers make them.

tutorial.claim(
    "The weight of a key that stands out stays nearly constant as keys are added under "
    "re-weighted softplus attention with the power 15; under a softmax it vanishes.",
    criterion="on each of three seeds, mean over 20 queries: with the power 15 the weight is 0.99 "
    "or more at every length from 64 to 16384; that of the softmax falls to a tenth of itself or "
    "less",
)

LENGTHS, WIDTH, COSINE, QUERIES = (64, 256, 1024, 4096, 16384), 64, 0.8, 20
NAMES = ("softmax", "LSSA", "LSSAR, 3", "LSSAR, 15", "softmax of (2)")


def unit(x):
    """Vectors of length 1."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def planted(rng, n):
    """Queries (QUERIES, 1, D) and keys (QUERIES, n, D), the first of which is near its query."""
    q = unit(rng.standard_normal((QUERIES, 1, WIDTH)))
    k = unit(rng.standard_normal((QUERIES, n, WIDTH)))
    other = rng.standard_normal((QUERIES, 1, WIDTH))
    other = unit(other - np.sum(other * q, axis=-1, keepdims=True) * q)
    k[:, :1] = COSINE * q + math.sqrt(1 - COSINE**2) * other
    return q, k


def weights(seed, n):
    """Mean weight of the planted key under the five rules."""
    q, k = planted(np.random.default_rng([seed, n]), n)
    v = np.zeros((QUERIES, n, 1))
    v[:, 0] = 1.0
    found = [dot.forward(q, k, v, scale=8.0)[0]]
    found += [spec.forward(q, k, v, power=m)[0] for m in (None, 3.0, 15.0)]
    found.append(dot.forward(q, k, v, scale=math.log(WIDTH) * math.log(n))[0])
    return [float(np.mean(out)) for out in found]


lengths = LENGTHS[:2] if tutorial.quick else LENGTHS
table = np.array([[weights(seed, n) for n in lengths] for seed in range(3)])
if not tutorial.quick:
    records = [
        {f"{name}, n={n}": table[seed, LENGTHS.index(n), i] for i, name in enumerate(NAMES)
         for n in (64, 1024, 16384)}
        for seed in range(3)
    ]  # fmt: skip
    constant = np.all(table[:, :, 3] >= 0.99)
    vanishes = np.all(table[:, -1, 0] <= table[:, 0, 0] / 10)
    verdict = {2: "reproduced", 1: "partly", 0: "not reproduced"}[int(constant) + int(vanishes)]
    tutorial.measured(ours=records, verdict=verdict, tolerance=0.02)

# %%
# The claim holds, and the table says more. The first stage by itself is *flatter* than a softmax:
# softplus grows only linearly, so a score of 30 weighs no more than six scores of 5. All the
# sharpness comes from the power, and the power 3 is not enough here: it falls like the softmax.
#
# And the last column: a plain softmax of the *same* scores (2) does not lose the key either. There
# the factor :math:`\ln N` does the work, since :math:`e^{c \ln N \cos} = N^{c \cos}` grows with
# :math:`N` faster than the crowd. What this experiment cannot see is what training makes of the
# scores; a trained softmax may choose longer vectors, and the paper's comparison is of trained
# models.
#
# The figure
# ----------
# Left: weight of the planted key, dots are seeds; LSSAR with the power 15 and the softmax of the
# scores (2) lie on each other at 1. Middle: the exponential, the softplus and its limit. Right: one
# row with a planted key, weights over their largest; with the power 15 the second is at
# :math:`10^{-8}`, and the curves of (4) end where the average is.

figure = None
if not tutorial.quick:
    plt = tutorial.pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(11.5, 3.7))
    colours = (ORANGE, GREY, SKY, BLUE, GREEN)
    for i, (name, colour) in enumerate(zip(NAMES, colours, strict=True)):
        line = "--" if i == 4 else "-"
        axes[0].plot(LENGTHS, table[:, :, i].T, "o", color=colour, alpha=0.5, markersize=4)
        axes[0].plot(LENGTHS, table[:, :, i].mean(axis=0), line, color=colour, label=name)
    axes[0].set_xscale("log", base=4)
    axes[0].set(title="The planted key", xlabel="keys n", ylabel="its weight", ylim=(-0.03, 1.1))
    axes[0].legend(loc="upper right", bbox_to_anchor=(1.0, 0.88), fontsize=8)

    z = np.linspace(-6, 6, 121)
    axes[1].plot(z, np.exp(z), color=ORANGE, label=r"$e^z$")
    axes[1].plot(z, np.log1p(np.exp(z)), color=BLUE, label=r"$\ln(1 + e^z)$")
    axes[1].plot(z, np.maximum(z, 0), ":", color=GREY, label="max(z, 0)")
    axes[1].set(title="The positive function", xlabel="score z (nats)", ylim=(0, 8))
    axes[1].legend(loc="upper left")

    q, k = planted(np.random.default_rng(0), 256)
    _, cache = spec.forward(q, k, k, power=None)
    Na = np.sort(256 * cache.p[0, 0])[::-1]
    top = (Na - 1).clip(0) / (Na[0] - 1)
    rank = np.arange(1, 257)
    axes[2].plot(rank, Na / Na[0], color=GREY, label=r"$N a$, over its largest")
    for m, colour in ((1, GREEN), (3, SKY), (15, BLUE)):
        axes[2].plot(rank, np.where(top > 0, top**m, np.nan), color=colour, label=f"(4), m = {m}")
    axes[2].set_xscale("log", base=4)
    axes[2].set_yscale("log")
    axes[2].set(title="A row of 256 keys, sorted", xlabel="rank", ylim=(1e-8, 3))
    axes[2].legend(loc="lower center", bbox_to_anchor=(0.47, 0.0), fontsize=8)

# %%
# Exercises
# ---------
# **1. Write this backward yourself.** Only the second stage: given :math:`dp`, the weights
# :math:`a` of the first stage, the number of keys ``N`` of each row (T, 1) and the power, return
# :math:`da`, for rows of more than three keys.


def my_backward(dp, a, N, m):
    """Return da (T, S)."""
    # solution: return None
    above = np.clip(N * a - 1, 0, None)
    powers = above**m
    sums = powers.sum(axis=1, keepdims=True)
    mean = np.sum(powers * dp, axis=1, keepdims=True) / sums
    return N * m * above ** (m - 1) * (dp - mean) / sums
    # end of solution


fresh = np.random.default_rng(7)
q7, k7, v7 = (fresh.standard_normal(shape) for shape in ((4, 3), (6, 3), (6, 2)))
dout7 = fresh.standard_normal((4, 2))
_, cache = spec.forward(q7, k7, v7, scale=1.5)
da = my_backward(dout7 @ v7.T, cache.a, np.full((4, 1), 6.0), 3.0)
expected = spec.backward(dout7, cache)["q"]
if da is None:
    tutorial.exercise(1, None, expected)
else:  # the rest of the way: (3'), (2'), (1')
    ds = (da - np.sum(cache.a * da, axis=1, keepdims=True)) / cache.total
    dq = (ds / (1 + np.exp(-cache.z)) * cache.factor) @ cache.k
    dq = (dq - cache.q * np.sum(cache.q * dq, axis=1, keepdims=True)) / cache.lengths[0]
    tutorial.exercise(1, dq, expected)

# %%
# **2. Two keys above average.** In a row exactly two keys are above average, with
# :math:`N a - 1 = x` and :math:`y < x`. Which share does the second get? What does the power do to
# :math:`\ln(p_1 / p_2)`, and what would a temperature do to a softmax?

# %%
# **Solution 2.** :math:`p_2 = y^m / (x^m + y^m)`, so :math:`\ln(p_1 / p_2) = m \ln(x / y)`: the
# power multiplies log-ratios as an inverse temperature multiplies differences of scores. It is a
# softmax of :math:`m \ln(N a - 1)` over the keys above average.

_, cache = spec.forward(q7, k7, v7, scale=1.5, power=3.0)
_, sharper = spec.forward(q7, k7, v7, scale=1.5, power=6.0)
square = cache.p**2 / np.sum(cache.p**2, axis=1, keepdims=True)
tutorial.check("exercise 2: twice the power", np.max(np.abs(sharper.p - square)), 64 * EPS)

# %%
# **3. Why the first rows are spared.** In a causal model the second token sees two keys. Show
# that with :math:`o = 1` it would always attend to one key alone, and that no gradient would reach
# its scores. What happens with three keys?

# %%
# **Solution 3.** Of two numbers with mean 1 one is above and one below, unless they are equal: (4)
# is one-hot, and a one-hot row has :math:`dr = 0` for the key that is left and nothing for the
# other one. With three keys one or two are above average: a one-hot row is still common. With
# :math:`o = 0` the rows keep all keys and a gradient.

x = rng.standard_normal((3, D))
for few in (1, 3):
    out, cache = spec.forward(x, x[::-1], x, causal=True, few=few)
    g = spec.backward(np.ones_like(out), cache)
    print(f"exercise 3: o = 0 up to {few} keys: row 2", cache.p[1].round(3).tolist(),
          "size of dq", f"{np.max(np.abs(g['q'][1])):.1e}")  # fmt: skip

# %%
tutorial.finish(figure)
