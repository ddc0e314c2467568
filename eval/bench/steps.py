"""A model on a device, and what one denoising step of it takes."""

import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from diffusers import attention_backend
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparse_dit.eval.bench.architectures import Architecture, build, few, first_layers, layout_of
from sparse_dit.eval.bench.clock import garbage_waits
from sparse_dit.eval.bench.yardsticks import dense_kernel
from sparse_dit.forecast import forecast
from sparse_dit.pipelines.families import family_of
from sparse_dit.pipelines.patch import Summary, disable, enable, summary
from sparse_dit.recipe import Recipe

HOST_CALLS = 6  # attention calls of the forwards whose host time counts: few, so that launches never wait in the queue
HOST_ROUNDS = 5  # of the model's own calls and ours in turn
HOST_RUNS = 3  # forwards of each in a round that count, and as many before them, in which ours finds out what to launch
TIMED_MS = 1500.0  # spent in timed steps of a variant, two of them at least
MOST_RUNS = 10


@dataclass
class Times:
    """Milliseconds of forwards, until the device was done."""

    device: list[float] = field(default_factory=list)

    @property
    def ms(self) -> float:
        """The median."""
        return statistics.median(self.device)


class Host(NamedTuple):
    """Microseconds that the host spends in an attention module of the model: medians over calls.

    Attributes:
        own: with the model's own attention, projections included, as in `ours`.
        ours: with a recipe's.
        calls: of each, so many.
    """

    own: float
    ours: float
    calls: int

    @property
    def beyond(self) -> float:
        """What ours takes beyond the model's own."""
        return self.ours - self.own


@dataclass
class Measured:
    """A variant of a case.

    Attributes:
        times: of whole steps.
        attention_ms: time in the self-attention calls of a step; `None` where it was not taken.
        host: time of the host in a call; `None` where it was not taken.
        peak: bytes allocated at most, the model included; `None` on a CPU.
        out: what the forward returns.
        told: what the summary says of the whole steps; `None` for the model's own attention.
    """

    times: Times
    attention_ms: float | None
    host: Host | None
    peak: int | None
    out: Tensor
    told: Summary | None


class Subject:
    """A model on a device with the arguments of a forward.

    Args:
        case: what to build.
        device: where.
        dtype: of weights and arguments.
        compiled: whether its layers run under `torch.compile`.
        seed: of both.
    """

    def __init__(self, case: Architecture, device: torch.device, dtype: torch.dtype, compiled: bool, seed: int) -> None:
        self.case, self.device, self.dtype, self.compiled = case, device, dtype, compiled
        self.model = build(case, device, dtype, seed)
        self.arguments = case.inputs(device, dtype, seed)
        self.brief = case.with_few_tokens().inputs(device, dtype, seed)
        self.layout = layout_of(self.model, self.arguments)
        self.layers = tuple(len(getattr(self.model, name)) for name in case.blocks)
        self.timed = case.timed or self.layers
        self.short = few(self.timed, HOST_CALLS)
        if compiled:
            for name in case.blocks:
                for block in getattr(self.model, name):
                    block.compile(fullgraph=True)

    def _dense_kernel(self) -> AbstractContextManager[Any]:
        """Inside, the model's own attention is cuDNN's and nothing else, where there is cuDNN."""
        if dense_kernel(self.device) != "cudnn":
            return nullcontext()
        attentions = family_of(self.model).attentions(self.model).values()
        if all(hasattr(attention.processor, "_attention_backend") for attention in attentions):
            return cast(AbstractContextManager[Any], attention_backend("_native_cudnn"))
        return sdpa_kernel([SDPBackend.CUDNN_ATTENTION])  # the processors know no backends of diffusers

    def layers_run(self, counts: tuple[int, ...]) -> AbstractContextManager[None]:
        """See `first_layers`."""
        return first_layers(self.model, self.case.blocks, counts)

    def forward(self, times: Times | None = None, *, brief: bool = False) -> Tensor:
        """One forward from an idle device, of few tokens if `brief`; returns what it predicts."""
        on_gpu = self.device.type == "cuda"
        self._wait()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if on_gpu else []
        with self._dense_kernel(), torch.no_grad():
            begin = time.perf_counter()
            if on_gpu:
                events[0].record()
            (out,) = self.model(**(self.brief if brief else self.arguments), return_dict=False)
            if on_gpu:
                events[1].record()
            host_ms = (time.perf_counter() - begin) * 1e3
        self._wait()
        if times is not None:
            times.device.append(events[0].elapsed_time(events[1]) if on_gpu else host_ms)
        assert isinstance(out, Tensor)
        return out

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def measure(self, recipe: Recipe | None) -> Measured:
        """Times the model's own attention (`None`) or a recipe.

        Raises:
            RuntimeError: a call was not what the recipe says, or the output is not finite.
        """
        if self.compiled:
            torch._dynamo.reset()
        try:
            with self.layers_run(self.timed):
                times, out, peak, told = self._steps(recipe)
                attention_ms = None if self.compiled else self._attention(recipe)
            host = None if self.compiled or recipe is None else self._host(recipe)
        finally:
            disable(self.model)
        if not bool(out.isfinite().all()):
            raise RuntimeError("the output is not finite")
        return Measured(times, attention_ms, host, peak, out, told)

    def _steps(self, recipe: Recipe | None) -> tuple[Times, Tensor, int | None, Summary | None]:
        """Whole steps after a first one that compiles: times, output, the bytes allocated at most, and the summary."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        if recipe is not None:
            enable(self.model, recipe, strict=True)
        out = self.forward()
        times = Times()
        while len(times.device) < 2 or (sum(times.device) < TIMED_MS and len(times.device) < MOST_RUNS):
            self.forward(times)
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
        told = None if recipe is None else summary(self.model)
        if recipe is not None and told is not None:
            self.check(recipe, told, forwards=1 + len(times.device))
        return times, out, peak, told

    def _attention(self, recipe: Recipe | None) -> float:
        """Milliseconds in the self-attention calls of a step, from events around each."""
        enable(self.model, "dense" if recipe is None else recipe, strict=True, timing=True)
        self.forward()
        seconds = summary(self.model).attention_seconds
        disable(self.model)
        assert seconds is not None
        return seconds * 1e3

    def _host(self, recipe: Recipe) -> Host:
        """Time of the host in the attention modules, of the model's own calls and of ours in turn.

        Of few tokens: what the host does does not depend on them, and no launch waits for the device.
        """
        spent: list[float] = []
        times: tuple[list[float], list[float]] = [], []
        with self.layers_run(self.short), _timed(family_of(self.model).attentions(self.model).values(), spent):
            for _ in range(HOST_ROUNDS):
                for chosen, taken in zip((None, recipe), times, strict=True):
                    if chosen is not None:
                        enable(self.model, chosen, strict=True)
                    for run in range(2 * HOST_RUNS):
                        if run == HOST_RUNS:
                            spent.clear()
                        self.forward(brief=True)
                    disable(self.model)
                    taken += spent
        own, ours = map(statistics.median, times)
        return Host(own, ours, len(times[1]))

    def check(self, recipe: Recipe, told: Summary, forwards: int) -> None:
        """Raises RuntimeError when calls were not sparse, at another density or on another device than meant."""
        planned = forwards * sum(self.timed)
        if not told.planned == told.made == told.sparse == planned:
            raise RuntimeError(f"{told.sparse} of {planned} calls were sparse; dense: {told.dense}")
        expected = self.expected_density(recipe)
        ragged = (recipe.block_q + recipe.block_k) / self.layout.length  # to within which it is known
        if told.density is None or expected is None or abs(told.density - expected) > ragged:
            raise RuntimeError(f"the density was {told.density}; {expected} was expected")
        if self.device.type == "cuda" and not told.backend.startswith(("hopper", "triton")):
            raise RuntimeError(f"the calls ran on {told.backend!r}, not on a kernel for GPUs")

    def expected_density(self, recipe: Recipe) -> float | None:
        """The density of a call as it is known beforehand."""
        shape = (1, 1, self.layout.length, 1)
        return forecast(recipe, self.layout, layers=1, branches=1, shape=shape, dtype=self.dtype).density


@contextmanager
def _timed(modules: Iterable[torch.nn.Module], spent: list[float]) -> Iterator[None]:
    """Inside, every call of a module adds the microseconds that the host was in it; garbage waits."""
    begun: list[float] = []
    hooks = []
    for module in modules:
        hooks.append(module.register_forward_pre_hook(lambda *_: begun.append(time.perf_counter())))
        hooks.append(module.register_forward_hook(lambda *_: spent.append((time.perf_counter() - begun.pop()) * 1e6)))
    try:
        with garbage_waits():
            yield
    finally:
        for hook in hooks:
            hook.remove()
