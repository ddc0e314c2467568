"""Recipes: reading, writing, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from sparse_dit.orders import Axes, Hilbert, Rows, Tiles
from sparse_dit.recipe import Recipe, load_recipe, recipe_names
from sparse_dit.schedule import Schedule
from sparse_dit.selection import Every, Gate, HeadTypes, Mass, Pooled, Radial, Window
from sparse_dit.skipped import Drop, Reuse, Summarize


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


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_tells_where_it_comes_from(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.source
    assert recipe.licence or name == "dense"
    assert all("\n" not in text for text in (recipe.source, recipe.licence, recipe.note))


#: Published defaults, from the papers and their repositories.
PUBLISHED = {
    "draft": (Tiles((1, 8, 16)), Pooled(density=0.25, per="head"), (0, 0.925, (0,)), (128, 128)),
    "draft-hunyuan": (Tiles((1, 8, 16)), Pooled(density=0.1, per="head"), (0, 0.945, (0, 1)), (128, 128)),
    "adaspa": (Rows(), Mass(density=0.2), (10, 1.0, ()), (64, 64)),
    "svg": (Rows(), HeadTypes(kept=0.3), (10, 1.0, (0,)), (128, 128)),
    "vmoba": (Rows(), Gate(threshold=0.25), (12, 1.0, ()), (64, 64)),
    "re-ttention": (Rows(), Window(size=(0, 1, 42)), (15, 1.0, ()), (64, 64)),
    "sparge": (Rows(), Pooled(density=0.5), (0, 1.0, ()), (128, 64)),
    "sparge-cdf": (Rows(), Pooled(top_p=0.98, crossing=False, similarity=0.6), (0, 1.0, ()), (128, 64)),
    "sage2": (Rows(), Every(), (0, 1.0, ()), (128, 64)),
    "gna": (Tiles((2, 8, 8)), Window(size=(18, 24, 24), stride=(16, 8, 8)), (15, 1.0, ()), (128, 128)),
    "jenga": (Hilbert(), Pooled(top_p=0.3, least=0.25, adjacent=True), (0, 1.0, ()), (128, 128)),
    "sol": (Rows(), Pooled(tau=1.0), (0, 0.909, (0,)), (64, 64)),
    "subblock": (Rows(), Pooled(density=0.25, sub_block=16, reduction="logsumexp"), (10, 1.0, ()), (64, 64)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_defaults(name: str) -> None:
    recipe = load_recipe(name)
    schedule = recipe.schedule
    dense = (schedule.dense_steps, schedule.dense_above, schedule.dense_layers)
    assert (recipe.order, recipe.selection, dense, (recipe.block_q, recipe.block_k)) == PUBLISHED[name]


def test_presets_that_keep_something_refresh_as_published() -> None:
    assert load_recipe("adaspa").schedule.refresh_steps == (10, 30)
    re_ttention = load_recipe("re-ttention")
    assert (re_ttention.schedule.refresh_every, re_ttention.skipped) == (5, Reuse(ramp=0.04))
    assert load_recipe("ditfastattn").skipped == Reuse(ratio=False)
    assert load_recipe("sage").precision == "int8"
    assert load_recipe("sol").skipped == Summarize()
    assert load_recipe("sparge").precision == "int8_fp8"


def test_rows_of_results_keep_their_identity() -> None:
    """What identifies a row of earlier results is the recipe in plain values."""
    assert list(load_recipe("tiny-radial").to_dict()) == [
        "name", "order", "selection", "schedule", "precision", "skipped", "block_q", "block_k", "source", "licence",
    ]  # fmt: skip
    assert load_recipe("tiny-radial").to_dict()["skipped"] == "drop"
    assert set(load_recipe("tiny-radial").to_dict()["schedule"]) == {"dense_steps", "dense_above", "dense_layers"}
    ditfastattn = load_recipe("ditfastattn").to_dict()
    assert set(ditfastattn["schedule"]) == {"dense_steps", "dense_above", "dense_layers", "refresh_every"}
    assert ditfastattn["skipped"] == {"name": "reuse", "ratio": False, "ramp": 0.04}


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


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(order=Axes("hwt"), selection=Pooled(top_p=0.5)),
        Recipe(order=Axes(("hwt", "thw")), selection=Pooled(tau=-0.5, adjacent=True)),
        Recipe(selection=Window(size=((0, 3, 3), (2, 0, 0)))),
        Recipe(selection=Window(size=(4, 5, 6))),
        Recipe(selection=Mass(), schedule=Schedule(refresh_steps=(2, 4)), skipped=Reuse(ratio=False), state_limit=2.5),
        Recipe(
            selection=Pooled(density=0.5),
            schedule=Schedule(refresh_every=2, refresh_growth=3),
            skipped=Reuse(ratio=False, summary=True, part=8),
        ),
        Recipe(selection=HeadTypes(width=64), note="a note"),
        Recipe(selection=Pooled(top_p=0.5), precision="int8", skipped=Summarize()),
    ],
)
def test_choices_of_all_kinds_survive_yaml(recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(path) == recipe


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
    sol = load_recipe("sol").override({"selection.density": 0.5, "schedule.refresh_steps": [3]})
    assert sol.selection == Pooled(density=0.5)
    assert sol.override({"schedule.refresh_every": 2}).schedule.refresh_steps is None
    assert load_recipe("re-ttention").override({"skipped.ramp": 0.1}).skipped == Reuse(ramp=0.1)
    assert load_recipe("re-ttention").override({"skipped.ramp": 0}).skipped == Reuse(ramp=0.0)
    assert load_recipe("re-ttention").override({"skipped": "drop"}).skipped == Drop()
    assert sol.override({"state_limit": 4}).to_dict()["state_limit"] == 4.0


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"blok_q": 64}, r"recipe: unknown field 'blok_q'; did you mean 'block_q'\? valid: name, order"),
        ({"block_q": 48}, r"block_q: 48; valid: 16, 32, 64, 128$"),
        ({"block_k": "64"}, r"block_k: '64'; valid: a whole number$"),
        ({"precision": "int3"}, r"precision: 'int3'; valid: native, int8, int8_fp8$"),
        (
            {"skipped": "sumary"},
            r"skipped.name: unknown name 'sumary'; did you mean 'summary'\? valid: drop, summary, reuse$",
        ),
        ({"order": "row"}, r"order.name: unknown name 'row'; did you mean 'rows'\? valid: rows, "),
        (
            {"selection": "radail"},
            r"selection.name: unknown name 'radail'; did you mean 'radial'\? valid: all, radial, ",
        ),
        ({"selection": {"decay": 0.2}}, r"selection.name: unknown name None; valid: all, radial, "),
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
        (
            {"schedule": {"refresh_every": 2, "refresh_steps": [3]}},
            r"schedule: refresh_every and refresh_steps exclude each other; valid: one of them$",
        ),
        (
            {"selection": {"name": "pooled", "tau": 1.0, "density": 0.3}},
            r"selection: density and tau exclude each other; valid: one of them$",
        ),
        (
            {"selection": {"name": "pooled", "tau": 1.0, "per": "head"}},
            r"selection.per: 'head'; valid: row, unless density is the rule$",
        ),
        (
            {"order": "hilbert", "selection": "radial"},
            r"order: 'hilbert' with selection 'radial'; its band counts tokens inside frames; valid: rows$",
        ),
        (
            {"order": "tiles", "selection": "band"},
            r"order: 'tiles' with selection 'band'; it is the band of a spatial or .*; valid: rows, time_major$",
        ),
        (
            {"order": "time_major", "selection": "head_types"},
            r"order: 'time_major' with selection 'head_types'; it finds the order of each head itself; valid: rows$",
        ),
        (
            {"order": "tiles", "selection": "gate"},
            r"order: 'tiles' with selection 'gate'; it partitions the grid itself, by layer; valid: rows$",
        ),
        (
            {"selection": {"name": "pooled", "sub_block": 24}},
            r"selection.sub_block: 24 with blocks of 64 x 64; valid: a divisor of both$",
        ),
        ({"selection": "all", "skipped": "reuse"}, r"skipped: 'reuse' with selection 'all', which skips nothing"),
        ({"selection": "all", "skipped": "summary"}, r"skipped: 'summary' with selection 'all', .*; valid: drop$"),
        ({"skipped": {"name": "summary", "ramp": 0.1}}, r"skipped: unknown field 'ramp'; valid: $"),
        (
            {"selection": "radial", "skipped": "reuse"},
            r"skipped: 'reuse' with a refresh in every step, .*; valid: schedule.refresh_every above 1, or ",
        ),
        ({"skipped": {"name": "reuse", "ramp": -1.0}}, r"skipped.ramp: -1.0; valid: 0 or a positive number$"),
        (
            {"skipped": {"name": "reuse", "ratio": False, "ramp": 0.1}, "schedule": {"refresh_every": 2}},
            r"skipped.ramp: 0.1 without ratio; valid: ratio true$",
        ),
        (
            {"skipped": {"name": "reuse", "part": 8}, "schedule": {"refresh_every": 2}},
            r"skipped.part: 8 with ratio; valid: ratio false$",
        ),
        (
            {
                "order": "clusters",
                "selection": "pooled",
                "skipped": {"name": "reuse", "ratio": False, "part": 8},
                "schedule": {"refresh_every": 2},
            },
            r"skipped.part: 8 with order 'clusters', whose tokens change places; valid: 1$",
        ),
        (
            {"schedule": {"refresh_steps": [3], "refresh_growth": 1}},
            r"schedule.refresh_growth: 1 without refresh_every; valid: with it$",
        ),
        ({"state_limit": -1}, r"state_limit: -1.0; valid: 0 or more GiB, or none$"),
        ({"order": {"name": "axes", "axes": 3}}, r"order.axes: 3; valid: text$"),
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
