"""Knobs: bisection against known densities, on a small model, and once only."""

from pathlib import Path

import pytest

from sparse_dit.eval import knobs, results
from sparse_dit.eval.contenders import Sought
from sparse_dit.pipelines.generate import Request, load_pipeline


@pytest.mark.parametrize("falls", [False, True])
@pytest.mark.parametrize("wanted", [0.5, 0.25, 0.12])
def test_bisection_finds_the_value_of_a_density(falls: bool, wanted: float) -> None:
    knob = Sought("x", 0.0, 2.0, falls)
    tried: list[float] = []

    def density(value: float) -> float:
        tried.append(value)
        return (2.0 - value if falls else value) / 2.0

    value, found = knobs.bisect(density, knob, wanted)
    assert found == pytest.approx(wanted, abs=knobs.NEAR)
    assert density(value) == found
    assert len(tried) <= knobs.HALVINGS + 1


def test_a_density_out_of_reach_gives_the_nearest_one() -> None:
    value, found = knobs.bisect(lambda value: 0.2 + value, Sought("x", 0.0, 1.0), 0.12)
    assert (value, found) == (pytest.approx(0.0, abs=0.01), pytest.approx(0.2, abs=0.01))


def test_knobs_of_a_run_are_found_once(mini_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knobs, "DENSITIES", (0.5,))
    monkeypatch.setattr(knobs, "HALVINGS", 3)
    pipe = load_pipeline(str(mini_wan))
    pipe.set_progress_bar_config(disable=True)
    request = Request("", steps=2, height=64, width=64, num_frames=9)
    file = tmp_path / "knobs.jsonl"
    knobs.turn(pipe, "sol", request, ["a red circle"], file)
    rows = results.load_rows(file)
    assert [(row["contender"], row["wanted"], row["setting"]) for row in rows] == [("sol", 0.5, "selection.tau")]
    assert rows[0]["density"] == pytest.approx(0.5, abs=0.2)
    knobs.turn(pipe, "sol", request, ["a red circle"], file)
    assert results.load_rows(file) == rows
    assert knobs.values(file) == {("sol", 0.5, 0): rows[0]["value"]}


def test_a_request_without_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="steps: None; valid: a whole number from 1"):
        knobs.turn(None, "sol", Request(""), ["a"], tmp_path / "rows.jsonl")  # type: ignore[arg-type]
