"""Token layouts."""

import pytest

from sparse_dit.layout import TokenLayout


def test_counts_tokens() -> None:
    layout = TokenLayout((3, 5, 7), text_before=2, text_after=11)
    assert (layout.frames, layout.frame_tokens, layout.video_tokens, layout.length) == (3, 35, 105, 118)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [(((3, 0, 7),), "grid"), (((3, 5),), "grid"), (((3, 5, 7), -1), "text_before"), (((3, 5, 7), 0, -2), "text_after")],
)
def test_refuses_impossible_layouts(arguments: tuple[object, ...], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: .*; valid: "):
        TokenLayout(*arguments)  # type: ignore[arg-type]
