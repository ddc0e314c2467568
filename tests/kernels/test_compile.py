"""The Triton kernel compiles for every architecture, on a machine that has none of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Shared memory a program may use, bytes.
ARCHITECTURES = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
PROGRAM = Path(__file__).with_name("compile_offline.py")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_for(architecture, tmp_path):
    # Apart from the other tests' process: Triton reads TRITON_INTERPRET once, when a kernel is defined.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, PROGRAM, str(architecture)],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    compiled = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(compiled) == 4
    for kernel in compiled:
        assert kernel["cubin_bytes"] > 0
        assert kernel["shared_memory"] <= ARCHITECTURES[architecture]
