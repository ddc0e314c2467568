"""Triton: attention of a few query rows over all keys and under two bands of them, keys split among programs.

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

from sparse_dit.kernels.launches import cdiv, device_of, launch_kernel, power_of_2
from sparse_dit.kernels.pieces import aligned, pieces
from sparse_dit.kernels.tiles import architecture

ROWS, VALUES = 64, 64  # three sums of 64 rows and channels take 96 registers a thread
WARPS = 4
TOKENS = 1024  # of an order that a program writes
SPANS = 64  # of the keys of a head at most, so that a program of the merge holds them all at once
PROGRAMS = 264  # that a launch aims at, whatever the GPU: two on each multiprocessor of the largest


@triton.jit
def _added(b_weight, b_v, b_decay, b_sum, b_out, PRECISION: tl.constexpr):
    """Sums of weights and of weighed values with those of one more tile."""
    b_out = tl.dot(b_weight.to(b_v.dtype), b_v, b_out * b_decay[:, None], input_precision=PRECISION)
    return b_sum * b_decay + tl.sum(b_weight, 1), b_out


@triton.jit
def _part(b_weight, b_own, b_key, reach):
    """Weights of the keys of a tile that rows see by their units; NaN is nowhere too far away."""
    b_beyond = tl.abs(b_own[:, None] - b_key[None, :]) - (reach - 1.0)
    return b_weight - tl.minimum(tl.maximum(b_beyond, 0.0), 1.0) * b_weight


@triton.jit
def _attended(
    state, b_q, b_near, b_far, p_near, p_far, p_k, p_v, o_k, o_v, m_s, m_d, m_value, scale, reach,
    RAGGED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state of a program after one more tile: maximum, sums and weighed values of all keys, near ones, far ones."""
    b_max, b_sum, b_out, b_sum_near, b_out_near, b_sum_far, b_out_far = state
    b_k = tl.load(p_k + o_k, mask=(m_s[None, :] & m_d[:, None]) if RAGGED else m_d[:, None], other=0.0)
    b_v = tl.load(p_v + o_v, mask=(m_s[:, None] & m_value[None, :]) if RAGGED else m_value[None, :], other=0.0)
    b_key_near = tl.load(p_near, mask=m_s if RAGGED else None)
    b_key_far = tl.load(p_far, mask=m_s if RAGGED else None)
    b_score = tl.dot(b_q, b_k, input_precision=PRECISION)
    if RAGGED:
        b_score = tl.where(m_s[None, :], b_score, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_score, 1))
    b_weight = tl.exp2(b_score * scale - (b_new * scale)[:, None])
    b_decay = tl.exp2((b_max - b_new) * scale)
    b_sum, b_out = _added(b_weight, b_v, b_decay, b_sum, b_out, PRECISION)
    b_part = _part(b_weight, b_near, b_key_near, reach)
    b_sum_near, b_out_near = _added(b_part, b_v, b_decay, b_sum_near, b_out_near, PRECISION)
    b_part = _part(b_weight, b_far, b_key_far, reach)
    b_sum_far, b_out_far = _added(b_part, b_v, b_decay, b_sum_far, b_out_far, PRECISION)
    return b_new, b_sum, b_out, b_sum_near, b_out_near, b_sum_far, b_out_far


@triton.jit
def _keep(p_out, p_sum, o_part, o_value, b_out, b_sum, m_r, HEAD_SIZE: tl.constexpr):
    tl.store(p_sum + o_part, b_sum, mask=m_r)
    m_out = m_r[:, None] & (o_value < HEAD_SIZE)[None, :]
    tl.store(p_out + o_part[:, None] * HEAD_SIZE + o_value[None, :], b_out, mask=m_out)


@triton.jit
def rows_kernel(
    p_q,
    p_k,
    p_v,
    p_rows,
    p_own,
    p_near,
    p_far,
    p_out,
    p_max,
    p_sum,
    scale,
    reach,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    heads,
    rows,
    seq,
    span,
    HEAD_SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    VALUES: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Over one span of keys of one head: weighed values and weights [3, batch and head, span, row], and the maximum.

    The whole and both bands share scores and weights: those of a band are zero elsewhere. So they are rounded beside
    the largest of the row, not of the band. A program has VALUES channels of v: sums of all would spill. Strides are
    in PIECE elements as in `attention`.
    """
    PIECE: tl.constexpr = 128 // p_q.dtype.element_ty.primitive_bitwidth
    i_value, i_span, i_bh = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b, i_h = (i_bh // heads).to(tl.int64), (i_bh % heads).to(tl.int64)
    o_r, o_d = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    m_r, m_d = o_r < rows, o_d < HEAD_SIZE
    o_row = tl.load(p_rows + o_r, mask=m_r, other=0)
    b_near, b_far = tl.load(p_own + o_row), tl.load(p_own + seq + o_row)
    p_q += (i_b * q_batch + i_h * q_head + o_row[:, None] * q_token) * PIECE
    b_q = tl.load(p_q + o_d[None, :], mask=m_r[:, None] & m_d[None, :], other=0.0)
    p_k += (i_b * k_batch + i_h * k_head) * PIECE
    p_v += (i_b * v_batch + i_h * v_head) * PIECE
    b_zero, b_none = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, VALUES], tl.float32)
    state = (tl.full([ROWS], float("-inf"), tl.float32), b_zero, b_none, b_zero, b_none, b_zero, b_none)
    o_value = i_value * VALUES + tl.arange(0, VALUES)
    m_value = o_value < HEAD_SIZE
    o_s = tl.arange(0, TILE)
    o_k = o_s[None, :] * (k_token * PIECE) + o_d[:, None]
    o_v = o_s[:, None] * (v_token * PIECE) + o_value[None, :]
    first = i_span * span
    end = tl.minimum(first + span, seq)
    ragged = end - (end - first) % TILE
    if ragged < end:
        tile = tl.cast(ragged, tl.int64) * PIECE
        state = _attended(
            state, b_q, b_near, b_far, p_near + ragged + o_s, p_far + ragged + o_s, p_k + tile * k_token,
            p_v + tile * v_token, o_k, o_v, ragged + o_s < end, m_d, m_value, scale, reach, True, PRECISION,
        )  # fmt: skip
    for start in range(first, ragged, TILE):
        tile = tl.cast(start, tl.int64) * PIECE
        state = _attended(
            state, b_q, b_near, b_far, p_near + start + o_s, p_far + start + o_s, p_k + tile * k_token,
            p_v + tile * v_token, o_k, o_v, o_s < seq, m_d, m_value, scale, reach, False, PRECISION,
        )  # fmt: skip
    b_max, b_sum, b_out, b_sum_near, b_out_near, b_sum_far, b_out_far = state
    o_part = (i_bh.to(tl.int64) * tl.num_programs(1) + i_span) * rows + o_r
    parts = tl.num_programs(2).to(tl.int64) * tl.num_programs(1) * rows
    tl.store(p_max + o_part, b_max * scale, mask=m_r)
    _keep(p_out, p_sum, o_part, o_value, b_out, b_sum, m_r, HEAD_SIZE)
    _keep(p_out, p_sum, o_part + parts, o_value, b_out_near, b_sum_near, m_r, HEAD_SIZE)
    _keep(p_out, p_sum, o_part + 2 * parts, o_value, b_out_far, b_sum_far, m_r, HEAD_SIZE)


@triton.jit
def _merged(p_out, p_sum, o_part, b_share, m_span, HEAD_SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    """Attention of one row from its spans, [COLUMNS]; zeros where no weight is left."""
    o_d = tl.arange(0, COLUMNS)
    b_sum = tl.sum(tl.load(p_sum + o_part, mask=m_span, other=0.0) * b_share, 0)
    m_out = m_span[:, None] & (o_d < HEAD_SIZE)[None, :]
    b_out = tl.load(p_out + o_part[:, None] * HEAD_SIZE + o_d[None, :], mask=m_out, other=0.0)
    return tl.sum(b_out * b_share[:, None], 0) / tl.where(b_sum > 0, b_sum, 1.0)


@triton.jit
def rows_error_kernel(
    p_out, p_max, p_sum, p_error, rows, spans, HEAD_SIZE: tl.constexpr, COLUMNS: tl.constexpr, SPANS: tl.constexpr
):
    """Squared distance of one row under each band from the whole, [band, batch and head, row]."""
    i_r, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_span = tl.arange(0, SPANS)
    m_span = o_span < spans
    o_part = (i_bh * spans + o_span) * rows + i_r
    parts = tl.num_programs(1).to(tl.int64) * spans * rows
    b_max = tl.load(p_max + o_part, mask=m_span, other=float("-inf"))
    b_share = tl.exp2(b_max - tl.max(b_max, 0))
    b_whole = _merged(p_out, p_sum, o_part, b_share, m_span, HEAD_SIZE, COLUMNS)
    for band in tl.static_range(2):
        b_off = _merged(p_out, p_sum, o_part + (band + 1) * parts, b_share, m_span, HEAD_SIZE, COLUMNS) - b_whole
        o_error = (band * tl.num_programs(1) + i_bh) * rows + i_r
        tl.store(p_error + o_error, tl.sum(b_off * b_off, 0))


@triton.jit
def closest_kernel(
    p_error, p_orders, p_closest, batch, heads, rows, seq, ROWS: tl.constexpr, TOKENS: tl.constexpr
):  # fmt: skip
    """TOKENS ids of the order of one head, closest[h] = orders[error[1, :, h] < error[0, :, h], all summed up]."""
    i_tile, i_h = tl.program_id(0), tl.program_id(1)
    o_r, o_s = tl.arange(0, ROWS), i_tile * TOKENS + tl.arange(0, TOKENS)
    b_first, b_second = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for i_b in range(batch):
        p_own = p_error + (i_b * heads + i_h) * rows
        for start in range(0, rows, ROWS):
            m_r = start + o_r < rows
            b_first += tl.load(p_own + start + o_r, mask=m_r, other=0.0)
            b_second += tl.load(p_own + batch * heads * rows + start + o_r, mask=m_r, other=0.0)
    i_order = (tl.sum(b_second, 0) < tl.sum(b_first, 0)).to(tl.int32)
    b_id = tl.load(p_orders + i_order * seq + o_s, mask=o_s < seq)
    tl.store(p_closest + i_h.to(tl.int64) * seq + o_s, b_id, mask=o_s < seq)


def tile_for(head_size: int, arch: str) -> tuple[int, int]:
    """Keys a tile, and tiles in flight: tiles of twice the keys decay half as often, where registers allow them."""
    return (64, 3) if arch == "sm_90" and head_size in (64, 128) else (32, 2)


def constants(head_size: int, dtype: torch.dtype, tile: int) -> dict[str, object]:
    """The compile-time arguments of rows_kernel."""
    return {
        "HEAD_SIZE": head_size,
        "COLUMNS": power_of_2(head_size),
        "VALUES": VALUES,
        "ROWS": ROWS,
        "TILE": tile,
        "PRECISION": "ieee" if dtype is torch.float32 else "tf32",
    }


def triton_band_errors(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, own: Tensor, keys: Tensor, reach: int, scale: float
) -> Tensor:
    """The contract of `rows.band_errors` for two bands, 64 rows at a time."""
    if len(rows) > ROWS:
        found = [triton_band_errors(q, k, v, some, own, keys, reach, scale) for some in rows.split(ROWS)]
        return torch.cat(found, dim=-1)
    q, k, v = aligned(q), aligned(k), aligned(v)
    rows, own, keys = rows.contiguous(), own.contiguous(), keys.contiguous()
    batch, heads, seq, head_size = q.shape
    tile, stages = tile_for(head_size, architecture(q.device))
    fixed, parts = constants(head_size, q.dtype, tile), cdiv(head_size, VALUES)
    spans = min(SPANS, cdiv(seq, tile), max(1, PROGRAMS // (batch * heads * parts)))
    span = cdiv(cdiv(seq, spans), tile) * tile
    spans = cdiv(seq, span)
    out = torch.empty(3, batch * heads, spans, len(rows), head_size, dtype=torch.float32, device=q.device)
    weight = torch.empty(out.shape[:-1], dtype=torch.float32, device=q.device)
    peak = torch.empty(weight.shape[1:], dtype=torch.float32, device=q.device)
    error = torch.empty(2, batch, heads, len(rows), dtype=torch.float32, device=q.device)
    with device_of(q):
        launch_kernel(
            rows_kernel, (parts, spans, batch * heads),
            q, k, v, rows, own, *keys, out, peak, weight, scale * math.log2(math.e), float(reach),
            *pieces(q), *pieces(k), *pieces(v), heads, len(rows), seq, span, **fixed,
            num_warps=WARPS, num_stages=stages, enable_fp_fusion=True,
        )  # fmt: skip
        launch_kernel(
            rows_error_kernel, (len(rows), batch * heads),
            out, peak, weight, error, len(rows), spans, HEAD_SIZE=head_size, COLUMNS=fixed["COLUMNS"],
            SPANS=power_of_2(spans), num_warps=4,
        )  # fmt: skip
    return error


def triton_closest_orders(errors: Tensor, orders: Tensor) -> Tensor:
    """The contract of `rows.closest_orders`."""
    _, batch, heads, rows = errors.shape
    seq = orders.shape[1]
    closest = torch.empty(heads, seq, dtype=torch.int64, device=orders.device)
    with device_of(orders):
        launch_kernel(
            closest_kernel, (cdiv(seq, TOKENS), heads),
            errors.contiguous(), orders.contiguous(), closest, batch, heads, rows, seq,
            ROWS=ROWS, TOKENS=TOKENS, num_warps=WARPS,
        )  # fmt: skip
    return closest
