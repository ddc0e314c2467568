"""Boxes cover blocks exactly; density and distance agree with counting tokens."""

import itertools
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_dit.layout import TokenLayout, text_blocks
from sparse_dit.orders.tables import place_text
from sparse_dit.selection.regions import Boxes, Distance, add_text, distance, mask_density

layouts = st.builds(
    TokenLayout,
    grid=st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 7)),
    text_before=st.sampled_from((0, 0, 3, 16, 19)),
    text_after=st.sampled_from((0, 0, 3, 16, 21)),
)
seeds = st.integers(0, 2**31)


def shuffled(layout: TokenLayout, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return place_text(layout, torch.randperm(layout.video_tokens, generator=generator)[None])[0]


@settings(max_examples=100, deadline=None)
@given(layout=layouts, block=st.sampled_from((4, 16, 32)), seed=seeds, random=st.booleans())
def test_boxes_cover_every_token_of_a_block_once(layout: TokenLayout, block: int, seed: int, random: bool) -> None:
    table = shuffled(layout, seed) if random else torch.arange(layout.length)
    boxes = Boxes.cut(layout, block, table if random else None)
    assert int(boxes.count.sum()) == len(boxes.first)
    for owner in range(math.ceil(layout.length / block)):
        tokens = table[owner * block : (owner + 1) * block] - layout.text_before
        tokens = tokens[(tokens >= 0) & (tokens < layout.video_tokens)]
        own = range(int(boxes.start[owner]), int(boxes.start[owner] + boxes.count[owner]))
        volumes = []
        covered = torch.zeros(layout.grid, dtype=torch.int64)
        for box in own:
            spans = tuple(slice(int(a), int(b) + 1) for a, b in zip(boxes.first[box], boxes.last[box], strict=True))
            covered[spans] += 1
            volumes.append(covered[spans].numel())
        expected = torch.zeros(layout.video_tokens, dtype=torch.int64)
        expected[tokens] = 1
        assert torch.equal(covered.flatten(), expected)
        assert volumes == sorted(volumes, reverse=True)
        if own:
            places = expected.reshape(layout.grid).nonzero()
            assert torch.equal(boxes.hulls[0][owner], places.amin(0))
            assert torch.equal(boxes.hulls[1][owner], places.amax(0))
            assert torch.equal(boxes.largest[0][owner], boxes.first[own[0]])


def test_runs_of_rows_are_few_boxes() -> None:
    # Blocks of 20 over rows of 7: at most the end of a row, full rows, and the start of a row in each of two frames.
    boxes = Boxes.cut(TokenLayout((3, 8, 7)), 20, None)
    assert int(boxes.count.max()) <= 6
    assert int(Boxes.cut(TokenLayout((4, 8, 8)), 16, None).count.max()) == 1


@settings(max_examples=100, deadline=None)
@given(layout=layouts, block_q=st.sampled_from((16, 32)), block_k=st.sampled_from((16, 64)), seed=seeds)
def test_density_and_distance_count_tokens(layout: TokenLayout, block_q: int, block_k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (3, math.ceil(layout.length / block_q), math.ceil(layout.length / block_k))
    mask = torch.rand(shape, generator=generator) < 0.4
    exact = torch.rand(3, layout.length, layout.length, generator=generator) < 0.3
    computed = torch.zeros_like(exact)
    for head, row, column in mask.nonzero().tolist():
        computed[head, row * block_q : (row + 1) * block_q, column * block_k : (column + 1) * block_k] = True
    area = 3 * layout.length**2
    assert math.isclose(
        mask_density(mask, layout, block_q, block_k), int(computed.sum()) / area, rel_tol=1e-12, abs_tol=0
    )
    expected = Distance(int((computed & ~exact).sum()) / area, int((exact & ~computed).sum()) / area)
    assert torch.allclose(
        torch.tensor(distance(mask, exact, block_q, block_k), dtype=torch.float64),
        torch.tensor(expected, dtype=torch.float64),
        rtol=1e-12,
        atol=0,
    )


@settings(max_examples=30, deadline=None)
@given(layout=layouts, block_q=st.sampled_from((16, 32)), block_k=st.sampled_from((16, 64)))
def test_text_is_added_as_rows_and_as_columns(layout: TokenLayout, block_q: int, block_k: int) -> None:
    query, key = text_blocks(layout, block_q, block_k)
    added = add_text(torch.zeros(2, len(query), len(key), dtype=torch.bool), layout, block_q, block_k)
    for row, column in itertools.product(range(len(query)), range(len(key))):
        assert (added[:, row, column] == (query[row] | key[column])).all()
