"""Slow and obviously right, in float64: block means, similarity, mass, and the selections of key blocks."""

import torch
from torch import Tensor


def oracle_blocks(x: Tensor, block: int, order: Tensor | None = None, subtract: Tensor | None = None) -> list[Tensor]:
    """The blocks of x [B, H, S, D] as float64 [B, H, n, D], n = `block` but for a ragged last one.

    Args:
        x: tokens [B, H, S, D], any floating dtype.
        block: tokens a block.
        order: int64 [1 or H, L], token ids in the order in which they enter blocks; None is 0 ... S - 1.
        subtract: [B, H, D] taken from every token; None is zero.
    """
    x = x.double()
    if subtract is not None:
        x = x - subtract.double()[:, :, None]
    if order is not None:
        x = torch.stack([x[:, head, order[head % len(order)]] for head in range(x.shape[1])], dim=1)
    return list(x.split(block, dim=2))


def oracle_block_means(x: Tensor, block: int, order: Tensor | None = None, subtract: Tensor | None = None) -> Tensor:
    """The mean of the tokens of each block: float64 [B, H, N, D]. Arguments as for `oracle_blocks`."""
    return torch.stack([tokens.mean(dim=2) for tokens in oracle_blocks(x, block, order, subtract)], dim=2)


def oracle_similarity(x: Tensor, block: int, order: Tensor | None = None, subtract: Tensor | None = None) -> Tensor:
    """The mean cosine over all pairs of a block's tokens: float64 [B, H, N]. Arguments as for `oracle_blocks`."""
    similarity = []
    for tokens in oracle_blocks(x, block, order, subtract):
        directions = tokens / tokens.norm(dim=-1, keepdim=True)
        similarity.append((directions @ directions.mT).nan_to_num(0).mean(dim=(2, 3)))
    return torch.stack(similarity, dim=2)


def oracle_block_mass(
    q: Tensor, k: Tensor, lse: Tensor, block_q: int, block_k: int, scale: float | None = None
) -> Tensor:
    """mean_i sum_j exp(scale q_i.k_j - lse_i) over each pair of blocks, from the full matrix.

    Args:
        q: queries [B, H, Sq, D].
        k: keys [B, H, Sk, D].
        lse: [B, H, Sq], natural log.
        block_q: query tokens a block.
        block_k: key tokens a block.
        scale: factor on the scores; None is 1 / sqrt(D).

    Returns:
        float64 [B, H, ceil(Sq / block_q), ceil(Sk / block_k)].
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    weights = (torch.einsum("bhid,bhjd->bhij", q.double(), k.double()) * scale - lse.double()[..., None]).exp()
    rows = [rows.mean(dim=2) for rows in weights.split(block_q, dim=2)]
    return torch.stack([part.sum(dim=-1) for part in torch.stack(rows, dim=2).split(block_k, dim=-1)], dim=-1)


def _best_first(scores: list[float], candidates: list[int]) -> list[int]:
    return sorted(candidates, key=lambda index: (-scores[index], index))


def oracle_top_k(scores: list[float], keep: int, forced: list[bool]) -> list[int]:
    """The `keep` best entries that are not forced, the first of equals, and the forced ones; ascending."""
    free = [index for index in range(len(scores)) if not forced[index]]
    chosen = _best_first(scores, free)[:keep]
    return sorted(chosen + [index for index in range(len(scores)) if forced[index]])


def oracle_top_k_per_head(scores: list[list[float]], keep: int, forced: list[list[bool]]) -> list[list[int]]:
    """The same for the `keep` * rows best of all rows together; every row has its best one in any case."""
    width = len(scores[0])
    flat = [score for row in scores for score in row]
    chosen = set(oracle_top_k(flat, keep * len(scores), [entry for row in forced for entry in row]))
    rows = [[index % width for index in sorted(chosen) if index // width == number] for number in range(len(scores))]
    return [
        sorted({*listed, *oracle_top_k(row, 1, must)}) for listed, row, must in zip(rows, scores, forced, strict=True)
    ]


def oracle_top_p(probabilities: list[float], p: float, crossing: bool, at_least: int, forced: list[bool]) -> list[int]:
    """Entries in descending order while they sum to at most p (crossing: until they sum to p), and the forced ones."""
    order = _best_first(probabilities, list(range(len(probabilities))))
    count, total = 0, 0.0
    while count < len(order) and (total < p if crossing else total + probabilities[order[count]] <= p):
        total += probabilities[order[count]]
        count += 1
    return sorted({*order[: max(count, at_least)], *(index for index in order if forced[index])})


def oracle_threshold(scores: list[float], tau: float, forced: list[bool]) -> list[int]:
    """The entries that reach mean + tau * std, the best one, and the forced ones."""
    mean = sum(scores) / len(scores)
    std = (sum((score - mean) ** 2 for score in scores) / len(scores)) ** 0.5
    order = list(range(len(scores)))
    best = _best_first(scores, order)[0]
    return [index for index in order if scores[index] >= mean + tau * std or index == best or forced[index]]
