"""Holds `sparse-dit batch` against what it promises, on tiny-wan, and appends what was found as a row.

    python -m sparse_dit.eval.batch_trial kill --rows 200 --kills 3 --out eval/results/batch.jsonl
    python -m sparse_dit.eval.batch_trial throughput --rows 40 --out eval/results/batch.jsonl
    python -m sparse_dit.eval.batch_trial ray --rows 24 --out eval/results/batch.jsonl
    python -m sparse_dit.eval.batch_trial group --rows 8 --gpus 2 --out eval/results/batch.jsonl

`kill` ends the command with SIGKILL at random moments and lets a last run go on. `throughput` takes turns with a bare
loop over the pipeline. `ray` ends one of two actors with SIGKILL and compares every file with those of one process.
`group` shares each video over GPUs, or over processes on a CPU where there are none, ends one of them with SIGKILL and
compares every frame with those of one.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from sparse_dit.eval import results
from sparse_dit.eval.files import read_frames
from sparse_dit.pipelines.batch.groups import Rank, Seat, run_groups
from sparse_dit.pipelines.batch.identity import model_identity
from sparse_dit.pipelines.batch.manifest import Item
from sparse_dit.pipelines.batch.run import Engine, choose_engine, plan_batch, run_batch
from sparse_dit.pipelines.batch.worker import Job, Outcome, Worker
from sparse_dit.pipelines.generate import TINY_WAN, Request, generate, load_pipeline, write_video
from sparse_dit.pipelines.patch import enable
from sparse_dit.pipelines.tiny_wan.grammar import held_out_prompts
from sparse_dit.recipe import load_recipe

SMALL = Request("", height=48, width=48, num_frames=5, steps=2)
MIDDLE = Request("", height=64, width=64, num_frames=9, steps=4)
CHANGES = {"block_q": 16, "block_k": 16, "schedule.dense_steps": 0}
"""So that calls are sparse at these sizes."""
BLOCK = 4
"""Rows that the bare loop and the batch run before they change places."""


def write_manifest(path: Path, rows: int) -> Path:
    """A manifest of so many rows, no two alike."""
    prompts = held_out_prompts(min(rows, 64))
    lines = (json.dumps({"prompt": prompts[row % len(prompts)], "seed": row}) + "\n" for row in range(rows))
    path.write_text("".join(lines), encoding="utf-8")
    return path


def command(manifest: Path, out: Path, *options: str) -> list[str]:
    """The command that runs a manifest at the small size, with one thread."""
    size = [f"--{name}={getattr(SMALL, name)}" for name in ("height", "width", "num_frames", "steps")]
    recipe = [f"--recipe.{name}={value}" for name, value in CHANGES.items()]
    module = [sys.executable, "-m", "sparse_dit.app", "batch", str(manifest), "--out", str(out)]
    return [*module, *size, *recipe, "--threads", "1", "--device", "cpu", *options]


def kill_trial(folder: Path, rows: int, kills: int, seed: int) -> results.Row:
    """Ends the command at random moments, so often, and lets a last run end by itself."""
    manifest, out = write_manifest(folder / "prompts.jsonl", rows), folder / "out"
    chance = random.Random(seed)
    moments = sorted(chance.uniform(0, rows) for _ in range(kills))
    found = []
    start = time.perf_counter()
    for moment in moments:
        with subprocess.Popen(command(manifest, out), stderr=subprocess.DEVNULL) as running:
            while running.poll() is None and _lines(out) < int(moment):
                time.sleep(0.02)
            # The part of the moment behind the point is a part of a row, which takes about a second.
            time.sleep(moment % 1)
            running.kill()
        found.append({"moment": moment, "exit": running.returncode, "rows": _lines(out), **_litter(out)})
    done = subprocess.run(command(manifest, out), capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    return {"kills": found, "exit": done.returncode, "seconds": seconds, **check_folder(out), **_litter(out)}


def check_folder(out: Path) -> results.Row:
    """Reads every result row and every video: how many there are, how many twice, how many not whole."""
    rows = results.load_rows(out / "results.jsonl")
    torn = 0
    for row in rows:
        file = out / row["file"]
        whole = hashlib.sha256(file.read_bytes()).hexdigest() == row["sha256"]
        shapes = [list(frame.shape) for frame in read_frames(file)]
        torn += not (whole and shapes == [row["frames"][1:]] * row["frames"][0])
    return {
        "results": len(rows),
        "twice": len(rows) - len({row["id"] for row in rows}),
        "torn": torn,
        "videos": len(list(out.glob("*.mp4"))),
        "density": statistics.fmean(row["density"] for row in rows),
        "rows_tried_again": sum(row["attempts"] > 1 for row in rows),
        "row_seconds": statistics.median(row["seconds"] for row in rows),
    }


@dataclass(frozen=True)
class Spent:
    """Wall time, and CPU time of this process and of encoders that have ended, which other work hardly changes."""

    seconds: float
    cpu_seconds: float

    @classmethod
    def now(cls) -> "Spent":
        """Spent until now, from a beginning that only differences tell."""
        return cls(time.perf_counter(), sum(os.times()[:4]))

    def since(self, start: "Spent") -> "Spent":
        """What was spent since an earlier moment, in seconds."""
        return Spent(self.seconds - start.seconds, self.cpu_seconds - start.cpu_seconds)


def throughput_trial(folder: Path, rows: int) -> results.Row:
    """Rows a second of the batch over those of a bare loop, which generates and writes the same videos."""
    torch.set_num_threads(1)
    job = Job(TINY_WAN, model_identity(TINY_WAN), threads=1)
    manifest, out = write_manifest(folder / "prompts.jsonl", rows), folder / "out"
    recipe = load_recipe("tiny-radial").override(CHANGES)
    plan = plan_batch(manifest, out, MIDDLE, recipe, job)
    pipe = load_pipeline(TINY_WAN)
    pipe.set_progress_bar_config(disable=True)
    bare: list[Spent] = []
    batch: list[Spent] = []

    def loop(items: Sequence[Item]) -> None:
        start = Spent.now()
        enable(pipe, recipe)
        for item in items:
            write_video(generate(pipe, item.request), folder / f"{item.name}.mp4")
        bare.append(Spent.now().since(start))

    def engine(items: Sequence[Item], job: Job) -> Iterator[Outcome]:
        worker = Worker(job, "cpu")
        # Not timed: first calls fill caches.
        generate(pipe, items[0].request)
        worker.run(items[0])
        for first in range(0, len(items), BLOCK):
            part = items[first : first + BLOCK]
            if first // BLOCK % 2:
                loop(part)
            start = Spent.now()
            for item in part:
                yield worker.run(item)
            batch.append(Spent.now().since(start))
            if not first // BLOCK % 2:
                loop(part)

    report = run_batch(plan, out, job, engine, results.provenance())
    ratios = [one.seconds / other.seconds for one, other in zip(bare, batch, strict=True)]
    totals = {
        f"{field}_{name}": sum(getattr(one, field) for one in part)
        for field in ("seconds", "cpu_seconds")
        for name, part in (("bare", bare), ("batch", batch))
    }
    equal = sum((folder / file.name).read_bytes() == file.read_bytes() for file in out.glob("*.mp4"))
    return {
        "made": report.made,
        "equal_files": equal,
        **totals,
        "throughput_ratio": totals["seconds_bare"] / totals["seconds_batch"],
        "throughput_ratio_median": statistics.median(ratios),
        "cpu_ratio": totals["cpu_seconds_bare"] / totals["cpu_seconds_batch"],
        "size": [MIDDLE.num_frames, MIDDLE.height, MIDDLE.width],
        "steps": MIDDLE.steps,
    }


def ray_trial(folder: Path, rows: int) -> results.Row:
    """Two actors on a cluster of this machine, one of which is killed when a third of the rows is done."""
    import ray

    manifest = write_manifest(folder / "prompts.jsonl", rows)
    subprocess.run(command(manifest, folder / "one"), stderr=subprocess.DEVNULL, check=True)
    out = folder / "ray"
    start = time.perf_counter()
    actors: list[int] = []
    with subprocess.Popen(command(manifest, out, "--engine", "ray", "--workers", "2")) as running:
        while running.poll() is None and (_lines(out) < rows // 3 or len(actors) < 2):
            actors = _actors_below(running.pid)
            time.sleep(0.05)
        at = _lines(out)
        subprocess.run(["kill", "-KILL", str(actors[0])], check=True)
    equal = [(folder / "one" / file.name).read_bytes() == file.read_bytes() for file in sorted(out.glob("*.mp4"))]
    return {
        "actors": len(actors),
        "killed_at_row": at,
        "exit": running.returncode,
        "seconds": time.perf_counter() - start,
        **check_folder(out),
        "equal_files": sum(equal),
        "ray": ray.__version__,
    }


def group_trial(folder: Path, rows: int, gpus: int) -> results.Row:
    """One group, of which a process is killed in the middle of a row when a third of them is done."""
    cuda = torch.cuda.is_available()
    job = Job(TINY_WAN, model_identity(TINY_WAN), suffix=".webp", threads=1)
    manifest, recipe = write_manifest(folder / "prompts.jsonl", rows), load_recipe("tiny-radial").override(CHANGES)
    engines: dict[str, Engine] = {
        "one": choose_engine("local", "cuda" if cuda else "cpu", 1, None),
        "group": choose_engine("local", "cuda", 1, None, gpus)
        if cuda
        else partial(run_groups, groups=[["cpu"] * gpus], worker=_rank_on_cpu),
    }
    killed: list[int] = []

    def kill() -> None:
        victim = multiprocessing.active_children()[-1].pid
        assert victim is not None
        killed.append(victim)
        os.kill(victim, signal.SIGKILL)

    def engine(items: Sequence[Item], job: Job) -> Iterator[Outcome]:
        for number, outcome in enumerate(engines["group"](items, job)):
            if number == rows // 3:
                threading.Timer(outcome.measured["seconds"] / 2, kill).start()
            yield outcome

    found: dict[str, list[results.Row]] = {}
    for name, run in (("one", engines["one"]), ("group", engine)):
        run_batch(plan_batch(manifest, folder / name, MIDDLE, recipe, job), folder / name, job, run, {})
        found[name] = sorted(results.load_rows(folder / name / "results.jsonl"), key=lambda row: int(row["line"]))
    levels = [
        max(
            int(np.abs(one.astype(int) - other).max())
            for one, other in zip(*(read_frames(folder / name / row["file"]) for name in found), strict=True)
        )
        for row in found["one"]
    ]
    return {
        "gpus_per_video": [row["gpus_per_video"] for row in found["group"]],
        "killed": len(killed),
        "rows_tried_again": sum(row["attempts"] > 1 for row in found["group"]),
        "results": len(found["group"]),
        "levels_off": levels,  # of 255, the largest of a video
        "density_one": [row["density"] for row in found["one"]],
        "density_group": [row["density"] for row in found["group"]],
        "row_seconds_one": statistics.median(row["seconds"] for row in found["one"]),
        "row_seconds_group": statistics.median(row["seconds"] for row in found["group"]),
    }


def _rank_on_cpu(job: Job, device: str, seat: Seat) -> Rank:
    """A process of a group where diffusers finds no accelerators, by whose number it divides."""
    torch.accelerator.device_count = lambda: seat.ranks
    return Rank(job, device, seat)


def _lines(out: Path) -> int:
    file = out / "results.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def _litter(out: Path) -> results.Row:
    """What a run has left half done: partial files, videos without a row, bytes of a row without its end."""
    content = (out / "results.jsonl").read_bytes() if (out / "results.jsonl").exists() else b""
    return {
        "partial_files": len(list(out.glob(".partial-*"))),
        "videos_without_row": len(list(out.glob("*.mp4"))) - content.count(b"\n"),
        "torn_bytes": len(content) - content.rfind(b"\n") - 1,
    }


def _actors_below(pid: int) -> list[int]:
    """Processes below another one that Ray calls workers of a map."""
    parents: dict[int, int] = {}
    names: dict[int, bytes] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                names[int(entry.name)] = (entry / "cmdline").read_bytes()
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # it has ended meanwhile
                continue

    def below(one: int) -> bool:
        while one not in (0, pid):
            one = parents.get(one, 0)
        return one == pid

    return [one for one, name in names.items() if name.startswith(b"ray::MapWorker") and below(one)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trial", choices=["kill", "throughput", "ray", "group"])
    parser.add_argument("--rows", type=int, required=True, help="rows of the manifest")
    parser.add_argument("--kills", type=int, default=3, help="how often kill ends the command")
    parser.add_argument("--gpus", type=int, default=2, help="of the group")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, required=True, help="the JSONL file to append to")
    chosen = parser.parse_args()
    trials: dict[str, Callable[[Path], results.Row]] = {
        "kill": lambda folder: kill_trial(folder, chosen.rows, chosen.kills, chosen.seed),
        "throughput": lambda folder: throughput_trial(folder, chosen.rows),
        "ray": lambda folder: ray_trial(folder, chosen.rows),
        "group": lambda folder: group_trial(folder, chosen.rows, chosen.gpus),
    }
    results.load_rows(chosen.out)
    with tempfile.TemporaryDirectory() as folder:
        row = {"trial": chosen.trial, "rows": chosen.rows, "seed": chosen.seed, **trials[chosen.trial](Path(folder))}
    cuda = chosen.trial == "group" and torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    row |= {"device": results.device_of(device, dtype) | {"threads": 1}, **results.provenance()}
    results.append_row(chosen.out, row)
    print(results.to_json(row, indent=2))


if __name__ == "__main__":
    main()
