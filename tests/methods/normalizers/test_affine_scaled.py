"""Affine-scaled attention: slow loop, worked example, sums of rows, reductions, oracle."""

import math

import numpy as np
import pytest

import attention_ref
from attention_ref import core
from attention_ref.kit.checks import cases
from attention_ref.methods.normalizers.affine_scaled import (
    affine_scaled_backward,
    affine_scaled_forward,
    affine_scaled_update,
)

SPEC = attention_ref.get("normalizers/affine_scaled")
softmax = attention_ref.get("scores/dot_product")


def slow_affine_scaled(
    q, k, v, x, w_a, alpha_ma, n=None, phi="clip", mask=None, causal=False, align="lower_right",
    scale=None, softcap=None, bias=None,
):  # fmt: skip
    """One number at a time."""
    lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    T, D, S, E, C = q.shape[-2], q.shape[-1], k.shape[-2], v.shape[-1], x.shape[-1]
    q = np.broadcast_to(q, (*lead, T, D))
    k = np.broadcast_to(k, (*lead, S, D))
    v = np.broadcast_to(v, (*lead, S, E))
    x = np.broadcast_to(x, (*lead, T, C))
    w_a = np.broadcast_to(w_a, (*lead, C))
    alpha_ma = np.broadcast_to(alpha_ma, lead)
    mask = None if mask is None else np.broadcast_to(mask, (*lead, T, S))
    bias = None if bias is None else np.broadcast_to(bias, (*lead, T, S))
    c = 1.0 / math.sqrt(D) if scale is None else scale
    first = S - T if align == "lower_right" else 0
    out = np.zeros((*lead, T, E))
    for at in np.ndindex(*lead):
        for t in range(T):
            grown = {}
            for s in range(S):
                if causal and s > t + first:
                    continue
                if mask is not None and not mask[at][t, s]:
                    continue
                z = c * math.fsum(float(q[at][t, d]) * float(k[at][s, d]) for d in range(D))
                if softcap is not None:
                    z = softcap * math.tanh(z / softcap)
                z = z if bias is None else z + float(bias[at][t, s])
                if z > -math.inf:
                    grown[s] = math.exp(z)
            total = math.fsum(grown.values())
            a = math.fsum(float(x[at][t, i]) * float(w_a[at][i]) for i in range(C))
            if phi == "sigmoid":
                alpha = 1.0 / (1.0 + math.exp(-a))
            elif a <= -5:
                alpha = 0.0
            else:
                alpha = 1.0 if a >= 5 else 0.1 * a + 0.5
            beta = (float(alpha_ma[at]) - alpha) / (S if n is None else n)
            for e in range(E):
                out[at][t, e] = math.fsum(
                    (alpha * w / total + beta) * float(v[at][s, e]) for s, w in grown.items()
                )
    return out


@pytest.mark.parametrize("case", cases(SPEC))
def test_equals_the_slow_loop(case):
    kwargs = cases(SPEC)[case]
    out, _ = affine_scaled_forward(**kwargs)
    np.testing.assert_allclose(out, slow_affine_scaled(**kwargs), rtol=0, atol=1e-14)


def drawn(seed=0, lead=(2, 3), **options):
    """Batch of 2 with 3 heads, T = 4, S = 5, D = 4, E = 3, C = 2; a token for each query."""
    rng = np.random.default_rng(seed)
    kwargs = core.examples.qkv(rng, lead=lead, T=4, S=5)
    kwargs["x"] = 2 * rng.standard_normal((*lead[:-1], *(1 for _ in lead[-1:]), 4, 2))
    kwargs["w_a"] = rng.standard_normal((*lead[-1:], 2))
    kwargs["alpha_ma"] = rng.random(lead[-1:]) if lead else 0.3
    return kwargs | options


@pytest.mark.parametrize("phi", ["clip", "sigmoid"])
@pytest.mark.parametrize("lead", [(2, 3), ()])
def test_a_batch_with_heads_and_its_gradient(lead, phi):
    from attention_ref import engine

    kwargs = drawn(lead=lead, phi=phi, n=7)
    out, cache = affine_scaled_forward(**kwargs)
    np.testing.assert_allclose(out, slow_affine_scaled(**kwargs), rtol=0, atol=1e-14)
    dout = np.random.default_rng(1).standard_normal(out.shape)
    hand = affine_scaled_backward(dout, cache)
    arrays = {n: a for n, a in kwargs.items() if isinstance(a, np.ndarray)}
    fixed = {n: a for n, a in kwargs.items() if n not in arrays}
    assert set(hand) == set(arrays)
    _, pull = engine.vjp(lambda **kw: affine_scaled_forward(**kw, **fixed)[0], arrays)
    for name, g in pull(dout).items():
        np.testing.assert_allclose(hand[name], g, rtol=0, atol=1e-12, err_msg=name)


def board():
    """Two keys, three quarters of the softmax on the second; logits 2.5 and -2.5; N = 4."""
    return {
        "q": np.ones((2, 1)), "k": np.array([[0.0], [math.log(3.0)]]),
        "v": np.array([[4.0], [12.0]]), "x": np.array([[1.0], [-1.0]]), "w_a": np.array([2.5]),
        "alpha_ma": 0.5, "n": 4, "scale": 1.0,
    }  # fmt: skip


def test_worked_example():
    """alpha 3/4 and 1/4, beta -1/16 and 1/16: weights (1/8, 1/2) and (1/8, 1/4).

    L = o_1 + o_2: dalpha = 10 - 16 / 4 = 6, dlogit = 0.6 in both rows.
    """
    out, cache = affine_scaled_forward(**board(), bias=np.zeros((1, 2)))
    np.testing.assert_allclose(cache.soft, [[0.25, 0.75]] * 2, rtol=1e-15)
    np.testing.assert_allclose(cache.alpha, [[0.75], [0.25]], rtol=1e-15)
    np.testing.assert_allclose(cache.p, [[0.125, 0.5], [0.125, 0.25]], rtol=1e-14)
    np.testing.assert_allclose(out, [[6.5], [3.5]], rtol=1e-14)
    np.testing.assert_allclose(cache.lse, [math.log(4.0)] * 2, rtol=1e-15)
    g = affine_scaled_backward(np.ones((2, 1)), cache)
    np.testing.assert_allclose(g["x"], [[1.5], [1.5]], rtol=1e-14)
    np.testing.assert_allclose(g["w_a"], [0.0], rtol=0, atol=1e-15)
    np.testing.assert_allclose(g["v"], [[0.25], [0.75]], rtol=1e-14)
    # dsoft = alpha (4, 12); dz = soft (dsoft - mean) = alpha 3/16 (-8, 8)
    np.testing.assert_allclose(g["bias"], [[-1.5, 1.5]], rtol=1e-14)
    np.testing.assert_allclose(g["k"], [[-1.5], [1.5]], rtol=1e-14)
    np.testing.assert_allclose(g["q"], [[9 / 8 * math.log(3)], [3 / 8 * math.log(3)]], rtol=1e-14)


def test_gradient_of_the_running_mean():
    """d out / d alpha_ma is the sum of the visible values over N, for every row."""
    kwargs = drawn(n=10)
    out, cache = affine_scaled_forward(**kwargs)
    g = affine_scaled_backward(np.ones_like(out), cache)["alpha_ma"]
    np.testing.assert_allclose(g, 4 * np.sum(kwargs["v"], axis=(0, 2, 3)) / 10, rtol=1e-13)


def test_rows_sum_to_the_running_mean_where_all_keys_are_seen():
    kwargs = drawn(alpha_ma=np.array([0.05, 0.3, 0.9]))
    _, cache = affine_scaled_forward(**kwargs)
    want = np.broadcast_to(kwargs["alpha_ma"][:, None], (2, 3, 4))
    np.testing.assert_allclose(np.sum(cache.p, axis=-1), want, rtol=0, atol=1e-15)
    assert np.ptp(cache.alpha) > 0.5 and np.min(cache.p) < 0


def test_causal_rows_sum_to_alpha_plus_m_beta():
    kwargs = drawn(causal=True, align="upper_left")
    _, cache = affine_scaled_forward(**kwargs)
    alpha, m = cache.alpha[..., 0], np.arange(1, 5)
    want = alpha + m * (kwargs["alpha_ma"][:, None] - alpha) / 5
    np.testing.assert_allclose(np.sum(cache.p, axis=-1), want, rtol=0, atol=1e-15)
    assert not np.any(cache.p[..., 0, 1:])


def test_values_that_add_up_to_zero_leave_a_gate():
    kwargs = drawn(phi="sigmoid")
    kwargs["v"] -= np.mean(kwargs["v"], axis=-2, keepdims=True)
    out, cache = affine_scaled_forward(**kwargs)
    gated = attention_ref.get("normalizers/gated")
    plain = {n: kwargs[n] for n in ("q", "k", "v", "x")}
    want, hers = gated.forward(**plain, w_g=kwargs["w_a"][..., None])
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-14)
    dout = np.random.default_rng(2).standard_normal(out.shape)
    mine, hers = affine_scaled_backward(dout, cache), gated.backward(dout, hers)
    for name in ("q", "k", "x"):
        np.testing.assert_allclose(mine[name], hers[name], rtol=0, atol=1e-13)
    np.testing.assert_allclose(mine["w_a"], hers["w_g"][..., 0], rtol=0, atol=1e-13)


def test_without_a_vector_the_scale_is_one_half():
    for phi in ("clip", "sigmoid"):
        kwargs = drawn(phi=phi, alpha_ma=0.5)
        kwargs["w_a"] = np.zeros_like(kwargs["w_a"])
        out, cache = affine_scaled_forward(**kwargs)
        assert np.all(cache.alpha == 0.5)
        want, _ = softmax.forward(*(kwargs[n] for n in "qkv"))
        np.testing.assert_allclose(out, want / 2, rtol=0, atol=1e-15)


def test_a_clipped_scale_gets_no_gradient():
    for level in (-5.0, 5.0, -9.0, 9.0):
        kwargs = drawn() | {"x": np.ones((4, 1)), "w_a": np.full((3, 1), level)}
        out, cache = affine_scaled_forward(**kwargs)
        assert np.all(cache.alpha == float(level > 0))
        g = affine_scaled_backward(np.ones_like(out), cache)
        assert not np.any(g["x"]) and not np.any(g["w_a"]) and np.any(g["v"])
        assert np.any(g["q"]) == (level > 0)


def test_orders_of_keys_and_queries():
    rng = np.random.default_rng(3)
    kwargs = drawn()
    out, _ = affine_scaled_forward(**kwargs)
    keys, queries = rng.permutation(5), rng.permutation(4)
    turned = kwargs | {n: kwargs[n][..., keys, :] for n in "kv"}
    turned |= {n: kwargs[n][..., queries, :] for n in "qx"}
    found, _ = affine_scaled_forward(**turned)
    np.testing.assert_allclose(found, out[..., queries, :], rtol=0, atol=1e-14)


def test_the_length_counts_hidden_keys_unless_given():
    kwargs = drawn()
    mask = np.ones((4, 5), bool)
    mask[:, 2] = False
    hidden, _ = affine_scaled_forward(**kwargs, mask=mask)
    fewer = kwargs | {n: np.delete(kwargs[n], 2, axis=-2) for n in "kv"}
    assert np.max(np.abs(hidden - affine_scaled_forward(**fewer)[0])) > 0.01
    missing, _ = affine_scaled_forward(**fewer, n=5)
    np.testing.assert_allclose(hidden, missing, rtol=0, atol=1e-14)


def test_a_bias_of_minus_infinity_hides_a_key():
    kwargs = drawn()
    mask = np.random.default_rng(4).random((4, 5)) < 0.6
    mask[1] = False
    hidden, theirs = affine_scaled_forward(**kwargs, mask=mask)
    bias = np.where(mask, 0.0, -np.inf)
    out, cache = affine_scaled_forward(**kwargs, bias=bias)
    np.testing.assert_array_equal(out, hidden)
    assert not np.any(out[..., 1, :])
    dout = np.random.default_rng(5).standard_normal(out.shape)
    found = affine_scaled_backward(dout, cache)
    for name, g in affine_scaled_backward(dout, theirs).items():
        np.testing.assert_array_equal(found[name], g, err_msg=name)


def test_a_uniform_empty_row_passes_nothing_to_the_scale():
    kwargs = drawn(mask=np.zeros((4, 5), bool), empty_row="uniform")
    out, cache = affine_scaled_forward(**kwargs)
    want = np.broadcast_to(np.mean(kwargs["v"], axis=-2, keepdims=True), out.shape)
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-15)
    g = affine_scaled_backward(np.ones_like(out), cache)
    assert not any(np.any(a) for n, a in g.items() if n != "v")
    np.testing.assert_allclose(g["v"], np.full_like(kwargs["v"], 4 / 5), rtol=1e-14)


def test_non_finite_parameters():
    """A NaN token makes its row NaN, a vector or a mean its head; no gradient, empty rows stay."""
    kwargs = drawn(mask=np.ones((4, 5), bool))
    kwargs["mask"][1] = False
    kwargs["mask"][0, 2] = False
    clean, _ = affine_scaled_forward(**kwargs)
    for name, place, rows in (
        ("x", (1, 0, 2, 0), (1, slice(None), [2])),
        ("w_a", (2, 1), (slice(None), 2, [0, 2, 3])),
        ("alpha_ma", (0,), (slice(None), 0, [0, 2, 3])),
    ):
        for bad in (np.nan, np.inf):
            given = kwargs | {name: kwargs[name].copy()}
            given[name][place] = bad
            out, cache = affine_scaled_forward(**given)
            poison = np.zeros(out.shape, bool)
            poison[rows] = True
            np.testing.assert_array_equal(np.isnan(out), poison)
            np.testing.assert_array_equal(out[~poison], clean[~poison])
            np.testing.assert_array_equal(np.isnan(cache.lse), poison[..., 0])
            g = affine_scaled_backward(np.ones_like(out), cache)
            assert all(np.all(np.isfinite(a)) for a in g.values())
            assert g[name][place] == 0
    bias = np.zeros((4, 5))
    bias[3, 1] = np.nan
    out, _ = affine_scaled_forward(**drawn(), bias=bias)
    assert np.all(np.isnan(out[..., 3, :])) and np.all(np.isfinite(out[..., :3, :]))


def test_the_running_mean():
    alpha = np.random.default_rng(6).random((2, 3, 4, 1))
    one = affine_scaled_update(0.0, alpha, rho=0.75)
    assert isinstance(one, float)
    np.testing.assert_allclose(one, np.mean(alpha) / 4, rtol=1e-15)
    heads = affine_scaled_update(np.array([1.0, 0.0, 0.5]), alpha)
    want = [0.9 * a + 0.1 * np.mean(alpha[:, h]) for h, a in enumerate((1.0, 0.0, 0.5))]
    np.testing.assert_allclose(heads, want, rtol=1e-14)
    mean = 0.0
    for _ in range(200):
        mean = affine_scaled_update(mean, alpha)
    np.testing.assert_allclose(mean, np.mean(alpha), rtol=1e-8)
    with pytest.raises(core.errors.ParameterError, match=r"rho is 1\.5, expected .* 0 <= rho <= 1"):
        affine_scaled_update(0.0, alpha, rho=1.5)
    with pytest.raises(core.errors.ParameterError, match=r"rho is -0\.1"):
        affine_scaled_update(0.0, alpha, rho=-0.1)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"phi": "clipped"}, core.errors.ParameterError, "did you mean 'clip'"),
        ({"n": 0}, core.errors.ParameterError, "n is 0, expected an integer 1 <= n tokens"),
        ({"x": np.ones((5, 2))}, core.errors.ShapeError, r"x has shape \(5, 2\), .*T, C"),
        ({"x": np.ones((4, 3))}, core.errors.ShapeError, "w_a has C = 2"),
        ({"w_a": np.ones((4, 2))}, core.errors.ShapeError, r"w_a has shape \(4, 2\), .*3, 2\)"),
        ({"alpha_ma": np.ones(2)}, core.errors.ShapeError, r"alpha_ma has shape \(2,\), .*H\)"),
        ({"alpha_ma": math.nan}, core.errors.ParameterError, "alpha_ma is nan"),
        ({"alpha_ma": np.ones(3, int)}, core.errors.DTypeError, "alpha_ma has dtype int64"),
    ],
)
def test_errors_name_argument_and_expectation(change, error, says):
    with pytest.raises(error, match=says):
        affine_scaled_forward(**(drawn() | change))


def test_a_foreign_cotangent_is_refused():
    out, cache = affine_scaled_forward(**drawn())
    with pytest.raises(core.errors.ShapeError, match="dout has shape"):
        affine_scaled_backward(out[0], cache)


@pytest.mark.oracle
@pytest.mark.parametrize("case", cases(SPEC))
def test_pytorch_agrees(case):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")
    kwargs = cases(SPEC)[case]
    out, cache = affine_scaled_forward(**kwargs)
    dout = np.random.default_rng(5).standard_normal(out.shape)
    mine = affine_scaled_backward(dout, cache)
    live = torch.tensor(core.visible(kwargs["q"], kwargs["k"], **{
        n: kwargs[n] for n in ("mask", "causal", "align") if n in kwargs
    }))  # fmt: skip
    given = {
        n: torch.tensor(a, requires_grad=True)
        for n, a in kwargs.items() if isinstance(a, np.ndarray) and n != "mask"
    }  # fmt: skip
    q, k, v = (given[n] for n in "qkv")
    z = q @ k.mT * kwargs.get("scale", kwargs["q"].shape[-1] ** -0.5)
    if "softcap" in kwargs:
        z = kwargs["softcap"] * torch.tanh(z / kwargs["softcap"])
    if "bias" in kwargs:
        z = z + given["bias"]
    soft = torch.softmax(z.masked_fill(~live, -1e300), -1)
    logit = torch.einsum("...tc,...c->...t", given["x"], given["w_a"])[..., None]
    phi = torch.sigmoid if "phi" in kwargs else lambda a: torch.nn.functional.hardtanh(a / 5) / 2
    alpha = phi(logit) + (0.0 if "phi" in kwargs else 0.5)
    mean = given.get("alpha_ma", torch.tensor(kwargs["alpha_ma"], dtype=torch.float64))
    beta = (mean[..., None, None] - alpha) / kwargs.get("n", kwargs["k"].shape[-2])
    theirs = ((alpha * soft + beta) * live) @ v
    theirs.backward(torch.tensor(dout))
    np.testing.assert_allclose(out, theirs.detach().numpy(), rtol=0, atol=1e-13)
    for n, a in given.items():
        np.testing.assert_allclose(mine[n], a.grad.numpy(), rtol=0, atol=1e-12, err_msg=n)
