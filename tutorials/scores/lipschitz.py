r"""
Lipschitz regularised attention
===============================

**The question.** Show a trained network a picture that is ten times too bright. It should become
less sure of itself. Usually it becomes *more* sure. One reason sits in attention: scores are
products of two projections of the input, so an input ten times larger has scores a hundred times
larger, and the softmax turns into a maximum. What would a score have to be for attention to stay
what it was?

**The idea.** Measure distances instead of products, and measure them in the input's own units. Ye,
Ma, Cao and Tang (2023) divide squared distances by the size of the queries times the size of the
input. Numerator and denominator are both of second degree: the scale cancels. They call it
Lipschitz Regularized Self-Attention (LRSA), because it bounds how fast the output can change as
the input grows.

You need ``scores/l2_distance``.
"""

# %%
# Definition
# ----------
# The block reads :math:`N` tokens :math:`x_n`; one projection makes queries *and* keys of them
# (tied), another one the values.
#
# .. math::
#
#    D_{ts} &= \textstyle\sum_d (q_{td} - k_{sd})^2                                          &(1)\\
#    a      &= \lVert q \rVert_F, \qquad b = \max_n \lVert x_n \rVert                        &(2)\\
#    z_{ts} &= -\alpha\, c\, D_{ts}, \qquad c = 1 / (a\, b + \epsilon)                       &(3)\\
#    p_{ts} &= e^{z_{ts}} / \textstyle\sum_{s'} e^{z_{ts'}}                                  &(4)\\
#    o_t    &= \textstyle\sum_s p_{ts}\, v_s                                                 &(5)
#
# :math:`a` is the root of the sum of *all* squared entries of the queries of a head, :math:`b` the
# length of the longest token over all channels. :math:`\alpha = 100` in the public
# implementations, :math:`\epsilon = 10^{-10}` only guards a division. Scores are never positive,
# and a token's score with itself is 0, the largest of its row.

import math

import numpy as np
from sklearn.datasets import load_digits

import attention_ref
from attention_ref.kit.tutorial import BLUE, GREEN, ORANGE, Tutorial

tutorial = Tutorial(__file__)
spec = attention_ref.get("scores/lipschitz")
dot = attention_ref.get("scores/dot_product")
l2 = attention_ref.get("scores/l2_distance")
EPS = np.finfo(np.float64).eps

# %%
# An example by hand
# ------------------
# Two tokens of width 1: :math:`q = k = (3, 4)`, so :math:`a = 5` and the squared distances are 0
# and 1. The inputs are :math:`x = (6, 8)`, so :math:`b = 8` and :math:`c = \tfrac1{40}`. With
# :math:`\alpha = 40 \ln 3` the scores are 0 and :math:`-\ln 3`, the weights :math:`\tfrac34` and
# :math:`\tfrac14`. Values 0 and 4 give the outputs 1 and 3. Make everything ten times larger:
# the distances are 0 and 100, :math:`a\,b = 4000`, the scores the same.

small = {"q": np.array([[3.0], [4.0]]), "v": np.array([[0.0], [4.0]]), "alpha": 40 * math.log(3)}
small["k"], small["x"] = small["q"], 2 * small["q"]
out, small_cache = spec.forward(**small)
print("c", small_cache.c.item(), "weights", small_cache.p.round(6).tolist())
tutorial.check("the outputs are 1 and 3", np.max(np.abs(out[:, 0] - [1, 3])), 1e-9)
larger, _ = spec.forward(**(small | {n: 10 * small[n] for n in "qkx"}))
tutorial.check("ten times larger, the same outputs", np.max(np.abs(larger - out)), 1e-9)

# %%
# The forward
# -----------


def lipschitz(q, k, v, x, alpha, eps=1e-10):
    """Steps (1) to (5) for one head; the output and what the backward needs."""
    delta = q[:, None, :] - k[None, :, :]
    D = np.sum(delta**2, axis=-1)  # (1)
    a, lengths = math.sqrt(np.sum(q**2)), np.sqrt(np.sum(x**2, axis=1))
    b = np.max(lengths)  # (2)
    c = 1 / (a * b + eps)
    z = -alpha * c * D  # (3)
    e = np.exp(z - z.max(axis=1, keepdims=True))
    p = e / e.sum(axis=1, keepdims=True)  # (4)
    return p @ v, (delta, D, a, lengths, b, c, p)  # (5)


rng = np.random.default_rng(0)
T, S, D, E, C, ALPHA = 4, 6, 3, 2, 5, 9.0
q, k, v = rng.standard_normal((T, D)), rng.standard_normal((S, D)), rng.standard_normal((S, E))
x = rng.standard_normal((S, C))
out, kept = lipschitz(q, k, v, x, ALPHA)
library, cache = spec.forward(q, k, v, x, alpha=ALPHA)
tutorial.check("forward against the library", np.max(np.abs(out - library)), 16 * EPS)

# %%
# The backward, line by line
# --------------------------
# **(5'), (4')** As always: :math:`dv = p^\top do`, :math:`dp = do\, v^\top`,
# :math:`dz = p\,(dp - \sum_s p\, dp)`.
#
# **(3')** A score is a product of three factors, one of them shared by all:
#
# .. math:: dD_{ts} = -\alpha\, c\; dz_{ts}, \qquad
#           dc = -\alpha \textstyle\sum_{ts} dz_{ts}\, D_{ts} .
#
# **(2')** :math:`c = 1/(ab + \epsilon)` has the slope :math:`-c^2`, so :math:`da = -c^2\, b\, dc`
# and :math:`db = -c^2\, a\, dc`. The slope of a norm is the unit vector: every query gets
# :math:`da\; q_t / a`. The slope of a maximum goes to the winner alone: the longest token gets
# :math:`db\; x_n / \lVert x_n \rVert`, all others nothing.
#
# **(1')** :math:`d\delta_{ts} = 2\, dD_{ts}\, \delta_{ts}`; its sum over :math:`s` goes to
# :math:`q_t`, minus its sum over :math:`t` to :math:`k_s`. With tied projections both land on one
# array.


def lipschitz_backward(dout, q, v, x, alpha, kept):
    """Steps (5') to (1')."""
    delta, D, a, lengths, b, c, p = kept
    dv, dp = p.T @ dout, dout @ v.T  # (5')
    dz = p * (dp - np.sum(p * dp, axis=1, keepdims=True))  # (4')
    dD, dc = -alpha * c * dz, -alpha * np.sum(dz * D)  # (3')
    da, db = -(c**2) * b * dc, -(c**2) * a * dc  # (2')
    dx = np.zeros_like(x)
    longest = np.argmax(lengths)
    dx[longest] = db * x[longest] / b
    ddelta = 2 * dD[:, :, None] * delta  # (1')
    return {"q": ddelta.sum(axis=1) + da * q / a, "k": -ddelta.sum(axis=0), "v": dv, "x": dx}


dout = rng.standard_normal((T, E))
theirs = spec.backward(dout, cache)
for name, ours in lipschitz_backward(dout, q, v, x, ALPHA, kept).items():
    error = np.max(np.abs(ours - theirs[name]))
    tutorial.check(f"d{name} from the board against the library", error, 64 * EPS)

# %%
# *The example backwards*, for the loss :math:`o_0`: :math:`dz_0 = (\tfrac34 (0 - 1),\
# \tfrac14 (4 - 1)) = (-\tfrac34, \tfrac34)`. Only :math:`D_{01} = 1` is not zero, so
# :math:`dc = -40 \ln 3 \cdot \tfrac34 = -30 \ln 3`, and with :math:`c^2 = \tfrac1{1600}` the
# longest input gets :math:`db = \tfrac{5 \cdot 30}{1600} \ln 3 = \tfrac{3}{32} \ln 3`: a larger
# input flattens the row and raises :math:`o_0`. The distance part of :math:`dq_0` is
# :math:`2 \cdot (-\ln 3 \cdot \tfrac34)(3 - 4) = \tfrac32 \ln 3`, and :math:`a` adds
# :math:`\tfrac{8 \cdot 30}{1600} \cdot \tfrac35 \ln 3 = \tfrac{9}{100} \ln 3`.

gradient = spec.backward(np.array([[1.0], [0.0]]), small_cache)
want = math.log(3) * np.array([3 / 2 + 9 / 100, 3 / 32])
found = np.array([gradient["q"][0, 0], gradient["x"][1, 0]])
tutorial.check("dq and dx of the example", np.max(np.abs(found - want)), 1e-9)

# %%
# Four roads to the same gradient, with a mask:

mask = rng.random((T, S)) < 0.8
tutorial.gradients(spec, {"q": q, "k": k, "v": v, "x": x, "alpha": ALPHA, "mask": mask})

# %%
# Experiment: a brighter picture
# ------------------------------
# Handwritten digits, cut into 16 patches of 2 by 2 pixels, embedded at random into 32 channels with
# a random vector for the place; four heads of width 8 with random projections. The whole input is
# multiplied by 1 to 100. We watch the entropy of the weights for dot products, tied distances and
# LRSA.
#
# Then the slope: six random tokens of width 4, one head, and the largest singular value of the
# Jacobian of the whole map from tokens to outputs, projections included, its maximum over 100
# draws. If a map has degree 1, its Jacobian has degree 0: it must not depend on the scale at all.

tutorial.claim(
    "Weights do not depend on the scale of the input, so attention cannot saturate on "
    "inputs far from those of training; dot products and plain distances saturate.",
    criterion="on each of three seeds: from scale 1 to 100 the mean entropy of LRSA stays within "
    "1e-6 nats and the largest slope within 1e-6 of itself; at scale 10 dot products and distances "
    "keep less than a tenth of their entropy, and the largest slope of dot products has grown at "
    "least tenfold",
)

SCALES = (1.0, 3.0, 10.0, 30.0, 100.0)
digits = load_digits().images / 16.0
patches = digits.reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 16, 4)


def embedded(rng, pictures=50, channels=32):
    """Digits as tokens: (pictures, 16, channels)."""
    chosen = patches[rng.choice(len(patches), pictures, replace=False)]
    embedding = rng.standard_normal((4, channels)) / 2
    return chosen @ embedding + rng.standard_normal((16, channels)) / 2


def entropies(seed, heads=4, width=8):
    """Mean entropy in nats, a row a scale: dot product, distance, LRSA."""
    rng = np.random.default_rng(seed)
    tokens = embedded(rng)
    maps = rng.standard_normal((2, tokens.shape[-1], heads * width)) / math.sqrt(tokens.shape[-1])
    rows = []
    for scale in SCALES:
        X = scale * tokens
        q, k = (
            np.swapaxes((X @ W).reshape(*X.shape[:2], heads, width), 1, 2) for W in maps
        )  # fmt: skip
        caches = (
            dot.forward(q, k, q)[1],
            l2.forward(q, q, q)[1],
            spec.forward(q, q, q, X[:, None])[1],
        )
        rows.append([-np.mean(np.sum(c.p * np.log(np.maximum(c.p, 1e-300)), -1)) for c in caches])
    return np.array(rows)


def slope(which, X, W, Wk, U):
    """Largest singular value of the Jacobian of the outputs with respect to the tokens X."""
    tied = which is not dot
    arrays = [X @ W, X @ (W if tied else Wk), X @ U, *([X] if which is spec else [])]
    count = len(X) * U.shape[1]
    _, cache = which.forward(*(np.broadcast_to(a, (count, *a.shape)) for a in arrays))
    g = which.backward(np.eye(count).reshape(count, len(X), -1), cache)
    J = g["q"] @ W.T + g["k"] @ (W if tied else Wk).T + g["v"] @ U.T + g.get("x", 0.0)
    return np.linalg.norm(J.reshape(count, -1), 2)


def slopes(seed, draws=100):
    """The largest slope over some draws, a row a scale."""
    rng = np.random.default_rng(seed)
    maps = rng.standard_normal((3, 4, 3)) / 2
    tokens = rng.standard_normal((draws, 6, 4))
    return np.array([
        [max(slope(which, scale * X, *maps) for X in tokens) for which in (dot, l2, spec)]
        for scale in SCALES
    ])  # fmt: skip


records, curves = [], []
for seed in range(3) if not tutorial.quick else ():
    h, s = entropies(seed), slopes(seed)
    curves.append((h, s))
    names = ("dot product", "distance", "LRSA")
    record = {f"entropy, {n}, x{int(SCALES[i])}": h[i, j] for j, n in enumerate(names)
              for i in (0, 2)}  # fmt: skip
    record |= {f"slope, {n}, x{int(SCALES[i])}": s[i, j] for j, n in enumerate(names)
               for i in (0, 2, 4)}  # fmt: skip
    records.append(record)

if not tutorial.quick:
    steady = all(np.ptp(h[:, 2]) < 1e-6 and np.ptp(s[:, 2]) < 1e-6 * s[0, 2] for h, s in curves)
    saturate = all(np.all(h[2, :2] < h[0, :2] / 10) and s[2, 0] > 10 * s[0, 0] for h, s in curves)
    verdict = {2: "reproduced", 1: "partly", 0: "not reproduced"}[steady + saturate]
    tutorial.measured(ours=records, verdict=verdict, tolerance=0.02)

# %%
# LRSA does what the formula says. Three remarks. *Constant is not small*: at scale 1 the largest
# slope of LRSA is above the others' on all three seeds, up to five times as large; and with
# :math:`\alpha = 100` its weights are sharp at *every* scale, 0.2 nats of the 2.8 that 16 tokens
# allow. What the construction excludes is growth. *The values still grow*: the outputs are ten
# times larger for an input ten times larger, and a linear classifier behind them becomes more sure
# after all; only the attention does not add to it. *The scale is shared*: one very long token
# raises :math:`a` and :math:`b` for all, and all other rows become even. The last is measured here,
# for the default :math:`\alpha`:

lengths = 10.0 ** np.arange(0, 4.1, 0.5)
tokens = embedded(np.random.default_rng(3), pictures=20)
W = np.random.default_rng(4).standard_normal((32, 8)) / math.sqrt(32)
others = []
for length in lengths:
    X = tokens.copy()
    X[:, 0] *= length
    q = X @ W
    row = []
    for which, extra in ((l2, ()), (spec, (X,))):
        p = which.forward(q, q, q, *extra)[1].p[:, 1:]
        row.append(-np.mean(np.sum(p * np.log(np.maximum(p, 1e-300)), axis=-1)))
    others.append(row)
others = np.array(others)
print("entropy of the other rows, one token 1 and 10000 times longer (ln 16 = 2.77):")
print(
    "distance", others[[0, -1], 0].round(2).tolist(), "LRSA", others[[0, -1], 1].round(2).tolist()
)

# %%
# The figure
# ----------

figure = None
if not tutorial.quick:
    plt = tutorial.pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(11.5, 3.6))
    h, s = (np.array([pair[i] for pair in curves]) for i in range(2))
    styles = (("dot product", ORANGE), ("tied distance", GREEN), ("LRSA", BLUE))
    for j, (name, colour) in enumerate(styles):
        axes[0].plot(SCALES, h[:, :, j].T, "o", color=colour, alpha=0.5, markersize=4)
        axes[0].plot(SCALES, h[:, :, j].mean(axis=0), color=colour, label=name)
        axes[1].plot(SCALES, s[:, :, j].T, "o", color=colour, alpha=0.5, markersize=4)
        axes[1].plot(SCALES, np.exp(np.log(s[:, :, j]).mean(axis=0)), color=colour, label=name)
    for panel in axes[:2]:
        panel.set_xscale("log")
        panel.set(xlabel="scale of the input")
    axes[0].set(title="Weights of digits", ylabel="mean entropy (nats)", ylim=(-0.1, 3))
    axes[0].legend(loc="upper right")
    axes[1].set_yscale("log")
    axes[1].set(title="Slope of the whole map", ylabel="largest singular value")
    axes[2].plot(lengths, others[:, 0], ".-", color=GREEN, label="tied distance")
    axes[2].plot(lengths, others[:, 1], ".-", color=BLUE, label="LRSA")
    axes[2].axhline(math.log(16), color="black", linestyle=":")
    axes[2].set_xscale("log")
    axes[2].set(title="One long token", xlabel="its length, times", ylim=(-0.1, 3.1),
                ylabel="entropy of other rows (nats)")  # fmt: skip
    axes[2].legend(loc="center right")

# %%
# Exercises
# ---------
# **1. Write this backward yourself.** Only the part that passes through :math:`c`: given the
# gradient of the scores, the squared distances ``D``, q, x, :math:`\alpha` and :math:`c`, return
# what reaches q and x this way.


def my_backward(dz, D, q, x, alpha, c):
    """Return dq and dx through a and b."""
    # solution: return None, None
    through = alpha * c**2 * np.sum(dz * D)
    norms = np.linalg.norm(x, axis=1)
    winner = (np.arange(len(x)) == np.argmax(norms))[:, None]
    dq = through * norms.max() / np.linalg.norm(q) * q
    dx = through * np.linalg.norm(q) / norms.max() * winner * x
    return dq, dx
    # end of solution


fresh = np.random.default_rng(7)
q7, k7, v7 = (fresh.standard_normal(shape) for shape in ((4, 3), (5, 3), (5, 2)))
x7, dout7 = fresh.standard_normal((5, 6)), fresh.standard_normal((4, 2))
_, cache = spec.forward(q7, k7, v7, x7, alpha=9.0)
whole = spec.backward(dout7, cache)
_, constant = l2.forward(q7, k7, v7, scale=9.0 * cache.c.item())
expected = {"q": whole["q"] - l2.backward(dout7, constant)["q"], "x": whole["x"]}
dp7 = dout7 @ v7.T
dz7 = cache.p * (dp7 - np.sum(cache.p * dp7, axis=1, keepdims=True))
answer = my_backward(dz7, np.sum(cache.delta**2, axis=-1), q7, x7, 9.0, cache.c.item())
tutorial.exercise(1, dict(zip("qx", answer, strict=True)), expected, bound=1e-10)

# %%
# **2. Euler.** The weights do not change when q, k and x are multiplied by one number. Which sum
# of products of gradients and arguments must therefore vanish, for every loss?

# %%
# **Solution 2.** The derivative of the loss along :math:`(q, k, x)` itself: :math:`\sum q\, dq +
# \sum k\, dk + \sum x\, dx = 0`, up to :math:`\epsilon`. It is Euler's theorem for a function of
# degree 0, and a good test of a backward: the distance part and the part through :math:`c` must
# cancel.

parts = [float(np.sum(whole[n] * a)) for n, a in (("q", q7), ("k", k7), ("x", x7))]
print("exercise 2: the three parts", [f"{part:.4f}" for part in parts])
tutorial.check("exercise 2: their sum", abs(sum(parts)), 1e-8)

# %%
# **3. More tokens.** Let every token of a tied layer occur :math:`m` times. What happens to
# :math:`a`, and to the weights that a group of equal tokens gets together? Which :math:`\alpha`
# restores the outputs of :math:`m = 1`?

# %%
# **Solution 3.** :math:`a` grows by :math:`\sqrt m`, all scores shrink by as much, the weights
# become more even: a network with more patches attends more broadly at the same :math:`\alpha`.
# Equal copies do not change the proportions, so :math:`\alpha \sqrt m` restores the outputs.

m = 4
tied = {"q": k7, "k": k7, "v": v7, "x": x7}
out, _ = spec.forward(**tied, alpha=20.0)
many = {n: np.repeat(a, m, axis=0) for n, a in tied.items()}
same, _ = spec.forward(**many, alpha=20.0 * math.sqrt(m))
tutorial.check("exercise 3: m times the tokens", np.max(np.abs(same[::m] - out)), 1e-9)

# %%
tutorial.finish(figure)
