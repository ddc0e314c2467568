"""Triton: block means and self-similarity, one pass over the tokens.

Names as in `attention`: `i_` program index, `p_` pointer, `o_` offsets, `m_` mask, `b_` values on chip.
"""

# Triton kernel bodies are a language of their own: their arguments carry no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="operator, index, attr-defined, no-untyped-call"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_dit.kernels.launches import cdiv, device_of, launch_kernel, power_of_2
from sparse_dit.kernels.pieces import steps


@triton.jit
def pool_kernel(
    p_x,
    p_order,
    p_subtract,
    p_means,
    p_similarity,
    x_batch,
    x_head,
    x_token,
    x_dim,
    order_head,
    order_token,
    subtract_batch,
    subtract_head,
    subtract_dim,
    tokens,
    n_blocks,
    block,
    PIECE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    ORDERED: tl.constexpr,
    SUBTRACTED: tl.constexpr,
    SIMILARITY: tl.constexpr,
):
    """mean = sum_i x_i / n, similarity = |sum_i x_i / |x_i||^2 / n^2, i over the n tokens of one block of one head.

    Strides of x but that of its channels are in PIECE elements: 16 bytes where all of them are multiples of that, which
    the compiler then knows and loads by, else 1.

    Sums stay apart by row of the tile until the end: the loop over tiles exchanges nothing between threads but norms.
    """
    i_n, i_h, i_b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    o_d = tl.arange(0, COLUMNS)
    m_d = o_d < HEAD_SIZE
    p_x += (i_b * x_batch + i_h * x_head) * PIECE
    x_token = tl.cast(x_token, tl.int64) * PIECE
    first = i_n * block
    end = tl.minimum(first + block, tokens)
    b_subtract = tl.zeros([COLUMNS], tl.float32)
    if SUBTRACTED:
        p_subtract += i_b * subtract_batch + i_h * subtract_head
        b_subtract = tl.load(p_subtract + o_d * subtract_dim, mask=m_d, other=0.0).to(tl.float32)
    b_sum = tl.zeros([TILE, COLUMNS], tl.float32)
    b_directions = tl.zeros([TILE, COLUMNS], tl.float32)
    for start in tl.range(first, end, TILE):
        o_token = start + tl.arange(0, TILE)
        m_token = o_token < end
        if ORDERED:
            o_token = tl.load(p_order + i_h * order_head + o_token * order_token, mask=m_token, other=0)
        m_x = m_token[:, None] & m_d[None, :]
        b_x = tl.load(p_x + o_token[:, None] * x_token + o_d[None, :] * x_dim, mask=m_x, other=0.0).to(tl.float32)
        if SUBTRACTED:
            b_x = tl.where(m_token[:, None], b_x - b_subtract[None, :], 0.0)
        b_sum += b_x
        if SIMILARITY:
            b_square = tl.sum(b_x * b_x, 1)  # [TILE]
            # Below 1e-37 the square has no precision left; a token of zero stays zero.
            b_directions += b_x / tl.sqrt(tl.maximum(b_square, 1e-37))[:, None]
    count = (end - first).to(tl.float32)
    o_block = (i_b * tl.num_programs(1) + i_h) * n_blocks + i_n
    tl.store(p_means + o_block * HEAD_SIZE + o_d, tl.sum(b_sum, 0) / count, mask=m_d)
    if SIMILARITY:
        b_direction = tl.sum(b_directions, 0) / count  # [COLUMNS]
        tl.store(p_similarity + o_block, tl.sum(b_direction * b_direction, 0))


@triton.jit
def mean_of_means_kernel(
    p_means,
    p_mean,
    tokens,
    n_blocks,
    block,
    HEAD_SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The mean of all tokens of one head from those of its blocks, of which the last may be shorter."""
    i_bh = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, COLUMNS)
    m_d = o_d < HEAD_SIZE
    b_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, n_blocks, ROWS):
        o_n = start + tl.arange(0, ROWS)
        b_share = tl.minimum(tokens - o_n * block, block).to(tl.float32) / tokens
        m = (o_n < n_blocks)[:, None] & m_d[None, :]
        b_sum += b_share[:, None] * tl.load(
            p_means + (i_bh * n_blocks + o_n[:, None]) * HEAD_SIZE + o_d[None, :], mask=m, other=0.0
        )
    tl.store(p_mean + i_bh * HEAD_SIZE + o_d, tl.sum(b_sum, 0), mask=m_d)


@dataclass(frozen=True)
class Launch:
    """How the kernel is launched: elements a program holds at once, warps a program."""

    elements: int
    num_warps: int


# By whether the similarity is wanted, which sums twice as much in registers. 64 tokens of 128 channels are 16 KB in
# 16 bits: a handful of programs keeps enough of a multiprocessor's loads in flight.
_LAUNCHES = {False: Launch(elements=8192, num_warps=4), True: Launch(elements=4096, num_warps=4)}


def launch_for(similarity: bool) -> Launch:
    """Pinned launch settings: a table, no timing."""
    return _LAUNCHES[similarity]


def constants(
    head_size: int, block: int, launch: Launch, *, piece: int, ordered: bool, subtracted: bool, similarity: bool
) -> dict[str, object]:
    """The kernel's compile-time arguments."""
    columns = power_of_2(head_size)
    return {
        "PIECE": piece,
        "HEAD_SIZE": head_size,
        "COLUMNS": columns,
        "TILE": min(power_of_2(block), max(1, launch.elements // columns)),
        "ORDERED": ordered,
        "SUBTRACTED": subtracted,
        "SIMILARITY": similarity,
    }


def triton_pool(
    x: Tensor,
    block: int,
    order: Tensor | None,
    subtract: Tensor | None,
    similarity: bool,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """The contract of `pool.torch_pool`."""
    launch = launch or launch_for(similarity)
    batch, heads, tokens, head_size = x.shape
    if order is not None:
        tokens = order.shape[1]
        order = order.expand(heads, -1)
    n_blocks = cdiv(tokens, block)
    means = torch.empty(batch, heads, n_blocks, head_size, dtype=torch.float32, device=x.device)
    alike = torch.empty(batch, heads, n_blocks if similarity else 0, dtype=torch.float32, device=x.device)
    piece, strides = steps(x)
    fixed = constants(
        head_size,
        block,
        launch,
        piece=piece,
        ordered=order is not None,
        subtracted=subtract is not None,
        similarity=similarity,
    )
    with device_of(x):
        launch_kernel(
            pool_kernel, (n_blocks, heads, batch),
            x, order, subtract, means, alike, *strides,
            *(order.stride() if order is not None else (0, 0)),
            *(subtract.stride() if subtract is not None else (0, 0, 0)),
            tokens, n_blocks, block, **fixed, num_warps=launch.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return means, alike


MEANS_ROWS, MEANS_WARPS = 32, 4  # of mean_of_means_kernel


def mean_constants(head_size: int) -> dict[str, object]:
    """The compile-time arguments of mean_of_means_kernel."""
    return {"HEAD_SIZE": head_size, "COLUMNS": power_of_2(head_size), "ROWS": MEANS_ROWS}


def triton_mean_of_means(means: Tensor, block: int, tokens: int) -> Tensor:
    """The mean of all tokens, fp32 [B, H, D], from the means of blocks of them that `triton_pool` gives."""
    batch, heads, n_blocks, head_size = means.shape
    mean = torch.empty(batch, heads, head_size, dtype=torch.float32, device=means.device)
    with device_of(means):
        launch_kernel(
            mean_of_means_kernel, (batch * heads,),
            means, mean, tokens, n_blocks, block, **mean_constants(head_size),
            num_warps=MEANS_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return mean
