"""What the demo's tests share: a studio with one small model, and a run that is looked into."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from sparse_dit.app.demo.actions import Asked, Finished, Studio
from sparse_dit.app.demo.limits import Limits, allowed_models
from sparse_dit.app.demo.visits import Visit, Visits
from sparse_dit.pipelines.generate import Request
from sparse_dit.recipe import load_recipe


@pytest.fixture(scope="session")
def studio(mini_wan: Path) -> Studio:
    """A studio that allows one small model, shown by the name of its folder."""
    return Studio(allowed_models([str(mini_wan)]), Limits(steps=10, pixels=2**17))


@pytest.fixture(scope="session")
def model(studio: Studio) -> str:
    """The name that the studio shows for its model."""
    return next(iter(studio.models))


@pytest.fixture(scope="session")
def asked(model: str) -> Asked:
    """A run of three steps, the first one dense, of 3 x 8 x 8 tokens."""
    request = Request("a small red circle moves right", steps=3, height=64, width=64, num_frames=9)
    return Asked(model, request, load_recipe("tiny-radial").override({"schedule.dense_steps": 1}))


@pytest.fixture
def visits(tmp_path: Path) -> Iterator[Visits]:
    """Open visits below a folder of the test."""
    visits = Visits(tmp_path / "visits")
    yield visits
    visits.close_all()


@pytest.fixture(scope="session")
def told() -> list[tuple[str, int, int]]:
    """What the shared run told of its progress."""
    return []


@pytest.fixture(scope="session")
def run(
    studio: Studio, asked: Asked, told: list[tuple[str, int, int]], tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    """What came of `asked`. Read-only."""
    visit = Visit(tmp_path_factory.mktemp("visit"))
    return studio.run(visit, asked, lambda *what: told.append(what))
