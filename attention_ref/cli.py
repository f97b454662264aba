"""The command line: list, show, status, verify, run, golden, check, bench, student, new, doctor.

Results go to stdout, progress to stderr. Exit code 0: fine; 1: something checked does not hold;
2: the command itself was wrong (unknown key, bad option).
"""

import argparse
import json
import os
import sys

from attention_ref.core.errors import BackendUnavailable, GoldenFileError, ParameterError


def main(argv=None):
    """Run one command.

    Parameters
    ----------
    argv : list of str, optional
        Arguments; those of the process by default.

    Returns
    -------
    int
        0 fine, 1 something does not hold, 2 misuse.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 2
    try:
        return args.function(args)
    except (ParameterError, BackendUnavailable) as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 2
    except GoldenFileError as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader, e.g. head, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser():
    parser = argparse.ArgumentParser(prog="attention_ref", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def add(name, function, text, json_too=True):
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(function=function)
        if json_too:
            sub.add_argument("--json", action="store_true", help="print JSON")
        return sub

    sub = add("list", _list, "the methods that can be called")
    sub.add_argument("--family", help="only this family")
    sub.add_argument("--kind", help="only this kind")
    sub.add_argument("--all", action="store_true", help="every row of the catalog")
    add("show", _show, "one method: formulas, arguments, source").add_argument("key")
    sub = add("status", _status, "what is done of every row of the mission")
    sub.add_argument("--family", help="only this family")
    sub = add("verify", _verify, "run the checks of methods and record the green ones")
    sub.add_argument("keys", nargs="*", metavar="KEY")
    sub = add("run", _run, "call a method on one of its example inputs")
    sub.add_argument("key")
    sub.add_argument("--case", default=None, help="name of the example (default: the first)")
    sub.add_argument("--backend", default="reference", help="reference, numba, cuda or auto")
    sub.add_argument("--seed", type=int, default=0, help="seed of the example")
    _golden_parser(add("golden", None, "golden vectors", json_too=False))
    sub = add("check", _check, "compare a function of yours with a method")
    sub.add_argument(
        "target", metavar="FUNCTION", help="module:name, e.g. my_package.attention:forward"
    )
    sub.add_argument("--against", default="scores/dot_product", metavar="KEY")
    sub.add_argument("--backward", help="module:name of its backward, for NumPy functions")
    sub.add_argument("--framework", help="numpy, torch, jax or cupy (default: guessed)")
    sub.add_argument("--layout", default="BHTD", help="BHTD, BTHD, HTD or TD")
    sub.add_argument("--names", help='our names -> its names as JSON: {"q": "query"}')
    sub.add_argument("--fixed", help='further arguments as JSON: {"enable_gqa": true}')
    sub.add_argument("--align", help="its causal alignment: lower_right or upper_left")
    sub.add_argument("--mask", help="its masks: attend (True = may attend), blocked or additive")
    sub.add_argument("--empty-row", help="a query without keys: zero, nan or uniform")
    sub.add_argument("--precision", help="what it computes in inside, e.g. float32")
    sub.add_argument("--case", action="append", help="only this case (may be repeated)")
    sub.add_argument("--dtype", action="append", help="only this dtype (may be repeated)")
    sub.add_argument("--sizes", help="other lengths for every case, e.g. T=128,S=128,D=64")
    sub.add_argument("--device", help="where PyTorch tensors live, e.g. cuda")
    sub = add("bench", _bench, "ratios against other libraries, in one run")
    sub.add_argument("--quick", action="store_true", help="small sizes, under 20 s")
    sub.add_argument("--out", help="also measure growth and memory; write JSON here, SVG beside")
    sub = add("student", _student, "tutorials without their solutions", json_too=False)
    sub.add_argument("keys", nargs="*", metavar="KEY")
    sub.add_argument("--out", required=True, help="folder to write to")
    sub = add("new", _new, "write the stubs of a row", json_too=False)
    sub.add_argument("key")
    add("doctor", _doctor, "versions, backends and what is missing")
    return parser


def _golden_parser(parser):
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, function, text in (
        ("verify", _golden_verify, "compare golden files with today's methods"),
        ("export", _golden_export, "write self-describing vectors for any language"),
        ("write", _golden_write, "write golden files that are missing or no longer hold"),
        ("calibrate", _golden_calibrate, "measure the bounds again and write them"),
    ):
        sub = actions.add_parser(name, help=text, description=text)
        sub.set_defaults(function=function)
        sub.add_argument("keys", nargs="*", metavar="KEY")
        sub.add_argument("--json", action="store_true", help="print JSON")
        if name == "export":
            sub.add_argument("--out", required=True, help="folder to write to")
            sub.add_argument("--format", default="npz", help="npz, safetensors or raw")
            sub.add_argument("--dtype", action="append", help="only this dtype (repeatable)")


# ------------------------------------------------------------------------------ output


def _color(text, code):
    if os.environ.get("NO_COLOR") or not sys.stdout.isatty():
        return text
    return f"\033[{code}m{text}\033[0m"


def _print_json(value):
    print(json.dumps(value, indent=1))


def _table(rows, columns):
    """Left-aligned columns; nothing is cut."""
    rows = [[str(r[c]) for c in columns] for r in rows]
    widths = [max(len(c), *(len(r[i]) for r in rows)) if rows else len(c)
              for i, c in enumerate(columns)]  # fmt: skip
    for cells in ([c for c in columns], *rows):
        print("  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip())


def _keys(args):
    """The keys named, or all written ones; an unknown key is misuse."""
    from attention_ref.core.registry import get, written

    for key in args.keys:
        get(key)
    return args.keys or written()


def _progress(total):
    """A progress callback on stderr, silent without a terminal."""
    if not sys.stderr.isatty():
        return lambda key: None
    done = []

    def step(key):
        done.append(key)
        end = "\n" if len(done) == total else ""
        print(f"\r\033[K{len(done)}/{total} {key}", end=end, file=sys.stderr, flush=True)

    return step


# ------------------------------------------------------------------------------ commands


def _list(args):
    from attention_ref.core.registry import catalog, keys, written

    chosen = set(keys(args.family, args.kind))
    there = set(written())
    rows = [
        {"key": k, "kind": r["kind"], "written": k in there, "title": r["title"]}
        for k, r in catalog().items()
        if (k in chosen) or (args.all and (args.family or k.split("/")[0]) == k.split("/")[0]
                             and (args.kind or r["kind"]) == r["kind"])
    ]  # fmt: skip
    rows.sort(key=lambda r: r["key"])
    if args.json:
        _print_json(rows)
    else:
        _table(rows, ["key", "kind", "title"])
    return 0


def _show(args):
    import inspect

    from attention_ref.core.registry import catalog, get

    spec, row = get(args.key), catalog()[args.key]
    module = inspect.getmodule(spec.main)
    signature = f"{spec.main.__name__}{inspect.signature(spec.main)}"
    if args.json:
        _print_json(
            row
            | {
                "signature": signature,
                "claim": spec.claim,
                "verified_by": list(spec.verified_by),
                "flags": sorted(spec.flags),
                "forms": sorted(spec.forms),
                "reductions": [{"key": r.key, "says": r.says} for r in spec.reduces_to],
                "reconstruction": spec.reconstruction,
                "doc": inspect.getdoc(module),
            }
        )
        return 0
    print(_color(f"{args.key} · {row['title']}", "1"))
    print(f"kind {row['kind']}, grade {row['grade']}, verified by {', '.join(spec.verified_by)}")
    if spec.reconstruction:
        print(f"reconstruction: {spec.reconstruction}")
    print(f"\n{inspect.getdoc(module)}\n\n{signature}\n\n{inspect.getdoc(spec.main)}")
    print(f"\nclaim: {spec.claim}")
    for reduction in spec.reduces_to:
        print(f"identity: {reduction.says} ({reduction.key})")
    return 0


def _status(args):
    from attention_ref.kit.records import status

    rows = [r for r in status() if args.family in (None, r["key"].split("/")[0])]
    if args.json:
        _print_json(rows)
        return 0
    parts = ("module", "backward", "tests", "conformance", "golden", "tutorial", "figure")
    shown = [
        {"key": r["key"], "kind": r["kind"]}
        | {p: "yes" if r[p] else "-" for p in parts}
        | {"claim": r["claim"] or "-", "done": "done" if r["done"] else "-"}
        for r in rows
        if r["module"]
    ]
    _table(shown, ["key", "kind", *parts, "claim", "done"])
    print(f"\n{sum(r['done'] for r in rows)} of {len(rows)} rows done; the others are not begun")
    return 0


def _verify(args):
    from attention_ref.kit.records import verify

    keys = _keys(args)
    reports = verify(keys, progress=_progress(len(keys)))
    if args.json:
        _print_json(reports)
    else:
        for r in reports:
            mark = _color("ok  ", "32") if r["ok"] else _color("FAIL", "31")
            print(f"{mark} {r['key']}: {r['checks']['passed']} checks, "
                  f"{r['tests']['passed']} tests, {r['seconds']:.1f} s")  # fmt: skip
            for check, reason in r["opted_out"].items():
                print(f"     opted out of {check}: {reason}")
            for failure in r["failures"]:
                print(f"     {failure}")
    return 0 if all(r["ok"] for r in reports) else 1


def _run(args):
    import inspect

    import numpy as np

    from attention_ref.core import check
    from attention_ref.core.registry import choose, get
    from attention_ref.kit import tree

    spec = get(args.key)
    cases = spec.example(np.random.default_rng(args.seed))
    case = args.case or next(iter(cases))
    check.option("case", case, tuple(cases))
    forward, _ = choose(spec, args.backend)
    kwargs = dict(cases[case])
    if isinstance(kwargs.get("rng"), int):
        kwargs["rng"] = np.random.default_rng(kwargs["rng"])
    result = forward(**kwargs)
    out = tree.flatten(result[0] if spec.backward_function is not None else result)
    if args.json:
        _print_json(
            {
                "key": args.key,
                "case": case,
                "cases": list(cases),
                "backend": args.backend,
                "out": {n: np.asarray(a).tolist() for n, a in out.items()},
            }
        )
        return 0
    given = ", ".join(
        f"{n} {a.shape}" if isinstance(a, np.ndarray) else f"{n}={a!r}"
        for n, a in cases[case].items()
    )
    print(f"{inspect.unwrap(forward).__name__}({given})   # case {case} of {', '.join(cases)}")
    for name, a in out.items():
        print(f"{name} {a.shape} {a.dtype}\n{np.array2string(a, precision=6, threshold=60)}")
    return 0


def _load(path):
    """The object behind module:name."""
    import importlib

    module, _, name = path.partition(":")
    if not name:
        raise ParameterError(f"function is {path!r}, expected module:name")
    sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as failure:  # whatever the module does when it is imported
        said = f"{type(failure).__name__}: {failure}"
        raise ParameterError(f"function {path!r} cannot be loaded: {said}") from None
    finally:
        sys.path.pop(0)
    return found


def _check(args):
    from attention_ref import kit

    told = {"align": args.align, "mask": args.mask, "empty_row": args.empty_row,
            "precision": args.precision}  # fmt: skip
    report = kit.check(
        _load(args.target),
        args.against,
        backward=_load(args.backward) if args.backward else None,
        framework=args.framework,
        layout=args.layout,
        cases=args.case,
        dtypes=args.dtype or ("float64", "float32"),
        names=_object("names", args.names),
        fixed=_object("fixed", args.fixed),
        sizes=_sizes(args.sizes),
        device=args.device,
        conventions={n: a for n, a in told.items() if a},
    )
    print(report.to_json() if args.json else report)
    return 0 if report.ok else 1


def _object(name, text):
    """A dictionary from JSON text, None without."""
    if text is None:
        return None
    try:
        found = json.loads(text)
    except ValueError as failure:
        raise ParameterError(f"{name} is {text!r}, expected a JSON object: {failure}") from None
    if not isinstance(found, dict):
        raise ParameterError(f'{name} is {text!r}, expected a JSON object like {{"q": "query"}}')
    return found


def _sizes(text):
    """{"T": 2} from "T=2"."""
    found = {}
    for part in (text or "").split(","):
        letter, _, number = part.partition("=")
        if part and not (number.isdigit() and letter):
            raise ParameterError(f"sizes is {text!r}, expected letters and lengths like T=2,S=3")
        if part:
            found[letter] = int(number)
    return found


def _golden_verify(args):
    from attention_ref.core.registry import get
    from attention_ref.kit import checks

    failures = {}
    keys = _keys(args)
    for key in keys:
        results = checks.run(get(key), only=("golden",))
        failures[key] = [f"{r.case}: {r.message}" for r in results if not r.ok]
    if args.json:
        _print_json(failures)
    else:
        for key, found in failures.items():
            print(f"{'FAIL' if found else 'ok  '} {key}", *found, sep="\n     " if found else "")
    return 1 if any(failures.values()) else 0


def _golden_export(args):
    import pathlib

    from attention_ref.kit import export, lowp

    base, written = pathlib.Path(args.out).resolve(), []
    for key in _keys(args):
        paths = export.export(key, base, args.format, args.dtype or tuple(lowp.EPS))
        written += [path.relative_to(base).as_posix() for path in paths]
    if args.json:
        _print_json(written)
    else:
        print("\n".join(written))
    return 0


def _golden_write(args, force=False):
    from attention_ref.core.registry import get
    from attention_ref.kit import golden
    from attention_ref.kit.compare import CheckFailure

    red = False
    for key in _keys(args):
        try:
            wrote = golden.write(get(key), force=force)
            print(f"{'wrote' if wrote else 'holds'} {key}")
        except (CheckFailure, OSError) as failure:
            red = True
            print(f"FAIL  {key}: {failure}")
    return 1 if red else 0


def _golden_calibrate(args):
    return _golden_write(args, force=True)


def _bench(args):
    import datetime
    import importlib.metadata
    import pathlib
    import platform

    from attention_ref.kernels import bench
    from attention_ref.kit.tutorial import encode, write_files

    rows = bench.run_benchmarks(quick=args.quick)
    packages = [p for p in ("numpy", "numba", "torch", "entmax") if _version(p)]
    found = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {p: importlib.metadata.version(p) for p in packages},
        "rows": rows,
    }
    if args.out is not None:
        path = pathlib.Path(args.out)
        found["memory"] = bench.bench_memory(1024 if args.quick else 16384)
        found["ceiling"] = bench.bench_ceiling(*((256, 1024, 64) if args.quick else ()))
        found["growth"] = bench.bench_growth(*(((256, 512, 1024), 512) if args.quick else ()))
        write_files({path: encode(found)})
        bench.draw(found["growth"], path.with_suffix(".svg"))
    if args.json:
        _print_json(found)
    else:
        shown = [
            {k: f"{v:.3g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
        ]
        _table(shown, list(shown[0]) if shown else ["pattern"])
    return 0


def _version(package):
    """The installed version of a package, or None."""
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _student(args):
    import pathlib

    from attention_ref.core.registry import nearest
    from attention_ref.kit import golden, tutorials
    from attention_ref.kit.student import strip
    from attention_ref.kit.tutorial import write_files

    root, there = golden.checkout(), tutorials.keys()
    if root is None:
        raise ParameterError("tutorials come with a source checkout, this is an installed package")
    if unknown := [key for key in args.keys if key not in there]:
        near = nearest(unknown[0], there)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ParameterError(f"key is {unknown[0]!r}, which has no tutorial{hint}")
    base = pathlib.Path(args.out).resolve()
    if base == root or base in root.parents:
        raise ParameterError(f"--out is {args.out}, expected another folder than the teacher's")
    copies = {}
    for key in args.keys or there:
        text = (root / "tutorials" / f"{key}.py").read_text(encoding="utf-8")
        copies[base / "tutorials" / f"{key}.py"] = strip(text).encode()
    write_files(copies)
    print("\n".join(str(path.relative_to(base)) for path in copies))
    return 0


def _new(args):
    from attention_ref.kit import golden, scaffold

    root = golden.checkout()
    if root is None:
        raise ParameterError("new works in a source checkout, this is an installed package")
    for path in scaffold.new(args.key, root):
        print(path)
    return 0


def _doctor(args):
    import platform

    from attention_ref import __version__
    from attention_ref.core.registry import catalog, written
    from attention_ref.kit.golden import checkout

    optional = ("torch", "jax", "entmax", "onnx", "cupy-cuda12x", "cupy-cuda13x", "mpi4py",
                "sphinx", "scikit-learn", "tqdm", "hypothesis", "pytest")  # fmt: skip
    report = {
        "attention_ref": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "needed": {p: _version(p) for p in ("numpy", "scipy", "numba", "matplotlib")},
        "optional": {p: _version(p) for p in optional},
        "gpu": _gpu(),
        "methods": f"{len(written())} of {len(catalog())} rows have a method file",
        "checkout": checkout() is not None,
    }
    missing = [p for p, v in report["needed"].items() if v is None]
    if args.json:
        _print_json(report)
    else:
        for name, value in report.items():
            if isinstance(value, dict):
                value = ", ".join(f"{p} {v or 'missing'}" for p, v in value.items())
            print(f"{name:14} {value}")
        for package in missing:
            print(f"needed and missing: {package}; pip install {package}")
    return 1 if missing else 0


def _gpu():
    try:
        import cupy

        if cupy.cuda.is_available():
            return cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
        return "cupy is installed, no GPU is visible"
    except ImportError:
        return "none: cupy is not installed (pip install attention_ref[gpu-cuda12])"
