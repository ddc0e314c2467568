"""`sparse-dit demo`: starts the page, and cleans up behind it."""

import logging
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from sparse_dit.app.demo.actions import Studio
    from sparse_dit.app.demo.visits import Visits

MODELS = ["tiny-wan"]
LOCAL = "127.0.0.1"


def demo(
    models: list[str] = MODELS,
    host: str = LOCAL,
    port: int = 7860,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    max_steps: int = 50,
    max_pixels: int = 2**22,
    places: int = 8,
) -> None:
    """Serve a web page that compares dense and sparse.

    Args:
        models: what visitors may choose from: tiny-wan, folders in diffusers' save format, Hub ids owner/name.
        host: address to listen on; anything but this machine's own is open to others.
        port: to listen on; 0 takes a free one.
        device: where to run; auto is CUDA where there is one.
        max_steps: denoising steps that a run may have.
        max_pixels: width x height x frames that a run may have.
        places: runs in line at once; others are asked to come back.
    """
    from sparse_dit.app.demo.limits import Limits, allowed_models

    if not 0 <= port < 2**16:
        raise ValueError(f"port: {port}; valid: 0 to {2**16 - 1}")
    if places < 1:
        raise ValueError(f"places: {places}; valid: a whole number from 1")
    limits = Limits(steps=max_steps, pixels=max_pixels)
    allowed = allowed_models(models)
    root = Path(tempfile.mkdtemp(prefix="sparse-dit-demo-"))
    # Read by Gradio and the Hub's client when they are imported.
    os.environ.update(
        GRADIO_TEMP_DIR=str(root / "cache"), GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1"
    )
    try:
        import gradio  # noqa: F401
    except ImportError:
        root.rmdir()
        raise ValueError("demo: gradio is not installed; valid: pip install 'sparse-dit[demo]'") from None

    import torch

    from sparse_dit.app.demo.actions import Studio
    from sparse_dit.app.demo.visits import Visits

    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    studio = Studio(allowed, limits, chosen)
    signal.signal(signal.SIGTERM, _leave)
    with listening(studio, Visits(root), host, port, places) as url:
        print(f"sparse-dit demo: {url} (stop with Ctrl-C)", flush=True)
        threading.Thread(target=_load_first, args=(studio,), daemon=True).start()
        threading.Event().wait()


@contextmanager
def listening(studio: "Studio", visits: "Visits", host: str, port: int, places: int) -> Iterator[str]:
    """Serves the page inside the block, and closes all visits behind it.

    Args:
        studio: makes the runs.
        visits: none yet; files below their root are served, and no others.
        host: address to listen on.
        port: to listen on; 0 takes a free one.
        places: runs in line at once.

    Yields:
        The page's address, ending in a slash.

    Raises:
        ValueError: the port is taken, or the address is not this machine's.
    """
    import gradio

    from sparse_dit.app.demo import style
    from sparse_dit.app.demo.answers import Answers
    from sparse_dit.app.demo.page import build
    from sparse_dit.app.demo.visits import MAX_VISITS

    gradio.set_static_paths([visits.root])  # files of visits are served where they lie, instead of being copied
    page = build(Answers(studio, visits, places)).queue(max_size=4 * places, default_concurrency_limit=1)
    try:
        try:
            _, url, _ = page.launch(
                server_name=host, server_port=port or None, share=False, quiet=True, prevent_thread_lock=True,
                theme=style.theme(), css=style.CSS, footer_links=["settings"], ssr_mode=False, max_file_size="1kb",
                pwa=False, mcp_server=False, run_history=False, enable_monitoring=False,
                state_session_capacity=2 * MAX_VISITS,
            )  # fmt: skip
        except OSError:
            raise ValueError(
                f"port: {port} of {host!r} cannot be had; valid: a free port, or 0, and an address of this machine"
            ) from None
        yield url
    finally:
        visits.close_all()
        page.close()


def _load_first(studio: "Studio") -> None:
    """Has the first model ready before the first visitor asks."""
    try:
        studio.load(next(iter(studio.models)))
    except ValueError:
        logging.getLogger(__name__).exception("the first model was not loaded")


def _leave(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
