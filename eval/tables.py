"""The README's tables that are no plain list of settings: how fast the kernels are, and how systems rank."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from sparse_dit.eval.cache_worth import worth
from sparse_dit.eval.host_table import host
from sparse_dit.eval.models_table import gains, models
from sparse_dit.eval.report import put
from sparse_dit.eval.results import Row, load_rows
from sparse_dit.eval.systems_table import overhead, systems

# Kernels that take block lists, ours and other people's, by what they are called in a table.
_SHOWN = {"hopper": "hopper", "triton": "triton", "flex": "FlexAttention", "flash4": "FlashAttention 4"}


def speed(rows: Sequence[Row]) -> str:
    """Attention along block lists by shape: cuDNN's dense time in the same run over theirs, at each density.

    Args:
        rows: as `sparse-dit bench kernels` writes them. Those with quantization included, blocks of 128 x 128 and lists
            of equal length are shown; `error` is the largest relative L2 error of a line's cells.
    """
    cells: dict[tuple[str, str, str], dict[float, Row]] = defaultdict(dict)
    for row in rows:
        plain = not row["codes"] and not row["ordered"] and row["lists"] == "equal" and row["skipped"] == "drop"
        if row["status"] == "measured" and row["what"] == "attention" and plain and row["blocks"] == [128, 128]:
            shape = row["shape"]
            name = f"{shape['heads']} x {shape['tokens']:,} x {shape['head_size']}"
            cells[name, row["kernel"], row["precision"]][row["wanted_density"]] = row
    densities = sorted({density for line in cells.values() for density in line if len(line) > 1}, reverse=True)
    lines = [
        "| heads x tokens x head size | kernel | precision | " + " | ".join(f"{d:g}" for d in densities) + " | error |",
        "| --- | --- | --- | " + " | ".join("---:" for _ in densities) + " | ---: |",
    ]
    for (shape, kernel, precision), line in cells.items():
        if kernel in _SHOWN:
            ratios = (f"{line[density]['ratio']:.2f}" if density in line else "" for density in densities)
            error = max(row["error"] for row in line.values())
            lines.append(f"| {shape} | {_SHOWN[kernel]} | {precision} | {' | '.join(ratios)} | {error:.4f} |")
    return "\n".join(lines)


# Page and marker, the files of rows, and the table made of them.
PLACES: tuple[tuple[str, str, tuple[str, ...], Callable[..., str]], ...] = (
    ("README.md", "speed", ("bench-kernels.jsonl",), speed),
    ("README.md", "gains", ("bench-models.jsonl",), gains),
    (
        "docs/systems.md",
        "systems",
        ("systems-tiny-wan.jsonl", "systems-recall.jsonl", "bench-systems.jsonl"),
        systems,
    ),
    ("docs/systems.md", "cache", ("search-tiny-wan.jsonl",), worth),
    ("docs/models.md", "models", ("bench-models.jsonl",), models),
    ("docs/models.md", "host", ("bench-host.jsonl",), host),
    ("docs/systems.md", "overhead", ("bench-systems.jsonl",), overhead),
)


def pages(root: Path) -> dict[Path, str]:
    """What every page with such a table should hold.

    Args:
        root: of the repository.

    Raises:
        ValueError: a page lacks its marker, or as `sparse_dit.eval.results.load_rows`.
    """
    found: dict[Path, str] = {}
    for page, marker, files, table in PLACES:
        text = found.get(root / page) or (root / page).read_text(encoding="utf-8")
        rows = (load_rows(root / "eval" / "results" / file) for file in files)
        found[root / page] = put(text, marker, table(*rows))
    return found


if __name__ == "__main__":
    for page, text in pages(Path()).items():
        page.write_text(text, encoding="utf-8")
