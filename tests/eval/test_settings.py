"""Rows in groups, intervals, pairs and fronts, with known answers."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_dit.eval.settings import Setting, front, interval, paired, places, settings

Points = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12)


def row(prompt: str = "a", seed: int = 0, psnr: float = 30.0, name: str = "radial", **more: object) -> dict:
    return {
        "recipe": {"name": name, "selection": {"name": "radial"}, "schedule": {"dense_steps": 0}},
        "model": "tiny-wan",
        "prompt": prompt,
        "seed": seed,
        "grid": [9, 16, 16],
        "device": {"type": "cpu", "name": "x86_64", "dtype": "float32"},
        "steps": 20,
        "density": 0.3,
        "psnr": psnr,
        **more,
    }


def test_rows_of_one_recipe_are_one_setting_whatever_their_density() -> None:
    found = settings([row(density=0.25), row("b", density=0.35), row(name="other"), row(steps=30)])
    assert [len(setting.rows) for setting in found] == [1, 2, 1]
    assert found[1].density == pytest.approx(0.3)
    assert found[1].label == "radial, density 0.30, 0 of 20 steps dense"
    with pytest.raises(ValueError, match="at least one"):
        settings([])


def test_places_are_kept_apart() -> None:
    gpu = {"type": "cuda", "name": "a GPU", "dtype": "bfloat16"}
    groups = places([row(), row(device=gpu), row("b")])
    assert {place: len(group) for place, group in groups.items()} == {
        "tiny-wan, 9 x 16 x 16 tokens, on a GPU in bfloat16": 1,
        "tiny-wan, 9 x 16 x 16 tokens, on x86_64 in float32": 2,
    }


def test_what_was_not_measured_is_left_out() -> None:
    setting = Setting((row(flicker=0.25), row("b", flicker=None), row("c")))
    assert setting.values("flicker") == [0.25]
    assert setting.mean("lpips") is None


def test_pairs_are_clips_of_one_prompt_and_seed() -> None:
    ours = Setting((row("a", 0, 31.0), row("b", 0, 28.0), row("a", 1, math.inf), row("c", 0, 10.0)))
    theirs = Setting((row("b", 0, 20.0), row("a", 0, 30.0), row("a", 1, math.inf), row("b", 2, 50.0)))
    assert paired(ours, theirs, "psnr") == [1.0, 8.0, 0.0]


def test_an_interval_has_the_width_of_the_standard_error() -> None:
    values = np.random.default_rng(3).normal(5.0, 2.0, 400)
    low, high = interval(values.tolist())
    # For 400 normal values the bootstrap agrees with the normal interval to a few per cent.
    error = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + error, abs=0.1 * error)
    assert interval(values.tolist()) == (low, high), "not repeatable"


def test_an_interval_of_little() -> None:
    assert interval([1.0]) is None
    assert interval([1.0, math.inf]) is None
    assert interval([2.5, 2.5, 2.5]) == (2.5, 2.5)


@given(Points)
def test_nothing_beats_the_front_and_the_front_beats_the_rest(points: list[tuple[int, int]]) -> None:
    chosen = front(points)
    kept = [points[index] for index in chosen]
    assert kept == sorted(set(kept))
    for cost, quality in points:
        assert any(c <= cost and q >= quality for c, q in kept)
    for cost, quality in kept:
        assert not any(c <= cost and q >= quality and (c, q) != (cost, quality) for c, q in points)


def test_a_front_leaves_out_what_is_not_finite() -> None:
    assert front([(0.5, math.inf), (0.4, 20.0), (math.nan, 30.0)]) == [1]
