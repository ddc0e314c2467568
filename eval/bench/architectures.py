"""Published transformers at published sizes, with random weights: what `bench models` runs."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparse_dit.layout import TokenLayout
from sparse_dit.pipelines.families import family_of

Arguments = dict[str, Any]
Draw = Callable[..., Tensor]
"""Standard normal values of a shape."""

# Of the learned factors of normalized queries and keys. Scores of random weights then have a standard deviation of 3:
# a query leans on few keys, as in trained models, and an error of attention shows in the output.
SHARPNESS = 3.0**0.5
_SHARP = re.compile(r"norm_(added_)?[qk]\.weight$")


@dataclass(frozen=True)
class Architecture:
    """A transformer and the arguments of one forward.

    Args:
        name: of the case.
        transformer: name of the class in diffusers.
        config: of the class, where it differs from its defaults.
        latents: channels, frames, rows and columns of the latents.
        arguments: makes the arguments of a forward.
        blocks: names of its lists of layers, in execution order.
        tiny: what replaces `config` entries, `latents`, `text` and `padding` where only the path is tried.
        timed: of each list so many layers run, the first ones; empty for all. The others stay in memory.
        text: text tokens that the arguments hold.
        padding: how many of them a mask leaves out.
        shrunken: whether this is the tiny size.
    """

    name: str
    transformer: str
    config: Mapping[str, Any]
    latents: tuple[int, int, int, int]
    arguments: Callable[["Architecture", Draw, torch.device], Arguments]
    blocks: tuple[str, ...]
    tiny: Mapping[str, Any]
    timed: tuple[int, ...] = ()
    text: int = 512
    padding: int = 0
    shrunken: bool = False

    def shrunk(self) -> "Architecture":
        """The same classes, code paths and head sizes in a size for any machine."""
        changes = {**self.tiny, "config": {**self.config, **self.tiny["config"]}}
        return replace(self, timed=(1,) * len(self.blocks), shrunken=True, **changes)

    def with_few_tokens(self) -> "Architecture":
        """The same model on few video tokens."""
        return replace(self, latents=self.tiny["latents"])

    def inputs(self, device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
        """Arguments of a forward at half of the noise, on a device."""
        random = torch.Generator(device).manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, device=device, dtype=dtype)

        return self.arguments(self, draw, device)


def _level(value: float, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((1,), value, device=device, dtype=dtype)


def _wan(case: Architecture, draw: Draw, device: torch.device) -> Arguments:
    text = draw(1, case.text, case.config.get("text_dim", 4096))
    return {"hidden_states": draw(1, *case.latents), "timestep": _level(500, device), "encoder_hidden_states": text}


def _hunyuan(case: Architecture, draw: Draw, device: torch.device) -> Arguments:
    text = draw(1, case.text, case.config.get("text_embed_dim", 4096))
    valid = (torch.arange(case.text, device=device) < case.text - case.padding).long()[None]
    latents = draw(1, *case.latents)
    return {
        "hidden_states": latents,
        "timestep": _level(500, device, latents.dtype),
        "encoder_hidden_states": text,
        "encoder_attention_mask": valid,
        "pooled_projections": draw(1, case.config.get("pooled_projection_dim", 768)),
        "guidance": _level(6000, device, latents.dtype),
    }


def _cogvideox(case: Architecture, draw: Draw, device: torch.device) -> Arguments:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    channels, frames, rows, columns = case.latents
    grid = rows // 2, columns // 2
    rotary = get_3d_rotary_pos_embed(
        case.config["attention_head_dim"], ((0, 0), grid), grid, temporal_size=frames, device=device
    )
    return {
        "hidden_states": draw(1, frames, channels, rows, columns),
        "timestep": _level(500, device, torch.int64),
        "encoder_hidden_states": draw(1, case.text, case.config["text_embed_dim"]),
        "image_rotary_emb": rotary,
    }


def _flux(case: Architecture, draw: Draw, device: torch.device) -> Arguments:
    channels, _, rows, columns = case.latents
    ids = torch.zeros(rows // 2, columns // 2, 3, device=device)
    ids[..., 1] += torch.arange(rows // 2, device=device)[:, None]
    ids[..., 2] += torch.arange(columns // 2, device=device)
    latents = draw(1, rows * columns // 4, channels * 4)
    return {
        "hidden_states": latents,
        "timestep": _level(0.5, device, latents.dtype),
        "encoder_hidden_states": draw(1, case.text, case.config.get("joint_attention_dim", 4096)),
        "pooled_projections": draw(1, case.config.get("pooled_projection_dim", 768)),
        "img_ids": ids.flatten(0, 1),
        "txt_ids": torch.zeros(case.text, 3, device=device),
        "guidance": _level(3.5, device),
    }


# fmt: off
_DUAL_AND_SINGLE = ("transformer_blocks", "single_transformer_blocks")
_WAN_TINY = {
    "config": {"num_attention_heads": 2, "ffn_dim": 64, "num_layers": 2, "text_dim": 32},
    "latents": (16, 5, 32, 32), "text": 12,
}
_FLUX = {"guidance_embeds": True}
_FLUX_TINY = {
    "config": {"num_attention_heads": 2, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 32,
               "pooled_projection_dim": 16},
    "latents": (16, 1, 64, 72), "text": 12,
}
WAN_14B = Architecture(
    "wan2.1-14b-720p", "WanTransformer3DModel",
    {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40},
    (16, 21, 90, 160), _wan, ("blocks",), _WAN_TINY, timed=(6,),
)
COGVIDEOX_5B = Architecture(
    "cogvideox-5b-480p", "CogVideoXTransformer3DModel",
    {"num_attention_heads": 48, "attention_head_dim": 64, "num_layers": 42, "in_channels": 16, "out_channels": 16,
     "text_embed_dim": 4096, "time_embed_dim": 512, "use_rotary_positional_embeddings": True, "attention_bias": True},
    (16, 13, 60, 90), _cogvideox, ("transformer_blocks",),
    {"config": {"num_attention_heads": 2, "num_layers": 2, "text_embed_dim": 32, "time_embed_dim": 16},
     "latents": (16, 5, 32, 32), "text": 26}, text=226,
)
FLUX_2048 = Architecture(
    "flux.1-dev-2048px", "FluxTransformer2DModel", _FLUX, (16, 1, 256, 256), _flux, _DUAL_AND_SINGLE, _FLUX_TINY,
)
HUNYUAN = Architecture(
    "hunyuanvideo-720p", "HunyuanVideoTransformer3DModel", {}, (16, 33, 90, 160), _hunyuan, _DUAL_AND_SINGLE,
    {"config": {"num_attention_heads": 2, "num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 1,
                "text_embed_dim": 32, "pooled_projection_dim": 16},
     "latents": (16, 5, 32, 32), "text": 24, "padding": 9}, timed=(2, 4), text=256, padding=156,
)
WAN_1_3B = Architecture(
    "wan2.1-1.3b-480p", "WanTransformer3DModel",
    {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30},
    (16, 21, 60, 104), _wan, ("blocks",), _WAN_TINY,
)
FLUX_1024 = replace(FLUX_2048, name="flux.1-dev-1024px", latents=(16, 1, 128, 128))
# fmt: on

ARCHITECTURES = {case.name: case for case in (WAN_14B, COGVIDEOX_5B, FLUX_2048, HUNYUAN, WAN_1_3B, FLUX_1024)}
"""By name, what matters most first."""


def build(case: Architecture, device: torch.device, dtype: torch.dtype, seed: int) -> torch.nn.Module:
    """The transformer of a case with random weights, as `from_pretrained(torch_dtype=dtype)` would leave a trained one.

    Made where it runs: buffers that are in no checkpoint (rotary tables) are then the constructor's own.

    Args:
        case: what to build.
        device: where.
        dtype: of all weights but those that the class keeps in float32.
        seed: of the weights: normal with variance 1 / fan-in, biases 0, factors of norms 1, but `SHARPNESS` for those
            of queries and keys.
    """
    import diffusers

    cls: Any = getattr(diffusers, case.transformer)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model: torch.nn.Module = cls(**case.config)
    finally:
        torch.set_default_dtype(usual)
    kept = set(cls._keep_in_fp32_modules or ())
    random = torch.Generator(device).manual_seed(seed)
    for name, weight in model.eval().requires_grad_(False).named_parameters():
        if kept & set(name.split(".")):
            weight.data = weight.data.float()
        if weight.ndim > 1:
            weight.normal_(std=(weight.numel() / weight.shape[0]) ** -0.5, generator=random)
        elif name.endswith("bias"):
            weight.zero_()
        else:
            weight.fill_(SHARPNESS if _SHARP.search(name) else 1.0)
    return model


@contextmanager
def first_layers(model: torch.nn.Module, blocks: tuple[str, ...], counts: tuple[int, ...]) -> Iterator[None]:
    """Inside, only the first layers of each list run; the others stay in memory.

    Args:
        model: the transformer.
        blocks: names of its lists of layers.
        counts: how many of each list; empty for all.
    """
    whole = {name: getattr(model, name) for name in blocks}
    for name, count in zip(blocks, counts, strict=False):
        setattr(model, name, torch.nn.ModuleList(list(whole[name])[:count]))
    try:
        yield
    finally:
        for name, layers in whole.items():
            setattr(model, name, layers)


def few(counts: tuple[int, ...], limit: int) -> tuple[int, ...]:
    """Layers of each list, `limit` in all at most, in the proportion of the counts and at least one of each."""
    total = sum(counts)
    return counts if total <= limit else tuple(max(1, math.floor(limit * count / total)) for count in counts)


def layout_of(model: torch.nn.Module, arguments: Arguments) -> TokenLayout:
    """The tokens that count in the self-attention of a forward, as the model's family reads them."""
    family = family_of(model)
    config = dict(model.config)  # type: ignore[arg-type]
    if family.reads:
        return family.read(arguments, config).samples[0].layout
    layout = family.layout(arguments, config)
    return TokenLayout((layout[0], layout[1], layout[2]), *layout[3:])
