"""Compiles the kernels of pool, mass and lists: python compile_offline_blocks.py cuda:90 hip:gfx942

Prints a line of JSON a target and variant (all of them on Hopper, else one a kernel), with registers and stack where
the target is an NVIDIA one.
"""

import sys
from collections.abc import Iterator
from typing import Any

from offline import architecture_of, report, target_of
from triton.compiler import ASTSource

from sparse_dit.kernels import (
    bits_triton,
    cutoff_triton,
    density_triton,
    launch_order_triton,
    lift_triton,
    lists_triton,
    mass_triton,
    pool_triton,
)

POINTERS = {
    "p_order": "*i64",
    "p_subtract": "*fp32",
    "p_means": "*fp32",
    "p_similarity": "*fp32",
    "p_lse": "*fp32",
    "p_mass": "*fp32",
    "p_forced": "*u8",
    "p_indices": "*i32",
    "p_counts": "*i32",
    "p_bits": "*u8",
    "p_density": "*fp64",
}
ALIGNED = ("p_", "lse_", "subtract_")  # strides of tokens are not: of heads of 72 channels they are no multiples of 16


# head size, block, with everything: one tile a block and several, a head size that is no power of two
POOLS = ((72, 128, True), (128, 64, False))
# head size, block_q, block_k, tokens: two column parts, several blocks a tile, a tile a block, several tiles a block
MASSES = ((96, 16, 32, 1000), (128, 128, 64, 32_768), (256, 128, 128, 1000))
# rule, key blocks, with everything: narrow and wide rows
SELECTIONS = (
    ("top_p", 100, True),
    ("top_p_crossing", 512, False),
    ("top_p_crossing", 2048, True),
    ("top_k", 512, False),
    ("top_k", 2048, True),
    ("threshold", 512, True),
    ("mask", 512, False),
)
# by mass or by count, numbers of a row
CUTOFFS = ((True, 64), (False, 1024))


def variants(architecture: str, every: bool) -> Iterator[tuple[Any, dict[str, Any], dict[str, str], int, int]]:
    """Kernel, compile-time arguments, types of the others, warps, stages; one variant a kernel or all of them."""
    last = None if every else 1
    for head_size, block, everything in POOLS[:last]:
        pool = pool_triton.launch_for(similarity=everything)
        fixed: dict[str, Any] = pool_triton.constants(
            head_size, block, pool, piece=8, ordered=everything, subtracted=everything, similarity=everything
        )
        if not everything:
            fixed |= {"p_order": None, "p_subtract": None}
        yield pool_triton.pool_kernel, fixed, {"p_x": "*bf16"}, pool.num_warps, 3
    yield (
        pool_triton.mean_of_means_kernel,
        pool_triton.mean_constants(72),
        {"p_mean": "*fp32"},
        pool_triton.MEANS_WARPS,
        3,
    )
    for head_size, block_q, block_k, tokens in MASSES[:last]:
        cut = mass_triton.launch_for(head_size, architecture)
        fixed = mass_triton.constants(head_size, block_q, block_k, tokens, cut)
        types = {"p_q": "*bf16", "p_k": "*bf16", "qk_scale": "fp32"}
        yield mass_triton.block_mass_kernel, fixed, types, cut.num_warps, cut.num_stages
    for rule, k_blocks, everything in SELECTIONS[:last]:
        softmax = rule == "top_p_crossing"
        fixed = lists_triton.constants(rule, k_blocks, forced=everything, per_row=everything, softmax=softmax)
        if not everything:
            fixed |= {"p_budget": None, "p_forced": None}
        fixed |= {"p_columns": None}
        counted = rule == "top_k"
        types = {
            "p_scores": "*u8" if rule == "mask" else "*fp32",
            "p_budget": "*i64" if counted else "*fp32",
            "budget": "i32" if counted else "fp32",
        }
        yield lists_triton.select_kernel, fixed, types, lists_triton.warps_for(k_blocks), 3
    for mass, width in CUTOFFS[:last]:
        fixed = {"MASS": mass, "EXCLUDED": mass, "PER_POOL": False, "BITS": cutoff_triton.BITS, "p_budget": None}
        fixed |= {} if mass else {"p_excluded": None, "p_low": None, "p_high": None}
        types = {"p_scores": "*fp32", "p_excluded": "*u8", "p_low": "*fp32", "p_high": "*fp32", "p_totals": "*i64"}
        types |= {"p_ties": "*i32", "p_taken": "*u8", "threshold": "fp32"}
        tiles = {"TILE": cutoff_triton.TILE, "CHUNK": cutoff_triton.CHUNK // (1 + mass)}
        yield cutoff_triton.digit_kernel, fixed | tiles, types, cutoff_triton.WARPS, 3
        wide = fixed | {"WIDTH": width}
        yield cutoff_triton.ties_kernel, wide, types, lists_triton.warps_for(width), 3
        yield cutoff_triton.taken_kernel, wide | {"ROWS": 1024}, types, lists_triton.warps_for(width), 3
    fixed = {"ROWS": launch_order_triton.ROWS}
    yield launch_order_triton.rank_rows_kernel, fixed, {"p_rows": "*i32"}, launch_order_triton.WARPS, 3
    fixed = {"BLOCK_Q": 128, "BLOCK_K": 64, "ROWS": density_triton.ROWS}
    yield density_triton.density_kernel, fixed, {}, density_triton.WARPS, 3
    yield bits_triton.bits_to_lists_kernel, {"WIDTH": 1024}, {}, bits_triton.WARPS, 3
    yield bits_triton.lists_to_bits_kernel, {"WIDTH": 128}, {}, 1, 3
    yield lift_triton.lift_kernel, {"WIDTH": 1024}, {"p_scale": "*fp32", "p_lift": "*fp32", "p_top": "*fp32"}, 4, 3


def main(target_name: str) -> None:
    named = architecture_of(target_of(target_name))
    for kernel, fixed, types, num_warps, num_stages in variants(named, every=target_name == "cuda:90"):
        signature, attributes = {}, {}
        for position, name in enumerate(kernel.arg_names):
            if name in fixed:
                signature[name] = "constexpr"
            elif name.endswith(("_dim", "_column")) or name in ("lse_token", "order_token", "b_row"):
                signature[name], fixed[name] = "constexpr", 1  # as the launcher specialises a stride of 1
            else:
                signature[name] = types.get(name) or POINTERS.get(name, "i32")
            if name.startswith(ALIGNED) and signature[name] != "constexpr":
                attributes[(position,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constexprs=fixed, attrs=attributes)
        report(target_name, source, {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True})


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        main(argument)
