r"""
Relative convolutional attention: short groups of tokens, and distance
======================================================================

Attention compares single tokens. A character of a text is not worth much by itself; two or three
of them are. RCMHA mixes every token with the two before it, right after the projections, and
scores the distance between places by learned tables, as Transformer-XL does. Two ideas, one
experiment: which of them helps how much?

You need to know softmax attention (``scores/dot_product``).
"""

# %%
# Definition
# ----------
# .. math::
#
#    \hat q_t &= b^q + \textstyle\sum_{j=0}^{K-1} w^q_j \odot q_{t-K+1+j},
#                \quad \hat v, \hat k \text{ likewise, } \hat k \text{ without bias}          &(1)\\
#    z_{ts} &= c \bigl[ (\hat q_t + u) \cdot \hat k_s
#                + \hat q_t \cdot R_{s-t} + a_{s-t} \bigr]                                &(2)\\
#    p_{ts} &= e^{z_{ts}} / \textstyle\sum_{s'} e^{z_{ts'}}                               &(3)\\
#    o_t    &= \textstyle\sum_s p_{ts}\, \hat v_s                                         &(4)
#
# The kernels have one row for every feature of a head and are shared by the heads; :math:`K = 3` in
# the paper. Row :math:`P + (s - t)` of the tables R and a belongs to the distance from query t to
# key s. All four terms of (2) have a reading: content, :math:`\hat q \cdot \hat k`; what is asked
# for at that distance, :math:`\hat q \cdot R`; which keys everybody wants, :math:`u \cdot \hat k`;
# which distances everybody wants, a.

import math

import numpy as np

import attention_ref
from attention_ref import nn
from attention_ref.kit.tutorial import BLUE, GREEN, GREY, ORANGE, Tutorial

tutorial = Tutorial(__file__)
spec = attention_ref.get("scores/relative_convolutional")
softmax = attention_ref.get("scores/dot_product")
EPS = np.finfo(np.float64).eps
LOG3 = math.log(3)

# %%
# An example by hand
# ------------------
# Two tokens, one feature, kernels of length 2, a causal mask, c = 1, and of the tables only
# :math:`a_{-1} = \ln 2`:
#
# .. math::
#
#    q = \begin{pmatrix} 1 \\ \tfrac12 \end{pmatrix}, \;
#    k = \begin{pmatrix} \ln 3 \\ \ln 3 \end{pmatrix}, \;
#    v = \begin{pmatrix} 4 \\ 8 \end{pmatrix}, \quad
#    w^q = (\tfrac12, 1), \; w^k = (-1, 1), \; w^v = (1, 1) .
#
# (1) Nothing stands before the first token, so it is only multiplied by the last number of the
# kernel: :math:`\hat q = (1,\; \tfrac12 \cdot 1 + \tfrac12) = (1, 1)`,
# :math:`\hat k = (\ln 3,\; 0)`, :math:`\hat v = (4, 12)`. The kernel of the keys takes a
# difference: a repeated key vanishes. (2) The second query scores :math:`\ln 3 + \ln 2` and 0.
# (3) Its exponentials are 6 and 1, its weights :math:`\tfrac67` and :math:`\tfrac17`. (4) It gets
# :math:`(24 + 12)/7`; the first sees itself only and gets 4.


def convolve(x, w):
    """Step (1) for tokens as rows: earlier tokens, zeros before the first."""
    T, K = len(x), w.shape[1]
    wide = np.concatenate([np.zeros((K - 1, x.shape[1])), x])
    return sum(w[:, j] * wide[j : j + T] for j in range(K))


board = {
    "q": np.array([[1.0], [0.5]]), "k": np.array([[LOG3], [LOG3]]), "v": np.array([[4.0], [8.0]]),
    "R": np.zeros((4, 1)), "a": np.array([0.0, math.log(2), 0.0, 0.0]), "u": np.zeros(1),
    "w_q": np.array([[0.5, 1.0]]), "b_q": np.zeros(1), "w_k": np.array([[-1.0, 1.0]]),
    "w_v": np.array([[1.0, 1.0]]), "b_v": np.zeros(1),
}  # fmt: skip
qh, kh, vh = (convolve(board[n], board[f"w_{n}"]) for n in "qkv")  # (1)
place = np.arange(2)
z = qh @ kh.T + board["a"][2 + place - place[:, None]]  # (2)
z[0, 1] = -np.inf
p = np.exp(z) / np.sum(np.exp(z), axis=1, keepdims=True)  # (3)
out = p @ vh  # (4)
print("weights", p.round(4).tolist(), "outputs", out.ravel().round(4).tolist())
tutorial.check("outputs are 4 and 36/7", np.max(np.abs(out.ravel() - [4, 36 / 7])), 16 * EPS)
library, cache = spec.forward(**board, scale=1.0, causal=True)
tutorial.check("the library says the same", np.max(np.abs(library - out)), 16 * EPS)

# %%
# The backward, line by line
# --------------------------
# **(4'), (3')** As in softmax attention: :math:`d\hat v = p^\top do`,
# :math:`dz_{ts} = p_{ts} (dp_{ts} - \sum_j p_{tj}\, dp_{tj})` with :math:`dp = do\, \hat v^\top`.
#
# **(2')** Each term of the sum gets :math:`g = c\, dz`:
#
# .. math::
#
#    d\hat k_s = \sum_t g_{ts} (\hat q_t + u), \quad
#    d\hat q_t = \sum_s g_{ts} (\hat k_s + R_{s-t}), \quad
#    du = \sum_{ts} g_{ts} \hat k_s, \quad
#    dR_n = \sum_{s-t=n} g_{ts}\, \hat q_t, \quad
#    da_n = \sum_{s-t=n} g_{ts} .
#
# The last two are sums along the diagonals of g.
#
# **(1')** Token s goes into the outputs :math:`s, s+1, \dots, s+K-1`; the convolution runs
# backwards in time:
#
# .. math::
#
#    dx_s = \sum_j w_j \odot d\hat x_{s+K-1-j}, \qquad
#    dw_j = \sum_t d\hat x_t \odot x_{t-K+1+j}, \qquad
#    db = \sum_t d\hat x_t .
#
# Why have the keys no bias, when the official code gives them one? It would add
# :math:`(\hat q_t + u) \cdot b^k` to the whole row t of scores. Softmax does not see that:
# its gradient is zero, always. Exercise 2 makes it an identity.


def convolve_backward(dy, x, w):
    """Step (1'): dx and dw."""
    T, K = len(x), w.shape[1]
    later = np.concatenate([dy, np.zeros((K - 1, x.shape[1]))])
    earlier = np.concatenate([np.zeros((K - 1, x.shape[1])), x])
    dx = sum(w[:, j] * later[K - 1 - j : K - 1 - j + T] for j in range(K))
    dw = np.stack([np.sum(dy * earlier[j : j + T], axis=0) for j in range(K)], axis=1)
    return dx, dw


# %%
# The example backwards, for :math:`L = o_2`: :math:`dp = (4, 12)` in the second row and
# :math:`dz = \tfrac67 \cdot \tfrac17 \cdot (-8, 8) = (-b, b)` with :math:`b = \tfrac{48}{49}`. So
# :math:`da_{-1} = -b`, :math:`da_0 = b`, :math:`d\hat k = (-b, b)`,
# :math:`d\hat q = (0, -b \ln 3)`, :math:`d\hat v = (\tfrac67, \tfrac17)`. Through the
# kernels: :math:`dk = (-b - b,\; b)`, :math:`dq = (-\tfrac12 b \ln 3,\; -b \ln 3)`,
# :math:`dv = (1, \tfrac17)`.

b = 48 / 49
dz = np.array([[0, 0], [-b, b]])
dk, dwk = convolve_backward(dz.T @ qh, board["k"], board["w_k"])
dq, dwq = convolve_backward(dz @ kh, board["q"], board["w_q"])
theirs = spec.backward(np.array([[0.0], [1.0]]), cache)
values = {
    "k": (dk, [[-2 * b], [b]]), "q": (dq, [[-b * LOG3 / 2], [-b * LOG3]]),
    "w_k": (dwk, [[b * LOG3, 0]]), "w_q": (dwq, [[-b * LOG3, -b * LOG3 / 2]]),
    "a": (np.array([0, dz[1, 0], np.trace(dz), 0]), [0, -b, b, 0]),
    "v": (convolve_backward(p.T @ [[0], [1]], board["v"], board["w_v"])[0], [[1], [1 / 7]]),
}  # fmt: skip
for name, (mine, expected) in values.items():
    tutorial.check(f"d{name}, by hand", np.max(np.abs(mine - expected)), 32 * EPS)
    tutorial.check(f"d{name}, library", np.max(np.abs(theirs[name] - expected)), 32 * EPS)

# %%
# In general four roads must lead to the same gradient.

tutorial.gradients(spec, spec.example(np.random.default_rng(3))["causal-upper-left"])

# %%
# Experiment: characters, and which idea helps
# --------------------------------------------
# The paper trains on WikiText and reports the accuracy of a next-token model, 0.572 for this
# attention, more than its rivals. Ours is a small transformer of one layer, four heads of width 8,
# over the characters of Python's help texts, windows of 32, and 250 steps: early enough for
# differences to show. Three models with the same number of steps and the same batches: *absolute*,
# dot-product attention with learned places; *relative*, the tables R, a and u, and no places;
# *with convolution*, all of it, K = 3, kernels starting near (0, 0, 1).

tutorial.claim(
    "On characters, after the same number of steps, relative attention with convolutions has a "
    "lower loss than without, and this a lower one than attention with absolute positions.",
    criterion="on each of three seeds, held-out loss: with convolution < relative < absolute "
    "(partly: only the first comparison holds on all seeds)",
)

WIDTH, HEADS, CONTEXT = 32, 4, 32
D = WIDTH // HEADS
text = nn.english()
seen, held = text.split()
identity = np.zeros((D, 3), np.float32)
identity[:, -1] = 1.0
NAMES = {"absolute": GREY, "relative": ORANGE, "with convolution": BLUE}


def zeros(*shape):
    """A parameter that begins at zero."""
    return lambda rng, model: np.zeros(shape)


def kernel(rng, model):
    """A parameter that begins near the identity."""
    return identity + 0.1 * rng.standard_normal((D, 3))


def model(which):
    """A transformer of one layer with the attention named."""
    shape = {"vocabulary": len(text.alphabet), "context": CONTEXT, "width": WIDTH}
    shape |= {"heads": HEADS, "layers": 1}
    if which == "absolute":
        return nn.Model(**shape)
    table = {
        "R": zeros(HEADS, 2 * CONTEXT, D), "a": zeros(HEADS, 2 * CONTEXT), "u": zeros(HEADS, D),
    }  # fmt: skip
    bias = np.zeros(D, np.float32)
    options = {"w_q": identity, "b_q": bias, "w_k": identity, "w_v": identity, "b_v": bias}
    if which == "with convolution":
        table |= {"w_q": kernel, "b_q": zeros(D), "w_k": kernel, "w_v": kernel, "b_v": zeros(D)}
        options = {}
    return nn.Model(**shape, key=spec.key, extra=table, options=options, positions=False)


def held_out(net, parameters, windows):
    """Mean loss on windows spread over text that was not trained on, nats a character."""
    every = np.lib.stride_tricks.sliding_window_view(held, CONTEXT + 1)
    chosen = every[:: len(every) // windows][:windows]
    parts = [chosen[i : i + 64] for i in range(0, windows, 64)]
    return float(np.mean([net.loss(parameters, x[:, :-1], x[:, 1:]) for x in parts]))


steps, windows = (1, 16) if tutorial.quick else (250, 640)
records, paths, trained = [], {which: [] for which in NAMES}, {}
for seed in range(3):
    record = {}
    for which in NAMES:
        net, rng = model(which), np.random.default_rng(seed)
        start = net.initial(rng)
        batches = nn.batches(np.random.default_rng(seed + 100), seen, size=16, context=CONTEXT)
        parameters, losses = nn.train(
            net.loss, start, batches, steps=steps, rate=6e-3, progress=False
        )
        record[which] = held_out(net, parameters, windows)
        paths[which].append(losses)
        trained[which] = parameters  # of the last seed, for the figure
    records.append(record)
first = all(r["with convolution"] < r["relative"] for r in records)
second = all(r["relative"] < r["absolute"] for r in records)
verdict = "reproduced" if first and second else "partly" if first else "not reproduced"
print("held-out loss, nats a character")
tutorial.measured(ours=records, verdict=verdict, tolerance=0.1)
if not tutorial.quick:
    print("entropy of a character of this text given the n before it, nats:")
    print(", ".join(f"n = {n}: {text.entropy(n + 1):.2f}" for n in range(3)))

# %%
# What the seeds show
# -------------------
# Both ideas help, in the order claimed. Most of the gain comes from the tables: from absolute to
# relative the loss falls about two to three times as much as from relative to convolution. With
# places known only as learned vectors, a model of one layer must first learn what "the one before"
# is for every place separately; the tables have it in one row. After 250 steps no model is far
# below the entropy given one character, so this is about how fast the short range is learned,
# not about what is possible in the end. The paper's numbers on memory are not looked at here.
#
# The figure
# ----------
# Left: training loss, mean of 25 steps and of three seeds. Middle: the learned numbers
# :math:`c\, a_{s-t}` of the four heads for the nearest keys, full model, last seed. Right: size of
# the learned kernels by how far back they look, mean over features, last seed.

figure = None
if not tutorial.quick:
    plt = tutorial.pyplot()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.6))
    for which, colour in NAMES.items():
        mean = np.mean(np.reshape(paths[which], (3, -1, 25)), axis=(0, 2))
        left.plot(
            25 * np.arange(len(mean)) + 12, mean, "o-", color=colour, label=which, markersize=3
        )
    left.set(title="Loss", xlabel="training step", ylabel="nats a character", ylim=(2, 4.2))
    left.legend(loc="upper right", fontsize=9)
    full = trained["with convolution"]
    table = full["0.extra.a"][:, CONTEXT - 12 : CONTEXT + 1] / math.sqrt(D)
    for head, row in enumerate(table):
        middle.plot(np.arange(-12, 1), row, "o-", markersize=3, label=f"head {head + 1}")
    middle.set(title="Distances wanted", xlabel="place of the key minus that of the query",
               ylabel="nats")  # fmt: skip
    middle.legend(loc="upper left", fontsize=9)
    for i, (name, colour) in enumerate((("q", BLUE), ("k", ORANGE), ("v", GREEN))):
        size = np.mean(np.abs(full[f"0.extra.w_{name}"]), axis=0)[::-1]
        right.bar(np.arange(3) + 0.27 * (i - 1), size, width=0.25, color=colour, label=name)
    right.set_xticks(range(3), ["itself", "1 back", "2 back"])
    right.grid(False, axis="x")
    right.set(title="Kernels", ylabel="mean size of the weight", ylim=(0, 1.6))
    right.legend(loc="upper right", fontsize=9)

# %%
# Exercises
# ---------
# **1. Write this backward yourself.** Given ``dy`` (T, D), the tokens ``x`` (T, D) and the kernel
# ``w`` (D, K), its last column for the token itself, return ``dx``, ``dw`` and ``db``.


def my_backward(dy, x, w):
    """Return dx, dw and db."""
    # solution: return None, None, None
    T, K = len(x), w.shape[1]
    dx, dw = np.zeros_like(x), np.zeros_like(w)
    for t in range(T):
        for back in range(min(K, t + 1)):
            dx[t - back] += w[:, K - 1 - back] * dy[t]
            dw[:, K - 1 - back] += x[t - back] * dy[t]
    return dx, dw, np.sum(dy, axis=0)
    # end of solution


fresh = np.random.default_rng(11)
sizes = {
    "q": (5, 2), "k": (6, 2), "v": (6, 3), "R": (12, 2), "a": (12,), "u": (2,), "w_q": (2, 3),
    "b_q": (2,), "w_k": (2, 2), "w_v": (3, 4), "b_v": (3,),
}  # fmt: skip
given = {name: fresh.standard_normal(size) for name, size in sizes.items()}
dout = fresh.standard_normal((5, 3))
_, cache = spec.forward(**given)
answer = my_backward(cache.p.T @ dout, given["v"], given["w_v"])
answer = dict(zip(("v", "w_v", "b_v"), answer, strict=True))
expected = spec.backward(dout, cache)
tutorial.exercise(1, answer, {name: expected[name] for name in answer})

# %%
# **2. A parameter that cannot learn.** The official code gives the convolution of the keys a bias.
# Show that no output depends on it, also not with the term :math:`u \cdot \hat k`, and not with a
# causal mask. Would it matter if the convolution came *before* the projection?

# %%
# **Solution 2.** It adds :math:`c\, (\hat q_t + u) \cdot b^k` to all scores of row t, the same
# number for every s, masked or not; softmax does not change. Before the projection it would add
# the constant vector :math:`W_K^\top b` to every key: dead again. Only a bias in front of something
# that is not linear, or different from key to key, is alive. As a check, shift all keys, with
# kernels of length one:

one = {"w_k": np.ones((2, 1)), "w_q": np.ones((2, 1)), "w_v": np.ones((3, 1))}
base, _ = spec.forward(**(given | one), causal=True)
moved, _ = spec.forward(**(given | one | {"k": given["k"] + np.array([3.0, -1.0])}), causal=True)
tutorial.check("exercise 2: all keys shifted, same output", np.max(np.abs(base - moved)), 64 * EPS)

# %%
# **3. Induction in one layer.** "... A B ... A": predict B. Ordinary attention needs two layers for
# it: one to tell each token what stood before it, one to look for that. Choose the kernels
# :math:`w^q, w^k, w^v` of length 2 so that *one* layer does it, with one-hot tokens as q, k, v.

# %%
# **Solution 3.** :math:`w^k = (1, 0)`: the key of a place is the token *before* it.
# :math:`w^q = w^v = (0, 1)`: the query and the value are the token itself. The query A then meets
# the key of the place after the earlier A, whose value is B.

tokens = np.array([3, 1, 4, 0, 5, 2, 7, 4])
hot, here, before = np.eye(8)[tokens], np.tile([0.0, 1.0], (8, 1)), np.tile([1.0, 0.0], (8, 1))
none = {"R": np.zeros((16, 8)), "a": np.zeros(16), "u": np.zeros(8)}
none |= {"b_q": np.zeros(8), "b_v": np.zeros(8), "w_q": here, "w_k": before, "w_v": here}
found, _ = spec.forward(hot, hot, hot, **none, scale=40.0, causal=True)
print("exercise 3: after", tokens.tolist(), "comes", int(np.argmax(found[-1])))
tutorial.check("exercise 3: it is 0, with weight 1", np.max(np.abs(found[-1] - np.eye(8)[0])), EPS)

# %%
tutorial.finish(figure)
