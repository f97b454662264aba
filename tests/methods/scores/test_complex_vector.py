"""Complex vector attention: slow loop, worked example, limits, angles, symmetries, oracle."""

import math

import numpy as np
import pytest

import attention_ref
from attention_ref import core, engine
from attention_ref.kit.checks import cases
from attention_ref.methods.scores.complex_vector import (
    complex_vector_backward,
    complex_vector_forward,
    polar_backward,
    polar_forward,
)

SPEC = attention_ref.get("scores/complex_vector")
ROTARY = attention_ref.get("scores/rotary")
DOT = attention_ref.get("scores/dot_product")
EQUIVALENT = {
    "polar_forward: 1.0  ->  2.0": "stands in for a modulus that becomes 0",
    "polar_backward: 1.0  ->  2.0": "divides a number that is not used",
}


def slow_complex_vector(
    q, k, v, alpha, beta, gamma, base=10000.0, mask=None, causal=False, align="lower_right",
    scale=None, softcap=None, bias=None,
):  # fmt: skip
    """One number at a time; the angles of q and k one by one, as the abstract has it."""
    lead = np.broadcast_shapes(
        q.shape[:-2], k.shape[:-2], v.shape[:-2], alpha.shape[:-1], beta.shape[:-1],
        gamma.shape[:-1],
    )  # fmt: skip
    T, D, S, E = (*q.shape[-2:], *v.shape[-2:])
    M = D // 2
    q = np.broadcast_to(q, (*lead, T, D))
    k = np.broadcast_to(k, (*lead, S, D))
    v = np.broadcast_to(v, (*lead, S, E))
    alpha = np.broadcast_to(alpha, (*lead, M))
    beta = np.broadcast_to(beta, (*lead, M))
    gamma = np.broadcast_to(gamma, (*lead, M))
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
                z = 0.0
                for i in range(M):
                    a, b = float(q[place][t, i]), float(q[place][t, i + M])
                    x, y = float(k[place][s, i]), float(k[place][s, i + M])
                    angle = math.atan2(b, a) - math.atan2(y, x)
                    while angle > math.pi:
                        angle -= 2 * math.pi
                    while angle <= -math.pi:
                        angle += 2 * math.pi
                    phi = float(alpha[place][i]) * angle + float(beta[place][i])
                    phi += float(gamma[place][i]) * (t + first - s) * base ** (-2 * i / D)
                    z += c * math.hypot(a, b) * math.hypot(x, y) * math.cos(phi)
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
    out, _ = complex_vector_forward(**kwargs)
    np.testing.assert_allclose(out, slow_complex_vector(**kwargs), rtol=0, atol=2e-14)


def test_equals_the_slow_loop_for_angles_all_around():
    """The example set avoids opposite directions; here the angles are anywhere."""
    rng = np.random.default_rng(0)
    kwargs = core.examples.qkv(rng, T=8, S=9, D=6)
    parameters = {n: rng.standard_normal((2, 3)) for n in ("alpha", "beta", "gamma")}
    out, cache = complex_vector_forward(**kwargs, **parameters)
    assert np.min(cache.theta) < -3 and np.max(cache.theta) > 3
    want = slow_complex_vector(**kwargs, **parameters)
    np.testing.assert_allclose(out, want, rtol=0, atol=2e-14)


R, PI, ROOT3 = 2 / 3 * math.log(3.0), math.pi, math.sqrt(3.0)
ROUND = {
    "q": np.array([[0.0, 1.0]]),
    "k": np.array([[R, 0.0], [-R, 0.0]]),
    "v": np.array([[4.0], [8.0]]),
    "alpha": np.array([2 / 3]),
    "beta": np.array([PI / 3]),
    "gamma": np.array([0.0]),
    "scale": 1.0,
}
"""q = i and k = (R, -R): the angles are pi/2 and -pi/2, phi is 2 pi / 3 and 0."""


def test_worked_example_forward():
    """Scores -R/2 and R differ by ln 3."""
    out, cache = complex_vector_forward(**ROUND)
    np.testing.assert_allclose(cache.theta[0, :, 0], [PI / 2, -PI / 2], rtol=1e-15)
    np.testing.assert_allclose(cache.phi[0, :, 0], [2 * PI / 3, 0.0], rtol=1e-15, atol=1e-15)
    np.testing.assert_allclose(cache.capped, [[-R / 2, R]], rtol=1e-14)
    np.testing.assert_allclose(cache.p, [[0.25, 0.75]], rtol=1e-14)
    np.testing.assert_allclose(out, [[7.0]], rtol=1e-14)
    np.testing.assert_allclose(cache.lse, [R + math.log(4 / 3)], rtol=1e-14)


def test_worked_example_backward():
    """dz = (-3/4, 3/4); dphi = (3 sqrt(3) R / 8, 0); the first key is one token back.

    dw = (-sqrt(3)/4 + 3i/8, -3i/4), dq = sum dw k, dk = conj(dw) q.
    """
    out, cache = complex_vector_forward(**ROUND)
    g = complex_vector_backward(np.ones_like(out), cache)
    dphi = 3 * ROOT3 * R / 8
    np.testing.assert_allclose(g["alpha"], [dphi * PI / 2], rtol=1e-13)
    np.testing.assert_allclose(g["beta"], [dphi], rtol=1e-13)
    np.testing.assert_allclose(g["gamma"], [dphi], rtol=1e-13)
    np.testing.assert_allclose(g["q"], [[-ROOT3 / 4 * R, 9 / 8 * R]], rtol=1e-13)
    np.testing.assert_allclose(g["k"], [[3 / 8, -ROOT3 / 4], [-3 / 4, 0]], rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(g["v"], [[0.25], [0.75]], rtol=1e-14)


def test_modulus_and_angle_are_those_of_arctan2():
    angle = np.concatenate([np.linspace(-3.14, 3.14, 41), [np.pi, 0.0, np.pi / 2, -np.pi / 2]])
    x, y = 1.7 * np.cos(angle), 1.7 * np.sin(angle)
    x[-2:], y[-4] = 0.0, 0.0
    r, theta = polar_forward(x, y)
    np.testing.assert_allclose(theta, np.arctan2(y, x), rtol=1e-14, atol=1e-15)
    np.testing.assert_allclose(r, 1.7, rtol=1e-15)
    r, theta = polar_forward(np.array([0.0, -2.0, -2.0]), np.array([0.0, 0.0, -0.0]))
    np.testing.assert_array_equal(r, [0.0, 2.0, 2.0])
    np.testing.assert_array_equal(theta, [0.0, np.pi, np.pi])


def test_the_angle_keeps_the_complex_step_in_all_four_quadrants():
    x, y = np.array([3.0, -3.0, -3.0, 3.0]), np.array([4.0, 4.0, -4.0, -4.0])
    r, _ = polar_forward(x, y)
    for dr, turn in ((1.0, 0.0), (0.0, 1.0)):
        dx, dy = polar_backward(dr, turn, x, y, r)
        for name, want in (("x", dx), ("y", dy)):
            slope = engine.jvp(polar_forward, {"x": x, "y": y}, {name: np.ones(4)})
            got = slope[0] if dr else slope[1] * r
            np.testing.assert_allclose(got, want, rtol=1e-14)


@pytest.mark.parametrize("base", [10000.0, 30.0])
@pytest.mark.parametrize("align", ["lower_right", "upper_left"])
def test_at_first_it_is_rotary(base, align):
    """Also with opposite directions: for alpha = 1 the jump by 2 pi does not show."""
    rng = np.random.default_rng(1)
    kwargs = core.examples.qkv(rng, T=7, S=9, D=6) | {"base": base, "align": align}
    one = np.ones(3)
    out, cache = complex_vector_forward(**kwargs, alpha=one, beta=0 * one, gamma=one)
    want, same = ROTARY.forward(**kwargs)
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-14)
    dout = rng.standard_normal(out.shape)
    g, h = complex_vector_backward(dout, cache), ROTARY.backward(dout, same)
    for name in "qkv":
        np.testing.assert_allclose(g[name], h[name], rtol=0, atol=4e-14)


def test_gamma_zero_is_the_dot_product():
    kwargs = core.examples.qkv(np.random.default_rng(2), T=7, S=9, D=6)
    one = np.ones((2, 3))
    out, _ = complex_vector_forward(**kwargs, alpha=one, beta=0 * one, gamma=0 * one)
    np.testing.assert_allclose(out, DOT.forward(**kwargs)[0], rtol=0, atol=1e-14)


def test_beta_turns_the_queries():
    """alpha = 1: e^(i beta) q has the same scores as q with beta."""
    kwargs = cases(SPEC)["plain"] | {"alpha": np.ones(2)}
    cos, sin = np.cos(kwargs["beta"]), np.sin(kwargs["beta"])
    a, b = kwargs["q"][..., :2], kwargs["q"][..., 2:]
    turned = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    out, _ = complex_vector_forward(**kwargs)
    want, _ = complex_vector_forward(**(kwargs | {"q": turned, "beta": np.zeros(2)}))
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-14)


def test_turning_queries_and_keys_together_changes_nothing():
    """All the way around, so that every angle passes pi once."""
    rng = np.random.default_rng(3)
    kwargs = cases(SPEC)["plain"] | core.examples.qkv(rng, T=5, S=6)
    want, _ = complex_vector_forward(**kwargs)
    for angle in np.linspace(0.3, 6.0, 7):
        turned = {}
        for name in "qk":
            w = (kwargs[name][..., :2] + 1j * kwargs[name][..., 2:]) * np.exp(1j * angle)
            turned[name] = np.concatenate([w.real, w.imag], axis=-1)
        out, _ = complex_vector_forward(**(kwargs | turned))
        np.testing.assert_allclose(out, want, rtol=0, atol=4e-14)


def test_alpha_zero_sees_the_moduli_alone():
    kwargs = cases(SPEC)["plain"] | {"alpha": np.zeros(2)}
    out, cache = complex_vector_forward(**kwargs)
    other = -kwargs["k"]  # every angle turned by pi
    same, _ = complex_vector_forward(**(kwargs | {"k": other}))
    np.testing.assert_allclose(same, out, rtol=0, atol=1e-14)
    g = complex_vector_backward(np.ones_like(out), cache)
    for name in "qk":  # no gradient across the direction of a pair
        across = kwargs[name][..., :2] * g[name][..., 2:] - kwargs[name][..., 2:] * g[name][..., :2]
        np.testing.assert_allclose(across, 0.0, atol=1e-14)


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 1.0, 2.0, 3.0, 0.5, 1.5])
def test_scores_split_for_whole_alpha_alone(alpha):
    """A whole number turns the score of a pair into a product: rank 2, two real channels."""
    rng = np.random.default_rng(3)
    q, k, one = rng.standard_normal((12, 2)), rng.standard_normal((12, 2)), np.ones(1)
    _, cache = complex_vector_forward(q, k, k, alpha * one, 0.4 * one, 0.7 * one, scale=1.0)
    rank = np.linalg.matrix_rank(cache.capped, tol=1e-9)
    assert rank == 2 if alpha == round(alpha) else rank > 4


def test_only_the_distance_counts():
    kwargs = cases(SPEC)["no-heads"]
    late = {n: np.concatenate([np.zeros((3, kwargs[n].shape[-1])), kwargs[n]]) for n in "qkv"}
    mask = np.zeros((8, 10), bool)
    mask[3:, 3:] = True
    out, _ = complex_vector_forward(**(kwargs | late), mask=mask)
    want, _ = complex_vector_forward(**kwargs)
    np.testing.assert_allclose(out[3:], want, rtol=0, atol=1e-15)


def test_opposite_directions_jump_unless_alpha_is_one():
    """q = 1, k = -1 +- 1e-9 i: theta is near -pi or pi, the score cos(alpha pi + beta) +- ..."""
    q, v, zero = np.array([[1.0, 0.0]]), np.ones((2, 1)), np.zeros(1)
    k = np.array([[-1.0, 1e-9], [-1.0, -1e-9]])
    for alpha, low, high in ((1.0, -1.0, -1.0), (0.5, -math.sin(0.5), math.sin(0.5))):
        beta = np.array([0.0 if alpha == 1.0 else 0.5])
        kwargs = {"alpha": np.array([alpha]), "beta": beta, "gamma": zero, "scale": 1.0}
        _, cache = complex_vector_forward(q, k, v, **kwargs)
        np.testing.assert_allclose(cache.theta[0, :, 0], [-math.pi, math.pi], rtol=1e-8)
        want = [[low, high]] if alpha == 1.0 else [[high, low]]
        np.testing.assert_allclose(cache.capped, want, rtol=1e-8)


def test_a_pair_of_zeros_scores_nothing():
    kwargs = cases(SPEC)["plain"]
    q, k = kwargs["q"].copy(), kwargs["k"].copy()
    q[0, 1, [0, 2]] = k[1, 2, [1, 3]] = 0.0
    kwargs |= {"q": q, "k": k}
    out, cache = complex_vector_forward(**kwargs)
    assert np.all(np.isfinite(out)) and not np.any(cache.parts[2][0, 1, :, 0])
    assert not np.any(cache.theta[0, 1, :, 0])
    dout = np.random.default_rng(8).standard_normal(out.shape)
    g = complex_vector_backward(dout, cache)
    names = ("q", "k", "v", "alpha", "beta", "gamma")
    given = {n: kwargs[n] for n in names}
    rest = {n: a for n, a in kwargs.items() if n not in names}
    _, pull = engine.vjp(lambda **a: complex_vector_forward(**a, **rest)[0], given)
    for name, tape in pull(dout).items():
        np.testing.assert_allclose(g[name], tape, rtol=0, atol=1e-13)


def test_a_pair_of_zeros_has_the_gradient_of_rotary_where_there_is_one():
    """alpha = 1: a query that begins at zero can leave it."""
    rng, one = np.random.default_rng(9), np.ones(2)
    q, k, v, dout = (rng.standard_normal((5, 4)) for _ in range(4))
    q[2], k[1, [0, 2]] = 0.0, 0.0
    mine = complex_vector_backward(dout, complex_vector_forward(q, k, v, one, 0 * one, one)[1])
    theirs = ROTARY.backward(dout, ROTARY.forward(q, k, v)[1])
    for name in "qkv":
        np.testing.assert_allclose(mine[name], theirs[name], rtol=0, atol=1e-14)
    assert np.all(mine["q"][2] != 0)


def test_parameters_of_each_head_on_shared_contents():
    one, heads = cases(SPEC)["no-heads"], cases(SPEC)["heads"]
    names = ("alpha", "beta", "gamma")
    out, cache = complex_vector_forward(**(one | {n: heads[n] for n in names}))
    assert out.shape == (2, 5, 3)
    dout = np.random.default_rng(4).standard_normal(out.shape)
    g, parts = complex_vector_backward(dout, cache), []
    for h in range(2):
        single, c = complex_vector_forward(**(one | {n: heads[n][h] for n in names}))
        np.testing.assert_allclose(single, out[h], rtol=0, atol=1e-15)
        parts.append(complex_vector_backward(dout[h], c))
    for n in "qkv":
        np.testing.assert_allclose(g[n], parts[0][n] + parts[1][n], rtol=0, atol=4e-14)
    for n in names:
        np.testing.assert_allclose(g[n], [x[n] for x in parts], rtol=0, atol=4e-14)


def test_a_poisoned_row_sends_nothing_back():
    kwargs = cases(SPEC)["softcap"]
    kwargs["mask"][2, 3] = True
    bad = kwargs["bias"].copy()
    bad[1, 2, 3] = np.nan
    out, cache = complex_vector_forward(**(kwargs | {"bias": bad}))
    assert np.all(np.isnan(out[1, 2])) and np.sum(np.isnan(out)) == 3
    assert np.isnan(cache.lse[1, 2]) and np.sum(np.isnan(cache.lse)) == 1
    dout = np.random.default_rng(5).standard_normal(out.shape)
    g = complex_vector_backward(dout, cache)
    dout[1, 2] = 0.0
    want = complex_vector_backward(dout, complex_vector_forward(**kwargs)[1])
    for name in g:
        np.testing.assert_allclose(g[name], want[name], rtol=0, atol=4e-14)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"alpha": np.ones(3)}, core.errors.ShapeError, r"beta has M = 2 .* as in alpha"),
        ({"q": np.ones((2, 5, 6)), "k": np.ones((2, 6, 6))}, core.errors.ShapeError,
         r"alpha has M = 2, expected one channel for each pair .* 2 M = D = 6"),
        ({"base": 1.0}, core.errors.ParameterError, "base is 1.0"),
        ({"bias": np.ones((5, 7))}, core.errors.ShapeError, "bias has shape"),
        ({"mask": np.ones((6, 5), bool)}, core.errors.ShapeError, "looks transposed"),
        ({"align": "lower-right"}, core.errors.ParameterError, "did you mean 'lower_right'"),
        ({"softcap": 0.0}, core.errors.ParameterError, "softcap is 0.0"),
    ],
)  # fmt: skip
def test_errors_name_argument_and_expectation(change, error, says):
    with pytest.raises(error, match=says):
        complex_vector_forward(**(cases(SPEC)["plain"] | change))


def test_other_errors():
    kwargs = cases(SPEC)["plain"]
    out, cache = complex_vector_forward(**kwargs)
    with pytest.raises(core.errors.ShapeError, match="dout has shape"):
        complex_vector_backward(out[0], cache)
    wide = np.broadcast_to(np.float64(0.0), (1, 12000, 4))  # scores 1.1 GiB, angles 2.1 GiB
    with pytest.raises(core.errors.MemoryLimitError, match=r"the angles .* 2\.1 GiB"):
        complex_vector_forward(**(kwargs | {"q": wide, "k": wide, "v": wide}))


@pytest.mark.oracle
@pytest.mark.parametrize("case", cases(SPEC))
def test_pytorch_agrees(case):
    """Its complex tensors: angle and abs of q conj(k), and its autograd."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")
    kwargs = cases(SPEC)[case]
    out, cache = complex_vector_forward(**kwargs)
    dout = np.random.default_rng(6).standard_normal(out.shape)
    mine = complex_vector_backward(dout, cache)
    given = {n: torch.tensor(kwargs[n], requires_grad=True) for n in mine}
    T, S = kwargs["q"].shape[-2], kwargs["k"].shape[-2]
    first = 0 if kwargs.get("align") == "upper_left" else S - T
    q, k = (torch.complex(*given[n].chunk(2, dim=-1)) for n in "qk")
    w = q.unsqueeze(-2) * k.unsqueeze(-3).conj()
    distance = torch.arange(T)[:, None] + first - torch.arange(S)
    omega = kwargs.get("base", 1e4) ** (-torch.arange(2, dtype=torch.float64) / 2)
    alpha, beta, gamma = (given[n][..., None, None, :] for n in ("alpha", "beta", "gamma"))
    phi = alpha * w.angle() + beta + gamma * distance[..., None] * omega
    z = (w.abs() * torch.cos(phi)).sum(-1) * kwargs.get("scale", 0.5)
    if "softcap" in kwargs:
        z = kwargs["softcap"] * torch.tanh(z / kwargs["softcap"])
    if "bias" in given:
        z = z + given["bias"]
    rule = {n: kwargs[n] for n in ("mask", "causal", "align") if n in kwargs}
    live = torch.tensor(np.array(core.visible(kwargs["q"], kwargs["k"], **rule)))
    alive = live.any(-1, keepdim=True)
    p = torch.softmax(torch.where(live | ~alive, z, -torch.inf), -1)
    theirs = torch.where(alive, p, 0.0) @ given["v"]
    theirs.backward(torch.tensor(dout))
    np.testing.assert_allclose(out, theirs.detach().numpy(), rtol=0, atol=1e-14)
    for n, g in mine.items():
        np.testing.assert_allclose(g, given[n].grad.numpy(), rtol=0, atol=1e-13)
