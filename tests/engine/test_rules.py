"""Every line of the derivative table, against the complex step and against differences.

A rule without a case here fails `test_every_rule_has_a_case`.
"""

import operator

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from scipy import special

from attention_ref.engine import complex_gradient, difference, vjp
from attention_ref.engine.rules import CONSTANT, LIKE, RULES, SCIPY, SENTENCES, spell_out
from attention_ref.engine.tape import Tape, Traced, unbroadcast

EPS = np.finfo(float).eps
CASES = []


def case(rule, f, analytic=True, low=-1.37, high=1.43, **shapes):
    """Register `f(**arrays)`; the arrays hold well separated numbers between low and high."""
    CASES.append((rule, f, analytic, low, high, shapes))


def draw(number):
    """The arrays of a case: a shuffled grid, so that nothing lies near a tie."""
    _, _, _, low, high, shapes = CASES[number]
    rng = np.random.default_rng(number)
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    grid = rng.permutation(np.linspace(low, high, sum(sizes)))
    parts = np.split(grid, np.cumsum(sizes)[:-1])
    return {name: part.reshape(shapes[name]) for name, part in zip(shapes, parts)}, rng


# ---- element by element --------------------------------------------------------------------------

case(np.add, lambda x, y: x + y, x=(2, 3), y=(3,))
case(np.add, lambda x: 2 + x + 1.5, x=(2, 3))
case(np.subtract, lambda x, y: x - y, x=(2, 1, 3), y=(4, 1))
case(np.subtract, lambda x: 1 - x, x=())
case(np.multiply, lambda x, y: x * y, x=(2, 3), y=(4, 1, 3))
case(np.multiply, lambda x: x * x * 3, x=(2, 3))
case(np.divide, lambda x, y: x / y, x=(2, 3), y=(3,), low=0.4)
case(np.divide, lambda x: 2 / x, x=(2, 3), low=0.4)
case(np.remainder, lambda x, y: (4 * x) % y, False, x=(2, 3), y=(3,), low=0.41)
case(np.negative, lambda x: -x, x=(2, 3))
case(np.positive, lambda x: +x, x=(2, 3))
case(np.conjugate, lambda x: np.conj(x), False, x=(2, 3))
case(np.absolute, lambda x: abs(x), False, x=(2, 3))
case(np.reciprocal, lambda x: np.reciprocal(x), x=(2, 3), low=0.4)
case(np.square, lambda x: np.square(x), x=(2, 3))
case(np.sqrt, lambda x: np.sqrt(x), x=(2, 3), low=0.4)
case(np.cbrt, lambda x: np.cbrt(x), False, x=(2, 3), low=0.4)
case(np.power, lambda x: x**3 + x**2 + x**1 + x**0, x=(2, 3))
case(np.power, lambda x: x**-1.5, x=(2, 3), low=0.4)
case(np.power, lambda x: 2.0**x, x=(2, 3))
case(np.power, lambda x, y: x**y, x=(2, 3), y=(3,), low=0.4)
case(np.power, lambda x: x ** np.array([0.0, 1.0, 2.0]), False, x=(2, 3))
case(np.exp, lambda x: np.exp(x), x=(2, 3))
case(np.exp2, lambda x: np.exp2(x), False, x=(2, 3))
case(np.expm1, lambda x: np.expm1(x), x=(2, 3))
case(np.log, lambda x: np.log(x), x=(2, 3), low=0.4)
case(np.log2, lambda x: np.log2(x), x=(2, 3), low=0.4)
case(np.log10, lambda x: np.log10(x), x=(2, 3), low=0.4)
case(np.log1p, lambda x: np.log1p(x), x=(2, 3), low=-0.5)
case(np.logaddexp, lambda x, y: np.logaddexp(x, y), False, x=(2, 3), y=(3,))
case(np.sin, lambda x: np.sin(x), x=(2, 3))
case(np.cos, lambda x: np.cos(x), x=(2, 3))
case(np.tan, lambda x: np.tan(x), x=(2, 3), low=-1.2, high=1.2)
case(np.sinh, lambda x: np.sinh(x), x=(2, 3))
case(np.cosh, lambda x: np.cosh(x), x=(2, 3))
case(np.tanh, lambda x: np.tanh(x), x=(2, 3))
case(np.arcsin, lambda x: np.arcsin(x), x=(2, 3), low=-0.8, high=0.8)
case(np.arccos, lambda x: np.arccos(x), x=(2, 3), low=-0.8, high=0.8)
case(np.arctan, lambda x: np.arctan(x), x=(2, 3))
case(np.arctan2, lambda x, y: np.arctan2(x, y), False, x=(2, 3), y=(3,), low=0.4)
case(np.arcsinh, lambda x: np.arcsinh(x), x=(2, 3))
case(np.arccosh, lambda x: np.arccosh(x), x=(2, 3), low=1.2, high=2.5)
case(np.arctanh, lambda x: np.arctanh(x), x=(2, 3), low=-0.8, high=0.8)
case("scipy.special.erf", lambda x: special.erf(x), x=(2, 3))
case("scipy.special.expit", lambda x: special.expit(x), False, x=(2, 3))

# ---- choices -------------------------------------------------------------------------------------

case(np.maximum, lambda x, y: np.maximum(x, y), x=(2, 3), y=(3,))
case(np.maximum, lambda x: np.maximum(x, 0.01), x=(2, 3))
case(np.minimum, lambda x, y: np.minimum(x, y), x=(2, 3), y=(4, 1, 1))
case(np.where, lambda x, y: np.where(x > 0.1, x, y), x=(2, 3), y=(3,))
case(np.where, lambda x: np.exp(np.where(x > 0.1, x, -np.inf)), x=(2, 3))
case(np.nan_to_num, lambda x: np.nan_to_num(np.where(x > 0.1, x, np.nan)), False, x=(2, 3))
case(np.clip, lambda x: np.clip(x, -0.51, 0.61), x=(3, 4))
case(np.clip, lambda x, y: np.clip(x, y, None), x=(3, 4), y=(4,))
case(np.clip, lambda x: np.clip(x, min=-0.51, max=0.61), x=(3, 4))

# ---- reductions ----------------------------------------------------------------------------------

for name in ("sum", "mean", "prod", "max", "amax", "min", "amin", "ptp"):
    reduce = getattr(np, name)
    case(reduce, lambda x, r=reduce: r(x), x=(2, 3, 2))
    case(reduce, lambda x, r=reduce: r(x, axis=1), x=(2, 3, 2))
    case(reduce, lambda x, r=reduce: r(x, -1, keepdims=True), x=(2, 3, 2))
    case(reduce, lambda x, r=reduce: r(x, axis=(0, -1)), x=(2, 3, 2))
    case(reduce, lambda x, r=reduce: r(x, axis=(2, 0), keepdims=True), x=(2, 3, 2))
    case(reduce, lambda x, r=reduce: r(a=x, axis=None, keepdims=True), x=(2, 3))
for name in ("cumsum", "cumprod"):
    scan = getattr(np, name)
    case(scan, lambda x, r=scan: r(x), x=(2, 3))
    case(scan, lambda x, r=scan: r(x, 0), x=(4, 3))
    case(scan, lambda x, r=scan: r(x, axis=-2), x=(2, 3, 2))

# ---- products of arrays --------------------------------------------------------------------------

case(np.matmul, lambda x, y: x @ y, x=(2, 3), y=(3, 4))
case(np.matmul, lambda x, y: x @ y, x=(5, 1, 2, 3), y=(2, 3, 4))
case(np.matmul, lambda x, y: x @ y, x=(3,), y=(3,))
case(np.matmul, lambda x, y: x @ y, x=(3,), y=(2, 3, 4))
case(np.matmul, lambda x, y: x @ y, x=(2, 4, 3), y=(3,))
case(np.matmul, lambda x: x @ np.swapaxes(x, -1, -2), x=(2, 2, 3))
EINSUMS = [
    ("ij,jk->ik", (2, 3), (3, 4)),
    ("ij,jk", (2, 3), (3, 4)),
    ("ij->ji", (2, 3)),
    ("ij->", (2, 3)),
    ("ij->j", (2, 3)),
    ("ba", (2, 3)),
    ("ii->i", (3, 3)),
    ("ii", (3, 3)),
    ("iij,j->i", (2, 2, 3), (3,)),
    ("...ij,...jk->...ik", (2, 2, 3), (3, 4)),
    ("...td,...sd->...ts", (2, 1, 2, 3), (3, 4, 3)),
    ("...ij,jk", (2, 2, 3), (3, 4)),
    ("i...,...i->...", (2, 3), (1, 2)),
    ("b...d,d->b...", (2, 1, 2, 3), (3,)),
    ("ij,ik,il->jkl", (2, 3), (2, 2), (2, 4)),
    ("ij,kl->il", (2, 3), (3, 4)),
    (",ij->ij", (), (2, 3)),
    (" i j , j -> i ", (2, 3), (3,)),
]
for subscripts, *shapes in EINSUMS:
    case(
        np.einsum,
        lambda s=subscripts, **arrays: np.einsum(s, *arrays.values()),
        **{f"x{i}": shape for i, shape in enumerate(shapes)},
    )
case(np.einsum, lambda x: np.einsum("ij,kj,kl->il", x, x, x, optimize=True), x=(3, 3))
case(np.tensordot, lambda x, y: np.tensordot(x, y), x=(2, 3, 4), y=(3, 4, 2))
case(np.tensordot, lambda x, y: np.tensordot(x, y, 1), x=(2, 3), y=(3, 4))
case(np.tensordot, lambda x, y: np.tensordot(x, y, 0), x=(2, 3), y=(2,))
case(
    np.tensordot,
    lambda x, y: np.tensordot(x, y, axes=([2, 0], [0, -1])),
    x=(2, 3, 4),
    y=(4, 3, 2),
)
case(np.dot, lambda x, y: np.dot(x, y), x=(2, 3), y=(3, 4))
case(np.dot, lambda x, y: np.dot(x, y), x=(3,), y=(3,))
case(np.dot, lambda x, y: np.dot(x, y), x=(2, 2, 3), y=(2, 3, 2))
case(np.dot, lambda x, y: np.dot(x, y), x=(), y=(2, 3))
case(np.inner, lambda x, y: np.inner(x, y), x=(2, 3), y=(4, 3))
case(np.inner, lambda x, y: np.inner(x, y), x=(3,), y=())
case(np.inner, lambda x, y: np.inner(x, y), x=(2, 2, 3), y=(2, 1, 3))
case(np.outer, lambda x, y: np.outer(x, y), x=(2, 2), y=(3,))
case(np.linalg.inv, lambda x: np.linalg.inv(x + 3 * np.identity(3)), x=(2, 3, 3))
case(np.linalg.solve, lambda x, y: np.linalg.solve(x + 3 * np.identity(3), y), x=(3, 3), y=(3,))
case(
    np.linalg.solve,
    lambda x, y: np.linalg.solve(x + 3 * np.identity(3), y),
    x=(2, 3, 3),
    y=(1, 3, 2),
)
case(np.linalg.solve, lambda x, y: np.linalg.solve(x + 3 * np.identity(2), y), x=(3, 2, 2), y=(2,))

# ---- shapes and orders ---------------------------------------------------------------------------

case(np.reshape, lambda x: np.reshape(x, (3, -1)), x=(2, 3, 2))
case(np.reshape, lambda x: np.reshape(x, (3, 4), order="F"), x=(2, 3, 2))
case(np.ravel, lambda x: np.ravel(x), x=(2, 3))
case(np.ravel, lambda x: np.ravel(x, order="F"), x=(2, 3))
case(np.expand_dims, lambda x: np.expand_dims(x, (0, -1)), x=(2, 3))
case(np.squeeze, lambda x: np.squeeze(x), x=(2, 1, 3, 1))
case(np.squeeze, lambda x: np.squeeze(x, axis=1), x=(2, 1, 3, 1))
for atleast in (np.atleast_1d, np.atleast_2d, np.atleast_3d):
    case(atleast, lambda x, f=atleast: f(x), x=(3,))
    case(atleast, lambda x, f=atleast: f(x), x=())
case(np.transpose, lambda x: np.transpose(x), x=(2, 3, 4))
case(np.transpose, lambda x: np.transpose(x, (2, 0, -2)), x=(2, 3, 4))
case(np.transpose, lambda x: x.T, x=(2, 3))
case(np.swapaxes, lambda x: np.swapaxes(x, 0, -1), x=(2, 3, 4))
case(np.matrix_transpose, lambda x: np.matrix_transpose(x), x=(2, 3, 4))
case(np.moveaxis, lambda x: np.moveaxis(x, (0, 1), (-1, 0)), x=(2, 3, 4))
case(np.moveaxis, lambda x: np.moveaxis(x, -1, 0), x=(2, 3, 4))
case(np.flip, lambda x: np.flip(x), x=(2, 3))
case(np.flip, lambda x: np.flip(x, axis=(0, 2)), x=(2, 3, 4))
case(np.roll, lambda x: np.roll(x, 2), x=(2, 3))
case(np.roll, lambda x: np.roll(x, 1, axis=-1), x=(2, 3))
case(np.roll, lambda x: np.roll(x, (1, -2), axis=(0, 1)), x=(4, 3))
case(np.copy, lambda x: np.copy(x), x=(2, 3))
case(np.astype, lambda x: np.astype(x, np.float64), False, x=(2, 3))
case(np.sort, lambda x: np.sort(x), x=(3, 4))
case(np.sort, lambda x: np.sort(x, axis=0, kind="stable"), x=(3, 4))
case(np.sort, lambda x: np.sort(x, axis=None), x=(3, 4))
case(np.sort, lambda x: np.sort(x), x=(2, 3, 4))
case(np.partition, lambda x: np.max(np.partition(x, 2)[..., :2], -1), x=(3, 5))
case(np.partition, lambda x: np.sum(np.partition(x, -2, axis=0)[-2:], 0), x=(4, 3))
case(np.partition, lambda x: np.max(np.partition(x, 1)[..., :2], -1), x=(2, 3, 4))

# ---- parts, copies, joins ------------------------------------------------------------------------

INDEXES = [
    1,
    -1,
    (0, 2),
    (..., 1),
    slice(None, None, -1),
    (slice(1, None), None, slice(None, None, 2)),
    None,
    np.array([0, 1, 1]),
    (slice(None), np.array([[0, 2], [2, 2]])),
    (np.array([0, 1, 1]), np.array([2, 0, 0])),
    ([0, 0], slice(None)),
    np.array([[True, False, True], [False, True, True]]),
    (slice(None), np.array([True, False, True])),
]
for index in INDEXES:
    case(operator.getitem, lambda x, i=index: x[i] * x[i], x=(2, 3))
case(operator.getitem, lambda x: x[()] * x[..., None], x=())
case(operator.getitem, lambda x: x[:, 0] * x[:, 1] + x[:, 1] - x[1, 2], x=(2, 3))
case(np.take, lambda x: np.take(x, np.array([[0, 2], [2, 2]]), axis=1), x=(2, 3, 2))
case(np.take, lambda x: np.take(x, np.array([0, 5, 5])), x=(2, 3))
case(np.take_along_axis, lambda x: np.take_along_axis(x, np.argsort(-x, -1), -1), x=(2, 3))
case(
    np.take_along_axis,
    lambda x: np.take_along_axis(x, np.array([[[0], [2], [2]]]), axis=1),
    x=(2, 3, 2),
)
case(np.take_along_axis, lambda x: np.take_along_axis(x, np.array([0, 5, 5]), None), x=(2, 3))
case(np.take_along_axis, lambda x: np.take_along_axis(x, np.argsort(x), -1), x=(2, 3, 4))
case(np.broadcast_to, lambda x: np.broadcast_to(x, (4, 2, 3)), x=(2, 1))
case(np.broadcast_arrays, lambda x, y: np.broadcast_arrays(x, y)[0] * y, x=(2, 1), y=(3,))
case(np.repeat, lambda x: np.repeat(x, 2), x=(2, 3))
case(np.repeat, lambda x: np.repeat(x, 2, axis=-2), x=(2, 3, 2))
case(np.repeat, lambda x: np.repeat(x, [2, 0, 1], axis=1), x=(2, 3))
case(np.repeat, lambda x: np.repeat(x, [1, 0, 2, 1, 0, 3]), x=(2, 3))
case(np.tile, lambda x: np.tile(x, 2), x=(2, 3))
case(np.tile, lambda x: np.tile(x, (2, 1, 3)), x=(2, 3))
case(np.tile, lambda x: np.tile(x, (2,)), x=(2, 3, 2))
case(np.concatenate, lambda x, y: np.concatenate([x, y, x], axis=-1), x=(2, 3), y=(2, 1))
case(np.concatenate, lambda x, y: np.concatenate((x, y)), x=(2, 3), y=(1, 3))
case(np.concatenate, lambda x, y: np.concatenate((x, y), axis=None), x=(2, 3), y=(2,))
case(np.concatenate, lambda x: np.concatenate([np.ones((1, 3)), x]), x=(2, 3))
case(np.stack, lambda x, y: np.stack([x, y, x]), x=(2, 3), y=(2, 3))
case(np.stack, lambda x, y: np.stack([x, y], axis=-1), x=(2, 3), y=(2, 3))
case(np.vstack, lambda x, y: np.vstack([x, y]), x=(3,), y=(2, 3))
case(np.hstack, lambda x, y: np.hstack([x, y]), x=(3,), y=(2,))
case(np.hstack, lambda x, y: np.hstack([x, y]), x=(2, 3, 2), y=(2, 1, 2))
case(np.split, lambda x: np.split(x, 2, axis=-1)[1], x=(2, 4))
case(np.split, lambda x: np.multiply(*np.split(x, [1, 2])[:2]), x=(4, 2))
case(np.array_split, lambda x: np.array_split(x, 3)[0] * 2, x=(4, 2))
case(np.pad, lambda x: np.pad(x, 2), x=(2, 3))
case(np.pad, lambda x: np.pad(x, (1, 2), constant_values=1.0), x=(2, 3))
case(np.pad, lambda x: np.pad(x, [(0, 0), (3, 1)], mode="constant"), x=(2, 3))
case(np.tril, lambda x: np.tril(x), x=(2, 3, 4))
case(np.tril, lambda x: np.tril(x, -1), x=(3, 2))
case(np.triu, lambda x: np.triu(x, k=1), x=(3, 4))
case(np.diag, lambda x: np.diag(x, -1), x=(3,))
case(np.diag, lambda x: np.diag(x), x=(2, 3))
case(np.diag, lambda x: np.diag(x, 1), x=(4, 3))
case(np.diagonal, lambda x: np.diagonal(x, -1), x=(4, 3, 2))
case(np.diagonal, lambda x: np.diagonal(x, 1, axis1=-1, axis2=1), x=(2, 3, 4))
case(np.trace, lambda x: np.trace(x, 1), x=(3, 4))
case(np.trace, lambda x: np.trace(x, axis1=1, axis2=2), x=(2, 3, 4))
case(np.diff, lambda x: np.diff(x), x=(2, 4))
case(np.diff, lambda x: np.diff(x, n=2, axis=0), x=(4, 3))
case(sliding_window_view, lambda x: sliding_window_view(x, 3, axis=-2), x=(2, 5, 2))
case(sliding_window_view, lambda x: sliding_window_view(x, (2, 3), axis=(0, 1)), x=(4, 5))
case(sliding_window_view, lambda x: sliding_window_view(x, (2, 2)), x=(3, 4))


def name_of(number):
    rule = CASES[number][0]
    return f"{getattr(rule, '__name__', rule)}-{number}"


each = pytest.mark.parametrize("number", range(len(CASES)), ids=name_of)


def test_every_rule_has_a_case():
    tested = {rule for rule, *_ in CASES}
    missing = (set(RULES) | set(SENTENCES) | set(SCIPY)) - tested
    assert not missing, f"write a case for {missing}"


@each
def test_value_is_that_of_numpy(number):
    f, (arrays, _) = CASES[number][1], draw(number)
    out, _ = vjp(f, arrays)
    plain = f(**arrays)
    assert isinstance(out, (np.ndarray, np.generic))
    assert out.dtype == plain.dtype
    np.testing.assert_array_equal(out, plain)


@each
def test_adjoint_identity_with_differences(number):
    """<u, J w> = <J^T u, w>."""
    _, f, _, _, _, shapes = CASES[number]
    arrays, rng = draw(number)
    tangents = {name: rng.uniform(-1, 1, shape) for name, shape in shapes.items()}
    with np.errstate(divide="raise", invalid="raise", over="raise"):
        out, pull = vjp(f, arrays)
        u = rng.uniform(-1, 1, out.shape)
        grads = pull(u)
        slope = difference(f, arrays, tangents)
    terms = [grads[name] * tangents[name] for name in shapes]
    scale = sum(np.sum(np.abs(t)) for t in terms) + 1e-3
    assert abs(np.sum(u * slope) - sum(np.sum(t) for t in terms)) <= 1e-9 * scale


@each
def test_every_coordinate_by_complex_step(number):
    _, f, analytic, *_ = CASES[number]
    if not analytic:
        return  # the difference above is the check
    arrays, rng = draw(number)
    out, pull = vjp(f, arrays)
    u = rng.uniform(-1, 1, out.shape)
    expected = complex_gradient(f, arrays, u)
    for name, grad in pull(u).items():
        assert grad.shape == arrays[name].shape
        bound = 64 * EPS * np.max(np.abs(expected[name]))
        assert np.max(np.abs(grad - expected[name])) <= bound


@each
def test_gradients_are_not_all_zero(number):
    """A table of zeros would satisfy nothing else, but say it outright."""
    arrays, rng = draw(number)
    out, pull = vjp(CASES[number][1], arrays)
    assert all(np.any(grad) for grad in pull(rng.uniform(0.5, 1, out.shape)).values())


@each
def test_float32_stays_float32(number):
    f, (arrays, rng) = CASES[number][1], draw(number)
    out, pull = vjp(f, arrays)
    u = rng.uniform(-1, 1, out.shape)
    truth = pull(u)
    single, pull = vjp(f, {name: x.astype(np.float32) for name, x in arrays.items()})
    grads = pull(u.astype(single.dtype))
    for name, grad in grads.items():
        assert grad.dtype == np.float32
        assert np.max(np.abs(grad - truth[name])) <= 1e-4 * np.max(np.abs(truth[name]))


def test_products_at_zeros():
    with np.errstate(all="raise"):
        for x, expected in ([2.0, 0.0, 3.0], [0, 6, 0]), ([2.0, 0.0, 0.0], [0, 0, 0]):
            _, pull = vjp(lambda x: np.prod(x), {"x": np.array(x)})
            np.testing.assert_array_equal(pull(np.array(1.0))["x"], expected)
        _, pull = vjp(lambda x: np.cumprod(x), {"x": np.array([2.0, 0.0, 3.0])})
        np.testing.assert_array_equal(pull(np.array([1.0, 10.0, 100.0]))["x"], [1, 620, 0])


def test_power_at_zero():
    x = {"x": np.array([0.0, 2.0])}
    with np.errstate(all="raise"):
        for exponent, expected in (0, [0, 0]), (1, [1, 1]), (2, [0, 4]):
            for y in exponent, np.array(float(exponent)):
                _, pull = vjp(lambda x, y=y: x**y, x)
                np.testing.assert_array_equal(pull(np.ones(2))["x"], expected)


def test_numbers_that_are_replaced_get_no_gradient():
    _, pull = vjp(lambda x: np.nan_to_num(x), {"x": np.array([np.nan, 1.0, -np.inf])})
    np.testing.assert_array_equal(pull(np.ones(3))["x"], [0, 1, 0])


def test_a_diagonal_outside_the_matrix_is_empty():
    out, pull = vjp(lambda x: np.diagonal(x, 7), {"x": np.ones((2, 3))})
    np.testing.assert_array_equal(pull(np.ones(out.shape))["x"], np.zeros((2, 3)))


def test_ties_share():
    _, pull = vjp(lambda x: np.max(x, -1), {"x": np.array([[1.0, 3.0, 3.0]])})
    np.testing.assert_array_equal(pull(np.array([2.0]))["x"], [[0.0, 1.0, 1.0]])
    _, pull = vjp(lambda x: np.maximum(x, 0), {"x": np.array([0.0, 1.0, -1.0])})
    np.testing.assert_array_equal(pull(np.ones(3))["x"], [0.5, 1.0, 0.0])
    _, pull = vjp(lambda x: np.abs(x), {"x": np.zeros(2)})
    np.testing.assert_array_equal(pull(np.ones(2))["x"], 0)


def test_masked_softmax_stays_finite():
    """-inf scores, an empty row included, send no NaN back."""

    def f(z, live):
        z = np.where(live, z, -np.inf)
        top = np.max(z, -1, keepdims=True)
        p = np.exp(z - np.where(np.isfinite(top), top, 0))
        total = np.sum(p, -1, keepdims=True)
        return p / np.where(total == 0, 1, total)

    live = np.array([[True, False, True], [False, False, False]])
    z = np.array([[1.0, np.nan, 2.0], [3.0, np.inf, -np.inf]])
    with np.errstate(all="raise", under="ignore"):
        out, pull = vjp(f, {"z": z, "live": live})
        grad = pull(np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))["z"]
    p = out[0, 0]
    np.testing.assert_allclose(grad[0], [-2 * p * (1 - p), 0, 2 * p * (1 - p)], rtol=1e-15)
    np.testing.assert_array_equal(grad[1], 0)


def test_logaddexp_of_minus_infinity():
    both = {"x": np.array([-np.inf, 0.0]), "y": np.array([-np.inf, -np.inf])}
    with np.errstate(all="raise"):
        _, pull = vjp(lambda x, y: np.logaddexp(x, y), both)
        grads = pull(np.ones(2))
    np.testing.assert_array_equal(grads["x"], [0, 1])
    np.testing.assert_array_equal(grads["y"], [0, 0])


def test_empty_arrays():
    for f in (np.sum, np.prod, lambda x: np.sum(np.exp(x), -1), lambda x: np.mean(x, -1)):
        out, pull = vjp(lambda x, f=f: f(x), {"x": np.zeros((0, 3))})
        assert pull(np.ones(np.shape(out)))["x"].shape == (0, 3)


@pytest.mark.parametrize(
    "shape, target",
    [((2, 3), (2, 3)), ((2, 3), (3,)), ((2, 3), ()), ((4, 2, 3), (2, 1)), ((2, 0), (2, 1))],
)
def test_unbroadcast_is_the_adjoint_of_broadcasting(shape, target):
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal(target), rng.standard_normal(shape)
    small = unbroadcast(g, target)
    assert small.shape == target
    assert np.isclose(np.sum(small * x), np.sum(g * np.broadcast_to(x, shape)), rtol=1e-13)


def test_spell_out():
    assert spell_out("ij,jk", [2, 2]) == (["ij", "jk"], "ik")
    assert spell_out("...ij,...jk", [4, 3]) == (["abij", "bjk"], "abik")
    assert spell_out("...a->...", [3]) == (["bca"], "bc")


# ---- functions whose result does not vary --------------------------------------------------------

Z = np.array([[0.5, -1.25, 2.0], [1.5, 0.25, -0.75]])
CALLS = {
    np.arange: lambda x: np.arange(3, like=x),
    np.zeros: lambda x: np.zeros((2, 2), like=x),
    np.empty: lambda x: np.empty((0, 2), like=x),
    np.ones: lambda x: np.ones(2, like=x),
    np.full: lambda x: np.full(2, 3.0, like=x),
    np.eye: lambda x: np.eye(2, like=x),
    np.identity: lambda x: np.identity(2, like=x),
    np.tri: lambda x: np.tri(2, like=x),
    np.zeros_like: lambda x: np.zeros_like(x, shape=(4, 2)),
    np.ones_like: lambda x: np.ones_like(x),
    np.empty_like: lambda x: np.empty_like(x, shape=(0, 2)),
    np.full_like: lambda x: np.full_like(x, 2.0),
    np.shape: lambda x: np.shape(x),
    np.ndim: lambda x: np.ndim(x),
    np.size: lambda x: np.size(x),
    np.result_type: lambda x: np.result_type(x, np.float32),
    np.can_cast: lambda x: np.can_cast(x, np.float64),
    np.equal: lambda x: x == 2.0,
    np.not_equal: lambda x: x != 2.0,
    np.less: lambda x: x < 0,
    np.less_equal: lambda x: x <= Z,
    np.greater: lambda x: x > 0,
    np.greater_equal: lambda x: x >= Z,
    np.isclose: lambda x: np.isclose(x, 2.0),
    np.allclose: lambda x: np.allclose(x, Z),
    np.array_equal: lambda x: np.array_equal(x, Z),
    np.logical_and: lambda x: np.logical_and(x, True),
    np.logical_or: lambda x: np.logical_or(x, False),
    np.logical_xor: lambda x: np.logical_xor(x, True),
    np.heaviside: lambda x: np.heaviside(x, 0.5),
    np.floor_divide: lambda x: x // 0.3,
    np.argpartition: lambda x: np.sort(np.argpartition(x, 1, axis=-1)[:, 2:]),
    np.searchsorted: lambda x: np.searchsorted(np.array([0.0, 1.0]), x),
    np.lexsort: lambda x: np.lexsort(x),
    np.digitize: lambda x: np.digitize(x, np.array([0.0, 1.0])),
    np.shares_memory: lambda x: np.shares_memory(x, np.zeros(2)),
    np.may_share_memory: lambda x: np.may_share_memory(x, np.zeros(2)),
}


@pytest.mark.parametrize("function", sorted(CONSTANT | LIKE, key=lambda f: f.__name__))
def test_constant_functions_give_plain_results(function):
    call = CALLS.get(function, lambda x: function(x))
    got, expected = call(Tape().record(Z)), call(Z)
    assert not isinstance(got, Traced)
    assert type(got) is type(expected)
    for a, b in zip(np.atleast_1d(got), np.atleast_1d(expected)):
        np.testing.assert_array_equal(a, b)


def test_no_function_stands_in_two_tables():
    tables = [set(RULES), set(SENTENCES), CONSTANT, LIKE]
    assert sum(map(len, tables)) == len(set().union(*tables))
