"""The bug zoo: attention with one classic mistake at a time, forward and backward.

Each entry is a mistake that somebody made in a published kernel or a reference. ``check`` compares
a foreign result with all of them and names the one that fits. :func:`attend` and :func:`delta` are
written here once more, apart from ``core``, so that the zoo shares no step with what it judges.
:func:`variants` holds what any row can have wrong: the reference itself with one argument changed.
"""

import inspect
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
    "scale of the value width": "matches with 1/sqrt(E): the width of the values, expected that "
    "of the keys",
    "mask added as numbers": "matches if the mask is added to the scores as 0 and 1",
    "not normalised": "matches if the weights are not divided by their sum",
    "scores transposed": "matches with k q^T in place of q k^T",
    "bias subtracted": "matches with the bias subtracted",
    "weights squared": "matches if the softmax is applied twice",
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
    "diagonal of the Jacobian": "dS keeps the diagonal of the softmax Jacobian only: "
    "dz = p * (1 - p) * dp",
    "scale twice in dq and dk": "dq and dk carry the scale twice",
    "bias gradient scaled": "dbias carries the scale, which stands before the bias",
    "row-sum over the queries": "dS subtracts the sum over the queries (wrong axis), expected over "
    "the keys",
    "row-sum without the weights": "dS subtracts the plain sum of dp, expected that of p * dp",
}
"""Name -> what the report says, for mistakes that show in gradients only."""

LSE = {
    "log-sum-exp without the maximum": "lse is the log-sum-exp without the maximum: the row's "
    "largest score is not added back",
    "log-sum-exp in base 2": "lse is in base 2, expected nats: divided by ln 2",
    "maximum in place of the log-sum-exp": "lse is the largest score of the row",
    "sum in place of its logarithm": "lse is the sum of exponentials, not its logarithm",
    "sign of the log-sum-exp": "lse has the wrong sign",
}
"""Name -> what the report says, for mistakes in a returned log-sum-exp."""

DELTA = {
    "delta rule without erasing": "matches if v is written as it is: the memory's answer to k is "
    "not subtracted",
    "delta rule compares before the decay": "matches if v is compared with the memory before its "
    "decay",
    "delta rule reads before it writes": "matches if the memory is read before the token is "
    "written",
    "delta rule forgets beta": "matches with a writing strength of 1: beta has no effect",
    "delta rule gate as logarithm": "matches if exp(gate) is applied: the gate is taken for a "
    "logarithm",
}
"""Name -> what the report says, for mistakes in the delta rule."""

BLOCKS = {
    "online softmax that is not rescaled": "matches an online softmax over blocks of 2 whose sums "
    "are not rescaled when the maximum grows",
    "online softmax with an output that is not rescaled": "matches an online softmax over blocks "
    "of 2 that rescales the sum of the weights but not the output when the maximum grows",
    "online softmax with a sum that is not rescaled": "matches an online softmax over blocks of 2 "
    "that rescales the output but not the sum of the weights when the maximum grows",
    "online softmax with maxima of blocks": "matches an online softmax over blocks of 2 in which "
    "every block keeps its own maximum",
}
"""Name -> what the report says, for :func:`blocks`."""

ARGUMENTS = {
    "patterns/sliding_window": (
        "window off by one to the left: matches if it reaches one key further",
        "window off by one to the left: matches if it reaches one key less far",
        "window off by one to the right: matches if it reaches one key further",
        "matches with dilation at its default: it has no effect",
        "matches with global_tokens at its default: it has no effect",
    ),
    "scores/rotary": (
        "rotary pairs interleaved, expected halves",
        "rotary pairs halves, expected interleaved",
        "matches if rotary turns in the other direction",
        "matches if rotary positions of the queries start at 0",
        "matches if rotary turns the queries only",
    ),
    "scores/alibi": ("matches with the sign of m turned",),
    "normalizers/sparsemax": ("matches with the mask inverted: True seems to mean 'blocked'",),
    "recurrent/delta_rule": ("matches with state at its default: it has no effect",),
}
"""Row -> mistakes in one argument of it, as :func:`variants` says them: exhibits for the docs."""


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
    c = 1 / math.sqrt(v.shape[-1]) if bug == "scale of the value width" else c
    live = _live(T, S, mask, causal, align, bug)
    b = 0.0 if bias is None or bug == "bias ignored" else bias
    b = -b if bug == "bias subtracted" else b
    if bug == "mask added as numbers" and mask is not None:
        b, live = b + mask.astype(float), _live(T, S, None, causal, align, bug)
    z = q @ np.swapaxes(kk, -1, -2)
    if bug == "scores transposed" and T == S:
        z = np.swapaxes(z, -1, -2)
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
        if bug == "row-sum over the queries":
            rows = np.sum(p * dp, -2, keepdims=True)
        if bug == "row-sum without the weights":
            rows = np.sum(dp, -1, keepdims=True)
        dz = p * (1 - p) * dp if bug == "diagonal of the Jacobian" else p * (dp - rows)
        raw = dz * slope * (c if bug == "scale twice in dq and dk" else 1.0)
        dq = raw @ kk * (1.0 if bug == "scale missing in dq" else c)
        dk = np.swapaxes(raw, -1, -2) @ q * (1.0 if bug == "scale missing in dk" else c)
        dv = np.swapaxes(p, -1, -2) @ dout
        if bug == "transposed weights in dv" and T == S:
            dv = p @ dout
        g = {"q": dq, "k": _gather(dk, k, H, G, bug), "v": _gather(dv, v, H, G, bug)}
        if bias is not None:
            g["bias"] = _sum_to(dz * (c if bug == "bias gradient scaled" else 1.0), bias.shape)
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
        p = e / np.where((total == 0) | (bug == "not normalised"), 1.0, total)
        if bug == "weights squared":
            e = np.where(seen, np.exp(p), 0.0)
            p = e / np.where(total == 0, 1.0, np.sum(e, axis, keepdims=True))
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


def logsumexp(q, k, v, *, bug=None, **options):
    """The output of :func:`attend` and its log-sum-exp, right or with one mistake of LSE.

    Parameters
    ----------
    q, k, v, **options
        As in :func:`attend`.
    bug : str, optional
        A name of :data:`LSE`.

    Returns
    -------
    out, lse : ndarray, shapes (..., H, T, E), (..., H, T)
    """
    H, G = (q.shape[-3], k.shape[-3]) if q.ndim > 2 and k.ndim > 2 else (1, 1)
    z = _scores(q, k, H, G, options)
    with np.errstate(all="ignore"):
        top = np.max(z, -1)
        top = np.where(np.isfinite(top), top, 0.0)
        total = np.sum(np.exp(z - top[..., None]), -1)
        lse = {
            "log-sum-exp without the maximum": np.log(total),
            "log-sum-exp in base 2": (np.log(total) + top) / math.log(2),
            "maximum in place of the log-sum-exp": top,
            "sum in place of its logarithm": total * np.exp(top),
            "sign of the log-sum-exp": -(np.log(total) + top),
        }.get(bug, np.log(total) + top)
    return attend(q, k, v, **options)[0], lse


def blocks(q, k, v, *, size, bug=None, hidden=-np.inf, **options):
    """Online softmax over blocks of keys, right or forgetting to rescale what it has summed up.

    Parameters
    ----------
    q, k, v, **options
        As in :func:`attend`.
    size : int
        Keys a block.
    bug : str, optional
        A name of :data:`BLOCKS`.
    hidden : float
        The score of a hidden key; a finite one is a mistake of its own.

    Returns
    -------
    ndarray, shape (..., H, T, E)
    """
    H, G = (q.shape[-3], k.shape[-3]) if q.ndim > 2 and k.ndim > 2 else (1, 1)
    vv, total, out = _spread(v, H, G, None), 0.0, 0.0
    z = np.maximum(_scores(q, k, H, G, options), hidden)
    top = np.full_like(z[..., :1], -np.inf)
    stale = {name: bug != f"online softmax with {name} that is not rescaled" for name in
             ("a sum", "an output")}  # fmt: skip
    for s in range(0, z.shape[-1], size):
        part, old = z[..., s : s + size], top
        best = np.max(part, -1, keepdims=True)
        top = best if bug == "online softmax with maxima of blocks" else np.maximum(old, best)
        with np.errstate(all="ignore"):
            safe = np.where(np.isfinite(top), top, 0.0)
            e, alpha = np.exp(part - safe), np.exp(old - safe)
        if bug in ("online softmax that is not rescaled", "online softmax with maxima of blocks"):
            alpha = 1.0
        total = total * (alpha if stale["a sum"] else 1.0) + np.sum(e, -1, keepdims=True)
        out = out * (alpha if stale["an output"] else 1.0) + e @ vv[..., s : s + size, :]
    return out / np.where(total == 0, 1.0, total)


def _scores(q, k, H, G, options):
    """Right scores, -inf where a query may not look."""
    T, S, D = q.shape[-2], k.shape[-2], q.shape[-1]
    scale, cap, bias = (options.get(n) for n in ("scale", "softcap", "bias"))
    z = q @ np.swapaxes(_spread(k, H, G, None), -1, -2)
    z = z * (1 / math.sqrt(D) if scale is None else scale)
    z = z if cap is None else cap * np.tanh(z / cap)
    live = _live(T, S, options.get("mask"), options.get("causal", False),
                 options.get("align", "lower_right"), None)  # fmt: skip
    return np.where(live, z if bias is None else z + bias, -np.inf)


def delta(q, k, v, b, gate=None, state=None, *, scale=None, bug=None):
    """The delta rule token by token, right or with one mistake of :data:`DELTA`.

    Parameters
    ----------
    q, k, v, b, gate, state, scale
        As in ``recurrent/delta_rule``.
    bug : str, optional
        A name of :data:`DELTA`.

    Returns
    -------
    out, state : ndarray, shapes (..., T, E), (..., D, E)
    """
    c = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    channel = gate is not None and gate.ndim > b.ndim
    shape = (*np.broadcast_shapes(q.shape[:-2], v.shape[:-2]), k.shape[-1], v.shape[-1])
    S, outs = np.broadcast_to(0.0 if state is None else state, shape), []
    for t in range(q.shape[-2]):
        a = 1.0 if gate is None else gate[..., t, :, None] if channel else gate[..., t, None, None]
        a = np.exp(a) if bug == "delta rule gate as logarithm" and gate is not None else a
        key, old, before = k[..., t, :, None], S * a, S
        seen = before if bug == "delta rule compares before the decay" else old
        answer = np.sum(seen * key, axis=-2, keepdims=True)
        answer = 0.0 if bug == "delta rule without erasing" else answer
        strength = 1.0 if bug == "delta rule forgets beta" else b[..., t, None, None]
        S = old + strength * key * (v[..., t, None, :] - answer)
        read = old if bug == "delta rule reads before it writes" else S
        outs.append(c * np.sum(read * q[..., t, :, None], axis=-2))
    return np.stack(outs, axis=-2), S


# ------------------------------------------------------------------------------ any row


def variants(spec, kwargs):
    """What any row may have wrong: a name for the report, and the arguments that show it.

    Parameters
    ----------
    spec : Spec
        The row.
    kwargs : dict
        Arguments of a case.

    Yields
    ------
    says : str
        What the report says if the reference on these arguments equals the foreign result.
    changed : dict
        Arguments.
    """
    parameters = inspect.signature(spec.main).parameters
    if kwargs.get("causal") and "align" in parameters:
        for align, name in (("upper_left", "upper-left"), ("lower_right", "lower-right")):
            yield FORWARD[f"causal alignment {name}"], kwargs | {"align": align}
    if isinstance(kwargs.get("mask"), np.ndarray):
        yield FORWARD["mask inverted"], kwargs | {"mask": ~kwargs["mask"]}
    if "scale" in parameters and "q" in kwargs:
        D, c = kwargs["q"].shape[-1], kwargs.get("scale")
        c = 1 / math.sqrt(D) if c is None else c
        for bug in ("scale missing", "scale applied twice", "scale default", "scale inverted"):
            yield FORWARD[bug], kwargs | {"scale": _scale(c, D, bug)}
    if "empty_row" in parameters:
        for rule in ("uniform", "nan"):
            yield FORWARD[f"empty row {rule}"], kwargs | {"empty_row": rule}
    for name in ("left", "right"):
        for step, word in ((1, "further"), (-1, "less far")):
            if isinstance(kwargs.get(name), int) and kwargs[name] + step >= 0:
                says = f"window off by one to the {name}: matches if it reaches one key {word}"
                yield says, kwargs | {name: kwargs[name] + step}
    if "interleaved" in parameters:
        have = bool(kwargs.get("interleaved", False))
        found, expected = ("halves", "interleaved") if have else ("interleaved", "halves")
        yield f"rotary pairs {found}, expected {expected}", kwargs | {"interleaved": not have}
        yield from _turned(kwargs)
    known = {"causal": FORWARD["causal ignored"], "mask": FORWARD["mask ignored"],
             "softcap": FORWARD["softcap ignored"], "bias": FORWARD["bias ignored"]}  # fmt: skip
    for name, a in kwargs.items():
        default = parameters[name].default if name in parameters else inspect.Parameter.empty
        if default is not inspect.Parameter.empty and name not in ("align", "scale", "rng"):
            left = {n: x for n, x in kwargs.items() if n != name}
            yield known.get(name, f"matches with {name} at its default: it has no effect"), left
        if isinstance(a, np.ndarray) and a.dtype.kind == "f" and name not in "qkv":
            yield f"matches with the sign of {name} turned", kwargs | {name: -a}


def _turned(kwargs):
    """Rotary positions that went wrong."""
    q, k = kwargs["q"], kwargs["k"]
    T, S = q.shape[-2], k.shape[-2]
    first = S - T if kwargs.get("align", "lower_right") == "lower_right" else 0
    pos_q, pos_k = kwargs.get("pos_q"), kwargs.get("pos_k")
    pos_q = np.arange(T) + first + 0.0 if pos_q is None else pos_q
    pos_k = np.arange(S) + 0.0 if pos_k is None else pos_k
    for says, a, b in (
        ("rotary turns in the other direction", -pos_q, -pos_k),
        ("rotary positions of the queries start at 0", np.arange(T) + 0.0, pos_k),
        ("rotary turns the queries only", pos_q, 0.0 * pos_k),
        ("rotary positions of the queries are one too far", pos_q + 1.0, pos_k),
        ("rotary has no effect", 0.0 * pos_q, 0.0 * pos_k),
    ):
        yield f"matches if {says}", kwargs | {"pos_q": a, "pos_k": b}


# ------------------------------------------------------------------------------ exhibits


def animal(bug):
    """A function with one mistake, in the calling contract: forward and backward.

    Parameters
    ----------
    bug : str
        A name of :data:`FORWARD`, :data:`BACKWARD`, :data:`LSE`, :data:`BLOCKS` or :data:`DELTA`;
        the backward of the last three is None.

    Returns
    -------
    forward, backward : callable
        ``forward(q, k, v, ...) -> (out, cache)``, ``backward(dout, cache) -> dict``.
    """

    if bug in LSE:
        return lambda q, k, v, **options: logsumexp(q, k, v, bug=bug, **options), None
    if bug in BLOCKS:
        return lambda q, k, v, **options: blocks(q, k, v, size=2, bug=bug, **options), None
    if bug in DELTA:
        return lambda *args, **options: delta(*args, bug=bug, **options), None

    def forward(q, k, v, **options):
        return attend(q, k, v, bug=bug, **options)

    def backward(dout, cache):
        return cache(dout)

    return forward, backward


def variant(key, says):
    """The reference itself with one argument wrong, as a function to be found out.

    Parameters
    ----------
    key : str
        A row.
    says : str
        What :func:`variants` calls the mistake.

    Returns
    -------
    callable
        ``forward(**kwargs) -> out``; right where the mistake does not apply.
    """
    from attention_ref.core.registry import get

    spec = get(key)

    def forward(**kwargs):
        changed = dict(variants(spec, kwargs)).get(says, kwargs)
        return spec.call(changed)[0]

    return forward
