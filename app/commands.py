"""What each command does. Heavy imports stand inside the functions: help and most errors come without them."""

import os
from collections.abc import Callable
from json import dumps
from pathlib import Path
from typing import Literal

from sparse_dit.app import tables
from sparse_dit.app.bench import bench_e2e, bench_kernels, bench_models, tune_tiles
from sparse_dit.app.calibrate import TILE, sampling_of, search_of
from sparse_dit.app.demo.serve import demo
from sparse_dit.app.output import output_folder, warn, warn_if_dense
from sparse_dit.app.report import report
from sparse_dit.app.setup import Setup
from sparse_dit.app.tune import tune
from sparse_dit.pipelines.generate import Request, check_video_file, write_video
from sparse_dit.pipelines.generate import generate as run_pipeline

DENSITIES = [0.5, 0.3, 0.2]
DENSE_FRACTIONS = [0.0, 0.25]
NONE: list[str] = []


def generate(request: Request, setup: Setup, out: str = "outputs/video.mp4", fps: int = 16) -> None:
    """Make a video from a prompt.

    Args:
        request: what to generate.
        setup: with what.
        out: the video file, .mp4 or .webp (which needs no ffmpeg).
        fps: frames a second of the video.
    """
    from sparse_dit.pipelines.patch import enable, summary
    from sparse_dit.recipe import load_recipe

    recipe = load_recipe(setup.recipe)
    video = Path(out)
    check_video_file(video)
    with output_folder(video.parent) as folder:
        pipe = enable(setup.load(), recipe)
        write_video(run_pipeline(pipe, request), folder / video.name, fps)
    done = summary(pipe)
    warn_if_dense(done.sparse, done.dense)
    print(f"wrote {video}")


def compare(
    request: Request,
    setup: Setup,
    out: str = "outputs/compare",
    fps: int = 16,
    video_format: Literal["mp4", "webp"] = "mp4",
) -> None:
    """Run dense and sparse from the same noise and show the difference.

    Args:
        request: what to generate.
        setup: with what.
        out: folder for the videos dense, sparse and side-by-side, and for result.json.
        fps: frames a second of the videos.
        video_format: of the three videos; webp is animated and lossless, and needs no ffmpeg.
    """
    from sparse_dit.eval import pair, results
    from sparse_dit.eval.side_by_side import side_by_side
    from sparse_dit.recipe import load_recipe

    recipe = load_recipe(setup.recipe)
    names = [f"{name}.{video_format}" for name in ("dense", "sparse", "side-by-side")]
    check_video_file(Path(out) / names[0])
    with output_folder(out) as folder:
        [comparison] = pair.compare(setup.load(), request, [recipe], model=setup.model)
        record = comparison.record
        label = f"{recipe.name}, run density {record['run_density']:.2f}, {record['psnr']:.1f} dB"
        panels = side_by_side(comparison.dense, comparison.sparse, label)
        for name, frames in zip(names, (comparison.dense, comparison.sparse, panels), strict=True):
            write_video(frames, folder / name, fps)
        (folder / "result.json").write_text(results.to_json(record, indent=2) + "\n", encoding="utf-8")
    tables.print_comparison(record, os.fspath(out), [*names, "result.json"])
    warn_if_dense(record["calls"]["sparse"], record["calls"]["dense"])


def methods(json: bool = False) -> None:
    """List the recipes that come with the package.

    Args:
        json: print JSON instead of a table.
    """
    from sparse_dit.recipe import load_recipe, recipe_names

    recipes = [load_recipe(name) for name in recipe_names()]
    if json:
        print(dumps([recipe.to_dict() for recipe in recipes], indent=2))
    else:
        tables.print_recipes(recipes)


def families(json: bool = False) -> None:
    """List the model families that are known: which can be sparse, and why the others stay dense.

    Args:
        json: print JSON instead of a table.
    """
    from sparse_dit.pipelines.families import family_table

    rows = family_table()
    if json:
        print(dumps(rows, indent=2))
    else:
        tables.print_families(rows)


def explain(request: Request, setup: Setup, json: bool = False) -> None:
    """Tell what a recipe would do in a model, without running it.

    Args:
        request: at which size and number of steps.
        setup: which recipe in which model.
        json: print JSON instead of text.
    """
    from sparse_dit.eval.pair import plan_arguments
    from sparse_dit.pipelines import patch
    from sparse_dit.recipe import load_recipe

    recipe = load_recipe(setup.recipe)
    pipe = setup.load()
    explanation = patch.explain(pipe, recipe, **plan_arguments(pipe, request))
    print(dumps(explanation.to_dict(), indent=2) if json else explanation)


def evaluate(
    request: Request,
    setup: Setup,
    densities: list[float] = DENSITIES,
    dense_fractions: list[float] = DENSE_FRACTIONS,
    prompts: str = "held-out:16",
    also: list[str] = NONE,
    out: str = "eval/results/radial-tiny-wan.jsonl",
    batch: int = 1,
) -> int:
    """Compare a recipe with dense on many prompts, densities and schedules, as rows of a JSONL file.

    Args:
        request: seed of the first prompt (the next ones count up), steps and size.
        setup: which recipe in which model.
        densities: densities of the selection; without a value it stays as it is.
        dense_fractions: shares of the first steps that stay dense; without a value the schedule stays as it is.
        prompts: held-out:N, the first N that tiny-wan never saw, or a text file with one prompt a line.
        also: more recipes, names or YAML files, each compared as it stands; all share the dense runs.
        out: the JSONL file; rows that it holds already are not run again.
        batch: prompts that share a pipeline call; seconds in the rows are then those of the whole batch.

    Returns:
        1 where a run failed, or the file holds lines that are no rows, else 0.
    """
    from sparse_dit.eval import results, sweep
    from sparse_dit.eval.pair import asking
    from sparse_dit.recipe import load_recipe

    recipe, others = load_recipe(setup.recipe), [load_recipe(name) for name in also]
    rows_file, chosen = Path(out), sweep.read_prompts(prompts)
    if batch < 1:
        raise ValueError(f"batch: {batch}; valid: a whole number from 1")
    sweep.grid(recipe, densities, dense_fractions, steps=1)  # bad numbers are told before the model is loaded
    complaints = [warn(line) for line in results.read_rows(rows_file)[1]]
    with output_folder(rows_file.parent):
        pipe = setup.load()
    steps = asking(pipe, request)["steps"]
    recipes = sweep.grid(recipe, densities, dense_fractions, steps) + others
    for row in sweep.sweep(pipe, setup.model, recipes, chosen, request, rows_file, batch):
        if isinstance(row, sweep.Failed):
            complaints.append(warn(str(row)))
        else:
            print(tables.row_line(row), flush=True)
    return 1 if complaints else 0


def compare_files(video: str, reference: str, /, json: bool = False) -> None:
    """Measure a video file against another one, frame by frame.

    Args:
        video: the file to judge: mp4 or what else ffmpeg reads, or webp, gif, png, jpg.
        reference: what it should look like, of the same size and length.
        json: print JSON instead of a table.
    """
    from sparse_dit.eval import results
    from sparse_dit.eval.files import compare_files as measure

    row = {"video": video, "reference": reference, **measure(Path(video), Path(reference))}
    if json:
        print(results.to_json(row, indent=2))
    else:
        tables.print_file_comparison(row)


def probe(request: Request, setup: Setup, rows: int = 16, out: str = "outputs/probe.jsonl") -> None:
    """Tell what a recipe keeps of the attention of every layer, head and step.

    Args:
        request: what to generate.
        setup: with what.
        rows: query rows sampled in each attention call.
        out: the JSONL file that a row is appended to.
    """
    from sparse_dit.eval import results
    from sparse_dit.eval.probe import probe as look
    from sparse_dit.recipe import load_recipe

    recipe = load_recipe(setup.recipe)
    if rows < 1:
        raise ValueError(f"rows: {rows}; valid: a whole number from 1")
    file = Path(out)
    results.load_rows(file)
    with output_folder(file.parent):
        row = look(setup.load(), request, recipe, model=setup.model, rows=rows)
    results.append_row(file, row)
    tables.print_probe(row)
    print(f"wrote {file}")


def calibrate(
    request: Request,
    setup: Setup,
    method: Literal["paro", "sparse-vdit", "sta"] = "sparse-vdit",
    density: float | None = 0.25,
    prompts: str = "drawn:2",
    bins: int = 0,
    samples: int = 1,
    block: int = 64,
    tile: list[int] = TILE,
    costs: str = "",
    out: str = "outputs/profile.safetensors",
) -> None:
    """Find out what each head of a model needs, for recipes with the selection profile.

    Args:
        request: seed of the first prompt (the next ones count up), steps and size.
        setup: which model.
        method: what is looked for: paro, an order for each head and its blocks; sparse-vdit, a pattern for each head;
            sta, a window for each head.
        density: mean density of the profile; null, with sparse-vdit, for the rule of its paper.
        prompts: drawn:N, captions of the kind tiny-wan was trained on, held-out:N, or a text file, one prompt a line.
        bins: bins of steps with findings of their own; 0 is as the method was published.
        samples: steps of each bin that are looked at.
        block: tokens of a block.
        tile: tokens of a tile along T, H, W, for sta.
        costs: rows of bench kernels, for sparse-vdit; without a file a pattern costs its area.
        out: the profile; what was seen so far lies beside it, and an interrupted calibration goes on from there.
    """
    from sparse_dit.eval.calibrate import calibrate as run_calibration
    from sparse_dit.eval.calibrate import calibration_prompts
    from sparse_dit.eval.pair import plan_arguments
    from sparse_dit.pipelines.patch import explain

    file, chosen, sampling = Path(out), calibration_prompts(prompts), sampling_of(bins, samples, block)
    search_of(method, density, tile, costs)  # bad values are told before the model is loaded
    with output_folder(file.parent):
        pipe = setup.load()
    tokens = explain(pipe, "dense", **plan_arguments(pipe, request)).tokens
    search = search_of(method, density, tile, costs, tokens)
    profile = run_calibration(pipe, search, chosen, request, file, model=setup.model, sampling=sampling)
    print(f"wrote {file}: density {profile.about['density']:.3f}")


def batch(
    manifest: str,
    /,
    request: Request,
    setup: Setup,
    out: str = "outputs/batch",
    engine: Literal["local", "ray"] = "local",
    workers: int = 0,
    address: str | None = None,
    gpus_per_video: int = 1,
    threads: int | None = None,
    retries: int = 2,
    fps: int = 16,
    video_format: Literal["mp4", "webp"] = "mp4",
    dry_run: bool = False,
) -> int:
    """Make a video for each row of a file; started again, it goes on where it stopped.

    Args:
        manifest: JSONL or CSV, a request a row: prompt, and if wanted any other option of a request, recipe,
            recipe.FIELD.
        request: what a row has for the fields that it leaves out.
        setup: with what.
        out: folder for the videos, results.jsonl and failures.jsonl.
        engine: local runs on this machine, ray on a Ray cluster (docs/cluster.md).
        workers: how many models are loaded; 0 is one per GPU, or one on a CPU.
        address: of the Ray cluster; without one RAY_ADDRESS is taken, or a cluster is started on this machine.
        gpus_per_video: GPUs of this machine that share each video; as many fewer models are loaded.
        threads: CPU threads of each worker; the same number makes the same video to the bit.
        retries: how often a row is tried again after a failure that may pass.
        fps: frames a second of the videos.
        video_format: of the videos; webp is animated and lossless, and needs no ffmpeg.
        dry_run: print what would be run, and write nothing.

    Returns:
        1 where rows are refused or failed, else 0.
    """
    from sparse_dit.eval import results
    from sparse_dit.pipelines.batch.identity import model_identity
    from sparse_dit.pipelines.batch.run import choose_engine, plan_batch, plan_lines, run_batch
    from sparse_dit.pipelines.batch.worker import Job
    from sparse_dit.recipe import load_recipe

    job = Job(
        model=setup.model,
        identity=model_identity(setup.model),
        suffix=f".{video_format}",
        fps=fps,
        retries=retries,
        threads=threads,
        describe=results.device_of,
    )
    run = choose_engine(engine, setup.device, workers, address, gpus_per_video)
    plan = plan_batch(Path(manifest), Path(out), request, load_recipe(setup.recipe), job)
    if dry_run:
        print("\n".join(plan_lines(plan, job)))
        return 1 if plan.refused else 0
    report = run_batch(plan, Path(out), job, run, results.provenance())
    print(f"{out}/: {report}")
    return 0 if report.complete else 1


#: Commands by the name one types, each with the fields of `Request` that it does not take.
COMMANDS: dict[str, tuple[Callable[..., int | None], frozenset[str]]] = {
    "generate": (generate, frozenset()),
    "compare": (compare, frozenset()),
    "batch": (batch, frozenset({"prompt"})),
    "methods": (methods, frozenset()),
    "families": (families, frozenset()),
    "demo": (demo, frozenset()),
    "explain": (explain, frozenset({"prompt", "negative_prompt", "seed"})),
    "eval": (evaluate, frozenset({"prompt"})),
    "probe": (probe, frozenset()),
    "compare-files": (compare_files, frozenset()),
    "calibrate": (calibrate, frozenset({"prompt", "recipe"})),
    "tune": (tune, frozenset({"prompt", "recipe"})),
    "report": (report, frozenset()),
    "bench kernels": (bench_kernels, frozenset()),
    "bench models": (bench_models, frozenset()),
    "bench e2e": (bench_e2e, frozenset({"prompt"})),
    "tune-tiles": (tune_tiles, frozenset()),
}

#: What names of two words have in common.
GROUPS = {"bench": "Time kernels, whole models, or what a recipe gains in a model."}
