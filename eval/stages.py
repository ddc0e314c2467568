"""Where the time of a pipeline call goes: attention, the rest of the transformer, text encoders, VAE, all else."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch

from sparse_dit.pipelines.transformers import transformers_of

STAGES = ("attention", "rest of the transformer", "text encoder", "vae", "other")
"""In this order in tables; they add up to the whole time of a call."""


class Stopwatch:
    """Seconds by part of a pipeline; GPU work by events, without waiting for the device on the way.

    Args:
        device: where the pipeline runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.Event, torch.Event]] = []

    @contextmanager
    def on(self, part: str) -> Iterator[None]:
        """Adds the time of what runs inside to a part."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            yield
            self._seconds[part] += time.perf_counter() - start
            return
        begin, end = (torch.Event(self.device, enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._events.append((part, begin, end))

    def seconds(self) -> dict[str, float]:
        """What was measured so far, by part; waits for the GPU."""
        for part, begin, end in self._events:
            end.synchronize()
            self._seconds[part] += begin.elapsed_time(end) / 1e3
        self._events.clear()
        return dict(self._seconds)


@contextmanager
def stages(pipe: Any) -> Iterator[Stopwatch]:
    """Times what a pipeline's parts do inside the block, as `transformer`, `text encoder` and `vae`.

    Args:
        pipe: a diffusers pipeline. Its parts get a timed method of their own each, and lose it again.
    """
    watch = Stopwatch(pipe.device)
    with ExitStack() as stack:
        for transformer in transformers_of(pipe).values():
            stack.enter_context(_timed(watch, "transformer", transformer, "forward"))
        for name, part in pipe.components.items():
            if name.startswith("text_encoder") and part is not None:
                stack.enter_context(_timed(watch, "text encoder", part, "forward"))
            if name == "vae" and part is not None:
                for method in ("encode", "decode"):
                    stack.enter_context(_timed(watch, "vae", part, method))
        yield watch


def split(seconds: float, attention: float, parts: dict[str, float]) -> dict[str, float]:
    """Seconds of each of `STAGES`.

    Args:
        seconds: of the whole call.
        attention: of all self-attention calls.
        parts: as `Stopwatch.seconds`.
    """
    transformer, text, vae = (parts.get(name, 0.0) for name in ("transformer", "text encoder", "vae"))
    rest = seconds - transformer - text - vae
    return dict(zip(STAGES, (attention, transformer - attention, text, vae, rest), strict=True))


@contextmanager
def _timed(watch: Stopwatch, part: str, module: Any, method: str) -> Iterator[None]:
    """A method that is timed, on the instance alone."""
    inner = getattr(module, method)
    own = vars(module).get(method)

    @wraps(inner)
    def call(*args: Any, **kwargs: Any) -> Any:
        with watch.on(part):
            return inner(*args, **kwargs)

    setattr(module, method, call)
    try:
        yield
    finally:
        if own is None:
            delattr(module, method)
        else:
            setattr(module, method, own)
