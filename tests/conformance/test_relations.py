"""The relations over drawn examples: all relations of a row share the same few draws.

What is drawn is a seed and a case, not arrays of floats: a failure prints two integers that repeat
it. Gradients are compared in ``test_conformance`` and stay out of here.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attention_ref.core.registry import get, written
from attention_ref.kit import checks

FIXED = {"golden", "docstrings", "record", "bad_input", "backends", *checks.GRADIENT}


@pytest.mark.parametrize("key", written())
def test_relations_on_drawn_examples(key):
    spec = get(key)
    names = [n for n in checks.names() if n not in FIXED and checks.applies(spec, n)]

    @given(draw=st.integers(1, 10**6), place=st.integers(0, 10**6))
    def hold(draw, place):
        examples = checks.cases(spec, draw)
        case = list(examples)[place % len(examples)]
        for name in names:
            result = checks.run_one(spec, name, case, examples[case])
            assert result.ok, f"{name} on case {case} of draw {draw}: {result.message}"

    hold()
    assert names
