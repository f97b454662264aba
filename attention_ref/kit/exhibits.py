"""The zoo's failing reports, as the docs show them: ``python -m attention_ref.kit.exhibits``.

Writes ``docs/zoo.json``; a test says when it is no longer what ``check`` reports.
"""

import inspect
import json

from attention_ref.core.registry import get
from attention_ref.kit import conform, golden, zoo

LINES = 4
"""Wrong lines that an exhibit shows."""


def exhibits():
    """Every animal: (name, row, where it shows, what the report must say).

    Yields
    ------
    tuple of str
    """
    for group, shows in ((zoo.FORWARD, "output"), (zoo.BACKWARD, "gradients"),
                         (zoo.LSE, "log-sum-exp"), (zoo.BLOCKS, "output")):  # fmt: skip
        for bug, says in group.items():
            key = "heads/multi_query" if "group" in bug else "scores/dot_product"
            yield bug, key, shows, says
    for bug, says in zoo.DELTA.items():
        yield bug, "recurrent/delta_rule", "output", says
    for key, sayings in zoo.ARGUMENTS.items():
        for says in sayings:
            name = says.split(": ")[0].removeprefix("matches ").removeprefix("if ")
            name = says.removeprefix("window off by one ") if "window" in says else name
            yield name.replace(":", ","), key, "output", says


def report(name, key, shows, says):
    """What ``check`` reports of one animal, in float64 and without the properties."""
    spec = get(key)
    groups = (zoo.FORWARD, zoo.BACKWARD, zoo.LSE, zoo.BLOCKS, zoo.DELTA)
    if any(name in group for group in groups):
        forward, backward = zoo.animal(name)
    else:
        forward, backward = zoo.variant(key, says), None
    names = {n: n for n in inspect.signature(spec.main).parameters}
    return conform.check(forward, key, backward=backward, names=names, dtypes=("float64",))


def record(exhibit, found):
    """What ``docs/zoo.json`` holds of one animal and its report."""
    name, key, shows, says = exhibit
    wrong = [x for x in found.wrong if x.case != "-"]
    chosen = [x for x in wrong if x.says == says][:LINES] or wrong[:LINES]
    small = found.smallest
    return {
        "name": name, "key": key, "shows": shows, "says": says, "wrong": len(wrong),
        "properties": [[p.what, p.says] for p in found.properties if p.verdict == "WRONG"],
        "lines": [[x.case, x.what, conform.short(x.error), conform.short(x.bound),
                   conform.short(x.plain)] for x in chosen],
        "smallest": [small["case"], small["what"], small["sizes"]] if small else None,
    }  # fmt: skip


def main():
    """Write ``docs/zoo.json``."""
    path = golden.checkout() / "docs" / "zoo.json"
    rows = ",\n ".join(json.dumps(record(x, report(*x))) for x in exhibits())
    golden.write_atomically(path, f"[\n {rows}\n]\n".encode())
    print(path.relative_to(golden.checkout()))


if __name__ == "__main__":
    main()
