"""Selection `profile`: what calibration found for each head, layer and bin of steps.

Sources: PAROAttention (arXiv 2506.16054), Sparse-vDiT (arXiv 2506.03065), the window search of sliding tile attention
(arXiv 2502.04507); how profiles are found is in `sparse_dit.calibration`.
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sparse_dit.kernels.lists import mask_to_lists, pack_bits, unpack_bits
from sparse_dit.layout import TokenLayout
from sparse_dit.orders import Axes, Order, Rows, Tiles, TimeMajor
from sparse_dit.orders.axes import FLATTENINGS
from sparse_dit.profiles import Pattern, Profile, find_profile, load_profile, video_blocks
from sparse_dit.selection.band import Band
from sparse_dit.selection.dynamic import Call, Chosen, Dynamic
from sparse_dit.selection.every import Every
from sparse_dit.selection.regions import add_text, mask_density
from sparse_dit.selection.window import Window


@dataclass(frozen=True)
class Profiled(Dynamic):
    """Each head computes the pattern that a profile has for it, in the order that belongs to the pattern.

    The profile's bins are counted in steps, those of the runs that it was made from. Blocks with text in them are
    computed by all heads that compute anything.

    Args:
        file: the name of a profile that comes with the package, or the path of a file that `sparse-dit calibrate`
            wrote.

    Raises:
        ValueError: there is no such profile, or it is damaged.
    """

    file: str = ""

    def __post_init__(self) -> None:
        assert self.profile  # refuses what cannot be read

    @functools.cached_property
    def profile(self) -> Profile:
        """What the file holds."""
        return load_profile(find_profile(self.file))

    def orders(self, layout: TokenLayout, layer: int) -> tuple[Order, ...]:
        """See `Dynamic.orders`; heads have their own, by their patterns."""
        return (Rows(),)

    def choose(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> Chosen:
        """See `Dynamic.choose`. Raises ValueError: the profile is that of another grid or number of heads."""
        profile = self.profile
        profile.check_call(call.layout, call.heads.total(q.shape[1]))
        number = profile.bin_of(call.step)
        if "bin" not in call.slot or int(call.slot["bin"]) != number:
            mask = layer_mask(profile, number, call.layer, call.layout)
            call.slot["blocks"] = pack_bits(call.heads.own(mask, q.shape[1])).to(q.device)
            call.slot["bin"] = torch.tensor(number)
        return self.recall(call)

    def keep(self, chosen: Chosen, call: Call) -> None:
        """See `Dynamic.keep`: `choose` has kept everything."""

    def recall(self, call: Call) -> Chosen:
        """See `Dynamic.recall`."""
        bits = call.slot["blocks"]
        here = call.heads.span(len(bits))
        patterns = self.profile.kinds_of(int(call.slot["bin"]), call.layer)[here]
        computed = tuple(head for head, pattern in enumerate(patterns) if pattern.kind != "skip")
        table = _table(_orders(self.profile, int(call.slot["bin"]), call.layer)[here], call.layout, bits.device)
        heads = None
        if len(computed) < len(patterns):
            heads = torch.tensor(computed, dtype=torch.int64, device=bits.device)
            # Where no head is computed the list of the first stands for none; nothing follows it.
            bits = bits.index_select(0, heads) if computed else torch.full_like(bits[:1], 1)
            table = table.index_select(0, heads) if table is not None and computed else None
        mask = unpack_bits(bits, call.k_blocks)[None]
        return Chosen(mask_to_lists(mask, call.block_q, call.block_k, capacity=call.k_blocks), table, heads=heads)

    def expected_density(self, layout: TokenLayout, block_q: int, block_k: int) -> float:
        """See `Dynamic.expected_density`: the mean over layers and the steps of calibration."""
        self.profile.check_call(layout, self.profile.model.heads)
        return profile_density(self.profile, layout)

    def kept_bytes(
        self, layout: TokenLayout, block_q: int, block_k: int, *, batch: int, heads: int, keeps: bool
    ) -> int:
        """See `Dynamic.kept_bytes`. Raises ValueError: the profile is that of another grid or number of heads."""
        self.profile.check_call(layout, heads)
        q_blocks, k_blocks = -(-layout.length // block_q), -(-layout.length // block_k)
        return heads * q_blocks * -(-k_blocks // 8) + 8


def layer_mask(profile: Profile, number: int, layer: int, layout: TokenLayout) -> torch.Tensor:
    """The blocks that the heads of a layer compute in a bin, text included.

    Returns:
        bool [H, QB, KB] on the CPU, each head in its own order; no block for heads that are skipped.
    """
    masks = []
    for head, pattern in enumerate(profile.kinds_of(number, layer)):
        if pattern.kind == "stripe":
            assert profile.stripes is not None
            mask = stripe_mask(profile.stripes[number, layer, head], layout, profile.block_q, profile.block_k)
        elif pattern.kind == "mask":
            assert profile.masks is not None
            bits = profile.masks[number, layer, head]
            mask = _with_text(unpack_bits(bits, video_blocks(layout, profile.block_k)), layout, profile)
        else:
            mask = pattern_mask(pattern, layout, profile.block_q, profile.block_k)
        if pattern.kind != "skip" and not mask.any(dim=-1).all():
            raise ValueError(
                f"profile: head {head} of layer {layer} has a query block without a key block; valid: at least one each"
            )
        masks.append(mask)
    return torch.stack(masks)


@functools.lru_cache(maxsize=8)
def profile_density(profile: Profile, layout: TokenLayout) -> float:
    """The mean density over heads, layers and the steps of calibration."""
    ends = (*profile.bins[1:], max(profile.steps, profile.bins[-1] + 1))
    total: float = 0.0
    for number, (first, end) in enumerate(zip(profile.bins, ends, strict=True)):
        for layer in range(profile.model.layers):
            mask = layer_mask(profile, number, layer, layout)
            total += (end - first) * mask_density(mask, layout, profile.block_q, profile.block_k)
    return total / (ends[-1] * profile.model.layers)


@functools.lru_cache(maxsize=64)
def pattern_mask(pattern: Pattern, layout: TokenLayout, block_q: int, block_k: int) -> torch.Tensor:
    """The blocks of a pattern that all heads share, bool [QB, KB] on the CPU; do not write into it."""
    if pattern.kind == "skip":
        return torch.zeros_like(Every().select(layout, block_q, block_k)[0])
    if pattern.kind == "all":
        return Every().select(layout, block_q, block_k)[0]
    if pattern.kind == "window":
        assert pattern.tile is not None
        assert pattern.size is not None
        table = Tiles(pattern.tile).table(layout, 1)
        return Window(size=pattern.size, tile=pattern.tile).select(layout, block_q, block_k, table, 1)[0]
    return Band(width=pattern.width, sink_frames=0).select(layout, block_q, block_k)[0]


def stripe_mask(bits: torch.Tensor, layout: TokenLayout, block_q: int, block_k: int) -> torch.Tensor:
    """All queries see the same key blocks, bool [QB, KB] on the CPU, text included.

    Args:
        bits: uint8 [ceil(blocks / 8)], the key blocks (`pack_bits`), without those behind the video tokens.
        layout: the tokens.
        block_q, block_k: tokens of a block.
    """
    q_blocks, k_blocks = -(-layout.length // block_q), -(-layout.length // block_k)
    columns = unpack_bits(bits, video_blocks(layout, block_k))
    columns = F.pad(columns, (0, k_blocks - len(columns)))
    return add_text(columns.expand(1, q_blocks, -1), layout, block_q, block_k)[0]


def pattern_order(pattern: Pattern, axes: int = 0) -> Order:
    """The order in which a head with a pattern enters blocks.

    Args:
        pattern: what the head computes.
        axes: place in `FLATTENINGS`, for `mask`.
    """
    if pattern.kind == "multi_diagonal":
        return TimeMajor()
    if pattern.kind == "window":
        assert pattern.tile is not None
        return Tiles(pattern.tile)
    return Axes(FLATTENINGS[axes]) if pattern.kind == "mask" else Rows()


def _with_text(mask: torch.Tensor, layout: TokenLayout, profile: Profile) -> torch.Tensor:
    """A mask over the blocks up to the last video token, for the whole sequence."""
    missing = (-(-layout.length // block) - video_blocks(layout, block) for block in (profile.block_k, profile.block_q))
    columns, rows = missing
    return add_text(F.pad(mask, (0, columns, 0, rows))[None], layout, profile.block_q, profile.block_k)[0]


def _orders(profile: Profile, number: int, layer: int) -> tuple[Order, ...]:
    axes = [0] * profile.model.heads if profile.axes is None else profile.axes[layer].tolist()
    return tuple(pattern_order(*pair) for pair in zip(profile.kinds_of(number, layer), axes, strict=True))


@functools.lru_cache(maxsize=64)
def _table(orders: tuple[Order, ...], layout: TokenLayout, device: torch.device) -> torch.Tensor | None:
    """The orders of all heads, int64 [H, S]; `None` where no token moves."""
    rows = [order.table(layout, 1) for order in orders]
    if all(row is None for row in rows):
        return None
    return torch.cat([torch.arange(layout.length)[None] if row is None else row for row in rows]).to(device)
