"""The Triton and Gluon kernels compile for every architecture, on a machine that has none of them."""

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
ATTENTION = {"block_sparse_forward_kernel", "int8_forward_kernel", "quantize_kernel", "sampled_means_kernel"}
ATTENTION |= {"gather_kernel"}
BLOCKS = {
    "pool_kernel",
    "mean_of_means_kernel",
    "block_mass_kernel",
    "select_kernel",
    "density_kernel",
    "rank_rows_kernel",
}
BLOCKS |= {"digit_kernel", "ties_kernel", "taken_kernel", "bits_to_lists_kernel", "lists_to_bits_kernel", "lift_kernel"}
CHOOSING = {
    *("order_means_kernel", "scores_kernel", "block_scores_kernel", "unlike_kernel", "parts_kernel"),
    *("rows_kernel", "rows_error_kernel", "closest_kernel"),
}
SUMMARY = {"means_kernel", "skipped_tiles_kernel", "summary_kernel"}
HOPPER = {"hopper_forward_kernel", "hopper_means_kernel", "hopper_quantize_kernel"}
# Program, the targets of one run of it, its kernels. The longest goes target by target, for the sake of two cores.
RUNS = (
    *(("compile_offline.py", (target,), ATTENTION) for target in TARGETS),
    ("compile_offline_blocks.py", tuple(TARGETS), BLOCKS),
    ("compile_offline_choosing.py", tuple(TARGETS), CHOOSING),
    ("compile_offline_summary.py", tuple(TARGETS), SUMMARY),
    ("compile_offline_hopper.py", ("cuda:90",), HOPPER),
)


def attention_variants(target: str) -> int:
    """In 16 bits, of the gather, and with codes (FP8 too where there is such a unit); on Hopper more of each."""
    fp8 = target.startswith("cuda") and int(target.removeprefix("cuda:")) >= 89
    return 8 + 2 + 2 * 9 if target == "cuda:90" else 5 + 2 + (1 + fp8) * 3


@pytest.mark.parametrize(("program", "targets", "kernels"), RUNS, ids=[f"{run[0]}-{'-'.join(run[1])}" for run in RUNS])
def test_compiles_for(program, targets, kernels, printed_by):
    compiled = printed_by(Path(__file__).with_name(program), *targets)
    for target in targets:
        made = [kernel for kernel in compiled if kernel["target"] == target]
        assert {kernel["kernel"] for kernel in made} == kernels
        for kernel in made:
            assert kernel["binary_bytes"] > 0
            assert kernel["shared_memory"] <= TARGETS[target]
            if target == "cuda:90":
                assert kernel["stack"] == 0, kernel
                assert kernel["unwritten_reads"] == [], kernel
        if kernels is ATTENTION:
            assert len(made) == attention_variants(target)
    on_hopper = [kernel for kernel in compiled if kernel["target"] == "cuda:90"]
    if kernels is SUMMARY:
        assert len(on_hopper) == 8
    if kernels is HOPPER:
        assert len(on_hopper) == 15
