"""Many visitors at once: each is given what is their own, and nothing of them is left when they have gone."""

import gc
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sparse_dit.app.demo.actions import Finished, Studio
from sparse_dit.app.demo.serve import LOCAL, listening
from sparse_dit.app.demo.visits import Visit, Visits
from sparse_dit.eval.demo_client import Visitor
from sparse_dit.eval.demo_trial import CLIPS, alone, askings, hold_round, judge
from sparse_dit.pipelines.generate import Request, load_pipeline

SMALL = Request("", height=64, width=64, num_frames=5, steps=1)
CROWD = 4


@pytest.fixture
def server(studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Visits]]:
    """A running server whose line has room for the crowd, and its visits."""
    visits = Visits(tmp_path / "visits")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(visits.root / "cache"))
    with listening(studio, visits, LOCAL, 0, CROWD) as url:
        yield url, visits
    assert not visits.root.exists()


def until(true: Callable[[], bool], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.05)
    return true()


def test_everybody_in_a_crowd_is_given_their_own_and_leaves_nothing(
    server: tuple[str, Visits], mini_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, visits = server
    kept: list[weakref.ref[Finished | Visit]] = []
    keep = Visit.keep

    def watch(visit: Visit, run: Finished) -> None:
        kept.extend((weakref.ref(run), weakref.ref(visit)))
        keep(visit, run)

    monkeypatch.setattr(Visit, "keep", watch)
    asked = askings(CROWD, SMALL)
    held = hold_round(url, asked)
    reference = alone(load_pipeline(str(mini_wan)), asked, tmp_path)
    assert len({digests[name] for digests in reference for name in CLIPS}) == 2 * CROWD
    found = judge(held, asked, reference)
    assert (found["own_records"], found["own_galleries"]) == (CROWD, CROWD)
    assert (found["equal_videos"], found["foreign_videos"]) == (2 * CROWD, 0)
    assert found["line_in_order"]
    assert found["sent_away"] == (
        f"Not possible: the server is busy: {CROWD} runs are in line, and it takes {CROWD}; "
        "please try again in a few minutes"
    )
    # The one who was sent away came back and was served.
    assert len(kept) == 2 * (CROWD + 1)
    assert until(lambda: len(visits) == 0), "pages that were closed are still open visits"
    assert not [path for path in visits.root.rglob("*") if path.is_file()]
    monkeypatch.undo()

    def forgotten() -> bool:
        gc.collect()
        return all(reference() is None for reference in kept)

    assert until(forgotten), "runs or visits of people who have left are still held in memory"


def test_a_page_that_is_closed_in_the_middle_of_its_run_makes_room(server: tuple[str, Visits]) -> None:
    url, visits = server
    leaves, stays = Visitor(url), Visitor(url)
    long, short = askings(2, replace(SMALL, steps=10, num_frames=9))
    assert leaves.ask(**long.fields) == "Starting."
    begun = leaves.begin()
    next(message for message in begun if message["msg"] == "process_generating")
    assert stays.ask(**{**short.fields, "steps": 1}) == "In line: 1 ahead of you."
    begun.close()
    leaves.leave()
    assert until(lambda: len(visits) == 1)
    assert stays.wait().status == "Run 1 is done."
    assert len(list(visits.root.glob("*/run-*"))) == 1
