"""`sparse-dit report`: what it does."""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_dit.app.output import output_folder, warn

if TYPE_CHECKING:
    from sparse_dit.eval.results import Row

ROWS = ["eval/results/radial-tiny-wan.jsonl"]
NONE: list[str] = []


def report(
    rows: list[str] = ROWS,
    clips: list[str] = NONE,
    probes: list[str] = NONE,
    distances: list[str] = NONE,
    vbench: list[str] = NONE,
    out: str = "outputs/report.html",
    pictures: str = "",
    markdown: str = "",
    parquet: str = "",
) -> int:
    """Make a page of plots and tables from result rows, and if wanted PNGs, Markdown tables and a Parquet file.

    Args:
        rows: JSONL files, as eval writes them.
        clips: folders that compare wrote, to be shown as filmstrips.
        probes: JSONL files that probe wrote, to be shown as heat maps and masks over frames.
        distances: JSONL files that sparse_dit.eval.decay wrote, to be shown as curves.
        vbench: JSON files that VBench wrote, whose scores are joined to rows (docs/evaluation.md).
        out: the HTML file; it holds everything it shows.
        pictures: a folder for every plot as PNG.
        markdown: a Markdown file for the tables.
        parquet: a Parquet file for the rows, needs pyarrow.

    Returns:
        1 where lines of the files are no rows, else 0; the other lines are shown.
    """
    from sparse_dit.eval.page import page
    from sparse_dit.eval.parquet import write_parquet
    from sparse_dit.eval.plots import pictures as drawn_into
    from sparse_dit.eval.report import tables
    from sparse_dit.eval.vbench import join, load_scores
    from sparse_dit.pipelines.disk import write_file

    compared, complaints = _load("rows", rows)
    probed, torn = _load("probes", probes)
    looked, worn = _load("distances", distances)
    complaints += torn + worn
    if vbench:
        compared, lost = join(compared, [load_scores(Path(name)) for name in vbench])
        complaints.extend(warn(line) for line in lost)
    file = Path(out)
    with output_folder(file.parent) as folder, output_folder(pictures or file.parent) as drawn:
        with drawn_into(drawn) if pictures else nullcontext():
            text = page(compared, [Path(name) for name in clips], probed, looked)
        (folder / file.name).write_text(text, encoding="utf-8")
    written = [out, *([f"{pictures}/"] if pictures else [])]
    if markdown:
        write_file(_with_folder(markdown), tables(compared).encode())
    if parquet:
        write_parquet(compared, _with_folder(parquet))
    print(f"wrote {', '.join([*written, *filter(None, [markdown, parquet])])}")
    return 1 if complaints else 0


def _load(option: str, names: list[str]) -> tuple[list["Row"], list[str]]:
    """The rows of files one after the other, and what is said of lines that are none."""
    from sparse_dit.eval.results import read_rows

    rows: list[Row] = []
    complaints: list[str] = []
    for name in names:
        if not Path(name).is_file():
            raise ValueError(f"{option}: {name!r} is no file; valid: a JSONL file of result rows")
        read, damaged = read_rows(Path(name))
        rows += read
        complaints += [warn(line) for line in damaged]
    return rows, complaints


def _with_folder(name: str) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
