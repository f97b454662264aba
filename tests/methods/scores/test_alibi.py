"""Linear biases: slow loop, worked example, slopes, identities, limits, oracle."""

import math

import numpy as np
import pytest

import attention_ref
from attention_ref import core
from attention_ref.kit.checks import cases
from attention_ref.methods.scores.alibi import alibi_backward, alibi_forward, alibi_slopes

SPEC = attention_ref.get("scores/alibi")
DOT = attention_ref.get("scores/dot_product")


def slow_alibi(
    q, k, v, m=None, mask=None, causal=False, align="lower_right", scale=None, softcap=None,
    bias=None,
):  # fmt: skip
    """One number at a time; the slopes by taking roots until the list is long enough."""
    lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    T, D, S, E = q.shape[-2], q.shape[-1], k.shape[-2], v.shape[-1]
    q = np.broadcast_to(q, (*lead, T, D))
    k = np.broadcast_to(k, (*lead, S, D))
    v = np.broadcast_to(v, (*lead, S, E))
    mask = None if mask is None else np.broadcast_to(mask, (*lead, T, S))
    bias = None if bias is None else np.broadcast_to(bias, (*lead, T, S))
    H = lead[-1] if lead else 1
    slopes, ratio = [2.0**-8], 2.0**-8
    while 2 * len(slopes) <= H:  # twice the heads, the root of the ratio
        ratio = math.sqrt(ratio)
        slopes = [ratio ** (h + 1) for h in range(2 * len(slopes))]
    finer = [math.sqrt(ratio) ** (2 * h + 1) for h in range(len(slopes))]
    slopes = (slopes + finer)[:H]
    m = None if m is None else np.broadcast_to(m, lead)
    c = 1.0 / math.sqrt(D) if scale is None else scale
    first = S - T if align == "lower_right" else 0
    out = np.zeros((*lead, T, E))
    for place in np.ndindex(*lead):
        slope = float(m[place]) if m is not None else slopes[place[-1] if place else 0]
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
                z -= slope * max(t + first - s, s - t - first)
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
    out, _ = alibi_forward(**kwargs)
    np.testing.assert_allclose(out, slow_alibi(**kwargs), rtol=0, atol=1e-14)


@pytest.mark.parametrize("heads", [1, 3, 5, 12])
def test_default_slopes_for_any_number_of_heads(heads):
    rng = np.random.default_rng(heads)
    kwargs = core.examples.qkv(rng, lead=(heads,), T=2, S=4)
    out, _ = alibi_forward(**kwargs, causal=True)
    np.testing.assert_allclose(out, slow_alibi(**kwargs, causal=True), rtol=0, atol=1e-14)


def test_slopes_of_eight_and_twelve_heads():
    """1/2 ... 1/256; four more at the places between: 2^-1/2, 2^-3/2, 2^-5/2, 2^-7/2."""
    eight = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    assert alibi_slopes(8) == eight and alibi_slopes(1) == [1 / 256]
    between = [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]
    np.testing.assert_allclose(alibi_slopes(12), eight + between, rtol=1e-15)
    assert alibi_slopes(3) == [1 / 16, 1 / 256, 1 / 4]


ROUND = {
    "q": np.zeros((2, 2, 1)),
    "k": np.zeros((2, 3, 1)),
    "v": np.array([[[13.0], [26.0], [0.0]], [[0.0], [7.0], [21.0]]]),
    "m": np.array([math.log(3.0), math.log(2.0)]),
}
"""Equal contents: the weights are 3^-d in the first head and 2^-d in the second."""


def test_worked_example_forward():
    """T = 2 queries at places 1 and 2 of S = 3. Last row, head 0: 1, 3, 9 of 13; head 1: of 7."""
    out, cache = alibi_forward(**ROUND, causal=True)
    third, half = [[1 / 4, 3 / 4, 0], [1 / 13, 3 / 13, 9 / 13]], [[1 / 3, 2 / 3, 0]]
    np.testing.assert_allclose(cache.p[0], third, rtol=1e-15)
    np.testing.assert_allclose(cache.p[1], [*half, [1 / 7, 2 / 7, 4 / 7]], rtol=1e-15)
    np.testing.assert_allclose(out[0], [[13 / 4 + 78 / 4], [7.0]], rtol=1e-15)
    np.testing.assert_allclose(out[1], [[14 / 3], [14.0]], rtol=1e-15)
    np.testing.assert_allclose(cache.lse[:, 1], np.log([13 / 9, 7 / 4]), rtol=1e-15)


def test_worked_example_both_sides():
    """Without causal the key ahead counts by its distance too: 3^-1, 1, 3^-1 of 5/3."""
    out, cache = alibi_forward(**ROUND)
    np.testing.assert_allclose(cache.p[0, 0], [1 / 5, 3 / 5, 1 / 5], rtol=1e-15)
    np.testing.assert_allclose(out[:, 0], [[13 / 5 + 78 / 5], [14 / 4 + 21 / 4]], rtol=1e-15)


def test_worked_example_upper_left():
    """Query 0 meets key 0: weights 9, 3, 1 of 13; query 1: 1, 3, 1 of 5."""
    _, cache = alibi_forward(**ROUND, align="upper_left")
    np.testing.assert_allclose(cache.p[0], [[9 / 13, 3 / 13, 1 / 13], [0.2, 0.6, 0.2]], rtol=1e-15)


def test_worked_example_backward():
    """One query at the second of two keys, m = ln 3: p = (1/4, 3/4), v = (4, 8), o = 7.

    dz = p (v - o) = (-3/4, 3/4), distances (1, 0): dm = 3/4.
    """
    q, k, v = np.ones((1, 1, 1)), np.full((1, 2, 1), 2.0), np.array([[[4.0], [8.0]]])
    bias = np.zeros((1, 1, 2))
    out, cache = alibi_forward(q, k, v, np.array([math.log(3.0)]), bias=bias)
    g = alibi_backward(np.ones_like(out), cache)
    np.testing.assert_allclose(out, [[[7.0]]], rtol=1e-15)
    np.testing.assert_allclose(g["m"], [0.75], rtol=1e-14)
    np.testing.assert_allclose(g["bias"], [[[-0.75, 0.75]]], rtol=1e-14)
    np.testing.assert_allclose(g["k"], [[[-0.75], [0.75]]], rtol=1e-14)
    np.testing.assert_allclose(g["v"], [[[0.25], [0.75]]], rtol=1e-15)
    np.testing.assert_allclose(g["q"], 0.0, atol=1e-15)  # equal keys


def test_the_linear_bias_is_not_scaled_and_not_capped():
    kwargs = cases(SPEC)["softcap"] | {"m": np.array([5.0, 7.0])}
    _, cache = alibi_forward(**kwargs)
    _, same = alibi_forward(**(kwargs | {"q": 2 * kwargs["q"], "scale": kwargs["scale"] / 2}))
    np.testing.assert_array_equal(cache.p, same.p)
    flat = cases(SPEC)["plain"] | {"q": np.zeros((1, 2, 5, 4)), "softcap": 0.1}
    _, cache = alibi_forward(**flat)
    d = np.abs(np.arange(5)[:, None] + 1 - np.arange(6))
    e = np.exp(-flat["m"][:, None, None] * d)
    np.testing.assert_allclose(cache.p[0], e / e.sum(-1, keepdims=True), rtol=1e-14)


def test_a_large_slope_attends_to_the_place_of_the_query():
    kwargs = cases(SPEC)["causal"] | {"m": np.full(2, 1e6)}
    out, _ = alibi_forward(**kwargs)
    np.testing.assert_array_equal(out, kwargs["v"][:, :, 2:])


def test_the_weights_depend_on_the_distance_only():
    """The same contents three places later in a longer sequence: the same weights among them."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 9, 3)) for _ in "qkv")
    mask = np.zeros((9, 9), bool)
    mask[3:, 3:] = True
    _, late = alibi_forward(q, k, v, mask=mask)
    _, early = alibi_forward(q[:, 3:], k[:, 3:], v[:, 3:])
    np.testing.assert_allclose(late.p[:, 3:, 3:], early.p, rtol=0, atol=1e-15)


def test_mean_distance_of_equal_contents():
    """1/(e^m - 1) tokens, in a long sequence: ln 2 gives 1, ln(3/2) gives 2."""
    q, k = np.zeros((2, 1, 1)), np.zeros((2, 400, 1))
    _, cache = alibi_forward(q, k, k, np.log([2.0, 1.5]))
    np.testing.assert_allclose(cache.p @ cache.distance[0], [[1.0], [2.0]], rtol=1e-13)


def test_what_hides_behind_a_mask_reaches_nothing():
    """NaN in a hidden key and value changes no bit, and their gradients are 0."""
    kwargs = cases(SPEC)["plain"]
    mask = np.ones((5, 6), bool)
    mask[:, 2] = False
    out, cache = alibi_forward(**kwargs, mask=mask)
    bad = {n: kwargs[n].copy() for n in "kv"}
    bad["k"][..., 2, :], bad["v"][..., 2, :] = np.nan, np.inf
    found, poisoned = alibi_forward(**(kwargs | bad), mask=mask)
    np.testing.assert_array_equal(found, out)
    dout = np.random.default_rng(1).standard_normal(out.shape)
    g, clean = alibi_backward(dout, poisoned), alibi_backward(dout, cache)
    for name in g:
        np.testing.assert_array_equal(g[name], clean[name])
    assert not np.any(g["k"][..., 2, :]) and not np.any(g["v"][..., 2, :])


def test_a_poisoned_row_sends_nothing_back_to_the_slopes():
    kwargs = cases(SPEC)["bias"]
    bad = kwargs["bias"].copy()
    bad[1, 2, 3] = np.nan
    out, cache = alibi_forward(**(kwargs | {"bias": bad}))
    assert np.all(np.isnan(out[:, 1, 2])) and np.sum(np.isnan(out)) == 3
    assert np.all(np.isnan(cache.lse[:, 1, 2]))
    dout = np.random.default_rng(2).standard_normal(out.shape)
    g = alibi_backward(dout, cache)
    dout[:, 1, 2] = 0.0
    want = alibi_backward(dout, alibi_forward(**kwargs)[1])
    for name in g:
        np.testing.assert_allclose(g[name], want[name], rtol=0, atol=1e-14)


def test_a_slope_that_is_nan_poisons_its_head():
    kwargs = cases(SPEC)["plain"]
    out, _ = alibi_forward(**(kwargs | {"m": np.array([np.nan, 0.5])}))
    assert np.all(np.isnan(out[:, 0])) and np.all(np.isfinite(out[:, 1]))


def test_heads_come_from_the_leading_axes_of_all_three():
    """Keys of two heads for queries without: two heads come out, the queries collect."""
    kwargs = cases(SPEC)["batch"]
    q = kwargs["q"][0, 0]
    out, cache = alibi_forward(**(kwargs | {"q": q}))
    wide, same = alibi_forward(**(kwargs | {"q": np.broadcast_to(q, kwargs["q"].shape)}))
    np.testing.assert_array_equal(out, wide)
    g, h = (alibi_backward(np.ones_like(out), c) for c in (cache, same))
    np.testing.assert_allclose(g["q"], np.sum(h["q"], axis=(0, 1)), rtol=0, atol=1e-15)
    values, cache = alibi_forward(kwargs["q"][0], kwargs["k"][0], kwargs["v"])
    assert alibi_backward(np.ones_like(values), cache)["v"].shape == kwargs["v"].shape


def test_slopes_of_each_batch_member():
    kwargs = cases(SPEC)["batch"]
    m = np.random.default_rng(4).uniform(0.1, 0.9, (3, 2))
    out, cache = alibi_forward(**(kwargs | {"m": m}))
    g = alibi_backward(np.ones_like(out), cache)
    for b in range(3):
        one = {n: kwargs[n][b] for n in "qkv"} | {"m": m[b], "scale": kwargs["scale"]}
        found, cache = alibi_forward(**one)
        np.testing.assert_allclose(found, out[b], rtol=0, atol=1e-15)
        h = alibi_backward(np.ones_like(found), cache)
        np.testing.assert_allclose(h["m"], g["m"][b], rtol=0, atol=1e-15)
    shared, cache = alibi_forward(**(kwargs | {"m": m[:1, :1]}))
    assert alibi_backward(np.ones_like(shared), cache)["m"].shape == (1, 1)


def test_no_heads_at_all():
    out, _ = alibi_forward(*(np.zeros((3, 0, n, 2)) for n in (4, 5, 5)))
    assert out.shape == (3, 0, 4, 2)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"m": np.ones(3)}, core.errors.ShapeError, r"m has shape \(3,\), .* leading axes of q"),
        ({"m": np.ones((5, 2, 2))}, core.errors.ShapeError, r"m has shape \(5, 2, 2\)"),
        ({"m": [0.5, 0.5]}, core.errors.DTypeError, "m is a list"),
        ({"align": "right"}, core.errors.ParameterError, "align is 'right'"),
    ],
)
def test_errors_name_argument_and_expectation(change, error, says):
    with pytest.raises(error, match=says):
        alibi_forward(**(cases(SPEC)["plain"] | change))


@pytest.mark.parametrize("heads", [0, 2.0, True])
def test_a_wrong_number_of_heads(heads):
    with pytest.raises(core.errors.ParameterError, match="heads is"):
        alibi_slopes(heads)


def test_a_cotangent_of_another_shape():
    out, cache = alibi_forward(**cases(SPEC)["plain"])
    with pytest.raises(core.errors.ShapeError, match="dout has shape"):
        alibi_backward(out[0], cache)


@pytest.mark.oracle
@pytest.mark.parametrize("case", ["plain", "batch", "causal", "bias", "packed", "no-heads"])
def test_pytorch_agrees(case):
    """Its scaled_dot_product_attention with the linear bias as an additive mask; its autograd."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")
    kwargs = cases(SPEC)[case]
    out, cache = alibi_forward(**kwargs)
    dout = np.random.default_rng(5).standard_normal(out.shape)
    mine = alibi_backward(dout, cache)
    given = {n: torch.tensor(kwargs[n], requires_grad=True) for n in mine}
    T, S = kwargs["q"].shape[-2], kwargs["k"].shape[-2]
    slopes = given.get("m", torch.tensor([2.0**-4, 2.0**-8], dtype=torch.float64))
    slopes = 2.0**-8 if case == "no-heads" else slopes[..., None, None]
    ahead = torch.arange(S) - torch.arange(T)[:, None] - (S - T)
    added = -slopes * ahead.abs() + given.get("bias", 0.0)
    if kwargs.get("causal"):
        added = torch.where(ahead > 0, -torch.inf, added)
    if "mask" in kwargs:
        added = torch.where(torch.tensor(kwargs["mask"]), added, -torch.inf)
    q, k, v = (given[n] if given[n].ndim == 4 else given[n][None, None] for n in "qkv")
    theirs = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=added.expand(*q.shape[:2], T, S), scale=kwargs.get("scale")
    ).reshape(out.shape)
    theirs.backward(torch.tensor(dout))
    np.testing.assert_allclose(out, theirs.detach().numpy(), rtol=0, atol=4e-15)
    for name, g in mine.items():
        np.testing.assert_allclose(g, given[name].grad.numpy(), rtol=0, atol=4e-14)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("given", [(), ("m", "mask", "bias"), ("m", "row", "softcap")])
def test_the_compiled_path_over_several_tiles(given, causal):
    rng = np.random.default_rng(11)
    q, k, v = (rng.standard_normal((16, n, 4)) for n in (150, 300, 300))  # two blocks of queries
    more = {"m": rng.uniform(0, 0.1, 16), "mask": rng.random((150, 300)) < 0.8, "softcap": 1.5,
            "bias": rng.standard_normal((150, 300))}  # fmt: skip
    kwargs = {"q": q, "k": k, "v": v, "causal": causal} | {n: more[n] for n in given if n in more}
    if "row" in given:
        kwargs |= {"bias": rng.standard_normal(300), "align": "upper_left"}
    out, cache = attention_ref.run("scores/alibi", **kwargs)
    fast, mine = attention_ref.run("scores/alibi", **kwargs, backend="numba")
    dout = rng.standard_normal(out.shape)
    want, got = SPEC.backward(dout, cache), SPEC.numba.backward(dout, mine)
    assert set(got) == set(want)
    np.testing.assert_allclose(fast, out, rtol=0, atol=1e-13)
    for name, dx in want.items():
        np.testing.assert_allclose(got[name], dx, rtol=0, atol=1e-13 * np.abs(dx).max())


@pytest.mark.parametrize("empty_row", ["zero", "nan", "uniform"])
def test_the_compiled_path_where_rows_are_empty_or_not_finite(empty_row):
    rng = np.random.default_rng(12)
    kwargs = {n: rng.standard_normal((2, s, 4)) for n, s in (("q", 7), ("k", 5), ("v", 5))}
    if empty_row != "uniform":
        kwargs["k"][1, 3] = np.nan
    kwargs["q"][0, 5] = np.inf
    kwargs |= {"m": np.array([0.3, 0.7]), "causal": True, "empty_row": empty_row}
    out, cache = alibi_forward(**kwargs)
    fast, mine = SPEC.numba.forward(**kwargs)
    np.testing.assert_allclose(fast, out, rtol=0, atol=1e-14)
    dout = rng.standard_normal(out.shape)
    got = SPEC.numba.backward(dout, mine)
    for name, dx in alibi_backward(dout, cache).items():
        np.testing.assert_allclose(got[name], dx, rtol=0, atol=1e-13, err_msg=name)
