"""A tiny random transformer of every family, and arguments for one forward of it: nothing is downloaded."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import diffusers.models.transformers
import pytest
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina, get_3d_rotary_pos_embed_allegro

Arguments = dict[str, Any]


class Tiny(NamedTuple):
    """A tiny transformer.

    Attributes:
        config: of the class in diffusers.
        arguments: makes the arguments of a forward, the same each time.
        tokens: (T, H, W, before, after), the tokens that count.
        noise: noise level of the forward.
        layers: self-attention layers.
    """

    config: Mapping[str, Any]
    arguments: Callable[[], Arguments]
    tokens: tuple[int, int, int, int, int]
    noise: float = 0.5
    layers: int = 2


_generator = torch.Generator()


def _rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=_generator)


def _level(value: float) -> torch.Tensor:
    return torch.full((1,), float(value))


def padding_mask(*lengths: int, width: int) -> torch.Tensor:
    """int64 [B, width], 1 for the first `lengths` tokens of each sample."""
    return (torch.arange(width) < torch.tensor(lengths)[:, None]).long()


def _ids(height: int, width: int, image: int = 0, columns: int = 3) -> torch.Tensor:
    """Position ids of the tokens of an image."""
    ids = torch.zeros(height, width, columns)
    ids[..., 0], ids[..., 1], ids[..., 2] = image, torch.arange(height)[:, None], torch.arange(width)
    return ids.flatten(0, 1)


def _allegro_rope() -> tuple[Any, Any]:
    freqs_and_grids = get_3d_rotary_pos_embed_allegro(
        embed_dim=24, crops_coords=((0, 0), (8, 8)), grid_size=(8, 8), temporal_size=3, interpolation_scale=(1, 1, 1)
    )
    grids = torch.cartesian_prod(*(grid.long() for grid in freqs_and_grids[3:]))
    return freqs_and_grids[:3], tuple(grids.T[:, None])


def _without(whole: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in whole.items() if name not in names}


# fmt: off
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
_WAN = {
    **_HEADS, "patch_size": (1, 2, 2), "in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 16,
    "ffn_dim": 16, "num_layers": 2, "rope_max_seq_len": 32,
}
_HELIOS = {**_without(_WAN, "rope_max_seq_len"), "rope_dim": (4, 6, 6)}
_HUNYUAN = {
    **_HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1,
    "patch_size": 2, "patch_size_t": 1, "text_embed_dim": 16, "pooled_projection_dim": 8, "rope_axes_dim": (4, 6, 6),
}
_COGVIDEO = {
    **_HEADS, "in_channels": 4, "out_channels": 4, "time_embed_dim": 4, "text_embed_dim": 16, "num_layers": 2,
    "sample_width": 16, "sample_height": 16, "sample_frames": 9, "patch_size": 2, "max_text_seq_length": 10,
}
_FLUX = {
    **_HEADS, "patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 16,
    "axes_dims_rope": (4, 4, 8),
}
_COGVIEW = {
    **_HEADS, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2, "text_embed_dim": 16,
    "time_embed_dim": 8, "condition_dim": 4,
}


def _video() -> Arguments:
    return {"hidden_states": _rand(1, 4, 3, 16, 16), "timestep": _level(500), "encoder_hidden_states": _rand(1, 7, 16)}


def _padded_video() -> Arguments:
    text = {"encoder_hidden_states": _rand(1, 12, 16), "encoder_attention_mask": padding_mask(9, width=12)}
    return {**_video(), **text, "pooled_projections": _rand(1, 8), "guidance": _level(6000)}


def _frames_first() -> Arguments:
    text = _rand(1, 10, 16)
    return {"hidden_states": _rand(1, 3, 4, 16, 16), "timestep": _level(500), "encoder_hidden_states": text}


def _image() -> Arguments:
    return {"hidden_states": _rand(1, 4, 28, 30), "timestep": _level(500), "encoder_hidden_states": _rand(1, 9, 16)}


def _packed(columns: int = 3) -> Arguments:
    return {
        "hidden_states": _rand(1, 210, 4), "timestep": _level(0.5), "encoder_hidden_states": _rand(1, 9, 16),
        "img_ids": _ids(14, 15, columns=columns), "txt_ids": torch.zeros(9, columns),
    }


def _with_reference(columns: int, image: int) -> Arguments:
    ids = torch.cat([_ids(14, 15, columns=columns), _ids(5, 10, image, columns)])
    return {**_packed(columns), "hidden_states": _rand(1, 260, 4), "img_ids": ids}


def _history(names: Mapping[str, int]) -> Arguments:
    latents = {f"latents_{name}": _rand(1, 4, frames, 16, 16) for name, frames in names.items()}
    return latents | {f"indices_latents_{name}": torch.arange(frames) for name, frames in names.items()}


def _sized_image(*names: str) -> Arguments:
    return {**_image(), **{name: torch.ones(1, 2) for name in ("target_size", "crop_coords", *names)}}


VIDEO_TOKENS = (3, 8, 8, 0, 0)
TINY: dict[str, Tiny] = {
    "WanTransformer3DModel": Tiny(_WAN, _video, VIDEO_TOKENS),
    "WanVACETransformer3DModel": Tiny(
        {**_WAN, "vace_layers": [0], "vace_in_channels": 8},
        lambda: {**_video(), "control_hidden_states": _rand(1, 8, 3, 16, 16)}, VIDEO_TOKENS, layers=3,
    ),
    "WanAnimateTransformer3DModel": Tiny(
        {**_WAN, "in_channels": 12, "latent_channels": 4, "image_dim": None, "motion_encoder_size": 16,
         "motion_encoder_channel_sizes": {"4": 4, "8": 4, "16": 4}, "motion_style_dim": 8, "motion_dim": 4,
         "motion_encoder_dim": 8, "face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2,
         "inject_face_latents_blocks": 2},
        lambda: {**_video(), "hidden_states": _rand(1, 12, 4, 16, 12), "pose_hidden_states": _rand(1, 4, 3, 16, 12),
                 "face_pixel_values": _rand(1, 3, 9, 16, 16)}, (4, 8, 6, 0, 0),
    ),
    "ChronoEditTransformer3DModel": Tiny(_WAN, _video, VIDEO_TOKENS),
    "SkyReelsV2Transformer3DModel": Tiny(_WAN, _video, VIDEO_TOKENS),
    "AnyFlowTransformer3DModel": Tiny(
        _WAN, lambda: {**_frames_first(), "timestep": torch.full((1, 3), 500.0),
                       "r_timestep": torch.full((1, 3), 400.0)}, VIDEO_TOKENS,
    ),
    "HeliosTransformer3DModel": Tiny(
        _HELIOS, lambda: {**_video(), "indices_hidden_states": torch.arange(3)[None],
                          **{name: value if value.ndim > 1 else value[None] for name, value in
                             _history({"history_short": 1, "history_mid": 2, "history_long": 4}).items()}},
        (3, 8, 8, 64 + 16 + 4, 0),
    ),
    "HunyuanVideoTransformer3DModel": Tiny(_HUNYUAN, _padded_video, (3, 8, 8, 0, 9)),
    "HunyuanVideoFramepackTransformer3DModel": Tiny(
        {**_HUNYUAN, "has_image_proj": True, "image_proj_dim": 8, "has_clean_x_embedder": True},
        lambda: {**_padded_video(), "image_embeds": _rand(1, 5, 8), "indices_latents": torch.arange(3),
                 **_history({"clean": 2, "history_2x": 2, "history_4x": 4})}, (3, 8, 8, 2 * 64 + 16 + 4, 5 + 9),
    ),
    "HunyuanVideo15Transformer3DModel": Tiny(
        {**_HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_refiner_layers": 1, "target_size": 16,
         "text_embed_dim": 16, "text_embed_2_dim": 8, "image_embed_dim": 8, "rope_axes_dim": (4, 6, 6)},
        lambda: {"hidden_states": _rand(1, 4, 3, 8, 8), "timestep": _level(500),
                 "encoder_hidden_states": _rand(1, 12, 16), "encoder_attention_mask": padding_mask(9, width=12),
                 "encoder_hidden_states_2": _rand(1, 6, 8), "encoder_attention_mask_2": padding_mask(4, width=6),
                 "image_embeds": torch.zeros(1, 5, 8)}, (3, 8, 8, 0, 9 + 4),
    ),
    "MotifVideoTransformer3DModel": Tiny(
        _without(_HUNYUAN, "num_refiner_layers", "pooled_projection_dim"),
        lambda: _without(_padded_video(), "pooled_projections", "guidance"), (3, 8, 8, 0, 9),
    ),
    "CogVideoXTransformer3DModel": Tiny(_COGVIDEO, _frames_first, (3, 8, 8, 10, 0)),
    "ConsisIDTransformer3DModel": Tiny(_COGVIDEO, _frames_first, (3, 8, 8, 10, 0)),
    "EasyAnimateTransformer3DModel": Tiny(
        {**_HEADS, "in_channels": 4, "out_channels": 4, "patch_size": 2, "sample_width": 16, "sample_height": 16,
         "num_layers": 2, "mmdit_layers": 2, "time_embed_dim": 8, "text_embed_dim": 16}, _video, (3, 8, 8, 7, 0),
    ),
    "MochiTransformer3DModel": Tiny(
        {**_HEADS, "patch_size": 2, "num_layers": 2, "pooled_projection_dim": 16, "in_channels": 4,
         "text_embed_dim": 16, "time_embed_dim": 4, "max_sequence_length": 12},
        lambda: {**_video(), "timestep": _level(250), "encoder_hidden_states": _rand(1, 12, 16),
                 "encoder_attention_mask": padding_mask(9, width=12).bool()}, (3, 8, 8, 0, 9), noise=0.75,
    ),
    "LTXVideoTransformer3DModel": Tiny(
        {**_HEADS, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 32, "num_layers": 2,
         "caption_channels": 16},
        lambda: {"hidden_states": _rand(1, 210, 4), "timestep": _level(500), "encoder_hidden_states": _rand(1, 9, 16),
                 "encoder_attention_mask": padding_mask(7, width=9), "num_frames": 3, "height": 7, "width": 10},
        (3, 7, 10, 0, 0),
    ),
    "LTX2VideoTransformer3DModel": Tiny(
        {**_HEADS, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 32, "num_layers": 2,
         "caption_channels": 16, "audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2,
         "audio_attention_head_dim": 8, "audio_cross_attention_dim": 16, "use_prompt_adaln_single": False},
        lambda: {"hidden_states": _rand(1, 210, 4), "audio_hidden_states": _rand(1, 6, 4), "timestep": _level(500),
                 "encoder_hidden_states": _rand(1, 9, 16), "audio_encoder_hidden_states": _rand(1, 9, 16),
                 "num_frames": 3, "height": 7, "width": 10, "audio_num_frames": 6}, (3, 7, 10, 0, 0),
    ),
    "AllegroTransformer3DModel": Tiny(
        {"num_attention_heads": 2, "attention_head_dim": 24, "patch_size": 2, "in_channels": 4, "out_channels": 4,
         "num_layers": 2, "cross_attention_dim": 48, "sample_height": 16, "sample_width": 16, "sample_frames": 3,
         "caption_channels": 16},
        lambda: {**_video(), "attention_mask": torch.ones(1, 3, 16, 16), "image_rotary_emb": _allegro_rope()},
        VIDEO_TOKENS,
    ),
    "CosmosTransformer3DModel": Tiny(
        {**_HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "mlp_ratio": 2, "text_embed_dim": 16,
         "adaln_lora_dim": 4, "max_size": (4, 16, 16), "concat_padding_mask": False, "extra_pos_embed_type": None},
        lambda: {**_video(), "timestep": _level(0.5)}, VIDEO_TOKENS,
    ),
    "Kandinsky5Transformer3DModel": Tiny(
        {"in_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 8, "time_dim": 16, "out_visual_dim": 4,
         "model_dim": 32, "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (4, 6, 6)},
        lambda: {"hidden_states": _rand(1, 3, 16, 16, 4), "encoder_hidden_states": _rand(1, 9, 16),
                 "timestep": _level(500), "pooled_projections": _rand(1, 8), "text_rope_pos": torch.arange(9),
                 "visual_rope_pos": [torch.arange(3), torch.arange(8), torch.arange(8)]}, VIDEO_TOKENS,
    ),
    "Kandinsky6Transformer3DModel": Tiny(
        {"in_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 8, "time_dim": 16, "out_visual_dim": 4,
         "model_dim": 32, "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (4, 6, 6),
         "visual_cond": False, "in_audio_dim": 4, "out_audio_dim": 4},
        lambda: {"hidden_states": _rand(1, 3, 16, 16, 4), "encoder_hidden_states": _rand(1, 9, 16),
                 "timestep": _level(500), "pooled_projections": _rand(1, 8)}, VIDEO_TOKENS,
    ),
    "JoyImageEditTransformer3DModel": Tiny(
        {"in_channels": 4, "hidden_size": 32, "num_attention_heads": 2, "text_dim": 16, "num_layers": 2,
         "rope_dim_list": [4, 6, 6]},
        lambda: {**_image(), "hidden_states": _rand(1, 3, 4, 1, 16, 16)}, (3, 8, 8, 0, 9),
    ),
    "FluxTransformer2DModel": Tiny(
        {**_FLUX, "pooled_projection_dim": 8},
        lambda: {**_with_reference(3, 1), "pooled_projections": _rand(1, 8)}, (1, 14, 15, 9, 50),
    ),
    "Flux2Transformer2DModel": Tiny(
        {**_FLUX, "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 16},
        lambda: {**_with_reference(4, 10), "guidance": _level(4)}, (1, 14, 15, 9, 50),
    ),
    "Flux3Transformer2DModel": Tiny(
        {**_without(_FLUX, "patch_size"), "cond_in_channels": 4, "timestep_channels": 16,
         "axes_dims_rope": (4, 4, 4, 4)},
        lambda: {**_packed(4), "image_cond_hidden_states": _rand(1, 20, 4), "image_cond_ids": _ids(4, 5, 1, 4)},
        (1, 14, 15, 9, 20),
    ),
    "ChromaTransformer2DModel": Tiny(
        {**_FLUX, "approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1},
        lambda: {**_packed(), "attention_mask": torch.ones(1, 219)}, (1, 14, 15, 9, 0),
    ),
    "OvisImageTransformer2DModel": Tiny(_FLUX, _packed, (1, 14, 15, 9, 0)),
    "LongCatImageTransformer2DModel": Tiny(_FLUX, _packed, (1, 14, 15, 9, 0)),
    "BriaTransformer2DModel": Tiny(
        {**_FLUX, "pooled_projection_dim": 8}, lambda: {**_packed(), "timestep": _level(500)}, (1, 14, 15, 9, 0),
    ),
    "BriaFiboTransformer2DModel": Tiny(
        {**_FLUX, "text_encoder_dim": 8},
        lambda: {**_packed(), "timestep": _level(500), "text_encoder_layers": [_rand(1, 9, 8), _rand(1, 9, 8)]},
        (1, 14, 15, 9, 0),
    ),
    "Krea2Transformer2DModel": Tiny(
        {**_HEADS, "in_channels": 4, "num_layers": 2, "num_key_value_heads": 1, "intermediate_size": 16,
         "timestep_embed_dim": 8, "text_hidden_dim": 16, "num_text_layers": 2, "text_num_attention_heads": 2,
         "text_num_key_value_heads": 2, "text_intermediate_size": 16, "num_layerwise_text_blocks": 1,
         "num_refiner_text_blocks": 1, "axes_dims_rope": (4, 6, 6)},
        lambda: {"hidden_states": _rand(1, 210, 4), "encoder_hidden_states": _rand(1, 12, 2, 16),
                 "timestep": _level(0.5), "position_ids": torch.cat([torch.zeros(12, 3), _ids(14, 15)]),
                 "encoder_attention_mask": padding_mask(9, width=12).bool()}, (1, 14, 15, 9, 0),
    ),
    "QwenImageTransformer2DModel": Tiny(
        {**_HEADS, "patch_size": 2, "in_channels": 4, "out_channels": 1, "num_layers": 2, "joint_attention_dim": 16,
         "axes_dims_rope": (4, 6, 6)},
        lambda: {"hidden_states": _rand(1, 260, 4), "encoder_hidden_states": _rand(1, 12, 16),
                 "encoder_hidden_states_mask": padding_mask(9, width=12), "timestep": _level(0.5),
                 "img_shapes": [[(1, 14, 15), (1, 5, 10)]]}, (1, 14, 15, 9, 50),
    ),
    "SD3Transformer2DModel": Tiny(
        {**_HEADS, "sample_size": 32, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2,
         "joint_attention_dim": 16, "caption_projection_dim": 32, "pooled_projection_dim": 8,
         "pos_embed_max_size": 32, "dual_attention_layers": (0,)},
        lambda: {**_image(), "pooled_projections": _rand(1, 8)}, (1, 14, 15, 0, 9), layers=3,
    ),
    "AuraFlowTransformer2DModel": Tiny(
        {**_HEADS, "sample_size": 32, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 1,
         "num_single_dit_layers": 1, "joint_attention_dim": 16, "caption_projection_dim": 32,
         "pos_embed_max_size": 256},
        lambda: {**_image(), "timestep": _level(0.5)}, (1, 14, 15, 8 + 9, 0),
    ),
    "HiDreamImageTransformer2DModel": Tiny(
        {**_HEADS, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1,
         "caption_channels": [8, 16], "text_emb_dim": 8, "num_routed_experts": 2, "num_activated_experts": 1,
         "axes_dims_rope": (4, 6, 6), "max_resolution": (30, 30), "llama_layers": [0, 1],
         "force_inference_output": True},
        lambda: {"hidden_states": _rand(1, 4, 28, 30), "timesteps": _level(500), "pooled_embeds": _rand(1, 8),
                 "encoder_hidden_states_t5": _rand(1, 5, 8), "encoder_hidden_states_llama3": _rand(2, 1, 4, 16)},
        (1, 14, 15, 0, 15 * 15 - 14 * 15 + 5 + 2 * 4),
    ),
    "ZImageTransformer2DModel": Tiny(
        {"all_patch_size": (2,), "in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2,
         "n_kv_heads": 2, "cap_feat_dim": 16, "axes_dims": [4, 6, 6], "axes_lens": [256, 64, 64]},
        lambda: {"x": [_rand(4, 1, 28, 30)], "t": _level(0.5), "cap_feats": [_rand(9, 16)]}, (1, 14, 15, 0, 14 + 32),
    ),
    "Lumina2Transformer2DModel": Tiny(
        {"sample_size": 32, "patch_size": 2, "in_channels": 4, "hidden_size": 48, "num_layers": 2,
         "num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 16,
         "axes_dim_rope": (8, 8, 8), "axes_lens": (64, 32, 32), "cap_feat_dim": 16},
        lambda: {"hidden_states": _rand(1, 4, 28, 30), "timestep": _level(0.25),
                 "encoder_hidden_states": _rand(1, 12, 16), "encoder_attention_mask": padding_mask(9, width=12)},
        (1, 14, 15, 9, 0), noise=0.75,
    ),
    "LuminaNextDiT2DModel": Tiny(
        {"sample_size": 16, "patch_size": 2, "in_channels": 4, "hidden_size": 32, "num_layers": 2,
         "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 16, "cross_attention_dim": 16},
        lambda: {**_image(), "timestep": _level(0.5), "encoder_mask": padding_mask(7, width=9),
                 "image_rotary_emb": get_2d_rotary_pos_embed_lumina(16, 384, 384), "cross_attention_kwargs": {}},
        (1, 14, 15, 0, 0),
    ),
    "PixArtTransformer2DModel": Tiny(
        {**_HEADS, "sample_size": 32, "num_layers": 2, "patch_size": 2, "caption_channels": 16, "in_channels": 4,
         "cross_attention_dim": 32},
        lambda: {**_image(), "encoder_attention_mask": padding_mask(7, width=9),
                 "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}, (1, 14, 15, 0, 0),
    ),
    "HunyuanDiT2DModel": Tiny(
        {**_HEADS, "in_channels": 4, "patch_size": 2, "sample_size": 32, "hidden_size": 32, "num_layers": 2,
         "mlp_ratio": 2, "cross_attention_dim": 16, "cross_attention_dim_t5": 8, "pooled_projection_dim": 4,
         "text_len": 9, "text_len_t5": 4, "use_style_cond_and_image_meta_size": False},
        lambda: {**_image(), "text_embedding_mask": torch.ones(1, 9), "encoder_hidden_states_t5": _rand(1, 4, 8),
                 "text_embedding_mask_t5": torch.ones(1, 4)}, (1, 14, 15, 0, 0),
    ),
    "DiTTransformer2DModel": Tiny(
        {**_HEADS, "in_channels": 4, "num_layers": 2, "norm_num_groups": 4, "sample_size": 28,
         "num_embeds_ada_norm": 8},
        lambda: {"hidden_states": _rand(1, 4, 28, 28), "timestep": torch.tensor([500]),
                 "class_labels": torch.tensor([3])}, (1, 14, 14, 0, 0),
    ),
    "CogView3PlusTransformer2DModel": Tiny(
        {**_COGVIEW, "pos_embed_max_size": 16}, lambda: _sized_image("original_size"), (1, 14, 15, 9, 0),
    ),
    "CogView4Transformer2DModel": Tiny(
        {**_COGVIEW, "rope_axes_dim": (16, 16)}, lambda: _sized_image("original_size"), (1, 14, 15, 9, 0),
    ),
    "GlmImageTransformer2DModel": Tiny(
        {**_COGVIEW, "prior_vq_quantizer_codebook_size": 8},
        lambda: {**_sized_image(), "prior_token_id": torch.zeros(1, 210, dtype=torch.long),
                 "prior_token_drop": torch.zeros(1, 210, dtype=torch.bool), "attention_mask": torch.ones(1, 9)},
        (1, 14, 15, 9, 0),
    ),
    "HunyuanImageTransformer2DModel": Tiny(
        {**_HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1,
         "num_refiner_layers": 1, "text_embed_dim": 16, "text_embed_2_dim": 8, "rope_axes_dim": (8, 8)},
        lambda: {"hidden_states": _rand(1, 4, 14, 15), "timestep": _level(500),
                 "encoder_hidden_states": _rand(1, 12, 16), "encoder_attention_mask": padding_mask(9, width=12),
                 "encoder_hidden_states_2": _rand(1, 6, 8), "encoder_attention_mask_2": padding_mask(4, width=6)},
        (1, 14, 15, 0, 9 + 4),
    ),
    "ErnieImageTransformer2DModel": Tiny(
        {"hidden_size": 32, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 32, "in_channels": 4,
         "out_channels": 4, "text_in_dim": 16, "rope_axes_dim": (4, 6, 6)},
        lambda: {"hidden_states": _rand(1, 4, 14, 15), "timestep": _level(500), "text_bth": _rand(1, 12, 16),
                 "text_lens": torch.tensor([9])}, (1, 14, 15, 0, 9),
    ),
}
# fmt: on


class Model(NamedTuple):
    """A tiny transformer with its arguments and what is true of it."""

    transformer: Any
    arguments: Arguments
    tiny: Tiny

    def forward(self, **changed: Any) -> torch.Tensor:
        """One forward without gradients, with some arguments changed."""
        arguments = {**self.arguments, **changed}
        with torch.no_grad():
            out: Any = self.transformer(**arguments, return_dict=False)
        while not isinstance(out, torch.Tensor):
            out = out[0]
        return out


def build(name: str, **config: Any) -> Model:
    """The tiny transformer of a class, in float32."""
    torch.manual_seed(0)
    _generator.manual_seed(1)
    tiny = TINY[name]
    model = getattr(diffusers.models.transformers, name)(**{**tiny.config, **config}).eval()
    for parameter in model.parameters():
        if not parameter.detach().any():  # what starts at zero would hide the attention
            torch.nn.init.normal_(parameter, std=0.1)
    return Model(model, tiny.arguments(), tiny)


@pytest.fixture(params=TINY)
def model(request: pytest.FixtureRequest) -> Model:
    """The tiny transformer of every family in turn."""
    return build(request.param)


@pytest.fixture
def build_model() -> Callable[..., Model]:
    """`build`: makes the tiny transformer of a class."""
    return build
