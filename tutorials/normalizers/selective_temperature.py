r"""
Selective self-attention: a temperature for every query
=======================================================

**The question.** A query says what it likes, by its direction, and how much more it likes that
than the rest, by its length. Both in one vector, made by one matrix. A word like "the" may want to
look at many places a little, a name at one place only; and the same query at place 20 and at place
2000 meets a hundred times as many keys to be distracted by. Can *what* and *how selectively* be
separated?

**The idea.** Multiply the scores of each query by a number of its own, an inverse temperature: a
part that a small network reads off the token, and a part that grows with the logarithm of the
number of keys. And let each value be scaled by a number of its own, so that a noisy token can be
muted.

You need ``scores/dot_product`` for softmax attention and its gradient.
"""

# %%
# Definition
# ----------
# Logits :math:`f_t` of the queries and :math:`g_s` of the values come from small networks of the
# tokens; :math:`\alpha` is one learned number a layer, :math:`n_t` the number of keys that query
# :math:`t` may see.
#
# .. math::
#
#    \tau_t &= 1 + \tanh f_t + \rho \ln n_t, \qquad \rho = \sigma(\alpha)                    &(1)\\
#    z_{ts} &= \kappa \tanh(\tau_t\, c\, q_t \cdot k_s / \kappa) + b_{ts}                    &(2)\\
#    p_{ts} &= e^{z_{ts}} / \textstyle\sum_{s'} e^{z_{ts'}}                                  &(3)\\
#    \nu_s  &= 1 + \tanh g_s                                                                 &(4)\\
#    o_t    &= \textstyle\sum_s p_{ts}\, \nu_s v_s                                           &(5)
#
# With :math:`f = g = 0` and :math:`\rho = 0` this is plain attention. The bias b is optional;
# without it a temperature cannot change which key is liked best: it only stretches the scores.

import math

import numpy as np

import attention_ref
from attention_ref import nn
from attention_ref.kit.tutorial import BLUE, GREEN, GREY, ORANGE, Tutorial

tutorial = Tutorial(__file__)
spec = attention_ref.get("normalizers/selective_temperature")
EPS = np.finfo(np.float64).eps

# %%
# An example by hand
# ------------------
# One query, three keys, the scores :math:`c\, q \cdot k = (\tfrac12 \ln 3, 0, 0)`. With a very
# large :math:`f` the temperature part is :math:`\tau = 2`: the scores become :math:`(\ln 3, 0,
# 0)`, the weights :math:`(\tfrac35, \tfrac15, \tfrac15)`. The values :math:`(8, 20, 0)` have the
# volumes :math:`(\tfrac54, \tfrac12, 1)`, so what is mixed is :math:`(10, 10, 0)`, and :math:`o =
# 8`.

small = {
    "q": np.array([[math.log(3) / 2]]),
    "k": np.array([[1.0], [0.0], [0.0]]),
    "v": np.array([[8.0], [20.0], [0.0]]),
    "f_q": np.array([400.0]),
    "f_v": np.array([math.atanh(0.25), -math.atanh(0.5), 0.0]),
}
out, small_cache = spec.forward(**small)
print("temperature", small_cache.tau.ravel().tolist(), "weights", small_cache.p.round(4).tolist())
tutorial.check("weights 3/5, 1/5, 1/5", np.max(np.abs(small_cache.p - [[0.6, 0.2, 0.2]])), 4 * EPS)
tutorial.check("the output is 8", abs(out.item() - 8), 32 * EPS)

# %%
# The forward
# -----------


def selective(q, k, v, f_q, f_v, alpha, live):
    """Steps (1) to (5) without softcap and bias."""
    n = live.sum(axis=1)
    rho = 1 / (1 + np.exp(-alpha))
    tau = 1 + np.tanh(f_q) + rho * np.log(n)  # (1)
    scores = q @ k.T / math.sqrt(q.shape[1])
    z = np.where(live, tau[:, None] * scores, -np.inf)  # (2)
    e = np.exp(z - z.max(axis=1, keepdims=True))
    p = e / e.sum(axis=1, keepdims=True)  # (3)
    nu = 1 + np.tanh(f_v)  # (4)
    return p @ (nu[:, None] * v), (p, scores, tau, nu, n)  # (5)


rng = np.random.default_rng(0)
T, S, D, E = 4, 6, 3, 2
q, k, v = (rng.standard_normal(shape) for shape in ((T, D), (S, D), (S, E)))
f_q, f_v, alpha = rng.standard_normal(T), rng.standard_normal(S), np.array([-0.5])
live = np.arange(S) <= np.arange(T)[:, None] + (S - T)
out, (p, scores, tau, nu, n) = selective(q, k, v, f_q, f_v, alpha, live)
library, cache = spec.forward(q, k, v, f_q, f_v, alpha, causal=True)
tutorial.check("forward against the library", np.max(np.abs(out - library)), 8 * EPS)

# %%
# The backward, line by line
# --------------------------
# **(5')** With the loud values :math:`y_s = \nu_s v_s`: :math:`dy = p^\top do`,
# :math:`dp = do\, y^\top`; then :math:`dv_s = \nu_s\, dy_s` and :math:`d\nu_s = dy_s \cdot v_s`.
#
# **(4')** :math:`dg_s = d\nu_s\, (1 - \tanh^2 g_s)`.
#
# **(3')** :math:`dz = p\,(dp - \sum_s p\, dp)`.
#
# **(2')** The temperature is one number for a whole row of scores :math:`x_{ts} = c\, q_t \cdot
# k_s`:
#
# .. math:: d\tau_t = \sum_s dz_{ts}\, x_{ts}, \qquad dx_{ts} = \tau_t\, dz_{ts},
#
# and :math:`dq = c\, dx\, k`, :math:`dk = c\, dx^\top q`. Since a row of :math:`dz` sums to zero,
# :math:`d\tau` compares scores: it is positive when the keys that raise the loss have the higher
# ones, and then a step of descent makes the query less selective.
#
# **(1')** :math:`df_t = d\tau_t\, (1 - \tanh^2 f_t)` and
# :math:`d\alpha = \rho (1 - \rho) \sum_t d\tau_t \ln n_t`.


def selective_backward(dout, q, k, v, f_q, f_v, alpha, p, scores, tau, nu, n):
    """Steps (5') to (1')."""
    dy, dp = p.T @ dout, dout @ (nu[:, None] * v).T  # (5')
    df_v = np.sum(dy * v, axis=1) * (1 - np.tanh(f_v) ** 2)  # (4')
    dz = p * (dp - np.sum(p * dp, axis=1, keepdims=True))  # (3')
    dtau, dx = np.sum(dz * scores, axis=1), tau[:, None] * dz  # (2')
    c, rho = 1 / math.sqrt(q.shape[1]), 1 / (1 + np.exp(-alpha))
    return {  # (1')
        "q": c * dx @ k, "k": c * dx.T @ q, "v": nu[:, None] * dy, "f_v": df_v,
        "f_q": dtau * (1 - np.tanh(f_q) ** 2), "alpha": rho * (1 - rho) * np.sum(dtau * np.log(n)),
    }  # fmt: skip


dout = rng.standard_normal((T, E))
ours = selective_backward(dout, q, k, v, f_q, f_v, alpha, p, scores, tau, nu, n)
theirs = spec.backward(dout, cache)
for name in ours:
    error = np.max(np.abs(ours[name] - theirs[name]))
    tutorial.check(f"d{name} from the board against the library", error, 32 * EPS)

# %%
# *The example backwards*, :math:`L = o`: :math:`dz = p\,(y - o) = (1.2, 0.4, -1.6)`. With
# :math:`\tau = 2` the query gets :math:`2 \cdot 1.2 = 2.4`, and the volumes
# :math:`dg = (0.6 \cdot 8 \cdot \tfrac{15}{16},\ 0.2 \cdot 20 \cdot \tfrac34,\ 0)
# = (4.5, 3, 0)`.

gradient = spec.backward(np.ones((1, 1)), small_cache)
tutorial.check("dq of the example", abs(gradient["q"].item() - 2.4), 64 * EPS)
error = np.max(np.abs(gradient["f_v"] - [4.5, 3.0, 0.0]))
tutorial.check("dg of the example", error, 64 * EPS)
options = {"bias": rng.standard_normal((T, S)), "mask": live, "softcap": 1.3, "rate": "gumbel"}
tutorial.gradients(spec, {"q": q, "k": k, "v": v, "f_q": f_q, "f_v": f_v, "alpha": alpha} | options)

# %%
# Why the logarithm?
# ------------------
# Let one key be ahead of :math:`n - 1` others by a gap :math:`\Delta` in the scores. At the inverse
# temperature :math:`\tau` its weight is
#
# .. math:: p = \frac{1}{1 + (n - 1)\, e^{-\tau \Delta}} .
#
# At a fixed :math:`\tau` it falls to zero like :math:`1/n`: *dilution*. To hold it,
# :math:`\tau\Delta` must grow like :math:`\ln n`, and with :math:`\tau = 1 + \rho \ln n`
#
# .. math:: (n - 1)\, e^{-\tau \Delta} = \frac{n - 1}{n^{\rho \Delta}}\, e^{-\Delta},
#
# which tends to 0, to :math:`e^{-\Delta}` or to infinity as :math:`\rho\Delta` is above, at or
# below 1.


def top(n, gap, rho):
    """The weight of a key that is ahead by a gap."""
    return 1 / (1 + (n - 1) * np.exp(-(1 + rho * np.log(n)) * gap))


for size in (10, 1000):
    keys = np.zeros((size, 1))
    keys[0] = 4.0
    _, c = spec.forward(np.ones((1, 1)), keys, keys, alpha=np.array([-math.log(3)]))  # rho = 1/4
    print(f"n = {size}: weight {c.p[0, 0]:.4f}, without the logarithm {top(size, 4.0, 0):.4f}")
    tutorial.check("the formula", abs(c.p[0, 0] - top(size, 4.0, 0.25)), 16 * EPS)

# %%
# Experiment: short lessons, long contexts
# ----------------------------------------
# Find the needle: :math:`n` keys are random directions in 16 dimensions, the query is one of them,
# and the loss is :math:`-\ln` of the weight on that one. The layer has a matrix,
# :math:`x = q\, W k`, with a penalty of :math:`0.001\, \|W\|^2`. Training sees between 4 and 32
# keys; then the context grows to 2048. *Plain* attention has :math:`W` alone; *selective* attention
# has :math:`\alpha` besides, starting at :math:`\rho = 0.12`; everything else is the same, seed for
# seed. (The thresholds below were set after a pilot run on other seeds.)

tutorial.claim(
    spec.claim,
    criterion="on each of three seeds, at 2048 keys, 64 times the longest context of the training: "
    "the mean weight on the right key is below 0.1 with plain attention and at least 0.8 with the "
    "temperature",
)

WIDTH, STEPS, LENGTHS = 16, 2 if tutorial.quick else 300, (8, 32, 128, 512, 2048)
FACTORS = np.geomspace(1, 8, 10)


def needles(rng, B, n):
    """Queries, keys, and which key is the right one."""
    keys = rng.standard_normal((B, n, WIDTH))
    keys = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    right = rng.integers(0, n, B)
    return keys[np.arange(B), right][:, None], keys, right


def found(parameters, q, k, right, factor=1.0):
    """The weight on the right key, (B,)."""
    nothing = np.zeros((*k.shape[:-1], 1))
    alpha = parameters.get("alpha")
    _, cache = spec.forward(q @ parameters["W"], k, nothing, alpha=alpha, scale=factor)
    return np.take_along_axis(cache.p[:, 0], right[:, None], axis=-1)[:, 0]


def loss(parameters, penalty, q, k, right):
    miss = -np.mean(np.log(found(parameters, q, k, right)))
    return miss + penalty * np.sum(np.square(parameters["W"]))


def experiment(seed, own, penalty=0.001):
    """Mean weights at all lengths, the norm of W, rho, and weights at 2048 keys for larger W."""
    rng = np.random.default_rng(seed)
    parameters = {"W": rng.standard_normal((WIDTH, WIDTH)) / math.sqrt(WIDTH)}
    if own:
        parameters["alpha"] = np.full(1, -2.0)
    stream = (
        (penalty, *needles(rng, 32, round(math.exp(rng.uniform(math.log(4), math.log(32))))))
        for _ in range(STEPS)
    )
    name = f"{'selective' if own else 'plain'}, seed {seed}"
    parameters, _ = nn.train(loss, parameters, stream, steps=STEPS, rate=0.05, label=name)
    tests = {n: needles(np.random.default_rng([seed, n]), 64, n) for n in LENGTHS}
    weights = [np.mean(found(parameters, *tests[n])) for n in LENGTHS]
    larger = [np.mean(found(parameters, *tests[2048], factor=x)) for x in FACTORS]
    rho = 1 / (1 + math.exp(-parameters["alpha"][0])) if own else 0.0
    return np.array(weights), np.linalg.norm(parameters["W"]), rho, np.array(larger)


runs = {(seed, own): experiment(seed, own) for seed in range(3) for own in (False, True)}
records = []
for seed in range(3):
    record = {}
    for own, name in ((False, "plain"), (True, "selective")):
        weights, norm, rho, _ = runs[seed, own]
        record |= {f"{name}: {n} keys": weights[LENGTHS.index(n)] for n in (8, 32, 2048)}
        record[f"{name}: norm of W"] = norm
    records.append(record | {"rho": runs[seed, True][2]})
held = all(x["plain: 2048 keys"] < 0.1 and x["selective: 2048 keys"] >= 0.8 for x in records)
tutorial.measured(ours=records, verdict="reproduced" if held else "not reproduced", tolerance=0.05)

# %%
# The selective layer also does better *within* the lengths it was trained on, with a smaller
# matrix: its scores are multiplied by :math:`1 + \rho \ln n`, 2.8 at 8 keys and 4.1 at 32, and the
# penalty does not see this factor. At 2048 keys it is 7.7. The right panel of the figure asks what
# plain attention would need: with its matrix enlarged about four times, which makes its scores as
# large, it too finds the needle among 2048. Such a matrix would serve short contexts as well, as
# the needle is exact; but short contexts do not ask for it, and the logarithm carries on by itself.
# Is it the penalty that holds plain attention back? Without it, in the same 300 steps, seed 0:

free = [experiment(0, own, penalty=0.0) for own in (False, True)]
for (weights, norm, _, _), name in zip(free, ("plain", "selective"), strict=True):
    print(f"no penalty, {name}: {weights[-1]:.3f} at 2048 keys, norm of W {norm:.2f}")

# %%
# One thing must be said against the claim. The needle here is exact: more keys make it no less
# certain which one is right. Where the query is *noisy*, more keys are more to be mistaken for, and
# spreading the weight is the right answer; exercise 3 computes this.
#
# The figure
# ----------
# Left: a key ahead by :math:`\Delta = 4` nats. Middle: the experiment; grey is the range of the
# training. Right: seed 0 at 2048 keys, with the trained :math:`W` multiplied by a factor.

figure = None
if not tutorial.quick:
    plt = tutorial.pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(11.5, 3.6))
    many = np.geomspace(2, 1e5, 60)
    for rho, colour in ((0.0, ORANGE), (0.15, GREY), (0.25, GREEN), (0.35, BLUE)):
        axes[0].plot(many, top(many, 4.0, rho), color=colour, label=rf"$\rho = {rho:g}$")
    axes[0].set(title="A gap of 4 nats", xlabel="keys n", ylabel="its weight", ylim=(0, 1.05))
    axes[0].legend(loc="lower left")
    for own, colour, name in ((False, ORANGE, "plain"), (True, BLUE, "selective")):
        for seed in range(3):
            axes[1].plot(LENGTHS, runs[seed, own][0], "o-", color=colour, alpha=0.8,
                         label=name if seed == 0 else None)  # fmt: skip
        axes[2].plot(FACTORS, runs[0, own][3], "o-", color=colour, label=name)
    axes[1].axvspan(4, 32, color=GREY, alpha=0.15)
    axes[1].set(title="Trained on 4 to 32 keys", xlabel="keys n",
                ylabel="weight on the right key", ylim=(0, 1.05))  # fmt: skip
    axes[2].set(title="2048 keys, larger matrices", xlabel="W multiplied by",
                ylabel="weight on the right key", ylim=(0, 1.05))  # fmt: skip
    for panel in axes[:2]:
        panel.set_xscale("log")
    axes[1].legend(loc="lower left", bbox_to_anchor=(0, 0.2))
    axes[2].legend(loc="lower right")

# %%
# Exercises
# ---------
# **1. Write this backward yourself.** Given :math:`dz` (T, S), the scores :math:`x` (T, S), the
# logits :math:`f` (T,), :math:`\alpha` and the numbers of keys (T,), return :math:`df` and
# :math:`d\alpha`. Steps (2') and (1').


def my_temperature_gradient(dz, x, f, alpha, n):
    """Return df of shape (T,), dalpha of shape (1,)."""
    # solution: return None, None
    pull = np.einsum("ts,ts->t", dz, x)
    e = np.exp(-alpha)
    return pull / np.cosh(f) ** 2, e / (1 + e) ** 2 * (pull @ np.log(n))
    # end of solution


dp = dout @ (nu[:, None] * v).T
dz = p * (dp - np.sum(p * dp, axis=1, keepdims=True))
answer = dict(
    zip(("f_q", "alpha"), my_temperature_gradient(dz, scores, f_q, alpha, n), strict=True)
)
tutorial.exercise(1, answer, {name: theirs[name] for name in ("f_q", "alpha")})

# %%
# **2. Muted, not hidden.** A token with :math:`\nu_s = 0` has no content in any output. Is that the
# same as hiding its key behind a mask? What happens to the other weights, and to the size of the
# output, in both cases?

# %%
# **Solution 2.** No. A mask takes the weight away and the others share it; the output stays a
# mean. A muted token keeps its weight: the output shrinks by that share, and the others' weights
# stay.

mute = np.zeros(S)
mute[0] = -400.0
muted, c = spec.forward(q, k, v, None, mute)
masked, d = spec.forward(q, k, v, mask=np.broadcast_to(np.arange(S) > 0, (T, S)))
scaled = (1 - c.p[:, :1]) * masked
tutorial.check("exercise 2: muted = (1 - p_0) masked", np.max(np.abs(muted - scaled)), 16 * EPS)

# %%
# **3. When dilution is right.** Let the query be the right key plus noise, :math:`q = k_j + \sigma
# \epsilon`, and all keys have length 1 and be equally likely. Which weights are the probabilities
# of the keys given the query? Does the best temperature depend on :math:`n`?

# %%
# **Solution 3.** By Bayes :math:`P(j \mid q) \propto e^{-|q - k_j|^2 / 2\sigma^2} \propto
# e^{q \cdot k_j / \sigma^2}`: softmax attention with the scale :math:`1/\sigma^2` for every
# :math:`n`. The logarithm would make the layer surer than it may be.

noisy, sigma = np.random.default_rng(9), 0.35
grid = np.array([0.5, 0.71, 1.0, 1.41, 2.0]) / sigma**2
for size in (8, 256):
    q3, k3, right = needles(noisy, 40 if tutorial.quick else 2000, size)
    q3 = q3 + sigma * noisy.standard_normal(q3.shape)
    identity = {"W": np.eye(WIDTH)}
    nats = [-np.mean(np.log(found(identity, q3, k3, right, factor=x))) for x in grid]
    print(f"n = {size}: loss", " ".join(f"{x:.3f}" for x in nats), "nats")
    best = int(np.argmin(nats))
    tutorial.check("exercise 3: the best scale is 1/sigma^2", 0 if tutorial.quick else best - 2, 0)

# %%
tutorial.finish(figure)
