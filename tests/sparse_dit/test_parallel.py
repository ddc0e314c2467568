"""Tokens and heads change places between two processes, and come back.

Run as a program this file is one of the two: it writes what it found.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sparse_dit.parallel import Heads, shards_of

PROCESSES = 2


def exchanges() -> dict[str, bool]:
    """Pieces of unequal length, text and video by themselves, and what all of them together are."""
    rank, stretches = dist.get_rank(), (5, 33, 2)
    shards = shards_of(dist.group.WORLD, stretches)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, sum(stretches), 4, 6).unbind()
    mask = torch.rand(2, sum(stretches)) < 0.5

    def here(x: torch.Tensor, axis: int = 1) -> torch.Tensor:
        return torch.cat([part.tensor_split(PROCESSES, axis)[rank] for part in x.split(stretches, axis)], axis)

    gathered = shards.gather(*(here(x) for x in (q, k, v)))
    own = slice(2 * rank, 2 * rank + 2)
    heads = Heads(shards.name)
    return {
        "pieces": shards.pieces == ((3, 17, 1), (2, 16, 1)),
        "gather": all(torch.equal(x, y[:, :, own]) for x, y in zip(gathered, (q, k, v), strict=True)),
        "scatter": torch.equal(shards.scatter(gathered[1]), here(k)),
        "mask": torch.equal(shards.gather_mask(here(mask)), mask),
        "whole mask": torch.equal(shards.gather_mask(mask), mask),
        "heads": torch.equal(heads.gather(q[:, :, own], 2), q) and torch.equal(heads.own(q, 2, 2), q[:, :, own]),
        "one for all": torch.equal(heads.own(q[:, :, :1], 2, 2), q[:, :, :1]),
    }


def alone() -> dict[str, bool]:
    """A group within the processes that are there, here of one: its ranks and numbers count, not those of all."""
    own = [dist.new_group([rank]) for rank in range(PROCESSES)][dist.get_rank()]
    shards = shards_of(own, (5, 33))
    q = torch.randn(2, 38, 4, 6)
    heads = Heads(shards.name)
    return {
        "pieces": (shards.rank, shards.pieces) == (0, ((5, 33),)),
        "gather": all(torch.equal(x, q) for x in shards.gather(q, q, q)),
        "scatter": torch.equal(shards.scatter(q), q),
        "mask": torch.equal(shards.gather_mask(q[:, :, 0, 0] > 0), q[:, :, 0, 0] > 0),
        "heads": (heads.ranks, heads.span(4)) == (1, slice(0, 4)) and torch.equal(heads.gather(q, 2), q),
    }


def contiguous(exchange: Callable[..., Any]) -> Callable[..., Any]:
    """NCCL takes nothing else, Gloo does."""

    def checked(out: Any, x: torch.Tensor, *arguments: Any, **settings: Any) -> Any:
        assert x.is_contiguous()
        return exchange(out, x, *arguments, **settings)

    return checked


def main() -> None:
    """One of the processes: `RANK` tells which; the argument is a folder."""
    rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES)
    dist.all_gather, dist.all_to_all_single = map(contiguous, (dist.all_gather, dist.all_to_all_single))
    (folder / f"{rank}.json").write_text(json.dumps({"exchanges": exchanges(), "alone": alone()}))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(processes_find: Callable[[Path], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What each process found."""
    return processes_find(Path(__file__))


def test_exchanges_with_pieces_of_unequal_length(found: list[dict[str, Any]]) -> None:
    for told in found:
        assert all(told["exchanges"].values()), told["exchanges"]


def test_a_smaller_group_counts_its_own_processes(found: list[dict[str, Any]]) -> None:
    for told in found:
        assert all(told["alone"].values()), told["alone"]


if __name__ == "__main__":
    main()
