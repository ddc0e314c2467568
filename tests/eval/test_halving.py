"""The search for the cheapest candidate above a floor, on planted qualities."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_dit.eval.halving import Halving

Planted = np.ndarray


def planted(candidates: int, prompts: int, noise: float, seed: int) -> tuple[list[float], Planted]:
    """Costs, and qualities that grow with them, [candidates, prompts]: hard and easy prompts, and noise beside."""
    random = np.random.default_rng(seed)
    costs = np.sort(random.uniform(0.1, 0.9, candidates))
    good = 15 + 25 * costs + random.normal(0, 2, candidates)
    return costs.tolist(), good[:, None] + random.normal(0, 4, prompts) + random.normal(0, noise, (candidates, prompts))


def search(costs: list[float], quality: Planted, floor: float, most: int | None = None) -> tuple[Halving, int]:
    """A search to its end, or to a number of runs."""
    halving, runs = Halving(costs, floor, quality.shape[1]), 0
    for candidate, prompt in halving.runs():
        if runs == most:
            break
        assert np.isnan(halving.quality[candidate, prompt]), "a run was asked for twice"
        halving.tell(candidate, prompt, quality[candidate, prompt])
        runs += 1
    return halving, runs


def exhaustive(costs: list[float], quality: Planted, floor: float) -> int | None:
    above = [number for number, values in enumerate(quality) if values.mean() >= floor]
    return min(above, key=lambda number: costs[number], default=None)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(1, 17), st.integers(0, 1000), st.floats(10, 45))
def test_without_noise_the_answer_is_that_of_an_exhaustive_search(
    candidates: int, prompts: int, seed: int, floor: float
) -> None:
    costs, quality = planted(candidates, prompts, 0.0, seed)
    halving, _ = search(costs, quality, floor)
    answer, best = halving.answer(), exhaustive(costs, quality, floor)
    if best is None:
        # That nothing is above the floor is known when everything ran everywhere.
        assert answer is None
        assert not np.isnan(halving.quality).any()
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
        halving, needed = search(costs, quality, 28.0)
        answer, best = halving.answer(), exhaustive(costs, quality, 28.0)
        assert answer is not None
        assert best is not None
        right += quality[answer.candidate].mean() >= 28 and costs[answer.candidate] <= 1.03 * costs[best]
        runs += needed
    assert right >= 15
    assert runs <= 16 * 60 * 16 / 5


def test_prompts_effects_do_not_mislead() -> None:
    """The first prompts are hard: every candidate looks bad there, and the search sees that they are."""
    costs = [0.2, 0.4, 0.6]
    quality = np.array([[20.0], [25.0], [30.0]]) + np.array([-10.0, -10.0, -10.0, 10.0, 10.0, 10.0])
    halving, _ = search(costs, quality, 24.0)
    assert halving.answer().candidate == 1


def test_what_fails_is_out() -> None:
    halving = Halving([0.1, 0.2], 20.0, 2)
    for candidate, prompt in halving.runs():
        halving.tell(candidate, prompt, None if candidate == 0 else 25.0)
    assert halving.failed == {0}
    assert halving.answer().candidate == 1
    alone = Halving([0.1], 20.0, 2)
    for candidate, prompt in alone.runs():
        alone.tell(candidate, prompt, None)
    assert alone.answer() is None


def test_clips_that_equal_dense_ones_are_above_any_floor() -> None:
    halving, _ = search([0.5, 0.9], np.array([[30.0, 32.0], [np.inf, np.inf]]), 40.0)
    assert halving.answer().candidate == 1


def test_a_search_that_was_stopped_says_so() -> None:
    costs, quality = planted(20, 8, 1.0, 3)
    halving, runs = search(costs, quality, 28.0, most=25)
    assert runs == 25
    answer = halving.answer()
    assert not answer.certain
    assert 1 <= answer.prompts <= 8


def test_the_same_answers_lead_the_same_way() -> None:
    costs, quality = planted(20, 8, 1.0, 4)
    first, second = Halving(costs, 28.0, 8), Halving(costs, 28.0, 8)
    asked: list[list[tuple[int, int]]] = [[], []]
    for halving, seen in zip((first, second), asked, strict=True):
        for candidate, prompt in halving.runs():
            seen.append((candidate, prompt))
            halving.tell(candidate, prompt, quality[candidate, prompt])
    assert asked[0] == asked[1]


def test_refuses_nothing_to_search() -> None:
    for costs, prompts in (([], 2), ([0.5], 0)):
        with pytest.raises(ValueError, match="valid: at least one of each"):
            Halving(costs, 28.0, prompts)
