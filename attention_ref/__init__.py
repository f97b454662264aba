"""attention_ref: the reference library of attention, in NumPy, forward and backward by hand.

>>> import attention_ref
>>> spec = attention_ref.get("scores/dot_product")
>>> spec.forward, spec.backward, spec.example          # doctest: +ELLIPSIS
(<function ...>, <function ...>, <function ...>)
"""

from attention_ref.core.registry import get, keys, run

__version__ = "0.1.0"
__all__ = ["__version__", "get", "keys", "run"]
