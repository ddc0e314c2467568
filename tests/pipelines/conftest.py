"""A real, tiny, random Wan pipeline that takes embeddings for prompts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel


class Wan:
    """Makes such pipelines and runs them, always with the same weights, texts and noise.

    Attributes:
        LAYERS, STEPS, FORWARDS, CALLS: self-attention layers, denoising steps, forwards a step (cond and uncond), and
            self-attention calls of a run.
        GRID: (T, H, W) of `generate` and `forward`.
    """

    LAYERS, STEPS, FORWARDS = 3, 3, 2
    CALLS = LAYERS * STEPS * FORWARDS
    GRID = (3, 8, 8)

    def transformer(self, seed: int = 0, layers: int = LAYERS) -> WanTransformer3DModel:
        """A transformer whose tokens are its latent pixels."""
        torch.manual_seed(seed)
        return WanTransformer3DModel(
            patch_size=(1, 1, 1),
            num_attention_heads=1,
            attention_head_dim=64,
            in_channels=16,
            out_channels=16,
            text_dim=32,
            freq_dim=32,
            ffn_dim=32,
            num_layers=layers,
            rope_max_seq_len=32,
        ).eval()

    def pipeline(self, seed: int = 0, **components: Any) -> WanPipeline:
        """A pipeline without text encoder."""
        model = self.transformer(seed)
        vae = AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        ).eval()
        scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
        pipe = WanPipeline(
            transformer=model, vae=vae, scheduler=scheduler, text_encoder=None, tokenizer=None, **components
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def generate(self, pipe: WanPipeline, steps: int = STEPS, side: int = 64) -> torch.Tensor:
        """Latents of a clip."""
        texts = torch.randn(2, 1, 8, 32, generator=torch.Generator().manual_seed(1))
        latents: torch.Tensor = pipe(
            prompt_embeds=texts[0],
            negative_prompt_embeds=texts[1],
            height=side,
            width=64,
            num_frames=9,
            num_inference_steps=steps,
            guidance_scale=6.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).frames
        return latents

    def forward(
        self, model: Callable[..., Any], level: float = 500.0, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """One forward of a bare transformer."""
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            out: torch.Tensor = model(
                hidden_states=torch.randn(1, 16, *self.GRID, generator=generator).to(dtype),
                timestep=torch.tensor([level]),
                encoder_hidden_states=torch.randn(1, 8, 32, generator=generator).to(dtype),
                return_dict=False,
            )[0]
        return out


@pytest.fixture(scope="session")
def wan() -> Wan:
    """Makes and runs tiny Wan pipelines."""
    return Wan()


@pytest.fixture
def pipe(wan: Wan) -> WanPipeline:
    """A fresh pipeline."""
    return wan.pipeline()


@pytest.fixture(scope="session")
def dense(wan: Wan) -> torch.Tensor:
    """What a pipeline that was never touched makes."""
    return wan.generate(wan.pipeline())
