"""What every tutorial shares: a record of what it printed, measured and drew.

    tutorial = Tutorial(__file__)                    # the key comes from the path
    tutorial.check("rows of p sum to 1", error, 1e-15)
    tutorial.gradients(spec, kwargs)                 # hand, tape, complex step, differences
    tutorial.claim("...", criterion="...", paper=0.5)
    tutorial.measured(ours=[...], verdict="reproduced", tolerance=0.05)
    tutorial.exercise(1, answer, expected)           # None waits for the reader
    tutorial.finish(figure)                          # figures/<key>.svg, .txt, .json

With ``ATTENTION_REF_QUICK=1`` (:attr:`Tutorial.quick`) the derivation runs and its checks assert,
long experiments are skipped by the tutorial, and nothing is written.
"""

import ast
import hashlib
import io
import json
import math
import os
import platform
import re
import sys
import tempfile
import textwrap
import time
from datetime import date
from pathlib import Path

import numpy as np

from attention_ref import engine
from attention_ref.core.errors import ParameterError
from attention_ref.kit import tree

VERDICTS = ("reproduced", "partly", "not reproduced")
MAX_SVG = 150 * 1024
"""Bytes; a larger figure draws too many points."""

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, GREY = (
    "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#f0e442", "#6e6e6e",
)  # fmt: skip
"""Okabe and Ito's palette: told apart with every common kind of colour vision."""

PALETTE = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY)
EPS = float(np.finfo(np.float64).eps)


def style(salt="attention_ref"):
    """Set the house style of figures in Matplotlib's rcParams.

    Parameters
    ----------
    salt : str
        Makes the ids inside the SVG the same at every run.
    """
    import matplotlib as mpl

    mpl.rcParams.update(mpl.rcParamsDefault)
    mpl.rcParams.update({
        "svg.hashsalt": salt, "svg.fonttype": "path",
        "figure.facecolor": "white", "savefig.facecolor": "white", "axes.facecolor": "white",
        "figure.constrained_layout.use": True,
        "font.family": "DejaVu Sans", "font.size": 10, "axes.titlesize": 11,
        "axes.titlelocation": "left", "axes.titleweight": "bold", "axes.labelsize": 10,
        "axes.prop_cycle": mpl.cycler(color=PALETTE),
        "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#444444",
        "axes.grid": True, "grid.color": "#e5e5e5", "grid.linewidth": 0.7, "axes.axisbelow": True,
        "lines.linewidth": 1.8, "lines.markersize": 5,
        "legend.frameon": False, "legend.fontsize": 9,
        "image.cmap": "Blues", "image.interpolation": "nearest",
    })  # fmt: skip


class _Tee(io.TextIOBase):
    """A stream that writes through and remembers."""

    def __init__(self, stream):
        self.stream, self.lines = stream, io.StringIO()

    def write(self, text):
        self.lines.write(text)
        return self.stream.write(text)

    def flush(self):
        self.stream.flush()

    def isatty(self):
        return self.stream.isatty()

    @property
    def encoding(self):
        return self.stream.encoding


class Tutorial:
    """The record of one run of one tutorial.

    Parameters
    ----------
    file : str
        ``__file__`` of the tutorial: ``tutorials/<family>/<slug>.py``.

    Attributes
    ----------
    key : str
        ``family/slug``.
    quick : bool
        True under ``ATTENTION_REF_QUICK=1``: skip what takes long.
    """

    def __init__(self, file):
        self.path = Path(file).resolve()
        self.key = f"{self.path.parent.name}/{self.path.stem}"
        if self.path.parent.parent.name != "tutorials":
            raise ParameterError(f"file is {file!r}, expected tutorials/<family>/<slug>.py")
        self.root = self.path.parents[2]
        self.quick = os.environ.get("ATTENTION_REF_QUICK", "") not in ("", "0")
        self.record = {"key": self.key}
        self._wrong = []
        self._start = time.perf_counter()
        self._tee = sys.stdout = _Tee(sys.stdout)

    def pyplot(self):
        """``matplotlib.pyplot`` in the house style; it draws to files (in a notebook, inline)."""
        import matplotlib as mpl

        if "ipykernel" not in sys.modules:
            mpl.use("Agg")
        import matplotlib.pyplot as plt

        style(self.key)
        return plt

    def check(self, what, error, bound):
        """Print an error beside its bound, and stop the tutorial when it is larger.

        Parameters
        ----------
        what : str
            What is compared.
        error, bound : float
            ``error <= bound`` must hold; NaN does not.
        """
        error = float(error)
        print(f"{what}: error {error:.1e}, bound {bound:.1e}")
        if not error <= bound:
            raise AssertionError(f"{what}: error {error:.3e} is larger than {bound:.3e}")

    def gradients(self, spec, kwargs, *, seed=0, bounds=(64 * EPS, 64 * EPS, 1e-9), skip=()):
        """Compare the backward by hand with the tape, the complex step and differences.

        One row an argument: the largest difference, divided by the largest entry of the gradient.

        Parameters
        ----------
        spec : Spec
            With ``forward`` and ``backward``.
        kwargs : dict
            Arguments of the forward; its float64 arrays are differentiated.
        seed : int
            Of the random upstream gradient.
        bounds : tuple of float
            For tape, complex step, differences.
        skip : tuple of str
            Routes that do not apply, among "tape", "complex step", "differences"; the tutorial
            says why. A row that opts out of the complex step skips it by itself.
        """
        if reason := spec.opt_out.get("complex_step"):
            print(f"no complex step: {reason}")
            skip = (*skip, "complex step")
        rng = np.random.default_rng(seed)
        out, cache = spec.call(kwargs)
        dout = tree.cotangents(rng, out)
        hand = {k: g for k, g in spec.backward(dout, cache).items() if k in tree.arrays(kwargs)}

        def forward(**kw):
            return spec.call(kw)[0]

        routes = {
            "tape": lambda: engine.vjp(forward, kwargs, wrt=list(hand))[1](dout),
            "complex step": lambda: engine.complex_gradient(forward, kwargs, dout, list(hand)),
            "differences": lambda: _differences(forward, kwargs, dout, hand, rng),
        }
        errors = {}
        for route, compute in routes.items():
            if route not in skip:
                other = compute()
                errors[route] = {k: _relative(hand[k], other[k]) for k in hand}
        width = max(len(k) for k in ("gradient", *hand)) + 1
        print("gradient".ljust(width) + "".join(f"hand - {r}".rjust(22) for r in errors))
        for name in hand:
            print(f"d{name}".ljust(width) + "".join(f"{errors[r][name]:22.1e}" for r in errors))
        for route, bound in zip(routes, bounds, strict=True):
            for name, error in errors.get(route, {}).items():
                if not error <= bound:
                    raise AssertionError(
                        f"d{name}: hand and {route} differ by {error:.3e}, more than {bound:.3e}"
                    )

    def claim(self, text, *, criterion, paper=None):
        """State what is claimed and what will count as reproduced, before the experiment.

        Parameters
        ----------
        text : str
            The claim, one sentence.
        criterion : str
            The condition with its threshold.
        paper : float, optional
            The number the paper reports, where it reports one.
        """
        self.record |= {"claim": text, "criterion": criterion, "paper": paper}
        for line in (f"Claim: {text}", f"Criterion, fixed before the experiment: {criterion}"):
            print(textwrap.fill(line, 96, subsequent_indent="  ", break_on_hyphens=False))
        print(f"The paper's number: {'none' if paper is None else paper}")

    def measured(self, *, ours, verdict, tolerance):
        """Record what three seeds gave, and the verdict.

        Parameters
        ----------
        ours : list
            One entry a seed, each a number or a dict of numbers.
        verdict : {"reproduced", "partly", "not reproduced"}
            Any honest word of the three.
        tolerance : float, > 0
            Relative difference within which a later run counts as the same result.

        Raises
        ------
        ParameterError
            For another verdict, another number of seeds, no claim before, a tolerance <= 0.
        """
        if verdict not in VERDICTS:
            raise ParameterError(
                f"verdict is {verdict!r}, expected one of {', '.join(map(repr, VERDICTS))}"
            )
        if len(ours) != 3:
            raise ParameterError(f"ours has {len(ours)} entries, expected 3, one a seed")
        if "claim" not in self.record:
            raise ParameterError("measured() came before claim(), expected the criterion first")
        if not 0 < tolerance < math.inf:
            raise ParameterError(f"tolerance is {tolerance!r}, expected a relative error > 0")
        ours = [plain(x) for x in ours]
        self.record |= {"ours": ours, "verdict": verdict, "tolerance": float(tolerance)}
        rows = [numbers if isinstance(numbers, dict) else {"": numbers} for numbers in ours]
        names = list(dict.fromkeys(name for row in rows for name in row))
        width = max(map(len, names))
        print(" " * width + "".join(f"seed {seed}".rjust(12) for seed in range(3)))
        for name in names:
            cells = (f"{row[name]:.4g}" if name in row else "" for row in rows)
            print(name.ljust(width) + "".join(cell.rjust(12) for cell in cells))
        print(f"Verdict: {verdict}")

    def exercise(self, number, answer, expected, bound=1e-12):
        """Compare a reader's answer with the library's, and say in one line how it went.

        Parameters
        ----------
        number : int
            Of the exercise.
        answer, expected : ndarray, number, or dict of them
            None, the whole or one entry, is an answer that still waits.
        bound : float
            Largest difference, over the largest entry of what is expected, that counts as right.
        """
        title = f"exercise {number}"
        if not isinstance(expected, dict):
            expected = {"": expected}
            answer = None if answer is None else {"": answer}
        if answer is None or all(x is None for x in answer.values()):
            print(f"{title}: waits for you")
            return
        for name, want in expected.items():
            what, got = f"{title}: {name}".rstrip(": "), answer.get(name)
            if got is None:
                print(f"{what} waits for you")
                continue
            got, want = np.asarray(got), np.asarray(want)
            if got.shape != want.shape:
                print(f"{what} has shape {got.shape}, expected {want.shape}")
                self._wrong.append(what)
                continue
            error = _relative(got, want)
            print(f"{what} is {'right' if error <= bound else f'off by {error:.2g}'}")
            if not error <= bound:
                self._wrong.append(what)

    def finish(self, figure=None):
        """Write the figure, the printed text and the record; in quick mode nothing.

        Parameters
        ----------
        figure : matplotlib.figure.Figure, optional
            What the page shows.

        Raises
        ------
        ParameterError
            When there is no figure or no measurement, an exercise is answered wrongly, the SVG is
            too large, or the text holds an absolute path.
        """
        seconds = time.perf_counter() - self._start
        text = self._tee.lines.getvalue()
        self.close()
        if self._wrong:
            raise ParameterError(f"not right yet: {', '.join(self._wrong)}; nothing is written")
        if self.quick or "ipykernel" in sys.modules:
            return
        if figure is None or "ours" not in self.record:
            raise ParameterError("finish() needs a figure, and claim() and measured() before it")
        for place in {str(self.root), str(Path.home()), sys.prefix, tempfile.gettempdir()}:
            if os.path.join(place, "") in text and place != os.sep:
                raise ParameterError(f"the printed text holds a path of this machine: {place}")
        from attention_ref.kit.sources import source_key

        record = self.record | {
            "seconds": round(seconds, 1),
            "sources": source_key(self.path, self.root),
            "own": own_key(self.root, self.key),
            "versions": {"python": platform.python_version(), "numpy": np.__version__},
            "date": date.today().isoformat(),
        }
        picture = _svg(figure, self.key)
        target = Path(os.environ.get("ATTENTION_REF_FIGURES") or self.root / "figures") / self.key
        write_files({
            target.with_suffix(".svg"): picture,
            target.with_suffix(".txt"): text.encode(),
            target.with_suffix(".json"): encode(record),
        })  # fmt: skip
        print(f"figures/{self.key}.svg .txt .json written in {seconds:.0f} s", file=sys.stderr)

    def close(self):
        """Give the standard output back."""
        if sys.stdout is self._tee:
            sys.stdout = self._tee.stream


def plain(x):
    """Numbers of the record: Python floats of six digits, inside dicts and lists too."""
    if isinstance(x, dict):
        return {str(k): plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(v) for v in x]
    if isinstance(x, (bool, np.bool_)):
        return bool(x)
    if isinstance(x, (int, np.integer)):
        return int(x)
    return float(f"{float(x):.6g}")


def encode(record):
    """The record as it stands in the file."""
    return (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode()


def write_files(contents):
    """Write several files so that each is there whole or as it was before.

    Parameters
    ----------
    contents : dict
        Path -> bytes. Nothing is replaced before everything is written beside its target.
    """
    parts = {path: path.with_name(f".{path.name}.{os.getpid()}.part") for path in contents}
    try:
        for path, part in parts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(contents[path])
        for path, part in parts.items():
            os.replace(part, path)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def own_key(root, key):
    """Hash of a row's own code: the tutorial and the method file, without comments and docstrings.

    Parameters
    ----------
    root : Path
        The repository.
    key : str
        ``family/slug``.
    """
    digest = hashlib.sha256()
    for folder in ("tutorials", "attention_ref/methods"):
        file = Path(root) / folder / f"{key}.py"
        if file.exists():
            digest.update(_skeleton(ast.parse(file.read_text(encoding="utf-8"))).encode())
    return digest.hexdigest()[:16]


def _skeleton(node):
    """A tree as text without positions, docstrings and what is empty: the same in every Python."""
    if isinstance(node, ast.AST):
        fields = dict(ast.iter_fields(node))
        body = fields.get("body")
        if isinstance(body, list):
            fields["body"] = [n for n in body if not _is_text(n)]
        inner = (f"{k}={_skeleton(v)}" for k, v in sorted(fields.items()) if v not in (None, []))
        return f"{type(node).__name__}({','.join(inner)})"
    if isinstance(node, list):
        return f"[{','.join(map(_skeleton, node))}]"
    return repr(node)


def _is_text(node):
    value = getattr(node, "value", None) if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def _svg(figure, key):
    """The figure as bytes, the same at every run of the same numbers."""
    import matplotlib as mpl

    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": key, "svg.fonttype": "path"}):
        figure.savefig(
            buffer, format="svg", facecolor="white",
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )  # fmt: skip
    picture = buffer.getvalue()
    for pattern, shorter in (
        (rb'<!-- .*? -->|<g id="[^"]*"/>', b""),  # names of letters, empty groups
        (rb'<g id="(?:[xy]tick|text|line2d)_\d+">', b"<g>"),  # names that nothing refers to
        (rb"(?<!scale\()(?<![\d.])(\d+\.\d{3})\d+", rb"\1"),  # of a point
        (rb"\s*\n\s*", b"\n"),
    ):
        picture = re.sub(pattern, shorter, picture)
    if len(picture) > MAX_SVG:
        raise ParameterError(
            f"the figure of {key} takes {len(picture) // 1024} KB, expected at most "
            f"{MAX_SVG // 1024} KB; hint: fewer points, or rasterized=True for dense maps"
        )
    return picture


def _relative(a, b):
    """The largest difference over the largest entry; NaN stays NaN."""
    if a.shape != b.shape:
        return math.inf
    return float(np.max(np.abs(a - b), initial=0.0) / max(np.max(np.abs(a), initial=0.0), 1e-300))


def _differences(forward, kwargs, dout, hand, rng, most=40):
    """Gradients by 4th-order differences at ``most`` coordinates, the rest copied from ``hand``."""
    cotangent = tree.floats(dout)
    gradients = {}
    for name, known in hand.items():
        gradient = known.copy()
        for i in rng.permutation(known.size)[:most]:
            direction = np.zeros_like(known)
            direction.flat[i] = 1.0
            change = tree.floats(engine.difference(forward, kwargs, {name: direction}))
            gradient.flat[i] = sum(np.sum(cotangent[o] * change[o]) for o in cotangent)
        gradients[name] = gradient
    return gradients
