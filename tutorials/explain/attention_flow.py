r"""
Attention rollout and attention flow
====================================

**The question.** A map of attention shows where a token looks *in one layer*. But from the second
layer on it looks at mixtures: what stands at place 3 after layer 1 holds something of places 0, 1
and 2. So how much of *input* token j arrives at *output* token i?

**The idea.** Draw all layers as one network, with an arc of weight :math:`A_{l,ab}` from token a
above layer l to token b below it. Then there are two natural questions. What share of i comes from
j, if every token passes on its contents in proportion? That is a sum over paths, the *rollout*. How
much could be sent from i to j, if every arc were a pipe of that width? That is a maximum flow.

You need to know softmax attention (``scores/dot_product``) and the residual connection.
"""

# %%
# Definition
# ----------
# :math:`P_{lh}` are the weights of layer l (1 next to the input) and head h, rows are queries. The
# residual connection gives every token a loop of weight r, by default one half:
#
# .. math::
#
#    A_l &= \operatorname{rows}\Bigl((1-r) \tfrac1H \textstyle\sum_h P_{lh} + r I\Bigr)    &(1)\\
#    R   &= A_L A_{L-1} \cdots A_1                                                        &(2)\\
#    F_{ij} &= \text{maximum flow from } (L, i) \text{ to } (0, j)
#        \text{ with capacities } A_{l,ab}                                                &(3)
#
# ``rows`` divides each row by its sum. The newest layer stands on the left: a token of layer L asks
# layer L first.

import itertools
import math

import numpy as np
from scipy.stats import rankdata

import attention_ref
from attention_ref.kit.tutorial import BLUE, GREY, ORANGE, Tutorial
from attention_ref.methods.explain.attention_flow import attention_flow_score, mixing

tutorial = Tutorial(__file__)
spec = attention_ref.get("explain/attention_flow")
dense = attention_ref.get("scores/dot_product").forward

# %%
# An example by hand
# ------------------
# Two layers, three tokens, one head, r = 1/2. In the lower layer token 1 reads token 0 half of the
# time and token 2 reads token 1 half of the time; in the upper layer token 0 reads token 2:
#
# .. math::
#
#    A_1 = \begin{pmatrix} 1 & 0 & 0 \\ \tfrac14 & \tfrac34 & 0 \\ 0 & \tfrac14 & \tfrac34
#          \end{pmatrix}, \qquad
#    A_2 = \begin{pmatrix} \tfrac12 & 0 & \tfrac12 \\ 0 & 1 & 0 \\ 0 & 0 & 1 \end{pmatrix}.
#
# **Rollout, first row.** :math:`R_{0j} = \tfrac12 A_{1,0j} + \tfrac12 A_{1,2j}`, that is
# :math:`(\tfrac12, \tfrac18, \tfrac38)`: token 0 holds an eighth of token 1, which it never read.
#
# **Flow, first row.** To token 0: the only way is by its own loop, :math:`\min(\tfrac12, 1) =
# \tfrac12`. To token 1: by token 2, :math:`\min(\tfrac12, \tfrac14) = \tfrac14`. To token 2:
# :math:`\min(\tfrac12, \tfrac34) = \tfrac12`. The row does not sum to 1: each entry is a question
# of its own, with the whole network to itself.

below = np.array([[1, 0, 0], [0.5, 0.5, 0], [0, 0.5, 0.5]])
above = np.array([[0, 0, 1], [0, 1, 0], [0, 0, 1.0]])
maps = np.stack([below, above])[:, None]
rollout, flow = (attention_flow_score(maps, method=m) for m in ("rollout", "flow"))
print("rollout", rollout.tolist())
print("flow   ", flow.tolist())
tutorial.check("first row of the rollout", np.max(np.abs(rollout[0] - [1 / 2, 1 / 8, 3 / 8])), 0)
tutorial.check("first row of the flow", np.max(np.abs(flow[0] - [1 / 2, 1 / 4, 1 / 2])), 0)

# %%
# What the two have in common
# ---------------------------
# **Rows of a rollout sum to 1.** With :math:`A_l 1 = 1` for every layer,
#
# .. math:: R\,1 = A_L \cdots A_2\,(A_1 1) = A_L \cdots (A_2 1) = \dots = 1 .               \tag{4}
#
# **A rollout is a sum over paths.** Multiply (2) out:
#
# .. math:: R_{ij} = \sum_{i = a_L, a_{L-1}, \dots, a_0 = j}\;
#           \prod_{l=1}^{L} A_{l, a_l a_{l-1}} .                                           \tag{5}
#
# **A rollout is never more than the flow.** Send along each path of (5) the amount it contributes.
# How much goes over the arc :math:`(l, a) \to (l-1, b)`? All that comes into a from above,
# times the arc, times the share of b that ends in j:
#
# .. math::
#
#    \underbrace{(A_L \cdots A_{l+1})_{ia}}_{\le 1}\; A_{l,ab}\;
#    \underbrace{(A_{l-1} \cdots A_1)_{bj}}_{\le 1} \;\le\; A_{l,ab} .
#
# No arc carries more than its capacity, so this is an admissible flow of size :math:`R_{ij}`, and
# the largest one cannot be smaller. From above, a flow is at most any cut: all arcs out of
# :math:`(L, i)`, or all arcs into :math:`(0, j)`:
#
# .. math:: R_{ij} \;\le\; F_{ij} \;\le\; \min\Bigl(1, \sum_a A_{1,aj}\Bigr) .            \tag{6}

rng = np.random.default_rng(0)
maps = rng.dirichlet(np.full(5, 0.5), size=(3, 2, 5))
layers = mixing(maps)
rollout, flow = (attention_flow_score(maps, method=m) for m in ("rollout", "flow"))
paths = np.zeros((5, 5))
for a, b, c, d in itertools.product(range(5), repeat=4):
    paths[a, d] += layers[2, a, b] * layers[1, b, c] * layers[0, c, d]
tutorial.check("(4) rows sum to 1", np.max(np.abs(rollout.sum(-1) - 1)), 1e-15)
tutorial.check("(5) sum over all 625 paths", np.max(np.abs(rollout - paths)), 1e-15)
cut = np.minimum(1, layers[0].sum(-2))
tutorial.check("(6) rollout above flow", np.max(np.maximum(rollout - flow, 0)), 1e-15)
tutorial.check("(6) flow above cut", np.max(np.maximum(flow - cut, 0)), 1e-15)

# %%
# **Depth forgets the place.** With uniform attention :math:`U` (all entries :math:`1/T`) we have
# :math:`U U = U`, hence :math:`A^L = r^L I + (1 - r^L) U`: after ten layers the input token at the
# same place is worth no more than any other, up to :math:`2^{-10}`.

uniform = np.full((10, 1, 4, 4), 0.25)
gap = attention_flow_score(uniform) - (0.5**10 * np.eye(4) + (1 - 0.5**10) / 4)
tutorial.check("ten uniform layers", np.max(np.abs(gap)), 1e-15)

# %%
# The claim
# ---------
# Both measures read weights only; they know nothing of values, norms or the layers between. Do they
# say what matters? The judge is *blanking out*: set the embedding of input token j to zero, run the
# model again and see how far output i moves. Its ranking of the tokens j is compared with that of
# each measure by Spearman's rank correlation. Token j = i is left out: with a residual connection
# it is nearly always the most important one, and whoever adds r to the diagonal gets that
# for nothing.

DEPTH, HEADS, WIDTH, T = 4, 2, 16, 8
tutorial.claim(
    spec.claim,
    criterion="random transformers of four layers, mean Spearman correlation with blanking out "
    "over all outputs i and inputs j != i: on each of three seeds rollout and flow both exceed the "
    "last layer's attention by 0.1 or more. Both: reproduced; one: partly; else not reproduced",
)

# %%
# The experiment
# --------------
# A small transformer with random weights: normalised input, two heads, residual, ReLU layer,
# residual. Scores are scaled up so that the maps are not flat.


def normalised(x):
    """Rows with mean square 1, zeros stay."""
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + 1e-6)


def draw_model(rng):
    """Weights of every layer: query, key, value and output of each head, two of the ReLU layer."""
    shapes = [(HEADS, WIDTH, WIDTH // HEADS)] * 3 + [(HEADS, WIDTH // HEADS, WIDTH)]
    shapes += [(WIDTH, 2 * WIDTH), (2 * WIDTH, WIDTH)]
    gains = [1.5, 1.5, 1.0, 1.0, 1.0, 1.0]
    return [
        [g * rng.standard_normal(s) / math.sqrt(s[-2]) for s, g in zip(shapes, gains, strict=True)]
        for _ in range(DEPTH)
    ]


def run(x, model):
    """Outputs after every layer, and the maps; x is (batch, T, WIDTH)."""
    outputs, maps = [], []
    for Wq, Wk, Wv, Wo, W1, W2 in model:
        y = normalised(x)[:, None]
        mixed, cache = dense(y @ Wq, y @ Wk, y @ Wv)
        x = x + np.sum(mixed @ Wo, axis=1)
        x = x + np.maximum(normalised(x) @ W1, 0) @ W2
        outputs.append(x)
        maps.append(cache.p)
    return np.stack(outputs), np.stack(maps)


def importance(x, model):
    """How far output i moves when input j is blanked out, after every layer: (DEPTH, T, T)."""
    blank = np.where(np.eye(T, dtype=bool)[:, :, None], 0.0, x)
    outputs, _ = run(np.concatenate([x[None], blank]), model)
    moved = np.sqrt(np.sum(np.square(outputs[:, 1:] - outputs[:, :1]), axis=-1))
    return np.swapaxes(moved, -1, -2)


def spearman(a, b):
    """Mean rank correlation of the rows, the diagonal left out."""
    off = ~np.eye(T, dtype=bool)
    a, b = (rankdata(m[off].reshape(T, T - 1), axis=-1) - T / 2 for m in (a, b))
    return np.mean(np.sum(a * b, -1) / np.sqrt(np.sum(a * a, -1) * np.sum(b * b, -1)))


NAMES = ("last layer", "rollout", "flow")


def compare(seed, sequences, depths):
    """Correlations (len(depths), 3), mean over sequences, each with a model of its own."""
    rng = np.random.default_rng(seed)
    found = np.zeros((len(depths), 3))
    for _ in range(sequences):
        model, x = draw_model(rng), rng.standard_normal((T, WIDTH))
        _, maps = run(x[None], model)
        maps, truth = maps[:, 0], importance(x, model)
        for place, depth in enumerate(depths):
            part = maps[:depth]
            scores = [np.mean(part[-1], axis=0), attention_flow_score(part)]
            scores.append(attention_flow_score(part, method="flow"))
            found[place] += [spearman(s, truth[depth - 1]) for s in scores]
    return found / sequences


depths = (DEPTH,) if tutorial.quick else range(1, DEPTH + 1)
table = np.array([compare(seed, 2 if tutorial.quick else 12, depths) for seed in range(3)])
last = table[:, -1]
gains = last[:, 1:] - last[:, :1]
better = np.all(gains >= 0.1, axis=0)
verdict = {2: "reproduced", 1: "partly", 0: "not reproduced"}[int(np.sum(better))]
if not tutorial.quick:
    records = [dict(zip(NAMES, row, strict=True)) for row in last]
    tutorial.measured(ours=records, verdict=verdict, tolerance=0.1)

# %%
# In the first layer all three say the same: with one layer R = F = A, and off the diagonal A is
# attention times a constant for each row. From there the attention of the newest layer soon says
# little about inputs, because what it looks at are mixtures. The rollout follows the mixing and
# degrades slowly. The flow lies between: it is cut by the narrowest arcs near the two ends, (6),
# and whatever happens between them often leaves no trace. A caution: the model is random, without
# training, and both measures still ignore what is *in* the tokens, so a correlation of 0.6 is far
# from an explanation.
#
# The figure
# ----------

figure = None
if not tutorial.quick:
    plt = tutorial.pyplot()
    figure = plt.figure(figsize=(10, 4.6))
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.05))
    rng = np.random.default_rng(1)
    model, x = draw_model(rng), rng.standard_normal((T, WIDTH))
    maps = run(x[None], model)[1][:, 0]
    truth = importance(x, model)[-1]
    pictures = {
        "Attention, layer 4": np.mean(maps[-1], axis=0),
        "Rollout": attention_flow_score(maps),
        "Flow": attention_flow_score(maps, method="flow"),
        "Blanking out": truth,
    }
    axes = left.subplots(2, 2, sharex=True, sharey=True)
    for axis, (name, picture) in zip(axes.flat, pictures.items(), strict=True):
        rank = rankdata(np.where(np.eye(T, dtype=bool), np.nan, picture), axis=-1,
                        nan_policy="omit")  # fmt: skip
        image = axis.imshow(rank, vmin=1, vmax=T - 1)
        axis.grid(False)
        axis.set(xticks=range(0, T, 2), yticks=range(0, T, 2))
        axis.set_title(name, fontsize=10)
    left.supxlabel("input j", fontsize=10)
    left.supylabel("output i", fontsize=10)
    bar = left.colorbar(image, ax=axes, shrink=0.7, ticks=(1, T - 1))
    bar.set_label("rank within the row", labelpad=-8)
    axis = right.subplots()
    for place, (name, colour) in enumerate(zip(NAMES, (GREY, BLUE, ORANGE), strict=True)):
        at = np.array(depths) + 0.27 * (place - 1)
        axis.bar(at, table[:, :, place].mean(axis=0), 0.25, color=colour, label=name)
        axis.plot(np.tile(at, (3, 1)).T, table[:, :, place].T, ".", color="black", markersize=3)
    axis.set(title="Agreement with blanking out", xlabel="layers", ylim=(0, 1.12),
             ylabel="mean Spearman correlation")  # fmt: skip
    axis.set_xticks(list(depths))
    axis.legend(ncols=3, loc="upper right", columnspacing=1.0, handlelength=1.2)

# %%
# The maps show ranks within a row (7: most important; the diagonal is left out) for one model and
# one sequence. Points are seeds.
#
# Exercises
# ---------
# **1. Write this score yourself.** Fill in the rollout, without calling the library's. The maps are
# those of a model that drops weights in training: their rows do not sum to 1. The loop has a weight
# r above 0.


def my_rollout(maps, residual):
    """R of equation (2); maps have the shape (L, H, T, T)."""
    # solution: return None
    tokens = np.arange(maps.shape[-1])
    share = np.eye(len(tokens))
    for heads in maps[::-1]:  # from the last layer down to the input
        layer = np.sum(heads, axis=0) * ((1 - residual) / len(heads))
        layer[tokens, tokens] += residual
        share = share @ (layer / layer.sum(axis=1)[:, None])
    return share
    # end of solution


fresh = np.random.default_rng(7)
maps = fresh.dirichlet(np.full(6, 0.5), size=(4, 3, 6)) * (fresh.random((4, 3, 6, 6)) < 0.8)
tutorial.exercise(1, my_rollout(maps.copy(), 0.3), attention_flow_score(maps, residual=0.3))

# %%
# **2. A flow of 1 that a rollout does not see.** Build two layers on T tokens, r = 0, in which
# :math:`F_{0j} = 1` for *every* j and :math:`R_{0j} = 1/T`. (Let token 0 look at all tokens, and
# each of them at all tokens. Which of the two bounds (6) is tight?)

# %%
# **Solution 2.** All arcs have the weight :math:`1/T`. From :math:`(2, 0)` to :math:`(0, j)` there
# are T paths, one through each token in between. They share no arc and each carries :math:`1/T`,
# together 1, which is both all that leaves :math:`(2, 0)` and all that enters :math:`(0, j)`: the
# upper bound is tight. The rollout splits what has arrived at each token in between among all T
# tokens below, and only the T-th part of it goes on to j.

side = 6
even = np.full((2, 1, side, side), 1 / side)
found = {m: attention_flow_score(even, method=m, residual=0.0) for m in ("rollout", "flow")}
tutorial.check("exercise 2: flow", np.max(np.abs(found["flow"] - 1)), 1e-14)
tutorial.check("exercise 2: rollout", np.max(np.abs(found["rollout"] - 1 / side)), 1e-15)

# %%
# **3. Under a causal mask the first tokens gather.** Uniform causal attention, six layers, r = 1/2:
# show that :math:`R_{T-1,j}` falls with j up to the last but one, and find how much of the last
# token comes from token 0. What becomes of it with ever more layers? What does this say about
# rankings by rollout in language models?

# %%
# **Solution 3.** Follow the last row downwards: x before a layer and y after it are related by
# :math:`y_j = \tfrac12 x_j + \tfrac12 \sum_{i \ge j} x_i / (i + 1)`, because token i shares itself
# out evenly among :math:`0, \dots, i`. Hence
#
# .. math:: y_j - y_{j+1} = \tfrac12 (x_j - x_{j+1}) + \tfrac12\, \frac{x_j}{j + 1}
#           \qquad (j + 1 \le T - 2) .
#
# If x falls up to the place :math:`T - 2`, so does y, and at the start :math:`x_0 = \dots = x_{T-2}
# = 0`. In words: an early token has more readers. Token 0 reads nobody else, so what has come to it
# stays there. The part of a row on the other tokens shrinks like :math:`(3/4)^L`: the layer is
# triangular, with :math:`\tfrac12 + \tfrac12 / (i + 1)` on the diagonal, and 3/4 is the largest of
# these below 1. With ever more layers everything seems to come from token 0. All this without a
# single thing looked at: a ranking in a causal model should be compared with that of uniform maps.

causal = np.tril(np.ones((100, 1, 8, 8)))
causal /= causal.sum(-1, keepdims=True)
row = attention_flow_score(causal[:6])[-1]
print("exercise 3: last row", row.round(3).tolist())
tutorial.check("exercise 3: it falls", np.max(np.diff(row[:-1])), 0)
rest = [1 - attention_flow_score(causal[:depth])[-1, 0] for depth in (49, 50)]
tutorial.check("exercise 3: like (3/4)^L", abs(rest[1] / rest[0] - 0.75), 1e-3)

# %%
tutorial.finish(figure)
