"""The only door into attention along block lists, as a torch operator.

Backends are imported when they first run, so importing this module loads torch alone.
"""

import math
import os

import torch
from einops import rearrange
from torch import Tensor

from sparse_dit.kernels.blocks import BlockList

BACKENDS = ("triton", "host")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TRITON_CUDA_DTYPES = (torch.float16, torch.bfloat16)
TRITON_HEAD_SIZES = (64, 72, 88, 96, 128, 256)


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockList, *, scale: float | None = None, backend: str | None = None
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
        backend: "triton" or "host"; None is what `default_backend` says.

    Returns:
        out [B, H, Sq, D] in q's dtype, laid out in memory as [B, Sq, H, D]; lse fp32 [B, H, Sq], natural log.

    Raises:
        ValueError: an argument is not as above, or the backend cannot run it.
    """
    _check_tensors(q, k, v)
    _check_blocks(q, k, blocks)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not 0 < scale < math.inf:
        raise ValueError(f"scale: {scale!r}; valid: a positive finite number, or None for 1 / sqrt(D)")
    backend = _chosen_backend(q, backend)
    out, lse = _block_sparse_attention(
        q, k, v, blocks.indices, blocks.counts, blocks.block_q, blocks.block_k, scale, backend
    )
    return out, lse


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
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


def default_backend(q: Tensor) -> str:
    """The backend that None stands for: "triton" for 16-bit CUDA tensors, "host" for all others."""
    return "triton" if q.is_cuda and q.dtype in TRITON_CUDA_DTYPES else "host"


def _chosen_backend(q: Tensor, backend: str | None) -> str:
    chosen = default_backend(q) if backend is None else backend
    if chosen not in BACKENDS:
        raise ValueError(f"backend: {backend!r}; valid: one of {BACKENDS}, or None to choose by device and dtype")
    if chosen == "triton" and q.is_cuda and q.dtype not in TRITON_CUDA_DTYPES:
        raise ValueError(f"q: {q.dtype}; valid for backend 'triton' on CUDA: one of {TRITON_CUDA_DTYPES}")
    if chosen == "triton" and not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"backend: 'triton' with tensors on {q.device}; valid: CUDA tensors, or backend 'host'")
    if chosen == "triton" and not q.is_cuda and q.dtype is torch.bfloat16:
        # The interpreter multiplies the bits of bfloat16 as integers.
        raise ValueError("q: torch.bfloat16; valid in Triton's interpreter: torch.float16 or torch.float32")
    if chosen == "triton" and q.shape[-1] not in TRITON_HEAD_SIZES:
        raise ValueError(f"q: head size {q.shape[-1]}; valid for backend 'triton': one of {TRITON_HEAD_SIZES}")
    return chosen


@torch.library.custom_op("sparse_dit::block_sparse_attention", mutates_args=())
def _block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        from sparse_dit.kernels.attention import triton_attention as attention
    else:
        from sparse_dit.kernels.host import host_attention as attention
    return attention(q, k, v, indices, counts, block_q, block_k, scale)


@_block_sparse_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    batch, heads, seq_q, head_size = q.shape
    out = rearrange(q.new_empty(batch, seq_q, heads, head_size), "b s h d -> b h s d")
    return out, q.new_empty(batch, heads, seq_q, dtype=torch.float32)
