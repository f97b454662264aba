"""Variational attention: slow loop, worked examples, the bound, sampled estimators, oracle."""

import math

import numpy as np
import pytest

import attention_ref
from attention_ref import core, engine
from attention_ref.kit.checks import cases
from attention_ref.methods.normalizers.variational import (
    elbo_backward,
    elbo_forward,
    reinforce,
    relaxed,
    variational_backward,
    variational_forward,
)

SPEC = attention_ref.get("normalizers/variational")
OBJECTIVES = ("exact", "hard", "soft")


def slow_variational(
    q, k, v, w, objective="exact", mask=None, causal=False, align="lower_right", scale=None,
    bias=None,
):  # fmt: skip
    """One query and one class at a time."""
    lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    T, D, S = q.shape[-2], q.shape[-1], k.shape[-2]
    E, M = w.shape
    q = np.broadcast_to(q, (*lead, T, D))
    k = np.broadcast_to(k, (*lead, S, D))
    v = np.broadcast_to(v, (*lead, S, E))
    mask = None if mask is None else np.broadcast_to(mask, (*lead, T, S))
    bias = None if bias is None else np.broadcast_to(bias, (*lead, T, S))
    c = 1.0 / math.sqrt(D) if scale is None else scale
    first = S - T if align == "lower_right" else 0
    out = np.zeros((*lead, T, M))

    def says(value, j):
        logits = [math.fsum(value[e] * float(w[e, i]) for e in range(E)) for i in range(M)]
        return logits[j] - math.log(math.fsum(math.exp(a) for a in logits))

    for place in np.ndindex(*lead):
        for t in range(T):
            e = {}
            for s in range(S):
                if (causal and s > t + first) or (mask is not None and not mask[place][t, s]):
                    continue
                z = c * math.fsum(float(q[place][t, d] * k[place][s, d]) for d in range(D))
                e[s] = math.exp(z + (0.0 if bias is None else float(bias[place][t, s])))
            if not e:
                continue
            total = math.fsum(e.values())
            p = {s: e[s] / total for s in e}
            row = [[float(v[place][s, i]) for i in range(E)] for s in range(S)]
            mean = [math.fsum(p[s] * row[s][i] for s in p) for i in range(E)]
            for j in range(M):
                if objective == "exact":
                    one = math.log(math.fsum(p[s] * math.exp(says(row[s], j)) for s in p))
                elif objective == "hard":
                    one = math.fsum(p[s] * says(row[s], j) for s in p)
                else:
                    one = says(mean, j)
                out[place][t, j] = one
    return out


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("case", cases(SPEC))
def test_equals_the_slow_loop(case, objective):
    kwargs = cases(SPEC)[case] | {"objective": objective}
    out, _ = variational_forward(**kwargs)
    np.testing.assert_allclose(out, slow_variational(**kwargs), rtol=0, atol=2e-14)


def two_keys():
    """p = (3/4, 1/4); the first key gives class 0 with 3/4, the second with 1/4."""
    L = math.log(3)
    w = np.array([[L / 2, -L / 2]])
    return L, {
        "q": np.array([[1.0]]), "k": np.array([[L], [0.0]]), "v": np.array([[1.0], [-1.0]]),
        "w": w,
    }  # fmt: skip


def test_worked_example_exact():
    """Class 0: 9/16 + 1/16 = 5/8; posterior (9, 1)/10, dz = posterior - p = (0.15, -0.15).

    dloglik = (0.9, 0.1) for class 0, dlogits = (0.9 * 1/4)(1, -1) and (0.1 * 3/4)(1, -1).
    """
    L, kwargs = two_keys()
    out, cache = variational_forward(**kwargs)
    np.testing.assert_allclose(np.exp(out), [[5 / 8, 3 / 8]], rtol=1e-15)
    np.testing.assert_allclose(cache.p, [[0.75, 0.25]], rtol=1e-15)
    np.testing.assert_allclose(cache.posterior, [[[0.9, 0.1], [0.5, 0.5]]], rtol=1e-15)
    g = variational_backward(np.array([[1.0, 0.0]]), cache)
    want = {
        "q": [[0.15 * L]], "k": [[0.15], [-0.15]], "v": [[0.225 * L], [0.075 * L]],
        "w": [[0.15, -0.15]],
    }  # fmt: skip
    for name, expected in want.items():
        np.testing.assert_allclose(g[name], expected, rtol=1e-14)


def test_worked_example_hard_and_soft():
    """Hard: 3/4 ln 3/4 + 1/4 ln 1/4 = 3/4 ln 3 - ln 4; soft: the mean value 1/2 has odds sqrt 3."""
    L, kwargs = two_keys()
    out, cache = variational_forward(**kwargs, objective="hard")
    np.testing.assert_allclose(out[0, 0], 0.75 * L - math.log(4), rtol=1e-15)
    g = variational_backward(np.array([[1.0, 0.0]]), cache)
    np.testing.assert_allclose(g["k"], [[3 / 16 * L], [-3 / 16 * L]], rtol=1e-14)
    out, cache = variational_forward(**kwargs, objective="soft")
    p = math.sqrt(3) / (1 + math.sqrt(3))
    np.testing.assert_allclose(np.exp(out), [[p, 1 - p]], rtol=1e-15)
    g = variational_backward(np.array([[1.0, 0.0]]), cache)
    np.testing.assert_allclose(g["v"], [[0.75 * (1 - p) * L], [0.25 * (1 - p) * L]], rtol=1e-14)
    np.testing.assert_allclose(g["k"], (1 - p) * L * 3 / 8 * np.array([[1.0], [-1.0]]), rtol=1e-14)


def test_classes_add_up_to_one():
    for objective in ("exact", "soft"):
        out, _ = variational_forward(**(cases(SPEC)["plain"] | {"objective": objective}))
        np.testing.assert_allclose(np.sum(np.exp(out), axis=-1), 1.0, rtol=1e-14)


def test_hard_is_below_both_and_soft_on_either_side_of_exact():
    """Log softmax is concave, and the decoder linear in the value."""
    sides = set()
    for kwargs in cases(SPEC).values():
        outs = {o: variational_forward(**(kwargs | {"objective": o}))[0] for o in OBJECTIVES}
        assert np.all(outs["hard"] <= outs["exact"] + 1e-14)
        assert np.all(outs["hard"] <= outs["soft"] + 1e-14)
        sides |= set(np.sign(outs["soft"] - outs["exact"]).ravel())
    assert {-1.0, 1.0} <= sides


def test_with_one_key_all_objectives_agree():
    kwargs = core.examples.qkv(np.random.default_rng(0), S=1) | {"w": np.eye(3, 5)}
    outs = [variational_forward(**kwargs, objective=o)[0] for o in OBJECTIVES]
    for out in outs[1:]:
        np.testing.assert_allclose(out, outs[0], rtol=0, atol=4e-15)


def test_likelihoods_far_apart_lose_nothing():
    """p underflows where the likelihood is, and the likelihood where p is."""
    w = np.array([[1000.0, 0.0]])
    kwargs = {"q": np.ones((1, 1)), "k": np.array([[0.0], [-900.0]]), "scale": 1.0}
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        out, cache = variational_forward(**kwargs, v=np.array([[-1.0], [1.0]]), w=w)
        variational_backward(np.ones((1, 2)), cache)
    assert cache.p[0, 1] == 0.0
    np.testing.assert_allclose(out, [[-900.0, 0.0]], atol=1e-12)
    np.testing.assert_allclose(cache.posterior[0, 0], [0.0, 1.0], atol=1e-40)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_empty_rows(objective):
    kwargs = cases(SPEC)["plain"] | {"objective": objective}
    mask = np.ones((5, 6), bool)
    mask[0] = False
    out, cache = variational_forward(**kwargs, mask=mask)
    np.testing.assert_array_equal(out[:, 0], 0.0)
    g = variational_backward(np.ones_like(out), cache)
    assert not np.any(g["q"][:, 0]) and all(np.all(np.isfinite(a)) for a in g.values())
    out, _ = variational_forward(**kwargs, mask=mask, empty_row="nan")
    assert np.all(np.isnan(out[:, 0])) and not np.any(np.isnan(out[:, 1:]))
    with pytest.raises(core.errors.ParameterError, match="mask leaves at least one query"):
        variational_forward(**kwargs, mask=mask, empty_row="raise")
    out, cache = variational_forward(**kwargs, mask=mask, empty_row="uniform")
    even, _ = variational_forward(**(kwargs | {"q": 0.0 * kwargs["q"]}))
    np.testing.assert_allclose(out[:, 0], even[:, 0], rtol=0, atol=1e-14)
    np.testing.assert_array_equal(out[:, 1:], variational_forward(**kwargs)[0][:, 1:])
    dout = np.zeros_like(out)
    dout[:, 0] = np.random.default_rng(1).standard_normal(out[:, 0].shape)
    g = variational_backward(dout, cache)
    assert not np.any(g["q"]) and not np.any(g["k"]) and np.any(g["v"])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_shared_values_get_the_sum_of_the_heads(objective):
    kwargs = cases(SPEC)["plain"] | {"objective": objective}
    shared = kwargs | {"v": kwargs["v"][0]}
    out, cache = variational_forward(**shared)
    g = variational_backward(np.ones_like(out) * [[[1.0]], [[-2.0]]], cache)
    copied = kwargs | {"v": np.stack([kwargs["v"][0]] * 2)}
    out, cache = variational_forward(**copied)
    want = variational_backward(np.ones_like(out) * [[[1.0]], [[-2.0]]], cache)
    np.testing.assert_allclose(g["v"], want["v"].sum(axis=0), rtol=0, atol=1e-14)
    np.testing.assert_allclose(g["w"], want["w"], rtol=0, atol=1e-14)


def test_a_bias_of_minus_infinity_hides():
    kwargs = cases(SPEC)["plain"]
    bias = np.zeros((5, 6))
    bias[1], bias[2, 3] = -np.inf, -np.inf
    mask = bias == 0
    for objective in OBJECTIVES:
        given = kwargs | {"objective": objective}
        out, cache = variational_forward(**given, bias=bias)
        want, _ = variational_forward(**given, mask=mask)
        np.testing.assert_allclose(out, want, rtol=0, atol=1e-15)
        assert np.all(np.isfinite(variational_backward(np.ones_like(out), cache)["v"]))


def test_a_decoder_with_nan_poisons_everything():
    kwargs = cases(SPEC)["plain"]
    w = kwargs["w"].copy()
    w[0, 0] = np.inf
    out, cache = variational_forward(**(kwargs | {"w": w}))
    assert np.all(np.isnan(out))
    assert not any(np.any(g) for g in variational_backward(np.ones_like(out), cache).values())


# ------------------------------------------------------------------------------ the bound


def tables(rng, lead=(3,), T=2, S=4):
    z, r, loglik = (rng.standard_normal((*lead, T, S)) for _ in range(3))
    return {"z": z, "r": r, "loglik": loglik - 1.0}


def test_bound_by_hand():
    """rho = (1/2, 1/2): gain = (ln 9/8, ln 1/8), B = ln 3/8, dr = (ln 3)/2, dz = rho - p."""
    L = math.log(3)
    z, loglik = np.array([[L, 0.0]]), np.log([[0.75, 0.25]])
    bound, cache = elbo_forward(z, np.zeros((1, 2)), loglik)
    np.testing.assert_allclose(bound, [math.log(3 / 8)], rtol=1e-15)
    g = elbo_backward(np.array([2.0]), cache)
    np.testing.assert_allclose(g["r"], [[L, -L]], rtol=1e-14)
    np.testing.assert_allclose(g["z"], [[-0.5, 0.5]], rtol=1e-15)
    np.testing.assert_allclose(g["loglik"], [[1.0, 1.0]], rtol=1e-15)


def test_bound_is_tight_at_the_posterior_and_loses_the_divergence_elsewhere():
    t = tables(np.random.default_rng(0))
    logp = t["z"] - np.log(np.sum(np.exp(t["z"]), axis=-1, keepdims=True))
    exact = np.log(np.sum(np.exp(logp + t["loglik"]), axis=-1))
    posterior = t["z"] + t["loglik"]
    bound, cache = elbo_forward(t["z"], posterior, t["loglik"])
    np.testing.assert_allclose(bound, exact, rtol=0, atol=1e-14)
    np.testing.assert_allclose(elbo_backward(np.ones_like(bound), cache)["r"], 0.0, atol=1e-15)
    bound, _ = elbo_forward(**t)
    q = np.exp(t["r"]) / np.sum(np.exp(t["r"]), axis=-1, keepdims=True)
    right = np.exp(logp + t["loglik"] - exact[..., None])
    gap = np.sum(q * np.log(q / right), axis=-1)
    np.testing.assert_allclose(exact - bound, gap, rtol=1e-12)


def test_bound_at_the_prior_is_hard_attention():
    """And its gradients of the prior's scores are those of both networks together."""
    L, kwargs = two_keys()
    hard, cache = variational_forward(**kwargs, scale=1.0, objective="hard")
    z, loglik = np.array([[L, 0.0]]), cache.loglik[None, :, 0]
    bound, _ = elbo_forward(z, z, loglik)
    np.testing.assert_allclose(bound, hard[:, 0], rtol=1e-15)


def test_without_weight_the_divergence_does_not_count():
    t = tables(np.random.default_rng(1))
    bound, cache = elbo_forward(**t, weight=0.0)
    np.testing.assert_allclose(bound, np.sum(cache.q * t["loglik"], axis=-1), rtol=1e-14)
    assert not np.any(elbo_backward(np.ones_like(bound), cache)["z"])


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_gradients_of_the_bound_three_ways(weight):
    rng = np.random.default_rng(2)
    mask = rng.random((3, 2, 4)) < 0.7
    mask[0, 0] = False
    t = tables(rng)

    def bound(**arrays):
        return elbo_forward(**arrays, weight=weight, mask=mask)[0]

    out, cache = elbo_forward(**t, weight=weight, mask=mask)
    assert out[0, 0] == 0.0
    dbound = rng.standard_normal(out.shape)
    hand = elbo_backward(dbound, cache)
    tape = engine.vjp(bound, t)[1](dbound)
    step = engine.complex_gradient(bound, t, dbound, list(t))
    for name in t:
        np.testing.assert_allclose(hand[name], tape[name], rtol=0, atol=4e-15)
        np.testing.assert_allclose(hand[name], step[name], rtol=0, atol=4e-15)
        assert not np.any(hand[name][~mask])


def test_hidden_entries_of_the_tables_do_nothing():
    t = tables(np.random.default_rng(3))
    mask = np.ones((3, 2, 4), bool)
    mask[..., 1] = False
    bound, _ = elbo_forward(**t, mask=mask)
    fewer, _ = elbo_forward(**{n: a[..., [0, 2, 3]] for n, a in t.items()})
    np.testing.assert_allclose(bound, fewer, rtol=0, atol=1e-15)
    t["loglik"][..., 1] = np.nan
    again, cache = elbo_forward(**t, mask=mask)
    np.testing.assert_array_equal(again, bound)
    assert np.all(np.isfinite(elbo_backward(np.ones_like(bound), cache)["r"]))


# ------------------------------------------------------------------------------ by samples


@pytest.mark.parametrize("baseline", [0.0, -1.2])
@pytest.mark.parametrize("weight", [1.0, 0.4])
def test_samples_estimate_the_bound_and_its_gradients(baseline, weight):
    """Within five standard errors, estimated from 400 batches of samples."""
    t = tables(np.random.default_rng(4), lead=(), T=3, S=3)
    mask = np.array([[True] * 3, [True, False, True], [False] * 3])
    exact, cache = elbo_forward(**t, weight=weight, mask=mask)
    want = elbo_backward(np.ones_like(exact), cache) | {"bound": exact}
    rng, drawn = np.random.default_rng(5), []
    for _ in range(400):
        bound, g = reinforce(
            rng, **t, baseline=np.full(3, baseline), samples=25, weight=weight, mask=mask
        )
        drawn.append(g | {"bound": bound})
    for name in want:
        x = np.array([one[name] for one in drawn])
        error = np.std(x, axis=0) / math.sqrt(len(x))
        assert np.all(np.abs(np.mean(x, axis=0) - want[name]) <= 5 * error + 1e-12), name
    assert np.std([one["r"] for one in drawn], axis=0)[0].min() > 0
    np.testing.assert_array_equal(drawn[0]["z"], want["z"])
    assert drawn[0]["bound"][2] == 0.0 and not np.any(drawn[0]["r"][2])


def test_one_sample_by_hand():
    """One key was drawn: dloglik is its one-hot row, dr = (reward - baseline) (hot - q) - ..."""
    t = tables(np.random.default_rng(6), lead=(), T=1, S=3)
    t["r"] = t["z"]  # no divergence
    bound, g = reinforce(np.random.default_rng(0), **t, baseline=np.array([0.25]))
    hot = g["loglik"][0]
    assert sorted(hot) == [0.0, 0.0, 1.0]
    p = np.exp(t["z"][0]) / np.sum(np.exp(t["z"][0]))
    reward = t["loglik"][0] @ hot
    np.testing.assert_allclose(bound, [reward], rtol=0, atol=1e-15)
    np.testing.assert_allclose(g["r"][0], (reward - 0.25) * (hot - p), rtol=0, atol=1e-14)
    chosen = int(np.sum(np.cumsum(p) <= np.random.default_rng(0).random((1, 1, 1)).item()))
    assert hot[chosen] == 1.0


def test_a_baseline_at_the_reward_leaves_no_variance():
    t = tables(np.random.default_rng(7), lead=())
    t["loglik"] = np.full_like(t["loglik"], -0.7)
    exact, cache = elbo_forward(**t)
    bound, g = reinforce(np.random.default_rng(0), **t, baseline=-0.7)
    np.testing.assert_allclose(bound, exact, rtol=0, atol=1e-15)
    np.testing.assert_allclose(
        g["r"], elbo_backward(np.ones_like(exact), cache)["r"], rtol=0, atol=1e-15
    )


def test_samples_keep_float32():
    t = {n: a.astype(np.float32) for n, a in tables(np.random.default_rng(8)).items()}
    bound, g = reinforce(np.random.default_rng(0), **t, samples=3)
    assert {bound.dtype, *(a.dtype for a in g.values())} == {np.dtype(np.float32)}


def test_relaxed_is_soft_with_noise():
    kwargs = {n: a for n, a in cases(SPEC)["plain"].items() if n != "objective"}
    out, cache = relaxed(np.random.default_rng(3), **kwargs, temperature=0.5)
    noise = np.random.default_rng(3).gumbel(size=(2, 5, 6))
    bent = kwargs | {"bias": noise / 0.5, "scale": 1.4, "objective": "soft"}
    want, want_cache = variational_forward(**bent)
    np.testing.assert_array_equal(out, want)
    g, h = (variational_backward(np.ones_like(out), c) for c in (cache, want_cache))
    for name in h:
        np.testing.assert_array_equal(g[name], h[name])


def test_relaxed_samples_become_draws_from_the_prior():
    q, k = np.ones((4000, 1)), np.array([[math.log(3)], [0.0], [math.log(4)]])
    v, w = np.ones((3, 1)), np.ones((1, 2))
    _, cache = relaxed(np.random.default_rng(0), q, k, v, w, temperature=1e-3, scale=1.0)
    assert np.mean(np.max(cache.p, axis=-1) > 0.999) > 0.97
    share = np.mean(cache.p, axis=0)
    error = np.sqrt(0.25 / 4000)
    np.testing.assert_allclose(share, [3 / 8, 1 / 8, 4 / 8], rtol=0, atol=5 * error)


# ------------------------------------------------------------------------------ the door


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"objective": "elbo"}, core.errors.ParameterError, "objective is 'elbo', expected one of"),
        ({"w": np.ones((4, 2))}, core.errors.ShapeError, "w has E = 4 .* expected 3 as in v"),
        ({"w": np.ones(3)}, core.errors.ShapeError, "w has shape"),
        ({"scale": math.nan}, core.errors.ParameterError, "scale is nan"),
    ],
)
def test_errors_name_argument_and_expectation(change, error, says):
    with pytest.raises(error, match=says):
        variational_forward(**(cases(SPEC)["plain"] | change))


def test_a_joint_that_is_too_large_is_refused():
    wide = np.broadcast_to(np.float64(0.0), (4000, 1))
    with pytest.raises(core.errors.MemoryLimitError, match="the joint probabilities"):
        variational_forward(wide, wide, wide, np.ones((1, 100)))


def test_the_other_doors():
    t = tables(np.random.default_rng(0))
    rng = np.random.default_rng(0)
    with pytest.raises(core.errors.ShapeError, match="r has S = 3"):
        elbo_forward(t["z"], t["r"][..., :3], t["loglik"])
    with pytest.raises(core.errors.ShapeError, match="mask has shape"):
        elbo_forward(**t, mask=np.ones((3, 5), bool))
    with pytest.raises(core.errors.ParameterError, match="weight is -1"):
        elbo_forward(**t, weight=-1.0)
    with pytest.raises(core.errors.ShapeError, match="dbound has shape"):
        elbo_backward(t["z"], elbo_forward(**t)[1])
    with pytest.raises(core.errors.DTypeError, match="rng is a int"):
        reinforce(0, **t)
    with pytest.raises(core.errors.ParameterError, match="samples is 0"):
        reinforce(rng, **t, samples=0)
    kwargs = {n: a for n, a in cases(SPEC)["plain"].items() if n in ("q", "k", "v", "w")}
    with pytest.raises(core.errors.ParameterError, match="temperature is 0"):
        relaxed(rng, **kwargs, temperature=0.0)
    with pytest.raises(core.errors.DTypeError, match="rng is a NoneType"):
        relaxed(None, **kwargs)
    out, cache = variational_forward(**cases(SPEC)["plain"])
    with pytest.raises(core.errors.ShapeError, match="dout has shape"):
        variational_backward(out[0], cache)


@pytest.mark.oracle
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("case", ["plain", "mask", "bias", "causal"])
def test_pytorch_agrees(case, objective):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")
    kwargs = cases(SPEC)[case] | {"objective": objective}
    given = {
        n: torch.tensor(a, requires_grad=True)
        for n, a in kwargs.items()
        if isinstance(a, np.ndarray) and a.dtype.kind == "f"
    }
    z = given["q"] @ given["k"].mT * kwargs["scale"] + given.get("bias", 0.0)
    live = torch.tensor(np.broadcast_to(kwargs.get("mask", True), z.shape).copy())
    if kwargs.get("causal"):
        live = torch.ones(z.shape, dtype=torch.bool).tril(z.shape[-1] - z.shape[-2])
    alive = live.any(dim=-1, keepdim=True)
    logp = torch.where(live | ~alive, z, -torch.inf).log_softmax(dim=-1)
    if objective == "soft":
        theirs = torch.log_softmax((logp.exp() @ given["v"]) @ given["w"], dim=-1)
    else:
        loglik = torch.log_softmax(given["v"] @ given["w"], dim=-1)
        if objective == "exact":
            theirs = torch.logsumexp(logp[..., None] + loglik[..., None, :, :], dim=-2)
        else:
            theirs = logp.exp() @ loglik
    theirs = torch.where(alive, theirs, 0.0)
    out, cache = variational_forward(**kwargs)
    np.testing.assert_allclose(out, theirs.detach().numpy(), rtol=0, atol=5e-15)
    dout = np.random.default_rng(5).standard_normal(out.shape)
    theirs.backward(torch.tensor(dout))
    for name, g in variational_backward(dout, cache).items():
        np.testing.assert_allclose(g, given[name].grad.numpy(), rtol=0, atol=3e-14)
