"""One model and the rows it runs, one after the other, whatever becomes of each."""

import errno
import gc
import os
import struct
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sparse_dit.pipelines.batch.manifest import Item
from sparse_dit.pipelines.generate import Frames, call_arguments, generate, load_pipeline, write_video
from sparse_dit.pipelines.loggers import hush_imports

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Kind = Literal["done", "refused", "memory", "failed", "disk", "device", "model"]
"""How a row ended.

`done`; `refused`: the row itself is not valid; `memory`: it does not fit; `failed`: it failed as often as allowed.
The others are not about the row: `disk`: the worker cannot write; `device`: its accelerator is lost to the process;
`model`: it is not the run's, or cannot be loaded.
"""

STOPS = frozenset({"disk", "device", "model"})
"""Ends that every further row would share: the run stops."""

LONGEST_PAUSE = 60.0
_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO})
_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@dataclass(frozen=True)
class Job:
    """What all rows of a run share.

    Attributes:
        model: as `load_pipeline` takes it.
        identity: of the model, as `model_identity` tells it.
        suffix: of the videos, .mp4 or .webp.
        fps: frames a second of the videos.
        retries: how often a row is tried again after a failure that may pass.
        pause: seconds before the first retry; doubled before each further one, up to `LONGEST_PAUSE`.
        threads: CPU threads of a worker; `None` leaves them as they are.
        describe: device and dtype in the words of result rows.
    """

    model: str
    identity: str
    suffix: str = ".mp4"
    fps: int = 16
    retries: int = 2
    pause: float = 1.0
    threads: int | None = None
    describe: Callable[[Any, Any], Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        for name, value, least in (("fps", self.fps, 1), ("retries", self.retries, 0), ("threads", self.threads, 1)):
            if value is not None and value < least:
                raise ValueError(f"{name}: {value}; valid: a whole number from {least}")


@dataclass(frozen=True)
class Outcome:
    """What became of a row.

    Attributes:
        item: the row.
        kind: how it ended.
        attempts: how often it was tried.
        problem: why it is not done, in one line.
        video: the content of the video file, where it is done.
        measured: seconds, shape, density and device, for its result row.
    """

    item: Item
    kind: Kind
    attempts: int
    problem: str = ""
    video: bytes = b""
    measured: Mapping[str, Any] = field(default_factory=dict)


class Worker:
    """A loaded model that runs rows.

    Args:
        job: what all rows share.
        device: where the model runs, such as `cuda:1`.

    Raises:
        ValueError: as `load_pipeline`.
    """

    def __init__(self, job: Job, device: str) -> None:
        hush_imports()
        import diffusers
        import torch
        import transformers

        if job.threads is not None:
            torch.set_num_threads(job.threads)
        if device.startswith("cuda:"):
            torch.cuda.set_device(device)  # Triton launches on the current device, wherever the tensors are
        # The bar of the whole run is the only one.
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        self.job = job
        self.pipe: DiffusionPipeline = load_pipeline(job.model, device)
        self.pipe.set_progress_bar_config(disable=True)

    def run(self, item: Item) -> Outcome:
        """Runs a row, again after a pause where its failure may pass; never raises an `Exception`."""
        attempt = 0
        while True:
            attempt += 1
            try:
                return self._make(item, attempt)
            except Exception as error:  # a row must not end the run
                kind, problem = kind_of(error), " ".join(str(error).split()) or type(error).__name__
            # Here the error is gone, and with it the frames of its traceback that hold tensors.
            free_memory()
            if kind != "failed" or attempt > self.job.retries:
                return Outcome(item, kind, attempt, problem)
            time.sleep(min(self.job.pause * 2 ** (attempt - 1), LONGEST_PAUSE))

    def _make(self, item: Item, attempt: int) -> Outcome:
        from sparse_dit.pipelines.patch import enable, summary

        # Enabled for each row anew: nothing of a row before it can be left, so rows do not depend on their order.
        enable(self.pipe, item.recipe)
        start = time.perf_counter()
        frames = generate(self.pipe, item.request)
        seconds = time.perf_counter() - start
        done = summary(self.pipe)
        asked = call_arguments(self.pipe, item.request)
        measured = {
            **{name: value for name, value in asked.items() if name not in ("prompt", "num_inference_steps")},
            "steps": asked.get("num_inference_steps"),
            "frames": list(frames.shape),
            "seconds": seconds,
            "density": done.density,
            "run_density": done.run_density,
            "calls": {"planned": done.planned, "made": done.made, "sparse": done.sparse, "dense": done.dense},
            "backend": done.backend,
        }
        if self.job.describe is not None:
            measured["device"] = dict(self.job.describe(self.pipe.device, self.pipe.transformer.dtype))
        return Outcome(item, "done", attempt, video=self.encode(frames), measured=measured)

    def encode(self, frames: Frames) -> bytes:
        """The content of the video file of a row's frames."""
        with tempfile.TemporaryDirectory(prefix="sparse-dit-") as folder:
            file = Path(folder) / f"video{self.job.suffix}"
            write_video(frames, file, self.job.fps)
            video = file.read_bytes()
        check_whole(video, self.job.suffix)
        return video


def kind_of(error: Exception) -> Kind:
    """What an error says about its row: `failed` is one that may pass."""
    import torch

    text = str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in text.lower() for sign in _MEMORY):
        return "memory"
    if isinstance(error, OSError) and error.errno in _DISK:
        return "disk"
    # After such an error every call of the process fails: the CUDA context is gone.
    if isinstance(error, RuntimeError) and "CUDA error" in text:
        return "device"
    return "refused" if isinstance(error, ValueError | TypeError | NotImplementedError) else "failed"


def first_line(error: BaseException) -> str:
    """The first line of an error that says something, else its name."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def free_memory() -> None:
    """Gives back what a failed row held: reference cycles, and the device's cached blocks."""
    import torch

    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def check_whole(video: bytes, suffix: str) -> None:
    """Holds a video file against the lengths that it tells of itself: an encoder may fail without saying so.

    Args:
        video: content of the file.
        suffix: .mp4 (ISO 14496-12 boxes) or .webp (RIFF).

    Raises:
        OSError: it ends too early, or an mp4 lacks its index or its frames.
    """
    boxes: set[bytes] = set()
    position = 0
    if suffix == ".webp":
        whole = video[:4] == b"RIFF" and len(video) >= 12 and struct.unpack("<I", video[4:8])[0] + 8 == len(video)
    else:
        while position + 8 <= len(video):
            size, name = struct.unpack(">I4s", video[position : position + 8])
            if size == 1:  # the length of a large box stands in the 8 bytes behind its name
                size = int.from_bytes(video[position + 8 : position + 16], "big")
            if size < 8:
                break
            boxes.add(name)
            position += size
        whole = position == len(video) and {b"moov", b"mdat"} <= boxes
    if not whole:
        told = f"the encoder left a torn {suffix} file of {len(video)} bytes; is {tempfile.gettempdir()} full?"
        raise OSError(errno.EIO, told)


def leave_process(outcome: Outcome) -> None:
    """Ends this process at once if its device is lost, so that whoever watches over it starts a new one."""
    if outcome.kind == "device":
        print(f"sparse-dit: row {outcome.item.line}: {outcome.problem}", flush=True)
        os._exit(1)
