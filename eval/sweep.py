"""Sweeps: many recipes on many prompts, one row each, resumable."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_dit.eval import results
from sparse_dit.eval.pair import asking, compare_batch
from sparse_dit.pipelines.generate import Request
from sparse_dit.pipelines.tiny_wan.grammar import held_out_prompts
from sparse_dit.recipe import Recipe

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

HELD_OUT = "held-out:"


def sweep(
    pipe: "DiffusionPipeline",
    model: str,
    recipes: Sequence[Recipe],
    prompts: Sequence[str],
    request: Request,
    out: Path,
    batch: int = 1,
) -> Iterator[results.Row]:
    """Compares every recipe with dense on every prompt and appends a row as soon as it is known.

    Prompt number i has the request's seed + i. A row that `out` already holds is not run again, so an interrupted sweep
    goes on where it stopped. Weights are not looked at: a model that was trained anew needs a new file.

    Args:
        pipe: the model's pipeline.
        model: its name in the rows.
        recipes: what to compare with dense; each prompt has one dense run for all of them.
        prompts: what to generate.
        request: seed, steps and size; its prompt is not used.
        out: the JSONL file.
        batch: prompts that share a pipeline call.

    Yields:
        The rows that were missing.

    Raises:
        ValueError: a batch below 1, or as `compare` and `sparse_dit.eval.results.load_rows`.
    """
    if batch < 1:
        raise ValueError(f"batch: {batch}; valid: a whole number from 1")
    done = {row.get("id") for row in results.load_rows(out)}
    requests = [replace(request, prompt=prompt, seed=request.seed + number) for number, prompt in enumerate(prompts)]
    asked = [(one, _ids(pipe, model, recipes, one)) for one in requests]
    pending = [(one, ids) for one, ids in asked if not done.issuperset(ids)]
    warm: set[int] = set()
    for first in range(0, len(pending), batch):
        part = pending[first : first + batch]
        missing = [index for index in range(len(recipes)) if any(ids[index] not in done for _, ids in part)]
        comparisons = compare_batch(
            pipe,
            [one for one, _ in part],
            [recipes[index] for index in missing],
            model=model,
            warm_up=len(part) not in warm,  # kernels and caches are warm after the first batch of a size
        )
        warm.add(len(part))
        for index, compared in zip(missing, comparisons, strict=True):
            for (_, ids), comparison in zip(part, compared, strict=True):
                if ids[index] in done:
                    continue
                row = {"id": ids[index], **comparison.record}
                results.append_row(out, row)
                yield row


def _ids(pipe: "DiffusionPipeline", model: str, recipes: Sequence[Recipe], request: Request) -> list[str]:
    """What identifies each recipe's row of a request; the batch does not, as it changes a row by rounding only."""
    asked = asking(pipe, request)
    return [results.identity(model=model, recipe=recipe.to_dict(), **asked) for recipe in recipes]


def grid(recipe: Recipe, densities: Sequence[float], dense_fractions: Sequence[float], steps: int) -> list[Recipe]:
    """The recipe at every density with every share of its first steps dense.

    Args:
        recipe: its selection must have a density, where densities are given.
        densities: in (0, 1]; none leaves the selection as it is.
        dense_fractions: in [0, 1], rounded to whole steps; none leaves the schedule as it is.
        steps: denoising steps of a run.

    Raises:
        ValueError: a fraction out of its range, or what `Recipe.override` refuses.
    """
    for fraction in dense_fractions:
        if not 0 <= fraction <= 1:
            raise ValueError(f"dense_fractions: {fraction}; valid: a number from 0 to 1")
    by_density = [{"selection.density": density} for density in densities] or [{}]
    by_fraction = [{"schedule.dense_steps": round(fraction * steps)} for fraction in dense_fractions] or [{}]
    return [recipe.override({**selection, **schedule}) for selection in by_density for schedule in by_fraction]


def read_prompts(source: str) -> list[str]:
    """Prompts from `held-out:N`, the first N that tiny-wan never saw in training, or from a text file, one a line.

    Raises:
        ValueError: neither, or no prompt.
    """
    if source.startswith(HELD_OUT):
        count = source.removeprefix(HELD_OUT)
        if not count.isdecimal() or int(count) < 1:
            raise ValueError(f"prompts: {source!r}; valid: {HELD_OUT}N with N from 1")
        return held_out_prompts(int(count))
    try:
        lines = Path(source).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"prompts: cannot read {source!r} ({type(error).__name__}); valid: {HELD_OUT}N or a text file"
        ) from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"prompts: {source!r} is empty; valid: one prompt a line")
    return prompts
