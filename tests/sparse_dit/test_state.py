"""Where a run is, and what was counted."""

import pytest
import torch

from sparse_dit.layout import TokenLayout
from sparse_dit.state import ALIKE, Context, RunState, Tally

LAYOUT = TokenLayout((3, 4, 4))
OTHER = TokenLayout((5, 4, 4))


def steps(state: RunState, noises: list[float], layout: TokenLayout = LAYOUT) -> list[int]:
    seen = []
    for noise in noises:
        state.begin_forward(layout, noise)
        seen.append(state.step)
    return seen


def test_the_step_of_the_context_counts() -> None:
    state = RunState()
    for step in (0, 0, 1, 1, 7):
        state.context = Context("cond", step)
        state.begin_forward(LAYOUT, None)
        assert (state.step, state.branch, state.noise) == (step, "cond", None)


def test_without_one_distinct_noise_levels_are_counted() -> None:
    # Two forwards a step, as with CFG, and one step whose forwards a cache has skipped.
    assert steps(RunState(), [1.0, 1.0, 0.8, 0.8, 0.5, 0.2, 0.2]) == [0, 0, 1, 1, 2, 3, 3]


def test_the_direction_is_learnt() -> None:
    assert steps(RunState(), [0.0, 0.3, 0.6, 1.0]) == [0, 1, 2, 3]


@pytest.mark.parametrize("noises", [[1.0, 0.6, 0.2], [0.0, 0.4, 0.9]])
def test_a_jump_back_begins_a_new_run(noises: list[float]) -> None:
    state = RunState()
    assert steps(state, noises * 3) == [0, 1, 2] * 3


def test_a_step_back_begins_a_new_run() -> None:
    state = RunState()
    for step in (4, 5, 0):
        state.context = Context("", step)
        state.begin_forward(LAYOUT, None)
        state.slot(0).setdefault("kept", torch.zeros(step + 1))
    assert state.step == 0
    assert state.slot(0)["kept"].numel() == 1


def test_another_grid_begins_a_new_run_but_another_text_does_not() -> None:
    state = RunState()
    steps(state, [1.0, 0.5])
    assert steps(state, [0.4], TokenLayout((3, 4, 4), text_after=7)) == [2]
    assert steps(state, [0.3], OTHER) == [0]


def test_neither_step_nor_noise_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^noise: None; valid: "):
        RunState().begin_forward(LAYOUT, None)


def test_layers_keep_their_own_by_branch() -> None:
    state = RunState()
    for branch, size in (("cond", 3), ("uncond", 5)):
        state.context = Context(branch, 0)
        state.begin_forward(LAYOUT, None)
        state.slot(2)["kept"] = torch.zeros(size)
    assert state.nbytes == 8 * 4
    state.context = Context("cond", 1)
    state.begin_forward(LAYOUT, None)
    assert state.slot(2)["kept"].numel() == 3
    assert not state.slot(1)
    state.reset()
    assert state.nbytes == 0


def test_runs_of_one_step_do_not_pile_up_what_they_keep() -> None:
    state = RunState()
    for _ in range(100):
        state.begin_forward(LAYOUT, 1.0)
        state.slot(0)["kept"] = torch.zeros(1)
        assert max(state.nbytes / 4, state.branches) <= ALIKE
    state.begin_forward(LAYOUT, 0.5)
    assert (state.step, state.branch, "kept" in state.slot(0)) == (1, "forward 1", False)


def test_one_branch_of_two_is_told_by_its_name() -> None:
    state = RunState()
    for number, (branch, branches) in enumerate((("", 1), ("cond", 2), ("uncond", 3))):
        state.context = Context(branch, number)
        state.begin_forward(LAYOUT, None)
        assert state.branches == branches
    state.reset()
    state.context = Context("cond", 0)
    state.begin_forward(LAYOUT, None)
    assert state.branches == 2


def test_without_a_branch_the_forwards_of_a_step_are_told_apart() -> None:
    state = RunState()
    branches = []
    for noise in (1.0, 1.0, 0.6, 0.6, 0.2):
        state.begin_forward(LAYOUT, noise)
        branches.append(state.branch)
        state.slot(0)["kept"] = torch.zeros(1)
    assert branches == ["forward 1", "forward 2"] * 2 + ["forward 1"]
    assert state.nbytes == 2 * 4


def test_a_told_step_tells_forwards_without_a_branch_apart() -> None:
    state = RunState()
    branches = []
    for step in (0, 0, 1, 1):
        state.context = Context("", step)
        state.begin_forward(LAYOUT, None)
        branches.append(state.branch)
    assert branches == ["forward 1", "forward 2"] * 2


def test_another_signature_empties_the_slot() -> None:
    state = RunState()
    state.begin_forward(LAYOUT, 1.0)
    state.slot(0, (LAYOUT, 1)).refreshed = 3
    state.slot(0, (LAYOUT, 1))["kept"] = torch.zeros(2)
    assert state.slot(0, (LAYOUT, 1)).refreshed == 3
    assert state.slot(0, (LAYOUT, 2)).refreshed is None
    assert not state.slot(0, (LAYOUT, 2))


def test_another_transformer_drops_what_the_layers_of_the_first_kept_but_not_the_step() -> None:
    state = RunState()
    for noise, transformer in ((1.0, 1), (0.7, 1), (0.4, 2)):
        state.begin_forward(LAYOUT, noise, transformer)
        assert state.nbytes == (4 if noise == 0.7 else 0)
        state.slot(0)["kept"] = torch.zeros(1)
    assert state.step == 2


def test_measured_densities_are_added_where_they_are() -> None:
    tally = Tally(timing=False)
    tally.begin_forward(planned=2)
    tally.count_sparse(torch.tensor(0.1, dtype=torch.float64), "host")
    tally.begin_forward(planned=2)
    tally.count_sparse(torch.tensor(0.25, dtype=torch.float64), "host")
    tally.count_sparse(0.5, "host")
    tally.end_forward()
    tally.begin_forward(planned=1)
    tally.count_sparse(torch.tensor(0.75, dtype=torch.float64), "host")
    tally.end_forward()
    assert tally.summary().density == 0.5
    assert tally.summary().run_density == 0.5


def test_only_completed_forwards_count() -> None:
    tally = Tally(timing=False)
    tally.begin_forward(planned=3)
    tally.count_dense("mask")
    tally.begin_forward(planned=3)
    tally.count_dense("short")
    tally.count_sparse(0.25, "host")
    tally.count_sparse(0.75, "host")
    assert tally.end_forward() == (3, 3)
    tally.begin_forward(planned=3)
    summary = tally.summary()
    assert (summary.planned, summary.made, summary.sparse, summary.dense) == (3, 3, 2, {"short": 1})
    assert summary.density == 0.5
    assert summary.run_density == pytest.approx(2 / 3)
    assert (summary.attention_seconds, summary.backend) == (None, "host")
    assert summary.to_dict()["planned"] == 3


def test_an_empty_summary_has_no_numbers() -> None:
    summary = Tally(timing=True).summary()
    assert (summary.made, summary.density, summary.run_density, summary.attention_seconds) == (0, None, None, 0.0)
    assert summary.backend == "dense"


@pytest.mark.gpu
def test_gpu_calls_are_timed_by_events() -> None:
    tally = Tally(timing=True)
    with tally.timed(torch.device("cuda")):
        torch.cuda._sleep(20_000_000)
    seconds = tally.summary().attention_seconds
    assert seconds is not None
    assert 1e-3 < seconds < 1.0
    assert tally.summary().attention_seconds == seconds


def test_cpu_calls_are_timed() -> None:
    tally = Tally(timing=True)
    with tally.timed(torch.device("cpu")):
        torch.randn(400, 400) @ torch.randn(400, 400)
    assert 0.0 < (tally.summary().attention_seconds or 0.0) < 5.0
