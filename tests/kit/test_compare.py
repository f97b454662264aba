"""Errors in units of rounding, and what counts as equal."""

import numpy as np
import pytest

from attention_ref.kit.compare import CheckFailure, close, different, equal, error, scales

EPS = 2.0**-52


def test_error_in_eps_of_the_largest_entry():
    want = np.array([1.0, -4.0])
    assert error(want, want) == 0
    assert error(want + [4 * EPS, 0], want) == 1.0
    assert error(want + [4 * EPS, 0], want, scale=1.0) == 4.0
    assert error(np.float32([1, 2]), np.float32([1, 2])) == 0


@pytest.mark.parametrize(
    ("got", "want"),
    [
        ([1.0, 2.0], [[1.0, 2.0]]),
        ([1.0, np.nan], [1.0, 2.0]),
        ([1.0, 2.0], [1.0, np.nan]),
        ([1.0, np.inf], [1.0, -np.inf]),
        ([1e-300, 0.0], [0.0, 0.0]),
    ],
)
def test_infinite_errors(got, want):
    assert error(np.array(got), np.array(want)) == np.inf
    with pytest.raises(CheckFailure, match="what"):
        close("what", np.array(got), np.array(want), 1e9)


def test_nan_and_infinity_in_the_same_places_are_equal():
    a = np.array([np.nan, np.inf, 1.0])
    assert error(a, a.copy()) == 0
    equal("a", a, a.copy())


def test_close_names_the_worst_place():
    want = np.ones((2, 3))
    got = want.copy()
    got[1, 2] += 1e-3
    with pytest.raises(CheckFailure, match=r"worst at \(1, 2\)"):
        close("x", got, want, 64)


def test_equal_looks_at_dtype_shape_and_every_bit():
    a = np.ones(3)
    for other in (a.astype(np.float32), np.ones((1, 3)), np.nextafter(a, 2)):
        with pytest.raises(CheckFailure):
            equal("a", other, a)
    with pytest.raises(CheckFailure, match="nothing changed"):
        different("a", a, a)
    different("a", np.nextafter(a, 2), a)


def test_scales_keep_tiny_gradients_honest_but_not_absurd():
    found = scales({"big": np.array([1000.0]), "small": np.array([1e-9]), "none": np.zeros(0)})
    assert found == {"big": 1000.0, "small": 1.0, "none": 1.0}
