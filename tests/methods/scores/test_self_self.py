"""Self-self attention: slow loop, worked example, identities, limits, special values, oracle."""

import math

import numpy as np
import pytest

import attention_ref
from attention_ref import core, engine
from attention_ref.kit.checks import cases
from attention_ref.methods.scores.self_self import self_self_backward, self_self_forward

SPEC = attention_ref.get("scores/self_self")


EQUIVALENT = {
    "self_self_forward: 0.0  ->  1.0": "what replaces it lies in a head that becomes NaN",
    "self_self_backward: 0.0  ->  1.0 (3)": "without x nobody asks for the gradient of tau",
}


def slow_path(x, tau, iterations):
    """The map of one set of vectors after some rounds, a list of lists."""
    N, D = len(x), len(x[0])
    for turn in range(iterations + 1):
        y = []
        for row in x:
            length = math.sqrt(math.fsum(a * a for a in row))
            y.append([a / length for a in row])
        b = []
        for t in range(N):
            z = [tau * math.fsum(y[t][d] * y[s][d] for d in range(D)) for s in range(N)]
            e = [math.exp(a - max(z)) for a in z]
            b.append([a / math.fsum(e) for a in e])
        if turn < iterations:
            x = [[math.fsum(b[t][s] * y[s][d] for s in range(N)) for d in range(D)]
                 for t in range(N)]  # fmt: skip
    return b


def slow_self_self(q, k, v, x=None, tau=None, iterations=1, paths="qkv"):
    """One head at a time, every cosine on its own."""
    lead = np.broadcast_shapes(q.shape[:-2], () if x is None else x.shape[:-2])
    N, D, E = q.shape[-2], q.shape[-1], v.shape[-1]
    out = np.zeros((*lead, N, E))
    for place in np.ndindex(*lead):
        heat = tau
        if tau is None:
            block = np.broadcast_to(x, (*lead, *x.shape[-2:]))[place]
            heat = 0.0
            for n in range(N):
                length = math.sqrt(math.fsum(float(a) ** 2 for a in block[n]))
                heat += length / N / math.sqrt(D)
        maps = []
        for name, a in (("q", q), ("k", k), ("v", v)):
            if name in paths:
                rows = [[float(c) for c in row] for row in a[place]]
                maps.append(slow_path(rows, heat, iterations))
        for t in range(N):
            for e in range(E):
                for s in range(N):
                    weight = math.fsum(b[t][s] for b in maps) / len(maps)
                    out[place][t, e] += weight * float(v[place][s, e])
    return out


@pytest.mark.parametrize("case", cases(SPEC))
def test_equals_the_slow_loop(case):
    kwargs = cases(SPEC)[case]
    out, _ = self_self_forward(**kwargs)
    np.testing.assert_allclose(out, slow_self_self(**kwargs), rtol=0, atol=1e-14)


L3 = math.log(3.0)
SMALL = {"q": np.diag([2.0, 4.0]), "k": np.eye(2), "v": np.array([[4.0], [8.0]]), "paths": "q"}
"""Queries along the axes: cosines 1 and 0, weights 3/4 and 1/4 at tau = ln 3, outputs 5 and 7."""


def test_worked_example():
    """dz = (-3/4, 3/4) in row 0, and it counts both ways; what points along y is lost."""
    x = math.sqrt(2.0) * L3 * np.array([[0.6, 0.8], [0.0, -1.0]])
    out, cache = self_self_forward(**SMALL, x=x, iterations=0)
    np.testing.assert_allclose(cache.tau, [[L3]], rtol=1e-15)
    np.testing.assert_allclose(cache.p, [[0.75, 0.25], [0.25, 0.75]], rtol=1e-15)
    np.testing.assert_allclose(out, [[5.0], [7.0]], rtol=1e-15)
    g = self_self_backward(np.array([[1.0], [0.0]]), cache)
    np.testing.assert_allclose(g["q"], L3 * np.array([[0, 3 / 8], [3 / 16, 0]]), atol=1e-15)
    np.testing.assert_allclose(g["v"], [[0.75], [0.25]], rtol=1e-15)
    want = -0.75 / (2 * math.sqrt(2.0)) * np.array([[0.6, 0.8], [0.0, -1.0]])
    np.testing.assert_allclose(g["x"], want, rtol=1e-14)
    assert not np.any(g["k"])


def test_one_iteration_draws_the_two_together():
    """Rows (3/4, 1/4) and (1/4, 3/4) have the cosine 6/10."""
    out, cache = self_self_forward(**SMALL, tau=L3)
    np.testing.assert_allclose(cache.steps["q"][1].gram[0, 1], 0.6, rtol=1e-15)
    near = 3 / (3 + 3**0.6)
    np.testing.assert_allclose(out, [[8 - 4 * near], [4 + 4 * near]], rtol=1e-14)
    np.testing.assert_array_equal(cache.maps["q"], cache.p)


# ------------------------------------------------------------------------------ identities


@pytest.mark.parametrize("case", cases(SPEC))
def test_permuting_the_tokens_permutes_the_outputs(case):
    kwargs = cases(SPEC)[case]
    order = np.random.default_rng(0).permutation(kwargs["q"].shape[-2])
    moved = {n: a[..., order, :] if n in "qkvx" else a for n, a in kwargs.items()}
    out, _ = self_self_forward(**kwargs)
    np.testing.assert_allclose(
        self_self_forward(**moved)[0], out[..., order, :], rtol=0, atol=1e-14
    )


def test_the_three_paths_are_averaged():
    kwargs = cases(SPEC)["plain"]
    out, cache = self_self_forward(**kwargs)
    dout = np.random.default_rng(1).standard_normal(out.shape)
    g = self_self_backward(dout, cache)
    parts, total = 0.0, dict.fromkeys("qkv", 0.0)
    for path in "qkv":
        one, c = self_self_forward(**kwargs, paths=path)
        parts = parts + one / 3
        np.testing.assert_allclose(c.p, cache.maps[path], rtol=0, atol=1e-16)
        for name, a in self_self_backward(dout, c).items():
            total[name] = total[name] + a / 3
    np.testing.assert_allclose(out, parts, rtol=0, atol=1e-15)
    for name in "qkv":
        np.testing.assert_allclose(g[name], total[name], rtol=0, atol=1e-14)


def test_iterating_is_calling_again_on_the_moved_tokens():
    """The mean of unit keys under the map of I = 0 is the source of I = 1."""
    kwargs = cases(SPEC)["one-path"]
    _, cache = self_self_forward(**kwargs)
    y = kwargs["k"] / np.linalg.norm(kwargs["k"], axis=-1, keepdims=True)
    start = {"q": kwargs["q"], "v": y, "x": kwargs["x"], "paths": "k", "iterations": 0}
    moved, _ = self_self_forward(**start, k=kwargs["k"])
    _, again = self_self_forward(**start, k=moved)
    np.testing.assert_allclose(again.p, cache.p, rtol=0, atol=1e-14)


def test_maps_are_symmetric_before_the_softmax_and_led_by_the_diagonal():
    _, cache = self_self_forward(**cases(SPEC)["batch"])
    for passed in cache.steps.values():
        for step in passed:
            np.testing.assert_allclose(step.gram, np.swapaxes(step.gram, -1, -2), atol=1e-15)
            np.testing.assert_allclose(np.sum(step.b, -1), 1.0, rtol=1e-14)
            own = np.diagonal(step.b, axis1=-2, axis2=-1)[..., None]
            assert np.all(step.b <= own + 1e-15)


def test_lengths_of_queries_and_keys_do_not_count_those_of_x_do():
    kwargs = cases(SPEC)["batch"]
    out, cache = self_self_forward(**kwargs)
    for size in (1e-4, 1e4):
        moved = kwargs | {n: size * kwargs[n] for n in "qk"}
        np.testing.assert_allclose(self_self_forward(**moved)[0], out, rtol=0, atol=1e-14)
    doubled, _ = self_self_forward(**(kwargs | {"x": 2 * kwargs["x"]}))
    given = {n: kwargs[n] for n in ("q", "k", "v", "iterations")}
    for b in range(3):
        one = {n: a[b] if n in "qkv" else a for n, a in given.items()}
        want, _ = self_self_forward(**one, tau=2 * cache.tau[b].item())
        np.testing.assert_allclose(doubled[b], want, rtol=0, atol=1e-14)
    g = self_self_backward(np.random.default_rng(2).standard_normal(out.shape), cache)
    for name in "qk":
        assert np.max(np.abs(np.sum(g[name] * kwargs[name], axis=-1))) < 1e-14
    turned = np.linalg.norm(kwargs["x"], axis=-1, keepdims=True)
    same = g["x"] * turned / kwargs["x"]  # one number for all rows and channels of a block
    np.testing.assert_allclose(same, same[..., :1, :1] + 0 * same, rtol=1e-12)


# ------------------------------------------------------------------------------ limits


def test_cold_every_token_keeps_its_own_value():
    kwargs = cases(SPEC)["plain"] | {"tau": 1e5, "iterations": 3}
    out, cache = self_self_forward(**kwargs)
    np.testing.assert_array_equal(out, kwargs["v"])
    g = self_self_backward(np.ones_like(out), cache)
    np.testing.assert_array_equal(g["v"], np.ones_like(out))
    assert not np.any(g["q"])


def test_many_iterations_gather_what_is_within_reach():
    """Two tight pairs: within a pair the cosine tends to 1, between them it stays below."""
    x = np.array([[1.0, 0.1], [1.0, -0.1], [0.1, 1.0], [-0.1, 1.0]])
    _, cache = self_self_forward(x, x, x, tau=20.0, iterations=30)
    gram = cache.steps["q"][-1].gram
    assert gram[0, 1] > 1 - 1e-12 and gram[2, 3] > 1 - 1e-12 and gram[0, 2] < 0.01
    _, cache = self_self_forward(x, x, x, tau=0.1, iterations=30)
    assert np.min(cache.steps["q"][-1].gram) > 1 - 1e-12


def test_one_token_and_none():
    v = np.array([[3.0, -2.0]])
    out, _ = self_self_forward(v, v, v, tau=1.0, iterations=4)
    np.testing.assert_array_equal(out, v)
    _, cache = self_self_forward(v, v, v, np.array([[3.0, 4.0, 12.0]]))
    np.testing.assert_allclose(cache.tau, [[13 / math.sqrt(2.0)]], rtol=1e-15)
    none = np.ones((2, 0, 3))
    out, cache = self_self_forward(none, none, none, none)
    g = self_self_backward(np.ones((2, 0, 3)), cache)
    assert out.shape == (2, 0, 3) and g["x"].shape == (2, 0, 3)
    np.testing.assert_array_equal(cache.tau, np.zeros((2, 1, 1)))


# ------------------------------------------------------------------------------ special values


def test_a_zero_vector_stays_zero():
    """Its cosines are 0, so it attends evenly; a zero token of x adds nothing to tau."""
    kwargs = cases(SPEC)["no-iteration"]
    q, x = kwargs["q"].copy(), kwargs["x"].copy()
    q[0, 2], x[0, 1] = 0.0, 0.0
    with np.errstate(all="raise"):
        out, cache = self_self_forward(**(kwargs | {"q": q, "x": x}))
        g = self_self_backward(np.ones_like(out), cache)
    np.testing.assert_allclose(cache.maps["q"][0, 2], 1 / 7, rtol=1e-15)
    assert cache.steps["q"][0].length[0, 2].item() == 1.0
    want = np.sum(np.linalg.norm(x[0], axis=-1)) / 7 / 2
    np.testing.assert_allclose(cache.tau, [[[want]]], rtol=1e-15)
    assert all(np.all(np.isfinite(a)) for a in g.values())
    assert not np.any(g["x"][0, 1])


@pytest.mark.parametrize("name", ["q", "k", "v", "x"])
def test_a_number_that_is_not_finite_makes_its_head_nan(name):
    kwargs = cases(SPEC)["batch"]
    bad = kwargs[name].copy()
    bad[1, -1, 0, 0] = np.nan if name in "qx" else np.inf
    with np.errstate(all="raise"):
        out, cache = self_self_forward(**(kwargs | {name: bad}))
    clean, same = self_self_forward(**kwargs)
    gone = np.zeros((3, 2), bool)
    gone[1, :] = name == "x"
    gone[1, 1] = True
    assert np.all(np.isnan(out[gone]))
    np.testing.assert_array_equal(out[~gone], clean[~gone])
    dout = np.random.default_rng(3).standard_normal(out.shape)
    g = self_self_backward(dout, cache)
    want = self_self_backward(np.where(gone[..., None, None], 0.0, dout), same)
    for argument, a in g.items():
        np.testing.assert_allclose(a, want[argument], rtol=0, atol=1e-14)


def test_leading_axes_broadcast():
    """Values and block inputs with axes of their own; the gradients are summed back."""
    one = cases(SPEC)["no-heads"]
    kwargs = one | {"v": np.stack([one["v"], 2 * one["v"] - 1]), "x": one["x"][None]}
    out, cache = self_self_forward(**kwargs)
    dout = np.random.default_rng(4).standard_normal(out.shape)
    found = engine.vjp(lambda **kw: self_self_forward(**(kwargs | kw))[0],
                       {n: kwargs[n] for n in "qkvx"})[1](dout)  # fmt: skip
    g = self_self_backward(dout, cache)
    assert out.shape == (2, 6, 5)
    for name, a in g.items():
        assert a.shape == kwargs[name].shape
        np.testing.assert_allclose(a, found[name], rtol=0, atol=1e-14)
    first, _ = self_self_forward(**one)
    np.testing.assert_allclose(out[0], first, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"tau": None}, "Parameter", "tau is None and x is not given, expected one"),
        ({"x": np.ones((1, 5, 3))}, "Parameter", "tau is 2.0 and x is given"),
        ({"tau": -1.0}, "Parameter", "tau is -1.0"),
        ({"iterations": -1}, "Parameter", "iterations is -1"),
        ({"paths": "qx"}, "Parameter", "paths is 'qx'"),
        ({"paths": ""}, "Parameter", "paths is ''"),
        ({"paths": "qq"}, "Parameter", "paths is 'qq'"),
        ({"k": np.ones((2, 6, 4))}, "Shape", "k has N = 6"),
        ({"v": np.ones((2, 6, 3))}, "Shape", "v has N = 6"),
        ({"k": np.ones((2, 5, 3))}, "Shape", "k has D = 3"),
    ],
)
def test_errors(change, error, says):
    with pytest.raises(getattr(core.errors, error + "Error"), match=says):
        self_self_forward(**(cases(SPEC)["plain"] | change))


def test_other_errors():
    out, cache = self_self_forward(**cases(SPEC)["plain"])
    with pytest.raises(core.errors.ShapeError, match="dout has shape"):
        self_self_backward(out[0], cache)
    long = np.broadcast_to(np.zeros(1), (2**15, 2))
    with pytest.raises(core.errors.MemoryLimitError, match="the maps"):
        self_self_forward(long, long, long, tau=1.0)


@pytest.mark.oracle
@pytest.mark.parametrize("case", cases(SPEC))
def test_pytorch_agrees(case):
    """Its normalize and softmax; gradients by autograd."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")
    kwargs = cases(SPEC)[case]
    out, cache = self_self_forward(**kwargs)
    dout = np.random.default_rng(5).standard_normal(out.shape)
    mine = self_self_backward(dout, cache)
    x = {n: torch.tensor(kwargs[n], requires_grad=True) for n in mine}
    tau = kwargs.get("tau")
    if tau is None:
        tau = x["x"].norm(dim=-1).mean(-1)[..., None, None] / kwargs["q"].shape[-1] ** 0.5
    total, paths = 0.0, kwargs.get("paths", "qkv")
    for path in paths:
        y = torch.nn.functional.normalize(x[path], dim=-1)
        for _ in range(kwargs.get("iterations", 1)):
            y = torch.softmax(tau * (y @ y.mT), -1) @ y
            y = torch.nn.functional.normalize(y, dim=-1)
        total = total + torch.softmax(tau * (y @ y.mT), -1) @ x["v"] / len(paths)
    total.backward(torch.tensor(dout))
    np.testing.assert_allclose(out, total.detach().numpy(), rtol=0, atol=1e-14)
    for name, g in mine.items():
        theirs = x[name].grad
        theirs = np.zeros(g.shape) if theirs is None else theirs.numpy()
        np.testing.assert_allclose(g, theirs, rtol=0, atol=1e-13)
