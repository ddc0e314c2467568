"""What the commands print for people holds the figures of their rows, each in its place."""

import json
from pathlib import Path

import pytest

from sparse_dit.app import tables
from sparse_dit.eval.results import load_rows

RESULTS = Path(__file__).parents[2] / "eval" / "results"
ROW = {**load_rows(RESULTS / "radial-tiny-wan.jsonl")[0], "flicker": None, "lpips": None}


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def cells(printed: str, label: str) -> list[str]:
    """The cells of the line with this label."""
    [line] = [line for line in printed.splitlines() if line.replace("│", "").strip().startswith(f"{label} ")]
    return [cell.strip() for cell in line.strip("│ ").split("│")][1:]


def test_a_comparison_divides_sparse_by_dense(capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"seconds_dense": 8.0, "seconds_sparse": 2.0, "attention_seconds_dense": 5.0}
    figures |= {"attention_seconds_sparse": 4.0, "psnr": 31.26, "psnr_min": 12.34}
    tables.print_comparison({**ROW, **figures}, "out", ["result.json"])
    printed = capsys.readouterr().out
    assert cells(printed, "seconds") == ["8.00", "2.00", "0.25"]
    assert cells(printed, "attention seconds") == ["5.00", "4.00", "0.80"]
    assert "31.26 / 12.34" in printed


def test_a_row_in_one_line() -> None:
    row = {**ROW, "batch": 2, "steps": 20, "psnr": 31.26, "density": 0.25}
    line = tables.row_line(row)
    dense = ROW["recipe"]["schedule"]["dense_steps"]
    assert line.startswith(f"{ROW['recipe']['name']} density 0.25, {dense} of 20 steps dense: 31.26 dB")
    assert " s, batch of 2 (" in line
    assert "batch" not in tables.row_line({**row, "batch": 1, "prompt": ""})


def test_a_probe_shows_means_over_heads_and_the_worst_row(capsys: pytest.CaptureFixture[str]) -> None:
    found = {"density": [None, [0.25, 0.75]], "recall": [None, [0.5, 1.0]], "recall_min": [None, [0.125, 0.375]]}
    row = {"model": "m", "recipe": {"name": "r"}, "rows": 4, "by_head": {**found, "error": None}}
    tables.print_probe(json.loads(json.dumps(row)))
    printed = capsys.readouterr().out
    assert cells(printed, "0")[0] == "dense"
    assert cells(printed, "1") == ["0.500", "0.7500", "0.1250", "-"]
