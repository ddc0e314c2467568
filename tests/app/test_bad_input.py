"""Every bad input is one line, and leaves nothing behind."""

import json
import shutil
from pathlib import Path

import pytest

from sparse_dit.app.cli import main

SIZE = ["--height", "64", "--width", "64", "--num_frames", "9", "--steps", "3"]
PROMPT = ["--prompt", "a small red circle moves right"]


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def _not_a_model(folder: Path) -> None:
    (folder / "model_index.json").write_text("{")


def _unknown_transformer(folder: Path) -> None:
    """A pipeline that diffusers loads but no family knows: its transformer is left out."""
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "transformer": [None, None]}))
    shutil.rmtree(folder / "transformer")


BAD = {
    "no command": ([], "compare"),
    "unknown command": (["compar"], "'compare'"),
    "unknown option": (["compare", *PROMPT, "--step", "3"], "--steps"),
    "abbreviated recipe field": (["compare", *PROMPT, "--recipe.block", "32"], "block_q"),
    "no prompt": (["compare"], "--prompt"),
    "no value": (["compare", *PROMPT, "--recipe.block_q"], "VALUE"),
    "steps in words": (["compare", *PROMPT, "--steps", "many"], "int"),
    "steps of zero": (["compare", *PROMPT, "--steps", "0"], "from 1"),
    "unknown device": (["compare", *PROMPT, "--device", "gpu"], "cuda"),
    "unknown recipe": (["compare", *PROMPT, "--recipe", "radail"], "radial"),
    "missing recipe file": (["compare", *PROMPT, "--recipe", "no/such.yaml"], "no/such.yaml"),
    "density of zero": (["compare", *PROMPT, "--recipe.selection.density", "0"], "(0, 1]"),
    "density above one": (["compare", *PROMPT, "--recipe.selection.density", "1.5"], "(0, 1]"),
    "density in words": (["compare", *PROMPT, "--recipe.selection.density", "half"], "number"),
    "block size without kernel": (["compare", *PROMPT, "--recipe.block_q", "48"], "16, 32, 64, 128"),
    "missing config": (["compare", *PROMPT, "--config", "no/such.yaml"], "valid: a YAML file"),
    "missing config with recipe": (["compare", "--config=no.yaml", "--recipe.block_q", "32"], "valid: a YAML file"),
    "missing model": (["compare", *PROMPT, "--model", "/no/such/model"], "tiny-wan"),
    "not a video file": (["generate", *PROMPT, "--out", "clip.gif"], ".mp4"),
    "unknown prompts": (["eval", "--prompts", "held-out:none"], "held-out:N"),
    "missing prompts": (["eval", "--prompts", "no/such.txt"], "held-out:N"),
    "unknown recipe of a sweep": (["eval", "--also", "radail"], "radial"),
    "density of a sweep": (["eval", "--densities", "2"], "(0, 1]"),
    "batch of a sweep": (["eval", "--batch", "0"], "from 1"),
    "missing rows": (["report", "--rows", "no/such.jsonl"], "no/such.jsonl"),
    "missing probes": (["report", "--rows", "--probes", "no/such.jsonl"], "error: probes: 'no/such.jsonl' is no file"),
    "rows of zero": (["probe", *PROMPT, "--rows", "0"], "from 1"),
    "missing video": (["compare-files", "no.mp4", "such.mp4"], "no.mp4"),
    "one video": (["compare-files", "no.mp4"], "reference"),
    "unknown option of files": (["compare-files", "a.mp4", "b.mp4", "--jsn"], "--json"),
    "fraction of a sweep": (["eval", "--dense_fractions", "-1"], "0 to 1"),
}


CONFIGS = {
    "torn": ("prompt: [", "valid: a YAML file"),
    "no options": ("just text", "valid: a YAML file"),
    "unknown option": ("prompt: x\nstepz: 3", "stepz"),
    "unknown recipe": ("prompt: x\nrecipe: radail", "radial"),
    "wrong recipe": ("prompt: x\nrecipe: {name: mine, block_q: 48}", "16, 32, 64, 128"),
    "wrong kind": ("prompt: x\nsteps: many", "int"),
}


def assert_one_line_error(argv: list[str], valid: str, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(out)
    assert main(argv) == 2
    output = capsys.readouterr()
    lines = output.err.splitlines()
    assert len(lines) == 1, output.err
    assert lines[0].startswith("sparse-dit: error: ")
    assert valid in lines[0]
    assert output.out == ""
    assert files(out) == before, "something was left behind"


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    argv, valid = BAD[name]
    assert_one_line_error(argv, valid, tmp_path, capsys)


@pytest.mark.parametrize("name", CONFIGS)
def test_bad_config_files_are_one_line(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    text, valid = CONFIGS[name]
    (tmp_path / "config.yaml").write_text(text)
    assert_one_line_error(["compare", "--config", "config.yaml"], valid, tmp_path, capsys)


@pytest.mark.parametrize(
    ("damage", "valid"),
    [(_not_a_model, "model_index.json is damaged"), (_unknown_transformer, "WanTransformer3DModel")],
)
@pytest.mark.parametrize("command", ["compare", "generate"])
def test_bad_models_are_one_line(
    command: str, damage, valid: str, mini_wan: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = shutil.copytree(mini_wan, tmp_path / "model")
    damage(model)
    assert_one_line_error([command, "--model", str(model), *PROMPT, *SIZE], valid, tmp_path, capsys)


def test_bad_sizes_and_layers_are_one_line(mini_wan: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    base = ["compare", "--model", str(mini_wan), *PROMPT]
    assert_one_line_error([*base, *SIZE, "--recipe.schedule.dense_layers", "[7]"], "0 to 1", tmp_path, capsys)
    assert_one_line_error([*base, *SIZE, "--height", "50"], "divisible by 16", tmp_path, capsys)


@pytest.mark.parametrize("command", ["compare", "generate"])
def test_an_output_that_cannot_be_written_is_told_before_the_model_is_loaded(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / ("clip.mp4" if command == "generate" else "folder")
    argv = [command, *PROMPT, "--model", "/no/such/model", "--out", str(out)]
    assert_one_line_error(argv, "valid: a folder that can be written", tmp_path, capsys)
