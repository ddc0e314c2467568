"""Search spaces: what ships, what is declared, and what is refused."""

from pathlib import Path

import pytest

from sparse_dit.eval.space import load_space, space_names
from sparse_dit.recipe import load_recipe

SPACE = """
- recipe: radial
  set: {block_q: 32, block_k: 32, schedule.dense_layers: []}
  vary: {selection.density: [0.5, 0.3], dense_share: [0, 0.26]}
- recipe: sage
- recipe: radial
  set: {block_q: 32, block_k: 32, schedule.dense_layers: [], schedule.dense_steps: 5, selection.density: 0.5}
"""


def written(folder: Path, text: str) -> str:
    (folder / "space.yaml").write_text(text)
    return str(folder / "space.yaml")


def test_every_combination_is_a_candidate_once(tmp_path: Path) -> None:
    found = load_space(written(tmp_path, SPACE), 20)
    assert [candidate.label for candidate in found] == [
        "radial, density 0.5, dense_share 0",
        "radial, density 0.5, dense_share 0.26",
        "radial, density 0.3, dense_share 0",
        "radial, density 0.3, dense_share 0.26",
        "sage",
    ]
    assert [candidate.recipe.schedule.dense_steps for candidate in found] == [0, 5, 0, 5, 0]
    assert found[2].recipe == load_recipe("radial").override(
        {
            "block_q": 32,
            "block_k": 32,
            "schedule.dense_layers": [],
            "schedule.dense_steps": 0,
            "selection.density": 0.3,
        }
    )


@pytest.mark.parametrize("name", space_names())
def test_what_ships_can_be_read(name: str) -> None:
    found = load_space(name, 20)
    assert len(found) > 20
    assert len({candidate.label for candidate in found}) == len(found)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "a YAML list of entries with recipe, set, vary"),
        ("recipe: radial", "a YAML list of entries"),
        ("- [", "a YAML list of entries"),
        ("- radial", "entry 1: 'radial'; valid: a mapping with recipe"),
        ("- {recipe: radial, knobs: {}}", "entry 1: .*valid: a mapping with recipe"),
        ("- {recipe: nothing}", "entry 1: recipe: unknown name 'nothing'"),
        ("- recipe: dense\n- {recipe: radial, vary: {selection.density: 0.5}}", "entry 2: vary.selection.density: 0.5"),
        ("- {recipe: radial, vary: {selection.density: [2]}}", "entry 1: selection.density"),
        ("- {recipe: radial, vary: {dense_share: [2]}}", "entry 1: vary.dense_share: 2; valid: numbers from 0 to 1"),
        ("- {recipe: radial, set: [1]}", "set, vary; valid: mappings"),
    ],
)
def test_bad_spaces_are_named(tmp_path: Path, text: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        load_space(written(tmp_path, text), 20)


def test_no_such_space() -> None:
    with pytest.raises(ValueError, match=r"cannot read 'nothing' .*valid: presets, tiny-wan or a YAML file"):
        load_space("nothing", 20)
