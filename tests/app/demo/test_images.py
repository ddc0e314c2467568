"""Image models: one frame instead of videos, from the folder of a Flux pipeline to the page."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sparse_dit.app.demo.actions import Asked, Studio
from sparse_dit.app.demo.answers import Answers
from sparse_dit.app.demo.limits import Limits, allowed_models, split_recipe
from sparse_dit.app.demo.page import build
from sparse_dit.app.demo.visits import Visits
from sparse_dit.pipelines.generate import Request, generate, load_pipeline
from sparse_dit.recipe import load_recipe


@pytest.fixture(scope="module")
def mini_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a `FluxPipeline` of random weights; a token is 4x4 pixels."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    from sparse_dit.pipelines.tiny_wan.architecture import build_tokenizer

    torch.manual_seed(0)
    short, long = build_tokenizer(), build_tokenizer()
    short.model_max_length = 77
    clip = CLIPTextConfig(
        vocab_size=len(short), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        projection_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    t5 = T5Config(vocab_size=len(long), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, shift_factor=0.0,
            scaling_factor=1.0,
        ),
        text_encoder=CLIPTextModel(clip), tokenizer=short, text_encoder_2=T5EncoderModel(t5), tokenizer_2=long,
        transformer=FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 6, 6),
        ),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("mini-flux")
    pipe.save_pretrained(folder)
    return folder


def test_an_image_goes_from_the_button_to_the_page(mini_flux: Path, visits: Visits) -> None:
    models = allowed_models([str(mini_flux)])
    answers = Answers(Studio(models, Limits(steps=4, pixels=2**14)), visits, places=1)
    build(answers)
    parts, visit = answers.parts, answers.visits.open("one")
    recipe = load_recipe("tiny-radial").override({"schedule.dense_steps": 1, "selection.density": 0.85})
    asked = Asked(mini_flux.name, Request("a red circle", seed=3, steps=2, height=64, width=96), recipe)
    # The page sends a number of frames whatever the model is.
    size = [asked.request.seed, asked.request.steps, asked.request.width, asked.request.height, 33]
    answers.admit(visit, None, asked.model, asked.request.prompt, True, *size, *split_recipe(recipe))
    *_, shown = answers.run(visit)

    run = visit.runs[1]
    assert run.frames == 1
    assert [file.name for file in run.downloads] == [
        "dense.png",
        "sparse.png",
        "side-by-side.png",
        "result.json",
        "recipe.yaml",
    ]
    made = generate(load_pipeline(str(mini_flux)), asked.request)[0]
    dense = np.asarray(Image.open(run.folder / "dense.png"))
    assert dense.shape == (64, 96, 3)
    assert np.abs(dense / 255.0 - made).max() <= 0.5 / 255 + 1e-6
    assert not np.array_equal(dense, np.asarray(Image.open(run.folder / "sparse.png")))
    assert run.record["calls"] == {"planned": 4, "made": 4, "sparse": 2, "dense": {"dense_steps": 2}}

    assert not shown[parts.videos].visible
    assert not shown[parts.frame].visible
    assert (shown[parts.dense], shown[parts.sparse]) == (None, None)
    assert [Image.open(file).size for file in shown[parts.slider]] == [(384, 256)] * 2
    # Step 1 is sparse; its mask has one frame, and text in front of it that is not drawn.
    assert run.inside is not None
    assert run.inside.grid == (1, 16, 24)
    assert sorted(run.inside.masks) == [(1, 0), (1, 1)]
    assert not shown[parts.latent].visible
    assert "Step 1, layer 0, head 0" in shown[parts.told]
    seen = run.inside.computed(1, 0, 0, (0, 3, 5))
    assert seen is not None
    assert 0 < seen[0].mean() < 1
    assert seen[1][0, 3, 5]
