"""What a recipe's attention costs beside dense attention: calls timed in pairs, on the model's own queries and keys.

Whole runs are a poor clock: what else the machine does, and how warm it is, changes them by more than recipes differ.
So a few self-attention calls are taken out of one run, and each is computed dense and by the recipe in turn, a moment
apart; the median of such ratios stands still where seconds do not. A run's share follows from its schedule, which says
how many calls are dense, refreshes, or live on what a refresh kept.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_dit.calls import attend
from sparse_dit.engine import is_dense
from sparse_dit.eval.pair import asking, plan_arguments
from sparse_dit.kernels.lists import mask_to_lists
from sparse_dit.layout import TokenLayout
from sparse_dit.pipelines.explanation import Explanation
from sparse_dit.pipelines.generate import Request, generate
from sparse_dit.pipelines.patch import explain, sparse
from sparse_dit.recipe import Recipe
from sparse_dit.schedule import Schedule
from sparse_dit.selection import Call, Chosen, Dynamic, Every
from sparse_dit.state import Slot

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

LAYERS = 4
REPEATS = 9


@dataclass(frozen=True)
class Taken:
    """A self-attention call of a run.

    Args:
        q, k, v: [B, H, S, D] on the CPU, in the model's order.
        layout: its tokens.
        scale: factor on the scores.
        layer, step: where it was made.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    layout: TokenLayout
    scale: float
    layer: int
    step: int


@dataclass(frozen=True)
class Ratios:
    """Times of a recipe's sparse calls over dense ones of the same queries and keys.

    Args:
        refresh: of a call that chooses anew what it computes; the mean over calls of medians over pairs.
        kept: of a call that lives on an earlier choice; equal to `refresh` where the schedule has none.
        spread: the widest distance between quartiles of one call's ratios, in shares of their median.
        pairs: how many pairs were timed.
    """

    refresh: float
    kept: float
    spread: float
    pairs: int


def take_calls(pipe: DiffusionPipeline, request: Request, layers: int = LAYERS) -> list[Taken]:
    """Calls of the step in the middle of a run, of layers spread over the model; the rest of the run is left out.

    Args:
        pipe: a pipeline that is not sparse at the moment, not compiled.
        request: what to generate.
        layers: how many calls, of the first branch.

    Raises:
        ValueError: as `sparse_dit.eval.pair.compare`, or no call could be seen.
    """
    whole = Recipe(name="attention time", selection=Every())
    plan = explain(pipe, whole, **plan_arguments(pipe, request))
    if not plan.layers:
        raise ValueError(f"model: {plan.model} stays dense: {plan.remark}; valid: a model with sparse attention")
    last = plan.layers - 1
    chosen = {round(place * last / max(1, layers - 1)) for place in range(layers)} & set(range(plan.layers))
    look = _Take(chosen, asking(pipe, request)["steps"] // 2)
    with suppress(_Enough), sparse(pipe, replace(whole, selection=look)):
        generate(pipe, request)
    if not look.taken:
        raise ValueError("model: none of its self-attention calls could be seen; valid: a model that can be sparse")
    return look.taken


def call_ratios(taken: Sequence[Taken], recipe: Recipe, device: torch.device, repeats: int = REPEATS) -> Ratios:
    """Times a recipe's sparse calls beside dense ones (SDPA) of the same queries and keys, in turn.

    Args:
        taken: as `take_calls` gives them.
        recipe: its schedule says whether there are calls without a refresh, and nothing else.
        device: where to compute.
        repeats: pairs of each call, after one that is not counted.

    Raises:
        ValueError: the recipe cannot be computed on such a call.
    """
    if is_dense(recipe):
        return Ratios(1.0, 1.0, 0.0, 0)
    medians: dict[bool, list[float]] = {True: [], False: []}
    spread, pairs = 0.0, 0
    for call in taken:
        on_device = replace(call, q=call.q.to(device), k=call.k.to(device), v=call.v.to(device))
        for refresh in (True, False) if recipe.schedule.keeps else (True,):
            ratios = _ratios(on_device, recipe, refresh, device, repeats)
            medians[refresh].append(statistics.median(ratios))
            if len(ratios) > 1:
                low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
                spread = max(spread, (high - low) / middle)
            pairs += len(ratios)
    refreshed = statistics.fmean(medians[True])
    kept = statistics.fmean(medians[False]) if medians[False] else refreshed
    return Ratios(refreshed, kept, spread, pairs)


def run_share(ratios: Ratios, schedule: Schedule, plan: Explanation) -> float:
    """The time of all self-attention calls of a run over that of a dense run.

    Args:
        ratios: of the recipe's sparse calls.
        schedule: the recipe's.
        plan: what `explain` says of the recipe and the run.
    """
    total, last = 0.0, None
    for step in plan.steps:
        # A whole call that a search or a cache needs is the recipe's own, with what it finds or keeps.
        calls = step.sparse_layers + step.dense_layers.get("refresh", 0)
        total += sum(step.dense_layers.values()) + step.sparse_layers - calls
        if calls:
            refresh = schedule.refreshes(step.step, last)
            last = step.step if refresh else last
            total += calls * (ratios.refresh if refresh else ratios.kept)
    return total / (plan.layers * len(plan.steps))


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call, by events on a GPU and by the clock elsewhere."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return float(begin.elapsed_time(end)) / 1e3


def _ratios(call: Taken, recipe: Recipe, refresh: bool, device: torch.device, repeats: int) -> list[float]:
    """Recipe's time over the dense one's, so often."""
    first, step = (call.step, call.step) if refresh else _kept_steps(recipe.schedule)
    slot = Slot()

    def compute(at: int, kept: Slot) -> None:
        attend(recipe, call.layout, call.q, call.k, call.v, scale=call.scale, layer=call.layer, step=at, slot=kept)

    def dense() -> None:
        F.scaled_dot_product_attention(call.q, call.k, call.v, scale=call.scale)

    with torch.inference_mode():
        if not refresh:
            compute(first, slot)
        ratios = []
        for _ in range(repeats + 1):
            beside = timed(dense, device)
            kept = Slot() if refresh else slot
            ratios.append(timed(lambda kept=kept: compute(step, kept), device) / beside)  # type: ignore[misc]
    return ratios[1:]


def _kept_steps(schedule: Schedule) -> tuple[int, int]:
    """A step that refreshes, and the next one that does not."""
    beyond = max(schedule.refresh_steps or (0,)) + 1
    return next((step, step + 1) for step in range(beyond + 1) if not schedule.refreshes(step + 1, step))


class _Enough(Exception):
    """All calls are taken."""


class _Take(Dynamic):
    """Looks at calls, keeps some of one step, and leaves all whole."""

    def __init__(self, layers: set[int], step: int) -> None:
        self.layers, self.step = layers, step
        self.taken: list[Taken] = []

    def choose(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Chosen:
        """See `Dynamic.choose`: all blocks."""
        if call.step == self.step and call.layer in self.layers:
            kept = [x.detach().contiguous().cpu() for x in (q, k, v)]
            self.taken.append(Taken(kept[0], kept[1], kept[2], call.layout, call.scale, call.layer, call.step))
            self.layers.remove(call.layer)
            if not self.layers:
                raise _Enough
        mask = torch.ones(1, 1, call.q_blocks, call.k_blocks, dtype=torch.bool, device=q.device)
        return Chosen(mask_to_lists(mask, call.block_q, call.block_k, capacity=call.k_blocks), call.table)

    def expected_density(self, layout: TokenLayout, block_q: int, block_k: int) -> float:
        """See `Dynamic.expected_density`."""
        return 1.0
