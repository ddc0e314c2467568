"""Captions, the videos drawn from them, and the judge that reads videos: on rendered ones its answers are known."""

import math
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_dit.eval.results import load_rows
from sparse_dit.pipelines.tiny_wan.grammar import (
    COLORS,
    DIRECTIONS,
    SHAPES,
    TURNS,
    Scene,
    draw_scene,
    held_out_prompts,
    held_out_scenes,
    vocabulary,
)
from sparse_dit.pipelines.tiny_wan.judge import judge, shares
from sparse_dit.pipelines.tiny_wan.outline import overlaps
from sparse_dit.pipelines.tiny_wan.videos import check_photos, distances, render


@given(st.integers(0, 10_000))
def test_training_never_draws_a_held_out_caption(seed: int) -> None:
    rng = random.Random(seed)
    assert not draw_scene(rng).held_out
    assert draw_scene(rng, held_out=True).held_out


def test_held_out_prompts_are_different_repeatable_and_spelled_in_the_vocabulary() -> None:
    prompts = held_out_prompts(64, seed=0)
    assert len(set(prompts)) == 64
    assert prompts == held_out_prompts(64, seed=0)
    assert prompts != held_out_prompts(64, seed=1)
    assert {word for prompt in prompts for word in prompt.split()} <= set(vocabulary())


def test_held_out_prompts_are_those_of_the_results() -> None:
    """The weights were trained without them, and later rows are compared with these."""
    rows = load_rows(Path(__file__).parents[3] / "eval" / "results" / "radial-tiny-wan.jsonl")
    assert held_out_prompts(16) == list(dict.fromkeys(row["prompt"] for row in rows))


@given(st.integers(0, 10_000))
def test_what_turns_has_a_texture_that_shows_it(seed: int) -> None:
    scene = draw_scene(random.Random(seed))
    assert scene.motion not in TURNS or scene.texture in ("striped", "checkered")


def test_held_out_prompts_refuses_no_prompts() -> None:
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        held_out_prompts(0)


@pytest.mark.parametrize(("frames", "size"), [(1, 16), (5, 33), (9, 64)])
def test_render_fills_every_pixel(frames: int, size: int) -> None:
    check_photos()
    scenes = [*held_out_scenes(6, seed=4), Scene("zooms out", photo="a cat"), Scene("pans up", photo="the moon")]
    video = render(scenes, frames=frames, size=size, seed=1)
    assert video.shape == (8, 3, frames, size, size)
    assert torch.isfinite(video).all()
    assert video.amin() >= -1
    assert video.amax() <= 1
    assert torch.equal(video, render(scenes, frames=frames, size=size, seed=1))
    assert not torch.equal(video, render(scenes, frames=frames, size=size, seed=2))


def test_judge_is_right_on_rendered_videos() -> None:
    scenes = held_out_scenes(24, seed=2)
    scenes += [Scene(f"pans {direction}", photo=photo) for direction in DIRECTIONS for photo in ("a cat", "some coins")]
    videos = (render(scenes, frames=17, size=64, seed=3) + 1) / 2
    verdicts = [judge(scene, video.permute(1, 2, 3, 0)) for scene, video in zip(scenes, videos, strict=True)]
    found = shares(verdicts)
    assert found["color_judged"] >= 20
    assert found["motion_judged"] >= 24
    assert found["shape_judged"] >= 18
    assert found["color_right"] == 1
    assert found["shape_right"] >= 0.97
    assert found["motion_right"] >= 0.95


def test_judge_finds_planted_mistakes() -> None:
    told = Scene("moving left", "red", "plain", "circle", "large", "a dark wall")
    shown = Scene("moving right", "blue", "plain", "square", "large", "a dark wall")
    video = (render([shown], frames=9, size=64, seed=0)[0].permute(1, 2, 3, 0) + 1) / 2
    verdict = judge(told, video)
    assert (verdict.color, verdict.color_right) == ("blue", False)
    assert (verdict.shape, verdict.shape_right) == ("square", False)
    assert (verdict.motion, verdict.motion_right) == ("right", False)


def test_judge_calls_gray_mush_wrong() -> None:
    mush = torch.full((9, 64, 64, 3), 0.5) + 0.02 * torch.randn(
        9, 64, 64, 3, generator=torch.Generator().manual_seed(0)
    )
    verdict = judge(Scene("moving left", "red", "plain", "circle", "large", "a dark wall"), mush)
    assert verdict.color == "none"
    assert verdict.color_right is False
    assert verdict.shape_right is False
    assert verdict.motion_right is False


def test_judge_finds_no_shape_in_a_cloud() -> None:
    scattered = torch.rand(9, 64, 64, 1, generator=torch.Generator().manual_seed(0)) < 0.3
    video = torch.where(scattered, torch.tensor(COLORS["red"]), torch.full((3,), 0.5))
    verdict = judge(Scene("moving left", "red", "plain", "circle", "large", "a dark wall"), video)
    assert (verdict.color, verdict.shape) == ("red", "none")


def test_judge_refuses_channels_first() -> None:
    with pytest.raises(ValueError, match=r"video must be \[T, H, W, 3\], got \[3, 9, 8, 8\]"):
        judge(Scene("moving left", "red", "plain", "circle", "large", "a dark wall"), torch.zeros(3, 9, 8, 8))


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(sorted(COLORS)), st.sampled_from(sorted(DIRECTIONS)), st.integers(0, 99))
def test_every_color_and_direction_is_recognised(color: str, direction: str, seed: int) -> None:
    scene = Scene(f"moving {direction}", color, "plain", "square", "small", "a gray gradient")
    video = (render([scene], frames=9, size=48, seed=seed)[0].permute(1, 2, 3, 0) + 1) / 2
    verdict = judge(scene, video)
    assert verdict.color == color
    assert verdict.motion == direction


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(SHAPES), st.floats(0, 6.28), st.floats(14, 40), st.floats(-20, 20))
def test_outlines_are_found_at_any_angle_size_and_place(shape: str, angle: float, radius: float, aside: float) -> None:
    axis = torch.arange(128) + 0.5 - 64
    x, y = axis[None, :] - aside, axis[:, None] + aside / 2
    turned = (math.cos(angle) * x - math.sin(angle) * y) / radius, (math.sin(angle) * x + math.cos(angle) * y) / radius
    mask = distances(*turned)[SHAPES.index(shape)] < 0
    [overlap] = overlaps(mask[None])
    assert SHAPES[int(overlap.argmax())] == shape
    assert 0.75 < overlap.max() <= 1 + 1e-5


def test_small_stars_have_no_shape_judged() -> None:
    scene = Scene("moving left", "red", "plain", "star", "small", "a dark wall")
    video = (render([scene], frames=5, size=64, seed=0)[0].permute(1, 2, 3, 0) + 1) / 2
    verdict = judge(scene, video)
    assert verdict.shape is None
    assert verdict.shape_right is None
    assert shares([verdict])["shape_judged"] == 0
