"""Scores that VBench wrote, joined to result rows; VBench itself is run apart, on the videos.

VBench (Huang et al. 2024) leaves a file NAME_eval_results.json: each dimension with its mean and a list of videos, as
`{"subject_consistency": [0.97, [{"video_path": "out/a.mp4", "video_results": 0.98}, ...]], ...}`.
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
"""By file name of a video, then by dimension."""


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
        if not (isinstance(found, list) and len(found) == 2 and isinstance(found[1], list)):
            raise ValueError(f"vbench: {dimension!r} in {str(path)!r}; valid: [mean, [videos]]")
        for entry in found[1]:
            name, score = _entry(entry)
            if name is None or score is None:
                raise ValueError(f"vbench: {entry!r} of {dimension!r} in {str(path)!r}; valid: video_path and a number")
            scores[name][dimension] = score
    return scores


def _entry(entry: Any) -> tuple[str | None, float | None]:
    """File name and score of a video; yes-or-no dimensions count as 1 and 0."""
    if not isinstance(entry, Mapping):
        return None, None
    name, score = entry.get("video_path"), entry.get("video_results")
    number = float(score) if isinstance(score, bool | int | float) and math.isfinite(score) else None
    return (Path(name).name if isinstance(name, str) else None), number


def join(rows: Sequence[Row], files: Sequence[Scores]) -> tuple[list[Row], list[str]]:
    """Rows with their scores in a field `vbench`.

    A row's video is its `file`, as batches have it, or PROMPT-SEED.mp4, as VBench wants videos to be called.

    Returns:
        All rows, and a line of complaint for each video that belongs to none.
    """
    together: dict[str, dict[str, float]] = defaultdict(dict)
    for file in files:
        for name, scores in file.items():
            together[name] |= scores
    joined, used = [], set()
    for row in rows:
        names = [str(row.get("file", "")), f"{row.get('prompt')}-{row.get('seed')}.mp4"]
        video = next((name for name in names if name in together), None)
        joined.append(row if video is None else {**row, "vbench": dict(together[video])})
        used.add(video)
    return joined, [f"vbench: {name!r} is the video of no row" for name in together if name not in used]
