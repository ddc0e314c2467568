"""The density of block lists where they are, without waiting for them."""

import functools

import torch
from torch import Tensor

from sparse_dit.kernels.blocks import BlockList


def measured_density(blocks: BlockList, length: int) -> Tensor:
    """`BlockList.density` of a square call as a float64 scalar on the lists' device, which is not read back.

    One launch on a GPU. Floor: counts and one index a row once.

    Args:
        blocks: lists for `length` queries and keys.
        length: tokens of the sequence.
    """
    if blocks.counts.is_cuda:
        from sparse_dit.kernels.density_triton import triton_density

        return triton_density(blocks, length)
    return torch_density(blocks, length)


def torch_density(blocks: BlockList, length: int) -> Tensor:
    """The contract of `measured_density` in torch."""
    # A row ascends, so its last entry tells whether it has the ragged block at the end of the sequence.
    key_blocks = -(-length // blocks.block_k)
    missing = key_blocks - length / blocks.block_k
    width = blocks.counts.double()
    if missing:
        last = blocks.indices.gather(-1, blocks.counts[..., None].long() - 1).squeeze(-1)
        width = torch.add(width, last == key_blocks - 1, alpha=-missing)
    return (width @ _row_shares(length, blocks.block_q, blocks.block_k, width.device)).mean()


@functools.lru_cache(maxsize=16)
def _row_shares(length: int, block_q: int, block_k: int, device: torch.device) -> Tensor:
    """What one key block adds to the density of a square call, by the block of queries; float64 [QB]."""
    first = torch.arange(0, length, block_q)
    return (((first + block_q).clamp(max=length) - first).double() * block_k / length**2).to(device)
