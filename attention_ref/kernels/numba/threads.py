"""Sharing the items of a kernel between threads.

A kernel takes ``first, last`` and works on the items ``first <= item < last``; it holds no lock of
the interpreter, so plain Python threads run it side by side. Each item owns what it writes and
starts from zero, so the bits do not depend on who worked on it.

Numba's own ``prange`` was measured and left: it made these kernels compile two to three times
longer, its thread pool does not survive a fork, and it cannot be combined with bounds checks.
A thread costs about 0.1 ms to start; small calls stay in the caller's thread.
"""

import contextlib
import contextvars
import itertools
import os
import threading

_chosen = contextvars.ContextVar("threads", default=None)
SHARES = 4  # portions a thread: uneven items even out


def count():
    """Threads a kernel may use: :func:`use`, else NUMBA_NUM_THREADS, else the usable cores."""
    if _chosen.get() is not None:
        return _chosen.get()
    if os.environ.get("NUMBA_NUM_THREADS", "").isdigit():
        return max(1, int(os.environ["NUMBA_NUM_THREADS"]))
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def use(number):
    """Within this context kernels use ``number`` threads."""
    token = _chosen.set(int(number))
    try:
        yield
    finally:
        _chosen.reset(token)


def share(kernel, items, work, *arguments):
    """Call ``kernel(first, last, *arguments)`` until all items are done.

    Parameters
    ----------
    kernel : callable
        Compiled with ``jit``, so without the interpreter's lock.
    items : int
        How many there are.
    work : float
        Floating-point operations in all; below a few million one thread is faster.
    """
    threads = min(count(), items) if work > 4e6 else 1
    if threads <= 1:
        kernel(0, items, *arguments)
        return
    portions = min(items, threads * SHARES)
    edges = [items * i // portions for i in range(portions + 1)]
    turns, failures = itertools.count(), []

    def worker():
        try:
            while (i := next(turns)) < portions:
                kernel(edges[i], edges[i + 1], *arguments)
        except BaseException as error:  # handed to the caller below
            failures.append(error)

    team = [threading.Thread(target=worker) for _ in range(threads - 1)]
    for thread in team:
        thread.start()
    worker()
    for thread in team:
        thread.join()
    if failures:
        raise failures[0]
