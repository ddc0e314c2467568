"""The pooled selection: scores, the three rules, and what is computed whatever they say."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_dit.kernels.gather import gather_tokens
from sparse_dit.kernels.lists import lists_to_mask
from sparse_dit.layout import TokenLayout
from sparse_dit.orders import Hilbert, Tiles
from sparse_dit.selection import Call, Dynamic, Gate, Pooled

LAYOUT = TokenLayout((3, 6, 10))  # 180 tokens: 11 blocks of 16 and a short one
TEXT = TokenLayout((3, 6, 10), text_before=3, text_after=20)
CallFor = Callable[..., Call]


def qk(layout: TokenLayout, heads: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 1, heads, layout.length, 64, generator=generator)
    return q, k, v


def means(x: torch.Tensor, block: int) -> torch.Tensor:
    return torch.stack([part.double().mean(dim=2) for part in x.split(block, dim=2)], dim=2)


def scores(q: torch.Tensor, k: torch.Tensor, call: Call) -> torch.Tensor:
    """Float64 [B, H, QB, KB]."""
    if call.table is not None:
        q, k = gather_tokens(q, call.table), gather_tokens(k, call.table)
    return call.scale * means(q, call.block_q) @ means(k, call.block_k).mT


def chosen_mask(selection: Pooled, call: Call, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return lists_to_mask(selection.choose(q, k, k, call).blocks, call.k_blocks)


@settings(deadline=None, max_examples=15)
@given(hundredths=st.integers(1, 100), block=st.sampled_from([16, 32]), ordered=st.booleans())
def test_top_k_takes_floor_of_the_share_of_the_best_blocks(hundredths: int, block: int, ordered: bool) -> None:
    q, k, _ = qk(LAYOUT)
    order = Tiles((1, 4, 4))
    table = order.table(LAYOUT, 2) if ordered else None
    call = Call(LAYOUT, (order,), (table,), 16, block, 0.125, 0, 0, {})
    mask = chosen_mask(Pooled(density=hundredths / 100), call, q, k)
    keep = max(1, hundredths * call.k_blocks // 100)
    assert (mask.sum(dim=-1) == keep).all()
    ideal = scores(q, k, call)
    worst = ideal.masked_fill(~mask, torch.inf).amin(dim=-1)
    best_left = ideal.masked_fill(mask, -torch.inf).amax(dim=-1)
    assert (worst >= best_left - 1e-5).all()


def test_the_budget_is_that_of_the_paper_for_shares_that_floats_cannot_hold() -> None:
    # 0.29 * 100 is 28.999999999999996 in floating point.
    assert Pooled(density=0.29).expected_density(TokenLayout((1, 40, 40)), 16, 16) == 0.29


@pytest.mark.parametrize("p", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("crossing", [False, True])
def test_top_p_takes_blocks_by_the_cumulative_rule(p: float, crossing: bool, call_for: CallFor) -> None:
    q, k, _ = qk(LAYOUT)
    q = 4 * q
    call = call_for(LAYOUT)
    mask = chosen_mask(Pooled(top_p=p, crossing=crossing), call, q, k)
    share = scores(q, k, call).softmax(dim=-1)
    for head in range(2):
        for row in range(call.q_blocks):
            ordered = share[0, head, row].sort(descending=True).values.tolist()
            total, count = 0.0, 0
            while count < len(ordered) and (total < p - 1e-6 if crossing else total + ordered[count] <= p + 1e-6):
                total, count = total + ordered[count], count + 1
            assert int(mask[0, head, row].sum()) == max(1, count)


def test_top_p_has_a_floor(call_for: CallFor) -> None:
    q, k, _ = qk(LAYOUT)
    mask = chosen_mask(Pooled(top_p=0.0, least=0.5), call_for(LAYOUT), q, k)
    assert (mask.sum(dim=-1) == 6).all()


@pytest.mark.parametrize("tau", [-0.5, 0.0, 1.0, 2.0])
def test_sols_cutoff_is_mean_plus_tau_deviations_of_the_row(tau: float, call_for: CallFor) -> None:
    q, k, _ = qk(LAYOUT)
    call = call_for(LAYOUT)
    ideal = scores(q, k, call)
    cutoff = ideal.mean(dim=-1, keepdim=True) + tau * ideal.std(dim=-1, correction=0, keepdim=True)
    expected = (ideal >= cutoff) | (ideal == ideal.amax(dim=-1, keepdim=True))
    clear = ((ideal - cutoff).abs() > 1e-5).all()
    assert clear
    assert torch.equal(chosen_mask(Pooled(tau=tau), call, q, k), expected)


def test_drafts_threshold_is_one_for_a_whole_head(call_for: CallFor) -> None:
    q, k, _ = qk(LAYOUT)
    q[:, 0, :32] *= 20  # two peaky rows of blocks
    call = call_for(LAYOUT)
    mask = chosen_mask(Pooled(density=0.25, per="head"), call, q, k)
    share = scores(q, k, call).softmax(dim=-1)
    best = share == share.amax(dim=-1, keepdim=True)
    for head in range(2):
        # Of g * g entries the paper keeps the best share; on top come rows that would have nothing.
        ranked = share[0, head].flatten().sort(descending=True).values
        threshold = ranked[3 * call.q_blocks - 1]
        assert torch.equal(mask[0, head], (share[0, head] >= threshold) | best[0, head])
    assert mask[0, 0].sum(dim=-1).unique().numel() > 1


def test_blocks_of_unlike_tokens_are_computed_whatever_their_mean(call_for: CallFor) -> None:
    layout = TokenLayout((2, 8, 8))
    generator = torch.Generator().manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(1, 2, 8, 1, 64, generator=generator), dim=-1)
    q, k = (direction.repeat_interleave(16, dim=3).flatten(2, 3) for _ in range(2))
    # Smooth-K: with both signs as often the mean over all tokens stays out of the way of the blocks' own directions.
    k = k * torch.where(torch.arange(8) % 2 == 0, 1.0, -1.0).repeat_interleave(16)[:, None]
    sign = torch.where(torch.arange(16) % 2 == 0, 1.0, -1.0)[:, None]
    k[:, :, 48:64] *= sign
    q[:, :, 16:32] *= sign
    call = call_for(layout)
    mask = chosen_mask(Pooled(density=0.125, similarity=0.3), call, q, k)
    assert mask[:, :, :, 3].all()
    assert mask[:, :, 1].all()
    rest = mask[:, :, [0, 2, 3, 4, 5, 6, 7]]
    assert (rest.sum(dim=-1) == 2).all()
    assert (chosen_mask(Pooled(density=0.125), call, q, k).sum(dim=-1) == 1).all()


@pytest.mark.parametrize("rule", [{"density": 0.3}, {"density": 0.3, "per": "head"}, {"top_p": 0.5}, {"tau": 0.5}])
def test_everything_is_computed_where_no_block_is_judged_by_its_mean(rule: Any, call_for: CallFor) -> None:
    q, k, _ = qk(LAYOUT)
    assert chosen_mask(Pooled(similarity=1.0, **rule), call_for(LAYOUT), q, k).all()


@pytest.mark.parametrize("reduction", ["max", "logsumexp"])
@pytest.mark.parametrize("ordered", [False, True])
def test_scores_of_sub_blocks(
    reduction: str, ordered: bool, call_for: CallFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparse_dit.kernels.scores.SCORES", 1)  # row by row
    q, k, _ = qk(LAYOUT)
    call = call_for(LAYOUT, 32, 16, order=Hilbert() if ordered else None)
    mask = chosen_mask(Pooled(density=0.25, sub_block=4, reduction=reduction), call, q, k)
    if call.table is not None:
        q, k = gather_tokens(q, call.table), gather_tokens(k, call.table)
    parts = call.scale * means(q, 4) @ means(k, 4).mT
    ideal = torch.empty(1, 2, call.q_blocks, call.k_blocks, dtype=torch.float64)
    for row, some in enumerate(parts.split(8, dim=2)):
        for column, block in enumerate(some.split(4, dim=3)):
            flat = block.flatten(2)
            ideal[:, :, row, column] = flat.amax(dim=-1) if reduction == "max" else flat.logsumexp(dim=-1)
    worst = ideal.masked_fill(~mask, torch.inf).amin(dim=-1)
    assert (worst >= ideal.masked_fill(mask, -torch.inf).amax(dim=-1) - 1e-5).all()


def test_sub_blocks_find_the_key_that_a_mean_hides(call_for: CallFor) -> None:
    layout = TokenLayout((1, 16, 16))
    q, k = torch.zeros(1, 1, 256, 64), torch.zeros(1, 1, 256, 64)
    q[..., 0] = 1.0
    k[:, :, 7 * 16 : 8 * 16, 0] = -0.5
    k[:, :, 7 * 16 + 5, 0] = 6.0  # one strong key among weak ones: the mean of its block is below that of all others
    call = call_for(layout, heads=1)
    assert not chosen_mask(Pooled(density=1 / 16), call, q, k)[..., 7].any()
    assert chosen_mask(Pooled(density=1 / 16, sub_block=1), call, q, k)[..., 7].all()


def test_text_the_sink_and_adjacent_blocks_are_computed(call_for: CallFor) -> None:
    q, k, _ = qk(TEXT)
    call = call_for(TEXT)
    assert call.forced is not None
    plain = chosen_mask(Pooled(density=0.1), call, q, k)
    assert plain[call.forced.expand(plain.shape)].all()
    assert not plain.all()
    # Text comes on top of the budget.
    assert (plain.sum(dim=-1) == (call.forced.sum(dim=-1) + 1).clamp(max=call.k_blocks)).all()
    no_text = call_for(LAYOUT)
    q, k, _ = qk(LAYOUT)
    assert chosen_mask(Pooled(density=0.1, sink=True), no_text, q, k)[..., 0].all()


@pytest.mark.parametrize("order", [None, Tiles((1, 4, 4)), Hilbert()])
def test_adjacent_blocks_hold_the_neighbours_of_every_token(order: Any, call_for: CallFor) -> None:
    layout = TokenLayout((3, 5, 7), text_before=2)
    q, k, _ = qk(layout)
    call = call_for(layout, 16, 32, order=order)
    mask = chosen_mask(Pooled(density=0.01, adjacent=True), call, q, k)
    place = torch.arange(layout.length) if call.table is None else call.table[0].argsort()
    for token in range(layout.video_tokens):
        t, h, w = (int(x) for x in torch.unravel_index(torch.tensor(token), layout.grid))
        for dt, dh, dw in ((0, 0, 0), (1, 0, 0), (0, 1, 1), (-1, -1, 1)):
            near = (t + dt, h + dh, w + dw)
            if all(0 <= x < side for x, side in zip(near, layout.grid, strict=True)):
                other = (near[0] * 5 + near[1]) * 7 + near[2]
                assert mask[0, 0, place[token + 2] // 16, place[other + 2] // 32]


@pytest.mark.parametrize(
    ("pattern", "order"),
    [("local", Tiles((1, 4, 4))), ("local", Hilbert()), ("stripes", None), ("clustered", Tiles((2, 4, 4)))],
)
def test_planted_patterns_are_kept_better_than_by_chance(
    pattern: str, order: Any, call_for: CallFor, kept_mass: Callable[..., Any], plant: Callable[..., Any]
) -> None:
    layout = TokenLayout((6, 8, 8))
    q, k = plant(pattern, layout)
    call = call_for(layout, order=order)
    chosen = Pooled(density=0.25).choose(q, k, k, call)
    kept, random = kept_mass(q, k, chosen, call)
    assert kept > 2 * random


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 0.5, "tau": 1.0}, "selection: density and tau exclude each other; valid: one of them"),
        ({"density": 0.0}, "selection.density: 0.0; valid: a number in (0, 1]"),
        ({"top_p": 1.5}, "selection.top_p: 1.5; valid: a number in [0, 1]"),
        ({"tau": math.nan}, "selection.tau: nan; valid: a finite number"),
        ({"per": "layer"}, "selection.per: 'layer'; valid: row, head"),
        ({"top_p": 0.5, "per": "head"}, "selection.per: 'head'; valid: row, unless density is the rule"),
        ({"least": 0.5}, "selection.least: 0.5; valid: 0, unless top_p is the rule"),
        ({"crossing": False}, "selection.crossing: False; valid: true, unless top_p is the rule"),
        ({"reduction": "logsumexp"}, "selection.reduction: 'logsumexp'; valid: max, unless sub_block is given"),
        ({"similarity": 2.0}, "selection.similarity: 2.0; valid: a number in [0, 1]"),
        ({"reduction": "mean"}, "selection.reduction: 'mean'; valid: max, logsumexp"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^selection") as caught:
        Pooled(**settings)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "selection",
    [Pooled(), Pooled(per="head"), Pooled(sub_block=4, reduction="logsumexp"), Pooled(top_p=0.5), Gate()],
    ids=str,
)
def test_what_choosing_brings_into_the_order_is_in_it_and_changes_no_choice(
    selection: Dynamic, call_for: CallFor
) -> None:
    q, k, v = qk(LAYOUT)
    call = call_for(LAYOUT, order=Tiles((1, 4, 4)), selection=selection)
    apart, brought = selection.choose(q, k, v, call), selection.choose(q, k, v, replace(call, brings=True))
    assert apart is not None
    assert brought is not None
    assert torch.equal(lists_to_mask(apart.blocks, call.k_blocks), lists_to_mask(brought.blocks, call.k_blocks))
    assert apart.ordered is None
    assert brought.ordered is not None
    for found, x in zip(brought.ordered, (q, k, v), strict=True):
        assert torch.equal(found, gather_tokens(x, call.table))


def test_nothing_is_brought_where_tokens_stay_or_similarity_is_judged(call_for: CallFor) -> None:
    q, k, v = qk(LAYOUT)
    for selection, order in ((Pooled(), None), (Pooled(similarity=0.5), Tiles((1, 4, 4)))):
        call = call_for(LAYOUT, order=order, brings=True)
        assert selection.choose(q, k, v, call).ordered is None
