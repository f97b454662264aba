"""Adaptive attention scaling: slow loop, worked example, what n counts, frustum code, oracle."""

import math

import numpy as np
import pytest

import attention_ref
from attention_ref import core, engine
from attention_ref.kit.checks import cases
from attention_ref.methods.normalizers.adaptive_attention_scaling import (
    adaptive_attention_scaling_backward,
    adaptive_attention_scaling_forward,
    frustum_position_backward,
    frustum_position_forward,
)

SPEC = attention_ref.get("normalizers/adaptive_attention_scaling")
softmax = attention_ref.get("scores/dot_product")


def slow_adaptive_attention_scaling(
    q, k, v, n_train=12185, count="all", mask=None, causal=False, align="lower_right", scale=None,
    softcap=None, bias=None,
):  # fmt: skip
    """One number at a time, exponentials without any shift."""
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
            seen = [
                s
                for s in range(S)
                if not (causal and s > t + first) and (mask is None or mask[place][t, s])
            ]
            n = S if count == "all" else len(seen)
            grown = {}
            for s in seen:
                z = c * math.fsum(float(q[place][t, d]) * float(k[place][s, d]) for d in range(D))
                z *= math.log(n, n_train)
                if softcap is not None:
                    z = softcap * math.tanh(z / softcap)
                if bias is not None:
                    z += float(bias[place][t, s])
                grown[s] = math.exp(z)
            total = math.fsum(grown.values())
            for x in range(E if seen else 0):
                mixed = math.fsum(w * float(v[place][s, x]) for s, w in grown.items())
                out[place][t, x] = mixed / total
    return out


@pytest.mark.parametrize("case", cases(SPEC))
def test_equals_the_slow_loop(case):
    kwargs = cases(SPEC)[case]
    for count in ("all", "visible"):
        given = kwargs | {"count": count}
        out, _ = adaptive_attention_scaling_forward(**given)
        np.testing.assert_allclose(out, slow_adaptive_attention_scaling(**given), atol=1e-14)


def board():
    """Four keys after training on two: a = 2, and e^z = 9, 1, 1, 1."""
    k = np.array([[math.log(3.0)], [0.0], [0.0], [0.0]])
    v = np.array([[4.0], [0.0], [0.0], [0.0]])
    return {"q": np.array([[1.0]]), "k": k, "v": v, "n_train": 2}


def test_worked_example():
    """p = 3/4 and three times 1/12; dz = (3, -1, -1, -1)/4, times a = 2 before q and k."""
    out, cache = adaptive_attention_scaling_forward(**board())
    np.testing.assert_allclose(out, [[3.0]], rtol=1e-14)
    np.testing.assert_allclose(cache.p, [[3 / 4, 1 / 12, 1 / 12, 1 / 12]], rtol=1e-14)
    np.testing.assert_allclose(cache.lse, [math.log(12)], rtol=1e-14)
    assert cache.factor == 2.0
    g = adaptive_attention_scaling_backward(np.array([[1.0]]), cache)
    np.testing.assert_allclose(g["q"], [[1.5 * math.log(3)]], rtol=1e-14)
    np.testing.assert_allclose(g["k"], [[1.5], [-0.5], [-0.5], [-0.5]], rtol=1e-13)
    np.testing.assert_allclose(g["v"], cache.p.T, rtol=0, atol=0)


def test_worked_example_with_two_keys_hidden():
    """ "all" still stretches by 2: weights 9 : 1; "visible" does not: weights 3 : 1."""
    given = board() | {"mask": np.array([[True, True, False, False]])}
    out, cache = adaptive_attention_scaling_forward(**given)
    np.testing.assert_allclose(out, [[3.6]], rtol=1e-14)
    out, cache = adaptive_attention_scaling_forward(**given, count="visible")
    np.testing.assert_allclose(out, [[3.0]], rtol=1e-14)
    np.testing.assert_allclose(cache.factor, [[1.0]], rtol=1e-15)
    g = adaptive_attention_scaling_backward(np.array([[1.0]]), cache)
    np.testing.assert_allclose(g["k"], [[0.75], [-0.75], [0.0], [0.0]], rtol=1e-14)


def test_the_default_is_that_of_the_cost_volume_and_counts_every_key():
    kwargs = {n: cases(SPEC)["mask"][n] for n in ("q", "k", "v", "mask")}
    out, cache = adaptive_attention_scaling_forward(**kwargs)
    assert cache.factor == math.log(7) / math.log(12185)
    plain, _ = softmax.forward(**kwargs, scale=0.5 * cache.factor)  # D = 4
    np.testing.assert_allclose(out, plain, rtol=0, atol=1e-15)


def test_causal_rows_have_the_temperature_of_their_own_length():
    """Row t of a causal sequence is the last row of the sequence cut after t."""
    q, k, v = np.random.default_rng(1).standard_normal((3, 6, 4))
    rule = {"n_train": 3.0, "count": "visible", "causal": True}
    out, cache = adaptive_attention_scaling_forward(q, k, v, **rule)
    np.testing.assert_allclose(
        cache.factor[:, 0], np.log(np.arange(1, 7)) / math.log(3), rtol=1e-15
    )
    for t in range(6):
        alone, _ = adaptive_attention_scaling_forward(
            q[t : t + 1], k[: t + 1], v[: t + 1], n_train=3.0
        )
        np.testing.assert_allclose(alone[0], out[t], rtol=0, atol=1e-15)
    fixed, _ = adaptive_attention_scaling_forward(q, k, v, **(rule | {"count": "all"}))
    np.testing.assert_allclose(fixed[5], out[5], rtol=0, atol=1e-15)
    assert np.max(np.abs(fixed[1] - out[1])) > 1e-3


def test_one_key_takes_all_and_no_key_counts_as_one():
    q, k, v = np.random.default_rng(2).standard_normal((3, 1, 4))
    for count in ("all", "visible"):
        out, cache = adaptive_attention_scaling_forward(q, k, v, n_train=9, count=count)
        np.testing.assert_array_equal(out, v)
        assert np.all(np.asarray(cache.factor) == 0)
        out, cache = adaptive_attention_scaling_forward(q, k[:0], v[:0], count=count)
        assert not np.any(out) and np.all(np.asarray(cache.factor) == 0)


def test_more_hidden_keys_sharpen_all_and_leave_visible_alone():
    q, k, v = np.random.default_rng(3).standard_normal((3, 5, 4))
    longer = [np.concatenate([a, np.zeros((20, 4))]) for a in (k, v)]
    mask = np.arange(25) < 5
    sharp = {}
    for count in ("all", "visible"):
        rule = {"n_train": 5, "count": count}
        short, cache = adaptive_attention_scaling_forward(q, k, v, **rule)
        padded, wide = adaptive_attention_scaling_forward(q, *longer, mask=mask, **rule)
        sharp[count] = np.min(wide.p.max(-1) - cache.p.max(-1))
        assert (count == "visible") == np.allclose(padded, short, rtol=0, atol=1e-14)
    assert sharp["all"] > 0


def test_the_softcap_bounds_the_stretched_scores():
    """Before the bias, after the factor."""
    given = board() | {"softcap": 0.5, "q": np.array([[1e3]])}
    _, cache = adaptive_attention_scaling_forward(**given)
    np.testing.assert_allclose(cache.capped, [[0.5, 0, 0, 0]], rtol=0, atol=1e-15)
    given = board() | {"softcap": 1.0, "bias": np.array([[0.0, 7.0, 0.0, 0.0]])}
    _, cache = adaptive_attention_scaling_forward(**given)
    z = math.tanh(2 * math.log(3))
    np.testing.assert_allclose(cache.lse, math.log(math.exp(z) + math.exp(7) + 2), rtol=1e-15)


def test_non_finite_bias_poisons_its_row():
    kwargs = cases(SPEC)["bias"]
    bias = kwargs["bias"].copy()
    bias[1, 2, 3] = np.nan
    clean, _ = adaptive_attention_scaling_forward(**kwargs)
    out, cache = adaptive_attention_scaling_forward(**(kwargs | {"bias": bias}))
    assert np.all(np.isnan(out[1, 2])) and np.sum(np.isnan(out)) == 3
    assert np.isnan(cache.lse[1, 2]) and np.sum(np.isnan(cache.lse)) == 1
    np.testing.assert_array_equal(out[0], clean[0])
    g = adaptive_attention_scaling_backward(np.ones_like(out), cache)
    assert not np.any(g["q"][1, 2]) and not np.any(g["bias"][1, 2])


def test_frustum_code_by_hand():
    """C = 4: angles r x and r x / 100; x = pi/8 and r = 4 give pi/2 and pi/200."""
    out, cache = frustum_position_forward(np.array([[math.pi / 8, 0.0]]), 4)
    angle = math.pi / 200
    np.testing.assert_allclose(
        out, [[1.0, 0.0, math.sin(angle), math.cos(angle), 0.0, 1.0, 0.0, 1.0]], rtol=0, atol=1e-15
    )
    g = frustum_position_backward(np.arange(8.0)[None], cache)["x"]
    first = -4.0 + 0.04 * (2 * math.cos(angle) - 3 * math.sin(angle))
    np.testing.assert_allclose(g, [[first, 4 * 4 + 0.04 * 6]], rtol=1e-14)


def test_frustum_code_equals_a_slow_loop_and_its_complex_step():
    x = np.random.default_rng(4).random((2, 5, 3))
    out, cache = frustum_position_forward(x, 6, rescale=2.5)
    assert out.shape == (2, 5, 18) and out.dtype == np.float64
    for b, n, axis, c in np.ndindex(2, 5, 3, 6):
        angle = 2.5 * float(x[b, n, axis]) * 10000.0 ** (-2 * (c // 2) / 6)
        want = math.cos(angle) if c % 2 else math.sin(angle)
        assert abs(out[b, n, 6 * axis + c] - want) < 1e-15
    dout = np.random.default_rng(5).standard_normal(out.shape)
    g = frustum_position_backward(dout, cache)["x"]
    with engine.complex_step():
        for place in np.ndindex(*x.shape):
            z = x.astype(complex)
            z[place] += 1e-30j
            moved, _ = frustum_position_forward(z, 6, rescale=2.5)
            assert abs(np.sum(dout * moved.imag) / 1e-30 - g[place]) < 1e-13
    single, _ = frustum_position_forward(x.astype(np.float32), 6)
    assert single.dtype == np.float32


def test_frustum_code_depends_on_differences_only():
    """The product of two codes is a function of the distance along each axis."""
    x = np.random.default_rng(6).random((4, 3))
    here, _ = frustum_position_forward(x, 8)
    there, _ = frustum_position_forward(x + np.array([0.3, -0.2, 0.1]), 8)
    np.testing.assert_allclose(here @ here.T, there @ there.T, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"width": 5}, core.errors.ParameterError, "width is 5, expected an even number"),
        ({"width": 0}, core.errors.ParameterError, "width is 0, expected an integer 2 <= width"),
        ({"rescale": math.inf}, core.errors.ParameterError, "rescale is inf"),
        ({"x": np.ones(3)}, core.errors.ShapeError, r"x has shape \(3,\)"),
        ({"x": [[0.0]]}, core.errors.DTypeError, "x is a list"),
    ],
)
def test_frustum_errors(change, error, says):
    with pytest.raises(error, match=says):
        frustum_position_forward(**({"x": np.ones((2, 3)), "width": 4} | change))


def test_foreign_cotangents_are_refused():
    _, cache = frustum_position_forward(np.ones((2, 3)), 4)
    with pytest.raises(core.errors.ShapeError, match="dout has shape"):
        frustum_position_backward(np.ones((2, 13)), cache)
    out, cache = adaptive_attention_scaling_forward(**cases(SPEC)["plain"])
    with pytest.raises(core.errors.ShapeError, match="dout has shape"):
        adaptive_attention_scaling_backward(out[0], cache)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"n_train": 1}, core.errors.ParameterError, "n_train is 1, expected .* 1 < n_train"),
        ({"n_train": math.nan}, core.errors.ParameterError, "n_train is nan"),
        ({"n_train": np.ones(2)}, core.errors.ParameterError, "expected a real number tokens"),
        ({"count": "seen"}, core.errors.ParameterError, "count is 'seen', expected one of"),
        ({"softcap": 0.0}, core.errors.ParameterError, "softcap is 0.0, expected"),
        ({"k": np.ones((2, 6, 3))}, core.errors.ShapeError, "k has D = 3"),
    ],
)
def test_errors_name_argument_and_expectation(change, error, says):
    with pytest.raises(error, match=says):
        adaptive_attention_scaling_forward(**(cases(SPEC)["plain"] | change))


@pytest.mark.oracle
@pytest.mark.parametrize("n", [5, 12, 700])
def test_pytorch_agrees(n):
    """scaled_dot_product_attention with the official factor, math.log with a base."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")
    rng = np.random.default_rng(n)
    given = {name: rng.standard_normal((2, 3, n, 4)) for name in "qkv"}
    dout = rng.standard_normal((2, 3, n, 4))
    tensors = {name: torch.tensor(a, requires_grad=True) for name, a in given.items()}
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *tensors.values(), scale=4**-0.5 * math.log(n, 762)
    )
    theirs.backward(torch.tensor(dout))
    out, cache = adaptive_attention_scaling_forward(**given, n_train=762)
    np.testing.assert_allclose(out, theirs.detach().numpy(), rtol=0, atol=1e-14)
    for name, g in adaptive_attention_scaling_backward(dout, cache).items():
        np.testing.assert_allclose(g, tensors[name].grad.numpy(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("count", ["all", "visible"])
def test_the_compiled_path_over_several_tiles(count, causal, masked):
    rng = np.random.default_rng(11)
    q, k, v = (rng.standard_normal((2, n, 6)) for n in (150, 300, 300))
    kwargs = {"q": q, "k": k, "v": v, "n_train": 40, "count": count, "causal": causal,
              "softcap": 2.0, "bias": rng.standard_normal(300)}  # fmt: skip
    if masked:
        kwargs |= {"mask": rng.random((2, 150, 300)) < 0.8, "align": "upper_left"}
    key = "normalizers/adaptive_attention_scaling"
    out, cache = attention_ref.run(key, **kwargs)
    fast, mine = attention_ref.run(key, **kwargs, backend="numba")
    dout = rng.standard_normal(out.shape)
    want, got = SPEC.backward(dout, cache), SPEC.numba.backward(dout, mine)
    assert set(got) == set(want)
    np.testing.assert_allclose(fast, out, rtol=0, atol=1e-13)
    for name, dx in want.items():
        np.testing.assert_allclose(got[name], dx, rtol=0, atol=1e-13 * np.abs(dx).max())


def test_the_compiled_path_where_rows_see_one_key_or_are_not_finite():
    rng = np.random.default_rng(12)
    kwargs = {"q": rng.standard_normal((1, 5, 4)), "k": rng.standard_normal((2, 4, 4)),
              "v": rng.standard_normal((2, 4, 3)), "n_train": 3, "count": "visible",
              "causal": True}  # fmt: skip
    kwargs["q"][0, 1], kwargs["k"][1, 3] = np.inf, np.nan
    out, cache = adaptive_attention_scaling_forward(**kwargs)
    fast, mine = SPEC.numba.forward(**kwargs)
    np.testing.assert_allclose(fast, out, rtol=0, atol=1e-14)
    dout = rng.standard_normal(out.shape)
    got = SPEC.numba.backward(dout, mine)
    for name, dx in adaptive_attention_scaling_backward(dout, cache).items():
        np.testing.assert_allclose(got[name], dx, rtol=0, atol=1e-13, err_msg=name)
