"""Inside the model: what a recipe keeps of the attention of every layer, head and step.

A few query rows of each sparse call are computed whole, in fp32, beside the call itself, which is left as it is. Calls
are seen where all of them pass, at the operators of `kernels.ops`, and told apart by forward hooks:
model and engine know nothing of it. For eager models, as compiled graphs run no hooks.
"""

from __future__ import annotations

import base64
import inspect
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_dit.eval import results
from sparse_dit.eval.kept import Kept, computed_keys, kept_of
from sparse_dit.eval.mask_pictures import frames_of
from sparse_dit.eval.pair import asking, plan_arguments
from sparse_dit.kernels.blocks import BlockList
from sparse_dit.kernels.gather import gather_tokens
from sparse_dit.kernels.ops import OPERATORS
from sparse_dit.pipelines.families import Family, family_of
from sparse_dit.pipelines.generate import Request, generate
from sparse_dit.pipelines.patch import explain, sparse
from sparse_dit.pipelines.transformers import transformers_of
from sparse_dit.recipe import Recipe
from sparse_dit.skipped import Reuse

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

FIGURES = ("density", "recall", "recall_min", "error")


class Place(NamedTuple):
    """Where a call was made.

    Attributes:
        step: denoising step from 0.
        layer: over the self-attention layers of all transformers of the pipeline, in their order.
        branch: forward of its step from 0: the passes of classifier-free guidance.
    """

    step: int
    layer: int
    branch: int


@dataclass
class Probe:
    """What was found in a run. Places that are not in it were dense.

    Attributes:
        layers: self-attention layers of the pipeline.
        calls: what each layer's call computed; several where the samples of a batch are computed apart.
        masks: bool [S], the keys that the first head computed for one query, at the places that were asked for.
    """

    layers: int = 0
    calls: dict[Place, list[Kept]] = field(default_factory=dict)
    masks: dict[Place, torch.Tensor] = field(default_factory=dict)

    def by_step(self, figure: str, steps: int) -> list[list[float | None]]:
        """A figure of `Kept`, [steps][layers]: mean over heads and branches, of `recall_min` the smallest one.

        None where all calls were dense.
        """
        table: list[list[float | None]] = [[None] * self.layers for _ in range(steps)]
        for step in range(steps):
            for layer in range(self.layers):
                found = [kept for place, calls in self.calls.items() if place[:2] == (step, layer) for kept in calls]
                if found:
                    values = torch.cat([getattr(kept, figure) for kept in found])
                    table[step][layer] = float(values.min() if figure == "recall_min" else values.mean())
        return table

    def by_head(self, figure: str) -> list[list[float] | None]:
        """A figure of `Kept`, [layers][heads]: mean over steps and branches, of `recall_min` the smallest one.

        None for layers that were always dense.
        """
        table: list[list[float] | None] = []
        for layer in range(self.layers):
            found = [kept for place, calls in self.calls.items() if place.layer == layer for kept in calls]
            values = torch.stack([getattr(kept, figure) for kept in found]) if found else None
            if values is None:
                table.append(None)
            else:
                table.append((values.amin(0) if figure == "recall_min" else values.mean(0)).tolist())
        return table


@dataclass(frozen=True)
class Look:
    """Where masks are taken.

    Args:
        query: the query token, counted over the whole sequence.
        places: of which calls.
    """

    query: int
    places: frozenset[Place]


@contextmanager
def probed(
    pipe: Any, *, rows: int = 16, seed: int = 0, steps: Collection[int] | None = None, look: Look | None = None
) -> Iterator[Probe]:
    """Looks into every sparse call that a pipeline makes inside the block.

    A call that computed whole attention, as a search or a cache may need it, counts as dense.

    Args:
        pipe: a diffusers pipeline, or a bare transformer; not compiled.
        rows: query rows sampled in each call, the same ones for all heads.
        seed: of the samples.
        steps: denoising steps that are looked at; None is all of them.
        look: where masks are taken, if anywhere.

    Raises:
        ValueError: no known transformer, or no row.
    """
    if rows < 1:
        raise ValueError(f"rows: {rows}; valid: a whole number from 1")
    watch = _Watch(rows, seed, steps, look)
    with ExitStack() as stack:
        for transformer in transformers_of(pipe).values():
            family = family_of(transformer)
            hook = transformer.register_forward_pre_hook(watch.forward_of(transformer, family), with_kwargs=True)
            stack.callback(hook.remove)
            for attention in family.attentions(transformer).values():
                stack.callback(attention.register_forward_pre_hook(watch.entering(watch.probe.layers)).remove)
                stack.callback(attention.register_forward_hook(watch.leaving, always_call=True).remove)
                watch.probe.layers += 1
        stack.enter_context(watch)
        yield watch.probe


def probe(pipe: DiffusionPipeline, request: Request, recipe: Recipe, *, model: str = "", rows: int = 16) -> results.Row:
    """Generates once with a recipe and tells what it kept, as a result row.

    Args:
        pipe: a pipeline that is not sparse at the moment, not compiled.
        request: what to generate.
        recipe: with what.
        model: the pipeline's name in the row.
        rows: query rows sampled in each call.

    Returns:
        What was asked, and `by_step` and `by_head` with a table for each of `FIGURES` (see `Probe`). The error is that
        of what a call computed; with `skipped: reuse`, which corrects it afterwards, it is null. `masks` tells for the
        query in the middle of the grid which video tokens the first head of some layers computes (base64 of one bit a
        token), in a step in the middle of the sparse ones; `frames` has frames for them to lie over.

    Raises:
        ValueError: as `sparse_dit.eval.pair.compare` and `probed`.
    """
    plan = explain(pipe, recipe, **plan_arguments(pipe, request))
    asked = asking(pipe, request)
    middle = tuple(side // 2 for side in plan.grid)
    token = plan.text_before + int(np.ravel_multi_index(middle, plan.grid))
    sparse_steps = [step.step for step in plan.steps if step.sparse_layers] or [0]
    step = sparse_steps[len(sparse_steps) // 2]
    look = Look(token, frozenset(Place(step, layer, 0) for layer in _some_layers(pipe)))
    with sparse(pipe, recipe), probed(pipe, rows=rows, look=look) as found:
        frames = generate(pipe, request)
    video = slice(plan.text_before, plan.text_before + math.prod(plan.grid))
    masks = [
        {"step": place.step, "layer": place.layer, "query": list(middle), "keys": _bits(found.masks[place][video])}
        for place in sorted(found.masks.keys() & found.calls.keys())
    ]
    figures = [name for name in FIGURES if name != "error" or not isinstance(recipe.skipped, Reuse)]
    return {
        "model": model,
        "recipe": recipe.to_dict(),
        **asked,
        "grid": list(plan.grid),
        "rows": rows,
        "by_step": {name: found.by_step(name, asked["steps"]) if name in figures else None for name in FIGURES},
        "by_head": {name: found.by_head(name) if name in figures else None for name in FIGURES},
        "masks": masks,
        "frames": frames_of(frames, plan.grid, middle[0]),
        "device": results.device_of(pipe.device, pipe.transformer.dtype),
        **results.provenance(),
    }


def _some_layers(pipe: Any) -> Iterator[int]:
    """First, middle and last layer of each transformer: which of two makes a step is not known beforehand."""
    begin = 0
    for transformer in transformers_of(pipe).values():
        last = len(family_of(transformer).attentions(transformer)) - 1
        yield from (begin, begin + last // 2, begin + last)
        begin += last + 1


def _bits(mask: torch.Tensor) -> str:
    """Base64 of one bit an entry."""
    return base64.b64encode(np.packbits(mask.numpy()).tobytes()).decode()


class _Watch(TorchDispatchMode):
    """Sees every attention call along block lists, and knows from hooks which layer makes it."""

    def __init__(self, rows: int, seed: int, steps: Collection[int] | None, look: Look | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.probe = Probe()
        self.rows = rows
        self.steps = steps
        self.look = look
        self.generator = torch.Generator().manual_seed(seed)
        self.step, self.branch = -1, 0
        self.timestep: float | None = None
        self.layer: int | None = None
        self.calls: list[tuple[Kept, bool]] = []

    def forward_of(self, transformer: torch.nn.Module, family: Family) -> Callable[..., None]:
        """A hook that counts steps, by the change of the timestep, and the forwards of each."""
        names = tuple(inspect.signature(type(transformer).forward).parameters)[1:]

        def begin(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            arguments = {**dict(zip(names, args, strict=False)), **kwargs}
            timestep = float(arguments[family.noise.argument].max())
            if timestep == self.timestep:
                self.branch += 1
            else:
                self.step, self.branch, self.timestep = self.step + 1, 0, timestep

        return begin

    def entering(self, layer: int) -> Callable[..., None]:
        """A hook for the begin of a layer."""

        def enter(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            self.layer, self.calls = layer, []

        return enter

    def leaving(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The hook for the end of a layer: what it computed is put down, unless some of it was whole attention."""
        if self.layer is not None and self.calls and not any(whole for _, whole in self.calls):
            self.probe.calls[Place(self.step, self.layer, self.branch)] = [kept for kept, _ in self.calls]
        self.layer = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        layer, looked_at = self.layer, self.steps is None or self.step in self.steps
        if layer is not None and looked_at and func in OPERATORS:
            _, _, _, indices, counts, _, block_q, block_k, scale, *_ = args
            q, k, v, out, order = _as_listed(args, returned[0])
            key_blocks = -(-k.shape[2] // block_k)
            blocks = BlockList(indices, counts, block_q, block_k, key_blocks)
            chosen = torch.randperm(q.shape[2], generator=self.generator)[: self.rows].to(q.device)
            kept = kept_of(q, k, v, blocks, out, chosen, scale=scale, order=order)
            self.calls.append((kept, bool((counts == key_blocks).all())))
            place = Place(self.step, layer, self.branch)
            wanted = self.look is not None and place in self.look.places and place not in self.probe.masks
            if self.look is not None and wanted and q is args[0]:  # of keys apart nobody knows the tokens
                query = torch.tensor([self.look.query], device=q.device)
                self.probe.masks[place] = computed_keys(blocks, order, query, q.shape[2])[0, 0, 0].cpu()
        return returned


def _as_listed(args: Sequence[Any], out: torch.Tensor) -> tuple[Any, ...]:
    """q, k, v and out of a call, and the order in which all of them enter blocks.

    Where keys have an order of their own (`clusters`), all are told in their orders, and the order as None.
    """
    q, k, v, _, _, order = args[:6]
    brought = args[13:16]
    if len(brought) < 3 or brought[1] is None or torch.equal(gather_tokens(k, order), brought[1]):
        return q, k, v, out, order
    return *brought, gather_tokens(out, order), None
