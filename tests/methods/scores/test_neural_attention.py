"""Neural attention: slow loop on the glued pair, worked example, identities, limits, oracle."""

import math

import numpy as np
import pytest

import attention_ref
from attention_ref import core
from attention_ref.kit.checks import cases
from attention_ref.methods.scores.neural_attention import (
    neural_attention_backward,
    neural_attention_forward,
)

SPEC = attention_ref.get("scores/neural_attention")
DOT = attention_ref.get("scores/dot_product")
NETWORK = ("Pq", "Pk", "W1", "W2", "w3", "b1", "b2")


def slow_neural_attention(
    q, k, v, Pq, Pk, W1, W2, w3, b1=None, b2=None, mask=None, causal=False, align="lower_right",
    softcap=None, bias=None,
):  # fmt: skip
    """One number at a time; the pair is glued together and goes through the layers."""
    network = [Pq, Pk, W1, W2, w3]
    lead = np.broadcast_shapes(
        q.shape[:-2], k.shape[:-2], v.shape[:-2], *(x.shape[:-2] for x in network[:4]),
        w3.shape[:-1],
    )  # fmt: skip
    T, D, S, Dk, E = (*q.shape[-2:], *k.shape[-2:], v.shape[-1])
    R, M, N = Pq.shape[-1], W1.shape[-1], W2.shape[-1]
    b1 = np.zeros(M) if b1 is None else b1
    b2 = np.zeros(N) if b2 is None else b2
    Pq, Pk, W1, W2 = (np.broadcast_to(x, (*lead, *x.shape[-2:])) for x in network[:4])
    w3, b1, b2 = (np.broadcast_to(x, (*lead, x.shape[-1])) for x in (w3, b1, b2))
    q = np.broadcast_to(q, (*lead, T, D))
    k = np.broadcast_to(k, (*lead, S, Dk))
    v = np.broadcast_to(v, (*lead, S, E))
    mask = None if mask is None else np.broadcast_to(mask, (*lead, T, S))
    bias = None if bias is None else np.broadcast_to(bias, (*lead, T, S))
    first = S - T if align == "lower_right" else 0
    out = np.zeros((*lead, T, E))
    for at in np.ndindex(*lead):
        for t in range(T):
            weight = {}
            for s in range(S):
                if causal and s > t + first:
                    continue
                if mask is not None and not mask[at][t, s]:
                    continue
                pair = [
                    math.fsum(float(q[at][t, d]) * float(Pq[at][d, i]) for d in range(D))
                    for i in range(R)
                ]
                pair += [
                    math.fsum(float(k[at][s, d]) * float(Pk[at][d, i]) for d in range(Dk))
                    for i in range(R)
                ]
                z = 0.0
                hidden = []
                for m in range(M):
                    x = float(b1[at][m])
                    for i in range(2 * R):
                        x += pair[i] * float(W1[at][i, m])
                    hidden.append(max(x, 0.0))
                for n in range(N):
                    y = float(b2[at][n])
                    for m in range(M):
                        y += hidden[m] * float(W2[at][m, n])
                    z += max(y, 0.0) * float(w3[at][n])
                if softcap is not None:
                    z = softcap * math.tanh(z / softcap)
                if bias is not None:
                    z += float(bias[at][t, s])
                weight[s] = math.exp(z)
            total = math.fsum(weight.values())
            for e in range(E):
                mixed = math.fsum(w * float(v[at][s, e]) for s, w in weight.items())
                out[at][t, e] = mixed / total if weight else 0.0
    return out


@pytest.mark.parametrize("case", cases(SPEC))
def test_equals_the_slow_loop(case):
    kwargs = cases(SPEC)[case]
    out, _ = neural_attention_forward(**kwargs)
    np.testing.assert_allclose(out, slow_neural_attention(**kwargs), rtol=0, atol=1e-14)


@pytest.mark.parametrize("without", [("b1",), ("b2",), ("b1", "b2")])
def test_biases_are_zero_when_left_out(without):
    kwargs = cases(SPEC)["plain"]
    bare = {n: x for n, x in kwargs.items() if n not in without}
    zero = kwargs | {n: np.zeros_like(kwargs[n]) for n in without}
    out, cache = neural_attention_forward(**bare)
    same, filled = neural_attention_forward(**zero)
    np.testing.assert_array_equal(out, same)
    np.testing.assert_allclose(out, slow_neural_attention(**bare), rtol=0, atol=1e-14)
    g, want = (neural_attention_backward(np.ones_like(out), c) for c in (cache, filled))
    assert set(want) - set(g) == set(without)
    for n, x in g.items():
        np.testing.assert_array_equal(x, want[n])


L2 = math.log(2.0)
ROUND = {
    "q": np.array([[1.0]]),
    "k": np.array([[0.0], [2.0], [3.0]]),
    "v": np.array([[0.0], [0.0], [4.0]]),
    "Pq": np.ones((1, 1)),
    "Pk": np.ones((1, 1)),
    "W1": np.array([[1.0, -1.0], [-1.0, 1.0]]),
    "W2": np.eye(2),
    "w3": np.array([-L2, -L2]),
}
"""relu(q - k) + relu(k - q) = |q - k| = 1, 1, 2: the weights stand as 1/2, 1/2, 1/4."""


def test_worked_example_forward():
    out, cache = neural_attention_forward(**ROUND)
    np.testing.assert_allclose(cache.x[0], [[1, -1], [-1, 1], [-2, 2]], rtol=1e-15)
    np.testing.assert_allclose(cache.capped, [[-L2, -L2, -2 * L2]], rtol=1e-15)
    np.testing.assert_allclose(cache.p, [[0.4, 0.4, 0.2]], rtol=1e-15)
    np.testing.assert_allclose(cache.lse, [math.log(1.25)], rtol=1e-14)
    np.testing.assert_allclose(out, [[0.8]], rtol=1e-15)


def test_worked_example_backward():
    """dz = p (v - o) = (-0.32, -0.32, 0.64); dg = -ln 2 dz, through the open relus only."""
    out, cache = neural_attention_forward(**ROUND, b1=np.zeros(2), b2=np.zeros(2))
    g = neural_attention_backward(np.ones_like(out), cache)
    want = {
        "v": np.array([[0.4], [0.4], [0.2]]),
        "w3": np.array([-0.32, -0.32 + 2 * 0.64]),
        "W2": np.array([[0.32, 0.0], [0.0, 0.32 - 2 * 0.64]]) * L2,
        "b2": np.array([0.32, 0.32 - 0.64]) * L2,
        "b1": np.array([0.32, 0.32 - 0.64]) * L2,
        "q": np.array([[0.64]]) * L2,
        "k": np.array([[-0.32], [0.32], [-0.64]]) * L2,
        "Pq": np.array([[0.64]]) * L2,
        "Pk": np.array([[2 * 0.32 - 3 * 0.64]]) * L2,
        "W1": np.array([[0.32, -0.32], [0.0, 2 * 0.32 - 3 * 0.64]]) * L2,
    }
    assert set(g) == set(want)
    for n, x in want.items():
        np.testing.assert_allclose(g[n], x, rtol=1e-13, atol=1e-16)


def test_no_read_out_is_the_mean():
    kwargs = cases(SPEC)["mask"]
    flat, cache = neural_attention_forward(**(kwargs | {"w3": np.zeros(2)}))
    same = {n: kwargs[n] for n in ("q", "k", "v", "mask")}
    mean, _ = DOT.forward(**same, scale=0.0)
    np.testing.assert_allclose(flat, mean, rtol=0, atol=1e-15)
    g = neural_attention_backward(np.ones_like(flat), cache)
    assert np.any(g["w3"]) and not any(np.any(g[n]) for n in ("q", "k", "W1", "W2"))


def test_the_score_sees_the_reduced_pair_only():
    """What Pq removes from a query changes nothing; its gradient there is zero."""
    kwargs = cases(SPEC)["plain"]
    out, cache = neural_attention_forward(**kwargs)
    blind = np.linalg.svd(kwargs["Pq"].T)[2][2:]  # two directions that Pq maps to zero
    moved, _ = neural_attention_forward(**(kwargs | {"q": kwargs["q"] + blind.sum(axis=0)}))
    np.testing.assert_allclose(moved, out, rtol=0, atol=1e-14)
    dq = neural_attention_backward(np.ones_like(out), cache)["q"]
    np.testing.assert_allclose(dq @ blind.T, 0, rtol=0, atol=1e-15)


def test_biases_of_the_reductions_fold_into_the_first_layer():
    """[q Pq + bq; k Pk + bk] W1 + b1 = [q Pq; k Pk] W1 + ([bq; bk] W1 + b1), and b3 is a constant.

    The code's network, layer by layer on the glued pair.
    """
    rng = np.random.default_rng(3)
    kwargs = cases(SPEC)["no-heads"]
    q, k, Pq, Pk, W1, W2, w3, b1, b2 = (
        kwargs[n] for n in ("q", "k", "Pq", "Pk", "W1", "W2", "w3", "b1", "b2")
    )
    bq, bk, b3 = rng.standard_normal(2), rng.standard_normal(2), 0.7
    T, S = len(q), len(k)
    pair = np.concatenate(
        [np.repeat((q @ Pq + bq)[:, None], S, 1), np.repeat((k @ Pk + bk)[None], T, 0)], axis=-1
    )
    u = np.maximum(pair @ W1 + b1, 0)
    z = np.maximum(u @ W2 + b2, 0) @ w3 + b3
    want = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    folded = np.concatenate([bq, bk]) @ W1 + b1
    _, cache = neural_attention_forward(**(kwargs | {"b1": folded}))
    np.testing.assert_allclose(cache.p, want, rtol=0, atol=1e-15)


def test_hidden_units_may_be_permuted_and_scaled():
    """relu(c x) = c relu(x) for c > 0: a layer may be scaled up and the next one down."""
    kwargs = cases(SPEC)["softcap"]
    out, _ = neural_attention_forward(**kwargs)
    order, c = np.array([2, 0, 1]), np.array([0.5, 2.0, 4.0])
    other = {"W1": c * kwargs["W1"][:, order], "b1": c * kwargs["b1"][order]}
    other["W2"] = kwargs["W2"][order] / c[:, None]
    same, _ = neural_attention_forward(**(kwargs | other))
    np.testing.assert_allclose(same, out, rtol=0, atol=1e-14)


def test_a_closed_unit_has_no_gradient():
    """The input of a unit below zero for every pair: its row and column get exactly zero."""
    kwargs = cases(SPEC)["plain"]
    b1 = kwargs["b1"].copy()
    b1[1] = -100.0
    out, cache = neural_attention_forward(**(kwargs | {"b1": b1}))
    g = neural_attention_backward(np.ones_like(out), cache)
    assert not np.any(g["W1"][:, 1]) and not np.any(g["W2"][1]) and g["b1"][1] == 0
    assert np.any(g["W1"][:, 0])


def test_a_kink_passes_nothing():
    """At x = 0 and at y = 0 the derivative of the relu is taken as 0."""
    one = np.ones((1, 1))
    kwargs = {"q": one, "k": np.array([[-1.0], [1.0]]), "v": np.array([[0.0], [1.0]])}
    kwargs |= {"Pq": one, "Pk": one, "W1": np.ones((2, 1)), "W2": one, "w3": np.ones(1)}
    for b in ({"b2": np.ones(1)}, {"b1": np.ones(1), "b2": -np.ones(1)}):  # x or y = (0, 2)
        out, cache = neural_attention_forward(**kwargs, **b)
        g = neural_attention_backward(np.ones_like(out), cache)
        assert g["k"][0, 0] == 0 and g["k"][1, 0] != 0


def test_keys_of_another_width_and_a_network_for_each_head():
    """Dk = 3; q, k, v without a head axis, two networks: two heads come out, gradients add up."""
    rng = np.random.default_rng(4)
    one, heads = cases(SPEC)["no-heads"], cases(SPEC)["batch"]
    base = {"q": one["q"], "k": one["k"][:, :3], "v": one["v"]}
    network = {n: heads[n] for n in NETWORK} | {"Pk": heads["Pk"][:, :3]}
    out, cache = neural_attention_forward(**base, **network)
    assert out.shape == (2, 5, 3)
    dout = rng.standard_normal(out.shape)
    g = neural_attention_backward(dout, cache)
    parts = []
    for h in range(2):
        mine = {n: x[h] for n, x in network.items()}
        single, c = neural_attention_forward(**base, **mine)
        np.testing.assert_allclose(single, out[h], rtol=0, atol=1e-15)
        np.testing.assert_allclose(single, slow_neural_attention(**base, **mine), atol=1e-14)
        parts.append(neural_attention_backward(dout[h], c))
    for n in "qkv":
        np.testing.assert_allclose(g[n], parts[0][n] + parts[1][n], rtol=0, atol=1e-14)
    for n in NETWORK:
        np.testing.assert_allclose(g[n], [x[n] for x in parts], rtol=0, atol=1e-14)


def test_a_poisoned_row_sends_nothing_back():
    kwargs = cases(SPEC)["plain"] | {"bias": np.random.default_rng(7).standard_normal((2, 5, 6))}
    bad = {"q": kwargs["q"].copy(), "bias": kwargs["bias"].copy()}
    bad["q"][1, 2, 0] = bad["bias"][0, 3, 1] = np.nan
    out, cache = neural_attention_forward(**(kwargs | bad))
    assert np.all(np.isnan(out[1, 2])) and np.all(np.isnan(out[0, 3]))
    assert np.sum(np.isnan(out)) == 6 and np.sum(np.isnan(cache.lse)) == 2
    dout = np.random.default_rng(6).standard_normal(out.shape)
    g = neural_attention_backward(dout, cache)
    dout[1, 2] = dout[0, 3] = 0.0
    for n, x in neural_attention_backward(dout, neural_attention_forward(**kwargs)[1]).items():
        np.testing.assert_allclose(g[n], x, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"Pq": np.ones((6, 2))}, core.errors.ShapeError, r"Pq has D = 6 .* expected 4 as in q"),
        ({"Pk": np.ones((4, 3))}, core.errors.ShapeError, r"Pk has R = 3 .* expected 2 as in Pq"),
        ({"W1": np.ones((2, 3))}, core.errors.ShapeError, "W1 has 2 rows, expected 4, twice the"),
        ({"W2": np.ones((2, 2))}, core.errors.ShapeError, r"W2 has M = 2 .* expected 3 as in W1"),
        ({"w3": np.ones(3)}, core.errors.ShapeError, r"w3 has N = 3 .* expected 2 as in W2"),
        ({"b1": np.ones(1)}, core.errors.ShapeError, "b1 has M = 1"),
        ({"b2": np.ones(1)}, core.errors.ShapeError, "b2 has N = 1"),
        ({"bias": np.ones((5, 7))}, core.errors.ShapeError, "bias has shape"),
        ({"align": "lower-right"}, core.errors.ParameterError, "did you mean 'lower_right'"),
        ({"empty_row": "zeros"}, core.errors.ParameterError, "did you mean 'zero'"),
        ({"softcap": 0.0}, core.errors.ParameterError, "softcap is 0.0"),
    ],
)
def test_errors_name_argument_and_expectation(change, error, says):
    with pytest.raises(error, match=says):
        neural_attention_forward(**(cases(SPEC)["plain"] | change))


def test_other_errors():
    kwargs = cases(SPEC)["plain"]
    out, cache = neural_attention_forward(**kwargs)
    with pytest.raises(core.errors.ShapeError, match="dout has shape"):
        neural_attention_backward(out[0], cache)
    long = np.broadcast_to(np.float64(0.0), (1, 8192, 4))
    with pytest.raises(core.errors.MemoryLimitError, match=r"the hidden units .* 2\.5 GiB"):
        neural_attention_forward(**(kwargs | {"q": long, "k": long, "v": long}))


@pytest.mark.oracle
@pytest.mark.parametrize("case", cases(SPEC))
def test_pytorch_agrees(case):
    """As the official module: repeat, glue, three layers, softmax; the gradient by autograd."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")
    kwargs = cases(SPEC)[case]
    out, cache = neural_attention_forward(**kwargs)
    dout = np.random.default_rng(5).standard_normal(out.shape)
    mine = neural_attention_backward(dout, cache)
    given = {n: torch.tensor(kwargs[n], requires_grad=True) for n in mine}
    T, S = kwargs["q"].shape[-2], kwargs["k"].shape[-2]
    low_q = (given["q"] @ given["Pq"]).unsqueeze(-2)
    low_k = (given["k"] @ given["Pk"]).unsqueeze(-3)
    lead = low_q.shape[:-3]
    pair = torch.cat([low_q.expand(*lead, T, S, 2), low_k.expand(*lead, T, S, 2)], dim=-1)
    wide = {n: given[n][..., None, None, :] for n in ("b1", "b2")}
    u = torch.relu(pair @ given["W1"][..., None, :, :] + wide["b1"])
    g = torch.relu(u @ given["W2"][..., None, :, :] + wide["b2"])
    z = torch.einsum("...tsn,...n->...ts", g, given["w3"])
    if "softcap" in kwargs:
        z = kwargs["softcap"] * torch.tanh(z / kwargs["softcap"])
    if "bias" in given:
        z = z + given["bias"]
    rule = {n: kwargs[n] for n in ("mask", "causal", "align") if n in kwargs}
    live = torch.tensor(np.array(core.visible(kwargs["q"], kwargs["k"], **rule)))
    alive = live.any(-1, keepdim=True)
    p = torch.softmax(torch.where(live | ~alive, z, -torch.inf), -1)
    theirs = torch.where(alive, p, 0.0) @ given["v"]
    theirs.backward(torch.tensor(dout))
    np.testing.assert_allclose(out, theirs.detach().numpy(), rtol=0, atol=4e-15)
    for n, x in mine.items():
        np.testing.assert_allclose(x, given[n].grad.numpy(), rtol=0, atol=4e-14)
