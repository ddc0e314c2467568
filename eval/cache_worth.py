"""What each part of ours with a cache is worth, from the residual of DiTFastAttn on: one change at a time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from sparse_dit.eval.contenders import BLOCK, CACHE, growing, mixture, small
from sparse_dit.eval.results import Row
from sparse_dit.eval.settings import settings
from sparse_dit.recipe import Recipe

_DENSITY = 0.12  # of the table, without dense steps
_EVERY = 5


def recipes(steps: int, blocks: int) -> Iterator[Recipe]:
    """DiTFastAttn at density 0.12 with every fifth step whole, and variants of it and of ours with as many whole steps.

    Args:
        steps: denoising steps of a run.
        blocks: key blocks of a row.
    """
    theirs = small("ditfastattn", _DENSITY, 0, None)
    # Blocks of a row whose density is nearest to that of the band, which is cut at the ends of the sequence.
    kept, whole = 7, steps // _EVERY
    ours = mixture("hilbert-lse2-drop", kept / blocks, 0)
    gaps = {"schedule.refresh_steps": growing(whole, steps)}
    residual = {"name": "reuse", "ratio": False}
    yield _named(theirs, "band, residual, every fifth step whole (DiTFastAttn)", {})
    yield _named(theirs, "band, residual, growing gaps", gaps)
    yield _named(theirs, "band, summaries and residual, growing gaps", {**gaps, "skipped": CACHE})
    yield _named(ours, "chosen blocks, residual, growing gaps", {**gaps, "skipped": residual})
    yield _named(
        ours,
        "chosen blocks, summaries and residual, every fifth step whole",
        {"schedule.refresh_every": _EVERY, "skipped": CACHE},
    )
    yield _named(ours, "chosen blocks, summaries and residual, growing gaps (ours)", {**gaps, "skipped": CACHE})
    for part in (4, 8, 32):
        yield _named(ours, f"ours in parts of {part} tokens", {**gaps, "skipped": {**CACHE, "part": part}})
    budget = (whole + (steps - whole) * kept / blocks) / steps
    plain = mixture("hilbert-lse2-summary", round(budget * blocks) / blocks, 0)
    yield _named(plain, "ours without a cache, more blocks instead", {})


def _named(recipe: Recipe, name: str, changes: dict[str, Any]) -> Recipe:
    return recipe.override({"name": name, **changes})


def worth(rows: Sequence[Row]) -> str:
    """A line for each of `recipes`, in their order: run density, PSNR and SSIM over the clips.

    Args:
        rows: as `sparse_dit.eval.systems` writes them in its search; others are passed over.
    """
    names: dict[str, None] = {}
    if rows:
        blocks = -(-math.prod(rows[0]["grid"]) // BLOCK)
        names = dict.fromkeys(recipe.name for recipe in recipes(rows[0]["steps"], blocks))
    those = [row for row in rows if row["recipe"]["name"] in names]
    if not those:
        return "No rows yet."
    found = {setting.name: setting for setting in settings(those)}
    lines = ["| recipe | run density | PSNR, dB | worst clip | SSIM |", "| --- | ---: | ---: | ---: | ---: |"]
    for name in (name for name in names if name in found):
        density, psnr, ssim = (found[name].values(field) for field in ("run_density", "psnr", "ssim"))
        cells = f"{statistics.fmean(density):.2f} | {statistics.fmean(psnr):.1f} | {min(psnr):.1f}"
        lines.append(f"| {name} | {cells} | {statistics.fmean(ssim):.3f} |")
    return "\n".join(lines)
