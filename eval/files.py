"""Video files against video files, read a few frames at a time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sparse_dit.eval import metrics
from sparse_dit.eval.results import Row
from sparse_dit.pipelines.generate import Frames

PICTURES = (".webp", ".gif", ".png", ".jpg", ".jpeg")
"""Suffixes that are read by Pillow, still or animated; everything else goes to ffmpeg."""

_CHUNK_BYTES = 2**23

Pixels = npt.NDArray[np.uint8]


def compare_files(video: Path, reference: Path) -> Row:
    """Every metric of a video file against another one, on their frames as 8-bit RGB.

    What a lossy codec did to both is in the figures: frames before encoding, as `sparse-dit compare` measures them, say
    more about a method. ffmpeg's own `psnr` filter takes planes as they are stored, so it agrees for RGB files only.

    Args:
        video: the file to judge.
        reference: what it should look like.

    Returns:
        Frames, height, width, and the fields of `metrics.measure`.

    Raises:
        ValueError: a file that cannot be read or has no frame, frames of two sizes, or one with more frames; one line.
    """
    found = {"frames": 0, "height": 0, "width": 0}
    measured = metrics.measure_chunks(_paired(video, reference, found))
    return {**found, **measured}


def read_frames(path: Path) -> Iterator[Pixels]:
    """The frames of a video or picture file, 8-bit RGB [H, W, 3] each, in order.

    Raises:
        ValueError: no such file, or one that cannot be read as a video.
    """
    if not path.is_file():
        raise ValueError(f"video: {str(path)!r} is no file; valid: a video or picture file")
    return _read_picture(path) if path.suffix.lower() in PICTURES else _read_video(path)


def _paired(video: Path, reference: Path, found: dict[str, int]) -> Iterator[tuple[Frames, Frames]]:
    """Pieces of both files; `found` counts frames and holds their size."""
    pieces: tuple[list[Pixels], list[Pixels]] = ([], [])
    for ours, theirs in zip_longest(read_frames(video), read_frames(reference)):
        if ours is None or theirs is None:
            longer = reference if ours is None else video
            raise ValueError(
                f"frames: {str(longer)!r} has more than the {found['frames']} of the other file; valid: as many in both"
            )
        if ours.shape != theirs.shape:
            sizes = [f"{shape[1]}x{shape[0]}" for shape in (ours.shape, theirs.shape)]
            raise ValueError(f"size: {sizes[0]} and {sizes[1]} pixels in frame {found['frames']}; valid: one size")
        found["frames"] += 1
        found["height"], found["width"] = ours.shape[:2]
        for piece, frame in zip(pieces, (ours, theirs), strict=True):
            piece.append(frame)
        if len(pieces[0]) * ours.size >= _CHUNK_BYTES:
            yield _frames(pieces[0]), _frames(pieces[1])
            pieces = ([], [])
    if not found["frames"]:
        raise ValueError(f"frames: {str(video)!r} and {str(reference)!r} have none; valid: at least one")
    if pieces[0]:
        yield _frames(pieces[0]), _frames(pieces[1])


def _frames(pixels: list[Pixels]) -> Frames:
    return np.stack(pixels).astype(np.float32) / np.float32(255)


def _read_picture(path: Path) -> Iterator[Pixels]:
    from PIL import Image, ImageSequence, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            for frame in ImageSequence.Iterator(picture):
                yield np.asarray(frame.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"video: {str(path)!r} cannot be read ({_first_line(error)})") from None


def _read_video(path: Path) -> Iterator[Pixels]:
    import imageio_ffmpeg

    # Every frame as it is stored: none doubled or dropped for the sake of an even frame rate.
    stream = imageio_ffmpeg.read_frames(path, output_params=["-fps_mode", "passthrough"])
    try:
        width, height = next(stream)["size"]
        for frame in stream:
            yield np.frombuffer(frame, np.uint8).reshape(height, width, 3)
    except (OSError, RuntimeError, StopIteration) as error:
        raise ValueError(f"video: {str(path)!r} cannot be read ({_first_line(error)})") from None
    finally:
        stream.close()


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
