"""The density of block lists where they are, without waiting for them."""

import torch
from torch import Tensor

from sparse_dit.kernels.blocks import BlockList


def measured_density(blocks: BlockList, length: int) -> Tensor:
    """`BlockList.density` of a square call as a float64 scalar on the lists' device, which is not read back.

    Args:
        blocks: the lists.
        length: tokens of the sequence.
    """
    if blocks.counts.is_cuda:
        from sparse_dit.kernels.density_triton import triton_density

        return triton_density(blocks, length)
    # A row ascends, so its last entry tells whether it has the ragged block at the end of the sequence.
    key_blocks = -(-length // blocks.block_k)
    last = blocks.indices.gather(-1, blocks.counts[..., None].long() - 1).squeeze(-1)
    keys = blocks.counts.long() * blocks.block_k - (last == key_blocks - 1) * (key_blocks * blocks.block_k - length)
    queries = (length - torch.arange(0, length, blocks.block_q)).clamp(max=blocks.block_q)
    return (keys * queries.to(keys.device)).sum().double() / (keys[..., 0].numel() * length**2)
