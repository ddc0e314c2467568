"""Triton: tokens of q, k and v into the order in which they enter blocks, one launch for all of them.

Names as in `attention`: `i_` program index, `p_` pointer, `o_` offsets, `m_` mask, `b_` values on chip.
"""

# Triton kernel bodies are a language of their own: their arguments carry no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="operator, index, attr-defined, no-untyped-call"

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from sparse_dit.kernels.backends import CUDA_DTYPES
from sparse_dit.kernels.launches import cdiv, device_of, launch_kernel
from sparse_dit.kernels.ordered_triton import triton_gather_heads
from sparse_dit.kernels.pieces import steps

# Elements a program moves, TOKENS places by COLUMNS of all heads' channels: 8 KB in 16 bits. A thread has four
# loads of 16 bytes under way.
TOKENS, COLUMNS, WARPS = 8, 512, 4


@triton.jit
def _gather(
    p_x, p_out, p_order, x_batch, x_head, x_token, x_dim, order_head, heads, seq,
    i_b, SHARED: tl.constexpr, PIECE: tl.constexpr, HEAD_SIZE: tl.constexpr, TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    o_place = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    o_column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)  # of [heads HEAD_SIZE]
    o_head, o_dim = o_column // HEAD_SIZE, o_column % HEAD_SIZE
    m_place, m_column = o_place < seq, o_column < heads * HEAD_SIZE
    m_x = m_place[:, None] & m_column[None, :]
    if SHARED:
        o_token = tl.load(p_order + o_place, mask=m_place, other=0)[:, None]  # [TOKENS, 1]
    else:
        o_token = tl.load(p_order + o_place[:, None] + o_head[None, :] * order_head, mask=m_x, other=0)
    p_x += i_b * x_batch * PIECE
    o_x = (
        o_token * (tl.cast(x_token, tl.int64) * PIECE) + (o_head.to(tl.int64) * x_head * PIECE + o_dim * x_dim)[None, :]
    )
    b_x = tl.load(p_x + o_x, mask=m_x)
    p_row = p_out + (i_b * seq + o_place[:, None]) * heads * HEAD_SIZE
    tl.store(p_row + o_column[None, :], b_x, mask=m_x)


@triton.jit
def gather_kernel(
    p_q,
    p_k,
    p_v,
    p_q_out,
    p_k_out,
    p_v_out,
    p_order,
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
    seq,
    ROLES: tl.constexpr,
    SHARED: tl.constexpr,
    PIECE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out[b, place, head] = x[b, order[head, place], head], x the last ROLES of q, k and v, in programs (., ., b, x).

    Out is contiguous [B, S, H, D]. Strides but those of channels are in PIECE elements, as in `pool_triton`. The
    channels of all heads are one row, so that an order that heads share moves whole tokens.
    """
    i_b, role = (tl.program_id(2) // ROLES).to(tl.int64), tl.program_id(2) % ROLES + 3 - ROLES
    if role == 0:
        if ROLES == 3:
            _gather(
                p_q, p_q_out, p_order, q_batch, q_head, q_token, q_dim, order_head, heads, seq,
                i_b, SHARED, PIECE, HEAD_SIZE, TOKENS, COLUMNS,
            )  # fmt: skip
    elif role == 1:
        if ROLES >= 2:
            _gather(
                p_k, p_k_out, p_order, k_batch, k_head, k_token, k_dim, order_head, heads, seq,
                i_b, SHARED, PIECE, HEAD_SIZE, TOKENS, COLUMNS,
            )  # fmt: skip
    else:
        _gather(
            p_v, p_v_out, p_order, v_batch, v_head, v_token, v_dim, order_head, heads, seq,
            i_b, SHARED, PIECE, HEAD_SIZE, TOKENS, COLUMNS,
        )  # fmt: skip


def constants(roles: int, head_size: int, shared: bool, piece: int) -> dict[str, object]:
    """The kernel's compile-time arguments."""
    return {
        "ROLES": roles,
        "SHARED": shared,
        "PIECE": piece,
        "HEAD_SIZE": head_size,
        "TOKENS": TOKENS,
        "COLUMNS": COLUMNS,
    }


def triton_gather(tensors: Sequence[Tensor], order: Tensor) -> list[Tensor]:
    """`gather.gather_tokens` for one to three tensors in one pass.

    Floor: their bytes read and written once, 0.6 GB for three at S = 32,760, H = 12, D = 128 in 16 bits.

    Args:
        tensors: one to three [B, H, S, D] of one shape, dtype and device, any strides.
        order: int64 [1 or H, S], each row a permutation of the tokens.

    Returns:
        As many [B, H, S, D], laid out in memory as [B, S, H, D].
    """
    batch, heads, seq, head_size = tensors[0].shape
    if len(order) > 1 and tensors[0].dtype in CUDA_DTYPES:
        return triton_gather_heads(tensors, order)
    roles, order = len(tensors), order.contiguous()  # kernels step through rows
    piece, strides = steps(*tensors)
    outs = [x.new_empty((batch, seq, heads, head_size)) for x in tensors]
    absent = 3 - roles
    with device_of(tensors[0]):
        launch_kernel(
            gather_kernel, (cdiv(seq, TOKENS), cdiv(heads * head_size, COLUMNS), batch * roles),
            *(None,) * absent, *tensors, *(None,) * absent, *outs, order, *(0,) * (4 * absent), *strides,
            order.stride(0), heads, seq,
            **constants(roles, head_size, len(order) == 1, piece),
            num_warps=WARPS,
        )  # fmt: skip
    return [out.transpose(1, 2) for out in outs]
