r"""Linear attention: features instead of the exponential, so that sums over keys are formed once.

.. math::

    \phi(x) &= x + 1 \text{ where } x > 0, \text{ else } e^{x}            &(1)\\
    z_{ts} &= \phi(q_t) \cdot \phi(k_s)                                   &(2)\\
    p_{ts} &= z_{ts} / \textstyle\sum_{s'} z_{ts'}                        &(3)\\
    o_t    &= \textstyle\sum_s p_{ts}\, v_s                               &(4)

The sums run over the keys that query t may see. Softmax attention has exp(q.k) in place of (2).
Because (2) is a product of something of the query and something of the key, the sums can be taken
first: with S = sum_s phi(k_s) v_s^T and n = sum_s phi(k_s), o_t = S^T phi(q_t) / (n . phi(q_t)).
Time is then linear in the number of tokens, and a causal model is a recurrence with state (S, n).

Source: Katharopoulos et al. 2020, sections 3.2 to 3.4; official files read:
fast_transformers/attention/linear_attention.py and causal_linear_attention.py; grade A.
"""

from typing import NamedTuple

import numpy as np

from attention_ref import core
from attention_ref.core.errors import ParameterError


class Cache(NamedTuple):
    """What the backward needs."""

    fq: np.ndarray  # (..., T, D), features of the queries, row by row up to a common factor
    fk: np.ndarray  # (..., S, D), features of the keys
    v: np.ndarray  # (..., S, E), rows with NaN or infinity replaced by zeros
    p: np.ndarray  # (..., T, S), weights; not normalised when normalise is False
    total: np.ndarray | None  # (..., T, 1), sum of each row of (2); None without normalising
    live: np.ndarray  # (..., T, S), True = may attend
    poison: np.ndarray  # (..., T, 1), rows that are NaN
    feature_map: str


def _features_forward(x, feature_map, shift=0.0):
    """phi(x) = elu(x) + 1, times exp(-shift) where all of a row is negative; or x itself."""
    if feature_map == "identity":
        return x
    return np.where(x > 0, x + 1.0, np.exp(np.where(x > 0, 0.0, x - shift)))


def _features_backward(df, f, feature_map):
    """The slope is 1 where x > 0, that is phi(x) > 1, and phi(x) itself elsewhere."""
    return df if feature_map == "identity" else df * np.minimum(f, 1.0)


def _door(
    q, k, v, mask=None, causal=False, align="lower_right", normalise=True, feature_map="elu",
    empty_row="zero",
):  # fmt: skip
    """Check, find out who sees whom, set non-finite rows aside, make features of the rest."""
    core.check.attention(q, k, v, mask=mask, align=align, empty_row=empty_row)
    core.check.option("feature_map", feature_map, ("elu", "identity"))
    core.check.option("normalise", normalise, (True, False))
    if normalise and feature_map == "identity":
        raise ParameterError(
            "normalise is True with feature_map='identity', expected False: weights that may be "
            "negative can sum to zero; hint: normalise=False"
        )
    live = core.visible(q, k, mask=mask, causal=causal, align=align, empty_row=empty_row)
    q, k, v, poison = core.quarantine(q, k, v, live, empty_row)
    shift = np.minimum(np.max(q, axis=-1, keepdims=True), 0.0) if normalise else 0.0
    fq, fk = _features_forward(q, feature_map, shift), _features_forward(k, feature_map)
    return fq, fk, v, live, poison


def linear_transformer_forward(
    q, k, v, *, mask=None, causal=False, align="lower_right", normalise=True, feature_map="elu",
    empty_row="zero",
):  # fmt: skip
    """Mix the values with weights phi(q).phi(k), all pairs at once: the parallel form.

    Parameters
    ----------
    q : ndarray, shape (..., T, D)
        Queries.
    k : ndarray, shape (..., S, D)
        Keys.
    v : ndarray, shape (..., S, E)
        Values.
    mask : bool ndarray, broadcast to (..., T, S), optional
        True = may attend. A mask over keys, the same for all queries, keeps the linear forms
        linear; a general one costs them one state a query.
    causal : bool
        Hide the keys behind each query.
    align : {"lower_right", "upper_left"}
        Where the causal diagonal lies when T != S.
    normalise : bool
        Divide by the sum of the weights; without, ``out`` is the numerator.
    feature_map : {"elu", "identity"}
        phi; "identity" gives un-normalised linear attention with plain products.
    empty_row : {"zero", "nan", "uniform", "raise"}
        Output of a query that may see no key.

    Returns
    -------
    out : ndarray, shape (..., T, E)
        Outputs.
    cache : Cache
        For the backward; holds ``p``.

    Raises
    ------
    ShapeError
        When widths, lengths or leading axes do not fit.
    DTypeError
        When an argument is no float32 or float64 array, or the mask is not boolean.
    ParameterError
        When an option is unknown, the identity is to be normalised, or a row is empty under
        "raise".
    MemoryLimitError
        When the weights would take more than 2 GiB.

    Notes
    -----
    There is no scale and no bias. The official code adds 1e-6 to the denominator; here nothing is
    added, because phi is positive. A query that is negative throughout is shifted by its largest
    entry before the exponential: a factor that cancels in (3), without which (3) would be 0/0 for
    a very negative query. When the features of all its keys underflow, the row is zero.

    Source
    ------
    linear/linear_transformer in the catalog; the two official files named above; grade A.

    References
    ----------
    Katharopoulos et al. 2020, Transformers are RNNs: Fast Autoregressive Transformers with Linear
    Attention.

    Examples
    --------
    Features 1 and 3, weights 1/4 and 3/4.

    >>> import numpy as np
    >>> q, k = np.array([[0.0]]), np.array([[0.0], [2.0]])
    >>> out, cache = linear_transformer_forward(q, k, np.array([[0.0], [4.0]]))
    >>> out.tolist(), cache.p.tolist()
    ([[3.0]], [[0.25, 0.75]])
    """
    fq, fk, v, live, poison = _door(
        q, k, v, mask, causal, align, normalise, feature_map, empty_row
    )  # (1)
    p, total = np.where(live, core.scores_forward(fq, fk, 1.0), 0.0), None  # (2)
    if normalise:
        total = np.sum(p, axis=-1, keepdims=True)
        total = np.where(total == 0, 1.0, total)
        p = p / total  # (3)
    if empty_row == "uniform":
        p = np.where(np.any(live, axis=-1, keepdims=True), p, 1.0 / max(v.shape[-2], 1))
    out = np.where(poison, np.nan, core.mix_forward(p, v))  # (4)
    return out, Cache(fq, fk, v, p, total, live, poison, feature_map)


def linear_transformer_backward(dout, cache):
    """Gradients of :func:`linear_transformer_forward`, its steps read from the bottom up.

    Parameters
    ----------
    dout : ndarray, shape (..., T, E)
        Gradient of the output.
    cache : Cache
        From the forward.

    Returns
    -------
    dict
        Under "q", "k", "v".
    """
    fq, fk, v, p, total, live, poison, feature_map = cache
    core.check.cotangent(dout, (*poison.shape[:-1], v.shape[-1]))
    dout = np.where(poison, 0.0, dout)

    dz, dv = core.mix_backward(dout, p, v)  # (4')
    if total is not None:
        dz = (dz - np.sum(p * dz, axis=-1, keepdims=True)) / total  # (3')
    dfq, dfk = core.scores_backward(np.where(live, dz, 0.0), fq, fk, 1.0)  # (2')
    dq = _features_backward(dfq, fq, feature_map)  # (1')
    dk = _features_backward(dfk, fk, feature_map)
    return {"q": dq, "k": dk, "v": dv}


def _groups(live, mask=None, causal=False, align="lower_right", **_):
    """Mask (..., G, S), G = 1 when all queries share it; how many keys lie before each query."""
    queries, keys = live.shape[-2:]
    shared = np.ones_like(live, shape=(1, 1)) if mask is None else mask
    shared = shared[None, :] if shared.ndim == 1 else shared
    offset = keys - queries if align == "lower_right" else 0
    ends = [min(max(t + offset + 1, 0), keys) if causal else keys for t in range(queries)]
    return np.broadcast_to(shared, (*shared.shape[:-1], keys)), ends


def _finish(parts, live, v, poison, normalise=True, empty_row="zero", **_):
    """Numerators over denominators; rows without keys as told, poisoned ones NaN."""
    lead = poison.shape[:-2]
    none = np.zeros_like(v, shape=(*lead, 0, v.shape[-1] + 1))
    parts = [np.broadcast_to(x, (*lead, *x.shape[-2:])) for x in parts]
    both = np.concatenate([none, *parts], axis=-2)
    out, total = both[..., :-1], both[..., -1:]
    out = out / np.where(total == 0, 1.0, total) if normalise else out
    if empty_row == "uniform":
        mean = np.sum(v, axis=-2, keepdims=True) / max(v.shape[-2], 1)
        out = np.where(np.any(live, axis=-1, keepdims=True), out, mean)
    return np.where(poison, np.nan, out)


def linear_transformer_recurrent_forward(q, k, v, **options):
    """The same token by token: write phi(k) v^T into a state, read it with phi(q).

    The values get a further column of ones, whose state is n and whose output the denominator.

    Parameters
    ----------
    q, k, v, **options
        As in :func:`linear_transformer_forward`.

    Returns
    -------
    out : ndarray, shape (..., T, E)
        As there.
    cache : None
        The gradients are those of the parallel form.
    """
    fq, fk, v, live, poison = _door(q, k, v, **options)
    mask, ends = _groups(live, **options)
    w = np.concatenate([v, np.ones_like(v[..., :1])], axis=-1)
    S, parts = np.zeros_like(w, shape=(mask.shape[-2], fk.shape[-1], w.shape[-1])), []
    for s in range(-1, v.shape[-2]):
        if s >= 0:
            write = fk[..., s, :, None] * w[..., s, None, :]
            S = S + np.where(mask[..., s, None, None], write[..., None, :, :], 0.0)
        for t in [t for t, end in enumerate(ends) if end == s + 1]:
            read = S[..., t if mask.shape[-2] > 1 else 0, :, :]
            parts += [fq[..., t : t + 1, :] @ read]
    return _finish(parts, live, v, poison, **options), None


def linear_transformer_chunked_forward(q, k, v, *, chunk=64, **options):
    """The same by chunks of queries: a state for the keys all of them see, pairs for the rest.

    Parameters
    ----------
    q, k, v, **options
        As in :func:`linear_transformer_forward`.
    chunk : int
        Queries a chunk.

    Returns
    -------
    out : ndarray, shape (..., T, E)
        As there.
    cache : None
        The gradients are those of the parallel form.
    """
    core.check.count("chunk", chunk, low=1, unit="tokens")
    fq, fk, v, live, poison = _door(q, k, v, **options)
    mask, ends = _groups(live, **options)
    w = np.concatenate([v, np.ones_like(v[..., :1])], axis=-1)
    S, parts = np.zeros_like(w, shape=(mask.shape[-2], fk.shape[-1], w.shape[-1])), []
    done = 0
    for start in range(0, len(ends), chunk):
        rows = slice(start, start + chunk)
        new, near = slice(done, ends[start]), slice(ends[start], ends[rows][-1])
        write = np.where(mask[..., new, None], fk[..., None, new, :], 0.0)
        S, done = S + np.swapaxes(write, -1, -2) @ w[..., None, new, :], ends[start]
        Q, states = fq[..., rows, :], S[..., rows if mask.shape[-2] > 1 else slice(1), :, :]
        pairs = Q @ np.swapaxes(fk[..., near, :], -1, -2)
        pairs = np.where(live[..., rows, near], pairs, 0.0)
        parts += [(Q[..., None, :] @ states)[..., 0, :] + pairs @ w[..., near, :]]
    return _finish(parts, live, v, poison, **options), None


def _example(rng):
    qkv, mask = core.examples.qkv, rng.random((2, 1, 7)) < 0.6
    cases = core.examples.attention(rng, options=("causal", "mask"), scale=False) | {
        "key-mask": qkv(rng, T=4, S=7) | {"mask": mask, "causal": True},
        "numerator": qkv(rng, T=5, S=6) | {"normalise": False, "causal": True},
        "identity": qkv(rng, T=4, S=6) | {"normalise": False, "feature_map": "identity"},
    }
    for kwargs in cases.values():  # phi'' jumps at 0: differences need some distance from it
        kwargs |= {name: kwargs[name] + 0.1 * np.sign(kwargs[name]) for name in "qk"}
    return cases


def _one_channel(rng):
    kwargs = core.examples.qkv(rng, T=5, S=7, D=1)
    return kwargs | {n: -np.square(kwargs[n]) for n in "qk"} | {"causal": True}


SPEC = core.Mechanism(
    key="linear/linear_transformer",
    forward=linear_transformer_forward,
    backward=linear_transformer_backward,
    example=_example,
    flags=frozenset({"attention", "causal", "masked", "permutation_equivariant", "linear_in_v"}),
    forms={
        "recurrent": linear_transformer_recurrent_forward,
        "chunked": linear_transformer_chunked_forward,
    },
    reduces_to=(
        core.Reduction(
            "scores/dot_product", "one negative channel: softmax of the keys, whatever the query",
            _one_channel, lambda mine: mine | {"q": np.ones((1, 5, 1)), "scale": 1.0},
        ),
    ),
    claim="Even where the query equals a key, the weight of that key falls like 1/S with the "
    "number of keys S, while softmax attention keeps it near 1.",
    verified_by=("slow loop", "PyTorch"),
)  # fmt: skip
