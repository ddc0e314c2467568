"""A GPU of sm_90 that is not there: Triton compiles for it and launches, and nothing runs.

Launches are checked against what the compiled kernels take, and noted in `launched` and `places`.
"""

from typing import Any

import torch
from offline import target_of
from triton.runtime import driver

launched: list[dict[str, Any]] = []
places: list[list[int]] = []  # where the pointers and boxes of each are


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
        told, addresses = [], []
        for (name, declared), value in zip(signature, values, strict=True):
            if declared == "constexpr":
                continue
            assert kind_of(value) == wanted(declared), f"{kernel}: {name} is {kind_of(value)}; valid: {declared}"
            told.append(told_of(value) if not declared.startswith("*") else "address")
            if declared.startswith("*") or hasattr(value, "block_shape"):
                tensor = getattr(value, "base", value)
                addresses.append(tensor if isinstance(tensor, int) else tensor.data_ptr())
        launched.append({"kernel": kernel, "grid": (x, y, z), "dependent": self.dependent, "arguments": told})
        places.append(addresses)


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


driver.set_active(Absent())
