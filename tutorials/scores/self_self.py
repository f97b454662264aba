r"""
Self-self attention
===================

**The question.** A model such as CLIP learned to compare a whole picture with a sentence. Its
last layer knows that there is a cat; does it know *where*? One would compare every token of the
picture with the word. That fails: in the last layers queries look for keys of other places, and
what a token puts out is no longer about its own place.

**The idea.** Do not ask which key answers a query. Ask which queries are alike, which keys are
alike, which values are alike, and average the values over those. Bousselham, Petersen, Ferrari and
Kuehne (2024) call it the Grounding Everything Module (GEM). Nothing is trained: the projections
are those of the frozen model. And they say what it does: *clustering*. That can be tested on toy
tokens whose groups we know.

You need ``scores/dot_product``.
"""

# %%
# Definition
# ----------
# There are :math:`N` tokens with queries, keys and values. Each of the three in turn is called
# :math:`x`:
#
# .. math::
#
#    y_t    &= x_t / \lVert x_t \rVert                                                       &(1)\\
#    B_{ts} &= e^{\tau\, y_t \cdot y_s} / \textstyle\sum_{s'} e^{\tau\, y_t \cdot y_{s'}}    &(2)\\
#    x_t    &\leftarrow \textstyle\sum_s B_{ts}\, y_s                                        &(3)
#
# repeated :math:`I` times, then (1) and (2) once more. The three maps are averaged and mix the
# values as they came:
#
# .. math::
#
#    p   &= (B^q + B^k + B^v) / 3                                                            &(4)\\
#    o_t &= \textstyle\sum_s p_{ts}\, v_s                                                    &(5)
#
# Lengths of queries and keys do not count. What counts is the inverse temperature :math:`\tau`;
# the authors take :math:`\tau = \frac1N \sum_n \lVert X_n \rVert / \sqrt D` of the block's input
# :math:`X`, so that it follows the model.

import math

import numpy as np

import attention_ref
from attention_ref.kit.tutorial import BLUE, GREY, ORANGE, Tutorial

tutorial = Tutorial(__file__)
spec = attention_ref.get("scores/self_self")
EPS = np.finfo(np.float64).eps

# %%
# An example by hand
# ------------------
# Two tokens, only the path of the queries, no iteration: :math:`q = ((2, 0), (0, 4))`,
# :math:`v = (4, 8)`, :math:`\tau = \ln 3`. The unit vectors are the axes, the cosines 1 and 0, the
# weights :math:`\tfrac34` and :math:`\tfrac14`: the outputs are :math:`3 + 2 = 5` and
# :math:`1 + 6 = 7`. With one iteration the tokens move to :math:`(\tfrac34, \tfrac14)` and
# :math:`(\tfrac14, \tfrac34)`: their cosine is :math:`\tfrac{6}{10}` instead of 0.

small = {"q": np.diag([2.0, 4.0]), "k": np.eye(2), "v": np.array([[4.0], [8.0]]), "paths": "q"}
out, small_cache = spec.forward(**small, tau=math.log(3), iterations=0)
print("weights", small_cache.p.round(4).tolist(), "outputs", out[:, 0].round(4).tolist())
tutorial.check("the outputs are 5 and 7", np.max(np.abs(out[:, 0] - [5, 7])), 16 * EPS)
_, moved = spec.forward(**small, tau=math.log(3), iterations=1)
tutorial.check("cosine 6/10", abs(moved.steps["q"][1].gram[0, 1] - 0.6), 4 * EPS)

# %%
# The forward
# -----------


def path(x, tau, iterations):
    """(1) to (3) of one set of vectors: what the backward needs of every round."""
    rounds = []
    for turn in range(iterations + 1):
        length = np.sqrt(np.sum(x**2, axis=1, keepdims=True))
        y = x / length  # (1)
        gram = y @ y.T
        e = np.exp(tau * (gram - 1.0))
        B = e / e.sum(axis=1, keepdims=True)  # (2)
        rounds.append((y, length, gram, B))
        if turn < iterations:
            x = B @ y  # (3)
    return rounds


rng = np.random.default_rng(0)
N, D, E, ITERATIONS, TAU = 6, 4, 3, 2, 1.7
q, k, v = (1.0 + rng.standard_normal((N, width)) for width in (D, D, E))
rounds = [path(x, TAU, ITERATIONS) for x in (q, k, v)]
p = sum(r[-1][3] for r in rounds) / 3  # (4)
out = p @ v  # (5)
library, cache = spec.forward(q, k, v, tau=TAU, iterations=ITERATIONS)
tutorial.check("forward against the library", np.max(np.abs(out - library)), 16 * EPS)

# %%
# The backward, line by line
# --------------------------
# **(5')** :math:`dv = p^\top do`, :math:`dp = do\, v^\top`. **(4')** Each map gets
# :math:`dB = dp / 3`. The values also begin a path of their own; both gradients add up.
#
# **(2')** The softmax: :math:`dz = B\,(dB - \sum_s B\, dB)`. Then
# :math:`z_{ts} = \tau\, y_t \cdot y_s`. Here is the only new thing: *the same* :math:`y` stands on
# both sides, so a token collects as row and as column,
#
# .. math:: dy = \tau\, (dz + dz^\top)\, y, \qquad d\tau = \sum_{ts} dz_{ts}\; y_t \cdot y_s .
#
# **(1')** :math:`y = x / \lVert x \rVert` cannot change along itself, so that part is lost:
#
# .. math:: dx = \bigl(dy - y\, (y \cdot dy)\bigr) / \lVert x \rVert .
#
# **(3')** For the round before, :math:`dB = dx\, y^\top` and :math:`dy` begins with
# :math:`B^\top dx`; then (2') and (1') again, down to the first round.
#
# When :math:`\tau` was made from :math:`X`: :math:`dX_n = d\tau\; (X_n / \lVert X_n \rVert) /
# (N \sqrt D)`. The temperature pulls all tokens longer or shorter alike.


def path_backward(dB, rounds, tau):
    """From the gradient of the last map to that of the first x."""
    dy = 0.0
    for turn in range(len(rounds) - 1, -1, -1):
        y, length, _, B = rounds[turn]
        dz = B * (dB - np.sum(B * dB, axis=1, keepdims=True))  # (2')
        dy = dy + tau * (dz + dz.T) @ y
        dx = (dy - y * np.sum(y * dy, axis=1, keepdims=True)) / length  # (1')
        if turn:
            before = rounds[turn - 1]
            dB, dy = dx @ before[0].T, before[3].T @ dx  # (3')
    return dx


dout = rng.standard_normal((N, E))
dp = dout @ v.T  # (5')
ours = {name: path_backward(dp / 3, r, TAU) for name, r in zip("qkv", rounds, strict=True)}  # (4')
ours["v"] = ours["v"] + p.T @ dout
theirs = spec.backward(dout, cache)
for name, gradient in ours.items():
    error = np.max(np.abs(gradient - theirs[name]))
    tutorial.check(f"d{name} from the board against the library", error, 64 * EPS)

# %%
# *The example backwards*, for the loss :math:`o_0`: :math:`dz_{0} = (\tfrac34 (4 - 5),\
# \tfrac14 (8 - 5)) = (-\tfrac34, \tfrac34)`, the other row is 0. Both ways:
# :math:`dz + dz^\top = ((-\tfrac32, \tfrac34), (\tfrac34, 0))`, times :math:`\ln 3` that is
# :math:`dy`. Along itself nothing passes, and the lengths are 2 and 4:
# :math:`dq = \ln 3\, ((0, \tfrac38), (\tfrac3{16}, 0))`. To raise :math:`o_0`, the first query
# should turn to the second. (It cannot raise it beyond 6: no cosine exceeds that of a token with
# itself, so the second token gets half of the weight at most.)

gradient = spec.backward(np.array([[1.0], [0.0]]), small_cache)
error = np.max(np.abs(gradient["q"] - math.log(3) * np.array([[0, 3 / 8], [3 / 16, 0]])))
tutorial.check("dq of the example", error, 16 * EPS)

# %%
# Four roads to the same gradient, with the temperature made from the block's input:

X = 3.0 * rng.standard_normal((N, 5))
tutorial.gradients(spec, {"q": q, "k": k, "v": v, "x": X})

# %%
# Is it clustering?
# -----------------
# Three orthogonal directions in 16 dimensions, 20 noisy tokens around each. Within a group the
# mean cosine is about 0.4, between groups 0. We iterate and watch both, at four temperatures.

tutorial.claim(
    "Self-self attention clusters: at the right temperature its iterations draw tokens of one "
    "group together and leave groups apart; too warm, all collapse; too cold, nothing moves.",
    criterion="on each of three seeds after 4 iterations: at tau = 10 the mean cosine within "
    "groups has risen by 0.25 or more and that between groups is 0.2 or less; at tau = 0.1 and "
    "tau = 3 the one between groups is 0.9 or more; at tau = 40 both moved by less than 0.05",
)

GROUPS, SIZE, WIDTH, ROUNDS, TAUS = 3, 20, 16, 8, (0.1, 3.0, 10.0, 40.0)
group = np.repeat(np.arange(GROUPS), SIZE)
inside = (group[:, None] == group) & ~np.eye(GROUPS * SIZE, dtype=bool)
outside = group[:, None] != group


def tokens(seed):
    """Noisy copies of three orthogonal directions: (60, 16)."""
    rng = np.random.default_rng(seed)
    directions, _ = np.linalg.qr(rng.standard_normal((WIDTH, GROUPS)))
    noise = 0.3 * rng.standard_normal((GROUPS * SIZE, WIDTH))
    return np.repeat(directions.T, SIZE, axis=0) + noise


curves, records = np.zeros((3, len(TAUS), ROUNDS + 1, 2)), []
for seed in range(3):
    x = tokens(seed)
    for i, tau in enumerate(TAUS):
        _, cache = spec.forward(x, x, x, tau=tau, iterations=ROUNDS, paths="q")
        for turn, step in enumerate(cache.steps["q"]):
            curves[seed, i, turn] = step.gram[inside].mean(), step.gram[outside].mean()
    names = [(f"{w}, tau = {tau:g}", i, j) for i, tau in enumerate(TAUS)
             for j, w in enumerate(("within", "between"))]  # fmt: skip
    record = {"within, before": curves[seed, 0, 0, 0], "between, before": curves[seed, 0, 0, 1]}
    records.append(record | {name: curves[seed, i, 4, j] for name, i, j in names})

start, after = curves[:, :, 0], curves[:, :, 4]
parts = [
    np.all(after[:, 2, 0] - start[:, 2, 0] >= 0.25) and np.all(after[:, 2, 1] <= 0.2),
    np.all(after[:, :2, 1] >= 0.9),
    np.all(np.abs(after[:, 3] - start[:, 3]) < 0.05),
]
verdict = {3: "reproduced", 0: "not reproduced"}.get(sum(map(int, parts)), "partly")
tutorial.measured(ours=records, verdict=verdict, tolerance=0.05)

# %%
# Two numbers explain the four temperatures (exercise 3): the weight that a token keeps for itself,
# and the weight that stays within its group. At :math:`\tau = 40` a token keeps nearly everything
# and does not move. At :math:`\tau = 0.1` it spreads over all tokens evenly, and after one step all
# are their common mean. At :math:`\tau = 3` a third leaves the group at the first step: the groups
# tighten first, and merge as they do. At :math:`\tau = 10` little leaves, and most is kept: slow,
# and stable for many steps. It is mean shift, with a kernel on the sphere. The authors' default is
# one iteration.
#
# The figure
# ----------

figure = None
if not tutorial.quick:
    plt = tutorial.pyplot()
    figure, axes = plt.subplots(1, 4, figsize=(11.5, 3.5), width_ratios=(1.5, 1, 1, 1))
    styles = zip(TAUS, (GREY, ORANGE, BLUE, "black"), (":", "--", "-", "-."), strict=True)
    turns = np.arange(ROUNDS + 1)
    for i, (tau, colour, line) in enumerate(styles):
        mean = curves[:, i].mean(axis=0)
        axes[0].plot(turns, mean[:, 0], line, color=colour, label=rf"$\tau$ = {tau:g}")
        axes[0].plot(turns, mean[:, 1], line, color=colour, alpha=0.45)
    axes[0].set(title="Within (dark), between (pale)", xlabel="iteration", ylim=(-0.05, 1.45),
                ylabel="mean cosine", yticks=(0, 0.25, 0.5, 0.75, 1))  # fmt: skip
    axes[0].legend(loc="upper center", ncols=2, fontsize=9)
    x = tokens(0)
    shown = (
        (10.0, 0, "before"),
        (10.0, 4, r"$\tau$ = 10, 4 steps"),
        (3.0, 2, r"$\tau$ = 3, 2 steps"),
    )
    for panel, (tau, iterations, title) in zip(axes[1:], shown, strict=True):
        _, cache = spec.forward(x, x, x, tau=tau, iterations=iterations, paths="q")
        image = panel.imshow(cache.steps["q"][-1].gram, vmin=-0.5, vmax=1)
        panel.grid(False)
        panel.set(title=title, xlabel="token", xticks=(0, 20, 40), yticks=(0, 20, 40))
    axes[1].set_ylabel("token")
    figure.colorbar(image, ax=axes[3], label="cosine", shrink=0.8)

# %%
# Exercises
# ---------
# **1. Write this backward yourself.** For one map of the tokens ``x`` (N, D): given the gradient
# ``dz`` of the scores before the softmax, return the gradient of ``x`` and of ``tau``.


def my_backward(dz, x, tau):
    """Return dx (N, D) and dtau."""
    # solution: return None, None
    size = np.linalg.norm(x, axis=1)
    unit = x / size[:, None]
    dtau = np.einsum("ts,td,sd->", dz, unit, unit)
    pull = tau * (dz @ unit + dz.T @ unit)
    along = np.einsum("td,td->t", pull, unit)
    return (pull - along[:, None] * unit) / size[:, None], dtau
    # end of solution


fresh = np.random.default_rng(7)
q7, k7, x7 = fresh.standard_normal((3, 5, 4))
_, cache = spec.forward(q7, k7, k7, x7, iterations=0, paths="q")
whole = spec.backward(fresh.standard_normal((5, 4)), cache)
direction = x7 / np.linalg.norm(x7, axis=1, keepdims=True)
expected = {"dx": whole["q"], "dtau": np.sum(whole["x"] * direction) * math.sqrt(4)}
again = np.random.default_rng(7)
again.standard_normal((3, 5, 4))
dB = again.standard_normal((5, 4)) @ k7.T
dz = cache.p * (dB - np.sum(cache.p * dB, axis=1, keepdims=True))
answer = my_backward(dz, q7, cache.tau.item())
tutorial.exercise(1, dict(zip(("dx", "dtau"), answer, strict=True)), expected)

# %%
# **2. Symmetry.** The scores of (2) are symmetric. Is :math:`B`? When is it? And why is every
# gradient :math:`dq_t` orthogonal to :math:`q_t`?

# %%
# **Solution 2.** Every row is divided by its own sum, so :math:`B_{ts} \ne B_{st}` unless the rows
# have equal sums: a token in a dense group spends less on each neighbour than a lonely one spends
# on it. What is symmetric is :math:`B_{ts}\, n_t` with the row sums :math:`n_t`. The output does
# not change when :math:`q_t` gets longer, so the derivative along :math:`q_t` is zero.

gram, B = rounds[0][-1][2:]
weighted = B * np.sum(np.exp(TAU * gram), axis=1, keepdims=True)
tutorial.check("exercise 2: B times row sums", np.max(np.abs(weighted - weighted.T)), 64 * EPS)
product = np.max(np.abs(np.sum(theirs["q"] * q, axis=1)))
tutorial.check("exercise 2: dq is orthogonal to q", product, 64 * EPS)

# %%
# **3. Which temperature?** A token has the cosine 1 with itself, about 0.41 with the 19 others of
# its group and about 0 with the 40 outside. Compute for the four :math:`\tau` of the experiment
# the weight it keeps for itself and the weight that stays in its group. What happens to a group of
# 2000 tokens at :math:`\tau = 10`?

# %%
# **Solution 3.** With :math:`a = e^{\tau}`, :math:`b = 19\, e^{0.41 \tau}` and :math:`c = 40`, the
# token keeps :math:`a / (a + b + c)`, and :math:`(a + b) / (a + b + c)` stays. With 2000 tokens a
# group :math:`b` is 100 times larger: the token keeps little and moves at once; :math:`c` grows as
# well, but the share that stays depends on their ratio only.

for tau in TAUS:
    a, b, c = math.exp(tau), 19 * math.exp(0.41 * tau), 40.0
    keeps, stays = a / (a + b + c), (a + b) / (a + b + c)
    print(f"exercise 3: tau = {tau:g}: keeps {keeps:.3f}, stays in the group {stays:.3f}")
x = tokens(0)
_, cache = spec.forward(x, x, x, tau=3.0, iterations=0, paths="q")
found = np.mean(np.sum(np.where(outside, 0.0, cache.p), axis=1))
a, b = math.exp(3.0), 19 * math.exp(0.41 * 3.0)
tutorial.check("exercise 3: stays, at tau = 3", abs(found - (a + b) / (a + b + 40)), 0.05)

# %%
tutorial.finish(figure)
