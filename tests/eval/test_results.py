"""Rows: valid JSON, whole or not there."""

import errno
import json
import math
import multiprocessing
import os
from pathlib import Path

import pytest

from sparse_dit.eval.results import (
    SCHEMA,
    append_row,
    command_line,
    identity,
    load_rows,
    provenance,
    read_rows,
    to_json,
)


def test_rows_come_back(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "rows.jsonl"
    rows = [{"psnr": 31.5, "recipe": {"name": "radial", "selection": None}}, {"psnr": math.inf, "prompt": "Äö\nü"}]
    assert load_rows(file) == []
    for row in rows:
        append_row(file, row)
    assert load_rows(file) == [{"schema": SCHEMA, **row} for row in rows]
    assert len(file.read_text().splitlines()) == 2


def test_infinity_is_valid_json_and_nan_is_refused(tmp_path: Path) -> None:
    assert json.loads(to_json({"psnr": math.inf, "more": [math.inf]}))["psnr"] == "inf"
    assert float(json.loads(to_json({"psnr": math.inf}))["psnr"]) == math.inf
    file = tmp_path / "rows.jsonl"
    with pytest.raises(ValueError, match="JSON"):
        append_row(file, {"psnr": math.nan})
    assert not file.exists()


@pytest.mark.parametrize("torn", [1, 5, 30])
def test_a_torn_row_is_no_row_and_does_not_hurt_the_next(tmp_path: Path, torn: int) -> None:
    file = tmp_path / "rows.jsonl"
    append_row(file, {"number": 1})
    append_row(file, {"number": 2, "text": "x" * 40})
    file.write_bytes(file.read_bytes()[:-torn])
    assert [row["number"] for row in load_rows(file)] == [1]
    append_row(file, {"number": 3})
    assert [row["number"] for row in load_rows(file)] == [1, 3]


def test_a_torn_row_of_any_length_leaves_the_rows_before_it(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    append_row(file, {"number": 1})
    with file.open("ab") as stream:
        stream.write(b"x" * 3 * 2**16)
    append_row(file, {"number": 2})
    assert [row["number"] for row in load_rows(file)] == [1, 2]


def test_a_short_write_is_gone_on_with_and_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch) -> None:
    file, real = tmp_path / "rows.jsonl", os.write
    monkeypatch.setattr(os, "write", lambda handle, content: real(handle, bytes(content)[:7]))
    append_row(file, {"text": "x" * 50})
    append_row(file, {"number": 2})
    assert [len(row) for row in load_rows(file)] == [2, 2]
    before = file.read_bytes()

    def full(handle: int, content: bytes) -> int:
        if len(content) < 40:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle, bytes(content)[:7])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        append_row(file, {"text": "y" * 50})
    assert file.read_bytes() == before


def test_several_processes_append_at_once(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"

    def append(number: int) -> None:
        for count in range(50):
            append_row(file, {"writer": number, "count": count, "text": "x" * (997 * count % 5000)})

    writers = [multiprocessing.get_context("fork").Process(target=append, args=(number,)) for number in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    rows = load_rows(file)
    for number in range(3):
        assert [row["count"] for row in rows if row["writer"] == number] == list(range(50))


def test_a_file_that_is_torn_from_the_start(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"schema": 1, "numb')
    append_row(file, {"number": 1})
    assert [row["number"] for row in load_rows(file)] == [1]


def test_damage_and_other_schemas_are_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    append_row(file, {"number": 1})
    with file.open("a") as stream:
        stream.write("{broken}\n")
    with pytest.raises(ValueError, match="line 2"):
        load_rows(file)
    append_row(file, {"number": 3})
    rows, complaints = read_rows(file)
    assert [row["number"] for row in rows] == [1, 3], "the rest goes on"
    assert len(complaints) == 1
    assert complaints[0].startswith(f"{file} line 2 is no JSON")
    file.write_text(json.dumps({"schema": SCHEMA + 1}) + "\n")
    with pytest.raises(ValueError, match=f"schema {SCHEMA}"):
        load_rows(file)


def test_identity_depends_on_every_value_and_not_on_order() -> None:
    base = identity(seed=1, recipe={"a": 1, "b": 2})
    assert identity(recipe={"b": 2, "a": 1}, seed=1) == base
    assert identity(seed=2, recipe={"a": 1, "b": 2}) != base
    assert identity(seed=1, recipe={"a": 1, "b": 3}) != base


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--out", "/home/me/a b/rows.jsonl", "--seconds", "3"], "--out rows.jsonl --seconds 3"),
        (["--out=/home/me/rows.jsonl", "--recipe.skipped=drop"], "--out=rows.jsonl --recipe.skipped=drop"),
        (["runs/mine.jsonl", "--prompt", "a red = circle", "-1"], "runs/mine.jsonl --prompt 'a red = circle' -1"),
    ],
)
def test_commands_tell_no_folder_of_the_machine(arguments: list[str], told: str) -> None:
    assert command_line("python -m rows", arguments) == f"python -m rows {told}"


def test_provenance_names_versions() -> None:
    where = provenance()
    assert where["versions"]["torch"]
    assert where["versions"]["sparse-dit"]
    assert where["created"].endswith("+00:00")
