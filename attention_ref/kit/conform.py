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
import sys
import time
from typing import NamedTuple

import numpy as np

from attention_ref.core import check as door
from attention_ref.core.registry import get
from attention_ref.kit import checks, diagnose, inputs, lowp, properties, tree
from attention_ref.kit.adapters import (
    Foreign,
    Refusal,
    check_options,
    framework_of,
    names_of,
    unwrap,
)
from attention_ref.kit.compare import error, scales
from attention_ref.kit.inputs import is_float

FORWARD_RATIO, GRADIENT_RATIO = 2.0, 3.0
FLOOR = {"float64": 64.0, "float32": 64.0, "float16": 4.0, "bfloat16": 4.0}
"""Roundings that are always allowed: two orders of the same sum differ by some."""
DTYPES = tuple(lowp.EPS)
SHRINK_SECONDS, DIAGNOSIS_SECONDS = 3.0, 10.0
LARGE = 20_000
"""Numbers in a case above which float32 and less is judged by float64: it has fast products."""
NAMED = 6
"""Diagnoses that are printed below the table; the table has them all."""


class Line(NamedTuple):
    """One property of one case in one dtype."""

    case: str  # "-" for a property that stands for no single case
    dtype: str
    what: str  # "out", "d" + argument, "lse", or the name of a property
    verdict: str  # "ok", "WRONG", "skipped", "not supported"
    error: float  # eps of the dtype
    bound: float
    plain: float  # error of the plain implementation in the same dtype
    says: str
    repeat: str


class Report(list):
    """The lines of a check; prints as a table, knows whether everything conforms."""

    def __init__(self, lines=(), smallest=None, about=None):
        super().__init__(lines)
        self.smallest, self.about = smallest, about or {}

    @property
    def ok(self):
        """Whether nothing is wrong and something was compared."""
        return any(x.verdict == "ok" and x.case != "-" for x in self) and not self.wrong

    @property
    def wrong(self):
        """The lines that do not conform."""
        return [x for x in self if x.verdict == "WRONG"]

    @property
    def properties(self):
        """The lines that hold a property."""
        return [x for x in self if x.case == "-"]

    @property
    def unsupported(self):
        """The lines of what the function refuses."""
        return [x for x in self if x.verdict == "not supported" and x.case != "-"]

    @property
    def named(self):
        """The distinct diagnoses, most frequent first; what was raised when nothing ran."""
        said = [x.says for x in self.wrong if x.says and x.case != "-"]
        said = said or [x.says for x in self.wrong if x.says]
        random = [x.says for x in self.wrong if x.what == "determinism"
                  and x.says.startswith("two calls")]  # fmt: skip
        if random:
            return [f"not deterministic: {random[0]}", *dict.fromkeys(said)]
        if not said and not self.ok:
            said = [x.says for x in self.unsupported] or [
                x.says for x in self if x.verdict == "skipped" and x.case != "-"
            ]
        return sorted(set(said), key=lambda s: -said.count(s))

    def to_json(self):
        """The lines as JSON text; infinite errors as null."""

        def plain(line):
            return {n: None if isinstance(a, float) and not np.isfinite(a) else a
                    for n, a in line._asdict().items()}  # fmt: skip

        return json.dumps({"ok": self.ok, "named": self.named, "about": self.about,
                           "smallest": self.smallest,
                           "properties": [plain(x) for x in self.properties],
                           "lines": [plain(x) for x in self if x.case != "-"]},
                          indent=1)  # fmt: skip

    def __str__(self):
        about = ", ".join(f"{n} {a}" for n, a in self.about.items() if a)
        text = about + "\n\n" if about else ""
        if self.properties:
            head = ("property", "verdict", "")
            text += _columns(head, [(x.what, x.verdict, x.says) for x in self.properties]) + "\n\n"
        head = ("case", "dtype", "what", "verdict", "error", "bound", "plain", "")
        rows = [
            (x.case, x.dtype, x.what, x.verdict, short(x.error), short(x.bound), short(x.plain),
             x.says)
            for x in self if x.case != "-"
        ]  # fmt: skip
        return text + _columns(head, rows) + "\n\n" + self._ending()

    def _ending(self):
        counted = [x for x in self if x.case != "-"]
        compared = sum(x.verdict in ("ok", "WRONG") for x in counted)
        if self.ok:
            ending = f"conforms: {compared} comparisons"
        elif not compared:
            ending = "nothing could be compared"
        else:
            ending = f"{len(self.wrong)} of {len(self)} lines are wrong"
        left = {v: sum(x.verdict == v for x in counted) for v in ("not supported", "skipped")}
        ending += "".join(f"; {n} {v}" for v, n in left.items() if n)
        for says in self.named[:NAMED]:
            ending += f"\n  {says}"
        more = len(self.named) - NAMED
        ending += f"\n  and {more} more" if more > 0 else ""
        small = self.smallest
        if small:
            ending += f"\nsmallest failing case: {small['case']}, {small['dtype']}, {small['what']}"
            ending += f", {small['sizes']}" if small["sizes"] else ""
            ending += f"\n  worst at {tuple(small['worst'])}: got {small['got']:.6g}, "
            ending += f"expected {small['expected']:.6g}\nto repeat it: {small['repeat']}"
        elif self.wrong and self.wrong[0].repeat:
            ending += f"\nto repeat the first: {self.wrong[0].repeat}"
        return ending


def _columns(head, rows):
    widths = [max(len(r[i]) for r in (head, *rows)) for i in range(len(head))]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip()
        for r in (head, *rows)
    )


def short(x):
    """A number in three digits, "-" for none."""
    return "-" if x is None else f"{x:.3g}"


# ------------------------------------------------------------------------------ check


def check(
    fn, key="scores/dot_product", *, backward=None, framework=None, layout="BHTD", names=None,
    dtypes=("float64", "float32"), gradients=True, cases=None, fixed=None, conventions=None,
    sizes=None, extra=None, device=None,
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
        ``backward(dout, cache) -> {argument: gradient}`` (or a tuple in the order of the
        arguments) for functions on NumPy arrays; gradients of PyTorch and JAX come from their
        autodiff.
    framework : {"numpy", "torch", "jax", "cupy"}, optional
        Guessed from the module and the code of ``fn`` by default.
    layout : {"BHTD", "BTHD", "HTD", "TD"}
        Where its head axis stands; "HTD" and "TD" for functions of one sequence or one head.
    names : dict, optional
        Our argument names -> its names; guessed from the signature by default.
    dtypes : tuple of str
        Which dtypes to try: "float64", "float32", "float16", "bfloat16".
    gradients : bool
        Whether to compare gradients.
    cases : collection of str, optional
        Only these cases, and no properties.
    fixed : dict, optional
        Further arguments for every call, e.g. ``{"enable_gqa": True}``.
    conventions : dict, optional
        What it does by convention: ``align``, ``empty_row`` (as in the method), ``same_width``
        (it wants E = D), ``precision`` ("float32": it computes in float32 inside), ``mask``
        ("attend": True = may attend; "blocked": True = hidden; "additive": 0 and -inf).
    sizes : dict, optional
        Letter -> length, for every case: its first rows (``{"T": 2, "S": 3}``), or more of them
        where a kernel wants whole blocks (``{"T": 128, "S": 128, "D": 64, "E": 64}``).
    extra : dict, optional
        Further cases: name -> arguments in our words, float64.
    device : str, optional
        Where PyTorch tensors live, e.g. "cuda".

    Returns
    -------
    Report
        Prints as a table.

    Raises
    ------
    ParameterError
        For an unknown key, framework, layout, dtype, convention, or a function whose names cannot
        be guessed.

    Examples
    --------
    >>> from attention_ref import get, kit
    >>> spec = get("scores/dot_product")
    >>> kit.check(spec.forward, backward=spec.backward).ok
    True
    """
    spec = get(key)
    guessed, conventions = framework is None, dict(conventions or {})
    framework = framework or framework_of(fn)
    check_options(framework, layout, conventions)
    for dtype in dtypes:
        door.option("dtypes", dtype, DTYPES)
    ours = list(inspect.signature(spec.main).parameters)
    found = names_of(fn, names, ours)
    foreign = Foreign(fn, framework, layout, found, fixed or {}, backward, conventions, device)
    every = inputs.examples(spec, conventions) | (extra or {})
    chosen = {}
    for case, kwargs in every.items():
        if cases is not None and case not in cases:
            continue
        if "scale" in kwargs and not found.get("scale"):  # then both take 1/sqrt(D)
            kwargs = {n: a for n, a in kwargs.items() if n != "scale"}
        chosen[case] = inputs.resize(kwargs, sizes) if sizes else kwargs
    if guessed and framework == "numpy" and backward is None:
        foreign.framework = framework = _probed(foreign, chosen)
    wants = gradients and spec.backward_function is not None
    asked = _Asked(spec, foreign, conventions, wants, sizes)
    report = Report(about={"key": key, "framework": framework, "layout": layout} | conventions)
    runnable = {}
    for case, kwargs in chosen.items():
        lacking = foreign.lacks(kwargs)
        if lacking:
            says = f"it has no argument for {', '.join(lacking)}"
            report += [Line(case, d, "out", "skipped", None, None, None, says, "") for d in dtypes]
            continue
        runnable[case] = kwargs
        for dtype in dtypes:
            report += asked.one(case, kwargs, dtype)
    if cases is None and dtypes:
        ran = [x.dtype for x in report if x.verdict in ("ok", "WRONG")]
        report.extend(asked.properties(report, runnable, (ran or dtypes)[0], found))
    report.smallest = asked.smallest(report, runnable)
    _hint_layout(report, asked, runnable, dtypes)
    return report


def _probed(foreign, chosen):
    """The first framework on whose arrays the first case runs; NumPy when none does."""
    first = next((k for k in chosen.values() if not foreign.lacks(k)), None)
    for framework in ("numpy", *(f for f in ("torch", "jax") if f in sys.modules)):
        foreign.framework = framework
        try:
            if first is not None:
                foreign(first, None, "float32")
            return framework
        except Refusal:
            continue
    return "numpy"


def _hint_layout(report, asked, runnable, dtypes):
    """When nothing ran, say under which layout something does."""
    compared = any(x.verdict in ("ok", "WRONG") and x.case != "-" for x in report)
    shape = any("output has shape" in x.says for x in report.wrong)
    if (compared and not shape) or not runnable or "attention" not in asked.spec.flags:
        return
    f = asked.foreign
    for layout in ("TD", "HTD", "BTHD"):
        if layout == f.layout:
            continue
        other = Foreign(f.fn, f.framework, layout, f.names, f.fixed, f.backward, {}, f.device)
        lines = _Asked(asked.spec, other, asked.conventions, False).one(
            next(iter(runnable)), next(iter(runnable.values())), dtypes[-1]
        )
        if all(x.verdict == "ok" for x in lines):
            says = f"right with layout={layout!r}: pass it"
            report.append(Line("-", "", "layout", "WRONG", None, None, None, says, ""))
            return


class _Asked:
    """One check: what is asked of whom; runs a case and collects what the calls showed."""

    def __init__(self, spec, foreign, conventions, gradients, sizes=None):
        self.spec, self.foreign, self.conventions = spec, foreign, conventions
        self.sizes, self.seconds = sizes or {}, 0.0
        self.gradients = gradients and foreign.differentiates
        parameters = inspect.signature(spec.main).parameters
        self.rule = {n: conventions[n] for n in ("align", "empty_row")
                     if n in conventions and n in parameters}  # fmt: skip
        self.modified, self.dtypes, self.notes = set(), {}, set()

    def one(self, case, kwargs, dtype):
        """The lines of one case in one dtype."""
        spec, foreign = self.spec, self.foreign
        exact = {n: lowp.round_to(a, dtype).astype(np.float64) if is_float(a) else a
                 for n, a in kwargs.items()}  # fmt: skip
        right_out, cache, true = truth(spec, exact | self.rule, dtype)
        flat = tree.flatten(right_out)
        main = next(iter(flat))
        want, dout = flat[main], None
        if want.dtype.kind == "f":
            dout = lowp.round_to(inputs.cotangent(spec, case, want.shape), dtype).astype(float)
        repeat = self.command(case, dtype, self.sizes)
        asks = dout if self.gradients and want.dtype.kind == "f" else None
        try:
            answer = foreign(exact, asks, dtype)
        except Refusal as failure:
            return [Line(case, dtype, "out", failure.verdict, None, None, None, str(failure),
                         repeat)]  # fmt: skip
        self.modified |= set(answer.modified)
        self.dtypes.setdefault(dtype, set()).add(answer.dtype)
        inside = self._inside(dtype, answer.dtype)
        plain, rough = lowp.runs(spec, exact | self.rule, None if asks is None else dout, inside,
                                 checks.seed_of(f"{spec.key}-{case}", 4))  # fmt: skip
        out = answer.outs[0]
        if want.dtype.kind != "f":
            return self._exact(case, dtype, flat, answer.outs, repeat)
        lines = [judge(case, dtype, "out", out, want, plain[main], inside, FORWARD_RATIO, None,
                        repeat)]  # fmt: skip
        if lines[0].verdict == "WRONG":
            right = np.asarray(want, float)
            says = self.named(diagnose.forward, out.astype(float), right, spec,
                              exact | self.rule, dtype)  # fmt: skip
            for i, other in enumerate(answer.outs[1:], 1):
                if diagnose.distance(other, right) < 1e-4:
                    says = f"item {i} of what it returns is the output, item 0 is something else"
            return [lines[0]._replace(says=says)]
        lines += self._others(case, dtype, flat, plain, answer.outs, cache, exact, inside, repeat)
        if asks is None:
            return lines
        if answer.gradients is None:
            self.notes.add(answer.note)
            lost = "gradients not supported: " + answer.note
            return [*lines, Line(case, dtype, "d*", "not supported", None, None, None, lost, "")]
        wide = dout.astype(true)
        with door.extended():
            right = spec.backward_function(tree.like(right_out, {main: wide}), cache)
        right = {n: g.astype(np.float64) for n, g in right.items()}
        return lines + self._gradients(case, dtype, right, rough, answer, exact, dout, inside,
                                       repeat)  # fmt: skip

    def named(self, diagnosis, *args):
        """A diagnosis, as long as there is time: large cases take a while to compare."""
        begin = time.monotonic()
        if self.seconds > DIAGNOSIS_SECONDS:
            return "not looked into: the lines before took long enough"
        says = diagnosis(*args)
        self.seconds += time.monotonic() - begin
        return says

    def _inside(self, dtype, returned):
        """The dtype whose plain implementation sets the bound."""
        inside = max(dtype, self.conventions.get("precision", dtype), key=lowp.EPS.get)
        return max(inside, returned, key=lowp.EPS.get) if returned in lowp.EPS else inside

    def _exact(self, case, dtype, flat, outs, repeat):
        """Integers and booleans: kept indices, masks, tokens; equal or not."""
        lines = []
        for (name, want), got in zip(flat.items(), outs, strict=False):
            same = got.shape == want.shape and np.array_equal(got, want)
            says = "" if same else f"{name} differs"
            if not same and self.spec.kind == "policy" and got.dtype.kind in "iu":
                says = diagnose.trace(got, want)
                same = says.startswith("the same tokens")
            elif not same and got.shape != want.shape:
                says = f"{name} has shape {got.shape}, expected {want.shape}"
            wrong = "ok" if same else "WRONG"
            lines.append(Line(case, dtype, name, wrong, 0.0 if same else np.inf, 0.0, 0.0, says,
                              repeat))  # fmt: skip
        return lines

    def _others(self, case, dtype, flat, plain, outs, cache, exact, inside, repeat):
        """Further outputs by place, and a log-sum-exp where the second has its shape."""
        lines = []
        for (name, want), got in zip(list(flat.items())[1:], outs[1:], strict=False):
            if got.shape == want.shape and want.dtype.kind == "f":
                line = judge(case, dtype, name, got, want, plain[name], inside, FORWARD_RATIO,
                             None, repeat)  # fmt: skip
                if line.verdict == "WRONG":
                    says = diagnose.other(name, got.astype(float), np.asarray(want, float))
                    line = line._replace(says=says)
                lines.append(line)
        right = log_sum_exp(cache, outs[0])
        if lines or right is None or len(outs) < 2 or outs[1].shape != right.shape:
            return lines
        full, got = np.isfinite(right), outs[1]
        _, rough = self.spec.call(
            {n: lowp.round_to(a, inside) if is_float(a) else a for n, a in exact.items()}
            | self.rule
        )
        rough = [log_sum_exp(rough, outs[0])[full]]
        line = judge(case, dtype, "lse", got[full], right[full], rough, inside, FORWARD_RATIO,
                     None, repeat)  # fmt: skip
        if line.verdict == "WRONG":
            says = diagnose.lse(got.astype(float), right.astype(float), exact | self.rule,
                                self.spec)  # fmt: skip
            line = line._replace(says=says)
        return [*lines, line]

    def _gradients(self, case, dtype, right, rough, answer, exact, dout, inside, repeat):
        lines, size = [], scales(right)
        found = {n: g for n, g in answer.gradients.items() if g is not None}
        for name, g in right.items():
            if name in found:
                lines.append(judge(case, dtype, "d" + name, found[name], g, rough[name], inside,
                                    GRADIENT_RATIO, size[name], repeat))  # fmt: skip
            elif np.any(g):
                says = f"d{name} is missing: no gradient came back"
                lines.append(Line(case, dtype, "d" + name, "WRONG", np.inf, None, None, says,
                                  repeat))  # fmt: skip
        if any(x.verdict == "WRONG" and not x.says for x in lines):
            wide = {n: g.astype(float) for n, g in found.items() if n in right}
            says = self.named(diagnose.backward, wide, right, self.spec, exact | self.rule, dout)
            lines = [x._replace(says=x.says or says) if x.verdict == "WRONG" else x for x in lines]
        return lines

    # -------------------------------------------------------------------------- properties

    def properties(self, report, runnable, dtype, names):
        """Properties as lines: those measured by calls, those read off the cases."""
        inside = self._inside(dtype, dtype)
        found = properties.measured(self.spec, self.foreign, runnable, self.rule, dtype, inside)
        for name, cases in _DERIVED.items():
            there = [x for x in report if x.case in cases and x.what != "d*"]
            if there:
                found.append(properties.Property(name, *_summary(there)))
        changed = ", ".join(sorted(self.modified))
        found.append(properties.Property(
            "inputs unchanged", "WRONG" if changed else "ok",
            f"it writes into {changed}" if changed else ""))  # fmt: skip
        for given, came in self.dtypes.items():
            if came != {given} and given in lowp.EPS:
                other = sorted(came - {given})[0]
                says = f"{other} comes back for {given}"
                wider = lowp.EPS.get(other, 1.0) < lowp.EPS[given]
                says += "" if wider else f"; dtypes=({other!r},) if it has no other"
                verdict = "ok" if wider or other not in lowp.EPS else "WRONG"
                found.append(properties.Property("dtype kept", verdict, says))
        if self.gradients and self.notes:
            found.append(properties.Property("gradients", "not supported", "; ".join(self.notes)))
        elif self.spec.backward_function is not None and not self.gradients:
            found.append(
                properties.Property(
                    "gradients", "skipped", "not compared: a NumPy function needs backward="
                )
            )
        if "scale" in inspect.signature(self.spec.main).parameters and not names.get("scale"):
            found.append(
                properties.Property(
                    "scale argument", "skipped", "it has none: compared at 1/sqrt(D)"
                )
            )
        return [Line("-", dtype, p.name, p.verdict, None, None, None, p.says, "") for p in found]

    # -------------------------------------------------------------------------- repeating

    def command(self, case, dtype, sizes):
        """One line that runs one case again."""
        f, key = self.foreign, self.spec.key
        inner = unwrap(f.fn)
        module = getattr(inner, "__module__", None) or ""
        name = getattr(inner, "__qualname__", "")
        module = {"torch._C._nn": "torch.nn.functional"}.get(module, module)
        told = [n for n in self.conventions if n != "align"]
        if module and name and "<" not in name and module != "__main__" and not (
            f.fixed or told or inner is not f.fn
        ):  # fmt: skip
            line = f"python -m attention_ref check {module}:{name} --against {key}"
            if f.backward is not None:
                line += f" --backward {f.backward.__module__}:{f.backward.__qualname__}"
            line += f" --framework {f.framework} --layout {f.layout}"
            if "align" in self.conventions:
                line += f" --align {self.conventions['align']}"
            line += f" --case {case} --dtype {dtype}"
            return line + (f" --sizes {_sizes_text(sizes)}" if sizes else "")
        more = f", sizes={sizes}" if sizes else ""
        more += f", device={f.device!r}" if f.device else ""
        more += f", layout={f.layout!r}" if f.layout != "BHTD" else ""
        more += f", conventions={self.conventions}" if self.conventions else ""
        return f"kit.check(fn, {key!r}, cases=[{case!r}], dtypes=[{dtype!r}]{more})"

    def smallest(self, report, runnable):
        """The smallest failing case with its worst element, or None."""
        wrong = [x for x in report.wrong if x.case in runnable and x.error is not None]
        if not wrong:
            return None
        count = {n: sum(a.size for a in k.values() if is_float(a)) for n, k in runnable.items()}
        line = min(wrong, key=lambda x: (x.what != wrong[0].what, count[x.case]))
        kwargs, sizes = runnable[line.case], {}
        until, self.seconds = time.monotonic() + SHRINK_SECONDS, 0.0
        for letter in "BHGTSED" if "attention" in self.spec.flags else "":
            have = inputs.sizes(kwargs)
            for n in (1, 2, 3, *(2**i for i in range(2, 20))):
                if n >= have.get(letter, 1) or time.monotonic() > until:
                    break
                try:
                    smaller = inputs.resize(kwargs, {letter: n})
                    again = self._again(line, smaller)
                except Exception:
                    continue
                if again is not None and again.says == line.says:
                    kwargs, sizes = smaller, sizes | {letter: n}
                    break
        element = self._element(line, kwargs)
        if element is None:
            return None
        place, got, expected = element
        return {"case": line.case, "dtype": line.dtype, "what": line.what, "says": line.says,
                "sizes": _sizes_text(inputs.sizes(kwargs)), "worst": list(place),
                "got": float(got), "expected": float(expected),
                "repeat": self.command(line.case, line.dtype, self.sizes | sizes)}  # fmt: skip

    def _again(self, line, kwargs):
        lines = self.one(line.case, kwargs, line.dtype)
        return next((x for x in lines if x.what == line.what and x.verdict == "WRONG"), None)

    def _element(self, line, kwargs):
        """(place, got, expected) of the worst element of a wrong line."""
        exact = {n: lowp.round_to(a, line.dtype).astype(np.float64) if is_float(a) else a
                 for n, a in kwargs.items()}  # fmt: skip
        out, cache = self.spec.call(exact | self.rule)
        flat = tree.flatten(out)
        main = next(iter(flat))
        dout = inputs.cotangent(self.spec, line.case, flat[main].shape)
        dout = lowp.round_to(dout, line.dtype).astype(float)
        wants = line.what.startswith("d") and line.what[1:] in exact
        try:
            answer = self.foreign(exact, dout if wants else None, line.dtype)
        except Refusal:
            return None
        if wants:
            right = self.spec.backward_function(tree.like(out, {main: dout}), cache)
            got, want = (answer.gradients or {}).get(line.what[1:]), right[line.what[1:]]
        elif line.what == "lse":
            got, want = answer.outs[1], log_sum_exp(cache, flat[main])
        else:
            names = list(flat)
            i = names.index(line.what) if line.what in names else 0
            got, want = answer.outs[i], flat[names[i]]
        if got is None or got.shape != want.shape or not want.size:
            return None
        return diagnose.worst(got, want)


_DERIVED = {
    "T > S": ("long-queries", "causal-long-queries"),
    "odd head sizes": ("odd", "odd-17", "one-by-one"),
    "huge logits": ("huge", "large"),
    "empty rows": ("empty-row",),
    "cap, bias and mask in order": ("softcap", "order"),
}
"""Property -> cases that show it."""


def _summary(lines):
    """One verdict for several lines."""
    for verdict in ("WRONG", "not supported", "ok", "skipped"):
        hit = [x for x in lines if x.verdict == verdict]
        if hit:
            return verdict, hit[0].says
    return "skipped", ""


def _sizes_text(sizes):
    return ",".join(f"{n}={sizes[n]}" for n in "BHGTSDE" if n in sizes)


def log_sum_exp(cache, out):
    """The log-sum-exp of a cache in the shape (..., H, T) of the output, or None without one."""
    lse = getattr(cache, "lse", None)
    fits = lse is not None and lse.size == out[..., 0].size
    return lse.reshape(out.shape[:-1]) if fits else None


def truth(spec, exact, dtype="float64"):
    """Output, cache and the type they have: extended precision, so that float64 has an error too.

    Parameters
    ----------
    spec : Spec
        The row.
    exact : dict
        Arguments, float64.
    dtype : str
        What is judged by it; for less than float64 a float64 truth does, where sizes are large.

    Returns
    -------
    tuple
    """
    size = sum(a.size for a in exact.values() if is_float(a))
    if dtype != "float64" and size > LARGE:
        return *spec.call(exact), np.float64
    wide = {n: a.astype(np.longdouble) if is_float(a) else a for n, a in exact.items()}
    try:
        with door.extended():
            return *spec.call(wide), np.longdouble
    except TypeError:  # a NumPy function without a longdouble version
        return *spec.call(exact), np.float64


def judge(case, dtype, what, got, want, plain, inside, ratio, scale, repeat):
    """At most ``ratio`` times the error of the plain implementation, or the floor."""
    want = np.asarray(want, np.longdouble)
    finite = np.abs(want[np.isfinite(want)])
    size = scale if scale is not None else float(np.max(finite, initial=1e-300))
    eps = lowp.EPS[inside]
    ours = max(error(a, want, size, eps) for a in plain)
    theirs = error(got, want, size, eps)
    bound = max(ratio * ours, FLOOR[inside]) if np.isfinite(ours) else FLOOR[inside]
    verdict = "ok" if theirs <= bound else "WRONG"
    return Line(case, dtype, what, verdict, theirs, bound, ours, "", repeat)
