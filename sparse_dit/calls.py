"""What one sparse attention call computes: order, selection, kernel, skipped blocks."""

import functools
from typing import NamedTuple

import torch

from sparse_dit.apart import attend_chosen, choose_clustered
from sparse_dit.kernels.backends import told_backend
from sparse_dit.kernels.blocks import BlockList
from sparse_dit.kernels.lists import mask_to_lists
from sparse_dit.kernels.ops import block_sparse_attention
from sparse_dit.kernels.replays import Replays
from sparse_dit.layout import TokenLayout, text_blocks
from sparse_dit.orders import Clusters, Order, Rows, inverse
from sparse_dit.parallel import ALL_HERE, Heads
from sparse_dit.recipe import Recipe
from sparse_dit.selection import Call, Chosen, Dynamic, Every, Selection
from sparse_dit.skipped import Parts, Reuse
from sparse_dit.state import Slot


class Plan(NamedTuple):
    """What a static selection comes to on a device.

    Attributes:
        blocks: the block list.
        density: its density over the whole sequence, the mean over heads.
        table: int64 [1 or H, S], token ids in the order in which they enter blocks; `None` when they stay as they are.
    """

    blocks: BlockList
    density: float
    table: torch.Tensor | None


def plan(recipe: Recipe, layout: TokenLayout, device: torch.device, heads: int = 1, spread: Heads = ALL_HERE) -> Plan:
    """The plan of a recipe with a static selection for a token layout; computed once, then cached.

    Args:
        recipe: the method.
        layout: the tokens of the call.
        device: where the call runs.
        heads: attention heads of a call; matters to orders and selections that differ by head.
        spread: which of the layer's heads they are.

    Raises:
        ValueError: the recipe's selection is dynamic: what it computes depends on the content.
    """
    if isinstance(recipe.selection, Dynamic):
        raise ValueError(
            f"recipe: the selection of {recipe.name!r} depends on the content; valid: a recipe with a static selection"
        )
    return _plan(recipe.order, recipe.selection, layout, recipe.block_q, recipe.block_k, device, heads, spread)


@functools.lru_cache(maxsize=16)
def _plan(
    order: Order,
    selection: Selection,
    layout: TokenLayout,
    block_q: int,
    block_k: int,
    device: torch.device,
    heads: int,
    spread: Heads,
) -> Plan:
    total = spread.total(heads)
    mask = spread.own(selection.select(layout, block_q, block_k, order.table(layout, total), total), heads)
    rows, columns = text_blocks(layout, block_q, block_k)
    blocks = mask_to_lists((mask | rows[:, None] | columns)[None], block_q, block_k)
    return Plan(
        blocks.to(device), blocks.density(layout.length, layout.length), _table(order, layout, heads, spread, device)
    )


@functools.lru_cache(maxsize=16)
def _table(order: Order, layout: TokenLayout, heads: int, spread: Heads, device: torch.device) -> torch.Tensor | None:
    table = order.table(layout, spread.total(heads))
    return None if table is None else spread.own(table, heads).to(device)


@functools.lru_cache(maxsize=16)
def _parts(
    order: Order, layout: TokenLayout, tokens: int, heads: int, spread: Heads, device: torch.device
) -> Parts | None:
    """Runs of so many tokens in the order of a recipe; `None` when each token stands for itself."""
    if tokens == 1:
        return None
    table = order.table(layout, spread.total(heads))
    places = torch.arange(layout.length)[None] if table is None else inverse(spread.own(table, heads))
    # Computed here and then copied, for which the host waits: what is launched there, other streams do not wait for.
    return Parts(_table(order, layout, heads, spread, device), (places // tokens).to(device))


@functools.lru_cache(maxsize=16)
def _forced(layout: TokenLayout, block_q: int, block_k: int, device: torch.device) -> torch.Tensor | None:
    """`Call.forced`."""
    if layout.text_before + layout.text_after == 0:
        return None
    rows, columns = text_blocks(layout, block_q, block_k)
    return (rows[:, None] | columns)[None, None].to(device)


class Attended(NamedTuple):
    """A sparse attention call.

    Attributes:
        out: [B, H, S, D].
        density: computed tile area over full area; a float64 scalar on q's device when it depends on the content, so
            that no call waits for the device.
        whole: whether `out` is that of whole attention, as a search or a cache needed it.
        backend: which kernel computed it, as summaries print it.
    """

    out: torch.Tensor
    density: float | torch.Tensor
    whole: bool
    backend: str


def attend(
    recipe: Recipe,
    layout: TokenLayout,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None,
    layer: int,
    step: int,
    slot: Slot,
    spread: Heads = ALL_HERE,
) -> Attended:
    """Compute one sparse attention call.

    At a refresh (`Schedule.refreshes`) a dynamic selection chooses anew. A selection that needs the log-sum-exp of
    whole attention for that, and `skipped: reuse`, make the call a whole one in native precision, by this package's
    kernel and not by the model's own backend, which tells no log-sum-exp; its output is then exact.

    Args:
        recipe: the method; its selection is not `all` in native precision.
        layout: the tokens of the call.
        q, k, v: [B, H, S, D] in the model's order.
        scale: factor on the scores; `None` is 1 / sqrt(D).
        layer: index of the self-attention layer.
        step: denoising step from 0.
        slot: what the layer keeps between steps, made for this layout and these shapes; changed.
        spread: which of the layer's heads the call has.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    refresh = recipe.schedule.refreshes(step, slot.refreshed)
    whole = None
    if isinstance(recipe.selection, Dynamic):
        chosen, whole = _choose(recipe, layout, q, k, v, scale, layer, step, slot, refresh, spread)
        if refresh or slot.density is None:
            slot.density = chosen.measured(layout.length)
            if chosen.heads is not None:
                slot.density = slot.density * (len(chosen.heads) / q.shape[1])
        density: float | torch.Tensor = slot.density
    else:
        planned = plan(recipe, layout, q.device, q.shape[1], spread)
        chosen, density = Chosen(planned.blocks, planned.table), planned.density
    keeps_output = refresh and isinstance(recipe.skipped, Reuse)
    if keeps_output and whole is None:
        whole = _whole(recipe, layout, q, k, v, scale)
    if whole is not None and not keeps_output:
        return Attended(whole[0], density, True, told_backend(q, k, v, chosen.blocks, "native"))
    backend = told_backend(
        q, k, v, chosen.blocks, "native" if whole is not None else recipe.precision, recipe.pv_threshold
    )
    out, lse = attend_chosen(
        q,
        k,
        v,
        chosen,
        scale=scale,
        precision=recipe.precision,
        skipped="summary" if recipe.skipped.summarizes else "drop",
        pv_threshold=recipe.pv_threshold,
    )
    if recipe.pv_threshold is not None:
        backend = f"{backend}, PV skip at {recipe.pv_threshold:g}"
    if not isinstance(recipe.skipped, Reuse):
        return Attended(out, density, False, backend)
    parts = _parts(recipe.order, layout, recipe.skipped.part, q.shape[1], spread, q.device)
    if whole is None:
        assert slot.refreshed is not None
        return Attended(recipe.skipped.add(out, slot, step - slot.refreshed, parts), density, False, backend)
    recipe.skipped.keep(slot, whole, (out, lse), parts)
    slot.refreshed = step
    return Attended(whole[0], density, True, backend)


def attend_again(
    replays: Replays,
    recipe: Recipe,
    layout: TokenLayout,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    tokens_first: bool,
    scale: float | None,
    layer: int,
    step: int,
    slot: Slot,
    spread: Heads = ALL_HERE,
) -> Attended:
    """`attend`, for calls that come again: where it only launches kernels, their list is kept and launched again.

    Args:
        replays: of calls by this recipe.
        q, k, v: [B, S, H, D] where `tokens_first`, like the output then, else [B, H, S, D].
        recipe, layout, scale, layer, step, slot, spread: as `attend`.
    """

    def compute() -> Attended:
        # Not by einops: four of its calls would be a tenth of the host's time.
        axes_first = (x.transpose(1, 2) if tokens_first else x for x in (q, k, v))
        done = attend(recipe, layout, *axes_first, scale=scale, layer=layer, step=step, slot=slot, spread=spread)
        return done._replace(out=done.out.transpose(1, 2)) if tokens_first else done

    kept = _read_again(recipe, step, slot)
    if kept is None:
        return compute()
    settings = (layer if isinstance(recipe.selection, Dynamic) else None, layout, tokens_first, scale, spread.group)
    return replays.call(settings, (q, k, v, *kept), compute)


def _read_again(recipe: Recipe, step: int, slot: Slot) -> tuple[torch.Tensor, ...] | None:
    """Tensors that a call reads besides q, k and v; `None` where what it does is not the same for all calls alike."""
    selection = recipe.selection
    if isinstance(recipe.skipped, Reuse) or isinstance(recipe.order, Clusters):
        return None
    if not isinstance(selection, Dynamic) or (selection.repeats and not recipe.schedule.keeps):
        return ()
    if not selection.repeats or recipe.schedule.refreshes(step, slot.refreshed):
        return None
    if not isinstance(slot.density, torch.Tensor):
        return None
    return (*slot.values(), slot.density)


def describe(
    recipe: Recipe,
    layout: TokenLayout,
    q: torch.Tensor,
    *,
    scale: float,
    layer: int,
    step: int,
    slot: Slot,
    spread: Heads = ALL_HERE,
) -> Call:
    """The call as a recipe's dynamic selection is told of it; arguments as `attend`."""
    assert isinstance(recipe.selection, Dynamic)
    orders = recipe.selection.orders(layout, layer) or (recipe.order,)
    return Call(
        layout=layout,
        orders=orders,
        tables=tuple(
            None if isinstance(order, Clusters) else _table(order, layout, q.shape[1], spread, q.device)
            for order in orders
        ),
        block_q=recipe.block_q,
        block_k=recipe.block_k,
        scale=scale,
        layer=layer,
        step=step,
        slot=slot,
        heads=spread,
        forced=_forced(layout, recipe.block_q, recipe.block_k, q.device),
        brings=recipe.precision == "native",
    )


def _choose(
    recipe: Recipe,
    layout: TokenLayout,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    layer: int,
    step: int,
    slot: Slot,
    refresh: bool,
    spread: Heads,
) -> tuple[Chosen, tuple[torch.Tensor, torch.Tensor] | None]:
    """What a dynamic selection computes, and the whole call (out, lse) if one was needed to know it."""
    selection = recipe.selection
    assert isinstance(selection, Dynamic)
    call = describe(recipe, layout, q, scale=scale, layer=layer, step=step, slot=slot, spread=spread)
    if isinstance(recipe.order, Clusters):
        keeps = recipe.schedule.keeps
        chosen = choose_clustered(recipe.order, selection, q, k, v, call, refresh=refresh, keeps=keeps)
        slot.refreshed = step if refresh else slot.refreshed
        return chosen, None
    if not refresh:
        return selection.recall(call), None
    found, whole = selection.choose(q, k, v, call), None
    if found is None:
        whole = _whole(recipe, layout, q, k, v, scale)
        slot["lse"] = whole[1]
        found = selection.choose(q, k, v, call)
        assert found is not None
    slot.refreshed = step
    if recipe.schedule.keeps:
        selection.keep(found, call)
    return found, whole


def _whole(
    recipe: Recipe, layout: TokenLayout, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = _plan(Rows(), Every(), layout, recipe.block_q, recipe.block_k, q.device, 1, ALL_HERE).blocks
    return block_sparse_attention(q, k, v, blocks, scale=scale)
