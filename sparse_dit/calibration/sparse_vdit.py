"""The search of Sparse-vDiT (arXiv 2506.03065): one of a few patterns for each head, layer and step.

Its code is not public, and its paper tells neither the widths of the patterns nor how stripes are chosen. Here bands
have the half-width that their density stands for, and stripes are the key blocks with the largest mass over all
queries.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import torch

from sparse_dit.calibration.costs import Costs
from sparse_dit.calibration.search import Findings, Found, Search, Seen, check_share, every_step, pointed
from sparse_dit.kernels.lists import mask_to_lists, pack_bits
from sparse_dit.kernels.mass import block_mass
from sparse_dit.layout import TokenLayout
from sparse_dit.profiles import Pattern, video_blocks
from sparse_dit.selection import Band, Chosen
from sparse_dit.selection.dynamic import blocks_of_share
from sparse_dit.selection.profile import pattern_mask, pattern_order, stripe_mask
from sparse_dit.selection.regions import mask_density

# Bisections of the price of a dense call; what is left of it afterwards changes nothing.
BISECTIONS = 60


@dataclass(frozen=True)
class SparseVDiT(Search):
    """Patterns all, skip, diagonal, multi-diagonal and stripe; the last three at some densities.

    The loss of a pattern is error + weight * cost: error the squared error of its output over the squared norm of the
    whole one (the paper's mean squared error has a unit of its own, so that its limit fits one model), cost what it
    takes in dense calls. With `density` the weight is the smallest with which the mean density of all heads, layers
    and bins is not above it, and `all` competes with its own cost. Without, the paper's rule: the pattern with the
    smallest loss, but `all` where no loss is within the limit.

    Args:
        density: mean density that the profile may have; `None` for the paper's rule.
        densities: of the patterns.
        weight: lambda of the paper.
        limit: epsilon of the paper.
        costs: of patterns.

    Raises:
        ValueError: a value is out of its range.
    """

    settling: ClassVar[frozenset[str]] = frozenset({"density", "weight", "limit", "costs"})

    density: float | None = None
    densities: tuple[float, ...] = (0.125, 0.25, 0.5)
    weight: float = 0.5
    limit: float = 1.0
    costs: Costs = field(default_factory=Costs)

    def __post_init__(self) -> None:
        for name, value in (("densities", share) for share in self.densities):
            check_share(name, value)
        if self.density is not None:
            check_share("density", self.density)
        for name in ("weight", "limit"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: {getattr(self, name)!r}; valid: 0 or a positive number")

    def bins(self, steps: int) -> tuple[int, ...]:
        """See `Search.bins`: every step by itself."""
        return every_step(steps)

    def patterns(self, layout: TokenLayout, block_q: int, block_k: int) -> tuple[Pattern, ...]:
        """What is tried, `all` and `skip` first."""
        return _patterns(self.densities, layout, block_q, block_k)

    def look(self, seen: Seen, number: int, before: Any) -> dict[str, torch.Tensor]:
        """See `Search.look`: `error` [H, patterns], and `columns` [H, KB], the mass of key blocks over all queries.

        Stripes are tried where this very call has its mass.
        """
        layout, sizes = seen.layout, (seen.block_q, seen.block_k)
        mass = block_mass(seen.q, seen.k, seen.lse, *sizes, scale=seen.scale)
        columns = mass.mean(dim=(0, 2))[:, : video_blocks(layout, seen.block_k)]
        errors = []
        for pattern in self.patterns(layout, *sizes):
            if pattern.kind in ("all", "skip"):
                errors.append(torch.full(columns.shape[:1], float(pattern.kind == "skip"), device=columns.device))
                continue
            mask = (
                torch.stack([stripe_mask(bits, layout, *sizes) for bits in _stripes(columns, pattern).cpu()])
                if pattern.kind == "stripe"
                else pattern_mask(pattern, layout, *sizes)[None]
            )
            table = pattern_order(pattern).table(layout, 1)
            blocks = mask_to_lists(mask[None], *sizes).to(seen.q.device)
            errors.append(seen.error(Chosen(blocks, None if table is None else table.to(seen.q.device))))
        return {"error": torch.stack(errors, dim=1), "columns": columns}

    def settle(
        self, findings: Findings, before: Any, layout: TokenLayout, sizes: tuple[int, int], layers: int, bins: int
    ) -> Found:
        """See `Search.settle`."""
        patterns = self.patterns(layout, *sizes)
        errors = torch.stack(
            [torch.stack([findings.mean("error", layer, number) for layer in range(layers)]) for number in range(bins)]
        )
        densities = torch.tensor([_density(pattern, layout, *sizes) for pattern in patterns])
        costs = torch.tensor([
            self.costs.of(float(density), ordered=pattern.kind == "multi_diagonal")
            for pattern, density in zip(patterns, densities, strict=True)
        ])  # fmt: skip
        if self.density is None:
            choice = published_choice(errors, costs, self.weight, self.limit)
        else:
            choice = budgeted_choice(errors, costs, densities, self.density)
        stripes = torch.zeros(*choice.shape, -(-video_blocks(layout, sizes[1]) // 8), dtype=torch.uint8)
        for number in range(bins):
            for layer in range(layers):
                columns = findings.mean("columns", layer, number)
                for place in (place for place, pattern in enumerate(patterns) if pattern.kind == "stripe"):
                    taken = choice[number, layer] == place
                    stripes[number, layer, taken] = _stripes(columns, patterns[place])[taken]
        return Found(patterns, pointed(list(choice)), stripes=stripes)


def published_choice(errors: torch.Tensor, costs: torch.Tensor, weight: float, limit: float) -> torch.Tensor:
    """Sparse-vDiT's rule.

    Args:
        errors: [..., patterns], `all` first.
        costs: [patterns].
        weight: lambda.
        limit: epsilon.

    Returns:
        int64 [...], the pattern with the smallest error + weight * cost, or 0 where none but `all` is within the limit.
    """
    losses, best = (errors + weight * costs)[..., 1:].min(dim=-1)
    return torch.where(losses <= limit, best + 1, 0)


def budgeted_choice(errors: torch.Tensor, costs: torch.Tensor, densities: torch.Tensor, density: float) -> torch.Tensor:
    """The smallest errors whose mean density is within a budget, by one price of cost for all heads.

    Args:
        errors: [..., patterns].
        costs, densities: [patterns].
        density: the budget; a pattern of density 0 must be among them.

    Returns:
        int64 [...].
    """

    def chosen(price: float) -> torch.Tensor:
        return (errors.double() + price * costs.double()).argmin(dim=-1)

    low, high = 0.0, 1.0
    while float(densities[chosen(high)].double().mean()) > density:
        low, high = high, 2 * high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        within = float(densities[chosen(middle)].double().mean()) <= density
        low, high = (low, middle) if within else (middle, high)
    return chosen(high)


@lru_cache(maxsize=16)
def _patterns(densities: tuple[float, ...], layout: TokenLayout, block_q: int, block_k: int) -> tuple[Pattern, ...]:
    patterns = [Pattern("all"), Pattern("skip")]
    for density in densities:
        width = Band(density=density, sink_frames=0).solve(layout, block_q, block_k).width
        patterns += [
            Pattern("diagonal", density, width),
            Pattern("multi_diagonal", density, width),
            Pattern("stripe", density),
        ]
    return tuple(patterns)


def _density(pattern: Pattern, layout: TokenLayout, block_q: int, block_k: int) -> float:
    """The density of a pattern, of stripes those of whole blocks in front."""
    if pattern.kind == "stripe":
        first = torch.zeros(1, video_blocks(layout, block_k))
        mask = stripe_mask(_stripes(first, pattern)[0], layout, block_q, block_k)
    else:
        mask = pattern_mask(pattern, layout, block_q, block_k)
    return mask_density(mask[None], layout, block_q, block_k)


def _stripes(columns: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """The key blocks of the largest mass, uint8 [H, ceil(KB / 8)], from masses [H, KB]."""
    assert pattern.density is not None
    best = columns.sort(dim=1, descending=True, stable=True).indices[
        :, : blocks_of_share(pattern.density, columns.shape[1])
    ]
    return pack_bits(torch.zeros_like(columns, dtype=torch.bool).scatter_(1, best, True))
