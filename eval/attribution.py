"""What a speed-up is due to: kernel, sparsity or precision; where the other time goes; from which length on it pays.

    python -m sparse_dit.eval.attribution --recipe balanced --out eval/results/bench-e2e.jsonl

is `sparse-dit bench e2e` without its tables, for machines where jsonargparse and rich are not installed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparse_dit.engine import is_dense
from sparse_dit.eval import metrics, results
from sparse_dit.eval.attention_time import Taken, call_ratios, take_calls
from sparse_dit.eval.pair import DENSE, Run, asking, plan_arguments, run
from sparse_dit.eval.stages import STAGES, split, stages
from sparse_dit.eval.sweep import FAILURES, reason
from sparse_dit.layout import TokenLayout
from sparse_dit.pipelines.generate import TINY_WAN, Request, load_pipeline
from sparse_dit.pipelines.patch import explain
from sparse_dit.recipe import Recipe, load_recipe
from sparse_dit.schedule import Schedule
from sparse_dit.selection import Radial

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

STOCK, KERNEL, SPARSE, INT8 = "dense, the model's own", "dense, our kernel", "sparse, 16 bits", "sparse, INT8"
SCALES = (0.25, 0.35, 0.5, 0.71, 1.0, 1.41, 2.0)
"""Sides of the ladder's frames over those of the request: about half and twice the tokens from rung to rung."""


def arms(recipe: Recipe) -> dict[str, Recipe]:
    """The recipe taken apart, each arm one step from the one before.

    Our kernel alone computes every block, listed as such, in the recipe's blocks; the sparse ones are the recipe in the
    model's own number type (`16 bits` on a GPU) and in INT8.

    Raises:
        ValueError: the recipe is dense: there is nothing to take apart.
    """
    if is_dense(replace(recipe, precision="native")):
        raise ValueError(f"recipe: {recipe.name!r} computes everything; valid: one that leaves blocks out")
    every = Recipe("every block", selection=Radial(density=1.0), block_q=recipe.block_q, block_k=recipe.block_k)
    return {
        STOCK: load_recipe(DENSE),
        KERNEL: every,
        SPARSE: replace(recipe, precision="native"),
        INT8: replace(recipe, precision="int8"),
    }


def attribute(
    pipe: DiffusionPipeline, request: Request, recipe: Recipe, *, model: str = "", repeats: int = 3
) -> Iterator[results.Row]:
    """Runs a request with each arm in turn, `repeats` times round, and tells where the time went.

    Args:
        pipe: a pipeline that is not sparse at the moment, not compiled.
        request: what to generate.
        recipe: what is taken apart.
        model: the pipeline's name in the rows.
        repeats: rounds. Ratios are of runs of one round, so that what slows the machine for long slows both.

    Yields:
        A row a run, `kind` "e2e": seconds by stage, and those over the stock run of the same round; quality against it.
        `status` is "measured", or "failed" with a `reason`: not every device and head size has INT8.

    Raises:
        ValueError: as `arms` and `sparse_dit.eval.pair.run`.
    """
    taken_apart = arms(recipe)
    plans = {arm: explain(pipe, each, **plan_arguments(pipe, request)) for arm, each in taken_apart.items()}
    shared = {
        "kind": "e2e",
        "model": model,
        **asking(pipe, request),
        "grid": list(plans[STOCK].grid),
        "device": results.device_of(pipe.device, pipe.transformer.dtype),
        **results.provenance(),
    }
    failed: set[str] = set()
    for number in range(repeats):
        stock: dict[str, Any] = {}
        for arm, each in taken_apart.items():
            if arm in failed:
                continue
            row = {**shared, "arm": arm, "recipe": each.to_dict(), "round": number}
            try:
                done, seconds = _timed(pipe, request, each, warm_up=number == 0)
            except FAILURES as error:
                if arm == STOCK:
                    raise
                failed.add(arm)
                yield {**row, "status": "failed", "reason": reason(error)}
                continue
            stock = stock or {"seconds": seconds, "frames": done.frames[0]}
            over = {part: seconds[part] / stock["seconds"][part] for part in ("whole", "attention")}
            quality = metrics.measure(done.frames[0], stock["frames"])
            yield {
                **row,
                "status": "measured",
                "reason": None,
                "seconds": seconds,
                "over_stock": over,
                "run_density": done.summary.run_density,
                "backend": done.summary.backend,
                **{name: quality[name] for name in ("psnr", "ssim", "difference_max")},
            }


def _timed(pipe: DiffusionPipeline, request: Request, recipe: Recipe, *, warm_up: bool) -> tuple[Run, dict[str, float]]:
    """A run, and its seconds by stage."""
    with stages(pipe) as watch:
        if warm_up:
            run(pipe, [replace(request, steps=1)], replace(recipe, schedule=Schedule()), warm_up=False)
        before = watch.seconds()
        done = run(pipe, [request], recipe, warm_up=False)
        parts = {name: seconds - before.get(name, 0.0) for name, seconds in watch.seconds().items()}
    return done, {"whole": done.seconds, **split(done.seconds, done.summary.attention_seconds or 0.0, parts)}


def summarize(rows: Sequence[results.Row]) -> list[dict[str, Any]]:
    """Medians over rounds for each arm that ran, in the order of the rows.

    Returns:
        Mappings with `arm`, a median for `whole` and each of `STAGES` (seconds), `over_whole`, `over_attention`,
        `run_density`, `psnr`.
    """
    found = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        measured = [row for row in rows if row["arm"] == arm and row["status"] == "measured"]
        if measured:
            medians = {part: statistics.median(row["seconds"][part] for row in measured) for part in ("whole", *STAGES)}
            over = {
                f"over_{part}": statistics.median(row["over_stock"][part] for row in measured)
                for part in ("whole", "attention")
            }
            kept = {name: measured[0][name] for name in ("run_density", "psnr")}
            found.append({"arm": arm, **medians, **over, **kept})
    return found


def lengths(
    pipe: DiffusionPipeline,
    request: Request,
    recipe: Recipe,
    *,
    model: str = "",
    scales: Sequence[float] | None = None,
    seed: int = 0,
) -> Iterator[results.Row]:
    """Times single calls of each arm beside dense ones over a ladder of lengths: the model's heads, larger frames.

    Args:
        pipe, request, recipe, model: as `attribute`.
        scales: sides of each rung's frames over those of the request; None is `SCALES`.
        seed: of what is drawn.

    Queries and keys are those of the model, taken from one call and drawn from with repetition where a rung is longer:
    real in distribution, not in structure. So a recipe whose density follows the content is timed at a density of its
    own, which stands in the row.

    Yields:
        A row for each rung and arm, `kind` "length": tokens, grid and the time over a dense call.
    """
    [call] = take_calls(pipe, request, layers=1)
    device = pipe.device
    shared = {"kind": "length", "model": model, "heads": call.q.shape[1], "head_size": call.q.shape[-1]}
    origin = {"device": results.device_of(device, pipe.transformer.dtype), "seed": seed, **results.provenance()}
    frames, height, width = call.layout.grid
    for scale in SCALES if scales is None else scales:
        grid = (frames, max(1, round(scale * height)), max(1, round(scale * width)))
        layout = TokenLayout(grid, call.layout.text_before, call.layout.text_after)
        rung = _stretched(call, layout, seed)
        for arm, each in arms(recipe).items():
            if arm == STOCK:
                continue
            row = {**shared, "arm": arm, "recipe": each.to_dict(), "grid": list(grid), "tokens": layout.length}
            if layout.length <= max(each.block_q, each.block_k):
                yield {**row, "status": "failed", "reason": "no longer than a block", **origin}
                continue
            try:
                ratios = call_ratios([rung], each, device)
            except FAILURES as error:
                yield {**row, "status": "failed", "reason": reason(error), **origin}
                continue
            yield {**row, "status": "measured", "reason": None, **asdict(ratios), **origin}


def break_even(rows: Sequence[results.Row], arm: str) -> int | None:
    """The shortest length measured from which on an arm's calls take less time than dense ones; None where none does.

    Args:
        rows: as `lengths` yields them.
        arm: one of them.
    """
    measured = [row for row in rows if row["arm"] == arm and row["status"] == "measured"]
    found = None
    for row in sorted(measured, key=lambda row: -int(row["tokens"])):
        if row["refresh"] >= 1:
            break
        found = int(row["tokens"])
    return found


def _stretched(call: Taken, layout: TokenLayout, seed: int) -> Taken:
    """A call over so many tokens, drawn from those of another one."""
    generator = torch.Generator().manual_seed(seed)
    size = call.q.shape[2]
    drawn = torch.cat([
        torch.randperm(size, generator=generator) for _ in range(math.ceil(layout.length / size))
    ])[: layout.length]  # fmt: skip
    return replace(call, q=call.q[:, :, drawn], k=call.k[:, :, drawn], v=call.v[:, :, drawn], layout=layout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=TINY_WAN)
    parser.add_argument("--recipe", default="balanced", help="a name or a YAML file")
    parser.add_argument("--set", default="{}", help='fields of the recipe as JSON, such as {"selection.density": 0.2}')
    parser.add_argument("--prompt", default="a large plain red circle moving right over a gray gradient")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True, help="the JSONL file to append to")
    for name in ("steps", "height", "width", "num_frames"):
        parser.add_argument(f"--{name}", type=int, default=None)
    options = parser.parse_args()
    results.load_rows(options.out)
    recipe = load_recipe(options.recipe).override(json.loads(options.set))
    sizes = {name: getattr(options, name) for name in ("steps", "height", "width", "num_frames")}
    request = Request(options.prompt, **sizes)
    pipe = load_pipeline(options.model, "cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    found: list[results.Row] = []
    for make in (
        attribute(pipe, request, recipe, model=options.model, repeats=options.repeats),
        lengths(pipe, request, recipe, model=options.model),
    ):
        for row in make:
            results.append_row(options.out, row)
            found.append(row)
    for line in summarize([row for row in found if row["kind"] == "e2e"]):
        print({name: round(value, 4) if isinstance(value, float) else value for name, value in line.items()})
    rungs = [row for row in found if row["kind"] == "length"]
    for row in rungs:
        print(row["arm"], row["tokens"], round(row["refresh"], 4) if row["status"] == "measured" else row["reason"])
    for arm in dict.fromkeys(row["arm"] for row in rungs):
        print("break-even,", arm, break_even(rungs, arm))


if __name__ == "__main__":
    main()
