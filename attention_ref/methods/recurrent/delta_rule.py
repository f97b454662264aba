r"""Delta rule: a memory that erases what a key held before it writes; gated and Kimi forms too.

.. math::

    F_t &= \mathrm{diag}(a_t)\, S_{t-1}          &(1)\\
    u_t &= v_t - F_t^\top k_t                    &(2)\\
    S_t &= F_t + b_t\, k_t u_t^\top              &(3)\\
    o_t &= c\, S_t^\top q_t                      &(4)

Decay, compare, write, read. The state S is a matrix of D key rows and E value columns. Linear
attention writes v_t; the delta rule writes only u_t, by how much v_t differs from what the memory
already answers to k_t. It is one step of gradient descent with rate b_t on half the squared error
of that answer, so that a key written again is replaced and not added. The gate a_t is one
number a head (gated delta rule), one a key channel (Kimi delta attention), or 1.

Source: Schlag et al. 2021, section 4; Yang et al. 2024 for the chunked form; official file read:
fla/ops/kda/naive.py of flash-linear-attention; grade A.
"""

from typing import NamedTuple

import numpy as np

from attention_ref import core


class Out(NamedTuple):
    """Outputs and the memory after the last token."""

    out: np.ndarray  # (..., T, E)
    state: np.ndarray  # (..., D, E)


class Cache(NamedTuple):
    """What the backward needs."""

    q: np.ndarray  # (..., T, D), non-finite rows replaced by zeros; so for k, v, b, a
    k: np.ndarray  # (..., T, D)
    v: np.ndarray  # (..., T, E)
    b: np.ndarray  # (..., T, 1)
    a: np.ndarray  # (..., T, 1) or (..., T, D)
    states: np.ndarray  # (..., T + 1, D, E), S_0 to S_T
    poison: np.ndarray  # (..., T, 1), rows that are NaN
    lost: np.ndarray  # (..., 1, 1), last states that are NaN
    scale: float
    shapes: dict  # argument -> its shape, for the gradients


def _door(q, k, v, b, gate, state, scale):
    """Check, give b and the gate a channel axis, set non-finite tokens aside; no arithmetic."""
    channel = getattr(gate, "ndim", 0) > getattr(b, "ndim", 0)
    n = core.check.shapes(
        q=(q, "... T D"), k=(k, "... T D"), v=(v, "... T E"), b=(b, "... T"),
        gate=(gate, "... T D" if channel else "... T"), state=(state, "... D E"),
    )  # fmt: skip
    core.check.number("scale", scale)
    if n["D"] == 0:
        raise core.errors.ShapeError(f"q has width D = 0 in shape {q.shape}, expected at least 1")
    lead, T, D, E = n["..."], n["T"], n["D"], n["E"]
    core.check.memory((*lead, T + 1, D, E), q.dtype, "the states", "fewer tokens")
    given = {"q": q, "k": k, "v": v, "b": b, "gate": gate, "state": state}
    shapes = {name: x.shape for name, x in given.items() if x is not None}
    b = b[..., None]
    a = np.ones_like(b) if gate is None else gate if channel else gate[..., None]
    state = np.zeros_like(v, shape=(D, E)) if state is None else state

    good = [np.all(np.isfinite(x), axis=-1, keepdims=True) for x in (q, k, v, b, a)]
    kept = np.all(np.isfinite(state), axis=(-2, -1), keepdims=True)
    written = good[1] & good[2] & good[3] & good[4]  # tokens that leave the memory finite
    spoilt = np.cumsum(np.where(written, 0.0, 1.0), axis=-2) > 0
    poison = spoilt | ~kept | ~good[0]
    lost = np.any(~written, axis=-2, keepdims=True) | ~kept
    q, k, v, b, a = (np.where(g, x, 0.0) for g, x in zip(good, (q, k, v, b, a), strict=True))
    start = np.broadcast_to(np.where(kept, state, 0.0), (*lead, D, E))
    return q, k, v, b, a, start, poison, lost, core.default_scale(D, scale), shapes


def delta_rule_forward(q, k, v, b, gate=None, state=None, *, scale=None):
    """Walk through the tokens: decay the memory, correct it at the key, read it at the query.

    Parameters
    ----------
    q : ndarray, shape (..., T, D)
        Queries.
    k : ndarray, shape (..., T, D)
        Keys, of unit length if the caller normalises them; the method does not.
    v : ndarray, shape (..., T, E)
        Values.
    b : ndarray, shape (..., T)
        Writing strength, in (0, 1), or (0, 2) where negative eigenvalues are wanted.
    gate : ndarray, shape (..., T) or (..., T, D), optional
        What is kept of the memory, in [0, 1], not its logarithm: one number a head and token, or
        one a key channel; the latter when it has more axes than b. None keeps everything.
    state : ndarray, shape (..., D, E), optional
        Memory before the first token; zeros by default.
    scale : float, dimensionless, optional
        The factor c; 1/sqrt(D) by default.

    Returns
    -------
    out : Out
        ``out`` (..., T, E) and ``state`` (..., D, E), the memory after the last token.
    cache : Cache
        For the backward; holds ``states``, the memory after every token.

    Raises
    ------
    ShapeError
        When widths, lengths or leading axes do not fit, or the rank of the gate.
    DTypeError
        When an argument is no float32 or float64 array.
    ParameterError
        When the scale is not a finite number.
    MemoryLimitError
        When the states of all tokens would take more than 2 GiB.

    Notes
    -----
    The key is compared with the decayed memory, as in the official file; comparing with the
    memory before its decay is another method. The official code takes the logarithm of the gate,
    the papers write the state transposed, (E, D). With ``|1 - b k.k| > 1`` the memory grows
    without bound. Whatever is not finite in k, v, b or gate makes its row, all later rows and the
    last state NaN; in q, its row alone.

    Source
    ------
    recurrent/delta_rule in the catalog; fla/ops/kda/naive.py, recurrent and chunked; grade A.

    References
    ----------
    Schlag et al. 2021, Linear Transformers Are Secretly Fast Weight Programmers.
    Yang et al. 2024, Parallelizing Linear Transformers with the Delta Rule over Sequence Length.
    Kimi Team 2025, Kimi Linear: An Expressive, Efficient Attention Architecture.

    Examples
    --------
    The same key twice: the second value replaces the first.

    >>> import numpy as np
    >>> k = np.array([[1.0, 0.0], [1.0, 0.0]])
    >>> v, b = np.array([[5.0], [7.0]]), np.array([1.0, 1.0])
    >>> (out, state), cache = delta_rule_forward(k, k, v, b, scale=1.0)
    >>> out.tolist(), state.tolist()
    ([[5.0], [7.0]], [[7.0], [0.0]])
    """
    q, k, v, b, a, S, poison, lost, scale, shapes = _door(q, k, v, b, gate, state, scale)
    rows, states = [S[..., :0, :]], [S]
    for t in range(q.shape[-2]):
        F = a[..., t, :, None] * S  # (1)
        u = v[..., t, :] - np.einsum("...de,...d->...e", F, k[..., t, :])  # (2)
        S = F + b[..., t, :, None] * k[..., t, :, None] * u[..., None, :]  # (3)
        o = np.einsum("...de,...d->...e", S, q[..., t, :]) * scale  # (4)
        rows, states = [*rows, o[..., None, :]], [*states, S]
    out = np.where(poison, np.nan, np.concatenate(rows, axis=-2))
    cache = Cache(q, k, v, b, a, np.stack(states, axis=-3), poison, lost, scale, shapes)
    return Out(out, np.where(lost, np.nan, S)), cache


def delta_rule_backward(dout, cache):
    """Gradients of :func:`delta_rule_forward`: the tokens from the last to the first.

    Parameters
    ----------
    dout : Out
        Gradients of ``out`` and of the last ``state``; either may be None.
    cache : Cache
        From the forward.

    Returns
    -------
    dict
        Under "q", "k", "v", "b" and, where given, "gate" and "state".
    """
    q, k, v, b, a, states, poison, lost, scale, shapes = cache
    lead, (tokens, D, E) = states.shape[:-3], states.shape[-3:]
    full = Out((*lead, tokens - 1, E), (*lead, D, E))
    zeros = Out(*(np.zeros_like(states, shape=shape) for shape in full))
    dout = Out(*(z if x is None else x for x, z in zip(dout, zeros, strict=True)))
    core.check.cotangent(dout.out, full.out, "dout.out")
    core.check.cotangent(dout.state, full.state, "dout.state")
    do = np.where(poison, 0.0, dout.out) * scale
    G = np.where(lost, 0.0, dout.state)  # gradient of S_t

    down = {name: [] for name in ("q", "k", "v", "b", "gate")}
    for t in reversed(range(tokens - 1)):
        at, bt, kt = a[..., t, :, None], b[..., t, :, None], k[..., t, :]
        F = at * states[..., t, :, :]
        u = v[..., t, :] - np.einsum("...de,...d->...e", F, kt)
        dq = np.einsum("...de,...e->...d", states[..., t + 1, :, :], do[..., t, :])  # (4')
        G = G + q[..., t, :, None] * do[..., t, None, :]
        Gu = np.einsum("...de,...e->...d", G, u)  # (3')
        db = np.sum(kt * Gu, axis=-1, keepdims=True)
        du = np.einsum("...de,...d->...e", G, kt) * bt[..., 0]
        dk = bt[..., 0] * Gu - np.einsum("...de,...e->...d", F, du)  # (2')
        G = G - kt[..., :, None] * du[..., None, :]
        da = np.sum(G * states[..., t, :, :], axis=-1)  # (1')
        G = at * G
        for name, x in zip(down, (dq, dk, du, db, da), strict=True):
            down[name] += [x]
    wide = {"q": q, "k": k, "v": v, "b": b, "gate": a}
    gradients = {"state": core.sum_to(G, shapes.get("state", G.shape))}
    for name, x in down.items():
        rows = np.stack(x[::-1], axis=-2) if x else wide[name]
        gradients[name] = np.reshape(core.sum_to(rows, wide[name].shape), shapes.get(name, -1))
    return {name: gradients[name] for name in shapes}


def delta_rule_chunked_forward(q, k, v, b, gate=None, state=None, *, scale=None, chunk=64):
    """The same by chunks of tokens: one triangular system a chunk instead of a loop over tokens.

    Within a chunk, let X_i = b_i u_i be what token i writes. Unrolling (1) to (3) over the chunk
    gives one linear system with a unit lower triangular matrix,
    X_i + b_i sum_{j<i} (k_i . dec_ij k_j) X_j = b_i (v_i - S^T (dec_i k_i)), where dec_ij is the
    product of the gates after j up to i, and dec_i that of all gates of the chunk up to i.

    Parameters
    ----------
    q, k, v, b, gate, state, scale
        As in :func:`delta_rule_forward`.
    chunk : int
        Tokens a chunk.

    Returns
    -------
    out : Out
        As there.
    cache : None
        The gradients are those of the recurrent form.
    """
    core.check.count("chunk", chunk, low=1, unit="tokens")
    q, k, v, b, a, S, poison, lost, scale, _ = _door(q, k, v, b, gate, state, scale)
    parts = [S[..., :0, :]]
    for start in range(0, q.shape[-2], chunk):
        Q, K, V, B, A = (x[..., start : start + chunk, :] for x in (q, k, v, b, a))
        j = np.arange(K.shape[-2], like=q)
        i = j[:, None]
        steps = np.where((i > j)[..., None], A[..., :, None, :], 1.0)
        decay = np.where((i >= j)[..., None], np.cumprod(steps, axis=-3), 0.0)  # dec_ij
        since = np.cumprod(A, axis=-2)  # dec_i
        overlap = np.sum(K[..., :, None, :] * K[..., None, :, :] * decay, axis=-1)
        matrix = np.where(i > j, B * overlap, np.where(i == j, 1.0, 0.0))
        X = np.linalg.solve(matrix, B * (V - (since * K) @ S))
        weights = np.sum(Q[..., :, None, :] * K[..., None, :, :] * decay, axis=-1)
        parts = [*parts, ((since * Q) @ S + weights @ X) * scale]
        S = since[..., -1, :, None] * S + np.swapaxes(decay[..., -1, :, :] * K, -1, -2) @ X
    out = np.where(poison, np.nan, np.concatenate(parts, axis=-2))
    return Out(out, np.where(lost, np.nan, S)), None


def delta_rule_numba(q, k, v, b, gate=None, state=None, *, scale=None):
    """The same call by the compiled scan: one token after the other, the state in the cache.

    Parameters
    ----------
    q, k, v, b, gate, state, scale
        As in :func:`delta_rule_forward`.

    Returns
    -------
    out, cache
        As there.
    """
    from attention_ref.kernels.numba import scan

    out, last, cache = scan.delta_forward(q, k, v, b, gate, state, scale=scale)
    return Out(out, last), cache


def delta_rule_numba_backward(dout, cache):
    """Gradients of :func:`delta_rule_numba`.

    Parameters
    ----------
    dout, cache
        As in :func:`delta_rule_backward`.

    Returns
    -------
    dict
        As there.
    """
    from attention_ref.kernels.numba import scan

    return scan.delta_backward(dout.out, dout.state, cache)


def _example(rng):
    def case(lead=(2,), T=5, D=4, E=3, **more):
        k = rng.standard_normal((*lead, T, D))
        return core.examples.qkv(rng, lead, T, T, D, E) | {
            "k": k / np.sqrt(np.sum(k * k, axis=-1, keepdims=True)),
            "b": rng.uniform(0.2, 0.95, (*lead, T)),
            "scale": core.examples.DEFAULT_SCALE,
        } | more  # fmt: skip

    gate, state = rng.uniform(0.3, 1.0, (2, 7, 4)), rng.standard_normal((2, 4, 3))
    return {
        "channel-gate": case(gate=gate[:, :5], state=state),
        "scalar-gate": case(T=7, gate=gate[..., 0]),
        "plain": case(T=6),
        "state": case(lead=(3, 2), T=1, state=state),
        "negative-eigenvalues": case(T=7, D=3, E=5, b=rng.uniform(1.0, 1.9, (2, 7))),
        "no-heads": case(lead=(), T=9, D=3, E=2, gate=rng.uniform(0.5, 1.0, 9), scale=None),
    }


def _own_write(rng):
    ones = {"gate": np.zeros((2, 5, 4)), "b": np.ones((2, 5)), "scale": 1.0}
    return _example(rng)["channel-gate"] | ones


def _orthogonal(rng):
    q, k, v = rng.standard_normal((3, 2, 6, 6))
    return {"q": q, "k": np.linalg.qr(k)[0], "v": v, "b": np.ones((2, 6)), "scale": 1.0}


def _to_linear(says, kwargs, gradients, **more):
    more |= {"feature_map": "identity", "normalise": False}
    return core.Reduction(
        "linear/linear_transformer", says, kwargs, lambda mine: {n: mine[n] for n in "qkv"} | more,
        compare=lambda out, other: (out.out, other), gradients=gradients,
    )  # fmt: skip


SPEC = core.Mechanism(
    key="recurrent/delta_rule",
    forward=delta_rule_forward, backward=delta_rule_backward,
    numba=core.Backend(delta_rule_numba, delta_rule_numba_backward),
    example=_example,
    flags=frozenset({"always_causal", "scaled"}),
    tokens={"b": -1},
    forms={"chunked": delta_rule_chunked_forward},
    reduces_to=(
        _to_linear("orthonormal keys: nothing to erase", _orthogonal, False, causal=True),
        _to_linear("gate 0: its own write only", _own_write, True, mask=np.eye(5, dtype=bool)),
    ),
    claim="When keys are written again, the delta rule recalls the last value, linear attention "
    "the sum of all that were written.",
    verified_by=("slow loop", "PyTorch"),
)  # fmt: skip
