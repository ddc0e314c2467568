"""Head types: SVG's online profile, and the order that each head gets by it."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from sparse_dit.kernels.lists import lists_to_mask
from sparse_dit.kernels.rows import seen_keys
from sparse_dit.layout import TokenLayout
from sparse_dit.orders import TimeMajor
from sparse_dit.selection import Band, Call, HeadTypes
from sparse_dit.selection.band import profile_units

CallFor = Callable[..., Call]
LAYOUT = TokenLayout((8, 12, 16))  # 192 tokens a frame: profiling masks of one unit of 128 to either side
TYPES = HeadTypes(kept=0.2, profile_frames=1.0, sink_frames=0, rounding="down")


def mixed(plant: Callable[..., Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Heads 0 and 2 look at their own frame's neighbourhood, heads 1 and 3 at their own pixel in all frames."""
    local, periodic = (plant(pattern, LAYOUT, heads=4) for pattern in ("local", "periodic"))
    temporal = torch.tensor([False, True, False, True])[:, None, None]
    q, k = (torch.where(temporal, p, s) for s, p in zip(local, periodic, strict=True))
    return q, k, torch.randn(1, 4, LAYOUT.length, 64, generator=torch.Generator().manual_seed(1))


def test_types_are_those_of_the_exact_profile_of_all_rows(call_for: CallFor, plant: Callable[..., Any]) -> None:
    q, k, v = mixed(plant)
    call = call_for(LAYOUT, selection=TYPES, heads=4)
    table = TimeMajor().table(LAYOUT, 4)
    assert table is not None
    own, keys, reach = profile_units(LAYOUT, table[0], frames=1.0, sink_frames=0)
    seen = seen_keys(own, keys, reach)
    scores = call.scale * q.double() @ k.double().mT
    whole = scores.softmax(dim=-1) @ v.double()
    exact = [
        (scores.masked_fill(~mask, -torch.inf).softmax(dim=-1) @ v.double() - whole).square().sum(dim=(0, 2, 3))
        for mask in seen
    ]
    assert (exact[1] < exact[0]).tolist() == [False, True, False, True]
    spatial, temporal = TYPES.errors(q, k, v, call).sum(dim=(1, 3))
    assert ((temporal < spatial) == (exact[1] < exact[0])).all()
    every_row = replace(TYPES, rows=4 * LAYOUT.length).errors(q, k, v, call).sum(dim=(1, 3))
    for sampled, full in zip(every_row, exact, strict=True):
        # Four draws a row with replacement: the estimate of a mean over 1,536 rows is within a tenth.
        assert sampled.double() / 4 == pytest.approx(full, rel=0.1)


def test_each_head_gets_the_band_in_its_own_order(call_for: CallFor, plant: Callable[..., Any]) -> None:
    q, k, v = mixed(plant)
    call = call_for(LAYOUT, selection=TYPES, heads=4)
    chosen = TYPES.choose(q, k, v, call)
    table = TimeMajor().table(LAYOUT, 4)
    assert chosen.table is not None
    assert table is not None
    rows = torch.arange(LAYOUT.length)
    assert torch.equal(chosen.table, torch.stack([rows, table[0], rows, table[0]]))
    band = Band(kept=0.2, sink_frames=0, rounding="down")
    assert torch.equal(lists_to_mask(chosen.blocks, call.k_blocks)[0], band.select(LAYOUT, 16, 16))
    assert chosen.blocks.density(LAYOUT.length, LAYOUT.length) == TYPES.expected_density(LAYOUT, 16, 16)
    assert chosen.measured(LAYOUT.length) == TYPES.expected_density(LAYOUT, 16, 16)


def test_the_right_order_keeps_more_than_the_wrong_one_and_than_chance(
    call_for: CallFor, plant: Callable[..., Any], kept_mass: Callable[..., Any]
) -> None:
    q, k, v = mixed(plant)
    call = call_for(LAYOUT, selection=TYPES, heads=4)
    kept, random = kept_mass(q, k, TYPES.choose(q, k, v, call), call)
    assert kept > 1.5 * random
    wrong = TYPES.choose(q.flip(1), k.flip(1), v, call)
    assert kept > 1.2 * kept_mass(q, k, wrong, call)[0]


def test_types_are_kept_and_recalled(call_for: CallFor, plant: Callable[..., Any]) -> None:
    q, k, v = mixed(plant)
    call = call_for(LAYOUT, selection=TYPES, heads=4)
    chosen = TYPES.choose(q, k, v, call)
    TYPES.keep(chosen, call)
    assert call.slot["temporal"].tolist() == [False, True, False, True]
    assert call.slot["temporal"].nbytes == TYPES.kept_bytes(LAYOUT, 16, 16, batch=3, heads=4, keeps=True)
    recalled = TYPES.recall(call)
    assert recalled.blocks is chosen.blocks
    assert chosen.table is not None
    assert recalled.table is not None
    assert torch.equal(recalled.table, chosen.table)


def test_rows_are_drawn_alike_in_every_run_and_unlike_in_every_step(
    call_for: CallFor, plant: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparse_dit.kernels.rows.SCORES", 1)  # head by head
    q, k, v = mixed(plant)
    first, again, later = (TYPES.errors(q, k, v, call_for(LAYOUT, selection=TYPES, step=s)) for s in (3, 3, 4))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], later[0])


@pytest.mark.parametrize(
    "settings", [{"rows": 0}, {"row_limit": 0}, {"profile_frames": 0.0}, {"profile_frames": math.inf}, {"kept": 0.0}]
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    [name] = settings
    with pytest.raises(ValueError, match=rf"^selection\.{name}: .*; valid: "):
        HeadTypes(**settings)
