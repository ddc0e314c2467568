"""Calls that come again: launched from a list, by addresses, without the Python that made the list.

A model makes the same call in every layer and step. Which kernels that launches, on what grids, with which numbers and
on how much memory of its own, follows from how its tensors look and from its settings, never from what they hold,
because nothing here reads a GPU back. So the work of one call is noted while it runs, and later calls alike allocate,
launch, and run the few operators of torch in between. Where a call does anything else it is left to Python as before.

Importing this loads torch alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor

from sparse_dit.kernels.recorder import Launch, Look, Operator, Place, Recorder, noting
from sparse_dit.kernels.tiles import in_trial

LIMIT = 1024
"""Calls that are remembered; then all are forgotten, for a program whose sizes differ in every call."""
TRIES = 3  # to note a call in which Triton still compiles something
KEPT = 2**28
"""Bytes of tensors that lists of launches keep, such as block lists and orders, beyond which the next call that was
never seen before makes all be forgotten, too: a program whose texts differ in length has others for each."""
SMALL = 2**20  # bytes of memory below which it is a part of one allocation
ALIGN = 512  # bytes, as torch's own allocations

T = TypeVar("T", bound=tuple[Any, ...])


class _Address:
    """Stands for the tensor in a TMA descriptor, of which a launch wants to know only where it starts."""

    __slots__ = ("address",)

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        """Where it starts."""
        return self.address


class Recording(Generic[T]):
    """The work of a call, to be done for others alike.

    Starts are numbered anew, as a replay lists them: inputs, what is returned, one allocation of all small memory,
    other memory, what operators make.

    Args:
        recorder: what it noted.
        result: what the call returned: tensors that are inputs or memory of their own, and what is the same for all.

    Attributes:
        refusal: what only Python can do again, if anything; the recording is of no use then.
        kept_bytes: of memory that stays for it, by address.
    """

    def __init__(self, recorder: Recorder, result: T) -> None:
        returned = recorder.returned(result)
        self.refusal = recorder.refusal
        # Tensors come in their places with each replay; those of the recorded call are let go.
        self._result = [None if i in returned else each for i, each in enumerate(result)]
        self._as_result: Callable[[list[Any]], T] = getattr(type(result), "_make", type(result))
        self._kept = recorder.kept
        self.kept_bytes = {store.data_ptr(): store.nbytes() for store in (x.untyped_storage() for x in self._kept)}
        self._device = recorder.inputs[0].device
        self._given = [(i, start) for i, (start, look) in returned.items() if look is None]
        self._made = [(i, look) for i, (_, look) in returned.items() if look is not None]
        self._scratch, self._large = 0, list[Look]()
        index = self._numbered(recorder, [start for start, look in returned.values() if look is not None])
        looks = dict(enumerate([*map(Look.of, recorder.inputs), *recorder.looks]))
        looks |= {start: look for start, look in returned.values() if look is not None}
        self._steps = [self._settled(step, index, looks) for step in recorder.steps]

    def _numbered(self, recorder: Recorder, made: list[int]) -> dict[int, Place]:
        """Where a replay has the starts of a recorder, without those that stay."""
        inputs = len(recorder.inputs)
        index = {start: Place(start, 0) for start in range(inputs)}
        index |= {start: Place(inputs + n, 0) for n, start in enumerate(made)}
        later = [start for step in recorder.steps if isinstance(step, Operator) for start in step.made]
        launched, operated = set[int](), set[int]()
        for step in recorder.steps:
            if isinstance(step, Operator):
                operated |= {place.start for _, place, _ in step.tensors}
            else:
                launched |= {place.start for _, place in step.addresses} | {place.start for *_, place in step.boxes}
        scratch = inputs + len(made)
        for start in sorted((launched | operated) - index.keys() - set(later)):
            size = recorder.sizes[start - inputs] if start >= 0 else 0
            if start >= 0 and size < SMALL and start not in operated:
                index[start] = Place(scratch, self._scratch)
                self._scratch += -(-size // ALIGN) * ALIGN
            elif start >= 0:
                self._large.append(recorder.looks[start - inputs])
                index[start] = Place(scratch + len(self._large), 0)
        first = scratch + len(self._large) + 1
        self._later = len(later)
        return index | {start: Place(first + n, 0) for n, start in enumerate(later)}

    def _settled(self, step: Launch | Operator, index: dict[int, Place], looks: dict[int, Look]) -> tuple[Any, ...]:
        """A step as `replay` runs it: with what stays filled in, and numbers of starts and offsets for the rest.

        Operators are told how a tensor looks where that is not as it is at hand; parts never look like the whole.
        """
        args = list(step.args)

        def moves(place: Place) -> tuple[int, int]:
            start, offset = index[place.start]
            return start, offset + place.offset

        if isinstance(step, Operator):
            for i, place, _ in step.tensors:
                if place.start < 0:
                    args[i] = self._kept[-1 - place.start]
            tensors = [
                (i, *moves(place), None if look == looks[place.start] else look)
                for i, place, look in step.tensors
                if place.start >= 0
            ]
            return None, step.run, args, step.options, tensors, [index[start].start for start in step.made]
        for i, place in step.addresses:
            if place.start < 0:
                args[i] = self._kept[-1 - place.start].data_ptr()
        addresses = [(i, *moves(place)) for i, place in step.addresses if place.start >= 0]
        for i, box, place in step.boxes:
            if place.start < 0:
                args[i] = box
        boxes = [
            (i, type(box), {**vars(box), "base": None}, *moves(place))
            for i, box, place in step.boxes
            if place.start >= 0
        ]
        # All that is known of the kernel: Triton unloads one that nobody has any more.
        return step.known, step.grid, args, addresses, boxes

    def replay(self, inputs: Sequence[Tensor], stream: int) -> T:
        """Does the work for other inputs on a stream, the current one."""
        device = self._device
        made = [look.fresh(device) for _, look in self._made]
        # Memory goes back when this returns: what comes next on the stream waits for the work.
        scratch = torch.empty(self._scratch, dtype=torch.uint8, device=device)
        large = [look.fresh(device) for look in self._large]
        tensors: list[Any] = [*inputs, *made, scratch, *large, *(None,) * self._later]
        starts = [0 if x is None else x.data_ptr() for x in tensors]
        for known, *step in self._steps:
            if known is None:
                _operate(step, tensors, starts)
                continue
            grid, template, addresses, boxes = step
            args = template.copy()
            for i, start, offset in addresses:
                args[i] = starts[start] + offset
            for i, kind, fields, start, offset in boxes:
                box = args[i] = object.__new__(kind)
                box.__dict__.update(fields, base=_Address(starts[start] + offset))
            known.run(*grid, stream, known.function, known.packed, None, None, None, *args)
        result: list[Any] = self._result.copy()
        for (i, _), x in zip(self._made, made, strict=True):
            result[i] = x
        for i, number in self._given:
            result[i] = inputs[number]
        return self._as_result(result)


def _operate(step: Sequence[Any], tensors: list[Any], starts: list[int]) -> None:
    """Runs an operator of a replay."""
    run, template, options, given, made = step
    args = template.copy()
    for i, start, offset, look in given:
        args[i] = tensors[start] if look is None else look.at(tensors[start], offset)
    out = run(*args, **options)
    for start, x in zip(made, out if isinstance(out, tuple) else (out,), strict=False):
        tensors[start], starts[start] = x, x.data_ptr()


class Replays:
    """Calls by how they look, with the lists of their launches."""

    def __init__(self) -> None:
        self._calls: dict[Hashable, Recording[Any] | int] = {}
        self._kept: dict[int, int] = {}  # bytes of what recordings keep, by address

    def call(self, settings: Hashable, inputs: Sequence[Tensor], compute: Callable[[], T]) -> T:
        """What `compute` returns; the second time that a call comes it is noted, from then on it is replayed.

        Args:
            settings: what the work depends on besides `inputs`.
            inputs: all tensors that are read and may be others the next time. Only how they look may decide what is
                done; other tensors that are read must be the same ones, unchanged, in all calls with these settings.
            compute: does the work on a GPU without reading anything back.

        Returns:
            A tuple: tensors that are inputs or memory of their own, and what is the same for all calls that look alike.
        """
        if not _is_plain(inputs):
            return compute()
        # What a recording keeps may have been written by a launch, for which other streams do not wait.
        *_, driver = _of_triton()
        stream = driver.active.get_current_stream(inputs[0].device.index or 0)
        key = (settings, stream, _autocast(inputs[0]), *(_look(x) for x in inputs), *_starts(inputs))
        found = self._calls.get(key, 0)
        if isinstance(found, Recording):
            return _replayed(cast(Recording[T], found), inputs, stream, compute)
        if found > TRIES:
            return compute()
        if found == 0:
            if len(self._calls) >= LIMIT or sum(self._kept.values()) > KEPT:
                self._calls.clear()
                self._kept.clear()
            self._calls[key] = 1
            return compute()
        result, recording = _recorded(inputs, compute)
        self._calls[key] = recording or found + 1
        if recording is not None:
            self._kept |= recording.kept_bytes
        return result


def _is_plain(inputs: Sequence[Tensor]) -> bool:
    """Whether tensors have memory on a GPU, and nobody asks for gradients, looks at what is done, or tries another.

    Attention has no gradients, which only Python tells, by an error where they are needed.
    """
    if not inputs[0].is_cuda or in_trial():
        return False
    gradients = torch.is_grad_enabled()
    for x in inputs:
        if type(x) is not Tensor or (gradients and x.requires_grad):
            return False
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    is_watched, *_ = _of_triton()
    return not is_watched()


@functools.cache
def _of_triton() -> tuple[Callable[[], bool], Callable[[Tensor], AbstractContextManager[Any]], Any]:
    """What needs Triton, imported when a call on a GPU first comes: in every call that would take a microsecond."""
    from triton.runtime import driver

    from sparse_dit.kernels.launches import device_of, is_watched

    return is_watched, device_of, driver


def _autocast(x: Tensor) -> torch.dtype | None:
    """What operators on its device cast to, if to anything."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _look(x: Tensor) -> Hashable:
    return x.shape, x.stride(), x.dtype, x.device


def _starts(inputs: Sequence[Tensor]) -> list[Hashable]:
    """Whether each starts at a multiple of 16 bytes, and the first that starts where it does."""
    starts = [x.data_ptr() for x in inputs]
    return [(start % 16 == 0, starts.index(start)) for start in starts]


def _replayed(recording: Recording[T], inputs: Sequence[Tensor], stream: int, compute: Callable[[], T]) -> T:
    _, device_of, _ = _of_triton()
    with device_of(inputs[0]):
        try:
            return recording.replay(inputs, stream)
        except torch.OutOfMemoryError:
            pass
    # Python tells what was needed, or does with less at once.
    return compute()


def _recorded(inputs: Sequence[Tensor], compute: Callable[[], T]) -> tuple[T, Recording[T] | None]:
    """The result, and how to do the work again where that can be."""
    recorder = Recorder(inputs)
    noting.recorder = recorder
    try:
        with recorder:
            result = compute()
    finally:
        noting.recorder = None
    recording = Recording(recorder, result) if not recorder.refusal else None
    return result, recording if recording is not None and not recording.refusal else None
