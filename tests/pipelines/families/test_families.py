"""Every family on a tiny random transformer: read rightly, sparse when asked, and as before afterwards."""

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import diffusers
import diffusers.models.transformers
import pytest
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from sparse_dit.layout import TokenLayout
from sparse_dit.pipelines import families
from sparse_dit.pipelines.families import (
    DENSE_FAMILIES,
    FAMILIES,
    Family,
    Latents,
    Noise,
    dense_family_of,
    family_of,
    family_table,
)
from sparse_dit.pipelines.families.image import IMAGE
from sparse_dit.pipelines.families.video import VIDEO
from sparse_dit.pipelines.patch import disable, enable, explain, summary
from sparse_dit.samples import Layer, Sample

BLOCKS = {"block_q": 16, "block_k": 16}
EVERYTHING = {"selection": {"name": "radial", "density": 1.0}, **BLOCKS}
SPARSE = {"selection": {"name": "radial", "density": 0.4}, **BLOCKS}
# What diffusers keeps in the same folder and is no DiT: blocks of UNets, priors, and whatever makes sound or molecules.
NO_DIT = {
    "DreamLiteTransformer2DModel",
    "DualTransformer2DModel",
    "PriorTransformer",
    "RFD4ProteinaTransformer",
    "T5FilmDecoder",
    "Transformer2DModel",
    "TransformerTemporalModel",
}
SOUND = ("Audio", "Music", "AceStep")


def layout_of(tokens: tuple[int, int, int, int, int]) -> TokenLayout:
    return TokenLayout(tokens[:3], *tokens[3:])


def rounding(reference: torch.Tensor) -> float:
    """Bound on what two float32 orders of summation may differ by after a few layers of gain about one."""
    return 32 * torch.finfo(torch.float32).eps * float(reference.abs().max())


def test_every_family_of_diffusers_has_a_row() -> None:
    exported = {
        name
        for name, value in vars(diffusers.models.transformers).items()
        if inspect.isclass(value) and issubclass(value, ModelMixin) and not any(word in name for word in SOUND)
    }
    assert exported - NO_DIT == FAMILIES.keys() | DENSE_FAMILIES.keys()
    assert not FAMILIES.keys() & DENSE_FAMILIES.keys()


def test_the_arguments_tell_tokens_and_noise(model: Any) -> None:
    family, config = family_of(model.transformer), model.transformer.config
    reading = family.read(model.arguments, config)
    assert [sample.layout for sample in reading.samples] == [layout_of(model.tiny.tokens)]
    assert reading.refusal is None
    if not family.reads:
        assert family.layout(model.arguments, config) == model.tiny.tokens
    assert float(family.noise.level(model.arguments[family.noise.argument], config).max()) == model.tiny.noise


def test_a_family_runs_dense_whole_and_sparse(model: Any) -> None:
    transformer, layers = model.transformer, model.tiny.layers
    stock = model.forward()
    before = [module.processor for module in transformer.modules() if hasattr(module, "processor")]
    enable(transformer, EVERYTHING, strict=True)
    assert (model.forward() - stock).abs().max() <= rounding(stock)
    counts = summary(transformer)
    assert (counts.planned, counts.made, counts.sparse, counts.dense) == (layers, layers, layers, {})
    enable(transformer, SPARSE, strict=True)
    sparse = model.forward()
    assert sparse.isfinite().all()
    assert (sparse - stock).abs().max() > rounding(stock)
    assert summary(transformer).sparse == layers
    assert (summary(transformer).density or 1.0) < 0.8
    enable(transformer, "dense", strict=True)
    assert torch.equal(model.forward(), stock)
    disable(transformer)
    after = [module.processor for module in transformer.modules() if hasattr(module, "processor")]
    assert all(now is then for now, then in zip(after, before, strict=True))
    assert torch.equal(model.forward(), stock)


def poke(model: Any, position: tuple[int, int, int]) -> None:
    """Change the latents of one token of the grid."""
    grid = family_of(model.transformer).grid
    if not isinstance(grid, Latents):
        index = (position[0] * model.tiny.tokens[1] + position[1]) * model.tiny.tokens[2] + position[2]
        model.arguments["hidden_states"][:, index] += 3.0
        return
    held = model.arguments[grid.argument]
    latents = held[0] if isinstance(held, list) else held
    axes = next(names for names in (spelling.split() for spelling in grid.axes) if len(names) == latents.ndim)
    whole = grid.of_latents((60, 60, 60), model.transformer.config)
    patch = dict(zip("thw", (60 // side for side in whole), strict=True))
    place = dict(zip("thw", position, strict=True))
    if "n" in axes:
        patch["n"], place["n"], patch["t"], place["t"] = 1, place["t"], 1, 0
    window = tuple(
        slice(place[name] * patch[name], (place[name] + 1) * patch[name]) if name in place else slice(None)
        for name in axes
    )
    latents[window] += 3.0


@pytest.fixture
def values(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The values [B, S, H, D] of every self-attention call that reaches the engine."""
    seen: list[torch.Tensor] = []
    stock = Layer.call

    def spy(self: Layer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append(v if options["axes"] == "b s h d" else v.transpose(1, 2))
        return stock(self, q, k, v, **options)

    monkeypatch.setattr(Layer, "call", spy)
    return seen


def test_tokens_stand_where_the_layout_says(model: Any, values: list[torch.Tensor]) -> None:
    """A change of one token's latents shows, in the first layer, at that token's place of the sequence."""
    frames, height, width, before, _ = model.tiny.tokens
    # A first layer may see the grid without text. Refiners in front of it spread the change, but little of it.
    alone = next(iter(family_of(model.transformer).attentions(model.transformer)))
    before = 0 if family_of(model.transformer).sees_grid_alone(alone) else before
    # JoyImage puts the last of several pictures, the one it makes, first.
    moved = model.tiny.tokens[0] > 1 and type(model.transformer).__name__ == "JoyImageEditTransformer3DModel"
    enable(model.transformer, SPARSE, strict=True)
    for position in [(0, 0, 0), (frames - 1, height // 2, 1), (frames // 2, height - 1, width - 1)]:
        values.clear()
        model.forward()
        poke(model, position)
        model.forward()
        first, changed = values[0], values[len(values) // 2]
        index = before + ((position[0] + moved) % frames * height + position[1]) * width + position[2]
        assert int((changed - first).norm(dim=(2, 3))[0].argmax()) == index


# Whatever the content, a block computes what is one step away on each axis of the grid, and little else.
NEIGHBOURS = {
    "order": {"name": "tiles", "tile": [1, 4, 4]},
    "selection": {"name": "pooled", "density": 0.01, "adjacent": True},
    **BLOCKS,
}


def plant(v: torch.Tensor, place: slice, grid: tuple[int, int, int], scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys [B, S, H, D], like v, with which a token of the grid attends to those next to it.

    The score of tokens at p and p' is -3 |p - p'|^2 but for a term of the query alone; text is looked at by nobody.
    What is two steps away then has e^-12 of the weight of the token itself.
    """
    points = torch.cartesian_prod(*(torch.arange(side) - side // 2 for side in grid)).to(v)
    q, k = torch.zeros_like(v), torch.zeros_like(v)
    q[..., 3], k[..., 3] = -3.0 / scale, 1e4
    q[:, place, :, :3], k[:, place, :, :3] = (6.0 / scale * points)[:, None], points[:, None]
    k[:, place, :, 3] = points.square().sum(dim=1)[:, None]
    return q, k


@pytest.fixture
def plant_everywhere(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[float]]:
    """Gives every self-attention call such queries and keys; returns how far sparse outputs are from dense ones."""

    def start(turned: bool = False) -> list[float]:
        errors: list[float] = []
        stock = Layer.attend

        def planted(self: Layer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, **options: Any) -> Any:
            read, state = self.tokens.read, self.run.state
            sample = self.tokens.samples[0] if read else Sample(cast(TokenLayout, state.layout))
            first = 0 if self.alone else sample.layout.text_before + sample.gap
            place, grid = slice(first, first + sample.layout.video_tokens), sample.layout.grid
            scale = options["scale"] or v.shape[-1] ** -0.5

            def tokens_first(x: torch.Tensor) -> torch.Tensor:
                return x if options["axes"] == "b s h d" else x.transpose(1, 2)

            q, k = map(tokens_first, plant(tokens_first(v), place, grid[::-1] if turned else grid, scale))
            out: torch.Tensor = stock(self, q, k, v, mask, **options)
            ours, theirs = (tokens_first(x)[:, place] for x in (out, options["dense"](q, k, v, mask)))
            errors.append(float((ours - theirs).norm() / theirs.norm()))
            return out

        monkeypatch.setattr(Layer, "attend", planted)
        return errors

    return start


def test_a_planted_local_pattern_is_reproduced(model: Any, plant_everywhere: Callable[..., list[float]]) -> None:
    enable(model.transformer, NEIGHBOURS, strict=True)
    errors = plant_everywhere()
    model.forward()
    counts = summary(model.transformer)
    assert counts.sparse == len(errors) == model.tiny.layers
    assert (counts.density or 1.0) < 0.98
    assert max(errors) < 2e-3


def test_a_pattern_of_another_grid_is_not(
    build_model: Callable[..., Any], plant_everywhere: Callable[..., list[float]]
) -> None:
    model = build_model("WanTransformer3DModel")
    # Large enough that steps on the axes of the turned grid are far in this one.
    model.arguments["hidden_states"] = torch.randn(1, 4, 5, 32, 24)
    enable(model.transformer, NEIGHBOURS, strict=True)
    errors = plant_everywhere(turned=True)
    model.forward()
    assert min(errors) > 0.02


def test_timesteps_in_every_unit() -> None:
    assert Noise().level(torch.tensor([1000, 250]), {}).tolist() == [1.0, 0.25]
    assert Noise(pure=0.0, clean=1.0).level(torch.tensor([[0.0, 1.0]]), {}).tolist() == [[1.0, 0.0]]
    cosmos = FAMILIES["CosmosTransformer3DModel"].noise
    # Cosmos 1 passes ln(sigma) / 4 and has learned positions; 80 is its largest sigma.
    first = cosmos.level(torch.tensor([80.0, 1.0]).log() / 4, {"extra_pos_embed_type": "learnable"})
    assert torch.allclose(first, torch.tensor([80 / 81, 0.5]))
    assert cosmos.level(torch.tensor(0.25), {"extra_pos_embed_type": None}) == 0.25


def test_explain_tells_grid_text_and_layers(model: Any) -> None:
    family, config = family_of(model.transformer), model.transformer.config
    grid = layout_of(model.tiny.tokens).grid
    latents = next(
        size
        for size in ((grid[0], grid[1] * n, grid[2] * n) for n in (1, 2))
        if family.grid.of_latents(size, config) == grid
    )
    sizes = {"num_frames": latents[0], "height": latents[1], "width": latents[2], "num_inference_steps": 4}
    told = explain(model.transformer, SPARSE, text_tokens=11, **sizes)
    assert (told.grid, told.layers) == (grid, model.tiny.layers)
    assert told.tokens == told.text_before + told.text_after + layout_of((*told.grid, 0, 0)).length
    if family.spans:
        assert getattr(told, f"text_{family.spans[0].side}") >= 11
    assert told.remark == family.remark
    assert f"{told.text_before} before + {told.text_after} after" in str(told)


def test_layers_are_in_execution_order(build_model: Callable[..., Any]) -> None:
    names = [f"transformer_blocks.{block}.attn" for block in range(11)]
    paths = list(family_of(sd3 := build_model("SD3Transformer2DModel", num_layers=11).transformer).attentions(sd3))
    # Eleven blocks: sorted as text, 10 would come before 2. Only the first one has two layers.
    assert paths == [names[0], "transformer_blocks.0.attn2", *names[1:]]
    vace = build_model("WanVACETransformer3DModel").transformer
    assert next(iter(family_of(vace).attentions(vace))) == "vace_blocks.0.attn1"


def test_compiled_blocks_are_found(build_model: Callable[..., Any]) -> None:
    wan = build_model("WanTransformer3DModel", num_layers=3).transformer
    wan.blocks[1] = torch.compile(wan.blocks[1])
    assert list(family_of(wan).attentions(wan)) == [f"blocks.{layer}.attn1" for layer in range(3)]


class Processor:
    def __call__(self, attn: Any, x: torch.Tensor) -> torch.Tensor:
        heads = x.unflatten(2, (2, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = torch.nn.Module()
        self.attn.processor = Processor()


class MyTransformer3DModel(ModelMixin, ConfigMixin):
    """A user's own: its latents are its tokens, the frames come first."""

    @register_to_config
    def __init__(self, patch_size: int = 1) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block(), Block()])

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, timestep: torch.Tensor
    ) -> torch.Tensor:
        x = torch.cat([encoder_hidden_states, hidden_states.movedim(2, -1).flatten(1, 3)], 1)
        for block in self.blocks:
            x = x + block.attn.processor(block.attn, x)
        return x


def test_a_transformer_of_your_own_is_one_more_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "FAMILIES", dict(FAMILIES))
    model = MyTransformer3DModel()
    with pytest.raises(ValueError, match=r"^pipe: MyTransformer3DModel is no known transformer; valid: .*add_family$"):
        family_of(model)
    exec(textwrap.dedent((families.__doc__ or "").split(":\n\n", 1)[1]), {})  # the lines that the documentation shows
    arguments = {
        "hidden_states": torch.randn(1, 3, 32, 9, 7),
        "encoder_hidden_states": torch.randn(1, 5, 32),
        "timestep": torch.tensor([0.5]),
    }
    stock = model(**arguments)
    enable(model, EVERYTHING, strict=True)
    assert (model(**arguments) - stock).abs().max() <= rounding(stock)
    enable(model, SPARSE, strict=True)
    model(**arguments)
    assert summary(model).sparse == 2
    assert explain(model, SPARSE, num_frames=3, height=9, width=7).text_before == 77


def test_a_row_of_your_own_takes_the_place_of_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "FAMILIES", dict(FAMILIES))
    own = replace(FAMILIES["WanTransformer3DModel"], layers=("blocks.*.attn3",))
    families.add_family(own)
    assert families.FAMILIES["WanTransformer3DModel"] is own
    assert list(families.FAMILIES) == list(FAMILIES)


def test_a_subclass_belongs_to_the_family_of_its_base() -> None:
    base = diffusers.models.transformers.WanTransformer3DModel

    class Mine(base):  # type: ignore[misc, valid-type]
        """A user's own variant."""

    assert family_of(Mine.__new__(Mine)) is FAMILIES["WanTransformer3DModel"]


def test_families_that_stay_dense_say_why() -> None:
    model = type("SanaVideoTransformer3DModel", (torch.nn.Module,), {})()
    reason = "its self-attention is linear"
    with pytest.raises(
        ValueError, match=rf"^pipe: SanaVideoTransformer3DModel stays dense: {reason}.*; valid: "
    ) as told:
        enable(model, SPARSE)
    assert "\n" not in str(told.value)
    assert dense_family_of(model) is DENSE_FAMILIES["SanaVideoTransformer3DModel"]
    explained = explain(model, SPARSE, height=64, width=64)
    assert (explained.density, explained.layers) == (1.0, 0)
    assert str(explained).startswith(f"SanaVideoTransformer3DModel stays dense: {reason}")


def test_unknown_models_and_models_without_layers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^pipe: Linear is no known transformer; valid: WanTransformer3DModel, "):
        family_of(torch.nn.Linear(1, 1))
    with pytest.raises(
        ValueError, match=r"^pipe: WanTransformer3DModel without layers; valid: one with blocks\.\*\.attn1$"
    ):
        FAMILIES["WanTransformer3DModel"].attentions(torch.nn.Module())


def test_the_table_in_plain_values() -> None:
    rows = {row["transformer"]: row for row in family_table()}
    assert rows.keys() == FAMILIES.keys() | DENSE_FAMILIES.keys()
    assert rows["QwenImageTransformer2DModel"] == {
        "transformer": "QwenImageTransformer2DModel",
        "models": "Qwen-Image (and Edit, Layered)",
        "kind": "image",
        "layers": ["transformer_blocks.*.attn"],
        "before": ["encoder_hidden_states"],
        "after": ["reference images"],
        "mask": "cut off",
        "timestep": ["timestep", 1.0, 0.0],
        "dense": "",
    }
    masks = {name: rows[name]["mask"] for name in ("CogView4Transformer2DModel", "WanTransformer3DModel")}
    assert masks == {"CogView4Transformer2DModel": "removed", "WanTransformer3DModel": "dense"}
    assert rows["LatteTransformer3DModel"]["dense"].startswith("it attends within a frame")
    assert all(row["layers"] or row["dense"] for row in rows.values())
    # Pictures that are edited or drawn as one frame of a video are pictures.
    of_kind = {kind: {name for name, row in rows.items() if row["kind"] == kind} for kind in ("video", "image")}
    assert {family.transformer for family in IMAGE} | {
        "JoyImageEditTransformer3DModel",
        "JoyImageEditPlusTransformer3DModel",
        "OmniGenTransformer2DModel",
    } <= of_kind["image"]
    assert "Cosmos3OmniTransformer" in of_kind["video"]
    assert {family.transformer for family in VIDEO} - of_kind["video"] == {"JoyImageEditTransformer3DModel"}


def test_a_family_needs_no_more_than_its_patch() -> None:
    image = Family("Image", "", ("a.*.b",), Latents(("one", "two", "two"), axes=("b c h w",)))
    assert image.layout({"hidden_states": torch.zeros(1, 4, 8, 12)}, {"one": 1, "two": 2}) == (1, 4, 6, 0, 0)
    assert Latents(("p",)).read({"hidden_states": torch.zeros(2, 3)}, {}) == (1, 1, 1)
