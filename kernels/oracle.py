"""Slow and obviously right, in float64: what the tests compare every backend with."""

import math

import torch
from torch import Tensor

from sparse_dit.kernels.quantize import Quantized


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


def oracle_summary_attention(
    q: Tensor, k: Tensor, v: Tensor, mask_blocks: Tensor, block_q: int, block_k: int, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The same with one more key a block: its means, weighed by its tokens, for the rows that do not compute it.

    Arguments and results as for `oracle_attention`. The keys are [k, mean k a block] and the values [v, mean v a
    block] in one softmax, means in float64.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    parts = [[x.mean(dim=2) for x in y.double().split(block_k, dim=2)] for y in (k, v)]
    mean_k, mean_v = (torch.stack(means, dim=2) for means in parts)
    count = torch.tensor([len(part) for part in torch.arange(k.shape[2]).split(block_k)], device=q.device)
    rows = mask_blocks.repeat_interleave(block_q, dim=-2)[..., : q.shape[2], :]
    tokens = rows.repeat_interleave(block_k, dim=-1)[..., : k.shape[2]]
    scores = torch.einsum("bhid,bhjd->bhij", q.double(), torch.cat((k.double(), mean_k), dim=2)) * scale
    scores[..., k.shape[2] :] += count.double().log()
    scores = scores.masked_fill(~torch.cat((tokens, ~rows), dim=-1), -torch.inf)
    lse = scores.logsumexp(dim=-1)
    values = torch.cat((v.double(), mean_v), dim=2)
    return torch.einsum("bhij,bhjd->bhid", (scores - lse[..., None]).exp(), values), lse


def oracle_quantized_attention(
    codes: Quantized, mask_blocks: Tensor, block_q: int, block_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention on what the codes stand for, nothing else rounded; tokens in the codes' order.

    Args:
        codes: quantized q, k and v.
        mask_blocks: as for `oracle_attention`.
        block_q: query tokens a block.
        block_k: key tokens a block.

    Returns:
        out float64 [B, H, Sq, D]; lse float64 [B, H, Sq]; and sqrt(sum_j (p_ij v_jd)^2) float64 [B, H, Sq, D] with
        weights p and v as multiplied (v_mean is added after): how far out moves if each weight moves by its own size.
    """
    q, k, v = codes.dequantized()
    out, lse = oracle_attention(q, k, v, mask_blocks, block_q, block_k, scale=math.log(2))
    multiplied = v.double() if codes.v_mean is None else v.double() - codes.v_mean.double()[:, :, None]
    # Squared weights are softmax at twice the scale, up to a factor a row.
    squares, lse_squares = oracle_attention(q, k, multiplied.square(), mask_blocks, block_q, block_k, 2 * math.log(2))
    spread = (squares * (lse_squares - 2 * lse).exp()[..., None]).sqrt()
    return out, lse + codes.lse_shift.double(), spread
