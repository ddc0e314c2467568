"""Turns sparse attention on and off in a diffusers pipeline, and tells what it does."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from sparse_dit.engine import Run, begin_forward, end_forward, is_dense, plan
from sparse_dit.layout import TokenLayout
from sparse_dit.pipelines.families import FAMILIES, Family, family_of
from sparse_dit.processors import Installed
from sparse_dit.recipe import Recipe, load_recipe
from sparse_dit.state import Context, Summary

__all__ = ["Explanation", "StepPlan", "Summary", "disable", "enable", "explain", "sparse", "summary"]

# Wan 2.2 has two, for high and for low noise.
TRANSFORMERS = ("transformer", "transformer_2")
_PATCH = "_sparse_dit"
_CONTEXT = "cache_context"

P = TypeVar("P")
RecipeLike = str | Path | Mapping[str, Any] | Recipe


def enable(pipe: P, recipe: RecipeLike = "radial", *, strict: bool = False, timing: bool = False) -> P:
    """Make the self-attention of a pipeline sparse. Enabling again replaces the recipe and starts the counts anew.

    Args:
        pipe: a diffusers pipeline, or a bare transformer.
        recipe: the name of a shipped recipe, a YAML file, a mapping or a `Recipe`. With `dense` every call runs on the
            model's own dense backend and is only counted.
        strict: raise, instead of warning once, when a forward makes other calls than planned.
        timing: time every self-attention call for `summary`.

    Returns:
        `pipe`, changed in place.

    Raises:
        ValueError: no known transformer, an unknown recipe, or a dense layer that the model does not have; one line,
            and nothing is changed.
    """
    chosen = load_recipe(recipe)
    found = [(module, family_of(module)) for module in _transformers(pipe).values()]
    layers = [_attentions(module, family, chosen) for module, family in found]
    disable(pipe)
    run = Run(chosen, strict=strict, timing=timing)
    for (module, family), attentions in zip(found, layers, strict=True):
        setattr(module, _PATCH, _Patch(module, family, attentions, run))
    return pipe


def disable(pipe: P) -> P:
    """Put the model's own attention back; a pipeline that is not enabled stays as it is.

    Args:
        pipe: a diffusers pipeline, or a bare transformer.

    Returns:
        `pipe`, changed in place.

    Raises:
        ValueError: there is no transformer.
    """
    for module in _transformers(pipe).values():
        patch = vars(module).pop(_PATCH, None)
        if patch is not None:
            patch.remove()
    return pipe


@contextmanager
def sparse(pipe: P, recipe: RecipeLike = "radial", *, strict: bool = False, timing: bool = False) -> Iterator[P]:
    """Sparse attention inside a `with` block; afterwards the pipeline is as it was before, enabled or not.

    Arguments and errors as `enable`.
    """
    before = _patch_of(pipe)
    enable(pipe, recipe, strict=strict, timing=timing)
    try:
        yield pipe
    finally:
        if before is None:
            disable(pipe)
        else:
            run = before.run
            enable(pipe, run.recipe, strict=run.strict, timing=run.tally.timing)


def summary(pipe: object) -> Summary:
    """What happened since `enable`, over all completed forwards of the pipeline's transformers.

    Raises:
        ValueError: the pipeline is not enabled.
    """
    patch = _patch_of(pipe)
    if patch is None:
        raise ValueError(
            f"pipe: this {type(pipe).__name__} has no sparse attention; valid: a pipeline after enable(pipe)"
        )
    return patch.run.tally.summary()


class _CacheContext:
    """Stands in for a transformer's `cache_context` and notes branch and step on their way."""

    def __init__(self, inner: Callable[..., AbstractContextManager[None]], run: Run) -> None:
        self.inner = inner
        self.run = run

    @contextmanager
    def __call__(self, name: str, **fields: Any) -> Iterator[None]:
        self.run.state.context = Context(name, fields.get("step_index"))
        try:
            with self.inner(name, **fields):
                yield
        finally:
            self.run.state.context = Context()


class _Patch:
    """What `enable` puts on one transformer."""

    def __init__(
        self, transformer: torch.nn.Module, family: Family, attentions: list[torch.nn.Module], run: Run
    ) -> None:
        self.transformer = transformer
        self.family = family
        self.run = run
        self.config = dict(cast(Any, transformer).config)
        self.names = tuple(inspect.signature(type(transformer).forward).parameters)[1:]
        self.installed = Installed(run, attentions)
        self.hooks = [
            transformer.register_forward_pre_hook(self.before_forward, with_kwargs=True),
            transformer.register_forward_hook(self.after_forward),
        ]
        # Set on the instance, so that other models of the class are not touched; `remove` deletes it again.
        if hasattr(transformer, _CONTEXT):
            setattr(transformer, _CONTEXT, _CacheContext(getattr(transformer, _CONTEXT), run))

    def remove(self) -> None:
        """Take everything out again."""
        self.installed.remove()
        for hook in self.hooks:
            hook.remove()
        stand_in = vars(self.transformer).get(_CONTEXT)
        if isinstance(stand_in, _CacheContext):
            delattr(self.transformer, _CONTEXT)
            # A function that someone had put on the instance before; the class's own method shows again by itself.
            if stand_in.inner != getattr(self.transformer, _CONTEXT):
                setattr(self.transformer, _CONTEXT, stand_in.inner)

    def before_forward(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read grid, text and noise level from the forward's own arguments."""
        arguments = {**dict(zip(self.names, args, strict=False)), **kwargs}
        layout = self.family.layout(arguments, self.config)
        noise = self.family.noise(arguments[self.family.timestep])
        begin_forward(self.installed.sites[0], layout, noise, len(self.installed.sites))

    def after_forward(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Compare the calls made with the calls planned."""
        end_forward(self.installed.sites[0])


def _transformers(pipe: object) -> dict[str, torch.nn.Module]:
    """The transformers of a pipeline by name, taken out of `torch.compile`'s wrapper."""
    if isinstance(pipe, torch.nn.Module):
        modules: dict[str, Any] = {"transformer": pipe}
    else:
        modules = {name: getattr(pipe, name, None) for name in TRANSFORMERS}
    found = {
        name: getattr(module, "_orig_mod", module)
        for name, module in modules.items()
        if isinstance(module, torch.nn.Module)
    }
    if not found:
        raise ValueError(
            f"pipe: {type(pipe).__name__} has no transformer; valid: a diffusers pipeline with one of "
            f"{', '.join(FAMILIES)}, or the transformer itself"
        )
    return found


def _attentions(transformer: torch.nn.Module, family: Family, recipe: Recipe) -> list[torch.nn.Module]:
    """The self-attention layers, which must be enough for the recipe's dense layers."""
    attentions = list(family.attentions(transformer).values())
    beyond = [layer for layer in recipe.schedule.dense_layers if layer >= len(attentions)]
    if beyond:
        raise ValueError(
            f"schedule.dense_layers: {beyond}; valid: 0 to {len(attentions) - 1} for this {type(transformer).__name__}"
        )
    return attentions


def _patch_of(pipe: object) -> _Patch | None:
    patches = [vars(module).get(_PATCH) for module in _transformers(pipe).values()]
    return next((patch for patch in patches if patch is not None), None)


@dataclass(frozen=True)
class StepPlan:
    """What one denoising step does.

    Attributes:
        step: from 0.
        noise: noise level in [0, 1].
        sparse_layers: number of self-attention layers that run sparse.
        dense_layers: number of self-attention layers that run dense, by reason.
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
        grid: (T, H, W), video tokens.
        text_before, text_after: text tokens in the self-attention.
        tokens: length of the sequence.
        layers: self-attention layers of the transformer.
        block_q, block_k: tokens of a block.
        blocks: (query blocks, key blocks).
        density: computed tile area over full area of a sparse call.
        run_density: mean density over all steps and layers, dense ones counted as 1.
        state_bytes: bytes of block lists and of what layers keep between steps.
        steps: the plan, one entry a step.
    """

    model: str
    recipe: dict[str, Any]
    grid: tuple[int, int, int]
    text_before: int
    text_after: int
    tokens: int
    layers: int
    block_q: int
    block_k: int
    blocks: tuple[int, int]
    density: float
    run_density: float
    state_bytes: int
    steps: tuple[StepPlan, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def __str__(self) -> str:
        video = " x ".join(map(str, self.grid))
        lines = [
            f"{self.model}, recipe {self.recipe['name']}",
            f"tokens       {self.tokens} = {video} video + {self.text_before + self.text_after} text",
            f"blocks       {self.blocks[0]} x {self.blocks[1]} of {self.block_q} x {self.block_k} tokens",
            f"density      {self.density:.4f} in sparse calls, {self.run_density:.4f} over the run",
            f"state        {self.state_bytes} bytes",
        ]
        for what, group in groupby(self.steps, key=lambda step: (step.sparse_layers, step.dense_layers)):
            steps = list(group)
            span = f"{steps[0].step}" if len(steps) == 1 else f"{steps[0].step}-{steps[-1].step}"
            dense = "".join(f", {count} dense ({reason})" for reason, count in what[1].items())
            lines.append(f"steps {span:<7}{what[0]} of {self.layers} layers sparse{dense}")
        return "\n".join(lines)


def explain(
    pipe: Any, recipe: RecipeLike, *, height: int, width: int, num_frames: int, num_inference_steps: int
) -> Explanation:
    """What a recipe would do in a pipeline at a size, without running it.

    Args:
        pipe: a diffusers pipeline; it is not changed.
        recipe: as `enable`.
        height, width: of the video, in pixels.
        num_frames: frames of the video.
        num_inference_steps: denoising steps.

    Raises:
        ValueError: as `enable`, and for a bare transformer or a size below 1; one line.
    """
    chosen = load_recipe(recipe)
    sizes = {"height": height, "width": width, "num_frames": num_frames, "num_inference_steps": num_inference_steps}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: {size!r}; valid: a positive whole number")
    transformer: Any = next(iter(_transformers(pipe).values()))
    family = family_of(transformer)
    if not hasattr(pipe, "vae_scale_factor_spatial"):
        raise ValueError(f"pipe: {type(pipe).__name__} does not tell the latent size; valid: the whole pipeline")
    layers = len(_attentions(transformer, family, chosen))
    temporal, spatial = pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial
    # Pipelines round the number of frames to one more than a multiple of the VAE's factor, as this does.
    frames = num_frames // temporal + 1 if temporal > 1 else num_frames
    layout = TokenLayout(family.grid.of_latents((frames, height // spatial, width // spatial), transformer.config))
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(num_inference_steps)
    steps = _step_plans(chosen, layout, layers, family.noise(scheduler.timesteps).tolist())
    blocks = None if is_dense(chosen) else plan(chosen, layout, torch.device("cpu"))
    density = 1.0 if blocks is None else blocks.density
    sparse_share = sum(step.sparse_layers for step in steps) / (layers * len(steps))
    return Explanation(
        model=type(transformer).__name__,
        recipe=chosen.to_dict(),
        grid=layout.grid,
        text_before=layout.text_before,
        text_after=layout.text_after,
        tokens=layout.length,
        layers=layers,
        block_q=chosen.block_q,
        block_k=chosen.block_k,
        blocks=(-(-layout.length // chosen.block_q), -(-layout.length // chosen.block_k)),
        density=density,
        run_density=1.0 - sparse_share * (1.0 - density),
        state_bytes=0 if blocks is None else blocks.blocks.indices.nbytes + blocks.blocks.counts.nbytes,
        steps=steps,
    )


def _step_plans(recipe: Recipe, layout: TokenLayout, layers: int, noises: list[float]) -> tuple[StepPlan, ...]:
    run = Run(recipe)
    run.state.layout = layout
    plans = []
    for run.state.step, run.state.noise in enumerate(noises):
        reasons = [run.dense_reason(layer, layout.length) for layer in range(layers)]
        dense = {reason: reasons.count(reason) for reason in dict.fromkeys(reasons) if reason is not None}
        plans.append(StepPlan(run.state.step, run.state.noise, reasons.count(None), dense))
    return tuple(plans)
