"""Block lists from scores and masks, and back; bits ↔ masks.

Nothing that makes lists from scores waits for the device: the lists are as wide as the budget known on the host allows,
else as wide as the row of key blocks, and are vouched for by construction instead of being read back.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from sparse_dit.kernels.blocks import BlockList

SCORE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PER = ("row", "head")


def mask_to_lists(mask: Tensor, block_q: int, block_k: int, *, capacity: int | None = None) -> BlockList:
    """Lists the key blocks of each query block, ascending.

    Without `capacity` this waits for a GPU: the longest row decides how wide the list is, and an empty row is an error.

    Args:
        mask: bool [B or 1, H or 1, QB, KB], true where query block and key block are computed together.
        block_q: query tokens a block.
        block_k: key tokens a block.
        capacity: width of the list, at most KB, for a mask whose rows are known to have 1 to `capacity` key blocks;
            nothing is then read back, and the mask is taken on trust.

    Returns:
        A BlockList on the mask's device, as wide as its longest row or `capacity`.

    Raises:
        ValueError: mask is not a four-dimensional bool tensor, capacity is out of range, or, without capacity, a query
            block has no key block.
    """
    if mask.dtype is not torch.bool or mask.ndim != 4 or 0 in mask.shape:
        raise ValueError(f"mask: {mask.dtype} {list(mask.shape)}; valid: a non-empty bool [B or 1, H or 1, QB, KB]")
    if capacity is None:
        counts = mask.sum(dim=-1)
        if not counts.all():
            raise ValueError(
                f"mask: {int((counts == 0).sum())} query blocks have no key block; valid: at least one each"
            )
        capacity = int(counts.max())
    elif not 1 <= capacity <= mask.shape[-1]:
        raise ValueError(f"capacity: {capacity}; valid: 1 to {mask.shape[-1]}, the key blocks of the mask")
    return _compact(mask, capacity, block_q, block_k)


def lists_to_mask(blocks: BlockList, key_blocks: int) -> Tensor:
    """Marks the listed blocks: the inverse of `mask_to_lists`.

    Args:
        blocks: lists over at most `key_blocks` key blocks.
        key_blocks: width KB of the mask, in blocks.

    Returns:
        bool [B or 1, H or 1, QB, KB] on the list's device.

    Raises:
        ValueError: the lists reach beyond `key_blocks`.
    """
    if blocks.key_blocks > key_blocks:
        raise ValueError(f"key_blocks: {key_blocks}; valid: at least {blocks.key_blocks}, which the lists reach")
    # What a row holds behind its count may be anything: send it to one column too many, and cut that off.
    column = blocks.indices.long().masked_fill(blocks.unused(), key_blocks)
    mask = torch.zeros(*blocks.counts.shape, key_blocks + 1, dtype=torch.bool, device=blocks.indices.device)
    return mask.scatter_(-1, column, True)[..., :key_blocks]


def spread_lists(taken: Tensor, columns: Tensor, *, block_q: int, block_k: int, forced: Tensor) -> BlockList:
    """Lists the key blocks whose part of the sequence a query block takes, and the forced ones.

    Args:
        taken: bool [B, H, QB, parts].
        columns: int64 [KB] on the device of taken, the part that each key block belongs to.
        block_q: query tokens a block.
        block_k: key tokens a block.
        forced: bool [B or 1, H or 1, QB or 1, KB], blocks listed whatever is taken, at least one a row. On trust.

    Returns:
        A BlockList on the device of taken, KB wide.
    """
    if taken.is_cuda:
        from sparse_dit.kernels.lists_triton import triton_lists

        indices, counts = triton_lists("mask", taken, len(columns), forced=forced, columns=columns)
        return BlockList(indices, counts, block_q, block_k, key_blocks=len(columns))
    return _compact(taken.index_select(3, columns) | forced, len(columns), block_q, block_k)


def top_k_lists(
    scores: Tensor,
    keep: int | Tensor,
    *,
    block_q: int,
    block_k: int,
    forced: Tensor | None = None,
    per: str = "row",
) -> BlockList:
    """Lists the `keep` key blocks of the highest score a row, and the forced ones on top.

    The budget counts blocks that are not forced, as in SpargeAttn's top-k (arXiv:2502.18137). Equal scores go to the
    lower block index (per head: the lower row first), so that a selection repeats. DraftAttention (arXiv:2505.14708)
    spends one budget over a whole head, AdaSpa (arXiv:2502.21079) the same one in every row.

    Args:
        scores: fp16, bf16 or fp32 [B, H, QB, KB], not NaN; -inf is the lowest score, and still a score.
        keep: blocks a row: an int of at least 1, or integers [H] or [B, H, QB] on the device of scores, which are read
            there as at least 1. More than KB is KB. Per head it is an int or [H], and keep * QB blocks are taken of the
            whole head's rows.
        block_q: query tokens a block.
        block_k: key tokens a block.
        forced: bool [B or 1, H or 1, QB or 1, KB], blocks listed whatever their score.
        per: "row", or "head": one budget for all rows of a head, of which a row may take none: it lists its best block
            then all the same.

    Returns:
        A BlockList on the device of scores, `keep` wide where that is an int per row without forced blocks, else KB.

    Raises:
        ValueError: an argument is not as above.
    """
    _check(scores, forced)
    if per not in PER:
        raise ValueError(f"per: {per!r}; valid: one of {PER}")
    batch, heads, q_blocks, k_blocks = scores.shape
    if isinstance(keep, Tensor):
        shapes = ([heads], [batch, heads, q_blocks]) if per == "row" else ([heads],)
        if list(keep.shape) not in shapes or keep.is_floating_point() or keep.device != scores.device:
            raise ValueError(
                f"keep: {keep.dtype} {list(keep.shape)} on {keep.device}; valid: integers "
                f"{' or '.join(map(str, shapes))} on {scores.device}"
            )
        budget: int | Tensor = (keep[:, None] if keep.ndim == 1 else keep).clamp(1, k_blocks)
        capacity = k_blocks
    else:
        if keep < 1:
            raise ValueError(f"keep: {keep}; valid: at least 1 block")
        budget = min(keep, k_blocks)
        capacity = min(keep, k_blocks) if per == "row" and forced is None else k_blocks
    if per == "head":
        best = _best_of_heads(scores, budget, forced)
        if scores.is_cuda:
            return _triton_lists("mask", best, capacity, block_q, block_k, forced=forced)
        return _compact(best if forced is None else best | forced, capacity, block_q, block_k)
    if scores.is_cuda:
        return _triton_lists("top_k", scores, capacity, block_q, block_k, budget, forced)
    return _compact(_best(scores, _columns(budget), forced), capacity, block_q, block_k)


def top_p_lists(
    probabilities: Tensor,
    p: float | Tensor,
    *,
    block_q: int,
    block_k: int,
    crossing: bool,
    forced: Tensor | None = None,
    at_least: int = 1,
    softmax: bool = False,
) -> BlockList:
    """Lists the likeliest key blocks of each row, up to a mass of p, and the forced ones.

    In descending order (equal ones: lower index first) a row takes blocks until they sum to p. The block that crosses p
    is taken by NABLA (arXiv:2507.13546) and SVG2, and left out by SpargeAttn (arXiv:2502.18137). Forced blocks count
    towards p by their own probability.

    Args:
        probabilities: fp16, bf16 or fp32 [B, H, QB, KB], not negative, rows summing to about 1; with `softmax` finite
            scores instead.
        p: mass to take, a number in [0, 1] or a floating-point tensor [H] on the device of probabilities.
        block_q: query tokens a block.
        block_k: key tokens a block.
        crossing: true takes the fewest blocks that sum to p or more, false the most that sum to p or less.
        forced: bool [B or 1, H or 1, QB or 1, KB], blocks listed whatever their probability.
        at_least: the likeliest blocks that every row lists, whatever their sum.
        softmax: whether the probabilities are the softmax of what is given, over the row.

    Returns:
        A BlockList on the device of probabilities, KB wide.

    Raises:
        ValueError: an argument is not as above.
    """
    _check(probabilities, forced, "probabilities")
    k_blocks = probabilities.shape[-1]
    if not 1 <= at_least <= k_blocks:
        raise ValueError(f"at_least: {at_least}; valid: 1 to {k_blocks} blocks")
    if not isinstance(p, Tensor) and not 0 <= p <= 1:
        raise ValueError(f"p: {p}; valid: 0 to 1")
    mass = _per_head(p, probabilities, "p")
    if probabilities.is_cuda:
        rule = "top_p_crossing" if crossing else "top_p"
        return _triton_lists(rule, probabilities, k_blocks, block_q, block_k, mass, forced, at_least, softmax=softmax)
    probabilities = probabilities.float()
    if softmax:
        probabilities = probabilities.softmax(dim=-1)
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    total = ordered.cumsum(dim=-1)
    # Strictly below p before a block: the block is needed to reach it. Not above p with it: it still fits.
    within = F.pad(total[..., :-1], (1, 0)) < _columns(mass) if crossing else total <= _columns(mass)
    within[..., :at_least] = True
    mask = torch.zeros_like(within).scatter_(-1, order, within)
    return _compact(mask if forced is None else mask | forced, k_blocks, block_q, block_k)


def threshold_lists(
    scores: Tensor, tau: float | Tensor, *, block_q: int, block_k: int, forced: Tensor | None = None
) -> BlockList:
    """Lists the key blocks that score at least mean + tau * std of their row, and the forced ones.

    Mean and standard deviation (over all KB blocks, not corrected) are those of the row: the routing of Sol-Attn
    (arXiv:2607.24027). A row always lists its best block, the first of equals.

    Args:
        scores: fp16, bf16 or fp32 [B, H, QB, KB], finite.
        tau: a finite number, or a floating-point tensor [H] on the device of scores.
        block_q: query tokens a block.
        block_k: key tokens a block.
        forced: bool [B or 1, H or 1, QB or 1, KB], blocks listed whatever their score.

    Returns:
        A BlockList on the device of scores, KB wide.

    Raises:
        ValueError: an argument is not as above.
    """
    _check(scores, forced)
    if not isinstance(tau, Tensor) and not math.isfinite(tau):
        raise ValueError(f"tau: {tau}; valid: a finite number")
    factor = _per_head(tau, scores, "tau")
    if scores.is_cuda:
        return _triton_lists("threshold", scores, scores.shape[-1], block_q, block_k, factor, forced)
    scores = scores.float()
    std, mean = torch.std_mean(scores, dim=-1, correction=0, keepdim=True)
    mask = scores >= mean + _columns(factor) * std
    mask.scatter_(-1, scores.argmax(dim=-1, keepdim=True), True)
    return _compact(mask if forced is None else mask | forced, scores.shape[-1], block_q, block_k)


def pack_bits(mask: Tensor) -> Tensor:
    """Packs a mask into bits: bit i of byte j is column 8 j + i.

    Args:
        mask: bool [..., KB].

    Returns:
        uint8 [..., ceil(KB / 8)]; the bits behind KB are 0.

    Raises:
        ValueError: mask is not bool or has no dimension.
    """
    if mask.dtype is not torch.bool or mask.ndim == 0:
        raise ValueError(f"mask: {mask.dtype} {list(mask.shape)}; valid: bool [..., key blocks]")
    octets = rearrange(F.pad(mask, (0, -mask.shape[-1] % 8)), "... (j i) -> ... j i", i=8)
    return (octets.to(torch.uint8) << _places(mask.device)).sum(dim=-1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, key_blocks: int) -> Tensor:
    """The inverse of `pack_bits`.

    Args:
        bits: uint8 [..., ceil(key_blocks / 8)].
        key_blocks: width KB of the mask.

    Returns:
        bool [..., KB] on the device of bits.

    Raises:
        ValueError: bits is not as above.
    """
    if bits.dtype is not torch.uint8 or bits.ndim == 0 or bits.shape[-1] != -(-key_blocks // 8):
        raise ValueError(
            f"bits: {bits.dtype} {list(bits.shape)}; valid: uint8 [..., {-(-key_blocks // 8)}] for {key_blocks} blocks"
        )
    octets = (bits[..., None] >> _places(bits.device) & 1).bool()
    return rearrange(octets, "... j i -> ... (j i)")[..., :key_blocks]


def _places(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


def _triton_lists(
    rule: str,
    scores: Tensor,
    capacity: int,
    block_q: int,
    block_k: int,
    budget: float | Tensor = 0,
    forced: Tensor | None = None,
    at_least: int = 1,
    *,
    softmax: bool = False,
) -> BlockList:
    from sparse_dit.kernels.lists_triton import triton_lists

    indices, counts = triton_lists(rule, scores, capacity, budget, forced, at_least, softmax=softmax)
    return BlockList(indices, counts, block_q, block_k, key_blocks=scores.shape[-1])


def _compact(mask: Tensor, capacity: int, block_q: int, block_k: int) -> BlockList:
    """The true columns of each row, ascending. Every row has 1 to `capacity` of them: nothing is read back."""
    if mask.is_cuda:
        return _triton_lists("mask", mask, capacity, block_q, block_k)
    counts = mask.sum(dim=-1, dtype=torch.int32)
    # False columns go to one column too many, which is cut off.
    place = (mask.cumsum(dim=-1) - 1).masked_fill(~mask, capacity)
    column = torch.arange(mask.shape[-1], dtype=torch.int32, device=mask.device).expand(mask.shape)
    indices = torch.zeros(*counts.shape, capacity + 1, dtype=torch.int32, device=mask.device)
    indices = indices.scatter_(-1, place, column)[..., :capacity]
    return BlockList(indices, counts, block_q, block_k, key_blocks=mask.shape[-1])


def _best(scores: Tensor, budget: float | Tensor, forced: Tensor | None) -> Tensor:
    """Marks the `budget` [..., 1] highest of the last dimension, lower indices first among equals, plus the forced."""
    order = scores.float().sort(dim=-1, descending=True, stable=True).indices
    if forced is not None:
        forced = forced.expand(scores.shape)
        order = order.gather(-1, forced.gather(-1, order).sort(dim=-1, stable=True).indices)
    taken = torch.arange(scores.shape[-1], device=scores.device) < budget
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    mask.scatter_(-1, order, taken.expand(scores.shape))
    return mask if forced is None else mask | forced


def _best_of_heads(scores: Tensor, keep: int | Tensor, forced: Tensor | None) -> Tensor:
    """Marks keep (an int or [H, 1]) times QB best blocks of each head, and the best of each row; not the forced."""
    batch, heads, q_blocks = scores.shape[:3]
    whole = keep * q_blocks
    if scores.is_cuda:
        from sparse_dit.kernels.cutoff_triton import triton_take_count

        budget = whole.expand(heads, 1).repeat(batch, 1).squeeze(1) if isinstance(whole, Tensor) else whole
        excluded = None if forced is None else forced.expand(scores.shape).flatten(0, 1)
        return triton_take_count(scores.flatten(0, 1), budget, excluded).view(scores.shape)
    out = torch.zeros_like(scores, dtype=torch.bool) if forced is None else forced.expand(scores.shape)
    best = _best(scores.flatten(2), whole, out.flatten(2)).view(scores.shape)
    return (best | _best(scores, 1, out)) & ~out


def _per_head(value: float | Tensor, scores: Tensor, name: str) -> Tensor | float:
    """A number as a float, a tensor [H] as fp32 [H, 1]."""
    if not isinstance(value, Tensor):
        return float(value)
    heads = scores.shape[1]
    if list(value.shape) != [heads] or not value.is_floating_point() or value.device != scores.device:
        raise ValueError(
            f"{name}: {value.dtype} {list(value.shape)} on {value.device}; valid: a number, or floating point "
            f"[{heads}] on {scores.device}"
        )
    return value.float()[:, None]


def _columns(value: float | Tensor) -> float | Tensor:
    """A number, or a tensor of rows made to broadcast over key blocks."""
    return value[..., None] if isinstance(value, Tensor) else value


def _check(scores: Tensor, forced: Tensor | None, name: str = "scores") -> None:
    if scores.dtype not in SCORE_DTYPES or scores.ndim != 4 or 0 in scores.shape:
        raise ValueError(
            f"{name}: {scores.dtype} {list(scores.shape)}; valid: a non-empty [B, H, QB, KB] of "
            f"{', '.join(map(str, SCORE_DTYPES))}"
        )
    if forced is None:
        return
    batch, heads, q_blocks, k_blocks = scores.shape
    fits = forced.ndim == 4 and all(
        size in (1, full) for size, full in zip(forced.shape[:3], scores.shape[:3], strict=True)
    )
    if forced.dtype is not torch.bool or not fits or forced.shape[3] != k_blocks:
        raise ValueError(
            f"forced: {forced.dtype} {list(forced.shape)}; valid: bool "
            f"[{batch} or 1, {heads} or 1, {q_blocks} or 1, {k_blocks}]"
        )
    if forced.device != scores.device:
        raise ValueError(f"forced: on {forced.device}; valid: {scores.device}, where {name} is")
