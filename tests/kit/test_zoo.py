"""The zoo: every animal is named by ``check``, and the page shows what ``check`` reports."""

import json

import numpy as np
import pytest

import attention_ref
from attention_ref.kit import exhibits, golden, zoo
from attention_ref.kit.checks import cases

EXHIBITS = list(exhibits.exhibits())


@pytest.fixture(scope="module")
def written():
    text = (golden.checkout() / "docs" / "zoo.json").read_text(encoding="utf-8")
    return {r["name"]: r for r in json.loads(text)}


@pytest.mark.parametrize("exhibit", EXHIBITS, ids=[e[0].replace(" ", "-") for e in EXHIBITS])
def test_each_animal_is_named_and_its_page_is_current(exhibit, written):
    found = exhibits.report(*exhibit)
    assert not found.ok and exhibit[3] in found.named, found.named
    old, new = written[exhibit[0]], exhibits.record(exhibit, found)
    for record in (old, new):  # the numbers may differ in their last digits
        record["lines"] = [line[:2] for line in record["lines"]]
    assert old == new, "python -m attention_ref.kit.exhibits"


def test_the_page_has_all_and_no_more(written):
    assert list(written) == [e[0] for e in EXHIBITS]
    assert len(EXHIBITS) == len(set(e[0] for e in EXHIBITS)) >= 60


def test_the_zoo_without_a_bug_is_right():
    """What the zoo writes once more shares no step with the library, and agrees with it."""
    for key in ("scores/dot_product", "heads/multi_query"):
        spec = attention_ref.get(key)
        for kwargs in cases(spec).values():
            out, cache = spec.forward(**kwargs)
            found, backward = zoo.attend(**kwargs)
            dout = np.random.default_rng(1).standard_normal(out.shape)
            np.testing.assert_allclose(found, out, rtol=0, atol=1e-14)
            for name, g in backward(dout).items():
                np.testing.assert_allclose(g, spec.backward(dout, cache)[name], rtol=0, atol=1e-13)
            lse = zoo.logsumexp(**kwargs)[1]
            np.testing.assert_allclose(lse, cache.lse.reshape(lse.shape), rtol=0, atol=1e-14)
    spec = attention_ref.get("recurrent/delta_rule")
    for kwargs in cases(spec).values():
        (out, state), _ = spec.forward(**kwargs)
        for found, want in zip(zoo.delta(**kwargs), (out, state), strict=True):
            np.testing.assert_allclose(found, want, rtol=0, atol=1e-13)


def test_a_variant_is_right_where_its_mistake_does_not_apply():
    key, says = "scores/rotary", "rotary pairs interleaved, expected halves"
    for kwargs in cases(attention_ref.get(key)).values():
        out = zoo.variant(key, says)(**kwargs)
        same = np.allclose(out, attention_ref.get(key).forward(**kwargs)[0])
        assert same == bool(kwargs.get("interleaved")) or kwargs.get("R") == 2
