"""Sparse calls over the steps of a run: refreshes, what is kept between them, branches, grids, and their forecast."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sparse_dit.calls import _read_again, attend, plan
from sparse_dit.engine import HEADS_FIRST, Run
from sparse_dit.forecast import forecast, whole_steps
from sparse_dit.layout import TokenLayout
from sparse_dit.orders import Axes, Hilbert, Rows, Tiles, TimeMajor
from sparse_dit.recipe import Recipe, load_recipe
from sparse_dit.schedule import Schedule
from sparse_dit.selection import Band, Every, Gate, HeadTypes, Mass, Pooled, Radial, Window
from sparse_dit.skipped import SKIPPED, Reuse
from sparse_dit.state import Context, Slot

LAYOUT = TokenLayout((3, 6, 10), text_before=3, text_after=11)
OTHER = TokenLayout((5, 6, 6), text_before=3, text_after=11)
LAYERS = 2


def qkv(layout: TokenLayout = LAYOUT, seed: int = 0, batch: int = 1) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, batch, 2, layout.length, 64, generator=generator)
    return 3 * q, k, v


def recipe(selection: Any, **choices: Any) -> Recipe:
    return Recipe(**{"selection": selection, "block_q": 16, "block_k": 16, **choices})


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def rounding(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> float:
    """As `rounding` of test_engine: bound on the difference of two fp32 evaluations of attention."""
    eps = torch.finfo(torch.float32).eps
    score = eps * q.shape[-1] ** 0.5 * float(q.norm(dim=-1).max() * k.norm(dim=-1).max())
    return 2 * (2 * score + q.shape[2] * eps) * float(v.abs().max())


def one_call(chosen: Recipe, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, step: int, slot: Slot) -> Any:
    return attend(chosen, LAYOUT, q, k, v, scale=None, layer=0, step=step, slot=slot)


DYNAMIC = [
    Pooled(density=0.3),
    Pooled(density=0.3, per="head"),
    Pooled(top_p=0.5),
    Pooled(tau=0.5),
    Mass(density=0.3),
    Gate(threshold=0.6, spans=3, tiles=(2, 2), cuboids=(2, 2, 2)),
    HeadTypes(kept=0.3, rows=16),
]
names = [f"{type(selection).__name__}-{number}" for number, selection in enumerate(DYNAMIC)]
ORDERS = [Rows(), TimeMajor(), Tiles((1, 3, 4)), Hilbert(), Axes(("hwt", "wth"))]
# Some bring their own orders.
ORDERED = [(one, order) for one in DYNAMIC for order in (ORDERS if one.orders(LAYOUT, 0) is None else ORDERS[:1])]


@pytest.mark.parametrize("selection", DYNAMIC, ids=names)
def test_between_refreshes_the_same_blocks_are_computed_whatever_q_and_k_are(selection: Any) -> None:
    chosen = recipe(selection, schedule=Schedule(refresh_every=3))
    slot = Slot()
    refreshed = one_call(chosen, *qkv(), step=4, slot=slot)
    kept = {name: tensor.clone() for name, tensor in slot.items()}
    repeated = one_call(chosen, *qkv(), step=5, slot=slot)
    if not refreshed.whole:
        assert torch.equal(repeated.out, refreshed.out)
        assert float(repeated.density) == float(refreshed.density)
    later = one_call(chosen, *qkv(seed=1), step=6, slot=slot)
    assert float(later.density) == float(repeated.density)
    assert slot.refreshed == 4
    assert all(torch.equal(slot[name], kept[name]) for name in kept)
    anew = one_call(chosen, *qkv(seed=1), step=7, slot=slot)
    assert slot.refreshed == 7
    assert not anew.whole
    assert not torch.equal(anew.out, later.out) or isinstance(selection, HeadTypes)


@pytest.mark.parametrize(("selection", "order"), ORDERED)
def test_text_is_exact_with_every_dynamic_selection_and_order(selection: Any, order: Any) -> None:
    q, k, v = qkv()
    chosen = recipe(selection, order=order)
    slot = Slot()
    if isinstance(selection, Mass):
        assert one_call(chosen, q, k, v, step=0, slot=slot).whole
    out = one_call(chosen, q, k, v, step=1, slot=slot)
    assert not out.whole
    assert 0.1 < float(out.density) < 1.0
    difference = (out.out - dense(q, k, v)).abs()
    assert difference[:, :, [*range(3), *range(183, 194)]].max() <= rounding(q, k, v)
    assert difference.max() > 1e-3


def test_the_first_search_of_mass_is_whole_and_later_ones_use_its_lse() -> None:
    chosen = recipe(Mass(density=0.3), schedule=Schedule(refresh_steps=(2,)))
    slot = Slot()
    q, k, v = qkv()
    first = one_call(chosen, q, k, v, step=0, slot=slot)
    assert first.whole
    assert (first.out - dense(q, k, v)).abs().max() <= rounding(q, k, v)
    lse = slot["lse"].clone()
    scores = (64**-0.5 * q.double() @ k.double().mT).logsumexp(dim=-1)
    assert torch.allclose(lse.double(), scores, atol=1e-4)
    blocks = slot["blocks"].clone()
    between = one_call(chosen, *qkv(seed=1), step=1, slot=slot)
    assert not between.whole
    second = one_call(chosen, *qkv(seed=1), step=2, slot=slot)
    assert not second.whole
    assert torch.equal(slot["lse"], lse)
    assert not torch.equal(slot["blocks"], blocks)


@pytest.mark.parametrize(
    "selection", [Radial(density=0.5), Window(density=0.4), Pooled(density=0.3), Mass(density=0.3)]
)
@pytest.mark.parametrize("reuse", [Reuse(), Reuse(ratio=False), Reuse(ratio=False, summary=True)])
def test_reuse_is_whole_at_a_refresh_and_repeats_it_right_after(selection: Any, reuse: Reuse) -> None:
    chosen = recipe(selection, skipped=reuse, schedule=Schedule(refresh_every=4))
    q, k, v = qkv()
    slot = Slot()
    refreshed = one_call(chosen, q, k, v, step=3, slot=slot)
    assert refreshed.whole
    assert (refreshed.out - dense(q, k, v)).abs().max() <= rounding(q, k, v)
    after = one_call(chosen, q, k, v, step=4, slot=slot)
    assert not after.whole
    assert float(after.density) < 1.0
    # Subtracting and adding the residual: a few roundings of numbers up to the largest value.
    assert (after.out - refreshed.out).abs().max() <= rounding(q, k, v)
    assert one_call(chosen, q, k, v, step=7, slot=slot).whole


@pytest.mark.parametrize("order", [Rows(), Hilbert()])
@pytest.mark.parametrize("skipped", ["drop", "summary"])
def test_what_skipped_blocks_add_is_kept_behind_summaries_and_by_parts(order: Any, skipped: str) -> None:
    part = 6
    kept = Reuse(ratio=False, summary=skipped == "summary", part=part)
    chosen = recipe(Pooled(density=0.3), order=order, skipped=kept, schedule=Schedule(refresh_every=4))
    plain = recipe(Pooled(density=0.3), order=order, skipped=SKIPPED[skipped]())
    slot = Slot()
    q, k, v = qkv()
    whole = one_call(chosen, q, k, v, step=0, slot=slot).out
    later = one_call(chosen, q, k, v, step=1, slot=slot)
    alone = one_call(plain, q, k, v, step=0, slot=Slot()).out
    table = order.table(LAYOUT, q.shape[1])
    table = torch.arange(LAYOUT.length) if table is None else table[0]
    missing = (later.out - alone)[:, :, table]
    for first in range(0, LAYOUT.length, part):
        run = (whole - alone)[:, :, table[first : first + part]].mean(dim=2, keepdim=True)
        assert torch.allclose(
            missing[:, :, first : first + part], run.expand_as(missing[:, :, first : first + part]), atol=1e-5
        )
    assert (later.out - whole).norm() < (alone - whole).norm()


def no_dense() -> torch.Tensor:
    raise AssertionError("nothing is dense here")


def steps_of(run: Run, branches: list[str], inputs: Callable[[str, int], Any], layout: TokenLayout, steps: int) -> Any:
    outs = {}
    for step in range(steps):
        for branch in branches:
            run.state.context = Context(branch, step)
            run.begin_forward(layout, torch.tensor(1.0 - step / steps), planned=LAYERS, transformer=1)
            for layer in range(LAYERS):
                q, k, v = inputs(branch, layer + 10 * step)
                outs[branch, step, layer] = run.call(
                    layer, q, k, v, axes=HEADS_FIRST, scale=None, refusal=None, dense=no_dense
                )
            run.end_forward()
    return outs


STATEFUL = [
    recipe(Mass(density=0.3), schedule=Schedule(refresh_every=2)),
    recipe(Mass(density=0.3), order=Hilbert(), schedule=Schedule(refresh_steps=(2,))),
    recipe(Pooled(density=0.3), schedule=Schedule(refresh_every=2), skipped=Reuse()),
    recipe(Pooled(tau=0.5), schedule=Schedule(refresh_every=2)),
    recipe(
        Pooled(density=0.3),
        order=Hilbert(),
        schedule=Schedule(refresh_every=2, refresh_growth=1),
        skipped=Reuse(ratio=False, summary=True, part=8),
    ),
]


@pytest.mark.parametrize("chosen", STATEFUL)
def test_branches_one_after_the_other_or_in_one_batch_come_to_the_same(chosen: Recipe) -> None:
    def apart(branch: str, seed: int) -> tuple[torch.Tensor, ...]:
        return qkv(seed=seed + (500 if branch == "uncond" else 0))

    def together(branch: str, seed: int) -> list[torch.Tensor]:
        return [torch.cat(pair) for pair in zip(apart("cond", seed), apart("uncond", seed), strict=True)]

    sequential = steps_of(Run(chosen), ["cond", "uncond"], apart, LAYOUT, 4)
    alone = steps_of(Run(chosen), ["uncond"], apart, LAYOUT, 4)
    batched = steps_of(Run(chosen), ["cond_uncond"], together, LAYOUT, 4)
    for step in range(4):
        for layer in range(LAYERS):
            both = torch.cat([sequential[branch, step, layer] for branch in ("cond", "uncond")])
            assert torch.equal(both[1:], alone["uncond", step, layer])
            assert torch.allclose(both, batched["cond_uncond", step, layer], atol=1e-4)


@pytest.mark.parametrize("chosen", STATEFUL)
def test_a_new_run_and_a_new_grid_start_from_nothing(chosen: Recipe) -> None:
    def inputs(layout: TokenLayout) -> Callable[[str, int], tuple[torch.Tensor, ...]]:
        return lambda branch, seed: qkv(layout, seed)

    run = Run(chosen)
    first = steps_of(run, ["cond"], inputs(LAYOUT), LAYOUT, 3)
    other = steps_of(run, ["cond"], inputs(OTHER), OTHER, 3)
    again = steps_of(run, ["cond"], inputs(LAYOUT), LAYOUT, 3)
    expected = steps_of(Run(chosen), ["cond"], inputs(OTHER), OTHER, 3)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert all(torch.equal(other[key], expected[key]) for key in other)


def test_another_batch_size_starts_from_nothing() -> None:
    run = Run(STATEFUL[0])
    run.state.context = Context("cond", 0)
    for batch in (1, 3):
        run.begin_forward(LAYOUT, torch.tensor(0.5), planned=1)
        q, k, v = qkv(batch=batch)
        out = run.call(0, q, k, v, axes=HEADS_FIRST, scale=None, refusal=None, dense=no_dense)
        assert (out - dense(q, k, v)).abs().max() <= rounding(q, k, v)


def test_a_copied_run_keeps_nothing_of_the_other() -> None:
    run = Run(STATEFUL[0])
    steps_of(run, ["cond"], lambda branch, seed: qkv(seed=seed), LAYOUT, 2)
    assert run.state.nbytes > 0
    twin = copy.deepcopy(run)
    assert twin.state.nbytes == 0
    assert twin.recipe == run.recipe


def test_refreshes_are_counted_apart_from_sparse_calls() -> None:
    run = Run(STATEFUL[2])
    steps_of(run, ["cond"], lambda branch, seed: qkv(seed=seed), LAYOUT, 4)
    summary = run.tally.summary()
    assert summary.dense == {"refresh": 2 * LAYERS}
    assert summary.sparse == 2 * LAYERS
    assert summary.backend == "host"
    assert summary.density is not None
    assert 0.3 < summary.density < 0.6
    assert summary.run_density == pytest.approx(0.5 + 0.5 * summary.density)


def test_the_plan_of_a_dynamic_recipe_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^recipe: the selection of 'custom' depends on the content; valid: "):
        plan(recipe(Pooled()), LAYOUT, torch.device("cpu"))


KEEPING = [*STATEFUL, recipe(HeadTypes(rows=8), schedule=Schedule(refresh_every=2)), recipe(Pooled()), recipe(Radial())]


@pytest.mark.parametrize("chosen", KEEPING)
def test_the_forecast_of_what_is_kept_is_what_is_kept(chosen: Recipe) -> None:
    run = Run(chosen)
    steps_of(run, ["cond", "uncond"], lambda branch, seed: qkv(seed=seed, batch=2), LAYOUT, 2)
    told = forecast(chosen, LAYOUT, layers=LAYERS, branches=2, shape=(2, 2, LAYOUT.length, 64), dtype=torch.float32)
    assert told.kept_bytes == run.state.nbytes


@pytest.mark.parametrize(
    "selection",
    [Pooled(density=0.3), Mass(density=0.3, adaptive=False), HeadTypes(rows=8), Radial(), Band(), Window(density=0.4)],
)
def test_the_forecast_of_the_density_is_the_density(selection: Any) -> None:
    layout = TokenLayout((4, 8, 8), text_after=16)  # whole blocks only
    chosen = recipe(selection)
    told = forecast(chosen, layout, layers=1, branches=1, shape=(1, 2, layout.length, 64), dtype=torch.float32)
    slot = Slot()
    out = [attend(chosen, layout, *qkv(layout), scale=None, layer=0, step=step, slot=slot) for step in range(2)]
    assert told.density == pytest.approx(float(out[1].density))


@pytest.mark.parametrize("chosen", KEEPING)
def test_the_steps_that_will_be_whole_are_those_that_are(chosen: Recipe) -> None:
    run = Run(chosen)
    steps_of(run, ["cond"], lambda branch, seed: qkv(seed=seed), LAYOUT, 5)
    refreshed = run.tally.summary().dense.get("refresh", 0)
    assert refreshed == LAYERS * len(whole_steps(chosen, range(5)))


def test_published_schedules_have_the_whole_steps_that_the_papers_count() -> None:
    # Re-ttention: "22 of 50 steps still run full attention", 15 of them dense. AdaSpa: only its first search is.
    assert whole_steps(load_recipe("re-ttention"), range(15, 50)) == {15, 20, 25, 30, 35, 40, 45}
    assert whole_steps(load_recipe("adaspa"), range(10, 50)) == {10}


@pytest.mark.parametrize("selection", [Pooled(tau=1.0), Pooled(top_p=0.9), Pooled(similarity=0.5), Gate()])
def test_no_density_is_told_where_the_content_decides(selection: Any) -> None:
    told = forecast(recipe(selection), LAYOUT, layers=1, branches=1, shape=(1, 2, 194, 64), dtype=torch.float32)
    assert told.density is None


def test_the_dense_recipe_keeps_nothing() -> None:
    told = forecast(recipe(Every()), LAYOUT, layers=9, branches=2, shape=(1, 2, 194, 64), dtype=torch.float32)
    assert (told.density, told.state_bytes) == (1.0, 0)


def test_more_state_than_the_limit_is_refused_before_anything_is_kept() -> None:
    shape = (1, 2, LAYOUT.length, 64)
    needed = forecast(STATEFUL[2], LAYOUT, layers=LAYERS, branches=2, shape=shape, dtype=torch.float32).kept_bytes
    for limit, fits in ((needed / 2**30, True), (0.9 * needed / 2**30, False)):
        run = Run(recipe(Pooled(density=0.3), schedule=STATEFUL[2].schedule, skipped=Reuse(), state_limit=limit))
        if fits:
            steps_of(run, ["cond", "uncond"], lambda branch, seed: qkv(seed=seed), LAYOUT, 2)
            assert run.state.nbytes == needed
            continue
        with pytest.raises(ValueError, match=r"^state_limit: .* GiB, and the layers of recipe 'custom' .*; valid: "):
            steps_of(run, ["cond", "uncond"], lambda branch, seed: qkv(seed=seed), LAYOUT, 2)
        assert run.state.nbytes == 0


EACH_STEP: dict[str, Any] = {"schedule.dense_steps": 0}


@pytest.mark.parametrize(
    ("preset", "changes", "names"),
    [
        ("radial", EACH_STEP, ()),
        ("sage2", EACH_STEP, ()),
        ("balanced", EACH_STEP, ()),
        ("vmoba", EACH_STEP, ()),
        ("balanced", {"schedule.refresh_every": 3}, ("blocks", "density")),
        ("svg", EACH_STEP, None),  # draws rows by the step
        ("svg2", EACH_STEP, None),  # clusters go on from those of the step before
        ("adaspa", EACH_STEP, None),
        ("cached", EACH_STEP, None),
        ("re-ttention", EACH_STEP, None),
    ],
)
def test_calls_that_come_again_read_what_they_are_said_to(
    preset: str, changes: dict[str, Any], names: tuple[str, ...] | None
) -> None:
    """Nothing at a refresh that is kept; between refreshes what was kept; never what a step or a state decides."""
    recipe, slot, layout = load_recipe(preset).override(changes), Slot(), TokenLayout((2, 16, 16))
    first = _read_again(recipe, 5, slot)
    assert first == (None if names is None or recipe.schedule.keeps else ())
    q, k, v = torch.randn(3, 1, 2, layout.length, 16)
    attend(recipe, layout, q, k, v, scale=None, layer=1, step=5, slot=slot)
    later = _read_again(recipe, 6, slot)
    assert (later is None) == (names is None)
    if names:
        assert later is not None
        assert [x is kept for x, kept in zip(later, (slot["blocks"], slot.density), strict=True)] == [True, True]
        assert _read_again(recipe, 8, slot) is None
