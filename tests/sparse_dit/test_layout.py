"""Token layouts."""

import pytest

from sparse_dit.layout import TokenLayout, block_spans, text_blocks


def test_counts_tokens() -> None:
    layout = TokenLayout((3, 5, 7), text_before=2, text_after=11)
    assert (layout.frames, layout.frame_tokens, layout.video_tokens, layout.length) == (3, 35, 105, 118)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (((3, 0, 7),), "grid"),
        (((3, 5),), "grid"),
        (((3, 5.0, 7),), "grid"),
        (((3, 5, 7), -1), "text_before"),
        (((3, 5, 7), 2.5), "text_before"),
        (((3, 5, 7), 0, -2), "text_after"),
        (((3, 5, 7), 0, "2"), "text_after"),
    ],
)
def test_refuses_impossible_layouts(arguments: tuple[object, ...], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: .*; valid: "):
        TokenLayout(*arguments)  # type: ignore[arg-type]


def test_blocks_are_runs_of_which_only_the_last_is_short() -> None:
    first, last = block_spans(70, 32)
    assert (first.tolist(), last.tolist()) == ([0, 32, 64], [32, 64, 70])


@pytest.mark.parametrize("before", [0, 1, 16, 19])
@pytest.mark.parametrize("after", [0, 1, 16, 21])
@pytest.mark.parametrize("side", [1, 5, 8])
def test_text_blocks_are_those_with_a_token_of_text(before: int, after: int, side: int) -> None:
    layout = TokenLayout((3, side, 4), before, after)
    for block, marked in zip((16, 32), text_blocks(layout, 16, 32), strict=True):
        spans = [range(first, min(first + block, layout.length)) for first in range(0, layout.length, block)]
        video = range(before, before + layout.video_tokens)
        assert marked.tolist() == [any(token not in video for token in span) for span in spans]
