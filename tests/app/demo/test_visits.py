"""Visits are apart from one another, and leave nothing."""

from pathlib import Path

import pytest

from sparse_dit.app.demo.actions import Asked, Finished
from sparse_dit.app.demo.visits import MAX_RUNS, MAX_VISITS, Stopped, Visit, Visits
from sparse_dit.pipelines.generate import Request
from sparse_dit.recipe import Recipe

ASKED = Asked("tiny-wan", Request("a circle"), Recipe())


def test_visits_have_folders_of_their_own_with_names_nobody_can_guess(visits: Visits) -> None:
    one, two = visits.open("one"), visits.open("two")
    assert visits.open("one") is one
    assert one.folder != two.folder
    assert all(len(visit.folder.name) == 32 and visit.folder.parent == visits.root for visit in (one, two))
    assert len(visits) == 2


def test_closing_a_visit_ends_its_run_and_removes_its_files_only(visits: Visits) -> None:
    one, two = visits.open("one"), visits.open("two")
    stop = one.stop
    for visit in (one, two):
        with visit.new_run() as (_, folder):
            (folder / "dense.mp4").write_bytes(b"x")
    visits.close("one")
    assert stop.is_set()
    assert not one.folder.exists()
    assert (two.folder / "run-1" / "dense.mp4").exists()
    with pytest.raises(Stopped), one.new_run():
        pass
    assert not one.folder.exists()
    visits.close("one")
    visits.close(None)
    visits.close_all()
    assert not visits.root.exists()


def test_a_run_that_ends_after_its_visitor_left_leaves_nothing(visits: Visits) -> None:
    visit = visits.open("one")

    def leave_meanwhile() -> None:
        with visit.new_run() as (_, folder):
            visits.close("one")
            folder.mkdir(parents=True)
            (folder / "dense.mp4").write_bytes(b"x")

    with pytest.raises(Stopped):
        leave_meanwhile()
    assert not visit.folder.exists()


def test_a_failed_run_leaves_no_folder(visits: Visits) -> None:
    visit = visits.open("one")

    def fail() -> None:
        with visit.new_run() as (_, folder):
            (folder / "dense.npy").write_bytes(b"x")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not list(visit.folder.iterdir())


def test_the_oldest_run_goes(tmp_path: Path) -> None:
    visit = Visit(tmp_path / "visit")
    for _ in range(MAX_RUNS + 2):
        with visit.new_run() as (number, folder):
            pass
        visit.keep(Finished(number, folder, {}, None))
    assert list(visit.runs) == list(range(3, MAX_RUNS + 3))
    assert len(list(visit.folder.iterdir())) == MAX_RUNS


def test_the_line_takes_one_run_a_visit_and_no_more_than_it_has_places(visits: Visits) -> None:
    one, two, three = (visits.open(name) for name in ("one", "two", "three"))
    assert visits.enter(one, ASKED, 2) == 0
    with pytest.raises(ValueError, match="still under way"):
        visits.enter(one, ASKED, 2)
    assert visits.enter(two, ASKED, 2) == 1
    with pytest.raises(ValueError, match="the server is busy: 2 runs are in line"):
        visits.enter(three, ASKED, 2)
    visits.close("one")  # whoever leaves makes room
    assert visits.enter(three, ASKED, 2) == 1


def test_a_run_that_was_stopped_does_not_stop_the_next_one(visits: Visits) -> None:
    visit = visits.open("one")
    visits.enter(visit, ASKED, 2)
    first = visit.stop
    first.set()
    visit.asked = None
    visits.enter(visit, ASKED, 2)
    assert not visit.stop.is_set()
    assert first.is_set()


def test_visits_that_nobody_closes_do_not_pile_up(visits: Visits) -> None:
    busy, used, idle = (visits.open(name) for name in ("busy", "used", "idle"))
    visits.enter(busy, ASKED, 2)
    visits.enter(used, ASKED, 2)
    used.asked = None  # its run has ended
    for number in range(MAX_VISITS - 2):
        visits.open(str(number))
    assert len(visits) == MAX_VISITS == len(list(visits.root.iterdir()))
    assert idle.closed
    assert not idle.folder.exists()
    # Last used last: "used" outlives those that were opened before it had its run.
    assert not used.closed
    for number in range(MAX_VISITS):
        visits.open(f"later {number}")
    assert used.closed
    assert not busy.closed, "a run that is under way is not taken away"
    assert len(visits) == MAX_VISITS
