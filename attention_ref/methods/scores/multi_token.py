r"""Multi-token attention: scores of neighbouring queries and keys are added before the softmax.

.. math::

    z_{hts} &= \kappa \tanh(c\, q_{ht} \cdot k_{hs} / \kappa)\quad\text{where t may see s, else 0}
            &(1)\\
    y_{hts} &= \textstyle\sum_{a=0}^{A-1} \sum_{b=0}^{B-1}
            \theta_{h,\,A-1-a,\,b}\; z_{h,\,t-a,\,s+b-\lfloor B/2 \rfloor}               &(2)\\
    y_{hts} &\leftarrow \textstyle\sum_{h'} w_{hh'}\, y_{h'ts}                           &(3)\\
    p_{hts} &= e^{y_{hts} + \beta_{hts}} / \textstyle\sum_{s'} e^{y_{hts'} + \beta_{hts'}} &(4)\\
    p_{hts} &\leftarrow \textstyle\sum_{a,b} \theta'_{h,\,A-1-a,\,b}\;
            p_{h,\,t-a,\,s+b-\lfloor B/2 \rfloor}\quad\text{where t may see s, else 0}   &(5)\\
    p_{hts} &\leftarrow \textstyle\sum_{h'} w'_{hh'}\, p_{h'ts}
            \quad\text{where t may see s, else 0}                                       &(6)\\
    o_{ht}  &= \textstyle\sum_s p_{hts}\, v_{hs}                                         &(7)

with a kernel of A queries (backwards) and B keys (both sides) a head; steps (3), (5) and (6) only
where their parameter is given. There are two masks: zero before the convolution, so that it reads
nothing hidden, minus infinity after it. A weight can then depend on two queries at once: *find the
place where this word and the one before it stand together*.

Source: Golovneva et al. 2025, section 3; official mta_transformer.py of facebookresearch/RAM read;
grade A.
"""

from typing import NamedTuple

import numpy as np

from attention_ref import core


class Cache(NamedTuple):
    """What the backward needs, and what implementers compare with (``p``, ``lse``)."""

    q: np.ndarray  # (..., H, T, D), rows with NaN or infinity replaced by zeros
    k: np.ndarray  # (..., H, S, D), likewise
    v: np.ndarray  # (..., H, S, E), likewise
    parameters: tuple  # theta, w_pre, theta_post, w_post, None where not given
    z: np.ndarray  # (..., H, T, S), scores after the softcap, 0 where hidden
    y: np.ndarray  # (..., H, T, S), convolved scores (2)
    soft: np.ndarray  # (..., H, T, S), weights after the softmax (4)
    spread: np.ndarray  # (..., H, T, S), weights after the second convolution (5)
    p: np.ndarray  # (..., H, T, S), weights that mix the values
    lse: np.ndarray  # (..., H, T), log of the sum of exponentials, nats
    live: np.ndarray  # (..., T, S), True = may attend
    poison: np.ndarray  # (..., H, T, 1), rows that are NaN
    scale: float
    softcap: float | None
    bias_shape: tuple | None


def identity_kernel(queries, keys):
    """The kernel that changes nothing: 1 for a query and a key themselves, 0 elsewhere.

    Parameters
    ----------
    queries, keys : int
        A and B, B odd; the paper's are 6 and 11.

    Returns
    -------
    ndarray, shape (A, B)
        Where the official code begins.
    """
    kernel = np.zeros((queries, keys))
    kernel[-1, keys // 2] = 1.0
    return kernel


def convolve_forward(z, theta):
    """Add up neighbours, zeros beyond the edges: queries t - A + 1 to t, keys s - B//2 to s + B//2.

    Parameters
    ----------
    z : ndarray, shape (..., T, S)
        A map.
    theta : ndarray, shape (..., A, B)
        The kernel; its last row belongs to query t itself.

    Returns
    -------
    ndarray, shape (..., T, S)
    """
    (T, S), (A, B) = z.shape[-2:], theta.shape[-2:]
    padded, out = _pad(z, A - 1, 0, B // 2), 0.0
    for a, b in np.ndindex(A, B):
        out = out + theta[..., a, b, None, None] * padded[..., a : a + T, b : b + S]
    return out


def convolve_backward(dy, z, theta):
    """Back through the same windows: the kernel turned round, and edges on the other side.

    Parameters
    ----------
    dy : ndarray, shape (..., T, S)
        Gradient of the convolved map.
    z, theta : ndarray
        From the forward.

    Returns
    -------
    dz, dtheta : ndarray
        Of the shapes of z and theta.
    """
    (T, S), (A, B) = z.shape[-2:], theta.shape[-2:]
    padded, turned = _pad(z, A - 1, 0, B // 2), _pad(dy, 0, A - 1, B // 2)
    dz, taps = 0.0, []
    for a, b in np.ndindex(A, B):
        i, j = A - 1 - a, B - 1 - b
        dz = dz + theta[..., a, b, None, None] * turned[..., i : i + T, j : j + S]
        taps.append(np.sum(dy * padded[..., a : a + T, b : b + S], axis=(-2, -1)))
    dtheta = np.reshape(np.stack(taps, axis=-1), (*taps[0].shape, A, B))
    return core.sum_to(dz, z.shape), core.sum_to(dtheta, theta.shape)


def _pad(z, above, below, sides):
    """Zeros around the last two axes."""
    return np.pad(z, [*[(0, 0)] * (z.ndim - 2), (above, below), (sides, sides)])


def heads_forward(z, w):
    """Mix heads: the sum over h' of w[h, h'] z_h'.

    Parameters
    ----------
    z : ndarray, shape (..., H, T, S)
        Maps.
    w : ndarray, shape (H, H)
        The matrix.

    Returns
    -------
    ndarray, shape (..., H, T, S)
    """
    return np.einsum("ij,...jts->...its", w, z)


def heads_backward(dy, z, w):
    """The transposed matrix goes back; the matrix gets the products of the two maps.

    Parameters
    ----------
    dy, z : ndarray, shape (..., H, T, S)
        Gradient of the mixed maps, and the maps before.
    w : ndarray, shape (H, H)
        The matrix.

    Returns
    -------
    dz, dw : ndarray
        Of the shapes of z and w.
    """
    dw = np.einsum("gits,gjts->ij", *(np.reshape(a, (-1, *z.shape[-3:])) for a in (dy, z)))
    return np.einsum("ij,...its->...jts", w, dy), dw


def _check(q, k, v, theta, w_pre, theta_post, w_post, **options):
    """The checks of ``core.check.attention``, and those of kernels and matrices."""
    n = core.check.attention(q, k, v, **options)
    for name, a in {"theta": theta, "theta_post": theta_post}.items():
        core.check.shapes(**{name: (a, "... A B")})
        A, B = (1, 1) if a is None else a.shape[-2:]
        if A == 0 or B % 2 == 0:
            raise core.errors.ShapeError(f"{name} is {a.shape}, expected (..., A, B), B odd")
        core.check.check_bias(a, (*n["..."], A, B), name, "(..., H, A, B)")
    if w_pre is not None or w_post is not None:
        core.check.shapes(q=(q, "... H T D"), w_pre=(w_pre, "H H"), w_post=(w_post, "H H"))
    return n


def _reach(poison, theta):
    """A poisoned row reaches the A - 1 rows after it."""
    rows = np.ones_like(theta, shape=(theta.shape[-2], 1))
    return convolve_forward(np.where(poison, rows[0], 0.0), rows) > 0


def multi_token_forward(
    q, k, v, theta, w_pre=None, theta_post=None, w_post=None, *, mask=None, causal=False,
    align="lower_right", scale=None, softcap=None, bias=None, empty_row="zero",
):  # fmt: skip
    """Softmax attention over scores that are convolved over queries and keys.

    Parameters
    ----------
    q : ndarray, shape (..., H, T, D)
        Queries; the head axis may be absent.
    k : ndarray, shape (..., H, S, D)
        Keys.
    v : ndarray, shape (..., H, S, E)
        Values.
    theta : ndarray, broadcast to (..., H, A, B)
        Kernel on the scores: A queries, the last row for the query itself, and B keys, B odd.
    w_pre : ndarray, shape (H, H), optional
        Mixes the convolved scores; row = head that receives.
    theta_post : ndarray, broadcast to (..., H, A, B), optional
        Kernel on the weights; rows no longer sum to 1.
    w_post : ndarray, shape (H, H), optional
        Mixes the weights; groups of heads are a block-diagonal matrix.
    mask : bool ndarray, broadcast to (..., H, T, S), optional
        True = may attend.
    causal : bool
        Hide the keys behind each query.
    align : {"lower_right", "upper_left"}
        Where the causal diagonal lies when T != S.
    scale : float, dimensionless, optional
        The factor c; 1/sqrt(D) by default.
    softcap : float, > 0, nats, optional
        Bound on the scores before the convolution.
    bias : ndarray, broadcast to (..., H, T, S), nats, optional
        Added after the convolution; -inf gives a weight of 0 before step (5).
    empty_row : {"zero", "nan", "uniform", "raise"}
        Output of a query that may see no key.

    Returns
    -------
    out : ndarray, shape (..., H, T, E)
        Outputs.
    cache : Cache
        For the backward; holds ``soft``, ``p`` and ``lse``.

    Raises
    ------
    ShapeError
        When widths, lengths, heads or leading axes do not fit, or a kernel has an even B.
    DTypeError
        When an argument is no float32 or float64 array, or the mask is not boolean.
    ParameterError
        When an option or a number is outside its domain, or a row is empty under "raise".
    MemoryLimitError
        When the scores would take more than 2 GiB.

    Notes
    -----
    The paper's kernels have A = 6, B = 11, its head mixing after the softmax groups of 2; kernels
    and matrices begin as identities (:func:`identity_kernel`). In the official code the matrix of
    (6) stands transposed, row = head that gives; its matrix of (3) is as here. Its mask is the same
    for all heads; where heads differ in what they may see, (6) gives a head no weight on what is
    hidden from it. With neither (5) nor
    (6) that code applies the softmax twice; here it is applied once, as the paper writes. The code
    may also pad keys on one side; here always on both. A block-diagonal mask alone does not keep
    packed sequences apart, since the last pair of one and the first of the next are diagonal
    neighbours: the code cuts the map there; here call them one by one, or leave B // 2 hidden keys
    between them. A decoder must keep the scores of the last A - 1 queries. What follows in the
    paper, a norm of each head's output with a factor that depends on the layer, and a gate, belongs
    to the caller. A non-finite query makes the A - 1 rows after it NaN too.

    Source
    ------
    scores/multi_token in the catalog; section 3 of the paper, official code; grade A.

    References
    ----------
    Golovneva et al. 2025, Multi-Token Attention.

    Examples
    --------
    >>> import numpy as np
    >>> q, k = np.array([[np.log(3.0)]]), np.array([[1.0], [0.0], [0.0]])
    >>> kernel = np.array([[1.0, 0.0, 0.0]])  # the score of the key before
    >>> out, cache = multi_token_forward(q, k, 5 * np.eye(3), kernel, scale=1.0)
    >>> out.round(12).tolist()
    [[1.0, 3.0, 1.0]]
    """
    n = _check(
        q, k, v, theta, w_pre, theta_post, w_post, mask=mask, bias=bias, align=align, scale=scale,
        softcap=softcap, empty_row=empty_row,
    )  # fmt: skip
    scale = core.default_scale(n["D"], scale)
    live = core.visible(q, k, mask=mask, causal=causal, align=align, empty_row=empty_row)
    q, k, _, poison = core.quarantine(q, k, k, live)
    _, _, v, bad_v = core.quarantine(q, k, v, live, empty_row)

    z = core.softcap_forward(core.scores_forward(q, k, scale), softcap)  # (1)
    z = np.where(live, z, 0.0)
    score = y = convolve_forward(z, theta)  # (2)
    poison = _reach(poison, theta)
    if w_pre is not None:
        score, poison = heads_forward(y, w_pre), np.any(poison, axis=-3, keepdims=True)  # (3)
    if bias is not None:
        clean, poison = core.quarantine_bias(bias, live, poison)
        score = score + clean
    p, lse = core.softmax_forward(score, live, empty_row)  # (4)
    soft, lse = p, np.where(poison[..., 0], np.nan, lse)
    if theta_post is not None:  # (5)
        p = np.where(live, convolve_forward(np.where(live, p, 0.0), theta_post), p)
        poison = _reach(poison, theta_post)
    spread = p
    if w_post is not None:  # (6)
        p = np.where(live, heads_forward(np.where(live, p, 0.0), w_post), p)
        poison = np.any(poison, axis=-3, keepdims=True)
    poison = poison | bad_v
    out = core.mix_forward(p, v)  # (7)

    return np.where(poison, np.nan, out), Cache(
        q, k, v, (theta, w_pre, theta_post, w_post), z, y, soft, spread, p, lse, live, poison,
        scale, softcap, None if bias is None else bias.shape,
    )  # fmt: skip


def multi_token_backward(dout, cache):
    """Gradients of :func:`multi_token_forward`, its steps read from the bottom up.

    Parameters
    ----------
    dout : ndarray, shape (..., H, T, E)
        Gradient of the output.
    cache : Cache
        From the forward.

    Returns
    -------
    dict
        Under "q", "k", "v", "theta" and, when given, the other parameters and "bias".
    """
    q, k, v, parameters, z, y, soft, spread, p, _, live, poison, scale, softcap = cache[:14]
    theta, w_pre, theta_post, w_post = parameters
    lead = np.broadcast_shapes(poison.shape[:-2], v.shape[:-2])
    core.check.cotangent(dout, (*lead, p.shape[-2], v.shape[-1]))
    dout, gradients = np.where(poison, 0.0, dout), {}

    dp, gradients["v"] = core.mix_backward(dout, p, v)  # (7')
    dp = np.where(live, core.sum_to(dp, p.shape), 0.0)
    if w_post is not None:  # (6')
        dp, gradients["w_post"] = heads_backward(dp, np.where(live, spread, 0.0), w_post)
        dp = np.where(live, dp, 0.0)
    if theta_post is not None:  # (5')
        dp, gradients["theta_post"] = convolve_backward(dp, np.where(live, soft, 0.0), theta_post)
    dy = core.softmax_backward(dp, soft, live)  # (4')
    if cache.bias_shape is not None:
        gradients["bias"] = core.sum_to(dy, cache.bias_shape)
    if w_pre is not None:
        dy, gradients["w_pre"] = heads_backward(dy, y, w_pre)  # (3')
    dz, gradients["theta"] = convolve_backward(dy, z, theta)  # (2')
    dz = core.softcap_backward(np.where(live, dz, 0.0), z, softcap)  # (1')
    gradients["q"], gradients["k"] = core.scores_backward(dz, q, k, scale)
    return gradients


def _example(rng):
    """Kernels of 3 x 3, 2 x 5 and 1 x 3; two heads in a batch of 1; each further step twice."""
    cases = core.examples.attention(rng)
    del cases["long-queries"], cases["causal-long-queries"]  # keeps the golden file small
    more = {
        "batch": ("theta_post",), "causal": ("w_pre",), "causal-upper-left": ("theta_post",),
        "packed": ("w_post",), "bias": ("w_pre", "w_post"), "mask": ("theta_post", "w_post"),
    }  # fmt: skip
    for name, case in cases.items():
        size = {"batch": (2, 5), "bias": (1, 3)}.get(name, (3, 3))
        shape = (*case["q"].shape[-3:-2], *size)
        case["theta"] = identity_kernel(*size) + 0.4 * rng.standard_normal(shape)
        case |= {n: case[n][None] for n in "qkv" if case["q"].ndim == 3}
        for extra in more.get(name, ()):
            case[extra] = 0.7 * rng.standard_normal((2, 2, 3) if "theta" in extra else (2, 2))
    return cases


def _identity(rng):
    return core.examples.qkv(rng) | {"theta": identity_kernel(3, 5), "causal": True}


SPEC = core.Mechanism(
    key="scores/multi_token",
    forward=multi_token_forward, backward=multi_token_backward, example=_example,
    flags=frozenset({"attention", "causal", "masked", "linear_in_v", "scaled", "positional"}),
    opt_out={"live_nan": "a NaN query reaches the rows after it; test_multi_token.py does it"},
    reduces_to=(
        core.Reduction(
            "scores/dot_product", "the identity kernel", _identity,
            lambda kwargs: {n: a for n, a in kwargs.items() if n != "theta"},
        ),
    ),
    claim="Told to find the block of letters that holds two given letters, a small model with "
    "multi-token attention errs less after the same training than one with softmax attention.",
    verified_by=("slow loop", "PyTorch"),
)  # fmt: skip
