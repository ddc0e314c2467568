"""What the page shows after each thing a visitor does: actions in, values of Gradio components out."""

from __future__ import annotations

import ctypes
import gc
import logging
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import gradio as gr

from sparse_dit.app.demo import pictures
from sparse_dit.app.demo.actions import Asked, Finished, Studio, frame_of, latent_of
from sparse_dit.app.demo.inside import Inside
from sparse_dit.app.demo.limits import join_recipe, read_request, split_recipe, takes_density
from sparse_dit.app.demo.visits import Stopped, Visit, Visits
from sparse_dit.eval import mask_pictures
from sparse_dit.pipelines.generate import TINY_WAN
from sparse_dit.pipelines.tiny_wan import DEFAULTS
from sparse_dit.recipe import Recipe, load_recipe, recipe_names

Update = dict[Any, Any]


@dataclass
class Parts:
    """The components that answers change, by what they hold."""

    status: Any = None
    number: Any = None
    empty: Any = None
    results: Any = None
    videos: Any = None
    dense: Any = None
    sparse: Any = None
    numbers: Any = None
    frame: Any = None
    slider: Any = None
    difference: Any = None
    files: Any = None
    heat: Any = None
    query: Any = None
    step: Any = None
    layer: Any = None
    head: Any = None
    latent: Any = None
    row: Any = None
    column: Any = None
    mask: Any = None
    strip: Any = None
    told: Any = None
    made: Any = None
    gallery: Any = None


class Answers:
    """Handlers of the page's events.

    Args:
        studio: makes the runs.
        visits: the open visits.
        places: runs in line at once.
    """

    def __init__(self, studio: Studio, visits: Visits, places: int) -> None:
        self.studio, self.visits, self.places = studio, visits, places
        self.parts = Parts()
        self.worker = ThreadPoolExecutor(max_workers=1)

    def open_visit(self, request: gr.Request) -> Visit:
        """A folder for the page that was opened."""
        return self.visits.open(request.session_hash or "")

    def close_visit(self, request: gr.Request) -> None:
        """The page was closed: its run ends, its files go."""
        self.visits.close(request.session_hash)
        # Gradio keeps the components of 10,000 closed pages, up to a MiB each, in case one is opened again: not ours.
        request.request.app.state_holder.session_data.pop(request.session_hash, None)
        if not len(self.visits):
            _give_back_memory()

    def choose_model(self, model: str) -> list[Any]:
        """Steps, width, height and frames that suit a model; empty is the model's own default."""
        defaults = DEFAULTS if model == TINY_WAN else {}
        return [defaults.get(name) for name in ("num_inference_steps", "width", "height", "num_frames")]

    def choose_recipe(self, name: str) -> list[Any]:
        """Density, dense steps, precision, the rest as YAML, and where the recipe comes from."""
        if name not in recipe_names():
            raise gr.Error("recipe: it is not on the list", print_exception=False)
        recipe = load_recipe(name)
        density, steps, precision, rest = split_recipe(recipe)
        takes = takes_density(recipe)
        field = gr.Number(
            value=density, interactive=takes, placeholder="set by other settings" if takes else "set by its threshold"
        )
        return [field, steps, precision, rest, told_origin(recipe)]

    def admit(
        self, visit: Visit | None, request: gr.Request, model: Any, prompt: Any, inside: Any, *fields: Any
    ) -> tuple[str, Visit, Any]:
        """Checks a run and puts it in line. `fields`: seed, steps, width, height, frames, and the recipe's four.

        The visit is opened here where the page was quicker than its own opening. Whoever waits gets a clock (`place`).
        """
        visit = visit or self.open_visit(request)
        try:
            if model not in self.studio.models:
                raise ValueError(f"model: it is not on this server's list; valid: {', '.join(self.studio.models)}")
            wanted = read_request(self.studio.limits, prompt, *fields[:5])
            recipe = join_recipe(self.studio.limits, *fields[5:])
            ahead = self.visits.enter(visit, Asked(model, wanted, recipe, bool(inside)), self.places)
        except ValueError as error:
            return _refusal(str(error)), visit, gr.skip()
        return _in_line(ahead), visit, gr.Timer(active=ahead > 0)

    def place(self, visit: Visit | None) -> tuple[Any, Any]:
        """How many are ahead by now; the clock that asks stops when the run has begun, or is out of the line."""
        if visit is None or visit.asked is None or not visit.admitted:
            return gr.skip(), gr.Timer(active=False)
        return _in_line(self.visits.ahead(visit)), gr.skip()

    def run(self, visit: Visit | None) -> Iterator[Update]:
        """Makes the run that was admitted, if there is one, and says how far it is."""
        visit = _open(visit)
        asked, stop = visit.asked, visit.stop
        if asked is None or not visit.admitted:
            yield {self.parts.status: gr.skip()}
            return
        visit.admitted = False
        news: SimpleQueue[str | None] = SimpleQueue()
        job = self.worker.submit(self.studio.run, visit, asked, lambda *what: news.put(_progress(*what)))
        job.add_done_callback(lambda _: news.put(None))
        try:
            while (line := news.get()) is not None:
                yield {self.parts.status: gr.skip() if stop.is_set() else line}
            yield self._finished(visit, job)
        finally:
            stop.set()  # where the page let go of this generator, the run must not go on
            if visit.asked is asked:
                visit.asked = None

    def _finished(self, visit: Visit, job: Future[Finished]) -> Update:
        try:
            run = job.result()
        except Stopped:
            return {self.parts.status: gr.skip()}  # `stop` has said so, and the next run may have begun to speak
        except ValueError as error:
            return {self.parts.status: _refusal(str(error))}
        except Exception:
            logging.getLogger(__name__).exception("a run failed")
            return {self.parts.status: _refusal("the run failed; the server's log tells why")}
        made = {self.parts.made: gr.Column(visible=True), self.parts.gallery: _gallery(visit)}
        return {**self.show(visit, run.number), **made}

    def stop(self, visit: Visit | None) -> str:
        """Ends the run under way, or takes it out of the line."""
        visit = _open(visit)
        if visit.asked is None:
            return _status("Nothing is running.")
        visit.asked = None
        visit.stop.set()
        return _status("Stopped.")

    def pick_run(self, visit: Visit | None, event: gr.SelectData) -> Update:
        """Shows a run of the gallery."""
        visit = _open(visit)
        numbers = list(visit.runs)
        if not isinstance(event.index, int) or not 0 <= event.index < len(numbers):
            return {self.parts.status: gr.skip()}
        return self.show(visit, numbers[event.index])

    def show(self, visit: Visit, number: int) -> Update:
        """Everything there is to see of a run."""
        run, parts = visit.runs[number], self.parts
        inside, frame = run.inside, run.frames // 2
        moving = run.frames > 1
        shown = {
            parts.status: _status(f"Run {run.number} is done."),
            parts.number: number,
            parts.empty: gr.HTML(visible=False),
            parts.results: gr.Column(visible=True),
            parts.videos: gr.Column(visible=moving),
            parts.dense: _path(run.video("dense")),
            parts.sparse: _path(run.video("sparse")),
            parts.numbers: pictures.numbers_html(run.record),
            parts.frame: gr.Slider(maximum=max(1, run.frames - 1), value=frame, visible=moving),
            parts.files: [str(file) for file in run.downloads],
            parts.heat: _heat(inside),
            parts.query: gr.Column(visible=bool(inside and inside.masks)),
        }
        shown.update(zip((parts.slider, parts.difference), self.show_frame(visit, number, frame), strict=True))
        if inside is None or not inside.masks:
            return {**shown, parts.mask: None, parts.strip: None, parts.told: inside.missing if inside else ""}
        step, layer = next(iter(inside.masks))
        latents, rows, columns = inside.grid
        place = (latent_of(frame, run.frames, latents), rows // 2, columns // 2)
        for part, value, sides in (
            (parts.step, step, inside.steps),
            (parts.layer, layer, inside.layers),
            (parts.head, 0, inside.heads),
            (parts.latent, place[0], latents),
            (parts.row, place[1], rows),
            (parts.column, place[2], columns),
        ):
            shown[part] = gr.Slider(maximum=max(1, sides - 1), value=value, visible=sides > 1)
        masks = self.show_mask(visit, number, step, layer, 0, *place)
        return {**shown, **dict(zip((parts.mask, parts.strip, parts.told), masks, strict=True))}

    def show_frame(self, visit: Visit | None, number: int, frame: int) -> tuple[Any, Any]:
        """A frame dense and sparse for the slider, and the difference."""
        run = _run(visit, number)
        frame = min(max(int(frame), 0), run.frames - 1)
        dense, sparse = (run.clip(name)[frame] for name in ("dense", "sparse"))
        pair = tuple(
            _picture(run, f"frame-{frame}-{name}", partial(mask_pictures.enlarged, clip))
            for name, clip in (("dense", dense), ("sparse", sparse))
        )
        difference, gain = pictures.difference_map(dense, sparse)
        file = _picture(run, f"frame-{frame}-difference", lambda: difference)
        return pair, gr.Image(value=file, label=f"Difference x {gain}, frame {frame}")

    def show_mask(
        self, visit: Visit | None, number: int, step: int, layer: int, head: int, latent: int, row: int, column: int
    ) -> tuple[Any, Any, str]:
        """What is computed for a query: drawn over its frame, over all frames, and in words."""
        run = _run(visit, number)
        inside = run.inside
        if inside is None:
            return None, None, ""
        place = tuple(
            min(max(int(at), 0), side - 1) for at, side in zip((latent, row, column), inside.grid, strict=True)
        )
        query = (place[0], place[1], place[2])
        found = inside.computed(int(step), int(layer), min(max(int(head), 0), inside.heads - 1), query)
        if found is None:
            why = inside.missing or "it was dense: every token is computed"
            return None, None, f"Step {step}, layer {layer}: no mask, {why}."
        keys, own = found
        clip = run.clip("sparse")
        name = "-".join(map(str, ("mask", step, layer, head, *query)))

        def over_frame() -> Any:
            picture = mask_pictures.mask_picture(clip[frame_of(query[0], len(clip), inside.grid[0])], keys[query[0]])
            pictures.outline(picture, own[query[0]])
            return mask_pictures.ring(picture, query[1:], (inside.grid[1], inside.grid[2]))

        told = (
            f"Step {step}, layer {layer}, head {head}: {keys.mean():.1%} of all video tokens are computed for this "
            f"query, {keys[query[0]].mean():.1%} of those in its own frame. Dark tokens are skipped; the thin line is "
            "the query's block, the square the query: click to move it. The second picture shows all frames, with "
            "their shares."
        )
        strip = _picture(run, f"{name}-strip", lambda: pictures.mask_strip(clip, keys, query))
        return _picture(run, name, over_frame), strip, told

    def pick_query(
        self, visit: Visit | None, number: int, step: int, layer: int, head: int, latent: int, event: gr.SelectData
    ) -> tuple[Any, ...]:
        """Row and column of the token that was clicked on the mask's frame, and what `show_mask` shows of it."""
        run = _run(visit, number)
        if run.inside is None or not isinstance(event.index, list | tuple):
            return (gr.skip(),) * 5
        picture = mask_pictures.enlarged(run.clip("sparse")[0])
        _, rows, columns = run.inside.grid
        x, y = (float(at) for at in event.index[:2])
        row = min(max(int(y * rows / picture.height), 0), rows - 1)
        column = min(max(int(x * columns / picture.width), 0), columns - 1)
        return row, column, *self.show_mask(visit, number, step, layer, head, latent, row, column)


def told_origin(recipe: Recipe) -> str:
    """Where a recipe comes from, as HTML."""
    told = " ".join(filter(None, (recipe.source, f"({recipe.note})" if recipe.note else "")))
    return f"<p class=small>{escape(told)}</p>"


def _open(visit: Visit | None) -> Visit:
    if visit is None or visit.closed:
        raise gr.Error("This page is no longer connected; please reload it.", print_exception=False)
    return visit


def _run(visit: Visit | None, number: int) -> Finished:
    runs = _open(visit).runs
    if number not in runs:
        raise gr.Error("This run is no longer kept.", print_exception=False)
    return runs[number]


def _picture(run: Finished, name: str, draw: Callable[[], Any]) -> str:
    """The file of a picture, drawn once."""
    file = run.folder / f"{name}.png"
    if not file.exists():
        draw().save(file)
    return str(file)


def _path(file: Path | None) -> str | None:
    return None if file is None else str(file)


def _gallery(visit: Visit) -> list[tuple[str, str]]:
    runs = visit.runs.values()
    return [(_picture(run, "thumbnail", partial(pictures.thumbnail, run)), pictures.caption(run)) for run in runs]


def _heat(inside: Inside | None) -> str:
    if inside is None:
        return "<p class=small>This run was made without looking inside.</p>"
    return pictures.heat_html(
        inside.density, "Density", "computed share of the attention, mean over heads"
    ) + pictures.heat_html(
        inside.mass, "Kept mass", "share of whole attention's mass that was computed, on sampled queries"
    )


def _give_back_memory() -> None:
    """Collects garbage; glibc then gives the system back what is free, which it otherwise keeps for later."""
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def _in_line(ahead: int) -> str:
    return _status("Starting." if not ahead else f"In line: {ahead} ahead of you.")


def _status(text: str) -> str:
    return f"<p class=status role=status aria-live=polite>{escape(text)}</p>"


def _progress(what: str, done: int, total: int) -> str:
    """A bar, which screen readers know as one; it does not announce every step."""
    amount = f"value={done} max={total}" if total else ""
    return f"<label class=status>{escape(what)}<progress {amount}></progress></label>"


def _refusal(text: str) -> str:
    return f"<p class='status refused' role=alert><b>Not possible:</b> {escape(text)}</p>"
