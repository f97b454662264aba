"""Lipschitz regularised scores: slow loop, worked example, scale, identities, oracle."""

import math

import numpy as np
import pytest

import attention_ref
from attention_ref import core, engine
from attention_ref.kit.checks import cases
from attention_ref.methods.scores.lipschitz import lipschitz_backward, lipschitz_forward

SPEC = attention_ref.get("scores/lipschitz")
L2 = attention_ref.get("scores/l2_distance")


EQUIVALENT = {
    "length_forward: 1.0  ->  2.0": "stands under a norm of zero, which is selected away",
    "length_backward: 1.0  ->  2.0": "the direction of a zero vector is zero over anything",
    "lipschitz_forward: 0.0  ->  1.0": "what replaces it lies in a head that becomes NaN",
    "lipschitz_backward: length_backward(np.where(longest, db, 0.0) / ties, x, lengths)  ->  "
    "length_backward(x, np.where(longest, db, 0.0) / ties, lengths)": "a product commutes",
    "lipschitz_backward: length_backward(da, q, a)  ->  length_backward(q, da, a)": "likewise",
}


def slow_lipschitz(q, k, v, x, alpha=100.0, mask=None):
    """One number at a time; norms and distances by math."""
    lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2], x.shape[:-2])
    T, S, E = q.shape[-2], k.shape[-2], v.shape[-1]
    q = np.broadcast_to(q, (*lead, *q.shape[-2:]))
    k = np.broadcast_to(k, (*lead, *k.shape[-2:]))
    v = np.broadcast_to(v, (*lead, *v.shape[-2:]))
    x = np.broadcast_to(x, (*lead, *x.shape[-2:]))
    mask = None if mask is None else np.broadcast_to(mask, (*lead, T, S))
    out = np.zeros((*lead, T, E))
    for place in np.ndindex(*lead):
        seen = [[s for s in range(S) if mask is None or mask[place][t, s]] for t in range(T)]
        squares = [float(c) ** 2 for t in range(T) if seen[t] for c in q[place][t]]
        longest = max(math.hypot(*row) for row in x[place])
        scale = alpha / (math.sqrt(math.fsum(squares)) * longest + 1e-10)
        for t in range(T):
            score = {s: -scale * math.dist(q[place][t], k[place][s]) ** 2 for s in seen[t]}
            top = max(score.values(), default=0.0)
            weight = {s: math.exp(z - top) for s, z in score.items()}
            total = math.fsum(weight.values())
            for e in range(E):
                for s, w in weight.items():
                    out[place][t, e] += w / total * float(v[place][s, e])
    return out


@pytest.mark.parametrize("case", cases(SPEC))
def test_equals_the_slow_loop(case):
    kwargs = cases(SPEC)[case]
    out, _ = lipschitz_forward(**kwargs)
    np.testing.assert_allclose(out, slow_lipschitz(**kwargs), rtol=0, atol=1e-14)


L3 = math.log(3.0)
TIED = {"k": np.array([[3.0], [4.0]]), "v": np.array([[0.0], [4.0]])}
TIED |= {"q": TIED["k"], "x": np.array([[6.0], [8.0], [0.0]]), "alpha": 40 * L3}
"""a = 5, b = 8, c = 1/40; D = 0 and 1, so the scores are 0 and -ln 3."""


def test_worked_example():
    """For o_0: dz = (-3/4, 3/4) in row 0, dD = -ln 3 dz, dc = -40 ln 3 * 3/4, dab = -dc / 1600."""
    out, cache = lipschitz_forward(**TIED)
    np.testing.assert_allclose([cache.a.item(), cache.b.item()], [5.0, 8.0], rtol=1e-15)
    np.testing.assert_allclose(cache.c, [[1 / 40]], rtol=1e-11)
    np.testing.assert_allclose(cache.z, [[0.0, -L3], [-L3, 0.0]], rtol=1e-11)
    np.testing.assert_allclose(cache.p, [[0.75, 0.25], [0.25, 0.75]], rtol=1e-11)
    np.testing.assert_allclose(out, [[1.0], [3.0]], rtol=1e-11)
    np.testing.assert_allclose(cache.lse, [math.log(4 / 3)] * 2, rtol=1e-10)
    g = lipschitz_backward(np.array([[1.0], [0.0]]), cache)
    dz = 0.25 * (4 - 1)
    dab = 40 * L3 * dz / 1600
    np.testing.assert_allclose(g["v"], [[0.75], [0.25]], rtol=1e-11)
    np.testing.assert_allclose(g["x"], [[0.0], [dab * 5], [0.0]], rtol=1e-10)
    own = dab * 8 / 5 * np.array([[3.0], [4.0]])
    np.testing.assert_allclose(g["q"], [[2 * L3 * dz], [0.0]] + own, rtol=1e-10)
    np.testing.assert_allclose(g["k"], [[0.0], [-2 * L3 * dz]], atol=1e-11)


# ------------------------------------------------------------------------------ scale


@pytest.mark.parametrize("size", [0.125, 3.0, 2.0**20])
def test_the_scale_of_the_input_does_not_count(size):
    """q, k and x a million times larger: the same weights; the gradients by as much smaller.

    Of epsilon the smallest one keeps a trace, 1e-10 / (a b).
    """
    kwargs = cases(SPEC)["mask"]
    moved = kwargs | {n: size * kwargs[n] for n in "qkx"}
    out, cache = lipschitz_forward(**kwargs)
    same, theirs = lipschitz_forward(**moved)
    np.testing.assert_allclose(same, out, rtol=0, atol=1e-8)
    dout = np.random.default_rng(0).standard_normal(out.shape)
    g, h = lipschitz_backward(dout, cache), lipschitz_backward(dout, theirs)
    for name in "qkx":
        np.testing.assert_allclose(h[name] * size, g[name], rtol=0, atol=1e-7)


@pytest.mark.parametrize("case", cases(SPEC))
def test_a_longer_input_is_a_direction_without_slope(case):
    kwargs = cases(SPEC)[case]
    out, cache = lipschitz_forward(**kwargs)
    g = lipschitz_backward(np.random.default_rng(1).standard_normal(out.shape), cache)
    parts = [np.sum(g[n] * kwargs[n]) for n in "qkx"]
    assert abs(sum(parts)) < 1e-8 and max(map(abs, parts)) > 1e-3


def test_a_longer_input_sharpens_plain_distances_instead():
    kwargs = cases(SPEC)["plain"]
    _, cache = L2.forward(*(100.0 * kwargs[n] for n in "qk"), kwargs["v"])
    _, ours = lipschitz_forward(**(kwargs | {n: 100.0 * kwargs[n] for n in "qkx"}))
    assert np.min(np.max(cache.p, -1)) > 0.99 > 0.9 > np.max(ours.p)


def test_one_long_token_flattens_every_row():
    """c is shared: q and x with one token of length 1e6 leave all other weights even."""
    kwargs = cases(SPEC)["plain"]
    x, q = kwargs["x"].copy(), kwargs["q"].copy()
    x[1] *= 1e6
    _, cache = lipschitz_forward(**(kwargs | {"x": x}))
    assert np.max(np.abs(cache.p - 1 / 6)) < 1e-4
    q[:, 2] *= 1e9
    _, cache = lipschitz_forward(**(kwargs | {"q": q}))
    others = np.delete(cache.p, 2, axis=-2)
    assert np.max(np.abs(others - 1 / 6)) < 1e-4


# ------------------------------------------------------------------------------ identities


def test_distances_at_a_scale_and_what_the_scale_adds():
    """scores/l2_distance with alpha c: the same dk and dv; dq differs along q, and x has a part."""
    kwargs = cases(SPEC)["plain"]
    out, cache = lipschitz_forward(**kwargs)
    dout = np.random.default_rng(2).standard_normal(out.shape)
    g = lipschitz_backward(dout, cache)
    for b in range(2):
        scale = kwargs["alpha"] * cache.c[b].item()
        one, theirs = L2.forward(*(kwargs[n][b] for n in "qkv"), scale=scale)
        np.testing.assert_allclose(out[b], one, rtol=0, atol=1e-15)
        h = L2.backward(dout[b], theirs)
        for name in "kv":
            np.testing.assert_allclose(g[name][b], h[name], rtol=0, atol=1e-14)
        left = (g["q"][b] - h["q"]) / kwargs["q"][b]
        np.testing.assert_allclose(left, left[0, 0] + 0 * left, rtol=1e-9)
    longest = np.argmax(np.linalg.norm(kwargs["x"], axis=-1))
    assert np.any(g["x"][longest]) and not np.any(np.delete(g["x"], longest, axis=0))


def test_tied_every_token_leads_its_own_row():
    q, x = cases(SPEC)["plain"]["q"], cases(SPEC)["plain"]["x"]
    _, cache = lipschitz_forward(q, q, q, x)
    np.testing.assert_array_equal(cache.z, np.swapaxes(cache.z, -1, -2))
    assert not np.any(np.diagonal(cache.z, axis1=-2, axis2=-1)) and np.max(cache.z) == 0.0
    np.testing.assert_array_equal(np.argmax(cache.p, -1), [[0, 1, 2, 3, 4]] * 2)


def test_tied_gradient_of_the_projection_and_the_input():
    """q = k = x W, v = x U: the gradient of x adds up from all four, against the complex step."""
    rng = np.random.default_rng(3)
    x, W, U = (rng.standard_normal(s) for s in ((5, 4), (4, 3), (4, 2)))

    def f(x, W):
        return lipschitz_forward(x @ W, x @ W, x @ U, x, alpha=9.0)

    out, cache = f(x, W)
    dout = rng.standard_normal(out.shape)
    g = lipschitz_backward(dout, cache)
    found = engine.complex_gradient(lambda x, W: f(x, W)[0], {"x": x, "W": W}, dout)
    dqk = g["q"] + g["k"]
    np.testing.assert_allclose(x.T @ dqk, found["W"], rtol=0, atol=1e-13)
    np.testing.assert_allclose(dqk @ W.T + g["v"] @ U.T + g["x"], found["x"], rtol=0, atol=1e-13)


def test_default_alpha():
    kwargs = {n: a for n, a in cases(SPEC)["plain"].items() if n != "alpha"}
    out, _ = lipschitz_forward(**kwargs)
    np.testing.assert_array_equal(out, lipschitz_forward(**kwargs, alpha=100.0)[0])


# ------------------------------------------------------------------------------ special values


def test_leading_axes_of_the_input():
    """A block input for every batch, shared by its heads, and one for every head alone."""
    kwargs = cases(SPEC)["batch"]
    rng = np.random.default_rng(4)
    for shape in ((3, 1, 6, 4), (2, 6, 4), (1, 1, 6, 4)):
        given = kwargs | {"x": rng.standard_normal(shape)}
        out, cache = lipschitz_forward(**given)
        np.testing.assert_allclose(out, slow_lipschitz(**given), rtol=0, atol=1e-14)
        dout = rng.standard_normal(out.shape)
        found = engine.vjp(lambda **kw: lipschitz_forward(**(given | kw))[0],  # noqa: B023
                           {n: given[n] for n in "qkvx"})[1](dout)  # fmt: skip
        g = lipschitz_backward(dout, cache)
        for name in "qkvx":
            assert g[name].shape == given[name].shape
            np.testing.assert_allclose(g[name], found[name], rtol=0, atol=1e-13)
    one = cases(SPEC)["no-heads"]
    wide = one | {"k": np.stack([one["k"], one["k"] + 1]), "x": np.stack([one["x"]] * 2)}
    out, cache = lipschitz_forward(**wide)
    g = lipschitz_backward(np.ones_like(out), cache)
    assert out.shape == (2, 5, 3)
    assert {n: a.shape for n, a in g.items()} == {n: wide[n].shape for n in "qkvx"}


def test_zero_queries_and_zero_inputs():
    kwargs = cases(SPEC)["plain"]
    zero = {"q": np.zeros((2, 5, 4)), "k": np.zeros((2, 6, 4)), "x": np.zeros((3, 2))}
    with np.errstate(all="raise"):
        out, cache = lipschitz_forward(**(kwargs | zero))
        g = lipschitz_backward(np.ones_like(out), cache)
    given = kwargs | zero
    taped = engine.vjp(lambda **kw: lipschitz_forward(**(given | kw))[0],
                       {n: given[n] for n in "qx"})[1](np.ones_like(out))  # fmt: skip
    assert all(np.all(np.isfinite(a)) for a in taped.values())
    np.testing.assert_allclose(cache.p, 1 / 6, rtol=1e-15)
    np.testing.assert_array_equal(cache.c, np.full((2, 1, 1), 1e10))
    assert all(np.all(np.isfinite(a)) for a in g.values()) and not np.any(g["x"])


def test_the_longest_inputs_share_their_gradient():
    kwargs = cases(SPEC)["plain"]
    x = np.array([[3.0, 4.0], [1.0, 1.0], [-5.0, 0.0]])
    out, cache = lipschitz_forward(**(kwargs | {"x": x}))
    dout = np.random.default_rng(5).standard_normal(out.shape)
    g = lipschitz_backward(dout, cache)["x"]
    np.testing.assert_allclose(g[0] / [0.6, 0.8], g[2, 0] / -1.0, rtol=1e-14)
    _, alone = lipschitz_forward(**(kwargs | {"x": x[:2]}))
    np.testing.assert_allclose(lipschitz_backward(dout, alone)["x"][0], 2 * g[0], rtol=1e-13)


def test_padding_is_zeros_in_x_and_queries_without_keys():
    """Three padded tokens behind the five real ones change nothing."""
    rng = np.random.default_rng(6)
    x, W = rng.standard_normal((5, 4)), rng.standard_normal((4, 3))
    real, _ = lipschitz_forward(x @ W, x @ W, x, x)
    padded = np.concatenate([x, np.zeros((3, 4))])
    q = np.concatenate([x @ W, rng.standard_normal((3, 3))])
    mask = np.zeros((8, 8), bool)
    mask[:5, :5] = True
    out, cache = lipschitz_forward(q, q, padded, padded, mask=mask)
    np.testing.assert_allclose(out[:5], real, rtol=0, atol=1e-14)
    g = lipschitz_backward(np.ones_like(out), cache)
    assert not np.any(out[5:]) and not np.any(g["q"][5:]) and not np.any(g["x"][5:])


@pytest.mark.parametrize("name", ["q", "x"])
def test_what_is_not_finite_reaches_its_whole_head(name):
    kwargs = cases(SPEC)["mask"]
    kwargs["x"] = np.stack([kwargs["x"]] * 2)
    clean, same = lipschitz_forward(**kwargs)
    bad = kwargs[name].copy()
    bad[0, 2, 0] = np.nan if name == "q" else -np.inf
    with np.errstate(all="raise"):
        out, cache = lipschitz_forward(**(kwargs | {name: bad}))
    alive = np.any(kwargs["mask"], axis=-1)  # row 1 of head 0 has no key and stays zero
    assert not alive[0, 1] and not np.any(out[0, 1])
    assert np.all(np.isnan(out[0][alive[0]])) and np.all(np.isnan(cache.lse[0][alive[0]]))
    np.testing.assert_array_equal(out[1], clean[1])
    dout = np.random.default_rng(7).standard_normal(out.shape)
    g = lipschitz_backward(dout, cache)
    dout[0] = 0.0
    for argument, a in lipschitz_backward(dout, same).items():
        np.testing.assert_allclose(g[argument], a, rtol=0, atol=1e-14)


def test_what_is_not_finite_in_a_key_reaches_who_sees_it():
    kwargs = cases(SPEC)["plain"]
    k = kwargs["k"].copy()
    k[0, 3] = np.nan
    mask = np.ones((5, 6), bool)
    mask[:2, 3] = False
    clean, same = lipschitz_forward(**kwargs, mask=mask)
    out, cache = lipschitz_forward(**(kwargs | {"k": k}), mask=mask)
    assert np.all(np.isnan(out[0, 2:])) and np.sum(np.isnan(out)) == 9
    np.testing.assert_array_equal(out[0, :2], clean[0, :2])
    dout = np.random.default_rng(8).standard_normal(out.shape)
    g = lipschitz_backward(dout, cache)
    dout[0, 2:] = 0.0
    for argument, a in lipschitz_backward(dout, same).items():
        np.testing.assert_allclose(g[argument], a, rtol=0, atol=1e-14)


def test_a_dead_query_of_nan_is_nobodys_business():
    kwargs = cases(SPEC)["mask"]
    q = kwargs["q"].copy()
    q[0, 1] = np.nan  # it sees no key
    out, _ = lipschitz_forward(**(kwargs | {"q": q}))
    np.testing.assert_array_equal(out, lipschitz_forward(**kwargs)[0])
    again, cache = lipschitz_forward(**kwargs, empty_row="nan")
    assert np.all(np.isnan(again[0, 1])) and np.isnan(cache.lse[0, 1])


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"alpha": np.nan}, "Parameter", "alpha is nan"),
        ({"empty_row": "none"}, "Parameter", "empty_row is 'none'"),
        ({"k": np.ones((2, 6, 3))}, "Shape", "k has D = 3"),
        ({"x": np.ones((3, 4, 2))}, "Shape", "x has leading axes"),
        ({"x": np.ones(3)}, "Shape", "x has shape"),
    ],
)
def test_errors(change, error, says):
    with pytest.raises(getattr(core.errors, error + "Error"), match=says):
        lipschitz_forward(**(cases(SPEC)["plain"] | change))


def test_other_errors():
    out, cache = lipschitz_forward(**cases(SPEC)["plain"])
    with pytest.raises(core.errors.ShapeError, match="dout has shape"):
        lipschitz_backward(out[0], cache)
    long = np.broadcast_to(np.zeros(1), (4096, 64))
    with pytest.raises(core.errors.MemoryLimitError, match="the differences"):
        lipschitz_forward(long, long, long, long)


@pytest.mark.oracle
@pytest.mark.parametrize("case", cases(SPEC))
def test_pytorch_agrees(case):
    """Norms and distances of torch, gradients by autograd."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")
    kwargs = cases(SPEC)[case]
    out, cache = lipschitz_forward(**kwargs)
    dout = np.random.default_rng(5).standard_normal(out.shape)
    mine = lipschitz_backward(dout, cache)
    x = {n: torch.tensor(kwargs[n], requires_grad=True) for n in mine}
    live = torch.ones(kwargs["q"].shape[-2], kwargs["k"].shape[-2], dtype=torch.bool)
    live = torch.tensor(kwargs["mask"]) if "mask" in kwargs else live
    alive = live.any(-1, keepdim=True)
    a = torch.linalg.matrix_norm(torch.where(alive, x["q"], 0.0), keepdim=True)
    b = torch.linalg.vector_norm(x["x"], dim=-1).max(-1).values[..., None, None]
    far = torch.cdist(x["q"], x["k"], compute_mode="donot_use_mm_for_euclid_dist") ** 2
    z = -kwargs["alpha"] * far / (a * b + 1e-10)
    p = torch.where(alive, torch.softmax(torch.where(live | ~alive, z, -torch.inf), -1), 0.0)
    theirs = p @ x["v"]
    theirs.backward(torch.tensor(dout))
    np.testing.assert_allclose(out, theirs.detach().numpy(), rtol=0, atol=1e-14)
    for name, g in mine.items():
        np.testing.assert_allclose(g, x[name].grad.numpy(), rtol=0, atol=1e-13)
