r"""
Show, attend and tell: looking while naming
===========================================

**The question.** A network that writes a caption from one vector of the whole image must have
packed everything into it. What if it could look at one place for every word? And if it looks at
*exactly* one place, drawn at random: how does one differentiate a glance?

**The idea.** The encoder hands over a grid of vectors, one a place. Before every word the decoder's
state scores the places with a small network, as in ``scores/additive``. *Soft* attention mixes the
places by their weights. *Hard* attention draws one of them, and learns from how well the word came
out. A gate says how much of the image a word needs, and a penalty asks that in the end every place
has been looked at.

You need ``scores/additive`` for the scores; nothing about recurrent networks beyond the idea of a
state.
"""

# %%
# Definition
# ----------
# The query :math:`q_t` is the decoder's state before word :math:`t`, the keys :math:`k_s` and the
# values :math:`v_s` are the annotations of the places, in the paper the same vectors.
#
# .. math::
#
#    a_t    &= q_t W_q, \qquad h_s = k_s W_k + b                                            &(1)\\
#    u_{ts} &= \tanh(a_t + h_s)                                                             &(2)\\
#    z_{ts} &= u_{ts} \cdot w + \text{bias}_{ts}                                            &(3)\\
#    p_{ts} &= e^{z_{ts}} / \textstyle\sum_{s'} e^{z_{ts'}}                                 &(4)\\
#    \beta_t &= \sigma(q_t \cdot w_g + b_g)                                                 &(5)\\
#    o_t    &= \beta_t \textstyle\sum_s r_{ts}\, v_s                                        &(6)
#
# with :math:`r_{ts} = p_{ts}` in soft attention. In hard attention a place :math:`s_t` is drawn
# with the probabilities :math:`p_t`, and :math:`r_{ts}` is 1 there and 0 elsewhere.

import itertools
import math

import numpy as np

import attention_ref
from attention_ref import core, nn
from attention_ref.kit.tutorial import BLUE, GREY, ORANGE, Tutorial
from attention_ref.methods.scores.show_attend_tell import (
    show_attend_tell_penalty_backward,
    show_attend_tell_penalty_forward,
    show_attend_tell_surrogate,
)

tutorial = Tutorial(__file__)
spec = attention_ref.get("scores/show_attend_tell")
EPS = np.finfo(np.float64).eps

# %%
# An example by hand
# ------------------
# One word, two places, one hidden unit, all projections 1, the state :math:`q = 0`. Annotations
# :math:`k = (0, \ln 2)` give the hidden units :math:`\tanh 0 = 0` and :math:`\tanh \ln 2 =
# \tfrac35`. With :math:`w = \tfrac53 \ln 3` the scores are 0 and :math:`\ln 3`, the weights
# :math:`\tfrac14` and :math:`\tfrac34`. Values :math:`(0, 4)` mix to 3; a gate with the bias
# :math:`\ln 3` is open to :math:`\tfrac34`, so :math:`o = \tfrac94`.

small = {
    "q": np.array([[0.0]]),
    "k": np.array([[0.0], [math.log(2)]]),
    "v": np.array([[0.0], [4.0]]),
    "Wq": np.ones((1, 1)),
    "Wk": np.ones((1, 1)),
    "w": np.array([5 / 3 * math.log(3)]),
    "b": np.zeros(1),
    "w_g": np.ones(1),
    "b_g": np.array([math.log(3)]),
}
out, small_cache = spec.forward(**small)
print("weights", small_cache.p.round(4).tolist(), "gate", small_cache.gate.round(4).tolist())
tutorial.check("weights 1/4, 3/4", np.max(np.abs(small_cache.p - [[0.25, 0.75]])), 4 * EPS)
tutorial.check("the output is 9/4", abs(out.item() - 2.25), 16 * EPS)

# %%
# The forward
# -----------


def look(q, k, v, Wq, Wk, w, b, w_g, b_g):
    """Steps (1) to (6), soft."""
    a, h = q @ Wq, k @ Wk + b  # (1)
    u = np.tanh(a[:, None] + h[None])  # (2)
    z = u @ w  # (3)
    e = np.exp(z - z.max(axis=1, keepdims=True))
    p = e / e.sum(axis=1, keepdims=True)  # (4)
    beta = 1 / (1 + np.exp(-(q @ w_g + b_g)))[:, None]  # (5)
    return beta * (p @ v), (u, p, beta)  # (6)


rng = np.random.default_rng(0)
T, S, D, DK, E, M = 4, 5, 3, 2, 2, 3
shapes = {"q": (T, D), "k": (S, DK), "v": (S, E), "Wq": (D, M), "Wk": (DK, M), "w": (M,)}
shapes |= {"b": (M,), "w_g": (D,), "b_g": (1,)}
case = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
out, (u, p, beta) = look(**case)
library, cache = spec.forward(**case)
tutorial.check("forward against the library", np.max(np.abs(out - library)), 8 * EPS)

# %%
# The backward of soft attention
# ------------------------------
# **(6')** :math:`o_t = \beta_t m_t` with the mix :math:`m_t = \sum_s p_{ts} v_s`:
# :math:`d\beta_t = do_t \cdot m_t`, :math:`dp_{ts} = \beta_t\, do_t \cdot v_s`,
# :math:`dv_s = \sum_t p_{ts} \beta_t\, do_t`.
#
# **(5')** The sigmoid: with :math:`dl_t = d\beta_t\, \beta_t (1 - \beta_t)`,
# :math:`dw_g = \sum_t dl_t\, q_t`, :math:`db_g = \sum_t dl_t`, and :math:`dq_t` gets
# :math:`dl_t\, w_g`.
#
# **(4')** :math:`dz = p\,(dp - \sum_s p\, dp)`. Whatever else acts on the weights adds to
# :math:`dp` *before* this step: the penalty below, and the surrogate of hard attention.
#
# **(3') (2') (1')** As in ``scores/additive``: :math:`dw = \sum_{ts} dz_{ts} u_{ts}`,
# :math:`dx_{ts} = dz_{ts}\, w\, (1 - u_{ts}^2)`, then each sum to its side.


def look_backward(dout, q, k, v, Wq, Wk, w, b, w_g, b_g, u, p, beta):
    """Steps (6') to (1')."""
    dbeta = np.sum(dout * (p @ v), axis=1, keepdims=True)  # (6')
    dp, dv = beta * (dout @ v.T), p.T @ (beta * dout)
    dl = dbeta * beta * (1 - beta)  # (5')
    dz = p * (dp - np.sum(p * dp, axis=1, keepdims=True))  # (4')
    dw = np.einsum("ts,tsm->m", dz, u)  # (3')
    dx = dz[:, :, None] * w * (1 - u**2)  # (2')
    da, dh = dx.sum(axis=1), dx.sum(axis=0)
    return {  # (1')
        "q": da @ Wq.T + dl * w_g, "k": dh @ Wk.T, "v": dv, "Wq": q.T @ da, "Wk": k.T @ dh,
        "w": dw, "b": dh.sum(axis=0), "w_g": dl[:, 0] @ q, "b_g": dl.sum(axis=0),
    }  # fmt: skip


dout = rng.standard_normal((T, E))
ours = look_backward(dout, **case, u=u, p=p, beta=beta)
theirs = spec.backward(dout, cache)
for name in ours:
    error = np.max(np.abs(ours[name] - theirs[name]))
    tutorial.check(f"d{name} from the board against the library", error, 64 * EPS)

# %%
# *The example backwards*, :math:`L = o`: :math:`dp = (0, 3)`, so
# :math:`dz = \tfrac{9}{16} (-1, 1)`; the gate's logit gets :math:`3 \cdot \tfrac34 \cdot \tfrac14 =
# \tfrac{9}{16}` too.

gradient = spec.backward(np.ones((1, 1)), small_cache)
tutorial.check("db_g of the example", abs(gradient["b_g"].item() - 9 / 16), 8 * EPS)
tutorial.check("dw of the example", abs(gradient["w"].item() - 9 / 16 * 0.6), 8 * EPS)
tutorial.gradients(spec, case | {"bias": rng.standard_normal((T, S))})

# %%
# The doubly stochastic penalty
# -----------------------------
# Every row of :math:`p` sums to 1 by construction. The columns need not: a place may be looked at
# for every word or for none. The penalty asks for column sums of :math:`\tau = 1`:
#
# .. math:: L = \lambda \textstyle\sum_s (\tau - \sum_t p_{ts})^2, \qquad
#           dp_{ts} = -2 \lambda\, (\tau - \sum_{t'} p_{t's}) \qquad (7)
#
# The same number for every word: whoever looks elsewhere helps. All weights together are
# :math:`T`, so columns of 1 can only be had when there are as many words as places. Otherwise the
# least that :math:`L` can be is :math:`\lambda S (1 - T/S)^2`, reached when all columns are equal.

loss, missing = show_attend_tell_penalty_forward(p)
dp = show_attend_tell_penalty_backward(np.ones_like(loss), missing)["p"]
print("column sums", p.sum(axis=0).round(3).tolist(), "penalty", round(float(loss), 4))
step = p - 1e-6 * dp
change = show_attend_tell_penalty_forward(step)[0] - loss
tutorial.check("slope along -dp, relative", abs(-change / (1e-6 * np.sum(dp**2)) - 1), 1e-4)

# %%
# Hard attention: differentiating a glance
# ----------------------------------------
# A place is drawn. Moving :math:`p` a little does not move the place drawn: (6) has no derivative
# in :math:`p`. But what we want to be small is the *expected* cost
#
# .. math:: J = \textstyle\sum_s p_s\, c(s), \qquad \partial J / \partial p_s = c(s),
#
# and this has one. It asks for the cost of every place, while a draw tells us one of them. The
# trick: put the one we know at its place, divided by how often we get to know it,
#
# .. math:: dp_s = c(s_t)\, [s = s_t] / p_s . \qquad (8)
#
# Its mean is :math:`\sum_{s'} p_{s'}\, c(s')\, [s = s'] / p_s = c(s)`: right on average, whatever
# it does in the single draw. A constant :math:`b` taken off the cost (the *baseline*, in the paper
# a running mean) takes :math:`b` off all entries of the mean, which the softmax does not see. It
# does not change the mean of :math:`dz`; it does change the scatter.
#
# For two words and a cost of the whole caption, all draws can be enumerated. Both words answer for
# the total cost:

pair = {name: x for name, x in case.items() if name not in ("w_g", "b_g")}
pair |= {"q": case["q"][:2], "k": case["k"][:3], "v": case["v"][:3]}
costs = rng.standard_normal((3, 3)) + 3
_, hard = spec.forward(**pair, rng=np.random.default_rng(0))
average = hard.p[0] @ costs @ hard.p[1]
true_dp = np.stack([costs @ hard.p[1], hard.p[0] @ costs])  # the derivative of J, by hand
true = spec.backward(np.zeros((2, E)), hard, dp=true_dp)["Wq"]
for baseline in (0.0, average):
    mean, scatter = np.zeros((D, M)), 0.0
    for i, j in itertools.product(range(3), repeat=2):
        drawn = hard._replace(r=np.eye(3)[[i, j]])
        dp = show_attend_tell_surrogate(np.full(2, costs[i, j] - baseline), drawn)
        g = spec.backward(np.zeros((2, E)), drawn, dp=dp)["Wq"]
        chance = hard.p[0, i] * hard.p[1, j]
        mean, scatter = mean + chance * g, scatter + chance * np.sum((g - true) ** 2)
    print(f"baseline {baseline:.2f}: variance of dWq {scatter:.3f}, |dWq|^2 {np.sum(true**2):.3f}")
    tutorial.check("mean over all nine draws", np.max(np.abs(mean - true)), 64 * EPS)

# %%
# Experiment: reading a strip
# ---------------------------
# A strip of five places holds five glyphs out of six. The annotation of a place is the code of its
# glyph plus a code of the place plus noise, ten numbers. The caption names the glyphs from left to
# right. The decoder is a recurrent network (an LSTM) of 16 units whose input is the last word and
# the glance :math:`o_t`; the next word is read off its state and the glance. Nobody tells it where
# to look. As many words as places, so the target :math:`\tau = 1` of the penalty can be reached.
# (The thresholds below were set after a pilot run on other seeds.)

tutorial.claim(
    spec.claim,
    criterion="on each of three seeds, on 400 fresh strips, after 300 steps: the largest weight "
    "lies on the glyph being named for at least 70 % of the words, with lambda = 0 and with "
    "lambda = 1 (chance is 20 %), and the standard deviation of the column sums with lambda = 1 "
    "is at most 0.7 times that with lambda = 0",
)

GLYPHS, PLACES, WIDTH, HIDDEN, STEPS = 6, 5, 10, 16, 2 if tutorial.quick else 300


def initial(rng):
    def draw(*shape):
        return rng.standard_normal(shape) / math.sqrt(shape[0])

    return {
        "Wq": draw(HIDDEN, 16), "Wk": draw(WIDTH, 16), "w": draw(16), "b": np.zeros(16),
        "w_g": np.zeros(HIDDEN), "b_g": np.ones(1), "words": draw(GLYPHS + 1, 8),
        "lstm": draw(8 + WIDTH + HIDDEN, 4 * HIDDEN), "bias": np.zeros(4 * HIDDEN),
        "state": draw(WIDTH, HIDDEN), "memory": draw(WIDTH, HIDDEN),
        "read": draw(HIDDEN + WIDTH, GLYPHS),
    }  # fmt: skip


def decode(parameters, strips, glyphs):
    """Scores of the words and the weights, each (B, PLACES, ...), the right words fed back."""
    mean = np.mean(strips, axis=1)
    h, c = np.tanh(mean @ parameters["state"]), np.tanh(mean @ parameters["memory"])
    network = {name: parameters[name] for name in ("Wq", "Wk", "w", "b", "w_g", "b_g")}
    word, scores, maps = np.full(len(strips), GLYPHS), [], []
    for t in range(PLACES):
        glance, cache = spec.forward(h[:, None], strips, strips, **network)
        maps.append(cache.p[:, 0])
        glance = glance[:, 0]
        known = np.concatenate([parameters["words"][word], glance, h], axis=-1)
        x = known @ parameters["lstm"] + parameters["bias"]
        i, f, o, new = (x[:, n * HIDDEN : (n + 1) * HIDDEN] for n in range(4))
        c = core.logistic(f + 1) * c + core.logistic(i) * np.tanh(new)
        h = core.logistic(o) * np.tanh(c)
        scores.append(np.concatenate([h, glance], axis=-1) @ parameters["read"])
        word = glyphs[:, t]
    return np.stack(scores, axis=1), np.stack(maps, axis=1)


def caption_loss(parameters, strips, glyphs, weight):
    """Nats a word, plus the penalty of a caption."""
    scores, maps = decode(parameters, strips, glyphs)
    penalty, _ = show_attend_tell_penalty_forward(maps, weight=weight)
    return nn.model.cross_entropy(scores, glyphs) + np.mean(penalty)


def experiment(seed, weight):
    """Numbers on fresh strips, the mean map, the column sums."""
    rng = np.random.default_rng(seed)
    codes, places = rng.standard_normal((GLYPHS, WIDTH)), rng.standard_normal((PLACES, WIDTH))

    def strips(rng, B):
        glyphs = rng.integers(0, GLYPHS, (B, PLACES))
        noise = 0.3 * rng.standard_normal((B, PLACES, WIDTH))
        return codes[glyphs] + 0.7 * places + noise, glyphs

    stream = ((*strips(rng, 16), weight) for _ in range(STEPS))
    parameters, _ = nn.train(
        caption_loss, initial(rng), stream, steps=STEPS, rate=0.02,
        label=f"seed {seed}, lambda {weight:g}",
    )  # fmt: skip
    seen, glyphs = strips(np.random.default_rng(1000 + seed), 400)
    scores, maps = decode(parameters, seen, glyphs)
    sums = maps.sum(axis=1)
    return (
        {
            "right words": np.mean(np.argmax(scores, axis=-1) == glyphs),
            "looks at it": np.mean(np.argmax(maps, axis=-1) == np.arange(PLACES)),
            "weight on it": np.mean(np.diagonal(maps, axis1=1, axis2=2)),
            "deviation": np.std(sums),
        },
        maps.mean(axis=0),
        sums,
    )


runs = {(seed, weight): experiment(seed, weight) for seed in range(3) for weight in (0.0, 1.0)}
records = []
for seed in range(3):
    rows = {weight: runs[seed, weight][0].items() for weight in (0.0, 1.0)}
    records.append({f"{name}, lambda {n:g}": x for n, row in rows.items() for name, x in row})
follows = all(x[f"looks at it, lambda {n}"] >= 0.7 for x in records for n in (0, 1))
even = all(x["deviation, lambda 1"] <= 0.7 * x["deviation, lambda 0"] for x in records)
verdict = "reproduced" if follows and even else "partly" if follows or even else "not reproduced"
tutorial.measured(ours=records, verdict=verdict, tolerance=0.15)

# %%
# Two things to see in the table. The places do get their equal share with the penalty. But they get
# it in the cheapest way: the maps become *flatter*, less of the weight lies on the glyph being
# named, and fewer words are right after the same number of steps. A flat map has equal column sums
# as well as a sharp one that walks along the strip; the penalty cannot tell them apart.
#
# The figure
# ----------
# Left: mean maps of seed 0, one row a word. Middle: column sums of all places of the fresh strips.
# Right: how the mean of (8) over many draws approaches the true gradient, with and without the
# baseline.

figure = None
if not tutorial.quick:
    plt = tutorial.pyplot()
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.3), width_ratios=(1, 1, 1.35, 1.35))
    for panel, weight in zip(axes, (0.0, 1.0), strict=False):
        panel.imshow(runs[0, weight][1], vmin=0, vmax=1)
        panel.grid(False)
        panel.set_title(rf"maps, $\lambda = {weight:g}$", fontsize=11)
        panel.set(xlabel="place", xticks=range(5), yticks=range(5))
    axes[0].set_ylabel("word")
    bins = np.linspace(0.3, 1.9, 41)
    for weight, colour in ((0.0, GREY), (1.0, BLUE)):
        sums = np.concatenate([runs[seed, weight][2].ravel() for seed in range(3)])
        axes[2].hist(sums, bins, color=colour, alpha=0.6, label=rf"$\lambda = {weight:g}$")
    axes[2].set(title="How often a place is looked at", xlabel="column sum", ylabel="places")
    axes[2].legend(loc="upper left")

    counts, draws = np.array([10, 30, 100, 300, 1000, 3000]), np.random.default_rng(3)
    table = hard.p[0][:, None] * hard.p[1]
    chosen = draws.choice(9, size=(50, counts[-1]), p=table.ravel() / table.sum())
    for baseline, colour, name in ((0.0, ORANGE, "no baseline"), (average, BLUE, "baseline")):
        each = []
        for i, j in itertools.product(range(3), repeat=2):
            drawn = hard._replace(r=np.eye(3)[[i, j]])
            dp = show_attend_tell_surrogate(np.full(2, costs[i, j] - baseline), drawn)
            each.append(spec.backward(np.zeros((2, E)), drawn, dp=dp)["Wq"].ravel())
        known = np.cumsum(np.stack(each)[chosen], axis=1)[:, counts - 1] / counts[:, None]
        errors = np.sqrt(np.mean(np.sum((known - true.ravel()) ** 2, axis=-1), axis=0))
        axes[3].plot(counts, errors / np.sqrt(np.sum(true**2)), "o-", color=colour, label=name)
    axes[3].set_xscale("log")
    axes[3].set_yscale("log")
    axes[3].set(title="Learning from draws", xlabel="draws", ylabel="relative error of dWq")
    axes[3].legend(loc="upper right")

# %%
# Exercises
# ---------
# **1. Write this backward yourself.** The surrogate (8) divides by :math:`p`, which may be tiny,
# and then (4') multiplies by :math:`p` again. Combine both: given the weights (T, S), the places
# drawn as 0 and 1 (T, S) and the costs (T,), return :math:`dz` without any division.


def my_hard_gradient(p, r, cost):
    """Return dz, shape (T, S)."""
    # solution: return None
    return (r - p) * cost[:, None]
    # end of solution


_, drawn = spec.forward(**case, rng=np.random.default_rng(5))
cost = rng.standard_normal(T)
expected = core.softmax_backward(show_attend_tell_surrogate(cost, drawn), drawn.p, True)
tutorial.exercise(1, my_hard_gradient(drawn.p, drawn.r, cost), expected)

# %%
# **2. Fewer words than places.** A photograph has 196 places in the paper's grid, a caption about
# ten words. What are the column sums that minimise the penalty with :math:`\tau = 1`? Which
# :math:`\tau` could be reached? What do you expect the penalty to do to the maps?

# %%
# **Solution 2.** The sums add up to :math:`T`, and a sum of squares with a fixed total is least
# where all are equal: :math:`T / S` each, with the value :math:`\lambda S (1 - T/S)^2`. Only
# :math:`\tau = T / S` can be reached. Equal shares of ten glances on 196 places are flat maps.

words, grid = 10, 196
flat = np.full((words, grid), 1 / grid)
least = show_attend_tell_penalty_forward(flat)[0]
other = show_attend_tell_penalty_forward(np.eye(words, grid))[0]
print(f"flat maps: {least:.2f}, ten different places: {other:.2f}")
tutorial.check("exercise 2: the least", abs(least - grid * (1 - words / grid) ** 2), 1e-10)

# %%
# **3. The baseline.** Show that a baseline :math:`b` that does not depend on the place drawn leaves
# the mean of :math:`dz` alone. Would a baseline that depends on the *place* do so as well?

# %%
# **Solution 3.** By exercise 1 it adds :math:`-b\, (r - p)`, and the mean of :math:`r` is
# :math:`p`. If :math:`b` depends on the place, the mean of :math:`b(s_t)\, (r - p)` is the
# gradient of the mean of :math:`b`, which is not zero in general.

weights = hard.p[0]
mean = sum(weights[i] * 2.5 * (np.eye(3)[i] - weights) for i in range(3))
tutorial.check("exercise 3: a constant baseline", np.max(np.abs(mean)), 8 * EPS)

# %%
tutorial.finish(figure)
