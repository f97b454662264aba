"""Every generic check over every row; ids like ``normalizers/sparsemax-causal``."""

from attention_ref.core.registry import get, written
from attention_ref.kit import checks


def pytest_generate_tests(metafunc):
    pairs = [(key, case) for key in written() for case in checks.cases(get(key))]
    metafunc.parametrize(("key", "case"), pairs, ids=[f"{key}-{case}" for key, case in pairs])


def test_conformance(key, case, request):
    spec = get(key)
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
