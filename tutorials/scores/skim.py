r"""
Skim-attention: look at the page before you read it
===================================================

**The question.** You find the total of an invoice without reading it: you know where on the page it
stands. A transformer for documents gets words *and* places, adds them up, and computes a map of
attention in each layer. What if only the places decide where to look?

**The idea.** Nguyen et al. make queries and keys from the boxes of the tokens alone. Such a map
does not depend on the text, so it is the same in all layers, and is computed once.

You need to know softmax attention (``scores/dot_product``).
"""

# %%
# Definition
# ----------
# A token has a box :math:`(x^0, y^0, x^1, y^1)` of whole numbers: left, upper, right, lower edge.
# Tables X and Y hold an embedding for each coordinate, U and W one for each height and width.
#
# .. math::
#
#    u_t    &= X_{x^0_t} + X_{x^1_t} + Y_{y^0_t} + Y_{y^1_t} + U_{y^1_t - y^0_t}
#              + W_{x^1_t - x^0_t}                                                      &(1)\\
#    l_t    &= \gamma \odot (u_t - \operatorname{mean} u_t) / r_t + \delta, \qquad
#              r_t = \sqrt{\operatorname{var}(u_t) + \varepsilon}                       &(2)\\
#    q_t    &= l_t W_q + b_q, \qquad k_t = l_t W_k                                      &(3)\\
#    z_{ts} &= c\, q_t \cdot k_s                                                        &(4)\\
#    p_{ts} &= e^{z_{ts}} / \textstyle\sum_{s'} e^{z_{ts'}}                             &(5)\\
#    o_t    &= \textstyle\sum_s p_{ts}\, v_s                                            &(6)
#
# Steps (1) to (5) run once. Step (6) runs in each layer, with that layer's values: for n tokens and
# L layers :math:`n^2 D + L n^2 E` products in place of :math:`L n^2 (D + E)`.

import math

import numpy as np

import attention_ref
from attention_ref import nn
from attention_ref.kit.tutorial import BLUE, GREEN, GREY, ORANGE, RED, Tutorial
from attention_ref.methods.scores.skim import skimming_mask
from attention_ref.nn.model import cross_entropy, layer_norm

tutorial = Tutorial(__file__)
spec = attention_ref.get("scores/skim")
softmax = attention_ref.get("scores/dot_product")
EPS = np.finfo(np.float64).eps

# %%
# An example by hand
# ------------------
# Two tokens that are points, at x = 0 and x = 1, both at y = 0. All tables are zero but for X, with
# the rows :math:`(\tfrac12, -\tfrac12)` and :math:`(-\tfrac12, \tfrac12)`; and
#
# .. math::
#
#    \gamma = (2, 1), \quad \delta = (0, 1), \quad \varepsilon = 3, \quad
#    W_q = \begin{pmatrix} \ln 3 \\ 0 \end{pmatrix}, \quad
#    W_k = \begin{pmatrix} 1 \\ 0 \end{pmatrix}, \quad
#    v = \begin{pmatrix} 0 \\ 8 \end{pmatrix}, \quad c = \tfrac12 .
#
# (1) The table X is read at both edges: u is :math:`(1, -1)` and :math:`(-1, 1)`. (2) The variance
# is 1, so r = 2, and :math:`l = (1, \tfrac12), (-1, \tfrac32)`. (3), (4) Only the first channel
# counts: :math:`z = \tfrac{\ln 3}{2} \begin{pmatrix} 1 & -1 \\ -1 & 1 \end{pmatrix}`. (5) The
# weights are :math:`(\tfrac34, \tfrac14)` and :math:`(\tfrac14, \tfrac34)`. (6) The outputs are 2
# and 6.

LN3 = math.log(3.0)
box = np.array([[0, 0, 0, 0], [1, 0, 1, 0]])
table, v = np.array([[0.5, -0.5], [-0.5, 0.5]]), np.array([[0.0], [8.0]])
gain, shift, eps, c = np.array([2.0, 1.0]), np.array([0.0, 1.0]), 3.0, 0.5
wq, wk = np.array([[LN3], [0.0]]), np.array([[1.0], [0.0]])

u = table[box[:, 0]] + table[box[:, 2]]  # (1)
u = u - np.mean(u, axis=1, keepdims=True)  # (2)
r = np.sqrt(np.mean(u**2, axis=1, keepdims=True) + eps)
hat = u / r
l = hat * gain + shift
q, k = l @ wq, l @ wk  # (3)
p = np.exp(c * q @ k.T)  # (4)
p = p / np.sum(p, axis=1, keepdims=True)  # (5)
out = p @ v  # (6)
print("embeddings", l.tolist(), "weights", p.round(4).tolist(), "outputs", out.ravel().round(4))
tutorial.check("outputs are 2 and 6", np.max(np.abs(out.ravel() - [2, 6])), 16 * EPS)
zero = np.zeros_like(table)
given = (table, zero, zero, zero, gain, shift, wq, wk)
library, cache = spec.forward(box, v, *given, scale=c, eps=eps)
tutorial.check("the library says the same", np.max(np.abs(library - out)), 16 * EPS)

# %%
# The backward, line by line
# --------------------------
# **(6') to (4')** As in softmax attention: :math:`dv = p^\top do`, :math:`dp = do\, v^\top`,
# :math:`dz_{ts} = p_{ts} (dp_{ts} - \sum_j p_{tj} dp_{tj})`, :math:`dq = c\, dz\, k`,
# :math:`dk = c\, dz^\top q`. With several layers :math:`dp` is the *sum* over the layers of
# :math:`do\, v^\top`, and the rest is done once.
#
# **(3')** :math:`dW_q = l^\top dq`, :math:`dW_k = l^\top dk`, and l was used twice:
# :math:`dl = dq\, W_q^\top + dk\, W_k^\top`.
#
# **(2')** With :math:`\hat u = (u - \operatorname{mean} u) / r`:
# :math:`d\gamma = \sum_t dl_t \odot \hat u_t`, :math:`d\delta = \sum_t dl_t`,
# :math:`d\hat u = dl \odot \gamma`. A change of u along :math:`(1, \dots, 1)` is undone by the
# mean, one along :math:`\hat u` partly by r:
#
# .. math::
#
#    du = \tfrac1r \big( d\hat u - \operatorname{mean}(d\hat u)
#         - \hat u\, \operatorname{mean}(d\hat u \odot \hat u) \big) .
#
# **(1')** A row of a table receives the sum of :math:`du_t` over all that read it: left *and* right
# edges for X. All other rows receive nothing.


def backward(dout):
    """Steps (6') to (1') for the example."""
    dp, dv = dout @ v.T, p.T @ dout  # (6')
    dz = p * (dp - np.sum(p * dp, axis=1, keepdims=True))  # (5')
    dq, dk = c * dz @ k, c * dz.T @ q  # (4')
    dl = dq @ wq.T + dk @ wk.T  # (3')
    dhat = dl * gain  # (2')
    du = dhat - np.mean(dhat, axis=1, keepdims=True)
    du = (du - hat * np.mean(dhat * hat, axis=1, keepdims=True)) / r
    dtable = np.zeros_like(table)
    for edge in (0, 2):  # (1')
        np.add.at(dtable, box[:, edge], du)
    return {
        "v": dv, "wq": l.T @ dq, "wk": l.T @ dk, "gain": np.sum(dl * hat, axis=0),
        "shift": np.sum(dl, axis=0), "e_x": dtable,
    }  # fmt: skip


# %%
# The example backwards, for :math:`L = o_1`: :math:`dz_1 = \tfrac{3}{16} (-8, 8)`, so
# :math:`dq_1 = -\tfrac32` and :math:`dk = \tfrac{\ln 3}{2} (-\tfrac32, \tfrac32)`. Follow it up
# on paper: :math:`du_1 = -\tfrac{27}{32} \ln 3\, (1, -1)`, and both edges of the first token read
# the first row.

ours, theirs = backward(np.array([[1.0], [0.0]])), spec.backward(np.array([[1.0], [0.0]]), cache)
first = -27 / 32 * LN3 * np.array([1.0, -1.0])
board = {
    "v": [[0.75], [0.25]], "wq": [[-1.5], [-0.75]], "wk": [[-1.5 * LN3], [0.75 * LN3]],
    "gain": [-1.5 * LN3, 0], "shift": [-1.5 * LN3, 0], "e_x": [2 * first, -2 / 3 * first],
}  # fmt: skip
for name, expected in board.items():
    tutorial.check(f"d{name}, by hand", np.max(np.abs(ours[name] - expected)), 64 * EPS)
    tutorial.check(f"d{name}, library", np.max(np.abs(theirs[name] - expected)), 64 * EPS)

# %%
# In general four roads must lead to the same gradient: three layers that share a map, and a mask.

cases = spec.example(np.random.default_rng(3))
tutorial.gradients(spec, cases["layers"])
tutorial.gradients(spec, cases["mask"])

# %%
# Experiment: what stands to the right?
# -------------------------------------
# A page has four rows of five tokens. Each has one of eight labels, and a box that is shifted and
# sized at random a little. The tokens come in random order. Each token that is not the last of its
# row must say the label of the token to its right.
#
# Three models with one layer, two heads, values made of the label. Their queries and keys are made
# of the *layout* alone (skim-attention); of the *text*: label and place in the order, which says
# nothing here; or of the *sum* of text and layout embeddings, as models for documents usually do.
# Without the boxes the best one can do is to guess a label that is frequent on the page.

tutorial.claim(
    "Told to copy the label of the token to the right on a page whose tokens come in any order, a "
    "model whose scores see the boxes alone succeeds, and one that sees the text fails.",
    criterion="on each of three seeds, unseen pages: share of right answers at least 0.95 with "
    "layout alone, and with text alone at most 0.03 above that of the page's most frequent label "
    "(partly: layout at least twice as often right as text)",
)

ROWS, COLUMNS, KINDS, PLACES = 4, 5, 8, 24
TOKENS, WIDTH, HEADS, HEAD = ROWS * COLUMNS, 16, 2, 8
TABLES = ("e_x", "e_y", "e_h", "e_w")


def pages(rng, count):
    """Boxes (count, TOKENS, 4), labels and answers (count, TOKENS), -1 where there is none."""
    row, column = np.divmod(np.arange(TOKENS), COLUMNS)
    label = rng.integers(KINDS, size=(count, TOKENS))
    corner = np.stack([4 * column, 5 * row], axis=-1) + rng.integers(2, size=(count, TOKENS, 2))
    size = 1 + rng.integers(2, size=(count, TOKENS, 2))
    box = np.concatenate([corner, corner + size], axis=-1)
    answer = np.where(column < COLUMNS - 1, np.roll(label, -1, axis=1), -1)
    order = np.argsort(rng.random((count, TOKENS)), axis=1)
    label, answer = (np.take_along_axis(a, order, axis=1) for a in (label, answer))
    return np.take_along_axis(box, order[..., None], axis=1), label, answer


def initial(rng, kind):
    """Parameters of a model with layout, text or both in its scores."""

    def normal(*shape, size=1.0):
        return size * rng.standard_normal(shape)

    start = {
        "v": normal(HEADS, KINDS, WIDTH), "out": normal(HEADS, WIDTH, KINDS, size=0.3),
        "wq": normal(HEADS, WIDTH, HEAD, size=1 / math.sqrt(WIDTH)),
        "wk": normal(HEADS, WIDTH, HEAD, size=1 / math.sqrt(WIDTH)),
    }  # fmt: skip
    if kind != "text":
        start |= {name: normal(PLACES, WIDTH, size=0.5) for name in TABLES}
        start |= {"gain": np.ones(WIDTH), "shift": np.zeros(WIDTH)}
    if kind != "layout":
        start |= {"label": normal(KINDS, WIDTH), "order": normal(TOKENS, WIDTH)}
    return start


def logits(parameters, kind, box, label):
    """(count, TOKENS, KINDS), and the cache."""
    v = np.swapaxes(parameters["v"][:, label], 0, 1)
    if kind == "layout":
        names = (*TABLES, "gain", "shift", "wq", "wk")
        out, cache = spec.forward(box[:, None], v, *(parameters[name] for name in names))
    else:
        u = parameters["label"][label] + parameters["order"]
        if kind == "sum":
            left, upper, right, lower = (box[..., i] for i in range(4))
            for name, rows in (
                ("e_x", left), ("e_x", right), ("e_y", upper), ("e_y", lower),
                ("e_h", lower - upper), ("e_w", right - left),
            ):  # fmt: skip
                u = u + parameters[name][rows]
        u = layer_norm(u, 1.0, 0.0)[:, None]
        out, cache = softmax.forward(u @ parameters["wq"], u @ parameters["wk"], v)
    return np.sum(out @ parameters["out"], axis=1), cache


def experiment(kind, seed, steps):
    """Train; the parameters, and 300 unseen pages."""
    rng = np.random.default_rng(seed)

    def draw():
        while True:
            yield pages(rng, 16)

    def loss(parameters, box, label, answer):
        found, _ = logits(parameters, kind, box, label)
        return cross_entropy(found[answer >= 0], answer[answer >= 0])

    start = initial(rng, kind)
    parameters, _ = nn.train(loss, start, draw(), steps=steps, rate=2e-2, progress=False)
    return parameters, pages(np.random.default_rng(seed + 100), 20 if tutorial.quick else 300)


def right(found, answer):
    """Share of right answers."""
    return float(np.mean(np.argmax(found, axis=-1)[answer >= 0] == answer[answer >= 0]))


KINDS_OF_MODEL = ("layout", "text", "sum")
KEPT = (1, 2, 4, 8, TOKENS)
steps = 3 if tutorial.quick else 400
records, kept_right, shown = [], [], None
for seed in range(3):
    record = {}
    for kind in KINDS_OF_MODEL:
        parameters, (box, label, answer) = experiment(kind, seed, steps)
        found, cache = logits(parameters, kind, box, label)
        record[kind] = right(found, answer)
        if kind == "layout":
            shown = shown or (box, label, answer, cache.p)
            v = np.swapaxes(parameters["v"][:, label], 0, 1)
            masks = (skimming_mask(cache.p, count) for count in KEPT)
            kept = [np.where(mask, cache.p, 0.0) for mask in masks]
            outs = [a / np.sum(a, axis=-1, keepdims=True) @ v for a in kept]
            kept_right.append([right(np.sum(o @ parameters["out"], axis=1), answer) for o in outs])
    counts = np.sum(label[..., None] == np.arange(KINDS), axis=1)[:, None]
    record["most frequent label"] = right(np.broadcast_to(counts, (*label.shape, KINDS)), answer)
    records.append(record)
seen = all(r["layout"] >= 0.95 for r in records)
blind = all(r["text"] <= r["most frequent label"] + 0.03 for r in records)
ahead = all(r["layout"] >= 2 * r["text"] for r in records)
verdict = "reproduced" if seen and blind else "partly" if ahead else "not reproduced"
tutorial.measured(ours=records, verdict=verdict, tolerance=0.1)
for seed, shares in enumerate(kept_right):
    line = ", ".join(f"{a:.3f} of {n}" for a, n in zip(shares, KEPT, strict=True))
    print(f"seed {seed}: right with the largest weights alone: {line}")

# %%
# What the seeds show
# -------------------
# For this task places are enough, and text is not. The sum of both learns the task as well: it
# *can* see the boxes. What skim-attention saves is not errors but maps: this one map would serve
# every layer. And it can serve other models, as a mask (*skimming mask*): the last lines above keep
# only the few largest weights of each row.
#
# The figure
# ----------
# Left: one unseen page and, in colour, the weights of the token with the thick frame in the head
# that is surest. Middle: where that head looks on seed 0, mean weight over unseen pages by rows
# down and columns to the right. Right: right answers, dots are seeds; the dashed line is the most
# frequent label.

figure = None
if not tutorial.quick:
    plt = tutorial.pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), width_ratios=(1.2, 1.2, 0.9))
    box, label, answer, weights = shown
    head = int(np.argmax(np.mean(np.max(weights, axis=-1), axis=(0, 2))))
    row, column = box[..., 1] // 5, box[..., 0] // 4
    t = int(np.flatnonzero((row[0] == 1) & (column[0] == 1))[0])
    for s, (left, upper, far, lower) in enumerate(box[0]):
        weight = weights[0, head, t, s]
        axes[0].add_patch(plt.Rectangle(
            (left, upper), far - left + 0.8, lower - upper + 0.8, facecolor=plt.cm.Blues(weight),
            edgecolor=RED if s == t else GREY, linewidth=2.5 if s == t else 0.8,
        ))  # fmt: skip
        axes[0].text((left + far + 0.8) / 2, (upper + lower + 0.8) / 2, str(label[0, s]),
                     fontsize=9, ha="center", va="center",
                     color="white" if weight > 0.5 else "black")  # fmt: skip
    axes[0].set(xlim=(-0.5, 21), ylim=(20, -0.5), title="A page, and where one token looks",
                xlabel="x", ylabel="y")  # fmt: skip
    down = (row[:, None, :] - row[:, :, None]) + ROWS - 1
    across = (column[:, None, :] - column[:, :, None]) + COLUMNS - 1
    place = (down * (2 * COLUMNS - 1) + across)[answer >= 0].ravel()
    shape = (2 * ROWS - 1, 2 * COLUMNS - 1)
    chosen = weights[:, head][answer >= 0]
    total = np.bincount(place, chosen.ravel(), minlength=shape[0] * shape[1])
    image = axes[1].imshow(np.reshape(total / len(chosen), shape), vmin=0, vmax=1)
    axes[1].set_xticks(range(0, 9, 2), [f"{i - 4:+d}" for i in range(0, 9, 2)])
    axes[1].set_yticks(range(0, 7, 3), [f"{i - 3:+d}" for i in range(0, 7, 3)])
    axes[1].set(title="Where the head looks", xlabel="columns to the right", ylabel="rows down")
    figure.colorbar(image, ax=axes[1], label="mean weight", shrink=0.7)
    for i, (kind, colour) in enumerate(zip(KINDS_OF_MODEL, (BLUE, ORANGE, GREEN), strict=True)):
        shares = [r[kind] for r in records]
        axes[2].bar(i, np.mean(shares), width=0.6, color=colour)
        axes[2].plot(i + np.array([-0.12, 0, 0.12]), shares, "o", color="black", markersize=4)
    guess = np.mean([r["most frequent label"] for r in records])
    axes[2].axhline(guess, color="black", linestyle="--", linewidth=1)
    axes[2].set_xticks(range(3), KINDS_OF_MODEL)
    axes[2].set(title="Right answers", ylabel="share", ylim=(0, 1.05), xlabel="scores see")
    axes[2].grid(False, axis="x")
    for ax in axes[:2]:
        ax.grid(False)

# %%
# Exercises
# ---------
# **1. Write this backward yourself.** Given ``dl`` (T, C), ``hat`` (T, C), the divisor ``r`` (T, 1)
# and the gain, return ``du`` (T, C), ``dgain`` and ``dshift`` (C,).


def my_backward(dl, hat, r, gain):
    """Return du, dgain, dshift."""
    # solution: return None, None, None
    width = hat.shape[1]
    up = dl * gain / r
    along = np.einsum("tc,tc->t", up, hat)[:, None] / width
    du = up - np.sum(up, axis=1, keepdims=True) / width - along * hat
    return du, np.einsum("tc,tc->c", dl, hat), dl.sum(axis=0)
    # end of solution


fresh = np.random.default_rng(11)
C7 = 5
points = np.array([[x, 0, x, 0] for x in (0, 1, 2, 3)])  # each token reads a row of its own, twice
e7, w7 = fresh.standard_normal((4, C7)), fresh.standard_normal((2, C7, 3))
gain7, v7, dout = (fresh.standard_normal(shape) for shape in ((C7,), (4, 2), (4, 2)))
none = np.zeros_like(e7)
_, cache = spec.forward(points, v7, e7, none, none, none, gain7, np.zeros(C7), *w7)
dp = dout @ v7.T
dz = cache.p * (dp - np.sum(cache.p * dp, axis=1, keepdims=True)) / math.sqrt(3)
dl = dz @ cache.k @ w7[0].T + dz.T @ cache.q @ w7[1].T
du, dgain, dshift = my_backward(dl, cache.hat, cache.root, gain7)
expected = spec.backward(dout, cache)
answer = {"e_x": None if du is None else 2 * du, "gain": dgain, "shift": dshift}
tutorial.exercise(1, answer, {name: expected[name] for name in answer})

# %%
# **2. A bias of the keys.** The official code adds a vector :math:`b_k` to all keys as well. Show
# that it changes nothing, whatever its value. Why does the same argument not hold for
# :math:`b_q`?

# %%
# **Solution 2.** It adds :math:`c\, q_t \cdot b_k` to all scores of row t, which cancels in the
# softmax. The bias of the queries adds :math:`c\, b_q \cdot k_s`, which differs from key to key: a
# liking for certain places, whoever asks.

kwargs = cases["bias"]
out, cache = spec.forward(**kwargs)
b_k = np.random.default_rng(5).standard_normal(3)
options = {"scale": kwargs["scale"], "bias": kwargs["bias"]}
moved, _ = softmax.forward(cache.q, cache.k + b_k, kwargs["v"], **options)
tutorial.check("exercise 2: a bias of the keys", np.max(np.abs(moved - out)), 64 * EPS)
moved, _ = softmax.forward(cache.q + b_k, cache.k, kwargs["v"], **options)
move = np.max(np.abs(moved - out))
print(f"exercise 2: the same vector on all queries moves the output by {move:.2f}")

# %%
# **3. What the map cannot do.** The page now asks: copy the label of the token to the right *if
# your own label is even, of the token to the left if it is odd*. Can skim-attention do it in one
# layer?

# %%
# **Solution 3.** The scores of one head do not know the label, so no head can choose its direction.
# But two heads can look one way each, and what follows the attention, which sees the token's own
# label through the residual stream, can choose between their outputs: one layer of a transformer
# is enough if it has two heads and a network behind. Maps alone are not, in any number: they are
# the same for all texts, so the whole is linear in the values.

kwargs = cases["plain"]
other = kwargs | {"v": np.random.default_rng(6).standard_normal(kwargs["v"].shape)}
one, two = spec.forward(**kwargs)[0], spec.forward(**other)[0]
both, _ = spec.forward(**(kwargs | {"v": 2 * kwargs["v"] - other["v"]}))
tutorial.check("exercise 3: linear in the values", np.max(np.abs(both - 2 * one + two)), 64 * EPS)

# %%
tutorial.finish(figure)
