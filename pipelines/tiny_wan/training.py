"""What both training scripts share: a run with a time budget that can be stopped and resumed."""

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn


def learning_rate(peak: float, progress: float, warm_up: float = 0.03) -> float:
    """Linear warm-up, then a cosine to a hundredth of the peak; `progress` is the share of the budget used."""
    if progress < warm_up:
        return peak * progress / warm_up
    fraction = (min(progress, 1.0) - warm_up) / (1 - warm_up)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * fraction)))


class AveragedWeights:
    """Exponential moving average of a module's parameters, in fp32."""

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.average = [parameter.detach().clone().float() for parameter in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Blend the present weights in; early steps forget faster, so that the start does not linger."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.average, [p.detach().float() for p in self.parameters], 1 - decay)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Replace the model's weights by their average."""
        for parameter, average in zip(self.parameters, self.average, strict=True):
            parameter.copy_(average)


@dataclass
class Run:
    """One training run: spends `seconds`, writes a checkpoint now and then, goes on where the last one stopped.

    Attributes:
        folder: where `checkpoint.pt` and `log.jsonl` go.
        seconds: the whole run's training time; the learning rate follows the share of it that is used up.
        checkpoint_every: seconds between checkpoints.
    """

    folder: Path
    seconds: float
    model: nn.Module
    optimizer: torch.optim.Optimizer
    averaged: AveragedWeights
    peak_rate: float
    checkpoint_every: float = 120.0
    step: int = 0
    used: float = 0.0
    _since: float = field(default=0.0, init=False)

    @property
    def checkpoint(self) -> Path:
        """The file that `resume` reads."""
        return self.folder / "checkpoint.pt"

    @property
    def progress(self) -> float:
        """Share of the run's time that is used up, from 0 to 1."""
        return min(1.0, self.used / self.seconds)

    def resume(self) -> None:
        """Load the checkpoint, if there is one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.checkpoint.exists():
            saved = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            for average, stored in zip(self.averaged.average, saved["average"], strict=True):
                average.copy_(stored)
            self.step, self.used = saved["step"], saved["used"]

    def save(self) -> None:
        """Write the checkpoint in one piece."""
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "average": self.averaged.average,
                "step": self.step,
                "used": self.used,
            },
            partial,
        )
        partial.replace(self.checkpoint)

    def train(self, loss_of: Callable[[int, float], dict[str, Tensor]], log_every: int = 100) -> None:
        """Take steps until the time is used up.

        Args:
            loss_of: (step, progress) → named scalars; the one called "loss" is minimised.
            log_every: steps between lines of the log (and of standard output).
        """
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        last, saved_at = time.perf_counter(), self.used
        while self.used < self.seconds:
            rate = learning_rate(self.peak_rate, self.progress)
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group.get("rate_factor", 1.0)
            losses = loss_of(self.step, self.progress)
            losses["loss"].backward()
            norm = nn.utils.clip_grad_norm_(parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            self.averaged.update(self.step)
            if self.step % log_every == 0:
                row = {name: round(value.item(), 5) for name, value in losses.items()}
                row |= {"step": self.step, "seconds": round(self.used, 1), "norm": round(norm.item(), 3), "rate": rate}
                print(json.dumps(row), flush=True)
                with (self.folder / "log.jsonl").open("a") as log:
                    log.write(json.dumps(row) + "\n")
            now = time.perf_counter()
            self.used, last = self.used + now - last, now
            if self.used - saved_at > self.checkpoint_every:
                self.save()
                saved_at = self.used
        self.save()
