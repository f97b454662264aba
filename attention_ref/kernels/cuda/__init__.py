"""Kernels for the GPU: CUDA C++ text (``<pattern>.cu``), loaded by CuPy (``<pattern>.py``).

The text keeps to the C++ that a host compiler reads once a few keywords are defined, so the tests
execute it without a GPU. CuPy is imported by :func:`require` alone.
"""

import functools
from pathlib import Path

from attention_ref.core.errors import BackendUnavailable

PIP = 'python -m pip install "attention_ref[gpu-cuda12]"'
FOLDER = Path(__file__).parent
STORAGE = {"float32": (), "float16": ("-DFLOAT16",), "bfloat16": ("-DBFLOAT16",)}
"""dtype of q, k, v -> options of the compiler."""


def require():
    """The cupy module where a GPU answers, or BackendUnavailable with the reason and what helps.

    CuPy imports without a driver, so importing it proves nothing; ``is_available`` does.
    """
    try:
        import cupy
    except Exception as error:  # a broken install raises more than ImportError
        raise BackendUnavailable(
            f"backend 'cuda' cannot run: {type(error).__name__}: {error}; hint: {PIP}"
        ) from error
    if not cupy.cuda.is_available():
        raise BackendUnavailable(
            "backend 'cuda' cannot run: CuPy finds no GPU or no driver; "
            f"hint: {PIP} on a machine with an NVIDIA GPU, or backend='numba'"
        )
    return cupy


def source(name):
    """The text of one kernel file, without its ending, what it includes put in its place."""
    text = (FOLDER / f"{name}.cu").read_text(encoding="utf-8")
    shared = (FOLDER / "common.cu").read_text(encoding="utf-8")
    return text.replace('#include "common.cu"\n', shared)


@functools.cache
def load(name, *options):
    """The module of one kernel file, compiled once for these constants."""
    return require().RawModule(code=source(name), options=("--std=c++17", *options))
