"""The student's copy: what goes, what stays, and that every tutorial has something to take out."""

import ast
import re

import pytest

from attention_ref import cli
from attention_ref.core.errors import ParameterError
from attention_ref.kit import tutorials
from attention_ref.kit.student import strip

LESSON = '''"""Lesson."""

# %%
# **1. Write this.**


def mine(x):
    """Return 2 x."""
    # solution: return None
    y = x + x
    return y
    # end of solution


print(mine(1))

# %%
# **Solution 1.** Add.

print("two")

# %%
# The end
'''


def test_solutions_go_and_the_rest_stays():
    left = strip(LESSON)
    assert '"""Return 2 x."""\n    return None\n\n\nprint(mine(1))' in left
    assert "solution" not in left.lower() and "two" not in left and "x + x" not in left
    assert left.startswith('"""Lesson."""') and left.endswith("# %%\n# The end\n")


def test_without_marks_nothing_changes():
    plain = "# %%\n# **1. Read.**\n\nprint(1)\n"
    assert strip(plain) == plain


def test_a_mark_without_a_colon_leaves_no_trace():
    assert strip("a = 1\n# solution\na = 2\n# end of solution\nb = a\n") == "a = 1\nb = a\n"


@pytest.mark.parametrize(("text", "message"), [
    ("# solution\na = 1\n", "begun in line 1"),
    ("a = 1\n# end of solution\n", "line 2 is '# end of solution'"),
    ("# solution\n# solution\n# end of solution\n", "line 2 is '# solution'"),
    ("def f():\n    # solution\n    return 1\n    # end of solution\n", "no Python"),
])  # fmt: skip
def test_marks_that_do_not_fit_are_refused(text, message):
    with pytest.raises(ParameterError, match=message):
        strip(text)


@pytest.mark.parametrize("key", tutorials.keys())
def test_every_tutorial_has_three_exercises_and_a_solution_to_take_out(key):
    text = (tutorials.ROOT / "tutorials" / f"{key}.py").read_text(encoding="utf-8")
    left = strip(text)
    ast.parse(left)
    assert re.findall(r"^# \*\*(\d)\. ", left, re.MULTILINE)[-3:] == ["1", "2", "3"]
    assert left != text, "no solution is marked"
    assert "tutorial.exercise(" in left, "no exercise is checked by the library"


def test_the_command_writes_copies(tmp_path, capsys):
    key = "scores/dot_product"
    assert cli.main(["student", key, "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.split() == [f"tutorials/{key}.py"]
    copy = (tmp_path / "tutorials" / f"{key}.py").read_text(encoding="utf-8")
    assert "return None" in copy and "Solution" not in copy


def test_the_command_refuses_the_teachers_folder_and_unknown_keys(tmp_path, capsys):
    assert cli.main(["student", "--out", str(tutorials.ROOT)]) == 2
    assert cli.main(["student", "scores/dot_products", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "teacher's" in said and "scores/dot_product" in said
    assert not list(tmp_path.iterdir())
