"""The window against the published rule spelled out, over tokens and over blocks, and the published densities."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_dit.layout import TokenLayout
from sparse_dit.orders import Axes, Hilbert, Rows, Tiles
from sparse_dit.orders.tables import place_text
from sparse_dit.selection.regions import distance, mask_density
from sparse_dit.selection.window import AxisWindow, Window

Extent = tuple[int, int, int]

layouts = st.builds(
    TokenLayout,
    grid=st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 7)),
    text_before=st.sampled_from((0, 0, 3, 16)),
    text_after=st.sampled_from((0, 0, 5, 17)),
)
extents = st.tuples(st.integers(0, 5), st.integers(0, 6), st.integers(0, 7))


@st.composite
def windows(draw: st.DrawFn, heads: int = 1) -> Window:
    sizes = tuple(draw(extents) for _ in range(heads))
    least = [min(max(side, 0) or 9 for side in axis) for axis in zip(*sizes, strict=True)]
    return Window(
        size=sizes if heads > 1 else sizes[0],
        stride=tuple(draw(st.integers(1, extent)) for extent in least),  # type: ignore[arg-type]
        dilation=draw(st.tuples(*[st.integers(1, 3)] * 3)),
        tile=draw(st.tuples(*[st.integers(1, 3)] * 3)),
    )


def gna_keys(q: int, length: int, window: int, stride: int) -> range:
    """Keys of a query as the reference words it: leader, reach to both sides, clamped, shifted by the overhang."""
    leader = min(q // stride * stride + stride // 2, length - 1)
    left, right = window // 2, window // 2 + window % 2 - 1
    start = max(leader - left, 0)
    if leader + right >= length:
        start -= leader + right - (length - 1)
    return range(start, start + window)


def sees(q: int, k: int, side: int, window: int, stride: int, dilation: int, tile: int) -> bool:
    """Whether a coordinate sees another: the rule inside the residue class of the query's tile."""
    q, k, side = q // tile, k // tile, math.ceil(side / tile)
    if q % dilation != k % dilation:
        return False
    length = len(range(q % dilation, side, dilation))
    return k // dilation in gna_keys(q // dilation, length, min(window or length, length), stride)


def slow_tokens(layout: TokenLayout, window: Window, size: Extent) -> torch.Tensor:
    """Bool [S, S], token by token, in the model's own order."""
    mask = torch.ones(layout.length, layout.length, dtype=torch.bool)
    places = list(itertools.product(*map(range, layout.grid)))
    for (i, query), (j, key) in itertools.product(enumerate(places), repeat=2):
        rules = zip(query, key, layout.grid, size, window.stride, window.dilation, window.tile, strict=True)
        mask[layout.text_before + i, layout.text_before + j] = all(sees(*rule) for rule in rules)
    return mask


def union(tokens: torch.Tensor, layout: TokenLayout, block_q: int, block_k: int) -> torch.Tensor:
    """Blocks that hold a pair of a token mask, or any text."""
    queries, keys = range(0, layout.length, block_q), range(0, layout.length, block_k)
    mask = torch.stack([torch.stack([tokens[i : i + block_q, j : j + block_k].any() for j in keys]) for i in queries])
    text = torch.ones(layout.length, dtype=torch.bool)
    text[layout.text_before : layout.text_before + layout.video_tokens] = False
    rows = torch.stack([text[i : i + block_q].any() for i in queries])
    columns = torch.stack([text[j : j + block_k].any() for j in keys])
    return mask | rows[:, None] | columns


def shuffled(layout: TokenLayout, seed: int, heads: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return place_text(
        layout, torch.stack([torch.randperm(layout.video_tokens, generator=generator) for _ in range(heads)])
    )


@settings(max_examples=200, deadline=None)
@given(data=st.data(), length=st.integers(1, 24), dilation=st.integers(1, 4))
def test_every_query_has_exactly_the_windows_keys_on_each_axis(data: st.DataObject, length: int, dilation: int) -> None:
    window = data.draw(st.integers(1, max(1, length // dilation)))
    stride = data.draw(st.integers(1, window))
    place = torch.arange(length)
    rule = AxisWindow(length, window, stride, dilation, 1).meets((place, place), (place, place))
    if dilation <= length:
        assert (rule.sum(1) == window).all()
    assert rule.diagonal().all()
    for q, k in itertools.product(range(length), repeat=2):
        assert bool(rule[q, k]) == sees(q, k, length, window, stride, dilation, 1)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), layout=layouts, blocks=st.tuples(*[st.sampled_from((4, 16, 32))] * 2), seed=st.integers(0, 99))
def test_equals_the_union_of_the_slow_token_mask(
    data: st.DataObject, layout: TokenLayout, blocks: tuple[int, int], seed: int
) -> None:
    window = data.draw(windows())
    tokens = slow_tokens(layout, window, window.windows[0])
    for table in (None, Hilbert().table(layout, 1), Tiles((2, 3, 2)).table(layout, 1), shuffled(layout, seed)):
        row = torch.arange(layout.length) if table is None else table[0]
        ordered = tokens[row][:, row]
        mask = window.select(layout, *blocks, table, heads=4)
        assert mask.shape[0] == 1
        assert torch.equal(mask[0], union(ordered, layout, *blocks))
        assert torch.equal(window.token_mask(layout, table)[0], ordered)
        assert distance(mask, ordered[None], *blocks).missing == 0.0


@settings(max_examples=15, deadline=None)
@given(data=st.data(), layout=layouts, seed=st.integers(0, 99))
def test_windows_and_orders_can_differ_by_head(data: st.DataObject, layout: TokenLayout, seed: int) -> None:
    window, table = data.draw(windows(heads=3)), shuffled(layout, seed, heads=3)
    one = Window(size=window.windows[0], stride=window.stride, dilation=window.dilation, tile=window.tile)
    for chosen, orders in ((window, table), (window, table[:1]), (window, None), (one, table)):
        mask = chosen.select(layout, 16, 16, orders, heads=3)
        assert mask.shape[0] == 3
        exact = chosen.token_mask(layout, orders, heads=3)
        for head in range(3):
            size = chosen.windows[head % len(chosen.windows)]
            alone = Window(size=size, stride=window.stride, dilation=window.dilation, tile=window.tile)
            row = None if orders is None else orders[head % len(orders)][None]
            assert torch.equal(mask[head], alone.select(layout, 16, 16, row, heads=3)[0])
            assert torch.equal(exact[head], alone.token_mask(layout, row)[0])


def test_more_windows_or_orders_than_heads_are_refused() -> None:
    layout = TokenLayout((2, 4, 8))
    with pytest.raises(ValueError, match=r"^selection\.size: 2 windows; valid: one, or one for each of 3 heads$"):
        Window(size=((1, 1, 1), (2, 2, 2))).select(layout, 16, 16, None, heads=3)
    with pytest.raises(ValueError, match=r"^table: 2 orders; valid: one, or one for each of 3 heads$"):
        Window(size=(1, 1, 1)).select(layout, 16, 16, shuffled(layout, 0, heads=2), heads=3)


@pytest.mark.parametrize(
    ("size", "tiles"),
    [((3, 3, 3), 27), ((5, 3, 3), 45), ((1, 6, 10), 60), ((3, 3, 5), 45), ((5, 1, 10), 50), ((5, 6, 1), 30)],
)
def test_sliding_tiles_keep_the_published_number_of_tiles(size: Extent, tiles: int) -> None:
    """STA on 30 x 48 x 80 in 300 tiles of 384 tokens, which are three blocks each."""
    layout = TokenLayout((30, 48, 80))
    table = Tiles((6, 8, 8)).table(layout, 24)
    mask = Window(size=size, tile=(6, 8, 8)).select(layout, 128, 128, table, heads=24)
    assert mask.shape == (1, 900, 900)
    assert (mask.sum(2) == 3 * tiles).all()
    assert mask_density(mask, layout, 128, 128) == tiles / 300
    # The published rule: the centre is clamped such that the window stays inside.
    whole = mask[0].unflatten(1, (300, 3)).unflatten(0, (300, 3))
    assert torch.equal(whole.all(3).all(1), whole.any(3).any(1))
    expected = torch.ones(300, 300, dtype=torch.bool)
    for axis, (k, n) in enumerate(zip(size, (5, 6, 10), strict=True)):
        place = torch.unravel_index(torch.arange(300), (5, 6, 10))[axis]
        centre = place.clamp(k // 2, n - 1 - k // 2) if k < n else place
        expected &= (place - centre[:, None]).abs() <= (k // 2 if k < n else n)
    assert torch.equal(whole.any(3).any(1), expected)


@pytest.mark.parametrize(
    ("grid", "tile", "size", "stride"),
    [
        ((30, 48, 80), (2, 8, 8), (18, 24, 24), (16, 8, 8)),
        ((30, 48, 80), (2, 8, 8), (30, 40, 40), (1, 32, 8)),
        ((16, 44, 80), (4, 4, 8), (16, 32, 48), (1, 8, 16)),
        ((16, 44, 80), (4, 4, 8), (16, 24, 16), (1, 8, 16)),
        ((1, 256, 256), (1, 8, 16), (1, 80, 80), (1, 16, 16)),
        ((1, 1, 32768), (1, 1, 128), (1, 1, 2048), (1, 1, 256)),
    ],
)
def test_the_perfectly_block_sparse_cases_of_gna_waste_nothing(
    grid: Extent, tile: Extent, size: Extent, stride: Extent
) -> None:
    layout = TokenLayout(grid)
    mask = Window(size=size, stride=stride).select(layout, 128, 128, Tiles(tile).table(layout, 1))
    assert mask_density(mask, layout, 128, 128) == math.prod(size) / math.prod(grid)


def test_without_a_stride_the_same_window_is_ragged_against_blocks() -> None:
    layout = TokenLayout((30, 48, 80))
    mask = Window(size=(18, 24, 24)).select(layout, 128, 128, Tiles((2, 8, 8)).table(layout, 1))
    assert mask_density(mask, layout, 128, 128) > 1.2 * 18 * 24 * 24 / (30 * 48 * 80)


def test_the_distance_from_the_token_mask_is_what_blocks_add() -> None:
    # One row of 32, blocks of 16, a window of 1: each block computes 16 x 16 where 16 pairs are asked for.
    layout, window = TokenLayout((1, 1, 32)), Window(size=(1, 1, 1))
    off = distance(window.select(layout, 16, 16), window.token_mask(layout), 16, 16)
    assert off == ((2 * 256 - 32) / 1024, 0.0)


@pytest.mark.parametrize("order", [Rows(), Hilbert(), Axes(("thw", "hwt", "wth"))])
@pytest.mark.parametrize("target", [0.2, 0.6])
@pytest.mark.parametrize("settings_", [{}, {"stride": (1, 2, 4)}, {"tile": (2, 4, 4)}])
def test_density_takes_the_largest_window_that_is_not_above(
    order: Any, target: float, settings_: dict[str, Any]
) -> None:
    layout = TokenLayout((8, 15, 26), text_after=9)
    table = order.table(layout, 3)
    window = Window(density=target, **settings_)
    solved = window.solve(layout, 32, 32, table)
    assert solved.density is None
    assert solved.size is not None
    mask = window.select(layout, 32, 32, table, heads=3)
    assert torch.equal(mask, solved.select(layout, 32, 32, table, heads=3))
    reached = mask_density(mask, layout, 32, 32)
    assert reached <= target
    places = [math.ceil(side / tile) for side, tile in zip(layout.grid, window.tile, strict=True)]
    # The next rung is where the axis grows that is the first to do so when the share of all axes grows.
    share = min((extent + 1) / side for extent, side in zip(solved.size, places, strict=True) if extent < side)
    above = tuple(
        max(extent, math.floor(share * side + 1e-9)) for extent, side in zip(solved.size, places, strict=True)
    )
    wider = Window(size=above, **settings_).select(layout, 32, 32, table, heads=3)
    assert mask_density(wider, layout, 32, 32) > target


def test_a_density_below_the_smallest_window_gives_that_window_and_density_one_gives_all() -> None:
    layout = TokenLayout((4, 8, 8))
    assert Window(density=0.001, stride=(1, 2, 2)).solve(layout, 16, 16).size == (1, 2, 2)
    assert Window(density=1.0).select(layout, 16, 16).all()


def test_recipes_read_one_window_one_a_head_or_a_density() -> None:
    window = Window(size=((1, 2, 3), (4, 5, 6)))
    assert window.windows == ((1, 2, 3), (4, 5, 6))
    assert Window(size=(1, 2, 3)).windows == ((1, 2, 3),)
    assert Window().windows == ()
    assert isinstance(hash(window), int)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("size", {"size": (1, -1, 2)}),
        ("size", {"size": (1, 2)}),
        ("size", {"size": ()}),
        ("size", {"size": ((1, 2, 3), (1, 2))}),
        ("size", {"size": ((1, 2, 3), 4)}),
        ("stride", {"size": (1, 2, 3), "stride": (1, 3, 1)}),
        ("stride", {"stride": (0, 1, 1)}),
        ("dilation", {"dilation": (1, 1, 0)}),
        ("tile", {"tile": (1, 1)}),
        ("density", {"density": 0.0}),
        ("density", {"density": 1.1}),
        ("density", {"density": None}),
    ],
)
def test_settings_out_of_range_are_refused_in_one_line(name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^selection\.{name}: .*; valid: ") as caught:
        Window(**arguments)
    assert "\n" not in str(caught.value)
