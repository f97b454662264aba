"""Keys come from paths and from the catalog; a method is imported when it is asked for.

A row of ``catalog.toml`` names a method of the mission, written or not. It exists here when its
file ``methods/<family>/<slug>.py`` does: no list is kept by hand.
"""

import difflib
import functools
import importlib
import importlib.util
import tomllib
from pathlib import Path

from attention_ref.core.errors import BackendUnavailable, ParameterError

PACKAGE = Path(__file__).resolve().parent.parent

BACKENDS = ("reference", "numba", "cuda", "auto")


@functools.cache
def catalog():
    """Every row of the mission: key -> record of ``catalog.toml``.

    Returns
    -------
    dict
        With ``number`` None for foundations and ``title`` always set.
    """
    with open(PACKAGE / "catalog.toml", "rb") as file:
        tables = tomllib.load(file)
    rows = {}
    for record in (*tables["paper"], *tables["foundation"]):
        record.setdefault("number", None)
        record.setdefault("title", record.get("name", ""))
        rows[record["key"]] = record
    return rows


def written():
    """Keys that have a method file, sorted."""
    files = (PACKAGE / "methods").glob("*/*.py")
    return sorted(f"{f.parent.name}/{f.stem}" for f in files if not f.stem.startswith("_"))


def keys(family=None, kind=None):
    """Keys of the methods that can be called.

    Parameters
    ----------
    family : str, optional
        Only this family, e.g. "normalizers".
    kind : str, optional
        Only this kind, e.g. "mechanism".

    Returns
    -------
    list of str

    Examples
    --------
    >>> import attention_ref
    >>> "scores/dot_product" in attention_ref.keys(family="scores")
    True
    """
    rows = catalog()
    return [
        key
        for key in written()
        if (family is None or key.startswith(family + "/"))
        and (kind is None or rows.get(key, {}).get("kind") == kind)
    ]


def nearest(key, among=None, most=3):
    """The keys that look most like ``key``, best first."""
    among = list(among if among is not None else catalog())
    slug = {}
    for known in among:
        slug.setdefault(known.split("/")[-1], known)
    near = difflib.get_close_matches(key, among, most, 0.5)
    near += [slug[s] for s in difflib.get_close_matches(key.split("/")[-1], slug, most, 0.5)]
    return list(dict.fromkeys(near))[:most]


@functools.cache
def get(key):
    """The SPEC of a method: its functions, examples, flags and claim.

    Parameters
    ----------
    key : str
        ``family/slug``.

    Returns
    -------
    Spec
        With ``.forward``, ``.backward``, ``.example``, ``.forms``, ``.claim`` (by kind).

    Raises
    ------
    ParameterError
        For a key that does not exist, with the nearest ones; or is not written yet.

    Examples
    --------
    >>> import attention_ref
    >>> attention_ref.get("scores/dot_product").kind
    'mechanism'
    """
    if key not in written():
        if key in catalog():
            raise ParameterError(
                f"key {key!r} is in the catalog but not written yet; "
                "hint: python -m attention_ref list shows what is there"
            )
        near = nearest(str(key), set(catalog()) | set(written()))
        hint = "see attention_ref.keys()"
        if near:
            hint = f"did you mean {' or '.join(map(repr, near))}?"
        raise ParameterError(f"key {key!r} is not known, expected family/slug; {hint}")
    module = importlib.import_module("attention_ref.methods." + key.replace("/", "."))
    if not hasattr(module, "SPEC"):
        raise ParameterError(f"key {key!r} has a file without a SPEC; hint: it is being written")
    return module.SPEC


def choose(spec, name):
    """The forward and backward of a method on a backend.

    Parameters
    ----------
    spec : Spec
        From :func:`get`.
    name : {"reference", "numba", "cuda", "auto"}
        "auto" takes Numba where the method has it and the reference otherwise.

    Returns
    -------
    tuple
        (forward, backward), backward None where the kind has none.

    Raises
    ------
    ParameterError
        For an unknown backend.
    BackendUnavailable
        When the method has no such path; an explicit choice never falls back.
    """
    from attention_ref.core import check

    check.option("backend", name, BACKENDS)
    if name == "auto":
        name = "numba" if spec.numba is not None and importlib.util.find_spec("numba") else None
    if name in (None, "reference"):
        return spec.main, spec.backward_function
    pair = getattr(spec, name)
    if pair is None:
        have = [b for b in ("reference", "numba", "cuda") if b == "reference" or getattr(spec, b)]
        raise BackendUnavailable(
            f"backend is {name!r}, but {spec.key} has only {', '.join(have)}; "
            "hint: backend='auto' takes the fastest there is"
        )
    return pair.forward, pair.backward


def run(key, *args, backend="reference", **kwargs):
    """Call a method by key, on a chosen backend.

    Parameters
    ----------
    key : str
        ``family/slug``.
    *args, **kwargs
        The method's own arguments.
    backend : {"reference", "numba", "cuda", "auto"}
        What computes it.

    Returns
    -------
    object
        What the method returns: ``(out, cache)`` for mechanisms.

    Raises
    ------
    ParameterError
        For an unknown key or backend.
    BackendUnavailable
        When the backend cannot run here.

    Examples
    --------
    >>> import attention_ref, numpy as np
    >>> x = np.eye(2)
    >>> out, cache = attention_ref.run("scores/dot_product", x, x, x, scale=0.0)
    >>> out.tolist()
    [[0.5, 0.5], [0.5, 0.5]]
    """
    forward, _ = choose(get(key), backend)
    return forward(*args, **kwargs)
