"""Rows of tiny-wan's trainings."""

from pathlib import Path

import pytest

from sparse_dit.eval import training
from sparse_dit.eval.results import append_row, load_rows
from sparse_dit.pipelines.tiny_wan import DEFAULTS


def test_a_part_leaves_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def script(arguments: list[str]) -> dict:
        assert arguments == ["--out", "a folder"]
        return {"psnr_mean": 32.5, "steps": 7}

    monkeypatch.setitem(training.PARTS, "vae", script)
    rows = tmp_path / "rows.jsonl"
    training.run_part("vae", ["--out", "a folder"], rows)
    [row] = load_rows(rows)
    assert (row["part"], row["psnr_mean"], row["steps"]) == ("vae", 32.5, 7)
    assert row["command"].endswith("--out 'a folder'")
    assert row["versions"]["torch"]
    assert row["device"]["type"] in ("cpu", "cuda")
    assert "revision" in row


def test_a_part_that_fails_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(training.PARTS, "vae", lambda arguments: pytest.fail("it ran"))
    rows = tmp_path / "rows.jsonl"
    with pytest.raises(ValueError, match="valid: vae, transformer, judge"):
        training.run_part("vea", [], rows)
    append_row(rows, {"part": "judge"})
    rows.write_text("{broken}\n" + rows.read_text())
    with pytest.raises(ValueError, match="line 1"):
        training.run_part("vae", [], rows)


def test_the_judge_runs_on_rendered_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DEFAULTS, "num_frames", 5)
    rows = tmp_path / "rows.jsonl"
    row = training.run_part("judge", ["--truth", "--captions", "2", "--out", str(tmp_path / "truth.json")], rows)
    assert row["captions"] == row["decoded_captions"] == 2
    assert row["color_right"] == row["decoded_color_right"] == 1
    assert load_rows(rows)[0]["command"].startswith("python -m sparse_dit.pipelines.tiny_wan.evaluate --truth")
