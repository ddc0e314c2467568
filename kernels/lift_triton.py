"""Triton: how the Hopper kernel takes the scales of FP8 values in. Names as in `attention`."""

# Triton kernel bodies are a language of their own: their arguments carry no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="operator, index"

import triton
import triton.language as tl
from torch import Tensor

from sparse_dit.kernels.launches import device_of, launch_kernel, power_of_2


@triton.jit
def lift_kernel(p_scale, p_lift, p_top, groups, WIDTH: tl.constexpr):
    """The largest scale of one head, and of each scale log2 of its share of that, plus 8."""
    i_bh = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, WIDTH)
    m = o < groups
    b_scale = tl.load(p_scale + i_bh * groups + o, mask=m, other=0.0)
    top = tl.max(b_scale, 0)
    tl.store(p_lift + i_bh * groups + o, tl.log2(tl.where(m, b_scale / top, 1.0)) + 8.0, mask=m)
    tl.store(p_top + i_bh, top)


def lifts(v_scale: Tensor) -> tuple[Tensor, Tensor]:
    """What the kernel adds to the logarithms of weights, and what it divides sums by, to take the scales of values in.

    The largest weight, 1, becomes 2^8 where it meets values of the largest scale: E4M3 ends at 448.

    Args:
        v_scale: fp32 [B, H, groups], positive, contiguous.

    Returns:
        lift, base 2, [B, H, groups], 8 at most; the largest scale [B, H].
    """
    batch, heads, groups = v_scale.shape
    lift, top = v_scale.new_empty(v_scale.shape), v_scale.new_empty((batch, heads))
    with device_of(v_scale):
        launch_kernel(
            lift_kernel, (batch * heads,), v_scale, lift, top, groups,
            WIDTH=power_of_2(groups), num_warps=4,
        )  # fmt: skip
    return lift, top
