"""Groups of two processes that make every row together: what they make, and that none waits for one that is lost."""

import io
import multiprocessing
import os
import pickle
import select
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.distributed as dist
from PIL import Image, ImageSequence

from sparse_dit.pipelines.batch import groups, processes
from sparse_dit.pipelines.batch.groups import Rank, Seat, end_with_parent, join, run_groups
from sparse_dit.pipelines.batch.manifest import Item
from sparse_dit.pipelines.batch.worker import Job, Outcome, Worker
from sparse_dit.pipelines.generate import Request
from sparse_dit.recipe import load_recipe

FORK = multiprocessing.get_context("fork")
PAIR = ("cpu", "cpu")
BLOCKS = {"block_q": 16, "block_k": 16, "schedule.dense_steps": 0}
RADIAL = load_recipe("tiny-radial").override(BLOCKS)
SIZE = Request("", seed=3, steps=2, height=32, width=32, num_frames=5)


@pytest.fixture(autouse=True)
def forked() -> Iterator[None]:
    """Processes that start at once, have this file's workers, and wait for nobody for long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiprocessing, "get_context", lambda name: FORK)
        # A forked process holds its sisters' connections open, so that they never see the end of them.
        patch.setattr(processes, "PATIENCE", 0.0)
        patch.setattr(groups, "MOMENT", 0.5)
        yield
    assert not multiprocessing.active_children()


class OnCpu(Rank):
    """A rank where diffusers shares a model without accelerator, with rows that go wrong in their second forward."""

    def __init__(self, job: Job, device: str, seat: Seat, mark: Path) -> None:
        # diffusers divides by the number of accelerators to find this process's.
        torch.accelerator.device_count = lambda: seat.ranks
        super().__init__(job, device, seat)
        self.pipe.transformer.register_forward_pre_hook(self.before)
        self.pipe.transformer.blocks[1].register_forward_pre_hook(self.look)
        self.mark = mark

    def run(self, item: Item) -> Outcome:
        self.forwards, self.tokens, self.prompt = 0, 0, item.request.prompt
        outcome = super().run(item)
        return replace(outcome, measured={**outcome.measured, "tokens": self.tokens})

    def look(self, _: Any, given: tuple[torch.Tensor, ...]) -> None:
        self.tokens = given[0].shape[1]

    def before(self, *_: Any) -> None:
        self.forwards += 1
        if self.prompt == "uneven":
            assert self.forwards == 0, "Tensor size along dimension to be sharded must be divisible by mesh size"
        if self.prompt == "killed once" and (self.forwards, self.seat.rank) == (2, 1) and not self.mark.exists():
            self.mark.write_text("")
            os.kill(os.getpid(), signal.SIGKILL)


REAL = {
    "radial": Item(1, "1", replace(SIZE, prompt="radial"), RADIAL),
    "refused": Item(2, "2", replace(SIZE, prompt="refused", height=20), RADIAL),
    "uneven": Item(3, "3", replace(SIZE, prompt="uneven"), RADIAL),
    # Every head has a density of its own.
    "by head": Item(
        4,
        "4",
        replace(SIZE, prompt="by head"),
        RADIAL.override({"selection": {"name": "pooled", "tau": 0.5}, "schedule.dense_steps": 1}),
    ),
    "killed once": Item(5, "5", replace(SIZE, prompt="killed once"), RADIAL),
    "dense": Item(6, "6", replace(SIZE, prompt="dense"), load_recipe("dense")),
}


def frames(video: bytes) -> npt.NDArray[np.int64]:
    pictures = ImageSequence.Iterator(Image.open(io.BytesIO(video)))
    return np.stack([np.asarray(picture.convert("RGB"), dtype=np.int64) for picture in pictures])


def test_two_processes_make_what_one_makes(mini_wan: Path, tmp_path: Path) -> None:
    job = Job(str(mini_wan), "", suffix=".webp", retries=1, threads=1)
    worker = partial(OnCpu, mark=tmp_path / "mark")
    outcomes = {one.item.request.prompt: one for one in run_groups(list(REAL.values()), job, [PAIR], worker)}  # type: ignore[arg-type]
    assert outcomes.keys() == REAL.keys()
    alone = Worker(job, "cpu")
    for name, outcome in outcomes.items():
        if name in ("refused", "uneven"):
            assert (outcome.kind, outcome.attempts, outcome.video) == ("refused", 1, b"")
            continue
        assert (outcome.kind, outcome.attempts) == ("done", 2 if name == "killed once" else 1), outcome.problem
        one = alone.run(REAL[name])
        assert np.abs(frames(outcome.video) - frames(one.video)).max() <= 1, name
        assert outcome.measured.keys() == {*one.measured, "gpus_per_video", "tokens"}
        assert outcome.measured["calls"] == one.measured["calls"]
        assert (outcome.measured["calls"]["sparse"] > 0) == (name != "dense")
        assert outcome.measured["run_density"] == pytest.approx(one.measured["run_density"])
        # Of 2 x 4 x 4 tokens.
        assert (outcome.measured["gpus_per_video"], outcome.measured["tokens"]) == (2, 16)
    assert (tmp_path / "mark").exists()
    assert outcomes["refused"].problem.startswith("`height` and `width` have to be divisible by 16")
    assert outcomes["uneven"].problem.startswith("gpus_per_video: 2 (Tensor size along")


@pytest.mark.parametrize("ranks", [2, 3])
def test_models_that_cannot_be_shared_stop_the_run(ranks: int, mini_wan: Path) -> None:
    """Three processes for two heads; two where diffusers has no plan."""

    class Planless(OnCpu):
        def __init__(self, job: Job, device: str, seat: Seat, mark: Path) -> None:
            from diffusers import WanTransformer3DModel

            if ranks == 2:
                WanTransformer3DModel._cp_plan = None
            super().__init__(job, device, seat, mark)

    job = Job(str(mini_wan), "", suffix=".webp", threads=1)
    run = run_groups([REAL["radial"]], job, [["cpu"] * ranks], partial(Planless, mark=mini_wan / "none"))
    [outcome] = run
    assert outcome.kind == "model"
    told = "WanTransformer3DModel has 2 heads; valid: a number" if ranks == 3 else "`cp_plan` must be provided"
    assert outcome.problem.startswith(f"gpus_per_video: {ranks}; WanTransformer3DModel")
    assert told in outcome.problem


class Stub:
    """Exchanges a number with the other one for each row, unless the prompt has it do something else before."""

    def __init__(self, job: Job, device: str, seat: Seat, folder: Path) -> None:
        end_with_parent()
        torch.set_num_threads(1)
        assert job.retries == 0
        self.rank, self.folder = seat.rank, folder
        join(seat, device)

    def run(self, item: Item) -> Outcome:
        what, _, where = item.request.prompt.partition(" ")
        mark = self.folder / f"{item.id}-{self.rank}"
        if where in ("both", str(self.rank)) and not (what.endswith("once") and mark.exists()):
            mark.touch()
            if what.startswith("die"):
                os.kill(os.getpid(), signal.SIGKILL)
            if what.startswith("stop"):
                os.kill(os.getpid(), signal.SIGSTOP)
            kind: Any = what.removesuffix("-once")
            return Outcome(item, kind, 1, f"{kind} on {self.rank}")
        total = torch.ones(1)
        try:
            dist.all_reduce(total)
        except RuntimeError as error:
            return Outcome(item, "failed", 1, f"exchange: {error}")
        video = f"{item.request.prompt} of {int(total)}".encode()
        return Outcome(item, "done", 1, video=video, measured={"pid": os.getpid(), "density": 0.25 + self.rank / 2})


JOB = Job("none", "", suffix=".webp", retries=1)


def rows(*prompts: str) -> list[Item]:
    return [Item(line, f"{line:02}", Request(prompt), RADIAL) for line, prompt in enumerate(prompts)]


def run(folder: Path, *prompts: str, pairs: Sequence[Sequence[str]] = (PAIR,)) -> dict[str, Outcome]:
    made = run_groups(rows(*prompts), JOB, pairs, partial(Stub, folder=folder))  # type: ignore[arg-type]
    return {outcome.item.request.prompt: outcome for outcome in made}


LOST = {
    # What one or both do, how the row ends after how many attempts, what is told of it.
    "die 1": ("failed", 2, "its group died each time, last process 1 with exit code -9"),
    "die 0": ("failed", 2, "its group died each time, last process 0 with exit code -9"),
    "die-once 0": ("done", 2, ""),
    "die-once both": ("done", 2, ""),
    "device-once 1": ("done", 2, ""),
    "failed-once 1": ("done", 2, ""),
    "failed 0": ("failed", 2, "failed on 0"),
    "memory 1": ("memory", 1, "memory on 1"),
    "memory both": ("memory", 1, "memory on "),
    "refused 1": ("refused", 1, "refused on 1"),
}


@pytest.mark.parametrize("prompt", LOST)
def test_a_process_that_is_lost_does_not_keep_the_others(prompt: str, tmp_path: Path) -> None:
    outcomes = run(tmp_path, "before", prompt, "after")
    kind, attempts, problem = LOST[prompt]
    assert (outcomes[prompt].kind, outcomes[prompt].attempts) == (kind, attempts)
    assert outcomes[prompt].problem.startswith(problem)
    for other in ("before", "after"):
        assert (outcomes[other].video, outcomes[other].attempts) == (f"{other} of 2".encode(), 1)
    assert outcomes["before"].measured["pid"] != outcomes["after"].measured["pid"]
    assert outcomes["before"].measured["density"] == 0.5


def test_a_row_that_all_refuse_keeps_the_group(tmp_path: Path) -> None:
    outcomes = run(tmp_path, "before", "refused both", "after")
    assert (outcomes["refused both"].kind, outcomes["refused both"].attempts) == ("refused", 1)
    assert outcomes["before"].measured["pid"] == outcomes["after"].measured["pid"]


def test_a_process_that_hangs_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "TIMEOUT", timedelta(seconds=2))
    outcomes = run(tmp_path, "before", "stop-once 1", "after")
    assert {name: (one.kind, one.attempts) for name, one in outcomes.items()} == {
        "before": ("done", 1),
        "stop-once 1": ("done", 2),
        "after": ("done", 1),
    }


def test_groups_work_side_by_side(tmp_path: Path) -> None:
    prompts = ["a", "die-once 1", "b", "failed 1", "c", "d"]
    outcomes = run(tmp_path, *prompts, pairs=(PAIR, PAIR))
    assert outcomes.keys() == set(prompts)
    assert {name for name, one in outcomes.items() if one.kind != "done"} == {"failed 1"}
    assert len({one.measured["pid"] for one in outcomes.values() if one.measured}) > 1


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_nobody_is_left_when_the_parent_is_gone(ending: signal.Signals, tmp_path: Path) -> None:
    """One process waits for another, which is asleep: none of them would look for the parent by itself."""

    class Asleep(Stub):
        def run(self, item: Item) -> Outcome:
            (tmp_path / f"asleep-{os.getpid()}").touch()
            return super().run(item) if self.rank == 0 else signal.pause()  # type: ignore[return-value]

    def parent() -> None:
        os.close(reading)
        list(run_groups(rows("a"), JOB, [PAIR], partial(Asleep, folder=tmp_path)))  # type: ignore[arg-type]

    # Everybody holds the writing end; its end is read when the last one is gone.
    reading, writing = os.pipe()
    process = FORK.Process(target=parent)
    process.start()
    os.close(writing)
    while len(list(tmp_path.glob("asleep-*"))) < 2:
        assert process.exitcode is None
        select.select([reading], [], [], 0.02)
    os.kill(process.pid, ending)
    process.join()
    ended, _, _ = select.select([reading], [], [], 10)
    os.close(reading)
    for mark in tmp_path.glob("asleep-*") if not ended else ():
        os.kill(int(mark.name.removeprefix("asleep-")), signal.SIGKILL)
    assert ended


def test_what_the_processes_get_can_be_sent(mini_wan: Path) -> None:
    """They are spawned where there are GPUs, so what makes a worker is pickled."""
    job = Job(str(mini_wan), "", retries=2)
    again: Any = pickle.loads(pickle.dumps(partial(Rank, job, "cuda:1", Seat(1, 2, 4000))))
    assert (again.func, again.args) == (Rank, (job, "cuda:1", Seat(1, 2, 4000)))
