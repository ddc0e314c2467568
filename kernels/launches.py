"""Launches of Triton kernels that cost the host little.

`kernel[grid](...)` asks each of some forty arguments for its type, its alignment and whether it is 1, writes the
answers into a string, and finds the compiled kernel by that, in every launch. Equal numbers, dtypes and constants get
equal answers. So here these are what a compiled kernel is remembered by, and one that is known is started as
`compiled[grid](...)` would start it, with addresses in place of tensors. What is kept is how to launch, never what
tensors hold.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

from sparse_dit.kernels.backends import GLUON_VERSIONS
from sparse_dit.kernels.recorder import noting

LIMIT = 4096
"""Launches that are remembered; then all are forgotten, for a program whose sizes differ in every call."""


class Known(NamedTuple):
    """A compiled kernel, its compile-time arguments, and what starts it without asking it anything."""

    compiled: CompiledKernel
    constants: list[Any]
    run: Callable[..., None] | None = None
    function: Any = None
    packed: Any = None


_known: dict[Hashable, Known] = {}
_leading: dict[Callable[..., Any], int] = {}
_here = nullcontext()


def cdiv(size: int, by: int) -> int:
    """The quotient rounded up. Triton's own, and that of `power_of_2`, are a microsecond or two slower each."""
    return -(-size // by)


def power_of_2(size: int) -> int:
    """The least power of two that is not below a positive size."""
    return 1 << (size - 1).bit_length()


def device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Within the block kernels are launched on the device of x; costs next to nothing where that is current."""
    index = x.get_device()
    return _here if index < 0 or index == torch.cuda.current_device() else torch.cuda.device(index)


def current_stream(x: Tensor) -> int:
    """The current stream of the device of x, as a number; 0 on a CPU."""
    index = x.get_device()
    return 0 if index < 0 else int(driver.active.get_current_stream(index))


def launch_kernel(kernel: Any, grid: Sequence[int], *args: Any, boxes: Any = (), **fixed: Any) -> None:
    """`kernel[grid](*boxes, *args, **fixed)` on the current device.

    Args:
        kernel: a kernel of Triton or Gluon.
        grid: programs on one to three axes.
        args: tensors of that device, or None, then numbers, in the order of the kernel's parameters.
        boxes: TMA descriptors, or None, the first parameters; layouts follow from dtypes and block shapes.
        fixed: the kernel's compile-time arguments, all that it has, and launch options.
    """
    count = _leading.get(kernel.fn)
    if count is None:
        count = _leading[kernel.fn] = _tensors_before_numbers(kernel, args)
    kinds: list[Hashable] = [box and (box.base.dtype, *box.block_shape) for box in boxes]
    addresses: list[int | None] = []
    device = -1
    for x in args[:count]:
        if x is None:
            addresses.append(None)
            kinds.append(None)
        else:
            device, address = x.get_device(), x.data_ptr()
            addresses.append(address)
            kinds.append(x.dtype if address % 16 == 0 else (x.dtype,))
    numbers = args[count:]
    # 1 and 1.0 are one key of a dict, and two types of an argument.
    types = tuple(map(type, numbers))
    key = (kernel.fn, device, *kinds, numbers, types, *fixed, *fixed.values())
    known = _known.get(key)
    if noting.recorder is not None:
        noting.recorder.note(known, (*grid, 1, 1)[:3], boxes, args[:count], numbers)
    if known is None:
        compiled = kernel[grid](*boxes, *args, **fixed)
        # An interpreted kernel leaves nothing, and compilation in the background leaves another object. On AMD types
        # depend on the sizes of tensors, too.
        if isinstance(compiled, CompiledKernel) and torch.version.hip is None:
            _remember(key, compiled, [fixed[name] for name in kernel.arg_names[len(boxes) + len(args) :]])
        return
    grid = (*grid, 1, 1)[:3]
    if known.run is None or is_watched():
        known.compiled[grid](*boxes, *addresses, *numbers, *known.constants)
        return
    stream = driver.active.get_current_stream(device)
    # What `compiled[grid]` does where nobody wants to know of launches: no metadata for hooks, no hooks.
    known.run(
        *grid, stream, known.function, known.packed, None, None, None, *boxes, *addresses, *numbers, *known.constants
    )


def _tensors_before_numbers(kernel: Any, args: Sequence[Any]) -> int:
    """How many arguments come before the first number; raises TypeError where a tensor comes behind it."""
    tensors = [x is None or isinstance(x, Tensor) for x in args]
    if tensors != sorted(tensors, reverse=True):
        raise TypeError(f"{kernel.fn.__name__}: a tensor behind a number; valid: tensors, or None, then numbers")
    return sum(tensors)


def is_watched() -> bool:
    """Whether somebody, such as a profiler, asked Triton to be told of launches."""
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return any(hook is not None and getattr(hook, "calls", True) for hook in hooks)


def _remember(key: Hashable, compiled: CompiledKernel, constants: list[Any]) -> None:
    if len(_known) >= LIMIT:
        _known.clear()
    if _is_known_triton():
        _known[key] = Known(compiled, constants, compiled.run, compiled.function, compiled.packed_metadata)
    else:
        _known[key] = Known(compiled, constants)


@functools.cache
def _is_known_triton() -> bool:
    """Whether this Triton starts kernels as those do that were looked at; later ones may pass other things."""
    first, beyond = GLUON_VERSIONS
    return first <= tuple(int(part) for part in triton.__version__.split(".")[:2]) < beyond
