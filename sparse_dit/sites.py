"""The self-attention layers of an enabled model, and the functions by which they call the engine.

Eager code calls it directly. Under `torch.compile` each call is one custom operator that gets the layer's number in a
tensor and looks up everything else when it runs: step, branch and schedule are then no constants of the graph, and all
layers share one graph. CUDA graphs would freeze what is looked up: `mode="reduce-overhead"` is not supported.
"""

import copy
import functools
import itertools
import sys
import weakref
from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from einops import rearrange

from sparse_dit.engine import HEADS_FIRST, TOKENS_FIRST, Run
from sparse_dit.layout import TokenLayout
from sparse_dit.parallel import Heads


class Site:
    """One self-attention layer of one transformer: what a call must know about itself.

    Args:
        layer: index over the transformer's self-attention layers, in execution order.
        run: the run of the pipeline.
        clock: int64 scalar on the CPU, one for all sites of a transformer. Nothing is stored in it: the operators at
            the begin and the end of a forward claim to write it and the calls between read it, so that no compiler
            reorders them.
        home: name of the module whose `dispatch_attention_fn` the layer's own processor calls.

    Attributes:
        slot: int64 scalar on the CPU, the number by which operators find the site.
        group: as `Heads`, of the calls that are made.
    """

    _numbers = itertools.count()
    _sites: ClassVar["weakref.WeakValueDictionary[int, Site]"] = weakref.WeakValueDictionary()

    def __init__(self, layer: int, run: Run, clock: torch.Tensor, home: str) -> None:
        self.layer = layer
        self.run = run
        self.clock = clock
        self.home = home
        self.group = ""
        number = next(Site._numbers)
        self.slot = torch.tensor(number)
        Site._sites[number] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Site":
        """A copied model has sites of its own, with numbers of their own."""
        return Site(self.layer, copy.deepcopy(self.run, memo), copy.deepcopy(self.clock, memo), self.home)

    @classmethod
    def find(cls, slot: torch.Tensor) -> "Site":
        """The site with a number."""
        return cls._sites[int(slot)]

    def call(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        axes: str,
        scale: float | None,
        backend: str,
        refusal: str | None,
        dense: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        """Compute the call, now or, under `torch.compile`, when the graph runs; arguments as `Run.call`.

        Args:
            backend: name of the dense backend that the processor asks for; empty for the default one.
        """
        if not torch.compiler.is_compiling():
            heads = Heads(self.group)
            return self.run.call(self.layer, q, k, v, axes=axes, scale=scale, refusal=refusal, dense=dense, heads=heads)
        if refusal is None:
            return cast(torch.Tensor, _attend(q, k, v, self.slot, self.clock, axes, scale, backend, self.group))
        _count_dense(self.slot, self.clock, refusal)
        return dense()


def begin_forward(site: Site, layout: tuple[int, ...], noise: torch.Tensor, planned: int) -> None:
    """A forward of a site's transformer begins; traceable.

    Args:
        site: any site of the transformer.
        layout: (T, H, W, text_before, text_after).
        noise, planned: as `Run.begin_forward`.
    """
    if torch.compiler.is_compiling():
        _begin_forward(noise, site.slot, site.clock, list(layout), planned)
    else:
        tokens = TokenLayout((layout[0], layout[1], layout[2]), *layout[3:])
        site.run.begin_forward(tokens, noise, planned, transformer=id(site.clock))


def end_forward(site: Site) -> None:
    """A forward of a site's transformer ends; traceable. Raises as `Run.end_forward`."""
    if torch.compiler.is_compiling():
        _end_forward(site.slot, site.clock)
    else:
        site.run.end_forward()


def model_attention(
    site: Site,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    axes: str,
    scale: float | None,
    backend: str,
) -> torch.Tensor:
    """The call as the model's own processor would have made it; arguments as `Site.call`."""
    if axes == HEADS_FIRST:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    dispatch = sys.modules[site.home].dispatch_attention_fn
    masks = () if mask is None else (mask,)
    return cast(torch.Tensor, dispatch(q, k, v, *masks, scale=scale, backend=backend or None))


def tokens_first(out: torch.Tensor, axes: str) -> torch.Tensor:
    """An operator's output as graphs expect it: with the axes `axes`, and in memory as [B, S, H, D]."""
    return rearrange(rearrange(out, f"{axes} -> {TOKENS_FIRST}").contiguous(), f"{TOKENS_FIRST} -> {axes}")


def fake_tokens_first(q: torch.Tensor, axes: str) -> torch.Tensor:
    """What `tokens_first` makes of an output like q, for tracing."""
    if axes == TOKENS_FIRST:
        return q.new_empty(q.shape)
    batch, heads, tokens, width = q.shape
    return q.new_empty(batch, tokens, heads, width).transpose(1, 2)


@torch.library.custom_op("sparse_dit::attend", mutates_args=())
def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slot: torch.Tensor,
    clock: torch.Tensor,
    axes: str,
    scale: float | None,
    backend: str,
    group: str = "",
) -> torch.Tensor:
    site = Site.find(slot)
    dense = functools.partial(model_attention, site, q, k, v, None, axes=axes, scale=scale, backend=backend)
    heads = Heads(group)
    out = site.run.call(site.layer, q, k, v, axes=axes, scale=scale, refusal=None, dense=dense, heads=heads)
    return tokens_first(out, axes)


@_attend.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slot: torch.Tensor,
    clock: torch.Tensor,
    axes: str,
    scale: float | None,
    backend: str,
    group: str = "",
) -> torch.Tensor:
    return fake_tokens_first(q, axes)


@torch.library.custom_op("sparse_dit::begin_forward", mutates_args=("clock",))
def _begin_forward(
    noise: torch.Tensor, slot: torch.Tensor, clock: torch.Tensor, layout: list[int], planned: int
) -> None:
    begin_forward(Site.find(slot), tuple(layout), noise, planned)


@torch.library.custom_op("sparse_dit::end_forward", mutates_args=("clock",))
def _end_forward(slot: torch.Tensor, clock: torch.Tensor) -> None:
    end_forward(Site.find(slot))


@torch.library.custom_op("sparse_dit::count_dense", mutates_args=("clock",))
def _count_dense(slot: torch.Tensor, clock: torch.Tensor, reason: str) -> None:
    Site.find(slot).run.count_dense(reason)
