"""Linear attention: slow loop, worked example, identities, forms, extremes, oracle."""

import math

import numpy as np
import pytest

import attention_ref
from attention_ref import core
from attention_ref.kit.checks import cases
from attention_ref.methods.linear.linear_transformer import (
    linear_transformer_backward,
    linear_transformer_chunked_forward,
    linear_transformer_forward,
    linear_transformer_recurrent_forward,
)

SPEC = attention_ref.get("linear/linear_transformer")
EQUIVALENT = {
    "_features_forward: x > 0  ->  x >= 0": "at 0 both branches are 1",
    "_features_forward: x > 0  ->  x >= 0 (2)": "at 0 both exponents are 0",
}
FORMS = (
    linear_transformer_forward,
    linear_transformer_recurrent_forward,
    linear_transformer_chunked_forward,
)


def slow_linear_transformer(
    q, k, v, mask=None, causal=False, align="lower_right", normalise=True, feature_map="elu",
):  # fmt: skip
    """One number at a time: features, weights, sums."""

    def phi(x):
        if feature_map == "identity":
            return float(x)
        return float(x) + 1.0 if x > 0 else math.exp(float(x))

    lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    T, D, S, E = q.shape[-2], q.shape[-1], k.shape[-2], v.shape[-1]
    q = np.broadcast_to(q, (*lead, T, D))
    k = np.broadcast_to(k, (*lead, S, D))
    v = np.broadcast_to(v, (*lead, S, E))
    mask = None if mask is None else np.broadcast_to(mask, (*lead, T, S))
    first = S - T if align == "lower_right" else 0
    out = np.zeros((*lead, T, E))
    for place in np.ndindex(*lead):
        for t in range(T):
            weight = {}
            for s in range(S):
                hidden = causal and s > t + first
                if hidden or (mask is not None and not mask[place][t, s]):
                    continue
                weight[s] = math.fsum(phi(q[place][t, d]) * phi(k[place][s, d]) for d in range(D))
            total = math.fsum(weight.values()) if normalise else 1.0
            for e in range(E):
                mixed = math.fsum(w * float(v[place][s, e]) for s, w in weight.items())
                out[place][t, e] = mixed / total if weight else 0.0
    return out


@pytest.mark.parametrize("case", cases(SPEC))
def test_equals_the_slow_loop(case):
    kwargs = cases(SPEC)[case]
    out, _ = linear_transformer_forward(**kwargs)
    np.testing.assert_allclose(out, slow_linear_transformer(**kwargs), rtol=0, atol=2e-14)


def test_worked_example_forward():
    """phi(q) = (2, 1/2), phi(k) = (1, 4) and (3, 1): weights 4 and 6.5 of 10.5."""
    q, v = np.array([[1.0, -math.log(2)]]), np.array([[21.0], [42.0]])
    k = np.array([[0.0, 3.0], [2.0, 0.0]])
    out, cache = linear_transformer_forward(q, k, v)
    np.testing.assert_allclose(cache.p, [[4 / 10.5, 6.5 / 10.5]], rtol=1e-15)
    np.testing.assert_allclose(out, [[34.0]], rtol=1e-15)
    numerator, _ = linear_transformer_forward(q, k, v, normalise=False)
    np.testing.assert_allclose(numerator, [[357.0]], rtol=1e-15)


def test_worked_example_backward():
    """Weights 1/4 and 3/4 of z = 1, 3: dp = v = (0, 4), dz = (dp - 3) / 4 = (-3/4, 1/4).

    With phi(q) = 1 and slope 1: dphi(k) = dz; dphi(q) = -3/4 + 3/4 = 0; dv = p.
    """
    q, k, v = np.array([[0.0]]), np.array([[0.0], [2.0]]), np.array([[0.0], [4.0]])
    out, cache = linear_transformer_forward(q, k, v)
    g = linear_transformer_backward(np.ones_like(out), cache)
    np.testing.assert_allclose(g["k"], [[-0.75], [0.25]], rtol=1e-15)
    np.testing.assert_allclose(g["v"], [[0.25], [0.75]], rtol=1e-15)
    np.testing.assert_allclose(g["q"], [[0.0]], atol=1e-15)


def test_the_slope_of_the_feature_map():
    """Un-normalised, one key, v = 1: out = phi(q) phi(k); slopes e^q below 0 and 1 above."""
    q = np.array([[-math.log(4)], [3.0]])
    out, cache = linear_transformer_forward(q, np.ones((1, 1)), np.ones((1, 1)), normalise=False)
    g = linear_transformer_backward(np.ones_like(out), cache)
    np.testing.assert_allclose(out, [[0.5], [8.0]], rtol=1e-15)
    np.testing.assert_allclose(g["q"], [[0.5], [2.0]], rtol=1e-15)
    np.testing.assert_allclose(g["k"], [[4.25]], rtol=1e-15)


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
@pytest.mark.parametrize("case", cases(SPEC))
def test_every_chunk_length_gives_the_same(case, chunk):
    kwargs = cases(SPEC)[case]
    want, _ = linear_transformer_forward(**kwargs)
    found, _ = linear_transformer_chunked_forward(**kwargs, chunk=chunk)
    np.testing.assert_allclose(found, want, rtol=0, atol=2e-14)


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_know_every_option_of_empty_rows(form):
    kwargs = cases(SPEC)["mask"]
    empty = ~np.any(kwargs["mask"], axis=-1)
    assert np.any(empty)
    mean = np.broadcast_to(np.mean(kwargs["v"], axis=-2, keepdims=True), (2, 5, 3))
    for word, want in (("zero", 0.0), ("nan", np.nan), ("uniform", mean[empty])):
        out, _ = form(**kwargs, empty_row=word)
        np.testing.assert_allclose(out[empty], np.broadcast_to(want, out[empty].shape), atol=1e-15)
        np.testing.assert_allclose(out[~empty], form(**kwargs)[0][~empty], rtol=0, atol=0)
    with pytest.raises(core.errors.ParameterError, match="without a key"):
        form(**kwargs, empty_row="raise")


def test_uniform_rows_send_their_gradient_to_the_values():
    kwargs = cases(SPEC)["mask"] | {"mask": np.zeros((5, 7), bool), "empty_row": "uniform"}
    out, cache = linear_transformer_forward(**kwargs)
    g = linear_transformer_backward(np.ones_like(out), cache)
    np.testing.assert_allclose(g["v"], np.full((2, 7, 3), 5 / 7), rtol=1e-14)
    assert not np.any(g["q"]) and not np.any(g["k"])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_all_forms_keep_a_nan_where_it_may_be_seen(form, name):
    kwargs = cases(SPEC)["causal"]
    bad = kwargs[name].copy()
    bad[0, 3] = np.nan
    clean, _ = form(**kwargs)
    found, _ = form(**(kwargs | {name: bad}))
    rows = slice(3, 4) if name == "q" else slice(1, None)  # key 3 of 7 is seen from query 1 on
    assert np.all(np.isnan(found[0, rows]))
    found[0, rows] = clean[0, rows]
    np.testing.assert_array_equal(found, clean)


@pytest.mark.parametrize("form", FORMS)
def test_a_nan_key_reaches_every_query_that_is_not_causal(form):
    kwargs = cases(SPEC)["plain"]
    k = kwargs["k"].copy()
    k[1, -1, 0] = np.nan
    out, _ = form(**(kwargs | {"k": k}))
    assert np.all(np.isnan(out[1])) and np.all(np.isfinite(out[0]))


def test_two_queries_with_a_mask_each():
    rng = np.random.default_rng(3)
    q, k, v = rng.standard_normal((2, 4)), rng.standard_normal((5, 4)), rng.standard_normal((5, 3))
    mask = np.array([[True, False, True, True, False], [False, True, True, False, True]])
    want = slow_linear_transformer(q, k, v, mask=mask)
    for form in FORMS:
        np.testing.assert_allclose(form(q, k, v, mask=mask)[0], want, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ["q", "v"])
def test_a_nan_row_sends_no_gradient(name):
    kwargs = cases(SPEC)["causal"]
    bad = kwargs[name].copy()
    bad[:, -1] = np.nan  # the last key is seen by the last query alone
    out, cache = linear_transformer_forward(**(kwargs | {name: bad}))
    assert np.all(np.isnan(out[:, -1]))
    g = linear_transformer_backward(np.ones_like(out), cache)
    first = kwargs | {"q": kwargs["q"][:, :-1], "k": kwargs["k"][:, :-1], "v": kwargs["v"][:, :-1]}
    few, few_cache = linear_transformer_forward(**first)
    want = linear_transformer_backward(np.ones_like(few), few_cache)
    for x in "qkv":
        np.testing.assert_allclose(g[x][:, :-1], want[x], rtol=0, atol=1e-14)
        assert not np.any(g[x][:, -1])


@pytest.mark.parametrize("form", FORMS)
def test_a_mask_with_one_axis_is_a_mask_over_keys(form):
    kwargs = cases(SPEC)["plain"]
    mask = np.array([True, False, True, True, False, True])
    kept = {n: kwargs[n][:, mask] for n in "kv"}
    want, _ = linear_transformer_forward(kwargs["q"], **kept)
    np.testing.assert_allclose(form(**kwargs, mask=mask)[0], want, rtol=0, atol=1e-14)


def test_without_keys_uniform_rows_are_zero():
    for form in FORMS:
        out, _ = form(np.ones((2, 3)), np.ones((0, 3)), np.ones((0, 1)), empty_row="uniform")
        np.testing.assert_array_equal(out, np.zeros((2, 1)))


def test_large_features_do_not_overflow():
    """phi(800) = 801: the branch for negative numbers must not compute exp(800) beside it."""
    x = np.array([[800.0, -800.0]])
    with np.errstate(over="raise"):
        out, cache = linear_transformer_forward(x, x, np.ones((1, 1)), normalise=False)
    np.testing.assert_array_equal(out, [[801.0**2]])
    g = linear_transformer_backward(np.ones_like(out), cache)
    np.testing.assert_array_equal(g["q"], [[801.0, 0.0]])


def test_weights_of_a_row_sum_to_one():
    for case in ("plain", "causal", "packed", "key-mask"):
        kwargs = cases(SPEC)[case]
        _, cache = linear_transformer_forward(**kwargs)
        alive = np.any(cache.live, axis=-1)
        total = np.broadcast_to(np.where(alive, 1.0, 0.0), cache.p.shape[:-1])
        np.testing.assert_allclose(np.sum(cache.p, axis=-1), total, rtol=0, atol=1e-15)
        assert np.all(cache.p >= 0)


def test_equal_features_give_the_mean_of_what_is_visible():
    kwargs = cases(SPEC)["packed"]
    out, _ = linear_transformer_forward(**(kwargs | {"k": np.full_like(kwargs["k"], -1.5)}))
    share = kwargs["mask"] / np.sum(kwargs["mask"], axis=-1, keepdims=True)
    np.testing.assert_allclose(out, share @ kwargs["v"], rtol=0, atol=1e-14)


def test_prefill_then_decode_is_the_whole():
    """The last query alone, over all keys, is the last row of the causal whole."""
    kwargs = cases(SPEC)["causal"]
    whole, _ = linear_transformer_forward(**kwargs)
    last, _ = linear_transformer_forward(**(kwargs | {"q": kwargs["q"][:, -1:]}))
    np.testing.assert_allclose(last, whole[:, -1:], rtol=0, atol=1e-15)


def test_numerator_over_denominator():
    """Values 1 give the denominator: the un-normalised form twice is the normalised one."""
    kwargs = cases(SPEC)["causal"]
    out, _ = linear_transformer_forward(**kwargs)
    top, _ = linear_transformer_forward(**kwargs, normalise=False)
    ones = {"v": np.ones_like(kwargs["v"])}
    bottom, _ = linear_transformer_forward(**(kwargs | ones), normalise=False)
    np.testing.assert_allclose(top / bottom, out, rtol=1e-13)


def test_a_very_negative_query_divides_nothing_by_nothing():
    """phi(q) underflows; the largest channel alone decides, and its weights stay exact."""
    q, k = np.array([[-2000.0, -1000.0]]), np.array([[5.0, 0.0], [7.0, 2.0]])
    for dtype in (np.float64, np.float32):
        out, cache = linear_transformer_forward(
            q.astype(dtype), k.astype(dtype), np.array([[0.0], [4.0]], dtype)
        )
        np.testing.assert_array_equal(out, [[3.0]])
        g = linear_transformer_backward(np.ones_like(out), cache)
        np.testing.assert_array_equal(g["k"], np.array([[0, -0.75], [0, 0.25]], dtype))


def test_keys_without_any_feature_left_give_zero():
    q, k, v = np.zeros((1, 2)), np.full((3, 2), -1e4), np.ones((3, 1))
    for form in FORMS:
        np.testing.assert_array_equal(form(q, k, v)[0], [[0.0]])


def test_keys_and_queries_broadcast_over_heads():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(s) for s in ((3, 5, 4), (1, 6, 4), (1, 6, 2)))
    out, cache = linear_transformer_forward(q, k, v)
    g = linear_transformer_backward(np.cos(out), cache)
    wide, wide_cache = linear_transformer_forward(q, np.repeat(k, 3, 0), np.repeat(v, 3, 0))
    w = linear_transformer_backward(np.cos(wide), wide_cache)
    np.testing.assert_allclose(out, wide, rtol=0, atol=1e-15)
    for name in "kv":
        np.testing.assert_allclose(g[name], w[name].sum(0, keepdims=True), rtol=0, atol=1e-14)
    for form in FORMS[1:]:
        np.testing.assert_allclose(form(q, k, v)[0], out, rtol=0, atol=1e-14)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"k": np.ones((2, 6, 5))}, core.errors.ShapeError, r"k has D = 5 .* expected 4 as in q"),
        ({"mask": np.ones((6, 5), bool)}, core.errors.ShapeError, "looks transposed"),
        ({"feature_map": "relu"}, core.errors.ParameterError, "feature_map is 'relu', expected"),
        ({"feature_map": "identity"}, core.errors.ParameterError, "normalise is True with"),
        ({"normalise": "yes"}, core.errors.ParameterError, "normalise is 'yes', expected"),
        ({"align": "left"}, core.errors.ParameterError, "align is 'left'"),
    ],
)
def test_errors_name_argument_and_expectation(form, change, error, says):
    with pytest.raises(error, match=says):
        form(**(cases(SPEC)["plain"] | change))


def test_a_chunk_has_at_least_one_token():
    with pytest.raises(core.errors.ParameterError, match="chunk is 0"):
        linear_transformer_chunked_forward(**cases(SPEC)["plain"], chunk=0)


def test_values_may_have_axes_of_their_own():
    """A leading axis of v alone: one set of weights, several mixtures, gradients summed back."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(n) for n in ((5, 4), (6, 4), (2, 6, 3)))
    out, cache = linear_transformer_forward(q, k, v, causal=True)
    g = linear_transformer_backward(np.cos(out), cache)
    parts = [linear_transformer_forward(q, k, x, causal=True) for x in v]
    grads = [linear_transformer_backward(np.cos(o), c) for o, c in parts]
    np.testing.assert_allclose(out, np.stack([o for o, _ in parts]), rtol=0, atol=1e-15)
    np.testing.assert_allclose(g["v"], np.stack([x["v"] for x in grads]), rtol=0, atol=1e-14)
    for name in "qk":
        np.testing.assert_allclose(g[name], sum(x[name] for x in grads), rtol=0, atol=1e-14)


def test_a_foreign_cotangent_is_refused():
    out, cache = linear_transformer_forward(**cases(SPEC)["plain"])
    with pytest.raises(core.errors.ShapeError, match="dout has shape"):
        linear_transformer_backward(out[0], cache)


@pytest.mark.oracle
@pytest.mark.parametrize("case", ["plain", "batch", "causal", "key-mask"])
def test_pytorch_agrees(case):
    """PyTorch's elu, cumulative sums instead of pairs, and its own gradients."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")
    kwargs = cases(SPEC)[case]
    given = {n: torch.tensor(kwargs[n], requires_grad=True) for n in "qkv"}
    fq, fk = (torch.nn.functional.elu(given[n]) + 1 for n in "qk")
    if "mask" in kwargs:
        fk = fk * torch.tensor(np.swapaxes(kwargs["mask"], -1, -2))
    states = torch.cumsum(fk[..., :, None] * given["v"][..., None, :], dim=-3)
    sums = torch.cumsum(fk, dim=-2)
    T, S = fq.shape[-2], fk.shape[-2]
    read = [S - T + t if kwargs.get("causal") else S - 1 for t in range(T)]
    top = torch.einsum("...td,...tde->...te", fq, states[..., read, :, :])
    bottom = torch.sum(fq * sums[..., read, :], dim=-1, keepdim=True)
    theirs = top / torch.where(bottom == 0, 1.0, bottom)
    out, cache = linear_transformer_forward(**kwargs)
    dout = np.random.default_rng(5).standard_normal(out.shape)
    theirs.backward(torch.tensor(dout))
    np.testing.assert_allclose(out, theirs.detach().numpy(), rtol=0, atol=1e-14)
    for name, g in linear_transformer_backward(dout, cache).items():
        np.testing.assert_allclose(g, given[name].grad.numpy(), rtol=0, atol=1e-13)
