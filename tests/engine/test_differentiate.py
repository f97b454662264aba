"""vjp, jvp, complex_gradient, difference: the same derivative, and the same forms of results."""

import contextvars
import threading
from typing import NamedTuple

import numpy as np
import pytest

from attention_ref.engine import (
    Foreign,
    Tape,
    complex_allowed,
    complex_gradient,
    complex_step,
    difference,
    jvp,
    map_leaves,
    value,
    vjp,
)


class Out(NamedTuple):
    out: object
    state: object


def two_outputs(x, y, scale=1.0, label=None):
    return Out(np.exp(x) @ y * scale, {"sum": np.sum(x * x), "rest": (label, [np.tanh(y)])})


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    return {"x": rng.standard_normal((2, 3)), "y": rng.standard_normal((3, 2)), "scale": 0.5}


def cotangents(seed=1):
    rng = np.random.default_rng(seed)
    state = {"sum": rng.standard_normal(), "rest": (None, [rng.standard_normal((3, 2))])}
    return Out(rng.standard_normal((2, 2)), state)


def test_results_keep_their_form():
    out, pull = vjp(two_outputs, inputs() | {"label": "name"})
    plain = two_outputs(**inputs(), label="name")
    assert isinstance(out, Out)
    assert out.state["rest"][0] == "name"
    np.testing.assert_array_equal(out.out, plain.out)
    np.testing.assert_array_equal(out.state["rest"][1][0], plain.state["rest"][1][0])
    assert sorted(pull(cotangents())) == ["x", "y"]


def test_the_four_ways_agree():
    rng = np.random.default_rng(2)
    tangents = {"x": rng.standard_normal((2, 3)), "y": rng.standard_normal((3, 2))}
    dout = cotangents()
    _, pull = vjp(two_outputs, inputs())
    tape = pull(dout)
    exact = complex_gradient(two_outputs, inputs(), dout)
    for name in tangents:
        np.testing.assert_allclose(tape[name], exact[name], rtol=0, atol=1e-14)
    slope = sum(np.sum(tape[name] * t) for name, t in tangents.items())
    for way, bound in ((jvp, 1e-13), (difference, 1e-9)):
        along = way(two_outputs, inputs(), tangents)
        assert isinstance(along, Out)
        assert along.state["rest"][0] is None
        parts = []
        map_leaves(lambda a, g, p=parts: g is not None and p.append(np.sum(a * g)), along, dout)
        assert abs(sum(parts) - slope) <= bound


def test_none_stands_for_no_cotangent():
    _, pull = vjp(two_outputs, inputs())
    grads = pull(Out(None, {"sum": 1.0, "rest": None}))
    np.testing.assert_array_equal(grads["x"], 2 * inputs()["x"])
    np.testing.assert_array_equal(grads["y"], 0)
    assert not any(np.any(g) for g in pull(None).values())


def test_wrt_chooses_and_refuses():
    _, pull = vjp(two_outputs, inputs(), wrt=["y"])
    assert list(pull(cotangents())) == ["y"]
    assert list(complex_gradient(two_outputs, inputs(), cotangents(), wrt=["y"])) == ["y"]
    with pytest.raises(ValueError, match="no argument is named 'z'"):
        vjp(two_outputs, inputs(), wrt=["z"])
    with pytest.raises(TypeError, match="scale: only a float32 or float64 array"):
        vjp(two_outputs, inputs(), wrt=["scale"])


def test_wrong_cotangents_are_refused():
    _, pull = vjp(lambda x: x, {"x": np.ones((2, 3))})
    with pytest.raises(ValueError, match=r"got shape \(3,\), expected that of out, \(2, 3\)"):
        pull(np.ones(3))
    _, pull = vjp(lambda x: (x, x), {"x": np.ones(3)})
    with pytest.raises(ValueError, match="expected 2 parts"):
        pull((np.ones(3),))


def test_what_is_no_float_array_passes_untouched():
    seen = {}

    def f(**kwargs):
        seen.update(kwargs)
        return kwargs["x"]

    given = {
        "x": np.ones(2),
        "mask": np.array([True, False]),
        "index": np.array([0, 1]),
        "scale": 2.0,
        "mode": "zero",
        "nothing": None,
        "rng": np.random.default_rng(0),
    }
    _, pull = vjp(f, given)
    assert list(pull(np.ones(2))) == ["x"]
    assert all(seen[name] is given[name] for name in given if name != "x")
    jvp(f, given, {"x": np.ones(2)})
    assert seen["x"].dtype == np.complex128
    assert all(seen[name] is given[name] for name in given if name != "x")


def test_unused_arguments_and_constant_outputs():
    _, pull = vjp(lambda x, y: (y * 2, np.ones(3)), {"x": np.ones(2), "y": np.ones(3)})
    grads = pull((np.ones(3), np.ones(3)))
    np.testing.assert_array_equal(grads["x"], [0, 0])
    np.testing.assert_array_equal(grads["y"], 2)
    np.testing.assert_array_equal(
        jvp(lambda x: np.ones(2), {"x": np.ones(2)}, {"x": np.ones(2)}), 0
    )


def test_an_argument_returned_as_it_is():
    x = np.ones(2)
    _, pull = vjp(lambda x: x, {"x": x})
    np.testing.assert_array_equal(pull(np.array([1.0, 2.0]))["x"], [1, 2])


def test_gradients_keep_the_dtype():
    given = {"x": np.ones((2, 3), np.float32), "y": np.ones((3, 2))}
    out, pull = vjp(lambda x, y: x @ y, given)
    assert out.dtype == np.float64
    grads = pull(np.ones((2, 2)))
    assert (grads["x"].dtype, grads["y"].dtype) == (np.float32, np.float64)
    exact = complex_gradient(lambda x, y: x @ y, given, np.ones((2, 2)))
    assert exact["x"].dtype == np.float32


def test_complex_gradient_leaves_the_inputs_alone():
    given = inputs()
    complex_gradient(two_outputs, given, cotangents())
    for name in ("x", "y"):
        np.testing.assert_array_equal(given[name], inputs()[name])


def test_complex_step_is_exact_where_differences_are_not():
    """At scale 10, exp is far from a cubic within any step that rounding allows."""
    x, t = {"x": np.full(3, 10.0)}, {"x": np.array([1.0, -2.0, 0.5])}
    exact = np.exp(10.0) * t["x"]
    assert np.max(np.abs(jvp(lambda x: np.exp(x), x, t) / exact - 1)) < 1e-15
    assert np.max(np.abs(difference(lambda x: np.exp(x), x, t) / exact - 1)) < 1e-9


def test_differences_are_of_fourth_order():
    def error(h):
        return abs(
            difference(lambda x: np.sin(x), {"x": np.ones(1)}, {"x": np.ones(1)}, h) - np.cos(1)
        )

    assert 14 < error(0.1) / error(0.05) < 18


def test_complex_is_allowed_inside_only():
    seen = []
    jvp(lambda x: seen.append(complex_allowed()) or x, {"x": np.ones(1)}, {"x": np.ones(1)})
    difference(lambda x: seen.append(complex_allowed()) or x, {"x": np.ones(1)}, {"x": np.ones(1)})
    assert seen == [True, False, False, False, False]
    with pytest.raises(RuntimeError, match="inside"), complex_step():
        raise RuntimeError("inside")
    assert not complex_allowed()


def test_complex_is_allowed_in_this_thread_only():
    seen = []
    with complex_step():
        thread = threading.Thread(target=lambda: seen.append(complex_allowed()))
        thread.start()
        thread.join()
        assert contextvars.copy_context().run(complex_allowed)
    assert seen == [False]


def test_value_unwraps():
    x = np.ones(2)
    assert value(Tape().record(x)) is x
    assert value(Foreign(x)) is x
    assert value(x) is x
    assert value(None) is None
