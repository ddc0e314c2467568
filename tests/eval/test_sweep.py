"""Sweeps: every row once, in batches or not."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sparse_dit.eval import metrics, pair, results
from sparse_dit.eval.sweep import Failed, grid, sweep
from sparse_dit.pipelines.generate import Request, load_pipeline
from sparse_dit.recipe import load_recipe

REQUEST = Request("", seed=3, steps=1, height=64, width=64, num_frames=5)
PROMPTS = ["a red circle", "a large blue ring", "a cat"]
RECIPES = [
    load_recipe("radial").override(
        {
            "selection.density": density,
            "schedule.dense_steps": 0,
            "schedule.dense_layers": [],
            "block_q": 32,
            "block_k": 32,
        }
    )
    for density in (0.7, 0.4)
]


@pytest.fixture(scope="module")
def pipe(mini_wan: Path):
    loaded = load_pipeline(str(mini_wan))
    loaded.set_progress_bar_config(disable=True)
    return loaded


def rows_of(pipe, out: Path, batch: int, prompts: Sequence[str] = PROMPTS) -> list[results.Row]:
    return list(sweep(pipe, "mini", RECIPES, prompts, REQUEST, out, batch))


def test_batches_give_the_rows_of_single_runs_and_resume(pipe, tmp_path: Path) -> None:
    expected = {row["id"]: row for row in rows_of(pipe, tmp_path / "alone.jsonl", 1)}
    out = tmp_path / "batched.jsonl"
    found = rows_of(pipe, out, 2)
    assert {row["id"] for row in found} == expected.keys()
    assert sorted(row["batch"] for row in found) == [1, 1, 2, 2, 2, 2]
    for row in found:
        assert row["psnr"] == pytest.approx(expected[row["id"]]["psnr"], abs=0.01)
        assert (row["prompt"], row["seed"]) == (expected[row["id"]]["prompt"], expected[row["id"]]["seed"])

    # What is missing is run again, and nothing else.
    lost = next(row for row in found if row["seed"] == 4 and row["recipe"]["selection"]["density"] == 0.4)
    lines = [line for line in out.read_text().splitlines() if json.loads(line)["id"] != lost["id"]]
    out.write_text("".join(line + "\n" for line in lines))
    assert [row["id"] for row in rows_of(pipe, out, 2)] == [lost["id"]]
    assert out.read_text().splitlines()[:5] == lines
    assert rows_of(pipe, out, 3) == []


def test_what_is_only_said_of_a_recipe_makes_no_row_anew(pipe, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    said = {"note": "said otherwise", "source": "another", "licence": "MIT"}
    assert len(list(sweep(pipe, "mini", RECIPES[:1], PROMPTS[:1], REQUEST, out))) == 1
    assert list(sweep(pipe, "mini", [replace(RECIPES[0], **said)], PROMPTS[:1], REQUEST, out)) == []
    assert len(list(sweep(pipe, "mini", [replace(RECIPES[0], block_q=64)], PROMPTS[:1], REQUEST, out))) == 1


def test_what_fails_is_named_and_the_rest_goes_on(pipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, out = pair.generate_batch, tmp_path / "rows.jsonl"
    results.append_row(out, {"id": "another", "kind": "note"})
    with out.open("a") as file:
        file.write("{broken}\n")

    def spoilt(pipe, requests):
        frames = real(pipe, requests)
        if requests[0].prompt == PROMPTS[1]:
            raise ValueError(f"frames that are not finite (seed {requests[0].seed})")
        return frames

    monkeypatch.setattr(pair, "generate_batch", spoilt)
    found = rows_of(pipe, out, 1)
    failed = [row for row in found if isinstance(row, Failed)]
    assert len(found) == 6
    assert [str(one) for one in failed] == [
        "radial failed: its dense run: frames that are not finite (seed 4) (a large blue ring)"
    ] * 2
    monkeypatch.setattr(pair, "generate_batch", real)
    assert [row["prompt"] for row in rows_of(pipe, out, 1)] == [PROMPTS[1]] * 2, "what failed is tried again"
    assert len(results.read_rows(out)[0]) == 7


def test_nan_frames_of_one_recipe_leave_the_others(pipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = metrics.measure

    def measure(frames, reference):
        spoilt.append(len(spoilt))
        return real(np.full_like(frames, np.nan) if len(spoilt) == 1 else frames, reference)

    spoilt: list[int] = []
    monkeypatch.setattr(metrics, "measure", measure)
    first, second = rows_of(pipe, tmp_path / "rows.jsonl", 1, PROMPTS[:1])
    assert isinstance(first, Failed)
    assert "values from nan to nan; valid: 0 to 1" in first.reason
    assert second["recipe"]["selection"]["density"] == 0.4


def test_a_batch_below_one_is_refused(pipe, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch: 0; valid: a whole number from 1"):
        rows_of(pipe, tmp_path / "rows.jsonl", 0)


def test_a_grid_without_values_leaves_the_recipe_as_it_is() -> None:
    recipe = RECIPES[0]
    assert grid(recipe, [], [], 20) == [recipe]
    assert [found.schedule.dense_steps for found in grid(recipe, [], [0.25, 0.5], 20)] == [5, 10]
    assert len(grid(recipe, [0.2, 0.3], [], 20)) == 2
    assert len(grid(recipe, [0.2, 0.3], [0.0, 0.1, 0.2], 20)) == 6
