"""Triton: tokens into the order in which they enter blocks, a head at a time, and the means of runs of q and of k.

Names as in `attention`: `i_` program index, `p_` pointer, `o_` offsets, `m_` mask, `b_` values on chip.
"""

# Triton kernel bodies are a language of their own: their arguments carry no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="operator, index, attr-defined, no-untyped-call"

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from einops import rearrange
from torch import Tensor

from sparse_dit.kernels.launches import cdiv, device_of, launch_kernel, power_of_2
from sparse_dit.kernels.pieces import steps

# Tokens of a run that one thread adds up, in the registers they came to: no sum of so few crosses threads.
OWN = 16
# Elements a thread moves, 16 loads of 16 bytes under way in 16 bits, and warps a program unless a run needs more.
ELEMENTS, WARPS = 128, 4


@triton.jit
def _move(
    p_x, p_out, p_means, p_order, x_batch, x_head, x_token, x_dim, order_head, heads, seq, runs, i_tile, i_h, i_b,
    UNIT: tl.constexpr, OWN: tl.constexpr, PIECE: tl.constexpr, HEAD_SIZE: tl.constexpr, COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    RUN: tl.constexpr = OWN if UNIT == 0 or UNIT > OWN else UNIT
    GROUPS: tl.constexpr = TOKENS // RUN
    # In one dimension, threads wrap around: all tokens of a run, [RUN, GROUPS, COLUMNS], come to the same threads.
    o = tl.arange(0, TOKENS * COLUMNS)
    o_d = o % COLUMNS
    o_place = (i_tile * GROUPS + o // COLUMNS % GROUPS) * RUN + o // (GROUPS * COLUMNS)
    o_first = (i_tile * GROUPS + tl.arange(0, GROUPS))[None, :] * RUN + tl.arange(0, RUN)[:, None]
    b_token = tl.load(p_order + i_h * order_head + o_first, mask=o_first < seq, other=0)
    b_token = tl.broadcast_to(b_token[:, :, None], [RUN, GROUPS, COLUMNS]).reshape([TOKENS * COLUMNS])
    m_x = (o_place < seq) & (o_d < HEAD_SIZE)
    p_x += (i_b * x_batch + i_h * x_head) * PIECE
    o_x = tl.max_constancy(b_token, [COLUMNS]) * (tl.cast(x_token, tl.int64) * PIECE) + o_d * x_dim
    b_x = tl.load(p_x + o_x, mask=m_x, other=0.0)
    tl.store(p_out + ((i_b * seq + o_place) * heads + i_h) * HEAD_SIZE + o_d, b_x, mask=m_x)
    if UNIT > 0:
        b_sum = tl.sum(b_x.to(tl.float32).reshape([RUN, GROUPS, COLUMNS]), 0)
        OWNERS: tl.constexpr = UNIT // RUN
        if OWNERS > 1:
            b_sum = tl.sum(b_sum.reshape([GROUPS // OWNERS, OWNERS, COLUMNS]), 1)
        o_run = i_tile * (TOKENS // UNIT) + tl.arange(0, TOKENS // UNIT)
        o_column = tl.arange(0, COLUMNS)
        b_count = tl.minimum(seq - o_run * UNIT, UNIT).to(tl.float32)
        b_mean = b_sum / tl.maximum(b_count, 1.0)[:, None]
        o_mean = (((i_b * heads + i_h) * runs) + o_run)[:, None] * HEAD_SIZE + o_column[None, :]
        m_mean = (o_run < runs)[:, None] & (o_column < HEAD_SIZE)[None, :]
        tl.store(p_means + o_mean, b_mean.to(p_means.dtype.element_ty), mask=m_mean)


@triton.jit
def order_means_kernel(
    p_q,
    p_k,
    p_v,
    p_q_out,
    p_k_out,
    p_v_out,
    p_q_means,
    p_k_means,
    p_q_order,
    p_k_order,
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
    q_order_head,
    k_order_head,
    heads,
    seq,
    q_runs,
    k_runs,
    UNIT_Q: tl.constexpr,
    UNIT_K: tl.constexpr,
    OWN: tl.constexpr,
    PIECE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """out[b, place, head] = x[b, order[head, place], head], and the means of UNIT places each of q and k.

    One program moves TOKENS tokens of one head; heads of a token follow each other, as models keep them side by side.
    Out is contiguous [B, S, H, D], means are [B, H, runs, D]. Strides as in `gather_triton`.
    """
    i_h, i_tile = tl.program_id(0) % heads, tl.program_id(0) // heads
    i_b, role = tl.program_id(1).to(tl.int64), tl.program_id(2)
    i_h, i_tile = i_h.to(tl.int64), i_tile.to(tl.int64)
    if role == 0:
        _move(
            p_q, p_q_out, p_q_means, p_q_order, q_batch, q_head, q_token, q_dim, q_order_head, heads, seq, q_runs,
            i_tile, i_h, i_b, UNIT_Q, OWN, PIECE, HEAD_SIZE, COLUMNS, TOKENS,
        )  # fmt: skip
    elif role == 1:
        _move(
            p_k, p_k_out, p_k_means, p_k_order, k_batch, k_head, k_token, k_dim, k_order_head, heads, seq, k_runs,
            i_tile, i_h, i_b, UNIT_K, OWN, PIECE, HEAD_SIZE, COLUMNS, TOKENS,
        )  # fmt: skip
    else:
        _move(
            p_v, p_v_out, p_k_means, p_k_order, v_batch, v_head, v_token, v_dim, k_order_head, heads, seq, k_runs,
            i_tile, i_h, i_b, 0, OWN, PIECE, HEAD_SIZE, COLUMNS, TOKENS,
        )  # fmt: skip


def constants(units: tuple[int, int], head_size: int, piece: int) -> dict[str, int]:
    """The kernel's compile-time arguments."""
    columns = power_of_2(head_size)
    return {
        "UNIT_Q": units[0],
        "UNIT_K": units[1],
        "OWN": OWN,
        "PIECE": piece,
        "HEAD_SIZE": head_size,
        "COLUMNS": columns,
        "TOKENS": max(*units, 32 * WARPS * ELEMENTS // columns),
    }


def warps_for(tokens: int, columns: int) -> int:
    """Warps of a program that moves so many tokens of so many channels."""
    return tokens * columns // (32 * ELEMENTS)


def triton_order_with_means(
    q: Tensor, k: Tensor, v: Tensor, q_order: Tensor, k_order: Tensor, units: tuple[int, int], *, parts: bool
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The contract of `ordered.order_with_means` for runs of `ordered.UNITS` tokens.

    What is in order lies in memory as [B, S, H, D].
    """
    batch, heads, seq, head_size = q.shape
    dtype = q.dtype if parts else torch.float32
    q_means, k_means = (torch.empty(batch, heads, cdiv(seq, n), head_size, dtype=dtype, device=q.device) for n in units)
    return _moved((q, k, v), q_order, k_order, units, (q_means, k_means)), q_means, k_means


def triton_gather_heads(tensors: Sequence[Tensor], order: Tensor) -> list[Tensor]:
    """The contract of `gather_triton.triton_gather`, the tokens of a head at a time: for orders that differ by head."""
    # The kernel has three roles. Those that are not there are not launched, and none of them takes means.
    q, k, v = (*tensors, tensors[0], tensors[0])[:3]
    return _moved((q, k, v), order, order, (0, 0), (None, None), roles=len(tensors))


def _moved(
    tensors: tuple[Tensor, Tensor, Tensor],
    q_order: Tensor,
    k_order: Tensor,
    units: tuple[int, int],
    means: Sequence[Tensor | None],
    roles: int = 3,
) -> list[Tensor]:
    """The first `roles` tensors in their orders; writes the means of runs of `units` tokens, 0 for none."""
    batch, heads, seq, head_size = tensors[0].shape
    piece, strides = steps(*tensors)
    outs = [torch.empty(batch, seq, heads, head_size, dtype=x.dtype, device=x.device) for x in tensors[:roles]]
    fixed = constants(units, head_size, piece)
    q_order, k_order = q_order.contiguous(), k_order.contiguous()
    with device_of(q_order):
        launch_kernel(
            order_means_kernel, (cdiv(seq, fixed["TOKENS"]) * heads, batch, roles),
            *tensors, *outs, *outs[:1] * (3 - roles), *means, q_order, k_order, *strides,
            *(0 if len(order) == 1 else order.stride(0) for order in (q_order, k_order)),
            heads, seq, *(cdiv(seq, unit) if unit else 0 for unit in units), **fixed,
            num_warps=warps_for(fixed["TOKENS"], fixed["COLUMNS"]), enable_fp_fusion=True,
        )  # fmt: skip
    return [rearrange(out, "b s h d -> b h s d") for out in outs]
