"""What a call does: launches, operators of torch and memory, noted while it runs, so that `replays` can do it again.

Importing this loads torch alone.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from sparse_dit.kernels.launches import Known

aten = torch.ops.aten
FRESH = frozenset((
    aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default, aten.new_empty.default,
    aten.new_empty_strided.default,
))  # fmt: skip
"""Operators that hand out memory and do nothing with it."""
VIEWS = frozenset((
    aten._unsafe_view.default, aten.alias.default, aten.as_strided.default, aten.detach.default, aten.expand.default,
    aten.permute.default, aten.select.int, aten.slice.Tensor, aten.squeeze.dim, aten.t.default, aten.transpose.int,
    aten.unsqueeze.default, aten.view.default, aten.view.dtype,
))  # fmt: skip
"""Operators that only look at memory in another way."""
REPEATED = frozenset((
    aten._softmax.default, aten.aminmax.default, aten.bitwise_not.default, aten.bitwise_or.Tensor, aten.bmm.default,
    aten.clone.default, aten.fill_.Scalar, aten.full.default, aten.gt.Scalar, aten.index_copy_.default,
    aten.index_select.default, aten.masked_fill_.Scalar, aten.mul.Tensor, aten.new_zeros.default,
    aten.sum.dim_IntList, aten.zero_.default, aten.zeros.default,
))  # fmt: skip
"""Operators that a replay runs again. None waits for the GPU, or makes shapes of what tensors hold."""
NOTED = FRESH | VIEWS | REPEATED


class Place(NamedTuple):
    """Where a tensor is: so many bytes behind a start, by the number of that."""

    start: int
    offset: int


class Look(NamedTuple):
    """How a tensor looks at its memory."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor) -> Look:
        """That of x."""
        return cls(x.shape, x.stride(), x.dtype)

    def fresh(self, device: torch.device) -> Tensor:
        """Memory of its own that looks so."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)

    def at(self, x: Tensor, offset: int) -> Tensor:
        """A tensor that looks so, so many bytes behind the start of x."""
        first = x.storage_offset() * x.element_size() + offset
        seen = torch.empty(0, dtype=self.dtype, device=x.device)
        return seen.set_(x.untyped_storage(), first // self.dtype.itemsize, self.shape, self.stride)


class Launch(NamedTuple):
    """A launch. Addresses and TMA descriptors are missing from its arguments: they go to these indices."""

    known: Known
    grid: tuple[int, ...]
    args: list[Any]
    addresses: list[tuple[int, Place]]
    boxes: list[tuple[int, Any, Place]]


class Operator(NamedTuple):
    """An operator of torch. Tensors are missing from its arguments; what it returns begins at new starts."""

    run: Any
    args: list[Any]
    options: dict[str, Any]
    tensors: list[tuple[int, Place, Look]]
    made: list[int]


class Recorder(TorchDispatchMode):
    """Inside, launches, operators and fresh memory are noted.

    Args:
        inputs: what the call is given, all on one CUDA device.

    Attributes:
        refusal: what the call did besides that only Python can do again, if anything.
        steps: launches and operators, in order.
        sizes: bytes of fresh memory. Its starts count on behind those of inputs.
        looks: how it looked when it was handed out.
        kept: what is neither input nor fresh: it stays where it is. Its starts count down from -1.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inputs = inputs
        self.refusal = ""
        self.steps: list[Launch | Operator] = []
        self.sizes: list[int] = []
        self.looks: list[Look] = []
        self.kept: list[Tensor] = []
        self._fresh: dict[int, int] = {}  # starts of memory, by address: what was handed out there last

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator, and notes it, or what memory it hands out, or that it does other things."""
        options = kwargs or {}
        if func not in NOTED:
            # In inference mode operators that are made of others come here whole.
            with self:
                out = func.decompose(*args, **options)
            if out is not NotImplemented:
                return out
            self.refusal = self.refusal or str(func)
        out = func(*args, **options)
        if func in FRESH:
            self._handed_out(out)
        elif func in REPEATED:
            tensors = [(i, self.place(x), Look.of(x)) for i, x in enumerate(args) if isinstance(x, Tensor)]
            own = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
            outs = out if isinstance(out, tuple) else (out,)
            made = [self._handed_out(x) for x in outs if x.untyped_storage().data_ptr() not in own]
            rest = [None if isinstance(x, Tensor) else x for x in args]
            self.steps.append(Operator(func, rest, options, tensors, made))
        return out

    def _handed_out(self, x: Tensor) -> int:
        storage, start = x.untyped_storage(), len(self.inputs) + len(self.sizes)
        self._fresh[storage.data_ptr()] = start
        self.sizes.append(storage.nbytes())
        self.looks.append(Look.of(x))
        return start

    def note(
        self,
        known: Known | None,
        grid: tuple[int, ...],
        boxes: Sequence[Any],
        tensors: Sequence[Tensor | None],
        numbers: Sequence[Any],
    ) -> None:
        """A launch, by what is known of its kernel: `None` where it is the first."""
        if known is None or known.run is None:
            self.refusal = self.refusal or "a launch that Triton must make"
            return
        first = len(boxes)
        args = [*(None for _ in boxes), *(None if x is None else 0 for x in tensors), *numbers, *known.constants]
        found = [(i, box, self.place(box.base)) for i, box in enumerate(boxes) if box is not None]
        # Empty tensors start nowhere, at 0.
        addresses = [(first + i, self.place(x)) for i, x in enumerate(tensors) if x is not None and x.data_ptr()]
        self.steps.append(Launch(known, grid, args, addresses, found))

    def place(self, x: Tensor) -> Place:
        """Where a tensor is."""
        address, storage = x.data_ptr(), x.untyped_storage().data_ptr()
        start = self._fresh.get(storage)
        if start is not None:
            # Not by addresses: a view of no elements has none.
            return Place(start, int(x.storage_offset()) * x.element_size())
        for number, one in enumerate(self.inputs):
            if one.data_ptr() == address:
                return Place(number, 0)
        if any(one.untyped_storage().data_ptr() == storage for one in self.inputs):
            self.refusal = self.refusal or "work on a part of an input"
        self.kept.append(x)
        return Place(-len(self.kept), 0)

    def returned(self, result: Sequence[Any]) -> dict[int, tuple[int, Look | None]]:
        """Of the tensors in a result by their index the starts, and how those look that are no inputs."""
        found: dict[int, tuple[int, Look | None]] = {}
        taken = {start for step in self.steps if isinstance(step, Operator) for start in step.made}
        for i, x in enumerate(result):
            if not isinstance(x, Tensor):
                continue
            given = [number for number, one in enumerate(self.inputs) if one is x]
            start = self._fresh.get(x.untyped_storage().data_ptr())
            if given:
                found[i] = given[0], None
            elif start is None or start in taken or x.nbytes != self.sizes[start - len(self.inputs)]:
                self.refusal = self.refusal or "a result that is no memory of its own"
            else:
                taken.add(start)
                found[i] = start, Look.of(x)
        return found


class _Noting(threading.local):
    """Who notes the launches of a thread, if anybody does."""

    recorder: Recorder | None = None


noting = _Noting()
