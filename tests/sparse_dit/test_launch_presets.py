"""Attention calls of presets choose, compile and launch on sm_90, on a machine that has no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

# What a call launches at a refresh; what is found once for a layout or a list is left out.
HOPPER = {
    "balanced": ["order_means", "scores", "select", "density", "hopper_means", "hopper_forward"],
    "draft": ["order_means", *["digit"] * 8, "ties", "taken", "select", "density", "hopper_forward"],
    "jenga": ["order_means", "select", "density", "hopper_forward"],
    "sparge": ["pool", "pool", "select", "density", "sampled_means", "quantize", "lift", "hopper_forward"],
    "svg": ["rows", "rows_error", "density", "gather", "hopper_forward"],
    "svg2": ["order_means", "select", "density", "hopper_forward"],
    "radial": ["hopper_forward"],
}
ELSEWHERE = {
    "sol": ["pool", "pool", "select", "density", "block_sparse_forward", "means", "skipped_tiles", "summary"],
    "subblock": ["parts", "parts", "scores", "select", "density", "block_sparse_forward"],
    "vmoba": ["order_means", *["digit"] * 8, "ties", "taken", "select", "density", "block_sparse_forward"],
}
# The second call, between refreshes, and the third, at the next one, with a whole call for the cache.
KEPT = {
    "cached": (
        ["bits_to_lists", "gather", "hopper_means", "hopper_forward"],
        [
            *("order_means", "scores", "select", "lists_to_bits", "density"),
            *("hopper_forward", "hopper_means", "hopper_forward", "pool"),
        ],
    ),
    "adaspa": (
        ["bits_to_lists", "block_sparse_forward"],
        ["block_mass", "select", "select", "lists_to_bits", "density", "block_sparse_forward"],
    ),
}
ONCE = {"rank_rows"}


def calls(cache: Path) -> dict[str, list[tuple[str, list[str]]]]:
    """The backend of each preset's three calls, as told, and their kernels."""
    kernels = Path(__file__).parents[1] / "kernels"
    # Apart from the other tests' process: Triton reads TRITON_INTERPRET once, when a kernel is defined.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(kernels), *filter(None, [environment.get("PYTHONPATH")])])
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("launch_presets.py"), *HOPPER, *ELSEWHERE, *KEPT],
        env=environment | {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found: dict[str, list[tuple[str, list[str]]]] = {}
    for row in map(json.loads, run.stdout.splitlines()):
        listed = [kernel for kernel in row["kernels"] if kernel not in ONCE]
        found.setdefault(row["preset"], []).append((row["backend"], listed))
    return found


def test_calls_of_presets_launch_what_they_should(tmp_path):
    """One test: what takes long is compiling, once for all presets."""
    found = calls(tmp_path)
    for preset, kernels in HOPPER.items():
        assert found[preset][1:] == [("hopper", kernels)] * 2, preset
    for preset, kernels in ELSEWHERE.items():
        refused = "triton (blocks of 64 by 64 are not 128 by one of (32, 64, 128))"
        assert found[preset][1:] == [(refused, kernels)] * 2, preset
    for preset, launches in KEPT.items():
        assert tuple(kernels for _, kernels in found[preset][1:]) == launches, preset
