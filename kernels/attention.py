"""Triton: attention along a block list in 16 bits, for any GPU that Triton compiles for.

Names in the kernel: `i_` program index, `p_` pointer, `o_` offsets, `m_` mask, `b_` values on chip; a trailing comment
gives the shape.
Triton reads TRITON_INTERPRET when this module is imported.
"""

import torch
import triton
import triton.language as tl
from einops import rearrange
from torch import Tensor

from sparse_dit.kernels.launches import cdiv, device_of, launch_kernel, power_of_2
from sparse_dit.kernels.pieces import aligned, pieces
from sparse_dit.kernels.tiles import Launch, architecture, pinned

LOG2_E = 1.4426950408889634


@triton.jit
def any_within(b_tile_max, b_max, pv_threshold, SKIPS: tl.constexpr):
    """Whether a row's maximum over a tile lies no further than the threshold below its maximum so far."""
    if SKIPS:
        return tl.max((b_tile_max >= b_max - pv_threshold).to(tl.int32), 0) > 0
    else:
        return True


@triton.jit
def weighted(b_acc, b_acc_rest, b_p, b_v, b_v_rest, taken, SKIPS: tl.constexpr, REST: tl.constexpr):
    """acc + p v of a tile that is taken, in both parts.

    One branch for both: of two, ptxas 12.8 made code that reads a register before it is written (see `_TAIL_TILE`).
    """
    if SKIPS:
        if taken:
            b_acc = tl.dot(b_p, b_v, b_acc)
            if REST > 0:
                b_acc_rest = tl.dot(b_p, b_v_rest, b_acc_rest)
    else:
        b_acc = tl.dot(b_p, b_v, b_acc)
        if REST > 0:
            b_acc_rest = tl.dot(b_p, b_v_rest, b_acc_rest)
    return b_acc, b_acc_rest


@triton.jit
def _attend_tiles(
    b_q,
    b_q_rest,
    b_acc,
    b_acc_rest,
    b_max,
    b_sum,
    first,
    last,
    p_indices,
    p_k,
    p_v,
    k_token,
    v_token,
    i_index,
    seq_k,
    qk_scale,
    pv_threshold,
    SKIPS: tl.constexpr,
    MASKED: tl.constexpr,
    STAGES: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """Online softmax over tiles [first, last) of the listed blocks, TILE_K keys each.

    max' = max(max, rowmax(s)), sum' = sum 2^(max - max') + rowsum(2^(s - max')), acc' likewise with V, where
    s = q.k scale log2(e). With SKIPS the product with V is left out where rowmax(s) < max' - pv_threshold in all rows.
    """
    o_tile = tl.arange(0, TILE_K).to(tl.int64)  # [TILE_K]
    o_main = tl.arange(0, MAIN)
    o_k = o_tile[:, None] * k_token + o_main[None, :]  # [TILE_K, MAIN]
    o_v = o_tile[:, None] * v_token + o_main[None, :]
    if REST > 0:
        o_rest = HEAD_SIZE - REST + tl.arange(0, REST)
        o_k_rest = o_tile[:, None] * k_token + o_rest[None, :]  # [TILE_K, REST]
        o_v_rest = o_tile[:, None] * v_token + o_rest[None, :]
    # The list is read one tile ahead: loads of K and V then wait for no other load, and stay in flight for all stages.
    block = tl.load(p_indices + (first * TILE_K // BLOCK_K) * i_index, mask=first < last, other=0)
    for i_tile in tl.range(first, last, num_stages=STAGES):
        start = tl.multiple_of(block.to(tl.int64) * BLOCK_K + i_tile * TILE_K % BLOCK_K, TILE_K)
        ahead = tl.minimum(i_tile + 1, last - 1)
        block = tl.load(p_indices + (ahead * TILE_K // BLOCK_K) * i_index)
        p_k_tile = p_k + start * k_token
        p_v_tile = p_v + start * v_token
        m_token = start + o_tile < seq_k  # [TILE_K]
        p_k_main = p_k_tile + o_k  # [TILE_K, MAIN]
        b_k = tl.load(p_k_main, mask=m_token[:, None], other=0.0) if MASKED else tl.load(p_k_main)
        b_s = tl.dot(b_q, tl.trans(b_k))  # [TILE_Q, TILE_K]
        if REST > 0:
            p_k_rest = p_k_tile + o_k_rest  # [TILE_K, REST]
            b_k_rest = tl.load(p_k_rest, mask=m_token[:, None], other=0.0) if MASKED else tl.load(p_k_rest)
            b_s = tl.dot(b_q_rest, tl.trans(b_k_rest), b_s)
        if MASKED:
            b_s = tl.where(m_token[None, :], b_s, -float("inf"))
        b_tile_max = tl.max(b_s, 1) * qk_scale  # [TILE_Q]
        b_new_max = tl.maximum(b_max, b_tile_max)
        taken = any_within(b_tile_max, b_new_max, pv_threshold, SKIPS)
        b_p = tl.exp2(b_s * qk_scale - b_new_max[:, None])
        b_decay = tl.exp2(b_max - b_new_max)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_max = b_new_max
        p_v_main = p_v_tile + o_v  # [TILE_K, MAIN]
        b_v = tl.load(p_v_main, mask=m_token[:, None], other=0.0) if MASKED else tl.load(p_v_main)
        b_p = b_p.to(b_v.dtype)
        b_acc = b_acc * b_decay[:, None]
        b_v_rest = b_v
        if REST > 0:
            p_v_rest = p_v_tile + o_v_rest  # [TILE_K, REST]
            b_v_rest = tl.load(p_v_rest, mask=m_token[:, None], other=0.0) if MASKED else tl.load(p_v_rest)
            b_acc_rest = b_acc_rest * b_decay[:, None]
        b_acc, b_acc_rest = weighted(b_acc, b_acc_rest, b_p, b_v, b_v_rest, taken, SKIPS, REST)
    return b_acc, b_acc_rest, b_max, b_sum


@triton.jit
def block_sparse_forward_kernel(
    p_q,
    p_k,
    p_v,
    p_order,
    p_out,
    p_lse,
    p_indices,
    p_counts,
    order_head,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    out_batch,
    out_head,
    out_token,
    lse_batch,
    lse_head,
    i_batch,
    i_head,
    i_row,
    i_index,
    c_batch,
    c_head,
    c_row,
    seq_q,
    seq_k,
    qk_scale,
    pv_threshold,
    HEAD_SIZE: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    TAIL_TILE: tl.constexpr,
    RAGGED_K: tl.constexpr,
    ORDERED: tl.constexpr,
    SKIPS: tl.constexpr,
):
    """out_i = sum_j 2^(s_ij - lse_i) v_j, lse_i = log2 sum_j 2^s_ij, s = q.k scale log2(e), j over the listed blocks.

    One program computes TILE_Q queries of one head. Programs that run side by side belong to one head, so that they
    share its K and V in L2. A head size that is no power of two is computed as its first MAIN and its last REST
    columns; where the two overlap, q's second part is zero and out's is not stored. No column is masked in the
    loop: a pipelined load that masks columns gave wrong products on sm_90 (Triton 3.6). With an order, k and v are
    gathered by it, and q and out are not: their rows are loaded from and stored to the tokens they belong to.

    Strides of q, k, v and out are in pieces of 16 bytes (see `aligned`), channels lie side by side: the compiler
    knows then that rows of any head size are whole pieces. It is told of a stride only whether 16 divides it, which
    it does not for 72 or 88; loads fell apart into channels, and such loads in a pipeline gave NaN on sm_90 (3.6).
    """
    PIECE: tl.constexpr = 128 // p_q.dtype.element_ty.primitive_bitwidth
    q_token, out_token = tl.cast(q_token, tl.int64) * PIECE, tl.cast(out_token, tl.int64) * PIECE
    k_token, v_token = tl.cast(k_token, tl.int64) * PIECE, tl.cast(v_token, tl.int64) * PIECE
    i_tile, i_h, i_b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i_block = i_tile // (BLOCK_Q // TILE_Q)
    o_q = i_tile * TILE_Q + tl.arange(0, TILE_Q)  # [TILE_Q]
    o_main = tl.arange(0, MAIN)
    REST_PADDED: tl.constexpr = REST if REST > 0 else 16
    o_rest = HEAD_SIZE - REST_PADDED + tl.arange(0, REST_PADDED)
    m_q = o_q < seq_q
    # Behind the end the last row is computed again: it leaves out what that leaves out, and is not stored.
    o_token = tl.minimum(o_q, seq_q - 1)
    if ORDERED:
        o_token = tl.load(p_order + i_h * order_head + o_token)
    m_rest = o_rest >= MAIN

    p_q += (i_b * q_batch + i_h * q_head) * PIECE
    p_k += (i_b * k_batch + i_h * k_head) * PIECE
    p_v += (i_b * v_batch + i_h * v_head) * PIECE
    p_out += (i_b * out_batch + i_h * out_head) * PIECE
    p_indices += i_b * i_batch + i_h * i_head + i_block * i_row
    count = tl.load(p_counts + i_b * c_batch + i_h * c_head + i_block * c_row)

    p_q_row = p_q + o_token[:, None] * q_token
    b_q = tl.load(p_q_row + o_main[None, :])  # [TILE_Q, MAIN]
    b_q_rest = b_q
    if REST > 0:
        b_q_rest = tl.load(p_q_row + o_rest[None, :], mask=m_rest[None, :], other=0.0)
    b_acc = tl.zeros([TILE_Q, MAIN], tl.float32)
    b_acc_rest = tl.zeros([TILE_Q, REST_PADDED], tl.float32)
    b_max = tl.full([TILE_Q], -float("inf"), tl.float32)
    b_sum = tl.zeros([TILE_Q], tl.float32)

    # Rows ascend: only the last entry can be the block at the ragged end, and only that one pays for masks. It goes in
    # small tiles, without prefetch: registers and shared memory are the main loop's.
    whole = count
    if RAGGED_K:
        ends_ragged = tl.load(p_indices + (count - 1) * i_index) == seq_k // BLOCK_K
        whole = tl.where(ends_ragged, count - 1, count)
    b_acc, b_acc_rest, b_max, b_sum = _attend_tiles(
        b_q, b_q_rest, b_acc, b_acc_rest, b_max, b_sum, 0, whole * (BLOCK_K // TILE_K),
        p_indices, p_k, p_v, k_token, v_token, i_index, seq_k, qk_scale, pv_threshold,
        SKIPS=SKIPS, MASKED=False, STAGES=None,
        HEAD_SIZE=HEAD_SIZE, MAIN=MAIN, REST=REST, BLOCK_K=BLOCK_K, TILE_K=TILE_K,
    )  # fmt: skip
    if RAGGED_K:
        first = whole * (BLOCK_K // TAIL_TILE)
        last = tl.where(ends_ragged, first + tl.cdiv(seq_k % BLOCK_K, TAIL_TILE), first)
        b_acc, b_acc_rest, b_max, b_sum = _attend_tiles(
            b_q, b_q_rest, b_acc, b_acc_rest, b_max, b_sum, first, last,
            p_indices, p_k, p_v, k_token, v_token, i_index, seq_k, qk_scale, pv_threshold,
            SKIPS=SKIPS, MASKED=True, STAGES=1,
            HEAD_SIZE=HEAD_SIZE, MAIN=MAIN, REST=REST, BLOCK_K=BLOCK_K, TILE_K=TAIL_TILE,
        )  # fmt: skip

    p_out_row = p_out + o_token[:, None] * out_token
    b_out = (b_acc / b_sum[:, None]).to(p_out.dtype.element_ty)
    tl.store(p_out_row + o_main[None, :], b_out, mask=m_q[:, None])
    if REST > 0:
        b_out_rest = (b_acc_rest / b_sum[:, None]).to(p_out.dtype.element_ty)
        tl.store(p_out_row + o_rest[None, :], b_out_rest, mask=m_q[:, None] & m_rest[None, :])
    LN_2: tl.constexpr = 0.6931471805599453
    tl.store(p_lse + i_b * lse_batch + i_h * lse_head + o_token, (b_max + tl.log2(b_sum)) * LN_2, mask=m_q)


# Warps a program where the list's blocks are smaller than the pinned tile: of 16 x 16 elements, 4 warps load two a
# thread, and 4 bytes are the least that a pipelined load takes.
_CUT_WARPS = 4
WIDE = 64  # keys a tile that have work for any number of warps
# Keys a tile at the ragged end: with 32 or more columns in the second part, those of one step of a matrix product.
# More steps need more descriptors, and ptxas 12.8 computed one from a register that nothing had written (sm_90).
_TAIL_TILE, _TAIL_TILE_OF_WIDE_REST = 32, 16


def column_split(head_size: int) -> tuple[int, int]:
    """Cuts a head into its first MAIN and its last REST columns, powers of two.

    REST is at least 16, or 0 if MAIN is the whole head. The two overlap where D is no sum of two such powers.
    """
    main = 1 << (head_size.bit_length() - 1)
    rest = head_size - main
    return main, max(16, power_of_2(rest)) if rest else 0


def launch_for(head_size: int, block_q: int, block_k: int, arch: str) -> Launch:
    """Pinned launch settings (see `tiles`), tiles cut to the list's block sizes.

    Args:
        head_size: D.
        block_q: query tokens a block of the list.
        block_k: key tokens a block of the list.
        arch: as `tiles.architecture` says.
    """
    whole = pinned("attention", "native", head_size, arch).launch
    whole_warps = whole.tile_q <= block_q and min(whole.tile_k, WIDE) <= block_k
    num_warps = whole.num_warps if whole_warps else _CUT_WARPS
    return Launch(min(whole.tile_q, block_q), min(whole.tile_k, block_k), num_warps, whole.num_stages)


def constants(
    head_size: int,
    block_q: int,
    block_k: int,
    seq_k: int,
    launch: Launch,
    *,
    ordered: bool = False,
    skips: bool = False,
) -> dict[str, object]:
    """The kernel's compile-time arguments."""
    main, rest = column_split(head_size)
    return {
        "HEAD_SIZE": head_size,
        "MAIN": main,
        "REST": rest,
        "BLOCK_Q": block_q,
        "BLOCK_K": block_k,
        "TILE_Q": launch.tile_q,
        "TILE_K": launch.tile_k,
        "TAIL_TILE": min(_TAIL_TILE if rest < 32 else _TAIL_TILE_OF_WIDE_REST, block_k),
        "RAGGED_K": seq_k % block_k != 0,
        "ORDERED": ordered,
        "SKIPS": skips,
    }


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    order: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
    pv_threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The contract of `ops.block_sparse_attention`, arguments already checked; copies tensors not `aligned`.

    k and v are in the order already, q is not.
    """
    batch, heads, seq_q, head_size = q.shape
    q, k, v = aligned(q), aligned(k), aligned(v)
    out = rearrange(torch.empty(batch, seq_q, heads, head_size, dtype=q.dtype, device=q.device), "b s h d -> b h s d")
    lse = torch.empty(batch, heads, seq_q, dtype=torch.float32, device=q.device)
    # Lists of size 1 are shared: stride 0 walks them without a copy.
    indices = indices.expand(batch, heads, -1, -1)
    counts = counts.expand(batch, heads, -1)
    launch = launch_for(head_size, block_q, block_k, architecture(q.device))
    ordered, skips = order is not None, pv_threshold is not None
    fixed = constants(head_size, block_q, block_k, k.shape[2], launch, ordered=ordered, skips=skips)
    grid = (cdiv(seq_q, launch.tile_q), heads, batch)
    with device_of(q):
        launch_kernel(
            block_sparse_forward_kernel, grid,
            q, k, v, order, out, lse, indices, counts, 0 if order is None or len(order) == 1 else order.stride(0),
            *pieces(q), *pieces(k), *pieces(v), *pieces(out), *lse.stride()[:2],
            *indices.stride(), *counts.stride(),
            seq_q, k.shape[2], scale * LOG2_E, (pv_threshold or 0.0) * LOG2_E, **fixed,
            num_warps=launch.num_warps, num_stages=launch.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
    return out, lse
