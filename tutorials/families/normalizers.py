r"""
Normalizers side by side
========================

**The question.** A query has given every key a score. What it takes from each value is not yet
decided: it may take most from the best, something from all, nothing from the worst, or little
altogether. How many ways are there from scores to weights, and in what do they differ?

**The idea.** Give one and the same row of scores to every member of the family, and look.

You need to know softmax attention (``scores/dot_product``). Each member has a lecture of its own;
here they stand in one picture and in one table.
"""

# %%
# One formula
# -----------
# Queries, keys and scores :math:`z_{ts} = c\, q_t \cdot k_s` stay what they are, and so does the
# last step, a weighted sum of values. What lies between is replaced:
#
# .. math::
#
#    o_t = \sum_s w_{ts}\, v_s, \qquad
#    w_{ts} = \gamma_t\; N(\tau_t\, z_t)_s\; \nu_s .
#
# In softmax attention :math:`N(z)_s = e^{z_s} / \sum_r e^{z_r}` and
# :math:`\gamma = \tau = \nu = 1`. Every member changes one or two of four places:
#
# * the **temperature** :math:`1/\tau_t`, which follows the number of keys or the query;
# * the **map** N: a projection that cuts, a sigmoid without a sum over the others, a power of what
#   is above average, a walk along the keys;
# * the **sum** of a row, :math:`\gamma_t`: a gate, a sink that takes its share, a scale of the row;
# * the **volume** :math:`\nu_s` of a value.
#
# So the weight :math:`w_{ts}` is defined for every member as *what the output takes from value s*.
# It can be read off without knowing the member: let the values be unit vectors, then the output is
# the row of weights. Two members need another reading. ``variational`` gives log-probabilities of
# classes; its weights are the posterior, what the output takes from the *log-likelihood* of a
# value. ``gaussian_adaptive`` has no queries; its row of scores is a row of amplitudes, and the
# weights are those that multiply them.

import math
import textwrap
from typing import NamedTuple

import numpy as np

import attention_ref
from attention_ref.kit.families import growth, identities
from attention_ref.kit.tutorial import BLUE, GREEN, GREY, ORANGE, RED, Tutorial, plain

tutorial = Tutorial(__file__)
EPS = np.finfo(np.float64).eps

# %%
# The members
# -----------
# A row holds the scores and, for members that know more about a key than its score, its kind: a
# word of content (0) or a function word (1). All keys have the length 6 and
# :math:`z_s = q \cdot k_s` for :math:`q = (1, 0)`, so that a member which looks only at the angle
# sees the same scores.


class Row(NamedTuple):
    """One query's scores, and what else is known of its keys."""

    z: np.ndarray  # (S,), nats, between -6 and 6
    kind: np.ndarray  # (S,), 0 or 1


class Panel(NamedTuple):
    """How one member is called, and how its weights are read."""

    key: str
    label: str
    says: str  # its parameters, for the picture
    more: callable  # (q, k, v, kind) -> the arguments beside q, k, v and scale
    read: callable = lambda out, cache: out[..., 0, :]
    cuts: bool = False  # has a threshold


LENGTH = 6.0
CLASSES = np.log(np.array([[0.9, 0.1], [0.1, 0.9]]))  # what a value of each kind says of the class


def softmax(q, k):
    """A map of plain attention, for a member that takes maps."""
    e = np.exp(q @ np.swapaxes(k, -1, -2))
    return e / np.sum(e, axis=-1, keepdims=True)


def nothing(q, k, v, kind):
    """No argument beside q, k and v."""
    return {}


SOFTMAX = Panel("scores/dot_product", "softmax", "for comparison", nothing)
PANELS = [
    Panel("normalizers/adaptive_attention_scaling", "adaptive_attention_scaling",
          "trained with 4 keys", lambda q, k, v, kind: {"n_train": 4}),
    Panel("normalizers/resolution_entropy_scale", "resolution_entropy_scale",
          "trained with 4 keys", lambda q, k, v, kind: {"p": softmax(q, k), "trained": 4}),
    Panel("normalizers/selective_temperature", "selective_temperature",
          "tau 1.9; function\nwords at 1/4",
          lambda q, k, v, kind: {"f_q": np.array([-0.5]), "alpha": np.zeros(1),
                                 "f_v": np.where(kind == 1, math.atanh(-0.75), 0.0)}),
    Panel("normalizers/entmax", "entmax", "alpha 1.5",
          lambda q, k, v, kind: {"alpha": 1.5}, cuts=True),
    Panel("normalizers/adaptive_sparse_monotonic", "adaptive sparse",
          "a = -1: alpha 1.27", lambda q, k, v, kind: {"a": np.array([-1.0])}, cuts=True),
    Panel("normalizers/sparsemax", "sparsemax", "", nothing, cuts=True),
    Panel("normalizers/softplus_reweighted", "softplus_reweighted", "power 3",
          lambda q, k, v, kind: {"scale": LENGTH / math.log(k.shape[-2])}, cuts=True),
    Panel("normalizers/adaptive_sparse_monotonic", "adaptive monotonic",
          "r = -2.4, from the left", lambda q, k, v, kind: {"r": np.array([-2.4])}),
    Panel("normalizers/sigmoid", "sigmoid", "b = -ln 14",
          lambda q, k, v, kind: {"b": -math.log(14)}),
    Panel("normalizers/sink", "sink", "logit b = 3",
          lambda q, k, v, kind: {"b": 3.0}),
    Panel("normalizers/gated", "gated", "gate 0.6 on the output",
          lambda q, k, v, kind: {"x": np.ones((1, 1)), "w_g": np.array([[math.log(1.5)]])}),
    Panel("normalizers/affine_scaled", "affine_scaled", "scale 1, mean 0.7",
          lambda q, k, v, kind: {"x": np.ones((1, 1)), "w_a": np.array([6.0]), "alpha_ma": 0.7}),
    Panel("normalizers/variational", "variational", "posterior of the class\nof function words",
          lambda q, k, v, kind: {"w": CLASSES[kind[: v.shape[-1]]]},
          lambda out, cache: cache.posterior[..., 0, 1, :]),
    Panel("normalizers/gaussian_adaptive", "gaussian_adaptive",
          "bumps 1.5 deviations\noff the mean",
          lambda q, k, v, kind: {"x": (k @ np.swapaxes(q, -1, -2))[:, 0],
                                 "delta": np.array([[-2.7, 2.7]]), "c": np.array([[0.5, 0.5]])},
          lambda out, cache: cache.weights[..., 0, :]),
]  # fmt: skip

REASONS = {
    "normalizers/outlier_rescaling": "normalises the channels of a token, not a row of scores",
}

# %%
# The next line is why nothing can be missing: every row of the library is in one of the two.

members = attention_ref.keys(family="normalizers")
drawn = {panel.key for panel in PANELS}
lacking = sorted(set(members) ^ (drawn | set(REASONS)))
assert not lacking, f"neither a panel nor a reason, or too much: {lacking}"
print(f"{len(members)} members, {len(PANELS)} panels; without a panel:")
for key, reason in REASONS.items():
    print(f"  {key}: {reason}")

# %%
# A call takes queries, keys and values, and hands over what the member has arguments for.

OWN_INPUT = {
    "normalizers/resolution_entropy_scale": "p", "normalizers/gaussian_adaptive": "x",
}  # fmt: skip


def arguments(panel, q, k, v, kind):
    """The whole call of a member."""
    more = panel.more(q, k, v, kind)
    return more if panel.key in OWN_INPUT else {"q": q, "k": k, "v": v, "scale": 1.0} | more


def weights(panel, row):
    """What the output takes from each value of a row: values are unit vectors."""
    height = np.sqrt(LENGTH**2 - row.z**2)
    q, k, v = np.array([[1.0, 0.0]]), np.stack([row.z, height], axis=1), np.eye(len(row.z))
    if panel.label.startswith("adaptive "):  # wants an axis of heads
        q, k, v = q[None], k[None], v[None]
    spec = attention_ref.get(panel.key)
    return np.ravel(panel.read(*spec.call(arguments(panel, q, k, v, row.kind))))


# %%
# The common row
# --------------
# Fourteen keys from clearly best to clearly worst; the third and the fourth are tied. Every third
# key is a function word.

row = Row(
    np.array([2.4, 2.1, 1.9, 1.9, 1.2, 0.8, 0.3, -0.2, -0.6, -1.0, -1.5, -2.0, -2.7, -3.4]),
    np.array([0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1]),
)
shown = [(panel, weights(panel, row)) for panel in [SOFTMAX, *PANELS]]
exact = np.exp(row.z) / np.sum(np.exp(row.z))
tutorial.check("softmax, read off the output", np.max(np.abs(shown[0][1] - exact)), 4 * EPS)
for panel, w in shown:
    if panel.label != "adaptive monotonic":
        assert abs(w[2] - w[3]) < 8 * EPS, f"{panel.label}: the tied keys have different weights"
print("a tie gives equal weights, except along a monotonic walk, which comes to one key first")

# %%
# What is measured of each
# ------------------------
# *Properties.* The sum of the row; how many weights are exactly zero; whether one is negative;
# whether the order of the keys matters (all that is known of a key moves with it); whether adding
# a constant to all scores changes anything.
#
# *Cost.* The forward runs on the engine's tape, which sees every array of floating numbers that is
# made on the way. We count the numbers, all together and in the largest array, at several lengths
# :math:`N = T = S`, and fit the exponent: 2.0 means :math:`N^2`. Small terms pull it down a little.
#
# *Identities.* Each SPEC says as data what the member becomes for special arguments. Every one is
# run here, outputs and gradients; the error is in roundings (eps) of the largest entry.

rng = np.random.default_rng(0)


def properties(panel, row):
    """The measured properties of one panel on one row."""
    w = weights(panel, row)
    order = rng.permutation(len(row.z))
    mixed = weights(panel, Row(row.z[order], row.kind[order]))
    lifted = weights(panel, Row(row.z + 0.5, row.kind))
    return {
        "sum": plain(np.sum(w)), "zeros": int(np.sum(w == 0)), "negative": bool(np.any(w < 0)),
        "order": bool(np.max(np.abs(mixed - w[order])) > 1e-12),
        "shift": bool(np.max(np.abs(lifted - w)) > 1e-12),
    }  # fmt: skip


def cost(panel, lengths):
    """The exponents of a panel's forward; one row of N numbers where there are no queries."""
    spec, draw = attention_ref.get(panel.key), np.random.default_rng(1)

    def call(n):
        q, k, v = (draw.standard_normal((1, n, 4)) for _ in range(3))
        if panel.key == "normalizers/gaussian_adaptive":
            q, k = q[0, :1], k[0]
        return arguments(panel, q, k, v, draw.integers(2, size=n))

    return growth(spec.main, call, lengths)


lengths = (16, 32) if tutorial.quick else (32, 64, 128)
table, record = [], {}
for panel in PANELS:
    spec = attention_ref.get(panel.key)
    found, (work, largest) = properties(panel, row), cost(panel, lengths)
    entry = record.setdefault(panel.key, {
        "kind": spec.kind, "work": work, "largest": largest, "flags": sorted(spec.flags),
        "panels": {}, "reductions": identities(spec),
    })  # fmt: skip
    entry["work"], entry["largest"] = max(entry["work"], work), max(entry["largest"], largest)
    entry["panels"][panel.label] = found | {"weights": plain(list(weights(panel, row)))}
    table.append((panel, found, work, largest))
for key in REASONS:
    spec = attention_ref.get(key)

    def tokens(n):
        return {"x": np.ones((n, 4)), "g": np.ones(4)}

    work, largest = growth(spec.main, tokens, lengths)
    record[key] = {
        "kind": spec.kind, "work": work, "largest": largest, "flags": sorted(spec.flags),
        "reason": REASONS[key], "reductions": identities(spec),
    }  # fmt: skip
tutorial.record["members"] = record

# %%
# The table
# ---------
# Work and largest array are exponents of N. "order" and "shift": does it matter?

print(f"{'':27}{'kind':10}{'work':>5}{'largest':>8}{'sum':>7}{'zeros':>6}{'minus':>6}"
      f"{'order':>6}{'shift':>6}  identities")  # fmt: skip


def yes(x):
    """A word for a truth value."""
    return "yes" if x else "no"


for panel, found, work, largest in table:
    entry = record[panel.key]
    held = [x for x in entry["reductions"] if x["eps"] <= x["bound"]]
    worst = max((x["eps"] for x in entry["reductions"]), default=0.0)
    print(f"{panel.label:27}{entry['kind']:10}{work:5.1f}{largest:8.1f}{found['sum']:7.2f}"
          f"{found['zeros']:6}{yes(found['negative']):>6}{yes(found['order']):>6}"
          f"{yes(found['shift']):>6}  {len(held)} of {len(entry['reductions'])}, "
          f"{worst:.1f} eps")  # fmt: skip
for key in REASONS:
    entry = record[key]
    held = sum(x["eps"] <= x["bound"] for x in entry["reductions"])
    worst = max((x["eps"] for x in entry["reductions"]), default=0.0)
    print(f"{key.split('/')[1]:27}{entry['kind']:10}{entry['work']:5.1f}{entry['largest']:8.1f}"
          f"{'-':>7}{'-':>6}{'-':>6}{'-':>6}{'-':>6}  {held} of {len(entry['reductions'])}, "
          f"{worst:.1f} eps")  # fmt: skip

# %%
# The two without a square have no queries: ``gaussian_adaptive`` weighs one row of N numbers by
# their own sizes, ``outlier_rescaling`` each of N tokens by itself.
#
# The identities, in words: with these arguments the member on the left *is* the one on the right.

for key, entry in record.items():
    for x in entry["reductions"]:
        name = key.split("/")[1] if key.split("/")[0] == "normalizers" else key
        other = x["key"].removeprefix("normalizers/")
        line = f"{name} -> {other}: {x['says']}"
        print(textwrap.fill(f"{line} ({x['eps']:.1f} of {x['bound']:g} eps)", 98,
                            subsequent_indent="    ", break_on_hyphens=False))  # fmt: skip

# %%
# Look at the columns "sum" and "shift". Softmax reads differences of scores only, so a constant is
# lost. A member that can say "nothing here is good enough" must not lose it, and *sigmoid*, *sink*
# and the *monotonic* walk do not: their sums follow the scores. The *gate* and the *affine scale*
# have sums of their own too, but from the token, not from the scores. *Softplus* is the odd one:
# its rows sum to one, and yet a constant matters.
#
# An experiment: who has zeros, and what are they worth?
# ------------------------------------------------------
# A weight of exactly zero can be made in two ways. A **projection** (sparsemax, entmax, the sparse
# part of the speech recogniser) asks for the nearest point of the simplex; its threshold is fixed
# by the keys that stay. **Re-weighting** divides by the sum over *all* keys first and then drops
# what is below average. On the common row both look alike.
#
# Lower all keys of weight zero by half a nat. They stay at zero. Does anything else move?

tutorial.claim(
    "Exact zeros come from a threshold, under a projection or under re-weighting; the keys that a "
    "projection drops have no say in the weights of the others, those that re-weighting drops "
    "still have.",
    criterion="on each of three random rows of 14 scores (standard deviation 2) the panels with "
    "an exact zero are those of entmax, sparsemax, the adaptive sparse part and "
    "softplus_reweighted, and no others; lowering the dropped keys by half a nat moves no weight "
    "of the three projections by more than 1e-12 and one of softplus_reweighted by more than "
    "1e-3; and every identity of every member holds within its own bound for three further draws",
)

PROJECTIONS = [panel for panel in PANELS if panel.cuts and "softplus" not in panel.label]
(REWEIGHTED,) = [panel for panel in PANELS if "softplus" in panel.label]


def moved(panel, row):
    """The largest change of a weight when all dropped keys are lowered by half a nat."""
    w = weights(panel, row)
    return np.max(np.abs(weights(panel, Row(np.where(w == 0, row.z - 0.5, row.z), row.kind)) - w))


def experiment(seed):
    """One random row, and one draw of every identity."""
    rng = np.random.default_rng(seed)
    random = Row(np.clip(2 * rng.standard_normal(14), -5, 5), rng.integers(2, size=14))
    zeros = {panel.label for panel in PANELS if np.any(weights(panel, random) == 0)}
    every = [x for key in members for x in identities(attention_ref.get(key), 1 + seed)]
    return {
        "panels with an exact zero": len(zeros),
        "of them not expected, or missing": len(zeros ^ {p.label for p in PANELS if p.cuts}),
        "projections moved by dropped keys": sum(moved(p, random) > 1e-12 for p in PROJECTIONS),
        "softplus moved by dropped keys": moved(REWEIGHTED, random),
        "identities": len(every),
        "identities that hold": sum(x["eps"] <= x["bound"] for x in every),
    }  # fmt: skip


records = [experiment(seed) for seed in range(3)]
parts = [
    [r["of them not expected, or missing"] == 0 for r in records],
    [r["projections moved by dropped keys"] == 0 for r in records],
    [r["softplus moved by dropped keys"] > 1e-3 for r in records],
    [r["identities that hold"] == r["identities"] for r in records],
]
held = [all(part) for part in parts]
verdict = "reproduced" if all(held) else "partly" if any(held) else "not reproduced"
tutorial.measured(ours=records, verdict=verdict, tolerance=0.05)

# %%
# The figure
# ----------
# Bars: weights over the same fourteen keys, best score at the left. Grey outline: softmax. Orange:
# function words, for the two members that know them; red: negative weights. Under the axis: a
# cross where the weight is exactly zero. ``adaptive_sparse_monotonic`` has two panels, one for
# each of its parts.


def bars(axes, heights, colour):
    """Bars as one broken line: a picture with few objects."""
    places = np.flatnonzero(heights)
    x, y = np.repeat(places, 3).astype(float), np.zeros(3 * len(places))
    x[2::3], y[1::3] = np.nan, heights[places]
    axes.plot(x, y, color=colour, linewidth=7, solid_capstyle="butt")


figure = None
if not tutorial.quick:
    plt = tutorial.pyplot()
    figure, grid = plt.subplots(4, 4, figsize=(10, 8.6), sharex=True, sharey=True)
    places = np.arange(len(row.z))
    knows = ("selective_temperature", "variational")
    for axes, (panel, w) in zip(grid.flat, shown, strict=False):
        axes.grid(False)
        known = (row.kind == 1) & (panel.label in knows)
        for colour, chosen in ((BLUE, ~known & (w > 0)), (ORANGE, known), (RED, w < 0)):
            bars(axes, np.where(chosen, w, 0.0), colour)
        axes.stairs(exact, np.arange(len(w) + 1) - 0.5, color=GREY, linewidth=0.9)
        axes.axhline(0, color="#444444", linewidth=0.6)
        none = places[w == 0]
        axes.plot(none, np.full(len(none), -0.022), "x", color=GREEN, markersize=3.5)
        title = f"{panel.label}\nsum {np.sum(w):.2f}, {np.sum(w == 0) or 'no'} zeros"
        axes.set_title(title, fontsize=8.5, fontweight="normal")
        axes.text(0.98, 0.95, panel.says, transform=axes.transAxes, fontsize=8.5, ha="right",
                  va="top", color=GREY)  # fmt: skip
        axes.set(ylim=(-0.06, 0.62), xticks=(0, 4, 9, 13), xticklabels=(1, 5, 10, 14))
        axes.tick_params(left=axes in grid[:, 0], bottom=axes in grid[-1])
    for axes in grid[-1]:
        axes.set_xlabel("key, best score first", fontsize=9)
    for axes in grid[:, 0]:
        axes.set_ylabel("weight", fontsize=9)
    for axes in grid.flat[len(shown) :]:
        axes.axis("off")
        axes.text(0, 0.97, "no panel:\n" + "\n".join(
            f"{key.split('/')[1]}\n" + textwrap.fill(reason, 28) for key, reason in REASONS.items()
        ), transform=axes.transAxes, fontsize=8.5, va="top")  # fmt: skip

# %%
# Exercises
# ---------
# **1. Write four normalizers yourself.** Given one row of scores ``z`` (S,) return the weights of
# softmax, of a sink with logit ``b``, of the sigmoid with offset ``b``, and of sparsemax. (For the
# last: with the scores in descending order, the support holds the n best, n the largest number
# with :math:`1 + n z_{(n)} > \sum_{j \le n} z_{(j)}`, and its weights sum to one.)


def my_weights(z, b):
    """Return a dict of four rows of weights."""
    # solution: return {"softmax": None, "sink": None, "sigmoid": None, "sparsemax": None}
    e, down = np.exp(z), np.sort(z)[::-1]
    n = 1 + np.arange(len(z))
    size = np.sum(1 + n * down > np.cumsum(down))
    threshold = (np.sum(down[:size]) - 1) / size
    return {
        "softmax": e / np.sum(e),
        "sink": e / (np.exp(b) + np.sum(e)),
        "sigmoid": 1 / (1 + np.exp(-z - b)),
        "sparsemax": np.clip(z - threshold, 0, None),
    }
    # end of solution


fresh = np.random.default_rng(7).standard_normal(9)
expected = {}
for name, key, more in (
    ("softmax", "scores/dot_product", {}), ("sink", "normalizers/sink", {"b": 0.4}),
    ("sigmoid", "normalizers/sigmoid", {"b": 0.4}), ("sparsemax", "normalizers/sparsemax", {}),
):  # fmt: skip
    call = {"q": np.ones((1, 1)), "k": fresh[:, None], "v": np.eye(9), "scale": 1.0}
    expected[name] = attention_ref.get(key).forward(**call, **more)[0][0]
tutorial.exercise(1, my_weights(fresh, 0.4), expected)

# %%
# **2. A sink is a gate.** Both panels, "sink" and "gated", are softmax times a number. Write the
# number of the sink as a sigmoid. What does it read, and what does the gate of the other read? When
# can the one do what the other does?

# %%
# **Solution 2.** With :math:`Z = \sum_r e^{z_r}` the weight is
# :math:`e^{z_s}/(e^b + Z) = (e^{z_s}/Z) \cdot Z/(e^b + Z)`, and
# :math:`Z/(e^b + Z) = \sigma(\ln Z - b)`: softmax, times a gate that reads the log-sum-exp of the
# scores. It is open when something matches. The gate of ``normalizers/gated`` reads the token alone
# and does not know the scores: it can close although there is a perfect key, and it cannot tell
# whether there is one. For a single query they do the same (choose b); over queries with the same
# token and different keys only the sink can follow.

(sink,) = [panel for panel in PANELS if panel.label == "sink"]
gate = 1 / (1 + np.exp(3.0 - np.log(np.sum(np.exp(row.z)))))
error = np.max(np.abs(weights(sink, row) - gate * exact))
tutorial.check("exercise 2: the sink is a gate on softmax", error, 8 * EPS)

# %%
# **3. What the dropped keys still say.** Show from
# :math:`r_s = \max(N a_s - 1, 0)`, :math:`p_s = r_s^m / \sum r^m` with
# :math:`a_s = f_s / \sum_r f_r`, :math:`f = \ln(1 + e^z)`, that lowering a dropped key makes a
# softplus row *flatter*: the ratio of the best weight to another kept one falls. Why does nothing
# of the kind happen under sparsemax?

# %%
# **Solution 3.** Lowering a dropped key lowers the mean of f, :math:`\bar f`, and
# :math:`r_s = (f_s - \bar f) / \bar f`. The ratio of two kept ones is
# :math:`(f_i - \bar f)/(f_j - \bar f)`. For :math:`f_i > f_j` its derivative by :math:`\bar f` is
# :math:`(f_i - f_j)/(f_j - \bar f)^2 > 0`: as the mean falls, so does the ratio. Sparsemax
# subtracts :math:`\tau = (\sum_{s \in S} z_s - 1)/|S|`, a sum over the kept keys S alone; a dropped
# key enters only by whether it is below :math:`\tau`, and it stays below.

w = weights(REWEIGHTED, row)
lower = weights(REWEIGHTED, Row(np.where(w == 0, row.z - 0.5, row.z), row.kind))
print(f"exercise 3: best weight over the third, before {w[0] / w[2]:.3f}, after "
      f"{lower[0] / lower[2]:.3f}")  # fmt: skip
tutorial.check("exercise 3: the ratio does not grow", lower[0] / lower[2] - w[0] / w[2], 0)

# %%
tutorial.finish(figure)
