"""Triton: the density of block lists, summed in whole numbers. Names as in `attention`."""

# Triton kernel bodies are a language of their own: their arguments carry no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="operator, index"

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_dit.kernels.blocks import BlockList
from sparse_dit.kernels.launches import device_of, launch_kernel

ROWS, WARPS = 2048, 8  # rows of lists that the program looks at at once


@triton.jit
def density_kernel(
    p_indices,
    p_counts,
    p_density,
    i_batch,
    i_head,
    i_row,
    i_index,
    c_batch,
    c_head,
    c_row,
    heads,
    rows,
    all_rows,
    length,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Area of the listed tiles, ragged ones by their true size, over that of all, by one program."""
    last_block = (length - 1) // BLOCK_K
    missing = (last_block + 1) * BLOCK_K - length
    b_area = tl.zeros([ROWS], tl.int64)
    for start in range(0, all_rows, ROWS):
        o_row = start + tl.arange(0, ROWS)
        m_row = o_row < all_rows
        o_bh = (o_row // rows).to(tl.int64)
        o_own = o_row % rows
        o_b, o_h = o_bh // heads, o_bh % heads
        b_count = tl.load(p_counts + o_b * c_batch + o_h * c_head + o_own * c_row, mask=m_row, other=0)
        p_last = p_indices + o_b * i_batch + o_h * i_head + o_own.to(tl.int64) * i_row + (b_count - 1) * i_index
        # A row ascends: its last entry tells whether it has the ragged block at the end.
        b_last = tl.load(p_last, mask=m_row, other=0)
        b_keys = b_count * BLOCK_K - tl.where(b_last == last_block, missing, 0)
        b_queries = tl.minimum(length - o_own * BLOCK_Q, BLOCK_Q)
        b_area += tl.where(m_row, b_keys.to(tl.int64) * b_queries, 0)
    whole = tl.cast(length, tl.int64) * length * (all_rows // rows)
    tl.store(p_density, tl.sum(b_area, 0).to(tl.float64) / whole.to(tl.float64))


def triton_density(blocks: BlockList, length: int) -> Tensor:
    """The contract of `density.measured_density`."""
    indices, counts = blocks.indices, blocks.counts
    batch, heads, rows = counts.shape
    density = torch.empty((), dtype=torch.float64, device=counts.device)
    with device_of(counts):
        launch_kernel(
            density_kernel, (1,), indices, counts, density, *indices.stride(), *counts.stride(),
            heads, rows, batch * heads * rows, length,
            BLOCK_Q=blocks.block_q, BLOCK_K=blocks.block_k, ROWS=ROWS, num_warps=WARPS,
        )  # fmt: skip
    return density
