"""Filmstrips: a dense and a sparse clip and their difference, a few frames side by side."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from sparse_dit.eval.files import Pixels, read_frames
from sparse_dit.eval.results import Row
from sparse_dit.eval.side_by_side import difference_gain

_HEIGHT = 160  # pixels of a frame at most
_FRAMES = 5
_GAP = 3  # pixels
_SHOWN = {"recipe", "run_density", "psnr", "prompt"}  # of a record


def read_comparison(folder: Path) -> tuple[Row, Path, Path]:
    """Record, dense and sparse video that `sparse-dit compare` left in a folder.

    Raises:
        ValueError: one of them is missing, or the record is damaged.
    """
    record = folder / "result.json"
    try:
        row = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"clips: {str(record)!r} cannot be read ({type(error).__name__})") from None
    videos = [sorted(folder.glob(f"{name}.*")) for name in ("dense", "sparse")]
    if not isinstance(row, dict) or not row.keys() >= _SHOWN or not all(videos):
        raise ValueError(f"clips: {str(folder)!r}; valid: a folder that sparse-dit compare wrote")
    return row, videos[0][0], videos[1][0]


def filmstrip(dense: Path, sparse: Path) -> tuple[Image.Image, int]:
    """Three rows of frames, first and last among them: dense, sparse, and their difference times a gain.

    Returns:
        The picture, and the gain.

    Raises:
        ValueError: as `read_frames`, or the files differ in size or length.
    """
    above, below = (_thumbnails(path) for path in (dense, sparse))
    if above.shape != below.shape:
        raise ValueError(
            f"clips: {str(dense)!r} and {str(sparse)!r} differ in size or length; valid: a pair of one run"
        )
    difference = np.abs(above.astype(np.float32) - below) / 255
    gain = difference_gain(difference)
    enhanced = np.round(np.clip(difference * gain, 0, 1) * 255).astype(np.uint8)
    chosen = np.linspace(0, len(above) - 1, min(_FRAMES, len(above))).round().astype(int)
    return Image.fromarray(np.concatenate([_strip(clip[chosen]) for clip in (above, below, enhanced)])), gain


def data_uri(picture: Image.Image) -> str:
    """A picture as a JPEG inside a URI."""
    file = io.BytesIO()
    picture.save(file, format="JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _thumbnails(path: Path) -> Pixels:
    frames: list[Pixels] = []
    for pixels in read_frames(path):
        picture = Image.fromarray(pixels)
        picture.thumbnail((2 * _HEIGHT, _HEIGHT))
        frames.append(np.asarray(picture))
    if not frames:
        raise ValueError(f"clips: {str(path)!r} has no frame; valid: at least one")
    return np.stack(frames)


def _strip(frames: Pixels) -> Pixels:
    """Frames in a line, white between them and below."""
    padded = [np.pad(frame, ((0, _GAP), (0, _GAP), (0, 0)), constant_values=255) for frame in frames]
    return np.concatenate(padded, axis=1)
