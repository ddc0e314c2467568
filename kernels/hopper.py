"""Launches the Hopper kernel: what it takes, its TMA descriptors, its arguments."""

import functools

import torch
import triton
from einops import rearrange
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sparse_dit.kernels.attention_hopper import hopper_forward_kernel
from sparse_dit.kernels.launch_order_triton import launch_order
from sparse_dit.kernels.means_hopper import hopper_means_kernel
from sparse_dit.kernels.quantize import GROUP, LOG2_E, Quantized

_PANEL = 64  # columns of 16 bits that one TMA box takes: 128 bytes, the widest swizzle
_TILE = 128  # keys, or means, of a stage
MEANS_PROGRAMS = 66  # that read k and v for their means, a multiprocessor each


def _descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """TMA descriptor of [B, H, rows, columns] for boxes of `rows` by `columns`; what lies outside is read as zeros."""
    bits = 8 * x.element_size()
    # Where there is one entry its stride is never used, and may be anything; TMA wants multiples of 16 bytes.
    strides = [128 // bits if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides[:-1], 1], [1, 1, rows, columns], _layout(columns, bits))


@functools.cache
def _layout(columns: int, bits: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(min(128, columns * bits // 8), bits, 4)


def hopper_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    order: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
    summary: bool,
) -> tuple[Tensor, Tensor]:
    """The contract of `ops.block_sparse_attention` where the Hopper kernel takes the call, arguments checked.

    With an order q, k and v are in it already; out and lse go to the tokens' own places. With `summary` blocks that are
    not listed enter as their means (`summary.merge_summaries` tells how).
    """
    wide = triton.next_power_of_2(q.shape[-1])
    descriptors = (_descriptor(q, 64, wide), _descriptor(k, block_k, _PANEL), _descriptor(v, block_k, _PANEL))
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])
    return _launch(descriptors, (*(None,) * 6, order), out, k.shape[2], indices, counts, scale * LOG2_E, summary)


def hopper_quantized_attention(
    codes: Quantized, indices: Tensor, counts: Tensor, order: Tensor | None, block_k: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The same on codes made with the same order. Returns out in `dtype` and lse, both in the tokens' own order."""
    wide, code_width = triton.next_power_of_2(codes.head_size), triton.next_power_of_2(codes.q.shape[-1])
    lift, top = (None, None) if codes.v_scale is None else _lift(codes.v_scale)
    d_v = _descriptor(codes.v, block_k, _PANEL) if top is None else _descriptor(codes.v, wide, block_k)
    descriptors = (_descriptor(codes.q, 64, code_width), _descriptor(codes.k, block_k, code_width), d_v)
    scales = (codes.q_scale, codes.lse_shift, codes.k_scale, lift, top, codes.v_mean, order)
    batch, heads, seq_q = codes.q_scale.shape
    out = torch.empty(batch, seq_q, heads, codes.head_size, dtype=dtype, device=codes.q.device)
    return _launch(descriptors, scales, out, codes.seq_k, indices, counts, 1.0, summary=False)


def _lift(v_scale: Tensor) -> tuple[Tensor, Tensor]:
    """What the kernel adds to the logarithms of weights, and what it divides sums by, to take the scales of values in.

    The largest weight, 1, becomes 2^8 where it meets values of the largest scale: E4M3 ends at 448.

    Args:
        v_scale: fp32 [B, H, groups], positive.

    Returns:
        lift, base 2, [B, H, groups], 8 at most; the largest scale [B, H].
    """
    top = v_scale.amax(dim=-1)
    return (v_scale / top[..., None]).log2_().add_(8.0), top


def _means(d_k: TensorDescriptor, d_v: TensorDescriptor) -> list[TensorDescriptor]:
    """Descriptors of the block means of k and of v [B, H, blocks, D], which are on their way when this returns.

    The kernel lets the one behind it start before it ends: that must be the one that waits for the means, and nothing
    may be launched in between.
    """
    batch, heads, seq, head_size = d_k.shape
    shape = (batch, heads, triton.cdiv(seq, d_k.block_shape[2]), head_size)
    keys, values = (d_k.base.new_empty(shape) for _ in "kv")
    hopper_means_kernel[(MEANS_PROGRAMS,)](
        d_k, d_v, keys, values, batch * heads, heads, seq,
        HEAD_SIZE=head_size, D=triton.next_power_of_2(head_size), num_warps=4,
    )  # fmt: skip
    return [_descriptor(x, _TILE, _PANEL) for x in (keys, values)]


def _launch(
    descriptors: tuple[TensorDescriptor, TensorDescriptor, TensorDescriptor],
    scales: tuple[Tensor | None, ...],
    out: Tensor,
    seq_k: int,
    indices: Tensor,
    counts: Tensor,
    scale: float,
    summary: bool,
) -> tuple[Tensor, Tensor]:
    """Runs the kernel; out [B, S, H, D] is fresh memory, the lists are still of size 1 where they are shared."""
    batch, seq_q, heads, head_size = out.shape
    out = rearrange(out, "b s h d -> b h s d")
    lse = torch.empty(batch, heads, seq_q, dtype=torch.float32, device=out.device)
    rows = launch_order(counts).expand(batch, heads, -1)
    indices = indices.expand(batch, heads, -1, -1)
    counts = counts.expand(batch, heads, -1)
    order = scales[-1]
    wide = triton.next_power_of_2(head_size)
    query_blocks = counts.shape[2]
    with torch.cuda.device_of(out):
        means = _means(*descriptors[1:]) if summary else (None, None)
        hopper_forward_kernel[(batch * heads * query_blocks,)](
            *descriptors, *means, *scales, out, lse, indices, counts, rows,
            0 if order is None or len(order) == 1 else order.stride(0),
            *out.stride()[:3], *indices.stride(), *counts.stride(), *rows.stride()[:2],
            heads, query_blocks, seq_q, seq_k, -(-seq_k // GROUP), head_size, scale,
            ORDERED=order is not None, D=wide, STAGES=3 if wide == 128 else 4, num_warps=4, launch_pdl=summary,
        )  # fmt: skip
    return out, lse
