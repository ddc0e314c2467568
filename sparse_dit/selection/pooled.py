"""Selection `pooled`: key blocks by the products of mean queries and mean keys.

Sources: DraftAttention (arXiv 2505.14708), SpargeAttn (arXiv 2502.18137), Jenga (arXiv 2505.16864), the routing of
Sol-Attn (arXiv 2607.24027) and the sub-block scores of SubBlock (sgl-project/sglang, pull request 34148). Each is a
setting of the same four steps: pool, score, choose, add the forced blocks.
"""

import functools
import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from sparse_dit.kernels.blocks import BlockList
from sparse_dit.kernels.lists import PER, threshold_lists, top_k_lists, top_p_lists
from sparse_dit.kernels.ordered import Ordered
from sparse_dit.kernels.pool import block_similarity, token_means
from sparse_dit.kernels.scores import REDUCTIONS, block_scores, mark_unlike, part_scores
from sparse_dit.layout import TokenLayout
from sparse_dit.orders import Order
from sparse_dit.selection.budgets import RICH_ABOVE, SPREADS, by_gain, by_recall
from sparse_dit.selection.dynamic import Call, Chosen, Dynamic, blocks_of_share, density_of_share


@dataclass(frozen=True)
class Pooled(Dynamic):
    """The score of a query and a key block is scale mean(q).mean(k); one of three rules chooses by it.

    `density` (0.25 when no rule is given): the best max(1, floor(density KB)) key blocks of a row, or, `per` head, so
    many a row on average, the best of softmax(scores) over the whole head, and the best of each row (DraftAttention,
    whose rows may go empty). `top_p`: of softmax(scores) the likeliest blocks up to a sum of p. `tau`: the blocks that
    score at least mean + tau std of their row.

    Subtracting the mean key (smooth-K) moves all scores of a row alike, so it changes none of the three; it matters to
    `similarity`, which measures keys after it.

    Args:
        density: share of the key blocks.
        top_p: mass in [0, 1].
        tau: cutoff in standard deviations of the row's scores.
        per: `row` or `head`, for `density`.
        spread: for `density` per row, how budgets are spread over the heads of a layer, whose mean stays: `even`, all
            have the same; `recall`, two levels by the softmax that the budget keeps of the scores (AdaSpa's rule, 0.8);
            `gain`, those that keep the most of that softmax in all heads together (`budgets.by_gain`).
        crossing: for `top_p`, whether the block that crosses p is computed (NABLA) or not (SpargeAttn).
        least: for `top_p`, share of the key blocks that every row computes at least.
        similarity: blocks whose tokens are less alike than this (mean cosine of all pairs, in [0, 1]) are not judged by
            their mean: such a query block computes all keys, such a key block is computed by all queries and takes no
            part in the softmax. `None` trusts every mean.
        sub_block: pool so many tokens instead of whole blocks; a block's score is reduced from those of its parts.
        reduction: `max` or `logsumexp`, for `sub_block`.
        sink: whether the first key block is always computed.
        adjacent: whether the blocks of a block's own and adjoining tokens, one step away on each axis, are always
            computed (Jenga).

    Raises:
        ValueError: a value is out of its range, or two rules are given.
    """

    EXCLUSIVE: ClassVar[tuple[str, str, str]] = ("density", "top_p", "tau")

    repeats: ClassVar[bool] = True

    density: float | None = None
    top_p: float | None = None
    tau: float | None = None
    per: str = "row"
    spread: str = "even"
    crossing: bool = True
    least: float = 0.0
    similarity: float | None = None
    sub_block: int | None = None
    reduction: str = "max"
    sink: bool = False
    adjacent: bool = False

    def __post_init__(self) -> None:
        given = [name for name in self.EXCLUSIVE if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"selection: {' and '.join(given)} exclude each other; valid: one of them")
        if not given:
            object.__setattr__(self, "density", 0.25)
        checks = (
            ("density", self.density is None or 0.0 < self.density <= 1.0, "a number in (0, 1]"),
            ("top_p", self.top_p is None or 0.0 <= self.top_p <= 1.0, "a number in [0, 1]"),
            ("tau", self.tau is None or math.isfinite(self.tau), "a finite number"),
            ("per", self.per in PER, ", ".join(PER)),
            ("per", self.per == "row" or self.density is not None, "row, unless density is the rule"),
            ("spread", self.spread in SPREADS, ", ".join(SPREADS)),
            (
                "spread",
                self.spread == "even" or (self.density is not None and self.per == "row"),
                "even, unless density per row is the rule",
            ),
            ("least", 0.0 <= self.least <= 1.0, "a number in [0, 1]"),
            ("least", self.least == 0.0 or self.top_p is not None, "0, unless top_p is the rule"),
            ("crossing", self.crossing or self.top_p is not None, "true, unless top_p is the rule"),
            ("similarity", self.similarity is None or 0.0 <= self.similarity <= 1.0, "a number in [0, 1]"),
            ("sub_block", self.sub_block is None or self.sub_block >= 1, "1 or more tokens"),
            ("reduction", self.reduction in REDUCTIONS, ", ".join(REDUCTIONS)),
            ("reduction", self.reduction == "max" or self.sub_block is not None, "max, unless sub_block is given"),
        )
        for name, holds, valid in checks:
            if not holds:
                raise ValueError(f"selection.{name}: {getattr(self, name)!r}; valid: {valid}")

    def choose(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> Chosen:
        """See `Dynamic.choose`."""
        scores, forced, ordered = self._scores(q, k, v, call)
        if self.sink:
            first = torch.zeros(1, 1, 1, call.k_blocks, dtype=torch.bool, device=q.device)
            first[..., :1].fill_(True)  # as a replay can; by index a number would become a tensor first
            forced = _joined(forced, first)
        if self.adjacent:
            total = call.heads.total(q.shape[1])
            near = _adjacent_blocks(call.orders[0], call.layout, total, call.block_q, call.block_k, scores.device)
            forced = _joined(forced, call.heads.own(near, q.shape[1], axis=1))
        return Chosen(self._lists(scores, forced, call), call.table, call.key_table, ordered=ordered)

    def expected_density(self, layout: TokenLayout, block_q: int, block_k: int) -> float | None:
        """See `Dynamic.expected_density`; known when `density` alone decides."""
        if self.density is None or self.similarity is not None or self.adjacent:
            return None
        return density_of_share(self.density, layout, block_q, block_k)

    def _scores(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call
    ) -> tuple[torch.Tensor, torch.Tensor | None, Ordered | None]:
        """Scores fp32 [B, H, QB, KB], the blocks that are forced so far, and what was brought into the order."""
        forced, ordered, alike = call.forced, None, None
        if self.similarity is not None:
            smooth = token_means(k)
            keys = call.table if call.key_table is None else call.key_table
            q_means, q_alike = block_similarity(q, call.block_q, order=call.table)
            k_means, k_alike = block_similarity(k, call.block_k, order=keys, subtract=smooth)
            alike = q_alike, k_alike, self.similarity
        elif self.sub_block is None:
            q_means, k_means, ordered = call.means(q, k, v, (call.block_q, call.block_k))
        if self.sub_block is not None:
            units = (self.sub_block, self.sub_block)
            q_parts, k_parts, ordered = call.means(q, k, v, units, parts=True)
            per_q, per_k = call.block_q // self.sub_block, call.block_k // self.sub_block
            scores = part_scores(q_parts, k_parts, per_q, per_k, scale=call.scale, reduction=self.reduction)
        else:
            scores = block_scores(q_means, k_means, call.scale)
        if alike is not None:
            # What is unlike takes no part in a budget; the mean and deviation of a row are those of all its scores.
            forced = _joined(forced, mark_unlike(scores, *alike, lowest=self.tau is None))
        return scores, forced, ordered

    def _lists(self, scores: torch.Tensor, forced: torch.Tensor | None, call: Call) -> BlockList:
        sizes = {"block_q": call.block_q, "block_k": call.block_k}
        if self.tau is not None:
            return threshold_lists(scores, self.tau, forced=forced, **sizes)
        if self.top_p is not None:
            least = blocks_of_share(self.least, call.k_blocks)
            return top_p_lists(
                scores, self.top_p, crossing=self.crossing, forced=forced, at_least=least, softmax=True, **sizes
            )
        assert self.density is not None
        base = blocks_of_share(self.density, call.k_blocks)
        if self.per == "head":
            return top_k_lists(scores.softmax(dim=-1), base, forced=forced, per="head", **sizes)
        keep: int | torch.Tensor = base
        if self.spread == "recall":
            budgets = by_recall(
                scores.softmax(dim=-1),
                base,
                rich_above=RICH_ABOVE,
                block_q=call.block_q,
                block_k=call.block_k,
                forced=forced,
                spread_over=call.heads,
            )
            keep = budgets.repeat_interleave(call.q_blocks, dim=-1)
        elif self.spread == "gain":
            budgets = by_gain(scores, base, forced=forced, spread_over=call.heads)
            keep = budgets.repeat_interleave(call.q_blocks, dim=-1)
        return top_k_lists(scores, keep, block_q=call.block_q, block_k=call.block_k, forced=forced)


def _joined(first: torch.Tensor | None, second: torch.Tensor) -> torch.Tensor:
    return second if first is None else first | second


@functools.lru_cache(maxsize=8)
def _adjacent_blocks(
    order: Order, layout: TokenLayout, heads: int, block_q: int, block_k: int, device: torch.device
) -> torch.Tensor:
    """Blocks that hold the same or adjoining video tokens, bool [1, 1 or H, QB, KB]."""
    table = order.table(layout, heads)
    table = torch.arange(layout.length)[None] if table is None else table
    place = torch.empty_like(table).scatter_(1, table, torch.arange(layout.length).expand(table.shape))
    video = place[:, layout.text_before : layout.text_before + layout.video_tokens].unflatten(1, layout.grid)
    mask = torch.zeros(len(table), -(-layout.length // block_q), -(-layout.length // block_k), dtype=torch.bool)
    head = torch.arange(len(table))[:, None]
    for step in itertools.product((-1, 0, 1), repeat=3):
        here = video[:, *(slice(max(0, -by), side - max(0, by)) for by, side in zip(step, layout.grid, strict=True))]
        there = video[:, *(slice(max(0, by), side - max(0, -by)) for by, side in zip(step, layout.grid, strict=True))]
        mask[head, here.flatten(1) // block_q, there.flatten(1) // block_k] = True
    return mask[None].to(device)
