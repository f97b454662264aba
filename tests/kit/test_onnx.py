"""ONNX: its Attention node conforms with its conventions, and the wheel's node cases hold here."""

import importlib
import warnings

import numpy as np
import pytest

from attention_ref import kit
from attention_ref.kit import onnx_node

pytestmark = pytest.mark.oracle

ROWS = {
    "Attention": onnx_node.attention_node,
    "RotaryEmbedding": onnx_node.rotary_node,
    "LinearAttention": onnx_node.linear_attention_node,
}
WITHOUT_ROW = {"test_linear_attention_gated", "test_linear_attention_gated_per_head_decay"}
"""Gated linear attention: no row of the library computes it yet."""


def node_cases():
    """The node cases of the wheel that are no expanded duplicates: name -> case."""
    pytest.importorskip("onnx", reason="ONNX is not installed: make oracles")
    node = importlib.import_module("onnx.backend.test.case.node")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("attention", "rotaryembedding", "linear_attention"):
            importlib.import_module(f"onnx.backend.test.case.node.{name}")
    return {
        c.name: c for c in node._NodeTestCases
        if not c.name.endswith("_expanded") and c.model.graph.node[0].op_type in ROWS
    }  # fmt: skip


def run(case):
    """What the library gives for a node case, what ONNX expects, and the dtype."""
    import onnx

    node = case.model.graph.node[0]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    attributes = {n: a.decode() if isinstance(a, bytes) else a for n, a in attributes.items()}
    given, expected = case.data_sets[0]
    inputs, outputs = [n for n in node.input if n], [n for n in node.output if n]
    slots = dict(zip(node.input, onnx.defs.get_schema(node.op_type).inputs, strict=False))
    named = {slots[n].name: np.asarray(a) for n, a in zip(inputs, given, strict=True)}
    dtype = next(a.dtype for a in named.values())
    wide = {n: a if a.dtype.kind in "bi" else a.astype(np.float64) for n, a in named.items()}
    found = ROWS[node.op_type](wide, attributes)
    places = [o.name for o in onnx.defs.get_schema(node.op_type).outputs]
    slot = dict(zip(node.output, places, strict=False))
    return found, {slot[n]: np.asarray(a) for n, a in zip(outputs, expected, strict=True)}, dtype


def test_every_node_case_of_the_wheel():
    """Each within four roundings of its dtype; in onnx 1.23.2 these are 115 cases."""
    cases, skipped, compared = node_cases(), set(), 0
    assert len(cases) >= 100
    for name, case in cases.items():
        found, expected, dtype = run(case)
        if not found:
            skipped.add(name)
            continue
        eps = 2.0 ** {"float32": -23, "float16": -10, "bfloat16": -7}[str(dtype)]
        for slot, want in expected.items():
            got = found.get(slot)
            if got is None:
                continue
            compared += 1
            want = want.astype(np.float64)
            assert got.shape == want.shape, (name, slot)
            same = np.isneginf(got) & np.isneginf(want)
            gap = np.max(np.abs(np.where(same, 0, got) - np.where(same, 0, want)), initial=0.0)
            size = np.max(np.abs(np.where(np.isfinite(want), want, 0)), initial=1.0)
            assert gap <= 4 * eps * size, (name, slot, gap / (eps * size))
    assert skipped == WITHOUT_ROW
    assert compared >= len(cases)


def test_onnx_attention_conforms_with_its_conventions():
    pytest.importorskip("onnx", reason="ONNX is not installed: make oracles")
    attention = kit.onnx_attention()
    report = kit.check(attention, dtypes=("float64",))
    assert "matches with align='upper_left'; expected lower_right" in report.named
    rule = {"align": "upper_left"}
    exact = kit.check(attention, conventions=rule, dtypes=("float64",))
    inexact = {x.case for x in exact.wrong if x.case != "-"}
    assert inexact == {"softcap", "order"}  # its attributes are float32
    report = kit.check(attention, conventions=rule, dtypes=("float32",))
    assert report.ok, report
    rule["precision"] = "float32"
    assert kit.check(attention, "heads/multi_query", conventions=rule, dtypes=("float32",)).ok


def test_another_runtime_is_a_function_of_model_and_feeds():
    pytest.importorskip("onnx", reason="ONNX is not installed: make oracles")
    seen = []

    def runtime(model, feeds):
        seen.append(model.graph.node[0].op_type)
        return onnx_node._evaluate(model, feeds)

    assert kit.check(kit.onnx_attention(runtime), cases=["square"], dtypes=("float32",)).ok
    assert set(seen) == {"Attention"}


@pytest.mark.parametrize("rule", ["linear", "delta", "gated_delta"])
def test_a_sequence_in_two_parts_through_the_state(rule):
    """The wheel has no case of the rule "linear" with a past state."""
    rng = np.random.default_rng(0)
    attributes = {"update_rule": rule, "q_num_heads": 4, "kv_num_heads": 2, "scale": 0.3}
    widths = {"query": 12, "key": 6, "value": 10}
    given = {n: 0.5 * rng.standard_normal((2, 5, width)) for n, width in widths.items()}
    if rule != "linear":
        given["beta"] = rng.random((2, 5, 2))
    if rule == "gated_delta":
        given["decay"] = -rng.random((2, 5, 2))
    node = onnx_node.linear_attention_node
    whole = node(given, attributes)
    first = node({n: a[:, :3] for n, a in given.items()}, attributes)
    rest = {n: a[:, 3:] for n, a in given.items()} | {"past_state": first["present_state"]}
    second = node(rest, attributes)
    together = np.concatenate([first["output"], second["output"]], axis=1)
    np.testing.assert_allclose(together, whole["output"], rtol=0, atol=1e-13)
    np.testing.assert_allclose(second["present_state"], whole["present_state"], atol=1e-13)
