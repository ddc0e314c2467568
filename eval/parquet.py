"""Result rows as a Parquet file, for data frames and databases: one column a field, nested ones by dotted name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparse_dit.eval.results import SCHEMA, Row
from sparse_dit.pipelines.disk import write_stream


def write_parquet(rows: Sequence[Row], path: Path) -> None:
    """Writes rows to a file that appears once it is whole; the schema's version is in its metadata, too.

    A column holds numbers, booleans or text. Lists are JSON text, and so is a column whose values are of several kinds
    (a recipe's `order` is a name or a mapping); whole numbers beside others become floats, "inf" becomes infinity.

    Raises:
        ValueError: no row, or no pyarrow.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError("parquet: it needs pyarrow, which is not installed; valid: pip install pyarrow") from None
    if not rows:
        raise ValueError("rows: there are none; valid: at least one")
    flat = [dict(_flat(row)) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    columns = {name: _column([row.get(name) for row in flat]) for name in names}
    table = pyarrow.table(columns).replace_schema_metadata({"sparse_dit.schema": str(SCHEMA)})
    write_stream(path, lambda stream: parquet.write_table(table, stream))


def _flat(row: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in row.items():
        found += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)]
    return found


def _column(values: Sequence[Any]) -> list[Any]:
    """Values of one kind."""
    plain = [float(value) if value in ("inf", "-inf") else value for value in values]
    kinds = {type(value) for value in plain if value is not None}
    if kinds <= {int, float} and float in kinds:
        return [None if value is None else float(value) for value in plain]
    if len(kinds) <= 1 and list not in kinds:
        return plain
    return [None if value is None else value if isinstance(value, str) else json.dumps(value) for value in plain]
