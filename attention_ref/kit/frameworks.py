"""What the attention functions of other frameworks mean by the same words, as data."""

import functools
import tomllib
from pathlib import Path

from attention_ref.core import check


@functools.cache
def _table():
    with open(Path(__file__).with_name("frameworks.toml"), "rb") as file:
        return tomllib.load(file)


def questions():
    """Column -> what it asks, in the order of the table."""
    return dict(_table()["questions"])


def conventions(name=None):
    """The conventions of one framework's attention, or of all.

    Parameters
    ----------
    name : str, optional
        "torch_sdpa", "torch_mha", "jax", "onnx", "flash_attention", "mlx", "flashinfer",
        "attention_ref".

    Returns
    -------
    dict
        Question -> answer; "asserted" lists the cells that a test measures, "source" and
        "version" say where the others were read, "check" holds arguments for ``kit.check``.

    Raises
    ------
    ParameterError
        For an unknown name.

    Examples
    --------
    >>> from attention_ref import kit
    >>> kit.conventions("torch_sdpa")["causal"], kit.conventions("torch_sdpa")["check"]
    ('upper left', {'conventions': {'align': 'upper_left'}})
    """
    rows = {n: row for n, row in _table().items() if n != "questions"}
    if name is None:
        return rows
    check.option("name", name, tuple(rows))
    return rows[name]
