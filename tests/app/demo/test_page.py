"""The page itself: what it answers, what it serves, and what it does not."""

import inspect
import os
import re
import socket
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import gradio
import httpx
import numpy as np
import pytest

from sparse_dit.app.demo import serve
from sparse_dit.app.demo.actions import Asked, Finished, Studio
from sparse_dit.app.demo.answers import Answers
from sparse_dit.app.demo.inside import Inside
from sparse_dit.app.demo.limits import split_recipe
from sparse_dit.app.demo.page import EXAMPLES, build
from sparse_dit.app.demo.serve import LOCAL, demo, listening
from sparse_dit.app.demo.visits import Visit, Visits
from sparse_dit.eval import mask_pictures
from sparse_dit.eval.demo_client import Visitor
from sparse_dit.pipelines.tiny_wan.grammar import vocabulary
from sparse_dit.recipe import load_recipe, recipe_names


@pytest.fixture
def answers(studio: Studio, visits: Visits) -> Answers:
    made = Answers(studio, visits, places=2)
    build(made)
    return made


def sent(asked: Asked) -> list[Any]:
    request = asked.request
    size = [request.seed, request.steps, request.width, request.height, request.num_frames]
    return [asked.model, request.prompt, asked.inside, *size, *split_recipe(asked.recipe)]


def test_a_run_goes_from_the_button_to_the_gallery(answers: Answers, asked: Asked) -> None:
    visit, parts = answers.visits.open("one"), answers.parts
    assert "Starting" in answers.admit(visit, None, *sent(asked))[0]
    running = answers.run(visit)
    first = next(running)
    assert list(answers.run(visit)) == [{parts.status: gradio.skip()}], "a run that was admitted is made once"
    *told, shown = running
    assert all(set(update) == {parts.status} for update in (first, *told))
    assert "value=9 max=9" in told[-2][parts.status]
    assert visit.asked is None
    assert shown[parts.number] == 1
    assert Path(shown[parts.dense]).parent.parent == visit.folder
    assert len(shown[parts.files]) == 5
    assert shown[parts.mask] is not None
    # Dragging over a frame with no mask, as step 0 is dense, says why.
    assert answers.show_mask(visit, 1, 1, 0, 99, 99, 99, 99)[0] is not None, "what lies outside is the nearest inside"
    mask, _, words = answers.show_mask(visit, 1, 0, 0, 0, 0, 0, 0)
    assert mask is None
    assert "it was dense" in words
    click = gradio.SelectData(None, {"index": [383, 100], "value": None})
    row, column, mask, _, words = answers.pick_query(visit, 1, 1, 0, 1, 2, click)
    assert (row, column) == (2, 7)
    assert mask == answers.show_mask(visit, 1, 1, 0, 1, 2, 2, 7)[0]
    assert "layer 0, head 1" in words
    for frame in (-3, 99, 4):
        pair, _ = answers.show_frame(visit, 1, frame)
        assert all(Path(file).exists() for file in pair)


def test_wrong_input_is_refused_before_the_line(answers: Answers, asked: Asked) -> None:
    visit = answers.visits.open("one")
    for position, value in ((0, "/etc"), (1, "<b>x"), (3, -1), (4, 10**9), (8, 7), (11, "file: ../x")):
        fields = sent(asked)
        fields[position] = value
        told, *_ = answers.admit(visit, None, *fields)
        assert "valid: " in told
        assert set(re.findall(r"<\w+", told)) == {"<p", "<b"}, "its own tags only"
        assert list(answers.run(visit)) == [{answers.parts.status: gradio.skip()}]
    assert visit.asked is None


def test_a_full_line_refuses_politely_and_a_stopped_run_makes_room(answers: Answers, asked: Asked) -> None:
    one, two, three = (answers.visits.open(name) for name in ("one", "two", "three"))
    answers.admit(one, None, *sent(asked))
    assert "1 ahead" in answers.admit(two, None, *sent(asked))[0]
    assert "please try again in a few minutes" in answers.admit(three, None, *sent(asked))[0]
    assert "Stopped" in answers.stop(two)
    answers.admit(three, None, *sent(asked))
    assert list(answers.run(two)) == [{answers.parts.status: gradio.skip()}]
    assert "Nothing is running" in answers.stop(two)


def test_the_line_moves_on_while_one_waits(studio: Studio, visits: Visits, asked: Asked) -> None:
    answers = Answers(studio, visits, places=3)
    build(answers)
    one, two, three = (visits.open(name) for name in ("one", "two", "three"))
    assert not answers.admit(one, None, *sent(asked))[2].active, "nobody is ahead, so there is nothing to look at"
    assert answers.admit(two, None, *sent(asked))[2].active
    assert "2 ahead" in answers.admit(three, None, *sent(asked))[0]
    assert "2 ahead" in answers.place(three)[0]
    answers.stop(one)
    assert "1 ahead" in answers.place(three)[0]
    answers.admit(one, None, *sent(asked))  # again, and now at the end
    assert "1 ahead" in answers.place(three)[0]
    assert "2 ahead" in answers.place(one)[0]
    assert "Starting" in answers.place(two)[0]
    next(answers.run(two))
    for gone in (two, None):
        line, clock = answers.place(gone)
        assert line == gradio.skip()
        assert not clock.active
    answers.stop(three)
    assert not answers.place(three)[1].active


def test_runs_of_others_cannot_be_shown(answers: Answers, run: Finished) -> None:
    one, two = answers.visits.open("one"), answers.visits.open("two")
    one.keep(replace(run, number=1))
    answers.show_frame(one, 1, 0)
    with pytest.raises(gradio.Error, match="no longer kept"):
        answers.show_frame(two, 1, 0)
    answers.visits.close("one")
    for visit in (one, None):
        with pytest.raises(gradio.Error, match="no longer connected"):
            answers.show_frame(visit, 1, 0)


def test_a_click_finds_the_token_in_pictures_that_are_not_square(answers: Answers, run: Finished) -> None:
    visit = answers.visits.open("one")
    np.save(visit.folder / "sparse.npy", np.zeros((1, 16, 32, 3), np.uint8))
    grid = Inside(visit.folder, (1, 2, 8), 0, 1, 1, 1)
    visit.keep(replace(run, number=1, folder=visit.folder, inside=grid))
    shown = mask_pictures.enlarged(np.zeros((16, 32, 3), np.uint8))
    for x, y, row, column in ((0.99, 0.99, 1, 7), (0.3, 0.6, 1, 2), (0.9, 0.4, 0, 7)):
        place = [x * shown.width, y * shown.height]
        click = gradio.SelectData(None, {"index": place, "value": None})
        assert answers.pick_query(visit, 1, 0, 0, 0, 0, click)[:2] == (row, column)


def test_a_run_of_the_gallery_is_the_one_that_was_clicked(
    answers: Answers, run: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    visit, shown = answers.visits.open("one"), []
    monkeypatch.setattr(answers, "show", lambda visit, number: shown.append(number) or {})
    for number in (4, 7, 9):
        visit.runs[number] = run
    for index in (0, 2, 3, None):
        answers.pick_run(visit, gradio.SelectData(None, {"index": index, "value": None}))
    assert shown == [4, 9]
    visit.runs.clear()


def test_a_page_that_is_closed_leaves_nothing_with_gradio(answers: Answers) -> None:
    answers.visits.open("one")
    held = {"one": object(), "two": object()}
    app = SimpleNamespace(state_holder=SimpleNamespace(session_data=held))
    answers.close_visit(SimpleNamespace(session_hash="one", request=SimpleNamespace(app=app)))
    assert (list(held), len(answers.visits)) == (["two"], 0)


def test_recipes_and_models_off_the_lists_are_refused(answers: Answers, asked: Asked) -> None:
    with pytest.raises(gradio.Error, match="recipe: it is not on the list"):
        answers.choose_recipe("/etc/passwd")
    visit = answers.visits.open("one")
    refusal = answers.admit(visit, None, "other", *sent(asked)[1:])[0]
    assert "not on this server&#x27;s list" in refusal
    assert visit.asked is None


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_can_be_chosen(answers: Answers, name: str) -> None:
    density, steps, precision, rest, _ = answers.choose_recipe(name)
    assert (density.value, steps, precision, rest) == split_recipe(load_recipe(name))


def test_examples_name_recipes_and_words_that_tiny_wan_knows() -> None:
    assert {recipe for _, recipe, _ in EXAMPLES} <= set(recipe_names())
    assert {word for prompt, *_ in EXAMPLES for word in prompt.split()} <= set(vocabulary())


@pytest.fixture(scope="module")
def served(studio: Studio, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Visits]]:
    """A running server on this machine, and its visits."""
    visits = Visits(tmp_path_factory.mktemp("served") / "visits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(visits.root / "cache"))
        with listening(studio, visits, LOCAL, 0, places=2) as url:
            yield url, visits


def test_the_page_names_no_other_host_in_scripts_styles_and_fonts(served: tuple[str, Visits]) -> None:
    url, _ = served
    page = httpx.get(url, timeout=60).text
    assert "sparse_dit" in page
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=[\"']https?://", page)
    theme = httpx.get(f"{url}theme.css", timeout=60).text
    assert not re.findall(r"@import|url\([\"']?https?:", theme)
    assert "@font-face" not in theme


def test_the_server_speaks_to_this_machine_alone(
    studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bound to the loopback address unless told otherwise; no look-up of any other host, before, during or after."""
    assert inspect.signature(demo).parameters["host"].default == LOCAL == "127.0.0.1"
    asked: set[Any] = set()
    look_up = socket.getaddrinfo

    def watch(host: Any, *arguments: Any, **settings: Any) -> Any:
        asked.add(host.decode() if isinstance(host, bytes) else host)
        return look_up(host, *arguments, **settings)

    monkeypatch.setattr(socket, "getaddrinfo", watch)
    with listening(studio, Visits(tmp_path / "visits"), LOCAL, 0, places=1) as url:
        assert httpx.get(f"{url}config", timeout=60).json()["analytics_enabled"] is False
        port = urlsplit(url).port
        files = [Path(f"/proc/net/{table}") for table in ("tcp", "tcp6")]
        rows = [line.split() for file in files if file.exists() for line in file.read_text().splitlines()[1:]]
        # Columns: number, local address in hexadecimal, the other address, state; 0A is listening.
        bound = [row[1].split(":")[0] for row in rows if row[3] == "0A" and int(row[1].split(":")[1], 16) == port]
        assert bound == ["0100007F"]
        Visitor(url).leave()
    assert asked <= {LOCAL, "localhost", None}, asked


def test_a_port_that_is_taken_is_told(studio: Studio, tmp_path: Path) -> None:
    with socket.create_server((LOCAL, 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(ValueError, match=rf"^port: {port} of '127.0.0.1' cannot be had; valid: a free port"),
            listening(studio, Visits(tmp_path / "visits"), LOCAL, port, places=1),
        ):
            pass


def test_a_server_that_ends_leaves_no_files(studio: Studio, tmp_path: Path) -> None:
    visits = Visits(tmp_path / "visits")
    with listening(studio, visits, LOCAL, 0, places=1):
        visit = visits.open("one")
        assert visit.folder.exists()
    assert visit.stop.is_set()
    assert not visits.root.exists()


def test_a_server_without_places_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(serve, "listening")  # it would serve until it is interrupted
    with pytest.raises(ValueError, match=r"^places: 0; valid: a whole number from 1$"):
        demo(places=0)


def test_without_gradio_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delattr(serve, "listening")  # it would serve until it is interrupted
    with pytest.raises(ValueError, match=r"^demo: gradio is not installed; valid: pip install 'sparse-dit\[demo\]'$"):
        demo()
    assert not list(tmp_path.iterdir())


def test_files_of_visits_are_served_and_no_others(served: tuple[str, Visits], mini_wan: Path) -> None:
    url, visits = served
    visit: Visit = visits.open("one")
    file = visit.folder / "result.json"
    file.write_text("{}")

    def status(path: str) -> int:
        return int(httpx.get(f"{url}gradio_api/file={path}", timeout=60).status_code)

    assert status(str(file)) == 200
    outside = ["/etc/passwd", f"{visits.root}/../../secret", str(mini_wan / "model_index.json"), os.fspath(__file__)]
    link = visit.folder / "link"
    link.symlink_to("/etc/passwd")
    for path in (*outside, f"{visit.folder}/../../../../../../etc/passwd", str(link), str(visits.root)):
        assert status(path) in (403, 404), path
    visits.close("one")
    assert status(str(file)) in (403, 404)
