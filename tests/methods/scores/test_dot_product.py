"""Scaled dot-product attention: slow loop, worked example, identities, limits, oracles."""

import math

import numpy as np
import pytest

import attention_ref
from attention_ref import core
from attention_ref.kit.checks import cases
from attention_ref.methods.scores.dot_product import dot_product_backward, dot_product_forward

SPEC = attention_ref.get("scores/dot_product")


def slow_dot_product(
    q, k, v, mask=None, causal=False, align="lower_right", scale=None, softcap=None, bias=None,
):  # fmt: skip
    """One number at a time; every loop of the definition is written out."""
    lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    T, D, S, E = q.shape[-2], q.shape[-1], k.shape[-2], v.shape[-1]
    q = np.broadcast_to(q, (*lead, T, D))
    k = np.broadcast_to(k, (*lead, S, D))
    v = np.broadcast_to(v, (*lead, S, E))
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
                weight[s] = math.exp(z)
            total = math.fsum(weight.values())
            for e in range(E):
                mixed = math.fsum(w * float(v[place][s, e]) for s, w in weight.items())
                out[place][t, e] = mixed / total if weight else 0.0
    return out


@pytest.mark.parametrize("case", cases(SPEC))
def test_equals_the_slow_loop(case):
    kwargs = cases(SPEC)[case]
    out, _ = dot_product_forward(**kwargs)
    np.testing.assert_allclose(out, slow_dot_product(**kwargs), rtol=0, atol=1e-14)


def test_worked_example_forward():
    """Scores 0 and ln 3 give weights 1/4 and 3/4; the default scale is 1/sqrt(4) = 1/2."""
    q = np.array([[2.0, 0.0, 0.0, 0.0]])
    k = np.array([[0.0, 5.0, 0.0, 0.0], [math.log(3.0), 0.0, 0.0, 0.0]])
    v = np.array([[4.0, -8.0], [0.0, 8.0]])
    out, cache = dot_product_forward(q, k, v)
    np.testing.assert_allclose(cache.p, [[0.25, 0.75]], rtol=1e-15)
    np.testing.assert_allclose(out, [[1.0, 4.0]], rtol=1e-15)
    np.testing.assert_allclose(cache.lse, [math.log(4.0)], rtol=1e-15)


def test_worked_example_backward():
    """p = (1/4, 3/4), dout = 1: dv = p; dp = v = (4, 0); dz = p (dp - 1) = (3/4, -3/4)."""
    q = np.array([[1.0]])
    k = np.array([[0.0], [math.log(3.0)]])
    v = np.array([[4.0], [0.0]])
    out, cache = dot_product_forward(q, k, v)
    g = dot_product_backward(np.ones_like(out), cache)
    np.testing.assert_allclose(g["v"], [[0.25], [0.75]], rtol=1e-15)
    np.testing.assert_allclose(g["k"], [[0.75], [-0.75]], rtol=1e-15)
    np.testing.assert_allclose(g["q"], [[-0.75 * math.log(3.0)]], rtol=1e-15)


def test_softcap_comes_before_bias_and_mask():
    """z = 2: cap 1 gives tanh 2; bias 3 is added uncapped; the masked key weighs nothing."""
    q, k = np.array([[2.0]]), np.array([[1.0], [0.0], [9.0]])
    bias, mask = np.array([[3.0, 0.0, 0.0]]), np.array([[True, True, False]])
    v = np.array([[1.0], [0.0], [100.0]])
    out, _ = dot_product_forward(q, k, v, scale=1.0, softcap=1.0, bias=bias, mask=mask)
    z = math.tanh(2.0) + 3.0
    np.testing.assert_allclose(out, [[math.exp(z) / (math.exp(z) + 1.0)]], rtol=1e-15)


def test_both_alignments():
    """T = 2, S = 3, equal scores: the first query sees 2 keys lower_right, 1 upper_left."""
    q, k, v = np.zeros((2, 1)), np.zeros((3, 1)), np.array([[0.0], [3.0], [9.0]])
    lower, _ = dot_product_forward(q, k, v, causal=True)
    upper, _ = dot_product_forward(q, k, v, causal=True, align="upper_left")
    np.testing.assert_allclose(lower[:, 0], [1.5, 4.0], rtol=1e-15)
    np.testing.assert_allclose(upper[:, 0], [0.0, 1.5], rtol=1e-15)


def test_scale_zero_is_the_mean():
    kwargs = cases(SPEC)["plain"] | {"scale": 0.0}
    out, _ = dot_product_forward(**kwargs)
    mean = np.broadcast_to(kwargs["v"].mean(axis=-2, keepdims=True), out.shape)
    np.testing.assert_allclose(out, mean, rtol=0, atol=1e-15)


def test_large_scale_is_the_value_of_the_best_key():
    kwargs = cases(SPEC)["plain"] | {"scale": 1e6}
    out, cache = dot_product_forward(**kwargs)
    best = np.argmax(kwargs["q"] @ np.swapaxes(kwargs["k"], -1, -2), axis=-1)
    np.testing.assert_array_equal(out, np.take_along_axis(kwargs["v"], best[..., None], axis=-2))
    np.testing.assert_array_equal(np.sum(cache.p, axis=-1), 1.0)


def test_gradient_of_lse():
    """With dout = 0 and dlse = 1, dq is the scale times the weighted mean of the keys."""
    kwargs = cases(SPEC)["bias"]
    out, cache = dot_product_forward(**kwargs)
    g = dot_product_backward(np.zeros_like(out), cache, dlse=np.ones_like(cache.lse))
    np.testing.assert_allclose(g["q"], 0.7 * (cache.p @ kwargs["k"]), rtol=0, atol=1e-15)
    np.testing.assert_allclose(g["bias"], cache.p, rtol=0, atol=1e-16)
    assert not np.any(g["v"])


def test_gradient_of_lse_under_a_mask():
    """Random dout and dlse together: the directional derivative of <dout, out> + <dlse, lse>."""
    from attention_ref import engine

    kwargs = {n: a for n, a in cases(SPEC)["mask"].items() if n != "mask"}
    mask = np.tri(5, 7, 2, dtype=bool)
    rng = np.random.default_rng(3)
    out, cache = dot_product_forward(**kwargs, mask=mask)
    dout, dlse = rng.standard_normal(out.shape), rng.standard_normal(cache.lse.shape)
    g = dot_product_backward(dout, cache, dlse)
    arrays = {n: kwargs[n] for n in "qkv"}
    tangents = {n: rng.standard_normal(a.shape) for n, a in arrays.items()}

    def both(**arrays):
        out, cache = dot_product_forward(**arrays, scale=0.7, mask=mask)
        return {"out": out, "lse": cache.lse}

    slope = engine.jvp(both, arrays, tangents)
    want = np.sum(dout * slope["out"]) + np.sum(dlse * slope["lse"])
    np.testing.assert_allclose(sum(np.sum(g[n] * tangents[n]) for n in "qkv"), want, rtol=1e-13)


def test_a_uniform_row_without_keys_has_no_lse_gradient():
    kwargs = cases(SPEC)["mask"] | {"empty_row": "uniform"}
    out, cache = dot_product_forward(**kwargs)
    g = dot_product_backward(np.zeros_like(out), cache, dlse=np.ones_like(cache.lse))
    assert not np.any(g["q"][0, 1]) and np.any(g["q"][0, 0])


def test_mask_and_causal_together():
    kwargs = cases(SPEC)["mask"] | {"causal": True}
    out, cache = dot_product_forward(**kwargs)
    both = kwargs["mask"] & np.tri(5, 7, 2, dtype=bool)
    np.testing.assert_array_equal(cache.p > 0, both)
    np.testing.assert_allclose(out, slow_dot_product(**kwargs), rtol=0, atol=1e-14)


def test_lse_of_a_poisoned_row_is_nan():
    kwargs = cases(SPEC)["plain"]
    q = kwargs["q"].copy()
    q[1, 2, 0] = np.inf
    _, cache = dot_product_forward(**(kwargs | {"q": q}))
    assert np.isnan(cache.lse[1, 2]) and np.sum(np.isnan(cache.lse)) == 1


def test_minus_infinity_in_a_bias_is_a_mask():
    kwargs = cases(SPEC)["mask"]
    bias = np.where(kwargs["mask"], 0.0, -np.inf)
    out, _ = dot_product_forward(**kwargs)
    same, cache = dot_product_forward(
        kwargs["q"], kwargs["k"], kwargs["v"], scale=kwargs["scale"], bias=bias
    )
    np.testing.assert_array_equal(out, same)
    g = dot_product_backward(np.ones_like(out), cache)
    assert all(np.all(np.isfinite(x)) for x in g.values())


def test_nan_in_a_live_bias_poisons_its_row_alone():
    kwargs = cases(SPEC)["bias"]
    bad = kwargs["bias"].copy()
    bad[1, 2, 3] = np.nan
    out, _ = dot_product_forward(**(kwargs | {"bias": bad}))
    clean, _ = dot_product_forward(**kwargs)
    assert np.all(np.isnan(out[1, 2]))
    out[1, 2] = clean[1, 2]
    np.testing.assert_array_equal(out, clean)


def test_keys_and_queries_broadcast_over_heads():
    """One key head for all query heads: gradients come back in the key's own shape."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(s) for s in ((3, 5, 4), (1, 6, 4), (1, 6, 2)))
    out, cache = dot_product_forward(q, k, v)
    dout = rng.standard_normal(out.shape)
    g = dot_product_backward(dout, cache)
    wide, wide_cache = dot_product_forward(q, np.repeat(k, 3, 0), np.repeat(v, 3, 0))
    w = dot_product_backward(dout, wide_cache)
    np.testing.assert_allclose(out, wide, rtol=0, atol=1e-15)
    np.testing.assert_allclose(g["k"], w["k"].sum(0, keepdims=True), rtol=0, atol=1e-14)
    np.testing.assert_allclose(g["v"], w["v"].sum(0, keepdims=True), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"k": np.ones((2, 6, 5))}, core.errors.ShapeError, r"k has D = 5 .* expected 4 as in q"),
        ({"v": np.ones((2, 7, 3))}, core.errors.ShapeError, r"v has S = 7 .* expected 6 as in k"),
        ({"k": np.ones((1, 6, 4)), "v": np.ones((3, 6, 3))}, core.errors.ShapeError, "v has lead"),
        ({"mask": np.ones((6, 5), bool)}, core.errors.ShapeError, "looks transposed"),
        ({"align": "lower-right"}, core.errors.ParameterError, "did you mean 'lower_right'"),
        ({"softcap": 0.0}, core.errors.ParameterError, "softcap is 0.0, expected"),
        ({"scale": math.inf}, core.errors.ParameterError, "scale is inf, expected a finite"),
    ],
)
def test_errors_name_argument_and_expectation(change, error, says):
    with pytest.raises(error, match=says):
        dot_product_forward(**(cases(SPEC)["plain"] | change))


def test_grouped_heads_get_a_hint():
    q, k = np.ones((4, 5, 2)), np.ones((2, 6, 2))
    with pytest.raises(core.errors.ShapeError, match="heads/multi_query"):
        dot_product_forward(q, k, k)


def test_a_foreign_cotangent_is_refused():
    out, cache = dot_product_forward(**cases(SPEC)["plain"])
    with pytest.raises(core.errors.ShapeError, match="dout has shape"):
        dot_product_backward(out[0], cache)


def test_memory_limit_before_allocating():
    q = np.broadcast_to(np.float64(0.0), (1, 200_000, 1))
    with pytest.raises(core.errors.MemoryLimitError, match="GiB"):
        dot_product_forward(q, q, q)


@pytest.mark.oracle
@pytest.mark.parametrize("case", cases(SPEC))
def test_pytorch_agrees(case):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")
    kwargs = cases(SPEC)[case]
    if "softcap" in kwargs:
        kwargs.pop("softcap")
        kwargs.pop("mask")
    live = core.visible(
        kwargs["q"], kwargs["k"], mask=kwargs.get("mask"), causal=kwargs.get("causal", False),
        align=kwargs.get("align", "lower_right"),
    )  # fmt: skip
    if not np.all(np.any(live, axis=-1)):
        live = live | ~np.any(live, axis=-1, keepdims=True)  # frameworks differ on empty rows
        kwargs = {n: a for n, a in kwargs.items() if n not in ("causal", "align")} | {"mask": live}
    out, cache = dot_product_forward(**kwargs)
    dout = np.random.default_rng(5).standard_normal(out.shape)
    mine = dot_product_backward(dout, cache)
    names = [n for n in ("q", "k", "v", "bias") if n in kwargs]
    given = {n: torch.tensor(kwargs[n], requires_grad=True) for n in names}
    additive = torch.where(torch.tensor(live), 0.0, -torch.inf).to(torch.float64)
    if "bias" in given:
        additive = additive + given["bias"]
    theirs = torch.nn.functional.scaled_dot_product_attention(
        given["q"], given["k"], given["v"], attn_mask=additive, scale=kwargs.get("scale")
    )
    theirs.backward(torch.tensor(dout))
    np.testing.assert_allclose(out, theirs.detach().numpy(), rtol=0, atol=2e-15)
    for n in names:
        np.testing.assert_allclose(mine[n], given[n].grad.numpy(), rtol=0, atol=2e-14)
