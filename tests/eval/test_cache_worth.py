"""What each part of a cache is worth: variants that compute as much, and a table in their order."""

import pytest
import torch

from sparse_dit.eval.cache_worth import recipes, worth
from sparse_dit.eval.contest import NEAR
from sparse_dit.forecast import forecast, whole_steps
from sparse_dit.layout import TokenLayout

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
