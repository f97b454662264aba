"""The loader of golden files: every damage is one GoldenFileError; writing is all or nothing."""

import io
import json
import random
import shutil
import zipfile

import numpy as np
import pytest

import attention_ref
from attention_ref.core.errors import GoldenFileError
from attention_ref.kit import golden
from attention_ref.kit.compare import CheckFailure

KEY = "scores/dot_product"
SPEC = attention_ref.get(KEY)


@pytest.fixture
def copied(tmp_path):
    for source, target in zip(golden.paths(KEY), golden.paths(KEY, tmp_path), strict=True):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    return tmp_path


def rewrite(root, change, compression=zipfile.ZIP_DEFLATED):
    """Apply ``change(members: list of (name, bytes))`` to the npz."""
    packed, _ = golden.paths(KEY, root)
    with zipfile.ZipFile(packed) as archive:
        members = [(m.filename, archive.read(m)) for m in archive.infolist()]
    members = change(members)
    with zipfile.ZipFile(packed, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)


def edit(root, change):
    _, text = golden.paths(KEY, root)
    manifest = json.loads(text.read_text())
    change(manifest)
    text.write_text(json.dumps(manifest))


def test_loads_and_hands_out_fresh_arrays(copied):
    manifest, arrays = golden.load(KEY, copied)
    assert manifest["key"] == KEY and arrays["plain/in/q"].dtype == np.float64
    arrays["plain/in/q"][:] = 0
    assert np.any(golden.load(KEY, copied)[1]["plain/in/q"])


def npy(array, **kwargs):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, **kwargs)
    return buffer.getvalue()


DAMAGE = {
    "an object array": lambda m: [*m[1:], (m[0][0], npy(np.array([{}], object)))],
    "a raw pickle": lambda m: [*m[1:], (m[0][0], b"\x80\x04N.")],
    "a member outside": lambda m: [*m, ("../../evil.npy", m[0][1])],
    "an extra member": lambda m: [*m, ("plain/in/extra.npy", m[0][1])],
    "a missing member": lambda m: m[1:],
    "another value": lambda m: [(m[0][0], m[0][1][:-1] + b"\x00"), *m[1:]],
    "another shape": lambda m: [(m[0][0], npy(np.zeros(3))), *m[1:]],
    "a half-precision array": lambda m: [(m[0][0], npy(np.zeros(3, np.float16))), *m[1:]],
    "a header of 8 TB": lambda m: [(m[0][0], _lying_header()), *m[1:]],
    "a truncated array": lambda m: [(m[0][0], m[0][1][:-9]), *m[1:]],
    "a header that is no Python": lambda m: [
        (m[0][0], b"\x93NUMPY\x01\x00\x10\x00'''\n" + b" " * 12), *m[1:]
    ],
    "too much when unpacked": lambda m: [*m, ("plain/in/z.npy", npy(np.zeros(2**20)))],
    "too many members": lambda m: [*m, *((f"x{i}/in/q.npy", b"") for i in range(2001))],
}  # fmt: skip


def _lying_header():
    text = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }"
    text = text.ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_error(copied, name):
    rewrite(copied, DAMAGE[name])
    with pytest.raises(GoldenFileError):
        golden.load(KEY, copied)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_twice_is_refused(copied):
    rewrite(copied, lambda members: [*members, members[0]])
    with pytest.raises(GoldenFileError, match="twice"):
        golden.load(KEY, copied)


def test_another_compression_is_refused(copied):
    rewrite(copied, lambda members: members, zipfile.ZIP_LZMA)
    with pytest.raises(GoldenFileError, match="compression"):
        golden.load(KEY, copied)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"format": 1}', "[" * 100_000, '{"format": 99}', "\udcff"],
    ids=["empty", "half", "list", "null", "keys", "deep", "format", "bytes"],
)
def test_a_bad_manifest_is_one_error(copied, text):
    golden.paths(KEY, copied)[1].write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(GoldenFileError):
        golden.load(KEY, copied)


def test_a_manifest_with_another_hash(copied):
    def change(manifest):
        manifest["arrays"]["plain/in/q"]["sha256"] = "0" * 32

    edit(copied, change)
    with pytest.raises(GoldenFileError, match="manifest says"):
        golden.load(KEY, copied)


def test_missing_files_are_one_error(tmp_path):
    with pytest.raises(GoldenFileError, match="cannot be read"):
        golden.load(KEY, tmp_path)


def test_random_damage_never_escapes(copied, request):
    """Flip, cut and insert bytes: the load succeeds unchanged or raises GoldenFileError."""
    packed, text = golden.paths(KEY, copied)
    whole = {packed: packed.read_bytes(), text: text.read_bytes()}
    _, want = golden.load(KEY, copied)
    rng = random.Random(0)
    refused = 0
    for _ in range(5000 if request.config.getoption("--long") else 150):
        path = rng.choice([packed, text])
        data = bytearray(whole[path])
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(data))
            action = rng.random()
            if action < 0.7:
                data[place] ^= 1 << rng.randrange(8)
            elif action < 0.85:
                del data[place : place + rng.randrange(1, 50)]
            else:
                data[place:place] = bytes(rng.randrange(256) for _ in range(5))
        path.write_bytes(bytes(data))
        try:
            _, arrays = golden.load(KEY, copied)
            assert all(np.array_equal(arrays[n], want[n]) for n in want)
        except GoldenFileError:
            refused += 1
        path.write_bytes(whole[path])
    assert refused > 50


def test_nothing_is_written_when_the_slow_loop_disagrees(tmp_path, monkeypatch):
    class Route:
        @staticmethod
        def slow_dot_product(**kwargs):
            return SPEC.call(kwargs)[0] * (1 + 1e-6)

    monkeypatch.setattr(golden, "particular_tests", lambda key: Route)
    with pytest.raises(CheckFailure, match="slow loop"):
        golden.write(SPEC, tmp_path, force=True, seeds=1)
    assert not list(tmp_path.rglob("*"))


def test_a_wrong_gradient_is_not_written(tmp_path):
    import dataclasses

    def backward(dout, cache):
        g = SPEC.backward(dout, cache)
        return g | {"q": g["q"] * 1.001}

    with pytest.raises(CheckFailure, match="slope"):
        golden.write(dataclasses.replace(SPEC, backward=backward), tmp_path, force=True, seeds=1)
    assert not list(tmp_path.rglob("*"))


def test_functions_among_the_arguments_are_named_in_the_manifest():
    assert golden._option(np.tanh) == "tanh" and golden._option(0.5) == 0.5
    golden._same_inputs("plain", {"f": np.tanh}, {}, {"options": {"f": "tanh"}})
    with pytest.raises(CheckFailure, match="option f of plain changed"):
        golden._same_inputs("plain", {"f": np.cosh}, {}, {"options": {"f": "tanh"}})


def test_writing_twice_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        golden.write(SPEC, tmp_path / name, force=True, seeds=1)
    a, b = (golden.paths(KEY, tmp_path / name) for name in ("a", "b"))
    assert a[0].read_bytes() == b[0].read_bytes() and a[1].read_bytes() == b[1].read_bytes()


@pytest.mark.parametrize("key", attention_ref.keys())
def test_golden_files_are_small(key):
    paths = golden.paths(key)
    if not all(p.is_file() for p in paths):
        pytest.fail(f"{key} has no golden files: make golden KEY={key}")
    arrays, manifest = (p.stat().st_size for p in paths)
    assert arrays <= 64 * 1024 and manifest <= 20 * 1024


def test_files_that_are_too_large_are_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(golden, "LARGEST", (2**20, 1000))
    with pytest.raises(CheckFailure, match="the manifest of"):
        golden.write(SPEC, tmp_path, force=True, seeds=1)
    assert not list(tmp_path.iterdir())
