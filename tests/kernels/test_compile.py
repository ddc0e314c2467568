"""The attention and quantization kernels compile for every architecture, on a machine that has none of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Shared memory a program may use, bytes.
TARGETS = {
    ("cuda", "80"): 166_912,
    ("cuda", "86"): 101_376,
    ("cuda", "89"): 101_376,
    ("cuda", "90"): 232_448,
    ("cuda", "100"): 232_448,
    ("cuda", "120"): 101_376,
    ("hip", "gfx942"): 65_536,
}
PROGRAM = Path(__file__).with_name("compile_offline.py")


@pytest.mark.parametrize("target", TARGETS, ids="-".join)
def test_compiles_for(target, tmp_path):
    # Apart from the other tests' process: Triton reads TRITON_INTERPRET once, when a kernel is defined.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, PROGRAM, *target],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    compiled = [json.loads(line) for line in run.stdout.splitlines()]
    fp8 = target[0] == "cuda" and int(target[1]) >= 89
    assert len(compiled) == (4 + 2 * 7 if target[1] == "90" else 4 + (1 + fp8) * 3)
    for kernel in compiled:
        assert kernel["binary_bytes"] > 0
        assert kernel["shared_memory"] <= TARGETS[target]
        if target[1] == "90":
            assert kernel["stack"] == 0, kernel
