"""Streaming with sinks: slow loop, budget, trace by hand, keep-all, window, rotary places."""

import itertools
import math

import numpy as np
import pytest

import attention_ref
from attention_ref import core
from attention_ref.kit.checks import cases
from attention_ref.methods.cache.streaming_sinks import (
    streaming_sinks_attend,
    streaming_sinks_select,
    streaming_sinks_walk_select,
)

SPEC = attention_ref.get("cache/streaming_sinks")
EQUIVALENT = {
    "streaming_sinks_walk_select: 0  ->  1": "one step of a cache that no length asks for",
    "streaming_sinks_attend: 0  ->  1 (5)": "a query with one key gives it weight 1 at any place",
}


def slow_streaming_sinks(length, sinks, window):
    """A token is kept when it is one of the first or one of the last; one step at a time."""
    out = np.full((*length.shape, sinks + window), -1)
    for place in np.ndindex(*length.shape):
        n = int(length[place])
        kept = [s for s in range(n) if s < sinks or s >= n - window]
        for i, s in enumerate(kept):
            out[place][i] = s
    return out


def slow_attend(q, k, v, sinks, window, theta=None, scale=None):
    """One query at a time over the tokens that are kept; rotary pairs (d, d + D/2)."""
    T, S, D, E = q.shape[0], k.shape[0], q.shape[1], v.shape[1]
    c = 1 / math.sqrt(D) if scale is None else scale
    out = np.zeros((T, E))
    for t in range(T):
        n = t + S - T + 1
        kept = [s for s in range(n) if s < sinks or s >= n - window]
        weight = []
        for place, s in enumerate(kept):
            z = 0.0
            if theta is None:
                z = math.fsum(float(q[t, d]) * float(k[s, d]) for d in range(D))
            else:
                for d in range(D // 2):
                    angle = (len(kept) - 1 - place) * theta ** (-2 * d / D)
                    qa, qb = float(q[t, d]), float(q[t, d + D // 2])
                    ka, kb = float(k[s, d]), float(k[s, d + D // 2])
                    z += (qa * ka + qb * kb) * math.cos(angle)
                    z += (qa * kb - qb * ka) * math.sin(angle)
            weight.append(math.exp(c * z))
        total = math.fsum(weight)
        for e in range(E):
            mixed = math.fsum(w * float(v[s, e]) for w, s in zip(weight, kept, strict=True))
            out[t, e] = mixed / total if kept else 0.0
    return out


def rotary(theta):
    """The positional encoding of the slow loop above, on arrays."""

    def rotate(x, place):
        half = x.shape[-1] // 2
        angle = place[:, None] * theta ** (-np.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        turned = a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)
        return np.concatenate(turned, axis=-1)

    return rotate


def stream(T=14, S=14, D=4, E=3, lead=(), seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((*lead, *shape)) for shape in ((T, D), (S, D), (S, E))]


@pytest.mark.parametrize("draw", range(3))
@pytest.mark.parametrize("case", cases(SPEC))
def test_equals_the_slow_loop(case, draw):
    kwargs = cases(SPEC, draw)[case]
    np.testing.assert_array_equal(streaming_sinks_select(**kwargs), slow_streaming_sinks(**kwargs))


def test_trace_by_hand():
    """Two sinks, a window of two: the fifth token drops token 2, the sixth token 3."""
    trace = streaming_sinks_select(np.arange(0, 7), sinks=2, window=2)
    assert trace.tolist() == [
        [-1, -1, -1, -1], [0, -1, -1, -1], [0, 1, -1, -1], [0, 1, 2, -1],
        [0, 1, 2, 3], [0, 1, 3, 4], [0, 1, 4, 5],
    ]  # fmt: skip


@pytest.mark.parametrize(("sinks", "window"), [(0, 1), (0, 5), (1, 1), (4, 7), (9, 2)])
def test_budget_causality_and_order(sinks, window):
    for n, kept in enumerate(streaming_sinks_select(np.arange(40), sinks=sinks, window=window)):
        full = kept[kept >= 0]
        assert len(full) == min(n, sinks + window)
        assert np.all(np.diff(full) > 0) and np.all(full < n)
        assert np.array_equal(kept[: len(full)], full)
        assert n == 0 or n - 1 in full
        assert set(range(min(n, sinks))) <= set(full.tolist())


def test_what_was_dropped_never_comes_back():
    trace = streaming_sinks_select(np.arange(1, 50), sinks=3, window=6)
    for before, after in itertools.pairwise(trace):
        assert len(set(after.tolist()) - set(before.tolist()) - {-1}) == 1


def test_the_walk_is_the_policy():
    none = np.zeros((0, 2), int)
    assert streaming_sinks_walk_select(none, sinks=1, window=3).shape == (0, 2, 4)
    far = np.array([1500])
    assert np.array_equal(streaming_sinks_walk_select(far), streaming_sinks_select(far))
    for sinks, window in ((0, 3), (2, 1), (4, 6)):
        length = np.arange(30)
        walk = streaming_sinks_walk_select(length, sinks=sinks, window=window)
        np.testing.assert_array_equal(
            walk, streaming_sinks_select(length, sinks=sinks, window=window)
        )


def test_defaults_are_four_sinks_and_1024_slots():
    kept = streaming_sinks_select(np.array([3000]))[0]
    assert kept.shape == (1024,) and kept[:5].tolist() == [0, 1, 2, 3, 1980] and kept[-1] == 2999
    q, k, v = stream(T=2, S=1030)
    kept = streaming_sinks_attend(q, k, v).kept
    assert kept[1, :5].tolist() == [0, 1, 2, 3, 10] and kept[0, 4] == 9


@pytest.mark.parametrize(("T", "S"), [(14, 14), (5, 14), (6, 4)])
@pytest.mark.parametrize("theta", [None, 50.0])
def test_attend_equals_the_slow_loop(T, S, theta):
    q, k, v = stream(T, S)
    rotate = None if theta is None else rotary(theta)
    for sinks, window, scale in ((2, 3, None), (0, 4, 0.7), (1, 1, 0.3), (3, 20, None)):
        found = streaming_sinks_attend(
            q, k, v, sinks=sinks, window=window, rotate=rotate, scale=scale
        )
        want = slow_attend(q, k, v, sinks, window, theta, scale)
        np.testing.assert_allclose(found.out, want, rtol=0, atol=1e-14)
        alive = np.any(found.kept >= 0, axis=-1)
        np.testing.assert_allclose(found.p.sum(-1), alive, rtol=0, atol=1e-15)
        assert not np.any(found.p[found.kept < 0])


def test_attend_worked_example():
    """One sink, a window of one. Query 2 sees keys 0 and 2 with scores 0 and ln 3."""
    k = np.array([[0.0], [9.0], [math.log(3.0)]])
    v = np.array([[4.0], [100.0], [8.0]])
    found = streaming_sinks_attend(np.ones((3, 1)), k, v, sinks=1, window=1)
    np.testing.assert_allclose(found.p[2], [0.25, 0.75], rtol=0, atol=1e-15)
    np.testing.assert_allclose(found.out[[0, 2]], [[4.0], [7.0]], rtol=0, atol=1e-14)


@pytest.mark.parametrize("lead", [(), (2, 3)])
def test_keep_all_equals_dense(lead):
    q, k, v = stream(9, 12, lead=lead)
    dense, _ = attention_ref.get("scores/dot_product").forward(q, k, v, causal=True)
    for sinks, window in ((4, 8), (0, 12), (12, 1)):
        found = streaming_sinks_attend(q, k, v, sinks=sinks, window=window)
        np.testing.assert_allclose(found.out, dense, rtol=0, atol=1e-15)
    less = streaming_sinks_attend(q, k, v, sinks=3, window=8).out
    np.testing.assert_allclose(less[..., :-1, :], dense[..., :-1, :], rtol=0, atol=1e-15)
    assert np.all(np.any(np.abs(less[..., -1, :] - dense[..., -1, :]) > 1e-6, axis=-1))


def test_equals_dense_under_the_mask_of_what_is_kept():
    q, k, v = stream(20, 20)
    found = streaming_sinks_attend(q, k, v, sinks=2, window=5)
    t, s = np.arange(20)[:, None], np.arange(20)
    mask = (s <= t) & ((s < 2) | (s > t - 5))
    dense, _ = attention_ref.get("scores/dot_product").forward(q, k, v, mask=mask)
    np.testing.assert_allclose(found.out, dense, rtol=0, atol=1e-15)


def test_no_sinks_is_a_sliding_window():
    q, k, v = stream(16, 16)
    found = streaming_sinks_attend(q, k, v, sinks=0, window=6)
    t, s = np.arange(16)[:, None], np.arange(16)
    mask = (s <= t) & (t - s < 6)
    dense, _ = attention_ref.get("scores/dot_product").forward(q, k, v, mask=mask)
    np.testing.assert_allclose(found.out, dense, rtol=0, atol=1e-15)


def test_places_are_those_inside_the_cache():
    """The same tokens later in the text: nothing changes, however long the stream."""
    q, k, v = stream(60, 60)
    rotate = rotary(50.0)
    late = streaming_sinks_attend(q, k, v, sinks=2, window=4, rotate=rotate).out[-1]
    few = [*range(2), *range(56, 60)]
    early = streaming_sinks_attend(q[few], k[few], v[few], sinks=2, window=4, rotate=rotate)
    np.testing.assert_allclose(late, early.out[-1], rtol=0, atol=1e-15)
    dense, _ = attention_ref.get("scores/dot_product").forward(
        rotate(q[-1:], np.array([59])), rotate(k, np.arange(60))[few], v[few]
    )
    assert np.max(np.abs(late - dense[0])) > 1e-3


def test_rotary_shifts_do_not_matter_while_all_is_kept():
    """A rotation of all places by the same angle changes no score."""
    q, k, v = stream(10, 10)
    rotate = rotary(50.0)
    base = streaming_sinks_attend(q, k, v, window=9, rotate=rotate).out
    moved = streaming_sinks_attend(
        q, k, v, window=9, rotate=lambda x, place: rotate(x, place + 7)
    ).out
    np.testing.assert_allclose(moved, base, rtol=0, atol=1e-14)


def test_a_dropped_token_has_no_effect_and_a_kept_nan_makes_its_rows_nan():
    q, k, v = stream(12, 12)
    base = streaming_sinks_attend(q, k, v, sinks=1, window=3).out
    for array in (k, v):
        saved = array[4].copy()
        array[4] = np.nan
        found = streaming_sinks_attend(q, k, v, sinks=1, window=3).out
        assert np.all(np.isnan(found[4:7]))
        rest = [*range(4), *range(7, 12)]
        np.testing.assert_array_equal(found[rest], base[rest])
        array[4] = saved
    q[5] = np.inf
    found = streaming_sinks_attend(q, k, v, sinks=1, window=3).out
    assert np.all(np.isnan(found[5])) and np.sum(np.isnan(found[:, 0])) == 1


def test_empty_slots_see_no_nan():
    """Slot -1 must not read token 0 or the last token."""
    q, k, v = stream(5, 5)
    base = streaming_sinks_attend(q, k, v, window=30).out
    v[4] = np.nan
    np.testing.assert_array_equal(streaming_sinks_attend(q, k, v, window=30).out[:4], base[:4])


def test_shapes_without_keys_and_without_queries():
    q, k, v = stream(3, 0)
    found = streaming_sinks_attend(q, k, v, sinks=2, window=3)
    assert found.out.shape == (3, 3) and found.p.shape == (3, 5)
    assert not np.any(found.out) and not np.any(found.p) and np.all(found.kept == -1)
    q, k, v = stream(0, 6)
    assert streaming_sinks_attend(q, k, v, sinks=1, window=2).out.shape == (0, 3)


def test_float32_stays_and_agrees():
    q, k, v = (a.astype(np.float32) for a in stream(20, 20))
    found = streaming_sinks_attend(q, k, v, sinks=2, window=5)
    wide = streaming_sinks_attend(*(a.astype(float) for a in (q, k, v)), sinks=2, window=5)
    assert found.out.dtype == found.p.dtype == np.float32
    np.testing.assert_allclose(found.out, wide.out, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"length": 7}, core.errors.DTypeError, "length is a int, expected a NumPy array"),
        ({"length": np.array([2.0])}, core.errors.DTypeError, "length has dtype float64"),
        ({"length": np.array([3, -1])}, core.errors.ParameterError, "length holds values"),
        ({"sinks": -1}, core.errors.ParameterError, "sinks is -1, expected an integer 0 <= sinks"),
        ({"window": 0}, core.errors.ParameterError, "window is 0, expected an integer 1 <= windo"),
        ({"sinks": True}, core.errors.ParameterError, "sinks is True"),
        ({"window": 2.5}, core.errors.ParameterError, "window is 2.5"),
    ],
)
def test_errors(change, error, says):
    with pytest.raises(error, match=says):
        streaming_sinks_select(**(cases(SPEC)["plain"] | change))


def test_attend_checks_its_arguments():
    q, k, v = stream(3, 5)
    with pytest.raises(core.errors.ShapeError, match="k has D = 3"):
        streaming_sinks_attend(q, k[:, :3], v)
    with pytest.raises(core.errors.ParameterError, match="scale is nan"):
        streaming_sinks_attend(q, k, v, scale=math.nan)
    with pytest.raises(core.errors.ParameterError, match="window is 0"):
        streaming_sinks_attend(q, k, v, window=0)
    with pytest.raises(core.errors.ParameterError, match="D is 0"):
        streaming_sinks_attend(q[:, :0], k[:, :0], v)
    wide = np.broadcast_to(np.float64(0.0), (200_000, 2))
    with pytest.raises(core.errors.MemoryLimitError, match="the gathered keys"):
        streaming_sinks_attend(wide, wide, wide)
