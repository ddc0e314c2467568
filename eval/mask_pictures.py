"""Block masks over frames: what is computed for a query stays as it is, the rest is dark."""

from __future__ import annotations

import base64
import io
import math
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from sparse_dit.pipelines.generate import Frames

FRAME = 384  # pixels; smaller frames are enlarged by a whole factor until they reach it
_SKIPPED = 0.22  # brightness of tokens that are not computed
RING = ((0, 0, 0), (255, 214, 0))
_STORED = 128  # pixels of a frame in a row, at most
_SHOWN = 176
_FRAMES = 5
_GAP = 3


def enlarged(frame: npt.NDArray[np.uint8], least: int = FRAME) -> Image.Image:
    """A frame [H, W, 3] enlarged by a whole factor, without smoothing."""
    factor = max(1, -(-least // max(frame.shape[:2])))
    return Image.fromarray(np.ascontiguousarray(frame.repeat(factor, axis=0).repeat(factor, axis=1)))


def mask_picture(frame: npt.NDArray[np.uint8], keys: npt.NDArray[np.bool_], least: int = FRAME) -> Image.Image:
    """A frame whose tokens that are not computed are dark and grey.

    Args:
        frame: [H, W, 3].
        keys: [h, w], the computed tokens of that frame.
        least: pixels of the longer side at least.
    """
    picture = enlarged(frame, least)
    shown = np.asarray(Image.fromarray(keys.astype(np.uint8) * 255).resize(picture.size, Image.Resampling.NEAREST)) > 0
    pixels = np.asarray(picture).astype(np.float32)
    grey = pixels.mean(axis=2, keepdims=True) * _SKIPPED
    return Image.fromarray(np.where(shown[..., None], pixels, grey).astype(np.uint8))


def ring(picture: Image.Image, place: tuple[int, int], grid: tuple[int, int]) -> Image.Image:
    """A picture with a mark around one token.

    Args:
        picture: changed in place.
        place: (h, w) of the token.
        grid: (H, W), tokens of the frame.
    """
    height, width = picture.height / grid[0], picture.width / grid[1]
    draw = ImageDraw.Draw(picture)
    box = [place[1] * width, place[0] * height, (place[1] + 1) * width, (place[0] + 1) * height]
    for grow, color in ((4, RING[0]), (2, RING[1])):
        draw.rectangle([box[0] - grow, box[1] - grow, box[2] + grow, box[3] + grow], outline=color, width=2)
    return picture


def frames_of(frames: Frames, grid: tuple[int, int, int], query: int) -> dict[str, Any]:
    """A few frames of a clip as they stand in a row: small JPEGs, and the latent frames that they show.

    Args:
        frames: [F, H, W, 3] in 0..1.
        grid: (T, H, W), video tokens.
        query: the latent frame of the query, which is among them.
    """
    latents = sorted({*np.linspace(0, grid[0] - 1, min(_FRAMES, grid[0])).round().astype(int).tolist(), query})
    jpegs = []
    for latent in latents:
        frame = frames[round(latent * (len(frames) - 1) / max(1, grid[0] - 1))]
        picture = Image.fromarray(np.round(np.clip(frame[..., :3], 0, 1) * 255).astype(np.uint8))
        picture.thumbnail((2 * _STORED, _STORED))
        file = io.BytesIO()
        picture.save(file, format="JPEG", quality=85)
        jpegs.append(base64.b64encode(file.getvalue()).decode())
    return {"latents": latents, "jpegs": jpegs}


def strip(row: dict[str, Any], mask: dict[str, Any]) -> tuple[Image.Image, float]:
    """The frames of a probed run in a line under the mask of one call, the query marked.

    Args:
        row: as `sparse_dit.eval.probe.probe` makes it.
        mask: one of its `masks`.

    Returns:
        The picture, and the share of video tokens that are computed.
    """
    grid = tuple(row["grid"])
    bits = np.frombuffer(base64.b64decode(mask["keys"]), np.uint8)
    keys = np.unpackbits(bits, count=math.prod(grid)).astype(bool).reshape(grid)
    tiles = []
    for latent, jpeg in zip(row["frames"]["latents"], row["frames"]["jpegs"], strict=True):
        frame = np.asarray(Image.open(io.BytesIO(base64.b64decode(jpeg))).convert("RGB"))
        tile = mask_picture(frame, keys[latent], _SHOWN)
        if latent == mask["query"][0]:
            ring(tile, (mask["query"][1], mask["query"][2]), (grid[1], grid[2]))
        tiles.append(np.pad(np.asarray(tile), ((0, 0), (0, _GAP), (0, 0)), constant_values=255))
    return Image.fromarray(np.concatenate(tiles, axis=1)), float(keys.mean())
