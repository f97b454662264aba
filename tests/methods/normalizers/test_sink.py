"""Sink logit and softmax-off-by-one: slow loop, worked examples, identities, limits, oracle."""

import math

import numpy as np
import pytest

import attention_ref
from attention_ref import core
from attention_ref.kit.checks import cases
from attention_ref.methods.normalizers.sink import sink_backward, sink_forward

SPEC = attention_ref.get("normalizers/sink")
softmax = attention_ref.get("scores/dot_product")


def slow_sink(
    q, k, v, b=0.0, e=None, mask=None, causal=False, align="lower_right", scale=None,
    softcap=None, bias=None,
):  # fmt: skip
    """One number at a time, exponentials without any shift."""
    lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    T, D, S, E = q.shape[-2], q.shape[-1], k.shape[-2], v.shape[-1]
    q = np.broadcast_to(q, (*lead, T, D))
    k = np.broadcast_to(k, (*lead, S, D))
    v = np.broadcast_to(v, (*lead, S, E))
    b = np.broadcast_to(b, lead)
    e = np.broadcast_to(np.zeros(E) if e is None else e, (*lead, E))
    mask = None if mask is None else np.broadcast_to(mask, (*lead, T, S))
    bias = None if bias is None else np.broadcast_to(bias, (*lead, T, S))
    c = 1.0 / math.sqrt(D) if scale is None else scale
    first = S - T if align == "lower_right" else 0
    out = np.zeros((*lead, T, E))
    for place in np.ndindex(*lead):
        for t in range(T):
            grown = {}
            for s in range(S):
                if causal and s > t + first:
                    continue
                if mask is not None and not mask[place][t, s]:
                    continue
                z = c * math.fsum(float(q[place][t, d]) * float(k[place][s, d]) for d in range(D))
                if softcap is not None:
                    z = softcap * math.tanh(z / softcap)
                if bias is not None:
                    z += float(bias[place][t, s])
                grown[s] = math.exp(z)
            taken = math.exp(float(b[place]))
            total = taken + math.fsum(grown.values())
            for x in range(E):
                mixed = math.fsum(w * float(v[place][s, x]) for s, w in grown.items())
                out[place][t, x] = (mixed + taken * float(e[place][x])) / total
    return out


@pytest.mark.parametrize("case", cases(SPEC))
def test_equals_the_slow_loop(case):
    kwargs = cases(SPEC)[case]
    out, _ = sink_forward(**kwargs)
    np.testing.assert_allclose(out, slow_sink(**kwargs), rtol=0, atol=1e-14)


def board():
    """e^z = (1, 2), e^b = 1: weights 1/4, 1/2 and 1/4 for the sink."""
    q, k = np.array([[[2.0]]]), np.array([[[0.0], [math.log(2.0) / 2]]])
    return {"q": q, "k": k, "v": np.array([[[4.0, 0.0], [8.0, -8.0]]])}


def test_worked_example_forward():
    out, cache = sink_forward(**board())
    np.testing.assert_allclose(cache.p, [[[0.25, 0.5]]], rtol=1e-15)
    np.testing.assert_allclose(cache.p_sink, [[0.25]], rtol=1e-15)
    np.testing.assert_allclose(cache.lse, [[math.log(4.0)]], rtol=1e-15)
    np.testing.assert_allclose(out, [[[5.0, -4.0]]], rtol=1e-15)
    out, cache = sink_forward(**board(), b=np.array([math.log(5.0)]), e=np.array([[16.0, 32.0]]))
    np.testing.assert_allclose(cache.p_sink, [[0.625]], rtol=1e-15)
    np.testing.assert_allclose(out, [[[2.5 + 10.0, -2.0 + 20.0]]], rtol=1e-15)


def test_worked_example_backward():
    """dp = (4, 8) for the first column, rho = 1 + 4 = 5: dz = (-1/4, 3/2), db = -5/4."""
    kwargs = board() | {"b": np.array([0.0]), "bias": np.zeros((1, 1, 2))}
    _, cache = sink_forward(**kwargs)
    g = sink_backward(np.array([[[1.0, 0.0]]]), cache)
    np.testing.assert_allclose(g["bias"], [[[-0.25, 1.5]]], rtol=1e-15)
    np.testing.assert_allclose(g["b"], [-1.25], rtol=1e-15)
    np.testing.assert_allclose(g["v"], [[[0.25, 0.0], [0.5, 0.0]]], rtol=1e-15)
    np.testing.assert_allclose(g["k"], [[[-0.5], [3.0]]], rtol=1e-15)
    np.testing.assert_allclose(g["q"], [[[1.5 * math.log(2.0) / 2]]], rtol=1e-15)


def test_worked_example_backward_with_a_value():
    """e = 12: rho = 5 + 3 = 8, dz = (-1, 0), db = (12 - 8)/4 = 1, de = 1/4."""
    kwargs = board() | {"b": np.array([0.0]), "e": np.array([12.0, 0.0])}
    _, cache = sink_forward(**kwargs, bias=np.zeros((1, 1, 2)))
    g = sink_backward(np.array([[[1.0, 0.0]]]), cache)
    np.testing.assert_allclose(g["bias"], [[[-1.0, 0.0]]], rtol=0, atol=1e-14)
    np.testing.assert_allclose(g["b"], [1.0], rtol=1e-14)
    np.testing.assert_allclose(g["e"], [0.25, 0.0], rtol=1e-15)


def test_is_softmax_attention_times_a_gate():
    """out = o sigma(lse - b) with output and log-sum-exp of softmax attention."""
    kwargs = cases(SPEC)["bias"]
    b = kwargs.pop("b")
    out, cache = sink_forward(**kwargs, b=b)
    plain, hers = softmax.forward(**kwargs)
    gate = 1.0 / (1.0 + np.exp(b[:, None] - hers.lse))
    np.testing.assert_allclose(out, plain * gate[..., None], rtol=0, atol=1e-14)
    np.testing.assert_allclose(cache.p_sink, 1.0 - gate, rtol=0, atol=1e-15)
    np.testing.assert_allclose(cache.p.sum(-1), gate, rtol=0, atol=1e-15)
    mine = cache.lse + np.log1p(-cache.p_sink)
    np.testing.assert_allclose(mine, hers.lse, rtol=0, atol=1e-14)


def test_a_shift_of_all_logits_changes_nothing_the_sink_included():
    kwargs = cases(SPEC)["bias"]
    out, cache = sink_forward(**kwargs)
    moved, other = sink_forward(**(kwargs | {"b": kwargs["b"] + 3, "bias": kwargs["bias"] + 3}))
    np.testing.assert_allclose(moved, out, rtol=0, atol=1e-14)
    np.testing.assert_allclose(other.lse, cache.lse + 3, rtol=0, atol=1e-14)
    alone, _ = sink_forward(**(kwargs | {"bias": kwargs["bias"] + 3}))
    assert np.max(np.abs(alone - out)) > 0.1


def test_linear_in_v_without_a_sink_value():
    kwargs = cases(SPEC)["plain"]
    kwargs.pop("e", None)
    other = kwargs["v"] ** 2
    a, c = sink_forward(**kwargs)[0], sink_forward(**(kwargs | {"v": other}))[0]
    both = sink_forward(**(kwargs | {"v": 2 * kwargs["v"] - 3 * other}))[0]
    np.testing.assert_allclose(both, 2 * a - 3 * c, rtol=0, atol=1e-13)


def test_limits_of_the_logit():
    kwargs = cases(SPEC)["mask"]
    kwargs.pop("b")
    plain, hers = softmax.forward(**kwargs)
    out, cache = sink_forward(**kwargs, b=-math.inf)
    np.testing.assert_array_equal(out, plain)
    np.testing.assert_array_equal(cache.lse, hers.lse)
    assert not np.any(cache.p_sink)
    for b in (800.0, 1e4):
        out, cache = sink_forward(**kwargs, b=b)
        assert not np.any(out)
        np.testing.assert_array_equal(cache.p_sink, 1.0)
    out, cache = sink_forward(**kwargs, b=-1e4)
    np.testing.assert_array_equal(out, plain)
    np.testing.assert_array_equal(cache.p_sink[0, 0, 1], 1.0)  # the empty row


def test_off_by_one_is_the_default_and_survives_large_scores():
    """Scores of -2000: exp underflows, the 1 stays, and the output is 0; +2000: the best key."""
    kwargs = board() | {"bias": np.array([[-2000.0, -2001.0]])}
    out, cache = sink_forward(**kwargs)
    np.testing.assert_array_equal(out, 0.0)
    np.testing.assert_array_equal(cache.p_sink, 1.0)
    out, cache = sink_forward(**(kwargs | {"bias": np.array([[2000.0, -2000.0]])}))
    np.testing.assert_array_equal(out, [[[4.0, 0.0]]])
    np.testing.assert_array_equal(cache.p_sink, 0.0)
    zero, _ = sink_forward(**board(), b=np.zeros(1))
    np.testing.assert_array_equal(sink_forward(**board())[0], zero)
    assert "b" not in sink_backward(np.ones((1, 1, 2)), sink_forward(**board())[1])


def test_rows_without_keys():
    kwargs = cases(SPEC)["softcap"] | {"mask": np.ones((5, 6), bool)}
    kwargs["mask"][2] = False
    out, cache = sink_forward(**kwargs)
    np.testing.assert_array_equal(out[0, :, 2], kwargs["e"])
    np.testing.assert_array_equal(cache.lse[0, :, 2], kwargs["b"])
    dout = np.random.default_rng(0).standard_normal(out.shape)
    g = sink_backward(dout, cache)
    assert not np.any(g["q"][..., 2, :]) and not np.any(g["bias"][..., 2, :])
    without = {n: a for n, a in kwargs.items() if n != "e"}
    out, cache = sink_forward(**without)
    assert not np.any(out[..., 2, :])
    only = np.zeros_like(dout)
    only[..., 2, :] = 1.0
    assert not any(np.any(x) for x in sink_backward(only, cache).values())
    out, cache = sink_forward(**kwargs, empty_row="uniform")
    np.testing.assert_allclose(out[..., 2, :], kwargs["v"].mean(-2), rtol=0, atol=1e-15)
    assert not np.any(cache.p_sink[..., 2]) and np.all(cache.p_sink[..., 1] > 0)
    g = sink_backward(dout, cache)
    assert not np.any(g["q"][..., 2, :]) and not np.any(g["bias"][..., 2, :])
    np.testing.assert_allclose(
        g["v"] - sink_backward(np.where(only > 0, 0.0, dout), cache)["v"],
        np.broadcast_to(dout[..., 2:3, :] / 6, g["v"].shape), rtol=0, atol=1e-15,
    )  # fmt: skip
    kwargs["mask"][1, 3] = False  # a row that misses one key is not an empty row
    partly = [sink_forward(**kwargs, empty_row=rule)[0][..., 1, :] for rule in ("zero", "uniform")]
    np.testing.assert_array_equal(*partly)
    out, _ = sink_forward(**kwargs, empty_row="nan")
    assert np.all(np.isnan(out[..., 2, :])) and np.sum(np.isnan(out)) == 6
    with pytest.raises(core.errors.ParameterError, match="mask"):
        sink_forward(**kwargs, empty_row="raise")
    single = {n: a[..., :1, :] for n, a in board().items()}
    alone, _ = sink_forward(**single, mask=np.zeros((1, 1), bool), empty_row="uniform")
    np.testing.assert_array_equal(alone, single["v"])


def test_nothing_to_see_and_no_sink():
    out, cache = sink_forward(**board(), mask=np.zeros((1, 2), bool), b=-math.inf)
    assert not np.any(out) and not np.any(cache.p_sink)
    np.testing.assert_array_equal(cache.lse, -np.inf)


def test_non_finite_sinks_poison_their_head_alone():
    kwargs = cases(SPEC)["softcap"]
    clean, _ = sink_forward(**kwargs)
    for name, place in (("b", 1), ("e", (1, 0))):
        for bad in (np.nan, np.inf):
            array = kwargs[name].copy()
            array[place] = bad
            out, cache = sink_forward(**(kwargs | {name: array}))
            assert np.all(np.isnan(out[:, 1])) and np.all(np.isnan(cache.lse[:, 1]))
            np.testing.assert_array_equal(out[:, 0], clean[:, 0])
            g = sink_backward(np.ones_like(out), cache)
            assert all(np.all(np.isfinite(x)) for x in g.values())
            assert g["b"][1] == 0 and not np.any(g["e"][1]) and not np.any(g["v"][:, 1])
    bias = kwargs["bias"].copy()
    bias[1, 2] = np.nan
    out, _ = sink_forward(**(kwargs | {"bias": bias}))
    assert np.all(np.isnan(out[:, 1, 2])) and np.sum(np.isnan(out)) == 3


def test_broadcast_logits_values_and_batches_of_their_own():
    kwargs = cases(SPEC)["batch"]
    for b, e in (((3, 2), (3, 2, 3)), ((3, 1), (3, 1, 3)), ((1,), (3,))):
        b, e = np.full(b, 0.3), np.full(e, 0.2)
        given = kwargs | {"b": b, "e": e}
        out, cache = sink_forward(**given)
        np.testing.assert_allclose(out, slow_sink(**given), rtol=0, atol=1e-14)
        g = sink_backward(np.ones_like(out), cache)
        assert g["b"].shape == b.shape and g["e"].shape == e.shape
    flat = cases(SPEC)["no-heads"]
    out, cache = sink_forward(**(flat | {"v": np.stack([flat["v"], 2 * flat["v"]])}))
    np.testing.assert_allclose(out[1], 2 * out[0], rtol=0, atol=1e-15)
    wide = flat | {"v": np.stack([flat["v"]] * 2), "e": np.ones((2, 3)), "b": np.zeros(2)}
    out, cache = sink_forward(**wide)
    g = sink_backward(np.ones_like(out), cache)
    assert g["q"].shape == flat["q"].shape and g["e"].shape == (2, 3)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"b": np.ones(3)}, core.errors.ShapeError, r"b has shape \(3,\).*\(..., H\)"),
        ({"b": math.inf}, core.errors.ParameterError, "b is inf, expected a finite number"),
        ({"b": math.nan}, core.errors.ParameterError, "b is nan"),
        ({"b": [0.0, 1.0]}, core.errors.DTypeError, "b is a list"),
        ({"e": np.ones((3, 3))}, core.errors.ShapeError, r"e has shape .*\(..., H, E\)"),
        ({"e": np.ones(4)}, core.errors.ShapeError, r"e has shape \(4,\), .* to \(1, 2, 3\)"),
        ({"e": np.ones(3, int)}, core.errors.DTypeError, "e has dtype int64"),
        ({"softcap": 0.0}, core.errors.ParameterError, "softcap is 0.0, expected"),
    ],
)
def test_errors_name_argument_and_expectation(change, error, says):
    with pytest.raises(error, match=says):
        sink_forward(**(cases(SPEC)["plain"] | change))


def test_a_foreign_cotangent_is_refused():
    out, cache = sink_forward(**cases(SPEC)["plain"])
    with pytest.raises(core.errors.ShapeError, match="dout has shape"):
        sink_backward(out[0], cache)


@pytest.mark.oracle
@pytest.mark.parametrize("case", cases(SPEC))
def test_pytorch_agrees(case):
    """A column of logits before the softmax, dropped after it."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")
    kwargs = cases(SPEC)[case]
    out, cache = sink_forward(**kwargs)
    dout = np.random.default_rng(5).standard_normal(out.shape)
    mine = sink_backward(dout, cache)
    live = core.visible(kwargs["q"], kwargs["k"], **{
        n: kwargs[n] for n in ("mask", "causal", "align") if n in kwargs
    })  # fmt: skip
    names = [n for n in ("q", "k", "v", "b", "e", "bias") if n in kwargs]
    given = {n: torch.tensor(kwargs[n], requires_grad=True) for n in names}
    z = given["q"] @ given["k"].mT * kwargs.get("scale", kwargs["q"].shape[-1] ** -0.5)
    if "softcap" in kwargs:
        z = kwargs["softcap"] * torch.tanh(z / kwargs["softcap"])
    if "bias" in kwargs:
        z = z + given["bias"]
    z = z.masked_fill(~torch.tensor(live), -torch.inf)
    b = given["b"][..., None, None] if "b" in given else torch.zeros(1, 1, dtype=z.dtype)
    p = torch.softmax(torch.cat([z, b.expand(*z.shape[:-1], 1)], -1), -1)
    theirs = p[..., :-1] @ given["v"]
    if "e" in given:
        theirs = theirs + p[..., -1:] * given["e"][..., None, :]
    theirs.backward(torch.tensor(dout))
    np.testing.assert_allclose(out, theirs.detach().numpy(), rtol=0, atol=1e-14)
    for n in names:
        np.testing.assert_allclose(mine[n], given[n].grad.numpy(), rtol=0, atol=1e-13)
