"""Flip-flop language: a scalar walk over every sample, statistics, solvers, the hand-built head."""

import math

import numpy as np
import pytest

import attention_ref
from attention_ref import core
from attention_ref.kit.checks import cases
from attention_ref.methods.tasks.flip_flop import (
    TOKENS,
    Sample,
    flip_flop_error,
    flip_flop_generate,
    flip_flop_head,
    flip_flop_solve,
)  # fmt: skip

SPEC = attention_ref.get("tasks/flip_flop")
LETTERS = "wri01"
EQUIVALENT = {
    "flip_flop_generate: draw < p_i  ->  draw <= p_i": "a draw equals p_i with probability 0",
    "flip_flop_generate: draw < (1 + p_i) / 2  ->  draw <= (1 + p_i) / 2": "likewise",
}


def rng(seed=0):
    return np.random.default_rng(seed)


def encode(text):
    """One sequence written as letters, as a batch of one."""
    return np.array([[TOKENS[letter] for letter in text]])


def check_flip_flop(kwargs, out):
    """Walk over every sample, token by token, with a memory of one bit."""
    tokens, judged = out
    assert tokens.shape == judged.shape == (kwargs["B"], kwargs["T"])
    assert tokens.dtype == np.int64 and judged.dtype == np.bool_
    for line, marks in zip(tokens.tolist(), judged.tolist(), strict=True):
        text = "".join(LETTERS[token] for token in line)
        assert text[0] == "w" and text[-2] == "r"
        memory = None
        for t in range(0, len(text), 2):
            word, bit = text[t], text[t + 1]
            assert word in "wri" and bit in "01"
            assert marks[t] is False and marks[t + 1] is (word == "r")
            if word == "w":
                memory = bit
            if word == "r":
                assert bit == memory, f"{text} reads {bit} at {t}, written was {memory}"
            if 0 < t < len(text) - 2:
                assert kwargs["p_i"] < 1.0 or word == "i"
                assert kwargs["p_i"] > 0.0 or word != "i"


@pytest.mark.parametrize("draw", range(3))
@pytest.mark.parametrize("case", cases(SPEC))
def test_rules_hold_on_every_sample(case, draw):
    kwargs = cases(SPEC, draw)[case]
    check_flip_flop(kwargs, SPEC.call(kwargs)[0])


def test_a_sequence_that_breaks_a_rule_is_noticed():
    kwargs = cases(SPEC)["dense"]
    out = SPEC.call(kwargs)[0]
    for b, t in ((0, 0), (1, 38), (2, 39)):
        broken = out.tokens.copy()
        broken[b, t] = {0: 1, 38: 2, 39: 7 - broken[b, t]}[t]
        with pytest.raises(AssertionError):
            check_flip_flop(kwargs, Sample(broken, out.judged))


@pytest.mark.parametrize("p_i", [0.0, 0.1, 0.8, 0.98, 1.0])
def test_frequencies_of_instructions_and_bits(p_i):
    """Inner instructions are independent: within 5 standard deviations of n p (1 - p)."""
    tokens, _ = flip_flop_generate(rng(1), T=402, p_i=p_i, B=200)
    word, bits = tokens[:, 2:-2:2], tokens[:, 3:-2:2]
    for name, p in (("i", p_i), ("w", (1 - p_i) / 2), ("r", (1 - p_i) / 2)):
        share = np.mean(word == TOKENS[name])
        assert abs(share - p) <= 5 * math.sqrt(p * (1 - p) / word.size)
    free = word != TOKENS["r"]
    ones = np.mean(bits[free] == TOKENS["1"])
    assert abs(ones - 0.5) < 5 * 0.5 / math.sqrt(np.sum(free))
    first = np.mean(tokens[:, 1] == TOKENS["1"])
    assert abs(first - 0.5) < 5 * 0.5 / math.sqrt(200)


def test_one_seed_gives_one_sample_and_another_another():
    a, b, c = (flip_flop_generate(rng(s), T=64, B=3).tokens for s in (4, 4, 5))
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_defaults_are_those_of_the_data_set():
    """256 pairs, 80 % of them ignored."""
    tokens, judged = flip_flop_generate(rng(2))
    assert tokens.shape == (1, 512)
    assert abs(np.mean(tokens[:, 0::2] == TOKENS["i"]) - 0.8) < 0.125
    assert np.array_equal(judged[:, 1::2], tokens[:, 0::2] == TOKENS["r"])


def test_only_ignore_answers_the_first_bit():
    tokens, judged = flip_flop_generate(rng(3), T=20, p_i=1.0, B=50)
    assert np.array_equal(tokens[:, -1], tokens[:, 1])
    assert np.array_equal(np.sum(judged, axis=1), np.ones(50))


def flipped(tokens):
    """Every bit exchanged."""
    return np.where(tokens >= TOKENS["0"], TOKENS["0"] + TOKENS["1"] - tokens, tokens)


def test_flipping_all_bits_flips_all_answers():
    sample = flip_flop_generate(rng(4), T=60, p_i=0.5, B=8)
    twin = Sample(flipped(sample.tokens), sample.judged)
    check_flip_flop({"B": 8, "T": 60, "p_i": 0.5}, twin)
    answer, other = flip_flop_solve(sample.tokens), flip_flop_solve(twin.tokens)
    assert np.array_equal(flipped(answer)[sample.judged], other[sample.judged])


def test_the_solver_by_hand():
    """The memory is what the last write left; before the first write it is 0."""
    answer = flip_flop_solve(encode("w1i0r1w0i1r0"))
    assert "".join(LETTERS[t] for t in answer[0]) == "001111110000"


@pytest.mark.parametrize("p_i", [0.1, 0.8, 0.98])
def test_perfect_solver_scores_one_and_a_blind_one_chance(p_i):
    sample = flip_flop_generate(rng(5), T=64, p_i=p_i, B=400)
    assert flip_flop_error(flip_flop_solve(sample.tokens), sample) == 0.0
    for name in "01":
        blind = np.full_like(sample.tokens, TOKENS[name])
        assert abs(flip_flop_error(blind, sample) - 0.5) < 0.08


def test_error_counts_judged_bits_only():
    """Two reads, one of them wrong; what stands elsewhere does not matter."""
    sample = Sample(encode("w1r1i0r1"), np.array([[0, 0, 0, 1, 0, 0, 0, 1]], bool))
    answer = encode("00010000")
    assert flip_flop_error(answer, sample) == 0.5
    assert flip_flop_error(sample.tokens, sample) == 0.0
    one = Sample(sample.tokens, np.arange(8) == 7)
    assert flip_flop_error(answer, one) == 1.0
    nothing = Sample(sample.tokens, np.zeros_like(sample.judged))
    assert flip_flop_error(answer, nothing) == 0.0


def slow_head(tokens, c, slope):
    """The mean of equation (4), one number at a time."""
    out = []
    for line in tokens.tolist():
        out.append([0.0])
        for j in range(1, len(line) // 2):
            top = weighted = 0.0
            for s in range(j):
                weight = math.exp((c if line[2 * s] == 0 else 0.0) + slope * s)
                top += weight
                weighted += weight if line[2 * s + 1] == 4 else -weight
            out[-1].append(weighted / top)
    return out


@pytest.mark.parametrize(("c", "slope"), [(0.0, 0.0), (3.0, 0.0), (2.0, 0.5), (5.0, 0.9)])
def test_head_equals_the_slow_loop(c, slope):
    tokens, _ = flip_flop_generate(rng(6), T=36, p_i=0.5, B=4)
    answer, mean = flip_flop_head(tokens, c=c, slope=slope)
    np.testing.assert_allclose(mean, slow_head(tokens, c, slope), rtol=0, atol=1e-14)
    assert np.array_equal(answer[:, 1::2] == TOKENS["1"], mean > 0)
    assert np.array_equal(answer[:, 0::2], np.full_like(answer[:, 0::2], TOKENS["0"]))


def test_head_worked_example():
    """w1 i0 i0 r?: weights e^c, 1, 1; with e^c = 6 the mean is (6 - 2) / 8 = 1/2."""
    answer, mean = flip_flop_head(encode("w1i0i0r1"), c=math.log(6.0))
    np.testing.assert_allclose(mean[0], [0.0, 1.0, 5 / 7, 0.5], rtol=0, atol=1e-15)
    assert answer[0, 7] == TOKENS["1"]
    answer, mean = flip_flop_head(encode("w1i0i0r1"), c=math.log(1.5))
    assert answer[0, 7] == TOKENS["0"] and mean[0, 3] < 0


def test_head_finds_the_last_of_two_writes_only_with_a_slope():
    tokens = encode("w1w1w0r0")
    assert flip_flop_head(tokens, c=4.0)[0][0, -1] == TOKENS["1"]
    assert flip_flop_head(tokens, c=4.0, slope=1.0)[0][0, -1] == TOKENS["0"]


def test_reach_without_slope_is_the_exponential_of_c():
    """One write, g opposite bits: right while g < e^c = 7.39, wrong from 8 on."""
    for g in range(1, 12):
        tokens = encode("w1" + "i0" * g + "r1")
        right = flip_flop_head(tokens, c=2.0)[0][0, -1] == TOKENS["1"]
        assert right == (g < math.exp(2.0))


def test_the_empty_batch():
    sample = flip_flop_generate(rng(), T=8, B=0)
    assert sample.tokens.shape == sample.judged.shape == (0, 8)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"T": 7}, core.errors.ParameterError, "T is 7, expected an even number"),
        ({"T": 2}, core.errors.ParameterError, "T is 2, expected an integer 4 <= T tokens"),
        ({"p_i": 1.2}, core.errors.ParameterError, "p_i is 1.2, expected a finite number"),
        ({"p_i": -0.1}, core.errors.ParameterError, "p_i is -0.1"),
        ({"B": -1}, core.errors.ParameterError, "B is -1"),
        ({"rng": np.random.RandomState(0)}, core.errors.DTypeError, "default_rng"),
    ],
)
def test_errors(change, error, says):
    with pytest.raises(error, match=says):
        flip_flop_generate(**({"rng": rng(), "T": 8} | change))


def test_helpers_check_their_tokens():
    sample = flip_flop_generate(rng(), T=8)
    with pytest.raises(core.errors.DTypeError, match="tokens has dtype float64"):
        flip_flop_solve(sample.tokens.astype(float))
    with pytest.raises(core.errors.ParameterError, match="tokens holds values"):
        flip_flop_head(sample.tokens + 5, c=1.0)
    with pytest.raises(core.errors.ParameterError, match="c is nan"):
        flip_flop_head(sample.tokens, c=math.nan)
    with pytest.raises(core.errors.ParameterError, match="slope is inf"):
        flip_flop_head(sample.tokens, c=1.0, slope=math.inf)
    with pytest.raises(core.errors.DTypeError, match="answer"):
        flip_flop_error(sample.tokens > 2, sample)
