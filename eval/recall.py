"""Mask recall: how much of whole attention lies on what a recipe computes, in a run of the recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sparse_dit.eval import results
from sparse_dit.eval.pair import asking
from sparse_dit.eval.probe import probed
from sparse_dit.pipelines.generate import Request, generate
from sparse_dit.pipelines.patch import sparse
from sparse_dit.recipe import Recipe

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def mask_recall(
    pipe: DiffusionPipeline,
    requests: Sequence[Request],
    recipe: Recipe,
    *,
    model: str = "",
    steps: Sequence[int],
    rows: int = 16,
) -> results.Row:
    """Generates with a recipe, one request after the other, and tells the mass that its masks keep.

    The mass is that of softmax over all keys, of the queries and keys that the run itself has: mean over sampled query
    rows, heads, layers, branches, the steps looked at and requests. Calls with whole attention are left out; a head
    that a profile skips keeps nothing. Nothing of size S x S exists.

    Args:
        pipe: a pipeline that is not sparse at the moment, not compiled.
        requests: what to generate.
        recipe: with what.
        model: the pipeline's name in the row.
        steps: denoising steps that are looked at.
        rows: query rows sampled in each call.

    Returns:
        A row: `id`, of what was asked; `recall`, or null where every call that was looked at was whole; `calls`, those
        looked at.

    Raises:
        ValueError: as `probed`.
    """
    heads = pipe.transformer.config.num_attention_heads
    kept, calls = 0.0, 0
    for request in requests:
        with sparse(pipe, recipe), probed(pipe, rows=rows, steps=steps) as found:
            generate(pipe, request)
        for one in (call for seen in found.calls.values() for call in seen):
            kept, calls = kept + float(one.recall.sum()) / heads, calls + 1
    return {
        "id": recall_id(pipe, requests, recipe, model, steps, rows),
        "model": model,
        "recipe": recipe.to_dict(),
        "prompts": [request.prompt for request in requests],
        "looked_at": list(steps),
        "rows": rows,
        "recall": kept / calls if calls else None,
        "calls": calls,
        "device": results.device_of(pipe.device, pipe.transformer.dtype),
        **results.provenance(),
    }


def recall_id(
    pipe: DiffusionPipeline, requests: Sequence[Request], recipe: Recipe, model: str, steps: Sequence[int], rows: int
) -> str:
    """The `id` of a row of `mask_recall`; arguments as there."""
    asked = [asking(pipe, request) for request in requests]
    return results.identity(model=model, recipe=recipe.computed(), asked=asked, looked_at=list(steps), rows=rows)
