"""Schedules: which steps and layers stay dense, and when what depends on the content is computed anew."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Schedule:
    """What stays dense, and what is refreshed when.

    A refresh computes a dynamic selection anew, and what `skipped: reuse` adds to the sparse output. The first sparse
    call of a layer is always one. Between refreshes a layer keeps both. Steps are counted from the last refresh, so a
    cache that skips steps puts a refresh off, but never loses one.

    Args:
        dense_steps: the first n denoising steps are dense.
        dense_above: dense while the noise level (1 = pure noise, 0 = clean) is above this; 1.0 switches the rule off.
        dense_layers: indices of self-attention layers, in execution order, that are dense in every step.
        refresh_every: refresh when the last one is so many steps ago; 1 is every step.
        refresh_growth: make each gap between refreshes so many steps longer than the one before, counted from step 0:
            with `refresh_every` 2 and growth 1 the refreshes are at steps 0, 2, 5, 9, 14. What a layer keeps ages
            fastest in the first steps, where the picture takes shape.
        refresh_steps: refresh in these steps instead.

    Raises:
        ValueError: a value is out of its range.
    """

    EXCLUSIVE: ClassVar[tuple[str, str]] = ("refresh_every", "refresh_steps")
    UNSAID: ClassVar[tuple[str, ...]] = ("refresh_growth",)

    dense_steps: int = 0
    dense_above: float = 1.0
    dense_layers: tuple[int, ...] = ()
    refresh_every: int | None = None
    refresh_steps: tuple[int, ...] | None = None
    refresh_growth: int = 0

    def __post_init__(self) -> None:
        if self.dense_steps < 0:
            raise ValueError(f"schedule.dense_steps: {self.dense_steps!r}; valid: 0 or more steps")
        if not 0.0 <= self.dense_above <= 1.0:
            raise ValueError(f"schedule.dense_above: {self.dense_above!r}; valid: a noise level in [0, 1]")
        if any(layer < 0 for layer in self.dense_layers):
            raise ValueError(f"schedule.dense_layers: {list(self.dense_layers)!r}; valid: layer indices from 0")
        if self.refresh_every is not None and self.refresh_every < 1:
            raise ValueError(f"schedule.refresh_every: {self.refresh_every!r}; valid: 1 or more steps")
        if self.refresh_growth < 0:
            raise ValueError(f"schedule.refresh_growth: {self.refresh_growth!r}; valid: 0 or more steps")
        if self.refresh_growth and self.refresh_every is None:
            raise ValueError(f"schedule.refresh_growth: {self.refresh_growth!r} without refresh_every; valid: with it")
        if self.refresh_steps is not None and any(step < 0 for step in self.refresh_steps):
            raise ValueError(f"schedule.refresh_steps: {list(self.refresh_steps)!r}; valid: steps from 0")

    @property
    def keeps(self) -> bool:
        """Whether there are steps between refreshes, so that layers keep what a refresh made."""
        return self.refresh_steps is not None or (self.refresh_every or 1) > 1 or self.refresh_growth > 0

    def refreshes(self, step: int, last: int | None) -> bool:
        """Whether a layer's call is a refresh.

        Args:
            step: denoising step from 0.
            last: step of the layer's last refresh; `None` before the first one.
        """
        # A second call in the same step belongs to a new run of a single step, or to a correction of the step.
        if last is None or last == step:
            return True
        if self.refresh_steps is not None:
            return any(last < listed <= step for listed in self.refresh_steps)
        if self.refresh_growth:
            return self._planned(last) < self._planned(step)
        return step - last >= (self.refresh_every or 1)

    def _planned(self, step: int) -> int:
        """How many refreshes `refresh_growth` plans up to a step, the one at step 0 left out."""
        count, at, gap = 0, 0, self.refresh_every or 1
        while (at := at + gap) <= step:
            count, gap = count + 1, gap + self.refresh_growth
        return count

    @property
    def reads_noise(self) -> bool:
        """Whether the noise level must be known at all."""
        return self.dense_above < 1.0

    def dense_reason(self, step: int, noise: float | None, layer: int) -> str | None:
        """Why a call is dense, or `None` when it may be sparse.

        Args:
            step: denoising step from 0.
            noise: noise level in [0, 1]; needed only when `reads_noise`.
            layer: index of the self-attention layer.
        """
        if step < self.dense_steps:
            return "dense_steps"
        if noise is not None and noise > self.dense_above:
            return "dense_above"
        if layer in self.dense_layers:
            return "dense_layers"
        return None
