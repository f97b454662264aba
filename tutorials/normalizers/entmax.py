r"""
Entmax attention, and how a head learns to be sparse
====================================================

**The question.** Softmax gives every key a weight, sparsemax gives most keys none. Which one is
right depends on what a head has to do: to copy one token it should look at nothing else, to
average many it should look everywhere. Can there be a dial between the two, one for each head,
and can the head turn it by gradient descent?

**The idea.** Both are answers to the same question, "which weights maximise
:math:`\langle p, z \rangle` plus an entropy", for two different entropies. The entropies of
Tsallis form a family with one parameter :math:`\alpha`, and contain both.

You need to know softmax attention (``scores/dot_product``) and sparsemax
(``normalizers/sparsemax``).
"""

# %%
# Definition
# ----------
# For the scores z of one query, over all p that are not negative and sum to 1,
#
# .. math::
#
#    p = \operatorname*{argmax}_p\ \langle p, z \rangle + H_\alpha(p), \qquad
#    H_\alpha(p) = \frac{1}{\alpha (\alpha - 1)} \textstyle\sum_s (p_s - p_s^\alpha) .
#
# For :math:`\alpha \to 1` this is Shannon's entropy, for :math:`\alpha = 2` it is
# :math:`\tfrac12 (1 - \lVert p \rVert^2)`, and the maximum is the nearest point to z.
#
# **The maximum.** With a multiplier :math:`\lambda` for the sum, the derivative of a positive
# weight vanishes: :math:`z_s + (1 - \alpha p_s^{\alpha - 1})/(\alpha(\alpha - 1)) = \lambda`. Solve
# for :math:`p_s` and call :math:`\theta = \lambda + 1/\alpha`:
# :math:`p_s^{\alpha - 1} = 1 + (\alpha - 1)(z_s - \theta)`. Where the right side is not positive,
# the weight is 0. The whole forward is
#
# .. math::
#
#    z_{ts} &= \kappa \tanh(c\, q_t \cdot k_s / \kappa) + a_{ts}                          &(1)\\
#    \textstyle\sum_s p_{ts} &= 1 \quad\text{fixes}\ \theta_t                              &(2)\\
#    p_{ts} &= [1 + (\alpha - 1)(z_{ts} - \theta_t)]_+^{1/(\alpha - 1)}                   &(3)\\
#    o_t    &= \textstyle\sum_s p_{ts}\, v_s                                              &(4)
#
# A key that lies :math:`1/(\alpha - 1)` or more below :math:`\theta` is out: 10 nats at
# :math:`\alpha = 1.1`, 1 at :math:`\alpha = 2`, never at :math:`\alpha = 1`, where (3) is
# :math:`e^{z - \theta}` and :math:`\theta` the log-sum-exp.
#
# **How is theta found?** The sum in (2) falls when theta grows, so halve an interval. The largest
# weight lies between :math:`1/n` and 1, which gives the first interval. The halving only compares
# numbers; no derivative passes through it. One Newton step after it removes the last rounding, and
# as it is plain arithmetic, a tape or a complex step that runs through it sees the derivative.

import math

import numpy as np

import attention_ref
from attention_ref import core, engine, nn
from attention_ref.kit.tutorial import BLUE, GREEN, GREY, ORANGE, RED, Tutorial

tutorial = Tutorial(__file__)
spec = attention_ref.get("normalizers/entmax")
EPS = np.finfo(np.float64).eps

# %%
# An example by hand
# ------------------
# Two queries, three keys, :math:`c = 1`, :math:`\alpha = \tfrac32`, so
# :math:`p = [1 + (z - \theta)/2]_+^2`:
#
# .. math::
#
#    q = \begin{pmatrix} 1 & 0 \\ 0 & 1 \end{pmatrix}, \quad
#    k = \begin{pmatrix} 0.4 & 1 \\ 0 & 1 \\ -3 & -1 \end{pmatrix}, \quad
#    v = \begin{pmatrix} 100 \\ 0 \\ 7 \end{pmatrix}.
#
# *First query*, scores :math:`(0.4, 0, -3)`. The first two bases differ by 0.2, and their squares
# must sum to 1: :math:`0.8^2 + 0.6^2 = 1`, so :math:`\theta = 0.8`. The third base is
# :math:`1 - 1.9 < 0`. Weights :math:`(0.64, 0.36, 0)`, output 64. *Second query*, scores
# :math:`(1, 1, -1)`: two equal bases :math:`\sqrt{1/2} = 0.707`; the third is
# :math:`0.707 - 1 < 0`. Weights :math:`(\tfrac12, \tfrac12, 0)`, output 50.

q = np.eye(2)[None]
k = np.array([[[0.4, 1.0], [0.0, 1.0], [-3.0, -1.0]]])
v = np.array([[[100.0], [0.0], [7.0]]])
alpha = np.array([1.5])


def weights(z, alpha):
    """Steps (2) and (3) by halving alone, for rows of scores and alpha > 1."""
    r = alpha - 1
    low, high = np.max(z, axis=-1, keepdims=True), np.max(z, axis=-1, keepdims=True) + 1 / r
    for _ in range(60):
        theta = (low + high) / 2
        p = np.maximum(1 + r * (z - theta), 0) ** (1 / r)
        more = np.sum(p, axis=-1, keepdims=True) > 1
        low, high = np.where(more, theta, low), np.where(more, high, theta)
    return p


p = weights(q @ np.swapaxes(k, -1, -2), 1.5)
out = p @ v  # (4)
print("weights", p.round(4).tolist())
tutorial.check("weights", np.max(np.abs(p - [[0.64, 0.36, 0], [0.5, 0.5, 0]])), 16 * EPS)
tutorial.check("outputs are 64 and 50", np.max(np.abs(out.ravel() - [64, 50])), 1024 * EPS)
library, cache = spec.forward(q, k, v, alpha, scale=1.0)
tutorial.check("the library says the same", np.max(np.abs(library - out)), 1024 * EPS)

# %%
# The backward, line by line
# --------------------------
# **(4')** :math:`dv = p^\top do`, :math:`dp = do\, v^\top`.
#
# **(3')** Write :math:`r = \alpha - 1`, :math:`u = z - \theta`, and :math:`1 + r u = p^r` on the
# support. Then
#
# .. math::
#
#    w_s := \frac{\partial p_s}{\partial u_s} = (1 + r u_s)^{1/r - 1} = p_s^{2 - \alpha},
#    \qquad
#    g_s := \frac{\partial \ln p_s}{\partial \alpha}
#      = \frac{1}{r^2} \Bigl( \frac{r u_s}{1 + r u_s} - \ln(1 + r u_s) \Bigr).
#
# **(2')** The sum stays 1: :math:`\sum_s w_s (dz_s - d\theta) + \sum_s p_s g_s\, d\alpha = 0` for
# every small change, so :math:`\theta` moves by the mean of the :math:`dz` under w and by
# :math:`\sum p g / \sum w` for each unit of :math:`\alpha`. Put this in and collect:
#
# .. math::
#
#    dz_s = w_s (dp_s - m), \qquad
#    d\alpha = \textstyle\sum_s (dp_s - m)\, p_s g_s, \qquad
#    m = \textstyle\sum_s w_s\, dp_s / \sum_s w_s .
#
# At :math:`\alpha = 1`, :math:`w = p` and m is the mean of softmax; at :math:`\alpha = 2`,
# :math:`w = 1` on the support, the plain mean of sparsemax. For :math:`r \to 0` the two terms of g
# cancel, and their series leaves :math:`g = -u^2/2`. So alpha has a gradient also at 1.
#
# **(1')** The bias gets :math:`dz`, the softcap its factor, :math:`dq = c\, dz\, k`,
# :math:`dk = c\, dz^\top q`.


def backward(dout, q, k, v, p, alpha, c):
    """Steps (4') to (1') without softcap and bias, for one head."""
    dv = np.swapaxes(p, -1, -2) @ dout  # (4')
    dp = dout @ np.swapaxes(v, -1, -2)
    r, on = alpha - 1, p > 0
    base = np.where(on, p, 1) ** r
    w = np.where(on, p / base, 0)  # (3')
    g = np.where(on, ((base - 1) / base - np.log(base)) / r**2, 0)
    m = np.sum(w * dp, axis=-1, keepdims=True) / np.sum(w, axis=-1, keepdims=True)  # (2')
    dz, dalpha = w * (dp - m), np.sum((dp - m) * p * g)
    dq, dk = c * dz @ k, c * np.swapaxes(dz, -1, -2) @ q  # (1')
    return {"q": dq, "k": dk, "v": dv, "alpha": dalpha}


# %%
# The example backwards, for :math:`L = o_1 + o_2`: :math:`dp = (100, 0, 7)` in both rows. First
# query: :math:`w = (0.8, 0.6, 0)`, :math:`m = 80/1.4 = 400/7`, :math:`dz = (240/7, -240/7, 0)`.
# Second query: equal w, :math:`m = 50`, :math:`dz = \sqrt{1/2}\,(50, -50, 0)`. In the second row
# :math:`p g` is the same for both keys and the differences :math:`\pm 50` cancel: only the first
# query has something to say about alpha,
# :math:`0.64 \cdot \tfrac{300}{7} g_1 - 0.36 \cdot \tfrac{400}{7} g_2` with
# :math:`g_1 = 4(-\tfrac14 - \ln 0.8)` and :math:`g_2 = 4(-\tfrac23 - \ln 0.6)`.

ours = backward(np.ones((1, 2, 1)), q, k, v, p, 1.5, 1.0)
theirs = spec.backward(np.ones((1, 2, 1)), cache)
half = 50 * math.sqrt(0.5)
board = {
    "v": [[1.14], [0.86], [0.0]],
    "k": [[240 / 7, half], [-240 / 7, -half], [0, 0]],
    "q": [[96 / 7, 0], [0.4 * half, 0]],
    "alpha": 0.64 * 300 / 7 * 4 * (-0.25 - math.log(0.8))
    - 0.36 * 400 / 7 * 4 * (-2 / 3 - math.log(0.6)),
}
for name, expected in board.items():
    tutorial.check(f"d{name}, by hand", np.max(np.abs(ours[name] - expected)), 2048 * EPS)
    tutorial.check(f"d{name}, library", np.max(np.abs(theirs[name] - expected)), 2048 * EPS)

# %%
# In general, with softcap, bias and mask, four roads must lead to the same gradient. The inputs
# stay away from kinks, because differences across a kink are differences of something else.

tutorial.gradients(spec, spec.example(np.random.default_rng(3))["softcap"])

# %%
# How sparse is it?
# -----------------
# Scores :math:`2 N(0, 1)`, 30 keys: the share of weights that are exactly zero.

z = 2 * np.random.default_rng(0).standard_normal((200 if tutorial.quick else 2000, 30))
grid = np.array([1.05, 1.1, 1.2, 1.3, 1.5, 1.7, 2.0])
zeros = np.array([np.mean(weights(z, a) == 0) for a in grid])
for a, share in zip(grid, zeros, strict=True):
    print(f"alpha {a:.2f}: {share:.3f} of the weights are zero")

# %%
# Experiment: do two heads learn different alphas?
# ------------------------------------------------
# A toy with two jobs. A text has 12 tokens, each of one of six classes with three random numbers
# as its load; the query names a class that exactly one token has. Head one must give the load of
# this token, head two the mean of the loads of all tokens. Queries, keys and values are learned,
# and for each head one number :math:`a` with :math:`\alpha = 1 + \sigma(a)`, from :math:`a = 0`,
# that is :math:`\alpha = 1.5` for both.

tutorial.claim(
    "A head that must copy a token learns a larger alpha than one that must average many.",
    criterion="on each of three seeds the alpha of the copying head ends above that of the "
    "averaging head by more than 0.05 (partly: on two seeds)",
)

TOKENS, CLASSES, LOAD, WIDTH = 12, 6, 3, 8


def texts(rng, n):
    """Query (n, CLASSES), tokens (n, TOKENS, CLASSES + LOAD), answers (n, 2, LOAD)."""
    wanted = rng.integers(CLASSES, size=n)
    kinds = (wanted[:, None] + rng.integers(1, CLASSES, size=(n, TOKENS))) % CLASSES  # others
    place = rng.integers(TOKENS, size=n)
    kinds[np.arange(n), place] = wanted
    load = rng.standard_normal((n, TOKENS, LOAD))
    x = np.concatenate([np.eye(CLASSES)[kinds], load], axis=2)
    answers = np.stack([load[np.arange(n), place], np.mean(load, axis=1)], axis=1)
    return np.eye(CLASSES)[wanted], x, answers


def predict(parameters, query, x):
    """Two heads; returns their outputs (n, 2, LOAD) and the cache."""
    q = query[:, None, None, :] @ parameters["q"]
    k, v = x[:, None] @ parameters["k"], x[:, None] @ parameters["v"]
    out, cache = spec.forward(q, k, v, 1.0 + core.logistic(parameters["a"]))
    return out[:, :, 0], cache


def experiment(seed, steps):
    """Train; alphas along the way (steps, 2), and the two squared errors on unseen texts."""
    rng = np.random.default_rng(seed)
    start = {
        "q": rng.standard_normal((2, CLASSES, WIDTH)) / 2,
        "k": rng.standard_normal((2, CLASSES + LOAD, WIDTH)) / 2,
        "v": rng.standard_normal((2, CLASSES + LOAD, LOAD)) / 2,
        "a": np.zeros(2),
    }
    path = []

    def draw():
        while True:
            yield texts(rng, 32)

    def loss(parameters, query, x, answers):
        out, cache = predict(parameters, query, x)
        path.append(1 + np.ravel(engine.value(cache.rate)))
        return np.mean(np.square(out - answers))

    parameters, _ = nn.train(loss, start, draw(), steps=steps, rate=2e-2, progress=False)
    query, x, answers = texts(np.random.default_rng(seed + 100), 1000)
    out, _ = predict(parameters, query, x)
    return np.array(path), np.mean(np.square(out - answers), axis=(0, 2))


records, paths = [], []
for seed in range(3):
    path, errors = experiment(seed, 3 if tutorial.quick else 400)
    paths.append(path)
    records.append({
        "alpha, copying head": path[-1, 0],
        "alpha, averaging head": path[-1, 1],
        "squared error, copying head": errors[0],
        "squared error, averaging head": errors[1],
    })  # fmt: skip
apart = sum(r["alpha, copying head"] - r["alpha, averaging head"] > 0.05 for r in records)
verdict = {3: "reproduced", 2: "partly"}.get(apart, "not reproduced")
tutorial.measured(ours=records, verdict=verdict, tolerance=0.1)

# %%
# Look at the right panel of the figure: at first *both* heads lower their alpha. The copying head
# does not know yet where to look, and a key without a weight teaches it nothing; a smaller alpha
# brings keys back into the support. Once it finds its token, after about 100 steps, it turns the
# dial the other way. The averaging head never has a reason to.
#
# The figure
# ----------
# Left: the weight of the first of two keys against the lead of its score. Middle: share of exact
# zeros against alpha. Right: alpha of both heads during the training, one line a seed.

figure = None
if not tutorial.quick:
    plt = tutorial.pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.5))
    lead = np.linspace(-4, 4, 161)
    pair = np.stack([lead, 0 * lead], axis=1)
    axes[0].plot(lead, 1 / (1 + np.exp(-lead)), color=GREY, label="1 (softmax)")
    for a, colour in ((1.5, BLUE), (2.0, GREEN), (4.0, ORANGE)):
        name = "2 (sparsemax)" if a == 2 else f"{a:g}"
        axes[0].plot(lead, weights(pair, a)[:, 0], color=colour, label=name)
    axes[0].set(title="Weight of one of two keys", xlabel="lead of its score (nats)",
                ylabel="weight")  # fmt: skip
    axes[0].legend(title="alpha", loc="upper left")
    axes[1].plot(grid, 100 * zeros, "o-", color=BLUE)
    axes[1].set(title="Exact zeros, 30 keys", xlabel="alpha", ylabel="weights that are 0 (%)")
    for i, path in enumerate(paths):
        axes[2].plot(path[:, 0], color=RED, label=None if i else "copying head")
        axes[2].plot(path[:, 1], color=BLUE, label=None if i else "averaging head")
    axes[2].set(title="Learned alpha, three seeds", xlabel="step", ylabel="alpha")
    axes[2].legend()

# %%
# Exercises
# ---------
# **1. Write this backward yourself.** Given ``dp`` and ``p``, both (T, S), and a number
# ``alpha`` above 1, return ``dz`` (T, S) and the number ``dalpha``.


def my_backward(dp, p, alpha):
    """Return dz and dalpha."""
    # solution: return None, None
    r, inside = alpha - 1, np.where(p > 0, p, 1.0)
    w = (p > 0) * inside ** (1 - r)
    off = dp - np.average(dp, axis=1, weights=w)[:, None]
    x = r * np.log(inside)  # ln(1 + r u), so r u / (1 + r u) is 1 - e^(-x)
    return w * off, np.sum(off * p * (-np.expm1(-x) - x)) / r**2
    # end of solution


fresh = np.random.default_rng(7)
given = {name: fresh.standard_normal((1, *shape))
         for name, shape in (("q", (4, 3)), ("k", (6, 3)), ("v", (6, 2)))}  # fmt: skip
dout = fresh.standard_normal((1, 4, 2))
_, cache = spec.forward(**given, alpha=np.array([1.7]), bias=np.zeros((1, 4, 6)))
right = spec.backward(dout, cache)  # the bias receives dz
answer = my_backward(dout[0] @ given["v"][0].T, cache.p[0], 1.7)
expected = {"z": right["bias"][0], "alpha": right["alpha"][0]}
tutorial.exercise(1, dict(zip(("z", "alpha"), answer, strict=True)), expected)

# %%
# **2. The ends of the family.** Show from (3) that :math:`\alpha = 2` is sparsemax with
# :math:`\tau = \theta - 1`, and that for :math:`\alpha \to 1` the weights become those of softmax.

# %%
# **Solution 2.** :math:`\alpha = 2`: (3) reads :math:`p_s = [1 + z_s - \theta]_+ = \max(z_s - \tau,
# 0)` with :math:`\tau = \theta - 1`, and as the sum is 1 in both, :math:`\tau` is the threshold.
# :math:`\alpha \to 1`: with :math:`r = \alpha - 1`, :math:`[1 + r u]_+^{1/r} \to e^u` for every
# u, so :math:`p_s \to e^{z_s - \theta}`. By (2) these sum to 1, which makes :math:`\theta` the
# log-sum-exp. (No weight is lost on the way: :math:`\theta` stays bounded, because the largest
# weight lies between :math:`1/n` and 1.)

rng = np.random.default_rng(5)
q, k, v = (rng.standard_normal(shape) for shape in ((5, 4), (7, 4), (7, 3)))
for a, key in ((1.0, "scores/dot_product"), (2.0, "normalizers/sparsemax")):
    other, _ = attention_ref.get(key).forward(q, k, v)
    mine, _ = spec.forward(q, k, v, a)
    tutorial.check(f"exercise 2: alpha = {a:g} is {key}", np.max(np.abs(mine - other)), 32 * EPS)

# %%
# **3. Temperature is not alpha.** Dividing the scores by a small temperature T makes softmax sharp
# too. Show that it never gives an exact zero, and that for two keys with a lead of 1 nat
# :math:`\alpha = 2` does. What does the temperature do to the support of entmax? (Hint: let
# :math:`\theta` be where the base of key n is just zero. When is that too large for a sum of 1?)

# %%
# **Solution 3.** :math:`e^{z_s / T}` is positive for every T. With :math:`\alpha = 2`, the scores
# 1 and 0 and :math:`\tau = 0` the weights are 1 and 0, with sum 1. In general the base of key n is
# zero at :math:`\theta = z_n / T + 1/r`, where the weights sum to
# :math:`\sum_j [r (z_j - z_n)/T]_+^{1/r}`. The sum falls with :math:`\theta`; so the true
# :math:`\theta` is smaller, and n is in use, when this sum is below 1:
#
# .. math:: T > T_n = r \Bigl( \textstyle\sum_j [z_j - z_n]_+^{1/r} \Bigr)^{r} .
#
# Every key has a temperature of its own below which it is out. A small T empties the support down
# to the best key, a large one fills it. For softmax :math:`r \to 0` and :math:`T_n \to 0`.

for temperature in (2.0, 1.0, 0.5, 0.1):
    rows = weights(z[:200] / temperature, 1.5)
    print(f"exercise 3: alpha 1.5, temperature {temperature}: {np.mean(rows > 0):.3f} in use")
    ahead = np.maximum(z[:200, None, :] - z[:200, :, None], 0)
    critical = 0.5 * np.sum(ahead**2, axis=2) ** 0.5
    wrong = np.sum((rows > 0) != (temperature > critical))
    tutorial.check("exercise 3: keys on the wrong side of T_n", wrong, 0)
tutorial.check("exercise 3: sparsemax, lead 1", weights(np.array([[1.0, 0.0]]), 2.0)[0, 1], EPS)

# %%
tutorial.finish(figure)
