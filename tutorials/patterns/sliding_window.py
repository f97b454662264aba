r"""
Sliding windows, dilation, global tokens
========================================

**The question.** In a long text most of what a word needs stands close to it. Full attention
compares it with everything all the same: 10,000 tokens make 100 million scores. If every token
looks at its neighbours only, the cost grows in step with the length. But then, how does anything
far away ever reach it?

**The idea.** Layers. What a token sees in the second layer has itself looked around in the first.
The view widens from layer to layer, like the stacked convolutions of a network for images.

You need to know softmax attention (the tutorial of ``scores/dot_product``).
"""

# %%
# Definition
# ----------
# There are :math:`T` queries and :math:`S` keys; query :math:`t` stands at the place
# :math:`\tau_t = t + S - T` among the keys, so that the last query stands at the last key. It sees
# :math:`l` tokens to the left and :math:`r` to the right, of these only every :math:`d`-th, and
# besides a few *global* tokens that see everything and are seen by all:
#
# .. math::
#
#    \mathcal{N}(t) &= \{s : -l \le s - \tau_t \le r,\ d \mid s - \tau_t\}
#        \cup \{s : s \text{ or } \tau_t \text{ is global}\}                &(1)\\
#    z_{ts} &= c\, q_t \cdot k_s                                            &(2)\\
#    z_{ts} &\leftarrow \kappa \tanh(z_{ts} / \kappa) + b_{ts}              &(3)\\
#    p_{ts} &= e^{z_{ts}} / \textstyle\sum_{s' \in \mathcal{N}(t)} e^{z_{ts'}}  &(4)\\
#    o_t    &= \textstyle\sum_{s \in \mathcal{N}(t)} p_{ts}\, v_s           &(5)
#
# (2) to (5) are softmax attention; only (1) is new. In a *causal* window of :math:`W` keys a token
# sees itself and the :math:`W - 1` before it: :math:`l = W - 1, r = 0`. Beware when you compare
# with other programs: some count the token itself into the window, some do not, and some count both
# sides together.

import math

import numpy as np

import attention_ref
from attention_ref.kit.tutorial import BLUE, GREEN, GREY, ORANGE, Tutorial

tutorial = Tutorial(__file__)
spec = attention_ref.get("patterns/sliding_window")
dense = attention_ref.get("scores/dot_product")
EPS = np.finfo(np.float64).eps

# %%
# An example by hand
# ------------------
# Three tokens, :math:`l = 1, r = 0`, so each sees itself and the one before. Let :math:`c = 1`, all
# queries 1, keys :math:`(\ln 3, 0, \ln 3)` and values :math:`(4, 8, 0)`.
#
# * The first token sees only itself: weight 1, output 4.
# * The second sees :math:`\ln 3` and 0, exponentials 3 and 1, weights :math:`\tfrac34, \tfrac14`:
#   output :math:`3 + 2 = 5`.
# * The third sees 0 and :math:`\ln 3`: weights :math:`\tfrac14, \tfrac34`, output
#   :math:`2 + 0 = 2`. The first value, 4, does not exist for it.

q, v = np.ones((3, 1)), np.array([[4.0], [8.0], [0.0]])
k = np.array([[math.log(3)], [0.0], [math.log(3)]])
out, cache = spec.forward(q, k, v, left=1, right=0)
print("weights", cache.p.round(4).tolist())
tutorial.check("the outputs are 4, 5 and 2", np.max(np.abs(out.ravel() - [4, 5, 2])), 8 * EPS)

# %%
# The forward, with a band
# ------------------------
# A table of :math:`T \times S` scores of which nearly all are thrown away is a waste. With
# :math:`T = S`, no dilation and a causal window, token :math:`t` needs the keys
# :math:`t - W + 1, \dots, t`: gather them into a row, and the table has :math:`W` columns.


def band(q, k, v, W, c):
    """Steps (1) to (5), causal, T = S: work and memory grow like T W."""
    T = len(q)
    places = np.arange(T)[:, None] + np.arange(-W + 1, 1)  # (1)
    inside, places = places >= 0, np.maximum(places, 0)
    z = c * np.einsum("td,twd->tw", q, k[places])  # (2), there is no (3)
    z = np.where(inside, z, -np.inf)
    e = np.exp(z - z.max(axis=1, keepdims=True))
    p = e / e.sum(axis=1, keepdims=True)  # (4)
    return np.einsum("tw,twe->te", p, v[places]), p, places  # (5)


rng = np.random.default_rng(0)
T, D, E, W, c = 8, 4, 3, 3, 0.7
q, k, v = rng.standard_normal((T, D)), rng.standard_normal((T, D)), rng.standard_normal((T, E))
out, p, places = band(q, k, v, W, c)
library, cache = spec.forward(q, k, v, left=W - 1, right=0, scale=c)
tutorial.check("the band against the library", np.max(np.abs(out - library)), 16 * EPS)

# %%
# The backward, line by line
# --------------------------
# **(5')** :math:`o_t = \sum_w p_{tw}\, v_{s(t,w)}`, where :math:`s(t, w)` is the place of column
# :math:`w` in row :math:`t`. So :math:`dp_{tw} = do_t \cdot v_{s(t,w)}`, and a value collects from
# all rows that hold it: :math:`dv_s = \sum_{(t,w):\, s(t,w) = s} p_{tw}\, do_t`. Gathering forwards
# is scattering backwards.
#
# **(4')** The softmax as always: :math:`dz_{tw} = p_{tw} (dp_{tw} - \sum_{w'} p_{tw'} dp_{tw'})`. A
# column outside the text has :math:`p = 0` and gets nothing.
#
# **(3')** A bias gets :math:`db = dz`; a softcap multiplies by :math:`1 - \tanh^2`.
#
# **(2')** :math:`dq_t = c \sum_w dz_{tw}\, k_{s(t,w)}` and
# :math:`dk_s = c \sum_{(t,w):\, s(t,w) = s} dz_{tw}\, q_t`.
#
# **(1')** The window is made of whole numbers. There is no gradient: nobody tells a token to look
# further away.


def band_backward(do, q, k, v, p, places, c):
    """Steps (5') to (2')."""
    dv, dk = np.zeros_like(v), np.zeros_like(k)
    np.add.at(dv, places, p[:, :, None] * do[:, None, :])  # (5')
    dp = np.einsum("te,twe->tw", do, v[places])
    dz = p * (dp - np.sum(p * dp, axis=1, keepdims=True))  # (4')
    dq = c * np.einsum("tw,twd->td", dz, k[places])  # (2')
    np.add.at(dk, places, c * dz[:, :, None] * q[:, None, :])
    return {"q": dq, "k": dk, "v": dv}


do = rng.standard_normal((T, E))
ours, theirs = band_backward(do, q, k, v, p, places, c), spec.backward(do, cache)
for name in ours:
    error = np.max(np.abs(ours[name] - theirs[name]))
    tutorial.check(f"d{name} from the board against the library", error, 32 * EPS)

# %%
# Four roads to the same gradient, with everything the method has: dilation, a global token with
# projections of its own as in Longformer, bias, softcap. The row of a global query takes all three,
# query, keys and values, from the second set (qg, kg, vg).

full = {"q": q, "k": k, "v": v, "bias": rng.standard_normal((T, T)), "softcap": 2.0}
full |= {"qg": q[::-1].copy(), "kg": k + 0.5, "vg": 2 * v, "global_tokens": np.array([2])}
tutorial.gradients(spec, full | {"left": 4, "right": 2, "dilation": 2})

# %%
# Experiment: how far does a stack of windows see?
# ------------------------------------------------
# Let token :math:`t` depend on the tokens :math:`t - R_L, \dots, t` after :math:`L` layers. One
# more layer looks at :math:`W - 1` further tokens, each of which has this reach:
#
# .. math::
#
#    R_{L+1} = R_L + (W - 1), \quad R_0 = 0
#    \qquad\Rightarrow\qquad \text{tokens seen} = L\,(W - 1) + 1 .
#
# That is an upper bound by counting. Does anything really arrive from the far end? We stack layers
# with random projections, take the gradient of the last output with respect to all inputs, and
# count the tokens where it is not exactly zero.

tutorial.claim(
    "L layers of a causal window of W keys see exactly L (W - 1) + 1 tokens.",
    criterion="T = 40 tokens, width 8, each of three seeds: for W = 2, 4, 8 and L = 1, 2, 3, 4 the "
    "gradient of the last output is nonzero at exactly the last L (W - 1) + 1 inputs, and zero bit "
    "by bit at all others",
)

LAYERS, WINDOWS, LENGTH, WIDTH = (1, 2, 3, 4), (2, 4, 8), 40, 8


def sensitivity(rng, layers, **window):
    """Size of the gradient of the last output with respect to every input token, by hand."""
    x, tape = rng.standard_normal((LENGTH, WIDTH)), []
    for _ in range(layers):
        parts = {n: rng.standard_normal((WIDTH, WIDTH)) / math.sqrt(WIDTH) for n in "qkv"}
        out, cache = spec.forward(*(x @ w for w in parts.values()), **window)
        tape.append((parts, cache))
        x = out
    dx = np.zeros_like(x)
    dx[-1] = 1.0
    for parts, cache in reversed(tape):
        gradients = spec.backward(dx, cache)
        dx = sum(gradients[n] @ w.T for n, w in parts.items())
    return np.linalg.norm(dx, axis=1)


records, exact = [], True
for seed in range(3):
    rng, record = np.random.default_rng(seed), {}
    for W in WINDOWS:
        for L in LAYERS:
            size = sensitivity(rng, L, left=W - 1, right=0)
            expected = np.arange(LENGTH) >= LENGTH - (L * (W - 1) + 1)
            exact = exact and bool(np.all((size > 0) == expected))
            record[f"W={W}, L={L}"] = int(np.count_nonzero(size))
    records.append(record)
tutorial.measured(
    ours=records, verdict="reproduced" if exact else "not reproduced", tolerance=1e-6
)

# %%
# Two shortcuts. *Dilation* makes the steps longer: with windows of 4 keys at distances 1, 4 and 16,
# three layers reach :math:`3 \cdot (1 + 4 + 16) = 63` tokens back. And a *global token* (not
# causal) is one step away from everybody: after two layers everything has reached everything.

rng = np.random.default_rng(0)
reached = sensitivity(rng, 2, left=3, right=3, global_tokens=np.array([5]))
print(f"two layers, one global token: {np.count_nonzero(reached)} of {LENGTH} tokens reach the end")
assert np.all(reached > 0)
only_windows = sensitivity(rng, 2, left=3, right=3)
print(f"two layers, windows alone: {np.count_nonzero(only_windows)} tokens")

# %%
# The figure
# ----------
# Left: three neighbourhoods, one row a query. Middle: the gradient of the last output, mean of
# 30 draws. One layer more, three tokens more, and then nothing. With more layers it becomes a bell:
# most ways through the layers lead to the middle, and only one to the far end, so a reach of
# :math:`L (W - 1) + 1` is no promise that much arrives from there. Right: the tokens seen.

figure = None
if not tutorial.quick:
    plt = tutorial.pyplot()
    figure = plt.figure(figsize=(11, 3.7))
    grid = figure.add_gridspec(1, 3, width_ratios=(1.45, 1.1, 0.9))
    small = grid[0].subgridspec(1, 3, wspace=0.08)
    x = np.zeros((16, 1))
    kinds = (
        ("window", {"left": 3, "right": 0}),
        ("dilated", {"left": 9, "right": 0, "dilation": 3}),
        ("global", {"left": 2, "right": 2, "global_tokens": np.array([4])}),
    )
    for i, (name, options) in enumerate(kinds):
        axes = figure.add_subplot(small[i])
        axes.imshow(spec.forward(x, x, x, **options)[1].p > 0, cmap="Blues", vmin=0, vmax=1.4)
        axes.set(title=name, xticks=(), yticks=(), xlabel="key")
        axes.set_ylabel("query" if i == 0 else "")
        axes.grid(False)

    axes = figure.add_subplot(grid[1])
    back = np.arange(LENGTH)[::-1]
    for L, colour in zip(LAYERS, (BLUE, GREEN, ORANGE, GREY), strict=True):
        sizes = [sensitivity(np.random.default_rng(s), L, left=3, right=0) for s in range(30)]
        size = np.mean(sizes, axis=0)
        seen = size > 0
        axes.semilogy(back[seen], size[seen], "o-", color=colour, markersize=3.5, label=f"L = {L}")
    axes.set(title="W = 4: how much arrives", xlabel="tokens back", ylabel="size of the gradient")
    axes.set_xticks(range(0, 13, 3))
    axes.set_ylim(top=6)
    axes.legend(ncols=2, loc="upper right")

    axes = figure.add_subplot(grid[2])
    for W, colour in zip(WINDOWS, (BLUE, GREEN, ORANGE), strict=True):
        axes.plot(LAYERS, [L * (W - 1) + 1 for L in LAYERS], color=colour, label=f"W = {W}")
        for record in records:
            axes.plot(LAYERS, [record[f"W={W}, L={L}"] for L in LAYERS], "o", color=colour)
    axes.set(title="Tokens seen", xlabel="layers L", ylabel="tokens", xticks=LAYERS)
    axes.legend()

# %%
# Exercises
# ---------
# **1. Write this backward yourself**, query by query, so that no table of all pairs of gradients is
# formed. The window reaches ``left`` tokens back and ``right`` ahead, without dilation and global
# tokens; :math:`T` and :math:`S` may differ. ``p`` is (T, S), 0 outside of the window.


def my_backward(dout, q, k, v, p, c, left, right):
    """Return dq, dk, dv."""
    # solution: return None, None, None
    dq, dk, dv = (np.zeros_like(x) for x in (q, k, v))
    for t in range(len(q)):
        place = t + len(k) - len(q)
        seen = slice(max(place - left, 0), max(place + right + 1, 0))
        weight, dp = p[t, seen], v[seen] @ dout[t]
        dz = c * weight * (dp - weight @ dp)
        dq[t] = dz @ k[seen]
        dk[seen] += np.outer(dz, q[t])
        dv[seen] += np.outer(weight, dout[t])
    return dq, dk, dv
    # end of solution


fresh = np.random.default_rng(7)
given = {name: fresh.standard_normal(shape)
         for name, shape in (("q", (7, 4)), ("k", (9, 4)), ("v", (9, 3)))}  # fmt: skip
up = fresh.standard_normal((7, 3))
_, cache = spec.forward(**given, left=2, right=1, scale=0.6)
mine = my_backward(up, **given, p=cache.p, c=0.6, left=2, right=1)
tutorial.exercise(1, dict(zip("qkv", mine, strict=True)), spec.backward(up, cache))

# %%
# **2. Two interleaved texts.** With :math:`d = 2` even places see even ones only. Show that this is
# an ordinary window on the even tokens, and another one on the odd tokens. How far do these reach?

# %%
# **Solution 2.** Token t sees s when :math:`s - t` is even and between :math:`-l` and :math:`r`, so
# both places are even or both are odd. Number the even tokens :math:`t = 2t'` (the odd ones
# :math:`t = 2t' + 1`): then :math:`-l/2 \le s' - t' \le r/2`, a window of :math:`\lfloor l/2
# \rfloor` and :math:`\lfloor r/2 \rfloor` tokens. The two texts never meet, in no layer of this
# kind.

out, _ = spec.forward(q, k, v, left=4, right=2, dilation=2)
for name, part in (("even", slice(0, None, 2)), ("odd", slice(1, None, 2))):
    alone, _ = spec.forward(q[part], k[part], v[part], left=2, right=1)
    error = np.max(np.abs(out[part] - alone))
    tutorial.check(f"exercise 2: the {name} tokens", error, 8 * EPS)

# %%
# **3. A causal global token.** Make the *first* token global in a causal model and look at the
# gradient of the last output after two layers. Everybody sees the first token; why does it not help
# the others to get through? What does help?

# %%
# **Solution 3.** A global token is a relay: it must see what it passes on. In a causal model the
# first token sees only itself. It reaches everybody and has nothing to tell but itself. What helps
# is a global token between: one at the place g collects everything up to g in the first layer, and
# in the second all later tokens see it. Let every so many tokens be global, or take more layers.

rng = np.random.default_rng(0)
for chosen in (0, 20):
    size = sensitivity(rng, 2, left=3, right=0, global_tokens=np.array([chosen]), causal=True)
    reached = np.flatnonzero(size)
    print(f"exercise 3: token {chosen} global, these reach the end:", reached.tolist())
    expected = [*range(chosen + 1), *range(LENGTH - 7, LENGTH)]
    tutorial.check("exercise 3: as expected", float(reached.tolist() != expected), 0)

# %%
tutorial.finish(figure)
