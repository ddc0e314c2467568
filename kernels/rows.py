"""Attention of a few query rows: how far it is, under bands of keys, from that over all keys, and what follows."""

import torch
from torch import Tensor

from sparse_dit.kernels.backends import CUDA_DTYPES
from sparse_dit.kernels.ops import DTYPES

# The sums of 64 rows of 256 channels do not fit a program's registers.
HEAD_SIZES = (64, 72, 88, 96, 128)
# Scores of rows held at once by the torch path.
SCORES = 2**26


def band_errors(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, own: Tensor, keys: Tensor, reach: int, *, scale: float
) -> Tensor:
    """Squared distance of what a few queries get from the keys of a band from what they get from all keys.

    error_m = sum over channels of (out_m - out)^2 of each row, out softmax attention over all keys, out_m that over the
    keys that band m leaves: what head typing by sampled rows sums up (Sparse VideoGen, arXiv 2502.01776). Tokens have a
    unit for each band; a row sees the keys that are not `reach` units away or farther. NaN is at no distance: a query
    of unit NaN sees every key, and a key of unit NaN is seen by every query.

    One pass over k and v for all bands. Floor: the bytes of k and v once.

    Args:
        q, k, v: [B, H, S, D], fp16, bf16 or fp32, any strides.
        rows: int64 [R], ids of the queries; they may repeat.
        own: fp32 [M, S], the units of tokens as queries, whole numbers or NaN.
        keys: fp32 [M, S], the units of tokens as keys.
        reach: units, 0 or more. Where a band leaves a row no key, it gets zeros.
        scale: positive factor on the scores.

    Returns:
        fp32 [M, B, H, R].

    Raises:
        ValueError: an argument is not as above.
    """
    _check(q, k, v, rows, own, keys, reach)
    if q.is_cuda and q.dtype in CUDA_DTYPES and q.shape[-1] in HEAD_SIZES and len(own) == 2:
        from sparse_dit.kernels.rows_triton import triton_band_errors

        return triton_band_errors(q, k, v, rows, own, keys, reach, scale)
    whole, *left = torch_rows(q[:, :, rows], k, v, seen_keys(own[:, rows], keys, reach), scale)
    return torch.stack([(out - whole).square().sum(dim=-1) for out in left])


def closest_orders(errors: Tensor, orders: Tensor) -> Tensor:
    """The order of each head: that of the band whose error, summed over batch entries and rows, is the smaller one.

    Args:
        errors: fp32 [2, B, H, R], as `band_errors` gives them.
        orders: int64 [2, S], the order that goes with each band.

    Returns:
        int64 [H, S]; where the errors are equal, the first order.

    Raises:
        ValueError: an argument is not as above.
    """
    if errors.dtype is not torch.float32 or errors.ndim != 4 or len(errors) != 2 or 0 in errors.shape:
        raise ValueError(
            f"errors: {errors.dtype} {list(errors.shape)}; valid: torch.float32 [2, B, H, rows], none of them 0"
        )
    if orders.dtype is not torch.int64 or orders.ndim != 2 or len(orders) != 2 or orders.device != errors.device:
        raise ValueError(
            f"orders: {orders.dtype} {list(orders.shape)} on {orders.device}; valid: torch.int64 [2, tokens] on "
            f"{errors.device}"
        )
    if errors.is_cuda:
        from sparse_dit.kernels.rows_triton import triton_closest_orders

        return triton_closest_orders(errors, orders)
    first, second = errors.sum(dim=(1, 3))
    return torch.where((second < first)[:, None], orders[1], orders[0])


def seen_keys(own: Tensor, keys: Tensor, reach: int) -> Tensor:
    """Which keys queries see under each band, bool [M, R, S], by their units [M, R] and [M, S]; see `band_errors`."""
    return ~((own[..., None] - keys[:, None]).abs() >= reach)


def torch_rows(q: Tensor, k: Tensor, v: Tensor, masks: Tensor, scale: float) -> Tensor:
    """Attention of rows q [B, H, R, D] over all keys, and over those that masks bool [M, R, S] leave.

    Some heads at a time; zeros where a mask leaves nothing. Returns fp32 [1 + M, B, H, R, D].
    """
    heads = max(1, SCORES // (q.shape[0] * q.shape[2] * k.shape[2]))
    found = []
    for some_q, some_k, some_v in zip(*(torch.split(x, heads, dim=1) for x in (q, k, v)), strict=True):
        scores, values = scale * some_q.float() @ some_k.float().mT, some_v.float()
        outs = [scores.softmax(dim=-1) @ values]
        outs += [scores.masked_fill(~mask, -torch.inf).softmax(dim=-1).nan_to_num() @ values for mask in masks]
        found.append(torch.stack(outs))
    return torch.cat(found, dim=2)


def _check(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, own: Tensor, keys: Tensor, reach: int) -> None:
    if q.dtype not in DTYPES or q.ndim != 4 or 0 in q.shape:
        raise ValueError(
            f"q: {q.dtype} {list(q.shape)}; valid: a non-empty [B, H, S, D] of {', '.join(map(str, DTYPES))}"
        )
    for name, x in (("k", k), ("v", v)):
        if (x.shape, x.dtype, x.device) != (q.shape, q.dtype, q.device):
            raise ValueError(
                f"{name}: {x.dtype} {list(x.shape)} on {x.device}; valid: {q.dtype} {list(q.shape)} on {q.device}, "
                "like q"
            )
    if rows.dtype is not torch.int64 or rows.ndim != 1 or len(rows) == 0 or rows.device != q.device:
        raise ValueError(
            f"rows: {rows.dtype} {list(rows.shape)} on {rows.device}; valid: torch.int64 [rows], not empty, "
            f"on {q.device}"
        )
    for name, units in (("own", own), ("keys", keys)):
        if units.dtype is not torch.float32 or units.shape != (len(own), q.shape[2]) or units.device != q.device:
            raise ValueError(
                f"{name}: {units.dtype} {list(units.shape)} on {units.device}; valid: torch.float32 "
                f"[bands, {q.shape[2]}] on {q.device}, alike for queries and keys"
            )
    if reach < 0:
        raise ValueError(f"reach: {reach}; valid: 0 or more units")
