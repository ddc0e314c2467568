"""A manifest and a folder: what is to be done, and doing it."""

import hashlib
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sparse_dit.pipelines.batch.groups import run_groups
from sparse_dit.pipelines.batch.journal import FAILURES, Journal, open_journal, read_done
from sparse_dit.pipelines.batch.manifest import Item, Refused, read_manifest
from sparse_dit.pipelines.batch.processes import run_here, run_processes
from sparse_dit.pipelines.batch.ray import run_ray
from sparse_dit.pipelines.batch.worker import STOPS, Job, Outcome
from sparse_dit.pipelines.generate import Request, check_video_file
from sparse_dit.recipe import Recipe

Engine = Callable[[Sequence[Item], Job], Iterator[Outcome]]
"""Runs rows and yields what became of each, in any order."""


@dataclass(frozen=True)
class Plan:
    """What a manifest means for a folder.

    Attributes:
        pending: rows to be run.
        done: rows whose video is there already.
        repeats: rows that ask for the same as an earlier one; they share its video.
        refused: rows that cannot be run.
    """

    pending: list[Item]
    done: list[Item]
    repeats: list[Item]
    refused: list[Refused]

    @property
    def rows(self) -> int:
        """Rows of the manifest."""
        return len(self.pending) + len(self.done) + len(self.repeats) + len(self.refused)

    def after(self, ids: Collection[str]) -> "Plan":
        """The plan when rows of these ids are done."""
        done = [item for item in self.pending if item.id in ids]
        return replace(self, pending=[item for item in self.pending if item.id not in ids], done=[*self.done, *done])


@dataclass
class Report:
    """What a run did: rows that it made, and rows that failed beside those that the plan refused."""

    plan: Plan
    made: int = 0
    failed: int = 0

    @property
    def complete(self) -> bool:
        """Every row of the manifest has its video."""
        return self.failed == 0 and not self.plan.refused

    def __str__(self) -> str:
        parts = [f"{self.made} made", f"{len(self.plan.done)} done before", f"{len(self.plan.repeats)} repeats"]
        failed = self.failed + len(self.plan.refused)
        return f"{', '.join(parts)}, {failed} failed{f' (see {FAILURES})' if failed else ''}"


def choose_engine(name: str, device: str, workers: int, address: str | None, gpus_per_video: int = 1) -> Engine:
    """What runs the rows.

    Args:
        name: `local`, this machine, or `ray`, a cluster.
        device: `auto`, `cuda` or `cpu`.
        workers: how many models are loaded, each for itself; 0 is one per GPU, or on CPUs one (local) or as many as the
            cluster has room for (ray).
        address: of the Ray cluster; None as `run_ray`.
        gpus_per_video: GPUs of a worker, which share each video; above 1 for `local` only.

    Raises:
        ValueError: a number or a name that is not valid, CUDA where there is none, or an address without cluster.
    """
    for argument, value, least in (("workers", workers, 0), ("gpus_per_video", gpus_per_video, 1)):
        if value < least:
            raise ValueError(f"{argument}: {value}; valid: a whole number from {least}")
    if name == "ray":
        if gpus_per_video > 1:
            raise ValueError(f"gpus_per_video: {gpus_per_video} with engine 'ray'; valid: 1, or engine 'local'")
        return partial(run_ray, device=device, workers=workers, address=address)
    if name != "local":
        raise ValueError(f"engine: {name!r}; valid: local, ray")
    if address is not None:
        raise ValueError(f"address: {address!r} with engine 'local'; valid: engine 'ray'")
    gpus = torch.cuda.device_count()
    if device == "cuda" and not gpus:
        raise ValueError("device: 'cuda'; there is no CUDA device; valid: 'cpu'")
    if gpus_per_video > 1:
        groups = _groups(0 if device == "cpu" else gpus, workers, gpus_per_video)
        return partial(run_groups, groups=groups)
    devices = [f"cuda:{number}" for number in range(gpus)] if device != "cpu" and gpus else ["cpu"]
    chosen = list(islice(cycle(devices), workers or len(devices)))
    if len(chosen) == 1:
        return partial(run_here, device=chosen[0])
    return partial(run_processes, devices=chosen)


def _groups(gpus: int, workers: int, each: int) -> list[list[str]]:
    """The GPUs of each worker, which has so many; tells how many are left over where nobody asked for fewer."""
    room = gpus // each
    if not room:
        raise ValueError(f"gpus_per_video: {each} of {gpus} GPUs; valid: 1{f' to {gpus}' if gpus > 1 else ''}")
    if workers > room:
        raise ValueError(f"workers: {workers} of {each} GPUs each, of {gpus}; valid: 0 to {room}")
    if not workers and gpus % each:
        print(f"sparse-dit: {gpus % each} of {gpus} GPUs left over (gpus_per_video: {each})", file=sys.stderr)
    return [[f"cuda:{first + number}" for number in range(each)] for first in range(0, (workers or room) * each, each)]


def plan_batch(manifest: Path, out: Path, request: Request, recipe: Recipe, job: Job) -> Plan:
    """Reads a manifest and looks what of it a folder holds; writes nothing.

    Args:
        manifest: as `read_manifest` takes it.
        out: the folder; it need not exist.
        request: what a row has for the fields that it leaves out.
        recipe: what a row runs with where it names none.
        job: what all rows share.

    Raises:
        ValueError: as `read_manifest`, `read_done` and `check_video_file`.
    """
    check_video_file(out / f"video{job.suffix}")
    context = {"model": job.identity, "suffix": job.suffix, "fps": job.fps}
    items, refused = read_manifest(manifest, request, recipe, context)
    done = read_done(out)
    plan = Plan([], [], [], refused)
    seen: set[str] = set()
    for item in items:
        part = plan.repeats if item.id in seen else plan.done if item.id in done else plan.pending
        part.append(item)
        seen.add(item.id)
    return plan


def run_batch(plan: Plan, out: Path, job: Job, engine: Engine, provenance: Mapping[str, Any]) -> Report:
    """Runs what is pending. Killed at any moment it loses the rows in flight, and nothing that was done.

    Each row that is done has a video and a line in `results.jsonl`, in this order; each row that is not, a line in
    `failures.jsonl`, which every run begins anew.

    Args:
        plan: as `plan_batch` makes it for the same folder and job.
        out: the folder.
        job: what all rows share.
        engine: runs the rows.
        provenance: versions and revision for the result rows.

    Raises:
        ValueError: another run is writing to the folder, or the model cannot be loaded.
        OSError: the folder or the disk does not take what is to be written, or a device is lost; the message tells how
            much is done.
    """
    with open_journal(out, {item.id for item in plan.pending}) as journal:
        plan = plan.after(journal.there)  # another run may have ended since it was made
        report = Report(plan)
        before = len(plan.done)
        bar = tqdm(total=before + len(plan.pending), initial=before, unit="row", desc=out.name)
        with bar:
            try:
                for refused in plan.refused:
                    journal.fail({"line": refused.line, "kind": "refused", "problem": refused.problem, "attempts": 0})
                    bar.write(f"line {refused.line}: {refused.problem}", file=sys.stderr)
                for outcome in engine(plan.pending, job) if plan.pending else ():
                    _settle(outcome, journal, job, provenance, report, bar)
            except OSError as error:
                why = error.strerror or str(error)
                kept = before + report.made
                told = f"{kept} of {plan.rows} rows are done, the same command goes on from there"
                raise OSError(f"out: {str(out)!r} ({why}); {told}") from error
    return report


def _settle(
    outcome: Outcome, journal: Journal, job: Job, provenance: Mapping[str, Any], report: Report, bar: Any
) -> None:
    """Puts an outcome on disk.

    Raises:
        ValueError, OSError: no further row could be done either.
    """
    item = outcome.item
    if outcome.kind == "model":
        raise ValueError(outcome.problem)
    if outcome.kind in STOPS:
        raise OSError(outcome.problem)
    if outcome.kind == "done":
        journal.add(f"{item.name}{job.suffix}", outcome.video, result_row(outcome, job, provenance))
        report.made += 1
    else:
        report.failed += 1
        fields = {"line": item.line, "id": item.id, "kind": outcome.kind, "problem": outcome.problem}
        journal.fail({**fields, "attempts": outcome.attempts, "prompt": item.request.prompt})
        bar.write(f"line {item.line}: {outcome.problem} ({outcome.kind}, {outcome.attempts} attempts)", file=sys.stderr)
        bar.set_postfix(failed=report.failed, refresh=False)
    bar.update()


def result_row(outcome: Outcome, job: Job, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The line of `results.jsonl` for a row that is done."""
    item = outcome.item
    return {
        "id": item.id,
        "line": item.line,
        "model": job.model,
        "model_identity": job.identity,
        "recipe": item.recipe.to_dict(),
        **asdict(item.request),
        **outcome.measured,
        "fps": job.fps,
        "file": f"{item.name}{job.suffix}",
        "bytes": len(outcome.video),
        "sha256": hashlib.sha256(outcome.video).hexdigest(),
        "attempts": outcome.attempts,
        **provenance,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def plan_lines(plan: Plan, job: Job) -> list[str]:
    """A line for each row, in the order of the manifest, and one of totals."""
    named = (
        ("would run", plan.pending),
        ("done", plan.done),
        ("repeats an earlier row", plan.repeats),
    )
    lines = [
        (item.line, f"{words}: {item.name}{job.suffix} ({item.recipe.name})") for words, part in named for item in part
    ]
    lines += [(refused.line, f"refused: {refused.problem}") for refused in plan.refused]
    totals = ", ".join(f"{len(part)} {words}" for words, part in (*named, ("refused", plan.refused)))
    return [*(f"line {line} {text}" for line, text in sorted(lines)), f"{plan.rows} rows in all: {totals}"]
