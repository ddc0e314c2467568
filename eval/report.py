"""Tables from result rows, and the page they are kept in."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from sparse_dit.eval.results import Row, load_rows

HEADER = (
    "| recipe | density | dense steps | run density | PSNR | worst clip | SSIM | attention time | clips |\n"
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
)


def table(rows: Sequence[Row]) -> str:
    """A markdown table with its caption: one line for each recipe name, selection and number of dense steps.

    Figures are averaged over clips. PSNR and SSIM are means over clips of means over frames, PSNR with its standard
    deviation over clips; *worst clip* is the smallest of the clips' PSNRs; *attention time* is that of the sparse runs
    over that of the dense ones.

    Raises:
        ValueError: no row.
    """
    if not rows:
        raise ValueError("rows: there are none; valid: at least one")
    groups: dict[tuple[str, float, int, str], list[Row]] = defaultdict(list)
    for row in rows:
        recipe = row["recipe"]
        selection = json.dumps(recipe["selection"], sort_keys=True)
        # A selection's density depends on the grid only, so it is the same for all rows of a group.
        key = (recipe["name"], -round(row["density"] or 1.0, 6), recipe["schedule"]["dense_steps"], selection)
        groups[key].append(row)
    return "\n".join([_caption(rows), "", HEADER, *(_line(groups[key]) for key in sorted(groups))])


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


def _line(rows: Sequence[Row]) -> str:
    recipe, density = rows[0]["recipe"], rows[0]["density"]
    psnr = [row["psnr"] for row in rows]
    spread = f" ± {statistics.stdev(psnr):.1f}" if len(psnr) > 1 and all(map(math.isfinite, psnr)) else ""
    time = _mean(rows, "attention_seconds_sparse") / _mean(rows, "attention_seconds_dense")
    cells = (
        recipe["name"],
        "none" if density is None else f"{density:.2f}",
        f"{recipe['schedule']['dense_steps']} of {rows[0]['steps']}",
        f"{_mean(rows, 'run_density'):.2f}",
        f"{statistics.fmean(psnr):.1f}{spread} dB",
        f"{min(psnr):.1f} dB",
        f"{_mean(rows, 'ssim'):.3f}",
        f"{time:.2f} of dense",
        str(len(rows)),
    )
    return f"| {' | '.join(cells)} |"


def _mean(rows: Sequence[Row], field: str) -> float:
    return statistics.fmean(row[field] for row in rows)


if __name__ == "__main__":
    update(Path("README.md"), Path("eval/results/radial-tiny-wan.jsonl"))
