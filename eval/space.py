"""Search spaces: recipes times values of their knobs, declared in YAML."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from sparse_dit.recipe import Recipe, load_recipe

DENSE_SHARE = "dense_share"
"""A knob of its own: the share of the first steps that stay dense, rounded to whole steps."""

_FIELDS = ("recipe", "set", "vary")


@dataclass(frozen=True)
class Candidate:
    """A recipe of a space.

    Args:
        label: its name and the knobs that were turned, in one line.
        recipe: with all of it set.
    """

    label: str
    recipe: Recipe


def space_names() -> list[str]:
    """Names of the spaces that come with the package, sorted."""
    return sorted(file.name.removesuffix(".yaml") for file in _shipped().iterdir() if file.name.endswith(".yaml"))


def load_space(source: str, steps: int) -> list[Candidate]:
    """The candidates of a space.

    A space is a list of entries: `recipe`, a name or YAML file; `set`, settings by dotted name; `vary`, lists of values
    by dotted name, of which every combination is a candidate. `dense_share` in `vary` is a share of the first steps.

    Args:
        source: a name of `space_names`, or the path of a YAML file.
        steps: denoising steps of a run.

    Raises:
        ValueError: no such space, a field that is none, or a setting that a recipe does not take; names the entry.
    """
    entries = _read(source)
    candidates: dict[str, Candidate] = {}
    for number, entry in enumerate(entries, start=1):
        try:
            for candidate in _candidates(entry, steps):
                candidates.setdefault(_key(candidate.recipe), candidate)
        except ValueError as error:
            raise ValueError(f"space: {source!r} entry {number}: {error}") from None
    return list(candidates.values())


def _read(source: str) -> Sequence[Any]:
    if source in space_names():
        text = (_shipped() / f"{source}.yaml").read_text(encoding="utf-8")
    else:
        try:
            text = Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"space: cannot read {source!r} ({type(error).__name__}); "
                f"valid: {', '.join(space_names())} or a YAML file"
            ) from None
    try:
        entries = yaml.safe_load(text)
    except yaml.YAMLError:
        entries = None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"space: {source!r}; valid: a YAML list of entries with {', '.join(_FIELDS)}")
    return entries


def _candidates(entry: Any, steps: int) -> list[Candidate]:
    if not isinstance(entry, Mapping) or "recipe" not in entry or set(entry) - set(_FIELDS):
        raise ValueError(f"{entry!r}; valid: a mapping with recipe and, if wanted, {' and '.join(_FIELDS[1:])}")
    fixed, knobs = entry.get("set") or {}, entry.get("vary") or {}
    if not isinstance(fixed, Mapping) or not isinstance(knobs, Mapping):
        raise ValueError("set, vary; valid: mappings by dotted name")
    for name, values in knobs.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"vary.{name}: {values!r}; valid: a list of values")
    base = load_recipe(entry["recipe"]).override(fixed)
    found = []
    for values in itertools.product(*knobs.values()):
        turned = dict(zip(knobs, values, strict=True))
        label = ", ".join([base.name, *(f"{name.rpartition('.')[2]} {value}" for name, value in turned.items())])
        if DENSE_SHARE in turned:
            share = turned.pop(DENSE_SHARE)
            if not isinstance(share, int | float) or not 0 <= share <= 1:
                raise ValueError(f"vary.{DENSE_SHARE}: {share!r}; valid: numbers from 0 to 1")
            turned["schedule.dense_steps"] = round(share * steps)
        found.append(Candidate(label, base.override(turned)))
    return found


def _key(recipe: Recipe) -> str:
    """Equal for recipes that do the same."""
    return yaml.safe_dump(recipe.to_dict())


def _shipped() -> Any:
    return resources.files("sparse_dit.eval") / "spaces"
