"""Analytic check of generated videos: are colour and shape right, and does the motion go where the caption says?

No learned metric: object backgrounds are gray, so saturated pixels are the object, whose outline is held against the
shapes of the grammar; photographs are tracked by phase correlation. The check is itself tested on rendered videos,
where the answers are known.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_dit.pipelines.tiny_wan.grammar import COLORS, DIRECTIONS, SCALINGS, SHAPES, ZOOMS, Scene
from sparse_dit.pipelines.tiny_wan.outline import overlaps

_SATURATED = 0.22  # max - min of RGB above which a pixel counts as coloured
_LEAST_AREA = 0.004  # share of a frame's pixels that an object covers at least
_LEAST_TRAVEL = 0.08  # share of the frame's side that counts as motion
_LEAST_GROWTH = 1.3
_LEAST_OVERLAP = 0.7  # mean intersection over union with a shape's outline
_UNREADABLE = (("small", "star"),)  # rendered ones come out of the VAE as blobs


@dataclass(frozen=True)
class Verdict:
    """What was found in one video; None where the caption leaves the question open."""

    caption: str
    color: str | None
    color_right: bool | None
    shape: str | None
    shape_right: bool | None
    motion: str | None
    motion_right: bool | None


def judge(scene: Scene, video: Tensor) -> Verdict:
    """Compare a video with its caption.

    Args:
        scene: the caption's scene.
        video: [T, H, W, 3] in [0, 1].

    Returns:
        The dominant colour and the shape for objects (small stars have no shape judged: the VAE makes blobs of them);
        the direction for captions that name one; growing or shrinking for those.
    """
    if video.ndim != 4 or video.shape[-1] != 3:
        raise ValueError(f"video must be [T, H, W, 3], got {list(video.shape)}")
    if scene.photo:
        motion = None if scene.motion in ZOOMS else _pan_direction(video)
        right = None if motion is None else motion == scene.direction
        return Verdict(scene.caption, None, None, None, None, motion, right)
    hue = _palette_index(video)
    counts = torch.stack([(hue == index).sum() for index in range(len(COLORS))])
    color = list(COLORS)[int(counts.argmax())] if counts.max() >= _LEAST_AREA * hue.numel() else "none"
    mask = hue == int(counts.argmax())
    shape = None if (scene.size, scene.shape) in _UNREADABLE else _object_shape(mask)
    motion = None
    if scene.direction:
        motion = _object_direction(mask)
    elif scene.motion in SCALINGS:
        motion = _object_scaling(mask)
    return Verdict(
        scene.caption,
        color,
        color == scene.color,
        shape,
        None if shape is None else shape == scene.shape,
        motion,
        None if motion is None else motion == (scene.direction or scene.motion),
    )


def shares(verdicts: list[Verdict]) -> dict[str, float | int]:
    """Share of right colours, shapes and motions among the captions that name one, with their numbers."""
    found: dict[str, float | int] = {"captions": len(verdicts)}
    for name in ("color", "shape", "motion"):
        judged = [right for verdict in verdicts if (right := getattr(verdict, f"{name}_right")) is not None]
        found |= {f"{name}_right": sum(judged) / max(1, len(judged)), f"{name}_judged": len(judged)}
    return found


def _palette_index(video: Tensor) -> Tensor:
    """The palette colour with the nearest hue for every coloured pixel, else -1: int64 [T, H, W]."""
    palette = torch.tensor(list(COLORS.values()), device=video.device)
    angle = (_hue(video)[..., None] - _hue(palette)).abs()
    nearest = torch.minimum(angle, 2 * math.pi - angle).argmin(-1)
    coloured = video.amax(-1) - video.amin(-1) > _SATURATED
    return torch.where(coloured, nearest, -1)


def _hue(rgb: Tensor) -> Tensor:
    """Hue angle in radians."""
    red, green, blue = rgb.unbind(-1)
    return torch.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue)


def _slope(values: Tensor) -> float:
    """Change over the whole clip by least squares."""
    time = torch.linspace(-0.5, 0.5, len(values), device=values.device)
    return float((time * (values - values.mean())).sum() / time.square().sum())


def _named_direction(dx: float, dy: float) -> str:
    """The direction of a displacement in shares of the frame, or "none" when it is small."""
    if max(abs(dx), abs(dy)) < _LEAST_TRAVEL:
        return "none"
    return max(DIRECTIONS, key=lambda name: DIRECTIONS[name][0] * dx + DIRECTIONS[name][1] * dy)


def _object_direction(mask: Tensor) -> str:
    """Direction of the mask's centroid: mask bool [T, H, W]."""
    area = mask.float().sum((1, 2))
    seen = area >= _LEAST_AREA * mask[0].numel()
    if seen.sum() < 0.5 * len(mask):
        return "none"
    weight = mask[seen].float() / area[seen, None, None]
    rows = torch.linspace(0, 1, mask.shape[1], device=mask.device)
    columns = torch.linspace(0, 1, mask.shape[2], device=mask.device)
    return _named_direction(_slope((weight.sum(1) * columns).sum(1)), _slope((weight.sum(2) * rows).sum(1)))


def _object_scaling(mask: Tensor) -> str:
    """Growing or shrinking, by the mask's area at both ends of the clip."""
    area = mask.float().sum((1, 2)) + 1
    edge = max(1, len(area) // 6)
    growth = float(area[-edge:].mean() / area[:edge].mean())
    if 1 / _LEAST_GROWTH < growth < _LEAST_GROWTH:
        return "none"
    return "growing" if growth > 1 else "shrinking"


def _object_shape(mask: Tensor) -> str:
    """The shape whose outline the mask overlaps best, over the frames that show most of it: mask bool [T, H, W]."""
    area = mask.float().sum((1, 2))
    border = mask[:, 0].any(-1) | mask[:, -1].any(-1) | mask[:, :, 0].any(-1) | mask[:, :, -1].any(-1)
    seen = area >= _LEAST_AREA * mask[0].numel()
    if not seen.any():
        return "none"
    whole = seen & ~border if (seen & ~border).any() else seen
    large = whole & (area >= area[whole].median())
    overlap = overlaps(mask[large]).mean(0)
    return SHAPES[int(overlap.argmax())] if overlap.max() >= _LEAST_OVERLAP else "none"


def _pan_direction(video: Tensor) -> str:
    """Direction of the camera over a photograph: against the motion of the picture, by phase correlation."""
    gray = video.mean(-1)
    height, width = gray.shape[1:]
    window = torch.outer(
        torch.hann_window(height, periodic=False, device=video.device),
        torch.hann_window(width, periodic=False, device=video.device),
    )
    spectrum = torch.fft.rfft2((gray - gray.mean((1, 2), keepdim=True)) * window)
    stride = 3
    cross = spectrum[stride:] * spectrum[:-stride].conj()
    correlation = torch.fft.irfft2(cross / (cross.abs() + 1e-6 * cross.abs().amax()), s=(height, width))
    dx = dy = 0.0
    for surface in correlation:
        row, column = divmod(int(surface.argmax()), width)
        dy += (row + height // 2) % height - height // 2
        dx += (column + width // 2) % width - width // 2
    # Pairs overlap: every step from frame to frame is counted `stride` times.
    return _named_direction(-dx / stride / width, -dy / stride / height)
