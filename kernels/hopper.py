"""Launches the Hopper kernel: what it takes, its TMA descriptors, its arguments."""

import functools
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sparse_dit.kernels.attention_hopper import hopper_forward_kernel
from sparse_dit.kernels.copies_hopper import MEANS_IN_ORDER
from sparse_dit.kernels.launch_order_triton import launch_order
from sparse_dit.kernels.launches import LIMIT, cdiv, device_of, launch_kernel, power_of_2
from sparse_dit.kernels.lift_triton import lifts
from sparse_dit.kernels.means_hopper import hopper_means_kernel
from sparse_dit.kernels.quantize import GROUP, LOG2_E, Quantized

_PANEL = 64  # columns of 16 bits that one TMA box takes: 128 bytes, the widest swizzle
_TILE = 128  # keys, or means, of a stage
MEANS_PROGRAMS = 44  # that read k and v for their means, a multiprocessor each
_described: dict[tuple[Any, ...], dict[str, Any]] = {}  # fields of descriptors but the tensor, by what they follow from


def _descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """TMA descriptor of [B, H, rows, columns] for boxes of `rows` by `columns`; what lies outside is read as zeros."""
    key = (x.shape, x.stride(), x.dtype, rows, columns)
    if fields := _described.get(key):
        # Without its checks, which found nothing before.
        descriptor = object.__new__(TensorDescriptor)
        descriptor.__dict__.update(fields, base=x)
        return descriptor
    bits = 8 * x.element_size()
    # Where there is one entry its stride is never used, and may be anything; TMA wants multiples of 16 bytes.
    strides = [128 // bits if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]
    descriptor = TensorDescriptor(x, list(x.shape), [*strides[:-1], 1], [1, 1, rows, columns], _layout(columns, bits))
    if len(_described) >= LIMIT:
        _described.clear()
    _described[key] = {**vars(descriptor), "base": None}
    return descriptor


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
    wide = power_of_2(q.shape[-1])
    descriptors = (_descriptor(q, 64, wide), _descriptor(k, block_k, _PANEL), _descriptor(v, block_k, _PANEL))
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])
    return _launch(descriptors, (*(None,) * 6, order), out, k.shape[2], indices, counts, scale * LOG2_E, summary)


def hopper_quantized_attention(
    codes: Quantized, indices: Tensor, counts: Tensor, order: Tensor | None, block_k: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The same on codes made with the same order. Returns out in `dtype` and lse, both in the tokens' own order."""
    wide, code_width = power_of_2(codes.head_size), power_of_2(codes.q.shape[-1])
    lift, top = (None, None) if codes.v_scale is None else lifts(codes.v_scale)
    d_v = _descriptor(codes.v, block_k, _PANEL) if top is None else _descriptor(codes.v, wide, block_k)
    descriptors = (_descriptor(codes.q, 64, code_width), _descriptor(codes.k, block_k, code_width), d_v)
    scales = (codes.q_scale, codes.lse_shift, codes.k_scale, lift, top, codes.v_mean, order)
    batch, heads, seq_q = codes.q_scale.shape
    out = torch.empty(batch, seq_q, heads, codes.head_size, dtype=dtype, device=codes.q.device)
    return _launch(descriptors, scales, out, codes.seq_k, indices, counts, 1.0, summary=False)


def _means(d_k: TensorDescriptor, d_v: TensorDescriptor) -> list[TensorDescriptor]:
    """Descriptors of the block means of k and of v [B, H, blocks, D], which are on their way when this returns.

    The kernel lets the one behind it start before it ends: that must be the one that waits for the means, and nothing
    may be launched in between.
    """
    batch, heads, seq, head_size = d_k.shape
    shape = (batch, heads, cdiv(seq, d_k.block_shape[2]), head_size)
    keys, values = (d_k.base.new_empty(shape) for _ in "kv")
    launch_kernel(
        hopper_means_kernel, (MEANS_PROGRAMS,), keys, values, batch * heads, heads, seq,
        HEAD_SIZE=head_size, D=power_of_2(head_size), num_warps=4, boxes=(d_k, d_v),
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
    out = out.transpose(1, 2)  # einops would take as long as the launch
    lse = out.new_empty((batch, heads, seq_q), dtype=torch.float32)
    rows = launch_order(counts)
    order = scales[-1]
    wide = power_of_2(head_size)
    query_blocks = counts.shape[2]
    turns = summary and _takes_turns(seq_k, descriptors[1].block_shape[2])
    with device_of(out):
        means = _means(*descriptors[1:]) if summary else (None, None)
        launch_kernel(
            hopper_forward_kernel, (batch * heads * query_blocks,),
            *scales, out, lse, indices, counts, rows,
            0 if order is None or len(order) == 1 else order.stride(0),
            *out.stride()[:3], *_shared(indices), *_shared(counts), *_shared(rows)[:2],
            heads, query_blocks, seq_q, seq_k, -(-seq_k // GROUP), head_size, scale,
            ORDERED=order is not None, TURNS=turns, D=wide, STAGES=3 if wide == 128 else 4,
            num_warps=4, launch_pdl=summary,
            boxes=(*descriptors, *means),
        )  # fmt: skip
    return out, lse


def _takes_turns(seq_k: int, block_k: int) -> bool:
    """Whether rows start at different tiles of means."""
    return cdiv(cdiv(seq_k, block_k), _TILE) > int(MEANS_IN_ORDER.value)


def _shared(lists: Tensor) -> list[int]:
    """Strides of a part of the lists, 0 where it is shared by batch entries or heads."""
    sizes, strides = lists.shape, list(lists.stride())
    return [0 if sizes[0] == 1 else strides[0], 0 if sizes[1] == 1 else strides[1], *strides[2:]]
