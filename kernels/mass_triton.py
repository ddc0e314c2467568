"""Triton: block mass in one pass over QK, for any GPU that Triton compiles for.

Names as in `attention`: `i_` program index, `p_` pointer, `o_` offsets, `m_` mask, `b_` values on chip; a trailing
comment gives the shape.
"""

# Triton kernel bodies are a language of their own: their arguments carry no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="operator, index, attr-defined, no-untyped-call"

import torch
import triton
import triton.language as tl
from einops import rearrange
from torch import Tensor

from sparse_dit.kernels.attention import LOG2_E, column_split
from sparse_dit.kernels.launches import cdiv, device_of, launch_kernel
from sparse_dit.kernels.pieces import aligned, pieces
from sparse_dit.kernels.tiles import Launch, architecture, pinned


@triton.jit
def _scores(
    b_q,
    b_q_rest,
    p_k,
    start,
    k_token,
    m_token,
    MASKED: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    KEYS: tl.constexpr,
):
    """q.k of the KEYS tokens from `start`: [TILE_Q, KEYS]."""
    o_token = tl.arange(0, KEYS).to(tl.int64)  # [KEYS]
    p_k_tile = p_k + start * k_token
    p_k_main = p_k_tile + (o_token[:, None] * k_token + tl.arange(0, MAIN)[None, :])  # [KEYS, MAIN]
    b_k = tl.load(p_k_main, mask=m_token[:, None], other=0.0) if MASKED else tl.load(p_k_main)
    b_s = tl.dot(b_q, tl.trans(b_k))  # [TILE_Q, KEYS]
    if REST > 0:
        o_rest = HEAD_SIZE - REST + tl.arange(0, REST)
        p_k_rest = p_k_tile + (o_token[:, None] * k_token + o_rest[None, :])  # [KEYS, REST]
        b_k_rest = tl.load(p_k_rest, mask=m_token[:, None], other=0.0) if MASKED else tl.load(p_k_rest)
        b_s = tl.dot(b_q_rest, tl.trans(b_k_rest), b_s)
    return b_s


@triton.jit
def _row_sums(
    b_s,
    b_lse,
    m_token,
    qk_scale,
    MASKED: tl.constexpr,
    TILE_Q: tl.constexpr,
    KEYS: tl.constexpr,
    PART_K: tl.constexpr,
):
    """Weights 2^(s - lse) [TILE_Q, KEYS] summed over parts of PART_K keys: [TILE_Q, KEYS / PART_K]."""
    b_p = tl.exp2(b_s * qk_scale - b_lse[:, None])
    if MASKED:
        b_p = tl.where(m_token[None, :], b_p, 0.0)
    # Along the keys first: those sums stay within a warp.
    return tl.sum(tl.reshape(b_p, [TILE_Q, KEYS // PART_K, PART_K]), 2)


@triton.jit
def _store_parts(
    b_left,
    b_right,
    b_weight,
    i_tile,
    p_mass,
    mass_q,
    n_parts_q,
    n_parts_k,
    PART_Q: tl.constexpr,
    PART_K: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """Stores the parts of a tile from the row sums of its halves."""
    PARTS_Q: tl.constexpr = TILE_Q // PART_Q
    PARTS_K: tl.constexpr = TILE_K // PART_K
    # [TILE_Q, 1] or [TILE_Q, 2, PARTS_K / 2]
    b_row = b_left + b_right if PARTS_K == 1 else tl.permute(tl.join(b_left, b_right), (0, 2, 1))
    b_part = tl.sum(tl.reshape(b_row, [PARTS_Q, PART_Q, PARTS_K]), 1) * b_weight[:, None]  # [PARTS_Q, PARTS_K]
    o_row = tl.arange(0, PARTS_Q)
    o_column = i_tile * PARTS_K + tl.arange(0, PARTS_K)
    m_part = (o_row < n_parts_q)[:, None] & (o_column < n_parts_k)[None, :]
    tl.store(p_mass + o_row[:, None] * mass_q + o_column[None, :], b_part, mask=m_part)


@triton.jit
def _add_tiles(
    b_q,
    b_q_rest,
    b_lse,
    b_weight,
    tiles,
    p_k,
    p_mass,
    k_token,
    mass_q,
    n_parts_q,
    n_parts_k,
    qk_scale,
    HEAD_SIZE: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    PART_Q: tl.constexpr,
    PART_K: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """Stores the mass of the first `tiles` key tiles, all whole: 2^(s - lse) summed over parts, times b_weight.

    A tile goes in two halves, and the right one is summed, and the tile stored, in the next turn: its product is needed
    no sooner, so that sm_90 computes it beside the exponentials of the left one. There is one turn more than tiles, in
    which the last tile is computed again: a product that is used behind the loop would be waited for in the loop.
    """
    HALF: tl.constexpr = TILE_K // 2
    HALF_PART: tl.constexpr = PART_K if PART_K < HALF else HALF
    m_none = tl.arange(0, HALF) < HALF
    step = tl.full([], TILE_K, tl.int64)
    b_right = tl.zeros([TILE_Q, HALF], tl.float32)
    b_left_sums = tl.zeros([TILE_Q, HALF // HALF_PART], tl.float32)
    for i_turn in tl.range(0, tl.where(tiles > 0, tiles + 1, 0)):
        start = tl.minimum(i_turn, tiles - 1) * step
        b_left = _scores(b_q, b_q_rest, p_k, start, k_token, m_none, False, HEAD_SIZE, MAIN, REST, HALF)
        b_right_sums = _row_sums(b_right, b_lse, m_none, qk_scale, False, TILE_Q, HALF, HALF_PART)
        b_right = _scores(b_q, b_q_rest, p_k, start + HALF, k_token, m_none, False, HEAD_SIZE, MAIN, REST, HALF)
        # Before the first tile there is nothing to store.
        _store_parts(
            b_left_sums, b_right_sums, b_weight, i_turn - 1, p_mass, mass_q, n_parts_q,
            tl.where(i_turn > 0, n_parts_k, -TILE_K), PART_Q, PART_K, TILE_Q, TILE_K,
        )  # fmt: skip
        b_left_sums = _row_sums(b_left, b_lse, m_none, qk_scale, False, TILE_Q, HALF, HALF_PART)


@triton.jit
def _add_ragged_tile(
    b_q,
    b_q_rest,
    b_lse,
    b_weight,
    i_tile,
    p_k,
    p_mass,
    k_token,
    mass_q,
    n_parts_q,
    n_parts_k,
    seq_k,
    qk_scale,
    HEAD_SIZE: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    PART_Q: tl.constexpr,
    PART_K: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """The same for the tile at the ragged end."""
    HALF: tl.constexpr = TILE_K // 2
    HALF_PART: tl.constexpr = PART_K if PART_K < HALF else HALF
    start = i_tile.to(tl.int64) * TILE_K
    m_left = start + tl.arange(0, HALF) < seq_k
    m_right = start + HALF + tl.arange(0, HALF) < seq_k
    b_left = _scores(b_q, b_q_rest, p_k, start, k_token, m_left, True, HEAD_SIZE, MAIN, REST, HALF)
    b_left_sums = _row_sums(b_left, b_lse, m_left, qk_scale, True, TILE_Q, HALF, HALF_PART)
    b_right = _scores(b_q, b_q_rest, p_k, start + HALF, k_token, m_right, True, HEAD_SIZE, MAIN, REST, HALF)
    b_right_sums = _row_sums(b_right, b_lse, m_right, qk_scale, True, TILE_Q, HALF, HALF_PART)
    _store_parts(
        b_left_sums, b_right_sums, b_weight, i_tile, p_mass, mass_q, n_parts_q, n_parts_k,
        PART_Q, PART_K, TILE_Q, TILE_K,
    )  # fmt: skip


@triton.jit
def block_mass_kernel(
    p_q,
    p_k,
    p_lse,
    p_mass,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    lse_batch,
    lse_head,
    lse_token,
    mass_batch,
    mass_head,
    mass_q,
    seq_q,
    seq_k,
    qk_scale,
    HEAD_SIZE: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    PART_Q: tl.constexpr,
    PART_K: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    RAGGED_K: tl.constexpr,
):
    """mass = sum_ij 2^(s_ij - lse_i) / rows, s = q.k scale log2(e), lse in base 2, over parts of a block.

    One program computes TILE_Q queries of one head against all its keys. Programs that run side by side belong to one
    head, so that they share its K in L2. PART_Q and PART_K cut the tile to the blocks; where a block is larger than the
    tile its parts are added afterwards, so each is divided by the rows of the whole block. Columns are split as in
    `attention`, and strides of q and k counted in pieces of 16 bytes.
    """
    PIECE: tl.constexpr = 128 // p_q.dtype.element_ty.primitive_bitwidth
    q_token, k_token = tl.cast(q_token, tl.int64) * PIECE, tl.cast(k_token, tl.int64) * PIECE
    i_tile, i_h, i_b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    o_q = i_tile * TILE_Q + tl.arange(0, TILE_Q)  # [TILE_Q]
    o_main = tl.arange(0, MAIN)
    m_q = o_q < seq_q
    p_q_row = p_q + (i_b * q_batch + i_h * q_head) * PIECE + o_q[:, None] * q_token
    b_q = tl.load(p_q_row + o_main[None, :], mask=m_q[:, None], other=0.0)  # [TILE_Q, MAIN]
    b_q_rest = b_q
    if REST > 0:
        o_rest = HEAD_SIZE - REST + tl.arange(0, REST)
        m_q_rest = m_q[:, None] & (o_rest >= MAIN)[None, :]
        b_q_rest = tl.load(p_q_row + o_rest[None, :], mask=m_q_rest, other=0.0)
    # Rows behind the end weigh 2^-inf = 0.
    LOG2_E: tl.constexpr = 1.4426950408889634
    p_lse += i_b * lse_batch + i_h * lse_head
    b_lse = tl.load(p_lse + o_q * lse_token, mask=m_q, other=float("inf")) * LOG2_E  # [TILE_Q]

    PARTS_Q: tl.constexpr = TILE_Q // PART_Q
    part = i_tile * PARTS_Q
    block_start = (part + tl.arange(0, PARTS_Q)) * PART_Q // BLOCK_Q * BLOCK_Q  # [PARTS_Q]
    # A part behind the end has no rows; it is not stored.
    rows = tl.maximum(tl.minimum(BLOCK_Q, seq_q - block_start), 1)
    b_weight = 1.0 / rows.to(tl.float32)
    n_parts_q = tl.cdiv(seq_q, PART_Q) - part
    n_parts_k = tl.cdiv(seq_k, PART_K)
    p_k += (i_b * k_batch + i_h * k_head) * PIECE
    p_mass += i_b * mass_batch + i_h * mass_head + part * mass_q
    whole = seq_k // TILE_K
    _add_tiles(
        b_q, b_q_rest, b_lse, b_weight, whole, p_k, p_mass, k_token, mass_q, n_parts_q, n_parts_k, qk_scale,
        HEAD_SIZE, MAIN, REST, PART_Q, PART_K, TILE_Q, TILE_K,
    )  # fmt: skip
    if RAGGED_K:
        _add_ragged_tile(
            b_q, b_q_rest, b_lse, b_weight, whole, p_k, p_mass, k_token, mass_q, n_parts_q, n_parts_k, seq_k, qk_scale,
            HEAD_SIZE, MAIN, REST, PART_Q, PART_K, TILE_Q, TILE_K,
        )  # fmt: skip


def launch_for(head_size: int, arch: str) -> Launch:
    """Pinned launch settings (see `tiles`).

    They leave room for a second program on sm_90, whose matrix products then run beside this one's exponentials.
    """
    return pinned("mass", "native", head_size, arch).launch


def constants(head_size: int, block_q: int, block_k: int, seq_k: int, launch: Launch) -> dict[str, object]:
    """The kernel's compile-time arguments."""
    main, rest = column_split(head_size)
    return {
        "HEAD_SIZE": head_size,
        "MAIN": main,
        "REST": rest,
        "BLOCK_Q": block_q,
        "PART_Q": min(block_q, launch.tile_q),
        "PART_K": min(block_k, launch.tile_k),
        "TILE_Q": launch.tile_q,
        "TILE_K": launch.tile_k,
        "RAGGED_K": seq_k % launch.tile_k != 0,
    }


def triton_mass(
    q: Tensor, k: Tensor, lse: Tensor, block_q: int, block_k: int, scale: float, launch: Launch | None = None
) -> Tensor:
    """The contract of `mass.block_mass`, arguments already checked; copies tensors not `aligned`."""
    q, k = aligned(q), aligned(k)
    batch, heads, seq_q, head_size = q.shape
    seq_k = k.shape[2]
    launch = launch or launch_for(head_size, architecture(q.device))
    fixed = constants(head_size, block_q, block_k, seq_k, launch)
    part_q, part_k = min(block_q, launch.tile_q), min(block_k, launch.tile_k)
    mass = _parts(q, block_q, block_k, part_q, part_k, seq_k)
    with device_of(q):
        launch_kernel(
            block_mass_kernel, (cdiv(seq_q, launch.tile_q), heads, batch),
            q, k, lse, mass, *pieces(q), *pieces(k), *lse.stride(), *mass.stride()[:3],
            seq_q, seq_k, scale * LOG2_E, **fixed,
            num_warps=launch.num_warps, num_stages=launch.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
    if (part_q, part_k) == (block_q, block_k):
        return mass
    cut = {"i": block_q // part_q, "j": block_k // part_k}
    return rearrange(mass, "b h (m i) (n j) -> b h m i n j", **cut).sum(dim=(3, 5))


def _parts(q: Tensor, block_q: int, block_k: int, part_q: int, part_k: int, seq_k: int) -> Tensor:
    """Memory for the parts of all blocks; where parts are added later, those behind the end must be zero."""
    rows = cdiv(q.shape[2], block_q) * (block_q // part_q)
    columns = cdiv(seq_k, block_k) * (block_k // part_k)
    make = torch.empty if (part_q, part_k) == (block_q, block_k) else torch.zeros
    return make(*q.shape[:2], rows, columns, dtype=torch.float32, device=q.device)
