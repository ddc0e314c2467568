"""Runs of the demo: what they leave, how they tell of themselves, how they end."""

import copy
import json
import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sparse_dit.app.demo import actions, inside
from sparse_dit.app.demo.actions import Asked, Finished, Studio, _write, frame_of, latent_of, to_pixels
from sparse_dit.app.demo.inside import Inside, Stored, look_inside
from sparse_dit.app.demo.visits import MAX_RUNS, Stopped, Visit
from sparse_dit.app.demo.watch import watched
from sparse_dit.calls import plan
from sparse_dit.eval.probe import Place
from sparse_dit.kernels.lists import lists_to_mask
from sparse_dit.layout import TokenLayout
from sparse_dit.pipelines.generate import generate, load_pipeline
from sparse_dit.recipe import Recipe, load_recipe


def test_a_run_leaves_videos_a_result_and_a_recipe_that_loads(run: Finished, asked: Asked) -> None:
    names = ["dense.mp4", "sparse.mp4", "side-by-side.mp4", "result.json", "recipe.yaml"]
    assert [file.name for file in run.downloads] == names
    record = json.loads((run.folder / "result.json").read_text())
    assert record["model"] == asked.model
    assert record["calls"]["dense"] == {"dense_steps": 4}
    assert load_recipe(run.folder / "recipe.yaml") == asked.recipe
    assert run.clip("dense").shape == run.clip("sparse").shape == (9, 64, 64, 3)
    assert not np.array_equal(run.clip("dense"), run.clip("sparse"))


def test_the_dense_clip_is_that_of_an_untouched_pipeline(run: Finished, asked: Asked, mini_wan: Path) -> None:
    frames = generate(load_pipeline(str(mini_wan)), asked.request)
    assert np.abs(run.clip("dense") / 255.0 - frames).max() <= 0.5 / 255 + 1e-6


def test_progress_counts_every_step_once(run: Finished, told: list[tuple[str, int, int]]) -> None:
    steps = [(what, done) for what, done, total in told if total and "step" in what]
    assert all(total in (0, 9) for _, _, total in told)
    passes = ["dense", "tiny-radial", "looking inside"]
    assert steps == [
        (f"{name}: step {step} of 3", 3 * number + step) for number, name in enumerate(passes) for step in range(4)
    ]


@pytest.mark.parametrize("when", ["dense: step 1", "tiny-radial: step 2", "looking inside: step 1"])
def test_a_stopped_run_ends_at_once_and_leaves_nothing(
    studio: Studio, asked: Asked, run: Finished, tmp_path: Path, when: str
) -> None:
    visit = Visit(tmp_path / "visit")
    told = []

    def tell(what: str, done: int, total: int) -> None:
        told.append(what)
        if what.startswith(when):
            visit.stop.set()

    with pytest.raises(Stopped):
        studio.run(visit, asked, tell)
    assert told[-1].startswith(when)
    assert not visit.runs
    assert not list(visit.folder.iterdir())
    # The worker is free, and what was cut short leaves no trace in the pipeline.
    visit.stop = threading.Event()
    again = studio.run(visit, replace(asked, inside=False), lambda *_: None)
    assert np.array_equal(again.clip("sparse"), run.clip("sparse"))
    assert again.inside is None


def test_a_run_that_was_stopped_in_line_does_not_begin(asked: Asked, studio: Studio, tmp_path: Path) -> None:
    visit, told = Visit(tmp_path / "visit"), []
    visit.stop.set()
    with pytest.raises(Stopped):
        Studio(studio.models, studio.limits).run(visit, asked, lambda *what: told.append(what))
    assert told == []
    assert not list(visit.folder.iterdir())


def test_a_run_without_a_look_inside_has_two_passes(asked: Asked, studio: Studio, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    visit = Visit(tmp_path / "visit")
    request = replace(asked.request, height=32, width=32)
    for _ in range(MAX_RUNS + 1):
        visit._made += 1
        visit.runs[visit._made] = Finished(visit._made, tmp_path / f"old-{visit._made}", {}, None)
    run = studio.run(visit, replace(asked, request=request, inside=False), lambda _, *steps: told.append(steps))
    assert max(told) == (6, 6)
    assert {total for _, total in told} <= {0, 6}
    assert (len(visit.runs), visit.runs[run.number]) == (MAX_RUNS, run), "the oldest went"


def test_a_studio_has_the_model_that_was_asked_for(mini_wan: Path, studio: Studio) -> None:
    both = Studio({"one": str(mini_wan), "two": str(mini_wan)}, studio.limits)
    one = both._pipeline("one")
    assert both._pipeline("one") is one
    two = both._pipeline("two")
    assert two is not one
    assert both._pipeline("two") is two
    assert both._pipeline("one") is not one, "one at a time"


def test_two_visitors_take_turns(studio: Studio, asked: Asked, tmp_path: Path) -> None:
    order: list[str] = []

    def work(name: str) -> None:
        studio.run(Visit(tmp_path / name), replace(asked, inside=False), lambda *_: order.append(name))

    threads = [threading.Thread(target=work, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    changes = sum(before != after for before, after in pairwise(order))
    # A run tells that it loads only where it must; from the first step on nobody else's run is under way.
    assert changes == 1
    assert set(order) == {"one", "two"}


def test_a_run_beyond_the_limits_is_refused_with_the_models_own_defaults(
    studio: Studio, asked: Asked, tmp_path: Path
) -> None:
    visit = Visit(tmp_path / "visit")
    defaults = replace(asked.request, steps=None, height=None, width=None, num_frames=None)
    with pytest.raises(ValueError, match="steps: 50; valid: 1 to 10"):
        studio.run(visit, replace(asked, request=defaults), lambda *_: None)
    wide = replace(asked.request, height=640, width=640)
    with pytest.raises(ValueError, match="size: "):
        studio.run(visit, replace(asked, request=wide), lambda *_: None)


def test_errors_do_not_tell_where_models_lie(studio: Studio, asked: Asked, mini_wan: Path, tmp_path: Path) -> None:
    broken = Studio({"shown": str(tmp_path / "gone")}, studio.limits)
    with pytest.raises(ValueError, match="shown") as caught:
        broken.run(Visit(tmp_path / "visit"), replace(asked, model="shown"), lambda *_: None)
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(
    "recipe",
    [
        load_recipe("tiny-radial"),
        Recipe.from_dict(
            {
                "order": {"name": "tiles", "tile": [1, 4, 4]},
                "selection": {"name": "window", "size": [1, 5, 3]},
                "block_q": 16,
                "block_k": 32,
            }
        ),
    ],
    ids=lambda recipe: str(recipe.name),
)
def test_masks_are_those_of_the_plan(recipe: Recipe, asked: Asked, mini_wan: Path, tmp_path: Path) -> None:
    recipe = recipe.override({"schedule.dense_steps": 1})
    found = look_inside(load_pipeline(str(mini_wan)), replace(asked.request, steps=2), recipe, tmp_path)
    assert (found.grid, found.steps, found.layers, found.heads, found.missing) == ((3, 8, 8), 2, 2, 2, "")
    assert sorted(found.masks) == [(1, 0), (1, 1)]
    assert found.computed(0, 0, 0, (0, 0, 0)) is None
    assert found.density[0] == [None, None]

    planned = plan(recipe, TokenLayout(found.grid), torch.device("cpu"), 2)
    assert found.density[1] == pytest.approx([planned.density] * 2, abs=1e-6)
    mask = lists_to_mask(planned.blocks, -(-192 // recipe.block_k))[0]
    table = torch.arange(192)[None] if planned.table is None else planned.table
    for head, query in ((0, (0, 0, 0)), (1, (1, 3, 6)), (0, (2, 7, 7))):
        order = table[min(head, len(table) - 1)].tolist()
        token = int(np.ravel_multi_index(query, found.grid))
        block = order.index(token) // recipe.block_q
        row = mask[min(head, len(mask) - 1), block]
        expected = {order[place] for place in range(192) if row[place // recipe.block_k]}
        seen = found.computed(1, 1, head, query)
        assert seen is not None
        keys, own = seen
        assert set(np.flatnonzero(keys)) == expected
        assert 0 < len(expected) < 192, "the whole grid or nothing would show nothing"
        assert set(np.flatnonzero(own)) == set(order[block * recipe.block_q : (block + 1) * recipe.block_q])


def by_hand(folder: Path, mask: np.ndarray, order: np.ndarray | None) -> Inside:
    """One call over two text tokens and a grid of one row of six, in blocks of 2 queries and 4 keys."""
    np.save(folder / "mask.npy", np.packbits(mask, axis=-1))
    if order is not None:
        np.save(folder / "order.npy", order.astype(np.int32))
    stored = Stored(folder / "mask.npy", None if order is None else folder / "order.npy", 2, 2, 4)
    return Inside(folder, (1, 1, 6), 2, 1, 1, 2, masks={(0, 0): stored})


def test_text_in_front_moves_the_grid_into_later_blocks(tmp_path: Path) -> None:
    mask = np.zeros((2, 4, 2), bool)
    mask[0, 1], mask[1, 3] = [True, False], [False, True]
    found = by_hand(tmp_path, mask, None)
    # Tokens 0 and 1 of the grid are tokens 2 and 3 of the call: block 1 of queries, block 0 of keys.
    for head, column, keys, own in ((0, 0, [0, 1], [0, 1]), (0, 4, [], [4, 5]), (1, 5, [2, 3, 4, 5], [4, 5])):
        seen = found.computed(0, 0, head, (0, 0, column))
        assert seen is not None
        assert [np.flatnonzero(tokens).tolist() for tokens in seen] == [keys, own]


def test_heads_may_have_orders_of_their_own(tmp_path: Path) -> None:
    mask = np.zeros((1, 4, 2), bool)
    mask[0, 3] = [False, True]
    found = by_hand(tmp_path, mask, np.array([range(8), [*range(8)][::-1]]))
    for head, column, keys in ((0, 5, [2, 3, 4, 5]), (0, 0, []), (1, 5, [])):
        seen = found.computed(0, 0, head, (0, 0, column))
        assert seen is not None
        assert np.flatnonzero(seen[0]).tolist() == keys


def test_masks_beyond_what_is_kept_are_told(
    asked: Asked, mini_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe("tiny-radial").override({"schedule.dense_steps": 0})
    monkeypatch.setattr(inside, "MASK_BYTES", 0)
    found = look_inside(load_pipeline(str(mini_wan)), replace(asked.request, steps=1), recipe, tmp_path)
    assert found.missing == "only the first 0 MiB of masks are kept"
    assert found.masks == {}
    assert not list(tmp_path.iterdir())


def test_the_masks_are_those_of_the_first_branch(tmp_path: Path) -> None:
    found = Inside(tmp_path, (1, 1, 32), 0, 1)
    keeper = inside._Keeper(found)
    for branch, column in ((0, 0), (1, 1)):
        x, indices = torch.zeros(1, 1, 32, 4), torch.full((1, 1, 2, 1), column, dtype=torch.int32)
        keeper.calls.append((x, x, x, indices, torch.ones(1, 1, 2, dtype=torch.int32), None, 16, 16))
        keeper.keep(Place(0, 0, branch), 1)
        assert keeper.calls == []
    seen = found.computed(0, 0, 0, (0, 0, 0))
    assert seen is not None
    assert np.flatnonzero(seen[0]).tolist() == list(range(16))
    files = [keeper._file(np.zeros(shape, np.uint8)) for shape in ((2, 3), (3, 2), (2, 3))]
    assert files[0] == files[2] != files[1]


def test_a_pipeline_that_was_watched_has_its_own_bar_again(mini_wan: Path) -> None:
    pipe, stop = load_pipeline(str(mini_wan)), threading.Event()
    with watched(pipe, lambda *_: None, stop):
        assert "progress_bar" in vars(pipe)
    assert "progress_bar" not in vars(pipe)
    stop.set()
    with pytest.raises(Stopped), watched(pipe, lambda *_: None, stop):
        raise AssertionError("it was stopped before it began")


def test_pixels_are_rounded_and_cut() -> None:
    assert to_pixels(np.array([-3.0, 2.0, 127.6 / 255], np.float32)).tolist() == [0, 255, 128]


def test_dense_stands_on_the_left(asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stood = []
    monkeypatch.setattr(actions, "side_by_side", lambda left, right, label: stood.append((left, right)) or left)
    dense, sparse = np.zeros((1, 8, 8, 4), np.float32), np.ones((1, 8, 8, 4), np.float32)
    record = {"run_density": 1.0, "psnr": 1.0}
    _write(tmp_path, SimpleNamespace(dense=dense, sparse=sparse, record=record), asked.recipe)
    [(left, right)] = stood
    assert (left.max(), right.min(), left.shape) == (0, 1, (1, 8, 8, 3))
    assert not Finished(1, tmp_path, {}, None).clip("dense").any()


def test_layers_of_both_transformers_can_be_looked_at(asked: Asked, mini_wan: Path, tmp_path: Path) -> None:
    pipe = load_pipeline(str(mini_wan))
    pipe.register_modules(transformer_2=copy.deepcopy(pipe.transformer))
    pipe.register_to_config(boundary_ratio=0.9)
    recipe = load_recipe("tiny-radial").override({"schedule.dense_steps": 1})
    found = look_inside(pipe, replace(asked.request, steps=2), recipe, tmp_path)
    assert found.layers == len(found.density[1]) == 4
    assert sorted(found.masks) == [(1, 2), (1, 3)]


def test_a_run_without_sparse_calls_has_no_masks(asked: Asked, mini_wan: Path, tmp_path: Path) -> None:
    found = look_inside(load_pipeline(str(mini_wan)), asked.request, load_recipe("dense"), tmp_path)
    assert found.masks == {}
    assert found.density == [[None, None]] * 3


def test_heads_and_queries_outside_are_refused(run: Finished) -> None:
    assert isinstance(run.inside, Inside)
    with pytest.raises(ValueError, match="head: 2; valid: 0 to 1"):
        run.inside.computed(1, 0, 2, (0, 0, 0))
    with pytest.raises(ValueError, match="query: "):
        run.inside.computed(1, 0, 0, (0, 8, 0))


def test_latent_frames_hold_the_frames_that_causal_vaes_give_them() -> None:
    # Wan: the first frame by itself, then four each.
    assert [latent_of(frame, 9, 3) for frame in range(9)] == [0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert [frame_of(latent, 9, 3) for latent in range(3)] == [0, 4, 8]
    assert all(latent_of(frame_of(latent, 33, 9), 33, 9) == latent for latent in range(9))
    assert (latent_of(0, 1, 1), frame_of(0, 1, 1)) == (0, 0)
