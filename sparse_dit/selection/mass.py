"""Selection `mass`: the key blocks that take most of the softmax, found by search and kept between searches.

Source: AdaSpa (arXiv 2502.21079, ICCV 2025); it has no public code.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from sparse_dit.kernels.gather import gather_tokens
from sparse_dit.kernels.lists import top_k_lists
from sparse_dit.kernels.mass import block_mass
from sparse_dit.layout import TokenLayout
from sparse_dit.selection.budgets import RICH_ABOVE, by_recall
from sparse_dit.selection.dynamic import Call, Chosen, Dynamic, blocks_of_share, density_of_share


@dataclass(frozen=True)
class Mass(Dynamic):
    """Of each row the blocks with the largest mass, the mean over queries of their summed attention weights.

    The schedule's refreshes are the searches. The first computes whole attention, whose output is then exact, and keeps
    its log-sum-exp; later ones compute the mass from that old log-sum-exp in one pass, and are sparse themselves.
    A row's budget is max(1, floor(density KB)); text is kept on top.

    With `adaptive` heads share unevenly, by their recall, the share of their mass that the budget would keep: n heads
    are above `rich_above`, of which at most half of all heads count; the n with the highest recall get half of the
    budget, and the n with the lowest get half as much again. The mean stays.

    Args:
        density: share of the key blocks.
        adaptive: whether heads get budgets of their own.
        rich_above: recall above which a head's budget may be halved.

    Raises:
        ValueError: a value is out of its range.
    """

    needs_lse: ClassVar[bool] = True

    density: float = 0.2
    adaptive: bool = True
    rich_above: float = RICH_ABOVE

    def __post_init__(self) -> None:
        if not 0.0 < self.density <= 1.0:
            raise ValueError(f"selection.density: {self.density!r}; valid: a number in (0, 1]")
        if not 0.0 <= self.rich_above <= 1.0:
            raise ValueError(f"selection.rich_above: {self.rich_above!r}; valid: a number in [0, 1]")

    def choose(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> Chosen | None:
        """See `Dynamic.choose`."""
        lse = call.slot.get("lse")
        if lse is None:
            return None
        if call.table is not None:
            q, k, lse = (gather_tokens(x, call.table) for x in (q, k, lse))
        mass = block_mass(q, k, lse, call.block_q, call.block_k, scale=call.scale)
        keep: int | torch.Tensor = blocks_of_share(self.density, call.k_blocks)
        if self.adaptive:
            keep = self.budgets(mass, call).repeat_interleave(call.q_blocks, dim=-1)
        blocks = top_k_lists(mass, keep, block_q=call.block_q, block_k=call.block_k, forced=call.forced)
        return Chosen(blocks, call.table)

    def budgets(self, mass: torch.Tensor, call: Call) -> torch.Tensor:
        """Blocks a row of each head, int64 [B, H, 1].

        Args:
            mass: fp32 [B, H, QB, KB].
            call: what else the budgets depend on.
        """
        base = blocks_of_share(self.density, call.k_blocks)
        return by_recall(
            mass,
            base,
            rich_above=self.rich_above,
            block_q=call.block_q,
            block_k=call.block_k,
            forced=call.forced,
            spread_over=call.heads,
        )

    def expected_density(self, layout: TokenLayout, block_q: int, block_k: int) -> float:
        """See `Dynamic.expected_density`."""
        return density_of_share(self.density, layout, block_q, block_k)

    def kept_bytes(
        self, layout: TokenLayout, block_q: int, block_k: int, *, batch: int, heads: int, keeps: bool
    ) -> int:
        """See `Dynamic.kept_bytes`; the log-sum-exp comes on top, fp32."""
        kept = super().kept_bytes(layout, block_q, block_k, batch=batch, heads=heads, keeps=keeps)
        return kept + 4 * batch * heads * layout.length
