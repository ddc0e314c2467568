"""Tables of token ids: from an order of the video tokens to one of the whole sequence, and back again."""

import torch

from sparse_dit.layout import TokenLayout


def place_text(layout: TokenLayout, video: torch.Tensor) -> torch.Tensor:
    """The table of a whole sequence from an order of its video tokens.

    Args:
        layout: the tokens.
        video: int64 [orders, video_tokens], video tokens counted from the first one.

    Returns:
        int64 [orders, layout.length], text tokens at their own positions.
    """
    table = torch.arange(layout.length).repeat(len(video), 1)
    table[:, layout.text_before : layout.text_before + layout.video_tokens] = video + layout.text_before
    return table


def inverse(table: torch.Tensor) -> torch.Tensor:
    """The table that undoes another: `x[table][inverse(table)]` is x.

    Args:
        table: integers [..., n], each row a permutation of 0 to n - 1.

    Returns:
        The position of every token id in the order; shape, dtype and device of `table`.
    """
    positions = torch.arange(table.shape[-1], dtype=table.dtype, device=table.device)
    return torch.empty_like(table).scatter_(-1, table.long(), positions.expand_as(table))
