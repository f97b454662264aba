r"""
Adaptive attention scaling: a temperature that knows the length
===============================================================

A network for stereo images is trained on small images and used on large ones. A softmax over 12
thousand tokens becomes one over 50 thousand, the weights spread, and what was a choice becomes an
average. MVSFormer++ stretches the scores by :math:`\ln n / \ln \bar n`, so that the entropy of the
weights should stay where it was in training. We derive for which scores this works, and measure it.

You need to know softmax attention (``scores/dot_product``).
"""

# %%
# Definition
# ----------
# With :math:`n_t` keys at run time and :math:`\bar n` keys on average in training,
#
# .. math::
#
#    a_t    &= \ln n_t / \ln \bar n                                                  &(1)\\
#    z_{ts} &= \kappa \tanh(a_t\, c\, q_t \cdot k_s / \kappa) + b_{ts}               &(2)\\
#    p_{ts} &= e^{z_{ts}} / \textstyle\sum_{s'} e^{z_{ts'}}                          &(3)\\
#    o_t    &= \textstyle\sum_s p_{ts}\, v_s                                         &(4)
#
# The softcap :math:`\kappa` and the bias b are optional and absent from here on. In the official
# code n counts every token; the library can also count what each query sees.

import math

import numpy as np

import attention_ref
from attention_ref import nn
from attention_ref.kit.tutorial import BLUE, GREEN, GREY, ORANGE, PURPLE, Tutorial

tutorial = Tutorial(__file__)
spec = attention_ref.get("normalizers/adaptive_attention_scaling")
softmax = attention_ref.get("scores/dot_product")
EPS = np.finfo(np.float64).eps

# %%
# An example by hand
# ------------------
# One query, four keys, trained on two keys:
#
# .. math::
#
#    q = 1, \quad k = (\ln 3, 0, 0, 0)^\top, \quad v = (4, 0, 0, 0)^\top, \quad \bar n = 2 .
#
# (1) :math:`a = \ln 4 / \ln 2 = 2`. (2) The scores are :math:`(2 \ln 3, 0, 0, 0)`, their
# exponentials 9, 1, 1, 1. (3) The weights are :math:`\tfrac34` and three times
# :math:`\tfrac1{12}`. (4) The output is 3. Without the factor the first key would have had
# :math:`\tfrac36`, and the output would be 2.

q, k = np.array([[1.0]]), np.array([[math.log(3)], [0.0], [0.0], [0.0]])
v = np.array([[4.0], [0.0], [0.0], [0.0]])

a = math.log(4) / math.log(2)  # (1)
z = a * (q @ k.T)  # (2)
p = np.exp(z) / np.sum(np.exp(z))  # (3)
out = p @ v  # (4)
print("factor", a, "weights", p.round(4).tolist(), "output", out.round(12).tolist())
tutorial.check("the output is 3", abs(out[0, 0] - 3), 16 * EPS)
library, cache = spec.forward(q, k, v, n_train=2)
tutorial.check("the library says the same", np.max(np.abs(library - out)), 16 * EPS)
plain, _ = softmax.forward(q, k, v)
tutorial.check("without the factor it is 2", abs(plain[0, 0] - 2), 16 * EPS)

# %%
# The backward, line by line
# --------------------------
# **(4')** :math:`dv = p^\top do` and :math:`dp = do\, v^\top`.
#
# **(3')** :math:`dz_s = p_s (dp_s - \sum_j p_j\, dp_j)` in each row.
#
# **(2')** The factor multiplies the scores, so it multiplies their gradient:
# :math:`dq = a\, c\, dz\, k` and :math:`dk = c\, (a \odot dz)^\top q`, row t with its own
# :math:`a_t`.
#
# **(1')** Nothing: a count has no derivative. What does change is the size of the gradient: for
# long inputs :math:`a > 1` and both gradients grow with it.


def backward(dout, q, k, v, p, c, a):
    """Steps (4') to (2'); ``a`` is a number or a column."""
    dv, dp = p.T @ dout, dout @ v.T  # (4')
    dz = p * (dp - np.sum(p * dp, axis=1, keepdims=True))  # (3')
    return {"q": c * a * dz @ k, "k": c * (a * dz).T @ q, "v": dv}  # (2')


# %%
# The example backwards, for :math:`L = o`: :math:`dp = (4, 0, 0, 0)`,
# :math:`dz = (\tfrac34, -\tfrac14, -\tfrac14, -\tfrac14)`, and the factor 2 doubles it:
# :math:`dk = (\tfrac32, -\tfrac12, -\tfrac12, -\tfrac12)^\top`, :math:`dq = \tfrac32 \ln 3`.

ours = backward(np.ones((1, 1)), q, k, v, p, 1.0, a)
theirs = spec.backward(np.ones((1, 1)), cache)
board = {"q": 1.5 * math.log(3), "k": [[1.5], [-0.5], [-0.5], [-0.5]], "v": p.T}
for name, expected in board.items():
    tutorial.check(f"d{name}, by hand", np.max(np.abs(ours[name] - expected)), 32 * EPS)
    tutorial.check(f"d{name}, library", np.max(np.abs(theirs[name] - expected)), 32 * EPS)

# %%
# In general four roads must lead to the same gradient: with packed sequences, where every row
# counts the keys that it sees.

tutorial.gradients(spec, spec.example(np.random.default_rng(3))["packed"])

# %%
# For which scores does it work?
# ------------------------------
# Let the scores of a row be n independent numbers from :math:`N(0, \sigma^2)`. For large n the sum
# of their exponentials is near its mean, :math:`n\, e^{\sigma^2/2}`, and the weights prefer scores
# around :math:`\sigma^2` (completing the square in :math:`e^{z - z^2/2\sigma^2}`). The entropy is
# the log-sum-exp minus the mean score under the weights:
#
# .. math:: H = \ln n + \frac{\sigma^2}{2} - \sigma^2 = \ln n - \frac{\sigma^2}{2} .      \tag{5}
#
# This needs scores as large as :math:`\sigma^2` to be there. The largest of n is about
# :math:`\sigma \sqrt{2 \ln n}`, so (5) holds for :math:`\sigma < \sqrt{2 \ln n}`; beyond it a few
# keys have all of the weight and the entropy is a small number, whatever n.
#
# With the factor, :math:`\sigma` becomes :math:`\sigma \ln n / \ln \bar n`, and
#
# .. math::
#
#    \frac{dH}{d \ln n} = 1 \quad \text{(fixed)}, \qquad
#    \frac{dH}{d \ln n} = 1 - \frac{\sigma^2 \ln n}{(\ln \bar n)^2} \quad \text{(with factor)} .
#                                                                                       \tag{6}
#
# So the entropy is not invariant in general: near :math:`n = \bar n` its growth vanishes for
# :math:`\sigma = \sqrt{\ln \bar n}`, 2.5 for 512 keys. Scores of unit size hardly gain anything.
# We check (5) and (6) where they should hold.


def entropy(p):
    """Mean entropy of the rows, nats."""
    return float(-np.mean(np.sum(p * np.log(np.where(p > 0, p, 1.0)), axis=-1)))


def gaussian(rng, n, std, n_train, rows=64, D=64):
    """Mean entropy over n keys; queries of length 1 make every score N(0, std^2)."""
    q = rng.standard_normal((rows, D))
    q = q / np.linalg.norm(q, axis=1, keepdims=True)
    k = rng.standard_normal((n, D))
    _, cache = spec.forward(q, k, k[:, :1], n_train=n_train, scale=std)
    return entropy(cache.p)


rng, TRAINED, LONG = np.random.default_rng(9), 512, 8192
stretch = math.log(LONG) / math.log(TRAINED)
for name, n, factor in (("512 keys", TRAINED, 1.0), ("8192 keys, factor", LONG, stretch)):
    found, formula = gaussian(rng, n, 1.0, TRAINED), math.log(n) - factor**2 / 2
    tutorial.check(
        f"(5) for std 1, {name}: {found:.3f} and {formula:.3f}", abs(found - formula), 0.1
    )

# %%
# Experiment: entropy from 512 to 8192 keys
# -----------------------------------------
# The paper motivates the factor by this invariance and reports errors of depth maps, not
# entropies. So we measure the motive. The pilot that led to the criterion used other seeds.

tutorial.claim(
    "For Gaussian scores of standard deviation 2, 3 and 4 the mean entropy of the weights changes "
    "less than half as much from 512 to 8192 keys with the factor ln n / ln 512 as without it.",
    criterion="on each of three seeds, for each of the three standard deviations, |change of the "
    "mean entropy| with the factor is below half of that without (partly: for two of the three)",
)

lengths = (512, 1024) if tutorial.quick else (128, 256, 512, 1024, 2048, 4096, 8192)
curves, records, held = {}, [], []
for seed in range(3):
    rng, record, wins = np.random.default_rng(seed), {}, []
    for std in (1, 2, 3, 4):
        for n in lengths:
            for name, n_train in (("fixed", n), ("factor", TRAINED)):
                curves.setdefault((std, name), []).append(gaussian(rng, n, float(std), n_train))
        change = {}
        for name in ("fixed", "factor"):
            values = curves[std, name][-len(lengths) :]
            change[name] = values[-1] - values[lengths.index(TRAINED)]
            record[f"std {std}, {name}: change, nats"] = change[name]
        if std > 1:
            wins.append(abs(change["factor"]) < abs(change["fixed"]) / 2)
    held.append(sum(wins))
    records.append(record)
verdict = {3: "reproduced", 2: "partly"}.get(min(held), "not reproduced")
tutorial.measured(ours=records, verdict=verdict, tolerance=0.3)

# %%
# A trained head
# --------------
# Entropy is a means. Does a head that was trained on 32 keys read 8192 of them better with the
# factor? At 32 keys the factor is 1, so *one* training serves both. Each token has a random name of
# 16 numbers and a load of two; the query is the name of one token, blurred by noise, and the
# answer is its load. This part has no criterion: it is a look at what the invariance buys.


def texts(rng, batch, n, D=16):
    """Query, names, loads, answers, and the place of the token that is meant."""
    names, loads = rng.standard_normal((batch, n, D)), rng.standard_normal((batch, n, 2))
    place, row = rng.integers(n, size=batch), np.arange(batch)
    query = names[row, place] + 0.5 * rng.standard_normal((batch, D))
    return query[:, None], names, loads, loads[row, place], place


def train(seed, steps):
    """The matrices of one head, by squared error, on 32 tokens."""
    rng = np.random.default_rng(seed)
    start = {name: rng.standard_normal((16, 16)) / 4 for name in "qk"}

    def draw():
        while True:
            yield texts(rng, 64, 32)[:4]

    def loss(parameters, query, names, loads, answer):
        out, _ = softmax.forward(query @ parameters["q"], names @ parameters["k"], loads)
        return np.mean(np.square(out[:, 0] - answer))

    return nn.train(loss, start, draw(), steps=steps, rate=2e-2, progress=False)[0]


sizes = (32, 128) if tutorial.quick else (32, 128, 512, 2048, 8192)
head = {}
for seed in range(3):
    parameters = train(seed, 5 if tutorial.quick else 800)
    for n in sizes:
        query, names, loads, answer, place = texts(np.random.default_rng(seed + 50), 60, n)
        for name, n_train in (("fixed", n), ("factor", 32)):
            out, cache = spec.forward(
                query @ parameters["q"], names @ parameters["k"], loads, n_train=n_train
            )
            p = cache.p[:, 0]
            error = np.mean(np.square(out[:, 0] - answer))
            meant = np.mean(p[np.arange(60), place])
            head.setdefault((name, n), []).append((entropy(p), meant, error))
print("mean of three seeds, fixed and with the factor:")
print("keys               entropy   weight of the token         squared error")
for n in sizes:
    fixed, factor = (np.mean(head[name, n], axis=0) for name in ("fixed", "factor"))
    cells = [f"{x:8.3f} {y:6.3f}" for x, y in zip(fixed, factor, strict=True)]
    print(f"{n:5}", *(cell.rjust(22) for cell in cells))

# %%
# The entropy of the trained head stays much flatter, and the weight of the right token is a little
# higher. The squared error is *not* lower. With many keys some wrong names come near the blurred
# one, and a sharper head is more often sure of a wrong one, where an undecided head loses less by
# its average. A temperature keeps the shape of the weights; it adds no information about which key
# is right.
#
# The figure
# ----------
# Left: mean entropy of Gaussian scores over three seeds; dashed without the factor. Middle: its
# change from 512 to 8192 keys for each standard deviation, dots are seeds, and formula (5). Right:
# the trained head, mean over three seeds.

figure = None
if not tutorial.quick:
    plt = tutorial.pyplot()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.7))
    for std, colour in ((2, BLUE), (3, ORANGE), (4, GREEN)):
        for name, line in (("fixed", "--"), ("factor", "-")):
            values = np.mean(np.reshape(curves[std, name], (3, -1)), axis=0)
            label = f"std {std}" if name == "factor" else None
            left.plot(lengths, values, line, color=colour, label=label)
    left.axvline(TRAINED, color=GREY, linewidth=1)
    left.text(560, 7.6, "training", color=GREY, fontsize=9, va="top")
    left.set_xscale("log", base=2)
    left.set_xticks(lengths[::2], [str(n) for n in lengths[::2]])
    left.set(title="Gaussian scores", xlabel="keys n (dashed: no factor)",
             ylabel="mean entropy, nats", ylim=(0, 8))  # fmt: skip
    left.legend(loc="upper left", fontsize=9)
    for name, colour in (("fixed", GREY), ("factor", PURPLE)):
        found = [[r[f"std {s}, {name}: change, nats"] for r in records] for s in (1, 2, 3, 4)]
        middle.plot((1, 2, 3, 4), found, "o", color=colour, markersize=5)
        middle.plot((1, 2, 3, 4), np.mean(found, axis=1), color=colour, label=name)
    std = np.linspace(0.8, 2.6, 30)
    middle.plot(std, math.log(LONG / TRAINED) - std**2 * (stretch**2 - 1) / 2, ":", color="black",
                label="formula (5), factor")  # fmt: skip
    middle.axhline(0, color="black", linewidth=0.8)
    middle.set_xticks((1, 2, 3, 4))
    middle.set(title="Change, 512 to 8192 keys", xlabel="standard deviation of the scores",
               ylabel="nats", ylim=(-0.6, 4.2))  # fmt: skip
    middle.legend(loc="upper right", fontsize=9)
    for place, (what, colour) in enumerate(
        (("entropy", BLUE), ("weight", GREEN), ("error", ORANGE))
    ):
        for name, line in (("fixed", "--"), ("factor", "-")):
            values = [np.mean(head[name, n], axis=0)[place] for n in sizes]
            right.plot(sizes, values, line, color=colour, label=what if name == "factor" else None)
    right.set_xscale("log", base=2)
    right.set_xticks(sizes, [str(n) for n in sizes])
    right.set(title="A head trained on 32 keys", xlabel="keys n (dashed: no factor)",
              ylabel="nats, weight, squared error", ylim=(0, 3))  # fmt: skip
    right.legend(loc="upper left", fontsize=9)

# %%
# Exercises
# ---------
# **1. Write this backward yourself.** Given ``dout`` (T, E), ``q``, ``k``, ``v``, the weights ``p``
# (T, S), the scale ``c`` and a column of factors ``a`` (T, 1), return ``dq`` and ``dk``.


def my_backward(dout, q, k, v, p, c, a):
    """Return dq and dk."""
    # solution: return None, None
    out = p @ v
    slope = dout @ v.T - np.sum(dout * out, axis=1)[:, None]
    stretched = p * slope * (a * c)
    return stretched @ k, stretched.T @ q
    # end of solution


fresh = np.random.default_rng(11)
q7, k7, v7 = (fresh.standard_normal(shape) for shape in ((4, 3), (6, 3), (6, 2)))
dout = fresh.standard_normal((4, 2))
_, cache = spec.forward(q7, k7, v7, n_train=3, count="visible", causal=True, scale=0.5)
answer = dict(zip("qk", my_backward(dout, q7, k7, v7, cache.p, 0.5, cache.factor), strict=True))
expected = spec.backward(dout, cache)
tutorial.exercise(1, answer, {name: expected[name] for name in "qk"})

# %%
# **2. Another factor.** Use (5) to find the standard deviation :math:`\sigma(n)` that keeps the
# entropy at exactly :math:`H_0` for every n. How does it grow with n, and where is
# :math:`\sigma \ln n / \ln \bar n` a good replacement?

# %%
# **Solution 2.** :math:`\ln n - \sigma^2/2 = H_0` gives :math:`\sigma(n) = \sqrt{2 (\ln n - H_0)}`,
# a square root of :math:`\ln n` with an offset. Its logarithmic slope
# :math:`d \ln \sigma / d \ln n = 1/\sigma^2` equals that of the factor, :math:`1/\ln \bar n`,
# where :math:`\sigma^2 = \ln \bar n`: the same 2.5 as from (6). Then
# :math:`H_0 = \ln \bar n / 2`. Far from :math:`\bar n` the factor overshoots.

ideal = math.sqrt(2 * (math.log(LONG) - math.log(TRAINED) / 2))
used = math.sqrt(math.log(TRAINED)) * stretch
print(f"exercise 2: at {LONG} keys the ideal std is {ideal:.3f}, the factor gives {used:.3f}")
half, step = math.log(TRAINED) / 2, 1e-4
above, below = (math.log(2 * (math.log(TRAINED) + s - half)) / 2 for s in (step, -step))
slope = (above - below) / (2 * step)
tutorial.check("exercise 2: slope 1 / ln 512", abs(slope - 1 / math.log(TRAINED)), 1e-8)

# %%
# **3. One token at a time.** A causal model is run on a whole sequence at once with
# ``count="all"``, and then token by token with a cache of keys, each time with the keys there are.
# Do the outputs agree? And with ``count="visible"``?

# %%
# **Solution 3.** Not with "all": in the whole sequence every row has the temperature of the full
# length, token by token each row has that of its own. With "visible" both count the same keys. In
# the encoder of images that the paper is about, nothing is causal and the question does not arise.

q, k, v = np.random.default_rng(5).standard_normal((3, 6, 4))
steps = [spec.forward(q[t : t + 1], k[: t + 1], v[: t + 1], n_train=4)[0] for t in range(6)]
for count in ("all", "visible"):
    whole, _ = spec.forward(q, k, v, n_train=4, causal=True, count=count)
    gap = np.max(np.abs(np.concatenate(steps) - whole))
    print(f"exercise 3: {count}: largest difference {gap:.1e}")
tutorial.check("exercise 3: visible agrees", gap, 16 * EPS)

# %%
tutorial.finish(figure)
