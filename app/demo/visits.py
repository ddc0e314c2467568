"""What visitors leave behind: a folder each, under a name nobody can guess, removed when they go and at exit."""

from __future__ import annotations

import secrets
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparse_dit.app.demo.actions import Asked, Finished

MAX_RUNS = 20  # a visit keeps; older ones go
MAX_VISITS = 100  # open at once; browsers say when they leave, scripts need not


class Stopped(Exception):
    """The visitor asked to stop, or left."""


@dataclass
class Visit:
    """One open page.

    Args:
        folder: where its files lie; nothing of another visit does.

    Attributes:
        asked: the run that waits for its turn or is under way; None where there is none.
        admitted: whether what is asked still waits for its start, which it has once.
        turn: of what is asked, counted over all visits.
        runs: what was made, the oldest first, by number.
        stop: set when the run under way shall end.
        closed: whether the visitor has left.
    """

    folder: Path
    asked: Asked | None = None
    admitted: bool = False
    turn: int = 0
    runs: dict[int, Finished] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)
    closed: bool = False
    _made: int = 0

    @contextmanager
    def new_run(self) -> Iterator[tuple[int, Path]]:
        """Number and empty folder for the files of a run; the folder goes again if the block raises.

        Raises:
            Stopped: the visitor has left.
        """
        if self.closed:
            raise Stopped
        self._made += 1
        folder = self.folder / f"run-{self._made}"
        folder.mkdir(parents=True)
        try:
            yield self._made, folder
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        if self.closed:  # between the check above and now
            shutil.rmtree(self.folder, ignore_errors=True)
            raise Stopped

    def keep(self, run: Finished) -> None:
        """Adds a run; the oldest goes when there are more than `MAX_RUNS`."""
        self.runs[run.number] = run
        while len(self.runs) > MAX_RUNS:
            oldest = self.runs.pop(next(iter(self.runs)))
            shutil.rmtree(oldest.folder, ignore_errors=True)

    def close(self) -> None:
        """Ends the run under way and removes all files."""
        self.closed = True
        self.asked = None
        self.stop.set()
        self.runs.clear()
        shutil.rmtree(self.folder, ignore_errors=True)


class Visits:
    """All open visits, by the session that the browser was given.

    Args:
        root: the folder that holds their folders.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._open: dict[str, Visit] = {}
        self._lock = threading.Lock()
        self._turns = 0

    def open(self, session: str) -> Visit:
        """The visit of a session, new if there is none; beyond `MAX_VISITS` the one idle for longest is closed."""
        with self._lock:
            if session not in self._open:
                folder = self.root / secrets.token_hex(16)
                folder.mkdir(parents=True)
                self._open[session] = Visit(folder)
            visit = self._open[session]
            idle = [name for name, other in self._open.items() if other.asked is None and other is not visit]
            forgotten = idle[: max(0, len(self._open) - MAX_VISITS)]
        for name in forgotten:
            self.close(name)
        return visit

    def close(self, session: str | None) -> None:
        """Closes the visit of a session, if there is one."""
        with self._lock:
            visit = self._open.pop(session or "", None)
        if visit is not None:
            visit.close()

    def close_all(self) -> None:
        """Closes every visit and removes the root."""
        for session in list(self._open):
            self.close(session)
        shutil.rmtree(self.root, ignore_errors=True)

    def enter(self, visit: Visit, asked: Asked, places: int) -> int:
        """Puts a run in line.

        Args:
            visit: whose run it is.
            asked: what it is.
            places: runs that may be in line at once, the one under way included.

        Returns:
            How many runs are ahead.

        Raises:
            ValueError: the visit has a run in line already, or the line is full.
        """
        with self._lock:
            ahead = sum(other.asked is not None for other in self._open.values())
            if visit.asked is not None:
                raise ValueError("your last run is still under way; stop it or wait for it")
            if ahead >= places:
                raise ValueError(
                    f"the server is busy: {ahead} runs are in line, and it takes {places}; "
                    "please try again in a few minutes"
                )
            self._turns += 1
            visit.asked, visit.admitted, visit.turn, visit.stop = asked, True, self._turns, threading.Event()
            for session in [name for name, other in self._open.items() if other is visit]:
                self._open[session] = self._open.pop(session)  # the last that would be closed for being idle
            return ahead

    def ahead(self, visit: Visit) -> int:
        """How many runs have their turn before that of a visit now."""
        with self._lock:
            return sum(other.asked is not None and other.turn < visit.turn for other in self._open.values())

    def __len__(self) -> int:
        return len(self._open)
