"""Run the tutorials whose results are stale: ``python -m attention_ref.kit.tutorials [KEY...]``.

A result rests on code: its own (the tutorial and the method file) and all that these reach.

fresh
    nothing of it changed since the figure was drawn
recheck
    something elsewhere changed: the numbers must be measured again
changed
    the tutorial or its method changed: the figure must be drawn again
missing
    there is no figure yet, or not all three of its files

A rerun whose numbers stay within the recorded tolerance of the old ones keeps picture and text;
only its keys are stamped anew, so figures do not churn.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from attention_ref.core.registry import PACKAGE, nearest
from attention_ref.kit.sources import source_key
from attention_ref.kit.tutorial import encode, own_key, write_files

ROOT = PACKAGE.parent
PARTS = (".svg", ".txt", ".json")
TIMEOUT = 600
"""Seconds after which a tutorial is given up."""


def keys(root=ROOT):
    """Keys of all tutorials, sorted."""
    files = (Path(root) / "tutorials").glob("*/*.py")
    return sorted(f"{f.parent.name}/{f.stem}" for f in files if not f.stem.startswith("_"))


def stale(key, root=ROOT):
    """How far a tutorial's result can be trusted.

    Parameters
    ----------
    key : str
        ``family/slug``.
    root : Path
        The repository.

    Returns
    -------
    {"fresh", "recheck", "missing", "changed"}
    """
    figure = Path(root) / "figures" / key
    try:
        record = json.loads(figure.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "missing"
    if not all(figure.with_suffix(part).exists() for part in PARTS):
        return "missing"
    if record.get("own") != own_key(root, key):
        return "changed"
    if record.get("sources") != source_key(Path(root) / "tutorials" / f"{key}.py", root):
        return "recheck"
    return "fresh"


def same(old, new, tolerance):
    """Whether numbers, lists or dicts of numbers agree within a relative tolerance.

    Examples
    --------
    >>> same([1.0, {"a": 2.0}], [1.01, {"a": 2.0}], 0.02)
    True
    >>> same([1.0, 2.0], [1.0, 2.0, 3.0], 0.02)
    False
    """
    if isinstance(old, dict):
        fits = isinstance(new, dict) and old.keys() == new.keys()
        return fits and all(same(old[k], new[k], tolerance) for k in old)
    if isinstance(old, list):
        fits = isinstance(new, list) and len(old) == len(new)
        return fits and all(same(a, b, tolerance) for a, b in zip(old, new, strict=True))
    return old == new or abs(new - old) <= tolerance * max(abs(old), abs(new))


def rerun(key, root=ROOT):
    """Run one tutorial in a process of its own and take over its result.

    Parameters
    ----------
    key : str
        ``family/slug``.

    Returns
    -------
    tuple of str
        ("drawn" | "stamped" | "failed", what there is to say).
    """
    root, was = Path(root), stale(key, root)
    with tempfile.TemporaryDirectory() as folder:
        path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        # Small matrices: threads of the linear algebra library only wait for one another.
        environment = {"OPENBLAS_NUM_THREADS": "1"} | os.environ | {
            "ATTENTION_REF_FIGURES": folder, "ATTENTION_REF_QUICK": "", "PYTHONPATH": path,
        }  # fmt: skip
        command = [sys.executable, str(root / "tutorials" / f"{key}.py")]
        try:
            done = subprocess.run(
                command, env=environment, cwd=root, capture_output=True, text=True, timeout=TIMEOUT
            )
        except subprocess.TimeoutExpired:
            return "failed", f"not done after {TIMEOUT} s"
        fresh = {part: (Path(folder) / key).with_suffix(part) for part in PARTS}
        if done.returncode or not all(file.exists() for file in fresh.values()):
            lines = (done.stderr or done.stdout).strip().splitlines() or ["it wrote no figure"]
            return "failed", lines[-1]
        contents = {part: file.read_bytes() for part, file in fresh.items()}
    new, target = json.loads(contents[".json"]), root / "figures" / key
    if was in ("recheck", "fresh"):
        old = json.loads(target.with_suffix(".json").read_text(encoding="utf-8"))
        if old["verdict"] == new["verdict"] and same(old["ours"], new["ours"], old["tolerance"]):
            stamped = old | {"sources": new["sources"], "own": new["own"]}
            write_files({target.with_suffix(".json"): encode(stamped)})
            return "stamped", f"{new['seconds']:.0f} s, the numbers hold"
    write_files({target.with_suffix(part): content for part, content in contents.items()})
    return "drawn", f"{new['seconds']:.0f} s, {new['verdict']}"


def main(arguments=None):
    """The command line; the exit code is 0, 1 when a tutorial failed, 2 for an unknown key."""
    parser = argparse.ArgumentParser(
        prog="python -m attention_ref.kit.tutorials",
        description="Run the tutorials whose results are stale.",
    )
    parser.add_argument("keys", nargs="*", metavar="KEY", help="e.g. scores/dot_product")
    parser.add_argument("--all", action="store_true", help="run them even where nothing changed")
    options = parser.parse_args(arguments)
    known = keys()
    for key in options.keys:
        if key not in known:
            near = " or ".join(nearest(key, known))
            hint = f"did you mean {near}?" if near else f"there are {', '.join(known)}"
            print(f"key {key!r} has no tutorial; hint: {hint}", file=sys.stderr)
            return 2
    failed = False
    chosen = options.keys or known
    for number, key in enumerate(chosen, 1):
        state = stale(key)
        result, says = "fresh", ""
        if state != "fresh" or options.all:
            print(f"[{number}/{len(chosen)}] {key} ({state}) runs ...", file=sys.stderr, flush=True)
            result, says = rerun(key)
        failed |= result == "failed"
        print(f"{key:40} {result:8} {says}".rstrip(), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
