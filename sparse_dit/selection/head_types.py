"""Selection `head_types`: a band in the order of each head, spatial or temporal, found by sampled rows.

Source: Sparse VideoGen, SVG (arXiv 2502.01776); the band itself and the masks of the profile are in `band`.
"""

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from sparse_dit.kernels.blocks import BlockList
from sparse_dit.kernels.lists import mask_to_lists
from sparse_dit.kernels.rows import band_errors, closest_orders
from sparse_dit.layout import TokenLayout
from sparse_dit.orders import Order, Rows, TimeMajor
from sparse_dit.selection.band import Band, ProfileUnits, profile_units
from sparse_dit.selection.dynamic import Call, Chosen, Dynamic
from sparse_dit.selection.regions import mask_density


@dataclass(frozen=True)
class HeadTypes(Dynamic):
    """Each head computes the same band, in the model's order or in the time-major one.

    At a refresh some query rows are drawn, the same for all heads; a head is temporal when its output for them under
    the temporal profiling mask is closer to its whole output, by the mean squared error, than under the spatial one.

    What differs from SVG: the rows depend on layer and step only, so that a run repeats; and batch entries share their
    heads' types, by the sum of their errors, as one call has one order a head.

    Args:
        kept, width, density, sink_frames, rounding: of the band, as `Band`.
        rows: query rows that are drawn (SVG: 64, for CogVideoX 32).
        row_limit: they are drawn from the first so many (SVG: 10,000, which bounds the size of its masks).
        profile_frames: half-width of the profiling masks in frames, 2 for Wan and Cosmos, 1.5 for HunyuanVideo.

    Raises:
        ValueError: a value is out of its range.
    """

    EXCLUSIVE: ClassVar[tuple[str, str, str]] = Band.EXCLUSIVE

    kept: float = 0.25
    width: int | None = None
    density: float | None = None
    sink_frames: int = 1
    rounding: str = "up"
    rows: int = 64
    row_limit: int = 10_000
    profile_frames: float = 2.0

    def __post_init__(self) -> None:
        for name in ("rows", "row_limit"):
            if getattr(self, name) < 1:
                raise ValueError(f"selection.{name}: {getattr(self, name)!r}; valid: 1 or more rows")
        if not 0.0 < self.profile_frames < math.inf:
            raise ValueError(f"selection.profile_frames: {self.profile_frames!r}; valid: a finite number above 0")
        assert self.band  # refuses its settings

    @property
    def band(self) -> Band:
        """The band that every head computes in its order."""
        return Band(self.kept, self.width, self.density, self.sink_frames, self.rounding)

    def orders(self, layout: TokenLayout, layer: int) -> tuple[Order, ...]:
        """See `Dynamic.orders`: of spatial and of temporal heads."""
        return Rows(), TimeMajor()

    def choose(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> Chosen:
        """See `Dynamic.choose`."""
        orders = _orders(call.layout, call.orders, q.device)
        return self._chosen(closest_orders(self.errors(q, k, v, call), orders), call)

    def errors(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> torch.Tensor:
        """Squared errors of sampled rows under the spatial and the temporal profiling mask, fp32 [2, B, H, rows]."""
        rows = _drawn(call.layer, call.step, self.rows, min(call.layout.length, self.row_limit), q.device)
        units = _units(call.layout, call.orders, self.profile_frames, self.sink_frames, q.device)
        return band_errors(q, k, v, rows, *units, scale=call.scale)

    def keep(self, chosen: Chosen, call: Call) -> None:
        """See `Dynamic.keep`: the types alone tell everything."""
        assert chosen.table is not None
        # Both orders begin with the same tokens, but part from the second video token on.
        second = call.layout.text_before + 1
        call.slot["temporal"] = chosen.table[:, second] != second

    def recall(self, call: Call) -> Chosen:
        """See `Dynamic.recall`."""
        temporal = call.slot["temporal"]
        spatial_order, temporal_order = _orders(call.layout, call.orders, temporal.device)
        return self._chosen(torch.where(temporal[:, None], temporal_order, spatial_order), call)

    def kept_bytes(
        self, layout: TokenLayout, block_q: int, block_k: int, *, batch: int, heads: int, keeps: bool
    ) -> int:
        """See `Dynamic.kept_bytes`."""
        return heads if keeps else 0

    def expected_density(self, layout: TokenLayout, block_q: int, block_k: int) -> float:
        """See `Dynamic.expected_density`: all heads compute the same band."""
        return mask_density(self.band.select(layout, block_q, block_k), layout, block_q, block_k)

    def _chosen(self, table: torch.Tensor, call: Call) -> Chosen:
        blocks, density = _lists(self.band, call.layout, call.block_q, call.block_k, table.device)
        return Chosen(blocks, table, density=density)


@functools.lru_cache(maxsize=16)
def _orders(layout: TokenLayout, orders: tuple[Order, ...], device: torch.device) -> torch.Tensor:
    """Token ids as they stand and in the time-major order, int64 [2, S]."""
    time_major = orders[1].table(layout, 1)
    assert time_major is not None
    return torch.stack([torch.arange(layout.length), time_major[0]]).to(device)


@functools.lru_cache(maxsize=256)
def _drawn(layer: int, step: int, rows: int, limit: int, device: torch.device) -> torch.Tensor:
    """Token ids of the sampled queries, int64 [rows]; drawn on the host, so that all devices draw the same."""
    generator = torch.Generator().manual_seed(layer + 10_007 * step)  # one number for each layer and step
    return torch.randint(limit, (rows,), generator=generator).to(device)


@functools.lru_cache(maxsize=16)
def _units(
    layout: TokenLayout, orders: tuple[Order, ...], frames: float, sink_frames: int, device: torch.device
) -> ProfileUnits:
    table = orders[1].table(layout, 1)
    assert table is not None
    own, keys, reach = profile_units(layout, table[0], frames=frames, sink_frames=sink_frames)
    return ProfileUnits(own.to(device), keys.to(device), reach)


@functools.lru_cache(maxsize=16)
def _lists(
    band: Band, layout: TokenLayout, block_q: int, block_k: int, device: torch.device
) -> tuple[BlockList, float]:
    """The block list of all heads, and its density."""
    mask = band.select(layout, block_q, block_k)
    return mask_to_lists(mask[None], block_q, block_k).to(device), mask_density(mask, layout, block_q, block_k)
