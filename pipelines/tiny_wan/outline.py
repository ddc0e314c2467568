"""Which shape of the grammar a mask shows, whatever its place, size and angle.

A mask is read on polar rays around its centroid, in units of the radius of a disc of the same area, and compared with
every shape of the grammar read in the same way. The angle that overlaps best is found by correlation over the rays.
The VAE rounds corners off, of small objects most: shapes are blurred by as much before they are compared.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_dit.pipelines.tiny_wan.videos import distances

_RAYS = 120
_RINGS = 40
_REACH = 2.0  # in radii of the disc of equal area; the arms of the cross, the farthest of all, end at 1.6
_CANVAS_SIDE = 241
_CANVAS_REACH = 2.4  # in unit coordinates of the shapes: room for their blur

# Calibrated on rendered videos, as they are and through the VAE, of scenes that are no held-out captions.
_BLUR = 2.5 / 128  # standard deviation, as a share of the frame's height
_BLURS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7)  # in radii of the disc of equal area
_COVER = 0.4  # of a blurred shape; the judge's threshold for coloured pixels lies about there


def overlaps(mask: Tensor) -> Tensor:
    """Intersection over union of each mask with each shape at its best angle.

    Args:
        mask: bool [T, H, W], at least one pixel set in each.

    Returns:
        fp32 [T, shapes], 1 for equal outlines, in the order of `grammar.SHAPES`.
    """
    device = mask.device
    seen = _polar(mask.float())
    radius = torch.sqrt(mask.float().sum((1, 2)) / math.pi)
    blur = _BLUR * mask.shape[1] / radius
    level = (torch.tensor(_BLURS, device=device) - blur[:, None]).abs().argmin(1)
    shapes = _shapes(device)[level]  # [T, shapes, rings, rays]
    spectra = torch.fft.rfft(seen, dim=-1)[:, None] * torch.fft.rfft(shapes, dim=-1).conj()
    common = torch.fft.irfft(spectra, n=_RAYS, dim=-1)  # [T, shapes, rings, turns]
    area = _ring_radii(device)[:, None]  # what one point of each ring stands for, up to a common factor
    shared = (common * area).sum(2).amax(-1)
    overlap: Tensor = shared / ((seen * area).sum((1, 2))[:, None] + (shapes * area).sum((2, 3)) - shared)
    return overlap


@lru_cache(maxsize=2)
def _shapes(device: torch.device) -> Tensor:
    """The shapes of the grammar at every blur, as `_polar` reads them: [blurs, shapes, rings, rays]."""
    axis = torch.linspace(-_CANVAS_REACH, _CANVAS_REACH, _CANVAS_SIDE, device=device)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    sharp = (torch.stack(distances(x, y)) < 0).float()
    radius = torch.sqrt(sharp.sum((1, 2)) / math.pi)
    return torch.stack([_polar((_blurred(sharp, blur * radius) > _COVER).float()) for blur in _BLURS])


def _blurred(images: Tensor, deviation: Tensor) -> Tensor:
    """Images [N, H, W] under Gaussians of the deviations [N], in pixels; borders wrap around."""
    rows = torch.fft.fftfreq(images.shape[1], device=images.device)[:, None]
    columns = torch.fft.rfftfreq(images.shape[2], device=images.device)
    gain = torch.exp(-2 * (math.pi * deviation[:, None, None]) ** 2 * (rows**2 + columns**2))
    blurred: Tensor = torch.fft.irfft2(torch.fft.rfft2(images) * gain, s=images.shape[1:])
    return blurred


def _polar(mask: Tensor) -> Tensor:
    """Masks [N, H, W] of 0 and 1 on rays around their centroids: [N, rings, rays]."""
    height, width = mask.shape[1:]
    area = mask.sum((1, 2))
    row = (mask.sum(2) * torch.arange(height, device=mask.device)).sum(1) / area
    column = (mask.sum(1) * torch.arange(width, device=mask.device)).sum(1) / area
    radius = torch.sqrt(area / math.pi)[:, None, None] * _ring_radii(mask.device)[:, None]  # [N, rings, 1], pixels
    angle = torch.arange(_RAYS, device=mask.device) * (2 * math.pi / _RAYS)
    x = column[:, None, None] + radius * torch.cos(angle)
    y = row[:, None, None] + radius * torch.sin(angle)
    # Pixel i has its centre at (i + 0.5) / width of the frame, which grid_sample spans from -1 to 1.
    points = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)
    return F.grid_sample(mask[:, None], points, mode="bilinear", align_corners=False)[:, 0]


def _ring_radii(device: torch.device) -> Tensor:
    return (torch.arange(_RINGS, device=device) + 0.5) * (_REACH / _RINGS)
