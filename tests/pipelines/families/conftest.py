"""A tiny random transformer of every family, and arguments for one forward of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers.models.transformers
import pytest
import torch

from .tiny import Arguments, Tiny, generator
from .tiny_image import IMAGE
from .tiny_video import VIDEO

TINY = VIDEO | IMAGE


class Model(NamedTuple):
    """A tiny transformer with its arguments and what is true of it."""

    transformer: Any
    arguments: Arguments
    tiny: Tiny

    def forward(self, **changed: Any) -> torch.Tensor:
        """One forward without gradients, with some arguments changed."""
        arguments = {**self.arguments, **changed}
        with torch.no_grad():
            out: Any = self.transformer(**arguments, return_dict=False)
        while not isinstance(out, torch.Tensor):
            out = out[0]
        return out


def build(name: str, **config: Any) -> Model:
    """The tiny transformer of a class, in float32."""
    torch.manual_seed(0)
    generator.manual_seed(1)
    tiny = TINY[name]
    model = getattr(diffusers.models.transformers, name)(**{**tiny.config, **config}).eval()
    for parameter in model.parameters():
        if not parameter.detach().any():  # what starts at zero would hide the attention
            torch.nn.init.normal_(parameter, std=0.1)
    return Model(model, tiny.arguments(), tiny)


@pytest.fixture(params=TINY)
def model(request: pytest.FixtureRequest) -> Model:
    """The tiny transformer of every family in turn."""
    return build(request.param)


@pytest.fixture
def build_model() -> Callable[..., Model]:
    """`build`: makes the tiny transformer of a class."""
    return build
