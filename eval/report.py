"""Markdown tables from result rows, and the page they are kept in."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from sparse_dit.eval.results import Row, load_rows
from sparse_dit.eval.settings import Setting, places, settings

HEADER = (
    "| recipe | density | dense steps | run density | PSNR | worst clip | SSIM | attention time | clips |\n"
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
)


def table(rows: Sequence[Row]) -> str:
    """A markdown table with its caption: one line for each setting.

    Figures are averaged over clips. PSNR and SSIM are means over clips of means over frames, PSNR with its standard
    deviation over clips; *worst clip* is the smallest of the clips' PSNRs; *attention time* is that of the sparse runs
    over that of the dense ones.

    Raises:
        ValueError: no row.
    """
    lines = [_line(setting) for setting in settings(rows)]
    return "\n".join([_caption(rows), "", HEADER, *lines])


def tables(rows: Sequence[Row]) -> str:
    """A `table` for each model, size and device, under its name; with VBench's scores where rows have them."""
    parts = [f"## {place}\n\n{table(group)}\n" for place, group in places(rows).items()]
    return "\n".join([*parts, *_vbench(rows)])


def _vbench(rows: Sequence[Row]) -> list[str]:
    """A table of VBench's scores, means over clips."""
    scored = [row for row in rows if row.get("vbench")]
    if not scored:
        return []
    names = sorted({name for row in scored for name in row["vbench"]})
    lines = [f"| recipe | {' | '.join(names)} | clips |", f"| --- |{' ---: |' * (len(names) + 1)}"]
    for setting in settings(scored):
        found = {name: [row["vbench"][name] for row in setting.rows if name in row["vbench"]] for name in names}
        cells = [f"{statistics.fmean(values):.4f}" if values else "-" for values in found.values()]
        lines.append(f"| {setting.label} | {' | '.join(cells)} | {len(setting.rows)} |")
    return ["## VBench\n", "\n".join(lines) + "\n"]


def put(page: str, name: str, content: str) -> str:
    """The page with what stands between the markers `<!-- name:begin -->` and `<!-- name:end -->` replaced.

    Raises:
        ValueError: the page lacks a marker.
    """
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
    if begin not in page or end not in page:
        raise ValueError(f"page: it lacks the markers of {name!r}; valid: {begin.strip()} and {end}")
    return page[: page.index(begin) + len(begin)] + content + "\n" + page[page.index(end) :]


def update(page: Path, rows_file: Path) -> None:
    """Puts the table of a file of rows between the markers of that file's name.

    Raises:
        ValueError: as `put`, `table` and `sparse_dit.eval.results.load_rows`.
    """
    text = page.read_text(encoding="utf-8")
    page.write_text(put(text, rows_file.stem, table(load_rows(rows_file))), encoding="utf-8")


def _caption(rows: Sequence[Row]) -> str:
    """What all rows share: model, size, prompts, devices."""
    models = sorted({row["model"] for row in rows})
    grids = sorted({" x ".join(map(str, row["grid"])) for row in rows})
    devices = sorted({f"{row['device']['name']} in {row['device']['dtype']}" for row in rows})
    prompts = len({row["prompt"] for row in rows})
    return f"{', '.join(models)}, {', '.join(grids)} tokens, {prompts} prompts, on {', '.join(devices)}."


def _line(setting: Setting) -> str:
    psnr = setting.values("psnr")
    spread = f" ± {statistics.stdev(psnr):.1f}" if len(psnr) > 1 and all(map(math.isfinite, psnr)) else ""
    cells = (
        setting.name,
        "none" if setting.density is None else f"{setting.density:.2f}",
        setting.dense_steps,
        f"{setting.mean('run_density'):.2f}",
        f"{statistics.fmean(psnr):.1f}{spread} dB",
        f"{min(psnr):.1f} dB",
        f"{setting.mean('ssim'):.3f}",
        f"{setting.time_ratio('attention_seconds'):.2f} of dense",
        str(len(setting.rows)),
    )
    return f"| {' | '.join(cells)} |"


def marked(page: str, results: Path) -> list[Path]:
    """The files of rows in a folder whose table the page has a place for, by name."""
    return [file for file in sorted(results.glob("*.jsonl")) if f"<!-- {file.stem}:begin -->" in page]


if __name__ == "__main__":
    readme = Path("README.md")
    for rows_file in marked(readme.read_text(encoding="utf-8"), Path("eval/results")):
        update(readme, rows_file)
