"""The search for the fastest recipe: its answer, its files, and what a kill costs."""

import itertools
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparse_dit.app.cli import main
from sparse_dit.eval import references
from sparse_dit.eval import tune as tuning
from sparse_dit.eval.attention_time import Ratios
from sparse_dit.eval.pair import against
from sparse_dit.eval.results import load_rows
from sparse_dit.eval.space import Candidate, load_space
from sparse_dit.eval.tune import Floor, Limits, Tuner, read_floor, write
from sparse_dit.pipelines import disk
from sparse_dit.pipelines.generate import Request, load_pipeline
from sparse_dit.recipe import load_recipe

SIZE = {"steps": 2, "height": 48, "width": 48, "num_frames": 5}
REQUEST = Request("", seed=5, **SIZE)
PROMPTS = [f"a {color} circle moves right" for color in ("red", "blue", "green")]
SPACE = """
- recipe: radial
  set: {block_q: 16, block_k: 16, schedule.dense_layers: []}
  vary: {selection.density: [0.7, 0.45, 0.2], dense_share: [0.0, 0.5]}
"""


@pytest.fixture(scope="module")
def pipe(mini_wan: Path):
    loaded = load_pipeline(str(mini_wan))
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(autouse=True)
def known_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the small model sparse calls are no faster than dense ones; here they cost their density."""

    def ratios(taken, recipe, device) -> Ratios:
        return Ratios(recipe.selection.density, recipe.selection.density, 0.01, 10)

    monkeypatch.setattr(tuning, "call_ratios", ratios)


@pytest.fixture
def space(tmp_path: Path) -> str:
    (tmp_path / "space.yaml").write_text(SPACE)
    return str(tmp_path / "space.yaml")


def test_it_finds_what_an_exhaustive_search_finds_and_runs_nothing_twice(pipe, space: str, tmp_path: Path) -> None:
    candidates = load_space(space, 2)
    told: list[str] = []
    tuner = Tuner(pipe, "mini", REQUEST, tmp_path / "tuned.yaml", tell=told.append)
    tuner.exhaust(candidates, PROMPTS)
    assert len(load_rows(tmp_path / "tuned.rows.jsonl")) == 6 * 3
    assert tuner.references.made == 3, "one dense run a prompt"
    means = [statistics.fmean(row["psnr"] for row in tuner.rows_of(c.recipe, PROMPTS)) for c in candidates]
    assert len(told) == 18
    for floor in np.linspace(min(means), max(means), 4):
        again = Tuner(pipe, "mini", REQUEST, tmp_path / "tuned.yaml", tell=told.append)
        tuned = again.tune(candidates, PROMPTS, Floor("psnr", float(floor) - 1e-9))
        above = [number for number, mean in enumerate(means) if mean >= floor - 1e-9]
        assert tuned.answer.candidate == min(above, key=lambda number: tuned.costs[number])
        assert tuned.answer.certain
    assert len(told) == 18, "something ran again"


def test_the_preset_can_be_used_and_carries_its_evidence(pipe, space: str, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "mine.yaml"
    out.parent.mkdir()
    tuner = Tuner(pipe, "mini", REQUEST, out, tell=lambda line: None)
    floor = Floor("ssim", 0.0)
    tuned = tuner.tune(load_space(space, 2), PROMPTS[:2], floor)
    assert write(tuner, tuned, PROMPTS[:2], floor) == [out.with_suffix(".json"), out]
    recipe = load_recipe(str(out))
    assert (recipe.name, recipe.selection.density, recipe.schedule.dense_steps) == ("mine", 0.2, 0)
    assert "found by sparse-dit tune: radial, density 0.2, dense_share 0.0" in recipe.note
    text = out.read_text()
    assert text.startswith("# radial, density 0.2, dense_share 0.0: the fastest of 6 with ssim 0 or more\n")
    assert "Self-attention takes 0.200 of dense attention's time" in text
    row = json.loads(out.with_suffix(".json").read_text())
    assert (row["schema"], row["kind"], row["floor"], row["model"]) == (1, "tuned", {"ssim": 0.0}, "mini")
    assert len(row["settings"]) == 6
    assert row["settings"][0]["attention_time"] == pytest.approx(0.2)
    assert row["answer"]["certain"] is True
    assert row["answer"]["low"] <= row["answer"]["ssim"] <= row["answer"]["high"]
    assert {"versions", "revision", "device", "seed", "steps"} <= row.keys()


def test_what_fails_or_does_not_fit_is_named_and_the_rest_goes_on(pipe, tmp_path: Path, monkeypatch) -> None:
    def failing(pipe, requests, recipe, *args, **settings):
        if recipe.selection.density == 0.3:
            raise ValueError("frames are not finite")
        return against(pipe, requests, recipe, *args, **settings)

    monkeypatch.setattr(tuning, "against", failing)
    base = load_recipe("radial").override({"block_q": 16, "block_k": 16, "schedule.dense_layers": []})
    recipes = [base.override({"selection.density": density, "schedule.dense_steps": 0}) for density in (0.3, 0.5)]
    beyond = base.override({"schedule.dense_layers": [9]})
    candidates = [Candidate(name, recipe) for name, recipe in zip("abc", [*recipes, beyond], strict=True)]
    told: list[str] = []
    tuner = Tuner(pipe, "mini", REQUEST, tmp_path / "tuned.yaml", tell=told.append)
    tuned = tuner.tune(candidates, PROMPTS[:2], Floor("psnr", 0.0))
    assert tuned.candidates[tuned.answer.candidate].label == "b"
    assert [line.partition(":")[0] for line in tuned.complaints] == ["c does not fit", "a failed"]
    assert "frames are not finite (a " in tuned.complaints[1]
    with pytest.raises(ValueError, match=r"no candidate fits; .*c does not fit"):
        tuner.tune(candidates[2:], PROMPTS, Floor("psnr", 0.0))


def test_limits_stop_it_and_it_goes_on(pipe, space: str, tmp_path: Path) -> None:
    out = tmp_path / "tuned.yaml"

    def tuned(limits: Limits | None = None):
        tuner = Tuner(pipe, "mini", REQUEST, out, tell=lambda line: None)
        return tuner.tune(load_space(space, 2), PROMPTS[:3], Floor("psnr", 62.0), limits)

    assert tuned(Limits(seconds=0.0)).stopped == "0 seconds were over"
    assert not load_rows(out.with_suffix(".rows.jsonl"))
    first = tuned(Limits(runs=4))
    assert (first.runs, first.stopped) == (4, "4 runs were made")
    assert len(load_rows(out.with_suffix(".rows.jsonl"))) == 4
    last = tuned()
    assert not last.stopped
    assert len(load_rows(out.with_suffix(".rows.jsonl"))) == last.runs > 4


def stop_in(owner: Any, name: str, call: int, stop: Callable[..., object], counts: Any = lambda *_: True) -> None:
    """The call-th call of a function, of those whose arguments count, does `stop` with them first."""
    real, calls = getattr(owner, name), itertools.count(1)

    def stopping(*arguments: Any, **settings: Any) -> Any:
        if counts(*arguments) and next(calls) == call:
            stop(*arguments)
        return real(*arguments, **settings)

    setattr(owner, name, stopping)


def half_a_row(stand_still: Callable[..., object]) -> None:
    """Stands still when half of the second row is on the disk."""

    def write(file: int, content: bytes) -> None:
        os.write(file, content[: len(content) // 2])
        stand_still()

    stop_in(disk, "_write_all", 2, write, lambda file, content: b'"psnr"' in content)


def test_sigkill_costs_the_run_in_flight_at_most(pipe, space: str, tmp_path: Path) -> None:
    """Killed three times, where it stands still: so nothing hangs on how fast it is."""
    out = tmp_path / "tuned.yaml"
    rows, context = out.with_suffix(".rows.jsonl"), multiprocessing.get_context("fork")

    def tune() -> tuning.Tuned:
        tuner = Tuner(pipe, "mini", REQUEST, out, tell=lambda line: None)
        return tuner.tune(load_space(space, 2), PROMPTS, Floor("psnr", 62.0))

    kept, torn = b"", b""
    for place, whole in (
        (lambda stand_still: stop_in(references, "write_file", 1, stand_still), 0),
        (lambda stand_still: stop_in(tuning, "against", 3, stand_still), 2),
        (half_a_row, 3),
    ):
        there = context.Event()

        def until_killed(place: Callable[..., None] = place, there: Any = there) -> None:
            place(lambda *_: there.set() or time.sleep(3600))
            tune()

        child = context.Process(target=until_killed, daemon=True)
        child.start()
        while not there.wait(0.1) and child.is_alive():
            pass
        child.kill()
        child.join()
        assert there.is_set()
        found = rows.read_bytes() if rows.exists() else b""
        assert found.startswith(kept), "a row was lost"
        assert found.count(b"\n") == whole
        kept, torn = found[: found.rfind(b"\n") + 1], found[found.rfind(b"\n") + 1 :]
    assert torn
    tuned = tune()
    found = load_rows(rows)
    assert rows.read_bytes().startswith(kept), "a row was lost"
    assert len({row["id"] for row in found}) == len(found) == tuned.runs, "a run was made twice"
    assert tuned.answer.certain


def test_the_command(mini_wan: Path, space: str, tmp_path: Path, monkeypatch, capsys) -> None:
    out = tmp_path / "new" / "tuned.yaml"
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:2]))
    size = [f"--{name}={value}" for name, value in SIZE.items()]
    arguments = ["tune", "--model", str(mini_wan), *size, "--space", space, "--prompts", str(tmp_path / "prompts.txt")]
    arguments += ["--out", str(out)]
    assert main([*arguments, "--floor", "psnr=1"]) == 0
    printed = capsys.readouterr().out
    assert "radial, density 0.2, dense_share 0.0: the fastest of 6 with psnr 1 or more" in printed
    assert sorted(file.name for file in out.parent.iterdir()) == [
        "tuned.costs.jsonl", "tuned.json", "tuned.rows.jsonl", "tuned.yaml",
    ]  # fmt: skip
    assert main([*arguments, "--floor", "psnr=1000"]) == 1
    assert "no recipe that is faster than dense attention is above the floor" in capsys.readouterr().out
    monkeypatch.setattr(tuning, "call_ratios", lambda taken, recipe, device: Ratios(1.5, 1.5, 0.0, 1))
    assert main([*arguments, "--floor", "psnr=1", "--out", str(tmp_path / "y.yaml")]) == 1
    printed = capsys.readouterr().out
    assert "dense attention is as fast as every recipe of the space" in printed
    assert "attention takes 1.25 of dense attention's time, left out" in printed


def test_a_limit_has_an_exit_code_of_its_own_and_keeps_the_dense_runs(
    mini_wan: Path, space: str, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "tuned.yaml"
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:2]))
    size = [f"--{name}={value}" for name, value in SIZE.items()]
    arguments = ["tune", "--model", str(mini_wan), *size, "--space", space, "--prompts", str(tmp_path / "prompts.txt")]
    arguments += ["--floor", "psnr=1", "--out", str(out)]
    assert main([*arguments, "--seconds", "1e-9"]) == 3
    assert "nothing with psnr 1 was found before 1e-09 seconds were over; 0 sparse runs" in capsys.readouterr().out
    assert not out.exists()
    assert main([*arguments, "--runs", "1"]) == 3
    assert "not certain as 1 runs were made" in capsys.readouterr().out
    assert out.exists()
    assert len(list((tmp_path / "tuned.dense").glob("*.npy"))) == 1, "the next start would make it again"
    assert main(arguments) == 0
    assert not (tmp_path / "tuned.dense").exists()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--floor", "psnr"], "floor: 'psnr'; valid: FIELD=NUMBER"),
        (["--floor", "lpips=0.1"], "floor: 'lpips=0.1'; valid: FIELD=NUMBER with a field of psnr"),
        (["--floor", "psnr=nan"], "floor: 'psnr=nan'"),
        (["--prompts", "missing.txt"], "prompts: cannot read 'missing.txt'"),
        (["--space", "missing.yaml"], "space: cannot read 'missing.yaml'"),
        (["--seconds", "-1"], "seconds: -1.0; valid: 0 or more"),
        (["--out", "tuned.json"], "out: 'tuned.json'; valid: a name ending in .yaml"),
    ],
)
def test_bad_input_is_one_line(options: list[str], error: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["tune", "--model", "/no/such/model", *options]) == 2
    assert capsys.readouterr().err.startswith(f"sparse-dit: error: {error}")
    assert not list(tmp_path.iterdir())


def test_floors() -> None:
    assert read_floor("ssim_min=0.5") == Floor("ssim_min", 0.5)
    assert str(Floor("psnr", 28.0)) == "psnr 28"
