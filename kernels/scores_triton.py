"""Triton: scores of blocks from those of their parts.

Names as in `attention`: `i_` program index, `p_` pointer, `o_` offsets, `m_` mask, `b_` values on chip.
"""

# Triton kernel bodies are a language of their own: their arguments carry no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="operator, index, attr-defined, no-untyped-call"

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_dit.kernels.launches import cdiv, device_of, launch_kernel, power_of_2


@triton.jit
def scores_kernel(
    p_q,
    p_k,
    p_scores,
    scale,
    q_parts,
    k_parts,
    q_blocks,
    k_blocks,
    PER_Q: tl.constexpr,
    PER_K: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    MAX: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of blocks by blocks: for each i a product of the i-th parts of queries with all parts of keys.

    The parts of the key blocks stay on chip meanwhile, the j-th parts of all blocks behind the (j - 1)-th: parts of a
    block lie in one thread, so that reducing them exchanges nothing between threads. The factor on the scores holds
    log2(e): sums run in base 2. The first part of a block always exists, so its maximum is finite.
    """
    i_k, i_q, i_bh = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    p_q += i_bh * q_parts * HEAD_SIZE
    p_k += i_bh * k_parts * HEAD_SIZE
    o_q, o_k = i_q * TILE_Q + tl.arange(0, TILE_Q), i_k * TILE_K + tl.arange(0, TILE_K)
    o_d = tl.arange(0, COLUMNS)
    m_d = o_d < HEAD_SIZE
    o_column = tl.arange(0, PER_K * TILE_K)
    o_column = (i_k * TILE_K + o_column % TILE_K) * PER_K + o_column // TILE_K
    m_k = m_d[:, None] & (o_column < k_parts)[None, :]
    b_k = tl.load(p_k + o_column[None, :] * HEAD_SIZE + o_d[:, None], mask=m_k, other=0.0)
    b_beyond = tl.where(o_column < k_parts, 0.0, float("-inf"))
    b_max = tl.full([TILE_Q, TILE_K], float("-inf"), tl.float32)
    b_sum = tl.zeros([TILE_Q, TILE_K], tl.float32)
    for i in range(PER_Q):
        o_row = o_q * PER_Q + i
        m_row = o_row < q_parts
        b_q = tl.load(p_q + o_row[:, None] * HEAD_SIZE + o_d[None, :], mask=m_row[:, None] & m_d[None, :], other=0.0)
        b_score = tl.dot(b_q, b_k, input_precision=PRECISION) + b_beyond[None, :]
        b_score = b_score.reshape([TILE_Q, PER_K, TILE_K])
        b_new = tl.maximum(b_max, tl.where(m_row[:, None], tl.max(b_score, 1), float("-inf")))
        if not MAX:
            b_added = tl.sum(tl.exp2(b_score * scale - (b_new * scale)[:, None, :]), 1)
            b_sum = b_sum * tl.exp2((b_max - b_new) * scale) + tl.where(m_row[:, None], b_added, 0.0)
        b_max = b_new
    b_max *= scale
    if not MAX:
        b_max = (b_max + tl.log2(b_sum)) * 0.6931471805599453
    o_out = i_bh * q_blocks * k_blocks + o_q[:, None].to(tl.int64) * k_blocks + o_k[None, :]
    tl.store(p_scores + o_out, b_max, mask=(o_q < q_blocks)[:, None] & (o_k < k_blocks)[None, :])


@triton.jit
def block_scores_kernel(
    p_q,
    p_k,
    p_scores,
    scale,
    rows,
    columns,
    HEAD_SIZE: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """scale q.k of TILE_Q by TILE_K blocks, CHUNK channels at a time.

    Behind the last block it is loaded again: without masks loads go straight to shared memory, 16 bytes at a time.
    """
    i_k, i_q, i_bh = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_q, o_k = i_q * TILE_Q + tl.arange(0, TILE_Q), i_k * TILE_K + tl.arange(0, TILE_K)
    o_d = tl.arange(0, CHUNK)
    p_q += (i_bh * rows + tl.minimum(o_q, rows - 1))[:, None] * HEAD_SIZE + o_d[None, :]
    p_k += (i_bh * columns + tl.minimum(o_k, columns - 1))[None, :] * HEAD_SIZE + o_d[:, None]
    b_score = tl.zeros([TILE_Q, TILE_K], tl.float32)
    for start in range(0, HEAD_SIZE, CHUNK):
        if HEAD_SIZE % CHUNK == 0:
            b_q, b_k = tl.load(p_q + start), tl.load(p_k + start)
        else:
            m_d = start + o_d < HEAD_SIZE
            b_q = tl.load(p_q + start, mask=m_d[None, :], other=0.0)
            b_k = tl.load(p_k + start, mask=m_d[:, None], other=0.0)
        b_score = tl.dot(b_q, b_k, b_score, input_precision=PRECISION)
    o_out = (i_bh * rows + o_q[:, None]) * columns + o_k[None, :]
    tl.store(p_scores + o_out, b_score * scale, mask=(o_q < rows)[:, None] & (o_k < columns)[None, :])


@triton.jit
def unlike_kernel(
    p_scores,
    p_q_alike,
    p_k_alike,
    p_unlike,
    least,
    rows,
    columns,
    LOWEST: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Marks ROWS by WIDTH pairs of blocks, either of them unlike; by LOWEST scores of such keys are overwritten."""
    i_k, i_q, i_bh = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_q, o_k = i_q * ROWS + tl.arange(0, ROWS), i_k * WIDTH + tl.arange(0, WIDTH)
    m_q, m_k = o_q < rows, o_k < columns
    m_unlike_q = tl.load(p_q_alike + i_bh * rows + o_q, mask=m_q, other=0.0) <= least
    m_unlike_k = tl.load(p_k_alike + i_bh * columns + o_k, mask=m_k, other=0.0) <= least
    o_out = (i_bh * rows + o_q[:, None]) * columns + o_k[None, :]
    m = m_q[:, None] & m_k[None, :]
    tl.store(p_unlike + o_out, (m_unlike_q[:, None] | m_unlike_k[None, :]).to(tl.uint8), mask=m)
    if LOWEST:
        tl.store(p_scores + o_out, -3.4028234663852886e38, mask=m & m_unlike_k[None, :])


@triton.jit
def parts_kernel(
    p_x,
    p_order,
    p_means,
    x_batch,
    x_head,
    x_token,
    order_head,
    tokens,
    parts,
    HEAD_SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
    ORDERED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Means of PARTS parts of PART tokens, by products of a matrix of ones with tiles of tokens, summed in fp32.

    So a program has a whole tile in flight however short the parts are, and no sum crosses threads.
    """
    i_n, i_h, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    o_d, o_part = tl.arange(0, COLUMNS), tl.arange(0, PARTS)
    m_d = o_d < HEAD_SIZE
    p_x += i_b * x_batch + i_h * x_head
    b_sum = tl.zeros([PARTS, COLUMNS], tl.float32)
    for start in range(0, PARTS * PART, TILE):
        o_own = start + tl.arange(0, TILE)
        o_place = i_n * PARTS * PART + o_own
        m_token = o_place < tokens
        o_token = o_place.to(tl.int64)
        if ORDERED:
            o_token = tl.load(p_order + i_h * order_head + o_place, mask=m_token, other=0)
        m_x = m_token[:, None] & m_d[None, :]
        b_x = tl.load(p_x + o_token[:, None] * x_token + o_d[None, :], mask=m_x, other=0.0)
        b_ones = (o_own[None, :] // PART == o_part[:, None]).to(b_x.dtype)
        b_sum = tl.dot(b_ones, b_x, b_sum, input_precision=PRECISION)
    o_part += i_n * PARTS
    b_count = tl.minimum(tokens - o_part * PART, PART).to(tl.float32)
    b_mean = b_sum / tl.maximum(b_count, 1.0)[:, None]
    o_out = ((i_b * tl.num_programs(1) + i_h) * parts + o_part)[:, None] * HEAD_SIZE + o_d[None, :]
    tl.store(p_means + o_out, b_mean.to(p_means.dtype.element_ty), mask=(o_part < parts)[:, None] & m_d[None, :])


@dataclass(frozen=True)
class Launch:
    """How the kernel is launched: blocks of queries and parts of keys a program, its warps, tiles loaded ahead."""

    tile_q: int
    columns: int
    num_warps: int
    num_stages: int


def launch_for(head_size: int, per_k: int) -> Launch:
    """Pinned launch settings: a table, no timing. Registers bound the parts of keys: sums of more would spill."""
    return Launch(tile_q=64, columns=64 if head_size > 128 or per_k < 4 else 128, num_warps=4, num_stages=2)


def constants(
    head_size: int, per_q: int, per_k: int, launch: Launch, *, reduction: str, dtype: torch.dtype
) -> dict[str, object]:
    """The kernel's compile-time arguments."""
    return {
        "PER_Q": per_q,
        "PER_K": per_k,
        "HEAD_SIZE": head_size,
        "COLUMNS": power_of_2(head_size),
        "TILE_Q": launch.tile_q,
        "TILE_K": launch.columns // per_k,
        "MAX": reduction == "max",
        "PRECISION": "ieee" if dtype is torch.float32 else "tf32",
    }


def triton_scores(
    q: Tensor, k: Tensor, per_q: int, per_k: int, scale: float, reduction: str, launch: Launch | None = None
) -> Tensor:
    """The contract of `scores.part_scores` where a key block has one of `scores.PER_K` parts."""
    q, k = q.contiguous(), k.contiguous()
    batch, heads, q_parts, head_size = q.shape
    k_parts = k.shape[2]
    launch = launch or launch_for(head_size, per_k)
    q_blocks, k_blocks = cdiv(q_parts, per_q), cdiv(k_parts, per_k)
    scores = torch.empty(batch, heads, q_blocks, k_blocks, dtype=torch.float32, device=q.device)
    factor = scale if reduction == "max" else scale * math.log2(math.e)
    fixed = constants(head_size, per_q, per_k, launch, reduction=reduction, dtype=q.dtype)
    grid = (cdiv(k_blocks, launch.columns // per_k), cdiv(q_blocks, launch.tile_q), batch * heads)
    with device_of(q):
        launch_kernel(
            scores_kernel, grid,
            q, k, scores, factor, q_parts, k_parts, q_blocks, k_blocks, **fixed,
            num_warps=launch.num_warps, num_stages=launch.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
    return scores


@dataclass(frozen=True)
class Tiles:
    """How block_scores_kernel is launched: blocks a program, channels at a time, its warps, chunks loaded ahead."""

    tile_q: int
    tile_k: int
    chunk: int
    num_warps: int
    num_stages: int


# Pinned, no timing. Chunks of 64 channels are as fast on sm_90, and spill on sm_80.
TILES = Tiles(tile_q=64, tile_k=64, chunk=32, num_warps=4, num_stages=2)


def block_constants(head_size: int, tiles: Tiles, *, is_amd: bool) -> dict[str, object]:
    """The compile-time arguments of block_scores_kernel."""
    return {
        "HEAD_SIZE": head_size,
        "TILE_Q": tiles.tile_q,
        "TILE_K": tiles.tile_k,
        "CHUNK": tiles.chunk,
        # Matrix units of AMD take fp32. On NVIDIA's three products in TF32 come near, of halves of 11 bits.
        "PRECISION": "ieee" if is_amd else "tf32x3",
    }


def triton_block_scores(q: Tensor, k: Tensor, scale: float, tiles: Tiles = TILES) -> Tensor:
    """The contract of `scores.block_scores`."""
    q, k = q.contiguous(), k.contiguous()
    batch, heads, rows, head_size = q.shape
    columns = k.shape[2]
    scores = torch.empty(batch, heads, rows, columns, dtype=torch.float32, device=q.device)
    fixed = block_constants(head_size, tiles, is_amd=torch.version.hip is not None)
    with device_of(q):
        launch_kernel(
            block_scores_kernel, (cdiv(columns, tiles.tile_k), cdiv(rows, tiles.tile_q), batch * heads),
            q, k, scores, scale, rows, columns, **fixed,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
    return scores


UNLIKE_ROWS, UNLIKE_WIDTH, UNLIKE_WARPS = 16, 256, 4  # of unlike_kernel


def triton_mark_unlike(scores: Tensor, q_alike: Tensor, k_alike: Tensor, least: float, *, lowest: bool) -> Tensor:
    """The contract of `scores.mark_unlike`."""
    q_alike, k_alike = q_alike.contiguous(), k_alike.contiguous()
    batch, heads, rows, columns = scores.shape
    unlike = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    with device_of(scores):
        launch_kernel(
            unlike_kernel, (cdiv(columns, UNLIKE_WIDTH), cdiv(rows, UNLIKE_ROWS), batch * heads),
            scores, q_alike, k_alike, unlike.view(torch.uint8), least, rows, columns,
            LOWEST=lowest, ROWS=UNLIKE_ROWS, WIDTH=UNLIKE_WIDTH, num_warps=UNLIKE_WARPS,
        )  # fmt: skip
    return unlike


PARTS, PART_TILE = 16, 64  # parts a program of parts_kernel makes, tokens it holds at once


def part_constants(head_size: int, part: int, *, ordered: bool, dtype: torch.dtype) -> dict[str, object]:
    """The compile-time arguments of parts_kernel."""
    return {
        "HEAD_SIZE": head_size,
        "COLUMNS": power_of_2(head_size),
        "PART": part,
        "PARTS": PARTS,
        "TILE": min(PART_TILE, PARTS * part),
        "ORDERED": ordered,
        "PRECISION": "ieee" if dtype is torch.float32 else "tf32",
    }


def triton_part_means(x: Tensor, part: int, order: Tensor | None) -> Tensor:
    """The contract of `scores.part_means` for parts of a power of two of tokens."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, heads, tokens, head_size = x.shape
    if order is not None:
        order = order.contiguous().expand(heads, -1)
    parts = cdiv(tokens, part)
    means = torch.empty(batch, heads, parts, head_size, dtype=x.dtype, device=x.device)
    fixed = part_constants(head_size, part, ordered=order is not None, dtype=x.dtype)
    with device_of(x):
        launch_kernel(
            parts_kernel, (cdiv(parts, PARTS), heads, batch),
            x, order, means, *x.stride()[:3], 0 if order is None else order.stride(0), tokens, parts, **fixed,
            num_warps=4, num_stages=2, enable_fp_fusion=True,
        )  # fmt: skip
    return means
