"""`sparse-dit batch` from end to end: good rows beside bad ones, and every bad input as one line."""

import json
from pathlib import Path

import pytest

from sparse_dit.app.cli import main
from sparse_dit.pipelines.batch.run import Plan, Report
from sparse_dit.pipelines.batch.worker import Job

SIZE = ["--height", "32", "--width", "32", "--num_frames", "5", "--steps", "2", "--video_format", "webp"]


def write(path: Path, *lines: str) -> str:
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def test_rows_become_videos_and_results(mini_wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = write(
        tmp_path / "rows.jsonl",
        '{"prompt": "a fox", "seed": 1}',
        '{"prompt": "a hare", "recipe": "dense", "num_frames": 9}',
        '{"prompt": "a bear", "stepz": 3}',
        '{"prompt": "a wolf", "height": 40}',
    )
    out = tmp_path / "deep" / "out"
    arguments = ["batch", manifest, "--model", str(mini_wan), *SIZE, "--recipe.block_q", "16", "--out", str(out)]
    assert main([*arguments, "--dry-run"]) == 1
    shown = capsys.readouterr().out
    assert "4 rows in all: 3 would run, 0 done" in shown
    assert "line 3 refused: unknown field 'stepz'" in shown
    assert not out.exists()

    assert main(arguments) == 1
    output = capsys.readouterr()
    assert "2 made, 0 done before, 0 repeats, 2 failed (see failures.jsonl)" in output.out
    assert "line 4: `height` and `width` have to be divisible by 16" in output.err
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["recipe"]["name"], row["frames"]) for row in rows] == [
        ("a fox", "tiny-radial", [5, 32, 32, 3]),
        ("a hare", "dense", [9, 32, 32, 3]),
    ]
    assert rows[0]["recipe"]["block_q"] == 16
    for row in rows:
        assert (out / row["file"]).stat().st_size == row["bytes"]
        assert {"sha256", "seconds", "density", "run_density", "calls", "device", "versions", "revision"} <= row.keys()
    assert [json.loads(line)["line"] for line in (out / "failures.jsonl").read_text().splitlines()] == [3, 4]

    write(
        tmp_path / "rows.jsonl",
        '{"prompt": "a fox", "seed": 1}',
        '{"prompt": "a hare", "recipe": "dense", "num_frames": 9}',
    )
    kept = (out / "results.jsonl").read_bytes()
    assert main(arguments) == 0
    assert "0 made, 2 done before, 0 repeats, 0 failed" in capsys.readouterr().out
    assert (out / "results.jsonl").read_bytes() == kept
    assert not (out / "failures.jsonl").exists()
    # The same options under both spellings; nothing is left to run.
    assert main([*arguments, "--dry_run", "--video-format", "webp"]) == 0
    assert "2 done" in capsys.readouterr().out


def test_options_reach_the_job(mini_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[Job] = []

    def run(plan: Plan, out: Path, job: Job, *others: object) -> Report:
        jobs.append(job)
        return Report(plan)

    monkeypatch.setattr("sparse_dit.pipelines.batch.run.run_batch", run)
    manifest = write(tmp_path / "rows.csv", "prompt", "a fox")
    options = ["--threads", "3", "--fps", "5", "--retries", "4", "--video_format", "webp"]
    assert main(["batch", manifest, "--model", str(mini_wan), "--out", str(tmp_path / "out"), *options]) == 0
    assert [(job.threads, job.fps, job.retries, job.suffix) for job in jobs] == [(3, 5, 4, ".webp")]


BAD = {
    "no manifest": (["batch"], "manifest"),
    "missing manifest": (["batch", "none.jsonl"], "No such file"),
    "manifest of another kind": (["batch", "rows.txt"], ".jsonl or .csv"),
    "missing model": (["batch", "rows.csv", "--model", "/no/such/model"], "tiny-wan"),
    "unknown recipe": (["batch", "rows.csv", "--recipe", "radail"], "radial"),
    "unknown engine": (["batch", "rows.csv", "--engine", "spark"], "ray"),
    "address of nothing": (["batch", "rows.csv", "--address", "auto"], "valid: engine 'ray'"),
    "workers below zero": (["batch", "rows.csv", "--workers", "-1"], "from 0"),
    "GPUs that there are not": (["batch", "rows.csv", "--device", "cpu", "--gpus_per_video", "2"], "0 GPUs; valid: 1"),
    "retries below zero": (["batch", "rows.csv", "--retries", "-1"], "from 0"),
    "prompt of one": (["batch", "rows.csv", "--prompt", "x"], "unknown option --prompt"),
    "folder below a file": (["batch", "rows.csv", "--out", "rows.csv/out"], "valid: a folder that can be written"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.csv", "prompt", "a fox")
    argv, valid = BAD[name]
    assert main(argv) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("sparse-dit: error: ")
    assert valid in error
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]
