"""Whole calls bind, compile and launch on sm_90, on a machine that has no GPU."""

from pathlib import Path

SECOND_PASS = ["means_kernel", "skipped_tiles_kernel", "summary_kernel"]
CODES = {
    "hopper": ["sampled_means_kernel", "hopper_quantize_kernel"],
    "triton": ["sampled_means_kernel", "quantize_kernel"],
}
AFTER_MEANS = {"hopper_means_kernel": "hopper_forward_kernel", "sampled_means_kernel": "hopper_quantize_kernel"}
CUTOFF = [*["digit_kernel"] * 8, "ties_kernel", "taken_kernel"]
CHOICES = {
    "order and means": ["order_means_kernel"],
    "means of parts": ["parts_kernel"],
    "means": ["pool_kernel"],
    "mean of means": ["mean_of_means_kernel"],
    "unlike": ["unlike_kernel"],
    "scores": ["scores_kernel"],
    "scores of means": ["block_scores_kernel"],
    "sampled rows": ["rows_kernel", "rows_error_kernel"],
    "closest orders": ["closest_kernel"],
    "count": CUTOFF,
    "mass": CUTOFF,
    "lists": ["select_kernel"],
    "density": ["density_kernel"],
    "bits": ["lists_to_bits_kernel", "bits_to_lists_kernel"],
    "block mass": ["block_mass_kernel"],
}


def expected(precision: str, ordered: bool, skipped: str, backend: str) -> list[str]:
    """The kernels of a call, in order."""
    summary, native, hopper = skipped == "summary", precision == "native", backend == "hopper"
    before = (["gather_kernel"] if ordered else []) if native else CODES[backend]
    if precision == "int8_fp8" and hopper:
        before = [*before, "lift_kernel"]
    if not hopper:
        return [*before, "block_sparse_forward_kernel" if native else "int8_forward_kernel", *SECOND_PASS * summary]
    if native:
        return [*before, *["hopper_means_kernel"] * summary, "hopper_forward_kernel"]
    return [*before, "hopper_forward_kernel", *SECOND_PASS * summary]


def test_calls_launch_what_their_kernels_take(printed_by):
    made = printed_by(Path(__file__).with_name("launch_offline.py"))
    calls, choices = [row for row in made if "backend" in row], [row for row in made if "choice" in row]
    assert len(calls) == 10
    for row in calls:
        # The order of rows is found once for a list; everything else is launched anew.
        first, second, third = (
            [launch for launch in launches if launch["kernel"] != "rank_rows_kernel"] for launches in row["calls"]
        )
        kernels = expected(row["precision"], row["ordered"], row["skipped"], row["backend"])
        assert [launch["kernel"] for launch in first] == kernels
        assert first == second == third
        # Only a kernel behind means that it waits for may start before the one in front of it ends.
        dependent = {launch["kernel"] for launch in first if launch["dependent"]}
        assert dependent == {AFTER_MEANS[kernel] for kernel in kernels if kernel in AFTER_MEANS} & set(kernels)
    assert {row["choice"]: [launch["kernel"] for launch in row["calls"][0]] for row in choices} == CHOICES
    for row in choices:
        first, second, third = row["calls"]
        assert first == second == third
        assert not any(launch["dependent"] for launch in first)
