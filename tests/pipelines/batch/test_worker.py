"""One row: what it makes, how it fails, and that neither leaves anything to the next one."""

import errno
import io
import pickle
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sparse_dit.pipelines.batch import worker as module
from sparse_dit.pipelines.batch.identity import model_identity
from sparse_dit.pipelines.batch.manifest import Item
from sparse_dit.pipelines.batch.ray import Actor, Tries, run_ray
from sparse_dit.pipelines.batch.worker import Job, Outcome, Worker, check_whole, kind_of
from sparse_dit.pipelines.generate import Request, generate, load_pipeline, write_video
from sparse_dit.pipelines.patch import enable
from sparse_dit.recipe import load_recipe

SPARSE = load_recipe("tiny-radial").override({"block_q": 16, "block_k": 16, "schedule.dense_steps": 0})
REQUEST = Request("a red circle", seed=3, steps=2, height=32, width=32, num_frames=5)
ITEM = Item(4, "00", REQUEST, SPARSE)


@pytest.fixture(scope="module")
def job(mini_wan: Path) -> Job:
    return Job(str(mini_wan), model_identity(str(mini_wan)), suffix=".webp", retries=2, pause=0.5)


@pytest.fixture(scope="module")
def worker(job: Job) -> Worker:
    return Worker(job, "cpu")


def test_a_row_is_what_the_pipeline_makes(worker: Worker, job: Job, tmp_path: Path) -> None:
    pipe = enable(load_pipeline(job.model), SPARSE)
    write_video(generate(pipe, REQUEST), tmp_path / "own.webp")
    outcome = worker.run(ITEM)
    assert (outcome.kind, outcome.attempts, outcome.problem) == ("done", 1, "")
    assert outcome.video == (tmp_path / "own.webp").read_bytes()
    measured = outcome.measured
    assert measured["frames"] == [5, 32, 32, 3]
    assert (measured["steps"], measured["guidance_scale"]) == (2, 5.0)
    assert measured["seconds"] > 0
    assert 0 < measured["density"] < 1
    # Two layers, two branches, two steps.
    assert measured["calls"] == {"planned": 8, "made": 8, "sparse": 8, "dense": {}}


def test_rows_do_not_depend_on_those_before_them(worker: Worker) -> None:
    first = worker.run(ITEM)
    dense = worker.run(replace(ITEM, recipe=load_recipe("dense")))
    assert dense.measured["calls"]["dense"] == {"recipe": 8}
    assert dense.video != first.video
    refused = worker.run(replace(ITEM, request=replace(REQUEST, height=20)))
    assert (refused.kind, refused.attempts) == ("refused", 1)
    assert "divisible by 16" in refused.problem
    again = worker.run(ITEM)
    assert again.video == first.video
    assert again.measured["calls"] == first.measured["calls"]


def failing(*errors: Exception) -> Callable[..., Any]:
    left = list(errors)

    def run(*arguments: Any) -> Any:
        if left:
            raise left.pop(0)
        return generate(*arguments)

    return run


def test_memory_that_is_short_ends_a_row_only(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "generate", failing(torch.OutOfMemoryError("CUDA out of memory. Tried …")))
    freed: list[None] = []
    monkeypatch.setattr(module, "free_memory", lambda: freed.append(None))
    outcome = worker.run(ITEM)
    assert (outcome.kind, outcome.attempts, len(freed)) == ("memory", 1, 1)
    assert worker.run(ITEM).kind == "done"


def test_memory_that_really_is_short(worker: Worker) -> None:
    """A clip whose noise alone has 2^50 bytes, which no machine gives."""
    outcome = worker.run(replace(ITEM, request=replace(REQUEST, height=2**22, width=2**22, num_frames=4097)))
    assert outcome.kind == "memory"
    assert worker.run(ITEM).kind == "done"


def test_what_may_pass_is_tried_again(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    monkeypatch.setattr(module, "free_memory", lambda: None)  # it takes most of the time of this test
    errors = [RuntimeError("busy"), ConnectionError("lost")]
    monkeypatch.setattr(module, "generate", failing(*errors))
    outcome = worker.run(ITEM)
    assert (outcome.kind, outcome.attempts, pauses) == ("done", 3, [0.5, 1.0])
    monkeypatch.setattr(module, "generate", failing(*errors, RuntimeError("and\nagain")))
    outcome = worker.run(ITEM)
    assert (outcome.kind, outcome.attempts, outcome.problem) == ("failed", 3, "and again")


def test_a_worker_takes_its_threads(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setattr(module, "load_pipeline", lambda model, device: SimpleNamespace(set_progress_bar_config=dict))
    Worker(job, "cpu")
    Worker(replace(job, threads=3), "cpu")
    assert taken == [3]


def test_a_torn_video_is_no_video(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "write_video", lambda frames, file, fps: file.write_bytes(b"RIFF\x64\x00\x00\x00WEBP"))
    outcome = worker.run(ITEM)
    assert (outcome.kind, outcome.video) == ("disk", b"")
    assert "torn .webp file of 12 bytes" in outcome.problem


def test_what_a_row_leaves_to_the_model_is_told(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "generate", lambda pipe, request: np.zeros((5, 32, 32, 3), np.float32))
    measured = worker.run(replace(ITEM, request=replace(REQUEST, steps=None))).measured
    assert measured["steps"] == 50  # of Wan's pipeline


def test_pauses_double_up_to_the_longest(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    monkeypatch.setattr(module, "free_memory", lambda: None)
    monkeypatch.setattr(worker, "job", replace(worker.job, pause=20.0, retries=4))
    monkeypatch.setattr(module, "generate", failing(*[RuntimeError("busy")] * 5))
    assert worker.run(ITEM).kind == "failed"
    assert pauses == [20.0, 40.0, 60.0, 60.0]


def test_a_video_has_the_frames_a_second_of_its_job(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "job", replace(worker.job, fps=5))
    with Image.open(io.BytesIO(worker.run(ITEM).video)) as video:
        durations = []
        for frame in range(video.n_frames):
            video.seek(frame)
            video.load()
            durations.append(video.info["duration"])
    assert durations == [200] * 5  # milliseconds


def test_a_failed_row_holds_no_memory(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    class Held(np.ndarray[Any, Any]):
        alive = 0

        def __del__(self) -> None:
            Held.alive -= 1

    def run(*arguments: Any) -> Any:
        large = np.zeros(8).view(Held)
        Held.alive += 1
        large.sum()
        raise MemoryError

    monkeypatch.setattr(module, "generate", run)
    outcome = worker.run(ITEM)
    assert (outcome.kind, outcome.problem) == ("memory", "MemoryError")
    assert Held.alive <= 0


def torn() -> OSError:
    """What ffmpeg leaves on a full disk, without an error of its own."""
    with pytest.raises(OSError, match=r"is .* full") as caught:
        check_whole(bytes(24), ".mp4")
    return caught.value


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("height"), "refused"),
        (TypeError("takes no"), "refused"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "memory"),
        (RuntimeError("CUDA error: out of memory"), "memory"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "device"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk"),
        (OSError(errno.EROFS, "Read-only file system"), "disk"),
        (torn(), "disk"),
        (OSError(errno.ECONNRESET, "Connection reset"), "failed"),
        (RuntimeError("something else"), "failed"),
    ],
)
def test_errors_tell_what_to_do(error: Exception, kind: str) -> None:
    assert kind_of(error) == kind


@pytest.mark.parametrize("suffix", [".mp4", ".webp"])
def test_every_torn_video_is_found(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"video{suffix}"
    write_video(np.random.default_rng(0).random((3, 32, 32, 3), dtype=np.float32), file)
    video = file.read_bytes()
    check_whole(video, suffix)
    for length in range(len(video)):
        with pytest.raises(OSError, match="torn"):
            check_whole(video[:length], suffix)
    with pytest.raises(OSError, match="torn"):
        check_whole(bytes(len(video)), suffix)


def test_an_mp4_may_have_boxes_with_lengths_of_64_bits() -> None:
    large = struct.pack(">I4sQ", 1, b"mdat", 20) + bytes(4)
    index = struct.pack(">I4s", 8, b"moov")
    check_whole(index + large, ".mp4")
    for torn in (index + large[:-1], large, index):
        with pytest.raises(OSError, match="torn"):
            check_whole(torn, ".mp4")


def test_jobs_are_checked() -> None:
    for wrong in ({"fps": 0}, {"retries": -1}, {"threads": 0}):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: "):
            Job("tiny-wan", "", **wrong)  # type: ignore[arg-type]


def call(actor: Actor, *items: Item) -> list[Outcome]:
    pickled = np.array([pickle.dumps(item) for item in items], dtype=object)
    return [pickle.loads(outcome) for outcome in actor({"item": pickled})["outcome"]]


def test_an_actor_makes_what_a_worker_makes(worker: Worker, job: Job) -> None:
    [outcome] = call(Actor(job, "cpu", Tries().begin), ITEM)
    assert outcome.video == worker.run(ITEM).video
    assert outcome.item == ITEM


def test_an_actor_runs_no_other_model(job: Job) -> None:
    [other] = call(Actor(replace(job, identity="sha256:0"), "cpu", Tries().begin), ITEM)
    assert other.kind == "model"
    assert "valid: the same on every node" in other.problem
    [missing] = call(Actor(replace(job, model="/no/such/model"), "cpu", Tries().begin), ITEM)
    assert missing.kind == "model"


def test_a_row_whose_actors_died_is_given_up(worker: Worker, job: Job) -> None:
    tries = Tries()
    actor = Actor(job, "cpu", tries.begin)
    actor.worker = worker
    for _ in range(2):
        tries.begin(ITEM.id)  # by actors that did not live to tell
    [third], [fourth] = call(actor, ITEM), call(actor, ITEM)
    assert (third.kind, third.attempts) == ("done", 3)
    assert (fourth.kind, fourth.attempts) == ("failed", 3)
    assert "died each time" in fourth.problem


def test_without_ray_it_is_told_how_to_get_it(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"valid: pip install 'sparse-dit\[ray\]'"):
        next(run_ray([ITEM], job, "cpu", 1))
