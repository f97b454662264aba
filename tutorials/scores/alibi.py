r"""
Linear biases
=============

**The question.** Softmax attention does not know where a key stands: shuffle the keys together
with their values, and nothing changes. The usual cure adds a vector for each position to the
input. But a model trained on 512 positions has never seen number 513, and fails there. Is there
a sense of position that works at any length?

**The idea.** Say nothing about positions at all. Only let every score fall, by the same small
amount for every token that lies between query and key. Each head gets a slope of its own: steep
ones read the last words, flat ones whole pages. The paper calls it "train short, test long".

You need to know the softmax and the geometric series; ``scores/dot_product`` explains the rest.
"""

# %%
# Definition
# ----------
# There are H heads with :math:`T` queries and :math:`S` keys each. In the sequence the last query
# stands at the place of the last key, so query :math:`t` has the place :math:`t + a`,
# :math:`a = S - T`. For the head :math:`h = 0, \dots, H - 1`
#
# .. math::
#
#    z_{hts} &= \kappa \tanh(c\, q_{ht} \cdot k_{hs} / \kappa)                  &(1)\\
#    z_{hts} &\leftarrow z_{hts} + b_{hts} - m_h\, |t + a - s|                  &(2)\\
#    p_{hts} &= e^{z_{hts}} / \textstyle\sum_{s'} e^{z_{hts'}}                  &(3)\\
#    o_{ht}  &= \textstyle\sum_s p_{hts}\, v_{hs}                               &(4)
#
# The softcap :math:`\kappa` and the further bias :math:`b` are options as everywhere; what is new
# is the last term of (2). The slopes are not learned. For H heads, H a power of two, they are
#
# .. math:: m_h = 2^{-8 (h + 1) / H} \quad \text{nats a token},
#
# for eight heads 1/2, 1/4, ..., 1/256. What does a slope do to the weights? A bias inside the
# exponential is a factor outside: :math:`e^{z - m d} = e^z\, \gamma^d` with
# :math:`\gamma = e^{-m}`. Every token of distance costs the same *factor*. Forgetting is
# exponential, as in a recurrent network, with a rate that nobody has to learn.

import math

import numpy as np

import attention_ref
from attention_ref.kit.tutorial import BLUE, GREY, ORANGE, PALETTE, Tutorial
from attention_ref.methods.scores.alibi import alibi_slopes

tutorial = Tutorial(__file__)
spec = attention_ref.get("scores/alibi")
dot = attention_ref.get("scores/dot_product")
EPS = np.finfo(np.float64).eps
print("slopes of 8 heads:", alibi_slopes(8))

# %%
# An example by hand
# ------------------
# One head, one query, at the place of the last of three keys; all contents equal, so
# :math:`z = 0` in (1). Let :math:`m = \ln 3`, that is :math:`\gamma = \tfrac13`. The distances
# are 2, 1, 0; the exponentials :math:`\tfrac19, \tfrac13, 1`, their sum :math:`\tfrac{13}9`:
#
# .. math:: p = \left(\tfrac1{13}, \tfrac3{13}, \tfrac9{13}\right), \qquad
#           v = (13, 26, 0) \ \Rightarrow\ o = 1 + 6 + 0 = 7 .

small = {
    "q": np.zeros((1, 1, 1)),
    "k": np.zeros((1, 3, 1)),
    "v": np.array([[[13.0], [26.0], [0.0]]]),
    "m": np.array([math.log(3)]),
}
out, small_cache = spec.forward(**small, causal=True)
print("13 p =", (13 * small_cache.p).ravel().round(12).tolist(), "o =", out.round(12).item())
tutorial.check("weights 1/13, 3/13, 9/13", np.max(np.abs(13 * small_cache.p - [1, 3, 9])), 64 * EPS)
tutorial.check("the output is 7", abs(out.item() - 7), 64 * EPS)

# %%
# The forward
# -----------
# Two lines more than dot-product attention.


def biased(q, k, v, m, causal):
    """Steps (1) to (4) for one head without softcap and further bias."""
    queries, keys = len(q), len(k)
    z = q @ k.T / math.sqrt(q.shape[1])  # (1)
    d = np.arange(queries)[:, None] + (keys - queries) - np.arange(keys)
    z = z - m * np.abs(d)  # (2)
    z = np.where(d >= 0, z, -np.inf) if causal else z
    e = np.exp(z - z.max(axis=1, keepdims=True))
    p = e / e.sum(axis=1, keepdims=True)  # (3)
    return p @ v, p, np.abs(d)  # (4)


rng = np.random.default_rng(0)
T, S, D, E = 4, 6, 3, 2
q, k, v = rng.standard_normal((T, D)), rng.standard_normal((S, D)), rng.standard_normal((S, E))
m = 0.4
out, p, d = biased(q, k, v, m, causal=True)
library, cache = spec.forward(q[None], k[None], v[None], np.array([m]), causal=True)
tutorial.check("forward against the library", np.max(np.abs(out - library[0])), 8 * EPS)

# %%
# The backward, line by line
# --------------------------
# From the bottom up; :math:`dx` is the gradient of :math:`x`, and :math:`do` is given.
#
# **(4'), (3')** As for every softmax attention: :math:`dv = p^\top do`, :math:`dp = do\, v^\top`,
# :math:`dz = p\,(dp - \sum_s p\, dp)`.
#
# **(2')** The bias is a sum, so :math:`dz` goes through to (1) unchanged. The slope appears in
# every score of its head, there with the factor :math:`-d_{ts}`:
#
# .. math:: \frac{\partial z_{ts}}{\partial m} = -d_{ts}
#           \quad\Rightarrow\quad dm = -\sum_{t, s} dz_{ts}\, d_{ts} .
#
# The paper keeps its slopes fixed and does not need this. But look what it says. Put in (3'),
# and write :math:`\bar d_t = \sum_s p_{ts} d_{ts}` for the mean distance of a query:
#
# .. math:: dm = -\sum_t \sum_s p_{ts} \Bigl(dp_{ts} - \sum_{s'} p_{ts'} dp_{ts'}\Bigr) d_{ts}
#              = -\sum_t \operatorname{Cov}_{p_t}(dp_t, d_t) .
#
# The slope is pulled up where near keys would have been better than far ones, and down otherwise.
#
# **(1')** :math:`dq = c\, dz\, k`, :math:`dk = c\, dz^\top q`.


def biased_backward(dout, q, k, v, p, d):
    """Steps (4') to (1')."""
    dv, dp = p.T @ dout, dout @ v.T  # (4')
    dz = p * (dp - np.sum(p * dp, axis=1, keepdims=True))  # (3')
    dm = -np.sum(dz * d)  # (2')
    c = 1 / math.sqrt(q.shape[1])
    return {"q": c * dz @ k, "k": c * dz.T @ q, "v": dv, "m": dm}  # (1')


dout = rng.standard_normal((T, E))
ours = biased_backward(dout, q, k, v, p, d)
theirs = spec.backward(dout[None], cache)
for name in ours:
    error = np.max(np.abs(ours[name] - theirs[name][0]))
    tutorial.check(f"d{name} from the board against the library", error, 32 * EPS)

dp = dout @ v.T
covariance = np.sum(p * dp * d, axis=1) - np.sum(p * dp, axis=1) * np.sum(p * d, axis=1)
error = abs(ours["m"] + covariance.sum())
tutorial.check("dm is minus the covariance of dp and distance", error, 32 * EPS)

# %%
# *The example backwards*, with :math:`L = o`, so :math:`dp = v` and
# :math:`dz = p\,(v - 7) = \tfrac1{13} (6,\ 3 \cdot 19,\ 9 \cdot (-7)) = \tfrac1{13} (6, 57, -63)`;
# it sums to 0, as it must. Then :math:`dm = -\tfrac1{13} (2 \cdot 6 + 57) = -\tfrac{69}{13}`: a
# steeper slope would look less at the values 13 and 26 and more at the 0.

gradient = spec.backward(np.ones((1, 1, 1)), small_cache)
tutorial.check("dm of the example is -69/13", abs(gradient["m"].item() + 69 / 13), 64 * EPS)

# %%
# Four roads to the same gradient, with a softcap and a further bias:

tutorial.gradients(
    spec,
    {"q": q[None], "k": k[None], "v": v[None], "m": np.array([m])}
    | {"causal": True, "softcap": 1.3, "bias": rng.standard_normal((T, S))},
)

# %%
# How far does a head look?
# -------------------------
# Let all contents be equal and the past be long. Then :math:`p_d = \gamma^d (1 - \gamma)`, the
# geometric distribution, and with :math:`\sum_d d\, \gamma^{d-1} = 1/(1 - \gamma)^2`
#
# .. math:: \bar d = \sum_{d \ge 0} d\, \gamma^d (1 - \gamma) = \frac{\gamma}{1 - \gamma}
#           = \frac{1}{e^m - 1} \approx \frac1m \ \text{tokens}.
#
# The length does not appear. The flattest of eight heads looks back 255.5 tokens in the mean,
# whether 1000 or a million lie behind it. Without the bias the mean is :math:`(S - 1) / 2`: a
# longer text changes what *every* head sees. Is that still so when the contents differ?

tutorial.claim(
    spec.claim,
    criterion="equal contents, S = 4096: all 8 heads within 1 % of 1/(e^m - 1); normal contents "
    "with scores of variance 1, 50 sequences on each of three seeds: from S = 512 to S = 4096 the "
    "mean distance of the first five heads changes by less than 1 %, and without the bias it "
    "grows more than sevenfold",
)

LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
slopes = np.array(alibi_slopes(8))
theory = 1 / np.expm1(slopes)


def mean_distances(q, k, length):
    """Mean distance in tokens: one entry a head, and one without bias."""
    k = k[:, :, -length:]
    v = np.arange(length)[::-1, None] * np.ones((1, 1, 1, 1))  # the value of a key is its distance
    with_bias, _ = spec.forward(q, k, v)
    without, _ = dot.forward(q[:, :1], k, v)
    return np.append(with_bias.mean(axis=0), without.mean())


equal = mean_distances(np.zeros((1, 8, 1, 1)), np.zeros((1, 1, 4096, 1)), 4096)
off = np.max(np.abs(equal[:8] / theory - 1))
print("equal contents, S = 4096:", equal.round(2).tolist())

sequences = 4 if tutorial.quick else 50
curves = []
for seed in range(3):
    rng = np.random.default_rng(seed)
    q, k = (rng.standard_normal((sequences, 1, n, 16)) for n in (1, LENGTHS[-1]))
    q = np.broadcast_to(q, (sequences, 8, 1, 16))
    curves.append([mean_distances(q, k, length) for length in LENGTHS])
curves = np.array(curves)  # seed, length, head
growth = curves[:, -1] / curves[:, LENGTHS.index(512)]
records = [
    {f"head {h}, S={n}": curves[seed, LENGTHS.index(n), h] for h in (0, 4, 7) for n in (512, 4096)}
    | {f"no bias, S={n}": curves[seed, LENGTHS.index(n), 8] for n in (512, 4096)}
    | {"largest change, heads 0-4": np.max(np.abs(growth[seed, :5] - 1))}
    for seed in range(3)
]
held = off < 0.01 and np.all(np.abs(growth[:, :5] - 1) < 0.01) and np.all(growth[:, 8] > 7)
tutorial.measured(
    ours=records, verdict="reproduced" if held else "not reproduced", tolerance=0.05
)

# %%
# This is the mechanism behind "test long", not the whole of it: a bounded view cannot be confused
# by a longer text, and it cannot use one either. What lies :math:`10/m` tokens back weighs less
# than :math:`e^{-10}`, unless its content score is ten nats better.
#
# The figure
# ----------
# Left: the mean distance against the length; dots are the three seeds, dotted lines the formula.
# Middle: the bias of one causal head. Right: how the weights of three heads fall off.

figure = None
if not tutorial.quick:
    plt = tutorial.pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(11.5, 3.8), width_ratios=(1.25, 1, 1))
    for h in range(8):
        colour = PALETTE[h % 6]
        axes[0].plot([55, 4096], [theory[h]] * 2, ":", color=colour, linewidth=1)
        axes[0].plot(LENGTHS, curves[:, :, h].T, ".", color=colour, alpha=0.6)
        axes[0].plot(LENGTHS, curves[:, :, h].mean(axis=0), color=colour, linewidth=1.2)
        axes[0].text(4700, theory[h], f"1/{2 ** (h + 1)}", color=colour, va="center", fontsize=8)
    axes[0].plot(LENGTHS, curves[:, :, 8].mean(axis=0), "--", color=GREY)
    axes[0].text(1250, 1050, "no bias", color=GREY, ha="right")
    axes[0].set_xscale("log", base=2)
    axes[0].set_yscale("log", base=10)
    axes[0].set_xticks(LENGTHS, [str(n) for n in LENGTHS])
    axes[0].minorticks_off()
    axes[0].text(4700, 900, "slope", fontsize=8)
    axes[0].set(title="How far a head looks", xlabel="length S (tokens)", xlim=(55, 8500),
                ylabel="mean distance (tokens)")  # fmt: skip

    n = 12
    d = np.arange(n)[:, None] - np.arange(n)
    image = axes[1].imshow(np.where(d >= 0, -0.5 * d, np.nan))
    axes[1].set(title="The bias, m = 1/2", xlabel="key s", ylabel="query t")
    axes[1].grid(False)
    figure.colorbar(image, ax=axes[1], label="nats", shrink=0.85)

    distance = np.arange(65)
    for slope, colour in ((1 / 4, BLUE), (1 / 16, ORANGE), (1 / 64, PALETTE[2])):
        weight = np.exp(-slope * distance) * -np.expm1(-slope)
        axes[2].plot(distance, weight, color=colour, label=f"m = 1/{1 / slope:.0f}")
    axes[2].set_yscale("log", base=10)
    axes[2].set(title="Equal contents", xlabel="distance d (tokens)", ylim=(1e-6, 1),
                ylabel=r"weight, $(1 - \gamma)\, \gamma^d$")  # fmt: skip
    axes[2].legend(loc="lower left")

# %%
# Exercises
# ---------
# **1. Write this backward yourself.** Given the gradient ``dz`` of the biased scores of one head,
# T queries in rows and S keys in columns, the last query at the place of the last key: return the
# gradient of the slope. There is no mask: keys may lie on both sides of a query.


def my_dm(dz):
    """Return dm, a number."""
    # solution: return None
    queries, keys = dz.shape
    along = np.array([np.trace(dz, s_minus_t) for s_minus_t in range(1 - queries, keys)])
    ahead = np.arange(1 - queries, keys) - (keys - queries)  # of the query, in tokens
    return -np.abs(ahead) @ along  # all pairs of one distance stand on two diagonals
    # end of solution


fresh = np.random.default_rng(7)
given = {name: fresh.standard_normal((1, *shape))
         for name, shape in (("q", (3, 4)), ("k", (5, 4)), ("v", (5, 2)))}  # fmt: skip
_, cache = spec.forward(**given, m=np.array([0.6]), bias=np.zeros((1, 3, 5)))
right = spec.backward(fresh.standard_normal((1, 3, 2)), cache)  # the bias receives dz
tutorial.exercise(1, my_dm(right["bias"][0]), right["m"][0])

# %%
# **2. A cheaper bias.** The official code adds :math:`+ m\, s` to every row, one vector for all
# queries. Why are the weights of a causal head the same? What becomes of them without causal?

# %%
# **Solution 2.** A causal query sees :math:`s \le t + a` only, so
# :math:`-m\, |t + a - s| = m\, s - m\, (t + a)`. The second term is the same for the whole row and
# cancels in the softmax. Without causal the two differ for the keys ahead of the query: there the
# bias :math:`m\, s` goes on growing, so a key :math:`d` tokens ahead is favoured by :math:`m\, d`
# nats where (2) takes :math:`m\, d` away. The last key of the text gets the largest bonus.

q, k, v = rng.standard_normal((T, D)), rng.standard_normal((S, D)), rng.standard_normal((S, E))
for causal in (True, False):
    _, one = spec.forward(q[None], k[None], v[None], np.array([m]), causal=causal)
    _, two = dot.forward(q, k, v, bias=m * np.arange(S, dtype=float), causal=causal)
    gap = np.max(np.abs(one.p[0] - two.p))
    print(f"exercise 2: causal={causal}: weights differ by {gap:.1e}")
    if causal:
        tutorial.check("exercise 2: the same weights", gap, 8 * EPS)

# %%
# **3. Twelve heads.** The rule for powers of two gives no answer. The official code takes the
# slopes of 8 heads and every second one of 16. Which are they? Between which of the first eight
# do they lie?

# %%
# **Solution 3.** Eight heads have :math:`2^{-1}, \dots, 2^{-8}`, sixteen have :math:`2^{-1/2},
# 2^{-1}, 2^{-3/2}, \dots`. Every second one, from the first: :math:`2^{-1/2}, 2^{-3/2}, 2^{-5/2},
# 2^{-7/2}`. The first is steeper than all eight; the others are the geometric means of the first
# and second, the second and third, the third and fourth. Only the steep half becomes denser.

extra = [2.0 ** (-(2 * j + 1) / 2) for j in range(4)]
error = np.max(np.abs(np.array(alibi_slopes(12)[8:]) - extra))
tutorial.check("exercise 3: 2^(-1/2), 2^(-3/2), ...", error, EPS)
means = np.sqrt(np.array(alibi_slopes(8))[:3] * np.array(alibi_slopes(8))[1:4])
tutorial.check("exercise 3: geometric means", np.max(np.abs(means - extra[1:])), EPS)

# %%
tutorial.finish(figure)
