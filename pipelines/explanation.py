"""What a recipe would do in a pipeline, told without running it."""

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from sparse_dit.engine import Run
from sparse_dit.forecast import forecast, whole_steps
from sparse_dit.layout import TokenLayout
from sparse_dit.pipelines.families import Family, dense_family_of, family_of
from sparse_dit.pipelines.families.sources import Grid
from sparse_dit.pipelines.transformers import layers_of, transformers_of
from sparse_dit.recipe import Recipe, load_recipe

RecipeLike = str | Path | Mapping[str, Any] | Recipe

# What pipelines call the factors by which their VAE compresses.
SPATIAL = ("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_spatial_scale_factor", "vae_scale_factor")
# What attention modules call their number of heads, and configurations the width of all of them together.
HEADS = ("heads", "num_heads", "num_attention_heads")
WIDTHS = ("hidden_size", "dim", "model_dim", "patch_size")
TEMPORAL = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_temporal_scale_factor")


@dataclass(frozen=True)
class StepPlan:
    """What one denoising step does.

    Attributes:
        step: from 0.
        noise: noise level in [0, 1].
        sparse_layers: number of self-attention layers that run sparse.
        dense_layers: number of self-attention layers that run dense, by reason; `refresh` where a search or a cache
            needs the whole attention.
    """

    step: int
    noise: float
    sparse_layers: int
    dense_layers: dict[str, int]


@dataclass(frozen=True)
class Explanation:
    """What a recipe would do in a pipeline at a size, without running it.

    Attributes:
        model: class of the transformer.
        recipe: the recipe in plain values.
        remark: what stays dense in this family whatever the recipe; empty where nothing does.
        grid: (T, H, W), video tokens; zeros for a family that must stay dense.
        text_before, text_after: text tokens in the self-attention.
        tokens: length of the sequence.
        layers: self-attention layers of the transformer.
        block_q, block_k: tokens of a block.
        blocks: (query blocks, key blocks).
        density: computed tile area over full area of a sparse call; `None` when the content decides.
        run_density: mean density over all steps and layers, dense ones counted as 1; `None` when the content decides.
        summary_density: what summaries of skipped blocks add to the density of a sparse call, at most.
        state_bytes: bytes of block lists and of what layers keep between steps, in bfloat16 and for one sample; both
            branches of classifier-free guidance where the pipeline has it.
        steps: the plan, one entry a step.
    """

    model: str
    recipe: dict[str, Any]
    remark: str
    grid: tuple[int, int, int]
    text_before: int
    text_after: int
    tokens: int
    layers: int
    block_q: int
    block_k: int
    blocks: tuple[int, int]
    density: float | None
    run_density: float | None
    summary_density: float
    state_bytes: int
    steps: tuple[StepPlan, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def __str__(self) -> str:
        if not self.layers:
            return f"{self.model} stays dense: {self.remark}"
        video = " x ".join(map(str, self.grid))
        text = f"{self.text_before} before + {self.text_after} after"
        skip = self.recipe.get("pv_threshold")
        lines = [
            f"{self.model}, recipe {self.recipe['name']}",
            f"tokens       {self.tokens} = {video} video + text ({text})",
            f"blocks       {self.blocks[0]} x {self.blocks[1]} of {self.block_q} x {self.block_k} tokens",
            f"density      {_told(self.density)} in sparse calls, {_told(self.run_density)} over the run",
            *([f"summaries    {self.summary_density:.4f} more density at most"] if self.summary_density else []),
            *([f"values       left out more than {skip:g} below the maximum"] if skip else []),
            f"state        {self.state_bytes} bytes",
            *([f"dense        {self.remark}"] if self.remark else []),
        ]
        for what, group in groupby(self.steps, key=lambda step: (step.sparse_layers, step.dense_layers)):
            steps = list(group)
            span = f"{steps[0].step}" if len(steps) == 1 else f"{steps[0].step}-{steps[-1].step}"
            dense = "".join(f", {count} dense ({reason})" for reason, count in what[1].items())
            lines.append(f"steps {span:<7}{what[0]} of {self.layers} layers sparse{dense}")
        return "\n".join(lines)


def explain(
    pipe: Any,
    recipe: RecipeLike,
    *,
    height: int,
    width: int,
    num_frames: int = 1,
    num_inference_steps: int = 50,
    text_tokens: int | None = None,
) -> Explanation:
    """What a recipe would do in a pipeline at a size, without running it.

    Args:
        pipe: a diffusers pipeline, or a bare transformer; it is not changed.
        recipe: as `enable`.
        height, width: of the video or image, in pixels; for a bare transformer of its latents.
        num_frames: frames of the video, one more than a multiple of the VAE's factor (other numbers are read as Wan's
            pipeline rounds them); for a bare transformer of its latents.
        num_inference_steps: denoising steps. Their noise levels are the scheduler's own; some pipelines (FLUX,
            Qwen-Image, LTX, HunyuanVideo, Mochi) pass others, which differ by less than a step. A bare transformer
            knows no schedule: its noise levels fall evenly.
        text_tokens: text tokens of the prompt in the self-attention; `None` is what is usual for the model.

    Raises:
        ValueError: as `enable`, and for a size below 1 or below one token; one line. A family that must stay dense is
            explained, not refused.
    """
    chosen = load_recipe(recipe)
    transformer: Any = next(iter(transformers_of(pipe).values()))
    if refused := dense_family_of(transformer):
        return _stays_dense(transformer, chosen, refused.reason)
    family = family_of(transformer)
    _check_sizes(height=height, width=width, num_frames=num_frames, num_inference_steps=num_inference_steps)
    grid = _grid(pipe, transformer, family, num_frames, height, width)
    layout = family.usual_layout(grid, transformer.config, text_tokens)
    attentions = list(layers_of(transformer, family, chosen).values())
    layers = len(attentions)
    steps = _step_plans(chosen, layout, layers, _noise_levels(pipe, family, num_inference_steps))
    # Asked of the class: on a pipeline that has not run yet this property has nothing to read, and is not there.
    branches = 2 if hasattr(type(pipe), "do_classifier_free_guidance") else 1
    shape = (1, *_heads(attentions[0], transformer.config, layout.length))
    told = forecast(chosen, layout, layers=layers, branches=branches, shape=shape, dtype=torch.bfloat16)
    sparse_share = sum(step.sparse_layers for step in steps) / (layers * len(steps))
    return Explanation(
        **_common(transformer, chosen, family.remark),
        grid=layout.grid,
        text_before=layout.text_before,
        text_after=layout.text_after,
        tokens=layout.length,
        layers=layers,
        blocks=(-(-layout.length // chosen.block_q), -(-layout.length // chosen.block_k)),
        density=told.density,
        run_density=None if told.density is None else 1.0 - sparse_share * (1.0 - told.density),
        summary_density=told.summary_density,
        state_bytes=told.state_bytes,
        steps=steps,
    )


def _stays_dense(transformer: object, recipe: Recipe, reason: str) -> Explanation:
    return Explanation(
        **_common(transformer, recipe, reason),
        grid=(0, 0, 0),
        text_before=0,
        text_after=0,
        tokens=0,
        layers=0,
        blocks=(0, 0),
        density=1.0,
        run_density=1.0,
        summary_density=0.0,
        state_bytes=0,
        steps=(),
    )


def _common(transformer: object, recipe: Recipe, remark: str) -> dict[str, Any]:
    """What stands in every explanation, by field."""
    return {
        "model": type(transformer).__name__,
        "recipe": recipe.to_dict(),
        "remark": remark,
        "block_q": recipe.block_q,
        "block_k": recipe.block_k,
    }


def _told(density: float | None) -> str:
    return "as the content decides" if density is None else f"{density:.4f}"


def _heads(attention: Any, config: Any, tokens: int) -> tuple[int, int, int]:
    """(heads, tokens, head size) of a self-attention call."""
    heads = next((getattr(attention, name) for name in HEADS if hasattr(attention, name)), 1)
    size = config.get("attention_head_dim")
    if size is None:
        wide = next(value for value in (config.get(name) for name in WIDTHS) if value is not None)
        size = wide // heads
    return heads, tokens, size


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}: {size!r}; valid: a positive whole number")


def _grid(pipe: Any, transformer: Any, family: Family, num_frames: int, height: int, width: int) -> Grid:
    """(T, H, W), video tokens for a size in pixels, or of latents for a bare transformer."""
    latents = (num_frames, height, width)
    if pipe is not transformer:
        latents = _latent_size(pipe, *latents)
    grid = family.grid.of_latents(latents, transformer.config)
    for name, size, side in zip(("num_frames", "height", "width"), (num_frames, height, width), grid, strict=True):
        if side < 1:
            raise ValueError(f"{name}: {size!r} is less than one token of {type(transformer).__name__}; valid: more")
    return grid


def _latent_size(pipe: Any, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Frames, rows and columns of the latents for a size in pixels."""
    spatial = next((getattr(pipe, name) for name in SPATIAL if hasattr(pipe, name)), None)
    if spatial is None:
        raise ValueError(f"pipe: {type(pipe).__name__} does not tell the latent size; valid: its transformer")
    temporal = next((getattr(pipe, name) for name in TEMPORAL if hasattr(pipe, name)), 1)
    # Wan's pipelines round to one more than a multiple of the VAE's factor, as this does; others take no other numbers,
    # or round them down.
    frames = num_frames // temporal + 1 if temporal > 1 else num_frames
    return frames, height // spatial, width // spatial


def _noise_levels(pipe: Any, family: Family, num_inference_steps: int) -> list[float]:
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None:
        return [1.0 - step / num_inference_steps for step in range(num_inference_steps)]
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(num_inference_steps)
    config = pipe.transformer.config
    if family.noise.sigmoid_if and config.get(family.noise.sigmoid_if):
        levels = family.noise.level(scheduler.timesteps, config)
    else:
        levels = scheduler.timesteps.float() / scheduler.config.get("num_train_timesteps", 1000)
        if scheduler.config.get("invert_sigmas"):
            levels = 1.0 - levels
    told: list[float] = levels.tolist()
    return told


def _step_plans(recipe: Recipe, layout: TokenLayout, layers: int, noises: list[float]) -> tuple[StepPlan, ...]:
    run = Run(recipe)
    run.state.layout = layout
    reasons: list[list[str | None]] = []
    for run.state.step, run.state.noise in enumerate(noises):
        reasons.append([run.dense_reason(layer, layout.length) for layer in range(layers)])
    for layer in range(layers):
        for step in whole_steps(recipe, [step for step, told in enumerate(reasons) if told[layer] is None]):
            reasons[step][layer] = "refresh"
    return tuple(
        StepPlan(
            step, noise, told.count(None), {why: told.count(why) for why in dict.fromkeys(told) if why is not None}
        )
        for step, (noise, told) in enumerate(zip(noises, reasons, strict=True))
    )
