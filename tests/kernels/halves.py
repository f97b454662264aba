"""What a plain program in 16 bits computes: the yardstick of the ratio protocol.

A kernel that stores in 16 bits and sums in float32 may err at most twice as much as it in the
output, three times as much in a gradient.
"""

import numpy as np
import pytest

from tests.kernels import formulas


def dtype(storage):
    """float16, or bfloat16 from the package that both JAX and ONNX bring along."""
    if storage == "float16":
        return np.dtype(np.float16)
    return np.dtype(pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed").bfloat16)


def ratios(out, gradients, x, live, scale, softcap=None, bias=None):
    """{"out", "q", ...}: errors over those of the plain formula, each divided by what is allowed.

    ``x`` holds q, k, v, dout in 16 bits; ``live`` is the whole mask.
    """
    kind, options = x["q"].dtype, {"scale": scale, "softcap": softcap, "bias": bias}
    truth, _, true = formulas.dense(**x, **options, mask=live)
    rough, other = plain(**x, **options, live=live, store=lambda y: y.astype(kind).astype("f4"))
    found = {"out": error(out, truth) / error(rough, truth) / 2}
    for name, dx in gradients.items():
        found[name] = error(dx, true[name]) / error(other[name], true[name]) / 3
    return found


def plain(q, k, v, dout, store, live, scale=1.0, softcap=None, bias=None):
    """The formula as a plain program in 16 bits has it: float32 sums, every array rounded."""
    share = q.shape[1] // k.shape[1]
    q, k, v, dout = (x.astype(np.float32) for x in (q, k, v, dout))
    k, v = np.repeat(k, share, axis=1), np.repeat(v, share, axis=1)
    z = store(scale * (q @ k.swapaxes(-1, -2)))
    steep = np.float32(1)
    if softcap is not None:
        y = store(np.tanh(z / softcap))
        z, steep = store(softcap * y), store(1 - y * y)
    z = np.where(live, z if bias is None else store(z + bias), np.float32(-np.inf))
    top = np.max(z, axis=-1, keepdims=True)
    weight = store(np.exp(z - np.where(np.isfinite(top), top, 0)))
    total = store(weight.sum(axis=-1, keepdims=True))
    p = store(np.divide(weight, total, out=np.zeros_like(weight), where=total > 0))
    out = store(p @ v)
    dp = store(dout @ v.swapaxes(-1, -2))
    dz = store(p * (dp - store(np.sum(store(p * dp), axis=-1, keepdims=True))))
    gradients = {} if bias is None else {"bias": formulas.summed(dz, bias.shape)}
    dz = store(dz * steep)
    gradients |= {
        "q": store(scale * (dz @ k)),
        "k": store(formulas.folded(scale * (dz.swapaxes(-1, -2) @ q), share)),
        "v": store(formulas.folded(p.swapaxes(-1, -2) @ dout, share)),
    }
    return out, gradients


def error(x, truth):
    """Largest distance from the truth."""
    return float(np.max(np.abs(x.astype(np.float64) - truth)))
