"""Orders: permutations that leave text alone, and the shapes that they promise."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_dit.layout import TokenLayout
from sparse_dit.orders import ORDERS, Axes, Hilbert, Order, Rows, Serpentine, Tiles, TimeMajor, inverse
from sparse_dit.orders.hilbert import curve

HEADS = 3
FLATTENINGS = ("thw", "twh", "htw", "hwt", "wth", "wht")
layouts = st.builds(
    TokenLayout,
    grid=st.tuples(st.integers(1, 6), st.integers(1, 7), st.integers(1, 9)),
    text_before=st.integers(0, 5),
    text_after=st.integers(0, 5),
)
orders = st.one_of(
    st.sampled_from((Rows(), TimeMajor(), Hilbert(), Serpentine())),
    st.builds(
        Tiles,
        st.tuples(st.integers(0, 4), st.integers(0, 5), st.integers(0, 6)),
        st.sampled_from(FLATTENINGS),
    ),
    st.builds(Axes, st.sampled_from(FLATTENINGS)),
    st.builds(Axes, st.tuples(*[st.sampled_from(FLATTENINGS)] * HEADS)),
)


def video(order: Order, grid: tuple[int, int, int]) -> list[int]:
    table = order.table(TokenLayout(grid), 1)
    assert table is not None
    return table[0].tolist()  # type: ignore[no-any-return]


def steps(order: Order, grid: tuple[int, int, int]) -> torch.Tensor:
    """Distance in the grid from each token of an order to the next."""
    places = torch.stack(torch.unravel_index(torch.tensor(video(order, grid)), grid), 1)
    return places.diff(dim=0).abs().sum(1)


@settings(max_examples=150, deadline=None)
@given(layout=layouts, order=orders)
def test_every_order_is_a_permutation_with_an_exact_inverse_that_moves_no_text(
    layout: TokenLayout, order: Order
) -> None:
    table = order.table(layout, HEADS)
    token = torch.arange(layout.length)
    if table is None:
        return
    assert table.dtype == torch.int64
    assert table.shape in ((1, layout.length), (HEADS, layout.length))
    assert torch.equal(table.sort().values, token.expand_as(table))
    assert torch.equal(table[:, : layout.text_before], token[: layout.text_before].expand(len(table), -1))
    behind = layout.text_before + layout.video_tokens
    assert torch.equal(table[:, behind:], token[behind:].expand(len(table), -1))
    back = inverse(table)
    assert torch.equal(table.gather(1, back), token.expand_as(table))
    assert torch.equal(back.gather(1, table), token.expand_as(table))


def test_the_inverse_keeps_dtype_and_undoes_a_gather() -> None:
    table = torch.stack([torch.randperm(37) for _ in range(4)]).int()
    data = torch.rand(4, 37)
    back = inverse(table)
    assert back.dtype == torch.int32
    assert torch.equal(data.gather(1, table.long()).gather(1, back.long()), data)


def test_every_registered_order_has_defaults_and_can_be_hashed() -> None:
    for cls in ORDERS.values():
        assert hash(cls()) == hash(cls())


def test_rows_move_nothing() -> None:
    assert Rows().table(TokenLayout((3, 4, 5), 2), 4) is None


def test_time_major_puts_all_frames_of_a_pixel_side_by_side() -> None:
    layout = TokenLayout((3, 4, 5), text_before=2, text_after=1)
    table = TimeMajor().table(layout, 1)
    assert table is not None
    for pixel, frame in itertools.product(range(20), range(3)):
        assert table[0, 2 + pixel * 3 + frame] == 2 + frame * 20 + pixel


def test_axes_name_the_slowest_axis_first() -> None:
    grid = (2, 3, 4)
    for name in FLATTENINGS[1:]:
        expected = sorted(
            itertools.product(*map(range, grid)), key=lambda place: [place["thw".index(axis)] for axis in name]
        )
        assert video(Axes(name), grid) == [(t * 3 + h) * 4 + w for t, h, w in expected]
    assert Axes("thw").table(TokenLayout(grid), 1) is None
    assert video(Axes("hwt"), grid) == video(TimeMajor(), grid)


def test_axes_can_differ_by_head() -> None:
    layout = TokenLayout((2, 3, 4), 1, 2)
    table = Axes(("thw", "wht", "hwt")).table(layout, 3)
    assert table is not None
    assert table[0].tolist() == list(range(layout.length))
    for head, name in ((1, "wht"), (2, "hwt")):
        alone = Axes(name).table(layout, 3)
        assert alone is not None
        assert torch.equal(table[head], alone[0])
    with pytest.raises(ValueError, match=r"^order\.axes: 3 orders; valid: one, or one for each of 4 heads$"):
        Axes(("thw", "wht", "hwt")).table(layout, 4)


def test_tiles_known_by_hand() -> None:
    assert video(Tiles((1, 2, 2)), (1, 2, 4)) == [0, 1, 4, 5, 2, 3, 6, 7]
    assert video(Tiles((1, 2, 2), inner="twh"), (1, 2, 4)) == [0, 4, 1, 5, 2, 6, 3, 7]
    # 3 x 5 in tiles of 2 x 2: the last column and the last row of tiles are smaller.
    assert video(Tiles((1, 2, 2)), (1, 3, 5)) == [0, 1, 5, 6, 2, 3, 7, 8, 4, 9, 10, 11, 12, 13, 14]
    assert video(Tiles((0, 1, 0)), (2, 2, 2)) == [0, 1, 4, 5, 2, 3, 6, 7]


@settings(max_examples=60, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(1, 9)),
    tile=st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4)),
)
def test_tiles_walk_tile_by_tile_without_padding(grid: tuple[int, int, int], tile: tuple[int, int, int]) -> None:
    expected = []
    corners = itertools.product(*(range(0, side, extent) for side, extent in zip(grid, tile, strict=True)))
    for corner in corners:
        spans = (range(c, min(c + extent, side)) for c, extent, side in zip(corner, tile, grid, strict=True))
        expected += [(t * grid[1] + h) * grid[2] + w for t, h, w in itertools.product(*spans)]
    assert video(Tiles(tile), grid) == expected


def test_drafts_tiles_are_sixteen_tokens_of_eight_rows() -> None:
    """DraftAttention's permutation: strips of 8 rows, columns of 16 tokens, then row by row."""
    expected = [
        frame * 48 * 80 + (strip * 8 + row) * 80 + column * 16 + token
        for frame, strip, column, row, token in itertools.product(range(2), range(6), range(5), range(8), range(16))
    ]
    assert video(Tiles((1, 8, 16)), (2, 48, 80)) == expected


@pytest.mark.parametrize(("tile", "grid"), [((1, 8, 16), (2, 48, 80)), ((2, 8, 8), (4, 48, 80))])
def test_blocks_are_tiles_where_tiles_divide_the_grid(tile: tuple[int, int, int], grid: tuple[int, int, int]) -> None:
    blocks = torch.tensor(video(Tiles(tile), grid)).unflatten(0, (-1, 128))
    for axis, place in enumerate(torch.unravel_index(blocks, grid)):
        assert (place.amax(1) - place.amin(1) + 1 == tile[axis]).all()


@settings(max_examples=150, deadline=None)
@given(grid=st.tuples(st.integers(1, 19), st.integers(1, 19), st.integers(1, 19)))
def test_every_step_of_the_hilbert_curve_goes_to_a_neighbour(grid: tuple[int, int, int]) -> None:
    assert (steps(Hilbert(), grid) == 1).all()


@pytest.mark.parametrize(
    "grid",
    [(21, 30, 52), (21, 45, 80), (33, 45, 80), (31, 45, 79), (13, 30, 45), (1, 64, 64), (1, 45, 79), (2, 101, 7)],
)
def test_the_hilbert_curve_holds_at_the_sizes_of_models(grid: tuple[int, int, int]) -> None:
    assert (steps(Hilbert(), grid) == 1).all()


def test_the_hilbert_curve_of_a_cube_fills_cube_after_cube() -> None:
    cells = curve((16, 16, 16))
    for side in (2, 4, 8):
        runs = cells.unflatten(0, (-1, side**3))
        assert (runs.amax(1) - runs.amin(1) == side - 1).all()


def test_hilbert_blocks_are_more_compact_than_rows() -> None:
    def spread(order: Order) -> float:
        table = order.table(TokenLayout((21, 30, 52)), 1)
        token = torch.arange(21 * 30 * 52) if table is None else table[0]
        blocks = torch.stack(torch.unravel_index(token[: 64 * 511], (21, 30, 52)), 1).unflatten(0, (-1, 64)).float()
        return float((blocks - blocks.mean(1, keepdim=True)).square().sum(2).mean())

    # 64 tokens as a cube of side 4 have a variance of 3 * 15 / 12; as a row of 52 some 200.
    assert spread(Hilbert()) < 2 * 3.75 < 50 < spread(Rows())


@settings(max_examples=60, deadline=None)
@given(grid=st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7)))
def test_every_step_of_the_serpentine_goes_to_a_neighbour(grid: tuple[int, int, int]) -> None:
    assert (steps(Serpentine(), grid) == 1).all()


@pytest.mark.parametrize(
    ("cls", "arguments", "name"),
    [
        (Tiles, {"tile": (1, -1, 2)}, "tile"),
        (Tiles, {"tile": (8, 8)}, "tile"),
        (Tiles, {"inner": "twt"}, "inner"),
        (Axes, {"axes": "whT"}, "axes"),
        (Axes, {"axes": ("thw", "")}, "axes"),
        (Axes, {"axes": ()}, "axes"),
    ],
)
def test_settings_out_of_range_are_refused_in_one_line(cls: Any, arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=rf"^order\.{name}: .*; valid: ") as caught:
        cls(**arguments)
    assert "\n" not in str(caught.value)
