"""The bug zoo: softmax attention with one classic mistake at a time, forward and backward.

Each entry is a mistake that somebody made in a published kernel or a reference. ``check`` compares
a foreign result with all of them and names the one that fits. :func:`attend` is written here once
more, apart from ``core``, so that the zoo shares no step with what it judges.
"""

import math

import numpy as np

FORWARD = {
    "causal alignment upper-left": "matches with align='upper_left'; expected lower_right",
    "causal alignment lower-right": "matches with align='lower_right'; expected upper_left",
    "causal ignored": "matches without the causal mask",
    "causal off by one ahead": "matches if each query also sees the next key",
    "causal without the own key": "matches if no query sees its own key",
    "scale missing": "matches with scale 1",
    "scale applied twice": "matches if the scale is applied twice",
    "scale default": "matches with 1/sqrt(D): the given scale is ignored",
    "scale inverted": "matches if scores are divided by the scale",
    "softmax over queries": "matches with the softmax over the queries (wrong axis)",
    "mask inverted": "matches with the mask inverted: True seems to mean 'blocked'",
    "mask ignored": "matches without the mask",
    "mask after softmax": "matches if weights are masked after the softmax and not normalised",
    "grouped heads tiled": "matches with head h reading key head h % G; expected h // (H // G)",
    "softcap ignored": "matches without the softcap",
    "softcap after bias": "matches if the softcap is applied after the bias",
    "softcap after mask": "matches if masked scores are capped: hidden keys keep weight",
    "bias ignored": "matches without the bias",
    "bias before scale": "matches if the bias is added before the scale",
    "empty row uniform": "matches if a query without keys gets the mean of the values",
    "empty row nan": "matches if a query without keys gives NaN",
    "no maximum subtracted": "overflows where the largest score is not subtracted first",
    "keys reversed": "matches with the keys in reverse order",
}
"""Name -> what the report says, for mistakes that show in the output."""

BACKWARD = {
    "row-sum term missing": "dS lacks the row-sum term: matches dz = p * dp",
    "dk and dv swapped": "dk and dv are swapped",
    "dq and dk swapped": "dq and dk are swapped",
    "scale missing in dq": "dq lacks the scale",
    "scale missing in dk": "dk lacks the scale",
    "sign of dq": "dq has the wrong sign",
    "sign of dk": "dk has the wrong sign",
    "softcap slope missing": "the derivative of the softcap is missing",
    "group not summed": "dk, dv of a group hold one head, not the sum over its H/G heads",
    "group averaged": "dk, dv of a group hold the mean over its heads, not the sum",
    "transposed weights in dv": "dv is made with p instead of its transpose",
    "gradient of the mean": "all gradients are divided by the number of outputs",
}
"""Name -> what the report says, for mistakes that show in gradients only."""


def attend(q, k, v, *, mask=None, causal=False, align="lower_right", scale=None, softcap=None,
           bias=None, bug=None):  # fmt: skip
    """Softmax attention with grouped heads in float64, right or with one mistake of the zoo.

    Parameters
    ----------
    q, k, v : ndarray, shapes (..., H, T, D), (..., G, S, D), (..., G, S, E)
        Without a head axis, H = G = 1.
    mask, causal, align, scale, softcap, bias
        As in ``scores/dot_product``.
    bug : str, optional
        A name of :data:`FORWARD` or :data:`BACKWARD`.

    Returns
    -------
    out : ndarray, shape (..., H, T, E)
        Output.
    backward : callable
        ``backward(dout)`` gives the gradients under "q", "k", "v" and, if given, "bias".
    """
    H, G = (q.shape[-3], k.shape[-3]) if q.ndim > 2 and k.ndim > 2 else (1, 1)
    kk, vv = _spread(k, H, G, bug), _spread(v, H, G, bug)
    D, T, S = q.shape[-1], q.shape[-2], k.shape[-2]
    if bug == "keys reversed":
        kk = kk[..., ::-1, :]
    c = _scale(1 / math.sqrt(D) if scale is None else scale, D, bug)
    live = _live(T, S, mask, causal, align, bug)
    b = 0.0 if bias is None or bug == "bias ignored" else bias
    z = q @ np.swapaxes(kk, -1, -2)
    z = (z + b) * c if bug == "bias before scale" else z * c
    slope = 1.0
    if bug == "bias before scale":
        b = 0.0
    if softcap is not None and bug != "softcap ignored":
        if bug == "softcap after bias":
            z, b = z + b, 0.0
        if bug == "softcap after mask":
            z, live = np.where(live, z + b, -np.inf), np.ones_like(live)
            b = 0.0
        z = softcap * np.tanh(z / softcap)
        slope = 1.0 if bug == "softcap slope missing" else 1 - (z / softcap) ** 2
    z = z + b
    p = _weights(np.broadcast_to(z, np.broadcast_shapes(z.shape, live.shape)), live, bug)

    def backward(dout):
        dp = dout @ np.swapaxes(vv, -1, -2)
        rows = 0.0 if bug == "row-sum term missing" else np.sum(p * dp, -1, keepdims=True)
        dz = p * (dp - rows)
        raw = dz * slope
        dq = raw @ kk * (1.0 if bug == "scale missing in dq" else c)
        dk = np.swapaxes(raw, -1, -2) @ q * (1.0 if bug == "scale missing in dk" else c)
        dv = np.swapaxes(p, -1, -2) @ dout
        if bug == "transposed weights in dv" and T == S:
            dv = p @ dout
        g = {"q": dq, "k": _gather(dk, k, H, G, bug), "v": _gather(dv, v, H, G, bug)}
        if bias is not None:
            g["bias"] = _sum_to(dz, bias.shape)
        return _spoil({n: _sum_to(x, {"q": q, "k": k, "v": v}[n].shape) if n != "bias" else x
                       for n, x in g.items()}, bug, dout.size)  # fmt: skip

    return p @ vv, backward


def _scale(c, D, bug):
    return {
        "scale missing": 1.0, "scale applied twice": c * c, "scale default": 1 / math.sqrt(D),
        "scale inverted": 1 / c if c else c,
    }.get(bug, c)  # fmt: skip


def _spread(x, H, G, bug):
    """Key heads for all query heads: consecutive heads share one, or tiled in the mistake."""
    if H == G or G == 1:
        return x
    if bug == "grouped heads tiled":
        return np.concatenate([x] * (H // G), axis=-3)
    return np.repeat(x, H // G, axis=-3)


def _gather(dx, x, H, G, bug):
    """Back from H heads to the G key heads."""
    if H == G or x.ndim < 3:
        return dx
    if bug == "grouped heads tiled" and G > 1:
        parts = np.reshape(dx, (*dx.shape[:-3], H // G, G, *dx.shape[-2:]))
        return np.sum(parts, axis=-4)
    parts = np.reshape(dx, (*dx.shape[:-3], G, H // G, *dx.shape[-2:]))
    if bug == "group not summed":
        return parts[..., 0, :, :]
    return np.mean(parts, -3) if bug == "group averaged" else np.sum(parts, -3)


def _live(T, S, mask, causal, align, bug):
    live = np.ones((T, S), bool)
    if causal and bug != "causal ignored":
        align = {"causal alignment upper-left": "upper_left",
                 "causal alignment lower-right": "lower_right"}.get(bug, align)  # fmt: skip
        shift = S - T if align == "lower_right" else 0
        shift += {"causal off by one ahead": 1, "causal without the own key": -1}.get(bug, 0)
        live = np.tri(T, S, shift, dtype=bool)
    if mask is not None and bug != "mask ignored":
        live = live & (~mask if bug == "mask inverted" else mask)
    return live


def _weights(z, live, bug):
    axis = -2 if bug == "softmax over queries" else -1
    seen = np.ones_like(live) if bug == "mask after softmax" else live
    z = np.where(seen, z, -np.inf)
    with np.errstate(all="ignore"):
        top = np.max(z, axis, keepdims=True)
        top = 0.0 if bug == "no maximum subtracted" else np.where(np.isfinite(top), top, 0.0)
        e = np.exp(z - top)
        total = np.sum(e, axis, keepdims=True)
        p = e / np.where(total == 0, 1.0, total)
    p = np.where(live, p, 0.0)
    if bug in ("empty row uniform", "empty row nan"):
        fill = 1 / z.shape[-1] if bug == "empty row uniform" else np.nan
        p = np.where(total == 0, fill, p)
    return p


def _sum_to(dx, shape):
    dx = np.sum(dx, axis=tuple(range(dx.ndim - len(shape))))
    return np.sum(dx, tuple(i for i, n in enumerate(shape) if n == 1), keepdims=True)


def _spoil(g, bug, outputs):
    """Mistakes made after the gradients themselves were right."""
    if bug == "dk and dv swapped" and g["k"].shape == g["v"].shape:
        g = g | {"k": g["v"], "v": g["k"]}
    if bug == "dq and dk swapped" and g["q"].shape == g["k"].shape:
        g = g | {"q": g["k"], "k": g["q"]}
    if bug == "sign of dq":
        g = g | {"q": -g["q"]}
    if bug == "sign of dk":
        g = g | {"k": -g["k"]}
    return {n: x / outputs for n, x in g.items()} if bug == "gradient of the mean" else g


def animal(bug):
    """A function with one mistake, in the calling contract: forward and backward.

    Parameters
    ----------
    bug : str
        A name of :data:`FORWARD` or :data:`BACKWARD`.

    Returns
    -------
    forward, backward : callable
        ``forward(q, k, v, ...) -> (out, cache)``, ``backward(dout, cache) -> dict``.
    """

    def forward(q, k, v, **options):
        return attend(q, k, v, bug=bug, **options)

    def backward(dout, cache):
        return cache(dout)

    return forward, backward
