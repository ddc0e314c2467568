"""`bench` and `tune-tiles` as commands: what they refuse, print and write."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sparse_dit.app import bench as commands
from sparse_dit.app.cli import main
from sparse_dit.eval.bench import kernels, models, tune
from sparse_dit.eval.bench.architectures import ARCHITECTURES
from sparse_dit.eval.bench.clock import HostClock
from sparse_dit.eval.bench.variants import VARIANTS
from sparse_dit.eval.results import load_rows
from sparse_dit.kernels import tiles

ARGUMENTS = ["bench", "kernels", "--shapes", "1x200x64", "--densities", "1.0", "--no_flex"]


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the commands measure on the CPU, where they would refuse to."""
    for bench in (kernels, tune):
        monkeypatch.setattr(bench, "current_gpu", lambda: torch.device("cpu"))
        monkeypatch.setattr(bench, "CudaClock", lambda device: HostClock(runs=1))


@pytest.mark.usefixtures("on_cpu")
def test_bench_prints_a_table_and_appends_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "rows.jsonl"
    assert main([*ARGUMENTS, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    rows = load_rows(out)
    assert {row["status"] for row in rows} == {"measured"}
    assert rows[0]["kernel"] == rows[0]["dense"] == "sdpa"
    assert rows[0]["command"].startswith("sparse-dit")
    assert "pool + top-k density 0.3" in printed
    assert f"wrote {out}" in printed
    assert "left out" not in printed


@pytest.mark.usefixtures("on_cpu")
def test_bench_says_what_it_had_no_time_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    assert main([*ARGUMENTS, "--seconds", "1e-9", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "left out, the 1e-09 seconds were over: 1x200x64 host density 1;" in printed
    assert "TFLOP/s" not in printed, "a table of what was not measured"
    assert load_rows(out) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("arguments", [["bench", "kernels"], ["bench", "models"], ["tune-tiles"]])
def test_without_a_gpu_there_is_nothing_to_measure(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("sparse-dit: error: device: there is no GPU; valid: ")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["bench", "steps"], "what: 'steps'; valid: 'kernels', 'models', 'e2e'"),
        (["bench", "models", "--cases", "wan"], "cases: 'wan'; valid: wan2.1-14b-720p, "),
        (["bench", "models", "--variants", "fast"], "variants: 'fast'; valid: radial, "),
        (["bench", "models", "--seconds", "0"], "seconds: 0.0; valid: above 0"),
        (["bench", "models", "--case", "wan"], "bench models: unknown option --case; did you mean --cases?"),
        ([*ARGUMENTS, "--shapes", "12x300"], "shapes: '12x300'; valid: HEADSxTOKENSxHEAD_SIZE"),
        ([*ARGUMENTS, "--densities", "0"], "densities: 0.0; valid: above 0 and up to 1"),
        ([*ARGUMENTS, "--seconds", "0"], "seconds: 0.0; valid: above 0"),
        (["tune-tiles", "--head_sizes", "72"], "head_sizes: 72; valid: of (64, 128, 256)"),
        (["tune-tiles", "--seconds", "-1"], "seconds: -1.0; valid: above 0"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"sparse-dit: error: {error}")


def test_bench_models_prints_and_appends_a_row_a_variant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    arguments = ["--cases", "cogvideox-5b-480p", "--variants", "dense", "--tiny", "--out", str(out)]
    assert main(["bench", "models", *arguments]) == 0
    printed = capsys.readouterr().out
    assert [row["variant"] for row in load_rows(out)] == ["dense", "stock"]
    assert "cogvideox-5b-480p dense: " in printed
    assert f"wrote {out}" in printed


@pytest.mark.parametrize("run", [lambda *options: main(["bench", "models", *options]), lambda *all: models.main(all)])
def test_layers_are_compiled_where_that_is_asked_for(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer, **settings: compiled.append(layer))
    arguments = ["--cases", "cogvideox-5b-480p", "--variants", "--tiny", "--out", str(tmp_path / "rows.jsonl")]
    assert run(*arguments) == 0
    assert not compiled
    assert run(*arguments, "--compiled") == 0
    assert {type(layer).__name__ for layer in compiled} == {"CogVideoXBlock"}
    assert [row["compiled"] for row in load_rows(tmp_path / "rows.jsonl")] == [False, True]


def test_options_are_those_of_the_benches() -> None:
    assert list(ARCHITECTURES) == commands.CASES
    assert list(VARIANTS) == commands.VARIANTS
    usual = kernels.Request()
    assert (list(usual.shapes), list(usual.densities)) == (commands.SHAPES, commands.DENSITIES)
    assert list(tune.Request().head_sizes) == commands.HEAD_SIZES


@pytest.mark.usefixtures("on_cpu")
def test_a_damaged_file_of_tiles_is_told_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tiles.json"
    file.write_text("[{}]")
    assert main(["tune-tiles", "--out", str(file)]) == 2
    assert f"{file} row 1: []; valid: the fields kernel" in capsys.readouterr().err
    assert file.read_text() == "[{}]"
    assert tiles.read_rows("[]", "none") == []
