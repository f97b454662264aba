r"""
Additive attention
==================

**The question.** In 2014 a network translated a sentence by squeezing it into one vector and
unfolding that vector again. Long sentences did not survive. What if the decoder could look back,
at every word it writes, at the words it is about to translate? Then something must say how well
the state of the decoder goes with the state of the encoder at each position. They live in
different spaces, perhaps of different widths: a dot product makes no sense.

**The idea.** Let a small network decide. Add a projection of the query and a projection of the
key, pass the sum through tanh, and read one number off with a vector. This was the first
attention of this kind; the dot product came later because it is cheaper.

You need to know the softmax and the chain rule; ``scores/dot_product`` explains the rest of
attention.
"""

# %%
# Definition
# ----------
# There are :math:`T` queries :math:`q_t \in \mathbb{R}^D` and :math:`S` keys
# :math:`k_s \in \mathbb{R}^{D_k}` with values :math:`v_s \in \mathbb{R}^E`. The network has
# :math:`M` hidden units:
#
# .. math::
#
#    a_t    &= q_t W_q, \qquad h_s = k_s W_k + b                                        &(1)\\
#    u_{ts} &= \tanh(a_t + h_s)                                                         &(2)\\
#    z_{ts} &= \kappa \tanh(u_{ts} \cdot w / \kappa) + \text{bias}_{ts}                 &(3)\\
#    p_{ts} &= e^{z_{ts}} / \textstyle\sum_{s'} e^{z_{ts'}}                             &(4)\\
#    o_t    &= \textstyle\sum_s p_{ts}\, v_s                                            &(5)
#
# :math:`W_q` is :math:`(D, M)`, :math:`W_k` is :math:`(D_k, M)`, :math:`w` and :math:`b` have
# :math:`M` entries. The softcap :math:`\kappa`, the bias of the scores and masks are options, as
# always. Two properties can be read off. *There is no scale*: every hidden unit lies between -1
# and 1, so :math:`|z_{ts}| \le \sum_m |w_m|`, whatever :math:`D` is. And *there is a price*: (2)
# has :math:`T \cdot S \cdot M` entries, where the dot product needs :math:`T \cdot S`.

import math

import numpy as np

import attention_ref
from attention_ref.kit.tutorial import BLUE, GREEN, GREY, ORANGE, Tutorial

tutorial = Tutorial(__file__)
spec = attention_ref.get("scores/additive")
dot = attention_ref.get("scores/dot_product")
EPS = np.finfo(np.float64).eps

# %%
# An example by hand
# ------------------
# For round numbers: :math:`\tanh x = (e^{2x} - 1)/(e^{2x} + 1)`, so
# :math:`\tanh \ln 2 = \tfrac{4-1}{4+1} = \tfrac35` and
# :math:`\tanh \ln 3 = \tfrac{9-1}{9+1} = \tfrac45`. One query, two keys, one hidden unit,
# :math:`W_q = W_k = 1` and no :math:`b`:
#
# .. math::
#
#    q = \ln 2, \qquad k = (-2 \ln 2,\ \ln 3 - \ln 2), \qquad v = (4, 8), \qquad
#    w = \tfrac{5}{7} \ln 3 .
#
# The sums are :math:`-\ln 2` and :math:`\ln 3`, the hidden units :math:`-\tfrac35` and
# :math:`\tfrac45`. The scores differ by :math:`\tfrac75 w = \ln 3`, so the weights stand as 1 to
# 3: :math:`p = (\tfrac14, \tfrac34)`, and the output is :math:`1 + 6 = 7`.

small = {
    "q": np.array([[math.log(2)]]),
    "k": np.array([[-2 * math.log(2)], [math.log(3) - math.log(2)]]),
    "v": np.array([[4.0], [8.0]]),
    "Wq": np.array([[1.0]]),
    "Wk": np.array([[1.0]]),
    "w": np.array([5 / 7 * math.log(3)]),
}
out, cache = spec.forward(**small)
print("hidden units", cache.u.ravel().round(4).tolist())
print("weights", cache.p.ravel().round(4).tolist(), "output", out.round(4).item())
tutorial.check("weights 1/4, 3/4", np.max(np.abs(cache.p - [[0.25, 0.75]])), 4 * EPS)
tutorial.check("the output is 7", abs(out.item() - 7), 32 * EPS)

# %%
# The forward
# -----------
# The projections (1) are made once for each query and once for each key, not once for each pair:
# only the sum in (2) meets the pair. In a decoder the keys are given before the first word is
# written, so :math:`h` is computed once and kept.


def additive(q, k, v, Wq, Wk, w, b, live):
    """Steps (1) to (5) without softcap and bias; returns the output and what is needed later."""
    a, h = q @ Wq, k @ Wk + b  # (1)
    u = np.tanh(a[:, None, :] + h[None, :, :])  # (2)
    z = np.where(live, u @ w, -np.inf)  # (3)
    e = np.exp(z - z.max(axis=1, keepdims=True))
    p = e / e.sum(axis=1, keepdims=True)  # (4)
    return p @ v, p, u  # (5)


rng = np.random.default_rng(0)
T, S, D, DK, E, M = 4, 6, 3, 2, 2, 5
q, k, v = rng.standard_normal((T, D)), rng.standard_normal((S, DK)), rng.standard_normal((S, E))
Wq, Wk = rng.standard_normal((D, M)) / 2, rng.standard_normal((DK, M)) / 2
w, b = rng.standard_normal(M) / 2, rng.standard_normal(M) / 2
live = np.arange(S) <= np.arange(T)[:, None] + (S - T)

out, p, u = additive(q, k, v, Wq, Wk, w, b, live)
library, cache = spec.forward(q, k, v, Wq, Wk, w, b, causal=True)
tutorial.check("forward against the library", np.max(np.abs(out - library)), 8 * EPS)

# %%
# The backward, line by line
# --------------------------
# From the bottom up; :math:`dx` is the gradient of :math:`x`, and :math:`do` is given.
#
# **(5'), (4')** As for every softmax attention: :math:`dv = p^\top do`, :math:`dp = do\, v^\top`,
# :math:`dz = p\,(dp - \sum_s p\, dp)`.
#
# **(3')** :math:`z_{ts} = \sum_m u_{tsm} w_m`. The read-out :math:`w_m` appears in *every* score,
# so its gradient collects from all pairs; the hidden unit :math:`u_{tsm}` in one score only:
#
# .. math:: dw_m = \sum_{t, s} dz_{ts}\, u_{tsm}, \qquad du_{tsm} = dz_{ts}\, w_m .
#
# **(2')** The slope of tanh is :math:`1 - \tanh^2`. Call what stands inside of it
# :math:`x = a + h`:
#
# .. math:: dx_{tsm} = du_{tsm}\, (1 - u_{tsm}^2) .
#
# A sum hands its gradient on to both sides unchanged. But :math:`a_t` was used for all keys, and
# :math:`h_s` for all queries, so each collects:
#
# .. math:: da_{tm} = \sum_s dx_{tsm}, \qquad dh_{sm} = \sum_t dx_{tsm} .
#
# **(1')** Two linear layers:
#
# .. math::
#
#    dq = da\, W_q^\top, \quad dW_q = q^\top da, \qquad
#    dk = dh\, W_k^\top, \quad dW_k = k^\top dh, \quad db_m = \sum_s dh_{sm} .


def additive_backward(dout, q, k, v, Wq, Wk, w, p, u):
    """Steps (5') to (1')."""
    dv, dp = p.T @ dout, dout @ v.T  # (5')
    dz = p * (dp - np.sum(p * dp, axis=1, keepdims=True))  # (4')
    dw = np.einsum("ts,tsm->m", dz, u)  # (3')
    du = dz[:, :, None] * w
    dx = du * (1 - u**2)  # (2')
    da, dh = dx.sum(axis=1), dx.sum(axis=0)
    return {  # (1')
        "q": da @ Wq.T, "k": dh @ Wk.T, "v": dv,
        "Wq": q.T @ da, "Wk": k.T @ dh, "w": dw, "b": dh.sum(axis=0),
    }  # fmt: skip


dout = rng.standard_normal((T, E))
ours = additive_backward(dout, q, k, v, Wq, Wk, w, p, u)
theirs = spec.backward(dout, cache)
for name in ours:
    error = np.max(np.abs(ours[name] - theirs[name]))
    tutorial.check(f"d{name} from the board against the library", error, 32 * EPS)

# %%
# *The example backwards*, :math:`L = o`. :math:`dz = p\,(v - o)`, that is
# :math:`(\tfrac14 (4 - 7),\ \tfrac34 (8 - 7)) = (-\tfrac34, \tfrac34)`. So
# :math:`dw = \tfrac34 \cdot \tfrac35 + \tfrac34 \cdot \tfrac45 = \tfrac{21}{20}`: a larger
# :math:`w` would prefer the second key more. The slopes are
# :math:`1 - \tfrac9{25} = \tfrac{16}{25}` and :math:`1 - \tfrac{16}{25} = \tfrac9{25}`, hence
# :math:`dk = (-\tfrac34 \cdot \tfrac{16}{25} w,\ \tfrac34 \cdot \tfrac{9}{25} w)
# = (-0.48\, w,\ 0.27\, w)`, and :math:`dq` is their sum, :math:`-0.21\, w`.

_, small_cache = spec.forward(**small)
gradient = spec.backward(np.ones((1, 1)), small_cache)
for name, expected in {
    "w": np.array([21 / 20]),
    "k": np.array([[-0.48], [0.27]]) * small["w"],
    "q": np.array([[-0.21]]) * small["w"],
}.items():
    error = np.max(np.abs(gradient[name] - expected))
    tutorial.check(f"d{name} of the example", error, 32 * EPS)

# %%
# Four roads to the same gradient, for all eight arguments, with a mask and a softcap:

tutorial.gradients(
    spec,
    {"q": q, "k": k, "v": v, "Wq": Wq, "Wk": Wk, "w": w, "b": b, "mask": live}
    | {"bias": rng.standard_normal((T, S)), "softcap": 1.3},
)

# %%
# Where does the query go?
# ------------------------
# A surprise. For small inputs :math:`\tanh x \approx x`, so
# :math:`z_{ts} \approx a_t \cdot w + h_s \cdot w`. The first term is the same for all keys, and
# the softmax cannot see it: *every query attends to the same keys*. All that a query can do comes
# from the bend of the tanh. To first order additive attention is blind to the query; the dot
# product, which multiplies, is not. By :math:`\tanh x = x - x^3/3 + \dots` the first term in
# which query and key meet is of third order, so inputs ten times smaller leave differences
# between queries a thousand times smaller:

spread = []
for size in (1e-1, 1e-2):
    _, cache = spec.forward(size * q, size * k, v, Wq, Wk, w, mask=np.ones((T, S), bool))
    spread.append(np.max(np.abs(cache.p - cache.p[:1])))
    print(f"inputs of size {size}: weights of different queries differ by {spread[-1]:.1e}")
tutorial.check("a thousand times smaller", abs(spread[0] / spread[1] / 1000 - 1), 0.05)

# %%
# Experiment: growing widths
# --------------------------
# ``scores/dot_product`` shows that unscaled dot products saturate the softmax as :math:`D` grows,
# because their variance is :math:`D`: the winner takes all, and the Jacobian of the softmax,
# whose trace is :math:`1 - \sum_s p_s^2`, dies. With the scale :math:`1/\sqrt D` it lives. What
# do additive scores do, which have no scale? We draw :math:`q` and :math:`k` standard normal,
# :math:`W_q` and :math:`W_k` with variance :math:`1/D` as in a fresh layer, :math:`w` uniform
# between :math:`\pm 1/\sqrt M` with :math:`M = 64`.

tutorial.claim(
    "As the width D grows, dot products without a scale saturate the softmax; additive "
    "scores do not, because they stay below the sum of |w|.",
    criterion="S = 64 keys, on each of three seeds: from D = 16 to D = 1024 the trace for unscaled "
    "dot products falls below a quarter of itself, the trace for additive scores changes by "
    "less than 0.01, and no additive score exceeds the sum of |w|",
)

WIDTHS, KEYS, UNITS = (16, 64, 256, 1024), 64, 64


def traces(seed, width, queries):
    """Mean trace of the softmax Jacobian: unscaled, scaled, additive; largest |z| / sum |w|."""
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((queries, width)), rng.standard_normal((KEYS, width))
    Wq, Wk = (rng.standard_normal((width, UNITS)) / math.sqrt(width) for _ in "qk")
    w = rng.uniform(-1, 1, UNITS) / math.sqrt(UNITS)
    v = np.zeros((KEYS, 1))
    _, plain = dot.forward(q, k, v, scale=1.0)
    _, scaled = dot.forward(q, k, v)
    _, added = spec.forward(q, k, v, Wq, Wk, w)
    found = [float(np.mean(1 - np.sum(c.p**2, axis=-1))) for c in (plain, scaled, added)]
    return *found, float(np.max(np.abs(added.capped)) / np.sum(np.abs(w)))


queries = 20 if tutorial.quick else 300
table = np.array([[traces(seed, width, queries) for width in WIDTHS] for seed in range(3)])
records = [
    {f"{name}, D={width}": table[seed, WIDTHS.index(width), i]
     for i, name in enumerate(("dot", "dot / sqrt(D)", "additive"))
     for width in (16, 1024)}
    | {"largest score / bound": np.max(table[seed, :, 3])}
    for seed in range(3)
]  # fmt: skip
held = all(
    row[-1, 0] < row[0, 0] / 4 and abs(row[-1, 2] - row[0, 2]) < 0.01 and np.max(row[:, 3]) <= 1
    for row in table
)
tutorial.measured(ours=records, verdict="reproduced" if held else "not reproduced", tolerance=0.05)

# %%
# A trace near its maximum :math:`1 - 1/64 = 0.984` is no virtue in itself: fresh additive
# attention is close to a plain mean, and has to *learn* to choose, by letting :math:`w` grow.
#
# The figure
# ----------
# Left: the traces. Middle: what one hidden unit does, for three queries; each query shifts the
# same curve along the key. Right: the memory of the hidden units against that of the scores.

figure = None
if not tutorial.quick:
    plt = tutorial.pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(11.5, 3.8))
    names = ("dot product, no scale", r"dot product, $1/\sqrt{D}$", "additive, no scale")
    for i, (name, colour) in enumerate(zip(names, (ORANGE, GREY, BLUE), strict=True)):
        axes[0].plot(WIDTHS, table[:, :, i].T, "o", color=colour, alpha=0.6)
        axes[0].plot(WIDTHS, table[:, :, i].mean(axis=0), color=colour, label=name)
    axes[0].set_xscale("log", base=2)
    axes[0].set_xticks(WIDTHS, [str(width) for width in WIDTHS])
    axes[0].set(title="Which scores saturate?", xlabel="width D", ylim=(0, 1.05),
                ylabel=r"trace of the Jacobian, $1 - \sum p^2$")  # fmt: skip
    axes[0].legend(loc="center right", bbox_to_anchor=(1, 0.62))

    key = np.linspace(-4, 4, 161)
    for shift, colour in ((-1, GREEN), (0, BLUE), (1, ORANGE)):
        axes[1].plot(key, np.tanh(key + shift), color=colour, label=f"query a = {shift:g}")
    axes[1].set(title="One hidden unit", xlabel="key h", ylabel=r"$u = \tanh(a + h)$")
    axes[1].legend(loc="lower right")

    lengths = np.array([128, 256, 512, 1024, 2048, 4096])
    axes[2].plot(lengths, lengths**2 * 8 / 2**20, "o-", color=GREY, label="scores, T S numbers")
    axes[2].plot(lengths, lengths**2 * 8 * 64 / 2**20, "o-", color=BLUE,
                 label="hidden units, T S M, M = 64")  # fmt: skip
    axes[2].set_xscale("log", base=2)
    axes[2].set_yscale("log", base=10)
    axes[2].set_xticks(lengths, [str(n) for n in lengths])
    axes[2].set(title="The price", xlabel="length T = S (tokens)", ylabel="MiB, float64")
    axes[2].legend(loc="upper left")

# %%
# Exercises
# ---------
# **1. Write this backward yourself.** Close the derivation above and fill in the function, without
# softcap. ``dz`` is the gradient of the scores (3), shape (T, S), and ``u`` holds the hidden units
# (2), shape (T, S, M). Run the tutorial again: your six gradients are compared with the library's.


def my_backward(dz, q, k, Wq, Wk, w, u):
    """Return dq, dk, dWq, dWk, dw, db."""
    # solution: return (None,) * 6
    dx = np.einsum("ts,m,tsm->tsm", dz, w, 1 - u * u)
    dq = np.einsum("tsm,dm->td", dx, Wq)
    dk = np.einsum("tsm,dm->sd", dx, Wk)
    dWq = np.einsum("td,tsm->dm", q, dx)
    dWk = np.einsum("sd,tsm->dm", k, dx)
    return dq, dk, dWq, dWk, np.tensordot(dz, u), np.einsum("tsm->m", dx)
    # end of solution


fresh = np.random.default_rng(7)
shapes = {"q": (3, 4), "k": (5, 6), "v": (5, 2), "Wq": (4, 7), "Wk": (6, 7), "w": (7,), "b": (7,)}
given = {name: fresh.standard_normal(shape) / 2 for name, shape in shapes.items()}
_, cache = spec.forward(**given, bias=np.zeros((3, 5)))  # the gradient of the bias is dz
right = spec.backward(fresh.standard_normal((3, 2)), cache)
parts = [given[name] for name in ("q", "k", "Wq", "Wk", "w")]
names = ("q", "k", "Wq", "Wk", "w", "b")
answer = dict(zip(names, my_backward(right["bias"], *parts, cache.u), strict=True))
tutorial.exercise(1, answer, {name: right[name] for name in names})

# %%
# **2. Concat.** Luong et al. write the score as :math:`w \cdot \tanh([q; k]\, W)`, query and key
# glued together. Which :math:`W` makes it the same? How many multiplications does the glued form
# need for all pairs before the tanh, and how many does (1)?

# %%
# **Solution 2.** :math:`W_q` on top of :math:`W_k`: the product of the glued row with this matrix
# is :math:`q W_q + k W_k`. Glued, each pair multiplies a row of :math:`D + D_k` numbers by
# :math:`M` columns, :math:`T S (D + D_k) M` multiplications. (1) projects each query and each key
# once, :math:`(T D + S D_k) M`; a pair then costs sums only.

glued = np.concatenate([np.repeat(q[:, None], S, 1), np.repeat(k[None], T, 0)], axis=-1)
z = np.tanh(glued @ np.concatenate([Wq, Wk]) + b) @ w
tutorial.check("exercise 2: the glued form", np.max(np.abs(z - u @ w)), 8 * EPS)
print(f"exercise 2: {T * S * (D + DK) * M} multiplications glued, {(T * D + S * DK) * M} by (1)")

# %%
# **3. Signs.** tanh is odd. Show that turning the signs of :math:`W_q, W_k, b` and :math:`w` all
# at once changes nothing, and that you may do it for some of the hidden units only. In how many
# ways at least can the same attention be written with :math:`M` different hidden units,
# permutations included?

# %%
# **Solution 3.** For one unit: with the signs of its column of :math:`W_q` and :math:`W_k` and of
# its :math:`b_m` the argument of the tanh changes sign, hence :math:`u_{tsm}`, and with :math:`w_m`
# the product :math:`u_{tsm} w_m` is what it was. No other unit is touched, which gives
# :math:`2^M` choices; the sum over the units does not care about their order, which gives
# :math:`M!`. Together :math:`2^M M!`.

sign, order = rng.choice((-1.0, 1.0), M), rng.permutation(M)
turned = [(x * sign)[..., order] for x in (Wq, Wk, w, b)]
same, _ = spec.forward(q, k, v, *turned, causal=True)
gap = np.max(np.abs(same - spec.forward(q, k, v, Wq, Wk, w, b, causal=True)[0]))
tutorial.check("exercise 3: turned and shuffled units", gap, 8 * EPS)
print(f"exercise 3: {2**M * math.factorial(M)} ways for M = {M}")

# %%
tutorial.finish(figure)
