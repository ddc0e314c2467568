"""Order `tiles`: the tokens of a tile of the grid follow each other."""

import math
from dataclasses import dataclass

import torch

from sparse_dit.layout import TokenLayout
from sparse_dit.orders.axes import FLATTENINGS
from sparse_dit.orders.tables import place_text


@dataclass(frozen=True)
class Tiles:
    """Tile by tile, tiles row by row over (T, H, W), and inside a tile token by token.

    Where the tile divides the grid and the block size divides the tile, or is the tile, blocks lie inside single tiles.
    Where a side is no multiple of the tile's, the tiles at its end are smaller; tiles follow each other without
    padding, so that blocks can then straddle two tiles. (Padding would put a mask into every tile of the kernel.)

    Sources: DraftAttention (arXiv 2505.14708), tile (1, 8, 16); sliding tile attention (arXiv 2502.04507), (6, 8, 8);
    VMoBA (arXiv 2506.23858), whose spans of frames are (n, 0, 0) and whose spatial blocks are (0, h, w).

    Args:
        tile: tokens of a tile along T, H, W; 0 is the whole side.
        inner: the axes inside a tile from the slowest to the fastest.

    Raises:
        ValueError: a value is out of its range.
    """

    tile: tuple[int, int, int] = (1, 8, 16)
    inner: str = "thw"

    def __post_init__(self) -> None:
        if len(self.tile) != 3 or any(side < 0 for side in self.tile):
            raise ValueError(f"order.tile: {self.tile!r}; valid: three whole numbers for T, H, W, 0 for the whole side")
        if self.inner not in FLATTENINGS:
            raise ValueError(f"order.inner: {self.inner!r}; valid: {', '.join(FLATTENINGS)}")

    def table(self, layout: TokenLayout, heads: int) -> torch.Tensor | None:
        """See `Order.table`."""
        tile = [extent or side for extent, side in zip(self.tile, layout.grid, strict=True)]
        places = torch.unravel_index(torch.arange(layout.video_tokens), layout.grid)
        key = torch.zeros(layout.video_tokens, dtype=torch.int64)
        for place, side, extent in zip(places, layout.grid, tile, strict=True):
            key = key * math.ceil(side / extent) + place // extent
        for axis in ("thw".index(name) for name in self.inner):
            key = key * tile[axis] + places[axis] % tile[axis]
        return place_text(layout, key.argsort()[None])
