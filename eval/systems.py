"""Every published system, and ours, on tiny-wan: which keeps a clip nearest to the dense one for as much computing.

    python -m sparse_dit.eval.systems --processes 8

appends rows to three files in eval/results, and goes on where it stopped when it is started again. It goes in stages:

1. `prepare`, on captions that neither training nor any table uses: mixtures of our own are searched, as many blocks
   computed over the run as by AdaSpa with its one whole call, and mixtures with a cache, as many as with every fifth
   step whole; the best cache is taken apart (`eval.cache_worth`); knobs are turned, profiles are calibrated.
2. `table`, on 16 held-out captions: every contender (`eval.contenders`) at every density and share of dense first
   steps; and the mixture that the search found best for each density, with skipped blocks as summaries and dropped,
   and the best one with a cache.
3. `compare`: the same mixtures at the run density of every row of the table that has another one; and how much of whole
   attention the masks of all of them keep, on two captions of the search.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparse_dit.eval import cache_worth, contest, knobs, results
from sparse_dit.eval.contenders import (
    BLOCK,
    CONTENDERS,
    DENSITIES,
    PART,
    Calibrated,
    Sought,
    as_ours,
    at_run_density,
    cached,
    cached_mixtures,
    dense_steps_of,
    mixtures,
    searching,
    small,
    twin,
)
from sparse_dit.eval.recall import mask_recall, recall_id
from sparse_dit.eval.results import Row
from sparse_dit.eval.settings import settings
from sparse_dit.eval.sweep import Failed, sweep
from sparse_dit.pipelines.generate import Request, load_pipeline
from sparse_dit.pipelines.tiny_wan import DEFAULTS
from sparse_dit.pipelines.tiny_wan.grammar import held_out_prompts
from sparse_dit.recipe import Recipe
from sparse_dit.selection.dynamic import blocks_of_share

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

STAGES = ("prepare", "table", "compare")
STEPS = int(DEFAULTS["num_inference_steps"])
BLOCKS = 9 * 16 * 16 // BLOCK  # key blocks of a row
SEARCH_PROMPTS, RECALL_PROMPTS = 8, 2
LOOKED_AT = (6, 9, 13, 17)  # steps, for recall: none in which a contender computes whole attention
MODEL = "tiny-wan"


@dataclass(frozen=True)
class Files:
    """Where rows are read from and appended to.

    Args:
        table: rows of the table.
        search: rows of the search for mixtures of our own.
        knobs: what knobs were found to be.
        recall: what masks keep.
        profiles: the folder of calibrated profiles.
    """

    table: Path
    search: Path
    knobs: Path
    recall: Path
    profiles: Path


@dataclass(frozen=True)
class Sweep:
    """Recipes that are compared with dense on prompts.

    Args:
        recipes: which.
        prompts: on what; they share every pipeline call.
        out: the JSONL file of the rows.
    """

    recipes: list[Recipe]
    prompts: list[str]
    out: Path


@dataclass
class Runs:
    """Tasks of the stages on a pipeline that is loaded when the first one runs.

    Args:
        files: of the rows.
        prompts: of the table.
    """

    files: Files
    prompts: int = 16
    searched: int = SEARCH_PROMPTS

    @cached_property
    def pipe(self) -> DiffusionPipeline:
        """tiny-wan, on the GPU where there is one."""
        return load_pipeline(MODEL, "cuda" if torch.cuda.is_available() else "cpu")

    @property
    def request(self) -> Request:
        """What all runs share; prompts and seeds come on top."""
        return Request(prompt="", steps=STEPS)

    def run(self, stage: str, share: int, shares: int) -> None:
        """Does one of so many shares of a stage, each in a process of its own or one after the other.

        Args:
            stage: one of `STAGES`.
            share: from 1 to `shares`.
        """
        sweep_of, tasks = {"prepare": self._prepare, "table": self._table, "compare": self._compare}[stage]()
        for task in tasks[share - 1 :: shares]:
            task()
        recipes = sweep_of.recipes[share - 1 :: shares]
        if recipes:
            batch = len(sweep_of.prompts)
            for row in sweep(self.pipe, MODEL, recipes, sweep_of.prompts, self.request, sweep_of.out, batch=batch):
                if isinstance(row, Failed):
                    print(row, flush=True)
                    continue
                print(f"{row['recipe']['name']} run density {row['run_density']:.3f} {row['psnr']:.2f} dB", flush=True)

    def _prepare(self) -> tuple[Sweep, list[Callable[[], None]]]:
        prompts = knobs.search_prompts(self.searched)
        tasks: list[Callable[[], None]] = [partial(self._profiles, name) for name in knobs.calibrated()]
        tasks += [partial(self._knob, name, prompts) for name in knobs.sought()]
        recipes = [*searched_recipes(), *searched_caches(), *cache_worth.recipes(STEPS, BLOCKS)]
        return Sweep(recipes, prompts, self.files.search), tasks

    def _profiles(self, name: str) -> None:
        knobs.make_profiles(self.pipe, name, self.request, self.files.profiles)

    def _knob(self, name: str, prompts: Sequence[str]) -> None:
        knobs.turn(self.pipe, name, self.request, prompts, self.files.knobs)

    def _table(self) -> tuple[Sweep, list[Callable[[], None]]]:
        recipes = list(table_recipes(knobs.values(self.files.knobs), self.files.profiles))
        searched = results.load_rows(self.files.search)
        recipes += our_recipes(winners(searched), best_cache(searched))
        return Sweep(recipes, held_out_prompts(self.prompts), self.files.table), []

    def _compare(self) -> tuple[Sweep, list[Callable[[], None]]]:
        # Nothing here may depend on rows that this stage appends: its shares are cut in several processes.
        searched = results.load_rows(self.files.search)
        equal = equal_recipes(results.load_rows(self.files.table), winners(searched), best_cache(searched))
        tabled, _ = self._table()
        masks = {json.dumps(recipe.to_dict()): recipe for recipe in tabled.recipes if recipe.precision == "native"}
        tasks: list[Callable[[], None]] = [partial(self._recall, recipe) for recipe in masks.values()]
        return Sweep(equal, tabled.prompts, self.files.table), tasks

    def _recall(self, recipe: Recipe) -> None:
        prompts = knobs.search_prompts(RECALL_PROMPTS)
        requests = [replace(self.request, prompt=prompt, seed=number) for number, prompt in enumerate(prompts)]
        asked = recall_id(self.pipe, requests, recipe, MODEL, LOOKED_AT, rows=16)
        if asked not in {row["id"] for row in results.load_rows(self.files.recall)}:
            row = mask_recall(self.pipe, requests, recipe, model=MODEL, steps=LOOKED_AT)
            results.append_row(self.files.recall, row)
            print(f"{recipe.name} recall {row['recall']}", flush=True)


def searched_recipes() -> Iterator[Recipe]:
    """Every mixture of our own, and AdaSpa, at every density with the first step whole."""
    for density in DENSITIES:
        yield small("adaspa", density, 0, None)
        for name in mixtures():
            recipe = at_run_density(name, (1 + (STEPS - 1) * _kept(density)) / STEPS, 1, STEPS, BLOCKS)
            assert recipe is not None
            yield recipe


def searched_caches() -> Iterator[Recipe]:
    """Every mixture with a cache, for every density at the run density of a budget with every fifth step whole."""
    for density, name in itertools.product(DENSITIES, cached_mixtures()):
        recipe = cached(name, _caching(density), STEPS, BLOCKS)
        if recipe is not None:
            yield recipe


def _caching(density: float) -> float:
    whole = STEPS // 5
    return (whole + (STEPS - whole) * _kept(density)) / STEPS


def _kept(density: float) -> float:
    """The density of whole blocks that a budget comes to."""
    return blocks_of_share(density, BLOCKS) / BLOCKS


def winners(rows: Iterable[Row]) -> dict[float, str]:
    """The mixture with the highest mean PSNR in the search, by density; none that searches masses itself.

    Such a search passes over all keys, which no density counts: at equal run density it would have computed more.

    Raises:
        ValueError: there are no rows of a density.
    """
    found: dict[tuple[float, str], list[float]] = defaultdict(list)
    names = {name for name in mixtures() if not searching(name)}
    for row in rows:
        for density in DENSITIES:
            searched = abs(row["run_density"] - (1 + (STEPS - 1) * _kept(density)) / STEPS) < contest.NEAR
            if searched and row["recipe"]["name"] in names:
                found[density, row["recipe"]["name"]].append(row["psnr"])
    means = {key: statistics.fmean(values) for key, values in found.items()}
    for density in DENSITIES:
        if not any(key[0] == density for key in means):
            raise ValueError(f"search: no rows at density {density:g}; valid: rows of the stage prepare")
    return {
        density: max((key for key in means if key[0] == density), key=lambda key: means[key])[1]
        for density in DENSITIES
    }


def best_cache(rows: Iterable[Row]) -> str:
    """The mixture with a cache with the highest PSNR in the search, mean over the densities at which all were run.

    Raises:
        ValueError: there are no rows of one.
    """
    found: dict[str, dict[float, list[float]]] = {name: defaultdict(list) for name in cached_mixtures()}
    for row in rows:
        for density in DENSITIES:
            if row["recipe"]["name"] in found and abs(row["run_density"] - _caching(density)) < contest.NEAR:
                found[row["recipe"]["name"]][density].append(row["psnr"])
    means = {
        name: statistics.fmean(statistics.fmean(values) for values in by_density.values())
        for name, by_density in found.items()
        if set(by_density) == set(DENSITIES)
    }
    if not means:
        raise ValueError("search: no mixture with a cache has rows at all densities; valid: rows of the stage prepare")
    return max(means, key=lambda name: means[name])


def table_recipes(found: Mapping[tuple[str, float, int], float], profiles: Path) -> Iterator[Recipe]:
    """Every contender at every density and number of dense first steps, and some of them in INT8.

    Args:
        found: what knobs were found to be (`knobs.values`).
        profiles: the folder of profiles.

    Raises:
        ValueError: a knob was not found yet.
    """
    for (name, contender), density, dense_steps in itertools.product(
        CONTENDERS.items(), DENSITIES, dense_steps_of(STEPS)
    ):
        value: Any = None
        if isinstance(contender.knob, Calibrated):
            value = str(knobs.profile_path(profiles, name, density))
        elif isinstance(contender.knob, Sought):
            value = found.get((name, density, dense_steps))
            if value is None:
                raise ValueError(f"knobs: none of {name} at density {density:g}; valid: rows of the stage prepare")
        recipe = small(name, density, dense_steps, value)
        yield recipe
        for precision in contender.precisions:
            yield recipe.override({"precision": precision})


def our_recipes(found: Mapping[float, str], cache: str) -> list[Recipe]:
    """The mixtures that were found, with summaries and without and with a cache, at the densities of the table.

    One that searches makes its first call whole, so its budget is that much smaller.

    Args:
        found: as `winners`.
        cache: as `best_cache`.
    """
    recipes = []
    for (density, name), dense_steps in itertools.product(found.items(), dense_steps_of(STEPS)):
        run_density = (dense_steps + (STEPS - dense_steps) * _kept(density)) / STEPS
        recipes += _both(name, run_density, dense_steps)
        recipes += _cached(cache, run_density, 1, PART)
    return recipes


def equal_recipes(rows: Iterable[Row], found: Mapping[float, str], cache: str) -> list[Recipe]:
    """The mixtures that were found at the run density, and with the whole steps, of every other setting in the rows.

    Low precision is compared with native one of the same recipe, not with ours.

    Args:
        rows: of the table.
        found, cache: as `our_recipes`.
    """
    others = [row for row in rows if row["recipe"]["precision"] == "native" and row["recipe"]["name"] in CONTENDERS]
    recipes = []
    for setting in settings(others):
        name = found[contest.near(setting)]
        wanted = contest.run_density(setting), contest.whole_steps(setting)
        recipes += _both(name, *wanted)
        recipes += _cached(cache, wanted[0], *((1, PART) if contest.caches(setting) else (1,)))
    return list({json.dumps(recipe.to_dict()): recipe for recipe in recipes}.values())


def _both(name: str, run_density: float, whole_steps: int) -> list[Recipe]:
    made = (at_run_density(each, run_density, whole_steps, STEPS, BLOCKS) for each in (name, twin(name)))
    return [as_ours(recipe) for recipe in made if recipe is not None]


def _cached(name: str, run_density: float, *parts: int) -> list[Recipe]:
    made = (cached(name, run_density, STEPS, BLOCKS, part) for part in parts)
    return [as_ours(recipe) for recipe in made if recipe is not None]


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results_folder = Path("eval/results")
    for name, file in (
        ("table", "systems-tiny-wan.jsonl"),
        ("search", "search-tiny-wan.jsonl"),
        ("knobs", "systems-knobs.jsonl"),
        ("recall", "systems-recall.jsonl"),
    ):
        parser.add_argument(f"--{name}", type=Path, default=results_folder / file, help=f"JSONL file, {file}")
    parser.add_argument("--profiles", type=Path, default=Path("outputs/systems"), help="folder of calibrated profiles")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--processes", type=int, default=1, help="that share the GPU")
    parser.add_argument("--share", type=int, help="do this share of --processes only, in this process")
    options = parser.parse_args()
    files = Files(options.table, options.search, options.knobs, options.recall, options.profiles)
    for stage in options.stages:
        if options.share is not None or options.processes == 1:
            Runs(files, options.prompts).run(stage, options.share or 1, options.processes)
            continue
        command = [sys.executable, "-m", "sparse_dit.eval.systems", *sys.argv[1:], "--stages", stage, "--share"]
        children = [subprocess.Popen([*command, str(share + 1)]) for share in range(options.processes)]
        if failed := [child for child in children if child.wait()]:
            sys.exit(f"{stage}: {len(failed)} of {len(children)} processes failed")


if __name__ == "__main__":
    main()
