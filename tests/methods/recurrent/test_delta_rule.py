"""Delta rule: slow loop, worked example, identities, chunks, non-finite tokens, oracle."""

import math

import numpy as np
import pytest

import attention_ref
from attention_ref import core
from attention_ref.kit.checks import cases
from attention_ref.methods.recurrent.delta_rule import (
    Out,
    delta_rule_backward,
    delta_rule_chunked_forward,
    delta_rule_forward,
)

SPEC = attention_ref.get("recurrent/delta_rule")


def slow_delta_rule(q, k, v, b, gate=None, state=None, scale=None):
    """Seen from the reader: carry the query back through all tokens, collecting what it meets.

    S_T = M_T S_{T-1} + b_T k_T v_T^T with M_t = (I - b_t k_t k_t^T) diag(a_t), so a row vector r
    that reads S_t meets b_t (r . k_t) v_t and goes on as r M_t.
    """
    parts = [x.shape[:-2] for x in (q, k, v)] + [b.shape[:-1]]
    parts += [] if state is None else [state.shape[:-2]]
    parts += [] if gate is None else [gate.shape[: -1 if gate.ndim == b.ndim else -2]]
    lead, (T, D), E = np.broadcast_shapes(*parts), q.shape[-2:], v.shape[-1]
    q, k = (np.broadcast_to(x, (*lead, T, D)) for x in (q, k))
    v, b = np.broadcast_to(v, (*lead, T, E)), np.broadcast_to(b, (*lead, T))
    state = None if state is None else np.broadcast_to(state, (*lead, D, E))
    if gate is not None:
        wide = (T,) if gate.ndim == b.ndim else (T, D)
        gate = np.broadcast_to(gate, (*lead, *wide))
    c = 1.0 / math.sqrt(D) if scale is None else scale

    def read(place, r, last):
        found = [0.0] * E
        for t in range(last, -1, -1):
            met = math.fsum(r[d] * float(k[place][t, d]) for d in range(D))
            strength = float(b[place][t])
            for e in range(E):
                found[e] += strength * met * float(v[place][t, e])
            for d in range(D):
                kept = 1.0 if gate is None else float(gate[place][(t, d)[: gate[place].ndim]])
                r[d] = (r[d] - strength * met * float(k[place][t, d])) * kept
        if state is not None:
            for e in range(E):
                found[e] += math.fsum(r[d] * float(state[place][d, e]) for d in range(D))
        return found

    out, final = np.zeros((*lead, T, E)), np.zeros((*lead, D, E))
    for place in np.ndindex(*lead):
        for t in range(T):
            out[place][t] = read(place, [c * float(q[place][t, d]) for d in range(D)], t)
        for d in range(D):
            final[place][d] = read(place, [1.0 if i == d else 0.0 for i in range(D)], T - 1)
    return {"out": out, "state": final}


def _case(name, **more):
    return cases(SPEC)[name] | more


@pytest.mark.parametrize("case", cases(SPEC))
def test_equals_the_slow_loop(case):
    kwargs = cases(SPEC)[case]
    (out, state), _ = delta_rule_forward(**kwargs)
    want = slow_delta_rule(**kwargs)
    np.testing.assert_allclose(out, want["out"], rtol=0, atol=1e-13)
    np.testing.assert_allclose(state, want["state"], rtol=0, atol=1e-13)


def test_worked_example_forward():
    """Write half of 5 at e1; keep 0.8 of it; at (0.6, 0.8) the memory says 1.2 instead of 3.2."""
    q = np.array([[0.0, 0.0], [1.0, 1.0]])
    k = np.array([[1.0, 0.0], [0.6, 0.8]])
    v, b, gate = np.array([[5.0], [3.2]]), np.array([0.5, 0.5]), np.array([0.1, 0.8])
    (out, state), cache = delta_rule_forward(q, k, v, b, gate, scale=0.5)
    np.testing.assert_allclose(cache.states[1], [[2.5], [0.0]], rtol=1e-15)
    np.testing.assert_allclose(state, [[2.6], [0.8]], rtol=1e-15)
    np.testing.assert_allclose(out, [[0.0], [1.7]], rtol=1e-15)


@pytest.mark.parametrize(("gate", "da"), [([0.5], [-1.0]), ([[0.5, 0.5]], [[-1.0, 0.0]])])
def test_worked_example_backward(gate, da):
    """F = (1, 0), u = 4 - 1 = 3, S = (2.5, 1.5), out = 5.5; all gradients by hand."""
    q, k, v, b = np.array([[1.0, 2.0]]), np.array([[1.0, 1.0]]), np.array([[4.0]]), np.array([0.5])
    state = np.array([[2.0], [0.0]])
    (out, last), cache = delta_rule_forward(q, k, v, b, np.array(gate), state, scale=1.0)
    g = delta_rule_backward(Out(np.array([[1.0]]), None), cache)
    assert (out.item(), last.tolist()) == (5.5, [[2.5], [1.5]])
    want = {"q": [[2.5, 1.5]], "k": [[0, 3]], "v": [[1.5]], "b": [9], "gate": da,
            "state": [[-0.25], [0.25]]}  # fmt: skip
    assert {name: x.tolist() for name, x in g.items()} == want


def test_gradient_of_the_last_state_alone():
    """S = (1 - b) S0 + b v for k = 1, so dS = 1 gives b to v, 1 - b to S0 and v - S0 to b."""
    one = np.ones((1, 1))
    _, cache = delta_rule_forward(one, one, 5.0 * one, np.array([0.25]), None, 2.0 * one)
    g = delta_rule_backward(Out(None, one), cache)
    assert (g["v"].item(), g["state"].item(), g["b"].item()) == (0.25, 0.75, 3.0)
    assert g["q"].item() == 0.0 and set(g) == {"q", "k", "v", "b", "state"}


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 100])
@pytest.mark.parametrize("case", cases(SPEC))
def test_every_chunk_length_gives_the_same(case, chunk):
    kwargs = cases(SPEC)[case]
    want, _ = delta_rule_forward(**kwargs)
    found, _ = delta_rule_chunked_forward(**kwargs, chunk=chunk)
    np.testing.assert_allclose(found.out, want.out, rtol=0, atol=2e-14)
    np.testing.assert_allclose(found.state, want.state, rtol=0, atol=2e-14)


def test_a_gate_of_zero_forgets_everything():
    """After a zero the past does not exist, in both forms: no logarithm is taken anywhere."""
    kwargs = _case("channel-gate")
    gate = kwargs["gate"].copy()
    gate[:, 2] = 0.0
    late = {n: kwargs[n][:, 2:] for n in "qkvb"} | {"gate": gate[:, 2:], "scale": 0.7}
    want, _ = delta_rule_forward(**late)
    for form in (delta_rule_forward, delta_rule_chunked_forward):
        found, _ = form(**(kwargs | {"gate": gate}))
        np.testing.assert_allclose(found.out[:, 2:], want.out, rtol=0, atol=1e-15)
        np.testing.assert_allclose(found.state, want.state, rtol=0, atol=1e-15)


def test_equal_channel_gates_are_a_scalar_gate():
    kwargs = _case("scalar-gate")
    wide = np.repeat(kwargs["gate"][..., None], 4, axis=-1)
    out, cache = delta_rule_forward(**kwargs)
    same, wide_cache = delta_rule_forward(**(kwargs | {"gate": wide}))
    np.testing.assert_array_equal(out.out, same.out)
    np.testing.assert_array_equal(out.state, same.state)
    g = delta_rule_backward(out, cache)
    w = delta_rule_backward(out, wide_cache)
    np.testing.assert_allclose(g["gate"], w["gate"].sum(-1), rtol=0, atol=1e-13)
    np.testing.assert_array_equal(g["k"], w["k"])


def test_prefill_then_decode_is_the_whole():
    """The state handed over carries values and, backwards, gradients."""
    kwargs = _case("channel-gate")
    tokens = ("q", "k", "v", "b", "gate")
    first = kwargs | {n: kwargs[n][:, :3] for n in tokens}
    rest = kwargs | {n: kwargs[n][:, 3:] for n in tokens}
    whole, whole_cache = delta_rule_forward(**kwargs)
    a, a_cache = delta_rule_forward(**first)
    b, b_cache = delta_rule_forward(**(rest | {"state": a.state}))
    np.testing.assert_array_equal(np.concatenate([a.out, b.out], axis=1), whole.out)
    np.testing.assert_array_equal(b.state, whole.state)
    dout = Out(np.cos(whole.out), np.sin(whole.state))
    want = delta_rule_backward(dout, whole_cache)
    gb = delta_rule_backward(Out(dout.out[:, 3:], dout.state), b_cache)
    ga = delta_rule_backward(Out(dout.out[:, :3], gb["state"]), a_cache)
    for name in tokens:
        found = np.concatenate([ga[name], gb[name]], axis=1)
        np.testing.assert_array_equal(found, want[name])
    np.testing.assert_array_equal(ga["state"], want["state"])


def test_writing_a_pair_twice_is_writing_it_once():
    """With b = 1 and a unit key the second writing finds nothing to correct."""
    kwargs = _case("plain", b=np.ones((2, 6)))
    once, _ = delta_rule_forward(**kwargs)
    twice, _ = delta_rule_forward(**{
        n: a if n == "scale" else np.repeat(a, 2, axis=1) for n, a in kwargs.items()
    })  # fmt: skip
    np.testing.assert_allclose(twice.state, once.state, rtol=0, atol=1e-14)
    np.testing.assert_allclose(twice.out[:, 1::2], once.out, rtol=0, atol=1e-14)


def test_a_unit_key_with_b_1_always_recalls_its_last_value():
    kwargs = _case("plain", b=np.ones((2, 6)), scale=1.0)
    (out, _), _ = delta_rule_forward(**(kwargs | {"q": kwargs["k"]}))
    np.testing.assert_allclose(out, kwargs["v"], rtol=0, atol=1e-14)


def test_b_2_reflects():
    """I - 2 k k^T is a reflection: written twice it is the identity, and no number grows."""
    kwargs = _case("plain", b=np.full((2, 6), 2.0), v=np.zeros((2, 6, 3)))
    state = np.random.default_rng(0).standard_normal((2, 4, 3))
    (_, last), _ = delta_rule_forward(**kwargs, state=state)
    size = np.sum(state**2, axis=(1, 2))
    np.testing.assert_allclose(np.sum(last**2, axis=(1, 2)), size, rtol=1e-14)
    there_and_back = {n: np.concatenate([kwargs[n], kwargs[n][:, ::-1]], axis=1) for n in "qkvb"}
    (_, same), _ = delta_rule_forward(**there_and_back, state=state)
    np.testing.assert_allclose(same, state, rtol=0, atol=1e-14)


def test_b_0_reads_and_leaves_the_memory_alone():
    kwargs = _case("state", b=np.zeros((3, 2, 1)), scale=1.0)
    (out, last), _ = delta_rule_forward(**kwargs)
    np.testing.assert_allclose(out, kwargs["q"] @ kwargs["state"], rtol=0, atol=1e-14)
    np.testing.assert_array_equal(last, np.broadcast_to(kwargs["state"], last.shape))


def test_linear_in_values_and_state_together():
    kwargs = _case("channel-gate")
    a, _ = delta_rule_forward(**kwargs)
    b, _ = delta_rule_forward(**(kwargs | {n: 3.0 * kwargs[n] for n in ("v", "state")}))
    np.testing.assert_allclose(b.out, 3.0 * a.out, rtol=1e-13)
    np.testing.assert_allclose(b.state, 3.0 * a.state, rtol=1e-13)


@pytest.mark.parametrize("form", [delta_rule_forward, delta_rule_chunked_forward])
def test_later_gates_do_not_reach_back(form):
    kwargs = _case("scalar-gate")
    gate = kwargs["gate"].copy()
    gate[:, 4] = 0.01
    out, changed = form(**kwargs)[0].out, form(**(kwargs | {"gate": gate}))[0].out
    np.testing.assert_allclose(changed[:, :4], out[:, :4], rtol=0, atol=1e-15)
    assert np.all(np.max(np.abs(changed[:, 4:] - out[:, 4:]), axis=-1) > 1e-6)


@pytest.mark.parametrize("form", [delta_rule_forward, delta_rule_chunked_forward])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["q", "k", "v", "b", "gate"])
def test_a_non_finite_token_spoils_what_comes_after_it(form, name, bad):
    kwargs = _case("channel-gate")
    a = kwargs[name].copy()
    a[(0, 2) + (1,) * (a.ndim - 2)] = bad
    clean, _ = form(**kwargs)
    found, _ = form(**(kwargs | {name: a}))
    rows = slice(2, 3) if name == "q" else slice(2, None)
    assert np.all(np.isnan(found.out[0, rows]))
    assert np.all(np.isnan(found.state[0])) == (name != "q")
    want = clean.out.copy()
    want[0, rows] = np.nan
    np.testing.assert_array_equal(found.out, want)
    np.testing.assert_array_equal(found.state[1], clean.state[1])


def test_a_non_finite_state_spoils_its_own_sequence_alone():
    kwargs = _case("channel-gate")
    state = kwargs["state"].copy()
    state[1, 0, 0] = np.inf
    clean, _ = delta_rule_forward(**kwargs)
    out, cache = delta_rule_forward(**(kwargs | {"state": state}))
    assert np.all(np.isnan(out.out[1])) and np.all(np.isnan(out.state[1]))
    np.testing.assert_array_equal(out.out[0], clean.out[0])
    g = delta_rule_backward(Out(np.ones_like(out.out), np.ones_like(out.state)), cache)
    assert all(np.all(np.isfinite(x)) for x in g.values())
    assert not any(np.any(x[1]) for x in g.values()) and np.any(g["q"][0])


def test_no_tokens_leave_the_state():
    kwargs = _case("channel-gate")
    none = kwargs | {n: kwargs[n][:, :0] for n in ("q", "k", "v", "b", "gate")}
    out, cache = delta_rule_forward(**none)
    assert out.out.shape == (2, 0, 3)
    np.testing.assert_array_equal(out.state, kwargs["state"])
    g = delta_rule_backward(out, cache)
    assert g["gate"].shape == (2, 0, 4)
    np.testing.assert_array_equal(g["state"], kwargs["state"])
    assert delta_rule_chunked_forward(**none)[0].out.shape == (2, 0, 3)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"b": np.ones((2, 7))}, core.errors.ShapeError, "b has T = 7 .* expected 5"),
        ({"gate": np.ones((2, 5, 3))}, core.errors.ShapeError, "gate has D = 3 .* expected 4"),
        ({"gate": np.ones((2, 4))}, core.errors.ShapeError, "gate has T = 4 .* expected 5"),
        ({"state": np.ones((2, 3, 4))}, core.errors.ShapeError, "state has D = 3 .* expected 4"),
        ({"scale": math.nan}, core.errors.ParameterError, "scale is nan"),
        ({"q": np.ones((2, 5, 0)), "k": np.ones((2, 5, 0)), "gate": None, "state": None},
         core.errors.ShapeError, "width D = 0"),
    ],
)  # fmt: skip
def test_errors_name_argument_and_expectation(change, error, says):
    with pytest.raises(error, match=says):
        delta_rule_forward(**_case("channel-gate", **change))


def test_a_chunk_has_at_least_one_token():
    with pytest.raises(core.errors.ParameterError, match="chunk is 0"):
        delta_rule_chunked_forward(**_case("plain"), chunk=0)


@pytest.mark.parametrize("part", ["out", "state"])
def test_a_foreign_cotangent_is_refused(part):
    out, cache = delta_rule_forward(**_case("plain"))
    with pytest.raises(core.errors.ShapeError, match=f"dout.{part} has shape"):
        delta_rule_backward(out._replace(**{part: np.ones((1, 1))}), cache)


def test_memory_limit_before_allocating():
    x = np.broadcast_to(np.float64(0.0), (1, 200_000, 64))
    with pytest.raises(core.errors.MemoryLimitError, match="GiB"):
        delta_rule_forward(x, x, x, x[..., 0])


@pytest.mark.oracle
@pytest.mark.parametrize("case", cases(SPEC))
def test_pytorch_agrees(case):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")
    kwargs = cases(SPEC)[case]
    given = {n: torch.tensor(a, requires_grad=True) for n, a in kwargs.items() if n != "scale"}
    q, k, v, b = (given[n] for n in "qkvb")
    scale = kwargs["scale"] or q.shape[-1] ** -0.5
    start = given.get("state", torch.zeros(q.shape[-1], v.shape[-1], dtype=q.dtype))
    S, rows = start.expand(*q.shape[:-2], q.shape[-1], v.shape[-1]), []
    gate = given.get("gate", torch.ones_like(b))
    gate = gate[..., None] if gate.ndim == b.ndim else gate
    for t in range(q.shape[-2]):
        S = S * gate[..., t, :, None]
        answer = torch.einsum("...de,...d->...e", S, k[..., t, :])
        change = (v[..., t, :] - answer) * b[..., t, None]
        S = S + k[..., t, :, None] * change[..., None, :]
        rows.append(torch.einsum("...de,...d->...e", S, q[..., t, :]) * scale)
    theirs = torch.stack(rows, -2)
    out, cache = delta_rule_forward(**kwargs)
    np.testing.assert_allclose(out.out, theirs.detach().numpy(), rtol=0, atol=1e-14)
    rng = np.random.default_rng(4)
    dout = Out(rng.standard_normal(out.out.shape), rng.standard_normal(out.state.shape))
    torch.autograd.backward((theirs, S), (torch.tensor(dout.out), torch.tensor(dout.state)))
    for name, g in delta_rule_backward(dout, cache).items():
        np.testing.assert_allclose(g, given[name].grad.numpy(), rtol=0, atol=1e-13)
