"""Tiny transformers of the image families, in the order of their table."""

import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

from .tiny import HEADS, Arguments, Tiny, image, level, padding_mask, rand, without

# fmt: off
_FLUX = {
    **HEADS, "patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 16,
    "axes_dims_rope": (4, 4, 8),
}
_COGVIEW = {
    **HEADS, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2, "text_embed_dim": 16,
    "time_embed_dim": 8, "condition_dim": 4,
}
# fmt: on


def _ids(height: int, width: int, image: int = 0, columns: int = 3) -> torch.Tensor:
    """Position ids of the tokens of an image."""
    ids = torch.zeros(height, width, columns)
    ids[..., 0], ids[..., 1], ids[..., 2] = image, torch.arange(height)[:, None], torch.arange(width)
    return ids.flatten(0, 1)


def _packed(columns: int = 3) -> Arguments:
    return {
        "hidden_states": rand(1, 210, 4),
        "timestep": level(0.5),
        "encoder_hidden_states": rand(1, 9, 16),
        "img_ids": _ids(14, 15, columns=columns),
        "txt_ids": torch.zeros(9, columns),
    }


def _with_reference(columns: int, image: int) -> Arguments:
    ids = torch.cat([_ids(14, 15, columns=columns), _ids(5, 10, image, columns)])
    return {**_packed(columns), "hidden_states": rand(1, 260, 4), "img_ids": ids}


def _sized_image(*names: str) -> Arguments:
    return {**image(), **{name: torch.ones(1, 2) for name in ("target_size", "crop_coords", *names)}}


# fmt: off
IMAGE: dict[str, Tiny] = {
    "FluxTransformer2DModel": Tiny(
        {**_FLUX, "pooled_projection_dim": 8},
        lambda: {**_with_reference(3, 1), "pooled_projections": rand(1, 8)}, (1, 14, 15, 9, 50),
    ),
    "Flux2Transformer2DModel": Tiny(
        {**_FLUX, "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 16},
        lambda: {**_with_reference(4, 10), "guidance": level(4)}, (1, 14, 15, 9, 50),
    ),
    "Flux3Transformer2DModel": Tiny(
        {**without(_FLUX, "patch_size"), "cond_in_channels": 4, "timestep_channels": 16,
         "axes_dims_rope": (4, 4, 4, 4)},
        lambda: {**_packed(4), "image_cond_hidden_states": rand(1, 20, 4), "image_cond_ids": _ids(4, 5, 1, 4)},
        (1, 14, 15, 9, 20),
    ),
    "ChromaTransformer2DModel": Tiny(
        {**_FLUX, "approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1},
        lambda: {**_packed(), "attention_mask": torch.ones(1, 219)}, (1, 14, 15, 9, 0),
    ),
    "OvisImageTransformer2DModel": Tiny(_FLUX, _packed, (1, 14, 15, 9, 0)),
    "LongCatImageTransformer2DModel": Tiny(_FLUX, _packed, (1, 14, 15, 9, 0)),
    "BriaTransformer2DModel": Tiny(
        {**_FLUX, "pooled_projection_dim": 8}, lambda: {**_packed(), "timestep": level(500)}, (1, 14, 15, 9, 0),
    ),
    "BriaFiboTransformer2DModel": Tiny(
        {**_FLUX, "text_encoder_dim": 8},
        lambda: {**_packed(), "timestep": level(500), "text_encoder_layers": [rand(1, 9, 8), rand(1, 9, 8)]},
        (1, 14, 15, 9, 0),
    ),
    "Krea2Transformer2DModel": Tiny(
        {**HEADS, "in_channels": 4, "num_layers": 2, "num_key_value_heads": 1, "intermediate_size": 16,
         "timestep_embed_dim": 8, "text_hidden_dim": 16, "num_text_layers": 2, "text_num_attention_heads": 2,
         "text_num_key_value_heads": 2, "text_intermediate_size": 16, "num_layerwise_text_blocks": 1,
         "num_refiner_text_blocks": 1, "axes_dims_rope": (4, 6, 6)},
        lambda: {"hidden_states": rand(1, 210, 4), "encoder_hidden_states": rand(1, 12, 2, 16),
                 "timestep": level(0.5), "position_ids": torch.cat([torch.zeros(12, 3), _ids(14, 15)]),
                 "encoder_attention_mask": padding_mask(9, width=12).bool()}, (1, 14, 15, 9, 0),
    ),
    "QwenImageTransformer2DModel": Tiny(
        {**HEADS, "patch_size": 2, "in_channels": 4, "out_channels": 1, "num_layers": 2, "joint_attention_dim": 16,
         "axes_dims_rope": (4, 6, 6)},
        lambda: {"hidden_states": rand(1, 260, 4), "encoder_hidden_states": rand(1, 12, 16),
                 "encoder_hidden_states_mask": padding_mask(9, width=12), "timestep": level(0.5),
                 "img_shapes": [[(1, 14, 15), (1, 5, 10)]]}, (1, 14, 15, 9, 50),
    ),
    "SD3Transformer2DModel": Tiny(
        {**HEADS, "sample_size": 32, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2,
         "joint_attention_dim": 16, "caption_projection_dim": 32, "pooled_projection_dim": 8,
         "pos_embed_max_size": 32, "dual_attention_layers": (0,)},
        lambda: {**image(), "pooled_projections": rand(1, 8)}, (1, 14, 15, 0, 9), layers=3,
    ),
    "AuraFlowTransformer2DModel": Tiny(
        {**HEADS, "sample_size": 32, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 1,
         "num_single_dit_layers": 1, "joint_attention_dim": 16, "caption_projection_dim": 32,
         "pos_embed_max_size": 256},
        lambda: {**image(), "timestep": level(0.5)}, (1, 14, 15, 8 + 9, 0),
    ),
    "HiDreamImageTransformer2DModel": Tiny(
        {**HEADS, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1,
         "caption_channels": [8, 16], "text_emb_dim": 8, "num_routed_experts": 2, "num_activated_experts": 1,
         "axes_dims_rope": (4, 6, 6), "max_resolution": (30, 30), "llama_layers": [0, 1],
         "force_inference_output": True},
        lambda: {"hidden_states": rand(1, 4, 28, 30), "timesteps": level(500), "pooled_embeds": rand(1, 8),
                 "encoder_hidden_states_t5": rand(1, 5, 8), "encoder_hidden_states_llama3": rand(2, 1, 4, 16)},
        (1, 14, 15, 0, 15 * 15 - 14 * 15 + 5 + 2 * 4),
    ),
    "ZImageTransformer2DModel": Tiny(
        {"all_patch_size": (2,), "in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2,
         "n_kv_heads": 2, "cap_feat_dim": 16, "axes_dims": [4, 6, 6], "axes_lens": [256, 64, 64]},
        lambda: {"x": [rand(4, 1, 28, 30)], "t": level(0.5), "cap_feats": [rand(9, 16)]}, (1, 14, 15, 0, 14 + 32),
    ),
    "Lumina2Transformer2DModel": Tiny(
        {"sample_size": 32, "patch_size": 2, "in_channels": 4, "hidden_size": 48, "num_layers": 2,
         "num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 16,
         "axes_dim_rope": (8, 8, 8), "axes_lens": (64, 32, 32), "cap_feat_dim": 16},
        lambda: {"hidden_states": rand(1, 4, 28, 30), "timestep": level(0.25),
                 "encoder_hidden_states": rand(1, 12, 16), "encoder_attention_mask": padding_mask(9, width=12)},
        (1, 14, 15, 9, 0), noise=0.75,
    ),
    "LuminaNextDiT2DModel": Tiny(
        {"sample_size": 16, "patch_size": 2, "in_channels": 4, "hidden_size": 32, "num_layers": 2,
         "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 16, "cross_attention_dim": 16},
        lambda: {**image(), "timestep": level(0.5), "encoder_mask": padding_mask(7, width=9),
                 "image_rotary_emb": get_2d_rotary_pos_embed_lumina(16, 384, 384), "cross_attention_kwargs": {}},
        (1, 14, 15, 0, 0),
    ),
    "PixArtTransformer2DModel": Tiny(
        {**HEADS, "sample_size": 32, "num_layers": 2, "patch_size": 2, "caption_channels": 16, "in_channels": 4,
         "cross_attention_dim": 32},
        lambda: {**image(), "encoder_attention_mask": padding_mask(7, width=9),
                 "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}, (1, 14, 15, 0, 0),
    ),
    "HunyuanDiT2DModel": Tiny(
        {**HEADS, "in_channels": 4, "patch_size": 2, "sample_size": 32, "hidden_size": 32, "num_layers": 2,
         "mlp_ratio": 2, "cross_attention_dim": 16, "cross_attention_dim_t5": 8, "pooled_projection_dim": 4,
         "text_len": 9, "text_len_t5": 4, "use_style_cond_and_image_meta_size": False},
        lambda: {**image(), "text_embedding_mask": torch.ones(1, 9), "encoder_hidden_states_t5": rand(1, 4, 8),
                 "text_embedding_mask_t5": torch.ones(1, 4)}, (1, 14, 15, 0, 0),
    ),
    "DiTTransformer2DModel": Tiny(
        {**HEADS, "in_channels": 4, "num_layers": 2, "norm_num_groups": 4, "sample_size": 28,
         "num_embeds_ada_norm": 8},
        lambda: {"hidden_states": rand(1, 4, 28, 28), "timestep": torch.tensor([500]),
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
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1,
         "num_refiner_layers": 1, "text_embed_dim": 16, "text_embed_2_dim": 8, "rope_axes_dim": (8, 8)},
        lambda: {"hidden_states": rand(1, 4, 14, 15), "timestep": level(500),
                 "encoder_hidden_states": rand(1, 12, 16), "encoder_attention_mask": padding_mask(9, width=12),
                 "encoder_hidden_states_2": rand(1, 6, 8), "encoder_attention_mask_2": padding_mask(4, width=6)},
        (1, 14, 15, 0, 9 + 4),
    ),
    "ErnieImageTransformer2DModel": Tiny(
        {"hidden_size": 32, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 32, "in_channels": 4,
         "out_channels": 4, "text_in_dim": 16, "rope_axes_dim": (4, 6, 6)},
        lambda: {"hidden_states": rand(1, 4, 14, 15), "timestep": level(500), "text_bth": rand(1, 12, 16),
                 "text_lens": torch.tensor([9])}, (1, 14, 15, 0, 9),
    ),
}
# fmt: on
