"""Triton: order, smooth, rotate and quantize q, k and v, each read once.

Names as in `attention`. Two launches: the sampled means (`sampled_means_triton`), then one pass in tiles of GROUP
tokens of q, k or v. Rows are read where the order says they lie. The arithmetic is that of `quantize`, operation by
operation (no fused multiply-add, divisions rounded to nearest): given equal means, codes without rotation are equal to
the bit; with it sums over channels run in another order, and a code may differ by 1.
"""

# Triton kernel bodies are a language of their own: their arguments carry no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="operator, index, attr-defined, no-untyped-call"

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_dit.kernels.launches import cdiv, device_of, launch_kernel, power_of_2
from sparse_dit.kernels.pieces import steps
from sparse_dit.kernels.quantize import (
    CODE_ALIGN,
    FP8_MAX,
    GROUP,
    INT8_MAX,
    LOG2_E,
    ROTATED,
    SMALLEST,
    Quantized,
    fresh_codes,
    padded,
)
from sparse_dit.kernels.sampled_means_triton import launch_means, load_signs, rotation_factors
from sparse_dit.kernels.tiles import architecture

STEPS = 4  # tiles a program


@triton.jit
def _rotated(b_x, b_signs, p_norms, ROWS: tl.constexpr, PADDED: tl.constexpr, PART: tl.constexpr, NORM: tl.constexpr):
    """[ROWS, PADDED] times the rotation, fp32: products with +-1 are exact, sums and factors fp32.

    NORM is the one factor of all columns, and then left to the caller; or 0: they have factors of their own.
    """
    b_parts = tl.reshape(b_x, [ROWS * (PADDED // PART), PART])
    b_parts = tl.dot(b_parts, b_signs, input_precision="ieee")
    if NORM == 0:
        b_parts = b_parts * tl.load(p_norms + tl.arange(0, PART))[None, :]
    return tl.reshape(b_parts, [ROWS, PADDED])


@triton.jit
def _int8(b_x, b_factor):
    # Adding 1.5 x 2^23 rounds to the nearest integer, halves to even, and leaves it in the low bits: a conversion would
    # cost eight additions.
    return (b_x * b_factor + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _tokens(p_order, o_place, seq, ORDERED: tl.constexpr):
    """Ids of the tokens at the given places of the order; behind the last place, of the last token again."""
    o_place = tl.minimum(o_place, seq - 1)
    return (tl.load(p_order + o_place) if ORDERED else o_place).to(tl.int32)  # half the registers


@triton.jit
def _tile(p_x, o_token, x_token, o_dim, x_dim, m_dim, MASKED: tl.constexpr):
    """The given tokens, zero behind the head size: [tokens, PADDED]."""
    p_tile = p_x + o_token[:, None].to(tl.int64) * x_token + o_dim[None, :] * x_dim
    return tl.load(p_tile, mask=m_dim[None, :], other=0.0) if MASKED else tl.load(p_tile)


@triton.jit
def quantize_kernel(
    p_q,
    p_k,
    p_v,
    p_order,
    p_k_mean,
    p_v_mean,
    p_signs,
    p_norms,
    p_q_codes,
    p_q_scale,
    p_lse_shift,
    p_k_codes,
    p_k_scale,
    p_v_codes,
    p_v_scale,
    q_batch,
    q_head,
    q_token,
    q_dim,
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
    seq_q,
    seq_k,
    padded_k,
    scale,
    scale_log2,
    FP8: tl.constexpr,
    ORDERED: tl.constexpr,
    ROTATE: tl.constexpr,
    PIECE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    PART: tl.constexpr,
    NORM: tl.constexpr,
    CODES: tl.constexpr,
    TOKENS: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
    INT8_TOP: tl.constexpr,
    FP8_TOP: tl.constexpr,
    LEAST: tl.constexpr,
):
    """STEPS tiles of TOKENS places of one head, in programs (i, batch and head, 0 for q, 1 for k, the others for v).

    Several tiles of q or k a program, so that signs are read once for all of them and tokens of one tile arrive while
    the last is worked on; v has a program a tile. Strides of tokens are in PIECE elements, as in `pool_triton`. Where
    all columns are multiplied by NORM, the scales are, instead.
    """
    q_token, k_token = tl.cast(q_token, tl.int64) * PIECE, tl.cast(k_token, tl.int64) * PIECE
    v_token = tl.cast(v_token, tl.int64) * PIECE
    i_bh, role = tl.program_id(1).to(tl.int64), tl.program_id(2)
    i_b, i_h = i_bh // heads, i_bh % heads
    first = tl.program_id(0).to(tl.int64) * STEPS
    o_dim = tl.arange(0, PADDED)
    m_dim = o_dim < HEAD_SIZE
    o_local = tl.arange(0, TOKENS)
    MASKED: tl.constexpr = HEAD_SIZE < PADDED
    FACTOR: tl.constexpr = NORM if ROTATE and NORM > 0 else 1.0
    if ORDERED:
        p_order += i_h * order_head
    if role == 0:
        p_q += (i_b * q_batch + i_h * q_head) * PIECE
        if ROTATE:
            b_signs = load_signs(p_signs, PART)
        o_token = _tokens(p_order, first * TOKENS + o_local, seq_q, ORDERED)
        for i_tile in tl.range(first, tl.minimum(first + STEPS, tl.cdiv(seq_q, TOKENS)), num_stages=STAGES):
            b_x = _tile(p_q, o_token, q_token, o_dim, q_dim, m_dim, MASKED)
            o_place = i_tile * TOKENS + o_local
            o_token = _tokens(p_order, o_place + TOKENS, seq_q, ORDERED)
            b_y = _rotated(b_x, b_signs, p_norms, TOKENS, PADDED, PART, NORM) if ROTATE else b_x.to(tl.float32)
            # The mean is read in each tile anew: kept, it would take a quarter of the registers.
            b_mean = tl.load(p_k_mean + i_bh * HEAD_SIZE + o_dim, mask=m_dim, other=0.0)
            b_top = tl.maximum(tl.max(tl.abs(b_y), 1) * FACTOR, LEAST)  # [TOKENS]
            m_q = o_place < seq_q
            o_row = i_bh * seq_q + o_place
            tl.store(p_lse_shift + o_row, tl.sum(b_y * b_mean[None, :], 1) * (scale * FACTOR), mask=m_q)
            tl.store(p_q_scale + o_row, tl.div_rn(b_top, INT8_TOP) * scale_log2, mask=m_q)
            b_codes = _int8(b_y, (tl.div_rn(INT8_TOP, b_top) * FACTOR)[:, None])
            m_codes = m_q[:, None] & (o_dim < CODES)[None, :]
            tl.store(p_q_codes + o_row[:, None] * CODES + o_dim[None, :], b_codes, mask=m_codes)
    elif role == 1:
        p_k += (i_b * k_batch + i_h * k_head) * PIECE
        if ROTATE:
            b_signs = load_signs(p_signs, PART)
        o_token = _tokens(p_order, first * TOKENS + o_local, seq_k, ORDERED)
        for i_tile in tl.range(first, tl.minimum(first + STEPS, padded_k // TOKENS), num_stages=STAGES):
            b_x = _tile(p_k, o_token, k_token, o_dim, k_dim, m_dim, MASKED)
            o_place = i_tile * TOKENS + o_local
            o_token = _tokens(p_order, o_place + TOKENS, seq_k, ORDERED)
            b_y = _rotated(b_x, b_signs, p_norms, TOKENS, PADDED, PART, NORM) if ROTATE else b_x.to(tl.float32)
            b_mean = tl.load(p_k_mean + i_bh * HEAD_SIZE + o_dim, mask=m_dim, other=0.0) * (1.0 / FACTOR)
            b_y = b_y - b_mean[None, :]
            top = tl.maximum(tl.max(tl.abs(b_y)) * FACTOR, LEAST)
            tl.store(p_k_scale + i_bh * (padded_k // TOKENS) + i_tile, tl.div_rn(top, INT8_TOP))
            o_codes = (i_bh * padded_k + o_place[:, None]) * CODES + o_dim[None, :]
            # Behind the end lies the last token again: it moves no maximum, and its codes are made zeros.
            b_factor = tl.where(o_place < seq_k, tl.div_rn(INT8_TOP, top) * FACTOR, 0.0)
            b_codes = _int8(b_y, b_factor[:, None])
            tl.store(p_k_codes + o_codes, b_codes, mask=(o_dim < CODES)[None, :])
    else:
        p_v += (i_b * v_batch + i_h * v_head) * PIECE
        i_tile = first + role - 2
        o_place = i_tile * TOKENS + o_local
        if i_tile < padded_k // TOKENS:
            if FP8:
                # Row 4 t + 2 i + e of 16 takes token 8 i + 2 t + e, see Quantized.
                o_16 = o_local % 16
                o_place = o_place - o_16 + o_16 // 2 % 2 * 8 + o_16 // 4 * 2 + o_16 % 2
            o_token = _tokens(p_order, o_place, seq_k, ORDERED)
            b_x = _tile(p_v, o_token, v_token, o_dim, v_dim, m_dim, MASKED)
            if FP8:
                b_mean = tl.load(p_v_mean + i_bh * HEAD_SIZE + o_dim, mask=m_dim, other=0.0)
                b_y = b_x.to(tl.float32) - b_mean[None, :]
                top = tl.maximum(tl.max(tl.abs(b_y)), LEAST)
                tl.store(p_v_scale + i_bh * (padded_k // TOKENS) + i_tile, tl.div_rn(top, FP8_TOP))
                b_factor = tl.where(o_place < seq_k, tl.div_rn(FP8_TOP, top), 0.0)
                b_codes = (b_y * b_factor[:, None]).to(p_v_codes.dtype.element_ty)
                o_codes = (i_bh * HEAD_SIZE + o_dim[:, None]) * padded_k + i_tile * TOKENS + o_local[None, :]
                tl.store(p_v_codes + o_codes, tl.trans(b_codes), mask=m_dim[:, None])
            else:
                o_row = (i_bh * seq_k + o_place)[:, None]
                m_x = (o_place < seq_k)[:, None] & m_dim[None, :]
                tl.store(p_v_codes + o_row * HEAD_SIZE + o_dim[None, :], b_x, mask=m_x)


def launch_options(head_size: int, arch: str) -> dict[str, Any]:
    """How `quantize_kernel` is launched: a tile of GROUP tokens stays in registers, on sm_90 two tiles side by side."""
    num_warps = 8 if head_size in (64, 128) else 16  # the factors of columns take registers, too
    return {"num_warps": num_warps, "maxnreg": 128} if arch == "sm_90" else {"num_warps": num_warps}


def constants(precision: str, head_size: int, ordered: bool, rotate: bool, piece: int) -> dict[str, Any]:
    """The compile-time arguments of `quantize_kernel`."""
    width = power_of_2(head_size)
    return {
        "FP8": precision == "int8_fp8",
        "ORDERED": ordered,
        "ROTATE": rotate,
        "PIECE": piece,
        "HEAD_SIZE": head_size,
        "PADDED": width,
        "PART": min(width, ROTATED),
        "NORM": min(width, ROTATED) ** -0.5 if width == head_size else 0.0,
        "CODES": padded(head_size, CODE_ALIGN),
        "TOKENS": GROUP,
        "STEPS": STEPS,
        # Whole rows of whole pieces go from memory to the matrix units without a stop in registers. The ids of an order
        # take the shared memory that two programs a multiprocessor would then lack.
        "STAGES": 2 if rotate and not ordered and width == head_size <= ROTATED and piece > 1 else 1,
        "INT8_TOP": INT8_MAX,
        "FP8_TOP": FP8_MAX,
        "LEAST": SMALLEST,
    }


@lru_cache
def _settings(
    precision: str, head_size: int, ordered: bool, rotate: bool, piece: int, device: torch.device
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`constants` and `launch_options` of a call, which does not change them."""
    fixed = constants(precision, head_size, ordered, rotate, piece)
    return fixed, launch_options(head_size, architecture(device))


def triton_quantize(
    q: Tensor, k: Tensor, v: Tensor, precision: str, scale: float, order: Tensor | None, rotate: bool
) -> Quantized:
    """The contract of `quantize.quantize`, arguments already checked."""
    batch, heads, seq_q, head_size = q.shape
    seq_k, padded_k = k.shape[2], padded(k.shape[2], GROUP)
    piece, strides = steps(q, k, v)
    fixed, options = _settings(precision, head_size, order is not None, rotate, piece, q.device)
    codes = fresh_codes(q, k, v, precision, order is not None)
    factors = rotation_factors(head_size, q.dtype, q.device) if rotate else (None, None)
    with device_of(q):
        k_mean = launch_means(k, v, codes.v_mean, factors, fixed["NORM"])
        tiles = max(cdiv(seq_q, GROUP), padded_k // GROUP)
        grid = (cdiv(tiles, STEPS), batch * heads, 2 if codes.v is v else 2 + STEPS)
        launch_kernel(
            quantize_kernel, grid,
            q, k, v, order, k_mean, codes.v_mean, *factors,
            codes.q, codes.q_scale, codes.lse_shift, codes.k, codes.k_scale, codes.v, codes.v_scale,
            *strides,
            0 if order is None or len(order) == 1 else order.stride(0),
            heads, seq_q, seq_k, padded_k, scale, scale * LOG2_E,
            **fixed, **options, enable_fp_fusion=False,
        )  # fmt: skip
    return codes
