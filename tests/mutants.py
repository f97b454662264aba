"""Break one method in every small way and see which of its tests notice.

    python tests/mutants.py scores/dot_product [--list] [--json]
    python tests/mutants.py core/dense --by scores/dot_product

A mutant is the method file with one small change in one of its functions. It is compiled in memory
under the module's own name, never written to disk, and the row's suites run against it: golden
comparison, generic checks, the row's own tests, the quickest first. A mutant that all of them let
pass is a survivor: either a test is missing, or the change alters no number, and then it is
declared with its reason in the row's test file (for core/dense: tests/core/test_dense.py)::

    EQUIVALENT = {"dot_product_forward: a + b  ->  b + a": "addition commutes"}

Docstrings, the SPEC, examples, fast paths and checks at the door are left alone. Exit code 0 when
at least 95 % of the other mutants are noticed, 1 when not, 2 when the suites fail as they are.
"""

import argparse
import ast
import contextlib
import copy
import importlib.util
import inspect
import io
import itertools
import json
import os
import signal
import sys
import time
import types
import warnings
from pathlib import Path
from typing import NamedTuple

for _name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from attention_ref.core import registry  # noqa: E402

LIMIT = 20
"""Seconds after which a mutant counts as noticed: it hangs. Less for a quick suite: 3 s, or ten
times what the suite took on the method as it is."""
RATE, MOST_EQUIVALENT = 0.95, 0.05


# ------------------------------------------------------------------------------ operators


BINARY = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
}  # fmt: skip
COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
TWINS = {
    "sin": "cos", "cos": "sin", "max": "min", "min": "max", "maximum": "minimum",
    "minimum": "maximum", "argmax": "argmin", "argmin": "argmax", "any": "all", "all": "any",
    "cumsum": "cumprod", "sum": "max", "mean": "sum",
}  # fmt: skip
TRANSPARENT = {
    "exp", "log", "sqrt", "square", "tanh", "sin", "cos", "flip", "sort", "swapaxes", "moveaxis",
    "cumsum", "expand_dims", "relu", "logistic", "absolute", "softplus",
}  # fmt: skip
COMMUTE = {"maximum", "minimum", "logaddexp", "isclose", "array_equal", "broadcast_shapes"}


def last_name(node):
    """``swapaxes`` of ``np.swapaxes(...)``."""
    function = getattr(node, "func", None)
    return getattr(function, "attr", getattr(function, "id", ""))


def of_binary(node):
    if not isinstance(node, ast.BinOp):
        return
    swapped = BINARY.get(type(node.op))
    if swapped:
        yield ast.BinOp(node.left, swapped(), node.right)
    if isinstance(node.op, ast.MatMult):
        yield ast.BinOp(node.right, node.op, node.left)
    yield node.left  # the second term or factor dropped
    if not isinstance(node.op, (ast.Div, ast.Pow, ast.FloorDiv, ast.Mod)):
        yield node.right


def of_unary(node):
    if isinstance(node, ast.UnaryOp) and not isinstance(node.operand, ast.Constant):
        yield node.operand


def of_comparison(node):
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            ops = [*node.ops[:i], COMPARISONS[type(op)](), *node.ops[i + 1 :]]
            yield ast.Compare(node.left, ops, node.comparators)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
    elif isinstance(node, ast.IfExp):
        yield node.body
        yield node.orelse


def of_number(node):
    negative = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
    constant = node.operand if negative else node
    if not isinstance(constant, ast.Constant) or isinstance(constant.value, (str, bytes)):
        return
    value = constant.value
    if isinstance(value, bool):
        yield ast.Constant(not value)
    elif negative and isinstance(value, int):
        yield ast.UnaryOp(ast.USub(), ast.Constant(1 if value == 2 else value + 1))
    elif negative:
        yield constant
    elif isinstance(value, (int, float)):
        yield ast.Constant(value + 1)


def of_call(node):
    if not isinstance(node, ast.Call):
        return
    name, arguments = last_name(node), node.args
    starred = any(isinstance(a, ast.Starred) for a in arguments[:2])
    if name == "where" and len(arguments) == 3:
        yield arguments[1]
        yield arguments[2]
    if name in TRANSPARENT and arguments:
        yield arguments[0]
    if name in TWINS and isinstance(node.func, ast.Attribute):
        twin = ast.Attribute(node.func.value, TWINS[name], ast.Load())
        yield ast.Call(twin, arguments, node.keywords)
    commutes = name in COMMUTE or ast.unparse(node.func) in ("max", "min")
    if len(arguments) >= 2 and not starred and not commutes:
        yield ast.Call(node.func, [arguments[1], arguments[0], *arguments[2:]], node.keywords)


def of_einsum(node):
    if not isinstance(node, ast.Call) or last_name(node) != "einsum" or not node.args:
        return
    text = getattr(node.args[0], "value", None)
    if not isinstance(text, str) or "->" not in text:
        return
    left, right = text.split("->")
    first, *others = left.split(",")
    for changed in (f"{','.join([_turn(first), *others])}->{right}", f"{left}->{_turn(right)}"):
        if changed != text:
            yield ast.Call(node.func, [ast.Constant(changed), *node.args[1:]], node.keywords)


def _turn(letters):
    """The last two letters swapped."""
    tail = letters[-2:]
    return letters[:-2] + tail[::-1] if len(tail) == 2 and tail.isalpha() else letters


def of_dict(node):
    if isinstance(node, ast.Dict) and all(node.keys):
        for i in range(len(node.values) - 1):
            values = list(node.values)
            values[i], values[i + 1] = values[i + 1], values[i]
            yield ast.Dict(node.keys, values)


def of_statement(node):
    if isinstance(node, ast.Assign):
        names = {n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)}
        used = {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)}
        if names & used:
            yield ast.Pass()
        value = isinstance(node.value, (ast.BinOp, ast.Call)) and not left_alone(node.value)
        if value and len(names) == 1:
            yield ast.Assign(node.targets, ast.UnaryOp(ast.USub(), node.value))
    elif isinstance(node, ast.AugAssign):
        yield ast.Pass()
        swapped = BINARY.get(type(node.op))
        if swapped:
            yield ast.AugAssign(node.target, swapped(), node.value)


OPERATORS = (of_binary, of_unary, of_comparison, of_number, of_call, of_einsum, of_dict,
             of_statement)  # fmt: skip


# ------------------------------------------------------------------------------ sites


class Mutant(NamedTuple):
    """One small change: where, what, and the way to it from the root of the syntax tree."""

    line: int
    name: str  # "function: original -> changed", unique in its file
    path: tuple
    node: ast.AST

    def tree(self, original):
        """The whole file with this change."""
        tree = copy.deepcopy(original)
        place = tree
        for step in self.path[:-1]:
            place = _at(place, step)
        field, index = self.path[-1]
        node = ast.copy_location(copy.deepcopy(self.node), _at(place, self.path[-1]))
        if index is None:
            setattr(place, field, node)
        else:
            getattr(place, field)[index] = node
        return ast.fix_missing_locations(tree)


def _at(node, step):
    value = getattr(node, step[0])
    return value if step[1] is None else value[step[1]]


def functions(tree, slug):
    """The functions to break: those named after the slug (None: all), and what they call."""
    every = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}
    fast = ("numba", "cuda")
    start = "" if slug is None else f"{slug}_"
    waiting = [n for n in every if n.startswith(start) and not any(f in n for f in fast)]
    found = []
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.append(name)
            inside = {n.id for n in ast.walk(every[name]) if isinstance(n, ast.Name)}
            waiting += [n for n in inside if n in every]
    return [every[name] for name in every if name in found]


def left_alone(node):
    """Docstrings, annotations aside: checks at the door, errors, and what only raises."""
    if isinstance(node, (ast.Raise, ast.Assert, ast.arg)):
        return True
    if isinstance(node, ast.If) and all(isinstance(s, ast.Raise) for s in node.body):
        return True
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True
    return isinstance(node, ast.Call) and ".check." in "." + ast.unparse(node.func)


def sites(node, path):
    """Every node below ``node`` that may be changed, with the way to it."""
    for field, value in ast.iter_fields(node):
        if field in ("decorator_list", "returns", "annotation", "ctx", "targets", "target"):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST) and not left_alone(child):
                way = (*path, (field, index))
                yield child, way
                negative = isinstance(child, ast.UnaryOp) and isinstance(
                    child.operand, ast.Constant
                )
                if not negative:
                    yield from sites(child, way)


def mutants(text, slug):
    """All mutants of a method file, without repetition."""
    tree = ast.parse(text)
    wanted = functions(tree, slug)
    found, seen, names = [], set(), {}
    for position, top in enumerate(tree.body):
        if top not in wanted:
            continue
        for node, path in sites(top, (("body", position),)):
            for change in (c for operator in OPERATORS for c in operator(node)):
                before, after = _words(node), _words(change)
                mutant = Mutant(node.lineno, f"{top.name}: {before}  ->  {after}", path, change)
                whole = ast.dump(mutant.tree(tree).body[position])
                if before == after or whole in seen:
                    continue
                seen.add(whole)
                names[mutant.name] = count = names.get(mutant.name, 0) + 1
                if count > 1:
                    mutant = mutant._replace(name=f"{mutant.name} ({count})")
                found.append(mutant)
    return tree, found


def _words(node):
    if isinstance(node, ast.Pass):
        return "dropped"
    return " ".join(ast.unparse(ast.fix_missing_locations(copy.deepcopy(node))).split())


# ------------------------------------------------------------------------------ in its place


@contextlib.contextmanager
def installed(name, path, tree):
    """The module ``name`` made from a syntax tree, for the time of the block only."""
    before = importlib.import_module(name)
    package, _, leaf = name.rpartition(".")
    parent = sys.modules[package]
    module = types.ModuleType(name)
    module.__file__, module.__package__, module.__spec__ = str(path), package, before.__spec__
    exported = [n for n, v in vars(parent).items() if getattr(v, "__module__", None) == name]
    kept = {n: getattr(parent, n) for n in (leaf, *exported)}
    sys.modules[name] = module
    registry.get.cache_clear()
    try:
        exec(compile(tree, str(path), "exec"), module.__dict__)
        for n in kept:  # the package hands on the module and what it took from it
            setattr(parent, n, module if n == leaf else getattr(module, n))
        yield module
    finally:
        sys.modules[name] = before
        for n, value in kept.items():
            setattr(parent, n, value)
        registry.get.cache_clear()


class Noticed(Exception):
    """A suite saw the mutant."""


class TimeLimit(BaseException):
    """Not an Exception, so that no check takes it for a failure of its own."""


@contextlib.contextmanager
def limited(seconds):
    """Interrupt the block after some seconds."""

    def ring(*_):
        raise TimeLimit

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ------------------------------------------------------------------------------ suites


def golden_suite(key):
    """The golden file."""
    _checks(key, ("golden",))


def generic_suite(key):
    """The kit's checks, without the golden file."""
    from attention_ref.kit import checks

    _checks(key, tuple(n for n in checks.names() if n not in ("golden", "record")))


def _checks(key, only):
    from attention_ref.kit import checks

    for result in checks.run(registry.get(key), only=only, stop=True):
        if not result.ok:
            raise Noticed(f"{result.check} ({result.case}): {result.message}")


def own_suite(key):
    """The row's test file, called function by function; pytest itself where fixtures are asked."""
    path = tests_of(key)
    if not path.is_file():
        return
    module = load(path, f"_mutant_{path.stem}")
    try:
        rest = [name for name, test in tests_in(module) if not run_test(name, test)]
    finally:
        sys.modules.pop(module.__name__, None)
    if rest:
        _pytest(path, rest)


def tests_of(key):
    """The test file of a row, or of a part of core."""
    family, slug = key.split("/")
    if family == "core":
        return ROOT / "tests" / "core" / f"test_{slug}.py"
    return ROOT / "tests" / "methods" / family / f"test_{slug}.py"


def load(path, name):
    """Import a file anew, under a name of its own."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def tests_in(module):
    """(name, function) of every test, those in classes with a fresh object."""
    for name, value in vars(module).items():
        if name.startswith("test_") and callable(value):
            yield name, value
        elif name.startswith("Test") and isinstance(value, type):
            for inner in [n for n in dir(value) if n.startswith("test_")]:
                yield f"{name}::{inner}", getattr(value(), inner)


def run_test(name, test):
    """Run one test for all its parameters; False when it needs fixtures."""
    import pytest

    marks = getattr(test, "pytestmark", [])
    if any(mark.name in ("oracle", "slow", "gpu", "skip", "skipif") for mark in marks):
        return True
    choices = []
    for mark in (m for m in marks if m.name == "parametrize"):
        names, values = mark.args[:2]
        names = [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)
        rows = [getattr(v, "values", v) if _is_set(v) else v if len(names) > 1 else (v,)
                for v in values]  # fmt: skip
        choices.append([dict(zip(names, row, strict=True)) for row in rows])
    given = set().union(*(c[0] for c in choices if c))
    if set(inspect.signature(test).parameters) - given:
        return False
    for combination in itertools.product(*choices):
        kwargs = {n: v for part in combination for n, v in part.items()}
        try:
            test(**kwargs)
        except pytest.skip.Exception:
            continue
        except (Exception, pytest.fail.Exception) as failure:
            raise Noticed(f"{name}: {type(failure).__name__}") from None
    return True


def _is_set(value):
    return type(value).__name__ == "ParameterSet"


def _pytest(path, names):
    import pytest

    before = set(sys.modules)
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--rootdir={ROOT}"]
    with contextlib.redirect_stderr(io.StringIO()):
        code = pytest.main([*options, *(f"{path}::{name}" for name in names)])
    for name in set(sys.modules) - before:
        if name.startswith(("tests", "test_")):
            del sys.modules[name]
    if code not in (0, 5):
        raise Noticed("pytest: " + ", ".join(names)[:80])


SUITES = (golden_suite, generic_suite, own_suite)


def notices(key, limits):
    """What the first suite that fails says, or None when all pass; {suite: seconds it may take}."""
    for suite, seconds in limits.items():
        try:
            with (
                limited(seconds), warnings.catch_warnings(),
                contextlib.redirect_stdout(io.StringIO()),
            ):  # fmt: skip
                warnings.simplefilter("error")
                suite(key)
        except TimeLimit:
            return f"no answer after {seconds:.0f} s"
        except Exception as failure:
            return f"{type(failure).__name__}: {failure}"
    return None


# ------------------------------------------------------------------------------ the hunt


def place(key):
    """Module name, file and prefix of the functions to break."""
    family, slug = key.split("/")
    inner = f"core.{slug}" if family == "core" else f"methods.{family}.{slug}"
    path = registry.PACKAGE.joinpath(*inner.split(".")).with_suffix(".py")
    return f"{registry.PACKAGE.name}.{inner}", path, None if family == "core" else slug


def hunt(key, suites=SUITES, chosen=None, progress=None, by=None, limit=LIMIT):
    """Run the suites against every mutant.

    Parameters
    ----------
    key : str
        ``family/slug``, or ``core/<part>``.
    suites : tuple of callable
        Each takes the key, and raises when it notices something.
    chosen : callable, optional
        Which mutants to try: a test on :class:`Mutant`.
    progress : callable, optional
        Called with (how many, of how many) after each mutant.
    by : str, optional
        The row whose suites run; by default the broken one.
    limit : float
        Most seconds that one suite may take on one mutant.

    Returns
    -------
    list of (Mutant, str or None)
        With what noticed it, None for a survivor.

    Raises
    ------
    RuntimeError
        When a suite fails on the method as it is.
    """
    name, path, slug = place(key)
    key = by or key
    tree, found = mutants(path.read_text(encoding="utf-8"), slug)
    found = [m for m in found if chosen is None or chosen(m)]
    cost = {}
    with installed(name, path, copy.deepcopy(tree)):
        for suite in suites:
            for _ in range(2):  # the first run also imports and compiles
                start = time.perf_counter()
                failure = notices(key, {suite: 300.0})
                cost[suite] = time.perf_counter() - start
                if failure:
                    raise RuntimeError(f"{key} fails without a mutant: {failure}")
    limits = {s: min(limit, max(3.0, 10 * cost[s])) for s in sorted(suites, key=cost.get)}
    outcomes = []
    for mutant in found:
        try:
            with installed(name, path, mutant.tree(tree)):
                outcomes.append((mutant, notices(key, limits)))
        except Exception as failure:  # it does not even import
            outcomes.append((mutant, f"import: {failure}"))
        if progress is not None:
            progress(len(outcomes), len(found))
    return outcomes


def declared(key):
    """The equivalent mutants that the row's test file declares, with their reasons."""
    path = tests_of(key)
    for node in ast.parse(path.read_text()).body if path.is_file() else ():
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EQUIVALENT":
            return ast.literal_eval(node.value)
    return {}


def judge(outcomes, equivalent):
    """The report of a hunt: survivors, rate, and what is wrong with the declarations.

    Parameters
    ----------
    outcomes : list of (Mutant, str or None)
        From :func:`hunt`.
    equivalent : dict
        Name of a mutant -> reason why it changes no number.

    Returns
    -------
    dict
        ``mutants, noticed, rate, survivors, equivalent, problems, ok``.
    """
    alive = {m.name for m, by in outcomes if by is None}
    every = {m.name for m, _ in outcomes}
    survivors = [m for m, by in outcomes if by is None and m.name not in equivalent]
    counted = len(every) - len(alive & set(equivalent))
    rate = 1.0 - len(survivors) / counted if counted else 0.0
    wrong = {
        "no such mutant": equivalent.keys() - every,
        "noticed": equivalent.keys() & (every - alive),
        "no reason": {n for n, reason in equivalent.items() if not reason},
    }
    problems = [f"declared equivalent, {why}: {n}" for why, names in wrong.items() for n in names]
    if len(equivalent) > MOST_EQUIVALENT * len(every):
        problems.append(f"{len(equivalent)} declared equivalent, at most 5 % of {len(every)}")
    return {
        "mutants": len(every),
        "noticed": len(every) - len(alive),
        "rate": rate,
        "survivors": [{"line": m.line, "mutant": m.name} for m in survivors],
        "equivalent": dict(equivalent),
        "problems": sorted(problems),
        "ok": rate >= RATE and not problems,
    }


def _progress(done, total):
    if sys.stderr.isatty():
        print(f"\r{done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)


def main(argv=None):
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("key")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--list", action="store_true", help="print the mutants, run nothing")
    parser.add_argument("--by", help="the row whose suites run (needed for core/<part>)")
    args = parser.parse_args(argv)
    registry.get(args.by or args.key)
    if args.list:
        _, path, slug = place(args.key)
        for mutant in mutants(path.read_text(encoding="utf-8"), slug)[1]:
            print(f"{mutant.line:4} {mutant.name}")
        return 0
    start = time.perf_counter()
    try:
        suites = SUITES
        if args.by:
            suites = (*SUITES, lambda _: own_suite(args.key))
        outcomes = hunt(args.key, suites, progress=_progress, by=args.by)
    except RuntimeError as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 2
    report = judge(outcomes, declared(args.key))
    report["seconds"] = round(time.perf_counter() - start, 1)
    if args.json:
        print(json.dumps({"key": args.key, **report}, indent=1))
        return 0 if report["ok"] else 1
    for survivor in report["survivors"]:
        print(f"survived  line {survivor['line']}: {survivor['mutant']}")
    print(*report["problems"], sep="\n", end="\n" if report["problems"] else "")
    print(f"{args.key}: {report['noticed']} of {report['mutants']} mutants noticed, "
          f"{len(report['equivalent'])} declared equivalent, {report['rate']:.1%} of the others, "
          f"{report['seconds']} s")  # fmt: skip
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    with contextlib.suppress(ImportError):
        import hypothesis

        phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
        hypothesis.settings.register_profile(
            "mutants", max_examples=8, derandomize=True, deadline=None, database=None, phases=phases
        )
        hypothesis.settings.load_profile("mutants")
    sys.exit(main())
