"""Skim-attention: slow loop, worked example, one map for all layers, the skimming mask, oracle."""

import math

import numpy as np
import pytest

import attention_ref
from attention_ref import core
from attention_ref.kit.checks import cases
from attention_ref.methods.scores.skim import skim_backward, skim_forward, skimming_mask

SPEC = attention_ref.get("scores/skim")
softmax = attention_ref.get("scores/dot_product")
TABLES = ("e_x", "e_y", "e_h", "e_w")


def slow_layout(box, e_x, e_y, e_h, e_w, gain, shift, eps):
    """The embedding of one token, a list of C numbers."""
    left, upper, right, lower = (int(a) for a in box)
    C = e_x.shape[1]
    u = []
    for c in range(C):
        if e_h is None:
            u.append(float(e_x[(left + right) // 2, c]) + float(e_y[(upper + lower) // 2, c]))
        else:
            u.append(math.fsum([
                float(e_x[left, c]), float(e_x[right, c]), float(e_y[upper, c]),
                float(e_y[lower, c]), float(e_h[lower - upper, c]), float(e_w[right - left, c]),
            ]))  # fmt: skip
    mean = math.fsum(u) / C
    root = math.sqrt(math.fsum((a - mean) ** 2 for a in u) / C + eps)
    return [(u[c] - mean) / root * float(gain[c]) + float(shift[c]) for c in range(C)]


def slow_skim(
    box, v, e_x, e_y, e_h, e_w, gain, shift, wq, wk, bq=None, mask=None, scale=None, bias=None,
    eps=1e-12,
):  # fmt: skip
    """One number at a time."""
    lead = np.broadcast_shapes(box.shape[:-2], v.shape[:-2], wq.shape[:-2])
    T, E, C, D = v.shape[-2], v.shape[-1], wq.shape[-2], wq.shape[-1]
    box = np.broadcast_to(box, (*lead, T, 4))
    v = np.broadcast_to(v, (*lead, T, E))
    wq = np.broadcast_to(wq, (*lead, C, D))
    wk = np.broadcast_to(wk, (*lead, C, D))
    bq = None if bq is None else np.broadcast_to(bq, (*lead, D))
    mask = None if mask is None else np.broadcast_to(mask, (*lead, T, T))
    bias = None if bias is None else np.broadcast_to(bias, (*lead, T, T))
    c = 1.0 / math.sqrt(D) if scale is None else scale
    out = np.zeros((*lead, T, E))
    for at in np.ndindex(*lead):
        layout = [slow_layout(box[at][t], e_x, e_y, e_h, e_w, gain, shift, eps) for t in range(T)]

        def project(token, w, b):
            return [
                math.fsum(token[i] * float(w[i, d]) for i in range(C))
                + (0.0 if b is None else float(b[d]))
                for d in range(D)
            ]

        for t in range(T):
            q = project(layout[t], wq[at], None if bq is None else bq[at])
            grown = {}
            for s in range(T):
                if mask is not None and not mask[at][t, s]:
                    continue
                k = project(layout[s], wk[at], None)
                z = c * math.fsum(a * b for a, b in zip(q, k, strict=True))
                grown[s] = math.exp(z if bias is None else z + float(bias[at][t, s]))
            total = math.fsum(grown.values())
            for e in range(E):
                out[at][t, e] = math.fsum(w / total * float(v[at][s, e]) for s, w in grown.items())
    return out


@pytest.mark.parametrize("case", cases(SPEC))
def test_equals_the_slow_loop(case):
    kwargs = cases(SPEC)[case]
    out, _ = skim_forward(**kwargs)
    np.testing.assert_allclose(out, slow_skim(**kwargs), rtol=0, atol=1e-14)


def drawn(name="bias", **options):
    return cases(SPEC)[name] | options


def board():
    """Two tokens at x = 0 and 1, two channels, embeddings (1, -1) and (-1, 1)."""
    table = np.array([[1.0, -1.0], [-1.0, 1.0]])
    return {
        "box": np.array([[0, 0, 0, 0], [1, 0, 1, 0]]), "v": np.array([[0.0], [8.0]]),
        "e_x": table / 2, "e_y": 0 * table, "e_h": 0 * table, "e_w": 0 * table,
        "gain": np.array([2.0, 1.0]), "shift": np.array([0.0, 1.0]), "eps": 3.0, "scale": 0.5,
        "wq": np.array([[math.log(3.0)], [0.0]]), "wk": np.array([[1.0], [0.0]]),
    }  # fmt: skip


def test_worked_example():
    """u = (1, -1 / -1, 1), root 2, hat = u / 2, l = (1, 1/2 / -1, 3/2); z = ln 3 / 2 (1 -1 / -1 1).

    p = (3/4, 1/4), o = 2 and 6. For L = o_1: dz_1 = 3/16 (-8, 8) = (-3/2, 3/2).
    """
    ln3 = math.log(3.0)
    out, cache = skim_forward(**board(), bias=np.zeros((1, 2)))
    np.testing.assert_allclose(cache.hat, [[0.5, -0.5], [-0.5, 0.5]], rtol=1e-15)
    np.testing.assert_allclose(cache.l, [[1.0, 0.5], [-1.0, 1.5]], rtol=1e-15)
    np.testing.assert_allclose(cache.p, [[0.75, 0.25], [0.25, 0.75]], rtol=1e-15)
    np.testing.assert_allclose(out, [[2.0], [6.0]], rtol=1e-15)
    np.testing.assert_allclose(cache.lse, [math.log(4 / math.sqrt(3))] * 2, rtol=1e-14)
    g = skim_backward(np.array([[1.0], [0.0]]), cache)
    # dq_1 = 1/2 (-3/2 - 3/2) = -3/2; dk = 1/2 ln 3 (-3/2, 3/2)
    np.testing.assert_allclose(g["bias"], [[-1.5, 1.5]], rtol=1e-14)
    np.testing.assert_allclose(g["wq"], [[-1.5], [-0.75]], rtol=1e-14)
    np.testing.assert_allclose(g["wk"], [[-1.5 * ln3], [0.75 * ln3]], rtol=1e-14)
    np.testing.assert_allclose(g["v"], [[0.75], [0.25]], rtol=1e-15)
    # dl_1 = (-3/2 ln 3 - 3/4 ln 3, 0), dl_2 = (3/4 ln 3, 0)
    np.testing.assert_allclose(g["shift"], [-1.5 * ln3, 0], rtol=1e-14)
    np.testing.assert_allclose(g["gain"], [-1.5 * ln3, 0], rtol=1e-14)
    # dhat_1 = -9/2 ln 3 (1, 0), centred -9/4 ln 3 (1, -1), hat mean(dhat hat) = -9/16 ln 3 (1, -1);
    # du_1 = -27/32 ln 3 (1, -1), and du_2 is -1/3 of it
    first = -27 / 32 * ln3 * np.array([1.0, -1.0])
    np.testing.assert_allclose(g["e_x"], [2 * first, -2 / 3 * first], rtol=1e-13)
    np.testing.assert_allclose(g["e_y"], [4 / 3 * first, [0, 0]], rtol=1e-13)
    np.testing.assert_allclose(g["e_w"], [2 / 3 * first, [0, 0]], rtol=1e-13)
    np.testing.assert_allclose(g["e_h"], g["e_w"], rtol=1e-15)


def test_layers_share_one_map_and_add_up_their_gradients():
    kwargs = drawn("layers")
    out, cache = skim_forward(**kwargs)
    assert cache.p.shape == (2, 5, 5) and out.shape == (3, 2, 5, 3)
    dout = np.random.default_rng(1).standard_normal(out.shape)
    g = skim_backward(dout, cache)
    total = {n: 0.0 for n in g if n != "v"}
    for layer in range(3):
        one, own = skim_forward(**(kwargs | {"v": kwargs["v"][layer]}))
        np.testing.assert_allclose(one, out[layer], rtol=0, atol=1e-15)
        part = skim_backward(dout[layer], own)
        np.testing.assert_allclose(part["v"], g["v"][layer], rtol=0, atol=1e-15)
        total = {n: a + part[n] for n, a in total.items()}
    for n, a in total.items():
        np.testing.assert_allclose(g[n], a, rtol=0, atol=1e-13, err_msg=n)


def test_the_map_knows_nothing_of_the_text():
    kwargs = drawn()
    _, cache = skim_forward(**kwargs)
    _, other = skim_forward(**(kwargs | {"v": kwargs["v"] ** 2 + 1}))
    np.testing.assert_array_equal(cache.p, other.p)


def test_the_order_of_the_tokens_does_not_matter():
    for name in ("plain", "centres", "batch"):
        kwargs = drawn(name)
        out, _ = skim_forward(**kwargs)
        order = np.random.default_rng(2).permutation(out.shape[-2])
        turned = kwargs | {n: kwargs[n][..., order, :] for n in ("box", "v")}
        found, _ = skim_forward(**turned)
        np.testing.assert_allclose(found, out[..., order, :], rtol=0, atol=1e-14)


def test_centres_are_full_embeddings_without_edges():
    """With X and Y halved, zero U and W, and boxes that are points, both give the same."""
    kwargs = drawn("centres")
    points = np.concatenate([kwargs["box"][..., :2]] * 2, axis=-1)
    want, _ = skim_forward(**(kwargs | {"box": points}))
    zero = np.zeros_like(kwargs["e_x"])
    full = {"e_x": kwargs["e_x"] / 2, "e_y": kwargs["e_y"] / 2, "e_h": zero, "e_w": zero}
    found, _ = skim_forward(**(kwargs | {"box": points} | full))
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-14)


def test_a_bias_of_the_keys_would_change_nothing():
    """What the official code has and this method leaves out: one number for a whole row."""
    kwargs = drawn()
    out, cache = skim_forward(**kwargs)
    b = np.random.default_rng(3).standard_normal((2, 1, 3))
    want, _ = softmax.forward(cache.q, cache.k + b, kwargs["v"], scale=0.7, bias=kwargs["bias"])
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-14)


def test_equal_boxes_give_the_mean():
    kwargs = drawn("plain", box=np.tile([1, 0, 3, 2], (5, 1)))
    out, _ = skim_forward(**kwargs)
    want = np.broadcast_to(np.mean(kwargs["v"], axis=-2, keepdims=True), out.shape)
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-15)


def test_a_table_row_that_is_not_read_gets_no_gradient():
    box = [[1, 1, 2, 2], [1, 2, 3, 3], [2, 2, 3, 3], [1, 1, 1, 1], [1, 1, 1, 1]]
    kwargs = drawn("plain", box=np.array(box))
    out, cache = skim_forward(**kwargs)
    g = skim_backward(np.random.default_rng(4).standard_normal(out.shape), cache)
    read = {"e_x": {1, 2, 3}, "e_y": {1, 2, 3}, "e_h": {0, 1}, "e_w": {0, 1, 2}}
    for name, rows in read.items():
        assert {i for i in range(6) if np.any(g[name][i])} == rows, name


def test_rows_without_keys_and_masks():
    mask = np.ones((5, 5), bool)
    mask[1] = False
    mask[:, 3] = False
    kwargs = drawn("plain", mask=mask)
    out, cache = skim_forward(**kwargs)
    assert not np.any(out[:, 1]) and not np.any(cache.p[..., 3])
    kept = [0, 1, 2, 4]
    fewer = {n: kwargs[n][..., kept, :] for n in ("box", "v")} | {"mask": mask[:, kept][kept]}
    np.testing.assert_allclose(
        out[:, kept], skim_forward(**(kwargs | fewer))[0], rtol=0, atol=1e-15
    )
    g = skim_backward(np.ones_like(out), cache)
    assert not np.any(g["v"][:, 3])
    only = np.zeros_like(out)
    only[:, 1] = 1.0
    assert not any(np.any(a) for a in skim_backward(only, cache).values())
    uniform, _ = skim_forward(**kwargs, empty_row="uniform")
    np.testing.assert_allclose(uniform[:, 1], np.mean(kwargs["v"], axis=1), rtol=0, atol=1e-15)
    nan, _ = skim_forward(**kwargs, empty_row="nan")
    assert np.all(np.isnan(nan[:, 1])) and not np.any(np.isnan(np.delete(nan, 1, axis=1)))
    with pytest.raises(core.errors.ParameterError, match="mask"):
        skim_forward(**kwargs, empty_row="raise")
    hidden = kwargs | {"v": kwargs["v"].copy()}
    hidden["v"][:, 3] = np.nan
    np.testing.assert_array_equal(skim_forward(**hidden)[0], out)


def test_a_bias_of_minus_infinity_hides_a_token():
    mask = np.random.default_rng(5).random((5, 5)) < 0.7
    want, _ = skim_forward(**drawn("plain", mask=mask))
    out, _ = skim_forward(**drawn("plain", bias=np.where(mask, 0.0, -np.inf)))
    np.testing.assert_array_equal(out, want)
    bias = np.zeros((5, 5))
    bias[2, 1] = np.nan
    out, cache = skim_forward(**drawn("plain", bias=bias))
    assert np.all(np.isnan(out[:, 2])) and np.sum(np.isnan(out)) == 6
    assert np.all(np.isnan(cache.lse[:, 2])) and np.sum(np.isnan(cache.lse)) == 2
    g = skim_backward(np.ones_like(out), cache)
    assert all(np.all(np.isfinite(a)) for a in g.values())


def test_nan_in_a_table_reaches_the_tokens_that_read_it():
    box = np.array([[0, 0, 1, 1], [1, 0, 2, 2], [5, 1, 5, 3], [0, 2, 2, 3], [1, 1, 1, 2]])
    mask = np.ones((5, 5), bool)
    mask[:2, 2] = False
    kwargs = drawn("plain", box=box, mask=mask)
    clean, _ = skim_forward(**kwargs)
    for bad in (np.nan, np.inf):
        given = kwargs | {"e_x": kwargs["e_x"].copy()}
        given["e_x"][5, 1] = bad
        out, cache = skim_forward(**given)
        assert np.all(np.isnan(out[:, 2:]))
        np.testing.assert_array_equal(out[:, :2], clean[:, :2])
        g = skim_backward(np.ones_like(out), cache)
        assert all(np.all(np.isfinite(a)) for a in g.values()) and not np.any(g["e_x"][5])
    given = kwargs | {"v": kwargs["v"].copy()}
    given["v"][1, 2, 0] = np.inf
    out, _ = skim_forward(**given)
    assert np.all(np.isnan(out[1, 2:])) and np.sum(np.isnan(out)) == 9


def test_skimming_masks():
    p = np.array([[0.1, 0.5, 0.2, 0.2], [0.0, 0.0, 1.0, 0.0]])
    want = [[0, 1, 1, 0], [0, 0, 1, 0]]
    np.testing.assert_array_equal(skimming_mask(p, 2), np.array(want, bool))
    assert not np.any(skimming_mask(p, 0))
    np.testing.assert_array_equal(skimming_mask(p, 9), p > 0)
    _, cache = skim_forward(**drawn("plain"))
    mask = skimming_mask(cache.p, 3)
    assert mask.shape == (2, 5, 5) and np.all(np.sum(mask, axis=-1) == 3)
    kept, left = np.where(mask, cache.p, np.inf), np.where(mask, 0.0, cache.p)
    assert np.all(np.min(kept, axis=-1) >= np.max(left, axis=-1))
    with pytest.raises(core.errors.ParameterError, match="count is -1"):
        skimming_mask(p, -1)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"box": np.full((5, 4), 6)}, core.errors.ParameterError, "box holds values from 6 to 6"),
        ({"box": np.full((5, 4), -1)}, core.errors.ParameterError, "box holds values from -1"),
        ({"box": np.tile([2, 0, 1, 0], (5, 1))}, core.errors.ParameterError, "box has a right or"),
        ({"box": np.tile([0, 2, 1, 1], (5, 1))}, core.errors.ParameterError, "box has a right or"),
        ({"box": np.zeros((5, 4))}, core.errors.DTypeError, "box has dtype float64"),
        ({"box": np.zeros((4, 4), int)}, core.errors.ShapeError, r"box has shape \(4, 4\)"),
        ({"box": np.zeros((5, 3), int)}, core.errors.ShapeError, r"box has shape \(5, 3\)"),
        ({"box": np.zeros((3, 2, 5, 4), int)}, core.errors.ShapeError, r"box .* \(2, 5, 4\)"),
        ({"e_h": None}, core.errors.ParameterError, "e_h and e_w are given together"),
        ({"e_w": None}, core.errors.ParameterError, "e_h and e_w are given together"),
        ({"e_y": np.ones((7, 4))}, core.errors.ShapeError, "e_y has N = 7"),
        ({"wk": np.ones((2, 3, 3))}, core.errors.ShapeError, "wk has C = 3"),
        ({"gain": np.ones(3)}, core.errors.ShapeError, "gain has C = 3"),
        ({"eps": -1.0}, core.errors.ParameterError, "eps is -1"),
        ({"mask": np.ones((4, 5), bool)}, core.errors.ShapeError, "mask has shape"),
        ({"empty_row": "none"}, core.errors.ParameterError, "empty_row is 'none'"),
    ],
)
def test_errors_name_argument_and_expectation(change, error, says):
    with pytest.raises(error, match=says):
        skim_forward(**(drawn("plain") | change))


def test_a_foreign_cotangent_is_refused():
    out, cache = skim_forward(**drawn())
    with pytest.raises(core.errors.ShapeError, match="dout has shape"):
        skim_backward(out[0], cache)


@pytest.mark.oracle
@pytest.mark.parametrize("case", cases(SPEC))
def test_pytorch_agrees(case):
    """Embedding tables, LayerNorm and SDPA of PyTorch, with a bias of the keys."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")
    kwargs = cases(SPEC)[case]
    out, cache = skim_forward(**kwargs)
    dout = np.random.default_rng(5).standard_normal(out.shape)
    mine = skim_backward(dout, cache)
    given = {
        n: torch.tensor(a, requires_grad=True)
        for n, a in kwargs.items() if isinstance(a, np.ndarray) and n not in ("mask", "box")
    }  # fmt: skip
    box, read = torch.tensor(kwargs["box"]), torch.nn.functional.embedding
    left, upper, right, lower = box.unbind(-1)
    if kwargs["e_h"] is None:
        u = read((left + right) // 2, given["e_x"]) + read((upper + lower) // 2, given["e_y"])
    else:
        u = read(left, given["e_x"]) + read(right, given["e_x"]) + read(upper, given["e_y"])
        u = u + read(lower, given["e_y"]) + read(lower - upper, given["e_h"])
        u = u + read(right - left, given["e_w"])
    eps = kwargs.get("eps", 1e-12)
    l = torch.nn.functional.layer_norm(u, u.shape[-1:], given["gain"], given["shift"], eps)
    q, k = l @ given["wq"], l @ given["wk"]
    q = q if kwargs.get("bq") is None else q + given["bq"][..., None, :]
    scale = kwargs["scale"] or kwargs["wq"].shape[-1] ** -0.5
    z = q @ (k + torch.arange(k.shape[-1])).mT * scale + given.get("bias", torch.tensor(0.0))
    live = torch.tensor(kwargs.get("mask", np.ones((1, 1), bool)))
    p = torch.softmax(z.masked_fill(~live, -1e300), -1) * live
    theirs = p @ given["v"]
    theirs.backward(torch.tensor(dout))
    np.testing.assert_allclose(out, theirs.detach().numpy(), rtol=0, atol=1e-13)
    for n, a in given.items():
        np.testing.assert_allclose(mine[n], a.grad.numpy(), rtol=0, atol=1e-12, err_msg=n)
