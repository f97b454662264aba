"""The house rules as a check: ``python tests/style.py`` prints ``path:line: rule: message``.

What ruff cannot know: what keeps one forward readable by NumPy, complex numbers, the tape and CuPy,
how long a method may be, what its docstrings hold, what a slow loop in a test may use. A line that
ends in ``# style: ok, <reason>`` is let through and counted.
"""

import ast
import io
import os
import re
import sys
import tokenize
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FILE_LINES, FUNCTION_LINES = 150, 40
ROLES = ("forward", "select", "edit", "score", "construct", "generate", "step")
READ_FIVE_WAYS = ("_forward", "_select", "_edit")
NOT_STEPS = {"__init__", "check", "errors", "examples", "registry", "spec"}  # files of core
FULL = ("Parameters", "Returns", "Raises", "Notes", "Source", "References", "Examples")
TEXT = {".py", ".md", ".toml", ".cfg", ".txt", ".json", ".cff", ".yaml", ".yml", ".cu", ".h",
        ".rst", ".cpp", ".hpp", ".css", ".html", ""}  # fmt: skip
IGNORED_FOLDERS = {".git", ".venv", "__pycache__", "_build", ".pytest_cache", ".ruff_cache",
                   ".hypothesis", "build", "dist"}  # fmt: skip
ESCAPE = re.compile(r"#\s*style: ok, *\S")
PLACES = [re.escape(str(place)) for place in (ROOT, Path.home()) if len(place.parts) > 1]
MACHINE_PATH = re.compile(rf"(?<![\w.])(?:{'|'.join([*PLACES, '/home/[a-z]+', '/Users/[a-z]+'])})/")
"""This checkout, this user's folder, anybody's folder."""

LIKE = {"zeros", "ones", "full", "empty", "arange", "linspace", "array", "asarray"}
NO_LIKE = ("eye", "identity", "tri", "indices", "tril_indices", "triu_indices", "fromfunction")
BANNED = {
    **dict.fromkeys((f"numpy.{n}" for n in NO_LIKE), "compare two np.arange(n, like=x)"),
    **dict.fromkeys(
        ("numpy.abs", "numpy.absolute", "numpy.fabs", "abs", "builtins.abs"),
        "loses the complex-step derivative; core.absolute",
    ),
    **dict.fromkeys(("numpy.linalg.norm",), "loses the complex-step derivative; core.norm"),
    **dict.fromkeys(
        ("numpy.var", "numpy.std", "numpy.vdot", "numpy.real", "numpy.linalg.cholesky"),
        "loses the complex-step derivative; write the mean of squares or the sum",
    ),
    **dict.fromkeys(
        ("numpy.block", "numpy.unstack", "numpy.vecdot", "numpy.linalg.multi_dot",
         "scipy.special.softmax", "scipy.special.logsumexp", "numpy.add.at"),
        "CuPy has none; write the step, or take it from core",
    ),
    **dict.fromkeys(
        ("scipy.special.expit", "numpy.logaddexp", "numpy.hypot", "numpy.interp"),
        "refuses complex numbers; core.logistic, core.softplus or the formula",
    ),
}  # fmt: skip
METHODS = {
    "sum", "mean", "max", "min", "prod", "std", "var", "cumsum", "cumprod", "astype", "reshape",
    "transpose", "swapaxes", "dot", "argmax", "argmin", "argsort", "sort", "clip", "round", "copy",
    "flatten", "ravel", "squeeze", "repeat", "take", "all", "any", "nonzero", "fill", "conj",
    "searchsorted", "diagonal", "trace",
}  # fmt: skip
SLOW_NUMPY = {"array", "zeros", "empty", "full", "inf", "nan", "float64", "ndarray", "ndindex",
              "broadcast_to", "broadcast_shapes"}  # fmt: skip


class Finding(NamedTuple):
    """One broken rule."""

    path: str
    line: int
    rule: str
    message: str

    def __str__(self):
        return f"{self.path}:{self.line}: {self.rule}: {self.message}"


class Source:
    """One Python file and what the rules ask about it."""

    def __init__(self, path, text):
        self.path, self.text, self.lines = path, text, text.splitlines()
        self.parts, self.slug = Path(path).parts, Path(path).stem
        self.tree = ast.parse(text)
        self.nodes = list(ast.walk(self.tree))
        self.functions = {n.name: n for n in self.tree.body if isinstance(n, ast.FunctionDef)}

    def under(self, *folders):
        """Whether the file lies under one of these folders."""
        return any(self.path.startswith(f + "/") for f in folders)

    @property
    def is_test(self):
        return self.under("tests") and self.slug.startswith("test_")

    @property
    def is_method(self):
        return self.under("attention_ref/methods") and self.slug != "__init__"

    @cached_property
    def aliases(self):
        """Imported name -> dotted name."""
        names = {}
        for node in self.nodes:
            if isinstance(node, ast.Import):
                names |= {a.asname or a.name: a.name for a in node.names}
            elif isinstance(node, ast.ImportFrom):
                names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        return names

    @cached_property
    def tokens(self):
        return list(tokenize.generate_tokens(io.StringIO(self.text).readline))

    @cached_property
    def comments(self):
        """(line, text) of every comment."""
        return [(t.start[0], t.string) for t in self.tokens if t.type == tokenize.COMMENT]

    @cached_property
    def code(self):
        """Numbers of the lines that hold code: not blank, no comment, no docstring."""
        empty = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
                 tokenize.ENDMARKER}  # fmt: skip
        lines = {
            n for t in self.tokens if t.type not in empty
            for n in range(t.start[0], t.end[0] + 1)
        }  # fmt: skip
        for node in self.nodes:
            if isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", 0), str):
                lines -= set(range(node.lineno, node.end_lineno + 1))
        return lines

    def dotted(self, node):
        """``np.linalg.norm`` as "numpy.linalg.norm"; "" for what is no chain of names."""
        rest = []
        while isinstance(node, ast.Attribute):
            rest.insert(0, node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            return ""
        return ".".join([self.aliases.get(node.id, node.id), *rest])

    def called_from(self, names):
        """These functions of the file and all that they call in it."""
        found, waiting = {}, [n for n in names if n in self.functions]
        while waiting:
            name = waiting.pop()
            found[name] = self.functions[name]
            inside = {n.id for n in ast.walk(found[name]) if isinstance(n, ast.Name)}
            waiting += [n for n in inside if n in self.functions and n not in found]
        return found

    @cached_property
    def forwards(self):
        """Functions that are read five ways: forwards and the helpers that they call."""
        if self.is_method:
            return self.called_from(n for n in self.functions if n.endswith(READ_FIVE_WAYS))
        if self.under("attention_ref/core") and self.slug not in NOT_STEPS:
            return {n: f for n, f in self.functions.items() if not n.endswith("_backward")}
        return {}


RULES = {}


def rule(name):
    """Register a rule: a generator of (line, message) over one source."""

    def register(function):
        RULES[name] = function
        return function

    return register


def inside(functions):
    return ((f, node) for f in functions.values() for node in ast.walk(f))


def wrappers(source):
    """Lines of the calls into kernels: nobody reads a method there."""
    return {
        line
        for node in source.nodes
        if isinstance(node, ast.FunctionDef) and re.search(r"_(numba|cuda)(_|$)", node.name)
        for line in range(node.lineno, node.end_lineno + 1)
    }


@rule("length")
def length(source):
    if source.is_method:
        read = source.code - wrappers(source)
        if len(read) > FILE_LINES:
            yield 1, f"{len(read)} lines of code, at most {FILE_LINES} a file"
        for node in source.nodes:
            if isinstance(node, ast.FunctionDef):
                lines = len(source.code & set(range(node.lineno, node.end_lineno + 1)))
                if lines > FUNCTION_LINES:
                    yield node.lineno, f"{node.name} has {lines} lines of code, at most 40"


@rule("banned-call")
def banned_call(source):
    for _, node in inside(source.forwards):
        if not isinstance(node, ast.Call):
            continue
        name, words = source.dotted(node.func), {k.arg for k in node.keywords}
        short = name.removeprefix("numpy.")
        if name in BANNED:
            yield node.lineno, f"{name}: {BANNED[name]}"
        elif name != short and short in LIKE and "like" not in words:
            yield node.lineno, f"{name}: give it like= (or *_like)"
        elif name != short and words & {"initial", "where"}:
            yield node.lineno, f"{name} with initial= or where=: CuPy has neither; np.where first"
        elif name.endswith(".accumulate") or name == "numpy.logaddexp.reduce":
            yield node.lineno, f"{name}: CuPy has none; write the step"


@rule("real-part")
def real_part(source):
    for _, node in inside(source.forwards):
        if isinstance(node, ast.Attribute) and node.attr in ("real", "imag") and (
            source.dotted(node) not in BANNED
        ):  # fmt: skip
            yield node.lineno, f".{node.attr} loses the complex-step derivative"


@rule("scalar-function")
def scalar_function(source):
    for _, node in inside(source.forwards):
        if isinstance(node, ast.Call) and node.args and source.dotted(node.func) in (
            "numpy.sqrt", "numpy.log", "numpy.exp", "numpy.log2"
        ):  # fmt: skip
            inner = list(ast.walk(node.args[0]))
            shape = any(getattr(n, "attr", "") in ("shape", "size", "ndim")
                        or source.dotted(getattr(n, "func", None)) == "len"
                        for n in inner)  # fmt: skip
            length = isinstance(node.args[0], ast.Subscript) and isinstance(
                getattr(node.args[0].slice, "value", None), str
            )
            if shape or length or not any(isinstance(n, ast.Name) for n in inner):
                yield node.lineno, "a NumPy scalar turns float32 into float64; use math"


@rule("array-method")
def array_method(source):
    for _, node in inside(source.forwards):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            root = source.dotted(node.func).split(".")[0]
            imported = {dotted.split(".")[0] for dotted in source.aliases.values()}
            if node.func.attr in METHODS and root not in imported | {"rng"}:
                yield node.lineno, f".{node.func.attr}(): a method; np.{node.func.attr}(x, ...)"


def written(function):
    """(line, name or None) of everything that a function writes into by subscript."""
    for node in ast.walk(function):
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        if isinstance(node, (ast.Assign, ast.AugAssign)):
            for target in targets:
                text = isinstance(target, ast.Subscript) and target.slice
                if isinstance(target, ast.Subscript) and not isinstance(
                    getattr(text, "value", None), str
                ):
                    yield node.lineno, getattr(target.value, "id", None)


def own(source, function, makers):
    """Names bound to a list or dict of the function's own, or to what one of ``makers`` returns."""
    literals = (ast.Dict, ast.List, ast.DictComp, ast.ListComp)
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            made = isinstance(node.value, ast.Call) and source.dotted(node.value.func) in makers
            if made or isinstance(node.value, literals):
                yield from (t.id for t in node.targets if isinstance(t, ast.Name))


@rule("in-place")
def in_place(source):
    for function in source.forwards.values():
        containers = set(own(source, function, ("dict", "list")))
        for line, name in written(function):
            if name not in containers:
                yield line, "a write into an array: core.scatter, np.where or np.stack"
    for _, node in inside(source.forwards):
        if isinstance(node, ast.Call) and any(k.arg == "out" for k in node.keywords):
            yield node.lineno, "out= writes into an array"
    if not (source.is_method or source.under("attention_ref/core")):
        return
    makers = ("dict", "list", "numpy.zeros_like", "numpy.empty_like", "numpy.copy")
    for name, function in source.functions.items():
        if name.endswith("_backward") and name not in source.forwards:
            buffers = set(own(source, function, makers))
            for line, buffer in written(function):
                if buffer not in buffers:
                    yield line, f"{name} writes into {buffer}, which it did not make itself"


@rule("truth-value")
def truth_value(source):
    for _, node in inside(source.forwards):
        tests = [getattr(node, "test", None)]
        tests += getattr(node, "values", []) if isinstance(node, ast.BoolOp) else []
        tests += [node.operand] if isinstance(getattr(node, "op", None), ast.Not) else []
        for test in tests:
            if isinstance(test, ast.Call) and (
                source.dotted(test.func) in ("numpy.any", "numpy.all")
                or getattr(test.func, "attr", "") in ("any", "all")
            ):
                yield test.lineno, "a branch on array values: np.where, or .item() at the door"


@rule("import")
def imports(source):
    if not (source.is_method or source.under("attention_ref/core")):
        return
    for node in source.nodes:
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        top = node in source.tree.body
        names = [a.name for a in node.names]
        if isinstance(node, ast.ImportFrom):
            names = [f"{'.' * node.level}{node.module or ''}.{name}" for name in names]
        for name in names:
            heavy = name.split(".")[0] in ("numba", "scipy", "matplotlib", "cupy")
            if top and (heavy or name.startswith("attention_ref.kernels")):
                yield node.lineno, f"{name} at module level; import it inside the function"
            if source.is_method and name.startswith(("attention_ref.methods.", ".")):
                yield node.lineno, f"{name}: a method never imports another method"


def sections(function):
    """Headings of a docstring, None without one."""
    doc = ast.get_docstring(function)
    return None if doc is None else set(re.findall(r"^(\w+)\n-{3,}\s*$", doc, re.MULTILINE))


@rule("docstring")
def docstring(source):
    brief = source.under(*(f"attention_ref/{p}" for p in ("core", "kit", "engine", "nn")))
    if not (source.is_method or brief):
        return
    if ast.get_docstring(source.tree) is None:
        yield 1, "the file has no docstring"
    public = [n for n in source.tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    for node in public:
        if node.name.startswith("_"):
            continue
        have, need = sections(node), ()
        if source.is_method and isinstance(node, ast.FunctionDef):
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            need = ("Parameters", "Returns") if arguments else ()
            if node.name in [f"{source.slug}_{role}" for role in ROLES]:
                need = FULL
        if have is None:
            yield node.lineno, f"{node.name} has no docstring"
        elif missing := [name for name in need if name not in have]:
            yield node.lineno, f"{node.name} lacks {', '.join(missing)}"


@rule("steps")
def steps(source):
    forward = source.functions.get(f"{source.slug}_forward")
    backward = source.functions.get(f"{source.slug}_backward")
    if not source.is_method or forward is None or backward is None:
        return

    def numbers(function, pattern):
        span = range(function.lineno, function.end_lineno + 1)
        every = [int(n) for line, c in source.comments if line in span
                 for n in re.findall(pattern, c)]  # fmt: skip
        return list(dict.fromkeys(every))

    up, down = numbers(forward, r"\((\d+)\)"), numbers(backward, r"\((\d+)'\)")
    doc = ast.get_docstring(source.tree) or ""
    if not up:
        yield forward.lineno, f"{forward.name} has no numbered steps, # (1) # (2) ..."
    if missing := [n for n in up if n not in down]:
        yield backward.lineno, f"{backward.name} lacks " + ", ".join(f"({n}')" for n in missing)
    if extra := [n for n in down if n not in up]:
        yield backward.lineno, f"{forward.name} lacks " + ", ".join(f"({n})" for n in extra)
    if down != sorted(down, reverse=True):
        yield backward.lineno, f"steps come as {down}, expected from the bottom up"
    if missing := [n for n in up if not re.search(rf"&\s*\({n}\)", doc)]:
        yield 1, "no formula " + ", ".join(f"&({n})" for n in missing) + " in the docstring"


@rule("slow-loop")
def slow_loop(source):
    if not source.is_test:
        return
    slow = source.called_from(n for n in source.functions if n.lstrip("_").startswith("slow_"))
    for function, node in inside(slow):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            if [a.name for a in node.names] != ["math"]:
                yield node.lineno, f"{function.name} imports more than math"
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            yield node.lineno, f"{function.name} multiplies matrices; loop over scalars"
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            origin = source.aliases.get(node.id)
            if origin not in (None, "math", "numpy") and not origin.startswith("math."):
                yield node.lineno, f"{function.name} uses {origin}; only math and builtins"
        elif isinstance(node, ast.Attribute):
            name = source.dotted(node)
            if name.startswith("numpy.") and name.split(".")[1] not in SLOW_NUMPY:
                yield node.lineno, f"{function.name} uses {name}; only indexing and new arrays"
            elif node.attr in METHODS - {"copy", "sort"} and name[:5] not in ("math.", "numpy"):
                yield node.lineno, f"{function.name} uses .{node.attr}; loop over scalars"


@rule("no-assert")
def no_assert(source):
    if not source.is_test:
        return
    classes = [node for node in source.tree.body if isinstance(node, ast.ClassDef)]
    for node in [n for body in (source.tree, *classes) for n in body.body]:
        if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
            continue
        calls = [source.dotted(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)]
        if not any(isinstance(n, ast.Assert) for n in ast.walk(node)) and not any(
            c in ("pytest.raises", "pytest.warns", "pytest.fail")
            or c.split(".")[-1].lstrip("_").startswith(("check", "assert"))
            or any(part.startswith("check") for part in c.split("."))
            for c in calls
        ):
            yield node.lineno, f"{node.name} asserts nothing"


def skips(source):
    """(line, reason) of every skip in a test file; the reason is None when it is no plain text."""
    if not source.under("tests"):
        return
    for node in source.nodes:
        bare = isinstance(node, ast.Attribute) and source.dotted(node) == "pytest.mark.skip"
        if bare and not any(getattr(c, "func", None) is node for c in source.nodes):
            yield node.lineno, None
        name = source.dotted(node.func) if isinstance(node, ast.Call) else ""
        name = name.removeprefix("pytest.").removeprefix("mark.")
        if name in ("skip", "skipif", "importorskip", "xfail") and "pytest" in source.text:
            given = [k.value for k in node.keywords if k.arg == "reason"]
            given += node.args[:1] if name == "skip" else []
            reason = getattr(given[0], "value", None) if given else None
            yield node.lineno, reason if isinstance(reason, str) else None


def check_text(path, text, allowed=frozenset()):
    """Findings of one file, and how many lines were let through."""
    findings = [
        Finding(path, n, "machine-path", "an absolute path of somebody's machine")
        for n, line in enumerate(text.splitlines(), 1)
        if MACHINE_PATH.search(line)
    ]
    if path.endswith(".py"):
        source = Source(path, text)
        for name, function in RULES.items():
            findings += [Finding(path, line, name, why) for line, why in function(source)]
        for line, reason in skips(source):
            if reason is None or f"{path}: {reason}" not in allowed:
                wanted = f"{path}: {reason or '<a reason in plain text>'}"
                findings.append(
                    Finding(path, line, "skip", f"not in tests/allowed_skips.txt: {wanted}")
                )
    lines = text.splitlines()
    let = {f for f in findings if ESCAPE.search(lines[f.line - 1] if lines else "")}
    return sorted(set(findings) - let), len(let)


def files(root):
    """Every text file of the project, as a path relative to its root."""
    for folder, inner, names in os.walk(root):
        inner[:] = sorted(d for d in inner if d not in IGNORED_FOLDERS and ".egg-info" not in d)
        for name in sorted(names):
            path = Path(folder, name)
            if path.suffix in TEXT and path.stat().st_size < 2_000_000:
                yield path.relative_to(root).as_posix()


def main(root=ROOT):
    """Check the whole project; returns the number of findings."""
    listed = root / "tests" / "allowed_skips.txt"
    lines = listed.read_text().splitlines() if listed.exists() else []
    allowed = {line.strip() for line in lines if line.strip() and not line.startswith("#")}
    findings, let, seen, used = [], 0, 0, set()
    for path in files(root):
        try:
            text = (root / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found, ok = check_text(path, text, allowed)
        findings, let, seen = findings + found, let + ok, seen + 1
        if path.startswith("tests/") and path.endswith(".py"):
            used |= {f"{path}: {reason}" for _, reason in skips(Source(path, text))}
    for entry in sorted(allowed - used):
        findings.append(Finding("tests/allowed_skips.txt", 1, "skip", f"not in use: {entry}"))
    print(*findings, sep="\n", end="\n" if findings else "")
    counts = f"{len(findings)} findings, {let} lines let through"
    print(f"{seen} files, {len(RULES) + 2} rules, {counts}")
    return len(findings)


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
