r"""Rotary positions: queries and keys are turned by angles that grow with their positions.

.. math::

    a_{ti} &= \text{pos}_t\, \omega_i, \qquad \omega_i = \text{base}^{-2 i / R}, \ i < R/2  &(1)\\
    y_1 &= \mu\, (x_1 \cos a - x_2 \sin a), \quad y_2 = \mu\, (x_2 \cos a + x_1 \sin a)     &(2)\\
    z_{ts} &= \kappa \tanh(c\, q'_t \cdot k'_s / \kappa) + b_{ts}                           &(3)\\
    p_{ts} &= e^{z_{ts}} / \textstyle\sum_{s'} e^{z_{ts'}}                                  &(4)\\
    o_t &= \textstyle\sum_s p_{ts}\, v_s                                                    &(5)

(2) turns each pair of channels of q and k, giving q' and k'; a score depends on positions through
their difference only. To go beyond the length L of training, "linear" (position interpolation)
divides :math:`\omega` by s, "ntk" multiplies the base by :math:`s^{R/(R-2)}`, "yarn" divides only
the slow frequencies and sets :math:`\mu = 0.1 \ln s + 1`; otherwise :math:`\mu = 1`.

Source: Su et al. 2021, *RoFormer*, section 3.2; Chen et al. 2023, *Position Interpolation*;
Peng et al. 2023, *YaRN*, with its official code jquesnelle/yarn; also read: modeling_rope_utils.py
of transformers and gpt_oss/torch/model.py of gpt-oss; grade A.
"""

import math
from typing import NamedTuple

import numpy as np

from attention_ref import core


class Cache(NamedTuple):
    """What the backward needs, and what implementers compare with (``p``, ``lse``)."""

    q: np.ndarray  # (..., T, D), turned; rows with NaN or infinity were replaced by zeros
    k: np.ndarray  # (..., S, D), likewise
    v: np.ndarray  # (..., S, E), not turned
    turns: tuple  # (cos, sin) of queries, (..., T, R/2), and of keys, (..., S, R/2), times mu
    omega: np.ndarray  # (R/2,), radians a position
    capped: np.ndarray  # (..., T, S), scores after the softcap, before bias and mask
    p: np.ndarray  # (..., T, S), weights
    lse: np.ndarray  # (..., T), log of the sum of exponentials, nats; -inf for an empty row
    live: np.ndarray  # (..., T, S), True = may attend
    poison: np.ndarray  # (..., T, 1), rows that are NaN
    options: tuple  # interleaved, scale, softcap
    shapes: dict  # of q, k, and of pos_q, pos_k, bias where given


def rotary_frequencies(
    R, base=10000.0, scaling=None, s=1.0, L=None, beta_fast=32.0, beta_slow=1.0, truncate=True
):
    """The frequencies and the factor mu of cos and sin.

    Parameters
    ----------
    R, base, scaling, s, L, beta_fast, beta_slow, truncate
        As in :func:`rotary_forward`.

    Returns
    -------
    omega : list of float
        R/2 frequencies, radians a position.
    mu : float
        Factor of cos and sin.
    """
    if scaling == "ntk":
        base = base * s ** (R / (R - 2))
    omega = [base ** (-2.0 * i / R) for i in range(R // 2)]
    if scaling != "yarn":
        return [w / s if scaling == "linear" else w for w in omega], 1.0
    # The pair that turns beta times within L; fewer turns, slower pairs, larger index.
    turns = (math.log(L / (2 * math.pi * beta)) for beta in (beta_fast, beta_slow))
    low, high = (R * log / (2 * math.log(base)) for log in turns)
    low, high = (math.floor(low), math.ceil(high)) if truncate else (low, high)
    low, high = max(low, 0), min(high, R - 1)
    width = max(high - low, 0.001)
    ramp = [min(max((i - low) / width, 0.0), 1.0) for i in range(R // 2)]
    omega = [w * (1.0 - r) + w / s * r for w, r in zip(omega, ramp, strict=True)]
    return omega, 0.1 * math.log(s) + 1.0


def place_forward(x, pos, first):
    """Tokens and their positions: those given, or the places; what is not finite becomes a NaN row.

    Parameters
    ----------
    x : ndarray, shape (..., T, D)
        Queries or keys.
    pos : ndarray, shape (..., T), or None
        None: first, first + 1, ...
    first : int
        Place of the first token.

    Returns
    -------
    x : ndarray, shape (..., T, D)
        With NaN in the rows whose position is not finite, for the quarantine.
    pos : ndarray, shape (..., T)
        Finite.
    """
    if pos is None:
        return x, np.arange(x.shape[-2], dtype=x.dtype, like=x) + first
    good = np.isfinite(pos)
    return np.where(good[..., None], x, np.nan), np.where(good, pos, 0.0)


def _pairs(half, interleaved):
    """First and second channel of every pair, as slices."""
    end = 2 * half
    return (slice(0, end, 2), slice(1, end, 2)) if interleaved else (slice(half), slice(half, end))


def turn_forward(x, cos, sin, interleaved):
    """Turn each pair of the first R channels: shapes (..., T, D), (..., T, R/2) -> (..., T, D).

    Parameters
    ----------
    x : ndarray, shape (..., T, D)
        Queries or keys.
    cos, sin : ndarray, shape (..., T, R/2)
        Of the angles, times mu.
    interleaved : bool
        Pairs (0, 1), (2, 3), ... instead of (i, i + R/2).

    Returns
    -------
    ndarray, shape (..., T, D)
    """
    half = cos.shape[-1]
    first, second = _pairs(half, interleaved)
    x1, x2, rest = x[..., first], x[..., second], x[..., 2 * half :]
    y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    y = np.stack([y1, y2], axis=-1 if interleaved else -2)
    return np.concatenate([np.reshape(y, (*y1.shape[:-1], 2 * half)), rest], axis=-1)


def turn_backward(dy, y, turn, omega, interleaved):
    """dx: turned back, by -a; dpos: sum over the pairs of omega (dy2 y1 - dy1 y2).

    Parameters
    ----------
    dy, y : ndarray, shape (..., T, D)
        Gradient of the turned array, and that array.
    turn : tuple
        cos and sin.
    omega : ndarray, shape (R/2,)
        Frequencies.
    interleaved : bool
        Which channels are pairs.

    Returns
    -------
    dx : ndarray, shape (..., T, D)
    dpos : ndarray, shape (..., T)
    """
    cos, sin = turn
    first, second = _pairs(cos.shape[-1], interleaved)
    da = dy[..., second] * y[..., first] - dy[..., first] * y[..., second]
    return turn_forward(dy, cos, -sin, interleaved), np.sum(da * omega, axis=-1)


def _check(q, k, v, pos_q, pos_k, lead, R, how):
    """The checks of what rotary positions add; the width R."""
    n = core.check.shapes(q=(q, "... T D"), k=(k, "... S D"), v=(v, "... S E"),
                          pos_q=(pos_q, "... T"), pos_k=(pos_k, "... S"))  # fmt: skip
    if n["..."] != lead:
        words = f"pos_q or pos_k has leading axes {n['...']}, expected {lead} as in q, k, v"
        raise core.errors.ShapeError(words)
    R = n["D"] if R is None else R
    core.check.count("R", R, low=2, high=n["D"], unit="channels")
    core.check.option("scaling", how["scaling"], (None, "linear", "ntk", "yarn"))
    for name, low in (("base", 1), ("L", 0), ("beta_fast", 0), ("beta_slow", 0)):
        core.check.number(name, how[name], low=low, open_low=True)
    core.check.number("s", how["s"], low=1)
    if R % 2 or (how["scaling"] == "ntk" and R == 2):
        raise core.errors.ParameterError(f"R is {R}, expected an even number, for 'ntk' above 2")
    if how["scaling"] == "yarn" and how["L"] is None:
        raise core.errors.ParameterError("L is None, expected the length of training for 'yarn'")
    return int(R)


def rotary_forward(
    q, k, v, pos_q=None, pos_k=None, *, base=10000.0, R=None, interleaved=False, scaling=None,
    s=1.0, L=None, beta_fast=32.0, beta_slow=1.0, truncate=True, mask=None, causal=False,
    align="lower_right", scale=None, softcap=None, bias=None, empty_row="zero",
):  # fmt: skip
    """Mix the values with softmax weights of turned queries and keys.

    Parameters
    ----------
    q : ndarray, shape (..., T, D)
        Queries.
    k : ndarray, shape (..., S, D)
        Keys.
    v : ndarray, shape (..., S, E)
        Values; they are not turned.
    pos_q, pos_k : ndarray, shapes (..., T) and (..., S), optional
        Positions, real numbers, in the dtype of q. By default the places 0 ... S - 1 of the keys,
        and of the queries as ``align`` says; leading axes broadcast with those of q and k.
    base : float, > 1
        Ratio between the fastest frequency, 1, and the one that would come after the slowest.
    R : int, even, channels, optional
        Channels that are turned; D by default. The others pass.
    interleaved : bool
        Pairs are the channels (2i, 2i + 1) instead of (i, i + R/2).
    scaling : {None, "linear", "ntk", "yarn"}
        How to reach s times the length of training.
    s : float, >= 1, dimensionless
        The factor of extension.
    L : float, positions, optional
        Length of training; "yarn" needs it.
    beta_fast, beta_slow : float, turns
        "yarn": pairs with more than beta_fast turns within L stay, those with less than beta_slow
        are divided by s.
    truncate : bool
        "yarn": round the ends of the ramp outwards to whole pairs.
    mask : bool ndarray, broadcast to (..., T, S), optional
        True = may attend.
    causal : bool
        Hide the keys behind each query, by place in the arrays, whatever the positions.
    align : {"lower_right", "upper_left"}
        Where the causal diagonal and equal default positions lie when T != S.
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
        For the backward; holds ``p``, ``lse``, and q and k as turned.

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
    The paper and DeepSeek pair neighbours, most codes pair halves; weights trained with one need a
    permutation of channels for the other. transformers and the official code of YaRN round the
    ramp (``truncate``), gpt-oss does not. YaRN puts mu into cos and sin, so scores grow by its
    square; DeepSeek puts the square into the scale. All of them bound the end of the ramp by
    R - 1, although there are only R/2 pairs. A position that is not finite counts as a key (or
    query) that is not finite. In float32 fast angles at position 10^6 are off by up to 0.06
    radians, in float64 by 10^-10.

    Source
    ------
    scores/rotary in the catalog; equation (34) of RoFormer, official code of YaRN; grade A.

    References
    ----------
    Su et al. 2021, RoFormer. Chen et al. 2023, Extending Context Window of Large Language Models
    via Positional Interpolation. Peng et al. 2023, YaRN.

    Examples
    --------
    >>> import numpy as np
    >>> q, k = np.array([[2 * np.log(3.0), 0.0]]), np.array([[1.0, 0.0], [1.0, 0.0]])
    >>> v, pos_k = np.array([[0.0], [4.0]]), np.array([np.pi / 2, np.pi / 3])
    >>> out, cache = rotary_forward(q, k, v, np.zeros(1), pos_k, scale=1.0)
    >>> out.round(12).tolist(), cache.p.round(12).tolist()
    ([[3.0]], [[0.25, 0.75]])
    """
    n = core.check.attention(q, k, v, mask=mask, bias=bias, align=align, scale=scale,
                             softcap=softcap, empty_row=empty_row)  # fmt: skip
    how = {"base": base, "scaling": scaling, "s": s, "L": L, "beta_fast": beta_fast,
           "beta_slow": beta_slow, "truncate": truncate}  # fmt: skip
    R = _check(q, k, v, pos_q, pos_k, n["..."], R, how)
    given = {"q": q, "k": k, "pos_q": pos_q, "pos_k": pos_k, "bias": bias}
    shapes = {name: a.shape for name, a in given.items() if a is not None}
    scale = core.default_scale(n["D"], scale)
    live = core.visible(q, k, mask=mask, causal=causal, align=align, empty_row=empty_row)
    q, pos_q = place_forward(q, pos_q, n["S"] - n["T"] if align == "lower_right" else 0)
    k, pos_k = place_forward(k, pos_k, 0)
    q, k, v, poison = core.quarantine(q, k, v, live, empty_row)

    omega, mu = rotary_frequencies(R, **how)
    omega = np.concatenate([np.full_like(q, w, shape=(1,)) for w in omega])
    a_q, a_k = pos_q[..., None] * omega, pos_k[..., None] * omega  # (1)
    turns = tuple((np.cos(a) * mu, np.sin(a) * mu) for a in (a_q, a_k))
    q, k = (turn_forward(x, *a, interleaved) for x, a in zip((q, k), turns, strict=True))  # (2)
    z = capped = core.softcap_forward(core.scores_forward(q, k, scale), softcap)  # (3)
    if bias is not None:
        clean, poison = core.quarantine_bias(bias, live, poison)
        z = z + clean
    p, lse = core.softmax_forward(z, live, empty_row)  # (4)
    out = core.mix_forward(p, v)  # (5)

    out = np.where(poison, np.nan, out)
    lse = np.where(poison[..., 0], np.nan, lse)
    options = (interleaved, scale, softcap)
    return out, Cache(q, k, v, turns, omega, capped, p, lse, live, poison, options, shapes)


def rotary_backward(dout, cache):
    """Gradients of :func:`rotary_forward`, its steps read from the bottom up.

    Parameters
    ----------
    dout : ndarray, shape (..., T, E)
        Gradient of the output.
    cache : Cache
        From the forward.

    Returns
    -------
    dict
        Under "q", "k", "v" and, when given, "pos_q", "pos_k" and "bias".
    """
    q, k, v, turns, omega, capped, p, _, live, poison, options, shapes = cache
    interleaved, scale, softcap = options
    lead = np.broadcast_shapes(p.shape[:-2], v.shape[:-2])
    core.check.cotangent(dout, (*lead, p.shape[-2], v.shape[-1]))
    dout = np.where(poison, 0.0, dout)

    dp, dv = core.mix_backward(dout, p, v)  # (5')
    dz = dbias = core.softmax_backward(dp, p, live)  # (4')
    dz = core.softcap_backward(dz, capped, softcap)  # (3')
    dq, dk = core.scores_backward(dz, q, k, scale)
    dq, dpos_q = turn_backward(dq, q, turns[0], omega, interleaved)  # (2') (1')
    dk, dpos_k = turn_backward(dk, k, turns[1], omega, interleaved)

    found = {"q": dq, "k": dk, "pos_q": dpos_q, "pos_k": dpos_k, "bias": dbias}
    return {"v": dv} | {name: core.sum_to(found[name], shape) for name, shape in shapes.items()}


def rotary_numba(
    q, k, v, pos_q=None, pos_k=None, *, base=10000.0, R=None, interleaved=False, scaling=None,
    s=1.0, L=None, beta_fast=32.0, beta_slow=1.0, truncate=True, align="lower_right", **options,
):  # fmt: skip
    """The same call: queries and keys are turned here, the compiled dense pattern does the rest.

    Parameters
    ----------
    q, k, v, pos_q, pos_k, base, R, interleaved, scaling, s, L, beta_fast, beta_slow
        As in :func:`rotary_forward`.
    truncate, align, **options
        As in :func:`rotary_forward`.

    Returns
    -------
    out : ndarray, shape (..., T, E)
        Outputs.
    cache : tuple
        For :func:`rotary_numba_backward`.
    """
    from attention_ref.kernels.numba import decode

    n = core.check.shapes(q=(q, "... T D"), k=(k, "... S D"), v=(v, "... S E"))
    core.check.option("align", align, core.check.ALIGNMENTS)
    how = {"base": base, "scaling": scaling, "s": s, "L": L, "beta_fast": beta_fast,
           "beta_slow": beta_slow, "truncate": truncate}  # fmt: skip
    R = _check(q, k, v, pos_q, pos_k, n["..."], R, how)
    given = {"q": q, "k": k, "v": v, "pos_q": pos_q, "pos_k": pos_k}
    shapes = {name: a.shape for name, a in given.items() if a is not None}
    q, pos_q = place_forward(q, pos_q, n["S"] - n["T"] if align == "lower_right" else 0)
    k, pos_k = place_forward(k, pos_k, 0)
    omega, mu = rotary_frequencies(R, **how)
    omega = np.array(omega, q.dtype)
    angles = pos_q[..., None] * omega, pos_k[..., None] * omega  # (1)
    turns = tuple((np.cos(a) * mu, np.sin(a) * mu) for a in angles)
    with np.errstate(invalid="ignore"):  # the kernel finds the rows that are not finite
        q, k = (turn_forward(x, *a, interleaved) for x, a in zip((q, k), turns, strict=True))  # (2)
    lead = np.broadcast_shapes(k.shape[:-2], v.shape[:-2])  # positions may have widened the keys
    k, v = (np.broadcast_to(x, (*lead, *x.shape[-2:])) for x in (k, v))
    out, cache = decode.best(q, k)(q, k, v, align=align, **options)  # (3) (4) (5)
    return out, (cache, q, k, turns, omega, interleaved, shapes)


def rotary_numba_backward(dout, cache):
    """Gradients of :func:`rotary_numba`.

    Parameters
    ----------
    dout, cache
        As in :func:`rotary_backward`.

    Returns
    -------
    dict
        As there.
    """
    from attention_ref.kernels.numba import dense

    cache, q, k, turns, omega, interleaved, shapes = cache
    found = dense.backward(dout, cache)  # (5') (4') (3')
    for name, x, turn in (("q", q, turns[0]), ("k", k, turns[1])):
        x = np.where(np.isfinite(x).all(axis=-1, keepdims=True), x, 0.0)
        dx, dpos = turn_backward(found[name], x, turn, omega, interleaved)  # (2') (1')
        found |= {name: dx, f"pos_{name}": dpos}
    own = {name: core.sum_to(found[name], shape) for name, shape in shapes.items()}
    return {name: dx for name, dx in found.items() if not name.startswith("pos")} | own


YARN = {"scaling": "yarn", "s": 4.0, "L": 200.0, "base": 100.0}
"""With R = 6 the three frequencies stand at 0, 1/3 and 2/3 of the ramp."""
LOOSE = YARN | {"truncate": False, "beta_fast": 16.0, "beta_slow": 1.5}
NTK = {"scaling": "ntk", "s": 3.0, "base": 30.0}
WAYS = {
    "plain": {"align": "upper_left"}, "long-queries": LOOSE, "batch": LOOSE, "packed": YARN,
    "no-heads": YARN | {"interleaved": True}, "causal": {"base": 50.0}, "mask": NTK,
    "causal-upper-left": {"interleaved": True, "R": 4}, "softcap": NTK,
    "bias": {"scaling": "linear", "s": 2.5, "R": 2},
}  # fmt: skip
"""Case -> options. Positions are given where order must not count, none where it is causal."""


def _example(rng):
    cases = core.examples.attention(rng, D=6)
    cases = {name: cases[name] | options for name, options in WAYS.items()}
    for name, kwargs in cases.items():
        if "causal" not in name:
            kwargs["pos_k"] = rng.uniform(0.0, 7.0, kwargs["k"].shape[-2])
        if name in ("long-queries", "batch", "no-heads", "mask", "packed"):
            kwargs["pos_q"] = rng.uniform(0.0, 7.0, kwargs["q"].shape[-2])
    return cases


def _one_place(rng):
    """All at one position: everything turns alike, and only mu is left."""
    kwargs = _example(rng)["packed"]
    return kwargs | {n: np.full_like(kwargs[n], 3.7) for n in ("pos_q", "pos_k")}


def _scaled(kwargs):
    rest = {n: kwargs[n] for n in ("q", "k", "v", "mask")}
    return rest | {"scale": kwargs["scale"] * (0.1 * math.log(4.0) + 1.0) ** 2}


SPEC = core.Mechanism(
    key="scores/rotary", forward=rotary_forward, backward=rotary_backward, example=_example,
    numba=core.Backend(rotary_numba, rotary_numba_backward),
    flags=frozenset(core.SOFTMAX_FLAGS) - {"shift_invariant"}, tokens={"pos_k": -1},
    opt_out={"query_order": "positions of queries must move with them; own test"},
    reduces_to=(core.Reduction("scores/dot_product", "one position", _one_place, _scaled),),
    claim="A rotary score fitted on a range of positions can explode beyond it and stays bounded "
    "between the positions of the fit: interpolate, do not extrapolate.",
    verified_by=("slow loop", "PyTorch", "complex multiplication"),
)  # fmt: skip
