"""Slow and obviously right, in float64: what the tests compare every backend with."""

import torch
from torch import Tensor


def oracle_attention(
    q: Tensor, k: Tensor, v: Tensor, mask_blocks: Tensor, block_q: int, block_k: int, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the keys of the blocks that `mask_blocks` allows, written down as a dense mask.

    lse_i = log sum_j exp(scale q_i.k_j), out_i = sum_j exp(scale q_i.k_j - lse_i) v_j, j over the keys row i may see.

    Args:
        q: queries [B, H, Sq, D], any floating dtype.
        k: keys [B, H, Sk, D].
        v: values [B, H, Sk, D].
        mask_blocks: bool [B or 1, H or 1, ceil(Sq / block_q), ceil(Sk / block_k)], true where a block is computed.
        block_q: query tokens a block.
        block_k: key tokens a block.
        scale: factor on the scores; None is 1 / sqrt(D).

    Returns:
        out float64 [B, H, Sq, D] and lse float64 [B, H, Sq], natural log. Rows without a key are NaN and -inf.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    mask = mask_blocks.repeat_interleave(block_q, dim=-2).repeat_interleave(block_k, dim=-1)
    mask = mask[..., : q.shape[-2], : k.shape[-2]]
    scores = torch.einsum("bhid,bhjd->bhij", q.double(), k.double()) * scale
    scores = scores.masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(dim=-1)
    return torch.einsum("bhij,bhjd->bhid", (scores - lse[..., None]).exp(), v.double()), lse
