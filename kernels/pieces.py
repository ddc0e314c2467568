"""Whether tensors lie in pieces of 16 bytes, as wide loads and the tensor memory accelerator want them."""

import torch
from torch import Tensor

PIECE_BYTES = 16  # what a thread loads at once


def is_aligned(x: Tensor) -> bool:
    """Whether channels of x [..., D] lie side by side and each row of them starts at a multiple of 16 bytes."""
    piece = PIECE_BYTES // x.element_size()
    rows = [stride for size, stride in zip(x.shape[:-1], x.stride(), strict=False) if size > 1]
    return x.stride(-1) == 1 and x.data_ptr() % PIECE_BYTES == 0 and all(stride % piece == 0 for stride in rows)


def aligned(x: Tensor) -> Tensor:
    """x itself if it `is_aligned`, else a contiguous copy; D is a multiple of 16 bytes."""
    return x if is_aligned(x) else x.clone(memory_format=torch.contiguous_format)


def pieces(x: Tensor) -> list[int]:
    """Strides of an `aligned` tensor in pieces of 16 bytes, without the last, which is 1 element."""
    piece = PIECE_BYTES // x.element_size()
    # Where there is one entry its stride is never used, and may be anything.
    return [stride // piece for stride in x.stride()[:-1]]
