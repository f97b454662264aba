"""The student's copy of a tutorial: the same text without the solutions.

A tutorial in the repository is the teacher's; it runs with its solutions and is tested with them.
Two marks say what a student does not get:

    # solution: return None      in code: these lines, down to "# end of solution", become what
    ...                          stands behind the colon (without a colon they go without a trace)
    # end of solution

    # **Solution 2.** ...        at the head of a cell: the whole cell goes
"""

import ast
import re

from attention_ref.core.errors import ParameterError

CELL = re.compile(r"^# %%", re.MULTILINE)
BEGIN = re.compile(r"^(\s*)# solution(?:: (.*))?$")
END = "# end of solution"


def strip(text):
    """Take the solutions out of a tutorial.

    Parameters
    ----------
    text : str
        The tutorial in percent cells.

    Returns
    -------
    str
        The student's copy; the text itself where nothing is marked.

    Raises
    ------
    ParameterError
        When a mark has no end, or an end no beginning, or what is left is no Python.

    Examples
    --------
    >>> print(strip("def f(x):\\n    # solution: return None\\n    return 2 * x\\n"
    ...             "    # end of solution\\n"))
    def f(x):
        return None
    <BLANKLINE>
    """
    head, *cells = CELL.split(text)
    kept = [c for c in cells if not c.lstrip(" \n").startswith("# **Solution")]
    lines, out, since = "# %%".join([head, *kept]).split("\n"), [], None
    for number, line in enumerate(lines, 1):
        mark = BEGIN.match(line)
        if mark and since is None:
            since = number
            if mark[2]:
                out.append(mark[1] + mark[2])
        elif line.strip() == END or mark:
            if since is None or mark:
                raise ParameterError(f"line {number} is {line.strip()!r} without its other half")
            since = None
        elif since is None:
            out.append(line)
    if since is not None:
        raise ParameterError(f"the solution begun in line {since} has no {END!r}")
    left = "\n".join(out)
    try:
        ast.parse(left)
    except SyntaxError as failure:
        raise ParameterError(f"without its solutions the text is no Python: {failure}") from None
    return left
