r"""
An entropy scale for other resolutions
======================================

**The question.** A diffusion model has learned to draw pictures of 512 x 512 pixels. Inside, its
attention layers see 64 x 64 = 4096 tokens. Ask it for a larger picture and things repeat: two
heads, four horizons. Ask for a smaller one and things are missing. Nothing in attention forbids
another number of tokens. What has changed?

**The idea.** A row of attention over more tokens is spread over more tokens. Measure the spread by
the entropy, see how it grows with the number of tokens N, and change the score scale, one number a
layer, so that the entropy keeps its proportion. No training.

You need to know softmax attention (``scores/dot_product``) and the normal distribution.
"""

# %%
# Definition
# ----------
# Let :math:`N_0` be the number of tokens in training and :math:`N` that of now. The scale
# :math:`1 / \sqrt D` is replaced by :math:`\lambda`,
#
# .. math::
#
#    g = \Bigl(\frac{\ln N}{\ln N_0}\Bigr)^{1/2}, \qquad
#    \lambda = \frac{g}{\sqrt D} = \sqrt{\frac{\log_{N_0} N}{D}} .                   \qquad (1)
#
# For those who hold a map p made with the scale of training, and not its scores, there is a way
# too. Softmax weights are :math:`p = e^{z} / \sum e^{z}`, so :math:`\ln p` *is* the score, up to a
# constant of the row, which the next softmax does not see:
#
# .. math::
#
#    z_{ts} &= g \ln p_{ts}                                                          &(2)\\
#    y_{ts} &= e^{z_{ts}} / \textstyle\sum_{s'} e^{z_{ts'}}                          &(3)\\
#    p'_{ts} &= y_{ts} \textstyle\sum_{s'} p_{ts'}                                   &(4)
#
# In other words: raise each weight to the power g and bring the row back to its old sum. For
# :math:`g > 1` the rows become sharper, for :math:`g < 1` smoother.

import math

import numpy as np

import attention_ref
from attention_ref.kit.tutorial import BLUE, GREEN, GREY, ORANGE, Tutorial
from attention_ref.methods.normalizers.resolution_entropy_scale import entropy_gain, entropy_scale

tutorial = Tutorial(__file__)
spec = attention_ref.get("normalizers/resolution_entropy_scale")
dot = attention_ref.get("scores/dot_product")
EPS = np.finfo(np.float64).eps

# %%
# An example by hand
# ------------------
# Trained on :math:`N_0 = 2` tokens, used for :math:`N = 16`:
# :math:`g = \sqrt{\ln 16 / \ln 2} = \sqrt 4 = 2`. The row :math:`p = (\tfrac14, \tfrac34)` squared
# stands as 1 to 9, so :math:`p' = (\tfrac1{10}, \tfrac9{10})`. The way back, from 16 to 2, has
# :math:`g = \tfrac12`: the roots of 1 and 9 stand as 1 to 3.

small = {"p": np.array([[0.25, 0.75]]), "trained": 2, "N": 16}
out, small_cache = spec.edit(**small)
print("g =", small_cache.gain, "p' =", out.round(12).tolist())
tutorial.check("weights 1/10, 9/10", np.max(np.abs(out - [[0.1, 0.9]])), 4 * EPS)
back, _ = spec.edit(out, trained=16, N=2)
tutorial.check("and back", np.max(np.abs(back - small["p"])), 4 * EPS)

# %%
# The forward
# -----------


def sharpened(p, g):
    """Steps (2) to (4)."""
    z = g * np.log(p)  # (2)
    e = np.exp(z - z.max(axis=1, keepdims=True))
    y = e / e.sum(axis=1, keepdims=True)  # (3)
    total = p.sum(axis=1, keepdims=True)
    return y * total, y, total  # (4)


rng = np.random.default_rng(0)
q, k, v = rng.standard_normal((4, 5)), rng.standard_normal((9, 5)), rng.standard_normal((9, 2))
_, cache = dot.forward(q, k, v)
p, g = cache.p, entropy_gain(81, 9)
out, y, total = sharpened(p, g)
library, cache = spec.edit(p, trained=9, N=81)
tutorial.check("forward against the library", np.max(np.abs(out - library)), 4 * EPS)
_, scaled = dot.forward(q, k, v, scale=entropy_scale(5, 81, 9))
tutorial.check("the same by the scale lambda", np.max(np.abs(out - scaled.p)), 16 * EPS)

# %%
# The backward, line by line
# --------------------------
# The method is for inference and needs no gradient. Here it is all the same, for those who guide a
# diffusion model by gradients through its maps.
#
# **(4')** A product of a matrix and a number for each row:
# :math:`dy = dp' \sum_s p`, and the sum collects :math:`d\Sigma_t = \sum_s dp'_{ts} y_{ts}`.
#
# **(3')** Softmax: :math:`dz = y\,(dy - \sum_s y\, dy)`.
#
# **(2')** :math:`z = g \ln p` has the slope :math:`g / p`, and p also stands in the sum:
#
# .. math:: dp_{ts} = g\, dz_{ts} / p_{ts} + d\Sigma_t .
#
# A check for the head: for g = 1 and a row with sum 1, :math:`y = p`, and
# :math:`dz / p = dp' - \sum p\, dp'`; the second term puts back what the first has taken off, and
# :math:`dp = dp'`.


def sharpened_backward(dout, p, y, total, g):
    """Steps (4') to (2')."""
    dy, dtotal = dout * total, np.sum(dout * y, axis=1, keepdims=True)  # (4')
    dz = y * (dy - np.sum(y * dy, axis=1, keepdims=True))  # (3')
    return g * dz / p + dtotal  # (2')


dout = rng.standard_normal(p.shape)
ours = sharpened_backward(dout, p, y, total, g)
theirs = spec.backward(dout, cache)["p"]
tutorial.check("dp from the board against the library", np.max(np.abs(ours - theirs)), 64 * EPS)

# %%
# *The example backwards* for :math:`L = p'_1`: :math:`y = (0.1, 0.9)`,
# :math:`dz = 0.1 \cdot 0.9 \cdot (1, -1) = (0.09, -0.09)`, and
# :math:`dp = 2\,(0.09 / 0.25,\; -0.09 / 0.75) + 0.1 = (0.82, -0.14)`.

gradient = spec.backward(np.array([[1.0, 0.0]]), small_cache)["p"]
tutorial.check("dp of the example", np.max(np.abs(gradient - [[0.82, -0.14]])), 8 * EPS)
tutorial.gradients(spec, spec.example(np.random.default_rng(1))["mask"])

# %%
# Why a square root of a logarithm?
# ---------------------------------
# Let q and k be standard normal and the scale :math:`\lambda`. For one query the scores are normal
# with a variance :math:`\sigma^2` near :math:`\lambda^2 D`. The sum of many exponentials is close
# to its mean, and :math:`E\, e^{z} = e^{\sigma^2 / 2}`:
#
# .. math:: \ln \textstyle\sum_s e^{z_s} \approx \ln N + \sigma^2 / 2 .
#
# The mean score under the weights is that of a normal distribution tilted by :math:`e^z`, which is
# shifted by its variance: :math:`\sum_s p_s z_s \approx \sigma^2`. The entropy is the difference,
#
# .. math:: H = -\textstyle\sum_s p_s \ln p_s = \ln \sum_s e^{z_s} - \sum_s p_s z_s
#           \approx \ln N - \tfrac12 \lambda^2 D .
#
# At the fixed scale :math:`\lambda^2 D = 1` and the entropy follows :math:`\ln N`, one to one. To
# hold it *constant* one would need :math:`\lambda^2 D = 2 \ln N + \text{const}`; that is not what
# the paper does. With (1), :math:`\lambda^2 D = \ln N / \ln N_0`, and
#
# .. math:: H \approx \ln N \Bigl(1 - \frac{1}{2 \ln N_0}\Bigr) .
#
# The entropy still grows, a little more slowly. What stays constant is its *share* of the largest
# possible entropy, :math:`H / \ln N`.

tutorial.claim(
    spec.claim,
    criterion="D = 64, N_0 = 256, on each of three seeds: the slope of the mean entropy against "
    "ln N from N = 64 to 4096 is within 0.02 of 1 at the fixed scale and within 0.02 of "
    "1 - 1/(2 ln 256) = 0.910 at the proposed one; over the same range the share H / ln N changes "
    "by less than 0.005 at the proposed scale and by more than 0.04 at the fixed one",
)

# %%
# The thresholds follow from the formula. A first run drew a single set of keys at each length;
# with 64 keys the mean entropy then moves by chance as much as the threshold of the share allows,
# and the verdict depended on the seed. Now each length averages 16 sets of keys; the criterion is
# the same. The paper's own evidence is the quality of pictures, which we cannot measure here.

LENGTHS, TRAINED, WIDTH = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096), 256, 64


def entropy(p):
    """Mean entropy of the rows, nats."""
    return float(np.mean(-np.sum(p * np.log(np.where(p > 0, p, 1.0)), axis=-1)))


def entropies(seed, sets):
    """Entropy at every length: fixed scale, the paper's, and the ratio of logarithms itself.

    Each set of keys meets 40 queries.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for N in LENGTHS:
        q, k = rng.standard_normal((sets, 40, WIDTH)), rng.standard_normal((sets, N, WIDTH))
        _, cache = dot.forward(q, k, np.zeros((N, 1)))
        edits = [spec.edit(cache.p, trained=TRAINED, strength=s)[0] for s in (1.0, 2.0)]
        rows.append([entropy(cache.p), *map(entropy, edits)])
    return np.array(rows)


logs = np.log(LENGTHS)
far = logs >= math.log(64)
curves, records = [], []
for seed in range(3):
    rows = entropies(seed, 1 if tutorial.quick else 16)
    slopes = np.polyfit(logs[far], rows[far], 1)[0]
    share = np.ptp(rows[far] / logs[far, None], axis=0)
    curves.append(rows)
    records.append({
        "slope, fixed scale": slopes[0],
        "slope, paper's scale": slopes[1],
        "change of H / ln N, fixed": share[0],
        "change of H / ln N, paper's": share[1],
    })  # fmt: skip
theory = 1 - 1 / (2 * math.log(TRAINED))
sloped = all(
    abs(r["slope, fixed scale"] - 1) < 0.02 and abs(r["slope, paper's scale"] - theory) < 0.02
    for r in records
)
shared = all(
    r["change of H / ln N, paper's"] < 0.005 and r["change of H / ln N, fixed"] > 0.04
    for r in records
)
print(f"theory: slopes 1 and {theory:.3f}")
verdict = "reproduced" if sloped and shared else "partly" if sloped else "not reproduced"
tutorial.measured(ours=records, verdict=verdict, tolerance=0.15)
above = np.mean(curves, axis=0)[:, 1] - logs * theory
print("paper's scale, entropy above the formula:")
print("  " + ", ".join(f"{x:+.3f} at {n}" for n, x in zip(LENGTHS, above, strict=True)))

# %%
# The slopes are right, and the share moves about ten times less than at the fixed scale. But it
# does not stay within the 0.005 that we had asked for on every seed. The last line says why: the
# formula is one for many keys. With few, the sum of exponentials is not yet near its mean, and the
# entropy lies above the line. At 64 keys, the first length that counts, this alone takes up much
# of the threshold. We had not thought of it when we set the criterion, and leave it as it was.

# %%
# Is a kept proportion what one wants?
# ------------------------------------
# The entropy is a means. Suppose a query is a noisy copy of *one* of N random keys, and the output
# should be the value of that key. Noise of variance :math:`\tau^2` gives a clear answer: by Bayes'
# rule the best weights are proportional to :math:`e^{-|q - k|^2 / 2 \tau^2}`, **whatever N is**.
# More keys make the task harder, and the entropy rightly larger. Changing the scale with N is a
# mistake here, though not a large one:

NOISE, D2 = 0.8, 16


def retrieval(N, strength, seed, runs):
    """Mean squared error of the retrieved value; the scores are the exact log-posterior."""
    rng = np.random.default_rng(seed)
    k, v = rng.standard_normal((runs, N, D2)), rng.standard_normal((runs, N, 1))
    q = k[:, :1] + NOISE * rng.standard_normal((runs, 1, D2))
    bias = -0.5 / NOISE**2 * np.sum(np.square(k), axis=-1)[:, None]
    _, cache = dot.forward(q, k, v, scale=1 / NOISE**2, bias=bias)
    p, _ = spec.edit(cache.p, trained=TRAINED, strength=strength)
    return float(np.mean((p @ v - v[:, :1]) ** 2))


SIZES = (16, 64, 256, 1024)
runs = {N: 10 if tutorial.quick else max(1000, 500_000 // N) for N in SIZES}
errors = np.array([[retrieval(N, s, 7, runs[N]) for N in SIZES] for s in (0.0, 1.0, 2.0)])
print("squared error at N = " + ", ".join(map(str, SIZES)))
for name, row in zip(("fixed scale", "paper's", "ratio of logs"), errors, strict=True):
    print(f"  {name:14}", "  ".join(f"{x:.3f}" for x in row))

# %%
# Read :math:`e^H` as the number of tokens that a row looks at. At the fixed scale it is a fixed
# proportion of N: twice the resolution, the same region of the picture, four times the tokens. With
# the paper's scale it is :math:`N^{1 - 1/(2 \ln N_0)}`, here :math:`N^{0.91}`: the share H / ln N
# is kept, the region shrinks slowly. So the edit is right where a layer *should* look at a somewhat
# smaller part of a larger picture. It is wrong where a layer looks for one thing, and where it
# gathers the context of the same region. Which layers of a model are of which kind is an empirical
# question; the paper's answer for self-attention in Stable Diffusion is a picture that looks
# better.
#
# The figure
# ----------
# Left: entropy against the number of tokens, dots for the three seeds, lines for
# :math:`\ln N - \lambda^2 D / 2`. Middle: the same as a share of :math:`\ln N`. Right: the
# error of the retrieval above, relative to that of the fixed scale.

figure = None
if not tutorial.quick:
    plt = tutorial.pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(11.5, 3.8))
    looks = (
        ("fixed scale", ORANGE, 0),
        ("the paper's scale", BLUE, 1),
        ("ratio of logs", GREEN, 2),
    )
    N = np.geomspace(16, 4096, 60)
    for i, (name, colour, power) in enumerate(looks):
        line = np.log(N) - 0.5 * (np.log(N) / math.log(TRAINED)) ** power
        for panel, scale in ((axes[0], 1), (axes[1], 1 / np.log(N))):
            panel.plot(N, line * scale, color=colour, linewidth=1.2, label=name)
        for rows in curves:
            axes[0].plot(LENGTHS, rows[:, i], ".", color=colour)
            axes[1].plot(LENGTHS, rows[:, i] / logs, ".", color=colour)
        axes[2].plot(SIZES, errors[i] / errors[0], "o-", color=colour, label=name)
    axes[0].set(title="Entropy of a row", ylabel="H (nats)")
    axes[1].set(title="Share of the largest entropy", ylabel="H / ln N")
    axes[2].set(title="Finding one key of N", ylabel="squared error / fixed scale")
    for panel, places in zip(axes, ((16, 64, 256, 1024, 4096),) * 2 + (SIZES,), strict=True):
        panel.set_xscale("log", base=2)
        panel.set_xticks(places, [str(n) for n in places])
        panel.minorticks_off()
        panel.axvline(TRAINED, color=GREY, linestyle=":", linewidth=1)
        panel.set_xlabel("tokens N (trained on 256)")
    axes[0].legend(loc="upper left")

# %%
# Exercises
# ---------
# **1. Write this backward yourself.** The map has rows with sum 1, so (4) can
# be left out: :math:`p' = p^g / \sum p^g`. Return dp for this simpler forward. (It differs from
# the library's by what the sum of a row would add; the check below takes that off.)


def my_backward(dout, p, g):
    """Return the gradient of p^g / sum p^g, shape (T, S)."""
    # solution: return None
    power = p**g
    y = power / np.sum(power, axis=1, keepdims=True)
    mean = np.sum(dout * y, axis=1, keepdims=True)
    return (dout - mean) * y * g / p
    # end of solution


fresh = np.random.default_rng(7)
p7 = fresh.uniform(0.5, 1.5, (3, 5))
p7 = p7 / p7.sum(axis=1, keepdims=True)
dout = fresh.standard_normal(p7.shape)
out, cache = spec.edit(p7, trained=5, N=50)
expected = spec.backward(dout, cache)["p"] - np.sum(dout * out, axis=1, keepdims=True)
tutorial.exercise(1, my_backward(dout, p7, entropy_gain(50, 5)), expected)

# %%
# **2. Temperatures compose.** A map goes from 64 to 256 tokens' scale, and then from 256 to 1024.
# Show that this equals one step from 64 to 1024. Is that also true of ``strength`` 1 and then 1
# against 2?

# %%
# **Solution 2.** Powers of powers multiply, and the gains are quotients of the same function:
# :math:`\sqrt{\ln 256 / \ln 64}\, \sqrt{\ln 1024 / \ln 256} = \sqrt{\ln 1024 / \ln 64}`. The edit
# with strength 1 done twice has :math:`g \cdot g`, which is strength 2.

once, _ = spec.edit(p7, trained=64, N=1024)
step, _ = spec.edit(spec.edit(p7, trained=64, N=256)[0], trained=256, N=1024)
tutorial.check("exercise 2: two steps are one", np.max(np.abs(step - once)), 8 * EPS)
twice, _ = spec.edit(once, trained=64, N=1024)
double, _ = spec.edit(p7, trained=64, N=1024, strength=2.0)
tutorial.check("exercise 2: twice is strength 2", np.max(np.abs(twice - double)), 8 * EPS)

# %%
# **3. A constant entropy.** Which scale would hold the entropy of Gaussian rows at
# :math:`\ln N_0 - \tfrac12`, its value in training? Where does the derivation of
# :math:`H \approx \ln N - \tfrac12 \lambda^2 D` stop being true?

# %%
# **Solution 3.** :math:`\lambda^2 D = 1 + 2 \ln(N / N_0)`. But the sum of exponentials is near its
# mean only while no single term dominates it. The largest of N normal scores is near
# :math:`\sigma \sqrt{2 \ln N}`, and the tilted distribution lives around :math:`\sigma^2`: for
# :math:`\sigma > \sqrt{2 \ln N}` there is nothing left to tilt to. The scale above stays below
# that, but for large N it comes close, and the formula is a little off.

rng = np.random.default_rng(3)
print("N, entropy with sigma^2 = 1 + 2 ln(N / 256), wanted", round(math.log(256) - 0.5, 3))
for N in (256, 1024, 4096):
    z = math.sqrt(1 + 2 * math.log(N / 256)) * rng.standard_normal((50, N))
    weights = np.exp(z - z.max(axis=1, keepdims=True))
    print(N, round(entropy(weights / weights.sum(axis=1, keepdims=True)), 3))

# %%
tutorial.finish(figure)
