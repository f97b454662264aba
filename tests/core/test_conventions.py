"""The cells marked with a dagger in docs/conventions.rst, asserted on the frameworks themselves."""

import numpy as np
import pytest

pytestmark = pytest.mark.oracle


def torch_attention(q, k, v, **kwargs):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")
    t = [torch.tensor(x) for x in (q, k, v)]
    kwargs = {n: torch.tensor(a) if isinstance(a, np.ndarray) else a for n, a in kwargs.items()}
    return torch.nn.functional.scaled_dot_product_attention(*t, **kwargs).numpy()


def jax_attention(q, k, v, **kwargs):
    jax = pytest.importorskip("jax", reason="JAX is not installed: make oracles")
    btnh = [np.moveaxis(x[None], 1, 2).astype(np.float32) for x in (q, k, v)]
    return np.moveaxis(np.asarray(jax.nn.dot_product_attention(*btnh, **kwargs)), 2, 1)[0]


Q, K = np.zeros((1, 2, 1)), np.zeros((1, 4, 1))
V = np.arange(4.0)[None, :, None]


def test_causal_with_fewer_queries_is_upper_left_in_both():
    np.testing.assert_allclose(torch_attention(Q, K, V, is_causal=True)[0, :, 0], [0.0, 0.5])
    np.testing.assert_allclose(jax_attention(Q, K, V, is_causal=True)[0, :, 0], [0.0, 0.5])


def test_a_query_without_keys():
    mask = np.array([[False] * 4, [True] * 4])
    np.testing.assert_allclose(torch_attention(Q, K, V, attn_mask=mask)[0, :, 0], [0.0, 1.5])
    jax_mask = np.broadcast_to(mask, (1, 1, 2, 4))
    np.testing.assert_allclose(jax_attention(Q, K, V, mask=jax_mask)[0, :, 0], [1.5, 1.5])


def test_nan_behind_a_mask_leaks_in_pytorch():
    value = V.copy()
    value[0, 3] = np.nan
    mask = np.array([[True, True, True, False]] * 2)
    assert np.all(np.isnan(torch_attention(Q, K, value, attn_mask=mask)))


def test_jax_computes_in_float32_inside():
    """float64 in, x64 on: the error is that of float32, as the table says."""
    jax = pytest.importorskip("jax", reason="JAX is not installed: make oracles")
    import attention_ref

    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, 16, 1, 8))
    with jax.enable_x64(True):
        got = np.asarray(jax.nn.dot_product_attention(*(jax.numpy.asarray(x) for x in (q, k, v))))
    out, _ = attention_ref.run("scores/dot_product", *(x[0, :, 0] for x in (q, k, v)))
    assert got.dtype == np.float64
    assert 1e-9 < np.max(np.abs(got[0, :, 0] - out)) < 1e-5
