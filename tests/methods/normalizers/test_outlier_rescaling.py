"""PreAffine RMSNorm and GatedNorm: slow loop, worked example, rescaling by outliers, oracle."""

import math

import numpy as np
import pytest

import attention_ref
from attention_ref import core
from attention_ref.kit.checks import cases
from attention_ref.methods.normalizers.outlier_rescaling import (
    outlier_rescaling_backward,
    outlier_rescaling_forward,
    residual_factor,
    sink_factor,
)

SPEC = attention_ref.get("normalizers/outlier_rescaling")
sink = attention_ref.get("normalizers/sink")


def slow_outlier_rescaling(x, g, lam=None, w_down=None, w_up=None, eps=1e-6):
    """One token at a time."""
    C = x.shape[-1]
    out = np.zeros(x.shape)
    for place in np.ndindex(*x.shape[:-1]):
        u = [float(x[place][c]) * (1.0 if lam is None else float(lam[c])) for c in range(C)]
        r = math.sqrt(math.fsum(a * a for a in u) / C + eps)
        y = [float(g[c]) * u[c] / r for c in range(C)]
        for c in range(C):
            out[place][c] = y[c]
        if w_up is None:
            continue
        hidden = []
        for j in range(len(w_up)):
            h = math.fsum(y[c] * float(w_down[c, j]) for c in range(C))
            hidden.append(h / (1.0 + math.exp(-h)))
        for c in range(C):
            a = math.fsum(hidden[j] * float(w_up[j, c]) for j in range(len(w_up)))
            out[place][c] = y[c] / (1.0 + math.exp(-a))
    return out


@pytest.mark.parametrize("case", cases(SPEC))
def test_equals_the_slow_loop(case):
    kwargs = cases(SPEC)[case]
    out, _ = outlier_rescaling_forward(**kwargs)
    np.testing.assert_allclose(out, slow_outlier_rescaling(**kwargs), rtol=0, atol=1e-14)


def board():
    """u = (1, 7), r = 5, y = (1, 7), h = ln 3, silu(h) = 3/4 ln 3, gates 3/4 and 1/4."""
    return {
        "x": np.array([[1.0, 3.5]]), "g": np.array([5.0, 5.0]), "lam": np.array([1.0, 2.0]),
        "w_down": np.array([[math.log(3)], [0.0]]), "w_up": np.array([[4 / 3, -4 / 3]]),
        "eps": 0.0,
    }  # fmt: skip


def test_worked_example():
    """dout = (1, 0): da = 3/16, dh = b, dy = (3/4 + b ln 3, 0) = (e, 0), du = e (49, -7)/50."""
    out, cache = outlier_rescaling_forward(**board())
    np.testing.assert_allclose(cache.r, [[5.0]], rtol=1e-15)
    np.testing.assert_allclose(cache.y, [[1.0, 7.0]], rtol=1e-15)
    np.testing.assert_allclose(cache.gate, [[0.75, 0.25]], rtol=1e-15)
    np.testing.assert_allclose(out, [[0.75, 1.75]], rtol=1e-15)
    g = outlier_rescaling_backward(np.array([[1.0, 0.0]]), cache)
    log3 = math.log(3)
    b = 3 / 16 * (1 + log3 / 4)
    e = 3 / 4 + b * log3
    want = {
        "x": [[0.98 * e, -0.28 * e]], "g": [e / 5, 0.0], "lam": [0.98 * e, -0.49 * e],
        "w_down": [[b], [7 * b]], "w_up": [[9 / 64 * log3, 0.0]],
    }  # fmt: skip
    assert set(g) == set(want)
    for name, expected in want.items():
        np.testing.assert_allclose(g[name], expected, rtol=1e-14, atol=1e-16)


def test_worked_example_of_the_norm_alone():
    """The example without gate and lambda: du = (49, -7)/50, orthogonal to (1, 7)."""
    out, cache = outlier_rescaling_forward(np.array([1.0, 7.0]), np.full(2, 5.0), eps=0.0)
    assert cache.h is None and cache.gate is None
    np.testing.assert_allclose(out, [1.0, 7.0], rtol=1e-15)
    g = outlier_rescaling_backward(np.array([1.0, 0.0]), cache)
    assert set(g) == {"x", "g"}
    np.testing.assert_allclose(g["x"], [0.98, -0.14], rtol=1e-14)
    np.testing.assert_allclose(g["g"], [0.2, 0.0], rtol=1e-15)


def test_eps_is_added_to_the_mean_square():
    out, cache = outlier_rescaling_forward(np.array([1.0, 7.0]), np.ones(2), eps=11.0)
    np.testing.assert_allclose(cache.r, [6.0], rtol=1e-15)
    np.testing.assert_allclose(out, [1 / 6, 7 / 6], rtol=1e-15)
    _, cache = outlier_rescaling_forward(np.zeros(3), np.ones(3))
    np.testing.assert_allclose(cache.r, [1e-3], rtol=1e-15)


@pytest.mark.parametrize("case", cases(SPEC))
def test_length_of_the_token_does_not_matter(case):
    """With eps = 0 the output of 7 x is that of x, and x is orthogonal to its gradient."""
    kwargs = cases(SPEC)[case] | {"eps": 0.0}
    out, cache = outlier_rescaling_forward(**kwargs)
    longer, _ = outlier_rescaling_forward(**(kwargs | {"x": 7.0 * kwargs["x"]}))
    np.testing.assert_allclose(longer, out, rtol=0, atol=2e-14)
    dout = np.random.default_rng(0).standard_normal(out.shape)
    dx = outlier_rescaling_backward(dout, cache)["x"]
    np.testing.assert_allclose(np.sum(dx * kwargs["x"], axis=-1), 0.0, rtol=0, atol=1e-13)


def test_open_and_closed_gates():
    """Large positive or negative arguments of the gate: RMSNorm, or nothing."""
    kwargs = cases(SPEC)["rms"]
    one = {"w_down": np.ones((4, 1)), "g": np.abs(kwargs["g"]), "x": np.abs(kwargs["x"])}
    plain, _ = outlier_rescaling_forward(**(kwargs | {n: one[n] for n in ("g", "x")}))
    for sign, want in ((1.0, plain), (-1.0, 0 * plain)):
        out, _ = outlier_rescaling_forward(**(kwargs | one | {"w_up": np.full((1, 4), 1e4 * sign)}))
        np.testing.assert_allclose(out, want, rtol=0, atol=1e-15)


def test_lambda_is_an_outlier_made_by_a_parameter():
    """lambda_c = 100 on a channel of size 1 rescales like x_c = 100, and x stays small."""
    rng = np.random.default_rng(1)
    x, g, lam = rng.standard_normal((5, 6)), np.ones(6), np.ones(6)
    x[:, 2], lam[2] = 1.0, 100.0
    large = x.copy()
    large[:, 2] = 100.0
    mine, _ = outlier_rescaling_forward(x, g, lam)
    theirs, _ = outlier_rescaling_forward(large, g)
    np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-15)


@pytest.mark.parametrize("size", [0.0, 1.0, 30.0, -30.0, 1e6])
def test_residual_factor_is_what_happens_to_the_other_channels(size):
    rng = np.random.default_rng(2)
    x = rng.standard_normal((4, 6))
    x[:, 3] = size
    rest = x.copy()
    rest[:, 3] = 0.0
    with_it, _ = outlier_rescaling_forward(x, np.ones(6))
    without, _ = outlier_rescaling_forward(rest, np.ones(6))
    found = residual_factor(x, 3)
    assert found.shape == (4,)
    for c in (0, 1, 2, 4, 5):
        np.testing.assert_allclose(with_it[:, c], without[:, c] * found, rtol=1e-13)
    formula = 1 / np.sqrt(1 + size**2 / np.sum(rest**2, axis=1))
    np.testing.assert_allclose(residual_factor(x, 3, eps=0.0), formula, rtol=1e-14)


def test_residual_factor_by_hand():
    """Rest (3, 0, 4) has the length 5, outlier 12: 5/13; the default eps is the norm's."""
    x = np.array([3.0, 12.0, 0.0, 4.0])
    np.testing.assert_allclose(residual_factor(x, 1, eps=0.0), 5 / 13, rtol=1e-15)
    want = math.sqrt((25 / 4 + 1e-6) / (169 / 4 + 1e-6))
    np.testing.assert_allclose(residual_factor(x, 1), want, rtol=1e-15)


def test_sink_factor_is_the_row_sum_of_sink_attention():
    """The sink's key with a value of zero multiplies the output by Z / (Z + e^m)."""
    rng = np.random.default_rng(3)
    q, k, v = rng.standard_normal((3, 1, 5, 4))
    m = 1.7
    _, cache = sink.forward(q, k, v, np.array([m]), scale=1.0)
    z = np.concatenate([np.full((1, 5, 1), m), q @ np.swapaxes(k, 1, 2)], axis=2)
    found = sink_factor(z, 0)
    np.testing.assert_allclose(found, np.sum(cache.p, axis=-1), rtol=1e-14)
    np.testing.assert_allclose(found, 1.0 - cache.p_sink, rtol=1e-13)
    np.testing.assert_allclose(sink_factor(np.log([2.0, 6.0, 4.0]), 1), 0.5, rtol=1e-15)
    np.testing.assert_array_equal(sink_factor(np.array([0.0, 5000.0]), 1), 0.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_token_is_nan_alone(bad):
    kwargs = cases(SPEC)["both"]
    x = kwargs["x"].copy()
    x[1, 2, 0] = bad
    clean, clean_cache = outlier_rescaling_forward(**kwargs)
    out, cache = outlier_rescaling_forward(**(kwargs | {"x": x}))
    assert np.all(np.isnan(out[1, 2])) and np.sum(np.isnan(out)) == 6
    np.testing.assert_array_equal(out[0], clean[0])
    dout = np.ones_like(clean)
    g = outlier_rescaling_backward(dout, cache)
    dout[1, 2] = 0.0
    for name, want in outlier_rescaling_backward(dout, clean_cache).items():
        np.testing.assert_allclose(g[name], want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["g", "lam", "w_down", "w_up"])
def test_a_non_finite_parameter_reaches_everything(name):
    kwargs = cases(SPEC)["both"]
    a = kwargs[name].copy()
    a[0] = np.nan
    out, cache = outlier_rescaling_forward(**(kwargs | {name: a}))
    assert np.all(np.isnan(out))
    g = outlier_rescaling_backward(np.ones_like(out), cache)
    assert not any(np.any(x) for x in g.values())


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"g": np.ones(5)}, core.errors.ShapeError, r"g has C = 5 .*, expected 6 as in x"),
        ({"lam": np.ones((1, 6))}, core.errors.ShapeError, r"lam has shape \(1, 6\)"),
        ({"w_up": np.ones((3, 6))}, core.errors.ShapeError, "w_up has R = 3 .* as in w_down"),
        ({"w_up": None}, core.errors.ParameterError, "w_up is None, expected both matrices"),
        ({"w_down": None}, core.errors.ParameterError, "w_down is None, expected both matrices"),
        ({"eps": -1e-9}, core.errors.ParameterError, "eps is -1e-09, expected .* 0 <= eps"),
        ({"x": [1.0]}, core.errors.DTypeError, "x is a list"),
    ],
)
def test_errors_name_argument_and_expectation(change, error, says):
    with pytest.raises(error, match=says):
        outlier_rescaling_forward(**(cases(SPEC)["both"] | change))


def test_a_token_needs_a_channel_and_a_cotangent_the_shape():
    with pytest.raises(core.errors.ShapeError, match="expected at least one channel"):
        outlier_rescaling_forward(np.ones((3, 0)), np.ones(0))
    out, cache = outlier_rescaling_forward(**cases(SPEC)["rms"])
    with pytest.raises(core.errors.ShapeError, match="dout has shape"):
        outlier_rescaling_backward(out[0], cache)


@pytest.mark.oracle
@pytest.mark.parametrize("case", cases(SPEC))
def test_pytorch_agrees(case):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")
    kwargs = cases(SPEC)[case]
    names = [n for n, a in kwargs.items() if isinstance(a, np.ndarray)]
    given = {n: torch.tensor(kwargs[n], requires_grad=True) for n in names}
    F, u = torch.nn.functional, given["x"] * given.get("lam", 1.0)
    y = F.rms_norm(u, u.shape[-1:], given["g"], kwargs.get("eps", 1e-6))
    if "w_up" in given:
        y = y * torch.sigmoid(F.silu(y @ given["w_down"]) @ given["w_up"])
    out, cache = outlier_rescaling_forward(**kwargs)
    np.testing.assert_allclose(out, y.detach().numpy(), rtol=0, atol=1e-14)
    dout = np.random.default_rng(5).standard_normal(out.shape)
    y.backward(torch.tensor(dout))
    for name, g in outlier_rescaling_backward(dout, cache).items():
        np.testing.assert_allclose(g, given[name].grad.numpy(), rtol=0, atol=1e-13)
