"""Files that are whole or not there, whenever the process is killed or the disk is full."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial-"
"""How the name of a file begins while it is written; what an interrupted writer leaves has it."""


def append_line(path: Path, line: bytes) -> None:
    """Adds a line to a file, whole or not at all; several processes may do so at once.

    What an interrupted writer left of a last line is cut off first: a torn line never swallows the next one.

    Args:
        path: the file; it need not exist, its folder must.
        line: without its line break.

    Raises:
        OSError: the disk is full or does not take it; the file is then as before.
    """
    new = not path.exists()
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        # Others wait: cutting back what is not whole must not take a line of theirs.
        fcntl.flock(file, fcntl.LOCK_EX)
        end = _whole(file)
        os.ftruncate(file, end)
        try:
            _write_all(file, line + b"\n")
            os.fsync(file)
        except OSError:
            os.ftruncate(file, end)
            raise
    finally:
        os.close(file)
    if new:
        _sync_folder(path.parent)


def write_file(path: Path, content: bytes) -> None:
    """Writes a file that appears under its name once it is whole and on the disk.

    Raises:
        OSError: the disk is full or does not take it; what was there before stays.
    """
    write_stream(path, lambda stream: _write_all(stream.fileno(), content))


def write_stream(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """`write_file` for what writes itself into a stream.

    Raises:
        OSError: as `write_file`.
    """
    partial = path.with_name(f"{PARTIAL}{path.name}")
    try:
        with open(partial, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _whole(file: int) -> int:
    """The length of a file up to the end of its last whole line."""
    end = os.fstat(file).st_size
    while end:
        start = max(0, end - 2**16)
        found = os.pread(file, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _write_all(file: int, content: bytes) -> None:
    """`os.write` may take a part only, as it does when the disk is almost full."""
    left = memoryview(content)
    while left:
        left = left[os.write(file, left) :]


def _sync_folder(folder: Path) -> None:
    """Names of files are content of their folder, and reach the disk with it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
