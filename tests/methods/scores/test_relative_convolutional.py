"""Relative convolutional attention: slow loop, worked example, the official shift, oracle."""

import math

import numpy as np
import pytest

import attention_ref
from attention_ref import core
from attention_ref.kit.checks import cases
from attention_ref.methods.scores.relative_convolutional import (
    conv_backward,
    conv_forward,
    relative_convolutional_backward,
    relative_convolutional_forward,
)

SPEC = attention_ref.get("scores/relative_convolutional")
softmax = attention_ref.get("scores/dot_product")
KERNELS = ("w_q", "b_q", "w_k", "w_v", "b_v")


def slow_conv(x, w, b):
    """One number at a time: (T, D) lists."""
    T, D, K = len(x), len(w), len(w[0])
    return [
        [
            float(b[d])
            + math.fsum(
                float(w[d][K - 1 - back]) * float(x[t - back][d])
                for back in range(K)
                if t - back >= 0
            )
            for d in range(D)
        ]
        for t in range(T)
    ]


def slow_relative_convolutional(
    q, k, v, R, a, u, w_q, b_q, w_k, w_v, b_v, mask=None, causal=False, align="lower_right",
    scale=None, b_k=None,
):  # fmt: skip
    """One number at a time, exponentials without any shift; with a bias of the keys too."""
    lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    T, D, S, E = q.shape[-2], q.shape[-1], k.shape[-2], v.shape[-1]
    P = R.shape[-2] // 2
    q, k, v, R, a, u = (
        np.broadcast_to(x, (*lead, *x.shape[x.ndim - n :]))
        for x, n in ((q, 2), (k, 2), (v, 2), (R, 2), (a, 1), (u, 1))
    )
    mask = None if mask is None else np.broadcast_to(mask, (*lead, T, S))
    c = 1.0 / math.sqrt(D) if scale is None else scale
    first = S - T if align == "lower_right" else 0
    out = np.zeros((*lead, T, E))
    for place in np.ndindex(*lead):
        qh = slow_conv(q[place], w_q, b_q)
        kh = slow_conv(k[place], w_k, np.zeros(D) if b_k is None else b_k)
        vh = slow_conv(v[place], w_v, b_v)
        for t in range(T):
            grown = {}
            for s in range(S):
                if (causal and s > t + first) or not (mask is None or mask[place][t, s]):
                    continue
                row = P + s - (t + first)
                z = float(a[place][row])
                for d in range(D):
                    z += (qh[t][d] + float(u[place][d])) * kh[s][d]
                    z += qh[t][d] * float(R[place][row, d])
                grown[s] = math.exp(c * z)
            total = math.fsum(grown.values())
            for x in range(E if grown else 0):
                out[place][t, x] = math.fsum(w * vh[s][x] for s, w in grown.items()) / total
    return out


@pytest.mark.parametrize("case", cases(SPEC))
def test_equals_the_slow_loop(case):
    kwargs = cases(SPEC)[case]
    out, _ = relative_convolutional_forward(**kwargs)
    np.testing.assert_allclose(out, slow_relative_convolutional(**kwargs), rtol=0, atol=1e-14)


def test_a_bias_of_the_keys_would_change_nothing():
    """The official convolution of the keys has one: a dead parameter."""
    kwargs = cases(SPEC)["causal"]
    b_k = np.array([0.7, -1.0, 2.0, 0.3])
    out, _ = relative_convolutional_forward(**kwargs)
    with_bias = slow_relative_convolutional(**kwargs, b_k=b_k)
    np.testing.assert_allclose(out, with_bias, rtol=0, atol=1e-14)


def board():
    """Queries 1 and 1, keys ln 3 and 0 after convolution, values 4 and 12; distance -1: ln 2."""
    return {
        "q": np.array([[1.0], [0.5]]), "k": np.array([[math.log(3)], [math.log(3)]]),
        "v": np.array([[4.0], [8.0]]), "R": np.zeros((4, 1)), "u": np.zeros(1),
        "a": np.array([0.0, math.log(2), 0.0, 0.0]), "w_q": np.array([[0.5, 1.0]]),
        "b_q": np.zeros(1), "w_k": np.array([[-1.0, 1.0]]), "w_v": np.array([[1.0, 1.0]]),
        "b_v": np.zeros(1), "scale": 1.0, "causal": True,
    }  # fmt: skip


def test_worked_example():
    """Second row: e^z = 3 * 2 and 1, p = 6/7 and 1/7, o = (24 + 12)/7.

    For L = o_2: dp = (4, 12), dz = 6/7 * 1/7 * (-8, 8) = (-48, 48)/49 = (-b, b). dk^ = (-b, b),
    dk = (-b - b, b) by the kernel (-1, 1); dq^_2 = -b ln 3, dq_1 half of it; dv^ = (6, 1)/7.
    """
    out, cache = relative_convolutional_forward(**board())
    np.testing.assert_allclose(cache.q[:, 0], [1.0, 1.0], rtol=1e-15)
    np.testing.assert_allclose(cache.k[:, 0], [math.log(3), 0.0], rtol=1e-15)
    np.testing.assert_allclose(cache.v[:, 0], [4.0, 12.0], rtol=1e-15)
    np.testing.assert_allclose(cache.p, [[1.0, 0.0], [6 / 7, 1 / 7]], rtol=1e-14)
    np.testing.assert_allclose(cache.lse, [math.log(3), math.log(7)], rtol=1e-14)
    np.testing.assert_allclose(out, [[4.0], [36 / 7]], rtol=1e-14)
    g = relative_convolutional_backward(np.array([[0.0], [1.0]]), cache)
    b, log3 = 48 / 49, math.log(3)
    want = {
        "q": [[-b * log3 / 2], [-b * log3]], "k": [[-2 * b], [b]], "v": [[1.0], [1 / 7]],
        "R": [[0], [-b], [b], [0]], "a": [0, -b, b, 0], "u": [-b * log3],
        "w_q": [[-b * log3, -b * log3 / 2]], "b_q": [-b * log3], "w_k": [[b * log3, 0]],
        "w_v": [[4 / 7, 32 / 7]], "b_v": [1.0],
    }  # fmt: skip
    assert set(g) == set(want)
    for name, expected in want.items():
        np.testing.assert_allclose(g[name], expected, rtol=1e-13, atol=1e-15)


def test_convolution_by_hand():
    """w = (2, 3, 5), b = 1 on 1, 10, 100, 1000; nothing before the first token."""
    x = np.array([[1.0], [10.0], [100.0], [1000.0]])
    y, _, _ = conv_forward(x, np.array([[2.0, 3.0, 5.0]]), np.ones(1))
    np.testing.assert_array_equal(y[:, 0], [6.0, 54.0, 533.0, 5321.0])
    dx, dw, db = conv_backward(
        np.array([[1.0], [0.0], [7.0], [0.0]]), x, np.array([[2.0, 3.0, 5.0]])
    )
    np.testing.assert_array_equal(dx[:, 0], [5 + 14, 21, 35, 0])
    np.testing.assert_array_equal(dw, [[7.0, 70.0, 701.0]])
    np.testing.assert_array_equal(db, [8.0])


def test_convolution_shares_its_kernel_over_heads_and_batch():
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, 3, 5, 7, 4))
    w, b = rng.standard_normal((4, 3)), rng.standard_normal(4)
    y, _, _ = conv_forward(x, w, b)
    _, dw, db = conv_backward(dy, x, w)
    parts = [conv_backward(dy[i], x[i], w) for i in np.ndindex(3, 5)]
    for i in np.ndindex(3, 5):
        np.testing.assert_array_equal(conv_forward(x[i], w, b)[0], y[i])
    np.testing.assert_allclose(dw, sum(part[1] for part in parts), rtol=0, atol=1e-13)
    np.testing.assert_allclose(db, sum(part[2] for part in parts), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("T", "S"), [(5, 5), (3, 6), (6, 4), (1, 7)])
def test_tables_are_indexed_as_in_the_official_shift(T, S):
    """Rows P - S to P + T, a column of zeros, reshaped and cut: row P + j - (i + S - T)."""
    rng, P, D = np.random.default_rng(T + S), 9, 3
    kwargs = {"k": np.zeros((S, D)), "v": np.zeros((S, 2)), "R": rng.standard_normal((2 * P, D))}
    kwargs |= {"a": rng.standard_normal(2 * P), "u": np.zeros(D), "q": rng.standard_normal((T, D))}
    one = np.eye(1)[[0, 0, 0]]
    kwargs |= {"w_q": one, "b_q": np.zeros(D), "w_k": one, "w_v": one[:2], "b_v": np.zeros(2)}
    _, cache = relative_convolutional_forward(**kwargs, scale=1.0)
    wide = kwargs["q"] @ kwargs["R"][P - S : P + T].T + kwargs["a"][P - S : P + T]
    padded = np.concatenate([wide, np.zeros((T, 1))], axis=1)
    shifted = padded.reshape(S + T + 1, T)[:-1].reshape(T, S + T)[:, -S:]
    np.testing.assert_allclose(cache.z, shifted, rtol=0, atol=1e-14)


def plain(kwargs):
    """Without convolution: kernels of 1, biases 0."""
    one = {n: np.ones((len(kwargs[n]), 1)) for n in ("w_q", "w_k", "w_v")}
    return kwargs | one | {n: np.zeros_like(kwargs[n]) for n in ("b_q", "b_v")}


@pytest.mark.parametrize("case", ["causal", "causal-upper-left", "mask", "long-queries"])
def test_content_distance_and_bias_are_three_attentions(case):
    """a is a bias c a_{s-t}; u and R are vectors added to queries and keys."""
    kwargs = plain(cases(SPEC)[case])
    c, P = kwargs["scale"], kwargs["R"].shape[-2] // 2
    T, S = kwargs["q"].shape[-2], kwargs["k"].shape[-2]
    first = 0 if kwargs.get("align") else S - T
    rows = P + np.arange(S) - np.arange(T)[:, None] - first
    rest = {n: x for n, x in kwargs.items() if n not in (*KERNELS, "R", "a", "u")}
    bias = c * (
        kwargs["a"][:, rows] + np.sum(kwargs["q"][0][:, :, None] * kwargs["R"][:, rows], -1)
    )
    out, cache = relative_convolutional_forward(**kwargs)
    rest["q"] = rest["q"] + kwargs["u"][:, None, :]
    theirs, hers = softmax.forward(**rest, bias=bias)
    np.testing.assert_allclose(out, theirs, rtol=0, atol=1e-14)
    np.testing.assert_allclose(cache.lse, hers.lse, rtol=0, atol=1e-14)


def test_a_number_for_all_distances_changes_nothing():
    kwargs = cases(SPEC)["mask"]
    out, cache = relative_convolutional_forward(**kwargs)
    shifted, _ = relative_convolutional_forward(**(kwargs | {"a": kwargs["a"] + 3.0}))
    np.testing.assert_allclose(shifted, out, rtol=0, atol=1e-14)
    g = relative_convolutional_backward(np.ones_like(out), cache)
    np.testing.assert_allclose(np.sum(g["a"], axis=-1), 0.0, rtol=0, atol=1e-14)


def without_heads(kwargs):
    """The second head alone, without an axis of heads."""
    first = {n: kwargs[n][0, 1] for n in "qkv"} | {n: kwargs[n][1] for n in ("R", "a", "u")}
    return kwargs | first


def test_one_head_needs_no_axis_of_heads():
    kwargs = cases(SPEC)["causal"]
    out, cache = relative_convolutional_forward(**kwargs)
    alone, other = relative_convolutional_forward(**without_heads(kwargs))
    np.testing.assert_allclose(alone, out[0, 1], rtol=0, atol=1e-15)
    dout = np.zeros_like(out)
    dout[0, 1] = np.random.default_rng(4).standard_normal(alone.shape)
    whole, g = (
        relative_convolutional_backward(d, c) for d, c in ((dout, cache), (dout[0, 1], other))
    )
    for n in ("q", "k", "v"):
        np.testing.assert_allclose(g[n], whole[n][0, 1], rtol=0, atol=1e-14)
    for n in ("R", "a", "u"):
        np.testing.assert_allclose(g[n], whole[n][1], rtol=0, atol=1e-14)
    for n in KERNELS:
        np.testing.assert_allclose(g[n], whole[n], rtol=0, atol=1e-14)


def test_moving_a_text_moves_its_outputs():
    """With zeros before it, masked: only differences of places count."""
    kwargs = without_heads(cases(SPEC)["causal"])
    q, k, v = (kwargs[n][:5] for n in "qkv")
    moved = {
        n: np.concatenate([np.zeros((2, x.shape[1])), x])
        for n, x in zip("qkv", (q, k, v), strict=True)
    }
    mask = np.arange(7) >= 2
    out, _ = relative_convolutional_forward(**(kwargs | {"q": q, "k": k, "v": v}))
    later, _ = relative_convolutional_forward(**(kwargs | moved), mask=mask)
    np.testing.assert_allclose(later[2:], out, rtol=0, atol=1e-14)


def test_a_hidden_key_reaches_the_next_ones_through_the_convolution():
    kwargs = cases(SPEC)["long-queries"] | {"mask": np.arange(5) != 2}
    assert kwargs["w_k"].shape[1] == 3
    k = kwargs["k"].copy()
    k[..., 2, :] += 1.0
    out, changed = (
        relative_convolutional_forward(**(kwargs | {"k": x}))[0] for x in (kwargs["k"], k)
    )
    assert np.max(np.abs(changed - out)) > 1e-3
    alone = plain(kwargs)
    out, same = (relative_convolutional_forward(**(alone | {"k": x}))[0] for x in (kwargs["k"], k))
    np.testing.assert_array_equal(same, out)


def test_all_hidden_and_all_seen():
    kwargs = cases(SPEC)["mask"]
    full = np.ones((5, 7), bool)
    free = {n: x for n, x in kwargs.items() if n != "mask"}
    np.testing.assert_array_equal(
        relative_convolutional_forward(**free, mask=full)[0],
        relative_convolutional_forward(**free)[0],
    )
    full[3] = False
    out, cache = relative_convolutional_forward(**free, mask=full)
    assert not np.any(out[..., 3, :]) and np.all(cache.lse[..., 3] == -np.inf)
    dout = np.zeros_like(out)
    dout[..., 3, :] = 1.0
    assert not any(np.any(g) for g in relative_convolutional_backward(dout, cache).values())
    out, cache = relative_convolutional_forward(**free, mask=full, empty_row="uniform")
    np.testing.assert_allclose(out[..., 3, :], cache.v.mean(-2), rtol=0, atol=1e-15)
    out, _ = relative_convolutional_forward(**free, mask=full, empty_row="nan")
    assert np.all(np.isnan(out[..., 3, :])) and np.sum(np.isnan(out)) == 6
    with pytest.raises(core.errors.ParameterError, match="mask"):
        relative_convolutional_forward(**free, mask=full, empty_row="raise")


def test_a_nan_reaches_as_far_as_its_kernel():
    """Queries: K rows. Keys: the queries that see one of the K keys. Gradients stay finite."""
    kwargs = cases(SPEC)["causal-upper-left"]  # query t sees the keys up to t
    clean, clean_cache = relative_convolutional_forward(**kwargs)
    for name, place, bad, K in (("q", 1, np.nan, 3), ("k", 3, np.inf, 2), ("v", 3, np.nan, 3)):
        x = kwargs[name].copy()
        x[..., place, 0] = bad
        assert kwargs[f"w_{name}"].shape[1] == K
        rows = np.zeros(5, bool)
        rows[slice(1, 1 + K) if name == "q" else slice(3, 5)] = True
        out, cache = relative_convolutional_forward(**(kwargs | {name: x}))
        assert np.array_equal(np.isnan(out[0, 0]).all(-1), rows)
        np.testing.assert_array_equal(out[..., ~rows, :], clean[..., ~rows, :])
        assert np.array_equal(np.isnan(cache.lse[0, 0]), rows)
        dout = np.random.default_rng(1).standard_normal(out.shape)
        g = relative_convolutional_backward(dout, cache)
        dout[..., rows, :] = 0.0
        for n, want in relative_convolutional_backward(dout, clean_cache).items():
            np.testing.assert_allclose(g[n], want, rtol=0, atol=1e-13)


def test_a_nan_behind_the_mask_and_its_kernel_reaches_nothing():
    kwargs = cases(SPEC)["long-queries"] | {"mask": np.arange(5) < 4}
    clean, _ = relative_convolutional_forward(**kwargs)
    for name in "kv":
        x = kwargs[name].copy()
        x[..., 4, :] = np.nan
        out, cache = relative_convolutional_forward(**(kwargs | {name: x}))
        np.testing.assert_array_equal(out, clean)
        g = relative_convolutional_backward(np.ones_like(out), cache)
        assert all(np.all(np.isfinite(d)) for d in g.values())


def test_non_finite_parameters():
    """A distance poisons the pairs that use it, u its head, a kernel everything."""
    kwargs = cases(SPEC)["causal"]
    clean, _ = relative_convolutional_forward(**kwargs)
    P = kwargs["R"].shape[-2] // 2
    for name, place, rows in (
        ("R", (0, P - 5, 1), [3, 4]), ("a", (0, P - 5), [3, 4]), ("a", (0, P + 1), []),
        ("u", (0, 2), [0, 1, 2, 3, 4]),
    ):  # fmt: skip
        x = kwargs[name].copy()
        x[place] = np.nan
        out, cache = relative_convolutional_forward(**(kwargs | {name: x}))
        assert np.flatnonzero(np.isnan(out[0, 0, :, 0])).tolist() == rows
        np.testing.assert_array_equal(out[0, 1], clean[0, 1])
        g = relative_convolutional_backward(np.ones_like(out), cache)
        assert all(np.all(np.isfinite(d)) for d in g.values())
    for name in KERNELS:
        x = kwargs[name].copy()
        x[-1] = np.inf
        out, cache = relative_convolutional_forward(**(kwargs | {name: x}))
        assert np.all(np.isnan(out))
        g = relative_convolutional_backward(np.ones_like(out), cache)
        assert not any(np.any(d) for d in g.values())


def test_broadcast_tables_and_values():
    """One table for both heads; values of two batches with one set of weights."""
    kwargs = cases(SPEC)["plain"]
    shared = {n: kwargs[n][:1] for n in ("R", "a", "u")}
    out, cache = relative_convolutional_forward(**(kwargs | shared))
    twice = {n: np.concatenate([x, x]) for n, x in shared.items()}
    same, other = relative_convolutional_forward(**(kwargs | twice))
    np.testing.assert_array_equal(out, same)
    dout = np.random.default_rng(2).standard_normal(out.shape)
    g, h = (relative_convolutional_backward(dout, c) for c in (cache, other))
    for n in shared:
        assert g[n].shape == shared[n].shape
        np.testing.assert_allclose(g[n][0], h[n].sum(0), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"R": np.ones((2, 15, 4))}, core.errors.ShapeError, "R has N = 15|a has N"),
        ({"R": np.ones((2, 10, 4)), "a": np.ones((2, 10))}, core.errors.ShapeError,
         "R has 10 rows, expected an even number 2P with P >= 6, the longer"),
        ({"R": np.ones((2, 15, 4)), "a": np.ones((2, 15))}, core.errors.ShapeError,
         "R has 15 rows, expected an even number"),
        ({"a": np.ones((3, 2, 14))}, core.errors.ShapeError, r"a \(3, 2, 14\).* axes \(1, 2\)"),
        ({"w_k": np.ones((4, 0))}, core.errors.ShapeError, "expected kernels of length 1 or more"),
        ({"w_q": np.ones((3, 3))}, core.errors.ShapeError, "w_q has D = 3"),
        ({"b_v": np.ones(4)}, core.errors.ShapeError, "b_v has E = 4"),
        ({"u": [0.0]}, core.errors.DTypeError, "u is a list"),
        ({"align": "left"}, core.errors.ParameterError, "align is 'left'"),
    ],
)  # fmt: skip
def test_errors_name_argument_and_expectation(change, error, says):
    with pytest.raises(error, match=says):
        relative_convolutional_forward(**(cases(SPEC)["plain"] | change))


def test_tables_of_exactly_the_length_are_enough():
    kwargs = cases(SPEC)["plain"]
    fits = {n: kwargs[n][:, 1:13] for n in ("R", "a")}
    P = kwargs["R"].shape[1] // 2
    assert P == 7
    out, _ = relative_convolutional_forward(**(kwargs | fits))
    np.testing.assert_array_equal(out, relative_convolutional_forward(**kwargs)[0])


def test_a_foreign_cotangent_is_refused():
    out, cache = relative_convolutional_forward(**cases(SPEC)["plain"])
    with pytest.raises(core.errors.ShapeError, match="dout has shape"):
        relative_convolutional_backward(out[0], cache)


@pytest.mark.oracle
@pytest.mark.parametrize("case", cases(SPEC))
def test_pytorch_agrees(case):
    """conv1d with groups and cut ends, the tables gathered by an index."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")
    kwargs = cases(SPEC)[case]
    names = ("q", "k", "v", "R", "a", "u", *KERNELS)
    given = {n: torch.tensor(kwargs[n], requires_grad=True) for n in names}

    def conv(x, w, b):
        T, D = x.shape[-2:]
        flat = x.reshape(-1, T, D).mT
        y = torch.nn.functional.conv1d(flat, w[:, None], b, padding=w.shape[1] - 1, groups=D)
        return y[..., :T].mT.reshape(x.shape)

    q = conv(given["q"], given["w_q"], given["b_q"])
    k = conv(given["k"], given["w_k"], None)
    v = conv(given["v"], given["w_v"], given["b_v"])
    T, S, P = q.shape[-2], k.shape[-2], given["R"].shape[-2] // 2
    first = 0 if kwargs.get("align") == "upper_left" else S - T
    rows = torch.arange(S)[None] - torch.arange(T)[:, None] - first + P
    z = (q + given["u"][..., None, :]) @ k.mT + given["a"][..., rows]
    z = z + torch.einsum("...td,...tsd->...ts", q, given["R"][..., rows, :])
    z = z * kwargs.get("scale", q.shape[-1] ** -0.5)
    rule = {n: kwargs[n] for n in ("mask", "causal", "align") if n in kwargs}
    live = torch.tensor(core.visible(kwargs["q"], kwargs["k"], **rule)).expand(z.shape)
    p = torch.softmax(z.masked_fill(~live, -1e300), -1) * live
    theirs = p @ v
    out, cache = relative_convolutional_forward(**kwargs)
    np.testing.assert_allclose(out, theirs.detach().numpy(), rtol=0, atol=1e-14)
    dout = np.random.default_rng(5).standard_normal(out.shape)
    theirs.backward(torch.tensor(dout))
    for n, g in relative_convolutional_backward(dout, cache).items():
        np.testing.assert_allclose(g, given[n].grad.numpy(), rtol=0, atol=1e-13)
