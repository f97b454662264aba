"""The benchmark: its rows are complete and honest about errors; speed itself is not a test."""

import numpy as np
import pytest

from attention_ref.kernels import bench

FIELDS = {
    "pattern", "shape", "dtype", "ours_s", "other", "other_s", "ratio", "error_vs_float64",
    "other_error", "threads",
}  # fmt: skip


def test_every_pattern_gives_rows(monkeypatch):
    monkeypatch.setattr(bench, "_torch", lambda: None)  # keeps PyTorch out of this process
    rows = bench.bench_dense(33, 5, 2) + bench.bench_dense(33, 5, 2, True, True)
    rows += bench.bench_scan(9, 5, 2) + bench.bench_scan(9, 5, 2, erase=False)
    rows += bench.bench_row_projection(7, 33)
    assert len(rows) == 6
    for row in rows:
        assert row.keys() == FIELDS
        assert row["ours_s"] > 0 and row["ratio"] == row["other_s"] / row["ours_s"]
        assert row["error_vs_float64"] < 64 * np.finfo(np.float32).eps
        assert row["other_error"] < 64 * np.finfo(np.float32).eps


@pytest.mark.oracle
def test_sparse_patterns_against_pytorch_give_rows(monkeypatch):
    """Others compute the same thing: their errors are as small as ours."""
    pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")
    monkeypatch.setattr(bench, "_flex", lambda *a: None)  # compiles for half a minute
    rows = bench.bench_window(300, 17, 8, 2) + bench.bench_block_sparse(300, 64, 0.3, 8, 2)
    rows += bench.bench_chunked(150, 8, 2) + bench.bench_decode(200, 8, 4, 2)
    assert len(rows) == 4
    for row in rows:
        assert row.keys() == FIELDS
        assert row["error_vs_float64"] < 64 * np.finfo(np.float32).eps
        assert row["other_error"] < 64 * np.finfo(np.float32).eps


def test_growth_and_memory_and_their_picture(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "_torch", lambda: None)
    growth = bench.bench_growth((2048, 2100, 2200), width=4)
    assert [row["who"] for row in growth] == ["ours"] * 12
    assert {row["tokens"] for row in growth} == {2048, 2100, 2200}
    ceiling = bench.bench_ceiling(64, 256, 16, 8)
    assert set(ceiling["gflops"]) == {"numpy product", "dense kernel", "window kernel"}
    assert 1 < ceiling["window"]["walked_for_each_kept"] < 16
    memory = bench.bench_memory(512, 8)
    assert 0 < memory["extra_mb"] < memory["scores_mb"] + 1
    bench.draw(growth, tmp_path / "here.svg")
    assert (tmp_path / "here.svg").read_text().startswith("<?xml")
