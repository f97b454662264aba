"""The key of a result: a hash of all the code that it rests on, and of nothing else.

A figure, a golden file or a green record is stale when the code behind it changed. The key of a
file is a hash of its syntax tree, without comments and docstrings, and of every function, class
and constant of the library that it reaches by name, found without importing anything::

    core.softmax_forward        follows the imports to core/dense.py, that function only
    get("scores/dot_product")   a string that is a key stands for that method's whole file

A key that is put together at run time (an f-string) is not seen.
"""

import ast
import builtins
import functools
import hashlib
import re
from pathlib import Path

from attention_ref.core.registry import PACKAGE

LIBRARY = PACKAGE.name
KEY = re.compile(r"[a-z][a-z0-9_]*/[a-z][a-z0-9_]*")
INSTRUMENTS = tuple(f"{LIBRARY}.kit.{part}" for part in ("sources", "tutorial", "tutorials"))
"""Left out: they time, print and write results, and compute none of them."""

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_SCOPES = {*_FUNCTIONS, *_COMPREHENSIONS}


def source_key(path, root=None):
    """The key of a file: it changes when the file or anything that it reaches changes.

    Parameters
    ----------
    path : str or Path
        A Python file, absolute or relative to ``root``.
    root : str or Path, optional
        The folder that holds the package; by default that of the running library.

    Returns
    -------
    str
        The first 16 hexadecimal digits of a sha256.
    """
    digest = hashlib.sha256()
    for label, text in sorted(_reach(path, root).items()):
        digest.update(f"{label}\n{text}\n".encode())
    return digest.hexdigest()[:16]


def reached(path, root=None):
    """Everything that the key of a file covers, as sorted "module:name" ("module:*" for a file)."""
    return sorted(_reach(path, root))


def _reach(path, root):
    """Walk from the whole file along names; returns {"module:name": normalised text}."""
    root = Path(root if root is not None else PACKAGE.parent).resolve()
    start = (root / path).resolve()
    inside = start.relative_to(root) if start.is_relative_to(root) else Path(start.name)
    library = _Library(root)
    first = library.load(start, ".".join(inside.with_suffix("").parts))
    texts, whole, waiting = {}, {first.name}, [(first, "*")]
    while waiting:
        module, name = waiting.pop()
        if (module.name, name) in texts or (name != "*" and module.name in whole):
            continue
        texts[module.name, name], references = module.item(name)
        for target in references:
            found = library.resolve(module, target)
            whole.update(m.name for m, n in found if n == "*")
            waiting += found
    kept = {(m, n): text for (m, n), text in texts.items() if n == "*" or m not in whole}
    return {f"{m}:{n}": text for (m, n), text in kept.items()}


class _Library:
    """The modules of the package as files; remembers within one walk which exist."""

    def __init__(self, root):
        self.root, self.modules = root, {}

    def load(self, path, name):
        status = path.stat()
        return _parse(path, name, status.st_mtime_ns, status.st_size)

    def find(self, dotted):
        """The module of a dotted name, or None when there is no such file."""
        if dotted not in self.modules:
            base = self.root.joinpath(*dotted.split("."))
            found = next((p for p in (base.with_suffix(".py"), base / "__init__.py")
                          if dotted.split(".")[0] == LIBRARY and p.is_file()), None)  # fmt: skip
            self.modules[dotted] = found and self.load(found, dotted)
        return self.modules[dotted]

    def resolve(self, module, target):
        """The items that a reference means: ("key", k), or a chain of names seen from a module."""
        if target[0] == "key":
            method = self.find(f"{LIBRARY}.methods." + target[1].replace("/", "."))
            return [(method, "*")] if method else []
        name, *rest = target[1:]
        if target[0] == "chain" and name in module.bindings:
            return [(module, name)]
        dotted = module.imports.get(name) if target[0] == "chain" else name
        return self.follow([*dotted.split("."), *rest]) if dotted else []

    def follow(self, parts, seen=()):
        """From ``attention_ref.core.softmax_forward`` to where it is defined."""
        module, depth = None, 0
        while depth < len(parts) and self.find(".".join(parts[: depth + 1])):
            depth += 1
            module = self.find(".".join(parts[:depth]))
        if module is None or module.name.startswith(INSTRUMENTS):
            return []
        if depth == len(parts):  # the module itself is handed on: whatever it holds may be used
            return [] if module.path.name == "__init__.py" else [(module, "*")]
        name = parts[depth]
        if name in module.bindings:
            return [(module, name)]
        onward = module.imports.get(name)
        if onward is None or (module.name, name) in seen:
            return []
        return self.follow([*onward.split("."), *parts[depth + 1 :]], (*seen, (module.name, name)))


@functools.lru_cache(maxsize=4096)
def _parse(path, name, mtime, size):
    """One file, parsed once as long as it is not written again."""
    return _Module(path, name)


class _Module:
    """A parsed file: which statement binds which name, and where imported names come from."""

    def __init__(self, path, name):
        self.path, self.name, self.items = path, name, {}
        self.body = ast.parse(path.read_bytes()).body
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        self.package = package
        self.imports, self.bindings = {}, {}
        for statement in self.body:
            if isinstance(statement, (ast.Import, ast.ImportFrom)):
                self.imports.update(_imported(statement, package))
                continue
            for bound in _bound([statement]):
                self.bindings.setdefault(bound, []).append(statement)

    def item(self, name):
        """Normalised text of one definition ("*": of the file), and the references in it."""
        if name not in self.items:
            reader = _Reader(self.package)
            for statement in self.body if name == "*" else self.bindings[name]:
                reader.read(statement)
            self.items[name] = "".join(reader.text), sorted(reader.references)
        return self.items[name]


def _imported(statement, package):
    """Names that an import binds -> the dotted names they stand for."""
    if isinstance(statement, ast.Import):
        return {a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0]
                for a in statement.names}  # fmt: skip
    parts = package.split(".")
    parts = parts[: len(parts) - statement.level + 1] if statement.level else []
    base = ".".join([*parts, *([statement.module] if statement.module else [])])
    return {a.asname or a.name: f"{base}.{a.name}" for a in statement.names}


def _bound(statements):
    """Names bound by statements in their own scope: not inside nested functions and classes."""
    names, stack = set(), list(statements)
    while stack:
        node = stack.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name):
            if not isinstance(node.ctx, ast.Load):
                names.add(node.id)
        elif not isinstance(node, (ast.Lambda, *_COMPREHENSIONS)):
            stack += ast.iter_child_nodes(node)
    return names


class _Reader:
    """One pass over a definition: writes its normalised text and collects what it refers to."""

    def __init__(self, package):
        self.package, self.text, self.references, self.scopes = package, [], set(), []

    def read(self, node, inner=False):
        """Write a node; ``inner`` marks the ``a.b`` of a chain ``a.b.c``, noted already."""
        kind = type(node)
        if kind is ast.Expr and isinstance(getattr(node.value, "value", None), str):
            return  # a docstring
        chain = kind is ast.Attribute or kind is ast.Name
        if chain and not inner:
            self.refer(node)
        opened = kind in _SCOPES and self.enter(node)
        write = self.text.append
        write(f"{kind.__name__}(")
        for field in kind._fields:
            value = getattr(node, field, None)
            if value is None or value == [] or field == "ctx":
                continue
            write(f"{field}=")
            for part in value if type(value) is list else (value,):
                if isinstance(part, ast.AST):
                    self.read(part, chain)
                else:
                    self.constant(part)
        write(")")
        if opened:
            self.scopes.pop()

    def enter(self, node):
        """Open the scope of a function or a comprehension: its own names mean nothing outside."""
        if isinstance(node, _FUNCTIONS):
            body = [node.body] if isinstance(node, ast.Lambda) else node.body
            every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs,
                     node.args.vararg, node.args.kwarg]  # fmt: skip
            scope = dict.fromkeys(_bound(body) | {a.arg for a in every if a is not None})
            local = [s for part in body for s in ast.walk(part)]
            for statement in local:
                if isinstance(statement, (ast.Import, ast.ImportFrom)):
                    scope.update(_imported(statement, self.package))
        else:
            scope = dict.fromkeys(_bound([g.target for g in node.generators]))
        self.scopes.append(scope)
        return True

    def refer(self, node):
        """Note a chain of names a.b.c, seen from the innermost scope that binds a."""
        chain = []
        while isinstance(node, ast.Attribute):
            chain.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name) or not isinstance(node.ctx, ast.Load):
            return
        chain = tuple(reversed([*chain, node.id]))
        for scope in reversed(self.scopes):
            if chain[0] in scope:
                if scope[chain[0]]:
                    self.references.add(("dotted", scope[chain[0]], *chain[1:]))
                return
        if not hasattr(builtins, chain[0]):
            self.references.add(("chain", *chain))

    def constant(self, value):
        if isinstance(value, str) and KEY.fullmatch(value):
            self.references.add(("key", value))
        self.text.append(repr(value) + ",")
