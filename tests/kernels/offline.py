"""What the programs that compile kernels offline have in common: targets, compiling, and what they print."""

import json
import re
import subprocess
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import triton
from sass import unwritten_reads
from triton import compile as triton_compile
from triton.backends.compiler import GPUTarget

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def target_of(name: str) -> GPUTarget:
    """`cuda:90` or `hip:gfx942`."""
    backend, architecture = name.split(":")
    return GPUTarget("cuda", int(architecture), 32) if backend == "cuda" else GPUTarget("hip", architecture, 64)


def architecture_of(target: GPUTarget) -> str:
    """As `tiles.architecture` names it."""
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def report(target_name: str, source: Any, options: dict[str, Any]) -> None:
    """Compiles a kernel and prints a line of JSON: NVIDIA with registers and stack, sm_90 with what `sass` finds."""
    target = target_of(target_name)
    compiled = triton_compile(source, target=target, options=options)
    binary = compiled.asm["cubin" if target.backend == "cuda" else "hsaco"]
    facts = {
        "target": target_name,
        "kernel": source.fn.__name__,
        "binary_bytes": len(binary),
        "shared_memory": compiled.metadata.shared,
    }
    if target.backend == "cuda":
        facts |= _resources(binary)
    if target.arch == 90:
        facts["unwritten_reads"] = unwritten_reads(binary)
    print(json.dumps(facts))


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread, and bytes of its stack: spilled registers live there, and these kernels put nothing else."""
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    assert found is not None, told
    return {"registers": int(found[1]), "stack": int(found[2])}
