"""What choosing costs: selection, order and state of every dynamic system beside dense attention of the same shape.

    python -m sparse_dit.eval.bench.systems --out eval/results/bench-systems.jsonl

Times are those of the device, medians of runs between events, of random inputs laid out as models do. A call's cost is
what it does besides attention along a list in block order: judging blocks, making the list, bringing q, k and v into
the order of the blocks, counting the density, and, where a selection is kept between refreshes, unpacking it. The
kernels write the output out of the order themselves, at no cost that could be measured (docs/kernels.md). Searches,
which a system makes a few times a run (AdaSpa's block mass) or by an order of its own (SVG2's clustering), are told
apart, also spread over the sparse calls of a run of 50 steps as published.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from sparse_dit.apart import choose_clustered
from sparse_dit.calls import describe, plan
from sparse_dit.eval import results
from sparse_dit.eval.bench.cases import GRIDS, Case, Shape, read_shape
from sparse_dit.eval.bench.clock import Clock, CudaClock, HostClock
from sparse_dit.eval.bench.inputs import Inputs
from sparse_dit.eval.bench.yardsticks import dense_kernel, yardstick
from sparse_dit.kernels.ops import block_sparse_attention
from sparse_dit.kernels.ordered import in_order
from sparse_dit.layout import TokenLayout
from sparse_dit.orders import Clusters
from sparse_dit.recipe import Recipe, load_recipe
from sparse_dit.selection import Call, Chosen, Dynamic, Gate
from sparse_dit.state import Slot

SYSTEMS = (
    "quality",
    "balanced",
    "fast",
    "cached",
    "sparge",
    "draft",
    "jenga",
    "sol",
    "subblock",
    "sparge-cdf",
    "svg",
    "vmoba",
    "adaspa",
    "svg2",
)
SHAPES = ("12x32760x128", "4x118800x128")
STEPS = 50
# The most that a call may cost beside dense attention, by tokens.
LIMITS = {32_760: 0.03, 118_800: 0.01}
PARTS = ("choose", "order", "recall", "search", "first_search")


@dataclass(frozen=True)
class Overhead:
    """Milliseconds of the parts of a call; 0 where a system has none.

    Args:
        choose: judging and listing at a refresh, without what counts as a search; where that brings q, k and v into the
            order in the same pass, what it takes on top of `order`.
        order: q, k, v into the order of the blocks, by themselves.
        recall: what a call between refreshes does instead of choosing.
        search: a search after the first one.
        first_search: the first one, without the whole attention that it may need.
        searches: of a run of `STEPS` steps, the first one included.
        sparse_calls: of such a run, a layer and branch.
        keeps: whether calls between refreshes recall.
    """

    choose: float
    order: float
    recall: float
    search: float
    first_search: float
    searches: int
    sparse_calls: int
    keeps: bool

    @property
    def call(self) -> float:
        """Milliseconds of a call that does not search."""
        return self.order + (self.recall if self.keeps else self.choose)

    @property
    def searching(self) -> float:
        """Milliseconds of all searches of a run, spread over its sparse calls."""
        return (self.first_search + (self.searches - 1) * self.search) / self.sparse_calls if self.searches else 0.0


def overhead(recipe: Recipe, layout: TokenLayout, qkv: Sequence[Tensor], clock: Clock) -> Overhead:
    """Times the parts of a recipe's call.

    Args:
        recipe: with a dynamic selection.
        layout: the tokens.
        qkv: q, k and v [1, H, S, D].
        clock: what times.

    Raises:
        ValueError: the selection is static.
    """
    if not isinstance(recipe.selection, Dynamic):
        raise ValueError(f"systems: {recipe.name!r} has a static selection; valid: a dynamic one")
    layers = range(3) if isinstance(recipe.selection, Gate) else range(1)
    found = [_of_layer(recipe, layout, qkv, clock, layer) for layer in layers]
    mean = {part: sum(getattr(each, part) for each in found) / len(found) for part in PARTS}
    return Overhead(**mean, searches=found[0].searches, sparse_calls=found[0].sparse_calls, keeps=found[0].keeps)


def _of_layer(recipe: Recipe, layout: TokenLayout, qkv: Sequence[Tensor], clock: Clock, layer: int) -> Overhead:
    selection, schedule = recipe.selection, recipe.schedule
    assert isinstance(selection, Dynamic)
    q, k, v = qkv
    step = schedule.dense_steps
    call = describe(recipe, layout, q, scale=q.shape[-1] ** -0.5, layer=layer, step=step, slot=Slot())

    def timed(work: Callable[[], object]) -> float:
        return clock.measure(lambda _: work()).ms

    def listed(choose: Callable[[], Chosen | None]) -> float | Tensor:
        chosen = choose()
        assert chosen is not None
        return chosen.measured(layout.length)

    parts = dict.fromkeys(PARTS, 0.0)
    if selection.needs_lse:
        call.slot["lse"] = _whole_lse(q, k, v, recipe)
    choose: Callable[[], Chosen | None] = partial(selection.choose, q, k, v, call)
    searches = 0
    if isinstance(recipe.order, Clusters):
        parts |= _clustering(recipe.order, q, k, call, timed)
        searches = STEPS - step
        choose = partial(choose_clustered, recipe.order, selection, q, k, v, call, refresh=True, keeps=False)
    chosen = choose()
    assert chosen is not None
    if chosen.table is not None:
        keys = chosen.table if chosen.key_table is None else chosen.key_table
        parts["order"] = timed(partial(in_order, q, k, v, chosen.table, keys))
    whole = timed(lambda: listed(choose))
    if selection.needs_lse:
        parts["search"] = parts["first_search"] = whole
        searches = len(schedule.refresh_steps or (0,))
    else:
        brought = parts["order"] if chosen.ordered is not None else 0.0
        parts["choose"] = whole - parts["search"] - brought
    if schedule.keeps:
        selection.keep(chosen, call)
        parts["recall"] = timed(lambda: listed(lambda: selection.recall(call)))
    return Overhead(**parts, searches=searches, sparse_calls=max(1, STEPS - step), keeps=schedule.keeps)


def _whole_lse(q: Tensor, k: Tensor, v: Tensor, recipe: Recipe) -> Tensor:
    every = load_recipe("sage").override({"block_q": recipe.block_q, "block_k": recipe.block_k})
    blocks = plan(every, TokenLayout((1, 1, q.shape[2])), q.device).blocks
    return block_sparse_attention(q, k, v, blocks)[1]


def _clustering(
    order: Clusters, q: Tensor, k: Tensor, call: Call, timed: Callable[[Callable[[], object]], float]
) -> Mapping[str, float]:
    def cold() -> object:
        call.slot.clear()
        return order.tables(q, k, call.layout, call.slot)

    return {"first_search": timed(cold), "search": timed(lambda: order.tables(q, k, call.layout, call.slot))}


def rows(
    names: Sequence[str],
    shapes: Sequence[Shape],
    clock: Clock,
    device: torch.device,
    dtype: torch.dtype,
    command: str,
    grids: Mapping[int, tuple[int, int, int]] = GRIDS,
) -> Iterator[results.Row]:
    """A row for each system and shape; what fails is a row with the reason.

    Args:
        names: presets with dynamic selections.
        shapes: of the attention; their tokens must be those of one of `grids`.
        clock: what times.
        device, dtype: of the inputs.
        command: how the run was asked for.
        grids: (T, H, W) by tokens.
    """
    for shape in shapes:
        if shape.tokens not in grids:
            raise ValueError(f"shapes: {shape}; valid: tokens of {', '.join(map(str, grids))}")
        layout = TokenLayout(grids[shape.tokens])
        inputs = Inputs(shape, device, dtype, 1, seed=0)
        q, k, v = (_as_models_do(x) for x in inputs.sets[0])
        attend = yardstick(Case("attention", dense_kernel(device)), inputs)
        dense_ms = clock.measure(lambda _, attend=attend, q=q, k=k, v=v: attend(q, k, v)).ms  # type: ignore[misc]
        for name in names:
            recipe = load_recipe(name)
            row = {
                "kind": "overhead",
                "system": name,
                "recipe": recipe.to_dict(),
                "shape": {"batch": 1, **asdict(shape)},
                "grid": list(layout.grid),
                "dense": dense_kernel(device),
                "dense_ms": dense_ms,
                "limit": LIMITS.get(shape.tokens),
                "command": command,
                "device": results.device_of(device, dtype),
                **results.provenance(),
            }
            try:
                yield row | _measured(overhead(recipe, layout, (q, k, v), clock), dense_ms)
            except Exception as error:  # a system that fails must not take the others with it
                if not clock.alive():
                    raise
                yield row | {"share": None, "reason": " ".join(str(error).split())[:300] or type(error).__name__}


def _measured(found: Overhead, dense_ms: float) -> results.Row:
    return {
        **{f"{part}_ms": getattr(found, part) for part in PARTS},
        "call_ms": found.call,
        "share": found.call / dense_ms,
        "search_share": found.searching / dense_ms,
        "searches": found.searches,
        "sparse_calls": found.sparse_calls,
        "reason": None,
    }


def _as_models_do(x: Tensor) -> Tensor:
    """[B, H, S, D] with all heads of a token side by side in memory."""
    return rearrange(rearrange(x, "b h s d -> b s h d").contiguous(), "b s h d -> b h s d")


def line(row: results.Row) -> str:
    """A row in one line."""
    shape = "x".join(str(row["shape"][side]) for side in ("heads", "tokens", "head_size"))
    if row["reason"] is not None:
        return f"{shape} {row['system']}: {row['reason']}"
    parts = ", ".join(f"{part} {row[f'{part}_ms']:.3f}" for part in PARTS if row[f"{part}_ms"])
    limit = "" if row["limit"] is None else f" (limit {row['limit']:.0%})"
    return (
        f"{shape} {row['system']}: {row['share']:.2%} of {row['dense_ms']:.2f} ms{limit}, searches "
        f"{row['search_share']:.2%}; ms: {parts}"
    )


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSONL file that rows are appended to")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="HEADSxTOKENSxHEAD_SIZE each")
    parser.add_argument("--systems", nargs="+", default=SYSTEMS)
    options = parser.parse_args()
    shapes = [read_shape(text) for text in options.shapes]
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    clock: Clock = CudaClock(device, repeat_ms=20.0, warmup_ms=5.0) if gpu else HostClock(1)
    command = results.command_line("python -m sparse_dit.eval.bench.systems", sys.argv[1:])
    dtype = torch.bfloat16 if gpu else torch.float32
    for row in rows(options.systems, shapes, clock, device, dtype, command):
        results.append_row(options.out, row)
        print(line(row), flush=True)


if __name__ == "__main__":
    main()
