"""Progress of a pipeline call as its own bar tells it, and a way to end the call."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from sparse_dit.app.demo.visits import Stopped
from sparse_dit.pipelines.transformers import transformers_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Tell = Callable[[str, int, int], None]
"""Called with what runs (the bar's description), steps done and steps in all. Calls that warm up have no steps."""


@contextmanager
def watched(pipe: DiffusionPipeline, tell: Tell, stop: threading.Event) -> Iterator[None]:
    """Tells of every step that the pipeline makes inside the block, and ends it before the next forward after `stop`.

    The bar stands in for the pipeline's own one on this instance, so that every family and every caller of the pipeline
    is seen, whether or not it passes callbacks on.

    Args:
        pipe: any diffusers pipeline.
        tell: see `Tell`.
        stop: set it, from any thread, to end the call.

    Raises:
        Stopped: inside the block, once `stop` is set.
    """

    def go_on(*_: Any) -> None:
        if stop.is_set():
            raise Stopped

    def bar(iterable: Any = None, total: int | None = None) -> tqdm[Any]:
        settings = getattr(pipe, "_progress_bar_config", {})
        if settings.get("disable"):
            tell("warming up", 0, 0)
            return tqdm(iterable, total=total, disable=True)
        return _Bar(iterable, total, settings.get("desc") or "steps", tell)

    with ExitStack() as stack:
        for transformer in transformers_of(pipe).values():
            stack.callback(transformer.register_forward_pre_hook(go_on).remove)
        before = vars(pipe).get("progress_bar")
        pipe.progress_bar = bar
        stack.callback(_put_back, pipe, before)
        go_on()
        yield


class _Bar(tqdm):  # type: ignore[misc]
    """Counts as tqdm does and tells instead of printing."""

    def __init__(self, iterable: Any, total: int | None, desc: str, tell: Tell) -> None:
        self.tell = tell
        super().__init__(iterable, total=total, desc=desc, file=io.StringIO(), leave=False)
        tell(desc, 0, self.total or 0)

    def update(self, n: float | None = 1) -> bool | None:
        shown: bool | None = super().update(n)
        self.tell(self.desc.removesuffix(": "), int(self.n), self.total or 0)
        return shown


def _put_back(pipe: DiffusionPipeline, before: Any) -> None:
    if before is None:
        del pipe.progress_bar
    else:
        pipe.progress_bar = before
