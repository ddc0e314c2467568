"""The README's tables that are no plain list of settings: how fast the kernels are, and how systems rank."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from sparse_dit.eval.report import put
from sparse_dit.eval.results import Row, load_rows
from sparse_dit.eval.systems_table import overhead, systems


def speed(rows: Sequence[Row]) -> str:
    """Attention kernels of ours by shape: cuDNN's dense time in the same run over theirs, at each density.

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
        if kernel in ("hopper", "triton") and not (kernel == "hopper" and precision == "int8_fp8"):
            ratios = (f"{line[density]['ratio']:.2f}" if density in line else "" for density in densities)
            error = max(row["error"] for row in line.values())
            lines.append(f"| {shape} | {kernel} | {precision} | {' | '.join(ratios)} | {error:.4f} |")
    return "\n".join(lines)


def models(rows: Sequence[Row]) -> str:
    """One denoising step of whole models: stock, then our variants beside it, by case.

    Args:
        rows: as `sparse-dit bench models` writes them. Of each variant the last measured row counts, without tiny ones.
    """
    cases: dict[tuple[str, bool], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if row["status"] == "measured" and not row["tiny"]:
            cases[row["case"], row["compiled"]][row["variant"]] = row
    if not cases:
        return "Not measured yet."
    measured = [row for variants in cases.values() for row in variants.values()]
    where = {f"{row['device']['name']}, torch {row['versions']['torch']}, Triton {row['versions']['triton']}, "
             f"diffusers {row['versions']['diffusers']}" for row in measured}  # fmt: skip
    lines = [
        "; ".join(sorted(where)),
        "",
        "| model | tokens | layers | variant | step, ms | x stock | attention | memory | host, us | density | error |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (case, compiled), variants in cases.items():
        for name, row in sorted(variants.items(), key=lambda entry: entry[0] != "stock"):
            numbers = (
                _number(row["ratio"], ".2f"),
                _number(row["attention_share"], ".2f"),
                _number(row["peak_ratio"], ".3f"),
                _number(row["host_us_per_call"], ".0f"),
                _number(row["density"], ".3f"),
                _number(row["error"], ".4f") if row["wanted_density"] == 1.0 else "",
            )
            layers = f"{sum(row['layers_timed'])} of {sum(row['layers'])}"
            model = f"{case}, compiled" if compiled else case
            lines.append(
                f"| {model} | {row['tokens']:,} | {layers} | {name} | {row['ms']:,.0f} | {' | '.join(numbers)} |"
            )
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


# Page and marker, the files of rows, and the table made of them.
PLACES: tuple[tuple[str, str, tuple[str, ...], Callable[..., str]], ...] = (
    ("README.md", "speed", ("bench-kernels.jsonl",), speed),
    (
        "docs/systems.md",
        "systems",
        ("systems-tiny-wan.jsonl", "systems-recall.jsonl", "bench-systems.jsonl"),
        systems,
    ),
    ("docs/models.md", "models", ("bench-models.jsonl",), models),
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
