"""How far one clip is from another, frame by frame, on frames before any video codec."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from sparse_dit.pipelines.generate import Frames


@dataclass(frozen=True)
class Spread:
    """A metric over the frames of a clip.

    Args:
        mean: average over frames, the figure papers print.
        median: the middle frame.
        min: the worst frame.
    """

    mean: float
    median: float
    min: float


def psnr(frames: Frames, reference: Frames) -> Spread:
    """Peak signal-to-noise ratio in dB of each frame, over all its pixels and channels; peak 1.

    Equal frames give infinity, and one such frame makes the mean infinite; median and minimum stay telling.

    Args:
        frames: [F, H, W, C] in 0..1.
        reference: the same shape.

    Raises:
        ValueError: shapes differ, no frame, or a value that is not in 0..1.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return _over_frames(
        frames, reference, partial(peak_signal_noise_ratio, data_range=1.0, dim=(1, 2, 3), reduction="none")
    )


def ssim(frames: Frames, reference: Frames) -> Spread:
    """Structural similarity of each frame (Wang et al. 2004): Gaussian window of 11 pixels, mirrored borders.

    Args:
        frames: [F, H, W, C] in 0..1, height and width at least 11.
        reference: the same shape.

    Raises:
        ValueError: shapes differ, no frame, frames smaller than the window, or a value that is not in 0..1.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    if frames.ndim == 4 and min(frames.shape[1:3]) < 11:
        raise ValueError(f"frames: {frames.shape[1]}x{frames.shape[2]} pixels; valid: at least 11x11")
    return _over_frames(
        frames, reference, partial(structural_similarity_index_measure, data_range=1.0, reduction="none")
    )


def _over_frames(frames: Frames, reference: Frames, metric: Callable[[Tensor, Tensor], Any], chunk: int = 8) -> Spread:
    """Applies a metric in float64, a few frames at a time: a long clip's windows would not fit in memory at once."""
    _check(frames, reference)
    starts = range(0, len(frames), chunk)
    parts = [metric(*(_planes(clip[start : start + chunk]) for clip in (frames, reference))) for start in starts]
    values = torch.cat([part.reshape(-1) for part in parts])
    # Not torch's median, which is the lower of the two middle values, nor its quantile, which makes NaN of infinities.
    return Spread(values.mean().item(), statistics.median(values.tolist()), values.min().item())


def _planes(frames: Frames) -> Tensor:
    return rearrange(torch.from_numpy(np.ascontiguousarray(frames)).double(), "f h w c -> f c h w")


def _check(frames: Frames, reference: Frames) -> None:
    if frames.shape != reference.shape:
        raise ValueError(f"frames: shape {frames.shape}; valid: the reference's, {reference.shape}")
    if frames.ndim != 4 or frames.size == 0:
        raise ValueError(f"frames: shape {frames.shape}; valid: [F, H, W, C] with no side of 0")
    for name, clip in (("frames", frames), ("reference", reference)):
        # A NaN fails both comparisons, so this catches it too.
        if not (clip.min() >= 0 and clip.max() <= 1):
            raise ValueError(f"{name}: values from {clip.min()} to {clip.max()}; valid: 0 to 1")
