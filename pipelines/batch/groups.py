"""One video over several devices: a worker in a group of processes, one a device, that make every row together.

The processes share the transformers' tokens through diffusers' context parallelism (docs/parallel.md). Each gets every
row from the parent and runs the whole pipeline, so that nothing but the transformers knows of the others; the first one
encodes. What a process cannot know, the parent sees: that another one failed or died while it waits for its tokens.
"""

import atexit
import multiprocessing
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from multiprocessing.connection import wait
from statistics import fmean
from typing import Any

from sparse_dit.pipelines.batch.manifest import Item
from sparse_dit.pipelines.batch.processes import Member, Row, hand_out
from sparse_dit.pipelines.batch.worker import Job, Outcome, Worker, first_line
from sparse_dit.pipelines.generate import Frames

TIMEOUT = timedelta(minutes=10)
"""How long a process waits for the others, which may still load the model; a process that hangs is found after it."""

MOMENT = 5.0
"""Seconds that the others have to refuse a row, too, or to be seen dying, when one has told that it failed."""


@dataclass(frozen=True)
class Seat:
    """A process's place in its group.

    Attributes:
        rank: its number, from 0.
        ranks: processes of the group.
        port: where they meet, on this machine.
    """

    rank: int
    ranks: int
    port: int


def run_groups(
    items: Sequence[Item],
    job: Job,
    groups: Sequence[Sequence[str]],
    worker: "Callable[[Job, str, Seat], Worker] | None" = None,
) -> Iterator[Outcome]:
    """Runs rows in groups of processes, one a device, each group a row at a time.

    A group is started anew when one of its processes dies, or when they do not all say the same of a row; the row is
    tried again, up to `job.retries` times, where a single worker would try it again.

    Args:
        items: the rows.
        job: what they share.
        groups: the devices of each group.
        worker: makes the worker of a process from job, device and seat; None is `Rank`.

    Yields:
        The outcome of each row, as they end.

    Raises:
        ValueError: the model cannot be loaded, or not be shared.
    """
    yield from hand_out(items, job.retries, [partial(Group, job, devices, worker or Rank) for devices in groups])


class Rank(Worker):
    """A worker that makes every row together with the others of its group.

    Args:
        job, device: as `Worker`.
        seat: its place.

    Raises:
        ValueError: as `load_pipeline`, or the model cannot be shared.
    """

    def __init__(self, job: Job, device: str, seat: Seat) -> None:
        end_with_parent()
        super().__init__(job, device)
        self.seat = seat
        join(seat, device)
        share(self.pipe, seat.ranks)

    def _make(self, item: Item, attempt: int) -> Outcome:
        try:
            return super()._make(item, attempt)
        except AssertionError as error:  # of diffusers, before anything is exchanged
            raise ValueError(
                f"gpus_per_video: {self.seat.ranks} ({first_line(error)}); valid: 1, or a height, width and num_frames "
                "that make a number of tokens which it divides"
            ) from error

    def encode(self, frames: Frames) -> bytes:
        """As `Worker.encode` on the first process, nothing on the others, whose frames are the same."""
        return super().encode(frames) if self.seat.rank == 0 else b""


def end_with_parent() -> None:
    """Lets this process end at once when its parent is gone, whatever it is at."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def join(seat: Seat, device: str) -> None:
    """Builds the process group, NCCL on CUDA and Gloo elsewhere, when all of its processes have come."""
    import torch
    import torch.distributed as dist
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    cuda = device.startswith("cuda")
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=TCPStore("127.0.0.1", seat.port, is_master=False, timeout=TIMEOUT),
        rank=seat.rank,
        world_size=seat.ranks,
        timeout=TIMEOUT,
        device_id=torch.device(device) if cuda else None,
    )
    atexit.register(dist.destroy_process_group)


def share(pipe: Any, ranks: int) -> None:
    """Lets the processes of the group share the tokens of every transformer of a pipeline.

    Raises:
        ValueError: the heads do not go evenly into them, or diffusers has no plan for the model.
    """
    from diffusers import ContextParallelConfig

    from sparse_dit.pipelines.transformers import transformers_of

    for transformer in transformers_of(pipe).values():
        model: Any = transformer
        name, heads = type(model).__name__, getattr(model.config, "num_attention_heads", ranks)
        if heads % ranks:
            raise ValueError(f"gpus_per_video: {ranks}; {name} has {heads} heads; valid: a number that divides them")
        try:
            model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=ranks))
        except ValueError as error:
            raise ValueError(f"gpus_per_video: {ranks}; {name} ({first_line(error)}); valid: 1") from error


class Group(Member):
    """The processes of a group, seen from the parent.

    Args:
        job: as the rows are run; what is tried again is tried by a new group.
        devices: one a process.
        worker: as `run_groups`.
    """

    def __init__(self, job: Job, devices: Sequence[str], worker: Callable[[Job, str, Seat], Worker]) -> None:
        self.meeting, port = _meeting()
        self.answers: dict[int, Outcome] = {}
        seats = [Seat(rank, len(devices), port) for rank in range(len(devices))]
        once = replace(job, retries=0)
        super().__init__([partial(worker, once, device, seat) for device, seat in zip(devices, seats, strict=True)])

    def receive(self, retries: int) -> tuple[Outcome | None, Row | None]:
        """As `Member.receive`; neither while processes are at the row that have not told of it."""
        assert self.row is not None
        item, attempt = self.row
        wrong = self._listen(item)
        if wrong is None and len(self.answers) < len(self.processes):
            return None, None
        outcome, problem = wrong or self._whole(), ""
        if wrong is not None and wrong.kind == "failed":
            problem = self._died() or wrong.problem
        # All have refused, or are done; after anything else one may still wait for another.
        kinds = {answer.kind for answer in self.answers.values()}
        agreed = len(self.answers) == len(self.processes) and (kinds == {"done"} or kinds == {"refused"})
        if not agreed:
            self.stop()
        self.row, self.answers = None, {}
        if problem and attempt <= retries:
            return None, (item, attempt + 1)
        return replace(outcome, attempts=attempt, problem=problem or outcome.problem), None

    def _listen(self, item: Item) -> Outcome | None:
        """Takes the answers that are there; the first one of a process that did not make the row, or died over it."""
        wrong: Outcome | None = None
        for patience in (0.0, MOMENT):
            for rank, connection in enumerate(self.connections):
                # One that has answered has nothing more to say: if there is something, it is the end.
                try:
                    if connection.poll(0.0 if rank in self.answers else patience):
                        self.answers[rank] = connection.recv()
                except (EOFError, OSError):
                    return wrong or Outcome(item, "failed", 1, "a process of its group died")
                if rank in self.answers and self.answers[rank].kind != "done":
                    wrong = wrong or self.answers[rank]
            # A row that is not valid is refused by all of them at once.
            if wrong is None or wrong.kind != "refused":
                break
        return wrong

    def _whole(self) -> Outcome:
        """The first process's outcome; the densities are those of all heads, of which each has as many."""
        measured = [self.answers[rank].measured for rank in range(len(self.processes))]
        densities = {
            name: fmean(one[name] for one in measured)
            for name in ("density", "run_density")
            if measured[0].get(name) is not None
        }
        together = {**measured[0], **densities, "gpus_per_video": len(self.processes)}
        return replace(self.answers[0], measured=together)

    def _died(self) -> str:
        """Which process died by itself; empty if none did in the next moment."""
        ended = wait([process.sentinel for process in self.processes], MOMENT)
        for rank, process in enumerate(self.processes):
            if process.sentinel in ended:
                process.join()
                return f"its group died each time, last process {rank} with exit code {process.exitcode}"
        return ""


def _meeting() -> tuple[Any, int]:
    """Where the processes of a group meet, and its port; nobody beyond this machine can connect."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    store = TCPStore(
        "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach(), timeout=TIMEOUT
    )
    return store, port
