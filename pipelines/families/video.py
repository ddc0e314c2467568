"""Video families of diffusers 0.42."""

from sparse_dit.pipelines.families.family import DenseWhen, Family, Noise
from sparse_dit.pipelines.families.sources import History, Latents, PaddedText, Sizes, Text

PATCH = Latents(("patch_size",))
PATCH_BY_SIDES = Latents(("patch_size_t", "patch_size", "patch_size"))
DUAL_AND_SINGLE = ("transformer_blocks.*.attn", "single_transformer_blocks.*.attn")

VIDEO = (
    Family("WanTransformer3DModel", "Wan 2.1, 2.2 (T2V, I2V, TI2V)", ("blocks.*.attn1",), PATCH),
    Family("WanVACETransformer3DModel", "Wan VACE", ("vace_blocks.*.attn1", "blocks.*.attn1"), PATCH),
    Family("WanAnimateTransformer3DModel", "Wan 2.2 Animate", ("blocks.*.attn1",), PATCH),
    Family("ChronoEditTransformer3DModel", "ChronoEdit", ("blocks.*.attn1",), PATCH),
    Family(
        "SkyReelsV2Transformer3DModel",
        "SkyReels V2",
        ("blocks.*.attn1",),
        PATCH,
        remark="block-causal checkpoints (num_frame_per_block > 1): mask",
    ),
    Family("AnyFlowTransformer3DModel", "AnyFlow", ("blocks.*.attn1",), Latents(("patch_size",), axes=("b t c h w",))),
    Family(
        "HeliosTransformer3DModel",
        "Helios",
        ("blocks.*.attn1",),
        PATCH,
        spans=(
            History(
                (
                    ("latents_history_long", "indices_latents_history_long", (4, 8, 8)),
                    ("latents_history_mid", "indices_latents_history_mid", (2, 4, 4)),
                    ("latents_history_short", "indices_latents_history_short", (1, 2, 2)),
                )
            ),
        ),
        shared=(),
    ),
    Family(
        "HunyuanVideoTransformer3DModel",
        "HunyuanVideo (T2V, I2V)",
        DUAL_AND_SINGLE,
        PATCH_BY_SIDES,
        spans=(PaddedText("after", 256, compacts=True),),
        padded=True,
    ),
    Family(
        "HunyuanVideoFramepackTransformer3DModel",
        "HunyuanVideo FramePack",
        DUAL_AND_SINGLE,
        PATCH_BY_SIDES,
        spans=(
            PaddedText("after", 256, compacts=True),
            Text("after", 729, "image_embeds"),
            History(
                (
                    ("latents_history_4x", "indices_latents_history_4x", (4, 8, 8)),
                    ("latents_history_2x", "indices_latents_history_2x", (2, 4, 4)),
                    ("latents_clean", "indices_latents_clean", (1, 2, 2)),
                )
            ),
        ),
        padded=True,
    ),
    Family(
        "HunyuanVideo15Transformer3DModel",
        "HunyuanVideo 1.5",
        ("transformer_blocks.*.attn",),
        PATCH_BY_SIDES,
        spans=(
            PaddedText("after", 256, compacts=True),
            PaddedText("after", 0, "encoder_attention_mask_2", "encoder_hidden_states_2", compacts=True),
            Text("after", 0, "image_embeds", only_nonzero=True),
        ),
        padded=True,
    ),
    Family(
        "MotifVideoTransformer3DModel",
        "Motif-Video",
        DUAL_AND_SINGLE,
        PATCH_BY_SIDES,
        spans=(PaddedText("after", 512), Text("after", 0, "image_embeds")),
        padded=True,
        remark="its decoder layers, which join two videos: unknown_grid",
    ),
    Family(
        "CogVideoXTransformer3DModel",
        "CogVideoX, CogVideoX 1.5 (T2V, I2V)",
        ("transformer_blocks.*.attn1",),
        Latents(("patch_size_t", "patch_size", "patch_size"), axes=("b t c h w",)),
        spans=(Text("before", 226),),
    ),
    Family(
        "ConsisIDTransformer3DModel",
        "ConsisID",
        ("transformer_blocks.*.attn1",),
        Latents((1, "patch_size", "patch_size"), axes=("b t c h w",)),
        spans=(Text("before", 226),),
    ),
    Family(
        "EasyAnimateTransformer3DModel",
        "EasyAnimate",
        ("transformer_blocks.*.attn1",),
        Latents((1, "patch_size", "patch_size")),
        spans=(Text("before", 256), Text("before", 0, "encoder_hidden_states_t5")),
    ),
    Family(
        "MochiTransformer3DModel",
        "Mochi 1",
        ("transformer_blocks.*.attn1",),
        Latents((1, "patch_size", "patch_size")),
        spans=(PaddedText("after", 256, compacts=True),),
        noise=Noise(pure=0.0, clean=1000.0),
        apart=True,
    ),
    Family(
        "LTXVideoTransformer3DModel",
        "LTX-Video",
        ("transformer_blocks.*.attn1",),
        Sizes(),
        remark="condition tokens in front of the grid (LTXConditionPipeline): unknown_grid",
    ),
    Family(
        "LTX2VideoTransformer3DModel",
        "LTX-2",
        ("transformer_blocks.*.attn1",),
        Sizes(),
        remark="attention of the audio and between video and audio, which is not counted",
    ),
    Family(
        "AllegroTransformer3DModel",
        "Allegro",
        ("transformer_blocks.*.attn1",),
        PATCH_BY_SIDES,
        uniform="attention_mask",
        remark="videos with padding: mask",
    ),
    Family(
        "CosmosTransformer3DModel",
        "Cosmos 1, 2, 2.5 (Predict, Transfer)",
        ("transformer_blocks.*.attn1",),
        PATCH,
        noise=Noise(pure=1.0, sigmoid_if="extra_pos_embed_type"),
    ),
    Family(
        "Kandinsky5Transformer3DModel",
        "Kandinsky 5",
        ("visual_transformer_blocks.*.self_attention",),
        Latents(("patch_size",), axes=("b t h w c",)),
        dense_when=(DenseWhen("sparse_params", "own_sparsity"),),
        remark="10-second checkpoints, which bring sparse attention of their own (NABLA): mask",
    ),
    Family(
        "Kandinsky6Transformer3DModel",
        "Kandinsky 6",
        ("visual_transformer_blocks.*.video_dec_block.self_attention", "visual_transformer_blocks.*.self_attention"),
        Latents(("patch_size",), axes=("b t h w c",)),
        remark="attention of the audio and between video and audio, which is not counted",
    ),
    Family(
        "JoyImageEditTransformer3DModel",
        "JoyImage Edit",
        ("double_blocks.*.attn",),
        Latents(("patch_size",), axes=("b c t h w", "b n c t h w")),
        spans=(Text("after", 512),),
    ),
)
