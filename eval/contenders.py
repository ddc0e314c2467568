"""Who stands in the table of systems on tiny-wan, and how the presets are set small for it.

The presets are made for grids of tens of thousands of tokens. Here their blocks are 32 tokens, their tiles 1x4x8, and
one setting of each, its knob, is turned until a sparse call has the density asked for.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparse_dit.calibration import SEARCHES, Search
from sparse_dit.recipe import Recipe, load_recipe
from sparse_dit.skipped import Reuse

DENSITIES = (0.5, 0.25, 0.12)
DENSE_FRACTIONS = (0.0, 0.2)
BLOCK = 32

SMALL: dict[str, Any] = {
    "block_q": BLOCK,
    "block_k": BLOCK,
    "precision": "native",
    "schedule.dense_above": 1.0,
    "schedule.dense_layers": [],
}
_TILES = {"order.tile": [1, 4, 8]}


@dataclass(frozen=True)
class Budget:
    """A setting that is the density itself."""

    setting: str = "selection.density"


@dataclass(frozen=True)
class Listed:
    """A setting with a value for each of `DENSITIES`, where all that there are can be counted beforehand."""

    setting: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Sought:
    """A setting whose density the content decides: bisected on captions that no table uses (`eval.knobs`).

    Args:
        setting: its dotted name.
        low, high: between which it is sought; density rises or falls from one to the other.
        falls: whether the density falls as the setting rises.
    """

    setting: str
    low: float
    high: float
    falls: bool = False


@dataclass(frozen=True)
class Calibrated:
    """A profile for each density, found by calibration on captions that no table uses (`eval.knobs`).

    Args:
        method: one of `SEARCHES`.
        settings: of the search, beside the density.
    """

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def search(self, density: float) -> Search:
        """The search of a profile of a density."""
        settings: dict[str, Any] = {"density": density, **self.settings}
        return SEARCHES[self.method](**settings)


Knob = Budget | Listed | Sought | Calibrated


@dataclass(frozen=True)
class Contender:
    """A preset in the table.

    Args:
        knob: what is turned to reach a density.
        settings: what is set for tiny-wan beside `SMALL`.
        precisions: low precisions that the same selection is run in, too.
    """

    knob: Knob = field(default_factory=Budget)
    settings: Mapping[str, Any] = field(default_factory=dict)
    precisions: tuple[str, ...] = ()


# Presets by name. Clusters: as many to a block as the published ones have at 75,600 tokens. Re-ttention's window is of
# whole rows of the frame, as a block holds two. Jenga computes the blocks around a block in any case, a fifth of all.
CONTENDERS: dict[str, Contender] = {
    "radial": Contender(precisions=("int8", "int8_fp8")),
    "svg": Contender(),
    "svg2": Contender(Sought("selection.top_p", 0.05, 1.0), {"order.queries": 36, "order.keys": 61}),
    "sta": Contender(
        Listed("selection.size", ([6, 3, 2], [3, 3, 2], [3, 3, 1])), {**_TILES, "selection.tile": [1, 4, 8]}
    ),
    "sta-search": Contender(Calibrated("sta", {"tile": (1, 4, 8)})),
    "gna": Contender(
        Listed("selection.size", ([6, 12, 16], [3, 12, 16], [3, 12, 8])), {**_TILES, "selection.stride": [1, 4, 8]}
    ),
    "draft": Contender(settings=_TILES),
    "paro": Contender(Calibrated("paro"), precisions=("int8",)),
    "sparse-vdit": Contender(Calibrated("sparse-vdit")),
    "jenga": Contender(Sought("selection.least", 0.0, 1.0)),
    # Without its PV skip: at the published 2^-50 it moves an output by less than 2304 x 2^-50 of the largest value.
    "sparge": Contender(precisions=("int8", "int8_fp8")),
    "sol": Contender(Sought("selection.tau", -2.0, 4.0, falls=True)),
    "subblock": Contender(settings={"selection.sub_block": 8}),
    "adaspa": Contender(settings={"schedule.refresh_steps": [0, 4, 12]}),
    "vmoba": Contender(
        Sought("selection.threshold", 0.01, 1.0),
        {"selection.spans": 9, "selection.tiles": [4, 4], "selection.cuboids": [3, 4, 4]},
    ),
    "re-ttention": Contender(Listed("selection.size", ([0, 6, 0], [0, 2, 0], [0, 1, 0]))),
    "ditfastattn": Contender(),
}

# Mixtures of our own: named order-rule-skipped.
ORDERS: dict[str, Any] = {"rows": "rows", "hilbert": "hilbert"}
RULES: dict[str, dict[str, Any]] = {
    "row": {"name": "pooled"},
    "lse8": {"name": "pooled", "sub_block": 8, "reduction": "logsumexp"},
    "lse8-head": {"name": "pooled", "sub_block": 8, "reduction": "logsumexp", "per": "head"},
    "lse4": {"name": "pooled", "sub_block": 4, "reduction": "logsumexp"},
    "lse4-head": {"name": "pooled", "sub_block": 4, "reduction": "logsumexp", "per": "head"},
    "lse4-recall": {"name": "pooled", "sub_block": 4, "reduction": "logsumexp", "spread": "recall"},
    "lse4-gain": {"name": "pooled", "sub_block": 4, "reduction": "logsumexp", "spread": "gain"},
    "lse8-gain": {"name": "pooled", "sub_block": 8, "reduction": "logsumexp", "spread": "gain"},
    "lse2": {"name": "pooled", "sub_block": 2, "reduction": "logsumexp"},
    "mass": {"name": "mass"},
    "flat": {"name": "mass", "adaptive": False},
}
SKIPPED = ("drop", "summary")
OURS = "ours"
# Ours with a cache of what the summaries of skipped blocks missed at the last whole call: each token keeps its own, as
# the systems do that keep residuals, or runs of tokens the mean of theirs. Named order-rule-cachedS, S the percent of
# what a run computes that goes into its whole steps.
CACHED, IN_PARTS = f"{OURS}-cached", f"{OURS}-cached-parts"
PART = 8
CACHE: dict[str, Any] = {"name": "reuse", "ratio": False, "summary": True}
_CACHED_RULES = ("lse4", "lse4-gain", "lse2")
_WHOLE_SHARES = (50, 67, 80)
_SEARCHES_AFTER = (4, 12)  # of mixtures that search, as many steps after the first one


def small(name: str, density: float, dense_steps: int, value: Any) -> Recipe:
    """A contender at a density.

    Args:
        name: in `CONTENDERS`.
        density: one of `DENSITIES`.
        dense_steps: first steps that are dense.
        value: what its knob was found to be: a number for `Sought`, a profile's path for `Calibrated`, else unused.
    """
    contender = CONTENDERS[name]
    return load_recipe(name).override(
        {
            **SMALL,
            **contender.settings,
            "schedule.dense_steps": dense_steps,
            **_turned(contender.knob, density, value),
        }
    )


def _turned(knob: Knob, density: float, value: Any) -> dict[str, Any]:
    if isinstance(knob, Budget):
        return {knob.setting: density}
    if isinstance(knob, Listed):
        return {knob.setting: knob.values[DENSITIES.index(density)]}
    return {"selection.file" if isinstance(knob, Calibrated) else knob.setting: value}


def mixture(name: str, density: float, dense_steps: int) -> Recipe:
    """A mixture of our own.

    Args:
        name: order-rule-skipped, of `ORDERS`, `RULES` and `SKIPPED`.
        density: share of key blocks.
        dense_steps: first steps that are dense.
    """
    order, _, rest = name.partition("-")
    rule, _, skipped = rest.rpartition("-")
    searches = searching(name)
    later = [dense_steps, *(dense_steps + step for step in _SEARCHES_AFTER)]
    return Recipe.from_dict(
        {
            "name": name,
            "order": ORDERS[order],
            "selection": {**RULES[rule], "density": density},
            "schedule": {"dense_steps": dense_steps, **({"refresh_steps": later} if searches else {})},
            "skipped": skipped,
            "block_q": BLOCK,
            "block_k": BLOCK,
            "source": "a candidate of the search for presets of our own",
            "licence": "Apache-2.0",
        }
    )


def searching(name: str) -> bool:
    """Whether a mixture searches block masses, in passes over all keys that no density counts."""
    return bool(RULES[name.partition("-")[2].rpartition("-")[0]]["name"] == "mass")


def mixtures() -> Iterator[str]:
    """Names of all of them."""
    for parts in itertools.product(ORDERS, RULES, SKIPPED):
        yield "-".join(parts)


def at_run_density(name: str, run_density: float, whole_steps: int, steps: int, blocks: int) -> Recipe | None:
    """A mixture that computes as much over a run as another recipe: as many whole steps, the rest in its budget.

    Args:
        name: of the mixture.
        run_density: to be met, to within half a block in every row.
        whole_steps: of the steps, those with whole attention; a mixture that searches makes one of them itself.
        steps: denoising steps of a run.
        blocks: key blocks of a row.

    Returns:
        The recipe, or `None` where so many whole steps leave nothing for the others.
    """
    searches = searching(name)
    whole = max(whole_steps, 1) if searches else whole_steps
    if whole >= steps:
        return None
    kept = math.floor((run_density * steps - whole) / (steps - whole) * blocks + 0.5)
    return mixture(name, kept / blocks, whole - searches) if 1 <= kept <= blocks else None


def twin(name: str) -> str:
    """The same mixture with skipped blocks treated the other way."""
    choice, _, skipped = name.rpartition("-")
    return f"{choice}-{SKIPPED[1 - SKIPPED.index(skipped)]}"


def cached_mixtures() -> Iterator[str]:
    """Names of all mixtures with a cache."""
    for rule, share in itertools.product(_CACHED_RULES, _WHOLE_SHARES):
        yield f"hilbert-{rule}-cached{share}"


def cached(name: str, run_density: float, steps: int, blocks: int, part: int = 1) -> Recipe | None:
    """A mixture with a cache that computes as much over a run as another recipe.

    Args:
        name: of `cached_mixtures`.
        run_density, steps, blocks: as `at_run_density`.
        part: tokens that share what is kept.

    Returns:
        The recipe, or `None` where so little computing leaves no whole step, or nothing for the others.
    """
    choice, _, share = name.rpartition("-cached")
    whole = math.floor(run_density * steps * int(share) / 100 + 0.5)
    plain = at_run_density(f"{choice}-drop", run_density, whole, steps, blocks) if whole else None
    if plain is None:
        return None
    changed = {
        "name": name,
        "skipped": {**CACHE, "part": part},
        "schedule": {"refresh_steps": growing(whole, steps)},
    }
    return Recipe.from_dict({**plain.to_dict(), **changed})


def growing(count: int, steps: int) -> list[int]:
    """So many of the steps, from step 0 on, whose gaps grow evenly: the first ones lie closest."""
    found = [0]
    for number in range(1, count):
        planned = math.floor(steps * number * (number + 1) / (count * (count + 1)) + 0.5)
        found.append(max(planned, found[-1] + 1))
    return found


def as_ours(recipe: Recipe) -> Recipe:
    """The recipe of a mixture that the search found, under the name that tells what it does with skipped blocks."""
    if isinstance(recipe.skipped, Reuse):
        name = CACHED if recipe.skipped.part == 1 else IN_PARTS
    else:
        name = OURS if recipe.skipped.summarizes else f"{OURS}-drop"
    return Recipe.from_dict({**recipe.to_dict(), "name": name, "source": recipe.name})


def dense_steps_of(steps: int) -> Sequence[int]:
    """The numbers of dense first steps in the table."""
    return sorted({round(fraction * steps) for fraction in DENSE_FRACTIONS})
