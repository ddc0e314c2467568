"""What one sparse attention call keeps of whole attention, measured on a few query rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import einsum
from torch import Tensor

from sparse_dit.kernels.blocks import BlockList

_SCORES_BYTES = 2**27  # of the scores of all sampled rows that exist at once


@dataclass(frozen=True)
class Kept:
    """What was found in one call; fp32 [H] on the CPU each, means over batch entries.

    Attributes:
        density: computed tile area over full area.
        recall: the share of whole attention's mass that lies on computed keys, mean over the sampled rows.
        recall_min: the smallest such share of a row, and of a batch entry.
        error: relative L2 error of the sampled output rows, against whole attention in fp32.
    """

    density: Tensor
    recall: Tensor
    recall_min: Tensor
    error: Tensor


def kept_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockList,
    out: Tensor,
    rows: Tensor,
    *,
    scale: float,
    order: Tensor | None = None,
) -> Kept:
    """Compare a call with whole attention on sampled rows; nothing of size S x S exists at any time.

    Args:
        q, k, v: [B, H, S, D], as the call got them.
        blocks: what it computed.
        out: [B, H, S, D], what came of it.
        rows: int64 [R] on q's device, the query tokens to look at.
        scale: factor on the scores.
        order: int64 [1 or H, S], the order in which tokens enter blocks; None as they stand.
    """
    batch, heads, length, _ = q.shape
    position = _positions(order, heads, length, q.device)
    indices, counts = blocks.indices.expand(batch, heads, -1, -1), blocks.counts.expand(batch, heads, -1)
    found: list[tuple[Tensor, ...]] = []
    together = max(1, _SCORES_BYTES // (4 * batch * len(rows) * length))
    for first in range(0, heads, together):
        part = slice(first, min(first + together, heads))
        lists = BlockList(
            indices[:, part].contiguous(),
            counts[:, part].contiguous(),
            blocks.block_q,
            blocks.block_k,
            blocks.key_blocks,
        )
        mask = _computed(lists, position[part], rows)
        queries, keys = q[:, part, rows].float(), k[:, part].float()
        mass = (einsum(queries, keys, "b h r d, b h s d -> b h r s") * scale).softmax(-1)
        recall = (mass * mask).sum(-1)
        exact = mass @ v[:, part].float()
        error = (out[:, part, rows].float() - exact).norm(dim=(2, 3)) / exact.norm(dim=(2, 3))
        density = [
            BlockList(
                lists.indices[:, [head]], lists.counts[:, [head]], blocks.block_q, blocks.block_k, blocks.key_blocks
            ).density(length, length)
            for head in range(part.stop - part.start)
        ]
        found.append((torch.tensor(density), recall.mean((0, 2)), recall.amin((0, 2)), error.mean(0)))
    return Kept(*(torch.cat([figure.float().cpu() for figure in figures]) for figures in zip(*found, strict=True)))


def computed_keys(blocks: BlockList, order: Tensor | None, rows: Tensor, length: int) -> Tensor:
    """Bool [B, H, R, S]: whether a call computes each key token for each sampled query token.

    Args:
        blocks: what it computes.
        order: as `kept_of`.
        rows: int64 [R] on the lists' device, query tokens.
        length: tokens of the sequence.
    """
    return _computed(blocks, _positions(order, blocks.indices.shape[1], length, rows.device), rows)


def _positions(order: Tensor | None, heads: int, length: int, device: torch.device) -> Tensor:
    """int64 [H, S], where each token stands among the blocks: the inverse of the order."""
    tokens = torch.arange(length, device=device)[None] if order is None else order
    return tokens.argsort(dim=-1).expand(heads, -1)


def _computed(blocks: BlockList, position: Tensor, rows: Tensor) -> Tensor:
    """Bool [B, H, R, S]: whether the block list has each key for each sampled query.

    Args:
        blocks: lists of B batch entries and H heads.
        position: int64 [H, S], where each token stands among the blocks.
        rows: int64 [R], query tokens.
    """
    batch, heads, _, capacity = blocks.indices.shape
    query_block = position[:, rows] // blocks.block_q  # [H, R]
    chosen = query_block.expand(batch, -1, -1)
    entries = blocks.indices.masked_fill(blocks.unused(), blocks.key_blocks).long()
    entries = entries.gather(2, chosen[..., None].expand(-1, -1, -1, capacity))
    key_block = position // blocks.block_k  # [H, S]
    width = int(key_block.max()) + 1
    marks = torch.zeros(
        batch, heads, len(rows), max(width, blocks.key_blocks) + 1, dtype=torch.bool, device=rows.device
    )
    marks.scatter_(3, entries, True)
    return marks.gather(3, key_block[None, :, None].expand(batch, -1, len(rows), -1))
