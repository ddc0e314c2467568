"""Launch settings measured on the GPU at hand: what `sparse-dit tune-tiles` writes into the user's file."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import product

import torch

from sparse_dit.eval.bench.cases import BLOCK_Q, TYPICAL, Case, Shape
from sparse_dit.eval.bench.clock import Clock
from sparse_dit.eval.bench.inputs import Inputs
from sparse_dit.eval.bench.work import Work, work
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
        seconds: no launch is tried later than so long after the start.

    Yields:
        What came of each, or one line that says why nothing did.
    """
    end = time.monotonic() + seconds
    origin = f"measured on {_name(device)}, {datetime.now(UTC).date().isoformat()}"
    for head_size in head_sizes:
        inputs = Inputs(Shape(HEADS, TOKENS, head_size), device, dtype, sets=1, seed=0)
        for kernel, precisions in PRECISIONS.items():
            for precision in precisions:
                what = f"{kernel}, {precision}, head size {head_size}"
                if time.monotonic() > end:
                    yield f"{what}: not tried, the {seconds:g} seconds were over"
                    continue
                case = Case("attention", "triton", TYPICAL, precision, codes=precision != "native")
                if kernel == "mass":
                    case = Case("mass", "mass")
                try:
                    found = pinned(kernel, precision, head_size, architecture(device))
                    todo = work(case, inputs)
                    row = replace(found, architecture=architecture(device), origin=origin)
                    yield _best(row, todo, clock, end)
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


def measured_on() -> str:
    """What is measured, in words."""
    return f"{HEADS} heads, {TOKENS} tokens, density {TYPICAL:g}, blocks of {BLOCK_Q} x {BLOCK_Q}"
