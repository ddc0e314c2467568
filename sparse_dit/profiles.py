"""Profiles: what calibration found for a model, per bin of steps, layer and head; safetensors with a JSON header.

The header is the entry `profile` of the file's metadata, the tensors are those of `Profile`. Files of another schema,
and files whose parts do not fit together, are refused.
"""

import functools
import itertools
import json
import os
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sparse_dit.kernels.blocks import BLOCK_SIZES
from sparse_dit.layout import TokenLayout
from sparse_dit.orders.axes import FLATTENINGS

SCHEMA = 1
"""Raised whenever a part of the file changes its name or meaning."""

KINDS = ("all", "skip", "diagonal", "multi_diagonal", "stripe", "window", "mask")
_HEADER = "profile"
# Where the profiles lie that come with the package.
_SHIPPED = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Pattern:
    """What a head computes.

    Args:
        kind: `all`; `skip`, nothing: its output is zero, for text queries, too; `diagonal`, a band along the sequence;
            `multi_diagonal`, a band in the time-major order; `stripe`, the same key blocks for all queries, which the
            profile holds for each head; `window`, tiles around each tile (STA); `mask`, the blocks that the profile
            holds for each head, in the flattening it holds (PARO).
        density: wanted, for `stripe` and `mask`; what was wanted where the others stand for it.
        width: half-width in tokens of the two diagonals.
        size: the window in tiles; 0 is the whole axis.
        tile: tokens of a tile of the window.

    Raises:
        ValueError: an unknown kind, or a setting that is missing.
    """

    kind: str
    density: float | None = None
    width: int | None = None
    size: tuple[int, int, int] | None = None
    tile: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"pattern: {self.kind!r}; valid: {', '.join(KINDS)}")
        needed = {"diagonal": ("width",), "multi_diagonal": ("width",), "window": ("size", "tile")}
        for name in needed.get(self.kind, ()):
            if getattr(self, name) is None:
                raise ValueError(f"pattern: {self.kind!r} without {name}; valid: {', '.join(needed[self.kind])} given")


@dataclass(frozen=True)
class Model:
    """What a profile was made for.

    Args:
        transformer: class of the transformer.
        layers: its self-attention layers.
        heads: attention heads of a layer.
    """

    transformer: str
    layers: int
    heads: int


@dataclass(frozen=True, eq=False)
class Profile:
    """What calibration found.

    Args:
        method: how it was found.
        model: for which model.
        layout: for which tokens. Text behind the video may be of another length in use.
        block_q, block_k: tokens of a block.
        steps: denoising steps of the runs that were looked at.
        bins: first step of each bin, ascending from 0; the last bin has no end.
        patterns: what heads compute, to be pointed at.
        pattern: uint8 [bins, layers, heads], places in `patterns`.
        stripes: uint8 [bins, layers, heads, ceil(KB / 8)], key blocks as bits (`pack_bits`), for heads with `stripe`.
            Blocks behind the last one with video in it are left out, of queries and of keys.
        axes: uint8 [layers, heads], places in `FLATTENINGS`, for heads with `mask`.
        masks: uint8 [bins, layers, heads, QB, ceil(KB / 8)], for heads with `mask`.
        about: how it was made, in plain values.

    Raises:
        ValueError: parts that do not fit together.
    """

    method: str
    model: Model
    layout: TokenLayout
    block_q: int
    block_k: int
    steps: int
    bins: tuple[int, ...]
    patterns: tuple[Pattern, ...]
    pattern: torch.Tensor
    stripes: torch.Tensor | None = None
    axes: torch.Tensor | None = None
    masks: torch.Tensor | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.block_q not in BLOCK_SIZES or self.block_k not in BLOCK_SIZES:
            raise ValueError(f"profile: blocks of {self.block_q} x {self.block_k}; valid: {BLOCK_SIZES}")
        if not self.bins or self.bins[0] != 0 or any(a >= b for a, b in itertools.pairwise(self.bins)):
            raise ValueError(f"profile: bins {self.bins}; valid: first steps, ascending from 0")
        q_blocks, k_blocks = video_blocks(self.layout, self.block_q), video_blocks(self.layout, self.block_k)
        by_head = [len(self.bins), self.model.layers, self.model.heads]
        shapes = {
            "pattern": by_head,
            "stripes": [*by_head, -(-k_blocks // 8)],
            "axes": by_head[1:],
            "masks": [*by_head, q_blocks, -(-k_blocks // 8)],
        }
        kinds = {pattern.kind for pattern in self.patterns}
        needed = {"pattern"} | ({"stripes"} if "stripe" in kinds else set())
        needed |= {"axes", "masks"} if "mask" in kinds else set()
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if tensor is None and name not in needed:
                continue
            if tensor is None or tensor.dtype is not torch.uint8 or list(tensor.shape) != shape:
                found = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
                raise ValueError(f"profile: {name} is {found}; valid: torch.uint8 {shape}")
        for name, tensor, places in (("pattern", self.pattern, self.patterns), ("axes", self.axes, FLATTENINGS)):
            if tensor is not None and int(tensor.max()) >= len(places):
                raise ValueError(f"profile: {name} points at {int(tensor.max())}; valid: below {len(places)}")

    def bin_of(self, step: int) -> int:
        """The bin of a denoising step from 0."""
        return bisect_right(self.bins, step) - 1

    def kinds_of(self, number: int, layer: int) -> tuple[Pattern, ...]:
        """What each head of a layer computes in a bin."""
        return tuple(self.patterns[place] for place in self.pattern[number, layer].tolist())

    def check_model(self, transformer: str, layers: int) -> None:
        """Raises ValueError when the profile is that of another model."""
        if (transformer, layers) != (self.model.transformer, self.model.layers):
            raise ValueError(
                f"profile: made for {self.model.transformer} with {self.model.layers} layers, and this is "
                f"{transformer} with {layers}; valid: a profile of this model, see sparse-dit calibrate"
            )

    def check_call(self, layout: TokenLayout, heads: int) -> None:
        """Raises ValueError when the profile is that of another grid or number of heads."""
        for name, mine, other in (
            ("grid", self.layout.grid, layout.grid),
            ("text in front", self.layout.text_before, layout.text_before),
            ("heads", self.model.heads, heads),
        ):
            if mine != other:
                raise ValueError(
                    f"profile: {name} {other}, and it was made for {mine}; valid: a profile of this size, "
                    "see sparse-dit calibrate"
                )

    def save(self, path: Path) -> None:
        """Write the file, which appears once it is whole."""
        header = {
            "schema": SCHEMA,
            "method": self.method,
            "model": asdict(self.model),
            "layout": asdict(self.layout),
            "block_q": self.block_q,
            "block_k": self.block_k,
            "steps": self.steps,
            "bins": self.bins,
            "patterns": [
                {name: value for name, value in asdict(pattern).items() if value is not None}
                for pattern in self.patterns
            ],
            "about": dict(self.about),
        }
        save_tensors(path, _tensors(self), header)


def video_blocks(layout: TokenLayout, block: int) -> int:
    """Blocks up to the last one with a video token in it."""
    return -(-(layout.text_before + layout.video_tokens) // block)


def find_profile(file: str) -> Path:
    """The file that a name means: of a profile that comes with the package, or the path of one.

    Raises:
        ValueError: there is none.
    """
    shipped = _SHIPPED / f"{file}.safetensors"
    path = shipped if file in shipped_profiles() else Path(file).expanduser()
    if not file or not path.is_file():
        raise ValueError(
            f"selection.file: {file!r} is no profile; valid: {', '.join(shipped_profiles())}, or a file that "
            "sparse-dit calibrate wrote"
        )
    return path


def shipped_profiles() -> list[str]:
    """Names of the profiles that come with the package."""
    return sorted(path.stem for path in _SHIPPED.glob("*.safetensors"))


def load_profile(path: Path) -> Profile:
    """Read a profile; the same file is read once.

    Raises:
        ValueError: no profile, of another schema, or with parts that do not fit together; one line.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from None
    return _loaded(path.absolute(), stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=8)
def _loaded(path: Path, changed: int, size: int) -> Profile:
    header, tensors = load_tensors(path)
    if header.get("schema") != SCHEMA:
        raise ValueError(f"profile: {str(path)!r} has schema {header.get('schema')!r}; valid: {SCHEMA}")
    try:
        layout = header["layout"]
        return Profile(
            method=header["method"],
            model=Model(**header["model"]),
            layout=replace(TokenLayout(**layout), grid=tuple(layout["grid"])),
            block_q=header["block_q"],
            block_k=header["block_k"],
            steps=header["steps"],
            bins=tuple(header["bins"]),
            patterns=tuple(_pattern(plain) for plain in header["patterns"]),
            about=header["about"],
            **tensors,
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"profile: {str(path)!r} is damaged ({error}); valid: as calibrate writes it") from None
    except ValueError as error:
        raise ValueError(f"{error} (in {str(path)!r})") from None


def _pattern(plain: Mapping[str, Any]) -> Pattern:
    """A pattern from plain values, in which tuples are lists."""
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}
    return Pattern(**values)


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors with a header of plain values; the file appears once it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    plain = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    save_file(plain, partial, metadata={_HEADER: json.dumps(header)})
    os.replace(partial, path)


def load_tensors(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Header and tensors of a file of `save_tensors`, on the CPU.

    Raises:
        ValueError: it is no such file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[_HEADER])
            if not isinstance(header, dict):
                raise TypeError("the header holds no names")
            return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"profile: {str(path)!r} cannot be read ({type(error).__name__}); valid: a file that calibrate wrote"
    )


def _tensors(profile: Profile) -> dict[str, torch.Tensor]:
    named = {name: getattr(profile, name) for name in ("pattern", "stripes", "axes", "masks")}
    return {name: tensor for name, tensor in named.items() if tensor is not None}
