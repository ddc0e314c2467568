"""Selection `radial`: a band of key blocks that halves with each octave of temporal distance.

Source: Radial Attention (arXiv 2506.19852, NeurIPS 2025), in the form that its repository runs, for any grid.

The rules, for query frame i, key frame j, d = |i - j|, s tokens a frame, P the smallest power of two above s:

1. Sink: the first `sink_frames` key frames are seen in full.
2. Half-width: w(d) = s for d <= `full_distance`, else w(d) = max(`min_width`, decay * P / 2^bitlen(d)), at most s.
3. Decimation: with L(d) = P / 2^bitlen(d) < `decimate_below`, only every int(`decimate_below` / L)-th distance is kept.
4. A block is kept for a frame pair when, of its columns in which |k - l| <= w covers any row, more than 0.6 are covered
   in more than a third of the rows. Only the rows and columns that belong to the two frames count, so a frame that does
   not start or end on a block border is represented to its last token.
5. A block is kept when any of the frame pairs that meet in it keeps it. A query block always keeps its own tokens, and
   blocks that hold text are computed in full, as rows and as columns.
"""

import bisect
import functools
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from sparse_dit.layout import TokenLayout, block_spans
from sparse_dit.selection.every import Every
from sparse_dit.selection.regions import add_text, mask_density


@dataclass(frozen=True)
class Radial:
    """Settings of the radial selection; the defaults are the published ones for Wan.

    With `density` the decay is solved for: the result is the nearest density that whole blocks can reach, found by
    bisection over every decay at which a width changes by a token. Density is computed tile area over full area of the
    whole mask, ragged blocks and text included. When the published rules keep too much at any decay, they are given up
    one by one, and the first rung of this ladder that gets down to the target is taken (the last one if none does):

    1. the settings as they are; 2. `min_width` 0; 3. also `full_distance` 0 (at most); 4. also `full_distance` -1;
    5. also `sink_frames` 0.

    Density 1.0 keeps every block.

    Args:
        decay: factor on the width of the band (alpha in the paper).
        density: target in (0, 1]; given, it takes the place of `decay`.
        sink_frames: first key frames that every query sees (published: 1 for Wan, 0 for HunyuanVideo).
        full_distance: frames at most this far apart see each other in full; -1 leaves even the own frame to the band.
        min_width: least half-width of the band in tokens; `None` is one block, as published.
        decimate_below: width in tokens, before `decay`, under which frame pairs are thinned out; 0 keeps them all.

    Raises:
        ValueError: a value is out of its range.
    """

    EXCLUSIVE: ClassVar[tuple[str, str]] = ("decay", "density")

    decay: float = 0.2
    density: float | None = None
    sink_frames: int = 1
    full_distance: int = 1
    min_width: int | None = None
    decimate_below: int = 128

    def __post_init__(self) -> None:
        checks = (
            ("decay", 0.0 < self.decay < math.inf, "a number above 0"),
            ("density", self.density is None or 0.0 < self.density <= 1.0, "a number in (0, 1]"),
            ("sink_frames", self.sink_frames >= 0, "0 or more frames"),
            ("full_distance", self.full_distance >= -1, "-1 or more frames"),
            ("min_width", self.min_width is None or self.min_width >= 0, "0 or more tokens"),
            ("decimate_below", self.decimate_below >= 0, "0 or more tokens"),
        )
        for name, holds, valid in checks:
            if not holds:
                raise ValueError(f"selection.{name}: {getattr(self, name)!r}; valid: {valid}")

    def select(
        self, layout: TokenLayout, block_q: int, block_k: int, table: torch.Tensor | None = None, heads: int = 1
    ) -> torch.Tensor:
        """See `Selection.select`; one mask for all heads, [1, QB, KB]; positions count, not tokens."""
        if self.density == 1.0:
            return Every().select(layout, block_q, block_k)
        return _cached_mask(self.solve(layout, block_q, block_k), layout, block_q, block_k)

    def solve(self, layout: TokenLayout, block_q: int, block_k: int) -> "Radial":
        """These settings with `density` turned into a `decay` and the rung of the ladder that reaches it."""
        if self.density is None or self.density == 1.0:
            return self
        return _solve(self, layout, block_q, block_k)

    def width(self, distance: int, frame_tokens: int, block: int) -> int:
        """Half-width of the band in whole tokens between frames `distance` apart; -1 when the pair is dropped."""
        if distance <= self.full_distance:
            return frame_tokens
        octave = (1 << frame_tokens.bit_length()) / (1 << distance.bit_length())
        if octave < self.decimate_below and distance % int(self.decimate_below / octave) != 0:
            return -1
        least = block if self.min_width is None else self.min_width
        return min(frame_tokens, math.floor(max(least, self.decay * octave)))


@dataclass(frozen=True)
class _Segments:
    """The parts into which frame borders and block borders together cut the video tokens, int32 [parts] each.

    Attributes:
        block: the block a part lies in.
        frame: the frame a part lies in.
        first: first token of the part, counted from the start of its frame.
        last: last token of the part, counted likewise.
    """

    block: torch.Tensor
    frame: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor

    @classmethod
    def cut(cls, layout: TokenLayout, block: int) -> "_Segments":
        start, stop = layout.text_before, layout.text_before + layout.video_tokens
        borders = {*range(start, stop, layout.frame_tokens), *range(start + -start % block, stop, block), stop}
        border = torch.tensor(sorted(borders), dtype=torch.int32)
        first, last = border[:-1], border[1:] - 1
        frame = (first - start) // layout.frame_tokens
        origin = start + frame * layout.frame_tokens
        return cls(first // block, frame, first - origin, last - origin)


def _mask(settings: Radial, layout: TokenLayout, block_q: int, block_k: int) -> torch.Tensor:
    """The mask for a decay, bool [1, QB, KB]."""
    mask = _always(layout, block_q, block_k)
    rows, columns = _Segments.cut(layout, block_q), _Segments.cut(layout, block_k)
    block = max(block_q, block_k)
    widths = torch.tensor(
        [settings.width(distance, layout.frame_tokens, block) for distance in range(layout.frames)], dtype=torch.int32
    )
    # One query frame at a time bounds the memory: parts of a frame times parts of the sequence.
    for frame in range(layout.frames):
        low, high = torch.searchsorted(rows.frame, torch.tensor([frame, frame + 1], dtype=torch.int32)).tolist()
        width = widths[(columns.frame - frame).abs()]
        width = torch.where(columns.frame < settings.sink_frames, layout.frame_tokens, width)
        kept = _keeps(rows.first[low:high, None], rows.last[low:high, None], columns.first, columns.last, width)
        by_column = torch.zeros(high - low, mask.shape[1], dtype=torch.int32)
        by_column.index_add_(1, columns.block, kept.int())
        first_block = int(rows.block[low])
        mask[first_block : first_block + high - low] |= by_column > 0
    return mask[None]


_cached_mask = functools.lru_cache(maxsize=16)(_mask)


def _keeps(
    row_first: torch.Tensor,
    row_last: torch.Tensor,
    column_first: torch.Tensor,
    column_last: torch.Tensor,
    width: torch.Tensor,
) -> torch.Tensor:
    """Rule 4 for every part of rows against every part of columns, in closed form.

    Column l covers the rows [l - w, l + w]; it covers any of [a, b] for l in [a - w, b + w], and at least t of them for
    l in [a + t - 1 - w, b - t + 1 + w], provided that 2 w + 1 >= t. More than a third of the rows are t = third + 1.
    """

    def columns_within(reach: torch.Tensor) -> torch.Tensor:
        first = torch.maximum(column_first, row_first - reach)
        return (torch.minimum(column_last, row_last + reach) - first + 1).clamp(min=0)

    third = (row_last - row_first + 1) // 3
    covered = columns_within(width - third) * (2 * width >= third)
    return 5 * covered > 3 * columns_within(width)


def _always(layout: TokenLayout, block_q: int, block_k: int) -> torch.Tensor:
    """Blocks that rule 5 keeps whatever the band says: a block's own tokens, and text, bool [QB, KB]."""
    query, key = (block_spans(layout.length, block) for block in (block_q, block_k))
    own = (query[0][:, None] < key[1]) & (key[0] < query[1][:, None])
    return add_text(own[None], layout, block_q, block_k)[0]


@functools.lru_cache(maxsize=64)
def _solve(settings: Radial, layout: TokenLayout, block_q: int, block_k: int) -> Radial:
    target = settings.density
    assert target is not None
    octaves = sorted({(1 << layout.frame_tokens.bit_length()) >> d.bit_length() for d in range(layout.frames)} - {0})
    # The first is too small for any width but 0, the others are those at which a width changes.
    decays = sorted(
        {0.5 / octaves[-1]} | {width / octave for octave in octaves for width in range(1, layout.frame_tokens + 1)}
    )

    def density(rung: Radial, index: int) -> float:
        mask = _mask(replace(rung, decay=decays[index]), layout, block_q, block_k)
        return mask_density(mask, layout, block_q, block_k)

    rungs = _ladder(settings)
    rung = next((rung for rung in rungs if density(rung, 0) <= target), rungs[-1])
    above = bisect.bisect_left(range(len(decays)), target, key=lambda index: density(rung, index))
    near = [index for index in (above - 1, above) if 0 <= index < len(decays)]
    best = min(near, key=lambda index: abs(density(rung, index) - target))
    return replace(rung, decay=decays[best])


def _ladder(settings: Radial) -> list[Radial]:
    """Rungs of the ladder that the class documents, from the settings as given to the thinnest."""
    published = replace(settings, density=None)
    narrow = replace(published, min_width=0)
    own_frame = replace(narrow, full_distance=min(settings.full_distance, 0))
    band_only = replace(own_frame, full_distance=-1)
    return [published, narrow, own_frame, band_only, replace(band_only, sink_frames=0)]
