"""Sparsemax attention and loss: slow loop, worked examples, identities, limits, oracles."""

import math

import numpy as np
import pytest

import attention_ref
from attention_ref import core, engine
from attention_ref.kit.checks import cases
from attention_ref.methods.normalizers.sparsemax import (
    project_backward,
    project_forward,
    sparsemax_backward,
    sparsemax_forward,
    sparsemax_loss_backward,
    sparsemax_loss_forward,
)

SPEC = attention_ref.get("normalizers/sparsemax")

EQUIVALENT = {
    "z - top >= -1.0": "a score exactly 1 below the best one has weight 0 either way",
    "z - top > -2.0": "scores between 1 and 2 below the best one have weight 0 either way",
    "np.where(near, z - top, -3.0)": "any filler of at most -1 stays outside of the support",
    "np.where(good[..., None], z, 1.0)": "a row with NaN has loss NaN and no gradient anyway",
    "1.0 + n * ordered >= sum": "a score equal to tau changes neither tau nor the weights",
}
"""Mutants of the method that compute the same, and why."""


def slow_projection(scores):
    """Michelot's way: begin with all keys, drop those at or below the threshold, repeat."""
    kept = dict(scores)
    while kept:
        tau = (math.fsum(kept.values()) - 1.0) / len(kept)
        fewer = {s: z for s, z in kept.items() if z > tau}
        if len(fewer) == len(kept):
            return {s: z - tau for s, z in kept.items()}
        kept = fewer
    return {}


def slow_sparsemax(
    q, k, v, mask=None, causal=False, align="lower_right", scale=None, softcap=None, bias=None,
):  # fmt: skip
    """One number at a time; the projection drops keys until nothing changes."""
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
            scores = {}
            for s in range(S):
                if causal and s > t + first:
                    continue
                if mask is not None and not mask[place][t, s]:
                    continue
                z = c * math.fsum(float(q[place][t, d]) * float(k[place][s, d]) for d in range(D))
                if softcap is not None:
                    z = softcap * math.tanh(z / softcap)
                if bias is not None:
                    z += float(bias[place][t, s])
                scores[s] = z
            weight = slow_projection(scores)
            for e in range(E):
                out[place][t, e] = math.fsum(w * float(v[place][s, e]) for s, w in weight.items())
    return out


@pytest.mark.parametrize("case", cases(SPEC))
def test_equals_the_slow_loop(case):
    kwargs = cases(SPEC)[case]
    out, _ = sparsemax_forward(**kwargs)
    np.testing.assert_allclose(out, slow_sparsemax(**kwargs), rtol=0, atol=1e-14)


def test_the_examples_are_sparse_and_not_trivial():
    for kwargs in cases(SPEC).values():
        share = np.mean(sparsemax_forward(**kwargs)[1].support)
        assert 0.1 < share < 0.9


def test_worked_example_forward():
    """z = (1, 1/2, -1): two keys in the support, tau = (3/2 - 1)/2 = 1/4, p = (3/4, 1/4, 0)."""
    q = np.array([[2.0, 0.0, 0.0, 0.0]])  # default scale 1/2
    k = np.array([[1.0, 9.0, 0.0, 0.0], [0.5, 0.0, 0.0, 0.0], [-1.0, 0.0, 7.0, 0.0]])
    v = np.array([[4.0, -8.0], [0.0, 8.0], [100.0, 100.0]])
    out, cache = sparsemax_forward(q, k, v)
    np.testing.assert_allclose(cache.p, [[0.75, 0.25, 0.0]], rtol=1e-15)
    np.testing.assert_allclose(cache.tau, [0.25], rtol=1e-15)
    np.testing.assert_array_equal(cache.support, [[True, True, False]])
    np.testing.assert_allclose(out, [[3.0, -4.0]], rtol=1e-15)


def test_worked_example_backward():
    """dp = v = (4, 0, 100), mean over the support 2, dz = (2, -2, 0); dv = p."""
    q, k = np.array([[1.0]]), np.array([[1.0], [0.5], [-1.0]])
    v = np.array([[4.0], [0.0], [100.0]])
    bias = np.zeros((1, 3))
    out, cache = sparsemax_forward(q, k, v, bias=bias)
    g = sparsemax_backward(np.ones_like(out), cache)
    np.testing.assert_allclose(g["v"], [[0.75], [0.25], [0.0]], rtol=1e-15)
    np.testing.assert_allclose(g["bias"], [[2.0, -2.0, 0.0]], rtol=1e-15)
    np.testing.assert_allclose(g["k"], [[2.0], [-2.0], [0.0]], rtol=1e-15)
    np.testing.assert_allclose(g["q"], [[2.0 * 1.0 - 2.0 * 0.5]], rtol=1e-15)


def test_a_score_one_below_the_best_has_no_weight():
    """z = (0, -1, -1): the support test is strict, so p = (1, 0, 0), and no gradient flows."""
    z, live = np.array([[0.0, -1.0, -1.0]]), np.ones((1, 3), bool)
    p, tau, support = project_forward(z, live)
    np.testing.assert_array_equal(p, [[1.0, 0.0, 0.0]])
    np.testing.assert_array_equal(tau, [[-1.0]])
    np.testing.assert_array_equal(project_backward(np.array([[5.0, 7.0, 9.0]]), support), 0.0)


def test_a_tie_at_the_threshold_stays_out_of_the_support():
    """z = (1, 0.5, 0.25), tau = 0.25: the third score equals tau; the mean is over two."""
    z = np.array([[1.0, 0.5, 0.25]])
    p, tau, support = project_forward(z, np.ones_like(z, bool))
    np.testing.assert_array_equal(p, [[0.75, 0.25, 0.0]])
    np.testing.assert_array_equal(support, [[True, True, False]])
    np.testing.assert_array_equal(tau, [[0.25]])


def test_is_the_nearest_point_of_the_simplex():
    rng = np.random.default_rng(0)
    z = rng.standard_normal((20, 6))
    p, _, _ = project_forward(z, np.ones_like(z, bool))
    np.testing.assert_allclose(p.sum(-1), 1.0, rtol=0, atol=1e-15)
    others = rng.dirichlet(np.full(6, 0.5), size=(2000, 20))
    near = np.sum((p - z) ** 2, -1)
    assert np.all(near < np.sum((others - z) ** 2, -1))
    step = 1e-3 * (others - p)  # the variational inequality holds in every direction
    assert np.all(np.sum((z - p) * step, -1) <= 1e-15)


def test_points_of_the_simplex_stay_where_they_are():
    z = np.random.default_rng(1).dirichlet(np.ones(7), size=9)
    p, tau, _ = project_forward(z, np.ones_like(z, bool))
    np.testing.assert_allclose(p, z, rtol=0, atol=1e-15)
    np.testing.assert_allclose(tau, 0.0, rtol=0, atol=1e-15)


def test_shift_moves_the_threshold_only():
    z = np.random.default_rng(2).standard_normal((4, 6))
    live = np.ones_like(z, bool)
    p, tau, _ = project_forward(z, live)
    moved, moved_tau, _ = project_forward(z + 3.0, live)
    np.testing.assert_allclose(moved, p, rtol=0, atol=4e-15)
    np.testing.assert_allclose(moved_tau, tau + 3.0, rtol=0, atol=4e-15)


def test_temperature_goes_from_uniform_to_the_best_key():
    z = np.random.default_rng(3).standard_normal((4, 6))
    live = np.ones_like(z, bool)
    np.testing.assert_allclose(project_forward(z / 1e9, live)[0], 1 / 6, rtol=0, atol=1e-8)
    sharp, _, _ = project_forward(z / 1e-3, live)
    np.testing.assert_array_equal(sharp, np.eye(6)[np.argmax(z, -1)])


def test_empty_rows_have_an_infinite_threshold():
    kwargs = cases(SPEC)["causal-long-queries"]
    _, cache = sparsemax_forward(**kwargs)
    np.testing.assert_array_equal(cache.tau[:, :2], np.inf)
    assert np.all(np.isfinite(cache.tau[:, 2:]))
    assert not np.any(cache.support[:, :2])


def test_uniform_empty_rows_have_no_score_gradient():
    kwargs = cases(SPEC)["bias"]
    bias = kwargs["bias"].copy()
    bias[0, 1] = -np.inf
    out, cache = sparsemax_forward(**(kwargs | {"bias": bias, "empty_row": "uniform"}))
    np.testing.assert_allclose(out[0, 1], kwargs["v"][0].mean(0), rtol=0, atol=1e-15)
    np.testing.assert_array_equal(cache.p[0, 1], 1 / 6)
    np.testing.assert_array_equal(out[1], sparsemax_forward(**kwargs)[0][1])
    single = {"q": kwargs["q"], "k": kwargs["k"][:, :1], "v": kwargs["v"][:, :1]}
    alone, _ = sparsemax_forward(**single, mask=np.zeros((5, 1), bool), empty_row="uniform")
    np.testing.assert_array_equal(alone, np.broadcast_to(single["v"], alone.shape))
    g = sparsemax_backward(np.ones_like(out) * np.arange(3.0), cache)
    assert not np.any(g["bias"][0, 1]) and not np.any(g["q"][0, 1])
    assert np.any(g["bias"][0, 0])


def test_minus_infinity_in_a_bias_is_a_mask():
    kwargs = cases(SPEC)["mask"]
    bias = np.where(kwargs["mask"], 0.0, -np.inf)
    out, cache = sparsemax_forward(**kwargs)
    plain = {n: a for n, a in kwargs.items() if n != "mask"}
    same, other = sparsemax_forward(**plain, bias=bias)
    np.testing.assert_array_equal(out, same)
    dout = np.random.default_rng(4).standard_normal(out.shape)
    mine, theirs = sparsemax_backward(dout, cache), sparsemax_backward(dout, other)
    for n in ("q", "k", "v"):
        np.testing.assert_array_equal(mine[n], theirs[n])


def test_nan_in_a_live_bias_poisons_its_row_alone():
    kwargs = cases(SPEC)["bias"]
    bad = kwargs["bias"].copy()
    bad[1, 2, 3] = np.nan
    out, cache = sparsemax_forward(**(kwargs | {"bias": bad}))
    clean, _ = sparsemax_forward(**kwargs)
    assert np.all(np.isnan(out[1, 2])) and np.isnan(cache.tau[1, 2])
    g = sparsemax_backward(np.ones_like(out), cache)
    assert not np.any(g["q"][1, 2]) and np.all(np.isfinite(g["v"]))
    out[1, 2] = clean[1, 2]
    np.testing.assert_array_equal(out, clean)


def test_values_with_a_batch_of_their_own():
    kwargs = cases(SPEC)["no-heads"]
    single, _ = sparsemax_forward(**kwargs)
    out, cache = sparsemax_forward(**(kwargs | {"v": np.stack([kwargs["v"], 2 * kwargs["v"]])}))
    np.testing.assert_allclose(out[1], 2 * single, rtol=0, atol=1e-15)
    g = sparsemax_backward(np.ones_like(out), cache)
    assert g["q"].shape == kwargs["q"].shape and g["v"].shape == (2, 7, 3)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"softcap": 0.0}, core.errors.ParameterError, "softcap is 0.0, expected"),
        ({"align": "lower-right"}, core.errors.ParameterError, "did you mean 'lower_right'"),
        ({"v": np.ones((2, 7, 3))}, core.errors.ShapeError, r"v has S = 7 .* expected 6 as in k"),
    ],
)
def test_errors_name_argument_and_expectation(change, error, says):
    with pytest.raises(error, match=says):
        sparsemax_forward(**(cases(SPEC)["plain"] | change))


def test_a_foreign_cotangent_is_refused():
    out, cache = sparsemax_forward(**cases(SPEC)["plain"])
    with pytest.raises(core.errors.ShapeError, match="dout has shape"):
        sparsemax_backward(out[0], cache)


# ------------------------------------------------------------------------------ the loss


def slow_loss(z, y):
    """The formula of the paper, with the support of the slow projection."""
    scores = {j: float(x) for j, x in enumerate(z)}
    support = slow_projection(scores)
    tau = (math.fsum(scores[j] for j in support) - 1.0) / len(support)
    inner = math.fsum(float(y[j]) * scores[j] for j in scores)
    squares = math.fsum(scores[j] ** 2 - tau**2 for j in support)
    return -inner + squares / 2 + math.fsum(float(x) ** 2 for x in y) / 2


def drawn(seed, lead=(4, 3), classes=5):
    """Scores, target distributions and labels."""
    rng = np.random.default_rng(seed)
    return (
        rng.standard_normal((*lead, classes)),
        rng.dirichlet(np.ones(classes), size=lead),
        rng.integers(classes, size=lead),
    )


def test_loss_equals_the_formula_of_the_paper():
    z, y, labels = drawn(0)
    soft, _ = sparsemax_loss_forward(z, y)
    hard, _ = sparsemax_loss_forward(z, labels)
    for place in np.ndindex(4, 3):
        assert math.isclose(soft[place], slow_loss(z[place], y[place]), abs_tol=1e-15)
        unit = [float(j == labels[place]) for j in range(5)]
        assert math.isclose(hard[place], slow_loss(z[place], unit), abs_tol=1e-15)


def test_loss_by_hand():
    """z = (1, 1/2, -1), tau = 1/4, p = (3/4, 1/4, 0), label 2: 13/16 + (1/4 + 1) = 33/16."""
    z = np.array([1.0, 0.5, -1.0])
    loss, cache = sparsemax_loss_forward(z, np.array(2))
    np.testing.assert_allclose(loss, 33 / 16, rtol=1e-15)
    g = sparsemax_loss_backward(np.array(2.0), cache)
    assert list(g) == ["z"]
    np.testing.assert_allclose(g["z"], [1.5, 0.5, -2.0], rtol=1e-15)


def test_loss_of_two_classes_is_hubers():
    """With t = z_1 - z_0 and label 1: 0 above 1, -t below -1, (t - 1)^2 / 4 between."""
    t = np.linspace(-3.0, 3.0, 61)
    loss, _ = sparsemax_loss_forward(np.stack([0 * t, t], -1), np.ones(61, int))
    huber = np.where(t >= 1, 0.0, np.where(t <= -1, -t, (t - 1) ** 2 / 4))
    np.testing.assert_allclose(loss, huber, rtol=0, atol=1e-15)


def test_loss_is_zero_from_a_margin_of_one_on():
    z = np.array([[1.0, 0.0, -0.5], [1.001, 0.0, 0.0], [0.999, 0.0, -0.5]])
    loss, cache = sparsemax_loss_forward(z, np.zeros(3, int))
    np.testing.assert_array_equal(loss[:2], 0.0)
    assert 0 < loss[2] < 1e-6
    assert not np.any(sparsemax_loss_backward(np.ones(3), cache)["z"][:2])


@pytest.mark.parametrize("kind", ["labels", "targets", "broadcast"])
def test_loss_gradients_four_ways(kind):
    z, y, labels = drawn(1)
    arrays = {"z": z}
    if kind == "targets":
        arrays["y"] = y
    elif kind == "broadcast":
        arrays["y"] = y[0]

    def f(z, y=labels):
        return sparsemax_loss_forward(z, y)[0]

    loss, cache = sparsemax_loss_forward(**({"y": labels} | arrays))
    dloss = np.random.default_rng(2).standard_normal(loss.shape)
    hand = sparsemax_loss_backward(dloss, cache)
    _, pull = engine.vjp(f, arrays)
    complex_step = engine.complex_gradient(f, arrays, dloss)
    assert set(hand) == set(arrays)
    for n, g in hand.items():
        assert g.shape == arrays[n].shape
        np.testing.assert_allclose(g, pull(dloss)[n], rtol=0, atol=1e-14)
        np.testing.assert_allclose(g, complex_step[n], rtol=0, atol=1e-14)


def test_loss_in_single_precision_and_for_nan():
    z, y, _ = drawn(3)
    loss, cache = sparsemax_loss_forward(z.astype(np.float32), y.astype(np.float32))
    assert loss.dtype == np.float32
    g = sparsemax_loss_backward(np.ones_like(loss), cache)
    assert g["z"].dtype == g["y"].dtype == np.float32
    z[1, 2, 0] = np.nan
    loss, cache = sparsemax_loss_forward(z, y)
    assert np.isnan(loss[1, 2]) and np.sum(np.isnan(loss)) == 1
    g = sparsemax_loss_backward(np.ones_like(loss), cache)
    assert not np.any(g["z"][1, 2]) and not np.any(g["y"][1, 2]) and np.all(np.any(g["z"][0], -1))


@pytest.mark.parametrize(
    ("y", "error", "says"),
    [
        (np.array([5, 0, 0, 0]), core.errors.ParameterError, "y holds values from 0 to 5"),
        (np.array([1, 0, 0]), core.errors.ShapeError, "y has shape .3,., expected .4,."),
        (np.ones((4, 3)), core.errors.ShapeError, "y has C = 3"),
        ([1, 2, 3, 4], core.errors.DTypeError, "y is a list"),
        (np.ones(4, bool), core.errors.DTypeError, "y has dtype bool"),
    ],
)
def test_loss_errors(y, error, says):
    with pytest.raises(error, match=says):
        sparsemax_loss_forward(np.ones((4, 5)), y)


def test_loss_refuses_labels_of_another_shape():
    with pytest.raises(core.errors.ShapeError, match=r"y has shape \(4,\), expected \(4, 3\)"):
        sparsemax_loss_forward(np.ones((4, 3, 5)), np.ones(4, int))


def test_loss_refuses_a_foreign_cotangent():
    z, y, _ = drawn(4)
    _, cache = sparsemax_loss_forward(z, y)
    with pytest.raises(core.errors.ShapeError, match="dloss has shape"):
        sparsemax_loss_backward(np.ones(3), cache)


# ------------------------------------------------------------------------------ oracles


@pytest.mark.oracle
@pytest.mark.parametrize("case", cases(SPEC))
def test_entmax_agrees(case):
    entmax = pytest.importorskip("entmax", reason="entmax is not installed: make oracles")
    import torch

    kwargs = cases(SPEC)[case]
    out, cache = sparsemax_forward(**kwargs)
    dout = np.random.default_rng(5).standard_normal(out.shape)
    mine = sparsemax_backward(dout, cache)
    live = core.visible(kwargs["q"], kwargs["k"], **{
        n: kwargs[n] for n in ("mask", "causal", "align") if n in kwargs
    })  # fmt: skip
    names = [n for n in ("q", "k", "v", "bias") if n in kwargs]
    given = {n: torch.tensor(kwargs[n], requires_grad=True) for n in names}
    z = given["q"] @ given["k"].mT * kwargs.get("scale", kwargs["q"].shape[-1] ** -0.5)
    if "softcap" in kwargs:
        z = kwargs["softcap"] * torch.tanh(z / kwargs["softcap"])
    if "bias" in kwargs:
        z = z + given["bias"]
    live = torch.tensor(np.broadcast_to(live, z.shape).copy())
    alive = live.any(-1, keepdim=True)
    z = torch.where(live | ~alive, z, -1e9)  # far below, where entmax knows no masks
    p = torch.where(alive, entmax.sparsemax(z, dim=-1), 0.0)
    theirs = p @ given["v"]
    theirs.backward(torch.tensor(dout))
    np.testing.assert_allclose(out, theirs.detach().numpy(), rtol=0, atol=2e-14)
    for n in names:
        np.testing.assert_allclose(mine[n], given[n].grad.numpy(), rtol=0, atol=2e-14)


@pytest.mark.oracle
def test_the_loss_of_entmax_agrees():
    entmax = pytest.importorskip("entmax", reason="entmax is not installed: make oracles")
    import torch

    z, _, labels = drawn(6, lead=(12,))
    loss, cache = sparsemax_loss_forward(z, labels)
    given = torch.tensor(z, requires_grad=True)
    theirs = entmax.sparsemax_loss(given, torch.tensor(labels))
    theirs.sum().backward()
    g = sparsemax_loss_backward(np.ones_like(loss), cache)
    np.testing.assert_allclose(loss, theirs.detach().numpy(), rtol=0, atol=1e-14)
    np.testing.assert_allclose(g["z"], given.grad.numpy(), rtol=0, atol=1e-15)
