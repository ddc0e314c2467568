"""Rows on the devices of one machine: in this process, or in one process a worker."""

import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any

from sparse_dit.pipelines.batch.manifest import Item
from sparse_dit.pipelines.batch.worker import Job, Outcome, Worker, leave_process

PATIENCE = 10.0
"""Seconds that idle processes have to end by themselves."""

Row = tuple[Item, int]
"""A row, and the number of its next attempt."""


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
    starts = [partial(Member, [partial(Worker, job, device)]) for device in devices]
    yield from hand_out(items, job.retries, starts)


def hand_out(items: Sequence[Item], retries: int, starts: Sequence[Callable[[], "Member"]]) -> Iterator[Outcome]:
    """Gives rows to members, the next one to whoever is done with one, and replaces members that end.

    Args:
        items: the rows.
        retries: how often a row is given out again.
        starts: each starts a member.

    Yields:
        The outcome of each row, as they end.
    """
    waiting = deque((item, 1) for item in items)
    members = {start(): start for start in starts[: len(items)]}
    try:
        while members:
            for member in list(members):
                if member.row is None and waiting:
                    member.give(*waiting.popleft())
                elif member.row is None:
                    member.stop()
                    del members[member]
            ready = wait([connection for member in members for connection in member.connections]) if members else []
            for member in [one for one in members if not set(ready).isdisjoint(one.connections)]:
                outcome, again = member.receive(retries)
                if again is not None:
                    waiting.appendleft(again)
                if not member.alive:
                    start = members.pop(member)
                    if waiting:
                        members[start()] = start
                if outcome is not None:
                    yield outcome
    finally:
        for member in members:
            member.stop()


class Member:
    """A worker in a process of its own, seen from the parent; `groups` has one in several processes.

    Args:
        makers: makes the worker, once in each process.

    Attributes:
        row: what it is at.
    """

    def __init__(self, makers: Sequence[Callable[[], Worker]]) -> None:
        # A forked process cannot use CUDA when its parent has touched it.
        context = multiprocessing.get_context("spawn")
        self.row: Row | None = None
        self.connections: list[Connection] = []
        self.processes: list[Any] = []
        for make in makers:
            connection, theirs = context.Pipe()
            process: Any = context.Process(target=_serve, args=(theirs, make), daemon=True)
            process.start()
            theirs.close()
            self.connections.append(connection)
            self.processes.append(process)

    @property
    def alive(self) -> bool:
        """Whether it takes further rows."""
        return not self.connections[0].closed

    def give(self, item: Item, attempt: int) -> None:
        """Starts a row."""
        self.row = (item, attempt)
        for connection in self.connections:
            # A process that is dead already is found when its answer is read.
            with suppress(OSError):
                connection.send(item)

    def receive(self, retries: int) -> tuple[Outcome | None, Row | None]:
        """The outcome of the row that it is at, or the row, to be given out again, if it died over it.

        Called when one of its connections is ready.
        """
        assert self.row is not None
        item, attempt = self.row
        self.row = None
        try:
            outcome: Outcome = self.connections[0].recv()
        except (EOFError, OSError):
            self.stop()
            if attempt <= retries:
                return None, (item, attempt + 1)
            code = self.processes[0].exitcode
            return Outcome(item, "failed", attempt, f"its worker died each time, last with exit code {code}"), None
        return replace(outcome, attempts=outcome.attempts + attempt - 1), None

    def stop(self) -> None:
        """Ends its processes: those that are at a row at once."""
        for connection in self.connections:
            connection.close()
        # Without a row they see that nobody talks to them any more, and end in order.
        end = time.monotonic() + (0.0 if self.row else PATIENCE)
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        for process in self.processes:
            process.kill()  # a stopped process would not hear a milder signal
            process.join()


def _serve(connection: Connection, make: Callable[[], Worker]) -> None:
    """What runs in a process: rows come, outcomes go, until the parent is gone."""
    worker: Worker | None = None
    try:
        while True:
            item = connection.recv()
            try:
                worker = worker or make()
            except ValueError as error:
                connection.send(Outcome(item, "model", 1, str(error)))
                return
            outcome = worker.run(item)
            leave_process(outcome)
            connection.send(outcome)
    except (EOFError, OSError, KeyboardInterrupt):
        return
