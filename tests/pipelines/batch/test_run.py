"""Whole runs with rows that cost nothing: what is run, what is kept, and how it ends."""

import errno
import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparse_dit.pipelines.batch import processes
from sparse_dit.pipelines.batch.groups import run_groups
from sparse_dit.pipelines.batch.manifest import Item
from sparse_dit.pipelines.batch.processes import run_processes
from sparse_dit.pipelines.batch.run import Plan, Report, choose_engine, plan_batch, plan_lines, run_batch
from sparse_dit.pipelines.batch.worker import Job, Kind, Outcome
from sparse_dit.pipelines.generate import Request
from sparse_dit.recipe import load_recipe

JOB = Job("tiny-wan", "sha256:0", suffix=".webp", retries=1)
FORK = multiprocessing.get_context("fork")


def made(item: Item) -> Outcome:
    return Outcome(item, "done", 1, video=f"video of {item.request.prompt}".encode() * 50, measured={"seconds": 0.0})


def engine(items: Sequence[Item], job: Job) -> Iterator[Outcome]:
    yield from map(made, items)


def ends(kind: Kind, at: int) -> Callable[[Sequence[Item], Job], Iterator[Outcome]]:
    """An engine, one of whose rows ends in a way."""

    def run(items: Sequence[Item], job: Job) -> Iterator[Outcome]:
        for number, item in enumerate(items):
            yield Outcome(item, kind, 2, f"row {number} went wrong") if number == at else made(item)

    return run


def plan(folder: Path, *prompts: str, job: Job = JOB, recipe: str = "tiny-radial") -> Plan:
    manifest = folder / "rows.jsonl"
    manifest.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return plan_batch(manifest, folder / "out", Request(""), load_recipe(recipe), job)


def run(folder: Path, chosen: Plan, run_rows: Callable[..., Iterator[Outcome]] = engine, job: Job = JOB) -> Report:
    return run_batch(chosen, folder / "out", job, run_rows, {"revision": "r"})


def results(folder: Path, name: str = "results") -> list[dict]:
    return [json.loads(line) for line in (folder / "out" / f"{name}.jsonl").read_text().splitlines()]


def never(items: Sequence[Item], job: Job) -> Iterator[Outcome]:
    raise AssertionError("nothing is left to run, so no model must be loaded")


def test_rows_that_are_done_are_not_run_again(tmp_path: Path) -> None:
    first = run(tmp_path, plan(tmp_path, "a", "b", "a"))
    assert (first.made, first.complete) == (2, True)
    again = plan(tmp_path, "a", "b", "a")
    assert [len(part) for part in (again.pending, again.done, again.repeats)] == [0, 2, 1]
    assert run(tmp_path, again, never).complete
    grown = run(tmp_path, plan(tmp_path, "b", "c", "a"))
    assert (grown.made, len(grown.plan.done)) == (1, 2)
    rows = results(tmp_path)
    assert [row["prompt"] for row in rows] == ["a", "b", "c"]
    assert {row["revision"] for row in rows} == {"r"}
    assert {row["model_identity"] for row in rows} == {"sha256:0"}
    assert not (tmp_path / "out" / "failures.jsonl").exists()


def test_a_plan_that_another_run_has_overtaken(tmp_path: Path) -> None:
    early, late = plan(tmp_path, "a", "b"), plan(tmp_path, "a")
    run(tmp_path, late)
    report = run(tmp_path, early)
    assert (report.made, len(report.plan.done)) == (1, 1)
    assert [row["prompt"] for row in results(tmp_path)] == ["a", "b"]


def test_a_changed_setting_runs_rows_again(tmp_path: Path) -> None:
    run(tmp_path, plan(tmp_path, "a"))
    for changed in (replace(JOB, identity="sha256:1"), replace(JOB, fps=8), replace(JOB, suffix=".mp4")):
        assert len(plan(tmp_path, "a", job=changed).pending) == 1
    assert len(plan(tmp_path, "a", recipe="radial").pending) == 1
    # Neither of these changes the video.
    assert len(plan(tmp_path, "a", job=replace(JOB, retries=5, threads=1)).done) == 1


@pytest.mark.parametrize("kind", ["refused", "memory", "failed"])
def test_a_row_that_fails_is_told_and_tried_in_the_next_run(kind: Kind, tmp_path: Path, capsys) -> None:
    report = run(tmp_path, plan(tmp_path, "a", "b", "c"), ends(kind, 1))
    assert (report.made, report.failed, report.complete) == (2, 1, False)
    assert f"line 2: row 1 went wrong ({kind}, 2 attempts)" in capsys.readouterr().err
    [failure] = results(tmp_path, "failures")
    assert (failure["line"], failure["kind"], failure["prompt"]) == (2, kind, "b")
    assert [row["prompt"] for row in results(tmp_path)] == ["a", "c"]
    assert run(tmp_path, plan(tmp_path, "a", "b", "c")).complete
    assert [row["prompt"] for row in results(tmp_path)] == ["a", "c", "b"]


@pytest.mark.parametrize("kind", ["disk", "device"])
def test_what_no_row_would_survive_stops_the_run(kind: Kind, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"row 1 went wrong.*1 of 3 rows are done, the same command goes on from there"):
        run(tmp_path, plan(tmp_path, "a", "b", "c"), ends(kind, 1))
    with pytest.raises(OSError, match=r"row 1 went wrong.*2 of 3 rows are done"):  # one before, one now
        run(tmp_path, plan(tmp_path, "a", "b", "c"), ends(kind, 1))
    assert run(tmp_path, plan(tmp_path, "a", "b", "c")).made == 1


def test_a_refused_row_leaves_a_run_incomplete(tmp_path: Path) -> None:
    report = run(tmp_path, plan(tmp_path, "a", ""))
    assert (report.made, report.failed, report.complete) == (1, 0, False)
    assert str(report) == "1 made, 0 done before, 0 repeats, 1 failed (see failures.jsonl)"


def test_a_row_tells_how_often_it_was_tried(tmp_path: Path) -> None:
    run(tmp_path, plan(tmp_path, "a"), lambda items, job: (replace(made(item), attempts=3) for item in items))
    assert [row["attempts"] for row in results(tmp_path)] == [3]


def test_a_model_that_cannot_be_loaded_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="row 0 went wrong"):
        run(tmp_path, plan(tmp_path, "a", "b"), ends("model", 0))
    assert run(tmp_path, plan(tmp_path, "a", "b")).complete


def test_a_full_disk_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, left = os.write, 1500

    def write(file: int, content: bytes) -> int:
        nonlocal left
        if left == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = real(file, bytes(content)[:left])
        left -= taken
        return taken

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(OSError, match=r"^out: .*No space left on device\); 1 of 3 rows are done, the same command"):
        run(tmp_path, plan(tmp_path, "a", "b", "c"))
    monkeypatch.undo()
    assert len(results(tmp_path)) == 1
    assert run(tmp_path, plan(tmp_path, "a", "b", "c")).complete
    assert len(results(tmp_path)) == 3


def slow(items: Sequence[Item], job: Job) -> Iterator[Outcome]:
    for item in items:
        time.sleep(0.002)
        yield made(item)


def test_killed_at_random_moments_every_row_is_there_once(tmp_path: Path) -> None:
    prompts = [f"number {number}" for number in range(200)]
    chance = random.Random(0)
    path = tmp_path / "out" / "results.jsonl"

    def count() -> int:
        return path.read_bytes().count(b"\n") if path.exists() else 0

    counts = [0]
    for _ in range(3):
        child = FORK.Process(target=lambda: run(tmp_path, plan(tmp_path, *prompts), slow))
        child.start()
        # By rows and not by the clock: a fast machine would be through before a kill by time.
        while count() < counts[-1] + 20:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.03))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode == -signal.SIGKILL
        counts.append(count())
        assert counts[-1] >= counts[-2]
    assert 0 < counts[-1] < 200
    report = run(tmp_path, plan(tmp_path, *prompts), slow)
    assert report.made == 200 - counts[-1]
    rows = results(tmp_path)
    assert sorted(row["prompt"] for row in rows) == sorted(prompts)
    for row in rows:
        assert (tmp_path / "out" / row["file"]).read_bytes() == f"video of {row['prompt']}".encode() * 50
    assert len(list((tmp_path / "out").iterdir())) == 200 + 2


class Stub:
    """A worker that makes rows at once, or ends its process, as the prompt says."""

    def __init__(self, job: Job, device: str) -> None:
        if job.model == "missing":
            raise ValueError("model: 'missing'; valid: another one")

    def run(self, item: Item) -> Outcome:
        words = item.request.prompt.split()
        if words[0] == "die" or (words[0] == "once" and not Path(words[1]).exists()):
            if words[0] == "once":
                Path(words[1]).write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
        return Outcome(item, "device", 1, "CUDA error") if words[0] == "lose" else made(item)


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that start at once, with `Stub` for a worker."""
    monkeypatch.setattr(processes, "Worker", Stub)
    monkeypatch.setattr(multiprocessing, "get_context", lambda name: FORK)
    # A forked process holds its sisters' connections open, so that they never see the end of them.
    monkeypatch.setattr(processes, "PATIENCE", 0.0)


@pytest.mark.usefixtures("forked")
def test_a_process_that_dies_is_replaced(tmp_path: Path) -> None:
    prompts = ["a", f"once {tmp_path / 'mark'}", "b", "die", "c", "lose", "d", "e"]
    chosen = plan(tmp_path, *prompts)
    outcomes = {one.item.request.prompt: one for one in run_processes(chosen.pending, JOB, ["cpu", "cpu"])}
    assert outcomes.keys() == set(prompts)
    assert {name for name, one in outcomes.items() if one.kind == "failed"} == {"die", "lose"}
    assert outcomes["die"].problem == "its worker died each time, last with exit code -9"
    assert (outcomes["die"].attempts, outcomes[prompts[1]].attempts, outcomes["a"].attempts) == (2, 2, 1)
    assert not multiprocessing.active_children()


@pytest.mark.usefixtures("forked")
def test_no_process_is_started_that_has_nothing_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[None] = []

    class Counted(processes.Member):
        def __init__(self, makers: Sequence[Callable]) -> None:
            started.append(None)
            super().__init__(makers)

    monkeypatch.setattr(processes, "Member", Counted)
    [outcome] = run_processes(plan(tmp_path, "die").pending, replace(JOB, retries=0), ["cpu"] * 3)
    assert (outcome.kind, len(started)) == ("failed", 1)


@pytest.mark.usefixtures("forked")
def test_processes_without_a_model_stop_the_run(tmp_path: Path) -> None:
    job = replace(JOB, model="missing")
    with pytest.raises(ValueError, match=r"^model: 'missing'; valid: another one$"):
        run(tmp_path, plan(tmp_path, "a", "b", "c"), lambda items, _: run_processes(items, job, ["cpu", "cpu"]))
    assert not multiprocessing.active_children()


def test_a_plan_in_words(tmp_path: Path) -> None:
    run(tmp_path, plan(tmp_path, "a"))
    lines = plan_lines(plan(tmp_path, "a", "b", "b", ""), JOB)
    for line, words in zip(
        lines, ("line 1 done: a-", "line 2 would run: b-", "line 3 repeats", "line 4 refused"), strict=False
    ):
        assert line.startswith(words)
    assert lines[-1] == "4 rows in all: 1 would run, 1 done, 1 repeats an earlier row, 1 refused"


def test_engines_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert choose_engine("local", "auto", 0, None).keywords == {"device": "cpu"}
    assert choose_engine("local", "cpu", 2, None).keywords == {"devices": ["cpu", "cpu"]}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert choose_engine("local", "auto", 0, None).keywords == {"devices": ["cuda:0", "cuda:1", "cuda:2"]}
    assert choose_engine("local", "cuda", 1, None).keywords == {"device": "cuda:0"}
    assert choose_engine("local", "cpu", 0, None).keywords == {"device": "cpu"}
    assert choose_engine("local", "cuda", 1, None, 2).keywords == {"groups": [["cuda:0", "cuda:1"]]}
    assert choose_engine("ray", "auto", 0, "auto").keywords == {"device": "auto", "workers": 0, "address": "auto"}


@pytest.mark.parametrize(("gpus", "told"), [(4, ""), (5, "sparse-dit: 1 of 5 GPUs left over (gpus_per_video: 2)\n")])
def test_gpus_that_are_left_over_are_told(gpus: int, told: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    engine = choose_engine("local", "auto", 0, None, 2)
    assert engine.func is run_groups
    assert engine.keywords == {"groups": [["cuda:0", "cuda:1"], ["cuda:2", "cuda:3"]]}
    assert capsys.readouterr().err == told
    # Who asks for fewer workers knows that GPUs are left over.
    assert choose_engine("local", "auto", 1, None, 2).keywords == {"groups": [["cuda:0", "cuda:1"]]}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("wrong", "valid"),
    [
        (("local", "auto", 0, None, 4), "gpus_per_video: 4 of 3 GPUs; valid: 1 to 3"),
        (("local", "cpu", 0, None, 2), "gpus_per_video: 2 of 0 GPUs; valid: 1$"),
        (("local", "cuda", 2, None, 2), "workers: 2 of 2 GPUs each, of 3; valid: 0 to 1"),
        (("local", "cuda", 0, None, 0), "gpus_per_video: 0; valid: a whole number from 1"),
        (("ray", "cuda", 0, None, 2), "gpus_per_video: 2 with engine 'ray'; valid: 1, or engine 'local'"),
    ],
)
def test_groups_that_there_are_not(wrong: tuple, valid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(ValueError, match=valid):
        choose_engine(*wrong)


@pytest.mark.parametrize(
    ("wrong", "valid"),
    [
        (("local", "cuda", 0, None), "there is no CUDA device"),
        (("local", "cpu", -1, None), "workers: -1; valid: a whole number from 0"),
        (("local", "cpu", 0, "auto"), "valid: engine 'ray'"),
        (("spark", "cpu", 0, None), "valid: local, ray"),
    ],
)
def test_engines_that_there_are_not(wrong: tuple, valid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=valid):
        choose_engine(*wrong)
