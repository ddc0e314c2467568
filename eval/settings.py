"""Result rows grouped into settings, and what can be said of a setting and of two of them."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sparse_dit.eval.results import Row

Interval = tuple[float, float]

_RESAMPLES = 10_000
_LEVEL = 0.95


@dataclass(frozen=True)
class Setting:
    """The rows of one recipe, settings included: a row a clip.

    Args:
        rows: at least one; they differ in prompt and seed.
    """

    rows: tuple[Row, ...]

    @property
    def name(self) -> str:
        """The recipe's name."""
        return str(self.rows[0]["recipe"]["name"])

    @property
    def density(self) -> float | None:
        """Mean density of the sparse calls; None where there was none."""
        densities = [row["density"] for row in self.rows if row["density"] is not None]
        return statistics.fmean(densities) if densities else None

    @property
    def dense_steps(self) -> str:
        """How many first steps the schedule keeps dense, of how many."""
        return f"{self.rows[0]['recipe']['schedule']['dense_steps']} of {self.rows[0]['steps']}"

    @property
    def label(self) -> str:
        """Name, density and dense steps in one line."""
        density = "" if self.density is None else f", density {self.density:.2f}"
        return f"{self.name}{density}, {self.dense_steps} steps dense"

    def values(self, field: str) -> list[float]:
        """A field of every row that has it measured."""
        return [row[field] for row in self.rows if row.get(field) is not None]

    def mean(self, field: str) -> float | None:
        """Mean of a field over clips; None where it was not measured."""
        values = self.values(field)
        return statistics.fmean(values) if values else None

    def time_ratio(self, field: str) -> float:
        """Time of the sparse runs over that of the dense ones; field `seconds` or `attention_seconds`."""
        return statistics.fmean(self.values(f"{field}_sparse")) / statistics.fmean(self.values(f"{field}_dense"))


def settings(rows: Sequence[Row]) -> list[Setting]:
    """Rows grouped by recipe, in the order of name, falling density and dense steps.

    Raises:
        ValueError: no row.
    """
    if not rows:
        raise ValueError("rows: there are none; valid: at least one")
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[json.dumps([row["recipe"], row["steps"]], sort_keys=True)].append(row)
    found = [(Setting(tuple(group)), key) for key, group in groups.items()]

    def order(entry: tuple[Setting, str]) -> tuple[str, float, int, str]:
        setting, key = entry
        density = 1.0 if setting.density is None else setting.density
        return setting.name, -round(density, 6), setting.rows[0]["recipe"]["schedule"]["dense_steps"], key

    return [setting for setting, _ in sorted(found, key=order)]


def places(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by what must be equal before they may be compared: model, size, device and number type, in words."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        grid = " x ".join(map(str, row["grid"]))
        device = row["device"]
        groups[f"{row['model']}, {grid} tokens, on {device['name']} in {device['dtype']}"].append(row)
    return dict(sorted(groups.items()))


def paired(setting: Setting, baseline: Setting, field: str) -> list[float]:
    """Differences of a field, setting minus baseline, for every clip (prompt and seed) that both have.

    Two equal infinities, the PSNR of clips that both equal the dense one, differ by 0.
    """
    known = {(row["prompt"], row["seed"]): row.get(field) for row in baseline.rows}
    pairs = [(row.get(field), known.get((row["prompt"], row["seed"]))) for row in setting.rows]
    known_pairs = [(ours, theirs) for ours, theirs in pairs if ours is not None and theirs is not None]
    return [0.0 if ours == theirs else ours - theirs for ours, theirs in known_pairs]


def interval(values: Sequence[float]) -> Interval | None:
    """The 95 % bootstrap interval of a mean, by percentiles of 10,000 resamplings with a fixed seed.

    Args:
        values: one a clip.

    Returns:
        Its ends; None for fewer than two values or for one that is not finite.
    """
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    data = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(0, len(data), (_RESAMPLES, len(data)))
    tail = (1 - _LEVEL) / 2
    low, high = np.quantile(data[drawn].mean(axis=1), [tail, 1 - tail])
    return float(low), float(high)


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The Pareto front of (cost, quality): points that no other one beats in both, by rising cost.

    Args:
        points: smaller costs and larger qualities are better; those with a value that is not finite never belong.

    Returns:
        Indices into `points`.
    """
    finite = [index for index, point in enumerate(points) if all(map(math.isfinite, point))]
    chosen: list[int] = []
    for index in sorted(finite, key=lambda index: (points[index][0], -points[index][1])):
        if not chosen or points[index][1] > points[chosen[-1]][1]:
            chosen.append(index)
    return chosen
