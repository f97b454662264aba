"""``status`` believes a record only while its sources are today's; ``verify`` writes only green."""

import dataclasses
import json

import pytest

import attention_ref
from attention_ref.kit import records

KEY = "scores/dot_product"


@pytest.fixture
def moved(tmp_path, monkeypatch):
    """The record of one row in a folder of its own."""
    where = records.files(KEY) | {"record": tmp_path / "records" / f"{KEY}.json"}
    monkeypatch.setattr(records, "files", lambda key, root=None: where)
    return where


def green(**changes):
    report = {"key": KEY, "ok": True, "checks": {"passed": 9, "failed": 0}, "opted_out": {},
              "tests": {"passed": 3, "failed": 0, "skipped": 0}}  # fmt: skip
    return report | changes


def test_no_record_is_not_done(moved):
    line = records.row(KEY)
    assert line["module"] and not line["conformance"] and not line["tests"] and not line["done"]


def test_a_green_record_counts(moved):
    records._write(green())
    line = records.row(KEY)
    assert line["conformance"] and line["tests"]


def test_a_record_of_other_sources_does_not_count(moved):
    records._write(green())
    content = json.loads(moved["record"].read_text())
    content["sources"]["module"] = "0" * 16
    moved["record"].write_text(json.dumps(content))
    line = records.row(KEY)
    assert not line["conformance"] and not line["tests"] and not line["done"]


def test_a_red_run_removes_the_record(moved):
    records._write(green())
    records._write(green(ok=False))
    assert not moved["record"].exists()


def test_the_same_result_is_not_written_again(moved):
    records._write(green())
    before = moved["record"].stat().st_mtime_ns
    records._write(green())
    assert moved["record"].stat().st_mtime_ns == before


def test_a_damaged_record_is_no_record(moved):
    moved["record"].parent.mkdir(parents=True)
    moved["record"].write_text("{")
    assert records.record(KEY) is None


def test_verify_reports_a_broken_method(moved, monkeypatch):
    spec = attention_ref.get(KEY)

    def backward(dout, cache):
        g = spec.backward(dout, cache)
        return g | {"k": -g["k"]}

    broken = dataclasses.replace(spec, backward=backward)
    monkeypatch.setattr(records, "get", lambda key: broken)
    monkeypatch.setattr(records, "_run_particular", lambda reports: [
        r.update(tests={"passed": 1, "failed": 0, "skipped": 0}) for r in reports
    ])  # fmt: skip
    (report,) = records.verify([KEY], draws=1)
    assert not report["ok"] and any("dk" in f for f in report["failures"])
    assert not moved["record"].exists()


def test_particular_tests_are_counted_by_file(tmp_path):
    for name, body in {"test_a.py": "assert True", "test_b.py": "assert False"}.items():
        folder = tmp_path / "family"
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(f"def test_one():\n    {body}\n")
    counts = records._pytest([str(tmp_path / "family" / n) for n in ("test_a.py", "test_b.py")])
    found = {k.split("/")[-1]: v for k, v in counts.items()}
    assert found["test_a.py"]["passed"] == 1 and found["test_b.py"]["failed"] == 1
    assert found["test_b.py"]["failures"]


def test_every_row_of_the_mission_has_a_line_with_the_same_keys():
    lines = records.status()
    assert len(lines) == 331 and len({line["key"] for line in lines}) == 331
    assert all({"key", "kind", "done", "claim", "verified_by"} <= set(line) for line in lines)
