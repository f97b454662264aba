r"""
The delta rule
==============

**The question.** A memory of fixed size reads a stream of pairs (key, value) and is asked for
values by key. Linear attention adds every pair to one matrix. What happens when a key comes again
with a *new* value, as the position of a chess piece or the balance of an account does? The old
value is still in the sum. How can a memory replace instead of add?

**The idea.** Before writing, ask the memory what it would answer. Write only the difference
between the new value and that answer, the *delta*. This is the rule of Widrow and Hoff of 1960,
and one step of gradient descent.

You need to know what an outer product is, and the chain rule.
"""

# %%
# Definition
# ----------
# The memory is a matrix :math:`S` with :math:`D` rows and :math:`E` columns; asked with a vector
# :math:`q` it answers :math:`S^\top q`. At every token :math:`t` there come a query, a key, a
# value, a writing strength :math:`b_t` and a gate :math:`a_t` between 0 and 1 that says how much of
# the memory is kept:
#
# .. math::
#
#    F_t &= \mathrm{diag}(a_t)\, S_{t-1}          &(1)\\
#    u_t &= v_t - F_t^\top k_t                    &(2)\\
#    S_t &= F_t + b_t\, k_t u_t^\top              &(3)\\
#    o_t &= c\, S_t^\top q_t                      &(4)
#
# Decay, compare, write, read. Why is this gradient descent? Let
# :math:`L(S) = \tfrac12 \lVert v_t - S^\top k_t \rVert^2` be how wrong the memory is about this one
# pair. Its gradient is :math:`-k_t (v_t - S^\top k_t)^\top`, so (3) is a step of length
# :math:`b_t` downhill from :math:`F_t`. And how much of the error does it remove? Ask the new
# memory with the same key:
#
# .. math::
#
#    S_t^\top k_t = F_t^\top k_t + b_t\, u_t\, (k_t \cdot k_t)
#    \quad\Rightarrow\quad
#    v_t - S_t^\top k_t = (1 - b_t\, \lVert k_t \rVert^2)\, u_t .
#
# With keys of length one, :math:`b_t = 1` leaves no error at all, :math:`b_t = \tfrac12` half of
# it, and :math:`b_t` beyond 2 makes it grow: the memory diverges.

import math

import numpy as np

import attention_ref
from attention_ref.kit.tutorial import BLUE, GREY, ORANGE, Tutorial

tutorial = Tutorial(__file__)
spec = attention_ref.get("recurrent/delta_rule")
linear = attention_ref.get("linear/linear_transformer")
EPS = np.finfo(np.float64).eps

# %%
# An example by hand
# ------------------
# One value column, three tokens, no gate, :math:`b = 1`, :math:`c = 1`, and we read with the key
# just written. The first key is :math:`e_1`, the second :math:`(0.6, 0.8)`, the third
# :math:`e_1` again:
#
# * :math:`k_1 = (1, 0), v_1 = 5`. The memory is empty, so :math:`u_1 = 5` and
#   :math:`S_1 = (5, 0)`.
# * :math:`k_2 = (0.6, 0.8), v_2 = 4`. The memory answers :math:`0.6 \cdot 5 = 3`, so
#   :math:`u_2 = 1` and :math:`S_2 = (5.6, 0.8)`. Asked for the first key it now says 5.6: the keys
#   overlap, and the first value has been disturbed a little.
# * :math:`k_3 = (1, 0), v_3 = 7`. The memory answers 5.6, so :math:`u_3 = 1.4` and
#   :math:`S_3 = (7, 0.8)`. The new value *replaces* the old one.
#
# Linear attention would hold :math:`(5 + 2.4 + 7,\ 3.2)` and answer 14.4.

k = np.array([[1.0, 0.0], [0.6, 0.8], [1.0, 0.0]])
v = np.array([[5.0], [4.0], [7.0]])
b = np.ones(3)
(out, state), cache = spec.forward(k, k, v, b, scale=1.0)
print("memory after each token:", cache.states[1:, :, 0].round(4).tolist())
by_hand = np.array([[5.0, 0.0], [5.6, 0.8], [7.0, 0.8]])
tutorial.check("the memories above", np.max(np.abs(cache.states[1:, :, 0] - by_hand)), 16 * EPS)
summed, _ = linear.forward(k, k, v, causal=True, feature_map="identity", normalise=False)
tutorial.check("linear attention answers 14.4", abs(summed[2, 0] - 14.4), 16 * EPS)

# %%
# The forward
# -----------
# A loop over the tokens, one line for each step. We keep all memories, because the backward will
# need them.


def delta(q, k, v, b, a, S, c):
    """Steps (1) to (4) for one sequence."""
    outs, states = [], [S]
    for t in range(len(q)):
        F = a[t][:, None] * S  # (1)
        u = v[t] - F.T @ k[t]  # (2)
        S = F + b[t] * np.outer(k[t], u)  # (3)
        outs.append(c * S.T @ q[t])  # (4)
        states.append(S)
    return np.array(outs), states


rng = np.random.default_rng(0)
T, D, E, c = 5, 3, 2, 0.7
q, k, v = rng.standard_normal((T, D)), rng.standard_normal((T, D)), rng.standard_normal((T, E))
k = k / np.linalg.norm(k, axis=1, keepdims=True)
b, a = rng.uniform(0.2, 1, T), rng.uniform(0.5, 1, (T, D))
start = rng.standard_normal((D, E))
inputs = {"q": q, "k": k, "v": v, "b": b, "gate": a, "state": start}

outs, states = delta(q, k, v, b, a, start, c)
(library, last), cache = spec.forward(**inputs, scale=c)
tutorial.check("outputs against the library", np.max(np.abs(outs - library)), 32 * EPS)
tutorial.check("last memory against the library", np.max(np.abs(states[-1] - last)), 32 * EPS)

# %%
# The backward, line by line
# --------------------------
# Write :math:`G` for the gradient of the loss with respect to the memory. We walk from the last
# token to the first; when we arrive at token :math:`t`, :math:`G` holds all that later tokens have
# to say about :math:`S_t` (at the beginning: the gradient of the last memory, or zero).
#
# **(4')** :math:`o_{te} = c \sum_d S_{t,de}\, q_{td}`. So
#
# .. math::
#
#    dq_t = c\, S_t\, do_t, \qquad G \leftarrow G + c\, q_t\, do_t^\top .
#
# **(3')** :math:`S_{t,de} = F_{de} + b_t k_{td} u_{te}`, a product of three. Each factor gets
# :math:`G` summed against the other two:
#
# .. math::
#
#    db_t = \sum_{de} G_{de} k_d u_e = k^\top G\, u, \qquad
#    dk_t = b_t\, G\, u, \qquad
#    du_t = b_t\, G^\top k, \qquad dF = G .
#
# **(2')** :math:`u_e = v_e - \sum_d F_{de} k_d`. The value gets :math:`dv_t = du_t`. The key
# appears a second time, and the memory too, both with a minus sign:
#
# .. math::
#
#    dk_t \leftarrow dk_t - F\, du_t, \qquad dF \leftarrow G - k_t\, du_t^\top .
#
# The last formula is worth a second look. With :math:`du_t = b_t G^\top k_t` it reads
# :math:`dF = (I - b_t k_t k_t^\top)\, G`: what is erased on the way forward is erased on the way
# back. A memory that was overwritten has no more influence.
#
# **(1')** :math:`F_{de} = a_d S_{t-1,de}`: the gate gets
# :math:`da_{td} = \sum_e dF_{de}\, S_{t-1,de}` (summed over :math:`d` too when it is one number a
# head), and :math:`G \leftarrow \mathrm{diag}(a_t)\, dF` goes on to token :math:`t - 1`. What is
# left after the first token is the gradient of the initial memory.


def delta_backward(do, G, q, k, v, b, a, states, c):
    """Steps (4') to (1'), from the last token to the first."""
    d = {name: np.zeros_like(x) for name, x in (("q", q), ("k", k), ("v", v), ("b", b))}
    d["gate"] = np.zeros_like(a)
    for t in reversed(range(len(q))):
        F = a[t][:, None] * states[t]
        u = v[t] - F.T @ k[t]
        d["q"][t] = c * states[t + 1] @ do[t]  # (4')
        G = G + c * np.outer(q[t], do[t])
        d["b"][t] = k[t] @ G @ u  # (3')
        d["k"][t] = b[t] * G @ u
        du = b[t] * G.T @ k[t]
        d["v"][t] = du  # (2')
        d["k"][t] -= F @ du
        G = G - np.outer(k[t], du)
        d["gate"][t] = np.sum(G * states[t], axis=1)  # (1')
        G = a[t][:, None] * G
    return d | {"state": G}


do, dlast = rng.standard_normal((T, E)), rng.standard_normal((D, E))
ours = delta_backward(do, dlast, q, k, v, b, a, states, c)
theirs = spec.backward(type(spec.forward(**inputs)[0])(do, dlast), cache)
for name in ours:
    error = np.max(np.abs(ours[name] - theirs[name]))
    tutorial.check(f"d{name} from the board against the library", error, 64 * EPS)

# %%
# Four roads to the same gradient: by hand, by the tape, by the complex step, by differences.

tutorial.gradients(spec, inputs | {"scale": c})

# %%
# Without the loop
# ----------------
# A loop over tokens is slow on a processor that loves large matrix products. Take a chunk of
# tokens, without gates for simplicity, and write :math:`x_i = b_i u_i` for what token :math:`i`
# writes, so :math:`S_i = S + \sum_{j \le i} k_j x_j^\top`. Put this into (2):
#
# .. math::
#
#    x_i = b_i \Bigl( v_i - S^\top k_i - \sum_{j < i} (k_i \cdot k_j)\, x_j \Bigr)
#    \quad\Longleftrightarrow\quad
#    \bigl( I + N \bigr) X = \mathrm{diag}(b)\, (V - K S), \qquad
#    N_{ij} = b_i\, k_i \cdot k_j \ \text{ for } j < i .
#
# All the :math:`x_i` come from one triangular system, and then
# :math:`O = c\, (Q S + \mathrm{tril}(Q K^\top) X)`. With gates each product
# :math:`k_{id} k_{jd}` is multiplied by the gates between :math:`j` and :math:`i`.

N = np.tril(b[:, None] * (k @ k.T), -1)
X = np.linalg.solve(np.eye(T) + N, b[:, None] * (v - k @ start))
chunked = c * (q @ start + np.tril(q @ k.T) @ X)
(loop, _), _ = spec.forward(q, k, v, b, state=start, scale=c)
tutorial.check("one triangular system against the loop", np.max(np.abs(chunked - loop)), 64 * EPS)
other, _ = spec.forms["chunked"](**inputs, scale=c, chunk=2)
tutorial.check("the library's chunks, with gates", np.max(np.abs(other.out - outs)), 64 * EPS)

# %%
# Experiment: keys that come again
# --------------------------------
# :math:`N` random keys of length one in :math:`D = 16` dimensions are written one after the other,
# and all of them again, :math:`R` rounds in all, every time with a *new* random value (independent
# normal numbers). Then we ask for the last value of each key. What should linear attention do? Its
# answer for key :math:`i` is the sum of all values written under it and, through the overlaps
# :math:`k_i \cdot k_j` of variance :math:`1/D`, a part of all others. The last value is right;
# the :math:`R - 1` older ones are errors of variance 1 each, and there are
# :math:`R (N - 1)` overlaps:
#
# .. math::
#
#    \text{error of linear attention} \approx (R - 1) + R\, \frac{N - 1}{D} .
#
# The delta rule with :math:`b = 1` corrects the answer at each writing. Only the keys written after
# it in the last round can still disturb it, so the error should not grow with :math:`R`.

tutorial.claim(
    "When keys are written again, the delta rule recalls the last value, linear attention "
    "the sum of all that were written.",
    criterion="D = 16, N = 8 keys, mean squared error over 200 memories, each of three seeds: at "
    "R = 4 the error of the delta rule is below a fifth of that of linear attention; from R = 4 to "
    "R = 8 it changes by less than 10 %, while the error of linear attention stays within 10 % of "
    "(R - 1) + R (N - 1) / D at R = 2, 4, 8",
)

ROUNDS, LOADS, WIDTH = (1, 2, 3, 4, 6, 8), (2, 4, 8, 12, 16, 24, 32), 16


def recall(rng, N, R, memories):
    """Mean squared error of the recalled values: (delta rule, linear attention)."""
    keys = rng.standard_normal((memories, N, WIDTH))
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    values = rng.standard_normal((memories, R * N, 4))
    k = np.tile(keys, (1, R, 1))
    out = spec.forward(k, k, values, np.ones(R * N), scale=1.0)[0]
    answers = (keys @ out.state, keys @ (np.swapaxes(k, 1, 2) @ values))
    return [float(np.mean((answer - values[:, -N:]) ** 2)) for answer in answers]


memories = 20 if tutorial.quick else 200
theory = np.array([(R - 1) + R * 7 / WIDTH for R in ROUNDS])
rewritten, loaded, records = [], [], []
for seed in range(3):
    rng = np.random.default_rng(seed)
    rewritten.append([recall(rng, 8, R, memories) for R in ROUNDS])
    loaded.append([recall(rng, N, 1, memories) for N in LOADS])
    records.append(
        {f"delta rule, R={R}": x[0] for R, x in zip(ROUNDS, rewritten[-1], strict=True)}
        | {f"linear, R={R}": x[1] for R, x in zip(ROUNDS, rewritten[-1], strict=True)}
    )
rewritten, loaded = np.array(rewritten), np.array(loaded)
four, eight, some = ROUNDS.index(4), ROUNDS.index(8), [ROUNDS.index(R) for R in (2, 4, 8)]
far = np.all(rewritten[:, four, 0] < rewritten[:, four, 1] / 5)
flat = np.all(np.abs(rewritten[:, eight, 0] / rewritten[:, four, 0] - 1) < 0.1)
sums = np.all(np.abs(rewritten[:, some, 1] / theory[some] - 1) < 0.1)
print(f"a fifth: {far}, flat: {flat}, as the sum predicts: {sums}")
verdict = "reproduced" if far and flat and sums else "partly" if far else "not reproduced"
tutorial.measured(ours=records, verdict=verdict, tolerance=0.05)

# %%
# The figure
# ----------
# Left: what a memory answers for one key while seven others are written around it. Its value
# changes three times; the delta rule follows, the sum does not. Middle: the error after several
# rounds. Right: with every key written once only, the delta rule still does better, because it
# corrects for overlaps; but no memory of 16 rows can hold more than 16 independent pairs, and
# beyond that both fail.

figure = None
if not tutorial.quick:
    rng = np.random.default_rng(4)
    keys = rng.standard_normal((8, WIDTH))
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    k = np.tile(keys, (4, 1))
    v = 0.3 * rng.standard_normal((32, 1))
    v[::8, 0] = (2.0, -1.0, 1.5, 0.5)
    probe = np.tile(keys[:1], (32, 1))
    followed = spec.forward(probe, k, v, np.ones(32), scale=1.0)[0].out[:, 0]
    added = np.cumsum((k @ keys[0])[:, None] * v, axis=0)[:, 0]

    plt = tutorial.pyplot()
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.6), width_ratios=(1.25, 1, 1))
    axes = panels[0]
    axes.step(range(32), np.repeat(v[::8, 0], 8), where="post", color=GREY, label="last value")
    axes.plot(range(32), followed, "o-", color=BLUE, markersize=3, label="delta rule")
    axes.plot(range(32), added, "o-", color=ORANGE, markersize=3, label="linear attention")
    axes.set(title="One key, four values", xlabel="tokens", ylabel="answer for the first key")
    axes.set_ylim(-1.6, 4.6)
    axes.legend(ncols=3, loc="upper center", fontsize=8, handlelength=1.2, columnspacing=1)
    for axes, x, errors, title, label in (
        (panels[1], ROUNDS, rewritten, "Eight keys written again", "rounds R"),
        (panels[2], LOADS, loaded, "Each key written once", "number of keys N"),
    ):
        for column, colour, name in ((1, ORANGE, "linear attention"), (0, BLUE, "delta rule")):
            axes.plot(x, errors[:, :, column].T, "o", color=colour, alpha=0.5, markersize=4)
            axes.plot(x, errors[:, :, column].mean(axis=0), color=colour, label=name)
        axes.set(title=title, xlabel=label, ylabel="mean squared error of recall")
        axes.set_ylim(bottom=0)
    panels[1].plot(ROUNDS, theory, ":", color=GREY, label="predicted for the sum")
    panels[2].axvline(WIDTH, color=GREY, linestyle="--", linewidth=1)
    panels[2].text(WIDTH - 0.6, 1.6, "D = 16", color=GREY, ha="right", fontsize=9)
    panels[1].legend()

# %%
# Exercises
# ---------
# **1. Write this backward yourself.** One token, no gate, :math:`c = 1`: the output is
# :math:`S^\top q` with :math:`S = S_0 + b\, k\, (v - S_0^\top k)^\top`. Return the gradients of
# :math:`k`, :math:`b` and :math:`S_0`. (Try to write the output without S first.)


def my_backward(do, q, k, v, b, S0):
    """Return dk, db, dS0."""
    # solution: return None, None, None
    match, miss = k @ q, v - k @ S0  # the output is q S0 + b match miss
    dk = b * ((miss @ do) * q - match * (S0 @ do))
    return dk, match * (miss @ do), np.outer(q - b * match * k, do)
    # end of solution


fresh = np.random.default_rng(7)
q1, k1, v1, start1 = (fresh.standard_normal(n) for n in ((1, 4), (1, 4), (1, 3), (4, 3)))
up, b1 = fresh.standard_normal((1, 3)), fresh.uniform(0.2, 1, 1)
one, cache = spec.forward(q1, k1, v1, b1, state=start1, scale=1.0)
theirs = spec.backward(one._replace(out=up, state=None), cache)
dk, db, dstart = my_backward(up[0], q1[0], k1[0], v1[0], float(b1[0]), start1)
expected = {"k": theirs["k"][0], "b": theirs["b"][0], "S0": theirs["state"]}
tutorial.exercise(1, {"k": dk, "b": db, "S0": dstart}, expected)

# %%
# **2. A mirror.** Show that :math:`I - b\, k k^\top` with a unit key has the eigenvalue
# :math:`1 - b` in the direction of :math:`k` and 1 in all others. For which :math:`b` is it a
# projection, for which a reflection? What does writing with :math:`v = 0, b = 2` twice do?

# %%
# **Solution 2.** :math:`(I - b\, k k^\top) k = k - b\, k (k \cdot k) = (1 - b)\, k`, and a vector
# :math:`w` with :math:`k \cdot w = 0` stays: :math:`D - 1` eigenvalues 1. With :math:`b = 1` the
# part along k is removed, a projection; with :math:`b = 2` it changes its sign, a reflection. (With
# :math:`b = 0` nothing happens.) Writing :math:`v = 0` multiplies the memory by this matrix, by (2)
# and (3), and two equal reflections are the identity: the memory is what it was.

unit = np.array([[0.6, 0.8]])
kwargs = {"q": np.repeat(unit, 2, 0), "k": np.repeat(unit, 2, 0), "v": np.zeros((2, 1))}
before = np.array([[1.0], [3.0]])
(_, after), _ = spec.forward(**kwargs, b=np.array([2.0, 2.0]), state=before)
tutorial.check("exercise 2: two reflections", np.max(np.abs(after - before)), 16 * EPS)
for strength in (0.5, 1.0, 2.0):
    sizes = np.linalg.eigvalsh(np.eye(2) - strength * unit.T @ unit)
    error = np.max(np.abs(sizes - [1 - strength, 1]))
    tutorial.check(f"exercise 2: eigenvalues for b = {strength}", error, 16 * EPS)

# %%
# **3. Too much gate.** With orthonormal keys and :math:`b = 1` the memory is exact. Let
# :math:`a = 0.9` at every token. How large is the answer for a key that was written :math:`n`
# tokens ago? After how many tokens has a value lost half of itself, and which a would keep half of
# it for 1000 tokens?

# %%
# **Solution 3.** Each later token multiplies the memory by 0.9, and its own writing touches another
# direction: the answer is :math:`0.9^n v`. It is one half at :math:`n = \ln \tfrac12 / \ln 0.9 =
# 6.6`, so a value lives six tokens. For N tokens :math:`a = 2^{-1/N}`, which for 1000 is 0.9993: a
# gate that is to remember must stand very close to 1.

keys = np.eye(8)
(_, state), _ = spec.forward(keys, keys, np.ones((8, 1)), np.ones(8), np.full(8, 0.9))
expected = 0.9 ** np.arange(7, -1, -1)
tutorial.check("exercise 3: powers of 0.9", np.max(np.abs(state[:, 0] - expected)), 16 * EPS)
print(f"exercise 3: half of it is left after {math.log(0.5) / math.log(0.9):.1f} tokens")
print(f"exercise 3: a = {2 ** (-1 / 1000):.5f} keeps half of it for 1000 tokens")

# %%
tutorial.finish(figure)
