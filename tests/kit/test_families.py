"""Cost by the sizes on a tape, and identities as the lectures on families run them."""

import numpy as np
import pytest

import attention_ref
from attention_ref import core
from attention_ref.kit.families import elements, growth, identities


def test_every_number_is_counted_once():
    def forward(x, y, n):
        z = x[:, None] * y[None, :]  # two views of 3 and 4, and 12 products
        return np.sum(np.where(z > 0, z, 0.0)) * n  # 12, 1, 1; the truth values do not count

    x, y = np.arange(1.0, 4.0), np.arange(4.0)
    assert elements(forward, {"x": x, "y": y, "n": 2}) == (3 + 4 + 12 + 12 + 1 + 1, 12)


def test_arguments_and_constants_cost_nothing():
    assert elements(lambda x: x, {"x": np.ones(9)}) == (0, 0)
    assert elements(lambda x: np.ones((9, 9)) + 1.0, {"x": np.ones(9)}) == (0, 0)
    assert elements(lambda x: x["a"] + 1.0, {"x": {"a": np.ones(9)}}) == (9, 9)


@pytest.mark.parametrize("power", [1, 2, 3])
def test_the_exponent_is_that_of_the_largest_term(power):
    work, largest = growth(
        lambda x: np.reshape(x, (1,) * (power - 1) + x.shape) + np.zeros((len(x),) * power),
        lambda n: {"x": np.ones(n)}, (64, 128, 256),
    )  # fmt: skip
    assert largest == power and work == pytest.approx(power, abs=0.02)


def test_dot_product_attention_is_quadratic():
    def arguments(n):
        return core.examples.qkv(np.random.default_rng(0), T=n, S=n)

    work, largest = growth(
        attention_ref.get("scores/dot_product").forward, arguments, (64, 128, 256)
    )
    assert largest == 2.0 and 1.9 < work <= 2.0


def test_identities_carry_key_error_and_bound():
    spec = attention_ref.get("normalizers/sparsemax")
    found = identities(spec, seed=5)
    assert [x["key"] for x in found] == ["scores/dot_product"] * 2
    assert [x["says"] for x in found] == [r.says for r in spec.reduces_to]
    assert all(0 <= x["eps"] <= x["bound"] for x in found)


def test_a_wrong_identity_shows():
    import dataclasses

    spec = attention_ref.get("normalizers/sparsemax")
    wrong = core.Reduction(
        "scores/dot_product", "not so", lambda rng: core.examples.qkv(rng),
        lambda kw: dict(kw), gradients=False,
    )  # fmt: skip
    found = identities(dataclasses.replace(spec, reduces_to=(wrong,)))
    assert found[0]["eps"] > found[0]["bound"]
