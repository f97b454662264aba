"""The benchmark: its rows are complete and honest about errors; speed itself is not a test."""

import numpy as np

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
    assert len(rows) == 5
    for row in rows:
        assert row.keys() == FIELDS
        assert row["ours_s"] > 0 and row["ratio"] == row["other_s"] / row["ours_s"]
        assert row["error_vs_float64"] < 64 * np.finfo(np.float32).eps
        assert row["other_error"] < 64 * np.finfo(np.float32).eps
