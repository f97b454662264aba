"""The README: its table names what exists, its example runs, its commands are in the Makefile."""

import re

import attention_ref
from attention_ref.kit.golden import checkout

TEXT = (checkout() / "README.md").read_text(encoding="utf-8")


def test_the_table_of_rows_is_what_exists():
    listed = []
    for family, cells in re.findall(r"^\| `(\w+)`:[^|]*\| (.*) \|$", TEXT, re.M):
        listed += [f"{family}/{slug}" for slug in re.findall(r"`(\w+)`", cells)]
    assert sorted(listed) == attention_ref.keys()


def test_the_example_runs():
    code = re.search(r"```python\n(.*?)```", TEXT, re.S).group(1)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["out"].shape == (8, 64) and names["grads"]["q"].shape == (8, 64)


def test_its_make_targets_exist():
    makefile = (checkout() / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", TEXT, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target
