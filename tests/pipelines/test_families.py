"""The table of model families."""

import pytest
import torch
from diffusers import WanTransformer3DModel

from sparse_dit.pipelines.families import FAMILIES, Family, Latents, Text, family_of


def wan(layers: int = 12) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=1,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=16,
        ffn_dim=8,
        num_layers=layers,
        rope_max_seq_len=16,
    )


def test_wan_layers_are_the_self_attentions_in_execution_order() -> None:
    model = wan()
    attentions = FAMILIES["WanTransformer3DModel"].attentions(model)
    # Twelve layers: sorted as text, 10 would come before 2.
    assert list(attentions) == [f"blocks.{layer}.attn1" for layer in range(12)]
    assert all(attentions[f"blocks.{layer}.attn1"] is model.blocks[layer].attn1 for layer in range(12))


def test_compiled_blocks_are_found() -> None:
    model = wan(3)
    model.blocks[1] = torch.compile(model.blocks[1])
    assert list(family_of(model).attentions(model)) == [f"blocks.{layer}.attn1" for layer in range(3)]


def test_wan_reads_its_grid_from_the_latents() -> None:
    model = wan(1)
    arguments = {"hidden_states": torch.zeros(2, 4, 5, 6, 10), "encoder_hidden_states": torch.zeros(2, 77, 8)}
    assert family_of(model).layout(arguments, model.config) == (5, 3, 5, 0, 0)
    assert family_of(model).grid.of_latents((5, 6, 10), model.config) == (5, 3, 5)


def test_noise_levels_have_one_unit_and_one_direction() -> None:
    family = FAMILIES["WanTransformer3DModel"]
    assert family.noise(torch.tensor([1000, 250])).tolist() == [1.0, 0.25]
    rising = Family("Rising", ("a",), Latents(("p",)), timestep_range=1.0, timestep_rises=True)
    assert rising.noise(torch.tensor([[0.0, 1.0]])).tolist() == [[1.0, 0.0]]


def test_other_families_are_rows_of_data() -> None:
    hunyuan = Family(
        "Joint",
        layers=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
        grid=Latents(patch=("patch_size_t", "patch_size", "patch_size")),
        text=Text("after"),
    )
    arguments = {"hidden_states": torch.zeros(1, 4, 6, 8, 12), "encoder_hidden_states": torch.zeros(1, 9, 8)}
    assert hunyuan.layout(arguments, {"patch_size_t": 2, "patch_size": 4}) == (3, 2, 3, 0, 9)
    image = Family("Image", ("a",), Latents(("one", "two", "two"), axes="b c h w"), text=Text("before"))
    arguments["hidden_states"] = torch.zeros(1, 4, 8, 12)
    assert image.layout(arguments, {"one": 1, "two": 2}) == (1, 4, 6, 9, 0)
    blocks = torch.nn.ModuleList([torch.nn.Module() for _ in range(2)])
    singles = torch.nn.ModuleList([torch.nn.Module() for _ in range(2)])
    for block in (*blocks, *singles):
        block.attn = torch.nn.Identity()
    model = torch.nn.Module()
    model.single_transformer_blocks, model.transformer_blocks = singles, blocks
    assert list(hunyuan.attentions(model)) == [
        "transformer_blocks.0.attn",
        "transformer_blocks.1.attn",
        "single_transformer_blocks.0.attn",
        "single_transformer_blocks.1.attn",
    ]


def test_a_subclass_belongs_to_the_family_of_its_base() -> None:
    class Mine(WanTransformer3DModel):
        """A user's own variant."""

    assert family_of(Mine.__new__(Mine)) is FAMILIES["WanTransformer3DModel"]


def test_unknown_models_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"^pipe: Linear is no known transformer; valid: WanTransformer3DModel$"):
        family_of(torch.nn.Linear(1, 1))


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^pipe: WanTransformer3DModel without layers; valid: one with blocks\.\*\.attn1$"
    ):
        FAMILIES["WanTransformer3DModel"].attentions(torch.nn.Module())
