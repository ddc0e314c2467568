"""Where a forward's own arguments tell its tokens: the grid, and what stands in front of it and behind it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

Arguments = Mapping[str, Any]
Grid = tuple[int, int, int]
Side = Literal["before", "after"]

UNTOLD: Grid = (1, 1, 1)
"""The grid of a forward whose arguments tell none: it fits no sequence, so calls stay dense (`unknown_grid`)."""


class GridSource(Protocol):
    """Where a family's grid of video tokens comes from."""

    @property
    def reads(self) -> bool:
        """Whether values of tensors are read, not only shapes and numbers."""

    def read(self, arguments: Arguments, config: Arguments) -> Grid:
        """The grid (T, H, W) of a forward.

        Args:
            arguments: the arguments of the forward, by name.
            config: the transformer's configuration.
        """

    def of_latents(self, size: Grid, config: Arguments) -> Grid:
        """The grid (T, H, W) for latents of a size (frames, rows, columns)."""


@dataclass(frozen=True)
class Latents:
    """The grid is the shape of the latents over the patch size.

    Args:
        patch: configuration entries or numbers that, joined, are the patch size (t, h, w).
        argument: name of the forward's argument that holds the latents; of a list, the first one counts.
        axes: names of their axes, one spelling for each number of axes; t, h and w are looked for, without t there is
            one frame, and n, the number of videos that are joined, multiplies the frames.
    """

    patch: tuple[str | int, ...]
    argument: str = "hidden_states"
    axes: tuple[str, ...] = ("b c t h w",)
    reads = False

    def read(self, arguments: Arguments, config: Arguments) -> Grid:
        """See `GridSource.read`."""
        latents = arguments[self.argument]
        shape = tuple((latents[0] if isinstance(latents, list) else latents).shape)
        for spelling in self.axes:
            names = spelling.split()
            if len(names) == len(shape):
                sides = dict(zip(names, shape, strict=True))
                return self.of_latents((sides.get("t", 1) * sides.get("n", 1), sides["h"], sides["w"]), config)
        return UNTOLD

    def of_latents(self, size: Grid, config: Arguments) -> Grid:
        """See `GridSource.of_latents`."""
        patch: list[int] = []
        for entry in self.patch:
            side = config[entry] if isinstance(entry, str) else entry
            patch.extend([side or 1] if isinstance(side, int) or side is None else side)
        if len(patch) == 2:
            patch.insert(0, 1)
        return -(-size[0] // patch[0]), size[1] // patch[1], size[2] // patch[2]


@dataclass(frozen=True)
class Sizes:
    """The grid is given in numbers, next to latents that are already flattened.

    Args:
        arguments: names of the arguments that hold T, H and W.
    """

    arguments: tuple[str, str, str] = ("num_frames", "height", "width")
    reads = False

    def read(self, arguments: Arguments, config: Arguments) -> Grid:
        """See `GridSource.read`."""
        frames, height, width = (arguments.get(name) for name in self.arguments)
        return UNTOLD if frames is None or height is None or width is None else (frames, height, width)

    def of_latents(self, size: Grid, config: Arguments) -> Grid:
        """See `GridSource.of_latents`."""
        return size


@dataclass(frozen=True)
class Shapes:
    """The grid is the first entry of a list of shapes, those of reference images behind it.

    Args:
        argument: name of the argument: a list of (T, H, W), or one such list a sample.
        packed: side of the square of latent pixels that the pipeline packs into a token.
    """

    argument: str = "img_shapes"
    packed: int = 2
    reads = False

    def read(self, arguments: Arguments, config: Arguments) -> Grid:
        """See `GridSource.read`."""
        shape = arguments[self.argument]
        while not isinstance(shape[0], int):
            shape = shape[0]
        return shape[0], shape[1], shape[2]

    def of_latents(self, size: Grid, config: Arguments) -> Grid:
        """See `GridSource.of_latents`."""
        return size[0], size[1] // self.packed, size[2] // self.packed


@dataclass(frozen=True)
class Positions:
    """The grid is told by the position ids of the image tokens.

    The first id of a token tells the image it belongs to, so the grid ends where that id changes: reference images
    follow.

    Args:
        argument: name of the argument, [S, axes] or [B, S, axes]; columns 0, 1, 2 are the image, its row, its column.
        packed: side of the square of latent pixels that the pipeline packs into a token.
        skipped: name of the argument whose tokens (axis 1) stand first in the ids and are no image; empty for none.
    """

    argument: str = "img_ids"
    packed: int = 2
    skipped: str = ""
    reads = True

    def read(self, arguments: Arguments, config: Arguments) -> Grid:
        """See `GridSource.read`."""
        ids = arguments[self.argument]
        ids = (ids[0] if ids.ndim == 3 else ids)[arguments[self.skipped].shape[1] if self.skipped else 0 :, :3]
        image, row, column = ids.double().cpu().unbind(-1)
        own = int((image == image[0]).long().cumprod(0).sum())
        height = int(row[:own].max() - row[:own].min()) + 1
        width = int(column[:own].max() - column[:own].min()) + 1
        return (1, height, width) if height * width == own else UNTOLD

    def of_latents(self, size: Grid, config: Arguments) -> Grid:
        """See `GridSource.of_latents`."""
        return size[0], size[1] // self.packed, size[2] // self.packed


class Span(Protocol):
    """A span of tokens that take part in the self-attention without being on the grid.

    Attributes:
        side: whether they stand in front of the grid or behind it.
        usual: how many a pipeline passes by default; what `explain` takes.
        reads: whether values of tensors are read, not only shapes and numbers.
    """

    @property
    def side(self) -> Side: ...
    @property
    def usual(self) -> int: ...
    @property
    def reads(self) -> bool: ...

    def tokens(self, arguments: Arguments, config: Arguments, grid: Grid) -> tuple[int, ...]:
        """How many there are, in each sample of the batch; a single number when it is the same in all."""

    def width(self, arguments: Arguments, config: Arguments, grid: Grid) -> int:
        """How many places they take in the sequence, padding included."""

    def expected(self, config: Arguments, grid: Grid) -> int:
        """How many a pipeline passes by default on a grid."""

    def gap(self, arguments: Arguments) -> int:
        """With how many more, as padding, they stand in the sequence; only where that is in front of the grid."""

    def refusal(self, arguments: Arguments) -> str | None:
        """Why the padding among them cannot be cut off, or `None`."""


class _Unpadded:
    """What spans without padding have in common."""

    usual: int
    reads = False

    def tokens(self, arguments: Arguments, config: Arguments, grid: Grid) -> tuple[int, ...]:
        """See `Span.tokens`."""
        raise NotImplementedError

    def width(self, arguments: Arguments, config: Arguments, grid: Grid) -> int:
        """See `Span.width`."""
        return max(self.tokens(arguments, config, grid))

    def expected(self, config: Arguments, grid: Grid) -> int:
        """See `Span.expected`."""
        return self.usual

    def gap(self, arguments: Arguments) -> int:
        """See `Span.gap`."""
        return 0

    def refusal(self, arguments: Arguments) -> str | None:
        """See `Span.refusal`."""
        return None


@dataclass(frozen=True)
class Text(_Unpadded):
    """Text tokens, or whatever an argument holds one of a token.

    Args:
        side, usual: see `Span`.
        argument: name of the forward's argument whose axis `axis` they are; of a list, one entry is one sample.
        axis: that axis.
        times: how often they enter the sequence.
        extra: tokens that the model itself adds to them, such as registers.
        multiple: each sample's number is rounded up to a multiple of this by tokens that count.
        only_nonzero: whether the model drops them when the whole argument is zero.
    """

    side: Side
    usual: int
    argument: str = "encoder_hidden_states"
    axis: int = 1
    times: int = 1
    extra: int = 0
    multiple: int = 1
    only_nonzero: bool = False

    @property
    def reads(self) -> bool:  # type: ignore[override]
        """See `Span.reads`."""
        return self.only_nonzero

    def tokens(self, arguments: Arguments, config: Arguments, grid: Grid) -> tuple[int, ...]:
        """See `Span.tokens`."""
        held = arguments.get(self.argument)
        if held is None or (self.only_nonzero and not bool(held.any())):
            return (0,)
        parts = held if isinstance(held, list) else [held]
        axis = 0 if isinstance(held, list) else self.axis
        return tuple(-(-part.shape[axis] // self.multiple) * self.multiple * self.times + self.extra for part in parts)


@dataclass(frozen=True)
class PaddedText:
    """Text tokens of which a mask tells those that count, different in each sample.

    Args:
        side, usual: see `Span`.
        mask: name of the argument, [B, L], nonzero where a token counts, or [B], how many count.
        argument: name of the argument whose axis 1 they are, for calls without a mask.
        in_front: whether the padding stands between the text and the grid; else it ends the sequence.
        compacts: whether the model itself moves the tokens that count to the front; else those must lead already.
    """

    side: Side
    usual: int
    mask: str = "encoder_attention_mask"
    argument: str = "encoder_hidden_states"
    in_front: bool = False
    compacts: bool = False
    reads = True

    def tokens(self, arguments: Arguments, config: Arguments, grid: Grid) -> tuple[int, ...]:
        """See `Span.tokens`."""
        mask = arguments.get(self.mask)
        if mask is None:
            return (self.width(arguments, config, grid),)
        counts = mask if mask.ndim == 1 else (mask != 0).sum(1)
        return tuple(int(count) for count in counts.tolist())

    def width(self, arguments: Arguments, config: Arguments, grid: Grid) -> int:
        """See `Span.width`."""
        text = arguments.get(self.argument)
        return 0 if text is None else int(text.shape[1])

    def expected(self, config: Arguments, grid: Grid) -> int:
        """See `Span.expected`."""
        return self.usual

    def gap(self, arguments: Arguments) -> int:
        """See `Span.gap`."""
        mask = arguments.get(self.mask)
        return int(mask.shape[1]) if self.in_front and mask is not None else 0

    def refusal(self, arguments: Arguments) -> str | None:
        """See `Span.refusal`."""
        mask = arguments.get(self.mask)
        if mask is None or mask.ndim == 1 or self.compacts:
            return None
        valid = mask != 0
        leads = torch.arange(valid.shape[1], device=mask.device) < valid.sum(1, keepdim=True)
        return None if bool((valid == leads).all()) else "mask_with_holes"


@dataclass(frozen=True)
class References(_Unpadded):
    """Tokens of reference images: what a packed sequence holds beyond the grid.

    Args:
        side, usual: see `Span`.
        argument: name of the argument [B, S, C] that holds grid and references.
    """

    side: Side = "after"
    usual: int = 0
    argument: str = "hidden_states"

    def tokens(self, arguments: Arguments, config: Arguments, grid: Grid) -> tuple[int, ...]:
        """See `Span.tokens`."""
        return (max(arguments[self.argument].shape[1] - math.prod(grid), 0),)


@dataclass(frozen=True)
class History(_Unpadded):
    """Tokens of frames made earlier, each stretch with a patch size of its own.

    Args:
        side, usual: see `Span`.
        stretches: (argument that holds the latents [B, C, T, H, W], argument that must be given too, patch size).
    """

    stretches: tuple[tuple[str, str, Grid], ...]
    side: Side = "before"
    usual: int = 0

    def tokens(self, arguments: Arguments, config: Arguments, grid: Grid) -> tuple[int, ...]:
        """See `Span.tokens`."""
        total = 0
        for latents, indices, patch in self.stretches:
            if arguments.get(latents) is not None and arguments.get(indices) is not None:
                sides: Sequence[int] = arguments[latents].shape[2:]
                total += math.prod(-(-side // step) for side, step in zip(sides, patch, strict=True))
        return (total,)


@dataclass(frozen=True)
class GridPadding(_Unpadded):
    """Tokens that the model appends to the grid's and lets take part as they are.

    Args:
        side, usual: see `Span`; `usual` is not asked for.
        multiple: up to a multiple of this; 0 is up to the configuration's `max_resolution`, unless the grid is square.
    """

    multiple: int
    side: Side = "after"
    usual: int = 0

    def tokens(self, arguments: Arguments, config: Arguments, grid: Grid) -> tuple[int, ...]:
        """See `Span.tokens`."""
        own = math.prod(grid)
        if self.multiple:
            return (-own % self.multiple,)
        full = math.prod(config["max_resolution"]) // config["patch_size"] ** 2
        return (0 if grid[1] == grid[2] else full - own,)

    def expected(self, config: Arguments, grid: Grid) -> int:
        """See `Span.expected`."""
        return self.tokens({}, config, grid)[0]
