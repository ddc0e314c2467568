"""Which part of the grid a block covers, and which blocks meet under a rule per axis; how far block masks are off.

Under a rule for each of T, H, W a query sees a key when the query's coordinate sees the key's on every axis. Whether
any token of one block sees any token of another is decided exactly, for any order, without a mask over tokens: the
tokens of a block are cut into boxes, and two boxes meet when they meet on every axis.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from sparse_dit.layout import TokenLayout, block_spans, text_blocks

# Lowest and highest coordinates, both inclusive.
Ranges = tuple[torch.Tensor, torch.Tensor]


class Rule(Protocol):
    """Which coordinates of keys a query sees on one axis."""

    def meets(self, query: Ranges, key: Ranges) -> torch.Tensor:
        """Whether any coordinate of a query range sees any of a key range.

        Args:
            query: int64 [Q] each.
            key: int64 [K] each.

        Returns:
            bool [Q, K].
        """


@dataclass(frozen=True, eq=False)
class Boxes:
    """The video tokens of all blocks, cut into boxes of the grid; those of a block follow each other, largest first.

    Attributes:
        first: lowest coordinates of each box, int64 [boxes, 3].
        last: highest coordinates of each box, int64 [boxes, 3].
        start: index of the first box of each block, int64 [blocks].
        count: number of boxes of each block, int64 [blocks]; 0 for a block of text.
        hulls: lowest and highest coordinates of each block, int64 [blocks, 3] each; of no meaning for a block of text.
    """

    first: torch.Tensor
    last: torch.Tensor
    start: torch.Tensor
    count: torch.Tensor
    hulls: Ranges

    @property
    def largest(self) -> Ranges:
        """Lowest and highest coordinates of the largest box of each block, as `hulls`."""
        index = self.start.clamp(max=len(self.first) - 1)
        return self.first[index], self.last[index]

    @classmethod
    def cut(cls, layout: TokenLayout, block: int, table: torch.Tensor | None) -> "Boxes":
        """The boxes of an order.

        Args:
            layout: the tokens.
            block: tokens of a block.
            table: token ids in the order in which they enter blocks, int64 [layout.length] on the CPU; `None` when they
                stay as they are.
        """
        position = torch.arange(layout.text_before, layout.text_before + layout.video_tokens)
        video = (position if table is None else table[position]) - layout.text_before
        first = torch.stack(torch.unravel_index(video, layout.grid), 1)
        owner, last = position // block, first
        for axis in (2, 1, 0):
            owner, first, last = _joined(owner, first, last, axis, layout.grid)
        by_volume = (last - first + 1).prod(1).argsort(descending=True)
        order = by_volume[owner[by_volume].argsort(stable=True)]
        owner, first, last = owner[order], first[order], last[order]
        blocks = -(-layout.length // block)
        count = owner.bincount(minlength=blocks)
        where = owner[:, None].expand(-1, 3)
        zeros = torch.zeros(blocks, 3, dtype=torch.int64)
        hulls = (
            zeros.scatter_reduce(0, where, first, "amin", include_self=False),
            zeros.scatter_reduce(0, where, last, "amax", include_self=False),
        )
        return cls(first, last, count.cumsum(0) - count, count, hulls)


def _joined(
    owner: torch.Tensor, first: torch.Tensor, last: torch.Tensor, axis: int, grid: tuple[int, int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Boxes of one block that continue each other along an axis, joined; (owner, first, last), sorted anew."""
    key = owner
    for other in {0, 1, 2} - {axis}:
        key = (key * grid[other] + first[:, other]) * grid[other] + last[:, other]
    key = key * grid[axis] + first[:, axis]
    key, order = key.sort()
    owner, first, last = owner[order], first[order], last[order]
    line = key // grid[axis]
    begins = torch.ones(len(line), dtype=torch.bool)
    begins[1:] = (line[1:] != line[:-1]) | (first[1:, axis] != last[:-1, axis] + 1)
    ends = torch.cat([begins[1:], torch.ones(1, dtype=torch.bool)])
    return owner[begins], first[begins], last[ends]


class _Meetings:
    """Whether any cell of a query range sees any cell of a key range, looked up axis by axis.

    Args:
        query: the query ranges, int64 [ranges, 3] each.
        key: the key ranges, likewise.
        rules: one for each axis.
    """

    def __init__(self, query: Ranges, key: Ranges, rules: Sequence[Rule]) -> None:
        self._axes = []
        for axis, rule in enumerate(rules):
            # Few ranges are distinct on one axis.
            (queries, of_query), (keys, of_key) = (
                _distinct(first[:, axis], last[:, axis]) for first, last in (query, key)
            )
            self._axes.append((rule.meets(queries, keys), of_query, of_key))

    def everywhere(self) -> torch.Tensor:
        """Bool [query ranges, key ranges]."""
        met = [meets[of_query][:, of_key] for meets, of_query, of_key in self._axes]
        return met[0].logical_and_(met[1]).logical_and_(met[2])

    def at(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Bool [n], for n pairs given by the indices of their ranges."""
        met = [
            meets.flatten()[of_query[query] * meets.shape[1] + of_key[key]] for meets, of_query, of_key in self._axes
        ]
        return met[0].logical_and_(met[1]).logical_and_(met[2])


def _distinct(first: torch.Tensor, last: torch.Tensor) -> tuple[Ranges, torch.Tensor]:
    """The different ones of some ranges, and which of them each range is."""
    side = int(last.max()) + 1
    ranges, which = (first * side + last).unique(return_inverse=True)
    return (ranges // side, ranges % side), which


def meeting(query: Boxes, key: Boxes, rules: Sequence[Rule]) -> torch.Tensor:
    """Pairs of blocks in which a video token of the query block sees one of the key block.

    Args:
        query: boxes of the query blocks.
        key: boxes of the key blocks.
        rules: one for each of T, H, W.

    Returns:
        bool [QB, KB] on the CPU, exact. Memory is of the order of QB * KB.
    """
    # Two cheap answers decide nearly all pairs, and all pairs of boxes: hulls that do not meet, largest boxes that do.
    video = (query.count > 0)[:, None] & (key.count > 0)
    mask = _Meetings(query.largest, key.largest, rules).everywhere() & video
    open_pairs = _Meetings(query.hulls, key.hulls, rules).everywhere() & video & ~mask
    rows, columns = open_pairs.nonzero(as_tuple=True)
    boxes = _Meetings((query.first, query.last), (key.first, key.last), rules)
    for query_rank in range(int(query.count.max())):
        left = query.count[rows] > query_rank
        rows, columns = rows[left], columns[left]
        for key_rank in range(int(key.count.max())):
            if not rows.numel():
                return mask
            met = key.count[columns] > key_rank
            met[met.clone()] = boxes.at(query.start[rows[met]] + query_rank, key.start[columns[met]] + key_rank)
            mask[rows[met], columns[met]] = True
            rows, columns = rows[~met], columns[~met]
    return mask


def add_text(mask: torch.Tensor, layout: TokenLayout, block_q: int, block_k: int) -> torch.Tensor:
    """A mask bool [H or 1, QB, KB] with every block added that holds text, as rows and as columns."""
    query, key = text_blocks(layout, block_q, block_k)
    return mask | query[:, None] | key


def mask_density(mask: torch.Tensor, layout: TokenLayout, block_q: int, block_k: int) -> float:
    """Computed tile area over full area, ragged blocks counted by their true size.

    Args:
        mask: bool [H or 1, QB, KB] on the CPU.
        layout: the tokens of the call.
        block_q: query tokens of a block.
        block_k: key tokens of a block.

    Returns:
        The mean over the heads, in [0, 1].
    """
    query, key = (
        (last - first).double() for first, last in (block_spans(layout.length, b) for b in (block_q, block_k))
    )
    # Whole numbers below 2^24 are exact in fp32; one head at a time bounds the memory.
    areas = [float(query @ (head.float() @ key.float()).double()) for head in mask]
    return sum(areas) / (len(areas) * layout.length**2)


class Distance(NamedTuple):
    """How far a mask over blocks is from a mask over tokens, as shares of the full area.

    Attributes:
        surplus: pairs of tokens that are computed although the token mask leaves them out.
        missing: pairs of tokens in the token mask that are not computed.
    """

    surplus: float
    missing: float


def distance(mask: torch.Tensor, exact: torch.Tensor, block_q: int, block_k: int) -> Distance:
    """Compare a mask over blocks with the mask over tokens that it stands for; for small inputs, S * S in memory.

    Args:
        mask: bool [H or 1, QB, KB].
        exact: bool [H or 1, S, S], both sides in the order in which tokens enter blocks.
        block_q: query tokens of a block.
        block_k: key tokens of a block.

    Returns:
        The mean over the heads.
    """
    tokens = exact.shape[-1]
    computed = mask.repeat_interleave(block_q, 1)[:, :tokens].repeat_interleave(block_k, 2)[..., :tokens]
    return Distance(float((computed & ~exact).double().mean()), float((exact & ~computed).double().mean()))
