r"""PreAffine RMSNorm and GatedNorm: what an outlier does through a normalisation, done openly.

.. math::

    u &= \lambda \odot x                                                              &(1)\\
    r &= \sqrt{\tfrac1C \textstyle\sum_c u_c^2 + \varepsilon}, \qquad
    y  = g \odot u / r                                                                &(2)\\
    s &= \sigma\bigl(\mathrm{silu}(y W_\downarrow)\, W_\uparrow\bigr), \qquad
         \mathrm{silu}(h) = h\, \sigma(h)                                             &(3)\\
    o &= s \odot y                                                                    &(4)

for every token x of C channels. Without :math:`\lambda` step (1) is the identity, without the two
matrices of rank R steps (3) and (4) are; what is left is RMSNorm.

One huge channel M enlarges r and shrinks all others, a *residual sink*; one huge logit m enlarges
the softmax's denominator and shrinks all other weights, an *attention sink*. Relative to the same
input without it, the rest is multiplied by

.. math::

    \frac{\lVert x_\text{rest} \rVert}{\sqrt{\lVert x_\text{rest} \rVert^2 + M^2}}
    \quad\text{and}\quad
    \frac{Z}{Z + e^m}, \qquad Z = \textstyle\sum_{s \ne \text{sink}} e^{z_s} .         \tag{5}

The first learns to be a parameter (:math:`\lambda`, PreAffine), both can be replaced by a gate
(GatedNorm; for attention normalizers/gated). Then no channel needs to be large.

Source: Qiu et al. 2026, sections 3.3 and 3.4, from their public re-implementations (grug models of
marin: ``GatedNorm``; norms.py of a GPT laboratory: both modules), read, and the abstract; grade B.
"""

from typing import NamedTuple

import numpy as np

from attention_ref import core


class Cache(NamedTuple):
    """What the backward needs; ``r``, ``y`` and ``gate`` for those who look at them."""

    x: np.ndarray  # (..., C), rows with NaN or infinity replaced by zeros
    u: np.ndarray  # (..., C), after lambda
    r: np.ndarray  # (..., 1), root mean square
    y: np.ndarray  # (..., C), normalised, before the gate
    h: np.ndarray | None  # (..., R), None without a gate
    gate: np.ndarray | None  # (..., C), in (0, 1)
    poison: np.ndarray  # (..., 1), rows that are NaN
    parameters: dict  # those given, by name, non-finite numbers replaced by zeros


def rms_forward(u, g, eps):
    """y = g u / r with r = sqrt(mean u^2 + eps).

    Parameters
    ----------
    u, g : ndarray, shapes (..., C), (C,)
        Tokens, gain.
    eps : float
        Added to the mean square.

    Returns
    -------
    y, r : ndarray, shapes (..., C), (..., 1)
    """
    r = np.sqrt(np.mean(np.square(u), axis=-1, keepdims=True) + eps)
    return g * u / r, r


def rms_backward(dy, u, g, r):
    """du = g dy / r - u mean(u g dy) / r^3, and dg = sum over the rows of dy u / r.

    Parameters
    ----------
    dy : ndarray, shape (..., C)
        Gradient of y.
    u, g, r : ndarray
        As in the forward.

    Returns
    -------
    du, dg : ndarray, shapes (..., C), (C,)
    """
    du = g * dy / r - u * np.mean(u * g * dy, axis=-1, keepdims=True) / r**3
    return du, core.sum_to(dy * u / r, g.shape)


def gate_forward(y, w_down, w_up):
    """s = sigma(silu(h) W_up) with h = y W_down.

    Parameters
    ----------
    y, w_down, w_up : ndarray, shapes (..., C), (C, R), (R, C)
        Normalised tokens, the two matrices.

    Returns
    -------
    s, h : ndarray, shapes (..., C), (..., R)
    """
    h = y @ w_down
    return core.logistic((h * core.logistic(h)) @ w_up), h


def gate_backward(ds, gate, h, y, w_down, w_up):
    """Gradients of the gate: with t = silu(h) and a = t W_up, da = ds s (1 - s).

    Parameters
    ----------
    ds : ndarray, shape (..., C)
        Gradient of the gate.
    gate, h, y, w_down, w_up : ndarray
        As in the forward.

    Returns
    -------
    dy, dw_down, dw_up : ndarray, shapes (..., C), (C, R), (R, C)
    """
    slope = core.logistic(h)
    da = ds * gate * (1.0 - gate)
    dh = (da @ np.swapaxes(w_up, 0, 1)) * slope * (1.0 + h * (1.0 - slope))
    rows = {"y": y, "t": h * slope, "da": da, "dh": dh}
    rows = {name: np.reshape(a, (-1, a.shape[-1])) for name, a in rows.items()}
    dw_down = np.swapaxes(rows["y"], 0, 1) @ rows["dh"]
    dw_up = np.swapaxes(rows["t"], 0, 1) @ rows["da"]
    return dh @ np.swapaxes(w_down, 0, 1), dw_down, dw_up


def residual_factor(x, channel, *, eps=1e-6):
    """How much one channel shrinks the others through RMSNorm, equation (5) with eps.

    Parameters
    ----------
    x : ndarray, shape (..., C)
        Tokens before the normalisation.
    channel : int
        The outlier.
    eps : float, >= 0
        As in the norm.

    Returns
    -------
    ndarray, shape (...)
        r without the channel over r with it, in (0, 1].
    """
    rest = np.where(np.arange(x.shape[-1], like=x) == channel, 0.0, x)
    small, large = (np.mean(np.square(a), axis=-1) + eps for a in (rest, x))
    return np.sqrt(small / large)


def sink_factor(z, key):
    """How much one key shrinks the weights of the others through softmax, equation (5).

    Parameters
    ----------
    z : ndarray, shape (..., S), nats
        Scores.
    key : int
        The sink.

    Returns
    -------
    ndarray, shape (...)
        Z / (Z + e^m), the sum of the weights of the other keys.
    """
    live = np.arange(z.shape[-1], like=z) != key
    _, lse = core.softmax_forward(z, live)
    return core.logistic(lse - z[..., key])


def outlier_rescaling_forward(x, g, lam=None, w_down=None, w_up=None, *, eps=1e-6):
    """RMSNorm with a learned factor before it, a gate after it, or both.

    Parameters
    ----------
    x : ndarray, shape (..., C)
        Tokens.
    g : ndarray, shape (C,)
        Gain of the normalisation.
    lam : ndarray, shape (C,), optional
        PreAffine's lambda, 1 at the start of training.
    w_down : ndarray, shape (C, R), optional
        GatedNorm's first matrix; R is the rank, 16 or 128 in the code read.
    w_up : ndarray, shape (R, C), optional
        GatedNorm's second matrix, given with the first; zero makes the gate one half.
    eps : float, >= 0, squared units of x
        Added to the mean square.

    Returns
    -------
    out : ndarray, shape (..., C)
        The normalised tokens.
    cache : Cache
        For the backward; holds ``r``, ``y`` and ``gate``.

    Raises
    ------
    ShapeError
        When sizes do not fit, or there is no channel.
    DTypeError
        When an argument is no float32 or float64 array.
    ParameterError
        When eps is negative, or only one of the two matrices is given.

    Notes
    -----
    The gate reads y, after the norm and its gain, as the summaries of section 3.4 and both
    re-implementations have it. One of them starts with W_up = 0, so that the module begins as half
    of RMSNorm; the other draws both matrices. The paper's rank was not found: 16 and 128 are
    theirs. PreAffine and GatedNorm together are not in the paper; here they combine freely. With
    eps = 0 a token of zeros divides by zero. Squares of numbers above 1.8e19 overflow in float32,
    and the token becomes zero, as in the usual code.

    Source
    ------
    normalizers/outlier_rescaling in the catalog; public re-implementations and the abstract;
    grade B.

    References
    ----------
    Qiu et al. 2026, A Unified View of Attention and Residual Sinks: Outlier-Driven Rescaling is
    Essential for Transformer Training.

    Examples
    --------
    The mean square of (1, 7) is 25; gates of 3/4 and 1/4.

    >>> import numpy as np
    >>> x, g = np.array([1.0, 7.0]), np.array([5.0, 5.0])
    >>> w_down, w_up = np.array([[np.log(3.0)], [0.0]]), np.array([[4.0, -4.0]]) / 3
    >>> out, cache = outlier_rescaling_forward(x, g, None, w_down, w_up, eps=0.0)
    >>> cache.y.round(12).tolist(), cache.gate.round(12).tolist(), out.round(12).tolist()
    ([1.0, 7.0], [0.75, 0.25], [0.75, 1.75])
    """
    given = {"g": g, "lam": lam, "w_down": w_down, "w_up": w_up}
    axes = {"g": "C", "lam": "C", "w_down": "C R", "w_up": "R C"}
    n = core.check.shapes(x=(x, "... C"), **{name: (given[name], axes[name]) for name in axes})
    core.check.number("eps", eps, low=0)
    if n["C"] == 0:
        raise core.errors.ShapeError(f"x has shape {tuple(x.shape)}, expected at least one channel")
    if (w_down is None) != (w_up is None):
        missing = "w_up" if w_up is None else "w_down"
        raise core.errors.ParameterError(f"{missing} is None, expected both matrices or none")
    given = {name: value for name, value in given.items() if value is not None}
    good = np.all(np.isfinite(x), axis=-1, keepdims=True)
    broken = [np.any(~np.isfinite(value)) for value in given.values()]
    poison = ~good | np.any(np.stack(broken))
    x = np.where(good, x, 0.0)
    clean = {name: np.where(np.isfinite(value), value, 0.0) for name, value in given.items()}

    u = x if lam is None else clean["lam"] * x  # (1)
    out, r = rms_forward(u, clean["g"], float(eps))  # (2)
    y, h, gate = out, None, None
    if w_up is not None:
        gate, h = gate_forward(y, clean["w_down"], clean["w_up"])  # (3)
        out = gate * y  # (4)
    return np.where(poison, np.nan, out), Cache(x, u, r, y, h, gate, poison, clean)


def outlier_rescaling_backward(dout, cache):
    """Gradients of :func:`outlier_rescaling_forward`, its steps read from the bottom up.

    Parameters
    ----------
    dout : ndarray, shape (..., C)
        Gradient of the output.
    cache : Cache
        From the forward.

    Returns
    -------
    dict
        Under "x", "g" and, when given, "lam", "w_down", "w_up".
    """
    x, u, r, y, h, gate, poison, given = cache
    core.check.cotangent(dout, x.shape)
    dy, gradients = np.where(poison, 0.0, dout), {}

    if gate is not None:
        matrices = given["w_down"], given["w_up"]
        ds, dy = dy * y, dy * gate  # (4')
        extra, gradients["w_down"], gradients["w_up"] = gate_backward(ds, gate, h, y, *matrices)
        dy = dy + extra  # (3')
    dx, gradients["g"] = rms_backward(dy, u, given["g"], r)  # (2')
    if "lam" in given:
        gradients["lam"] = core.sum_to(dx * x, given["lam"].shape)  # (1')
        dx = dx * given["lam"]
    return {"x": dx, **gradients}


def _example(rng):
    def norm(lead, C, R=None, lam=False, **more):
        kwargs = {"x": 1.5 * rng.standard_normal((*lead, C)), "g": rng.standard_normal(C)}
        if lam:
            kwargs["lam"] = rng.standard_normal(C)
        if R is not None:
            down, up = rng.standard_normal((C, R)), rng.standard_normal((R, C))
            small = 0.6 if R > C else 1.0  # a wide gate bends too much for differences
            kwargs |= {"w_down": small * down, "w_up": small * up}
        return kwargs | more

    return {
        "rms": norm((3,), 4),
        "pre-affine": norm((2, 3), 5, lam=True, eps=0.3),
        "gated": norm((4,), 5, 3),
        "both": norm((2, 3), 6, 2, lam=True, eps=0.1),
        "one-token": norm((), 7, 4, lam=True),
        "one-channel": norm((5,), 1, 2, eps=0.5),
        "wide-gate": norm((2,), 3, 8),
    }


def _ones(rng):
    return _example(rng)["gated"] | {"lam": np.ones(5)}


def _without(*names):
    return lambda kwargs: {n: a for n, a in kwargs.items() if n not in names}


def _half(rng):
    kwargs = _example(rng)["both"]
    return kwargs | {"w_up": 0.0 * kwargs["w_up"]}


SPEC = core.Module(
    key="normalizers/outlier_rescaling",
    forward=outlier_rescaling_forward,
    backward=outlier_rescaling_backward,
    example=_example,
    reduces_to=(
        core.Reduction(
            "normalizers/outlier_rescaling", "lambda = 1 is no lambda", _ones, _without("lam")
        ),
        core.Reduction(
            "normalizers/outlier_rescaling", "W_up = 0 is half of it without a gate", _half,
            _without("w_down", "w_up"), compare=lambda out, other: (2.0 * out, other),
            gradients=False,
        ),
    ),
    claim=(
        "A small network that must write tokens of very different length through an RMSNorm makes "
        "one channel large; through a GatedNorm it does not."
    ),
    verified_by=("slow loop", "PyTorch"),
)  # fmt: skip
