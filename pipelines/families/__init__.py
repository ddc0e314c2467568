"""Which transformers are known, and how each is read: one row a model family.

A transformer of your own is one more row. Where its processors call `dispatch_attention_fn` or
`F.scaled_dot_product_attention`, as diffusers' do, this is all:

    from sparse_dit.pipelines.families import Family, Latents, Noise, Text, add_family

    add_family(
        Family(
            "MyTransformer3DModel",
            models="my model",
            layers=("blocks.*.attn",),  # module paths of the self-attention layers, in execution order
            grid=Latents(patch=(1, "patch_size", "patch_size"), axes=("b t c h w",)),
            spans=(Text("before", 77),),  # the text stands in front of the video tokens; 77 of them are usual
            noise=Noise(pure=1.0),  # the forward's `timestep` is 1 at pure noise
        )
    )
"""

from typing import Any

from sparse_dit.pipelines.families.dense import DENSE, DenseFamily
from sparse_dit.pipelines.families.family import DenseWhen, Family, Noise, Reading
from sparse_dit.pipelines.families.image import IMAGE
from sparse_dit.pipelines.families.sources import (
    GridPadding,
    GridSource,
    History,
    Latents,
    PaddedText,
    Positions,
    References,
    Shapes,
    Sizes,
    Span,
    Text,
)
from sparse_dit.pipelines.families.video import VIDEO

__all__ = [
    "DENSE_FAMILIES",
    "FAMILIES",
    "DenseFamily",
    "DenseWhen",
    "Family",
    "GridPadding",
    "GridSource",
    "History",
    "Latents",
    "Noise",
    "PaddedText",
    "Positions",
    "Reading",
    "References",
    "Shapes",
    "Sizes",
    "Span",
    "Text",
    "add_family",
    "dense_family_of",
    "family_of",
    "family_table",
]

FAMILIES: dict[str, Family] = {family.transformer: family for family in (*VIDEO, *IMAGE)}
DENSE_FAMILIES: dict[str, DenseFamily] = {family.transformer: family for family in DENSE}


def add_family(family: Family) -> None:
    """Make a family known, in place of the one for the same class if there is one."""
    FAMILIES[family.transformer] = family


def family_of(transformer: object) -> Family:
    """The row of a transformer, by the name of its class or of one it derives from.

    Raises:
        ValueError: no row has it, or it must stay dense.
    """
    for cls in type(transformer).__mro__:
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__]
    name = type(transformer).__name__
    if dense := dense_family_of(transformer):
        raise ValueError(f"pipe: {name} stays dense: {dense.reason}; valid: {', '.join(FAMILIES)}")
    raise ValueError(
        f"pipe: {name} is no known transformer; valid: {', '.join(FAMILIES)}, or one more row by "
        "sparse_dit.pipelines.families.add_family"
    )


def dense_family_of(transformer: object) -> DenseFamily | None:
    """The row of a transformer that must stay dense, or `None`."""
    names = [cls.__name__ for cls in type(transformer).__mro__]
    return next((DENSE_FAMILIES[name] for name in names if name in DENSE_FAMILIES), None)


def family_table() -> list[dict[str, Any]]:
    """The rows in plain values, those that stay dense last.

    Returns:
        For each family `transformer`, `models`, `kind` (`video` or `image`), `layers` (module paths), `before` and
        `after` (what stands around the grid, by the name of the forward's argument), `mask` (`cut off`, `removed` where
        it changes nothing, or `dense`: a call with one stays dense), `timestep` (the argument, its value at pure noise,
        its value without noise) and `dense` (what stays dense, and why or under which name it is counted; empty where
        nothing does).
    """
    rows: list[dict[str, Any]] = []
    for family in FAMILIES.values():
        rows.append(
            {
                "transformer": family.transformer,
                "models": family.models,
                "kind": _kind(family.transformer),
                "layers": list(family.layers),
                "before": [_told(span) for span in family.spans if span.side == "before"],
                "after": [_told(span) for span in family.spans if span.side == "after"],
                "mask": "cut off" if family.padded else "removed" if family.uniform else "dense",
                "timestep": [family.noise.argument, family.noise.pure, family.noise.clean],
                "dense": family.remark,
            }
        )
    for dense in DENSE_FAMILIES.values():
        rows.append(
            {
                "transformer": dense.transformer,
                "models": dense.models,
                "kind": _kind(dense.transformer),
                "layers": [],
                "before": [],
                "after": [],
                "mask": "dense",
                "timestep": [],
                "dense": dense.reason,
            }
        )
    return rows


def _kind(transformer: str) -> str:
    made_for_images = "2D" in transformer or "Image" in transformer
    return "video" if ("3D" in transformer or "Omni" in transformer) and not made_for_images else "image"


def _told(span: Span) -> str:
    match span:
        case History():
            return "history"
        case References():
            return "reference images"
        case GridPadding():
            return "padding of the grid"
        case Text() | PaddedText():
            return span.argument
    return type(span).__name__
