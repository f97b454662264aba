"""The errors a caller can meet. Each names the argument, what came, what was expected, a hint."""


class ShapeError(ValueError):
    """An array has a rank, a width or a length that does not fit the others."""


class ParameterError(ValueError):
    """A parameter, an option or a key has a value outside its domain."""


class GoldenFileError(ValueError):
    """A golden file is damaged, dishonest about its size, or not the file its manifest names."""


class DTypeError(TypeError):
    """An argument is not a NumPy-like array of float32 or float64 (masks: of bool)."""


class BackendUnavailable(RuntimeError):
    """An explicitly requested backend cannot run here; it never falls back silently."""


class MemoryLimitError(MemoryError):
    """The score matrix would pass the limit; raised before anything is allocated."""
