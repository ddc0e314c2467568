"""Recipes: reading, writing, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from sparse_dit.recipe import Recipe, load_recipe, recipe_names
from sparse_dit.schedule import Schedule
from sparse_dit.selection import Every, Radial


def test_the_shipped_recipes() -> None:
    assert {"dense", "radial"} <= set(recipe_names())
    assert isinstance(load_recipe("dense").selection, Every)
    radial = load_recipe("radial")
    assert radial.selection == Radial(decay=0.2, sink_frames=1)
    assert radial.schedule == Schedule(dense_steps=12, dense_layers=(0,))
    assert (radial.block_q, radial.block_k, radial.licence) == (128, 128, "Apache-2.0")
    assert "2506.19852" in radial.source


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_survives_yaml(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    path = tmp_path / "copy.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(path) == load_recipe(str(path)) == Recipe.from_dict(recipe.to_dict()) == recipe


def test_a_density_survives_yaml() -> None:
    recipe = Recipe(selection=Radial(density=0.25))
    assert "decay" not in recipe.to_dict()["selection"]
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_loading_takes_mappings_and_recipes() -> None:
    recipe = load_recipe({"selection": {"name": "radial", "density": 0.5}, "schedule": {"dense_above": 1}})
    assert recipe.selection == Radial(density=0.5)
    assert recipe.schedule.dense_above == 1.0
    assert load_recipe(recipe) is recipe
    assert load_recipe({"selection": "all"}).selection == Every()


def test_overrides_by_dotted_names() -> None:
    radial = load_recipe("radial")
    changed = radial.override({"selection.density": 0.3, "block_q": 64, "schedule.dense_steps": 0})
    assert changed.selection == Radial(density=0.3)
    assert changed.block_q == 64
    assert changed.schedule == Schedule(dense_layers=(0,))
    assert changed.override({"selection.decay": 0.5}).selection == Radial(decay=0.5)
    assert changed.override({"selection.name": "all"}).selection == Every()
    assert load_recipe("dense").override({"selection.decay": 0.4, "selection.name": "radial"}).selection == Radial(0.4)
    assert radial.selection == Radial()


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"blok_q": 64}, r"recipe: unknown field 'blok_q'; did you mean 'block_q'\? valid: name, order"),
        ({"block_q": 48}, r"block_q: 48; valid: 16, 32, 64, 128$"),
        ({"block_k": "64"}, r"block_k: '64'; valid: a whole number$"),
        ({"precision": "int3"}, r"precision: 'int3'; valid: native$"),
        ({"skipped": "sumary"}, r"skipped: 'sumary'; valid: drop$"),
        ({"order": "row"}, r"order.name: unknown name 'row'; did you mean 'rows'\? valid: rows$"),
        (
            {"selection": "radail"},
            r"selection.name: unknown name 'radail'; did you mean 'radial'\? valid: all, radial$",
        ),
        ({"selection": {"decay": 0.2}}, r"selection.name: unknown name None; valid: all, radial$"),
        (
            {"selection": {"name": "radial", "decy": 1.0}},
            r"selection: unknown field 'decy'; did you mean 'decay'\? valid: decay, density, sink_frames",
        ),
        ({"selection": {"name": "all", "decay": 1.0}}, r"selection: unknown field 'decay'; valid: $"),
        ({"selection": {"name": "radial", "decay": "much"}}, r"selection.decay: 'much'; valid: a number$"),
        ({"selection": {"name": "radial", "decay": True}}, r"selection.decay: True; valid: a number$"),
        ({"selection": {"name": "radial", "density": 1.2}}, r"selection.density: 1.2; valid: a number in \(0, 1\]$"),
        (
            {"selection": {"name": "radial", "density": 0.5, "decay": 0.2}},
            r"selection: decay and density exclude each other; valid: one of them$",
        ),
        ({"selection": 7}, r"selection: 7; valid: a mapping of fields$"),
        ({"schedule": {"dense_layers": 3}}, r"schedule.dense_layers: 3; valid: a list$"),
        ({"schedule": {"dense_layers": ["a"]}}, r"schedule.dense_layers: 'a'; valid: a whole number$"),
        ({"schedule": {"dense_stepz": 3}}, r"schedule: unknown field 'dense_stepz'; did you mean 'dense_steps'\?"),
        ({"schedule": {"dense_steps": 2.5}}, r"schedule.dense_steps: 2.5; valid: a whole number$"),
    ],
)
def test_bad_fields_are_refused_in_one_line(mapping: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        load_recipe(mapping)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("recipe", ["radail", "missing.yaml", ".", "", 3])
def test_unknown_recipes_are_refused_in_one_line(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^recipe: ") as caught:
        load_recipe(recipe)
    assert "\n" not in str(caught.value)


def test_a_misspelt_recipe_gets_a_suggestion() -> None:
    with pytest.raises(
        ValueError, match=r"did you mean 'radial'\? valid: .*\bdense\b.*, or the path of a \.yaml file$"
    ):
        load_recipe("radail")


@pytest.mark.parametrize("text", ["selection: {name: radial", "- a list", "", "block_q: 7\n", "\x00"])
def test_bad_files_are_refused_in_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"bad\.yaml") as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)
