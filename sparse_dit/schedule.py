"""Schedules: which steps and layers stay dense."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """What stays dense.

    Args:
        dense_steps: the first n denoising steps are dense.
        dense_above: dense while the noise level (1 = pure noise, 0 = clean) is above this; 1.0 switches the rule off.
        dense_layers: indices of self-attention layers, in execution order, that are dense in every step.

    Raises:
        ValueError: a value is out of its range.
    """

    dense_steps: int = 0
    dense_above: float = 1.0
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.dense_steps < 0:
            raise ValueError(f"schedule.dense_steps: {self.dense_steps!r}; valid: 0 or more steps")
        if not 0.0 <= self.dense_above <= 1.0:
            raise ValueError(f"schedule.dense_above: {self.dense_above!r}; valid: a noise level in [0, 1]")
        if any(layer < 0 for layer in self.dense_layers):
            raise ValueError(f"schedule.dense_layers: {list(self.dense_layers)!r}; valid: layer indices from 0")

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
