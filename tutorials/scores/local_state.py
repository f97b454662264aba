r"""
Local state: each token chooses how far it looks
================================================

**The question.** A network that separates drums from vocals must combine frames of sound. How many?
Under a held note the neighbours all say the same, and averaging many of them removes noise; at a
drum hit the frame before is already something else. One window, however well learned, is wrong half
of the time. Can every frame choose its own?

**The idea.** Let the score fall linearly with the distance, as in ``scores/alibi``, but read the
slope off the query's own token. And hide the own key: a frame knows itself already, and in a
residual branch it is added back anyway. Hybrid Demucs, which won the Music Demixing Challenge of
2021, has such layers.

You need ``scores/dot_product`` for the softmax and its gradient.
"""

# %%
# Definition
# ----------
# Besides :math:`q_t, k_s, v_s` each query has :math:`F` logits :math:`r_{tf}`, in the model a
# linear function of the token (:math:`F = 4`):
#
# .. math::
#
#    m_t    &= \frac{1}{2\sqrt{F}} \textstyle\sum_{f=1}^{F} f\, \sigma(r_{tf})               &(1)\\
#    z_{ts} &= \kappa \tanh(c\, q_t \cdot k_s / \kappa) + b_{ts} - m_t\, |t + a - s|         &(2)\\
#    z_{ts} &\leftarrow \zeta \quad \text{where } s = t + a                                  &(3)\\
#    p_{ts} &= e^{z_{ts}} / \textstyle\sum_{s'} e^{z_{ts'}}                                  &(4)\\
#    o_t    &= \textstyle\sum_s p_{ts}\, v_s                                                 &(5)
#
# with :math:`\zeta = -100`, :math:`a = S - T` (the last query stands at the last key) and a softcap
# :math:`\kappa` and a bias :math:`b` as options. The official code subtracts :math:`F` penalties
# :math:`f\, |t-s|\, \sigma(r_{tf}) / (2\sqrt F)` one by one. They are all multiples of the same
# distance, so they add up to one slope :math:`m_t`. It lies between 0 and
#
# .. math:: \frac{1}{2\sqrt F} \sum_{f=1}^F f = \frac{(F+1)\sqrt F}{4},
#
# that is 2.5 nats a token for :math:`F = 4`.

import math

import numpy as np

import attention_ref
from attention_ref import nn
from attention_ref.kit.tutorial import BLUE, GREY, ORANGE, Tutorial

tutorial = Tutorial(__file__)
spec = attention_ref.get("scores/local_state")
EPS = np.finfo(np.float64).eps

# %%
# An example by hand
# ------------------
# One query at place 0, three keys at the places 0, 1, 2, no content (:math:`q = k = 0`). Take four
# equal rates :math:`\sigma(r) = \tfrac{\ln 2}{2.5}`, so that :math:`m = \ln 2`: every token of
# distance halves the weight. The own key has :math:`e^{-100}`, the others :math:`\tfrac12` and
# :math:`\tfrac14`, that is 2 to 1: :math:`p = (0, \tfrac23, \tfrac13)`. With
# :math:`v = (100, 3, 6)` the output is :math:`2 + 2 = 4`.

rate = math.log(2) / 2.5
small = {
    "q": np.zeros((1, 1)),
    "k": np.zeros((3, 1)),
    "v": np.array([[100.0], [3.0], [6.0]]),
    "r": np.full((1, 4), math.log(rate / (1 - rate))),
    "align": "upper_left",
}
out, cache = spec.forward(**small)
print("slope", round(cache.slope.item(), 4), "weights", cache.p.ravel().round(4).tolist())
print("output", round(out.item(), 4), "weight of the own key", f"{cache.p[0, 0]:.1e}")
tutorial.check("the slope is ln 2", abs(cache.slope.item() - math.log(2)), 4 * EPS)
tutorial.check("the output is 4", abs(out.item() - 4), 16 * EPS)

# %%
# The forward
# -----------


def local_state(q, k, v, r):
    """Steps (1) to (5) for T = S, without softcap, bias and mask."""
    F = r.shape[-1]
    rate = 1 / (1 + np.exp(-r))
    m = rate @ np.arange(1, F + 1) / (2 * math.sqrt(F))  # (1)
    place = np.arange(len(q))
    distance = np.abs(place[:, None] - place)
    z = q @ k.T / math.sqrt(q.shape[-1]) - m[:, None] * distance  # (2)
    z[distance == 0] = -100  # (3)
    e = np.exp(z - z.max(axis=1, keepdims=True))
    p = e / e.sum(axis=1, keepdims=True)  # (4)
    return p @ v, p, rate, distance  # (5)


rng = np.random.default_rng(0)
T, D, E, F = 6, 3, 2, 4
q, k, v = (rng.standard_normal((T, width)) for width in (D, D, E))
r = rng.standard_normal((T, F)) - 1
out, p, rate, distance = local_state(q, k, v, r)
library, cache = spec.forward(q, k, v, r)
tutorial.check("forward against the library", np.max(np.abs(out - library)), 8 * EPS)

# %%
# Why :math:`-100` and not :math:`-\infty`? A sequence of a single frame has no other key. With
# :math:`-\infty` its row would be :math:`0/0`; with :math:`-100` it falls back on itself.

alone, _ = spec.forward(q[:1], k[:1], v[:1], r[:1])
tutorial.check("one token attends to itself", np.max(np.abs(alone - v[:1])), 0.0)

# %%
# The backward, line by line
# --------------------------
# **(5'), (4')** As always: :math:`dv = p^\top do`, :math:`dp = do\, v^\top`,
# :math:`dz = p\,(dp - \sum_s p\, dp)`.
#
# **(3')** A score that was overwritten depends on nothing: :math:`dz_{ts} \leftarrow 0` where
# :math:`s = t + a`.
#
# **(2')** The content part is that of ``scores/dot_product``:
# :math:`dq = c\, dz\, k`, :math:`dk = c\, dz^\top q`. The slope stands in a whole row of scores,
# with the factor :math:`-|t + a - s|` in each:
#
# .. math:: dm_t = -\sum_s dz_{ts}\, |t + a - s| .
#
# A row of :math:`dz` sums to zero, so this is a *difference of distances*: the slope grows when the
# far keys should lose weight.
#
# **(1')** The sigmoid has the slope :math:`\sigma (1 - \sigma)`:
#
# .. math:: dr_{tf} = dm_t\, \frac{f}{2 \sqrt F}\, \sigma(r_{tf})\,(1 - \sigma(r_{tf})) .


def local_state_backward(dout, q, k, v, p, rate, distance):
    """Steps (5') to (1')."""
    dv, dp = p.T @ dout, dout @ v.T  # (5')
    dz = p * (dp - np.sum(p * dp, axis=1, keepdims=True))  # (4')
    dz[distance == 0] = 0  # (3')
    c = 1 / math.sqrt(q.shape[-1])
    dm = -np.sum(dz * distance, axis=1)  # (2')
    f = np.arange(1, rate.shape[-1] + 1) / (2 * math.sqrt(rate.shape[-1]))
    dr = dm[:, None] * f * rate * (1 - rate)  # (1')
    return {"q": c * dz @ k, "k": c * dz.T @ q, "v": dv, "r": dr}


dout = rng.standard_normal((T, E))
ours = local_state_backward(dout, q, k, v, p, rate, distance)
theirs = spec.backward(dout, cache)
for name in ours:
    error = np.max(np.abs(ours[name] - theirs[name]))
    tutorial.check(f"d{name} from the board against the library", error, 32 * EPS)

# %%
# *The example backwards*, :math:`L = o`: :math:`dz = p\,(v - o) = (0, -\tfrac23, \tfrac23)`, so
# :math:`dm = -(-\tfrac23 \cdot 1 + \tfrac23 \cdot 2) = -\tfrac23`. The far key has the larger
# value, and a flatter slope would let more of it in.

_, small_cache = spec.forward(**small)
gradient = spec.backward(np.ones((1, 1)), small_cache)["r"]
rate1 = small_cache.rate[0]
by_hand = -2 / 3 * np.arange(1, 5) / 4 * rate1 * (1 - rate1)
tutorial.check("dr of the example", np.max(np.abs(gradient - by_hand)), 32 * EPS)

# %%
# Four roads to the same gradient, with a mask, a bias, a softcap and a milder score for the own
# key (with :math:`-100` a forgotten (3') would hide behind a weight of :math:`10^{-43}`):

mask = rng.random((T, T)) < 0.8
options = {"mask": mask, "bias": rng.standard_normal((T, T)), "softcap": 1.3, "own": -0.4}
tutorial.gradients(spec, {"q": q, "k": k, "v": v, "r": r} | options)

# %%
# How wide is a window?
# ---------------------
# Without content the weight of distance :math:`d \ge 1` is proportional to :math:`e^{-md}` on
# either side, and the mean distance is that of a geometric series:
#
# .. math:: \bar d = \frac{\sum_{d \ge 1} d\, e^{-md}}{\sum_{d \ge 1} e^{-md}}
#           = \frac{1}{1 - e^{-m}} \approx \frac1m + \frac12 .
#
# The code starts every logit at :math:`-2`. So a fresh layer looks about four tokens far, and
# opens its window by *lowering* the logits:

n = 2001
for logit in (0.0, -2.0, -4.0, -6.0):
    flat = np.zeros((n, 1))
    m = 2.5 / (1 + math.exp(-logit))
    _, c = spec.forward(flat[:1], flat, flat, np.full((1, 4), logit))  # the query at the last key
    found, formula = np.sum(c.p * c.distance), 1 / (1 - math.exp(-m))
    print(f"logit {logit:4.0f}: slope {m:.4f}, mean distance {found:7.2f}, formula {formula:7.2f}")
    tutorial.check("mean distance, relative", abs(found / formula - 1), 0.001)

# %%
# Experiment: slow and fast signals
# ---------------------------------
# A signal whose memory changes: in a slow stretch :math:`y_t = 0.98\, y_{t-1} + \dots`, in a fast
# one :math:`y_t = 0.5\, y_{t-1} + \dots`, always with variance 1. We see :math:`x = y +` noise of
# standard deviation 0.7, and a marker that says which stretch a token belongs to. The layer has no
# content, so only its windows work, with :math:`v = x`; the prediction of :math:`y_t` is
# :math:`g\, o_t + h\, x_t` with :math:`g, h` free in each kind of stretch. Two versions are trained
# on the same signals: *one window*, :math:`r = \text{const}`, and *own windows*,
# :math:`r_t = \text{const} + w \cdot \text{marker}_t`, that is four numbers more. (The thresholds
# below were set after a pilot run on other seeds.)

tutorial.claim(
    spec.claim,
    criterion="on each of three seeds, on 256 fresh signals: the slope of the fast stretches is at "
    "least twice that of the slow ones, and the mean squared error with own windows is at least "
    "1 % below that with one window",
)

LENGTH, STEPS = 96, 3 if tutorial.quick else 300


def signals(rng, B):
    """Which tokens are fast, the clean signals and what is seen of them, each (B, LENGTH)."""
    fast = np.repeat(rng.random((B, 4)) < 0.5, LENGTH // 4, axis=1)
    rho, fresh = np.where(fast, 0.5, 0.98), rng.standard_normal((B, LENGTH))
    y = fresh.copy()
    for t in range(1, LENGTH):
        y[:, t] = rho[:, t] * y[:, t - 1] + np.sqrt(1 - rho[:, t] ** 2) * fresh[:, t]
    return fast, y, y + 0.7 * rng.standard_normal((B, LENGTH))


def predict(parameters, fast, x):
    """g o + h x; the window depends on the marker where the parameters have a w."""
    marker = fast[..., None].astype(float)
    r = parameters["r"] + 0 * marker
    if "w" in parameters:
        r = r + parameters["w"] * marker
    flat = np.zeros((*x.shape, 1))
    out, cache = spec.forward(flat, flat, x[..., None], r)
    g, h = (parameters[n][0] + parameters[n][1] * marker[..., 0] for n in "gh")
    return g * out[..., 0] + h * x, cache


def loss(parameters, fast, y, x):
    return np.mean(np.square(predict(parameters, fast, x)[0] - y))


def experiment(seed, own):
    """Train, then measure on fresh signals; the parameters for the figure."""
    rng = np.random.default_rng(seed)
    parameters = {"r": np.full(4, -2.0), "g": np.array([0.5, 0.0]), "h": np.array([0.5, 0.0])}
    if own:
        parameters["w"] = np.zeros(4)
    stream = (signals(rng, 16) for _ in range(STEPS))
    parameters, _ = nn.train(loss, parameters, stream, steps=STEPS, rate=0.1, label=f"seed {seed}")
    fast, y, x = signals(np.random.default_rng(1000 + seed), 256)
    guess, cache = predict(parameters, fast, x)
    slope, wrong = cache.slope[..., 0], (guess - y) ** 2
    return {
        "error": wrong.mean(),
        "error, fast": wrong[fast].mean(), "error, slow": wrong[~fast].mean(),
        "slope, fast": slope[fast].mean(), "slope, slow": slope[~fast].mean(),
    }, parameters  # fmt: skip


records, trained = [], []
for seed in range(3):
    one, own = experiment(seed, False), experiment(seed, True)
    trained.append((one[1], own[1]))
    records.append(
        {f"one window: {n}": x for n, x in one[0].items()}
        | {f"own windows: {n}": x for n, x in own[0].items()}
        | {"error saved, %": 100 * (1 - own[0]["error"] / one[0]["error"])}
    )
held = all(
    x["own windows: slope, fast"] >= 2 * x["own windows: slope, slow"] and x["error saved, %"] >= 1
    for x in records
)
tutorial.measured(ours=records, verdict="reproduced" if held else "not reproduced", tolerance=0.05)

# %%
# The windows part clearly, and the error falls by little. The reference for "no attention at all"
# is :math:`h\, x_t` with the best factor: an error of :math:`0.49 / 1.49 = 0.329` in either
# stretch. In the fast ones even the best window saves little of that, because the neighbours know
# little; in the slow ones the one window has already saved most of it. What an own window buys
# depends on how different the stretches are.
#
# The figure
# ----------
# Left: the mean distance against the logit. Middle: the weights of two queries of the trained
# layer, seed 0, and of the layer with one window. Right: a signal and the widths chosen along it.

figure = None
if not tutorial.quick:
    plt = tutorial.pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(11.5, 3.8), width_ratios=(1, 1, 1.5))
    logits = np.linspace(-7, 3, 101)
    slopes = 2.5 / (1 + np.exp(-logits))
    axes[0].plot(logits, 1 / (1 - np.exp(-slopes)), color=BLUE)
    axes[0].plot(-2, 1 / (1 - math.exp(-2.5 / (1 + math.exp(2)))), "o", color=ORANGE)
    axes[0].annotate("the code's start", (-2, 3.9), (-1.6, 12), color=ORANGE, fontsize=9)
    axes[0].set_yscale("log")
    axes[0].set(title="Logit and window", xlabel="all four logits r",
                ylabel="mean distance, no content (tokens)")  # fmt: skip

    fast, y, x = signals(np.random.default_rng(5), 1)
    fast = np.repeat([[False, True, False, True]], LENGTH // 4, axis=1)
    offset = np.arange(-8, 9)
    one, own = trained[0]
    for parameters, marker, name, colour in (
        (own, False, "own: slow", BLUE), (own, True, "own: fast", ORANGE),
        (one, False, "one for all", GREY),
    ):  # fmt: skip
        kind = np.full((1, LENGTH), marker)
        p = predict(parameters, kind, x)[1].p[0, LENGTH // 2]
        axes[1].plot(offset, p[LENGTH // 2 + offset], "o-", color=colour, label=name)
    axes[1].set(title="Learned windows", xlabel="key minus query (tokens)", ylabel="weight p")
    axes[1].legend(loc="upper right")

    rng = np.random.default_rng(8)
    fresh, y = rng.standard_normal(LENGTH), np.zeros(LENGTH)
    for t in range(1, LENGTH):
        rho = 0.5 if fast[0, t] else 0.98
        y[t] = rho * y[t - 1] + math.sqrt(1 - rho**2) * fresh[t]
    x = y + 0.7 * rng.standard_normal(LENGTH)
    guess, cache = predict(own, fast, x[None])
    axes[2].plot(x, ".", color=GREY, label="seen")
    axes[2].plot(y, color="black", linewidth=1, label="clean")
    axes[2].plot(guess[0], color=BLUE, label="own windows")
    for start in (1, 3):
        axes[2].axvspan(start * 24 - 0.5, start * 24 + 23.5, color=ORANGE, alpha=0.12)
    for i in range(4):
        wide = 1 / (1 - math.exp(-cache.slope[0, 24 * i, 0]))
        axes[2].text(24 * i + 12, 3.3, f"{wide:.1f} tokens", ha="center", fontsize=9)
    axes[2].set(title="Slow, fast, slow, fast", xlabel="place (tokens)", ylim=(-3.6, 3.9))
    axes[2].legend(loc="lower left", ncols=3)

# %%
# Exercises
# ---------
# **1. Write this backward yourself.** Given :math:`dz` (the gradient of the scores, already zero at
# the own keys), the distances and the rates, return :math:`dr` of shape (T, F). Steps (2') and
# (1').


def my_rate_gradient(dz, distance, rate):
    """Return dr, shape (T, F)."""
    # solution: return None
    count = rate.shape[1]
    each = [
        -np.einsum("ts,ts->t", dz, distance) * (f + 1) / math.sqrt(4 * count) for f in range(count)
    ]
    return np.stack(each, axis=1) * (rate - rate**2)
    # end of solution


_, c = spec.forward(q, k, v, r)
dp = dout @ v.T
dz = np.where(distance == 0, 0, c.p * (dp - np.sum(c.p * dp, axis=1, keepdims=True)))
tutorial.exercise(1, my_rate_gradient(dz, distance, c.rate), spec.backward(dout, c)["r"])

# %%
# **2. One number would do.** The layer spends :math:`F` logits on one slope. Show that two tokens
# with the same :math:`\sum_f f\, \sigma(r_f)` have the same window. What do the :math:`F` logits
# change then, if not what the layer can express? (Compare the gradients (1') of the logits.)

# %%
# **Solution 2.** Only :math:`m_t` enters (2). What changes is learning: a step of size :math:`\eta`
# along :math:`dr` moves the slope by :math:`\eta\, dm \sum_f (f \sigma_f (1 - \sigma_f))^2 / 4F`,
# so the logit with :math:`f = F` moves most, and the range of the slope grows with :math:`F`.

a, b = np.array([0.2, 0.5]), np.array([0.6, 0.3])  # 0.2 + 2 * 0.5 = 0.6 + 2 * 0.3
same = [spec.forward(q, k, v, np.log(x / (1 - x))[None])[0] for x in (a, b)]
tutorial.check("exercise 2: the same window", np.max(np.abs(same[0] - same[1])), 8 * EPS)

# %%
# **3. The narrowest window.** For :math:`F = 4` the slope stays below 2.5. Which share of the
# weight can the two nearest neighbours get at most, without content, in the middle of a long
# sequence?
# Why must the layer use content if it wants exactly the token before?

# %%
# **Solution 3.** At :math:`m = 2.5` the neighbours share :math:`1 - e^{-2.5} = 0.918` of the
# weight: the series :math:`\sum_d e^{-md}` begins with that share. It grows with the slope, so
# rates of 1 give the most. The penalty is even in the distance, so the token before and the one
# behind get the same weight unless q and k tell them apart.

line = np.zeros((201, 1))
_, c = spec.forward(line, line, line, np.full((1, 4), 800.0))
share = c.p[100, 99] + c.p[100, 101]
tutorial.check("exercise 3: the share 1 - e^-2.5", abs(share - (1 - math.exp(-2.5))), 1e-12)

# %%
tutorial.finish(figure)
