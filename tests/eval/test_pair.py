"""Paired runs: one noise, one dense run, and a pipeline that is left as it was."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from sparse_dit.eval import pair
from sparse_dit.pipelines.generate import Request, generate, load_pipeline
from sparse_dit.recipe import load_recipe

REQUEST = Request("a red circle moves right", seed=3, steps=2, height=64, width=64, num_frames=9)
RADIAL = load_recipe("radial").override(
    {"schedule.dense_steps": 0, "schedule.dense_layers": [], "block_q": 32, "block_k": 32}
)


@pytest.fixture(scope="module")
def pipe(mini_wan: Path):
    loaded = load_pipeline(str(mini_wan))
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_several_recipes_share_a_dense_run_and_leave_no_trace(pipe) -> None:
    before = generate(pipe, REQUEST)
    denser, sparser = (RADIAL.override({"selection.density": density}) for density in (1.0, 0.4))
    first, second = pair.compare(pipe, REQUEST, [denser, sparser], model="mini", warm_up=False)
    np.testing.assert_array_equal(first.dense, before)
    assert second.dense is first.dense
    assert first.record["seconds_dense"] == second.record["seconds_dense"]
    assert first.record["psnr"] > second.record["psnr"]
    assert first.record["density"] > second.record["density"]
    assert np.abs(second.sparse - second.dense).max() > 0
    np.testing.assert_array_equal(generate(pipe, REQUEST), before)
    assert pipe._progress_bar_config == {"disable": True}


def test_warming_up_changes_no_result(pipe) -> None:
    [cold] = pair.compare(pipe, REQUEST, [RADIAL], warm_up=False)
    [warm] = pair.compare(pipe, REQUEST, [RADIAL], warm_up=True)
    np.testing.assert_array_equal(warm.sparse, cold.sparse)
    assert warm.record["calls"] == cold.record["calls"]


def test_a_recipe_that_does_not_fit_is_told_before_the_dense_run(pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair, "run", lambda *args, **kwargs: pytest.fail("something ran"))
    with pytest.raises(ValueError, match="dense_layers"):
        list(pair.compare(pipe, REQUEST, [RADIAL.override({"schedule.dense_layers": [9]})]))


def test_a_batch_gives_the_figures_of_single_runs(pipe) -> None:
    other = replace(REQUEST, prompt="a large blue ring", seed=8)
    sparser, denser = (RADIAL.override({"selection.density": density}) for density in (0.4, 0.7))
    batches = list(pair.compare_batch(pipe, [REQUEST, other], [sparser, denser], model="mini", warm_up=False))
    for number, request in enumerate((REQUEST, other)):
        for alone, batch in zip(pair.compare(pipe, request, [sparser, denser], warm_up=False), batches, strict=True):
            together = batch[number]
            np.testing.assert_allclose(together.dense, alone.dense, atol=1e-5)
            np.testing.assert_allclose(together.sparse, alone.sparse, atol=1e-5)
            assert together.record["psnr"] == pytest.approx(alone.record["psnr"], abs=0.01)
            for name in ("prompt", "seed", "recipe", "grid", "density", "run_density", "calls"):
                assert together.record[name] == alone.record[name]
            assert (together.record["batch"], alone.record["batch"]) == (2, 1)
    assert batches[0][0].record["seconds_dense"] == batches[1][1].record["seconds_dense"], "dense ran more than once"


def test_a_plan_needs_the_size_and_no_frames_of_an_image() -> None:
    class ImagePipeline:
        config = SimpleNamespace(_name_or_path="")

        def __call__(
            self, prompt: str, height: int | None = None, width: int = 64, num_inference_steps: int = 8
        ) -> None: ...

    with pytest.raises(ValueError, match="height: ImagePipeline has no default for it"):
        pair.plan_arguments(ImagePipeline(), Request("x"))
    planned = pair.plan_arguments(ImagePipeline(), Request("x", height=32))
    assert planned == {"height": 32, "width": 64, "num_inference_steps": 8}
