"""What lives from one attention call to the next: where the run is, what layers keep, and what was counted."""

import time
from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from sparse_dit.layout import TokenLayout

ALIKE = 8  # forwards of one noise level in a first step: more than the passes of guidance of any pipeline known

_SHARED = "enable_parallelism: its calls stay dense, as"
# Reasons for dense calls that nobody asked for, and what the user could change.
UNASKED = {
    "unknown_grid": (
        "hidden_states: a self-attention call has other tokens than its forward's grid and text, and stays dense; "
        "valid: sizes as the model's own pipeline passes them, see the remarks of `sparse-dit families`"
    ),
    "shared_text": (
        f"{_SHARED} it is not known how processes share this model's text; "
        "valid: a model whose row in sparse_dit.pipelines.families says what is `shared`"
    ),
    "unknown_shares": (
        f"{_SHARED} this process has another part of the tokens than an equal one; valid: the model's own plan"
    ),
    "uneven_heads": f"{_SHARED} the heads do not go evenly into the processes; valid: a degree that divides them",
}


@dataclass(frozen=True)
class Context:
    """What the pipeline tells about a forward.

    Attributes:
        branch: CFG branch, such as `cond`, `uncond` or `cond_uncond`.
        step: denoising step from 0; `None` when the pipeline does not tell.
    """

    branch: str = ""
    step: int | None = None


class Slot(dict[str, torch.Tensor]):
    """What one layer keeps between the steps of one branch: tensors by name.

    Attributes:
        refreshed: step at which its selection was last computed anew; `None` before the first time.
        signature: what the tensors were made for, such as layout and batch size.
        density: of what was computed anew last, where the content decides it; as `Attended.density`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.refreshed: int | None = None
        self.signature: Hashable = None
        self.density: float | torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(kept.nbytes for kept in self.values())


class RunState:
    """Where a run is: step, noise level, branch and token layout, and what layers keep between steps.

    One state serves all transformers of a pipeline, as they share the denoising steps.

    Attributes:
        context: set by the pipeline before a forward.
        step: denoising step from 0.
        noise: noise level in [0, 1], 1 is pure noise; `None` until it had to be read.
        branch: CFG branch of the forward that runs: the context's, or, where the pipeline tells none, how many forwards
            the step had before, as passes of classifier-free guidance come in the same order in every step.
        layout: tokens of the forward that runs; `None` before the first one.
    """

    def __init__(self) -> None:
        self.context = Context()
        self._slots: dict[tuple[int, str], Slot] = {}
        self.reset()

    def reset(self) -> None:
        """Forget everything: a new run begins."""
        self.step = 0
        self.noise: float | None = None
        self.branch = ""
        self.layout: TokenLayout | None = None
        self._rises: bool | None = None
        self._transformer: int | None = None
        self._forwards = 0
        self._branches: set[str] = set()
        self._slots.clear()

    def begin_forward(self, layout: TokenLayout, noise: float | None, transformer: int = 0) -> None:
        """Take in the arguments of a forward of a transformer.

        The step is the pipeline's own when its context has one, else the number of changes of the noise level so far:
        forwards are not counted, because CFG and caches add and remove them. The first change tells the direction. A
        step back, a jump against the direction or another grid begins a new run. Runs of one step without a context
        are told from each other by nothing: what their layers kept is dropped every `ALIKE` forwards.

        Args:
            layout: tokens of the forward.
            noise: noise level in [0, 1]; needed when the context has no step.
            transformer: a number of its own for each transformer of the pipeline. What the layers of the one before
                kept is dropped: pipelines with two go from the first to the second, and not back.

        Raises:
            ValueError: neither the context has a step nor is there a noise level.
        """
        told = self.context.step
        if told is None and noise is None:
            raise ValueError("noise: None; valid: a noise level, when the pipeline tells no step")
        if self.layout is not None and (layout.grid != self.layout.grid or self._goes_back(told, noise)):
            self.reset()
        if self._transformer not in (None, transformer):
            self._slots.clear()
        before = self.step
        if told is not None:
            self.step = told
        elif self.noise is not None and noise is not None and noise != self.noise:
            self._rises = noise > self.noise
            self.step += 1
        self._forwards = self._forwards + 1 if self.step == before else 1
        self.layout, self.noise, self._transformer = layout, noise, transformer
        self.branch = self.context.branch or f"forward {self._forwards}"
        if told is None and self._rises is None and self._forwards % ALIKE == 1:
            self._slots.clear()
            self._branches.clear()
        self._branches.add(self.branch)

    def _goes_back(self, told: int | None, noise: float | None) -> bool:
        if told is not None:
            return told < self.step
        if noise is None or self.noise is None or self._rises is None or noise == self.noise:
            return False
        return (noise > self.noise) != self._rises

    def slot(self, layer: int, signature: Hashable = None) -> Slot:
        """What a layer keeps between the steps of the branch that runs; emptied by `reset`.

        Args:
            layer: index of the self-attention layer.
            signature: what the kept tensors depend on; when it is another than before, the slot is empty again.
        """
        key = (layer, self.branch)
        slot = self._slots.get(key)
        if slot is None or slot.signature != signature:
            slot = self._slots[key] = Slot()
            slot.signature = signature
        return slot

    @property
    def branches(self) -> int:
        """Branches that the run has, as far as it can be known: those seen, and one of two is told by its name."""
        return max(len(self._branches), 2 if self.branch in ("cond", "uncond") else 1)

    @property
    def nbytes(self) -> int:
        """Bytes of everything that layers keep."""
        return sum(slot.nbytes for slot in self._slots.values())


@dataclass(frozen=True)
class Summary:
    """What happened since sparse attention was enabled, in completed forwards.

    Attributes:
        planned: self-attention calls that the model's layers should have made.
        made: self-attention calls that were made.
        sparse: calls that ran sparse.
        dense: calls that computed everything, by reason: on the model's own dense backend, or, for the reason
            `refresh`, with this package's kernel because a search or a cache needed the whole attention.
        density: mean density of the sparse calls; `None` when there were none.
        run_density: mean density of all calls, dense ones counted as 1; `None` when there were none.
        attention_seconds: time in all self-attention calls; `None` when timing was off.
        backend: this package's backends that calls ran on, joined by `+`; `dense` when there were none.
    """

    planned: int
    made: int
    sparse: int
    dense: dict[str, int]
    density: float | None
    run_density: float | None
    attention_seconds: float | None
    backend: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass
class _Counts:
    planned: int = 0
    dense: Counter[str] = field(default_factory=Counter)
    sparse: int = 0
    density: float = 0.0  # sum over the sparse calls whose density is known beforehand
    measured: dict[torch.device, list[torch.Tensor]] = field(default_factory=dict)  # of the others, where they ran

    def add(self, density: float | torch.Tensor) -> None:
        """Add the density of a sparse call; a tensor is not read, and not even summed up yet."""
        if isinstance(density, torch.Tensor):
            self.measured.setdefault(density.device, []).append(density)
        else:
            self.density += density

    def merge(self, other: "_Counts") -> None:
        """Add all that another one counted; measured densities become one sum a device."""
        self.planned += other.planned
        self.sparse += other.sparse
        self.density += other.density
        for device, densities in other.measured.items():
            self.measured[device] = [torch.stack([*self.measured.get(device, ()), *densities]).sum()]
        self.dense.update(other.dense)

    @property
    def made(self) -> int:
        return self.sparse + self.dense.total()


class Tally:
    """Counts calls, and times them if asked. Only completed forwards count.

    Args:
        timing: whether to time every call; CUDA calls are timed by events, without synchronising.
    """

    def __init__(self, timing: bool) -> None:
        self.timing = timing
        self._total = _Counts()
        self._forward = _Counts()
        self._backends: set[str] = set()
        self._seconds = 0.0
        self._events: list[tuple[torch.Event, torch.Event]] = []

    def begin_forward(self, planned: int) -> None:
        """Start counting a forward of `planned` self-attention layers; what an unfinished one counted is dropped."""
        self._forward = _Counts(planned=planned)

    def end_forward(self) -> tuple[int, int]:
        """Add the forward to the total.

        Returns:
            The calls planned and the calls made in it.
        """
        done = self._forward
        self._total.merge(done)
        self._forward = _Counts()
        return done.planned, done.made

    @property
    def planned(self) -> int:
        """Self-attention layers of the forward that runs."""
        return self._forward.planned

    def count_dense(self, reason: str, backend: str | None = None) -> None:
        """Count a call that computed everything; by one of this package's backends, unless by the model's own."""
        self._forward.dense[reason] += 1
        if backend is not None:
            self._backends.add(backend)

    def count_sparse(self, density: float | torch.Tensor, backend: str) -> None:
        """Count a call that ran sparse; a density in a tensor (scalar, float64) is read by `summary` only."""
        self._forward.sparse += 1
        self._forward.add(density)
        self._backends.add(backend)

    def timed(self, device: torch.device) -> AbstractContextManager[None]:
        """Time what runs inside, if timing is on."""
        return self._timed(device) if self.timing else nullcontext()

    @contextmanager
    def _timed(self, device: torch.device) -> Iterator[None]:
        if device.type == "cuda":
            begin, end = torch.Event(device, enable_timing=True), torch.Event(device, enable_timing=True)
            stream = torch.cuda.current_stream(device)
            begin.record(stream)
            yield
            end.record(stream)
            self._events.append((begin, end))
        else:
            begin_seconds = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - begin_seconds

    def summary(self) -> Summary:
        """The counts so far; waits for the GPU when it has timed calls, or measured densities, there."""
        for begin, end in self._events:
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1000
        self._events.clear()
        total = self._total
        density = total.density + sum(float(measured) for (measured,) in total.measured.values())
        return Summary(
            planned=total.planned,
            made=total.made,
            sparse=total.sparse,
            dense=dict(total.dense),
            density=density / total.sparse if total.sparse else None,
            run_density=(density + total.dense.total()) / total.made if total.made else None,
            attention_seconds=self._seconds if self.timing else None,
            backend="+".join(sorted(self._backends)) or "dense",
        )
