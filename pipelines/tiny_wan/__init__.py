"""tiny-wan: a small `WanPipeline`, trained from scratch on procedural video, that ships with the project.

`model/` holds it in diffusers' own save format; the other modules make its videos, train it and judge it.
"""

from pathlib import Path
from typing import Any

MODEL_DIR = Path(__file__).parent / "model"

#: What `WanPipeline.__call__` is given when the caller names no size; the size the model was trained at.
DEFAULTS: dict[str, Any] = {
    "height": 128,
    "width": 128,
    "num_frames": 33,
    "num_inference_steps": 20,
    "guidance_scale": 4.0,
}
