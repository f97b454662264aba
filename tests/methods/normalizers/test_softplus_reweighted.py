"""Re-weighted softplus attention: slow loop, worked example, identities, limits, oracle."""

import math

import numpy as np
import pytest

import attention_ref
from attention_ref import core, engine
from attention_ref.kit.checks import cases
from attention_ref.methods.normalizers.softplus_reweighted import (
    softplus_reweighted_backward,
    softplus_reweighted_forward,
)

SPEC = attention_ref.get("normalizers/softplus_reweighted")


EQUIVALENT = {
    "reweight_forward: top < FLAT  ->  top <= FLAT": "equality to the last bit does not occur",
    "reweight_forward: 1.0  ->  2.0": "in even rows nothing that it divides is used",
    "reweight_forward: 1.0  ->  2.0 (2)": "likewise",
    "softplus_reweighted_forward: 1.0  ->  2.0 (3)": "divides the zeros of a row without keys",
}


def slow_softplus_reweighted(
    q, k, v, power=3.0, few=3, mask=None, causal=False, align="lower_right", scale=None
):
    """One row at a time, with lists."""
    lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    T, D, S, E = q.shape[-2], q.shape[-1], k.shape[-2], v.shape[-1]
    q = np.broadcast_to(q, (*lead, T, D))
    k = np.broadcast_to(k, (*lead, S, D))
    v = np.broadcast_to(v, (*lead, S, E))
    mask = None if mask is None else np.broadcast_to(mask, (*lead, T, S))
    first = S - T if align == "lower_right" else 0
    out = np.zeros((*lead, T, E))
    for place in np.ndindex(*lead):
        for t in range(T):
            seen = [s for s in range(S) if mask is None or mask[place][t, s]]
            seen = [s for s in seen if not causal or s <= t + first]
            N, positive = len(seen), []
            for s in seen:
                dot = math.fsum(float(q[place][t, d]) * float(k[place][s, d]) for d in range(D))
                cosine = dot / math.hypot(*q[place][t]) / math.hypot(*k[place][s])
                c = math.log(D) if scale is None else scale
                positive.append(math.log1p(math.exp(c * math.log(N) * cosine)))
            weight = [x / math.fsum(positive) for x in positive]
            if power is not None:
                r = [max(N * a - (1 if few < N else 0), 0.0) ** power for a in weight]
                weight = [x / math.fsum(r) for x in r]
            for e in range(E):
                out[place][t, e] = math.fsum(
                    w * float(v[place][s, e]) for w, s in zip(weight, seen, strict=True)
                )
    return out


@pytest.mark.parametrize("case", cases(SPEC))
def test_equals_the_slow_loop(case):
    kwargs = cases(SPEC)[case]
    out, _ = softplus_reweighted_forward(**kwargs)
    np.testing.assert_allclose(out, slow_softplus_reweighted(**kwargs), rtol=0, atol=2e-14)


# ------------------------------------------------------------------------------ worked example

FOUR = {
    "q": np.array([[2.0, 0.0]]),
    "k": np.array([[5.0, 0.0], [0.0, 1.0], [0.0, 2.0], [0.0, -3.0]]),
    "v": np.array([[8.0], [0.0], [16.0], [-8.0]]),
    "scale": math.log(7.0) / math.log(4.0),
}
"""z = (ln 7, 0, 0, 0): softplus 3 ln 2 and three times ln 2, a = (1/2, 1/6, 1/6, 1/6)."""


def test_worked_example_lssa():
    """Without (4): out = 4 + 16/6 - 8/6 = 16/3; ds = (v - out) / (6 ln 2), slope at ln 7 is 7/8."""
    out, cache = softplus_reweighted_forward(**FOUR, power=None)
    np.testing.assert_allclose(cache.a, [[1 / 2, 1 / 6, 1 / 6, 1 / 6]], rtol=1e-15)
    np.testing.assert_allclose(out, [[16 / 3]], rtol=1e-14)
    assert cache.count.item() == 4.0 and cache.u is None
    g = softplus_reweighted_backward(np.ones((1, 1)), cache)
    ds = (FOUR["v"][:, 0] - 16 / 3) / (6 * math.log(2.0))
    dz = ds * [7 / 8, 1 / 2, 1 / 2, 1 / 2] * math.log(7.0)
    np.testing.assert_allclose(g["q"], [[0.0, (dz[1] + dz[2] - dz[3]) / 2]], atol=1e-14)
    want = [[0.0, 0.0], [dz[1], 0.0], [dz[2] / 2, 0.0], [dz[3] / 3, 0.0]]
    np.testing.assert_allclose(g["k"], want, atol=1e-14)
    np.testing.assert_allclose(g["v"][:, 0], [1 / 2, 1 / 6, 1 / 6, 1 / 6], rtol=1e-15)


def test_worked_example_lssar():
    """N a = (2, 2/3, 2/3, 2/3): one key is above 1 and takes all; with few = 4 it is 27 to 1."""
    out, cache = softplus_reweighted_forward(**FOUR)
    np.testing.assert_allclose(cache.p, [[1.0, 0.0, 0.0, 0.0]], atol=1e-15)
    np.testing.assert_allclose(out, [[8.0]], rtol=1e-15)
    out, cache = softplus_reweighted_forward(**FOUR, few=4)
    np.testing.assert_allclose(cache.p, [[0.9, 1 / 30, 1 / 30, 1 / 30]], rtol=1e-14)
    np.testing.assert_allclose(out, [[7.2 + 8 / 30]], rtol=1e-14)
    np.testing.assert_allclose(cache.u, [[1.0, 1 / 3, 1 / 3, 1 / 3]], rtol=1e-15)
    np.testing.assert_allclose(cache.slope, [[3 / (2 * 10 / 9)]], rtol=1e-14)
    g = softplus_reweighted_backward(np.ones((1, 1)), cache)
    out = out.item()
    da = 4 * 1.35 * np.array([1.0, 1 / 9, 1 / 9, 1 / 9]) * (FOUR["v"][:, 0] - out)
    ds = (da - np.sum(cache.a[0] * da)) / (6 * math.log(2.0))
    dz = ds * [7 / 8, 1 / 2, 1 / 2, 1 / 2] * math.log(7.0)
    np.testing.assert_allclose(g["q"], [[0.0, (dz[1] + dz[2] - dz[3]) / 2]], atol=1e-13)


# ------------------------------------------------------------------------------ identities


@pytest.mark.parametrize("case", cases(SPEC))
def test_both_stages_are_rows_of_weights(case):
    """N a has the mean 1; (4) keeps exactly what is above it, in rows of more than few keys."""
    kwargs = cases(SPEC)[case]
    _, cache = softplus_reweighted_forward(**kwargs)
    count = np.broadcast_to(cache.count, (*cache.a.shape[:-1], 1))
    alive = np.where(count[..., 0] > 0, 1.0, 0.0)
    for rows in (cache.a, cache.p):
        np.testing.assert_allclose(np.sum(rows, axis=-1), alive, rtol=0, atol=1e-14)
    if kwargs["power"] is not None:
        many = count > kwargs.get("few", 3)
        seen = np.broadcast_to(cache.live, cache.a.shape)
        want = np.where(many, cache.a * count > 1.0, seen)
        np.testing.assert_array_equal(cache.p > 0, want)
        assert np.any(want) and np.any(~want & seen)


def test_lengths_do_not_count():
    kwargs = cases(SPEC)["mask"]
    out, cache = softplus_reweighted_forward(**kwargs)
    for size in (1e-3, 1e5):
        moved = kwargs | {n: size * kwargs[n] for n in "qk"}
        found, _ = softplus_reweighted_forward(**moved)
        np.testing.assert_allclose(found, out, rtol=0, atol=1e-13)
    g = softplus_reweighted_backward(np.random.default_rng(0).standard_normal(out.shape), cache)
    for name in "qk":
        assert np.max(np.abs(np.sum(g[name] * kwargs[name], axis=-1))) < 1e-13
        assert np.max(np.abs(g[name])) > 1e-2


def test_power_one_without_an_offset_is_the_first_stage():
    kwargs = cases(SPEC)["causal"] | {"power": 1.0, "few": 7}
    out, cache = softplus_reweighted_forward(**kwargs)
    want, first = softplus_reweighted_forward(**(kwargs | {"power": None}))
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-14)
    dout = np.random.default_rng(1).standard_normal(out.shape)
    g = softplus_reweighted_backward(dout, cache)
    h = softplus_reweighted_backward(dout, first)
    for name in "qkv":
        np.testing.assert_allclose(g[name], h[name], rtol=0, atol=1e-13)


def test_power_one_sends_nothing_to_what_it_drops():
    """u^0 is 1 also where u is 0, but a key below average stays without gradient."""
    kwargs = cases(SPEC)["plain"] | {"power": 1.0}
    out, cache = softplus_reweighted_forward(**kwargs)
    dout = np.random.default_rng(7).standard_normal(out.shape)
    g = softplus_reweighted_backward(dout, cache)
    found = engine.complex_gradient(
        lambda q, k: softplus_reweighted_forward(**(kwargs | {"q": q, "k": k}))[0],
        {n: kwargs[n] for n in "qk"}, dout,
    )  # fmt: skip
    for name in "qk":
        np.testing.assert_allclose(g[name], found[name], rtol=0, atol=1e-13)


def test_a_large_power_picks_the_nearest_key():
    kwargs = cases(SPEC)["plain"]
    with np.errstate(all="raise", under="ignore"):
        out, cache = softplus_reweighted_forward(**(kwargs | {"power": 1e6}))
    nearest = np.argmax(cache.z, axis=-1)
    np.testing.assert_array_equal(out, np.take_along_axis(kwargs["v"], nearest[..., None], -2))
    ratio = []
    for power in (15.0, 30.0):
        _, cache = softplus_reweighted_forward(**(kwargs | {"power": power}))
        second, first = np.moveaxis(np.sort(cache.p, axis=-1)[..., -2:], -1, 0)
        ratio.append(second / first)
    np.testing.assert_allclose(ratio[1], ratio[0] ** 2, rtol=1e-10)  # (u^15)^2


def test_exp_in_place_of_softplus_far_below_zero():
    """Where all scores are far below 0, softplus is exp: (3) is a softmax of z."""
    q, k = np.array([[1.0, 0.0, 0.0]]), -np.ones((6, 3))
    k[:, 1] = np.arange(6) * 0.1
    v = np.random.default_rng(2).standard_normal((6, 2))
    out, cache = softplus_reweighted_forward(q, k, v, power=None, scale=40.0)
    assert np.max(cache.z) < -30
    e = np.exp(cache.z - np.max(cache.z))
    np.testing.assert_allclose(out, e / np.sum(e) @ v, rtol=1e-12)


def test_first_rows_of_a_causal_model():
    """Row 1 is its own value; rows 2 and 3 drop no key; row 4 drops what is below average."""
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal((6, 4)) for _ in range(3))
    out, cache = softplus_reweighted_forward(q, k, v, causal=True, scale=2.0)
    np.testing.assert_array_equal(out[0], v[0])
    assert cache.z[0, 0] == 0.0 and np.all(cache.p[np.tril_indices(3)] > 0)
    assert all(np.any(cache.p[t, : t + 1] == 0) for t in (3, 4, 5))
    np.testing.assert_array_equal(cache.count[:, 0], [1, 2, 3, 4, 5, 6])
    np.testing.assert_allclose(cache.factor[:, 0], 2.0 * np.log([1, 2, 3, 4, 5, 6]), rtol=1e-15)


def test_defaults():
    kwargs = {n: a for n, a in cases(SPEC)["no-heads"].items() if n in "qkv"}
    out, cache = softplus_reweighted_forward(**kwargs)
    given = {"power": 3.0, "few": 3, "scale": math.log(4.0)}
    np.testing.assert_array_equal(out, softplus_reweighted_forward(**kwargs, **given)[0])
    np.testing.assert_allclose(cache.factor, math.log(4.0) * math.log(7.0), rtol=1e-15)


# ------------------------------------------------------------------------------ special values


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("power", [3.0, 15.0, None])
def test_equal_scores_stay_even(dtype, power):
    """Equal keys, and a zero query: no noise is divided by noise, forward or backward."""
    rng = np.random.default_rng(4)
    q = rng.standard_normal((5, 4)).astype(dtype)
    k = np.repeat(rng.standard_normal((1, 4)), 7, axis=0).astype(dtype)
    k *= np.arange(1, 8, dtype=dtype)[:, None]
    v = rng.standard_normal((7, 3)).astype(dtype)
    out, cache = softplus_reweighted_forward(q, k, v, power=power)
    np.testing.assert_allclose(cache.p, 1 / 7, rtol=1e-5)
    g = softplus_reweighted_backward(np.ones_like(out), cache)
    assert max(np.max(np.abs(a)) for a in g.values()) < 10
    other = rng.standard_normal((7, 4)).astype(dtype)
    q[2] = 0.0
    with np.errstate(all="raise", under="ignore"):
        out, cache = softplus_reweighted_forward(q, other, v, power=power)
        g = softplus_reweighted_backward(np.ones_like(out), cache)
    np.testing.assert_allclose(cache.p[2], 1 / 7, rtol=1e-6)
    assert np.all(np.isfinite(g["q"])) and cache.lengths[0][2, 0] == 1.0
    assert np.ptp(cache.p[1]) > 0.1


def test_an_even_row_hands_its_gradient_to_the_first_stage():
    kwargs = {"q": np.ones((1, 2)), "k": np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 3.0], [2.0, 0.0]])}
    kwargs["v"] = np.array([[1.0], [2.0], [3.0], [4.0]])
    _, cache = softplus_reweighted_forward(**kwargs)
    assert cache.slope.item() == 0.0
    g = softplus_reweighted_backward(np.ones((1, 1)), cache)
    _, first = softplus_reweighted_forward(**kwargs, power=None)
    for name, a in softplus_reweighted_backward(np.ones((1, 1)), first).items():
        np.testing.assert_array_equal(g[name], a)
    assert np.any(g["k"])


def test_the_threshold_of_even_rows():
    """Largest N a - 1 of 2e-5 is sharpened, of 5e-6 is not."""
    q, v = np.array([[1.0, 0.0]]), np.arange(4.0)[:, None]
    for size, sharp in ((2e-5, True), (5e-6, False)):
        angle = size * 2 * math.log(2.0) / math.log(4.0) * np.array([1.0, -1.0, 1.0, -1.0])
        k = np.stack([np.sin(angle), np.cos(angle)], axis=-1)
        _, cache = softplus_reweighted_forward(q, k, v, scale=1.0)
        np.testing.assert_allclose(4 * np.max(cache.a) - 1, size, rtol=1e-3)
        np.testing.assert_array_equal(cache.p == 0, [[False, sharp, False, sharp]])


def test_a_long_row_in_float32_does_not_underflow():
    """r^15 spans more than 38 decimals; over its largest it does not matter."""
    rng = np.random.default_rng(5)
    k = rng.standard_normal((4096, 64)).astype(np.float32)
    q = k[:1] + 0.1 * rng.standard_normal((1, 64)).astype(np.float32)
    v = np.eye(4096, 1, dtype=np.float32)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        out, cache = softplus_reweighted_forward(q, k, v, power=15.0)
        softplus_reweighted_backward(np.ones_like(out), cache)
    assert out[0, 0] > 0.999 and np.max(cache.count * cache.a) > 15


def test_empty_rows_and_their_options():
    kwargs = cases(SPEC)["plain"]
    mask = np.ones((5, 6), bool)
    mask[2] = False
    mask[3, 1:] = False  # one key
    for power in (3.0, None):
        given = kwargs | {"power": power, "mask": mask}
        base, cache = softplus_reweighted_forward(**given)
        assert not np.any(cache.p[:, 2]) and not np.any(cache.a[:, 2])
        out, cache = softplus_reweighted_forward(**given, empty_row="uniform")
        np.testing.assert_allclose(out[:, 2], np.mean(kwargs["v"], axis=-2), rtol=1e-13)
        base[:, 2] = out[:, 2]
        np.testing.assert_array_equal(out, base)
        np.testing.assert_array_equal(out[:, 3], kwargs["v"][:, 0])
        g = softplus_reweighted_backward(np.ones_like(out), cache)
        assert not np.any(g["q"][:, 2])
    single = {n: kwargs[n][:, :1] for n in "kv"} | {"q": kwargs["q"], "mask": mask[:, :1]}
    out, _ = softplus_reweighted_forward(**single, empty_row="uniform")
    np.testing.assert_array_equal(out, np.broadcast_to(single["v"], out.shape))


def test_leading_axes_broadcast():
    one = {n: cases(SPEC)["no-heads"][n] for n in "qkv"}
    for name in "qkv":
        kwargs = one | {name: np.stack([one[name], 1.5 * one[name] - 0.5])}
        out, cache = softplus_reweighted_forward(**kwargs)
        dout = np.random.default_rng(6).standard_normal(out.shape)
        found = engine.vjp(softplus_first, kwargs)[1](dout)
        g = softplus_reweighted_backward(dout, cache)
        assert out.shape == (2, 5, 3)
        for argument, a in g.items():
            assert a.shape == kwargs[argument].shape
            np.testing.assert_allclose(a, found[argument], rtol=0, atol=1e-11)


def softplus_first(q, k, v):
    """The output alone, for the tape."""
    return softplus_reweighted_forward(q, k, v)[0]


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"power": 0.5}, "Parameter", "power is 0.5"),
        ({"power": np.inf}, "Parameter", "power is inf"),
        ({"few": 0}, "Parameter", "few is 0"),
        ({"few": 2.5}, "Parameter", "few is 2.5"),
        ({"scale": np.nan}, "Parameter", "scale is nan"),
        ({"align": "left"}, "Parameter", "align is 'left'"),
        ({"k": np.ones((2, 6, 3))}, "Shape", "k has D = 3"),
    ],
)
def test_errors(change, error, says):
    with pytest.raises(getattr(core.errors, error + "Error"), match=says):
        softplus_reweighted_forward(**(cases(SPEC)["plain"] | change))


def test_backward_refuses_another_shape():
    out, cache = softplus_reweighted_forward(**cases(SPEC)["plain"])
    with pytest.raises(core.errors.ShapeError, match="dout has shape"):
        softplus_reweighted_backward(out[0], cache)


@pytest.mark.oracle
@pytest.mark.parametrize("case", cases(SPEC))
def test_pytorch_agrees(case):
    """Its normalize, softplus and relu; gradients by autograd."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")
    F = torch.nn.functional
    kwargs = cases(SPEC)[case]
    out, cache = softplus_reweighted_forward(**kwargs)
    dout = np.random.default_rng(5).standard_normal(out.shape)
    mine = softplus_reweighted_backward(dout, cache)
    x = {n: torch.tensor(kwargs[n], requires_grad=True) for n in "qkv"}
    rule = {n: kwargs[n] for n in ("mask", "causal", "align") if n in kwargs}
    live = torch.tensor(np.array(core.visible(kwargs["q"], kwargs["k"], **rule)))
    count = live.double().sum(-1, keepdim=True)
    c = kwargs.get("scale", math.log(kwargs["q"].shape[-1])) * count.clamp(min=1).log()
    z = c * (F.normalize(x["q"], dim=-1) @ F.normalize(x["k"], dim=-1).mT)
    p = F.normalize(F.softplus(z) * live, p=1.0, dim=-1)
    if kwargs["power"] is not None:
        r = F.relu(count * p - (count > kwargs.get("few", 3)).double()) * live
        p = F.normalize(r ** kwargs["power"], p=1.0, dim=-1)
    theirs = p @ x["v"]
    theirs.backward(torch.tensor(dout))
    np.testing.assert_allclose(out, theirs.detach().numpy(), rtol=0, atol=2e-14)
    for name, g in mine.items():
        np.testing.assert_allclose(g, x[name].grad.numpy(), rtol=0, atol=2e-13)
