r"""
Distance scores
===============

**The question.** A discriminator must not react violently: if a picture changes a little, its
verdict may change only a little. One says that a map :math:`f` has the Lipschitz constant
:math:`K` when :math:`\lVert f(X) - f(X') \rVert \le K \lVert X - X' \rVert` for all inputs. What
is the constant of softmax attention?

**The answer is unpleasant.** There is none: for large inputs the ratio grows without bound. Kim,
Papamakarios and Mnih proved it in 2021, and gave a remedy that ViTGAN put to use: compare query
and key by their distance, and make both with the same projection.

You need to know the softmax and its derivative; ``scores/dot_product`` explains the rest.
"""

# %%
# Definition
# ----------
# With :math:`T` queries and :math:`S` keys of width :math:`D`, a factor :math:`c` (by default
# :math:`1 / \sqrt D`) and perhaps a bias :math:`b`:
#
# .. math::
#
#    \delta_{ts} &= q_t - k_s                                                    &(1)\\
#    z_{ts} &= -c\, \textstyle\sum_d \delta_{tsd}^2                              &(2)\\
#    p_{ts} &= e^{z_{ts} + b_{ts}} / \textstyle\sum_{s'} e^{z_{ts'} + b_{ts'}}   &(3)\\
#    o_t    &= \textstyle\sum_s p_{ts}\, v_s                                     &(4)
#
# How far is that from the dot product? Multiply out:
#
# .. math:: z_{ts} = 2 c\, q_t \cdot k_s - c\, k_s \cdot k_s - c\, q_t \cdot q_t .
#
# The last term is the same for the whole row, and the softmax does not see it. So distance
# attention is dot-product attention of twice the scale with a bias *against long keys*. A long
# key can no longer be everybody's favourite.
#
# ViTGAN's formula has no sign before the distance; with a plus the most distant key would win.
# We follow Kim et al., whose proof needs the minus and the square.

import math

import numpy as np

import attention_ref
from attention_ref import engine
from attention_ref.kit.tutorial import BLUE, GREY, ORANGE, SKY, Tutorial

tutorial = Tutorial(__file__)
spec = attention_ref.get("scores/l2_distance")
dot = attention_ref.get("scores/dot_product")
EPS = np.finfo(np.float64).eps

# %%
# An example by hand
# ------------------
# :math:`q = (3, 1)`, keys :math:`(1, 2)` and :math:`(3, 3)`, :math:`c = \ln 3`.
#
# .. math:: \delta_1 = (2, -1), \quad \delta_2 = (0, -2), \quad z = (-5 \ln 3, -4 \ln 3)
#
# The second weight is three times the first: :math:`p = (\tfrac14, \tfrac34)`, and with
# :math:`v = (4, 8)` the output is :math:`1 + 6 = 7`. The products :math:`q \cdot k` are 5 and 12:
# there the long key would have won by a factor :math:`3^7`.

small = {
    "q": np.array([[3.0, 1.0]]),
    "k": np.array([[1.0, 2.0], [3.0, 3.0]]),
    "v": np.array([[4.0], [8.0]]),
    "scale": math.log(3.0),
}
out, small_cache = spec.forward(**small)
print("z / ln 3 =", (small_cache.z / math.log(3.0)).round(12).tolist())
tutorial.check("weights 1/4, 3/4", np.max(np.abs(small_cache.p - [0.25, 0.75])), 16 * EPS)
tutorial.check("the output is 7", abs(out.item() - 7), 64 * EPS)

# %%
# The forward
# -----------


def distant(q, k, v, c, live):
    """Steps (1) to (4) without a bias; returns the output and what is needed later."""
    delta = q[:, None, :] - k[None, :, :]  # (1)
    z = -c * np.sum(delta**2, axis=-1)  # (2)
    z = np.where(live, z, -np.inf)
    e = np.exp(z - z.max(axis=1, keepdims=True))
    p = e / e.sum(axis=1, keepdims=True)  # (3)
    return p @ v, delta, p  # (4)


rng = np.random.default_rng(0)
T, S, D, E = 4, 6, 3, 2
q, k, v = rng.standard_normal((T, D)), rng.standard_normal((S, D)), rng.standard_normal((S, E))
c = 0.7
live = np.arange(S) <= np.arange(T)[:, None] + (S - T)
out, delta, p = distant(q, k, v, c, live)
library, cache = spec.forward(q, k, v, causal=True, scale=c)
tutorial.check("forward against the library", np.max(np.abs(out - library)), 8 * EPS)
bias = -c * np.sum(k * k, axis=1)
other, _ = dot.forward(q, k, v, causal=True, scale=2 * c, bias=bias[None])
tutorial.check("dot product with the bias -c k.k", np.max(np.abs(out - other)), 32 * EPS)

# %%
# The backward, line by line
# --------------------------
# From the bottom up; :math:`dx` is the gradient of :math:`x`, and :math:`do` is given.
#
# **(4'), (3')** As for every softmax attention: :math:`dv = p^\top do`, :math:`dp = do\, v^\top`,
# :math:`dz = p\,(dp - \sum_s p\, dp)`.
#
# **(2')** Each score is a sum of squares, so
#
# .. math:: d\delta_{tsd} = dz_{ts}\, \frac{\partial z_{ts}}{\partial \delta_{tsd}}
#           = -2 c\, dz_{ts}\, \delta_{tsd} .
#
# **(1')** The query :math:`q_t` stands in :math:`\delta_{ts}` for every key, with a plus, and the
# key :math:`k_s` for every query, with a minus:
#
# .. math:: dq_t = \textstyle\sum_s d\delta_{ts}, \qquad dk_s = -\textstyle\sum_t d\delta_{ts} .
#
# A key with :math:`dz > 0` pulls, along the line that joins it to the query. What the queries gain
# the keys lose: :math:`\sum_t dq_t = -\sum_s dk_s`, because a common shift changes nothing.
#
# When queries and keys come from one projection, :math:`q = k = X W`, both gradients arrive
# there: :math:`dW = X^\top (dq + dk)`.


def distant_backward(dout, v, c, delta, p):
    """Steps (4') to (1')."""
    dv, dp = p.T @ dout, dout @ v.T  # (4')
    dz = p * (dp - np.sum(p * dp, axis=1, keepdims=True))  # (3')
    ddelta = -2 * c * dz[:, :, None] * delta  # (2')
    return {"q": ddelta.sum(axis=1), "k": -ddelta.sum(axis=0), "v": dv}  # (1')


dout = rng.standard_normal((T, E))
ours = distant_backward(dout, v, c, delta, p)
theirs = spec.backward(dout, cache)
for name in ours:
    error = np.max(np.abs(ours[name] - theirs[name]))
    tutorial.check(f"d{name} from the board against the library", error, 32 * EPS)
error = np.max(np.abs(theirs["q"].sum(axis=0) + theirs["k"].sum(axis=0)))
tutorial.check("the pulls on queries and keys cancel", error, 64 * EPS)

# %%
# *The example backwards*, :math:`L = o`. :math:`dz = p\,(v - 7) = (-\tfrac34, \tfrac34)`, so
# :math:`d\delta = \ln 3\, ((3, -\tfrac32), (0, 3))`, :math:`dq = \ln 3\, (3, \tfrac32)` and
# :math:`dk = -d\delta`.

gradient = spec.backward(np.ones((1, 1)), small_cache)
error = np.max(np.abs(gradient["q"] / math.log(3.0) - [3, 1.5]))
tutorial.check("dq of the example", error, 64 * EPS)
error = np.max(np.abs(gradient["k"] / math.log(3.0) - [[-3, 1.5], [0, -3]]))
tutorial.check("dk of the example", error, 64 * EPS)

# %%
# Four roads to the same gradient, with a mask and a bias:

given = {"q": q, "k": k, "v": v, "scale": c, "mask": live, "bias": rng.standard_normal((T, S))}
tutorial.gradients(spec, given)

# %%
# Why tied distances are gentle
# -----------------------------
# Let :math:`q = k = v = x`, so :math:`o_t` is the mean of the tokens under the weights
# :math:`p_t`. Differentiating a softmax mean gives a covariance under :math:`p_t`: for the dot
# product :math:`\partial o_t / \partial q_t = c\, \mathrm{Cov}_{p_t}(x)`. It is large when two
# keys *far apart* share the weight, and for the dot product they may: they only need the same
# projection on :math:`q_t`. With inputs ten times as large it is a hundred times as large.
#
# With tied distances a token's own key has the score 0, the best there is. Another key has a
# noticeable weight only if :math:`c \lVert x_t - x_s \rVert^2` is a few nats. Whoever shares the
# weight is near, at a distance of about :math:`1 / \sqrt c`, whatever the scale of the inputs.
#
# Experiment: the steepest direction
# ----------------------------------
# We draw 8 tokens of width 4 and one set of projections :math:`W_q, W_k, W_v` with entries of
# variance 1/4, multiply the tokens by 1, 3, 10, 30, and look for the largest ratio
# :math:`\lVert f(X) - f(X') \rVert / \lVert X - X' \rVert` of nearby inputs. No need to guess
# :math:`X'`: for the steepest one the ratio is the largest singular value of the Jacobian
# :math:`\partial f / \partial X`, a 32 by 32 matrix whose rows 32 backward passes give exactly.
# We keep the maximum over many draws of tokens; it is a lower bound of the Lipschitz constant.

tutorial.claim(
    spec.claim,
    criterion="on each of three seeds, with the maximum over 300 draws: from inputs of scale 1 to "
    "inputs of scale 30 the largest ratio of dot-product attention grows by a factor of at least "
    "50, and that of tied distance attention (square W_q) at scales 3, 10, 30 is at most twice "
    "that at scale 1",
)

N, WIDTH, SCALES = 8, 4, (1, 3, 10, 30)
DRAWS = 5 if tutorial.quick else 300
ONE = np.eye(N * WIDTH).reshape(N * WIDTH, 1, N, WIDTH)  # every output coordinate once
KINDS = {"dot product": (dot, False), "distance, tied": (spec, True),
         "distance, not tied": (spec, False),
         "distance, tied, narrow": (spec, True)}  # fmt: skip


def steepest(method, x, wq, wk, wv):
    """Largest singular value of the Jacobian, for every member of x, shape (draws, N, WIDTH)."""
    each = (N * WIDTH, 1, 1, 1)
    q, k, v = (np.tile(x @ w, each) for w in (wq, wk, wv))
    out, cache = method.forward(q, k, v)
    g = method.backward(np.broadcast_to(ONE, out.shape).copy(), cache)
    jacobian = g["q"] @ wq.T + g["k"] @ wk.T + g["v"] @ wv.T
    jacobian = np.swapaxes(jacobian, 0, 1).reshape(len(x), N * WIDTH, N * WIDTH)
    return np.linalg.norm(jacobian, 2, axis=(1, 2))


def search(rng):
    """The largest ratio of every kind at every scale."""
    wq, wk, wv = rng.standard_normal((3, WIDTH, WIDTH)) / math.sqrt(WIDTH)
    x = rng.standard_normal((DRAWS, N, WIDTH))
    found = {}
    for kind, (method, tied) in KINDS.items():
        a, b = (wq, wq) if tied else (wq, wk)
        if kind == "distance, tied, narrow":
            a = b = wq[:, : WIDTH // 2]
        found[kind] = [float(np.max(steepest(method, s * x, a, b, wv))) for s in SCALES]
    return found


records, held, drawn = [], [], []
for seed in range(3):
    found = search(np.random.default_rng(seed))
    drawn.append(found)
    records.append({f"{kind}, scale {s}": x for kind, row in found.items()
                    for s, x in zip(SCALES, row, strict=True)})  # fmt: skip
    for kind, row in found.items():
        print(f"seed {seed}, {kind:22s}: " + ", ".join(f"{x:8.2f}" for x in row))
    steep, flat = found["dot product"], found["distance, tied"]
    held.append(steep[-1] >= 50 * steep[0] and max(flat[1:]) <= 2 * flat[0])
tutorial.measured(
    ours=records,
    verdict="reproduced" if all(held) else "partly" if any(held) else "not reproduced",
    tolerance=0.05,
)

# %%
# The third row of each seed is a warning. It is the same distance with two different projections:
# now a query may lie at the same distance from two far keys, and the bound is gone. The tying is
# half of the method.
#
# The fourth row is a warning against our own argument. There the tied :math:`W_q` is only half as
# wide as the tokens. Two tokens may then have nearly the same projection and be far apart in what
# the projection drops, and their *values* differ as much as they like. "Near" must mean near for
# the values too: they have to be a function of the projected tokens. A square invertible
# :math:`W_q` sees to that, and Kim et al. build :math:`W_v` from :math:`W_q`. Narrow heads with a
# free :math:`W_v`, as in ViTGAN's code, are gentler than the dot product, growing like the scale
# and not like its square, and yet not Lipschitz. We added this row, and the word *square* to the
# claim, after a first run; the thresholds stayed.
#
# The projections count as well: :math:`f` cannot be gentler than its :math:`W_v`. ViTGAN
# therefore fixes the largest singular value of every projection, at that of its first step:
#
# .. math:: \hat W = \sigma_0\, W / \sigma(W), \qquad \sigma(W) = u^\top W r,
#
# with the singular vectors :math:`u, r` held constant in the backward,
# :math:`dW = \frac{\sigma_0}{\sigma} (d\hat W - \frac{\langle d\hat W, W \rangle}{\sigma}\,
# u r^\top)`. Dividing by :math:`\sigma` alone (:math:`\sigma_0 = 1`), they report, slows training.

from attention_ref.methods.scores.l2_distance import spectral_backward, spectral_forward

w, dw_hat = rng.standard_normal((2, 4, 3))
left, sizes, right = np.linalg.svd(w)
hat, now = spectral_forward(5.0 * w, sizes[0], left[:, 0], right[0])
tutorial.check("five times W is brought back to W", np.max(np.abs(hat - w)), 32 * EPS)
dw = spectral_backward(dw_hat, 5.0 * w, sizes[0], left[:, 0], right[0], now)
tutorial.check("no gradient along W itself", abs(np.sum(dw * w)), 64 * EPS)

# %%
# The figure
# ----------
# Left: the weights of two keys for a query that moves along a line. The dot product goes with the
# longer key even where the query stands on the shorter one. Right: the largest ratio found, dots
# for three seeds, lines for their geometric mean.

figure = None
if not tutorial.quick:
    plt = tutorial.pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 3.9))
    line = np.linspace(-1, 5, 241)[:, None]
    keys = np.array([[1.0], [3.0]])
    near = spec.forward(line, keys, keys, scale=1.0)[1].p
    far = dot.forward(line, keys, keys, scale=1.0)[1].p
    axes[0].plot(line[:, 0], near[:, 0], color=BLUE, label="distance: key at 1")
    axes[0].plot(line[:, 0], far[:, 0], "--", color=ORANGE, label="dot product: key at 1")
    axes[0].plot([1, 3], [0, 0], "^", color=GREY, markersize=9, clip_on=False)
    axes[0].set(title="Who is preferred, the key at 1 or at 3?", xlabel="query (keys at 1 and 3)",
                ylabel="weight of the key at 1", ylim=(-0.02, 1.05))  # fmt: skip
    axes[0].legend(loc="upper right")

    looks = {
        "dot product": ("o", ORANGE),
        "distance, not tied": ("^", GREY),
        "distance, tied, narrow": ("D", SKY),
        "distance, tied": ("s", BLUE),
    }
    for kind, (marker, color) in looks.items():
        values = np.array([found[kind] for found in drawn])
        axes[1].plot(SCALES, np.exp(np.log(values).mean(axis=0)), color=color, label=kind)
        for row in values:
            axes[1].plot(SCALES, row, marker, color=color, alpha=0.6)
    axes[1].set_xscale("log")
    axes[1].set_yscale("log")
    axes[1].set_xticks(SCALES, [str(s) for s in SCALES])
    axes[1].minorticks_off()
    axes[1].set(title="Steepest response found", xlabel="scale of the inputs",
                ylabel="largest output change / input change")  # fmt: skip
    axes[1].legend(loc="upper left")

# %%
# Exercises
# ---------
# **1. Write this backward yourself**, and save memory: given ``dz`` (T, S), any numbers, return
# :math:`dq` and :math:`dk` of step (2) without a tensor of T S D numbers. (Hint: put the sum
# :math:`\delta_{ts} = q_t - k_s` into (2') and (1') and take it apart.)


def my_backward(dz, q, k, c):
    """Return dq, shape (T, D), and dk, shape (S, D)."""
    # solution: return None, None
    dq = 2 * c * (dz @ k - dz.sum(axis=1)[:, None] * q)
    dk = 2 * c * (dz.T @ q - dz.sum(axis=0)[:, None] * k)
    return dq, dk
    # end of solution


fresh = np.random.default_rng(7)
given = {"q": fresh.standard_normal((3, 4)), "k": fresh.standard_normal((5, 4))}
dz = fresh.standard_normal((3, 5))
_, pull = engine.vjp(lambda q, k: -0.6 * np.sum((q[:, None] - k) ** 2, axis=-1), given)
answer = dict(zip("qk", my_backward(dz, **given, c=0.6), strict=True))
tutorial.exercise(1, answer, pull(dz))

# %%
# **2. What the expansion costs.** Move all tokens by :math:`10^7` and compute the scores both
# ways, by differences and by :math:`2 c\, q \cdot k - c\, k \cdot k - c\, q \cdot q`. How many
# digits should remain of the expanded ones?

# %%
# **Solution 2.** One at best. The scores are of size 1, but the terms of the expansion are near
# :math:`10^{14}` and known to 16 digits, that is to a few hundredths, and their sum inherits this
# error. The differences lose digits once, not twice: a token near :math:`10^7` is known to
# :math:`10^{-9}`, and its distance to about as much. It is the square that doubles the loss.

moved_q, moved_k = q + 1e7, k + 1e7
expanded = c * (2 * moved_q @ moved_k.T - np.sum(moved_k**2, 1) - np.sum(moved_q**2, 1)[:, None])
plain = spec.forward(q, k, v, scale=c)[1].z
direct = spec.forward(moved_q, moved_k, v, scale=c)[1].z
print(f"exercise 2: expanded off by {np.max(np.abs(expanded - plain)):.1e}, "
      f"differences by {np.max(np.abs(direct - plain)):.1e}")  # fmt: skip
tutorial.check("exercise 2: the differences keep them", np.max(np.abs(direct - plain)), 1e-6)

# %%
# **3. Who wins?** Show that with tied projections, without bias and mask, every token's largest
# weight is the one on itself, and that the scores are symmetric although the weights are not.

# %%
# **Solution 3.** With :math:`q_t = k_t` the score :math:`z_{tt} = 0`, and all others are
# :math:`-c \lVert k_t - k_s \rVert^2 < 0` unless two tokens are equal; the softmax keeps the order.
# A distance does not care who asks, so :math:`z_{ts} = z_{st}`. But each row is divided by its own
# sum: :math:`p_{ts} / p_{st} = Z_s / Z_t` with :math:`Z_t = \sum_s e^{z_{ts}}`. A lonely token has
# a small :math:`Z` and gives more than it gets.

tied = spec.forward(k, k, k)[1]
asymmetry = np.max(np.abs(tied.p - tied.p.T))
print(f"exercise 3: {np.mean(np.argmax(tied.p, axis=1) == np.arange(S)):.0%} prefer themselves, "
      f"the weights differ from their transpose by {asymmetry:.2f}")  # fmt: skip
tutorial.check("exercise 3: symmetric scores", np.max(np.abs(tied.z - tied.z.T)), 0.0)
total = np.sum(np.exp(tied.z), axis=1)
ratio = np.max(np.abs(tied.p / tied.p.T * total[:, None] / total - 1))
tutorial.check("exercise 3: the ratio of the weights", ratio, 64 * EPS)

# %%
tutorial.finish(figure)
