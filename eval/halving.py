"""The cheapest candidate above a floor of quality, found with few runs: successive halving on paired prompts.

Every candidate runs on one prompt. Then the prompts double from round to round, and only the candidates go on that may
still be the answer: those for which measured means have to be wrong by the fewest decibels (or what the quality counts
in). As hard prompts are hard for all, means over different prompts are compared by the model *candidate + prompt*,
fitted to all that was measured. In the end the answer runs on all prompts, and every cheaper candidate that may be
above the floor within three standard errors gets prompts until it is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

CUT = 4
LEAST = 2
ERRORS = 3.0
_ITERATIONS = 30
_UNKNOWN = 3.0  # of the residuals' deviation while nothing was measured twice

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Answer:
    """What a search came to.

    Args:
        candidate: its number.
        prompts: on how many prompts it ran.
        certain: whether it is above the floor on all prompts, and no cheaper one is held to be.
    """

    candidate: int
    prompts: int
    certain: bool


class Halving:
    """A search, led by what it is told; the same answers lead it the same way, so it can be replayed from rows.

    Args:
        costs: of each candidate; finite.
        floor: the least mean quality over prompts.
        prompts: how many there are.

    Attributes:
        quality: [candidates, prompts] as told; NaN where nothing was.
        failed: numbers of candidates that could not run.

    Raises:
        ValueError: no candidate or no prompt.
    """

    def __init__(self, costs: Sequence[float], floor: float, prompts: int) -> None:
        if not costs or prompts < 1:
            raise ValueError(f"search: {len(costs)} candidates, {prompts} prompts; valid: at least one of each")
        self.costs = np.asarray(costs, dtype=np.float64)
        self.floor = floor
        self.quality = np.full((len(costs), prompts), np.nan)
        self.failed: set[int] = set()

    def tell(self, candidate: int, prompt: int, quality: float | None) -> None:
        """What a run gave; None where it failed, which puts the candidate out."""
        if quality is None:
            self.failed.add(candidate)
        else:
            self.quality[candidate, prompt] = quality

    def runs(self) -> Iterator[tuple[int, int]]:
        """The runs to make, as (candidate, prompt). Each must be told of before the next is asked for."""
        count = self.quality.shape[1]
        alive, prompts = list(range(len(self.costs))), 1
        while True:
            yield from self._missing(alive, prompts)
            if prompts == count or len(self._open()) <= LEAST:
                break
            prompts = min(count, 2 * prompts)
            alive = self._nearest(max(LEAST, math.ceil(len(alive) / CUT)))
        while (candidate := self._doubtful()) is not None:
            yield candidate, int(np.flatnonzero(np.isnan(self.quality[candidate]))[0])

    def answer(self) -> Answer | None:
        """The answer as far as it is known; None where nothing is held to be above the floor."""
        means, _ = self.means()
        above = [candidate for candidate in self._open() if means[candidate] >= self.floor]
        if not above:
            return None
        whole = [candidate for candidate in above if not np.isnan(self.quality[candidate]).any()]
        chosen = whole[0] if whole else above[0]
        certain = bool(whole) and self._doubtful() is None
        return Answer(chosen, int((~np.isnan(self.quality[chosen])).sum()), certain)

    def means(self) -> tuple[Floats, Floats]:
        """Mean quality of each candidate over all prompts and its standard error; NaN where it never ran.

        The model quality = candidate + prompt, prompts' effects of mean 0, by alternating least squares; the error is
        that of a mean over a part of the prompts. A candidate that ran on all has its plain mean and no error.
        """
        values = np.where(np.isinf(self.quality), 100.0, self.quality)  # dB; a clip that equals its dense one
        there = ~np.isnan(values)
        runs, prompts = there.sum(1), values.shape[1]
        filled = np.where(there, values, 0.0)
        effects = np.zeros(prompts)
        seen = there.any(0)
        means = np.full(len(values), np.nan)
        for _ in range(_ITERATIONS):
            with np.errstate(invalid="ignore", divide="ignore"):
                means = (filled - there * effects).sum(1) / runs
            rest = np.where(there, values - means[:, None], 0.0)
            effects[seen] = rest.sum(0)[seen] / there.sum(0)[seen]
            effects[seen] -= effects[seen].mean() if seen.any() else 0.0
        errors = np.sqrt((1 - runs / prompts) / np.maximum(runs, 1)) * self._deviation(values, means, effects)
        whole = runs == prompts
        means[whole] = values[whole].mean(1)
        return means, np.where(runs > 0, errors, np.nan)

    def _deviation(self, values: Floats, means: Floats, effects: Floats) -> float:
        """Standard deviation of what the model leaves, over candidates that ran more than once."""
        twice = (~np.isnan(values)).sum(1) > 1
        rest = (values - means[:, None] - effects)[twice]
        rest = rest[~np.isnan(rest)]
        free = len(rest) - twice.sum() - (~np.isnan(values)).any(0).sum() + 1
        return float(np.sqrt(np.square(rest).sum() / free)) if free > 0 else _UNKNOWN

    def _missing(self, candidates: Sequence[int], prompts: int) -> Iterator[tuple[int, int]]:
        """Runs on the first prompts, a prompt at a time, so that its dense run serves all."""
        for prompt in range(prompts):
            for candidate in candidates:
                if candidate not in self.failed and math.isnan(self.quality[candidate, prompt]):
                    yield candidate, prompt

    def _open(self) -> list[int]:
        """Candidates that can run, the cheapest first."""
        return [int(number) for number in np.argsort(self.costs, kind="stable") if int(number) not in self.failed]

    def _nearest(self, count: int) -> list[int]:
        """The candidates that are the answer if the means are wrong by the least, all in the order of their numbers.

        One is the answer if it is above the floor and every cheaper one below.
        """
        means, _ = self.means()
        best, wrong = -math.inf, {}
        for candidate in self._open():
            wrong[candidate] = max(self.floor - means[candidate], best - self.floor, 0.0)
            best = max(best, means[candidate])
        return sorted(sorted(wrong, key=lambda candidate: wrong[candidate])[:count])

    def _doubtful(self) -> int | None:
        """The candidate to run next: the likeliest cheaper one, then the answer; None where the answer stands."""
        means, errors = self.means()
        candidates = self._open()
        partly = {candidate for candidate in candidates if np.isnan(self.quality[candidate]).any()}
        above = [candidate for candidate in candidates if means[candidate] >= self.floor]
        if not above:
            return max(partly, key=lambda candidate: (means[candidate], -candidate), default=None)
        answer = above[0]
        cheaper = [c for c in candidates[: candidates.index(answer)] if c in partly]
        rivals = [c for c in cheaper if means[c] + ERRORS * errors[c] >= self.floor]
        if rivals:
            return max(rivals, key=lambda candidate: (means[candidate] - self.floor) / errors[candidate])
        return answer if answer in partly else None
