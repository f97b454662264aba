"""What every test gets: --long, hypothesis profiles, quiet threads."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "2")

import hypothesis
import pytest

hypothesis.settings.register_profile(
    "ci", max_examples=8, derandomize=True, deadline=None, print_blob=True
)
hypothesis.settings.register_profile("long", max_examples=300, deadline=None, print_blob=True)


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", default=False, help="run slow tests too")


def pytest_configure(config):
    hypothesis.settings.load_profile("long" if config.getoption("--long") else "ci")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--long"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: make test-long runs it"))
