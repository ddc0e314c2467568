"""What a row of the table tells of a forward, piece by piece, with answers known by hand."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

from sparse_dit.layout import TokenLayout
from sparse_dit.pipelines.families import (
    FAMILIES,
    GridPadding,
    History,
    Latents,
    PaddedText,
    Positions,
    References,
    family_of,
)
from sparse_dit.pipelines.families.sources import UNTOLD
from sparse_dit.pipelines.patch import explain
from sparse_dit.skipped import Reuse

SPARSE = {"selection": {"name": "radial", "density": 0.4}, "block_q": 16, "block_k": 16}


def test_explain_knows_levels_that_are_told_as_logarithms(build_model: Callable[..., Any]) -> None:
    cosmos = build_model("CosmosTransformer3DModel", extra_pos_embed_type="learnable").transformer
    pipe = SimpleNamespace(transformer=cosmos, scheduler=diffusers.EDMEulerScheduler(), vae_scale_factor=8)
    told = explain(pipe, SPARSE, height=128, width=128, num_frames=1, num_inference_steps=4)
    sigmas = diffusers.EDMEulerScheduler()
    sigmas.set_timesteps(4)
    assert [step.noise for step in told.steps] == pytest.approx([float(s / (s + 1)) for s in sigmas.sigmas[:4]])


def test_explain_finds_the_head_size_in_a_width_of_all_heads(build_model: Callable[..., Any]) -> None:
    recipe = {**SPARSE, "skipped": {"name": "reuse", "ratio": False}, "schedule": {"refresh_every": 2}}
    kept = []
    for recipe_or_less in (recipe, SPARSE):
        told = explain(
            build_model("ErnieImageTransformer2DModel").transformer,  # 32 channels, which are those of 2 heads
            recipe_or_less, height=14, width=15, text_tokens=9, num_inference_steps=4,
        )  # fmt: skip
        kept.append(told.state_bytes)
    cache = Reuse(ratio=False).kept_bytes(TokenLayout((1, 14, 15), 0, 9), batch=1, heads=2, head_size=16, itemsize=2)
    assert kept[0] - kept[1] == 2 * cache > 0


def test_patches_of_time_are_rounded_up_and_those_of_space_down() -> None:
    cogvideo = FAMILIES["CogVideoXTransformer3DModel"].grid
    assert cogvideo.of_latents((5, 9, 6), {"patch_size_t": 2, "patch_size": 2}) == (3, 4, 3)
    assert cogvideo.of_latents((5, 9, 6), {"patch_size_t": None, "patch_size": 2}) == (5, 4, 3)
    assert Latents(("patch_size",)).of_latents((3, 8, 12), {"patch_size": (2, 4)}) == (3, 4, 3)


def positions(*images: tuple[int, int, int, int]) -> torch.Tensor:
    """Position ids [S, 3] of images, each by its number, first row, height and width."""
    return torch.cat(
        [
            torch.cartesian_prod(torch.tensor([number]), torch.arange(first, first + height), torch.arange(width))
            for number, first, height, width in images
        ]
    )


@pytest.mark.parametrize(
    ("ids", "grid"),
    [
        (positions((0, 0, 3, 4), (1, 0, 5, 6)), (1, 3, 4)),  # a reference that is larger than the image
        (positions((0, 7, 3, 4)), (1, 3, 4)),  # rows that do not begin at 0
        (positions((0, 0, 3, 4), (1, 0, 2, 2), (0, 3, 1, 4)), (1, 3, 4)),  # the number comes again behind a reference
        (positions((0, 0, 3, 4))[[0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11]], UNTOLD),  # a token is missing
    ],
)
def test_position_ids_tell_the_grid(ids: torch.Tensor, grid: tuple[int, int, int]) -> None:
    assert Positions().read({"img_ids": ids}, {}) == grid
    assert Positions().read({"img_ids": ids[None].float()}, {}) == grid


def test_spans_count_what_takes_part() -> None:
    grid = (1, 3, 4)
    weights = {"encoder_attention_mask": torch.tensor([[2, 2, 0], [7, 0, 0]])}
    assert PaddedText("after", 0).tokens(weights, {}, grid) == (2, 1)
    holes = {"encoder_attention_mask": torch.tensor([[1, 0, 1]])}
    assert PaddedText("after", 0).refusal(holes) == "mask_with_holes"
    assert PaddedText("after", 0, compacts=True).refusal(holes) is None
    stretch = History((("latents", "indices", (1, 2, 2)),))
    held = {"latents": torch.zeros(1, 4, 2, 3, 5), "indices": torch.zeros(2)}  # half a patch at each end counts as one
    assert stretch.tokens(held, {}, grid) == (2 * 2 * 3,)
    assert stretch.tokens({**held, "indices": None}, {}, grid) == (0,)
    config = {"max_resolution": (16, 8), "patch_size": 2}
    assert GridPadding(0).tokens({}, config, (1, 3, 4)) == (32 - 12,)
    assert GridPadding(0).tokens({}, config, (1, 4, 4)) == (0,)
    for tokens, references in ((17, 5), (12, 0), (7, 0)):
        assert References().tokens({"hidden_states": torch.zeros(1, tokens, 2)}, {}, grid) == (references,)


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("HeliosTransformer3DModel", ("patch_long", "patch_mid", "patch_short")),
        ("HunyuanVideoFramepackTransformer3DModel", ("proj_4x", "proj_2x", "proj")),
    ],
)
def test_history_is_cut_into_the_patches_of_the_model(
    name: str, modules: tuple[str, ...], build_model: Callable[..., Any]
) -> None:
    transformer = build_model(name).transformer
    embedder = getattr(transformer, "clean_x_embedder", transformer)
    [history] = [span for span in family_of(transformer).spans if isinstance(span, History)]
    assert [patch for _, _, patch in history.stretches] == [getattr(embedder, name).kernel_size for name in modules]


@pytest.mark.parametrize(
    ("name", "argument", "reason"),
    [
        ("Flux2Transformer2DModel", "kv_cache_mode", "reference_cache"),
        ("ZImageTransformer2DModel", "siglip_feats", "omni"),
        ("Kandinsky5Transformer3DModel", "sparse_params", "own_sparsity"),
        ("GlmImageTransformer2DModel", "kv_caches", "reference_cache"),
    ],
)
def test_ways_of_calling_that_stay_dense(
    name: str, argument: str, reason: str, build_model: Callable[..., Any]
) -> None:
    model = build_model(name)
    family, config = family_of(model.transformer), model.transformer.config
    assert family.read({**model.arguments, argument: object()}, config).refusal == reason
    assert family.read({**model.arguments, argument: None}, config).refusal is None
