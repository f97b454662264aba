"""Tiny trainable models on the engine: any mechanism by key, text without a download, AdamW.

``text`` gives characters, ``model`` a causal transformer of some ten thousand parameters, ``optim``
the optimisers as pure functions, ``train`` the loop. Parameters are dicts of arrays throughout.
"""

from attention_ref.nn.model import Model
from attention_ref.nn.optim import adamw, clip, cosine, sgd
from attention_ref.nn.text import Text, batches, english
from attention_ref.nn.train import bar, train, value_and_gradient

__all__ = [
    "Model", "Text", "adamw", "bar", "batches", "clip", "cosine", "english", "sgd", "train",
    "value_and_gradient",
]  # fmt: skip
