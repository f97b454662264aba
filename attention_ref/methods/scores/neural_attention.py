r"""Neural attention: a small network with two hidden layers scores each query and key.

.. math::

    a_t    &= q_t P_q\, W_1^{\text{top}}, \qquad
    h_s = k_s P_k\, W_1^{\text{bottom}} + b_1                                             &(1)\\
    u_{ts} &= \max(a_t + h_s,\, 0)                                                        &(2)\\
    g_{ts} &= \max(u_{ts} W_2 + b_2,\, 0)                                                 &(3)\\
    z_{ts} &= \kappa \tanh(g_{ts} \cdot w_3 / \kappa) + \text{bias}_{ts}                  &(4)\\
    p_{ts} &= e^{z_{ts}} / \textstyle\sum_{s'} e^{z_{ts'}}                                &(5)\\
    o_t    &= \textstyle\sum_s p_{ts}\, v_s                                               &(6)

The network reads the reduced pair [q P_q; k P_k]; cutting :math:`W_1` in two spares
building it. With enough units the score comes near any continuous function of that pair, where the
dot product is bilinear; the price is :math:`M + N` numbers for every pair. There is no scale.

Source: DiGiugno and Mahmood 2025; the official code Models/NeuralAttention.py was read; grade A.
"""

from typing import NamedTuple

import numpy as np

from attention_ref import core

NETWORK = ("Pq", "Pk", "W1", "W2", "w3", "b1", "b2")


class Cache(NamedTuple):
    """What the backward needs, and what implementers compare with (``p``, ``lse``)."""

    q: np.ndarray  # (..., T, D), rows with NaN or infinity replaced by zeros
    k: np.ndarray  # (..., S, Dk), likewise
    v: np.ndarray  # (..., S, E), likewise
    given: dict  # the network's parameters by name, without those that are None
    low_q: np.ndarray  # (..., T, R), reduced queries
    low_k: np.ndarray  # (..., S, R), reduced keys
    x: np.ndarray  # (..., T, S, M), first hidden layer before its relu
    y: np.ndarray  # (..., T, S, N), second hidden layer before its relu
    capped: np.ndarray  # (..., T, S), scores after the softcap, before bias and mask
    p: np.ndarray  # (..., T, S), weights
    lse: np.ndarray  # (..., T), log of the sum of exponentials, nats; -inf for an empty row
    live: np.ndarray  # (..., T, S), True = may attend
    poison: np.ndarray  # (..., T, 1), rows that are NaN
    softcap: float | None
    bias_shape: tuple | None


def network_forward(q, k, given):
    """Steps (1) to (3): both hidden layers for every pair, before their relu.

    Parameters
    ----------
    q, k : ndarray, shapes (..., T, D), (..., S, Dk)
        Queries and keys.
    given : dict
        "Pq", "Pk", "W1", "W2" and, where there are any, "b1", "b2".

    Returns
    -------
    low_q, low_k : ndarray, shapes (..., T, R), (..., S, R)
        Reduced queries and keys.
    x, y : ndarray, shapes (..., T, S, M), (..., T, S, N)
        Hidden layers.
    """
    W1, R = given["W1"], given["Pq"].shape[-1]
    low_q, low_k = q @ given["Pq"], k @ given["Pk"]
    a, h = low_q @ W1[..., :R, :], low_k @ W1[..., R:, :]
    if "b1" in given:
        h = h + given["b1"][..., None, :]  # (1)
    x = a[..., :, None, :] + h[..., None, :, :]
    y = core.relu(x) @ given["W2"][..., None, :, :]  # (2)
    if "b2" in given:
        y = y + given["b2"][..., None, None, :]
    return low_q, low_k, x, y


def network_backward(dg, q, k, low_q, low_k, x, y, given):
    """Steps (3') to (1'): through each kink, then each sum to its side.

    Parameters
    ----------
    dg : ndarray, shape (..., T, S, N)
        Gradient of g = relu(y).
    q, k, low_q, low_k, x, y, given
        From the forward.

    Returns
    -------
    dict
        Under "q", "k" and the names of the parameters in ``given``, not yet summed to shape.
    """
    W1, R = given["W1"], low_q.shape[-1]
    dy = np.where(y > 0, dg, 0.0)  # (3')
    du = dy @ np.swapaxes(given["W2"], -1, -2)[..., None, :, :]
    dx = np.where(x > 0, du, 0.0)  # (2')
    da, dh = np.sum(dx, axis=-2), np.sum(dx, axis=-3)  # (1')
    dq = da @ np.swapaxes(W1[..., :R, :], -1, -2)
    dk = dh @ np.swapaxes(W1[..., R:, :], -1, -2)
    top, bottom = np.swapaxes(low_q, -1, -2) @ da, np.swapaxes(low_k, -1, -2) @ dh
    grads = {
        "q": dq @ np.swapaxes(given["Pq"], -1, -2), "Pq": np.swapaxes(q, -1, -2) @ dq,
        "k": dk @ np.swapaxes(given["Pk"], -1, -2), "Pk": np.swapaxes(k, -1, -2) @ dk,
        "W1": np.concatenate([top, bottom], axis=-2), "b1": np.sum(dh, axis=-2),
        "W2": np.sum(np.swapaxes(core.relu(x), -1, -2) @ dy, axis=-3),
        "b2": np.sum(dy, axis=(-3, -2)),
    }  # fmt: skip
    return {name: g for name, g in grads.items() if name in given or name in "qk"}


def _check(q, k, v, given, mask, bias, align, softcap, empty_row):
    """The checks at the door."""
    axes = ("... D R", "... Dk R", "... R2 M", "... M N", "... N", "... M", "... N")
    named = {name: (given.get(name), words) for name, words in zip(NETWORK, axes, strict=True)}
    n = core.check.shapes(q=(q, "... T D"), k=(k, "... S Dk"), v=(v, "... S E"), **named)
    if n["R2"] != 2 * n["R"]:
        raise core.errors.ShapeError(
            f"W1 has {n['R2']} rows, expected {2 * n['R']}, twice the columns of Pq: "
            "the reduced query above, the reduced key below"
        )
    full = (*n["..."], n["T"], n["S"])
    core.check.check_mask(mask, full)
    core.check.check_bias(bias, full)
    core.check.option("align", align, core.check.ALIGNMENTS)
    core.check.option("empty_row", empty_row, core.check.EMPTY_ROWS)
    core.check.number("softcap", softcap, low=0, open_low=True)
    hint = "a slice of the queries at a time"
    core.check.memory((*full, n["M"] + n["N"]), q.dtype, "the hidden units", hint)


def neural_attention_forward(
    q, k, v, Pq, Pk, W1, W2, w3, b1=None, b2=None, *, mask=None, causal=False,
    align="lower_right", softcap=None, bias=None, empty_row="zero",
):  # fmt: skip
    """Mix the values with softmax weights of the scores of a two-layer network.

    Parameters
    ----------
    q : ndarray, shape (..., T, D)
        Queries.
    k : ndarray, shape (..., S, Dk)
        Keys.
    v : ndarray, shape (..., S, E)
        Values.
    Pq : ndarray, shape (..., D, R)
        Reduction of the queries; leading axes of all parameters broadcast, one network a head.
    Pk : ndarray, shape (..., Dk, R)
        Reduction of the keys.
    W1 : ndarray, shape (..., 2 R, M)
        First layer; the reduced query above, the reduced key below.
    W2 : ndarray, shape (..., M, N)
        Second layer.
    w3 : ndarray, shape (..., N)
        Read-out.
    b1 : ndarray, shape (..., M), optional
        Bias of the first layer.
    b2 : ndarray, shape (..., N), optional
        Bias of the second layer.
    mask : bool ndarray, broadcast to (..., T, S), optional
        True = may attend.
    causal : bool
        Hide the keys behind each query.
    align : {"lower_right", "upper_left"}
        Where the causal diagonal lies when T != S.
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
        When the hidden units would take more than 2 GiB.

    Notes
    -----
    The official code shares one network among the heads, with R = M and N = M // 2; R is D // 32
    unless it is given, so a head of 64 gets R = 2 and N = 1. Two kinds of biases of the code are
    left out because they add nothing: b3 of the read-out moves all scores of a row, and bq, bk of
    the reductions act as [bq; bk] W1 + b1. Its causal branch replaces a mask of the user; here
    both hold. Its ``scale_factor`` is never used. At a kink of the relu the derivative is 0.

    Source
    ------
    scores/neural_attention in the catalog; the official Models/NeuralAttention.py; grade A.

    References
    ----------
    DiGiugno, Mahmood 2025, Neural Attention.

    Examples
    --------
    >>> import numpy as np
    >>> q, k = np.array([[1.0]]), np.array([[0.0], [2.0], [3.0]])
    >>> v, one = np.array([[0.0], [0.0], [4.0]]), np.ones((1, 1))
    >>> W1 = np.array([[1.0, -1.0], [-1.0, 1.0]])  # relu(q - k) and relu(k - q)
    >>> w3 = np.full(2, -np.log(2.0))  # a score of -ln 2 times the distance
    >>> out, cache = neural_attention_forward(q, k, v, one, one, W1, np.eye(2), w3)
    >>> cache.p.round(12).tolist(), out.round(12).tolist()
    ([[0.4, 0.4, 0.2]], [[0.8]])
    """
    given = dict(zip(NETWORK, (Pq, Pk, W1, W2, w3, b1, b2), strict=True))
    given = {name: x for name, x in given.items() if x is not None}
    _check(q, k, v, given, mask, bias, align, softcap, empty_row)
    live = core.visible(q, k, mask=mask, causal=causal, align=align, empty_row=empty_row)
    q, k, v, poison = core.quarantine(q, k, v, live, empty_row)

    low_q, low_k, x, y = network_forward(q, k, given)  # (1) (2) (3)
    z = np.sum(core.relu(y) * w3[..., None, None, :], axis=-1)  # (4)
    z = capped = core.softcap_forward(z, softcap)
    if bias is not None:
        clean, poison = core.quarantine_bias(bias, live, poison)
        z = z + clean
    p, lse = core.softmax_forward(z, live, empty_row)  # (5)
    out = core.mix_forward(p, v)  # (6)

    out = np.where(poison, np.nan, out)
    lse = np.where(poison[..., 0], np.nan, lse)
    return out, Cache(
        q, k, v, given, low_q, low_k, x, y, capped, p, lse, live, poison, softcap,
        None if bias is None else bias.shape,
    )  # fmt: skip


def neural_attention_backward(dout, cache):
    """Gradients of :func:`neural_attention_forward`, its steps read from the bottom up.

    Parameters
    ----------
    dout : ndarray, shape (..., T, E)
        Gradient of the output.
    cache : Cache
        From the forward.

    Returns
    -------
    dict
        Under "q", "k", "v", "Pq", "Pk", "W1", "W2", "w3" and, when given, "b1", "b2", "bias".
    """
    q, k, v, given, low_q, low_k, x, y, capped, p, _, live, poison, softcap, bias_shape = cache
    lead = np.broadcast_shapes(p.shape[:-2], v.shape[:-2])
    core.check.cotangent(dout, (*lead, p.shape[-2], v.shape[-1]))
    dout = np.where(poison, 0.0, dout)

    dp, dv = core.mix_backward(dout, p, v)  # (6')
    dz = core.softmax_backward(dp, p, live)  # (5')
    gradients = {} if bias_shape is None else {"bias": core.sum_to(dz, bias_shape)}  # (4')
    dz = core.softcap_backward(dz, capped, softcap)[..., None]
    grads = {"w3": np.sum(dz * core.relu(y), axis=(-3, -2))}
    dg = dz * given["w3"][..., None, None, :]
    grads |= network_backward(dg, q, k, low_q, low_k, x, y, given)  # (3') (2') (1')

    shapes = {"q": q.shape, "k": k.shape} | {name: x.shape for name, x in given.items()}
    gradients |= {name: core.sum_to(g, shapes[name]) for name, g in grads.items()}
    return gradients | {"v": dv}


SHAPES = ((4, 2), (4, 2), (4, 3), (3, 2), (2,), (3,), (2,))
CASES = ("plain", "long-queries", "batch", "no-heads", "causal", "mask", "softcap")


def _example(rng):
    """Every relu is on for some pairs and off for others, and, for differences, far from its kink.

    One network for all heads; "batch" has one a head.
    """
    cases = core.examples.attention(rng, scale=False)
    cases = {name: cases[name] for name in CASES}
    for name, kwargs in cases.items():
        _clear(rng, kwargs, (2,) if name == "batch" else ())
    return cases


def _clear(rng, kwargs, lead):
    """Draw a network, then queries anew where a relu is near its kink; at worst start again."""
    for _ in range(1000):
        shapes = zip(NETWORK, SHAPES, strict=True)
        kwargs |= {name: 0.6 * rng.standard_normal(lead + shape) for name, shape in shapes}
        hidden = network_forward(kwargs["q"], kwargs["k"], kwargs)[2:]
        on = np.concatenate([np.mean(a > 0, axis=tuple(range(a.ndim - 1))) for a in hidden])
        if np.all((on > 0.2) & (on < 0.8)):
            break
    for _ in range(200):
        hidden = network_forward(kwargs["q"], kwargs["k"], kwargs)[2:]
        near = np.minimum(*[np.min(np.abs(a), axis=(-2, -1)) for a in hidden]) < 0.02
        if not np.any(near):
            return
        fresh = rng.standard_normal(kwargs["q"].shape)
        kwargs["q"] = np.where(near[..., None], fresh, kwargs["q"])
    _clear(rng, kwargs, lead)


def _places(rng):
    """Queries and keys are their own places: relu(t - s) + relu(s - t) = |t - s|."""
    turn = np.array([[1.0, -1.0], [-1.0, 1.0]])
    return {
        "q": np.arange(1.0, 6.0)[:, None], "k": np.arange(6.0)[:, None],
        "v": rng.standard_normal((2, 6, 3)), "Pq": np.ones((1, 1)), "Pk": np.ones((1, 1)),
        "W1": turn, "W2": np.eye(2), "w3": np.array([[-0.3, -0.3], [-0.8, -0.8]]), "causal": True,
    }  # fmt: skip


def _alibi(kwargs):
    blank = {"q": np.zeros((2, 5, 2)), "k": np.zeros((2, 6, 2)), "v": kwargs["v"]}
    return blank | {"m": np.array([0.3, 0.8]), "causal": True}


SPEC = core.Mechanism(
    key="scores/neural_attention", forward=neural_attention_forward,
    backward=neural_attention_backward, example=_example,
    flags=frozenset(core.SOFTMAX_FLAGS) - {"scaled", "shift_invariant"},
    reduces_to=(
        core.Reduction("scores/alibi", "the network computes the distance", _places, _alibi),
    ),
    claim=(
        "Attention that is high where the difference of two numbers lies in a band is learned by "
        "network scores on the numbers themselves; dot products of linear projections cannot."
    ),
    verified_by=("slow loop", "PyTorch"),
)  # fmt: skip
