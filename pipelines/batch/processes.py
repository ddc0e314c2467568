"""Rows on the devices of one machine: in this process, or in one process a worker."""

import multiprocessing
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import Any

from sparse_dit.pipelines.batch.manifest import Item
from sparse_dit.pipelines.batch.worker import Job, Outcome, Worker, leave_process

PATIENCE = 10.0
"""Seconds that an idle process has to end by itself."""


def run_here(items: Sequence[Item], job: Job, device: str) -> Iterator[Outcome]:
    """Runs rows in this process.

    Yields:
        The outcome of each row, in their order.

    Raises:
        ValueError: as `load_pipeline`.
    """
    worker = Worker(job, device)
    for item in items:
        yield worker.run(item)


def run_processes(items: Sequence[Item], job: Job, devices: Sequence[str]) -> Iterator[Outcome]:
    """Runs rows in one process a device. Each takes the next row when it is done with one, so none waits for another.

    A process that dies is replaced, and its row is tried again, up to `job.retries` times.

    Args:
        items: the rows.
        job: what they share.
        devices: where the workers run; a device may be named more than once.

    Yields:
        The outcome of each row, as they end.

    Raises:
        ValueError: the model cannot be loaded.
    """
    waiting = deque((item, 1) for item in items)
    members = [_Member(job, device) for device in devices[: len(items)]]
    try:
        while members:
            for member in list(members):
                if member.row is None and waiting:
                    member.give(*waiting.popleft())
                elif member.row is None:
                    member.stop()
                    members.remove(member)
            ready = wait([member.connection for member in members]) if members else []
            for member in [one for one in members if one.connection in ready]:
                outcome, again = _receive(member, job)
                if again is not None:
                    waiting.appendleft(again)
                if member.connection.closed:
                    members.remove(member)
                    if waiting:
                        members.append(_Member(job, member.device))
                if outcome is not None:
                    yield outcome
    finally:
        for member in members:
            member.stop()


class _Member:
    """A worker in a process of its own, seen from the parent."""

    def __init__(self, job: Job, device: str) -> None:
        # A forked process cannot use CUDA when its parent has touched it.
        context = multiprocessing.get_context("spawn")
        self.device = device
        self.row: tuple[Item, int] | None = None
        self.connection, theirs = context.Pipe()
        self.process: Any = context.Process(target=_serve, args=(theirs, job, device), daemon=True)
        self.process.start()
        theirs.close()

    def give(self, item: Item, attempt: int) -> None:
        self.row = (item, attempt)
        # A process that is dead already is found when its answer is read.
        try:
            self.connection.send(item)
        except OSError:
            return

    def stop(self) -> None:
        self.connection.close()
        # Without a row it sees that nobody talks to it any more, and ends in order.
        self.process.join(0.0 if self.row else PATIENCE)
        self.process.terminate()
        self.process.join()


def _receive(member: _Member, job: Job) -> tuple[Outcome | None, tuple[Item, int] | None]:
    """The outcome of a member's row, or the row and the number of its next attempt if the process died over it."""
    assert member.row is not None
    item, attempt = member.row
    member.row = None
    try:
        outcome: Outcome = member.connection.recv()
    except (EOFError, OSError):
        member.stop()
        if attempt <= job.retries:
            return None, (item, attempt + 1)
        code = member.process.exitcode
        return Outcome(item, "failed", attempt, f"its worker died each time, last with exit code {code}"), None
    return replace(outcome, attempts=outcome.attempts + attempt - 1), None


def _serve(connection: Connection, job: Job, device: str) -> None:
    """What runs in the process: rows come, outcomes go, until the parent is gone."""
    worker: Worker | None = None
    try:
        while True:
            item = connection.recv()
            try:
                worker = worker or Worker(job, device)
            except ValueError as error:
                connection.send(Outcome(item, "model", 1, str(error)))
                return
            outcome = worker.run(item)
            leave_process(outcome)
            connection.send(outcome)
    except (EOFError, OSError, KeyboardInterrupt):
        return
