"""Launches of Triton kernels that cost the host little.

`kernel[grid](...)` asks each of some forty arguments for its type, its alignment and whether it is 1, writes the
answers into a string, and finds the compiled kernel by that, in every launch. Equal numbers, dtypes and constants get
equal answers. So here these are what a compiled kernel is remembered by, and one that is known is called as Triton lets
everybody call it, `compiled[grid](...)`, with addresses in place of tensors. What is kept is how to launch, never what
tensors hold.
"""

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

LIMIT = 4096
"""Launches that are remembered; then all are forgotten, for a program whose sizes differ in every call."""

_known: dict[Hashable, tuple[CompiledKernel, tuple[Any, ...]]] = {}
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
        count = _leading[kernel.fn] = sum(x is None or isinstance(x, Tensor) for x in args)
    kinds: list[Hashable] = [box and (box.base.dtype, *box.block_shape) for box in boxes]
    addresses: list[int | None] = []
    for x in args[:count]:
        if x is None:
            addresses.append(None)
            kinds.append(None)
        else:
            address = x.data_ptr()
            addresses.append(address)
            kinds.append(x.dtype if address % 16 == 0 else (x.dtype,))
    numbers = args[count:]
    # 1 and 1.0 are one key of a dict, and two types of an argument.
    types = tuple(map(type, numbers))
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else -1
    key = (kernel.fn, device, *kinds, numbers, types, *fixed, *fixed.values())
    known = _known.get(key)
    if known is not None:
        compiled, constants = known
        compiled[(*grid, 1, 1)[:3]](*boxes, *addresses, *numbers, *constants)
        return
    compiled = kernel[grid](*boxes, *args, **fixed)
    # An interpreted kernel leaves nothing, and compilation in the background leaves another object. On AMD types depend
    # on the sizes of tensors, too.
    if isinstance(compiled, CompiledKernel) and torch.version.hip is None:
        names = kernel.arg_names[len(boxes) + len(args) :]
        if len(_known) >= LIMIT:
            _known.clear()
        _known[key] = compiled, tuple(fixed[name] for name in names)
