"""Searches recover what was planted, costs are read as they were measured."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sparse_dit.calibration import Costs, Paro, Seen, SparseVDiT, Windows
from sparse_dit.calibration.paro import best_axes, largest_blocks
from sparse_dit.calibration.sparse_vdit import budgeted_choice, published_choice
from sparse_dit.calibration.windows import largest_windows
from sparse_dit.kernels.gather import gather_tokens
from sparse_dit.layout import TokenLayout
from sparse_dit.orders import Axes, TimeMajor
from sparse_dit.orders.axes import FLATTENINGS

CUBE = TokenLayout((8, 8, 8))


class Means:
    """Findings of a single call, for every layer and bin."""

    def __init__(self, found: dict[str, torch.Tensor]) -> None:
        self.found = found

    def mean(self, name: str, layer: int, number: int | None = None) -> torch.Tensor:
        return self.found[name].float()


def seen_of(q: torch.Tensor, k: torch.Tensor, layout: TokenLayout, block: int = 16) -> Seen:
    v = torch.randn(q.shape, generator=torch.Generator().manual_seed(9))
    scores = q @ k.mT / 8
    return Seen(q, k, v, scores.softmax(-1) @ v, scores.logsumexp(-1), layout, 0, block, block, 0.125)


def banded(layout: TokenLayout, tables: list[torch.Tensor | None], reach: float = 3.0) -> tuple[torch.Tensor, ...]:
    """q and k [1, heads, S, 64] of heads that see what is near along an order each, the farther the larger `reach`."""
    waves = torch.randn(32, generator=torch.Generator().manual_seed(0)) / reach
    heads = []
    for table in tables:
        place = torch.arange(layout.length)
        if table is not None:
            place = torch.empty_like(place).scatter_(0, table[0], place)
        phase = place[:, None] * waves
        heads.append(torch.cat([phase.cos(), phase.sin()], dim=1) / 32**0.5)
    code = torch.stack(heads)[None]
    return 40 * code, 10 * code


def test_paro_finds_the_planted_flattening_of_each_head() -> None:
    # Reaching beyond a tenth of the tokens: what is thinner than the share of a block that is not nothing is sparse in
    # every order, and the more so the more it is strewn.
    seen = seen_of(*banded(CUBE, [Axes(axes).table(CUBE, 1) for axes in FLATTENINGS], reach=40.0), CUBE)
    for alpha in (1.0, 0.5):
        search = Paro(alpha=alpha, query_blocks=32)
        axes = search.between(Means(search.look(seen, 0, None)), 1)
        assert axes[0].tolist() == list(range(6))


def test_the_score_as_printed_would_choose_otherwise() -> None:
    sparse, uneven = torch.tensor([[0.9, 0.1]]), torch.tensor([[20.0, 25.0]])
    assert best_axes(sparse, uneven, 0.5).tolist() == [0]
    printed = 0.5 * sparse / sparse.sum() + 0.5 * uneven / uneven.sum()
    assert printed.argmin(dim=1).tolist() == [1]


@pytest.mark.parametrize("layout", [TokenLayout((3, 5, 7)), TokenLayout((3, 5, 7), 4, 9)])
@pytest.mark.parametrize("axes", ["thw", "wht"])
def test_block_scores_are_those_of_the_whole_map(layout: TokenLayout, axes: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 3, layout.length, 64, generator=generator)
    seen = seen_of(3 * q, k, layout)
    table = Axes(axes).table(layout, 1)
    search = Paro(below=5e-4, share=0.6, query_blocks=99)
    sparse, uneven = search.block_scores(seen, table)
    weights = (3 * q.double() @ k.double().mT / 8).softmax(-1)
    if table is not None:
        weights = weights[:, :, table[0]][..., table[0]]
    first = layout.text_before
    weights = weights[:, :, first : first + 105, first : first + 105]
    blocks = [part.split(16, dim=-1) for part in weights.split(16, dim=-2)]
    flat = [part.flatten(2) for row in blocks for part in row]
    expected = torch.stack([((part < 5e-4).double().mean(-1) >= 0.6).double() for part in flat]).mean(dim=(0, 1))
    psi = torch.stack([part.amax(-1) / part.mean(-1) for part in flat]).mean(dim=(0, 1))
    assert sparse.tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    assert uneven.tolist() == pytest.approx(psi.tolist(), rel=1e-4)
    assert 0.0 < float(sparse.mean()) < 1.0


def test_paro_keeps_the_blocks_of_largest_mass_in_its_order() -> None:
    seen = seen_of(*banded(CUBE, [Axes("hwt").table(CUBE, 1), None]), CUBE)
    search = Paro(density=0.125)
    before = torch.tensor([[FLATTENINGS.index("hwt"), 0]])
    found = search.look(seen, 1, before)["mass"].float()
    assert torch.allclose(found.sum(-1), torch.ones(2, 32), atol=1e-2)
    # In its order a band: nearly everything within a block of the diagonal.
    near = (torch.arange(32)[:, None] - torch.arange(32)).abs() <= 1
    assert float((found * near).sum() / found.sum()) > 0.9
    profile = search.settle(Means({"mass": found}), before, CUBE, (16, 16), 1, 2)
    assert profile.masks is not None
    assert profile.masks.shape == (2, 1, 2, 32, 4)
    mask = largest_blocks(found, 0.125, (16, 16))
    assert mask.sum(dim=(1, 2)).tolist() == [4 * 32, 4 * 32]
    assert float(found[mask].min()) >= float(found[~mask].max())


def planted_modes(plant: Callable[..., Any], layout: TokenLayout) -> Seen:
    """Heads that look along the rows, along time, at stripes, and at everything evenly."""
    q, k = banded(layout, [None, TimeMajor().table(layout, 1)])
    striped = plant("stripes", layout, heads=1, gain=20.0)
    even = torch.zeros_like(striped[0])
    return seen_of(torch.cat([q, striped[0], even], 1), torch.cat([k, striped[1], even], 1), layout)


def test_sparse_vdit_finds_the_planted_modes(plant: Callable[..., Any]) -> None:
    layout = TokenLayout((4, 8, 16))
    seen = planted_modes(plant, layout)
    search = SparseVDiT(densities=(0.25,), limit=0.3)
    found = search.look(seen, 0, None)
    settled = search.settle(Means(found), None, layout, (16, 16), 1, 1)
    kinds = [settled.patterns[place].kind for place in settled.pattern[0, 0].tolist()]
    # Heads that see everything evenly lose a large share of their output with any pattern.
    assert kinds == ["diagonal", "multi_diagonal", "stripe", "all"]
    assert settled.stripes is not None
    assert int(settled.stripes[0, 0, 2].count_nonzero()) > 0
    assert int(settled.stripes[0, 0, :2].count_nonzero()) == 0


def test_a_budget_goes_where_it_saves_most_error(plant: Callable[..., Any]) -> None:
    errors = torch.rand(3, 5, 4, 6, generator=torch.Generator().manual_seed(0)).sort(dim=-1).values
    densities = torch.tensor([1.0, 0.6, 0.4, 0.25, 0.1, 0.0])
    last = torch.inf
    for budget in (0.1, 0.3, 0.7, 1.0):
        choice = budgeted_choice(errors, densities, densities, budget)
        spent = float(densities[choice].mean())
        assert budget - 0.05 <= spent <= budget + 1e-6
        error = float(errors.gather(-1, choice[..., None]).mean())
        assert error < last
        last = error
        uniform = errors[..., int((densities - budget).abs().argmin())].mean()
        assert error <= float(uniform) + 0.02
    assert (choice == 0).all()


def test_the_published_rule_keeps_all_where_nothing_is_within_the_limit() -> None:
    errors = torch.tensor([[0.0, 1.0, 0.2, 0.3], [0.0, 1.0, 0.9, 0.8]])
    costs = torch.tensor([1.0, 0.0, 0.5, 0.25])
    assert published_choice(errors, costs, 0.5, 0.6).tolist() == [3, 0]
    assert published_choice(errors, costs, 0.5, 2.0).tolist() == [3, 3]


def test_measured_costs_change_the_choice() -> None:
    row = {"kind": "kernel", "what": "attention", "kernel": "triton", "precision": "native", "lists": "equal"}
    times = [(1.0, 10.0, False), (0.5, 5.0, False), (0.25, 2.5, False), (0.25, 4.5, True)]
    rows = [
        {**row, "codes": False, "ordered": ordered, "density": density, "ms": ms, "dense_ms": 10.0,
         "shape": {"tokens": 1000}} for density, ms, ordered in times
    ]  # fmt: skip
    rows += [{**row, "codes": False, "ordered": False, "density": 0.5, "ms": 1.0, "dense_ms": 1.0,
              "shape": {"tokens": 9000}}]  # fmt: skip
    costs = Costs.measured(rows, 1200)
    assert costs.of(0.25, ordered=False) == pytest.approx(0.25)
    assert costs.of(0.375, ordered=False) == pytest.approx(0.375)
    assert costs.of(0.1, ordered=False) == pytest.approx(0.1)
    assert costs.of(0.375, ordered=True) == pytest.approx(0.375 + 0.2)
    assert costs.of(0.0, ordered=True) == 0.0
    assert "1000 tokens" in costs.source
    assert Costs().of(0.3, ordered=True) == 0.3
    errors = torch.tensor([[0.0, 1.0, 0.30, 0.25]])
    area = torch.tensor([1.0, 0.0, 0.25, 0.25])
    assert published_choice(errors, area, 1.0, 1.0).tolist() == [3]
    measured = torch.tensor([costs.of(d, ordered=o) for d, o in ((1, False), (0, False), (0.25, False), (0.25, True))])
    assert published_choice(errors, measured, 1.0, 1.0).tolist() == [2]
    with pytest.raises(ValueError, match=r"^costs: no milliseconds of attention in int8 precision; valid: "):
        Costs.measured(rows, 1000, "int8")


def test_windows_are_the_largest_within_a_density_and_the_published_ones() -> None:
    assert set(largest_windows((3, 2, 2), 0.25)) == {(3, 1, 1), (1, 2, 1), (1, 1, 2)}
    assert largest_windows((9, 9, 9), 1e-4) == ((1, 1, 1),)
    wan = Windows().patterns(TokenLayout((18, 48, 80)))
    assert [pattern.size for pattern in wan][:2] == [(3, 1, 10), (1, 5, 7)]


def test_each_head_gets_the_window_that_was_planted() -> None:
    layout = TokenLayout((4, 8, 16))
    place = torch.stack(torch.unravel_index(torch.arange(512), layout.grid), dim=1).float()
    waves = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    heads = []
    # Near in time and rows but anywhere along a row; near in rows and along them but at any time.
    for width in ([0.5, 2.0, 1e6], [1e6, 2.0, 2.0]):
        phase = place / torch.tensor(width) @ waves
        heads.append(torch.cat([phase.cos(), phase.sin()], dim=1) / 32**0.5)
    code = 12 * torch.stack(heads)[None]
    search = Windows(density=0.25, tile=(1, 4, 4))
    seen = seen_of(code, code, layout)
    settled = search.settle(Means(search.look(seen, 0, None)), None, layout, (16, 16), 1, 1)
    sizes = [settled.patterns[place].size for place in settled.pattern[0, 0].tolist()]
    assert sizes[0] is not None
    assert sizes[1] is not None
    assert sizes[0][2] == 4
    assert sizes[1][0] == 4


def test_an_error_is_that_of_the_output() -> None:
    layout = TokenLayout((2, 4, 8))
    q, k = torch.randn(2, 1, 2, 64, 64, generator=torch.Generator().manual_seed(0))
    seen = seen_of(q, k, layout)
    search = SparseVDiT(densities=(0.5,))
    errors = search.look(seen, 0, None)["error"]
    names = [pattern.kind for pattern in search.patterns(layout, 16, 16)]
    assert names == ["all", "skip", "diagonal", "multi_diagonal", "stripe"]
    assert errors[:, 0].tolist() == [0.0, 0.0]
    assert errors[:, 1].tolist() == [1.0, 1.0]
    table = TimeMajor().table(layout, 1)
    width = search.patterns(layout, 16, 16)[3].width
    qo, ko, vo = (gather_tokens(x, table) for x in (q, k, seen.v))
    first = torch.arange(64) // 16 * 16
    gap = torch.maximum(first - (first[:, None] + 15), first[:, None] - (first + 15))
    out = F.scaled_dot_product_attention(qo, ko, vo, attn_mask=gap <= width, scale=0.125)
    whole = gather_tokens(seen.out, table)
    expected = (out - whole).square().sum(dim=(0, 2, 3)) / whole.square().sum(dim=(0, 2, 3))
    assert errors[:, 3].tolist() == pytest.approx(expected.tolist(), rel=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Paro(density=0.0), "density"),
        (lambda: Paro(alpha=1.5), "alpha"),
        (lambda: Paro(below=0.0), "below"),
        (lambda: SparseVDiT(densities=(2.0,)), "densities"),
        (lambda: SparseVDiT(weight=-1.0), "weight"),
        (lambda: Windows(tile=(0, 1, 1)), "tile"),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{message}: .*; valid: "):
        make()


def test_bins_are_those_of_the_sources() -> None:
    assert Paro().bins(10) == (0, 1, 2, 3, 4, 5)
    assert SparseVDiT().bins(3) == Windows().bins(3) == (0, 1, 2)
    assert {field.name for field in dataclasses.fields(Paro)} > Paro.settling
