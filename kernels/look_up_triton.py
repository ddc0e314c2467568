"""Triton: whether block lists have given blocks. Names as in `attention`."""

# Triton kernel bodies are a language of their own: their arguments carry no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="operator, index, attr-defined"

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def is_listed(o_block, p_indices, i_index, count, steps):
    """Whether each block is among the `count` entries of a list. They ascend: each looks itself up by bisection."""
    b_low = tl.zeros(o_block.shape, tl.int32)  # becomes the number of entries below the block
    b_high = b_low + count
    for _ in tl.range(0, steps):
        m_open = b_low < b_high
        b_middle = (b_low + b_high) // 2
        b_entry = tl.load(p_indices + b_middle * i_index, mask=m_open, other=0)
        b_low = tl.where(m_open & (b_entry < o_block), b_middle + 1, b_low)
        b_high = tl.where(m_open & (b_entry >= o_block), b_middle, b_high)
    b_entry = tl.load(p_indices + b_low * i_index, mask=b_low < count, other=-1)
    return b_entry == o_block


def look_up_steps(indices: Tensor) -> int:
    """Bisections that settle any list of indices [.., width]."""
    return indices.shape[-1].bit_length()
