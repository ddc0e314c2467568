"""Times of calls in pairs, and what a schedule makes of them."""

from pathlib import Path

import pytest
import torch

from sparse_dit.eval import attention_time
from sparse_dit.eval.attention_time import Ratios, call_ratios, run_share, take_calls
from sparse_dit.eval.pair import plan_arguments
from sparse_dit.pipelines.generate import Request, generate, load_pipeline
from sparse_dit.pipelines.patch import explain, sparse, summary
from sparse_dit.recipe import load_recipe

REQUEST = Request("a red circle moves right", seed=3, steps=6, height=64, width=64, num_frames=9)
SMALL = {"block_q": 32, "block_k": 32, "schedule.dense_layers": []}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pipe(mini_wan: Path):
    loaded = load_pipeline(str(mini_wan))
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_calls_are_taken_out_of_the_middle_of_a_run(pipe) -> None:
    before = generate(pipe, REQUEST)
    taken = take_calls(pipe, REQUEST)
    assert [(call.layer, call.step) for call in taken] == [(0, 3), (1, 3)]
    assert all(call.q.shape == call.k.shape == call.v.shape == (1, 2, 192, 16) for call in taken)
    assert taken[0].layout.grid == (3, 8, 8)
    assert (generate(pipe, REQUEST) == before).all(), "the pipeline was changed"


def test_ratios_are_medians_of_pairs(pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock by which the recipe's calls take twice the dense ones' time, and now and then a hundred times."""
    ticks = iter(range(10**6))

    def clock(call, device) -> float:
        call()
        tick = next(ticks)
        return {0: 1.0, 1: 2.0}[tick % 2] * (50.0 if tick % 11 == 1 else 1.0)

    monkeypatch.setattr(attention_time, "timed", clock)
    recipe = load_recipe("radial").override({**SMALL, "selection.density": 0.5})
    ratios = call_ratios(take_calls(pipe, REQUEST), recipe, CPU)
    assert ratios.refresh == ratios.kept == pytest.approx(2.0)
    assert ratios.pairs == 2 * attention_time.REPEATS
    assert call_ratios([], load_recipe("dense"), CPU) == Ratios(1.0, 1.0, 0.0, 0)


def test_calls_that_live_on_a_choice_are_timed_apart(pipe) -> None:
    recipe = load_recipe("adaspa").override({**SMALL, "schedule.refresh_steps": [0, 2], "precision": "native"})
    ratios = call_ratios(take_calls(pipe, REQUEST), recipe, CPU, repeats=2)
    assert ratios.pairs == 2 * 2 * 2
    assert ratios.refresh > 0
    assert ratios.kept > 0


def test_a_runs_share_counts_the_calls_that_a_run_makes(pipe) -> None:
    changes = {**SMALL, "schedule.dense_steps": 1, "schedule.dense_layers": [1], "schedule.refresh_every": 2}
    recipe = load_recipe("draft").override({**changes, "order.tile": [1, 4, 8], "schedule.dense_above": 1.0})
    plan = explain(pipe, recipe, **plan_arguments(pipe, REQUEST))
    share = run_share(Ratios(0.5, 0.25, 0.0, 1), recipe.schedule, plan)
    # 6 steps of 2 layers: 1 dense step, 5 steps of a dense layer, and of the other one refreshes in steps 1, 3, 5.
    assert share == pytest.approx((2 + 5 + 3 * 0.5 + 2 * 0.25) / 12)
    with sparse(pipe, recipe):
        generate(pipe, REQUEST)
        made = summary(pipe)
    assert made.sparse == 2 * 5, "two branches"
    assert run_share(Ratios(1.0, 1.0, 0.0, 1), recipe.schedule, plan) == 1


def test_a_model_that_stays_dense_is_told(pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_time._Take, "choose", lambda self, q, k, v, call: pytest.fail("asked"))
    short = Request("x", steps=1, height=16, width=16, num_frames=1)
    with pytest.raises(ValueError, match="none of its self-attention calls could be seen"):
        take_calls(pipe, short)
