"""Orders: in which order the tokens of the sequence enter blocks."""

from dataclasses import dataclass
from typing import Protocol

import torch

from sparse_dit.layout import TokenLayout


class Order(Protocol):
    """A frozen dataclass with a registry name; it is hashable, so that its tables can be cached."""

    def __hash__(self) -> int: ...

    def table(self, layout: TokenLayout) -> torch.Tensor | None:
        """Token ids in the order in which they enter blocks.

        Returns:
            int64 [layout.length], a permutation; `None` when the tokens stay as the model flattens them.
        """


@dataclass(frozen=True)
class Rows:
    """As the model flattens T, H, W: nothing is moved."""

    def table(self, layout: TokenLayout) -> torch.Tensor | None:
        return None


ORDERS: dict[str, type[Order]] = {"rows": Rows}
