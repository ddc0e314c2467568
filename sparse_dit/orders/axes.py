"""Orders that flatten the grid axis by axis: `rows`, `time_major`, `axes`, `serpentine`."""

import itertools
from dataclasses import dataclass

import torch
from einops import rearrange

from sparse_dit.layout import TokenLayout
from sparse_dit.orders.tables import place_text

FLATTENINGS = tuple("".join(axes) for axes in itertools.permutations("thw"))


@dataclass(frozen=True)
class Rows:
    """As the model flattens T, H, W: nothing is moved."""

    def table(self, layout: TokenLayout, heads: int) -> torch.Tensor | None:
        """See `Order.table`."""
        return None


@dataclass(frozen=True)
class TimeMajor:
    """All frames of one pixel are contiguous, pixels stay row by row: the layout of Sparse VideoGen's temporal heads.

    Source: Sparse VideoGen (arXiv 2502.01776), token index = pixel * frames + frame.
    """

    def table(self, layout: TokenLayout, heads: int) -> torch.Tensor | None:
        """See `Order.table`."""
        return place_text(layout, _flattened(layout, "hwt")[None])


@dataclass(frozen=True)
class Axes:
    """One of the six flattenings of the grid, for all heads or one a head.

    Source: PAROAttention (arXiv 2506.16054), which picks the order of each head by calibration.

    Args:
        axes: the axes from the slowest to the fastest, such as `"thw"` (rows) or `"hwt"` (time-major); or one such name
            for each head.

    Raises:
        ValueError: a name that is not one of the six.
    """

    axes: str | tuple[str, ...] = "thw"

    def __post_init__(self) -> None:
        if not self.axes or any(name not in FLATTENINGS for name in self._names):
            raise ValueError(f"order.axes: {self.axes!r}; valid: {', '.join(FLATTENINGS)}, or one of them a head")

    @property
    def _names(self) -> tuple[str, ...]:
        return (self.axes,) if isinstance(self.axes, str) else self.axes

    def table(self, layout: TokenLayout, heads: int) -> torch.Tensor | None:
        """See `Order.table`."""
        if len(self._names) not in (1, heads):
            raise ValueError(f"order.axes: {len(self._names)} orders; valid: one, or one for each of {heads} heads")
        if set(self._names) == {"thw"}:
            return None
        return place_text(layout, torch.stack([_flattened(layout, name) for name in self._names]))


@dataclass(frozen=True)
class Serpentine:
    """Row by row, every other row and every other frame backwards, so that each token is a neighbour of the next."""

    def table(self, layout: TokenLayout, heads: int) -> torch.Tensor | None:
        """See `Order.table`."""
        video = rearrange(torch.arange(layout.video_tokens), "(t h w) -> t h w", h=layout.grid[1], w=layout.grid[2])
        video[1::2] = video[1::2].flip(1)
        lines = rearrange(video, "t h w -> (t h) w")
        lines[1::2] = lines[1::2].flip(1)
        return place_text(layout, rearrange(lines, "lines w -> 1 (lines w)"))


def _flattened(layout: TokenLayout, axes: str) -> torch.Tensor:
    """Video tokens, int64 [video_tokens], flattened with the last of `axes` fastest."""
    sides = dict(zip("thw", layout.grid, strict=True))
    return rearrange(torch.arange(layout.video_tokens), f"(t h w) -> ({' '.join(axes)})", **sides)
