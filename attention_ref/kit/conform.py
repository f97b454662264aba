"""Test anybody's attention against the reference, and say what is wrong with it.

    from attention_ref import kit
    report = kit.check(my_attention, "scores/dot_product")
    print(report)                       # a table; report.ok, report.to_json()

``my_attention`` takes NumPy, PyTorch, JAX or CuPy arrays and returns the output (the first item of
a tuple). Gradients come from the framework, or from a backward that the caller passes. Where a
result is wrong, it is compared with the :mod:`~attention_ref.kit.zoo` of known mistakes, and the
one that fits is named.
"""

import inspect
import json
from typing import NamedTuple

import numpy as np

from attention_ref.core import check as door
from attention_ref.core.errors import ParameterError
from attention_ref.core.registry import get
from attention_ref.kit import checks, tree, zoo
from attention_ref.kit.compare import error, scales

ALIASES = {
    "q": ("q", "query", "queries", "Q"),
    "k": ("k", "key", "keys", "K"),
    "v": ("v", "value", "values", "V"),
    "mask": ("mask", "attn_mask", "attention_mask"),
    "causal": ("causal", "is_causal"),
    "scale": ("scale", "softmax_scale", "sm_scale"),
    "softcap": ("softcap", "soft_cap", "logits_soft_cap"),
    "bias": ("bias", "attn_bias"),
    "align": ("align",),
}
"""Our argument -> names under which other projects have it; the first that fits is used."""

SDPA = {"q": "query", "k": "key", "v": "value", "mask": "attn_mask", "causal": "is_causal",
        "scale": "scale"}  # fmt: skip
"""PyTorch's compiled function has no signature to read."""

FORWARD_RATIO, GRADIENT_RATIO = 2.0, 3.0
FLOOR = 64.0


class Line(NamedTuple):
    """One property of one case in one dtype."""

    case: str
    dtype: str
    what: str  # "out" or "d" + argument
    verdict: str  # "ok", "WRONG", "skipped"
    error: float  # eps of the dtype
    bound: float
    plain: float  # error of the plain implementation in the same dtype
    says: str
    repeat: str


class Report(list):
    """The lines of a check; prints as a table, knows whether everything conforms."""

    @property
    def ok(self):
        """Whether nothing is wrong and something was compared."""
        return any(x.verdict == "ok" for x in self) and not self.wrong

    @property
    def wrong(self):
        """The lines that do not conform."""
        return [x for x in self if x.verdict == "WRONG"]

    @property
    def named(self):
        """The distinct diagnoses, most frequent first."""
        said = [x.says for x in self.wrong if x.says]
        return sorted(set(said), key=lambda s: -said.count(s))

    def to_json(self):
        """The lines as JSON text."""
        return json.dumps({"ok": self.ok, "named": self.named,
                           "lines": [x._asdict() for x in self]}, indent=1)  # fmt: skip

    def __str__(self):
        head = ("case", "dtype", "what", "verdict", "error", "bound", "plain", "")
        rows = [
            (x.case, x.dtype, x.what, x.verdict, _short(x.error), _short(x.bound), _short(x.plain),
             x.says)
            for x in self
        ]  # fmt: skip
        widths = [max(len(r[i]) for r in (head, *rows)) for i in range(len(head))]
        text = "\n".join(
            "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip()
            for r in (head, *rows)
        )
        ending = "conforms" if self.ok else f"{len(self.wrong)} of {len(self)} lines are wrong"
        for says in self.named:
            ending += f"\n  {says}"
        if self.wrong:
            ending += f"\nto repeat the first: {self.wrong[0].repeat}"
        return f"{text}\n\n{ending}"


def _short(x):
    return "-" if x is None else f"{x:.3g}"


# ------------------------------------------------------------------------------ frameworks


def framework_of(fn):
    """The framework a function belongs to, from the module it comes from; NumPy if unknown."""
    module = getattr(inspect.unwrap(fn), "__module__", None) or ""
    name = getattr(fn, "__qualname__", "")
    for known in ("torch", "jax", "cupy"):
        if module.split(".")[0].lstrip("_").startswith(known):
            return known
    return "torch" if name == "scaled_dot_product_attention" else "numpy"


def _call(fn, kind, arrays, options, dout, backward):
    """Output and gradients (None without) of a foreign function, as NumPy arrays."""
    if kind == "torch":
        return _call_torch(fn, arrays, options, dout)
    if kind == "jax":
        return _call_jax(fn, arrays, options, dout)
    result = fn(**arrays, **options)
    out, cache = result if backward is not None else (_first(result), None)
    gradients = None
    if backward is not None and dout is not None:
        gradients = backward(_like(out, dout), cache)
    return np.asarray(_first(out)), gradients


def _first(result):
    return result[0] if isinstance(result, (tuple, list)) else result


def _call_torch(fn, arrays, options, dout):
    import torch

    given = {n: torch.tensor(a) for n, a in arrays.items()}
    options = {n: torch.tensor(a) if isinstance(a, np.ndarray) else a for n, a in options.items()}
    for t in given.values():
        t.requires_grad_(dout is not None and t.is_floating_point())
    out = _first(fn(**given, **options))
    if dout is None or not out.requires_grad:
        return out.detach().numpy(), None
    out.backward(torch.tensor(dout))
    zero = {n: np.zeros(t.shape, arrays[n].dtype) for n, t in given.items()}
    return out.detach().numpy(), {
        n: zero[n] if t.grad is None else t.grad.numpy() for n, t in given.items()
    }


def _call_jax(fn, arrays, options, dout):
    import jax

    with jax.enable_x64(True):
        given = {n: jax.numpy.asarray(a) for n, a in arrays.items()}
        options = {
            n: jax.numpy.asarray(a) if isinstance(a, np.ndarray) else a for n, a in options.items()
        }
        out, pull = jax.vjp(lambda given: _first(fn(**given, **options)), given)
        if dout is None:
            return np.asarray(out), None
        (gradients,) = pull(jax.numpy.asarray(dout, out.dtype))
        return np.asarray(out), {n: np.asarray(g) for n, g in gradients.items()}


# ------------------------------------------------------------------------------ the cases


def _names(fn, kind, names):
    """Our names -> theirs, from the caller, a known function, or the signature."""
    if names is not None:
        return dict(names)
    if getattr(fn, "__name__", "") == "scaled_dot_product_attention":
        return dict(SDPA)
    try:
        parameters = inspect.signature(fn).parameters
    except (TypeError, ValueError):
        raise ParameterError(
            "names is needed: the function has no readable signature; "
            "hint: names={'q': 'query', 'k': 'key', 'v': 'value', ...}"
        ) from None
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return {n: n for n in ALIASES} | {n: n for n in parameters if n in ALIASES}
    found = {}
    for ours, aliases in ALIASES.items():
        fitting = [alias for alias in aliases if alias in parameters]
        if fitting:
            found[ours] = fitting[0]
    return found | {n: n for n in parameters if n not in found.values()}


def _cases(spec, conventions):
    """The row's examples, and for softmax attention those that tell mistakes apart."""
    examples = _examples(spec)
    for kwargs in examples.values():
        if kwargs.get("align") == conventions.get("align", "lower_right"):
            del kwargs["align"]
        if conventions.get("same_width"):
            v = kwargs["v"]
            more = -(-kwargs["k"].shape[-1] // v.shape[-1])
            kwargs["v"] = np.concatenate([v + i for i in range(more)], -1)
            kwargs["v"] = kwargs["v"][..., : kwargs["k"].shape[-1]]
    return examples


def _examples(spec):
    examples = checks.cases(spec)
    if spec.key not in ("scores/dot_product", "heads/multi_query"):
        return {n: dict(kwargs) for n, kwargs in examples.items()}
    chosen = {n: _four_axes(kwargs) for n, kwargs in examples.items()}
    rng = np.random.default_rng(checks.seed_of(spec.key, 2))
    square = {n: rng.standard_normal((1, 2, 5, 4)) for n in "qkv"}
    chosen["square"] = square | {"scale": 0.7}
    chosen["square-causal"] = square | {"scale": 0.7, "causal": True}
    chosen["huge"] = {n: a.copy() for n, a in square.items()} | {"scale": 0.7}
    chosen["huge"]["q"][..., 0], chosen["huge"]["k"][..., 0] = 10.0, 150.0  # all scores near 1050
    ones = np.ones((5, 5), bool)
    ones[2] = False
    chosen["empty-row"] = square | {"scale": 0.7, "mask": ones}
    wide = np.zeros((1, 2, 5, 4)) + np.arange(4.0)
    chosen["read-only"] = {n: _frozen(a) for n, a in square.items()} | {"scale": 0.7}
    chosen["odd"] = {"q": wide[..., :3] * 0.1 + square["q"][..., :3],
                     "k": square["k"][..., :3], "v": square["v"][..., :1]}  # fmt: skip
    return chosen


def _four_axes(kwargs):
    """(H, T, D) to (1, H, T, D): most kernels take four axes and no fewer."""
    return {
        n: a.reshape((1,) * (4 - a.ndim) + a.shape) if n in "qkv" else a for n, a in kwargs.items()
    }


def _frozen(a):
    a = a.copy()
    a.flags.writeable = False
    return a


def _swap(a, layout):
    return np.ascontiguousarray(np.swapaxes(a, -2, -3)) if layout == "BTHD" else a


# ------------------------------------------------------------------------------ check


def check(
    fn, key="scores/dot_product", *, backward=None, framework=None, layout="BHTD", names=None,
    dtypes=("float64", "float32"), gradients=True, cases=None, fixed=None, conventions=None,
):  # fmt: skip
    """Compare a function with a method of this library: output and every gradient.

    Parameters
    ----------
    fn : callable
        Called with arrays of its framework under its own argument names; returns the output, or
        a tuple that begins with it. With ``backward`` it returns ``(out, cache)``.
    key : str
        The method it should equal.
    backward : callable, optional
        ``backward(dout, cache) -> {argument: gradient}`` for functions on NumPy arrays; gradients
        of PyTorch and JAX come from their autodiff.
    framework : {"numpy", "torch", "jax", "cupy"}, optional
        Guessed from the module of ``fn`` by default.
    layout : {"BHTD", "BTHD"}
        Where its head axis stands.
    names : dict, optional
        Our argument names -> its names; guessed from the signature by default.
    dtypes : tuple of str
        Which dtypes to try.
    gradients : bool
        Whether to compare gradients.
    cases : collection of str, optional
        Only these cases.
    fixed : dict, optional
        Further arguments for every call, e.g. ``{"enable_gqa": True}``.
    conventions : dict, optional
        What it does by convention: ``align``, ``empty_row`` (as in the method), ``same_width``
        (it wants E = D), ``precision`` ("float32": it computes in float32 inside).

    Returns
    -------
    Report
        Prints as a table.

    Raises
    ------
    ParameterError
        For an unknown key, framework, layout, or a function whose names cannot be guessed.

    Examples
    --------
    >>> from attention_ref import get, kit
    >>> spec = get("scores/dot_product")
    >>> kit.check(spec.forward, backward=spec.backward).ok
    True
    """
    spec = get(key)
    framework = framework or framework_of(fn)
    door.option("framework", framework, ("numpy", "torch", "jax", "cupy"))
    door.option("layout", layout, ("BHTD", "BTHD"))
    names, conventions = _names(fn, framework, names), dict(conventions or {})
    report = Report()
    for case, kwargs in _cases(spec, conventions).items():
        if cases is not None and case not in cases:
            continue
        unknown = [n for n, a in kwargs.items() if n not in names and a is not None]
        for dtype in dtypes:
            if unknown:
                says = f"it has no argument for {', '.join(unknown)}"
                report.append(Line(case, dtype, "out", "skipped", None, None, None, says, ""))
                continue
            report += _one(spec, fn, framework, layout, names, case, kwargs, dtype,
                           backward, gradients, fixed or {}, conventions)  # fmt: skip
    return report


def _one(spec, fn, framework, layout, names, case, kwargs, dtype, backward, gradients, fixed,
         conventions):  # fmt: skip
    given = {n: a.astype(dtype) if _is_float(a) else a for n, a in kwargs.items()}
    rule = {n: conventions[n] for n in ("align", "empty_row") if n in conventions}
    rule = {n: a for n, a in rule.items() if n in inspect.signature(spec.main).parameters}
    exact = {n: a.astype(np.float64) if _is_float(a) else a for n, a in given.items()} | rule
    truth, cache, true = _truth(spec, exact)
    want = tree.flatten(truth)["out"]
    rng = np.random.default_rng(checks.seed_of(f"{spec.key}-{case}", 3))
    dout = rng.standard_normal(want.shape).astype(dtype)
    wants_gradient = gradients and spec.backward_function and (framework in ("torch", "jax")
                                                               or backward)  # fmt: skip
    repeat = f"kit.check(fn, {spec.key!r}, cases=[{case!r}], dtypes=[{dtype!r}])"
    try:
        out, found = _foreign(fn, framework, layout, names, given, fixed,
                              dout if wants_gradient else None, backward)  # fmt: skip
    except Exception as failure:
        says = f"it raised {type(failure).__name__}: {str(failure).splitlines()[0][:100]}"
        return [Line(case, dtype, "out", "WRONG", np.inf, None, None, says, repeat)]
    inside = max(dtype, conventions.get("precision", dtype), key=_roughness)
    low = {n: a.astype(inside) if _is_float(a) else a for n, a in given.items()}
    plain, plain_cache = spec.call(low | rule)
    eps = float(np.finfo(inside).eps)
    lines = [_judge(case, dtype, "out", out, want, tree.flatten(plain)["out"], eps, FORWARD_RATIO,
                    None, repeat)]  # fmt: skip
    if lines[0].verdict == "WRONG":
        return [lines[0]._replace(says=_diagnose_forward(out, want.astype(float), exact, dtype))]
    if found is None:
        return lines
    wide = dout.astype(np.float64)
    with door.extended():
        right = spec.backward_function(_like(truth, wide.astype(true)), cache)
    right = {n: g.astype(np.float64) for n, g in right.items()}
    rough = spec.backward_function(_like(plain, dout.astype(inside)), plain_cache)
    size = scales(right)
    for name, g in right.items():
        if name in found:
            lines.append(_judge(case, dtype, "d" + name, found[name], g, rough[name], eps,
                                GRADIENT_RATIO, size[name], repeat))  # fmt: skip
    if any(x.verdict == "WRONG" for x in lines):
        says = _diagnose_backward(found, right, exact, wide)
        lines = [x._replace(says=says) if x.verdict == "WRONG" else x for x in lines]
    return lines


def _roughness(dtype):
    return np.finfo(dtype).eps


def _truth(spec, exact):
    """Output and cache in extended precision, so that float64 too has an error to compare with."""
    wide = {n: a.astype(np.longdouble) if _is_float(a) else a for n, a in exact.items()}
    try:
        with door.extended():
            return *spec.call(wide), np.longdouble
    except TypeError:  # a NumPy function without a longdouble version
        return *spec.call(exact), np.float64


def _is_float(a):
    return isinstance(a, np.ndarray) and a.dtype.kind == "f"


def _like(out, dout):
    return tree.like(out, {"out": dout})


def _foreign(fn, framework, layout, names, given, fixed, dout, backward):
    """Call it under its own names and layout; bring output and gradients back to ours."""
    heads = set("qkv") if layout == "BTHD" else set()
    arrays = {
        names[n]: _swap(a, layout) if n in heads else a for n, a in given.items() if _is_float(a)
    }
    options = {names[n]: a for n, a in given.items() if not _is_float(a)} | fixed
    upstream = None if dout is None else _swap(dout, layout)
    out, found = _call(fn, framework, arrays, options, upstream, backward)
    out = _swap(out, layout)
    if found is None:
        return out, None
    ours = {theirs: n for n, theirs in names.items()}
    found = {ours.get(n, n): np.asarray(g) for n, g in found.items()}
    return out, {n: _swap(g, layout) if n in heads else g for n, g in found.items()}


def _judge(case, dtype, what, got, want, plain, eps, ratio, scale, repeat):
    """At most ``ratio`` times the error of the plain implementation, and never less than 64 eps."""
    want = np.asarray(want, np.longdouble)
    size = scale if scale is not None else float(np.max(np.abs(want), initial=1e-300))
    ours, theirs = error(plain, want, size, eps), error(got, want, size, eps)
    bound = max(ratio * ours, FLOOR)
    verdict = "ok" if theirs <= bound else "WRONG"
    return Line(case, dtype, what, verdict, theirs, bound, ours, "", repeat)


# ------------------------------------------------------------------------------ diagnoses


def _diagnose_forward(out, want, kwargs, dtype):
    """The name of the mistake whose output this is, or what can be said without one."""
    if out.shape != want.shape:
        if sorted(out.shape) == sorted(want.shape):
            return f"output has shape {out.shape}, expected {want.shape}: axes in another order"
        return f"output has shape {out.shape}, expected {want.shape}"
    right, best = _distance(out, want), (1e-4, "")
    for bug, says in zoo.FORWARD.items():
        options = {n: a for n, a in kwargs.items() if n != "empty_row"}
        try:
            with np.errstate(all="ignore"):
                wrong, _ = zoo.attend(**options, bug=bug)
        except (TypeError, ValueError):
            break
        found = _distance(out, wrong) if wrong.shape == out.shape else np.inf
        if found < best[0] and found < 0.01 * right:
            best = (found, says)
    if best[1]:
        return best[1]
    distance = _distance(out, want)
    if dtype == "float64" and distance < 1e-5:
        return f"computes in lower precision inside: relative error {distance:.0e} for float64"
    if np.any(~np.isfinite(out)):
        return "has NaN or infinity where the reference is finite"
    place = np.unravel_index(np.argmax(np.abs(out - want)), out.shape)
    place = tuple(int(i) for i in place)
    return f"no known mistake fits; worst at {place}: {out[place]:.6g}, expected {want[place]:.6g}"


def _distance(a, b):
    if a.shape != b.shape or np.any(np.isnan(a) != np.isnan(b)):
        return np.inf
    gap = np.abs(np.where(np.isnan(a), 0, a) - np.where(np.isnan(b), 0, b))
    return float(np.max(gap, initial=0) / max(np.nanmax(np.abs(b), initial=0.0), 1e-300))


def _diagnose_backward(found, right, kwargs, dout):
    """The name of the mistake whose gradients these are."""
    options = {n: a for n, a in kwargs.items() if n != "empty_row"}
    for bug, says in zoo.BACKWARD.items():
        try:
            _, backward = zoo.attend(**options, bug=bug)
            wrong = backward(dout)
        except (TypeError, ValueError):
            break
        fits = all(_distance(found[n], wrong[n]) < 1e-3 for n in found if n in wrong)
        if fits and any(_distance(wrong[n], right[n]) > 1e-3 for n in right):
            return says
    off = [n for n in right if n in found and _distance(found[n], right[n]) > 1e-3]
    for n in off:
        ratio = _ratio(found[n], right[n])
        if ratio is not None:
            return f"d{n} is {ratio:.6g} times the right one"
    return f"no known mistake fits; wrong are {', '.join('d' + n for n in off) or 'the last bits'}"


def _ratio(a, b):
    """The constant factor between two arrays, if there is one."""
    if a.shape != b.shape or not np.any(b):
        return None
    factor = float(np.sum(a * b) / np.sum(b * b))
    return factor if np.allclose(a, factor * b, rtol=1e-4, atol=1e-6) else None
