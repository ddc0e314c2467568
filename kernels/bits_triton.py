"""Triton: bits ↔ block lists, in one launch each. Names as in `attention`."""

# Triton kernel bodies are a language of their own: their arguments carry no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="operator, index"

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_dit.kernels.blocks import BlockList
from sparse_dit.kernels.launches import cdiv, device_of, launch_kernel, power_of_2
from sparse_dit.kernels.look_up_triton import is_listed, look_up_steps

WARPS = 4


@triton.jit
def bits_to_lists_kernel(p_bits, p_indices, p_counts, k_blocks, row_bytes, WIDTH: tl.constexpr):
    """The columns of a row whose bits are set, ascending, and how many they are."""
    i_row = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, WIDTH)
    b_byte = tl.load(p_bits + i_row * row_bytes + o // 8, mask=o < k_blocks, other=0)
    b_set = (b_byte.to(tl.int32) >> (o % 8)) & 1
    b_set = tl.where(o < k_blocks, b_set, 0)
    tl.store(p_indices + i_row * k_blocks + tl.cumsum(b_set, 0) - 1, o, mask=b_set != 0)
    tl.store(p_counts + i_row, tl.sum(b_set, 0))


@triton.jit
def lists_to_bits_kernel(
    p_indices,
    p_counts,
    p_bits,
    i_batch,
    i_head,
    i_row,
    i_index,
    c_batch,
    c_head,
    c_row,
    heads,
    rows,
    row_bytes,
    steps,
    WIDTH: tl.constexpr,
):
    """Bits of a row. Each column looks itself up in the list."""
    i_all = tl.program_id(0)
    i_bh, i_own = (i_all // rows).to(tl.int64), (i_all % rows).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    count = tl.load(p_counts + i_b * c_batch + i_h * c_head + i_own * c_row)
    p_indices += i_b * i_batch + i_h * i_head + i_own * i_row
    o_byte = tl.arange(0, WIDTH)
    b_bits = tl.zeros([WIDTH], tl.int32)
    for place in tl.static_range(8):
        o_column = o_byte * 8 + place
        b_bits |= is_listed(o_column, p_indices, i_index, count, steps).to(tl.int32) << place
    tl.store(p_bits + tl.cast(i_all, tl.int64) * row_bytes + o_byte, b_bits.to(tl.uint8), mask=o_byte < row_bytes)


def triton_bits_to_lists(bits: Tensor, key_blocks: int) -> tuple[Tensor, Tensor]:
    """Contiguous bits [B, H, QB, ceil(KB / 8)] to indices [B, H, QB, KB] and counts [B, H, QB]."""
    counts = torch.empty(bits.shape[:3], dtype=torch.int32, device=bits.device)
    indices = torch.empty((*bits.shape[:3], key_blocks), dtype=torch.int32, device=bits.device)
    with device_of(bits):
        launch_kernel(
            bits_to_lists_kernel, (counts.numel(),), bits, indices, counts, key_blocks, bits.shape[3],
            WIDTH=power_of_2(key_blocks), num_warps=WARPS,
        )  # fmt: skip
    return indices, counts


def triton_lists_to_bits(blocks: BlockList, key_blocks: int) -> Tensor:
    """Lists over at most `key_blocks` blocks to bits [B, H, QB, ceil(KB / 8)]."""
    indices, counts = blocks.indices, blocks.counts
    _, heads, rows = counts.shape
    row_bytes = cdiv(key_blocks, 8)
    bits = torch.empty((*counts.shape, row_bytes), dtype=torch.uint8, device=counts.device)
    with device_of(counts):
        launch_kernel(
            lists_to_bits_kernel, (counts.numel(),), indices, counts, bits, *indices.stride(), *counts.stride(),
            heads, rows, row_bytes, look_up_steps(indices),
            WIDTH=power_of_2(row_bytes), num_warps=1,
        )  # fmt: skip
    return bits
