"""Compiles the kernels of summaries: python compile_offline_summary.py cuda:90 hip:gfx942

Prints a line of JSON a target and variant (all of them on Hopper, else one a kernel), with registers and stack where
the target is an NVIDIA one.
"""

import sys
from collections.abc import Iterator
from typing import Any

from offline import report
from triton.compiler import ASTSource

from sparse_dit.kernels import summary_triton

POINTERS = {"p_lse": "*fp32", "p_log_counts": "*fp32", "p_order": "*i64"}
TILES = {"p_indices": "*i32", "p_counts": "*i32", "p_tiles": "*i32", "p_tile_counts": "*i32"}
ALIGNED = ("p_", "q_batch", "q_head", "q_token", "out_batch", "out_head", "out_token")
# head size, block_q, ordered: the pinned tile, one cut to the query block, a head size that is no power of two
VARIANTS = ((128, 128, True), (128, 128, False), (64, 128, False), (128, 64, False), (72, 128, True), (256, 128, False))


def variants(every: bool) -> Iterator[tuple[Any, dict[str, Any], int, int]]:
    """Kernel, compile-time arguments, warps, stages; one variant a kernel or all of them."""
    yield (
        summary_triton.skipped_tiles_kernel,
        {"TILE_K": 64, "CHUNK": summary_triton.LOOKED_UP},
        summary_triton.LOOK_UP_WARPS,
        3,
    )
    fixed = summary_triton.means_constants(128, 128, 8, ordered=True)
    yield summary_triton.means_kernel, fixed, summary_triton.MEANS_WARPS, 3
    for head_size, block_q, ordered in VARIANTS if every else VARIANTS[:1]:
        launch = summary_triton.launch_for(head_size, block_q)
        fixed = summary_triton.constants(head_size, block_q, launch, ordered=ordered)
        if not ordered:
            fixed["p_order"] = None
        yield summary_triton.summary_kernel, fixed, launch.num_warps, launch.num_stages


def main(target_name: str) -> None:
    for kernel, fixed, num_warps, num_stages in variants(every=target_name == "cuda:90"):
        signature, attributes = {}, {}
        for position, name in enumerate(kernel.arg_names):
            if name in fixed:
                signature[name] = "constexpr"
            elif name.endswith("_dim") or name == "i_index":
                signature[name], fixed[name] = "constexpr", 1  # as the launcher specialises a stride of 1
            elif name in ("qk_scale", "log_whole", "log_last"):
                signature[name] = "fp32"
            else:
                signature[name] = (POINTERS | TILES).get(name) or ("*bf16" if name.startswith("p_") else "i32")
            if name.startswith(ALIGNED) and signature[name] != "constexpr":
                attributes[(position,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constexprs=fixed, attrs=attributes)
        report(target_name, source, {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True})


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        main(argument)
