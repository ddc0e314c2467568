"""Compiles the Hopper kernel and prints a line of JSON a variant: python compile_offline_hopper.py cuda:90"""

import sys

from offline import report
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from sparse_dit.kernels.attention_hopper import hopper_forward_kernel
from sparse_dit.kernels.means_hopper import hopper_means_kernel

# precision, head size, keys a block, with an order, with summaries
VARIANTS = (
    ("native", 128, 128, False),
    ("native", 64, 32, False),
    ("native", 128, 64, True, True),
    ("native", 64, 128, False, True),
    ("int8", 128, 64, True),
    ("int8_fp8", 128, 128, False),
    ("int8_fp8", 128, 64, True),
)
MEANS = ((128, 128), (64, 32), (72, 64))  # head size, keys a block


def descriptor(dtype: str, rows: int, columns: int) -> str:
    bits = 16 if dtype == "bf16" else 8
    layout = gl.NVMMASharedLayout(min(128, columns * bits // 8), bits, 4)
    return f"tensordesc<{dtype}[1,1,{rows},{columns}],{layout!r}>"


def source(precision: str, head_size: int, block_k: int, ordered: bool, summary: bool = False) -> GluonASTSource:
    codes, fp8 = precision != "native", precision == "int8_fp8"
    fixed = {"ORDERED": ordered, "D": head_size, "STAGES": 3 if head_size == 128 else 4, "i_index": 1}
    if not codes:
        fixed |= dict.fromkeys(("p_q_scale", "p_lse_shift", "p_k_scale"))
    if not fp8:
        fixed |= dict.fromkeys(("p_v_lift", "p_v_scale_top", "p_v_mean"))
    if not ordered:
        fixed["p_order"] = None
    if not summary:
        fixed |= dict.fromkeys(("d_keys", "d_values"))
    types = {
        "d_q": descriptor("i8" if codes else "bf16", 64, head_size),
        "d_k": descriptor("i8", block_k, head_size) if codes else descriptor("bf16", block_k, 64),
        "d_v": descriptor("fp8e4nv", head_size, block_k) if fp8 else descriptor("bf16", block_k, 64),
        "d_keys": descriptor("bf16", 128, 64),
        "d_values": descriptor("bf16", 128, 64),
        "p_out": "*bf16",
        "p_order": "*i64",
        "p_indices": "*i32",
        "p_counts": "*i32",
        "p_rows": "*i32",
        "scale": "fp32",
    }
    names = hopper_forward_kernel.arg_names
    signature = {name: types.get(name, "*fp32" if name.startswith("p_") else "i32") for name in names}
    signature |= dict.fromkeys(fixed, "constexpr")
    constants = {(position,): fixed[name] for position, name in enumerate(names) if name in fixed}
    return GluonASTSource(hopper_forward_kernel, signature, constexprs=constants, attrs={})


def means_source(head_size: int, block_k: int) -> GluonASTSource:
    fixed = {"HEAD_SIZE": head_size, "D": 1 << (head_size - 1).bit_length()}
    types = dict.fromkeys(("d_k", "d_v"), descriptor("bf16", block_k, 64)) | dict.fromkeys(
        ("p_keys", "p_values"), "*bf16"
    )
    names = hopper_means_kernel.arg_names
    signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in names}
    constants = {(position,): fixed[name] for position, name in enumerate(names) if name in fixed}
    return GluonASTSource(hopper_means_kernel, signature, constexprs=constants, attrs={})


if __name__ == "__main__":
    for name in sys.argv[1:]:
        for variant in VARIANTS:
            report(name, source(*variant), {"num_warps": 4})
        for head_size, block_k in MEANS:
            report(name, means_source(head_size, block_k), {"num_warps": 4})
