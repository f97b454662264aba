"""Kernels for the CPU, compiled by Numba.

Rules, each with its reason:

- no ``fastmath`` beyond ``contract`` (a product and a sum may become one fused operation) and, in
  functions marked ``sums``, ``reassoc`` (a sum may be taken in vector lanes): the other flags
  assume that infinities and NaN do not exist, these two do not;
- ``error_model="numpy"``: a division by zero gives infinity, as in NumPy;
- every item of work owns what it writes, and no sum crosses items: one thread and many give the
  same bits; threads are Python's own (``threads``), the kernels run without the interpreter's lock;
- compiled code is cached in a folder named after a hash of all kernel sources and of the versions
  of Numba and NumPy, because Numba itself does not notice edits of a helper in another file;
- with ``NUMBA_BOUNDSCHECK=1`` in the environment every index is checked.

Numba is imported by :func:`require` alone, so importing this package costs nothing.
"""

import functools
import hashlib
import os
import sys
from pathlib import Path

from attention_ref.core.errors import BackendUnavailable

PIP = "python -m pip install numba"
OPTIONS = {"error_model": "numpy", "fastmath": {"contract"}}


def require():
    """The numba module, or BackendUnavailable with the line that installs it."""
    try:
        import numba
    except Exception as error:  # a broken install raises more than ImportError
        raise BackendUnavailable(
            f"backend 'numba' cannot run: {type(error).__name__}: {error}; hint: {PIP}"
        ) from error
    return numba


def source_key():
    """Hash of every kernel source and of the versions that compile it."""
    import numpy

    digest = hashlib.sha256(f"{require().__version__} {numpy.__version__}".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def user_cache():
    """The folder where programs of this user keep what they can compute again."""
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


@functools.cache
def cache_dir():
    """Where compiled kernels are kept; ``NUMBA_CACHE_DIR`` of the environment wins."""
    given = os.environ.get("NUMBA_CACHE_DIR")
    return given or str(user_cache() / "attention_ref" / source_key())


def sums(function):
    """:func:`jit` for a function whose inner loops add up numbers in one: the compiler may choose
    the order, the same at every call."""
    return jit(function, OPTIONS | {"fastmath": {"contract", "reassoc"}})


def jit(function, options=None):
    """``numba.njit`` with the options of this package.

    The cache folder is set only while our own functions are decorated, so that the caller's other
    Numba functions keep theirs.
    """
    config = require().config
    before, config.CACHE_DIR = config.CACHE_DIR, cache_dir()
    try:
        return require().njit(cache=True, nogil=True, **(options or OPTIONS))(function)
    finally:
        config.CACHE_DIR = before
