"""Attention kernels of other people, called as ours are: q, k, v [1, H, S, D] of 16 bits to out of that shape."""

import importlib.util
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparse_dit.eval.bench.cases import Case
from sparse_dit.eval.bench.inputs import Inputs
from sparse_dit.kernels.blocks import BlockList

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

_SDPA = {
    "cudnn": [SDPBackend.CUDNN_ATTENTION],
    "flash": [SDPBackend.FLASH_ATTENTION],
    "sdpa": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
}
_OPTIONAL = {"sage": "sageattention", "flash4": "flash_attn.cute"}
NAMES = {
    "cudnn": "cuDNN (SDPA)",
    "flash": "FlashAttention (SDPA)",
    "sdpa": "SDPA",
    "flex": "FlexAttention",
    "sage": "SageAttention",
    "flash4": "FlashAttention 4",
}


def dense_kernel(device: torch.device) -> str:
    """The dense kernel that all are compared with."""
    return "cudnn" if device.type == "cuda" and torch.version.hip is None else "sdpa"


def others(device: torch.device) -> list[str]:
    """The dense kernels besides it that can be had on a device."""
    if device.type != "cuda":
        return []
    return ["flash", *(name for name, module in _OPTIONAL.items() if _importable(module))]


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # the package around it is missing or broken
        return False


def yardstick(case: Case, inputs: Inputs) -> Attention:
    """The kernel of a case whose name is in `NAMES`.

    Raises:
        ImportError: the package cannot be imported.
    """
    if case.kernel in _SDPA:
        return _sdpa(case.kernel)
    if case.kernel == "flex":
        return _flex(inputs.blocks(case), inputs.shape.tokens)
    if case.kernel == "sage":
        return _sage()
    return _flash4(inputs.blocks(case) if case.density < 1 else None, inputs.shape.tokens)


def _sdpa(kernel: str) -> Attention:
    backends = _SDPA[kernel]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backends):
            return F.scaled_dot_product_attention(q, k, v)

    return attend


def block_mask(blocks: BlockList, tokens: int) -> Any:
    """FlexAttention's `BlockMask` of the same lists: all of a listed block is computed."""
    from torch.nn.attention.flex_attention import BlockMask

    width = math.ceil(tokens / blocks.block_k) - blocks.indices.shape[-1]
    indices = F.pad(blocks.indices.masked_fill(blocks.unused(), 0), (0, width))
    return BlockMask.from_kv_blocks(
        torch.zeros_like(blocks.counts),
        torch.zeros_like(indices),
        blocks.counts,
        indices,
        BLOCK_SIZE=(blocks.block_q, blocks.block_k),
        seq_lengths=(tokens, tokens),
    )


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(blocks: BlockList, tokens: int) -> Attention:
    mask = block_mask(blocks, tokens)
    return lambda q, k, v: _compiled_flex()(q, k, v, block_mask=mask)


def _sage() -> Attention:
    from sageattention import sageattn

    return lambda q, k, v: sageattn(q, k, v, tensor_layout="HND", is_causal=False)


def _flash4(blocks: BlockList | None, tokens: int) -> Attention:
    """FlashAttention's CuTe kernels take [B, S, H, D]; lists go through the function under their public one."""
    from flash_attn.cute import flash_attn_func

    def told(x: Tensor) -> Tensor:
        return rearrange(x, "b s h d -> b h s d")

    def tokens_first(*tensors: Tensor) -> list[Tensor]:
        return [rearrange(x, "b h s d -> b s h d") for x in tensors]

    if blocks is None:
        return lambda q, k, v: told(_first(flash_attn_func(*tokens_first(q, k, v))))
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import _flash_attn_fwd

    width = math.ceil(tokens / blocks.block_k) - blocks.indices.shape[-1]
    indices = F.pad(blocks.indices.masked_fill(blocks.unused(), 0), (0, width))
    listed = BlockSparseTensorsTorch(
        mask_block_cnt=torch.zeros_like(blocks.counts),
        mask_block_idx=torch.zeros_like(indices),
        full_block_cnt=blocks.counts,
        full_block_idx=indices,
    )
    return lambda q, k, v: told(_first(_flash_attn_fwd(*tokens_first(q, k, v), block_sparse_tensors=listed)))


def _first(result: Any) -> Tensor:
    found: Tensor = result[0] if isinstance(result, tuple) else result
    return found
