"""The scans in Numba: values against a token loop, gradients against its complex step."""

import numpy as np
import pytest

from attention_ref.core.errors import DTypeError, ShapeError
from attention_ref.kernels.numba import scan, threads
from tests.kernels import formulas

BOUND = 64
H, T, D, E = 3, 37, 5, 9


def draw(dtype, gate=None, state=False, tokens=T):
    """Unit keys, so that the recurrence does not grow."""
    rng = np.random.default_rng(11)
    k = rng.standard_normal((2, H, tokens, D))
    x = {
        "q": rng.standard_normal((2, H, tokens, D)),
        "k": k / np.linalg.norm(k, axis=-1, keepdims=True),
        "v": rng.standard_normal((2, H, tokens, E)),
        "b": rng.uniform(0.2, 1.0, (2, H, tokens)),
    }
    if gate == "scalar":
        x["gate"] = rng.uniform(0.5, 1.0, (2, H, tokens))
    if gate == "channel":
        x["gate"] = rng.uniform(0.5, 1.0, (2, H, tokens, D))
    if gate == "head":
        x["gate"] = rng.uniform(0.5, 1.0, (1, H, 1))
    if state:
        x["state"] = rng.standard_normal((2, H, D, E))
    cotangents = rng.standard_normal((2, H, tokens, E)), rng.standard_normal((2, H, D, E))
    return {n: y.astype(dtype) for n, y in x.items()}, [c.astype(dtype) for c in cotangents]


def truth(x, erase):
    """The token loop over all heads; complex arrays pass."""
    lead = x["q"].shape[:-2]
    inner = {"q": 2, "k": 2, "v": 2, "b": 1, "state": 2}
    inner["gate"] = 1 + (x["gate"].ndim == x["q"].ndim) if "gate" in x else 0
    tokens = x["q"].shape[-2]
    heads = {}
    for name, y in x.items():
        shape = y.shape[y.ndim - inner[name] :]
        if name == "gate":
            shape = (tokens, *shape[1:])
        heads[name] = np.broadcast_to(y, lead + shape)
    results = [
        formulas.scan(**{n: y[at] for n, y in heads.items()}, scale=0.7, erase=erase)
        for at in np.ndindex(lead)
    ]
    return [np.reshape([r[i] for r in results], (*lead, *results[0][i].shape)) for i in (0, 1)]


def directional(x, name, direction, cotangents, erase):
    """d <cotangents, outputs> along one direction of one argument, by the complex step."""
    wide = {n: y.astype(np.float64) for n, y in x.items()}
    wide[name] = wide[name] + 1e-30j * direction
    parts = truth(wide, erase)
    return sum(float((c * y.imag).sum()) for c, y in zip(cotangents, parts, strict=True)) / 1e-30


def call(x, erase, cotangents):
    if erase:
        out, state, cache = scan.delta_forward(**x, scale=0.7)
        return out, state, scan.delta_backward(*cotangents, cache)
    y = {("decay" if n == "gate" else n): a for n, a in x.items() if n != "b"}
    out, state, cache = scan.decay_forward(**y, scale=0.7)
    gradients = scan.decay_backward(*cotangents, cache)
    return out, state, {("gate" if n == "decay" else n): g for n, g in gradients.items()}


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("gate", [None, "scalar", "channel", "head"])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("erase", [True, False], ids=["delta", "decay"])
def test_values_and_gradients(erase, state, gate, dtype):
    x, cotangents = draw(dtype, gate, state)
    if not erase:
        del x["b"]
    out, last, gradients = call(x, erase, cotangents)
    true_out, true_last = truth({n: y.astype(np.float64) for n, y in x.items()}, erase)
    assert out.dtype == last.dtype == dtype
    assert formulas.distance(out, true_out, dtype) < BOUND
    assert formulas.distance(last, true_last, dtype) < BOUND
    assert gradients.keys() == x.keys()
    rng = np.random.default_rng(5)
    for name, gradient in gradients.items():
        assert gradient.shape == x[name].shape and gradient.dtype == dtype
        for _ in range(2):
            direction = rng.standard_normal(x[name].shape)
            slope = directional(x, name, direction, cotangents, erase)
            size = float(np.linalg.norm(gradient) * np.linalg.norm(direction))
            error = abs(float((gradient * direction).sum()) - slope)
            assert error < BOUND * np.finfo(dtype).eps * size, name


def test_every_coordinate_of_a_small_case():
    x, cotangents = draw(np.float64, "channel", True, tokens=3)
    gradients = call(x, True, cotangents)[2]
    for name, gradient in gradients.items():
        rows = np.eye(gradient.size).reshape(-1, *gradient.shape)[:: max(1, gradient.size // 20)]
        slopes = [directional(x, name, row, cotangents, True) for row in rows]
        entries = [float((gradient * row).sum()) for row in rows]
        assert np.allclose(entries, slopes, rtol=0, atol=1e-12), name


def test_an_absolute_value():
    k = np.array([[1.0, 0.0], [1.0, 0.0]])
    v, b = np.array([[2.0], [5.0]]), np.array([1.0, 0.5])
    out, state, _ = scan.delta_forward(k, k, v, b, scale=1.0)
    assert out.tolist() == [[2.0], [3.5]] and state.tolist() == [[3.5], [0.0]]
    out, state, _ = scan.decay_forward(k, k, v, np.array([1.0, 0.25]), scale=1.0)
    assert out.tolist() == [[2.0], [5.5]] and state.tolist() == [[5.5], [0.0]]


def test_in_two_parts_with_the_state_handed_on():
    x, _ = draw(np.float64, "scalar", True)
    out, last, _ = scan.delta_forward(**x)
    half = {n: y[..., :20, :] if n in "qkv" else y[..., :20] for n, y in x.items() if n != "state"}
    rest = {n: y[..., 20:, :] if n in "qkv" else y[..., 20:] for n, y in x.items() if n != "state"}
    first, state, _ = scan.delta_forward(**half, state=x["state"])
    second, end, _ = scan.delta_forward(**rest, state=state)
    assert np.array_equal(np.concatenate([first, second], axis=-2), out)
    assert np.array_equal(end, last)


def test_no_gradient_for_one_of_the_outputs():
    x, (dout, dstate) = draw(np.float64, "scalar", True)
    cache = scan.delta_forward(**x)[2]
    parts = scan.delta_backward(dout, None, cache), scan.delta_backward(None, dstate, cache)
    whole = scan.delta_backward(dout, dstate, cache)
    for name, gradient in whole.items():
        assert np.allclose(parts[0][name] + parts[1][name], gradient, rtol=0, atol=1e-12)


def test_one_thread_and_two_give_the_same_bits():
    x, cotangents = draw(np.float32, "channel", True, tokens=1500)
    results = []
    for number in (1, 2):
        with threads.use(number):
            out, last, gradients = call(x, True, cotangents)
            results.append([out, last, *gradients.values()])
    for one, two in zip(*results, strict=True):
        assert np.array_equal(one, two)


def test_layouts_and_inputs_left_alone():
    x, cotangents = draw(np.float64, "channel", True)
    clean = call(x, True, cotangents)
    odd = {n: np.asfortranarray(y) for n, y in x.items()}
    for y in odd.values():
        y.flags.writeable = False
    results = call(odd, True, [np.asfortranarray(c) for c in cotangents])
    assert np.array_equal(clean[0], results[0])
    assert all(np.array_equal(results[2][n], g) for n, g in clean[2].items())
    assert all(np.array_equal(odd[n], y) for n, y in x.items())


def test_bad_arguments():
    x, (dout, _) = draw(np.float64)
    for change, error in [
        ({"k": x["k"][..., :4]}, ShapeError), ({"b": x["b"][..., None]}, ShapeError),
        ({"state": np.ones((D, E + 1))}, ShapeError), ({"gate": np.ones(T)}, ShapeError),
        ({"q": x["q"].astype(int)}, DTypeError),
    ]:  # fmt: skip
        with pytest.raises(error):
            scan.delta_forward(**{**x, **change})
    with pytest.raises(ShapeError):
        scan.delta_backward(dout[..., :3], None, scan.delta_forward(**x)[2])
