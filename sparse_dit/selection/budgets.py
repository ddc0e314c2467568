"""Budgets that heads of a layer have of their own: some need few blocks for nearly all of their mass, others many."""

import torch

from sparse_dit.kernels.lists import lists_to_mask, top_k_lists
from sparse_dit.parallel import ALL_HERE, Heads

SPREADS = ("even", "recall", "gain")
RICH_ABOVE = 0.8  # recall above which a head's budget may be halved, as published
# Rows of blocks that `by_gain` looks at: it averages over rows, and sorts each.
ROWS = 128


def by_recall(
    mass: torch.Tensor,
    base: int,
    *,
    rich_above: float,
    block_q: int,
    block_k: int,
    forced: torch.Tensor | None = None,
    spread_over: Heads = ALL_HERE,
) -> torch.Tensor:
    """AdaSpa's two levels (arXiv 2502.21079): heads share unevenly, by the share of their mass that `base` would keep.

    n heads are above `rich_above`, of which at most half of all heads count; the n with the highest recall get half of
    the budget, and the n with the lowest half as much again. The mean stays.

    Args:
        mass: of blocks, fp32 [B, H, QB, KB], any unit that all rows share.
        base: blocks a row, the mean over heads.
        rich_above: recall above which a head's budget may be halved.
        block_q, block_k: tokens of a block.
        forced: bool, as `top_k_lists` takes it, blocks that are computed on top.
        spread_over: which of the layer's heads these are; budgets are shared by all of them.

    Returns:
        Blocks a row, int64 [B, H, 1].
    """
    here, k_blocks = mass.shape[1], mass.shape[-1]
    heads = spread_over.total(here)
    blocks = top_k_lists(mass, base, block_q=block_q, block_k=block_k, forced=forced)
    if forced is None:
        kept = mass.gather(-1, blocks.indices.long()).sum(dim=(-2, -1))
    else:
        kept = (mass * lists_to_mask(blocks, k_blocks)).sum(dim=(-2, -1))
    recall = spread_over.gather(kept / mass.sum(dim=(-2, -1)), axis=1)
    rich = (recall > rich_above).sum(dim=-1, keepdim=True).clamp(max=heads // 2)
    rank = recall.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    more = min(k_blocks, 2 * base - max(1, base // 2))
    less = 2 * base - more
    budgets = torch.full_like(rank, base).masked_fill(rank < rich, less).masked_fill(rank >= heads - rich, more)
    return spread_over.own(budgets, here, axis=1)[..., None]


def by_gain(
    scores: torch.Tensor, base: int, *, forced: torch.Tensor | None = None, spread_over: Heads = ALL_HERE
) -> torch.Tensor:
    """The budgets that keep the most mass in all heads together, every row of a head alike.

    A head's k-th block is worth the mean over rows (up to 128 of them) of their k-th largest mass. The H base blocks of
    highest worth are taken, and the first of every head.

    Args:
        scores: of blocks, fp32 [B, H, QB, KB]; a row's masses are its softmax.
        base: blocks a row, the mean over heads.
        forced: bool, as `top_k_lists` takes it, blocks that are computed on top.
        spread_over: which of the layer's heads these are; budgets are shared by all of them.

    Returns:
        Blocks a row, int64 [B, H, 1].
    """
    batch, here, rows, k_blocks = scores.shape
    heads = spread_over.total(here)
    step = -(-rows // ROWS)
    looked_at = scores[:, :, ::step].softmax(dim=-1)
    if forced is not None:
        looked_at = looked_at.masked_fill(forced[:, :, ::step], 0.0)
    worth = spread_over.gather(looked_at.sort(dim=-1, descending=True).values.mean(dim=2), axis=1)
    worth[..., 0] = torch.inf
    taken = worth.flatten(1).topk(heads * base, dim=-1, sorted=False).indices // k_blocks
    budgets = torch.zeros(batch, heads, dtype=torch.int64, device=scores.device)
    budgets.scatter_add_(1, taken, torch.ones_like(taken))
    return spread_over.own(budgets, here, axis=1)[..., None]
