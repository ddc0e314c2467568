"""What searches have in common: the call they look at, what they find in many of them, and what comes of it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from sparse_dit.apart import attend_chosen
from sparse_dit.layout import TokenLayout
from sparse_dit.profiles import Pattern
from sparse_dit.selection import Chosen


@dataclass(frozen=True, eq=False)
class Seen:
    """One attention call.

    Attributes:
        q, k, v: [B, H, S, D] in the model's order.
        out: [B, H, S, D] of whole attention.
        lse: fp32 [B, H, S], its log-sum-exp.
        layout: the tokens.
        layer: index of the self-attention layer.
        block_q, block_k: tokens of a block.
        scale: factor on the scores.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    layout: TokenLayout
    layer: int
    block_q: int
    block_k: int
    scale: float

    def error(self, chosen: Chosen) -> torch.Tensor:
        """Squared error of what would be computed, over the squared norm of the whole output; fp32 [H].

        Over all tokens and batch entries; 1 for a head that is left out.
        """
        out, _ = attend_chosen(self.q, self.k, self.v, chosen, scale=self.scale, precision="native")
        whole = self.out.float()
        return (out.float() - whole).square().sum(dim=(0, 2, 3)) / whole.square().sum(dim=(0, 2, 3))


class Findings(Protocol):
    """Means of what a search's looks found, over prompts, branches and the steps of a bin."""

    def mean(self, name: str, layer: int, number: int | None = None) -> torch.Tensor:
        """The mean of one tensor of a layer over a bin's calls, or over all calls; fp32 [H, ...]."""


@dataclass(frozen=True, eq=False)
class Found:
    """What a profile is to hold; tensors as `sparse_dit.profiles.Profile` has them."""

    patterns: tuple[Pattern, ...]
    pattern: torch.Tensor
    stripes: torch.Tensor | None = None
    axes: torch.Tensor | None = None
    masks: torch.Tensor | None = None


class Search(ABC):
    """A search: a frozen dataclass of settings.

    Attributes:
        passes: how many times the calls must be looked at, as later passes build on earlier ones.
        settling: the settings that `settle` alone depends on.
    """

    passes: ClassVar[int] = 1
    settling: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def bins(self, steps: int) -> tuple[int, ...]:
        """First steps of the bins that the method's source uses in runs of so many steps."""

    @abstractmethod
    def look(self, seen: Seen, number: int, before: Any) -> dict[str, torch.Tensor]:
        """What is to be averaged.

        Args:
            seen: the call.
            number: of the pass, from 0.
            before: what `between` made of the pass before; `None` in the first.

        Returns:
            Tensors by name, [H, ...] each, a mean over the batch entries.
        """

    def between(self, findings: Findings, layers: int) -> Any:
        """What the next pass needs to know of this one's findings."""
        return None

    @abstractmethod
    def settle(
        self, findings: Findings, before: Any, layout: TokenLayout, sizes: tuple[int, int], layers: int, bins: int
    ) -> Found:
        """What the profile holds.

        Args:
            findings: of the last pass.
            before: as `look`.
            layout: the tokens.
            sizes: block_q and block_k.
            layers, bins: how many.
        """


def check_share(name: str, value: float) -> None:
    """Raises ValueError unless a setting is a share in (0, 1]."""
    if not 0.0 < value <= 1.0:
        raise ValueError(f"{name}: {value!r}; valid: a number in (0, 1]")


def every_step(steps: int) -> tuple[int, ...]:
    """Bins of a step each."""
    return tuple(range(steps))


def pointed(choice: Sequence[torch.Tensor]) -> torch.Tensor:
    """`Profile.pattern` from the choices of each bin, integers [layers, heads] each."""
    return torch.stack(list(choice)).to(torch.uint8)
