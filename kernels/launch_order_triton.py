"""Triton: the order in which query blocks are launched, those with the longest lists first.

The last programs of a launch run alone: short ones leave multiprocessors idle for a short time. Names as in
`attention`.
"""

# Triton kernel bodies are a language of their own: their arguments carry no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="operator, index"

from collections import defaultdict

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sparse_dit.kernels.launches import cdiv, current_stream, device_of, launch_kernel

ROWS = 64  # query blocks that a program ranks, and compares with at once
WARPS = 4
_known: defaultdict[int, WeakTensorKeyDictionary] = defaultdict(WeakTensorKeyDictionary)  # by stream


@triton.jit
def rank_rows_kernel(p_counts, p_rows, c_batch, c_head, c_row, heads, rows, ROWS: tl.constexpr):
    """rows[rank of i] = i, the rank being the number of rows with more key blocks, or as many and before i."""
    i_bh = tl.program_id(1).to(tl.int64)
    p_counts += i_bh // heads * c_batch + i_bh % heads * c_head
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b_count = tl.load(p_counts + o_row * c_row, mask=o_row < rows, other=0)
    b_rank = tl.zeros([ROWS], tl.int32)
    for start in range(0, rows, ROWS):
        o_other = start + tl.arange(0, ROWS)
        b_other = tl.load(p_counts + o_other * c_row, mask=o_other < rows, other=-1)
        m_before = (b_other[None, :] == b_count[:, None]) & (o_other[None, :] < o_row[:, None])
        b_rank += tl.sum(((b_other[None, :] > b_count[:, None]) | m_before).to(tl.int32), 1)
    tl.store(p_rows + i_bh * rows + b_rank, o_row, mask=o_row < rows)


def launch_order(counts: Tensor) -> Tensor:
    """`longest_first`, found once for a tensor of counts and a stream, and kept as long as the tensor lives.

    Lists that are used again need no launch for it. Each stream ranks for itself, as none waits for another, and while
    a CUDA graph is captured nothing is kept: it would be written when the graph runs. Should someone write other counts
    into the tensor, any order of the rows is as right as another, only not as fast.
    """
    known = _known[current_stream(counts)]
    found: Tensor | None = known.get(counts)
    if found is None:
        found = longest_first(counts)
        if not (counts.is_cuda and torch.cuda.is_current_stream_capturing()):
            known[counts] = found
    return found


def longest_first(counts: Tensor) -> Tensor:
    """The rows of each list by falling length, equal ones as they stand; nothing waits for the device.

    Args:
        counts: int32 [B, H, QB].

    Returns:
        int32 [B, H, QB], row numbers.
    """
    batch, heads, rows = counts.shape
    ranked = torch.empty(batch, heads, rows, dtype=torch.int32, device=counts.device)
    grid = (cdiv(rows, ROWS), batch * heads)
    with device_of(counts):
        launch_kernel(rank_rows_kernel, grid, counts, ranked, *counts.stride(), heads, rows, ROWS=ROWS, num_warps=WARPS)
    return ranked
