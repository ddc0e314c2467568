"""VBench's scores beside result rows."""

import json
from pathlib import Path

import pytest

from sparse_dit.eval.page import page
from sparse_dit.eval.report import tables
from sparse_dit.eval.vbench import join, load_scores

SCORES = {
    "subject_consistency": [
        0.95,
        [
            {"video_path": "out/a red circle-0.mp4", "video_results": 0.9},
            {"video_path": "out/b.mp4", "video_results": 1.0},
            {"video_path": "out/nobody.mp4", "video_results": 0.5},
        ],
    ],
    "dynamic_degree": [0.5, [{"video_path": "/x/a red circle-0.mp4", "video_results": True}]],
}


def row(prompt: str, **more: object) -> dict:
    return {
        "recipe": {"name": "radial", "selection": "radial", "schedule": {"dense_steps": 0}},
        "model": "tiny-wan", "prompt": prompt, "seed": 0, "grid": [9, 16, 16], "steps": 20, "density": 0.5,
        "device": {"type": "cpu", "name": "x86_64", "dtype": "float32"}, "run_density": 0.5, "psnr": 30.0, "ssim": 0.9,
        **{f"{name}_{arm}": 1.0 for name in ("seconds", "attention_seconds") for arm in ("sparse", "dense")}, **more,
    }  # fmt: skip


def written(folder: Path, content: object) -> Path:
    (folder / "x_eval_results.json").write_text(json.dumps(content))
    return folder / "x_eval_results.json"


def test_scores_are_joined_by_video(tmp_path: Path) -> None:
    rows, lost = join([row("a red circle"), row("x", file="b.mp4"), row("y")], [load_scores(written(tmp_path, SCORES))])
    assert rows[0]["vbench"] == {"subject_consistency": 0.9, "dynamic_degree": 1.0}
    assert rows[1]["vbench"] == {"subject_consistency": 1.0}
    assert "vbench" not in rows[2]
    assert lost == ["vbench: 'nobody.mp4' is the video of no row"]
    assert "| radial, density 0.50, 0 of 20 steps dense | 1.0000 | 0.9500 | 2 |" in tables(rows)
    html = page(rows)
    assert "<th>subject consistency</th>" in html
    assert "0.9500 [0.9000, 1.0000]" in html


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ([], "holds no dimensions"),
        ({"color": 0.5}, "'color' in .*valid: .mean, .videos.."),
        ({"color": [0.5, [{"video_path": "a.mp4"}]]}, "of 'color' in .*valid: video_path and a number"),
        ({"color": [0.5, ["a.mp4"]]}, "of 'color' in .*valid: video_path and a number"),
    ],
)
def test_other_files_are_refused(content: object, error: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=error):
        load_scores(written(tmp_path, content))
    with pytest.raises(ValueError, match=r"cannot read .*none\.json"):
        load_scores(tmp_path / "none.json")
