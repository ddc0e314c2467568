"""The cheapest candidate above a floor of quality, found with few runs.

After each run it is drawn, many times, what all means may be (`belief`). In a draw the answer is the cheapest candidate
above the floor. The next run goes to the candidate on which draws differ most among those in which no cheaper one is
the answer: cheap ones that may be good enough, and those that decide whether they are. When draws agree, also with
deviations made wider for what the belief does not know of itself, the answer runs on the prompts that it lacks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sparse_dit.eval.belief import Belief, Floats

DRAWS = 512
WIDER = 1.5  # deviations, before the search ends
_AGREED = 0.5 / DRAWS  # fewer than one draw
_EQUAL = 100.0  # dB that stand for those of a clip that equals its dense one


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


class Search:
    """A search, led by what it is told; the same answers lead it the same way, so it can be replayed from rows.

    Args:
        costs: of each candidate; finite.
        floor: the least mean quality over prompts.
        prompts: how many there are.
        alike: [candidates, candidates], how alike candidates are, see `belief.likeness`; None: not at all.
        spread: standard deviation of quality among candidates that is expected before anything ran.

    Attributes:
        quality: [candidates, prompts] as told, infinite ones as finite ones above the floor; NaN where nothing was.
        failed: numbers of candidates that could not run.

    Raises:
        ValueError: no candidate or no prompt.
    """

    def __init__(
        self, costs: Sequence[float], floor: float, prompts: int, alike: Floats | None = None, spread: float = 5.0
    ) -> None:
        if not costs or prompts < 1:
            raise ValueError(f"search: {len(costs)} candidates, {prompts} prompts; valid: at least one of each")
        self.floor = floor
        self.quality = np.full((len(costs), prompts), np.nan)
        self.failed: set[int] = set()
        self._order = np.argsort(np.asarray(costs, dtype=np.float64), kind="stable")
        self._belief = Belief(np.eye(len(costs)) if alike is None else alike, prompts, spread)
        self._noise = np.random.default_rng(0).standard_normal((len(costs), DRAWS))

    def tell(self, candidate: int, prompt: int, quality: float | None) -> None:
        """What a run gave; None where it failed, which puts the candidate out."""
        if quality is None:
            self.failed.add(candidate)
        else:
            known = max(_EQUAL, self.floor + 1) if math.isinf(quality) else quality
            self.quality[candidate, prompt] = known
            self._belief.tell(candidate, prompt, known)

    def runs(self) -> Iterator[tuple[int, int]]:
        """The runs to make, as (candidate, prompt). Each must be told of before the next is asked for."""
        while (candidate := self._doubtful()) is not None:
            gains = self._belief.gains(candidate)
            gains[~np.isnan(self.quality[candidate])] = -1.0
            yield candidate, int(np.argmax(gains))

    def answer(self) -> Answer | None:
        """The answer as far as it is known; None where nothing is held to be above the floor."""
        means, _ = self.means()
        runs = (~np.isnan(self.quality)).sum(axis=1)
        for candidate in self._open():
            if runs[candidate] and means[candidate] >= self.floor:
                return Answer(int(candidate), int(runs[candidate]), self._doubtful() is None)
        return None

    def means(self) -> tuple[Floats, Floats]:
        """Mean quality of each candidate over all prompts, as believed, and its standard error, 0 where all ran."""
        means, errors = self._belief.mean, np.sqrt(np.maximum(np.diag(self._belief.covariance), 0.0))
        whole = self._whole()
        means[whole] = self.quality[whole].mean(axis=1)
        return means, np.where(whole, 0.0, errors)

    def _whole(self) -> npt.NDArray[np.bool_]:
        """Which candidates ran on all prompts."""
        found: npt.NDArray[np.bool_] = ~np.isnan(self.quality).any(axis=1)
        return found

    def _open(self) -> npt.NDArray[np.int64]:
        """Candidates that can run, the cheapest first."""
        return np.array([number for number in self._order if number not in self.failed], dtype=np.int64)

    def _doubtful(self) -> int | None:
        """The candidate to run next; None where the answer stands."""
        candidates, ran = self._open(), ~np.isnan(self.quality).all(axis=1)
        # The middle and both ends first: a belief from one run knows too little of its scale.
        for place in (len(candidates) // 2, len(candidates) - 1, 0) if len(candidates) else ():
            if not ran[candidates[place]]:
                return int(candidates[place])
        for wider in (1.0, WIDER):
            if (candidate := self._disputed(wider)) is not None:
                return candidate
        means, _ = self.means()
        above = candidates[means[candidates] >= self.floor]
        # That nothing is above the floor is told when the best one ran on all prompts.
        leader = above[0] if len(above) else max(candidates, key=lambda number: means[number], default=None)
        return None if leader is None or self._whole()[leader] else int(leader)

    def _disputed(self, wider: float) -> int | None:
        """The candidate on which draws differ most, of those that did not run on all prompts; None where they agree."""
        candidates, whole = self._open(), self._whole()
        above = self._draws(wider)[candidates] >= self.floor
        earlier = np.cumsum(above, axis=0) - above > 0  # a cheaper one is above
        yes, no = (above & ~earlier).mean(axis=1), (~above & ~earlier).mean(axis=1)
        dispute = yes * no / np.maximum(yes + no, _AGREED)
        dispute[whole[candidates]] = 0.0
        best = int(np.argmax(dispute)) if len(candidates) else 0
        return int(candidates[best]) if len(candidates) and dispute[best] >= _AGREED else None

    def _draws(self, wider: float) -> Floats:
        """What all means may be, [candidates, draws], the same noise in each call."""
        means, _ = self.means()
        found = np.repeat(means[:, None], DRAWS, axis=1)
        free = np.flatnonzero(~self._whole())
        covariance = self._belief.covariance[np.ix_(free, free)] * wider**2
        found[free] += np.linalg.cholesky(covariance) @ self._noise[free]
        return found
