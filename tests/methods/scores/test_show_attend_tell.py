"""Soft and hard visual attention: slow loop, worked example, penalty, REINFORCE, oracle."""

import itertools
import math

import numpy as np
import pytest

import attention_ref
from attention_ref import core, engine
from attention_ref.kit.checks import cases
from attention_ref.methods.scores.show_attend_tell import (
    draw_forward,
    show_attend_tell_backward,
    show_attend_tell_forward,
    show_attend_tell_penalty_backward,
    show_attend_tell_penalty_forward,
    show_attend_tell_surrogate,
)

SPEC = attention_ref.get("scores/show_attend_tell")

EQUIVALENT = {
    "show_attend_tell_backward: -2  ->  -1 (2)": "sum_to adds up the queries of b_g as well",
    "show_attend_tell_backward: 0.0  ->  1.0 (2)": "a constant dp in a row passes no softmax",
    "show_attend_tell_surrogate: 1.0  ->  2.0 (2)": "in place of a weight 0, whose entry becomes 0",
}


def slow_show_attend_tell(
    q, k, v, Wq, Wk, w, b=None, w_g=None, b_g=None, mask=None, bias=None,
):  # fmt: skip
    """One number at a time."""
    lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    T, D, S, Dk, E, M = (*q.shape[-2:], *k.shape[-2:], v.shape[-1], w.shape[-1])
    q = np.broadcast_to(q, (*lead, T, D))
    k = np.broadcast_to(k, (*lead, S, Dk))
    v = np.broadcast_to(v, (*lead, S, E))
    mask = None if mask is None else np.broadcast_to(mask, (*lead, T, S))
    bias = None if bias is None else np.broadcast_to(bias, (*lead, T, S))
    out = np.zeros((*lead, T, E))
    for place in np.ndindex(*lead):
        for t in range(T):
            weight = {}
            for s in range(S):
                if mask is not None and not mask[place][t, s]:
                    continue
                z = 0.0 if bias is None else float(bias[place][t, s])
                for m in range(M):
                    x = 0.0 if b is None else float(b[m])
                    for d in range(D):
                        x += float(q[place][t, d]) * float(Wq[d, m])
                    for d in range(Dk):
                        x += float(k[place][s, d]) * float(Wk[d, m])
                    z += float(w[m]) * math.tanh(x)
                weight[s] = math.exp(z)
            gate = 1.0
            if w_g is not None:
                x = 0.0 if b_g is None else float(b_g[0])
                x += math.fsum(float(q[place][t, d]) * float(w_g[d]) for d in range(D))
                gate = 1.0 / (1.0 + math.exp(-x))
            total = math.fsum(weight.values())
            for e in range(E):
                mixed = math.fsum(x * float(v[place][s, e]) for s, x in weight.items())
                out[place][t, e] = gate * mixed / total if weight else 0.0
    return out


@pytest.mark.parametrize("case", cases(SPEC))
def test_equals_the_slow_loop(case):
    kwargs = cases(SPEC)[case]
    out, _ = show_attend_tell_forward(**kwargs)
    np.testing.assert_allclose(out, slow_show_attend_tell(**kwargs), rtol=0, atol=1e-14)


@pytest.mark.parametrize("without", [("b",), ("b_g",), ("b", "w_g", "b_g")])
def test_optional_parameters(without):
    """Left out they are zero; without w_g the gate is 1."""
    kwargs = {n: x for n, x in cases(SPEC)["plain"].items() if n not in without}
    out, cache = show_attend_tell_forward(**kwargs)
    np.testing.assert_allclose(out, slow_show_attend_tell(**kwargs), rtol=0, atol=1e-14)
    dout = np.random.default_rng(0).standard_normal(out.shape)
    hand = show_attend_tell_backward(dout, cache)
    tape = engine.vjp(lambda **x: show_attend_tell_forward(**x)[0], kwargs)[1](dout)
    assert set(hand) == set(tape) == set(kwargs)
    for n, g in hand.items():
        np.testing.assert_allclose(g, tape[n], rtol=0, atol=1e-14)


W = math.log(3.0) / 0.6
ROUND = {
    "q": np.array([[0.0]]),
    "k": np.array([[0.0], [math.log(2.0)]]),
    "v": np.array([[0.0], [4.0]]),
    "Wq": np.ones((1, 1)),
    "Wk": np.ones((1, 1)),
    "w": np.array([W]),
    "b": np.zeros(1),
    "w_g": np.ones(1),
    "b_g": np.array([math.log(3.0)]),
}
"""Hidden units 0 and 3/5, scores 0 and ln 3; the gate is the sigmoid of ln 3, that is 3/4."""


def test_worked_example_forward():
    """Weights 1/4 and 3/4, mixed 3, gated 9/4."""
    out, cache = show_attend_tell_forward(**ROUND)
    np.testing.assert_allclose(cache.u[0, :, 0], [0.0, 0.6], rtol=1e-15)
    np.testing.assert_allclose(cache.p, [[0.25, 0.75]], rtol=1e-15)
    np.testing.assert_allclose(cache.gate, [[0.75]], rtol=1e-15)
    np.testing.assert_allclose(cache.lse, [math.log(4.0)], rtol=1e-15)
    np.testing.assert_allclose(out, [[2.25]], rtol=1e-15)


def test_worked_example_backward():
    """dp = (0, 3), dz = 9/16 (-1, 1); the gate's logit 3 * 3/4 * 1/4 = 9/16; slopes 1, 16/25."""
    out, cache = show_attend_tell_forward(**ROUND, bias=np.zeros((1, 2)))
    g = show_attend_tell_backward(np.ones_like(out), cache)
    dx = 9 / 16 * W * np.array([-1.0, 0.64])
    want = {
        "v": [[0.1875], [0.5625]],
        "bias": [[-0.5625, 0.5625]],
        "w": [0.5625 * 0.6],
        "k": dx[:, None],
        "b": [dx.sum()],
        "q": [[dx.sum() + 0.5625]],
        "Wq": [[0.0]],
        "Wk": [[math.log(2.0) * dx[1]]],
        "w_g": [0.0],
        "b_g": [0.5625],
    }
    assert set(g) == set(want)
    for n, x in want.items():
        np.testing.assert_allclose(g[n], x, rtol=1e-14, atol=1e-16)


def test_one_place_takes_all():
    """S = 1: the weight is 1; only the gate, v and what feeds the gate get gradients."""
    kwargs = cases(SPEC)["plain"]
    one = kwargs | {"k": kwargs["k"][:, :1], "v": kwargs["v"][:, :1]}
    out, cache = show_attend_tell_forward(**one)
    assert np.all(cache.p == 1)
    np.testing.assert_allclose(out, cache.gate * one["v"], rtol=0, atol=1e-15)
    g = show_attend_tell_backward(np.ones_like(out), cache)
    assert not any(np.any(g[n]) for n in ("k", "Wq", "Wk", "w", "b"))
    assert np.all(g["q"] != 0) and np.all(g["w_g"] != 0)


def test_without_the_state_every_word_sees_the_same_map():
    kwargs = cases(SPEC)["plain"]
    _, cache = show_attend_tell_forward(**(kwargs | {"Wq": np.zeros((4, 4))}))
    np.testing.assert_allclose(cache.p, cache.p[:, :1] + 0 * cache.p, rtol=0, atol=1e-15)
    assert np.ptp(cache.gate, axis=1).min() > 0.01  # the gate still differs


def test_all_four_kinds_of_empty_rows():
    """Zero, NaN, the gated mean, an error; the gate of such a row gets no gradient under zero."""
    kwargs = cases(SPEC)["plain"]
    mask = np.ones((5, 6), bool)
    mask[2] = False
    out, cache = show_attend_tell_forward(**kwargs, mask=mask)
    assert not np.any(out[:, 2]) and np.all(np.isneginf(cache.lse[:, 2]))
    g = show_attend_tell_backward(np.ones_like(out), cache)
    assert not np.any(g["q"][:, 2]) and np.all(g["q"][:, 1] != 0)
    out, cache = show_attend_tell_forward(**kwargs, mask=mask, empty_row="nan")
    assert np.all(np.isnan(out[:, 2])) and np.sum(np.isnan(out)) == 6
    assert np.sum(np.isnan(cache.lse)) == 2
    g = show_attend_tell_backward(np.ones_like(out), cache)
    assert all(np.all(np.isfinite(x)) for x in g.values())
    out, cache = show_attend_tell_forward(**kwargs, mask=mask, empty_row="uniform")
    mean = cache.gate[:, 2] * kwargs["v"].mean(axis=1)
    np.testing.assert_allclose(out[:, 2], mean, rtol=0, atol=1e-15)
    with pytest.raises(core.errors.ParameterError, match="mask leaves"):
        show_attend_tell_forward(**kwargs, mask=mask, empty_row="raise")


def test_a_poisoned_row_sends_nothing_back():
    """NaN in a state and in the bias: those rows are NaN, and dp of them is not used either."""
    kwargs = cases(SPEC)["plain"] | {"bias": np.random.default_rng(7).standard_normal((2, 5, 6))}
    bad = {"q": kwargs["q"].copy(), "bias": kwargs["bias"].copy()}
    bad["q"][1, 2, 0] = bad["bias"][0, 3, 1] = np.nan
    out, cache = show_attend_tell_forward(**(kwargs | bad))
    assert np.all(np.isnan(out[1, 2])) and np.all(np.isnan(out[0, 3]))
    assert np.sum(np.isnan(out)) == 6 and np.sum(np.isnan(cache.lse)) == 2
    rng = np.random.default_rng(6)
    dout, dp = rng.standard_normal(out.shape), rng.standard_normal((2, 5, 6))
    g = show_attend_tell_backward(dout, cache, dp=dp)
    dout[1, 2] = dout[0, 3] = dp[1, 2] = dp[0, 3] = 0.0
    same = show_attend_tell_forward(**kwargs)[1]
    for n, x in show_attend_tell_backward(dout, same, dp=dp).items():
        np.testing.assert_allclose(g[n], x, rtol=0, atol=1e-14)


def test_networks_and_gates_of_their_own_for_each_head():
    """q, k, v without a head axis, two sets of parameters: two heads, gradients add up."""
    one = cases(SPEC)["no-heads"]
    rng = np.random.default_rng(3)
    shapes = {"Wq": (4, 4), "Wk": (2, 4), "w": (4,), "b": (4,), "w_g": (4,), "b_g": (1,)}
    heads = {n: rng.standard_normal((2, *s)) / 2 for n, s in shapes.items()}
    base = {n: one[n] for n in "qkv"}
    out, cache = show_attend_tell_forward(**base, **heads)
    dout = rng.standard_normal(out.shape)
    g = show_attend_tell_backward(dout, cache)
    parts = []
    for h in range(2):
        single, c = show_attend_tell_forward(**base, **{n: x[h] for n, x in heads.items()})
        np.testing.assert_allclose(single, out[h], rtol=0, atol=1e-15)
        parts.append(show_attend_tell_backward(dout[h], c))
    for n in g:
        want = parts[0][n] + parts[1][n] if n in "qkv" else [x[n] for x in parts]
        np.testing.assert_allclose(g[n], want, rtol=0, atol=1e-14)


# ------------------------------------------------------------------------------ the penalty


def test_penalty_by_hand():
    """Columns sum to 1.5 and 0.5: (1 - 1.5)^2 + (1 - 0.5)^2 = 0.5; dp = -2 (1 - sum)."""
    p = np.array([[0.75, 0.25], [0.75, 0.25]])
    assert show_attend_tell_penalty_forward(p)[0] == 0.5
    loss, cache = show_attend_tell_penalty_forward(p, weight=3.0)
    assert loss.shape == () and loss == 1.5
    g = show_attend_tell_penalty_backward(np.full((), 2.0), cache)["p"]
    np.testing.assert_array_equal(g, np.full((2, 2), 6.0) * [1.0, -1.0])


def test_penalty_is_zero_where_every_place_gets_its_share():
    """T = S with a permutation; T = 2 S with target 2; never with T != S and target 1."""
    turn = np.eye(4)[[2, 0, 3, 1]]
    assert show_attend_tell_penalty_forward(turn)[0] == 0
    twice = np.concatenate([turn, np.full((4, 4), 0.25)])
    assert show_attend_tell_penalty_forward(twice, target=2.0)[0] == 0
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(5), size=(3, 2))  # two words, five places
    least = 5 * (1 - 2 / 5) ** 2
    assert np.all(show_attend_tell_penalty_forward(p)[0] >= least)


def test_penalty_gradient_of_a_batch_by_tape():
    rng = np.random.default_rng(1)
    p, dloss = rng.random((3, 4, 5)), rng.standard_normal(3)
    _, cache = show_attend_tell_penalty_forward(p, target=0.8, weight=0.3)
    hand = show_attend_tell_penalty_backward(dloss, cache)["p"]
    options = {"target": 0.8, "weight": 0.3}
    tape = engine.vjp(lambda p: show_attend_tell_penalty_forward(p, **options)[0], {"p": p})
    np.testing.assert_allclose(hand, tape[1](dloss)["p"], rtol=1e-14)
    with pytest.raises(core.errors.ShapeError, match="dloss has shape"):
        show_attend_tell_penalty_backward(dloss[:2], cache)
    with pytest.raises(core.errors.ShapeError, match="p has shape"):
        show_attend_tell_penalty_forward(p[0, 0])


def test_gradient_of_the_weights_from_elsewhere():
    """Caption loss and penalty together: dout and dp against the tape through both."""
    kwargs = cases(SPEC)["mask"]
    out, cache = show_attend_tell_forward(**kwargs)
    rng = np.random.default_rng(2)
    dout, dloss = rng.standard_normal(out.shape), rng.standard_normal(2)

    def both(**arrays):
        out, cache = show_attend_tell_forward(**(kwargs | arrays))
        return np.sum(dout * out) + np.sum(dloss * show_attend_tell_penalty_forward(cache.p)[0])

    _, missing = show_attend_tell_penalty_forward(cache.p)
    dp = show_attend_tell_penalty_backward(dloss, missing)["p"]
    hand = show_attend_tell_backward(dout, cache, dp=dp)
    arrays = {n: kwargs[n] for n in hand}
    tape = engine.vjp(both, arrays)[1](np.ones(()))
    for n, g in hand.items():
        np.testing.assert_allclose(g, tape[n], rtol=0, atol=1e-14)
    with pytest.raises(core.errors.ShapeError, match="dp has shape"):
        show_attend_tell_backward(dout, cache, dp=dp[0])


# ------------------------------------------------------------------------------ hard attention


def test_draws_have_the_frequencies_of_the_weights():
    """20000 draws of one row; four standard deviations; places of weight 0 are never drawn."""
    p = np.array([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    drawn = draw_forward(np.broadcast_to(p, (20000, 6)), np.random.default_rng(0))
    assert np.all(drawn.sum(axis=-1) == 1) and drawn.dtype == np.float64
    bound = 4 * np.sqrt(p * (1 - p) / 20000)
    assert np.all(np.abs(drawn.mean(axis=0) - p) <= bound)


class Fixed(np.random.Generator):
    """Gives the same number always."""

    def __init__(self, u):
        super().__init__(np.random.PCG64(0))
        self.u = u

    def random(self, size=None):
        return np.full(size, self.u)


@pytest.mark.parametrize(
    ("u", "place"),
    [(0.0, 1), (0.499, 1), (0.5, 3), (0.799, 3), (0.801, 4), (1 - 2**-53, 4), (1, 4)],
)
def test_which_place_a_number_draws(u, place):
    """The first place whose cumulated weight exceeds u; rounding cannot run past the last."""
    p = np.array([[0.0, 0.5, 0.0, 0.3, 0.2, 0.0], [0.0] * 6], np.float32)
    drawn = draw_forward(p, Fixed(u))
    assert drawn.dtype == np.float32
    assert np.argmax(drawn[0]) == place and drawn[0].sum() == 1 and not np.any(drawn[1])


def test_hard_attention_picks_one_value_and_gates_it():
    kwargs = cases(SPEC)["mask"]
    soft, first = show_attend_tell_forward(**kwargs)
    out, cache = show_attend_tell_forward(**kwargs, rng=np.random.default_rng(0))
    assert cache.hard and not first.hard and np.all((cache.r == 0) | (cache.r == 1))
    np.testing.assert_array_equal(cache.p, first.p)
    np.testing.assert_array_equal(out, cache.gate * (cache.r @ kwargs["v"]))
    assert not np.any(out[0, 1]) and np.any(out != soft)  # the empty row stays zero
    again, _ = show_attend_tell_forward(**kwargs, rng=np.random.default_rng(0))
    np.testing.assert_array_equal(out, again)


def test_hard_equals_soft_where_there_is_one_place():
    kwargs = cases(SPEC)["plain"]
    mask = np.zeros((5, 6), bool)
    mask[np.arange(5), [3, 0, 5, 5, 2]] = True
    soft, cache = show_attend_tell_forward(**kwargs, mask=mask)
    hard, drawn = show_attend_tell_forward(**kwargs, mask=mask, rng=np.random.default_rng(4))
    np.testing.assert_array_equal(hard, soft)
    dout = np.random.default_rng(5).standard_normal(soft.shape)
    g, h = show_attend_tell_backward(dout, cache), show_attend_tell_backward(dout, drawn)
    for n in g:
        np.testing.assert_allclose(h[n], g[n], rtol=0, atol=1e-15)


def test_hard_attention_without_a_cost_moves_values_and_gate_only():
    """The place drawn is a constant: the tape agrees, and k, w and the projections get zero."""
    kwargs = cases(SPEC)["mask"]
    out, cache = show_attend_tell_forward(**kwargs, rng=np.random.default_rng(1))
    dout = np.random.default_rng(2).standard_normal(out.shape)
    hand = show_attend_tell_backward(dout, cache)
    arrays = {n: kwargs[n] for n in hand}

    def again(**arrays):
        return show_attend_tell_forward(**(kwargs | arrays), rng=np.random.default_rng(1))[0]

    tape = engine.vjp(again, arrays)[1](dout)
    for n, g in hand.items():
        np.testing.assert_allclose(g, tape[n], rtol=0, atol=1e-15)
    assert not any(np.any(hand[n]) for n in ("k", "Wq", "Wk", "w", "b"))
    assert np.any(hand["v"]) and np.any(hand["w_g"]) and np.any(hand["q"])


def _two_words():
    """Two words, three places, and a cost of every pair of places."""
    rng = np.random.default_rng(8)
    draw = {"q": (2, 2), "k": (3, 2), "v": (3, 1), "Wq": (2, 3), "Wk": (2, 3), "w": (3,)}
    kwargs = {n: rng.standard_normal(s) for n, s in draw.items()}
    return kwargs, rng.standard_normal((3, 3))


def _mean_surrogate(kwargs, cost, baseline, entropy):
    """The mean of (8) over all nine draws, each with its probability; also its variance."""
    _, cache = show_attend_tell_forward(**kwargs, rng=np.random.default_rng(0))
    mean, square = np.zeros((2, 3)), np.zeros((2, 3))
    for i, j in itertools.product(range(3), repeat=2):
        drawn = cache._replace(r=np.eye(3)[[i, j]])
        total = np.full(2, cost[i, j] - baseline)  # both words answer for the cost of the caption
        dp = show_attend_tell_surrogate(total, drawn, weight=0.7, entropy=entropy)
        chance = cache.p[0, i] * cache.p[1, j]
        dz = core.softmax_backward(dp, cache.p, True)
        mean, square = mean + chance * dp, square + chance * dz**2
    centre = core.softmax_backward(mean, cache.p, True)
    return mean, np.sum(square - centre**2), cache


@pytest.mark.parametrize("baseline", [0.0, 3.0])
def test_the_mean_of_the_surrogate_is_the_gradient_of_the_expected_cost(baseline):
    """By enumeration: 0.7 E[cost] - 0.2 entropy, for every parameter, with any baseline."""
    kwargs, cost = _two_words()

    def expected(**arrays):
        p = show_attend_tell_forward(**arrays)[1].p
        return 0.7 * np.sum(p[0][:, None] * p[1] * cost) + 0.2 * np.sum(p * np.log(p))

    mean, _, cache = _mean_surrogate(kwargs, cost, baseline, 0.2)
    hand = show_attend_tell_backward(np.zeros((2, 1)), cache, dp=mean)
    tape = engine.vjp(expected, kwargs)[1](np.ones(()))
    for n, g in hand.items():
        np.testing.assert_allclose(g, tape[n], rtol=0, atol=1e-14)
    assert np.any(hand["Wq"])


def test_a_good_baseline_lowers_the_variance():
    kwargs, cost = _two_words()
    p = show_attend_tell_forward(**kwargs)[1].p
    average = p[0] @ cost @ p[1]
    variances = [_mean_surrogate(kwargs, cost + 3, b, 0.0)[1] for b in (0.0, average + 3)]
    assert 0 < variances[1] < variances[0] / 2


def test_the_surrogate_by_hand():
    """p = (1/4, 3/4): drawing the first costs dp = 2 / (1/4) = 8; the hidden place gets 0."""
    kwargs = {n: x for n, x in ROUND.items() if n not in ("w_g", "b_g")}
    kwargs |= {n: np.concatenate([kwargs[n], np.ones((1, 1))]) for n in "kv"}
    mask = np.array([[True, True, False]])
    _, cache = show_attend_tell_forward(**kwargs, mask=mask, rng=Fixed(0.1))
    dp = show_attend_tell_surrogate(np.array([2.0]), cache)
    np.testing.assert_allclose(dp, [[8.0, 0.0, 0.0]], rtol=1e-15)
    dp = show_attend_tell_surrogate(np.array([2.0]), cache, weight=0.5, entropy=2.0)
    want = [[4.0 + 2 * (1 - math.log(4)), 2 * (1 + math.log(0.75)), 0.0]]
    np.testing.assert_allclose(dp, want, rtol=1e-14)


# ------------------------------------------------------------------------------ the door, oracle


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"Wq": np.ones((6, 4))}, core.errors.ShapeError, r"Wq has D = 6 .* expected 4 as in q"),
        ({"Wk": np.ones((3, 4))}, core.errors.ShapeError, r"Wk has Dk = 3 .* expected 2 as in k"),
        ({"w": np.ones(1)}, core.errors.ShapeError, r"w has M = 1 .* expected 4 as in Wq"),
        ({"b": np.ones(1)}, core.errors.ShapeError, "b has M = 1"),
        ({"w_g": np.ones(3)}, core.errors.ShapeError, r"w_g has D = 3 .* expected 4 as in q"),
        ({"b_g": np.ones(2)}, core.errors.ShapeError, "b_g has 1 = 2"),
        ({"w_g": None}, core.errors.ParameterError, "b_g is given without w_g"),
        ({"rng": 3}, core.errors.DTypeError, "rng is a int"),
        ({"bias": np.ones((5, 7))}, core.errors.ShapeError, "bias has shape"),
        ({"mask": np.ones((6, 5), bool)}, core.errors.ShapeError, "looks transposed"),
        ({"empty_row": "zeros"}, core.errors.ParameterError, "did you mean 'zero'"),
    ],
)
def test_errors_name_argument_and_expectation(change, error, says):
    with pytest.raises(error, match=says):
        show_attend_tell_forward(**(cases(SPEC)["plain"] | change))


def test_other_errors():
    kwargs = cases(SPEC)["plain"]
    out, cache = show_attend_tell_forward(**kwargs)
    with pytest.raises(core.errors.ShapeError, match="dout has shape"):
        show_attend_tell_backward(out[0], cache)
    q = np.broadcast_to(np.float64(0.0), (1, 10000, 4))  # hidden units 10^8 * 4 * 8 bytes
    with pytest.raises(core.errors.MemoryLimitError, match=r"the hidden units .* 3\.0 GiB"):
        show_attend_tell_forward(**(kwargs | {"q": q, "k": q[..., :2], "v": q}))


@pytest.mark.oracle
@pytest.mark.parametrize("case", cases(SPEC))
def test_pytorch_agrees(case):
    """Linear layers, tanh, softmax, sigmoid, with the penalty on top; the gradient by autograd."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")
    kwargs = cases(SPEC)[case]
    out, cache = show_attend_tell_forward(**kwargs)
    dout = np.random.default_rng(5).standard_normal(out.shape)
    loss, missing = show_attend_tell_penalty_forward(cache.p, weight=0.4)
    dp = show_attend_tell_penalty_backward(np.ones_like(loss), missing)["p"]
    mine = show_attend_tell_backward(dout, cache, dp=dp)
    given = {n: torch.tensor(kwargs[n], requires_grad=True) for n in mine}
    hidden = (given["q"] @ given["Wq"]).unsqueeze(-2)
    units = (given["k"] @ given["Wk"] + given["b"]).unsqueeze(-3)
    z = torch.einsum("...tsm,m->...ts", torch.tanh(hidden + units), given["w"])
    if "bias" in given:
        z = z + given["bias"]
    rule = {n: kwargs[n] for n in ("mask",) if n in kwargs}
    live = torch.tensor(np.array(core.visible(kwargs["q"], kwargs["k"], **rule)))
    alive = live.any(-1, keepdim=True)
    p = torch.softmax(torch.where(live | ~alive, z, -torch.inf), -1)
    p = torch.where(alive, p, 0.0)
    theirs = p @ given["v"]
    if "w_g" in given:
        theirs = torch.sigmoid(given["q"] @ given["w_g"] + given["b_g"]).unsqueeze(-1) * theirs
    penalty = 0.4 * ((1 - p.sum(-2)) ** 2).sum()
    ((theirs * torch.tensor(dout)).sum() + penalty).backward()
    np.testing.assert_allclose(out, theirs.detach().numpy(), rtol=0, atol=4e-15)
    np.testing.assert_allclose(loss.sum(), penalty.item(), rtol=1e-14)
    for n, g in mine.items():
        np.testing.assert_allclose(g, given[n].grad.numpy(), rtol=0, atol=4e-14)
