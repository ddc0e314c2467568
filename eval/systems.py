"""Every published system, and ours, at equal densities on tiny-wan: which keeps a clip nearest to the dense one.

    python -m sparse_dit.eval.systems --out eval/results/systems-tiny-wan.jsonl --part 1/4
    python -m sparse_dit.eval.systems --search --out eval/results/search-tiny-wan.jsonl

The presets are made for grids of tens of thousands of tokens. Here their blocks are 32 tokens, their tiles 1x4x8, and
one setting of each, its knob, is set to the density; what a knob comes to is measured and stands in the rows.
`--search` runs the candidates for presets of our own on captions that neither training nor any table uses.
"""

import argparse
import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from sparse_dit.eval.sweep import Failed, sweep
from sparse_dit.pipelines.generate import Request, load_pipeline
from sparse_dit.pipelines.tiny_wan import DEFAULTS
from sparse_dit.pipelines.tiny_wan.grammar import draw_scene, held_out_prompts
from sparse_dit.recipe import Recipe, load_recipe

DENSITIES = (0.5, 0.25, 0.12)
DENSE_FRACTIONS = (0.0, 0.2)
SEARCHED_DENSITY = 0.25

_SMALL: dict[str, Any] = {
    "block_q": 32,
    "block_k": 32,
    "precision": "native",
    "schedule.dense_above": 1.0,
    "schedule.dense_layers": [],
}
_TILES = {"order.tile": [1, 4, 8]}
_KNOB = "selection.density"
Knob = str | tuple[str, tuple[Any, ...]]
# Preset: what is set for tiny-wan beside the above, and the knob that takes the density, or a knob and what comes near
# the densities (Jenga computes the blocks around a block on top of its budget).
SYSTEMS: dict[str, tuple[dict[str, Any], Knob]] = {
    "radial": ({}, _KNOB),
    "svg": ({}, _KNOB),
    "sta": ({**_TILES, "selection.tile": [1, 4, 8]}, ("selection.size", ([6, 3, 2], [3, 3, 2], [3, 3, 1]))),
    "gna": ({**_TILES, "selection.stride": [1, 4, 8]}, ("selection.size", ([6, 12, 16], [3, 12, 16], [3, 12, 8]))),
    "draft": (_TILES, _KNOB),
    "jenga": ({"selection.top_p": None, "selection.least": 0.0}, (_KNOB, (0.28, 0.04, 0.014))),
    "sparge": ({}, _KNOB),
    "sol": ({}, _KNOB),
    "subblock": ({"selection.sub_block": 8}, _KNOB),
    "adaspa": ({"schedule.refresh_steps": [0, 4, 12]}, _KNOB),
    "vmoba": (
        {"selection.spans": 9, "selection.tiles": [4, 4], "selection.cuboids": [3, 4, 4]},
        ("selection.threshold", (0.65, 0.34, 0.15)),
    ),
    "re-ttention": ({}, _KNOB),
    "ditfastattn": ({}, _KNOB),
}
# The same selection in INT8, for what low precision costs.
PRECISIONS = {"radial": ("int8", "int8_fp8"), "sparge": ("int8", "int8_fp8")}

_ORDERS: dict[str, Any] = {
    "rows": "rows",
    "hilbert": "hilbert",
    "tiles": {"name": "tiles", "tile": [1, 4, 8]},
    "cubes": {"name": "tiles", "tile": [2, 4, 4]},
}
_RULES: dict[str, dict[str, Any]] = {
    "row": {"name": "pooled"},
    "head": {"name": "pooled", "per": "head"},
    "lse8": {"name": "pooled", "sub_block": 8, "reduction": "logsumexp"},
    "lse8-head": {"name": "pooled", "sub_block": 8, "reduction": "logsumexp", "per": "head"},
    "lse4": {"name": "pooled", "sub_block": 4, "reduction": "logsumexp"},
    "max8": {"name": "pooled", "sub_block": 8, "reduction": "max"},
}
_SKIPPED = ("drop", "summary")


def systems(steps: int) -> list[Recipe]:
    """Every published system at every density and share of dense first steps, and two of them in INT8.

    Args:
        steps: denoising steps of a run.
    """
    found = []
    for (name, (settings, knob)), density, fraction in itertools.product(SYSTEMS.items(), DENSITIES, DENSE_FRACTIONS):
        recipe = _set(name, settings, knob, density, round(fraction * steps))
        found.append(recipe)
        found += [recipe.override({"precision": precision}) for precision in PRECISIONS.get(name, ())]
    return found


def _set(name: str, settings: dict[str, Any], knob: Knob, density: float, dense_steps: int) -> Recipe:
    turned = {knob: density} if isinstance(knob, str) else {knob[0]: knob[1][DENSITIES.index(density)]}
    plain = {**_SMALL, **settings, "schedule.dense_steps": dense_steps, **turned}
    return load_recipe(name).override({key: value for key, value in plain.items() if value is not None})


def candidates(densities: Sequence[float], dense_steps: Sequence[int], names: Sequence[str] = ()) -> list[Recipe]:
    """Mixtures of order, scoring rule and what becomes of skipped blocks, named by the three.

    Args:
        densities: shares of key blocks.
        dense_steps: first steps that are dense.
        names: only these; none takes all.
    """
    found = []
    for density, steps in itertools.product(densities, dense_steps):
        for (order, order_choice), (rule, selection), skipped in itertools.product(
            _ORDERS.items(), _RULES.items(), _SKIPPED
        ):
            name = f"{order}-{rule}-{skipped}"
            if names and name not in names:
                continue
            mapping = {
                "name": name,
                "order": order_choice,
                "selection": {**selection, "density": density},
                "schedule": {"dense_steps": steps},
                "skipped": skipped,
                "block_q": 32,
                "block_k": 32,
                "source": "a candidate of the search for presets of our own",
                "licence": "Apache-2.0",
            }
            found.append(Recipe.from_dict(mapping))
    return found


def search_prompts(count: int) -> list[str]:
    """Captions of the training's kind that the tables do not use: presets are not chosen by what judges them."""
    rng = random.Random("search for presets")
    drawn: Iterator[str] = (draw_scene(rng).caption for _ in itertools.count())
    unused = (caption for caption in drawn if caption not in set(held_out_prompts(64)))
    return list(itertools.islice(unused, count))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSONL file; rows that it holds are not run again")
    parser.add_argument("--search", action="store_true", help="the candidates for our own presets, on other captions")
    parser.add_argument("--candidates", nargs="+", default=[], help="these candidates, on the table's captions")
    parser.add_argument("--part", default="1/1", help="i/n: the i-th of n shares of the recipes")
    parser.add_argument("--prompts", type=int, default=16)
    options = parser.parse_args()
    share, shares = map(int, options.part.split("/"))
    steps = int(DEFAULTS["num_inference_steps"])
    dense_steps = [round(fraction * steps) for fraction in DENSE_FRACTIONS]
    if options.search:
        recipes, prompts = candidates([SEARCHED_DENSITY], [0]), search_prompts(options.prompts)
    else:
        chosen = candidates(DENSITIES, dense_steps, options.candidates) if options.candidates else systems(steps)
        recipes, prompts = chosen, held_out_prompts(options.prompts)
    recipes = recipes[share - 1 :: shares]
    pipe = load_pipeline("tiny-wan", "cuda" if torch.cuda.is_available() else "cpu")
    for row in sweep(pipe, "tiny-wan", recipes, prompts, Request(prompt=""), options.out, batch=options.prompts):
        if isinstance(row, Failed):
            print(row, flush=True)
            continue
        density = "" if row["density"] is None else f" density {row['density']:.3f}"
        print(f"{row['recipe']['name']}{density} {row['psnr']:.2f} dB", flush=True)


if __name__ == "__main__":
    main()
