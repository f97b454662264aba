"""Sliding window: slow loop, worked example, identities, global tokens, oracle."""

import math

import numpy as np
import pytest

import attention_ref
from attention_ref import core
from attention_ref.kit import checks
from attention_ref.kit.checks import cases
from attention_ref.methods.patterns.sliding_window import (
    sliding_window_backward,
    sliding_window_forward,
)

SPEC = attention_ref.get("patterns/sliding_window")
ONE_PROJECTION = [name for name in cases(SPEC) if name != "global-projections"]


def slow_sliding_window(
    q, k, v, qg=None, kg=None, vg=None, left=None, right=None, dilation=1, global_tokens=None,
    mask=None, causal=False, align="lower_right", scale=None, softcap=None, bias=None,
):  # fmt: skip
    """One pair at a time: is it in the neighbourhood, and what does it weigh."""
    lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    T, D, S, E = q.shape[-2], q.shape[-1], k.shape[-2], v.shape[-1]
    wide = {"q": (q, T), "k": (k, S), "v": (v, S), "qg": (qg, T), "kg": (kg, S), "vg": (vg, S)}
    wide = {
        name: np.broadcast_to(x, (*lead, n, x.shape[-1]))
        for name, (x, n) in wide.items() if x is not None
    }  # fmt: skip
    mask = None if mask is None else np.broadcast_to(mask, (*lead, T, S))
    bias = None if bias is None else np.broadcast_to(bias, (*lead, T, S))
    chosen = set()
    if global_tokens is not None and global_tokens.dtype == bool:
        chosen = {s for s in range(S) if global_tokens[s]}
    elif global_tokens is not None:
        chosen = {int(s) for s in global_tokens}
    c = 1.0 / math.sqrt(D) if scale is None else scale
    out = np.zeros((*lead, T, E))
    for place in np.ndindex(*lead):
        for t in range(T):
            own = t + S - T if align == "lower_right" else t
            special = own in chosen
            rows = {n: wide[n + "g" if special and n + "g" in wide else n][place] for n in "qkv"}
            weight = {}
            for s in range(S):
                step = s - own
                if not (special or s in chosen):
                    if step % dilation:
                        continue
                    if (left is not None and step < -left) or (right is not None and step > right):
                        continue
                if causal and step > 0:
                    continue
                if mask is not None and not mask[place][t, s]:
                    continue
                z = math.fsum(float(rows["q"][t, d]) * float(rows["k"][s, d]) for d in range(D)) * c
                z = z if softcap is None else softcap * math.tanh(z / softcap)
                weight[s] = math.exp(z + (0.0 if bias is None else float(bias[place][t, s])))
            total = math.fsum(weight.values())
            for e in range(E):
                mixed = math.fsum(w * float(rows["v"][s, e]) for s, w in weight.items())
                out[place][t, e] = mixed / total if weight else 0.0
    return out


def _seen(T, S, **options):
    """Which pairs have a weight, for equal scores."""
    x, y = np.zeros((T, 1)), np.zeros((S, 1))
    return sliding_window_forward(x, y, y, **options)[1].p > 0


def _pattern(*rows):
    return np.array([[c == "x" for c in row] for row in rows])


@pytest.mark.parametrize("case", cases(SPEC))
def test_equals_the_slow_loop(case):
    kwargs = cases(SPEC)[case]
    out, _ = sliding_window_forward(**kwargs)
    np.testing.assert_allclose(out, slow_sliding_window(**kwargs), rtol=0, atol=1e-14)


def test_worked_example():
    """Scores 0 and ln 3 of the own key and the one before: weights 1/4 and 3/4, by hand."""
    q, k = np.ones((3, 1)), np.array([[math.log(3)], [0.0], [math.log(3)]])
    v = np.array([[4.0], [8.0], [0.0]])
    out, cache = sliding_window_forward(q, k, v, left=1, right=0)
    np.testing.assert_allclose(cache.p, [[1, 0, 0], [0.75, 0.25, 0], [0, 0.25, 0.75]], rtol=1e-15)
    np.testing.assert_allclose(out, [[4.0], [5.0], [2.0]], rtol=1e-15)
    g = sliding_window_backward(np.array([[0.0], [1.0], [0.0]]), cache)
    np.testing.assert_allclose(g["v"], [[0.75], [0.25], [0.0]], rtol=1e-15)
    np.testing.assert_allclose(g["k"], [[-0.75], [0.75], [0.0]], rtol=1e-15)
    np.testing.assert_allclose(g["q"], [[0], [-0.75 * math.log(3)], [0]], rtol=1e-15)


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({"left": 1, "right": 0}, ("x....", "xx...", ".xx..", "..xx.", "...xx")),
        ({"left": 0, "right": 2}, ("xxx..", ".xxx.", "..xxx", "...xx", "....x")),
        ({"left": 2, "right": 2, "dilation": 2}, ("x.x..", ".x.x.", "x.x.x", ".x.x.", "..x.x")),
        ({"left": 3, "right": 4, "dilation": 3}, ("x..x.", ".x..x", "..x..", "x..x.", ".x..x")),
        ({"left": 0, "right": 0, "global_tokens": np.array([1])},
         ("xx...", "xxxxx", ".xx..", ".x.x.", ".x..x")),
        ({"left": 0, "right": 0, "global_tokens": np.array([1]), "causal": True},
         ("x....", "xx...", ".xx..", ".x.x.", ".x..x")),
        ({"left": 4, "causal": True}, ("x....", "xx...", "xxx..", "xxxx.", "xxxxx")),
        ({"right": 0}, ("x....", "xx...", "xxx..", "xxxx.", "xxxxx")),
        ({"left": 0}, ("xxxxx", ".xxxx", "..xxx", "...xx", "....x")),
    ],
)  # fmt: skip
def test_neighbourhoods_drawn_by_hand(options, want):
    np.testing.assert_array_equal(_seen(5, 5, **options), _pattern(*want))


def test_where_a_query_stands_when_lengths_differ():
    lower, upper = ("..xx.", "...xx"), ("x....", "xx...")
    np.testing.assert_array_equal(_seen(2, 5, left=1, right=0), _pattern(*lower))
    found = _seen(2, 5, left=1, right=0, align="upper_left")
    np.testing.assert_array_equal(found, _pattern(*upper))
    found = _seen(4, 2, left=0, right=0, global_tokens=np.array([0]))
    np.testing.assert_array_equal(found, _pattern("x.", "x.", "xx", "xx"))


def test_global_tokens_as_places_or_truth_values_alike():
    kwargs = cases(SPEC)["plain"]
    base, _ = sliding_window_forward(**kwargs, global_tokens=np.array([1, 4]))
    truth = np.array([False, True, False, False, True, False])
    for same in (truth, np.array([4, 1, 4]), np.array([[1, 4]]), truth[None]):
        out, _ = sliding_window_forward(**kwargs, global_tokens=same)
        np.testing.assert_array_equal(out, base)
    none, _ = sliding_window_forward(**kwargs, global_tokens=np.array([], int))
    np.testing.assert_array_equal(none, sliding_window_forward(**kwargs)[0])


def test_each_sequence_of_a_batch_has_its_own_global_tokens():
    kwargs = cases(SPEC)["plain"]
    places = np.array([[1], [4]])
    out, _ = sliding_window_forward(**kwargs, global_tokens=places)
    for i in range(2):
        one = kwargs | {n: kwargs[n][i] for n in "qkv"}
        want, _ = sliding_window_forward(**one, global_tokens=places[i])
        np.testing.assert_allclose(out[i], want, rtol=0, atol=1e-15)


def test_a_window_of_one_returns_the_own_value():
    kwargs = cases(SPEC)["plain"] | {"left": 0, "right": 0}
    out, _ = sliding_window_forward(**kwargs)
    np.testing.assert_array_equal(out, kwargs["v"][:, 1:])


def test_dilation_is_a_window_on_every_other_token():
    rng = np.random.default_rng(1)
    q, k, v = rng.standard_normal((3, 8, 4))
    out, cache = sliding_window_forward(q, k, v, left=4, right=2, dilation=2)
    g = sliding_window_backward(np.cos(out), cache)
    for start in (0, 1):
        part = [x[start::2] for x in (q, k, v)]
        few, few_cache = sliding_window_forward(*part, left=2, right=1)
        np.testing.assert_allclose(out[start::2], few, rtol=0, atol=1e-15)
        w = sliding_window_backward(np.cos(few), few_cache)
        for name in "qkv":
            np.testing.assert_allclose(g[name][start::2], w[name], rtol=0, atol=1e-14)


def test_all_tokens_global_is_dense():
    kwargs = cases(SPEC)["plain"] | {"left": 0, "right": 0}
    out, _ = sliding_window_forward(**kwargs, global_tokens=np.ones(6, bool))
    dense, _ = attention_ref.run(
        "scores/dot_product", kwargs["q"], kwargs["k"], kwargs["v"], scale=kwargs["scale"]
    )
    np.testing.assert_allclose(out, dense, rtol=0, atol=1e-15)


def test_projections_equal_to_the_first_ones_change_nothing():
    """Then their gradients add up to those without them."""
    kwargs = cases(SPEC)["global-projections"]
    plain = {n: a for n, a in kwargs.items() if n not in ("qg", "kg", "vg")}
    base, base_cache = sliding_window_forward(**plain)
    same = plain | {n + "g": plain[n] for n in "qkv"}
    out, cache = sliding_window_forward(**same)
    np.testing.assert_array_equal(out, base)
    np.testing.assert_array_equal(cache.p, base_cache.p)
    g, w = sliding_window_backward(np.cos(out), cache), sliding_window_backward(
        np.cos(out), base_cache
    )
    assert set(g) == {"q", "k", "v", "qg", "kg", "vg", "bias"}
    for name in "qkv":
        np.testing.assert_allclose(g[name] + g[name + "g"], w[name], rtol=0, atol=1e-14)
    np.testing.assert_allclose(g["bias"], w["bias"], rtol=0, atol=1e-14)
    assert np.any(g["qg"][1]) and not np.any(g["qg"][[0, 2, 3, 4]]) and not np.any(g["q"][1])


@pytest.mark.parametrize("name", ["qg", "kg", "vg"])
def test_one_projection_alone(name):
    """The others are then q, k, v; only the row of the global query may differ."""
    kwargs = cases(SPEC)["global-projections"]
    given = {n: a for n, a in kwargs.items() if n not in ("qg", "kg", "vg") or n == name}
    out, cache = sliding_window_forward(**given)
    want = slow_sliding_window(**given)
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-14)
    full = sliding_window_backward(np.sin(out), cache)
    spread = given | {n + "g": kwargs[n] for n in "qkv" if n + "g" not in given}
    w = sliding_window_backward(np.sin(out), sliding_window_forward(**spread)[1])
    assert set(full) == {"q", "k", "v", "bias", name}
    values = np.where(cache.ours[..., None], given.get("vg", given["v"]), given["v"])
    np.testing.assert_allclose(np.sum(cache.p[..., None] * values, -2), out, rtol=0, atol=1e-14)
    for n in "qkv":
        total = w[n] + w[n + "g"] if n + "g" != name else w[n]
        np.testing.assert_allclose(full[n], total, rtol=0, atol=1e-14)


@pytest.mark.parametrize("case", ONE_PROJECTION)
def test_weights_of_a_row_sum_to_one(case):
    checks.check_row_stochastic(SPEC, case, cases(SPEC)[case])


@pytest.mark.parametrize("case", ONE_PROJECTION)
def test_linear_in_v_and_scaled(case):
    checks.check_linear_in_v(SPEC, case, cases(SPEC)[case])
    checks.check_scale(SPEC, case, cases(SPEC)[case])


@pytest.mark.parametrize("name", ["k", "v", "kg", "vg"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_key_reaches_its_neighbours_alone(name, bad):
    """Key 6: in the window of queries 3 and 4 (places 5, 6); query 1 (place 3) is global."""
    kwargs = cases(SPEC)["global-projections"]
    poisoned = kwargs[name].copy()
    poisoned[6, 0] = bad
    clean, clean_cache = sliding_window_forward(**kwargs)
    out, cache = sliding_window_forward(**(kwargs | {name: poisoned}))
    rows = [1] if name.endswith("g") else [3, 4]
    assert np.all(np.isnan(out[rows]))
    rest = [t for t in range(5) if t not in rows]
    np.testing.assert_array_equal(out[rest], clean[rest])
    dout = np.cos(clean)
    g = sliding_window_backward(dout, cache)
    dout[rows] = 0.0
    want = sliding_window_backward(dout, clean_cache)
    for n in g:
        np.testing.assert_allclose(g[n], want[n], rtol=0, atol=1e-14)


def test_a_key_hidden_by_the_mask_has_no_effect():
    for case in ("plain", "bias", "global-projections"):
        kwargs = cases(SPEC)[case]
        mask = np.ones((kwargs["q"].shape[-2], kwargs["k"].shape[-2]), bool)
        mask[:, 3] = False
        changed = dict(kwargs)
        for name in ("k", "v", "kg", "vg"):
            if name in kwargs:
                changed[name] = kwargs[name].copy()
                changed[name][..., 3, :] = np.nan
        out, cache = sliding_window_forward(**kwargs, mask=mask)
        same, same_cache = sliding_window_forward(**changed, mask=mask)
        np.testing.assert_array_equal(out, same)
        g = sliding_window_backward(np.cos(out), cache)
        w = sliding_window_backward(np.cos(out), same_cache)
        for name, x in g.items():
            np.testing.assert_array_equal(x, w[name])
            assert name not in ("k", "v", "kg", "vg") or not np.any(x[..., 3, :])


def test_a_row_that_the_window_empties():
    """Seven queries, three keys, no look ahead: the first four stand before the first key."""
    q, k, v = np.zeros((7, 1)), np.zeros((3, 1)), np.array([[3.0], [6.0], [9.0]])
    options = {"left": 1, "right": 0}
    out, cache = sliding_window_forward(q, k, v, **options)
    np.testing.assert_array_equal(out[:, 0], [0, 0, 0, 0, 3, 4.5, 7.5])
    g = sliding_window_backward(np.ones_like(out), cache)
    np.testing.assert_array_equal(g["v"][:, 0], [1.5, 1.0, 0.5])
    out, cache = sliding_window_forward(q, k, v, **options, empty_row="uniform")
    np.testing.assert_allclose(out[:4, 0], 6.0, rtol=1e-15)
    out, _ = sliding_window_forward(q, k, v, **options, empty_row="nan")
    np.testing.assert_array_equal(np.isnan(out[:, 0]), [True] * 4 + [False] * 3)
    with pytest.raises(core.errors.ParameterError, match="without a key"):
        sliding_window_forward(q, k, v, **options, empty_row="raise")


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"left": -1}, core.errors.ParameterError, "left is -1, expected an integer 0 <= left"),
        ({"right": 1.0}, core.errors.ParameterError, "right is 1.0, expected an integer"),
        ({"dilation": 0}, core.errors.ParameterError, "dilation is 0, expected an integer 1 <="),
        ({"global_tokens": [0]}, core.errors.DTypeError, "global_tokens is a list"),
        ({"global_tokens": np.array([6])}, core.errors.ParameterError, "global_tokens holds"),
        ({"global_tokens": np.array([-1])}, core.errors.ParameterError, "global_tokens holds"),
        ({"global_tokens": np.array([0.5])}, core.errors.DTypeError, "expected integers"),
        ({"global_tokens": np.ones(5, bool)}, core.errors.ShapeError, "global_tokens has shape"),
        ({"global_tokens": np.array(1)}, core.errors.ParameterError, "global_tokens.ndim is 0"),
        ({"qg": np.ones((2, 6, 4))}, core.errors.ShapeError, "qg has T = 6 .* expected 5 as in q"),
        ({"kg": np.ones((2, 5, 4))}, core.errors.ShapeError, "kg has S = 5 .* expected 6 as in k"),
        ({"vg": np.ones((2, 6, 4))}, core.errors.ShapeError, "vg has E = 4 .* expected 3 as in v"),
    ],
)
def test_errors_name_argument_and_expectation(change, error, says):
    with pytest.raises(error, match=says):
        sliding_window_forward(**(cases(SPEC)["plain"] | change))


def test_values_may_have_axes_of_their_own():
    """A leading axis of v alone: one set of weights, several mixtures, gradients summed back."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(n) for n in ((5, 4), (6, 4), (2, 6, 3)))
    out, cache = sliding_window_forward(q, k, v, left=2, right=1)
    g = sliding_window_backward(np.cos(out), cache)
    parts = [sliding_window_forward(q, k, x, left=2, right=1) for x in v]
    grads = [sliding_window_backward(np.cos(o), c) for o, c in parts]
    np.testing.assert_allclose(out, np.stack([o for o, _ in parts]), rtol=0, atol=1e-15)
    np.testing.assert_allclose(g["v"], np.stack([x["v"] for x in grads]), rtol=0, atol=1e-14)
    for name in "qk":
        np.testing.assert_allclose(g[name], sum(x[name] for x in grads), rtol=0, atol=1e-14)


def test_a_foreign_cotangent_is_refused():
    out, cache = sliding_window_forward(**cases(SPEC)["plain"])
    with pytest.raises(core.errors.ShapeError, match="dout has shape"):
        sliding_window_backward(out[0], cache)


@pytest.mark.oracle
@pytest.mark.parametrize("case", ["plain", "batch", "causal", "packed", "global-projections"])
def test_pytorch_agrees(case):
    """Gathered neighbours instead of a mask: only the keys of a row, PyTorch's softmax."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")
    kwargs = cases(SPEC)[case] | {"softcap": None}
    given = {
        n: torch.tensor(a, requires_grad=True) for n, a in kwargs.items()
        if isinstance(a, np.ndarray) and a.dtype.kind == "f"
    }  # fmt: skip
    out, cache = sliding_window_forward(**kwargs)
    T, S, rows = kwargs["q"].shape[-2], kwargs["k"].shape[-2], []
    chosen = [int(s) for s in kwargs.get("global_tokens", [])]
    for t in range(T):
        place, far = t + S - T, "g" if t + S - T in chosen and "qg" in given else ""
        stop = place if kwargs.get("causal") else S - 1
        low = place - kwargs["left"]
        high = stop if kwargs["right"] is None else min(place + kwargs["right"], stop)
        keys = range(low, high + 1, kwargs.get("dilation", 1))
        keys = {s for s in keys if s >= 0} | {s for s in chosen if s <= stop}
        keys = sorted(range(stop + 1) if place in chosen else keys)
        if "mask" in kwargs:
            keys = [s for s in keys if kwargs["mask"][t, s]]
        q, k, v = given["q" + far], given["k" + far], given["v" + far]
        z = torch.einsum("...d,...sd->...s", q[..., t, :], k[..., keys, :]) * kwargs["scale"]
        if "bias" in given:
            z = z + given["bias"][t, keys]
        rows.append(torch.einsum("...s,...se->...e", torch.softmax(z, -1), v[..., keys, :]))
    theirs = torch.stack(rows, -2)
    np.testing.assert_allclose(out, theirs.detach().numpy(), rtol=0, atol=5e-15)
    dout = np.random.default_rng(5).standard_normal(out.shape)
    theirs.backward(torch.tensor(dout))
    for name, g in sliding_window_backward(dout, cache).items():
        np.testing.assert_allclose(g, given[name].grad.numpy(), rtol=0, atol=5e-14)
