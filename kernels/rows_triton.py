"""Triton: attention of a few query rows under several masks, keys split among programs.

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

ROWS, TILE = 64, 64
WARPS, STAGES = 8, 2
PROGRAMS = 512  # that a launch aims at, whatever the GPU: enough for four on each multiprocessor of the largest
MASKED = -1e30  # finite, so that a tile without a key of a mask leaves no NaN


@triton.jit
def rows_kernel(
    p_q,
    p_k,
    p_v,
    p_masks,
    p_out,
    p_max,
    p_sum,
    scale,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    mask_row,
    heads,
    rows,
    keys,
    span,
    HEAD_SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One span of keys of one head under one mask: sums, their maximum and their weight.

    The masks of a span are worked on by neighbouring programs, so that k and v come from memory once.
    """
    i_mask, i_span, i_bh = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b, i_h = (i_bh // heads).to(tl.int64), (i_bh % heads).to(tl.int64)
    o_r, o_d = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    m_r, m_d = o_r < rows, o_d < HEAD_SIZE
    o_q = (i_bh.to(tl.int64) * rows + o_r)[:, None] * HEAD_SIZE + o_d[None, :]
    b_q = tl.load(p_q + o_q, mask=m_r[:, None] & m_d[None, :], other=0.0)
    p_k += i_b * k_batch + i_h * k_head
    p_v += i_b * v_batch + i_h * v_head
    p_masks += i_mask.to(tl.int64) * rows * mask_row
    b_max = tl.full([ROWS], MASKED, tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    b_out = tl.zeros([ROWS, COLUMNS], tl.float32)
    first = i_span * span
    for start in range(first, tl.minimum(first + span, keys), TILE):
        o_s = start + tl.arange(0, TILE)
        m_s = o_s < keys
        o_k = o_s.to(tl.int64)
        b_k = tl.load(p_k + o_k[None, :] * k_token + o_d[:, None], mask=m_s[None, :] & m_d[:, None], other=0.0)
        m_seen = m_r[:, None] & m_s[None, :]
        m_seen = tl.load(p_masks + o_r[:, None].to(tl.int64) * mask_row + o_s[None, :], mask=m_seen, other=0) != 0
        b_score = tl.dot(b_q, b_k, input_precision=PRECISION) * scale
        b_score = tl.where(m_seen, b_score, MASKED)
        b_new = tl.maximum(b_max, tl.max(b_score, 1))
        b_weight = tl.where(m_seen, tl.exp2(b_score - b_new[:, None]), 0.0)
        b_decay = tl.exp2(b_max - b_new)
        b_sum = b_sum * b_decay + tl.sum(b_weight, 1)
        b_v = tl.load(p_v + o_k[:, None] * v_token + o_d[None, :], mask=m_s[:, None] & m_d[None, :], other=0.0)
        b_out = b_out * b_decay[:, None] + tl.dot(b_weight.to(b_v.dtype), b_v, input_precision=PRECISION)
        b_max = b_new
    # [mask, span, head of a batch entry, row]
    o_part = ((i_mask * tl.num_programs(1) + i_span).to(tl.int64) * tl.num_programs(2) + i_bh) * rows + o_r
    tl.store(p_max + o_part, b_max, mask=m_r)
    tl.store(p_sum + o_part, b_sum, mask=m_r)
    tl.store(p_out + o_part[:, None] * HEAD_SIZE + o_d[None, :], b_out, mask=m_r[:, None] & m_d[None, :])


def constants(head_size: int, dtype: torch.dtype) -> dict[str, object]:
    """The kernel's compile-time arguments."""
    return {
        "HEAD_SIZE": head_size,
        "COLUMNS": triton.next_power_of_2(head_size),
        "ROWS": ROWS,
        "TILE": TILE,
        "MASKED": MASKED,
        "PRECISION": "ieee" if dtype is torch.float32 else "tf32",
    }


def triton_rows(q: Tensor, k: Tensor, v: Tensor, masks: Tensor, scale: float) -> Tensor:
    """The contract of `rows.rows_under_masks`, 64 rows at a time."""
    if q.shape[2] > ROWS:
        parts = zip(q.split(ROWS, dim=2), masks.split(ROWS, dim=1), strict=True)
        return torch.cat([triton_rows(some, k, v, mask, scale) for some, mask in parts], dim=3)
    # The first mask leaves every key. Rows that begin at multiples of 16 bytes are loaded by the piece.
    given, q = masks, q.contiguous()
    masks = given.new_empty(len(given) + 1, *given.shape[1:-1], triton.cdiv(given.shape[-1], 16) * 16)
    masks[0], masks[1:, :, : given.shape[-1]] = True, given
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    batch, heads, rows, head_size = q.shape
    keys, count = k.shape[2], len(masks)
    spans = min(triton.cdiv(keys, TILE), max(1, PROGRAMS // (batch * heads * count)))
    span = triton.cdiv(triton.cdiv(keys, spans), TILE) * TILE
    spans = triton.cdiv(keys, span)
    out = torch.empty(count, spans, batch * heads, rows, head_size, dtype=torch.float32, device=q.device)
    peak = torch.empty(out.shape[:-1], dtype=torch.float32, device=q.device)
    weight = torch.empty_like(peak)
    fixed = constants(head_size, q.dtype)
    with torch.cuda.device_of(q):
        rows_kernel[(count, spans, batch * heads)](
            q, k, v, masks.view(torch.uint8), out, peak, weight, scale * math.log2(math.e),
            *k.stride()[:3], *v.stride()[:3], masks.stride(1), heads, rows, keys, span, **fixed,
            num_warps=WARPS, num_stages=STAGES, enable_fp_fusion=True,
        )  # fmt: skip
    share = (peak - peak.amax(dim=1, keepdim=True)).exp2()
    total = (weight * share).sum(dim=1)
    merged = (out * share[..., None]).sum(dim=1) / total[..., None]
    return merged.view(count, batch, heads, rows, head_size)
