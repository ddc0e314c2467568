"""Triton: order, smooth, rotate and quantize q, k and v, each read once.

Names as in `attention`. Two launches: the sampled means, a few hundred rows a head, then one program for each GROUP
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

from sparse_dit.kernels.quantize import (
    CODE_ALIGN,
    FP8_MAX,
    GROUP,
    INT8_MAX,
    LOG2_E,
    ROTATED,
    SAMPLE,
    SMALLEST,
    Quantized,
    padded,
    rotation,
)


@triton.jit
def _rotated(b_x, p_signs, p_norms, ROWS: tl.constexpr, PADDED: tl.constexpr, PART: tl.constexpr, NORM: tl.constexpr):
    """[ROWS, PADDED] times the rotation, fp32: products with +-1 are exact, sums and factors fp32.

    NORM is the one factor of all columns, or 0: they have factors of their own, which cost registers.
    """
    o_part = tl.arange(0, PART)
    b_signs = tl.load(p_signs + o_part[:, None] * PART + o_part[None, :])  # [PART, PART]
    b_parts = tl.reshape(b_x, [ROWS * (PADDED // PART), PART])
    b_parts = tl.dot(b_parts, b_signs, input_precision="ieee")
    b_parts = b_parts * NORM if NORM > 0 else b_parts * tl.load(p_norms + o_part)[None, :]
    return tl.reshape(b_parts, [ROWS, PADDED])


@triton.jit
def _int8(b_x, b_factor):
    # Adding and taking away 1.5 x 2^23 rounds to the nearest integer, halves to even.
    return ((b_x * b_factor + 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit
def _sampled_mean(p_x, x_token, x_dim, o_dim, m_dim, seq, taken, STEP: tl.constexpr):
    b_sum = tl.zeros_like(m_dim).to(tl.float32)
    for first in range(0, taken, STEP):
        o_sample = first + tl.arange(0, STEP)
        p_row = p_x + (o_sample.to(tl.int64) * seq // taken)[:, None] * x_token
        m_x = (o_sample < taken)[:, None] & m_dim[None, :]
        b_x = tl.load(p_row + o_dim[None, :] * x_dim, mask=m_x, other=0.0)
        b_sum += tl.sum(b_x.to(tl.float32), 0)
    return tl.div_rn(b_sum, tl.zeros_like(b_sum) + taken)


@triton.jit
def sampled_means_kernel(
    p_k,
    p_v,
    p_signs,
    p_norms,
    p_k_mean,
    p_v_mean,
    k_batch,
    k_head,
    k_token,
    k_dim,
    v_batch,
    v_head,
    v_token,
    v_dim,
    seq,
    taken,
    FP8: tl.constexpr,
    ROTATE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    PART: tl.constexpr,
    NORM: tl.constexpr,
    STEP: tl.constexpr,
):
    """Means over `taken` tokens at equal distances: of k, rotated, in programs (h, b, 0), of v in (h, b, 1)."""
    i_h, i_b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_dim = tl.arange(0, PADDED)
    m_dim = o_dim < HEAD_SIZE
    o_mean = (i_b * tl.num_programs(0) + i_h) * HEAD_SIZE + o_dim
    if tl.program_id(2) == 0:
        p_k += i_b * k_batch + i_h * k_head
        b_mean = _sampled_mean(p_k, k_token, k_dim, o_dim, m_dim, seq, taken, STEP)
        if ROTATE:
            o_part = tl.arange(0, PART)
            b_signs = tl.load(p_signs + o_part[:, None] * PART + o_part[None, :]).to(tl.float32)
            b_parts = tl.sum(tl.reshape(b_mean, [PADDED // PART, PART])[:, :, None] * b_signs[None], 1)
            b_parts = b_parts * NORM if NORM > 0 else b_parts * tl.load(p_norms + o_part)[None, :]
            b_mean = tl.reshape(b_parts, [PADDED])
        tl.store(p_k_mean + o_mean, b_mean, mask=m_dim)
    elif FP8:
        p_v += i_b * v_batch + i_h * v_head
        b_mean = _sampled_mean(p_v, v_token, v_dim, o_dim, m_dim, seq, taken, STEP)
        tl.store(p_v_mean + o_mean, b_mean, mask=m_dim)


@triton.jit
def _tile(
    p_x, p_order, i_b, i_h, x_batch, x_head, x_token, x_dim, order_head, o_place, o_dim, m_dim, seq,
    ORDERED: tl.constexpr,
):  # fmt: skip
    """Tokens at the given places of the order, zero behind the last: [places, PADDED]."""
    m_place = o_place < seq
    o_token = o_place
    if ORDERED:
        o_token = tl.load(p_order + i_h * order_head + o_place, mask=m_place, other=0)
    p_row = p_x + i_b * x_batch + i_h * x_head + o_token[:, None] * x_token
    return tl.load(p_row + o_dim[None, :] * x_dim, mask=m_place[:, None] & m_dim[None, :], other=0.0)


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
    HEAD_SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    PART: tl.constexpr,
    NORM: tl.constexpr,
    CODES: tl.constexpr,
    TOKENS: tl.constexpr,
    INT8_TOP: tl.constexpr,
    FP8_TOP: tl.constexpr,
    LEAST: tl.constexpr,
):
    """Places [TOKENS i, TOKENS (i + 1)) of one head, in programs (i, batch and head, 0 for q, 1 for k, 2 for v)."""
    i_tile, i_bh, role = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    i_b, i_h = i_bh // heads, i_bh % heads
    o_dim = tl.arange(0, PADDED)
    m_dim = o_dim < HEAD_SIZE
    o_local = tl.arange(0, TOKENS)
    o_place = i_tile * TOKENS + o_local
    if role == 0:
        if i_tile * TOKENS < seq_q:
            b_x = _tile(
                p_q, p_order, i_b, i_h, q_batch, q_head, q_token, q_dim, order_head, o_place, o_dim, m_dim, seq_q,
                ORDERED,
            )  # fmt: skip
            b_y = _rotated(b_x, p_signs, p_norms, TOKENS, PADDED, PART, NORM) if ROTATE else b_x.to(tl.float32)
            b_mean = tl.load(p_k_mean + i_bh * HEAD_SIZE + o_dim, mask=m_dim, other=0.0)
            b_top = tl.maximum(tl.max(tl.abs(b_y), 1), LEAST)  # [TOKENS]
            m_q = o_place < seq_q
            o_row = i_bh * seq_q + o_place
            tl.store(p_lse_shift + o_row, tl.sum(b_y * b_mean[None, :], 1) * scale, mask=m_q)
            tl.store(p_q_scale + o_row, tl.div_rn(b_top, INT8_TOP) * scale_log2, mask=m_q)
            b_codes = _int8(b_y, tl.div_rn(INT8_TOP, b_top)[:, None])
            m_codes = m_q[:, None] & (o_dim < CODES)[None, :]
            tl.store(p_q_codes + o_row[:, None] * CODES + o_dim[None, :], b_codes, mask=m_codes)
    elif role == 1:
        if i_tile * TOKENS < padded_k:
            b_x = _tile(
                p_k, p_order, i_b, i_h, k_batch, k_head, k_token, k_dim, order_head, o_place, o_dim, m_dim, seq_k,
                ORDERED,
            )  # fmt: skip
            b_y = _rotated(b_x, p_signs, p_norms, TOKENS, PADDED, PART, NORM) if ROTATE else b_x.to(tl.float32)
            b_mean = tl.load(p_k_mean + i_bh * HEAD_SIZE + o_dim, mask=m_dim, other=0.0)
            b_y = tl.where((o_place < seq_k)[:, None], b_y - b_mean[None, :], 0.0)
            top = tl.maximum(tl.max(tl.abs(b_y)), LEAST)
            tl.store(p_k_scale + i_bh * (padded_k // TOKENS) + i_tile, tl.div_rn(top, INT8_TOP))
            o_codes = (i_bh * padded_k + o_place[:, None]) * CODES + o_dim[None, :]
            tl.store(p_k_codes + o_codes, _int8(b_y, tl.div_rn(INT8_TOP, top)), mask=(o_dim < CODES)[None, :])
    elif FP8:
        if i_tile * TOKENS < padded_k:
            # Row 4 t + 2 i + e of 16 takes token 8 i + 2 t + e, see Quantized.
            o_16 = o_local % 16
            o_place = o_place - o_16 + o_16 // 2 % 2 * 8 + o_16 // 4 * 2 + o_16 % 2
            b_x = _tile(
                p_v, p_order, i_b, i_h, v_batch, v_head, v_token, v_dim, order_head, o_place, o_dim, m_dim, seq_k,
                ORDERED,
            )  # fmt: skip
            b_mean = tl.load(p_v_mean + i_bh * HEAD_SIZE + o_dim, mask=m_dim, other=0.0)
            b_y = tl.where((o_place < seq_k)[:, None], b_x.to(tl.float32) - b_mean[None, :], 0.0)
            top = tl.maximum(tl.max(tl.abs(b_y)), LEAST)
            tl.store(p_v_scale + i_bh * (padded_k // TOKENS) + i_tile, tl.div_rn(top, FP8_TOP))
            b_codes = (b_y * tl.div_rn(FP8_TOP, top)).to(p_v_codes.dtype.element_ty)
            o_codes = (i_bh * HEAD_SIZE + o_dim[:, None]) * padded_k + i_tile * TOKENS + o_local[None, :]
            tl.store(p_v_codes + o_codes, tl.trans(b_codes), mask=m_dim[:, None])
    else:
        if i_tile * TOKENS < seq_k:
            b_x = _tile(
                p_v, p_order, i_b, i_h, v_batch, v_head, v_token, v_dim, order_head, o_place, o_dim, m_dim, seq_k,
                ORDERED,
            )  # fmt: skip
            o_row = (i_bh * seq_k + o_place)[:, None]
            m_x = (o_place < seq_k)[:, None] & m_dim[None, :]
            tl.store(p_v_codes + o_row * HEAD_SIZE + o_dim[None, :], b_x, mask=m_x)


def launch_warps(head_size: int) -> int:
    """Warps a program of `quantize_kernel`: a tile of GROUP tokens stays in registers."""
    return 8 if head_size <= 128 else 16


def constants(precision: str, head_size: int, ordered: bool, rotate: bool) -> dict[str, Any]:
    """The compile-time arguments of `quantize_kernel`."""
    width = triton.next_power_of_2(head_size)
    return {
        "FP8": precision == "int8_fp8",
        "ORDERED": ordered,
        "ROTATE": rotate,
        "HEAD_SIZE": head_size,
        "PADDED": width,
        "PART": min(width, ROTATED),
        "NORM": min(width, ROTATED) ** -0.5 if width == head_size else 0.0,
        "CODES": padded(head_size, CODE_ALIGN),
        "TOKENS": GROUP,
        "INT8_TOP": INT8_MAX,
        "FP8_TOP": FP8_MAX,
        "LEAST": SMALLEST,
    }


def means_constants(fixed: dict[str, Any]) -> dict[str, Any]:
    """Those of `sampled_means_kernel`, from `constants`."""
    return {name: fixed[name] for name in ("FP8", "ROTATE", "HEAD_SIZE", "PADDED", "PART", "NORM")} | {"STEP": 64}


@lru_cache
def _rotation_factors(head_size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The rotation of the first min(D, ROTATED) channels: signs [PART, PART] and fp32 factors [PART], zero behind D."""
    width = min(triton.next_power_of_2(head_size), ROTATED)
    matrix = torch.zeros(width, width)
    size = min(head_size, ROTATED)
    matrix[:size, :size] = rotation(size)
    return matrix.sign().to(device, dtype), matrix.abs().amax(dim=0).to(device)


def triton_quantize(
    q: Tensor, k: Tensor, v: Tensor, precision: str, scale: float, order: Tensor | None, rotate: bool
) -> Quantized:
    """The contract of `quantize.quantize`, arguments already checked."""
    batch, heads, seq_q, head_size = q.shape
    seq_k, padded_k = k.shape[2], padded(k.shape[2], GROUP)
    fp8 = precision == "int8_fp8"
    fixed = constants(precision, head_size, order is not None, rotate)

    def fresh(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(batch, heads, *shape, dtype=dtype, device=q.device)

    k_mean, v_mean = fresh(head_size), fresh(head_size) if fp8 else None
    q_codes, q_scale = fresh(seq_q, fixed["CODES"], dtype=torch.int8), fresh(seq_q)
    lse_shift = fresh(seq_q)
    k_codes, k_scale = fresh(padded_k, fixed["CODES"], dtype=torch.int8), fresh(padded_k // GROUP)
    v_codes, v_scale = v, None
    if fp8:
        v_codes = fresh(head_size, padded_k, dtype=torch.float8_e4m3fn)
        v_scale = fresh(padded_k // GROUP)
    elif order is not None:
        v_codes = fresh(seq_k, head_size, dtype=v.dtype)
    signs, norms = _rotation_factors(head_size, q.dtype, q.device) if rotate else (None, None)
    with torch.cuda.device_of(q):
        sampled_means_kernel[heads, batch, 1 + fp8](
            k, v, signs, norms, k_mean, v_mean, *k.stride(), *v.stride(), seq_k, min(seq_k, SAMPLE),
            **means_constants(fixed), num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
        grid = (max(triton.cdiv(seq_q, GROUP), padded_k // GROUP), batch * heads, 2 if v_codes is v else 3)
        quantize_kernel[grid](
            q, k, v, order, k_mean, v_mean, signs, norms,
            q_codes, q_scale, lse_shift, k_codes, k_scale, v_codes, v_scale,
            *q.stride(), *k.stride(), *v.stride(),
            0 if order is None or len(order) == 1 else order.stride(0),
            heads, seq_q, seq_k, padded_k, scale, scale * LOG2_E,
            **fixed, num_warps=launch_warps(head_size), enable_fp_fusion=False,
        )  # fmt: skip
    return Quantized(
        q=q_codes, q_scale=q_scale, lse_shift=lse_shift, k=k_codes, k_scale=k_scale,
        v=v_codes, v_scale=v_scale, v_mean=v_mean, seq_k=seq_k, head_size=head_size,
    )  # fmt: skip
