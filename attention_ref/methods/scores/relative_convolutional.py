r"""Relative convolutional attention: each token is mixed with those before it, and distance scores.

.. math::

    \hat q_t &= b^q + \textstyle\sum_{j=0}^{K-1} w^q_j \odot q_{t-K+1+j},
                \quad \hat v, \hat k \text{ likewise, } \hat k \text{ without bias}          &(1)\\
    z_{ts} &= c \bigl[ (\hat q_t + u) \cdot \hat k_s
                + \hat q_t \cdot R_{s-t} + a_{s-t} \bigr]                                &(2)\\
    p_{ts} &= e^{z_{ts}} / \textstyle\sum_{s'} e^{z_{ts'}}                               &(3)\\
    o_t    &= \textstyle\sum_s p_{ts}\, \hat v_s                                         &(4)

Step (1) is a causal convolution along the tokens, one kernel a feature, shared by the heads, with
zeros before the first token; each of q, k, v has its own. In (2) the tables R and a have one row
for every distance from the query's place to the key's, :math:`-P \le s - t < P`, and u is a
learned query that every query adds. Attention that compares and fetches short groups of tokens,
and knows places only as differences.

Source: Sugiharto, Aradea, Mubarok 2023, *RCMHA*; the official rcmha/attention.py of
hermansh-id/rcmha read; grade A.
"""

from typing import NamedTuple

import numpy as np

from attention_ref import core


class Cache(NamedTuple):
    """What the backward needs, and what implementers compare with (``z``, ``p``, ``lse``)."""

    raw: tuple  # q, k, v as given, rows with NaN or infinity replaced by zeros
    kernels: tuple  # w_q, w_k, w_v, non-finite numbers replaced by zeros
    q: np.ndarray  # (..., H, T, D), after the convolution, rows with NaN or infinity zero
    k: np.ndarray  # (..., H, S, D), likewise
    v: np.ndarray  # (..., H, S, E), likewise
    tables: tuple  # R, a and u, non-finite numbers replaced by zeros
    start: np.ndarray  # (T, 1), the row of the tables for the first key, P - t
    z: np.ndarray  # (..., H, T, S), scores before the mask, nats
    p: np.ndarray  # (..., H, T, S), weights
    lse: np.ndarray  # (..., H, T), log of the sum of exponentials, nats; -inf for an empty row
    live: np.ndarray  # (..., T, S), True = may attend
    poison: np.ndarray  # (..., H, T, 1), rows that are NaN
    scale: float


def _windows(x, K, back=True):
    """K copies of x along the tokens: x_{t-K+1+j}, or x_{t+K-1-j} where not ``back``; zeros."""
    T, ends = x.shape[-2], (K - 1, 0) if back else (0, K - 1)
    wide = np.pad(x, [(0, 0)] * (x.ndim - 2) + [ends, (0, 0)])
    parts = [wide[..., j : j + T, :] for j in range(K)]
    return parts if back else parts[::-1]


def conv_forward(x, w, b):
    """Step (1): a causal convolution along the tokens, feature by feature.

    Parameters
    ----------
    x : ndarray, shape (..., T, D)
        Tokens.
    w, b : ndarray, shapes (D, K), (D,)
        Kernel, its last column for the token itself, and bias.

    Returns
    -------
    y : ndarray, shape (..., T, D)
        NaN in the K rows that a non-finite token reaches, everywhere for a non-finite kernel.
    x, w : ndarray
        Without non-finite numbers, for the backward.
    """
    good = np.all(np.isfinite(x), axis=-1)[..., None]
    fine = np.all(np.isfinite(w))  # a bad bias shows in y by itself
    x, w = np.where(good, x, 0.0), np.where(np.isfinite(w), w, 0.0)
    K = w.shape[1]
    y = sum((w[:, j] * part for j, part in enumerate(_windows(x, K))), start=b)
    reached = np.any(np.stack(_windows(~good, K)), axis=0)
    return np.where(reached | ~fine, np.nan, y), x, w


def conv_backward(dy, x, w):
    """dx_s = sum_j w_j dy_{s+K-1-j}, dw_j = sum_t dy_t x_{t-K+1+j}, db = sum_t dy_t.

    Parameters
    ----------
    dy : ndarray, shape (..., T, D)
        Gradient of the convolved tokens.
    x, w : ndarray
        From the forward.

    Returns
    -------
    dx, dw, db : ndarray, shapes (..., T, D), (D, K), (D,)
    """
    K, width = w.shape[1], w.shape[:1]
    dx = sum(w[:, j] * part for j, part in enumerate(_windows(dy, K, back=False)))
    dw = [core.sum_to(dy * part, width) for part in _windows(x, K)]
    return core.sum_to(dx, x.shape), np.stack(dw, axis=1), core.sum_to(dy, width)


def _check(q, k, v, R, a, u, w_q, b_q, w_k, w_v, b_v, **options):
    """The checks of ``core.check.attention``, and those of tables and kernels."""
    n = core.check.attention(q, k, v, **options)
    more = core.check.shapes(
        q=(q, "... T D"), k=(k, "... S D"), v=(v, "... S E"), R=(R, "... N D"), a=(a, "... N"),
        u=(u, "... D"), w_q=(w_q, "D K"), b_q=(b_q, "D"), w_k=(w_k, "D L"), w_v=(w_v, "E M"),
        b_v=(b_v, "E"),
    )  # fmt: skip
    P, longest = more["N"] / 2, max(n["T"], n["S"], 1)
    if more["N"] % 2 or longest > P:
        raise core.errors.ShapeError(
            f"R has {more['N']} rows, expected an even number 2P with P >= {longest}, the longer "
            "of queries and keys"
        )
    if more["..."] != n["..."] or 0 in (more["K"], more["L"], more["M"]):
        raise core.errors.ShapeError(
            f"R {R.shape}, a {a.shape}, u {u.shape}, w_q {w_q.shape}, w_k {w_k.shape}, w_v "
            f"{w_v.shape}, expected kernels of length 1 or more and leading axes {n['...']} at most"
        )
    return n


def relative_convolutional_forward(
    q, k, v, R, a, u, w_q, b_q, w_k, w_v, b_v, *, mask=None, causal=False,
    align="lower_right", scale=None, empty_row="zero",
):  # fmt: skip
    """Convolve queries, keys and values; score content, distance and both; mix.

    Parameters
    ----------
    q : ndarray, shape (..., H, T, D)
        Queries, projected and not convolved yet; the head axis may be absent.
    k : ndarray, shape (..., H, S, D)
        Keys, likewise.
    v : ndarray, shape (..., H, S, E)
        Values, likewise.
    R : ndarray, broadcast to (..., H, 2P, D)
        Vectors of the distances, row P + (s - t); P is at least T and S.
    a : ndarray, broadcast to (..., H, 2P)
        Numbers of the distances, before the scale.
    u : ndarray, broadcast to (..., H, D)
        Added to every query where it meets a key.
    w_q, w_k : ndarray, shape (D, K)
        Kernels, K = 3 in the paper; the last column belongs to the token itself.
    b_q : ndarray, shape (D,)
        Bias of the queries' convolution.
    w_v, b_v : ndarray, shapes (E, K), (E,)
        Kernel and bias of the values.
    mask : bool ndarray, broadcast to (..., H, T, S), optional
        True = may attend; the convolution does not know it.
    causal : bool
        Hide the keys behind each query.
    align : {"lower_right", "upper_left"}
        Where the queries stand among the keys when T != S: the causal diagonal and distance 0.
    scale : float, dimensionless, optional
        The factor c on all terms; 1/sqrt(D) by default.
    empty_row : {"zero", "nan", "uniform", "raise"}
        Output of a query that may see no key.

    Returns
    -------
    out : ndarray, shape (..., H, T, E)
        Outputs.
    cache : Cache
        For the backward; holds ``z``, ``p`` and ``lse``.

    Raises
    ------
    ShapeError
        When widths, lengths or leading axes do not fit, or the tables are too short.
    DTypeError
        When an argument is no float32 or float64 array, or the mask is not boolean.
    ParameterError
        When an option or a number is outside its domain, or a row is empty under "raise".
    MemoryLimitError
        When the scores would take more than 2 GiB.

    Notes
    -----
    The official tables are indexed P + (j - i) for query i and key j, P = 4096, so that with a
    causal mask only rows up to P are learned; the same here. A table in the paper's direction,
    i - j, is this one turned around. It picks the rows by a shift of a (T, T + S) matrix; the
    row's tests compare with that. Its convolution of the keys has a bias too, which adds
    :math:`(\\hat q_t + u) \\cdot b^k` to all scores of a row and so changes nothing: its gradient
    is zero, and it is left out here. R, a and u begin at zero there, the kernels at random; its
    dropout of the weights is left out. A hidden key still reaches the K - 1 keys after it through
    the convolution: padding belongs behind the text.

    Source
    ------
    scores/relative_convolutional in the catalog; official code; grade A.

    References
    ----------
    Sugiharto, Aradea, Mubarok 2023, RCMHA: Relative Convolutional Multi-Head Attention for Natural
    Language Modelling.

    Examples
    --------
    The value's kernel adds the token before; the table prefers the distance -1.

    >>> import numpy as np
    >>> z, one = np.zeros((2, 1)), np.array([[0.0, 1.0]])
    >>> v, add = np.array([[4.0], [8.0]]), np.array([[1.0, 1.0]])
    >>> R, a, u, b = np.zeros((4, 1)), np.array([0.0, np.log(3.0), 0.0, 0.0]), z[0], z[0]
    >>> out, cache = relative_convolutional_forward(z, z, v, R, a, u, one, b, one, add, b)
    >>> out.round(12).tolist(), cache.p.round(12).tolist()
    ([[8.0], [6.0]], [[0.5, 0.5], [0.75, 0.25]])
    """
    n = _check(
        q, k, v, R, a, u, w_q, b_q, w_k, w_v, b_v, mask=mask, align=align, scale=scale,
        empty_row=empty_row,
    )  # fmt: skip
    scale = core.default_scale(n["D"], scale)
    live = core.visible(q, k, mask=mask, causal=causal, align=align, empty_row=empty_row)
    first = n["S"] - n["T"] if align == "lower_right" else 0
    start = R.shape[-2] // 2 - first - np.arange(n["T"], like=q)[:, None]
    index = start + np.arange(n["S"], like=q)
    broken = ~np.all(np.isfinite(R), axis=-1) | ~np.isfinite(a)
    broken = broken | ~np.all(np.isfinite(u), axis=-1)[..., None]
    R, a, u = (np.where(np.isfinite(x), x, 0.0) for x in (R, a, u))

    (q, q_raw, w_q), (k, k_raw, w_k), (v, v_raw, w_v) = (
        conv_forward(q, w_q, b_q), conv_forward(k, w_k, 0.0), conv_forward(v, w_v, b_v)
    )  # (1)  # fmt: skip
    q, k, v, poison = core.quarantine(q, k, v, live, empty_row)
    content = (q + u[..., None, :]) @ np.swapaxes(k, -1, -2)
    distance = q @ np.swapaxes(R, -1, -2) + a[..., None, :]
    z = (content + _gather(distance, index)) * scale  # (2)
    bad = _gather(np.broadcast_to(broken[..., None, :], distance.shape), index)
    poison = poison | np.any(live & bad, axis=-1, keepdims=True)
    p, lse = core.softmax_forward(z, live, empty_row)  # (3)
    out = core.mix_forward(p, v)  # (4)

    out = np.where(poison, np.nan, out)
    lse = np.where(poison[..., 0], np.nan, lse)
    return out, Cache(
        (q_raw, k_raw, v_raw), (w_q, w_k, w_v), q, k, v, (R, a, u), start, z, p, lse, live, poison,
        scale,
    )  # fmt: skip


def _gather(rows, index):
    """rows[..., t, index[t, s]] of an array (..., T, 2P)."""
    index = np.broadcast_to(index, (*rows.shape[:-2], *index.shape))
    return np.take_along_axis(rows, index, axis=-1)


def relative_convolutional_backward(dout, cache):
    """Gradients of :func:`relative_convolutional_forward`, its steps read from the bottom up.

    Parameters
    ----------
    dout : ndarray, shape (..., H, T, E)
        Gradient of the output.
    cache : Cache
        From the forward.

    Returns
    -------
    dict
        Under the name of every array but the mask.
    """
    raw, kernels, q, k, v, (R, a, u), start, _, p, _, live, poison, scale = cache
    lead = np.broadcast_shapes(p.shape[:-2], v.shape[:-2])
    core.check.cotangent(dout, (*lead, p.shape[-2], v.shape[-1]))
    dout = np.where(poison, 0.0, dout)

    dp, dv = core.mix_backward(dout, p, v)  # (4')
    dz = core.softmax_backward(dp, p, live) * scale  # (3')
    dq = dz @ k  # (2')
    dk = np.swapaxes(dz, -1, -2) @ (q + u[..., None, :])
    du = core.sum_to(np.sum(dq, axis=-2), u.shape)
    back = np.arange(R.shape[-2], like=dz) - start  # the key at this distance, if there is one
    back = np.where((back >= 0) & (back < dz.shape[-1]), back, dz.shape[-1])
    ddistance = _gather(np.pad(dz, [(0, 0)] * (dz.ndim - 1) + [(0, 1)]), back)
    dR = core.sum_to(np.swapaxes(ddistance, -1, -2) @ q, R.shape)
    gradients = {"R": dR, "a": core.sum_to(np.sum(ddistance, axis=-2), a.shape), "u": du}
    dq = dq + ddistance @ R
    for name, dy, x, w in zip("qkv", (dq, dk, dv), raw, kernels, strict=True):  # (1')
        gradients[name], gradients[f"w_{name}"], gradients[f"b_{name}"] = conv_backward(dy, x, w)
    del gradients["b_k"]  # zero, and no argument
    return gradients


def _example(rng):
    """Two heads behind a batch of 1; P is 7; kernels of length 1 to 4.

    Six cases keep the golden file small; the row's tests do the case without heads.
    """
    cases = core.examples.attention(rng, options=("causal", "mask"))
    for name in ("no-heads", "causal-long-queries", "packed"):
        del cases[name]
    cases["long-queries"]["mask"] = core.examples.packed_mask([1, 4, 2], [2, 1, 2])
    for i, case in enumerate(cases.values(), 1):
        if case["q"].ndim == 3:
            case |= {n: case[n][None] for n in "qkv"}
        sizes = {
            "R": (2, 14, 4), "a": (2, 14), "u": (2, 4), "w_q": (4, 3), "b_q": (4,),
            "w_k": (4, 1 + i % 4), "w_v": (3, 2 + i % 2), "b_v": (3,),
        }  # fmt: skip
        case |= {n: 0.5 * rng.standard_normal(size) for n, size in sizes.items()}
    return cases


def _bare(rng):
    """Kernels (0, 0, 1), biases and tables of zero."""
    kwargs = _example(rng)["causal"]
    zero = {n: 0.0 * x for n, x in kwargs.items() if n not in ("q", "k", "v", "causal", "scale")}
    for w in (zero["w_q"], zero["w_k"], zero["w_v"]):
        w[:, -1] = 1.0
    return kwargs | zero


def _plain(kwargs):
    return {n: kwargs[n] for n in ("q", "k", "v", "causal", "scale")}


SPEC = core.Mechanism(
    key="scores/relative_convolutional",
    forward=relative_convolutional_forward, backward=relative_convolutional_backward,
    example=_example,
    flags=frozenset({"attention", "causal"}),
    opt_out={
        "live_nan": "the convolution takes a NaN to the following tokens too; "
        "test_relative_convolutional.py says to which"
    },
    reduces_to=(
        core.Reduction("scores/dot_product", "kernels (0, 0, 1), else zero", _bare, _plain),
    ),
    claim=(
        "On characters, after the same number of steps, relative attention with convolutions has "
        "a lower loss than without, and this a lower one than attention with absolute positions."
    ),
    verified_by=("slow loop", "PyTorch"),
)  # fmt: skip
