"""Output folders that appear whole or not at all."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def warn(line: str) -> str:
    """Tells on stderr of what went wrong while the rest goes on, and returns it."""
    print(f"sparse-dit: warning: {line}", file=sys.stderr)
    return line


@contextmanager
def output_folder(out: str | Path) -> Iterator[Path]:
    """A folder to write into, whose files move to `out` once everything inside the `with` block is done.

    Entering checks that `out` can be written, before anything expensive starts. If the block raises, nothing is left:
    neither files nor folders. Files of the same name in `out` are replaced, others stay.

    Args:
        out: the folder; it and its parents need not exist.

    Raises:
        ValueError: `out` is a file, lies below one, or cannot be written.
    """
    folder = Path(out).expanduser().absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=existing))
    except OSError as error:
        raise ValueError(f"out: {str(out)!r} ({error.strerror}); valid: a folder that can be written") from None
    try:
        yield partial
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(partial.iterdir()):
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(partial)
