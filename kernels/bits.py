"""Block lists as one bit a block, in which they are kept from step to step, and back."""

from torch import Tensor

from sparse_dit.kernels.blocks import BlockList
from sparse_dit.kernels.lists import lists_to_mask, mask_to_lists, pack_bits, unpack_bits


def lists_to_bits(blocks: BlockList, key_blocks: int) -> Tensor:
    """The listed blocks as `lists.pack_bits` packs their mask; nothing waits for the device.

    Args:
        blocks: lists over at most `key_blocks` key blocks.
        key_blocks: width KB of the mask.

    Returns:
        uint8 [B or 1, H or 1, QB, ceil(KB / 8)], contiguous.

    Raises:
        ValueError: the lists reach beyond `key_blocks`.
    """
    if blocks.indices.is_cuda:
        from sparse_dit.kernels.bits_triton import triton_lists_to_bits

        if blocks.key_blocks > key_blocks:
            raise ValueError(f"key_blocks: {key_blocks}; valid: at least {blocks.key_blocks}, which the lists reach")
        return triton_lists_to_bits(blocks, key_blocks)
    return pack_bits(lists_to_mask(blocks, key_blocks))


def bits_to_lists(bits: Tensor, key_blocks: int, block_q: int, block_k: int) -> BlockList:
    """The inverse of `lists_to_bits`; nothing is read back, every row is trusted to have a block.

    Args:
        bits: as `lists_to_bits` returns them.
        key_blocks: width KB of the mask.
        block_q: query tokens a block.
        block_k: key tokens a block.

    Returns:
        A BlockList, KB wide.

    Raises:
        ValueError: the bits are not of that width.
    """
    if bits.is_cuda and bits.ndim == 4 and bits.shape[3] == -(-key_blocks // 8) and bits.is_contiguous():
        from sparse_dit.kernels.bits_triton import triton_bits_to_lists

        indices, counts = triton_bits_to_lists(bits, key_blocks)
        return BlockList(indices, counts, block_q, block_k, key_blocks=key_blocks)
    return mask_to_lists(unpack_bits(bits, key_blocks), block_q, block_k, capacity=key_blocks)
