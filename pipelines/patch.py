"""Turns sparse attention on and off in a diffusers pipeline, and tells what it does."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar, cast

import torch

from sparse_dit.engine import Run, is_dense
from sparse_dit.pipelines.explanation import Explanation, RecipeLike, StepPlan, explain
from sparse_dit.pipelines.families import Family, Reading, family_of
from sparse_dit.pipelines.transformers import layers_of, transformers_of
from sparse_dit.processors import Installed
from sparse_dit.recipe import load_recipe
from sparse_dit.samples import Tokens
from sparse_dit.sites import begin_forward, end_forward
from sparse_dit.state import Context, Summary

__all__ = ["Explanation", "StepPlan", "Summary", "disable", "enable", "explain", "sparse", "summary"]

_PATCH = "_sparse_dit"
_CONTEXT = "cache_context"
# Where diffusers keeps what `enable_parallelism` was given.
_PARALLEL = "_parallel_config"

P = TypeVar("P")


def enable(pipe: P, recipe: RecipeLike = "radial", *, strict: bool = False, timing: bool = False) -> P:
    """Make the self-attention of a pipeline sparse. Enabling again replaces the recipe and starts the counts anew.

    Args:
        pipe: a diffusers pipeline, or a bare transformer.
        recipe: the name of a shipped recipe, a YAML file, a mapping or a `Recipe`. With `dense` every call runs on the
            model's own dense backend and is only counted.
        strict: raise, instead of warning once, when a forward makes other calls than planned, or a call of other tokens
            than its grid explains, or when processes share the tokens in a way that sparse attention cannot follow.
        timing: time every self-attention call for `summary`.

    Returns:
        `pipe`, changed in place.

    Raises:
        ValueError: no known transformer, one that must stay dense, an unknown recipe, or a dense layer that the model
            does not have; one line, and nothing is changed.
    """
    chosen = load_recipe(recipe)
    found = [(module, family_of(module)) for module in transformers_of(pipe).values()]
    layers = [layers_of(module, family, chosen) for module, family in found]
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
    for module in transformers_of(pipe).values():
        patch = vars(module).pop(_PATCH, None)
        if patch is not None:
            patch.remove()
    return pipe


@contextmanager
def sparse(pipe: P, recipe: RecipeLike = "radial", *, strict: bool = False, timing: bool = False) -> Iterator[P]:
    """Sparse attention inside a `with` block; afterwards the pipeline is as it was before, enabled or not.

    Where it was enabled, what `summary` counts starts again.

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
        self, transformer: torch.nn.Module, family: Family, attentions: dict[str, torch.nn.Module], run: Run
    ) -> None:
        self.transformer = transformer
        self.family = family
        self.run = run
        self.config = dict(cast(Any, transformer).config)
        self.names = tuple(inspect.signature(type(transformer).forward).parameters)[1:]
        self.installed = Installed(
            run,
            list(attentions.values()),
            Tokens(read=family.reads, removes_masks=family.removes_masks, apart=family.apart),
            tuple(family.sees_grid_alone(path) for path in attentions),
        )
        # What must be read from tensors is read outside of compiled graphs: Dynamo leaves such a hook to Python.
        before = torch.compiler.disable(self.before_forward) if family.reads else self.before_forward
        self.hooks = [
            transformer.register_forward_pre_hook(before, with_kwargs=True),
            transformer.register_forward_hook(self.after_forward),
        ]
        self._note_tensor_parallelism()
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
        if not torch.compiler.is_compiling():
            self.installed.renew()
            self._note_tensor_parallelism()
        arguments = {**dict(zip(self.names, args, strict=False)), **kwargs}
        noise = torch.as_tensor(arguments[self.family.noise.argument])
        if torch.compiler.is_compiling():
            noise = self.family.noise.level(noise, self.config)
        elif self.run.reads_noise:
            # Read first and computed here: one copy instead of a launch for each operation.
            noise = self.family.noise.level(noise.cpu(), self.config)
        if self.family.reads:
            reading = self.family.read(arguments, self.config)
            grid = reading.samples[0].layout.grid
            self._begin_read(reading, noise)
        else:
            sites, layout = self.installed.sites, self.family.layout(arguments, self.config)
            grid = layout[:3]
            begin_forward(sites[0], layout, noise, len(sites))
        if getattr(module, _PARALLEL, None) is not None:
            self.installed.tokens.stretches = self.family.stretches(arguments, self.config, grid)

    def _note_tensor_parallelism(self) -> None:
        """Tell the layers over which processes their heads are spread; context parallelism tells in every call."""
        config = getattr(getattr(self.transformer, _PARALLEL, None), "tensor_parallel_config", None)
        if config is not None:
            for site in self.installed.sites:
                site.group = config._mesh.get_group().group_name

    def _begin_read(self, reading: Reading, noise: torch.Tensor) -> None:
        """Begin a forward whose tokens had to be read."""
        tokens, sites = self.installed.tokens, self.installed.sites
        tokens.samples, tokens.refusal = reading.samples, reading.refusal
        whole = reading.refusal is not None or is_dense(self.run.recipe)
        calls = 1 if whole and not tokens.apart else len(reading.samples)
        layout = reading.samples[0].layout
        begin_forward(sites[0], (*layout.grid, layout.text_before, layout.text_after), noise, len(sites) * calls)
        if reading.unseen:
            for _ in sites:
                self.run.tally.count_dense(reading.refusal or "")

    def after_forward(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Compare the calls made with the calls planned."""
        end_forward(self.installed.sites[0])


def _patch_of(pipe: object) -> _Patch | None:
    patches = [vars(module).get(_PATCH) for module in transformers_of(pipe).values()]
    return next((patch for patch in patches if patch is not None), None)
