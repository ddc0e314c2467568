"""Skipped blocks as summaries: each enters the softmax as one pseudo-key, its mean K and V, weighed by its count.

A second attention, of all queries over the pseudo-keys of the blocks that their lists leave out, is merged exactly with
the first, along the lists; in 16 bits the Hopper kernel does both at once (`attention_hopper`). This is how Sol-Attn
(arXiv:2607.24027) treats blocks below its cutoff, and the zeroth order of PISA (arXiv:2602.01077). exp is convex, so
the weight of a mean is at most the mean of the weights: the mass of a skipped block is underestimated. No correction of
that is applied.

Floor, of S queries and N = S / block_k pseudo-keys a head, with q and out read and out written again: at S = 32,760,
H = 12, D = 128 in 16 bits and 64 keys a block 103 GFLOP (0.14 ms at 750 TFLOP/s) or 0.3 GB (0.08 ms at 4 TB/s), and
0.05 ms for the means of k and v.
"""

import math

import torch
from torch import Tensor

from sparse_dit.kernels.blocks import BlockList
from sparse_dit.kernels.gather import gather_tokens, scatter_tokens
from sparse_dit.kernels.lists import lists_to_mask
from sparse_dit.kernels.pool import block_means

# Elements of the matrix of scores that the torch path holds at once.
SCORES = 2**24


def merge_summaries(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockList,
    *,
    scale: float,
    order: Tensor | None,
    backend: str,
) -> None:
    """Adds the skipped blocks to what attention along the lists computed, in place; arguments already checked.

    With lse_j = scale q.mean_k_j + log n_j for each block j of n_j tokens that is not listed for the block of q, and
    total = log(exp(lse) + sum_j exp(lse_j)):

        out' = exp(lse - total) out + sum_j exp(lse_j - total) mean_v_j,  lse' = total.

    Means are rounded to the dtype of k, as the kernels take them; rows with all blocks listed stay as they are, bit for
    bit. Nothing waits for the device.

    Args:
        out: [B, H, Sq, D], in the tokens' own order; changed.
        lse: fp32 [B, H, Sq], natural log, contiguous; changed.
        q: queries [B, H, Sq, D], in the tokens' own order whatever `order` is, like k and v.
        k: keys [B, H, Sk, D].
        v: values [B, H, Sk, D].
        blocks: the lists that out and lse were computed along.
        scale: factor on the scores.
        order: int64 [1 or H, S], token ids in the order in which they enter blocks, or None.
        backend: that of the call; what the Hopper kernel computed on codes is merged by the portable Triton kernel.
    """
    if backend == "host":
        mean_k, mean_v = (block_means(x, blocks.block_k, order=order).to(x.dtype) for x in (k, v))
        _torch_merge(out, lse, q, mean_k, mean_v, blocks, k.shape[2], scale, order)
    else:
        from sparse_dit.kernels.summary_triton import triton_merge

        triton_merge(out, lse, q, k, v, blocks, scale, order)


def summary_logits(blocks: BlockList, seq_k: int) -> Tensor:
    """What is added to the score of each pseudo-key: log of the tokens in its block, or -inf where it is listed.

    Args:
        blocks: the lists.
        seq_k: keys; the last block may be ragged.

    Returns:
        fp32 [B or 1, H or 1, QB, KB], natural log, on the lists' device.
    """
    key_blocks = -(-seq_k // blocks.block_k)
    listed = lists_to_mask(blocks, key_blocks)
    logits = torch.full(listed.shape, math.log(blocks.block_k), device=listed.device)
    logits[..., -1] = math.log(seq_k - (key_blocks - 1) * blocks.block_k)
    return logits.masked_fill_(listed, -torch.inf)


def _torch_merge(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    mean_k: Tensor,
    mean_v: Tensor,
    blocks: BlockList,
    seq_k: int,
    scale: float,
    order: Tensor | None,
) -> None:
    logits = summary_logits(blocks, seq_k)
    keys, values = mean_k.float().mT, mean_v.float()
    in_order = (q, out, lse) if order is None else (gather_tokens(x, order) for x in (q, out, lse))
    ordered_q, ordered_out, ordered_lse = in_order
    width = q.shape[0] * q.shape[1] * logits.shape[-1]
    at_once = max(1, SCORES // (width * blocks.block_q))  # query blocks
    for first in range(0, logits.shape[2], at_once):
        rows = slice(first * blocks.block_q, (first + at_once) * blocks.block_q)
        query, listed_out, listed_lse = (x[:, :, rows] for x in (ordered_q, ordered_out, ordered_lse))
        added = logits[:, :, first : first + at_once].repeat_interleave(blocks.block_q, dim=2)
        scores = query.float() * scale @ keys + added[:, :, : query.shape[2]]
        total = torch.logaddexp(listed_lse, scores.logsumexp(dim=-1))
        merged = (scores - total[..., None]).exp() @ values
        listed_out.copy_(merged.add_((listed_lse - total).exp()[..., None] * listed_out))
        listed_lse.copy_(total)
    if order is not None:
        scatter_tokens(ordered_out, order, out)
        scatter_tokens(ordered_lse, order, lse)
