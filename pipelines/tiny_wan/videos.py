"""Draws the scenes of `grammar` as video tensors, on any device: the training data of tiny-wan.

Coordinates run from -1 to 1 over the frame, x to the right and y down. Objects are signed distance functions in their
own unit coordinates, so that texture moves, turns and scales with them.
"""

import math
import random
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from sparse_dit.pipelines.tiny_wan.grammar import BACKGROUNDS, COLORS, DIRECTIONS, PHOTOS, SHAPES, TEXTURES, Scene

_PHOTO_SIDE = 208
_PHOTO_SOURCES = {
    "an astronaut": "astronaut",
    "a cat": "chelsea",
    "a cup of coffee": "coffee",
    "a rocket": "rocket",
    "a photographer": "camera",
    "some coins": "coins",
    "the moon": "moon",
    "a brick wall": "brick",
    "a grassy field": "grass",
    "a gravel road": "gravel",
}


def render(scenes: Sequence[Scene], *, frames: int, size: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Draw one video a scene.

    Args:
        scenes: what to draw.
        frames: frames of each video.
        size: height and width in pixels.
        seed: decides what the captions leave open: start, speed, brightness.
        device: where to draw.

    Returns:
        fp32 [B, 3, frames, size, size] in [-1, 1].
    """
    rng = random.Random(seed)
    videos = torch.empty(len(scenes), 3, frames, size, size, device=device)
    for draw, chosen in (
        (_draw_objects, [i for i, scene in enumerate(scenes) if scene.shape]),
        (_draw_pans, [i for i, scene in enumerate(scenes) if scene.photo]),
    ):
        if chosen:
            videos[chosen] = draw([scenes[i] for i in chosen], rng, frames, size, torch.device(device))
    return videos.clamp_(0, 1).mul_(2).sub_(1)


@lru_cache(maxsize=2)
def _photos(device: torch.device) -> dict[str, Tensor]:
    """The photographs as [3, side, side] in [0, 1], square and small enough to be smooth."""
    from skimage import data

    photos = {}
    for name, source in _PHOTO_SOURCES.items():
        pixels = torch.from_numpy(getattr(data, source)()).float() / 255
        pixels = repeat(pixels, "h w -> c h w", c=3) if pixels.ndim == 2 else rearrange(pixels, "h w c -> c h w")
        side = min(pixels.shape[1:])
        top, left = (pixels.shape[1] - side) // 2, (pixels.shape[2] - side) // 2
        square = pixels[None, :, top : top + side, left : left + side]
        photo = F.interpolate(square, (_PHOTO_SIDE, _PHOTO_SIDE), mode="bilinear", antialias=True)
        photos[name] = photo[0].to(device)
    return photos


def _grid(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pixel centres x, y: [size, size] each."""
    axis = (torch.arange(size, device=device, dtype=torch.float32) + 0.5) * (2 / size) - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return x, y


def _draw_pans(scenes: list[Scene], rng: random.Random, frames: int, size: int, device: torch.device) -> Tensor:
    """A viewport that moves over a photograph: [B, 3, T, size, size] in [0, 1]."""
    time = torch.linspace(-0.5, 0.5, frames, device=device)
    x, y = _grid(size, device)
    videos = []
    for scene in scenes:
        direction = DIRECTIONS.get(scene.direction or "", (0.0, 0.0))
        travel = rng.uniform(0.6, 0.8)
        half = torch.full_like(time, rng.uniform(0.5, 0.58))
        if scene.motion.startswith("zooms"):
            inward = 1 if scene.motion == "zooms in" else -1
            half = 0.68 - inward * time * rng.uniform(0.34, 0.44)
        aside = rng.uniform(-0.3, 0.3) if scene.direction else 0.0
        centre_x = time * travel * direction[0] + aside * abs(direction[1])
        centre_y = time * travel * direction[1] + aside * abs(direction[0])
        view = torch.stack(
            [
                x * half[:, None, None] + centre_x[:, None, None],
                y * half[:, None, None] + centre_y[:, None, None],
            ],
            dim=-1,
        )  # [T, size, size, 2]
        photo = _photos(device)[scene.photo].expand(frames, -1, -1, -1)
        videos.append(F.grid_sample(photo, view, mode="bilinear", padding_mode="reflection", align_corners=False))
    return rearrange(torch.stack(videos), "b t c h w -> b c t h w")


def _draw_objects(scenes: list[Scene], rng: random.Random, frames: int, size: int, device: torch.device) -> Tensor:
    """Textured shapes that move over gray backgrounds: [B, 3, T, size, size] in [0, 1]."""
    centre_x, centre_y, angle, radius = _trajectories(scenes, rng, frames, device)  # [B, T, 1, 1] each
    grid_x, grid_y = _grid(size, device)
    dx, dy = grid_x - centre_x, grid_y - centre_y
    x = (torch.cos(angle) * dx + torch.sin(angle) * dy) / radius
    y = (torch.cos(angle) * dy - torch.sin(angle) * dx) / radius
    pixel = 2 / size
    distance = _pick(distances(x, y), [SHAPES.index(scene.shape) for scene in scenes])
    cover = (0.5 - distance * radius / pixel).clamp(0, 1)  # [B, T, size, size], antialiased over one pixel
    shade = 0.55 + 0.45 * _pick(_patterns(x, y), [TEXTURES.index(scene.texture) for scene in scenes])
    colors = torch.tensor([COLORS[scene.color] for scene in scenes], device=device)
    paint = rearrange(colors, "b c -> b c 1 1 1") * shade[:, None]
    backdrop = torch.stack([_backdrop(scene.background, rng, size, device) for scene in scenes])
    backdrop = rearrange(backdrop, "b h w -> b 1 1 h w")
    return backdrop + cover[:, None] * (paint - backdrop)


def _pick(choices: list[Tensor], chosen: list[int]) -> Tensor:
    """Sample b of choices[chosen[b]]: [B, ...]."""
    return torch.stack([choices[index][b] for b, index in enumerate(chosen)])


def _trajectories(
    scenes: list[Scene], rng: random.Random, frames: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centre x, centre y, angle and radius over time, each [B, T, 1, 1]."""
    rows = []
    for scene in scenes:
        radius = rng.uniform(0.20, 0.26) if scene.size == "small" else rng.uniform(0.34, 0.42)
        x, y, angle = rng.uniform(-0.35, 0.35), rng.uniform(-0.35, 0.35), rng.uniform(-0.3, 0.3)
        move_x = move_y = turn = grow = 0.0
        if scene.direction:
            along = DIRECTIONS[scene.direction]
            travel = rng.uniform(0.8, 1.15)
            move_x, move_y = travel * along[0], travel * along[1]
            x, y = x * abs(along[1]), y * abs(along[0])
        elif scene.motion.startswith("rotating"):
            turn = rng.uniform(0.5, 0.9) * math.pi * (1 if scene.motion == "rotating clockwise" else -1)
        else:
            grow = rng.uniform(0.9, 1.2) * (1 if scene.motion == "growing" else -1)
        rows.append((x, y, angle, radius, move_x, move_y, turn, grow))
    time = torch.linspace(-0.5, 0.5, frames, device=device)
    x0, y0, a0, r0, vx, vy, va, vr = torch.tensor(rows, device=device).T[..., None]
    curves = (x0 + vx * time, y0 + vy * time, a0 + va * time, r0 * torch.exp(vr * time))
    x, y, angle_curve, radius_curve = (rearrange(curve, "b t -> b t 1 1") for curve in curves)
    return x, y, angle_curve, radius_curve


def distances(x: Tensor, y: Tensor) -> list[Tensor]:
    """Distance to the outline in unit coordinates (negative inside), in the order of SHAPES."""
    r = torch.sqrt(x * x + y * y + 1e-12)
    ax, ay = x.abs(), y.abs()
    half = math.sqrt(3) / 2
    triangle = torch.maximum(y, torch.maximum(half * x, -half * x) - 0.5 * y) - 0.5
    cross = torch.minimum(torch.maximum(ax - 0.95, ay - 0.32), torch.maximum(ax - 0.32, ay - 0.95))
    star = r - 0.72 * (1 + 0.3 * torch.cos(5 * torch.atan2(y, x)))
    return [r - 0.95, torch.maximum(ax, ay) - 0.8, triangle, (r - 0.7).abs() - 0.26, cross, star]


def _patterns(x: Tensor, y: Tensor) -> list[Tensor]:
    """Brightness in [0, 1] over unit coordinates, in the order of TEXTURES."""
    wave_x, wave_y = torch.sin(5.5 * x), torch.sin(5.5 * y)
    dots = torch.cos(9.0 * x) + torch.cos(9.0 * y)
    return [
        torch.ones_like(x),
        torch.sigmoid(6 * wave_x),
        torch.sigmoid(8 * wave_x * wave_y),
        torch.sigmoid(4 * (0.7 - dots)),
    ]


def _backdrop(name: str, rng: random.Random, size: int, device: torch.device) -> Tensor:
    """A gray picture [size, size] in [0, 1]."""
    if name not in BACKGROUNDS:
        raise ValueError(f"background must be one of {', '.join(BACKGROUNDS)}, got {name!r}")
    x, y = _grid(size, device)
    if name == "a dark wall":
        return torch.full_like(x, rng.uniform(0.10, 0.22))
    if name == "a bright wall":
        return torch.full_like(x, rng.uniform(0.72, 0.85))
    if name == "a gray gradient":
        slope = rng.uniform(0.2, 0.3) * rng.choice((-1, 1))
        return 0.5 + slope * (y if rng.random() < 0.5 else x)
    if name == "a cloudy sky":
        coarse = torch.tensor([rng.random() for _ in range(25)], device=device).view(1, 1, 5, 5)
        return 0.35 + 0.5 * F.interpolate(coarse, (size, size), mode="bicubic")[0, 0].clamp(0, 1)
    photo = _photos(device)[name].mean(0)  # a window of the photograph, with less contrast
    half = 0.5
    centre = [rng.uniform(-0.45, 0.45) for _ in range(2)]
    view = torch.stack([x * half + centre[0], y * half + centre[1]], dim=-1)
    window = F.grid_sample(photo[None, None], view[None], mode="bilinear", align_corners=False)[0, 0]
    return 0.5 + 0.6 * (window - window.mean())


def check_photos() -> None:
    """Load every photograph once; raises what scikit-image raises when one is missing."""
    loaded = _photos(torch.device("cpu"))
    missing = [photo for photo in PHOTOS if photo not in loaded]
    if missing:
        raise ValueError(f"PHOTOS names pictures without a source: {', '.join(missing)}")
