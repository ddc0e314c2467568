"""Queries, keys and values in the order in which they enter blocks, and in the same pass the means of runs of them."""

from typing import NamedTuple

from torch import Tensor

from sparse_dit.kernels.backends import CUDA_DTYPES
from sparse_dit.kernels.gather import gather_tokens
from sparse_dit.kernels.pool import block_means, check_pool
from sparse_dit.kernels.scores import part_means

UNITS = (4, 8, 16, 32, 64, 128)  # tokens of a run that the one pass takes


class Ordered(NamedTuple):
    """q, k and v [B, H, S, D] in the order in which their tokens enter blocks."""

    q: Tensor
    k: Tensor
    v: Tensor


def order_with_means(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_order: Tensor,
    k_order: Tensor,
    units: tuple[int, int],
    *,
    parts: bool,
) -> tuple[Ordered, Tensor, Tensor]:
    """q, k and v in their orders, and the means of runs of queries and of keys.

    Of the tokens of a run in `UNITS` a GPU takes the means while it moves them, in one pass for everything: floor, q, k
    and v read and written once, and no byte more for the means.

    Args:
        q, k, v: tokens [B, H, S, D], fp16, bf16 or fp32, any strides.
        q_order: int64 [1 or H, S], the ids of queries in the order in which they enter blocks.
        k_order: likewise of keys and values.
        units: tokens of a run of queries and of keys, at least 1 each.
        parts: means as `scores.part_means` gives them (16 bits on a GPU), else as `pool.block_means` does (fp32).

    Returns:
        What is in order; the means of q [B, H, ceil(S / units[0]), D]; those of k.

    Raises:
        ValueError: as `pool.block_means`; q, k and v are not alike; an order leaves tokens out.
    """
    for name, x, order, unit in (("q", q, q_order, units[0]), ("k", k, k_order, units[1]), ("v", v, k_order, 1)):
        if (x.shape, x.dtype, x.device) != (q.shape, q.dtype, q.device):
            raise ValueError(
                f"{name}: {x.dtype} {list(x.shape)} on {x.device}; valid: {q.dtype} {list(q.shape)} on {q.device}, "
                "like q"
            )
        check_pool(x, unit, order)
        if order.shape[1] != q.shape[2]:
            raise ValueError(f"order: for {order.shape[1]} tokens; valid: {q.shape[2]}, as many as q has")
    if q.is_cuda and q.dtype in CUDA_DTYPES and all(unit in UNITS for unit in units):
        from sparse_dit.kernels.ordered_triton import triton_order_with_means

        moved, q_means, k_means = triton_order_with_means(q, k, v, q_order, k_order, units, parts=parts)
        return Ordered(*moved), q_means, k_means
    tokens = in_order(q, k, v, q_order, k_order)
    means = part_means if parts else block_means
    return tokens, means(tokens.q, units[0]), means(tokens.k, units[1])


def in_order(q: Tensor, k: Tensor, v: Tensor, q_order: Tensor, k_order: Tensor) -> Ordered:
    """q, k and v in their orders; arguments as `order_with_means`, taken on trust."""
    if q.is_cuda:
        from sparse_dit.kernels.gather_triton import triton_gather

        if q_order is k_order:
            return Ordered(*triton_gather((q, k, v), q_order))
        return Ordered(*triton_gather((q,), q_order), *triton_gather((k, v), k_order))
    return Ordered(gather_tokens(q, q_order), gather_tokens(k, k_order), gather_tokens(v, k_order))
