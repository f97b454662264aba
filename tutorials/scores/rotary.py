r"""
Rotary positions
================

**The question.** Attention needs to know where a key stands, and what matters is how far it is
from the query, not on which page. Can a position be written into the query alone, and into the
key alone, so that their dot product sees only the difference? And what happens when a model reads
further than it was trained?

**The idea.** Take the channels in pairs, read each pair as an arrow in the plane, and turn it by
an angle proportional to the position. The angle between two arrows changes by the difference of
their turns. This is how nearly all large language models know the order of words.

You need to know rotations of the plane; ``scores/dot_product`` explains the rest of attention.
"""

# %%
# Definition
# ----------
# The first :math:`R` of the :math:`D` channels form :math:`R/2` pairs :math:`(x_1, x_2)`; here
# the channels :math:`i` and :math:`i + R/2`. Query :math:`t` has the position
# :math:`\text{pos}_t`, any real number:
#
# .. math::
#
#    a_{ti} &= \text{pos}_t\, \omega_i, \qquad \omega_i = \text{base}^{-2 i / R}, \ i < R/2  &(1)\\
#    y_1 &= \mu\, (x_1 \cos a - x_2 \sin a), \quad y_2 = \mu\, (x_2 \cos a + x_1 \sin a)     &(2)\\
#    z_{ts} &= \kappa \tanh(c\, q'_t \cdot k'_s / \kappa) + b_{ts}                           &(3)\\
#    p_{ts} &= e^{z_{ts}} / \textstyle\sum_{s'} e^{z_{ts'}}                                  &(4)\\
#    o_t &= \textstyle\sum_s p_{ts}\, v_s                                                    &(5)
#
# (2) turns queries and keys, each with its own positions, into :math:`q'` and :math:`k'`; values
# stay as they are. With base = 10000 the first pair turns once in :math:`2 \pi` positions, the
# last one once in about 54000 (for :math:`R = 128`). :math:`\mu` is 1, but for YaRN, below.
#
# **Why the difference.** Read a pair as the complex number :math:`x = x_1 + i\, x_2`. Then (2) is
# :math:`x' = x\, e^{i a}`, and the dot product of two arrows is
# :math:`\operatorname{Re}(q\, \bar k)`:
#
# .. math:: \operatorname{Re}\bigl(q e^{i a_t}\, \overline{k e^{i a_s}}\bigr)
#           = \operatorname{Re}\bigl(q \bar k\, e^{i (a_t - a_s)}\bigr)
#           = (q \cdot k) \cos(a_t - a_s) + (q_1 k_2 - q_2 k_1) \sin(a_t - a_s) .
#
# A score is a sum of :math:`R/2` waves in the distance. That is all there is to know about it.

import math

import numpy as np

import attention_ref
from attention_ref.kit.tutorial import BLUE, GREEN, GREY, ORANGE, Tutorial
from attention_ref.methods.scores.rotary import rotary_frequencies

tutorial = Tutorial(__file__)
spec = attention_ref.get("scores/rotary")
EPS = np.finfo(np.float64).eps

# %%
# An example by hand
# ------------------
# One pair, so :math:`\omega = 1`, scale 1. The query :math:`(2 \ln 3, 0)` stands at 0; two equal
# keys :math:`(1, 0)` stand at :math:`\pi/2` and :math:`\pi/3`. Turned, they are :math:`(0, 1)` and
# :math:`(\tfrac12, \tfrac{\sqrt3}2)`:
#
# .. math:: z = (0,\ \ln 3), \qquad p = (\tfrac14, \tfrac34), \qquad v = (4, 8)
#           \ \Rightarrow\ o = 1 + 6 = 7 .

LN3, ROOT3 = math.log(3), math.sqrt(3)
small = {
    "q": np.array([[2 * LN3, 0.0]]),
    "k": np.array([[1.0, 0.0], [1.0, 0.0]]),
    "v": np.array([[4.0], [8.0]]),
    "pos_q": np.zeros(1),
    "pos_k": np.array([math.pi / 2, math.pi / 3]),
    "scale": 1.0,
}
out, small_cache = spec.forward(**small)
print("keys, turned:", small_cache.k.round(4).tolist())
print("p =", small_cache.p.ravel().round(4).tolist(), "o =", out.round(4).item())
tutorial.check("weights 1/4, 3/4", np.max(np.abs(small_cache.p - [0.25, 0.75])), 4 * EPS)
tutorial.check("the output is 7", abs(out.item() - 7), 16 * EPS)

# %%
# The forward
# -----------


def angles(pos, R, base=10000.0):
    """Step (1): shape (tokens, R/2)."""
    return pos[:, None] * base ** (-2 * np.arange(R // 2) / R)


def turn(x, a):
    """Step (2) for all channels, pairs of halves, mu = 1."""
    x1, x2 = np.split(x, 2, axis=1)
    return np.hstack([x1 * np.cos(a) - x2 * np.sin(a), x2 * np.cos(a) + x1 * np.sin(a)])


def rotary(q, k, v, pos_q, pos_k):
    """Steps (1) to (5) without softcap, bias and mask."""
    a_q, a_k = angles(pos_q, q.shape[1]), angles(pos_k, k.shape[1])  # (1)
    q, k = turn(q, a_q), turn(k, a_k)  # (2)
    z = q @ k.T / math.sqrt(q.shape[1])  # (3)
    e = np.exp(z - z.max(axis=1, keepdims=True))
    p = e / e.sum(axis=1, keepdims=True)  # (4)
    return p @ v, p, q, k, a_q, a_k  # (5)


rng = np.random.default_rng(0)
T, S, D, E = 4, 6, 6, 2
q, k, v = rng.standard_normal((T, D)), rng.standard_normal((S, D)), rng.standard_normal((S, E))
pos_q, pos_k = np.arange(2.0, 6.0), np.arange(6.0)
out, p, turned_q, turned_k, a_q, a_k = rotary(q, k, v, pos_q, pos_k)
library, cache = spec.forward(q, k, v, pos_q, pos_k)
tutorial.check("forward against the library", np.max(np.abs(out - library)), 8 * EPS)
moved = rotary(q, k, v, pos_q + 100, pos_k + 100)[0]
tutorial.check("a hundred positions later", np.max(np.abs(moved - out)), 1e3 * EPS)

# %%
# The backward, line by line
# --------------------------
# From the bottom up; :math:`dx` is the gradient of :math:`x`, and :math:`do` is given.
#
# **(5'), (4'), (3')** As for every softmax attention: :math:`dv = p^\top do`,
# :math:`dp = do\, v^\top`, :math:`dz = p\,(dp - \sum_s p\, dp)`, and for the turned arrays
# :math:`dq' = c\, dz\, k'`, :math:`dk' = c\, dz^\top q'`.
#
# **(2')** For one pair (2) is a matrix, and the gradient passes through its transpose:
#
# .. math:: \begin{pmatrix} dx_1 \\ dx_2 \end{pmatrix}
#           = \begin{pmatrix} \cos a & \sin a \\ -\sin a & \cos a \end{pmatrix}
#             \begin{pmatrix} dy_1 \\ dy_2 \end{pmatrix} .
#
# That is the rotation by :math:`-a`: *the backward turns back*. For the angle we differentiate
# (2): :math:`\partial y_1 / \partial a = -x_1 \sin a - x_2 \cos a = -y_2` and
# :math:`\partial y_2 / \partial a = -x_2 \sin a + x_1 \cos a = y_1`, so
#
# .. math:: da = dy_2\, y_1 - dy_1\, y_2 ,
#
# the torque of the gradient on the arrow.
#
# **(1')** A position stands in the angles of all its pairs:
# :math:`d\,\text{pos}_t = \sum_i \omega_i\, da_{ti}`.


def rotary_backward(dout, v, p, q, k, a_q, a_k):
    """Steps (5') to (1'); q and k are the turned ones."""
    dv, dp = p.T @ dout, dout @ v.T  # (5')
    dz = p * (dp - np.sum(p * dp, axis=1, keepdims=True)) / math.sqrt(q.shape[1])  # (4')
    gradients = {"v": dv}
    omega = angles(np.ones(1), q.shape[1])
    for name, dy, y, a in (("q", dz @ k, q, a_q), ("k", dz.T @ q, k, a_k)):  # (3')
        (y1, y2), (dy1, dy2) = np.split(y, 2, axis=1), np.split(dy, 2, axis=1)
        gradients[name] = turn(dy, -a)  # (2')
        gradients[f"pos_{name}"] = np.sum(omega * (dy2 * y1 - dy1 * y2), axis=1)  # (1')
    return gradients


dout = rng.standard_normal((T, E))
ours = rotary_backward(dout, v, p, turned_q, turned_k, a_q, a_k)
theirs = spec.backward(dout, cache)
for name in ours:
    error = np.max(np.abs(ours[name] - theirs[name]))
    tutorial.check(f"d{name} from the board against the library", error, 32 * EPS)

# %%
# *The example backwards*, :math:`L = o`: :math:`dz = p\,(v - 7) = (-\tfrac34, \tfrac34)`. The score
# of a key is :math:`2 \ln 3 \cos(\text{pos})`, so
# :math:`d\,\text{pos} = -2 \ln 3\, \sin(\text{pos})\, dz
# = (\tfrac32 \ln 3,\ -\tfrac{3 \sqrt3}4 \ln 3)`:
# the second key should come nearer, the first go further away.

gradient = spec.backward(np.ones((1, 1)), small_cache)
error = np.max(np.abs(gradient["pos_k"] - [3 / 2 * LN3, -3 / 4 * ROOT3 * LN3]))
tutorial.check("dpos of the example", error, 16 * EPS)

# %%
# Four roads to the same gradient, with neighbours as pairs, YaRN and a softcap:

given = {"q": q, "k": k, "v": v, "pos_q": pos_q, "pos_k": pos_k, "interleaved": True}
yarn = {"scaling": "yarn", "s": 4.0, "L": 200.0, "base": 100.0}
tutorial.gradients(spec, given | yarn | {"softcap": 1.3})

# %%
# Beyond the length of training
# -----------------------------
# A score is a sum of waves. Those with a long wavelength have shown only a small part of
# themselves within the length :math:`L` of training, nearly straight lines there; a sum of them
# with large coefficients of opposite sign can be small on :math:`[0, L]` and enormous beyond.
# *Position interpolation* (Chen et al. 2023) therefore never leaves the interval: to read
# :math:`s L` tokens, it divides every position by :math:`s`. The model sees positions between
# those it knows. Is that safe? A sum of waves that are all slow cannot do much between two
# points that lie close. We fit random scores and look.
#
# For one query :math:`(1, 0)` in every pair, and the key :math:`(\alpha_i, \beta_i)` at position 0,
# the score at distance d is
# :math:`f(d) = \sum_i \alpha_i \cos(\omega_i d) + \beta_i \sin(\omega_i d)`,
# 128 numbers for :math:`R = 128`. We choose them by least squares so that f follows 512 random
# targets, normal and clipped to :math:`[-1, 1]`, at every fourth position below 2048.

tutorial.claim(
    spec.claim,
    criterion="R = 128, least squares on 512 points in [0, 2048), on each of three seeds: the "
    "largest |f| on [2048, 4096] is more than 100 times that on the fitted points, and the "
    "largest |f| at the half-integers of [0, 2048] is less than twice that on the fitted points",
)

R, LENGTH = 128, 2048
fitted = np.arange(0.0, LENGTH, 4)
omega = np.array(rotary_frequencies(R)[0])


def scores(key, distances, **options):
    """f at these distances, by the library: one query in many places, one key at 0."""
    query = np.tile(np.repeat([1.0, 0.0], R // 2), (len(distances), 1))
    _, cache = spec.forward(
        query, key[None], np.zeros((1, 1)), distances, np.zeros(1), scale=1.0, **options
    )
    return cache.capped[:, 0]


waves = np.hstack([np.cos(fitted[:, None] * omega), np.sin(fitted[:, None] * omega)])
keys, records, held = [], [], []
step = 8 if tutorial.quick else 1
for seed in range(3):
    targets = np.clip(np.random.default_rng(seed).standard_normal(len(fitted)), -1, 1)
    key, *_ = np.linalg.lstsq(waves, targets, rcond=None)
    keys.append(key)
    inside = np.max(np.abs(scores(key, fitted)))
    beyond = np.max(np.abs(scores(key, np.arange(LENGTH, 2.0 * LENGTH, step))))
    # The same distances up to 4096, interpolated with s = 2: half-integers up to 2048.
    halves = scores(key, np.arange(0.0, 2 * LENGTH - 6, step), scaling="linear", s=2.0)
    records.append({"fitted points": inside, "[2048, 4096], power of 10": math.log10(beyond),
                    "interpolated": np.max(np.abs(halves))})  # fmt: skip
    held.append(beyond > 100 * inside and np.max(np.abs(halves)) < 2 * inside)
tutorial.measured(
    ours=records,
    verdict="reproduced" if all(held) else "partly" if any(held) else "not reproduced",
    tolerance=0.25,
)

# %%
# How many powers of ten it is depends on the last digits: the slow waves are so alike on the
# interval that least squares can hardly tell them apart, and the coefficients grow to what
# rounding allows. A trained model need not choose such coefficients; nothing keeps it from it.
#
# Three ways to stretch
# ---------------------
# Interpolation squeezes *all* waves, also the fast ones, which have turned thousands of times
# within L and need no help; neighbours become harder to tell apart. *NTK-aware* scaling raises
# the base to :math:`\text{base} \cdot s^{R/(R-2)}`: then the fastest frequency stays, the slowest
# is divided by s exactly. *YaRN* (Peng et al. 2023) asks how often a pair turns within L: more
# than 32 times, and it stays; less than once, and it is divided by s; between, a ramp. Besides,
# it multiplies all scores by :math:`\mu^2`, :math:`\mu = 0.1 \ln s + 1`, against the softmax that
# becomes flatter over more keys. For R = 128, L = 4096, s = 4 we count:

plain = np.array(rotary_frequencies(128)[0])
stretched = {
    name: np.array(rotary_frequencies(128, scaling=name, s=4.0, L=4096)[0])
    for name in ("linear", "ntk", "yarn")
}
ratios = {name: plain / w for name, w in stretched.items()}
kept = int(np.sum(ratios["yarn"] == 1))
divided = int(np.sum(np.isclose(ratios["yarn"], 4)))
print(f"YaRN leaves {kept} frequencies as they are and divides {divided} by 4")
print(f"NTK: the first is divided by {ratios['ntk'][0]:.3f}, the last by {ratios['ntk'][-1]:.3f}")
tutorial.check("21 stay, 18 are divided", abs(kept - 21) + abs(divided - 18), 0)
tutorial.check("the last of NTK is divided by s", abs(ratios["ntk"][-1] - 4), 1e-12)

# %%
# The figure
# ----------
# Left: one fitted score; grey is the range of the fit. Note the scale, logarithmic above 1.
# Middle: the same key, interpolated by s = 2, over the same 4096 distances. Right: by how much
# the three ways divide each frequency.

figure = None
if not tutorial.quick:
    plt = tutorial.pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(11.5, 3.8))
    distances = np.arange(0.0, 2 * LENGTH, 4)
    for axis, colour, title, options in (
        (axes[0], ORANGE, "Extrapolated", {}),
        (axes[1], BLUE, "Interpolated, s = 2", {"scaling": "linear", "s": 2.0}),
    ):
        axis.axvspan(0, LENGTH, color=GREY, alpha=0.15, linewidth=0)
        axis.plot(distances, scores(keys[0], distances, **options), color=colour, linewidth=0.7)
        axis.set(title=title, xlabel="distance d (tokens)")
    axes[0].set(ylabel="score f(d) (nats)")
    axes[0].set_yscale("symlog", linthresh=1)
    power = math.ceil(records[0]["[2048, 4096], power of 10"])
    ticks = [sign * 10.0**n for n in range(2, power + 1, 4) for sign in (-1, 1)]
    axes[0].set_yticks([0, *ticks])
    axes[0].minorticks_off()
    axes[1].set(ylim=(-2, 2))

    pair = np.arange(64)
    for name, label, colour in (
        ("linear", "interpolation", BLUE), ("ntk", "NTK-aware", ORANGE), ("yarn", "YaRN", GREEN),
    ):  # fmt: skip
        axes[2].plot(pair, ratios[name], color=colour, label=label)
    axes[2].set(title="Stretching by s = 4", xlabel="pair i (fast to slow)",
                ylabel=r"$\omega_i$ divided by", ylim=(0.8, 5.4))  # fmt: skip
    axes[2].legend(loc="upper left", ncols=3, columnspacing=1, handlelength=1.3)

# %%
# Exercises
# ---------
# **1. Write this backward yourself.** Step (2) for pairs of halves, :math:`\mu = 1`: given the
# gradient dy of what was turned, x before it was turned, both (T, D), and the angles a, (T, D/2),
# return dx and da. (Complex numbers make it short.)


def my_backward(dy, x, a):
    """Return dx, shape (T, D), and da, shape (T, D/2)."""
    # solution: return None, None
    half = a.shape[1]
    back = (dy[:, :half] + 1j * dy[:, half:]) * np.exp(-1j * a)
    da = np.imag(np.conj(x[:, :half] + 1j * x[:, half:]) * back)
    return np.hstack([back.real, back.imag]), da
    # end of solution


fresh = np.random.default_rng(7)
given = {"q": (3, 6), "k": (5, 6), "v": (5, 2), "pos_q": (3,), "pos_k": (5,)}
given = {name: fresh.standard_normal(shape) for name, shape in given.items()}
_, cache = spec.forward(**given, scale=0.4)
dout = fresh.standard_normal((3, 2))
right, dz = spec.backward(dout, cache), cache.p * (dout @ given["v"].T)
dz = 0.4 * (dz - cache.p * np.sum(dz, axis=1, keepdims=True))
answer, expected = {}, {}
for name, dy in (("q", dz @ cache.k), ("k", dz.T @ cache.q)):  # cache: queries and keys turned
    dx, da = my_backward(dy, given[name], angles(given[f"pos_{name}"], 6))
    answer[name], expected[name] = dx, right[name]
    answer[f"pos_{name}"] = None if da is None else da @ angles(np.ones(1), 6)[0]
    expected[f"pos_{name}"] = right[f"pos_{name}"]
tutorial.exercise(1, answer, expected)

# %%
# **2. The other layout.** Some weights were trained with neighbours as pairs, (0, 1), (2, 3), ...
# Which permutation of the channels of q and k makes the code for halves give the same scores?

# %%
# **Solution 2.** The code for halves pairs the channels :math:`i` and :math:`i + R/2`. The old
# channels :math:`2i` and :math:`2i + 1` must therefore come to these places: first all even
# channels, then all odd ones. A dot product does not change when both sides are permuted alike, so
# it is enough to reorder the columns of the projections of q and k once, head by head. Values stay.

order = [0, 2, 4, 1, 3, 5]
_, neighbours = spec.forward(q, k, v, pos_q, pos_k, interleaved=True)
_, halves = spec.forward(q[:, order], k[:, order], v, pos_q, pos_k)
error = np.max(np.abs(neighbours.p - halves.p))
tutorial.check("exercise 2: evens, then odds", error, 8 * EPS)

# %%
# **3. A base for NTK.** Show that :math:`\text{base}' = \text{base} \cdot s^{R/(R-2)}` is the only
# base whose last frequency, :math:`i = R/2 - 1`, is the old one divided by s. What happens to the
# first one?

# %%
# **Solution 3.** The last frequency is :math:`\text{base}^{-2 (R/2 - 1)/R} =
# \text{base}^{-(R-2)/R}`, for :math:`R > 2` a falling function of the base, so there is one
# solution at most. We want :math:`\text{base}'^{-(R-2)/R} = \text{base}^{-(R-2)/R} / s`; the power
# :math:`-R/(R-2)` of both sides is :math:`\text{base}' = \text{base} \cdot s^{R/(R-2)}`. The first
# frequency is :math:`\text{base}^0 = 1` with every base.

last = R // 2 - 1
new = 10000 * 4 ** (R / (R - 2))
error = abs(new ** (-2 * last / R) * 4 / 10000 ** (-2 * last / R) - 1)
tutorial.check("exercise 3: the last frequency", error, 64 * EPS)

# %%
tutorial.finish(figure)
