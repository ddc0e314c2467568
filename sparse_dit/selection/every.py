"""Selection `all`: every key block is computed."""

import math
from dataclasses import dataclass

import torch

from sparse_dit.layout import TokenLayout


@dataclass(frozen=True)
class Every:
    """Every query block computes every key block.

    With native precision this is dense attention, so the engine gives it to the model's own dense backend.
    """

    def select(
        self, layout: TokenLayout, block_q: int, block_k: int, table: torch.Tensor | None = None, heads: int = 1
    ) -> torch.Tensor:
        """See `Selection.select`."""
        return torch.ones(1, math.ceil(layout.length / block_q), math.ceil(layout.length / block_k), dtype=torch.bool)
