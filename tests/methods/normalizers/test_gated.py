"""Gated attention: slow loop, worked examples, identities of the five positions, oracle."""

import math

import numpy as np
import pytest

import attention_ref
from attention_ref import core
from attention_ref.kit.checks import cases
from attention_ref.methods.normalizers.gated import POSITIONS, gated_backward, gated_forward

SPEC = attention_ref.get("normalizers/gated")
softmax = attention_ref.get("scores/dot_product")


def slow_gated(
    q, k, v, x, w_g, w_o=None, position="output", mask=None, causal=False, align="lower_right",
    scale=None, softcap=None, bias=None,
):  # fmt: skip
    """One number at a time."""
    lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    T, D, S, E = q.shape[-2], q.shape[-1], k.shape[-2], v.shape[-1]
    rows = S if position in ("key", "value") else T
    C, N = w_g.shape[-2:]
    over = lead[:-1] if position == "projected" else lead
    q = np.broadcast_to(q, (*lead, T, D))
    k = np.broadcast_to(k, (*lead, S, D))
    v = np.broadcast_to(v, (*lead, S, E))
    x = np.broadcast_to(x, (*over, rows, C))
    w_g = np.broadcast_to(w_g, (*over, C, N))
    mask = None if mask is None else np.broadcast_to(mask, (*lead, T, S))
    bias = None if bias is None else np.broadcast_to(bias, (*lead, T, S))
    c = 1.0 / math.sqrt(D) if scale is None else scale
    first = S - T if align == "lower_right" else 0

    def gate(at, row, i, here):
        if here != position:
            return 1.0
        i = 0 if N == 1 else i
        logit = math.fsum(float(x[at][row, j]) * float(w_g[at][j, i]) for j in range(C))
        return 1.0 / (1.0 + math.exp(-logit))

    y = np.zeros((*lead, T, E))
    for at in np.ndindex(*lead):
        for t in range(T):
            grown = {}
            for s in range(S):
                if causal and s > t + first:
                    continue
                if mask is not None and not mask[at][t, s]:
                    continue
                z = c * math.fsum(
                    float(q[at][t, d]) * gate(at, t, d, "query")
                    * float(k[at][s, d]) * gate(at, s, d, "key") for d in range(D)
                )  # fmt: skip
                if softcap is not None:
                    z = softcap * math.tanh(z / softcap)
                grown[s] = math.exp(z if bias is None else z + float(bias[at][t, s]))
            total = math.fsum(grown.values())
            for e in range(E):
                mixed = math.fsum(
                    w / total * float(v[at][s, e]) * gate(at, s, e, "value")
                    for s, w in grown.items()
                )
                y[at][t, e] = mixed * gate(at, t, e, "output")
    if w_o is None:
        return y
    M = w_o.shape[-1]
    w_o = np.broadcast_to(w_o, (*lead, E, M))
    out = np.zeros((*lead[:-1], T, M))
    for at in np.ndindex(*lead[:-1]):
        places = [(*at, h) for h in range(lead[-1])] if lead else [()]
        for t in range(T):
            for m in range(M):
                added = math.fsum(
                    float(y[h][t, e]) * float(w_o[h][e, m]) for h in places for e in range(E)
                )
                out[at][t, m] = added * gate(at, t, m, "projected")
    return out


@pytest.mark.parametrize("case", cases(SPEC))
def test_equals_the_slow_loop(case):
    kwargs = cases(SPEC)[case]
    out, _ = gated_forward(**kwargs)
    np.testing.assert_allclose(out, slow_gated(**kwargs), rtol=0, atol=1e-14)


def drawn(position, N=None, lead=(2, 3), seed=0, w_o=None):
    """Batch of 2 with 3 heads, T = 4, S = 5, D = 4, E = 3, C = 2, M = 6."""
    rng = np.random.default_rng(seed)
    kwargs = core.examples.qkv(rng, lead=lead, T=4, S=5)
    N = {"query": 4, "key": 4, "projected": 6}.get(position, 3) if N is None else N
    rows = 5 if position in ("key", "value") else 4
    front = (2,) if position == "projected" else (2, 1)
    heads = () if position == "projected" else (3,)
    kwargs["x"] = rng.standard_normal((*(front if lead else ()), rows, 2))
    kwargs["w_g"] = rng.standard_normal((*(heads if lead else ()), 2, N))
    if position == "projected" or w_o:
        kwargs["w_o"] = rng.standard_normal((*lead[1:], 3, 6))
    return kwargs | {"position": position}


@pytest.mark.parametrize("lead", [(2, 3), ()])
@pytest.mark.parametrize("N", [None, 1])
@pytest.mark.parametrize("position", POSITIONS)
def test_every_position_in_a_batch_and_its_gradient(position, N, lead):
    from attention_ref import engine

    for w_o in (False, True):
        kwargs = drawn(position, N, lead, w_o=w_o)
        out, cache = gated_forward(**kwargs)
        np.testing.assert_allclose(out, slow_gated(**kwargs), rtol=0, atol=1e-14)
        dout = np.random.default_rng(1).standard_normal(out.shape)
        hand = gated_backward(dout, cache)
        arrays = {n: a for n, a in kwargs.items() if n != "position"}
        _, pull = engine.vjp(lambda **kw: gated_forward(**kw, position=position)[0], arrays)
        for name, g in pull(dout).items():
            np.testing.assert_allclose(hand[name], g, rtol=0, atol=1e-12, err_msg=name)


def board():
    """Two keys with equal weights, values 4 and 12; gates 3/4 and 1/4."""
    return {
        "q": np.zeros((1, 1)), "k": np.array([[1.0], [-1.0]]), "v": np.array([[4.0], [12.0]]),
        "scale": 1.0,
    }  # fmt: skip


def test_worked_example_at_the_output():
    """Mean 8, gate 3/4: 6. dg = 8 * 3/16 = 3/2; dz = 3/4 (1/2)(4 - 8) = -3/2."""
    gate = {"x": np.array([[2.0]]), "w_g": np.array([[math.log(3.0) / 2]])}
    out, cache = gated_forward(**board(), **gate, bias=np.zeros((1, 2)))
    np.testing.assert_allclose(out, [[6.0]], rtol=1e-15)
    np.testing.assert_allclose(cache.gate, [[0.75]], rtol=1e-15)
    np.testing.assert_allclose(cache.lse, [math.log(2.0)], rtol=1e-15)
    g = gated_backward(np.ones((1, 1)), cache)
    np.testing.assert_allclose(g["w_g"], [[3.0]], rtol=1e-14)
    np.testing.assert_allclose(g["x"], [[0.75 * math.log(3.0)]], rtol=1e-14)
    np.testing.assert_allclose(g["v"], [[0.375], [0.375]], rtol=1e-15)
    np.testing.assert_allclose(g["bias"], [[-1.5, 1.5]], rtol=1e-15)
    np.testing.assert_allclose(g["q"], [[-3.0]], rtol=1e-15)
    assert not np.any(g["k"])


def test_worked_example_at_the_values():
    """Gates 3/4 and 1/4: (3 + 3) / 2 = 3; dg = (4 * 3/16, 12 * 3/16) / 2 = (3/8, 9/8)."""
    gate = {"x": np.array([[1.0], [-1.0]]), "w_g": np.array([[math.log(3.0)]])}
    out, cache = gated_forward(**board(), **gate, position="value")
    np.testing.assert_allclose(out, [[3.0]], rtol=1e-15)
    g = gated_backward(np.ones((1, 1)), cache)
    np.testing.assert_allclose(g["w_g"], [[3 / 8 - 9 / 8]], rtol=1e-14)
    np.testing.assert_allclose(g["v"], [[3 / 8], [1 / 8]], rtol=1e-14)


@pytest.mark.parametrize("position", POSITIONS)
def test_gates_of_one_half(position):
    """w_g = 0: half the values, or half the scores."""
    kwargs = drawn(position, w_o=True)
    kwargs["w_g"] = np.zeros_like(kwargs["w_g"])
    out, cache = gated_forward(**kwargs)
    assert np.all(cache.gate == 0.5)
    q, k, v = kwargs["q"], kwargs["k"], kwargs["v"]
    if position in ("query", "key"):
        plain, _ = softmax.forward(q, k, v, scale=0.25)
    else:
        plain = softmax.forward(q, k, v)[0] / 2
    np.testing.assert_allclose(out, np.sum(plain @ kwargs["w_o"], axis=1), rtol=0, atol=1e-14)


def test_head_wise_is_element_wise_with_equal_columns():
    for position in POSITIONS:
        kwargs = drawn(position, 1)
        wide = drawn(position)["w_g"].shape[-1]
        tied = kwargs | {"w_g": np.repeat(kwargs["w_g"], wide, axis=-1)}
        found, want = gated_forward(**tied)[0], gated_forward(**kwargs)[0]
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-15)


def test_one_gate_for_all_tokens_commutes_with_the_mixing():
    """Without x, a gate on the values is one on the outputs; it depends on x only through rows."""
    kwargs = drawn("output")
    fixed = kwargs | {"x": kwargs["x"][:, :, :1]}
    after, _ = gated_forward(**fixed)
    before, _ = gated_forward(**(fixed | {"position": "value"}))
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-15)
    moved = kwargs | {"x": kwargs["x"].copy()}
    moved["x"][:, :, 1] += 1.0
    same = gated_forward(**moved)[0] == gated_forward(**kwargs)[0]
    assert not np.any(same[:, :, 1]) and np.all(np.delete(same, 1, axis=2))


def test_a_gate_of_the_log_sum_exp_is_a_sink():
    """sigma(lse - b) takes what a sink with the logit b takes."""
    kwargs = core.examples.qkv(np.random.default_rng(4))
    _, cache = softmax.forward(**kwargs)
    x = cache.lse[..., None] - 0.3
    out, _ = gated_forward(**kwargs, x=x, w_g=np.ones((1, 1)))
    want, _ = attention_ref.get("normalizers/sink").forward(**kwargs, b=0.3)
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-14)


def test_orders_of_keys_and_queries():
    rng = np.random.default_rng(3)
    for position in POSITIONS:
        kwargs = drawn(position)
        out, _ = gated_forward(**kwargs)
        keys, queries = rng.permutation(5), rng.permutation(4)
        turned = kwargs | {"k": kwargs["k"][..., keys, :], "v": kwargs["v"][..., keys, :]}
        turned["q"] = kwargs["q"][..., queries, :]
        own = keys if position in ("key", "value") else queries
        turned["x"] = kwargs["x"][..., own, :]
        found, _ = gated_forward(**turned)
        np.testing.assert_allclose(found, out[..., queries, :], rtol=0, atol=1e-14)


def test_a_closed_gate_gives_nothing():
    kwargs = drawn("output") | {"x": np.full((4, 2), -500.0), "w_g": np.ones((3, 2, 3))}
    out, cache = gated_forward(**kwargs)
    assert np.max(np.abs(out)) < 1e-300 and np.all(cache.gate >= 0)
    g = gated_backward(np.ones_like(out), cache)
    assert all(np.all(np.abs(a) < 1e-300) for a in g.values())


def test_rows_without_keys():
    for position in POSITIONS:
        kwargs = drawn(position, w_o=position == "output") | {"mask": np.ones((4, 5), bool)}
        kwargs["mask"][2] = False
        clean = kwargs | {"mask": np.ones((4, 5), bool)}
        out, cache = gated_forward(**kwargs)
        assert not np.any(out[..., 2, :])
        np.testing.assert_array_equal(out[..., 1, :], gated_forward(**clean)[0][..., 1, :])
        only = np.zeros_like(out)
        only[..., 2, :] = 1.0
        assert not any(np.any(g) for g in gated_backward(only, cache).values())
        uniform, _ = gated_forward(**kwargs, empty_row="uniform")
        flat = kwargs | {"mask": None, "q": kwargs["q"].copy()}
        flat["q"][..., 2, :] = 0.0
        want, _ = gated_forward(**flat)
        np.testing.assert_allclose(uniform, want, rtol=0, atol=1e-14)
        nan, _ = gated_forward(**kwargs, empty_row="nan")
        assert np.all(np.isnan(nan[..., 2, :])) and not np.any(np.isnan(nan[..., 1, :]))
        with pytest.raises(core.errors.ParameterError, match="mask"):
            gated_forward(**kwargs, empty_row="raise")


def test_non_finite_gates():
    """A NaN token makes its rows NaN, or those that see it; a matrix its head; no gradient."""
    for position in POSITIONS:
        kwargs = drawn(position) | {"mask": np.ones((4, 5), bool)}
        kwargs["mask"][0, 1] = False
        clean, _ = gated_forward(**kwargs)
        x = kwargs["x"].copy()
        x[1, ..., 1, 0] = np.nan
        out, cache = gated_forward(**(kwargs | {"x": x}))
        rows = [1, 2, 3] if position in ("key", "value") else [1]
        bad = np.zeros(out.shape, bool)
        bad[1][..., rows, :] = True
        np.testing.assert_array_equal(np.isnan(out), bad)
        np.testing.assert_array_equal(out[~bad], clean[~bad])
        g = gated_backward(np.ones_like(out), cache)
        assert all(np.all(np.isfinite(a)) for a in g.values())
        if position != "projected":
            w_g = kwargs["w_g"].copy()
            w_g[2, 1, 0] = np.inf
            out, cache = gated_forward(**(kwargs | {"w_g": w_g}))
            assert np.all(np.isnan(out[:, 2])) and np.all(np.isfinite(out[:, :2]))
            g = gated_backward(np.ones_like(out), cache)
            assert all(np.all(np.isfinite(a)) for a in g.values()) and not np.any(g["w_g"][2])
    kwargs = drawn("output", w_o=True)
    kwargs["w_o"][1, 0, 0] = np.nan
    out, cache = gated_forward(**kwargs)
    assert np.all(np.isnan(out))
    assert not any(np.any(a) for a in gated_backward(np.ones_like(out), cache).values())
    kwargs = drawn("output", w_o=True)
    kwargs["q"][0, 1, 2, 0] = np.nan
    out, cache = gated_forward(**kwargs)
    assert np.all(np.isnan(out[0, 2])) and np.sum(np.isnan(out)) == 6
    assert np.isnan(cache.lse[0, 1, 2]) and np.sum(np.isnan(cache.lse)) == 1
    bias = np.zeros((4, 5))
    bias[3, 1] = np.nan
    out, _ = gated_forward(**drawn("output"), bias=bias)
    assert np.all(np.isnan(out[..., 3, :])) and np.all(np.isfinite(out[..., :3, :]))


def test_hidden_tokens_of_gated_keys_and_values():
    for position in ("key", "value"):
        kwargs = drawn(position)
        mask = np.ones((4, 5), bool)
        mask[:, 2] = False
        for bad in (np.nan, np.inf):
            poisoned = {n: kwargs[n].copy() for n in ("k", "v", "x")}
            for a in poisoned.values():
                a[..., 2, :] = bad
            out, cache = gated_forward(**(kwargs | poisoned), mask=mask)
            fewer = {n: np.delete(kwargs[n], 2, axis=-2) for n in ("k", "v", "x")}
            want, hers = gated_forward(**(kwargs | fewer))
            np.testing.assert_allclose(out, want, rtol=0, atol=1e-14)
            mine = gated_backward(np.ones_like(out), cache)
            theirs = gated_backward(np.ones_like(out), hers)
            np.testing.assert_allclose(mine["w_g"], theirs["w_g"], rtol=0, atol=1e-13)
            assert not any(np.any(mine[n][..., 2, :]) for n in ("k", "v", "x"))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"position": "outputs"}, core.errors.ParameterError, "did you mean 'output'"),
        ({"position": "projected"}, core.errors.ParameterError, "w_o is None, expected"),
        ({"w_g": np.ones((2, 2))}, core.errors.ShapeError, r"w_g has shape \(2, 2\), .*2, 3\)"),
        ({"w_g": np.ones((5, 3))}, core.errors.ShapeError, "w_g has C = 5"),
        ({"w_g": np.ones((5, 2, 3))}, core.errors.ShapeError, "w_g has"),
        ({"x": np.ones((5, 2))}, core.errors.ShapeError, "x has shape .* tokens, C"),
        ({"w_o": np.ones((2, 2))}, core.errors.ShapeError, "w_o has E = 2"),
        ({"w_o": np.ones((4, 2, 3, 3, 2))}, core.errors.ShapeError, "w_o has shape"),
        ({"w_o": np.ones((5, 3, 2))}, core.errors.ShapeError, r"w_o has leading axes \(5,\)"),
        ({"position": "query"}, core.errors.ShapeError, "w_g has shape .* N = 1"),
        ({"position": "key"}, core.errors.ShapeError, "x has shape"),
    ],
)
def test_errors_name_argument_and_expectation(change, error, says):
    with pytest.raises(error, match=says):
        gated_forward(**(drawn("output") | change))


def test_a_foreign_cotangent_is_refused():
    out, cache = gated_forward(**drawn("output"))
    with pytest.raises(core.errors.ShapeError, match="dout has shape"):
        gated_backward(out[0], cache)


@pytest.mark.oracle
@pytest.mark.parametrize("case", cases(SPEC))
def test_pytorch_agrees(case):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")
    kwargs = cases(SPEC)[case]
    out, cache = gated_forward(**kwargs)
    dout = np.random.default_rng(5).standard_normal(out.shape)
    mine = gated_backward(dout, cache)
    live = core.visible(kwargs["q"], kwargs["k"], **{
        n: kwargs[n] for n in ("mask", "causal", "align") if n in kwargs
    })  # fmt: skip
    given = {
        n: torch.tensor(a, requires_grad=True)
        for n, a in kwargs.items() if isinstance(a, np.ndarray) and n != "mask"
    }  # fmt: skip
    q, k, v = (given[n] for n in "qkv")
    s, place = torch.sigmoid(given["x"] @ given["w_g"]), kwargs["position"]
    q, k, v = (a * s if place == n else a for n, a in zip(("query", "key", "value"), (q, k, v)))
    z = q @ k.mT * kwargs.get("scale", kwargs["q"].shape[-1] ** -0.5)
    if "softcap" in kwargs:
        z = kwargs["softcap"] * torch.tanh(z / kwargs["softcap"])
    if "bias" in kwargs:
        z = z + given["bias"]
    live = torch.tensor(live)
    p = torch.softmax(z.masked_fill(~live, -1e300), -1) * live
    theirs = p @ v * (s if place == "output" else 1.0)
    if "w_o" in kwargs:
        theirs = torch.einsum("bhte,hem->btm", theirs, given["w_o"])
        theirs = theirs * (s if place == "projected" else 1.0)
    theirs.backward(torch.tensor(dout))
    np.testing.assert_allclose(out, theirs.detach().numpy(), rtol=0, atol=1e-13)
    for n, a in given.items():
        np.testing.assert_allclose(mine[n], a.grad.numpy(), rtol=0, atol=1e-12)
