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
from typing import Any

import torch

from sparse_dit.engine import HEADS_FIRST, TOKENS_FIRST, Run, Site

_BACKEND_SETTINGS = ("_attention_backend", "_parallel_config")


class _Current:
    """The site whose processor is running."""

    site: Site | None = None


class _CurrentOfThread(_Current, threading.local):
    """The same for eager code, where pipelines may run in several threads."""


# Dynamo follows plain objects only, so traced code has one of its own. After a graph break a processor may begin in one
# world and make its call in the other.
_traced = _Current()
_eager = _CurrentOfThread()


def _publish(site: Site | None) -> None:
    _traced.site = site
    if not torch.compiler.is_compiling():
        _eager.site = site


def _current_site() -> Site:
    site = None if torch.compiler.is_compiling() else _eager.site
    site = _traced.site if site is None else site
    assert site is not None
    return site


class Installed:
    """The sites put into one transformer.

    Attributes:
        sites: one a layer, in execution order.
    """

    def __init__(self, run: Run, attentions: list[torch.nn.Module]) -> None:
        """Exchange the processors.

        Args:
            run: the run that the sites belong to.
            attentions: the self-attention modules, in execution order; each has a `processor`.
        """
        # An inference tensor could not be written to outside of inference mode.
        with torch.inference_mode(False):
            clock = torch.zeros((), dtype=torch.int64)
        self.sites: list[Site] = []
        self._exchanged: list[tuple[torch.nn.Module, Any, Any]] = []
        for layer, attention in enumerate(attentions):
            original: Any = attention.processor
            site = Site(layer, run, clock, original.__class__.__call__.__module__)
            rebound = copy.copy(original)
            rebound.__class__ = _rebound_class(original.__class__)
            rebound.site = site
            attention.processor = rebound
            self.sites.append(site)
            self._exchanged.append((attention, original, rebound))

    def remove(self) -> None:
        """Put the very same processors back, with the dense backend the user may have set in between.

        A processor that someone else has put in since is left alone.
        """
        for attention, original, rebound in self._exchanged:
            if attention.processor is not rebound:
                continue
            for name in _BACKEND_SETTINGS:
                if name in vars(rebound) and getattr(rebound, name) is not getattr(original, name):
                    setattr(original, name, getattr(rebound, name))
            attention.processor = original


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
            "mask": attn_mask is not None,
            "dropout": dropout_p > 0.0,
            "causal": is_causal,
            "attention_kwargs": bool(attention_kwargs),
            "parallel": parallel_config is not None,
        }

        def dense() -> torch.Tensor:
            options = {"backend": backend, "parallel_config": parallel_config}
            output: torch.Tensor = source.dispatch_attention_fn(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, attention_kwargs, **options
            )
            return output

        return _current_site().call(
            query,
            key,
            value,
            axes=TOKENS_FIRST,
            scale=scale,
            backend="" if backend is None else str(getattr(backend, "value", backend)),
            refusal=_refusal(query, key, value, 1, features),
            dense=dense,
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
        features = {"mask": attn_mask is not None, "dropout": dropout_p > 0.0, "causal": is_causal}

        def dense() -> torch.Tensor:
            return stock.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )

        return _current_site().call(
            query,
            key,
            value,
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
