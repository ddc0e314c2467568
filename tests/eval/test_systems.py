"""The table of systems: who stands in it, at which settings, what is run when, and what a line says."""

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_dit.calls import plan
from sparse_dit.eval import contest, knobs, results
from sparse_dit.eval import systems as command
from sparse_dit.eval.contenders import (
    CONTENDERS,
    DENSITIES,
    Calibrated,
    Sought,
    as_ours,
    at_run_density,
    cached,
    cached_mixtures,
    growing,
    mixture,
    mixtures,
    small,
    twin,
)
from sparse_dit.eval.settings import settings
from sparse_dit.eval.systems import (
    BLOCKS,
    STEPS,
    Files,
    Runs,
    best_cache,
    equal_recipes,
    our_recipes,
    searched_caches,
    searched_recipes,
    table_recipes,
    winners,
)
from sparse_dit.eval.systems_table import systems
from sparse_dit.forecast import whole_steps
from sparse_dit.layout import TokenLayout
from sparse_dit.pipelines.tiny_wan.grammar import held_out_prompts
from sparse_dit.recipe import Recipe, recipe_names
from sparse_dit.selection import Dynamic, Pooled
from sparse_dit.skipped import Reuse

LAYOUT = TokenLayout((9, 16, 16))
FOUND = {(name, density, steps): 0.5 for name in knobs.sought() for density in DENSITIES for steps in (0, 4)}
WITHOUT_PROFILE = {name: each for name, each in CONTENDERS.items() if not isinstance(each.knob, Calibrated)}


def test_every_published_preset_stands_in_the_table() -> None:
    ours, larger = (
        {"quality", "balanced", "fast", "cached", "tiny-radial"},
        {"draft-hunyuan", "radial-hunyuan", "svg-hunyuan"},
    )
    others = {"dense", "sage", "sage2", "sparge-cdf"}  # no selection, or another rule of one that stands there
    assert set(recipe_names()) - ours - larger - others == set(CONTENDERS)


def test_every_contender_stands_at_every_density_and_share_of_dense_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "CONTENDERS", WITHOUT_PROFILE)
    recipes = list(table_recipes(FOUND, Path("none")))
    native = [recipe for recipe in recipes if recipe.precision == "native"]
    assert set(Counter(recipe.name for recipe in native).values()) == {len(DENSITIES) * 2}
    assert {recipe.name for recipe in native} == set(WITHOUT_PROFILE)
    assert {recipe.schedule.dense_steps for recipe in native} == {0, 4}
    assert {(recipe.block_q, recipe.block_k) for recipe in recipes} == {(32, 32)}
    assert {recipe.precision for recipe in recipes} == {"native", "int8", "int8_fp8"}
    with pytest.raises(ValueError, match=r"knobs: none of svg2 at density 0.5; valid: rows of the stage prepare"):
        list(table_recipes({}, Path("none")))


@pytest.mark.parametrize("name", WITHOUT_PROFILE)
def test_contenders_whose_density_can_be_counted_come_near_it(name: str) -> None:
    for density in DENSITIES:
        recipe = small(name, density, 0, 0.5)
        if isinstance(CONTENDERS[name].knob, Sought):
            assert isinstance(recipe.selection, Dynamic)
            continue
        if isinstance(recipe.selection, Dynamic):
            reached = recipe.selection.expected_density(LAYOUT, 32, 32)
            assert reached is not None
        else:
            reached = plan(recipe, LAYOUT, torch.device("cpu"), heads=4).density
        assert 0.65 * density <= reached <= 1.1 * density


def test_mixtures_have_names_of_their_own_and_are_what_they_say() -> None:
    names = list(mixtures())
    assert len(set(names)) == len(names)
    for name in names:
        recipe = mixture(name, 0.25, 1)
        assert recipe.name == name
        assert str(recipe.skipped) == name.rpartition("-")[2]
        assert twin(twin(name)) == name
        assert {str(mixture(each, 0.25, 1).skipped) for each in (name, twin(name))} == {"drop", "summary"}
    assert mixture("hilbert-mass-summary", 0.25, 4).schedule.refresh_steps == (4, 8, 16)
    assert not set(knobs.search_prompts(16)) & set(held_out_prompts(64))


def run_density_of(recipe: Recipe) -> float:
    """As it will be counted: whole steps, and the budget in the others."""
    first = recipe.schedule.dense_steps
    whole = first + len(whole_steps(recipe, range(first, STEPS)))
    assert isinstance(recipe.selection, Dynamic)
    density = recipe.selection.expected_density(LAYOUT, 32, 32)
    assert density is not None
    return (whole + (STEPS - whole) * density) / STEPS


@pytest.mark.parametrize("name", ["hilbert-lse4-summary", "hilbert-mass-summary"])
@pytest.mark.parametrize("whole", [0, 1, 4, 8])
@pytest.mark.parametrize("run_density", [0.525, 0.2875, 0.1556])
def test_mixtures_meet_a_run_density_within_what_counts_as_equal(name: str, whole: int, run_density: float) -> None:
    recipe = at_run_density(name, run_density, whole, STEPS, BLOCKS)
    if recipe is None:
        assert (run_density * STEPS - whole) / (STEPS - whole) < 1 / BLOCKS
        return
    assert run_density_of(recipe) == pytest.approx(run_density, abs=contest.NEAR)
    first = recipe.schedule.dense_steps
    assert first + len(whole_steps(recipe, range(first, STEPS))) == (max(1, whole) if "mass" in name else whole)


@pytest.mark.parametrize("name", list(cached_mixtures()))
@pytest.mark.parametrize("run_density", [0.6, 0.3, 0.16, 0.11])
@pytest.mark.parametrize("part", [1, 8])
def test_mixtures_with_a_cache_meet_a_run_density_whatever_goes_into_whole_steps(
    name: str, run_density: float, part: int
) -> None:
    recipe = cached(name, run_density, STEPS, BLOCKS, part)
    if recipe is None:
        assert run_density < 0.2
        return
    assert run_density_of(recipe) == pytest.approx(run_density, abs=contest.NEAR)
    assert recipe.skipped == Reuse(ratio=False, summary=True, part=part)
    whole = len(whole_steps(recipe, range(STEPS)))
    assert whole == pytest.approx(run_density * STEPS * int(name[-2:]) / 100, abs=0.5)
    # As the preset's schedule, where the first gap is the growth.
    assert growing(4, STEPS) == [0, 2, 6, 12] == sorted(whole_steps(small_cached(2, 2), range(STEPS)))


def small_cached(every: int, growth: int) -> Recipe:
    return Recipe.from_dict(
        {
            "selection": "pooled",
            "skipped": {"name": "reuse", "ratio": False},
            "schedule": {"refresh_every": every, "refresh_growth": growth},
        }
    )


@pytest.mark.parametrize("count", range(1, 20))
def test_whole_steps_lie_closest_at_the_beginning(count: int) -> None:
    steps = growing(count, STEPS)
    assert len(set(steps)) == count
    assert steps == sorted(steps)
    assert 0 == steps[0] <= steps[-1] < STEPS
    gaps = [later - first for first, later in pairwise(steps)]
    # Rounding may shorten a gap by one.
    assert all(later >= first - 1 for first, later in pairwise(gaps))


def test_the_search_compares_caches_at_the_run_density_of_every_fifth_step_whole() -> None:
    recipes = list(searched_caches())
    names = list(cached_mixtures())
    assert [recipe.name for recipe in recipes] == names * len(DENSITIES)
    for density, first in zip(DENSITIES, range(0, len(recipes), len(names)), strict=True):
        every_fifth = run_density_of(at_run_density_of(density))
        for recipe in recipes[first : first + len(names)]:
            assert run_density_of(recipe) == pytest.approx(every_fifth, abs=contest.NEAR)


def at_run_density_of(density: float) -> Recipe:
    return mixture("hilbert-lse2-drop", density, STEPS // 5)


def test_the_best_cache_is_best_over_all_densities() -> None:
    rows = []
    for recipe in searched_caches():
        assert isinstance(recipe.selection, Pooled)
        density = recipe.selection.density
        assert density is not None
        psnr = {"hilbert-lse4-cached67": 25.0, "hilbert-lse2-cached50": 31.0 if density > 0.4 else 20.0}
        rows.append(row_of(recipe, density, psnr.get(recipe.name, 21.0)))
    assert best_cache(rows) == "hilbert-lse4-cached67"
    with pytest.raises(ValueError, match=r"search: no mixture with a cache has rows at all densities; valid: rows of"):
        best_cache(rows[: len(rows) // 2])


def test_the_search_compares_at_the_run_density_of_adaspa() -> None:
    recipes = list(searched_recipes())
    assert len(recipes) == len(DENSITIES) * (1 + len(list(mixtures())))
    for first in range(0, len(recipes), len(recipes) // 3):
        adaspa, *others = recipes[first : first + len(recipes) // 3]
        assert adaspa.name == "adaspa"
        assert {round(run_density_of(recipe), 6) for recipe in others} == {round(run_density_of(adaspa), 6)}


def row_of(recipe: Recipe, density: float, psnr: float, seed: int = 0, **changes: Any) -> dict[str, Any]:
    first = recipe.schedule.dense_steps
    whole = first + len(whole_steps(recipe, range(first, STEPS)))
    return {
        "id": results.identity(recipe=recipe.to_dict(), seed=seed),
        "recipe": recipe.to_dict(),
        "steps": STEPS,
        "grid": [9, 16, 16],
        "prompt": str(seed),
        "seed": seed,
        "density": density,
        "run_density": (whole + (STEPS - whole) * density) / STEPS,
        "calls": {"planned": 320, "made": 320, "sparse": 320 - 16 * whole, "dense": {"x": 16 * whole}},
        "psnr": psnr,
        "ssim": 0.5,
        **changes,
    }


def test_winners_are_those_of_the_search_and_of_its_run_density() -> None:
    rows = []
    for recipe in searched_recipes():
        best = recipe.name == "hilbert-lse4-gain-summary"
        rows.append(row_of(recipe, recipe.selection.density, 30.0 if best else 20.0))  # type: ignore[union-attr]
    # Not of the search: another run density, and a system that is none of ours.
    rows.append(row_of(mixture("rows-row-drop", 0.5, 0), 0.5, 99.0))
    assert winners(rows) == dict.fromkeys(DENSITIES, "hilbert-lse4-gain-summary")
    with pytest.raises(ValueError, match=r"search: no rows at density 0.5; valid: rows of the stage prepare"):
        winners(rows[-1:])


WINNERS = dict.fromkeys(DENSITIES, "hilbert-lse4-summary")
CACHE = "hilbert-lse2-cached67"


def test_ours_is_run_at_the_run_density_of_what_has_another() -> None:
    adaspa, svg = small("adaspa", 0.5, 0, None), small("svg", 0.5, 0, None)
    rows = [row_of(adaspa, 0.5, 30.0), row_of(svg, 0.4853, 23.0)]
    rows += [row_of(as_ours(mixture("hilbert-lse4-summary", 0.5, 0)), 0.5, 31.0)]
    equal = equal_recipes(rows, WINNERS, CACHE)
    assert [(recipe.name, recipe.source, recipe.schedule.dense_steps) for recipe in equal] == [
        ("ours", "hilbert-lse4-summary", 1),
        ("ours-drop", "hilbert-lse4-drop", 1),
        ("ours-cached", CACHE, 0),
        ("ours", "hilbert-lse4-summary", 0),
        ("ours-drop", "hilbert-lse4-drop", 0),
        ("ours-cached", CACHE, 0),
    ]
    assert [round(run_density_of(recipe), 3) for recipe in equal] == [0.525, 0.525, 0.522, 0.486, 0.486, 0.485]
    # What is there already does not change what is asked for: shares of the stage are cut while rows are added.
    rows += [row_of(recipe, recipe.selection.density, 31.0) for recipe in equal[:1]]  # type: ignore[union-attr]
    assert equal_recipes(rows, WINNERS, CACHE) == equal


def test_a_line_shows_ours_at_the_same_run_density_and_whole_steps() -> None:
    adaspa = small("adaspa", 0.5, 0, None)
    ours = as_ours(mixture("hilbert-lse4-summary", 0.5, 1))
    drop = as_ours(mixture("hilbert-lse4-drop", 0.5, 1))
    rows = [row_of(adaspa, 0.5, 30.0 + seed, seed) for seed in range(3)]
    rows += [row_of(ours, 0.5, 33.0 + 2 * seed, seed) for seed in range(3)]
    rows += [row_of(drop, 0.5, 29.0 + seed, seed) for seed in range(3)]
    # Whole steps may lie elsewhere where a cache refreshes.
    for part, psnr in ((1, 35.0), (8, 32.0)):
        kept = cached(CACHE, 0.525, STEPS, BLOCKS, part)
        assert kept is not None
        assert isinstance(kept.selection, Pooled)
        assert kept.selection.density is not None
        rows += [row_of(as_ours(kept), kept.selection.density, psnr + seed, seed) for seed in range(3)]
    # As much computed, but in other whole steps: no match. And INT8 has no line.
    rows.append(row_of(as_ours(mixture("hilbert-lse4-summary", 0.525, 0)), 0.525, 99.0))
    rows.append(row_of(adaspa.override({"precision": "int8"}), 0.5, 99.0))
    recall = [{"recipe": adaspa.to_dict(), "recall": 0.876}]
    overheads = [
        {"system": "adaspa", "shape": {"tokens": 32_760}, "share": 0.0123},
        {"system": "adaspa", "shape": {"tokens": 118_800}, "share": 0.5},
    ]
    lines = systems(rows, recall, overheads).splitlines()
    assert lines[0] == "**Density about 0.5, 0 of 20 steps dense**"
    [line] = [line for line in lines if line.startswith("| adaspa")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:6] == ["adaspa", "0.50", "0.53", "31.0", "31.0", "30.0"]
    assert cells[9:11] == ["0.88", "1.2 %"]
    # Ours minus the other: 3, 4, 5, and -1 on every clip.
    assert cells[11].startswith("+4.0 [+3.")
    assert cells[12:] == ["3 of 3", "-1.0 [-1.0, -1.0]", "+5.0 [+5.0, +5.0]", "+2.0 [+2.0, +2.0]"]


def test_what_keeps_residuals_is_met_by_ours_that_keeps_them() -> None:
    for first in (0, 4):
        theirs = small("ditfastattn", 0.25, first, None)
        rows = [row_of(theirs, 0.247, 30.0)]
        equal = equal_recipes(rows, WINNERS, CACHE)
        assert [recipe.name for recipe in equal] == ["ours", "ours-drop", "ours-cached", "ours-cached-parts"]
        kept = equal[2]
        assert (kept.source, kept.schedule.dense_steps) == (CACHE, 0)
        assert run_density_of(kept) == pytest.approx(rows[0]["run_density"], abs=contest.NEAR)
        assert isinstance(kept.selection, Pooled)
        assert kept.selection.density is not None
        rows += [row_of(equal[0], 0.25, 31.0), row_of(kept, kept.selection.density, 35.0)]
        groups = settings(rows)
        [group] = [group for group in groups if group.name == "ditfastattn"]
        beside = contest.standing(group, groups)
        assert beside is not None
        assert (beside.ours.name, beside.difference) == ("ours-cached", 5.0)


def test_a_group_has_a_line_of_ours_of_every_kind() -> None:
    radial = small("radial", 0.25, 4, None)
    rows = [row_of(radial, 0.25, 20.0)]
    for recipe in our_recipes(WINNERS, CACHE):
        assert isinstance(recipe.selection, Pooled)
        assert recipe.selection.density is not None
        rows.append(row_of(recipe, recipe.selection.density, 30.0))
    lines = systems(rows).splitlines()
    names = [line.split("|")[1].strip() for line in lines if line.startswith("| ours")]
    assert names == [
        "ours (hilbert-lse4-summary)",
        "ours-drop (hilbert-lse4-drop)",
        f"ours-cached ({CACHE})",
        f"ours-cached-parts ({CACHE})",
    ]
    assert lines[0] == "**Density about 0.25, 4 of 20 steps dense**"
    assert [line.split("|")[3].strip() for line in lines if line.startswith("| ours")] == ["0.40"] * 4


def test_a_contest_needs_equal_run_density_and_as_many_whole_steps() -> None:
    groups = settings(
        [
            row_of(small("adaspa", 0.25, 0, None), 0.25, 25.0),
            row_of(as_ours(mixture("hilbert-lse4-summary", 8 / 72, 4)), 8 / 72, 27.0),
        ]
    )
    adaspa, ours = sorted(groups, key=lambda group: group.name)
    # 0.2875 and 0.2889, but one whole step against four.
    assert abs(contest.run_density(adaspa) - contest.run_density(ours)) < contest.NEAR
    assert (contest.whole_steps(adaspa), contest.whole_steps(ours)) == (1, 4)
    assert contest.standing(adaspa, groups) is None


def test_the_stages_follow_each_other_and_shares_cover_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a model: a sweep writes rows of the densities that recipes ask for, one prompt each."""

    def sweep(pipe: Any, model: str, recipes: list[Recipe], prompts: list[str], request: Any, out: Path, batch: int):
        assert batch == len(prompts)
        done = {row["id"] for row in results.load_rows(out)}
        for recipe in recipes:
            best = recipe.name == "hilbert-lse8-summary"
            row = row_of(recipe, getattr(recipe.selection, "density", None) or 0.3, 30.0 if best else 20.0)
            if row["id"] not in done:
                results.append_row(out, row)
                yield row

    def looked_at(pipe: Any, requests: Any, recipe: Recipe, **_: Any) -> dict[str, Any]:
        return {"id": str(recipe), "recipe": recipe.to_dict(), "recall": 0.5}

    for name, stand_in in (("sweep", sweep), ("mask_recall", looked_at), ("recall_id", lambda *a, **_: str(a[2]))):
        monkeypatch.setattr(command, name, stand_in)
    monkeypatch.setattr(command, "CONTENDERS", {name: CONTENDERS[name] for name in ("svg", "sparge", "adaspa")})
    monkeypatch.setattr(Runs, "_profiles", lambda *_: None)
    monkeypatch.setattr(Runs, "_knob", lambda *_: None)
    monkeypatch.setattr(Runs, "pipe", None)
    files = Files(*(tmp_path / name for name in ("table", "search", "knobs", "recall", "profiles")))
    for stage in command.STAGES:
        for share in (1, 2, 3):
            Runs(files, prompts=1).run(stage, share, 3)
    table = results.load_rows(files.table)
    # Three systems, one of them in two low precisions, at six settings; ours twice at the six, and beside AdaSpa.
    contenders = [row for row in table if not row["recipe"]["name"].startswith("ours")]
    assert len(contenders) == (3 + 2) * 6
    assert {row["recipe"]["source"] for row in table if row["recipe"]["name"] == "ours"} == {"hilbert-lse8-summary"}
    groups = settings(table)
    for group in groups:
        if not contest.is_ours(group):
            assert contest.standing(group, groups) is not None
            assert contest.standing(group, groups, "ours-drop") is not None
    before = [file.read_bytes() for file in (files.table, files.search, files.recall)]
    for stage in command.STAGES:
        Runs(files, prompts=1).run(stage, 1, 1)
    # Started again: nothing but the masks of what the last stage itself added.
    after = [file.read_bytes() for file in (files.table, files.search, files.recall)]
    assert after[:2] == before[:2]
    assert after[2].startswith(before[2])
