"""Pages made from what is there: one a method from its SPEC, the gallery's sources, the tables.

Nothing of the library is executed but imports: figures and printed output come from ``figures/``,
where ``make tutorial`` left them. Everything written goes to folders that git ignores.
"""

import ast
import html
import inspect
import json
import re
import textwrap
from pathlib import Path
from xml.sax.saxutils import escape

DOCS = Path(__file__).resolve().parents[1]
ROOT = DOCS.parent
STAGED = DOCS / "_build" / "staged"
METHODS = DOCS / "methods"

ORDER = (
    "scores", "normalizers", "heads", "patterns", "routing", "linear", "recurrent",
    "mixers", "cross", "vision", "structured", "regularizers", "steering", "cache", "distributed",
    "explain", "theory", "training", "tasks", "surveys", "families", "engine",
)  # fmt: skip
"""The families in the order in which a reader meets the parts of attention."""


def write(path, text):
    """Write only what changed, so that Sphinx rebuilds only that."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def heading(text, line="="):
    return f"{text}\n{line * len(text)}\n\n"


def result(key):
    """The json beside a figure, or None."""
    path = ROOT / "figures" / f"{key}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


# ------------------------------------------------------------------------------ methods


def there():
    """Keys of the methods that import and have a SPEC; one that is being written has no page."""
    from attention_ref.core.registry import get, written

    keys = []
    for key in written():
        try:
            get(key)
            keys.append(key)
        except Exception as failure:
            print(f"no page for {key}: {failure}")
    return keys


def methods():
    """One page a method, one a family, and their index."""
    from attention_ref.core.registry import catalog, get

    families = {}
    for key in there():
        families.setdefault(key.split("/")[0], []).append(key)
        write(METHODS / f"{key}.rst", method_page(key, get(key), catalog()[key]))
    for family, keys in families.items():
        write(METHODS / family / "index.rst", family_page(family, keys))
    index = heading("Methods") + (
        "Families say which part of attention changes. Each page stands at the method's key and "
        "is made from its SPEC.\n\n.. toctree::\n   :maxdepth: 2\n\n"
    )
    index += "".join(f"   {f}/index\n" for f in ORDER if f in families)
    write(METHODS / "index.rst", index)
    for stale in METHODS.glob("*/*.rst"):
        slug = f"{stale.parent.name}/{stale.stem}"
        if stale.stem != "index" and slug not in there():
            stale.unlink()


def family_page(family, keys):
    import importlib

    from attention_ref.core.registry import get

    text = about(importlib.import_module(f"attention_ref.methods.{family}"))
    page = f".. _family-{family}:\n\n" + heading(family) + text + "\n\n"
    page += ".. toctree::\n   :maxdepth: 1\n   :hidden:\n\n"
    page += "".join(f"   {k.split('/')[1]}\n" for k in keys) + "\n"
    together = result(f"families/{family}")
    if together is not None:
        page += f".. figure:: ../../../figures/families/{family}.svg\n"
        page += f"   :alt: the members of {family} on the same input\n\n"
        page += f"   The members side by side: :doc:`lecture </gallery/families/{family}>`.\n\n"
    page += heading("Members", "-") + members(keys, (together or {}).get("members", {}))
    edges = [(key, r) for key in keys for r in get(key).reduces_to]
    if edges:
        page += "\n" + heading("Identities", "-")
        page += "An arrow says: with the arguments named, the method *is* the other one, outputs "
        page += "and gradients. Each is data in the SPEC, and the test suite runs every one.\n\n"
        write(METHODS / family / "identities.svg", graph(edges))
        page += f".. image:: identities.svg\n   :alt: identity graph of {family}\n\n"
        page += "".join(
            f"#. :doc:`/methods/{key}` is :doc:`/methods/{r.key}`: {prose([r.says])[0]}\n"
            for key, r in edges
        )
    return page


PROPERTIES = {
    "row_stochastic": "rows sum to 1", "permutation_equivariant": "order free",
    "positional": "positions count", "shift_invariant": "keys may be shifted",
    "linear_in_v": "linear in values", "always_causal": "causal by nature", "causal": "causal",
}  # fmt: skip
"""Flags of a SPEC in words."""


def members(keys, measured_together):
    """The table of a family: kind, verdict, cost as its lecture measured it, properties."""
    from attention_ref.core.registry import catalog, get

    rows = []
    for key in keys:
        row, found, spec = catalog()[key], result(key), get(key)
        name, cost = short_name(inspect.getmodule(spec.main), row), measured_together.get(key, {})
        rows.append((
            f":doc:`{name} </methods/{key}>`", row["kind"],
            found["verdict"] if found else "not measured yet",
            *(power(cost.get(what)) for what in ("work", "largest")),
            ", ".join(says for flag, says in PROPERTIES.items() if flag in spec.flags) or "none",
        ))  # fmt: skip
    head = ("method", "kind", "claim", "work grows as", "largest array", "properties")
    return table(head, rows)


def power(x):
    return f":math:`N^{{{x:.1f}}}`" if isinstance(x, (int, float)) else "not measured"


def graph(edges):
    """The identity graph as an SVG: who becomes whom, sinks at the right, arrows numbered.

    Parameters
    ----------
    edges : list of (key, Reduction)
        In the order of the list below the picture.
    """
    targets = {}
    for key, r in edges:
        if r.key != key:
            targets.setdefault(key, set()).add(r.key)
    names = sorted({key for key, _ in edges} | {r.key for _, r in edges})

    def depth(key, seen=()):
        onward = targets.get(key, set()) - set(seen)
        return 1 + max(depth(other, (*seen, key)) for other in onward) if onward else 0

    columns = {}
    for name in names:
        columns.setdefault(depth(name), []).append(name)
    wide, high, step = 190, 24, 34
    tallest = max(map(len, columns.values()))
    place = {}
    for d, column in columns.items():
        x = (max(columns) - d) * (wide + 150) + 10
        room = tallest * step / len(column)
        for i, name in enumerate(column):
            place[name] = x, 10 + (i + 0.5) * room
    numbers = {}
    for i, (key, r) in enumerate(edges, 1):
        numbers.setdefault((key, r.key), []).append((i, r.says))
    lines = []
    for (key, other), said in numbers.items():
        (x0, y0), (x1, y1) = place[key], place[other]
        title = escape("; ".join(f"{i}: {says}" for i, says in said))
        text = ", ".join(str(i) for i, _ in said)
        if key == other:
            lines.append(f'<text x="{x0 + wide + 6}" y="{y0 + 4}" fill="#444">{text}</text>')
            continue
        start, end = x0 + wide, x1 - 7
        middle = (start + end) / 2
        lines.append(
            f'<path d="M{start} {y0:.1f} C{middle} {y0:.1f} {middle} {y1:.1f} {end} {y1:.1f}" '
            f'fill="none" stroke="#0072b2" stroke-width="1.2" marker-end="url(#tip)">'
            f"<title>{title}</title></path>"
            f'<text x="{start + 0.22 * (end - start):.0f}" y="{y0 + 0.13 * (y1 - y0) - 4:.1f}" '
            f'fill="#444">{text}</text>'
        )
    boxes, family = [], edges[0][0].split("/")[0] + "/"
    for name, (x, y) in place.items():
        boxes.append(
            f'<rect x="{x}" y="{y - high / 2:.1f}" width="{wide}" height="{high}" rx="6" '
            f'fill="#f2f6fa" stroke="#0072b2"/>'
            f'<text x="{x + wide / 2}" y="{y + 4:.1f}" text-anchor="middle">'
            f"{escape(name.removeprefix(family))}</text>"
        )
    width, height = max(columns) * (wide + 150) + wide + 60, tallest * step + 20
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" font-size="11">'
        f'<rect width="{width}" height="{height}" fill="white"/>'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="#0072b2"/></marker></defs>'
        + "".join(lines + boxes) + "</svg>\n"
    )  # fmt: skip


def method_page(key, spec, row):
    """The page of one method."""
    module = inspect.getmodule(spec.main)
    name = short_name(module, row)
    unsure = spec.reconstruction or row["grade"] == "D"
    mark = " (reconstruction)" if unsure and "reconstruction" not in name else ""
    page = f".. py:currentmodule:: {module.__name__}\n\n"
    page += f".. _method-{key.replace('/', '-')}:\n\n" + heading(name + mark)
    page += f"``{key}`` · {row['kind']} · :ref:`grade {row['grade']} <grades>`"
    page += f" · verified by {', '.join(spec.verified_by)}\n\n"
    if spec.reconstruction:
        page += f".. admonition:: Reconstruction\n\n   {prose([spec.reconstruction])[0]}\n\n"
    page += about(module) + "\n\n" + reference(row) + measured(key)
    page += code_side_by_side(spec) + called(module, spec) + identities(spec) + parts(key, spec)
    return page


def short_name(module, row):
    """What comes before the colon in the first line of the method's docstring."""
    first = (inspect.getdoc(module) or "").split("\n")[0]
    return first.split(":")[0] if ":" in first else row.get("name") or row["title"]


def spaced(text):
    """Room between a formula and its number, which stands in the next column of the alignment."""
    return re.sub(r"&\s*\((\d+'*)\)", r"&\\qquad(\1)", text)


def prose(lines):
    """Bars in running text are moduli, not the substitutions that reST would look for."""
    out, deep = [], None
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if deep is not None and line.strip() and indent <= deep:
            deep = None
        if deep is None and not line.lstrip().startswith((">>>", "...", "|", "+")):
            spans = re.split(r"(`+[^`]*`+)", line)
            spans[::2] = [re.sub(r"(?<!\\)\|", r"\\|", span) for span in spans[::2]]
            line = "".join(spans)
        if deep is None and (line.strip().startswith(".. math::") or line.rstrip().endswith("::")):
            deep = indent
        out.append(line)
    return out


def about(module):
    """A module's docstring, ready for a page."""
    return spaced("\n".join(prose((inspect.getdoc(module) or "").splitlines())))


def reference(row):
    """The bibliography entry, from the catalog alone."""
    title = row.get("source", "") or row["title"]
    entry = [row.get("authors", ""), str(row.get("year", "")), title]
    text = ". ".join(e for e in entry if e)
    if row.get("link"):
        text += f". `{row['link']} <{row['link']}>`__"
    if row.get("code") and row["code"] != "none":
        text += f". Official code: `{row['code']} <{row['code']}>`__"
    return heading("Reference", "-") + text + ".\n\n"


def measured(key):
    """The figure and the claim's verdict."""
    found = result(key)
    if found is None:
        return ""
    title = found["claim"] or "the figure of the tutorial"
    page = heading("What was measured", "-")
    page += f".. figure:: {'../' * (key.count('/') + 2)}figures/{key}.svg\n   :alt: {title}\n\n"
    page += f"   Made by :doc:`the tutorial </gallery/{key}>`.\n\n"
    if found.get("verdict"):
        said = prose([found["claim"], found["criterion"]])
        page += f"Claim\n   {said[0]}\nCriterion\n   {said[1]}\n"
        paper = found.get("paper")
        page += f"Paper\n   {'gives no number' if paper is None else paper}\n"
        page += f"Verdict\n   **{found['verdict']}** ({found['date']}, three seeds, "
        page += f"{found['seconds']:.0f} s, sources ``{found['sources']}``)\n\n"
    return page


def bare_source(function):
    """Source of a function without its docstring."""
    source = textwrap.dedent(inspect.getsource(function))
    node = ast.parse(source).body[0]
    lines = source.splitlines()
    if ast.get_docstring(node) is not None:
        first, last = node.body[0].lineno - 1, node.body[0].end_lineno
        del lines[first:last]
    return "\n".join(lines)


def code_side_by_side(spec):
    """Forward and backward in two columns on a wide window, one below the other on a narrow one."""
    page = heading("Forward and backward" if spec.backward_function else "Code", "-")
    columns = [f for f in (spec.main, spec.backward_function) if f is not None]
    page += ".. container:: side-by-side\n\n"
    for function in columns:
        page += "   .. code-block:: python\n\n"
        page += textwrap.indent(bare_source(function), "      ") + "\n\n"
    return page


def called(module, spec):
    """numpydoc pages of the public functions, in the order of the file."""
    page = heading("Reference of the functions", "-")
    names = [
        n
        for n, f in vars(module).items()
        if inspect.isfunction(f) and f.__module__ == module.__name__ and not n.startswith("_")
        and n != "example"
    ]  # fmt: skip
    return page + "".join(f".. autofunction:: {n}\n\n" for n in names)


def identities(spec):
    if not spec.reduces_to and not spec.forms:
        return ""
    page = heading("Identities and forms", "-")
    for r in spec.reduces_to:
        page += f"- {prose([r.says])[0]}: :doc:`/methods/{r.key}`\n"
    for name in spec.forms:
        page += f"- form: {name}\n"
    return page + "\n"


def parts(key, spec):
    """Where the five places of the row stand."""
    page = heading("Where it stands", "-")
    record = ROOT / "tests" / "records" / f"{key}.json"
    if record.is_file():
        found = json.loads(record.read_text(encoding="utf-8"))
        page += f"{found['checks']['passed']} generic checks and {found['tests']['passed']} "
        page += f"particular tests green on {found['date']}.\n\n"
        for check, reason in found["opted_out"].items():
            page += f"- opted out of ``{check}``: {reason}\n"
    family, slug = key.split("/")
    for path in (
        f"attention_ref/methods/{key}.py", f"tests/methods/{family}/test_{slug}.py",
        f"tests/golden/{key}.npz", f"tutorials/{key}.py", f"figures/{key}.svg",
    ):  # fmt: skip
        if (ROOT / path).is_file():
            page += f"- ``{path}``\n"
    fast = [n for n in ("numba", "cuda") if getattr(spec, n) is not None]
    return page + (f"- fast paths: {', '.join(fast)}\n" if fast else "") + "\n"


# ------------------------------------------------------------------------------ the gallery


def gallery():
    """Copies of the tutorials, each with its figure and its printed output at the end."""
    import importlib
    import importlib.util

    write(STAGED / "GALLERY_HEADER.rst", heading("Tutorials") + (
        "Each is a lecture that runs alone as a script, derives its method with the same "
        "equation numbers as the code, and measures a claim of the paper. Pages show what "
        "``make tutorial`` measured; building them runs nothing.\n"
    ))  # fmt: skip
    kept = set()
    for path in sorted((ROOT / "tutorials").glob("*/*.py")):
        family, slug = path.parent.name, path.stem
        kept.add(f"{family}/{slug}")
        name = f"attention_ref.methods.{family}"
        text = ""
        if importlib.util.find_spec(name) is not None:
            text = about(importlib.import_module(name))
        write(STAGED / family / "GALLERY_HEADER.rst", heading(family) + text + "\n")
        write(STAGED / family / f"{slug}.py", staged(path, f"{family}/{slug}"))
    for path in STAGED.glob("*/*.py"):
        if f"{path.parent.name}/{path.stem}" not in kept:
            path.unlink()


def staged(path, key):
    """The text of one tutorial for the gallery: the student's copy."""
    from attention_ref.kit.student import strip

    text = spaced(strip(path.read_text(encoding="utf-8"))).rstrip() + "\n"
    text = text.replace(
        "Tutorial(__file__)", f'Tutorial("tutorials/{key}.py")'
    )  # notebooks have no file
    figure, printed = ROOT / "figures" / f"{key}.svg", ROOT / "figures" / f"{key}.txt"
    if figure.is_file():
        thumbnail = f"# sphinx_gallery_thumbnail_path = '../figures/{key}.svg'\n"
        text += "\n# %%\n# What it drew\n# ------------\n#\n"
        text += f"# .. image:: ../../../figures/{key}.svg\n#    :alt: the figure of {key}\n\n"
        text += thumbnail
    if printed.is_file():
        text += "\n# %%\n# What it printed\n# ---------------\n#\n# .. code-block:: text\n#\n"
        lines = printed.read_text(encoding="utf-8").splitlines()
        text += "".join(f"#     {line}".rstrip() + "\n" for line in lines)
    return text


# ------------------------------------------------------------------------------ tables


def tables():
    """What exists, measured bounds and benchmark files, as tables included by the pages."""
    from attention_ref.core.registry import catalog

    kinds, done = {}, there()
    for key, row in catalog().items():
        kinds.setdefault(row["kind"], [0, 0])[1] += 1
        kinds[row["kind"]][0] += key in done
    rows = [(k, str(have), str(total)) for k, (have, total) in sorted(kinds.items())]
    write(METHODS / "kinds.inc", table(("kind", "written", "in the catalog"), rows))
    rows = []
    for key in done:
        path = ROOT / "tests" / "golden" / f"{key}.json"
        if not path.is_file():
            continue
        manifest = json.loads(path.read_text(encoding="utf-8"))
        routes = ", ".join(manifest["routes"]["names"])
        limits = manifest["bounds"]
        rows.append((
            f":doc:`{key} </methods/{key}>`", routes, spread(limits.get("float64", {})),
            spread(limits.get("float32", {})),
        ))  # fmt: skip
    head = ("method", "agreed before it was written", "bounds in float64, eps", "in float32, eps")
    write(METHODS / "bounds.inc", table(head, rows))

    write(METHODS / "zoo.inc", exhibits())
    write(METHODS / "frameworks.inc", frameworks())
    write(METHODS / "course.inc", course())
    write(METHODS / "benchmarks.inc", benchmarks())
    write(METHODS / "patterns.inc", patterns())


def exhibits():
    """The bug zoo from ``docs/zoo.json``: the failing report, and the answer folded below it."""
    text = ""
    for i, x in enumerate(json.loads((DOCS / "zoo.json").read_text(encoding="utf-8")), 1):
        text += heading(f"Exhibit {i}", "~")
        text += f"``{x['key']}``, wrong in the {x['shows']}; "
        text += f"wrong lines in float64: {x['wrong']}.\n\n"
        head = ("case", "what", "error", "bound", "plain")
        rows = [head, *x["lines"]]
        widths = [max(len(r[j]) for r in rows) for j in range(len(head))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in rows]
        if x["smallest"]:
            case, what, sizes = x["smallest"]
            lines += ["", f"smallest failing case: {case}, {what}, {sizes}".rstrip(", ")]
        text += ".. code-block:: text\n\n"
        text += "".join(f"   {line}".rstrip() + "\n" for line in lines) + "\n"
        seen = "".join(f"<li>{html.escape(f'{n}: {says}')}</li>" for n, says in x["properties"])
        seen = f"<ul>{seen}</ul>" if seen else ""
        text += ".. raw:: html\n\n   <details><summary>The answer</summary>"
        text += f"<p><b>{html.escape(x['name'])}</b>: <i>{html.escape(x['says'])}</i></p>"
        text += f"{seen}</details>\n\n"
    return text


def frameworks():
    """The table of conventions, a question a row; a dagger where a test asserts the cell."""
    from attention_ref.kit.frameworks import conventions, questions

    rows = conventions()
    head = ["", *(f"`{r['title']} <{r['source']}>`__ ({r['version']})" if n != "attention_ref"
                  else r["title"] for n, r in rows.items())]  # fmt: skip
    cells = [
        [says, *(r[q] + (" †" if q in r["asserted"] else "") for r in rows.values())]
        for q, says in questions().items()
    ]
    return table(head, cells)


def course():
    """Tutorials in the order of the families, the engine second."""
    units = sorted(
        (p for p in (ROOT / "tutorials").glob("*/*.py")),
        key=lambda p: (ORDER.index(p.parent.name), p.stem != "dot_product", p.stem),
    )
    return "".join(f"#. :doc:`/gallery/{p.parent.name}/{p.stem}`\n" for p in units) or "None yet.\n"


def patterns():
    """The compiled patterns: what each does, by its first line, and the methods that call it."""
    from attention_ref.core.registry import written

    folder, rows = ROOT / "attention_ref" / "kernels", []
    users = {}
    for key in written():
        text = (ROOT / "attention_ref" / "methods" / f"{key}.py").read_text(encoding="utf-8")
        for names in re.findall(r"from attention_ref\.kernels\.\w+ import ([\w, ]+)", text):
            for name in names.split(", "):
                users.setdefault(name, set()).add(key)
    for path in sorted((folder / "numba").glob("[a-z]*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        public = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
        if path.stem in ("tiles", "threads", "elementary") or not public:
            continue
        says = prose([ast.get_docstring(tree).split("\n\n")[0].replace("\n", " ")])[0]
        cuda = "yes" if (folder / "cuda" / f"{path.stem}.py").is_file() else "no"
        keys = ", ".join(f":doc:`/methods/{k}`" for k in sorted(users.get(path.stem, ())))
        rows.append((f"``{path.stem}``", says, cuda, keys or "called directly"))
    return table(("pattern", "what it does", "CUDA text", "methods"), rows)


def benchmarks():
    """Every measured file of ``docs/benchmarks``, newest last; "none" where none was measured."""
    text = ""
    for path in sorted((DOCS / "benchmarks").glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = found["rows"] if isinstance(found, dict) else found
        text += heading(path.stem, "-")
        if isinstance(found, dict):
            about = {k: v for k, v in found.items() if k not in EXTRA}
            text += "; ".join(f"{k}: {v}" for k, v in about.items()) + "\n\n"
            text += growth(path, found)
        head = list(rows[0])
        cells = [[number(row.get(h)) for h in head] for row in rows]
        text += table(head, cells) + "\n"
    if not any((DOCS / "benchmarks").glob("gpu-*.json")):
        text += heading("On a GPU", "-") + "None.\n"
    return text


EXTRA = ("rows", "growth", "memory", "ceiling")
"""Parts of a benchmark file that are shown in a form of their own."""


def growth(path, found):
    """The picture beside a benchmark file, its lines about memory and about the machine."""
    text = ""
    if path.with_suffix(".svg").is_file():
        text += f".. figure:: benchmarks/{path.stem}.svg\n"
        text += "   :alt: time against the number of tokens, ours and PyTorch's\n\n"
        text += "   Time against the number of tokens; exponent of the growth from 2048 on.\n"
        text += "   PyTorch: dense attention (with the mask for the window), a loop over chunks\n"
        text += "   of 64 tokens for the decay, over tokens for the delta rule.\n\n"
    if "memory" in found:
        m = found["memory"]
        text += f"Extra memory of {m['pattern']}, {m['shape']}: {m['extra_mb']:.0f} MB; the scores "
        text += f"alone would take {m['scores_mb']:.0f} MB.\n\n"
    if "ceiling" in found:
        c = found["ceiling"]
        rates = ", ".join(f"{name} {rate:.0f}" for name, rate in c["gflops"].items())
        text += f"What the machine does, in 1e9 operations a second with float32: {rates}; a copy "
        text += f"moves {c['copy_gb_s']:.0f} GB a second. The window kernel of "
        text += f"{c['window']['near']} keys works on tiles of 128 queries and so walks over "
        text += f"{c['window']['walked_for_each_kept']:.2f} pairs for each one it keeps, as any "
        text += "kernel with blocks of 128 does.\n\n"
    return text


def number(x):
    return f"{x:.3g}" if isinstance(x, float) else str(x)


def spread(limits):
    return ", ".join(f"{n} {b}" for n, b in limits.items()) or "exact"


def table(head, rows):
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for cells in (head, *rows):
        lines += [f"   {'* -' if i == 0 else '  -'} {c}" for i, c in enumerate(cells)]
    return "\n".join(lines) + "\n"


def make(app=None):
    """Write every generated page."""
    methods()
    gallery()
    tables()


def family_order(folder):
    """Sections of the gallery in the order of the families."""
    family = re.sub(r".*/", "", str(folder))
    return ORDER.index(family) if family in ORDER else len(ORDER)
