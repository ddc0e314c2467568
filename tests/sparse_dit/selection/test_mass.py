"""The mass selection: AdaSpa's search, its budgets, and what it keeps."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from sparse_dit.kernels.lists import lists_to_mask
from sparse_dit.kernels.mass import block_mass
from sparse_dit.layout import TokenLayout
from sparse_dit.orders import Hilbert, Tiles
from sparse_dit.selection import Call, Mass, Pooled

LAYOUT = TokenLayout((3, 6, 10))  # 180 tokens: 11 blocks of 16 and a short one
CallFor = Callable[..., Call]


def searched(layout: TokenLayout, call: Call, heads: int = 4, gain: float = 4.0) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k, and their log-sum-exp in the call's slot."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, heads, layout.length, 64, generator=generator)
    q = gain * q
    call.slot["lse"] = (call.scale * q @ k.mT).logsumexp(dim=-1)
    return q, k


def test_the_first_search_asks_for_a_whole_call(call_for: CallFor) -> None:
    q, k = searched(LAYOUT, call_for(LAYOUT))
    assert Mass().choose(q, k, k, call_for(LAYOUT)) is None


@pytest.mark.parametrize("order", [None, Hilbert()])
@pytest.mark.parametrize("text", [0, 9])
def test_each_row_gets_the_blocks_of_the_largest_mass(
    order: Any, text: int, call_for: CallFor, exact_mass: Callable[..., torch.Tensor]
) -> None:
    layout = TokenLayout((3, 6, 10), text_after=text)
    call = call_for(layout, order=order, heads=4)
    q, k = searched(layout, call)
    chosen = Mass(density=0.25, adaptive=False).choose(q, k, k, call)
    assert chosen is not None
    mask = lists_to_mask(chosen.blocks, call.k_blocks)
    mass = exact_mass(q, k, call)
    assert mass.sum(dim=-1) == pytest.approx(torch.ones(mass.shape[:3]))
    forced = torch.zeros(1, 1, call.q_blocks, call.k_blocks, dtype=torch.bool) if call.forced is None else call.forced
    keep = call.k_blocks // 4
    assert torch.equal(mask.sum(dim=-1), (forced.sum(dim=-1) + keep).clamp(max=call.k_blocks).expand(mask.shape[:3]))
    free = mass.masked_fill(forced, torch.inf)
    worst = free.masked_fill(~mask, torch.inf).amin(dim=-1)
    assert (worst >= free.masked_fill(mask, -torch.inf).amax(dim=-1) - 1e-6).all()


def test_the_mass_under_its_own_lse_is_the_sum_of_dense_softmax(
    call_for: CallFor, exact_mass: Callable[..., torch.Tensor]
) -> None:
    call = call_for(LAYOUT, heads=4)
    q, k = searched(LAYOUT, call)
    mass = block_mass(q, k, call.slot["lse"], 16, 16, scale=call.scale)
    # A weight is the exponential of a difference of two numbers up to |score| < 64, each to 2^-24 of its size times
    # the sqrt(64) terms of a product: 8 * 64 * 2^-23.
    assert torch.allclose(mass.double(), exact_mass(q, k, call), rtol=8 * 64 * 2**-23, atol=1e-9)


def recalls(mass: torch.Tensor, keep: int) -> torch.Tensor:
    kept = mass.sort(dim=-1, descending=True).values[..., :keep].sum(dim=(-2, -1))
    return kept / mass.sum(dim=(-2, -1))


def test_head_adaptive_budgets_keep_the_mean(call_for: CallFor) -> None:
    call = call_for(LAYOUT, heads=5)
    generator = torch.Generator().manual_seed(0)
    # From head to head flatter: only the first ones are above a recall of 0.8.
    heat = torch.tensor([9.0, 8.0, 2.0, 1.0, 0.1])[:, None, None]
    mass = (heat * torch.rand(1, 5, call.q_blocks, call.k_blocks, generator=generator)).softmax(dim=-1)
    recall = recalls(mass, 4)[0]
    assert (recall[:2] > 0.8).all()
    assert (recall[2:] < 0.8).all()
    selection = Mass(density=0.34)  # floor(0.34 * 12) = 4 blocks a row
    budgets = selection.budgets(mass, call)[0, :, 0]
    assert budgets.tolist() == [2, 2, 4, 6, 6]
    assert float(budgets.double().mean()) == 4.0
    assert replace(selection, rich_above=1.0).budgets(mass, call).flatten().tolist() == [4] * 5
    # More rich heads than half: as many poor ones must pay, so at most half of the heads count.
    assert replace(selection, rich_above=0.0).budgets(mass, call).flatten().tolist() == [2, 2, 4, 6, 6]


@pytest.mark.parametrize(("density", "budgets"), [(1.0, {12}), (0.99, {10, 12}), (0.01, {1}), (0.25, {1, 5})])
def test_budgets_stay_between_one_block_and_all(density: float, budgets: set[int], call_for: CallFor) -> None:
    call = call_for(LAYOUT, heads=4)
    mass = torch.rand(1, 4, 12, 12, generator=torch.Generator().manual_seed(0))
    found = Mass(density=density, rich_above=0.0).budgets(mass, call)
    assert set(found.flatten().tolist()) == budgets
    mean = float(found.double().mean())
    assert mean == max(1, int(density * 12))


def test_what_was_chosen_is_kept_as_bits_and_recalled(call_for: CallFor) -> None:
    call = call_for(LAYOUT, order=Tiles((1, 4, 4)), heads=4)
    q, k = searched(LAYOUT, call)
    selection = Mass()
    chosen = selection.choose(q, k, k, call)
    assert chosen is not None
    selection.keep(chosen, call)
    assert call.slot["blocks"].dtype is torch.uint8
    recalled = selection.recall(call)
    assert recalled.table is chosen.table
    assert torch.equal(lists_to_mask(recalled.blocks, 12), lists_to_mask(chosen.blocks, 12))
    kept = sum(tensor.nbytes for tensor in call.slot.values())
    assert kept == selection.kept_bytes(LAYOUT, 16, 16, batch=1, heads=4, keeps=True) == 4 * (12 * 2 + 180 * 4)


@pytest.mark.parametrize("pattern", ["local", "periodic", "stripes", "clustered"])
def test_no_other_choice_of_as_many_blocks_a_row_keeps_more(
    pattern: str, call_for: CallFor, kept_mass: Callable[..., Any], plant: Callable[..., Any]
) -> None:
    layout = TokenLayout((6, 8, 8))
    q, k = plant(pattern, layout)
    call = call_for(layout)
    call.slot["lse"] = (call.scale * q @ k.mT).logsumexp(dim=-1)
    chosen = Mass(density=0.25, adaptive=False).choose(q, k, k, call)
    assert chosen is not None
    kept, random = kept_mass(q, k, chosen, call)
    pooled, _ = kept_mass(q, k, Pooled(density=0.25).choose(q, k, k, call), call)
    assert kept > 1.5 * random
    assert kept >= pooled - 1e-6


@pytest.mark.parametrize("settings", [{"density": 0.0}, {"density": 1.1}, {"rich_above": 1.5}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    [(name, value)] = settings.items()
    with pytest.raises(ValueError, match=rf"^selection\.{name}: {value}; valid: "):
        Mass(**settings)
