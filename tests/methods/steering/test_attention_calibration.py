"""Attention calibration: slow loop, worked examples, identities, limits, the official rule."""

import math

import numpy as np
import pytest

import attention_ref
from attention_ref import core, engine
from attention_ref.kit.checks import cases
from attention_ref.methods.steering.attention_calibration import (
    attention_calibration_backward,
    attention_calibration_edit,
)

SPEC = attention_ref.get("steering/attention_calibration")
EQUIVALENT = {
    "attention_calibration_edit: 1  ->  2": "acts for S = 1 only, and a single key is no sink",
    "attention_calibration_edit: np.where(live & ~poison, np.ones_like(p), 0.0)  ->  "
    "np.where(np.ones_like(p), live & ~poison, 0.0)": "the same zeros and ones",
    "attention_calibration_edit: 1.0  ->  2.0": "divides a sum over no rows, which is 0",
    "attention_calibration_edit: 1.0  ->  2.0 (2)": "divides weights of 0 where r is 0",
}


def slow_attention_calibration(
    p, beta=0.4, alpha=5.0, threshold=None, heads=None, mask=None, causal=True,
    align="lower_right",
):  # fmt: skip
    """One map, one row, one number at a time."""
    lead, T, S = p.shape[:-2], p.shape[-2], p.shape[-1]
    mask = None if mask is None else np.broadcast_to(mask, p.shape)
    heads = None if heads is None else np.broadcast_to(heads, lead)
    first = S - T if align == "lower_right" else 0
    least = alpha / S if threshold is None else threshold
    out = np.zeros(p.shape)
    for place in np.ndindex(*lead):
        seen = [
            [
                (not causal or s <= t + first) and (mask is None or bool(mask[place][t, s]))
                for s in range(S)
            ]
            for t in range(T)
        ]
        found = []
        for s in range(S):
            column = [float(p[place][t, s]) for t in range(T) if seen[t][s]]
            if column and math.fsum(column) / len(column) > least:
                found.append(s)
        sinks = found[1:]
        for t in range(T):
            row = [float(p[place][t, s]) if seen[t][s] else 0.0 for s in range(S)]
            rest = math.fsum(row[s] for s in range(S) if s not in sinks)
            freed = (1 - beta) * math.fsum(row[s] for s in sinks)
            for s in range(S):
                new = beta * row[s] if s in sinks else row[s]
                if s not in sinks and rest != 0:
                    new += freed * row[s] / rest
                if rest == 0 or (heads is not None and not heads[place]):
                    new = row[s]
                out[place][t, s] = new
    return out


@pytest.mark.parametrize("case", cases(SPEC))
def test_equals_the_slow_loop(case):
    kwargs = cases(SPEC)[case]
    out, _ = attention_calibration_edit(**kwargs)
    np.testing.assert_allclose(out, slow_attention_calibration(**kwargs), rtol=0, atol=1e-15)


P = np.array([[1.0, 0.0, 0.0, 0.0], [0.6, 0.4, 0.0, 0.0],
              [0.3, 0.6, 0.1, 0.0], [0.2, 0.5, 0.1, 0.2]])  # fmt: skip
"""Column means: 2.1/4, 1.5/3, 0.2/2, 0.2/1 = 0.525, 0.5, 0.1, 0.2."""


def test_worked_example():
    """Threshold 0.3: sinks 0 and 1, so Z = {1}. Last row: m = 0.6 * 0.5 = 0.3, r = 0.5."""
    out, cache = attention_calibration_edit(P, beta=0.4, threshold=0.3)
    assert cache.sinks.tolist() == [[False, True, False, False]]
    want = [[1.0, 0, 0, 0], [0.84, 0.16, 0, 0], [0.57, 0.24, 0.19, 0], [0.32, 0.2, 0.16, 0.32]]
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-15)


def test_worked_example_backward():
    """dout = 1 at (3, 0): d p'_0 = (1 + m/r) dp_0 + (p_0/r) dm - (m p_0 / r^2) dr.

    m = 0.3, r = 0.5, p_0 = 0.2: the entries outside Z get -0.3 * 0.2 / 0.25 = -0.24, entry 0 gets
    1 + 0.6 on top, entry 1 gets 0.6 * 0.2 / 0.5 = 0.24.
    """
    out, cache = attention_calibration_edit(P, beta=0.4, threshold=0.3)
    dout = np.zeros_like(out)
    dout[3, 0] = 1.0
    dp = attention_calibration_backward(dout, cache)["p"]
    np.testing.assert_allclose(dp[3], [1.36, 0.24, -0.24, -0.24], rtol=0, atol=1e-15)
    assert not np.any(dp[:3])


def test_the_mean_is_over_the_rows_that_may_see_a_key():
    """Key 3 has the sum 0.2 in one row: its mean is 0.2, not 0.05."""
    _, cache = attention_calibration_edit(P, threshold=0.15)
    assert cache.sinks.tolist() == [[False, True, False, True]]
    _, cache = attention_calibration_edit(P, threshold=0.15, causal=False)
    assert cache.sinks.tolist() == [[False, True, False, False]]


def test_the_threshold_is_strict_and_the_default_is_five_over_s():
    flat = np.full((4, 4), 0.25)
    _, cache = attention_calibration_edit(flat, threshold=0.25, causal=False)
    assert not np.any(cache.sinks)
    rows = np.array([0.5, 0.11, 0.09] + [0.3 / 57] * 57)
    p = np.tile(rows, (60, 1))  # 5 / 60 = 0.0833
    _, cache = attention_calibration_edit(p, causal=False)
    assert np.flatnonzero(cache.sinks).tolist() == [1, 2]
    _, cache = attention_calibration_edit(p, causal=False, alpha=6.0)  # 6 / 60 = 0.1
    assert np.flatnonzero(cache.sinks).tolist() == [1]


@pytest.mark.parametrize("case", cases(SPEC))
def test_beta_one_is_the_identity(case):
    kwargs = cases(SPEC)[case] | {"beta": 1.0}
    out, cache = attention_calibration_edit(**kwargs)
    np.testing.assert_array_equal(out, kwargs["p"])
    dout = np.random.default_rng(0).standard_normal(out.shape)
    live = np.broadcast_to(cache.live, out.shape)
    dp = attention_calibration_backward(dout, cache)["p"]
    np.testing.assert_array_equal(dp, np.where(live, dout, 0.0))


def test_no_sink_is_the_identity():
    kwargs = cases(SPEC)["no-sink"]
    out, cache = attention_calibration_edit(**kwargs)
    assert not np.any(cache.sinks)
    np.testing.assert_array_equal(out, kwargs["p"])


def test_a_single_sink_is_the_first_and_stays():
    p = np.array([[0.1, 0.8, 0.1], [0.1, 0.8, 0.1], [0.2, 0.7, 0.1]])
    out, cache = attention_calibration_edit(p, threshold=0.5, causal=False)
    assert not np.any(cache.sinks)
    np.testing.assert_array_equal(out, p)


@pytest.mark.parametrize("case", cases(SPEC))
def test_rows_keep_their_sums_and_zeros_stay(case):
    kwargs = cases(SPEC)[case]
    out, _ = attention_calibration_edit(**kwargs)
    np.testing.assert_allclose(out.sum(-1), kwargs["p"].sum(-1), rtol=0, atol=4e-16)
    assert np.all(out >= 0) and not np.any(out[kwargs["p"] == 0])


def test_beta_zero_removes_the_sinks_and_renormalises():
    kwargs = cases(SPEC)["plain"] | {"beta": 0.0}
    out, cache = attention_calibration_edit(**kwargs)
    without = np.where(cache.sinks, 0.0, kwargs["p"])
    np.testing.assert_allclose(out, without / without.sum(-1, keepdims=True), rtol=0, atol=4e-16)


def test_ratios_among_the_other_keys_stay():
    kwargs = cases(SPEC)["both-ways"]
    out, cache = attention_calibration_edit(**kwargs)
    gain = np.where(cache.sinks, np.nan, out / kwargs["p"])
    assert np.nanmax(np.ptp(gain[:, :, :5], axis=-1)) < 1e-15
    assert np.all(gain[:, :, :5] > 1.05)


def test_untouched_heads_are_bit_equal():
    kwargs = cases(SPEC)["batch"]
    out, _ = attention_calibration_edit(**kwargs)
    np.testing.assert_array_equal(out[:, 1], kwargs["p"][:, 1])
    every, _ = attention_calibration_edit(**(kwargs | {"heads": None}))
    np.testing.assert_array_equal(out[:, ::2], every[:, ::2])
    assert np.any(every[:, 1] != kwargs["p"][:, 1])


def test_heads_are_independent():
    kwargs = cases(SPEC)["batch"]
    out, _ = attention_calibration_edit(**kwargs)
    one, _ = attention_calibration_edit(kwargs["p"][1, 2], beta=0.25, threshold=0.16)
    np.testing.assert_array_equal(out[1, 2], one)


def test_a_row_with_all_its_weight_on_sinks_stays():
    """The official code divides 0 by 0 here. Row 0 sees the first sink, row 1 the second only."""
    p = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.4, 0.5, 0.1]])
    out, cache = attention_calibration_edit(p, beta=0.5, threshold=0.3)
    assert cache.sinks.tolist() == [[False, True, False]]
    np.testing.assert_array_equal(out[:2], p[:2])
    np.testing.assert_allclose(out[2], [0.6, 0.25, 0.15], rtol=0, atol=1e-15)
    dout = np.arange(9.0).reshape(3, 3)
    dp = attention_calibration_backward(dout, cache)["p"]
    np.testing.assert_array_equal(dp[1, :2], dout[1, :2])


def test_rows_without_keys_stay_zero():
    kwargs = cases(SPEC)["long-queries"]
    out, cache = attention_calibration_edit(**kwargs)
    assert not np.any(out[:, :2]) and np.all(out[:, 2:].sum(-1) > 0.99)
    dp = attention_calibration_backward(np.ones_like(out), cache)["p"]
    assert not np.any(dp[:, :2]) and np.all(np.isfinite(dp))


def test_hidden_weights_have_no_effect():
    kwargs = cases(SPEC)["mask"]
    out, _ = attention_calibration_edit(**kwargs)
    hidden = ~(kwargs["mask"] & np.tri(9, dtype=bool))
    for bad in (np.nan, np.inf, 0.7):
        given = np.where(hidden, bad, kwargs["p"])
        found, again = attention_calibration_edit(**(kwargs | {"p": given}))
        np.testing.assert_array_equal(found, out)
        dp = attention_calibration_backward(np.ones_like(out), again)["p"]
        assert not np.any(dp[np.broadcast_to(hidden, dp.shape)])


def test_a_nan_in_a_live_weight_makes_its_row_nan_and_counts_nowhere():
    """Without row 3 the means of P are 1.9/3, 1/2, 0.1/1 and none for key 3."""
    bad = P.copy()
    bad[3, 1] = np.nan
    out, cache = attention_calibration_edit(bad, beta=0.4, threshold=0.3)
    assert np.all(np.isnan(out[3]))
    want, _ = attention_calibration_edit(P, beta=0.4, threshold=0.3)
    np.testing.assert_array_equal(out[:3], want[:3])
    _, strict = attention_calibration_edit(bad, threshold=0.45)
    assert strict.sinks.tolist() == [[False, True, False, False]]
    dp = attention_calibration_backward(np.ones_like(out), cache)["p"]
    assert not np.any(dp[3]) and np.all(np.isfinite(dp))


def test_the_gradient_jumps_only_where_a_key_becomes_a_sink():
    """On either side of the threshold the fixed-set gradient is the derivative."""
    rng = np.random.default_rng(3)
    dout, step = rng.standard_normal(P.shape), 0.1 * rng.standard_normal(P.shape) * np.tri(4)
    for threshold, sinks in ((0.49, [1]), (0.51, [])):
        _, cache = attention_calibration_edit(P, threshold=threshold)
        assert np.flatnonzero(cache.sinks).tolist() == sinks
        slope = engine.difference(
            lambda p, t=threshold: attention_calibration_edit(p, threshold=t)[0],
            {"p": P}, {"p": step},
        )  # fmt: skip
        dp = attention_calibration_backward(dout, cache)["p"]
        assert abs(np.sum(dp * step) - np.sum(dout * slope)) < 1e-11


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"beta": 1.5}, core.errors.ParameterError, "beta is 1.5, expected a finite number 0 <="),
        ({"beta": -0.1}, core.errors.ParameterError, "beta is -0.1"),
        ({"alpha": 0.0}, core.errors.ParameterError, "alpha is 0.0"),
        ({"threshold": -1.0}, core.errors.ParameterError, "threshold is -1.0"),
        ({"heads": np.ones(3, bool)}, core.errors.ShapeError, "heads has shape .3,., expected"),
        ({"heads": np.ones(2)}, core.errors.DTypeError, "heads has dtype float64"),
        ({"mask": np.ones((7, 6), bool)}, core.errors.ShapeError, "mask has shape"),
        ({"align": "lower"}, core.errors.ParameterError, "align is 'lower'"),
        ({"p": np.ones(4)}, core.errors.ShapeError, "p has shape .4,., expected"),
    ],
)
def test_errors(change, error, says):
    with pytest.raises(error, match=says):
        attention_calibration_edit(**(cases(SPEC)["plain"] | change))


def test_a_foreign_cotangent_is_refused():
    out, cache = attention_calibration_edit(**cases(SPEC)["plain"])
    with pytest.raises(core.errors.ShapeError, match="dout has shape"):
        attention_calibration_backward(out[0], cache)
