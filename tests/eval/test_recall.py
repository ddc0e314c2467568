"""Mask recall against the probe's own figures, and heads that keep nothing."""

from pathlib import Path

import pytest

from sparse_dit.eval.probe import probed
from sparse_dit.eval.recall import mask_recall, recall_id
from sparse_dit.pipelines.generate import Request, generate, load_pipeline
from sparse_dit.pipelines.patch import sparse
from sparse_dit.recipe import Recipe, load_recipe

REQUEST = Request("a red circle moves right", seed=3, steps=3, height=64, width=64, num_frames=9)
SPARGE = load_recipe("sparge").override({"selection.density": 0.5, "precision": "native", "block_q": 32, "block_k": 32})


@pytest.fixture(scope="module")
def pipe(mini_wan: Path):
    loaded = load_pipeline(str(mini_wan))
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_recall_is_the_mean_over_the_calls_of_the_steps_looked_at(pipe) -> None:
    row = mask_recall(pipe, [REQUEST], SPARGE, model="mini", steps=(1, 2))
    with sparse(pipe, SPARGE), probed(pipe, steps=(1, 2)) as found:
        generate(pipe, REQUEST)
    assert {place.step for place in found.calls} == {1, 2}
    calls = [kept for seen in found.calls.values() for kept in seen]
    assert row["calls"] == len(calls) > 0
    assert row["recall"] == pytest.approx(sum(float(kept.recall.mean()) for kept in calls) / len(calls))
    assert 0.5 < row["recall"] < 1.0
    assert row["id"] == recall_id(pipe, [REQUEST], SPARGE, "mini", (1, 2), 16)


def test_more_blocks_keep_more_and_whole_calls_tell_nothing(pipe) -> None:
    recalls = [
        mask_recall(pipe, [REQUEST], SPARGE.override({"selection.density": density}), steps=(2,))["recall"]
        for density in (0.25, 0.75)
    ]
    assert recalls[0] < recalls[1]
    caching = Recipe.from_dict(
        {
            "selection": {"name": "band", "width": 16},
            "schedule": {"refresh_every": 3},
            "skipped": "reuse",
            "block_q": 32,
            "block_k": 32,
        }
    )
    # The first step is a refresh, whose output is whole.
    assert mask_recall(pipe, [REQUEST], caching, steps=(0,))["calls"] == 0
    assert mask_recall(pipe, [REQUEST], caching, steps=(0,))["recall"] is None
    assert mask_recall(pipe, [REQUEST], caching, steps=(1,))["calls"] > 0
