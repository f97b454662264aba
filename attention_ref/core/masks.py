"""Who may see whom, and what happens to what nobody may see.

Masks are boolean, True = may attend. A key behind a mask has no effect at all, not even when it
holds NaN; a query without any key follows ``empty_row``.
"""

import numpy as np

from attention_ref.core.errors import ParameterError


def visible(q, k, *, mask=None, causal=False, align="lower_right", empty_row="zero"):
    """Which query may see which key.

    Parameters
    ----------
    q, k : ndarray, shapes (..., T, D), (..., S, D)
        Only their lengths and the kind of array count.
    mask : bool ndarray, broadcast to (..., T, S), optional
        True = may attend.
    causal : bool
        Query t sees key s when s <= t + S - T (``align="lower_right"``: the last query sees the
        last key) or s <= t (``align="upper_left"``).
    empty_row : {"zero", "nan", "uniform", "raise"}
        Only "raise" acts here.

    Returns
    -------
    bool ndarray, shape (T, S) or (..., T, S)
    """
    queries, keys = q.shape[-2], k.shape[-2]
    live = np.ones_like(q, shape=(queries, keys), dtype=bool)
    if causal:
        offset = keys - queries if align == "lower_right" else 0
        t, s = np.arange(queries, like=q), np.arange(keys, like=q)
        live = s[None, :] <= t[:, None] + offset
    if mask is not None:
        live = live & mask
    if empty_row == "raise" and np.any(~np.any(live, axis=-1)).item():
        raise ParameterError(
            "mask leaves at least one query without a key, expected none with "
            "empty_row='raise'; hint: empty_row='zero' gives such rows zeros"
        )
    return live


def quarantine(q, k, v, live, empty_row="zero"):
    """Take non-finite numbers out of the way before they are multiplied by a weight of zero.

    ``0 * nan`` is ``nan``: one NaN in a padded value would reach every row of ``p @ v``. So rows
    of q, k, v that hold a non-finite number are replaced by zeros, and the queries that may really
    see one of them are reported, to become NaN at the very end.

    Parameters
    ----------
    q, k, v : ndarray, shapes (..., T, D), (..., S, D), (..., S, E)
        Queries, keys, values.
    live : bool ndarray, broadcast to (..., T, S)
        From :func:`visible`.
    empty_row : {"zero", "nan", "uniform", "raise"}
        "nan" poisons the rows without a key; under "uniform" they see every value.

    Returns
    -------
    q, k, v : ndarray
        Without non-finite rows.
    poison : bool ndarray, shape (..., T, 1)
        Rows whose output must be NaN.
    """
    good_q = np.all(np.isfinite(q), axis=-1)[..., None]
    good_k = np.all(np.isfinite(k), axis=-1)[..., None]
    good_v = np.all(np.isfinite(v), axis=-1)[..., None]
    alive = np.any(live, axis=-1, keepdims=True)
    seen = live | ~alive if empty_row == "uniform" else live
    bad_key = np.swapaxes(~(good_k & good_v), -1, -2)
    poison = np.any(seen & bad_key, axis=-1, keepdims=True) | (alive & ~good_q)
    if empty_row == "nan":
        poison = poison | ~alive
    return np.where(good_q, q, 0.0), np.where(good_k, k, 0.0), np.where(good_v, v, 0.0), poison


def quarantine_bias(bias, live, poison):
    """The same for an additive bias: NaN and +inf poison rows that see them, -inf weighs 0.

    Returns
    -------
    bias : ndarray
        Without NaN and +inf.
    poison : bool ndarray, shape (..., T, 1)
        The given rows and the new ones.
    """
    good = np.isfinite(bias) | (bias == -np.inf)
    return np.where(good, bias, 0.0), poison | np.any(live & ~good, axis=-1, keepdims=True)
