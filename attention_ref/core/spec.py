"""SPEC: the one record a method file ends with, from which everything else follows.

One class a kind, because a kind decides which functions a row owes (see :data:`KINDS`). A record
holds functions and facts, nothing else: no state, no dispatch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

SOFTMAX_FLAGS = (
    "attention", "causal", "masked", "permutation_equivariant", "row_stochastic", "linear_in_v",
    "scaled", "shift_invariant",
)  # fmt: skip
"""The relations of plain softmax attention; what they mean stands in ``kit/checks.py``."""


class Reduction(NamedTuple):
    """An identity as data: on ``kwargs`` this method equals another one.

    ``kwargs(rng)`` gives the arguments of this method, ``other(kwargs)`` those of the method at
    ``key``; both outputs must agree within ``eps`` roundings, and so must the gradients of the
    arguments they share. ``other_out(out)`` may reshape the other's output.
    """

    key: str
    says: str
    kwargs: Callable
    other: Callable
    eps: float = 64.0
    compare: Callable = lambda out, other_out: (out, other_out)
    gradients: bool = True


class Backend(NamedTuple):
    """A fast path: the same call as the reference forward, and its backward."""

    forward: Callable
    backward: Callable | None = None


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What a row says about itself.

    Parameters
    ----------
    key : str
        ``family/slug``; equals the path of the file.
    example : callable
        ``example(rng) -> {case: kwargs}``, float64, all lengths different. A value under the
        keyword ``rng`` is an integer seed, turned into a Generator at every call.
    claim : str
        The claim the tutorial measures, one sentence.
    verified_by : tuple of str
        The routes that share no code with the method: "slow loop", "PyTorch", ...
    flags : frozenset of str
        Which generic relations apply (:mod:`attention_ref.kit.checks` lists them).
    tokens : dict
        Further arguments with a key axis, and that axis, e.g. ``{"b": -1}``; where it depends on
        the call, a function of the keyword arguments.
    visible : callable, optional
        ``visible(kwargs) -> bool (..., T, S)``: who sees whom, where a pattern of the method's own
        joins ``mask`` and ``causal``.
    opt_out : dict
        Check -> printed reason why it does not apply; at most two.
    reduces_to : tuple of Reduction
        Identities over registered keys.
    forms : dict
        Name -> function with the forward's arguments and output, sharing no step above core.
    reconstruction : str
        Not empty when only an abstract was available: the choices made.
    """

    key: str
    example: Callable
    claim: str
    verified_by: tuple[str, ...]
    flags: frozenset[str] = frozenset()
    tokens: dict[str, int | Callable] = field(default_factory=dict)
    visible: Callable | None = None
    opt_out: dict[str, str] = field(default_factory=dict)
    reduces_to: tuple[Reduction, ...] = ()
    forms: dict[str, Callable] = field(default_factory=dict)
    numba: Backend | None = None
    cuda: Backend | None = None
    reconstruction: str = ""

    kind = ""
    role = ""

    @property
    def main(self) -> Callable:
        """The function a reader calls first: forward, select, edit, score, ..."""
        return getattr(self, self.role)

    @property
    def backward_function(self) -> Callable | None:
        """The backward, or None where the kind owes none."""
        return getattr(self, "backward", None)

    def call(self, kwargs: dict) -> tuple[Any, Any]:
        """Call the main function on one example: (out, cache), cache None without a backward."""
        import numpy as np

        if isinstance(kwargs.get("rng"), int):
            kwargs = kwargs | {"rng": np.random.default_rng(kwargs["rng"])}
        result = self.main(**kwargs)
        return result if self.backward_function is not None else (result, None)


@dataclass(frozen=True, kw_only=True)
class Mechanism(Spec):
    """``forward(...) -> (out, cache)`` and ``backward(dout, cache) -> {argument: gradient}``."""

    forward: Callable
    backward: Callable
    kind = "mechanism"
    role = "forward"


@dataclass(frozen=True, kw_only=True)
class Module(Mechanism):
    """A mechanism that carries its own projections or convolutions as arguments."""

    kind = "module"


@dataclass(frozen=True, kw_only=True)
class Regularizer(Mechanism):
    """A loss or noise on attention; a stochastic one takes ``rng``."""

    kind = "regularizer"


@dataclass(frozen=True, kw_only=True)
class Policy(Spec):
    """``select(...) -> kept indices`` from (state, scores, budget); ``attend`` over the kept."""

    select: Callable
    attend: Callable | None = None
    kind = "policy"
    role = "select"


@dataclass(frozen=True, kw_only=True)
class Edit(Spec):
    """``edit(maps, ...) -> maps``; a backward where the paper optimises through it."""

    edit: Callable
    backward: Callable | None = None
    kind = "edit"
    role = "edit"


@dataclass(frozen=True, kw_only=True)
class Analysis(Spec):
    """``score(arrays) -> scores`` that read attention."""

    score: Callable
    kind = "analysis"
    role = "score"


@dataclass(frozen=True, kw_only=True)
class Theory(Spec):
    """``construct(...)``: the object of the theorem; ``quantities``: its other named functions."""

    construct: Callable
    quantities: dict[str, Callable] = field(default_factory=dict)
    kind = "theory"
    role = "construct"


@dataclass(frozen=True, kw_only=True)
class Task(Spec):
    """``generate(rng, ...)``: samples of a synthetic benchmark."""

    generate: Callable
    kind = "task"
    role = "generate"


@dataclass(frozen=True, kw_only=True)
class Training(Spec):
    """``step(parameters, gradient, ...)``: one step as a pure function."""

    step: Callable
    kind = "training"
    role = "step"


KINDS = {
    c.kind: c
    for c in (Mechanism, Module, Regularizer, Policy, Edit, Analysis, Theory, Task, Training)
}
