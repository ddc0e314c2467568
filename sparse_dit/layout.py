"""Where the tokens of one self-attention call come from."""

from dataclasses import dataclass
from numbers import Integral

import torch


@dataclass(frozen=True)
class TokenLayout:
    """The tokens of one attention call, in the order the model flattens them.

    The sequence is `text_before` text tokens, then the video tokens row-major over (T, H, W) with W fastest, then
    `text_after` text tokens.

    Args:
        grid: (T, H, W), the video tokens after patching; an image has T = 1.
        text_before: number of text tokens in front of the video tokens.
        text_after: number of text tokens behind the video tokens.

    Raises:
        ValueError: a side of the grid is below 1, a text span is negative, or one of them is no whole number.
    """

    grid: tuple[int, int, int]
    text_before: int = 0
    text_after: int = 0

    def __post_init__(self) -> None:
        if len(self.grid) != 3 or not all(isinstance(side, Integral) and side > 0 for side in self.grid):
            raise ValueError(f"grid: {self.grid!r}; valid: (T, H, W), three positive whole numbers")
        for name in ("text_before", "text_after"):
            tokens = getattr(self, name)
            if not isinstance(tokens, Integral) or tokens < 0:
                raise ValueError(f"{name}: {tokens!r}; valid: 0 or more tokens, a whole number")

    @property
    def frames(self) -> int:
        """Number of latent frames T."""
        return self.grid[0]

    @property
    def frame_tokens(self) -> int:
        """Video tokens of one latent frame, H * W."""
        return self.grid[1] * self.grid[2]

    @property
    def video_tokens(self) -> int:
        """Video tokens of the whole grid, T * H * W."""
        return self.frames * self.frame_tokens

    @property
    def length(self) -> int:
        """All tokens of the sequence, text included."""
        return self.text_before + self.video_tokens + self.text_after


def block_spans(length: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First token, and one past the last token, of each block of `block` tokens; int64 [blocks] on the CPU."""
    first = torch.arange(0, length, block)
    return first, (first + block).clamp(max=length)


def text_blocks(layout: TokenLayout, block_q: int, block_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks that hold a text token. No order moves text, so that they are the same in every order.

    Args:
        layout: the tokens of the call.
        block_q: query tokens of a block.
        block_k: key tokens of a block.

    Returns:
        bool [QB] of query blocks and bool [KB] of key blocks, on the CPU.
    """
    text_end, text_start = layout.text_before, layout.length - layout.text_after
    query, key = (block_spans(layout.length, block) for block in (block_q, block_k))
    return (query[0] < text_end) | (query[1] > text_start), (key[0] < text_end) | (key[1] > text_start)
