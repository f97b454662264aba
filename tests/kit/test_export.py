"""Exported vectors: read back by plain means in three formats, and by a C program."""

import hashlib
import json
import shutil
import subprocess

import numpy as np
import pytest

import attention_ref
from attention_ref.core.errors import GoldenFileError, ParameterError
from attention_ref.kit import export, golden, lowp
from attention_ref.kit.vectors import cases

KEY = "scores/dot_product"
PROGRAM = golden.checkout() / "docs" / "examples" / "check_raw.c"
ARRAY_TYPES = {"float64": "<f8", "float32": "<f4", "float16": "<f2", "bfloat16": "<u2",
               "bool": "?", "int64": "<i8"}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The row in all formats, each in a folder of its name."""
    root = tmp_path_factory.mktemp("vectors")
    for form in export.FORMATS:
        export.export(KEY, root / form, form)
    return root


def manifest(folder):
    return json.loads((folder / "npz" / f"{KEY}.json").read_text())


def read_raw(folder):
    root = folder / "raw" / KEY
    found = {}
    for name, entry in json.loads((root / "manifest.json").read_text())["arrays"].items():
        data = (root / entry["file"]).read_bytes()
        found[name] = np.frombuffer(data, ARRAY_TYPES[entry["dtype"]]).reshape(entry["shape"])
    return found


def read_safetensors(folder):
    data = (folder / "safetensors" / f"{KEY}.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    assert json.loads(header.pop("__metadata__")["manifest"])["key"] == KEY
    names = {short: name for name, short in export.SAFE.items()}
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        kind = ARRAY_TYPES[names[entry["dtype"]]]
        assert (8 + length + begin) % np.dtype(kind).itemsize == 0
        found[name] = np.frombuffer(body[begin:end], kind).reshape(entry["shape"])
    return found


def test_three_formats_hold_the_same_numbers(folder):
    with np.load(folder / "npz" / f"{KEY}.npz", allow_pickle=False) as archive:
        packed = dict(archive)
    for other in (read_raw(folder), read_safetensors(folder)):
        assert set(other) == set(packed)
        assert all(np.array_equal(other[n], a, equal_nan=a.dtype.kind == "f")
                   for n, a in packed.items())  # fmt: skip
    listed = manifest(folder)["arrays"]
    assert set(listed) == set(packed)
    for name, a in packed.items():
        assert listed[name]["sha256"] == hashlib.sha256(a.tobytes()).hexdigest()
        assert listed[name]["shape"] == list(a.shape)


def test_what_it_says_is_true(folder):
    """From the file alone: the reference on the inputs is within the tolerance, for every dtype."""
    with np.load(folder / "npz" / f"{KEY}.npz", allow_pickle=False) as archive:
        arrays = {n: lowp.from_bits(a) if a.dtype == np.uint16 else a for n, a in archive.items()}
    spec, about = attention_ref.get(KEY), manifest(folder)
    special = {"large", "tiny", "huge", "packed", "empty-row", "order", "odd-17"}
    assert special <= set(about["cases"])
    assert about["agreed"]["names"] and about["conventions"]["mask"]
    seen = set()
    for case, entry in about["cases"].items():
        masks = {n.split("/")[2]: a for n, a in arrays.items() if n.startswith(f"{case}/in/")}
        for dtype, tolerance in entry["tolerance"].items():
            head = f"{case}/{dtype}/"
            part = {n[len(head) :]: a for n, a in arrays.items() if n.startswith(head)}
            given = {n[3:]: a.astype(float) for n, a in part.items() if n.startswith("in/")}
            out, cache = spec.forward(**given, **masks, **entry["options"])
            found = {"out": out} | {
                "d" + n: g for n, g in spec.backward(part["dout/out"].astype(float), cache).items()
            }
            for name, a in found.items():
                want = part["out/out" if name == "out" else f"grad/{name[1:]}"].astype(float)
                assert np.max(np.abs(a - want)) <= tolerance[name]["bound"], (case, dtype, name)
                assert 0 <= tolerance[name]["plain"] <= tolerance[name]["bound"]
                seen.add((dtype, name))
            full = np.isfinite(cache.lse)
            assert np.array_equal(full, np.isfinite(part["lse"]))
            assert np.allclose(part["lse"][full], cache.lse[full], rtol=1e-6, atol=1e-6)
    assert seen == {(d, n) for d in lowp.EPS for n in ("out", "dq", "dk", "dv", "dbias")}


def test_two_exports_are_equal_byte_by_byte(folder, tmp_path):
    for form in ("npz", "safetensors"):
        for path in export.export(KEY, tmp_path, form):
            assert path.read_bytes() == (folder / form / "scores" / path.name).read_bytes()


OTHERS = ("recurrent/delta_rule", "cache/streaming_sinks", "tasks/flip_flop",
          "training/gradient_regularization")  # fmt: skip


@pytest.mark.parametrize("key", OTHERS)
def test_rows_of_other_kinds(key, tmp_path):
    export.export(key, tmp_path, "raw", ("float64",))
    about = json.loads((tmp_path / key / "manifest.json").read_text())
    assert set(about["cases"]) == {c.name for c in cases(key, dtypes=("float64",))}
    assert all((tmp_path / key / a["file"]).is_file() for a in about["arrays"].values())


def test_misuse_and_a_file_that_no_longer_holds(tmp_path, monkeypatch):
    for bad in ({"form": "hdf5"}, {"dtypes": ("float8",)}, {"key": "scores/dot_produkt"}):
        with pytest.raises(ParameterError):
            export.export(**{"key": KEY, "out": tmp_path} | bad)

    def other(spec, case):
        raise golden.CheckFailure("other numbers")

    monkeypatch.setattr(golden, "compare", other)
    with pytest.raises(GoldenFileError, match="no longer equals"):
        export.export(KEY, tmp_path)
    assert not list(tmp_path.rglob("*.npz"))


def test_bfloat16_rounds_to_nearest_even():
    half = 2.0**-8
    for x, want in (
        (1 + half, 1.0), (1 + 3 * half, 1 + 4 * half), (1 + half + 2.0**-40, 1 + 2 * half),
        (-(1 + half), -1.0), (3.4e38, np.inf), (0.0, 0.0),
    ):  # fmt: skip
        assert lowp.round_to(np.array([x]), "bfloat16")[0] == want
    assert np.isnan(lowp.round_to(np.array([np.nan]), "bfloat16")[0])


def compiled(tmp_path, text):
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler to run the example of the docs")
    source, program = tmp_path / "check_raw.c", tmp_path / "check_raw"
    source.write_text(text)
    command = [compiler, "-O2", "-Wall", "-Wextra", "-Werror", str(source), "-lm", "-o",
               str(program)]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    return program


def test_the_c_program_of_the_docs(folder, tmp_path):
    """It accepts the right attention, and rejects two wrong ones."""
    text, vectors = PROGRAM.read_text(), folder / "raw" / KEY
    names = ["square", "square-causal", "causal", "causal-long-queries", "huge", "tiny", "odd-17"]

    def run(text):
        return subprocess.run([compiled(tmp_path, text), vectors, *names],
                              capture_output=True, text=True)  # fmt: skip

    right = run(text)
    assert right.returncode == 0 and right.stdout.count("ok ") == len(names), right
    upper_left = run(text.replace("t + S - T + 1", "t + 1 < S ? t + 1 : S"))
    assert upper_left.returncode == 1 and "WRONG causal:" in upper_left.stdout
    assert "ok square-causal:" in upper_left.stdout
    overflow = run(text.replace("exp(p[s] - top)", "exp(p[s])"))
    assert overflow.returncode == 1 and "WRONG huge:" in overflow.stdout


@pytest.mark.oracle
def test_the_package_safetensors_reads_it(folder):
    safe = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    dtypes = ("float64", "float32", "float16")
    path = export.export(KEY, folder / "narrow", "safetensors", dtypes)[1]
    found = safe.load_file(path)
    with np.load(folder / "npz" / f"{KEY}.npz", allow_pickle=False) as archive:
        assert found and all(np.array_equal(a, archive[n], equal_nan=a.dtype.kind == "f")
                             for n, a in found.items())  # fmt: skip
