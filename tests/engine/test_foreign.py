"""Foreign refuses what CuPy refuses, says why, and lets the rest through."""

import importlib
import math

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from scipy import special

from attention_ref.engine import Foreign, ForeignRefusal
from attention_ref.engine.foreign import ABOUT, BUFFERS, FUNCTIONS, INSTEAD, ONLY_BY_POSITION


def far(*shape):
    rng = np.random.default_rng(len(shape))
    return Foreign(rng.standard_normal(shape))


def test_softmax_attention_runs_bit_by_bit_the_same():
    def attention(q, k, v):
        z = np.einsum("...td,...sd->...ts", q, k) * (1 / math.sqrt(q.shape[-1]))
        rows, columns = np.arange(z.shape[-2], like=q), np.arange(z.shape[-1], like=q)
        z = np.where(columns[None, :] <= rows[:, None], z, -np.inf)
        top = np.max(z, axis=-1, keepdims=True)
        p = np.exp(z - np.where(np.isfinite(top), top, 0))
        return (p / np.sum(p, axis=-1, keepdims=True)) @ v

    q, k, v = far(2, 3, 4), far(2, 5, 4), far(2, 5, 2)
    out = attention(q, k, v)
    assert isinstance(out, Foreign)
    np.testing.assert_array_equal(out.value, attention(q.value, k.value, v.value))


REFUSED = [
    (lambda x: x + np.zeros(3), r"np\.add: a NumPy array of shape \(3,\).*np\.zeros_like"),
    (lambda x: np.zeros(3) * x, r"np\.multiply: a NumPy array"),
    (lambda x: x * np.array(2.0), r"NumPy array of shape \(\)"),
    (lambda x: np.where(np.ones(3, bool), x, 0.0), r"np\.where: a NumPy array"),
    (lambda x: np.concatenate([x, np.ones((1, 3))]), r"np\.concatenate: a NumPy array"),
    (lambda x: np.einsum("ij,j->i", x, np.ones(3)), r"np\.einsum: a NumPy array"),
    (lambda x: x[np.array([0, 1])], r"x\[index\]: a NumPy array"),
    (lambda x: x[..., np.ones(3, bool)], r"x\[index\]: a NumPy array"),
    (lambda x: x[x[:, 0] > 0, x[0] > 0], r"one boolean array"),
    (lambda x: np.max(x, initial=0.0), r"np\.max: .*initial=.*np\.where"),
    (lambda x: np.sum(x, where=x > 0), r"np\.sum: .*where="),
    (lambda x: np.mean(x, where=x > 0), r"np\.mean: .*where="),
    (lambda x: np.any(x, where=x > 0), r"np\.any: .*where="),
    (lambda x: np.add.accumulate(x), r"np\.add\.accumulate"),
    (lambda x: np.logaddexp.reduce(x), r"np\.logaddexp\.reduce"),
    (lambda x: np.add.reduce(x), r"np\.add\.reduce"),
    (lambda x: np.multiply.outer(x, x), r"np\.multiply\.outer"),
    (lambda x: np.add.at(x, 0, 1.0), r"np\.add\.at"),
    (lambda x: np.block([[x, x]]), r"np\.block: .*write np\.concatenate"),
    (lambda x: np.unstack(x), r"np\.unstack"),
    (lambda x: np.vecdot(x, x), r"np\.vecdot: .*write np\.sum"),
    (lambda x: np.linalg.multi_dot([x, x, x]), r"np\.linalg\.multi_dot"),
    (lambda x: np.linalg.vector_norm(x), r"np\.linalg\.vector_norm"),
    (lambda x: np.put_along_axis(x, x, 0.0, 0), r"np\.put_along_axis"),
    (lambda x: np.argsort(x, stable=True), r"np\.argsort: .*kind='stable'"),
    (lambda x: np.argsort(x, kind="mergesort"), r"np\.argsort: .*'mergesort'"),
    (lambda x: np.sort(x, -1, "quicksort"), r"np\.sort: .*'quicksort'"),
    (lambda x: np.eye(3, like=x), r"np\.eye: .*compare two aranges"),
    (lambda x: np.ones(3, like=x), r"np\.ones: .*np\.ones_like"),
    (lambda x: np.full(3, 1.0, like=x), r"np\.full: .*np\.full_like"),
    (lambda x: np.clip(x, min=0.0), r"np\.clip: .*no min="),
    (lambda x: np.reshape(x, shape=(3, 2)), r"np\.reshape: .*no shape="),
    (lambda x: np.zeros_like(x, device="cpu"), r"np\.zeros_like: .*device="),
    (lambda x: np.std(x, correction=1), r"np\.std: .*correction="),
    (lambda x: np.repeat(x, np.astype(x[0] > 0, int), axis=1), r"np\.repeat: .*Python numbers"),
    (lambda x: special.gammainc(x, x), r"gammainc: CuPy has no such function"),
    (lambda x: np.add(x, x, out=x), r"np\.add: out="),
    (lambda x: np.sum(x, out=x), r"np\.sum: out="),
    (lambda x: x.__iadd__(1.0), r"x \+= y write into an array that was given"),
    (lambda x: x.__setitem__(0, 1.0), r"writes into an array that was given"),
    (lambda x: np.zeros(3).__iadd__(x), r"out="),
    (lambda x: np.zeros((2, 3)).__setitem__(..., x), r"does not become a NumPy array"),
    (lambda x: np.asarray(x), r"does not become a NumPy array"),
    (lambda x: np.array([x, x]), r"np\.stack"),
    (lambda x: bool(x[0, 0] > 0), r"no truth value"),
    (lambda x: 1 if np.any(x > 0) else 0, r"no truth value"),
    (lambda x: 1 if np.array_equal(x, x) else 0, r"no truth value"),
    (lambda x: float(x[0, 0]), r"Python number"),
    (lambda x: math.sqrt(x[0, 0]), r"Python number"),
    (lambda x: int(np.sum(x)), r"Python number"),
    (lambda x: range(np.argmax(x)), r"Python number"),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_refusals_name_the_function_and_the_reason(number):
    act, message = REFUSED[number]
    with pytest.raises(ForeignRefusal, match=message):
        act(far(2, 3))


def test_methods_are_refused_by_name():
    for name in ("sum", "astype", "reshape", "max", "copy"):
        with pytest.raises(AttributeError, match=rf"use the function np\.{name}\(x\)"):
            getattr(far(2), name)


ALLOWED = [
    lambda x: x * 2.0 + 1 - np.float64(3.0),
    lambda x: np.where(x > 0, x, -np.inf),
    lambda x: np.max(x, axis=-1, keepdims=True),
    lambda x: np.arange(3, like=x),
    lambda x: np.zeros((2, 2), like=x),
    lambda x: np.zeros_like(x, shape=(4, 1)),
    lambda x: np.full_like(x, 2.0, dtype=int),
    lambda x: np.argsort(x, axis=-1, kind="stable"),
    lambda x: np.take_along_axis(x, np.argsort(x, -1), -1),
    lambda x: np.take(x, np.array([0, 0], like=x), axis=1),
    lambda x: x[..., ::-1],
    lambda x: x[[0, 1, 1]],
    lambda x: x[x > 0],
    lambda x: x[np.argmax(x[:, 0])],
    lambda x: np.repeat(x, 2, axis=0),
    lambda x: np.repeat(x, [1, 2], axis=0),
    lambda x: np.cumsum(x, axis=-1),
    lambda x: np.pad(x, ((0, 0), (1, 2))),
    lambda x: sliding_window_view(x, 2, axis=-1),
    lambda x: np.astype(x > 0, x.dtype),
    lambda x: np.tril(x @ x.T),
    lambda x: np.linalg.solve(x @ x.T, x),
    lambda x: np.concatenate([x, x]),
    lambda x: np.stack(list(x)),
    lambda x: np.fft.fft(x),
    lambda x: special.erf(x),
    lambda x: np.sum(x),
    lambda x: np.clip(x, -1.0, 1.0),
    lambda x: abs(x) ** 2,
]


@pytest.mark.parametrize("number", range(len(ALLOWED)))
def test_what_cupy_has_runs_and_stays_foreign(number):
    act, x = ALLOWED[number], far(2, 3)
    out = act(x)
    assert isinstance(out, Foreign)
    expected = act(x.value)
    assert out.dtype == np.asarray(expected).dtype
    np.testing.assert_array_equal(out.value, expected)


def test_lists_and_answers():
    x = far(2, 4)
    assert all(isinstance(part, Foreign) for part in np.split(x, 2, axis=-1))
    assert all(isinstance(part, Foreign) for part in np.nonzero(x))
    assert np.shape(x) == (2, 4)
    assert np.ndim(x) == 2
    assert np.result_type(x, np.float32) == np.float64
    assert not np.iscomplexobj(x)
    assert (x.shape, x.dtype, x.ndim, x.size, len(x)) == ((2, 4), np.float64, 2, 8, 2)
    assert x.T.shape == (4, 2)
    assert x[0, 0].item() == x.value[0, 0]
    assert x.unwrap() is x.value
    assert repr(far(0)) == "Foreign(array([], dtype=float64))"


def test_numbers_without_axes_are_arrays():
    """NumPy gives np.float64, CuPy an array of shape ()."""
    assert type(np.sum(far(3)).value) is np.ndarray


def test_own_buffers_may_be_written():
    """Backwards write into buffers that they made; what was given stays as it was."""
    x = far(2, 3)
    given = x.value.copy()
    total = np.zeros_like(x)
    total[0] = x[1]
    total[:, 1] += 2.0 * x[:, 0]
    total += x
    expected = np.zeros((2, 3))
    expected[0] = given[1]
    expected[:, 1] += 2 * given[:, 0]
    np.testing.assert_array_equal(total.value, expected + given)
    np.testing.assert_array_equal(x.value, given)
    with pytest.raises(ForeignRefusal, match="a NumPy array"):
        total[0] = np.ones(3)


def test_tables_name_numpy_functions():
    def exists(name):
        module, _, last = name.rpartition(".")
        if module == "scipy.special":
            return hasattr(special, last)
        return hasattr(importlib.import_module(".".join(filter(None, ["numpy", module]))), last)

    names = FUNCTIONS | set(INSTEAD) | ABOUT | BUFFERS | {name for name, _ in ONLY_BY_POSITION}
    assert [name for name in names if not exists(name)] == []
    assert not FUNCTIONS & set(INSTEAD)
    assert ABOUT | BUFFERS <= FUNCTIONS


@pytest.mark.oracle
def test_allowed_functions_exist_in_cupy():
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed: extra gpu-cuda12")
    cupyx_special = importlib.import_module("cupyx.scipy.special")
    missing = []
    for name in FUNCTIONS:
        module, _, last = name.rpartition(".")
        home = cupyx_special if module == "scipy.special" else cupy
        for part in filter(None, module.split(".") if home is cupy else []):
            home = getattr(home, part)
        if not hasattr(home, last):
            missing.append(name)
    assert missing == []
