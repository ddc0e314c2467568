"""Calibration of a small pipeline: the profile it makes, and where it goes on."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparse_dit.app.cli import main
from sparse_dit.calibration import Paro, Search, SparseVDiT, Windows
from sparse_dit.eval import calibrate as calibrate_module
from sparse_dit.eval.calibrate import Sampling, calibrate, calibration_prompts
from sparse_dit.pipelines.generate import Request, generate, load_pipeline
from sparse_dit.pipelines.patch import enable, explain, sparse, summary
from sparse_dit.pipelines.tiny_wan.grammar import held_out_prompts
from sparse_dit.profiles import load_profile
from sparse_dit.recipe import Recipe, load_recipe
from sparse_dit.selection import Profiled

REQUEST = Request("", seed=3, steps=3, height=64, width=64, num_frames=9)
PROMPTS = ["a red circle moves right", "a blue square grows"]
SAMPLING = Sampling(block_q=32, block_k=32)
SEARCHES: list[Search] = [Paro(density=0.4), SparseVDiT(density=0.4), Windows(density=0.4, tile=(1, 4, 8))]


@pytest.fixture(scope="module")
def pipe(mini_wan: Path) -> Any:
    loaded = load_pipeline(str(mini_wan))
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Request, Any]]:
    """The requests that were generated, and their frames."""
    made: list[tuple[Request, Any]] = []

    def counted(pipe: Any, request: Request) -> Any:
        made.append((request, generate(pipe, request)))
        return made[-1][1]

    monkeypatch.setattr(calibrate_module, "generate", counted)
    return made


def recipe_of(file: Path) -> Recipe:
    return load_recipe({"selection": {"name": "profile", "file": str(file)}, "block_q": 32, "block_k": 32})


@pytest.mark.parametrize("search", SEARCHES, ids=["paro", "sparse-vdit", "sta"])
def test_a_profile_is_made_that_the_model_runs_with(pipe: Any, search: Search, tmp_path: Path) -> None:
    file = tmp_path / "made.safetensors"
    made = calibrate(pipe, search, PROMPTS[:1], REQUEST, file, model="mini", sampling=SAMPLING)
    loaded = load_profile(file)
    assert loaded.about == made.about
    assert loaded.about["prompts"] == PROMPTS[:1]
    assert (loaded.model.layers, loaded.model.heads, loaded.layout.grid) == (2, 2, (3, 8, 8))
    assert loaded.bins == search.bins(3)
    # A row of six blocks has at least its best one, a window at least a tile.
    assert 0.0 < loaded.about["density"] <= 0.45
    told = explain(pipe, recipe_of(file), height=64, width=64, num_frames=9, num_inference_steps=3)
    with sparse(pipe, recipe_of(file)):
        generate(pipe, replace(REQUEST, prompt=PROMPTS[1]))
        done = summary(pipe)
    assert done.sparse == done.made > 0
    assert told.run_density == pytest.approx(loaded.about["density"])
    assert done.run_density == pytest.approx(told.run_density)


def test_looking_changes_nothing(pipe: Any, tmp_path: Path, runs: list[tuple[Request, Any]]) -> None:
    calibrate(pipe, SparseVDiT(density=0.4), PROMPTS[:1], REQUEST, tmp_path / "p.safetensors", sampling=SAMPLING)
    [(request, frames)] = runs
    assert request == replace(REQUEST, prompt=PROMPTS[0])
    np.testing.assert_allclose(frames, generate(pipe, request), atol=1e-4)


def test_it_goes_on_where_it_stopped_and_settles_anew_without_a_run(
    pipe: Any, tmp_path: Path, runs: list[tuple[Request, Any]]
) -> None:
    file = tmp_path / "p.safetensors"
    search = Paro(density=0.5)
    first = calibrate(pipe, search, PROMPTS, REQUEST, file, sampling=SAMPLING)
    assert [request.seed for request, _ in runs] == [3, 4, 3, 4]  # two passes
    parts = sorted(file.with_suffix(".parts").iterdir())
    assert len(parts) == 2 * 2 * 2
    runs.clear()
    sparser = calibrate(pipe, replace(search, density=0.2), PROMPTS, REQUEST, file, sampling=SAMPLING)
    assert not runs
    assert sparser.about["density"] < first.about["density"]
    written = {part: part.stat().st_mtime_ns for part in parts}
    parts[0].unlink()
    again = calibrate(pipe, search, PROMPTS, REQUEST, file, sampling=SAMPLING)
    assert len(runs) == 1
    assert [part.stat().st_mtime_ns == written[part] for part in parts] == [False] + [True] * 7
    assert again.masks is not None
    assert first.masks is not None
    assert (again.masks == first.masks).all()
    runs.clear()
    calibrate(pipe, search, PROMPTS[:1], REQUEST, file, sampling=SAMPLING)
    assert len(runs) == 2  # other prompts are another calibration


@pytest.mark.parametrize(
    ("sampling", "bins", "places"),
    [
        (Sampling(), (0, 1, 2, 3), {0: 0, 1: 1, 2: 2, 4: 3}),
        (Sampling(bins=2), (0, 3), {1: 0, 4: 1}),
        (Sampling(bins=1, samples=3), (0,), {1: 0, 3: 0, 5: 0}),
        (Sampling(bins=99, samples=9), (0, 1, 2, 3, 4, 5), {step: step for step in range(6)}),
    ],
)
def test_bins_and_the_steps_that_are_looked_at(
    sampling: Sampling, bins: tuple[int, ...], places: dict[int, int]
) -> None:
    assert sampling.cut(Paro(), 6) == bins
    assert sampling.places(bins, 6) == places


def test_a_profile_of_another_model_is_refused_before_anything_is_changed(pipe: Any, tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    made = calibrate(pipe, Windows(tile=(1, 4, 8)), PROMPTS[:1], REQUEST, file, sampling=SAMPLING)
    replace(made, model=replace(made.model, transformer="FluxTransformer2DModel")).save(file)
    with pytest.raises(ValueError, match=r"^profile: made for FluxTransformer2DModel .*; valid: "):
        enable(pipe, recipe_of(file))
    with pytest.raises(ValueError, match="no sparse attention"):
        summary(pipe)


def test_prompts_to_calibrate_with_are_none_that_results_are_shown_on() -> None:
    drawn = calibration_prompts("drawn:8")
    assert len(set(drawn)) == 8
    assert not set(drawn) & set(held_out_prompts(64))
    for source in ("drawn:", "drawn:0", "nothing.txt"):
        with pytest.raises(ValueError, match=r"^prompts: .*, or drawn:N$"):
            calibration_prompts(source)


def test_the_command(mini_wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "profile.safetensors"
    size = [
        "--model",
        str(mini_wan),
        "--steps",
        "2",
        "--height",
        "64",
        "--width",
        "64",
        "--num_frames",
        "9",
        "--device",
        "cpu",
    ]
    command = [
        "calibrate",
        "--model",
        str(mini_wan),
        *size,
        "--prompts",
        "drawn:1",
        "--block",
        "32",
        "--out",
        str(file),
    ]
    assert main([*command, "--method", "sta", "--tile", "1", "4", "8", "--bins", "1"]) == 0
    assert f"wrote {file}: density 0." in capsys.readouterr().out
    assert isinstance(recipe_of(file).selection, Profiled)
    for wrong, message in (
        (["--method", "paro", "--density", "null"], "density: null with method paro"),
        (["--method", "paro", "--tile", "1", "1", "1"], "tile: [1, 1, 1] with method paro"),
        (["--block", "33"], "block: 33"),
        (["--costs", "nothing.jsonl"], "costs: 'nothing.jsonl'"),
        (["--bins", "-1"], "bins: -1"),
    ):
        assert main([*command, *wrong]) == 2
        assert message in capsys.readouterr().err
