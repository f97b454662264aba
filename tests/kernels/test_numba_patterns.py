"""Windows, packed sequences and block tables: the dense kernel over what a pattern keeps.

Truth is the full matrix under a mask that is made here one pair at a time.
"""

import numpy as np
import pytest

from attention_ref.core.errors import DTypeError, ParameterError, ShapeError
from attention_ref.kernels import plan
from attention_ref.kernels.numba import block_sparse, dense, segments, threads, window
from tests.kernels import formulas
from tests.kernels.test_numba_dense import BOUND, draw

SIZES = [(2, 4, 2, 33, 70, 5, 9), (1, 2, 1, 301, 260, 4, 3), (1, 1, 1, 7, 300, 3, 2)]


def check(module, given, mask, sizes, dtype, mask_too=False, bias=None, **options):
    """Outputs, lse and gradients of a pattern against the full matrix under its mask."""
    x, more = draw(sizes, dtype, mask=mask_too, bias=bias)
    dlse = np.random.default_rng(3).standard_normal(x["dout"].shape[:-1]).astype(dtype)
    out, cache = module.forward(x["q"], x["k"], x["v"], **given, **options, **more)
    gradients = module.backward(x["dout"], cache, dlse)
    more["mask"] = mask & more.get("mask", np.True_)
    true_out, true_lse, true = formulas.dense(**x, dlse=dlse, **more)
    alive = np.isfinite(true_lse)
    assert out.dtype == dtype and np.array_equal(alive, np.isfinite(cache.lse))
    assert formulas.distance(out, true_out, dtype) < BOUND
    assert formulas.distance(cache.lse[alive], true_lse[alive], dtype) < BOUND
    assert gradients.keys() == true.keys()
    for name, truth in true.items():
        assert gradients[name].dtype == dtype
        assert formulas.distance(gradients[name], truth, dtype) < BOUND, name


def near(sizes, left=None, right=None, dilation=1, causal=False, align="lower_right"):
    """The mask of a window, one pair at a time."""
    queries, keys = sizes[3], sizes[4]
    mask = np.zeros((queries, keys), bool)
    for t in range(queries):
        place = t + (keys - queries if align == "lower_right" else 0)
        for s in range(keys):
            step = s - place
            mask[t, s] = (
                (left is None or step >= -left) and (right is None or step <= right)
                and step % dilation == 0 and (step <= 0 or not causal)
            )  # fmt: skip
    return mask


WINDOWS = {
    "both": {"left": 20, "right": 11},
    "causal": {"left": 25, "causal": True},
    "upper": {"left": 3, "right": 0, "align": "upper_left"},
    "own": {"left": 0, "right": 0},
    "dilated": {"left": 40, "right": 21, "dilation": 3},
    "dilated-causal": {"left": 50, "dilation": 4, "causal": True, "align": "upper_left"},
    "one-sided": {"right": 5},
}


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("case", WINDOWS)
def test_windows(case, sizes, dtype):
    given = WINDOWS[case]
    check(window, given, near(sizes, **given), sizes, dtype)


@pytest.mark.parametrize("case", ["both", "dilated"])
@pytest.mark.parametrize("bias", [(0, 0, 0, 0), (1, 0, 1, 0)])
def test_windows_with_mask_bias_and_softcap(case, bias):
    given, sizes = WINDOWS[case], SIZES[0]
    check(window, given, near(sizes, **given), sizes, np.float64, mask_too=True, bias=bias)


PACKED = [((5, 130, 1, 60), (40, 150, 3, 9)), ((0, 100, 20), (7, 0, 130)), ((4,), (9,))]


@pytest.mark.parametrize("lengths", PACKED, ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"left": 6, "right": 2},
                                     {"causal": True, "align": "upper_left"}], ids=str)  # fmt: skip
def test_packed_sequences(lengths, options):
    queries, keys = map(sum, lengths)
    mask, t, s = np.zeros((queries, keys), bool), 0, 0
    for a, b in zip(*lengths, strict=True):
        mask[t : t + a, s : s + b] = near((1, 1, 1, a, b), **options)
        t, s = t + a, s + b
    given = dict(zip(("lengths_q", "lengths_k"), lengths, strict=True))
    check(segments, given | options, mask, (2, 4, 2, queries, keys, 5, 3), np.float64)


BLOCKS = [16, 64, 128, 150, 256]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("lead", [(), (4,), (2, 1), (2, 4)], ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": True}], ids=str)
def test_tables_of_blocks(block, lead, options):
    sizes = (2, 4, 2, 301, 260, 5, 3)
    queries, keys = sizes[3:5]
    rng = np.random.default_rng(block)
    shape = -(-queries // block), -(-keys // block)
    table = rng.random((*lead, *shape)) < 0.5
    mask = np.repeat(np.repeat(table, block, axis=-2), block, axis=-1)[..., :queries, :keys]
    mask = mask & near(sizes, **options)
    check(block_sparse, {"blocks": table, "block": block} | options, mask, sizes, np.float64)


def test_tables_in_float32_with_an_inner_mask():
    sizes, table = (1, 2, 1, 200, 170, 7, 6), np.array([[True, False], [True, True]])
    mask = np.repeat(np.repeat(table, 128, axis=0), 128, axis=1)[:200, :170]
    given = {"blocks": table, "block": 128}
    check(block_sparse, given, mask, sizes, np.float32, mask_too=True)


def test_work_grows_with_what_is_kept():
    """Keys walked over by all blocks of queries, counted in the plan that the kernel follows."""

    def walked(seen, tokens):
        one, other = plan.sides(seen, tokens, tokens, 128)
        return int(np.sum(one.last - one.first)), int(np.sum(other.last - other.first))

    for tokens in (1024, 4096, 16384):
        blocks = tokens // 128
        seen = plan.interval(tokens, tokens, causal=True, left=255)
        assert max(walked(seen, tokens)) <= blocks * (128 + 255)
        table = np.eye(blocks, dtype=bool)
        table[:, 0] = True
        seen = plan.restrict(plan.interval(tokens, tokens), table, 128, tokens, tokens)
        assert walked(seen, tokens) == ((2 * blocks - 1) * 128,) * 2
        lengths = [tokens // 8] * 8
        assert max(walked(plan.packed(lengths, lengths), tokens)) <= blocks * tokens // 8


def test_nothing_outside_of_a_window_is_read():
    x, options = draw((1, 2, 1, 300, 300, 5, 3), np.float64)
    clean, _ = window.forward(x["q"], x["k"], x["v"], left=9, right=0, **options)
    x["k"][0, 0, 150, 1] = np.nan
    x["v"][0, 0, 20, 0] = np.inf
    out, cache = window.forward(x["q"], x["k"], x["v"], left=9, right=0, **options)
    bad = np.isnan(out).all(axis=-1)[0, 0]
    assert np.flatnonzero(bad).tolist() == [*range(20, 30), *range(150, 160)]
    assert np.array_equal(out[:, :, ~bad], clean[:, :, ~bad])
    assert all(np.isfinite(g).all() for g in window.backward(x["dout"], cache).values())


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_one_thread_and_two_give_the_same_bits(dtype):
    x, options = draw((2, 4, 2, 700, 700, 9, 7), dtype)
    results = []
    for number in (1, 2):
        with threads.use(number):
            out, cache = window.forward(x["q"], x["k"], x["v"], left=90, dilation=2, **options)
            results.append([out, *window.backward(x["dout"], cache).values()])
    for one, two in zip(*results, strict=True):
        assert np.array_equal(one, two)


def test_a_wide_window_is_dense_attention_bit_by_bit():
    x, options = draw(SIZES[0], np.float64)
    for causal in (False, True):
        wide, _ = window.forward(x["q"], x["k"], x["v"], left=500, causal=causal, **options)
        assert np.array_equal(
            wide, dense.forward(x["q"], x["k"], x["v"], causal=causal, **options)[0]
        )


def test_bad_arguments():
    x, _ = draw((1, 2, 1, 20, 30, 3, 2), np.float64)
    q, k, v = x["q"], x["k"], x["v"]
    table = np.ones((2, 3), bool)
    for call, error, message in [
        (lambda: window.forward(q, k, v, left=-1), ParameterError, "left is -1"),
        (lambda: window.forward(q, k, v, dilation=0), ParameterError, "dilation is 0"),
        (lambda: segments.forward(q, k, v, [20], [31]), ShapeError, "lengths_k adds up to 31"),
        (lambda: segments.forward(q, k, v, [20], [10, 20]), ShapeError, "1 sequences"),
        (lambda: block_sparse.forward(q, k, v, table, 16), ShapeError, "expected .*2, 2"),
        (lambda: block_sparse.forward(q, k, v, table * 1.0, 10), DTypeError, "blocks"),
        (lambda: block_sparse.forward(q, k, v, table, 0), ParameterError, "block is 0"),
        (lambda: block_sparse.forward(q, k, v, np.ones((3, 1, 2, 3), bool), 10), ShapeError,
         "leading axes"),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            call()
    back = plan.Seen(np.array([[3, 0]]), np.array([[4, 4]]), None, 0)
    with pytest.raises(ParameterError, match="must not decrease"):
        dense.forward(q[:, :, :2], k, v, seen=back)
