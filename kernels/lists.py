"""Block masks to block lists and back."""

import torch
from torch import Tensor

from sparse_dit.kernels.blocks import BlockList


def mask_to_lists(mask: Tensor, block_q: int, block_k: int) -> BlockList:
    """Lists the key blocks of each query block, ascending.

    On a GPU this waits for the device: the longest row decides how wide the list is, and an empty row is an error.

    Args:
        mask: bool [B or 1, H or 1, QB, KB], true where query block and key block are computed together.
        block_q: query tokens a block.
        block_k: key tokens a block.

    Returns:
        A BlockList on the mask's device, as wide as its longest row.

    Raises:
        ValueError: mask is not a four-dimensional bool tensor, or a query block has no key block.
    """
    if mask.dtype is not torch.bool or mask.ndim != 4 or 0 in mask.shape:
        raise ValueError(f"mask: {mask.dtype} {list(mask.shape)}; valid: a non-empty bool [B or 1, H or 1, QB, KB]")
    row, key_block = mask.flatten(0, 2).nonzero(as_tuple=True)
    counts = mask.sum(dim=-1).flatten()
    if not counts.all():
        raise ValueError(f"mask: {int((counts == 0).sum())} query blocks have no key block; valid: at least one each")
    first = counts.cumsum(0) - counts
    indices = torch.zeros(counts.numel(), int(counts.max()), dtype=torch.int32, device=mask.device)
    indices[row, torch.arange(row.numel(), device=mask.device) - first[row]] = key_block.int()
    return BlockList(
        indices=indices.reshape(*mask.shape[:3], -1),
        counts=counts.int().reshape(mask.shape[:3]),
        block_q=block_q,
        block_k=block_k,
        key_blocks=mask.shape[-1],
    )


def lists_to_mask(blocks: BlockList, key_blocks: int) -> Tensor:
    """Marks the listed blocks: the inverse of `mask_to_lists`.

    Args:
        blocks: lists over at most `key_blocks` key blocks.
        key_blocks: width KB of the mask, in blocks.

    Returns:
        bool [B or 1, H or 1, QB, KB] on the list's device.

    Raises:
        ValueError: the lists reach beyond `key_blocks`.
    """
    if blocks.key_blocks > key_blocks:
        raise ValueError(f"key_blocks: {key_blocks}; valid: at least {blocks.key_blocks}, which the lists reach")
    # What a row holds behind its count may be anything: send it to one column too many, and cut that off.
    column = blocks.indices.long().masked_fill(blocks.unused(), key_blocks)
    mask = torch.zeros(*blocks.counts.shape, key_blocks + 1, dtype=torch.bool, device=blocks.indices.device)
    return mask.scatter_(-1, column, True)[..., :key_blocks]
