"""Stubs of a row: the files it owes, with the headings to fill in and nothing that works yet.

A stub raises NotImplementedError in every function, so no check of it can be green.
"""

import textwrap
from pathlib import Path
from string import Template
from typing import NamedTuple

from attention_ref.core.errors import ParameterError
from attention_ref.core.registry import catalog, nearest


class Shape(NamedTuple):
    """A kind of row: the class of its SPEC, its main function, what its tests owe."""

    spec: str
    role: str
    arguments: str
    returns: str
    tests: tuple
    backward: bool = False


_ATTENTION = (
    'q, k, v, *, mask=None, causal=False, align="lower_right", scale=None, softcap=None,\n'
    '    bias=None, empty_row="zero",'
)
_MECHANISM = (
    "worked_example: absolute numbers, worked out by hand in the docstring",
    "reduces_to_another_row: better as data in SPEC.reduces_to",
    "second_identity: one that at least one mutant breaks",
    "limits: scale 0, one key, a window of all keys ...",
)
KINDS = {
    "mechanism": Shape("Mechanism", "forward", _ATTENTION, "out : ndarray, shape (..., T, E)",
                       _MECHANISM, True),
    "module": Shape("Module", "forward", "x, w_q, w_k, w_v, w_o, *, mask=None, causal=False,",
                    "out : ndarray, shape (..., T, D)", _MECHANISM, True),
    "regularizer": Shape(
        "Regularizer", "forward", "p, *, weight=1.0,", "loss : ndarray, shape ()",
        ("worked_example: absolute numbers", "expectation: over masks, or the loss by hand",
         "limits: strength 0", "effect_on_a_trained_toy_model"), True),
    "policy": Shape(
        "Policy", "select", "state, scores, budget,", "kept : int ndarray, shape (..., budget)",
        ("budget_is_respected", "causal: no kept index lies ahead", "keep_all_equals_dense",
         "ties_are_deterministic", "trace: step by step, worked out by hand")),
    "edit": Shape(
        "Edit", "edit", "maps, *, strength=1.0,", "maps : ndarray, shape (..., T, S)",
        ("worked_example", "strength_zero_is_the_identity", "row_sums: as the paper says",
         "untouched_region_is_bit_equal")),
    "analysis": Shape(
        "Analysis", "score", "p,", "scores : ndarray",
        ("worked_example", "planted_truth: a model built to hold the structure is found out",
         "invariances")),
    "theory": Shape(
        "Theory", "construct", "n,", "object : ndarray, what the theorem speaks of",
        ("bound_holds", "limit_is_approached_at_the_stated_rate", "counterexample_fails")),
    "task": Shape(
        "Task", "generate", "rng, n,", "sample : NamedTuple",
        ("rules_hold_on_every_sample", "perfect_solver_scores_one",
         "blind_solver_scores_chance")),
    "training": Shape(
        "Training", "step", "parameters, gradient, *, rate,", "parameters : dict",
        ("closed_form_on_a_quadratic", "limits: rate 0")),
}  # fmt: skip


def new(key, root):
    """Write the stubs of one row of the catalog.

    Parameters
    ----------
    key : str
        ``family/slug``, a row of the catalog.
    root : str or Path
        The source checkout.

    Returns
    -------
    list of Path
        What was written, relative to ``root``.

    Raises
    ------
    ParameterError
        For a key that is not in the catalog, a survey (a page, no method), or files that exist.
    """
    entry = catalog().get(key)
    if entry is None:
        near = nearest(str(key))
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "see catalog.toml"
        raise ParameterError(f"key {key!r} is not in the catalog, expected family/slug; {hint}")
    if entry["kind"] not in KINDS:
        raise ParameterError(
            f"key {key!r} is a {entry['kind']}, expected a method; hint: it owes one page in docs/"
        )
    root, (family, slug) = Path(root), key.split("/")
    texts = {
        f"attention_ref/methods/{key}.py": method_text(key, entry),
        f"tests/methods/{family}/test_{slug}.py": tests_text(key, entry),
        f"tutorials/{key}.py": tutorial_text(key, entry),
    }
    there = [path for path in texts if (root / path).exists()]
    if there:
        raise ParameterError(f"key {key!r} has {', '.join(there)}, expected no file to overwrite")
    package = f"attention_ref/methods/{family}/__init__.py"
    if not (root / package).exists():
        texts[package] = '"""TODO: what this family changes, one paragraph with a formula."""\n'
    for path, text in texts.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")
    return [Path(path) for path in texts]


def method_text(key, entry):
    """The method file: docstring, cache, functions with all headings, SPEC."""
    kind, slug = KINDS[entry["kind"]], key.split("/")[1]
    main = f"{slug}_{kind.role}"
    names = [a.strip(" *\n").split("=")[0] for a in kind.arguments.split(",")]
    parameters = "".join(f"    {n} : TODO\n        TODO.\n" for n in names if n)
    sheet = {
        "slug": slug, "key": key, "main": main, "role": kind.role, "spec": kind.spec,
        "title": _wrap(entry["title"]), "grade": entry["grade"],
        "arguments": kind.arguments, "parameters": parameters, "returns": kind.returns,
        "cache": Template(_CACHE).substitute(slug=slug) if kind.backward else "",
        "returns_cache": "    cache : Cache\n        For the backward.\n" if kind.backward else "",
        "backward": Template(_BACKWARD).substitute(slug=slug, main=main) if kind.backward else "",
        "backward_field": f"    backward={slug}_backward,\n" if kind.backward else "",
        "example": "core.examples.attention" if kind.spec == "Mechanism" else "examples",
        "flags": "core.SOFTMAX_FLAGS" if kind.spec == "Mechanism" else "",
        "examples": "" if kind.spec == "Mechanism" else _EXAMPLES,
        "typing": "from typing import NamedTuple\n\n" if kind.backward else "",
        "numpy": "import numpy as np\n\n" if kind.backward else "",
        "reconstruction": "    reconstruction=\"TODO: only the abstract was available; the choices "
        "made.\",\n" if entry["grade"] == "D" else "",
    }  # fmt: skip
    return Template(_METHOD).substitute(sheet)


def tests_text(key, entry):
    """The test file: the slow loop and one failing test for each thing that the kind owes."""
    kind, (_, slug) = KINDS[entry["kind"]], key.split("/")
    tests = ""
    for name, _, words in (owed.partition(":") for owed in kind.tests):
        comment = f"    #{words}\n" if words else ""
        tests += f'\n\ndef test_{name}():\n{comment}    pytest.fail("not written yet")\n'
    return Template(_TESTS).substitute(key=key, slug=slug, title=_wrap(entry["title"]), tests=tests)


def tutorial_text(key, entry):
    """The tutorial: derivation, check of gradients, claim before experiment, figure."""
    title = entry["title"]
    line = "=" * len(title)
    gradients = _GRADIENTS if KINDS[entry["kind"]].backward else ""
    return Template(_TUTORIAL).substitute(
        key=key,
        line=line,
        title=title,
        gradients=gradients,
        noqa="  # noqa: E501" * (len(title) > 100),
    )


def _wrap(text):
    return textwrap.fill(text, 92)


_METHOD = '''r"""TODO: one line on what changes against softmax attention.

$title

.. math::

    TODO &= TODO                                                 &(1)\\\\
    TODO &= TODO                                                 &(2)

TODO: one sentence of consequence.

Source: TODO paper, equation, official file read; grade $grade.
"""

${typing}${numpy}from attention_ref import core
$cache

def $main(
    $arguments
):  # fmt: skip
    """TODO: summary in one line.

    Parameters
    ----------
$parameters
    Returns
    -------
    $returns
        TODO.
$returns_cache
    Raises
    ------
    ShapeError
        TODO.

    Notes
    -----
    TODO: choices; where paper and code differ.

    Source
    ------
    $key in the catalog; TODO equation; grade $grade.

    References
    ----------
    TODO.

    Examples
    --------
    TODO: a small example with numbers that can be checked in the head.
    """
    # Checks at the door (core.check), then quarantine, then the numbered steps: # (1), # (2) ...
    raise NotImplementedError("$key")
$backward$examples

SPEC = core.$spec(
    key="$key",
    $role=$main,
$backward_field    example=$example,
    flags=frozenset($flags),  # the relations that hold: attention_ref.kit.checks
    claim="TODO: the claim that the tutorial measures, one sentence.",
    verified_by=("slow loop",),
$reconstruction)
'''

_CACHE = '''

class Cache(NamedTuple):
    """What the backward needs, each with its shape."""

    q: np.ndarray  # (..., T, D), rows with NaN or infinity replaced by zeros
    k: np.ndarray  # (..., S, D), likewise
    v: np.ndarray  # (..., S, E), likewise
    p: np.ndarray  # (..., T, S), weights
    live: np.ndarray  # (..., T, S), True = may attend
    poison: np.ndarray  # (..., T, 1), rows that are NaN
'''

_BACKWARD = '''

def ${slug}_backward(dout, cache):
    """Gradients of :func:`$main`, its steps read from the bottom up.

    Parameters
    ----------
    dout : ndarray, shape of the output
        Gradient of the output.
    cache : Cache
        From the forward.

    Returns
    -------
    dict
        Under the name of every float array argument.
    """
    # The steps of the forward in reverse: # (2'), # (1').
    raise NotImplementedError("${slug}_backward")
'''

_EXAMPLES = '''

def examples(rng):
    """Example inputs.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of the numbers.

    Returns
    -------
    dict
        Case -> keyword arguments, every length different, all options of the method.
    """
    return {"plain": {}}  # TODO
'''

_TESTS = '''"""What is particular to $key.

$title
"""

import numpy as np
import pytest

import attention_ref
from attention_ref.kit import tree
from attention_ref.kit.checks import cases


def slow_$slug(**kwargs):
    """One number at a time, from the paper's formula, with math and indexing only."""
    raise NotImplementedError("slow loop of $key")


def test_equals_the_slow_loop():
    spec = attention_ref.get("$key")
    for case, kwargs in cases(spec).items():
        found = tree.flatten(spec.call(kwargs)[0])
        want = tree.flatten(slow_$slug(**kwargs))
        for name, a in found.items():
            np.testing.assert_allclose(a, want[name], rtol=0, atol=1e-13, err_msg=case)
$tests
# An oracle, where there is one: @pytest.mark.oracle, pytest.importorskip("torch", reason=...),
# and the reason as a line of tests/allowed_skips.txt. The README's table names the row too.
'''

_TUTORIAL = '''"""
$title
$line

TODO: the question, in three sentences.
"""$noqa

# %%
# What changes
# ------------
# TODO: the derivation; equations carry the numbers of the method file.

import numpy as np

import attention_ref
from attention_ref.kit.tutorial import Tutorial

tutorial = Tutorial(__file__)
spec = attention_ref.get("$key")
rng = np.random.default_rng(0)
$gradients
# %%
# The claim
# ---------
# The criterion and its threshold stand here, before the experiment.

tutorial.claim(spec.claim, criterion="TODO: the condition with its threshold")

# %%
# The experiment
# --------------
# TODO: three seeds; under tutorial.quick at most 2 s in all.

raise NotImplementedError("$key")
# tutorial.measured(ours=[...], verdict="reproduced", tolerance=0.05)

# %%
# Exercises
# ---------
# **1. Write this backward yourself.** TODO: what is given, what is asked.


def my_backward(dout, cache):
    """Return the gradients, a dict under the names of the arguments."""
    # solution: return None
    return spec.backward(dout, cache)  # TODO: written out, in other words than the library's
    # end of solution


# tutorial.exercise(1, my_backward(dout, cache), spec.backward(dout, cache))

# %%
# **2. TODO.** **3. TODO.** Each in a cell of its own.

# %%
# **Solution 2.** Cells that begin like this one are taken out of the student's copy.

# tutorial.finish(figure)
'''

_GRADIENTS = """
# %%
# Forward and backward
# --------------------
# TODO: the steps once more, upwards.

tutorial.gradients(spec, next(iter(spec.example(rng).values())))
"""
