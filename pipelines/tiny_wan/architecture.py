"""The parts of tiny-wan with fresh weights: diffusers' and transformers' own classes at a small size."""

from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from sparse_dit.pipelines.tiny_wan.grammar import vocabulary

LATENT_CHANNELS = 16
TEXT_WIDTH = 128
FLOW_SHIFT = 3.0


def build_vae() -> AutoencoderKLWan:
    """8x8x4 compression to 16 channels, 3.3 M parameters.

    Wan 2.2's residual form with pixel patches of 2: the convolutions run at half the resolution, which makes training
    and decoding about four times cheaper than the Wan 2.1 form at this size.
    """
    return AutoencoderKLWan(
        base_dim=64,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[True, True],
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_spatial=8,
        scale_factor_temporal=4,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )


def build_transformer() -> WanTransformer3DModel:
    """8 layers of 4 heads x 64, one token a latent position, 8.0 M parameters."""
    return WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=4,
        attention_head_dim=64,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=128,
        ffn_dim=768,
        num_layers=8,
        cross_attn_norm=True,
        rope_max_seq_len=64,
    )


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of the grammar; an end token closes every caption, as in T5."""
    words = ["<pad>", "</s>", "<unk>", *vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def build_text_encoder(tokenizer: PreTrainedTokenizerFast) -> UMT5EncoderModel:
    """Two UMT5 layers of width 128, 0.3 M parameters, trained together with the transformer."""
    config = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_WIDTH,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=16,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return UMT5EncoderModel(config)


def build_pipeline(vae: AutoencoderKLWan | None = None) -> WanPipeline:
    """A `WanPipeline` of these parts, with fresh weights but for the given VAE."""
    tokenizer = build_tokenizer()
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=build_text_encoder(tokenizer).eval(),
        transformer=build_transformer().eval(),
        vae=(vae or build_vae()).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT),
    )


def prompt_embeddings(
    tokenizer: PreTrainedTokenizerFast, encoder: UMT5EncoderModel, captions: list[str], length: int
) -> Tensor:
    """Caption embeddings as `WanPipeline` makes them: [B, length, 128], zero behind the caption's end token."""
    batch: Any = tokenizer(captions, padding=True, return_tensors="pt").to(encoder.device)
    hidden = encoder(batch.input_ids, batch.attention_mask).last_hidden_state
    hidden = hidden * batch.attention_mask[..., None].to(hidden.dtype)
    return torch.nn.functional.pad(hidden, (0, 0, 0, length - hidden.shape[1]))
