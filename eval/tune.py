"""The fastest recipe of a search space above a floor of quality, for a model, a size and a device.

*Fast* is the time of a run's self-attention over that of a dense run, timed in pairs of calls (`attention_time`);
*quality* is a mean over prompts against dense runs of the same noise (`pair`). Runs are chosen by `search`. All that
was measured is in rows beside the result: started again, a search goes on where it stopped, and the same search of rows
that are all there runs nothing. (`sparse_dit.eval.bench.tune` is another thing: it finds launch settings of kernels.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_dit.eval import results
from sparse_dit.eval.attention_time import Ratios, call_ratios, run_share, take_calls
from sparse_dit.eval.belief import Floats, likeness
from sparse_dit.eval.pair import against, asking, plan_arguments
from sparse_dit.eval.references import References
from sparse_dit.eval.search import Answer, Search
from sparse_dit.eval.settings import interval
from sparse_dit.eval.space import Candidate
from sparse_dit.eval.sweep import FAILURES, reason, row_id
from sparse_dit.pipelines.disk import write_file
from sparse_dit.pipelines.generate import Request
from sparse_dit.pipelines.patch import explain
from sparse_dit.recipe import Recipe

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

FIELDS = {"psnr": 5.0, "psnr_min": 5.0, "ssim": 0.1, "ssim_min": 0.1}
"""What a floor may be of, fields of result rows of which more is better, and about how far recipes differ in each."""
_NO_SETTING = {"name", "source", "licence", "note"}

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Floor:
    """The least mean quality over prompts.

    Args:
        field: of `FIELDS`.
        value: dB for PSNR.
    """

    field: str
    value: float

    def __str__(self) -> str:
        return f"{self.field} {self.value:g}"


@dataclass(frozen=True)
class Limits:
    """When a search stops before it is sure.

    Args:
        seconds: no run starts later; None is no limit.
        runs: so many sparse runs at most, counted with those of earlier starts; None is no limit.
    """

    seconds: float | None = None
    runs: int | None = None


@dataclass(frozen=True)
class Tuned:
    """What a search came to.

    Args:
        answer: which candidate; None where none is above the floor, or nothing is faster than dense attention.
        candidates: those that were searched.
        costs: of each, the time of its attention over that of dense attention.
        search: what was measured.
        runs: sparse runs that the search used, those of earlier starts included.
        stopped: which limit ended it; empty where it ended by itself.
        complaints: candidates that could not run, and why.
    """

    answer: Answer | None
    candidates: Sequence[Candidate]
    costs: Sequence[float]
    search: Search
    runs: int
    stopped: str
    complaints: Sequence[str]


def read_floor(text: str) -> Floor:
    """A floor from "FIELD=VALUE".

    Raises:
        ValueError: text is none.
    """
    field, _, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if field not in FIELDS or number != number or abs(number) == float("inf"):
        raise ValueError(f"floor: {text!r}; valid: FIELD=NUMBER with a field of {', '.join(FIELDS)}")
    return Floor(field, number)


class Tuner:
    """A search on a pipeline.

    Args:
        pipe: a pipeline that is not sparse at the moment, not compiled.
        model: its name in the rows.
        request: seed of the first prompt (the next ones count up), steps and size; its prompt is not used.
        out: the preset to be; rows, costs, dense runs and evidence lie beside it.
        tell: is given a line for each thing that happens.
    """

    def __init__(self, pipe: DiffusionPipeline, model: str, request: Request, out: Path, tell: Tell = print) -> None:
        self.pipe, self.model, self.request, self.out, self.tell = pipe, model, request, out, tell
        self.references = References(out.with_suffix(".dense"), pipe, model)
        self.device = results.device_of(pipe.device, pipe.transformer.dtype)
        self.complaints: list[str] = []
        self._rows = {row["id"]: row for row in self._load(".rows.jsonl")}
        self._costs = {row["id"]: row for row in self._load(".costs.jsonl")}
        self._warm: set[str] = set()

    def tune(
        self, candidates: Sequence[Candidate], prompts: Sequence[str], floor: Floor, limits: Limits | None = None
    ) -> Tuned:
        """Searches.

        Raises:
            ValueError: no candidate fits the pipeline, or as `sparse_dit.eval.pair.compare`.
            OSError: a file beside the result cannot be written.
        """
        limits, start = limits or Limits(), time.monotonic()
        requests = self._requests(prompts)
        fitting = self._fitting(candidates)
        costs = self.costs([candidate.recipe for candidate in fitting], requests[0])
        faster = [index for index, cost in enumerate(costs) if cost is not None and cost < 1]
        for index, cost in enumerate(costs):
            if cost is not None and cost >= 1:
                self.tell(f"{fitting[index].label}: attention takes {cost:.2f} of dense attention's time, left out")
        chosen, known = [fitting[index] for index in faster], [float(costs[index] or 0) for index in faster]
        # One that cannot win stands for an empty field, so that there is a search to tell of.
        alike = self.alike([candidate.recipe for candidate in chosen], known) if known else None
        search = Search(known or [1.0], floor.value, len(prompts), alike, FIELDS[floor.field])
        runs, stopped = 0, ""
        for number, prompt in search.runs() if known else ():
            recipe, request = chosen[number].recipe, requests[prompt]
            there = self._rows.get(row_id(self.pipe, self.model, recipe, request))
            if limits.runs is not None and runs >= limits.runs:
                stopped = f"{limits.runs} runs were made"
                break
            if there is None and limits.seconds is not None and time.monotonic() - start > limits.seconds:
                stopped = f"{limits.seconds:g} seconds were over"
                break
            runs += 1
            search.tell(number, prompt, self._quality(chosen[number], request, floor, there))
        answer = search.answer() if known else None
        return Tuned(answer, chosen, known, search, runs, stopped, self.complaints)

    def costs(self, recipes: Sequence[Recipe], request: Request) -> list[float | None]:
        """The time of each recipe's self-attention over that of dense attention; None where it cannot be computed."""
        found: list[float | None] = []
        taken = None
        for recipe in recipes:
            name = self._cost_id(recipe)
            if name not in self._costs:
                taken = taken or take_calls(self.pipe, request)
                try:
                    ratios = call_ratios(taken, recipe, self.pipe.device)
                except FAILURES as error:
                    self._complain(f"{recipe.name} cannot be timed: {reason(error)}")
                    found.append(None)
                    continue
                row = {"id": name, "kind": "attention time", "model": self.model, "recipe": recipe.to_dict()}
                row |= {**asdict(ratios), "device": self.device, **results.provenance()}
                results.append_row(self.out.with_suffix(".costs.jsonl"), row)
                self._costs[name] = row
            ratios = Ratios(**{field: self._costs[name][field] for field in Ratios.__dataclass_fields__})
            plan = explain(self.pipe, recipe, **plan_arguments(self.pipe, request))
            found.append(run_share(ratios, recipe.schedule, plan))
        return found

    def alike(self, recipes: Sequence[Recipe], costs: Sequence[float]) -> Floats:
        """How alike recipes are, see `belief.likeness`; where content decides of a density, costs stand for it."""
        plans = [explain(self.pipe, recipe, **plan_arguments(self.pipe, self.request)) for recipe in recipes]
        densities = [plan.run_density or cost for plan, cost in zip(plans, costs, strict=True)]
        calls = [sum(step.sparse_layers for step in plan.steps) for plan in plans]
        dense = [1 - sparse / (plan.layers * len(plan.steps)) for sparse, plan in zip(calls, plans, strict=True)]
        return likeness([_choices(recipe) for recipe in recipes], densities, dense)

    def exhaust(self, candidates: Sequence[Candidate], prompts: Sequence[str]) -> None:
        """Runs every candidate on every prompt, but for what is there."""
        for request in self._requests(prompts):
            for candidate in candidates:
                there = self._rows.get(row_id(self.pipe, self.model, candidate.recipe, request))
                self._quality(candidate, request, Floor("psnr", 0.0), there)

    def spread(self, recipe: Recipe) -> float | None:
        """`Ratios.spread` of a recipe whose cost is known."""
        row = self._costs.get(self._cost_id(recipe))
        return None if row is None else float(row["spread"])

    def rows_of(self, recipe: Recipe, prompts: Sequence[str]) -> list[results.Row]:
        """The rows of a recipe on prompts, as far as they are there."""
        ids = [row_id(self.pipe, self.model, recipe, request) for request in self._requests(prompts)]
        return [self._rows[name] for name in ids if name in self._rows]

    def _requests(self, prompts: Sequence[str]) -> list[Request]:
        return [replace(self.request, prompt=prompt, seed=self.request.seed + i) for i, prompt in enumerate(prompts)]

    def _fitting(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        fitting = []
        for candidate in candidates:
            try:
                explain(self.pipe, candidate.recipe, **plan_arguments(self.pipe, self.request))
            except ValueError as error:
                self._complain(f"{candidate.label} does not fit: {reason(error)}")
            else:
                fitting.append(candidate)
        if not fitting:
            raise ValueError(f"space: no candidate fits; {'; '.join(self.complaints) or 'there is none'}")
        return fitting

    def _quality(self, candidate: Candidate, request: Request, floor: Floor, row: results.Row | None) -> float | None:
        """Quality of a run, read or made now; None where it fails."""
        if row is None:
            try:
                dense = self.references.get(request)
                warm_up = self.pipe.device.type == "cuda" and candidate.label not in self._warm
                [made] = against(self.pipe, [request], candidate.recipe, dense, model=self.model, warm_up=warm_up)
            except FAILURES as error:
                self._complain(f"{candidate.label} failed: {reason(error)} ({request.prompt})")
                return None
            self._warm.add(candidate.label)
            row = {"id": row_id(self.pipe, self.model, candidate.recipe, request), **made.record}
            results.append_row(self.out.with_suffix(".rows.jsonl"), row)
            self._rows[row["id"]] = row
            self.tell(f"{candidate.label}: {floor.field} {row[floor.field]:.4g} ({request.prompt})")
        return float(row[floor.field])

    def _cost_id(self, recipe: Recipe) -> str:
        """Recipes that differ in what stays dense cost the same a call."""
        schedule = replace(recipe.schedule, dense_steps=0, dense_above=1.0, dense_layers=())
        plain = replace(recipe, schedule=schedule).computed()
        asked = asking(self.pipe, replace(self.request, prompt=""))
        return results.identity(model=self.model, recipe=plain, device=self.device, **{**asked, "seed": None})

    def _complain(self, line: str) -> None:
        self.complaints.append(line)
        self.tell(line)

    def _load(self, suffix: str) -> list[results.Row]:
        rows, damaged = results.read_rows(self.out.with_suffix(suffix))
        for line in damaged:
            self._complain(line)
        return rows


def _choices(recipe: Recipe) -> dict[str, Any]:
    """The settings of a recipe, without those that only say how much is computed."""
    settings = recipe.to_dict()
    found = {name: value for name, value in settings.items() if name not in _NO_SETTING}
    for name, amounts in (("selection", ("density",)), ("schedule", ("dense_steps", "dense_above"))):
        if isinstance(found.get(name), dict):
            found[name] = {field: value for field, value in found[name].items() if field not in amounts}
    return found


def preset(tuned: Tuned, name: str, floor: Floor) -> Recipe:
    """The answer as a recipe with a name of its own and where it comes from.

    Raises:
        ValueError: there is no answer.
    """
    if tuned.answer is None:
        raise ValueError("tuned: there is no answer")
    found = tuned.candidates[tuned.answer.candidate]
    note = f"found by sparse-dit tune: {found.label}; the fastest of {len(tuned.candidates)} with {floor} or more"
    return replace(found.recipe, name=name, note="; ".join(filter(None, [found.recipe.note, note])))


def evidence(tuner: Tuner, tuned: Tuned, prompts: Sequence[str], floor: Floor) -> results.Row:
    """What speaks for the answer, as a row: every candidate with cost and quality, the answer's interval, what ran."""
    means, errors = tuned.search.means()
    settings: list[dict[str, Any]] = []
    for number, (candidate, cost) in enumerate(zip(tuned.candidates, tuned.costs, strict=True)):
        ran = int((~_missing(tuned, number)).sum())
        settings.append(
            {
                "label": candidate.label,
                "attention_time": cost,
                "attention_time_spread": tuner.spread(candidate.recipe),
                floor.field: float(means[number]) if ran else None,
                "error": float(errors[number]) if ran else None,
                "prompts": ran,
            }
        )
    asked = asking(tuner.pipe, replace(tuner.request, prompt=""))
    asked.pop("prompt")
    return {
        "kind": "tuned",
        "model": tuner.model,
        "floor": {floor.field: floor.value},
        **asked,
        "prompts": list(prompts),
        "runs": tuned.runs,
        "exhaustive_runs": len(tuned.candidates) * len(prompts),
        "stopped": tuned.stopped or None,
        "answer": _told(tuner, tuned, prompts, floor),
        "settings": sorted(settings, key=lambda setting: setting["attention_time"]),
        "complaints": list(tuned.complaints),
        "device": tuner.device,
        **results.provenance(),
    }


def write(tuner: Tuner, tuned: Tuned, prompts: Sequence[str], floor: Floor) -> list[Path]:
    """Writes the evidence as JSON beside the preset, and the preset where there is an answer.

    Returns:
        The files.
    """
    row = evidence(tuner, tuned, prompts, floor)
    files = [tuner.out.with_suffix(".json")]
    write_file(files[0], (results.to_json(row, indent=2) + "\n").encode())
    if tuned.answer is not None:
        text = "".join(f"# {line}\n" for line in lines(row))
        files.append(tuner.out)
        write_file(tuner.out, (text + preset(tuned, tuner.out.stem, floor).to_yaml()).encode())
    return files


def lines(row: results.Row) -> list[str]:
    """The evidence for an answer in a few lines."""
    answer, field = row["answer"], next(iter(row["floor"]))
    spread = f", 95 % interval {answer['low']:.2f} to {answer['high']:.2f}" if answer["low"] is not None else ""
    judged = "" if answer["certain"] else ", not certain" + (f" as {row['stopped']}" if row["stopped"] else "")
    least = f"{field} {row['floor'][field]:g} or more"
    share = f"{row['runs']} sparse runs of the {row['exhaustive_runs']} of an exhaustive search"
    return [
        f"{answer['label']}: the fastest of {len(row['settings'])} with {least}{judged}",
        f"{field} {answer[field]:.4g}{spread}, over {answer['prompts']} of {len(row['prompts'])} prompts.",
        f"Self-attention takes {answer['attention_time']:.3f} of dense attention's time, in pairs of calls; "
        f"{answer['attention_time_of_runs']:.3f} in whole runs.",
        f"{row['model']} on {row['device']['name']} in {row['device']['dtype']}, {row['steps']} steps; {share}.",
    ]


def _told(tuner: Tuner, tuned: Tuned, prompts: Sequence[str], floor: Floor) -> dict[str, Any] | None:
    if tuned.answer is None:
        return None
    chosen = tuned.candidates[tuned.answer.candidate]
    rows = tuner.rows_of(chosen.recipe, prompts)
    values = [float(row[floor.field]) for row in rows]
    ends = interval(values)
    ratios = sorted(row["attention_seconds_sparse"] / row["attention_seconds_dense"] for row in rows)
    return {
        "label": chosen.label,
        "recipe": chosen.recipe.to_dict(),
        "attention_time": tuned.costs[tuned.answer.candidate],
        "attention_time_of_runs": ratios[len(ratios) // 2],
        floor.field: sum(values) / len(values),
        "low": ends and ends[0],
        "high": ends and ends[1],
        "prompts": tuned.answer.prompts,
        "certain": tuned.answer.certain,
    }


def _missing(tuned: Tuned, number: int) -> Any:
    quality = tuned.search.quality[number]
    return quality != quality
