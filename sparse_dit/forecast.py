"""What is known of a recipe before it runs: its density and what its layers will keep."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from sparse_dit.calls import plan
from sparse_dit.layout import TokenLayout
from sparse_dit.orders import Clusters
from sparse_dit.recipe import Recipe
from sparse_dit.selection import Dynamic, Every
from sparse_dit.skipped import Reuse

GIB = 2**30


def is_dense(recipe: Recipe) -> bool:
    """Whether a recipe asks for nothing but the model's own dense attention."""
    return isinstance(recipe.selection, Every) and recipe.precision == "native"


def whole_steps(recipe: Recipe, sparse_steps: Iterable[int]) -> set[int]:
    """Which of a layer's sparse calls will be whole ones, as a search or a cache needs them.

    Args:
        recipe: the method.
        sparse_steps: the steps in which the schedule lets the layer be sparse, ascending.
    """
    caches = isinstance(recipe.skipped, Reuse)
    searches = isinstance(recipe.selection, Dynamic) and recipe.selection.needs_lse
    whole: set[int] = set()
    last = None
    for step in sparse_steps:
        if recipe.schedule.refreshes(step, last):
            if caches or (searches and last is None):
                whole.add(step)
            last = step
    return whole


@dataclass(frozen=True)
class Forecast:
    """What is known of a recipe before it runs.

    Attributes:
        density: computed tile area over full area of a sparse call; exact for static selections, for dynamic ones with
            a budget to within the ragged end of the sequence; `None` when the content decides.
        list_bytes: block lists and tables of token ids that all layers share; 0 for a dynamic selection.
        kept_bytes: what all layers keep between steps, over all branches.
        summary_density: what summaries of skipped blocks add to the area that a sparse call computes, one key for each
            skipped block: (1 - density) / block_k, or 1 / block_k, the most it can be, when the content decides.
    """

    density: float | None
    list_bytes: int
    kept_bytes: int
    summary_density: float = 0.0

    @property
    def state_bytes(self) -> int:
        """Both kinds of bytes."""
        return self.list_bytes + self.kept_bytes

    def check(self, recipe: Recipe) -> None:
        """Raises ValueError when layers would keep more than `recipe.state_limit`."""
        if recipe.state_limit is not None and self.kept_bytes > recipe.state_limit * GIB:
            raise ValueError(
                f"state_limit: {recipe.state_limit} GiB, and the layers of recipe {recipe.name!r} would keep "
                f"{self.kept_bytes / GIB:.3g} GiB between steps; valid: a higher limit, or a smaller video"
            )


def forecast(
    recipe: Recipe, layout: TokenLayout, *, layers: int, branches: int, shape: Sequence[int], dtype: torch.dtype
) -> Forecast:
    """What is known of a recipe before it runs.

    Args:
        recipe: the method.
        layout: the tokens of a call.
        layers: self-attention layers; those that are dense in every step keep nothing.
        branches: branches of classifier-free guidance that are computed one after the other.
        shape: [B, H, S, D] of the queries.
        dtype: of the queries.
    """
    if is_dense(recipe):
        return Forecast(1.0, 0, 0)
    batch, heads, _, head_size = shape
    kept = 0
    if isinstance(recipe.selection, Dynamic):
        kept += recipe.selection.kept_bytes(
            layout, recipe.block_q, recipe.block_k, batch=batch, heads=heads, keeps=recipe.schedule.keeps
        )
    if isinstance(recipe.order, Clusters):
        kept += recipe.order.kept_bytes(
            layout, batch=batch, heads=heads, head_size=head_size, keeps=recipe.schedule.keeps
        )
    if isinstance(recipe.skipped, Reuse):
        kept += recipe.skipped.kept_bytes(
            layout, batch=batch, heads=heads, head_size=head_size, itemsize=dtype.itemsize
        )
    sparse_layers = sum(layer not in recipe.schedule.dense_layers for layer in range(layers))
    kept *= branches * sparse_layers
    if isinstance(recipe.selection, Dynamic):
        density = recipe.selection.expected_density(layout, recipe.block_q, recipe.block_k)
        return Forecast(density, 0, kept, _summary_density(recipe, density))
    planned = plan(recipe, layout, torch.device("cpu"), heads)
    lists = planned.blocks.indices.nbytes + planned.blocks.counts.nbytes
    tables = 0 if planned.table is None else planned.table.nbytes
    return Forecast(planned.density, lists + tables, kept, _summary_density(recipe, planned.density))


def _summary_density(recipe: Recipe, density: float | None) -> float:
    if not recipe.skipped.summarizes:
        return 0.0
    return (1.0 - (density or 0.0)) / recipe.block_k
