"""Which kernel computes a call: `host` anywhere, `triton` on GPUs, `hopper` on sm_90."""

import functools
import os

import torch
from torch import Tensor

from sparse_dit.kernels.alike import remembered
from sparse_dit.kernels.blocks import BlockList
from sparse_dit.kernels.pieces import PIECE_BYTES, is_aligned

BACKENDS = ("hopper", "triton", "host")
CUDA_DTYPES = (torch.float16, torch.bfloat16)
TRITON_HEAD_SIZES = (64, 72, 88, 96, 128, 256)
HOPPER_HEAD_SIZES = (64, 72, 88, 96, 128)
HOPPER_QUANTIZED = (64, 128)  # head sizes of the Hopper pass that quantizes
HOPPER_BLOCK_Q = 128
HOPPER_BLOCK_K = (32, 64, 128)  # the first not in FP8, whose values lie in parts of a stage, two at most
# Triton versions whose Gluon the Hopper kernel is compiled with by the tests: from the first, before the second.
GLUON_VERSIONS = ((3, 6), (3, 10))


def default_backend(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockList, precision: str, pv_threshold: float | None = None
) -> str:
    """The backend that None stands for: the fastest that takes the call."""
    if not q.is_cuda or q.dtype not in CUDA_DTYPES:
        return "host"
    return "triton" if hopper_refusal(q, k, v, blocks, precision, pv_threshold) else "hopper"


@remembered
def told_backend(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockList, precision: str, pv_threshold: float | None = None
) -> str:
    """`default_backend` as summaries print it: on a Hopper GPU with why the kernel made for it is not the one."""
    if not q.is_cuda or q.dtype not in CUDA_DTYPES:
        return "host"
    reason = hopper_refusal(q, k, v, blocks, precision, pv_threshold)
    if reason is None:
        return "hopper"
    return f"triton ({reason})" if is_hopper(q.device) else "triton"


def is_hopper(device: torch.device) -> bool:
    """Whether a CUDA device is an NVIDIA GPU of compute capability 9.0."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) == (9, 0)


def chosen_backend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockList,
    precision: str,
    backend: str | None,
    pv_threshold: float | None = None,
) -> str:
    """The backend asked for, or `default_backend` for None.

    Raises:
        ValueError: it is unknown, or cannot compute the call.
    """
    chosen = default_backend(q, k, v, blocks, precision, pv_threshold) if backend is None else backend
    if chosen not in BACKENDS:
        raise ValueError(f"backend: {backend!r}; valid: one of {BACKENDS}, or None to choose by device and dtype")
    if chosen == "host":
        return chosen
    if q.is_cuda and q.dtype not in CUDA_DTYPES:
        raise ValueError(f"q: {q.dtype}; valid for backend {chosen!r} on CUDA: one of {CUDA_DTYPES}")
    if chosen == "hopper":
        # What None stands for was found by the same question.
        if backend and (reason := hopper_refusal(q, k, v, blocks, precision, pv_threshold)):
            raise ValueError(f"backend: 'hopper', but {reason}; valid: 'triton', or None to choose")
        return chosen
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"backend: 'triton' with tensors on {q.device}; valid: CUDA tensors, or backend 'host'")
    if not q.is_cuda and q.dtype is torch.bfloat16:
        # The interpreter multiplies the bits of bfloat16 as integers.
        raise ValueError("q: torch.bfloat16; valid in Triton's interpreter: torch.float16 or torch.float32")
    if q.shape[-1] not in TRITON_HEAD_SIZES:
        raise ValueError(f"q: head size {q.shape[-1]}; valid for backend 'triton': one of {TRITON_HEAD_SIZES}")
    _check_fp8(q, precision)
    return chosen


def _check_fp8(q: Tensor, precision: str) -> None:
    if precision != "int8_fp8" or not q.is_cuda:
        return
    if torch.version.hip is not None or torch.cuda.get_device_capability(q.device) < (8, 9):
        name = torch.cuda.get_device_name(q.device)
        raise ValueError(
            f"precision: 'int8_fp8' on {name}; valid: NVIDIA GPUs of compute capability 8.9 or newer, or 'int8'"
        )


def hopper_refusal(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockList, precision: str, pv_threshold: float | None = None
) -> str | None:
    """Why the Hopper kernel cannot take a call, or None where it can."""
    if not q.is_cuda or q.dtype not in CUDA_DTYPES:
        return f"q is {q.dtype} on {q.device}"
    if not is_hopper(q.device):
        return f"{torch.cuda.get_device_name(q.device)} is no Hopper GPU"
    if q.shape[-1] not in HOPPER_HEAD_SIZES:
        return f"head size {q.shape[-1]} is not one of {HOPPER_HEAD_SIZES}"
    if pv_threshold is not None:
        return "it leaves no value products out (pv_threshold)"
    sizes = HOPPER_BLOCK_K[precision == "int8_fp8" :]
    if blocks.block_q != HOPPER_BLOCK_Q or blocks.block_k not in sizes:
        return f"blocks of {blocks.block_q} by {blocks.block_k} are not {HOPPER_BLOCK_Q} by one of {sizes}"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not is_aligned(x):
            return f"{name} does not lie in pieces of {PIECE_BYTES} bytes"
    return _gluon_refusal()


@remembered
def quantize_backend(q: Tensor, k: Tensor, v: Tensor, rotate: bool = True) -> str:
    """The backend that None stands for in `quantize.quantize`: the fastest that takes q, k and v."""
    if not q.is_cuda:
        return "host"
    if q.dtype not in CUDA_DTYPES or not is_hopper(q.device) or _gluon_refusal():
        return "triton"
    return "triton" if hopper_quantize_refusal(q, k, v, rotate) else "hopper"


@remembered
def hopper_quantize_refusal(q: Tensor, k: Tensor, v: Tensor, rotate: bool = True) -> str | None:
    """Why the Hopper pass cannot quantize tensors on a GPU that it runs on, or None where it can."""
    if not rotate:
        return "it always rotates"
    if q.shape[-1] not in HOPPER_QUANTIZED:
        return f"head size {q.shape[-1]} is not one of {HOPPER_QUANTIZED}"
    if q.shape[2] != k.shape[2]:
        return f"there are {q.shape[2]} queries and {k.shape[2]} keys"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not is_aligned(x):
            return f"{name} does not lie in pieces of {PIECE_BYTES} bytes"
    return None


@functools.cache
def _gluon_refusal() -> str | None:
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    first, beyond = GLUON_VERSIONS
    if not first <= version < beyond:
        return f"Triton {triton.__version__} is not from {first[0]}.{first[1]} to {beyond[0]}.{beyond[1] - 1}"
    return None
