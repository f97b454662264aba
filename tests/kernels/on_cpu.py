"""The CUDA text on the CPU: the shim of ``shim/`` compiled once for each set of constants.

Every CUDA thread becomes a thread of the CPU. The wrappers around the launches are the shipped
ones; only the launch itself is replaced.
"""

import atexit
import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from attention_ref.kernels import cuda

SHIM = Path(__file__).parent / "shim"
COMPILER = shutil.which("g++")


def build(target, pattern, *options, text=None):
    """Compile the CUDA text of a pattern with the host compiler, around ``shim/<pattern>.cpp``."""
    folder = Path(target).parent
    body = cuda.source(pattern).replace('extern "C" ', "")  # several storages in one program
    (folder / f"{pattern}.cu").write_text(body)
    main = folder / f"{pattern}.cpp"
    main.write_text((SHIM / f"{pattern}.cpp").read_text() if text is None else text)
    command = [
        COMPILER, "-std=c++20", "-pthread", "-g1", f"-I{SHIM}", *options, str(main),
        "-o", str(target),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    return target


def run(program):
    """Its result after a run of at most two minutes."""
    return subprocess.run([program], capture_output=True, text=True, timeout=120, check=False)


@functools.cache
def library(pattern, *options):
    """The shared library for these constants; built once a process, removed at its end."""
    folder = Path(tempfile.mkdtemp(prefix="attention_ref_shim_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    file = build(folder / f"{pattern}.so", pattern, "-O1", "-shared", "-fPIC", *options)
    return ctypes.CDLL(str(file))


def call(shared, name, blocks, arguments):
    """Launch one kernel with its arguments as cuLaunchKernel takes them."""
    cells = [pointer(x) for x in arguments]
    table = (ctypes.c_void_p * len(cells))(*(ctypes.addressof(c) for c in cells))
    getattr(shared, name)(blocks, table)


def pointer(x):
    """A cell that holds one argument."""
    if isinstance(x, np.ndarray):
        assert x.flags.c_contiguous
        return ctypes.c_void_p(x.ctypes.data)
    kinds = {"int32": ctypes.c_int32, "int64": ctypes.c_int64, "float32": ctypes.c_float}
    return kinds[x.dtype.name](x.item())
