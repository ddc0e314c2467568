"""Tiny transformers of the video families, in the order of their table."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

from .tiny import HEADS, Arguments, Tiny, image, level, padding_mask, rand, without

# fmt: off
_WAN = {
    **HEADS, "patch_size": (1, 2, 2), "in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 16,
    "ffn_dim": 16, "num_layers": 2, "rope_max_seq_len": 32,
}
_HELIOS = {**without(_WAN, "rope_max_seq_len"), "rope_dim": (4, 6, 6)}
_HUNYUAN = {
    **HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1,
    "patch_size": 2, "patch_size_t": 1, "text_embed_dim": 16, "pooled_projection_dim": 8, "rope_axes_dim": (4, 6, 6),
}
_COGVIDEO = {
    **HEADS, "in_channels": 4, "out_channels": 4, "time_embed_dim": 4, "text_embed_dim": 16, "num_layers": 2,
    "sample_width": 16, "sample_height": 16, "sample_frames": 9, "patch_size": 2, "max_text_seq_length": 10,
}
# fmt: on


def _allegro_rope() -> tuple[Any, Any]:
    freqs_and_grids = get_3d_rotary_pos_embed_allegro(
        embed_dim=24, crops_coords=((0, 0), (8, 8)), grid_size=(8, 8), temporal_size=3, interpolation_scale=(1, 1, 1)
    )
    grids = torch.cartesian_prod(*(grid.long() for grid in freqs_and_grids[3:]))
    return freqs_and_grids[:3], tuple(grids.T[:, None])


def _video() -> Arguments:
    return {"hidden_states": rand(1, 4, 3, 16, 16), "timestep": level(500), "encoder_hidden_states": rand(1, 7, 16)}


def _padded_video() -> Arguments:
    text = {"encoder_hidden_states": rand(1, 12, 16), "encoder_attention_mask": padding_mask(9, width=12)}
    return {**_video(), **text, "pooled_projections": rand(1, 8), "guidance": level(6000)}


def _frames_first() -> Arguments:
    text = rand(1, 10, 16)
    return {"hidden_states": rand(1, 3, 4, 16, 16), "timestep": level(500), "encoder_hidden_states": text}


def _history(names: Mapping[str, int]) -> Arguments:
    latents = {f"latents_{name}": rand(1, 4, frames, 16, 16) for name, frames in names.items()}
    return latents | {f"indices_latents_{name}": torch.arange(frames) for name, frames in names.items()}


# fmt: off
VIDEO_TOKENS = (3, 8, 8, 0, 0)
VIDEO: dict[str, Tiny] = {
    "WanTransformer3DModel": Tiny(_WAN, _video, VIDEO_TOKENS),
    "WanVACETransformer3DModel": Tiny(
        {**_WAN, "vace_layers": [0], "vace_in_channels": 8},
        lambda: {**_video(), "control_hidden_states": rand(1, 8, 3, 16, 16)}, VIDEO_TOKENS, layers=3,
    ),
    "WanAnimateTransformer3DModel": Tiny(
        {**_WAN, "in_channels": 12, "latent_channels": 4, "image_dim": None, "motion_encoder_size": 16,
         "motion_encoder_channel_sizes": {"4": 4, "8": 4, "16": 4}, "motion_style_dim": 8, "motion_dim": 4,
         "motion_encoder_dim": 8, "face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2,
         "inject_face_latents_blocks": 2},
        lambda: {**_video(), "hidden_states": rand(1, 12, 4, 16, 12), "pose_hidden_states": rand(1, 4, 3, 16, 12),
                 "face_pixel_values": rand(1, 3, 9, 16, 16)}, (4, 8, 6, 0, 0),
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
        lambda: {**_padded_video(), "image_embeds": rand(1, 5, 8), "indices_latents": torch.arange(3),
                 **_history({"clean": 2, "history_2x": 2, "history_4x": 4})}, (3, 8, 8, 2 * 64 + 16 + 4, 5 + 9),
    ),
    "HunyuanVideo15Transformer3DModel": Tiny(
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_refiner_layers": 1, "target_size": 16,
         "text_embed_dim": 16, "text_embed_2_dim": 8, "image_embed_dim": 8, "rope_axes_dim": (4, 6, 6)},
        lambda: {"hidden_states": rand(1, 4, 3, 8, 8), "timestep": level(500),
                 "encoder_hidden_states": rand(1, 12, 16), "encoder_attention_mask": padding_mask(9, width=12),
                 "encoder_hidden_states_2": rand(1, 6, 8), "encoder_attention_mask_2": padding_mask(4, width=6),
                 "image_embeds": torch.zeros(1, 5, 8)}, (3, 8, 8, 0, 9 + 4),
    ),
    "MotifVideoTransformer3DModel": Tiny(
        without(_HUNYUAN, "num_refiner_layers", "pooled_projection_dim"),
        lambda: without(_padded_video(), "pooled_projections", "guidance"), (3, 8, 8, 0, 9),
    ),
    "CogVideoXTransformer3DModel": Tiny(_COGVIDEO, _frames_first, (3, 8, 8, 10, 0)),
    "ConsisIDTransformer3DModel": Tiny(_COGVIDEO, _frames_first, (3, 8, 8, 10, 0)),
    "EasyAnimateTransformer3DModel": Tiny(
        {**HEADS, "in_channels": 4, "out_channels": 4, "patch_size": 2, "sample_width": 16, "sample_height": 16,
         "num_layers": 2, "mmdit_layers": 2, "time_embed_dim": 8, "text_embed_dim": 16}, _video, (3, 8, 8, 7, 0),
    ),
    "MochiTransformer3DModel": Tiny(
        {**HEADS, "patch_size": 2, "num_layers": 2, "pooled_projection_dim": 16, "in_channels": 4,
         "text_embed_dim": 16, "time_embed_dim": 4, "max_sequence_length": 12},
        lambda: {**_video(), "timestep": level(250), "encoder_hidden_states": rand(1, 12, 16),
                 "encoder_attention_mask": padding_mask(9, width=12).bool()}, (3, 8, 8, 0, 9), noise=0.75,
    ),
    "LTXVideoTransformer3DModel": Tiny(
        {**HEADS, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 32, "num_layers": 2,
         "caption_channels": 16},
        lambda: {"hidden_states": rand(1, 210, 4), "timestep": level(500), "encoder_hidden_states": rand(1, 9, 16),
                 "encoder_attention_mask": padding_mask(7, width=9), "num_frames": 3, "height": 7, "width": 10},
        (3, 7, 10, 0, 0),
    ),
    "LTX2VideoTransformer3DModel": Tiny(
        {**HEADS, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 32, "num_layers": 2,
         "caption_channels": 16, "audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2,
         "audio_attention_head_dim": 8, "audio_cross_attention_dim": 16, "use_prompt_adaln_single": False},
        lambda: {"hidden_states": rand(1, 210, 4), "audio_hidden_states": rand(1, 6, 4), "timestep": level(500),
                 "encoder_hidden_states": rand(1, 9, 16), "audio_encoder_hidden_states": rand(1, 9, 16),
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
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "mlp_ratio": 2, "text_embed_dim": 16,
         "adaln_lora_dim": 4, "max_size": (4, 16, 16), "concat_padding_mask": False, "extra_pos_embed_type": None},
        lambda: {**_video(), "timestep": level(0.5)}, VIDEO_TOKENS,
    ),
    "Kandinsky5Transformer3DModel": Tiny(
        {"in_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 8, "time_dim": 16, "out_visual_dim": 4,
         "model_dim": 32, "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (4, 6, 6)},
        lambda: {"hidden_states": rand(1, 3, 16, 16, 4), "encoder_hidden_states": rand(1, 9, 16),
                 "timestep": level(500), "pooled_projections": rand(1, 8), "text_rope_pos": torch.arange(9),
                 "visual_rope_pos": [torch.arange(3), torch.arange(8), torch.arange(8)]}, VIDEO_TOKENS,
    ),
    "Kandinsky6Transformer3DModel": Tiny(
        {"in_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 8, "time_dim": 16, "out_visual_dim": 4,
         "model_dim": 32, "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (4, 6, 6),
         "visual_cond": False, "in_audio_dim": 4, "out_audio_dim": 4},
        lambda: {"hidden_states": rand(1, 3, 16, 16, 4), "encoder_hidden_states": rand(1, 9, 16),
                 "timestep": level(500), "pooled_projections": rand(1, 8)}, VIDEO_TOKENS,
    ),
    "JoyImageEditTransformer3DModel": Tiny(
        {"in_channels": 4, "hidden_size": 32, "num_attention_heads": 2, "text_dim": 16, "num_layers": 2,
         "rope_dim_list": [4, 6, 6]},
        lambda: {**image(), "hidden_states": rand(1, 3, 4, 1, 16, 16)}, (3, 8, 8, 0, 9),
    ),
}
# fmt: on
