"""Vectors for programs in any language: self-describing cases as npz, safetensors or raw files.

For every case and dtype: inputs on the grid of the dtype, a random cotangent, the truth rounded to
the dtype (outputs, every gradient, the log-sum-exp), the error that a plain implementation in that
dtype makes, and the tolerance. The manifest (``.json``) names options, conventions and hashes.
"""

import hashlib
import inspect
import io
import json
from pathlib import Path

import numpy as np

from attention_ref import __version__
from attention_ref.core import check as door
from attention_ref.core.errors import GoldenFileError, ParameterError
from attention_ref.core.registry import get
from attention_ref.kit import golden, lowp, vectors
from attention_ref.kit.inputs import is_float

FORMATS = ("npz", "safetensors", "raw")
SAFE = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "bool": "BOOL",
        "int64": "I64", "int32": "I32"}  # fmt: skip
CONVENTIONS = {
    "layout": "(..., H, T, D): batch axes, heads, tokens, width; row-major, little-endian",
    "mask": "boolean (one byte in raw files), true = may attend, broadcasts to (..., T, S)",
    "order": "scale, softcap, bias, mask, normalise",
    "scale": "1/sqrt(D) where no option says otherwise",
    "causal": "with T != S the diagonal ends in the corner of the last query and the last key "
    "(align lower_right) where no option says upper_left",
    "grouped heads": "query head h reads key head h // (H // G)",
    "empty row": "a query without keys gives zeros, in the output and in the gradients; its lse "
    "is -inf",
    "cotangent": "dout is random; gradients are those of the sum of dout * out",
    "tolerance": "absolute, on the largest difference: bound = 2 (outputs) or 3 (gradients) times "
    "what the plain implementation is off by, at least 64 roundings (4 in 16 bits) of the largest "
    "entry",
    "bfloat16": "16 bits, the upper half of a float32; in npz files as uint16",
}


class Stored:
    """An array as it is written: its bytes, shape, and the name of its dtype."""

    def __init__(self, a, dtype=None):
        if dtype is None:
            dtype = a.dtype.name
        if dtype == "bfloat16":
            a = lowp.to_bits(a)
        elif dtype in lowp.EPS:
            with np.errstate(over="ignore"):
                a = a.astype(dtype)
        self.array = np.ascontiguousarray(a).reshape(np.shape(a))
        self.array = self.array.astype(self.array.dtype.newbyteorder("<"))
        self.dtype, self.shape = dtype, list(np.shape(a))

    @property
    def data(self):
        """The bytes, row-major and little-endian."""
        return self.array.tobytes()

    def describe(self):
        """What the manifest says about it."""
        return {"shape": self.shape, "dtype": self.dtype,
                "sha256": hashlib.sha256(self.data).hexdigest()}  # fmt: skip


def export(key, out, form="npz", dtypes=("float64", "float32", "float16", "bfloat16")):
    """Write the vectors of a row.

    Parameters
    ----------
    key : str
        The row.
    out : path
        Folder to write to; nothing is written outside of it.
    form : {"npz", "safetensors", "raw"}
        One file for all arrays, or a folder of one file an array with a plain index for C.
    dtypes : tuple of str
        Target dtypes.

    Returns
    -------
    list of Path
        What was written.

    Raises
    ------
    ParameterError
        For an unknown key, format or dtype, or a key that leads outside of the folder.
    GoldenFileError
        When the row's golden file is damaged or no longer holds.
    """
    door.option("format", form, FORMATS)
    spec, base = get(key), Path(out).resolve()
    target = (base / key).resolve()
    if base not in target.parents:
        raise ParameterError(f"key {key!r} leads outside of {out}")
    manifest, arrays = collect(spec, dtypes)
    target.parent.mkdir(parents=True, exist_ok=True)
    text = _json(manifest)
    if form == "raw":
        return _write_raw(target, manifest, arrays)
    files = {target.with_name(target.name + ".json"): text}
    if form == "npz":
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **{n: s.array for n, s in arrays.items()})
        files[target.with_name(target.name + ".npz")] = buffer.getvalue()
    else:
        data = safetensors(arrays, {"manifest": json.dumps(manifest)})
        files[target.with_name(target.name + ".safetensors")] = data
    for path, data in files.items():
        golden.write_atomically(path, data)
    return sorted(files)


def collect(spec, dtypes):
    """The manifest and the arrays of a row: (dict, name -> Stored)."""
    arrays, described, left_out = {}, {}, []
    for case in vectors.cases(spec.key, dtypes=tuple(dtypes)):
        found = _case_arrays(case)
        if any(not np.all(np.isfinite(s.array)) for n, s in found.items()
               if s.array.dtype.kind == "f" and not n.endswith("/lse")):  # fmt: skip
            left_out.append(f"{case.__name__}: beyond the range of the dtype")
            continue
        arrays |= found
        entry = described.setdefault(case.name, {"options": {}, "tolerance": {}})
        entry["options"] = {n: _option(a) for n, a in case.options.items()
                            if not isinstance(a, np.ndarray)}  # fmt: skip
        entry["tolerance"][case.dtype] = case.tolerances
    manifest = {
        "format": "attention_ref vectors 1",
        "key": spec.key,
        "signature": f"{spec.main.__name__}{inspect.signature(spec.main)}",
        "attention_ref": __version__,
        "numpy": np.__version__,
        "agreed": _agreed(spec),
        "names": "case/dtype/in/argument, case/dtype/dout/output, case/dtype/out/output, "
        "case/dtype/grad/argument, case/dtype/lse; masks and integers: case/in/argument",
        "conventions": CONVENTIONS,
        "left_out": left_out,
        "cases": described,
        "arrays": {n: s.describe() for n, s in arrays.items()},
    }
    return manifest, arrays


def _case_arrays(case):
    head, found = f"{case.name}/{case.dtype}", {}
    for name, a in case.inputs.items():
        if is_float(a):
            found[f"{head}/in/{name}"] = Stored(a, case.dtype)
        elif isinstance(a, np.ndarray):
            found[f"{case.name}/in/{name}"] = Stored(a)
    for name, a in case.outs.items():
        found[f"{head}/out/{name}"] = Stored(a, case.dtype if is_float(a) else None)
    if case.gradients:
        found[f"{head}/dout/{case.main}"] = Stored(case.dout, case.dtype)
    for name, a in case.gradients.items():
        found[f"{head}/grad/{name}"] = Stored(a, case.dtype)
    if case.lse is not None:
        wide = case.dtype if case.dtype in ("float64", "float32") else "float32"
        found[f"{head}/lse"] = Stored(case.lse, wide)
    return found


def _option(value):
    return value.__name__ if callable(value) else value


def _json(manifest):
    return (json.dumps(manifest, indent=1) + "\n").encode()


def _agreed(spec):
    """The routes that agreed before the row's golden file was written, after a look at it."""
    from attention_ref.kit.checks import cases
    from attention_ref.kit.compare import CheckFailure

    packed, _ = golden.paths(spec.key)
    if not packed.is_file():
        return None
    manifest, _ = golden.load(spec.key)
    try:
        for case in cases(spec):
            golden.compare(spec, case)
    except CheckFailure as failure:
        raise GoldenFileError(f"{spec.key} no longer equals its golden file: {failure}") from None
    return manifest["routes"]


def safetensors(arrays, metadata):
    """The bytes of a safetensors file: length of the header, JSON header, data.

    Parameters
    ----------
    arrays : dict
        Name -> Stored.
    metadata : dict
        Text by name.

    Returns
    -------
    bytes
    """
    header, parts, place = {"__metadata__": metadata}, [], 0
    # the widest first, so that every array begins at a multiple of its item size
    for name in sorted(arrays, key=lambda n: (-arrays[n].array.itemsize, n)):
        s = arrays[name]
        end = place + len(s.data)
        header[name] = {"dtype": SAFE[s.dtype], "shape": s.shape, "data_offsets": [place, end]}
        parts.append(s.data)
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(parts)


def _write_raw(folder, manifest, arrays):
    """A file an array, ``index.txt`` for programs without a JSON reader, and the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"# attention_ref vectors 1, {manifest['key']}: row-major, little-endian",
             "# array CASE DTYPE PART NAME ELEMENT NDIM D0 D1 ... FILE",
             "# option CASE NAME VALUE", "# tolerance CASE DTYPE NAME PLAIN BOUND"]  # fmt: skip
    files = {}
    for name, s in arrays.items():
        parts = name.split("/")
        case, dtype = parts[0], parts[1] if parts[1] in lowp.EPS else "-"
        rest = parts[2:] if dtype != "-" else parts[1:]
        part, inner = rest if len(rest) == 2 else (rest[0], rest[0])
        file = name.replace("/", ".") + ".bin"
        shape = " ".join(str(n) for n in (len(s.shape), *s.shape))
        lines.append(f"array {case} {dtype} {part} {inner} {s.dtype} {shape} {file}")
        files[folder / file] = s.data
        manifest["arrays"][name]["file"] = file
    for case, entry in manifest["cases"].items():
        for name, value in entry["options"].items():
            text = json.dumps(value, separators=(",", ":")).replace(" ", "_")
            lines.append(f"option {case} {name} {text.strip(chr(34))}")
        for dtype, bounds in entry["tolerance"].items():
            for name, b in bounds.items():
                lines.append(f"tolerance {case} {dtype} {name} {b['plain']:.6e} {b['bound']:.6e}")
    files[folder / "index.txt"] = ("\n".join(lines) + "\n").encode()
    files[folder / "manifest.json"] = _json(manifest)
    for path, data in files.items():
        golden.write_atomically(path, data)
    return sorted(files)
