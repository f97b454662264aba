"""Squeeze and excitation, ECA: slow loop, worked example, identities, errors, oracle."""

import math

import numpy as np
import pytest

import attention_ref
from attention_ref import core
from attention_ref.kit.checks import cases
from attention_ref.methods.vision.squeeze_excitation import (
    kernel_size,
    squeeze_excitation_backward,
    squeeze_excitation_forward,
)

SPEC = attention_ref.get("vision/squeeze_excitation")
SE = [name for name, kwargs in cases(SPEC).items() if "W1" in kwargs]
ECA = [name for name in cases(SPEC) if name not in SE]


def slow_squeeze_excitation(x, W1=None, b1=None, W2=None, b2=None, w=None, variant="se"):
    """One channel at a time."""
    *lead, C, X, Y = x.shape
    out = np.zeros(x.shape)
    for place in np.ndindex(*lead):
        m = [
            math.fsum(float(x[place][c, i, j]) for i in range(X) for j in range(Y)) / (X * Y)
            for c in range(C)
        ]
        z = [0.0] * C
        if variant == "eca":
            half = len(w) // 2
            for c in range(C):
                near = range(max(c - half, 0), min(c + half + 1, C))
                z[c] = math.fsum(float(w[i - c + half]) * m[i] for i in near)
        else:
            hidden = []
            for u in range(len(W1)):
                h = math.fsum(float(W1[u, c]) * m[c] for c in range(C))
                hidden.append(max(h + (0.0 if b1 is None else float(b1[u])), 0.0))
            for c in range(C):
                z[c] = math.fsum(float(W2[c, u]) * hidden[u] for u in range(len(hidden)))
                z[c] += 0.0 if b2 is None else float(b2[c])
        for c in range(C):
            gate = 1.0 / (1.0 + math.exp(-z[c]))
            for i in range(X):
                for j in range(Y):
                    out[place][c, i, j] = float(x[place][c, i, j]) * gate
    return out


@pytest.mark.parametrize("case", cases(SPEC))
def test_equals_the_slow_loop(case):
    kwargs = cases(SPEC)[case]
    out, _ = squeeze_excitation_forward(**kwargs)
    np.testing.assert_allclose(out, slow_squeeze_excitation(**kwargs), rtol=0, atol=1e-14)


def test_worked_example_se():
    """m = (1, 3), hidden = 3 - 1 - 1 = 1, z = (ln 3, -ln 4 + ln 4 = 0): gates 3/4 and 1/2.

    With dout = 1: dgate = sum x = (2, 6), dz = (2 * 3/16, 6 / 4) = (3/8, 3/2);
    dhidden = ln 3 * 3/8 - ln 4 * 3/2 = d; dm = (-d, d); dx = gate + dm / 2.
    """
    x = np.array([[[0.0, 2.0]], [[3.0, 3.0]]])
    l3, l4 = math.log(3), math.log(4)
    parts = np.array([[-1.0, 1.0]]), np.array([-1.0]), np.array([[l3], [-l4]]), np.array([0.0, l4])
    out, cache = squeeze_excitation_forward(x, *parts)
    np.testing.assert_allclose(cache.gate, [0.75, 0.5], rtol=1e-15)
    np.testing.assert_allclose(out, [[[0.0, 1.5]], [[1.5, 1.5]]], rtol=1e-15)
    g = squeeze_excitation_backward(np.ones_like(x), cache)
    d = 3 / 8 * l3 - 3 / 2 * l4
    want = {
        "x": [[[0.75 - d / 2] * 2], [[0.5 + d / 2] * 2]], "W1": [[d, 3 * d]], "b1": [d],
        "W2": [[3 / 8], [3 / 2]], "b2": [3 / 8, 3 / 2],
    }  # fmt: skip
    for name, expected in want.items():
        np.testing.assert_allclose(g[name], expected, rtol=1e-14)


def test_worked_example_eca():
    """m = (0, ln 3, 0), w = (1, 0, -1): z = (-ln 3, 0, ln 3), gates 1/4, 1/2, 3/4.

    dout picks out the middle channel: dz = (0, ln 3 / 4, 0), dw = dz_1 (m_0, m_1, m_2) and
    dm = dz_1 (1, 0, -1).
    """
    x = np.array([0.0, math.log(3), 0.0]).reshape(3, 1, 1)
    out, cache = squeeze_excitation_forward(x, w=np.array([1.0, 0.0, -1.0]), variant="eca")
    np.testing.assert_allclose(cache.gate, [0.25, 0.5, 0.75], rtol=1e-15)
    np.testing.assert_allclose(out.ravel(), [0, math.log(3) / 2, 0], rtol=1e-15)
    dout = np.array([0.0, 1.0, 0.0]).reshape(3, 1, 1)
    g = squeeze_excitation_backward(dout, cache)
    d = math.log(3) / 4
    np.testing.assert_allclose(g["w"], [0, d * math.log(3), 0], rtol=1e-15)
    np.testing.assert_allclose(g["x"].ravel(), [d, 0.5, -d], rtol=1e-15)


def test_kernel_lengths_of_the_paper():
    sizes = {16: 3, 64: 3, 128: 5, 256: 5, 512: 5, 1024: 5, 2048: 7, 1: 1}
    assert {channels: kernel_size(channels) for channels in sizes} == sizes
    with pytest.raises(core.errors.ParameterError, match="channels is 0"):
        kernel_size(0)


def test_weights_of_zero_halve_everything():
    for case in cases(SPEC):
        kwargs = cases(SPEC)[case]
        zeros = {n: a if n in ("x", "variant") else np.zeros_like(a) for n, a in kwargs.items()}
        out, _ = squeeze_excitation_forward(**zeros)
        np.testing.assert_array_equal(out, kwargs["x"] / 2)


def test_a_large_last_bias_opens_every_gate():
    kwargs = cases(SPEC)["se"]
    out, _ = squeeze_excitation_forward(**(kwargs | {"b2": np.full(4, 800.0)}))
    np.testing.assert_array_equal(out, kwargs["x"])
    out, _ = squeeze_excitation_forward(**(kwargs | {"b2": np.full(4, -800.0)}))
    np.testing.assert_array_equal(out, np.zeros_like(out))


@pytest.mark.parametrize("case", ["se", "eca"])
def test_places_may_be_shuffled(case):
    """The gate knows nothing about where in the image anything is."""
    kwargs = cases(SPEC)[case]
    x = kwargs["x"]
    order = np.random.default_rng(0).permutation(x.shape[-1] * x.shape[-2])
    flat = x.reshape(*x.shape[:-2], 1, -1)
    out, _ = squeeze_excitation_forward(**kwargs)
    moved, _ = squeeze_excitation_forward(**(kwargs | {"x": flat[..., order]}))
    want = out.reshape(flat.shape)[..., order]
    np.testing.assert_allclose(moved, want, rtol=0, atol=1e-15)


def test_channels_may_be_renamed_in_se_and_not_in_eca():
    kwargs = cases(SPEC)["se"]
    order = np.array([2, 0, 3, 1])
    out, _ = squeeze_excitation_forward(**kwargs)
    renamed, _ = squeeze_excitation_forward(
        kwargs["x"][:, order], kwargs["W1"][:, order], kwargs["b1"], kwargs["W2"][order],
        kwargs["b2"][order],
    )  # fmt: skip
    np.testing.assert_allclose(renamed, out[:, order], rtol=0, atol=1e-15)
    kwargs = cases(SPEC)["eca"]
    turned = kwargs | {"x": kwargs["x"][:, ::-1], "w": kwargs["w"][::-1]}
    out, _ = squeeze_excitation_forward(**kwargs)
    mirrored, _ = squeeze_excitation_forward(**turned)
    np.testing.assert_allclose(mirrored, out[:, ::-1], rtol=0, atol=1e-15)
    plain, _ = squeeze_excitation_forward(**(kwargs | {"x": kwargs["x"][:, ::-1]}))
    assert np.max(np.abs(plain - out[:, ::-1])) > 1e-3


def test_a_kernel_of_one_is_a_gate_of_its_own_mean():
    kwargs = cases(SPEC)["eca-one"]
    _, cache = squeeze_excitation_forward(**kwargs)
    mean = kwargs["x"].mean(axis=(-2, -1))
    np.testing.assert_allclose(cache.gate, 1 / (1 + np.exp(-kwargs["w"] * mean)), rtol=1e-14)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_number_reaches_all_channels_in_se(bad):
    kwargs = cases(SPEC)["se"]
    x = kwargs["x"].copy()
    x[1, 2, 0, 0] = bad
    clean, clean_cache = squeeze_excitation_forward(**kwargs)
    out, cache = squeeze_excitation_forward(**(kwargs | {"x": x}))
    assert np.all(np.isnan(out[1]))
    np.testing.assert_array_equal(out[[0, 2]], clean[[0, 2]])
    dout = np.ones_like(clean)
    g = squeeze_excitation_backward(dout, cache)
    dout[1] = 0.0
    want = squeeze_excitation_backward(dout, clean_cache)
    for name in g:
        np.testing.assert_allclose(g[name], want[name], rtol=0, atol=1e-14)


def test_a_non_finite_number_reaches_its_neighbours_in_eca():
    kwargs = cases(SPEC)["eca"]
    x = kwargs["x"].copy()
    x[0, 3, 0, 0] = np.nan
    clean, _ = squeeze_excitation_forward(**kwargs)
    out, _ = squeeze_excitation_forward(**(kwargs | {"x": x}))
    assert np.all(np.isnan(out[0, 2:]))
    np.testing.assert_array_equal(out[0, :2], clean[0, :2])
    np.testing.assert_array_equal(out[1], clean[1])


@pytest.mark.parametrize("name", ["W1", "b1", "W2", "b2"])
def test_a_non_finite_parameter_reaches_everything(name):
    kwargs = cases(SPEC)["se"]
    a = kwargs[name].copy()
    a[0] = np.nan
    out, cache = squeeze_excitation_forward(**(kwargs | {name: a}))
    assert np.all(np.isnan(out))
    g = squeeze_excitation_backward(np.ones_like(out), cache)
    assert not any(np.any(x) for x in g.values())


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"W2": None}, core.errors.ParameterError, "W2 is NoneType, expected an array for"),
        ({"w": np.ones(3)}, core.errors.ParameterError, "w is ndarray, expected None for variant"),
        ({"variant": "eca"}, core.errors.ParameterError, "W1 is ndarray, expected None for"),
        ({"variant": "cbam"}, core.errors.ParameterError, "variant is 'cbam', expected one of"),
        ({"W1": np.ones((2, 3))}, core.errors.ShapeError, "W1 has C = 3 .* expected 4 as in x"),
        ({"W2": np.ones((2, 4))}, core.errors.ShapeError, "W2 has C = 2 .* expected 4 as in x"),
        ({"b1": np.ones(3)}, core.errors.ShapeError, "has M = "),
        ({"x": np.ones((3, 4, 0, 2))}, core.errors.ShapeError, "expected C, X and Y of at least"),
    ],
)
def test_errors_name_argument_and_expectation(change, error, says):
    with pytest.raises(error, match=says):
        squeeze_excitation_forward(**(cases(SPEC)["se"] | change))


def test_eca_wants_an_odd_kernel_and_nothing_else():
    kwargs = cases(SPEC)["eca"]
    with pytest.raises(core.errors.ShapeError, match="w has K = 4, expected an odd"):
        squeeze_excitation_forward(**(kwargs | {"w": np.ones(4)}))
    with pytest.raises(core.errors.ParameterError, match="w is NoneType, expected an array"):
        squeeze_excitation_forward(kwargs["x"], variant="eca")
    with pytest.raises(core.errors.ParameterError, match="b2 is ndarray, expected None"):
        squeeze_excitation_forward(**kwargs, b2=np.ones(5))


def test_a_foreign_cotangent_is_refused():
    out, cache = squeeze_excitation_forward(**cases(SPEC)["se"])
    with pytest.raises(core.errors.ShapeError, match="dout has shape"):
        squeeze_excitation_backward(out[0], cache)


@pytest.mark.oracle
@pytest.mark.parametrize("case", cases(SPEC))
def test_pytorch_agrees(case):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")
    kwargs = cases(SPEC)[case]
    given = {n: torch.tensor(a, requires_grad=True) for n, a in kwargs.items() if n != "variant"}
    x, F = given["x"], torch.nn.functional
    m = torch.flatten(F.adaptive_avg_pool2d(x.reshape(-1, *x.shape[-3:]), 1), 1)
    if "w" in given:
        w = given["w"]
        z = F.conv1d(m[:, None], w[None, None], padding=(len(w) - 1) // 2)[:, 0]
    else:
        z = F.linear(m, given["W1"], given.get("b1"))
        z = F.linear(F.relu(z), given["W2"], given.get("b2"))
    theirs = x * torch.sigmoid(z).reshape(*x.shape[:-2], 1, 1)
    out, cache = squeeze_excitation_forward(**kwargs)
    np.testing.assert_allclose(out, theirs.detach().numpy(), rtol=0, atol=5e-15)
    dout = np.random.default_rng(5).standard_normal(out.shape)
    theirs.backward(torch.tensor(dout))
    for name, g in squeeze_excitation_backward(dout, cache).items():
        np.testing.assert_allclose(g, given[name].grad.numpy(), rtol=0, atol=2e-14)
