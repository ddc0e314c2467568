"""What a tiny random transformer is, and what several of them are made of: nothing is downloaded."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

Arguments = dict[str, Any]
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}


class Tiny(NamedTuple):
    """A tiny transformer.

    Attributes:
        config: of the class in diffusers.
        arguments: makes the arguments of a forward, the same each time.
        tokens: (T, H, W, before, after), the tokens that count.
        noise: noise level of the forward.
        layers: self-attention layers.
    """

    config: Mapping[str, Any]
    arguments: Callable[[], Arguments]
    tokens: tuple[int, int, int, int, int]
    noise: float = 0.5
    layers: int = 2


generator = torch.Generator()


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator)


def level(value: float) -> torch.Tensor:
    return torch.full((1,), float(value))


def padding_mask(*lengths: int, width: int) -> torch.Tensor:
    """int64 [B, width], 1 for the first `lengths` tokens of each sample."""
    return (torch.arange(width) < torch.tensor(lengths)[:, None]).long()


def without(whole: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in whole.items() if name not in names}


def image() -> Arguments:
    return {"hidden_states": rand(1, 4, 28, 30), "timestep": level(500), "encoder_hidden_states": rand(1, 9, 16)}
