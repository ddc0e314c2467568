"""The calibration of PAROAttention (arXiv 2506.16054, NeurIPS 2025): an order for each head, then blocks by their mass.

Its code is not public. Its printed score of an order adds a term that should be large to one that should be small and
takes the minimum of the sum; here the first counts with the opposite sign.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange

from sparse_dit.calibration.search import Findings, Found, Search, Seen, check_share
from sparse_dit.kernels.gather import gather_tokens
from sparse_dit.kernels.lists import lists_to_mask, pack_bits, top_k_lists
from sparse_dit.kernels.mass import block_mass
from sparse_dit.layout import TokenLayout
from sparse_dit.orders import Axes
from sparse_dit.orders.axes import FLATTENINGS
from sparse_dit.profiles import Pattern, video_blocks
from sparse_dit.selection.dynamic import blocks_of_share


@dataclass(frozen=True)
class Paro(Search):
    """The first pass scores the six flattenings of the grid for each head, over all calls; the second, in the order of
    the best, takes the block masses of each bin.

    A head's blocks are the ones of largest mass over the whole head; a row has its best one in any case.

    Args:
        density: share of the blocks.
        alpha: weight of sparsity against even blocks in the score of an order, in [0, 1]. The paper gives no value; 1
            is for sparsity alone, 0 for the quantization of attention weights by block alone.
        below: attention weights below this count as nothing (epsilon of the paper).
        share: a block is sparse when so much of it is nothing (sigma of the paper).
        query_blocks: so many blocks of queries, evenly spaced, are looked at for the score of an order; the paper
            looks at all of them.

    Raises:
        ValueError: a value is out of its range.
    """

    passes: ClassVar[int] = 2
    settling: ClassVar[frozenset[str]] = frozenset({"density"})

    density: float = 0.5
    alpha: float = 0.5
    below: float = 1e-3
    share: float = 0.9
    query_blocks: int = 16

    def __post_init__(self) -> None:
        check_share("density", self.density)
        check_share("share", self.share)
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha: {self.alpha!r}; valid: a number in [0, 1]")
        if self.query_blocks < 1:
            raise ValueError(f"query_blocks: {self.query_blocks!r}; valid: 1 or more")
        if not 0.0 < self.below < 1.0:
            raise ValueError(f"below: {self.below!r}; valid: a number above 0 and below 1")

    def bins(self, steps: int) -> tuple[int, ...]:
        """See `Search.bins`: every step of the first half by itself, the second half together."""
        return tuple(range(steps // 2 + 1))

    def look(self, seen: Seen, number: int, before: Any) -> dict[str, torch.Tensor]:
        """See `Search.look`: first `sparse` and `uneven` [H, 6], then `mass` fp16 [H, QB, KB]; blocks with video."""
        if number == 0:
            scores = [self.block_scores(seen, Axes(axes).table(seen.layout, 1)) for axes in FLATTENINGS]
            sparse, uneven = (torch.stack(score, dim=1) for score in zip(*scores, strict=True))
            return {"sparse": sparse, "uneven": uneven}
        axes = tuple(FLATTENINGS[place] for place in before[seen.layer].tolist())
        table = Axes(axes).table(seen.layout, len(axes))
        q, k, lse = (_ordered(x, table) for x in (seen.q, seen.k, seen.lse))
        mass = block_mass(q, k, lse, seen.block_q, seen.block_k, scale=seen.scale).mean(dim=0)
        q_blocks, k_blocks = (video_blocks(seen.layout, block) for block in (seen.block_q, seen.block_k))
        return {"mass": mass[:, :q_blocks, :k_blocks].half()}

    def block_scores(self, seen: Seen, table: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """How sparse and how uneven the blocks of attention among video tokens are in an order.

        Args:
            seen: the call.
            table: the order, int64 [1, S]; `None` as the tokens stand.

        Returns:
            fp32 [H] each: the share of sparse blocks (M_sparse), and the mean over blocks of the largest weight over
            the mean one (Psi, M_quant).
        """
        first, end = seen.layout.text_before, seen.layout.text_before + seen.layout.video_tokens
        q, k, lse = (_ordered(x, table)[:, :, first:end] for x in (seen.q, seen.k, seen.lse))
        keys, tokens = rearrange(k.float(), "b h s d -> b h d s"), k.shape[2]
        rows, columns = (_lengths(tokens, block, k.device) for block in (seen.block_q, seen.block_k))
        places = torch.arange(min(self.query_blocks, len(rows))) * len(rows) // min(self.query_blocks, len(rows))
        sparse, uneven = [], []
        for place in places.tolist():
            some = slice(place * seen.block_q, (place + 1) * seen.block_q)
            weights = (q[:, :, some].float() * seen.scale @ keys).sub_(lse[:, :, some, None]).exp_()
            # Behind the sequence nothing counts: neither as nothing nor as largest.
            pad = (0, -tokens % seen.block_k)
            low = _by_block(F.pad(weights < self.below, pad), seen.block_k).sum(dim=(2, 4))
            weights = _by_block(F.pad(weights, pad) if pad[1] else weights, seen.block_k)
            total, largest = weights.sum(dim=-1).sum(dim=2), weights.amax(dim=-1).amax(dim=2)
            area = rows[place] * columns
            sparse.append((low >= self.share * area).float().mean(dim=(0, 2)))
            # A block of zeros is even.
            uneven.append(torch.where(total > 0, largest * area / total, 1.0).mean(dim=(0, 2)))
        return torch.stack(sparse).mean(dim=0), torch.stack(uneven).mean(dim=0)

    def between(self, findings: Findings, layers: int) -> torch.Tensor:
        """See `Search.between`: places in `FLATTENINGS`, int64 [layers, H]."""
        return torch.stack(
            [
                best_axes(findings.mean("sparse", layer), findings.mean("uneven", layer), self.alpha)
                for layer in range(layers)
            ]
        )

    def settle(
        self, findings: Findings, before: Any, layout: TokenLayout, sizes: tuple[int, int], layers: int, bins: int
    ) -> Found:
        """See `Search.settle`."""
        masks = torch.stack(
            [
                torch.stack(
                    [
                        pack_bits(largest_blocks(findings.mean("mass", layer, number), self.density, sizes))
                        for layer in range(layers)
                    ]
                )
                for number in range(bins)
            ]
        )
        pattern = torch.zeros(bins, *before.shape, dtype=torch.uint8)
        return Found((Pattern("mask", self.density),), pattern, axes=before.to(torch.uint8), masks=masks)


def best_axes(sparse: torch.Tensor, uneven: torch.Tensor, alpha: float) -> torch.Tensor:
    """The order of each head with the smallest (1 - alpha) M_quant / sum M_quant - alpha M_sparse / sum M_sparse.

    Args:
        sparse: M_sparse of each order, [H, 6].
        uneven: M_quant of each order, [H, 6].
        alpha: weight of sparsity.

    Returns:
        int64 [H], places in `FLATTENINGS`; the first of equals.
    """
    good, bad = (score / score.sum(dim=1, keepdim=True).clamp(min=1e-30) for score in (sparse, uneven))
    return ((1.0 - alpha) * bad - alpha * good).argmin(dim=1)


def largest_blocks(mass: torch.Tensor, density: float, sizes: tuple[int, int]) -> torch.Tensor:
    """The blocks of the largest mass of each head, at least one a row.

    Args:
        mass: [H, QB, KB].
        density: share of the blocks.
        sizes: tokens of a query and of a key block.

    Returns:
        bool [H, QB, KB].
    """
    keep = blocks_of_share(density, mass.shape[-1])
    lists = top_k_lists(mass[None].float(), keep, block_q=sizes[0], block_k=sizes[1], per="head")
    return lists_to_mask(lists, mass.shape[-1])[0]


def _ordered(x: torch.Tensor, table: torch.Tensor | None) -> torch.Tensor:
    return x if table is None else gather_tokens(x, table.to(x.device))


def _by_block(x: torch.Tensor, block: int) -> torch.Tensor:
    return rearrange(x, "b h i (n j) -> b h i n j", j=block)


def _lengths(tokens: int, block: int, device: torch.device) -> torch.Tensor:
    """Tokens of each block, fp32."""
    return torch.tensor([min(block, tokens - first) for first in range(0, tokens, block)], device=device).float()
