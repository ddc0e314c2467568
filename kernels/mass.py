"""Exact block mass: how much of the softmax each key block takes from each query block."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from sparse_dit.kernels.backends import CUDA_DTYPES, TRITON_HEAD_SIZES
from sparse_dit.kernels.blocks import BLOCK_SIZES
from sparse_dit.kernels.ops import DTYPES

# Scores held at once by the torch path.
SCORES = 2**22


def block_mass(q: Tensor, k: Tensor, lse: Tensor, block_q: int, block_k: int, *, scale: float | None = None) -> Tensor:
    """The share of attention that each query block gives each key block, under a given log-sum-exp.

    mass[I, J] = mean over the tokens i of block I of sum over the tokens j of block J of exp(scale q_i.k_j - lse_i).
    With the lse of dense attention over the same q and k every row sums to 1. With another, such as that of an earlier
    denoising step, it is that formula and nothing else. This is the search of AdaSpa (arXiv:2502.21079), whose second
    and later passes reuse an old lse.

    One pass over QK, nothing quadratic stored but the mass itself. Floor: 2 S^2 D H FLOP, half of a dense forward, and
    one exponential a score.

    Args:
        q: queries [B, H, Sq, D], fp16, bf16 or fp32, any strides.
        k: keys [B, H, Sk, D], like q.
        lse: fp32 [B, H, Sq], natural log, as `ops.block_sparse_attention` returns it.
        block_q: query tokens a block, one of BLOCK_SIZES.
        block_k: key tokens a block, one of BLOCK_SIZES.
        scale: positive factor on the scores; None is 1 / sqrt(D).

    Returns:
        fp32 [B, H, ceil(Sq / block_q), ceil(Sk / block_k)].

    Raises:
        ValueError: an argument is not as above, or q is 16-bit on CUDA with a head size that the Triton kernel lacks.
    """
    _check(q, k, lse, block_q, block_k)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not 0 < scale < math.inf:
        raise ValueError(f"scale: {scale!r}; valid: a positive finite number, or None for 1 / sqrt(D)")
    if q.is_cuda and q.dtype in CUDA_DTYPES:
        if q.shape[-1] not in TRITON_HEAD_SIZES:
            raise ValueError(f"q: head size {q.shape[-1]}; valid on CUDA in 16 bits: one of {TRITON_HEAD_SIZES}")
        from sparse_dit.kernels.mass_triton import triton_mass

        return triton_mass(q, k, lse, block_q, block_k, scale)
    return torch_mass(q, k, lse, block_q, block_k, scale)


def torch_mass(q: Tensor, k: Tensor, lse: Tensor, block_q: int, block_k: int, scale: float) -> Tensor:
    """The contract of `block_mass`, a bounded part of the scores at a time; arguments already checked."""
    batch, heads, seq_k = k.shape[:3]
    keys = rearrange(k.float(), "b h s d -> b h d s")
    rows = max(1, SCORES // (batch * heads * seq_k * block_q)) * block_q
    parts = []
    for query, log_sum in zip(torch.split(q, rows, dim=2), torch.split(lse, rows, dim=2), strict=True):
        weights = ((query.float() * scale) @ keys).sub_(log_sum[..., None]).exp_()
        columns = rearrange(F.pad(weights, (0, -seq_k % block_k)), "b h i (n j) -> b h i n j", j=block_k).sum(dim=-1)
        whole = query.shape[2] // block_q * block_q
        parts.append(rearrange(columns[:, :, :whole], "b h (m i) n -> b h m i n", i=block_q).mean(dim=3))
        if whole < query.shape[2]:
            parts.append(columns[:, :, whole:].mean(dim=2, keepdim=True))
    return torch.cat(parts, dim=2)


def _check(q: Tensor, k: Tensor, lse: Tensor, block_q: int, block_k: int) -> None:
    for name, size in (("block_q", block_q), ("block_k", block_k)):
        if size not in BLOCK_SIZES:
            raise ValueError(f"{name}: {size!r}; valid: one of {BLOCK_SIZES}")
    if q.dtype not in DTYPES or q.ndim != 4 or 0 in q.shape:
        raise ValueError(
            f"q: {q.dtype} {list(q.shape)}; valid: a non-empty [B, H, S, D] of {', '.join(map(str, DTYPES))}"
        )
    expected = [q.shape[0], q.shape[1], k.shape[2] if k.ndim == 4 else 0, q.shape[3]]
    if k.dtype != q.dtype or k.device != q.device or list(k.shape) != expected or 0 in k.shape:
        raise ValueError(
            f"k: {k.dtype} {list(k.shape)} on {k.device}; valid: {q.dtype} [{q.shape[0]}, {q.shape[1]}, tokens, "
            f"{q.shape[3]}] on {q.device}, like q"
        )
    if lse.dtype is not torch.float32 or lse.device != q.device or lse.shape != q.shape[:3]:
        raise ValueError(
            f"lse: {lse.dtype} {list(lse.shape)} on {lse.device}; valid: torch.float32 {list(q.shape[:3])} "
            f"on {q.device}, by the shape of q"
        )
