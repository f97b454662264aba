r"""FlashBias: a bias of low rank enters the scores as a few more channels of queries and keys.

.. math::

    q'_t &= [\, c\, q_t \mid \varphi_{q,t} \,], \qquad k'_s = [\, k_s \mid \varphi_{k,s} \,]  &(1)\\
    z_{ts} &= q'_t \cdot k'_s = c\, q_t \cdot k_s + \varphi_{q,t} \cdot \varphi_{k,s}         &(2)\\
    p_{ts} &= e^{z_{ts}} / \textstyle\sum_{s'} e^{z_{ts'}}                                    &(3)\\
    o_t    &= \textstyle\sum_s p_{ts}\, v_s                                                   &(4)

A bias B = phi_q phi_k^T of rank R costs (T + S) R numbers instead of T S, and any kernel for plain
attention can do it. Some biases have exact factors, :func:`alibi_factors` with R = 2 and
:func:`distance_factors`; the others have the best ones of a given rank, :func:`svd_factors`.

Source: Wu et al. 2025, *FlashBias*; official code thuml/FlashBias read:
attention_with_alibi_bias.py, flash_bias_triton.py, swin_transformer_v2.py; grade A.
"""

from typing import NamedTuple

import numpy as np

from attention_ref import core


class Cache(NamedTuple):
    """What the backward needs, and what implementers compare with (``p``, ``lse``)."""

    q: np.ndarray  # (..., T, D + R), c q and phi_q; rows with NaN or infinity replaced by zeros
    k: np.ndarray  # (..., S, D + R), k and phi_k, likewise
    v: np.ndarray  # (..., S, E), likewise
    p: np.ndarray  # (..., T, S), weights
    lse: np.ndarray  # (..., T), log of the sum of exponentials, nats; -inf for an empty row
    live: np.ndarray  # (..., T, S), True = may attend
    poison: np.ndarray  # (..., T, 1), rows that are NaN
    scale: float
    shapes: dict  # of q, k, phi_q, phi_k


def join_forward(x, phi):
    """[x | phi] along the channels; leading axes broadcast.

    Parameters
    ----------
    x : ndarray, shape (..., T, D)
        Queries or keys.
    phi : ndarray, shape (..., T, R)
        Their factor of the bias.

    Returns
    -------
    ndarray, shape (..., T, D + R)
    """
    lead = np.broadcast_shapes(x.shape[:-1], phi.shape[:-1])
    wide = [np.broadcast_to(a, (*lead, a.shape[-1])) for a in (x, phi)]
    return np.concatenate(wide, axis=-1)


def join_backward(dy, x_shape, phi_shape):
    """The two parts of the gradient, summed back to the shapes of x and phi.

    Parameters
    ----------
    dy : ndarray, shape (..., T, D + R)
        Gradient of [x | phi].
    x_shape, phi_shape : tuple of int
        Shapes of x and phi.

    Returns
    -------
    dx, dphi : ndarray
    """
    width = x_shape[-1]
    return core.sum_to(dy[..., :width], x_shape), core.sum_to(dy[..., width:], phi_shape)


def alibi_factors(m, T, S, align="lower_right"):
    """Exact factors of the linear bias -m (t + a - s), R = 2; a = S - T or 0.

    Equal to scores/alibi where s <= t + a, that is under a causal mask. Places count from the
    middle of the keys, so that the products stay half as large.

    Parameters
    ----------
    m : ndarray, shape (H,), nats a token
        Slopes.
    T, S : int
        Queries and keys.
    align : {"lower_right", "upper_left"}
        Which corners meet.

    Returns
    -------
    phi_q, phi_k : ndarray, shapes (H, T, 2), (S, 2)
    """
    core.check.option("align", align, core.check.ALIGNMENTS)
    middle = (S - 1) / 2
    t = np.arange(T, dtype=m.dtype) + ((S - T if align == "lower_right" else 0) - middle)
    s = np.arange(S, dtype=m.dtype) - middle
    phi_q = np.stack([-t, np.ones_like(t)], axis=-1) * m[:, None, None]
    return phi_q, np.stack([np.ones_like(s), s], axis=-1)


def distance_factors(x, y):
    """Exact factors of -|x_t - y_s|^2, R = A + 2, for places of A coordinates.

    Parameters
    ----------
    x, y : ndarray, shapes (..., T, A), (..., S, A)
        Places of queries and keys.

    Returns
    -------
    phi_q, phi_k : ndarray, shapes (..., T, A + 2), (..., S, A + 2)
    """
    xx, yy = (np.sum(np.square(a), axis=-1, keepdims=True) for a in (x, y))
    phi_q = np.concatenate([-xx, np.ones_like(xx), 2.0 * x], axis=-1)
    return phi_q, np.concatenate([np.ones_like(yy), -yy, y], axis=-1)


def svd_factors(bias, R):
    """The best factors of rank R for any bias, by its singular value decomposition, offline.

    Parameters
    ----------
    bias : ndarray, shape (..., T, S), nats
        What the factors shall replace.
    R : int
        Channels; min(T, S) is exact.

    Returns
    -------
    phi_q, phi_k : ndarray, shapes (..., T, R), (..., S, R)
    rest : ndarray, shape (..., min(T, S) - R)
        The singular values left out; no entry of the bias is off by more than the first of them.
    """
    core.check.count("R", R, high=min(bias.shape[-2:]), unit="channels")
    left, sigma, right = np.linalg.svd(bias, full_matrices=False)
    root = np.sqrt(sigma[..., None, :R])
    phi_k = np.swapaxes(right[..., :R, :], -1, -2) * root
    return left[..., :R] * root, phi_k, sigma[..., R:]


def _check(q, k, v, phi_q, phi_k, mask, align, scale, empty_row):
    """The checks at the door; the lengths."""
    n = core.check.shapes(
        q=(q, "... T D"), k=(k, "... S D"), v=(v, "... S E"), phi_q=(phi_q, "... T R"),
        phi_k=(phi_k, "... S R"),
    )  # fmt: skip
    core.check.attention(q, k, v, align=align, scale=scale, empty_row=empty_row)
    full = (*n["..."], n["T"], n["S"])
    core.check.check_mask(mask, full)
    core.check.memory(full, q.dtype)
    return n


def flashbias_forward(
    q, k, v, phi_q, phi_k, *, mask=None, causal=False, align="lower_right", scale=None,
    empty_row="zero",
):  # fmt: skip
    """Mix the values with softmax weights of biased scores without ever storing the bias.

    Parameters
    ----------
    q : ndarray, shape (..., T, D)
        Queries.
    k : ndarray, shape (..., S, D)
        Keys.
    v : ndarray, shape (..., S, E)
        Values.
    phi_q : ndarray, shape (..., T, R)
        Query factor of the bias phi_q phi_k^T, nats; leading axes broadcast, R = 0 is no bias.
    phi_k : ndarray, shape (..., S, R)
        Key factor.
    mask : bool ndarray, broadcast to (..., T, S), optional
        True = may attend.
    causal : bool
        Hide the keys behind each query.
    align : {"lower_right", "upper_left"}
        Where the causal diagonal lies when T != S.
    scale : float, dimensionless, optional
        The factor c of q.k, not of the bias; 1/sqrt(D) by default.
    empty_row : {"zero", "nan", "uniform", "raise"}
        Output of a query that may see no key.

    Returns
    -------
    out : ndarray, shape (..., T, E)
        Outputs.
    cache : Cache
        For the backward; holds ``p`` and ``lse``.

    Raises
    ------
    ShapeError
        When widths, lengths or leading axes do not fit.
    DTypeError
        When an argument is no float32 or float64 array, or the mask is not boolean.
    ParameterError
        When an option or a number is outside its domain, or a row is empty under "raise".
    MemoryLimitError
        When the scores would take more than 2 GiB.

    Notes
    -----
    The paper writes [q | sqrt(D) phi_q] and divides the product by sqrt(D); the scale on q alone is
    the same and allows a scale of 0. The official kernel adds phi_q phi_k^T to the scaled scores
    block by block; :func:`flashbias_dense_forward` is that order with one block. A softcap would
    bend the bias too and is left out. The paper's third way to factors, two small networks trained
    to make phi_q phi_k^T close to B, is an optimisation and no step of this function.

    The official ALiBi example forms m [1, t] . [-s, 1] = +m (t - s) and its kernel adds it: the
    sign is opposite to ALiBi's, far keys would win. :func:`alibi_factors` has ALiBi's sign.

    A term of B that depends on the query alone cancels in the softmax, so causal ALiBi needs R = 1,
    phi_q = m and phi_k = s; only ``lse`` differs.

    Source
    ------
    scores/flashbias in the catalog; official code; grade A.

    References
    ----------
    Wu, Guo, Ma, Sun, Wang, Matusik, Long 2025, FlashBias: Fast Computation of Attention with Bias.

    Examples
    --------
    >>> import numpy as np
    >>> q, k, v = np.zeros((1, 1)), np.zeros((2, 1)), np.array([[4.0], [8.0]])
    >>> phi_q, phi_k = np.array([[2.0]]), np.array([[0.0], [np.log(3.0) / 2]])
    >>> out, cache = flashbias_forward(q, k, v, phi_q, phi_k)
    >>> out.round(12).tolist(), cache.p.round(12).tolist()
    ([[7.0]], [[0.25, 0.75]])
    """
    n = _check(q, k, v, phi_q, phi_k, mask, align, scale, empty_row)
    scale = core.default_scale(n["D"], scale)
    given = {"q": q, "k": k, "phi_q": phi_q, "phi_k": phi_k}
    shapes = {name: a.shape for name, a in given.items()}
    live = core.visible(q, k, mask=mask, causal=causal, align=align, empty_row=empty_row)

    q, k = join_forward(q * scale, phi_q), join_forward(k, phi_k)  # (1)
    q, k, v, poison = core.quarantine(q, k, v, live, empty_row)
    z = core.scores_forward(q, k, 1.0)  # (2)
    p, lse = core.softmax_forward(z, live, empty_row)  # (3)
    out = core.mix_forward(p, v)  # (4)

    out = np.where(poison, np.nan, out)
    lse = np.where(poison[..., 0], np.nan, lse)
    return out, Cache(q, k, v, p, lse, live, poison, scale, shapes)


def flashbias_backward(dout, cache):
    """Gradients of :func:`flashbias_forward`, its steps read from the bottom up.

    Parameters
    ----------
    dout : ndarray, shape (..., T, E)
        Gradient of the output.
    cache : Cache
        From the forward.

    Returns
    -------
    dict
        Under "q", "k", "v", "phi_q" and "phi_k".
    """
    q, k, v, p, _, live, poison, scale, shapes = cache
    lead = np.broadcast_shapes(p.shape[:-2], v.shape[:-2])
    core.check.cotangent(dout, (*lead, p.shape[-2], v.shape[-1]))
    dout = np.where(poison, 0.0, dout)

    dp, dv = core.mix_backward(dout, p, v)  # (4')
    dz = core.softmax_backward(dp, p, live)  # (3')
    dq, dk = core.scores_backward(dz, q, k, 1.0)  # (2')
    dq, dphi_q = join_backward(dq, shapes["q"], shapes["phi_q"])  # (1')
    dk, dphi_k = join_backward(dk, shapes["k"], shapes["phi_k"])

    return {"q": dq * scale, "k": dk, "v": dv, "phi_q": dphi_q, "phi_k": dphi_k}


def flashbias_numba(
    q, k, v, phi_q, phi_k, *, mask=None, causal=False, align="lower_right", scale=None,
    empty_row="zero",
):  # fmt: skip
    """The same call by the compiled dense pattern on the wider queries and keys.

    Parameters
    ----------
    q, k, v, phi_q, phi_k, mask, causal, align, scale, empty_row
        As in :func:`flashbias_forward`.

    Returns
    -------
    out : ndarray, shape (..., T, E)
        Outputs.
    cache : tuple
        For :func:`flashbias_numba_backward`.
    """
    from attention_ref.kernels.numba import decode

    given = {"q": q, "k": k, "v": v, "phi_q": phi_q, "phi_k": phi_k}
    core.check.shapes(
        q=(q, "... T D"), k=(k, "... S D"), v=(v, "... S E"), phi_q=(phi_q, "... T R"),
        phi_k=(phi_k, "... S R"),
    )  # fmt: skip
    core.check.number("scale", scale)
    scale = core.default_scale(q.shape[-1], scale)
    q, k = join_forward(q * scale, phi_q), join_forward(k, phi_k)  # (1)
    lead = np.broadcast_shapes(k.shape[:-2], v.shape[:-2])  # factors may have widened the keys
    k, v = (np.broadcast_to(x, (*lead, *x.shape[-2:])) for x in (k, v))
    out, cache = decode.best(q, k)(
        q, k, v, mask=mask, causal=causal, align=align, scale=1.0, empty_row=empty_row
    )  # (2) (3) (4)
    return out, (cache, scale, {name: a.shape for name, a in given.items()})


def flashbias_numba_backward(dout, cache):
    """Gradients of :func:`flashbias_numba`.

    Parameters
    ----------
    dout, cache
        As in :func:`flashbias_backward`.

    Returns
    -------
    dict
        As there.
    """
    from attention_ref.kernels.numba import dense

    cache, scale, shapes = cache
    found = dense.backward(dout, cache)  # (4') (3') (2')
    dq, dphi_q = join_backward(found["q"], shapes["q"], shapes["phi_q"])  # (1')
    dk, dphi_k = join_backward(found["k"], shapes["k"], shapes["phi_k"])
    dv = core.sum_to(found["v"], shapes["v"])
    return {"q": dq * scale, "k": dk, "v": dv, "phi_q": dphi_q, "phi_k": dphi_k}


def flashbias_dense_forward(
    q, k, v, phi_q, phi_k, *, mask=None, causal=False, align="lower_right", scale=None,
    empty_row="zero",
):  # fmt: skip
    """The same by way of the full bias: z = c q k^T + phi_q phi_k^T, as the kernel does in a block.

    Parameters
    ----------
    q, k, v, phi_q, phi_k, mask, causal, align, scale, empty_row
        As in :func:`flashbias_forward`.

    Returns
    -------
    out : ndarray, shape (..., T, E)
    bias : ndarray, shape (..., T, S)
        phi_q phi_k^T, nats.
    """
    n = _check(q, k, v, phi_q, phi_k, mask, align, scale, empty_row)
    live = core.visible(q, k, mask=mask, causal=causal, align=align, empty_row=empty_row)
    bias = core.scores_forward(phi_q, phi_k, 1.0)
    q, k, v, poison = core.quarantine(q, k, v, live, empty_row)
    clean, poison = core.quarantine_bias(bias, live, poison)
    z = core.scores_forward(q, k, core.default_scale(n["D"], scale)) + clean
    p, _ = core.softmax_forward(z, live, empty_row)
    return np.where(poison, np.nan, core.mix_forward(p, v)), bias


R = 3
"""Channels of the bias in the examples."""


def _factors(rng, kwargs):
    """One bias for all heads."""
    T, S = kwargs["q"].shape[-2], kwargs["k"].shape[-2]
    return {"phi_q": rng.standard_normal((T, R)), "phi_k": rng.standard_normal((S, R))}


def _example(rng):
    cases = core.examples.attention(rng, options=("causal", "mask"), extra=_factors)
    cases["bias"] = core.examples.qkv(rng, lead=(1, 2), T=5, S=7) | {  # a bias of each head
        "phi_q": rng.standard_normal((2, 5, 1)), "phi_k": rng.standard_normal((2, 7, 1)),
    }  # fmt: skip
    return cases


def _any(rng):
    return _example(rng)["mask"]


def _dense(kwargs):
    rest = {n: a for n, a in kwargs.items() if not n.startswith("phi")}
    return rest | {"bias": kwargs["phi_q"] @ kwargs["phi_k"].T}


SLOPES = np.array([0.5, 0.0625])


def _linear(rng):
    kwargs = core.examples.qkv(rng, T=5, S=7) | {"causal": True}
    return kwargs | dict(zip(("phi_q", "phi_k"), alibi_factors(SLOPES, 5, 7), strict=True))


def _alibi(kwargs):
    return {n: kwargs[n] for n in ("q", "k", "v", "causal")} | {"m": SLOPES}


SPEC = core.Mechanism(
    key="scores/flashbias",
    forward=flashbias_forward,
    backward=flashbias_backward,
    numba=core.Backend(flashbias_numba, flashbias_numba_backward),
    example=_example,
    flags=frozenset(core.SOFTMAX_FLAGS),
    tokens={"phi_k": -2},
    forms={"dense": flashbias_dense_forward},
    opt_out={
        "query_order": "phi_q must move with the queries; own test",
        "no_keys": "without queries phi_q has none either; own test",
    },
    reduces_to=(
        core.Reduction("scores/dot_product", "the bias phi_q phi_k^T, stored", _any, _dense),
        core.Reduction("scores/alibi", "R = 2 factors of the causal linear bias", _linear, _alibi),
    ),
    claim=(
        "Factors replace a bias: exactly for ALiBi and squared distances, and with few channels "
        "for a learned relative bias, whose output error falls as its singular values do."
    ),
    verified_by=("slow loop", "PyTorch"),
)
