"""The commands."""

import json
import math
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import yaml

from sparse_dit import __version__
from sparse_dit.app import cli
from sparse_dit.app.cli import COMMANDS, _value, main
from sparse_dit.eval import sweep
from sparse_dit.pipelines.generate import write_video
from sparse_dit.recipe import load_recipe, recipe_names

SIZE = ["--height", "64", "--width", "64", "--num_frames", "9", "--steps", "3"]
PROMPT = ["--prompt", "a small red circle moves right"]
ROWS = Path(__file__).parents[2] / "eval" / "results" / "radial-tiny-wan.jsonl"
SMALL_BLOCKS = ["--recipe.block_q", "32", "--recipe.block_k", "32", "--recipe.schedule.dense_steps", "1"]


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_compare_writes_webp_where_there_is_no_ffmpeg(
    mini_wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    arguments = ["compare", "--model", str(mini_wan), *PROMPT, *SIZE, *SMALL_BLOCKS, "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "needs ffmpeg; valid: install imageio-ffmpeg" in capsys.readouterr().err
    assert files(tmp_path) == []
    assert main([*arguments, "--video_format", "webp"]) == 0
    assert files(tmp_path / "out") == ["dense.webp", "result.json", "side-by-side.webp", "sparse.webp"]
    for name, options in (("dense", ["--recipe", "dense"]), ("sparse", SMALL_BLOCKS)):
        alone = tmp_path / f"{name}.webp"
        assert main(["generate", "--model", str(mini_wan), *PROMPT, *SIZE, *options, "--out", str(alone)]) == 0
        assert alone.read_bytes() == (tmp_path / "out" / alone.name).read_bytes()


def test_compare_writes_videos_and_a_result(mini_wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "demo"
    arguments = ["compare", "--model", str(mini_wan), *PROMPT, *SIZE, *SMALL_BLOCKS, "--seed", "5", "--out", str(out)]
    assert main([*arguments, "--fps", "5"]) == 0
    assert files(tmp_path) == [
        "deep",
        "deep/demo",
        *(f"deep/demo/{name}" for name in ("dense.mp4", "result.json", "side-by-side.mp4", "sparse.mp4")),
    ]
    for name in ("dense", "sparse"):
        assert iio.imread(out / f"{name}.mp4").shape == (9, 64, 64, 3)
        assert iio.immeta(out / f"{name}.mp4")["fps"] == 5
    assert iio.imread(out / "side-by-side.mp4").shape[0] == 9

    result = json.loads((out / "result.json").read_text())
    assert result["model"] == str(mini_wan)
    assert (result["seed"], result["prompt"], result["steps"]) == (5, PROMPT[1], 3)
    assert result["grid"] == [3, 8, 8]
    assert load_recipe(result["recipe"]).block_q == 32
    assert 0 < result["density"] < 1
    assert 0 < result["psnr_min"] <= result["psnr"] < math.inf
    assert 0 < result["ssim_min"] <= result["ssim"] < 1
    for field in ("seconds_dense", "seconds_sparse", "attention_seconds_dense", "attention_seconds_sparse"):
        assert result[field] > 0
    # Two layers, two branches, three steps, of which one is dense.
    assert result["calls"] == {"planned": 12, "made": 12, "sparse": 8, "dense": {"dense_steps": 4}}
    assert result["run_density"] == pytest.approx((4 + 8 * result["density"]) / 12)
    assert result["device"]["type"] in ("cpu", "cuda")
    assert {"python", "torch", "diffusers", "transformers", "sparse-dit"} <= result["versions"].keys()
    assert result["schema"] == 1
    assert "revision" in result

    output = capsys.readouterr()
    assert output.out.count("attention seconds") == 1
    assert "tiny-radial" in output.err, "no progress bar"


def test_dense_against_dense_is_equal(mini_wan: Path, tmp_path: Path) -> None:
    assert main(["compare", "--model", str(mini_wan), *PROMPT, *SIZE, "--recipe", "dense", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["psnr"] == result["psnr_min"] == "inf"
    assert result["ssim"] == pytest.approx(1)
    assert result["flicker_max"] == result["difference_max"] == 0
    assert result["calls"]["dense"] == {"recipe": 12}
    assert (result["density"], result["run_density"]) == (None, 1)


def test_density_one_is_dense_up_to_rounding(mini_wan: Path, tmp_path: Path) -> None:
    options = [*SMALL_BLOCKS[:4], "--recipe.selection.density", "1.0", "--recipe.schedule.dense_steps", "0"]
    assert main(["compare", "--model", str(mini_wan), *PROMPT, *SIZE, *options, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["density"] == 1
    assert float(result["psnr_min"]) > 80


def test_generate_writes_one_video(mini_wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video = tmp_path / "new" / "clip.mp4"
    options = [*PROMPT, *SIZE, *SMALL_BLOCKS, "--fps", "5", "--out", str(video)]
    assert main(["generate", "--model", str(mini_wan), *options]) == 0
    assert files(tmp_path) == ["new", "new/clip.mp4"]
    assert iio.imread(video).shape == (9, 64, 64, 3)
    assert iio.immeta(video)["fps"] == 5
    assert str(video) in capsys.readouterr().out


@pytest.mark.parametrize("command", ["compare", "generate"])
def test_a_run_without_a_sparse_call_is_told(
    command: str, mini_wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / ("out" if command == "compare" else "clip.mp4"))
    arguments = [command, "--model", str(mini_wan), *PROMPT, *SIZE, "--out", out]
    assert main([*arguments, *SMALL_BLOCKS[:4], "--recipe.schedule.dense_steps", "3"]) == 0
    told = "sparse-dit: warning: every call was dense (12 dense_steps); have fewer of --recipe.schedule.dense_steps"
    assert capsys.readouterr().err.count(told) == 1
    for options in (["--recipe", "dense"], SMALL_BLOCKS):
        assert main([*arguments, *options]) == 0
        assert "warning" not in capsys.readouterr().err


def test_families_lists_every_family(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_dit.pipelines.families import DENSE_FAMILIES, FAMILIES

    monkeypatch.setenv("COLUMNS", "200")
    assert main(["families", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["transformer"] for row in rows} == {*FAMILIES, *DENSE_FAMILIES}
    assert main(["families"]) == 0
    shown = capsys.readouterr().out
    assert "WanTransformer3DModel" in shown
    assert "its self-attention is linear" in shown


def test_methods_lists_every_recipe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["methods"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in recipe_names())
    for words in ("selection all", "selection radial density 0.25", "schedule dense_steps 12", "licence Apache-2.0"):
        assert words in shown
    assert main(["methods", "--json"]) == 0
    recipes = json.loads(capsys.readouterr().out)
    assert [recipe["name"] for recipe in recipes] == recipe_names()
    assert [load_recipe(recipe).to_dict() for recipe in recipes] == recipes


def test_explain_tells_the_plan(mini_wan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["explain", "--model", str(mini_wan), *SIZE, *SMALL_BLOCKS]
    assert main(arguments) == 0
    assert "density" in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["grid"] == [3, 8, 8]
    assert len(plan["steps"]) == 3


def test_eval_writes_rows_and_resumes(mini_wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "rows.jsonl"
    arguments = [
        "eval", "--model", str(mini_wan), *SIZE, *SMALL_BLOCKS[:4], "--prompts", "held-out:2",
        "--densities", "0.7", "0.5", "--dense_fractions", "0", "0.34", "--batch", "2", "--out", str(out),
    ]  # fmt: skip
    assert main(arguments) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == len({row["id"] for row in rows}) == 8
    assert {row["recipe"]["selection"]["density"] for row in rows} == {0.7, 0.5}
    assert {row["recipe"]["schedule"]["dense_steps"] for row in rows} == {0, 1}
    assert len({(row["prompt"], row["seed"]) for row in rows}) == 2
    assert {row["batch"] for row in rows} == {2}
    assert len(capsys.readouterr().out.splitlines()) == 8
    assert files(tmp_path) == ["results", "results/rows.jsonl"]

    kept = out.read_bytes()
    out.write_bytes(kept[:-20])
    assert main(arguments) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in again] == [row["id"] for row in rows]
    # The missing row ran alone, the others with another prompt.
    assert [row["batch"] for row in again] == [2] * 7 + [1]
    assert [row["psnr"] for row in again] == pytest.approx([row["psnr"] for row in rows], abs=0.01)


def test_compare_files_measures_videos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip = np.random.default_rng(0).random((3, 32, 48, 3), dtype=np.float32)
    write_video(clip, tmp_path / "a.webp")
    write_video(clip * 0.5, tmp_path / "b.webp")
    files = [str(tmp_path / name) for name in ("a.webp", "b.webp")]
    assert main(["compare-files", *files]) == 0
    shown = capsys.readouterr().out
    assert "3 frames of 48x32" in " ".join(shown.split())
    assert "lpips is not measured" in shown or "LPIPS" in shown
    assert main(["compare-files", *files, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["video"], row["reference"]) == tuple(files)
    assert row["psnr"] == pytest.approx(10 * math.log10(1 / (0.25 * np.square(clip.astype(float)).mean())), abs=0.1)
    assert row["schema"] == 1


def test_probe_looks_inside_and_report_shows_it(mini_wan: Path, tmp_path: Path, capsys) -> None:
    out, page = tmp_path / "probe.jsonl", tmp_path / "report.html"
    arguments = ["probe", "--model", str(mini_wan), *PROMPT, *SIZE, *SMALL_BLOCKS, "--rows", "4", "--out", str(out)]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "kept mass" in shown
    assert str(out) in shown
    [row] = [json.loads(line) for line in out.read_text().splitlines()]
    assert row["rows"] == 4
    assert row["by_step"]["recall"][0] == [None, None]
    assert all(0 < recall <= 1 for step in row["by_step"]["recall"][1:] for recall in step)
    assert main(["report", "--rows", str(ROWS), "--out", str(page)]) == 0
    plots = page.read_text(encoding="utf-8").count("<svg")
    assert main(["report", "--rows", str(ROWS), "--probes", str(out), "--out", str(page)]) == 0
    assert page.read_text(encoding="utf-8").count("<svg") == plots + 4


def test_report_shows_what_compare_left(mini_wan: Path, tmp_path: Path) -> None:
    clips, out = tmp_path / "clips", tmp_path / "report.html"
    options = [*PROMPT, *SIZE, *SMALL_BLOCKS, "--video_format", "webp", "--out", str(clips)]
    assert main(["compare", "--model", str(mini_wan), *options]) == 0
    for shown in ([], ["--clips", str(clips)]):
        assert main(["report", "--rows", str(ROWS), *shown, "--out", str(out)]) == 0
        found = f"{PROMPT[1]}. From above: dense, sparse, difference" in out.read_text(encoding="utf-8")
        assert found == bool(shown)


def test_report_makes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "report.html"
    assert main(["report", "--rows", str(ROWS), "--out", str(out)]) == 0
    assert files(tmp_path) == ["new", "new/report.html"]
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert str(out) in capsys.readouterr().out


def test_report_writes_pictures_tables_and_parquet(tmp_path: Path, capsys) -> None:
    damaged = tmp_path / "rows.jsonl"
    damaged.write_bytes(ROWS.read_bytes() + b"{broken}\n")
    wanted = ["--pictures", str(tmp_path / "plots"), "--markdown", str(tmp_path / "tables.md")]
    wanted += ["--parquet", str(tmp_path / "rows.parquet"), "--distances", str(ROWS.with_name("tiny-wan-decay.jsonl"))]
    assert main(["report", "--rows", str(damaged), *wanted, "--out", str(tmp_path / "report.html")]) == 1
    output = capsys.readouterr()
    assert "warning: " in output.err
    assert f"{damaged} line 97 is no JSON" in output.err
    assert files(tmp_path / "plots") == [
        *(f"distance-0-{axis}.png" for axis in ("space", "time")), *(f"plot-0-{number}.png" for number in range(3)),
    ]  # fmt: skip
    assert "## tiny-wan, 9 x 16 x 16 tokens, on NVIDIA H200" in (tmp_path / "tables.md").read_text()
    assert "| tiny-radial | 0.52 | 0 of 20 |" in (tmp_path / "tables.md").read_text()
    assert (tmp_path / "rows.parquet").read_bytes()[:4] == b"PAR1"
    assert "96 rows" in (tmp_path / "report.html").read_text()


def test_report_tells_by_its_exit_code_of_lines_and_videos_that_it_left_out(tmp_path: Path, capsys) -> None:
    damaged, scores = tmp_path / "probes.jsonl", tmp_path / "scores.json"
    damaged.write_bytes(b"{broken}\n")
    scores.write_text(json.dumps({"dynamic_degree": [0.5, [{"video_path": "nobody-0.mp4", "video_results": 0.5}]]}))
    for options, told in (
        (["--probes", str(damaged)], "line 1 is no JSON"),
        (["--vbench", str(scores)], "'nobody-0' is the video of no row"),
    ):
        assert main(["report", "--rows", str(ROWS), *options, "--out", str(tmp_path / "report.html")]) == 1
        assert told in capsys.readouterr().err


def test_eval_tells_by_its_exit_code_of_runs_that_failed(
    mini_wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = sweep.Failed("tiny-radial", ("a fox",), "out of memory")
    monkeypatch.setattr(sweep, "sweep", lambda *_: iter([failed]))
    out = str(tmp_path / "rows.jsonl")
    assert main(["eval", "--model", str(mini_wan), *SIZE, "--prompts", "held-out:1", "--out", out]) == 1
    assert "warning: tiny-radial failed: out of memory (a fox)" in capsys.readouterr().err


def test_eval_goes_on_behind_damaged_rows_and_says_so(mini_wan: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "rows.jsonl"
    out.write_text("{broken}\n")
    options = ["--densities", "0.5", "--dense_fractions", "0", "--prompts", "held-out:1", "--out", str(out)]
    assert main(["eval", "--model", str(mini_wan), *SIZE, *SMALL_BLOCKS[:4], *options]) == 1
    assert f"warning: {out} line 1 is no JSON" in capsys.readouterr().err
    assert json.loads(out.read_text().splitlines()[1])["psnr"] > 0


def test_eval_compares_recipes_as_they_stand(mini_wan: Path, tmp_path: Path) -> None:
    other, out = tmp_path / "other.yaml", tmp_path / "rows.jsonl"
    other.write_text("name: other\nselection: all\n")
    options = ["--densities", "--dense_fractions", "--also", str(other), "dense", "--prompts", "held-out:1"]
    assert main(["eval", "--model", str(mini_wan), *SIZE, *SMALL_BLOCKS, *options, "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["recipe"]["name"] for row in rows] == ["tiny-radial", "other", "dense"]
    assert rows[0]["recipe"]["schedule"]["dense_steps"] == 1
    assert rows[1]["psnr"] == rows[2]["psnr"] == "inf"
    assert len({row["seconds_dense"] for row in rows}) == 1


def test_print_config_feeds_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        *PROMPT,
        "--seed",
        "9",
        "--recipe",
        "radial",
        "--recipe.selection.density",
        "0.25",
        "--recipe.block_k=32",
    ]
    with pytest.raises(SystemExit) as stopped:
        main(["compare", *options, "--print_config"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    config = yaml.safe_load(printed)
    assert config["seed"] == 9
    assert config["recipe"]["selection"]["density"] == 0.25
    file = tmp_path / "config.yaml"
    file.write_text(printed)
    with pytest.raises(SystemExit):
        main(["compare", "--config", str(file), "--print_config"])
    assert capsys.readouterr().out == printed
    # A dotted option changes the recipe of the file, not the default one.
    with pytest.raises(SystemExit):
        main(["compare", "--config", str(file), "--recipe.schedule.dense_steps", "2", "--print_config"])
    changed = yaml.safe_load(capsys.readouterr().out)["recipe"]
    assert changed["schedule"]["dense_steps"] == 2
    assert changed["selection"]["density"] == 0.25
    assert changed["block_k"] == 32
    assert changed["name"] == "radial"
    with pytest.raises(SystemExit):
        main(["compare", f"--config={file}", "--recipe.selection.min_width=1", "--print_config"])
    changed = yaml.safe_load(capsys.readouterr().out)["recipe"]
    assert (changed["name"], changed["selection"]["min_width"]) == ("radial", 1)


def test_values_of_dotted_options_are_json_or_yaml() -> None:
    dotted = {"1e-3": 0.001, "[1, 2]": [1, 2], "null": None, "{name: all}": {"name": "all"}, "a: b: c": "a: b: c"}
    assert {text: _value(text) for text in dotted} == dotted


def test_an_interrupted_command_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(argv: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "read_command", interrupted)
    assert main(["methods"]) == 130
    assert capsys.readouterr().err == "sparse-dit: interrupted\n"


def test_a_recipe_may_be_a_file(mini_wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(load_recipe("radial").override({"name": "mine", "block_q": 32, "block_k": 32}).to_yaml())
    assert (
        main(
            ["explain", "--model", str(mini_wan), *SIZE, "--recipe", str(file), "--recipe.schedule.dense_layers", "[1]"]
        )
        == 0
    )
    assert "recipe mine" in capsys.readouterr().out


def test_help_is_quick_and_loads_no_torch() -> None:
    code = (
        "import sys; from sparse_dit.app.cli import main\n"
        "try: main(['--help'])\n"
        "finally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(name.split()[0] in done.stdout for name in COMMANDS)


def test_every_option_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            main([*command.split(), "--help"])
        assert stopped.value.code == 0
        assert "--config" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--version"])
    assert __version__ in capsys.readouterr().out


def test_as_a_module_without_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sparse_dit.app", "compare", *PROMPT, "--recipe", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
