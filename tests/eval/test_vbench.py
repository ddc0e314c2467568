"""VBench's scores beside result rows."""

import json
from pathlib import Path

import pytest

from sparse_dit.eval.page import page
from sparse_dit.eval.report import tables
from sparse_dit.eval.vbench import join, load_scores, video_name

# As the code of VBench 0.1.5 writes it, field by field; every kind of entry that it has.
SCORES = {
    "subject_consistency": [
        0.95,
        [
            {"video_path": "out/a red circle-0.mp4", "video_results": 0.9},
            {"video_path": "out/b.mp4", "video_results": 1.0},
            {"video_path": "out/nobody.mp4", "video_results": 0.5},
        ],
    ],
    "background_consistency": [
        0.97,
        # With --read_frame: the folder of frames.
        [{"video_path": "frames/a_red_circle-0", "video_results": 0.97, "video_sim": 7.76, "cnt_per_video": 8}],
    ],
    "dynamic_degree": [0.5, [{"video_path": "/x/a red circle-0.mp4", "video_results": True}]],
    "human_action": [0.0, [{"video_path": "out/b.mp4", "video_results": False, "cor_num_per_video": 0}]],
    "imaging_quality": [0.6512, [{"video_path": "out/a red circle-0.mp4", "video_results": 65.12}]],
    "color": [1.0, [{"video_path": "out/b.mp4", "video_results": 1.0, "cur_success_frame_rate": 1.0}]],
    "scene": [
        0.5,
        [{"video_path": "out/b.mp4", "video_results": 0.5, "success_frame_count": 8, "frame_count": 16}],
    ],
    "spatial_relationship": [
        0.25,
        [{"video_path": "out/b.mp4", "video_results": 0.25, "frame_results": [0, 1, 0, 0]}],
    ],
}
# Of long videos: clips, then videos; the mean over no video is NaN.
LONG = {
    "imaging_quality": [
        0.5,
        [
            {"video_path": "out/filtered_clips/a red circle-0/a red circle-0_000.mp4", "video_results": 40.0},
            {"video_path": "out/filtered_clips/a red circle-0/a red circle-0_001.mp4", "video_results": 60.0},
        ],
        [{"video_path": "out/a red circle-0.mp4", "video_results": 50.0}],
    ],
    "temporal_flickering": [0.9, [], [{"video_path": "out/b.mp4", "video_results": 0.9}, {"long_video_cnt": 1}]],
    "camera_motion": [
        1.0,
        {"pans_left": 1.0},
        [{"video_path": "out/b.mp4", "video_results": 1.0, "prompt_type": "pans left", "predict_type": ["pan_left"]}],
    ],
    "aesthetic_quality": [float("nan"), []],
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
    assert rows[0]["vbench"] == {
        "subject_consistency": 0.9, "background_consistency": 0.97, "dynamic_degree": 1.0, "imaging_quality": 0.6512,
    }  # fmt: skip
    assert rows[1]["vbench"] == {
        "subject_consistency": 1.0, "human_action": 0.0, "color": 1.0, "scene": 0.5, "spatial_relationship": 0.25,
    }  # fmt: skip
    assert "vbench" not in rows[2]
    assert lost == ["vbench: 'nobody' is the video of no row"]
    assert "| radial, density 0.50, 0 of 20 steps dense | 0.9700 | 1.0000 | 1.0000 | 0.0000 | 0.6512 |" in tables(rows)
    html = page(rows)
    assert "<th>subject consistency</th>" in html
    assert "0.9500 [0.9000, 1.0000]" in html


def test_long_videos_and_camera_motion_are_read_from_their_last_list(tmp_path: Path) -> None:
    assert load_scores(written(tmp_path, LONG)) == {
        "a_red_circle-0": {"imaging_quality": 0.5},
        "b": {"temporal_flickering": 0.9, "camera_motion": 1.0},
    }


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("out/a. b-0.MP4", "a._b-0"),
        ("frames/a._b-0", "a._b-0"),
        ("x.gif", "x"),
        (".mp4", ""),
        ("version 2.5-1.mp4", "version_2.5-1"),
    ],
)
def test_a_video_has_one_name_however_it_was_read(path: str, name: str) -> None:
    assert video_name(path) == name


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ([], "holds no dimensions"),
        ({"color": [0.5]}, "'color' in .*valid: .mean, .videos.."),
        ({"color": [0.5, [], {}]}, "'color' in .*valid: .mean, .videos.."),
        ({"color": [0.5, [{"prompt": "a", "video_results": []}]]}, "of 'color' in .*valid: video_path and a number"),
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
