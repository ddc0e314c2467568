"""What selections have in common that look at the queries and keys of each call."""

import math
from abc import ABC, abstractmethod
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from sparse_dit.kernels.bits import bits_to_lists, lists_to_bits
from sparse_dit.kernels.blocks import BlockList
from sparse_dit.kernels.density import measured_density
from sparse_dit.kernels.ordered import Ordered, order_with_means
from sparse_dit.kernels.pool import block_means
from sparse_dit.kernels.scores import part_means
from sparse_dit.layout import TokenLayout, text_blocks
from sparse_dit.orders import Order
from sparse_dit.parallel import ALL_HERE, Heads


@dataclass(frozen=True, eq=False)
class Call:
    """What a dynamic selection may know of the attention call it chooses for, besides q, k and v.

    Attributes:
        layout: the tokens.
        orders: the selection's own (`Dynamic.orders`), or else the recipe's one.
        tables: of each order the token ids in the order in which they enter blocks, int64 [1 or H, S] on q's device;
            `None` where they stay as they are.
        block_q: query tokens of a block.
        block_k: key tokens of a block.
        scale: factor on the scores.
        layer: index of the self-attention layer.
        step: denoising step from 0.
        slot: what the layer keeps between steps for this branch, by name. With the name `lse` it holds the log-sum-exp
            of a whole call, fp32 [B, H, S] in the model's order, once the selection has asked for one.
        forced: bool [1, 1, QB, KB] on q's device, blocks that are computed whatever is chosen: all with text in them,
            of queries or of keys; `None` when there is no text.
        heads: which of the layer's heads the call has.
        key_table: the order of keys and values where they have another one than queries, whose is `table` then.
        brings: whether a selection that pools q and k in an order should bring q, k and v into it in the same pass
            (`Chosen.ordered`), as attention in native precision wants them.
    """

    layout: TokenLayout
    orders: tuple[Order, ...]
    tables: tuple[torch.Tensor | None, ...]
    block_q: int
    block_k: int
    scale: float
    layer: int
    step: int
    slot: MutableMapping[str, torch.Tensor]
    forced: torch.Tensor | None = None
    heads: Heads = ALL_HERE
    key_table: torch.Tensor | None = None
    brings: bool = False

    @property
    def table(self) -> torch.Tensor | None:
        """The first table, for selections with one order."""
        return self.tables[0]

    @property
    def q_blocks(self) -> int:
        """QB, blocks of queries."""
        return -(-self.layout.length // self.block_q)

    @property
    def k_blocks(self) -> int:
        """KB, blocks of keys."""
        return -(-self.layout.length // self.block_k)

    def means(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, units: tuple[int, int], *, parts: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, Ordered | None]:
        """Means of runs of tokens in the order of the blocks.

        Args:
            q, k, v: [B, H, S, D] in the model's own token order.
            units: tokens of a run of queries and of keys.
            parts: whether runs are parts of blocks (`scores.part_means`), else blocks (`pool.block_means`).

        Returns:
            The means of queries and of keys; and q, k and v in the order, where the call `brings` them into one.
        """
        keys = self.table if self.key_table is None else self.key_table
        if self.brings and self.table is not None and keys is not None:
            ordered, q_means, k_means = order_with_means(q, k, v, self.table, keys, units, parts=parts)
            return q_means, k_means, ordered
        means = part_means if parts else block_means
        return means(q, units[0], order=self.table), means(k, units[1], order=keys), None


class Chosen(NamedTuple):
    """What a call computes.

    Attributes:
        blocks: the block list, on q's device.
        table: the order of its tokens, as `Call.tables`.
        key_table: where keys and values have another order than queries: theirs, int64 [B * H, S]; `table` is then of
            that shape, too, and the block list is of one batch entry with B * H heads.
        heads: int64 [n] on q's device, ascending: the heads that are computed, to which the block list and `table`
            belong; the output of the others is zero. `None` is all of them.
        ordered: q, k and v in these orders, where choosing has brought them into it; for the same call alone.
        density: of the block list over the whole sequence, where that is known without counting.
    """

    blocks: BlockList
    table: torch.Tensor | None
    key_table: torch.Tensor | None = None
    heads: torch.Tensor | None = None
    ordered: Ordered | None = None
    density: float | None = None

    def measured(self, length: int) -> float | torch.Tensor:
        """The density of the block list: as known, or else counted where the list is (`measured_density`)."""
        return measured_density(self.blocks, length) if self.density is None else self.density


class Dynamic(ABC):
    """A selection that looks at q and k: a frozen dataclass with a registry name.

    The engine asks it to choose at every refresh of the schedule (`Schedule.refreshes`); where there are steps between
    refreshes it asks it to keep what was chosen, and to recall it there.

    Attributes:
        needs_lse: whether its first choice for a layer asks for a whole call.
        repeats: whether what it does follows from q, k and v, the layout and the layer alone, not from the step or the
            slot; what it keeps is then the block list, and calls alike may repeat its launches (`kernels.replays`).
    """

    needs_lse: ClassVar[bool] = False
    repeats: ClassVar[bool] = False

    def orders(self, layout: TokenLayout, layer: int) -> tuple[Order, ...] | None:
        """The orders that the selection itself brings for a layer; `None` leaves the order to the recipe."""
        return None

    @abstractmethod
    def choose(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> Chosen | None:
        """Choose the blocks to compute.

        Args:
            q, k, v: [B, H, S, D] in the model's own token order.
            call: everything else.

        Returns:
            The blocks of every batch entry and head; `None` asks for a whole call first, whose log-sum-exp is put into
            `call.slot["lse"]`.
        """

    @abstractmethod
    def expected_density(self, layout: TokenLayout, block_q: int, block_k: int) -> float | None:
        """The density of a call as far as it is known beforehand; `None` when the content decides."""

    def keep(self, chosen: Chosen, call: Call) -> None:
        """Put what was chosen into the slot; block lists as one bit a block."""
        call.slot["blocks"] = lists_to_bits(chosen.blocks, call.k_blocks)

    def recall(self, call: Call) -> Chosen:
        """What was chosen at the last refresh."""
        return Chosen(bits_to_lists(call.slot["blocks"], call.k_blocks, call.block_q, call.block_k), call.table)

    def kept_bytes(
        self, layout: TokenLayout, block_q: int, block_k: int, *, batch: int, heads: int, keeps: bool
    ) -> int:
        """Bytes that one layer keeps for one branch.

        Args:
            layout: the tokens.
            block_q, block_k: tokens of a block.
            batch, heads: batch entries and attention heads of a call.
            keeps: whether there are steps between refreshes (`Schedule.keeps`).
        """
        q_blocks, k_blocks = -(-layout.length // block_q), -(-layout.length // block_k)
        return batch * heads * q_blocks * -(-k_blocks // 8) if keeps else 0


def density_of_share(share: float, layout: TokenLayout, block_q: int, block_k: int) -> float:
    """The density of a selection that takes a share of the key blocks of every row, all blocks counted as whole ones.

    Args:
        share: of the key blocks.
        layout: the tokens; text is computed on top of the share.
        block_q, block_k: tokens of a block.
    """
    k_blocks = -(-layout.length // block_k)
    rows, columns = (marks.double().mean().item() for marks in text_blocks(layout, block_q, block_k))
    return rows + (1.0 - rows) * min(1.0, columns + blocks_of_share(share, k_blocks) / k_blocks)


def blocks_of_share(density: float, blocks: int) -> int:
    """Whole blocks of a share, at least one; what floats lose must not cost a block."""
    return max(1, math.floor(density * blocks + 1e-6))
