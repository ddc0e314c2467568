"""Compiles the Hopper kernel and prints a line of JSON a variant: python compile_offline_hopper.py cuda:90"""

import sys

from offline import report
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from sparse_dit.kernels import quantize_hopper
from sparse_dit.kernels.attention_hopper import hopper_forward_kernel
from sparse_dit.kernels.means_hopper import hopper_means_kernel

# precision, head size, keys a block, with an order, what becomes of skipped blocks: "turns" is summaries of many
VARIANTS = (
    ("native", 128, 128, False),
    ("native", 64, 32, False),
    ("native", 128, 64, True, "turns"),
    ("native", 128, 128, False, "summary"),
    ("native", 64, 128, False, "summary"),
    ("int8", 128, 64, True),
    ("int8_fp8", 128, 128, False),
    ("int8_fp8", 128, 64, True),
)
MEANS = ((128, 128), (64, 32), (72, 64))  # head size, keys a block
# precision, head size, with an order
QUANTIZED = (("int8", 128, False), ("int8", 64, True), ("int8_fp8", 128, True), ("int8_fp8", 64, False))


def descriptor(dtype: str, rows: int, columns: int) -> str:
    bits = 16 if dtype == "bf16" else 8
    layout = gl.NVMMASharedLayout(min(128, columns * bits // 8), bits, 4)
    return f"tensordesc<{dtype}[1,1,{rows},{columns}],{layout!r}>"


def source(precision: str, head_size: int, block_k: int, ordered: bool, skipped: str = "drop") -> GluonASTSource:
    codes, fp8 = precision != "native", precision == "int8_fp8"
    fixed = {"ORDERED": ordered, "TURNS": skipped == "turns", "D": head_size, "STAGES": 3 if head_size == 128 else 4}
    fixed["i_index"] = 1
    if not codes:
        fixed |= dict.fromkeys(("p_q_scale", "p_lse_shift", "p_k_scale"))
    if not fp8:
        fixed |= dict.fromkeys(("p_v_lift", "p_v_scale_top", "p_v_mean"))
    if not ordered:
        fixed["p_order"] = None
    if skipped == "drop":
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


def quantize_source(precision: str, head_size: int, ordered: bool) -> GluonASTSource:
    fp8 = precision == "int8_fp8"
    fixed = quantize_hopper.constants(precision, head_size, ordered, piece=8) | dict.fromkeys(
        ("q_dim", "k_dim", "v_dim"), 1
    )
    if not ordered:
        fixed["p_order"] = None
    if not fp8:
        fixed |= dict.fromkeys(("p_v_mean", "p_ones", "p_v_scale"))
    types = dict.fromkeys(("p_q", "p_k", "p_v", "p_signs", "p_ones"), "*bf16") | {"p_order": "*i64"}
    types |= {"p_q_codes": "*i8", "p_k_codes": "*i8", "p_v_codes": "*fp8e4nv" if fp8 else "*bf16"}
    types |= {"scale": "fp32", "scale_log2": "fp32"}
    names = quantize_hopper.hopper_quantize_kernel.arg_names
    signature = {name: types.get(name, "*fp32" if name.startswith("p_") else "i32") for name in names}
    signature |= dict.fromkeys(fixed, "constexpr")
    constants = {(position,): fixed[name] for position, name in enumerate(names) if name in fixed}
    aligned = [position for position, name in enumerate(names) if signature[name].startswith("*")]
    attributes = {(position,): [["tt.divisibility", 16]] for position in aligned}
    return GluonASTSource(quantize_hopper.hopper_quantize_kernel, signature, constexprs=constants, attrs=attributes)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        for variant in VARIANTS:
            report(name, source(*variant), {"num_warps": 4})
        for head_size, block_k in MEANS:
            report(name, means_source(head_size, block_k), {"num_warps": 4})
        for precision, head_size, ordered in QUANTIZED:
            report(name, quantize_source(precision, head_size, ordered), quantize_hopper.launch_options(head_size))
