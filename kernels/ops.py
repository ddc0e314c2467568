"""The only door into attention along block lists, as a torch operator.

Backends are imported when they first run, so importing this module loads torch alone.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from sparse_dit.kernels import memory
from sparse_dit.kernels.alike import remembered
from sparse_dit.kernels.backends import chosen_backend, hopper_quantize_refusal
from sparse_dit.kernels.blocks import BlockList
from sparse_dit.kernels.gather import gather_tokens, in_token_order
from sparse_dit.kernels.recorder import noting

PRECISIONS = ("native", "int8", "int8_fp8")
SKIPPED = ("drop", "summary")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockList,
    *,
    scale: float | None = None,
    precision: str = "native",
    order: Tensor | None = None,
    ordered: Sequence[Tensor] | None = None,
    skipped: str = "drop",
    pv_threshold: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query block over its listed key blocks; inference only.

    lse_i = log sum_j exp(scale q_i.k_j), out_i = sum_j exp(scale q_i.k_j - lse_i) v_j, j over the tokens of the key
    blocks listed for the block of i. Softmax and sums run in fp32 whatever the inputs. The online softmax over blocks
    is FlashAttention's (Dao et al. 2022, arXiv:2205.14135, algorithm 1).

    Args:
        q: queries [B, H, Sq, D], fp16, bf16 or fp32, any strides.
        k: keys [B, H, Sk, D], like q.
        v: values [B, H, Sk, D], like q.
        blocks: the lists, on q's device; ceil(Sq / block_q) rows, entries below ceil(Sk / block_k).
        scale: positive factor on the scores; None is 1 / sqrt(D).
        precision: "native", products of the inputs as they are; "int8", scores from INT8 codes of q and of smoothed k
            (SageAttention, arXiv:2410.02367), weights and v in the inputs' 16 bits; "int8_fp8", weights and v in E4M3,
            too (SageAttention2, arXiv:2411.10958). What is rounded how is told by `quantize.Quantized`. The "host"
            backend computes in fp32 from the same codes: it shows what a precision costs in accuracy and is not faster.
        order: int64 [1 or H, S] on q's device, each row a permutation: the ids of the tokens in the order in which they
            enter blocks; needs Sq = Sk = S. None: as they stand. Values are not read back for a check.
        ordered: q, k and v in the order, where somebody has brought them into it before (`ordered.order_with_means`):
            no kernel then gathers them again. Keys and values may lie in an order of their own there, unless skipped
            blocks are summarized. Taken on trust, too.
        skipped: what becomes of blocks that a row does not list: "drop", nothing; "summary", each enters the row's
            softmax as one more key, the mean of its k and v in the inputs' dtype, with the weight of its count of
            tokens, and in the lse, too (`summary.merge_summaries`). The cost is that of these keys. Rows that list
            every block are the same to the bit.
        pv_threshold: None, or a positive distance in natural log units: the value product of a tile of keys (a listed
            block or a part of it) is left out for a group of rows (those of a query block or a part of it) if in every
            row of the group the largest score of the tile lies further than that below the largest of the row up to and
            with the tile, in ascending order of keys. The sums, and lse with them, still take its weights (SpargeAttn,
            arXiv:2502.18137, algorithm 1). Where n keys are left out, out moves by at most n exp(-pv_threshold) max |v|
            (twice that in "int8_fp8", which subtracts a mean from v). Which ones they are depends on the backend's
            tiles. The Hopper kernel leaves none out, and refuses.
        backend: "hopper", "triton" or "host"; None is what `backends.default_backend` says.

    Returns:
        out [B, H, Sq, D] in q's dtype, laid out in memory as [B, Sq, H, D]; lse fp32 [B, H, Sq], natural log. Both in
        the tokens' own order, whatever the order of the blocks.

    Raises:
        ValueError: an argument is not as above, or the backend or the device cannot run it.
        torch.OutOfMemoryError: the GPU lacks memory for what the call allocates, which the message tells. Large calls
            (`memory.LARGE`) find out before anything is launched.
    """
    backend = _checked(q, k, v, blocks, order, scale, precision, skipped, pv_threshold, backend)
    _check_ordered(q, order, ordered)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    recorded = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    run: Any = _traced if recorded or torch.compiler.is_compiling() else _eager
    if noting.recorder is not None:
        run = _computed  # the mode that notes sees an operator as a whole otherwise
    out, lse = run(
        q,
        k,
        v,
        blocks.indices,
        blocks.counts,
        order,
        blocks.block_q,
        blocks.block_k,
        scale,
        precision,
        backend,
        skipped,
        pv_threshold,
        *(ordered or (None, None, None)),
    )
    return out, lse


@remembered
def _checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockList,
    order: Tensor | None,
    scale: float | None,
    precision: str,
    skipped: str,
    pv_threshold: float | None,
    backend: str | None,
) -> str:
    """The backend of a call whose arguments are as they must be. Raises ValueError otherwise."""
    check_attention(q, k, v, scale)
    _check_blocks(q, k, blocks)
    _check_order(q, k, order)
    if precision not in PRECISIONS:
        raise ValueError(f"precision: {precision!r}; valid: one of {PRECISIONS}")
    if skipped not in SKIPPED:
        raise ValueError(f"skipped: {skipped!r}; valid: one of {SKIPPED}")
    if pv_threshold is not None and not 0 < pv_threshold < math.inf:
        raise ValueError(f"pv_threshold: {pv_threshold!r}; valid: a positive finite number, or None to skip nothing")
    return chosen_backend(q, k, v, blocks, precision, backend, pv_threshold)


def check_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> None:
    """Raises ValueError unless attention of any kind can be computed of q, k and v [B, H, S, D] with a scale."""
    if q.dtype not in DTYPES:
        raise ValueError(f"q: {q.dtype}; valid: one of {', '.join(map(str, DTYPES))}")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 4 or 0 in tensor.shape:
            raise ValueError(f"{name}: shape {list(tensor.shape)}; valid: a non-empty tensor [B, H, S, D]")
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(f"{name}: {tensor.dtype} on {tensor.device}; valid: {q.dtype} on {q.device}, like q")
    expected = [*q.shape[:2], k.shape[2], q.shape[3]]
    for name, tensor in (("k", k), ("v", v)):
        if list(tensor.shape) != expected:
            raise ValueError(f"{name}: shape {list(tensor.shape)}; valid: {expected}, by the shapes of q and k")
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale: {scale!r}; valid: a positive finite number, or None for 1 / sqrt(D)")


def _check_blocks(q: Tensor, k: Tensor, blocks: BlockList) -> None:
    if blocks.indices.device != q.device:
        raise ValueError(f"blocks: on {blocks.indices.device}; valid: {q.device}, where q is (see BlockList.to)")
    for name, size, full in (
        ("batch entries", blocks.indices.shape[0], q.shape[0]),
        ("heads", blocks.indices.shape[1], q.shape[1]),
    ):
        if size not in (1, full):
            raise ValueError(f"blocks: lists for {size} {name}; valid: 1 or {full}, as q has")
    blocks.check_lengths(q.shape[2], k.shape[2])


def _check_order(q: Tensor, k: Tensor, order: Tensor | None) -> None:
    if order is None:
        return
    heads, seq = q.shape[1:3]
    if k.shape[2] != seq:
        raise ValueError(
            f"order: given for {seq} queries and {k.shape[2]} keys; valid: as many queries as keys, or None"
        )
    # Sizes one by one: torch.compile with dynamic shapes cannot look a list of them up in a tuple of lists.
    fits = order.ndim == 2 and order.shape[1] == seq and (order.shape[0] == 1 or order.shape[0] == heads)
    if order.dtype is not torch.int64 or not fits:
        raise ValueError(f"order: {order.dtype} {list(order.shape)}; valid: torch.int64 [1, {seq}] or [{heads}, {seq}]")
    if order.device != q.device:
        raise ValueError(f"order: on {order.device}; valid: {q.device}, where q is")


def _check_ordered(q: Tensor, order: Tensor | None, ordered: Sequence[Tensor] | None) -> None:
    if ordered is None:
        return
    if order is None:
        raise ValueError("ordered: given without an order; valid: None, or q, k and v in the order given")
    for x in ordered:
        if len(ordered) != 3 or x.shape != q.shape or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"ordered: {len(ordered)} tensors, {x.dtype} {list(x.shape)} on {x.device}; valid: q, k and v, "
                f"{q.dtype} {list(q.shape)} on {q.device}, like q"
            )


def _computed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    order: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
    precision: str,
    backend: str,
    skipped: str = "drop",
    pv_threshold: float | None = None,
    q_ordered: Tensor | None = None,
    k_ordered: Tensor | None = None,
    v_ordered: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    lists = (indices, counts, order, block_q, block_k)
    ordered = None
    if q_ordered is not None and k_ordered is not None and v_ordered is not None:
        ordered = (q_ordered, k_ordered, v_ordered)
    gathers = order if ordered is None else None
    try:
        if backend != "host" and q.nbytes >= memory.LARGE:
            memory.reserve(q, k, gathers, precision, backend)
        out, lse = _attend(q, k, v, *lists, scale, precision, backend, skipped, pv_threshold, ordered)
    except torch.OutOfMemoryError as error:
        # Every kernel is launched on memory that is there: at most what led up to the attention has run.
        raise torch.OutOfMemoryError(memory.told_shortage(q, k, gathers, precision, backend)) from error
    # In 16 bits the Hopper kernel attends to summaries itself.
    if skipped == "summary" and (backend, precision) != ("hopper", "native"):
        from sparse_dit.kernels.summary import merge_summaries

        blocks = BlockList(indices, counts, block_q, block_k, key_blocks=-(-k.shape[2] // block_k))
        merge_summaries(out, lse, q, k, v, blocks, scale=scale, order=order, backend=backend)
    return out, lse


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    order: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
    precision: str,
    backend: str,
    skipped: str,
    pv_threshold: float | None,
    ordered: Sequence[Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Attention along the lists, in the tokens' own order; where the Hopper kernel can, with summaries."""
    lists = (indices, counts, block_q, block_k)
    order = None if order is None else order.contiguous()  # kernels step through rows
    if precision != "native":
        from sparse_dit.kernels.quantize import quantize

        tensors, by = ((q, k, v), order) if ordered is None else (ordered, None)
        # Hopper's attention takes codes of more head sizes than its quantization makes.
        on = "triton" if backend == "hopper" and hopper_quantize_refusal(*tensors) else backend
        codes = quantize(*tensors, precision=precision, scale=scale, order=by, backend=on)
        if backend == "hopper":
            from sparse_dit.kernels.hopper import hopper_quantized_attention

            return hopper_quantized_attention(codes, indices, counts, order, block_k, q.dtype)
        if backend == "triton":
            from sparse_dit.kernels.attention_int8 import triton_quantized_attention

            return triton_quantized_attention(codes, indices, counts, order, block_q, block_k, q.dtype, pv_threshold)
        from sparse_dit.kernels.host import host_quantized_attention

        return in_token_order(*host_quantized_attention(codes, *lists, q.dtype, pv_threshold), order)
    if backend == "host":
        from sparse_dit.kernels.host import host_attention

        if ordered is not None:
            q, k, v = ordered
        elif order is not None:
            q, k, v = (gather_tokens(x, order) for x in (q, k, v))
        return in_token_order(*host_attention(q, k, v, *lists, scale, pv_threshold), order)
    if order is not None and ordered is None:
        from sparse_dit.kernels.gather_triton import triton_gather

        # The portable kernel finds its queries by the order, too.
        ordered = triton_gather((k, v), order) if backend == "triton" else triton_gather((q, k, v), order)
    if backend == "triton":
        from sparse_dit.kernels.attention import triton_attention

        k, v = (k, v) if ordered is None else ordered[-2:]
        return triton_attention(q, k, v, indices, counts, order, block_q, block_k, scale, pv_threshold)
    from sparse_dit.kernels.hopper import hopper_attention

    q, k, v = (q, k, v) if ordered is None else ordered
    return hopper_attention(q, k, v, indices, counts, order, block_q, block_k, scale, skipped == "summary")


def _shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    order: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
    precision: str,
    backend: str,
    skipped: str = "drop",
    pv_threshold: float | None = None,
    q_ordered: Tensor | None = None,
    k_ordered: Tensor | None = None,
    v_ordered: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch, heads, seq_q, head_size = q.shape
    out = rearrange(q.new_empty(batch, seq_q, heads, head_size), "b s h d -> b h s d")
    return out, q.new_empty(batch, heads, seq_q, dtype=torch.float32)


# Two operators of one function. With what `custom_op` puts around it, above all an error where gradients are asked for,
# a call takes the host three times as long as with nothing around it.
_traced = torch.library.custom_op("sparse_dit::block_sparse_attention", _computed, mutates_args=())
_traced.register_fake(_shapes)
_library = torch.library.Library("sparse_dit", "FRAGMENT")
_library.define("block_sparse_attention_eager" + torch.library.infer_schema(_computed, mutates_args=()))
_library.impl("block_sparse_attention_eager", _computed, "CompositeExplicitAutograd")
torch.library.register_fake("sparse_dit::block_sparse_attention_eager", _shapes, lib=_library)
_eager = torch.ops.sparse_dit.block_sparse_attention_eager.default
OPERATORS = frozenset((torch.ops.sparse_dit.block_sparse_attention.default, _eager))
"""What a `TorchDispatchMode` sees calls of attention along block lists as."""
