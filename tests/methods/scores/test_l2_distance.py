"""Distance scores: slow loop, worked example, identities, limits, spectral norm, oracle."""

import math

import numpy as np
import pytest

import attention_ref
from attention_ref import core, engine
from attention_ref.kit.checks import cases
from attention_ref.methods.scores.l2_distance import (
    l2_distance_backward,
    l2_distance_forward,
    spectral_backward,
    spectral_forward,
)

SPEC = attention_ref.get("scores/l2_distance")
DOT = attention_ref.get("scores/dot_product")


def slow_l2_distance(
    q, k, v, mask=None, causal=False, align="lower_right", scale=None, bias=None,
):  # fmt: skip
    """One number at a time; distances by math.dist."""
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
            score = {}
            for s in range(S):
                if causal and s > t + first:
                    continue
                if mask is not None and not mask[place][t, s]:
                    continue
                score[s] = -c * math.dist(q[place][t].tolist(), k[place][s].tolist()) ** 2
                if bias is not None:
                    score[s] += float(bias[place][t, s])
            if not score:
                continue
            top = max(score.values())
            weight = {s: math.exp(y - top) for s, y in score.items()}
            total = math.fsum(weight.values())
            for e in range(E):
                mixed = math.fsum(w * float(v[place][s, e]) for s, w in weight.items())
                out[place][t, e] = mixed / total
    return out


@pytest.mark.parametrize("case", cases(SPEC))
def test_equals_the_slow_loop(case):
    kwargs = cases(SPEC)[case]
    out, _ = l2_distance_forward(**kwargs)
    np.testing.assert_allclose(out, slow_l2_distance(**kwargs), rtol=0, atol=1e-14)


L3 = math.log(3.0)


def _worked():
    """Squared distances 5 and 4 at c = ln 3: scores -5 ln 3 and -4 ln 3."""
    q, k = np.array([[3.0, 1.0]]), np.array([[1.0, 2.0], [3.0, 3.0]])
    return {"q": q, "k": k, "v": np.array([[4.0], [8.0]]), "scale": L3, "bias": np.zeros((1, 2))}


def test_worked_example_forward():
    out, cache = l2_distance_forward(**_worked())
    np.testing.assert_array_equal(cache.delta, [[[2.0, -1.0], [0.0, -2.0]]])
    np.testing.assert_allclose(cache.z, [[-5 * L3, -4 * L3]], rtol=1e-15)
    np.testing.assert_allclose(cache.p, [[0.25, 0.75]], rtol=1e-14)
    np.testing.assert_allclose(out, [[7.0]], rtol=1e-14)
    np.testing.assert_allclose(cache.lse, [math.log(4.0) - 5 * L3], rtol=1e-15)


def test_worked_example_backward():
    """dz = p (v - 7) = (-3/4, 3/4); ddelta = -2 ln 3 dz delta = ln 3 ((3, -3/2), (0, 3))."""
    out, cache = l2_distance_forward(**_worked())
    g = l2_distance_backward(np.ones_like(out), cache)
    np.testing.assert_allclose(g["v"], [[0.25], [0.75]], rtol=1e-14)
    np.testing.assert_allclose(g["bias"], [[-0.75, 0.75]], rtol=1e-13)
    np.testing.assert_allclose(g["q"], [[3 * L3, 1.5 * L3]], rtol=1e-13)
    np.testing.assert_allclose(g["k"], [[-3 * L3, 1.5 * L3], [0.0, -3 * L3]], rtol=1e-13)


def test_default_scale_is_that_of_the_dot_product():
    kwargs = cases(SPEC)["no-heads"]
    out, _ = l2_distance_forward(**kwargs)
    np.testing.assert_array_equal(out, l2_distance_forward(**kwargs, scale=0.5)[0])


def test_gradients_through_the_dot_product_with_a_key_bias():
    """Scores 2 c q.k - c k.k: the same dq, dv, and dk with the part -2 c k sum_t dz."""
    kwargs = cases(SPEC)["causal-upper-left"]
    k, c = kwargs["k"], kwargs["scale"]
    out, cache = l2_distance_forward(**kwargs)
    bias = kwargs["bias"] - c * np.sum(k * k, -1)[:, None, :]
    other, theirs = DOT.forward(**(kwargs | {"scale": 2 * c, "bias": bias}))
    np.testing.assert_allclose(out, other, rtol=0, atol=1e-14)
    dout = np.random.default_rng(2).standard_normal(out.shape)
    g, h = l2_distance_backward(dout, cache), DOT.backward(dout, theirs)
    h["k"] = h["k"] - 2 * c * k * np.swapaxes(h["bias"], -1, -2)
    for name in "qkv":
        np.testing.assert_allclose(g[name], h[name], rtol=0, atol=1e-13)


def test_keys_of_equal_length_leave_only_the_product():
    kwargs = cases(SPEC)["plain"]
    kwargs["k"] = kwargs["k"] / np.sqrt(np.sum(kwargs["k"] ** 2, -1, keepdims=True))
    out, _ = l2_distance_forward(**kwargs)
    want, _ = DOT.forward(**(kwargs | {"scale": 2 * kwargs["scale"]}))
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-14)


def test_moving_or_turning_queries_and_keys_together_changes_nothing():
    kwargs = cases(SPEC)["bias"]
    rng = np.random.default_rng(3)
    turn, _ = np.linalg.qr(rng.standard_normal((4, 4)))
    step = rng.standard_normal(4)
    out, cache = l2_distance_forward(**kwargs)
    moved = kwargs | {n: kwargs[n] @ turn + step for n in "qk"}
    np.testing.assert_allclose(l2_distance_forward(**moved)[0], out, rtol=0, atol=1e-13)
    g = l2_distance_backward(rng.standard_normal(out.shape), cache)
    np.testing.assert_allclose(np.sum(g["q"], -2), -np.sum(g["k"], -2), rtol=0, atol=1e-13)


def test_tied_every_token_is_nearest_to_itself():
    kwargs = cases(SPEC)["batch"]
    k = kwargs["k"]
    _, cache = l2_distance_forward(k, k, kwargs["v"])
    np.testing.assert_array_equal(cache.z, np.swapaxes(cache.z, -1, -2))
    assert not np.any(np.diagonal(cache.z, axis1=-2, axis2=-1))
    assert np.all(cache.z <= 0)
    np.testing.assert_array_equal(np.argmax(cache.p, -1), np.broadcast_to(np.arange(5), (3, 2, 5)))


def test_tied_gradient_of_a_projection():
    """q = k = x w: dw = x^T (dq + dk), against the complex step."""
    rng = np.random.default_rng(4)
    x, w, v = (rng.standard_normal(s) for s in ((5, 3), (3, 4), (5, 2)))
    out, cache = l2_distance_forward(x @ w, x @ w, v)
    dout = rng.standard_normal(out.shape)
    g = l2_distance_backward(dout, cache)
    found = engine.complex_gradient(
        lambda w: l2_distance_forward(x @ w, x @ w, v)[0], {"w": w}, dout
    )
    np.testing.assert_allclose(x.T @ (g["q"] + g["k"]), found["w"], rtol=0, atol=1e-13)


def test_near_queries_with_far_values_are_not_gentle():
    """Two tied queries 2 e apart, values +-R: the slope -8 c e R p (1 - p) has no bound."""
    q, e, c = np.array([[0.0], [0.5]]), 0.25, 0.5
    slopes = []
    for far in (1.0, 1e3):
        _, cache = l2_distance_forward(q, q, np.array([[far], [-far]]), scale=c)
        slopes.append(l2_distance_backward(np.array([[1.0], [0.0]]), cache)["q"][0, 0])
        p = 1 / (1 + math.exp(-4 * c * e**2))
        np.testing.assert_allclose(slopes[-1], -8 * c * e * far * p * (1 - p), rtol=1e-13)
    assert abs(slopes[1]) > 999 * abs(slopes[0])


def test_equal_tokens_give_the_mean_and_a_large_scale_the_nearest():
    kwargs = cases(SPEC)["plain"]
    flat, _ = l2_distance_forward(kwargs["q"], np.ones((2, 6, 4)), kwargs["v"])
    mean = np.broadcast_to(np.mean(kwargs["v"], -2, keepdims=True), flat.shape)
    np.testing.assert_allclose(flat, mean, rtol=0, atol=1e-15)
    sharp, _ = l2_distance_forward(kwargs["k"], kwargs["k"], kwargs["v"], scale=1e6)
    np.testing.assert_array_equal(sharp, kwargs["v"])


def test_far_from_the_origin_no_digit_is_lost():
    rng = np.random.default_rng(5)
    q, k, v = (rng.integers(-4, 5, s) / 4.0 for s in ((5, 3), (6, 3), (6, 2)))
    out, cache = l2_distance_forward(q, k, v)
    far, same = l2_distance_forward(q + 2.0**40, k + 2.0**40, v)
    np.testing.assert_array_equal(far, out)
    g, h = (l2_distance_backward(np.ones_like(out), c) for c in (cache, same))
    for name in g:
        np.testing.assert_array_equal(g[name], h[name])


def test_a_bias_of_minus_infinity_hides_and_nan_poisons():
    kwargs = cases(SPEC)["plain"]
    bias = np.zeros((5, 6))
    bias[:, 4] = -np.inf
    out, cache = l2_distance_forward(**kwargs, bias=bias)
    assert not np.any(cache.p[..., 4])
    bad = bias.copy()
    bad[2, 0] = np.nan
    found, cache = l2_distance_forward(**kwargs, bias=bad)
    assert np.all(np.isnan(found[:, 2])) and np.sum(np.isnan(found)) == 6
    assert np.all(np.isnan(cache.lse[:, 2])) and np.sum(np.isnan(cache.lse)) == 2
    dout = np.random.default_rng(1).standard_normal(out.shape)
    g = l2_distance_backward(dout, cache)
    dout[:, 2] = 0.0
    want = l2_distance_backward(dout, l2_distance_forward(**kwargs, bias=bias)[1])
    for name in g:
        np.testing.assert_allclose(g[name], want[name], rtol=0, atol=1e-14)


def test_leading_axes_of_queries_and_values_alone():
    kwargs = cases(SPEC)["batch"]
    q = kwargs["q"][0, 0]
    out, cache = l2_distance_forward(**(kwargs | {"q": q}))
    wide, same = l2_distance_forward(**(kwargs | {"q": np.broadcast_to(q, (3, 2, 1, 4))}))
    np.testing.assert_array_equal(out, wide)
    g, h = (l2_distance_backward(np.ones_like(out), c) for c in (cache, same))
    np.testing.assert_allclose(g["q"], np.sum(h["q"], axis=(0, 1)), rtol=0, atol=1e-14)
    values, cache = l2_distance_forward(kwargs["q"][0], kwargs["k"][0], kwargs["v"])
    g = l2_distance_backward(np.ones_like(values), cache)
    assert {n: a.shape for n, a in g.items()} == {
        "q": (2, 1, 4), "k": (2, 5, 4), "v": kwargs["v"].shape
    }  # fmt: skip


def _matrix():
    w = np.random.default_rng(6).standard_normal((4, 3))
    u, s, vt = np.linalg.svd(w)
    return w, u[:, 0], vt[0], s[0]


def test_spectral_worked_example():
    """diag(3, 1) to the norm 6: doubled; with dout of ones dw = 2 (1 - 4/3 at the top left)."""
    w, e = np.diag([3.0, 1.0]), np.array([1.0, 0.0])
    out, now = spectral_forward(w, 6.0, e, e)
    np.testing.assert_array_equal(out, np.diag([6.0, 2.0]))
    assert now == 3.0
    dw = spectral_backward(np.ones((2, 2)), w, 6.0, e, e, now)
    np.testing.assert_allclose(dw, [[-2 / 3, 2.0], [2.0, 2.0]], rtol=1e-14)


def test_spectral_norm_is_what_was_asked_and_the_size_of_w_no_longer_counts():
    w, left, right, sigma = _matrix()
    same, _ = spectral_forward(w, sigma, left, right)
    np.testing.assert_allclose(same, w, rtol=1e-14)
    out, now = spectral_forward(7.0 * w, 2.5, left, right)
    np.testing.assert_allclose(np.linalg.norm(out, 2), 2.5, rtol=1e-14)
    dout = np.random.default_rng(7).standard_normal(w.shape)
    dw = spectral_backward(dout, 7.0 * w, 2.5, left, right, now)
    assert abs(np.sum(dw * w)) < 1e-14


def test_spectral_backward_against_the_whole_derivative():
    """Constant singular vectors lose nothing: sigma is stationary in them (differences of svd)."""
    w, left, right, _ = _matrix()
    rng = np.random.default_rng(8)
    dout, step = rng.standard_normal((2, *w.shape))
    _, now = spectral_forward(w, 1.7, left, right)
    found = np.sum(step * spectral_backward(dout, w, 1.7, left, right, now))

    def loss(h):
        moved = w + h * step
        return np.sum(dout * moved) * 1.7 / np.linalg.norm(moved, 2)

    assert abs(found - (loss(1e-5) - loss(-1e-5)) / 2e-5) < 1e-8


def test_errors():
    kwargs = cases(SPEC)["plain"]
    out, cache = l2_distance_forward(**kwargs)
    with pytest.raises(core.errors.ShapeError, match="dout has shape"):
        l2_distance_backward(out[0], cache)
    with pytest.raises(core.errors.ShapeError, match="k has D = 3"):
        l2_distance_forward(kwargs["q"], kwargs["k"][..., :3], kwargs["v"])
    long = np.broadcast_to(np.zeros(1), (4096, 64))
    with pytest.raises(core.errors.MemoryLimitError, match="the differences"):
        l2_distance_forward(long, long, long)


@pytest.mark.oracle
@pytest.mark.parametrize("case", cases(SPEC))
def test_pytorch_agrees(case):
    """Distances by torch.cdist, the gradients by its autograd."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")
    kwargs = cases(SPEC)[case]
    out, cache = l2_distance_forward(**kwargs)
    dout = np.random.default_rng(5).standard_normal(out.shape)
    mine = l2_distance_backward(dout, cache)
    given = {n: torch.tensor(kwargs[n], requires_grad=True) for n in mine}
    scale = kwargs.get("scale", kwargs["q"].shape[-1] ** -0.5)
    far = torch.cdist(given["q"], given["k"], compute_mode="donot_use_mm_for_euclid_dist")
    z = -scale * far**2 + given.get("bias", 0.0)
    rule = {n: kwargs[n] for n in ("mask", "causal", "align") if n in kwargs}
    live = torch.tensor(np.array(core.visible(kwargs["q"], kwargs["k"], **rule)))
    alive = live.any(-1, keepdim=True)
    p = torch.softmax(torch.where(live | ~alive, z, -torch.inf), -1)
    theirs = torch.where(alive, p, 0.0) @ given["v"]
    theirs.backward(torch.tensor(dout))
    np.testing.assert_allclose(out, theirs.detach().numpy(), rtol=0, atol=1e-14)
    for name, g in mine.items():
        np.testing.assert_allclose(g, given[name].grad.numpy(), rtol=0, atol=1e-13)
