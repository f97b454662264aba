"""The key of a result changes with the code behind it, and with nothing else."""

import shutil
import time

import pytest

from attention_ref.core.registry import PACKAGE
from attention_ref.kit.sources import reached, source_key

METHOD = "attention_ref/methods/scores/dot_product.py"
FILES = {
    "attention_ref/__init__.py": "from attention_ref.core.registry import get\n",
    "attention_ref/core/__init__.py": "from attention_ref.core.steps import first, second\n",
    "attention_ref/core/registry.py": "def get(key):\n    return key\n",
    "attention_ref/core/steps.py": (
        '"""Steps."""\nFACTOR = 2.0\n\n\n'
        'def first(x):\n    """Doc."""\n    return _helper(x) * FACTOR  # comment\n\n\n'
        "def _helper(x):\n    return first(x) if x else x\n\n\n"
        "def second(x):\n    return x\n\n\n"
        "def unused(x):\n    return x\n"
    ),
    "attention_ref/methods/scores/plain.py": (
        'from attention_ref import core\n\nSCALE = 1.0\n\n\ndef plain(x, second=None):\n'
        '    """Doc."""\n    return core.first(x) * SCALE\n\n\nSPEC = {"key": "scores/plain"}\n'
    ),
    "tutorials/scores/plain.py": (
        '"""Title"""\n# %%\nimport attention_ref\n\nspec = attention_ref.get("scores/plain")\n'
    ),
    "tutorials/scores/alone.py": "def unused(x):\n    return [second for second in x]\n",
}  # fmt: skip


@pytest.fixture
def tree(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def rewrite(tree, name, old, new):
    text = (tree / name).read_text()
    assert old in text
    (tree / name).write_text(text.replace(old, new, 1))


STEPS, PLAIN = "attention_ref/core/steps.py", "attention_ref/methods/scores/plain.py"
TUTORIAL = "tutorials/scores/plain.py"


@pytest.mark.parametrize(
    "name, old, new",
    [
        (STEPS, "return _helper(x) *", "return _helper(x) +"),
        (STEPS, "first(x) if x else x", "first(x) if x else -x"),
        (STEPS, "FACTOR = 2.0", "FACTOR = 3.0"),
        (PLAIN, "SCALE = 1.0", "SCALE = 1.5"),
        (PLAIN, "core.first(x)", "core.second(x)"),
        (TUTORIAL, "spec =", "row ="),
    ],
)
def test_a_change_in_what_is_reached_changes_the_key(tree, name, old, new):
    before = source_key(TUTORIAL, tree)
    rewrite(tree, name, old, new)
    assert source_key(TUTORIAL, tree) != before


@pytest.mark.parametrize(
    "name, old, new",
    [
        (STEPS, '"""Doc."""', '"""Other words."""'),
        (STEPS, "# comment", "# other comment"),
        (STEPS, '"""Steps."""\n', '"""Steps."""\n\n\n# moved down\n'),
        (STEPS, "def second(x):\n    return x", "def second(x):\n    return -x"),
        (STEPS, "def unused(x):\n    return x", "def unused(y):\n    return -y"),
        (PLAIN, '    """Doc."""\n', ""),
        (TUTORIAL, '"""Title"""', '"""Another title"""'),
        (TUTORIAL, "# %%\n", "# %%\n# Some words.\n"),
    ],
)
def test_words_and_unrelated_code_do_not_change_the_key(tree, name, old, new):
    before = source_key(TUTORIAL, tree)
    rewrite(tree, name, old, new)
    assert source_key(TUTORIAL, tree) == before


def test_a_cycle_of_calls_ends(tree):
    names = reached(TUTORIAL, tree)
    assert names == sorted(
        ["tutorials.scores.plain:*", "attention_ref.methods.scores.plain:*",
         "attention_ref.core.steps:first", "attention_ref.core.steps:_helper",
         "attention_ref.core.steps:FACTOR", "attention_ref.core.registry:get"]
    )  # fmt: skip


def test_a_cycle_of_imports_ends(tree):
    (tree / "attention_ref/core/steps.py").write_text("from attention_ref.core import first\n")
    assert "attention_ref.methods.scores.plain:*" in reached(TUTORIAL, tree)


def test_own_names_are_not_the_names_of_the_library(tree):
    assert reached("tutorials/scores/alone.py", tree) == ["tutorials.scores.alone:*"]


def test_imports_inside_a_function_and_relative_imports(tree):
    (tree / "attention_ref/core/late.py").write_text(
        "def late(x):\n    from .steps import second as other\n\n    return other(x)\n"
    )
    (tree / TUTORIAL).write_text("from attention_ref.core.late import late\n\nlate(1)\n")
    names = reached(TUTORIAL, tree)
    assert names == ["attention_ref.core.late:late", "attention_ref.core.steps:second",
                     "tutorials.scores.plain:*"]  # fmt: skip


def test_what_prints_and_writes_results_is_left_out(tree):
    (tree / "attention_ref/kit").mkdir()
    (tree / "attention_ref/kit/tutorial.py").write_text("class Tutorial:\n    pass\n")
    (tree / TUTORIAL).write_text("from attention_ref.kit.tutorial import Tutorial\n\nTutorial()\n")
    assert reached(TUTORIAL, tree) == ["tutorials.scores.plain:*"]


def test_the_key_is_short_absolute_paths_work_and_places_do_not_matter(tree, tmp_path_factory):
    key = source_key(TUTORIAL, tree)
    assert len(key) == 16 and int(key, 16) >= 0
    assert source_key(tree / TUTORIAL, tree) == key
    other = tmp_path_factory.mktemp("elsewhere") / "tree"
    shutil.copytree(tree, other)
    assert source_key(TUTORIAL, other) == key


def test_a_real_method_reaches_its_steps_and_no_more():
    names = reached(METHOD)
    assert "attention_ref.core.dense:softmax_forward" in names
    assert "attention_ref.core.dense:row_max" in names  # through softmax_forward
    foreign = ("attention_ref.core.numeric", "attention_ref.kit")
    assert not [n for n in names if n.startswith(foreign)]
    assert "attention_ref.core.masks:visible" in names


def test_keys_of_a_hundred_rows_take_a_moment(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name)
    text = (tmp_path / METHOD).read_text()
    start = time.perf_counter()
    for i in range(100):
        path = tmp_path / f"attention_ref/methods/scores/copy{i}.py"
        path.write_text(text.replace("dot_product", f"copy{i}"))
        source_key(path, tmp_path)
    assert time.perf_counter() - start < 5.0  # measured 0.4 s; a busy machine gets slack
