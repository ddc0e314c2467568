"""Finds the transformers of a pipeline and their self-attention layers."""

from typing import Any

import torch

from sparse_dit.pipelines.families import FAMILIES, Family
from sparse_dit.recipe import Recipe
from sparse_dit.selection import Profiled

# Wan 2.2 has two, for high and for low noise.
TRANSFORMERS = ("transformer", "transformer_2")


def transformers_of(pipe: object) -> dict[str, torch.nn.Module]:
    """The transformers of a pipeline by name, taken out of `torch.compile`'s wrapper.

    Args:
        pipe: a diffusers pipeline, or a bare transformer.

    Raises:
        ValueError: there is none.
    """
    if isinstance(pipe, torch.nn.Module):
        modules: dict[str, Any] = {"transformer": pipe}
    else:
        modules = {name: getattr(pipe, name, None) for name in TRANSFORMERS}
    found = {
        name: getattr(module, "_orig_mod", module)
        for name, module in modules.items()
        if isinstance(module, torch.nn.Module)
    }
    if not found:
        raise ValueError(
            f"pipe: {type(pipe).__name__} has no transformer; valid: a diffusers pipeline with one of "
            f"{', '.join(FAMILIES)}, or the transformer itself"
        )
    return found


def layers_of(transformer: torch.nn.Module, family: Family, recipe: Recipe) -> dict[str, torch.nn.Module]:
    """The self-attention layers by module path, in execution order.

    Raises:
        ValueError: there is none, a dense layer of the recipe is not among them, or its profile is of another model.
    """
    attentions = family.attentions(transformer)
    beyond = [layer for layer in recipe.schedule.dense_layers if layer >= len(attentions)]
    if beyond:
        raise ValueError(
            f"schedule.dense_layers: {beyond}; valid: 0 to {len(attentions) - 1} for this {type(transformer).__name__}"
        )
    if isinstance(recipe.selection, Profiled):
        recipe.selection.profile.check_model(type(transformer).__name__, len(attentions))
    return attentions
