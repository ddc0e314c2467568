"""Sweeps: many recipes on many prompts, one row each, resumable."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_dit.eval import results
from sparse_dit.eval.pair import DENSE, Comparison, against, asking, plan_arguments, run
from sparse_dit.pipelines.generate import Request
from sparse_dit.pipelines.patch import explain
from sparse_dit.pipelines.tiny_wan.grammar import held_out_prompts
from sparse_dit.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

HELD_OUT = "held-out:"


@dataclass(frozen=True)
class Failed:
    """A run of a sweep that gave no row.

    Args:
        recipe: its name.
        prompts: what it should have shown.
        reason: one line.
    """

    recipe: str
    prompts: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        return f"{self.recipe} failed: {self.reason} ({'; '.join(self.prompts)})"


def sweep(
    pipe: "DiffusionPipeline",
    model: str,
    recipes: Sequence[Recipe],
    prompts: Sequence[str],
    request: Request,
    out: Path,
    batch: int = 1,
) -> Iterator[results.Row | Failed]:
    """Compares every recipe with dense on every prompt and appends a row as soon as it is known.

    Prompt number i has the request's seed + i. A row that `out` already holds is not run again, so an interrupted sweep
    goes on where it stopped. A run that fails is told of, the rest goes on, and the next sweep tries it again. Weights
    are not looked at: a model that was trained anew needs a new file.

    Args:
        pipe: the model's pipeline.
        model: its name in the rows.
        recipes: what to compare with dense; each prompt has one dense run for all of them.
        prompts: what to generate.
        request: seed, steps and size; its prompt is not used.
        out: the JSONL file; lines in it that are no rows are passed over.
        batch: prompts that share a pipeline call.

    Yields:
        The rows that were missing, and what failed.

    Raises:
        ValueError: a batch below 1, or a recipe or request that does not fit the pipeline.
    """
    if batch < 1:
        raise ValueError(f"batch: {batch}; valid: a whole number from 1")
    done = {row.get("id") for row in results.read_rows(out)[0]}
    requests = [replace(request, prompt=prompt, seed=request.seed + number) for number, prompt in enumerate(prompts)]
    pending = []
    for one in requests:
        ids = [row_id(pipe, model, recipe, one) for recipe in recipes]
        if not done.issuperset(ids):
            pending.append((one, ids))
    for recipe in recipes:
        explain(pipe, recipe, **plan_arguments(pipe, request))  # one that does not fit is told before anything runs
    warm: set[int] = set()
    for first in range(0, len(pending), batch):
        part = pending[first : first + batch]
        missing = [index for index in range(len(recipes)) if any(ids[index] not in done for _, ids in part)]
        # Kernels and caches are warm after the first batch of a size.
        compared = _compared(
            pipe, [one for one, _ in part], [recipes[i] for i in missing], model, len(part) not in warm
        )
        warm.add(len(part))
        for index, comparisons in zip(missing, compared, strict=True):
            if isinstance(comparisons, Failed):
                yield comparisons
                continue
            for (_, ids), comparison in zip(part, comparisons, strict=True):
                if ids[index] not in done:
                    row = {"id": ids[index], **comparison.record}
                    results.append_row(out, row)
                    yield row


def _compared(
    pipe: "DiffusionPipeline", requests: Sequence[Request], recipes: Sequence[Recipe], model: str, warm_up: bool
) -> Iterator[list[Comparison] | Failed]:
    """For each recipe a comparison for each request, or why there is none."""
    prompts = tuple(one.prompt for one in requests)
    try:
        dense = run(pipe, requests, load_recipe(DENSE), warm_up=warm_up)
    except FAILURES as error:
        yield from [Failed(recipe.name, prompts, f"its dense run: {reason(error)}") for recipe in recipes]
        return
    for recipe in recipes:
        try:
            yield against(pipe, requests, recipe, dense, model=model, warm_up=warm_up)
        except FAILURES as error:
            yield Failed(recipe.name, prompts, reason(error))


FAILURES = (ValueError, RuntimeError)
"""What a run may end with while others go on: frames that are not finite, a GPU that is out of memory."""


def reason(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def row_id(pipe: "DiffusionPipeline", model: str, recipe: Recipe, request: Request) -> str:
    """What identifies a recipe's row of a request; the batch does not, as it changes a row by rounding only."""
    return results.identity(model=model, recipe=recipe.computed(), **asking(pipe, request))


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
