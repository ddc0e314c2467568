"""What the page does: one run at a time on one device, its files in the visitor's folder. No Gradio here."""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from sparse_dit.app.demo.inside import Inside, look_inside
from sparse_dit.app.demo.limits import Limits
from sparse_dit.app.demo.visits import Stopped, Visit
from sparse_dit.app.demo.watch import Tell, watched
from sparse_dit.eval import pair, results
from sparse_dit.eval.side_by_side import side_by_side
from sparse_dit.pipelines.generate import Frames, Request, call_arguments, load_pipeline, write_video
from sparse_dit.recipe import Recipe

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Pixels = npt.NDArray[np.uint8]
"""[F, H, W, 3] in 0..255."""

_FPS = 16


@dataclass(frozen=True)
class Asked:
    """A run that a visitor asked for.

    Args:
        model: name of a model on the owner's list.
        request: what to generate.
        recipe: what to compare with dense.
        inside: whether to run once more and look inside.
    """

    model: str
    request: Request
    recipe: Recipe
    inside: bool = True


@dataclass
class Finished:
    """A run that is done. Frames lie on disk, so that many of them cost no memory.

    Args:
        number: of the visit, from 1.
        folder: where its files lie.
        record: the result row.
        inside: what was found inside; None if nobody asked.
    """

    number: int
    folder: Path
    record: results.Row
    inside: Inside | None

    @cached_property
    def frames(self) -> int:
        """Number of frames; an image has one."""
        return len(self.clip("dense"))

    def clip(self, name: str) -> Pixels:
        """The frames of `dense` or `sparse`, mapped from disk."""
        frames: Pixels = np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        return frames

    def video(self, name: str) -> Path | None:
        """The video `dense`, `sparse` or `side-by-side`; None for an image."""
        file = self.folder / f"{name}.mp4"
        return file if file.exists() else None

    @property
    def downloads(self) -> list[Path]:
        """What a visitor may take home."""
        names = ("dense", "sparse", "side-by-side")
        files = [self.folder / f"{name}.{suffix}" for name in names for suffix in ("mp4", "png")]
        return [file for file in (*files, self.folder / "result.json", self.folder / "recipe.yaml") if file.exists()]


class Studio:
    """Loads the allowed models, one at a time, and makes runs with them, one at a time.

    Args:
        models: name → what `load_pipeline` takes (see `allowed_models`).
        limits: how much a run may be.
        device: where to run.
    """

    def __init__(self, models: Mapping[str, str], limits: Limits, device: str = "cpu") -> None:
        self.models = dict(models)
        self.limits = limits
        self.device = device
        self._loaded: tuple[str, DiffusionPipeline] | None = None
        self._one_at_a_time = threading.Lock()

    def load(self, model: str) -> None:
        """Has a model ready for the next run.

        Raises:
            ValueError: it is not on the list, or cannot be loaded.
        """
        with self._one_at_a_time:
            self._pipeline(model)

    def run(self, visit: Visit, asked: Asked, tell: Tell) -> Finished:
        """Runs dense, then sparse, and writes the files. What is under way ends when `visit.stop` is set.

        Args:
            visit: whose run it is.
            asked: what to run.
            tell: of steps, counted over all passes.

        Raises:
            ValueError: a model that is not on the list, more than the limits allow, or what `compare` refuses.
            Stopped: the visitor stopped it, or left.
        """
        stop = visit.stop
        with self._one_at_a_time, visit.new_run() as (number, folder):
            if stop.is_set():
                raise Stopped
            if self._loaded is None or self._loaded[0] != asked.model:
                tell(f"loading {asked.model}", 0, 0)
            try:
                pipe = self._pipeline(asked.model)
                request = _fitted(pipe, asked.request)
                arguments = call_arguments(pipe, request)
                self.limits.check(arguments)
                passes = _Passes(tell, arguments["num_inference_steps"], 3 if asked.inside else 2)
                with watched(pipe, passes, stop):
                    [comparison] = pair.compare(pipe, request, [asked.recipe], model=asked.model)
                    passes.name = "looking inside"
                    found = look_inside(pipe, request, asked.recipe, folder) if asked.inside else None
            except ValueError as error:
                # Visitors know models by name; where they lie on disk is the owner's business.
                source = self.models.get(asked.model, "")
                raise ValueError(str(error).replace(source, asked.model) if source else str(error)) from error
            tell("writing files", 0, 0)
            _write(folder, comparison, asked.recipe)
            run = Finished(number, folder, comparison.record, found)
        visit.keep(run)
        return run

    def _pipeline(self, model: str) -> DiffusionPipeline:
        if model not in self.models:
            raise ValueError(f"model: it is not on this server's list; valid: {', '.join(self.models)}")
        if self._loaded is None or self._loaded[0] != model:
            self._loaded = None  # two large models need not fit at once
            self._loaded = (model, load_pipeline(self.models[model], torch.device(self.device)))
        return self._loaded[1]


class _Passes:
    """Tells of the steps of several pipeline calls as of one long run.

    Args:
        tell: see `Tell`.
        steps: of one pass.
        passes: how many.
    """

    def __init__(self, tell: Tell, steps: int, passes: int) -> None:
        self.tell, self.steps, self.passes = tell, steps, passes
        self.done, self.name = -1, ""

    def __call__(self, what: str, step: int, total: int) -> None:
        if not total:
            self.tell(what, max(self.done, 0) * self.steps, self.passes * self.steps)
            return
        if step == 0:
            self.done += 1
        finished = self.done * self.steps + round(step / total * self.steps)
        self.tell(f"{self.name or what}: step {step} of {total}", finished, self.passes * self.steps)


def _fitted(pipe: DiffusionPipeline, request: Request) -> Request:
    """The request without frames where the pipeline makes images."""
    takes_frames = "num_frames" in inspect.signature(type(pipe).__call__).parameters
    return request if takes_frames else replace(request, num_frames=None)


def _write(folder: Path, comparison: pair.Comparison, recipe: Recipe) -> None:
    record = comparison.record
    label = f"{recipe.name}, run density {record['run_density']:.2f}, {record['psnr']:.1f} dB"
    clips = {"dense": comparison.dense[..., :3], "sparse": comparison.sparse[..., :3]}
    for name, frames in clips.items():
        np.save(folder / f"{name}.npy", to_pixels(frames), allow_pickle=False)
    for name, frames in {**clips, "side-by-side": side_by_side(clips["dense"], clips["sparse"], label)}.items():
        _write_clip(frames, folder / name)
    (folder / "result.json").write_text(results.to_json(record, indent=2) + "\n", encoding="utf-8")
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")


def _write_clip(frames: Frames, file: Path) -> None:
    """A video, or a PNG where there is one frame only."""
    if len(frames) > 1:
        write_video(frames, file.with_suffix(".mp4"), _FPS)
        return
    from PIL import Image

    Image.fromarray(to_pixels(frames)[0]).save(file.with_suffix(".png"))


def to_pixels(frames: Frames) -> Pixels:
    """Frames in 0..1 as bytes."""
    return np.round(np.clip(frames, 0, 1) * 255).astype(np.uint8)


def latent_of(frame: int, frames: int, latents: int) -> int:
    """The latent frame that holds a frame, as causal video VAEs count: the first by itself, then groups of equal size.

    Args:
        frame: from 0.
        frames: of the clip.
        latents: latent frames.
    """
    return 0 if frames < 2 else math.ceil(frame * (latents - 1) / (frames - 1))


def frame_of(latent: int, frames: int, latents: int) -> int:
    """The last frame that a latent frame holds."""
    return 0 if latents < 2 else latent * (frames - 1) // (latents - 1)
