"""Golden vectors: written only after an independent route agreed, read with suspicion.

A row has two files, ``tests/golden/<family>/<slug>.npz`` and ``.json``. The arrays are named
``<case>/in/q``, ``<case>/out/out``, ``<case>/dout/out``, ``<case>/grad/q`` in the words of the
calling contract; the manifest holds the other arguments, the shapes, the sha256 of every array,
the routes that agreed and the measured bounds.
"""

import functools
import hashlib
import importlib.util
import io
import json
import math
import os
import re
import zipfile
from datetime import date
from pathlib import Path

import numpy as np

from attention_ref.core.errors import GoldenFileError
from attention_ref.kit import tree
from attention_ref.kit.compare import CheckFailure, close, error, scales

FORMAT = 1
MAX_BYTES = 4 * 2**20
MAX_MEMBERS = 2000
LARGEST = 64 * 2**10, 20 * 2**10  # bytes of the arrays and of the manifest of one row in the tree
MAX_MANIFEST = 2**20
MEMBER = re.compile(r"[a-z0-9-]{1,60}/(in|out|dout|grad)/[A-Za-z0-9_.]{1,60}\.npy")
DTYPES = ("float32", "float64", "bool", "int32", "int64")
ROUTE_EPS = 4096.0
ROUTE_RTOL = 1e-7


def checkout():
    """The root of the source checkout, or None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "tests").is_dir() and (root / "setup.cfg").is_file() else None


def paths(key, root=None):
    """The two golden files of a row: (npz, json)."""
    base = Path(root) if root is not None else (checkout() or Path()) / "tests" / "golden"
    return base / f"{key}.npz", base / f"{key}.json"


# ------------------------------------------------------------------------------ reading


def load(key, root=None):
    """Read the golden file of a row.

    Parameters
    ----------
    key : str
        ``family/slug``.
    root : path, optional
        Folder of golden files; by default that of the checkout.

    Returns
    -------
    manifest : dict
        The json.
    arrays : dict
        Name -> ndarray (fresh copies).

    Raises
    ------
    GoldenFileError
        Whatever is wrong with either file.
    """
    packed, described = paths(key, root)
    manifest = read_manifest(described)
    try:
        data = _read_bytes(packed, MAX_BYTES)
        arrays = _read_zip(data, packed.name)
    except GoldenFileError:
        raise
    except Exception as failure:
        raise GoldenFileError(f"{packed.name} cannot be read: {failure}") from failure
    listed = manifest["arrays"]
    if set(listed) != set(arrays):
        odd = sorted(set(listed) ^ set(arrays))[:3]
        raise GoldenFileError(f"{packed.name} and its manifest name different arrays: {odd}")
    for name, a in arrays.items():
        got = _describe(a)
        if got != listed[name]:
            raise GoldenFileError(
                f"{packed.name}: {name} is {got}, the manifest says {listed[name]}"
            )
    return manifest, arrays


def _read_bytes(path, limit):
    try:
        size = path.stat().st_size
        if size > limit:
            raise GoldenFileError(f"{path.name} has {size} bytes, at most {limit} are read")
        return path.read_bytes()
    except OSError as failure:
        raise GoldenFileError(f"{path.name} cannot be read: {failure.strerror}") from failure


def read_manifest(path):
    """The json of a golden file, its size, depth and keys checked."""
    text = _read_bytes(Path(path), MAX_MANIFEST)
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as failure:
        raise GoldenFileError(f"{path.name} is not JSON: {failure}") from failure
    needed = {"format", "key", "cases", "arrays", "routes", "bounds"}
    if not isinstance(manifest, dict) or not needed <= set(manifest):
        raise GoldenFileError(f"{path.name} lacks some of {sorted(needed)}")
    if manifest["format"] != FORMAT:
        raise GoldenFileError(f"{path.name} has format {manifest['format']!r}, expected {FORMAT}")
    if not all(isinstance(manifest[k], dict) for k in ("cases", "arrays", "bounds")):
        raise GoldenFileError(f"{path.name}: cases, arrays and bounds must be objects")
    return manifest


def _read_zip(data, label):
    """All members, after the zip directory itself has been found harmless."""
    arrays = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        _inspect(members, label)
        for member in members:
            raw = archive.read(member)
            a = np.lib.format.read_array(io.BytesIO(raw), allow_pickle=False, max_header_size=4096)
            if a.dtype.name not in DTYPES:
                raise GoldenFileError(f"{label}: {member.filename} has dtype {a.dtype}")
            arrays[member.filename.removesuffix(".npy")] = a
    return arrays


def _inspect(members, label):
    if len(members) > MAX_MEMBERS:
        raise GoldenFileError(f"{label} has {len(members)} members, at most {MAX_MEMBERS}")
    names = [m.filename for m in members]
    if len(set(names)) != len(names):
        raise GoldenFileError(f"{label} names a member twice")
    for member in members:
        if not MEMBER.fullmatch(member.filename):
            raise GoldenFileError(f"{label}: odd member name {member.filename!r}")
        if member.flag_bits & 0x1:
            raise GoldenFileError(f"{label}: {member.filename} is encrypted")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise GoldenFileError(f"{label}: {member.filename} has an unknown compression")
    if sum(m.file_size for m in members) > MAX_BYTES:
        raise GoldenFileError(f"{label} unpacks to more than {MAX_BYTES} bytes")


def _describe(a):
    a = np.ascontiguousarray(a)
    return {
        "shape": list(a.shape),
        "dtype": a.dtype.name,
        "sha256": hashlib.sha256(a.tobytes()).hexdigest()[:32],
    }


@functools.lru_cache(maxsize=512)
def _load_cached(key, stamp):
    return load(key)


def _current(key):
    packed, described = paths(key)
    try:
        stamp = (packed.stat().st_mtime_ns, described.stat().st_mtime_ns)
    except OSError:
        raise GoldenFileError(f"{key} has no golden file; hint: make golden KEY={key}") from None
    return _load_cached(key, stamp)


def bounds(key):
    """The measured bounds of a row in eps: dtype -> {output or "d" + argument: bound}."""
    try:
        return _current(key)[0]["bounds"]
    except GoldenFileError:
        return {}


# ------------------------------------------------------------------------------ comparing


def compare(spec, case):
    """Fail unless today's outputs and gradients of one case equal the golden ones.

    Raises
    ------
    CheckFailure
        When an input differs bit by bit, or an output leaves its bound.
    GoldenFileError
        When the file is missing or damaged.
    """
    from attention_ref.kit.checks import cases

    manifest, arrays = _current(spec.key)
    kwargs = cases(spec)[case]
    if case not in manifest["cases"]:
        raise CheckFailure(f"case {case} is not in the golden file; hint: make golden")
    stored = {n.split("/", 1)[1]: a for n, a in arrays.items() if n.startswith(case + "/")}
    _same_inputs(case, kwargs, stored, manifest["cases"][case])
    bound = manifest["bounds"].get("float64", {})
    dout = {n.removeprefix("dout/"): a for n, a in stored.items() if n.startswith("dout/")}
    out, gradients = evaluate(spec, kwargs, dout)
    for name, a in out.items():
        _judge(f"golden {name}", a, stored[f"out/{name}"], bound.get(name, 64.0))
    size = scales({n[5:]: a for n, a in stored.items() if n.startswith("grad/")})
    for name, g in gradients.items():
        limit = bound.get("d" + name, 64.0)
        _judge(f"golden d{name}", g, stored[f"grad/{name}"], limit, size[name])


def _judge(what, got, want, bound, scale=None):
    if np.asarray(want).dtype.kind in "fc":
        close(what, got, want, bound, scale)
    elif not np.array_equal(got, want):
        raise CheckFailure(f"{what} differs: got {np.asarray(got)!r}, expected {want!r}")


def _same_inputs(case, kwargs, stored, options):
    for name, a in kwargs.items():
        if isinstance(a, np.ndarray):
            if not np.array_equal(stored.get(f"in/{name}"), a):
                raise CheckFailure(f"input {name} of {case} changed; hint: make golden")
        elif options["options"].get(name) != _option(a):
            raise CheckFailure(f"option {name} of {case} changed; hint: make golden")


def _option(value):
    """An argument that is no array, as the manifest holds it: a function by its name."""
    return value.__name__ if callable(value) else value


def evaluate(spec, kwargs, dout=None, rng=None):
    """Outputs and gradients of one call as flat dicts; draws a cotangent when ``rng`` is given."""
    out, cache = spec.call(kwargs)
    flat = {k: np.asarray(a) for k, a in tree.flatten(out).items()}
    if spec.backward_function is None:
        return flat, {}
    if rng is not None:
        dout.update(tree.floats(tree.cotangents(rng, out)))
    return flat, spec.backward_function(tree.like(out, dout), cache)


# ------------------------------------------------------------------------------ writing


def particular_tests(key, root=None):
    """The module ``tests/methods/<family>/test_<slug>.py``, which holds the independent route."""
    family, slug = key.split("/")
    root = root if root is not None else checkout()
    path = Path(root) / "tests" / "methods" / family / f"test_{slug}.py"
    spec = importlib.util.spec_from_file_location(f"_particular_{family}_{slug}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def agree(spec, route, draw=0):
    """Compare a row with its slow loop on every case; returns the worst error of each kind.

    Parameters
    ----------
    spec : Spec
        The row.
    route : module
        From :func:`particular_tests`: holds ``slow_<slug>(**kwargs)`` that returns the outputs,
        or ``check_<slug>(kwargs, out)`` that asserts what a generator must obey.

    Returns
    -------
    dict
        ``forward`` in eps, ``gradient`` relative (differences of the slow loop).

    Raises
    ------
    CheckFailure
        When they disagree.
    """
    from attention_ref.kit.checks import cases, seed_of

    slug = spec.key.split("/")[1]
    slow, check = getattr(route, f"slow_{slug}", None), getattr(route, f"check_{slug}", None)
    if slow is None and check is None:
        raise CheckFailure(f"{spec.key} has neither slow_{slug} nor check_{slug} in its tests")
    worst = {"forward": 0.0, "gradient": 0.0}
    for case, kwargs in cases(spec, draw).items():
        if slow is None:
            check(kwargs, spec.call(kwargs)[0])
            continue
        want = tree.flatten(slow(**kwargs))
        dout = {}
        rng = np.random.default_rng(seed_of(f"{spec.key}-{case}-golden"))
        found, gradients = evaluate(spec, kwargs, dout, rng)
        if set(want) != set(found):
            raise CheckFailure(f"the slow loop gives {sorted(want)}, the method {sorted(found)}")
        for name, a in found.items():
            if np.asarray(want[name]).dtype.kind not in "fc":
                _judge(f"{case}: {name} against the slow loop", a, want[name], 0)
                continue
            close(f"{case}: {name} against the slow loop", a, want[name], ROUTE_EPS, eps=2**-52)
            worst["forward"] = max(worst["forward"], error(a, want[name], eps=2**-52))
        if gradients:
            gap = _slope_gap(slow, kwargs, dout, gradients, rng)
            worst["gradient"] = max(worst["gradient"], gap)
            if gap > ROUTE_RTOL:
                raise CheckFailure(f"{case}: gradients are {gap:.1e} off the slow loop's slope")
    return worst


def _slope_gap(slow, kwargs, dout, gradients, rng, h=1e-3):
    """Relative gap between <gradient, tangent> and the slow loop's 4th-order difference."""
    names = sorted(gradients)
    tangents = {n: rng.standard_normal(kwargs[n].shape) for n in names}

    def along(step):
        moved = kwargs | {n: kwargs[n] + step * h * tangents[n] for n in names}
        out = tree.floats(slow(**moved))
        return sum(float(np.sum(dout[n] * out[n])) for n in dout)

    slope = (8 * (along(1) - along(-1)) - (along(2) - along(-2))) / (12 * h)
    want = sum(float(np.sum(gradients[n] * tangents[n])) for n in names)
    size = sum(float(np.sum(np.abs(gradients[n] * tangents[n]))) for n in names)
    return abs(slope - want) / max(size, 1e-300)


def write(spec, root=None, force=False, seeds=64):
    """Write the golden files of a row, unless the present ones still hold.

    Parameters
    ----------
    spec : Spec
        The row.
    root : path, optional
        Folder to write to; by default that of the checkout.
    force : bool
        Write even when the present files hold.
    seeds : int
        Example sets to measure the bounds on.

    Returns
    -------
    bool
        Whether anything was written.

    Raises
    ------
    CheckFailure
        When the independent route disagrees or the files become too large; then nothing is
        written.
    """
    from attention_ref.kit.checks import cases, seed_of

    if not force and _holds(spec):
        return False
    worst = agree(spec, particular_tests(spec.key))
    arrays, described = {}, {}
    for case, kwargs in cases(spec).items():
        dout = {}
        rng = np.random.default_rng(seed_of(f"{spec.key}-{case}-golden"))
        out, gradients = evaluate(spec, kwargs, dout, rng)
        described[case] = {"options": {}}
        for name, a in kwargs.items():
            if isinstance(a, np.ndarray):
                arrays[f"{case}/in/{name}"] = a
            else:
                described[case]["options"][name] = _option(a)
        for word, part in (("out", out), ("dout", dout), ("grad", gradients)):
            arrays |= {f"{case}/{word}/{name}": np.asarray(a) for name, a in part.items()}
    measured = measure(spec, seeds)
    manifest = {
        "format": FORMAT,
        "key": spec.key,
        "about": "float64; names: case/in/argument, case/out/output, case/dout/output's "
        "cotangent, case/grad/argument; bounds in eps of the dtype times the largest entry",
        "routes": {"names": list(spec.verified_by), "slow loop": worst},
        "written": date.today().isoformat(),
        "numpy": np.__version__,
        "bounds": _allowed(measured),
        "measured": measured,
        "cases": described,
        "arrays": {name: _describe(a) for name, a in arrays.items()},
    }
    packed, text = paths(spec.key, root)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{n: np.ascontiguousarray(a) for n, a in arrays.items()})
    contents = buffer.getvalue(), _compact(manifest).encode()
    for what, data, most in zip(("arrays", "manifest"), contents, LARGEST, strict=True):
        if len(data) > most:
            raise CheckFailure(
                f"the {what} of {spec.key} take {len(data) / 2**10:.1f} KB, at most "
                f"{most // 2**10}; hint: fewer or smaller cases in the example"
            )
    packed.parent.mkdir(parents=True, exist_ok=True)
    for path, data in zip((packed, text), contents, strict=True):
        write_atomically(path, data)
    return True


def _compact(manifest):
    """One line an entry: readable in a diff, small on disk."""
    lines = []
    for name, value in manifest.items():
        if isinstance(value, dict) and len(value) > 4:
            inner = ",\n  ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            lines.append(f"{json.dumps(name)}: {{\n  {inner}\n }}")
        else:
            lines.append(f"{json.dumps(name)}: {json.dumps(value)}")
    return "{\n " + ",\n ".join(lines) + "\n}\n"


def _holds(spec):
    from attention_ref.kit.checks import cases

    try:
        manifest, _ = _current(spec.key)
        if set(manifest["cases"]) != set(cases(spec)):
            return False
        for case in cases(spec):
            compare(spec, case)
    except (CheckFailure, GoldenFileError, KeyError):
        return False
    return True


def write_atomically(path, data):
    """Write bytes next to the target, then rename: never half a file."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


# ------------------------------------------------------------------------------ bounds


def measure(spec, seeds=64):
    """Largest errors in eps over several example sets: float32 by float64, float64 by longdouble.

    Parameters
    ----------
    spec : Spec
        The row.
    seeds : int
        Number of example sets.

    Returns
    -------
    dict
        dtype -> {output or "d" + argument: error}.
    """
    from attention_ref.core.check import extended
    from attention_ref.kit.checks import cases

    worst = {"float32": {}, "float64": {}}
    with extended():
        for draw in range(seeds):
            rng = np.random.default_rng(draw)
            for kwargs in cases(spec, draw).values():
                for low, high in ((np.float32, np.float64), (np.float64, np.longdouble)):
                    _measure_call(spec, kwargs, low, high, worst[np.dtype(low).name], rng)
    return worst


def _measure_call(spec, kwargs, low, high, worst, rng):
    rough = {k: a.astype(low) if _is_float(a) else a for k, a in kwargs.items()}
    exact = {k: a.astype(high) if _is_float(a) else a for k, a in rough.items()}
    dout = {}
    out, gradients = evaluate(spec, rough, dout, rng)
    wide = {k: a.astype(high) for k, a in dout.items()}
    try:
        true_out, true_gradients = evaluate(spec, exact, wide)
    except TypeError:  # no longdouble version of some NumPy function
        return
    eps = float(np.finfo(low).eps)
    for name, a in out.items():
        if a.dtype.kind == "f":
            worst[name] = max(worst.get(name, 0.0), error(a, true_out[name], eps=eps))
    size = scales({k: g.astype(float) for k, g in true_gradients.items()})
    for name, g in gradients.items():
        found = error(g, true_gradients[name], size[name], eps)
        worst["d" + name] = max(worst.get("d" + name, 0.0), found)


def _is_float(a):
    return isinstance(a, np.ndarray) and a.dtype.kind == "f"


def _allowed(measured):
    """Three times what was measured, at least 4 eps."""
    return {
        dtype: {name: max(4, math.ceil(3 * worst)) for name, worst in names.items()}
        for dtype, names in measured.items()
    }
