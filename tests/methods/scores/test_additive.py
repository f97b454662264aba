"""Additive attention: slow loop, worked example, identities, limits, oracle."""

import math

import numpy as np
import pytest

import attention_ref
from attention_ref import core
from attention_ref.kit.checks import cases
from attention_ref.methods.scores.additive import additive_backward, additive_forward

SPEC = attention_ref.get("scores/additive")
DOT = attention_ref.get("scores/dot_product")


def slow_additive(
    q, k, v, Wq, Wk, w, b=None, mask=None, causal=False, align="lower_right", softcap=None,
    bias=None,
):  # fmt: skip
    """One number at a time; the hidden layer is written out for every pair."""
    lead = np.broadcast_shapes(
        q.shape[:-2], k.shape[:-2], v.shape[:-2], Wq.shape[:-2], Wk.shape[:-2], w.shape[:-1],
        () if b is None else b.shape[:-1],
    )  # fmt: skip
    T, D, S, Dk, E, M = (*q.shape[-2:], *k.shape[-2:], v.shape[-1], w.shape[-1])
    q = np.broadcast_to(q, (*lead, T, D))
    k = np.broadcast_to(k, (*lead, S, Dk))
    v = np.broadcast_to(v, (*lead, S, E))
    Wq = np.broadcast_to(Wq, (*lead, D, M))
    Wk = np.broadcast_to(Wk, (*lead, Dk, M))
    w = np.broadcast_to(w, (*lead, M))
    b = np.broadcast_to(np.zeros(M) if b is None else b, (*lead, M))
    mask = None if mask is None else np.broadcast_to(mask, (*lead, T, S))
    bias = None if bias is None else np.broadcast_to(bias, (*lead, T, S))
    first = S - T if align == "lower_right" else 0
    out = np.zeros((*lead, T, E))
    for place in np.ndindex(*lead):
        for t in range(T):
            weight = {}
            for s in range(S):
                if causal and s > t + first:
                    continue
                if mask is not None and not mask[place][t, s]:
                    continue
                z = 0.0
                for m in range(M):
                    x = float(b[place][m])
                    for d in range(D):
                        x += float(q[place][t, d]) * float(Wq[place][d, m])
                    for d in range(Dk):
                        x += float(k[place][s, d]) * float(Wk[place][d, m])
                    z += float(w[place][m]) * math.tanh(x)
                if softcap is not None:
                    z = softcap * math.tanh(z / softcap)
                if bias is not None:
                    z += float(bias[place][t, s])
                weight[s] = math.exp(z)
            total = math.fsum(weight.values())
            for e in range(E):
                mixed = math.fsum(x * float(v[place][s, e]) for s, x in weight.items())
                out[place][t, e] = mixed / total if weight else 0.0
    return out


@pytest.mark.parametrize("case", cases(SPEC))
def test_equals_the_slow_loop(case):
    kwargs = cases(SPEC)[case]
    out, _ = additive_forward(**kwargs)
    np.testing.assert_allclose(out, slow_additive(**kwargs), rtol=0, atol=1e-14)


L2, L3 = math.log(2.0), math.log(3.0)
"""tanh(ln 2) = 3/5 and tanh(ln 3) = 4/5."""

ROUND = {
    "q": np.array([[L2]]),
    "k": np.array([[-2.0 * L2], [L3 - L2]]),
    "v": np.array([[4.0], [8.0]]),
    "Wq": np.array([[1.0]]),
    "Wk": np.array([[1.0]]),
    "w": np.array([L3 / 1.4]),
}
"""The sums are -ln 2 and ln 3, the hidden units -3/5 and 4/5, the scores differ by ln 3."""


def test_worked_example_forward():
    """Scores w (-3/5, 4/5) with 7/5 w = ln 3: weights 1/4 and 3/4, output 7."""
    out, cache = additive_forward(**ROUND)
    np.testing.assert_allclose(cache.u[0, :, 0], [-0.6, 0.8], rtol=1e-15)
    np.testing.assert_allclose(cache.p, [[0.25, 0.75]], rtol=1e-15)
    np.testing.assert_allclose(out, [[7.0]], rtol=1e-15)
    z = L3 / 1.4 * np.array([-0.6, 0.8])
    np.testing.assert_allclose(cache.lse, [math.log(np.sum(np.exp(z)))], rtol=1e-15)


def test_worked_example_backward():
    """dz = p (v - o) = (-3/4, 3/4); slopes 1 - u^2 = 16/25 and 9/25; dpre = dz w (1 - u^2)."""
    out, cache = additive_forward(**ROUND, b=np.zeros(1))
    g = additive_backward(np.ones_like(out), cache)
    w = L3 / 1.4
    dpre = 0.75 * w * np.array([-0.64, 0.36])
    np.testing.assert_allclose(g["v"], [[0.25], [0.75]], rtol=1e-15)
    np.testing.assert_allclose(g["w"], [0.75 * 0.6 + 0.75 * 0.8], rtol=1e-15)
    np.testing.assert_allclose(g["k"][:, 0], dpre, rtol=1e-14)
    np.testing.assert_allclose(g["b"], [dpre.sum()], rtol=1e-14)
    np.testing.assert_allclose(g["q"], [[dpre.sum()]], rtol=1e-14)
    np.testing.assert_allclose(g["Wq"], [[L2 * dpre.sum()]], rtol=1e-14)
    np.testing.assert_allclose(g["Wk"], [[np.sum(dpre * ROUND["k"][:, 0])]], rtol=1e-14)


def test_is_one_layer_on_the_concatenation():
    """w . tanh([q; k] W) with W cut into the rows of the query and the rows of the key."""
    kwargs = cases(SPEC)["no-heads"]
    q, k, v, Wq, Wk, w, b = (kwargs[n] for n in ("q", "k", "v", "Wq", "Wk", "w", "b"))
    both = np.concatenate(
        [np.repeat(q[:, None], 7, 1), np.repeat(k[None], 5, 0)], axis=-1
    )  # (T, S, D + Dk)
    z = np.tanh(both @ np.concatenate([Wq, Wk]) + b) @ w
    _, cache = additive_forward(q, k, v, Wq, Wk, w, b)
    e = np.exp(z)
    np.testing.assert_allclose(cache.p, e / e.sum(-1, keepdims=True), rtol=0, atol=1e-15)


def test_hidden_units_may_be_permuted_and_flipped():
    """The order of the units does not matter; tanh is odd: (-Wq, -Wk, -b, -w) is the same."""
    kwargs = cases(SPEC)["mask"]
    out, _ = additive_forward(**kwargs)
    order = np.random.default_rng(0).permutation(5)
    names = ("Wq", "Wk", "w", "b")
    same, _ = additive_forward(**(kwargs | {n: kwargs[n][..., order] for n in names}))
    np.testing.assert_allclose(same, out, rtol=0, atol=1e-15)
    flipped, _ = additive_forward(**(kwargs | {n: -kwargs[n] for n in names}))
    np.testing.assert_array_equal(flipped, out)


def test_scores_are_bounded_by_the_read_out():
    kwargs = cases(SPEC)["plain"]
    wild = kwargs | {"q": 1e3 * kwargs["q"], "Wk": 1e3 * kwargs["Wk"]}
    _, cache = additive_forward(**wild)
    assert np.max(np.abs(cache.capped)) <= np.sum(np.abs(kwargs["w"])) + 1e-12


def test_small_inputs_make_the_query_irrelevant():
    """tanh x = x + O(x^3): z = (a_t + h_s) w, and a_t w is a constant of the row."""
    kwargs = cases(SPEC)["plain"]
    spread = []
    for h in (1e-1, 1e-2):
        small = kwargs | {n: h * kwargs[n] for n in ("q", "k", "b")}
        p = additive_forward(**small)[1].p
        spread.append(np.max(np.abs(p - p[:, :1])))
    assert 0 < spread[0] < 1e-2
    assert 500 < spread[0] / spread[1] < 2000  # third order


def test_one_array_as_key_and_value_gets_the_sum_of_both_gradients():
    rng = np.random.default_rng(1)
    q, k = rng.standard_normal((4, 3)), rng.standard_normal((5, 3))
    Wq, Wk, w = rng.standard_normal((3, 6)), rng.standard_normal((3, 6)), rng.standard_normal(6)
    dout = rng.standard_normal((4, 3))
    g = additive_backward(dout, additive_forward(q, k, k, Wq, Wk, w)[1])
    step, h = rng.standard_normal(k.shape), 1e-5

    def along(t):
        moved = k + t * h * step
        return np.sum(dout * additive_forward(q, moved, moved, Wq, Wk, w)[0])

    slope = (along(1) - along(-1)) / (2 * h)
    np.testing.assert_allclose(np.sum((g["k"] + g["v"]) * step), slope, rtol=1e-8)


def test_parameters_of_each_head_and_leading_axes():
    """The network of head 1 acts on head 1; values may have a batch of their own."""
    kwargs = cases(SPEC)["batch"]
    out, cache = additive_forward(**kwargs)
    head = {n: a[:, 1] if n in "qkv" else a[1] for n, a in kwargs.items()}
    np.testing.assert_allclose(additive_forward(**head)[0], out[:, 1], rtol=0, atol=1e-15)
    g = additive_backward(np.ones_like(out), cache)
    assert g["Wq"].shape == (2, 4, 5) and g["b"].shape == (2, 5)
    one = cases(SPEC)["no-heads"]
    out, cache = additive_forward(**(one | {"v": np.stack([one["v"], 2 * one["v"]])}))
    np.testing.assert_allclose(out[1], 2 * out[0], rtol=0, atol=1e-15)
    g = additive_backward(np.ones_like(out), cache)
    assert g["q"].shape == (5, 4) and g["v"].shape == (2, 7, 3)


def test_a_network_for_each_head_on_shared_inputs():
    """q, k, v without a head axis, two networks: two heads come out, gradients add up."""
    one, heads = cases(SPEC)["no-heads"], cases(SPEC)["batch"]
    names = ("Wq", "Wk", "w", "b")
    out, cache = additive_forward(**(one | {n: heads[n] for n in names}))
    assert out.shape == (2, 5, 3)
    dout = np.random.default_rng(2).standard_normal(out.shape)
    g = additive_backward(dout, cache)
    parts = []
    for h in range(2):
        single, c = additive_forward(**(one | {n: heads[n][h] for n in names}))
        np.testing.assert_allclose(single, out[h], rtol=0, atol=1e-15)
        parts.append(additive_backward(dout[h], c))
    for n in "qkv":
        np.testing.assert_allclose(g[n], parts[0][n] + parts[1][n], rtol=0, atol=1e-14)
    for n in names:
        np.testing.assert_allclose(g[n], [x[n] for x in parts], rtol=0, atol=1e-14)


def test_options_of_empty_rows_reach_the_weights():
    kwargs = cases(SPEC)["plain"]
    mask = np.ones((5, 6), bool)
    mask[2] = False
    _, cache = additive_forward(**kwargs, mask=mask)
    assert np.all(np.isneginf(cache.lse[:, 2])) and not np.any(cache.p[:, 2])
    out, cache = additive_forward(**kwargs, mask=mask, empty_row="nan")
    assert np.all(np.isnan(cache.lse[:, 2]))
    g = additive_backward(np.ones_like(out), cache)
    assert all(np.all(np.isfinite(x)) for x in g.values())


def test_a_poisoned_row_sends_nothing_back():
    """NaN in one query: that row is NaN, its dq is 0, and all else is as if its dout were 0."""
    kwargs = cases(SPEC)["plain"]
    bad = kwargs["q"].copy()
    bad[1, 2, 0] = np.nan
    out, cache = additive_forward(**(kwargs | {"q": bad}))
    _, same = additive_forward(**kwargs)
    assert np.all(np.isnan(out[1, 2])) and np.sum(np.isnan(out)) == 3
    dout = np.random.default_rng(6).standard_normal(out.shape)
    g = additive_backward(dout, cache)
    dout[1, 2] = 0.0
    for n, x in additive_backward(dout, same).items():
        np.testing.assert_allclose(g[n], x, rtol=0, atol=1e-14)


def test_nan_in_a_live_bias_poisons_its_row_alone():
    kwargs = cases(SPEC)["bias"]
    bad = kwargs["bias"].copy()
    bad[1, 2, 3] = np.nan
    out, cache = additive_forward(**(kwargs | {"bias": bad}))
    clean, _ = additive_forward(**kwargs)
    assert np.all(np.isnan(out[1, 2]))
    g = additive_backward(np.ones_like(out), cache)
    assert all(np.all(np.isfinite(x)) for x in g.values())
    out[1, 2] = clean[1, 2]
    np.testing.assert_array_equal(out, clean)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"Wq": np.ones((6, 5))}, core.errors.ShapeError, r"Wq has D = 6 .* expected 4 as in q"),
        ({"Wk": np.ones((3, 5))}, core.errors.ShapeError, r"Wk has Dk = 3 .* expected 2 as in k"),
        ({"Wk": np.ones((2, 7))}, core.errors.ShapeError, r"Wk has M = 7 .* expected 5 as in Wq"),
        ({"w": np.ones((5, 1))}, core.errors.ShapeError, r"w has M = 1"),
        ({"b": np.ones(1)}, core.errors.ShapeError, r"b has M = 1"),
        ({"bias": np.ones((5, 7))}, core.errors.ShapeError, "bias has shape"),
        ({"mask": np.ones((6, 5), bool)}, core.errors.ShapeError, "looks transposed"),
        ({"align": "lower-right"}, core.errors.ParameterError, "did you mean 'lower_right'"),
        ({"empty_row": "zeros"}, core.errors.ParameterError, "did you mean 'zero'"),
        ({"softcap": 0.0}, core.errors.ParameterError, "softcap is 0.0"),
    ],
)
def test_errors_name_argument_and_expectation(change, error, says):
    with pytest.raises(error, match=says):
        additive_forward(**(cases(SPEC)["plain"] | change))


def test_other_errors():
    kwargs = cases(SPEC)["plain"]
    out, cache = additive_forward(**kwargs)
    with pytest.raises(core.errors.ShapeError, match="dout has shape"):
        additive_backward(out[0], cache)
    q = np.broadcast_to(np.float64(0.0), (1, 8192, 4))  # scores 0.5 GiB, hidden units 2.5 GiB
    with pytest.raises(core.errors.MemoryLimitError, match=r"the hidden units .* 2\.5 GiB"):
        additive_forward(**(kwargs | {"q": q, "k": q[..., :2], "v": q}))


@pytest.mark.oracle
@pytest.mark.parametrize("case", cases(SPEC))
def test_pytorch_agrees(case):
    """Its modules: two linear layers, tanh, softmax; the gradient by its autograd."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")
    kwargs = cases(SPEC)[case]
    out, cache = additive_forward(**kwargs)
    dout = np.random.default_rng(5).standard_normal(out.shape)
    mine = additive_backward(dout, cache)
    given = {n: torch.tensor(kwargs[n], requires_grad=True) for n in mine}
    hidden = given["q"] @ given["Wq"]
    units = given["k"] @ given["Wk"]
    if "b" in given:
        units = units + given["b"].unsqueeze(-2)
    u = torch.tanh(hidden.unsqueeze(-2) + units.unsqueeze(-3))
    z = torch.einsum("...tsm,...m->...ts", u, given["w"])
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
    for n, g in mine.items():
        np.testing.assert_allclose(g, given[n].grad.numpy(), rtol=0, atol=4e-14)


def test_equal_scores_also_under_softcap_and_mask():
    """Constant scores, however made, are dot-product attention with scale 0 on the same mask."""
    kwargs = cases(SPEC)["mask"]
    flat, _ = additive_forward(**(kwargs | {"Wk": 0 * kwargs["Wk"], "softcap": 0.3}))
    mean, _ = DOT.forward(
        kwargs["q"], np.zeros((2, 7, 4)), kwargs["v"], mask=kwargs["mask"], scale=0.0
    )
    np.testing.assert_allclose(flat, mean, rtol=0, atol=1e-15)
