"""Video files against video files, and against ffmpeg's own psnr filter."""

import math
import re
import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from sparse_dit.eval.files import compare_files, read_frames
from sparse_dit.pipelines.generate import write_video


def pixels(frames: int = 5, height: int = 34, width: int = 46, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def lossless(path: Path, frames: np.ndarray) -> Path:
    """Frames as they are, in a file that ffmpeg reads."""
    height, width = frames.shape[1:3]
    encode = ["-c:v", "ffv1", "-pix_fmt", "bgr0", str(path)]
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", "16", "-i", "-"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-y", *raw, *encode]
    subprocess.run(command, input=frames.tobytes(), check=True)
    return path


def ffmpeg_psnr(video: Path, reference: Path) -> list[float]:
    """PSNR of each frame as ffmpeg's filter prints it, in RGB."""
    inputs = ["-i", str(video), "-i", str(reference)]
    graph = "[0:v]format=gbrp[a];[1:v]format=gbrp[b];[a][b]psnr=stats_file=-"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", *inputs, "-lavfi", graph, "-f", "null", "-"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [float(value) for value in re.findall(r"psnr_avg:(\S+)", printed)]


def test_agrees_with_ffmpegs_psnr_filter(tmp_path: Path) -> None:
    reference = pixels()
    noise = np.random.default_rng(1).normal(
        0, [[[[2.0]]], [[[5.0]]], [[[11.0]]], [[[30.0]]], [[[0.4]]]], reference.shape
    )
    noisy = np.clip(reference + noise, 0, 255).round().astype(np.uint8)
    files = lossless(tmp_path / "noisy.mkv", noisy), lossless(tmp_path / "reference.mkv", reference)
    for file, frames in zip(files, (noisy, reference), strict=True):
        np.testing.assert_array_equal(np.stack(list(read_frames(file))), frames)
    expected = ffmpeg_psnr(*files)
    assert len(expected) == 5
    row = compare_files(*files)
    assert (row["frames"], row["height"], row["width"]) == (5, 34, 46)
    assert row["psnr"] == pytest.approx(np.mean(expected), abs=0.01)
    assert row["psnr_median"] == pytest.approx(np.median(expected), abs=0.01)
    assert row["psnr_min"] == pytest.approx(min(expected), abs=0.01)


def test_a_file_against_itself(tmp_path: Path) -> None:
    video = tmp_path / "clip.mp4"
    write_video(pixels().astype(np.float32) / 255, video)
    row = compare_files(video, video)
    assert row["psnr_min"] == math.inf
    assert row["flicker_max"] == row["difference_max"] == 0


def test_pictures_are_clips_too(tmp_path: Path) -> None:
    frames = pixels(3)
    write_video(frames.astype(np.float32) / 255, tmp_path / "clip.webp")
    np.testing.assert_array_equal(np.stack(list(read_frames(tmp_path / "clip.webp"))), frames)
    Image.fromarray(frames[0]).save(tmp_path / "first.png")
    row = compare_files(tmp_path / "first.png", tmp_path / "first.png")
    assert (row["frames"], row["flicker"], row["psnr"]) == (1, None, math.inf)


def test_files_that_cannot_be_compared_are_named(tmp_path: Path) -> None:
    good = lossless(tmp_path / "good.mkv", pixels())
    short = lossless(tmp_path / "short.mkv", pixels(4))
    wide = lossless(tmp_path / "wide.mkv", pixels(width=48))
    for torn in ("torn.mp4", "torn.webp"):
        (tmp_path / torn).write_bytes(b"no video")
        with pytest.raises(ValueError, match=f"{torn}' cannot be read"):
            compare_files(tmp_path / torn, good)
    with pytest.raises(ValueError, match="no file"):
        compare_files(tmp_path / "nothing.mp4", good)
    with pytest.raises(ValueError, match=r"good\.mkv' has more than the 4 of the other file"):
        compare_files(short, good)
    with pytest.raises(ValueError, match="48x34 and 46x34 pixels in frame 0"):
        compare_files(wide, good)
