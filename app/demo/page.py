"""The page: what is on it, and which event calls which answer."""

from __future__ import annotations

from typing import Any

import gradio as gr

from sparse_dit.app.demo import style
from sparse_dit.app.demo.answers import Answers, Parts, told_origin
from sparse_dit.app.demo.limits import split_recipe
from sparse_dit.kernels.ops import PRECISIONS
from sparse_dit.recipe import load_recipe, recipe_names

FIRST_RECIPE = "tiny-radial"
EXAMPLES = [
    ["a large plain red circle moving right over a gray gradient", "tiny-radial", 0],
    ["a large dotted yellow square growing over a gravel road", "tiny-radial", 3],
    ["a small striped blue triangle moving up over a grassy field", "sparge", 1],
    ["a large plain green circle shrinking over a bright wall", "draft", 2],
]
_EMPTY = (
    "<div class=empty><p>Nothing here yet.</p><p>Generate runs the prompt twice from the same noise, with the model's "
    "own attention and with the recipe, and shows both clips, what they cost and what the recipe left out.</p></div>"
)
_CLOCK = 3  # seconds between two looks at the line, for those who wait in it
_LIGHT: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
_QUEUED: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "gpu", "api_visibility": "private"}


def build(answers: Answers) -> gr.Blocks:
    """The page of a studio. `answers` learns the components it changes."""
    parts = answers.parts
    with gr.Blocks(title="sparse_dit", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        visit = gr.State(None)
        parts.number = gr.State(0)
        with gr.Row():
            gr.HTML(
                "<div id=head><h1>sparse_dit</h1><p>Dense and sparse attention side by side, from the same noise.</p>"
                "</div>",
                container=False,
            )
            shade = gr.Button("Light / dark", size="sm", scale=0, min_width=120)
        with gr.Row():
            with gr.Column(scale=4, min_width=320):
                asked, recipe, told = _asking(answers)
                with gr.Row():
                    go = gr.Button("Generate", variant="primary", elem_id="go")
                    stop = gr.Button("Stop", elem_id="stop")
                parts.status = gr.HTML(elem_id="status", container=False)
            with gr.Column(scale=7, min_width=320):
                with gr.Column(visible=False, elem_id="results") as parts.results:
                    _results(parts)
                parts.empty = gr.HTML(_EMPTY, container=False)
                with gr.Column(visible=False) as parts.made:
                    gr.HTML("<p><b>Runs of this visit</b>, yours alone, and gone when you close the page</p>")
                    parts.gallery = gr.Gallery(
                        show_label=False, columns=3, height="auto", interactive=False, elem_id="gallery",
                        object_fit="contain", allow_preview=False, buttons=[],
                    )  # fmt: skip
                gr.Examples(EXAMPLES, [asked["prompt"], recipe, asked["seed"]], cache_examples=False)
        shade.click(None, js=style.LIGHT_OR_DARK, api_visibility="private")
        knobs = [asked[name] for name in ("density", "dense_steps", "precision", "rest")]
        recipe.change(answers.choose_recipe, recipe, [*knobs, told], **_LIGHT)
        size = [asked[name] for name in ("steps", "width", "height", "frames")]
        asked["model"].change(answers.choose_model, asked["model"], size, **_LIGHT)
        _wire(answers, page, visit, list(asked.values()), go, stop)
    return page


def _asking(answers: Answers) -> tuple[dict[str, Any], Any, Any]:
    """What a visitor sets, in the order in which `Answers.admit` takes it; the recipe's name; where it comes from."""
    names = sorted(recipe_names(), key=lambda name: (not name.startswith("tiny-"), name))
    first = load_recipe(FIRST_RECIPE)
    density, dense_steps, precision, rest = split_recipe(first)
    models = list(answers.studio.models)
    steps, width, height, frames = answers.choose_model(models[0])
    limits = answers.studio.limits
    asked: dict[str, Any] = {}
    prompt = gr.Textbox(EXAMPLES[0][0], label="Prompt", lines=2, max_length=limits.prompt, elem_id="prompt")
    with gr.Row():
        asked["model"] = gr.Dropdown(models, value=models[0], label="Model", elem_id="model", min_width=140)
        recipe = gr.Dropdown(names, value=FIRST_RECIPE, label="Recipe", elem_id="recipe", min_width=140)
    asked["prompt"] = prompt
    note = gr.HTML(told_origin(first), container=False)
    with gr.Row():
        density = gr.Number(
            density, label="Density", step=0.05, min_width=120, elem_id="density",
            placeholder="set by other settings",
        )  # fmt: skip
        dense_steps = gr.Number(dense_steps, label="Dense steps", precision=0, min_width=120, elem_id="dense-steps")
        precision = gr.Dropdown(list(PRECISIONS), value=precision, label="Precision", min_width=120)
    with gr.Accordion("All settings of the recipe", open=False):
        rest = gr.Textbox(
            rest, label="YAML", lines=12, max_lines=24, max_length=limits.recipe, elem_id="yaml",
            info="Order, selection, schedule, skipped blocks, block sizes; what has a field above is left out.",
        )  # fmt: skip
    with gr.Row():
        seed = gr.Number(0, label="Seed", precision=0, min_width=90, elem_id="seed")
        steps = gr.Number(steps, label="Steps", precision=0, min_width=90, elem_id="steps")
    with gr.Accordion("Size, and a look inside", open=False):
        with gr.Row():
            width = gr.Number(width, label="Width", precision=0, min_width=90, elem_id="width")
            height = gr.Number(height, label="Height", precision=0, min_width=90, elem_id="height")
            frames = gr.Number(frames, label="Frames", precision=0, min_width=90, elem_id="frames")
        inside = gr.Checkbox(
            True, label="Look inside", elem_id="inside",
            info="One more sparse run, not timed, that keeps every block mask.",
        )  # fmt: skip
    asked.update(inside=inside, seed=seed, steps=steps, width=width, height=height, frames=frames)
    asked.update(density=density, dense_steps=dense_steps, precision=precision, rest=rest)
    return asked, recipe, note


def _results(parts: Parts) -> None:
    with gr.Column() as parts.videos:
        with gr.Row(elem_id="clips"):
            parts.dense = _video("Dense")
            parts.sparse = _video("Sparse")
        with gr.Row():
            both = gr.Button("Play / pause both", size="sm", elem_id="both")
            slower = gr.Button("Speed: 1", size="sm", elem_id="speed")
    parts.numbers = gr.HTML(elem_id="numbers", container=False)
    with gr.Tabs():
        with gr.Tab("One frame"):
            parts.frame = _pointer("Frame", "frame")
            with gr.Row():
                parts.slider = gr.ImageSlider(
                    label="Dense | sparse", type="filepath", interactive=False, elem_id="slider", min_width=280,
                    buttons=["fullscreen"],
                )  # fmt: skip
                parts.difference = _image("Difference", "difference")
        with gr.Tab("Inside the model"):
            with gr.Column(visible=False) as parts.query:
                with gr.Row():
                    parts.step, parts.layer, parts.head = (
                        _pointer(label, label.lower()) for label in ("Step", "Layer", "Head")
                    )
                with gr.Row():
                    parts.latent, parts.row, parts.column = (
                        _pointer(f"Query: {label}", f"query-{label.split()[-1]}")
                        for label in ("latent frame", "row", "column")
                    )
                parts.told = gr.HTML(container=False)
                with gr.Row():
                    parts.mask = _image(None, "mask")
                    parts.strip = _image(None, "strip")
            parts.heat = gr.HTML(elem_id="heat", container=False)
        with gr.Tab("Files"):
            parts.files = gr.File(
                label="Videos, result and recipe", file_count="multiple", interactive=False, elem_id="files"
            )
    both.click(None, js=style.PLAY_BOTH, api_visibility="private")
    slower.click(None, js=style.SLOWER, api_visibility="private")


def _wire(answers: Answers, page: gr.Blocks, visit: Any, asked: list[Any], go: Any, stop: Any) -> None:
    parts = answers.parts
    frame = [parts.slider, parts.difference]
    mask = [parts.mask, parts.strip, parts.told]
    pointers = [parts.step, parts.layer, parts.head, parts.latent, parts.row, parts.column]
    shown = [
        parts.status, parts.number, parts.empty, parts.results, parts.videos, parts.dense, parts.sparse, parts.numbers,
        parts.frame, *frame, parts.files, parts.heat, parts.query, *pointers, *mask,
    ]  # fmt: skip
    clock = gr.Timer(_CLOCK, active=False)
    page.load(answers.open_visit, None, visit, js=style.STEP, **_LIGHT)
    page.unload(answers.close_visit)
    admitted = gr.on(
        [go.click, asked[1].submit],
        answers.admit,
        [visit, *asked],
        [parts.status, visit, clock],
        trigger_mode="once",
        **_LIGHT,
    )
    clock.tick(answers.place, visit, [parts.status, clock], **_LIGHT)
    made = [parts.made, parts.gallery]
    admitted.then(answers.run, visit, [*shown, *made], show_progress="hidden", trigger_mode="multiple", **_QUEUED)
    # No `cancels`: Gradio's page then loses the next run now and then. The run ends by itself, and frees its place.
    stop.click(answers.stop, visit, parts.status, **_LIGHT)
    parts.gallery.select(answers.pick_run, visit, shown, **_LIGHT)
    # Input, not change: a run that is shown sets all pointers at once and brings its own pictures.
    parts.frame.input(
        answers.show_frame, [visit, parts.number, parts.frame], frame, trigger_mode="always_last", **_LIGHT
    )
    gr.on(
        [pointer.input for pointer in pointers],
        answers.show_mask,
        [visit, parts.number, *pointers],
        mask,
        trigger_mode="always_last",
        **_LIGHT,
    )
    parts.mask.select(
        answers.pick_query, [visit, parts.number, *pointers[:4]], [parts.row, parts.column, *mask], **_LIGHT
    )


def _video(label: str) -> Any:
    return gr.Video(label=label, autoplay=True, loop=True, interactive=False, buttons=["download"], min_width=240)


def _image(label: str | None, name: str) -> Any:
    return gr.Image(
        label=label, show_label=label is not None, type="filepath", interactive=False, elem_id=name, min_width=280,
        buttons=["fullscreen"],
    )  # fmt: skip


def _pointer(label: str, name: str) -> Any:
    return gr.Slider(0, 1, value=0, step=1, label=label, elem_id=name, min_width=130, buttons=[])
