"""Multi-token attention: slow loop, worked example, the two masks, packed sequences, oracle."""

import math

import numpy as np
import pytest

import attention_ref
from attention_ref import core
from attention_ref.kit.checks import cases
from attention_ref.methods.scores.multi_token import (
    identity_kernel,
    multi_token_backward,
    multi_token_forward,
)

SPEC = attention_ref.get("scores/multi_token")
softmax = attention_ref.get("scores/dot_product")
EXTRAS = ("w_pre", "theta_post", "w_post")


def slow_multi_token(
    q, k, v, theta, w_pre=None, theta_post=None, w_post=None, mask=None, causal=False,
    align="lower_right", scale=None, softcap=None, bias=None,
):  # fmt: skip
    """One number at a time, heads on the last leading axis."""
    lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    T, D, S, E = q.shape[-2], q.shape[-1], k.shape[-2], v.shape[-1]
    q = np.broadcast_to(q, (*lead, T, D))
    k = np.broadcast_to(k, (*lead, S, D))
    v = np.broadcast_to(v, (*lead, S, E))
    mask = None if mask is None else np.broadcast_to(mask, (*lead, T, S))
    bias = None if bias is None else np.broadcast_to(bias, (*lead, T, S))
    c = 1.0 / math.sqrt(D) if scale is None else scale
    first = S - T if align == "lower_right" else 0

    def sees(at, t, s):
        return (not causal or s <= t + first) and (mask is None or bool(mask[at][t, s]))

    def convolved(maps, kernels):
        kernels = np.broadcast_to(kernels, (*lead, *kernels.shape[-2:]))
        A, B = kernels.shape[-2:]
        new = np.zeros((*lead, T, S))
        for at in np.ndindex(*lead):
            for t in range(T):
                for s in range(S):
                    new[at][t, s] = math.fsum(
                        float(kernels[at][A - 1 - a, i - s + B // 2]) * float(maps[at][t - a, i])
                        for a in range(A) for i in range(s - B // 2, s + B // 2 + 1)
                        if t - a >= 0 and 0 <= i < S and sees(at, t - a, i)
                    )  # fmt: skip
        return new

    def mixed(maps, w):
        new = np.zeros((*lead, T, S))
        for at in np.ndindex(*lead):
            for t in range(T):
                for s in range(S):
                    new[at][t, s] = math.fsum(
                        float(w[at[-1], h]) * float(maps[(*at[:-1], h)][t, s])
                        for h in range(lead[-1])
                    )
        return new

    y = np.zeros((*lead, T, S))
    for at in np.ndindex(*lead):
        for t in range(T):
            for s in range(S):
                z = c * math.fsum(float(q[at][t, d]) * float(k[at][s, d]) for d in range(D))
                y[at][t, s] = z if softcap is None else softcap * math.tanh(z / softcap)
    y = convolved(y, theta)
    y = y if w_pre is None else mixed(y, w_pre)
    p = np.zeros((*lead, T, S))
    for at in np.ndindex(*lead):
        for t in range(T):
            grown = {
                s: math.exp(float(y[at][t, s]) + (0.0 if bias is None else float(bias[at][t, s])))
                for s in range(S) if sees(at, t, s)
            }  # fmt: skip
            for s, e in grown.items():
                p[at][t, s] = e / math.fsum(grown.values())

    def hidden_are_zero(maps):
        for at in np.ndindex(*lead):
            for t in range(T):
                for s in range(S):
                    if not sees(at, t, s):
                        maps[at][t, s] = 0.0
        return maps

    p = p if theta_post is None else hidden_are_zero(convolved(p, theta_post))
    p = p if w_post is None else hidden_are_zero(mixed(p, w_post))
    out = np.zeros((*lead, T, E))
    for at in np.ndindex(*lead):
        for t in range(T):
            for e in range(E):
                out[at][t, e] = math.fsum(
                    float(p[at][t, s]) * float(v[at][s, e]) for s in range(S)
                )  # fmt: skip
    return out


@pytest.mark.parametrize("case", cases(SPEC))
def test_equals_the_slow_loop(case):
    kwargs = cases(SPEC)[case]
    out, _ = multi_token_forward(**kwargs)
    np.testing.assert_allclose(out, slow_multi_token(**kwargs), rtol=0, atol=1e-14)


def drawn(*extras, seed=0, lead=(2, 3), T=4, S=6, size=(3, 5), **options):
    """Batch of 2 with 3 heads, T = 4, S = 6, D = 4, E = 3, kernels of 3 queries and 5 keys."""
    rng = np.random.default_rng(seed)
    kwargs = core.examples.qkv(rng, lead=lead, T=T, S=S)
    kwargs["theta"] = identity_kernel(*size) + 0.5 * rng.standard_normal((*lead[-1:], *size))
    for name in extras:
        shape = (*lead[-1:], 2, 3) if name == "theta_post" else lead[-1:] * 2
        kwargs[name] = 0.6 * rng.standard_normal(shape)
    return kwargs | options


@pytest.mark.parametrize("extras", [(), ("w_pre",), ("theta_post",), ("w_post",), EXTRAS])
def test_every_step_in_a_batch_and_its_gradient(extras):
    from attention_ref import engine

    kwargs = drawn(*extras, causal=True, T=7)
    out, cache = multi_token_forward(**kwargs)
    np.testing.assert_allclose(out, slow_multi_token(**kwargs), rtol=0, atol=1e-13)
    dout = np.random.default_rng(1).standard_normal(out.shape)
    hand = multi_token_backward(dout, cache)
    arrays = {n: a for n, a in kwargs.items() if isinstance(a, np.ndarray)}
    assert set(hand) == set(arrays)
    _, pull = engine.vjp(lambda **kw: multi_token_forward(**kw, causal=True)[0], arrays)
    for name, g in pull(dout).items():
        np.testing.assert_allclose(hand[name], g, rtol=0, atol=1e-12, err_msg=name)


def board():
    """Keys a, b, x; the first query asks for a, the second for b, each for ln 2.

    The kernel adds to a score that of the query before and the key before.
    """
    k = math.log(2.0) * np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    v, theta = np.array([[0.0], [6.0], [12.0]]), np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    return {"q": np.eye(2), "k": k, "v": v, "theta": theta, "scale": 1.0}


def test_worked_example():
    """z = ln 2 (1 0 0 / 0 1 0), y = (ln 2, 0, 0 / 0, ln 4, 0): outputs 4.5 and 6."""
    ln2 = math.log(2.0)
    out, cache = multi_token_forward(**board(), bias=np.zeros((1, 3)))
    np.testing.assert_allclose(cache.y, [[ln2, 0, 0], [0, 2 * ln2, 0]], rtol=1e-15)
    np.testing.assert_allclose(cache.p, [[1 / 2, 1 / 4, 1 / 4], [1 / 6, 2 / 3, 1 / 6]], rtol=1e-15)
    np.testing.assert_allclose(out, [[4.5], [6.0]], rtol=1e-15)
    np.testing.assert_allclose(cache.lse, [2 * ln2, math.log(6)], rtol=1e-15)
    g = multi_token_backward(np.ones((2, 1)), cache)
    np.testing.assert_allclose(g["bias"], [[-3.25, 0.375, 2.875]], rtol=1e-14)
    want = ln2 * np.array([[0, -1, 0], [1.375, -2.25, -1]])
    np.testing.assert_allclose(g["theta"], want, rtol=1e-14, atol=1e-15)
    want = ln2 * np.array([[-2.25, 1.375], [-1, 0]])
    np.testing.assert_allclose(g["q"], want, rtol=1e-14, atol=1e-15)
    want = [[-2.25, -1], [1.375, 0], [1.875, 1]]
    np.testing.assert_allclose(g["k"], want, rtol=1e-14, atol=1e-15)
    np.testing.assert_allclose(g["v"], [[2 / 3], [11 / 12], [5 / 12]], rtol=1e-15)


def test_identities_change_nothing():
    """Every further step with an identity is the method without it, gradients too."""
    kwargs = drawn(causal=True)
    out, cache = multi_token_forward(**kwargs)
    dout = np.random.default_rng(2).standard_normal(out.shape)
    want = multi_token_backward(dout, cache)
    for name, neutral in (
        ("w_pre", np.eye(3)), ("theta_post", identity_kernel(4, 3)), ("w_post", np.eye(3)),
    ):  # fmt: skip
        found, cache = multi_token_forward(**kwargs, **{name: neutral})
        np.testing.assert_allclose(found, out, rtol=0, atol=1e-15)
        g = multi_token_backward(dout, cache)
        for n, a in want.items():
            np.testing.assert_allclose(g[n], a, rtol=0, atol=1e-13, err_msg=n)


def test_a_kernel_of_one_number_is_a_factor_of_the_scale():
    kwargs = drawn(size=(1, 1), scale=0.5)
    kwargs["theta"] = np.array([1.0, 2.0, -0.5])[:, None, None]
    out, _ = multi_token_forward(**kwargs)
    for h, factor in enumerate((1.0, 2.0, -0.5)):
        q, k, v = (kwargs[n][:, h] for n in "qkv")
        want, _ = softmax.forward(q, k, v, scale=0.5 * factor)
        np.testing.assert_allclose(out[:, h], want, rtol=0, atol=1e-14)


def test_a_shifted_kernel_reads_the_key_before():
    """1 left of the middle: the weights of softmax attention over keys moved by one."""
    kwargs = drawn()
    kwargs["theta"] = np.array([[0.0, 1.0, 0.0, 0.0, 0.0]])
    out, _ = multi_token_forward(**kwargs)
    moved = np.concatenate([0 * kwargs["k"][..., :1, :], kwargs["k"][..., :-1, :]], axis=-2)
    want, _ = softmax.forward(kwargs["q"], moved, kwargs["v"])
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-14)


def test_rows_of_weights_after_the_second_kernel():
    """A kernel of one key that averages two queries: rows still sum to 1, but for the first."""
    kwargs = drawn(theta_post=np.full((2, 1), 0.5))
    _, cache = multi_token_forward(**kwargs)
    want = np.array([0.5, 1.0, 1.0, 1.0])
    np.testing.assert_allclose(np.sum(cache.p, axis=-1) - want, 0.0, rtol=0, atol=1e-15)
    np.testing.assert_allclose(cache.p[..., 2, :], np.mean(cache.soft[..., 1:3, :], axis=-2))


def test_the_key_kernel_is_two_sided_but_no_future_is_seen():
    for extras in ((), EXTRAS):
        kwargs = drawn(*extras, T=6, causal=True)
        out, _ = multi_token_forward(**kwargs)
        for t in range(1, 6):
            later = {n: kwargs[n].copy() for n in "qkv"}
            for a in later.values():
                a[..., t:, :] += 1.0
            found, _ = multi_token_forward(**(kwargs | later))
            np.testing.assert_array_equal(found[..., :t, :], out[..., :t, :])
            assert np.all(np.any(found[..., t:, :] != out[..., t:, :], axis=-1))


def test_a_query_reads_the_queries_before_it():
    """Row t depends on queries t - 2 to t for a kernel of 3, and on no other."""
    kwargs = drawn(T=6)
    out, _ = multi_token_forward(**kwargs)
    moved = kwargs | {"q": kwargs["q"].copy()}
    moved["q"][..., 2, :] += 1.0
    same = np.all(multi_token_forward(**moved)[0] == out, axis=-1)
    np.testing.assert_array_equal(np.all(same, axis=(0, 1)), [1, 1, 0, 0, 0, 1])
    assert not np.any(same[..., 2:5])


def test_packed_sequences_need_a_gap():
    """A block-diagonal mask lets corners touch; B // 2 hidden keys between keep them apart."""
    for extras in ((), EXTRAS):
        kwargs = drawn(*extras, T=6, S=8)
        mask = core.examples.packed_mask([2, 4], [3, 5])
        mask[:, 3:5] = False
        out, _ = multi_token_forward(**kwargs, mask=mask)
        for rows, keys in ((slice(2), slice(3)), (slice(2, 6), slice(5, 8))):
            alone = kwargs | {n: kwargs[n][..., keys, :] for n in "kv"}
            want, _ = multi_token_forward(**(alone | {"q": kwargs["q"][..., rows, :]}))
            np.testing.assert_allclose(out[..., rows, :], want, rtol=0, atol=1e-14)
    touching = {n: np.delete(kwargs[n], [3, 4], axis=-2) for n in "kv"}
    mask = core.examples.packed_mask([2, 4], [3, 3])
    found, _ = multi_token_forward(**(kwargs | touching), mask=mask)
    assert np.max(np.abs(found - out)[..., 2, :]) > 0.01
    np.testing.assert_allclose(found[..., :2, :], out[..., :2, :], rtol=0, atol=1e-14)


def test_groups_of_heads_are_a_block_diagonal_matrix():
    w = np.zeros((4, 4))
    w[:2, :2], w[2:, 2:] = [[1.0, 0.5], [0.2, 0.3]], [[0.0, 1.0], [1.0, 0.0]]
    kwargs = drawn(lead=(2, 4))
    soft = multi_token_forward(**kwargs)[1].soft
    for name in ("w_pre", "w_post"):
        _, cache = multi_token_forward(**kwargs, **{name: w})
        if name == "w_post":
            want = np.stack([
                soft[:, 0] + 0.5 * soft[:, 1], 0.2 * soft[:, 0] + 0.3 * soft[:, 1], soft[:, 3],
                soft[:, 2],
            ], axis=1)  # fmt: skip
            np.testing.assert_allclose(cache.p, want, rtol=0, atol=1e-15)
        else:
            np.testing.assert_allclose(cache.p[:, 2:], soft[:, [3, 2]], rtol=0, atol=1e-15)


def test_masks_of_their_own_stay_hidden_when_heads_are_mixed():
    rng = np.random.default_rng(3)
    mask = rng.random((3, 4, 6)) < 0.6
    mask[1, 2] = False
    for extras in (("w_pre",), EXTRAS):
        kwargs = drawn(*extras, mask=mask)
        out, cache = multi_token_forward(**kwargs)
        np.testing.assert_allclose(out, slow_multi_token(**kwargs), rtol=0, atol=1e-13)
        assert not np.any(cache.p[np.broadcast_to(~mask, cache.p.shape)])
        assert not np.any(out[:, 1, 2])
        uniform, _ = multi_token_forward(**kwargs, empty_row="uniform")
        uniform[:, 1, 2] = 0.0
        np.testing.assert_array_equal(uniform, out)


def test_uniform_empty_rows_stay_uniform():
    mask = np.ones((4, 6), bool)
    mask[1] = False
    for extras in ((), EXTRAS):
        kwargs = drawn(*extras, mask=mask)
        zero, _ = multi_token_forward(**kwargs)
        out, cache = multi_token_forward(**kwargs, empty_row="uniform")
        np.testing.assert_allclose(out[..., 1, :], np.mean(kwargs["v"], axis=-2), atol=1e-15)
        np.testing.assert_array_equal(np.delete(out, 1, axis=-2), np.delete(zero, 1, axis=-2))
        only = np.zeros_like(out)
        only[..., 1, :] = 1.0
        g = multi_token_backward(only, cache)
        assert not any(np.any(a) for n, a in g.items() if n != "v")
        dout = np.random.default_rng(4).standard_normal(out.shape) - 9.0 * only
        want = multi_token_backward(dout, multi_token_forward(**kwargs)[1])
        for n, g in multi_token_backward(dout, cache).items():
            if n != "v":
                np.testing.assert_array_equal(g, want[n], err_msg=n)
        nan, _ = multi_token_forward(**kwargs, empty_row="nan")
        assert np.all(np.isnan(nan[..., 1, :])) and not np.any(np.isnan(np.delete(nan, 1, axis=-2)))


def test_non_finite_inputs_reach_what_depends_on_them():
    """A query its own row and the next two, with w_* all heads; a value the rows that see it."""
    mask = np.ones((6, 6), bool)
    mask[4, 3] = False
    for extras, rows, heads in (
        ((), [1, 2, 3], [1]), (("theta_post",), [1, 2, 3, 4], [1]),
        (("w_pre",), [1, 2, 3], [0, 1, 2]), (("w_post",), [1, 2, 3], [0, 1, 2]),
    ):  # fmt: skip
        kwargs = drawn(*extras, T=6, mask=mask)
        clean, _ = multi_token_forward(**kwargs)
        for bad in (np.nan, np.inf):
            poisoned = kwargs | {"q": kwargs["q"].copy()}
            poisoned["q"][0, 1, 1, 0] = bad
            out, cache = multi_token_forward(**poisoned)
            want = np.zeros(out.shape, bool)
            want[0, np.ix_(heads, rows)[0], np.ix_(heads, rows)[1]] = True
            np.testing.assert_array_equal(np.isnan(out), want)
            np.testing.assert_array_equal(out[~want], clean[~want])
            after = np.delete(np.arange(6), [1, 2, 3])
            lse = np.isnan(cache.lse)
            assert np.all(lse[0, 1, 1:4]) and not np.any(lse[:, :, after]) and not np.any(lse[1])
            g = multi_token_backward(np.ones_like(out), cache)
            assert all(np.all(np.isfinite(a)) for a in g.values())
            assert not np.any(g["q"][0, 1, 1])
            poisoned = kwargs | {"v": kwargs["v"].copy()}
            poisoned["v"][1, 2, 3, 0] = bad
            out, _ = multi_token_forward(**poisoned)
            want = np.zeros(out.shape, bool)
            want[1, 2, [0, 1, 2, 3, 5]] = True
            np.testing.assert_array_equal(np.isnan(out), want)
            np.testing.assert_array_equal(out[~want], clean[~want])
    kwargs = drawn(T=6, mask=mask)
    kwargs["k"][1, 2, 3, 0] = np.nan
    out, _ = multi_token_forward(**kwargs)
    assert np.all(np.isnan(out[1, 2])) and np.sum(np.isnan(out)) == 18
    bias = np.zeros((4, 6))
    bias[3, 1], bias[0, 0] = np.nan, -np.inf
    out, cache = multi_token_forward(**drawn(), bias=bias)
    assert np.all(np.isnan(out[..., 3, :])) and np.all(np.isfinite(out[..., :3, :]))
    assert not np.any(cache.p[..., 0, 0])


def test_identity_kernels():
    np.testing.assert_array_equal(identity_kernel(2, 3), [[0, 0, 0], [0, 1, 0]])
    assert identity_kernel(6, 11)[5, 5] == 1 and np.sum(identity_kernel(6, 11)) == 1


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"theta": np.ones((2, 4))}, core.errors.ShapeError, r"theta is \(2, 4\), .* B odd"),
        ({"theta": np.ones((0, 3))}, core.errors.ShapeError, r"theta is \(0, 3\), expected"),
        ({"theta": np.ones(3)}, core.errors.ShapeError, r"theta has shape \(3,\)"),
        ({"theta": np.ones((2, 2, 3))}, core.errors.ShapeError, r"theta has shape .*H, A, B"),
        ({"theta_post": np.ones((1, 2))}, core.errors.ShapeError, "theta_post is"),
        ({"theta_post": np.ones((4, 1, 3))}, core.errors.ShapeError, "theta_post has shape"),
        ({"w_pre": np.ones((2, 2))}, core.errors.ShapeError, "w_pre has H = 2"),
        ({"w_post": np.ones((3, 2))}, core.errors.ShapeError, "w_post has H = 2"),
        ({"w_post": np.ones((1, 3, 3))}, core.errors.ShapeError, "w_post has shape"),
    ],
)
def test_errors_name_argument_and_expectation(change, error, says):
    with pytest.raises(error, match=says):
        multi_token_forward(**(drawn() | change))


def test_a_foreign_cotangent_is_refused():
    out, cache = multi_token_forward(**drawn())
    with pytest.raises(core.errors.ShapeError, match="dout has shape"):
        multi_token_backward(out[0], cache)


@pytest.mark.oracle
@pytest.mark.parametrize("case", cases(SPEC))
def test_pytorch_agrees(case):
    """conv2d over padded maps, one group a head, as in the official code; einsum over heads."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")
    kwargs = cases(SPEC)[case]
    out, cache = multi_token_forward(**kwargs)
    dout = np.random.default_rng(5).standard_normal(out.shape)
    mine = multi_token_backward(dout, cache)
    live = torch.tensor(core.visible(kwargs["q"], kwargs["k"], **{
        n: kwargs[n] for n in ("mask", "causal", "align") if n in kwargs
    }))  # fmt: skip
    given = {
        n: torch.tensor(a, requires_grad=True)
        for n, a in kwargs.items() if isinstance(a, np.ndarray) and n != "mask"
    }  # fmt: skip

    def convolved(maps, kernel):
        flat = maps.reshape(-1, maps.shape[-3] if maps.ndim > 2 else 1, *maps.shape[-2:])
        kernel = kernel.reshape(-1, 1, *kernel.shape[-2:])
        side = kernel.shape[-1] // 2
        flat = torch.nn.functional.pad(flat, (side, side, kernel.shape[-2] - 1, 0))
        found = torch.nn.functional.conv2d(flat, kernel, groups=kernel.shape[0])
        return found.reshape(maps.shape)

    z = given["q"] @ given["k"].mT * kwargs.get("scale", kwargs["q"].shape[-1] ** -0.5)
    if "softcap" in kwargs:
        z = kwargs["softcap"] * torch.tanh(z / kwargs["softcap"])
    y = convolved(z * live, given["theta"])
    if "w_pre" in kwargs:
        y = torch.einsum("ij,bjts->bits", given["w_pre"], y)
    y = y + given.get("bias", torch.tensor(0.0))
    p = torch.softmax(y.masked_fill(~live, -1e300), -1) * live
    if "theta_post" in kwargs:
        p = convolved(p, given["theta_post"]) * live
    if "w_post" in kwargs:
        p = torch.einsum("ij,bjts->bits", given["w_post"], p) * live
    theirs = p @ given["v"]
    theirs.backward(torch.tensor(dout))
    np.testing.assert_allclose(out, theirs.detach().numpy(), rtol=0, atol=1e-13)
    for n, a in given.items():
        np.testing.assert_allclose(mine[n], a.grad.numpy(), rtol=0, atol=1e-12, err_msg=n)
