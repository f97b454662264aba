"""Coverage-guided fuzzing of the loader of golden files; run by hand, CI does not need it.

    pip install atheris
    python tests/fuzz/fuzz_loader.py -max_total_time=120 -seed=1

Every input is split into a packed file and a manifest and read by ``golden.load``. Whatever is
wrong with them must be one ``GoldenFileError``; anything else stops the run with the input. The
last line counts the runs, those that the loader read through, and those that it refused.
"""

import sys
import tempfile
import time
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["attention_ref.kit.golden", "numpy.lib", "zipfile"]):
    from attention_ref.kit import golden

from attention_ref.core.errors import GoldenFileError

KEY = "normalizers/sparsemax"
MEMORY = Path("/dev/shm")  # no disk between the fuzzer and the loader, where there is one
FOLDER = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
COUNT = {"runs": 0, "read": 0, "refused": 0}
START = time.monotonic()


def small_seeds():
    """A right pair of files with two tiny arrays, and the halves of the repository's own."""
    import io
    import json

    import numpy as np

    arrays = {"plain/in/q": np.zeros((2, 2)), "plain/out/out": np.ones(3, np.float32)}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    stored = io.BytesIO()
    np.savez(stored, **arrays)
    manifest = {
        "format": 1, "key": KEY, "cases": {"plain": {"options": {}}}, "routes": {"names": []},
        "bounds": {}, "arrays": {n: golden._describe(a) for n, a in arrays.items()},
    }  # fmt: skip
    text = json.dumps(manifest).encode()
    return [len(p).to_bytes(4, "little") + p + text for p in (buffer.getvalue(), stored.getvalue())]


def one(data):
    """Read one input as a pair of files."""
    size = int.from_bytes(data[:4], "little") % (len(data) + 1)
    packed, text = golden.paths(KEY, FOLDER)
    packed.write_bytes(data[4 : 4 + size])
    text.write_bytes(data[4 + size :])
    COUNT["runs"] += 1
    try:
        manifest, arrays = golden.load(KEY, FOLDER)
        assert set(manifest["arrays"]) == set(arrays)
        COUNT["read"] += 1
    except GoldenFileError:
        COUNT["refused"] += 1
    if COUNT["runs"] % 10_000 == 0:
        report()


def report():
    """One line with the counts so far."""
    print(f"{COUNT} in {time.monotonic() - START:.0f} s", flush=True)


def main():
    """Write the seeds and hand over to the fuzzer."""
    golden.paths(KEY, FOLDER)[0].parent.mkdir(parents=True)
    corpus = FOLDER / "corpus"
    corpus.mkdir()
    for i, seed in enumerate(small_seeds()):
        (corpus / str(i)).write_bytes(seed)
        one(seed)
    assert COUNT["read"] == 2, COUNT  # the seeds are right, or nothing is fuzzed
    limits = ["-max_len=4000", "-timeout=10", "-rss_limit_mb=2000"]
    atheris.Setup([*sys.argv, str(corpus), *limits], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
