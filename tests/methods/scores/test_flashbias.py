"""FlashBias: slow loop, worked example, exact and best factors, the sign of ALiBi, oracle."""

import math

import numpy as np
import pytest

import attention_ref
from attention_ref import core
from attention_ref.kit.checks import cases
from attention_ref.methods.scores.flashbias import (
    alibi_factors,
    distance_factors,
    flashbias_backward,
    flashbias_dense_forward,
    flashbias_forward,
    svd_factors,
)

SPEC = attention_ref.get("scores/flashbias")
ALIBI = attention_ref.get("scores/alibi")
DOT = attention_ref.get("scores/dot_product")


def slow_flashbias(q, k, v, phi_q, phi_k, mask=None, causal=False, align="lower_right", scale=None):
    """One number at a time; the bias is a sum over its channels."""
    lead = np.broadcast_shapes(
        q.shape[:-2], k.shape[:-2], v.shape[:-2], phi_q.shape[:-2], phi_k.shape[:-2]
    )
    T, D, S, E, R = (*q.shape[-2:], *v.shape[-2:], phi_q.shape[-1])
    q = np.broadcast_to(q, (*lead, T, D))
    k = np.broadcast_to(k, (*lead, S, D))
    v = np.broadcast_to(v, (*lead, S, E))
    phi_q = np.broadcast_to(phi_q, (*lead, T, R))
    phi_k = np.broadcast_to(phi_k, (*lead, S, R))
    mask = None if mask is None else np.broadcast_to(mask, (*lead, T, S))
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
                for r in range(R):
                    z += float(phi_q[place][t, r]) * float(phi_k[place][s, r])
                weight[s] = math.exp(z)
            total = math.fsum(weight.values())
            for e in range(E):
                mixed = math.fsum(w * float(v[place][s, e]) for s, w in weight.items())
                out[place][t, e] = mixed / total if weight else 0.0
    return out


@pytest.mark.parametrize("case", cases(SPEC))
def test_equals_the_slow_loop(case):
    kwargs = cases(SPEC)[case]
    out, _ = flashbias_forward(**kwargs)
    np.testing.assert_allclose(out, slow_flashbias(**kwargs), rtol=0, atol=1e-14)


L = math.log(3.0)
ROUND = {
    "q": np.array([[2.0]]),
    "k": np.array([[0.0], [L]]),
    "v": np.array([[4.0], [8.0]]),
    "phi_q": np.array([[1.0, 2.0]]),
    "phi_k": np.array([[2 * L, 0.0], [-2 * L, L]]),
    "scale": 0.5,
}
"""Content (0, ln 3), bias (2 ln 3, 0): the scores are 2 ln 3 and ln 3."""


def test_worked_example_forward():
    out, cache = flashbias_forward(**ROUND)
    np.testing.assert_allclose(cache.p, [[0.75, 0.25]], rtol=1e-14)
    np.testing.assert_allclose(cache.lse, [math.log(12.0)], rtol=1e-14)
    np.testing.assert_allclose(out, [[5.0]], rtol=1e-14)
    same, bias = flashbias_dense_forward(**ROUND)
    np.testing.assert_allclose(bias, [[2 * L, 0.0]], rtol=1e-14, atol=1e-15)
    np.testing.assert_allclose(same, [[5.0]], rtol=1e-14)


def test_worked_example_backward():
    """dz = p (v - o) = (-3/4, 3/4). The scale touches q and k only."""
    out, cache = flashbias_forward(**ROUND)
    g = flashbias_backward(np.ones_like(out), cache)
    np.testing.assert_allclose(g["phi_q"], [[-3 * L, 0.75 * L]], rtol=1e-13)
    np.testing.assert_allclose(g["phi_k"], [[-0.75, -1.5], [0.75, 1.5]], rtol=1e-13)
    np.testing.assert_allclose(g["q"], [[0.375 * L]], rtol=1e-13)
    np.testing.assert_allclose(g["k"], [[-0.75], [0.75]], rtol=1e-13)
    np.testing.assert_allclose(g["v"], [[0.75], [0.25]], rtol=1e-14)


def test_no_channels_is_no_bias():
    kwargs = core.examples.qkv(np.random.default_rng(0))
    none = {"phi_q": np.zeros((5, 0)), "phi_k": np.zeros((6, 0))}
    out, cache = flashbias_forward(**kwargs, **none)
    want, plain = DOT.forward(**kwargs)
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-15)
    dout = np.random.default_rng(1).standard_normal(out.shape)
    g, h = flashbias_backward(dout, cache), DOT.backward(dout, plain)
    assert g["phi_q"].shape == (5, 0) and g["phi_k"].shape == (6, 0)
    for name in "qkv":
        np.testing.assert_allclose(g[name], h[name], rtol=0, atol=4e-15)


def test_without_content_the_bias_is_all():
    """Scale 0 leaves the bias as it is; the paper's sqrt(D) phi_q would divide 0 by 0."""
    kwargs = cases(SPEC)["plain"] | {"scale": 0.0}
    out, cache = flashbias_forward(**kwargs)
    e = np.exp(kwargs["phi_q"] @ kwargs["phi_k"].T)
    want = e / e.sum(-1, keepdims=True) @ kwargs["v"]
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-14)
    g = flashbias_backward(np.ones_like(out), cache)
    assert not np.any(g["q"]) and not np.any(g["k"])


@pytest.mark.parametrize(("T", "S", "align"), [
    (5, 7, "lower_right"), (7, 5, "lower_right"), (5, 7, "upper_left"), (7, 5, "upper_left"),
])  # fmt: skip
def test_alibi_has_exact_factors_under_a_causal_mask(T, S, align):
    rng = np.random.default_rng(T)
    kwargs = core.examples.qkv(rng, T=T, S=S) | {"causal": True, "align": align}
    m = np.array([0.7, 0.05])
    phi_q, phi_k = alibi_factors(m, T, S, align)
    assert phi_q.shape == (2, T, 2) and phi_k.shape == (S, 2)
    out, cache = flashbias_forward(**kwargs, phi_q=phi_q, phi_k=phi_k)
    want, same = ALIBI.forward(**kwargs, m=m)
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-14)
    np.testing.assert_allclose(cache.p, same.p, rtol=0, atol=1e-14)
    finite = np.isfinite(same.lse)
    np.testing.assert_allclose(cache.lse[finite], same.lse[finite], rtol=0, atol=1e-14)


def test_alibi_factors_in_numbers():
    """T = 1, S = 3, m = 1/2: places -1, 0, 1 of the keys, 1 of the query; the bias is -1, -1/2, 0.

    Far keys lose: the opposite of the official example's sign.
    """
    phi_q, phi_k = alibi_factors(np.array([0.5]), 1, 3)
    np.testing.assert_array_equal(phi_q, [[[-0.5, 0.5]]])
    np.testing.assert_array_equal(phi_k, [[1.0, -1.0], [1.0, 0.0], [1.0, 1.0]])
    np.testing.assert_array_equal(phi_q[0] @ phi_k.T, [[-1.0, -0.5, 0.0]])
    assert alibi_factors(np.array([0.5], np.float32), 4, 3)[0].dtype == np.float32


def test_the_official_sign_prefers_far_keys():
    """m [1, t] . [-s, 1] = m (t - s), as the official example writes it: weights 4, 2, 1 of 7."""
    t, s, m = np.array([2.0]), np.arange(3.0), math.log(2.0)
    phi_q = m * np.stack([np.ones_like(t), t], axis=-1)
    phi_k = np.stack([-s, np.ones_like(s)], axis=-1)
    q, k, v = np.zeros((1, 1)), np.zeros((3, 1)), np.eye(3)
    out, _ = flashbias_forward(q, k, v, phi_q, phi_k, causal=True)
    np.testing.assert_allclose(out, [[4 / 7, 2 / 7, 1 / 7]], rtol=1e-14)
    want, _ = ALIBI.forward(q[None], k[None], v[None], np.array([m]), causal=True)
    np.testing.assert_allclose(want[0], [[1 / 7, 2 / 7, 4 / 7]], rtol=1e-14)


def test_one_channel_is_enough_for_causal_alibi():
    """The term of the query cancels in the softmax; lse moves by it."""
    rng = np.random.default_rng(2)
    kwargs = core.examples.qkv(rng, T=4, S=6) | {"causal": True}
    m = np.array([0.6, 0.1])
    phi_q, phi_k = m[:, None, None] * np.ones((4, 1)), np.arange(6.0)[:, None]
    out, cache = flashbias_forward(**kwargs, phi_q=phi_q, phi_k=phi_k)
    want, same = ALIBI.forward(**kwargs, m=m)
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-14)
    moved = cache.lse - m[:, None] * (np.arange(4) + 2)
    np.testing.assert_allclose(moved, same.lse, rtol=0, atol=1e-14)


def test_squared_distances_have_exact_factors():
    """x = 1, y = (0, 3): -1 and -4. Then planes: three heads of places of their own."""
    phi_q, phi_k = distance_factors(np.array([[1.0]]), np.array([[0.0], [3.0]]))
    np.testing.assert_array_equal(phi_q, [[-1.0, 1.0, 2.0]])
    np.testing.assert_array_equal(phi_k, [[1.0, 0.0, 0.0], [1.0, -9.0, 3.0]])
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((3, 5, 2)), rng.standard_normal((3, 6, 2))
    phi_q, phi_k = distance_factors(x, y)
    assert phi_q.shape == (3, 5, 4)
    bias = -np.sum((x[:, :, None] - y[:, None]) ** 2, axis=-1)
    kwargs = core.examples.qkv(rng, lead=(3,))
    out, _ = flashbias_forward(**kwargs, phi_q=phi_q, phi_k=phi_k)
    want, _ = DOT.forward(**kwargs, bias=bias)
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-14)


def test_the_best_factors_of_a_rank():
    """diag(4, 1): rank 1 keeps the 4 and leaves an error of 1; rank 2 is exact."""
    bias = np.diag([4.0, 1.0])
    phi_q, phi_k, rest = svd_factors(bias, 1)
    np.testing.assert_allclose(np.abs(phi_q), [[2.0], [0.0]], atol=1e-15)
    np.testing.assert_allclose(phi_q @ phi_k.T, np.diag([4.0, 0.0]), atol=1e-15)
    np.testing.assert_allclose(rest, [1.0], rtol=1e-15)
    rng = np.random.default_rng(4)
    bias = rng.standard_normal((2, 5, 7))
    for R in range(6):
        phi_q, phi_k, rest = svd_factors(bias, R)
        assert phi_q.shape == (2, 5, R) and phi_k.shape == (2, 7, R) and rest.shape == (2, 5 - R)
        error = phi_q @ np.swapaxes(phi_k, -1, -2) - bias
        size = np.sqrt(np.sum(error**2, axis=(-2, -1)))
        np.testing.assert_allclose(size, np.sqrt(np.sum(rest**2, axis=-1)), atol=1e-13)
        if R < 5:
            assert np.all(np.max(np.abs(error), axis=(-2, -1)) <= rest[:, 0] * (1 + 1e-12))
    assert size.max() < 1e-13
    np.testing.assert_allclose(
        np.sum(phi_q**2, axis=-2), np.sum(phi_k**2, axis=-2), rtol=1e-12
    )  # the singular values are shared by both sides


def test_any_bias_at_full_rank():
    kwargs = core.examples.qkv(np.random.default_rng(5))
    bias = np.random.default_rng(6).standard_normal((2, 5, 6))
    phi_q, phi_k, rest = svd_factors(bias, 5)
    assert rest.shape == (2, 0)
    out, cache = flashbias_forward(**kwargs, phi_q=phi_q, phi_k=phi_k)
    want, same = DOT.forward(**kwargs, bias=bias)
    np.testing.assert_allclose(out, want, rtol=0, atol=2e-14)
    dout = np.random.default_rng(7).standard_normal(out.shape)
    g, h = flashbias_backward(dout, cache), DOT.backward(dout, same)
    np.testing.assert_allclose(g["phi_q"], h["bias"] @ phi_k, rtol=0, atol=2e-14)
    dphi_k = np.swapaxes(h["bias"], -1, -2) @ phi_q
    np.testing.assert_allclose(g["phi_k"], dphi_k, rtol=0, atol=2e-14)


def test_a_wrong_bias_moves_an_output_by_a_bounded_amount():
    """Scores off by at most e move the weight of any set of keys by at most tanh(e / 2).

    It is met by two keys whose scores go from (e/2, -e/2) to (-e/2, e/2).
    """
    for e in (0.1, 1.0, 3.0):
        phi_k = np.array([[e], [-e]]) / 2
        ends = [
            flashbias_forward(np.zeros((1, 1)), np.zeros((2, 1)), np.array([[0.0], [1.0]]),
                              np.array([[sign]]), phi_k)[0].item()
            for sign in (1.0, -1.0)
        ]  # fmt: skip
        np.testing.assert_allclose(ends[1] - ends[0], math.tanh(e / 2), rtol=1e-13)


def test_queries_move_with_their_factor():
    kwargs = cases(SPEC)["plain"]
    order = [3, 0, 4, 1, 2]
    moved = {"q": kwargs["q"][:, order], "phi_q": kwargs["phi_q"][order]}
    out, _ = flashbias_forward(**(kwargs | moved))
    want, _ = flashbias_forward(**kwargs)
    np.testing.assert_allclose(out, want[:, order], rtol=0, atol=1e-15)
    wrong, _ = flashbias_forward(**(kwargs | {"q": moved["q"]}))
    assert np.max(np.abs(wrong - out)) > 0.1


def test_no_queries_and_no_keys():
    kwargs = cases(SPEC)["plain"]
    few = {"q": kwargs["q"][:, :0], "phi_q": kwargs["phi_q"][:0]}
    out, cache = flashbias_forward(**(kwargs | few))
    assert out.shape == (2, 0, 3)
    assert not any(np.any(g) for g in flashbias_backward(out, cache).values())
    few = {n: kwargs[n][:, :0] for n in "kv"} | {"phi_k": kwargs["phi_k"][:0]}
    out, cache = flashbias_forward(**(kwargs | few))
    np.testing.assert_array_equal(out, np.zeros((2, 5, 3)))
    assert not any(np.any(g) for g in flashbias_backward(out, cache).values())


@pytest.mark.parametrize("forward", [flashbias_forward, flashbias_dense_forward])
def test_a_factor_that_is_not_finite_counts_as_its_token(forward):
    """NaN in phi_k of key 1: rows that see it are NaN; behind a mask it does nothing."""
    kwargs = cases(SPEC)["causal"]  # S - T = 2: all queries see key 1
    bad = kwargs["phi_k"].copy()
    bad[6, 1] = np.nan
    out = forward(**(kwargs | {"phi_k": bad}))[0]
    want = forward(**kwargs)[0]
    assert np.all(np.isnan(out[:, 4]))
    np.testing.assert_array_equal(out[:, :4], want[:, :4])
    bad = kwargs["phi_q"].copy()
    bad[2, 0] = np.inf
    out = forward(**(kwargs | {"phi_q": bad}))[0]
    assert np.all(np.isnan(out[:, 2])) and np.sum(np.isnan(out)) == 6


def test_a_poisoned_row_sends_nothing_back():
    kwargs = cases(SPEC)["plain"]
    bad = kwargs["phi_q"].copy()
    bad[2] = np.nan
    out, cache = flashbias_forward(**(kwargs | {"phi_q": bad}))
    assert np.all(np.isnan(cache.lse[:, 2])) and np.sum(np.isnan(cache.lse)) == 2
    dout = np.random.default_rng(8).standard_normal(out.shape)
    g = flashbias_backward(dout, cache)
    dout[:, 2] = 0.0
    want = flashbias_backward(dout, flashbias_forward(**kwargs)[1])
    for name in g:
        np.testing.assert_allclose(g[name], want[name], rtol=0, atol=1e-14)


def test_factors_of_each_head_on_shared_content():
    """q, k, v without a head axis, two biases: two heads come out, dq collects."""
    one, heads = cases(SPEC)["no-heads"], np.random.default_rng(9)
    phi = {"phi_q": heads.standard_normal((2, 5, 4)), "phi_k": heads.standard_normal((2, 7, 4))}
    out, cache = flashbias_forward(**(one | phi))
    assert out.shape == (2, 5, 3)
    dout = heads.standard_normal(out.shape)
    g, parts = flashbias_backward(dout, cache), []
    for h in range(2):
        single, c = flashbias_forward(**(one | {n: a[h] for n, a in phi.items()}))
        np.testing.assert_allclose(single, out[h], rtol=0, atol=1e-15)
        parts.append(flashbias_backward(dout[h], c))
    for n in "qk":
        np.testing.assert_allclose(g[n], parts[0][n] + parts[1][n], rtol=0, atol=1e-14)
    for n in phi:
        np.testing.assert_allclose(g[n], [x[n] for x in parts], rtol=0, atol=1e-14)


@pytest.mark.parametrize("forward", [flashbias_forward, flashbias_dense_forward])
@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"phi_q": np.ones((4, 3))}, core.errors.ShapeError, r"phi_q has T = 4 .* as in q"),
        ({"phi_k": np.ones((6, 2))}, core.errors.ShapeError, r"phi_k has R = 2 .* as in phi_q"),
        ({"phi_k": np.ones((7, 3))}, core.errors.ShapeError, r"phi_k has S = 7"),
        ({"mask": np.ones((6, 5), bool)}, core.errors.ShapeError, "looks transposed"),
        ({"align": "lower-right"}, core.errors.ParameterError, "did you mean 'lower_right'"),
        ({"empty_row": "zeros"}, core.errors.ParameterError, "did you mean 'zero'"),
        ({"scale": math.inf}, core.errors.ParameterError, "scale is inf"),
    ],
)
def test_errors_name_argument_and_expectation(forward, change, error, says):
    with pytest.raises(error, match=says):
        forward(**(cases(SPEC)["plain"] | change))


def test_other_errors():
    out, cache = flashbias_forward(**cases(SPEC)["plain"])
    with pytest.raises(core.errors.ShapeError, match="dout has shape"):
        flashbias_backward(out[0], cache)
    with pytest.raises(core.errors.ParameterError, match="R is 6"):
        svd_factors(np.ones((5, 7)), 6)
    with pytest.raises(core.errors.ParameterError, match="align is 'left'"):
        alibi_factors(np.ones(1), 2, 2, "left")


@pytest.mark.oracle
@pytest.mark.parametrize("case", ["plain", "batch", "causal", "packed", "no-heads", "bias"])
def test_pytorch_agrees(case):
    """Its scaled_dot_product_attention with the bias as an additive mask; its autograd."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")
    kwargs = cases(SPEC)[case]
    out, cache = flashbias_forward(**kwargs)
    dout = np.random.default_rng(10).standard_normal(out.shape)
    mine = flashbias_backward(dout, cache)
    given = {n: torch.tensor(kwargs[n], requires_grad=True) for n in mine}
    bias = given["phi_q"] @ given["phi_k"].transpose(-1, -2)
    rule = {n: kwargs[n] for n in ("mask", "causal", "align") if n in kwargs}
    live = torch.tensor(np.array(core.visible(kwargs["q"], kwargs["k"], **rule)))
    bias = torch.where(live, bias, -torch.inf)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *(given[n] for n in "qkv"), attn_mask=bias, scale=kwargs.get("scale")
    )
    theirs.backward(torch.tensor(dout))
    np.testing.assert_allclose(out, theirs.detach().numpy(), rtol=0, atol=4e-15)
    for name, g in mine.items():
        np.testing.assert_allclose(g, given[name].grad.numpy(), rtol=0, atol=4e-14)


@pytest.mark.parametrize("causal", [False, True])
def test_the_compiled_path_over_several_tiles(causal):
    rng = np.random.default_rng(11)
    q, k, v = (rng.standard_normal((2, n, 6)) for n in (150, 300, 300))
    phi_q, phi_k = rng.standard_normal((2, 150, 3)), rng.standard_normal((300, 3))
    kwargs = {"q": q, "k": k, "v": v, "phi_q": phi_q, "phi_k": phi_k, "causal": causal,
              "mask": rng.random((150, 300)) < 0.8}  # fmt: skip
    out, cache = attention_ref.run("scores/flashbias", **kwargs)
    fast, mine = attention_ref.run("scores/flashbias", **kwargs, backend="numba")
    dout = rng.standard_normal(out.shape)
    want, got = SPEC.backward(dout, cache), SPEC.numba.backward(dout, mine)
    assert set(got) == set(want)
    np.testing.assert_allclose(fast, out, rtol=0, atol=1e-13)
    for name, dx in want.items():
        np.testing.assert_allclose(got[name], dx, rtol=0, atol=1e-13 * np.abs(dx).max())


def test_the_compiled_path_with_factors_of_each_head_and_numbers_that_are_not_finite():
    rng = np.random.default_rng(12)
    kwargs = {"q": rng.standard_normal((5, 4)), "k": rng.standard_normal((1, 7, 4)),
              "v": rng.standard_normal((7, 3)), "phi_q": rng.standard_normal((5, 2)),
              "phi_k": rng.standard_normal((2, 7, 2)), "causal": True}  # fmt: skip
    kwargs["q"][2], kwargs["phi_k"][1, 5], kwargs["v"][6] = np.inf, np.nan, -np.inf
    out, cache = flashbias_forward(**kwargs)
    fast, mine = SPEC.numba.forward(**kwargs)
    np.testing.assert_allclose(fast, out, rtol=0, atol=1e-14)
    dout = rng.standard_normal(out.shape)
    got = SPEC.numba.backward(dout, mine)
    for name, dx in flashbias_backward(dout, cache).items():
        np.testing.assert_allclose(got[name], dx, rtol=0, atol=1e-13, err_msg=name)
