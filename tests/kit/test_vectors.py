"""``kit.cases``: ids, inputs on the grid of the dtype, and a comparison that explains."""

import subprocess
import sys

import numpy as np
import pytest

from attention_ref import kit
from attention_ref.core.errors import ParameterError
from attention_ref.core.registry import catalog, written
from attention_ref.kit import golden, lowp, tree, zoo
from attention_ref.kit.compare import CheckFailure

DTYPES = ("float64", "float32", "float16", "bfloat16")


@pytest.mark.parametrize("case", kit.cases("heads/multi_query"))
def test_the_row_itself_matches(case):
    out, cache = case.spec.forward(**case.inputs)
    grads = case.spec.backward(case.dout, cache)
    case.assert_matches(out, grads, lse=cache.lse.reshape(out.shape[:-1]))


def test_ids_are_the_case_and_the_dtype():
    ids = [c.__name__ for c in kit.cases("scores/dot_product", names=["causal", "odd"])]
    assert ids == ["causal-float64", "causal-float32", "odd-float64", "odd-float32"]
    mark = pytest.mark.parametrize("case", kit.cases("scores/dot_product", names=["causal"]))
    assert [repr(c).split(":")[0] for c in mark.args[1]] == [
        "<scores/dot_product causal-float64", "<scores/dot_product causal-float32",
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_plain_implementation_is_within_its_own_tolerance(dtype):
    for key in ("scores/dot_product", "recurrent/delta_rule", "normalizers/sparsemax"):
        for case in kit.cases(key, dtypes=(dtype,)):
            outs, gradients = case.plain
            for i, out in enumerate(outs[case.main]):
                case.assert_matches(out, {n: g[min(i, len(g) - 1)] for n, g in gradients.items()})
            grid = case.inputs["q"].astype(float)
            assert np.array_equal(lowp.round_to(grid, dtype).astype(float), grid)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wrong_last_digit_is_seen(dtype):
    case = kit.cases("scores/dot_product", dtypes=(dtype,), names=["square"])[0]
    off = case.out.copy()
    off[0, 1, 2, 3] += 3 * case.tolerances["out"]["bound"]
    with pytest.raises(CheckFailure, match=r"worst at \(0, 1, 2, 3\)"):
        case.assert_matches(off)


def test_the_failure_names_the_mistake_and_says_how_to_repeat_it():
    case = kit.cases("scores/dot_product", names=["softcap"], dtypes=["float64"])[0]
    wrong, _ = zoo.attend(**case.inputs, bug="softcap after mask")
    with pytest.raises(AssertionError) as failure:
        case.assert_matches(wrong)
    text = str(failure.value)
    assert zoo.FORWARD["softcap after mask"] in text and "allowed" in text
    assert "kit.cases('scores/dot_product', names=['softcap'], dtypes=['float64'])" in text
    square = kit.cases("scores/dot_product", names=["square"], dtypes=["float64"])[0]
    out, backward = zoo.attend(**square.inputs, bug="dk and dv swapped")
    with pytest.raises(CheckFailure, match="dk and dv are swapped"):
        square.assert_matches(out, backward(square.dout))


def test_gradients_as_a_tuple_and_missing_ones():
    case = kit.cases("scores/dot_product", names=["square"], dtypes=["float64"])[0]
    g = case.gradients
    case.assert_matches(case.out, (g["q"], g["k"], g["v"]))
    for missing in ({"q": g["q"], "k": None, "v": g["v"]}, {"q": g["q"], "v": g["v"]}):
        with pytest.raises(CheckFailure, match="dk is missing"):
            case.assert_matches(case.out, missing)


def test_a_wrong_shape_and_a_wrong_lse():
    case = kit.cases("scores/dot_product", names=["plain"], dtypes=["float64"])[0]
    with pytest.raises(CheckFailure, match="tokens and channels are swapped"):
        case.assert_matches(np.swapaxes(case.out, -1, -2))
    out, lse = zoo.logsumexp(**case.inputs, bug="log-sum-exp in base 2")
    with pytest.raises(CheckFailure, match="base 2"):
        case.assert_matches(out, lse=lse)
    with pytest.raises(CheckFailure, match="lse has shape"):
        case.assert_matches(out, lse=lse[..., None])


def test_the_epsilons_are_those_of_the_dtypes():
    for name in ("float64", "float32", "float16"):
        assert lowp.EPS[name] == np.finfo(name).eps
    assert lowp.round_to(np.array([1 + lowp.EPS["bfloat16"]]), "bfloat16")[0] > 1


def test_larger_sizes():
    case = kit.cases("heads/multi_query", names=["mask"], sizes={"T": 20, "S": 33, "D": 16})[0]
    assert case.inputs["q"].shape[-2:] == (20, 16) and case.inputs["mask"].shape[-2:] == (20, 33)
    out, cache = case.spec.forward(**case.inputs)
    case.assert_matches(out, case.spec.backward(case.dout, cache))
    with pytest.raises(CheckFailure, match=r"sizes=\{'T': 20"):
        case.assert_matches(out + 1)


def test_pytest_shows_ids_and_explanations(tmp_path):
    (tmp_path / "test_mine.py").write_text(
        "import pytest\n"
        "from attention_ref import kit\n"
        "from attention_ref.kit import zoo\n"
        "CASES = kit.cases('scores/dot_product', names=['square', 'causal'])\n"
        "@pytest.mark.parametrize('case', CASES)\n"
        "def test_kernel(case):\n"
        "    case.assert_matches(zoo.attend(**case.inputs, bug='causal ignored')[0])\n"
    )
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert "2 failed, 2 passed" in run.stdout, run.stdout
    assert "test_mine.py::test_kernel[causal-float64]" in run.stdout
    assert "matches without the causal mask" in run.stdout


def test_inputs_are_fresh_and_options_say_what_is_needed():
    case = kit.cases("scores/dot_product", names=["mask"], dtypes=["float32"])[0]
    case.inputs["q"][:] = 0
    assert np.any(case.inputs["q"]) and case.inputs["q"].dtype == np.float32
    assert case.needs == {"mask", "scale"}
    some = kit.cases("scores/dot_product", supports=("scale", "causal"))
    assert some and all(c.needs <= {"scale", "causal"} for c in some)


@pytest.mark.parametrize(
    "change", [{"dtypes": ("float8",)}, {"names": ["casual"]}, {"conventions": {"alien": 1}}]
)
def test_misuse(change):
    with pytest.raises(ParameterError):
        kit.cases("scores/dot_product", **change)


def test_kept_indices_step_by_step():
    case = kit.cases("cache/streaming_sinks", names=["plain"], dtypes=["float64"])[0]
    case.assert_matches(case.out)
    kept = case.out.copy()
    kept[12, 5] += 1
    with pytest.raises(CheckFailure, match="first differs at step 12"):
        case.assert_matches(kept)
    case.assert_matches(case.out[:, ::-1])  # the same tokens


def of_other_kinds():
    """Rows that are no mechanisms; those go through ``check`` in test_conform."""
    return [k for k in written()
            if catalog()[k]["kind"] != "mechanism" and golden.paths(k)[0].is_file()]  # fmt: skip


@pytest.mark.parametrize("key", [*of_other_kinds(), "scores/alibi"])
def test_every_row_has_cases(key):
    """The row's own result is within its tolerance, whatever the kind."""
    for case in kit.cases(key, dtypes=("float32",)):
        out, cache = case.spec.call(case.inputs)
        found = tree.flatten(out)
        grads = None
        if case.gradients:
            upstream = tree.like(out, {case.main: case.dout})
            grads = case.spec.backward_function(upstream, cache)
        case.assert_matches(found[case.main], grads)


@pytest.mark.oracle
def test_tensors():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make oracles")
    sdpa = torch.nn.functional.scaled_dot_product_attention
    for dtype in DTYPES:
        some = ("square", "odd-17", "huge", "large")
        for case in kit.cases("scores/dot_product", dtypes=(dtype,), names=some):
            given = case.torch()
            out = sdpa(given["q"], given["k"], given["v"], scale=given.get("scale"))
            out.backward(torch.tensor(case.dout).to(out.dtype))
            case.assert_matches(out, {n: given[n].grad for n in "qkv"})
