"""Block means of tokens, and how alike the tokens of a block are."""

import torch
from einops import rearrange
from torch import Tensor

from sparse_dit.kernels.ops import DTYPES

SPAN = 512  # tokens whose mean one program takes for `token_means`


def block_means(x: Tensor, block: int, *, order: Tensor | None = None, subtract: Tensor | None = None) -> Tensor:
    """The mean of the tokens of each block.

    One pass over x; the sums run in fp32. Floor: the bytes of x once (0.1 GB at S = 32,760, H = 12, D = 128 in 16 bits,
    0.024 ms at 4.2 TB/s) and one addition an element.

    Args:
        x: tokens [B, H, S, D], fp16, bf16 or fp32, any strides.
        block: tokens a block, at least 1.
        order: int64 [1 or H, L], the token ids in the order in which they enter blocks; None is 0 ... S - 1. Ids are
            taken on trust: reading them back would wait for the device.
        subtract: [B, H, D] taken from every token first, as smooth-K does with the mean of K (SageAttention,
            arXiv:2410.02367, section 4.2); None is zero.

    Returns:
        fp32 [B, H, N, D], N = ceil(L / block), L = S without an order. A ragged last block is divided by its own
        length.

    Raises:
        ValueError: an argument is not as above.
    """
    check_pool(x, block, order, subtract)
    if x.is_cuda:
        from sparse_dit.kernels.pool_triton import triton_pool

        return triton_pool(x, block, order, subtract, similarity=False)[0]
    return torch_pool(x, block, order, subtract, similarity=False)[0]


def block_similarity(
    x: Tensor, block: int, *, order: Tensor | None = None, subtract: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`block_means`, and from the same pass how alike the tokens of each block are.

    The similarity is the squared norm of the mean of the tokens divided by their length, which is the mean cosine over
    all pairs of the block's tokens, each with itself included: 1 where all point one way, 1 / n where n tokens are
    orthogonal. SpargeAttn (arXiv:2502.18137, section 3.3) judges by it whether a mean stands for its block. A token
    that is zero has no direction and counts as zero.

    Args:
        x: as for `block_means`.
        block: as for `block_means`.
        order: as for `block_means`.
        subtract: as for `block_means`; means and directions are those of the differences.

    Returns:
        means fp32 [B, H, N, D] and similarity fp32 [B, H, N], in [0, 1] to rounding.

    Raises:
        ValueError: an argument is not as above.
    """
    check_pool(x, block, order, subtract)
    if x.is_cuda:
        from sparse_dit.kernels.pool_triton import triton_pool

        return triton_pool(x, block, order, subtract, similarity=True)
    return torch_pool(x, block, order, subtract, similarity=True)


def token_means(x: Tensor) -> Tensor:
    """The mean of all tokens, fp32 [B, H, D]; x as for `block_means`.

    On a GPU by way of means of blocks: torch's own sum over tokens whose heads lie side by side is half as fast.
    """
    if not x.is_cuda:
        return x.mean(dim=2, dtype=torch.float32)
    from sparse_dit.kernels.pool_triton import triton_mean_of_means

    return triton_mean_of_means(block_means(x, SPAN), SPAN, x.shape[2])


def torch_pool(
    x: Tensor, block: int, order: Tensor | None, subtract: Tensor | None, similarity: bool
) -> tuple[Tensor, Tensor]:
    """Means and similarity (empty [B, H, 0] unless asked for), arguments already checked."""
    if order is not None:
        x = _in_order(x, order)
    if subtract is not None:
        x = x.float() - subtract.float()[:, :, None]
    means = _means(x, block)
    if not similarity:
        return means, means.new_empty(*x.shape[:2], 0)
    x = x.float()
    length = x.norm(dim=-1, keepdim=True)
    directions = torch.where(length > 0, x / length, 0)
    return means, _means(directions, block).square().sum(dim=-1)


def _in_order(x: Tensor, order: Tensor) -> Tensor:
    if order.shape[0] == 1:
        return x.index_select(2, order[0])
    return x.gather(2, order[None, :, :, None].expand(x.shape[0], -1, -1, x.shape[3]))


def _means(x: Tensor, block: int) -> Tensor:
    whole = x.shape[2] // block * block
    blocks = rearrange(x[:, :, :whole], "b h (n i) d -> b h n i d", i=block)
    means = blocks.sum(dim=3, dtype=torch.float32) / block
    if whole == x.shape[2]:
        return means
    return torch.cat((means, x[:, :, whole:].mean(dim=2, keepdim=True, dtype=torch.float32)), dim=2)


def check_pool(x: Tensor, block: int, order: Tensor | None, subtract: Tensor | None = None) -> None:
    """What `block_means` and its like refuse."""
    if x.dtype not in DTYPES or x.ndim != 4 or 0 in x.shape:
        raise ValueError(
            f"x: {x.dtype} {list(x.shape)}; valid: a non-empty [B, H, S, D] of {', '.join(map(str, DTYPES))}"
        )
    if block < 1:
        raise ValueError(f"block: {block}; valid: at least 1 token")
    if order is not None:
        heads = x.shape[1]
        if order.dtype is not torch.int64 or order.ndim != 2 or order.shape[0] not in (1, heads) or 0 in order.shape:
            raise ValueError(
                f"order: {order.dtype} {list(order.shape)}; valid: torch.int64 [1 or {heads}, tokens], not empty"
            )
        if order.device != x.device:
            raise ValueError(f"order: on {order.device}; valid: {x.device}, where x is")
    if subtract is not None:
        expected = [x.shape[0], x.shape[1], x.shape[3]]
        if list(subtract.shape) != expected or not subtract.is_floating_point():
            raise ValueError(
                f"subtract: {subtract.dtype} {list(subtract.shape)}; valid: floating point {expected}, by x"
            )
        if subtract.device != x.device:
            raise ValueError(f"subtract: on {subtract.device}; valid: {x.device}, where x is")
