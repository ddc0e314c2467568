"""Sparse attention for diffusers DiT pipelines. The façade is lazy: nothing is imported before it is used.

`enable` makes a pipeline sparse, `disable` undoes it, `sparse` does both around a block; `explain` tells what a recipe
would do, `summary` what it did. A model of one's own calls `sparse_attention` in place of
`scaled_dot_product_attention`; docs/own-model.md has an example, which the tests run.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sparse_dit.engine import sparse_attention
    from sparse_dit.pipelines.patch import disable, enable, explain, sparse, summary
    from sparse_dit.recipe import Recipe, load_recipe

_HOMES = {
    "enable": "sparse_dit.pipelines.patch",
    "disable": "sparse_dit.pipelines.patch",
    "sparse": "sparse_dit.pipelines.patch",
    "explain": "sparse_dit.pipelines.patch",
    "summary": "sparse_dit.pipelines.patch",
    "sparse_attention": "sparse_dit.engine",
    "Recipe": "sparse_dit.recipe",
    "load_recipe": "sparse_dit.recipe",
}

__all__ = [
    "Recipe",
    "__version__",
    "disable",
    "enable",
    "explain",
    "load_recipe",
    "sparse",
    "sparse_attention",
    "summary",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sparse_dit' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
