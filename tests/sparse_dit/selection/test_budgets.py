"""Budgets of heads: by the gain of each further block, against trying all of them."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparse_dit.kernels.lists import top_k_lists
from sparse_dit.layout import TokenLayout
from sparse_dit.selection import Call, Pooled
from sparse_dit.selection.budgets import by_gain

LAYOUT = TokenLayout((3, 4, 15), text_after=9)  # 189 tokens: 12 blocks of 16, the last one ragged


def masses(*heats: float, rows: int = 12, blocks: int = 12) -> torch.Tensor:
    """From flat (heat near 0) to peaked heads, fp32 [1, H, rows, blocks]; rows sum to 1."""
    draw = torch.rand(1, len(heats), rows, blocks, generator=torch.Generator().manual_seed(0))
    return (torch.tensor(heats)[:, None, None] * draw).softmax(dim=-1)


def kept(mass: torch.Tensor, budgets: tuple[int, ...]) -> float:
    ordered = mass.sort(dim=-1, descending=True).values
    return float(sum(ordered[0, head, :, :budget].sum() for head, budget in enumerate(budgets)))


def test_no_other_budgets_of_the_same_sum_keep_more() -> None:
    mass = masses(12.0, 4.0, 0.5)
    budgets = tuple(by_gain(mass.log(), 3)[0, :, 0].tolist())
    assert sum(budgets) == 9
    assert budgets[0] < budgets[2]
    every = (split for split in itertools.product(range(1, 13), repeat=3) if sum(split) == 9)
    assert kept(mass, budgets) == pytest.approx(max(kept(mass, split) for split in every), rel=1e-6)


def test_every_head_has_a_block_and_the_whole_budget_is_everything() -> None:
    mass = masses(50.0, 0.1, 0.1, 0.1)
    assert by_gain(mass.log(), 1).flatten().tolist() == [1, 1, 1, 1]
    assert by_gain(mass.log(), 12).flatten().tolist() == [12] * 4
    assert by_gain(mass.log().expand(2, -1, -1, -1), 5).sum(dim=1).flatten().tolist() == [20, 20]


def test_forced_blocks_are_worth_nothing() -> None:
    mass = torch.full((1, 2, 4, 6), 0.01)
    mass[:, 0, :, :2] = 1.0  # all that the first head has is forced
    mass[:, 1, :, 2:5] = 0.1
    forced = torch.zeros(1, 1, 4, 6, dtype=torch.bool)
    forced[..., :2] = True
    assert by_gain(mass.log(), 2).flatten().tolist() == [2, 2]
    assert by_gain(mass.log(), 2, forced=forced).flatten().tolist() == [1, 3]


@pytest.mark.parametrize("spread", ["recall", "gain"])
def test_pooled_spreads_its_budget_and_keeps_the_mean(
    spread: str, call_for: Callable[..., Call], kept_mass: Callable[..., Any]
) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 4, LAYOUT.length, 64, generator=generator)
    heat = torch.tensor([0.2, 0.5, 4.0, 8.0])[:, None, None]
    blocks = torch.arange(LAYOUT.length) // 16
    q, k = (heat * (x[:, :, blocks] + 0.1 * x) for x in (q, k))  # tokens of a block are alike
    call = call_for(LAYOUT, heads=4)
    even, spreading = (Pooled(density=0.25, spread=each) for each in ("even", spread))
    found = spreading.choose(q, k, k, call).blocks
    assert call.forced is not None
    free = (~call.forced).sum(dim=-1)[0, 0]
    video = free > 0  # rows that are not text
    counts = found.counts[0, :, video] - (call.k_blocks - free[video])
    assert (counts == counts[:, :1]).all()
    assert float(counts.double().mean()) == 3
    assert counts[0, 0] > counts[-1, 0]
    before, _ = kept_mass(q, k, even.choose(q, k, k, call), call)
    after, _ = kept_mass(q, k, spreading.choose(q, k, k, call), call)
    assert after > before


def test_a_spread_needs_a_density_a_row() -> None:
    for settings in ({"top_p": 0.5}, {"tau": 1.0}, {"density": 0.5, "per": "head"}):
        with pytest.raises(ValueError, match=r"^selection.spread: 'gain'; valid: even, unless density per row"):
            Pooled(spread="gain", **settings)
    with pytest.raises(ValueError, match=r"^selection.spread: 'odd'; valid: even, recall, gain"):
        Pooled(spread="odd")


def test_lists_take_budgets_of_heads() -> None:
    mass = masses(9.0, 0.1)
    budgets = by_gain(mass.log(), 4)
    lists = top_k_lists(mass, budgets.repeat_interleave(12, dim=-1), block_q=16, block_k=16)
    assert torch.equal(lists.counts.long(), budgets.expand(-1, -1, 12))
