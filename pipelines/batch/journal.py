"""What is done: videos and their result rows on disk, each whole or not there, whenever the process is killed."""

import fcntl
import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparse_dit.pipelines.disk import PARTIAL, append_line, write_file

SCHEMA = 1
"""Of result rows, as `sparse_dit.eval.results` reads them; raised whenever a field changes its name or meaning."""

RESULTS = "results.jsonl"
FAILURES = "failures.jsonl"
_LOCK = ".lock"

Row = dict[str, Any]


def read_done(out: Path) -> dict[str, Row]:
    """The result rows of a folder by id, of which the video is there in its full length.

    A torn last line, and a row whose video is gone, are not done. Of rows of equal id the first one counts.

    Raises:
        ValueError: a whole line is no result row; names the line.
    """
    done: dict[str, Row] = {}
    for _, row in _rows(out / RESULTS):
        if row["id"] not in done and _is_there(out, row):
            done[row["id"]] = row
    return done


class Journal:
    """The one writer of a folder, as `open_journal` makes it.

    Args:
        out: the folder.
        ids: rows of this run. Of those, result rows without video are dropped, as they will come again.

    Attributes:
        there: ids of the result rows that were kept.
    """

    def __init__(self, out: Path, ids: Collection[str]) -> None:
        self.out = out
        for partial in out.glob(f"{PARTIAL}*"):
            partial.unlink()
        kept: dict[str, bytes] = {}
        for line, row in _rows(out / RESULTS):
            if row["id"] not in kept and (row["id"] not in ids or _is_there(out, row)):
                kept[row["id"]] = line
        self.there = set(kept)
        lines = b"".join(line + b"\n" for line in kept.values())
        if (out / RESULTS).exists() and (out / RESULTS).read_bytes() != lines:
            write_file(out / RESULTS, lines)
        (out / FAILURES).unlink(missing_ok=True)

    def add(self, name: str, video: bytes, row: Mapping[str, Any]) -> None:
        """Puts a video under its name, then its row behind the others: a row tells of a file that is there.

        Args:
            name: of the file.
            video: its content.
            row: has `id`, `file` and `bytes`.

        Raises:
            OSError: the disk is full or does not take it; the folder is then as before, but for the file itself.
        """
        write_file(self.out / name, video)
        append_line(self.out / RESULTS, _line(row))

    def fail(self, row: Mapping[str, Any]) -> None:
        """Notes a row that could not be done in this run.

        Raises:
            OSError: as `add`.
        """
        append_line(self.out / FAILURES, _line(row))


@contextmanager
def open_journal(out: Path, ids: Collection[str]) -> Iterator[Journal]:
    """Makes and locks a folder for one run, cuts off what an interrupted one left half done, and forgets its failures.

    Args:
        out: the folder; it and its parents need not exist.
        ids: rows of this run.

    Raises:
        ValueError: another run is writing there, or as `read_done`.
        OSError: the folder cannot be written; the message names it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise OSError(f"out: {str(out)!r} ({error.strerror}); valid: a folder that can be written") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"out: another run is writing to {str(out)!r}; valid: wait for it, or a folder of its own"
            ) from None
        yield Journal(out, ids)
    finally:
        os.close(lock)


def _is_there(out: Path, row: Row) -> bool:
    file = out / row["file"]
    return file.is_file() and bool(file.stat().st_size == row["bytes"])


def _rows(file: Path) -> Iterator[tuple[bytes, Row]]:
    """Each whole line and its row."""
    try:
        lines = file.read_bytes().split(b"\n")[:-1]
    except (FileNotFoundError, NotADirectoryError):
        return
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            known = row["schema"] == SCHEMA and isinstance(row["id"], str) and isinstance(row["bytes"], int)
            if not known or Path(row["file"]).name != row["file"]:
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{file} line {number} is no result row; valid: a folder of its own for this run"
            ) from None
        yield line, row


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps({"schema": SCHEMA, **row}, allow_nan=False).encode()
