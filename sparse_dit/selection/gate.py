"""Selection `gate`: chunks of keys by their mean, partitioned in time, in space, and in both, by turns.

Source: VMoBA (arXiv 2506.23858, ICLR 2026).
"""

import functools
import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from einops import rearrange

from sparse_dit.kernels.cutoff import take_mass
from sparse_dit.kernels.lists import mask_to_lists, spread_lists
from sparse_dit.layout import TokenLayout, block_spans, text_blocks
from sparse_dit.orders import Order, Tiles
from sparse_dit.selection.dynamic import Call, Chosen, Dynamic

POOLS = ("row", "head", "chunk", "all")


@dataclass(frozen=True)
class Gate(Dynamic):
    """Keys are cut into chunks: into spans of frames in layers 0, 3, 6, ..., into tiles of the frame through all frames
    in layers 1, 4, 7, ..., and into cuboids in layers 2, 5, 8, ... The gate of a query and a chunk is q.mean(k).

    Over a pool of gates, brought to [0, 1] by its smallest and its largest, the largest are taken until they sum to
    `threshold` of the pool's sum; a query's own chunk is always taken, and counts. The pools are those of the paper's
    code: `row` (its query_head: the chunks of one query), `head` (head_global, the paper's "global": all of a head),
    `chunk` (block: the queries of one chunk) and `all` (overall: the whole call).

    What differs from the paper: it gates single queries and gathers them; here a block of queries is gated by its mean,
    so that all its queries take the same chunks. Its chunks must divide the grid; here the last ones are smaller. Where
    a block of keys lies in several chunks it counts for the one of its middle token. `head` is what the paper
    describes, `row` the default of its code. The number of chunks is that of its FLOPs script, 7, 40 and 60; how they
    are laid out is ours.

    Args:
        threshold: share of the pool's sum, in (0, 1] (tau in the paper).
        pool: over what the gates are compared.
        spans: chunks along T in layers of spans.
        tiles: chunks along H and W in layers of tiles.
        cuboids: chunks along T, H and W in layers of cuboids.

    Raises:
        ValueError: a value is out of its range.
    """

    repeats: ClassVar[bool] = True

    threshold: float = 0.25
    pool: str = "head"
    spans: int = 7
    tiles: tuple[int, int] = (5, 8)
    cuboids: tuple[int, int, int] = (3, 4, 5)

    def __post_init__(self) -> None:
        checks = (
            ("threshold", 0.0 < self.threshold <= 1.0, "a number in (0, 1]"),
            ("pool", self.pool in POOLS, ", ".join(POOLS)),
            ("spans", self.spans >= 1, "1 or more chunks"),
            ("tiles", len(self.tiles) == 2 and min(self.tiles) >= 1, "two positive whole numbers, for H and W"),
            ("cuboids", len(self.cuboids) == 3 and min(self.cuboids) >= 1, "three positive whole numbers"),
        )
        for name, holds, valid in checks:
            if not holds:
                raise ValueError(f"selection.{name}: {getattr(self, name)!r}; valid: {valid}")

    def orders(self, layout: TokenLayout, layer: int) -> tuple[Order, ...]:
        """See `Dynamic.orders`: chunk by chunk."""
        parts = ((self.spans, 1, 1), (1, *self.tiles), self.cuboids)[layer % 3]
        frames, height, width = (math.ceil(side / part) for side, part in zip(layout.grid, parts, strict=True))
        return (Tiles((frames, height, width)),)

    def choose(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> Chosen:
        """See `Dynamic.choose`."""
        [order] = call.orders
        assert isinstance(order, Tiles)
        cut = _partition(order, call.layout, call.block_q, call.block_k, q.device)
        if not len(cut.rows):  # text in every block of queries: there is nothing to choose
            return Chosen(mask_to_lists(cut.always, call.block_q, call.block_k, capacity=call.k_blocks), call.table)
        q_means, k_means, ordered = call.means(q, k, v, (call.block_q, call.block_k))
        if len(cut.rows) < call.q_blocks:
            q_means = q_means.index_select(2, cut.rows)
        gates = q_means @ (cut.weight @ k_means).mT
        if self.pool == "all":
            taken = call.heads.own(self.take(call.heads.gather(gates, axis=1), cut.own), q.shape[1], axis=1)
        else:
            taken = self.take(gates, cut.own)
        if len(cut.rows) < call.q_blocks:
            every = taken.new_zeros(*taken.shape[:2], call.q_blocks, taken.shape[3])
            taken = every.index_copy_(2, cut.rows, taken)
        blocks = spread_lists(taken, cut.chunk, block_q=call.block_q, block_k=call.block_k, forced=cut.always)
        return Chosen(blocks, call.table, ordered=ordered)

    def take(self, gates: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """Which chunks are taken.

        Args:
            gates: fp32 [B, H, queries, chunks].
            own: bool [queries, chunks], the chunk that a query lies in.

        Returns:
            bool [B, H, queries, chunks].
        """
        batch, heads, rows, chunks = gates.shape
        if self.pool == "chunk":
            pools, own = rearrange(gates, "b h q c -> (b h c) 1 q"), own.mT[:, None].repeat(batch * heads, 1, 1)
            return rearrange(take_mass(pools, own, self.threshold), "(b h c) 1 q -> b h q c", b=batch, h=heads)
        if self.pool == "row":
            pools, own = gates.reshape(-1, 1, chunks), own[:, None].repeat(batch * heads, 1, 1)
        elif self.pool == "head":
            pools, own = gates.reshape(-1, rows, chunks), own[None]
        else:
            pools, own = gates.reshape(1, -1, chunks), own.repeat(batch * heads, 1)[None]
        return take_mass(pools, own, self.threshold).view(gates.shape)

    def expected_density(self, layout: TokenLayout, block_q: int, block_k: int) -> None:
        """See `Dynamic.expected_density`: the content decides."""
        return None


class _Partition(NamedTuple):
    """Chunks that at least one block of keys counts for, and the blocks of queries without text, on a device.

    Attributes:
        rows: the blocks of queries, int64 [rows].
        own: bool [rows, chunks], the chunk that a block of queries lies in.
        chunk: int64 [KB], the chunk of each block of keys; any one for blocks of text.
        weight: fp32 [chunks, KB], takes means of blocks to means of chunks.
        always: bool [1, 1, QB, KB], blocks that share a token, or hold text. Where a chunk is smaller than a block, its
            queries would not see their own block otherwise.
    """

    rows: torch.Tensor
    own: torch.Tensor
    chunk: torch.Tensor
    weight: torch.Tensor
    always: torch.Tensor


@functools.lru_cache(maxsize=16)
def _partition(order: Tiles, layout: TokenLayout, block_q: int, block_k: int, device: torch.device) -> _Partition:
    text_rows, text_columns = text_blocks(layout, block_q, block_k)
    rows = (~text_rows).nonzero().squeeze(1)
    q_chunk, k_chunk = _chunks(order, layout, block_q)[rows], _chunks(order, layout, block_k)
    present = k_chunk[k_chunk >= 0].unique()
    first, last = block_spans(layout.length, block_k)
    tokens = ((k_chunk == present[:, None]) * (last - first)).float()
    q_first, q_last = block_spans(layout.length, block_q)
    parts = (
        rows,
        q_chunk[:, None] == present,
        torch.searchsorted(present, k_chunk).clamp(max=len(present) - 1),
        tokens / tokens.sum(dim=1, keepdim=True),
        ((q_first[:, None] < last) & (first < q_last[:, None]) | text_rows[:, None] | text_columns)[None, None],
    )
    return _Partition(*(part.to(device) for part in parts))


def _chunks(order: Tiles, layout: TokenLayout, block: int) -> torch.Tensor:
    """The chunk of the middle token of each block, int64 [blocks] on the CPU; -1 where that is text."""
    table = order.table(layout, 1)
    first, last = block_spans(layout.length, block)
    middle = (first + last) // 2
    token = (middle if table is None else table[0, middle]) - layout.text_before
    text = (token < 0) | (token >= layout.video_tokens)
    places = torch.unravel_index(token.clamp(0, layout.video_tokens - 1), layout.grid)
    chunk = torch.zeros_like(token)
    for place, side, extent in zip(places, layout.grid, order.tile, strict=True):
        chunk = chunk * math.ceil(side / extent) + place // extent
    return chunk.masked_fill(text, -1)
