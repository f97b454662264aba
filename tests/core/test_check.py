"""The door: every refusal names the argument, what came, what was expected, and a hint."""

import numpy as np
import pytest

from attention_ref import engine
from attention_ref.core import check
from attention_ref.core.errors import DTypeError, MemoryLimitError, ParameterError, ShapeError

X = np.ones((2, 3))


@pytest.mark.parametrize(
    ("x", "says"),
    [
        ([[1.0]], "x is a list, expected a NumPy array; hint: np.asarray"),
        (1.0, "x is a float"),
        (np.float64(1.0), "x is a float64"),
        (np.ones((1, 1)).view(np.matrix), "x is a matrix, expected a plain array"),
        (np.ma.masked_array([1.0]), "x is a MaskedArray"),
        (np.ones(3, np.float16), "dtype float16, expected float32 or float64; hint: x.astype"),
        (np.ones(3, np.int64), "dtype int64"),
        (np.ones(3, bool), "dtype bool"),
        (np.ones(3, complex), "dtype complex128"),
        (np.array(["a"]), "dtype <U1"),
        (np.array([None]), "dtype object"),
        (np.ones(3, np.longdouble), "expected float32 or float64"),
    ],
)
def test_kinds_and_dtypes(x, says):
    with pytest.raises(DTypeError) as refusal:
        check.floating("x", x)
    assert says in str(refusal.value)


def test_sparse_and_tensors_get_their_own_hint():
    from scipy import sparse

    class Tensor:
        requires_grad = True

    with pytest.raises(DTypeError, match=r"x\.toarray\(\)"):
        check.floating("x", sparse.eye(3).tocsr())
    with pytest.raises(DTypeError, match=r"x\.detach\(\)\.numpy\(\)"):
        check.floating("x", Tensor())


def test_complex_and_longdouble_only_where_allowed():
    with engine.complex_step():
        check.floating("x", np.ones(3, complex))
    with check.extended():
        check.floating("x", np.ones(3, np.longdouble))
    with pytest.raises(DTypeError):
        check.floating("x", np.ones(3, complex))


@pytest.mark.parametrize("dtype", ["f4", "f8", ">f4", ">f8"])
def test_floats_pass(dtype):
    check.floating("x", np.ones(3, dtype))


def test_shapes_binds_letters_and_broadcasts_leads():
    n = check.shapes(
        a=(np.ones((4, 1, 2, 3)), "... T D"), b=(np.ones((5, 7, 3)), "... S D"), c=(None, "M")
    )
    assert n == {"...": (4, 5), "T": 2, "D": 3, "S": 7}


@pytest.mark.parametrize(
    ("named", "says"),
    [
        ({"a": (X, "T D"), "b": (np.ones((2, 4)), "S D")}, "b has D = 4 .* expected 3 as in a"),
        ({"a": (X, "D")}, r"a has shape \(2, 3\), expected \(D\)"),
        ({"a": (np.ones(3), "... T D")}, "at least 2 axes"),
        ({"a": (X, "T 4")}, "a has 4 = 3"),
        ({"a": (np.ones((3, 3, 4)), "M M D"), "b": (np.ones((2, 4)), "M D")}, "expected 3 as in a"),
        ({"a": (np.ones((2, 5, 3)), "... T D"), "b": (np.ones((4, 5, 3)), "... T D")},
         r"b has leading axes \(4,\), expected \(2,\)"),
    ],
)  # fmt: skip
def test_shape_errors(named, says):
    with pytest.raises(ShapeError, match=says):
        check.shapes(**named)


def test_masks():
    check.check_mask(None, (2, 3))
    check.check_mask(np.ones((1, 3), bool), (5, 2, 3))
    with pytest.raises(DTypeError, match="mask == 0"):
        check.check_mask(np.zeros((2, 3)), (2, 3))
    with pytest.raises(DTypeError, match="may attend"):
        check.check_mask(np.zeros((2, 3), int), (2, 3))
    for given, full in (((5, 2, 3), (2, 3)), ((2, 2), (2,)), ((2,), ())):
        with pytest.raises(ShapeError, match="expected to broadcast"):
            check.check_mask(np.ones(given, bool), full)
    with pytest.raises(ShapeError, match="looks transposed"):
        check.check_mask(np.ones((3, 2), bool), (4, 2, 3))


@pytest.mark.parametrize(
    "call",
    [
        lambda: check.number("x", np.nan),
        lambda: check.number("x", "1"),
        lambda: check.number("x", True),
        lambda: check.number("x", 0.0, low=0, open_low=True),
        lambda: check.number("x", 1.5, high=1),
        lambda: check.count("x", 1.0),
        lambda: check.count("x", -1),
        lambda: check.count("x", True),
        lambda: check.count("x", 9, high=8),
        lambda: check.option("x", "zeor", ("zero", "nan")),
        lambda: check.integer("x", np.array([0, 7]), low=0, high=7),
    ],
)
def test_numbers_and_options(call):
    with pytest.raises(ParameterError, match=r"^x "):
        call()


def test_good_numbers_pass():
    for value in (None, 1, 2.5, np.float32(1), np.int64(3)):
        check.number("x", value, low=0)
    check.count("x", np.int64(3), low=3, high=3)
    check.option("x", "zero", ("zero",))
    check.integer("x", np.array([0, 6]), low=0, high=7)
    check.generator("rng", np.random.default_rng(0))


def test_generator_and_memory():
    with pytest.raises(DTypeError, match="default_rng"):
        check.generator("rng", np.random.RandomState(0))
    with pytest.raises(MemoryLimitError, match=r"3\.0 GiB, the limit is 2 GiB"):
        check.memory((3, 2**27), np.float64)
