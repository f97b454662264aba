"""Soft-capped scores: slow loop, worked example, identities, limits, oracles."""

import math

import numpy as np
import pytest

import attention_ref
from attention_ref import core
from attention_ref.kit.checks import cases
from attention_ref.methods.scores.softcap import softcap_backward, softcap_forward

SPEC = attention_ref.get("scores/softcap")
DOT = attention_ref.get("scores/dot_product")


def slow_softcap(
    q, k, v, cap=50.0, mask=None, causal=False, align="lower_right", scale=None, bias=None,
):  # fmt: skip
    """One number at a time; tanh by its exponentials."""
    lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    T, D, S, E = q.shape[-2], q.shape[-1], k.shape[-2], v.shape[-1]
    q = np.broadcast_to(q, (*lead, T, D))
    k = np.broadcast_to(k, (*lead, S, D))
    v = np.broadcast_to(v, (*lead, S, E))
    mask = None if mask is None else np.broadcast_to(mask, (*lead, T, S))
    bias = None if bias is None else np.broadcast_to(bias, (*lead, T, S))
    cap = np.broadcast_to(np.array(cap), lead)
    c = 1.0 / math.sqrt(D) if scale is None else scale
    first = S - T if align == "lower_right" else 0
    out = np.zeros((*lead, T, E))
    for place in np.ndindex(*lead):
        bound = float(cap[place])
        for t in range(T):
            weight = {}
            for s in range(S):
                if causal and s > t + first:
                    continue
                if mask is not None and not mask[place][t, s]:
                    continue
                z = c * math.fsum(float(q[place][t, d]) * float(k[place][s, d]) for d in range(D))
                less = math.expm1(-2.0 * abs(z) / bound)  # tanh x = (1 - e^-2x) / (1 + e^-2x)
                y = math.copysign(bound * -less / (2.0 + less), z)
                if bias is not None:
                    y += float(bias[place][t, s])
                weight[s] = math.exp(y)
            total = math.fsum(weight.values())
            for e in range(E):
                mixed = math.fsum(w * float(v[place][s, e]) for s, w in weight.items())
                out[place][t, e] = mixed / total if weight else 0.0
    return out


@pytest.mark.parametrize("case", cases(SPEC))
def test_equals_the_slow_loop(case):
    kwargs = cases(SPEC)[case]
    out, _ = softcap_forward(**kwargs)
    np.testing.assert_allclose(out, slow_softcap(**kwargs), rtol=0, atol=1e-14)


L3 = math.log(3.0)
CAP = 5.0 / 3.0 * L3
"""tanh(ln 2) = 3/5, so a score of CAP ln 2 is capped to 3/5 CAP = ln 3."""


def test_worked_example_forward():
    """y = (0, ln 3): weights 1/4 and 3/4; the uncapped score is 5/3 ln 3 ln 2 = 1.27."""
    q, k = np.array([[1.0]]), np.array([[0.0], [CAP * math.log(2.0)]])
    v = np.array([[4.0], [8.0]])
    out, cache = softcap_forward(q, k, v, CAP)
    np.testing.assert_allclose(cache.p, [[0.25, 0.75]], rtol=1e-15)
    np.testing.assert_allclose(out, [[7.0]], rtol=1e-15)
    np.testing.assert_allclose(cache.lse, [math.log(4.0)], rtol=1e-15)


def test_worked_example_backward():
    """dy = p (v - o) = (-3/4, 3/4); slopes 1 and 16/25.

    dk = (-3/4, 12/25), dq = 12/25 k_2, dcap = 3/4 (3/5 - 16/25 ln 2), dbias = dy.
    """
    one = (1, 1, 1)
    q, k = np.ones(one), np.array([[[0.0], [CAP * math.log(2.0)]]])
    v, bias = np.array([[[4.0], [8.0]]]), np.zeros((1, 2))
    out, cache = softcap_forward(q, k, v, np.array([CAP]), bias=bias)
    g = softcap_backward(np.ones_like(out), cache)
    np.testing.assert_allclose(g["v"], [[[0.25], [0.75]]], rtol=1e-15)
    np.testing.assert_allclose(g["bias"], [[-0.75, 0.75]], rtol=1e-14)
    np.testing.assert_allclose(g["k"], [[[-0.75], [0.48]]], rtol=1e-14)
    np.testing.assert_allclose(g["q"], [[[0.48 * CAP * math.log(2.0)]]], rtol=1e-14)
    np.testing.assert_allclose(g["cap"], [0.75 * (0.6 - 0.64 * math.log(2.0))], rtol=1e-14)


def test_values_and_slopes_of_gemma():
    """cap 50: 100, 200, 300 become 48.20, 49.97, 50.00, with slopes .071, .0013, 2.5e-5."""
    q, k = np.ones((1, 1)), np.array([[100.0], [200.0], [300.0], [0.0]])
    _, cache = softcap_forward(q, k, k, scale=1.0)
    np.testing.assert_allclose(50 * cache.u[0, :3], [48.20, 49.97, 50.00], atol=5e-3)
    np.testing.assert_allclose(1 - cache.u[0, :3] ** 2, [0.0707, 1.34e-3, 2.46e-5], rtol=3e-3)


def test_the_ratio_of_two_weights_is_bounded():
    kwargs = cases(SPEC)["plain"]
    p = softcap_forward(**(kwargs | {"q": 1e8 * kwargs["q"]}))[1].p
    ratio = np.max(np.max(p, axis=-1) / np.min(p, axis=-1), axis=-1)
    np.testing.assert_array_less(ratio[0], np.exp(2 * kwargs["cap"]) * (1 + 1e-12))
    assert np.all(ratio[0] > np.exp(1.99 * kwargs["cap"]))


def test_the_order_of_the_keys_is_kept_and_signs_turn():
    kwargs = {n: cases(SPEC)["plain"][n] for n in ("q", "k", "v", "cap")}
    capped, plain = softcap_forward(**kwargs)[1], DOT.forward(*(kwargs[n] for n in "qkv"))[1]
    np.testing.assert_array_equal(np.argsort(capped.p), np.argsort(plain.p))
    turned = softcap_forward(**(kwargs | {"q": -kwargs["q"]}))[1]
    np.testing.assert_array_equal(turned.u, -capped.u)
    same, _ = softcap_forward(**(kwargs | {"cap": -kwargs["cap"]}))
    np.testing.assert_array_equal(same, softcap_forward(**kwargs)[0])


def test_the_cap_comes_after_the_scale():
    """Scores and cap both halved: half the capped scores, as if the temperature were doubled."""
    kwargs = cases(SPEC)["plain"]
    half = kwargs | {"scale": kwargs["scale"] / 2, "cap": kwargs["cap"] / 2}
    full, part = softcap_forward(**kwargs)[1], softcap_forward(**half)[1]
    np.testing.assert_array_equal(full.u, part.u)
    root = np.sqrt(full.p)
    np.testing.assert_allclose(part.p, root / root.sum(-1, keepdims=True), rtol=1e-14)


def test_error_of_a_large_cap_is_a_third_of_the_cube():
    """y = z - z^3 / (3 cap^2) + ...: ten times the cap, a hundredth of the error."""
    kwargs = {n: cases(SPEC)["plain"][n] for n in "qkv"}
    for cap in (1e2, 1e3):
        _, cache = softcap_forward(**kwargs, cap=cap)
        error = cache.z - cap * cache.u
        np.testing.assert_allclose(error, cache.z**3 / (3 * cap**2), rtol=1e-3, atol=1e-13)


def test_a_tiny_cap_gives_the_mean():
    kwargs = cases(SPEC)["mask"] | {"cap": 1e-18}
    out, cache = softcap_forward(**kwargs)
    want, _ = DOT.forward(**({n: kwargs[n] for n in ("q", "k", "v", "mask")} | {"scale": 0.0}))
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-15)
    g = softcap_backward(np.ones_like(out), cache)
    assert not np.any(g["q"]) and set(g) == {"q", "k", "v"}


def test_a_bias_of_minus_infinity_hides_and_is_not_capped():
    kwargs = cases(SPEC)["plain"]
    bias = np.zeros((5, 6))
    bias[:, 4], bias[:, 1] = -np.inf, 9.0
    out, cache = softcap_forward(**kwargs, bias=bias)
    assert not np.any(cache.p[..., 4]) and np.min(cache.p[..., 1]) > 0.98
    bad = bias.copy()
    bad[2, 0] = np.nan
    found, cache = softcap_forward(**kwargs, bias=bad)
    assert np.all(np.isnan(found[:, :, 2])) and np.sum(np.isnan(found)) == 6
    assert np.all(np.isnan(cache.lse[..., 2])) and np.sum(np.isnan(cache.lse)) == 2
    dout = np.random.default_rng(1).standard_normal(out.shape)
    g = softcap_backward(dout, cache)
    dout[:, :, 2] = 0.0
    want = softcap_backward(dout, softcap_forward(**kwargs, bias=bias)[1])
    for name in g:
        np.testing.assert_allclose(g[name], want[name], rtol=0, atol=1e-14)


def test_caps_of_each_batch_member():
    kwargs = cases(SPEC)["batch"]
    cap = np.random.default_rng(4).uniform(0.8, 2.0, (3, 2))
    out, cache = softcap_forward(**(kwargs | {"cap": cap}))
    g = softcap_backward(np.ones_like(out), cache)
    for b in range(3):
        one = {n: kwargs[n][b] for n in "qkv"} | {"cap": cap[b], "scale": kwargs["scale"]}
        found, cache = softcap_forward(**one)
        np.testing.assert_allclose(found, out[b], rtol=0, atol=1e-15)
        h = softcap_backward(np.ones_like(found), cache)
        np.testing.assert_allclose(h["cap"], g["cap"][b], rtol=0, atol=1e-15)
    shared, cache = softcap_forward(**(kwargs | {"cap": cap[:1, :1]}))
    assert softcap_backward(np.ones_like(shared), cache)["cap"].shape == (1, 1)


def test_leading_axes_of_queries_and_values_alone():
    kwargs = cases(SPEC)["batch"]
    q = kwargs["q"][0, 0]
    out, cache = softcap_forward(**(kwargs | {"q": q}))
    wide, same = softcap_forward(**(kwargs | {"q": np.broadcast_to(q, kwargs["q"].shape)}))
    np.testing.assert_array_equal(out, wide)
    g, h = (softcap_backward(np.ones_like(out), c) for c in (cache, same))
    np.testing.assert_allclose(g["q"], np.sum(h["q"], axis=(0, 1)), rtol=0, atol=1e-15)
    values, cache = softcap_forward(kwargs["q"][0], kwargs["k"][0], kwargs["v"])
    assert softcap_backward(np.ones_like(values), cache)["v"].shape == kwargs["v"].shape


@pytest.mark.parametrize(
    ("cap", "error", "says"),
    [
        (0.0, core.errors.ParameterError, "cap is 0.0"),
        (-1, core.errors.ParameterError, "cap is -1"),
        (math.inf, core.errors.ParameterError, "cap is inf"),
        (True, core.errors.ParameterError, "cap is True"),
        (None, core.errors.DTypeError, "cap is a NoneType"),
        ([1.0, 2.0], core.errors.DTypeError, "cap is a list"),
        (np.ones(3), core.errors.ShapeError, r"cap has shape \(3,\), .* leading axes of q"),
        (np.ones((1, 1, 2)), core.errors.ShapeError, r"cap has shape \(1, 1, 2\)"),
    ],
)
def test_errors_of_the_cap(cap, error, says):
    with pytest.raises(error, match=says):
        softcap_forward(**(cases(SPEC)["plain"] | {"cap": cap}))


def test_other_errors():
    kwargs = cases(SPEC)["plain"]
    out, cache = softcap_forward(**kwargs)
    with pytest.raises(core.errors.ShapeError, match="dout has shape"):
        softcap_backward(out[0], cache)
    with pytest.raises(TypeError, match="softcap"):
        softcap_forward(**kwargs, softcap=1.0)


@pytest.mark.oracle
@pytest.mark.parametrize("case", cases(SPEC))
def test_pytorch_agrees(case):
    """The lines of a capped attention in its operations; the gradients by its autograd."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")
    kwargs = cases(SPEC)[case]
    out, cache = softcap_forward(**kwargs)
    dout = np.random.default_rng(5).standard_normal(out.shape)
    mine = softcap_backward(dout, cache)
    given = {n: torch.tensor(kwargs[n], requires_grad=True) for n in mine}
    cap = given["cap"][..., None, None] if "cap" in given else kwargs.get("cap", 50.0)
    scale = kwargs.get("scale", kwargs["q"].shape[-1] ** -0.5)
    z = scale * given["q"] @ given["k"].transpose(-1, -2)
    z = cap * torch.tanh(z / cap) + given.get("bias", 0.0)
    rule = {n: kwargs[n] for n in ("mask", "causal", "align") if n in kwargs}
    live = torch.tensor(np.array(core.visible(kwargs["q"], kwargs["k"], **rule)))
    alive = live.any(-1, keepdim=True)
    p = torch.softmax(torch.where(live | ~alive, z, -torch.inf), -1)
    theirs = torch.where(alive, p, 0.0) @ given["v"]
    theirs.backward(torch.tensor(dout))
    np.testing.assert_allclose(out, theirs.detach().numpy(), rtol=0, atol=4e-15)
    for name, g in mine.items():
        np.testing.assert_allclose(g, given[name].grad.numpy(), rtol=0, atol=4e-14)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("cap", [1.4, np.array([0.9, -2.0])])
def test_the_compiled_path_over_several_tiles(cap, causal):
    rng = np.random.default_rng(11)
    q, k, v = (rng.standard_normal((2, n, 6)) for n in (150, 300, 300))
    kwargs = {"q": q, "k": k, "v": v, "cap": cap, "causal": causal,
              "mask": rng.random((150, 300)) < 0.8, "bias": rng.standard_normal(300)}  # fmt: skip
    out, cache = attention_ref.run("scores/softcap", **kwargs)
    fast, mine = attention_ref.run("scores/softcap", **kwargs, backend="numba")
    dout = rng.standard_normal(out.shape)
    want, got = SPEC.backward(dout, cache), SPEC.numba.backward(dout, mine)
    assert set(got) == set(want)
    np.testing.assert_allclose(fast, out, rtol=0, atol=1e-13)
    for name, dx in want.items():
        np.testing.assert_allclose(got[name], dx, rtol=0, atol=1e-13 * np.abs(dx).max())


@pytest.mark.parametrize("empty_row", ["zero", "nan", "uniform"])
def test_the_compiled_path_of_learned_caps_where_rows_are_empty_or_not_finite(empty_row):
    rng = np.random.default_rng(12)
    kwargs = {n: rng.standard_normal((2, m, 4)) for n, m in (("q", 5), ("k", 7), ("v", 7))}
    if empty_row != "uniform":
        kwargs["k"][0, 6] = np.nan
    kwargs["q"][1, 2] = np.inf
    kwargs |= {"cap": np.array([0.9, 1.5]), "causal": True, "empty_row": empty_row,
               "mask": np.arange(5)[:, None] != 1}  # fmt: skip
    out, cache = softcap_forward(**kwargs)
    fast, mine = SPEC.numba.forward(**kwargs)
    np.testing.assert_allclose(fast, out, rtol=0, atol=1e-14)
    dout = rng.standard_normal(out.shape)
    got = SPEC.numba.backward(dout, mine)
    for name, dx in softcap_backward(dout, cache).items():
        np.testing.assert_allclose(got[name], dx, rtol=0, atol=1e-13, err_msg=name)
