"""What choosing costs, dry on a CPU: every system runs in a tiny shape, and rows add up."""

from pathlib import Path

import pytest
import torch

from sparse_dit.eval.bench.cases import Shape
from sparse_dit.eval.bench.clock import Call, Timing
from sparse_dit.eval.bench.systems import PARTS, SYSTEMS, Overhead, line, overhead, rows
from sparse_dit.eval.results import append_row, load_rows
from sparse_dit.layout import TokenLayout
from sparse_dit.recipe import load_recipe
from sparse_dit.selection import Dynamic

CPU = torch.device("cpu")
SHAPE = Shape(heads=2, tokens=5 * 10 * 9, head_size=64)
GRID = (5, 10, 9)


class CountingClock:
    """Runs every call once and says that it took a millisecond."""

    def measure(self, call: Call) -> Timing:
        call(0)
        return Timing(1.0, 1)

    def copy_rate(self) -> float:
        return 4.0

    def alive(self) -> bool:
        return True

    def input_sets(self, size: int) -> int:
        return 1


def test_every_system_gives_a_row_with_its_share(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    for row in rows(SYSTEMS, [SHAPE], CountingClock(), CPU, torch.float32, "command", {SHAPE.tokens: GRID}):
        append_row(file, row)
        assert row["system"] in line(row)
    found = {row["system"]: row for row in load_rows(file)}
    assert set(found) == set(SYSTEMS)
    assert [row["reason"] for row in found.values()] == [None] * len(SYSTEMS)
    for name, row in found.items():
        assert row["share"] == row["call_ms"] / row["dense_ms"]
        assert {f"{part}_ms" for part in PARTS} <= row.keys(), name
    # Ours: judged and ordered in every call at once, nothing searched. SVG orders by what it has chosen.
    # AdaSpa: recalled between two searches of 40 steps.
    assert (found["quality"]["choose_ms"], found["quality"]["order_ms"], found["quality"]["searches"]) == (0, 1, 0)
    assert (found["svg"]["choose_ms"], found["svg"]["order_ms"], found["svg"]["call_ms"]) == (1, 1, 2)
    ada = found["adaspa"]
    assert (ada["recall_ms"], ada["choose_ms"], ada["order_ms"], ada["searches"]) == (1, 0, 0, 2)
    assert ada["search_share"] == pytest.approx(2 / 40)
    # SVG2 clusters in each of its 40 sparse steps.
    assert (found["svg2"]["searches"], found["svg2"]["search_share"]) == (40, 1.0)


def test_every_shipped_preset_that_looks_at_content_without_a_profile_is_measured() -> None:
    from sparse_dit.recipe import recipe_names

    recipes = {name: load_recipe(name) for name in recipe_names()}
    dynamic = {name for name, recipe in recipes.items() if isinstance(recipe.selection, Dynamic)}
    profiled = {"paro", "sparse-vdit", "sta-search"}
    variants = {"draft-hunyuan", "svg-hunyuan"}
    assert dynamic - profiled - variants == set(SYSTEMS)


def test_a_call_between_refreshes_costs_what_it_recalls() -> None:
    found = Overhead(5.0, 1.0, 2.0, 3.0, 4.0, searches=3, sparse_calls=10, keeps=True)
    assert (found.call, found.searching) == (3.0, 1.0)


def test_static_selections_and_unknown_grids_are_refused() -> None:
    q = torch.zeros(1, 2, SHAPE.tokens, 64)
    with pytest.raises(ValueError, match="systems: 'radial' has a static selection"):
        overhead(load_recipe("radial"), TokenLayout(GRID), (q, q, q), CountingClock())
    with pytest.raises(ValueError, match="shapes: 2x450x64; valid: tokens of 32760"):
        next(rows(["sol"], [SHAPE], CountingClock(), CPU, torch.float32, "", {32760: (21, 30, 52)}))


def test_what_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparse_dit.eval.bench.systems.overhead", lambda *_: 1 / 0)
    [row] = rows(["sol"], [SHAPE], CountingClock(), CPU, torch.float32, "", {SHAPE.tokens: GRID})
    assert (row["share"], row["reason"]) == (None, "division by zero")
    assert "division by zero" in line(row)
