"""What a recipe would do, told without running it."""

from typing import Any

import diffusers
import pytest
import torch
from diffusers import WanPipeline

from sparse_dit.layout import TokenLayout
from sparse_dit.pipelines.patch import enable, explain, summary
from sparse_dit.skipped import Reuse

SPARSE = {"selection": {"name": "radial", "density": 0.3}, "block_q": 16, "block_k": 16}
PARTLY = {**SPARSE, "schedule": {"dense_steps": 1, "dense_layers": [2]}}


def test_explain_tells_what_the_run_then_does(wan: Any, pipe: WanPipeline) -> None:
    before, timesteps = set(vars(pipe.transformer)), pipe.scheduler.timesteps.clone()
    told = explain(pipe, PARTLY, height=64, width=64, num_frames=9, num_inference_steps=wan.STEPS)
    assert set(vars(pipe.transformer)) == before
    assert torch.equal(pipe.scheduler.timesteps, timesteps)
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


CACHED = {
    **SPARSE,
    "schedule": {"refresh_every": 1, "refresh_growth": 1, "dense_layers": [2]},
    "skipped": {"name": "reuse", "ratio": False},
}


def test_explain_counts_the_whole_calls_of_a_cache(wan: Any, pipe: WanPipeline) -> None:
    told = explain(pipe, CACHED, height=64, width=64, num_frames=9, num_inference_steps=wan.STEPS)
    whole = {"refresh": 2, "dense_layers": 1}
    assert [(step.sparse_layers, step.dense_layers) for step in told.steps] == [
        (0, whole),
        (0, whole),
        (2, {"dense_layers": 1}),
    ]
    wan.generate(enable(pipe, CACHED))
    counts = summary(pipe)
    assert told.run_density == pytest.approx(counts.run_density)
    assert counts.dense == {"refresh": 8, "dense_layers": 6}
    assert "steps 0-1    0 of 3 layers sparse, 2 dense (refresh), 1 dense (dense_layers)" in str(told)


def test_explain_counts_the_bytes_of_both_branches(pipe: WanPipeline) -> None:
    told = explain(pipe, CACHED, height=64, width=64, num_frames=9, num_inference_steps=3)
    bare = explain(pipe.transformer, CACHED, height=8, width=8, num_frames=3, num_inference_steps=3)
    # Two of three layers keep a cache, whose head has 64 channels in 2 bytes.
    cache = Reuse(ratio=False).kept_bytes(TokenLayout((3, 8, 8)), batch=1, heads=1, head_size=64, itemsize=2)
    assert told.state_bytes - bare.state_bytes == 2 * cache > 0
    assert [step.noise for step in bare.steps] == pytest.approx([1, 2 / 3, 1 / 3])


def test_explain_counts_a_last_block_that_is_not_full(pipe: WanPipeline) -> None:
    told = explain(pipe, {**SPARSE, "block_k": 64}, height=72, width=64, num_frames=9, num_inference_steps=1)
    assert (told.tokens, told.blocks) == (216, (14, 4))


def test_explain_knows_schedules_that_count_upwards(wan: Any) -> None:
    pipe = wan.pipeline()
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    told = explain(pipe, SPARSE, height=64, width=64, num_frames=9, num_inference_steps=4)
    noise = [step.noise for step in told.steps]
    assert noise == sorted(noise, reverse=True)
    assert noise[0] > 0.9


def test_explain_says_from_where_values_are_left_out(pipe: WanPipeline) -> None:
    size = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 1}
    assert "values       left out more than 7.5 below the maximum" in str(
        explain(pipe, {**SPARSE, "pv_threshold": 7.5}, **size)
    )
    assert "values" not in str(explain(pipe, SPARSE, **size))


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
    with pytest.raises(ValueError, match=f"^{size}: 2.5; valid: "):
        explain(pipe, SPARSE, **{**sizes, size: 2.5})


@pytest.mark.parametrize("side", ["height", "width"])
def test_explain_refuses_a_picture_smaller_than_a_token(pipe: WanPipeline, side: str) -> None:
    with pytest.raises(ValueError, match=f"^{side}: 7 is less than one token of WanTransformer3DModel; valid: "):
        explain(pipe, SPARSE, **{"height": 64, "width": 64, side: 7})


def flux_pipeline() -> tuple[Any, dict[str, Any]]:
    """Latents packed by the pipeline, a timestep from 1 to 0, guidance distilled into the model."""
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,), latent_channels=1, norm_num_groups=1, use_quant_conv=False, use_post_quant_conv=False,
        shift_factor=0.1, scaling_factor=1.5,
    )  # fmt: skip
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    nothing = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.FluxPipeline(transformer=transformer.eval(), vae=vae.eval(), scheduler=scheduler, **nothing)
    texts = {"prompt_embeds": torch.randn(1, 11, 32), "pooled_prompt_embeds": torch.randn(1, 32)}
    return pipe, {"height": 20, "width": 24, **texts}


def cogvideo_pipeline() -> tuple[Any, dict[str, Any]]:
    """Both branches in one batch, text in front, latents with the frames first."""
    vae = diffusers.AutoencoderKLCogVideoX(
        in_channels=3, out_channels=3, latent_channels=4, layers_per_block=1, norm_num_groups=2,
        temporal_compression_ratio=4, block_out_channels=(8, 8, 8, 8),
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
    )  # fmt: skip
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=4,
        text_embed_dim=32, num_layers=2, sample_width=12, sample_height=12, sample_frames=9, max_text_seq_length=11,
    )  # fmt: skip
    scheduler = diffusers.CogVideoXDDIMScheduler()
    pipe = diffusers.CogVideoXPipeline(
        tokenizer=None, text_encoder=None, vae=vae.eval(), transformer=transformer.eval(), scheduler=scheduler
    )
    texts = {name: torch.randn(1, 11, 32) for name in ("prompt_embeds", "negative_prompt_embeds")}
    return pipe, {"height": 96, "width": 96, "num_frames": 9, "max_sequence_length": 11, **texts}


@pytest.mark.parametrize("make", [flux_pipeline, cogvideo_pipeline])
def test_explain_of_other_pipelines_tells_what_the_run_then_does(make: Any) -> None:
    torch.manual_seed(0)
    pipe, arguments = make()
    pipe.set_progress_bar_config(disable=True)
    recipe = {**SPARSE, "schedule": {"dense_steps": 1, "dense_layers": [1]}}
    size = {name: arguments[name] for name in ("height", "width", "num_frames") if name in arguments}
    told = explain(pipe, recipe, **size, num_inference_steps=4, text_tokens=11)
    enable(pipe, recipe, strict=True)
    pipe(**arguments, num_inference_steps=4, output_type="latent")
    counts = summary(pipe)
    assert (told.text_before, told.text_after) == (11, 0)
    assert told.density == pytest.approx(counts.density)
    assert told.run_density == pytest.approx(counts.run_density)
    assert sum(step.sparse_layers for step in told.steps) == counts.sparse
    assert set(counts.dense) == {"dense_steps", "dense_layers"}


def test_explain_of_a_selection_that_the_content_decides(pipe: WanPipeline) -> None:
    told = explain(pipe, "sol", height=64, width=64, num_frames=9, num_inference_steps=3)
    assert (told.density, told.run_density) == (None, None)
    assert "as the content decides" in str(told)
