"""The band of Sparse VideoGen: keys near a query in the order of its head, and the first frame.

Source: Sparse VideoGen, SVG (arXiv 2502.01776), in the form that its repository runs. A spatial head sees a band in the
model's own order, a temporal head the same band in the time-major order, where all frames of a pixel are contiguous.
One mask serves both: positions count in the order of the head, so that the first frame of a temporal head is the first
`frame_tokens` positions of its order, which are all frames of the first pixels.

For s tokens a frame, n video tokens, `ctx` text tokens and S = n + ctx, a knob of kept = 0.25 to 0.3 stands for a
half-width of S * (1 - sqrt(1 - (kept - 2 * ctx / S))) tokens: with it the band over the video tokens has the area that
text leaves of `kept`. It is rounded to 128 tokens, and the first frame comes on top of it.

Which of the two a head is, SVG finds out by the error of a few sampled rows under two masks of fixed width,
`profile_units`.
"""

import bisect
import math
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, cast

import torch

from sparse_dit.layout import TokenLayout, block_spans
from sparse_dit.selection.regions import add_text, mask_density

ROUNDING = {"up": math.ceil, "down": math.floor}
ROUNDED_TO = 128


def half_width(layout: TokenLayout, kept: float, rounding: str = "up") -> int:
    """SVG's half-width of the band.

    Args:
        layout: the tokens of the call.
        kept: SVG's knob, share of the attention map in (0, 1] (its code calls it sparsity).
        rounding: to multiples of 128 tokens, `up` (SVG on Wan, Cosmos) or `down` (HunyuanVideo).

    Returns:
        Half-width in tokens, 0 or more; 0 too where text alone is more than the share.
    """
    text = layout.length - layout.video_tokens
    band = min(1.0, max(0.0, kept - 2 * text / layout.length))
    width = layout.length * (1 - math.sqrt(1 - band))
    return ROUNDING[rounding](width / ROUNDED_TO) * ROUNDED_TO


class ProfileUnits(NamedTuple):
    """SVG's two profiling masks, spatial and temporal, as `kernels.rows.band_errors` takes them.

    Attributes:
        own: fp32 [2, length], the unit of each token as a query; NaN where it sees every key.
        keys: fp32 [2, length], likewise as a key; NaN where every query sees it.
        reach: a query sees keys less than so many units away.
    """

    own: torch.Tensor
    keys: torch.Tensor
    reach: int


def profile_units(
    layout: TokenLayout, time_major: torch.Tensor, *, frames: float = 2.0, sink_frames: int = 1
) -> ProfileUnits:
    """What sampled queries see under SVG's two profiling masks, tokens in the model's own order.

    In units of 128 tokens, counted from the first video token, a query sees the units that are less than
    floor(frames * s / 128) away: for the spatial mask as the model flattens the tokens, for the temporal one in the
    time-major order. These widths are constants, they do not depend on the density. Text queries see everything, all
    see text, and the sink.

    Args:
        layout: the tokens of the call.
        time_major: token ids in the time-major order, integers [length].
        frames: half-width in frames, 2 for Wan and Cosmos, 1.5 for HunyuanVideo.
        sink_frames: first frames of the order that every query sees, 1 for Wan and Cosmos, 0 for HunyuanVideo.

    Returns:
        The units, on the device of `time_major`.
    """
    token = torch.arange(layout.length, device=time_major.device)
    position = torch.stack([token, torch.empty_like(token).scatter_(0, time_major, token)]) - layout.text_before
    is_text = (position[0] < 0) | (position[0] >= layout.video_tokens)
    own = (position // ROUNDED_TO).float().masked_fill(is_text, torch.nan)
    keys = own.masked_fill(position < sink_frames * layout.frame_tokens, torch.nan)
    return ProfileUnits(own, keys, math.floor(frames * layout.frame_tokens / ROUNDED_TO))


@dataclass(frozen=True)
class Band:
    """Settings of the band in the order of the recipe: `rows` for spatial heads, `time_major` for temporal ones.

    A block is computed when any of its pairs of tokens is in the band or in the sink. Blocks that hold text are
    computed in full, as rows and as columns.

    With `density` the half-width is the largest number of tokens whose density is not above the target. Where even
    half-width 0 is above it, the sink is given up; where that does not help either, half-width 0 without a sink is
    taken. Density is computed tile area over full area of the whole mask, ragged blocks and text included.

    Args:
        kept: SVG's knob in (0, 1], see `half_width`; the density is above it by the sink and the borders of blocks.
        width: half-width of the band in tokens. Given, it takes the place of `kept`.
        density: target in (0, 1]. Given, it takes the place of both.
        sink_frames: first frames, in the order's positions, that every query sees.
        rounding: of the half-width that `kept` stands for: `up` (SVG on Wan, Cosmos) or `down` (HunyuanVideo).

    Raises:
        ValueError: a value is out of its range.
    """

    EXCLUSIVE: ClassVar[tuple[str, str, str]] = ("kept", "width", "density")

    kept: float = 0.25
    width: int | None = None
    density: float | None = None
    sink_frames: int = 1
    rounding: str = "up"

    def __post_init__(self) -> None:
        checks = (
            ("kept", 0.0 < self.kept <= 1.0, "a number in (0, 1]"),
            ("width", self.width is None or self.width >= 0, "0 or more tokens"),
            ("density", self.density is None or 0.0 < self.density <= 1.0, "a number in (0, 1]"),
            ("sink_frames", self.sink_frames >= 0, "0 or more frames"),
            ("rounding", self.rounding in ROUNDING, ", ".join(ROUNDING)),
        )
        for name, holds, valid in checks:
            if not holds:
                raise ValueError(f"selection.{name}: {getattr(self, name)!r}; valid: {valid}")

    def select(
        self, layout: TokenLayout, block_q: int, block_k: int, table: torch.Tensor | None = None, heads: int = 1
    ) -> torch.Tensor:
        """See `Selection.select`; one mask for all heads, [1, QB, KB], in the positions of each head's order."""
        solved = self.solve(layout, block_q, block_k)
        query, key = (block_spans(layout.length, block) for block in (block_q, block_k))
        gap = torch.maximum(key[0] - query[1][:, None], query[0][:, None] - key[1]) + 1
        mask = (gap <= cast(int, solved.width)) | (key[0] < _sink_end(solved, layout))
        return add_text(mask[None], layout, block_q, block_k)

    def solve(self, layout: TokenLayout, block_q: int, block_k: int) -> "Band":
        """These settings with `kept` or `density` turned into the `width`, and the sink, that they stand for."""
        if self.density is None:
            width = half_width(layout, self.kept, self.rounding) if self.width is None else self.width
            return replace(self, width=width)

        def reached(width: int, sink_frames: int) -> float:
            mask = Band(width=width, sink_frames=sink_frames).select(layout, block_q, block_k)
            return mask_density(mask, layout, block_q, block_k)

        target = self.density
        sink_frames = self.sink_frames if reached(0, self.sink_frames) <= target else 0
        above = bisect.bisect_right(range(layout.length), target, key=lambda width: reached(width, sink_frames))
        return replace(self, density=None, width=max(above - 1, 0), sink_frames=sink_frames)

    def token_mask(self, layout: TokenLayout, table: torch.Tensor | None = None, heads: int = 1) -> torch.Tensor:
        """The mask over tokens that the block mask covers; for small inputs, with `regions.distance`.

        Returns:
            bool [1, S, S], both sides in the order of the table.

        Raises:
            ValueError: there is a `density`: it stands for a width only together with block sizes, see `solve`.
        """
        if self.density is not None:
            raise ValueError(f"selection.density: {self.density!r}; valid: None, such as `solve` gives")
        width = cast(int, self.solve(layout, 1, 1).width)
        position = torch.arange(layout.length)
        text = (position < layout.text_before) | (position >= layout.text_before + layout.video_tokens)
        seen = (position[:, None] - position).abs() <= width
        return (seen | (position < _sink_end(self, layout)) | text | text[:, None])[None]


def _sink_end(band: Band, layout: TokenLayout) -> int:
    """One past the last position of the sink; text in front of it is seen anyway."""
    return layout.text_before + band.sink_frames * layout.frame_tokens
