"""Derivatives of ordinary NumPy code: a tape, the complex step, differences; and a double for CuPy.

The same forward text runs on plain arrays, on complex arrays (`jvp`, `complex_gradient`), on
`Traced` arrays (`vjp`) and on `Foreign` arrays. Read `tape.py` first, then `rules.py`.
"""

from .differentiate import (
    complex_allowed,
    complex_gradient,
    complex_step,
    difference,
    jvp,
    map_leaves,
    value,
    vjp,
)
from .foreign import Foreign, ForeignRefusal
from .tape import NoGradientRule, Tape, Traced, TracedError

__all__ = [
    "Foreign",
    "ForeignRefusal",
    "NoGradientRule",
    "Tape",
    "Traced",
    "TracedError",
    "complex_allowed",
    "complex_gradient",
    "complex_step",
    "difference",
    "jvp",
    "map_leaves",
    "value",
    "vjp",
]
