"""Selection `window`: a box of the grid around each query, moved by strides, clamped inside the grid.

Source: generalized neighborhood attention, GNA (arXiv 2504.16922, NATTEN). Along an axis of n places, with window w,
stride s and dilation 1, the query at q sees exactly w places: with the leader l = min(s * floor(q / s) + floor(s / 2),
n - 1) they start at l - floor(w / 2), moved back inside where they would begin below 0 or end above n. With dilation d
the places q, q + d, q + 2 d and so on are an axis of their own. A token is seen when it is seen on all three axes.

With stride 1 that is neighborhood attention, with the stride of the window it is attention inside windows; counted in
tiles it is sliding tile attention, STA (arXiv 2502.04507). (STA sees w + 1 tiles where w is even and not the whole
axis; none of its published settings has such a w.)
"""

import bisect
import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar, cast

import torch
from einops import rearrange

from sparse_dit.layout import TokenLayout
from sparse_dit.selection.regions import Boxes, Ranges, add_text, mask_density, meeting

Extent = tuple[int, int, int]


@dataclass(frozen=True)
class AxisWindow:
    """The rule at the head of this file for one axis, a `regions.Rule`.

    Attributes:
        side: tokens of the axis.
        size: window in tiles; 0, or more than there is, is the whole axis.
        stride: in tiles.
        dilation: in tiles.
        tile: tokens of a tile.
    """

    side: int
    size: int
    stride: int
    dilation: int
    tile: int

    def meets(self, query: Ranges, key: Ranges) -> torch.Tensor:
        """See `regions.Rule.meets`."""
        met = torch.zeros(len(query[0]), len(key[0]), dtype=torch.bool)
        tiles = math.ceil(self.side / self.tile)
        for residue in range(min(self.dilation, tiles)):
            # Where the dilation does not divide the axis, some of the axes that it makes are one tile shorter.
            length = (tiles - 1 - residue) // self.dilation + 1
            window = min(self.size or length, length)
            (first, last), (key_first, key_last) = (self._ranks(ranges, residue) for ranges in (query, key))
            # Neighbours' windows overlap or touch, so that a range of queries sees one range of keys.
            start, end = self._start(first, window, length), self._start(last, window, length) + window
            sees = (start[:, None] <= key_last) & (key_first < end[:, None])
            met |= sees & (first <= last)[:, None] & (key_first <= key_last)
        return met

    def _ranks(self, ranges: Ranges, residue: int) -> Ranges:
        """First and last tile of a range among every `dilation`-th; the last is below the first where it has none."""
        first, last = (place // self.tile - residue for place in ranges)
        return -(-first // self.dilation), last // self.dilation

    def _start(self, rank: torch.Tensor, window: int, length: int) -> torch.Tensor:
        leader = (rank // self.stride * self.stride + self.stride // 2).clamp(max=length - 1)
        return (leader - window // 2).clamp(0, length - window)


@dataclass(frozen=True)
class Window:
    """Settings of the window selection; three whole numbers are always for T, H, W.

    A block is computed when any of its queries sees any of its keys, exactly, whatever the order. Blocks that hold text
    are computed in full, as rows and as columns.

    With `density` the window is chosen from a ladder of windows that take the same share of each axis: for every share
    at which a side grows, floor(share * n) places of an axis of n, but no fewer than the stride. The largest window
    whose density is not above the target is taken, or the smallest one when all are above. Density is computed tile
    area over full area of the whole mask, ragged blocks and text included, the mean over the heads.

    Args:
        density: target in (0, 1].
        size: the window; 0, or more than there is, is the whole axis. Or one window for each head. Given, it takes the
            place of `density`.
        stride: so many neighbouring queries share a window; at most the window.
        dilation: distance of the places that a query sees; an axis of n places has about n / dilation of them.
        tile: what `size`, `stride` and `dilation` count: single tokens, or tiles of more (smaller at the end).

    Raises:
        ValueError: a value is out of its range.
    """

    EXCLUSIVE: ClassVar[tuple[str, str]] = ("density", "size")

    density: float | None = 0.25
    size: tuple[int | Extent, ...] | None = None
    stride: Extent = (1, 1, 1)
    dilation: Extent = (1, 1, 1)
    tile: Extent = (1, 1, 1)

    def __post_init__(self) -> None:
        three = "three whole numbers for T, H, W"
        for name in ("stride", "dilation", "tile"):
            if not _is_extent(getattr(self, name), least=1):
                raise ValueError(f"selection.{name}: {getattr(self, name)!r}; valid: {three}, each 1 or more")
        if self.size is None:
            if self.density is None or not 0.0 < self.density <= 1.0:
                raise ValueError(f"selection.density: {self.density!r}; valid: a number in (0, 1]")
            return
        if not self.size or not all(_is_extent(window, least=0) for window in self.windows):
            raise ValueError(f"selection.size: {self.size!r}; valid: {three}, each 0 or more, or that for each head")
        for window in self.windows:
            if any(0 < extent < stride for extent, stride in zip(window, self.stride, strict=True)):
                raise ValueError(f"selection.stride: {self.stride!r}; valid: no axis above the window {window!r}")

    @property
    def windows(self) -> tuple[Extent, ...]:
        """The windows of `size`, one for all heads or one a head; none where `density` is in force."""
        if self.size is None:
            return ()
        per_head = all(isinstance(entry, tuple) for entry in self.size)
        return cast(tuple[Extent, ...], self.size if per_head else (self.size,))

    def select(
        self, layout: TokenLayout, block_q: int, block_k: int, table: torch.Tensor | None = None, heads: int = 1
    ) -> torch.Tensor:
        """See `Selection.select`; [1, QB, KB] where neither the windows nor the order differ between heads."""
        blocks = _Blocks.cut(layout, block_q, block_k, table)
        return blocks.mask(self._solved(blocks), heads)

    def solve(self, layout: TokenLayout, block_q: int, block_k: int, table: torch.Tensor | None = None) -> "Window":
        """These settings with `density` turned into the `size` of the ladder that it stands for."""
        return self._solved(_Blocks.cut(layout, block_q, block_k, table))

    def token_mask(self, layout: TokenLayout, table: torch.Tensor | None = None, heads: int = 1) -> torch.Tensor:
        """The mask over tokens that the block mask covers; for small inputs, with `regions.distance`.

        Returns:
            bool [1 or heads, S, S], both sides in the order of the table.

        Raises:
            ValueError: there is no `size`: a density stands for a window only together with block sizes, see `solve`.
        """
        if self.size is None:
            raise ValueError("selection.size: None; valid: a window, such as `solve` gives")
        rows = torch.arange(layout.length)[None] if table is None else table
        masks = []
        for head in range(_heads(self, len(rows), heads)):
            points = [(place, place) for place in map(torch.arange, layout.grid)]
            rules = self.rules(layout.grid, self.windows[head % len(self.windows)])
            t, h, w = (rule.meets(point, point) for rule, point in zip(rules, points, strict=True))
            video = t[:, None, None, :, None, None] & h[:, None, None, :, None] & w[:, None, None, :]
            mask = torch.ones(layout.length, layout.length, dtype=torch.bool)
            span = slice(layout.text_before, layout.text_before + layout.video_tokens)
            mask[span, span] = rearrange(video, "t h w kt kh kw -> (t h w) (kt kh kw)")
            row = rows[head % len(rows)]
            masks.append(mask[row][:, row])
        return torch.stack(masks)

    def rules(self, grid: Extent, window: Extent) -> tuple[AxisWindow, ...]:
        """The rules of one of the windows for T, H, W."""
        each = zip(grid, window, self.stride, self.dilation, self.tile, strict=True)
        return tuple(AxisWindow(*settings) for settings in each)

    def _solved(self, blocks: "_Blocks") -> "Window":
        if self.size is not None:
            return self
        rungs = self._ladder(blocks.layout.grid)

        def reached(index: int) -> float:
            mask = blocks.mask(replace(self, density=None, size=rungs[index]), len(blocks.boxes))
            return mask_density(mask, blocks.layout, blocks.block_q, blocks.block_k)

        above = bisect.bisect_right(range(len(rungs)), cast(float, self.density), key=reached)
        return replace(self, density=None, size=rungs[max(above - 1, 0)])

    def _ladder(self, grid: Extent) -> list[Extent]:
        """Windows from the smallest to the whole grid, each inside the next."""
        places = [
            math.ceil(math.ceil(side / tile) / dilation)
            for side, tile, dilation in zip(grid, self.tile, self.dilation, strict=True)
        ]
        least = [min(stride, side) for stride, side in zip(self.stride, places, strict=True)]
        shares = sorted({Fraction(extent, side) for side in places for extent in range(1, side + 1)})
        rungs = [[max(low, int(share * side)) for low, side in zip(least, places, strict=True)] for share in shares]
        return [(t, h, w) for t, h, w in dict.fromkeys(map(tuple, rungs))]


@dataclass(frozen=True, eq=False)
class _Blocks:
    """The blocks of a sequence as boxes of the grid, prepared once for any number of windows.

    Attributes:
        layout: the tokens.
        block_q: query tokens of a block.
        block_k: key tokens of a block.
        boxes: boxes of the query and of the key blocks, for all heads or for each of them.
    """

    layout: TokenLayout
    block_q: int
    block_k: int
    boxes: tuple[tuple[Boxes, Boxes], ...]

    @classmethod
    def cut(cls, layout: TokenLayout, block_q: int, block_k: int, table: torch.Tensor | None) -> "_Blocks":
        # Heads share few orders, and cutting is the dearer part: equal rows are cut once.
        known: dict[bytes, tuple[Boxes, Boxes]] = {}
        boxes = []
        for row in [None] if table is None else table:
            name = b"" if row is None else row.numpy().tobytes()
            if name not in known:
                query = Boxes.cut(layout, block_q, row)
                known[name] = (query, query if block_q == block_k else Boxes.cut(layout, block_k, row))
            boxes.append(known[name])
        return cls(layout, block_q, block_k, tuple(boxes))

    def mask(self, window: Window, heads: int) -> torch.Tensor:
        """The mask of a window of a given size, text included, bool [1 or heads, QB, KB]."""
        known: dict[tuple[int, Extent], torch.Tensor] = {}
        masks = []
        for head in range(_heads(window, len(self.boxes), heads)):
            size = window.windows[head % len(window.windows)]
            query, key = self.boxes[head % len(self.boxes)]
            if (id(query), size) not in known:
                known[id(query), size] = meeting(query, key, window.rules(self.layout.grid, size))
            masks.append(known[id(query), size])
        return add_text(torch.stack(masks), self.layout, self.block_q, self.block_k)


def _heads(window: Window, orders: int, heads: int) -> int:
    """How many masks are needed, or an error when windows or orders are not made for so many heads."""
    if len(window.windows) not in (1, heads):
        raise ValueError(f"selection.size: {len(window.windows)} windows; valid: one, or one for each of {heads} heads")
    if orders not in (1, heads):
        raise ValueError(f"table: {orders} orders; valid: one, or one for each of {heads} heads")
    return max(len(window.windows), orders)


def _is_extent(value: object, *, least: int) -> bool:
    return isinstance(value, tuple) and len(value) == 3 and all(isinstance(n, int) and n >= least for n in value)
