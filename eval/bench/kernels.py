"""One run over many cases: each timed, compared with float64, and set beside the dense kernel of the same run.

`python -m sparse_dit.eval.bench.kernels` runs it where the command line's own packages are missing.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from sparse_dit.eval.bench.cases import BLOCK_Q, DENSITIES, SHAPES, Case, Group, plan, read_shape
from sparse_dit.eval.bench.clock import Call, Clock, CudaClock, current_gpu
from sparse_dit.eval.bench.inputs import Inputs
from sparse_dit.eval.bench.lines import left_out_line, row_line
from sparse_dit.eval.bench.work import work
from sparse_dit.eval.bench.yardsticks import dense_kernel, others
from sparse_dit.eval.results import Row, append_row, command_line, device_of, load_rows, provenance
from sparse_dit.kernels.backends import is_hopper

MEASURED, FAILED, LEFT_OUT = "measured", "failed", "left out"
ROWS_FILE = "eval/results/bench-kernels.jsonl"


def our_backends(device: torch.device) -> list[str]:
    """Our backends that a device runs, the fastest first."""
    if device.type != "cuda":
        return ["host"]
    return ["hopper", "triton"] if is_hopper(device) else ["triton"]


@dataclass
class Bench:
    """A run.

    Args:
        device: what it runs on.
        dtype: of q, k and v.
        clock: what times.
        seconds: no case starts later than so long after `rows` is called.
        command: how the run was asked for, as the rows tell it.
        seed: of inputs and lists.
    """

    device: torch.device
    dtype: torch.dtype
    clock: Clock
    seconds: float
    command: str
    seed: int = 0

    def rows(self, groups: Sequence[Group]) -> Iterator[Row]:
        """Measures group by group and yields a row a case, the dense kernel's first.

        A row's `status` is "measured"; "failed", with a `reason`; or "left out", for time was up or the device gone.
        `ratio` is the dense kernel's time through the case's own, `dense_ms` the mean of its two measurements, before
        and after the group, and `dense_spread` their distance in shares of it. `on_top` is what summaries cost on top
        of dropping, as a share of that.
        """
        self._end = time.monotonic() + self.seconds
        self._lost = ""
        self._copy_rate = self.clock.copy_rate()
        self._origin = {"device": device_of(self.device, self.dtype), "command": self.command, **provenance()}
        if self.device.type == "cuda":
            self._origin["device"]["cudnn"] = torch.backends.cudnn.version()
        for group in groups:
            yield from self._group(group)
            if self.device.type == "cuda" and not self._lost:
                torch.cuda.empty_cache()

    def _group(self, group: Group) -> list[Row]:
        dense = Case("attention", dense_kernel(self.device))
        if self._out_of_time() or self._lost:
            return [self._unmeasured(group, case, LEFT_OUT, self._why_left_out()) for case in group.cases]
        try:
            shape = group.shape
            size = 3 * shape.heads * shape.tokens * shape.head_size * self.dtype.itemsize
            inputs = Inputs(shape, self.device, self.dtype, self.clock.input_sets(size), self.seed)
        except Exception as error:
            return [self._failure(group, case, error) for case in group.cases]
        rows = [self._measured(group, dense, inputs)]
        for case in group.cases:
            if self._out_of_time() or self._lost:
                rows.append(self._unmeasured(group, case, LEFT_OUT, self._why_left_out()))
            else:
                rows.append(self._measured(group, case, inputs))
        ends = [rows[0], *([] if self._lost else [self._measured(group, dense, inputs)])]
        return [self._beside(row, [end["ms"] for end in ends if end["status"] == MEASURED]) for row in rows]

    def _measured(self, group: Group, case: Case, inputs: Inputs) -> Row:
        # Other people's kernels fail in ways of their own; each failure is a row.
        try:
            todo = work(case, inputs)
            timing = self.clock.measure(todo.call)
            on_top = self._on_top(case, inputs, todo.call)
            error = None if todo.error is None else todo.error()
            density = inputs.blocks(case).density(group.shape.tokens, group.shape.tokens)
        except Exception as error:
            return self._failure(group, case, error)
        if error is not None and not math.isfinite(error):
            return self._unmeasured(group, case, FAILED, "the output is not finite")
        rate = None if todo.moved is None else todo.moved / timing.ms / 1e9
        attention = case.what == "attention"
        return self._row(group, case) | {
            "status": MEASURED,
            "density": density if attention else None,
            "ms": timing.ms,
            "runs": timing.runs,
            "on_top": on_top,
            "tflops": group.shape.flop * density / timing.ms / 1e9 if attention else None,
            "error": error,
            "tb_per_s": rate,
            "share_of_copy": None if rate is None else rate / self._copy_rate,
        }

    def _on_top(self, case: Case, inputs: Inputs, call: Call) -> float | None:
        """What summaries cost on top of dropping, as a share of that, both timed in turn."""
        if case.skipped == "drop":
            return None
        dropped, whole = self.clock.in_turn([work(replace(case, skipped="drop"), inputs).call, call])
        return whole / dropped - 1

    def _beside(self, row: Row, dense: Sequence[float]) -> Row:
        """The row with the times of the dense kernel, those that there are."""
        if not dense:
            return row
        mean = sum(dense) / len(dense)
        spread = (max(dense) - min(dense)) / mean if len(dense) > 1 else None
        ratio = mean / row["ms"] if row["status"] == MEASURED else None
        return row | {"dense_ms": mean, "dense_spread": spread, "ratio": ratio}

    def _failure(self, group: Group, case: Case, error: Exception) -> Row:
        if not self.clock.alive():
            self._lost = "the device takes no more work since an earlier failure"
        text = " ".join(str(error).split()) or type(error).__name__
        return self._unmeasured(group, case, FAILED, text[:300])

    def _unmeasured(self, group: Group, case: Case, status: str, reason: str) -> Row:
        return self._row(group, case) | {"status": status, "reason": reason}

    def _row(self, group: Group, case: Case) -> Row:
        shape = {"batch": 1, **asdict(group.shape)}
        lists = {"blocks": [BLOCK_Q, case.block_k], "lists": case.lists, "wanted_density": case.density}
        told = {name: getattr(case, name) for name in ("what", "kernel", "precision", "ordered", "codes", "skipped")}
        empty = dict.fromkeys((
            "reason", "density", "ms", "runs", "on_top", "tflops", "error", "tb_per_s", "share_of_copy",
            "dense_ms", "dense_spread", "ratio",
        ))  # fmt: skip
        dense = dense_kernel(self.device)
        return {"kind": "kernel", "shape": shape, **told, **lists, "dense": dense, **empty} | {
            "copy_tb_per_s": self._copy_rate, "seed": self.seed, **self._origin,
        }  # fmt: skip

    def _out_of_time(self) -> bool:
        return time.monotonic() > self._end

    def _why_left_out(self) -> str:
        return self._lost or f"the {self.seconds:g} seconds were over"


@dataclass(frozen=True)
class Request:
    """What to measure.

    Args:
        shapes: HEADSxTOKENSxHEAD_SIZE each.
        densities: of the block lists, above 0 and up to 1.
        seconds: no case starts later; what matters most is measured first.
        flex: whether FlexAttention is measured, which compiles for long.

    Raises:
        ValueError: what is no shape or no density, or no time.
    """

    shapes: Sequence[str] = tuple(map(str, SHAPES))
    densities: Sequence[float] = DENSITIES
    seconds: float = 120.0
    flex: bool = True

    def __post_init__(self) -> None:
        for text in self.shapes:
            read_shape(text)
        for density in self.densities:
            if not 0 < density <= 1:
                raise ValueError(f"densities: {density}; valid: above 0 and up to 1")
        if not self.seconds > 0:
            raise ValueError(f"seconds: {self.seconds}; valid: above 0")

    def groups(self, device: torch.device) -> list[Group]:
        """All that a device can run of it, in the order of its weight."""
        shapes = [read_shape(text) for text in self.shapes]
        return plan(shapes, self.densities, our_backends(device), others(device), self.flex)


def run(request: Request, rows_file: Path, command: str, clock: Clock | None = None) -> list[Row]:
    """Measures what is asked for on the current GPU, and appends and prints each row as soon as it is there.

    Args:
        request: what to measure.
        rows_file: the JSONL file.
        command: how the run was asked for, as the rows tell it.
        clock: what times; None is `CudaClock`.

    Returns:
        The rows, those of what time did not allow at the end of their group; only these are not in the file.

    Raises:
        ValueError: there is no GPU, or as `load_rows`.
    """
    device = current_gpu()
    load_rows(rows_file)  # a damaged file is told before anything is measured
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found = []
    for row in Bench(device, dtype, clock or CudaClock(device), request.seconds, command).rows(request.groups(device)):
        if row["status"] != LEFT_OUT:
            append_row(rows_file, row)
        found.append(row)
        print(row_line(row), flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `bench kernels` without the command line's own packages; returns the exit code."""
    usual = Request()
    parser = argparse.ArgumentParser(prog="python -m sparse_dit.eval.bench.kernels", description=main.__doc__)
    parser.add_argument("--shapes", nargs="+", default=list(usual.shapes), metavar="HEADSxTOKENSxHEAD_SIZE")
    parser.add_argument("--densities", nargs="+", type=float, default=list(usual.densities), metavar="DENSITY")
    parser.add_argument("--seconds", type=float, default=usual.seconds)
    parser.add_argument("--no_flex", action="store_true", help="leave out FlexAttention, which compiles for long")
    parser.add_argument("--out", type=Path, default=Path(ROWS_FILE))
    given = parser.parse_args(argv)
    command = command_line(parser.prog, sys.argv[1:] if argv is None else argv)
    try:
        request = Request(given.shapes, given.densities, given.seconds, not given.no_flex)
        rows = run(request, given.out, command)
    except ValueError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    if left := [row for row in rows if row["status"] == LEFT_OUT]:
        print(left_out_line(left))
    print(f"wrote {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
