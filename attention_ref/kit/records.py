"""What is done: a row owes parts by its kind, and a green record of its checks at today's sources.

``verify`` runs the checks and writes the record; ``status`` only reads, and believes a record only
while the sources it names are still the ones that are there.
"""

import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from datetime import date
from pathlib import Path

import numpy as np

from attention_ref.core.registry import PACKAGE, catalog, get, written
from attention_ref.kit import golden

WITHOUT_BACKWARD = ("policy", "analysis", "theory", "task", "training", "survey")


def files(key, root=None):
    """Where the parts of a row stand: part -> path."""
    root = Path(root) if root is not None else golden.checkout() or PACKAGE.parent
    family, slug = key.split("/")
    return {
        "module": PACKAGE / "methods" / f"{key}.py",
        "tests": root / "tests" / "methods" / family / f"test_{slug}.py",
        "golden": root / "tests" / "golden" / f"{key}.json",
        "record": root / "tests" / "records" / f"{key}.json",
        "tutorial": root / "tutorials" / f"{key}.py",
        "figure": root / "figures" / f"{key}.svg",
        "result": root / "figures" / f"{key}.json",
    }


def sources(key):
    """The key of everything the record speaks of: method, what it reaches, its own tests."""
    from attention_ref.kit.sources import source_key

    where = files(key)
    return {part: source_key(where[part]) for part in ("module", "tests") if where[part].is_file()}


def _json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def record(key):
    """The record of the last green run, or None when there is none for today's sources."""
    found = _json(files(key)["record"])
    return found if found and found.get("sources") == sources(key) else None


def row(key):
    """One line of ``status``: what the row is, what exists of it, whether it is done.

    Parameters
    ----------
    key : str
        ``family/slug``.

    Returns
    -------
    dict
        With the keys that the README lists under ``status --json``.
    """
    entry = catalog()[key]
    line = {
        "key": key, "number": entry["number"], "kind": entry["kind"], "grade": entry["grade"],
        "title": entry["title"], "module": False, "backward": False, "tests": False,
        "conformance": False, "golden": False, "tutorial": False, "figure": False, "claim": None,
        "numba": False, "cuda": False, "verified_by": [], "done": False,
    }  # fmt: skip
    where = files(key)
    if not where["module"].is_file():
        return line
    try:
        spec = get(key)
    except Exception as failure:  # a broken method is a row that is not done
        line["error"] = f"{type(failure).__name__}: {failure}"
        return line
    green = record(key)
    result = _json(where["result"])
    line |= {
        "module": True,
        "backward": spec.backward_function is not None,
        "tests": where["tests"].is_file() and green is not None and green["tests"]["passed"] > 0,
        "conformance": green is not None and green["checks"]["failed"] == 0,
        "golden": where["golden"].is_file() and where["golden"].with_suffix(".npz").is_file(),
        "tutorial": where["tutorial"].is_file(),
        "figure": where["figure"].is_file() and result is not None,
        "claim": result["verdict"] if result else None,
        "numba": spec.numba is not None,
        "cuda": spec.cuda is not None,
        "verified_by": list(spec.verified_by),
    }
    owed = ["module", "tests", "conformance", "golden", "tutorial", "figure", "claim"]
    if entry["kind"] not in (*WITHOUT_BACKWARD, "edit"):
        owed.append("backward")
    line["done"] = all(line[part] for part in owed)
    return line


def status():
    """Every row of the mission, written or not: a list of :func:`row`."""
    return [row(key) for key in catalog()]


# ------------------------------------------------------------------------------ verify


def verify(keys=None, draws=2, progress=None, write=True):
    """Run the checks, the golden comparison and the particular tests of rows, and record them.

    Parameters
    ----------
    keys : list of str, optional
        All written rows by default.
    draws : int
        Example sets for the generic checks.
    progress : callable, optional
        Called with each key when it is finished.
    write : bool
        Write a record for each green row, and remove that of a red one.

    Returns
    -------
    list of dict
        One report a row: ``key, ok, seconds, checks, tests, opted_out, failures``.
    """
    from attention_ref.kit import checks

    reports = []
    for key in keys or written():
        start = time.perf_counter()
        results = checks.run(get(key), draws=draws)
        failures = [f"{r.check} ({r.case}): {r.message}" for r in results if not r.ok]
        opted = {r.check: r.message for r in results if r.opted_out}
        reports.append(
            {
                "key": key,
                "ok": not failures,
                "seconds": time.perf_counter() - start,
                "checks": {
                    "passed": sum(r.ok and not r.opted_out for r in results),
                    "failed": len(failures),
                },
                "opted_out": opted,
                "failures": failures,
            }
        )
        if progress is not None:
            progress(key)
    _run_particular(reports)
    if write and golden.checkout() is not None:
        for report in reports:
            _write(report)
    return reports


def _run_particular(reports):
    """One pytest process for the particular tests of all rows."""
    where = {r["key"]: files(r["key"])["tests"] for r in reports}
    present = [str(p) for p in where.values() if p.is_file()]
    counts = _pytest(present) if present else {}
    for report in reports:
        slug = report["key"].replace("/", "/test_") + ".py"
        report["tests"] = counts.get(slug, {"passed": 0, "failed": 0, "skipped": 0})
        failed = report["tests"].get("failures", [])
        if report["tests"]["passed"] == 0 or failed:
            report["ok"] = False
            report["failures"] += failed or ["no particular test passed"]
        report["tests"].pop("failures", None)


def _pytest(paths):
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
        root = golden.checkout()
        run = subprocess.run(
            [*command, f"--junitxml={xml}", *paths], cwd=root, capture_output=True, text=True
        )
        if not xml.is_file():
            raise RuntimeError("pytest did not run:\n" + run.stdout[-2000:] + run.stderr[-2000:])
        counts = {}
        for case in ElementTree.parse(xml).getroot().iter("testcase"):
            parts = case.get("classname", "").split(".")
            named = [i for i, p in enumerate(parts) if p.startswith("test_")]
            slug = named[-1] if named else len(parts) - 1
            name = "/".join(parts[slug - 1 : slug + 1]) + ".py"
            entry = counts.setdefault(
                name, {"passed": 0, "failed": 0, "skipped": 0, "failures": []}
            )
            bad = case.find("failure") if case.find("failure") is not None else case.find("error")
            if bad is not None:
                entry["failed"] += 1
                entry["failures"].append(f"{case.get('name')}: {bad.get('message', '')[:300]}")
            elif case.find("skipped") is not None:
                entry["skipped"] += 1
            else:
                entry["passed"] += 1
        return counts


def _write(report):
    path = files(report["key"])["record"]
    if not report["ok"]:
        path.unlink(missing_ok=True)
        return
    content = {
        "key": report["key"],
        "sources": sources(report["key"]),
        "checks": report["checks"],
        "opted_out": report["opted_out"],
        "tests": report["tests"],
        "date": date.today().isoformat(),
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "scipy": importlib.metadata.version("scipy"),
        },
    }
    old = _json(path)
    if old is not None and all(
        old.get(k) == content[k] for k in ("sources", "checks", "opted_out", "tests")
    ):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    golden.write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
