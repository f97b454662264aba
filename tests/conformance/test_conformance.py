"""Every generic check over every row; ids like ``normalizers/sparsemax-causal``."""

import pytest

import attention_ref
from attention_ref.kit import checks


def pytest_generate_tests(metafunc):
    pairs = [(key, case) for key in attention_ref.keys() for case in checks.cases(_spec(key))]
    metafunc.parametrize(("key", "case"), pairs, ids=[f"{key}-{case}" for key, case in pairs])


def _spec(key):
    return attention_ref.get(key)


def test_conformance(key, case, request):
    spec = _spec(key)
    draws = 4 if request.config.getoption("--long") else 1
    for draw in range(draws):
        kwargs = checks.cases(spec, draw)[case]
        for name in checks.names():
            if not checks.applies(spec, name) or (draw and name in ("golden", "docstrings")):
                continue
            result = checks.run_one(spec, name, case, kwargs)
            if result.opted_out and draw == 0:
                print(f"{key} opts out of {name}: {result.message}")
            assert result.ok, f"{name}: {result.message}"
