"""What a recipe would do, told without running it."""

from typing import Any

import pytest
from diffusers import WanPipeline

from sparse_dit.pipelines.patch import enable, explain, summary

SPARSE = {"selection": {"name": "radial", "density": 0.3}, "block_q": 16, "block_k": 16}
PARTLY = {**SPARSE, "schedule": {"dense_steps": 1, "dense_layers": [2]}}


def test_explain_tells_what_the_run_then_does(wan: Any, pipe: WanPipeline) -> None:
    before = set(vars(pipe.transformer))
    told = explain(pipe, PARTLY, height=64, width=64, num_frames=9, num_inference_steps=wan.STEPS)
    assert set(vars(pipe.transformer)) == before
    assert (told.model, told.grid, told.tokens, told.layers) == ("WanTransformer3DModel", wan.GRID, 192, wan.LAYERS)
    assert (told.block_q, told.block_k, told.blocks) == (16, 16, (12, 12))
    assert (told.text_before, told.text_after) == (0, 0)
    assert told.state_bytes > 0
    assert [(step.sparse_layers, step.dense_layers) for step in told.steps] == [
        (0, {"dense_steps": 3}),
        (2, {"dense_layers": 1}),
        (2, {"dense_layers": 1}),
    ]
    assert [round(step.noise, 2) for step in told.steps] == [1.0, 0.88, 0.05]
    wan.generate(enable(pipe, PARTLY))
    counts = summary(pipe)
    assert told.density == counts.density
    assert told.run_density == pytest.approx(counts.run_density)
    assert told.to_dict()["recipe"]["selection"] == {"name": "radial", "density": 0.3, **_DEFAULTS}
    text = str(told)
    assert "3 x 8 x 8" in text
    assert "steps 1-2" in text


_DEFAULTS = {"sink_frames": 1, "full_distance": 1, "min_width": None, "decimate_below": 128}


def test_explain_of_the_dense_recipe(pipe: WanPipeline) -> None:
    told = explain(pipe, "dense", height=64, width=64, num_frames=9, num_inference_steps=2)
    assert (told.density, told.run_density, told.state_bytes) == (1.0, 1.0, 0)
    assert [step.dense_layers for step in told.steps] == [{"recipe": 3}] * 2


@pytest.mark.parametrize(("frames", "latent_frames"), [(1, 1), (8, 3), (9, 3), (10, 3), (33, 9)])
def test_explain_rounds_frames_as_the_pipeline_does(pipe: WanPipeline, frames: int, latent_frames: int) -> None:
    told = explain(pipe, SPARSE, height=64, width=64, num_frames=frames, num_inference_steps=1)
    assert told.grid[0] == latent_frames


@pytest.mark.parametrize("size", ["height", "width", "num_frames", "num_inference_steps"])
def test_explain_refuses_sizes_below_one(pipe: WanPipeline, size: str) -> None:
    sizes = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2, size: 0}
    with pytest.raises(ValueError, match=f"^{size}: 0; valid: "):
        explain(pipe, SPARSE, **sizes)
