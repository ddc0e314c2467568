"""What the options of `calibrate` become: nothing that one types is lost on the way."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from sparse_dit.app import commands
from sparse_dit.app.calibrate import TILE, search_of
from sparse_dit.app.cli import main
from sparse_dit.eval import calibrate

SIZE = ["--height", "64", "--width", "64", "--num_frames", "9", "--steps", "3"]


def test_costs_are_looked_up_for_the_tokens_of_the_run(
    mini_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(commands, "search_of", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(calibrate, "calibrate", lambda *_, **__: SimpleNamespace(about={"density": 0.5}))
    out = str(tmp_path / "profile.safetensors")
    assert main(["calibrate", "--model", str(mini_wan), *SIZE, "--method", "paro", "--out", out]) == 0
    assert asked == [("paro", 0.25, [6, 8, 8], ""), ("paro", 0.25, [6, 8, 8], "", 3 * 8 * 8)]


def test_costs_are_those_of_the_nearest_length(tmp_path: Path) -> None:
    """Half of the blocks took a quarter of a dense call's time over 1,000 tokens, and three quarters over 9,000."""
    row = {"kind": "kernel", "what": "attention", "kernel": "triton", "precision": "native", "lists": "equal"}
    row |= {"codes": False, "ordered": False, "dense_ms": 4.0}
    rows = [
        {**row, "density": density, "ms": ms, "shape": {"tokens": tokens}}
        for tokens, half in ((1000, 1.0), (9000, 3.0))
        for density, ms in ((1.0, 4.0), (0.5, half))
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"schema": 1, **each}) + "\n" for each in rows))
    for tokens, cost in ((900, 0.25), (10_000, 0.75)):
        search = search_of("sparse-vdit", 0.25, TILE, str(file), tokens)
        assert search.costs.of(0.5, ordered=False) == pytest.approx(cost)


def test_what_of_the_runs_is_looked_at_is_what_was_asked_for(
    mini_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[calibrate.Sampling] = []

    def run(*_: object, sampling: calibrate.Sampling, **__: object) -> SimpleNamespace:
        given.append(sampling)
        return SimpleNamespace(about={"density": 0.5})

    monkeypatch.setattr(calibrate, "calibrate", run)
    command = ["calibrate", "--model", str(mini_wan), *SIZE, "--out", str(tmp_path / "profile.safetensors")]
    assert main([*command, "--bins", "2", "--samples", "3", "--block", "32"]) == 0
    assert main(command) == 0
    assert given == [calibrate.Sampling(2, 3, 32, 32), calibrate.Sampling(None, 1, 64, 64)]
