"""SpargeAttn's second stage as a setting of a recipe: where it goes, what it is not given with, and who tells of it."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_dit.calls import attend
from sparse_dit.engine import sparse_attention
from sparse_dit.layout import TokenLayout
from sparse_dit.pipelines.generate import load_pipeline
from sparse_dit.pipelines.patch import explain
from sparse_dit.recipe import Recipe, load_recipe
from sparse_dit.state import Slot

GRID = (3, 5, 13)
RECIPE = Recipe.from_dict({"selection": {"name": "pooled", "density": 0.5}, "block_q": 16, "block_k": 16})


def peaked(seed: int = 0) -> list[torch.Tensor]:
    """Scores of each key block rise and fall by tens, so that many tiles are far below the maximum."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 2, math.prod(GRID), 64, generator=generator) for _ in range(3))
    return [6 * q, 6 * k, v]


def test_presets_leave_it_off_and_tell_the_published_value() -> None:
    for name in ("sparge", "sparge-cdf"):
        recipe = load_recipe(name)
        assert recipe.pv_threshold is None
        told = re.search(r"pv_threshold (\d+\.\d+)", recipe.note)
        assert told is not None
        assert float(told[1]) / math.log(2) == pytest.approx(50, abs=1e-3)


def test_it_reaches_the_kernel_and_moves_the_output_within_its_bound() -> None:
    q, k, v = peaked()
    whole = sparse_attention(q, k, v, grid=GRID, recipe=RECIPE)
    outs = {}
    for threshold in (0.5, 8.0, 34.657):
        out = sparse_attention(q, k, v, grid=GRID, recipe=RECIPE.override({"pv_threshold": threshold}))
        outs[threshold] = (out - whole).abs().max()
        # Every key that is left out has less than exp(-threshold) of the weight; 1e-5 for the order of fp32 sums.
        assert outs[threshold] <= q.shape[2] * math.exp(-threshold) * v.abs().max() + 1e-5
    assert outs[0.5] > 100 * outs[34.657]


def test_calls_tell_of_it() -> None:
    recipe, layout = RECIPE.override({"pv_threshold": 8.0}), TokenLayout(GRID)
    done = attend(recipe, layout, *peaked(), scale=None, layer=0, step=0, slot=Slot())
    assert done.backend == "host, PV skip at 8"
    done = attend(RECIPE, layout, *peaked(), scale=None, layer=0, step=0, slot=Slot())
    assert done.backend == "host"


def test_explain_tells_of_it(mini_wan: Path) -> None:
    pipe = load_pipeline(str(mini_wan))
    size = {"height": 64, "width": 64, "num_frames": 9}
    told = str(explain(pipe, RECIPE.override({"pv_threshold": 8.0}), **size))
    assert "values       left out more than 8 below the maximum" in told
    assert "left out" not in str(explain(pipe, RECIPE, **size))


def test_recipes_keep_it_and_those_without_stay_as_they_were() -> None:
    recipe = RECIPE.override({"pv_threshold": 8.0})
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert recipe.override({"pv_threshold": None}) == RECIPE
    assert "pv_threshold" not in RECIPE.to_dict()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"pv_threshold": 0.0}, r"pv_threshold: 0.0; valid: a positive number, or none"),
        ({"pv_threshold": math.inf}, r"pv_threshold: inf; valid: "),
        ({"pv_threshold": "much"}, r"pv_threshold: 'much'; valid: a number"),
        ({"pv_threshold": 8.0, "selection": "all"}, r"pv_threshold: 8.0 with selection 'all' in native precision"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=f"^{told}"):
        Recipe.from_dict(settings)
    assert Recipe.from_dict({"pv_threshold": 8.0, "selection": "all", "precision": "int8"}).pv_threshold == 8.0
