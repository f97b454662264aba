"""Every tutorial runs in quick mode, and no figure is older than its row.

By default only the tutorials that changed since their figure was drawn, and a tenth of the others
that goes round with the day of the year; all of them under ``--long``.
"""

import os
import subprocess
import sys
from datetime import date

import pytest

from attention_ref.kit import tutorials
from attention_ref.kit.student import strip

KEYS = tutorials.keys()


def due(key):
    """Whether today is a tutorial's turn."""
    today = date.today().timetuple().tm_yday
    return KEYS.index(key) % 10 == today % 10 or tutorials.stale(key) in ("missing", "changed")


def pytest_generate_tests(metafunc):
    if "quick_key" in metafunc.fixturenames:
        every = metafunc.config.getoption("--long", default=False)
        metafunc.parametrize("quick_key", [key for key in KEYS if every or due(key)] or KEYS[:1])


def test_it_runs_in_quick_mode(quick_key, tmp_path):
    environment = os.environ | {
        "ATTENTION_REF_QUICK": "1", "ATTENTION_REF_FIGURES": str(tmp_path), "MPLBACKEND": "Agg",
        "NO_COLOR": "1", "PYTHONPATH": str(tutorials.ROOT),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", f"tutorials/{quick_key}.py"],
        cwd=tutorials.ROOT, env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout, "it printed nothing"
    assert not list(tmp_path.iterdir()), "quick mode wrote a result"


def test_the_students_copy_runs_too(quick_key, tmp_path):
    """With every answer missing: no later cell may need what a solution defined."""
    path = tmp_path / "tutorials" / f"{quick_key}.py"
    path.parent.mkdir(parents=True)
    teacher = (tutorials.ROOT / "tutorials" / f"{quick_key}.py").read_text(encoding="utf-8")
    path.write_text(strip(teacher), encoding="utf-8")
    environment = os.environ | {
        "ATTENTION_REF_QUICK": "1", "MPLBACKEND": "Agg", "NO_COLOR": "1",
        "PYTHONPATH": str(tutorials.ROOT),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path, env=environment, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "waits for you" in done.stdout


@pytest.mark.parametrize("key", KEYS)
def test_its_figure_is_there_and_of_this_row(key):
    state = tutorials.stale(key)
    assert state in ("fresh", "recheck"), (
        f"figures/{key} is {state}; run python -m attention_ref.kit.tutorials {key}"
    )
