"""Triton: attention of all queries over the summaries of their skipped blocks, merged with what is there.

Three kernels. The first takes the means of k and v. The second looks each key block up in each list once, and lists the
tiles of TILE_K blocks in which one is skipped; the third goes on over those tiles with the online softmax that ended
with out and lse, a sum of 1 at the maximum lse. Tiles without a skipped block cost nothing, and query blocks that skip
nothing are not touched.

Names as in `attention`: `i_` program index, `p_` pointer, `o_` offsets, `m_` mask, `b_` values on chip.
"""

# Triton kernel bodies are a language of their own: their arguments carry no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="operator, index, attr-defined, no-untyped-call"

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_dit.kernels.blocks import BlockList
from sparse_dit.kernels.launches import cdiv, device_of, launch_kernel, power_of_2
from sparse_dit.kernels.look_up_triton import is_listed, look_up_steps
from sparse_dit.kernels.pieces import steps
from sparse_dit.kernels.tiles import Launch

LOG2_E = math.log2(math.e)
LOOKED_UP = 512  # key blocks that a program of the second kernel looks up at once
LOOK_UP_WARPS = 4
MEANS_ELEMENTS, MEANS_WARPS = 8192, 4  # that a program of the first kernel loads at once, and its warps


@triton.jit
def _mean(
    p_x, p_order, p_mean, x_token, x_dim, first, seq,
    HEAD_SIZE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    o_dim = tl.arange(0, COLUMNS)
    m_dim = o_dim < HEAD_SIZE
    b_sum = tl.zeros([TILE, COLUMNS], tl.float32)
    for start in tl.static_range(0, BLOCK, TILE):
        o_token = first + start + tl.arange(0, TILE)
        m_token = o_token < seq
        if ORDERED:
            o_token = tl.load(p_order + o_token, mask=m_token, other=0)
        m_x = m_token[:, None] & m_dim[None, :]
        b_sum += tl.load(p_x + o_token[:, None] * x_token + o_dim[None, :] * x_dim, mask=m_x, other=0.0).to(tl.float32)
    b_mean = tl.sum(b_sum, 0) / tl.maximum(tl.minimum(seq - first, BLOCK), 1).to(tl.float32)
    tl.store(p_mean + o_dim, b_mean.to(p_mean.dtype.element_ty))


@triton.jit
def means_kernel(
    p_k,
    p_v,
    p_order,
    p_keys,
    p_values,
    k_batch,
    k_head,
    k_token,
    k_dim,
    v_batch,
    v_head,
    v_token,
    v_dim,
    order_head,
    heads,
    seq,
    PIECE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    ORDERED: tl.constexpr,
):
    """Means of k and of v over a block of one head, programs (block, batch and head, 0 for k or 1 for v).

    They lie [B, H, blocks, COLUMNS], zeros behind the last block and channel. Strides as in `pool_triton`.
    """
    k_token, v_token = tl.cast(k_token, tl.int64) * PIECE, tl.cast(v_token, tl.int64) * PIECE
    i_block, i_bh = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    o_mean = (i_bh * tl.num_programs(0) + i_block) * COLUMNS
    if ORDERED:
        p_order += i_h * order_head
    if tl.program_id(2) == 0:
        p_k += (i_b * k_batch + i_h * k_head) * PIECE
        _mean(
            p_k, p_order, p_keys + o_mean, k_token, k_dim, i_block * BLOCK, seq,
            HEAD_SIZE, COLUMNS, BLOCK, TILE, ORDERED,
        )  # fmt: skip
    else:
        p_v += (i_b * v_batch + i_h * v_head) * PIECE
        _mean(
            p_v, p_order, p_values + o_mean, v_token, v_dim, i_block * BLOCK, seq,
            HEAD_SIZE, COLUMNS, BLOCK, TILE, ORDERED,
        )  # fmt: skip


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
        m_listed = is_listed(o_block, p_indices, i_index, count, steps)
        b_skipped = ((m_listed == 0) & (o_block < k_blocks)).to(tl.int32)
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
    # Behind the end the last row is computed again, and not stored: loads need no mask.
    o_token = tl.minimum(o_row, seq_q - 1)
    if ORDERED:
        o_token = tl.load(p_order + i_h * order_head + o_token)
    MASKED: tl.constexpr = HEAD_SIZE < COLUMNS
    m_dim = (o_dim < HEAD_SIZE)[None, :]
    p_q += i_b * q_batch + i_h * q_head + o_token[:, None] * q_token + o_dim[None, :] * q_dim
    b_q = tl.load(p_q, mask=m_dim, other=0.0) if MASKED else tl.load(p_q)
    o_mean = o_key[:, None] * COLUMNS + o_dim[None, :]  # [TILE_K, COLUMNS]
    p_keys += (i_b * heads + i_h) * tiles * TILE_K * COLUMNS
    p_values += (i_b * heads + i_h) * tiles * TILE_K * COLUMNS

    LN_2: tl.constexpr = 0.6931471805599453
    p_lse += (i_b * heads + i_h) * seq_q + o_token
    # The online softmax goes on where attention along the lists ended; out itself is added at the end, so that the loop
    # has registers for two programs a multiprocessor.
    b_listed = tl.load(p_lse) * (1.0 / LN_2)  # [TILE_Q]
    b_max = b_listed
    b_sum = tl.full([TILE_Q], 1.0, tl.float32)
    b_acc = tl.zeros([TILE_Q, COLUMNS], tl.float32)
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

    p_out += i_b * out_batch + i_h * out_head + o_token[:, None] * out_token + o_dim[None, :] * out_dim
    b_out = tl.load(p_out, mask=m_dim, other=0.0) if MASKED else tl.load(p_out)
    b_out = (b_acc + b_out.to(tl.float32) * tl.exp2(b_listed - b_max)[:, None]) / b_sum[:, None]
    m_rows = m_row[:, None] & m_dim if MASKED else m_row[:, None]
    tl.store(p_out, b_out.to(p_out.dtype.element_ty), mask=m_rows)
    tl.store(p_lse, (b_max + tl.log2(b_sum)) * LN_2, mask=m_row)


# By head size rounded up to a power of two. Every row fits the shared memory of every architecture, and spills no
# registers on sm_90. A sequence has few summaries: there is little to prefetch.
_LAUNCHES = {
    64: Launch(tile_q=128, tile_k=64, num_warps=8, num_stages=2),
    128: Launch(tile_q=64, tile_k=32, num_warps=4, num_stages=2),  # three programs a multiprocessor of sm_90, not one
    256: Launch(tile_q=32, tile_k=32, num_warps=4, num_stages=2),
}
# Warps a program where the query blocks are smaller than the pinned tile.
_CUT_WARPS = 4


def launch_for(head_size: int, block_q: int) -> Launch:
    """Pinned launch settings: a table, no timing. The tile of queries is cut to the list's query blocks.

    Args:
        head_size: D.
        block_q: query tokens a block of the list.
    """
    pinned = _LAUNCHES[power_of_2(head_size)]
    num_warps = pinned.num_warps if pinned.tile_q <= block_q else _CUT_WARPS
    return Launch(min(pinned.tile_q, block_q), pinned.tile_k, num_warps, pinned.num_stages)


def constants(head_size: int, block_q: int, launch: Launch, *, ordered: bool) -> dict[str, object]:
    """The compile-time arguments of the third kernel."""
    return {
        "HEAD_SIZE": head_size,
        "COLUMNS": power_of_2(head_size),
        "BLOCK_Q": block_q,
        "TILE_Q": launch.tile_q,
        "TILE_K": launch.tile_k,
        "ORDERED": ordered,
    }


def means_constants(head_size: int, block_k: int, piece: int, *, ordered: bool) -> dict[str, object]:
    """The compile-time arguments of the first kernel."""
    columns = power_of_2(head_size)
    return {
        "PIECE": piece,
        "HEAD_SIZE": head_size,
        "COLUMNS": columns,
        "BLOCK": block_k,
        "TILE": min(block_k, MEANS_ELEMENTS // columns),
        "ORDERED": ordered,
    }


def triton_merge(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockList,
    scale: float,
    order: Tensor | None,
) -> None:
    """The contract of `summary.merge_summaries`."""
    batch, heads, seq_q, head_size = q.shape
    seq_k = k.shape[2]
    launch = launch_for(head_size, blocks.block_q)
    fixed = constants(head_size, blocks.block_q, launch, ordered=order is not None)
    tiles = cdiv(cdiv(seq_k, blocks.block_k), launch.tile_k)
    with device_of(q):
        keys, values = _means(k, v, blocks.block_k, tiles * launch.tile_k, order)
        log_counts, skipped, skipped_counts = _skipped_tiles(blocks, seq_k, tiles, launch.tile_k)
        query_blocks = blocks.counts.shape[2]
        launch_kernel(
            summary_kernel, (cdiv(seq_q, launch.tile_q), heads, batch),
            q, keys, values, out, lse, log_counts, skipped, skipped_counts, order,
            *q.stride(), *out.stride(),
            skipped_counts.stride(0) if len(skipped_counts) > 1 else 0,
            query_blocks if skipped_counts.shape[1] > 1 else 0,
            0 if order is None or len(order) == 1 else order.stride(0),
            heads, seq_q, tiles, scale * LOG2_E,
            **fixed, num_warps=launch.num_warps, num_stages=launch.num_stages, enable_fp_fusion=True,
        )  # fmt: skip


def _means(k: Tensor, v: Tensor, block_k: int, rows: int, order: Tensor | None) -> tuple[Tensor, Tensor]:
    """Block means of k and v in their dtype, [B, H, rows, D rounded up to a power of two], zeros where none are."""
    batch, heads, seq, head_size = k.shape
    piece, strides = steps(k, v)
    fixed = means_constants(head_size, block_k, piece, ordered=order is not None)
    keys, values = (
        torch.empty(batch, heads, rows, power_of_2(head_size), dtype=k.dtype, device=k.device) for _ in "kv"
    )
    launch_kernel(
        means_kernel, (rows, batch * heads, 2),
        k, v, order, keys, values, *strides,
        0 if order is None or len(order) == 1 else order.stride(0), heads, seq, **fixed, num_warps=MEANS_WARPS,
    )  # fmt: skip
    return keys, values


def _skipped_tiles(blocks: BlockList, seq_k: int, tiles: int, tile_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each row of the lists what is added to scores, fp32 [.., QB, tiles tile_k]; tiles with a skipped block, int32
    [.., QB, tiles]; and how many they are, int32 [.., QB]."""
    k_blocks = cdiv(seq_k, blocks.block_k)
    shape, device = blocks.counts.shape, blocks.counts.device
    log_counts = torch.empty(*shape, tiles * tile_k, dtype=torch.float32, device=device)
    skipped = torch.empty(*shape, tiles, dtype=torch.int32, device=device)
    skipped_counts = torch.empty(shape, dtype=torch.int32, device=device)
    launch_kernel(
        skipped_tiles_kernel, (shape[2], shape[1], shape[0]),
        blocks.indices, blocks.counts, log_counts, skipped, skipped_counts,
        *blocks.indices.stride(), *blocks.counts.stride(),
        k_blocks, tiles, look_up_steps(blocks.indices),
        math.log2(blocks.block_k), math.log2(seq_k - (k_blocks - 1) * blocks.block_k),
        TILE_K=tile_k, CHUNK=LOOKED_UP, num_warps=LOOK_UP_WARPS,
    )  # fmt: skip
    return log_counts, skipped, skipped_counts
