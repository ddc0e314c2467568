"""Scores of blocks from those of their parts, without the matrix of the parts."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from sparse_dit.kernels.backends import CUDA_DTYPES, TRITON_HEAD_SIZES
from sparse_dit.kernels.ops import DTYPES
from sparse_dit.kernels.pool import block_means

REDUCTIONS = ("max", "logsumexp")
PARTS = (1, 2, 4, 8, 16, 32, 64)  # tokens of a part that the kernel of `part_means` takes
PER_K = (1, 2, 4, 8, 16)  # parts of a key block that the kernel of `part_scores` takes
# Scores of parts held at once by the torch path.
SCORES = 2**26


def part_scores(q: Tensor, k: Tensor, per_q: int, per_k: int, *, scale: float, reduction: str) -> Tensor:
    """The largest, or the log-sum-exp, of the scores of all pairs of parts of a query and a key block.

    score[I, J] = log sum over the parts i of I and j of J of exp(scale q_i.k_j), or max of scale q_i.k_j: the block
    scores of SubBlock (sgl-project/sglang, pull request 34148), of which the log-sum-exp estimates the block's mass.

    One pass over the products, nothing as large as their matrix stored: 2 P R D FLOP a head and two exponentials a
    score. At S = 118,800, H = 4 and parts of 16 tokens that matrix would take 0.9 GB.

    Args:
        q: means of the parts of queries [B, H, P, D], fp16, bf16 or fp32.
        k: means of the parts of keys [B, H, R, D], like q.
        per_q: parts of a query block, at least 1; the last block has what is left.
        per_k: parts of a key block, likewise.
        scale: positive factor on the products.
        reduction: one of `REDUCTIONS`.

    Returns:
        fp32 [B, H, ceil(P / per_q), ceil(R / per_k)].

    Raises:
        ValueError: an argument is not as above.
    """
    _check(q, k, per_q, per_k, reduction)
    _check_scale(scale)
    if q.is_cuda and q.dtype in CUDA_DTYPES and q.shape[-1] in TRITON_HEAD_SIZES and per_k in PER_K:
        from sparse_dit.kernels.scores_triton import triton_scores

        return triton_scores(q, k, per_q, per_k, scale, reduction)
    return torch_scores(q, k, per_q, per_k, scale, reduction)


def block_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """The scores scale q_i.k_j of means of blocks.

    2 QB KB D FLOP a head: 1.8 GFLOP and 28 MB of scores at S = 118,800, H = 4, D = 128 and blocks of 128 by 64. On
    NVIDIA GPUs a product of two numbers is off by up to 3 2^-20 of it, elsewhere it is one of fp32.

    Args:
        q: means of blocks of queries, fp32 [B, H, QB, D].
        k: means of blocks of keys, fp32 [B, H, KB, D].
        scale: positive factor.

    Returns:
        fp32 [B, H, QB, KB].

    Raises:
        ValueError: an argument is not as above.
    """
    if q.dtype != torch.float32:
        raise ValueError(f"q: {q.dtype}; valid: torch.float32, as means of blocks are")
    _check(q, k, 1, 1, REDUCTIONS[0])
    _check_scale(scale)
    if q.is_cuda:
        from sparse_dit.kernels.scores_triton import triton_block_scores

        return triton_block_scores(q, k, scale)
    return scale * q @ k.mT


def mark_unlike(scores: Tensor, q_alike: Tensor, k_alike: Tensor, least: float, *, lowest: bool) -> Tensor:
    """Marks the pairs of blocks that means do not stand for, because the tokens of either are unlike.

    Floor: the marks written once, 7 MB at S = 118,800, H = 4 and blocks of 128 by 64.

    Args:
        scores: contiguous fp32 [B, H, QB, KB], written to where `lowest`.
        q_alike: how alike the tokens of each block of queries are (`pool.block_similarity`), fp32 [B, H, QB].
        k_alike: likewise of keys, fp32 [B, H, KB].
        least: a block whose tokens are alike to no more than that is not judged by its mean.
        lowest: whether such blocks of keys get the lowest finite score. Not -inf: a softmax over nothing else is NaN.

    Returns:
        bool [B, H, QB, KB].

    Raises:
        ValueError: an argument is not as above.
    """
    if scores.dtype != torch.float32 or scores.ndim != 4 or not scores.is_contiguous():
        raise ValueError(f"scores: {scores.dtype} {list(scores.shape)}; valid: a contiguous fp32 [B, H, QB, KB]")
    batch, heads, rows, columns = scores.shape
    for name, alike, blocks in (("q_alike", q_alike, rows), ("k_alike", k_alike, columns)):
        if alike.shape != (batch, heads, blocks) or alike.device != scores.device:
            raise ValueError(
                f"{name}: {list(alike.shape)} on {alike.device}; valid: [{batch}, {heads}, {blocks}] on {scores.device}"
            )
    if scores.is_cuda:
        from sparse_dit.kernels.scores_triton import triton_mark_unlike

        return triton_mark_unlike(scores, q_alike, k_alike, least, lowest=lowest)
    unlike_k = (k_alike <= least)[..., None, :]
    if lowest:
        scores.masked_fill_(unlike_k, torch.finfo(scores.dtype).min)
    return unlike_k | (q_alike <= least)[..., None]


def part_means(x: Tensor, part: int, *, order: Tensor | None = None) -> Tensor:
    """The means of short runs of tokens, in the dtype that `part_scores` multiplies them in.

    Sums run in fp32. As `pool.block_means`, but for parts of a power of two of up to 64 tokens, of which one program
    takes sixteen. Floor: the bytes of x once.

    Args:
        x: tokens [B, H, S, D], fp16, bf16 or fp32, any strides.
        part: tokens a part, at least 1.
        order: int64 [1 or H, S], the token ids in the order in which they enter parts; None as they stand.

    Returns:
        [B, H, ceil(S / part), D], on a GPU in the dtype of x, as attention's own products are, else fp32.

    Raises:
        ValueError: as `pool.block_means`.
    """
    if x.is_cuda and x.dtype in CUDA_DTYPES:
        if part in PARTS:
            from sparse_dit.kernels.scores_triton import triton_part_means

            return triton_part_means(x, part, order)
        return block_means(x, part, order=order).to(x.dtype)
    return block_means(x, part, order=order)


def torch_scores(q: Tensor, k: Tensor, per_q: int, per_k: int, scale: float, reduction: str) -> Tensor:
    """The contract of `part_scores`, a bounded part of the scores at a time; arguments already checked."""
    q, k = q.float(), k.float()
    beyond = F.pad(torch.zeros(k.shape[2], device=q.device), (0, -k.shape[2] % per_k), value=1.0).bool()
    k = F.pad(k, (0, 0, 0, -k.shape[2] % per_k))
    rows = max(1, SCORES // (k[..., 0].numel() * per_q)) * per_q
    merged = []
    for some in torch.split(scale * q, rows, dim=2):
        scores = (some @ k.mT).masked_fill(beyond, -torch.inf)
        scores = F.pad(scores, (0, 0, 0, -scores.shape[2] % per_q), value=-torch.inf)
        if reduction == "max":
            merged.append(reduce(scores, "b h (n i) (m j) -> b h n m", "max", i=per_q, j=per_k))
        else:
            grouped = rearrange(scores, "b h (n i) (m j) -> b h n m (i j)", i=per_q, j=per_k)
            merged.append(grouped.logsumexp(dim=-1))
    return torch.cat(merged, dim=2)


def _check_scale(scale: float) -> None:
    if not 0 < scale < math.inf:
        raise ValueError(f"scale: {scale!r}; valid: a positive finite number")


def _check(q: Tensor, k: Tensor, per_q: int, per_k: int, reduction: str) -> None:
    if q.dtype not in DTYPES or q.ndim != 4 or 0 in q.shape:
        raise ValueError(
            f"q: {q.dtype} {list(q.shape)}; valid: a non-empty [B, H, P, D] of {', '.join(map(str, DTYPES))}"
        )
    fits = k.ndim == 4 and (k.shape[:2], k.shape[3]) == (q.shape[:2], q.shape[3]) and 0 not in k.shape
    if not fits or k.dtype != q.dtype or k.device != q.device:
        raise ValueError(
            f"k: {k.dtype} {list(k.shape)} on {k.device}; valid: {q.dtype} [{q.shape[0]}, {q.shape[1]}, parts, "
            f"{q.shape[3]}] on {q.device}, like q"
        )
    for name, per in (("per_q", per_q), ("per_k", per_k)):
        if per < 1:
            raise ValueError(f"{name}: {per}; valid: at least 1 part")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: {reduction!r}; valid: one of {REDUCTIONS}")
