r"""
Soft-capped scores
==================

**The question.** In the middle of a long training run the scores of a few heads begin to grow.
At a score of 300 the softmax is a switch, in half precision the products lose their digits, and
the loss jumps. Clipping the scores would stop their growth, but a clipped score has the
gradient 0 and never comes back. Is there a gentler fence?

**The idea.** Send every score through a tangens hyperbolicus that is stretched to the height of
the fence: small scores pass unchanged, large ones approach the cap and never reach it.

You need to know the softmax and the derivative of tanh; ``scores/dot_product`` explains the rest.
"""

# %%
# Definition
# ----------
# With :math:`T` queries and :math:`S` keys, one number "cap" (in nats, like the scores):
#
# .. math::
#
#    z_{ts} &= c\, q_t \cdot k_s                                                 &(1)\\
#    y_{ts} &= \text{cap}\, \tanh(z_{ts} / \text{cap})                           &(2)\\
#    p_{ts} &= e^{y_{ts} + b_{ts}} / \textstyle\sum_{s'} e^{y_{ts'} + b_{ts'}}   &(3)\\
#    o_t    &= \textstyle\sum_s p_{ts}\, v_s                                     &(4)
#
# Three properties. Near 0 it is the identity, for
# :math:`y = z - z^3 / (3\, \text{cap}^2) + \dots`. It is increasing, so the order of the keys
# stays. And :math:`|y| < \text{cap}`, so without a bias
#
# .. math:: p_{ts} / p_{ts'} = e^{y_{ts} - y_{ts'}} < e^{2\, \text{cap}} .
#
# Gemma 2 caps its attention scores at 50 and its final logits at 30. The order matters: first the
# scale, then the cap, then bias and mask. A mask of :math:`-\infty` before the cap would come out
# as -cap, a small weight where there must be none.

import math

import numpy as np

import attention_ref
from attention_ref.kit.tutorial import BLUE, GREY, ORANGE, Tutorial

tutorial = Tutorial(__file__)
spec = attention_ref.get("scores/softcap")
dot = attention_ref.get("scores/dot_product")
EPS = np.finfo(np.float64).eps

# %%
# An example by hand
# ------------------
# :math:`\tanh \ln 2 = \frac{2 - 1/2}{2 + 1/2} = \tfrac35`. So with
# :math:`\text{cap} = \tfrac53 \ln 3` a score of :math:`z = \text{cap} \ln 2` comes out as
# :math:`y = \tfrac35\, \text{cap} = \ln 3`. Two keys, scores :math:`(0, \text{cap} \ln 2)`:
#
# .. math:: y = (0, \ln 3), \qquad p = (\tfrac14, \tfrac34), \qquad v = (4, 8)
#           \ \Rightarrow\ o = 1 + 6 = 7 .

cap = 5 / 3 * math.log(3)
small = {
    "q": np.ones((1, 1, 1)),
    "k": np.array([[[0.0], [cap * math.log(2)]]]),
    "v": np.array([[[4.0], [8.0]]]),
    "cap": np.array([cap]),
}
out, small_cache = spec.forward(**small)
z = small_cache.z.ravel()
print("z =", z.round(4).tolist(), "y =", (cap * small_cache.u).ravel().round(4).tolist())
tutorial.check("weights 1/4, 3/4", np.max(np.abs(small_cache.p - [0.25, 0.75])), 4 * EPS)
tutorial.check("the output is 7", abs(out.item() - 7), 32 * EPS)

# %%
# The forward
# -----------


def capped(q, k, v, cap, live):
    """Steps (1) to (4) without a bias; returns the output and what is needed later."""
    z = q @ k.T / math.sqrt(q.shape[1])  # (1)
    u = np.tanh(z / cap)
    y = np.where(live, cap * u, -np.inf)  # (2)
    e = np.exp(y - y.max(axis=1, keepdims=True))
    p = e / e.sum(axis=1, keepdims=True)  # (3)
    return p @ v, z, u, p  # (4)


rng = np.random.default_rng(0)
T, S, D, E = 4, 6, 3, 2
q, k, v = rng.standard_normal((T, D)), rng.standard_normal((S, D)), rng.standard_normal((S, E))
cap = 0.8
live = np.arange(S) <= np.arange(T)[:, None] + (S - T)
out, z, u, p = capped(q, k, v, cap, live)
given = {"q": q[None], "k": k[None], "v": v[None], "cap": np.array([cap])}
library, cache = spec.forward(**given, causal=True)
tutorial.check("forward against the library", np.max(np.abs(out - library[0])), 8 * EPS)

# %%
# The backward, line by line
# --------------------------
# From the bottom up; :math:`dx` is the gradient of :math:`x`, and :math:`do` is given.
#
# **(4'), (3')** As for every softmax attention: :math:`dv = p^\top do`, :math:`dp = do\, v^\top`,
# :math:`dy = p\,(dp - \sum_s p\, dp)`.
#
# **(2')** Let :math:`u = \tanh(z / \text{cap}) = y / \text{cap}`, whose derivative with respect
# to its argument is :math:`1 - u^2`. The score stands once in :math:`y = \text{cap}\, u`:
#
# .. math:: \frac{\partial y}{\partial z}
#           = \text{cap}\, (1 - u^2)\, \frac1{\text{cap}} = 1 - u^2
#           \quad\Rightarrow\quad dz = dy\, (1 - u^2) .
#
# The cap stands twice, as a factor and inside:
#
# .. math:: \frac{\partial y}{\partial\, \text{cap}}
#           = u + \text{cap}\, (1 - u^2) \Bigl(-\frac{z}{\text{cap}^2}\Bigr)
#           = u - \frac{z}{\text{cap}} (1 - u^2) ,
#
# and it is the same for all pairs, so its gradient is the sum
# :math:`d\,\text{cap} = \sum_{t, s} dy_{ts}\, (u_{ts} - \tfrac{z_{ts}}{\text{cap}}
# (1 - u_{ts}^2))`.
#
# **(1')** :math:`dq = c\, dz\, k`, :math:`dk = c\, dz^\top q`.


def capped_backward(dout, q, k, v, cap, z, u, p):
    """Steps (4') to (1')."""
    dv, dp = p.T @ dout, dout @ v.T  # (4')
    dy = p * (dp - np.sum(p * dp, axis=1, keepdims=True))  # (3')
    dz = dy * (1 - u**2)  # (2')
    dcap = np.sum(dy * (u - z / cap * (1 - u**2)))
    c = 1 / math.sqrt(q.shape[1])
    return {"q": c * dz @ k, "k": c * dz.T @ q, "v": dv, "cap": dcap}  # (1')


dout = rng.standard_normal((T, E))
ours = capped_backward(dout, q, k, v, cap, z, u, p)
theirs = spec.backward(dout[None], cache)
for name in ours:
    error = np.max(np.abs(ours[name] - theirs[name][0]))
    tutorial.check(f"d{name} from the board against the library", error, 32 * EPS)

# %%
# *The example backwards*, :math:`L = o`. :math:`dy = p\,(v - 7) = (-\tfrac34, \tfrac34)`; the
# slopes are 1 and :math:`1 - \tfrac9{25} = \tfrac{16}{25}`, so
# :math:`dz = dk = (-\tfrac34, \tfrac{12}{25})`. No longer do the two add up to 0: the score that
# is nearer to the fence moves less. And
# :math:`d\,\text{cap} = \tfrac34 (\tfrac35 - \tfrac{16}{25} \ln 2)`.

gradient = spec.backward(np.ones((1, 1, 1)), small_cache)
error = np.max(np.abs(gradient["k"].ravel() - [-3 / 4, 12 / 25]))
tutorial.check("dk of the example", error, 16 * EPS)
error = abs(gradient["cap"].item() - 3 / 4 * (3 / 5 - 16 / 25 * math.log(2)))
tutorial.check("dcap of the example", error, 16 * EPS)

# %%
# Four roads to the same gradient, with a mask and a bias:

tutorial.gradients(spec, given | {"mask": live, "bias": rng.standard_normal((T, S))})

# %%
# Experiment: a wrong winner
# --------------------------
# What does the fence do to learning? Take a query that should find key 0, with the loss
# :math:`L = -\ln p_0`. By mistake key 1 has a huge score :math:`g`; all other scores are
# ordinary. Without a cap :math:`dz = p - \mathbf 1_0`: the loss pulls key 1 down with
# force 1 and key 0 up with force 1, however large :math:`g` is. With a cap each pull is
# multiplied by the slope at its own score. For cap = 50 the slopes at 100, 200, 300 are 0.071,
# 0.0013 and 0.000025. We measure the pull on a key as the norm of its gradient :math:`dk_s`.

tutorial.claim(
    spec.claim,
    criterion="cap 50, on each of three seeds: with queries up to 1000 times too large the "
    "capped scores of a row stay within 100 nats while the others leave them; when key 1 has "
    "the score 300, the cap makes its gradient at least 10^4 times smaller, and changes that of "
    "the right key, whose score is ordinary, by less than 5 %",
)

CAP, SIZES, WINNERS = 50.0, (1, 10, 100, 1000), (25, 50, 100, 150, 200, 250, 300)


def spreads(rng):
    """Largest difference of two scores of a row, in nats, for growing queries: capped, plain."""
    q, k, v = rng.standard_normal((20, 64)), rng.standard_normal((64, 64)), np.zeros((64, 1))
    found = []
    for size in SIZES:
        z = dot.forward(size * q, k, v)[1].capped
        y = CAP * spec.forward(size * q, k, v, CAP)[1].u
        found.append([np.max(np.ptp(x, axis=-1)) for x in (y, z)])
    return np.array(found)


def pulls(rng, winner):
    """Norms of dk for the winner and for the right key: capped, plain."""
    q, k = rng.standard_normal((1, 64)), rng.standard_normal((32, 64))
    k[1] = q[0] * winner * 8 / np.sum(q**2)  # its score is exactly ``winner``
    v = np.eye(32)[:, :1]  # the output is p_0
    found = []
    for method, options in ((spec, {"cap": CAP}), (dot, {})):
        out, cache = method.forward(q, k, v, **options)
        dk = method.backward(-1 / out, cache)["k"]
        found.append([np.linalg.norm(dk[1]), np.linalg.norm(dk[0])])
    return np.array(found)


records, held, drawn = [], [], []
for seed in range(3):
    spread = spreads(np.random.default_rng(seed))
    pull = np.array([pulls(np.random.default_rng(10 + seed), g) for g in WINNERS])
    ratio = pull[:, 0] / pull[:, 1]  # (winner, [wrong key, right key])
    drawn.append((spread, ratio))
    records.append(
        {f"spread, queries x {n}": spread[i, 0] for i, n in enumerate(SIZES)}
        | {f"uncapped, queries x {n}": spread[i, 1] for i, n in enumerate(SIZES)}
        | {f"pull on the winner at {g}": ratio[WINNERS.index(g), 0] for g in (100, 200, 300)}
        | {"pull on the right key": ratio[-1, 1]}
    )
    held.append(
        np.all(spread[:, 0] <= 2 * CAP)
        and spread[-1, 1] > 2 * CAP
        and ratio[-1, 0] < 1e-4
        and abs(ratio[-1, 1] - 1) < 0.05
    )
tutorial.measured(
    ours=records,
    verdict="reproduced" if all(held) else "partly" if any(held) else "not reproduced",
    tolerance=0.05,
)

# %%
# So the fence cuts both ways. A score that has run away stays where it is; it is the others that
# must catch up, and they can, for the distance is at most 2 cap. Compare clipping, whose slope is
# exactly 0 beyond the fence, and nothing at all, where the wrong score is pulled back at once.
#
# The figure
# ----------
# Left: capped and plain scores, and what clipping would do. Middle: the slope. Right: the pull on
# a wrong winner, dots for three seeds; the line is the slope, the squares are the right key.

figure = None
if not tutorial.quick:
    plt = tutorial.pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(11.5, 3.8))
    z = np.linspace(-200, 200, 401)
    axes[0].plot(z, z, color=GREY, linewidth=1, label="no cap")
    axes[0].plot(z, np.clip(z, -CAP, CAP), ":", color=ORANGE, label="clipped")
    axes[0].plot(z, CAP * np.tanh(z / CAP), color=BLUE, label="50 tanh(z / 50)")
    axes[0].set(title="Scores", xlabel="score z (nats)", ylabel="capped score y (nats)",
                ylim=(-110, 110))  # fmt: skip
    axes[0].legend(loc="upper left")

    axes[1].plot(z, np.abs(z) < CAP, ":", color=ORANGE, label="clipped")
    axes[1].plot(z, 1 - np.tanh(z / CAP) ** 2, color=BLUE, label=r"$1 - \tanh^2(z / 50)$")
    axes[1].set(title="Slopes", xlabel="score z (nats)", ylabel="dy / dz", ylim=(-0.03, 1.35))
    axes[1].legend(loc="upper left")

    g = np.linspace(20, 305, 100)
    axes[2].plot(g, 1 / np.cosh(g / CAP) ** 2, color=BLUE, linewidth=1.2)
    for _, ratio in drawn:
        axes[2].plot(WINNERS, ratio[:, 0], "o", color=BLUE, alpha=0.6)
        axes[2].plot(WINNERS, ratio[:, 1], "s", color=ORANGE, alpha=0.6)
    axes[2].text(295, 1.35, "right key", color=ORANGE, ha="right", va="bottom")
    axes[2].text(95, 4e-4, "wrong winner", color=BLUE)
    axes[2].set_yscale("log", base=10)
    axes[2].set(title="Who still learns?", xlabel="score of the wrong winner (nats)",
                ylabel="gradient, capped / uncapped", ylim=(1e-5, 6))  # fmt: skip

# %%
# Exercises
# ---------
# **1. Write this backward yourself.** Step (2) with its cap: given dy and z, both (T, S), and the
# cap, return dz and the number dcap. (A check of your own: if z and the cap are doubled, y is
# doubled. Euler's theorem then ties dz and dcap together.)


def my_backward(dy, z, cap):
    """Return dz and dcap."""
    # solution: return None, None
    y = cap * np.tanh(z / cap)
    dz = dy * (cap - y) * (cap + y) / cap**2
    return dz, (np.vdot(dy, y) - np.vdot(dz, z)) / cap
    # end of solution


fresh = np.random.default_rng(7)
given = {name: fresh.standard_normal((1, *shape))
         for name, shape in (("q", (3, 4)), ("k", (5, 4)), ("v", (5, 2)))}  # fmt: skip
_, cache = spec.forward(**given, cap=np.array([0.9]), bias=np.zeros((1, 3, 5)), scale=0.7)
right = spec.backward(fresh.standard_normal((1, 3, 2)), cache)  # the bias receives dy
dz, dcap = my_backward(right["bias"][0], cache.z[0], 0.9)
answer = {"cap": dcap, "q": None if dz is None else 0.7 * dz @ given["k"][0]}
tutorial.exercise(1, answer, {"cap": right["cap"][0], "q": right["q"][0]})

# %%
# **2. How large is large enough?** By the series the error of the cap is
# :math:`z^3 / (3\, \text{cap}^2)`. From which cap on do scores of 10 nats change by less than
# 0.01? Check with the next term, :math:`2 z^5 / (15\, \text{cap}^4)`.

# %%
# **Solution 2.** :math:`1000 / (3\, \text{cap}^2) = 0.01` gives :math:`\text{cap} = 182.6`. The
# series of :math:`y` is :math:`z - z^3 / (3\, \text{cap}^2) + 2 z^5 / (15\, \text{cap}^4)`, so the
# next term makes the change smaller, by :math:`1.2 \cdot 10^{-5}`: the condition is safe by a
# tenth of a percent.

enough = math.sqrt(10**3 / (3 * 0.01))
change = 10 - enough * math.tanh(10 / enough)
print(f"exercise 2: cap = {enough:.1f}, scores of 10 change by {change:.5f}")
tutorial.check("exercise 2: less than 0.01", change, 0.01)
left = 0.01 - 2 * 10**5 / (15 * enough**4) - change
tutorial.check("exercise 2: after the next term", abs(left), 1e-7)

# %%
# **3. Two temperatures.** Halve the scale and the cap together. Show that the capped scores are
# exactly halved, and say what this does to the weights.

# %%
# **Solution 3.** :math:`\tfrac{\text{cap}}2 \tanh(\tfrac z2 / \tfrac{\text{cap}}2) = \tfrac12\,
# \text{cap} \tanh(z / \text{cap})`. So :math:`e^{y/2} = \sqrt{e^y}`: the new weights are the
# square roots of the old ones, divided by their sum, as at temperature 2. They lie nearer to each
# other, in the same order; their largest ratio is below :math:`e^{\text{cap}}` in place of
# :math:`e^{2\, \text{cap}}`.

_, full = spec.forward(q, k, v, cap)
_, half = spec.forward(q, k, v, cap / 2, scale=0.5 / math.sqrt(D))
root = np.sqrt(full.p)
error = np.max(np.abs(half.p - root / root.sum(axis=-1, keepdims=True)))
tutorial.check("exercise 3: the root of the weights", error, 8 * EPS)

# %%
tutorial.finish(figure)
