"""Compiles the attention and quantization kernels: python compile_offline.py cuda:90 hip:gfx942

Prints a line of JSON a target and variant (more of them on Hopper), with registers and stack where the target is an
NVIDIA one.
"""

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from offline import architecture_of, report, target_of
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparse_dit.kernels import attention, attention_int8, gather_triton, quantize_triton, sampled_means_triton


class Variant(NamedTuple):
    """A kernel, its compile-time arguments, what its pointers point to (else fp32), and how it is launched."""

    kernel: Any
    fixed: dict[str, Any]
    pointers: dict[str, str]
    num_warps: int
    num_stages: int = 3
    fusion: bool = True
    maxnreg: int | None = None


# Head size, block size, tokens: aligned and ragged, one and two column parts, the widest row.
NATIVE = ((64, 64, 4096, "bf16"), (72, 32, 1000, "fp16"), (128, 128, 4000, "bf16"), (256, 64, 1000, "bf16"))
# Where ptxas went wrong (see `sass`).
ON_HOPPER = ((88, 64, 500, "fp16"), (96, 128, 1000, "bf16"))
SKIPPING = ((96, 64, 500), (128, 128, 4000))
QUANTIZED = ((64, 64, 4096), (72, 32, 1000), (96, 64, 1000), (128, 128, 4000))


def native_variants(architecture: str) -> Iterator[Variant]:
    for head_size, block, tokens, dtype in (*NATIVE, *(ON_HOPPER if architecture == "sm_90" else ())):
        launch = attention.launch_for(head_size, block, block, architecture)
        fixed = attention.constants(head_size, block, block, tokens, launch) | {"p_order": None}
        pointers = dict.fromkeys(("p_q", "p_k", "p_v", "p_out"), dtype) | {"p_indices": "i32", "p_counts": "i32"}
        yield Variant(attention.block_sparse_forward_kernel, fixed, pointers, launch.num_warps, launch.num_stages)
    pointers = dict.fromkeys(("p_q", "p_k", "p_v", "p_out"), "bf16")
    pointers |= {"p_order": "i64", "p_indices": "i32", "p_counts": "i32"}
    for head_size, block, tokens in SKIPPING if architecture == "sm_90" else SKIPPING[1:]:
        launch = attention.launch_for(head_size, block, block, architecture)
        fixed = attention.constants(head_size, block, block, tokens, launch, ordered=True, skips=True)
        yield Variant(attention.block_sparse_forward_kernel, fixed, pointers, launch.num_warps, launch.num_stages)


def gather_variants() -> Iterator[Variant]:
    pointers = dict.fromkeys(("p_q", "p_k", "p_v", "p_q_out", "p_k_out", "p_v_out"), "bf16") | {"p_order": "i64"}
    for roles, head_size, shared in ((3, 128, True), (1, 72, False)):
        fixed: dict[str, Any] = gather_triton.constants(roles, head_size, shared, piece=8)
        absent = ("p_q", "p_q_out", "p_k", "p_k_out") if roles == 1 else ()
        yield Variant(gather_triton.gather_kernel, fixed | dict.fromkeys(absent), pointers, gather_triton.WARPS)


def quantized_variants(precision: str, architecture: str, every: bool) -> Iterator[Variant]:
    fp8 = precision == "int8_fp8"
    codes = "fp8e4nv" if fp8 else "bf16"
    pointers = {"p_q": "i8", "p_k": "i8", "p_v": codes, "p_order": "i64", "p_out": "bf16"}
    pointers |= {"p_indices": "i32", "p_counts": "i32"}
    for head_size, block, tokens in QUANTIZED if every else QUANTIZED[1:2]:
        launch = attention_int8.launch_for(precision, head_size, block, block, architecture)
        skips = (False, True) if head_size == 96 else (False,)
        for skip in skips:
            fixed = attention_int8.constants(
                precision, head_size, block, block, tokens, ordered=True, launch=launch, skips=skip
            )
            yield Variant(attention_int8.int8_forward_kernel, fixed, pointers, launch.num_warps, launch.num_stages)
    pointers = dict.fromkeys(("p_q", "p_k", "p_v", "p_signs"), "bf16")
    pointers |= {"p_order": "i64", "p_q_codes": "i8", "p_k_codes": "i8", "p_v_codes": codes}
    for head_size, ordered in ((72, True), (128, True), (128, False)) if every else ((128, False),):
        fixed = quantize_triton.constants(precision, head_size, ordered, rotate=True, piece=8)
        options = quantize_triton.launch_options(head_size, architecture)
        yield Variant(quantize_triton.quantize_kernel, fixed, pointers, fusion=False, **options)
    # What leads a kernel that waits is an instruction of sm_90.
    fixed = sampled_means_triton.constants(fp8, 128, rotate=True, piece=8, norm=1.0, leads=every)
    yield Variant(sampled_means_triton.sampled_means_kernel, fixed, pointers, sampled_means_triton.WARPS, fusion=False)


def variants(target: GPUTarget) -> Iterator[Variant]:
    architecture = architecture_of(target)
    yield from native_variants(architecture)
    yield from gather_variants()
    yield from quantized_variants("int8", architecture, every=target.arch == 90)
    if target.backend == "cuda" and target.arch >= 89:
        yield from quantized_variants("int8_fp8", architecture, every=target.arch == 90)


def source_and_options(variant: Variant) -> tuple[ASTSource, dict[str, Any]]:
    signature: dict[str, str] = {}
    attributes = {}
    fixed = dict(variant.fixed)
    for position, name in enumerate(variant.kernel.arg_names):
        if name.endswith("_dim"):
            fixed[name] = 1  # as the launcher specialises a stride of 1
        if name == "i_index":
            fixed[name] = 1
        if name in fixed:
            signature[name] = "constexpr"
        elif name.startswith("p_"):
            signature[name] = f"*{variant.pointers.get(name, 'fp32')}"
        else:
            signature[name] = "fp32" if "scale" in name or "threshold" in name else "i32"
        # Nothing is known of strides: of heads of 72 channels they are no multiples of 16.
        aligned = name.startswith("p_") or name == "padded_k"
        if aligned and signature[name] != "constexpr":
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(variant.kernel, signature, constexprs=fixed, attrs=attributes)
    options: dict[str, Any] = {
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        "enable_fp_fusion": variant.fusion,
    }
    if variant.maxnreg is not None:
        options["maxnreg"] = variant.maxnreg
    return source, options


if __name__ == "__main__":
    for name in sys.argv[1:]:
        for variant in variants(target_of(name)):
            report(name, *source_and_options(variant))
