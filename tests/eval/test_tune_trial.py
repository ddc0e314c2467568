"""The trial of tuning: what counts as near, and both of its ways on a small model."""

import argparse
import json
from pathlib import Path

import pytest

from sparse_dit.eval import tune as tuning
from sparse_dit.eval import tune_trial
from sparse_dit.eval.attention_time import Ratios
from sparse_dit.eval.tune_trial import best_of, judge, replay, whole
from sparse_dit.pipelines.generate import Request

SPACE = """
- recipe: radial
  set: {block_q: 16, block_k: 16, schedule.dense_layers: [], schedule.dense_steps: 0}
  vary: {selection.density: [0.7, 0.45, 0.2]}
"""


def test_near_is_above_the_floor_and_hardly_slower() -> None:
    costs, means = [0.5, 0.51, 0.6, 0.4], [30.0, 31.0, 35.0, 20.0]
    assert best_of(costs, means, 25.0) == 0
    assert best_of(costs, means, 36.0) is None
    assert judge(costs, means, 25.0, 1)["near"]
    assert not judge(costs, means, 25.0, 2)["near"]
    assert not judge(costs, means, 25.0, 3)["near"], "it is below the floor"
    assert not judge(costs, means, 25.0, None)["near"]
    assert judge(costs, means, 36.0, None)["near"]


def test_searches_beside_an_exhaustive_one(mini_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ratios(taken, recipe, device) -> Ratios:
        return Ratios(recipe.selection.density, recipe.selection.density, 0.0, 1)

    monkeypatch.setattr(tuning, "call_ratios", ratios)
    monkeypatch.setattr(tune_trial, "TINY_WAN", str(mini_wan))
    (tmp_path / "space.yaml").write_text(SPACE)
    request = Request("", steps=1, height=48, width=48, num_frames=5)
    options = argparse.Namespace(
        folder=tmp_path, space=str(tmp_path / "space.yaml"), prompts=5, drawn="", floors=[0.0, 500.0], searches=7,
        rows=tmp_path / "tuned.rows.jsonl", faster=False, candidates=0,
    )  # fmt: skip
    row = whole(options, request)
    assert row["exhaustive_runs"] == 3 * 5
    assert row["attention_times"] == pytest.approx([0.7, 0.45, 0.2])
    lowest, impossible = row["searches"]
    assert (lowest["best"], impossible["best"], impossible["near"]) == (2, None, True)
    assert lowest["runs"] <= 3
    # Prompt number i has seed i, so that each recipe's rows are one a seed.
    assert len(options.rows.read_text().splitlines()) == 15
    told = replay(options, request)
    assert (told["candidates"], told["prompts"], told["exhaustive_runs"]) == (3, 5, 15)
    assert told["free"]["near"] == 7
    assert told["free"]["share_most"] <= 1
    options.candidates = 2
    small = replay(options, request)
    assert (small["candidates"], small["drawn_from"], small["exhaustive_runs"]) == (2, 3, 10)
    assert small["free"]["near"] == 7
    json.dumps([told, small])
