r"""Squeeze and excitation, ECA: every channel is weighed by what all of the image says.

.. math::

    m_c &= \tfrac{1}{XY} \textstyle\sum_{xy} x_{cxy}                       &(1)\\
    z   &= W_2\, \mathrm{relu}(W_1 m + b_1) + b_2
        \quad\text{or}\quad z_c = \textstyle\sum_j w_j\, m_{c + j - K//2}   &(2)\\
    g   &= 1 / (1 + e^{-z})                                                &(3)\\
    o_{cxy} &= g_c\, x_{cxy}                                               &(4)

Squeeze: one number a channel. Excite: a gate between 0 and 1 a channel, from a small network
("se", with C/r hidden units) or from the neighbouring channels ("eca", one kernel for all).
Attention over channels in place of positions: weights that do not compete, as the logistic has no
sum over channels, and the same weight everywhere in the image.

Source: Hu et al. 2018, equations (2) to (4); Wang et al. 2020, section 3; official files read:
models/SE-ResNet-50.prototxt and models/eca_module.py; grade A.
"""

import math
from typing import NamedTuple

import numpy as np

from attention_ref import core


class Cache(NamedTuple):
    """What the backward needs; ``gate`` for those who look at it."""

    x: np.ndarray  # (..., C, X, Y), channels with NaN or infinity replaced by zeros
    m: np.ndarray  # (..., C), means
    hidden: np.ndarray | None  # (..., C/r), after the relu; None for "eca"
    gate: np.ndarray  # (..., C), in (0, 1)
    poison: np.ndarray  # (..., C), channels that are NaN
    parameters: dict  # those given, by name, non-finite numbers replaced by zeros


def kernel_size(channels):
    """The kernel length that ECA chooses for a number of channels: near (log2 C + 1) / 2, odd.

    Parameters
    ----------
    channels : int
        C.

    Returns
    -------
    int
    """
    core.check.count("channels", channels, low=1)
    t = int((math.log2(channels) + 1) / 2)
    return t if t % 2 else t + 1


def _conv_forward(m, w):
    """z_c = sum_j w_j m_{c + j - K//2}, zeros beyond the ends: (..., C), (K,) -> (..., C)."""
    wide = _padded(m, w)
    return sum(w[j] * wide[..., j : j + m.shape[-1]] for j in range(w.shape[0]))


def _conv_backward(dz, m, w):
    """dw_j = sum_c dz_c m_{c + j - K//2}; dm is the same sum with the kernel reversed."""
    wide, channels = _padded(m, w), m.shape[-1]
    dw = [np.sum(dz * wide[..., j : j + channels]) for j in range(w.shape[0])]
    return _conv_forward(dz, w[::-1]), np.stack(dw)


def _padded(m, w):
    half = w.shape[0] // 2
    return np.pad(m, [(0, 0)] * (m.ndim - 1) + [(half, half)])


def _door(x, variant, given):
    """Everything that can be wrong with the arguments."""
    core.check.option("variant", variant, ("se", "eca"))
    needed = ("W1", "W2") if variant == "se" else ("w",)
    for name in ("W1", "W2", "w") if variant == "se" else given:
        if (given[name] is None) == (name in needed):
            word = "an array" if name in needed else "None"
            raise core.errors.ParameterError(
                f"{name} is {type(given[name]).__name__}, expected {word} for variant={variant!r}"
            )
    axes = {"W1": "M C", "b1": "M", "W2": "C M", "b2": "C", "w": "K"}
    n = core.check.shapes(x=(x, "... C X Y"), **{k: (given[k], axes[k]) for k in axes})
    if n["C"] * n["X"] * n["Y"] == 0:
        raise core.errors.ShapeError(f"x has shape {x.shape}, expected C, X and Y of at least 1")
    if variant == "eca" and n["K"] % 2 == 0:
        raise core.errors.ShapeError(f"w has K = {n['K']}, expected an odd kernel length")


def squeeze_excitation_forward(
    x, W1=None, b1=None, W2=None, b2=None, w=None, *, variant="se"
):  # fmt: skip
    """Weigh the channels of an image by gates computed from their means.

    Parameters
    ----------
    x : ndarray, shape (..., C, X, Y)
        Features: C channels on a grid.
    W1 : ndarray, shape (M, C)
        First layer of "se", M = C / r hidden units; r = 16 in the paper.
    b1 : ndarray, shape (M,), optional
        Its bias.
    W2 : ndarray, shape (C, M)
        Second layer of "se".
    b2 : ndarray, shape (C,), optional
        Its bias.
    w : ndarray, shape (K,)
        Kernel of "eca" over neighbouring channels, K odd; :func:`kernel_size` gives the usual K.
    variant : {"se", "eca"}
        Where the gate comes from.

    Returns
    -------
    out : ndarray, shape (..., C, X, Y)
        The weighed features.
    cache : Cache
        For the backward; holds ``gate`` (..., C).

    Raises
    ------
    ShapeError
        When sizes do not fit, the image is empty, or the kernel length is even.
    DTypeError
        When an argument is no float32 or float64 array.
    ParameterError
        For an unknown variant, or parameters that belong to the other one.

    Notes
    -----
    The official networks have both biases; some others have none. ECA's channels are padded with
    zeros, so their order matters, although it is arbitrary. Mobile networks put a hard sigmoid in
    place of (3). A number that is not finite makes NaN of all channels whose gate sees it: all of
    its image in "se", the neighbouring channels in "eca"; in a parameter, of everything.

    Source
    ------
    vision/squeeze_excitation in the catalog; the two official files named above; grade A.

    References
    ----------
    Hu et al. 2018, Squeeze-and-Excitation Networks.
    Wang et al. 2020, ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks.

    Examples
    --------
    Means 1 and 3; the only hidden unit is their difference, 2; gates 3/4 and 1/2.

    >>> import numpy as np
    >>> x = np.array([[[0.0, 2.0]], [[3.0, 3.0]]])
    >>> W1, W2 = np.array([[-1.0, 1.0]]), np.array([[np.log(3.0) / 2], [0.0]])
    >>> out, cache = squeeze_excitation_forward(x, W1, None, W2)
    >>> cache.gate.round(12).tolist(), out.round(12).tolist()
    ([0.75, 0.5], [[[0.0, 1.5]], [[1.5, 1.5]]])
    """
    given = {"W1": W1, "b1": b1, "W2": W2, "b2": b2, "w": w}
    _door(x, variant, given)
    given = {name: value for name, value in given.items() if value is not None}
    good = np.all(np.isfinite(x), axis=(-2, -1))
    bad = np.where(good, 0.0, 1.0)
    bad = np.sum(bad, -1, keepdims=True) if w is None else _conv_forward(bad, np.ones_like(w))
    poison = (bad > 0) | np.any(
        np.stack([np.any(~np.isfinite(value)) for value in given.values()])
    )  # fmt: skip
    x = np.where(good[..., None, None], x, 0.0)
    clean = {name: np.where(np.isfinite(value), value, 0.0) for name, value in given.items()}

    m = np.mean(x, axis=(-2, -1))  # (1)
    hidden = None
    if variant == "eca":
        z = _conv_forward(m, clean["w"])  # (2)
    else:
        hidden = core.relu(m @ np.swapaxes(clean["W1"], 0, 1) + clean.get("b1", 0.0))
        z = hidden @ np.swapaxes(clean["W2"], 0, 1) + clean.get("b2", 0.0)
    gate = core.logistic(z)  # (3)
    out = x * gate[..., None, None]  # (4)
    out = np.where(poison[..., None, None], np.nan, out)
    return out, Cache(x, m, hidden, gate, poison, clean)


def squeeze_excitation_backward(dout, cache):
    """Gradients of :func:`squeeze_excitation_forward`, its steps read from the bottom up.

    Parameters
    ----------
    dout : ndarray, shape (..., C, X, Y)
        Gradient of the output.
    cache : Cache
        From the forward.

    Returns
    -------
    dict
        Under "x" and the names of the parameters given.
    """
    x, m, hidden, gate, poison, given = cache
    core.check.cotangent(dout, x.shape)
    dout = np.where(poison[..., None, None], 0.0, dout)

    dgate = np.sum(dout * x, axis=(-2, -1))  # (4')
    dz = dgate * gate * (1.0 - gate)  # (3')
    if hidden is None:
        dm, dw = _conv_backward(dz, m, given["w"])  # (2')
        gradients = {"w": dw}
    else:
        dhidden = np.where(hidden > 0, dz @ given["W2"], 0.0)
        dm = dhidden @ given["W1"]
        rows = {"z": dz, "hidden": dhidden, "a": hidden, "m": m}
        rows = {name: np.reshape(a, (-1, a.shape[-1])) for name, a in rows.items()}
        gradients = {
            "W1": np.swapaxes(rows["hidden"], 0, 1) @ rows["m"],
            "b1": np.sum(rows["hidden"], axis=0),
            "W2": np.swapaxes(rows["z"], 0, 1) @ rows["a"],
            "b2": np.sum(rows["z"], axis=0),
        }
    area = x.shape[-2] * x.shape[-1]
    dx = dout * gate[..., None, None] + dm[..., None, None] / area  # (1')
    return {"x": dx} | {name: gradients[name] for name in given}


def _example(rng):
    def se(lead, M=2, C=4, X=3, Y=2):
        for _ in range(1000):  # differences need some distance from the kink of the relu
            kwargs = {
                "x": rng.standard_normal((*lead, C, X, Y)), "W1": rng.standard_normal((M, C)),
                "b1": rng.standard_normal(M), "W2": rng.standard_normal((C, M)),
                "b2": rng.standard_normal(C),
            }  # fmt: skip
            h = np.mean(kwargs["x"], axis=(-2, -1)) @ kwargs["W1"].T
            if min(np.min(np.abs(h)), np.min(np.abs(h + kwargs["b1"]))) > 0.05:
                break
        return kwargs

    def eca(lead, K, C=5):
        return {"x": se(lead, C=C)["x"], "w": rng.standard_normal(K), "variant": "eca"}

    def bare(kwargs):
        return {name: kwargs[name] for name in ("x", "W1", "W2")}

    return {
        "se": se((3,)), "eca": eca((2,), 3), "se-one-image": se((), 3, 7, 2, 5),
        "se-no-bias": bare(se((2, 3), 3)), "eca-wide": eca((), 7), "eca-one": eca((2, 1), 1, 6),
        "one-pixel": se((4,), 2, 3, 1, 1),
    }  # fmt: skip


def _as_layers(mine):
    """relu(y) - relu(-y) = y: the kernel as a banded matrix, once with each sign."""
    C, K = mine["x"].shape[-3], mine["w"].size
    step = np.arange(C) - np.arange(C)[:, None] + K // 2
    band = np.where((step >= 0) & (step < K), mine["w"][np.clip(step, 0, K - 1)], 0.0)
    one = np.eye(C)
    return {"x": mine["x"], "W1": np.concatenate([band, -band]), "W2": np.hstack([one, -one])}


SPEC = core.Mechanism(
    key="vision/squeeze_excitation",
    forward=squeeze_excitation_forward,
    backward=squeeze_excitation_backward,
    example=_example,
    reduces_to=(
        core.Reduction(
            "vision/squeeze_excitation", "eca is se with the kernel as its first layer",
            lambda rng: _example(rng)["eca"], _as_layers,
        ),
    ),
    claim="Where a context channel says which channels matter, gates from the channel means "
    "reach the accuracy of an oracle, and without gates the class cannot be told.",
    verified_by=("slow loop", "PyTorch"),
)  # fmt: skip
