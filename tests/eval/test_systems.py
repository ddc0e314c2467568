"""The recipes that stand in the table of systems."""

import pytest
import torch

from sparse_dit.calls import plan
from sparse_dit.eval.systems import DENSITIES, SYSTEMS, candidates, search_prompts, systems
from sparse_dit.layout import TokenLayout
from sparse_dit.pipelines.tiny_wan.grammar import held_out_prompts
from sparse_dit.selection import Dynamic


def test_every_system_stands_at_every_density_and_share_of_dense_steps() -> None:
    recipes = [recipe for recipe in systems(20) if recipe.precision == "native"]
    assert len(recipes) == len(SYSTEMS) * len(DENSITIES) * 2
    assert {recipe.name for recipe in recipes} == set(SYSTEMS)
    assert {recipe.schedule.dense_steps for recipe in recipes} == {0, 4}
    assert {(recipe.block_q, recipe.block_k) for recipe in recipes} == {(32, 32)}
    low = [recipe for recipe in systems(20) if recipe.precision != "native"]
    assert {recipe.precision for recipe in low} == {"int8", "int8_fp8"}


@pytest.mark.parametrize("name", SYSTEMS)
def test_static_systems_come_near_the_densities(name: str) -> None:
    layout = TokenLayout((9, 16, 16))
    recipes = [recipe for recipe in systems(20) if recipe.name == name and recipe.precision == "native"]
    recipes = [recipe for recipe in recipes if not recipe.schedule.dense_steps]
    assert len(recipes) == len(DENSITIES)
    for recipe, density in zip(recipes, DENSITIES, strict=True):
        if not isinstance(recipe.selection, Dynamic):
            reached = plan(recipe, layout, torch.device("cpu"), heads=4).density
            assert 0.65 * density <= reached <= 1.1 * density


def test_candidates_have_names_of_their_own_and_searching_spares_the_tables_captions() -> None:
    found = candidates([0.25], [0, 4])
    assert len({(recipe.name, recipe.schedule.dense_steps) for recipe in found}) == len(found)
    only = candidates([0.5, 0.25], [0], names=["hilbert-row-drop"])
    assert [recipe.name for recipe in only] == ["hilbert-row-drop"] * 2
    assert not set(search_prompts(16)) & set(held_out_prompts(64))
