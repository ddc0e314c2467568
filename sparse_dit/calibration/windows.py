"""The window search of sliding tile attention, STA (arXiv 2502.04507): one of a few windows for each head and step."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch

from sparse_dit.calibration.search import Findings, Found, Search, Seen, check_share, every_step, pointed
from sparse_dit.kernels.lists import mask_to_lists
from sparse_dit.layout import TokenLayout
from sparse_dit.profiles import Pattern
from sparse_dit.selection import Chosen
from sparse_dit.selection.profile import pattern_mask, pattern_order
from sparse_dit.selection.window import Extent

# By the tiles of T, H, W: the windows searched for Wan at 69 x 768 x 1280, and those shipped for HunyuanVideo.
PUBLISHED: dict[Extent, tuple[Extent, ...]] = {
    (3, 6, 10): ((3, 1, 10), (1, 5, 7), (3, 3, 3), (1, 6, 5), (1, 3, 10), (3, 6, 1)),
    (5, 6, 10): ((5, 3, 3), (1, 6, 10), (3, 3, 5), (5, 1, 10), (5, 6, 1)),
}


@dataclass(frozen=True)
class Windows(Search):
    """Of windows with similar densities each head takes the one with the smallest error of its output.

    The windows are the published ones where the grid has their number of tiles. Elsewhere they are the largest within
    `density`: windows of odd sides, or of the whole side, that none of their sides could grow without going above it.

    Args:
        density: of the windows, in shares of all tiles.
        tile: tokens of a tile, for T, H, W.

    Raises:
        ValueError: a value is out of its range.
    """

    density: float = 0.2
    tile: Extent = (6, 8, 8)

    def __post_init__(self) -> None:
        check_share("density", self.density)
        if len(self.tile) != 3 or min(self.tile) < 1:
            raise ValueError(f"tile: {self.tile!r}; valid: three whole numbers for T, H, W, each 1 or more")

    def bins(self, steps: int) -> tuple[int, ...]:
        """See `Search.bins`: every step by itself."""
        return every_step(steps)

    def patterns(self, layout: TokenLayout) -> tuple[Pattern, ...]:
        """The windows that are tried."""
        tiles = tuple(math.ceil(side / tile) for side, tile in zip(layout.grid, self.tile, strict=True))
        sizes = PUBLISHED.get((tiles[0], tiles[1], tiles[2])) or largest_windows(tiles, self.density)
        return tuple(Pattern("window", self.density, size=size, tile=self.tile) for size in sizes)

    def look(self, seen: Seen, number: int, before: Any) -> dict[str, torch.Tensor]:
        """See `Search.look`: `error` [H, windows]."""
        errors = []
        for pattern in self.patterns(seen.layout):
            mask = pattern_mask(pattern, seen.layout, seen.block_q, seen.block_k)
            blocks = mask_to_lists(mask[None, None], seen.block_q, seen.block_k).to(seen.q.device)
            table = pattern_order(pattern).table(seen.layout, 1)
            errors.append(seen.error(Chosen(blocks, None if table is None else table.to(seen.q.device))))
        return {"error": torch.stack(errors, dim=1)}

    def settle(
        self, findings: Findings, before: Any, layout: TokenLayout, sizes: tuple[int, int], layers: int, bins: int
    ) -> Found:
        """See `Search.settle`."""
        choice = [
            torch.stack([findings.mean("error", layer, number).argmin(dim=1) for layer in range(layers)])
            for number in range(bins)
        ]
        return Found(self.patterns(layout), pointed(choice))


def largest_windows(tiles: tuple[int, ...], density: float) -> tuple[Extent, ...]:
    """Windows of odd sides, or of the whole side, that none of their sides could grow within a density.

    Args:
        tiles: of T, H, W.
        density: share of all tiles; a single tile where even that is above it.
    """
    sides = [[*range(1, extent, 2), extent] for extent in tiles]
    budget = density * math.prod(tiles) + 1e-6
    within = [size for size in itertools.product(*sides) if math.prod(size) <= budget]
    largest = [
        size for size in within if not any(other != size and all(map(int.__ge__, other, size)) for other in within)
    ]
    return tuple((t, h, w) for t, h, w in largest) or ((1, 1, 1),)
