"""The table of conventions: complete, and its asserted cells measured on the frameworks."""

import numpy as np
import pytest

import attention_ref
from attention_ref import kit
from attention_ref.core.errors import DTypeError, ParameterError
from attention_ref.kit import frameworks, properties

RNG = np.random.default_rng(0)
B, H, T, S, D = 1, 2, 3, 5, 4
Q, K, V = (RNG.standard_normal((B, H, n, D)) for n in (T, S, S))


def ours(q, k, v, **options):
    return attention_ref.run("heads/multi_query", q, k, v, **options)[0]


def torch_sdpa(q, k, v, mask=None, **options):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")
    theirs = {"causal": "is_causal"}
    options = {theirs.get(n, n): a for n, a in options.items()}
    mask = None if mask is None else torch.tensor(mask)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    arrays = (torch.tensor(x) for x in (q, k, v))
    return sdpa(*arrays, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1], **options).numpy()


def torch_mha(q, k, v, mask=None):
    """The module with identity projections; heads side by side in the last axis."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")
    width = q.shape[1] * q.shape[3]
    module = torch.nn.MultiheadAttention(width, q.shape[1], bias=False, batch_first=True,
                                         dtype=torch.float64)  # fmt: skip
    with torch.no_grad():
        module.in_proj_weight.copy_(torch.eye(width, dtype=torch.float64).repeat(3, 1))
        module.out_proj.weight.copy_(torch.eye(width, dtype=torch.float64))
        flat = (torch.tensor(np.swapaxes(x, 1, 2).reshape(1, -1, width)) for x in (q, k, v))
        out = module(*flat, attn_mask=None if mask is None else torch.tensor(mask))[0].numpy()
    return np.swapaxes(out.reshape(1, -1, q.shape[1], q.shape[3]), 1, 2)


def jax(q, k, v, mask=None, causal=False, scale=None):
    jax = pytest.importorskip("jax", reason="JAX is not installed: make oracles")
    with jax.enable_x64(True):
        arrays = (np.swapaxes(x, 1, 2) for x in (q, k, v))
        full = (q.shape[0], 1, q.shape[2], k.shape[2])
        mask = None if mask is None else np.broadcast_to(mask, full)
        out = jax.nn.dot_product_attention(*arrays, mask=mask, is_causal=causal, scale=scale)
        return np.swapaxes(np.asarray(out), 1, 2)


def onnx(q, k, v, mask=None, **options):
    pytest.importorskip("onnx", reason="ONNX is not installed: make oracles")
    if mask is not None and mask.dtype != bool:
        options["bias"], mask = mask, None
    return kit.onnx_attention()(q, k, v, mask=mask, **options)


CALLS = {"attention_ref": ours, "torch_sdpa": torch_sdpa, "torch_mha": torch_mha, "jax": jax,
         "onnx": onnx}  # fmt: skip
ROUGH = {"jax": 1e-5}


def same(name, got, want):
    return np.allclose(got, want, rtol=0, atol=ROUGH.get(name, 1e-12))


def measure_layout(name, call):
    """The calls above stand in these layouts; they give the reference's result."""
    assert same(name, call(Q, K, V), ours(Q, K, V))
    return {"torch_sdpa": "(..., H, T, D)", "torch_mha": "(T, B, H D)", "jax": "(B, T, H, D)",
            "onnx": "(B, H, T, D)"}[name]  # fmt: skip


def measure_scale(name, call):
    return "1/sqrt(D)" if same(name, call(Q, K, V), ours(Q, K, V, scale=D**-0.5)) else "?"


def measure_mask_true(name, call):
    mask = RNG.random((T, S)) < 0.5
    mask[:, 0], mask[:, 1] = True, False
    found = {"may attend": mask, "is blocked": ~mask}
    got = call(Q, K, V, mask=mask)
    return next((n for n, m in found.items() if same(name, got, ours(Q, K, V, mask=m))), "?")


def measure_mask_float(name, call):
    bias = RNG.standard_normal((T, S))
    try:
        got = call(Q, K, V, mask=bias)
    except DTypeError:
        return "refused"
    return "added" if same(name, got, ours(Q, K, V, bias=bias)) else "?"


def measure_causal(name, call):
    found = properties.sees(lambda k: call(k["q"], k["k"], k["v"], causal=True),
                            {"q": Q, "k": K, "v": V}, 2.0**-23)  # fmt: skip
    for corner, shift in (("upper left", 0), ("lower right", S - T)):
        if np.all(found == np.tri(T, S, shift, dtype=bool)):
            return corner
    return "?"


def measure_empty_row(name, call):
    mask = np.ones((T, S), bool)
    mask[1] = False
    got = call(Q, K, V, mask=~mask if name == "torch_mha" else mask)[0, :, 1]
    if np.all(np.isnan(got)):
        return "NaN"
    if same(name, got, 0 * got):
        return "zeros"
    return "mean of the values" if same(name, got, V[0].mean(1)) else "?"


def measure_hidden_nan(name, call):
    mask, v = np.ones((T, S), bool), V.copy()
    mask[:, 3], v[:, :, 3] = False, np.nan
    return "spreads" if np.any(np.isnan(call(Q, K, v, mask=mask))) else "no effect"


def measure_grouped(name, call):
    q = RNG.standard_normal((1, 4, T, D))
    for says, order in (("h // (H // G)", [0, 0, 1, 1]), ("h % G", [0, 1, 0, 1])):
        if same(name, call(q, K, V), ours(q, K[:, order], V[:, order])):
            return says
    return "?"


def measure_softcap(name, call):
    mask = np.tri(T, S, 1, dtype=bool)
    got = call(Q, K, V, mask=mask, softcap=0.5)
    z = 0.5 * np.tanh(Q @ np.swapaxes(K, -1, -2) * D**-0.5 / 0.5)
    e = np.where(mask, np.exp(z), 0.0)
    return "before" if same(name, got, e / e.sum(-1, keepdims=True) @ V) else "?"


def measure_order(name, call):
    """Scale, softcap, bias: any other order gives other numbers here."""
    bias = 2 * RNG.standard_normal((T, S))
    z = 0.5 * np.tanh(Q @ np.swapaxes(K, -1, -2) * 0.25 / 0.5) + bias
    e = np.exp(z)
    words = {"bias": bias} if name == "attention_ref" else {"mask": bias}
    got = call(Q, K, V, scale=0.25, softcap=0.5, **words)
    return "scale, softcap" if same(name, got, e / e.sum(-1, keepdims=True) @ V) else "?"


def measure_inside(name, call):
    off = np.max(np.abs(call(Q, K, V) - ours(Q, K, V)))
    return "float64" if off < 1e-14 else "float32" if off < 1e-5 else "?"


CELLS = [(name, cell) for name, row in kit.conventions().items() for cell in row["asserted"]]


@pytest.mark.oracle
@pytest.mark.parametrize(("name", "cell"), CELLS, ids=[f"{n}-{c}" for n, c in CELLS])
def test_the_cell_is_what_the_framework_does(name, cell):
    found = globals()[f"measure_{cell}"](name, CALLS[name])
    assert kit.conventions(name)[cell].startswith(found), found


def test_every_framework_answers_every_question():
    for name, row in kit.conventions().items():
        assert set(frameworks.questions()) <= set(row), name
        assert row["source"].startswith("https://") and row["version"] and row["title"]
        assert all(isinstance(row[q], str) and row[q] for q in frameworks.questions())
    assert len(kit.conventions()) == 8
    with pytest.raises(ParameterError, match="did you mean 'torch_sdpa'"):
        kit.conventions("torch_spda")


@pytest.mark.oracle
def test_the_arguments_for_check_make_sdpa_conform():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")
    sdpa, rule = torch.nn.functional.scaled_dot_product_attention, kit.conventions("torch_sdpa")
    assert kit.check(sdpa, cases=["causal", "mask"], **rule["check"]).ok
    assert not kit.check(sdpa, cases=["causal", "mask"]).ok
