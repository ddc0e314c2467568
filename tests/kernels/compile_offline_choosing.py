"""Compiles the kernels that choose blocks by parts or by rows: python compile_offline_choosing.py cuda:90 hip:gfx942

Prints a line of JSON a target and variant (all of them on Hopper, else one a kernel), with registers and stack where
the target is an NVIDIA one.
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from offline import architecture_of, report, target_of
from triton.compiler import ASTSource

from sparse_dit.kernels import ordered_triton, rows_triton, scores_triton

POINTERS = {
    "p_q": "*bf16",
    "p_k": "*bf16",
    "p_v": "*bf16",
    "p_rows": "*i64",
    "p_order": "*i64",
    "p_q_order": "*i64",
    "p_k_order": "*i64",
    "p_q_out": "*bf16",
    "p_k_out": "*bf16",
    "p_v_out": "*bf16",
    "p_x": "*bf16",
    "p_means": "*bf16",
    "scale": "fp32",
    "reach": "fp32",
    "least": "fp32",
}
# head size, parts of a query and of a key block, reduction
SCORES = ((256, 8, 4, "logsumexp"), (128, 8, 4, "logsumexp"), (72, 2, 1, "logsumexp"))
ROWS = (128, 72)
BLOCK_SCORES = (128, 72, 256)
# head size, tokens of a run of queries and of keys, type of the means
ORDERED = ((72, (16, 16), "*bf16"), (128, (0, 0), "*bf16"), (128, (128, 64), "*fp32"), (256, (128, 32), "*fp32"))
# head size, tokens a part, whether in an order
PARTS = ((72, 4, True), (128, 16, True), (256, 64, False))


def variants(every: bool, arch: str) -> Iterator[tuple[Any, dict[str, Any], dict[str, str], int, int]]:
    """Kernel, compile-time arguments, types unlike `POINTERS`, warps, stages; one variant a kernel or all."""
    last = None if every else 1
    for head_size, per_q, per_k, reduction in SCORES[:last]:
        launch = scores_triton.launch_for(head_size, per_k)
        fixed = scores_triton.constants(head_size, per_q, per_k, launch, reduction=reduction, dtype=torch.bfloat16)
        yield scores_triton.scores_kernel, fixed, {}, launch.num_warps, launch.num_stages
    for head_size in BLOCK_SCORES[:last]:
        tiles = scores_triton.TILES
        fixed = scores_triton.block_constants(head_size, tiles, is_amd=arch.startswith("gfx"))
        means = {"p_q": "*fp32", "p_k": "*fp32"}
        yield scores_triton.block_scores_kernel, fixed, means, tiles.num_warps, tiles.num_stages
    marks = {"LOWEST": True, "ROWS": scores_triton.UNLIKE_ROWS, "WIDTH": scores_triton.UNLIKE_WIDTH}
    yield scores_triton.unlike_kernel, marks, {"p_unlike": "*u8"}, scores_triton.UNLIKE_WARPS, 3
    for head_size, part, ordered in PARTS[:last]:
        fixed = scores_triton.part_constants(head_size, part, ordered=ordered, dtype=torch.bfloat16)
        if not ordered:
            fixed |= {"p_order": None}
        yield scores_triton.parts_kernel, fixed, {}, 4, 2
    for head_size, units, means in ORDERED[:last]:
        fixed = ordered_triton.constants(units, head_size, 8) | {f"{name}_dim": 1 for name in "qkv"}
        types = {"p_q_means": means, "p_k_means": means}
        warps = ordered_triton.warps_for(fixed["TOKENS"], fixed["COLUMNS"])
        yield ordered_triton.order_means_kernel, fixed, types, warps, 3
    for head_size in ROWS[:last]:
        tile, stages = rows_triton.tile_for(head_size, arch)
        fixed = rows_triton.constants(head_size, torch.bfloat16, tile)
        yield rows_triton.rows_kernel, fixed, {}, rows_triton.WARPS, stages
    merged = {"HEAD_SIZE": 72, "COLUMNS": 128, "SPANS": rows_triton.SPANS}
    yield rows_triton.rows_error_kernel, merged, {}, 4, 1
    placed = {"ROWS": rows_triton.ROWS, "TOKENS": rows_triton.TOKENS}
    types = {"p_orders": "*i64", "p_closest": "*i64"}
    yield rows_triton.closest_kernel, placed, types, rows_triton.WARPS, 1


def main(target_name: str) -> None:
    arch = architecture_of(target_of(target_name))
    for kernel, fixed, types, num_warps, num_stages in variants(target_name == "cuda:90", arch):
        signature, attributes = {}, {}
        for position, name in enumerate(kernel.arg_names):
            if name in fixed:
                signature[name] = "constexpr"
            else:
                signature[name] = types.get(name) or POINTERS.get(name, "*fp32" if name.startswith("p_") else "i32")
            if name.startswith("p_"):
                attributes[(position,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constexprs=fixed, attrs=attributes)
        report(target_name, source, {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True})


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        main(argument)
