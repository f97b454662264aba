"""The mutation tool: its operators, what it leaves alone, and that it can say no."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

import attention_ref
from attention_ref import core

PATH = Path(__file__).resolve().parent.parent / "mutants.py"
_spec = importlib.util.spec_from_file_location("mutation_tool", PATH)
tool = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tool)

KEY = "scores/dot_product"
MODULE = "attention_ref.methods.scores.dot_product"
SOURCE = '''"""Formula: 1 + 1."""

def toy_forward(x, w, window=2):
    """Add 1 + 1."""
    n = core.check.attention(x, w)
    if window < 1:
        raise ValueError("window < 1")
    z = x @ np.swapaxes(w, -1, -2)
    z = np.where(w > 0, z, -np.inf) * 3.0 - helper(z)
    top = np.max(z, axis=-1, keepdims=True)
    return np.einsum("td,de->te", z, w) / top, n


def helper(y):
    return -y + 1


def toy_backward(dout):
    return {"q": dout, "k": 2 * dout}


def toy_numba(x):
    return x + 1


def examples(rng):
    return {"plain": rng + 1}


SPEC = Spec(examples, lambda x: x + 1)
'''
EXPECTED = [
    "toy_forward: 2  ->  3",  # a default
    "toy_forward: z = x @ np.swapaxes(w, -1, -2)  ->  z = -(x @ np.swapaxes(w, -1, -2))",
    "toy_forward: x @ np.swapaxes(w, -1, -2)  ->  np.swapaxes(w, -1, -2) @ x",
    "toy_forward: x @ np.swapaxes(w, -1, -2)  ->  x",
    "toy_forward: np.swapaxes(w, -1, -2)  ->  w",
    "toy_forward: w > 0  ->  w >= 0",
    "toy_forward: np.where(w > 0, z, -np.inf)  ->  z",
    "toy_forward: np.where(w > 0, z, -np.inf)  ->  -np.inf",
    "toy_forward: np.where(w > 0, z, -np.inf)  ->  np.where(z, w > 0, -np.inf)",
    "toy_forward: -np.inf  ->  np.inf",
    "toy_forward: 3.0  ->  4.0",
    "toy_forward: 0  ->  1",
    "toy_forward: np.where(w > 0, z, -np.inf) * 3.0  ->  np.where(w > 0, z, -np.inf) / 3.0",
    "toy_forward: np.where(w > 0, z, -np.inf) * 3.0  ->  3.0",
    "toy_forward: z = np.where(w > 0, z, -np.inf) * 3.0 - helper(z)  ->  dropped",
    "toy_forward: np.max(z, axis=-1, keepdims=True)  ->  np.min(z, axis=-1, keepdims=True)",
    "toy_forward: -1  ->  -2",
    "toy_forward: True  ->  False",
    "toy_forward: np.einsum('td,de->te', z, w)  ->  np.einsum('dt,de->te', z, w)",
    "helper: -y  ->  y",
    "helper: -y + 1  ->  -y - 1",
    "toy_backward: {'q': dout, 'k': 2 * dout}  ->  {'q': 2 * dout, 'k': dout}",
]


@pytest.fixture(scope="module")
def made():
    return tool.mutants(SOURCE, "toy")


@pytest.mark.parametrize("name", EXPECTED)
def test_the_operators_make_these(made, name):
    assert name in [m.name for m in made[1]]


def test_every_mutant_is_valid_code_and_differs(made):
    tree, found = made
    texts = [ast.unparse(m.tree(tree)) for m in found]
    for text in texts:
        compile(text, "toy", "exec")
    assert len(set(texts)) == len(texts) == len({m.name for m in found})
    assert ast.unparse(tree) not in texts
    assert ast.unparse(tree) == ast.unparse(ast.parse(SOURCE))  # the original is not touched


def test_words_examples_fast_paths_and_checks_are_left_alone(made):
    tree, found = made
    kept = ['"""Formula: 1 + 1."""', "core.check.attention(x, w)", "if window < 1:",
            "def toy_numba(x):\n    return x + 1", "return {'plain': rng + 1}",
            "SPEC = Spec(examples, lambda x: x + 1)"]  # fmt: skip
    for mutant in found:
        text = ast.unparse(mutant.tree(tree))
        assert all(part in text for part in kept), mutant.name


def some(mutant):
    """A handful, for speed: the scale, the bias, the mix."""
    return mutant.line in some.lines


text = Path(sys.modules[attention_ref.get(KEY).main.__module__].__file__).read_text().splitlines()
some.lines = {n for n, line in enumerate(text, 1) if "z + clean" in line or "mix_forward" in line}


def test_a_suite_that_asks_nothing_lets_every_mutant_live():
    outcomes = tool.hunt(KEY, suites=(lambda key: None,), chosen=some)
    report = tool.judge(outcomes, {})
    assert len(outcomes) >= 6
    assert report["noticed"] == 0 and report["rate"] == 0.0 and not report["ok"]
    assert {s["line"] for s in report["survivors"]} == some.lines


def smoke(key):
    """Only shapes are looked at, as in many a public test suite."""
    spec = attention_ref.get(key)
    for kwargs in tool_cases(spec).values():
        out, _ = spec.call(kwargs)
        assert out.shape[-2] == kwargs["q"].shape[-2]


def tool_cases(spec):
    from attention_ref.kit import checks

    return checks.cases(spec)


def test_a_weak_suite_lets_wrong_signs_live():
    names = [m.name for m, by in tool.hunt(KEY, suites=(smoke,), chosen=some) if by is None]
    assert "dot_product_forward: z + clean  ->  z - clean" in names


def test_the_real_suites_notice_them():
    report = tool.judge(tool.hunt(KEY, chosen=some), {})
    assert report["ok"] and report["rate"] == 1.0, report["survivors"]


def test_own_tests_alone_notice_a_wrong_sign():
    outcomes = tool.hunt(KEY, suites=(tool.own_suite,), chosen=some)
    assert all(by is not None for m, by in outcomes if "z - clean" in m.name)


def test_a_suite_that_fails_on_the_method_itself_is_an_error():
    def red(key):
        raise AssertionError("always")

    with pytest.raises(RuntimeError, match="without a mutant"):
        tool.hunt(KEY, suites=(red,), chosen=some)


def test_a_mutant_that_hangs_is_noticed():
    calls = []

    def hangs(key):
        calls.append(key)
        while len(calls) > 2:
            pass

    chosen = [m for m in tool.mutants("\n".join(text), "dot_product")[1] if some(m)][:1]
    outcomes = tool.hunt(KEY, suites=(hangs,), chosen=lambda m: m.name == chosen[0].name, limit=1)
    assert "no answer" in outcomes[0][1]


def test_everything_is_put_back():
    module, spec = sys.modules[MODULE], attention_ref.get(KEY)
    step, dense = core.mix_forward, sys.modules["attention_ref.core.dense"]
    tool.hunt(KEY, suites=(smoke,), chosen=some)
    tool.hunt("core/dense", suites=(smoke,), chosen=lambda m: "mix_forward" in m.name, by=KEY)
    assert sys.modules[MODULE] is module and attention_ref.get(KEY).main is spec.main
    assert core.mix_forward is step and core.dense is dense
    assert Path(module.__file__).read_text().splitlines() == text


def test_mutants_of_core_reach_the_methods():
    outcomes = tool.hunt(
        "core/dense", suites=(tool.golden_suite,), chosen=lambda m: "mix_forward" in m.name, by=KEY
    )
    assert outcomes and all(by is not None for _, by in outcomes)


def mutant(name):
    return tool.Mutant(1, name, (), ast.Pass())


def test_declarations_of_equivalence_are_checked():
    outcomes = [(mutant(f"m{i}"), "golden") for i in range(38)]
    outcomes += [(mutant("alive"), None), (mutant("also"), None)]
    assert tool.judge(outcomes, {})["rate"] == 0.95
    report = tool.judge(outcomes, {"alive": "no number changes"})
    assert report["ok"] and report["rate"] == pytest.approx(38 / 39)
    assert not tool.judge(outcomes, {"gone": "x"})["ok"]
    assert not tool.judge(outcomes, {"m1": "x"})["ok"]
    assert not tool.judge(outcomes, {"alive": ""})["ok"]
    few = [(mutant("a"), None), (mutant("b"), "golden")]
    assert "at most 5 %" in tool.judge(few, {"a": "x"})["problems"][0]


def test_the_runner_expands_parameters_and_knows_skips():
    seen = []

    @pytest.mark.parametrize("a", [1, pytest.param(2, id="two")])
    @pytest.mark.parametrize(("b", "c"), [(3, 4), (5, 6)])
    def test_it(a, b, c):
        seen.append((a, b, c))
        if a == 2:
            pytest.skip("enough")  # style: ok, raised inside a test double

    assert tool.run_test("test_it", test_it)
    assert sorted(seen) == [(1, 3, 4), (1, 5, 6), (2, 3, 4), (2, 5, 6)]
    assert not tool.run_test("test_it", lambda tmp_path: None)

    def test_fails():
        pytest.fail("no")

    with pytest.raises(tool.Noticed, match="test_fails"):
        tool.run_test("test_fails", test_fails)


def test_the_command_lists(capsys):
    assert tool.main([KEY, "--list"]) == 0
    assert "dot_product_forward: z + clean  ->  z - clean" in capsys.readouterr().out
