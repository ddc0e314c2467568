"""Triton: attention of all queries over the summaries of their skipped blocks, merged with what is there.

Two kernels. The first looks each key block up in each list once, and lists the tiles of TILE_K blocks in which one is
skipped; the second goes on over those tiles with the online softmax that ended with out and lse, a sum of 1 at the
maximum lse. Tiles without a skipped block cost nothing, and query blocks that skip nothing are not touched.

Names as in `attention`: `i_` program index, `p_` pointer, `o_` offsets, `m_` mask, `b_` values on chip.
"""

# Triton kernel bodies are a language of their own: their arguments carry no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="operator, index, attr-defined, no-untyped-call"

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sparse_dit.kernels.blocks import BlockList
from sparse_dit.kernels.tiles import Launch

LOG2_E = math.log2(math.e)
LOOKED_UP = 512  # key blocks that a program of the first kernel looks up at once
LOOK_UP_WARPS = 4


@triton.jit
def skipped_tiles_kernel(
    p_indices,
    p_counts,
    p_log_counts,
    p_tiles,
    p_tile_counts,
    i_batch,
    i_head,
    i_row,
    i_index,
    c_batch,
    c_head,
    c_row,
    k_blocks,
    tiles,
    steps,
    log_whole,
    log_last,
    TILE_K: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """log2 of the tokens of each block that a row skips, else -inf; and the tiles of TILE_K blocks that have one."""
    i_block, i_h, i_b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = (i_b * tl.num_programs(1) + i_h) * tl.num_programs(0) + i_block
    p_indices += i_b * i_batch + i_h * i_head + i_block * i_row
    count = tl.load(p_counts + i_b * c_batch + i_h * c_head + i_block * c_row)
    p_log_counts += row * tiles * TILE_K
    p_tiles += row * tiles
    found = 0
    for first in tl.range(0, tiles * TILE_K, CHUNK):
        o_block = first + tl.arange(0, CHUNK)
        # Rows ascend: `low` becomes the number of entries below the block, by bisection.
        b_low = tl.zeros([CHUNK], tl.int32)
        b_high = tl.zeros([CHUNK], tl.int32) + count
        for _ in tl.range(0, steps):
            m_open = b_low < b_high
            b_middle = (b_low + b_high) // 2
            b_entry = tl.load(p_indices + b_middle * i_index, mask=m_open, other=0)
            b_low = tl.where(m_open & (b_entry < o_block), b_middle + 1, b_low)
            b_high = tl.where(m_open & (b_entry >= o_block), b_middle, b_high)
        b_entry = tl.load(p_indices + b_low * i_index, mask=b_low < count, other=-1)
        b_skipped = ((b_entry != o_block) & (o_block < k_blocks)).to(tl.int32)
        b_log = tl.where(o_block == k_blocks - 1, log_last, log_whole)
        b_log = tl.where(b_skipped > 0, b_log, -float("inf"))
        tl.store(p_log_counts + o_block, b_log, mask=o_block < tiles * TILE_K)
        b_taken = tl.max(tl.reshape(b_skipped, [CHUNK // TILE_K, TILE_K]), 1)
        b_place = found + tl.cumsum(b_taken, 0) - 1
        o_tile = first // TILE_K + tl.arange(0, CHUNK // TILE_K)
        tl.store(p_tiles + b_place, o_tile, mask=b_taken > 0)
        found += tl.sum(b_taken, 0)
    tl.store(p_tile_counts + row, found)


@triton.jit
def summary_kernel(
    p_q,
    p_keys,
    p_values,
    p_out,
    p_lse,
    p_log_counts,
    p_tiles,
    p_tile_counts,
    p_order,
    q_batch,
    q_head,
    q_token,
    q_dim,
    out_batch,
    out_head,
    out_token,
    out_dim,
    row_batch,
    row_head,
    order_head,
    heads,
    seq_q,
    tiles,
    qk_scale,
    HEAD_SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    ORDERED: tl.constexpr,
):
    """out' = (2^l out + sum_j 2^s_ij mean_v_j) / (2^l + sum_j 2^s_ij), s_ij = q_i.mean_k_j scale log2(e) + log2 n_j.

    l = lse log2(e); j over the skipped blocks. One program computes TILE_Q queries of one head. Means lie
    [B, H, tiles TILE_K, COLUMNS], zeros behind the last block and channel, so that no load of the loop has a mask:
    there, a mask costs registers, and columns that are masked in a pipelined load came out wrong (see `attention`).
    """
    i_tile, i_h, i_b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = i_b * row_batch + i_h * row_head + i_tile // (BLOCK_Q // TILE_Q)
    count = tl.load(p_tile_counts + row)
    if count == 0:
        return
    p_log_counts += row * tiles * TILE_K
    p_tiles += row * tiles
    o_row = i_tile * TILE_Q + tl.arange(0, TILE_Q)  # [TILE_Q]
    o_dim = tl.arange(0, COLUMNS)
    o_key = tl.arange(0, TILE_K)
    m_row = o_row < seq_q
    m_rows = m_row[:, None] & (o_dim < HEAD_SIZE)[None, :]
    o_token = o_row
    if ORDERED:
        o_token = tl.load(p_order + i_h * order_head + o_row, mask=m_row, other=0)
    p_q += i_b * q_batch + i_h * q_head
    b_q = tl.load(p_q + o_token[:, None] * q_token + o_dim[None, :] * q_dim, mask=m_rows, other=0.0)
    o_mean = o_key[:, None] * COLUMNS + o_dim[None, :]  # [TILE_K, COLUMNS]
    p_keys += (i_b * heads + i_h) * tiles * TILE_K * COLUMNS
    p_values += (i_b * heads + i_h) * tiles * TILE_K * COLUMNS

    LN_2: tl.constexpr = 0.6931471805599453
    p_lse += (i_b * heads + i_h) * seq_q + o_token
    p_out += i_b * out_batch + i_h * out_head
    p_rows = p_out + o_token[:, None] * out_token + o_dim[None, :] * out_dim
    # The online softmax goes on where attention along the lists ended.
    b_acc = tl.load(p_rows, mask=m_rows, other=0.0).to(tl.float32)  # [TILE_Q, COLUMNS]
    b_max = tl.load(p_lse, mask=m_row, other=0.0) * (1.0 / LN_2)  # [TILE_Q]
    b_sum = tl.full([TILE_Q], 1.0, tl.float32)
    for i_listed in tl.range(0, count):
        first = tl.load(p_tiles + i_listed).to(tl.int64) * TILE_K
        b_keys = tl.load(p_keys + first * COLUMNS + o_mean)
        b_log = tl.load(p_log_counts + first + o_key)  # [TILE_K]
        b_s = tl.dot(b_q, tl.trans(b_keys)) * qk_scale + b_log[None, :]  # [TILE_Q, TILE_K]
        b_new_max = tl.maximum(b_max, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_new_max[:, None])
        b_decay = tl.exp2(b_max - b_new_max)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_max = b_new_max
        b_values = tl.load(p_values + first * COLUMNS + o_mean)
        b_acc = tl.dot(b_p.to(b_values.dtype), b_values, b_acc * b_decay[:, None])

    tl.store(p_rows, (b_acc / b_sum[:, None]).to(p_out.dtype.element_ty), mask=m_rows)
    tl.store(p_lse, (b_max + tl.log2(b_sum)) * LN_2, mask=m_row)


# By head size rounded up to a power of two. Every row fits the shared memory of every architecture, and spills no
# registers on sm_90. A sequence has few summaries: there is little to prefetch.
_LAUNCHES = {
    64: Launch(tile_q=128, tile_k=64, num_warps=8, num_stages=2),
    128: Launch(tile_q=128, tile_k=64, num_warps=8, num_stages=2),
    256: Launch(tile_q=64, tile_k=32, num_warps=8, num_stages=2),
}
# Warps a program where the query blocks are smaller than the pinned tile.
_CUT_WARPS = 4


def launch_for(head_size: int, block_q: int) -> Launch:
    """Pinned launch settings: a table, no timing. The tile of queries is cut to the list's query blocks.

    Args:
        head_size: D.
        block_q: query tokens a block of the list.
    """
    pinned = _LAUNCHES[triton.next_power_of_2(head_size)]
    num_warps = pinned.num_warps if pinned.tile_q <= block_q else _CUT_WARPS
    return Launch(min(pinned.tile_q, block_q), pinned.tile_k, num_warps, pinned.num_stages)


def constants(head_size: int, block_q: int, launch: Launch, *, ordered: bool) -> dict[str, object]:
    """The compile-time arguments of the second kernel."""
    return {
        "HEAD_SIZE": head_size,
        "COLUMNS": triton.next_power_of_2(head_size),
        "BLOCK_Q": block_q,
        "TILE_Q": launch.tile_q,
        "TILE_K": launch.tile_k,
        "ORDERED": ordered,
    }


def triton_merge(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    mean_k: Tensor,
    mean_v: Tensor,
    blocks: BlockList,
    seq_k: int,
    scale: float,
    order: Tensor | None,
) -> None:
    """The contract of `summary.merge_summaries`, on means [B, H, KB, D] in the dtype of q."""
    batch, heads, seq_q, head_size = q.shape
    k_blocks = mean_k.shape[2]
    launch = launch_for(head_size, blocks.block_q)
    fixed = constants(head_size, blocks.block_q, launch, ordered=order is not None)
    tiles = triton.cdiv(k_blocks, launch.tile_k)
    padding = (0, triton.next_power_of_2(head_size) - head_size, 0, tiles * launch.tile_k - k_blocks)
    keys, values = (F.pad(means, padding).contiguous() for means in (mean_k, mean_v))
    with torch.cuda.device_of(q):
        log_counts, skipped, skipped_counts = _skipped_tiles(blocks, seq_k, tiles, launch.tile_k)
        query_blocks = blocks.counts.shape[2]
        summary_kernel[(triton.cdiv(seq_q, launch.tile_q), heads, batch)](
            q, keys, values, out, lse, log_counts, skipped, skipped_counts, order,
            *q.stride(), *out.stride(),
            skipped_counts.stride(0) if len(skipped_counts) > 1 else 0,
            query_blocks if skipped_counts.shape[1] > 1 else 0,
            0 if order is None or len(order) == 1 else order.stride(0),
            heads, seq_q, tiles, scale * LOG2_E,
            **fixed, num_warps=launch.num_warps, num_stages=launch.num_stages, enable_fp_fusion=True,
        )  # fmt: skip


def _skipped_tiles(blocks: BlockList, seq_k: int, tiles: int, tile_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each row of the lists what is added to scores, fp32 [.., QB, tiles tile_k]; tiles with a skipped block, int32
    [.., QB, tiles]; and how many they are, int32 [.., QB]."""
    k_blocks = triton.cdiv(seq_k, blocks.block_k)
    shape, device = blocks.counts.shape, blocks.counts.device
    log_counts = torch.empty(*shape, tiles * tile_k, dtype=torch.float32, device=device)
    skipped = torch.empty(*shape, tiles, dtype=torch.int32, device=device)
    skipped_counts = torch.empty(shape, dtype=torch.int32, device=device)
    steps = blocks.indices.shape[-1].bit_length()  # bisections that settle a list of this width
    skipped_tiles_kernel[(shape[2], shape[1], shape[0])](
        blocks.indices, blocks.counts, log_counts, skipped, skipped_counts,
        *blocks.indices.stride(), *blocks.counts.stride(),
        k_blocks, tiles, steps, math.log2(blocks.block_k), math.log2(seq_k - (k_blocks - 1) * blocks.block_k),
        TILE_K=tile_k, CHUNK=LOOKED_UP, num_warps=LOOK_UP_WARPS,
    )  # fmt: skip
    return log_counts, skipped, skipped_counts
