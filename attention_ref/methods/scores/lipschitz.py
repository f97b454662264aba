r"""Lipschitz regularised distance scores: distances measured in the input's own units.

.. math::

    D_{ts} &= \textstyle\sum_d (q_{td} - k_{sd})^2                                          &(1)\\
    a      &= \lVert q \rVert_F, \qquad b = \max_n \lVert x_n \rVert                        &(2)\\
    z_{ts} &= -\alpha\, c\, D_{ts}, \qquad c = 1 / (a\, b + \epsilon)                       &(3)\\
    p_{ts} &= e^{z_{ts}} / \textstyle\sum_{s'} e^{z_{ts'}}                                  &(4)\\
    o_t    &= \textstyle\sum_s p_{ts}\, v_s                                                 &(5)

x is what the block's projections read, q and k are the same array in the paper (tied), and a is
taken over the queries of a head that see at least one key. Scores have degree 2 over degree 2:
inputs that are ten times larger give the same weights, where those of dot products or plain
distances saturate. The price is that c is shared: one very long token flattens every row.

Source: Ye, Ma, Cao, Tang 2023, *Mitigating Transformer Overconfidence via Lipschitz
Regularization*, LRSA; two public implementations of the formula, neither the authors', read;
grade B.
"""

from typing import NamedTuple

import numpy as np

from attention_ref import core

EPSILON = 1e-10
"""Keeps c finite when all queries or all inputs are zero."""


class Cache(NamedTuple):
    """What the backward needs, and what implementers compare with (``c``, ``p``, ``lse``)."""

    q: np.ndarray  # (..., H, T, D), zeros where a row was not finite
    x: np.ndarray  # (..., N, C), likewise
    v: np.ndarray  # (..., H, S, E), likewise
    delta: np.ndarray  # (..., H, T, S, D), q_t - k_s
    a: np.ndarray  # (..., H, 1, 1)
    b: np.ndarray  # (..., 1, 1)
    lengths: np.ndarray  # (..., N, 1), of x
    c: np.ndarray  # (..., H, 1, 1)
    z: np.ndarray  # (..., H, T, S), scores before the mask, nats
    p: np.ndarray  # (..., H, T, S), weights
    lse: np.ndarray  # (..., H, T), log of the sum of exponentials, nats; -inf for an empty row
    live: np.ndarray  # (..., T, S), True = may attend
    poison: np.ndarray  # (..., H, T, 1), rows that are NaN
    alpha: float
    shapes: dict  # of q, k, x


def length_forward(x, axis):
    """Euclidean norm whose gradient at zero is zero.

    Parameters
    ----------
    x : ndarray
        Anything.
    axis : int or tuple of int
        Summed over; kept with length 1.

    Returns
    -------
    ndarray
    """
    square = np.sum(np.square(x), axis=axis, keepdims=True)
    return np.where(square > 0, np.sqrt(np.where(square > 0, square, 1.0)), 0.0)


def length_backward(dlength, x, length):
    """The direction of x, zero at zero.

    Parameters
    ----------
    dlength : ndarray
        Gradient of the norm.
    x, length : ndarray
        What it was taken of, and it.

    Returns
    -------
    ndarray, like x
    """
    return dlength * x / np.where(length > 0, length, 1.0)


def lipschitz_forward(q, k, v, x, *, alpha=100.0, mask=None, empty_row="zero"):
    """Mix the values with softmax weights of distances divided by the size of the input.

    Parameters
    ----------
    q : ndarray, shape (..., H, T, D)
        Queries; the head axis may be absent.
    k : ndarray, shape (..., H, S, D)
        Keys; the paper passes q again, the gradient of the array is then dq + dk.
    v : ndarray, shape (..., H, S, E)
        Values.
    x : ndarray, shape (..., 1, N, C)
        What the projections read, all channels; its leading axes broadcast with those of q.
    alpha : float, nats
        Sharpness.
    mask : bool ndarray, broadcast to (..., H, T, S), optional
        True = may attend.
    empty_row : {"zero", "nan", "uniform", "raise"}
        Output of a query that may see no key.

    Returns
    -------
    out : ndarray, shape (..., H, T, E)
        Outputs.
    cache : Cache
        For the backward; holds ``c``, ``z``, ``p`` and ``lse``.

    Raises
    ------
    ShapeError
        When widths, lengths or leading axes do not fit.
    DTypeError
        When an argument is no float32 or float64 array, or the mask is not boolean.
    ParameterError
        When an option or a number is outside its domain, or a row is empty under "raise".
    MemoryLimitError
        When the differences, D numbers a score, would take more than 2 GiB.

    Notes
    -----
    Epsilon is 1e-10, as in the implementations: it shows where a b is not far above. Every query
    and every x_n reaches every row through c: there is no causal form, and a non-finite number in
    a query that sees a key, or anywhere in x, makes all rows of its head NaN. Padding has no place
    in c: pad x with zeros, and hide all keys from padded queries.

    The public implementations compute D by the expansion q.q + k.k - 2 q.k, which may come out
    slightly negative; here it is a sum of squares. The paper adds spectral normalisation of the
    projections, which is the caller's (``scores/l2_distance`` has it). Where several x_n are the
    longest, they share the gradient.

    Source
    ------
    scores/lipschitz in the catalog; two public implementations; grade B.

    References
    ----------
    Ye, Ma, Cao, Tang 2023, Mitigating Transformer Overconfidence via Lipschitz Regularization.

    Examples
    --------
    >>> import numpy as np
    >>> q, v = np.array([[3.0], [4.0]]), np.array([[0.0], [4.0]])
    >>> out, cache = lipschitz_forward(q, q, v, 2.0 * q, alpha=40.0 * np.log(3.0))
    >>> out.round(8).tolist(), cache.p.round(8).tolist()
    ([[1.0], [3.0]], [[0.75, 0.25], [0.25, 0.75]])
    """
    n = core.check.attention(q, k, v, mask=mask, empty_row=empty_row)
    core.check.shapes(q=(q, "... T D"), x=(x, "... N C"))
    core.check.number("alpha", alpha, unit="nats")
    core.check.memory((*n["..."], n["T"], n["S"], n["D"]), q.dtype, "the differences")
    shapes = {"q": q.shape, "k": k.shape, "x": x.shape}
    live = core.visible(q, k, mask=mask, empty_row=empty_row)
    alive = np.any(live, axis=-1, keepdims=True)
    bad = np.any(alive & ~np.isfinite(q), axis=(-2, -1), keepdims=True)
    bad = bad | np.any(~np.isfinite(x), axis=(-2, -1), keepdims=True)
    q, k, v, poison = core.quarantine(q, k, v, live, empty_row)
    poison, x = poison | (bad & alive), np.where(np.isfinite(x), x, 0.0)

    delta = q[..., :, None, :] - k[..., None, :, :]  # (1)
    distance = np.sum(np.square(delta), axis=-1)
    q = np.where(alive, q, 0.0)
    a, lengths = length_forward(q, (-2, -1)), length_forward(x, -1)  # (2)
    b = core.row_max(np.swapaxes(lengths, -1, -2))
    c = 1.0 / (a * b + EPSILON)
    z = (-alpha * c) * distance  # (3)
    p, lse = core.softmax_forward(z, live, empty_row)  # (4)
    out = core.mix_forward(p, v)  # (5)

    out = np.where(poison, np.nan, out)
    lse = np.where(poison[..., 0], np.nan, lse)
    return out, Cache(
        q, x, v, delta, a, b, lengths, c, z, p, lse, live, poison, float(alpha), shapes
    )


def lipschitz_backward(dout, cache):
    """Gradients of :func:`lipschitz_forward`, its steps read from the bottom up.

    Parameters
    ----------
    dout : ndarray, shape (..., H, T, E)
        Gradient of the output.
    cache : Cache
        From the forward.

    Returns
    -------
    dict
        Under "q", "k", "v", "x"; for tied projections add "q" and "k".
    """
    q, x, v, delta, a, b, lengths, c, _, p, _, live, poison, alpha, shapes = cache
    lead = np.broadcast_shapes(p.shape[:-2], v.shape[:-2])
    core.check.cotangent(dout, (*lead, p.shape[-2], v.shape[-1]))
    dout = np.where(poison, 0.0, dout)

    dp, dv = core.mix_backward(dout, p, v)  # (5')
    dz = core.softmax_backward(core.sum_to(dp, p.shape), p, live)  # (4')
    distance = np.sum(np.square(delta), axis=-1)
    dc = np.sum(dz * distance, axis=(-2, -1), keepdims=True) * -alpha  # (3')
    dab = -np.square(c) * core.sum_to(dc, c.shape)
    da, db = core.sum_to(dab * b, a.shape), core.sum_to(dab * a, b.shape)  # (2')
    longest = lengths == b
    ties = np.sum(np.where(longest, np.ones_like(lengths), 0.0), axis=-2, keepdims=True)
    dx = length_backward(np.where(longest, db, 0.0) / ties, x, lengths)
    ddelta = (dz * (-2.0 * alpha * c))[..., None] * delta  # (1')
    dq = core.sum_to(np.sum(ddelta, axis=-2), shapes["q"])
    dq = dq + core.sum_to(length_backward(da, q, a), shapes["q"])
    dk = core.sum_to(-np.sum(ddelta, axis=-3), shapes["k"])

    return {"q": dq, "k": dk, "v": dv, "x": core.sum_to(dx, shapes["x"])}


def _example(rng):
    cases = core.examples.attention(rng, options=("mask",), scale=False)
    for i, kwargs in enumerate(cases.values()):
        kwargs |= {"x": rng.standard_normal((3 + i, 2 + i % 3)), "alpha": 2.0 + i}
    return cases


def _tied(rng):
    kwargs = _example(rng)["mask"]
    return kwargs | {"q": kwargs["q"] * 1.5, "mask": rng.random((5, 7)) < 0.8}


def _distance(kwargs):
    alive = np.any(kwargs["mask"], axis=-1)[:, None]
    a = np.linalg.norm(np.where(alive, kwargs["q"], 0.0), axis=(-2, -1))
    scale = kwargs["alpha"] / (a * np.max(np.linalg.norm(kwargs["x"], axis=-1)) + EPSILON)
    root = np.sqrt(scale)[:, None, None]
    return (
        {n: kwargs[n] * root for n in "qk"} | {n: kwargs[n] for n in ("v", "mask")} | {"scale": 1.0}
    )


def _flat(rng):
    return _example(rng)["plain"] | {"alpha": 0.0}


def _mean(kwargs):
    return {n: kwargs[n] for n in "qkv"} | {"scale": 0.0}


SPEC = core.Mechanism(
    key="scores/lipschitz",
    forward=lipschitz_forward,
    backward=lipschitz_backward,
    example=_example,
    flags=frozenset(core.SOFTMAX_FLAGS) - {"scaled", "shift_invariant", "causal"},
    opt_out={"live_nan": "every query scales all rows: a NaN in one reaches its whole head"},
    reduces_to=(
        core.Reduction(
            "scores/l2_distance", "distances times alpha c", _tied, _distance,
            gradients=False,  # there c is a constant
        ),
        core.Reduction("scores/dot_product", "alpha = 0 is the mean of the values", _flat, _mean),
    ),
    claim=(
        "Weights do not depend on the scale of the input, so attention cannot saturate on "
        "inputs far from those of training; dot products and plain distances saturate."
    ),
    verified_by=("slow loop", "PyTorch"),
)  # fmt: skip
