"""What a GPU has to hold for each CUDA kernel: registers, spills and shared memory, from ptxas.

NVRTC compiles the text without a GPU and, asked by ``--ptxas-options=-v``, tells what the machine
code uses. ``python -m tests.kernels.registers`` writes ``docs/benchmarks/registers.json``, which
the page of benchmarks shows and a test keeps current.
"""

import ctypes
import hashlib
import importlib.util
import json
import re
from pathlib import Path

from attention_ref.kernels import cuda
from attention_ref.kernels.cuda import decode, dense

FILE = Path(__file__).parents[2] / "docs" / "benchmarks" / "registers.json"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
WIDTHS = (64, 128)
PATTERNS = ("dense", "decode")


def nvrtc():
    """The compiler's library: from CuPy's wheel or from nvidia-cuda-nvrtc-cu12; None without."""
    names = ["libnvrtc.so.12", "libnvrtc.so.13", "libnvrtc.so"]
    found = importlib.util.find_spec("nvidia")
    for folder in (found.submodule_search_locations or []) if found else []:
        names = [*map(str, Path(folder).glob("*/lib/libnvrtc.so*")), *names]
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def version(library):
    """(major, minor)."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def options(pattern, storage, width, depth):
    """The constants of a kernel file; the most rows of ``decode``."""
    if pattern == "decode":
        return decode.options(storage, width, depth, decode.ROWS[-1])
    return dense.options(storage, width, depth)


def compiled(library, architecture, pattern, storage, width, depth):
    """(status, log, bytes of machine code); the log holds what ptxas says of every kernel."""
    program = ctypes.c_void_p()
    text = cuda.source(pattern).encode()
    assert library.nvrtcCreateProgram(ctypes.byref(program), text, b"x.cu", 0, None, None) == 0
    flags = [f"--gpu-architecture={architecture}", "--std=c++17", "--ptxas-options=-v"]
    flags += options(pattern, storage, width, depth)
    table = (ctypes.c_char_p * len(flags))(*(o.encode() for o in flags))
    status = library.nvrtcCompileProgram(program, len(flags), table)
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    code = ctypes.c_size_t()
    if status == 0:
        library.nvrtcGetCUBINSize(program, ctypes.byref(code))
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return status, log.value.decode(), code.value


def used(log):
    """{kernel: {"registers", "spilled", "stack", "shared"}} from the log; all but the first bytes.

    ``stack`` is local memory: arrays that could not stay in registers. It is off the chip too.
    """
    found = {}
    for part in log.split("Compiling entry function ")[1:]:
        name = re.match(r"'(\w+)'", part)[1]
        stack, stores, loads = map(int, re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        ).groups())  # fmt: skip
        shared = re.search(r"(\d+) bytes smem", part)
        found[name] = {
            "registers": int(re.search(r"Used (\d+) registers", part)[1]),
            "spilled": stores + loads, "stack": stack, "shared": int(shared[1]) if shared else 0,
        }  # fmt: skip
    return found


def hashed():
    """Of everything that decides: both texts without comments, and the shipped constants."""
    texts = [re.sub(r"\s+", " ", re.sub(r"//.*", "", cuda.source(p))) for p in PATTERNS]
    texts += [str(options(p, s, w, w)) for p in PATTERNS for s in cuda.STORAGE for w in WIDTHS]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def measure(library):
    """The whole table: a row a kernel, storage and width, columns for the architectures."""
    rows = []
    for pattern in PATTERNS:
        for storage in cuda.STORAGE:
            for width in WIDTHS:
                key = (pattern, storage, width, width)
                each = {a: used(compiled(library, a, *key)[1]) for a in ARCHITECTURES}
                rows += [row(name, storage, width, each) for name in each[ARCHITECTURES[0]]]
    rows.sort(key=lambda r: (r["kernel"], r["storage"], r["width"]))
    return {
        "of": "registers a thread and bytes of each CUDA kernel, as compiled; nothing was run",
        "compiler": "NVRTC {}.{}".format(*version(library)), "sources": hashed(), "rows": rows,
    }  # fmt: skip


def row(name, storage, width, each):
    """One line; bytes are the most over the architectures."""
    return {
        "kernel": name, "storage": storage, "width": width,
        **{f"registers {a}": each[a][name]["registers"] for a in ARCHITECTURES},
        **{what: max(each[a][name][what] for a in ARCHITECTURES)
           for what in ("spilled", "stack", "shared")},
    }  # fmt: skip


if __name__ == "__main__":
    FILE.write_text(json.dumps(measure(nvrtc()), indent=1) + "\n", encoding="utf-8")
