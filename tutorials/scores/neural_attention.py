r"""
Neural attention: a network as the score
========================================

**The question.** A dot product is bilinear: along a line through the keys, the score of a query can
only rise or fall. Suppose a query at 0.2 wants the keys whose distance to it lies between 0.4 and
0.9: not the near ones, not the far ones, on both sides. No choice of projections does that. What
if the score were an arbitrary function of the pair?

**The idea.** Glue the query and the key together, both reduced to a few numbers first, and let a
small network with two hidden layers read a score off the pair. The first attention of all,
``scores/additive``, had one hidden layer; the new thing is the second layer, and the reduction that
makes it affordable.

You need ``scores/dot_product`` for the softmax; ``scores/additive`` helps.
"""

# %%
# Definition
# ----------
# Queries have the width :math:`D`, keys :math:`D_k`; both are reduced to :math:`R` numbers. The
# layers have :math:`M` and :math:`N` units:
#
# .. math::
#
#    a_t    &= q_t P_q\, W_1^{\text{top}}, \qquad
#    h_s = k_s P_k\, W_1^{\text{bottom}} + b_1                                             &(1)\\
#    u_{ts} &= \max(a_t + h_s,\, 0)                                                        &(2)\\
#    g_{ts} &= \max(u_{ts} W_2 + b_2,\, 0)                                                 &(3)\\
#    z_{ts} &= \kappa \tanh(g_{ts} \cdot w_3 / \kappa) + \text{bias}_{ts}                  &(4)\\
#    p_{ts} &= e^{z_{ts}} / \textstyle\sum_{s'} e^{z_{ts'}}                                &(5)\\
#    o_t    &= \textstyle\sum_s p_{ts}\, v_s                                               &(6)
#
# The paper writes the first layer on the glued pair, :math:`[q P_q;\, k P_k]\, W_1`. Cutting the
# matrix :math:`W_1` of shape :math:`(2R, M)` in two gives (1) and (2): the products are made once a
# query and once a key, and only a sum is left for each pair. The layer (3) cannot be cut, so there
# are :math:`T \cdot S \cdot M` numbers to multiply by :math:`W_2`. That is the price.

import math

import numpy as np

import attention_ref
from attention_ref import core, nn
from attention_ref.kit.tutorial import BLUE, GREEN, ORANGE, Tutorial

tutorial = Tutorial(__file__)
spec = attention_ref.get("scores/neural_attention")
dot = attention_ref.get("scores/dot_product")
EPS = np.finfo(np.float64).eps

# %%
# An example by hand
# ------------------
# Can a network with relus compute a distance? Yes: :math:`|q - k| = \max(q - k, 0) + \max(k - q,
# 0)`. Take :math:`W_1 = \begin{pmatrix} 1 & -1 \\ -1 & 1 \end{pmatrix}`, :math:`W_2` the identity
# and :math:`w_3 = (-\ln 2, -\ln 2)`: the score is :math:`-\ln 2\, |q - k|`, every step of distance
# halves the weight. For :math:`q = 1` and :math:`k = (0, 2, 3)` the distances are 1, 1, 2, the
# weights stand as :math:`\tfrac12, \tfrac12, \tfrac14`: :math:`p = (0.4, 0.4, 0.2)`, and :math:`v
# = (0, 0, 4)` gives :math:`o = 0.8`.

L2 = math.log(2)
small = {
    "q": np.array([[1.0]]),
    "k": np.array([[0.0], [2.0], [3.0]]),
    "v": np.array([[0.0], [0.0], [4.0]]),
    "Pq": np.ones((1, 1)),
    "Pk": np.ones((1, 1)),
    "W1": np.array([[1.0, -1.0], [-1.0, 1.0]]),
    "W2": np.eye(2),
    "w3": np.array([-L2, -L2]),
}
out, small_cache = spec.forward(**small)
print("weights", small_cache.p.ravel().round(4).tolist(), "output", round(out.item(), 4))
tutorial.check("weights 0.4, 0.4, 0.2", np.max(np.abs(small_cache.p - [[0.4, 0.4, 0.2]])), 4 * EPS)
tutorial.check("the output is 0.8", abs(out.item() - 0.8), 4 * EPS)

# %%
# With places for queries and keys this is ``scores/alibi``: linear biases are one network among
# those that this mechanism can learn.
#
# The forward
# -----------


def neural_attention(q, k, v, Pq, Pk, W1, W2, w3, b1, b2):
    """Steps (1) to (6) without options."""
    R = Pq.shape[1]
    low_q, low_k = q @ Pq, k @ Pk
    a, h = low_q @ W1[:R], low_k @ W1[R:] + b1  # (1)
    u = np.maximum(a[:, None] + h[None], 0)  # (2)
    g = np.maximum(u @ W2 + b2, 0)  # (3)
    z = g @ w3  # (4)
    e = np.exp(z - z.max(axis=1, keepdims=True))
    p = e / e.sum(axis=1, keepdims=True)  # (5)
    return p @ v, (low_q, low_k, u, g, p)  # (6)


case = spec.example(np.random.default_rng(0))["no-heads"]
out, (low_q, low_k, u, g, p) = neural_attention(**case)
library, cache = spec.forward(**case)
tutorial.check("forward against the library", np.max(np.abs(out - library)), 8 * EPS)
print(f"open units: {np.mean(u > 0):.2f} of the first layer, {np.mean(g > 0):.2f} of the second")

# %%
# The backward, line by line
# --------------------------
# **(6'), (5')** As always: :math:`dv = p^\top do`, :math:`dp = do\, v^\top`,
# :math:`dz = p\,(dp - \sum_s p\, dp)`.
#
# **(4')** :math:`dw_{3n} = \sum_{ts} dz_{ts}\, g_{tsn}` and :math:`dg_{tsn} = dz_{ts}\, w_{3n}`.
#
# **(3')** The relu passes what is open. With :math:`dy = dg \cdot [g > 0]`, every pair is a row of
# one large matrix product:
#
# .. math:: dW_2 = \sum_{ts} u_{ts}^\top\, dy_{ts}, \qquad db_2 = \sum_{ts} dy_{ts}, \qquad
#           du_{ts} = dy_{ts} W_2^\top .
#
# **(2')** :math:`dx = du \cdot [u > 0]`; the sum hands it to both sides, and each side collects,
# as in ``scores/additive``:
#
# .. math:: da_t = \sum_s dx_{ts}, \qquad dh_s = \sum_t dx_{ts} .
#
# **(1')** Linear layers:
#
# .. math::
#
#    dW_1 = \begin{pmatrix} (q P_q)^\top da \\ (k P_k)^\top dh \end{pmatrix}, \quad
#    db_1 = \sum_s dh_s, \quad
#    dq = da\, (W_1^{\text{top}})^\top P_q^\top, \quad
#    dP_q = q^\top\, da\, (W_1^{\text{top}})^\top,
#
# and the same with :math:`k, P_k, dh` and the lower half.


def neural_attention_backward(dout, q, k, v, Pq, Pk, W1, W2, w3, low_q, low_k, u, g, p):
    """Steps (6') to (1')."""
    R = Pq.shape[1]
    dv, dp = p.T @ dout, dout @ v.T  # (6')
    dz = p * (dp - np.sum(p * dp, axis=1, keepdims=True))  # (5')
    dw3, dg = np.einsum("ts,tsn->n", dz, g), dz[:, :, None] * w3  # (4')
    dy = dg * (g > 0)  # (3')
    dW2, db2, du = np.einsum("tsm,tsn->mn", u, dy), dy.sum(axis=(0, 1)), dy @ W2.T
    dx = du * (u > 0)  # (2')
    da, dh = dx.sum(axis=1), dx.sum(axis=0)
    dW1 = np.concatenate([low_q.T @ da, low_k.T @ dh])  # (1')
    dlow_q, dlow_k = da @ W1[:R].T, dh @ W1[R:].T
    return {
        "q": dlow_q @ Pq.T, "k": dlow_k @ Pk.T, "v": dv, "Pq": q.T @ dlow_q, "Pk": k.T @ dlow_k,
        "W1": dW1, "W2": dW2, "w3": dw3, "b1": dh.sum(axis=0), "b2": db2,
    }  # fmt: skip


dout = np.random.default_rng(1).standard_normal(out.shape)
plain = {n: x for n, x in case.items() if n not in ("b1", "b2")}
ours = neural_attention_backward(dout, **plain, low_q=low_q, low_k=low_k, u=u, g=g, p=p)
theirs = spec.backward(dout, cache)
for name in ours:
    error = np.max(np.abs(ours[name] - theirs[name])) / np.max(np.abs(theirs[name]))
    tutorial.check(f"d{name} from the board against the library", error, 256 * EPS)

# %%
# *The example backwards*, :math:`L = o`: :math:`dz = p\,(v - o) = (-0.32, -0.32, 0.64)`. The first
# unit is open for the key at 0 only, the second for the keys at 2 and 3, so :math:`dq` is
# :math:`0.32 \ln 2` through the first unit and :math:`-(0.32 - 0.64) \ln 2` through the second,
# together :math:`0.64 \ln 2`. Moving the query to the right brings it nearer to the key with the
# large value.

gradient = spec.backward(np.ones((1, 1)), small_cache)
tutorial.check("dq of the example", abs(gradient["q"].item() - 0.64 * L2), 8 * EPS)
by_hand = np.array([[-0.32], [0.32], [-0.64]]) * L2
tutorial.check("dk of the example", np.max(np.abs(gradient["k"] - by_hand)), 8 * EPS)

# %%
# Four roads to the same gradient, on inputs that keep away from the kinks (differences need that),
# with a mask, a bias and a softcap:

tutorial.gradients(spec, spec.example(np.random.default_rng(2))["softcap"])

# %%
# Why a second layer?
# -------------------
# With one relu layer the score is :math:`\sum_m w_m \max(a_{tm} + h_{sm}, 0)`: along the key, a sum
# of bends whose *places* move with the query, each at its own speed. The second layer can use these
# sums as coordinates and switch on combinations of them: a band, that is "above 0.4 *and* below
# 0.9", takes a few more relus of the distance that the first layer computed. (It is a matter of
# economy. A band is a function of :math:`q - k` alone, and a wide enough first layer can draw it
# with bends, two or so for each edge. The experiment does not compare with one layer.)
#
# Experiment: a band of distances
# -------------------------------
# Twenty-four tokens hold one number each, drawn uniformly from :math:`[-1, 1]`. The target spreads
# a query's weight evenly over the keys whose distance lies between 0.4 and 0.9 (over all keys when
# there is none). The embedding of a token is :math:`(x, 1)`. We minimise the divergence
# :math:`\sum_s p^*_{ts} \ln(p^*_{ts} / p_{ts})`, in nats a query. Three scores compete:
#
# - *network*: this mechanism on the embedding, :math:`R = 2, M = 16, N = 8`: 232 numbers;
# - *dot product*: linear projections of the embedding to 16 dimensions: 64 numbers, of which only
#   4 combinations matter, because the score is bilinear in :math:`(x, 1)`;
# - *features*: a relu layer of 16 units on each token by itself, then projections to 16 and a dot
#   product: 544 numbers. That is what a transformer with feed-forward layers has below its second
#   attention, and a fairer rival than the second.
#
# The paper reports a perplexity on WikiText-103 more than 2 % below that of dot products; its first
# version says 5 %. A language model of that size is out of reach here. (The thresholds below were
# set after a pilot run on other seeds.)

tutorial.claim(
    spec.claim,
    criterion="on each of three seeds, after 400 steps: the divergence on fresh tokens is below "
    "0.25 nats with the network and above 1 nat with dot products of linear projections",
)

TOKENS, LOW, HIGH, STEPS = 24, 0.4, 0.9, 3 if tutorial.quick else 400
KINDS = ("network", "dot product", "features")


def target(x):
    """Equal weights on the keys at a distance between LOW and HIGH."""
    distance = np.abs(x[..., :, None] - x[..., None, :])
    hit = (distance > LOW) & (distance < HIGH)
    hit = hit | ~np.any(hit, axis=-1, keepdims=True)
    return hit / hit.sum(axis=-1, keepdims=True)


def weights(kind, parameters, x):
    """The attention map of tokens x, shape (B, T, T)."""
    embedded = np.stack([x, np.ones_like(x)], axis=-1)
    v = np.zeros((*x.shape, 1))
    if kind == "network":
        return spec.forward(embedded, embedded, v, **parameters)[1].p
    if kind == "features":
        embedded = core.relu(embedded @ parameters["F"])
    return dot.forward(embedded @ parameters["Q"], embedded @ parameters["K"], v)[1].p


def divergence(parameters, kind, x):
    wanted = target(x)
    found = np.log(weights(kind, parameters, x) + 1e-12)
    known = np.log(np.where(wanted > 0, wanted, 1.0))
    return np.mean(np.sum(np.where(wanted > 0, wanted * (known - found), 0.0), axis=-1))


def initial(rng, kind):
    def draw(*shape, gain=1.0):
        return gain * rng.standard_normal(shape) / math.sqrt(shape[0])

    if kind == "network":
        return {
            "Pq": draw(2, 2), "Pk": draw(2, 2), "W1": draw(4, 16, gain=1.4),
            "W2": draw(16, 8, gain=1.4), "w3": draw(8), "b1": np.zeros(16), "b2": np.zeros(8),
        }  # fmt: skip
    if kind == "features":
        return {"F": draw(2, 16, gain=1.4), "Q": draw(16, 16), "K": draw(16, 16)}
    return {"Q": draw(2, 16), "K": draw(2, 16)}


fresh = np.random.default_rng(1000).uniform(-1, 1, (8 if tutorial.quick else 80, TOKENS))
evenly = {"Q": np.zeros((2, 1)), "K": np.zeros((2, 1))}
print(f"equal weights on all keys: {divergence(evenly, 'dot product', fresh):.3f} nats")


def run(kind, seed):
    """Parameters after training, the losses, the divergence on fresh tokens."""
    rng = np.random.default_rng(seed)
    parameters = initial(rng, kind)
    stream = ((kind, rng.uniform(-1, 1, (8, TOKENS))) for _ in range(STEPS))
    label = f"{kind}, seed {seed}"
    parameters, losses = nn.train(
        divergence, parameters, stream, steps=STEPS, rate=0.02, label=label
    )
    return parameters, losses, float(divergence(parameters, kind, fresh))


runs = {(seed, kind): run(kind, seed) for seed in range(3) for kind in KINDS}
records = [{f"{kind}: nats": runs[seed, kind][2] for kind in KINDS} for seed in range(3)]
learned = sum(x["network: nats"] < 0.25 for x in records)
blind = all(x["dot product: nats"] > 1 for x in records)
verdict = "reproduced" if learned == 3 else "partly" if learned else "not reproduced"
tutorial.measured(ours=records, verdict=verdict if blind else "not reproduced", tolerance=0.2)

# %%
# No dot product of the raw numbers comes anywhere near, on any seed. The network learns the band
# on two seeds of three, which is why the verdict is only *partly*: seed 2 is still far away, and
# still falling slowly, when the 400 steps are over. (That the middle verdict means "some seeds"
# was decided after seeing this.) How often does that happen? Five more beginnings, network only:

STUCK = () if tutorial.quick else range(3, 8)
more = [run("network", seed)[2] for seed in STUCK]
print("five more seeds:", ", ".join(f"{x:.3f}" for x in more), "nats")

# %%
# One slow beginning in eight; what makes it slow we did not find out. The third row of the table
# says how far the claim reaches: a layer that bends each token by itself, before an ordinary dot
# product, gets most of the way, and on every seed. What is left to the network score is to bend
# the *pair*, and what it costs is a network for every pair of tokens.
#
# The figure
# ----------
# Left: the divergence while learning, three seeds each. Then maps over evenly spaced tokens: the
# target, and what the scores have learned on the seed in brackets.

figure = None
if not tutorial.quick:
    plt = tutorial.pyplot()
    figure, axes = plt.subplots(1, 6, figsize=(12.5, 2.9), width_ratios=(1.8, 1, 1, 1, 1, 1))
    for kind, colour in zip(KINDS, (BLUE, ORANGE, GREEN), strict=True):
        for seed in range(3):
            losses = runs[seed, kind][1]
            smooth = np.convolve(losses, np.ones(20) / 20, "valid")[::4]
            axes[0].plot(np.arange(len(smooth)) * 4 + 20, smooth, color=colour, linewidth=1.2,
                         label=kind if seed == 0 else None)  # fmt: skip
    axes[0].set(title="Learning", xlabel="step", ylabel="divergence (nats)", ylim=(0, 1.8))
    axes[0].legend(loc="upper right", ncols=1)
    even = np.linspace(-1, 1, 41)[None]
    maps = {"target": target(even)[0]} | {
        f"{kind} ({seed})": weights(kind, runs[seed, kind][0], even)[0]
        for kind, seed in (("network", 0), ("network", 2), ("dot product", 0), ("features", 0))
    }
    for panel, (name, image) in zip(axes[1:], maps.items(), strict=True):
        panel.imshow(image, vmin=0, vmax=0.08, extent=(-1, 1, 1, -1))
        panel.grid(False)
        panel.set_title(name, fontsize=10)
        panel.set_xticks([-1, 0, 1])
        panel.set_yticks([-1, 0, 1] if panel is axes[1] else [])
        panel.set_xlabel("key")
    axes[1].set_ylabel("query")

# %%
# Exercises
# ---------
# **1. Write this backward yourself.** Given :math:`dg` (T, S, N), return the gradients of
# :math:`W_2` and :math:`b_2` and of the first layer's output :math:`u`. Step (3').


def my_second_layer(dg, u, g, W2):
    """Return dW2, db2, du."""
    # solution: return None, None, None
    dy = np.where(g > 0, dg, 0.0).reshape(-1, g.shape[-1])  # one row a pair
    rows = u.reshape(len(dy), -1)
    return rows.T @ dy, np.ones(len(dy)) @ dy, (dy @ W2.T).reshape(u.shape)
    # end of solution


dg = np.random.default_rng(7).standard_normal(g.shape)
open_dg = dg * (g > 0)
expected = {"W2": np.tensordot(u, open_dg, ((0, 1), (0, 1))), "b2": open_dg.sum(axis=(0, 1)),
            "u": open_dg @ case["W2"].T}  # fmt: skip
answer = dict(zip(expected, my_second_layer(dg, u, g, case["W2"]), strict=True))
tutorial.exercise(1, answer, expected)

# %%
# **2. Four numbers.** Show that a dot product of any linear projections of :math:`(x, 1)`, whatever
# their width, gives weights of the form :math:`p_{ts} \propto e^{(\alpha x_t + \beta)\, x_s}`. Why
# does this rule out the band, and even the much simpler wish "attend to yourself"?

# %%
# **Solution 2.** The score is :math:`(x_t, 1)\, B\, (x_s, 1)^\top` with a 2 by 2 matrix :math:`B`:
# :math:`B_{11} x_t x_s + B_{12} x_t + B_{21} x_s + B_{22}`. Terms without :math:`x_s` cancel in the
# softmax; :math:`\alpha = B_{11}`, :math:`\beta = B_{21}`. Along :math:`x_s` the weight rises or
# falls throughout, so the largest weight is always at one of the ends of the row.

trained = runs[0, "dot product"][0]
B = trained["Q"] @ trained["K"].T / 4
slope = B[0, 0] * fresh + B[1, 0]  # alpha x_t + beta, with the scale 1/sqrt(16)
alone = np.exp(slope[..., None] * fresh[:, None, :])
alone = alone / alone.sum(axis=-1, keepdims=True)
error = np.max(np.abs(alone - weights("dot product", trained, fresh)))
tutorial.check("exercise 2: two numbers give the same weights", error, 1e-12)

# %%
# **3. Do the biases matter?** The official code has biases after the reductions :math:`P_q, P_k`
# and one after :math:`w_3`. Show that the second kind changes no weight, and that the first kind
# can be folded into :math:`b_1`.

# %%
# **Solution 3.** :math:`[q P_q + b_q;\, k P_k + b_k]\, W_1` is :math:`[q P_q;\, k P_k]\, W_1` plus
# :math:`[b_q; b_k]\, W_1`, and the last term does not depend on the pair. A constant :math:`b_3`
# moves a whole row of scores.

bq, bk = np.array([0.3, -0.2]), np.array([-0.5, 0.1])
W1, R = case["W1"], 2
inner = (low_q + bq) @ W1[:R], (low_k + bk) @ W1[R:] + case["b1"]
folded = case["b1"] + np.concatenate([bq, bk]) @ W1
outer = low_q @ W1[:R], low_k @ W1[R:] + folded
error = np.max(np.abs((inner[0][:, None] + inner[1]) - (outer[0][:, None] + outer[1])))
tutorial.check("exercise 3: folded biases", error, 8 * EPS)

# %%
tutorial.finish(figure)
