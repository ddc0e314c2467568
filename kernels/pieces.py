"""Whether tensors lie in pieces of 16 bytes, as wide loads and the tensor memory accelerator want them."""

import torch
from torch import Tensor

from sparse_dit.kernels.alike import remembered

PIECE_BYTES = 16  # what a thread loads at once


def is_aligned(x: Tensor) -> bool:
    """Whether channels of x [..., D] lie side by side and each row of them starts at a multiple of 16 bytes."""
    strides, piece = x.stride(), PIECE_BYTES // x.element_size()
    if strides[-1] != 1 or x.data_ptr() % PIECE_BYTES:
        return False
    return all(stride % piece == 0 or size == 1 for size, stride in zip(x.shape[:-1], strides, strict=False))


def aligned(x: Tensor) -> Tensor:
    """x itself if it `is_aligned`, else a contiguous copy; D is a multiple of 16 bytes."""
    return x if is_aligned(x) else x.clone(memory_format=torch.contiguous_format)


def pieces(x: Tensor) -> list[int]:
    """Strides of an `aligned` tensor in pieces of 16 bytes, without the last, which is 1 element."""
    piece = PIECE_BYTES // x.element_size()
    # Where there is one entry its stride is never used, and may be anything.
    return [stride // piece for stride in x.stride()[:-1]]


@remembered
def steps(*tensors: Tensor) -> tuple[int, tuple[int, ...]]:
    """How kernels that take any tensors step through some.

    Args:
        tensors: [B, H, S, D] each, all of one dtype.

    Returns:
        The elements of a piece of 16 bytes where all of them are `aligned`, else 1; and of each tensor the strides of
        batch entries, heads and tokens in such pieces, and that of channels in elements.
    """
    whole = all(is_aligned(x) for x in tensors)
    strides = tuple(stride for x in tensors for stride in (*(pieces(x) if whole else x.stride()[:-1]), x.stride(-1)))
    return PIECE_BYTES // tensors[0].element_size() if whole else 1, strides
