"""Output folders that appear whole or not at all."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


def warn(line: str) -> str:
    """Tells on stderr of what went wrong while the rest goes on, and returns it."""
    print(f"sparse-dit: warning: {line}", file=sys.stderr)
    return line


def only_dense(sparse: int, dense: Mapping[str, int]) -> bool:
    """Whether a recipe that is not dense itself made no call sparse; arguments as `warn_if_dense`."""
    return not sparse and bool(dense.keys() - {"recipe"})


def warn_if_dense(sparse: int, dense: Mapping[str, int]) -> None:
    """Warns where a recipe that is not dense itself made no call sparse: then dense was compared with dense.

    Args:
        sparse: calls that ran sparse.
        dense: the other calls by reason, as in a summary.
    """
    if not only_dense(sparse, dense):
        return
    told = ", ".join(f"{count} {reason}" for reason, count in dense.items())
    hint = "; have fewer of --recipe.schedule.dense_steps than steps" if "dense_steps" in dense else ""
    warn(f"every call was dense ({told}){hint}")


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
