"""A tiny transformer over characters whose attention is any mechanism of the library, by key.

    x = embed[token] + place[position]   the second part only with positions=True
    x = x + attention(norm(x)) Wo        once a layer, H heads
    x = x + relu(norm(x) W1 + b1) W2 + b2
    logits = norm(x) embed^T             (tied), or norm(x) readout

Plain NumPy functions of a dict of parameters: on traced arrays the same text gives the gradient, so
a mechanism needs nothing but its forward to be trained.
"""

import inspect
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

import attention_ref
from attention_ref import core


class Model(NamedTuple):
    """The shape of a model; its parameters are a dict made by :meth:`initial`.

    Parameters
    ----------
    vocabulary : int
        Number of different tokens.
    context : int, tokens
        Largest number of tokens seen at once.
    width : int
        Channels of the residual stream, a multiple of ``heads``.
    heads, layers : int
        Attention heads a layer, and layers.
    key : str
        The mechanism: its forward is called as ``forward(q, k, v, **options)`` with arrays
        (B, H, T, D); ``causal=True`` is added where it has that keyword.
    options : dict
        Further keywords of the forward.
    extra : dict
        Parameters of the mechanism itself: name -> ``function(rng, model) -> ndarray``, one of its
        own in every layer, passed by that name.
    causal : bool
        Whether a token may see only what came before it.
    positions : bool
        Whether learned positions are added; without them the length is free.
    tied : bool
        Whether the output uses the embedding's matrix.
    dtype : dtype
        float32 for speed, float64 for checks.
    """

    vocabulary: int
    context: int = 64
    width: int = 64
    heads: int = 4
    layers: int = 2
    key: str = "scores/dot_product"
    options: Mapping = MappingProxyType({})
    extra: Mapping = MappingProxyType({})
    causal: bool = True
    positions: bool = True
    tied: bool = True
    dtype: type = np.float32

    def initial(self, rng):
        """Draw the parameters: a dict name -> ndarray, "0.q" being the queries of layer 0.

        Parameters
        ----------
        rng : numpy.random.Generator
            Source of the numbers.

        Returns
        -------
        dict of ndarray
        """
        core.check.generator("rng", rng)
        if self.width % self.heads:
            raise core.errors.ParameterError(
                f"width is {self.width}, expected a multiple of heads = {self.heads}"
            )

        def normal(*shape, scale):
            return (scale * rng.standard_normal(shape)).astype(self.dtype)

        C, out = self.width, 1 / math.sqrt(2 * self.layers)
        parameters = {
            "embed": normal(self.vocabulary, C, scale=C**-0.5),
            "place": normal(self.context, C, scale=C**-0.5),
            "gain": np.ones(C, self.dtype),
        }
        if not self.positions:
            del parameters["place"]
        if not self.tied:
            parameters["readout"] = normal(C, self.vocabulary, scale=C**-0.5)
        for layer in range(self.layers):
            parts = {
                "gain1": np.ones(C, self.dtype),
                "q": normal(C, C, scale=C**-0.5),
                "k": normal(C, C, scale=C**-0.5),
                "v": normal(C, C, scale=C**-0.5),
                "out": normal(C, C, scale=out * C**-0.5),
                "gain2": np.ones(C, self.dtype),
                "w1": normal(C, 4 * C, scale=(2 / C) ** 0.5),
                "b1": np.zeros(4 * C, self.dtype),
                "w2": normal(4 * C, C, scale=out * (4 * C) ** -0.5),
                "b2": np.zeros(C, self.dtype),
            }
            for name, draw in self.extra.items():
                parts[f"extra.{name}"] = np.asarray(draw(rng, self), self.dtype)
            parameters |= {f"{layer}.{name}": x for name, x in parts.items()}
        return parameters

    def logits(self, parameters, tokens, caches=None):
        """Scores of every next token.

        Parameters
        ----------
        parameters : dict of ndarray
            From :meth:`initial`, plain or traced.
        tokens : int ndarray, shape (B, T)
            T at most ``context``, or any without positions.
        caches : list, optional
            Receives the cache of the mechanism in every layer; its ``p`` holds attention maps.

        Returns
        -------
        ndarray, shape (B, T, vocabulary), nats
        """
        B, T = tokens.shape
        x = parameters["embed"][tokens]
        if self.positions:
            x = x + parameters["place"][:T]
        x = np.reshape(x, (B * T, self.width))  # one matrix product a layer, not B of them
        for layer in range(self.layers):
            part = {
                name[len(f"{layer}.") :]: value
                for name, value in parameters.items()
                if name.startswith(f"{layer}.")
            }
            x = x + self._attention(part, rms_norm(x, part["gain1"]), (B, T), caches)
            hidden = core.relu(rms_norm(x, part["gain2"]) @ part["w1"] + part["b1"])
            x = x + hidden @ part["w2"] + part["b2"]
        last = np.transpose(parameters["embed"]) if self.tied else parameters["readout"]
        return np.reshape(rms_norm(x, parameters["gain"]) @ last, (B, T, self.vocabulary))

    def _attention(self, part, x, shape, caches):
        """Project to heads, call the mechanism, project back: (B T, C) -> (B T, C)."""
        B, T = shape
        forward = attention_ref.get(self.key).main

        def split(w):  # (B T, C) -> (B, H, T, D)
            heads = np.reshape(x @ w, (B, T, self.heads, self.width // self.heads))
            return np.swapaxes(heads, 1, 2)

        options = dict(self.options)
        if self.causal and "causal" in inspect.signature(forward).parameters:
            options.setdefault("causal", True)
        own = {name: part[f"extra.{name}"] for name in self.extra}
        out, cache = forward(split(part["q"]), split(part["k"]), split(part["v"]), **own, **options)
        if caches is not None:
            caches.append(cache)
        out = out[0] if isinstance(out, tuple) else out
        return np.reshape(np.swapaxes(out, 1, 2), (B * T, self.width)) @ part["out"]

    def loss(self, parameters, tokens, targets):
        """Mean cross-entropy of the targets, nats a token.

        Parameters
        ----------
        parameters : dict of ndarray
            Plain or traced.
        tokens, targets : int ndarray, shape (B, T)
            What is seen, and what comes next.

        Returns
        -------
        ndarray, shape ()
        """
        return cross_entropy(self.logits(parameters, tokens), targets)

    def maps(self, parameters, tokens):
        """Attention weights of a mechanism whose cache has ``p``: (layers, heads, T, T).

        Parameters
        ----------
        parameters : dict of ndarray
            Plain arrays.
        tokens : int ndarray, shape (T,)
            One sequence.
        """
        caches = []
        self.logits(parameters, tokens[None], caches)
        return np.stack([cache.p[0] for cache in caches])

    def sample(self, parameters, tokens, length, rng, temperature=0.8):
        """Continue a text, one token after another.

        Parameters
        ----------
        parameters : dict of ndarray
            Plain arrays.
        tokens : int ndarray, shape (T,)
            How it begins.
        length : int, tokens
            How much to add.
        rng : numpy.random.Generator
            Draws the tokens.
        temperature : float, > 0
            Small values keep to the likeliest token.

        Returns
        -------
        int ndarray, shape (T + length,)
        """
        for _ in range(length):
            z = self.logits(parameters, tokens[None, -self.context :])[0, -1] / temperature
            noise = rng.gumbel(size=z.shape)  # the largest of z + Gumbel noise is drawn from e^z
            tokens = np.append(tokens, np.argmax(z + noise))
        return tokens


def rms_norm(x, gain, eps=1e-5):
    """Divide every row by the root of its mean square, then scale every channel."""
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + eps) * gain


def layer_norm(x, gain, shift, eps=1e-5):
    """Subtract the mean of every row, then as :func:`rms_norm`, and shift every channel."""
    return rms_norm(x - np.mean(x, axis=-1, keepdims=True), gain, eps) + shift


def log_softmax(z):
    """z - log sum exp z along the last axis, without overflow."""
    z = z - np.max(z, axis=-1, keepdims=True)
    return z - np.log(np.sum(np.exp(z), axis=-1, keepdims=True))


def cross_entropy(logits, targets):
    """Mean of -log p(target), nats.

    Parameters
    ----------
    logits : ndarray, shape (..., vocabulary)
        Scores.
    targets : int ndarray, shape (...)
        The right tokens.
    """
    chosen = np.take_along_axis(log_softmax(logits), targets[..., None], axis=-1)
    return -np.mean(chosen)
