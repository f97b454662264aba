"""Text infilling: a scalar walk over every sample, solvers, position code, who sees whom."""

import math

import numpy as np
import pytest

import attention_ref
from attention_ref import core
from attention_ref.kit.checks import cases
from attention_ref.methods.scores.segment_positions import (
    Sample,
    position_code,
    segment_positions_accuracy,
    segment_positions_generate,
    segment_positions_solve,
    segments,
    visible,
)

SPEC = attention_ref.get("scores/segment_positions")
softmax = attention_ref.get("scores/dot_product")
DEFAULTS = {"T": 12, "V": 13, "D": 3, "b": 2, "fewest": 4, "most": 6, "B": 1}


def rng(seed=0):
    return np.random.default_rng(seed)


def check_segment_positions(kwargs, out):
    """Walk over every sample, slot by slot, rebuild the sequence and count."""
    T, V, D, b, fewest, most, B = ((DEFAULTS | kwargs)[n] for n in DEFAULTS)
    for name, x in out._asdict().items():
        assert x.shape == (B, T + b)
        assert x.dtype == (np.bool_ if name == "blank" else np.int64)
    for tokens, target, blank, segment, offset in zip(*(x.tolist() for x in out), strict=True):
        sequence, missing, pairs, place, inside = [], 0, 0, 0, False
        for t, (token, aim, hole) in enumerate(zip(tokens, target, blank, strict=True)):
            if t and hole != blank[t - 1]:
                place += 1
            first = not t or hole != blank[t - 1]
            assert segment[t] == place and (place % 2 == 1) == hole
            assert offset[t] == (0 if first else offset[t - 1] + 1)
            if not hole:
                assert token == aim and 0 <= token < V and not inside
                pairs += not first
                sequence.append(token)
                continue
            assert (token == V) == first
            assert first or token == sequence[-1]
            inside = aim != V + 1
            if inside:
                assert 0 <= aim < V
                sequence.append(aim)
                missing += 1
            else:
                assert not first  # no blank is empty
        assert place == 2 * b and not blank[0] and not blank[-1] and pairs >= 1
        assert len(sequence) == T and fewest <= missing <= most
        step = (sequence[1] - sequence[0]) % V
        assert 1 <= step <= D
        for i, x in enumerate(sequence):
            assert x == (sequence[0] + step * i) % V


@pytest.mark.parametrize("draw", range(4))
@pytest.mark.parametrize("case", cases(SPEC))
def test_rules_hold_on_every_sample(case, draw):
    kwargs = cases(SPEC, draw)[case]
    check_segment_positions(kwargs, SPEC.call(kwargs)[0])


def test_defaults():
    out = segment_positions_generate(rng(1))
    check_segment_positions({}, out)
    many = segment_positions_generate(rng(1), B=400)
    check_segment_positions({"B": 400}, many)
    assert set(np.sum(many.blank, axis=1)) == {6, 7, 8}  # 4, 5, 6 and two ends


def test_a_sample_that_breaks_a_rule_is_noticed():
    kwargs = cases(SPEC)["plain"]
    out = SPEC.call(kwargs)[0]
    for name in ("tokens", "target", "segment", "offset", "blank"):
        for place in ((0, 0), (3, 7), (5, 13)):
            x = getattr(out, name).copy()
            x[place] = 1 - x[place]
            with pytest.raises(AssertionError):
                check_segment_positions(kwargs, out._replace(**{name: x}))


def test_starts_steps_and_lengths_are_uniform():
    """Within 5 standard deviations: a, d, how many are missing, and every split of them."""
    out = segment_positions_generate(rng(2), B=6000)
    step = segment_positions_generate(rng(2), B=6000, D=12)
    d = (step.target[:, 1:] - step.target[:, :-1])[~step.blank[:, 1:] & ~step.blank[:, :-1]] % 13
    assert set(d) == set(range(1, 13))

    def uniform(values, outcomes):
        _, counts = np.unique(values, return_counts=True, axis=0)
        assert len(counts) == outcomes
        n, p = len(values), 1 / outcomes
        assert np.max(np.abs(counts - n * p)) < 5 * math.sqrt(n * p * (1 - p))

    uniform(out.tokens[:, 0], 13)
    missing = np.sum(out.blank, axis=1) - 2
    uniform(missing, 3)
    first = np.sum(out.segment == 1, axis=1) - 1
    for n in (4, 5, 6):
        uniform(first[missing == n], n - 1)
        text = np.stack([np.sum(out.segment == s, axis=1) for s in (0, 2, 4)], axis=1)
        uniform(text[missing == n], math.comb(12 - n - 1, 2))
    pair = np.argmax(~out.blank[:, 1:] & ~out.blank[:, :-1], axis=1)[:, None]
    uniform(np.take_along_axis(np.diff(out.target, axis=1), pair, 1)[:, 0] % 13, 3)


def test_one_seed_gives_one_sample_and_another_another():
    a, b, c = (segment_positions_generate(rng(s), B=3).tokens for s in (4, 4, 5))
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def by_hand():
    """2 5 _ _ 1 _ 7 in steps of 3 modulo 13: 2 5 [8 11] 1 [4] 7."""
    return Sample(
        np.array([[2, 5, 13, 8, 11, 1, 13, 4, 7]]), np.array([[2, 5, 8, 11, 14, 1, 4, 14, 7]]),
        np.array([[0, 0, 1, 1, 1, 0, 1, 1, 0]], bool), np.array([[0, 0, 1, 1, 1, 2, 3, 3, 4]]),
        np.array([[0, 1, 0, 1, 2, 0, 0, 1, 0]]),
    )  # fmt: skip


def test_the_example_by_hand_obeys_the_rules_and_is_solved():
    sample = by_hand()
    check_segment_positions({"T": 7, "fewest": 3, "most": 3}, sample)
    answer = segment_positions_solve(sample, 13)
    np.testing.assert_array_equal(answer, [[0, 0, 8, 11, 14, 0, 4, 14, 0]])
    assert segment_positions_accuracy(answer, sample) == 1.0


@pytest.mark.parametrize("case", cases(SPEC))
def test_perfect_solver_scores_one_and_a_blind_one_chance(case):
    kwargs = cases(SPEC)[case] | {"B": 2000}
    sample, V = SPEC.call(kwargs)[0], kwargs.get("V", 13)
    assert segment_positions_accuracy(segment_positions_solve(sample, V), sample) == 1.0
    slots, numbers = np.sum(sample.blank), np.sum(sample.blank & (sample.target < V))
    for word in (0, V - 1):
        chance = numbers / slots / V
        score = segment_positions_accuracy(np.full_like(sample.tokens, word), sample)
        assert abs(score - chance) < 5 * math.sqrt(chance / 2000)  # numbers of a sample correlate
    ends = segment_positions_accuracy(np.full_like(sample.tokens, V + 1), sample)
    assert ends == 2000 * kwargs.get("b", 2) / slots


def test_the_solver_reads_only_what_a_blank_may_see():
    """Overwriting all that a slot may not see leaves the answer in that slot alone."""
    sample, V = segment_positions_generate(rng(6), B=40), 13
    answer, live = segment_positions_solve(sample, V), visible(sample.blank)
    noise = rng(7).integers(V, size=sample.tokens.shape)
    for t in range(14):
        seen = np.where(live[:, t] | (sample.tokens == V), sample.tokens, noise)
        again = segment_positions_solve(sample._replace(tokens=seen, target=noise), V)
        np.testing.assert_array_equal(again[:, t], answer[:, t])


def test_accuracy_counts_blanks_only():
    sample = by_hand()
    answer = np.where(sample.blank, sample.target, 0)
    answer[0, 3] = 0
    assert segment_positions_accuracy(answer, sample) == 0.8
    one = sample._replace(blank=np.arange(9)[None] == 3)
    assert segment_positions_accuracy(answer, one) == 0.0
    none = sample._replace(blank=np.zeros((1, 9), bool))
    assert segment_positions_accuracy(answer, none) == 1.0


def test_segments_by_hand():
    """The example of the official code's comment, and sequences that begin or end with a blank."""
    blank = np.array([[0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 0], [1, 0, 0, 1, 0, 1, 1, 1, 1, 0, 1]], bool)
    segment, offset = segments(blank)
    np.testing.assert_array_equal(
        segment, [[0, 0, 1, 1, 1, 1, 2, 2, 3, 3, 4], [1, 2, 2, 3, 4, 5, 5, 5, 5, 6, 7]]
    )
    np.testing.assert_array_equal(
        offset, [[0, 1, 0, 1, 2, 3, 0, 1, 0, 1, 0], [0, 0, 1, 0, 0, 0, 1, 2, 3, 0, 0]]
    )
    alone = segments(blank[1])
    np.testing.assert_array_equal(alone[0], segment[1])


@pytest.mark.parametrize("case", cases(SPEC))
def test_segments_of_a_sample_are_those_it_says(case):
    out = SPEC.call(cases(SPEC)[case])[0]
    segment, offset = segments(out.blank)
    np.testing.assert_array_equal(segment, out.segment)
    np.testing.assert_array_equal(offset, out.offset)


def test_positions_behind_a_blank_do_not_betray_its_length():
    short, long = (np.array([0] * 3 + [1] * n + [0] * 4, bool) for n in (1, 7))
    a, b = (np.stack(segments(x))[:, -4:] for x in (short, long))
    np.testing.assert_array_equal(a, b)


def test_position_code_by_hand():
    """Id 2 * 256 + 3 = 515, C = 6: scales 1, 100, 10000."""
    code = position_code(np.array([2]), np.array([3]), 6)
    want = [f(515 / scale) for f in (math.sin, math.cos) for scale in (1, 100, 10000)]
    np.testing.assert_allclose(code, [want], rtol=0, atol=1e-13)
    near = position_code(np.array([2]), np.array([3]), 4, base=10)
    np.testing.assert_allclose(near[0, [0, 2]], [math.sin(23), math.cos(23)], rtol=0, atol=1e-14)
    np.testing.assert_allclose(near[0, 1], math.sin(23e-4), rtol=1e-14)


def test_codes_are_different_while_segments_are_shorter_than_the_base():
    segment, offset = np.divmod(np.arange(5 * 256), 256)
    code = position_code(segment, offset, 16)
    gap = np.linalg.norm(code[:, None] - code[None], axis=2) + 9 * np.eye(len(code))
    assert np.min(gap) > 0.01
    same = position_code(np.array([0, 1]), np.array([256, 0]), 16)
    np.testing.assert_array_equal(same[0], same[1])


def test_who_sees_whom_by_hand():
    """Text, blank, blank, text, blank: rows are queries."""
    live = visible(np.array([0, 1, 1, 0, 1], bool))
    want = [[1, 0, 0, 1, 0], [1, 1, 0, 1, 0], [1, 1, 1, 1, 0], [1, 0, 0, 1, 0], [1, 1, 1, 1, 1]]
    np.testing.assert_array_equal(live, np.array(want, bool))


def test_one_blank_at_the_end_is_a_language_model_with_a_prefix():
    live = visible(np.arange(7) >= 3)
    np.testing.assert_array_equal(live[3:], np.tri(7, dtype=bool)[3:])
    everything = visible(np.ones(5, bool))
    np.testing.assert_array_equal(everything, np.tri(5, dtype=bool))
    assert np.all(visible(np.zeros(4, bool)))


@pytest.mark.parametrize("case", cases(SPEC))
def test_nothing_leaks_through_any_number_of_layers(case):
    """What the seen slots see is seen: the relation is transitive, and no slot sees its answer."""
    out = SPEC.call(cases(SPEC)[case])[0]
    live = visible(out.blank)
    assert live.shape == (*out.blank.shape, out.blank.shape[1])
    twice = live.astype(int) @ live.astype(int) > 0
    np.testing.assert_array_equal(twice, live)
    for one, blank in zip(live, out.blank, strict=True):
        for t in np.flatnonzero(blank):
            assert not np.any(one[t, t + 1 :] & blank[t + 1 :])
            assert np.all(one[t, ~blank]) and np.all(one[t, : t + 1])
        assert not np.any(one[~blank][:, blank])


def test_the_template_does_not_depend_on_fillings_or_their_order():
    """Two layers of attention: rows of the text stay bit for bit whatever stands in the blanks."""
    sample = segment_positions_generate(rng(8), B=2)
    x = rng(9).standard_normal((15, 8))
    live = visible(sample.blank)

    def rows(tokens):
        h = x[tokens] + position_code(sample.segment, sample.offset, 8)
        for _ in range(2):
            h, _ = softmax.forward(h, h, h, mask=live)
        return h[~sample.blank]

    other = np.where(sample.blank, rng(10).integers(15, size=sample.tokens.shape), sample.tokens)
    np.testing.assert_array_equal(rows(sample.tokens), rows(other))


def test_the_empty_batch():
    out = segment_positions_generate(rng(), B=0)
    assert all(x.shape == (0, 14) for x in out)
    assert segment_positions_solve(out, 13).shape == (0, 14)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"V": 12}, core.errors.ParameterError, "V is 12, expected a prime"),
        ({"V": 1}, core.errors.ParameterError, "V is 1, expected an integer 2 <= V"),
        ({"T": 14}, core.errors.ParameterError, "T is 14, expected .* <= 13 tokens"),
        ({"D": 13}, core.errors.ParameterError, "D is 13, expected .* <= 12"),
        ({"D": 0}, core.errors.ParameterError, "D is 0"),
        ({"b": 0}, core.errors.ParameterError, "b is 0"),
        ({"fewest": 1}, core.errors.ParameterError, "fewest is 1, expected .* 2 <= fewest"),
        ({"fewest": 5, "most": 4}, core.errors.ParameterError, "most is 4, expected .* 5 <= most"),
        ({"most": 9}, core.errors.ParameterError, "most is 9, expected .* <= 8 tokens"),
        ({"most": 5.0}, core.errors.ParameterError, "most is 5.0, expected an integer"),
        ({"B": -1}, core.errors.ParameterError, "B is -1"),
        ({"rng": 3}, core.errors.DTypeError, "default_rng"),
    ],
)
def test_errors(change, error, says):
    with pytest.raises(error, match=says):
        segment_positions_generate(**({"rng": rng()} | change))


def test_the_longest_and_the_shortest_that_is_allowed():
    for V, T in ((13, 13), (2, 2)):
        low = {"b": 1, "D": 1, "fewest": 1, "most": max(T - 3, 1)}
        if T < 4:
            with pytest.raises(core.errors.ParameterError, match="most is 1"):
                segment_positions_generate(rng(), T=T, V=V, **low)
        else:
            out = segment_positions_generate(rng(), T=T, V=V, B=50, **low)
            check_segment_positions({"T": T, "V": V, "B": 50} | low, out)


def test_helpers_check_their_arguments():
    with pytest.raises(core.errors.DTypeError, match="blank has dtype int64"):
        segments(np.array([0, 1]))
    with pytest.raises(core.errors.DTypeError, match="blank has dtype int64"):
        visible(np.array([0, 1]))
    zero = np.zeros(3, int)
    for change, says in (
        ({"width": 5}, "width is 5, expected an even"), ({"width": 2}, "4 <= width"),
        ({"base": 0}, "base is 0"), ({"segment": zero - 1}, "segment holds"),
        ({"offset": zero - 1}, "offset holds"),
    ):  # fmt: skip
        with pytest.raises(core.errors.ParameterError, match=says):
            position_code(**({"segment": zero, "offset": zero, "width": 4} | change))
    with pytest.raises(core.errors.DTypeError, match="answer"):
        segment_positions_accuracy(by_hand().blank, by_hand())
