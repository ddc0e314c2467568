"""What each part of a cache is worth: variants that compute as much, and a table in their order."""

from pathlib import Path

import pytest
import torch

from sparse_dit.eval.cache_worth import recipes, worth
from sparse_dit.eval.contest import NEAR
from sparse_dit.forecast import forecast, whole_steps
from sparse_dit.layout import TokenLayout
from sparse_dit.recipe import load_recipe

STEPS, BLOCKS = 20, 72
LAYOUT = TokenLayout((9, 16, 16))


def test_variants_compute_as_much_and_differ_by_one_choice() -> None:
    found = list(recipes(STEPS, BLOCKS))
    assert len({recipe.name for recipe in found}) == len(found)
    shape = (1, 4, LAYOUT.length, 64)
    for recipe in found:
        told = forecast(recipe, LAYOUT, layers=8, branches=2, shape=shape, dtype=torch.float32)
        whole = len(whole_steps(recipe, range(STEPS)))
        assert whole == (0 if "without a cache" in recipe.name else STEPS // 5)
        assert told.density is not None
        run_density = (whole + (STEPS - whole) * told.density) / STEPS
        assert run_density == pytest.approx(0.278, abs=NEAR)
    theirs, placed, *_ = found
    assert (theirs.selection, theirs.skipped) == (placed.selection, placed.skipped)
    assert theirs.schedule != placed.schedule


def test_lines_stand_in_the_order_of_the_variants_and_other_rows_are_passed_over() -> None:
    rows = [
        {
            "recipe": recipe.to_dict(),
            "steps": STEPS,
            "grid": list(LAYOUT.grid),
            "density": 0.1,
            "run_density": 0.28,
            "psnr": 30.0 + number + clip,
            "ssim": 0.9,
        }
        for number, recipe in enumerate(recipes(STEPS, BLOCKS))
        for clip in (0.0, 1.0)
    ]
    other = {**rows[0], "recipe": {**rows[0]["recipe"], "name": "radial"}}
    head, _, *lines = worth([other, *reversed(rows)]).splitlines()
    assert head == "| recipe | run density | PSNR, dB | worst clip | SSIM |"
    assert lines[0] == "| band, residual, every fifth step whole (DiTFastAttn) | 0.28 | 30.5 | 30.0 | 0.900 |"
    assert [line.split("|")[3].strip() for line in lines] == [f"{30.5 + number}" for number in range(len(lines))]
    assert worth([]) == "No rows yet."


# Grid of tokens, text behind it, layers, heads of 128, branches of guidance one after the other.
MODELS = {
    "Wan2.1-1.3B at 480p": ((21, 30, 52), 0, 30, 12, 2),
    "Wan2.1-14B at 720p": ((21, 45, 80), 0, 40, 40, 2),
    "HunyuanVideo at 720p": ((33, 45, 80), 256, 60, 24, 1),
}


def test_the_page_tells_what_the_preset_keeps_and_when_it_is_whole() -> None:
    page = " ".join((Path(__file__).parents[2] / "docs" / "systems.md").read_text(encoding="utf-8").split())
    preset = load_recipe("cached")
    kept: dict[int, list[str]] = {8: [], 1: []}
    for grid, text, layers, heads, branches in MODELS.values():
        layout = TokenLayout(grid, text_after=text)
        for part in kept:
            chosen = preset.override({"skipped.part": part})
            shape = (1, heads, layout.length, 128)
            told = forecast(chosen, layout, layers=layers, branches=branches, shape=shape, dtype=torch.bfloat16)
            kept[part].append(f"{told.kept_bytes / 2**30:.2g}")
    sizes = ", ".join(f"{size} GiB for {name}" for size, name in zip(kept[8], MODELS, strict=True))
    assert sizes.replace(", 5.4", " and 5.4") in page
    assert f"each token keeps its own, {kept[1][0]}, {kept[1][1]} and {kept[1][2]} GiB" in page
    whole = sorted(whole_steps(preset, range(50)))
    assert f"at steps {', '.join(map(str, whole[:-1]))} and {whole[-1]}, so that" in page
    assert f"run density of {(len(whole) + (50 - len(whole)) * 0.12) / 50:.2f}" in page
