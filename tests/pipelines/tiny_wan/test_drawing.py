"""What is drawn is what the caption says, where no judge looks, too; and the judge names no motion that is none."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_dit.pipelines.tiny_wan.grammar import COLORS, PHOTOS, SHAPES, TEXTURES, TURNS, Scene
from sparse_dit.pipelines.tiny_wan.judge import judge
from sparse_dit.pipelines.tiny_wan.videos import _patterns, distances, render

SIDE = 64


def drawn(scene: Scene, seed: int = 0, frames: int = 9) -> Tensor:
    """[T, H, W, 3] in [0, 1]."""
    return (render([scene], frames=frames, size=SIDE, seed=seed)[0].permute(1, 2, 3, 0) + 1) / 2


def is_object(video: Tensor) -> Tensor:
    """Bool [T, H, W]: backgrounds are gray."""
    return video.amax(-1) - video.amin(-1) > 0.22


@pytest.mark.parametrize("seed", range(4))
def test_small_and_large(seed: int) -> None:
    small, large = (
        is_object(drawn(Scene("moving left", "red", "plain", "square", size, "a dark wall"), seed)).float().mean()
        for size in ("small", "large")
    )
    # Half sides of a square are 0.8 of 0.20 to 0.26, or of 0.34 to 0.42, where the frame's half side is 1.
    assert (0.8 * 0.19) ** 2 < small < (0.8 * 0.27) ** 2
    assert (0.8 * 0.33) ** 2 < large < (0.8 * 0.43) ** 2


@pytest.mark.parametrize("seed", range(4))
def test_walls_are_dark_and_bright(seed: int) -> None:
    for name, low, high in (("a dark wall", 0.09, 0.23), ("a bright wall", 0.71, 0.86)):
        video = drawn(Scene("moving up", "blue", "plain", "ring", "small", name), seed)
        assert low < video[~is_object(video)].median() < high


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("motion", TURNS)
def test_turns_go_as_the_clock_does_or_against_it(motion: str, seed: int) -> None:
    mask = is_object(drawn(Scene(motion, "red", "striped", "triangle", "large", "a bright wall"), seed, frames=17))
    axis = torch.arange(SIDE, dtype=torch.float64)
    angles = []
    for frame in mask.double():
        x = axis - (frame.sum(0) * axis).sum() / frame.sum()
        y = axis - (frame.sum(1) * axis).sum() / frame.sum()
        tips = (torch.complex(x[None, :].expand(SIDE, -1), y[:, None].expand(-1, SIDE)) ** 3 * frame).sum()
        angles.append(torch.angle(tips) / 3)
    steps = torch.stack(angles).diff()
    steps = (steps + math.pi / 3) % (2 * math.pi / 3) - math.pi / 3  # three tips are alike
    # y points down: a growing angle goes as the clock does.
    turned = float(steps.sum()) * (1 if motion == "rotating clockwise" else -1)
    assert 0.45 * math.pi < turned < 0.95 * math.pi


@pytest.mark.parametrize("photo", PHOTOS)
def test_zooming_in_ends_in_the_middle_of_the_beginning(photo: str) -> None:
    def middle(frame: Tensor) -> Tensor:
        """What is seen after the usual zoom, by a factor of 0.51 to 0.6."""
        edge = round(SIDE * (1 - 0.55) / 2)
        inside = frame[edge:-edge, edge:-edge].permute(2, 0, 1)[None]
        return F.interpolate(inside, (SIDE, SIDE), mode="bilinear")[0].permute(1, 2, 0)

    for motion, ends in (("zooms in", [0, -1]), ("zooms out", [-1, 0])):
        first, last = drawn(Scene(motion, photo=photo))[ends]
        assert F.mse_loss(middle(first), last) < 0.5 * F.mse_loss(middle(last), first)


def test_textures_look_as_they_are_called() -> None:
    axis = torch.linspace(-1, 1, 41)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    plain, striped, checkered, dotted = (_patterns(x, y)[TEXTURES.index(name)] for name in TEXTURES)
    assert plain.unique().tolist() == [1.0]
    assert striped.std(0).max() < 1e-6 < 0.3 < striped.std(1).min()
    torch.testing.assert_close(checkered + checkered.flip(1), torch.ones_like(checkered))
    torch.testing.assert_close(checkered + checkered.flip(0), torch.ones_like(checkered))
    torch.testing.assert_close(dotted, dotted.flip(1))
    torch.testing.assert_close(dotted, dotted.T)
    assert dotted.std(0).max() > 0.2


def told(motion: str, video: Tensor, shape: str = "square") -> str | None:
    """The motion that is found where this one was asked for."""
    return judge(Scene(motion, "red", "plain", shape, "large", "a dark wall"), video).motion


@pytest.mark.parametrize("seed", range(4))
def test_no_motion_and_no_growth_is_found_where_there_is_none(seed: int) -> None:
    turning = drawn(Scene("rotating clockwise", "red", "checkered", "cross", "large", "a dark wall"), seed)
    moving = drawn(Scene("moving left", "red", "plain", "square", "small", "a dark wall"), seed)
    assert told("moving left", turning) == "none"
    assert told("growing", moving) == "none"


def test_an_object_that_is_seen_in_few_frames_has_no_direction() -> None:
    video = drawn(Scene("moving left", "red", "plain", "square", "large", "a dark wall"))
    assert told("moving left", video) == "left"
    video[2:-2] = 0.5
    assert told("moving left", video) == "none"


def test_zooms_have_no_direction_to_be_right_about() -> None:
    scene = Scene("zooms in", photo="a cat")
    verdict = judge(scene, drawn(scene))
    assert (verdict.motion, verdict.motion_right) == (None, None)


def test_frames_that_cut_an_object_do_not_tell_its_shape() -> None:
    """A star that grows until the frame holds nothing but its inside."""
    axis = torch.arange(SIDE) + 0.5 - SIDE / 2
    radii = torch.tensor([20.0, 22, 24, 26, 60, 80, 99])[:, None, None]
    mask = distances(axis[None, None, :] / radii, axis[None, :, None] / radii)[SHAPES.index("star")] < 0
    video = torch.where(mask[..., None], torch.tensor(COLORS["red"]), torch.full((3,), 0.5))
    assert judge(Scene("growing", "red", "plain", "star", "large", "a dark wall"), video).shape == "star"
