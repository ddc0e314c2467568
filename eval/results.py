"""Result rows: one JSON object a line, whole or not there.

JSON has no infinity. A PSNR of two equal clips is written as the string "inf", which `float()` and data frames read
back; null means *not measured*. NaN is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sparse_dit.pipelines.disk import append_line

SCHEMA = 1
"""Raised whenever a field changes its name or meaning."""

Row = dict[str, Any]


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Adds a row to a JSONL file, whole or not at all; several processes may do so at once.

    Raises:
        ValueError: the row holds NaN or what JSON cannot.
        OSError: the disk does not take it; the file is then as before.
    """
    line = to_json(row).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    append_line(path, line)


def load_rows(path: Path) -> list[Row]:
    """Reads the rows of a JSONL file; none where there is no file. A torn last line is no row.

    Raises:
        ValueError: a whole line is no JSON object, or its schema is another one; names the line.
    """
    rows, complaints = read_rows(path)
    if complaints:
        raise ValueError(complaints[0])
    return rows


def read_rows(path: Path) -> tuple[list[Row], list[str]]:
    """`load_rows` that goes on behind a damaged line: the rows, and a line of complaint for each that is none."""
    rows: list[Row] = []
    complaints: list[str] = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1] if path.exists() else [], start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            complaints.append(f"{path} line {number} is no JSON: {error}")
            continue
        if not isinstance(row, dict) or row.get("schema") != SCHEMA:
            complaints.append(f"{path} line {number} has another schema; valid: schema {SCHEMA}")
            continue
        rows.append({name: math.inf if value == "inf" else value for name, value in row.items()})
    return rows, complaints


def to_json(row: Mapping[str, Any], indent: int | None = None) -> str:
    """A row as JSON text with its schema; infinity becomes "inf".

    Raises:
        ValueError: the row holds NaN.
    """
    return json.dumps(_finite({"schema": SCHEMA, **row}), indent=indent, allow_nan=False)


def identity(**what: Any) -> str:
    """A short digest of what was asked (model, recipe, seed, prompt, …): equal askings have equal digests."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def command_line(program: str, arguments: Sequence[str]) -> str:
    """How a run was asked for, as rows tell it; of absolute paths, which mean nothing elsewhere, only the last part.

    Args:
        program: what is typed first, such as "sparse-dit".
        arguments: what follows, an item each.
    """
    told = []
    for argument in arguments:
        option, is_set, value = argument.rpartition("=") if argument.startswith("-") else ("", "", argument)
        told.append(f"{option}{is_set}{Path(value).name if Path(value).is_absolute() else value}")
    return shlex.join([*program.split(), *told])


def provenance() -> Row:
    """Where a row comes from: versions, git revision (null outside a checkout) and time (UTC)."""
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "revision": _revision(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def device_of(device: Any, dtype: Any) -> Row:
    """What a run ran on: kind, name, number type and, on a CPU, threads."""
    import torch

    device = torch.device(device)
    number_type = str(dtype).removeprefix("torch.")
    if device.type == "cuda":
        return {"type": "cuda", "name": torch.cuda.get_device_name(device), "dtype": number_type}
    return {"type": device.type, "name": _cpu_name(), "dtype": number_type, "threads": torch.get_num_threads()}


_PACKAGES = ("sparse-dit", "torch", "triton", "diffusers", "transformers")


def _cpu_name() -> str:
    """The processor's own name where Linux tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@lru_cache(maxsize=1)
def _revision() -> str | None:
    """The commit this very file is part of, with `+` where tracked files differ from it, when it was first asked for:
    what a process has loaded does not change under it.

    A copy without its history (a container, say) can be told its commit in SPARSE_DIT_REVISION.
    """
    if told := os.environ.get("SPARSE_DIT_REVISION"):
        return told
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # an installed copy may sit inside somebody else's repository
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return value
