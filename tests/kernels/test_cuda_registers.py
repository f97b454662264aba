"""What the CUDA kernels use of a GPU: compiled by NVRTC, no GPU needed.

Limits for the committed table, and one compilation an architecture that must agree with it.
"""

import json

import pytest

from tests.kernels import registers

TABLE = json.loads(registers.FILE.read_text(encoding="utf-8"))
MOST = 48 * 1024  # bytes of shared memory a block has without asking


def test_the_table_is_of_these_sources():
    """On failure: python -m tests.kernels.registers"""
    assert TABLE["sources"] == registers.hashed()
    kernels = {"dense": 3, "decode": 2}
    assert len(TABLE["rows"]) == sum(kernels.values()) * 3 * len(registers.WIDTHS)


@pytest.mark.parametrize(
    "row", TABLE["rows"], ids=lambda r: "-".join(map(str, list(r.values())[:3]))
)
def test_limits(row):
    """Nothing that a thread works with may leave the chip; a block must start on every GPU."""
    assert row["spilled"] == 0 and row["stack"] == 0 and row["shared"] <= MOST
    assert max(row[f"registers {a}"] for a in registers.ARCHITECTURES) <= 255


CASES = [
    ("sm_80", "dense", "float16", 64), ("sm_90", "dense", "float32", 256),
    ("sm_100", "dense", "bfloat16", 5), ("sm_80", "decode", "bfloat16", 128),
    ("sm_90", "decode", "float32", 256), ("sm_100", "decode", "float16", 9),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_compiles_for_the_gpu(case):
    """Within the limits, at widths that are in the table and at the widest and odd ones."""
    library = registers.nvrtc()
    if library is None:
        pytest.skip("NVRTC is not installed: pip install nvidia-cuda-nvrtc-cu12")
    architecture, pattern, storage, width = case
    if architecture == "sm_100" and registers.version(library) < (12, 8):
        pytest.skip("this NVRTC does not know sm_100")
    status, log, code = registers.compiled(library, architecture, pattern, storage, width, width)
    assert status == 0 and "error" not in log, log
    assert code > 1000
    found = registers.used(log)
    for use in found.values():
        assert use["spilled"] == 0 and use["stack"] == 0
        assert use["registers"] <= 255 and use["shared"] <= MOST
    if TABLE["compiler"] == "NVRTC {}.{}".format(*registers.version(library)):
        for row in TABLE["rows"]:
            if (row["storage"], row["width"]) == (storage, width) and row["kernel"] in found:
                assert found[row["kernel"]]["registers"] == row[f"registers {architecture}"]


def test_reads_what_ptxas_says():
    """A spill, local memory and a kernel without shared memory, as the compiler words them."""
    log = (
        "ptxas info    : Compiling entry function 'one' for 'sm_90'\n"
        "ptxas         .     64 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers, 1024 bytes smem\n"
        "ptxas info    : Compiling entry function 'two' for 'sm_90'\n"
        "ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 9 registers\n"
    )
    assert registers.used(log) == {
        "one": {"registers": 40, "spilled": 20, "stack": 64, "shared": 1024},
        "two": {"registers": 9, "spilled": 0, "stack": 0, "shared": 0},
    }
