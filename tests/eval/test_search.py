"""The search for the cheapest candidate above a floor, on planted qualities."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_dit.eval.belief import likeness
from sparse_dit.eval.search import Search

Planted = np.ndarray


def planted(candidates: int, prompts: int, noise: float, seed: int) -> tuple[list[float], Planted]:
    """Costs, and qualities that grow with them, [candidates, prompts]: hard and easy prompts, and noise beside."""
    random = np.random.default_rng(seed)
    costs = np.sort(random.uniform(0.1, 0.9, candidates))
    good = 15 + 25 * costs + random.normal(0, 2, candidates)
    return costs.tolist(), good[:, None] + random.normal(0, 4, prompts) + random.normal(0, noise, (candidates, prompts))


def search(
    costs: list[float], quality: Planted, floor: float, most: int | None = None, alike: Planted | None = None
) -> tuple[Search, int]:
    """A search to its end, or to a number of runs."""
    found, runs = Search(costs, floor, quality.shape[1], alike), 0
    for candidate, prompt in found.runs():
        if runs == most:
            break
        assert np.isnan(found.quality[candidate, prompt]), "a run was asked for twice"
        found.tell(candidate, prompt, quality[candidate, prompt])
        runs += 1
    return found, runs


def exhaustive(costs: list[float], quality: Planted, floor: float) -> int | None:
    above = [number for number, values in enumerate(quality) if values.mean() >= floor]
    return min(above, key=lambda number: costs[number], default=None)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(1, 17), st.integers(0, 1000), st.floats(10, 45))
def test_without_noise_the_answer_is_that_of_an_exhaustive_search(
    candidates: int, prompts: int, seed: int, floor: float
) -> None:
    costs, quality = planted(candidates, prompts, 0.0, seed)
    found, _ = search(costs, quality, floor)
    answer, best = found.answer(), exhaustive(costs, quality, floor)
    if best is None:
        # That nothing is above the floor is told when the one held to be the best ran on all prompts.
        assert answer is None
        assert not np.isnan(found.quality).any(axis=1).all()
        return
    # A mean that equals the floor to rounding may fall on either side.
    assert answer is not None
    assert answer.certain
    assert answer.prompts == prompts
    assert answer.candidate == best or abs(quality[best].mean() - floor) < 1e-6


def test_with_noise_it_is_nearly_always_right_and_takes_few_runs() -> None:
    right = runs = 0
    for seed in range(16):
        costs, quality = planted(60, 16, 1.5, seed)
        found, needed = search(costs, quality, 28.0)
        answer, best = found.answer(), exhaustive(costs, quality, 28.0)
        assert answer is not None
        assert best is not None
        right += quality[answer.candidate].mean() >= 28 and costs[answer.candidate] <= 1.03 * costs[best]
        runs += needed
    assert right >= 15
    assert runs <= 16 * 60 * 16 / 5


def test_what_is_alike_saves_runs() -> None:
    """Three kinds of ten densities, better as they are dense, and each kind finds other prompts hard."""
    densities = np.tile(np.geomspace(0.1, 0.9, 10), 3)
    kinds = [{"order": kind} for kind in ("rows", "tiles", "hilbert") for _ in range(10)]
    alike = likeness(kinds, densities.tolist(), [0.0] * 30)
    runs: dict[bool, int] = {True: 0, False: 0}
    right = 0
    for seed in range(8):
        random = np.random.default_rng(seed)
        good = 20 + 15 * np.log(densities / 0.1) / np.log(9) + np.repeat([0.0, 6.0, 2.0], 10)
        hard = random.normal(0, 4, 16) + np.repeat(random.normal(0, 3, (3, 16)), 10, axis=0)
        quality = good[:, None] + hard + random.normal(0, 0.7, (30, 16))
        best = exhaustive(densities.tolist(), quality, 28.0)
        for helped in runs:
            found, needed = search(densities.tolist(), quality, 28.0, alike=alike if helped else None)
            runs[helped] += needed
            right += helped and found.answer().candidate == best
    assert right == 8
    assert runs[True] <= 0.17 * 8 * 480
    assert runs[True] < 0.95 * runs[False]


@pytest.mark.parametrize("scale", [1.0, 0.01])
@pytest.mark.parametrize("floor", [-1e6, 1e6])
def test_floors_beyond_all_qualities_are_known_soon(scale: float, floor: float) -> None:
    costs, quality = planted(40, 8, 1.0, 5)
    found, runs = Search(costs, floor, 8, spread=5 * scale), 0
    for candidate, prompt in found.runs():
        found.tell(candidate, prompt, scale * quality[candidate, prompt])
        runs += 1
    assert runs < 40
    assert found.answer() is None if floor > 0 else found.answer().candidate == 0


def test_prompts_effects_do_not_mislead() -> None:
    """The first prompts are hard: every candidate looks bad there, and the search sees that they are."""
    costs = [0.2, 0.4, 0.6]
    quality = np.array([[20.0], [25.0], [30.0]]) + np.array([-10.0, -10.0, -10.0, 10.0, 10.0, 10.0])
    found, _ = search(costs, quality, 24.0)
    assert found.answer().candidate == 1


def test_what_fails_is_out() -> None:
    found = Search([0.1, 0.2], 20.0, 2)
    for candidate, prompt in found.runs():
        found.tell(candidate, prompt, None if candidate == 0 else 25.0)
    assert found.failed == {0}
    assert found.answer().candidate == 1
    alone = Search([0.1], 20.0, 2)
    for candidate, prompt in alone.runs():
        alone.tell(candidate, prompt, None)
    assert alone.answer() is None


@pytest.mark.parametrize("floor", [40.0, 200.0])
def test_clips_that_equal_dense_ones_are_above_any_floor(floor: float) -> None:
    found, _ = search([0.5, 0.9], np.array([[30.0, 32.0], [np.inf, np.inf]]), floor)
    assert found.answer().candidate == 1


def test_a_search_that_was_stopped_says_so() -> None:
    costs, quality = planted(20, 8, 1.0, 3)
    found, runs = search(costs, quality, 28.0, most=25)
    assert runs == 25
    answer = found.answer()
    assert not answer.certain
    assert 1 <= answer.prompts <= 8


def test_the_same_answers_lead_the_same_way() -> None:
    costs, quality = planted(20, 8, 1.0, 4)
    first, second = Search(costs, 28.0, 8), Search(costs, 28.0, 8)
    asked: list[list[tuple[int, int]]] = [[], []]
    for found, seen in zip((first, second), asked, strict=True):
        for candidate, prompt in found.runs():
            seen.append((candidate, prompt))
            found.tell(candidate, prompt, quality[candidate, prompt])
    assert asked[0] == asked[1]


def test_refuses_nothing_to_search() -> None:
    for costs, prompts in (([], 2), ([0.5], 0)):
        with pytest.raises(ValueError, match="valid: at least one of each"):
            Search(costs, 28.0, prompts)
