"""The tape: what it records, what it refuses and why, and that long loops cost linear time."""

import math
import time

import numpy as np
import pytest

from attention_ref.engine import NoGradientRule, Tape, Traced, TracedError, vjp
from attention_ref.engine import tape as tape_module


def trace(*shape):
    return Tape().record(np.arange(1.0, 1 + math.prod(shape)).reshape(shape))


def attention(q, k, v, live=None):
    z = np.einsum("...td,...sd->...ts", q, k) * (1 / math.sqrt(q.shape[-1]))
    if live is not None:
        z = np.where(live, z, -np.inf)
    p = np.exp(z - np.max(z, axis=-1, keepdims=True))
    p = p / np.sum(p, axis=-1, keepdims=True)
    return p @ v


def recurrence(a, k, v):
    """A decayed state, written and read once a step; arrays are read as x[..., t, :]."""
    state = np.zeros_like(k, shape=(*k.shape[:-2], k.shape[-1], v.shape[-1]))
    outs = []
    for t in range(k.shape[-2]):
        state = a[..., t, None, None] * state + k[..., t, :, None] * v[..., t, None, :]
        outs.append(np.sum(k[..., t, :, None] * state, axis=-2))
    return np.stack(outs, axis=-2)


def recurrence_inputs(steps, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "a": rng.uniform(0.5, 1, steps),
        "k": rng.standard_normal((steps, 3)),
        "v": rng.standard_normal((steps, 2)),
    }


# ---- what it computes ----------------------------------------------------------------------------


def test_attention_against_the_formula():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(s) for s in ((2, 3, 4), (2, 5, 4), (2, 5, 2)))
    dout = rng.standard_normal((2, 3, 2))
    live = np.tri(3, 5, 2, dtype=bool)
    out, pull = vjp(attention, {"q": q, "k": k, "v": v, "live": live})
    np.testing.assert_array_equal(out, attention(q, k, v, live))
    grads = pull(dout)

    z = np.where(live, q @ np.swapaxes(k, -1, -2) / 2, -np.inf)
    p = np.exp(z) / np.sum(np.exp(z), -1, keepdims=True)
    dp = dout @ np.swapaxes(v, -1, -2)
    dz = p * (dp - np.sum(p * dp, -1, keepdims=True)) / 2
    np.testing.assert_allclose(grads["v"], np.swapaxes(p, -1, -2) @ dout, atol=1e-15)
    np.testing.assert_allclose(grads["q"], dz @ k, atol=1e-15)
    np.testing.assert_allclose(grads["k"], np.swapaxes(dz, -1, -2) @ q, atol=1e-15)


def test_a_value_used_twice_gets_the_sum():
    _, pull = vjp(lambda x: x * x + x, {"x": np.array([3.0])})
    assert pull(np.array([1.0]))["x"] == 7.0


def test_pull_is_repeatable_and_leaves_everything_unmodified():
    inputs = recurrence_inputs(5)
    kept = {name: x.copy() for name, x in inputs.items()}
    out, pull = vjp(recurrence, inputs)
    dout = np.ones_like(out)
    first = pull(dout)
    for grad in first.values():
        grad += 1  # gradients are the caller's own
    second, third = pull(dout), pull(dout)
    for name in inputs:
        np.testing.assert_array_equal(second[name], third[name])
        np.testing.assert_array_equal(first[name], second[name] + 1)
        np.testing.assert_array_equal(inputs[name], kept[name])
    np.testing.assert_array_equal(dout, 1)


def test_gradients_share_no_memory():
    """Both gradients of x + y are dout; neither may be dout itself."""
    dout = np.ones(3)
    _, pull = vjp(lambda x, y: x + y, {"x": np.zeros(3), "y": np.zeros(3)})
    grads = pull(dout)
    assert not np.shares_memory(grads["x"], grads["y"])
    assert not np.shares_memory(grads["x"], dout)


def test_operators_with_arrays_and_numbers_on_either_side():
    x, c = trace(2, 3), np.full((2, 3), 2.0)
    for result, expected in [
        (c + x, c + x.value),
        (c - x, c - x.value),
        (c * x, c * x.value),
        (c / x, c / x.value),
        (c**x, c**x.value),
        (c @ x.T, c @ x.value.T),
        (np.float64(2) * x, 2 * x.value),
        (3 - x, 3 - x.value),
        (3 / x, 3 / x.value),
        (x % 4, x.value % 4),
        (-x, -x.value),
        (abs(x), abs(x.value)),
    ]:
        assert isinstance(result, Traced)
        np.testing.assert_array_equal(result.value, expected)
    for plain in (x > c, c >= x, x == 1, x != c, x // 2):
        assert isinstance(plain, np.ndarray)


def test_looks_like_an_array():
    x = trace(4, 3)
    assert (x.shape, x.ndim, x.size, x.dtype, len(x)) == ((4, 3), 2, 12, np.float64, 4)
    assert x.T.shape == (3, 4)
    assert [row.shape for row in x] == [(3,)] * 4
    assert "shape=(4, 3)" in repr(x)
    with pytest.raises(TypeError):
        len(trace())


def test_whole_numbers_and_truth_values_leave_the_tape():
    x = trace(3)
    assert type(np.astype(x, int)) is np.ndarray
    assert type(np.argsort(x)) is np.ndarray
    assert type(np.zeros_like(x, shape=(2, 2))) is np.ndarray
    assert type(np.arange(3, like=x)) is np.ndarray


def test_python_numbers_keep_float32():
    x = Tape().record(np.ones(3, np.float32))
    for y in (x * 2.5, 1 - x, x**0.5, np.where(x > 0, x, -np.inf), np.maximum(x, 0.0), x / 3):
        assert y.dtype == np.float32


# ---- what it refuses -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda x: x.__setitem__(0, 1.0), r"writes into a traced array.*np\.where"),
        (lambda x: np.add(x, x, out=np.zeros(3)), r"np\.add\(\.\.\., out=\).*x = x \+ y"),
        (lambda x: np.sum(x, out=np.zeros(())), r"np\.sum\(\.\.\., out=\)"),
        (lambda x: x.__iadd__(1.0), r"`x \+= y`"),
        (lambda x: np.zeros(3).__iadd__(x), r"`x \+= y`"),
        (lambda x: np.zeros(3).__setitem__(..., x), r"buffer\[index\] = x"),
        (lambda x: np.asarray(x), r"np\.asarray\(x\)"),
        (lambda x: np.array([x, x]), r"np\.stack"),
        (lambda x: x * 1j, r"np\.multiply made complex numbers"),
        (lambda x: bool(x), r"truth value.*np\.where"),
        (lambda x: 1 if x else 0, r"truth value"),
        (lambda x: float(x[0]), r"Python number.*math\.sqrt"),
        (lambda x: math.sqrt(x[0]), r"Python number"),
        (lambda x: int(x[0]), r"Python number"),
        (lambda x: range(x[0]), r"Python number"),
    ],
)
def test_refusals_name_the_cause(act, message):
    with pytest.raises(TracedError, match=message):
        act(trace(3))


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda x: np.fft.rfft(x), r"np\.fft\.rfft has no gradient rule.*rules\.py"),
        (lambda x: np.linalg.norm(x), r"np\.linalg\.norm.*np\.sqrt\(np\.sum"),
        (lambda x: np.var(x), r"np\.var.*mean of squares"),
        (lambda x: np.hypot(x, x), r"np\.hypot has no gradient rule"),
        (lambda x: np.add.reduce(x), r"np\.add\.reduce has no gradient rule; use np\.sum"),
        (lambda x: np.add.accumulate(x), r"np\.add\.accumulate"),
        (lambda x: np.max(x, initial=0.0), r"np\.max.*not for this form.*initial"),
        (lambda x: np.sum(x, where=True), r"np\.sum.*not for this form.*where"),
        (lambda x: np.add(x, x, where=np.array([True] * 3)), r"np\.add.*where"),
        (lambda x: np.full_like(x, x[0]), r"np\.copyto"),
        (lambda x: np.full_like(a=x, fill_value=x[0]), r"np\.copyto"),
        (lambda x: np.where(x, x, 0.0), r"np\.where takes a plain array.* argument 1"),
        (lambda x: np.pad(x, 1, constant_values=x[0]), r"np\.pad takes a plain .* argument 4"),
        (lambda x: np.stack(x), r"np\.stack takes a list of arrays as argument 1"),
        (lambda x: np.put_along_axis(x, np.array([0]), 1.0, 0), r"np\.put_along_axis.*gather"),
        (lambda x: np.copyto(np.zeros(3), x), r"np\.copyto"),
    ],
)
def test_missing_rules_are_named(act, message):
    with pytest.raises(NoGradientRule, match=message):
        act(trace(3))


def test_a_number_written_into_a_buffer_is_refused():
    """NumPy raises its own error here and keeps ours as the cause."""
    with pytest.raises(ValueError, match="setting an array element") as caught:
        np.zeros(3)[0] = trace()
    assert isinstance(caught.value.__cause__, TracedError)


def test_missing_methods_name_the_function():
    for name in ("sum", "mean", "astype", "reshape", "max", "copy"):
        with pytest.raises(AttributeError, match=rf"'{name}'; use the function np\.{name}\(x\)"):
            getattr(trace(3), name)
    with pytest.raises(AttributeError, match=r"'nonsense'$"):
        trace(3).nonsense  # noqa: B018


def test_an_error_inside_numpy_stays_what_it_is():
    with pytest.raises(ValueError, match="matmul"):
        trace(2, 3) @ trace(2, 3)
    with pytest.raises(IndexError):
        trace(3)[5]
    with pytest.raises(TypeError, match="as a string"):
        np.einsum(trace(3), [0], [0])
    with pytest.raises(TypeError, match="constant"):
        np.pad(trace(3), 1, mode="edge")


def test_two_tapes_do_not_mix():
    with pytest.raises(TracedError, match="two different tapes"):
        trace(3) + trace(3)


def test_traced_arrays_given_by_name():
    _, pull = vjp(lambda x: np.sum(axis=0, a=x) + np.max(axis=0, a=x), {"x": np.eye(3)})
    np.testing.assert_array_equal(pull(np.ones(3))["x"], 1 + np.eye(3))


# ---- long loops ----------------------------------------------------------------------------------


def test_long_chains_need_no_recursion():
    def f(x):
        for _ in range(20_000):
            x = x * 1.0
        return x

    _, pull = vjp(f, {"x": np.ones(2)})
    np.testing.assert_array_equal(pull(np.ones(2))["x"], 1)


def test_long_recurrence_against_short_formula():
    inputs = recurrence_inputs(6)
    out, pull = vjp(recurrence, inputs)
    dout = np.random.default_rng(1).standard_normal(out.shape)
    a, k, v = inputs.values()
    decay = np.array([[np.prod(a[s + 1 : t + 1]) * (s <= t) for s in range(6)] for t in range(6)])
    np.testing.assert_allclose(out, (decay * (k @ k.T)) @ v, atol=1e-13)
    np.testing.assert_allclose(pull(dout)["v"], (decay * (k @ k.T)).T @ dout, atol=1e-13)


def work(monkeypatch, steps):
    """Numbers that the backward pass allocates or adds, and the buffers of full length."""
    counted = {"numbers": 0, "long buffers": 0}
    own, add = tape_module.Total.own, tape_module.Total.add

    def counting_own(total):
        if not total.owned:
            counted["numbers"] += math.prod(total.shape)
            counted["long buffers"] += total.shape[:1] == (steps,)
        return own(total)

    def counting_add(total, part):
        counted["numbers"] += np.size(part.part if isinstance(part, tape_module.At) else part)
        return add(total, part)

    out, pull = vjp(recurrence, recurrence_inputs(steps))
    with monkeypatch.context() as patch:
        patch.setattr(tape_module.Total, "own", counting_own)
        patch.setattr(tape_module.Total, "add", counting_add)
        pull(np.ones_like(out))
    return counted


def test_work_is_linear_in_the_length_of_the_loop(monkeypatch):
    short, long = work(monkeypatch, 1000), work(monkeypatch, 4000)
    assert long["numbers"] <= 4.01 * short["numbers"]
    assert long["long buffers"] == 3  # one each for a, k, v


def test_time_is_linear_in_the_length_of_the_loop():
    def seconds(steps):
        inputs, best = recurrence_inputs(steps), np.inf
        for _ in range(3):
            start = time.process_time()
            out, pull = vjp(recurrence, inputs)
            pull(np.ones_like(out))
            best = min(best, time.process_time() - start)
        return best

    assert seconds(4000) < 6.5 * seconds(1000)
