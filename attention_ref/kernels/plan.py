"""Who sees whom, as runs: what lets a kernel skip the pairs that a pattern leaves out.

Two things together describe a pattern. Each query sees an interval of keys, ``low <= s < high``
(causal, windows, packed sequences, padding); and a table of blocks says which pairs of a query
block and a key block exist at all. From both follow, for every block of queries that a kernel
works on at once, the runs of keys that it must walk over, and for every block of keys the runs of
queries.
The work of a kernel is then the sum of the runs: it grows with what is kept.
"""

from typing import NamedTuple

import numpy as np

from attention_ref.core import check
from attention_ref.core.errors import ParameterError, ShapeError


class Seen(NamedTuple):
    """A pattern; both intervals never decrease with t, so that a key is seen by one run of them."""

    low: np.ndarray  # (N or 1, T) int64: query t sees no key before it
    high: np.ndarray  # (N or 1, T) int64: nor from here on
    blocks: np.ndarray | None  # (N or 1, H or 1, T / block, S / block), True = exists
    block: int  # tokens a block


class Side(NamedTuple):
    """The blocks of one side, and the runs of the other side that each walks over."""

    start: np.ndarray  # (items,) first token of the block
    stop: np.ndarray  # (items,) one behind its last
    at: np.ndarray  # (patterns * items + 1,) where its runs begin in the two lists
    first: np.ndarray  # (runs,)
    last: np.ndarray  # (runs,) one behind


def interval(queries, keys, *, causal=False, align="lower_right", left=None, right=None):
    """Intervals of causality and of a window.

    Parameters
    ----------
    queries, keys : int
        T and S.
    causal : bool
        Hide the keys behind each query.
    align : {"lower_right", "upper_left"}
        Where query t stands among the keys: at t + S - T, or at t.
    left, right : int, optional
        How far a query sees to either side, its own place not counted; None is without bound.

    Returns
    -------
    Seen
    """
    place = np.arange(queries) + (keys - queries if align == "lower_right" else 0)
    return around(place, keys, causal=causal, left=left, right=right)


def around(place, keys, *, causal=False, left=None, right=None):
    """Intervals of queries that stand at given places among the keys.

    Parameters
    ----------
    place : int ndarray, shape (T,)
        Never decreasing; may lie outside of the keys.
    keys, causal, left, right
        As in :func:`interval`.

    Returns
    -------
    Seen
    """
    low = np.zeros_like(place) if left is None else place - left
    high = np.full_like(place, keys) if right is None else place + right + 1
    if causal:
        high = np.minimum(high, place + 1)
    low, high = (np.clip(x, 0, keys).astype(np.int64)[None] for x in (low, high))
    return Seen(low, high, None, 0)


def packed(lengths_q, lengths_k, *, causal=False, align="lower_right", left=None, right=None):
    """Intervals of sequences packed one behind the other, each with its own causality and window.

    Parameters
    ----------
    lengths_q, lengths_k : sequence of int
        Queries and keys of every sequence; a sequence may have none of either.
    causal, align, left, right
        As in :func:`interval`, counted within each sequence.

    Returns
    -------
    Seen
    """
    if len(lengths_q) != len(lengths_k):
        raise ShapeError(
            f"lengths_q has {len(lengths_q)} sequences and lengths_k {len(lengths_k)}, "
            "expected as many"
        )
    low, high, behind = [], [], 0
    for i, (queries, keys) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        for name, n in (("lengths_q", queries), ("lengths_k", keys)):
            check.count(f"{name}[{i}]", n, low=0, unit="tokens")
        part = interval(queries, keys, causal=causal, align=align, left=left, right=right)
        low.append(part.low + behind)
        high.append(part.high + behind)
        behind += keys
    empty = [np.zeros((1, 0), np.int64)]
    return Seen(np.concatenate(low or empty, -1), np.concatenate(high or empty, -1), None, 0)


def restrict(seen, blocks, block, queries, keys):
    """Add a table of blocks to a pattern.

    Parameters
    ----------
    seen : Seen
        Intervals.
    blocks : bool ndarray, shape (N or 1, H or 1, ceil(T / block), ceil(S / block))
        True = the pair of blocks exists.
    block : int
        Tokens a block.
    queries, keys : int
        T and S.

    Returns
    -------
    Seen
    """
    check.boolean("blocks", blocks)
    check.count("block", block, low=1, unit="tokens")
    want = (-(-queries // block), -(-keys // block))
    if blocks.ndim < 2 or blocks.shape[-2:] != want:
        raise ShapeError(
            f"blocks has shape {blocks.shape}, expected (..., {want[0]}, {want[1]}): one entry a "
            f"pair of blocks of {block} tokens"
        )
    if blocks.ndim > 4:
        raise ShapeError(f"blocks has shape {blocks.shape}, expected at most 4 axes")
    blocks = blocks.reshape((1,) * (4 - blocks.ndim) + blocks.shape)
    return seen._replace(blocks=blocks, block=int(block))


def sides(seen, queries, keys, lanes):
    """Blocks of queries with their runs of keys, and blocks of keys with their runs of queries.

    Parameters
    ----------
    seen : Seen
        The pattern.
    queries, keys : int
        T and S.
    lanes : int
        Most tokens a kernel works on at once.

    Returns
    -------
    by_query, by_key : Side
        For every pattern, one behind the other: (n, h) of the blocks, or n of the intervals.
    """
    low, high = seen.low, seen.high
    if np.any(low[:, 1:] < low[:, :-1]) or np.any(high[:, 1:] < high[:, :-1]):
        raise ParameterError("the intervals of a pattern must not decrease from query to query")
    by_query = _side(seen, queries, keys, lanes, seen.blocks, _first_last(low, high))
    turned = None if seen.blocks is None else np.swapaxes(seen.blocks, -1, -2)
    return by_query, _side(seen, keys, queries, lanes, turned, _seen_by(low, high))


def _first_last(low, high):
    """The keys that a block of queries may see lie between these two."""
    return lambda start, stop: (low[:, start], high[:, stop - 1])


def _seen_by(low, high):
    """The queries that may see a block of keys lie between these two."""

    def between(start, stop):
        first = [np.searchsorted(row, start, side="right") for row in high]
        last = [np.searchsorted(row, stop, side="left") for row in low]
        return np.stack(first), np.stack(last)

    return between


def _side(seen, length, other, lanes, blocks, between):
    """One side: its blocks of at most ``lanes`` tokens, and the runs of each."""
    size = seen.block if blocks is not None else max(length, 1)
    whole = np.arange(0, length, size)
    start = np.concatenate([np.arange(a, min(a + size, length), lanes) for a in whole] or [whole])
    stop = np.minimum(start + lanes, np.minimum((start // size + 1) * size, length))
    start, stop = start.astype(np.int64), stop.astype(np.int64)
    first, last = between(start, stop) if length else (start[None], stop[None])
    if blocks is None:
        first, last = first.ravel(), np.maximum(first, last).ravel()
        return Side(start, stop, np.arange(first.size + 1), first, last)
    batch = np.broadcast_shapes(blocks.shape[:1], first.shape[:1])[0]
    table = np.broadcast_to(blocks, (batch, *blocks.shape[1:]))[:, :, start // size]
    edge = np.zeros((*table.shape[:-1], 1), np.int8)
    change = np.diff(table.astype(np.int8), axis=-1, prepend=edge, append=edge)
    n, h, item, begin = np.nonzero(change == 1)
    end = np.nonzero(change == -1)[-1]
    first, last = (np.broadcast_to(x, (batch, start.size))[n, item] for x in (first, last))
    run_first = np.maximum(begin * size, first)
    run_last = np.maximum(run_first, np.minimum(np.minimum(end * size, other), last))
    owner = (n * table.shape[1] + h) * start.size + item
    at = np.searchsorted(owner, np.arange(batch * table.shape[1] * start.size + 1))
    return Side(start, stop, at, run_first, run_last)


def fits(seen, batch, heads):
    """Refuse a table of blocks for another number of sequences or heads."""
    if seen.blocks is not None:
        n, h = seen.blocks.shape[:2]
        if n not in (1, batch) or h not in (1, heads):
            raise ShapeError(
                f"blocks has leading axes ({n}, {h}), expected ({batch} or 1, {heads} or 1): "
                "sequences (all leading axes as one) and query heads"
            )


def steps(seen):
    """How far apart the patterns of consecutive n and h lie; and the intervals of n."""
    over_n = seen.low.shape[0] > 1 or (seen.blocks is not None and seen.blocks.shape[0] > 1)
    heads = 1 if seen.blocks is None else seen.blocks.shape[1]
    return (heads if over_n else 0, 1 if heads > 1 else 0, 1 if seen.low.shape[0] > 1 else 0)
