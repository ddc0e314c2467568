"""Gluon: `quantize_triton` on sm_90 for whole rows of 64 or 128 channels, rotated.

As many programs as fit on the multiprocessors at once, each with tiles of q, k and v on their way (`ring_hopper`). The
matrix unit does all that moves values between threads: it multiplies tokens of q and k by signs, and those of v,
transposed, by ones, both with columns named such that a thread is left 16 of a row side by side, stored as they are.

Names as in `attention_hopper`. All products are [D, 64], two a tile: of q and k the two halves of the channels of 128
tokens at D = 128, 64 tokens each at D = 64; of v 64 tokens each.
"""

# Gluon kernel bodies are a language of their own: their arguments carry no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="operator, index, attr-defined, no-untyped-call"

from functools import lru_cache
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait
from triton.runtime import driver

from sparse_dit.kernels.launches import cdiv, device_of, launch_kernel
from sparse_dit.kernels.pieces import steps
from sparse_dit.kernels.quantize import FP8_MAX, GROUP, INT8_MAX, LOG2_E, SMALLEST, Quantized, fresh_codes, rotation
from sparse_dit.kernels.ring_hopper import TILE, place_after, place_of, start_copy, token_ids, wait_for_copy
from sparse_dit.kernels.sampled_means_triton import launch_means, rotation_factors

INT8_TOP = gl.constexpr(INT8_MAX)
FP8_TOP = gl.constexpr(FP8_MAX)
LEAST = gl.constexpr(SMALLEST)
# By head size: tiles that a program works on or has on their way, and programs a multiprocessor.
STAGES = {64: 2, 128: 3}
PROGRAMS = {64: 3, 128: 2}


@gluon.constexpr_function
def rows_layout(D):
    """[D, 64], 16 columns of two rows a thread, as `_seen_by_rows` leaves products."""
    registers = [[0, 1], [0, 2], [0, 4], [0, 8], [8, 0]]
    lanes = [[0, 16], [0, 32], [1, 0], [2, 0], [4, 0]]
    warps = [[16 << i, 0] for i in range((D // 16).bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [D, 64])


@gluon.jit
def _seen_by_rows(b_x, D: gl.constexpr):
    """Columns 8 j + 2 t + e of a product [D, 64], which a thread t has for all j and e, as columns 16 t + 2 j + e."""
    b_x = b_x.reshape([D, 8, 4, 2]).permute((0, 2, 1, 3)).reshape([D, 64])
    return gl.convert_layout(b_x, rows_layout(D), assert_trivial=True)


@gluon.jit
def _products(b_left, b_right, b_matrix, D: gl.constexpr):
    """The products of two halves [D, 64] of a tile with [64, 64], fp32."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [D // 16, 1], [16, 64, 16])
    b_zero = gl.zeros([D, 64], gl.float32, layout)
    b_0 = warpgroup_mma(b_left, b_matrix, b_zero, use_acc=False, is_async=True)
    b_1 = warpgroup_mma(b_right, b_matrix, b_zero, use_acc=False, is_async=True)
    b_0, b_1 = warpgroup_mma_wait(0, deps=[b_0, b_1])
    return _seen_by_rows(b_0, D), _seen_by_rows(b_1, D)


@gluon.jit
def _rotated(b_x, b_signs, D: gl.constexpr):
    """Tokens of a tile times a Hadamard matrix without its factor: halves of channels at D = 128, of tokens at 64."""
    if D == 64:
        return _products(b_x.slice(0, 64, 0), b_x.slice(64, 64, 0), b_signs, D)
    else:
        # [[H, H], [H, -H]], H of 64 channels.
        b_0, b_1 = _products(b_x.slice(0, 64, 1), b_x.slice(64, 64, 1), b_signs, D)
        return b_0 + b_1, b_0 - b_1


@gluon.jit
def _int8(b_x, b_factor):
    """See `quantize_triton`; with one rounding less."""
    return gl.fma(b_x, b_factor, 12582912.0).to(gl.int32, bitcast=True).to(gl.int8)


@gluon.jit
def _e4m3(b_x):
    """Four at once, as in `attention_hopper`."""
    return gl.inline_asm_elementwise(
        """
        {
            .reg .b16 low, high;
            cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
            cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
            mov.b32 $0, {low, high};
        }
        """,
        "=r,f,f,f,f",
        [b_x],
        gl.float8e4nv,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def _mean_halves(p_mean, D: gl.constexpr):
    """The mean of k of a head, rotated without the factor, as the columns of both halves of a tile have it, [1, 64]."""
    o_column = gl.arange(0, 64, gl.SliceLayout(0, rows_layout(D)))
    b_0 = gl.expand_dims(gl.load(p_mean + o_column), 0)
    if D == 64:
        return b_0, b_0
    else:
        return b_0, gl.expand_dims(gl.load(p_mean + 64 + o_column), 0)


@gluon.jit
def _queries_part(b_top, b_dot, o_row, p_scale, p_shift, rows, scale, scale_log2, D: gl.constexpr):
    """Stores what tokens of q have apart from codes; returns the factors of their codes."""
    b_top = gl.maximum(b_top, LEAST * D**0.5)
    gl.store(p_shift + o_row, b_dot * (scale / D), mask=o_row < rows)
    gl.store(p_scale + o_row, b_top * (scale_log2 * (D**-0.5 / INT8_TOP)), mask=o_row < rows)
    return gl.expand_dims(gl.fdiv(gl.full_like(b_top, INT8_TOP), b_top), 1)


@gluon.jit
def _queries(b_0, b_1, b_mean_0, b_mean_1, p_codes, p_scale, p_shift, rows, scale, scale_log2, D: gl.constexpr):
    """Scales, shifts and codes of a tile of q, of which the first `rows` are tokens; pointers are those of the tile."""
    layout: gl.constexpr = rows_layout(D)
    o_row = gl.arange(0, D, gl.SliceLayout(1, layout))
    o_column = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(0, layout)), 0)
    b_dot = b_0 * b_mean_0
    if D == 64:
        b_top_0, b_top_1 = gl.max(gl.abs(b_0), 1), gl.max(gl.abs(b_1), 1)
        b_dot_0, b_dot_1 = gl.sum(b_dot, 1), gl.sum(b_1 * b_mean_1, 1)
        b_factor_0 = _queries_part(b_top_0, b_dot_0, o_row, p_scale, p_shift, rows, scale, scale_log2, D)
        b_factor_1 = _queries_part(b_top_1, b_dot_1, o_row + 64, p_scale, p_shift, rows, scale, scale_log2, D)
    else:
        b_top = gl.max(gl.maximum(gl.abs(b_0), gl.abs(b_1)), 1)
        b_dot = gl.sum(gl.fma(b_1, b_mean_1, b_dot), 1)
        b_factor_0 = _queries_part(b_top, b_dot, o_row, p_scale, p_shift, rows, scale, scale_log2, D)
        b_factor_1 = b_factor_0
    o_row = gl.expand_dims(o_row, 1)
    p_rows = p_codes + o_row * D + o_column
    gl.store(p_rows, _int8(b_0, b_factor_0), mask=o_row < rows)
    gl.store(p_rows + (64 if D == 128 else 64 * D), _int8(b_1, b_factor_1), mask=o_row + 64 * (D == 64) < rows)


@gluon.jit
def _keys(b_0, b_1, b_mean_0, b_mean_1, p_codes, p_scale, rows, D: gl.constexpr):
    """The same of k. Behind the tokens lies the last one again: it moves no maximum, and its codes are made zeros."""
    layout: gl.constexpr = rows_layout(D)
    b_0 -= b_mean_0
    b_1 -= b_mean_1
    top = gl.maximum(gl.max(gl.max(gl.maximum(gl.abs(b_0), gl.abs(b_1)), 1), 0), LEAST * D**0.5)
    gl.store(p_scale, top * (D**-0.5 / INT8_TOP))
    factor = gl.fdiv(INT8_TOP + 0 * top, top)
    o_row = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(1, layout)), 1)
    o_column = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(0, layout)), 0)
    p_rows = p_codes + o_row * D + o_column
    gl.store(p_rows, _int8(b_0, gl.where(o_row < rows, factor, 0.0)))
    o_row += 64 * (D == 64)
    gl.store(p_rows + (64 if D == 128 else 64 * D), _int8(b_1, gl.where(o_row < rows, factor, 0.0)))


@gluon.jit
def _values(b_x, b_ones, p_mean, p_codes, p_scale, first, seq, padded, D: gl.constexpr):
    """The same of v, transposed; the ones put tokens into the places that `Quantized` tells.

    Codes are those of the head, and places count from its first token: what does not change from tile to tile would be
    kept, in registers that there are not.
    """
    layout: gl.constexpr = rows_layout(D)
    o_dim = gl.arange(0, D, gl.SliceLayout(1, layout))
    b_mean = gl.expand_dims(gl.load(p_mean + o_dim), 1)
    b_0, b_1 = _products(b_x.slice(0, 64, 0).permute((1, 0)), b_x.slice(64, 64, 0).permute((1, 0)), b_ones, D)
    b_0 -= b_mean
    b_1 -= b_mean
    o_column = gl.arange(0, 64, gl.SliceLayout(0, layout))
    if first + TILE > seq:
        o_16 = o_column % 16
        o_token = gl.expand_dims(first + o_column - o_16 + o_16 // 2 % 2 * 8 + o_16 // 4 * 2 + o_16 % 2, 0)
        b_0 = gl.where(o_token < seq, b_0, 0.0)
        b_1 = gl.where(o_token + 64 < seq, b_1, 0.0)
    top = gl.maximum(gl.max(gl.max(gl.maximum(gl.abs(b_0), gl.abs(b_1)), 1), 0), LEAST)
    gl.store(p_scale, gl.div_rn(top, FP8_TOP + 0 * top))
    factor = gl.div_rn(FP8_TOP + 0 * top, top)
    p_rows = p_codes + gl.expand_dims(o_dim, 1).to(gl.int64) * padded + (first + gl.expand_dims(o_column, 0))
    gl.store(p_rows, _e4m3(b_0 * factor))
    gl.store(p_rows + 64, _e4m3(b_1 * factor))


@gluon.jit
def _copied(b_x, p_out, rows, COPY: gl.constexpr, D: gl.constexpr):
    """Stores a tile of v as it is."""
    o_row = gl.expand_dims(gl.arange(0, TILE, gl.SliceLayout(1, COPY)), 1)
    o_dim = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, COPY)), 0)
    gl.store(p_out + o_row * D + o_dim, b_x.load(COPY), mask=o_row < rows)


@gluon.jit
def _square(p_x, D: gl.constexpr):
    """A contiguous matrix [64, 64] in shared memory."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [D // 16, 1], [1, 0])
    o_row = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(1, layout)), 1)
    o_column = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(0, layout)), 0)
    dtype: gl.constexpr = p_x.dtype.element_ty
    b_x = gl.load(p_x + o_row * 64 + o_column)
    return gl.allocate_shared_memory(dtype, [64, 64], gl.NVMMASharedLayout(128, 16, 2), b_x)


# Were a single token told to the compiler, ptxas would see pairs of equal zeros in `_e4m3`, and packed what it had not
# computed (12.8).
@gluon.jit(do_not_specialize=["seq"])
def hopper_quantize_kernel(
    p_q,
    p_k,
    p_v,
    p_order,
    p_k_mean,
    p_v_mean,
    p_signs,
    p_ones,
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
    batch,
    heads,
    seq,
    scale,
    scale_log2,
    FP8: gl.constexpr,
    ORDERED: gl.constexpr,
    PIECE: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Tiles i, i + programs, i + 2 programs and so on in program i; means of k come without the rotation's factor.

    The means are of a kernel that may still run (programmatic dependent launch): they are waited for when the first
    tiles are on their way.
    """
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [D // 16, 1], [1, 0])
    matrix: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    dtype: gl.constexpr = p_q.dtype.element_ty
    PARTS: gl.constexpr = 3 if FP8 or ORDERED else 2
    tiles = gl.cdiv(seq, TILE)
    padded = tiles * TILE
    strides = (q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token)
    x = (p_q, p_k, p_v, strides, batch, PARTS)
    order = (p_order, order_head)
    b_ring = gl.allocate_shared_memory(dtype, [STAGES, TILE, D], matrix)
    step = place_of(gl.num_programs(0), heads, tiles)
    place = place_of(gl.program_id(0), heads, tiles)
    ahead = place
    for number in gl.static_range(STAGES - 1):
        start_copy(x, ahead, token_ids(order, ahead, seq, COPY), b_ring.index(number), COPY, PIECE)
        ahead = place_after(ahead, step, heads, tiles)
    o_token = token_ids(order, ahead, seq, COPY)
    b_signs = _square(p_signs, D)
    if FP8:
        b_ones = _square(p_ones, D)
    gl.inline_asm_elementwise("griddepcontrol.wait; mov.b32 $0, 0;", "=r", [], gl.int32, is_pure=False, pack=1)
    stage = 0
    while place[0] < 2 * batch:
        wait_for_copy(STAGES)
        start_copy(x, ahead, o_token, b_ring.index((stage + STAGES - 1) % STAGES), COPY, PIECE)
        ahead = place_after(ahead, step, heads, tiles)
        o_token = token_ids(order, ahead, seq, COPY)
        i_xb, i_h, i_tile = place
        i_bh = (gl.where(i_xb < batch, i_xb, i_xb - batch) * heads + i_h).to(gl.int64)
        b_mean_0, b_mean_1 = _mean_halves(p_k_mean + i_bh * D, D)
        b_0, b_1 = _rotated(b_ring.index(stage), b_signs, D)
        rows = seq - i_tile * TILE
        if i_xb < batch:
            row = i_bh * seq + i_tile * TILE
            _queries(
                b_0, b_1, b_mean_0, b_mean_1, p_q_codes + row * D, p_q_scale + row, p_lse_shift + row,
                rows, scale, scale_log2, D,
            )  # fmt: skip
        else:
            tile = i_bh * tiles + i_tile
            _keys(b_0, b_1, b_mean_0, b_mean_1, p_k_codes + tile * TILE * D, p_k_scale + tile, rows, D)
        stage = (stage + 1) % STAGES
        place = place_after(place, step, heads, tiles)
    # A loop of their own: ptxas shares addresses of products between branches of which one does not run.
    while place[0] < PARTS * batch:
        wait_for_copy(STAGES)
        start_copy(x, ahead, o_token, b_ring.index((stage + STAGES - 1) % STAGES), COPY, PIECE)
        ahead = place_after(ahead, step, heads, tiles)
        o_token = token_ids(order, ahead, seq, COPY)
        i_xb, i_h, i_tile = place
        i_bh = ((i_xb - 2 * batch) * heads + i_h).to(gl.int64)
        first = i_tile * TILE
        if FP8:
            p_codes = p_v_codes + i_bh * padded * D
            p_scale = p_v_scale + i_bh * tiles + i_tile
            _values(b_ring.index(stage), b_ones, p_v_mean + i_bh * D, p_codes, p_scale, first, seq, padded, D)
        elif ORDERED:
            _copied(b_ring.index(stage), p_v_codes + (i_bh * seq + first) * D, seq - first, COPY, D)
        stage = (stage + 1) % STAGES
        place = place_after(place, step, heads, tiles)


@lru_cache
def constants(precision: str, head_size: int, ordered: bool, piece: int) -> dict[str, Any]:
    """The compile-time arguments of `hopper_quantize_kernel`, not to be changed."""
    return {
        "FP8": precision == "int8_fp8",
        "ORDERED": ordered,
        "PIECE": piece,
        "D": head_size,
        "STAGES": STAGES[head_size],
    }


@lru_cache
def launch_options(head_size: int) -> dict[str, Any]:
    """How `hopper_quantize_kernel` is launched, not to be changed: a thread holds 32 values of each of two products."""
    return {"num_warps": head_size // 16, "maxnreg": 128, "enable_fp_fusion": False, "launch_pdl": True}


@lru_cache
def _matrices(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """What tokens are multiplied by, [64, 64] each: signs of a rotation, and ones that bring values into their places.

    Column 8 j + 2 t + e is column 16 t + 2 j + e of what is stored (`rows_layout`).
    """
    place = torch.arange(64)
    i_16 = place % 16
    token = place - i_16 + i_16 // 2 % 2 * 8 + i_16 // 4 * 2 + i_16 % 2  # `Quantized` tells why
    signs, ones = rotation(64).sign(), torch.eye(64)[:, token]
    named = (rearrange(x, "k (t j e) -> k (j t e)", t=4, e=2) for x in (signs, ones))
    # Copied as they lie: what a launch rearranges is not there for other streams yet.
    signs, ones = (x.contiguous().to(device, dtype) for x in named)
    return signs, ones


@lru_cache
def _multiprocessors(index: int) -> int:
    return int(driver.active.utils.get_device_properties(index)["multiprocessor_count"])


def hopper_quantize(q: Tensor, k: Tensor, v: Tensor, precision: str, scale: float, order: Tensor | None) -> Quantized:
    """The contract of `quantize.quantize`, rotated, where `backends.hopper_quantize_refusal` has no objection."""
    batch, heads, seq, head_size = q.shape
    piece, strides = steps(q, k, v)
    codes = fresh_codes(q, k, v, precision, order is not None)
    signs, ones = _matrices(q.dtype, q.device)
    tiles = batch * heads * cdiv(seq, GROUP) * (2 if codes.v is v else 3)
    programs = min(tiles, _multiprocessors(max(q.get_device(), 0)) * PROGRAMS[head_size])
    with device_of(q):
        factors = rotation_factors(head_size, q.dtype, q.device)
        k_mean = launch_means(k, v, codes.v_mean, factors, norm=1.0, leads=True)
        launch_kernel(
            hopper_quantize_kernel, (programs,),
            q, k, v, order, k_mean, codes.v_mean, signs, None if codes.v_scale is None else ones,
            codes.q, codes.q_scale, codes.lse_shift, codes.k, codes.k_scale, codes.v, codes.v_scale,
            *strides,
            0 if order is None or len(order) == 1 else order.stride(0),
            batch, heads, seq, scale, scale * LOG2_E,
            **constants(precision, head_size, order is not None, piece), **launch_options(head_size),
        )  # fmt: skip
    return codes
