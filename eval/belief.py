"""What runs that were made say of those that were not: a Gaussian process over candidates and prompts.

    quality[c, p] = level + candidate[c] + prompt[p] + both[c, p] + rest[c, p]

each a Gaussian of mean 0 (Rasmussen & Williams 2006, chapter 2). Candidates that are alike have levels that are alike,
and find the same prompts hard; so a run tells of its candidate on other prompts, and of other candidates on its prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

# Variances in units of that of `candidate`, chosen on `eval/results/search-tiny-wan.jsonl`.
_LEVEL, _PROMPT, _BOTH, _REST = 4.0, 1.0, 0.6, 0.15
_ROUNDING = 1e-6  # that keeps covariances positive
_KNOWN = 4  # so many runs the guess at the unit is worth
# Of `likeness`: what a field that differs takes, what nothing takes away, and how far densities and dense shares reach.
_FIELD, _SHARED, _DENSITY, _DENSE = 0.1, 0.3, 0.7, 0.4


def likeness(settings: Sequence[Mapping[str, Any]], densities: Sequence[float], dense: Sequence[float]) -> Floats:
    """How alike candidates are, [candidates, candidates], 1 on the diagonal.

    Args:
        settings: of each candidate, flat or nested; without what only scales how much is computed.
        densities: run density of each, above 0.
        dense: share of each one's attention calls that stay dense.
    """
    flat = [_flat(setting) for setting in settings]
    differing = np.zeros((len(flat), len(flat)))
    for field in sorted({field for setting in flat for field in setting}):
        values = np.array([setting.get(field, "") for setting in flat])
        differing += values[:, None] != values
    steps = [
        (values[:, None] - values) / reach
        for values, reach in ((np.log(densities), _DENSITY), (np.asarray(dense, dtype=np.float64), _DENSE))
    ]
    near = np.exp(-0.5 * sum(np.square(step) for step in steps))
    found: Floats = near * (_SHARED + (1 - _SHARED) * np.exp(-_FIELD * differing))
    return found


def _flat(setting: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Values as text, by dotted name."""
    found: dict[str, str] = {}
    for name, value in setting.items():
        nested = isinstance(value, Mapping)
        found |= _flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": repr(value)}
    return found


class Belief:
    """Means over prompts, and how sure they are, from the runs told so far.

    Args:
        alike: [candidates, candidates], see `likeness`.
        prompts: how many there are.
        spread: standard deviation of candidates' levels that is expected then; runs correct it.

    Attributes:
        mean: [candidates], of the mean over all prompts.
        covariance: [candidates, candidates], of these means.
    """

    def __init__(self, alike: Floats, prompts: int, spread: float) -> None:
        count = len(alike)
        self._alike, self._spread = alike, spread
        self._told: list[float] = []  # innovations, in units of their deviation
        # By run: covariance of each cell with what the run added, in units of its deviation. Their squares are what
        # runs take from the variance of a cell (the rows of a Cholesky factor, extended to all cells).
        self._factor = np.zeros((0, count, prompts))
        self._cells = np.zeros((count, prompts))
        self._means = _LEVEL + alike + (_PROMPT + _BOTH * alike + _REST * np.eye(count)) / prompts
        self._left = self._means.copy()

    @property
    def mean(self) -> Floats:
        """[candidates], the mean quality over all prompts as believed, in the unit of the qualities told."""
        found: Floats = self._cells.mean(axis=1)
        return found

    @property
    def covariance(self) -> Floats:
        """[candidates, candidates], the covariance of those means, in that unit squared."""
        found: Floats = (self._left + _ROUNDING * np.eye(len(self._left))) * self._unit
        return found

    @property
    def _unit(self) -> float:
        """The variance that all others are counted in."""
        return float((_KNOWN * self._spread**2 + np.square(self._told).sum()) / (_KNOWN + len(self._told)))

    def tell(self, candidate: int, prompt: int, quality: float) -> None:
        """A run, once. All qualities are taken to be like the first until others are told."""
        if not self._told:
            self._cells += quality
        row = _LEVEL + np.repeat(self._alike[candidate][:, None], self._cells.shape[1], axis=1)
        row[:, prompt] += _PROMPT + _BOTH * self._alike[candidate]
        row[candidate, prompt] += _REST
        row -= np.tensordot(self._factor[:, candidate, prompt], self._factor, axes=1)
        row /= np.sqrt(max(row[candidate, prompt], 1e-9))
        innovation = (quality - self._cells[candidate, prompt]) / row[candidate, prompt]
        self._factor = np.concatenate((self._factor, row[None]))
        self._told.append(innovation)
        over_prompts = row.mean(axis=1)
        self._left -= np.outer(over_prompts, over_prompts)
        self._cells += innovation * row

    def gains(self, candidate: int) -> Floats:
        """What a run of a candidate on each prompt would take from the variance of its mean, [prompts], in its unit."""
        ahead = self._factor[:, candidate]
        covariance = self._means[candidate, candidate] - ahead.mean(axis=1) @ ahead
        variance = _LEVEL + 1 + _PROMPT + _BOTH + _REST - np.square(ahead).sum(axis=0)
        found: Floats = np.square(covariance) / np.maximum(variance, 1e-9)
        return found
