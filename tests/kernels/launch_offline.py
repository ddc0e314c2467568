"""Makes whole calls on a GPU of sm_90 that is not there: kernels are compiled and launched, and nothing runs.

Launches are checked against what the compiled kernels take, and printed as a line of JSON a call, each made three
times: once as Triton launches, and twice by the remembered kernels.
"""

import json
from collections.abc import Callable
from typing import Any

import torch
from offline import target_of
from triton.runtime import driver

from sparse_dit.kernels import ops
from sparse_dit.kernels.bits_triton import triton_bits_to_lists, triton_lists_to_bits
from sparse_dit.kernels.cutoff_triton import triton_take_count, triton_take_mass
from sparse_dit.kernels.density_triton import triton_density
from sparse_dit.kernels.lists import mask_to_lists
from sparse_dit.kernels.lists_triton import triton_lists
from sparse_dit.kernels.mass_triton import triton_mass
from sparse_dit.kernels.ordered_triton import triton_order_with_means
from sparse_dit.kernels.pool_triton import triton_pool
from sparse_dit.kernels.rows_triton import triton_band_errors
from sparse_dit.kernels.scores_triton import triton_part_means, triton_scores

# precision, head size, keys a block, with an order, what becomes of skipped blocks
CALLS = (
    ("native", 128, 128, False, "drop"),
    ("native", 64, 64, True, "summary"),
    ("native", 72, 64, True, "drop"),
    ("int8", 128, 64, True, "summary"),
    ("int8_fp8", 128, 128, False, "drop"),
)
SEQ, HEADS = 500, 2
launched: list[dict[str, Any]] = []


def kind_of(value: Any) -> str:
    """What a launcher takes a value for."""
    if isinstance(value, (int, torch.Tensor)):
        return "pointer or integer"
    return "float" if isinstance(value, float) else "box" if hasattr(value, "block_shape") else "nothing"


def wanted(declared: str) -> str:
    """The same of a type in a compiled kernel's signature."""
    if declared.startswith("tensordesc"):
        return "box"
    return "float" if declared.startswith("fp") else "pointer or integer"


class Launcher:
    """In place of the function that Triton compiles in C for a kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.source, self.dependent = source, metadata.launch_pdl

    def __call__(self, x: int, y: int, z: int, stream: int, function: int, packed: Any, *rest: Any) -> None:
        _, _, _, *values = rest  # metadata and hooks
        kernel, signature = self.source.fn.__name__, list(self.source.signature.items())
        assert len(values) == len(signature), f"{kernel}: {len(values)} arguments; valid: {len(signature)}"
        told = []
        for (name, declared), value in zip(signature, values, strict=True):
            if declared == "constexpr":
                continue
            assert kind_of(value) == wanted(declared), f"{kernel}: {name} is {kind_of(value)}; valid: {declared}"
            told.append(told_of(value) if not declared.startswith("*") else "address")
        launched.append({"kernel": kernel, "grid": (x, y, z), "dependent": self.dependent, "arguments": told})


def told_of(value: Any) -> Any:
    return [value.shape, value.strides, value.block_shape] if hasattr(value, "block_shape") else value


class Utils:
    """What Triton asks the driver for when it loads a kernel."""

    def load_binary(self, *_: Any) -> tuple[None, int, int, int, int]:
        """Module, function, registers, spills, threads at most."""
        return None, 1, 0, 0, 1024

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448, "multiprocessor_count": 132, "warpSize": 32}


class Absent:
    """A driver of a GPU that is not there."""

    utils, launcher_cls = Utils(), Launcher

    def get_current_target(self) -> Any:
        return target_of("cuda:90")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int | None = None) -> int:
        return 0


def thrice(work: Callable[[], object]) -> list[list[dict[str, Any]]]:
    """The launches of each of three equal calls."""
    calls = []
    for _ in range(3):
        launched.clear()
        work()
        calls.append(list(launched))
    return calls


def call(precision: str, head_size: int, block_k: int, ordered: bool, skipped: str, backend: str) -> None:
    """Prints the launches of attention along lists; tensors lie on the CPU."""
    q, k, v = (torch.zeros(1, SEQ, HEADS, head_size, dtype=torch.bfloat16).transpose(1, 2) for _ in "qkv")
    mask = torch.ones(1, HEADS, -(-SEQ // 128), -(-SEQ // block_k), dtype=torch.bool).tril()
    lists = mask_to_lists(mask, 128, block_k)
    order = torch.arange(SEQ)[None] if ordered else None
    rest = (128, block_k, 0.125, precision, backend, skipped)
    calls = thrice(lambda: ops._computed(q, k, v, lists.indices, lists.counts, order, *rest))
    case = {"precision": precision, "head_size": head_size, "block_k": block_k, "ordered": ordered, "skipped": skipped}
    print(json.dumps({**case, "backend": backend, "calls": calls}))


def choose() -> None:
    """Prints the launches of everything that judges blocks and makes lists of them."""
    q, k, v = (torch.zeros(1, SEQ, HEADS, 64, dtype=torch.bfloat16).transpose(1, 2) for _ in "qkv")
    order, few = torch.arange(SEQ)[None], torch.arange(5)
    scores, own = torch.zeros(1, HEADS, 4, 8), torch.zeros(1, HEADS, 4, 8, dtype=torch.bool)
    blocks = mask_to_lists(~own, 128, 64)
    works: dict[str, Callable[[], object]] = {
        "order and means": lambda: triton_order_with_means(q, k, v, order, order, (16, 16), parts=True),
        "means of parts": lambda: triton_part_means(q, 16, order),
        "means": lambda: triton_pool(k, 64, order, None, True),
        "scores": lambda: triton_scores(q, k, 8, 4, 0.125, "logsumexp"),
        "sampled rows": lambda: triton_band_errors(q, k, v, few, order, order, 7, 0.125),
        "count": lambda: triton_take_count(scores[0], 5, None),
        "mass": lambda: triton_take_mass(scores[0], own[0], 0.25),
        "lists": lambda: triton_lists("top_k", scores, 8, 3),
        "density": lambda: triton_density(blocks, SEQ),
        "bits": lambda: triton_bits_to_lists(triton_lists_to_bits(blocks, 8), 8),
        "block mass": lambda: triton_mass(q, k, torch.zeros(1, HEADS, SEQ), 128, 64, 0.125),
    }
    for name, work in works.items():
        print(json.dumps({"choice": name, "calls": thrice(work)}))


driver.set_active(Absent())
for case in CALLS:
    for backend in ("hopper", "triton"):
        call(*case, backend)
choose()
