"""Holds `sparse-dit tune` against an exhaustive search, on tiny-wan, and appends what was found as rows.

    python -m sparse_dit.eval.tune_trial whole --prompts 16 --out eval/results/tune-trial.jsonl
    python -m sparse_dit.eval.tune_trial replay --out eval/results/tune-trial.jsonl

`whole` runs every candidate of a space on every prompt, then lets `Tuner` search at several floors, and sets its answer
beside the best of the exhaustive search; times of attention are measured once, so that both judge by the same ones. The
runs that a search asks for are read from the exhaustive one's rows, and counted. Started again, it goes on where it
stopped.

`replay` searches in rows of settings that ran on the same prompts, at random floors and with prompts in random orders,
with the times of attention measured here; settings that are slower than dense attention stay in but for `--faster`, as
it is the search that is judged. With `--candidates` each search has a space of so many, drawn at random. It runs no
model but for those times. `near` counts answers above the floor within 3 % of the best of the exhaustive search, with a
fifth of its runs at most, and without that limit.
"""

import argparse
import json
import math
import random
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from sparse_dit.eval import results
from sparse_dit.eval.calibrate import calibration_prompts
from sparse_dit.eval.pair import asking
from sparse_dit.eval.search import Search
from sparse_dit.eval.space import load_space
from sparse_dit.eval.tune import Floor, Limits, Tuner
from sparse_dit.pipelines.generate import TINY_WAN, Request, load_pipeline
from sparse_dit.recipe import load_recipe

NEAR = 1.03
SHARE = 0.2


def best_of(costs: Sequence[float], means: Sequence[float], floor: float) -> int | None:
    """What an exhaustive search finds: the cheapest at or above the floor."""
    above = [number for number, mean in enumerate(means) if mean >= floor]
    return min(above, key=lambda number: costs[number], default=None)


def judge(costs: Sequence[float], means: Sequence[float], floor: float, answer: int | None) -> results.Row:
    """An answer beside that of the exhaustive search."""
    best = best_of(costs, means, floor)
    if best is None or answer is None:
        return {"floor": floor, "best": best, "answer": answer, "ratio": None, "near": best is None and answer is None}
    ratio = costs[answer] / costs[best]
    near = means[answer] >= floor and ratio <= NEAR
    return {"floor": floor, "best": best, "answer": answer, "ratio": ratio, "quality": means[answer], "near": near}


def whole(options: argparse.Namespace, request: Request) -> results.Row:
    """An exhaustive search in earnest, and searches beside it."""
    pipe = load_pipeline(TINY_WAN, "cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    prompts = calibration_prompts(options.drawn or f"drawn:{options.prompts}")
    candidates = load_space(options.space, asking(pipe, request)["steps"])
    out = options.folder / "tuned.yaml"
    tuner = Tuner(pipe, TINY_WAN, request, out, tell=lambda line: print(line, flush=True))
    costs = tuner.costs([candidate.recipe for candidate in candidates], replace(request, prompt=prompts[0]))
    known = [number for number, cost in enumerate(costs) if cost is not None and cost < 1]
    chosen = [candidates[number] for number in known]
    if not chosen:
        raise ValueError(f"space: {options.space!r} has nothing that is faster than dense attention here")
    tuner.exhaust(chosen, prompts)
    rows = [tuner.rows_of(candidate.recipe, prompts) for candidate in chosen]
    assert all(len(found) == len(prompts) for found in rows), tuner.complaints
    means = [statistics.fmean(min(row["psnr"], 100.0) for row in found) for found in rows]
    times = [cost for cost in costs if cost is not None and cost < 1]
    limit = int(SHARE * len(chosen) * len(prompts))
    found = []
    for floor in options.floors:
        tuned = Tuner(pipe, TINY_WAN, request, out, tell=lambda line: None).tune(
            chosen, prompts, Floor("psnr", floor), Limits(runs=limit)
        )
        answer = None if tuned.answer is None else tuned.answer.candidate
        found.append({**judge(times, means, floor, answer), "runs": tuned.runs, "stopped": tuned.stopped or None})
    asked = asking(pipe, request)
    asked.pop("prompt")
    seconds = sum(row["seconds_sparse"] for each in rows for row in each)
    return {
        "candidates": [candidate.label for candidate in chosen],
        "left_out": len(candidates) - len(chosen),
        "attention_times": times,
        "psnr": means,
        "prompts": len(prompts),
        "exhaustive_runs": len(chosen) * len(prompts),
        "exhaustive_seconds": seconds,
        "searches": found,
        "near": sum(search["near"] for search in found),
        **asked,
        "device": results.device_of(pipe.device, pipe.transformer.dtype),
    }


def replay(options: argparse.Namespace, request: Request) -> results.Row:
    """Many searches in the rows of an exhaustive one."""
    groups: dict[str, dict[int, float]] = defaultdict(dict)
    for row in results.load_rows(options.rows):
        if row["recipe"]["precision"] == "native":
            groups[json.dumps(row["recipe"], sort_keys=True)][row["seed"]] = row["psnr"]
    prompts = max(len(found) for found in groups.values())
    whole_ones = {recipe: found for recipe, found in groups.items() if len(found) == prompts}
    recipes = [load_recipe(json.loads(recipe)) for recipe in whole_ones]
    pipe = load_pipeline(TINY_WAN, "cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    tuner = Tuner(pipe, TINY_WAN, request, options.folder / "replay.yaml")
    costs = tuner.costs(recipes, replace(request, prompt=calibration_prompts("drawn:1")[0]))
    most = 1.0 if options.faster else math.inf
    usable = [number for number, cost in enumerate(costs) if cost is not None and cost < most]
    times = [costs[number] or 0.0 for number in usable]
    psnr = [[whole_ones[recipe][seed] for seed in range(prompts)] for recipe in whole_ones]
    psnr = [psnr[number] for number in usable]
    alike = tuner.alike([recipes[number] for number in usable], times)
    means = [statistics.fmean(values) for values in psnr]
    count, chance = options.candidates or len(usable), random.Random(0)
    limit = int(SHARE * count * prompts)
    limited: list[results.Row] = []
    free: list[results.Row] = []
    for _ in range(options.searches):
        space = chance.sample(range(len(usable)), count) if options.candidates else list(range(len(usable)))
        known, good = [times[number] for number in space], [means[number] for number in space]
        floor, order = chance.uniform(min(good), max(good)), chance.sample(range(prompts), prompts)
        search, runs, early = Search(known, floor, prompts, alike[np.ix_(space, space)]), 0, None
        for candidate, prompt in search.runs():
            if runs == limit:
                early = _found(search, known, good, runs)
            search.tell(candidate, prompt, psnr[space[candidate]][order[prompt]])
            runs += 1
        free.append(_found(search, known, good, runs))
        limited.append(early or free[-1])
    return {
        "rows": options.rows.name,
        "candidates": count,
        "drawn_from": len(usable),
        "slower_than_dense": sum(cost is not None and cost >= 1 for cost in costs),
        "prompts": prompts,
        "exhaustive_runs": count * prompts,
        "searches": options.searches,
        "limited": {"limit": SHARE, **_counted(limited, count * prompts)},
        "free": _counted(free, count * prompts),
        "attention_time_least": min(times),
        "device": results.device_of(pipe.device, pipe.transformer.dtype),
    }


def _found(search: Search, costs: Sequence[float], means: Sequence[float], runs: int) -> results.Row:
    answer = search.answer()
    return {**judge(costs, means, search.floor, None if answer is None else answer.candidate), "runs": runs}


def _counted(searches: Sequence[results.Row], exhaustive: int) -> results.Row:
    """How many answers are near, and what they took, as shares of the runs of an exhaustive search."""
    shares = [search["runs"] / exhaustive for search in searches]
    return {
        "near": sum(search["near"] for search in searches),
        "share_mean": statistics.fmean(shares),
        "share_most": max(shares),
        "misses": [search for search in searches if not search["near"]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trial", choices=["whole", "replay"])
    parser.add_argument("--out", type=Path, required=True, help="the JSONL file to append to")
    parser.add_argument("--folder", type=Path, default=Path("outputs/tune-trial"), help="rows of runs, and of costs")
    parser.add_argument("--space", default=TINY_WAN, help="whole: a name or YAML file")
    parser.add_argument("--prompts", type=int, default=16, help="whole: how many drawn captions")
    parser.add_argument("--drawn", default="", help="whole: other prompts, as sparse-dit tune takes them")
    parser.add_argument("--floors", type=float, nargs="+", default=[24.0, 26.0, 28.0, 30.0], help="whole: dB")
    parser.add_argument("--rows", type=Path, default=Path("eval/results/systems-tiny-wan.jsonl"), help="replay")
    parser.add_argument(
        "--faster", action="store_true", help="replay: leave out what is no faster than dense attention"
    )
    parser.add_argument("--searches", type=int, default=300, help="replay: how many")
    parser.add_argument("--candidates", type=int, default=0, help="replay: draw so many for each search; 0 is all")
    for name in ("steps", "height", "width", "num_frames"):
        parser.add_argument(f"--{name}", type=int, default=None)
    options = parser.parse_args()
    results.load_rows(options.out)
    options.folder.mkdir(parents=True, exist_ok=True)
    request = Request(
        "", steps=options.steps, height=options.height, width=options.width, num_frames=options.num_frames
    )
    row = {"trial": options.trial, **{"whole": whole, "replay": replay}[options.trial](options, request)}
    results.append_row(options.out, {**row, **results.provenance()})
    print(results.to_json(row, indent=2))


if __name__ == "__main__":
    main()
