"""Learned sparsity and monotonic alignment: slow loops, worked examples, limits, oracles."""

import math

import numpy as np
import pytest

import attention_ref
from attention_ref import core
from attention_ref.kit.checks import cases
from attention_ref.methods.normalizers.adaptive_sparse_monotonic import (
    adaptive_sparse_monotonic_backward,
    adaptive_sparse_monotonic_forward,
    head_drop,
)

SPEC = attention_ref.get("normalizers/adaptive_sparse_monotonic")
SPARSE = [name for name, kwargs in cases(SPEC).items() if "a" in kwargs]
RUNS = [name for name in cases(SPEC) if name not in SPARSE]


def slow_adaptive_sparse_monotonic(
    q, k, v, a=None, r=None, mask=None, causal=False, align="lower_right", scale=None
):  # fmt: skip
    """Sparse by bisection in scalars; monotonic as a sum over the places where a run began."""
    lead, (T, D), (S, E) = q.shape[:-2], q.shape[-2:], v.shape[-2:]
    knob = np.broadcast_to(a if r is None else r, lead)
    mask = None if mask is None else np.broadcast_to(mask, (*lead, T, S))
    c = 1.0 / math.sqrt(D) if scale is None else scale
    first = S - T if align == "lower_right" else 0
    out = np.zeros((*lead, T, E))

    def sparse(z, eta):
        low, high = max(z.values()), max(z.values()) + math.log(len(z))
        for _ in range(200):
            theta = (low + high) / 2.0
            base = {s: max(1.0 + eta * (z[s] - theta), 0.0) for s in z}
            p = {s: base[s] ** (1.0 / eta) for s in z}
            low, high = (theta, high) if math.fsum(p.values()) > 1.0 else (low, theta)
        return p

    for place in np.ndindex(*lead):
        before = {0: 1.0}
        for t in range(T):
            z = {}
            for s in range(S):
                if (causal and s > t + first) or (mask is not None and not mask[place][t, s]):
                    continue
                z[s] = c * math.fsum(float(q[place][t, d] * k[place][s, d]) for d in range(D))
            if not z:
                continue
            x = float(knob[place])
            if r is None:
                p = sparse(z, 1.0 / (1.0 + math.exp(-x)))
            else:
                stop = {s: 1.0 / (1.0 + math.exp(-z[s] - x)) for s in z}
                p = {
                    s: stop[s] * math.fsum(
                        before[b] * math.prod(1.0 - stop.get(m, 0.0) for m in range(b, s))
                        for b in before if b <= s
                    )
                    for s in stop
                }  # fmt: skip
                before = p
            for e in range(E):
                out[place][t, e] = math.fsum(p[s] * float(v[place][s, e]) for s in p)
    return out


@pytest.mark.parametrize("case", cases(SPEC))
def test_equals_the_slow_loop(case):
    kwargs = cases(SPEC)[case]
    out, _ = adaptive_sparse_monotonic_forward(**kwargs)
    slow = slow_adaptive_sparse_monotonic(**kwargs)
    np.testing.assert_allclose(out, slow, rtol=0, atol=2e-14)


def test_worked_example_sparse():
    """a = 0, alpha = 1.5: scores (0.4, 0, -3) give bases (0.8, 0.6) and p = (0.64, 0.36, 0).

    With dp = (1, 0, 0): w = p / base = (0.8, 0.6), the bracket is (1 - 4/7, -4/7), dz = (2.4, -2.4)
    / 7; g = (x / (1 + x) - ln(1 + x)) / eta^2 at x = (-0.2, -0.4), deta = p . g . bracket, and da =
    deta / 4.
    """
    q, v = np.ones((1, 1, 1)), np.array([[[1.0], [0.0], [7.0]]])
    k = np.array([[[0.4], [0.0], [-3.0]]])
    out, cache = adaptive_sparse_monotonic_forward(q, k, v, a=np.zeros(1))
    np.testing.assert_allclose(cache.p, [[[0.64, 0.36, 0.0]]], rtol=1e-15)
    np.testing.assert_allclose(out, [[[0.64]]], rtol=1e-15)
    g = adaptive_sparse_monotonic_backward(np.ones((1, 1, 1)), cache)
    np.testing.assert_allclose(g["k"][0, :, 0], [2.4 / 7, -2.4 / 7, 0.0], rtol=1e-14)
    np.testing.assert_allclose(g["q"], [[[0.96 / 7]]], rtol=1e-14)
    np.testing.assert_allclose(g["v"][0, :, 0], [0.64, 0.36, 0.0], rtol=1e-15)
    one, two = (-0.25 - math.log(0.8)) / 0.25, (-2 / 3 - math.log(0.6)) / 0.25
    deta = 0.64 * one * 3 / 7 - 0.36 * two * 4 / 7
    np.testing.assert_allclose(g["a"], [deta / 4], rtol=1e-13)


def test_worked_example_monotonic():
    """sigma = 1/2 everywhere: row 0 is (1/2, 1/4), row 1 is (1/4, (1/4 + 1/4) / 2 = 1/4).

    d p_11 = sigma_11 (p_00 (1 - sigma_10) + p_01): it falls with sigma_10 by p_00 sigma_11 = 1/4,
    rises with sigma_11 by 1/2, with sigma_01 by (1/2) sigma_11 = 1/4, and with sigma_00 by (1/2)
    (1/2 - sigma_01) = 0; each times sigma' = 1/4.
    """
    q, k, v = np.ones((1, 2, 1)), np.zeros((1, 2, 1)), np.array([[[0.0], [1.0]]])
    out, cache = adaptive_sparse_monotonic_forward(q, k, v, r=np.zeros(1))
    np.testing.assert_array_equal(cache.p, [[[1 / 2, 1 / 4], [1 / 4, 1 / 4]]])
    np.testing.assert_array_equal(out, [[[1 / 4], [1 / 4]]])
    g = adaptive_sparse_monotonic_backward(np.array([[[0.0], [1.0]]]), cache)
    by_key = np.array([0.0 - 1 / 4, 1 / 4 + 1 / 2]) / 4
    np.testing.assert_allclose(g["k"][0, :, 0], by_key, rtol=1e-15)
    np.testing.assert_allclose(g["r"], [by_key.sum()], rtol=1e-15)
    np.testing.assert_array_equal(g["v"], [[[1 / 4], [1 / 4]]])


def test_far_right_of_a_is_sparsemax_far_left_is_softmax():
    kwargs = {n: x for n, x in cases(SPEC)["plain"].items() if n != "a"}
    for a, key in ((40.0, "normalizers/sparsemax"), (-300.0, "scores/dot_product")):
        out, _ = adaptive_sparse_monotonic_forward(**kwargs, a=np.array([a]))
        want, _ = attention_ref.run(key, **kwargs)
        np.testing.assert_allclose(out, want, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("dtype", "a"), [("f8", -50.0), ("f8", -900.0), ("f4", -120.0)])
def test_an_eta_that_underflows_is_softmax(dtype, a):
    rng = np.random.default_rng(8)
    q, k, v = (rng.standard_normal(s).astype(dtype) for s in ((1, 3, 4), (1, 6, 4), (1, 6, 2)))
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        out, cache = adaptive_sparse_monotonic_forward(q, k, v, a=np.full(1, a, dtype))
        g = adaptive_sparse_monotonic_backward(np.ones_like(out), cache)
    want, plain = attention_ref.run("scores/dot_product", q, k, v)
    assert out.dtype == np.dtype(dtype)
    np.testing.assert_allclose(out, want, rtol=0, atol=16 * np.finfo(dtype).eps)
    h = attention_ref.get("scores/dot_product").backward(np.ones_like(out), plain)
    for name in h:
        np.testing.assert_allclose(g[name], h[name], rtol=0, atol=64 * np.finfo(dtype).eps)
    assert np.all(np.abs(g["a"]) < 1e-16)


def test_sparse_rows_sum_to_one_and_have_zeros():
    for case in SPARSE:
        kwargs = cases(SPEC)[case]
        _, cache = adaptive_sparse_monotonic_forward(**(kwargs | {"a": np.full(2, 2.0)}))
        total = cache.p.sum(axis=-1)
        assert np.all((np.abs(total - 1.0) < 4e-16) | (total == 0.0))
    assert np.any(cache.p == 0.0)


@pytest.mark.parametrize("case", RUNS)
def test_a_run_never_turns_back(case):
    """At most 1 in a row, and every row lies behind the one before it, in the order of its sums."""
    _, cache = adaptive_sparse_monotonic_forward(**cases(SPEC)[case])
    reached = np.cumsum(cache.p, axis=-1)
    filled = cache.p.sum(axis=-1) > 0
    assert np.all(reached <= 1.0 + 1e-15)
    for h in np.ndindex(*reached.shape[:-2]):
        rows = reached[h][filled[h]]
        assert np.all(np.diff(rows, axis=0) <= 1e-15)


def test_who_always_stops_stays_at_the_first_key_and_who_never_stops_gets_nothing():
    for case in RUNS:
        kwargs = {n: x for n, x in cases(SPEC)[case].items() if n not in ("mask", "causal")}
        out, _ = adaptive_sparse_monotonic_forward(**(kwargs | {"r": np.array([800.0])}))
        want = np.broadcast_to(kwargs["v"][..., :1, :], out.shape)
        np.testing.assert_array_equal(out, want)
        out, cache = adaptive_sparse_monotonic_forward(**(kwargs | {"r": np.array([-800.0])}))
        np.testing.assert_array_equal(out, np.zeros_like(out))
        g = adaptive_sparse_monotonic_backward(np.ones_like(out), cache)
        assert all(np.all(np.isfinite(x)) for x in g.values())


@pytest.mark.parametrize("case", RUNS)
def test_recurrence_is_the_quotient_of_cumulative_products_and_sums(case):
    """The usual parallel form; a state that a row without keys leaves alone."""
    kwargs = cases(SPEC)[case]
    _, cache = adaptive_sparse_monotonic_forward(**kwargs)
    stop = cache.steps[0]
    state = np.zeros((*stop.shape[:-2], stop.shape[-1]))
    state[..., 0] = 1.0
    for t in range(stop.shape[-2]):
        s = stop[..., t, :]
        ones = np.ones_like(s[..., :1])
        rest = np.concatenate([ones, np.cumprod(1.0 - s, axis=-1)[..., :-1]], axis=-1)
        row = s * rest * np.cumsum(state / rest, axis=-1)
        np.testing.assert_allclose(cache.p[..., t, :], row, rtol=0, atol=1e-14)
        state = np.where(np.any(s > 0, axis=-1, keepdims=True), row, state)


def test_a_row_without_keys_is_skipped():
    for case in ("long-queries", "plain"):
        kwargs = cases(SPEC)[case]
        T, S = kwargs["q"].shape[-2], kwargs["k"].shape[-2]
        mask = np.ones((T, S), bool)
        mask[2] = False
        out, cache = adaptive_sparse_monotonic_forward(**kwargs, mask=mask)
        np.testing.assert_array_equal(out[..., 2, :], 0.0)
        kept = [t for t in range(T) if t != 2]
        want, other = adaptive_sparse_monotonic_forward(
            **(kwargs | {"q": kwargs["q"][..., kept, :]})
        )
        np.testing.assert_allclose(out[..., kept, :], want, rtol=0, atol=1e-15)
        dout = np.random.default_rng(0).standard_normal(out.shape)
        g = adaptive_sparse_monotonic_backward(dout, cache)
        h = adaptive_sparse_monotonic_backward(dout[..., kept, :], other)
        assert not np.any(g["q"][..., 2, :])
        np.testing.assert_allclose(g["q"][..., kept, :], h["q"], rtol=0, atol=1e-14)
        for name in set(g) - {"q"}:
            np.testing.assert_allclose(g[name], h[name], rtol=0, atol=1e-14)


def test_a_nan_reaches_its_row_and_in_a_run_all_later_rows():
    for case, later in (("plain", False), ("long-queries", True)):
        kwargs = cases(SPEC)[case]
        base, _ = adaptive_sparse_monotonic_forward(**kwargs)
        for name, row, bad in (("q", 2, np.nan), ("k", 1, np.inf), ("v", 1, np.nan)):
            x = kwargs[name].copy()
            x[0, 1, row, 0] = bad
            given = kwargs | {name: x}
            if name != "q":  # only queries 3 and later see the key
                given["mask"] = np.ones((base.shape[-2], kwargs["k"].shape[-2]), bool)
                given["mask"][:3, row] = False
                base, _ = adaptive_sparse_monotonic_forward(**(kwargs | {"mask": given["mask"]}))
            else:
                base, _ = adaptive_sparse_monotonic_forward(**kwargs)
            out, cache = adaptive_sparse_monotonic_forward(**given)
            first = 2 if name == "q" else 3
            hit = np.zeros(out.shape[-2], bool)
            hit[first] = True
            if later or name != "q":
                hit[first:] = True
            assert np.all(np.isnan(out[0, 1, hit]))
            np.testing.assert_array_equal(out[0, 1, ~hit], base[0, 1, ~hit])
            np.testing.assert_array_equal(out[0, 0], base[0, 0])
            g = adaptive_sparse_monotonic_backward(np.ones_like(out), cache)
            assert all(np.all(np.isfinite(y)) for y in g.values())


def test_without_keys_or_queries_shapes_are_right():
    for case in ("plain", "long-queries"):
        kwargs = cases(SPEC)[case]
        for name, part in (("q", ("q",)), ("k", ("k", "v"))):
            cut = kwargs | {n: kwargs[n][..., :0, :] for n in part}
            out, cache = adaptive_sparse_monotonic_forward(**cut)
            assert out.shape == (1, 2, cut["q"].shape[-2], 3), name
            assert not np.any(out)
            g = adaptive_sparse_monotonic_backward(np.ones_like(out), cache)
            for n, x in g.items():
                assert x.shape == cut[n].shape and not np.any(x)


def test_gradient_of_a_near_softmax():
    """There eta -> 0 and d log p / d eta = -u^2 / 2 + 2 eta u^3 / 3, without cancellation."""
    kwargs = cases(SPEC)["plain"] | {"a": np.array([-25.0, -14.0])}
    out, cache = adaptive_sparse_monotonic_forward(**kwargs)
    dout = np.random.default_rng(2).standard_normal(out.shape)
    z = kwargs["q"] @ np.swapaxes(kwargs["k"], -1, -2) * kwargs["scale"]
    u = z - np.log(np.sum(np.exp(z), axis=-1, keepdims=True))
    p, dp = np.exp(u), dout @ np.swapaxes(kwargs["v"], -1, -2)
    eta = 1.0 / (1.0 + np.exp(-kwargs["a"]))
    dp = dp - np.sum(p * dp, axis=-1, keepdims=True)
    deta = np.sum(p * (-u * u / 2) * dp, axis=(0, 2, 3))
    g = adaptive_sparse_monotonic_backward(dout, cache)["a"]
    np.testing.assert_allclose(g / eta, deta, rtol=1e-4)
    np.testing.assert_allclose(g[0] / eta[0], deta[0], rtol=1e-9)


def test_a_parameter_that_is_no_number_poisons_its_head():
    for case, name in (("plain", "a"), ("long-queries", "r")):
        kwargs = cases(SPEC)[case]
        mask = np.ones((kwargs["q"].shape[-2], kwargs["k"].shape[-2]), bool)
        mask[0], mask[1, 1] = False, False
        infinite = kwargs | {"mask": mask, name: np.array([np.inf, kwargs[name][1]])}
        out, _ = adaptive_sparse_monotonic_forward(**infinite)
        assert np.all(out[0, 0, 0] == 0.0) and np.all(np.isnan(out[0, 0, 1:]))
        base, _ = adaptive_sparse_monotonic_forward(**kwargs)
        out, cache = adaptive_sparse_monotonic_forward(
            **(kwargs | {name: np.array([np.nan, kwargs[name][1]])})
        )
        assert np.all(np.isnan(out[0, 0]))
        np.testing.assert_array_equal(out[0, 1], base[0, 1])
        g = adaptive_sparse_monotonic_backward(np.ones_like(out), cache)
        assert g[name][0] == 0.0 and np.all(np.isfinite(g[name]))


def test_dropped_heads_are_zero_and_the_others_make_up_for_them():
    rng = np.random.default_rng(0)
    draws = np.array([head_drop(rng, 4, 0.5) for _ in range(4000)])
    kept = np.sum(draws > 0, axis=1)
    np.testing.assert_array_equal(draws.sum(axis=1), np.where(kept > 0, 4.0, 0.0))
    share = np.mean(draws > 0, axis=0)
    assert np.all(np.abs(share - 0.5) < 5 * math.sqrt(0.25 / 4000))
    np.testing.assert_array_equal(head_drop(rng, 3, 0.0), np.ones(3))
    np.testing.assert_array_equal(head_drop(rng, 3, 1.0), np.zeros(3))
    assert abs(np.mean(np.array([head_drop(rng, 2) for _ in range(2000)]) > 0) - 0.5) < 0.06


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"a": None}, core.errors.ParameterError, "a and r are both None, expected one"),
        ({"r": np.zeros(2)}, core.errors.ParameterError, "a and r are both given, expected one"),
        ({"a": np.zeros(3)}, core.errors.ShapeError, r"a has shape \(3,\)"),
        ({"a": 0.5}, core.errors.DTypeError, "a is a float"),
        ({"align": "left"}, core.errors.ParameterError, "align is 'left'"),
    ],
)
def test_errors_name_argument_and_expectation(change, error, says):
    with pytest.raises(error, match=says):
        adaptive_sparse_monotonic_forward(**(cases(SPEC)["plain"] | change))


def test_the_other_doors():
    with pytest.raises(core.errors.DTypeError, match="rng is a int"):
        head_drop(0, 3)
    with pytest.raises(core.errors.ParameterError, match="drop is"):
        head_drop(np.random.default_rng(0), 3, 1.5)
    out, cache = adaptive_sparse_monotonic_forward(**cases(SPEC)["plain"])
    with pytest.raises(core.errors.ShapeError, match="dout has shape"):
        adaptive_sparse_monotonic_backward(out[0], cache)


def _live(kwargs):
    T, S = kwargs["q"].shape[-2], kwargs["k"].shape[-2]
    shape = np.broadcast_shapes(kwargs["q"].shape[:-2], kwargs["k"].shape[:-2])
    live = np.ones((T, S), bool) if kwargs.get("mask") is None else kwargs["mask"]
    if kwargs.get("causal"):
        first = S - T if kwargs.get("align", "lower_right") == "lower_right" else 0
        live = np.arange(S) <= np.arange(T)[:, None] + first
    return np.broadcast_to(live, (*shape, T, S)).copy()


def _compare(torch, kwargs, theirs, given):
    """Output and gradients."""
    out, cache = adaptive_sparse_monotonic_forward(**kwargs)
    np.testing.assert_allclose(out, theirs.detach().numpy(), rtol=0, atol=1e-14)
    dout = np.random.default_rng(5).standard_normal(out.shape)
    theirs.backward(torch.tensor(dout))
    for name, g in adaptive_sparse_monotonic_backward(dout, cache).items():
        np.testing.assert_allclose(g, given[name].grad.numpy(), rtol=0, atol=2e-13)


@pytest.mark.oracle
@pytest.mark.parametrize("case", RUNS)
def test_pytorch_agrees(case):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")
    kwargs = cases(SPEC)[case]
    given = {n: torch.tensor(kwargs[n], requires_grad=True) for n in "qkvr"}
    live = torch.tensor(_live(kwargs))
    c = kwargs.get("scale", kwargs["q"].shape[-1] ** -0.5)
    e = given["q"] @ given["k"].mT * c + given["r"][..., None, None]
    stop = torch.sigmoid(e) * live
    state = torch.zeros(stop.shape[:-2] + stop.shape[-1:], dtype=torch.float64)
    state[..., 0] = 1.0
    rows = []
    for t in range(stop.shape[-2]):
        s = stop[..., t, :]
        rest = torch.cumprod(1.0 - s, dim=-1)
        rest = torch.cat([torch.ones_like(rest[..., :1]), rest[..., :-1]], dim=-1)
        row = s * rest * torch.cumsum(state / rest, dim=-1)
        rows.append(row)
        state = torch.where(live[..., t, :].any(dim=-1, keepdim=True), row, state)
    _compare(torch, kwargs, torch.stack(rows, dim=-2) @ given["v"], given)


@pytest.mark.oracle
@pytest.mark.parametrize("case", SPARSE)
def test_entmax_agrees(case):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")
    entmax = pytest.importorskip("entmax", reason="entmax is not installed: make oracles")
    kwargs = cases(SPEC)[case]
    given = {n: torch.tensor(kwargs[n], requires_grad=True) for n in "qkva"}
    live = torch.tensor(_live(kwargs))
    c = kwargs.get("scale", kwargs["q"].shape[-1] ** -0.5)
    alive = live.any(dim=-1, keepdim=True)
    z = torch.where(live | ~alive, given["q"] @ given["k"].mT * c, -1e9)
    alpha = (1.0 + torch.sigmoid(given["a"]))[..., None, None].expand(*z.shape[:-1], 1)
    p = entmax.entmax_bisect(z, alpha, dim=-1, n_iter=60) * alive
    _compare(torch, kwargs, p @ given["v"], given)
