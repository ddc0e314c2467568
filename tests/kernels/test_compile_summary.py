"""The Triton kernels of summaries compile for every architecture, on a machine that has none of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Shared memory a program may use, bytes.
TARGETS = {
    "cuda:80": 166_912,
    "cuda:86": 101_376,
    "cuda:89": 101_376,
    "cuda:90": 232_448,
    "cuda:100": 232_448,
    "cuda:120": 101_376,
    "hip:gfx942": 65_536,
}
PROGRAM = Path(__file__).with_name("compile_offline_summary.py")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    # Apart from the other tests' process: Triton reads TRITON_INTERPRET once, when a kernel is defined.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, PROGRAM, *TARGETS],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_for(kernels, target):
    made = [kernel for kernel in kernels if kernel["target"] == target]
    assert {kernel["kernel"] for kernel in made} == {"skipped_tiles_kernel", "summary_kernel"}
    for kernel in made:
        assert kernel["binary_bytes"] > 0
        assert kernel["shared_memory"] <= TARGETS[target]


def test_spills_no_register_on_hopper(kernels):
    made = [kernel for kernel in kernels if kernel["target"] == "cuda:90"]
    assert len(made) == 7
    for kernel in made:
        assert kernel["stack"] == 0, kernel
