"""Dense, sparse and their difference in one picture, labelled."""

from __future__ import annotations

import numpy as np

from sparse_dit.pipelines.generate import Frames

GAP = 4  # pixels between panels
PANEL = 256  # pixels; smaller frames are enlarged by a whole factor until their height reaches it
GAINS = (1, 2, 4, 8, 16, 32, 64)


def side_by_side(dense: Frames, sparse: Frames, label: str) -> Frames:
    """Three panels a frame: dense, sparse, and the absolute difference times a gain that its label states.

    Args:
        dense: frames [F, H, W, 3] in 0..1.
        sparse: the same shape.
        label: stands over the sparse panel.

    Returns:
        Frames [F, H', W', 3] with even sides, in 0..1.

    Raises:
        ValueError: shapes differ.
    """
    if dense.shape != sparse.shape:
        raise ValueError(f"sparse: shape {sparse.shape}; valid: dense's, {dense.shape}")
    difference = np.abs(dense - sparse)
    gain = difference_gain(difference)
    panels = [
        _labelled(dense, "dense"),
        _labelled(sparse, label),
        _labelled(np.clip(difference * gain, 0, 1), f"difference x {gain}"),
    ]
    gap = np.ones((*panels[0].shape[:2], GAP, 3), np.float32)
    joined = np.concatenate([panels[0], gap, panels[1], gap, panels[2]], axis=2)
    return np.pad(joined, ((0, 0), (0, joined.shape[1] % 2), (0, joined.shape[2] % 2), (0, 0)), constant_values=1)


def difference_gain(difference: Frames) -> int:
    """The largest power of two, up to 64, that keeps the 99th percentile of an absolute difference within 0..1."""
    return max((gain for gain in GAINS if gain * np.percentile(difference, 99) <= 1), default=1)


def _labelled(frames: Frames, label: str) -> Frames:
    """Frames enlarged without smoothing, under a white bar with a line of text."""
    from PIL import Image, ImageDraw, ImageFont

    factor = -(-PANEL // frames.shape[1])
    large = frames.repeat(factor, axis=1).repeat(factor, axis=2)
    size = max(12, large.shape[1] // 18)
    bar = Image.new("RGB", (large.shape[2], size + size // 2), "white")
    font = ImageFont.load_default(size)
    while font.getlength(label) > bar.width and size > 8:
        size -= 1
        font = ImageFont.load_default(size)
    ImageDraw.Draw(bar).text((bar.width / 2, bar.height / 2), label, fill="black", font=font, anchor="mm")
    text = np.asarray(bar, np.float32) / 255
    return np.concatenate([np.broadcast_to(text, (len(large), *text.shape)), large], axis=1)
