"""Selective temperatures: slow loop, worked example, identities, limits, oracle."""

import math

import numpy as np
import pytest

import attention_ref
from attention_ref import core, engine
from attention_ref.kit.checks import cases
from attention_ref.methods.normalizers.selective_temperature import (
    selective_temperature_backward,
    selective_temperature_forward,
)

SPEC = attention_ref.get("normalizers/selective_temperature")

EQUIVALENT = {
    "selective_temperature_forward: 0.0  ->  1.0": "in place of a logit whose rows become NaN",
}


def slow_selective_temperature(
    q, k, v, f_q=None, f_v=None, alpha=None, rate="logistic", mask=None, causal=False,
    align="lower_right", scale=None, softcap=None, bias=None,
):  # fmt: skip
    """One number at a time; n is counted key by key."""
    lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    T, D, S, E = q.shape[-2], q.shape[-1], k.shape[-2], v.shape[-1]
    q = np.broadcast_to(q, (*lead, T, D))
    k = np.broadcast_to(k, (*lead, S, D))
    v = np.broadcast_to(v, (*lead, S, E))
    f_q = np.broadcast_to(np.zeros(1) if f_q is None else f_q, (*lead, T))
    f_v = np.broadcast_to(np.zeros(1) if f_v is None else f_v, (*lead, S))
    a = None if alpha is None else np.broadcast_to(alpha, (*lead, 1))
    mask = None if mask is None else np.broadcast_to(mask, (*lead, T, S))
    bias = None if bias is None else np.broadcast_to(bias, (*lead, T, S))
    c = 1.0 / math.sqrt(D) if scale is None else scale
    first = S - T if align == "lower_right" else 0
    out = np.zeros((*lead, T, E))
    for at in np.ndindex(*lead):
        rho = 0.0
        if a is not None:
            x = float(a[at][0])
            rho = math.exp(-math.exp(x)) if rate == "gumbel" else 1.0 / (1.0 + math.exp(-x))
        for t in range(T):
            seen = []
            for s in range(S):
                if causal and s > t + first:
                    continue
                if mask is None or mask[at][t, s]:
                    seen.append(s)
            if not seen:
                continue
            tau = 1.0 + math.tanh(float(f_q[at][t])) + rho * math.log(len(seen))
            weight = {}
            for s in seen:
                z = math.fsum(float(q[at][t, d]) * float(k[at][s, d]) for d in range(D))
                z *= tau * c
                if softcap is not None:
                    z = softcap * math.tanh(z / softcap)
                if bias is not None:
                    z += float(bias[at][t, s])
                weight[s] = math.exp(z)
            total = math.fsum(weight.values())
            for e in range(E):
                loud = [
                    w * (1.0 + math.tanh(float(f_v[at][s]))) * float(v[at][s, e])
                    for s, w in weight.items()
                ]
                out[at][t, e] = math.fsum(loud) / total
    return out


@pytest.mark.parametrize("case", cases(SPEC))
def test_equals_the_slow_loop(case):
    kwargs = cases(SPEC)[case]
    out, _ = selective_temperature_forward(**kwargs)
    np.testing.assert_allclose(out, slow_selective_temperature(**kwargs), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "kept", [(), ("f_q",), ("f_v",), ("alpha",), ("f_q", "alpha"), ("f_q", "f_v", "alpha")]
)
def test_parts_may_be_left_out(kept):
    """Each part alone: the slow loop, and the gradient by the tape, with both curves of alpha."""
    full = cases(SPEC)["causal"]
    kwargs = {n: x for n, x in full.items() if n in kept or n not in ("f_q", "f_v", "alpha")}
    for rate in ("logistic", "gumbel"):
        given = kwargs | {"rate": rate}
        out, cache = selective_temperature_forward(**given)
        np.testing.assert_allclose(out, slow_selective_temperature(**given), rtol=0, atol=1e-14)
        dout = np.random.default_rng(0).standard_normal(out.shape)
        hand = selective_temperature_backward(dout, cache)
        assert set(hand) == {"q", "k", "v", *kept}
        arrays = {n: kwargs[n] for n in hand}

        def forward(given=given, **x):
            return selective_temperature_forward(**(given | x))[0]

        tape = engine.vjp(forward, arrays)[1](dout)
        for n, g in hand.items():
            np.testing.assert_allclose(g, tape[n], rtol=0, atol=1e-14)


L2, L3 = math.log(2.0), math.log(3.0)

ROUND = {
    "q": np.array([[L2 / L3]]),
    "k": np.array([[1.0], [0.0], [0.0]]),
    "v": np.array([[8.0], [20.0], [0.0]]),
    "f_q": np.array([-math.atanh(0.5)]),
    "f_v": np.array([math.atanh(0.25), -math.atanh(0.5), 0.0]),
    "alpha": np.zeros(1),
}
"""tau = 1 - 1/2 + 1/2 ln 3 with three keys; volumes 5/4, 1/2, 1."""


def test_worked_example_forward():
    """The score of the first key is tau ln 2 / ln 3; loud values 10, 10, 0: out = 10 (p1 + p2)."""
    out, cache = selective_temperature_forward(**ROUND)
    tau = 0.5 + 0.5 * L3
    e = math.exp(tau * L2 / L3)
    np.testing.assert_allclose(cache.tau, [[tau]], rtol=1e-15)
    np.testing.assert_allclose(cache.volume, [[1.25], [0.5], [1.0]], rtol=1e-15)
    np.testing.assert_allclose(cache.p, [[e / (e + 2), 1 / (e + 2), 1 / (e + 2)]], rtol=1e-14)
    np.testing.assert_allclose(cache.lse, [math.log(e + 2)], rtol=1e-14)
    np.testing.assert_allclose(out, [[10 * (e + 1) / (e + 2)]], rtol=1e-14)


def test_worked_example_in_round_numbers():
    """tau = 2 by f alone: scores 2 (1/2 ln 3), weights 3/5, 1/5, 1/5; dz = p (loud - out)."""
    kwargs = ROUND | {"q": np.array([[L3 / 2]]), "f_q": np.array([400.0])}
    del kwargs["alpha"]
    out, cache = selective_temperature_forward(**kwargs, bias=np.zeros((1, 3)))
    np.testing.assert_allclose(cache.p, [[0.6, 0.2, 0.2]], rtol=1e-15)
    np.testing.assert_allclose(out, [[8.0]], rtol=1e-15)
    g = selective_temperature_backward(np.ones_like(out), cache)
    np.testing.assert_allclose(g["bias"], [[1.2, 0.4, -1.6]], rtol=1e-14)
    np.testing.assert_allclose(g["v"], [[0.75], [0.1], [0.2]], rtol=1e-15)
    np.testing.assert_allclose(g["f_v"], [4.8 * (15 / 16), 4.0 * 0.75, 0.0], rtol=1e-14)
    np.testing.assert_allclose(g["q"], [[2 * 1.2]], rtol=1e-14)
    np.testing.assert_allclose(g["k"], L3 * np.array([[1.2], [0.4], [-1.6]]), rtol=1e-14)
    assert g["f_q"][0] == 0  # tanh is flat there


def test_worked_example_backward():
    """dtau = sum_s dz_s score_s, only the first key has a score; then each part of tau."""
    out, cache = selective_temperature_forward(**ROUND)
    g = selective_temperature_backward(np.ones_like(out), cache)
    dz = cache.p[0, 0] * (10 - out.item())
    dtau = dz * L2 / L3
    np.testing.assert_allclose(g["f_q"], [dtau * 0.75], rtol=1e-13)
    np.testing.assert_allclose(g["alpha"], [dtau * L3 * 0.25], rtol=1e-13)
    np.testing.assert_allclose(g["q"], [[dz * cache.tau.item()]], rtol=1e-13)


def test_equals_adaptive_attention_scaling():
    """tanh f = -1 leaves rho ln n, which is ln n / ln 50 for rho = 1 / ln 50."""
    kwargs = cases(SPEC)["causal"]
    other = attention_ref.get("normalizers/adaptive_attention_scaling")
    rho = 1 / math.log(50)
    mine = {n: kwargs[n] for n in ("q", "k", "v", "causal", "scale")}
    alpha = np.array([math.log(rho / (1 - rho))])
    out, cache = selective_temperature_forward(**mine, f_q=np.array([-400.0]), alpha=alpha)
    want, theirs = other.forward(**mine, n_train=50, count="visible")
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-14)
    dout = np.random.default_rng(0).standard_normal(out.shape)
    g, h = selective_temperature_backward(dout, cache), other.backward(dout, theirs)
    for n in ("q", "k", "v"):
        np.testing.assert_allclose(g[n], h[n], rtol=0, atol=1e-14)


def test_temperature_zero_is_the_mean():
    """tanh f = -1 and no length: all visible keys weigh the same."""
    kwargs = cases(SPEC)["plain"] | {"f_q": np.array([-400.0]), "f_v": None, "alpha": None}
    out, _ = selective_temperature_forward(**kwargs)
    mean = np.broadcast_to(kwargs["v"].mean(axis=-2, keepdims=True), out.shape)
    np.testing.assert_allclose(out, mean, rtol=0, atol=1e-15)


def test_a_silent_value_keeps_its_weight():
    """nu = 0: the content is gone, the weight is not; a volume of 1 changes nothing."""
    kwargs = cases(SPEC)["long-queries"]
    f_v = np.zeros((1, 2, 5))
    plain, cache = selective_temperature_forward(**(kwargs | {"f_v": f_v}))
    bare, _ = selective_temperature_forward(**(kwargs | {"f_v": None}))
    np.testing.assert_array_equal(plain, bare)
    f_v[..., 2] = -400.0
    out, silent = selective_temperature_forward(**(kwargs | {"f_v": f_v}))
    np.testing.assert_array_equal(silent.p, cache.p)
    lost = cache.p[..., 2:3] * kwargs["v"][..., 2:3, :]
    np.testing.assert_allclose(out, plain - lost, rtol=0, atol=1e-15)
    g = selective_temperature_backward(np.ones_like(out), silent)
    assert not np.any(g["v"][..., 2, :]) and not np.any(g["f_v"][..., 2])


def test_the_order_of_the_scores_stays():
    """tau > 0 moves no maximum of a row."""
    kwargs = cases(SPEC)["plain"]
    best = [
        np.argmax(selective_temperature_forward(**(kwargs | {"f_q": np.array([f])}))[1].p, -1)
        for f in (-1.0, 0.0, 2.0)
    ]
    assert np.array_equal(best[0], best[1]) and np.array_equal(best[1], best[2])


def test_a_gap_of_one_over_rho_survives_any_length():
    """The first score is ahead by Delta = 1/rho: the others weigh (n - 1) e^-Delta / n."""
    rho = 0.25
    alpha = np.array([math.log(rho / (1 - rho))])
    for n in (10, 1000, 100000):
        k = np.zeros((n, 1))
        k[0] = 4.0
        one = np.ones((1, 1))
        _, cache = selective_temperature_forward(one, k, np.zeros((n, 1)), alpha=alpha)
        rest = (n - 1) / n * math.exp(-4.0)
        np.testing.assert_allclose(cache.p[0, 0], 1 / (1 + rest), rtol=1e-12)


def test_n_counts_what_is_visible():
    """Causal rows count their own keys; a row without keys counts as one."""
    kwargs = cases(SPEC)["causal"] | {"f_q": None}
    _, cache = selective_temperature_forward(**kwargs)
    np.testing.assert_allclose(cache.logs[:, 0], np.log([3, 4, 5, 6, 7]), rtol=1e-15)
    mask = np.ones((5, 7), bool)
    mask[1], mask[4, 2:] = False, False
    _, cache = selective_temperature_forward(**(kwargs | {"mask": mask}))
    np.testing.assert_allclose(cache.logs[:, 0], np.log([3, 1, 5, 6, 2]), rtol=1e-15)


def test_all_four_kinds_of_empty_rows():
    kwargs = cases(SPEC)["plain"]
    mask = np.ones((5, 6), bool)
    mask[2] = False
    out, cache = selective_temperature_forward(**kwargs, mask=mask)
    assert not np.any(out[:, :, 2]) and np.all(np.isneginf(cache.lse[:, :, 2]))
    g = selective_temperature_backward(np.ones_like(out), cache)
    assert not np.any(g["q"][:, :, 2]) and np.all(g["q"][:, :, 1] != 0)
    out, cache = selective_temperature_forward(**kwargs, mask=mask, empty_row="nan")
    assert np.all(np.isnan(out[:, :, 2])) and np.sum(np.isnan(out)) == 6
    assert np.sum(np.isnan(cache.lse)) == 2
    g = selective_temperature_backward(np.ones_like(out), cache)
    assert all(np.all(np.isfinite(x)) for x in g.values())
    out, cache = selective_temperature_forward(**kwargs, mask=mask, empty_row="uniform")
    mean = np.mean(cache.volume * kwargs["v"], axis=-2)
    np.testing.assert_allclose(out[:, :, 2], mean, rtol=0, atol=1e-15)
    with pytest.raises(core.errors.ParameterError, match="mask leaves"):
        selective_temperature_forward(**kwargs, mask=mask, empty_row="raise")


def test_non_finite_logits_poison_what_sees_them():
    """f_q: its row; f_v: the rows that see the value; alpha: its head; nothing flows back."""
    kwargs = cases(SPEC)["causal"] | {"alpha": np.array([[0.3], [-0.2]])}
    clean, same = selective_temperature_forward(**kwargs)
    dout = np.random.default_rng(1).standard_normal(clean.shape)
    for name, place, rows in (
        ("f_q", (1, 2), (slice(0, 1), 1, slice(2, 3))),
        ("f_v", (0, 1, 5), (slice(0, 1), 1, slice(3, 5))),
        ("alpha", (0, 0), (slice(0, 1), 0, slice(0, 5))),
    ):
        for wrong in (np.nan, np.inf):
            bad = kwargs[name].copy()
            bad[place] = wrong
            out, cache = selective_temperature_forward(**(kwargs | {name: bad}))
            want, quiet = clean.copy(), dout.copy()
            want[rows], quiet[rows] = np.nan, 0.0
            np.testing.assert_array_equal(out, want)
            np.testing.assert_array_equal(np.isnan(cache.lse), np.isnan(want[..., 0]))
            found = selective_temperature_backward(dout, cache)
            for n, g in selective_temperature_backward(quiet, same).items():
                np.testing.assert_allclose(found[n], g, rtol=0, atol=1e-14, err_msg=name + n)


def test_a_live_nan_in_the_bias_poisons_its_row():
    kwargs = cases(SPEC)["bias"]
    bad = kwargs["bias"].copy()
    bad[1, 2, 3] = np.nan
    out, cache = selective_temperature_forward(**(kwargs | {"bias": bad}))
    assert np.all(np.isnan(out[0, 1, 2])) and np.sum(np.isnan(out)) == 3
    g = selective_temperature_backward(np.ones_like(out), cache)
    assert all(np.all(np.isfinite(x)) for x in g.values())


def test_logits_of_a_batch_of_their_own():
    """(3, 2) leading axes, all logits with them: the members one by one, gradients too."""
    kwargs = cases(SPEC)["batch"]
    rng = np.random.default_rng(2)
    own = {"f_q": rng.standard_normal((3, 2, 1)), "f_v": rng.standard_normal((3, 2, 5))}
    own["alpha"] = rng.standard_normal((3, 2, 1))
    out, cache = selective_temperature_forward(**(kwargs | own))
    dout = rng.standard_normal(out.shape)
    g = selective_temperature_backward(dout, cache)
    for i in range(3):
        member = kwargs | {n: kwargs[n][i] for n in "qkv"} | {n: x[i] for n, x in own.items()}
        one, c = selective_temperature_forward(**member)
        np.testing.assert_allclose(one, out[i], rtol=0, atol=1e-15)
        for n, x in selective_temperature_backward(dout[i], c).items():
            np.testing.assert_allclose(g[n][i], x, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"f_q": np.ones((2, 4))}, core.errors.ShapeError, "f_q has shape"),
        ({"f_v": np.ones((2, 4))}, core.errors.ShapeError, "f_v has shape"),
        ({"alpha": np.ones((2, 2))}, core.errors.ShapeError, "alpha has 1 = 2"),
        ({"alpha": np.ones((3, 1))}, core.errors.ShapeError, "alpha has"),
        ({"rate": "sigmoid"}, core.errors.ParameterError, "rate is 'sigmoid'"),
        ({"align": "lower-right"}, core.errors.ParameterError, "did you mean 'lower_right'"),
        ({"softcap": 0.0}, core.errors.ParameterError, "softcap is 0.0"),
    ],
)
def test_errors_name_argument_and_expectation(change, error, says):
    with pytest.raises(error, match=says):
        selective_temperature_forward(**(cases(SPEC)["long-queries"] | change))


def test_the_cotangent_is_checked():
    out, cache = selective_temperature_forward(**cases(SPEC)["plain"])
    with pytest.raises(core.errors.ShapeError, match="dout has shape"):
        selective_temperature_backward(out[0], cache)


@pytest.mark.oracle
@pytest.mark.parametrize("case", cases(SPEC))
def test_pytorch_agrees(case):
    """Scores times temperature, values times volume; the gradient by its autograd."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")
    kwargs = cases(SPEC)[case]
    out, cache = selective_temperature_forward(**kwargs)
    dout = np.random.default_rng(5).standard_normal(out.shape)
    mine = selective_temperature_backward(dout, cache)
    given = {n: torch.tensor(kwargs[n], requires_grad=True) for n in mine}
    D = kwargs["q"].shape[-1]
    rule = {n: kwargs[n] for n in ("mask", "causal", "align") if n in kwargs}
    live = torch.tensor(np.array(core.visible(kwargs["q"], kwargs["k"], **rule)))
    tau = 1.0
    if "f_q" in given:
        tau = tau + torch.tanh(given["f_q"]).unsqueeze(-1)
    if "alpha" in given:
        a = given["alpha"].unsqueeze(-1)
        rho = torch.exp(-torch.exp(a)) if kwargs.get("rate") == "gumbel" else torch.sigmoid(a)
        tau = tau + rho * live.sum(-1, keepdim=True).clamp(min=1).double().log()
    z = tau * (given["q"] @ given["k"].transpose(-1, -2)) * kwargs.get("scale", D**-0.5)
    if "softcap" in kwargs:
        z = kwargs["softcap"] * torch.tanh(z / kwargs["softcap"])
    if "bias" in given:
        z = z + given["bias"]
    alive = live.any(-1, keepdim=True)
    p = torch.softmax(torch.where(live | ~alive, z, -torch.inf), -1)
    loud = given["v"]
    if "f_v" in given:
        loud = (1 + torch.tanh(given["f_v"])).unsqueeze(-1) * loud
    theirs = torch.where(alive, p, 0.0) @ loud
    theirs.backward(torch.tensor(dout))
    np.testing.assert_allclose(out, theirs.detach().numpy(), rtol=0, atol=4e-15)
    for n, g in mine.items():
        np.testing.assert_allclose(g, given[n].grad.numpy(), rtol=0, atol=4e-14)
