"""ONNX: its Attention node as a function in the words of this library, and nodes run by our rows.

:func:`onnx_attention` makes any ONNX runtime a target of ``check``. The other functions go the
other way: they take inputs and attributes of an ONNX node and compute it with this library.
"""

import numpy as np

from attention_ref.core.registry import get


def onnx_attention(run=None, opset=24):
    """A function on NumPy arrays around a model that holds one ONNX Attention node.

    Parameters
    ----------
    run : callable, optional
        ``run(model, feeds) -> list of outputs`` of a runtime; ONNX's own evaluator by default.
        For ONNX Runtime: ``lambda model, feeds: onnxruntime.InferenceSession(
        model.SerializeToString()).run(None, feeds)``.
    opset : int
        Version of the operator set, at least 23.

    Returns
    -------
    callable
        ``attention(q, k, v, mask=, causal=, scale=, softcap=, bias=) -> out``.

    Notes
    -----
    Attributes of a node are float32. For float64 inputs the scale is therefore multiplied into q
    and the node gets 1; a softcap cannot be, so that cases with one need
    ``conventions={"precision": "float32"}``.
    """
    import onnx

    def attention(q, k, v, mask=None, causal=False, scale=None, softcap=None, bias=None):
        feeds, attributes = {"Q": q, "K": k, "V": v}, {"is_causal": int(causal)}
        if scale is not None:
            exact = q.dtype == np.float64  # an attribute has the digits of float32
            attributes["scale"] = 1.0 if exact else float(scale)
            feeds["Q"] = q * scale if exact else q
        if softcap is not None:
            attributes["softcap"] = float(softcap)
        if bias is not None:
            hidden = np.asarray(-np.inf, q.dtype)
            feeds["attn_mask"] = bias if mask is None else np.where(mask, bias, hidden)
        elif mask is not None:
            feeds["attn_mask"] = mask
        if "attn_mask" in feeds:  # onnx 1.23.2 takes the causal rows from the mask's own query axis
            given, full = feeds["attn_mask"], (q.shape[-2], k.shape[-2])
            feeds["attn_mask"] = np.broadcast_to(given, (*given.shape[:-2], *full)).copy()
        return (run or _evaluate)(_model("Attention", feeds, attributes, opset), feeds)[0]

    def _model(op, feeds, attributes, version):
        kind = onnx.helper.np_dtype_to_tensor_dtype
        values = [onnx.helper.make_tensor_value_info(n, kind(a.dtype), a.shape)
                  for n, a in feeds.items()]  # fmt: skip
        node = onnx.helper.make_node(op, list(feeds), ["Y"], **attributes)
        out = onnx.helper.make_tensor_value_info("Y", kind(feeds["Q"].dtype), None)
        graph = onnx.helper.make_graph([node], "attention", values, [out])
        return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", version)])

    return attention


def _evaluate(model, feeds):
    from onnx.reference import ReferenceEvaluator

    return ReferenceEvaluator(model).run(None, feeds)


# ------------------------------------------------------------------------------ nodes by our rows


def _heads(x, count):
    """(B, T, H * D) to (B, H, T, D); four axes pass."""
    if x.ndim == 4:
        return x
    return np.swapaxes(x.reshape(*x.shape[:2], count, -1), 1, 2)


def _flat(x):
    return np.swapaxes(x, 1, 2).reshape(x.shape[0], x.shape[2], -1)


def attention_node(inputs, attributes):
    """Outputs Y, present_key, present_value of an Attention node, by heads/multi_query.

    Parameters
    ----------
    inputs : dict
        Q, K, V and optionally attn_mask, past_key, past_value, nonpad_kv_seqlen: float64 or
        integer arrays.
    attributes : dict
        Those of the node.

    Returns
    -------
    dict
        "Y", "present_key", "present_value", "qk_matmul_output"; the last is None in mode 0 with a
        softcap, since the row keeps no scores from before it.
    """
    q = _heads(inputs["Q"], attributes.get("q_num_heads"))
    k, v = (_heads(inputs[n], attributes.get("kv_num_heads")) for n in ("K", "V"))
    past, valid = inputs.get("past_key"), inputs.get("nonpad_kv_seqlen")
    before = np.zeros(q.shape[0], int)  # keys that precede the first query
    if past is not None:
        k = np.concatenate([past, k], axis=2)
        v = np.concatenate([inputs["past_value"], v], axis=2)
        before = before + past.shape[2]
    T, S = q.shape[2], k.shape[2]
    if valid is not None:
        before = valid.reshape(-1) - T
    place = np.arange(T)[:, None] + before[:, None, None, None]
    key, live = np.arange(S), np.ones((q.shape[0], 1, T, S), bool)
    if attributes.get("is_causal"):
        live &= key <= place
    left, right = (attributes.get(f"{n}_window_size", -1) for n in ("left", "right"))
    if left >= 0:
        live &= key >= place - left
    if right >= 0:
        live &= key <= place + right
    if valid is not None:
        live &= key < valid.reshape(-1, 1, 1, 1)
    mask, bias = inputs.get("attn_mask"), None
    if mask is not None:
        short = [(0, 0)] * (mask.ndim - 1) + [(0, S - mask.shape[-1])]
        if mask.dtype == bool:
            live = live & np.pad(mask, short)
        else:
            bias = np.pad(mask, short, constant_values=-np.inf)
            live = live & ~np.isneginf(bias)
            bias = np.broadcast_to(np.where(np.isneginf(bias), 0.0, bias), (T, S)
                                   if bias.ndim < 2 else bias.shape)  # fmt: skip
    cap, mode = attributes.get("softcap") or None, attributes.get("qk_matmul_output_mode", 0)
    shared = {"scale": attributes.get("scale"), "softcap": cap, "bias": bias}
    out, cache = get("heads/multi_query").forward(q, k, v, mask=live, **shared)
    capped, p = (a.reshape(*q.shape[:3], S) for a in (cache.capped, cache.p))  # groups to heads
    scores = np.where(live, capped + (0.0 if bias is None else bias), -np.inf)
    kept = {0: None if cap else capped, 1: capped, 2: scores, 3: p}[mode]
    y = _flat(out) if inputs["Q"].ndim == 3 else out
    return {"Y": y, "present_key": k, "present_value": v, "qk_matmul_output": kept}


def linear_attention_node(inputs, attributes):
    """Outputs of a LinearAttention node, by recurrent/delta_rule and linear/linear_transformer.

    Parameters
    ----------
    inputs : dict
        query, key, value and optionally past_state, decay, beta.
    attributes : dict
        Those of the node.

    Returns
    -------
    dict
        "output" and "present_state"; empty for the update rule "gated", which no row here has.
    """
    rule = attributes.get("update_rule", "gated_delta")
    H, G = attributes["q_num_heads"], attributes["kv_num_heads"]
    q, k, v = (_heads(inputs[n], c) for n, c in (("query", H), ("key", G), ("value", G)))
    c = attributes.get("scale") or q.shape[-1] ** -0.5
    state = inputs.get("past_state")
    if rule == "gated":
        return {}
    if rule == "linear":
        state = np.zeros((*k.shape[:2], k.shape[3], v.shape[3])) if state is None else state
        wide = [np.repeat(a, H // G, axis=1) for a in (k, v, state)]
        out, _ = get("linear/linear_transformer").forward(
            q, wide[0], wide[1], causal=True, normalise=False, feature_map="identity"
        )
        out = c * (out + q @ wide[2])
        return {"output": _flat(out), "present_state": state + np.swapaxes(k, 2, 3) @ v}
    b = np.broadcast_to(np.swapaxes(inputs["beta"], 1, 2), k.shape[:3])
    gate = None
    if rule == "gated_delta":
        gate = np.exp(_heads(inputs["decay"], G))
        gate = gate[..., 0] if inputs["decay"].shape[-1] == G else gate
    k, v, b, gate, state = (
        None if a is None else np.repeat(a, H // G, axis=1) for a in (k, v, b, gate, state)
    )
    found, _ = get("recurrent/delta_rule").forward(q, k, v, b, gate, state, scale=c)
    return {"output": _flat(found.out), "present_state": found.state[:, :: H // G]}


def rotary_node(inputs, attributes):
    """Output of a RotaryEmbedding node, by the rotation of scores/rotary.

    Parameters
    ----------
    inputs : dict
        X, cos_cache, sin_cache and optionally position_ids.
    attributes : dict
        Those of the node.

    Returns
    -------
    dict
        "Y".
    """
    from attention_ref.methods.scores.rotary import turn_forward

    x, cos, sin = (inputs[n] for n in ("X", "cos_cache", "sin_cache"))
    if inputs.get("position_ids") is not None:
        cos, sin = cos[inputs["position_ids"]], sin[inputs["position_ids"]]
    four = _heads(x, attributes.get("num_heads"))
    out = turn_forward(four, cos[:, None], sin[:, None], bool(attributes.get("interleaved")))
    return {"Y": _flat(out) if x.ndim == 3 else out}
