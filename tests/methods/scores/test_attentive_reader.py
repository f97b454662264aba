"""Attentive and impatient reader: slow loops, worked examples, recurrence, identities, oracles."""

import math
from unittest import mock

import numpy as np
import pytest

import attention_ref
from attention_ref import core, engine
from attention_ref.kit.checks import cases
from attention_ref.methods.scores.attentive_reader import (
    attentive_reader_backward,
    attentive_reader_forward,
    impatient_reader_backward,
    impatient_reader_forward,
)

SPEC = attention_ref.get("scores/attentive_reader")


def product(a, w):
    """A row times a matrix, lists of numbers."""
    rows = range(w.shape[0])
    return [math.fsum(float(a[i]) * float(w[i, j]) for i in rows) for j in range(w.shape[1])]


def slow_look(y, h, c, w_ms, seen):
    """Mixture and weights of one look at one document."""
    if seen is None:
        return [math.fsum(float(y[s, i]) for s in range(len(h))) / len(h) for i in range(len(y[0]))]
    grown = {}
    for s in seen:
        m = [math.tanh(a + b) for a, b in zip(h[s], c, strict=True)]
        grown[s] = math.exp(math.fsum(a * float(b) for a, b in zip(m, w_ms, strict=True)))
    total = math.fsum(grown.values())
    return [
        math.fsum(e / total * float(y[s, i]) for s, e in grown.items()) for i in range(y.shape[1])
    ]  # fmt: skip


def slow_attentive_reader(
    y, u, w_ym, w_um, w_ms, w_rg, w_ug, mask=None, empty_row="zero", y_q=None, w_rm=None,
    w_rr=None, w_qm=None,
):  # fmt: skip
    """One number at a time; with y_q the impatient reader (w_ym, w_ug are its w_dm, w_qg)."""
    lead = np.broadcast_shapes(y.shape[:-2], u.shape[:-1])
    y = np.broadcast_to(y, (*lead, *y.shape[-2:]))
    u = np.broadcast_to(u, (*lead, u.shape[-1]))
    y_q = None if y_q is None else np.broadcast_to(y_q, (*lead, *y_q.shape[-2:]))
    S, G = y.shape[-2], w_rg.shape[-1]
    mask = None if mask is None else np.broadcast_to(mask, (*lead, S))
    out = np.zeros((*lead, G))
    for at in np.ndindex(*lead):
        seen = [s for s in range(S) if mask is None or mask[at][s]]
        seen = None if empty_row == "uniform" and not seen else seen
        h = [product(y[at][s], w_ym) for s in range(S)]
        if y_q is None:
            r = slow_look(y[at], h, product(u[at], w_um), w_ms, seen)
        else:
            r = [0.0] * y.shape[-1]
            for word in y_q[at]:
                memory, asked = product(r, w_rm), product(word, w_qm)
                c = [a + b for a, b in zip(memory, asked, strict=True)]
                found = slow_look(y[at], h, c, w_ms, seen)
                kept = product(r, w_rr)
                r = [a + math.tanh(b) for a, b in zip(found, kept, strict=True)]
        for j, (a, b) in enumerate(zip(product(r, w_rg), product(u[at], w_ug), strict=True)):
            out[at][j] = math.tanh(a + b)
    return out


@pytest.mark.parametrize("case", cases(SPEC))
def test_equals_the_slow_loop(case):
    kwargs = cases(SPEC)[case]
    out, _ = attentive_reader_forward(**kwargs)
    np.testing.assert_allclose(out, slow_attentive_reader(**kwargs), rtol=0, atol=1e-14)


SHAPES = {
    "single": ((6, 4), (3, 3), (2,)), "batch": ((2, 6, 4), (2, 3, 3), (2, 2)),
    "one word": ((6, 4), (1, 3), (2,)), "questions": ((6, 4), (5, 4, 3), (5, 2)),
    "documents": ((3, 5, 4), (2, 3), (2,)),
}  # fmt: skip


def impatient(name="single", seed=0, **options):
    """States of 4, 3 and 2 channels, 5 hidden units, 3 outputs."""
    rng = np.random.default_rng(seed)
    y, y_q, u = SHAPES[name]
    shapes = {
        "y": y, "y_q": y_q, "u": u, "w_dm": (4, 5), "w_rm": (4, 5), "w_qm": (3, 5), "w_ms": (5,),
        "w_rr": (4, 4), "w_rg": (4, 3), "w_qg": (2, 3),
    }  # fmt: skip
    return {n: rng.standard_normal(shape) for n, shape in shapes.items()} | options


def as_slow(kwargs):
    names = {"w_dm": "w_ym", "w_qg": "w_ug"}
    return {names.get(n, n): a for n, a in kwargs.items()} | {"w_um": None}


def mask_for(name):
    mask = np.random.default_rng(9).random(SHAPES[name][0][:-1]) < 0.7
    mask[..., 1] = True
    return mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_the_impatient_reader_and_its_gradient(name, masked):
    """Slow loop; hand against tape, complex step and finite differences."""
    kwargs = impatient(name)
    options = {"mask": mask_for(name)} if masked else {}
    out, cache = impatient_reader_forward(**kwargs, **options)
    want = slow_attentive_reader(**as_slow(kwargs | options))
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-14)
    assert cache.p.shape == (*out.shape[:-1], kwargs["y_q"].shape[-2], kwargs["y"].shape[-2])
    np.testing.assert_allclose(np.sum(cache.p, axis=-1), 1.0, rtol=0, atol=1e-15)
    dout = np.random.default_rng(1).standard_normal(out.shape)
    hand = impatient_reader_backward(dout, cache)

    def forward(**kw):
        return impatient_reader_forward(**kw, **options)[0]

    assert set(hand) == set(kwargs)
    exact = engine.complex_gradient(forward, kwargs, dout)
    _, pull = engine.vjp(forward, kwargs)
    for n, g in pull(dout).items():
        assert hand[n].shape == kwargs[n].shape
        np.testing.assert_allclose(hand[n], g, rtol=0, atol=1e-13, err_msg=n)
        np.testing.assert_allclose(hand[n], exact[n], rtol=0, atol=1e-13, err_msg=n)
    rng = np.random.default_rng(2)
    tangents = {n: rng.standard_normal(a.shape) for n, a in kwargs.items()}
    change = np.sum(dout * engine.difference(forward, kwargs, tangents, h=1e-4))
    want = sum(np.sum(hand[n] * t) for n, t in tangents.items())
    np.testing.assert_allclose(change, want, rtol=0, atol=1e-8)


def test_the_impatient_reader_in_single_precision_and_on_foreign_arrays():
    kwargs = impatient("batch", mask=mask_for("batch"))
    out, cache = impatient_reader_forward(**kwargs)
    single = {n: a if n == "mask" else a.astype(np.float32) for n, a in kwargs.items()}
    found, small = impatient_reader_forward(**single)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, out, rtol=0, atol=2e-5)
    g = impatient_reader_backward(np.ones_like(found), small)
    assert all(a.dtype == np.float32 for a in g.values())
    foreign, other = impatient_reader_forward(**{n: engine.Foreign(a) for n, a in kwargs.items()})
    np.testing.assert_array_equal(engine.value(foreign), out)
    wide = impatient_reader_backward(np.ones_like(out), cache)
    for n, a in impatient_reader_backward(engine.Foreign(np.ones_like(out)), other).items():
        np.testing.assert_array_equal(engine.value(a), wide[n], err_msg=n)


def board():
    """States -1 and 1 and a question of 0: weights 1/4 and 3/4."""
    half = np.array([math.log(3.0) / math.tanh(1.0) / 2])
    return {
        "y": np.array([[-1.0], [1.0]]), "u": np.zeros(1), "w_ym": np.ones((1, 1)),
        "w_um": np.ones((1, 1)), "w_ms": half, "w_rg": np.array([[2.0 * math.atanh(0.5)]]),
        "w_ug": np.ones((1, 1)),
    }  # fmt: skip


def test_worked_example():
    """r = 1/2, g = tanh(artanh 1/2) = 1/2, so dg = 3/4 and dr = 3/2 artanh(1/2) = 3/4 ln 3.

    dp = dr (-1, 1), dz = 3/8 dr (-1, 1); with m = (-t, t), t = tanh 1: dw_ms = 3/4 t dr.
    """
    ln3, t = math.log(3.0), math.tanh(1.0)
    out, cache = attentive_reader_forward(**board())
    np.testing.assert_allclose(cache.p, [0.25, 0.75], rtol=1e-15)
    np.testing.assert_allclose(cache.r[1], [0.5], rtol=1e-15)
    np.testing.assert_allclose(out, [0.5], rtol=1e-15)
    g = attentive_reader_backward(np.ones(1), cache)
    dr = 0.75 * ln3
    np.testing.assert_allclose(g["w_rg"], [[0.375]], rtol=1e-14)
    assert not np.any(g["w_ug"]) and not np.any(g["w_um"])
    np.testing.assert_allclose(g["w_ms"], [0.75 * t * dr], rtol=1e-14)
    dh = 0.375 * dr * ln3 / t / 2 * (1 - t * t)  # of the second state, minus that of the first
    np.testing.assert_allclose(g["w_ym"], [[2 * dh]], rtol=1e-14)
    np.testing.assert_allclose(g["u"], [0.75], rtol=1e-14)
    np.testing.assert_allclose(g["y"], [[dr / 4 - dh], [3 * dr / 4 + dh]], rtol=1e-14)


def test_worked_example_of_the_impatient_reader():
    """Two looks with weights 1/4 and 3/4: r_1 = 1/2, r_2 = 1/2 + tanh(r_1 w_rr) = 3/4."""
    b = board()
    kwargs = {
        "y": b["y"], "y_q": np.zeros((2, 1)), "u": np.zeros(1), "w_dm": b["w_ym"],
        "w_rm": np.zeros((1, 1)), "w_qm": np.ones((1, 1)), "w_ms": b["w_ms"],
        "w_rr": np.array([[2.0 * math.atanh(0.25)]]), "w_rg": np.array([[1.0]]),
        "w_qg": np.ones((1, 1)),
    }  # fmt: skip
    out, cache = impatient_reader_forward(**kwargs)
    np.testing.assert_allclose(cache.p, [[0.25, 0.75]] * 2, rtol=1e-15)
    np.testing.assert_allclose([float(r[0]) for r in cache.r], [0, 0.5, 0.75], rtol=1e-14)
    np.testing.assert_allclose(out, [math.tanh(0.75)], rtol=1e-14)
    g = impatient_reader_backward(np.ones(1), cache)
    dg = 1 - math.tanh(0.75) ** 2
    da = dg * (1 - 1 / 16)
    np.testing.assert_allclose(g["w_rg"], [[0.75 * dg]], rtol=1e-14)
    np.testing.assert_allclose(g["w_rr"], [[0.5 * da]], rtol=1e-14)
    # the gradient of a look's w_ms is 3/4 tanh(1) dr; dr_2 = dg, dr_1 = da w_rr
    dr1 = da * 2 * math.atanh(0.25)
    np.testing.assert_allclose(g["w_ms"], [0.75 * math.tanh(1) * (dg + dr1)], rtol=1e-14)


def test_one_word_is_the_attentive_reader():
    """r_0 = 0: with one state of the question, which is u, both readers are the same."""
    kwargs = cases(SPEC)["batch"]
    out, cache = attentive_reader_forward(**kwargs)
    free = {"w_rm": np.ones((4, 5)), "w_rr": np.ones((4, 4))}
    given = {
        "y": kwargs["y"], "y_q": kwargs["u"][..., None, :], "u": kwargs["u"],
        "w_dm": kwargs["w_ym"], "w_qm": kwargs["w_um"], "w_ms": kwargs["w_ms"],
        "w_rg": kwargs["w_rg"], "w_qg": kwargs["w_ug"],
    }  # fmt: skip
    found, other = impatient_reader_forward(**given, **free)
    np.testing.assert_allclose(found, out, rtol=0, atol=1e-15)
    dout = np.random.default_rng(3).standard_normal(out.shape)
    mine, hers = attentive_reader_backward(dout, cache), impatient_reader_backward(dout, other)
    for a, b in {"y": "y", "w_ym": "w_dm", "w_um": "w_qm", "w_ms": "w_ms", "w_rg": "w_rg"}.items():
        np.testing.assert_allclose(mine[a], hers[b], rtol=0, atol=1e-13, err_msg=a)
    whole = hers["u"] + hers["y_q"][..., 0, :]
    np.testing.assert_allclose(mine["u"], whole, rtol=0, atol=1e-13)
    assert not np.any(hers["w_rm"]) and not np.any(hers["w_rr"])


def test_without_a_read_out_the_mean_is_found():
    kwargs = cases(SPEC)["batch"] | {"w_ms": np.zeros(5)}
    _, cache = attentive_reader_forward(**kwargs)
    np.testing.assert_allclose(cache.r[1], np.mean(kwargs["y"], axis=-2), rtol=0, atol=1e-15)
    looks = impatient("batch", w_ms=np.zeros(5), w_rr=np.zeros((4, 4)))
    _, cache = impatient_reader_forward(**looks)
    for r in cache.r[1:]:
        np.testing.assert_allclose(r, np.mean(looks["y"], axis=-2), rtol=0, atol=1e-15)


def test_without_its_matrix_the_question_does_not_steer():
    kwargs = cases(SPEC)["questions"] | {"w_um": np.zeros((3, 5))}
    _, cache = attentive_reader_forward(**kwargs)
    assert cache.p.shape == (5, 6) and np.ptp(cache.p, axis=0).max() == 0
    assert np.ptp(attentive_reader_forward(**cases(SPEC)["questions"])[1].p, axis=0).max() > 0


def test_the_order_of_the_document_does_not_matter_that_of_the_question_does():
    kwargs = impatient()
    out, _ = impatient_reader_forward(**kwargs)
    order = np.random.default_rng(4).permutation(6)
    found, _ = impatient_reader_forward(**(kwargs | {"y": kwargs["y"][order]}))
    np.testing.assert_allclose(found, out, rtol=0, atol=1e-14)
    turned, _ = impatient_reader_forward(**(kwargs | {"y_q": kwargs["y_q"][::-1]}))
    assert np.max(np.abs(turned - out)) > 0.01


@pytest.mark.parametrize("reader", ["attentive", "impatient"])
def test_padding_and_empty_documents(reader):
    mask = np.array([[1, 1, 0, 1, 0, 1], [0, 0, 0, 0, 0, 0]], bool)
    if reader == "attentive":
        forward, backward = attentive_reader_forward, attentive_reader_backward
        kwargs = cases(SPEC)["mask"] | {"mask": mask}
        kwargs |= {"y": kwargs["y"][:2], "u": kwargs["u"][:2]}
        alone = np.tanh(kwargs["u"][1] @ kwargs["w_ug"])
    else:
        forward, backward = impatient_reader_forward, impatient_reader_backward
        kwargs = impatient("batch", mask=mask)
        alone = np.tanh(kwargs["u"][1] @ kwargs["w_qg"])
    out, cache = forward(**kwargs)
    fewer = {n: a[0] for n, a in kwargs.items() if n in ("u", "y_q")}
    fewer |= {"y": kwargs["y"][0][mask[0]], "mask": None}
    np.testing.assert_allclose(out[0], forward(**(kwargs | fewer))[0], rtol=0, atol=1e-15)
    np.testing.assert_allclose(out[1], alone, rtol=0, atol=1e-15)
    g = backward(np.ones_like(out), cache)
    assert not np.any(g["y"][~mask])
    for bad in (np.nan, np.inf):
        hidden = kwargs | {"y": np.where(mask[..., None], kwargs["y"], bad)}
        found, other = forward(**hidden)
        np.testing.assert_array_equal(found, out)
        for n, a in backward(np.ones_like(out), other).items():
            np.testing.assert_array_equal(a, g[n], err_msg=n)
        seen = kwargs | {"y": kwargs["y"].copy()}
        seen["y"][0, 1, 2] = bad
        found, other = forward(**seen)
        assert np.all(np.isnan(found[0])) and np.array_equal(found[1], out[1])
        later = backward(np.ones_like(out), other)
        assert all(np.all(np.isfinite(a)) for a in later.values()) and not np.any(later["y"][0])
        asked = kwargs | {"u": kwargs["u"].copy()}
        asked["u"][1, 0] = bad
        found, other = forward(**asked)
        assert np.all(np.isnan(found[1])) and np.array_equal(found[0], out[0])
        later = backward(np.ones_like(out), other)
        assert all(np.all(np.isfinite(a)) for a in later.values()) and not np.any(later["u"][1])
    if reader == "impatient":
        asked = kwargs | {"y_q": kwargs["y_q"].copy()}
        asked["y_q"][0, 1, 2] = np.nan
        found, _ = forward(**asked)
        assert np.all(np.isnan(found[0])) and np.array_equal(found[1], out[1])
    _, cache = forward(**kwargs, empty_row="uniform")
    first = cache.p[1] if reader == "attentive" else cache.p[1, 0]
    np.testing.assert_allclose(first, 1 / 6, rtol=1e-15)
    nan, _ = forward(**kwargs, empty_row="nan")
    assert np.all(np.isnan(nan[1])) and np.array_equal(nan[0], out[0])
    with pytest.raises(core.errors.ParameterError, match="mask"):
        forward(**kwargs, empty_row="raise")


def test_permuted_entities_permute_the_answer():
    """Rows of the answer's matrix permuted with the markers: the same entity is meant."""
    kwargs = cases(SPEC)["plain"]
    out, _ = attentive_reader_forward(**kwargs)
    w_a = np.random.default_rng(6).standard_normal((7, 2))
    order = np.random.default_rng(7).permutation(7)
    np.testing.assert_array_equal((out @ w_a.T)[order], out @ w_a[order].T)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"u": np.ones(4)}, core.errors.ShapeError, "w_um has U = 3"),
        ({"w_ym": np.ones((3, 5))}, core.errors.ShapeError, "w_ym has Y = 3"),
        ({"w_um": np.ones((3, 4))}, core.errors.ShapeError, "w_um has M = 4"),
        ({"w_ms": np.ones((5, 1))}, core.errors.ShapeError, "w_ms has shape"),
        ({"w_ug": np.ones((3, 3))}, core.errors.ShapeError, "w_ug has G = 3"),
        ({"w_rg": np.ones((3, 2))}, core.errors.ShapeError, "w_rg has Y = 3"),
        ({"mask": np.ones(5, bool)}, core.errors.ShapeError, r"mask has shape \(5,\), .*S\)"),
        ({"mask": np.ones(6)}, core.errors.DTypeError, "mask has dtype"),
        ({"empty_row": "none"}, core.errors.ParameterError, "empty_row is 'none'"),
    ],
)
def test_errors_name_argument_and_expectation(change, error, says):
    with pytest.raises(error, match=says):
        attentive_reader_forward(**(cases(SPEC)["plain"] | change))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"y_q": np.ones((0, 3))}, core.errors.ShapeError, r"y_q has shape \(0, 3\), expected at"),
        ({"y_q": np.ones((2, 4))}, core.errors.ShapeError, "w_qm has U = 3"),
        ({"w_rr": np.ones((4, 3))}, core.errors.ShapeError, "w_rr has Y = 3"),
        ({"w_rm": np.ones((3, 5))}, core.errors.ShapeError, "w_rm has Y = 3"),
        ({"w_qg": np.ones((3, 3))}, core.errors.ShapeError, "w_qg has V = 3"),
        ({"y": [[1.0]]}, core.errors.DTypeError, "y is a list"),
    ],
)
def test_errors_of_the_impatient_reader(change, error, says):
    with pytest.raises(error, match=says):
        impatient_reader_forward(**(impatient() | change))


def test_too_many_hidden_units():
    limit = core.errors.MemoryLimitError
    less = mock.patch.object(core.check, "MEMORY_LIMIT", 6 * 5 * 8 - 1)
    with less, pytest.raises(limit, match=r"the hidden units of shape \(6, 5\)"):
        attentive_reader_forward(**cases(SPEC)["plain"])
    with mock.patch.object(core.check, "MEMORY_LIMIT", 3 * 6 * 5 * 8 - 1):
        attentive_reader_forward(**cases(SPEC)["plain"])
        with pytest.raises(limit, match=r"of shape \(6, 15\)"):
            impatient_reader_forward(**impatient())


def test_foreign_cotangents_are_refused():
    out, cache = attentive_reader_forward(**cases(SPEC)["batch"])
    with pytest.raises(core.errors.ShapeError, match="dout has shape"):
        attentive_reader_backward(out[0], cache)
    out, cache = impatient_reader_forward(**impatient("batch"))
    with pytest.raises(core.errors.ShapeError, match="dout has shape"):
        impatient_reader_backward(out[0], cache)


def torch_reader(torch, given, mask, words):
    """Both readers in PyTorch."""
    y, u = given["y"], given["u"]
    live = torch.ones(y.shape[:-1], dtype=bool) if mask is None else torch.tensor(mask)

    def look(c):
        h = y @ given["w_dm" if words else "w_ym"]
        z = torch.tanh(h + c[..., None, :]) @ given["w_ms"]
        p = torch.softmax(z.masked_fill(~live, -1e300), -1) * live
        return torch.einsum("...s,...sy->...y", p, y)

    if not words:
        r = look(u @ given["w_um"])
        return torch.tanh(r @ given["w_rg"] + u @ given["w_ug"])
    r = torch.zeros(y.shape[-1], dtype=torch.float64)
    for word in given["y_q"].unbind(-2):
        r = look(r @ given["w_rm"] + word @ given["w_qm"]) + torch.tanh(r @ given["w_rr"])
    return torch.tanh(r @ given["w_rg"] + u @ given["w_qg"])


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("words", "case"),
    [(False, "plain"), (False, "batch"), (False, "questions"), (False, "mask")]
    + [(True, name) for name in SHAPES],
)
def test_pytorch_agrees(words, case):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")
    kwargs = impatient(case, mask=mask_for(case)) if words else cases(SPEC)[case]
    forward = impatient_reader_forward if words else attentive_reader_forward
    backward = impatient_reader_backward if words else attentive_reader_backward
    out, cache = forward(**kwargs)
    dout = np.random.default_rng(5).standard_normal(out.shape)
    mine = backward(dout, cache)
    mask = kwargs.get("mask")
    given = {n: torch.tensor(a, requires_grad=True) for n, a in kwargs.items() if n != "mask"}
    theirs = torch_reader(torch, given, mask, words)
    theirs.backward(torch.tensor(dout))
    np.testing.assert_allclose(out, theirs.detach().numpy(), rtol=0, atol=1e-13)
    for n, a in given.items():
        np.testing.assert_allclose(mine[n], a.grad.numpy(), rtol=0, atol=1e-12, err_msg=n)
