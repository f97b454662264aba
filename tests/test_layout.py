"""One key, one path in every tree: methods, tests, golden files, tutorials, figures, catalog."""

from pathlib import Path

import pytest

import attention_ref
from attention_ref.core.registry import PACKAGE, catalog, written
from attention_ref.core.spec import KINDS
from attention_ref.kit.records import row

ROOT = Path(__file__).resolve().parent.parent
WITHOUT_METHOD = {"engine", "families"}  # lectures about the tools and about families: no rows
TREES = {
    "tests/methods": (".py",),
    "tests/golden": (".npz", ".json"),
    "tests/records": (".json",),
    "tutorials": (".py",),
    "figures": (".svg", ".txt", ".json"),
}
PLACES = {
    "method": "attention_ref/methods/{family}/{slug}.py",
    "tests": "tests/methods/{family}/test_{slug}.py",
    "tutorial": "tutorials/{family}/{slug}.py",
    "figure": "figures/{family}/{slug}.svg",
    "printed output": "figures/{family}/{slug}.txt",
    "result": "figures/{family}/{slug}.json",
    "golden": "tests/golden/{family}/{slug}.npz",
    "golden manifest": "tests/golden/{family}/{slug}.json",
}


def orphans(root, keys):
    """Files of the trees that belong to no method, as paths."""
    found = []
    for tree, suffixes in TREES.items():
        for path in sorted((root / tree).rglob("*")):
            if path.is_dir() or "__pycache__" in path.parts or path.parent.name in WITHOUT_METHOD:
                continue
            if path.name in ("__init__.py", "conftest.py", "README.md", "README.txt"):
                continue
            name = path.stem.removeprefix("test_") if tree == "tests/methods" else path.stem
            key = f"{path.parent.relative_to(root / tree).as_posix()}/{name}"
            if key not in keys or path.suffix not in suffixes:
                found.append(path.relative_to(root).as_posix())
    return found


def missing_places(root, key):
    """What a finished row lacks on disk: place -> path."""
    family, slug = key.split("/")
    where = {n: p.format(family=family, slug=slug) for n, p in PLACES.items()}
    return {n: p for n, p in where.items() if not (root / p).is_file()}


def test_every_method_file_is_a_row_of_the_catalog():
    strangers = [key for key in written() if key not in catalog()]
    assert not strangers, f"no row in catalog.toml for {strangers}"


def test_every_other_file_belongs_to_a_method():
    found = orphans(ROOT, set(written()))
    assert not found, "these files belong to no method file: " + ", ".join(found)


def test_every_family_says_what_it_changes():
    for folder in sorted({key.split("/")[0] for key in written()}):
        text = PACKAGE / "methods" / folder / "__init__.py"
        assert text.is_file() and text.read_text().startswith(('"""', 'r"""')), f"{folder}: no text"


@pytest.mark.parametrize("key", written())
def test_spec_agrees_with_path_and_catalog(key):
    spec = attention_ref.get(key)
    assert spec.key == key
    assert spec.kind == catalog()[key]["kind"]
    assert type(spec) is KINDS[spec.kind]


@pytest.mark.parametrize("key", written())
def test_functions_are_named_after_the_slug(key):
    spec, slug = attention_ref.get(key), key.split("/")[1]
    assert spec.main.__name__ == f"{slug}_{spec.role}"
    if spec.backward_function is not None:
        assert spec.backward_function.__name__ == f"{slug}_backward"
    for form, function in spec.forms.items():
        assert function.__name__ == f"{slug}_{form}_{spec.role}"
    for name, pair in (("numba", spec.numba), ("cuda", spec.cuda)):
        if pair is not None:
            assert pair.forward.__name__.startswith(slug), f"{name}: {pair.forward.__name__}"


@pytest.mark.parametrize("key", written())
def test_the_catalog_row_of_a_written_method_is_complete(key):
    entry = catalog()[key]
    lacking = [field for field in ("authors", "year", "link", "code") if not entry.get(field)]
    assert not lacking, f"catalog.toml, {key}: no {', '.join(lacking)} (code may be 'none')"
    assert entry["link"].startswith("https://")
    assert entry["code"] == "none" or entry["code"].startswith("https://")
    assert 1900 < int(entry["year"]) < 2100


@pytest.mark.parametrize("key", written())
def test_a_done_row_has_all_its_places(key):
    missing = missing_places(ROOT, key)
    done = row(key)["done"]
    assert not (done and missing), f"{key} counts as done and lacks " + ", ".join(
        f"{name} ({path})" for name, path in missing.items()
    )


def test_orphans_and_missing_places_are_found(tmp_path):
    for path in (
        "tests/methods/scores/test_here.py", "tests/methods/scores/test_gone.py",
        "tutorials/scores/here.py", "tutorials/engine/tape.py", "figures/scores/here.png",
        "tests/golden/scores/old.npz",
    ):  # fmt: skip
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    assert orphans(tmp_path, {"scores/here"}) == [
        "tests/methods/scores/test_gone.py", "tests/golden/scores/old.npz",
        "figures/scores/here.png",
    ]  # fmt: skip
    assert list(missing_places(tmp_path, "scores/here")) == [
        "method", "figure", "printed output", "result", "golden", "golden manifest",
    ]  # fmt: skip
