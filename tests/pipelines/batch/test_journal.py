"""Whatever interrupts a run: a row on record has its whole video, none is there twice, none is torn."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from sparse_dit.pipelines.batch.journal import FAILURES, RESULTS, open_journal, read_done
from sparse_dit.pipelines.disk import write_stream

IDS = {"a", "b", "c"}


def video(name: str) -> bytes:
    return f"video of {name}".encode() * 100


def row(name: str) -> dict[str, Any]:
    return {"id": name, "file": f"{name}.webp", "bytes": len(video(name)), "prompt": "x" * 50}


def fill(out: Path) -> None:
    """What a run does: add what is not done yet."""
    done = read_done(out)
    with open_journal(out, IDS) as journal:
        for name in sorted(IDS - done.keys()):
            journal.add(f"{name}.webp", video(name), row(name))


def check(out: Path) -> list[str]:
    """The ids on record in whole lines; each has its whole video."""
    content = (out / RESULTS).read_bytes() if (out / RESULTS).exists() else b""
    ids = [json.loads(line)["id"] for line in content.split(b"\n")[:-1]]
    assert len(ids) == len(set(ids))
    for name in ids:
        assert (out / f"{name}.webp").read_bytes() == video(name)
    return ids


def test_rows_are_there_once(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    fill(out)
    fill(out)
    assert check(out) == ["a", "b", "c"]
    assert read_done(out).keys() == IDS
    assert sorted(path.name for path in out.iterdir()) == [".lock", "a.webp", "b.webp", "c.webp", RESULTS]


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the code under test catches it."""


def stopping_at(moment: int, monkeypatch: pytest.MonkeyPatch, stop: Callable[[], BaseException]) -> list[str]:
    """Lets the call of that number to `os.write`, `os.fsync` and `os.replace` fail; a write does half of its work."""
    calls: list[str] = []

    def failing(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*arguments: Any) -> Any:
            calls.append(name)
            if len(calls) != moment:
                return real(*arguments)
            if name == "write":
                real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
            raise stop()

        return call

    for name in ("write", "fsync", "replace"):
        monkeypatch.setattr(os, name, failing(name))
    return calls


def test_killed_at_any_system_call_nothing_is_torn(tmp_path: Path) -> None:
    moment = 0
    while True:
        moment += 1
        out = tmp_path / str(moment)
        with pytest.MonkeyPatch.context() as patch:
            calls = stopping_at(moment, patch, Killed)
            try:
                fill(out)
            except Killed:
                before = check(out)
            else:
                break
        fill(out)
        assert check(out)[: len(before)] == before
        assert sorted(check(out)) == ["a", "b", "c"]
        assert not list(out.glob(".partial-*"))
    assert calls.count("replace") == 3
    assert moment - 1 == len(calls) > 15


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_takes_no_more_leaves_whole_lines(number: int, tmp_path: Path) -> None:
    moment = 0
    while True:
        moment += 1
        out = tmp_path / str(moment)
        with pytest.MonkeyPatch.context() as patch:
            stopping_at(moment, patch, lambda: OSError(number, os.strerror(number)))
            try:
                fill(out)
            except OSError as error:
                told = error.errno
            else:
                break
        assert told == number
        check(out)
        content = (out / RESULTS).read_bytes() if (out / RESULTS).exists() else b""
        assert content.endswith(b"\n") or content == b""
        assert not list(out.glob(".partial-*"))
        fill(out)
        assert sorted(check(out)) == ["a", "b", "c"]
    assert moment > 15


def test_an_interrupted_writer_takes_its_half_with_it(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"before")

    def write(stream: BinaryIO) -> None:
        stream.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_stream(tmp_path / "a", write)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a", b"before")]


def test_a_short_write_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, content: real(file, bytes(content)[:7]))
    fill(tmp_path)
    assert check(tmp_path) == ["a", "b", "c"]


def test_a_row_whose_video_is_gone_comes_again(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "a.webp").unlink()
    (tmp_path / "b.webp").write_bytes(video("b")[:-1])
    assert read_done(tmp_path).keys() == {"c"}
    fill(tmp_path)
    assert check(tmp_path) == ["c", "a", "b"]


def test_rows_of_other_manifests_stay(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "a.webp").unlink()
    lines = (tmp_path / RESULTS).read_bytes()
    with open_journal(tmp_path, {"other"}):
        pass
    assert (tmp_path / RESULTS).read_bytes() == lines


def test_a_torn_line_and_a_repeated_one_are_dropped(tmp_path: Path) -> None:
    fill(tmp_path)
    lines = (tmp_path / RESULTS).read_bytes()
    (tmp_path / RESULTS).write_bytes(lines + lines.splitlines(keepends=True)[0] + b'{"schema": 1, "id"')
    assert read_done(tmp_path).keys() == IDS
    fill(tmp_path)
    assert (tmp_path / RESULTS).read_bytes() == lines


def test_of_rows_of_equal_id_the_first_one_counts(tmp_path: Path) -> None:
    fill(tmp_path)
    repeated = json.dumps({"schema": 1, **row("a"), "prompt": "later"}).encode() + b"\n"
    (tmp_path / RESULTS).write_bytes((tmp_path / RESULTS).read_bytes() + repeated)
    assert read_done(tmp_path)["a"]["prompt"] == row("a")["prompt"]


def test_what_an_interrupted_run_left_half_done_goes(tmp_path: Path) -> None:
    (tmp_path / ".partial-of-a-row-that-does-not-come-again.webp").write_bytes(b"half")
    fill(tmp_path)
    assert not list(tmp_path.glob(".partial-*"))


def test_a_row_that_is_no_json_is_not_written(tmp_path: Path) -> None:
    fill(tmp_path)
    lines = (tmp_path / RESULTS).read_bytes()
    with open_journal(tmp_path, {"d"}) as journal, pytest.raises(ValueError, match="JSON"):
        journal.add("d.webp", video("d"), {**row("d"), "seconds": float("nan")})
    assert (tmp_path / RESULTS).read_bytes() == lines


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with open_journal(tmp_path, IDS), pytest.raises(ValueError, match="another run"), open_journal(tmp_path, IDS):
        pass
    fill(tmp_path)


def test_failures_are_those_of_the_last_run(tmp_path: Path) -> None:
    for problem in ("first", "second"):
        with open_journal(tmp_path, IDS) as journal:
            journal.fail({"line": 1, "problem": problem})
    [line] = (tmp_path / FAILURES).read_text().splitlines()
    assert json.loads(line)["problem"] == "second"


@pytest.mark.parametrize(
    "line", ["prompt: x", "[]", "{}", '{"schema": 2, "id": "a", "file": "a", "bytes": 1}',
             '{"schema": 1, "id": "a", "file": "../a", "bytes": 1}']
)  # fmt: skip
def test_results_of_something_else_are_left_alone(line: str, tmp_path: Path) -> None:
    (tmp_path / RESULTS).write_text(f"{line}\n")
    with pytest.raises(ValueError, match="line 1 is no result row"):
        fill(tmp_path)
    assert (tmp_path / RESULTS).read_text() == f"{line}\n"


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"^out: .*valid: a folder that can be written"):
        fill(tmp_path / "file" / "out")
    real = os.open

    def refusing(path: Any, *arguments: Any) -> int:
        if Path(path).name == ".lock":
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, *arguments)

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(OSError, match=r"^out: .*Permission denied"):
        fill(tmp_path)
