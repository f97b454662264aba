"""The Tutorial record: what it prints, refuses and writes, and how staleness is decided."""

import json
import sys

import numpy as np
import pytest

import attention_ref
from attention_ref.core.errors import ParameterError
from attention_ref.kit import tutorials
from attention_ref.kit.tutorial import Tutorial, own_key, plain, write_files

LESSON = '''"""A lesson."""
import numpy as np
from attention_ref.core import default_scale
from attention_ref.kit.tutorial import Tutorial

tutorial = Tutorial(__file__)
tutorial.claim("c", criterion="below 1", paper=0.5)
tutorial.measured(ours=[VALUE, VALUE, {"a": default_scale(4)}], verdict="partly", tolerance=0.1)
plt = tutorial.pyplot()
figure, axes = plt.subplots(figsize=(2, 2))
axes.plot([0, 1], [0, VALUE])
tutorial.finish(figure)
'''


@pytest.fixture
def lesson(tmp_path, monkeypatch):
    """A repository with one tutorial; returns a function that writes it with a value."""
    monkeypatch.delenv("ATTENTION_REF_QUICK", raising=False)
    monkeypatch.delenv("ATTENTION_REF_FIGURES", raising=False)
    monkeypatch.setenv("MPLBACKEND", "Agg")

    def write(value):
        path = tmp_path / "tutorials" / "fam" / "slug.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(LESSON.replace("VALUE", str(value)))
        return path

    return write


@pytest.fixture
def start(lesson):
    """Begins a Tutorial in a temporary repository; the standard output is given back at the end."""
    begun = []

    def start():
        begun.append(Tutorial(str(lesson(1.0))))
        return begun[-1]

    yield start
    for tutorial in begun:
        tutorial.close()


def figure_of(tutorial, points=3):
    figure, axes = tutorial.pyplot().subplots(figsize=(2, 2))
    axes.plot(np.sin(np.arange(points) * 1.7), ".")
    return figure


def results(root):
    return sorted(f.name for f in (root / "figures").rglob("*") if f.is_file())


def complete(tutorial):
    tutorial.claim("c", criterion="below 1")
    ours = [1.0, np.float32(2), {"a": np.int64(3)}]
    tutorial.measured(ours=ours, verdict="partly", tolerance=0.1)


def test_the_key_is_the_path(start):
    tutorial = start()
    assert tutorial.key == "fam/slug"
    assert not tutorial.quick


def test_a_file_elsewhere_has_no_key(tmp_path):
    with pytest.raises(ParameterError, match="expected tutorials/<family>"):
        Tutorial(str(tmp_path / "slug.py"))


def test_finish_writes_picture_text_and_record(start, tmp_path):
    tutorial = start()
    print("hello")
    complete(tutorial)
    tutorial.finish(figure_of(tutorial))
    assert results(tmp_path) == ["slug.json", "slug.svg", "slug.txt"]
    record = json.loads((tmp_path / "figures/fam/slug.json").read_text())
    assert set(record) == {
        "key", "claim", "criterion", "paper", "ours", "verdict", "tolerance", "seconds", "sources",
        "own", "versions", "date",
    }  # fmt: skip
    assert record["ours"] == [1.0, 2.0, {"a": 3}]
    assert record["paper"] is None
    text = (tmp_path / "figures/fam/slug.txt").read_text()
    assert text.startswith("hello\nClaim: c\nCriterion")
    assert "Verdict: partly" in text
    assert str(tmp_path) not in text


def test_the_same_figure_gives_the_same_bytes(start, tmp_path):
    pictures = []
    for _ in range(2):
        tutorial = start()
        complete(tutorial)
        tutorial.finish(figure_of(tutorial))
        pictures.append((tmp_path / "figures/fam/slug.svg").read_bytes())
    assert pictures[0] == pictures[1]
    assert b"<dc:date>" not in pictures[0]


def test_quick_writes_nothing(start, tmp_path, monkeypatch):
    monkeypatch.setenv("ATTENTION_REF_QUICK", "1")
    tutorial = start()
    assert tutorial.quick
    tutorial.claim("c", criterion="below 1")
    tutorial.finish(None)
    assert not (tmp_path / "figures").exists()
    assert sys.stdout is not tutorial._tee


@pytest.mark.parametrize(
    "change, message",
    [
        ({"verdict": "yes"}, "verdict is 'yes'"),
        ({"ours": [1.0]}, "ours has 1 entries"),
        ({"tolerance": 0}, "tolerance is 0"),
    ],
)
def test_measured_refuses(start, change, message):
    tutorial = start()
    tutorial.claim("c", criterion="below 1")
    right = {"ours": [1.0, 2.0, 3.0], "verdict": "reproduced", "tolerance": 0.1}
    with pytest.raises(ParameterError, match=message):
        tutorial.measured(**right | change)


def test_measured_needs_the_criterion_first(start):
    tutorial = start()
    with pytest.raises(ParameterError, match=r"came before claim\(\)"):
        tutorial.measured(ours=[1, 2, 3], verdict="partly", tolerance=0.1)


def test_finish_needs_figure_and_measurement(start, tmp_path):
    tutorial = start()
    with pytest.raises(ParameterError, match="needs a figure"):
        tutorial.finish(figure_of(tutorial))
    assert not (tmp_path / "figures").exists()


def test_a_path_of_the_machine_is_refused(start, tmp_path):
    tutorial = start()
    print(f"saved in {tmp_path / 'x.png'}")
    complete(tutorial)
    with pytest.raises(ParameterError, match="path of this machine"):
        tutorial.finish(figure_of(tutorial))
    assert not (tmp_path / "figures").exists()


def test_slashes_that_are_no_paths_pass(start, tmp_path):
    tutorial = start()
    print("1/sqrt(D), scores/dot_product, https://example.org/a/b, dL/dq, 3 / 4 / 5")
    complete(tutorial)
    tutorial.finish(figure_of(tutorial))
    assert len(results(tmp_path)) == 3


def test_a_huge_figure_is_refused(start, tmp_path):
    tutorial = start()
    complete(tutorial)
    with pytest.raises(ParameterError, match="expected at most 150 KB"):
        tutorial.finish(figure_of(tutorial, points=20_000))
    assert not (tmp_path / "figures").exists()


def test_check_asserts_and_nan_does_not_pass(start, capsys):
    tutorial = start()
    tutorial.check("a against b", 1e-16, 1e-15)
    assert "a against b: error 1.0e-16, bound 1.0e-15" in tutorial._tee.lines.getvalue()
    for error in (1e-14, float("nan")):
        with pytest.raises(AssertionError, match="a against b"):
            tutorial.check("a against b", error, 1e-15)


def test_gradients_agree_and_a_wrong_one_is_seen(start):
    tutorial = start()
    import dataclasses

    spec = attention_ref.get("scores/dot_product")
    rng = np.random.default_rng(0)
    kwargs = {n: rng.standard_normal((2, 3, 4)) for n in "qkv"} | {"causal": True}
    tutorial.gradients(spec, kwargs)
    printed = tutorial._tee.lines.getvalue()
    assert all(f"\nd{name} " in printed for name in "qkv")

    def broken(dout, cache):
        return {k: g * (1 + 1e-7) if k == "k" else g for k, g in spec.backward(dout, cache).items()}

    with pytest.raises(AssertionError, match="dk: hand and tape differ"):
        tutorial.gradients(dataclasses.replace(spec, backward=broken), kwargs)


def test_files_are_replaced_together_or_not_at_all(tmp_path):
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_bytes(b"old")
    with pytest.raises(TypeError):
        write_files({first: b"new", second: None})
    assert first.read_bytes() == b"old"
    assert [f.name for f in tmp_path.iterdir()] == ["a.txt"]
    write_files({first: b"new", second: b"two"})
    assert first.read_bytes() == b"new" and second.read_bytes() == b"two"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.txt", "b.txt"]


def test_numbers_of_the_record():
    assert plain({"a": [np.float64(1 / 3), np.int32(2), True]}) == {"a": [0.333333, 2, True]}


def test_own_key_ignores_comments_and_docstrings(lesson, tmp_path):
    path = lesson(1.0)
    key = own_key(tmp_path, "fam/slug")
    path.write_text("# a comment\n" + path.read_text().replace("A lesson.", "Another."))
    assert own_key(tmp_path, "fam/slug") == key
    path.write_text(path.read_text().replace("below 1", "below 2"))
    assert own_key(tmp_path, "fam/slug") != key


def test_stale_and_rerun(lesson, tmp_path):
    """missing -> drawn -> fresh; own edit -> drawn; edit elsewhere -> stamped or drawn."""
    for name in ("__init__.py", "core", "engine", "kit", "methods", "catalog.toml"):
        part = tutorials.ROOT / "attention_ref" / name
        (tmp_path / "attention_ref").mkdir(exist_ok=True)
        (tmp_path / "attention_ref" / name).symlink_to(part)
    lesson(1.0)
    figure = tmp_path / "figures/fam/slug"
    assert tutorials.keys(tmp_path) == ["fam/slug"]
    assert tutorials.stale("fam/slug", tmp_path) == "missing"
    result, says = tutorials.rerun("fam/slug", tmp_path)
    assert result == "drawn", says
    assert tutorials.stale("fam/slug", tmp_path) == "fresh"

    lesson(1.05)
    assert tutorials.stale("fam/slug", tmp_path) == "changed"
    assert tutorials.rerun("fam/slug", tmp_path)[0] == "drawn"
    assert json.loads(figure.with_suffix(".json").read_text())["ours"][0] == 1.05

    def elsewhere(value):  # as if the library had changed after this result was recorded
        record = json.loads(figure.with_suffix(".json").read_text())
        record |= {"sources": "0" * 16, "ours": [value, value, {"a": 0.5}], "seconds": 7.0}
        figure.with_suffix(".json").write_text(json.dumps(record))
        figure.with_suffix(".txt").write_text("old text")

    elsewhere(1.0)
    assert tutorials.stale("fam/slug", tmp_path) == "recheck"
    assert tutorials.rerun("fam/slug", tmp_path)[0] == "stamped"
    assert tutorials.stale("fam/slug", tmp_path) == "fresh"
    record = json.loads(figure.with_suffix(".json").read_text())
    assert record["seconds"] == 7.0 and record["ours"][0] == 1.0
    assert figure.with_suffix(".txt").read_text() == "old text"

    elsewhere(2.0)
    assert tutorials.rerun("fam/slug", tmp_path)[0] == "drawn"
    assert json.loads(figure.with_suffix(".json").read_text())["ours"][0] == 1.05

    figure.with_suffix(".svg").unlink()
    assert tutorials.stale("fam/slug", tmp_path) == "missing"


def test_a_failing_tutorial_leaves_the_old_figure(lesson, tmp_path):
    path = lesson(1.0)
    path.write_text("raise SystemExit('no luck')\n")
    result, says = tutorials.rerun("fam/slug", tmp_path)
    assert (result, says) == ("failed", "no luck")
    assert not (tmp_path / "figures").exists()


def test_an_unknown_key_exits_2(capsys):
    assert tutorials.main(["scores/dot_produkt"]) == 2
    assert "dot_produkt" in capsys.readouterr().err
