r"""Scaled dot-product attention: the mechanism all others are compared with.

.. math::

    z_{ts} &= c\, q_t \cdot k_s                                  &(1)\\
    z_{ts} &\leftarrow \kappa \tanh(z_{ts} / \kappa)             &(2)\\
    z_{ts} &\leftarrow z_{ts} + b_{ts}                           &(3)\\
    p_{ts} &= e^{z_{ts}} / \textstyle\sum_{s'} e^{z_{ts'}}       &(4)\\
    o_t    &= \textstyle\sum_s p_{ts}\, v_s                      &(5)

The sums run over the keys that query t may see; (2) and (3) only where a softcap or a bias is
given. Each output is a weighted mean of values, so it never leaves their convex hull.

Source: Vaswani et al. 2017, *Attention Is All You Need*, equation (1); grade C (well known).
"""

from typing import NamedTuple

import numpy as np

from attention_ref import core


class Cache(NamedTuple):
    """What the backward needs, and what implementers compare with (``p``, ``lse``)."""

    q: np.ndarray  # (..., T, D), rows with NaN or infinity replaced by zeros
    k: np.ndarray  # (..., S, D), likewise
    v: np.ndarray  # (..., S, E), likewise
    capped: np.ndarray  # (..., T, S), scores after the softcap, before bias and mask
    p: np.ndarray  # (..., T, S), weights
    lse: np.ndarray  # (..., T), log of the sum of exponentials, nats; -inf for an empty row
    live: np.ndarray  # (..., T, S), True = may attend
    poison: np.ndarray  # (..., T, 1), rows that are NaN
    scale: float
    softcap: float | None
    bias_shape: tuple | None


def dot_product_forward(
    q, k, v, *, mask=None, causal=False, align="lower_right", scale=None, softcap=None,
    bias=None, empty_row="zero",
):  # fmt: skip
    """Mix the values with softmax weights of the scaled products of queries and keys.

    Parameters
    ----------
    q : ndarray, shape (..., T, D)
        Queries.
    k : ndarray, shape (..., S, D)
        Keys.
    v : ndarray, shape (..., S, E)
        Values.
    mask : bool ndarray, broadcast to (..., T, S), optional
        True = may attend.
    causal : bool
        Hide the keys behind each query.
    align : {"lower_right", "upper_left"}
        Where the causal diagonal lies when T != S: in the corner of the last query and the last
        key, or in that of the first ones.
    scale : float, dimensionless, optional
        The factor c; 1/sqrt(D) by default.
    softcap : float, > 0, nats, optional
        Bound on the scores before bias and mask.
    bias : ndarray, broadcast to (..., T, S), nats, optional
        Added to the scores after the softcap; -inf gives a weight of 0.
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
    The order is scale, softcap, bias, mask, normalise. PyTorch's ``is_causal`` is "upper_left",
    flash kernels are "lower_right". A non-finite number that a query may see makes its row NaN;
    one behind the mask has no effect.

    Source
    ------
    scores/dot_product in the catalog; equation (1) of the paper; grade C.

    References
    ----------
    Vaswani et al. 2017, Attention Is All You Need.

    Examples
    --------
    >>> import numpy as np
    >>> q = np.array([[2.0]])
    >>> k = np.array([[0.0], [np.log(3.0) / 2]])
    >>> v = np.array([[0.0], [4.0]])
    >>> out, cache = dot_product_forward(q, k, v)
    >>> out.round(12).tolist(), cache.p.round(12).tolist()
    ([[3.0]], [[0.25, 0.75]])
    """
    n = core.check.attention(
        q, k, v, mask=mask, bias=bias, align=align, scale=scale, softcap=softcap,
        empty_row=empty_row,
    )  # fmt: skip
    scale = core.default_scale(n["D"], scale)
    live = core.visible(q, k, mask=mask, causal=causal, align=align, empty_row=empty_row)
    q, k, v, poison = core.quarantine(q, k, v, live, empty_row)

    z = core.scores_forward(q, k, scale)  # (1)
    z = capped = core.softcap_forward(z, softcap)  # (2)
    if bias is not None:
        clean, poison = core.quarantine_bias(bias, live, poison)
        z = z + clean  # (3)
    p, lse = core.softmax_forward(z, live, empty_row)  # (4)
    out = core.mix_forward(p, v)  # (5)

    out = np.where(poison, np.nan, out)
    lse = np.where(poison[..., 0], np.nan, lse)
    bias_shape = None if bias is None else bias.shape
    return out, Cache(q, k, v, capped, p, lse, live, poison, scale, softcap, bias_shape)


def dot_product_backward(dout, cache, dlse=None):
    """Gradients of :func:`dot_product_forward`, its steps read from the bottom up.

    Parameters
    ----------
    dout : ndarray, shape (..., T, E)
        Gradient of the output.
    cache : Cache
        From the forward.
    dlse : ndarray, shape (..., T), optional
        Gradient of ``cache.lse``, where the log-sum-exp is used as a second output.

    Returns
    -------
    dict
        Under "q", "k", "v" and, when a bias was given, "bias".
    """
    q, k, v, capped, p, _, live, poison, scale, softcap, bias_shape = cache
    core.check.cotangent(dout, (*poison.shape[:-1], v.shape[-1]))
    dout = np.where(poison, 0.0, dout)

    dp, dv = core.mix_backward(dout, p, v)  # (5')
    dz = core.softmax_backward(dp, p, live)  # (4')
    if dlse is not None:
        dz = dz + np.where(live, dlse[..., None] * p, 0.0)  # d lse / dz = p
    gradients = {} if bias_shape is None else {"bias": core.sum_to(dz, bias_shape)}  # (3')
    dz = core.softcap_backward(dz, capped, softcap)  # (2')
    dq, dk = core.scores_backward(dz, q, k, scale)  # (1')

    return {"q": dq, "k": dk, "v": dv, **gradients}


def dot_product_numba(q, k, v, **options):
    """The same call by the compiled dense pattern: no (T, S) array, the weights are not kept.

    Parameters
    ----------
    q, k, v : ndarray
        As in :func:`dot_product_forward`.
    **options
        Its keywords.

    Returns
    -------
    out : ndarray, shape (..., T, E)
        Outputs.
    cache : NamedTuple
        For :func:`dot_product_numba_backward`; holds ``lse``.
    """
    from attention_ref.kernels.numba import decode

    core.check.shapes(q=(q, "... T D"), k=(k, "... S D"), v=(v, "... S E"))  # heads must match
    return decode.best(q, k)(q, k, v, **options)


def dot_product_numba_backward(dout, cache, dlse=None):
    """Gradients of :func:`dot_product_numba`, block by block from (q, k, v, out, lse).

    Parameters
    ----------
    dout, cache, dlse
        As in :func:`dot_product_backward`.

    Returns
    -------
    dict
        As there.
    """
    from attention_ref.kernels.numba import dense

    return dense.backward(dout, cache, dlse)


def dot_product_cuda(q, k, v, **options):
    """The same call by the CUDA text of the dense pattern, on float32 CuPy arrays.

    Parameters
    ----------
    q, k, v, **options
        As in :func:`dot_product_numba`.

    Returns
    -------
    out, cache
        As there.
    """
    from attention_ref.kernels.cuda import dense

    core.check.shapes(q=(q, "... T D"), k=(k, "... S D"), v=(v, "... S E"))
    return dense.forward(q, k, v, **options)


def dot_product_cuda_backward(dout, cache):
    """Gradients of :func:`dot_product_cuda`.

    Parameters
    ----------
    dout, cache
        As in :func:`dot_product_backward`.

    Returns
    -------
    dict
        As there.
    """
    from attention_ref.kernels.cuda import dense

    return dense.backward(dout, cache)


SPEC = core.Mechanism(
    key="scores/dot_product",
    forward=dot_product_forward,
    backward=dot_product_backward,
    numba=core.Backend(dot_product_numba, dot_product_numba_backward),
    cuda=core.Backend(dot_product_cuda, dot_product_cuda_backward),
    example=core.examples.attention,
    flags=frozenset(core.SOFTMAX_FLAGS),
    claim=(
        "Without the scale 1/sqrt(D) the trace of the softmax Jacobian falls as D grows; "
        "with it, it stays where it was."
    ),
    verified_by=("slow loop", "PyTorch", "JAX"),
)
