"""Plots of settings and of what happens inside a model, as SVG text that can stand inside a page."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np

from sparse_dit.eval.settings import Setting, front, interval

_MARKERS = "osD^v<>ph*"
_LEGEND_COLUMNS = 4
_DPI = 150
_folder: ContextVar[Path | None] = ContextVar("folder of pictures", default=None)


def pareto(settings: Sequence[Setting], cost: Callable[[Setting], float], label: str, name: str) -> str | None:
    """PSNR over a cost, with 95 % intervals and the Pareto front.

    Args:
        settings: one point each; colours tell recipes apart, markers the number of dense steps.
        cost: smaller is better.
        label: of the cost's axis, with its unit.
        name: of the picture within its page.

    Returns:
        An `<svg>` element; None where no setting has a finite PSNR.

    Raises:
        ValueError: matplotlib is not installed.
    """
    points = [(cost(setting), setting.mean("psnr")) for setting in settings]
    drawable = [
        (setting, x, y) for setting, (x, y) in zip(settings, points, strict=True) if y is not None and math.isfinite(y)
    ]
    if not drawable:
        return None
    pyplot = _pyplot()
    colors = _numbered([setting.name for setting, _, _ in drawable])
    markers = _numbered([setting.dense_steps for setting, _, _ in drawable])
    with pyplot.rc_context(_style(name)):
        legend_lines = -(-(len(colors) + len(markers)) // _LEGEND_COLUMNS)
        figure, axes = pyplot.subplots(figsize=(4.4, 3.2 + 0.15 * legend_lines), layout="constrained")
        for setting, x, y in drawable:
            ends = interval(setting.values("psnr"))
            error = [[y - ends[0]], [ends[1] - y]] if ends else None
            axes.errorbar(
                x,
                y,
                error,
                marker=_MARKERS[markers[setting.dense_steps] % len(_MARKERS)],
                color=_color(colors[setting.name]),
                markersize=6,
                elinewidth=0.8,
                linestyle="none",
            )
        best = front([(x, y) for _, x, y in drawable])
        axes.plot([drawable[i][1] for i in best], [drawable[i][2] for i in best], color="gray", linewidth=0.8, zorder=0)
        handles = [_handle("o", _color(number), recipe) for recipe, number in colors.items()]
        handles += [
            _handle(_MARKERS[n % len(_MARKERS)], "gray", f"{steps} steps dense") for steps, n in markers.items()
        ]
        figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=_LEGEND_COLUMNS,
            fontsize=7,
            frameon=False,
            handletextpad=0.2,
            columnspacing=1,
        )
        axes.set(xlabel=label, ylabel="PSNR against dense (dB)")
        axes.grid(alpha=0.3, linewidth=0.5)
        return _svg(figure, name)


def curves(values: Sequence[float], label: str, name: str) -> str:
    """Mean attention mass of a key by its distance, over that of uniform attention, on a logarithmic axis.

    Args:
        values: by distance, from 0; a distance without mass is left out.
        label: of the distance, with its unit.
        name: of the picture within its page.

    Returns:
        An `<svg>` element.

    Raises:
        ValueError: matplotlib is not installed.
    """
    pyplot = _pyplot()
    with pyplot.rc_context(_style(name)):
        figure, axes = pyplot.subplots(figsize=(4.4, 3.0), layout="constrained")
        there = [(distance, value) for distance, value in enumerate(values) if value > 0]
        axes.plot(*zip(*there, strict=True), marker="o", markersize=3.5, linewidth=1.2, color=_color(0))
        axes.axhline(1, color="gray", linewidth=0.8, linestyle="--")
        axes.annotate("uniform attention", (there[-1][0], 1), ha="right", va="bottom", fontsize=7, color="gray")
        axes.set(xlabel=label, ylabel="mean mass of a key / uniform", yscale="log")
        axes.xaxis.set_major_locator(pyplot.MaxNLocator(integer=True, nbins=8))
        axes.grid(alpha=0.3, linewidth=0.5)
        return _svg(figure, name)


@contextmanager
def pictures(folder: Path) -> Iterator[None]:
    """Every plot that is drawn inside the block is also a PNG of its name in a folder, which must be there."""
    token = _folder.set(folder)
    try:
        yield
    finally:
        _folder.reset(token)


def heat_map(table: Sequence[Sequence[float | None]], label: str, name: str) -> str:
    """A figure by layer and step; cells without one, where calls were dense, stay white.

    Args:
        table: [steps][layers].
        label: of the colour bar.
        name: of the picture within its page.

    Returns:
        An `<svg>` element.

    Raises:
        ValueError: matplotlib is not installed.
    """
    pyplot = _pyplot()
    cells = np.array([[np.nan if cell is None else cell for cell in line] for line in table], dtype=float).T
    with pyplot.rc_context(_style(name)):
        figure, axes = pyplot.subplots(figsize=(4.4, 3.0), layout="constrained")
        edges = [np.arange(size + 1) - 0.5 for size in reversed(cells.shape)]  # ticks stand in the middle of a cell
        picture = axes.pcolormesh(*edges, np.ma.masked_invalid(cells), cmap="viridis")
        figure.colorbar(picture, ax=axes, label=label)
        axes.set(xlabel="denoising step", ylabel="self-attention layer")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(pyplot.MaxNLocator(integer=True, nbins=8))
        return _svg(figure, name)


def _style(name: str) -> dict[str, Any]:
    return {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9, "font.family": "sans-serif"}


def _svg(figure: Any, name: str) -> str:
    """The figure as an element, and as a PNG where `pictures` says so; then it is closed."""
    text = io.StringIO()
    if (folder := _folder.get()) is not None:
        figure.savefig(folder / f"{name}.png", dpi=_DPI)
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    _pyplot().close(figure)
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _handle(marker: str, color: str, label: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], marker=marker, color=color, linestyle="none", label=label)


def _color(number: int) -> Any:
    """Twenty colours: first the ten strong ones, then their pale twins."""
    from matplotlib import colormaps

    return colormaps["tab20"](2 * number % 20 + number // 10 % 2)


def _numbered(names: Sequence[str]) -> dict[str, int]:
    """Each different name with its number, in the order of appearance."""
    return {name: number for number, name in enumerate(dict.fromkeys(names))}


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ValueError(
            "report: its plots need matplotlib, which is not installed; valid: pip install matplotlib"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
