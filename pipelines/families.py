"""Which transformers are known, and how each is read: one row a model family."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch


class GridSource(Protocol):
    """Where a family's grid of video tokens comes from."""

    def read(self, arguments: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[int, int, int]:
        """The grid (T, H, W) of a forward.

        Args:
            arguments: the arguments of the forward, by name.
            config: the transformer's configuration.
        """

    def of_latents(self, size: tuple[int, int, int], config: Mapping[str, Any]) -> tuple[int, int, int]:
        """The grid (T, H, W) for latents of a size (frames, rows, columns)."""


@dataclass(frozen=True)
class Latents:
    """The grid is the shape of the latents over the patch size.

    Args:
        patch: configuration entries that, joined, are the patch size (t, h, w).
        argument: name of the forward's argument that holds the latents.
        axes: names of its axes; t, h and w are looked for, without t there is one frame.
    """

    patch: tuple[str, ...]
    argument: str = "hidden_states"
    axes: str = "b c t h w"

    def read(self, arguments: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[int, int, int]:
        """See `GridSource.read`."""
        sides = dict(zip(self.axes.split(), arguments[self.argument].shape, strict=True))
        return self.of_latents((sides.get("t", 1), sides["h"], sides["w"]), config)

    def of_latents(self, size: tuple[int, int, int], config: Mapping[str, Any]) -> tuple[int, int, int]:
        """See `GridSource.of_latents`."""
        patch: list[int] = []
        for entry in self.patch:
            side = config[entry]
            patch.extend([side] if isinstance(side, int) else side)
        return size[0] // patch[0], size[1] // patch[1], size[2] // patch[2]


@dataclass(frozen=True)
class Text:
    """Text tokens that take part in the self-attention.

    Args:
        side: whether they stand before or after the video tokens.
        argument: name of the forward's argument whose second axis they are.
    """

    side: Literal["before", "after"]
    argument: str = "encoder_hidden_states"


@dataclass(frozen=True)
class Family:
    """How to read one family of transformers.

    Args:
        transformer: name of the class.
        layers: patterns of the module paths of the self-attention layers, in execution order; `*` is the block number.
        grid: where the grid comes from.
        text: text tokens in the self-attention; `None` when it is video only.
        timestep: name of the forward's argument that holds the timestep.
        timestep_range: the timestep of pure noise.
        timestep_rises: whether the timestep rises, not falls, while noise is removed.
    """

    transformer: str
    layers: tuple[str, ...]
    grid: GridSource
    text: Text | None = None
    timestep: str = "timestep"
    timestep_range: float = 1000.0
    timestep_rises: bool = False

    def attentions(self, transformer: torch.nn.Module) -> dict[str, torch.nn.Module]:
        """The self-attention layers of a transformer by module path, in execution order.

        Raises:
            ValueError: there is none.
        """
        # A compiled block is wrapped in a module of its own; that does not change which layer it is.
        modules = {path.replace("_orig_mod.", ""): module for path, module in transformer.named_modules()}
        found: dict[str, torch.nn.Module] = {}
        for pattern in self.layers:
            match = re.compile(re.escape(pattern).replace(r"\*", r"(\d+)")).fullmatch
            numbered = sorted((int(hit[1]), path) for path in modules if (hit := match(path)))
            found |= {path: modules[path] for _, path in numbered}
        if not found:
            raise ValueError(f"pipe: {self.transformer} without layers; valid: one with {', '.join(self.layers)}")
        return found

    def layout(self, arguments: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[int, int, int, int, int]:
        """(T, H, W, text tokens before, text tokens after) of a forward, from its arguments by name."""
        span = 0 if self.text is None else arguments[self.text.argument].shape[1]
        before = span if self.text is not None and self.text.side == "before" else 0
        return *self.grid.read(arguments, config), before, span - before

    def noise(self, timestep: torch.Tensor) -> torch.Tensor:
        """Noise level in [0, 1], 1 is pure noise, of a timestep of any shape."""
        level = timestep.float() / self.timestep_range
        return 1.0 - level if self.timestep_rises else level


FAMILIES: dict[str, Family] = {
    family.transformer: family
    for family in (Family("WanTransformer3DModel", layers=("blocks.*.attn1",), grid=Latents(patch=("patch_size",))),)
}


def family_of(transformer: object) -> Family:
    """The row of a transformer, by the name of its class or of one it derives from.

    Raises:
        ValueError: no row has it.
    """
    for cls in type(transformer).__mro__:
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__]
    raise ValueError(f"pipe: {type(transformer).__name__} is no known transformer; valid: {', '.join(FAMILIES)}")
