"""One denoising step of published architectures: the model's own attention beside ours, in one run on one device.

A step is one forward of the transformer. Weights are random, so times and memory mean something and images do not.
`python -m sparse_dit.eval.bench.models` runs it where the command line's own packages are missing.
"""

import argparse
import gc
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from sparse_dit.eval.bench.architectures import ARCHITECTURES, Architecture
from sparse_dit.eval.bench.kernels import FAILED, LEFT_OUT, MEASURED
from sparse_dit.eval.bench.steps import Measured, Subject, Times
from sparse_dit.eval.bench.variants import STOCK, VARIANTS, Variant
from sparse_dit.eval.bench.yardsticks import dense_kernel
from sparse_dit.eval.results import Row, append_row, command_line, device_of, load_rows, provenance

ROWS_FILE = "eval/results/bench-models.jsonl"
LARGEST_ERROR = 0.1  # of dense attention through our kernel: rounding in 16 bits, carried through the layers


@dataclass
class StepBench:
    """A run over cases.

    Args:
        device: what it runs on.
        dtype: of weights and arguments.
        seconds: of a case; no variant starts later than so long after its case began.
        command: how the run was asked for, as the rows tell it.
        compiled: whether layers run under `torch.compile`; attention and host are then not timed apart.
        seed: of weights and arguments.
    """

    device: torch.device
    dtype: torch.dtype
    seconds: float
    command: str
    compiled: bool = False
    seed: int = 0

    def rows(self, case: Architecture, variants: Sequence[str], done: Sequence[Row] = ()) -> Iterator[Row]:
        """Measures a case and yields a row a variant.

        `ratio` is the time of the stock model through the row's own. The stock model is timed first, and once more
        (`ms_after`) at the end, where its row comes. A row's `status` is "measured"; "failed", with a `reason`; or
        "left out", as its time was up or the device gone.

        Args:
            case: what to measure.
            variants: names in `VARIANTS`, in this order.
            done: rows of earlier runs; what they measured on the same device and revision is not measured again.
        """
        end = time.monotonic() + self.seconds
        self._origin = {"device": device_of(self.device, self.dtype), "command": self.command, **provenance()}
        if self.device.type == "cuda":
            self._origin["device"]["cudnn"] = torch.backends.cudnn.version()
        missing = [name for name in (STOCK, *variants) if not any(self._same(row, case, name) for row in done)]
        if not missing:
            return
        try:
            subject = Subject(case, self.device, self.dtype, self.compiled, self.seed)
            stock = subject.measure(None)
        except Exception as error:
            yield self._row(case, STOCK) | {"status": FAILED, "reason": _one_line(error)}
            return
        for name in missing:
            if name == STOCK:
                continue
            if time.monotonic() > end or not self._alive():
                reason = f"the {self.seconds:g} seconds were over" if self._alive() else "the device takes no more work"
                yield self._row(case, name) | {"status": LEFT_OUT, "reason": reason}
                continue
            yield self._variant(subject, name, VARIANTS[name], stock)
        if STOCK in missing and self._alive():
            yield self._stock(subject, stock)

    def _same(self, row: Row, case: Architecture, variant: str) -> bool:
        """Whether a row of an earlier run measured this."""
        wanted = self._row(case, variant) | {"status": MEASURED}
        names = ("case", "variant", "tiny", "compiled", "status", "revision", "device")
        return all(row.get(name) == wanted[name] for name in names)

    def _variant(self, subject: Subject, name: str, variant: Variant, stock: Measured) -> Row:
        row = self._row(subject.case, name)
        # Whatever goes wrong is the row's own: the others go on.
        try:
            recipe = variant.recipe(subject.layout)
            row |= {"recipe": recipe.to_dict(), "precision": variant.precision, "wanted_density": variant.density}
            found = subject.measure(recipe)
            error = float((found.out - stock.out).float().norm() / stock.out.float().norm())
            if variant.density == 1.0 and error > LARGEST_ERROR:
                raise RuntimeError(
                    f"dense attention through our kernel is {error:.3f} off; {LARGEST_ERROR} is rounding"
                )
        except Exception as failure:
            return row | {"status": FAILED, "reason": _one_line(failure)}
        return row | self._numbers(subject, found, stock) | {
            "expected_density": subject.expected_density(recipe), "error": error,
        }  # fmt: skip

    def _stock(self, subject: Subject, stock: Measured) -> Row:
        """The stock model's row, with its time after the others."""
        row, after = self._row(subject.case, STOCK), Times()
        try:
            if not self.compiled:  # which would compile once more
                with subject.layers_run(subject.timed):
                    subject.forward(after)
        except Exception as failure:
            return row | {"status": FAILED, "reason": _one_line(failure)}
        ends = {"ms_after": after.ms if after.device else None, "host_us_per_call": None}
        return row | self._numbers(subject, stock, stock) | ends

    def _numbers(self, subject: Subject, found: Measured, stock: Measured) -> Row:
        ms = found.times.ms
        told, host = found.told, found.host
        return {
            "status": MEASURED,
            "tokens": subject.layout.length,
            "padding": subject.case.padding,
            "layout": asdict(subject.layout),
            "layers": list(subject.layers),
            "layers_timed": list(subject.timed),
            "parameters": sum(weight.numel() for weight in subject.model.parameters()),
            "ms": ms,
            "ms_each": found.times.device,
            "runs": len(found.times.device),
            "stock_ms": stock.times.ms,
            "ratio": stock.times.ms / ms,
            "attention_ms": found.attention_ms,
            "attention_share": None if found.attention_ms is None else found.attention_ms / ms,
            "peak_bytes": found.peak,
            "peak_ratio": found.peak / stock.peak if found.peak and stock.peak else None,
            "host_calls": None if host is None else host.calls,
            "host_own_us": None if host is None else host.own,
            "host_us_per_call": None if host is None else host.beyond,
            "density": None if told is None else told.density,
            "backend": None if told is None else told.backend,
            "calls": None if told is None else {"made": told.made, "sparse": told.sparse, "dense": told.dense},
        }

    def _row(self, case: Architecture, variant: str) -> Row:
        empty = dict.fromkeys((
            "reason", "recipe", "precision", "wanted_density", "density", "expected_density", "backend", "ms", "ratio",
            "stock_ms", "ms_after", "attention_share", "peak_ratio", "host_us_per_call", "error",
        ))  # fmt: skip
        return {"kind": "model", "case": case.name, "variant": variant, "model": case.transformer} | empty | {
            "tiny": case.shrunken, "compiled": self.compiled, "dense": dense_kernel(self.device), "seed": self.seed,
            **self._origin,
        }  # fmt: skip

    def _alive(self) -> bool:
        """Whether the device still takes work: an illegal access ends a CUDA context for good."""
        try:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except RuntimeError:
            return False
        return True


def _one_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


@dataclass(frozen=True)
class Request:
    """What to measure.

    Args:
        cases: names in `ARCHITECTURES`.
        variants: names in `VARIANTS`; the stock model is always measured.
        seconds: of a case.
        compiled: whether layers run under `torch.compile`.
        tiny: tiny models instead, also on a CPU: whether everything runs, not how fast.

    Raises:
        ValueError: an unknown name, or no time.
    """

    cases: Sequence[str] = tuple(ARCHITECTURES)
    variants: Sequence[str] = tuple(VARIANTS)
    seconds: float = 90.0
    compiled: bool = False
    tiny: bool = False

    def __post_init__(self) -> None:
        for what, names, known in (("cases", self.cases, ARCHITECTURES), ("variants", self.variants, VARIANTS)):
            for name in names:
                if name not in known:
                    raise ValueError(f"{what}: {name!r}; valid: {', '.join(known)}")
        if not self.seconds > 0:
            raise ValueError(f"seconds: {self.seconds}; valid: above 0")


def run(request: Request, rows_file: Path, command: str, device: torch.device | None = None) -> list[Row]:
    """Measures what is asked for, case by case, and appends each row as soon as it is there.

    Rows of the file that were measured on this device at this revision are not measured again.

    Args:
        request: what to measure.
        rows_file: the JSONL file.
        command: how the run was asked for, as the rows tell it.
        device: where to run; `None` is the current GPU, or the CPU where there is none.

    Raises:
        ValueError: no GPU and not `tiny`, or as `load_rows`.
    """
    if device is None:
        gpu = torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    on_gpu = device.type == "cuda"
    if not on_gpu and not request.tiny:
        raise ValueError(
            "device: there is no GPU; valid: a machine with an NVIDIA or AMD GPU that torch can use, or tiny models"
        )
    dtype = torch.bfloat16 if on_gpu else torch.float32
    bench = StepBench(device, dtype, request.seconds, command, request.compiled)
    done, found = load_rows(rows_file), []
    for name in request.cases:
        case = ARCHITECTURES[name].shrunk() if request.tiny else ARCHITECTURES[name]
        begin = time.monotonic()
        for row in bench.rows(case, request.variants, done):
            if row["status"] != LEFT_OUT:
                append_row(rows_file, row)
            found.append(row)
            print(f"{time.monotonic() - begin:6.1f} s  {row_line(row)}", flush=True)
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
    return found


def row_line(row: Row) -> str:
    """A row in one line."""
    name = f"{row['case']} {row['variant']}{' compiled' if row['compiled'] else ''}"
    if row["status"] != MEASURED:
        return f"{name}: {row['status']}, {row['reason']}"
    cells = (
        ("{:.1f} ms", row["ms"]),
        ("{:.2f} x stock", row["ratio"]),
        ("attention {:.3f}", row["attention_share"]),
        ("memory {:.3f}", row["peak_ratio"]),
        ("host {:.0f} us a call", row["host_us_per_call"]),
        ("density {:.4f}", row["density"]),
        ("error {:.4f}", row["error"]),
        ("on {}", row["backend"]),
    )
    return f"{name}: " + ", ".join(form.format(value) for form, value in cells if value is not None)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `bench models` without the command line's own packages; returns the exit code."""
    usual = Request()
    parser = argparse.ArgumentParser(prog="python -m sparse_dit.eval.bench.models", description=main.__doc__)
    parser.add_argument("--cases", nargs="*", default=list(usual.cases), metavar="CASE")
    parser.add_argument("--variants", nargs="*", default=list(usual.variants), metavar="VARIANT")
    parser.add_argument("--seconds", type=float, default=usual.seconds)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(ROWS_FILE))
    given = parser.parse_args(argv)
    command = command_line(parser.prog, sys.argv[1:] if argv is None else argv)
    try:
        request = Request(given.cases, given.variants, given.seconds, given.compiled, given.tiny)
        rows = run(request, given.out, command)
    except ValueError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    print("\n".join(["", *map(row_line, rows), f"wrote {given.out}"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
