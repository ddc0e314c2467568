"""Turns the knobs of contenders whose density the content decides, on captions that no table uses."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_dit.eval import results
from sparse_dit.eval.calibrate import Sampling, calibrate, calibration_prompts
from sparse_dit.eval.contenders import BLOCK, CONTENDERS, DENSITIES, Calibrated, Sought, dense_steps_of, small
from sparse_dit.pipelines.generate import Request, generate_batch
from sparse_dit.pipelines.patch import sparse, summary
from sparse_dit.pipelines.tiny_wan.grammar import draw_scene, held_out_prompts

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

NEAR = 0.004  # of the wanted density, half of what a comparison at equal run density allows
HALVINGS = 9
CALIBRATION_PROMPTS = "drawn:2"


def search_prompts(count: int) -> list[str]:
    """Captions of the training's kind that the tables do not use: nothing is chosen by what judges it."""
    rng = random.Random("search for presets")
    drawn: Iterator[str] = (draw_scene(rng).caption for _ in itertools.count())
    unused = (caption for caption in drawn if caption not in set(held_out_prompts(64)))
    return list(itertools.islice(unused, count))


def bisect(density_at: Callable[[float], float], knob: Sought, wanted: float) -> tuple[float, float]:
    """The value of a knob whose density is nearest to the wanted one, and that density.

    Args:
        density_at: density of a value; monotone, but for noise.
        knob: between which values, and whether density falls from one to the other.
        wanted: the density.
    """
    low, high = knob.low, knob.high
    tried: list[tuple[float, float]] = []
    for _ in range(HALVINGS):
        value = round((low + high) / 2, 4)
        tried.append((value, density_at(value)))
        above = tried[-1][1] > wanted
        if abs(tried[-1][1] - wanted) <= NEAR:
            break
        low, high = (low, value) if above != knob.falls else (value, high)
    return min(tried, key=lambda found: abs(found[1] - wanted))


def sought() -> list[str]:
    """Contenders with a knob that is bisected."""
    return [name for name, contender in CONTENDERS.items() if isinstance(contender.knob, Sought)]


def calibrated() -> list[str]:
    """Contenders with profiles."""
    return [name for name, contender in CONTENDERS.items() if isinstance(contender.knob, Calibrated)]


def turn(pipe: DiffusionPipeline, name: str, request: Request, prompts: Sequence[str], out: Path) -> None:
    """Bisects a contender's knob for every density and number of dense steps, and appends a row for each.

    Densities are those of the sparse calls of a whole run. Rows that `out` holds are not found again.

    Args:
        pipe: the model's pipeline.
        name: the contender.
        request: seed, steps and size; prompt number i has the request's seed + i.
        prompts: they share every run.
        out: the JSONL file.
    """
    knob = CONTENDERS[name].knob
    assert isinstance(knob, Sought)
    requests = [replace(request, prompt=prompt, seed=request.seed + number) for number, prompt in enumerate(prompts)]
    known = values(out)
    for wanted, dense_steps in itertools.product(DENSITIES, dense_steps_of(_steps(request))):
        if (name, wanted, dense_steps) in known:
            continue

        def density_at(value: float, wanted: float = wanted, dense_steps: int = dense_steps) -> float:
            with sparse(pipe, small(name, wanted, dense_steps, value)):
                generate_batch(pipe, requests)
                return summary(pipe).density or 1.0

        value, density = bisect(density_at, knob, wanted)
        found = {"contender": name, "wanted": wanted, "dense_steps": dense_steps, "setting": knob.setting}
        where = {"device": results.device_of(pipe.device, pipe.transformer.dtype), **results.provenance()}
        results.append_row(out, {**found, "value": value, "density": density, "prompts": list(prompts), **where})


def values(file: Path) -> dict[tuple[str, float, int], float]:
    """What `turn` found, by contender, density and number of dense steps."""
    rows = results.load_rows(file)
    return {(row["contender"], row["wanted"], row["dense_steps"]): row["value"] for row in rows}


def profile_path(folder: Path, name: str, density: float) -> Path:
    """Where the profile of a contender lies."""
    return folder / f"{name}-{density:g}.safetensors"


def make_profiles(pipe: DiffusionPipeline, name: str, request: Request, folder: Path) -> None:
    """Calibrates a contender's profiles, one a density, unless they are there.

    The searches are those of `sparse-dit calibrate`; what calls showed is looked at once for all densities where the
    search can settle them from the same findings.
    """
    knob = CONTENDERS[name].knob
    assert isinstance(knob, Calibrated)
    for density in DENSITIES:
        path = profile_path(folder, name, density)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            seen = folder / f"{name}.safetensors"
            calibrate(
                pipe,
                knob.search(density),
                calibration_prompts(CALIBRATION_PROMPTS),
                request,
                seen,
                model="tiny-wan",
                sampling=Sampling(block_q=BLOCK, block_k=BLOCK),
            )
            seen.replace(path)


def _steps(request: Request) -> int:
    if request.steps is None:
        raise ValueError("steps: None; valid: a whole number from 1")
    return request.steps
