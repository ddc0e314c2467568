"""Compiles the Triton kernel for one target and prints a line of JSON a variant: python compile_offline.py cuda 90"""

import json
import sys

import torch
from triton import compile as triton_compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparse_dit.kernels.attention import block_sparse_forward_kernel, constants, launch_for

# head size, block size, tokens, dtype: aligned and ragged, one and two column parts, the widest row
VARIANTS = (
    (64, 64, 4096, torch.bfloat16),
    (72, 32, 1000, torch.float16),
    (128, 128, 4000, torch.bfloat16),
    (256, 64, 1000, torch.bfloat16),
)
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def main(target: GPUTarget) -> None:
    for head_size, block, tokens, dtype in VARIANTS:
        launch = launch_for(head_size, block, block)
        fixed = constants(head_size, block, block, tokens, launch)
        signature, attributes = {}, {}
        for position, name in enumerate(block_sparse_forward_kernel.arg_names):
            if name in fixed:
                signature[name] = "constexpr"
            elif name.endswith("_dim") or name == "i_index":
                signature[name], fixed[name] = "constexpr", 1  # as the launcher specialises a stride of 1
            elif name == "qk_scale":
                signature[name] = "fp32"
            elif name in ("p_q", "p_k", "p_v", "p_out"):
                signature[name] = f"*{NAMES[dtype]}"
            elif name.startswith("p_"):
                signature[name] = "*fp32" if name == "p_lse" else "*i32"
            else:
                signature[name] = "i32"
            if name.startswith(("p_", "q_", "k_", "v_", "out_")) and signature[name] != "constexpr":
                attributes[(position,)] = [["tt.divisibility", 16]]
        source = ASTSource(block_sparse_forward_kernel, signature, constexprs=fixed, attrs=attributes)
        options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}
        kernel = triton_compile(source, target=target, options=options)
        binary = kernel.asm["cubin" if target.backend == "cuda" else "hsaco"]
        print(json.dumps({"binary_bytes": len(binary), "shared_memory": kernel.metadata.shared}))


if __name__ == "__main__":
    backend, architecture = sys.argv[1:]
    main(GPUTarget("cuda", int(architecture), 32) if backend == "cuda" else GPUTarget("hip", architecture, 64))
