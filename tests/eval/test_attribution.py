"""A speed-up taken apart: the arms, the stages, and the length from which on it pays."""

from pathlib import Path

import pytest

from sparse_dit.app.cli import main
from sparse_dit.eval import attribution
from sparse_dit.eval.attribution import INT8, KERNEL, SPARSE, STOCK, arms, attribute, break_even, lengths, summarize
from sparse_dit.eval.results import load_rows
from sparse_dit.eval.stages import STAGES, stages
from sparse_dit.pipelines.generate import Request, generate, load_pipeline
from sparse_dit.recipe import load_recipe

REQUEST = Request("a red circle moves right", seed=3, steps=2, height=64, width=64, num_frames=9)
SMALL = {"block_q": 16, "block_k": 16, "schedule.dense_layers": [], "schedule.dense_steps": 1}
RADIAL = load_recipe("radial").override({**SMALL, "selection.density": 0.4})


@pytest.fixture(scope="module")
def pipe(mini_wan: Path):
    loaded = load_pipeline(str(mini_wan))
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_every_arm_is_one_step_from_the_last(pipe) -> None:
    rows = list(attribute(pipe, REQUEST, RADIAL, model="mini", repeats=1))
    assert [row["arm"] for row in rows] == [STOCK, KERNEL, SPARSE, INT8]
    assert {row["status"] for row in rows} == {"measured"}
    by_arm = {row["arm"]: row for row in rows}
    # Our kernel on every block changes rounding alone, sparsity and INT8 more.
    assert by_arm[STOCK]["difference_max"] == 0
    assert by_arm[KERNEL]["run_density"] == 1
    assert by_arm[KERNEL]["psnr"] > 80
    assert by_arm[SPARSE]["psnr"] < by_arm[KERNEL]["psnr"]
    assert by_arm[INT8]["run_density"] == by_arm[SPARSE]["run_density"] < 1
    assert by_arm[INT8]["psnr"] < by_arm[KERNEL]["psnr"]
    for row in rows:
        assert sum(row["seconds"][stage] for stage in STAGES) == pytest.approx(row["seconds"]["whole"])
        assert all(row["seconds"][stage] > 0 for stage in STAGES)
        assert {"versions", "revision", "device", "seed", "recipe", "grid"} <= row.keys()
    assert rows[0]["over_stock"] == {"whole": 1, "attention": 1}


def test_medians_are_over_rounds() -> None:
    def row(arm: str, whole: float, over: float) -> dict:
        seconds = {"whole": whole, **dict.fromkeys(STAGES, whole / 5)}
        figures = {"over_stock": {"whole": over, "attention": over}, "run_density": 1.0, "psnr": 30.0}
        return {"arm": arm, "status": "measured", "seconds": seconds, **figures}

    rows = [row("a", 1.0, 1.0), row("b", 3.0, 0.5), row("a", 9.0, 1.0), row("b", 5.0, 0.7), row("b", 4.0, 0.6)]
    found = summarize([*rows, {"arm": "c", "status": "failed", "reason": "no"}])
    assert [(each["arm"], each["whole"], each["over_whole"]) for each in found] == [("a", 5.0, 1.0), ("b", 4.0, 0.6)]


def test_an_arm_that_fails_is_a_row_and_the_rest_goes_on(pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    real = attribution.run

    def failing(pipe, requests, recipe, **settings):
        if recipe.precision == "int8":
            raise RuntimeError("no INT8\nhere")
        return real(pipe, requests, recipe, **settings)

    monkeypatch.setattr(attribution, "run", failing)
    rows = list(attribute(pipe, REQUEST, RADIAL, repeats=2))
    assert [row["status"] for row in rows] == ["measured"] * 3 + ["failed"] + ["measured"] * 3
    assert rows[3]["reason"] == "no INT8 here"


def test_parts_of_a_pipeline_are_timed_and_left_as_they_were(pipe) -> None:
    before = [dict(vars(part)) for part in (pipe.transformer, pipe.text_encoder, pipe.vae)]
    with stages(pipe) as watch:
        generate(pipe, REQUEST)
    assert set(watch.seconds()) == {"transformer", "text encoder", "vae"}
    assert [dict(vars(part)) for part in (pipe.transformer, pipe.text_encoder, pipe.vae)] == before


def test_lengths_form_a_ladder(pipe) -> None:
    rows = list(lengths(pipe, REQUEST, RADIAL, model="mini", scales=(0.125, 0.5, 2.0)))
    measured = [row for row in rows if row["status"] == "measured"]
    assert [row["tokens"] for row in rows if row["arm"] == SPARSE] == [3, 48, 768]
    assert [row["reason"] for row in rows if row["status"] == "failed"] == ["no longer than a block"] * 3
    assert {row["arm"] for row in measured} == {KERNEL, SPARSE, INT8}
    assert all(row["refresh"] > 0 and (row["heads"], row["head_size"]) == (2, 16) for row in measured)


def test_break_even_is_where_a_recipe_begins_to_win_for_good() -> None:
    def row(tokens: int, ratio: float, status: str = "measured") -> dict:
        return {"arm": "a", "tokens": tokens, "refresh": ratio, "status": status}

    rows = [row(100, 0.9), row(200, 1.2), row(400, 0.8), row(800, 0.5), row(1600, 9.0, "failed")]
    assert break_even(rows, "a") == 400
    assert break_even(rows[:2], "a") is None
    assert break_even(rows, "b") is None


def test_the_command_writes_rows_and_tables(mini_wan: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "rows.jsonl"
    size = [f"--{name}={getattr(REQUEST, name)}" for name in ("steps", "height", "width", "num_frames")]
    options = ["--recipe.block_q", "16", "--recipe.block_k", "16", "--recipe.schedule.dense_steps", "1"]
    command = ["bench", "e2e", "--model", str(mini_wan), *size, "--repeats", "1", *options, "--out", str(out)]
    monkeypatch.setattr(attribution, "SCALES", (1.0,))
    assert main(command) == 0
    rows = load_rows(out)
    assert [row["kind"] for row in rows] == ["e2e"] * 4 + ["length"] * 3
    printed = capsys.readouterr().out
    for words in ("rest of the transformer", "text encoder", STOCK, KERNEL, SPARSE, INT8, "break-even"):
        assert words in printed

    failed = {**rows[3], "status": "failed", "reason": "no INT8 here"}
    monkeypatch.setattr(attribution, "attribute", lambda *_, **__: iter([*rows[:3], failed]))
    monkeypatch.setattr(attribution, "lengths", lambda *_, **__: iter(rows[4:]))
    assert main(command) == 1, "a run failed"
    assert "failed, no INT8 here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--recipe", "dense"], "recipe: 'dense' computes everything; valid: one that leaves blocks out"),
        (["--shapes", "1x200x64"], "bench e2e: unknown option --shapes"),
        (["--repeats", "0"], "repeats: 0; valid: a whole number from 1"),
    ],
)
def test_bad_input_is_one_line(options: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "e2e", "--model", "/no/such/model", *options]) == 2
    assert capsys.readouterr().err.startswith(f"sparse-dit: error: {error}")


def test_only_recipes_that_leave_something_out_can_be_taken_apart() -> None:
    assert arms(RADIAL)[SPARSE].precision == "native"
    with pytest.raises(ValueError, match="'sage' computes everything"):
        arms(load_recipe("sage"))
