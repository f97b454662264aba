"""Grouped-query attention: slow loop, worked example, identities, conversion, oracles."""

import math

import numpy as np
import pytest

import attention_ref
from attention_ref import core
from attention_ref.kit.checks import cases
from attention_ref.methods.heads.multi_query import (
    multi_query_backward,
    multi_query_cache_bytes,
    multi_query_convert,
    multi_query_forward,
)

SPEC = attention_ref.get("heads/multi_query")
DOT = attention_ref.get("scores/dot_product")


def slow_multi_query(
    q, k, v, mask=None, causal=False, align="lower_right", scale=None, softcap=None, bias=None,
):  # fmt: skip
    """One number at a time; head h looks its keys up under h // (H // G)."""
    lead = np.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    H, T, D = q.shape[-3], q.shape[-2], q.shape[-1]
    G, S, E = k.shape[-3], k.shape[-2], v.shape[-1]
    q = np.broadcast_to(q, (*lead, H, T, D))
    k = np.broadcast_to(k, (*lead, G, S, D))
    v = np.broadcast_to(v, (*lead, G, S, E))
    mask = None if mask is None else np.broadcast_to(mask, (*lead, H, T, S))
    bias = None if bias is None else np.broadcast_to(bias, (*lead, H, T, S))
    c = 1.0 / math.sqrt(D) if scale is None else scale
    first = S - T if align == "lower_right" else 0
    out = np.zeros((*lead, H, T, E))
    for place in np.ndindex(*lead):
        for h in range(H):
            g = h // (H // G)
            for t in range(T):
                weight = {}
                for s in range(S):
                    if causal and s > t + first:
                        continue
                    if mask is not None and not mask[place][h, t, s]:
                        continue
                    z = c * math.fsum(
                        float(q[place][h, t, d]) * float(k[place][g, s, d]) for d in range(D)
                    )
                    if softcap is not None:
                        z = softcap * math.tanh(z / softcap)
                    if bias is not None:
                        z += float(bias[place][h, t, s])
                    weight[s] = math.exp(z)
                total = math.fsum(weight.values())
                for e in range(E):
                    mixed = math.fsum(w * float(v[place][g, s, e]) for s, w in weight.items())
                    out[place][h, t, e] = mixed / total if weight else 0.0
    return out


@pytest.mark.parametrize("case", cases(SPEC))
def test_equals_the_slow_loop(case):
    kwargs = cases(SPEC)[case]
    out, _ = multi_query_forward(**kwargs)
    np.testing.assert_allclose(out, slow_multi_query(**kwargs), rtol=0, atol=1e-14)


ROUND = {
    "q": np.array([0.0, 1.0, 1.0, -1.0]).reshape(4, 1, 1),
    "k": np.array([[0.0, math.log(3.0)], [math.log(7.0), 0.0]]).reshape(2, 2, 1),
    "v": np.array([[0.0, 4.0], [8.0, 16.0]]).reshape(2, 2, 1),
}
"""Four heads of one query, two groups of two keys."""


def test_worked_example_forward():
    """Weights (1/2, 1/2), (1/4, 3/4) on group 0; (7/8, 1/8), (1/8, 7/8) on group 1."""
    out, cache = multi_query_forward(**ROUND)
    p = [[0.5, 0.5], [0.25, 0.75], [0.875, 0.125], [0.125, 0.875]]
    np.testing.assert_allclose(cache.p[:, 0], p, rtol=1e-15)
    np.testing.assert_allclose(out.ravel(), [2.0, 3.0, 9.0, 15.0], rtol=1e-15)
    lse = [math.log(2.0), math.log(4.0), math.log(8.0), math.log(8.0 / 7.0)]
    np.testing.assert_allclose(cache.lse.ravel(), lse, rtol=1e-14)


def test_worked_example_backward():
    """dout = 1: dv sums the weights of a group's heads; dz = p (v - o) gives dk = sum dz q."""
    out, cache = multi_query_forward(**ROUND)
    g = multi_query_backward(np.ones_like(out), cache)
    np.testing.assert_allclose(g["v"][..., 0], [[0.75, 1.25], [1.0, 1.0]], rtol=1e-15)
    dz = np.array([[-1.0, 1.0], [-0.75, 0.75], [-0.875, 0.875], [-0.875, 0.875]])
    dk = [[-0.75, 0.75], [0.0, 0.0]]  # heads 2 and 3 have opposite queries and cancel
    np.testing.assert_allclose(g["k"][..., 0], dk, rtol=0, atol=1e-15)
    keys = np.array([[0.0, math.log(3.0)]] * 2 + [[math.log(7.0), 0.0]] * 2)
    np.testing.assert_allclose(g["q"].ravel(), np.sum(dz * keys, 1), rtol=1e-14)


def test_groups_are_consecutive_not_interleaved():
    """Values that name their group: heads 0 1 2 read 0, heads 3 4 5 read 1."""
    q, k = np.zeros((6, 2, 1)), np.zeros((2, 3, 1))
    v = np.broadcast_to(np.array([0.0, 1.0])[:, None, None], (2, 3, 1))
    out, _ = multi_query_forward(q, k, v)
    np.testing.assert_array_equal(out[:, 0, 0], [0, 0, 0, 1, 1, 1])


@pytest.mark.parametrize("case", cases(SPEC))
def test_is_softmax_attention_with_repeated_heads(case):
    kwargs = cases(SPEC)[case]
    q, k, v = (kwargs[n] for n in "qkv")
    times = q.shape[-3] // k.shape[-3]
    wide = kwargs | {"k": np.repeat(k, times, -3), "v": np.repeat(v, times, -3)}
    out, cache = multi_query_forward(**kwargs)
    same, other = DOT.forward(**wide)
    np.testing.assert_allclose(out, same, rtol=0, atol=1e-14)
    np.testing.assert_allclose(cache.p, other.p, rtol=0, atol=1e-15)
    np.testing.assert_allclose(cache.lse, other.lse, rtol=1e-14)
    dout = np.random.default_rng(0).standard_normal(out.shape)
    mine, theirs = multi_query_backward(dout, cache), DOT.backward(dout, other)
    assert set(mine) == set(theirs)
    for n in ("k", "v"):
        shape = (*k.shape[:-3], k.shape[-3], times, *theirs[n].shape[-2:])
        theirs[n] = theirs[n].reshape(shape).sum(-3)
    for n, g in mine.items():
        np.testing.assert_allclose(g, theirs[n], rtol=0, atol=1e-13)


def test_a_poisoned_row_sends_nothing_back():
    """NaN in one query: that row is NaN, its dq is 0, and all else is as if its dout were 0."""
    kwargs = cases(SPEC)["plain"]
    bad = kwargs["q"].copy()
    bad[0, 1, 2] = np.nan
    out, cache = multi_query_forward(**(kwargs | {"q": bad}))
    _, same = multi_query_forward(**kwargs)
    assert np.all(np.isnan(out[0, 1, 2])) and np.sum(np.isnan(out)) == 3
    dout = np.random.default_rng(6).standard_normal(out.shape)
    g = multi_query_backward(dout, cache)
    dout[0, 1, 2] = 0.0
    for n, x in multi_query_backward(dout, same).items():
        np.testing.assert_allclose(g[n], x, rtol=0, atol=1e-14)


def test_a_narrow_softcap_bounds_the_scores():
    kwargs = cases(SPEC)["plain"] | {"softcap": 0.5}
    out, cache = multi_query_forward(**kwargs)
    assert 0.4 < np.max(np.abs(cache.capped)) < 0.5
    np.testing.assert_allclose(out, slow_multi_query(**kwargs), rtol=0, atol=1e-14)


def test_one_group_is_one_head_with_all_queries():
    """G = 1: stacking the heads' queries as H T queries of a single head gives the same rows."""
    kwargs = cases(SPEC)["one-group"]
    q, k, v = (kwargs[n] for n in "qkv")
    out, _ = multi_query_forward(q, k, v)
    stacked, _ = DOT.forward(q.reshape(1, 1, 20, 4), k, v)
    np.testing.assert_allclose(out, stacked.reshape(out.shape), rtol=0, atol=1e-15)


def test_constant_values_come_out_and_outputs_stay_in_range():
    """The row_stochastic check of the kit, with the values of the head's own group."""
    for kwargs in cases(SPEC).values():
        out, cache = multi_query_forward(**kwargs)
        alive = np.any(cache.p > 0, axis=-1, keepdims=True)
        np.testing.assert_allclose(cache.p.sum(-1), alive[..., 0], rtol=0, atol=1e-15)
        v = np.repeat(kwargs["v"], kwargs["q"].shape[-3] // kwargs["v"].shape[-3], -3)
        low, high = v.min(-2, keepdims=True) - 1e-12, v.max(-2, keepdims=True) + 1e-12
        assert np.all(~alive | ((out >= low) & (out <= high)))
        flat, _ = multi_query_forward(**(kwargs | {"v": np.full_like(kwargs["v"], 1.5)}))
        np.testing.assert_allclose(flat, 1.5 * alive * np.ones_like(flat), rtol=0, atol=1e-15)


def test_empty_rows_follow_the_option():
    """The empty_rows check of the kit, with the values of the head's own group."""
    kwargs = cases(SPEC)["plain"]
    mask = np.ones((4, 5, 6), bool)
    mask[:, 0] = False
    mask[3, 1] = False
    base, _ = multi_query_forward(**kwargs)
    out, cache = multi_query_forward(**kwargs, mask=mask)
    assert not np.any(out[:, :, 0]) and not np.any(out[:, 3, 1])
    np.testing.assert_array_equal(out[:, :, 2:], base[:, :, 2:])
    assert np.all(np.isneginf(cache.lse[:, :, 0]))
    g = multi_query_backward(np.ones_like(out), cache)
    assert not np.any(g["q"][:, :, 0]) and all(np.all(np.isfinite(x)) for x in g.values())
    nan, cache = multi_query_forward(**kwargs, mask=mask, empty_row="nan")
    np.testing.assert_array_equal(np.isnan(nan[..., 0]), ~mask.any(-1) & np.ones((2, 1, 1), bool))
    np.testing.assert_array_equal(np.isnan(cache.lse), np.isnan(nan[..., 0]))
    g = multi_query_backward(np.ones_like(out), cache)
    assert all(np.all(np.isfinite(x)) for x in g.values())
    even, _ = multi_query_forward(**kwargs, mask=mask, empty_row="uniform")
    mean = np.repeat(kwargs["v"].mean(-2), 2, axis=-2)
    np.testing.assert_allclose(even[:, :, 0], mean, rtol=0, atol=1e-15)
    with pytest.raises(core.errors.ParameterError, match="mask leaves"):
        multi_query_forward(**kwargs, mask=mask, empty_row="raise")


@pytest.mark.parametrize("shape", [(6,), (5, 1), (1, 5, 6), (4, 1, 6), (2, 1, 5, 6), (1, 4, 5, 6)])
def test_bias_and_mask_broadcast_to_query_heads(shape):
    kwargs = cases(SPEC)["plain"]
    rng = np.random.default_rng(1)
    bias, mask = rng.standard_normal(shape), rng.random(shape) < 0.7
    out, cache = multi_query_forward(**kwargs, bias=bias, mask=mask)
    full = np.broadcast_to(bias, (2, 4, 5, 6)).copy()
    live = np.broadcast_to(mask, (2, 4, 5, 6)).copy()
    same, other = multi_query_forward(**kwargs, bias=full, mask=live)
    np.testing.assert_array_equal(out, same)
    dout = rng.standard_normal(out.shape)
    g, h = multi_query_backward(dout, cache), multi_query_backward(dout, other)
    assert g["bias"].shape == shape
    np.testing.assert_allclose(g["bias"], core.sum_to(h["bias"], shape), rtol=0, atol=1e-14)


def test_leading_axes_broadcast():
    """No batch at all; keys without a batch; values with a batch of their own."""
    rng = np.random.default_rng(2)
    q, k, v = (rng.standard_normal(s) for s in ((4, 5, 3), (2, 6, 3), (2, 6, 2)))
    single, _ = multi_query_forward(q, k, v)
    assert single.shape == (4, 5, 2)
    out, cache = multi_query_forward(np.stack([q, q]), k, v)
    np.testing.assert_allclose(out[1], single, rtol=0, atol=1e-15)
    g = multi_query_backward(np.ones_like(out), cache)
    assert {n: x.shape for n, x in g.items()} == {
        "q": (2, 4, 5, 3), "k": (2, 6, 3), "v": (2, 6, 2)
    }  # fmt: skip
    out, cache = multi_query_forward(q, k, np.stack([v, 2 * v]))
    np.testing.assert_allclose(out[1], 2 * single, rtol=0, atol=1e-15)
    g = multi_query_backward(np.ones_like(out), cache)
    assert g["q"].shape == q.shape and g["v"].shape == (2, 2, 6, 2)
    assert cache.p.shape == (4, 5, 6)


def test_cache_bytes_of_the_papers_sizes():
    """32 layers, D = 128, half precision: 512 KiB, 128 KiB, 16 KiB a token."""
    for groups, kib in ((32, 512), (8, 128), (1, 16)):
        assert multi_query_cache_bytes(32, groups, 128) == kib * 1024
    assert multi_query_cache_bytes(3, 5, 7, itemsize=4) == 2 * 3 * 5 * 7 * 4


def test_conversion_is_the_mean_of_consecutive_heads():
    w = np.arange(12.0).reshape(4, 1, 3)
    np.testing.assert_array_equal(multi_query_convert(w, 2), [[[1.5, 2.5, 3.5]], [[7.5, 8.5, 9.5]]])
    np.testing.assert_array_equal(multi_query_convert(w, 4), w)
    assert multi_query_convert(np.ones((5, 6, 2, 3)), 1).shape == (5, 1, 2, 3)


def test_conversion_of_equal_heads_loses_nothing():
    rng = np.random.default_rng(3)
    x = rng.standard_normal((5, 8))
    wq = rng.standard_normal((4, 8, 3))
    wk, wv = (np.repeat(rng.standard_normal((2, 8, 3)), 2, axis=0) for _ in "kv")
    many, _ = multi_query_forward(x @ wq, x @ wk, x @ wv)
    few, _ = multi_query_forward(
        x @ wq, x @ multi_query_convert(wk, 2), x @ multi_query_convert(wv, 2)
    )
    np.testing.assert_allclose(few, many, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"k": np.ones((2, 3, 6, 4)), "v": np.ones((2, 3, 6, 3))}, core.errors.ShapeError,
         "k has G = 3 heads .* expected a divisor of the H = 4 heads of q"),
        ({"v": np.ones((2, 4, 6, 3))}, core.errors.ShapeError, "v has G = 4 .* expected 2 as in k"),
        ({"k": np.ones((2, 0, 6, 4)), "v": np.ones((2, 0, 6, 3))}, core.errors.ShapeError,
         "k has G = 0"),
        ({"q": np.ones((5, 4))}, core.errors.ShapeError, "q has shape .5, 4., expected"),
        ({"q": np.ones((2, 4, 5, 0)), "k": np.ones((2, 2, 6, 0))}, core.errors.ShapeError,
         "q has width D = 0"),
        ({"mask": np.ones((2, 2, 5, 6), bool)}, core.errors.ShapeError, "mask has shape .*H, T, S"),
        ({"bias": np.ones((2, 2, 5, 6))}, core.errors.ShapeError, "bias has shape .*H, T, S"),
        ({"align": "lower-right"}, core.errors.ParameterError, "did you mean 'lower_right'"),
        ({"softcap": 0.0}, core.errors.ParameterError, "softcap is 0.0"),
    ],
)  # fmt: skip
def test_errors_name_argument_and_expectation(change, error, says):
    with pytest.raises(error, match=says):
        multi_query_forward(**(cases(SPEC)["plain"] | change))


def test_other_errors():
    out, cache = multi_query_forward(**cases(SPEC)["plain"])
    with pytest.raises(core.errors.ShapeError, match="dout has shape"):
        multi_query_backward(out[0], cache)
    with pytest.raises(core.errors.ParameterError, match="groups is 3, expected a divisor of H"):
        multi_query_convert(np.ones((4, 2, 2)), 3)
    with pytest.raises(core.errors.ParameterError, match="groups is 0, expected an integer"):
        multi_query_convert(np.ones((4, 2, 2)), 0)
    q = np.broadcast_to(np.float64(0.0), (1, 200_000, 1))
    with pytest.raises(core.errors.MemoryLimitError, match="GiB"):
        multi_query_forward(q, q, q)


def allowed(kwargs):
    """(mask or None, additive array) that other libraries understand; None for an empty row."""
    q, k = kwargs["q"], kwargs["k"]
    rule = {n: kwargs[n] for n in ("mask", "causal", "align") if n in kwargs}
    live = core.visible(q, k, **rule)
    live = live | ~np.any(live, axis=-1, keepdims=True)  # frameworks differ on empty rows
    return np.broadcast_to(live, (*q.shape[:-1], k.shape[-2])).copy()


@pytest.mark.oracle
@pytest.mark.parametrize("case", [c for c in cases(SPEC) if c != "softcap"])
def test_pytorch_agrees(case):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")
    kwargs = cases(SPEC)[case]
    live = allowed(kwargs)
    mine = {n: kwargs[n] for n in kwargs if n not in ("mask", "causal", "align")} | {"mask": live}
    out, cache = multi_query_forward(**mine)
    dout = np.random.default_rng(5).standard_normal(out.shape)
    names = [n for n in ("q", "k", "v", "bias") if n in kwargs]
    given = {n: torch.tensor(kwargs[n], requires_grad=True) for n in names}
    additive = torch.where(torch.tensor(live), 0.0, -torch.inf).to(torch.float64)
    if "bias" in given:
        additive = additive + given["bias"]
    theirs = torch.nn.functional.scaled_dot_product_attention(
        given["q"], given["k"], given["v"], attn_mask=additive, scale=kwargs.get("scale"),
        enable_gqa=True,
    )  # fmt: skip
    theirs.backward(torch.tensor(dout))
    np.testing.assert_allclose(out, theirs.detach().numpy(), rtol=0, atol=2e-15)
    for n, g in multi_query_backward(dout, cache).items():
        np.testing.assert_allclose(g, given[n].grad.numpy(), rtol=0, atol=2e-14)


@pytest.mark.oracle
@pytest.mark.parametrize("case", ["plain", "mask", "batch", "causal"])
def test_jax_agrees(case):
    jax = pytest.importorskip("jax", reason="JAX is not installed: make oracles")

    kwargs = cases(SPEC)[case]
    live = allowed(kwargs)
    out, _ = multi_query_forward(kwargs["q"], kwargs["k"], kwargs["v"], mask=live, scale=0.7)
    with jax.enable_x64(True):
        q, k, v = (np.swapaxes(kwargs[n], -3, -2) for n in "qkv")  # (B, T, H, D)
        v = np.concatenate([v, np.zeros_like(v[..., :1])], -1)  # JAX wants E = D
        theirs = jax.nn.dot_product_attention(
            *(jax.numpy.asarray(x) for x in (q, k, v)), mask=jax.numpy.asarray(live), scale=0.7
        )
    theirs = np.swapaxes(np.asarray(theirs), -3, -2)[..., :3]
    np.testing.assert_allclose(out, theirs, rtol=0, atol=1e-6)  # its softmax runs in float32
