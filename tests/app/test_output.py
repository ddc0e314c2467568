"""Output folders appear whole or not at all, and nothing that nobody asked for is said."""

import subprocess
import sys
from pathlib import Path

import pytest

from sparse_dit.app.output import output_folder


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_files_appear_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    with output_folder(out) as folder:
        (folder / "one.txt").write_text("1")
        assert not out.exists()
    assert everything(tmp_path) == ["a", "a/b", "a/b/one.txt"]


def fail_halfway(out: Path, error: type[BaseException]) -> None:
    with output_folder(out) as folder:
        (folder / "one.txt").write_text("half")
        raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        fail_halfway(tmp_path / "a" / "b", error)
    assert everything(tmp_path) == []


def test_an_existing_folder_keeps_its_other_files(tmp_path: Path) -> None:
    (tmp_path / "old.txt").write_text("old")
    (tmp_path / "one.txt").write_text("old")
    with output_folder(tmp_path) as folder:
        (folder / "one.txt").write_text("new")
    with pytest.raises(RuntimeError):
        fail_halfway(tmp_path, RuntimeError)
    assert everything(tmp_path) == ["old.txt", "one.txt"]
    assert (tmp_path / "one.txt").read_text() == "new"


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="valid: a folder that can be written"), output_folder(out):
            pass
    assert everything(tmp_path) == ["file"]


def test_a_folder_that_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="valid: a folder that can be written"), output_folder("/proc/sparse-dit"):
        pass


def test_libraries_that_nobody_asked_for_are_silent() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "sparse_dit.app", "explain"], capture_output=True, text=True, check=True
    )
    assert ran.stdout.startswith("WanTransformer3DModel, recipe tiny-radial")
    assert ran.stderr == ""
