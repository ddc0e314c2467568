"""Paired runs: dense and sparse from the same noise, so that every difference comes from the recipe.

Several prompts may share a pipeline call: each keeps the noise that it has alone, so that its figures are those of a
run of its own up to rounding. Seconds and calls are those of the whole batch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from sparse_dit.eval import metrics, results
from sparse_dit.pipelines.generate import Frames, Request, batch_arguments, call_arguments, generate_batch
from sparse_dit.pipelines.patch import Summary, explain, sparse, summary
from sparse_dit.recipe import Recipe, load_recipe
from sparse_dit.schedule import Schedule

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

DENSE = "dense"
"""The recipe whose every call runs the pipeline's own attention: the reference, timed by the same clock."""


@dataclass(frozen=True)
class Run:
    """One timed pipeline call.

    Args:
        frames: a clip [F, H, W, C] in 0..1 for each request, before any codec.
        seconds: wall time of the whole pipeline call, text encoder and VAE included.
        summary: what the self-attention layers did.
    """

    frames: list[Frames]
    seconds: float
    summary: Summary


@dataclass(frozen=True)
class Comparison:
    """A dense and a sparse run of one request.

    Args:
        dense: frames of the dense run.
        sparse: frames of the sparse run.
        record: a result row: what was asked, quality against dense, seconds, calls, versions, device.
    """

    dense: Frames
    sparse: Frames
    record: results.Row


def compare(
    pipe: DiffusionPipeline,
    request: Request,
    recipes: Sequence[Recipe],
    *,
    model: str = "",
    warm_up: bool = True,
) -> Iterator[Comparison]:
    """Runs a request dense once, then with each recipe, always from the same noise.

    Args:
        pipe: a pipeline that is not sparse at the moment.
        request: what to generate.
        recipes: what to compare with dense.
        model: the pipeline's name in the records.
        warm_up: run one unmeasured step before each measured run: first calls compile kernels and fill caches.

    Yields:
        A comparison for each recipe, in their order.

    Raises:
        ValueError: a recipe does not fit the pipeline, the request does not, or frames are not finite.
    """
    for [comparison] in compare_batch(pipe, [request], recipes, model=model, warm_up=warm_up):
        yield comparison


def compare_batch(
    pipe: DiffusionPipeline,
    requests: Sequence[Request],
    recipes: Sequence[Recipe],
    *,
    model: str = "",
    warm_up: bool = True,
) -> Iterator[list[Comparison]]:
    """`compare` for several requests that share every pipeline call; they differ in prompts and seeds only.

    Yields:
        For each recipe, in their order, a comparison for each request.

    Raises:
        ValueError: as `compare`, no request, or requests that cannot share a call.
    """
    batch_arguments(pipe, requests)
    for recipe in recipes:
        explain(pipe, recipe, **plan_arguments(pipe, requests[0]))  # one that does not fit is told before anything runs
    dense = run(pipe, requests, load_recipe(DENSE), warm_up=warm_up)
    for recipe in recipes:
        yield against(pipe, requests, recipe, dense, model=model, warm_up=warm_up)


def against(
    pipe: DiffusionPipeline,
    requests: Sequence[Request],
    recipe: Recipe,
    dense: Run,
    *,
    model: str = "",
    warm_up: bool = True,
) -> list[Comparison]:
    """Runs a recipe and compares it with a dense run of the same requests that was made before.

    Returns:
        A comparison for each request.

    Raises:
        ValueError: as `compare_batch`.
    """
    plan = explain(pipe, recipe, **plan_arguments(pipe, requests[0]))
    done = run(pipe, requests, recipe, warm_up=warm_up)
    shared = {
        "batch": len(requests),
        **_cost(done, dense),
        "device": results.device_of(pipe.device, pipe.transformer.dtype),
        **results.provenance(),
    }
    return [
        Comparison(
            reference,
            frames,
            {
                "model": model,
                "recipe": recipe.to_dict(),
                **asking(pipe, request),
                "grid": list(plan.grid),
                **metrics.measure(frames, reference),
                **shared,
            },
        )
        for request, frames, reference in zip(requests, done.frames, dense.frames, strict=True)
    ]


def run(pipe: DiffusionPipeline, requests: Sequence[Request], recipe: Recipe, *, warm_up: bool = True) -> Run:
    """Generates once with a recipe, timed, and leaves the pipeline as it was.

    Raises:
        ValueError: as `compare_batch`.
    """
    if warm_up:
        # Without its schedule: the step must reach the sparse kernel even where the first steps are dense.
        with sparse(pipe, replace(recipe, schedule=Schedule())), _progress(pipe, disable=True):
            generate_batch(pipe, [replace(request, steps=1) for request in requests])
    with sparse(pipe, recipe, timing=True), _progress(pipe, desc=recipe.name):
        _wait(pipe)
        start = time.perf_counter()
        frames = generate_batch(pipe, requests)
        _wait(pipe)
        return Run(frames, time.perf_counter() - start, summary(pipe))


def asking(pipe: DiffusionPipeline, request: Request) -> results.Row:
    """What a request asks of this pipeline, the model's defaults filled in, as a record names it."""
    arguments = call_arguments(pipe, request)
    arguments["steps"] = arguments.pop("num_inference_steps")
    return {"seed": request.seed, **arguments}


def plan_arguments(pipe: DiffusionPipeline, request: Request) -> dict[str, int]:
    """What `explain` needs to know of a request: size and steps; images have no number of frames.

    Raises:
        ValueError: the request leaves the size to a pipeline whose call has no default for it.
    """
    arguments = call_arguments(pipe, request)
    for name in ("height", "width"):
        if name not in arguments:
            raise ValueError(f"{name}: {type(pipe).__name__} has no default for it; valid: a whole number from 1")
    names = ("height", "width", "num_frames", "num_inference_steps")
    return {name: arguments[name] for name in names if name in arguments}


def _cost(sparse_run: Run, dense: Run) -> results.Row:
    done = sparse_run.summary
    return {
        "density": done.density,
        "run_density": done.run_density,
        "seconds_dense": dense.seconds,
        "seconds_sparse": sparse_run.seconds,
        "attention_seconds_dense": dense.summary.attention_seconds,
        "attention_seconds_sparse": done.attention_seconds,
        "calls": {"planned": done.planned, "made": done.made, "sparse": done.sparse, "dense": done.dense},
        "backend": done.backend,
    }


@contextmanager
def _progress(pipe: DiffusionPipeline, **settings: Any) -> Iterator[None]:
    """Settings of the pipeline's own progress bar, for a while."""
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**before, **settings})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


def _wait(pipe: DiffusionPipeline) -> None:
    """Lets the device finish what it was given, so that the clock reads work done and not work queued."""
    if pipe.device.type == "cuda":
        torch.cuda.synchronize(pipe.device)
