"""Slow and obviously right, in float64: what the tests compare every backend with."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sparse_dit.kernels.quantize import Quantized

ROWS = 2048  # queries at a time, so that many tests fit on one GPU: 0.3 GB of scores at 17,776 keys


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

    def attend(q: Tensor, mask_blocks: Tensor) -> tuple[Tensor, Tensor]:
        mask = mask_blocks.repeat_interleave(block_q, dim=-2).repeat_interleave(block_k, dim=-1)
        mask = mask[..., : q.shape[-2], : k.shape[-2]]
        scores = torch.einsum("bhid,bhjd->bhij", q.double(), k.double()) * scale
        scores = scores.masked_fill(~mask, -torch.inf)
        lse = scores.logsumexp(dim=-1)
        return torch.einsum("bhij,bhjd->bhid", (scores - lse[..., None]).exp(), v.double()), lse

    return _by_rows(attend, q, mask_blocks, block_q)


def _by_rows(
    attend: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], q: Tensor, mask_blocks: Tensor, block_q: int
) -> tuple[Tensor, Tensor]:
    """`attend` of some query blocks after the other: rows of attention know nothing of one another."""
    blocks = max(1, ROWS // block_q)
    pairs = zip(q.split(blocks * block_q, dim=2), mask_blocks.split(blocks, dim=2), strict=True)
    outs, lses = zip(*(attend(*pair) for pair in pairs), strict=True)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def oracle_skipping_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask_blocks: Tensor,
    block_q: int,
    block_k: int,
    tile: tuple[int, int],
    pv_threshold: float,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same without the values of tiles that lie further than a threshold below, see `ops.block_sparse_attention`.

    Arguments as for `oracle_attention`, and:
        tile: queries and keys a tile, divisors of block_q and block_k.
        pv_threshold: natural log units.

    Returns:
        out and lse as `oracle_attention`, and bool [B, H, Sq, Sk], true where a row's weight meets no value.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    seq_q, seq_k = q.shape[2], k.shape[2]
    mask = mask_blocks.repeat_interleave(block_q, dim=-2).repeat_interleave(block_k, dim=-1)[..., :seq_q, :seq_k]
    scores = torch.einsum("bhid,bhjd->bhij", q.double(), k.double()) * scale
    scores = scores.masked_fill(~mask, -torch.inf)
    left_out = torch.zeros_like(scores, dtype=torch.bool)
    for row in range(0, seq_q, tile[0]):
        top = torch.full(scores[:, :, row : row + tile[0], 0].shape, -torch.inf, dtype=torch.float64, device=q.device)
        for key in range(0, seq_k, tile[1]):
            part = slice(row, row + tile[0]), slice(key, key + tile[1])
            tile_top = scores[:, :, *part].amax(dim=-1)
            top = torch.maximum(top, tile_top)
            left_out[:, :, *part] = (tile_top < top - pv_threshold).all(dim=-1)[..., None, None]
    lse = scores.logsumexp(dim=-1)
    weights = (scores - lse[..., None]).exp().masked_fill(left_out, 0.0)
    values = v.double().nan_to_num()  # what no row takes may hold anything
    return torch.einsum("bhij,bhjd->bhid", weights, values), lse, left_out & mask


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
    keys, values = torch.cat((k.double(), mean_k), dim=2), torch.cat((v.double(), mean_v), dim=2)

    def attend(q: Tensor, mask_blocks: Tensor) -> tuple[Tensor, Tensor]:
        rows = mask_blocks.repeat_interleave(block_q, dim=-2)[..., : q.shape[2], :]
        tokens = rows.repeat_interleave(block_k, dim=-1)[..., : k.shape[2]]
        scores = torch.einsum("bhid,bhjd->bhij", q.double(), keys) * scale
        scores[..., k.shape[2] :] += count.double().log()
        scores = scores.masked_fill(~torch.cat((tokens, ~rows), dim=-1), -torch.inf)
        lse = scores.logsumexp(dim=-1)
        return torch.einsum("bhij,bhjd->bhid", (scores - lse[..., None]).exp(), values), lse

    return _by_rows(attend, q, mask_blocks, block_q)


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
