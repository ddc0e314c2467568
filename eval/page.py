"""Result rows as one HTML file that needs nothing else: no network, no script."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from PIL import Image

from sparse_dit.eval.filmstrip import data_uri, filmstrip, read_comparison
from sparse_dit.eval.mask_pictures import strip
from sparse_dit.eval.plots import curves, heat_map, pareto
from sparse_dit.eval.results import Row
from sparse_dit.eval.settings import Setting, interval, paired, places, settings

# The policy makes browsers refuse what the page does not hold itself.
_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>sparse_dit report</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; max-width: 1180px; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; } h3 { font-size: 1rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(320px, 100%), 1fr)); gap: 1rem; }
.plots figure { margin: 0; }
.plots svg, img { width: 100%; height: auto; }
figure { margin: 0 0 1.5rem; } figcaption, .note { color: #555; font-size: 0.87rem; }
.wide { overflow-x: auto; margin-top: 1rem; }
table { border-collapse: separate; border-spacing: 0; font-size: 0.87rem; white-space: nowrap; }
th, td { padding: 0.25rem 0.6rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
@media (max-width: 600px) { th:first-child, td:first-child { white-space: normal; min-width: 7rem; } }
</style>
</head>
<body>
"""

_NOTE = (
    "PSNR, SSIM and flicker compare each clip with the dense clip of the same prompt, seed and noise, frame by frame, "
    "before any video codec: they tell how much a clip changed, not whether it got worse. Intervals are 95 % bootstrap "
    "intervals of the mean over clips. Density is the computed share of an attention call, run density its mean over "
    "all steps and layers, dense ones included. Times are those of the sparse run over those of the dense run."
)


_INSIDE = (
    ("density", "density", "computed share of an attention call, mean over heads"),
    ("recall", "kept attention mass", "share of whole attention's mass on computed keys, mean over heads"),
    ("recall_min", "kept mass, worst row", "the smallest such share of a sampled row of any head"),
    ("error", "relative L2 error", "of the attention output, mean over heads"),
)


def page(
    rows: Sequence[Row], clips: Sequence[Path] = (), probes: Sequence[Row] = (), distances: Sequence[Row] = ()
) -> str:
    """The report as HTML: for each model and device plots, a table of settings and their differences; then the rest.

    Args:
        rows: as `sparse-dit eval` writes them.
        clips: folders that `sparse-dit compare` wrote, shown as filmstrips.
        probes: rows that `sparse-dit probe` wrote, shown as heat maps by layer and step and as masks over frames.
        distances: rows that `sparse_dit.eval.decay` wrote, shown as curves.

    Raises:
        ValueError: no row, one of another kind, a folder without clips, or no matplotlib.
    """
    if not rows:
        raise ValueError("rows: there are none; valid: at least one")
    for number, row in enumerate(rows, start=1):
        if not {"recipe", "psnr", "grid", "device"} <= row.keys():
            raise ValueError(f"rows: number {number} compares nothing; valid: rows that eval wrote")
    for number, row in enumerate(probes, start=1):
        if "by_step" not in row:
            raise ValueError(f"probes: row {number} looks into no model; valid: rows that probe wrote")
    for number, row in enumerate(distances, start=1):
        if "relative_mass_by_time" not in row:
            raise ValueError(f"distances: row {number} has no mass by distance; valid: rows that eval.decay wrote")
    parts = [_HEAD, "<h1>Sparse against dense attention</h1>\n", f'<p class="note">{_NOTE}</p>\n']
    for number, (place, group) in enumerate(places(rows).items()):
        found = settings(group)
        parts += [f"<h2>{escape(place)}</h2>\n", _plots(found, number), _settings_table(found)]
        if len(found) > 1:
            parts.append(_differences_table(found))
        parts.append(_vbench_table(found))
    if probes:
        parts.append("<h2>Inside the model</h2>\n")
        parts += [_inside(row, number) for number, row in enumerate(probes)]
    if distances:
        parts.append("<h2>How far attention looks</h2>\n")
        parts += [_distances(row, number) for number, row in enumerate(distances)]
    if clips:
        parts.append("<h2>Clips</h2>\n")
        parts += [_filmstrip(folder) for folder in clips]
    return "".join([*parts, f"<p class='note'>{escape(_origin(rows))}</p>\n</body>\n</html>\n"])


def _plots(found: Sequence[Setting], number: int) -> str:
    costs: tuple[tuple[str, str, Callable[[Setting], float]], ...] = (
        ("quality over density", "run density", lambda setting: setting.mean("run_density") or 0.0),
        (
            "quality over attention time",
            "attention time, sparse / dense",
            lambda setting: setting.time_ratio("attention_seconds"),
        ),
        ("quality over whole time", "time of the run, sparse / dense", lambda setting: setting.time_ratio("seconds")),
    )
    figures = []
    for index, (title, label, cost) in enumerate(costs):
        svg = pareto(found, cost, label, f"plot-{number}-{index}")
        if svg is not None:
            svg = svg.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
            figures.append(
                f"<figure>{svg}<figcaption>{title.capitalize()}; gray: Pareto front.</figcaption></figure>\n"
            )
    if not figures:
        return "<p>Every clip equals its dense one: nothing to plot.</p>\n"
    return f'<div class="plots">{"".join(figures)}</div>\n'


def _settings_table(found: Sequence[Setting]) -> str:
    header = (
        "recipe", "density", "dense steps", "run density", "PSNR (dB)", "worst clip (dB)", "SSIM", "flicker",
        "attention time", "whole time", "clips",
    )  # fmt: skip
    lines = [
        (
            setting.name,
            _number(setting.density, 2),
            setting.dense_steps,
            _number(setting.mean("run_density"), 2),
            _with_interval(setting.values("psnr"), 1),
            _number(min(setting.values("psnr")), 1),
            _number(setting.mean("ssim"), 3),
            _number(setting.mean("flicker"), 4),
            _number(setting.time_ratio("attention_seconds"), 2),
            _number(setting.time_ratio("seconds"), 2),
            str(len(setting.rows)),
        )
        for setting in found
    ]
    return _table(header, lines)


def _differences_table(found: Sequence[Setting]) -> str:
    """Every setting against the one of the highest PSNR, clip by clip: what two means hide, pairs show."""
    best = max(found, key=lambda setting: setting.mean("psnr") or 0.0)
    fields = (("psnr", 2), ("ssim", 4), ("seconds_sparse", 2))
    lines = []
    for setting in found:
        if setting is not best:
            pairs = [(paired(setting, best, field), digits) for field, digits in fields]
            cells = [_with_interval(values, digits, sign=True) for values, digits in pairs]
            lines.append((setting.label, *cells, str(len(pairs[0][0]))))
    title = f"<h3>Differences from {escape(best.label)}, paired by clip</h3>\n"
    return title + _table(("setting", "PSNR (dB)", "SSIM", "seconds of a run", "pairs"), lines)


def _vbench_table(found: Sequence[Setting]) -> str:
    """VBench's scores where rows have them, means over clips; else nothing."""
    names = sorted({name for setting in found for row in setting.rows for name in row.get("vbench") or ()})
    if not names:
        return ""
    lines = []
    for setting in found:
        scored = [row["vbench"] for row in setting.rows if row.get("vbench")]
        values = [[scores[name] for scores in scored if name in scores] for name in names]
        lines.append((setting.label, *(_with_interval(each, 4) for each in values), str(len(scored))))
    return "<h3>VBench</h3>\n" + _table(("setting", *(name.replace("_", " ") for name in names), "clips"), lines)


def _inside(row: Row, number: int) -> str:
    """Heat maps of one probed run; white is dense."""
    figures = []
    for name, label, meaning in _INSIDE:
        if row["by_step"][name] is not None:
            svg = heat_map(row["by_step"][name], label, f"probe-{number}-{name}")
            figures.append(_figure(svg, label, f"{label[0].upper()}{label[1:]}: {meaning}. White: dense."))
    title = f"{row['recipe']['name']} in {row['model']}, {row['rows']} sampled rows a call: {row['prompt']}"
    masks = [_mask(row, mask) for mask in row.get("masks", ())]
    return f'<h3>{escape(title)}</h3>\n<div class="plots">{"".join(figures)}</div>\n{"".join(masks)}'


def _mask(row: Row, mask: Row) -> str:
    """One call's block mask over the frames of the run."""
    picture, share = strip(row, mask)
    latents = ", ".join(map(str, row["frames"]["latents"]))
    about = (
        f"Step {mask['step']}, layer {mask['layer']}, first head: {share:.0%} of the video tokens are computed for the "
        f"query in the yellow square. Dark tokens are skipped. Latent frames {latents} of 0 to {row['grid'][0] - 1}."
    )
    return _image(picture, about)


def _distances(row: Row, number: int) -> str:
    """Two curves: over time and over space."""
    figures = []
    for axis, unit in (("time", "latent frames"), ("space", "tokens, rounded Euclidean")):
        svg = curves(row[f"relative_mass_by_{axis}"], f"distance in {axis} ({unit})", f"distance-{number}-{axis}")
        about = f"Attention mass by distance in {axis}, mean over all calls, {row['queries']} sampled rows."
        figures.append(_figure(svg, f"attention by distance in {axis}", about))
    title = f"{row['model']}, {' x '.join(map(str, row['grid']))} tokens, {row['prompts']} prompts"
    return f'<h3>{escape(title)}</h3>\n<div class="plots">{"".join(figures)}</div>\n'


def _figure(svg: str, title: str, caption: str) -> str:
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>\n"


def _filmstrip(folder: Path) -> str:
    row, dense, sparse = read_comparison(folder)
    picture, gain = filmstrip(dense, sparse)
    about = (
        f"{row['recipe']['name']}, run density {row['run_density']:.2f}, {float(row['psnr']):.1f} dB: {row['prompt']}. "
        f"From above: dense, sparse, difference x {gain}; frames of the encoded videos."
    )
    return _image(picture, about)


def _image(picture: Image.Image, about: str) -> str:
    size = f'width="{picture.width}" height="{picture.height}"'
    image = f'<img alt="{escape(about)}" src="{data_uri(picture)}" {size}>'
    return f"<figure>{image}<figcaption>{escape(about)}</figcaption></figure>\n"


def _origin(rows: Sequence[Row]) -> str:
    revisions = sorted({str(row.get("revision") or "unknown")[:12] for row in rows})
    days = sorted({str(row["created"])[:10] for row in rows if row.get("created")})
    when = f", measured {' to '.join(dict.fromkeys([days[0], days[-1]]))}" if days else ""
    return f"{len(rows)} rows, revision {', '.join(revisions)}{when}."


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>\n" for line in lines)
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n{body}</table></div>\n'


def _with_interval(values: Sequence[float], digits: int, sign: bool = False) -> str:
    """Mean and interval of values, one a clip."""
    if not values:
        return "-"
    mean, ends = sum(values) / len(values), interval(values)
    if math.isnan(mean):
        return "-"  # infinities of both signs
    form = f"{'+' if sign else ''}.{digits}f"
    spread = f" [{ends[0]:{form}}, {ends[1]:{form}}]" if ends else ""
    return f"{mean:{form}}{spread}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
