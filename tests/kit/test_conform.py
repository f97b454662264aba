"""``kit.check``: right functions conform, every animal of the zoo is named, frameworks too."""

import json
import math
import time

import numpy as np
import pytest

import attention_ref
from attention_ref import kit
from attention_ref.core.errors import ParameterError
from attention_ref.kit import golden, zoo

ROWS = [key for key in attention_ref.keys(kind="mechanism") if golden.paths(key)[0].is_file()]


@pytest.mark.parametrize("key", ROWS)
def test_every_mechanism_conforms_to_itself(key):
    spec = attention_ref.get(key)
    report = kit.check(spec.forward, key, backward=spec.backward, dtypes=("float32",))
    assert report.ok, report


def right(q, k, v, causal=False, scale=None, mask=None):
    """A right attention by other means: explicit loops over the batch, NumPy inside."""
    c = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    z = np.einsum("...td,...sd->...ts", q, k) * q.dtype.type(c)
    live = np.tri(*z.shape[-2:], k.shape[-2] - q.shape[-2], dtype=bool) if causal else True
    live = live & (True if mask is None else mask)
    z = np.where(live, z, -np.inf)
    top = np.max(z, -1, keepdims=True)
    e = np.exp(z - np.where(np.isfinite(top), top, 0).astype(z.dtype))
    total = np.sum(e, -1, keepdims=True)
    return np.einsum("...ts,...se->...te", e / np.where(total == 0, 1, total), v)


def test_a_right_function_conforms_and_what_it_cannot_do_is_said():
    report = kit.check(right)
    assert report.ok
    skipped = {x.says for x in report if x.verdict == "skipped"}
    assert "it has no argument for bias" in skipped


def test_two_layouts():
    def other(q, k, v, causal=False, scale=None, mask=None):
        back = (np.swapaxes(x, -2, -3) for x in (q, k, v))
        return np.swapaxes(right(*back, causal, scale, mask), -2, -3)

    assert kit.check(other, layout="BTHD").ok
    assert not kit.check(other, layout="BHTD").ok


def test_names_are_guessed_from_the_signature():
    def theirs(query, key, value, is_causal=False, softmax_scale=None, attn_mask=None):
        return right(query, key, value, is_causal, softmax_scale, attn_mask)

    assert kit.check(theirs).ok


def test_half_precision_inside_is_seen():
    def narrow(q, k, v, causal=False, scale=None, mask=None):
        low = (x.astype(np.float32) for x in (q, k, v))
        return right(*low, causal, scale, mask).astype(q.dtype)

    report = kit.check(narrow, cases=["square"])
    assert any("lower precision inside" in says for says in report.named)
    assert kit.check(narrow, conventions={"precision": "float32"}).ok


def test_a_constant_factor_is_named():
    spec = attention_ref.get("normalizers/sparsemax")

    def backward(dout, cache):
        g = spec.backward(dout, cache)
        return g | {"k": 2 * g["k"]}

    report = kit.check(spec.forward, "normalizers/sparsemax", backward=backward)
    assert "dk is 2 times the right one" in report.named


def test_an_exception_is_a_line_not_a_crash():
    def broken(q, k, v, scale=None):
        raise RuntimeError("no such kernel")

    report = kit.check(broken, cases=["square"])
    assert not report.ok and "it raised RuntimeError: no such kernel" in report.named


def test_a_wrong_shape_and_other_axes():
    report = kit.check(lambda q, k, v, scale=None: q, cases=["plain"])
    assert any("output has shape" in says for says in report.named)
    report = kit.check(
        lambda q, k, v, scale=None: np.swapaxes(right(q, k, v, scale=scale), -1, -2),
        cases=["plain"],
    )
    assert any("tokens and channels are swapped" in says for says in report.named)
    report = kit.check(
        lambda q, k, v, scale=None: np.moveaxis(right(q, k, v, scale=scale), -1, 0),
        cases=["plain"],
    )
    assert any("axes in another order" in says for says in report.named)


def test_the_report_as_table_and_json():
    forward, backward = zoo.animal("scale missing")
    report = kit.check(forward, backward=backward, cases=["square"])
    assert "matches with scale 1" in str(report) and "to repeat it: kit.check" in str(report)
    found = json.loads(report.to_json())
    assert found["ok"] is False and found["lines"][0]["case"] == "square"


def test_nothing_compared_is_not_ok():
    assert not kit.check(right, cases=["no such case"]).ok


@pytest.mark.parametrize(
    "change", [{"framework": "tensorflow"}, {"layout": "TBHD"}, {"key": "scores/dot_produkt"}]
)
def test_misuse(change):
    with pytest.raises(ParameterError):
        kit.check(right, **change)


def test_a_function_without_a_signature_needs_names():
    with pytest.raises(ParameterError, match="names is needed"):
        kit.check(min)


@pytest.mark.oracle
def test_pytorch_conforms_upper_left():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")
    sdpa = torch.nn.functional.scaled_dot_product_attention
    report = kit.check(sdpa)
    assert report.named == ["matches with align='upper_left'; expected lower_right"]
    assert kit.check(sdpa, conventions={"align": "upper_left"}).ok


@pytest.mark.oracle
def test_pytorch_grouped_heads():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")
    sdpa = torch.nn.functional.scaled_dot_product_attention
    rule = {"align": "upper_left"}
    report = kit.check(sdpa, "heads/multi_query", fixed={"enable_gqa": True}, conventions=rule)
    assert report.ok, report.named


@pytest.mark.oracle
def test_jax_conforms_with_its_conventions():
    jax = pytest.importorskip("jax", reason="JAX is not installed: make oracles")
    rule = {"align": "upper_left", "empty_row": "uniform", "same_width": True}
    names = {"q": "query", "k": "key", "v": "value", "bias": "bias", "mask": "mask",
             "causal": "is_causal", "scale": "scale"}  # fmt: skip
    attention = jax.nn.dot_product_attention

    def check(dtype, cases, **more):
        return kit.check(attention, layout="BTHD", names=names, conventions=rule | more,
                         dtypes=(dtype,), cases=cases)  # fmt: skip

    report = check("float64", ["square"])
    assert any("lower precision inside" in says for says in report.named)
    assert check("float64", ["square"], precision="float32").ok
    some = ["causal", "bias", "huge", "empty-row", "odd-17"]
    assert check("float32", some).ok, check("float32", some).named


@pytest.mark.oracle
def test_a_wrong_kernel_in_pytorch_is_explained():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")

    def mine(q, k, v, scale=None, is_causal=False):
        z = q @ k.transpose(-1, -2) * (scale or 1 / math.sqrt(q.shape[-1]))
        if is_causal:
            live = torch.ones(z.shape[-2:], dtype=torch.bool).tril(k.shape[-2] - q.shape[-2] + 1)
            z = z.masked_fill(~live, -torch.inf)
        return torch.softmax(z, -1) @ v

    begin = time.perf_counter()
    report = kit.check(mine)
    assert time.perf_counter() - begin < 10  # the promise of the docs
    assert "matches if each query also sees the next key" in report.named
