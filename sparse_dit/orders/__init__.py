"""Orders: in which order the tokens of the sequence enter blocks. One file a family of orders.

Only video tokens move: text tokens keep their positions, in front of the video tokens and behind them. Blocks are then
consecutive runs of `block_q` or `block_k` tokens of the ordered sequence, and only the last one may be short.
"""

from typing import Protocol

import torch

from sparse_dit.layout import TokenLayout
from sparse_dit.orders.axes import Axes, Rows, Serpentine, TimeMajor
from sparse_dit.orders.clusters import Clusters
from sparse_dit.orders.hilbert import Hilbert
from sparse_dit.orders.tables import inverse
from sparse_dit.orders.tiles import Tiles


class Order(Protocol):
    """A frozen dataclass with a registry name; it is hashable, so that its tables can be cached."""

    def __hash__(self) -> int: ...

    def table(self, layout: TokenLayout, heads: int) -> torch.Tensor | None:
        """Token ids in the order in which they enter blocks.

        Args:
            layout: the tokens of the call.
            heads: number of attention heads.

        Returns:
            int64 [1 or heads, layout.length] on the CPU, each row a permutation that leaves text tokens where they are;
            `None` when no token moves.

        Raises:
            ValueError: a setting per head that is not made for so many heads.
        """


ORDERS: dict[str, type[Order]] = {
    "rows": Rows,
    "time_major": TimeMajor,
    "tiles": Tiles,
    "axes": Axes,
    "hilbert": Hilbert,
    "serpentine": Serpentine,
    "clusters": Clusters,
}

__all__ = ["ORDERS", "Axes", "Clusters", "Hilbert", "Order", "Rows", "Serpentine", "Tiles", "TimeMajor", "inverse"]
