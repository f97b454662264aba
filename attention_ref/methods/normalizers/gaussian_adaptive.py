r"""Gaussian adaptive attention: every number is weighed by where it lies among its neighbours.

Along one axis, cut into H heads of n numbers, with K Gaussians a head:

.. math::

    y_{ik} &= (x_i - \mu - \delta_k) / s, \qquad
        \mu = \tfrac1n \textstyle\sum_i x_i, \quad
        s^2 = \tfrac{1}{n-1} \textstyle\sum_i (x_i - \mu)^2 + \epsilon                  &(1)\\
    g_i &= \textstyle\sum_k w_k\, e^{-y_{ik}^2 / 2 c_k^2}, \quad w = \text{softmax}(\theta)
        \qquad\text{or}\qquad
        g_i = \textstyle\prod_k e^{-y_{ik}^2 / 2 c_k^2} / \sqrt{2 \pi c_k^2}            &(2)\\
    a_i &= g_i / \max(\textstyle\sum_j g_j, \epsilon)                                   &(3)\\
    o_i &= a_i\, x_i                                                                    &(4)

No queries and no keys: the weights :math:`a` come from amplitudes, not from products of tokens,
and with the learned offsets :math:`\delta` and widths c attention may stay in the middle or move
to a tail. A product of Gaussians is one Gaussian, so the second variant has one bump for any K;
the sum has up to K. The output has the size of a mean's terms, about x / n.

Source: Ioannides, Chadha, Elkins 2024; official code of all versions read: MHGAAM.py (the sum, 22
and 23 January 2024), gaussian_adaptive_attention.py and GaussianBlock.py (the product, from 30
January on); grade A.
"""

import math
from typing import NamedTuple

import numpy as np

from attention_ref import core


class Cache(NamedTuple):
    """What the backward needs, and what implementers compare with (``weights``)."""

    x: np.ndarray  # (..., H, n), in heads; heads with NaN or infinity replaced by zeros
    y: np.ndarray  # (..., H, n, K), as in (1)
    s: np.ndarray  # (..., H, 1), standard deviations
    bumps: np.ndarray  # (..., H, n, K), exponentials of (2), without factors
    w: np.ndarray | None  # (H, K), weights of the Gaussians; None for the product
    c: np.ndarray  # (H, K)
    g: np.ndarray  # (..., H, n)
    total: np.ndarray  # (..., H, 1), the divisor in (3)
    clamped: np.ndarray  # (..., H, 1), bool: the divisor is eps
    weights: np.ndarray  # (..., H, n), a
    poison: np.ndarray  # (..., H, 1), heads that are NaN
    learned: bool  # theta was given
    axis: int
    shape: tuple  # of x, the axis moved to the end


def _door(x, delta, c, theta, variant, axis, eps):
    """Everything that can be wrong with the arguments; returns the lengths."""
    core.check.option("variant", variant, ("sum", "product"))
    core.check.number("eps", eps, low=0, open_low=True)
    if variant == "product" and theta is not None:
        raise core.errors.ParameterError(
            "theta is an array, expected None: a product of Gaussians has no weights"
        )
    n = core.check.shapes(delta=(delta, "H K"), c=(c, "H K"), theta=(theta, "H K"))
    core.check.shapes(x=(x, "... N"))
    core.check.count("axis", axis, low=-len(x.shape), high=len(x.shape) - 1)
    if n["H"] * n["K"] == 0 or x.shape[axis] % n["H"] or x.shape[axis] < 2 * n["H"]:
        raise core.errors.ShapeError(
            f"x has length {x.shape[axis]} along axis {axis}, expected a multiple of H = {n['H']} "
            f"as in delta {tuple(delta.shape)}, at least 2 H, and K of at least 1"
        )
    if isinstance(c, np.ndarray) and np.any(c == 0).item():
        raise core.errors.ParameterError("c holds 0, expected widths other than 0")
    return n


def gaussian_adaptive_forward(
    x, delta, c, theta=None, *, variant="sum", axis=-1, eps=1e-8
):  # fmt: skip
    """Weigh every number by Gaussians of its standardised value.

    Parameters
    ----------
    x : ndarray, any shape
        Features; the given axis has H n numbers.
    delta : ndarray, shape (H, K), in the unit of x
        Offsets of the Gaussians from the mean.
    c : ndarray, shape (H, K), dimensionless
        Widths in standard deviations of the head, not 0; only c^2 counts.
    theta : ndarray, shape (H, K), nats, optional
        Logits of the weights of the sum; equal weights by default.
    variant : {"sum", "product"}
        A mixture of the Gaussians, or their product.
    axis : int
        Along which mean, variance and weights are taken.
    eps : float, > 0
        Added to the variance, and the least divisor in (3).

    Returns
    -------
    out : ndarray, shape of x
        The weighed features.
    cache : Cache
        For the backward; holds ``weights`` (..., H, n), the axis moved to the end.

    Raises
    ------
    ShapeError
        When the axis is no multiple of H, or gives a head fewer than two numbers.
    DTypeError
        When an argument is no float32 or float64 array.
    ParameterError
        For an unknown variant, an axis that x has not, a width of 0, or theta with the product.

    Notes
    -----
    The two variants are two releases under one name; the sum is the default here because it is
    the mixture that the paper's words describe, the product is the newest code. Their widths
    start at 2 in the sum, at e to a standard normal number in the product; offsets start at 0,
    logits at 1. With these starts all Gaussians of a sum are the same and stay the same: begin
    with different offsets or widths. The official code knows padded numbers by their value,
    counts them as zeros in mean and variance and hands them on as they are, which is left out;
    its first versions drop what is left over when H does not divide the axis, here an error. A
    number that is not finite makes NaN of its head.

    Source
    ------
    normalizers/gaussian_adaptive in the catalog; the official files named above; grade A.

    References
    ----------
    Ioannides, Chadha, Elkins 2024, Gaussian Adaptive Attention is All You Need.

    Examples
    --------
    Mean 0, s = 1; one Gaussian with 2 c^2 = 1 / ln 2: the weights are as 1 : 2 : 1.

    >>> import numpy as np
    >>> x, c = np.array([-1.0, 0.0, 1.0]), np.array([[np.sqrt(0.5 / np.log(2.0))]])
    >>> out, cache = gaussian_adaptive_forward(x, np.zeros((1, 1)), c)
    >>> cache.weights.round(6).tolist(), out.round(6).tolist()
    ([[0.25, 0.5, 0.25]], [-0.25, 0.0, 0.25])
    """
    n = _door(x, delta, c, theta, variant, axis, eps)
    x = np.moveaxis(x, axis, -1)
    shape = x.shape
    x = np.reshape(x, (*shape[:-1], n["H"], shape[-1] // n["H"]))
    poison = np.any(~np.isfinite(x), axis=-1, keepdims=True)
    x = np.where(poison, 0.0, x)
    given = [delta, c] if theta is None else [delta, c, theta]
    for parameter in given:
        poison = poison | np.any(~np.isfinite(parameter), axis=-1, keepdims=True)
    delta, c, *rest = (np.where(np.isfinite(a), a, 1.0) for a in given)

    off = x - np.mean(x, axis=-1, keepdims=True)  # (1)
    variance = np.sum(np.square(off), axis=-1, keepdims=True) / (x.shape[-1] - 1)
    s = np.sqrt(variance + eps)
    y = (off[..., None] - delta[:, None, :]) / s[..., None]
    bumps, w = np.exp(-0.5 * np.square(y / c[:, None, :])), None
    if variant == "product":
        height = 1.0 / (math.sqrt(2.0 * math.pi) * core.absolute(c[:, None, :]))
        g = np.prod(bumps * height, axis=-1)  # (2)
    else:
        w = np.exp(rest[0] - core.row_max(rest[0])) if rest else np.ones_like(delta)
        w = w / np.sum(w, axis=-1, keepdims=True)
        g = np.sum(bumps * w[:, None, :], axis=-1)
    total = np.sum(g, axis=-1, keepdims=True)
    clamped = total < eps
    total = np.where(clamped, eps, total)
    weights = g / total  # (3)
    out = np.where(poison, np.nan, weights * x)  # (4)
    out = np.moveaxis(np.reshape(out, shape), -1, axis)
    return out, Cache(
        x, y, s, bumps, w, c, g, total, clamped, weights, poison, theta is not None, axis, shape
    )


def gaussian_adaptive_backward(dout, cache):
    """Gradients of :func:`gaussian_adaptive_forward`, its steps read from the bottom up.

    Parameters
    ----------
    dout : ndarray, shape of x
        Gradient of the output.
    cache : Cache
        From the forward.

    Returns
    -------
    dict
        Under "x", "delta", "c" and, when given, "theta".
    """
    x, y, s, bumps, w, c, g, total, clamped, weights, poison, learned, axis, shape = cache
    core.check.cotangent(dout, np.moveaxis(np.zeros_like(x, shape=shape), -1, axis).shape)
    dout = np.where(poison, 0.0, np.reshape(np.moveaxis(dout, axis, -1), x.shape))
    wide, lead = c[:, None, :], tuple(range(x.ndim - 2))
    spread = (*lead, -2)  # axes over which a parameter of shape (H, K) is shared

    da = dout * x  # (4')
    share = np.sum(da * weights, axis=-1, keepdims=True)
    dg = (da - np.where(clamped, 0.0, share)) / total  # (3')
    if w is None:
        part = np.broadcast_to((dg * g)[..., None], y.shape)  # (2')
    else:
        part = dg[..., None] * bumps * w[:, None, :]
    dc = np.sum(part * np.square(y), axis=spread) / (c * c * c)
    gradients = {}
    if w is None:
        dc = dc - np.sum(part, axis=spread) / c
    elif learned:
        dw = np.sum(part, axis=spread)  # times w
        gradients["theta"] = dw - w * np.sum(dw, axis=-1, keepdims=True)
    dy = -part * y / np.square(wide)
    direct = np.sum(dy, axis=-1) / s  # (1')
    slope = np.sum(dy * y, axis=(-2, -1))[..., None] / np.square(s)  # -2 ds^2
    off = x - np.mean(x, axis=-1, keepdims=True)
    dx = direct - np.mean(direct, axis=-1, keepdims=True) - slope * off / (x.shape[-1] - 1)
    gradients["delta"] = -np.sum(dy / s[..., None], axis=spread)
    dx = np.reshape(dout * weights + dx, shape)
    return {"x": np.moveaxis(dx, -1, axis), "c": dc, **gradients}


def _example(rng):
    """Sums and products, one head and two, another axis, and a clamp that acts."""

    def case(*shape, H=1, K=3, theta=True, **options):
        def wide():
            return rng.choice((-1.0, 1.0), (H, K)) * (0.7 + 1.3 * rng.random((H, K)))

        x = np.moveaxis(np.zeros(shape), options.get("axis", -1), -1)
        heads, spread = (*x.shape[:-1], H, x.shape[-1] // H), 0.0
        while np.min(spread) < 1.5:  # differences need some distance from s = 0
            x = 2.0 * rng.standard_normal(heads)
            spread = np.std(x, axis=-1, ddof=1)
        x = np.reshape(x, (*heads[:-2], -1))
        kwargs = {"x": np.moveaxis(x, -1, options.get("axis", -1))}
        kwargs |= {"delta": 1.5 * rng.standard_normal((H, K)), "c": wide()} | options
        return kwargs | ({"theta": rng.standard_normal((H, K))} if theta else {})

    return {
        "plain": case(2, 5), "heads": case(3, 8, H=2, K=2), "bare": case(6, K=2, theta=False),
        "product": case(2, 5, theta=False, variant="product"), "axis": case(2, 6, 3, H=2, axis=1),
        "product-heads": case(3, 8, H=2, K=2, theta=False, variant="product"),
        "clamp": case(2, 6, eps=9.0), "pair": case(3, 2, K=1),
        "product-clamp": case(2, 4, K=2, theta=False, variant="product", eps=9.0),
    }  # fmt: skip


def _one_bump(mine):
    """The Gaussian that a product of Gaussians is, but for its height."""
    precision = np.sum(mine["c"] ** -2, axis=1, keepdims=True)
    middle = np.sum(mine["delta"] * mine["c"] ** -2, axis=1, keepdims=True) / precision
    return {"x": mine["x"], "delta": middle, "c": precision**-0.5}


def _narrow(rng):
    return {"x": rng.standard_normal((4, 5)), "delta": np.array([[0.4]]), "c": np.array([[1.3]])}


def _as_scores(mine):
    """-y^2 / 2 c^2 up to a constant of the row: the product of (x, x^2) with a query of two."""
    x = mine["x"]
    a = 0.5 / (mine["c"] ** 2 * (np.var(x, axis=-1, ddof=1, keepdims=True) + 1e-8))
    q = np.stack([2.0 * a * (np.mean(x, axis=-1, keepdims=True) + mine["delta"]), -a], axis=-1)
    return {"q": q, "k": np.stack([x, x * x], axis=-1), "v": x[..., None], "scale": 1.0}


SPEC = core.Mechanism(
    key="normalizers/gaussian_adaptive",
    forward=gaussian_adaptive_forward,
    backward=gaussian_adaptive_backward,
    example=_example,
    reduces_to=(
        core.Reduction(
            "normalizers/gaussian_adaptive", "a product of Gaussians is one Gaussian",
            lambda rng: _example(rng)["product"], _one_bump, gradients=True,
        ),
        core.Reduction(
            "scores/dot_product", "the sum of the output is softmax attention on (x, x^2)",
            _narrow, _as_scores, gradients=False,
            compare=lambda out, other: (np.sum(out, axis=-1), other[..., 0, 0]),
        ),
    ),
    claim="Learned Gaussians find the class in the middle of the amplitudes or in both tails, "
    "where a plain mean misses it; a product of Gaussians, being one Gaussian, misses the tails.",
    verified_by=("slow loop", "PyTorch"),
)  # fmt: skip
