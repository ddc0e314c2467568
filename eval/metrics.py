"""How far one clip is from another, frame by frame, on frames before any video codec."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from sparse_dit.eval import perceptual
from sparse_dit.eval.results import Row
from sparse_dit.pipelines.generate import Frames

_WINDOW = 11  # pixels, of SSIM's Gaussian
_DEVIATION = 1.5  # pixels
_CHUNK_PIXELS = 2**20  # handled at once: a long clip's windows would not fit in memory


@dataclass(frozen=True)
class Spread:
    """A metric over the frames of a clip.

    Args:
        mean: average over frames, the figure papers print.
        median: the middle frame.
        min: the smallest value, the worst frame of PSNR and SSIM.
        max: the largest value, the worst frame of errors.
    """

    mean: float
    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """The spread of at least one value; infinities stay what they are."""
        return cls(sum(values) / len(values), statistics.median(values), min(values), max(values))


def psnr(frames: Frames, reference: Frames) -> Spread:
    """Peak signal-to-noise ratio in dB of each frame, over all its pixels and channels; peak 1.

    Equal frames give infinity, and one such frame makes the mean infinite; median and minimum stay telling.

    Args:
        frames: [F, H, W, C] in 0..1.
        reference: the same shape.

    Raises:
        ValueError: shapes differ, no frame, or a value that is not in 0..1.
    """
    return _over_frames(frames, reference, "psnr")


def ssim(frames: Frames, reference: Frames) -> Spread:
    """Structural similarity of each frame (Wang et al. 2004): Gaussian window of 11 pixels, mirrored borders.

    Args:
        frames: [F, H, W, C] in 0..1, height and width at least 11.
        reference: the same shape.

    Raises:
        ValueError: shapes differ, no frame, frames smaller than the window, or a value that is not in 0..1.
    """
    return _over_frames(frames, reference, "ssim")


def flicker(frames: Frames, reference: Frames) -> Spread:
    """Temporal flicker of each frame but the first: the mean absolute error of its change since the frame before.

    A clip that differs from its reference by the same picture in every frame has none; one whose differences come and
    go has much.

    Args:
        frames: [F, H, W, C] in 0..1, at least two frames.
        reference: the same shape.

    Raises:
        ValueError: shapes differ, fewer than two frames, or a value that is not in 0..1.
    """
    _check(frames, reference)
    if len(frames) < 2:
        raise ValueError(f"frames: {len(frames)}; valid: at least 2, as flicker is between frames")
    return Spread.of(_measured(_chunks(frames, reference), {})["flicker"])


def measure(frames: Frames, reference: Frames) -> Row:
    """Every metric of a clip against its reference, as fields of a result row.

    Returns:
        `psnr` (dB), `ssim`, `flicker` and `lpips` are means over frames; `_median` and `_min` (of errors: `_max`) tell
        how they spread. `difference_max` is the largest absolute difference of a value, of 0..1. Null is not
        measured: flicker of a single frame, and LPIPS where its network is not on disk (`perceptual.missing` says why).

    Raises:
        ValueError: shapes differ, no frame, frames smaller than SSIM's window, or a value that is not in 0..1.
    """
    return measure_chunks(_chunks(frames, reference))


def measure_chunks(chunks: Iterable[tuple[Frames, Frames]]) -> Row:
    """`measure` for clips that come in pieces, so that they need not be in memory whole.

    Args:
        chunks: pieces of the clip and of its reference, in order, of equal shapes [F, H, W, C].

    Raises:
        ValueError: as `measure`; no piece.
    """
    metrics = METRICS if perceptual.missing() else {**METRICS, "lpips": perceptual.lpips}
    values = {"lpips": [], **_measured(chunks, metrics)}
    if not values["psnr"]:
        raise ValueError("frames: there are none; valid: at least one")
    row: Row = {}
    for name, worst in (("psnr", "min"), ("ssim", "min"), ("flicker", "max"), ("lpips", "max")):
        spread = Spread.of(values[name]) if values[name] else None
        row[name] = spread and spread.mean
        row[f"{name}_median"] = spread and spread.median
        row[f"{name}_{worst}"] = spread and getattr(spread, worst)
    return {**row, "difference_max": max(values["difference"])}


Metric = Callable[[Tensor, Tensor], Tensor]
"""Two clips fp64 [F, C, H, W] → a value for each frame, fp64 [F]."""


def _psnr(frames: Tensor, reference: Tensor) -> Tensor:
    from torchmetrics.functional.image import peak_signal_noise_ratio

    values = peak_signal_noise_ratio(frames, reference, data_range=1.0, dim=(1, 2, 3), reduction="none")
    return values.reshape(-1)


def _ssim(frames: Tensor, reference: Tensor) -> Tensor:
    """The definition of torchmetrics and scikit-image, with the window taken apart into rows and columns.

    torchmetrics' own convolution of 11 x 11 in float64 takes half a minute for a single frame of 720p on two cores.
    """
    if min(frames.shape[2:]) < _WINDOW:
        raise ValueError(f"frames: {frames.shape[2]}x{frames.shape[3]} pixels; valid: at least {_WINDOW}x{_WINDOW}")
    c1, c2 = 0.01**2, 0.03**2
    mean_x, mean_y = _windowed(frames), _windowed(reference)
    product = mean_x * mean_y
    squares = mean_x.square_().add_(mean_y.square_())
    covariance = _windowed(frames * reference) - product
    variances = _windowed(frames.square() + reference.square()) - squares
    similarity = (2 * product + c1) * (2 * covariance + c2) / ((squares + c1) * (variances + c2))
    return similarity.mean((1, 2, 3))


def _windowed(images: Tensor) -> Tensor:
    """Gaussian mean around every pixel, borders mirrored: [F, C, H, W] → the same shape."""
    reach = _WINDOW // 2
    weights = [math.exp(-0.5 * (offset / _DEVIATION) ** 2) for offset in range(-reach, reach + 1)]
    weights = [weight / sum(weights) for weight in weights]
    for dim, padding in ((-1, (reach, reach, 0, 0)), (-2, (0, 0, reach, reach))):
        padded = F.pad(images, padding, mode="reflect")
        length = images.shape[dim]
        images = padded.narrow(dim, reach, length) * weights[reach]
        for offset in range(reach):
            both = padded.narrow(dim, offset, length) + padded.narrow(dim, 2 * reach - offset, length)
            images.add_(both, alpha=weights[offset])
    return images


METRICS: Mapping[str, Metric] = {"psnr": _psnr, "ssim": _ssim}


def _over_frames(frames: Frames, reference: Frames, name: str) -> Spread:
    return Spread.of(_measured(_chunks(frames, reference), {name: METRICS[name]})[name])


def _measured(chunks: Iterable[tuple[Frames, Frames]], metrics: Mapping[str, Metric]) -> dict[str, list[float]]:
    """The metrics' values, one a frame, with `flicker` (none for the first frame) and the largest `difference`."""
    values: dict[str, list[float]] = {name: [] for name in (*metrics, "flicker", "difference")}
    before = None
    for chunk in chunks:
        _check(*chunk)
        frames, reference = (_planes(clip) for clip in chunk)
        for name, metric in metrics.items():
            values[name] += metric(frames, reference).tolist()
        error = frames - reference
        values["difference"] += error.abs().amax((1, 2, 3)).tolist()
        joined = error if before is None else torch.cat([before, error])
        values["flicker"] += joined.diff(dim=0).abs().mean((1, 2, 3)).tolist()
        before = error[-1:]
    return values


def _chunks(frames: Frames, reference: Frames) -> Iterator[tuple[Frames, Frames]]:
    _check(frames, reference)  # the shapes of the whole clips, which pieces could hide
    length = max(1, _CHUNK_PIXELS // (frames.shape[1] * frames.shape[2]))
    for start in range(0, len(frames), length):
        yield frames[start : start + length], reference[start : start + length]


def _planes(frames: Frames) -> Tensor:
    """fp64 [F, C, H, W], on the GPU where there is one: the same numbers to fp64's rounding, far sooner."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return rearrange(torch.from_numpy(np.ascontiguousarray(frames)).to(device).double(), "f h w c -> f c h w")


def _check(frames: Frames, reference: Frames) -> None:
    if frames.shape != reference.shape:
        raise ValueError(f"frames: shape {frames.shape}; valid: the reference's, {reference.shape}")
    if frames.ndim != 4 or frames.size == 0:
        raise ValueError(f"frames: shape {frames.shape}; valid: [F, H, W, C] with no side of 0")
    for name, clip in (("frames", frames), ("reference", reference)):
        # A NaN fails both comparisons, so this catches it too.
        if not (clip.min() >= 0 and clip.max() <= 1):
            raise ValueError(f"{name}: values from {clip.min()} to {clip.max()}; valid: 0 to 1")
