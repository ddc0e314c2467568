"""Tokens into the order in which they enter blocks, and back."""

import torch
from torch import Tensor


def gather_tokens(x: Tensor, order: Tensor) -> Tensor:
    """Token order[h, i] of head h comes i-th.

    Args:
        x: [B, H, S, ...].
        order: int64 [1 or H, S], each row a permutation of the tokens.

    Returns:
        Like x, in fresh memory.
    """
    if len(order) == 1:
        # Whole tokens, all heads at once: long pieces as models lay out memory, where indexing would go by the element.
        return x.transpose(1, 2).index_select(1, order[0]).transpose(1, 2)
    return x[:, _heads(x, order), order.expand(x.shape[1], -1)]


def scatter_tokens(x: Tensor, order: Tensor, out: Tensor) -> Tensor:
    """Writes what is i-th in head h of x to token order[h, i] of out: the inverse of `gather_tokens`. Returns out."""
    if len(order) == 1:
        out.transpose(1, 2).index_copy_(1, order[0], x.transpose(1, 2))
        return out
    out[:, _heads(x, order), order.expand(x.shape[1], -1)] = x
    return out


def in_token_order(out: Tensor, lse: Tensor, order: Tensor | None) -> tuple[Tensor, Tensor]:
    """Outputs [B, H, S, D] and lse [B, H, S] of tokens in an order, in the tokens' own."""
    if order is None:
        return out, lse
    return scatter_tokens(out, order, torch.empty_like(out)), scatter_tokens(lse, order, torch.empty_like(lse))


def _heads(x: Tensor, order: Tensor) -> Tensor:
    return torch.arange(x.shape[1], device=order.device)[:, None]
