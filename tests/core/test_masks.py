"""Who sees whom, and what a number that is not finite may reach."""

import numpy as np
import pytest

from attention_ref import core


def test_visible_by_hand():
    q, k = np.ones((2, 1)), np.ones((3, 1))
    lower = core.visible(q, k, causal=True)
    upper = core.visible(q, k, causal=True, align="upper_left")
    np.testing.assert_array_equal(lower, [[True, True, False], [True, True, True]])
    np.testing.assert_array_equal(upper, [[True, False, False], [True, True, False]])
    assert np.all(core.visible(q, k)) and core.visible(q, k).shape == (2, 3)
    mask = np.array([True, False, True])
    np.testing.assert_array_equal(core.visible(q, k, mask=mask, causal=True), lower & mask)
    longer = core.visible(k, q, causal=True)
    np.testing.assert_array_equal(longer, [[False, False], [True, False], [True, True]])


def test_quarantine_reports_only_who_sees():
    q, k, v = np.ones((3, 2)), np.ones((2, 2)), np.ones((2, 1))
    v[1] = np.nan
    live = np.array([[True, False], [True, True], [False, False]])
    _, _, clean, poison = core.quarantine(q, k, v, live)
    np.testing.assert_array_equal(poison[:, 0], [False, True, False])
    np.testing.assert_array_equal(clean, [[1.0], [0.0]])
    _, _, _, poison = core.quarantine(q, k, v, live, "uniform")
    np.testing.assert_array_equal(poison[:, 0], [False, True, True])
    _, _, _, poison = core.quarantine(q, k, np.ones((2, 1)), live, "nan")
    np.testing.assert_array_equal(poison[:, 0], [False, False, True])


def test_quarantine_of_partly_bad_rows_and_its_replacement():
    """One bad number spoils its row; bad rows become zeros; rows without keys are not poisoned."""
    q, k, v = np.ones((3, 2)), np.full((2, 2), 2.0), np.full((2, 2), 3.0)
    q[0, 1], q[2, 0], k[0, 0], v[1, 1] = np.nan, np.inf, -np.inf, np.nan
    live = np.array([[True, False], [False, True], [False, False]])
    clean_q, clean_k, clean_v, poison = core.quarantine(q, k, v, live)
    np.testing.assert_array_equal(clean_q, [[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    np.testing.assert_array_equal(clean_k, [[0.0, 0.0], [2.0, 2.0]])
    np.testing.assert_array_equal(clean_v, [[3.0, 3.0], [0.0, 0.0]])
    np.testing.assert_array_equal(poison[:, 0], [True, True, False])
    _, _, _, poison = core.quarantine(q, k, v, np.array([[True, False]] * 2 + [[False] * 2]), "nan")
    np.testing.assert_array_equal(poison[:, 0], [True, True, True])


def test_uniform_rows_see_every_value_and_others_only_theirs():
    q, k, v = np.ones((2, 1)), np.ones((2, 1)), np.array([[1.0], [np.nan]])
    live = np.array([[True, False], [False, False]])
    _, _, _, poison = core.quarantine(q, k, v, live, "uniform")
    np.testing.assert_array_equal(poison[:, 0], [False, True])
    _, _, _, poison = core.quarantine(q, k, np.ones((2, 1)), live, "uniform")
    np.testing.assert_array_equal(poison[:, 0], [False, False])


def test_quarantine_of_a_bias():
    bias = np.array([[np.nan, 1.0, -np.inf], [np.inf, 2.0, 3.0]])
    live = np.array([[False, True, True], [True, True, True]])
    clean, poison = core.quarantine_bias(bias, live, np.zeros((2, 1), bool))
    np.testing.assert_array_equal(clean, [[0.0, 1.0, -np.inf], [0.0, 2.0, 3.0]])
    np.testing.assert_array_equal(poison[:, 0], [False, True])


def test_raise_names_the_mask():
    q, mask = np.ones((2, 1)), np.array([[True, True], [False, False]])
    with pytest.raises(core.errors.ParameterError, match="mask leaves at least one query"):
        core.visible(q, q, mask=mask, empty_row="raise")
    assert core.visible(q, q, mask=np.eye(2, dtype=bool), empty_row="raise").shape == (2, 2)
