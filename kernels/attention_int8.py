"""Triton: attention along a block list on quantized q and k, with v in 16 bits or in E4M3.

Names as in `attention`. What the codes mean is told by `quantize.Quantized`. Programs, lists and the ragged end go as
in the 16-bit kernel; different are

- the scores: integers, exact, turned into fp32 by one factor a row and tile, so that their maximum is taken over
  integers and each costs one conversion and one multiply-add;
- FP8 weights: multiplied by 2^8 in the exponent, for E4M3 ends at 448. Each tile's product with V is finished by
  itself and then added in fp32 with V's scale, because the FP8 matrix units keep fewer bits in their sums;
- the order of FP8 weights within 16 keys, see `_pair_up`;
- the end: rows go straight to the tokens they belong to, so that an order costs no pass over the output.
"""

# Triton kernel bodies are a language of their own: their arguments carry no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="operator, index, attr-defined, no-untyped-call"

import torch
import triton
import triton.language as tl
from einops import rearrange
from torch import Tensor

from sparse_dit.kernels.attention import LOG2_E, WIDE, any_within, column_split, weighted
from sparse_dit.kernels.launches import cdiv, device_of, launch_kernel
from sparse_dit.kernels.pieces import aligned, pieces
from sparse_dit.kernels.quantize import CODE_ALIGN, GROUP, Quantized, padded
from sparse_dit.kernels.tiles import Launch, architecture, pinned


@triton.jit
def _pair_up(b_p, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Puts the columns of weights [ROWS, COLUMNS] into the token order of FP8 values.

    Of 16 columns, a thread holds {2t, 2t+1, 8+2t, 9+2t} of the QK product, and must hold {4t .. 4t+3} as the operand of
    the next: renaming columns makes the two one and the same, and no register moves between threads.
    """
    b_p = tl.reshape(b_p, [ROWS, COLUMNS // 16, 2, 4, 2])
    return tl.reshape(tl.permute(b_p, (0, 1, 3, 2, 4)), [ROWS, COLUMNS])


@triton.jit
def _attend_tiles(
    b_q,
    b_q_rest,
    b_q_scale,
    b_acc,
    b_acc_rest,
    b_max,
    b_sum,
    first,
    last,
    p_indices,
    p_k,
    p_k_scale,
    p_v,
    p_v_scale,
    v_row,
    i_index,
    seq_k,
    pv_threshold,
    FP8: tl.constexpr,
    SKIPS: tl.constexpr,
    MASKED: tl.constexpr,
    STAGES: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    CODES: tl.constexpr,
    CODES_MAIN: tl.constexpr,
    CODES_REST: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    SCALE_GROUP: tl.constexpr,
):
    """Online softmax over tiles [first, last) of the listed blocks, TILE_K keys each.

    max' = max(max, rowmax(s)), sum' = sum 2^(max - max') + rowsum(2^(s - max')), acc' likewise with V, where
    s = q_scale k_scale (codes of q . codes of k). SKIPS as in `attention`.
    """
    o_tile = tl.arange(0, TILE_K).to(tl.int64)  # [TILE_K]
    o_main = tl.arange(0, MAIN)
    o_rest = HEAD_SIZE - REST + tl.arange(0, REST if REST > 0 else 16)
    o_k = o_tile[:, None] * CODES + tl.arange(0, CODES_MAIN)[None, :]  # [TILE_K, CODES_MAIN]
    # The list is read one tile ahead: loads of K and V then wait for no other load, and stay in flight for all stages.
    block = tl.load(p_indices + (first * TILE_K // BLOCK_K) * i_index, mask=first < last, other=0)
    for i_tile in tl.range(first, last, num_stages=STAGES):
        start = tl.multiple_of(block.to(tl.int64) * BLOCK_K + i_tile * TILE_K % BLOCK_K, TILE_K)
        ahead = tl.minimum(i_tile + 1, last - 1)
        block = tl.load(p_indices + (ahead * TILE_K // BLOCK_K) * i_index)
        p_k_tile = p_k + start * CODES
        p_v_tile = p_v + start if FP8 else p_v + start * v_row
        m_token = start + o_tile < seq_k  # [TILE_K]
        k_scale = tl.load(p_k_scale + start // SCALE_GROUP)
        if FP8:
            v_scale = tl.load(p_v_scale + start // SCALE_GROUP)
        b_s = tl.dot(b_q, tl.trans(tl.load(p_k_tile + o_k)), out_dtype=tl.int32)  # [TILE_Q, TILE_K]
        if CODES_REST > 0:
            o_k_rest = o_tile[:, None] * CODES + CODES_MAIN + tl.arange(0, CODES_REST)[None, :]
            b_s = tl.dot(b_q_rest, tl.trans(tl.load(p_k_tile + o_k_rest)), b_s, out_dtype=tl.int32)
        if MASKED:
            b_s = tl.where(m_token[None, :], b_s, -(2**30))
        b_factor = b_q_scale * k_scale  # [TILE_Q]
        b_tile_max = tl.max(b_s, 1).to(tl.float32) * b_factor  # [TILE_Q]
        b_new_max = tl.maximum(b_max, b_tile_max)
        taken = any_within(b_tile_max, b_new_max, pv_threshold, SKIPS)
        b_zero = b_new_max - 8.0 if FP8 else b_new_max
        b_p = tl.exp2(b_s.to(tl.float32) * b_factor[:, None] - b_zero[:, None])
        if MASKED:
            b_p = tl.where(m_token[None, :], b_p, 0.0)
        b_decay = tl.exp2(b_max - b_new_max)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_max = b_new_max
        b_acc = b_acc * b_decay[:, None]
        if REST > 0:
            b_acc_rest = b_acc_rest * b_decay[:, None]
        if FP8:
            b_p8 = _pair_up(b_p.to(p_v.dtype.element_ty), TILE_Q, TILE_K)
            b_v = tl.load(p_v_tile + o_main[:, None] * v_row + o_tile[None, :])  # [MAIN, TILE_K]
            b_v_rest = b_v
            if REST > 0:
                b_v_rest = tl.load(p_v_tile + o_rest[:, None] * v_row + o_tile[None, :])
            b_acc, b_acc_rest = _weighted_fp8(
                b_acc, b_acc_rest, b_p8, b_v, b_v_rest, v_scale, taken, SKIPS, REST, TILE_K
            )
        else:
            p_v_main = p_v_tile + o_tile[:, None] * v_row + o_main[None, :]  # [TILE_K, MAIN]
            b_v = tl.load(p_v_main, mask=m_token[:, None], other=0.0) if MASKED else tl.load(p_v_main)
            b_v_rest = b_v
            if REST > 0:
                p_v_rest = p_v_tile + o_tile[:, None] * v_row + o_rest[None, :]  # [TILE_K, REST]
                b_v_rest = tl.load(p_v_rest, mask=m_token[:, None], other=0.0) if MASKED else tl.load(p_v_rest)
            b_acc, b_acc_rest = weighted(b_acc, b_acc_rest, b_p.to(b_v.dtype), b_v, b_v_rest, taken, SKIPS, REST)
    return b_acc, b_acc_rest, b_max, b_sum


@triton.jit
def _weighted_fp8(
    b_acc, b_acc_rest, b_p, b_v, b_v_rest, v_scale, taken,
    SKIPS: tl.constexpr, REST: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """acc + scale p v^T of a tile that is taken, in both parts."""
    if SKIPS:
        if taken:
            b_acc += _fp8_dot(b_p, tl.trans(b_v), TILE_K) * v_scale
            if REST > 0:
                b_acc_rest += _fp8_dot(b_p, tl.trans(b_v_rest), TILE_K) * v_scale
    else:
        b_acc += _fp8_dot(b_p, tl.trans(b_v), TILE_K) * v_scale
        if REST > 0:
            b_acc_rest += _fp8_dot(b_p, tl.trans(b_v_rest), TILE_K) * v_scale
    return b_acc, b_acc_rest


@triton.jit
def _fp8_dot(b_p, b_v, TILE_K: tl.constexpr):
    # FP8 matrix instructions take no fewer than 32 columns. An early return in place of the choice would
    # leave the other product to be compiled, and refused.
    return tl.dot(b_p.to(tl.float16), b_v.to(tl.float16)) if TILE_K < 32 else tl.dot(b_p, b_v)


@triton.jit
def int8_forward_kernel(
    p_q,
    p_q_scale,
    p_lse_shift,
    p_k,
    p_k_scale,
    p_v,
    p_v_scale,
    p_v_mean,
    p_order,
    p_out,
    p_lse,
    p_indices,
    p_counts,
    v_batch,
    v_head,
    v_row,
    order_head,
    out_batch,
    out_head,
    out_token,
    i_batch,
    i_head,
    i_row,
    i_index,
    c_batch,
    c_head,
    c_row,
    seq_q,
    seq_k,
    padded_k,
    pv_threshold,
    FP8: tl.constexpr,
    ORDERED: tl.constexpr,
    SKIPS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    CODES: tl.constexpr,
    CODES_MAIN: tl.constexpr,
    CODES_REST: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    TAIL_TILE: tl.constexpr,
    SCALE_GROUP: tl.constexpr,
    RAGGED_K: tl.constexpr,
):
    """out_i = sum_j 2^(s_ij - l_i) v_j, l_i = log2 sum_j 2^s_ij, lse_i = ln 2 l_i + lse_shift_i, j over the lists.

    One program computes TILE_Q queries of one head. Codes come in CODES_MAIN + CODES_REST columns, v and out in their
    first MAIN and last REST ones; where the two overlap, out's second part is not stored. A row of v is a token, of FP8
    values a channel; strides of v and out are in pieces of 16 bytes (see `attention` for both).
    """
    V_PIECE: tl.constexpr = 128 // p_v.dtype.element_ty.primitive_bitwidth
    OUT_PIECE: tl.constexpr = 128 // p_out.dtype.element_ty.primitive_bitwidth
    v_row, out_token = tl.cast(v_row, tl.int64) * V_PIECE, tl.cast(out_token, tl.int64) * OUT_PIECE
    i_tile, i_h, i_b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i_block = i_tile // (BLOCK_Q // TILE_Q)
    i_bh = i_b * tl.num_programs(1) + i_h
    o_q = i_tile * TILE_Q + tl.arange(0, TILE_Q)  # [TILE_Q]
    o_main = tl.arange(0, MAIN)
    REST_PADDED: tl.constexpr = REST if REST > 0 else 16
    o_rest = HEAD_SIZE - REST_PADDED + tl.arange(0, REST_PADDED)
    m_q = o_q < seq_q
    o_row = tl.minimum(o_q, seq_q - 1)  # behind the end the last row again, see `attention`

    p_k += i_bh * padded_k * CODES
    p_k_scale += i_bh * (padded_k // SCALE_GROUP)
    p_v += (i_b * v_batch + i_h * v_head) * V_PIECE
    if FP8:
        p_v_scale += i_bh * (padded_k // SCALE_GROUP)
    p_out += (i_b * out_batch + i_h * out_head) * OUT_PIECE
    p_indices += i_b * i_batch + i_h * i_head + i_block * i_row
    count = tl.load(p_counts + i_b * c_batch + i_h * c_head + i_block * c_row)

    p_q_row = p_q + (i_bh * seq_q + o_row[:, None]) * CODES
    b_q = tl.load(p_q_row + tl.arange(0, CODES_MAIN)[None, :])  # [TILE_Q, CODES_MAIN]
    b_q_rest = b_q
    if CODES_REST > 0:
        b_q_rest = tl.load(p_q_row + CODES_MAIN + tl.arange(0, CODES_REST)[None, :])
    b_q_scale = tl.load(p_q_scale + i_bh * seq_q + o_row)  # [TILE_Q]
    b_acc = tl.zeros([TILE_Q, MAIN], tl.float32)
    b_acc_rest = tl.zeros([TILE_Q, REST_PADDED], tl.float32)
    b_max = tl.full([TILE_Q], -float("inf"), tl.float32)
    b_sum = tl.zeros([TILE_Q], tl.float32)

    # Rows ascend: only the last entry can be the block at the ragged end, and only that one pays for masks.
    whole = count
    if RAGGED_K:
        ends_ragged = tl.load(p_indices + (count - 1) * i_index) == seq_k // BLOCK_K
        whole = tl.where(ends_ragged, count - 1, count)
    b_acc, b_acc_rest, b_max, b_sum = _attend_tiles(
        b_q, b_q_rest, b_q_scale, b_acc, b_acc_rest, b_max, b_sum, 0, whole * (BLOCK_K // TILE_K),
        p_indices, p_k, p_k_scale, p_v, p_v_scale, v_row, i_index, seq_k, pv_threshold,
        FP8=FP8, SKIPS=SKIPS, MASKED=False, STAGES=None,
        HEAD_SIZE=HEAD_SIZE, CODES=CODES, CODES_MAIN=CODES_MAIN, CODES_REST=CODES_REST, MAIN=MAIN, REST=REST,
        BLOCK_K=BLOCK_K, TILE_Q=TILE_Q, TILE_K=TILE_K, SCALE_GROUP=SCALE_GROUP,
    )  # fmt: skip
    if RAGGED_K:
        first = whole * (BLOCK_K // TAIL_TILE)
        last = tl.where(ends_ragged, first + tl.cdiv(seq_k % BLOCK_K, TAIL_TILE), first)
        b_acc, b_acc_rest, b_max, b_sum = _attend_tiles(
            b_q, b_q_rest, b_q_scale, b_acc, b_acc_rest, b_max, b_sum, first, last,
            p_indices, p_k, p_k_scale, p_v, p_v_scale, v_row, i_index, seq_k, pv_threshold,
            FP8=FP8, SKIPS=SKIPS, MASKED=True, STAGES=1,
            HEAD_SIZE=HEAD_SIZE, CODES=CODES, CODES_MAIN=CODES_MAIN, CODES_REST=CODES_REST, MAIN=MAIN, REST=REST,
            BLOCK_K=BLOCK_K, TILE_Q=TILE_Q, TILE_K=TAIL_TILE, SCALE_GROUP=SCALE_GROUP,
        )  # fmt: skip

    o_out = tl.load(p_order + i_h * order_head + o_row) if ORDERED else o_row  # [TILE_Q]
    p_out_row = p_out + o_out[:, None] * out_token
    b_out = b_acc / b_sum[:, None]
    if FP8:
        b_out += tl.load(p_v_mean + i_bh * HEAD_SIZE + o_main)[None, :]
    tl.store(p_out_row + o_main[None, :], b_out.to(p_out.dtype.element_ty), mask=m_q[:, None])
    if REST > 0:
        b_out_rest = b_acc_rest / b_sum[:, None]
        if FP8:
            b_out_rest += tl.load(p_v_mean + i_bh * HEAD_SIZE + o_rest)[None, :]
        m_out_rest = m_q[:, None] & (o_rest >= MAIN)[None, :]
        tl.store(p_out_row + o_rest[None, :], b_out_rest.to(p_out.dtype.element_ty), mask=m_out_rest)
    LN_2: tl.constexpr = 0.6931471805599453
    b_lse = (b_max + tl.log2(b_sum) - (8.0 if FP8 else 0.0)) * LN_2
    b_lse += tl.load(p_lse_shift + i_bh * seq_q + o_row)
    tl.store(p_lse + i_bh * seq_q + o_out, b_lse, mask=m_q)


# Warps a program where the list's blocks are smaller than the pinned tile (see `attention`).
_CUT_WARPS = 4
# Keys a tile at the ragged end.
_TAIL_TILE = 32


def launch_for(precision: str, head_size: int, block_q: int, block_k: int, arch: str) -> Launch:
    """Pinned launch settings (see `tiles`), tiles cut to the list's block sizes.

    Args:
        precision: "int8" or "int8_fp8".
        head_size: D.
        block_q: query tokens a block of the list.
        block_k: key tokens a block of the list.
        arch: as `tiles.architecture` says.
    """
    whole = pinned("attention_int8", precision, head_size, arch).launch
    whole_warps = whole.tile_q <= block_q and min(whole.tile_k, WIDE) <= block_k
    num_warps = whole.num_warps if whole_warps else _CUT_WARPS
    # 16 x 16 FP8 values are 2 bytes a thread, less than a pipelined load takes.
    num_stages = 1 if precision == "int8_fp8" and block_k < 32 else whole.num_stages
    return Launch(min(whole.tile_q, block_q), min(whole.tile_k, block_k), num_warps, num_stages)


def constants(
    precision: str,
    head_size: int,
    block_q: int,
    block_k: int,
    seq_k: int,
    ordered: bool,
    launch: Launch,
    *,
    skips: bool = False,
) -> dict[str, object]:
    """The kernel's compile-time arguments."""
    main, rest = column_split(head_size)
    codes = padded(head_size, CODE_ALIGN)
    codes_main, codes_rest = column_split(codes)
    return {
        "FP8": precision == "int8_fp8",
        "ORDERED": ordered,
        "HEAD_SIZE": head_size,
        "CODES": codes,
        "CODES_MAIN": codes_main,
        "CODES_REST": codes_rest,
        "MAIN": main,
        "REST": rest,
        "BLOCK_Q": block_q,
        "BLOCK_K": block_k,
        "TILE_Q": launch.tile_q,
        "TILE_K": launch.tile_k,
        "TAIL_TILE": min(_TAIL_TILE, block_k),
        "SCALE_GROUP": GROUP,
        "RAGGED_K": seq_k % block_k != 0,
        "SKIPS": skips,
    }


def triton_quantized_attention(
    codes: Quantized,
    indices: Tensor,
    counts: Tensor,
    order: Tensor | None,
    block_q: int,
    block_k: int,
    dtype: torch.dtype,
    pv_threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The contract of `ops.block_sparse_attention` on codes made with the same order, arguments already checked.

    16-bit values that are not `aligned` are copied.

    Returns:
        out [B, H, Sq, D] in `dtype` and lse, both in the tokens' own order.
    """
    batch, heads, seq_q = codes.q_scale.shape
    out = torch.empty(batch, seq_q, heads, codes.head_size, dtype=dtype, device=codes.q.device)
    out = rearrange(out, "b s h d -> b h s d")
    lse = torch.empty(batch, heads, seq_q, dtype=torch.float32, device=codes.q.device)
    indices = indices.expand(batch, heads, -1, -1)
    counts = counts.expand(batch, heads, -1)
    precision = "int8" if codes.v_scale is None else "int8_fp8"
    v = aligned(codes.v)
    launch = launch_for(precision, codes.head_size, block_q, block_k, architecture(codes.q.device))
    ordered, skips = order is not None, pv_threshold is not None
    fixed = constants(precision, codes.head_size, block_q, block_k, codes.seq_k, ordered, launch, skips=skips)
    grid = (cdiv(seq_q, launch.tile_q), heads, batch)
    with device_of(codes.q):
        launch_kernel(
            int8_forward_kernel, grid,
            codes.q, codes.q_scale, codes.lse_shift, codes.k, codes.k_scale, v, codes.v_scale, codes.v_mean,
            order, out, lse, indices, counts,
            *pieces(v), 0 if order is None or len(order) == 1 else order.stride(0),
            *pieces(out), *indices.stride(), *counts.stride(),
            seq_q, codes.seq_k, codes.k.shape[2], (pv_threshold or 0.0) * LOG2_E, **fixed,
            num_warps=launch.num_warps, num_stages=launch.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
    return out, lse
