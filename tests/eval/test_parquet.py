"""Rows as Parquet: every value comes back, whatever its column is mixed with."""

import math
import sys
from pathlib import Path

import pytest
from pyarrow import parquet

from sparse_dit.eval.parquet import write_parquet
from sparse_dit.eval.results import SCHEMA, load_rows

ROOT = Path(__file__).parents[2]


def test_values_come_back_under_dotted_names(tmp_path: Path) -> None:
    rows = [
        {
            "schema": 1,
            "psnr": math.inf,
            "recipe": {"order": "rows", "selection": {"density": 0.5}},
            "grid": [9, 16, 16],
        },
        {"schema": 1, "psnr": "inf", "recipe": {"order": {"name": "tiles"}, "selection": "all"}, "grid": [9, 8, 8]},
        {"schema": 1, "psnr": 30, "lpips": None, "fine": True},
    ]
    write_parquet(rows, tmp_path / "rows.parquet")
    assert [file.name for file in tmp_path.iterdir()] == ["rows.parquet"]
    table = parquet.read_table(tmp_path / "rows.parquet")
    assert table.schema.metadata[b"sparse_dit.schema"] == str(SCHEMA).encode()
    assert table["psnr"].to_pylist() == [math.inf, math.inf, 30.0]
    assert table["recipe.order"].to_pylist() == ["rows", None, None]
    assert table["recipe.order.name"].to_pylist() == [None, "tiles", None]
    assert table["recipe.selection.density"].to_pylist() == [0.5, None, None]
    assert table["grid"].to_pylist() == ["[9, 16, 16]", "[9, 8, 8]", None]
    assert table["fine"].to_pylist() == [None, None, True]
    assert table["lpips"].to_pylist() == [None] * 3


@pytest.mark.parametrize("name", ["systems-tiny-wan", "bench-kernels", "tiny-wan-training"])
def test_our_own_rows_can_be_written(name: str, tmp_path: Path) -> None:
    rows = load_rows(ROOT / "eval" / "results" / f"{name}.jsonl")
    write_parquet(rows, tmp_path / "rows.parquet")
    table = parquet.read_table(tmp_path / "rows.parquet")
    assert table.num_rows == len(rows)
    assert set(table["schema"].to_pylist()) == {SCHEMA}
    assert {"revision", "created", "versions.torch", "device.name"} <= set(table.column_names)


def test_refuses_nothing_and_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="at least one"):
        write_parquet([], tmp_path / "rows.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="needs pyarrow, which is not installed; valid: pip install pyarrow"):
        write_parquet([{"schema": 1}], tmp_path / "rows.parquet")
    assert not list(tmp_path.iterdir())
