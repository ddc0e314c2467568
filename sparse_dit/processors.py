"""Puts the engine into a model's own attention processors, and takes it out.

A layer's processor is exchanged for a copy whose class is a *rebound subclass* of its own: the same `__call__` code,
run with a copy of its module's globals in which only `dispatch_attention_fn` and `F` are replaced. Projections, norms
and rotary embeddings stay upstream's, no processor body is copied, and no module that others use is changed.
"""

import copy
import functools
import sys
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from sparse_dit.engine import HEADS_FIRST, TOKENS_FIRST, Run
from sparse_dit.samples import Layer, Tokens

_BACKEND_SETTINGS = ("_attention_backend", "_parallel_config")
_STOCK = "_sparse_dit_stock"


class _Current:
    """The layer whose processor is running, and how many calls it has made."""

    site: Layer | None = None
    calls: int = 0


class _CurrentOfThread(_Current, threading.local):
    """The same for eager code, where pipelines may run in several threads."""


# Dynamo follows plain objects only, so traced code has one of its own. After a graph break a processor may begin in one
# world and make its call in the other.
_traced = _Current()
_eager = _CurrentOfThread()


def _publish(site: Layer | None) -> None:
    _traced.site, _traced.calls = site, 0
    if not torch.compiler.is_compiling():
        _eager.site, _eager.calls = site, 0


def _current() -> _Current:
    if not torch.compiler.is_compiling() and _eager.site is not None:
        return _eager
    return _traced


def _next_call() -> tuple[Layer, int]:
    """The layer that makes a call, and which of its calls in this forward it is."""
    current = _current()
    assert current.site is not None
    index, current.calls = current.calls, current.calls + 1
    return current.site, index


@dataclass
class _Exchange:
    attention: torch.nn.Module
    layer: Layer
    original: Any = field(init=False)
    rebound: Any = None

    def put(self) -> None:
        """Put a rebound copy of the processor that is in the slot in its place."""
        found: Any = self.attention.processor
        if self.rebound is not None:
            # Whoever still holds the last one gets the model's own attention from it.
            self.rebound.site = None
        # Left behind by an earlier installation, such as `unfuse_qkv_projections` brings back: its own stock counts.
        (self.original,) = vars(found).get(_STOCK, (found,))
        self.layer.home = self.original.__class__.__call__.__module__
        self.rebound = copy.copy(self.original)
        self.rebound.__class__ = _rebound_class(self.original.__class__)
        self.rebound.site = self.layer
        # In a tuple, as adapters' processors are modules, which would make it a part of the model.
        setattr(self.rebound, _STOCK, (self.original,))
        self.attention.processor = self.rebound


class Installed:
    """The layers put into one transformer.

    Attributes:
        sites: one a layer, in execution order.
        tokens: what they know of the forward that runs.
    """

    def __init__(
        self,
        run: Run,
        attentions: list[torch.nn.Module],
        tokens: Tokens | None = None,
        alone: tuple[bool, ...] | None = None,
    ) -> None:
        """Exchange the processors.

        Args:
            run: the run that the layers belong to.
            attentions: the self-attention modules, in execution order; each has a `processor`.
            tokens: whether and how tokens are read; by default shapes tell everything.
            alone: for each module whether it sees the grid without any text; by default none does.
        """
        # An inference tensor could not be written to outside of inference mode.
        with torch.inference_mode(False):
            clock = torch.zeros((), dtype=torch.int64)
        self.tokens = Tokens() if tokens is None else tokens
        self.sites: list[Layer] = []
        self._exchanges: list[_Exchange] = []
        for number, attention in enumerate(attentions):
            layer = Layer(number, run, clock, "", self.tokens, alone is not None and alone[number])
            exchange = _Exchange(attention, layer)
            exchange.put()
            self.sites.append(layer)
            self._exchanges.append(exchange)

    def renew(self) -> None:
        """Rebind processors that something else, such as fusing projections or an adapter, has put in since."""
        for exchange in self._exchanges:
            if exchange.attention.processor is not exchange.rebound:
                exchange.put()

    def remove(self) -> None:
        """Put the processors back that were there, with the dense backend the user may have set in between.

        A processor that someone else has put in since is left alone.
        """
        for exchange in self._exchanges:
            original, rebound = exchange.original, exchange.rebound
            rebound.site = None
            if exchange.attention.processor is not rebound:
                continue
            for name in _BACKEND_SETTINGS:
                if name in vars(rebound) and getattr(rebound, name) is not getattr(original, name):
                    setattr(original, name, getattr(rebound, name))
            exchange.attention.processor = original


@functools.cache
def _rebound_class(processor: type[Any]) -> type[Any]:
    """The rebound subclass of a processor class; it keeps its name and its signature."""
    original = processor.__call__
    module = _rebound_module(original.__module__)
    body = types.FunctionType(
        original.__code__, module.__dict__, original.__name__, original.__defaults__, original.__closure__
    )
    body.__kwdefaults__ = original.__kwdefaults__

    # Attention modules drop arguments that the signature of `__call__` does not name: `wraps` shows the original's.
    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.site is None:
            return original(self, *args, **kwargs)
        _publish(self.site)
        try:
            return body(self, *args, **kwargs)
        finally:
            _publish(None)

    return type(processor.__name__, (processor,), {"__call__": call, "__module__": module.__name__})


@functools.cache
def _rebound_module(name: str) -> types.ModuleType:
    """A module with the globals of another one, but for the two names through which processors reach attention.

    It is a registered module because Dynamo resolves the names of a function through `sys.modules`.
    """
    source = sys.modules[name]
    module = types.ModuleType(f"{name}_sparse_dit")
    own = {"__name__": module.__name__, "__spec__": None, "__loader__": None}
    replaced: dict[str, Any] = {}
    if hasattr(source, "dispatch_attention_fn"):
        replaced["dispatch_attention_fn"] = _rebound_dispatch(source)
    if getattr(source, "F", None) is torch.nn.functional:
        replaced["F"] = _rebound_functional()
    module.__dict__.update(source.__dict__ | own | replaced)
    sys.modules[module.__name__] = module
    return module


def _refusal(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    token_axis: int,
    features: dict[str, bool],
) -> str | None:
    """Why a call must run as the model made it, or `None`."""
    for reason, present in features.items():
        if present:
            return reason
    if query.shape[token_axis] != key.shape[token_axis]:
        return "cross_attention"
    if query.shape != key.shape or query.shape != value.shape:
        return "grouped_heads"
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return "gradient"
    return None


def _rebound_dispatch(source: types.ModuleType) -> Callable[..., torch.Tensor]:
    """`dispatch_attention_fn` that asks the engine first; the one of `source` stays the dense call."""

    def dispatch_attention_fn(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        attention_kwargs: dict[str, Any] | None = None,
        *,
        backend: Any = None,
        parallel_config: Any = None,
    ) -> torch.Tensor:
        features = {
            "dropout": dropout_p > 0.0,
            "causal": is_causal,
            "attention_kwargs": bool(attention_kwargs),
        }

        def dense(
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            mask: torch.Tensor | None,
            parallel: Any = parallel_config,
        ) -> torch.Tensor:
            options = {"backend": backend, "parallel_config": parallel}
            output: torch.Tensor = source.dispatch_attention_fn(
                q, k, v, mask, dropout_p, is_causal, scale, enable_gqa, attention_kwargs, **options
            )
            return output

        processes = None
        if parallel_config is not None:
            # Of ring, of Ulysses and of both: how processes share the tokens is the same.
            processes = parallel_config.context_parallel_config._flattened_mesh.get_group()
        layer, index = _next_call()
        return layer.attend(
            query,
            key,
            value,
            attn_mask,
            index=index,
            axes=TOKENS_FIRST,
            scale=scale,
            backend="" if backend is None else str(getattr(backend, "value", backend)),
            refusal=_refusal(query, key, value, 1, features),
            dense=dense,
            processes=processes,
            dense_here=functools.partial(dense, parallel=None),
        )

    return dispatch_attention_fn


@functools.cache
def _rebound_functional() -> types.ModuleType:
    """`torch.nn.functional` with an attention that asks the engine first."""
    functional = types.ModuleType("torch_nn_functional_sparse_dit")
    stock = torch.nn.functional

    def scaled_dot_product_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        features = {"dropout": dropout_p > 0.0, "causal": is_causal}

        def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
            return stock.scaled_dot_product_attention(
                q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )

        layer, index = _next_call()
        return layer.attend(
            query,
            key,
            value,
            attn_mask,
            index=index,
            axes=HEADS_FIRST,
            scale=scale,
            backend="",
            refusal=_refusal(query, key, value, 2, features),
            dense=dense,
        )

    functional.__dict__.update(stock.__dict__)
    functional.__dict__["scaled_dot_product_attention"] = scaled_dot_product_attention
    functional.__dict__["__name__"] = functional.__name__ = "torch_nn_functional_sparse_dit"
    sys.modules[functional.__name__] = functional
    return functional
