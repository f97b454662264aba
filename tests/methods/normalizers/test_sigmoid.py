"""Sigmoid attention: slow loop, worked examples, identities, limits, oracle."""

import math

import numpy as np
import pytest

import attention_ref
from attention_ref import core
from attention_ref.kit.checks import cases
from attention_ref.methods.normalizers.sigmoid import sigmoid_backward, sigmoid_forward

SPEC = attention_ref.get("normalizers/sigmoid")


def slow_sigmoid(
    q, k, v, b=None, n=None, mask=None, causal=False, align="lower_right", scale=None,
    softcap=None, bias=None,
):  # fmt: skip
    """One number at a time: half of 1 + tanh of half the score."""
    lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    T, D, S, E = q.shape[-2], q.shape[-1], k.shape[-2], v.shape[-1]
    q = np.broadcast_to(q, (*lead, T, D))
    k = np.broadcast_to(k, (*lead, S, D))
    v = np.broadcast_to(v, (*lead, S, E))
    b = np.broadcast_to(-math.log(S if n is None else n) if b is None else b, lead)
    mask = None if mask is None else np.broadcast_to(mask, (*lead, T, S))
    bias = None if bias is None else np.broadcast_to(bias, (*lead, T, S))
    c = 1.0 / math.sqrt(D) if scale is None else scale
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
                z = c * math.fsum(float(q[place][t, d]) * float(k[place][s, d]) for d in range(D))
                if softcap is not None:
                    z = softcap * math.tanh(z / softcap)
                if bias is not None:
                    z += float(bias[place][t, s])
                weight[s] = 0.5 * (1.0 + math.tanh(0.5 * (z + float(b[place]))))
            for e in range(E):
                out[place][t, e] = math.fsum(w * float(v[place][s, e]) for s, w in weight.items())
    return out


@pytest.mark.parametrize("case", cases(SPEC))
def test_equals_the_slow_loop(case):
    kwargs = cases(SPEC)[case]
    out, _ = sigmoid_forward(**kwargs)
    np.testing.assert_allclose(out, slow_sigmoid(**kwargs), rtol=0, atol=1e-14)


def board():
    """Two keys, b = -ln 2: sigma = e^z / (e^z + 2), for e^z = 2 and 6 it is 1/2 and 3/4."""
    k = np.array([[[math.log(2.0) / 2], [math.log(6.0) / 2]]])
    return {"q": np.array([[[2.0]]]), "k": k, "v": np.array([[[4.0, 0.0], [12.0, -4.0]]])}


def test_worked_example_forward():
    out, cache = sigmoid_forward(**board())
    np.testing.assert_allclose(cache.p, [[[0.5, 0.75]]], rtol=1e-15)
    np.testing.assert_allclose(out, [[[11.0, -3.0]]], rtol=1e-15)
    out, cache = sigmoid_forward(**board(), n=6)  # e^z / (e^z + 6)
    np.testing.assert_allclose(cache.p, [[[0.25, 0.5]]], rtol=1e-15)
    out, cache = sigmoid_forward(**board(), b=0.0)  # e^z / (e^z + 1)
    np.testing.assert_allclose(cache.p, [[[2 / 3, 6 / 7]]], rtol=1e-15)


def test_worked_example_backward():
    """dp = (4, 12); p (1 - p) = (1/4, 3/16); dz = (1, 9/4); db = 13/4."""
    kwargs = board() | {"b": np.array([-math.log(2.0)]), "bias": np.zeros((1, 1, 2))}
    _, cache = sigmoid_forward(**kwargs)
    g = sigmoid_backward(np.array([[[1.0, 0.0]]]), cache)
    np.testing.assert_allclose(g["bias"], [[[1.0, 2.25]]], rtol=1e-15)
    np.testing.assert_allclose(g["b"], [3.25], rtol=1e-15)
    np.testing.assert_allclose(g["v"], [[[0.5, 0.0], [0.75, 0.0]]], rtol=1e-15)
    np.testing.assert_allclose(g["k"], [[[2.0], [4.5]]], rtol=1e-15)
    slope = (math.log(2.0) + 2.25 * math.log(6.0)) / 2
    np.testing.assert_allclose(g["q"], [[[slope]]], rtol=1e-15)


def test_a_further_key_changes_no_other_weight():
    kwargs = cases(SPEC)["plain"]
    _, cache = sigmoid_forward(**kwargs)
    fewer = kwargs | {n: kwargs[n][..., :4, :] for n in ("k", "v")}
    _, less = sigmoid_forward(**fewer)
    np.testing.assert_allclose(less.p, cache.p[..., :4], rtol=0, atol=1e-15)
    _, other = sigmoid_forward(**(fewer | {"b": None}))  # but it moves the default of b
    assert np.max(np.abs(other.p - sigmoid_forward(**(kwargs | {"b": None}))[1].p[..., :4])) > 0.01


def test_the_opposite_scores_have_the_complementary_weights():
    """sigma(-z) = 1 - sigma(z): with -q and -b the outputs add up to the sum of all values."""
    kwargs = cases(SPEC)["plain"]
    there, _ = sigmoid_forward(**kwargs)
    back, _ = sigmoid_forward(**(kwargs | {"q": -kwargs["q"], "b": -kwargs["b"]}))
    total = np.broadcast_to(np.sum(kwargs["v"], axis=-2, keepdims=True), there.shape)
    np.testing.assert_allclose(there + back, total, rtol=0, atol=1e-14)


def test_b_is_a_bias_of_the_whole_head_and_its_gradient_is_the_sum():
    kwargs = cases(SPEC)["bias"]
    out, cache = sigmoid_forward(**kwargs)
    inside = kwargs | {"b": 0.0, "bias": kwargs["bias"] + kwargs["b"][:, None, None]}
    same, _ = sigmoid_forward(**inside)
    np.testing.assert_allclose(same, out, rtol=0, atol=1e-15)
    g = sigmoid_backward(np.ones_like(out), cache)
    np.testing.assert_allclose(g["b"], g["bias"].sum((-2, -1)), rtol=1e-13)


def test_default_b_counts_all_keys_or_n():
    kwargs = cases(SPEC)["causal"]
    out, _ = sigmoid_forward(**kwargs)
    np.testing.assert_array_equal(sigmoid_forward(**kwargs, n=7)[0], out)
    np.testing.assert_array_equal(sigmoid_forward(**kwargs, b=-math.log(7))[0], out)
    np.testing.assert_allclose(
        sigmoid_forward(**kwargs, b=np.full(2, -math.log(7)))[0], out, rtol=0, atol=1e-15
    )
    assert np.max(np.abs(sigmoid_forward(**kwargs, n=8)[0] - out)) > 1e-3


def test_row_sums_of_normal_scores_tend_to_the_root_of_e():
    """n sigma(z - ln n) = e^z / (1 + e^z / n), whose mean tends to e^(1/2)."""
    z = np.random.default_rng(0).standard_normal((400, 4096))
    one, v = np.ones((400, 1)), np.ones((4096, 1))
    out, _ = sigmoid_forward(one, np.zeros((4096, 1)), v, bias=z)
    np.testing.assert_allclose(np.mean(out), math.exp(0.5), rtol=0, atol=0.01)


def test_limits_of_b():
    kwargs = cases(SPEC)["mask"]
    for b in (-math.inf, -800.0):
        out, cache = sigmoid_forward(**(kwargs | {"b": b}))
        assert not np.any(out)
        assert not any(np.any(g) for g in sigmoid_backward(np.ones_like(out), cache).values())
    out, cache = sigmoid_forward(**(kwargs | {"b": 800.0}))
    np.testing.assert_array_equal(cache.p, kwargs["mask"][None] * 1.0)
    np.testing.assert_allclose(out, kwargs["mask"] @ kwargs["v"], rtol=0, atol=1e-14)


def test_minus_infinity_in_a_bias_is_a_mask():
    kwargs = cases(SPEC)["mask"]
    plain = {n: a for n, a in kwargs.items() if n != "mask"}
    out, cache = sigmoid_forward(**kwargs)
    same, other = sigmoid_forward(**plain, bias=np.where(kwargs["mask"], 0.0, -np.inf))
    np.testing.assert_array_equal(out, same)
    dout = np.random.default_rng(4).standard_normal(out.shape)
    mine, theirs = sigmoid_backward(dout, cache), sigmoid_backward(dout, other)
    for n in mine:
        np.testing.assert_array_equal(mine[n], theirs[n])


def test_non_finite_numbers_poison_what_sees_them():
    kwargs = cases(SPEC)["mask"]
    clean, _ = sigmoid_forward(**kwargs)
    for bad in (np.nan, np.inf):
        out, cache = sigmoid_forward(**(kwargs | {"b": np.array([bad, kwargs["b"][1]])}))
        live = np.any(kwargs["mask"][0], axis=-1)
        assert np.all(np.isnan(out[:, 0, live])) and not np.any(out[:, 0, ~live])
        np.testing.assert_array_equal(out[:, 1], clean[:, 1])
        g = sigmoid_backward(np.ones_like(out), cache)
        assert all(np.all(np.isfinite(x)) for x in g.values()) and g["b"][0] == 0
        assert not np.any(g["q"][:, 0])
    none, _ = sigmoid_forward(**(kwargs | {"b": np.array([-np.inf, kwargs["b"][1]])}))
    assert not np.any(none[:, 0])
    np.testing.assert_array_equal(none[:, 1], clean[:, 1])
    kwargs = cases(SPEC)["bias"]
    bias = kwargs["bias"].copy()
    bias[1, 2, 3] = np.nan
    out, _ = sigmoid_forward(**(kwargs | {"bias": bias}))
    assert np.all(np.isnan(out[:, 1, 2])) and np.sum(np.isnan(out)) == 3


def test_broadcast_b_and_values_with_a_batch_of_their_own():
    kwargs = cases(SPEC)["batch"]
    for shape in ((3, 2), (3, 1), (1,)):
        given = kwargs | {"b": np.random.default_rng(0).standard_normal(shape)}
        out, cache = sigmoid_forward(**given)
        np.testing.assert_allclose(out, slow_sigmoid(**given), rtol=0, atol=1e-14)
        assert sigmoid_backward(np.ones_like(out), cache)["b"].shape == shape
    flat = cases(SPEC)["no-heads"]
    out, cache = sigmoid_forward(**(flat | {"v": np.stack([flat["v"], 2 * flat["v"]])}))
    np.testing.assert_allclose(out[1], 2 * out[0], rtol=0, atol=1e-15)
    assert sigmoid_backward(np.ones_like(out), cache)["q"].shape == flat["q"].shape
    assert "b" not in sigmoid_backward(np.ones_like(out), cache)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"b": np.ones(3)}, core.errors.ShapeError, r"b has shape \(3,\).*\(..., H\)"),
        ({"b": math.inf}, core.errors.ParameterError, "b is inf, expected a finite number"),
        ({"b": [0.0, 1.0]}, core.errors.DTypeError, "b is a list"),
        ({"b": None, "n": 0}, core.errors.ParameterError, "n is 0, expected an integer 1 <= n"),
        ({"b": None, "n": 2.5}, core.errors.ParameterError, "n is 2.5"),
        ({"n": 4}, core.errors.ParameterError, "n is 4 and b is given too"),
        ({"softcap": 0.0}, core.errors.ParameterError, "softcap is 0.0, expected"),
    ],
)
def test_errors_name_argument_and_expectation(change, error, says):
    with pytest.raises(error, match=says):
        sigmoid_forward(**(cases(SPEC)["plain"] | change))


def test_a_foreign_cotangent_is_refused():
    out, cache = sigmoid_forward(**cases(SPEC)["plain"])
    with pytest.raises(core.errors.ShapeError, match="dout has shape"):
        sigmoid_backward(out[0], cache)


@pytest.mark.oracle
@pytest.mark.parametrize("case", cases(SPEC))
def test_pytorch_agrees(case):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")
    kwargs = cases(SPEC)[case]
    out, cache = sigmoid_forward(**kwargs)
    dout = np.random.default_rng(5).standard_normal(out.shape)
    mine = sigmoid_backward(dout, cache)
    live = core.visible(kwargs["q"], kwargs["k"], **{
        n: kwargs[n] for n in ("mask", "causal", "align") if n in kwargs
    })  # fmt: skip
    names = [n for n in ("q", "k", "v", "b", "bias") if n in kwargs]
    given = {n: torch.tensor(kwargs[n], requires_grad=True) for n in names}
    z = given["q"] @ given["k"].mT * kwargs.get("scale", kwargs["q"].shape[-1] ** -0.5)
    if "softcap" in kwargs:
        z = kwargs["softcap"] * torch.tanh(z / kwargs["softcap"])
    if "bias" in kwargs:
        z = z + given["bias"]
    count = kwargs.get("n", kwargs["k"].shape[-2])
    z = z + (given["b"][..., None, None] if "b" in given else -math.log(count))
    theirs = torch.sigmoid(z.masked_fill(~torch.tensor(live), -torch.inf)) @ given["v"]
    theirs.backward(torch.tensor(dout))
    np.testing.assert_allclose(out, theirs.detach().numpy(), rtol=0, atol=1e-14)
    for n in names:
        np.testing.assert_allclose(mine[n], given[n].grad.numpy(), rtol=0, atol=1e-13)
