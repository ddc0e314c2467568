"""Pinned launch settings by kernel, architecture, head size and precision: a table, and no timing.

Rows come with the package in tiles.json. A file of the user's, which `sparse-dit tune-tiles` writes, goes before it:
the one that SPARSE_DIT_TILES names, else sparse_dit/tiles.json in $XDG_CACHE_HOME or ~/.cache. It is read once.
"""

import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch

PRECISIONS = {"attention": ("native",), "attention_int8": ("int8", "int8_fp8"), "mass": ("native",)}
"""What is computed in the arithmetic of its inputs and what from codes, by kernel."""
HEAD_SIZES = (64, 128, 256)
"""Head sizes of rows; others are rounded up."""
USER_FILE = "SPARSE_DIT_TILES"
CPU = "cpu"
_CPU_LIKE = "sm_86"
_NVIDIA = re.compile(r"sm_(\d+)")
_AMD = re.compile(r"gfx[0-9a-f]+")
# By field, what it may be. Tiles are cut to blocks, of which the largest has 128 tokens.
_VALID = {
    "tile_q": (16, 32, 64, 128),
    "tile_k": (16, 32, 64, 128),
    "num_warps": (1, 2, 4, 8, 16),
    "num_stages": (1, 2, 3, 4, 5, 6),
}

Key = tuple[str, str, int, str]
"""Kernel, architecture, head size, precision."""


@dataclass(frozen=True)
class Launch:
    """How a kernel is cut and launched: queries and keys a tile, warps a program, tiles in flight."""

    tile_q: int
    tile_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class TileRow:
    """A launch and what it is for.

    Attributes:
        kernel: one of `PRECISIONS`.
        architecture: as `architecture` says.
        head_size: one of `HEAD_SIZES`.
        precision: one of those of the kernel.
        launch: how it is launched.
        origin: "measured on ..." or "reasoned: ...".
    """

    kernel: str
    architecture: str
    head_size: int
    precision: str
    launch: Launch
    origin: str

    @property
    def key(self) -> Key:
        """What the row is looked up by."""
        return self.kernel, self.architecture, self.head_size, self.precision

    def to_dict(self) -> dict[str, Any]:
        """As it stands in a file."""
        told = {name: getattr(self, name) for name in ("kernel", "architecture", "head_size", "precision")}
        return told | asdict(self.launch) | {"origin": self.origin}


_tried: ContextVar[Mapping[Key, TileRow]] = ContextVar("tried")


def architecture(device: torch.device) -> str:
    """The architecture of a device as compilers name it: "sm_90", "gfx942"; that of a CPU is "cpu"."""
    if device.type != "cuda":
        return "cpu"
    if torch.version.hip is not None:
        name: str = torch.cuda.get_device_properties(device).gcnArchName
        return name.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def pinned(kernel: str, precision: str, head_size: int, arch: str) -> TileRow:
    """The row of a call.

    An architecture without rows is given those of the nearest lower one that has some (sm_103: sm_100; sm_75, below
    all: sm_80; any other AMD one: gfx942), and a warning tells so once. A CPU, where the kernels are only interpreted,
    is given those of sm_86, which are small.

    Args:
        kernel: one of `PRECISIONS`.
        precision: one of those of the kernel.
        head_size: D, up to 256.
        arch: as `architecture` says.

    Raises:
        ValueError: there is no such row, or a file of rows is damaged.
    """
    wide = next((size for size in HEAD_SIZES if head_size <= size), None)
    rows: Mapping[Any, TileRow] = {**_rows(), **tried} if (tried := _tried.get({})) else _rows()
    if row := rows.get((kernel, arch, wide, precision)):
        return row
    wanted = (kernel, wide, precision)
    known = {row.architecture for row in rows.values() if (row.kernel, row.head_size, row.precision) == wanted}
    found = _nearest(arch, known)
    if wide is None or found is None:
        raise ValueError(
            f"tiles: no row for {kernel}, {precision}, head size {head_size} on {arch}; valid: a kernel and precision "
            f"of {PRECISIONS}, a head size up to {HEAD_SIZES[-1]}, an NVIDIA GPU, or gfx942 without int8_fp8"
        )
    if found != arch and arch != CPU:
        _tell(arch, found)
    return rows[kernel, found, wide, precision]


@contextmanager
def trial(row: TileRow) -> Iterator[None]:
    """Within the block, calls that the row is for are launched as it says. For measuring."""
    token = _tried.set({row.key: row})
    try:
        yield
    finally:
        _tried.reset(token)


def in_trial() -> bool:
    """Whether a `trial` is on."""
    return bool(_tried.get({}))


def user_file() -> Path:
    """Where the user's rows are read from and written to."""
    if named := os.environ.get(USER_FILE):
        return Path(named)
    cache_folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_folder) / "sparse_dit" / "tiles.json"


def read_rows(text: str, file: str) -> list[TileRow]:
    """The rows of a file.

    Args:
        text: what it holds: a JSON list of objects, see `TileRow.to_dict`.
        file: its name, for errors.

    Raises:
        ValueError: it is none, or a row has a field that is missing, unknown or not valid; names file, row and field.
    """
    try:
        plain = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file}: no JSON ({error}); valid: a list of rows") from None
    if not isinstance(plain, list):
        raise ValueError(f"{file}: {type(plain).__name__}; valid: a list of rows")
    rows: dict[Key, TileRow] = {}
    for number, values in enumerate(plain, start=1):
        row = _read_row(values, f"{file} row {number}")
        if row.key in rows:
            raise ValueError(f"{file} row {number}: {row.key} stands there twice; valid: one row each")
        rows[row.key] = row
    return list(rows.values())


def write_rows(rows: Sequence[TileRow], path: Path) -> None:
    """Writes rows, a line each, whole or not at all; rows already in the file stay unless one of these replaces them.

    Raises:
        ValueError: the file is there and is none of rows.
        OSError: it cannot be written.
    """
    kept = read_rows(path.read_text(encoding="utf-8"), str(path)) if path.exists() else []
    merged = {row.key: row for row in (*kept, *rows)}
    lines = ",\n".join(json.dumps(merged[key].to_dict()) for key in sorted(merged))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        partial.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    _rows.cache_clear()


@cache
def _rows() -> dict[Key, TileRow]:
    """The package's rows, the user's in place of those that they are for."""
    text = (resources.files("sparse_dit.kernels") / "tiles.json").read_text(encoding="utf-8")
    rows = read_rows(text, "tiles.json")
    path = user_file()
    if path.is_file():
        rows += read_rows(path.read_text(encoding="utf-8"), str(path))
    elif USER_FILE in os.environ:
        raise ValueError(f"{USER_FILE}: {str(path)!r} is no file; valid: one that sparse-dit tune-tiles wrote")
    return {row.key: row for row in rows}


def _read_row(values: Any, where: str) -> TileRow:
    names = [field.name for field in fields(TileRow) if field.name != "launch"]
    expected = [*names[:-1], *_VALID, "origin"]
    if not isinstance(values, dict) or sorted(values) != sorted(expected):
        told = sorted(values) if isinstance(values, dict) else values
        raise ValueError(f"{where}: {told!r}; valid: the fields {', '.join(expected)}")
    kernel = values["kernel"]
    valid: Mapping[str, Sequence[Any]] = {
        "kernel": tuple(PRECISIONS),
        "precision": PRECISIONS.get(kernel, ()) if isinstance(kernel, str) else (),
        "head_size": HEAD_SIZES,
        **_VALID,
    }
    for name, allowed in valid.items():
        if type(values[name]) not in (int, str) or values[name] not in allowed:
            raise ValueError(f"{where} {name}: {values[name]!r}; valid: one of {allowed}")
    name = values["architecture"]
    if not isinstance(name, str) or not (_NVIDIA.fullmatch(name) or _AMD.fullmatch(name)):
        raise ValueError(f"{where} architecture: {name!r}; valid: sm_NUMBER or gfxNUMBER")
    if not isinstance(values["origin"], str) or not values["origin"]:
        raise ValueError(f"{where} origin: {values['origin']!r}; valid: where the numbers come from")
    launch = Launch(**{name: values[name] for name in _VALID})
    return TileRow(**{name: values[name] for name in names}, launch=launch)


def _nearest(arch: str, known: set[str]) -> str | None:
    """Of known architectures the one itself, the highest lower one, or the lowest; only AMD ones for AMD ones."""
    if arch in known:
        return arch
    if _AMD.fullmatch(arch):
        return max((name for name in known if _AMD.fullmatch(name)), default=None)
    wanted = _number(_CPU_LIKE if arch == CPU else arch)
    numbers = sorted(_number(name) for name in known if _NVIDIA.fullmatch(name))
    lower = [number for number in numbers if number <= wanted]
    return f"sm_{(lower or numbers)[-1 if lower else 0]}" if numbers else None


def _number(arch: str) -> int:
    found = _NVIDIA.fullmatch(arch)
    if found is None:
        raise ValueError(f"arch: {arch!r}; valid: sm_NUMBER, gfxNUMBER or {CPU}")
    return int(found[1])


@cache
def _tell(arch: str, found: str) -> None:
    message = f"no launch settings are pinned for {arch}: those of {found} are taken; sparse-dit tune-tiles measures it"
    warnings.warn(message, RuntimeWarning, stacklevel=3)
