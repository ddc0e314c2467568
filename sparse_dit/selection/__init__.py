"""Selections: which key blocks a query block computes. One file a selection.

A static selection depends on the layout of the tokens alone and is computed once; a dynamic one looks at the queries
and keys of the call.
"""

from typing import Protocol

import torch

from sparse_dit.layout import TokenLayout
from sparse_dit.selection.band import Band
from sparse_dit.selection.dynamic import Call, Chosen, Dynamic
from sparse_dit.selection.every import Every
from sparse_dit.selection.gate import Gate
from sparse_dit.selection.head_types import HeadTypes
from sparse_dit.selection.mass import Mass
from sparse_dit.selection.pooled import Pooled
from sparse_dit.selection.profile import Profiled
from sparse_dit.selection.radial import Radial
from sparse_dit.selection.window import Window


class Selection(Protocol):
    """A static selection: a frozen dataclass with a registry name; it is hashable, so that its masks can be cached."""

    def __hash__(self) -> int: ...

    def select(
        self, layout: TokenLayout, block_q: int, block_k: int, table: torch.Tensor | None, heads: int
    ) -> torch.Tensor:
        """Choose the blocks to compute.

        Args:
            layout: the tokens of the call.
            block_q: query tokens of a block.
            block_k: key tokens of a block.
            table: the order's token ids, int64 [1 or heads, length] on the CPU; `None` when no token moves.
            heads: number of attention heads.

        Returns:
            bool [1 or heads, QB, KB] on the CPU, QB = ceil(length / block_q), KB = ceil(length / block_k); True is
            computed. The engine adds all blocks with text in them. It may be cached and shared: do not write into it.
        """


AnySelection = Selection | Dynamic

SELECTIONS: dict[str, type[Selection] | type[Dynamic]] = {
    "all": Every,
    "radial": Radial,
    "window": Window,
    "band": Band,
    "head_types": HeadTypes,
    "pooled": Pooled,
    "mass": Mass,
    "gate": Gate,
    "profile": Profiled,
}

__all__ = [
    "SELECTIONS",
    "AnySelection",
    "Band",
    "Call",
    "Chosen",
    "Dynamic",
    "Every",
    "Gate",
    "HeadTypes",
    "Mass",
    "Pooled",
    "Profiled",
    "Radial",
    "Selection",
    "Window",
]
