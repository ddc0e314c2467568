"""Beliefs against the same Gaussian, solved as one dense system."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_dit.eval import belief
from sparse_dit.eval.belief import Belief, Floats, likeness


def drawn_likeness(count: int, random: np.random.Generator) -> Floats:
    kinds = [{"order": str(random.integers(3)), "selection": {"name": str(random.integers(2))}} for _ in range(count)]
    return likeness(kinds, random.uniform(0.05, 0.9, count).tolist(), random.uniform(0, 0.5, count).tolist())


def prior(alike: Floats, prompts: int) -> Floats:
    """Covariance of all cells, [candidates * prompts] squared, in units of the candidates' own variance."""
    same, ones = np.eye(prompts), np.ones((prompts, prompts))
    everywhere = np.ones_like(alike)
    return (
        np.kron(belief._LEVEL * everywhere + alike, ones)
        + np.kron(belief._PROMPT * everywhere + belief._BOTH * alike, same)
        + belief._REST * np.eye(len(alike) * prompts)
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 7), st.integers(1, 5), st.integers(0, 1000))
def test_it_is_the_conditional_gaussian(candidates: int, prompts: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    alike = drawn_likeness(candidates, random)
    cells = random.permutation(candidates * prompts)[: random.integers(1, candidates * prompts + 1)]
    values = random.normal(28, 5, len(cells))
    told = Belief(alike, prompts, spread=2.0)
    for cell, value in zip(cells, values, strict=True):
        told.tell(int(cell) // prompts, int(cell) % prompts, float(value))
    whole = prior(alike, prompts)
    weights = np.linalg.solve(whole[np.ix_(cells, cells)], whole[cells]).T
    over_prompts = np.kron(np.eye(candidates), np.full(prompts, 1 / prompts))
    mean = over_prompts @ (values[0] + weights @ (values - values[0]))
    left = whole - weights @ whole[cells]
    distance = (values - values[0]) @ np.linalg.solve(whole[np.ix_(cells, cells)], values - values[0])
    unit = (belief._KNOWN * 4.0 + distance) / (belief._KNOWN + len(cells))
    np.testing.assert_allclose(told.mean, mean, atol=1e-6)
    covariance = over_prompts @ left @ over_prompts.T
    np.testing.assert_allclose(told.covariance, unit * (covariance + 1e-6 * np.eye(candidates)), atol=1e-6 * unit)
    for candidate in range(candidates):
        spans = slice(candidate * prompts, (candidate + 1) * prompts)
        shared, own = (left @ over_prompts[candidate])[spans], np.diag(left)[spans]
        unknown = own > 1e-6
        gains = told.gains(candidate)[unknown]
        np.testing.assert_allclose(gains, (shared[unknown] ** 2 / own[unknown]), rtol=1e-4, atol=1e-8)


@given(st.integers(1, 12), st.integers(0, 1000))
def test_likeness_is_a_covariance(count: int, seed: int) -> None:
    alike = drawn_likeness(count, np.random.default_rng(seed))
    np.testing.assert_allclose(np.diag(alike), 1.0)
    np.testing.assert_allclose(alike, alike.T)
    assert np.linalg.eigvalsh(alike).min() > -1e-9
    assert (alike > 0).all()


def test_candidates_are_the_less_alike_the_more_they_differ() -> None:
    kinds = [
        {"order": "rows", "selection": {"name": "pooled", "sub_block": 4}},
        {"order": "rows", "selection": {"name": "pooled", "sub_block": 4}},
        {"order": "rows", "selection": {"name": "pooled", "sub_block": 8}},
        {"order": "tiles", "selection": {"name": "pooled", "sub_block": 8}},
        {"order": "rows", "selection": {"name": "radial", "min_width": None}},
    ]
    alike = likeness(kinds, [0.2] * 5, [0.0] * 5)[0]
    assert alike[0] == alike[1] == 1.0
    assert alike[1] > alike[2] > alike[3] > alike[4]  # the last differs in name, sub_block and min_width
    near, far = likeness(kinds[:1] * 3, [0.2, 0.25, 0.5], [0.0] * 3)[0, 1:]
    assert near > far
    dense = likeness(kinds[:1] * 2, [0.2, 0.2], [0.0, 0.2])
    assert dense[0, 1] == pytest.approx(np.exp(-0.5 * (0.2 / belief._DENSE) ** 2))


def test_a_run_tells_of_others() -> None:
    """Two alike and one apart; the first is 10 better than expected on its prompt, and so may the second be."""
    alike = np.array([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]])
    told = Belief(alike, 2, spread=5.0)
    told.tell(2, 0, 20.0)
    told.tell(0, 0, 30.0)
    first, second, apart = told.mean
    assert first > second > apart
    sure = np.diag(told.covariance)
    assert sure[0] < sure[1]
    told.tell(2, 1, 10.0)  # the second prompt is a hard one: the first candidate will find it so
    assert told.mean[0] < first
