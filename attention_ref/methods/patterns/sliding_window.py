r"""Sliding window: a query sees the keys near it, at every d-th place, and a few global tokens.

.. math::

    \mathcal{N}(t) &= \{s : -l \le s - \tau_t \le r,\ d \mid s - \tau_t\}
        \cup \{s : s \text{ or } \tau_t \text{ is global}\}                &(1)\\
    z_{ts} &= c\, q_t \cdot k_s                                            &(2)\\
    z_{ts} &\leftarrow \kappa \tanh(z_{ts} / \kappa) + b_{ts}              &(3)\\
    p_{ts} &= e^{z_{ts}} / \textstyle\sum_{s' \in \mathcal{N}(t)} e^{z_{ts'}}  &(4)\\
    o_t    &= \textstyle\sum_{s \in \mathcal{N}(t)} p_{ts}\, v_s           &(5)

Here tau_t = t + S - T is the place of query t among the keys (t itself under "upper_left"). The
rows of global queries may have projections of their own, qg, kg, vg. The work grows with the size
of the window instead of the length; L layers of a causal window of W see L (W - 1) + 1 tokens.

Source: Child et al. 2019; Beltagy et al. 2020, Longformer, section 3; official file read:
longformer/longformer.py; grade A.
"""

from typing import NamedTuple

import numpy as np

from attention_ref import core


class Row(NamedTuple):
    """One softmax over the window, as the backward needs it."""

    q: np.ndarray  # (..., T, D), rows with NaN or infinity replaced by zeros
    k: np.ndarray  # (..., S, D), likewise
    v: np.ndarray  # (..., S, E), likewise
    capped: np.ndarray  # (..., T, S), scores after the softcap
    p: np.ndarray  # (..., T, S), weights
    live: np.ndarray  # (..., T, S), who sees whom
    poison: np.ndarray  # (..., T, 1), rows that are NaN


class Cache(NamedTuple):
    """What the backward needs; ``p`` for those who compare."""

    near: Row  # with q, k, v; every row when there are no projections of their own
    far: Row | None  # with qg, kg, vg: the rows of global queries
    ours: np.ndarray  # (..., T, 1), True = the row comes from ``far``
    p: np.ndarray  # (..., T, S), weights
    own: dict  # "q", "k", "v" -> name of the argument used for global queries
    scale: float
    softcap: float | None
    bias_shape: tuple | None


def _window(q, k, left, right, dilation, global_tokens, align):
    """Who is in whose neighbourhood, whatever mask and causal say: step (1).

    Parameters
    ----------
    q, k : ndarray, shapes (..., T, D), (..., S, D)
        Only their lengths and the kind of array count.
    left, right, dilation, global_tokens, align
        As in :func:`sliding_window_forward`.

    Returns
    -------
    near : bool ndarray, shape (T, S) or (..., T, S)
        True = in the window, or one of the two is global.
    chosen : bool ndarray, shape (T, 1) or (..., T, 1)
        True = the query is a global token.
    """
    queries, keys = q.shape[-2], k.shape[-2]
    t, s = np.arange(queries, like=q)[:, None], np.arange(keys, like=q)
    place = t + (keys - queries if align == "lower_right" else 0)
    near = (s - place) % dilation == 0
    near = near if left is None else near & (s - place >= -left)
    near = near if right is None else near & (s - place <= right)
    if global_tokens is None:
        return near, np.zeros_like(near, shape=(queries, 1))
    if np.dtype(global_tokens.dtype).kind != "b":
        global_tokens = np.any(s == global_tokens[..., None], axis=-2)
    chosen = np.any((s == place) & global_tokens[..., None, :], axis=-1, keepdims=True)
    return near | chosen | global_tokens[..., None, :], chosen


def _row_forward(q, k, v, live, scale, softcap, bias, empty_row):
    """Softmax attention over ``live``; returns the output, NaN where poisoned, and a Row."""
    q, k, v, poison = core.quarantine(q, k, v, live, empty_row)
    z = capped = core.softcap_forward(core.scores_forward(q, k, scale), softcap)
    if bias is not None:
        clean, poison = core.quarantine_bias(bias, live, poison)
        z = z + clean
    p, _ = core.softmax_forward(z, live, empty_row)
    out = np.where(poison, np.nan, core.mix_forward(p, v))
    return out, Row(q, k, v, capped, p, live, poison)


def _row_backward(dout, row, scale, softcap):
    """dq, dk, dv and the gradient of the bias, which is that of the scores before the softcap."""
    dp, dv = core.mix_backward(np.where(row.poison, 0.0, dout), row.p, row.v)
    dbias = core.softmax_backward(dp, row.p, row.live)
    dz = core.softcap_backward(dbias, row.capped, softcap)
    return *core.scores_backward(dz, row.q, row.k, scale), dv, dbias


def _door(q, k, v, qg, kg, vg, left, right, dilation, global_tokens, **options):
    """Everything that can be wrong with the arguments."""
    n = core.check.attention(q, k, v, **options)
    a, b, c = "... T D", "... S D", "... S E"
    core.check.shapes(q=(q, a), k=(k, b), v=(v, c), qg=(qg, a), kg=(kg, b), vg=(vg, c))
    for name, value, low in (("left", left, 0), ("right", right, 0), ("dilation", dilation, 1)):
        core.check.count(name, value, low=low, unit="tokens")
    if global_tokens is None:
        return
    core.check.kind("global_tokens", global_tokens)
    if np.dtype(global_tokens.dtype).kind != "b":
        core.check.integer("global_tokens", global_tokens, 0, n["S"])
    else:
        core.check.check_mask(global_tokens, (*n["..."], n["S"]), "global_tokens", "(..., S)")
    core.check.count("global_tokens.ndim", global_tokens.ndim, low=1)


def sliding_window_forward(
    q, k, v, qg=None, kg=None, vg=None, *, left=None, right=None, dilation=1, global_tokens=None,
    mask=None, causal=False, align="lower_right", scale=None, softcap=None, bias=None,
    empty_row="zero",
):  # fmt: skip
    """Softmax attention of every query over the keys of its neighbourhood.

    Parameters
    ----------
    q : ndarray, shape (..., T, D)
        Queries.
    k : ndarray, shape (..., S, D)
        Keys.
    v : ndarray, shape (..., S, E)
        Values.
    qg, kg, vg : ndarray, shapes of q, k, v, optional
        Queries, keys and values for the rows of global queries; each is q, k, v by default.
    left, right : int, tokens, optional
        How far a query sees to either side, its own place not counted: a causal window of W keys
        is left = W - 1, right = 0. None is without bound.
    dilation : int, >= 1, tokens
        Only keys at multiples of this distance are seen; ``left`` and ``right`` stay in tokens.
    global_tokens : bool ndarray, shape (..., S), or int ndarray, shape (..., N), optional
        Keys that every query sees; the queries at these places see every key.
    mask : bool ndarray, broadcast to (..., T, S), optional
        True = may attend; it hides global tokens too.
    causal : bool
        Hide the keys behind each query, global tokens included (right = 0 leaves those visible).
    align : {"lower_right", "upper_left"}
        Where query t stands among the keys: at t + S - T, or at t.
    scale : float, dimensionless, optional
        The factor c; 1/sqrt(D) by default.
    softcap : float, > 0, nats, optional
        Bound on the scores before the bias.
    bias : ndarray, broadcast to (..., T, S), nats, optional
        Added to the scores after the softcap.
    empty_row : {"zero", "nan", "uniform", "raise"}
        Output of a query that may see no key.

    Returns
    -------
    out : ndarray, shape (..., T, E)
        Outputs.
    cache : Cache
        For the backward; holds ``p`` and, in ``near``, ``live``: the pairs in use.

    Raises
    ------
    ShapeError
        When widths, lengths or leading axes do not fit.
    DTypeError
        When an argument is no float32 or float64 array, the mask is not boolean, or global_tokens
        are neither boolean nor integers.
    ParameterError
        When an option or a number is outside its domain, or a row is empty under "raise".
    MemoryLimitError
        When the scores would take more than 2 GiB.

    Notes
    -----
    This reference fills the whole table of scores. At the borders the window is cut, not moved.
    Windows are counted in many ways: FlashAttention's ``window_size`` is (left, right); Mistral
    and gpt-oss keep W keys with the own one, left = W - 1; Longformer's code takes the number of
    places on each side, so with dilation d its w is left = right = w d here.

    Source
    ------
    patterns/sliding_window in the catalog; longformer/longformer.py; grade A.

    References
    ----------
    Child et al. 2019, Generating Long Sequences with Sparse Transformers.
    Beltagy et al. 2020, Longformer: The Long-Document Transformer.

    Examples
    --------
    Equal scores: the mean of the own value and the one before.

    >>> import numpy as np
    >>> x, v = np.zeros((3, 1)), np.array([[0.0], [2.0], [6.0]])
    >>> sliding_window_forward(x, x, v, left=1, right=0)[0].tolist()
    [[0.0], [1.0], [4.0]]
    """
    _door(
        q, k, v, qg, kg, vg, left, right, dilation, global_tokens, mask=mask, bias=bias,
        align=align, scale=scale, softcap=softcap, empty_row=empty_row,
    )  # fmt: skip
    scale = core.default_scale(q.shape[-1], scale)
    near, ours = _window(q, k, left, right, dilation, global_tokens, align)  # (1)
    mask = near if mask is None else near & mask
    live = core.visible(q, k, mask=mask, causal=causal, align=align, empty_row=empty_row)
    given = {"qg": qg, "kg": kg, "vg": vg}
    own = {name[0]: name[0] if x is None else name for name, x in given.items()}

    rest = (live, scale, softcap, bias, empty_row)
    out, near = _row_forward(q, k, v, *rest)  # (2) (3) (4) (5)
    p, far = near.p, None
    if any(x is not None for x in given.values()):
        qg, kg, vg = q if qg is None else qg, k if kg is None else kg, v if vg is None else vg
        others, far = _row_forward(qg, kg, vg, *rest)
        out, p = np.where(ours, others, out), np.where(ours, far.p, p)
    return out, Cache(near, far, ours, p, own, scale, softcap, bias if bias is None else bias.shape)


def sliding_window_backward(dout, cache):
    """Gradients of :func:`sliding_window_forward`, its steps read from the bottom up.

    Parameters
    ----------
    dout : ndarray, shape (..., T, E)
        Gradient of the output.
    cache : Cache
        From the forward.

    Returns
    -------
    dict
        Under "q", "k", "v" and, where given, "qg", "kg", "vg", "bias".
    """
    near, far, ours, _, own, scale, softcap, bias_shape = cache
    rows = np.broadcast_shapes(ours.shape, near.poison.shape, (far or near).poison.shape)[:-1]
    core.check.cotangent(dout, (*rows, near.v.shape[-1]))
    share = dout if far is None else np.where(ours, 0.0, dout)
    *parts, dbias = _row_backward(share, near, scale, softcap)  # (5') (4') (3') (2')
    gradients = dict(zip("qkv", parts, strict=True))  # (1'): the window is made of whole numbers
    if far is not None:
        *parts, more = _row_backward(np.where(ours, dout, 0.0), far, scale, softcap)
        dbias = dbias + more
        for letter, dx in zip("qkv", parts, strict=True):
            name = own[letter]
            gradients |= {name: gradients[name] + dx if name in gradients else dx}
    return gradients if bias_shape is None else gradients | {"bias": core.sum_to(dbias, bias_shape)}


def sliding_window_numba(
    q, k, v, qg=None, kg=None, vg=None, *, left=None, right=None, dilation=1, global_tokens=None,
    align="lower_right", **options,
):  # fmt: skip
    """The same call by the compiled window, whose work grows with the window.

    Global tokens see and are seen from everywhere; with them the dense kernel runs under a mask.

    Parameters
    ----------
    q, k, v, qg, kg, vg, left, right, dilation, global_tokens, align, **options
        As in :func:`sliding_window_forward`.

    Returns
    -------
    out, cache
        As there; the cache holds ``lse`` and no weights.
    """
    from attention_ref.kernels.numba import dense, window

    near = {"left": left, "right": right, "dilation": dilation, "align": align}
    given = {"qg": qg, "kg": kg, "vg": vg}
    if global_tokens is None:
        return window.forward(q, k, v, **near, **options)
    _door(q, k, v, qg, kg, vg, left, right, dilation, global_tokens, align=align)
    seen, ours = _window(q, k, left, right, dilation, global_tokens, align)
    mask = options.pop("mask", None)
    options |= {"mask": seen if mask is None else seen & mask, "align": align}
    out, cache = dense.forward(q, k, v, **options)
    if all(x is None for x in given.values()):
        return out, (cache, None, None, None)
    own = {name[0]: name[0] if x is None else name for name, x in given.items()}
    qg, kg, vg = q if qg is None else qg, k if kg is None else kg, v if vg is None else vg
    others, far = dense.forward(qg, kg, vg, **options)
    return np.where(ours, others, out), (cache, far, ours, own)


def sliding_window_numba_backward(dout, cache):
    """Gradients of :func:`sliding_window_numba`.

    Parameters
    ----------
    dout, cache
        As in :func:`sliding_window_backward`.

    Returns
    -------
    dict
        As there.
    """
    from attention_ref.kernels.numba import dense, window

    if isinstance(cache, window.Cache):
        return window.backward(dout, cache)
    near, far, ours, own = cache
    if far is None:
        return dense.backward(dout, near)
    gradients = dense.backward(np.where(ours, dout.dtype.type(0), dout), near)
    for letter, dx in dense.backward(np.where(ours, dout, dout.dtype.type(0)), far).items():
        name = own.get(letter, letter)
        gradients |= {name: gradients[name] + dx if name in gradients else dx}
    return gradients


def _example(rng):
    cases = core.examples.attention(rng)
    cases["global-projections"] = core.examples.qkv(rng, lead=(), T=5, S=7) | {
        "qg": rng.standard_normal((5, 4)), "kg": rng.standard_normal((7, 4)),
        "vg": rng.standard_normal((7, 3)), "bias": rng.standard_normal((5, 7)),
        "softcap": 1.7, "scale": core.examples.DEFAULT_SCALE,
    }  # fmt: skip
    windows = {
        "plain": (2, 1), "long-queries": (1, 2), "batch": (4, 0, 2), "no-heads": (4, 3, 2),
        "causal": (2, None, 1, np.array([0])), "causal-upper-left": (1, None), "mask": (2, 2),
        "causal-long-queries": (3, 2), "packed": (2, 1), "bias": (1, 1, 1, np.arange(6) == 2),
        "softcap": (2, 1, 1, np.array([3])), "global-projections": (2, 1, 1, np.array([3, 0])),
    }  # fmt: skip
    for name, values in windows.items():
        kwargs = cases[name]
        kwargs |= dict(zip(("left", "right", "dilation", "global_tokens"), values, strict=False))
        if name in ("mask", "softcap"):  # no row is emptied by the window alone
            t, s = np.ogrid[: kwargs["q"].shape[-2], : kwargs["k"].shape[-2]]
            seen = np.any(kwargs["mask"], axis=-1, keepdims=True)
            kwargs["mask"] = kwargs["mask"] | ((s == t + s.size - t.size) & seen)
    return cases


def _visible(kwargs):
    given = {"left": None, "right": None, "dilation": 1, "global_tokens": None, "mask": None,
             "causal": False, "align": "lower_right"} | kwargs  # fmt: skip
    names = ("q", "k", "left", "right", "dilation", "global_tokens", "align")
    near, chosen = _window(*(given[n] for n in names))
    seen = near & core.visible(**{n: given[n] for n in ("q", "k", "mask", "causal", "align")})
    return seen & ~chosen if "kg" in kwargs else seen  # global queries see kg and vg instead


def _by_hand(mine):
    t, s = np.ogrid[2:7, :7]
    near = (s - t >= -4) & (s - t <= 3) & ((s - t) % 2 == 0)
    mask = near | np.isin(s, (1, 4)) | np.isin(t, (1, 4))
    return {name: mine[name] for name in "qkv"} | {"mask": mask}


SPEC = core.Mechanism(
    key="patterns/sliding_window", example=_example,
    forward=sliding_window_forward, backward=sliding_window_backward,
    numba=core.Backend(sliding_window_numba, sliding_window_numba_backward),
    flags=frozenset({"attention", "causal", "masked", "shift_invariant", "positional"}),
    tokens={"kg": -2, "vg": -2}, visible=_visible, reduces_to=(
        core.Reduction(
            "scores/dot_product", "a window as wide as the sequence",
            lambda rng: _example(rng)["causal-upper-left"] | {"left": 6, "right": 6},
            lambda mine: {n: a for n, a in mine.items() if n not in ("left", "right")},
        ),
        core.Reduction(
            "scores/dot_product", "the neighbourhood as a mask",
            lambda rng: _example(rng)["no-heads"] | {"global_tokens": np.array([1, 4])}, _by_hand,
        ),
    ),
    verified_by=("slow loop", "PyTorch"),
    claim="L layers of a causal window of W keys see exactly L (W - 1) + 1 tokens.",
)  # fmt: skip
