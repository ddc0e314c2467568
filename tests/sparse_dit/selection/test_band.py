"""The band of Sparse VideoGen: its published widths, its profiling masks, and the blocks that cover it."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_dit.kernels.rows import seen_keys
from sparse_dit.layout import TokenLayout
from sparse_dit.orders import TimeMajor
from sparse_dit.selection.band import Band, half_width, profile_units
from sparse_dit.selection.regions import distance, mask_density

WAN = TokenLayout((21, 45, 80))
HUNYUAN = TokenLayout((33, 45, 80), text_after=256)
COSMOS = TokenLayout((16, 44, 80))

layouts = st.builds(
    TokenLayout,
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 9)),
    text_before=st.sampled_from((0, 0, 3, 16, 19)),
    text_after=st.sampled_from((0, 0, 5, 16, 21)),
)
bands = st.builds(
    Band,
    kept=st.floats(0.01, 1.0),
    width=st.one_of(st.none(), st.integers(0, 60)),
    sink_frames=st.integers(0, 2),
    rounding=st.sampled_from(("up", "down")),
)


def time_major(layout: TokenLayout) -> torch.Tensor:
    table = TimeMajor().table(layout, 1)
    assert table is not None
    return table[0]


@pytest.mark.parametrize(
    ("layout", "kept", "rounding", "frames"),
    [(WAN, 0.3, "up", 3.43), (HUNYUAN, 0.25, "down", 4.35), (COSMOS, 0.25, "up", 2.14)],
)
def test_widths_are_the_published_ones(layout: TokenLayout, kept: float, rounding: str, frames: float) -> None:
    width = half_width(layout, kept, rounding)
    # The reference gives frames to 0.01; the width is the next multiple of 128 tokens above or below.
    assert width % 128 == 0
    rounded_by = width / layout.frame_tokens - frames
    assert -0.005 <= (rounded_by if rounding == "up" else -rounded_by) <= 128 / layout.frame_tokens + 0.005
    other = half_width(layout, kept, "down" if rounding == "up" else "up")
    assert abs(other - width) == 128


@pytest.mark.parametrize("layout", [WAN, HUNYUAN, COSMOS])
@pytest.mark.parametrize("kept", [0.2, 0.3, 0.7])
def test_the_band_has_the_area_that_text_leaves(layout: TokenLayout, kept: float) -> None:
    total = layout.length
    text = total - layout.video_tokens
    low, high = half_width(layout, kept, "down"), half_width(layout, kept, "up")

    def area(width: int) -> float:
        """Of a band over all tokens, as SVG counts it, with text as rows and as columns."""
        return 1 - ((total - width) / total) ** 2 + 2 * text / total

    assert area(low) <= kept <= area(high)


def test_a_share_that_text_uses_up_leaves_no_band_and_the_whole_share_is_everything() -> None:
    layout = TokenLayout((2, 8, 8), text_after=64)
    assert half_width(layout, 0.3) == 0
    assert half_width(TokenLayout((2, 8, 8)), 1.0) == 128
    assert Band(kept=1.0).select(TokenLayout((3, 8, 8)), 16, 16).all()


@settings(max_examples=50, deadline=None)
@given(layout=layouts, band=bands, block_q=st.sampled_from((16, 32)), block_k=st.sampled_from((16, 64)))
def test_blocks_are_those_that_hold_a_pair_of_the_band(
    layout: TokenLayout, band: Band, block_q: int, block_k: int
) -> None:
    width = band.solve(layout, block_q, block_k).width
    assert width is not None
    start, stop = layout.text_before, layout.text_before + layout.video_tokens
    sink = band.sink_frames * layout.frame_tokens
    whole = torch.tensor(
        [[not (start <= i < stop and start <= j < stop) for j in range(layout.length)] for i in range(layout.length)]
    )
    near = torch.tensor(
        [[abs(i - j) <= width or j - start < sink for j in range(layout.length)] for i in range(layout.length)]
    )
    tokens = near | whole
    assert torch.equal(band.token_mask(layout)[0], tokens)
    mask = band.select(layout, block_q, block_k, None, 3)
    queries, keys = range(0, layout.length, block_q), range(0, layout.length, block_k)
    assert mask.shape == (1, len(queries), len(keys))
    for (a, i), (b, j) in itertools.product(enumerate(queries), enumerate(keys)):
        assert mask[0, a, b] == tokens[i : i + block_q, j : j + block_k].any()
        if whole[i : i + block_q, j : j + block_k].any():
            assert mask[0, a, b]
    assert distance(mask, tokens[None], block_q, block_k).missing == 0.0


def test_aligned_blocks_add_only_the_corners_of_the_band() -> None:
    layout, band = TokenLayout((4, 8, 16)), Band(width=128, sink_frames=0)
    mask = band.select(layout, 64, 64)
    # A half-width of two blocks is five block diagonals of eight rows.
    assert int(mask.sum()) == 8 * 5 - 2 * (2 + 1)
    off = distance(mask, band.token_mask(layout), 64, 64)
    # Of the outer diagonals' 12 blocks, the part beyond the band: 63 + 62 + ... + 1 pairs.
    assert off.surplus == 12 * (63 * 64 // 2) / layout.length**2


def slow_profile(layout: TokenLayout, row: int, place: Any, frames: float, sink_frames: int) -> list[bool]:
    """Keys of one query: `place` gives a video token its position in the order."""
    start, stop = layout.text_before, layout.text_before + layout.video_tokens
    reach = math.floor(frames * layout.frame_tokens / 128)
    seen = []
    for key in range(layout.length):
        if not (start <= row < stop and start <= key < stop):
            seen.append(True)
            continue
        a, b = place(row - start), place(key - start)
        seen.append(abs(a // 128 - b // 128) < reach or b < sink_frames * layout.frame_tokens)
    return seen


def profiled(layout: TokenLayout, rows: torch.Tensor, **settings: Any) -> torch.Tensor:
    own, keys, reach = profile_units(layout, time_major(layout), **settings)
    return seen_keys(own[:, rows], keys, reach)


@pytest.mark.parametrize(("frames", "sink_frames"), [(2.0, 1), (1.5, 0), (3.0, 0)])
@pytest.mark.parametrize("text", [(0, 0), (0, 19), (19, 0)])
def test_profiling_masks_are_the_band_in_each_order(frames: float, sink_frames: int, text: tuple[int, int]) -> None:
    layout = TokenLayout((5, 11, 13), *text)
    rows = torch.tensor([0, 5, 140, 400, 401, 700, layout.length - 1])
    seen = profiled(layout, rows, frames=frames, sink_frames=sink_frames)
    assert seen.shape == (2, len(rows), layout.length)
    for index, row in enumerate(rows.tolist()):
        assert seen[0, index].tolist() == slow_profile(layout, row, lambda token: token, frames, sink_frames)

        def by_pixel(token: int) -> int:
            frame, pixel = divmod(token, 143)
            return pixel * 5 + frame

        assert seen[1, index].tolist() == slow_profile(layout, row, by_pixel, frames, sink_frames)


def test_profiling_masks_tell_a_neighbour_in_space_from_one_in_time() -> None:
    layout = TokenLayout((12, 16, 16))
    row = torch.tensor([6 * 256 + 100])
    seen = profiled(layout, row, frames=1.0)[:, 0]
    same_frame, same_pixel = 6 * 256 + 200, 11 * 256 + 100
    assert seen[:, same_frame].tolist() == [True, False]
    assert seen[:, same_pixel].tolist() == [False, True]
    # The sink is the first frame for a spatial head, and all frames of the first pixels for a temporal one.
    assert seen[:, 100].tolist() == [True, True]
    assert seen[:, 200].tolist() == [True, False]
    assert seen[:, 11 * 256 + 20].tolist() == [False, True]


@pytest.mark.parametrize(
    "layout", [TokenLayout((13, 15, 26)), TokenLayout((9, 16, 16), 0, 77), TokenLayout((1, 48, 48))]
)
@pytest.mark.parametrize("target", [0.05, 0.3, 0.6])
@pytest.mark.parametrize("sink_frames", [0, 1])
def test_density_takes_the_widest_band_that_is_not_above(layout: TokenLayout, target: float, sink_frames: int) -> None:
    band = Band(density=target, sink_frames=sink_frames)
    solved = band.solve(layout, 16, 16)
    assert solved.density is None
    assert solved.width is not None
    mask = band.select(layout, 16, 16)
    assert torch.equal(mask, solved.select(layout, 16, 16))
    reached, narrowest = (
        mask_density(m, layout, 16, 16)
        for m in (mask, Band(width=0, sink_frames=solved.sink_frames).select(layout, 16, 16))
    )
    assert reached <= target or reached == narrowest
    wider = replace(solved, width=solved.width + 1).select(layout, 16, 16)
    assert mask_density(wider, layout, 16, 16) > target
    kept_sink = mask_density(Band(width=0, sink_frames=sink_frames).select(layout, 16, 16), layout, 16, 16) <= target
    assert solved.sink_frames == (sink_frames if kept_sink else 0)


def test_density_one_selects_everything() -> None:
    assert Band(density=1.0).select(TokenLayout((5, 7, 9), 3, 4), 16, 32).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kept", 0.0),
        ("kept", 1.5),
        ("kept", math.nan),
        ("width", -1),
        ("density", 0.0),
        ("density", 1.1),
        ("sink_frames", -1),
        ("rounding", "near"),
    ],
)
def test_settings_out_of_range_are_refused_in_one_line(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^selection\.{name}: .*; valid: ") as caught:
        Band(**{name: value})
    assert "\n" not in str(caught.value)


def test_a_density_has_no_token_mask_of_its_own() -> None:
    with pytest.raises(ValueError, match=r"^selection\.density: 0\.5; valid: "):
        Band(density=0.5).token_mask(TokenLayout((2, 4, 4)))
