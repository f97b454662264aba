r"""
The low-rank bottleneck
=======================

**The question.** A model of width d with H heads gives each head the width :math:`d_k = d/H`. More
heads, thinner heads. The logits of a head are a product of an :math:`n \times d_k` and a
:math:`d_k \times n` matrix, so their rank is at most :math:`d_k`, however long the text is. Is
there a map of attention that a thin head cannot draw, whatever its weights? And how wide is wide
enough?

**The idea.** Logits are the logarithm of the map, up to a constant for each query, which softmax
does not see. So everything is a question about the rank of a logarithm, and the singular value
decomposition answers it completely.

You need to know softmax attention (``scores/dot_product``) and the singular value decomposition.
In this chapter, as in the paper, tokens and queries are *columns*.
"""

# %%
# Definition
# ----------
# The n columns of X are tokens of width d. Entry (i, j) of P is the weight of key i for query j:
#
# .. math::
#
#    Z      &= (W_k X)^\top (W_q X) / \sqrt{d_k}, \qquad \operatorname{rank} Z \le d_k     &(1)\\
#    P_{ij} &= e^{Z_{ij}} / \textstyle\sum_k e^{Z_{kj}}                                    &(2)
#
# *Theorem.* If the columns of X are independent and :math:`d_k \ge n`, every positive P whose
# columns sum to 1 is the map of some head. *Proof.* There is a left inverse, :math:`X^+ X = I`.
# Take
#
# .. math:: W_k = X^+, \qquad W_q = \sqrt{d_k}\, \log P\, X^+ .                            \tag{3}
#
# Then :math:`W_k X = I`, :math:`W_q X = \sqrt{d_k} \log P`, so :math:`Z = \log P`; its exponential
# is P, and the columns of P need no division because they sum to 1.

import math

import numpy as np

import attention_ref
from attention_ref.kit.tutorial import BLUE, GREEN, GREY, ORANGE, RED, Tutorial
from attention_ref.methods.theory.low_rank_bottleneck import (
    centred_logits,
    low_rank_bottleneck_construct,
    low_rank_bottleneck_counterexample,
    low_rank_bottleneck_fit,
    low_rank_bottleneck_limit,
    low_rank_bottleneck_map,
    softmax_columns,
)
from attention_ref.nn.optim import adamw

tutorial = Tutorial(__file__)
spec = attention_ref.get("theory/low_rank_bottleneck")


def worst(a, b):
    """The largest difference."""
    return np.max(np.abs(a - b))


# %%
# An example by hand
# ------------------
# Two tokens of width two, :math:`X = \operatorname{diag}(2, 1)`. We want query 0 to look at key 0
# three times as much as at key 1, and query 1 at both alike. By (3)
#
# .. math::
#
#    P = \begin{pmatrix} \tfrac34 & \tfrac12 \\ \tfrac14 & \tfrac12 \end{pmatrix}, \qquad
#    W_k = \begin{pmatrix} \tfrac12 & 0 \\ 0 & 1 \end{pmatrix}, \qquad
#    W_q = \sqrt2 \begin{pmatrix} \tfrac12 \ln \tfrac34 & \ln \tfrac12 \\
#          \tfrac12 \ln \tfrac14 & \ln \tfrac12 \end{pmatrix}.
#
# **And with** :math:`d_k = 1`? Only *differences* within a column count: query 0 needs
# :math:`Z_{00} - Z_{10} = \ln 3`, query 1 needs :math:`Z_{01} - Z_{11} = 0`. Let the keys be the
# numbers :math:`\pm\tfrac12`, the queries :math:`\ln 3` and 0. That is a head of width one, and it
# is exact.

X = np.diag([2.0, 1.0])
P = np.array([[3 / 4, 1 / 2], [1 / 4, 1 / 2]])
W_q, W_k = low_rank_bottleneck_construct(X, P)
tutorial.check("W_k by hand", worst(W_k, np.diag([1 / 2, 1.0])), 1e-15)
by_hand = math.sqrt(2) * np.log(P) @ np.diag([1 / 2, 1.0])
tutorial.check("W_q by hand", worst(W_q, by_hand), 1e-15)
tutorial.check("the map of width 2", worst(low_rank_bottleneck_map(X, W_q, W_k), P), 1e-15)
keys, queries = np.array([[1 / 2, -1 / 2]]), np.array([[math.log(3), 0.0]])
tutorial.check("the map of width 1", worst(softmax_columns(keys.T @ queries), P), 1e-15)

# %%
# Exactly which maps are out of reach
# -----------------------------------
# Let :math:`J = I - \tfrac1n 1 1^\top`, which takes the mean out of every column. Z realises P when
# :math:`Z = \log P + 1 c^\top` for some shifts c. Since :math:`J 1 = 0`,
#
# .. math:: J Z = J \log P =: C .                                                          \tag{4}
#
# *The bound.* :math:`\operatorname{rank} C = \operatorname{rank} J Z \le \operatorname{rank} Z
# \le d_k`. A map with :math:`\operatorname{rank} C > d_k` cannot be drawn. *It is sharp:* Z = C has
# the smallest possible rank and realises P.
#
# *How large is it?* C has n rows that sum to zero, so its rank is at most
#
# .. math:: \operatorname{rank} C \le n - 1 .                                              \tag{5}
#
# The free shift saves one dimension: **n - 1 is wide enough for every map**, as with the two tokens
# above.
#
# *How much is missed below?* For any Z of rank :math:`\le d_k` the best shifts c take out the
# column means of :math:`\log P - Z`. What remains is
#
# .. math::
#
#    \lVert J (\log P - Z) \rVert_F = \lVert C - J Z \rVert_F
#    \;\ge\; \Bigl( \sum_{i > d_k} \sigma_i(C)^2 \Bigr)^{1/2},                            \tag{6}
#
# because J Z has rank :math:`\le d_k` too (Eckart and Young). The truncated decomposition of C has
# columns with mean 0 already, :math:`J Z = Z`, and attains it. So the best logits are known in
# closed form; no search is needed.

rng = np.random.default_rng(0)
X, P = rng.standard_normal((9, 6)), softmax_columns(rng.standard_normal((6, 6)))
for d_k in (5, 6, 8):
    found = low_rank_bottleneck_map(X, *low_rank_bottleneck_construct(X, P, d_k=d_k))
    tutorial.check(f"6 tokens, width {d_k}", worst(found, P), 1e-13)
shift = rng.standard_normal((1, 6))
moved = softmax_columns(np.log(P) + shift)
tutorial.check("a constant added to each column changes nothing", worst(moved, P), 1e-15)

# %%
# The formula (6) can be tried: truncate log P, choose the best shifts, truncate again, and so on.
# This descends to the same number from above, and slowly, so it is good that we do not need it.


def alternate(P, d_k, steps):
    """What is missed after each round of truncation and best shifts."""
    shift, missed = np.zeros((1, P.shape[1])), []
    for _ in range(steps):
        U, sigma, V = np.linalg.svd(np.log(P) + shift)
        Z = U[:, :d_k] * sigma[:d_k] @ V[:d_k]
        shift = np.mean(Z - np.log(P), axis=0, keepdims=True)
        missed.append(np.linalg.norm(np.log(P) + shift - Z))
    return np.array(missed)


for d_k in (1, 2, 3):
    missed, bound = alternate(P, d_k, 300), float(low_rank_bottleneck_fit(P, d_k).residual)
    print(f"d_k = {d_k}: rounds 1, 10, 300: {missed[[0, 9, -1]].round(4)}  bound {bound:.4f}")
    tutorial.check("never below the bound", max(0.0, bound - np.min(missed)), 1e-12)

# %%
# A map that everybody wants and no thin head draws
# -------------------------------------------------
# "Look at yourself", with h nats to spare: :math:`P = \operatorname{softmax}(h I)`. Here
# :math:`C = h J` has :math:`n - 1` singular values, all equal to h, so a head of width
# :math:`d_k \le n - 2` misses exactly :math:`h \sqrt{n - 1 - d_k}` nats. No spectrum decays more
# slowly.

P, residual = low_rank_bottleneck_counterexample(16, 4, height=3.0)
fit = low_rank_bottleneck_fit(P, 4)
tutorial.check("misses 3 sqrt(11) nats", abs(fit.residual - 3 * math.sqrt(11)), 1e-13)
print(f"the weight on oneself should be {P[0, 0]:.3f}; the weights are off by {fit.error:.3f}")

# %%
# **But nearly the same map needs width two.** Put the tokens on a circle, with logits
# :math:`Z_{ij} = \beta \cos(2 \pi (i-j)/n)`. By the addition theorem this is a product of width 2.
# The token itself leads its two neighbours by :math:`g \beta`, :math:`g = 1 - \cos(2\pi/n)`, so
#
# .. math:: 1 - P_{ii} \;\to\; 2 e^{-g \beta} \qquad (\beta \to \infty) .                  \tag{7}
#
# *Hard* attention to oneself is a limit of rank 2. What costs rank is not where the weight goes
# but how *exactly* the small weights are prescribed. The price is the size of the logits:
# :math:`g \approx 2 \pi^2 / n^2`, so :math:`\beta` must grow like :math:`n^2`.

for lead in (8.0, 12.0):
    rate = low_rank_bottleneck_limit(12, 1.0)[1]
    Z, _ = low_rank_bottleneck_limit(12, lead / rate)
    lacking = 1 - softmax_columns(Z)[0, 0]
    tutorial.check(f"(7) for g beta = {lead}", abs(lacking / (2 * math.exp(-lead)) - 1), 1e-2)

# %%
# The claim
# ---------

tutorial.claim(
    spec.claim,
    criterion="on each of three seeds: (a) for n = 8, 16, 32 and a random map (softmax of standard "
    "normal logits) the best fit of (6) leaves some weight wrong by 1e-3 or more at d_k = n - 2 "
    "and by at most 1e-12 at n - 1; (b) H heads trained on H random maps of 8 tokens, width 32: "
    "the mean divergence ends above 0.01 nats where 32/H < 7, and below 0.001 where 32/H >= 7 and "
    "for all H at fixed d_k = 8. Both: reproduced; one: partly; none: not reproduced",
)

# %%
# (a) The fit
# -----------

LENGTHS = (8, 16, 32)


def curve(rng, n):
    """Largest error of a weight under the best logits of rank 0, 1, ..., n."""
    P = softmax_columns(rng.standard_normal((n, n)))
    return np.array([low_rank_bottleneck_fit(P, d_k).error for d_k in range(n + 1)])


curves = [[curve(np.random.default_rng(seed), n) for n in LENGTHS] for seed in range(3)]
above = np.array([[c[-3] for c in row] for row in curves])
at = np.array([[c[-2] for c in row] for row in curves])
print("largest error of a weight at n - 2:", above.round(4).tolist())
tutorial.check("largest error of a weight at n - 1", np.max(at), 1e-12)
part_a = bool(np.all(above >= 1e-3) and np.all(at <= 1e-12))

# %%
# (b) Heads that learn
# --------------------
# The bound (6) is for the best head. What does gradient descent find? Each of H heads gets a random
# map of its own and minimises the divergence :math:`\frac1n \sum_{ij} P_{ij} \ln (P_{ij} /
# \hat P_{ij})`. With :math:`s = \sqrt{d_k}` its gradient is
#
# .. math::
#
#    dZ = (\hat P - P)/n, \qquad
#    dW_q = W_k X\, dZ\, X^\top / s, \qquad dW_k = W_q X\, dZ^\top X^\top / s .           \tag{8}

N, D = 8, 32


def divergence(P, found):
    """Mean over queries, nats, for each head."""
    return np.sum(P * np.log(P / found), axis=(-1, -2)) / P.shape[-1]


def gradients(X, P, W):
    """The map of each head and the gradient (8) of its divergence."""
    found = low_rank_bottleneck_map(X, W["W_q"], W["W_k"])
    dZ = (found - P) / P.shape[-1] / math.sqrt(W["W_q"].shape[-2])
    return found, {
        "W_q": W["W_k"] @ X @ dZ @ X.T,
        "W_k": W["W_q"] @ X @ np.swapaxes(dZ, -1, -2) @ X.T,
    }


def learn(seed, heads, d_k, steps):
    """Mean divergence of all heads after training."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((D, N)) / math.sqrt(D)
    P = softmax_columns(2.0 * rng.standard_normal((heads, N, N)))
    W = {k: rng.standard_normal((heads, d_k, D)) for k in ("W_q", "W_k")}
    state = None
    for step in range(steps):
        _, gradient = gradients(X, P, W)
        rate = 0.03 * (1 - step / steps)
        W, state = adamw(W, gradient, state, rate=rate, decay=0.0)
    return float(np.mean(divergence(P, gradients(X, P, W)[0])))


rng = np.random.default_rng(4)
X, P = rng.standard_normal((5, 4)), softmax_columns(rng.standard_normal((1, 4, 4)))
W, step = ({k: rng.standard_normal((1, 2, 5)) for k in ("W_q", "W_k")} for _ in range(2))
near = [
    divergence(P, gradients(X, P, {k: W[k] + h * step[k] for k in W})[0])[0] for h in (1e-5, -1e-5)
]
slope = sum(np.sum(g * step[k]) for k, g in gradients(X, P, W)[1].items())
tutorial.check("(8) against differences", abs((near[0] - near[1]) / 2e-5 - slope), 1e-8)

HEADS = (1, 2, 4, 8, 16)
steps = 20 if tutorial.quick else 1500
usual = np.array([[learn(seed, H, D // H, steps) for H in HEADS] for seed in range(3)])
fixed = np.array([[learn(seed, H, N, steps) for H in HEADS] for seed in range(3)])
thin = np.array([D // H < N - 1 for H in HEADS])
part_b = bool(
    np.all(usual[:, thin] > 0.01) and np.all(usual[:, ~thin] < 0.001) and np.all(fixed < 0.001)
)
verdict = {2: "reproduced", 1: "partly", 0: "not reproduced"}[part_a + part_b]
if not tutorial.quick:
    tutorial.measured(
        ours=[
            {f"error, n={n}, width n-2": e for n, e in zip(LENGTHS, above[s], strict=True)}
            | {f"nats, {H} heads of {D // H}": usual[s, i] for i, H in enumerate(HEADS) if thin[i]}
            | {"nats, wider heads (1e-6 or less)": max(1e-6, *usual[s, ~thin], *fixed[s])}
            for s in range(3)
        ],
        verdict=verdict,
        tolerance=0.3,
    )

# %%
# Both parts agree with (5) and (6), and part (b) shows something more: gradient descent finds the
# exact maps whenever they exist. What the paper recommends, a head width of n whatever the number
# of heads, works here; one less is enough. Two cautions. Random maps have no structure, so they are
# the hardest to compress, and real maps may be of low rank. And no model is asked for exact maps:
# by (7) it may come near a map of full rank with two dimensions and large logits.
#
# The figure
# ----------

figure = None
if not tutorial.quick:
    plt = tutorial.pyplot()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.9))
    for place, (n, colour) in enumerate(zip(LENGTHS, (BLUE, GREEN, ORANGE), strict=True)):
        for row in curves:
            left.plot(np.arange(n + 1), np.maximum(row[place], 1e-17), color=colour, alpha=0.7,
                      linewidth=1.2, label=f"n = {n}" if row is curves[0] else None)  # fmt: skip
        left.axvline(n - 1, color=colour, linestyle=":", linewidth=1)
    left.set_yscale("log")
    left.set(title="Best logits of rank $d_k$", xlabel="head width $d_k$ (dotted: n - 1)",
             ylabel="largest error of a weight", ylim=(1e-17, 30))  # fmt: skip
    left.legend(loc="center left", bbox_to_anchor=(0.5, 0.45))
    for n, colour in ((4, BLUE), (6, GREEN), (12, ORANGE)):
        beta = np.geomspace(1, 200, 40)
        lacking = [1 - softmax_columns(low_rank_bottleneck_limit(n, b)[0])[0, 0] for b in beta]
        rate = low_rank_bottleneck_limit(n, 1.0)[1]
        middle.plot(beta, np.maximum(lacking, 1e-12), color=colour, label=f"n = {n}")
        middle.plot(beta, 2 * np.exp(-rate * beta), "--", color=GREY, linewidth=1)
    middle.set_xscale("log")
    middle.set_yscale("log")
    middle.set(title="Hard attention with rank 2", xlabel=r"size of the logits $\beta$ (nats)",
               ylabel=r"$1 - P_{ii}$  (dashed: $2 e^{-g \beta}$)", ylim=(1e-9, 5))  # fmt: skip
    middle.legend(loc="lower left")
    for values, colour, name in (
        (usual, RED, f"$d_k = {D} / H$"),
        (fixed, BLUE, f"$d_k = n = {N}$"),
    ):
        right.plot(HEADS, values.T, ".", color=colour, markersize=4)
        right.plot(HEADS, values.mean(axis=0), color=colour, label=name)
    right.set_xscale("log", base=2)
    right.set_xticks(HEADS, HEADS)
    right.set(title="Trained heads, 8 tokens", xlabel="heads H",
              ylabel="mean divergence (nats)", ylim=(-0.01, 0.2))  # fmt: skip
    right.legend(loc="upper left")

# %%
# Exercises
# ---------
# **1. Write this construction yourself**, for :math:`d_k = n - 1`: find a basis of the vectors that
# sum to zero, and use (3) with it. (Any orthonormal basis B with :math:`J = B B^\top` will do:
# :math:`W_k = B^\top X^+`, :math:`W_q = \sqrt{d_k}\, B^\top \log P\, X^+`. Why?) Your basis need
# not be the library's: what is compared is the map that your matrices give, and their shape.


def my_construct(X, P):
    """W_q and W_k of shape (n - 1, d), where X is (d, n) and P is (n, n)."""
    # solution: return None, None
    n = P.shape[1]
    basis = np.linalg.svd(np.eye(n) - 1 / n)[0][:, : n - 1]  # singular values 1, ..., 1, 0
    back = np.linalg.pinv(X)
    return math.sqrt(n - 1) * basis.T @ np.log(P) @ back, basis.T @ back
    # end of solution


fresh = np.random.default_rng(7)
X, P = fresh.standard_normal((7, 5)), softmax_columns(fresh.standard_normal((5, 5)))
W_q, W_k = my_construct(X, P)
answer = None
if W_q is not None:
    answer = {"map": low_rank_bottleneck_map(X, W_q, W_k), "shape": np.shape(W_q)}
tutorial.exercise(1, answer, {"map": P, "shape": np.array((4, 7))})

# %%
# **2. Shared taste.** All queries share one opinion about keys, up to its strength:
# :math:`P = \operatorname{softmax}(a\, b^\top)`. Show that width 1 is enough. What is
# :math:`\operatorname{rank} C` when every query has the *same* map and :math:`b = 1`? And when may
# it be 0?

# %%
# **Solution 2.** The logits :math:`Z = a\, b^\top` have rank 1: a head whose key i is the number
# :math:`a_i` and whose query j is :math:`b_j` draws the map. (With independent tokens there are
# such weights: :math:`W_k = a^\top X^+`, :math:`W_q = b^\top X^+`.) :math:`C = (J a)\, b^\top` has
# rank 1 also for :math:`b = 1`, where all columns of P are equal: the queries need not differ, but
# the keys must. It is 0 when :math:`J a = 0`, all entries of a being equal, or :math:`b = 0`; in
# general exactly when P is uniform.

taste = np.random.default_rng(5)
P = softmax_columns(np.outer(taste.standard_normal(6), taste.uniform(0.5, 2, 6)))
sizes = np.linalg.svd(centred_logits(P), compute_uv=False)
tutorial.check("exercise 2: the second singular value of C", sizes[1], 1e-14)
same = softmax_columns(np.outer(taste.standard_normal(6), np.ones(6)))
sizes = np.linalg.svd(centred_logits(same), compute_uv=False)
print(f"exercise 2: the same map for all: singular values {sizes[0]:.2f} and {sizes[1]:.0e}")
flat = np.full((6, 6), 1 / 6)
tutorial.check("exercise 2: uniform attention has C = 0", worst(centred_logits(flat), 0), 1e-15)

# %%
# **3. Tokens that depend on each other.** The theorem needs independent columns of X. Take d = 1,
# :math:`X = (1, 0)`: whatever the weights, token 1 as a query sees both keys alike. Prove it from
# (1), and say which maps of two tokens remain.

# %%
# **Solution 3.** Token 1 is the zero vector, so its query :math:`W_q x_1` is zero and
# :math:`Z_{01} = Z_{11} = 0`: the second column is :math:`(\tfrac12, \tfrac12)`. Its key is zero
# too, so :math:`Z_{10} = 0`, while :math:`Z_{00} = W_k \cdot W_q / \sqrt{d_k}` may be any number:
# the first column is :math:`(x, 1 - x)` with any x between 0 and 1. One number is free; two
# independent tokens have two.

draw = np.random.default_rng(6)
for _ in range(3):
    W_q, W_k = draw.standard_normal((2, 4, 1))
    found = low_rank_bottleneck_map(np.array([[1.0, 0.0]]), W_q, W_k)
    tutorial.check("exercise 3: the second column is 1/2, 1/2", worst(found[:, 1], 0.5), 1e-15)
wanted = low_rank_bottleneck_map(np.array([[1.0, 0.0]]), np.eye(1), math.log(9) * np.eye(1))
tutorial.check("exercise 3: x = 9/10", worst(wanted, [[0.9, 0.5], [0.1, 0.5]]), 1e-15)

# %%
tutorial.finish(figure)
