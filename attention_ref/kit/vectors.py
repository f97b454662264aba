"""One case of one row in one dtype: inputs, truth, gradients, tolerances, and how to compare.

    import pytest
    from attention_ref import kit

    @pytest.mark.parametrize("case", kit.cases("heads/multi_query", supports=("causal", "scale")))
    def test_my_kernel(case):
        out, grads = my_kernel(**case.inputs, dout=case.dout)
        case.assert_matches(out, grads)

The truth is computed in extended precision from inputs on the grid of the dtype; the tolerance is
a multiple of the error that the plain implementation makes in that dtype.
"""

import functools
import inspect

import numpy as np

from attention_ref.core import check as door
from attention_ref.core.registry import get
from attention_ref.kit import checks, conform, diagnose, inputs, lowp, tree
from attention_ref.kit.adapters import check_options, to_numpy
from attention_ref.kit.compare import CheckFailure, scales
from attention_ref.kit.inputs import is_float


class Case:
    """Inputs and truth of one case; pytest shows it as ``<case>-<dtype>``.

    Attributes
    ----------
    key, name, dtype : str
        The row, the case, the dtype.
    options : dict
        Arguments that are no floating arrays: masks, flags, numbers.
    needs : frozenset of str
        Optional arguments that the case uses.
    """

    def __init__(self, spec, name, kwargs, dtype, rule=None, sizes=None):
        self._sizes = sizes
        self.spec, self.key, self.name, self.dtype = spec, spec.key, name, dtype
        self._exact = {n: lowp.round_to(a, dtype).astype(np.float64) if is_float(a) else a
                       for n, a in kwargs.items()}  # fmt: skip
        self._rule = rule or {}
        self.options = {n: a for n, a in kwargs.items() if not is_float(a)}
        self.needs = frozenset(needed(spec, kwargs))
        self.__name__ = f"{name}-{dtype}"  # pytest takes it for the id

    def __repr__(self):
        shapes = ", ".join(f"{n} {a.shape}" if isinstance(a, np.ndarray) else f"{n}={a!r}"
                           for n, a in self._exact.items())  # fmt: skip
        return f"<{self.key} {self.__name__}: {shapes}>"

    @property
    def inputs(self):
        """Every argument in the words of the row, fresh copies; float arrays in the dtype.

        A bfloat16 array comes as float32 numbers that are exact in bfloat16.
        """
        return {
            n: _stored(a, self.dtype) if is_float(a) else a.copy() if hasattr(a, "copy") else a
            for n, a in self._exact.items()
        }

    @property
    def dout(self):
        """The random upstream gradient of the output, in the dtype."""
        return _stored(self._dout, self.dtype)

    def torch(self, device=None):
        """The inputs as tensors on a device, those that owe a gradient with ``requires_grad``."""
        import torch

        kind = getattr(torch, self.dtype)
        return {
            n: torch.tensor(a).to(device, kind).requires_grad_() if is_float(a)
            else torch.tensor(a).to(device) if isinstance(a, np.ndarray) else a
            for n, a in self.inputs.items()
        }  # fmt: skip

    # -------------------------------------------------------------------------- the truth

    @functools.cached_property
    def _true(self):
        out, cache, kind = conform.truth(self.spec, self._exact | self._rule, self.dtype)
        return out, cache, kind, tree.flatten(out)

    @functools.cached_property
    def main(self):
        """Name of the main output."""
        return next(iter(self._true[3]))

    @functools.cached_property
    def _dout(self):
        drawn = inputs.cotangent(self.spec, self.name, self.outs[self.main].shape)
        return lowp.round_to(drawn, self.dtype).astype(np.float64)

    @property
    def outs(self):
        """True outputs by name, float64 or integers."""
        return {n: a.astype(np.float64) if is_float(a) else a for n, a in self._true[3].items()}

    @property
    def out(self):
        """The true main output, float64."""
        return self.outs[self.main]

    @functools.cached_property
    def gradients(self):
        """True gradients by argument, float64; {} where the row has none."""
        if self.spec.backward_function is None or not is_float(self.out):
            return {}
        out, cache, kind, _ = self._true
        with door.extended():
            upstream = tree.like(out, {self.main: self._dout.astype(kind)})
            found = self.spec.backward_function(upstream, cache)
        return {n: g.astype(np.float64) for n, g in found.items()}

    @property
    def lse(self):
        """The true log-sum-exp, float64, or None where the row has none."""
        right = conform.log_sum_exp(self._true[1], self.out)
        return None if right is None else right.astype(np.float64)

    @functools.cached_property
    def plain(self):
        """Outputs and gradients of the plain implementation in the dtype: (outs, gradients).

        Name -> list of arrays: as it is, and with every step disturbed.
        """
        seed = checks.seed_of(f"{self.key}-{self.name}", 4)
        dout = self._dout if self.gradients else None
        return lowp.runs(self.spec, self._exact | self._rule, dout, self.dtype, seed)

    @functools.cached_property
    def tolerances(self):
        """Name -> {"plain": its error, "bound": what is allowed}, both absolute.

        Names are those of outputs, and "d" + argument for gradients.
        """
        outs, gradients = self.plain
        found, eps = {}, lowp.EPS[self.dtype]
        for name, want in self.outs.items():
            if is_float(want):
                found[name] = _allowed(outs[name], want, None, eps, conform.FORWARD_RATIO,
                                       self.dtype)  # fmt: skip
        size = scales(self.gradients)
        for name, want in self.gradients.items():
            found["d" + name] = _allowed(gradients[name], want, size[name], eps,
                                         conform.GRADIENT_RATIO, self.dtype)  # fmt: skip
        return found

    # -------------------------------------------------------------------------- comparing

    def assert_matches(self, output, grads=None, lse=None):
        """Compare a result with the truth; the failure names what it looks like.

        Parameters
        ----------
        output : array of any framework
            The output, in the layout of the row.
        grads : dict or sequence, optional
            Gradients by argument, or in the order of the floating arguments; None compares the
            output only.
        lse : array, optional
            Log-sum-exp, compared where a row has keys.

        Raises
        ------
        CheckFailure
            An AssertionError: what differs, by how much, where, what was allowed, and which known
            mistake fits.
        """
        got = to_numpy(output)
        self._compare(self.main, got, self.outs[self.main])
        if lse is not None:
            self._compare_lse(to_numpy(lse))
        if grads is None:
            return
        if not isinstance(grads, dict):
            owed = [n for n, a in self._exact.items() if is_float(a)]
            grads = dict(zip(owed, grads, strict=False))
        found = {n: None if g is None else to_numpy(g) for n, g in grads.items()}
        for name, want in self.gradients.items():
            if found.get(name) is None:
                if np.any(want):
                    raise CheckFailure(f"{self._title()}: d{name} is missing")
                continue
            self._compare("d" + name, found[name], want, found)

    def _title(self):
        return f"{self.key}, case {self.name}, {self.dtype}"

    def _compare(self, what, got, want, found=None):
        if not is_float(want):
            if not (got.shape == want.shape and np.array_equal(got, want)):
                says = diagnose.trace(got, want) if self.spec.kind == "policy" else ""
                if not says.startswith("the same tokens"):
                    raise CheckFailure(f"{self._title()}: {what} differs; {says}".rstrip("; "))
            return
        bound = self.tolerances[what]
        fits = got.shape == want.shape and np.array_equal(np.isnan(got), np.isnan(want))
        if fits:
            with np.errstate(invalid="ignore"):
                gap = np.abs(got.astype(float) - want)
            gap = np.where((got == want) | np.isnan(want), 0.0, gap)
            if np.all(gap <= bound["bound"]):
                return
        arguments = self._exact | self._rule
        if found is None:
            says = diagnose.forward(got.astype(float), want, self.spec, arguments, self.dtype)
        else:
            wide = {n: g.astype(float) for n, g in found.items()
                    if g is not None and n in self.gradients}  # fmt: skip
            says = diagnose.backward(wide, self.gradients, self.spec, arguments, self._dout)
        text = f"{self._title()}: {what} is wrong: {says}"
        if got.shape == want.shape and want.size:
            place, ours, right = diagnose.worst(got, want)
            text += f"\n  worst at {place}: got {ours:.8g}, expected {right:.8g}"
            text += f", off by {abs(ours - right):.3g}"
        text += f"\n  allowed {bound['bound']:.3g}; the plain implementation is off by "
        text += f"{bound['plain']:.3g}\n  the case alone: kit.cases({self.key!r}, "
        more = f", sizes={self._sizes}" if self._sizes else ""
        raise CheckFailure(text + f"names=[{self.name!r}], dtypes=[{self.dtype!r}]{more})")

    def _compare_lse(self, got):
        right = self.lse
        if right is None:
            raise CheckFailure(f"{self._title()}: the row has no log-sum-exp")
        if got.shape != right.shape:
            raise CheckFailure(f"{self._title()}: lse has shape {got.shape}, "
                               f"expected {right.shape}")  # fmt: skip
        full = np.isfinite(right)
        eps = max(lowp.EPS[self.dtype], 2.0**-23 if self.dtype != "float64" else 0.0)
        limit = 64 * eps * max(float(np.max(np.abs(right[full]), initial=0.0)), 1.0)
        if not np.all(np.abs(got[full] - right[full]) <= limit):
            says = diagnose.lse(got.astype(float), right, self._exact | self._rule, self.spec)
            raise CheckFailure(f"{self._title()}: {says}; allowed {limit:.3g}")


def _stored(a, dtype):
    return lowp.round_to(a, dtype).astype("float32" if dtype == "bfloat16" else dtype)


def _allowed(plain, want, size, eps, ratio, dtype):
    finite = np.isfinite(want)
    if size is None:
        size = float(np.max(np.abs(want[finite]), initial=0.0))
    with np.errstate(invalid="ignore"):
        gaps = [np.abs(a.astype(float) - want) for a in plain]
    off = max(float(np.max(gap[finite & np.isfinite(gap)], initial=0.0)) for gap in gaps)
    return {"plain": off, "bound": max(ratio * off, conform.FLOOR[dtype] * eps * size)}


def needed(spec, kwargs):
    """Optional arguments that a call uses away from their defaults."""
    parameters = inspect.signature(spec.main).parameters
    for name, a in kwargs.items():
        default = getattr(parameters.get(name), "default", inspect.Parameter.empty)
        if default is inspect.Parameter.empty or a is None:
            continue
        if isinstance(a, np.ndarray) or a != default:
            yield name


def cases(
    key, *, dtypes=("float64", "float32"), names=None, supports=None, conventions=None, sizes=None,
):  # fmt: skip
    """The cases of a row for ``pytest.mark.parametrize``, with ids like ``causal-float32``.

    Parameters
    ----------
    key : str
        The row.
    dtypes : tuple of str
        "float64", "float32", "float16", "bfloat16".
    names : collection of str, optional
        Only these cases.
    supports : collection of str, optional
        Optional arguments that your function has; cases that use others are left out.
    conventions : dict, optional
        As in :func:`attention_ref.kit.check`: ``align``, ``empty_row``, ``same_width``.
    sizes : dict, optional
        As in :func:`attention_ref.kit.check`: letter -> length, for every case.

    Returns
    -------
    list of Case

    Raises
    ------
    ParameterError
        For an unknown key, dtype, case or convention.

    Examples
    --------
    >>> from attention_ref import kit
    >>> [c.__name__ for c in kit.cases("scores/dot_product", names=["square"])]
    ['square-float64', 'square-float32']
    """
    spec, conventions = get(key), dict(conventions or {})
    check_options("numpy", "BHTD", conventions)
    every = inputs.examples(spec, conventions)
    every = {n: inputs.resize(k, sizes) if sizes else k for n, k in every.items()}
    for dtype in dtypes:
        door.option("dtypes", dtype, conform.DTYPES)
    for name in names or ():
        door.option("names", name, tuple(every))
    parameters = inspect.signature(spec.main).parameters
    rule = {n: conventions[n] for n in ("align", "empty_row")
            if n in conventions and n in parameters}  # fmt: skip
    found = [
        Case(spec, name, kwargs, dtype, rule, sizes)
        for name, kwargs in every.items() if names is None or name in names
        for dtype in dtypes
    ]  # fmt: skip
    return [c for c in found if supports is None or c.needs <= set(supports)]
