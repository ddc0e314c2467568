"""Attention of a few query rows, over all keys and under several masks at once."""

import torch
from torch import Tensor

from sparse_dit.kernels.backends import CUDA_DTYPES
from sparse_dit.kernels.ops import DTYPES

# Sums of 64 rows of 256 channels do not fit a program's registers.
HEAD_SIZES = (64, 72, 88, 96, 128)
# Scores of rows held at once by the torch path.
SCORES = 2**26


def rows_under_masks(q: Tensor, k: Tensor, v: Tensor, masks: Tensor, *, scale: float) -> Tensor:
    """What a few queries get from all keys, and from those that each mask leaves.

    out[0] is softmax attention of the rows over all keys, out[1 + n] that over the keys of mask n: what head typing by
    sampled rows compares (Sparse VideoGen, arXiv 2502.01776). One pass over k and v for all of them. Floor: the bytes
    of k and v once.

    Args:
        q: the rows [B, H, R, D], fp16, bf16 or fp32.
        k, v: [B, H, S, D], like q, any strides.
        masks: bool [M, R, S], true where a row sees a key; each row sees at least one in each.
        scale: factor on the scores.

    Returns:
        fp32 [M + 1, B, H, R, D].

    Raises:
        ValueError: an argument is not as above.
    """
    _check(q, k, v, masks)
    if q.is_cuda and q.dtype in CUDA_DTYPES and q.shape[-1] in HEAD_SIZES:
        from sparse_dit.kernels.rows_triton import triton_rows

        return triton_rows(q, k, v, masks, scale)
    return torch_rows(q, k, v, masks, scale)


def torch_rows(q: Tensor, k: Tensor, v: Tensor, masks: Tensor, scale: float) -> Tensor:
    """The contract of `rows_under_masks`, some heads at a time; arguments already checked."""
    heads = max(1, SCORES // (q.shape[0] * q.shape[2] * k.shape[2]))
    found = []
    for some_q, some_k, some_v in zip(*(torch.split(x, heads, dim=1) for x in (q, k, v)), strict=True):
        scores, values = scale * some_q.float() @ some_k.float().mT, some_v.float()
        outs = [scores.softmax(dim=-1) @ values]
        outs += [scores.masked_fill(~mask, -torch.inf).softmax(dim=-1) @ values for mask in masks]
        found.append(torch.stack(outs))
    return torch.cat(found, dim=2)


def _check(q: Tensor, k: Tensor, v: Tensor, masks: Tensor) -> None:
    if q.dtype not in DTYPES or q.ndim != 4 or 0 in q.shape:
        raise ValueError(
            f"q: {q.dtype} {list(q.shape)}; valid: a non-empty [B, H, R, D] of {', '.join(map(str, DTYPES))}"
        )
    for name, x in (("k", k), ("v", v)):
        fits = x.ndim == 4 and x.shape == k.shape and (x.shape[:2], x.shape[3]) == (q.shape[:2], q.shape[3])
        if not fits or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name}: {x.dtype} {list(x.shape)} on {x.device}; valid: {q.dtype} [{q.shape[0]}, {q.shape[1]}, "
                f"tokens, {q.shape[3]}] on {q.device}, like q"
            )
    if masks.dtype is not torch.bool or masks.ndim != 3 or masks.shape[1:] != (q.shape[2], k.shape[2]):
        raise ValueError(
            f"masks: {masks.dtype} {list(masks.shape)}; valid: bool [masks, {q.shape[2]}, {k.shape[2]}], by q and k"
        )
