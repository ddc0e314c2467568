"""Launch settings measured on the GPU at hand: what `sparse-dit tune-tiles` writes into the user's file.

`python -m sparse_dit.eval.bench.tune` runs it where the command line's own packages are missing.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path

import torch

from sparse_dit.eval.bench.cases import BLOCK_Q, TYPICAL, Case, Shape
from sparse_dit.eval.bench.clock import Clock, CudaClock, current_gpu
from sparse_dit.eval.bench.inputs import Inputs
from sparse_dit.eval.bench.work import Work, work
from sparse_dit.kernels import tiles
from sparse_dit.kernels.tiles import PRECISIONS, Launch, TileRow, architecture, pinned, trial

HEADS, TOKENS = 16, 16384
WORTH = 0.98  # a launch that takes more than this share of the pinned one's time is no better than it
WRONG = 1.5  # one whose error is above so many times the pinned one's computes something else
# Tiles and warps, and the stages tried with each. 16 KB to 64 KB a stage at a head size of 128.
_TILES = ((128, 64, 8), (128, 128, 8), (128, 32, 8), (128, 64, 4), (128, 32, 4), (64, 64, 4), (64, 32, 4), (64, 32, 8))
_STAGES = (3, 2, 4)


@dataclass
class Tuned:
    """What came of one kernel, precision and head size.

    Attributes:
        row: the fastest, its origin saying that it was measured.
        ms: its time.
        pinned_ms: that of the row pinned so far.
        tried: how many launches were measured.
        refused: why others were not taken, by launch: too much shared memory, say, or wrong results.
        whole: whether time allowed all candidates.
    """

    row: TileRow
    ms: float
    pinned_ms: float
    tried: int = 1
    refused: dict[Launch, str] = field(default_factory=dict)
    whole: bool = True


def candidates(first: Launch) -> list[Launch]:
    """Launches to try, the one pinned so far first, then its other stages, then other tiles."""
    tiles = [(first.tile_q, first.tile_k, first.num_warps), *_TILES]
    return list(dict.fromkeys([first, *(Launch(*tile, stages) for tile, stages in product(tiles, _STAGES))]))


def tune(
    device: torch.device, dtype: torch.dtype, clock: Clock, head_sizes: Sequence[int], seconds: float
) -> Iterator[Tuned | str]:
    """Tries launches of every kernel and precision at head sizes.

    Args:
        device: what it is measured on.
        dtype: of q, k and v.
        clock: what times.
        head_sizes: those of rows.
        seconds: no launch is tried later than so long after the start. Each kernel, precision and head size has an even
            share of what is left when its turn comes.

    Yields:
        What came of each, or one line that says why nothing did.
    """
    end = time.monotonic() + seconds
    origin = f"measured on {_name(device)}, {datetime.now(UTC).date().isoformat()}"
    turns = [(kernel, precision) for kernel, precisions in PRECISIONS.items() for precision in precisions]
    left = len(turns) * len(head_sizes)
    for head_size in head_sizes:
        inputs = Inputs(Shape(HEADS, TOKENS, head_size), device, dtype, sets=1, seed=0)
        for kernel, precision in turns:
            what = f"{kernel}, {precision}, head size {head_size}"
            now = time.monotonic()
            share, left = (end - now) / left, left - 1
            if now > end:
                yield f"{what}: not tried, the {seconds:g} seconds were over"
                continue
            case = Case("attention", "triton", TYPICAL, precision, codes=precision != "native")
            if kernel == "mass":
                case = Case("mass", "mass")
            try:
                found = pinned(kernel, precision, head_size, architecture(device))
                todo = work(case, inputs)
                row = replace(found, architecture=architecture(device), origin=origin)
                yield _best(row, todo, clock, now + share)
            except Exception as error:
                yield f"{what}: {' '.join(str(error).split())[:200]}"
                if not clock.alive():
                    return


def _best(row: TileRow, todo: Work, clock: Clock, end: float) -> Tuned:
    """Tries the launches of a row; what the pinned one raises passes through."""
    with trial(row):
        pinned_ms, exact = clock.measure(todo.call).ms, _error(todo)
    best = Tuned(row, pinned_ms, pinned_ms)
    for launch in candidates(row.launch)[1:]:
        if time.monotonic() > end:
            best.whole = False
            break
        tried = replace(row, launch=launch)
        try:
            with trial(tried):
                ms, error = clock.measure(todo.call).ms, _error(todo)
        except Exception as failure:
            best.refused[launch] = " ".join(str(failure).split())[:200]
            if not clock.alive():
                raise
            continue
        best.tried += 1
        if not error <= WRONG * exact:
            best.refused[launch] = f"its error is {error:.2g}, that of the pinned launch {exact:.2g}"
        elif ms < min(best.ms, WORTH * pinned_ms):
            best.row, best.ms = tried, ms
    return best


def _error(todo: Work) -> float:
    return math.nan if todo.error is None else todo.error()


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def line(found: Tuned) -> str:
    """What came of a kernel, precision and head size in one line."""
    row, launch = found.row, found.row.launch
    settings = f"{launch.tile_q} x {launch.tile_k}, {launch.num_warps} warps, {launch.num_stages} stages"
    rest = "" if found.whole else ", time was up before all were tried"
    return (
        f"{row.kernel}, {row.precision}, head size {row.head_size}: {settings}, {found.ms:.3f} ms "
        f"(pinned {found.pinned_ms:.3f} ms; {found.tried} measured, {len(found.refused)} refused{rest})"
    )


@dataclass(frozen=True)
class Request:
    """What to try.

    Args:
        head_sizes: of `tiles.HEAD_SIZES`.
        seconds: no launch is tried later.

    Raises:
        ValueError: another head size, or no time.
    """

    head_sizes: Sequence[int] = (128, 64, 256)
    seconds: float = 600.0

    def __post_init__(self) -> None:
        for size in self.head_sizes:
            if size not in tiles.HEAD_SIZES:
                raise ValueError(f"head_sizes: {size}; valid: of {tiles.HEAD_SIZES}")
        if not self.seconds > 0:
            raise ValueError(f"seconds: {self.seconds}; valid: above 0")


def run(request: Request, file: Path | None, clock: Clock | None = None) -> None:
    """Tries launches on the current GPU, and prints and writes what came of each as soon as it is there.

    Args:
        request: what to try.
        file: gets the rows, where it keeps those of other GPUs; None is the one that kernels read.
        clock: what times; None is `CudaClock`.

    Raises:
        ValueError: there is no GPU, or the file is there and is none of rows.
    """
    device, file = current_gpu(), tiles.user_file() if file is None else file
    if file.exists():
        tiles.read_rows(file.read_text(encoding="utf-8"), str(file))
    print(f"measuring {HEADS} heads, {TOKENS} tokens, density {TYPICAL:g}, blocks of {BLOCK_Q} x {BLOCK_Q}")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for found in tune(device, dtype, clock or CudaClock(device), request.head_sizes, request.seconds):
        if isinstance(found, Tuned):
            tiles.write_rows([found.row], file)
        print(line(found) if isinstance(found, Tuned) else found, flush=True)
    print(f"wrote {file}" if file.exists() else f"nothing was measured; {file} was not written")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `tune-tiles` without the command line's own packages; returns the exit code."""
    usual = Request()
    parser = argparse.ArgumentParser(prog="python -m sparse_dit.eval.bench.tune", description=main.__doc__)
    parser.add_argument("--head_sizes", nargs="+", type=int, default=list(usual.head_sizes), metavar="SIZE")
    parser.add_argument("--seconds", type=float, default=usual.seconds)
    parser.add_argument("--out", type=Path, help="the file; by default the one that kernels read")
    given = parser.parse_args(argv)
    try:
        run(Request(given.head_sizes, given.seconds), given.out)
    except ValueError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
