"""Attention calls of presets choose, compile and launch on sm_90, on a machine that has no GPU."""

from pathlib import Path

# What a call launches at a refresh; what is found once for a layout or a list is left out.
HOPPER = {
    "balanced": ["order_means", "scores", "select", "density", "hopper_means", "hopper_forward"],
    "draft": ["order_means", "block_scores", *["digit"] * 8, "ties", "taken", "select", "density", "hopper_forward"],
    "jenga": ["order_means", "block_scores", "select", "density", "hopper_forward"],
    "sparge": [
        "pool",
        "pool",
        "block_scores",
        "select",
        "density",
        "sampled_means",
        "hopper_quantize",
        "lift",
        "hopper_forward",
    ],
    "sparge-cdf": [
        *("pool", "mean_of_means", "pool", "pool", "block_scores", "unlike", "select", "density"),
        *("sampled_means", "hopper_quantize", "lift", "hopper_forward"),
    ],
    "svg": ["rows", "rows_error", "closest", "order_means", "hopper_forward"],
    "svg2": ["order_means", "block_scores", "select", "density", "hopper_forward"],
    "radial": ["hopper_forward"],
}
ELSEWHERE = {
    "sol": [
        "pool",
        "pool",
        "block_scores",
        "select",
        "density",
        "block_sparse_forward",
        "means",
        "skipped_tiles",
        "summary",
    ],
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
REPLAYED = {"balanced", "kept", "draft", "jenga", "sparge", "sparge-cdf", "radial", "sol", "subblock", "vmoba"}


def test_calls_of_presets_launch_what_they_should(printed_by):
    """One test: what takes long is compiling, once for all presets."""
    found: dict[str, list[tuple[str, list[str]]]] = {}
    for row in printed_by(Path(__file__).with_name("launch_presets.py"), *HOPPER, *ELSEWHERE, *KEPT):
        if "replayed" in row:
            assert row == {"preset": row["preset"], "replayed": row["preset"] in REPLAYED, "alike": row["alike"]}
            assert row["alike"] or not row["replayed"], row["preset"]
            continue
        listed = [kernel for kernel in row["kernels"] if kernel not in ONCE]
        found.setdefault(row["preset"], []).append((row["backend"], listed))
    for preset, kernels in HOPPER.items():
        assert found[preset][1:] == [("hopper", kernels)] * 2, preset
    for preset, kernels in ELSEWHERE.items():
        refused = "triton (blocks of 64 by 64 are not 128 by one of (32, 64, 128))"
        assert found[preset][1:] == [(refused, kernels)] * 2, preset
    for preset, launches in KEPT.items():
        assert tuple(kernels for _, kernels in found[preset][1:]) == launches, preset
