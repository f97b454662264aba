"""Fast paths, by pattern and not by method: a handful of kernels serve the whole catalog.

``numba`` holds the kernels for the CPU, ``cuda`` those for the GPU (CUDA C++ text loaded by CuPy),
under the same names. The reference never imports them; they import only ``core``. What a kernel
owes: the values of the reference within a few rounding errors, the same bits with one thread as
with many, and no number from behind a mask.
"""
