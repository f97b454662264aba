"""Errors in units of rounding: |a - b| / (eps * scale), judged array by array."""

import numpy as np


class CheckFailure(AssertionError):
    """A generic check does not hold; the message says what, by how much, and where."""


def eps_of(dtype):
    """Machine epsilon of a dtype (the real part's, for complex ones)."""
    return float(np.finfo(np.dtype(dtype)).eps)


def error(got, want, scale=None, eps=None):
    """Largest error of an array in units of eps * scale.

    Parameters
    ----------
    got, want : ndarray
        Equal shapes; NaN must stand in the same places, infinities must be equal.
    scale : float, optional
        By default the largest finite modulus in ``want``.
    eps : float, optional
        By default that of ``got``'s dtype.

    Returns
    -------
    float
        inf when shapes, NaNs or infinities differ.
    """
    got, want = np.asarray(got), np.asarray(want)
    if got.shape != want.shape:
        return np.inf
    odd = ~np.isfinite(got) | ~np.isfinite(want)
    same = (np.isnan(got) & np.isnan(want)) | (got == want)
    if np.any(odd & ~same):
        return np.inf
    difference = np.abs(np.where(odd, 0, got) - np.where(odd, 0, want))
    worst = float(np.max(difference, initial=0.0))
    if scale is None:
        scale = float(np.max(np.abs(np.where(odd, 0, want)), initial=0.0))
    if worst == 0:
        return 0.0
    if scale == 0:
        return np.inf
    return worst / (scale * (eps if eps is not None else eps_of(got.dtype)))


def close(what, got, want, bound, scale=None, eps=None):
    """Fail unless the error is within ``bound`` roundings; names the worst element.

    Raises
    ------
    CheckFailure
        With the measured error, the bound and the place.
    """
    measured = error(got, want, scale, eps)
    if measured <= bound:
        return measured
    got, want = np.asarray(got), np.asarray(want)
    if got.shape != want.shape:
        raise CheckFailure(f"{what}: shape {got.shape}, expected {want.shape}")
    with np.errstate(invalid="ignore"):
        gap = np.abs(got - want)
    gap = np.where(np.isnan(gap), np.inf, gap)
    gap = np.where((got == want) | (np.isnan(got) & np.isnan(want)), 0.0, gap)
    place = tuple(int(i) for i in np.unravel_index(np.argmax(gap), gap.shape))
    raise CheckFailure(
        f"{what}: {measured:.3g} roundings, bound {bound:.3g}; "
        f"worst at {place}: got {got[place]!r}, expected {want[place]!r}"
    )


def equal(what, got, want):
    """Fail unless two arrays are equal bit by bit (NaN equals NaN)."""
    got, want = np.asarray(got), np.asarray(want)
    if got.shape != want.shape or got.dtype != want.dtype:
        raise CheckFailure(
            f"{what}: {got.dtype}{got.shape}, expected {want.dtype}{want.shape} bit by bit"
        )
    if not np.array_equal(got, want, equal_nan=got.dtype.kind in "fc"):
        close(what + " (must be bit-equal)", got, want, -1.0)


def different(what, got, want):
    """Fail when two arrays are equal: the twin that keeps a relation from being vacuous."""
    if np.array_equal(np.asarray(got), np.asarray(want), equal_nan=True):
        raise CheckFailure(f"{what}: nothing changed, although it must")


def scales(gradients):
    """A scale for each gradient: its own largest entry, at least 1/1000 of the largest of all."""
    tops = {k: float(np.max(np.abs(g), initial=0.0)) for k, g in gradients.items()}
    most = max(tops.values(), default=0.0)
    return {k: max(top, most / 1000) for k, top in tops.items()}
