"""Selections: which key blocks a query block computes. One file a selection."""

from typing import Protocol

import torch

from sparse_dit.layout import TokenLayout
from sparse_dit.selection.every import Every
from sparse_dit.selection.radial import Radial


class Selection(Protocol):
    """A frozen dataclass with a registry name; it is hashable, so that what it selects can be cached."""

    def __hash__(self) -> int: ...

    def select(self, layout: TokenLayout, block_q: int, block_k: int) -> torch.Tensor:
        """Choose the blocks to compute.

        Args:
            layout: the tokens of the call.
            block_q: query tokens of a block.
            block_k: key tokens of a block.

        Returns:
            bool [H or 1, QB, KB] on the CPU, QB = ceil(length / block_q), KB = ceil(length / block_k); True is
            computed. It may be cached and shared: do not write into it.
        """


SELECTIONS: dict[str, type[Selection]] = {"all": Every, "radial": Radial}

__all__ = ["SELECTIONS", "Every", "Radial", "Selection"]
