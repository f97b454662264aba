"""Rotary positions: slow loop, worked example, frequencies, identities, limits, oracle."""

import math

import numpy as np
import pytest

import attention_ref
from attention_ref import core
from attention_ref.kit.checks import cases
from attention_ref.methods.scores.rotary import (
    rotary_backward,
    rotary_forward,
    rotary_frequencies,
)

SPEC = attention_ref.get("scores/rotary")
DOT = attention_ref.get("scores/dot_product")


def slow_rotary(
    q, k, v, pos_q=None, pos_k=None, base=10000.0, R=None, interleaved=False, scaling=None, s=1.0,
    L=None, beta_fast=32.0, beta_slow=1.0, truncate=True, mask=None, causal=False,
    align="lower_right", scale=None, softcap=None, bias=None,
):  # fmt: skip
    """One number at a time; a score is written with the difference of the two angles."""
    lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    T, D, S, E = q.shape[-2], q.shape[-1], k.shape[-2], v.shape[-1]
    R = D if R is None else R
    first = S - T if align == "lower_right" else 0
    pos_q = np.array([t + first for t in range(T)]) if pos_q is None else pos_q
    pos_k = np.array(range(S)) if pos_k is None else pos_k
    q = np.broadcast_to(q, (*lead, T, D))
    k = np.broadcast_to(k, (*lead, S, D))
    v = np.broadcast_to(v, (*lead, S, E))
    pos_q, pos_k = np.broadcast_to(pos_q, (*lead, T)), np.broadcast_to(pos_k, (*lead, S))
    mask = None if mask is None else np.broadcast_to(mask, (*lead, T, S))
    bias = None if bias is None else np.broadcast_to(bias, (*lead, T, S))
    c = 1.0 / math.sqrt(D) if scale is None else scale
    omega, pairs, grow = [], [], 1.0
    for i in range(R // 2):
        w = 1.0 / base ** (2.0 * i / R)
        if scaling == "linear":
            w = w / s
        if scaling == "ntk":
            w = 1.0 / (base * s ** (R / (R - 2.0))) ** (2.0 * i / R)
        if scaling == "yarn":
            ends = [R / 2.0 * math.log(L / (b * 2.0 * math.pi), base)
                    for b in (beta_fast, beta_slow)]  # fmt: skip
            ends = [math.floor(ends[0]), math.ceil(ends[1])] if truncate else ends
            low, high = max(ends[0], 0), min(ends[1], R - 1)
            part = min(1.0, max(0.0, (i - low) / (high - low)))
            w = w * ((1.0 - part) + part / s)
            grow = (1.0 + math.log(s) / 10.0) ** 2
        omega += [w]
        pairs += [(2 * i, 2 * i + 1) if interleaved else (i, i + R // 2)]
    out = np.zeros((*lead, T, E))
    for place in np.ndindex(*lead):
        for t in range(T):
            weight = {}
            for u in range(S):
                if causal and u > t + first:
                    continue
                if mask is not None and not mask[place][t, u]:
                    continue
                x, y = q[place][t], k[place][u]
                z = math.fsum(float(x[d]) * float(y[d]) for d in range(R, D))
                for w, (i, j) in zip(omega, pairs, strict=True):
                    a = (float(pos_q[place][t]) - float(pos_k[place][u])) * w
                    same = float(x[i]) * float(y[i]) + float(x[j]) * float(y[j])
                    cross = float(x[i]) * float(y[j]) - float(x[j]) * float(y[i])
                    z += grow * (same * math.cos(a) + cross * math.sin(a))
                z *= c
                if softcap is not None:
                    z = softcap * math.tanh(z / softcap)
                if bias is not None:
                    z += float(bias[place][t, u])
                weight[u] = math.exp(z)
            total = math.fsum(weight.values())
            for e in range(E):
                mixed = math.fsum(w * float(v[place][u, e]) for u, w in weight.items())
                out[place][t, e] = mixed / total if weight else 0.0
    return out


@pytest.mark.parametrize("case", cases(SPEC))
def test_equals_the_slow_loop(case):
    kwargs = cases(SPEC)[case]
    out, _ = rotary_forward(**kwargs)
    np.testing.assert_allclose(out, slow_rotary(**kwargs), rtol=0, atol=1e-14)


L3, ROOT3 = math.log(3.0), math.sqrt(3.0)
ROUND = {
    "q": np.array([[2 * L3, 0.0]]),
    "k": np.array([[1.0, 0.0], [1.0, 0.0]]),
    "v": np.array([[4.0], [8.0]]),
    "pos_q": np.array([0.0]),
    "pos_k": np.array([math.pi / 2, math.pi / 3]),
    "scale": 1.0,
}
"""One pair, frequency 1: equal keys at right angles to the query and at 60 degrees."""


def test_worked_example_forward():
    """Scores 2 ln 3 cos(90), 2 ln 3 cos(60) = 0, ln 3: weights 1/4 and 3/4, output 7."""
    out, cache = rotary_forward(**ROUND)
    np.testing.assert_allclose(cache.p, [[0.25, 0.75]], rtol=1e-15)
    np.testing.assert_allclose(out, [[7.0]], rtol=1e-15)
    np.testing.assert_allclose(cache.k, [[0, 1], [1 / 2, ROOT3 / 2]], atol=1e-15)
    np.testing.assert_allclose(cache.lse, [math.log(4.0)], rtol=1e-15)


def test_worked_example_backward():
    """dz = (-3/4, 3/4); z = 2 ln 3 cos(pos), so dpos = -2 ln 3 sin(pos) dz, and so on."""
    out, cache = rotary_forward(**ROUND)
    g = rotary_backward(np.ones_like(out), cache)
    np.testing.assert_allclose(g["v"], [[0.25], [0.75]], rtol=1e-15)
    dk = L3 * np.array([[0, 3 / 2], [3 / 4, -3 / 4 * ROOT3]])
    np.testing.assert_allclose(g["k"], dk, rtol=1e-14, atol=1e-15)
    np.testing.assert_allclose(g["q"], [[3 / 8, -3 / 4 + 3 / 8 * ROOT3]], rtol=1e-14)
    dpos = L3 * np.array([3 / 2, -3 / 4 * ROOT3])
    np.testing.assert_allclose(g["pos_k"], dpos, rtol=1e-14)
    np.testing.assert_allclose(g["pos_q"], [-dpos.sum()], rtol=1e-14)


def test_which_channels_are_pairs():
    """A quarter turn of the first pair, R = 4 of D = 5, base so large that the second stands."""
    x, v = np.array([[1.0, 2.0, 3.0, 4.0, 5.0]]), np.ones((1, 1))
    quarter = np.array([math.pi / 2])
    for interleaved, want in ((False, [-3, 2, 1, 4, 5]), (True, [-2, 1, 3, 4, 5])):
        _, c = rotary_forward(x, x, v, quarter, quarter, base=1e40, R=4, interleaved=interleaved)
        np.testing.assert_allclose(c.q, [want], atol=1e-14)
        np.testing.assert_allclose(c.k, [want], atol=1e-14)


def test_plain_frequencies_and_interpolation():
    """R = 4, base 16: 1 and 1/4. Linear by 2: half. NTK by 2: base 16 * 2^2 = 64: 1 and 1/8."""
    assert rotary_frequencies(4, 16.0) == ([1.0, 0.25], 1.0)
    assert rotary_frequencies(4, 16.0, "linear", 2.0) == ([0.5, 0.125], 1.0)
    assert rotary_frequencies(4, 16.0, "ntk", 2.0) == ([1.0, 0.125], 1.0)
    omega, mu = rotary_frequencies(2, 9.0, "yarn", 2.0, 1.0)  # low = high = 0 after clamping
    assert omega == [1.0] and math.isclose(mu, 0.1 * math.log(2.0) + 1.0)


def test_ntk_keeps_the_fastest_and_divides_the_slowest():
    plain, _ = rotary_frequencies(64)
    ntk, _ = rotary_frequencies(64, scaling="ntk", s=8.0)
    assert ntk[0] == plain[0]
    np.testing.assert_allclose(ntk[-1], plain[-1] / 8.0, rtol=1e-13)


def test_yarn_of_a_model_of_4096_positions():
    """R = 128, s = 4: low 20, high 46; 21 frequencies stay and 18 are divided by 4."""
    plain = np.array(rotary_frequencies(128)[0])
    omega, mu = rotary_frequencies(128, scaling="yarn", s=4.0, L=4096)
    ratio = plain / np.array(omega)
    assert np.sum(ratio == 1) == 21 and np.sum(np.isclose(ratio, 4, rtol=1e-12)) == 18
    np.testing.assert_allclose(1 / ratio[33], 1 / 2 + 1 / 8, rtol=1e-14)  # the middle of the ramp
    np.testing.assert_allclose(mu, 1.1386294361119891, rtol=1e-15)
    loose = plain / np.array(rotary_frequencies(128, scaling="yarn", s=4.0, L=4096,
                                                truncate=False)[0])  # fmt: skip
    assert np.sum(loose == 1) == 21 and np.sum(np.isclose(loose, 4, rtol=1e-12)) == 18
    low, high = (64 * math.log(4096 / (2 * math.pi * b)) / math.log(1e4) for b in (32, 1))
    np.testing.assert_allclose(1 / loose[33], 1 - 0.75 * (33 - low) / (high - low), rtol=1e-13)
    assert 20 < low < 21 and 45 < high < 46 and ratio[24] > 1.01 * loose[24]


def test_yarn_clamps_the_ramp():
    """Short training: low would be negative; long: high would lie beyond R - 1."""
    ratio = np.array(rotary_frequencies(8)[0])
    ratio = ratio / np.array(rotary_frequencies(8, scaling="yarn", s=2.0, L=7.0)[0])
    np.testing.assert_allclose(ratio, [1, 2, 2, 2], rtol=1e-14)
    ratio = np.array(rotary_frequencies(4, 2.0)[0])
    ratio = ratio / np.array(rotary_frequencies(4, 2.0, "yarn", 2.0, 1e3, 1e9)[0])
    np.testing.assert_allclose(ratio, [1, 6 / 5], rtol=1e-14)  # 1/3 of the way from 0 to R - 1 = 3


def test_scores_depend_on_differences_only():
    kwargs = cases(SPEC)["no-heads"]
    out, cache = rotary_forward(**kwargs)
    moved = kwargs | {n: kwargs[n] + 11.3 for n in ("pos_q", "pos_k")}
    np.testing.assert_allclose(rotary_forward(**moved)[0], out, rtol=0, atol=1e-14)
    g = rotary_backward(np.ones_like(out), cache)
    np.testing.assert_allclose(g["pos_q"].sum() + g["pos_k"].sum(), 0.0, atol=1e-14)


def test_default_positions_of_both_alignments():
    rng = np.random.default_rng(3)
    kwargs = core.examples.qkv(rng, D=6)
    places = np.arange(6.0)
    for align, first in (("lower_right", 1), ("upper_left", 0)):
        out, cache = rotary_forward(**kwargs, align=align)
        same, _ = rotary_forward(**kwargs, pos_q=places[first : first + 5], pos_k=places)
        np.testing.assert_array_equal(out, same)
        assert set(rotary_backward(np.ones_like(out), cache)) == {"q", "k", "v"}


def test_turning_keeps_the_norm_and_yarn_multiplies_it():
    kwargs = cases(SPEC)["no-heads"]
    for scaling, mu in ((None, 1.0), ("yarn", 0.1 * math.log(4.0) + 1.0)):
        _, cache = rotary_forward(**(kwargs | {"scaling": scaling}))
        for n in "qk":
            want = mu * np.linalg.norm(kwargs[n], axis=-1)
            np.testing.assert_allclose(np.linalg.norm(getattr(cache, n), axis=-1), want, rtol=1e-14)


def test_interleaved_is_halves_after_a_permutation():
    """Evens then odds: the same weights and outputs bit for bit."""
    kwargs = cases(SPEC)["mask"]
    order = np.array([0, 2, 4, 1, 3, 5])
    sorted_ = kwargs | {n: kwargs[n][..., order] for n in "qk"}
    _, a = rotary_forward(**(kwargs | {"interleaved": True}))
    _, b = rotary_forward(**sorted_)
    np.testing.assert_allclose(a.p, b.p, rtol=0, atol=1e-15)
    np.testing.assert_array_equal(a.q[..., order], b.q)


def test_without_extension_all_three_are_the_plain_map():
    kwargs = {n: a for n, a in cases(SPEC)["plain"].items() if n != "scaling"}
    out, _ = rotary_forward(**kwargs)
    for scaling in ("linear", "ntk", "yarn"):
        same, _ = rotary_forward(**kwargs, scaling=scaling, s=1.0, L=4.0)
        np.testing.assert_array_equal(same, out)


def test_all_positions_zero_is_dot_product_attention():
    rng = np.random.default_rng(6)
    kwargs = core.examples.qkv(rng)
    out, _ = rotary_forward(**kwargs, pos_q=np.zeros(5), pos_k=np.zeros(6))
    np.testing.assert_array_equal(out, DOT.forward(**kwargs)[0])


def test_defaults_of_the_extension():
    """s = 1, beta 32 and 1, rounded: named or not, the same; other values are not."""
    kwargs = cases(SPEC)["plain"]
    assert rotary_frequencies(8, scaling="linear") == rotary_frequencies(8)
    plain, _ = rotary_forward(**kwargs)
    np.testing.assert_array_equal(rotary_forward(**kwargs, scaling="linear")[0], plain)
    way = {"scaling": "yarn", "s": 4.0, "L": 1e3, "base": 30.0}
    named = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
    out, _ = rotary_forward(**kwargs, **way)
    np.testing.assert_array_equal(rotary_forward(**kwargs, **way, **named)[0], out)
    loose, _ = rotary_forward(**kwargs, **way, truncate=False)
    third, _ = rotary_forward(**kwargs, **way, truncate=False, beta_fast=33.0)
    assert not np.array_equal(loose, out) and not np.array_equal(loose, third)
    same, _ = rotary_forward(**kwargs, **way, truncate=False, beta_fast=32.0, beta_slow=1.0)
    np.testing.assert_array_equal(same, loose)


def test_channels_that_pass_under_positions_of_a_batch():
    """Positions have an axis that the queries have not, and only 4 of 6 channels turn."""
    kwargs = cases(SPEC)["no-heads"] | {"R": 4}
    pos = np.stack([kwargs["pos_k"], 2 * kwargs["pos_k"]])
    wide = kwargs | {"v": np.stack([kwargs["v"]] * 2), "pos_k": pos}
    out, cache = rotary_forward(**wide)
    np.testing.assert_array_equal(out[0], rotary_forward(**kwargs)[0])
    np.testing.assert_array_equal(cache.k[..., 4:], np.stack([kwargs["k"][:, 4:]] * 2))
    assert rotary_backward(out, cache)["pos_k"].shape == (2, 7)


def test_small_numbers_that_are_allowed():
    """Just above the ends of their intervals."""
    way = {"base": 1.5, "scaling": "yarn", "L": 0.5, "beta_fast": 0.4, "beta_slow": 0.3, "s": 1.0}
    out, _ = rotary_forward(**cases(SPEC)["plain"], **way)
    assert np.all(np.isfinite(out))


def test_position_interpolation_divides_the_positions():
    kwargs = cases(SPEC)["no-heads"] | {"scaling": "linear", "s": 4.0}
    near = kwargs | {"pos_q": kwargs["pos_q"] / 4, "pos_k": kwargs["pos_k"] / 4, "s": 1.0}
    np.testing.assert_allclose(
        rotary_forward(**kwargs)[0], rotary_forward(**near)[0], rtol=0, atol=1e-15
    )


@pytest.mark.parametrize("interleaved", [False, True])
def test_complex_multiplication(interleaved):
    """Another route: (x1 + i x2) e^(ia), and the score is the real part of q' times conj k'."""
    kwargs = cases(SPEC)["batch"] | {"interleaved": interleaved}
    _, cache = rotary_forward(**kwargs)
    omega = np.array(rotary_frequencies(6, 100.0, "yarn", 4.0, 200.0, 16.0, 1.5, False)[0])
    pair = (slice(0, 6, 2), slice(1, 6, 2)) if interleaved else (slice(0, 3), slice(3, 6))
    turned = {
        n: (kwargs[n][..., pair[0]] + 1j * kwargs[n][..., pair[1]])
        * np.exp(1j * kwargs[f"pos_{n}"][..., None] * omega)
        * (0.1 * math.log(4.0) + 1.0)
        for n in "qk"
    }
    z = 0.7 * np.real(turned["q"] @ np.conj(np.swapaxes(turned["k"], -1, -2)))
    np.testing.assert_allclose(cache.capped, z, rtol=0, atol=1e-14)


def test_queries_move_with_their_positions():
    kwargs = cases(SPEC)["long-queries"]
    order = np.random.default_rng(1).permutation(7)
    moved = kwargs | {"q": kwargs["q"][:, order], "pos_q": kwargs["pos_q"][..., order]}
    out, _ = rotary_forward(**kwargs)
    np.testing.assert_allclose(rotary_forward(**moved)[0], out[:, order], rtol=0, atol=1e-15)


def test_a_position_that_is_not_finite_is_a_token_that_is_not_finite():
    kwargs = cases(SPEC)["long-queries"]
    out, cache = rotary_forward(**kwargs)
    for name, place in (("pos_q", 2), ("pos_k", 1)):
        bad = kwargs[name].copy()
        bad[place] = np.inf
        found, broken = rotary_forward(**(kwargs | {name: bad}))
        rows = np.arange(7) == 2 if name == "pos_q" else np.ones(7, bool)
        assert np.all(np.isnan(found[:, rows]))
        np.testing.assert_array_equal(found[:, ~rows], out[:, ~rows])
        dout = np.random.default_rng(2).standard_normal(out.shape)
        g = rotary_backward(dout, broken)
        want = rotary_backward(np.where(rows[:, None], 0.0, dout), cache)
        for n in g:
            np.testing.assert_allclose(g[n], want[n], rtol=0, atol=1e-14)


def test_nan_in_a_live_bias_poisons_its_row_alone():
    kwargs = cases(SPEC)["bias"]
    bad = kwargs["bias"].copy()
    bad[1, 2, 3] = np.nan
    out, cache = rotary_forward(**(kwargs | {"bias": bad}))
    assert np.all(np.isnan(out[1, 2])) and np.sum(np.isnan(out)) == 3
    assert np.isnan(cache.lse[1, 2]) and np.sum(np.isnan(cache.lse)) == 1
    assert all(np.all(np.isfinite(g)) for g in rotary_backward(np.ones_like(out), cache).values())


def test_positions_of_their_own_for_each_member():
    """Leading axes of positions alone; queries without heads, values with a batch of their own."""
    kwargs = cases(SPEC)["batch"]
    rng = np.random.default_rng(4)
    pos = {"pos_q": rng.uniform(0, 7, (3, 1, 1)), "pos_k": rng.uniform(0, 7, (3, 2, 5))}
    q = kwargs["q"][0, 0]
    out, cache = rotary_forward(**(kwargs | pos | {"q": q}))
    g = rotary_backward(np.ones_like(out), cache)
    total = np.zeros_like(q)
    for b in range(3):
        one = kwargs | {n: kwargs[n][b] for n in "kv"}
        one |= {"q": q, "pos_q": pos["pos_q"][b], "pos_k": pos["pos_k"][b]}
        found, cache = rotary_forward(**one)
        np.testing.assert_allclose(found, out[b], rtol=0, atol=1e-15)
        h = rotary_backward(np.ones_like(found), cache)
        total += h["q"]
        for n in ("k", "v", "pos_q", "pos_k"):
            np.testing.assert_allclose(h[n], g[n][b], rtol=0, atol=1e-14)
    np.testing.assert_allclose(g["q"], total, rtol=0, atol=1e-14)
    values, cache = rotary_forward(kwargs["q"][0], kwargs["k"][0], kwargs["v"])
    assert rotary_backward(np.ones_like(values), cache)["v"].shape == kwargs["v"].shape


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"pos_q": np.ones(4)}, core.errors.ShapeError, r"pos_q has T = 4 .* expected 5"),
        ({"pos_k": np.ones((3, 6))}, core.errors.ShapeError, r"pos_k has leading axes \(3,\)"),
        ({"pos_k": np.ones((1, 1, 6))}, core.errors.ShapeError, r"pos_k has leading .* \(1, 2\)"),
        ({"pos_k": np.arange(6)}, core.errors.DTypeError, "pos_k has dtype int64"),
        ({"R": 3}, core.errors.ParameterError, "R is 3, expected an even"),
        ({"R": 8}, core.errors.ParameterError, "R is 8, expected an integer 2 <= R <= 6"),
        ({"R": 0}, core.errors.ParameterError, "R is 0"),
        ({"base": 1.0}, core.errors.ParameterError, "base is 1.0"),
        ({"s": 0.5}, core.errors.ParameterError, "s is 0.5"),
        ({"scaling": "NTK"}, core.errors.ParameterError, "scaling is 'NTK'"),
        ({"scaling": "yarn"}, core.errors.ParameterError, "L is None"),
        ({"scaling": "yarn", "L": 0.0}, core.errors.ParameterError, "L is 0.0"),
        ({"scaling": "ntk", "R": 2}, core.errors.ParameterError, "R is 2"),
        ({"beta_slow": 0.0}, core.errors.ParameterError, "beta_slow is 0.0"),
    ],
)
def test_errors_name_argument_and_expectation(change, error, says):
    with pytest.raises(error, match=says):
        rotary_forward(**(cases(SPEC)["plain"] | change))


def test_an_odd_width_needs_r():
    rng = np.random.default_rng(0)
    kwargs = core.examples.qkv(rng, D=5)
    with pytest.raises(core.errors.ParameterError, match="R is 5, expected an even"):
        rotary_forward(**kwargs)
    out, cache = rotary_forward(**kwargs, R=4)
    with pytest.raises(core.errors.ShapeError, match="dout has shape"):
        rotary_backward(out[0], cache)


@pytest.mark.oracle
@pytest.mark.parametrize("case", cases(SPEC))
def test_pytorch_agrees(case):
    """Turned by complex multiplication in PyTorch; every gradient, positions too, by autograd."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")
    kwargs = cases(SPEC)[case]
    out, cache = rotary_forward(**kwargs)
    dout = np.random.default_rng(5).standard_normal(out.shape)
    mine = rotary_backward(dout, cache)
    given = {n: torch.tensor(kwargs[n], requires_grad=True) for n in mine}
    T, S, D = kwargs["q"].shape[-2], kwargs["k"].shape[-2], 6
    first = S - T if kwargs.get("align", "lower_right") == "lower_right" else 0
    places = {"q": torch.arange(T) + first, "k": torch.arange(S)}
    names = ("base", "scaling", "s", "L", "beta_fast", "beta_slow", "truncate")
    R = kwargs.get("R", D)
    omega, mu = rotary_frequencies(R, **{n: kwargs[n] for n in names if n in kwargs})
    omega = torch.tensor(omega, dtype=torch.float64)

    def turned(n):
        x, pos = given[n], given.get(f"pos_{n}", places[n])
        if kwargs.get("interleaved"):
            parts = x[..., :R].reshape(*x.shape[:-1], R // 2, 2)
        else:
            parts = x[..., :R].reshape(*x.shape[:-1], 2, R // 2).transpose(-1, -2)
        number = torch.view_as_complex(parts.contiguous())
        angle = pos[..., None] * omega
        number = number * torch.polar(torch.full_like(angle, mu), angle)
        return torch.cat([number.real, number.imag, x[..., R:]], -1)

    z = kwargs.get("scale", D**-0.5) * turned("q") @ turned("k").transpose(-1, -2)
    if "softcap" in kwargs:
        z = kwargs["softcap"] * torch.tanh(z / kwargs["softcap"])
    z = z + given.get("bias", 0.0)
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
@pytest.mark.parametrize("ways", [{}, {"R": 4, "interleaved": True, "softcap": 1.5}])
def test_the_compiled_path_over_several_tiles(ways, causal):
    rng = np.random.default_rng(11)
    q, k, v = (rng.standard_normal((2, n, 6)) for n in (150, 300, 300))
    kwargs = {"q": q, "k": k, "v": v, "causal": causal, "bias": rng.standard_normal(300)} | ways
    if ways:
        kwargs |= {"pos_q": rng.uniform(0, 9, 150), "pos_k": rng.uniform(0, 9, (2, 300))}
    out, cache = attention_ref.run("scores/rotary", **kwargs)
    fast, mine = attention_ref.run("scores/rotary", **kwargs, backend="numba")
    dout = rng.standard_normal(out.shape)
    want, got = SPEC.backward(dout, cache), SPEC.numba.backward(dout, mine)
    assert set(got) == set(want)
    np.testing.assert_allclose(fast, out, rtol=0, atol=1e-13)
    for name, dx in want.items():
        np.testing.assert_allclose(got[name], dx, rtol=0, atol=1e-13 * np.abs(dx).max())


def test_the_compiled_path_with_broadcast_heads_and_numbers_that_are_not_finite():
    rng = np.random.default_rng(12)
    kwargs = {"q": rng.standard_normal((2, 5, 6)), "k": rng.standard_normal((1, 7, 6)),
              "v": rng.standard_normal((7, 3)), "pos_q": rng.uniform(0, 9, 5),
              "pos_k": rng.uniform(0, 9, (2, 7)), "causal": True, "R": 4}  # fmt: skip
    kwargs["q"][1, 2], kwargs["pos_q"][0], kwargs["pos_k"][0, 6] = np.inf, np.nan, np.inf
    kwargs["k"][0, 5, 1] = -np.inf
    out, cache = rotary_forward(**kwargs)
    fast, mine = SPEC.numba.forward(**kwargs)
    np.testing.assert_allclose(fast, out, rtol=0, atol=1e-14)
    dout = rng.standard_normal(out.shape)
    got = SPEC.numba.backward(dout, mine)
    for name, dx in rotary_backward(dout, cache).items():
        np.testing.assert_allclose(got[name], dx, rtol=0, atol=1e-13, err_msg=name)
