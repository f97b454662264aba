"""Relative position scores: slow loop, worked examples, buckets, identities, lengths, oracle."""

import math

import numpy as np
import pytest

import attention_ref
from attention_ref import core
from attention_ref.kit.checks import cases
from attention_ref.methods.scores.relative_bias import (
    relative_bias_backward,
    relative_bias_forward,
    t5_bucket,
)

SPEC = attention_ref.get("scores/relative_bias")
ALIBI = attention_ref.get("scores/alibi")


EQUIVALENT = {
    "t5_bucket: 1  ->  2 (2)": "the search ends at max_distance at the latest",
    "t5_bucket: np.where(far >= edge, 1, 0)  ->  np.where(1, far >= edge, 0)": "True counts as 1",
    "rows_forward: np.clip(r, -K, K)  ->  np.clip(-K, r, K)": "the larger of r and -K, at most K",
    "rows_forward: rows = np.zeros_like(q, shape=(given['table'].shape[-1], q.shape[-1]))  ->  "
    "rows = -np.zeros_like(q, shape=(given['table'].shape[-1], q.shape[-1]))": "zeros",
    "rows_forward: 0  ->  1 (3)": "only without queries and without keys",
}


def slow_bucket(r, buckets, max_distance, bidirectional):
    """The floor of a logarithm, in double precision and away from its steps."""
    start = 0
    if bidirectional:
        buckets //= 2
        start = buckets if r > 0 else 0
        n = -r if r < 0 else r
    else:
        n = -r if r < 0 else 0
    exact = buckets // 2
    if n < exact:
        return start + n
    log = math.log(n / exact) / math.log(max_distance / exact)
    return start + min(exact + math.floor(log * (buckets - exact) + 1e-9), buckets - 1)


def slow_relative_bias(
    q, k, v, aK=None, aV=None, Wr=None, u=None, w=None, table=None, variant="shaw",
    bidirectional=None, max_distance=128, mask=None, causal=False, align="lower_right", scale=None,
    bias=None,
):  # fmt: skip
    """One pair of tokens at a time; every pair builds its own vector of the distance."""
    T, D, S, E = q.shape[-2], q.shape[-1], k.shape[-2], v.shape[-1]
    lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    wide = {"q": (q, (T, D)), "k": (k, (S, D)), "v": (v, (S, E)), "mask": (mask, (T, S)),
            "bias": (bias, (T, S)), "u": (u, (D,)), "w": (w, (D,))}  # fmt: skip
    for name, x in (("aK", aK), ("aV", aV), ("Wr", Wr)):
        wide[name] = (x, None if x is None else x.shape[-2:])
    wide["table"] = (table, None if table is None else table.shape[-1:])
    full = {n: None if x is None else np.broadcast_to(x, (*lead, *s)) for n, (x, s) in wide.items()}
    c = scale if scale is not None else 1.0 if variant == "t5" else 1.0 / math.sqrt(D)
    first = S - T if align == "lower_right" else 0
    two = bidirectional if bidirectional is not None else not causal
    out = np.zeros((*lead, T, E))
    for place in np.ndindex(*lead):
        x = {n: None if a is None else a[place] for n, a in full.items()}
        for t in range(T):
            score, row = {}, {}
            for s in range(S):
                r = s - t - first
                if (causal and r > 0) or (mask is not None and not x["mask"][t, s]):
                    continue
                z = math.fsum(float(x["q"][t, d]) * float(x["k"][s, d]) for d in range(D))
                if variant == "shaw":
                    K = aK.shape[-2] // 2
                    row[s] = max(-K, min(K, r)) + K
                    z += math.fsum(x["q"][t, d] * x["aK"][row[s], d] for d in range(D))
                elif variant == "transformer_xl":
                    M = Wr.shape[-2]
                    for d in range(D):
                        far = 0.0
                        for m in range(M // 2):
                            angle = -r / 10000.0 ** (2 * m / M)
                            far += math.sin(angle) * x["Wr"][m, d]
                            far += math.cos(angle) * x["Wr"][M // 2 + m, d]
                        z += (x["q"][t, d] + (x["w"][d] if w is not None else 0.0)) * far
                        z += x["u"][d] * x["k"][s, d] if u is not None else 0.0
                z *= c
                if variant == "t5":
                    z += x["table"][slow_bucket(r, table.shape[-1], max_distance, two)]
                score[s] = z + (float(x["bias"][t, s]) if bias is not None else 0.0)
            if not score:
                continue
            top = max(score.values())
            weight = {s: math.exp(z - top) for s, z in score.items()}
            total = math.fsum(weight.values())
            for e in range(E):
                for s, y in weight.items():
                    value = float(x["v"][s, e])
                    if aV is not None:
                        value += float(x["aV"][row[s], e])
                    out[place][t, e] += y / total * value
    return out


@pytest.mark.parametrize("case", cases(SPEC))
def test_equals_the_slow_loop(case):
    kwargs = cases(SPEC)[case]
    out, _ = relative_bias_forward(**kwargs)
    np.testing.assert_allclose(out, slow_relative_bias(**kwargs), rtol=0, atol=1e-14)


# ------------------------------------------------------------------------------ worked examples

L3 = math.log(3.0)
ONE = {"k": np.zeros((2, 1)), "v": np.array([[4.0], [8.0]]), "causal": True, "scale": 1.0}
"""One query at the second of two keys: distances -1 and 0; scores ln 3 apart give 1/4, 3/4."""


def test_worked_example_shaw():
    """Weights 1/4, 3/4; values 4 + 2 and 8 + 0; out 7.5; dz = (1/4) (6 - 7.5) = -3/8 and 3/8."""
    kwargs = ONE | {"q": np.ones((1, 1)), "aK": np.array([[0.0], [L3], [9.0]])}
    out, cache = relative_bias_forward(**kwargs, aV=np.array([[2.0], [0.0], [9.0]]))
    np.testing.assert_array_equal(cache.place, [[0, 1]])
    np.testing.assert_allclose(cache.p, [[0.25, 0.75]], rtol=1e-15)
    np.testing.assert_allclose(cache.pooled, [[0.25, 0.75, 0.0]], rtol=1e-15)
    np.testing.assert_allclose(out, [[7.5]], rtol=1e-15)
    np.testing.assert_allclose(cache.lse, [math.log(4.0)], rtol=1e-15)
    g = relative_bias_backward(np.ones((1, 1)), cache)
    np.testing.assert_allclose(g["aV"], [[0.25], [0.75], [0.0]], rtol=1e-15)
    np.testing.assert_allclose(g["aK"], [[-0.375], [0.375], [0.0]], rtol=1e-14)
    np.testing.assert_allclose(g["k"], [[-0.375], [0.375]], rtol=1e-14)
    np.testing.assert_allclose(g["q"], [[0.375 * L3]], rtol=1e-14)
    assert set(g) == {"q", "k", "v", "aK", "aV"}


def test_worked_example_transformer_xl():
    """M = 2: R_1 = (sin 1, cos 1), R_0 = (0, 1); dz = (-3/4, 3/4), dWr = sum_d dz R_d."""
    kwargs = ONE | {"q": np.zeros((1, 1)), "k": np.array([[2.0], [2.0]])}
    Wr = np.array([[-L3 / math.sin(1.0)], [0.0]])
    out, cache = relative_bias_forward(
        **kwargs, Wr=Wr, u=np.array([5.0]), w=np.ones(1), variant="transformer_xl"
    )
    np.testing.assert_allclose(cache.sinusoid, [[0, 1], [math.sin(1.0), math.cos(1.0)]], rtol=1e-15)
    np.testing.assert_allclose(cache.p, [[0.25, 0.75]], rtol=1e-14)
    np.testing.assert_allclose(out, [[7.0]], rtol=1e-14)
    np.testing.assert_allclose(cache.lse, [10 + math.log(4.0 / 3.0)], rtol=1e-15)
    g = relative_bias_backward(np.ones((1, 1)), cache)
    want = [[-0.75 * math.sin(1.0)], [0.75 * (1 - math.cos(1.0))]]
    np.testing.assert_allclose(g["Wr"], want, rtol=1e-13)
    np.testing.assert_allclose(g["w"], [0.75 * L3], rtol=1e-13)
    np.testing.assert_allclose(g["u"], [0.0], atol=1e-14)
    np.testing.assert_allclose(g["k"], [[-0.75 * 5], [0.75 * 5]], rtol=1e-13)


def test_worked_example_t5_and_its_scale():
    """No scale by default: q.k = 1 and 2 count whole; the table makes up for it."""
    kwargs = {"q": np.ones((1, 4)), "k": np.ones((2, 4)) * [[0.25], [0.5]], "v": ONE["v"]}
    table = np.array([L3 - 1.0, 0.0, 7.0, 7.0])
    out, cache = relative_bias_forward(**kwargs, table=table, variant="t5", causal=True)
    np.testing.assert_allclose(cache.p, [[0.25, 0.75]], rtol=1e-14)
    np.testing.assert_allclose(out, [[7.0]], rtol=1e-14)
    g = relative_bias_backward(np.ones((1, 1)), cache)
    np.testing.assert_allclose(g["table"], [0.75, -0.75, 0.0, 0.0], rtol=1e-13)
    np.testing.assert_allclose(g["k"], [[-0.75] * 4, [0.75] * 4], rtol=1e-13)


# ------------------------------------------------------------------------------ buckets

DISTANCES = np.array([-200, -64, -20, -8, -1, 0, 1, 8, 128])


def test_buckets_of_the_default():
    both = [15, 14, 10, 8, 1, 0, 17, 24, 31]
    past = [31, 26, 17, 8, 1, 0, 0, 0, 0]
    assert t5_bucket(DISTANCES).tolist() == both
    assert t5_bucket(DISTANCES, bidirectional=False).tolist() == past
    q = np.zeros((200, 1))
    _, cache = relative_bias_forward(q, q, q, table=np.zeros(32), variant="t5")
    assert [int(cache.place[100, 100 + r]) for r in (-64, -20, -8, -1, 0, 1, 8)] == both[1:8]
    assert cache.place[0, [15, 16, 90, 91]].tolist() == [25, 26, 30, 31]


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("sizes", [(32, 128), (8, 6), (7, 20), (4, 3), (12, 40)])
def test_buckets_equal_the_logarithm(sizes, bidirectional):
    r = np.arange(-300, 301)
    want = [slow_bucket(int(x), *sizes, bidirectional) for x in r]
    assert t5_bucket(r, *sizes, bidirectional).tolist() == want


def test_buckets_equal_a_logarithm_in_float32():
    """What the official code computes, for the sizes it is used with."""
    n = np.arange(8, 10001)
    for exact in (8, 16):
        log = np.log(n.astype(np.float32) / np.float32(exact)) / np.float32(math.log(128 / exact))
        theirs = np.minimum(exact + (log * np.float32(exact)).astype(np.int32), 2 * exact - 1)
        mine = t5_bucket(-n, 32, 128, exact == 8)
        np.testing.assert_array_equal(mine, np.where(n < exact, n, theirs))


# ------------------------------------------------------------------------------ identities


def test_t5_with_a_bucket_a_token_is_alibi():
    """Tables that fall by a slope a bucket, all distances in the exact half: outputs, gradients."""
    kwargs = cases(SPEC)["causal-upper-left"] | {"max_distance": 128}
    m = np.array([0.3, 0.8])
    kwargs["table"] = -m[:, None] * np.arange(16)
    out, cache = relative_bias_forward(**kwargs)
    content = {n: kwargs[n] for n in ("q", "k", "v", "causal", "align", "bias", "scale")}
    other, theirs = ALIBI.forward(**content, m=m)
    np.testing.assert_allclose(out, other, rtol=0, atol=1e-14)
    dout = np.random.default_rng(0).standard_normal(out.shape)
    g, h = relative_bias_backward(dout, cache), ALIBI.backward(dout, theirs)
    for name in ("q", "k", "v", "bias"):
        np.testing.assert_allclose(g[name], h[name], rtol=0, atol=1e-13)
    np.testing.assert_allclose(-g["table"] @ np.arange(16), h["m"], rtol=0, atol=1e-13)


def test_shaw_is_attention_over_moved_keys_and_values():
    """For one query the tables only move its keys and values."""
    kwargs = cases(SPEC)["no-heads"]
    dot = attention_ref.get("scores/dot_product")
    out, _ = relative_bias_forward(**kwargs)
    for t in range(5):
        row = np.clip(np.arange(7) - t - 2, -2, 2) + 2
        moved = {"k": kwargs["k"] + kwargs["aK"][row], "v": kwargs["v"] + kwargs["aV"][row]}
        want, _ = dot.forward(kwargs["q"][t : t + 1], **moved)
        np.testing.assert_allclose(out[t : t + 1], want, rtol=0, atol=1e-14)


def test_the_shift_of_transformer_xl_is_an_index():
    """Pad a column, reshape, drop a row: the picked entries, below the causal diagonal."""
    rng = np.random.default_rng(1)
    T, S = 4, 6
    g = rng.standard_normal((T, S))  # column n holds the distance S - 1 - n
    padded = np.concatenate([np.zeros((T, 1)), g], axis=1)
    shifted = padded.reshape(S + 1, T)[1:].reshape(T, S)
    for t in range(T):
        for s in range(t + S - T + 1):
            assert shifted[t, s] == g[t, S - 1 - (t + S - T - s)]
    q, k, v = (rng.standard_normal((n, 4)) for n in (T, S, S))
    Wr = rng.standard_normal((6, 4))
    _, cache = relative_bias_forward(q, k, v, Wr=Wr, variant="transformer_xl", causal=True)
    distance = np.arange(S - 1, -1, -1.0)[:, None] * 10000 ** (-np.arange(0, 6, 2) / 6)
    g = q @ (np.concatenate([np.sin(distance), np.cos(distance)], 1) @ Wr).T
    shifted = np.concatenate([np.zeros((T, 1)), g], 1).reshape(S + 1, T)[1:].reshape(T, S)
    z = np.where(cache.live, (q @ k.T + shifted) / 2, -np.inf)
    p = np.exp(z) / np.sum(np.exp(z), axis=-1, keepdims=True)
    np.testing.assert_allclose(cache.p, p, rtol=0, atol=1e-14)


@pytest.mark.parametrize("case", ["no-heads", "causal", "causal-upper-left"])
def test_only_differences_of_places_count(case):
    """Tokens before the first, hidden: nothing changes, whatever the length."""
    kwargs = {n: a for n, a in cases(SPEC)[case].items() if n not in ("align", "bias")}
    out, _ = relative_bias_forward(**kwargs)
    more = np.random.default_rng(2).standard_normal(kwargs["k"].shape)
    longer = kwargs | {n: np.concatenate([more[..., : kwargs[n].shape[-1]], kwargs[n]], -2)
                       for n in "kv"}  # fmt: skip
    mask = np.arange(14) >= 7
    found, _ = relative_bias_forward(**longer, mask=np.broadcast_to(mask, (5, 14)))
    np.testing.assert_allclose(found, out, rtol=0, atol=1e-14)


def test_without_aV_the_weights_mix_the_values_alone():
    kwargs = cases(SPEC)["bias"]
    _, cache = relative_bias_forward(**kwargs)
    assert cache.pooled is None
    np.testing.assert_allclose(np.sum(cache.p, -1), 1.0, rtol=1e-14)
    same, _ = relative_bias_forward(**(kwargs | {"v": np.full((2, 6, 3), 1.5)}))
    np.testing.assert_allclose(same, 1.5, rtol=1e-14)


def test_u_and_w_are_queries_that_all_share():
    """xl with w = u is xl on the queries q + u."""
    kwargs = cases(SPEC)["causal"]
    u = kwargs["u"]
    out, cache = relative_bias_forward(**(kwargs | {"w": u}))
    plain = {n: a for n, a in kwargs.items() if n not in "uw"}
    moved, theirs = relative_bias_forward(**(plain | {"q": kwargs["q"] + u[:, None, :]}))
    np.testing.assert_allclose(out, moved, rtol=0, atol=1e-14)
    dout = np.random.default_rng(3).standard_normal(out.shape)
    g, h = relative_bias_backward(dout, cache), relative_bias_backward(dout, theirs)
    np.testing.assert_allclose(g["u"] + g["w"], np.sum(h["q"], axis=(0, -2)), rtol=0, atol=1e-13)
    assert set(h) == {"q", "k", "v", "Wr"}


def test_direction_of_the_buckets_can_be_chosen():
    """A causal model with buckets for both directions leaves the second half untouched."""
    kwargs = cases(SPEC)["causal-upper-left"] | {"bidirectional": True}
    out, cache = relative_bias_forward(**kwargs)
    g = relative_bias_backward(np.ones_like(out), cache)
    assert not np.any(g["table"][:, 4:]) and np.any(g["table"][:, :4])
    assert np.any(out != relative_bias_forward(**(kwargs | {"bidirectional": False}))[0])
    default = {n: a for n, a in kwargs.items() if n != "bidirectional"}
    same, _ = relative_bias_forward(**default, mask=np.ones((5, 7), bool))
    np.testing.assert_array_equal(
        same, relative_bias_forward(**(default | {"bidirectional": False}))[0]
    )


# ------------------------------------------------------------------------------ special values


def test_heads_may_come_from_the_parameters_alone():
    kwargs = cases(SPEC)["no-heads"]
    content = {n: kwargs[n] for n in "qkv"}
    table = np.random.default_rng(4).standard_normal((2, 8))
    out, cache = relative_bias_forward(**content, table=table, variant="t5", max_distance=6)
    assert out.shape == (2, 5, 3)
    dout = np.random.default_rng(5).standard_normal(out.shape)
    g, total = relative_bias_backward(dout, cache), 0.0
    for h in range(2):
        one, c = relative_bias_forward(**content, table=table[h], variant="t5", max_distance=6)
        np.testing.assert_allclose(one, out[h], rtol=0, atol=1e-15)
        part = relative_bias_backward(dout[h], c)
        np.testing.assert_allclose(g["table"][h], part["table"], rtol=0, atol=1e-14)
        total = total + part["q"]
    np.testing.assert_allclose(g["q"], total, rtol=0, atol=1e-14)
    heads = np.stack([kwargs["aV"], 2 * kwargs["aV"]])
    out, cache = relative_bias_forward(**(kwargs | {"aV": heads}))
    g = relative_bias_backward(np.ones_like(out), cache)
    assert out.shape == (2, 5, 3) and g["aV"].shape == (2, 5, 3) and g["v"].shape == (7, 3)


def test_an_empty_row_gets_no_relative_value_either():
    kwargs = cases(SPEC)["plain"]
    mask = np.ones((5, 6), bool)
    mask[2] = False
    for how, want in (("zero", 0.0), ("uniform", np.mean(kwargs["v"], axis=-2))):
        out, cache = relative_bias_forward(**kwargs, mask=mask, empty_row=how)
        np.testing.assert_allclose(out[:, 2], want + 0 * out[:, 2], rtol=0, atol=1e-15)
        assert not np.any(cache.pooled[:, 2])
    out, cache = relative_bias_forward(**kwargs, mask=mask, empty_row="nan")
    assert np.all(np.isnan(out[:, 2])) and np.all(np.isnan(cache.lse[:, 2]))


def test_a_bias_or_a_table_of_nan_poisons_what_sees_it():
    kwargs = cases(SPEC)["bias"]
    bad = kwargs["bias"].copy()
    bad[1, 2, 3] = np.nan
    out, cache = relative_bias_forward(**(kwargs | {"bias": bad}))
    assert np.all(np.isnan(out[1, 2])) and np.sum(np.isnan(out)) == 3
    assert np.isnan(cache.lse[1, 2]) and np.sum(np.isnan(cache.lse)) == 1
    g = relative_bias_backward(np.ones_like(out), cache)
    assert all(np.all(np.isfinite(x)) for x in g.values())
    kwargs = cases(SPEC)["causal-upper-left"]
    table = kwargs["table"].copy()
    table[0, 3] = np.nan  # distance 3: rows 3 and 4 of head 0
    out, _ = relative_bias_forward(**(kwargs | {"table": table}))
    assert np.argwhere(np.isnan(out[..., 0])).tolist() == [[0, 0, 3], [0, 0, 4]]
    table[0, 3] = -np.inf
    _, cache = relative_bias_forward(**(kwargs | {"table": table}))
    assert cache.p[0, 0, 3, 0] == 0.0 == cache.p[0, 0, 4, 1]


@pytest.mark.parametrize(
    ("case", "change", "error", "says"),
    [
        ("plain", {"variant": "show"}, "Parameter", "did you mean 'shaw'"),
        ("plain", {"variant": "t5"}, "Parameter", r"variant is 't5' with \['aK', 'aV'\]"),
        ("plain", {"aK": None}, "Parameter", r"expected aK, optionally \['aV'\]"),
        ("plain", {"table": np.ones(8)}, "Parameter", r"\['aK', 'aV', 'table'\]"),
        ("plain", {"aK": np.ones((4, 4)), "aV": None}, "Shape", r"2 K \+ 1 rows"),
        ("plain", {"aV": np.ones((3, 3))}, "Shape", "aV has N = 3"),
        ("plain", {"aK": np.ones((5, 3))}, "Shape", "aK has D = 3"),
        ("causal", {"Wr": np.ones((5, 4))}, "Shape", "an even number"),
        ("causal", {"Wr": np.ones((0, 4))}, "Shape", "an even number"),
        ("causal", {"u": np.ones(3)}, "Shape", "u has D = 3"),
        ("packed", {"table": np.ones(3)}, "Shape", "4 to 23 buckets"),
        ("causal-upper-left", {"table": np.ones(1)}, "Shape", "2 to 11 buckets"),
        ("causal-upper-left", {"table": np.ones(12)}, "Shape", "2 to 11 buckets"),
        ("packed", {"max_distance": 1}, "Parameter", "max_distance is 1"),
    ],
)
def test_errors(case, change, error, says):
    with pytest.raises(getattr(core.errors, error + "Error"), match=says):
        relative_bias_forward(**(cases(SPEC)[case] | change))


def test_the_smallest_tables_pass():
    rng = np.random.default_rng(6)
    q = rng.standard_normal((3, 2))
    for given in (
        {"aK": np.ones((1, 2))}, {"Wr": np.ones((2, 2)), "variant": "transformer_xl"},
        {"table": np.ones(2), "variant": "t5", "causal": True},
        {"table": np.ones(4), "variant": "t5"}, {"table": np.ones(7), "variant": "t5"} |
        {"max_distance": 2}, {"table": np.ones(3), "variant": "t5", "causal": True},
    ):  # fmt: skip
        assert np.all(np.isfinite(relative_bias_forward(q, q, q, **given)[0]))


def test_backward_refuses_another_shape():
    out, cache = relative_bias_forward(**cases(SPEC)["plain"])
    with pytest.raises(core.errors.ShapeError, match="dout has shape"):
        relative_bias_backward(out[0], cache)


# ------------------------------------------------------------------------------ oracle


@pytest.mark.oracle
@pytest.mark.parametrize("case", cases(SPEC))
def test_pytorch_agrees(case):
    """A vector or a number for every pair, built by indexing; the gradients by autograd."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")
    kwargs = cases(SPEC)[case]
    out, cache = relative_bias_forward(**kwargs)
    dout = np.random.default_rng(5).standard_normal(out.shape)
    mine = relative_bias_backward(dout, cache)
    x = {n: torch.tensor(kwargs[n], requires_grad=True) for n in mine}
    T, S, variant = kwargs["q"].shape[-2], kwargs["k"].shape[-2], kwargs["variant"]
    r = torch.arange(S) - torch.arange(T)[:, None]
    r = r - (0 if kwargs.get("align") == "upper_left" else S - T)
    c = kwargs.get("scale", 1.0 if variant == "t5" else 0.5)
    u, w = (x[n].unsqueeze(-2) if n in x else 0.0 for n in "uw")
    z = c * (x["q"] + u) @ x["k"].mT
    if variant == "shaw":
        index = r.clamp(-2, 2) + 2
        z = z + c * torch.einsum("...td,tsd->...ts", x["q"], x["aK"][index])
    elif variant == "transformer_xl":
        angle = -r[..., None] * 10000.0 ** (-torch.arange(0, 6, 2, dtype=torch.float64) / 6)
        R = torch.cat([angle.sin(), angle.cos()], -1) @ x["Wr"][..., None, :, :]
        z = z + c * torch.einsum("...htd,htsd->...hts", x["q"] + w, R)
    else:
        two = not kwargs.get("causal", False)
        bucket = [[slow_bucket(int(y), 8, 6, two) for y in row] for row in r]
        z = z + x["table"][..., torch.tensor(bucket)]
    z = z + x.get("bias", 0.0)
    rule = {n: kwargs[n] for n in ("mask", "causal", "align") if n in kwargs}
    live = torch.tensor(np.array(core.visible(kwargs["q"], kwargs["k"], **rule)))
    alive = live.any(-1, keepdim=True)
    p = torch.where(alive, torch.softmax(torch.where(live | ~alive, z, -torch.inf), -1), 0.0)
    theirs = p @ x["v"]
    if "aV" in x:
        theirs = theirs + torch.einsum("...ts,tse->...te", p, x["aV"][index])
    theirs.backward(torch.tensor(dout))
    np.testing.assert_allclose(out, theirs.detach().numpy(), rtol=0, atol=2e-14)
    for name, g in mine.items():
        np.testing.assert_allclose(g, x[name].grad.numpy(), rtol=0, atol=1e-13)
