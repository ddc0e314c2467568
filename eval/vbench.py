"""Scores that VBench wrote, joined to result rows; VBench itself is run apart, on the videos.

VBench (Huang et al. 2024, arXiv:2311.17982) leaves a file NAME_eval_results.json: each dimension with its mean and, at
the end, a list of videos, such as `"scene": [0.4, [{"video_path": "out/a.mp4", "video_results": 0.5}, ...]]`. What
differs from that in version 0.1.5, told by its code:

- entries have further fields, by dimension (`frame_results`, `success_frame_count`, ...);
- `dynamic_degree` and `human_action` are true or false, and `imaging_quality` of a video is 0 to 100 (its mean 0 to 1);
- long videos have a list of their clips before that of videos, image-to-video camera motion a mean by kind of motion;
- the list of long videos may end with their number instead of a video;
- frames read from files have as path the folder of frames, named as the video, without ending, spaces as underscores.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparse_dit.eval.results import Row

Scores = Mapping[str, Mapping[str, float]]
"""By name of a video, see `video_name`, then by dimension; all from 0 to 1."""

_SCALES = {"imaging_quality": 100.0}
_ENDINGS = (".mp4", ".gif", ".jpg", ".png")
_VALID = "[mean, [videos]]"


def load_scores(path: Path) -> Scores:
    """The scores in a file of VBench.

    Raises:
        ValueError: no such file, or one of another form; names what is wrong.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"vbench: cannot read {str(path)!r} ({type(error).__name__}); valid: JSON of VBench") from None
    if not isinstance(content, dict) or not content:
        raise ValueError(f"vbench: {str(path)!r} holds no dimensions; valid: a file NAME_eval_results.json of VBench")
    scores: dict[str, dict[str, float]] = defaultdict(dict)
    for dimension, found in content.items():
        if not (isinstance(found, list) and len(found) in (2, 3) and isinstance(found[-1], list)):
            raise ValueError(f"vbench: {dimension!r} in {str(path)!r}; valid: {_VALID}")
        for entry in found[-1]:
            if isinstance(entry, Mapping) and set(entry) == {"long_video_cnt"}:
                continue
            name, score = _entry(entry)
            if name is None or score is None:
                raise ValueError(f"vbench: {entry!r} of {dimension!r} in {str(path)!r}; valid: video_path and a number")
            scores[name][dimension] = score / _SCALES.get(dimension, 1.0)
    return scores


def video_name(path: str) -> str:
    """What a video is called wherever it lies and however VBench read it: no folder, no ending, no spaces."""
    name = Path(path).name
    ending = next((ending for ending in _ENDINGS if name.lower().endswith(ending)), "")
    return name.removesuffix(name[len(name) - len(ending) :]).replace(" ", "_")


def _entry(entry: Any) -> tuple[str | None, float | None]:
    """Name and score of a video; yes-or-no dimensions count as 1 and 0."""
    if not isinstance(entry, Mapping):
        return None, None
    name, score = entry.get("video_path"), entry.get("video_results")
    number = float(score) if isinstance(score, bool | int | float) and math.isfinite(score) else None
    return (video_name(name) if isinstance(name, str) else None), number


def join(rows: Sequence[Row], files: Sequence[Scores]) -> tuple[list[Row], list[str]]:
    """Rows with their scores in a field `vbench`.

    A row's video is its `file`, as batches have it, or PROMPT-SEED.mp4: VBench wants PROMPT-0.mp4 to PROMPT-4.mp4.

    Returns:
        All rows, and a line of complaint for each video that belongs to none.
    """
    together: dict[str, dict[str, float]] = defaultdict(dict)
    for file in files:
        for name, scores in file.items():
            together[name] |= scores
    joined, used = [], set()
    for row in rows:
        names = [video_name(str(row.get("file", ""))), video_name(f"{row.get('prompt')}-{row.get('seed')}.mp4")]
        video = next((name for name in names if name in together), None)
        joined.append(row if video is None else {**row, "vbench": dict(together[video])})
        used.add(video)
    return joined, [f"vbench: {name!r} is the video of no row" for name in together if name not in used]
