"""Every house rule must report a small offence and let the clean version through."""

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parent.parent / "style.py"
spec = importlib.util.spec_from_file_location("house_style", PATH)
style = importlib.util.module_from_spec(spec)
spec.loader.exec_module(style)
ROOT = style.ROOT

METHOD = "attention_ref/methods/scores/toy.py"
TEST = "tests/methods/scores/test_toy.py"
CORE = "attention_ref/core/dense.py"
HEAD = '"""Toy."""\nimport numpy as np\nfrom attention_ref import core\n\n\n'


def rules_of(path, text, allowed=()):
    return {f.rule for f in style.check_text(path, text, set(allowed))[0]}


def step(line, name="_helper_forward", head=HEAD):
    return f"{head}def {name}(x, rng=None):\n    {line}\n    return x\n"


BANNED = [
    ("y = np.zeros((2, 3))", "y = np.zeros_like(x, shape=(2, 3))"),
    ("y = np.ones(3)", "y = np.ones(3, like=x)"),
    ("y = np.full(3, 2.0)", "y = np.full_like(x, 2.0)"),
    ("y = np.empty(3)", "y = np.empty_like(x)"),
    ("y = np.arange(3)", "y = np.arange(3, like=x)"),
    ("y = np.linspace(0, 1, 3)", "y = np.arange(3, like=x) / 2.0"),
    ("y = np.array([1.0, 2.0])", "y = np.stack([x, x])"),
    ("y = np.eye(3)", "y = x[:, None] == x[None, :]"),
    ("y = np.eye(3, like=x)", "y = x[:, None] == x[None, :]"),
    ("y = np.max(x, initial=0.0)", "y = np.max(x, axis=-1)"),
    ("y = np.min(x, where=x > 0)", "y = np.min(np.where(x > 0, x, np.inf))"),
    ("y = np.maximum.accumulate(x)", "y = np.cumsum(x)"),
    ("y = np.logaddexp.reduce(x)", "y = np.add.reduce(x)"),
    ("y = np.logaddexp(x, x)", "y = np.log(np.exp(x) + np.exp(x))"),
    ("y = np.block([[x, x]])", "y = np.concatenate([x, x], -1)"),
    ("y = np.unstack(x)", "y = x[0]"),
    ("y = np.vecdot(x, x)", "y = np.sum(x * x, -1)"),
    ("y = np.linalg.multi_dot([x, x])", "y = x @ x"),
    ("y = np.linalg.norm(x)", "y = core.norm(x)"),
    ("y = np.abs(x)", "y = core.absolute(x)"),
    ("y = np.absolute(x)", "y = core.absolute(x)"),
    ("y = abs(x)", "y = core.absolute(x)"),
    ("y = np.var(x)", "y = np.mean(np.square(x - np.mean(x)))"),
    ("y = np.std(x)", "y = np.sqrt(np.mean(np.square(x - np.mean(x))))"),
    ("y = np.vdot(x, x)", "y = np.sum(x * x)"),
    ("from scipy import special; y = special.softmax(x)", "y = core.softmax_forward(x, x)"),
    ("from scipy.special import logsumexp; y = logsumexp(x)", "y = np.log(np.sum(np.exp(x)))"),
    ("import scipy.special as sp; y = sp.expit(x)", "y = core.logistic(x)"),
]
LINES = {
    "banned-call": BANNED,
    "real-part": [("y = x.real", "y = x.T"), ("y = np.fft.fft(x).imag", "y = x.shape")],
    "scalar-function": [
        ("y = x / np.sqrt(64)", "y = x / 8.0"),
        ("y = x / np.sqrt(x.shape[-1])", "y = x / np.sqrt(x)"),
        ("n = {'D': 3}; y = x / np.sqrt(n['D'])", "y = np.sqrt(x[0])"),
        ("y = x * np.log(2.0)", "y = np.log(2.0 + x)"),
        ("y = x * np.exp(-len(x))", "y = np.exp(-x)"),
    ],
    "array-method": [
        ("y = x.sum()", "y = np.sum(x)"),
        ("y = x.astype(float)", "y = core.sum(x)"),
        ("y = (x + 1).mean(-1)", "y = np.mean(x + 1, -1)"),
        ("y = x[0].reshape(2, 2)", "y = np.reshape(x[0], (2, 2))"),
        ("y = np.exp(x).max()", "y = np.add.reduce(rng.permutation(3))"),
    ],
    "in-place": [
        ("x[0] = 1.0", "y = np.where(x > 0, 1.0, x)"),
        ("x[..., 0] += 1.0", "y = {}; y['a'] = x"),
        ("np.exp(x, out=x)", "x = np.exp(x)"),
        ("y = (x,); y[i] = x", "y = {}; i = 1; y[i] = x"),
    ],
    "truth-value": [
        ("if np.any(x > 0): x = -x", "if x.shape[0] > 2: x = -x"),
        ("if x is None and np.all(x): x = -x", "if np.any(x > 0).item(): x = -x"),
        ("y = 1 if not np.any(x) else 2", "y = np.where(np.any(x), 1, 2)"),
        ("while (x > 0).any(): x = x - 1", "while x.ndim > 3: x = x[0]"),
    ],
}
PAIRS = [(name, *pair) for name, pairs in LINES.items() for pair in pairs]


@pytest.mark.parametrize("name, offence, clean", PAIRS)
def test_rules_of_forwards(name, offence, clean):
    assert name in rules_of(METHOD, step(offence))
    assert name in rules_of(CORE, step(offence, "any_step"))
    assert name not in rules_of(METHOD, step(clean))
    assert name not in rules_of(METHOD, step(offence, "helper_nobody_calls"))
    assert name not in rules_of("attention_ref/kit/other.py", step(offence))


def test_a_helper_of_a_forward_is_a_forward():
    text = step("y = np.abs(x)", "_helper") + "\n\ndef _part_select(x):\n    return _helper(x)\n"
    assert "banned-call" in rules_of(METHOD, text)


def test_a_backward_writes_only_into_its_own_buffers():
    rows = step("rows = {n: [] for n in x}; rows[n] += [x]", "_toy_backward")
    assert "in-place" not in rules_of(METHOD, rows)
    own = step("dx = np.zeros_like(x); dx[0] = 1.0", "_toy_backward")
    assert "in-place" not in rules_of(METHOD, own)
    assert "in-place" in rules_of(METHOD, step("x[0] = 1.0", "_toy_backward"))
    assert "in-place" in rules_of(METHOD, step("dx = np.exp(x); dx[0] += 1.0", "_toy_backward"))


BODY = "    x = x + 1\n"
SECTIONS = "".join(f"\n    {s}\n    {'-' * len(s)}\n    Words.\n" for s in style.FULL)
FULL = f'def toy_forward(x):\n    """Summary.\n{SECTIONS}    """\n'
FULL += "    y = x  # (1)\n    return y  # (2)\n"
BACK = (
    '\n\ndef toy_backward(dout):\n    """Summary.\n\n    Parameters\n    ----------\n    dout\n\n'
    '    Returns\n    -------\n    dict\n    """\n'
)
FORMULAS = '"""Toy: x &(1), y & (2)."""\n\n\n'
FILES = [
    ("length", METHOD, HEAD + "def _f(x):\n" + BODY * 41, HEAD + "def _f(x):\n" + BODY * 38),
    ("length", METHOD, HEAD + "x = 1\n" * 148 + "def _numbat(x):\n    return x\n    x\n",
     HEAD + "x = 1\n" * 147 + "def f_numba(x):\n    return x\n    x\n    x\n"),
    ("length", METHOD, HEAD + "x = 1\n" * 151, HEAD + "# words\n\n" * 100 + "x = 1\n" * 100),
    ("import", METHOD, HEAD + "import numba\n", HEAD + "def f():\n    import numba\n"),
    ("import", CORE, HEAD + "from scipy import special\n", HEAD + "import math\n"),
    ("import", METHOD, HEAD + "from attention_ref.kernels.numba import dense\n", HEAD),
    ("import", METHOD, HEAD + "import matplotlib.pyplot as plt\n", HEAD),
    ("import", METHOD, HEAD + "from attention_ref.methods.scores import dot_product\n", HEAD),
    ("import", METHOD, HEAD + "def f():\n    from . import dot_product\n", HEAD),
    ("docstring", METHOD, "import math\n", HEAD),
    ("docstring", "attention_ref/kit/a.py", HEAD + "def f():\n    return 1\n",
     HEAD + 'def f(x):\n    """Words."""\n'),
    ("docstring", METHOD, HEAD + 'def f(x):\n    """Words."""\n',
     HEAD + 'def f():\n    """Words."""\n'),
    ("docstring", METHOD, FORMULAS + FULL.replace("Raises", "Errors"), FORMULAS + FULL),
    ("docstring", METHOD, FORMULAS + FULL + BACK.replace("Returns", "Gives"),
     FORMULAS + FULL + BACK),
    ("steps", METHOD, FORMULAS + FULL + BACK + "    # (2')\n", FORMULAS + FULL + BACK
     + "    x = 1  # (2')\n    y = 1  # (1')\n"),
    ("steps", METHOD, FORMULAS + FULL + BACK + "    # (1')\n    # (2')\n    return 1\n",
     FORMULAS + FULL + BACK + "    # (2')\n    # (1')\n    return 1\n"),
    ("steps", METHOD, HEAD + FULL + BACK + "    # (2') (1')\n    return 1\n",
     FORMULAS + FULL + BACK + "    # (2') (1')\n    return 1\n"),
    ("steps", METHOD, FORMULAS + FULL + BACK + "    # (3') (2') (1')\n    return 1\n",
     FORMULAS + FULL + "\n\nSTEPS = 2\n"),
    ("slow-loop", TEST,
     "from attention_ref import core\n\n\ndef slow_toy(x):\n    return core.norm(x)\n",
     "import math\n\n\ndef slow_toy(x):\n    return math.exp(x[0])\n"),
    ("slow-loop", TEST, "import numpy as np\n\n\ndef slow_toy(x):\n    return np.exp(x)\n",
     "import numpy as np\n\n\ndef slow_toy(x):\n    return np.array([max(r) for r in x])\n"),
    ("slow-loop", TEST, "def slow_toy(x):\n    return x @ x\n",
     "def slow_toy(x):\n    return x * x\n"),
    ("slow-loop", TEST, "def slow_toy(x):\n    return x.sum()\n",
     "def slow_toy(x):\n    return sum(x.tolist())\n"),
    ("slow-loop", TEST, "def slow_toy(x):\n    import numpy\n",
     "def slow_toy(x):\n    import math\n"),
    ("slow-loop", TEST, "import scipy as s\n\n\ndef _h(x):\n    return s.x\n\n\n"
     "def slow_toy(x):\n    return _h(x)\n", "def _h(x):\n    return x\n\n\n"
     "def slow_toy(x):\n    return _h(x)\n"),
    ("no-assert", TEST, "def test_a():\n    x = 1\n", "def test_a():\n    assert 1\n"),
    ("no-assert", TEST, "def test_a():\n    print(1)\n", "def test_a():\n    check_it(1)\n"),
    ("no-assert", TEST, "class TestA:\n    def test_a(self):\n        pass\n",
     "import pytest\n\n\ndef test_a():\n    with pytest.raises(ValueError):\n        int('a')\n"),
    ("no-assert", TEST, "def test_a():\n    np.testing.suppress()\n",
     "def test_a():\n    np.testing.assert_allclose(1, 1)\n"),
    ("machine-path", "README.md", f"see {Path.home()}/a", "see home/a and https://a.b/home/c"),
    ("machine-path", CORE, f'"""A."""\nx = "{ROOT}/a"\n', '"""A."""\nx = "/rooted"\n'),
    ("machine-path", "docs/a.rst", "in " + "/ho" + "me/somebody/x", "in ./home/x"),
]  # fmt: skip


@pytest.mark.parametrize("name, path, offence, clean", FILES)
def test_rules_of_files(name, path, offence, clean):
    assert name in rules_of(path, offence)
    assert name not in rules_of(path, clean)


SKIPS = [
    "def test_a():\n    pytest.skip('no GPU')\n    assert 1\n",
    "@pytest.mark.skipif(True, reason='no GPU')\ndef test_a():\n    assert 1\n",
    "torch = pytest.importorskip('torch', reason='no GPU')\n",
]


@pytest.mark.parametrize("text", SKIPS)
def test_a_skip_must_be_listed(text):
    text = "import pytest\n\n\n" + text
    assert "skip" in rules_of(TEST, text)
    assert "skip" in rules_of(TEST, text, ["tests/other.py: no GPU"])
    assert "skip" not in rules_of(TEST, text, [f"{TEST}: no GPU"])
    assert "skip" in rules_of(TEST, text.replace("'no GPU'", "REASON"), [f"{TEST}: no GPU"])


def test_a_skip_without_a_reason_is_reported():
    text = "import pytest\n\n\n@pytest.mark.skip\ndef test_a():\n    assert 1\n"
    assert "skip" in rules_of(TEST, text)
    assert "skip" in rules_of(TEST, "import pytest\npytest.importorskip('a')\n", [f"{TEST}: a"])


def test_the_escape_needs_a_reason():
    line = "y = np.abs(x)  # style: ok"
    assert "banned-call" in rules_of(METHOD, step(line))
    findings, let = style.check_text(METHOD, step(line + ", a count of tokens"))
    assert "banned-call" not in {f.rule for f in findings} and let == 1


def test_the_whole_project_run_prints_places_and_counts(tmp_path, capsys):
    path = tmp_path / METHOD
    path.parent.mkdir(parents=True)
    path.write_text(HEAD)
    assert style.main(tmp_path) == 0
    path.write_text(step("y = np.abs(x)"))
    assert style.main(tmp_path) == 1
    printed = capsys.readouterr().out
    assert f"{METHOD}:7: banned-call: numpy.abs" in printed and "1 findings" in printed
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/allowed_skips.txt").write_text("# listed\ntests/test_a.py: gone\n")
    assert style.main(tmp_path) == 2
