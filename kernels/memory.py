"""What a call of attention along block lists allocates: tried before anything is launched, and told in errors."""

import torch
from torch import Tensor

from sparse_dit.kernels.quantize import CODE_ALIGN, GROUP, padded

LARGE = 2**26
"""Bytes of q from which a call's memory is tried beforehand; below that the GPU would wait for the host."""
_GIB = 2**30

Buffers = dict[str, tuple[int, ...]]
"""Bytes of each buffer, by purpose."""


def buffers(q: Tensor, k: Tensor, order: Tensor | None, precision: str, backend: str) -> Buffers:
    """What a call allocates on a GPU; scales, means and copies of rows out of line are left out.

    Args:
        q: queries [B, H, Sq, D].
        k: keys [B, H, Sk, D].
        order: as `ops.block_sparse_attention`.
        precision: as there.
        backend: "hopper" or "triton".
    """
    rows_q, rows_k, head_size = q.shape[0] * q.shape[1] * q.shape[2], k.shape[0] * k.shape[1] * k.shape[2], q.shape[3]
    of_q, of_k = (rows * head_size * q.element_size() for rows in (rows_q, rows_k))
    needed: Buffers = {"out": (of_q,), "lse": (rows_q * 4,)}
    if precision == "native":
        copies = 0 if order is None else 3 if backend == "hopper" else 2
        return needed | {"q, k and v in order": (of_k,) * copies}
    padded_k = k.shape[0] * k.shape[1] * padded(k.shape[2], GROUP)
    width = padded(head_size, CODE_ALIGN)
    if precision == "int8_fp8":
        return needed | {"codes": (rows_q * width, padded_k * width, padded_k * head_size)}
    return needed | {"codes": (rows_q * width, padded_k * width), "v in order": () if order is None else (of_k,)}


def reserve(q: Tensor, k: Tensor, order: Tensor | None, precision: str, backend: str) -> None:
    """Takes a call's buffers all at once and lets go of them, so that a shortage shows before anything is launched.

    The allocator then hands out the same memory again. It takes no more than the call does at its peak, and neither
    waits for the GPU nor asks the driver where the memory was there already.

    Raises:
        torch.OutOfMemoryError: they do not fit.
    """
    sizes = [size for each in buffers(q, k, order, precision, backend).values() for size in each]
    held = [torch.empty(size, dtype=torch.uint8, device=q.device) for size in sizes]
    del held


def told_shortage(q: Tensor, k: Tensor, order: Tensor | None, precision: str, backend: str) -> str:
    """The line of the error when memory ran out."""
    needed = {name: sum(sizes) for name, sizes in buffers(q, k, order, precision, backend).items()}
    parts = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in needed.items() if size)
    return (
        f"block_sparse_attention: too little memory on {q.device} for q {list(q.shape)}; needed: about "
        f"{sum(needed.values()) / _GIB:.2f} GiB at once ({parts}){_told_free(q.device)}; no attention was computed"
    )


def _told_free(device: torch.device) -> str:
    """What there is: what the driver has, and what the allocator holds without using it."""
    if device.type != "cuda":
        return ""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return f", free: {(torch.cuda.mem_get_info(device)[0] + held) / _GIB:.2f} GiB"
