r"""
Attention calibration
=====================

**The question.** In trained language models a few tokens draw much of the attention of nearly all
others, although they mean nothing: the first token, but also a full stop or a line break somewhere
in the middle. Such a token is called a *sink*. The weight that lies there is missing where the
information is. Can one give it back while the model runs, without training anything?

**The idea.** Look at the map of weights, find the columns that are too heavy, take a part of their
weight, and share it out among the other keys of the same row in proportion to what they already
have. The first sink is left alone: it has a use.

You need to know softmax attention (``scores/dot_product``) and how to read a map of weights: one
row a query, one column a key, each row with sum 1.
"""

# %%
# Definition
# ----------
# Let :math:`n_j` be the number of queries that may see key :math:`j`; in a causal map with
# :math:`S` keys, :math:`S - j`. Choose :math:`\beta \in [0, 1]`, the share that a sink keeps.
#
# .. math::
#
#    c_j &= \textstyle\sum_t p_{tj} / n_j                                       &(1)\\
#    Z &= \{ j : c_j > \text{threshold} \} \text{ without its first element}    &(2)\\
#    r_t &= \textstyle\sum_{j \notin Z} p_{tj}                                  &(3)\\
#    m_t &= (1 - \beta) \textstyle\sum_{j \in Z} p_{tj}                         &(4)\\
#    p'_{tj} &= \beta\, p_{tj} \;(j \in Z), \qquad
#    p'_{tj} = p_{tj} + m_t\, p_{tj} / r_t \;(j \notin Z)                       &(5)
#
# Why divide by :math:`n_j` in (1)? A late key is seen by few queries. Its column is short, and the
# plain sum would call it light, however heavy its entries are.

import numpy as np

import attention_ref
from attention_ref.kit.tutorial import BLUE, GREEN, ORANGE, RED, Tutorial

tutorial = Tutorial(__file__)
spec = attention_ref.get("steering/attention_calibration")
EPS = np.finfo(np.float64).eps

# %%
# An example by hand
# ------------------
# Three tokens, threshold 0.4, :math:`\beta = \tfrac12`:
#
# .. math::
#
#    p = \begin{pmatrix} 1 & 0 & 0 \\ \tfrac12 & \tfrac12 & 0 \\
#        \tfrac14 & \tfrac12 & \tfrac14 \end{pmatrix}.
#
# The means (1) are :math:`\tfrac{7/4}{3} = 0.583`, :math:`\tfrac{1}{2} = 0.5` and :math:`0.25`.
# Two are above 0.4; the first stays, so :math:`Z = \{1\}`. In the last row :math:`r = \tfrac12`
# and :math:`m = \tfrac12 \cdot \tfrac12 = \tfrac14`. The sink keeps :math:`\tfrac14`; the other
# two have equal weights and get :math:`\tfrac18` each: :math:`p' = (\tfrac38, \tfrac14,
# \tfrac38)`. In the row above, key 0 is alone with the sink and gets all of :math:`m = \tfrac14`:
# :math:`(\tfrac34, \tfrac14, 0)`.

p = np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.25, 0.5, 0.25]])
out, cache = spec.edit(p, beta=0.5, threshold=0.4)
by_hand = np.array([[1.0, 0, 0], [0.75, 0.25, 0], [0.375, 0.25, 0.375]])
print("sinks", np.flatnonzero(cache.sinks).tolist())
tutorial.check("the edited map is the one above", np.max(np.abs(out - by_hand)), 2 * EPS)

# %%
# What (5) keeps
# --------------
# *The sum of each row.* Over :math:`Z` the weights lose :math:`m_t`, by (4). Over the others they
# gain :math:`m_t \sum_{j \notin Z} p_{tj} / r_t = m_t`, by (3).
#
# *The order among the others.* All of them are multiplied by the same :math:`1 + m_t / r_t`. So
# what was twice as heavy as another key stays twice as heavy, and zeros stay zero: the edit never
# lets a query see what it could not see before.
#
# *Nothing at all* when :math:`\beta = 1`, or when :math:`Z` is empty.

rng = np.random.default_rng(0)
kwargs = spec.example(rng)["plain"]
out, cache = spec.edit(**kwargs)
change = np.max(np.abs(out.sum(-1) - kwargs["p"].sum(-1)))
tutorial.check("rows keep their sums", change, 4 * EPS)
tutorial.check("zeros stay zero", np.max(np.abs(out[kwargs["p"] == 0])), 0.0)
same, _ = spec.edit(**(kwargs | {"beta": 1.0}))
tutorial.check("beta = 1 is the identity", np.max(np.abs(same - kwargs["p"])), 0.0)

# %%
# The backward
# ------------
# The authors do not train through the edit, but one may want to: to learn :math:`\beta`, or to
# measure what a head is worth. The set :math:`Z` is a choice; where no mean lies on the threshold,
# a small change of :math:`p` does not change it. So hold it fixed. With the *share* :math:`u_{tj}
# = p_{tj} / r_t` equation (5) reads :math:`p' = p + m u` outside :math:`Z` and :math:`p' = \beta
# p` inside. Let :math:`d_{tj}` be the gradient of :math:`p'_{tj}`, and read upwards:
#
# .. math::
#
#    du_{tj} &= m_t\, d_{tj} \;(j \notin Z), \qquad
#    dm_t = \textstyle\sum_{j \notin Z} d_{tj}\, u_{tj}                          &(5')\\
#    dp_{tj} &= \beta\, d_{tj} + (1 - \beta)\, dm_t \;(j \in Z)                  &(4')\\
#    dr_t &= -\tfrac1{r_t} \textstyle\sum_j du_{tj}\, u_{tj}, \qquad
#    dp_{tj} = d_{tj} + \frac{du_{tj}}{r_t} + dr_t \;(j \notin Z)                &(3')
#
# In (5') both factors of :math:`m u` move. In (4') a sink's weight has two effects: it stays, with
# :math:`\beta`, and it is what the others receive. In (3') :math:`u = p / r` by the rule for
# quotients, :math:`du/r` through the numerator and :math:`-\sum du\, p / r^2` through the
# denominator, which every key outside :math:`Z` feeds.


def backward(d, p, sinks, beta):
    """(5') to (3') for one map."""
    r = np.where(sinks, 0, p).sum(axis=1, keepdims=True)
    m = (1 - beta) * np.where(sinks, p, 0).sum(axis=1, keepdims=True)
    u, d_out = p / r, np.where(sinks, 0, d)
    du, dm = m * d_out, (d_out * u).sum(axis=1, keepdims=True)  # (5')
    inside = beta * d + (1 - beta) * dm  # (4')
    dr = -(du * u).sum(axis=1, keepdims=True) / r
    return np.where(sinks, inside, d + du / r + dr)  # (3')


d = rng.standard_normal(out.shape)
library = spec.backward(d, cache)["p"]
visible = np.tri(out.shape[-1])
for h in range(len(out)):
    ours = backward(d[h], kwargs["p"][h], cache.sinks[h], 0.4) * visible
    tutorial.check(f"map {h}: board against library", np.max(np.abs(ours - library[h])), 32 * EPS)
tutorial.gradients(spec, kwargs)

# %%
# The claim
# ---------
# The effect on a real model needs a real model, with billions of parameters. What can be checked
# here is the mechanism: plant a map of which we know what is information and what is not. Each map
# has 64 tokens and scores :math:`z_{tj} \sim N(0, 0.3^2)`, with these exceptions. The first token
# gets :math:`+2.5` from every query. So does a *late sink*, at a random place from 8 to 23. And
# each of the *late queries*, from 48 on, has two *informative* keys of its own, at random places
# from 24 to 47, with :math:`+2`. So the sink starts with :math:`e^{0.5} = 1.65` times the weight
# of an informative key, up to noise. After the edit with the default :math:`\beta = 0.4` we expect
# :math:`0.4 \cdot 1.65 = 0.66` times, less the gain of the informative keys. The threshold is the
# default, :math:`5/S = 0.078`.

N, LATE = 64, 48
tutorial.claim(
    spec.claim,
    criterion="on each of three seeds, 100 maps with the default beta and alpha: (a) Z is exactly "
    "the late sink in at least 95 % of the maps; (b) the share of late queries for which an "
    "informative key outweighs the late sink rises from below 10 % to above 90 %; (c) rows keep "
    "their sums within 1e-14. All three: reproduced; (c) and one other: partly",
)


def planted(rng, maps=100, kind="own"):
    """Maps, the late sink, and the informative keys of each query: its own, shared, or none."""
    z = 0.3 * rng.standard_normal((maps, N, N))
    sink = rng.integers(8, 24, maps)
    pair = np.argsort(rng.random((maps, N, 24)), axis=-1)[..., :2] + 24
    if kind == "shared":
        pair[:] = pair[:, :1]
    z[:, :, 0] += 2.5
    z[np.arange(maps), :, sink] += 2.5
    bonus = np.any(np.arange(N) == pair[..., None], axis=-2) * 2.0  # (maps, N, N)
    if kind == "own":
        bonus[:, :LATE] = 0
    z = np.where(np.tri(N, dtype=bool), z + bonus * (kind != "none"), -np.inf)
    p = np.exp(z - z.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True), sink, pair


def weights(p, sink, pair):
    """Of the late queries: weight of the late sink, and of the informative keys."""
    late = p[:, LATE:]
    on_sink = np.take_along_axis(
        late, np.broadcast_to(sink[:, None, None], (*late.shape[:2], 1)), 2
    )
    return on_sink[..., 0], np.take_along_axis(late, pair[:, LATE:], 2)


# %%
# The experiment
# --------------


def measure(rng, kind):
    """What the criterion asks, for one set of maps."""
    p, sink, pair = planted(rng, kind=kind)
    edited, cache = spec.edit(p)
    exact = np.all(cache.sinks[:, 0] == (np.arange(N) == sink[:, None]), axis=-1)
    record = {"Z is the late sink": np.mean(exact)}
    for name, image in (("before", p), ("after", edited)):
        on_sink, informative = weights(image, sink, pair)
        record[f"outweighs the sink, {name}"] = np.mean(informative.max(axis=-1) > on_sink)
        record[f"informative weight, {name}"] = np.mean(informative.sum(axis=-1))
    return record, np.max(np.abs(edited.sum(axis=-1) - 1))


records, held = [], []
for seed in range(3):
    record, change = measure(np.random.default_rng(seed), "own")
    records.append(record)
    before, after = (record[f"outweighs the sink, {name}"] for name in ("before", "after"))
    held.append(
        (record["Z is the late sink"] >= 0.95, before < 0.1 and after > 0.9, change < 1e-14)
    )
found, ranked, kept = np.all(held, axis=0)
verdict = "not reproduced"
if kept and (found or ranked):
    verdict = "reproduced" if found and ranked else "partly"
tutorial.measured(ours=records, verdict=verdict, tolerance=0.1)

# %%
# What it cannot tell
# -------------------
# The edit knows nothing about meaning. To it a sink is a column that is heavy *for all queries*.
# In our first version of this experiment the two informative keys were the same for every query,
# as the subject of a text may be. Then they are heavy columns too, and the edit takes weight from
# them as from the sink. That version failed its criterion; the maps above belong to the second
# one, with the thresholds of (b) as they were. Before the edit an informative key outweighs the
# sink for one late query in five, not for less than one in ten as (b) asks: hence *partly*, though
# all that the claim says about the edit itself holds. The first version again:

shared, _ = measure(np.random.default_rng(0), "shared")
for name, value in shared.items():
    print(f"shared keys, {name}: {value:.3f}")
gain = shared["informative weight, after"] / shared["informative weight, before"]
assert shared["Z is the late sink"] < 0.5 and gain < 1, "it hits the information as well"

# %%
# Not every sink is a mistake
# ---------------------------
# Let the head have a task: copy values. The value of a token is a random unit vector, that of a
# sink is zero. The right output of an *informative head* is what its map *without* the late sink
# would give. In a *resting head* no key is informative, and the right output is nothing. There the
# sink is a resting place: weight on it does no harm, and weight taken from it becomes noise. The
# same edit that helps the first head hurts the second. That is why the authors try out every head
# on held-out data and keep a list: the argument ``heads``.

BETAS = np.linspace(0, 1, 11)


def output_errors(kind):
    """Mean distance of the outputs of late queries from the right ones, for all beta."""
    rng = np.random.default_rng(5)
    p, sink, _ = planted(rng, 60, kind)
    maps = np.arange(len(p))
    v = rng.standard_normal((len(p), N, 16))
    v /= np.linalg.norm(v, axis=-1, keepdims=True)
    v[:, 0] = v[maps, sink] = 0
    right = np.zeros_like(v)
    if kind == "own":
        clean = p.copy()
        clean[maps, :, sink] = 0
        right = clean / clean.sum(axis=-1, keepdims=True) @ v
    edited = (spec.edit(p, beta=float(beta))[0] for beta in BETAS)
    return [float(np.mean(np.linalg.norm((e @ v - right)[:, LATE:], axis=-1))) for e in edited]


errors = {"informative head": output_errors("own"), "resting head": output_errors("none")}
for name, row in errors.items():
    print(f"{name}: output error {row[-1]:.4f} untouched, {row[4]:.4f} at beta = 0.4, "
          f"{row[0]:.4f} at beta = 0")  # fmt: skip
assert errors["informative head"][4] < errors["informative head"][-1], "it helps the first head"
assert errors["resting head"][4] > errors["resting head"][-1], "and hurts the second"

# %%
# The figure
# ----------
# Left: a map before and after; the late sink fades, the bright points of the late queries, at the
# bottom, gain. Third: weights against :math:`\beta`; where the lines cross, the ranking turns.
# Right: the error of the outputs of the two kinds of heads.

figure = None
if not tutorial.quick:
    plt = tutorial.pyplot()
    figure, axes = plt.subplots(1, 4, figsize=(11, 3.2), width_ratios=(1, 1, 1.1, 1.1))
    p, sink, pair = planted(np.random.default_rng(0))
    for panel, image, title in ((axes[0], p, "Before"), (axes[1], spec.edit(p)[0], "After")):
        shown = panel.imshow(image[1], vmin=0, vmax=0.2)
        panel.grid(False)
        panel.set(title=title, xlabel="key", yticks=(0, 16, 32, 48))
        panel.set_xticks([0, sink[1], 40], ["first", "sink", "inform."], fontsize=8)
        panel.tick_params(length=2)
    axes[0].set_ylabel("query")
    figure.colorbar(shown, ax=axes[:2].tolist(), label="weight p", shrink=0.8, pad=0.02)
    curves = [weights(spec.edit(p, beta=float(beta))[0], sink, pair) for beta in BETAS]
    for part, name, colour in ((0, "late sink", RED), (1, "informative key", GREEN)):
        axes[2].plot(BETAS, [np.mean(c[part]) for c in curves], color=colour, label=name)
    axes[2].set(title="Mean weight of a key", xlabel=r"$\beta$ (1: untouched)", ylim=(0, None))
    axes[2].legend(loc="upper left")
    for (name, row), colour in zip(errors.items(), (BLUE, ORANGE), strict=True):
        axes[3].plot(BETAS, row, color=colour, label=name)
    axes[3].set(title="Output error", xlabel=r"$\beta$ (1: untouched)", ylim=(0, None))
    axes[3].legend(loc="center left")

# %%
# Exercises
# ---------
# **1. Write this backward yourself.** One causal map p, (T, T); ``sinks``, (T,), is True for the
# keys in Z, which you hold fixed; ``d`` is the gradient of the edited map. Return the gradient of
# p. What is hidden stays hidden: entries above the diagonal get 0. (It becomes shorter when you
# first write (5) with :math:`s_t = \sum_{j \in Z} p_{tj}` in place of m and u.)


def my_backward(d, p, sinks, beta):
    """Return dp, shape (T, T)."""
    # solution: return None
    s, r = p @ sinks, p @ ~sinks
    pull = (1 - beta) * ((d * p) @ ~sinks) / r  # what one unit of weight on a sink would bring
    stay = d * (1 + (1 - beta) * s / r)[:, None] - (pull * s / r)[:, None]
    return np.tril(np.where(sinks, beta * d + pull[:, None], stay))
    # end of solution


fresh = np.random.default_rng(7)
scores = fresh.standard_normal((9, 9)) + 4 * np.isin(np.arange(9), (0, 3, 6))
p = np.exp(scores) * np.tri(9)
p /= p.sum(axis=1, keepdims=True)
_, cache = spec.edit(p, beta=0.3, threshold=0.2)
print("exercise 1: Z is", np.flatnonzero(cache.sinks).tolist())
d = fresh.standard_normal(p.shape)
tutorial.exercise(1, my_backward(d, p, cache.sinks.ravel(), 0.3), spec.backward(d, cache)["p"])

# %%
# **2. How far can it go?** Show from (5) that an informative key with weight :math:`x` ends at
# :math:`x (1 + (1 - \beta) s / r)`, where :math:`s` is the weight of all sinks in :math:`Z` and
# :math:`r = 1 - s`, and that at :math:`\beta = 0` this is the softmax over the keys outside
# :math:`Z`. By which factor can a key gain at most?

# %%
# **Solution 2.** By (4) :math:`m = (1 - \beta) s`; put it into (5). At :math:`\beta = 0` the factor
# is :math:`1 + s / r = 1 / r`, and :math:`x / r = e^z / \sum_{j \notin Z} e^{z_j}`, as if the sinks
# had been masked. The factor falls when :math:`\beta` grows, so :math:`1 / r = 1 / (1 - s)` is the
# most: with half of the weight on sinks nothing more than doubles.

p = planted(np.random.default_rng(4), 1)[0]
for beta in (0.0, 0.4):
    out, cache = spec.edit(p, beta=beta)
    s = np.sum(np.where(cache.sinks, p, 0), axis=-1, keepdims=True)
    factor = 1 + (1 - beta) * s / (1 - s)
    error = np.max(np.abs(out - np.where(cache.sinks, beta, factor) * p))
    tutorial.check(f"exercise 2: the factor at beta = {beta}", error, 8 * EPS)
    print(f"exercise 2: the most that a key gains is {np.max(factor):.2f} times its weight")
alone = np.where(cache.sinks, 0, p)
alone /= alone.sum(axis=-1, keepdims=True)
out, _ = spec.edit(p, beta=0.0)
tutorial.check("exercise 2: beta = 0 renormalises", np.max(np.abs(out - alone)), 8 * EPS)

# %%
# **3. A threshold on what?** To the edited map of the example add a fourth token, which gives
# itself the weight :math:`\tfrac12`; nobody else sees it. Is it a sink for the threshold 0.4?
# Should it be? What would you use instead of the mean?

# %%
# **Solution 3.** Its column holds one entry, so (1) gives :math:`\tfrac12 > 0.4`, and as key 0 is
# above the threshold too, Z is this token alone. It should not be: a sink draws weight from *nearly
# all others*, and nobody but itself has ever looked at it. The mean over :math:`n_j` entries says
# the less the smaller :math:`n_j` is, and the last keys of every text are judged by a few rows, of
# which one is their own. Leave the diagonal out of (1), and judge only keys that some number of
# other queries have seen; or ask for a share of the queries above the threshold, not for a mean.

p = np.zeros((4, 4))
p[:3, :3] = by_hand
p[3] = [0.2, 0.2, 0.1, 0.5]
_, cache = spec.edit(p, threshold=0.4)
print("exercise 3: sinks", np.flatnonzero(cache.sinks).tolist())
tutorial.check("exercise 3: Z is token 3", np.sum(cache.sinks.ravel() != (np.arange(4) == 3)), 0)
others = np.tril(p, -1).sum(axis=0) / np.maximum(np.arange(3, -1, -1), 1)
print("exercise 3: means without the diagonal", others.round(3).tolist())

# %%
tutorial.finish(figure)
