"""Calls, planted attention patterns, and how much of the softmax a choice of blocks keeps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparse_dit.kernels.gather import gather_tokens
from sparse_dit.kernels.lists import lists_to_mask
from sparse_dit.layout import TokenLayout, text_blocks
from sparse_dit.orders import Order, Rows
from sparse_dit.selection import Call, Chosen, Dynamic

Plant = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture
def call_for() -> Callable[..., Call]:
    """Makes the call of a selection, or with an order, over a layout."""

    def make(
        layout: TokenLayout,
        block_q: int = 16,
        block_k: int = 16,
        *,
        order: Order | None = None,
        selection: Dynamic | None = None,
        heads: int = 2,
        layer: int = 0,
        **given: Any,
    ) -> Call:
        own = None if selection is None else selection.orders(layout, layer)
        orders = own or (order or Rows(),)
        rows, columns = text_blocks(layout, block_q, block_k)
        forced = (rows[:, None] | columns)[None, None] if rows.any() else None
        return Call(
            **{
                "layout": layout,
                "orders": orders,
                "tables": tuple(order.table(layout, heads) for order in orders),
                "block_q": block_q,
                "block_k": block_k,
                "scale": 64**-0.5,
                "layer": layer,
                "step": 0,
                "slot": {},
                "forced": forced,
                **given,
            }
        )

    return make


@pytest.fixture
def exact_mass() -> Callable[..., torch.Tensor]:
    """Sums of dense attention over blocks, mean over the queries of a block, float64 [B, H, QB, KB]."""

    def mass(q: torch.Tensor, k: torch.Tensor, call: Call, table: torch.Tensor | None = None) -> torch.Tensor:
        table = call.table if table is None else table
        if table is not None:
            q, k = gather_tokens(q, table), gather_tokens(k, table)
        weights = (call.scale * q.double() @ k.double().mT).softmax(dim=-1)
        columns = torch.stack([part.sum(dim=-1) for part in weights.split(call.block_k, dim=-1)], dim=-1)
        return torch.stack([part.mean(dim=-2) for part in columns.split(call.block_q, dim=-2)], dim=-2)

    return mass


@pytest.fixture
def kept_mass(exact_mass: Callable[..., torch.Tensor]) -> Callable[..., tuple[float, float]]:
    """The share of dense attention that a choice keeps, and what as many random blocks a row would keep."""

    def kept(q: torch.Tensor, k: torch.Tensor, chosen: Chosen, call: Call) -> tuple[float, float]:
        mass = exact_mass(q, k, call, chosen.table)
        mask = lists_to_mask(chosen.blocks, call.k_blocks).expand(mass.shape)
        generator = torch.Generator().manual_seed(0)
        random = torch.rand(mass.shape, generator=generator).argsort(dim=-1) < mask.sum(dim=-1, keepdim=True)
        rows = mass.sum(dim=(-2, -1))
        return tuple(float(((mass * part).sum(dim=(-2, -1)) / rows).mean()) for part in (mask, random))  # type: ignore[return-value]

    return kept


@pytest.fixture
def plant() -> Plant:
    """q, k [1, heads, S, 64] whose attention has a known pattern over a grid without text.

    `local`: tokens see those near in space and time. `periodic`: tokens see their own pixel in all frames. `stripes`:
    all tokens see the same few runs of keys. `clustered`: tokens see those of their own region of the grid.
    """

    def make(pattern: str, layout: TokenLayout, heads: int = 2, gain: float = 12.0) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        noise = 0.1 * torch.randn(2, 1, heads, layout.length, 64, generator=generator)
        place = torch.stack(torch.unravel_index(torch.arange(layout.length), layout.grid), dim=1).float()
        if pattern == "stripes":
            stripe = (torch.arange(layout.length) // 16) % 5 == 2
            code = torch.zeros(layout.length, 64)
            code[:, 0] = 1.0
            return gain * code + noise[0], gain * code * stripe[:, None] + noise[1]
        if pattern == "clustered":
            region = (place / torch.tensor([2.0, 4.0, 4.0])).long() @ torch.tensor([100, 10, 1])
            labels = region.unique(return_inverse=True)[1]
            code = torch.nn.functional.normalize(torch.randn(int(labels.max()) + 1, 64, generator=generator), dim=-1)
            return gain * code[labels] + noise[0], gain * code[labels] + noise[1]
        width = torch.tensor([1e6, 1.5, 1.5] if pattern == "periodic" else [1.5, 1.5, 1.5])
        waves = torch.randn(3, 32, generator=generator)
        phase = (place / width) @ waves
        code = torch.cat([phase.cos(), phase.sin()], dim=1) / 32**0.5
        return gain * code + noise[0], gain * code + noise[1]

    return make
