"""Stubs: right places, no overwriting, clean for ruff, and never green."""

import importlib.util
import shutil
import subprocess
import sys

import pytest

from attention_ref.core.errors import ParameterError
from attention_ref.core.registry import catalog, get, written
from attention_ref.core.spec import KINDS
from attention_ref.kit import checks, golden, scaffold

EXAMPLES = {}
for _key, _entry in catalog().items():
    EXAMPLES.setdefault(_entry["kind"], _key)
METHODS = {kind: key for kind, key in EXAMPLES.items() if kind != "survey"}
RECONSTRUCTIONS = [k for k, e in catalog().items() if e["grade"] == "D" and e["kind"] != "survey"]


def load(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_kind_has_a_stub():
    assert set(scaffold.KINDS) == set(KINDS) == set(METHODS)


@pytest.mark.parametrize("kind", METHODS)
def test_a_stub_is_written_in_its_places_and_is_never_green(kind, tmp_path):
    key = METHODS[kind]
    family, slug = key.split("/")
    paths = [path.as_posix() for path in scaffold.new(key, tmp_path)]
    assert paths == [
        f"attention_ref/methods/{key}.py", f"tests/methods/{family}/test_{slug}.py",
        f"tutorials/{key}.py", f"attention_ref/methods/{family}/__init__.py",
    ]  # fmt: skip
    module = load(tmp_path / paths[0], f"stub_{slug}")
    spec = module.SPEC
    assert (spec.key, spec.kind) == (key, kind)
    assert spec.main.__name__ == f"{slug}_{spec.role}"
    results = checks.run(spec)
    assert results and not all(r.ok for r in results)
    with pytest.raises(NotImplementedError, match=key):
        load(tmp_path / paths[1], f"tests_{slug}").__dict__[f"slow_{slug}"]()


def test_tests_of_a_stub_fail(tmp_path):
    scaffold.new(METHODS["mechanism"], tmp_path)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 1 and "5 failed" in run.stdout, run.stdout


def test_stubs_are_clean_for_ruff(tmp_path):
    pytest.importorskip("ruff", reason="ruff is not installed: make style")
    for key in {*METHODS.values(), *RECONSTRUCTIONS[:2], max(catalog(), key=_length)}:
        if catalog()[key]["kind"] != "survey":
            scaffold.new(key, tmp_path)
    shutil.copy(golden.checkout() / "pyproject.toml", tmp_path)
    own = 'lint.isort.known-first-party=["attention_ref"]'
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--config", own, "."]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stdout


def _length(key):
    return len(catalog()[key]["title"])


def test_a_reconstruction_must_say_so(tmp_path):
    scaffold.new(RECONSTRUCTIONS[0], tmp_path)
    text = (tmp_path / f"attention_ref/methods/{RECONSTRUCTIONS[0]}.py").read_text()
    assert "reconstruction=" in text


def test_nothing_is_overwritten(tmp_path):
    key = METHODS["policy"]
    scaffold.new(key, tmp_path)
    path = tmp_path / f"tutorials/{key}.py"
    path.write_text("mine")
    with pytest.raises(ParameterError, match="overwrite"):
        scaffold.new(key, tmp_path)
    assert path.read_text() == "mine"
    with pytest.raises(ParameterError, match="overwrite"):
        scaffold.new("scores/dot_product", golden.checkout())
    assert get("scores/dot_product").key in written()


def test_unknown_keys_get_the_nearest_ones(tmp_path):
    with pytest.raises(ParameterError, match="scores/dot_product"):
        scaffold.new("scores/dot_prodct", tmp_path)
    with pytest.raises(ParameterError, match="not in the catalog"):
        scaffold.new("../../outside", tmp_path)
    with pytest.raises(ParameterError, match="page"):
        scaffold.new(EXAMPLES["survey"], tmp_path)
    assert not list(tmp_path.iterdir())
