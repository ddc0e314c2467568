"""The radial mask against the published counts, against a slow reference, and by its properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_dit.layout import TokenLayout
from sparse_dit.selection import Radial

layouts = st.builds(
    TokenLayout,
    grid=st.tuples(st.integers(1, 7), st.integers(1, 6), st.integers(1, 9)),
    text_before=st.sampled_from((0, 0, 1, 16, 19)),
    text_after=st.sampled_from((0, 0, 1, 16, 21)),
)
radials = st.builds(
    Radial,
    decay=st.floats(0.02, 4.0),
    sink_frames=st.integers(0, 2),
    full_distance=st.integers(-1, 2),
    min_width=st.sampled_from((None, 0, 3)),
    decimate_below=st.sampled_from((0, 16, 128)),
)
blocks = st.sampled_from((16, 32))


def area_density(mask: torch.Tensor, layout: TokenLayout, block_q: int, block_k: int) -> float:
    """Computed tile area over full area, token by token."""
    full = mask[0].repeat_interleave(block_q, 0).repeat_interleave(block_k, 1)
    return float(full[: layout.length, : layout.length].double().mean())


def sees(row: int, column: int, layout: TokenLayout, radial: Radial, block: int) -> bool:
    """Whether one video token sees another by rules 1 to 3, spelled out."""
    s = layout.grid[1] * layout.grid[2]
    (i, k), (j, m) = divmod(row, s), divmod(column, s)
    if j < radial.sink_frames:
        return True
    d = abs(i - j)
    if d <= radial.full_distance:
        return True
    power = 1
    while power <= s:
        power *= 2
    bits = 0 if d == 0 else math.floor(math.log2(d)) + 1
    length = power / 2**bits
    if length < radial.decimate_below and d % int(radial.decimate_below / length) != 0:
        return False
    return abs(k - m) <= max(block if radial.min_width is None else radial.min_width, radial.decay * length)


def slow_mask(layout: TokenLayout, radial: Radial, block_q: int, block_k: int) -> torch.Tensor:
    """Rules 1 to 5 token by token."""
    s, start, stop = layout.grid[1] * layout.grid[2], layout.text_before, layout.length - layout.text_after
    n = layout.video_tokens
    block = max(block_q, block_k)
    token = torch.tensor([[sees(r, c, layout, radial, block) for c in range(n)] for r in range(n)])
    rows_of = [range(a, min(a + block_q, layout.length)) for a in range(0, layout.length, block_q)]
    columns_of = [range(b, min(b + block_k, layout.length)) for b in range(0, layout.length, block_k)]
    mask = torch.zeros(len(rows_of), len(columns_of), dtype=torch.bool)
    for a, rows in enumerate(rows_of):
        for b, columns in enumerate(columns_of):
            text = any(t < start or t >= stop for t in (*rows, *columns))
            own = bool(set(rows) & set(columns))
            mask[a, b] = text or own
            for i in {(t - start) // s for t in rows if start <= t < stop}:
                for j in {(t - start) // s for t in columns if start <= t < stop}:
                    of_i = [t - start for t in rows if start <= t < stop and (t - start) // s == i]
                    of_j = [t - start for t in columns if start <= t < stop and (t - start) // s == j]
                    covered = token[of_i][:, of_j].sum(0)
                    touched = int((covered > 0).sum())
                    good = int((3 * covered > len(of_i)).sum())
                    mask[a, b] |= touched > 0 and 10 * good > 6 * touched
    return mask[None]


@pytest.mark.parametrize(
    ("frames", "block", "decay", "sink", "kept"),
    [
        (18, 128, 0.2, 1, 83_728),
        (18, 128, 1.0, 1, 125_656),
        (30, 128, 0.95, 0, 222_452),
        (30, 128, 0.95, 1, 243_688),
        (20, 64, 0.8, 1, 502_720),
    ],
)
def test_aligned_sizes_keep_the_published_blocks(frames: int, block: int, decay: float, sink: int, kept: int) -> None:
    layout = TokenLayout((frames, 48, 80))
    mask = Radial(decay=decay, sink_frames=sink).select(layout, block, block)
    assert mask.shape == (1, layout.length // block, layout.length // block)
    assert int(mask.sum()) == kept


@settings(max_examples=60, deadline=None)
@given(layout=layouts, radial=radials, block_q=blocks, block_k=blocks)
def test_equals_the_token_level_reference(layout: TokenLayout, radial: Radial, block_q: int, block_k: int) -> None:
    mask = radial.select(layout, block_q, block_k)
    assert torch.equal(mask, slow_mask(layout, radial, block_q, block_k))


def test_a_band_thinner_than_a_third_of_a_block_is_not_kept_for_the_few_columns_of_a_frame_border() -> None:
    layout, radial = TokenLayout((4, 5, 9)), Radial(0.06, None, 0, -1, 0, 0)
    assert torch.equal(radial.select(layout, 32, 16), slow_mask(layout, radial, 32, 16))


def test_misaligned_frames_keep_their_last_tokens() -> None:
    # 5 x 9 = 45 tokens a frame: every frame but the first starts and ends inside a block of 16.
    layout, radial = TokenLayout((6, 5, 9)), Radial(decay=0.3, min_width=None)
    mask = radial.select(layout, 16, 16)
    assert torch.equal(mask, slow_mask(layout, radial, 16, 16))
    for frame in range(6):
        first, last = frame * 45 // 16, (frame * 45 + 44) // 16
        assert mask[0, first : last + 1, first : last + 1].all()


@settings(max_examples=60, deadline=None)
@given(layout=layouts, radial=radials, block_q=blocks, block_k=blocks)
def test_every_query_block_keeps_its_own_tokens_and_text(
    layout: TokenLayout, radial: Radial, block_q: int, block_k: int
) -> None:
    mask = radial.select(layout, block_q, block_k)[0]
    for token in range(layout.length):
        assert mask[token // block_q, token // block_k]
    for token in (*range(layout.text_before), *range(layout.length - layout.text_after, layout.length)):
        assert mask[token // block_q].all()
        assert mask[:, token // block_k].all()


@settings(max_examples=40, deadline=None)
@given(radial=radials, frames=st.integers(1, 9), width=st.integers(1, 4), text=st.sampled_from((0, 16, 32)))
def test_aligned_masks_without_a_sink_are_symmetric(radial: Radial, frames: int, width: int, text: int) -> None:
    layout = TokenLayout((frames, 4, 8 * width), text, 5)
    mask = Radial(radial.decay, None, 0, radial.full_distance, radial.min_width, radial.decimate_below)
    selected = mask.select(layout, 16, 16)
    assert torch.equal(selected, selected.mT)


def test_the_sink_is_a_column_not_a_row() -> None:
    mask = Radial(sink_frames=1).select(TokenLayout((20, 8, 8)), 64, 64)[0]
    assert mask[:, 0].all()
    assert not mask[0].all()


@settings(max_examples=60, deadline=None)
@given(layout=layouts, radial=radials, more=st.floats(1.0, 4.0), block=blocks)
def test_a_larger_decay_keeps_at_least_as_much(layout: TokenLayout, radial: Radial, more: float, block: int) -> None:
    less = radial.select(layout, block, block)
    wider = Radial(
        radial.decay * more,
        None,
        radial.sink_frames,
        radial.full_distance,
        radial.min_width,
        radial.decimate_below,
    ).select(layout, block, block)
    assert not (less & ~wider).any()


@pytest.mark.parametrize("grid", [(9, 16, 16), (13, 15, 26), (1, 48, 48)])
@pytest.mark.parametrize("target", [0.15, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("block", [16, 64])
def test_density_is_met_within_a_block_diagonal(grid: tuple[int, int, int], target: float, block: int) -> None:
    layout = TokenLayout(grid)
    reached = area_density(Radial(density=target).select(layout, block, block), layout, block, block)
    # A token more of width adds at most one block diagonal on either side to each pair of frames.
    diagonal = 2 * (math.ceil(layout.frame_tokens / block) + 1) * block * block * grid[0] ** 2 / layout.length**2
    assert abs(reached - target) <= diagonal


@settings(max_examples=20, deadline=None)
@given(layout=layouts, target=st.floats(0.01, 0.99), block=blocks)
def test_no_decay_comes_nearer_to_the_density(layout: TokenLayout, target: float, block: int) -> None:
    solved = Radial(density=target).solve(layout, block, block)
    assert solved == Radial(density=target).solve(layout, block, block)
    reached = area_density(solved.select(layout, block, block), layout, block, block)
    for tenth in range(1, 80):
        other = Radial(
            tenth / 20, None, solved.sink_frames, solved.full_distance, solved.min_width, solved.decimate_below
        )
        density = area_density(other.select(layout, block, block), layout, block, block)
        assert abs(reached - target) <= abs(density - target) + 1e-12


def test_the_ladder_gives_up_published_rules_one_by_one() -> None:
    layout = TokenLayout((9, 16, 16))
    # Thinnest density of each rung at this size, from the widest rung to the thinnest.
    rungs = [
        (0.70, Radial()),
        (0.45, Radial(min_width=0)),
        (0.25, Radial(min_width=0, full_distance=0)),
        (0.15, Radial(min_width=0, full_distance=-1)),
        (0.05, Radial(min_width=0, full_distance=-1, sink_frames=0)),
    ]
    for target, rung in rungs:
        solved = Radial(density=target).solve(layout, 64, 64)
        assert (solved.min_width, solved.full_distance, solved.sink_frames) == (
            rung.min_width,
            rung.full_distance,
            rung.sink_frames,
        )
        assert solved.density is None


def test_density_one_selects_everything() -> None:
    mask = Radial(density=1.0).select(TokenLayout((40, 3, 5), 3, 2), 16, 32)
    assert mask.shape == (1, 38, 19)
    assert mask.all()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("density", 0.0),
        ("density", 1.5),
        ("density", -0.1),
        ("density", math.nan),
        ("decay", 0.0),
        ("decay", math.inf),
        ("sink_frames", -1),
        ("full_distance", -2),
        ("min_width", -1),
        ("decimate_below", -1),
    ],
)
def test_settings_out_of_range_are_refused_in_one_line(setting: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^selection\.{setting}: .*; valid: ") as caught:
        Radial(**{setting: value})
    assert "\n" not in str(caught.value)
