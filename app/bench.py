"""`sparse-dit bench` and `sparse-dit tune-tiles`: what they do and print."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sparse_dit.app.setup import Setup
from sparse_dit.pipelines.generate import Request

SHAPES = ["12x32760x128", "4x118800x128", "48x17776x64", "8x75600x128", "24x4608x128", "16x1000x72"]
DENSITIES = [0.5, 0.3, 0.2, 0.1, 1.0]
HEAD_SIZES = [128, 64, 256]
# The names of `eval.bench.architectures` and `eval.bench.variants`, which import torch; a test holds them equal.
CASES = [
    "wan2.1-14b-720p", "cogvideox-5b-480p", "flux.1-dev-2048px", "hunyuanvideo-720p", "wan2.1-1.3b-480p",
    "flux.1-dev-1024px",
]  # fmt: skip
VARIANTS = [
    "radial", "balanced", "radial-int8_fp8", "balanced-int8_fp8", "dense", "radial-int8", "balanced-int8",
]  # fmt: skip
PROMPT = "a large plain red circle moving right over a gray gradient"


def bench_kernels(
    shapes: list[str] = SHAPES,
    densities: list[float] = DENSITIES,
    seconds: float = 120.0,
    no_flex: bool = False,
    out: str = "eval/results/bench-kernels.jsonl",
) -> None:
    """Time attention kernels on this GPU, ours beside others, as one table and as rows of a JSONL file.

    Args:
        shapes: HEADSxTOKENSxHEAD_SIZE each.
        densities: of the block lists, above 0 and up to 1.
        seconds: nothing new is started after so long; what matters most is measured first.
        no_flex: leave out FlexAttention, which compiles for long.
        out: the JSONL file that rows are appended to.
    """
    from sparse_dit.eval.bench.kernels import LEFT_OUT, Request, run
    from sparse_dit.eval.bench.lines import left_out_line

    rows = run(Request(shapes, densities, seconds, not no_flex), Path(out), _command())
    print_rows([row for row in rows if row["status"] != LEFT_OUT])
    if left := [row for row in rows if row["status"] == LEFT_OUT]:
        print(left_out_line(left))
    print(f"wrote {out}")


def bench_e2e(
    request: Request, setup: Setup, prompt: str = PROMPT, repeats: int = 3, out: str = "eval/results/bench-e2e.jsonl"
) -> int:
    """Take a recipe's speed-up in a model apart: whole runs dense, dense by our kernel, sparse and in INT8.

    Tells also from which length on a sparse call is faster than a dense one.

    Args:
        request: seed, steps and size.
        setup: which recipe in which model.
        prompt: what to generate.
        repeats: how often everything runs.
        out: the JSONL file that rows are appended to.

    Returns:
        1 where a run failed, else 0.
    """
    from sparse_dit.eval import attribution, results
    from sparse_dit.recipe import load_recipe

    recipe = load_recipe(setup.recipe)
    attribution.arms(recipe)  # one that cannot be taken apart is told before the model is loaded
    if repeats < 1:
        raise ValueError(f"repeats: {repeats}; valid: a whole number from 1")
    rows_file, request = Path(out), replace(request, prompt=prompt)
    results.load_rows(rows_file)
    pipe = setup.load()
    found: list[dict[str, Any]] = []
    for make in (
        attribution.attribute(pipe, request, recipe, model=setup.model, repeats=repeats),
        attribution.lengths(pipe, request, recipe, model=setup.model, seed=request.seed),
    ):
        for row in make:
            row["command"] = _command()
            results.append_row(rows_file, row)
            found.append(row)
            print(_progress(row), flush=True)
    print_attribution([row for row in found if row["kind"] == "e2e"])
    print_lengths([row for row in found if row["kind"] == "length"])
    print(f"wrote {rows_file}")
    return int(any(row["status"] == "failed" for row in found if row["kind"] == "e2e"))


def bench_models(
    cases: list[str] = CASES,
    variants: list[str] = VARIANTS,
    seconds: float = 90.0,
    compiled: bool = False,
    tiny: bool = False,
    out: str = "eval/results/bench-models.jsonl",
) -> None:
    """Time one denoising step of published architectures on this GPU, ours beside stock, and append rows to a file.

    Weights are random. What the file holds already of this GPU and revision is not measured again.

    Args:
        cases: models at sizes, in this order.
        variants: recipes and precisions, in this order; the stock model is always measured.
        seconds: of a case; no variant starts later.
        compiled: run layers under torch.compile; attention and host are then not timed apart.
        tiny: tiny models of the same classes, also on a CPU, to see that everything runs.
        out: the JSONL file that rows are appended to.
    """
    from sparse_dit.eval.bench.models import Request, row_line, run

    request = Request(cases, variants, seconds, compiled, tiny)
    rows = run(request, Path(out), _command())
    print("\n".join(["", *map(row_line, rows), f"wrote {out}"]))


def tune_tiles(head_sizes: list[int] = HEAD_SIZES, seconds: float = 600.0, out: str | None = None) -> None:
    """Measure how kernels are best launched on this GPU, and write it to a file that goes before what is pinned.

    Args:
        head_sizes: of 64, 128 and 256; others are launched as the next larger of these.
        seconds: no launch is tried later.
        out: the file; by default the one that kernels read, see SPARSE_DIT_TILES. Rows of other GPUs in it stay.
    """
    from sparse_dit.eval.bench.tune import Request, run

    run(Request(head_sizes, seconds), None if out is None else Path(out))


def _command() -> str:
    """How this run was asked for."""
    from sparse_dit.eval.results import command_line

    return command_line("sparse-dit", sys.argv[1:])


def print_rows(rows: list[dict[str, Any]]) -> None:
    """One table of bench rows, in their order, a section a shape."""
    from sparse_dit.eval.bench.lines import case, note, number, shape

    if not rows:
        return
    device, versions = rows[0]["device"], rows[0]["versions"]
    title = f"{device['name']}, {device['dtype']}, torch {versions['torch']}, triton {versions['triton']}"
    table = Table(title=f"{title}; x {rows[0]['dense']}: its time, dense, through the row's")
    for column in ("shape", "case", "ms", "TFLOP/s", f"x {rows[0]['dense']}", "error", "note"):
        table.add_column(column, justify="left" if column in ("shape", "case", "note") else "right")
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        cells = (number(row["ms"], ".3f"), number(row["tflops"], ".0f"), number(row["ratio"], ".2f"))
        ends = following is None or following["shape"] != row["shape"]
        table.add_row(shape(row), case(row), *cells, number(row["error"], ".4f"), note(row), end_section=ends)
    # Wide enough for a line a row also where the output goes to a file.
    console = Console()
    Console(width=max(console.width, 150)).print(table)


def _progress(row: dict[str, Any]) -> str:
    """A row of `bench e2e` in one line."""
    where = f"round {row['round']}" if row["kind"] == "e2e" else f"{row['tokens']} tokens"
    if row["status"] == "failed":
        return f"{row['arm']}, {where}: failed, {row['reason']}"
    if row["kind"] == "length":
        return f"{row['arm']}, {where}: {row['refresh']:.3f} of a dense call's time"
    seconds = row["seconds"]
    return f"{row['arm']}, {where}: {seconds['whole']:.2f} s, attention {seconds['attention']:.2f} s"


def print_attribution(rows: list[dict[str, Any]]) -> None:
    """One table of where the time goes with each arm."""
    from sparse_dit.eval.attribution import summarize
    from sparse_dit.eval.stages import STAGES

    first = rows[0]
    grid = " x ".join(map(str, first["grid"]))
    title = f"{first['model']}, {grid} tokens, {first['steps']} steps, {first['device']['name']}: seconds, medians"
    table = Table(title=title)
    for column in ("", "whole", *STAGES, "whole / own", "attention / own", "run density", "PSNR"):
        table.add_column(column, justify="right" if column else "left")
    for found in summarize(rows):
        cells = [f"{found[name]:.3f}" for name in ("whole", *STAGES)]
        cells += [f"{found[name]:.3f}" for name in ("over_whole", "over_attention", "run_density")]
        table.add_row(found["arm"], *cells, f"{found['psnr']:.1f}")
    console = Console()
    Console(width=max(console.width, 150)).print(table)


def print_lengths(rows: list[dict[str, Any]]) -> None:
    """One table of a call's time over a dense call's, by length, and where that falls below 1 for good."""
    from sparse_dit.eval.attribution import break_even

    arms = list(dict.fromkeys(row["arm"] for row in rows))
    table = Table(title=f"a call's time over that of a dense one, {rows[0]['heads']} heads of {rows[0]['head_size']}")
    for column in ("tokens", *arms):
        table.add_column(column, justify="right")
    for tokens in sorted({row["tokens"] for row in rows}):
        cells = {row["arm"]: row for row in rows if row["tokens"] == tokens}
        shown = [f"{cells[arm]['refresh']:.3f}" if cells[arm]["status"] == "measured" else "-" for arm in arms]
        table.add_row(f"{tokens:,}", *shown)
    even = [break_even(rows, arm) for arm in arms]
    table.add_row("break-even", *(f"{length:,}" if length else "none" for length in even))
    Console().print(table)
