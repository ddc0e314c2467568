"""A layer's attention over several processes: whose heads a call has, and how it comes to whole sequences.

Context parallelism gives every process a part of the sequence and all heads, tensor parallelism the whole sequence and
a part of the heads. Sparse attention needs whole sequences, as its blocks are made of tokens that are near in the
grid, so a call of the first kind exchanges tokens for heads before and heads for tokens behind it (DeepSpeed-Ulysses,
arXiv 2309.14509). What is kept or chosen by head then belongs to the heads that are here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from einops import rearrange


@dataclass(frozen=True)
class Heads:
    """Which of a layer's attention heads a call has.

    Args:
        group: name of the process group over which the layer's heads are spread, in the order of its ranks and as many
            on each; empty where all are here.
    """

    group: str = ""

    @property
    def _processes(self) -> Any:
        from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

        return _resolve_process_group(cast(Any, self.group))

    @property
    def ranks(self) -> int:
        """Over how many processes the heads are spread."""
        return dist.get_world_size(self._processes) if self.group else 1

    def total(self, here: int) -> int:
        """Heads of the layer, where `here` of them are here."""
        return self.ranks * here

    def span(self, here: int) -> slice:
        """The `here` heads that are here among those of the layer."""
        first = dist.get_rank(self._processes) * here if self.group else 0
        return slice(first, first + here)

    def own(self, x: torch.Tensor, here: int, axis: int = 0) -> torch.Tensor:
        """What of a tensor belongs to the `here` heads that are here.

        Args:
            x: has one entry along `axis`, or one for each head of the layer.
            here: heads of the call.
            axis: that axis.
        """
        if not self.group or x.shape[axis] == 1:
            return x
        return x.narrow(axis, self.span(here).start, here)

    def gather(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        """The tensors of all processes, which must all ask, joined along the axis of heads."""
        if not self.group:
            return x
        own = x.movedim(axis, 0).contiguous()
        parts = [torch.empty_like(own) for _ in range(self.ranks)]
        dist.all_gather(parts, own, group=self._processes)
        return torch.cat(parts).movedim(0, axis)


ALL_HERE = Heads()


class Shards(NamedTuple):
    """How the tokens of a sequence lie on the processes of a group.

    A process has a piece of every stretch: of text and video by themselves, say, when both were split before they were
    joined. Joined over the processes the pieces are not in order, which `gather` sets right.

    Attributes:
        group: the process group.
        rank: of this process in it.
        pieces: tokens of every stretch, in order, on every rank.
    """

    group: Any
    rank: int
    pieces: tuple[tuple[int, ...], ...]

    @property
    def name(self) -> str:
        """Of the group, for `Heads`."""
        return cast(str, self.group.group_name)

    @property
    def lengths(self) -> list[int]:
        """Tokens on every rank."""
        return [sum(piece) for piece in self.pieces]

    def gather(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """From the tokens that are here, [B, s, H, D] each, to [B, S, H / ranks, D]: all tokens of some heads."""
        ranks, lengths = len(self.pieces), self.lengths
        # One exchange for all three: its start costs more than its bytes where sequences are short.
        parts = [rearrange(x, "b s (ranks h) d -> ranks s b h d", ranks=ranks) for x in (q, k, v)]
        joined = self._exchange(torch.stack(parts, dim=2).flatten(0, 1), lengths, [lengths[self.rank]] * ranks)
        joined = _reordered(joined, self.pieces)
        return rearrange(joined, "s qkv b h d -> qkv b s h d").unbind(0)

    def gather_mask(self, mask: torch.Tensor) -> torch.Tensor:
        """From a mask [..., s] of the keys that are here to [..., S]; one that is not of these keys stays as it is."""
        ranks, lengths = len(self.pieces), self.lengths
        if mask.shape[-1] != lengths[self.rank]:
            return mask
        own = mask.movedim(-1, 0)
        joined = self._exchange(torch.cat([own] * ranks), lengths, [len(own)] * ranks)
        return _reordered(joined, self.pieces).movedim(0, -1)

    def scatter(self, out: torch.Tensor) -> torch.Tensor:
        """The way back: from [B, S, H / ranks, D] to [B, s, H, D]."""
        ranks, lengths = len(self.pieces), self.lengths
        parts = _reordered(rearrange(out, "b s h d -> s b h d"), tuple(zip(*self.pieces, strict=True)))
        own = self._exchange(parts.contiguous(), [lengths[self.rank]] * ranks, lengths)
        return rearrange(own, "(ranks s) b h d -> b s (ranks h) d", ranks=ranks)

    def _exchange(self, x: torch.Tensor, received: list[int], sent: list[int]) -> torch.Tensor:
        """Sends the first `sent[0]` rows of x to rank 0, and so on; joins what comes from each rank."""
        out = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(out, x, received, sent, group=self.group)
        return out


def shards_of(group: Any, stretches: Sequence[int]) -> Shards:
    """How stretches of so many tokens lie on a process group: in equal pieces, the first ones a token longer where they
    cannot be equal (`torch.tensor_split`)."""
    ranks = dist.get_world_size(group)
    pieces = tuple(tuple(tokens // ranks + (rank < tokens % ranks) for tokens in stretches) for rank in range(ranks))
    return Shards(group, dist.get_rank(group), pieces)


def _reordered(x: torch.Tensor, pieces: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    """Rows of x, which come in groups of pieces of so many rows, with the first piece of every group first."""
    if len(pieces[0]) == 1 or len(pieces) == 1:
        return x
    flat = [size for group in pieces for size in group]
    starts = [0, *accumulate(flat)]
    each = len(pieces[0])
    return torch.cat(
        [x.narrow(0, starts[place], flat[place]) for first in range(each) for place in range(first, len(flat), each)]
    )
