"""Dense runs that are kept on disk, so that each prompt has one, however often it is compared with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sparse_dit.eval import results
from sparse_dit.eval.pair import DENSE, Run, asking, run
from sparse_dit.pipelines.disk import write_file, write_stream
from sparse_dit.pipelines.generate import Request
from sparse_dit.recipe import load_recipe
from sparse_dit.state import Summary

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class References:
    """The dense runs of a pipeline, in a folder.

    Args:
        folder: where frames are kept, uncompressed in float32; it need not exist.
        pipe: a pipeline that is not sparse at the moment.
        model: its name.

    Attributes:
        made: how many runs were made, not read.
    """

    def __init__(self, folder: Path, pipe: DiffusionPipeline, model: str) -> None:
        self.folder, self.pipe, self.model = folder, pipe, model
        self.made = 0
        self._last: tuple[str, Run] | None = None

    def get(self, request: Request) -> Run:
        """The dense run of a request, made now if it was not.

        Raises:
            ValueError: as `sparse_dit.eval.pair.run`.
            OSError: the folder cannot be written.
        """
        name = results.identity(model=self.model, device=str(self.pipe.device), **asking(self.pipe, request))
        if self._last is None or self._last[0] != name:
            self._last = name, self._read(name) or self._make(name, request)
        return self._last[1]

    def remove(self) -> None:
        """Deletes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self, name: str) -> Run | None:
        frames, told = self.folder / f"{name}.npy", self.folder / f"{name}.json"
        if not told.is_file():
            return None
        about = json.loads(told.read_text(encoding="utf-8"))
        return Run([np.load(frames)], about["seconds"], Summary(**about["summary"]))

    def _make(self, name: str, request: Request) -> Run:
        made = run(self.pipe, [request], load_recipe(DENSE), warm_up=not self.made)
        self.made += 1
        self.folder.mkdir(parents=True, exist_ok=True)
        write_stream(self.folder / f"{name}.npy", lambda stream: np.save(stream, made.frames[0]))
        # Written last: it tells that the frames are there.
        about = {"seconds": made.seconds, "summary": made.summary.to_dict()}
        write_file(self.folder / f"{name}.json", json.dumps(about).encode())
        return made
