"""Triton: the density of block lists, summed in whole numbers. Names as in `attention`."""

# Triton kernel bodies are a language of their own: their arguments carry no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="operator, index"

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_dit.kernels.blocks import BlockList

ROWS, WARPS = 2048, 8  # rows of lists that the program looks at at once


@triton.jit
def density_kernel(
    p_indices, p_counts, p_density, rows, q_blocks, capacity, block_q, block_k, length, ROWS: tl.constexpr
):
    """Computed area over whole area of square calls: exact in int64, whatever order rows are added in.

    A row ascends, so its last entry tells whether it has the ragged block at the end of the sequence.
    """
    k_blocks = tl.cdiv(length, block_k)
    missing = k_blocks * block_k - length
    b_area = tl.zeros([ROWS], tl.int64)
    for start in range(0, rows, ROWS):
        o_row = start + tl.arange(0, ROWS).to(tl.int64)
        m_row = o_row < rows
        b_count = tl.load(p_counts + o_row, mask=m_row, other=1)
        b_last = tl.load(p_indices + o_row * capacity + b_count - 1, mask=m_row, other=0)
        b_keys = b_count.to(tl.int64) * block_k - tl.where(b_last == k_blocks - 1, missing, 0)
        b_queries = tl.minimum(length - o_row % q_blocks * block_q, block_q)
        b_area += tl.where(m_row, b_keys * b_queries, 0)
    whole = (rows // q_blocks).to(tl.float64) * length * length
    tl.store(p_density, tl.sum(b_area, 0).to(tl.float64) / whole)


def triton_density(blocks: BlockList, length: int) -> Tensor:
    """The contract of `density.measured_density`."""
    indices, counts = blocks.indices.contiguous(), blocks.counts.contiguous()
    density = torch.empty((), dtype=torch.float64, device=counts.device)
    with torch.cuda.device_of(counts):
        density_kernel[(1,)](
            indices, counts, density, counts.numel(), counts.shape[2], indices.shape[3], blocks.block_q,
            blocks.block_k, length,
            ROWS=ROWS, num_warps=WARPS,
        )  # fmt: skip
    return density
