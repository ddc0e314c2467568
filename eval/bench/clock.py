"""Times of calls, by GPU events or by the processor's clock."""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

Call = Callable[[int], object]
"""A piece of work on the input set of that number, modulo how many there are."""

_COPIED = 2**30  # bytes; far more than any L2 cache
_TURNS_MS = 1500.0  # spent in calls that are timed in turn; in 600 what they differ by moves by 2 or 3 %
_QUEUED = 16  # of them at most before the GPU is waited for
_LEAD_MS = 20.0  # of copies queued at most, so that the GPU never waits for the host


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a call: the median of so many runs."""

    ms: float
    runs: int


@contextmanager
def garbage_waits() -> Iterator[None]:
    """Inside, garbage is not collected: the one that is timed at that moment would pay for it."""
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _turns(calls: int, rounds: int) -> Iterator[tuple[int, int]]:
    """Round and number of each call, once a round, in an order drawn anew."""
    draw = random.Random(0)
    for run in range(rounds):
        for number in draw.sample(range(calls), calls):
            yield run, number


class Clock(Protocol):
    """Measures calls on one device."""

    def measure(self, call: Call) -> Timing:
        """Warms a call up and times it; what the call raises passes through."""

    def in_turn(self, calls: Sequence[Call]) -> list[float]:
        """Milliseconds of calls that differ little: medians of rounds, each call once a round, in an order drawn anew.

        A GPU's rate follows its power by several percent in a second. So what is timed one call after the other tells
        nothing of a few percent.
        """

    def copy_rate(self) -> float:
        """Bytes read and written a second, in TB/s, by a copy of memory that fits no cache."""

    def alive(self) -> bool:
        """Whether the device still takes work: an illegal access ends a CUDA context for good."""

    def input_sets(self, size: int) -> int:
        """How many sets of inputs of `size` bytes to go through in turn, so that none waits in a cache."""


def current_gpu() -> torch.device:
    """The GPU that torch is set to.

    Raises:
        ValueError: there is none.
    """
    if not torch.cuda.is_available():
        raise ValueError("device: there is no GPU; valid: a machine with an NVIDIA or AMD GPU that torch can use")
    return torch.device("cuda", torch.cuda.current_device())


class CudaClock:
    """Times by events around every run, the host far ahead of the GPU.

    Args:
        device: a CUDA (or ROCm) device.
        repeat_ms: time spent in timed runs, at least three of them.
        warmup_ms: time spent before.
    """

    def __init__(self, device: torch.device, repeat_ms: float = 40.0, warmup_ms: float = 10.0) -> None:
        self.device, self.repeat_ms, self.warmup_ms = device, repeat_ms, warmup_ms
        size = min(_COPIED, torch.cuda.mem_get_info(device)[0] // 8)
        self._source = torch.zeros(size, dtype=torch.uint8, device=device)
        self._target = torch.empty_like(self._source)
        self._copy_ms = math.inf  # until it is known there is no lead
        self._copy_ms = self.measure(self._copy).ms

    def measure(self, call: Call) -> Timing:
        """See `Clock.measure`."""
        call(0)  # compiles
        torch.cuda.synchronize(self.device)
        once = self._times(call, 1)[0]
        runs = max(1, math.ceil(self.warmup_ms / max(once, 1e-3)))
        start = time.perf_counter()
        for run in range(min(runs, 100)):
            call(run)
        host_ms = (time.perf_counter() - start) * 1e3 / min(runs, 100)
        # A first run may hold what is done once; what follows is set by the warmed ones.
        once = statistics.median(self._times(call, 3))
        runs = min(100, max(3, math.ceil(self.repeat_ms / max(once, 1e-3))))
        return Timing(statistics.median(self._times(call, runs, lead_ms=min(_LEAD_MS, runs * host_ms))), runs)

    def in_turn(self, calls: Sequence[Call]) -> list[float]:
        """See `Clock.in_turn`: 50 to 300 rounds."""
        once = sum(max(statistics.median(self._times(call, 3)), 1e-3) for call in calls)
        rounds = min(300, max(50, math.ceil(_TURNS_MS / once)))
        events: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in calls]
        for place, (run, number) in enumerate(_turns(len(calls), rounds)):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            calls[number](run)
            end.record()
            events[number].append((start, end))
            if place % _QUEUED == _QUEUED - 1:  # the queue of launches must not fill up
                torch.cuda.synchronize(self.device)
        torch.cuda.synchronize(self.device)
        return [statistics.median(start.elapsed_time(end) for start, end in of_call) for of_call in events]

    def _times(self, call: Call, runs: int, lead_ms: float = 0.0) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
        for _ in range(math.ceil(lead_ms / self._copy_ms)):
            self._copy(0)
        for run, (start, end) in enumerate(events):
            start.record()
            call(run)
            end.record()
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) for start, end in events]

    def _copy(self, _: int) -> None:
        self._target.copy_(self._source)

    def copy_rate(self) -> float:
        """See `Clock.copy_rate`."""
        return 2 * len(self._source) / self._copy_ms / 1e9

    def alive(self) -> bool:
        """See `Clock.alive`."""
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError:
            return False
        return True

    def input_sets(self, size: int) -> int:
        """See `Clock.input_sets`: twice the L2 cache in all."""
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        return 1 if size > 2 * cache else math.ceil(2 * cache / size) + 1


class HostClock:
    """Times by the processor's clock: for CPUs, where the numbers rank nothing.

    Args:
        runs: timed runs.
    """

    def __init__(self, runs: int = 3) -> None:
        self.runs = runs

    def measure(self, call: Call) -> Timing:
        """See `Clock.measure`."""
        times = []
        for run in range(self.runs + 1):
            start = time.perf_counter()
            call(run)
            times.append((time.perf_counter() - start) * 1e3)
        return Timing(statistics.median(times[1:]), self.runs)

    def in_turn(self, calls: Sequence[Call]) -> list[float]:
        """See `Clock.in_turn`: as many rounds as runs."""
        times = [list[float]() for _ in calls]
        for run, number in _turns(len(calls), self.runs):
            start = time.perf_counter()
            calls[number](run)
            times[number].append((time.perf_counter() - start) * 1e3)
        return [statistics.median(of_call) for of_call in times]

    def copy_rate(self) -> float:
        """See `Clock.copy_rate`."""
        source = torch.zeros(2**24, dtype=torch.uint8)
        target = torch.empty_like(source)
        return 2 * len(source) / self.measure(lambda _: target.copy_(source)).ms / 1e9

    def alive(self) -> bool:
        """See `Clock.alive`."""
        return True

    def input_sets(self, size: int) -> int:
        """See `Clock.input_sets`: one."""
        return 1
