r"""
Variational attention
=====================

**The question.** A translator writes one word and means one word of the source by it. Softmax
attention gives the decoder a *mean* of source words instead, as if 60 % "bank" and 40 % "river"
made a word of their own. What if the weights are taken at their word: as probabilities that this or
that key is meant?

**The idea.** Make the choice of the key a hidden variable. Where few keys are there, add up over
all choices, exactly. Where that is too dear, guess the choice with a second network that has seen
the answer, and pay for guessing.

You need to know softmax attention (``scores/dot_product``) and what a Kullback-Leibler divergence
is.
"""

# %%
# Definition
# ----------
# Each value says something about the answer: a decoder with matrix :math:`W` turns it into a
# distribution over :math:`M` classes. Three numbers can then be called "the log-likelihood":
#
# .. math::
#
#    z_{ts} &= c\, q_t \cdot k_s + b_{ts}, \qquad
#        p_{ts} = e^{z_{ts}} / \textstyle\sum_{s'} e^{z_{ts'}}                              &(1)\\
#    \ell_{sj} &= \log \text{softmax}_j (v_s W)                                             &(2)\\
#    o_{tj} &= \underbrace{\log \textstyle\sum_s p_{ts}\, e^{\ell_{sj}}}_{\text{exact}}
#        \quad\text{or}\quad \underbrace{\textstyle\sum_s p_{ts}\, \ell_{sj}}_{\text{hard}}
#        \quad\text{or}\quad
#        \underbrace{\log \text{softmax}_j (\textstyle\sum_s p_{ts} v_s W)}_{\text{soft}}   &(3)
#
# *Exact* is the truth of the model "choose a key, then speak". *Hard* is what one optimises when a
# key is sampled and its log-likelihood is the reward; by Jensen's inequality it is never larger.
# *Soft* is ordinary attention, and lies now above, now below *exact*. Log softmax is concave, so
# with a decoder that is linear in the value, as here, soft is never below hard either; with a
# deeper decoder it bounds nothing.

import math

import numpy as np

import attention_ref
from attention_ref import engine, nn
from attention_ref.kit.tutorial import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, Tutorial
from attention_ref.methods.normalizers.variational import (
    decode_forward,
    elbo_backward,
    elbo_forward,
    reinforce,
)

tutorial = Tutorial(__file__)
spec = attention_ref.get("normalizers/variational")
EPS = np.finfo(np.float64).eps

# %%
# An example by hand
# ------------------
# Two keys with :math:`p = (\tfrac34, \tfrac14)`. The first gives class 0 the probability
# :math:`\tfrac34`, the second :math:`\tfrac14`. Then
#
# * exact: :math:`\tfrac34 \cdot \tfrac34 + \tfrac14 \cdot \tfrac14 = \tfrac58`;
# * hard: :math:`(\tfrac34)^{3/4} (\tfrac14)^{1/4} \approx 0.570`, less;
# * soft: values are :math:`\pm 1` with logits :math:`\pm \tfrac12 \ln 3`, the mean value is
#   :math:`\tfrac12`, its odds are :math:`\sqrt 3`: probability 0.634, more.

L = math.log(3)
two = {
    "q": np.array([[1.0]]), "k": np.array([[L], [0.0]]), "v": np.array([[1.0], [-1.0]]),
    "w": np.array([[L / 2, -L / 2]]),
}  # fmt: skip
by_hand = {"exact": 5 / 8, "hard": 0.75**0.75 * 0.25**0.25, "soft": 3**0.5 / (1 + 3**0.5)}
for objective, number in by_hand.items():
    out, cache = spec.forward(**two, objective=objective)
    tutorial.check(f"{objective}: {number:.4f}", abs(np.exp(out[0, 0]) - number), 8 * EPS)

# %%
# Forward and backward, line by line
# ----------------------------------
# **(3')** The exact log-likelihood is a log-sum-exp of :math:`\log p_{ts} + \ell_{sj}`, and the
# gradient of a log-sum-exp is a softmax, here the *posterior*
#
# .. math::
#
#    R_{tjs} = \frac{p_{ts}\, e^{\ell_{sj}}}{\sum_{s'} p_{ts'}\, e^{\ell_{s'j}}} :
#
# the probability that key :math:`s` was meant, once it is known that :math:`j` was said. So
# :math:`d\ell_{sj} = \sum_t do_{tj} R_{tjs}`, and with :math:`\log p = z - \text{lse}(z)`
#
# .. math:: dz_{ts} = \sum_j do_{tj}\, (R_{tjs} - p_{ts}) .
#
# Posterior minus prior: attention learns to expect what it understood afterwards. (For hard and
# soft, :math:`dp` goes through the softmax as always.)
#
# **(2')** As for any softmax, the logits get :math:`d\ell_{sj} - e^{\ell_{sj}} \sum_i d\ell_{si}`;
# multiplied by :math:`W^\top` that is :math:`dv_s`, and :math:`v_s` times it, summed, is
# :math:`dW`.
#
# **(1')** :math:`dq_t = c \sum_s dz_{ts} k_s`, :math:`dk_s = c \sum_t dz_{ts} q_t`,
# :math:`db = dz`.


def board(q, k, v, w):
    """Steps (1) to (3), exact."""
    z = q @ k.T / math.sqrt(q.shape[1])
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)  # (1)
    lik = np.exp(v @ w)
    lik = lik / lik.sum(axis=1, keepdims=True)  # (2), e^l
    return np.log(p @ lik), (p, lik)  # (3)


def board_backward(do, q, k, v, w, p, lik):
    """Steps (3') to (1')."""
    share = do / (p @ lik)
    dz = p * (share @ lik.T - do.sum(axis=1, keepdims=True))  # (3')
    dl = lik * (p.T @ share)
    dlogits = dl - lik * dl.sum(axis=1, keepdims=True)  # (2')
    c = 1 / math.sqrt(q.shape[1])
    return {"q": c * dz @ k, "k": c * dz.T @ q, "v": dlogits @ w.T, "w": v.T @ dlogits}  # (1')


rng = np.random.default_rng(0)
q, k, v, w = (rng.standard_normal(s) for s in ((4, 3), (6, 3), (6, 2), (2, 5)))
out, steps = board(q, k, v, w)
library, cache = spec.forward(q, k, v, w)
tutorial.check("forward against the library", np.max(np.abs(out - library)), 32 * EPS)
do = rng.standard_normal(out.shape)
ours, theirs = board_backward(do, q, k, v, w, *steps), spec.backward(do, cache)
for name in ours:
    error = np.max(np.abs(ours[name] - theirs[name]))
    tutorial.check(f"d{name} from the board against the library", error, 64 * EPS)

# %%
# Four roads to the same gradient, for the three objectives.

for objective in by_hand:
    tutorial.gradients(spec, {"q": q, "k": k, "v": v, "w": w, "objective": objective})

outs = {objective: spec.forward(q, k, v, w, objective=objective)[0] for objective in by_hand}
lowest = np.minimum(outs["exact"], outs["soft"])
tutorial.check("hard above exact or soft", max(np.max(outs["hard"] - lowest), 0.0), 0)
above = np.mean(outs["soft"] > outs["exact"])
print(f"soft is above exact in {above:.0%} of {lowest.size} places")

# %%
# The bound
# ---------
# Let :math:`\rho` be any distribution over the keys; it may have seen the answer :math:`j`. Then
#
# .. math::
#
#    \log \sum_s p_s e^{\ell_s} = \underbrace{\sum_s \rho_s \ell_s
#        - \sum_s \rho_s \log \frac{\rho_s}{p_s}}_{B}
#        + \sum_s \rho_s \log \frac{\rho_s}{R_s} .                                       \tag{4}
#
# *Derivation:* put :math:`R_s = p_s e^{\ell_s} / \sum p e^{\ell}` into the last sum and multiply
# out. It is a divergence, so :math:`B` is a lower bound, with equality when :math:`\rho` is the
# posterior. With :math:`\rho = p` it is hard attention. With scores :math:`r` for :math:`\rho` and
# :math:`g_s = \ell_s - \log(\rho_s / p_s)`,
#
# .. math:: dr_s = \rho_s\, (g_s - \textstyle\sum_{s'} \rho_{s'} g_{s'}), \qquad
#           dz_s = \rho_s - p_s, \qquad d\ell_s = \rho_s .                               \tag{5}
#
# (The derivative of the :math:`\log \rho_s` in :math:`g` drops out: :math:`\sum_s d\rho_s = 0`.)

z, r, loglik = rng.standard_normal((3, 1, 6))
logp = z - np.log(np.exp(z).sum())
exact = np.log(np.sum(np.exp(logp + loglik)))
bound, cache = elbo_forward(z, r, loglik)
right = np.exp(logp + loglik - exact)
gap = np.sum(cache.q * np.log(cache.q / right))
tutorial.check("equation (4)", abs(exact - bound[0] - gap), 16 * EPS)
tight, _ = elbo_forward(z, z + loglik, loglik)
tutorial.check("the posterior makes it tight", abs(exact - tight[0]), 8 * EPS)
hand = elbo_backward(np.ones(1), cache)
step = engine.complex_gradient(
    lambda **a: elbo_forward(**a)[0], {"z": z, "r": r, "loglik": loglik}, np.ones(1)
)
error = max(np.max(np.abs(hand[n] - step[n])) for n in hand)
tutorial.check("equation (5) against the complex step", error, 16 * EPS)

# %%
# By samples
# ----------
# In a long text nobody can decode every key. Draw one, :math:`s \sim \rho`, and use
#
# .. math:: dr = (\ell_s - \beta)\, \nabla_r \log \rho_s + \ldots                         \tag{6}
#
# with the divergence done exactly, as it costs no decoding. Any :math:`\beta` that does not depend
# on the draw leaves the mean as it is; a good one leaves little variance. The paper takes the
# log-likelihood of *soft* attention, which costs one more decoding. Is the mean right?

exact_gradients = elbo_backward(np.ones(1), cache)
_, sampled = reinforce(np.random.default_rng(1), z, r, loglik, samples=400_000)
error = np.max(np.abs(sampled["r"] - exact_gradients["r"]))
tutorial.check("gradient from 400000 samples against (5)", error, 0.01)

# %%
# Experiment: one of five items
# -----------------------------
# Five items with random keys, each carrying one of eight labels. The query is the key of one item
# with as much noise as signal, so that often two or three items could be meant. The answer is the
# label of the item meant, in one case of ten a random one. To be learned: a matrix between query
# and keys, the decoder :math:`W`, and, for the bound, an inference network, which sees query, keys
# and answer. All start alike and get 300 steps of Adam. Judged is the negative log-likelihood of
# 8000 new answers, by the marginal (by its own, for soft attention).

tutorial.claim(
    spec.claim,
    criterion="held-out negative log-likelihood, on each of three seeds: (a) exact is the lowest "
    "of all; (b) the enumerated bound is at least 0.02 nats below soft and below hard; (c) one "
    "sample with the baseline ends at least 0.03 nats below one sample without. All three: "
    "reproduced; only (b): partly",
)

D, M, N = 8, 8, 5


def draw(rng, number):
    """Queries, keys, values, answers."""
    k = rng.standard_normal((number, N, D))
    label, meant = rng.integers(0, M, (number, N)), rng.integers(0, N, number)
    rows = np.arange(number)
    q = k[rows, meant][:, None] + rng.standard_normal((number, 1, D))
    lost = rng.random(number) < 0.1
    y = np.where(lost, rng.integers(0, M, number), label[rows, meant])
    return q, k, np.eye(M)[label], np.eye(M)[y][:, None]


def networks(p, q, k, v, hot):
    """Scores of prior and inference network, log-likelihoods of the answer, each (B, 1, N)."""
    turned = np.swapaxes(hot, -1, -2)
    z = (q @ p["prior"]) @ np.swapaxes(k, -1, -2) / math.sqrt(D)
    r = (q @ p["query"]) @ np.swapaxes(k, -1, -2) / math.sqrt(D)
    r = r + np.swapaxes(v @ p["answer"] @ turned, -1, -2)
    return z, r, np.swapaxes(decode_forward(v, p["w"]) @ turned, -1, -2)


def soft_baseline(rho, v, w, hot):
    """Log-likelihood of the answer at the mean value."""
    return np.sum(decode_forward(rho @ v, w) * hot, axis=-1)


def rho_of(r):
    """Softmax over the items."""
    e = np.exp(r - r.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def loss_of(kind, sampler):
    """The loss of one batch, a function of the parameters."""

    def loss(p, q, k, v, hot):
        if kind in by_hand:
            out, _ = spec.forward(q @ p["prior"], k, v, p["w"], objective=kind)
            return -np.sum(out * hot) / len(q)
        z, r, loglik = networks(p, q, k, v, hot)
        if kind == "bound":
            return -np.sum(elbo_forward(z, r, loglik)[0]) / len(q)
        plain = [engine.value(a) for a in (z, r, loglik)]
        baseline = 0.0
        if kind == "one sample":
            baseline = soft_baseline(rho_of(plain[1]), v, engine.value(p["w"]), hot)
        _, g = reinforce(sampler, *plain, baseline=baseline)
        return -np.sum(z * g["z"] + r * g["r"] + loglik * g["loglik"]) / len(q)

    return loss


def start(rng):
    """Parameters before training."""
    shapes = {"prior": (D, D), "query": (D, D), "w": (M, M), "answer": (M, M)}
    return {n: 0.3 * rng.standard_normal(s) for n, s in shapes.items()}


def learn(kind, seed, steps):
    """Train; returns the held-out loss in nats and the parameters."""
    rng = np.random.default_rng(seed)
    p = start(rng)
    used = ("prior", "w") if kind in by_hand else tuple(p)
    loss = loss_of(kind, np.random.default_rng(500 + seed))
    batches = (draw(rng, 128) for _ in range(steps))
    p, _ = nn.train(loss, {n: p[n] for n in used}, batches, steps=steps, rate=0.02, progress=False)
    q, k, v, hot = draw(np.random.default_rng(1000 + seed), 8000)
    own = "soft" if kind == "soft" else "exact"
    out, _ = spec.forward(q @ p["prior"], k, v, p["w"], objective=own)
    return float(-np.sum(out * hot) / len(q)), p


KINDS = ("exact", "bound", "one sample", "soft", "hard", "no baseline")
steps = 12 if tutorial.quick else 300
records, trained = [], {}
for seed in range(3):
    record = {}
    for kind in KINDS:
        record[kind], p = learn(kind, seed, steps)
        if kind == "bound":
            trained[seed] = p
    records.append(record)
table = {kind: np.array([record[kind] for record in records]) for kind in KINDS}
a = all(np.all(table["exact"] <= table[kind]) for kind in KINDS)
b = np.all(table["bound"] <= np.minimum(table["soft"], table["hard"]) - 0.02)
c = np.all(table["one sample"] <= table["no baseline"] - 0.03)
verdict = "reproduced" if a and b and c else "partly" if b else "not reproduced"
tutorial.measured(ours=records, verdict=verdict, tolerance=0.05)

# %%
# Samples, network sizes and thresholds were settled with pilots on other seeds. How much variance
# does the baseline take away? Summed over the five scores, per answer, from 60 draws:


def variance(p, baseline):
    """Variance of dr in (6), a mean over 1000 answers."""
    q, k, v, hot = draw(np.random.default_rng(7), 1000)
    z, r, loglik = networks(p, q, k, v, hot)
    level = soft_baseline(rho_of(r), v, p["w"], hot) if baseline else 0.0
    sampler = np.random.default_rng(8)
    drawn = [reinforce(sampler, z, r, loglik, baseline=level)[1]["r"] for _ in range(60)]
    return float(np.mean(np.var(drawn, axis=0).sum(axis=-1)))


spread = {}
for when, p in (("before", start(np.random.default_rng(0))), ("after", trained[0])):
    spread[when] = variance(p, False), variance(p, True)
    without, with_it = spread[when]
    print(f"{when} training: variance {without:.3f} without and {with_it:.3f} with the baseline, "
          f"{without / with_it:.1f} times less")  # fmt: skip

# %%
# Before training all keys say nearly the same, mean and mixture agree, and the baseline removes
# almost everything. Later keys contradict each other, and what is left is the difference between
# them, which no baseline knows: the gain is then small. Most of the good is done early.
#
# The figure
# ----------
# Left: the held-out loss; one point a seed. Middle: prior, the inference network's guess and the
# true posterior over the five items, for the answer of 200 that surprised the prior most. Right:
# variance of the sampled gradient.

figure = None
if not tutorial.quick:
    plt = tutorial.pyplot()
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.7), width_ratios=(1.25, 1.1, 0.75))
    colours = dict(zip(KINDS, (BLUE, SKY, GREEN, ORANGE, RED, GREY), strict=True))
    for i, kind in enumerate(KINDS):
        panels[0].bar(i, table[kind].mean(), color=colours[kind], width=0.7)
        panels[0].plot([i] * 3, table[kind], "o", color="black", markersize=3)
    names = ("exact", "bound", "bound,\n1 sample", "soft", "hard", "1 sample,\nno baseline")
    panels[0].set_xticks(range(6), names, fontsize=8)
    panels[0].set(title="New answers", ylabel="neg. log-likelihood (nats)", ylim=(0.7, 1.02))
    q, k, v, hot = draw(np.random.default_rng(21), 200)
    z, r, loglik = networks(trained[0], q, k, v, hot)
    prior, guess, right = (rho_of(a)[:, 0] for a in (z, r, z + loglik))
    shown = int(np.argmax(np.sum(np.abs(prior - right), axis=-1)))
    for i, (name, row, colour) in enumerate(
        (("prior", prior, GREY), ("inference network", guess, SKY), ("posterior", right, PURPLE))
    ):
        panels[1].bar(np.arange(N) + 0.27 * (i - 1), row[shown], 0.25, color=colour, label=name)
    panels[1].set_xticks(range(N), [f"item {s + 1}" for s in range(N)])
    panels[1].set(title="Who was meant?", ylabel="probability", ylim=(0, 1.3))
    panels[1].legend(loc="upper center", ncols=3, fontsize=8, columnspacing=0.8, handlelength=1.2)
    for i, pair in enumerate(spread.values()):
        for j, colour in enumerate((GREY, GREEN)):
            label = ("no baseline", "soft baseline")[j] if i == 0 else None
            panels[2].bar(i + 0.36 * (j - 0.5), pair[j], 0.34, color=colour, label=label)
    panels[2].set_yscale("log")
    panels[2].set_xticks(range(2), ("before", "after training"))
    panels[2].set(title="Variance of dr", ylabel="variance", ylim=(0.01, 20))
    panels[2].legend(loc="upper right")

# %%
# Exercises
# ---------
# **1. Write this backward yourself.** Given :math:`do`, scores :math:`z` and log-likelihoods
# :math:`\ell`, return :math:`dz` and :math:`d\ell` of the exact objective.


def my_backward(do, z, loglik):
    """Return dz (T, S), dloglik (S, M)."""
    # solution: return None, None
    dz, dl = np.zeros_like(z), np.zeros_like(loglik)
    for t, row in enumerate(z):
        p = np.exp(row) / np.exp(row).sum()
        for j, slope in enumerate(do[t]):
            posterior = p * np.exp(loglik[:, j])
            posterior /= posterior.sum()
            dz[t] += slope * (posterior - p)
            dl[:, j] += slope * posterior
    return dz, dl
    # end of solution


fresh = np.random.default_rng(9)
z, do = fresh.standard_normal((3, 4)), fresh.standard_normal((3, 5))
values = np.log(fresh.dirichlet(np.ones(5), 4))  # with W = 1 these are their own log-likelihoods
out, cache = spec.forward(z, np.eye(4), values, np.eye(5), scale=1.0)
right = spec.backward(do, cache)
dz, dl = my_backward(do, z, values)
if dl is not None:
    dl = dl - np.exp(values) * dl.sum(axis=1, keepdims=True)
tutorial.exercise(1, {"q": dz, "v": dl}, {"q": right["q"], "v": right["v"]})

# %%
# **2. What hard attention wants.** Two items with likelihoods 0.9 and 0.1 of the answer. Which
# :math:`p` maximises the exact objective, which the hard one? Now let the answer be fifty-fifty,
# with likelihoods (0.9, 0.1) of one class and (0.1, 0.9) of the other, and compare the mean of both
# objectives at :math:`p = (1, 0)` and :math:`p = (\tfrac12, \tfrac12)`.

# %%
# **Solution 2.** For a single answer both want :math:`p = (1, 0)`. For two answers, the exact
# objective at :math:`(\tfrac12, \tfrac12)` is :math:`\ln \tfrac12 = -0.69`, at :math:`(1, 0)` it is
# :math:`\tfrac12 (\ln 0.9 + \ln 0.1) = -1.20`. The hard objective is linear in :math:`p`, and -1.20
# at both: it gets nothing for being undecided, so its decoder must hedge instead, which is what its
# larger loss above shows.

lik = np.log(np.array([[0.9, 0.1], [0.1, 0.9]]))
for p in ((1.0, 0.0), (0.5, 0.5)):
    exact = np.mean(np.log(p @ np.exp(lik)))
    hard = np.mean(p @ lik)
    print(f"exercise 2: p = {p}: exact {exact:.2f}, hard {hard:.2f}")

# %%
# **3. Why may one subtract?** Show that :math:`\sum_s \rho_s \nabla_r \log \rho_s = 0`, so that a
# constant :math:`\beta` in (6) changes no mean. Why must :math:`\beta` not depend on the drawn
# :math:`s`, and which constant would be best if all :math:`|\nabla_r \log \rho_s|` were equal?

# %%
# **Solution 3.** :math:`\sum_s \rho_s \nabla \log \rho_s = \sum_s \nabla \rho_s = \nabla 1 = 0`. A
# :math:`\beta_s` under the sum gives :math:`\sum_s \beta_s \nabla \rho_s`, which is not zero. With
# gradients of equal length the variance is, up to a constant, :math:`\sum_s \rho_s (\ell_s -
# \beta)^2`, smallest at the mean reward :math:`\sum_s \rho_s \ell_s`, which would cost decoding all
# keys; the soft objective is a guess of it for one decoding.

r = np.random.default_rng(3).standard_normal(6)
rho = np.exp(r) / np.exp(r).sum()
score = np.eye(6) - rho  # row s: the gradient of log rho_s
tutorial.check("exercise 3: the mean of the score", np.max(np.abs(rho @ score)), 4 * EPS)

# %%
tutorial.finish(figure)
