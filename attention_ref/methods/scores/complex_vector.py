r"""Complex vector attention (reconstruction): rotary scores, the angles adapted by each head.

A channel pair (i, i + M) of q and k, M = D/2, is a complex number. With :math:`\omega_i` =
base^(-i/M) and :math:`\Delta_{ts} = t + a - s`, a = S - T or 0,

.. math::

    w_{tsi} &= q_{ti}\, \overline{k_{si}} = r_{tsi}\, e^{i \theta_{tsi}}, \quad
               -\pi < \theta_{tsi} \le \pi                                                  &(1)\\
    \phi_{tsi} &= \alpha_i\, \theta_{tsi} + \beta_i + \gamma_i\, \omega_i\, \Delta_{ts}     &(2)\\
    z_{ts} &= \kappa \tanh\bigl(c \textstyle\sum_i r_{tsi} \cos \phi_{tsi} / \kappa\bigr)
              + b_{ts}                                                                      &(3)\\
    p_{ts} &= e^{z_{ts}} / \textstyle\sum_{s'} e^{z_{ts'}}                                  &(4)\\
    o_t    &= \textstyle\sum_s p_{ts}\, v_s                                                 &(5)

r is the product of the moduli and theta the difference of the angles of q and k: what they mean to
each other. alpha and beta adapt it, gamma weighs the distance; each head has its own. alpha = 1,
beta = 0, gamma = 1 are rotary positions, gamma = 0 the dot product. For a whole number alpha the
score still splits into factors of the query and of the key; any other alpha needs the (T, S, M)
angles, because theta is wrapped.

Source: Shao et al. 2025, *ComplexFormer* (arXiv 2505.10222, withdrawn by its authors); only the
abstract could be read, which gives exp[i(Adapt(AS) + Delta(P))]; grade D: *reconstruction*.
"""

import math
from typing import NamedTuple

import numpy as np

from attention_ref import core


class Cache(NamedTuple):
    """What the backward needs, and what implementers compare with (``p``, ``lse``, ``phi``)."""

    q: np.ndarray  # (..., T, D), rows with NaN or infinity replaced by zeros
    k: np.ndarray  # (..., S, D), likewise
    v: np.ndarray  # (..., S, E), likewise
    alpha: np.ndarray  # (..., M)
    parts: tuple  # x, y, r: real and imaginary part and modulus of w, (..., T, S, M)
    theta: np.ndarray  # (..., T, S, M), angle of w, radians
    steps: np.ndarray  # (T, S, M), omega times the distance, radians
    phi: np.ndarray  # (..., T, S, M), radians
    capped: np.ndarray  # (..., T, S), scores after the softcap, before bias and mask
    p: np.ndarray  # (..., T, S), weights
    lse: np.ndarray  # (..., T), log of the sum of exponentials, nats; -inf for an empty row
    live: np.ndarray  # (..., T, S), True = may attend
    poison: np.ndarray  # (..., T, 1), rows that are NaN
    options: tuple  # scale, softcap
    shapes: dict  # of alpha, beta, gamma, and of bias where given


def _parts(q, k):
    """Real and imaginary parts, queries along the third last axis, keys along the second last."""
    half, q, k = q.shape[-1] // 2, q[..., :, None, :], k[..., None, :, :]
    return q[..., :half], q[..., half:], k[..., :half], k[..., half:]


def product_forward(q, k):
    """w = q conj(k) for every pair of tokens, real and imaginary part.

    Parameters
    ----------
    q, k : ndarray, shapes (..., T, D), (..., S, D)
        Queries and keys; first half real parts, second half imaginary parts.

    Returns
    -------
    x, y : ndarray, shape (..., T, S, M)
    """
    q1, q2, k1, k2 = _parts(q, k)
    return q1 * k1 + q2 * k2, q2 * k1 - q1 * k2


def product_backward(dx, dy, q, k):
    """dq = dw k, dk = conj(dw) q, each summed over the other side.

    Parameters
    ----------
    dx, dy : ndarray, shape (..., T, S, M)
        Gradients of the parts of w.
    q, k : ndarray
        From the forward.

    Returns
    -------
    dq, dk : ndarray, shapes (..., T, D), (..., S, D)
    """
    q1, q2, k1, k2 = _parts(q, k)
    dq = np.concatenate([dx * k1 - dy * k2, dx * k2 + dy * k1], axis=-1)
    dk = np.concatenate([dx * q1 + dy * q2, dx * q2 - dy * q1], axis=-1)
    dq, dk = np.sum(dq, axis=-2), np.sum(dk, axis=-3)
    return core.sum_to(dq, q.shape), core.sum_to(dk, k.shape)


def polar_forward(x, y):
    """Modulus and angle of x + iy, both 0 at 0.

    ``np.arctan2`` takes no complex numbers; the half-angle formula, tan(theta/2) = y / (r + x) in
    the right half plane and its mirror image in the left one, keeps the complex step.

    Parameters
    ----------
    x, y : ndarray
        Real and imaginary part.

    Returns
    -------
    r, theta : ndarray
        theta in radians, -pi < theta <= pi.
    """
    square = np.square(x) + np.square(y)
    zero = square == 0
    r = np.sqrt(np.where(zero, 1.0, square))
    near = 2.0 * np.arctan(y / (r + core.absolute(x)))
    far = np.where(y < 0, -math.pi - near, math.pi - near)
    return np.where(zero, 0.0, r), np.where(x < 0, far, near)


def polar_backward(dr, turn, x, y, r):
    """dx = (dr x - turn y) / r, dy = (dr y + turn x) / r; at 0 the limit along theta = 0.

    Parameters
    ----------
    dr, turn : ndarray
        Gradient of the modulus, and that of the angle divided by r.
    x, y, r : ndarray
        From the forward.

    Returns
    -------
    dx, dy : ndarray
    """
    zero = r == 0
    cos, sin = (np.where(zero, at, a / np.where(zero, 1.0, r)) for at, a in ((1.0, x), (0.0, y)))
    return dr * cos - turn * sin, dr * sin + turn * cos


def steps_forward(q, k, base, align):
    """omega_i (t + a - s): shape (T, S, M), radians, in the dtype of q.

    Parameters
    ----------
    q, k : ndarray, shapes (..., T, D), (..., S, D)
        Only their lengths, dtype and kind count.
    base : float
        As in rotary positions.
    align : {"lower_right", "upper_left"}
        Which corners meet.

    Returns
    -------
    ndarray, shape (T, S, M)
    """
    T, S, half = q.shape[-2], k.shape[-2], q.shape[-1] // 2
    first = S - T if align == "lower_right" else 0
    t = np.arange(T, dtype=q.dtype, like=q) + first
    distance = t[:, None] - np.arange(S, dtype=q.dtype, like=q)
    omega = [np.full_like(q, base ** (-i / half), shape=(1,)) for i in range(half)]
    return distance[..., None] * np.concatenate(omega)


def _check(q, k, v, adapted, base):
    """The checks of what joins the common ones."""
    own = {name: (a, "... M") for name, a in adapted.items()}
    n = core.check.shapes(q=(q, "... T D"), k=(k, "... S D"), v=(v, "... S E"), **own)
    if n["D"] != 2 * n["M"]:
        words = f"expected one channel for each pair of channels of q, 2 M = D = {n['D']}"
        raise core.errors.ShapeError(f"alpha has M = {n['M']}, {words}")
    core.check.number("base", base, low=1, open_low=True)
    full = (*n["..."], n["T"], n["S"], n["M"])
    core.check.memory(full, q.dtype, "the angles", "a slice of the queries at a time")


def complex_vector_forward(
    q, k, v, alpha, beta, gamma, *, base=10000.0, mask=None, causal=False, align="lower_right",
    scale=None, softcap=None, bias=None, empty_row="zero",
):  # fmt: skip
    """Mix the values with softmax weights of complex products whose angles are adapted.

    Parameters
    ----------
    q : ndarray, shape (..., T, D)
        Queries, D even; channels i and i + M are one complex number.
    k : ndarray, shape (..., S, D)
        Keys.
    v : ndarray, shape (..., S, E)
        Values, real.
    alpha : ndarray, shape (..., M)
        Factor of the angle between query and key; leading axes broadcast, one a head. At first 1.
    beta : ndarray, shape (..., M), radians
        Added to that angle. At first 0.
    gamma : ndarray, shape (..., M)
        Factor of the rotary angle of the distance. At first 1.
    base : float, > 1
        Of the frequencies, as in rotary positions.
    mask : bool ndarray, broadcast to (..., T, S), optional
        True = may attend.
    causal : bool
        Hide the keys behind each query.
    align : {"lower_right", "upper_left"}
        Where the causal diagonal and distance 0 lie when T != S.
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
        For the backward; holds ``p``, ``lse`` and ``phi``.

    Raises
    ------
    ShapeError
        When widths, lengths or leading axes do not fit.
    DTypeError
        When an argument is no float32 or float64 array, or the mask is not boolean.
    ParameterError
        When an option or a number is outside its domain, or a row is empty under "raise".
    MemoryLimitError
        When the angles would take more than 2 GiB.

    Notes
    -----
    *Reconstruction.* The abstract says: per-head polar form of real queries and keys, and a factor
    exp[i(Adapt(AS) + Delta(P))] with learned Adapt and Delta. Ours are the choices that Adapt is
    alpha AS + beta, Delta is gamma times the rotary angle, both with one number for each pair of
    channels of each head; that the score is the real part; that pairs are halves, as in
    scores/rotary; that the values stay real.

    For alpha != 1 it matters which of the angles that differ by 2 pi is taken. The difference is
    wrapped to (-pi, pi], so that turning q and k together changes nothing; the score then jumps
    where q and k point in opposite directions. The angle of the product w is that difference; the
    abstract's polar form of q and k one by one gives the same numbers once it is wrapped. Without
    wrapping alpha theta would be alpha theta_q - alpha theta_k: rotary attention of queries and
    keys with stretched angles, a product again, but one that jumps where q or k alone crosses the
    negative real axis.

    Where a pair of channels is exactly 0 in q or k, its gradient is the limit along theta = 0. For
    alpha = 1 and -1 every direction has this limit, so it is the gradient, and for alpha = 1 that
    of rotary attention: a query can leave 0. For other alpha there is no gradient at 0.

    Source
    ------
    scores/complex_vector in the catalog; abstract of the paper; grade D.

    References
    ----------
    Shao et al. 2025, ComplexFormer: Disruptively Advancing Transformer Inference Ability via
    Head-Specific Complex Vector Attention.

    Examples
    --------
    >>> import numpy as np
    >>> q, k = np.array([[0.0, 1.0]]), np.array([[0.0, 0.0], [np.log(3.0), 0.0]])
    >>> v, one = np.array([[4.0], [8.0]]), np.ones(1)
    >>> out, cache = complex_vector_forward(q, k, v, 0 * one, 0 * one, 0 * one, scale=1.0)
    >>> out.round(12).tolist(), cache.p.round(12).tolist()
    ([[7.0]], [[0.25, 0.75]])
    """
    n = core.check.attention(q, k, v, mask=mask, bias=bias, align=align, scale=scale,
                             softcap=softcap, empty_row=empty_row)  # fmt: skip
    adapted = {"alpha": alpha, "beta": beta, "gamma": gamma}
    _check(q, k, v, adapted, base)
    shapes = {n: a.shape for n, a in (adapted | {"bias": bias}).items() if a is not None}
    scale = core.default_scale(n["D"], scale)
    live = core.visible(q, k, mask=mask, causal=causal, align=align, empty_row=empty_row)
    q, k, v, poison = core.quarantine(q, k, v, live, empty_row)

    x, y = product_forward(q, k)  # (1)
    r, theta = polar_forward(x, y)
    steps = steps_forward(q, k, base, align)
    alpha, beta, gamma = (a[..., None, None, :] for a in adapted.values())
    phi = alpha * theta + beta + gamma * steps  # (2)
    z = np.where(r == 0, x * np.cos(phi) - alpha * y * np.sin(phi), r * np.cos(phi))
    z = np.sum(z, axis=-1) * scale  # (3); where r is 0 only the derivative differs
    z = capped = core.softcap_forward(z, softcap)
    if bias is not None:
        clean, poison = core.quarantine_bias(bias, live, poison)
        z = z + clean
    p, lse = core.softmax_forward(z, live, empty_row)  # (4)
    out = core.mix_forward(p, v)  # (5)

    out = np.where(poison, np.nan, out)
    lse = np.where(poison[..., 0], np.nan, lse)
    polar = (alpha, (x, y, r), theta, steps, phi)
    return out, Cache(q, k, v, *polar, capped, p, lse, live, poison, (scale, softcap), shapes)


def complex_vector_backward(dout, cache):
    """Gradients of :func:`complex_vector_forward`, its steps read from the bottom up.

    Parameters
    ----------
    dout : ndarray, shape (..., T, E)
        Gradient of the output.
    cache : Cache
        From the forward.

    Returns
    -------
    dict
        Under "q", "k", "v", "alpha", "beta", "gamma" and, when given, "bias".
    """
    q, k, v, alpha, (x, y, r), theta, steps, phi, capped, p, _, live, poison, options, shapes = (
        cache
    )
    scale, softcap = options
    lead = np.broadcast_shapes(p.shape[:-2], v.shape[:-2])
    core.check.cotangent(dout, (*lead, p.shape[-2], v.shape[-1]))
    dout = np.where(poison, 0.0, dout)

    dp, dv = core.mix_backward(dout, p, v)  # (5')
    dz = dbias = core.softmax_backward(dp, p, live)  # (4')
    dz = core.softcap_backward(dz, capped, softcap)[..., None] * scale  # (3')
    dr, dphi = dz * np.cos(phi), -dz * r * np.sin(phi)
    found = {"alpha": dphi * theta, "beta": dphi, "gamma": dphi * steps}  # (2')
    found = {name: np.sum(d, axis=(-3, -2)) for name, d in found.items()}
    turn = -alpha * dz * np.sin(phi)
    dq, dk = product_backward(*polar_backward(dr, turn, x, y, r), q, k)  # (1')

    found["bias"] = dbias
    gradients = {name: core.sum_to(found[name], shape) for name, shape in shapes.items()}
    return {"q": dq, "k": dk, "v": dv, **gradients}


M, CENTRES = 2, {"alpha": 0.9, "beta": 0.2, "gamma": 0.4}
"""Channel pairs of the examples, and where their parameters lie."""


def _parameters(rng, kwargs):
    """Contents without opposite directions or small moduli, where differences have no step left."""
    extra = {n: c + 0.3 * rng.standard_normal(M) for n, c in CENTRES.items()}
    for name in "qk":
        r, angle = rng.uniform(-0.5, 0.5, (2, *kwargs[name].shape[:-1], M))
        r, angle = 1.0 + r, 2.5 * angle + np.array([2.0, -1.0])
        extra[name] = np.concatenate([r * np.cos(angle), r * np.sin(angle)], axis=-1)
    return extra


def _example(rng):
    cases = core.examples.attention(rng, extra=_parameters)
    cases["heads"] = {n: a[None] if n in "qkv" else a for n, a in cases["plain"].items()}
    heads = {n: c + 0.3 * rng.standard_normal((2, M)) for n, c in CENTRES.items()}
    cases["heads"] |= heads | {"base": 50.0}
    for name in ("causal-long-queries", "bias"):  # keeps the golden file small
        del cases[name]
    return cases


def _rotary(rng):
    one = np.ones(M)
    return _example(rng)["causal-upper-left"] | {"alpha": one, "beta": 0 * one, "gamma": one}


def _plain(rng):
    one = np.ones(M)
    return _example(rng)["softcap"] | {"alpha": one, "beta": 0 * one, "gamma": 0 * one}


def _without(kwargs):
    return {n: a for n, a in kwargs.items() if n not in CENTRES}


SPEC = core.Mechanism(
    key="scores/complex_vector", forward=complex_vector_forward, backward=complex_vector_backward,
    example=_example,
    flags=frozenset(core.SOFTMAX_FLAGS) - {"permutation_equivariant", "shift_invariant"}
    | {"positional"},
    reduces_to=(
        core.Reduction("scores/rotary", "alpha = 1, beta = 0, gamma = 1", _rotary, _without),
        core.Reduction("scores/dot_product", "alpha = 1, beta = gamma = 0", _plain, _without),
    ),
    claim="Heads that learn alpha, beta and gamma reach a lower loss than rotary heads of the same "
    "size on a task with a local and a global part, and their gammas differ.",
    verified_by=("slow loop", "PyTorch"),
    reconstruction="only the abstract was available: Adapt is alpha theta + beta, Delta is gamma "
    "times the rotary angle, with one number for each channel pair of each head",
)  # fmt: skip
