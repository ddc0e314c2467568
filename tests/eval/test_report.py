"""Tables from rows; the README's own table is up to date."""

import math
from pathlib import Path

import pytest

from sparse_dit.eval.report import marked, put, table, update
from sparse_dit.eval.results import append_row, load_rows

ROOT = Path(__file__).parents[2]


def row(density: float = 0.3, dense_steps: int = 0, psnr: float = 30.0, name: str = "radial") -> dict:
    return {
        "recipe": {"name": name, "selection": {"density": density}, "schedule": {"dense_steps": dense_steps}},
        "model": "tiny-wan",
        "prompt": "a red circle",
        "grid": [9, 16, 16],
        "device": {"type": "cpu", "name": "x86_64", "dtype": "float32"},
        "steps": 20,
        "density": density,
        "run_density": density,
        "psnr": psnr,
        "ssim": 0.9,
        "attention_seconds_sparse": 1.0,
        "attention_seconds_dense": 4.0,
    }


def test_one_line_a_setting_in_order() -> None:
    lines = table([row(0.2), row(0.5), row(0.5, dense_steps=5), row(0.5, psnr=34.0)]).splitlines()[4:]
    assert [line.split(" | ")[1:3] for line in lines] == [["0.50", "0 of 20"], ["0.50", "5 of 20"], ["0.20", "0 of 20"]]
    assert "32.0 ± 2.8 dB | 30.0 dB | 0.900 | 0.25 of dense | 2 |" in lines[0]


def test_the_caption_names_model_size_and_device() -> None:
    assert table([row()]).splitlines()[0] == "tiny-wan, 9 x 16 x 16 tokens, 1 prompts, on x86_64 in float32."


def test_equal_clips_and_dense_runs_have_a_line_too() -> None:
    same = {**row(psnr=math.inf), "density": None}
    assert "| none |" in table([same, same])
    assert "inf dB" in table([same, same])


def test_refuses_no_rows_and_pages_without_markers() -> None:
    with pytest.raises(ValueError, match="at least one"):
        table([])
    with pytest.raises(ValueError, match="markers"):
        put("a page", "rows", "content")


def test_update_changes_nothing_but_the_table(tmp_path: Path) -> None:
    rows_file, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    append_row(rows_file, row())
    page.write_text("before\n<!-- rows:begin -->\nold\n<!-- rows:end -->\nafter\n")
    update(page, rows_file)
    assert page.read_text() == f"before\n<!-- rows:begin -->\n{table(load_rows(rows_file))}\n<!-- rows:end -->\nafter\n"


def test_the_readme_shows_the_rows() -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    files = marked(page, ROOT / "eval" / "results")
    assert ROOT / "eval" / "results" / "radial-tiny-wan.jsonl" in files
    for rows_file in files:
        assert put(page, rows_file.stem, table(load_rows(rows_file))) == page, "run: make table"
