"""Recipes: five independent choices that make a method, as frozen dataclasses and as YAML."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from sparse_dit.kernels.blocks import BLOCK_SIZES
from sparse_dit.kernels.ops import PRECISIONS
from sparse_dit.orders import ORDERS, Clusters, Order, Rows
from sparse_dit.schedule import Schedule
from sparse_dit.selection import SELECTIONS, AnySelection, Band, Every, Gate, HeadTypes, Pooled, Profiled, Radial
from sparse_dit.skipped import SKIPPED, Drop, Reuse, Skipped

# Selections that mean something in some orders only: those, and why.
_ORDERS_OF: dict[type[Any], tuple[tuple[str, ...], str]] = {
    Radial: (("rows",), "its band counts tokens inside frames"),
    Band: (("rows", "time_major"), "it is the band of a spatial or of a temporal head"),
    HeadTypes: (("rows",), "it finds the order of each head itself"),
    Gate: (("rows",), "it partitions the grid itself, by layer"),
    Profiled: (("rows",), "a profile holds the order of each head"),
}


@dataclass(frozen=True)
class Recipe:
    """A method: order, selection, schedule, precision, skipped, and the block sizes.

    Args:
        name: how reports call it.
        order: in which order the tokens enter blocks (`sparse_dit.orders`).
        selection: which key blocks a query block computes (`sparse_dit.selection`).
        schedule: which steps and layers stay dense, and when a selection is refreshed (`sparse_dit.schedule`).
        precision: arithmetic of the sparse calls, one of `PRECISIONS`; `native` is the dtype of the model.
        pv_threshold: part of the precision: the value product of a tile of keys is left out where, in every row, its
            scores lie further than this below the largest so far, in natural log units (`block_sparse_attention`;
            SpargeAttn's second stage, whose unit is log2). `None` leaves none out. Whole calls never do.
        skipped: what becomes of blocks that were not selected (`sparse_dit.skipped`).
        block_q: query tokens of a block, one of `BLOCK_SIZES`.
        block_k: key tokens of a block, one of `BLOCK_SIZES`.
        source: where the settings come from.
        licence: licence of the source's code.
        note: where the recipe differs from its source.
        state_limit: GiB that the layers of a model may keep between steps; a run that would keep more is refused before
            its first sparse call. `None` is no limit.

    Raises:
        ValueError: a value is not one of the valid ones, or two choices exclude each other.
    """

    name: str = "custom"
    order: Order = field(default_factory=Rows)
    selection: AnySelection = field(default_factory=Radial)
    schedule: Schedule = field(default_factory=Schedule)
    precision: str = "native"
    skipped: Skipped = field(default_factory=Drop)
    block_q: int = 64
    block_k: int = 64
    source: str = ""
    licence: str = ""
    note: str = ""
    state_limit: float | None = None
    pv_threshold: float | None = None

    def __post_init__(self) -> None:
        for name, valid in (("precision", PRECISIONS), ("block_q", BLOCK_SIZES), ("block_k", BLOCK_SIZES)):
            value = getattr(self, name)
            if value not in valid:
                raise ValueError(f"{name}: {value!r}; valid: {_listed(valid)}")
        if self.state_limit is not None and not self.state_limit >= 0.0:
            raise ValueError(f"state_limit: {self.state_limit!r}; valid: 0 or more GiB, or none")
        if self.pv_threshold is not None and not 0.0 < self.pv_threshold < float("inf"):
            raise ValueError(f"pv_threshold: {self.pv_threshold!r}; valid: a positive number, or none")
        self._check_choices()

    def _check_choices(self) -> None:
        """Raises ValueError for choices that exclude each other."""
        valid, why = _ORDERS_OF.get(type(self.selection), ((), ""))
        if valid and not any(type(self.order) is ORDERS[name] for name in valid):
            order, selection = _name_of(self.order, ORDERS), _name_of(self.selection, SELECTIONS)
            raise ValueError(f"order: {order!r} with selection {selection!r}; {why}; valid: {_listed(valid)}")
        judged = isinstance(self.selection, Pooled) and not self.selection.adjacent
        if isinstance(self.order, Clusters) and not judged:
            raise ValueError(
                f"order: 'clusters' with selection {_name_of(self.selection, SELECTIONS)!r}; blocks of clusters "
                "have no place in the grid; valid: selection pooled, without adjacent"
            )
        if isinstance(self.order, Clusters) and isinstance(self.skipped, Reuse) and self.skipped.part > 1:
            raise ValueError(
                f"skipped.part: {self.skipped.part} with order 'clusters', whose tokens change places; valid: 1"
            )
        if isinstance(self.selection, Profiled):
            made_for = self.selection.profile.block_q, self.selection.profile.block_k
            if (self.block_q, self.block_k) != made_for:
                raise ValueError(
                    f"block_q, block_k: {self.block_q} x {self.block_k} with a profile of blocks of {made_for[0]} x "
                    f"{made_for[1]}; valid: those of the profile"
                )
        part = self.selection.sub_block if isinstance(self.selection, Pooled) else None
        if part is not None and (self.block_q % part or self.block_k % part):
            raise ValueError(
                f"selection.sub_block: {part} with blocks of {self.block_q} x {self.block_k}; valid: a divisor of both"
            )
        if isinstance(self.selection, Every) and not isinstance(self.skipped, Drop):
            skipped = _name_of(self.skipped, SKIPPED)
            raise ValueError(f"skipped: {skipped!r} with selection 'all', which skips nothing; valid: drop")
        if isinstance(self.selection, Every) and self.precision == "native" and self.pv_threshold is not None:
            raise ValueError(
                f"pv_threshold: {self.pv_threshold!r} with selection 'all' in native precision, which the model's own "
                "attention computes; valid: another selection or precision"
            )

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> "Recipe":
        """Build a recipe from plain values, as they stand in YAML.

        Args:
            mapping: fields of the recipe; `order`, `selection` and `skipped` are a name or a mapping with `name` and
                settings.

        Raises:
            ValueError: unknown field or name (with the nearest valid one), a value of the wrong kind or out of range,
                or two settings that exclude each other; one line.
        """
        plain = dict(_mapping(mapping, "recipe"))
        registries: dict[str, Mapping[str, type[Any]]] = {"order": ORDERS, "selection": SELECTIONS, "skipped": SKIPPED}
        for name, registry in registries.items():
            if name in plain:
                plain[name] = _choice(plain[name], registry, name)
        if "schedule" in plain:
            plain["schedule"] = _build(Schedule, plain["schedule"], "schedule")
        recipe = typing.cast(Recipe, _build(cls, plain, "recipe"))
        if isinstance(recipe.skipped, Reuse) and not recipe.schedule.keeps:
            raise ValueError(
                "skipped: 'reuse' with a refresh in every step, which would make every call whole; "
                "valid: schedule.refresh_every above 1, or schedule.refresh_steps"
            )
        return recipe

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without note, pv_threshold and state_limit that are not set; `from_dict` takes them back."""
        extra = {"note": self.note} if self.note else {}
        limit = {} if self.state_limit is None else {"state_limit": self.state_limit}
        skip = {} if self.pv_threshold is None else {"pv_threshold": self.pv_threshold}
        return {
            "name": self.name,
            "order": _plain_choice(self.order, ORDERS),
            "selection": _plain_choice(self.selection, SELECTIONS),
            "schedule": _plain_fields(self.schedule),
            "precision": self.precision,
            **skip,
            "skipped": _plain_choice(self.skipped, SKIPPED),
            "block_q": self.block_q,
            "block_k": self.block_k,
            "source": self.source,
            "licence": self.licence,
            **extra,
            **limit,
        }

    def computed(self) -> dict[str, Any]:
        """`to_dict` by which results are told apart: without what is only said of a recipe (source, licence, note)."""
        return {name: value for name, value in self.to_dict().items() if name not in ("source", "licence", "note")}

    def to_yaml(self) -> str:
        """The recipe as a YAML document; `load_recipe` reads it back from a file."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def override(self, settings: Mapping[str, Any]) -> "Recipe":
        """The recipe with some settings replaced.

        A setting that excludes another one takes its place (`selection.density` removes `selection.decay`), and a new
        `selection.name` starts from the defaults of that selection.

        Args:
            settings: dotted names to values, such as `{"selection.density": 0.3, "block_q": 32}`.

        Raises:
            ValueError: as `from_dict`.
        """
        plain = self.to_dict()
        for name in sorted(settings, key=lambda dotted: not dotted.endswith(".name")):
            head, _, tail = name.partition(".")
            if not tail:
                plain[head] = settings[name]
                continue
            part = plain.get(head, {})
            part = {"name": part} if isinstance(part, str) else dict(part)
            if tail == "name" and settings[name] != part.get("name"):
                part = {}
            for rival in _rivals(head, part.get("name"), tail):
                if f"{head}.{rival}" not in settings:
                    part.pop(rival, None)
            plain[head] = {**part, tail: settings[name]}
        return Recipe.from_dict(plain)


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package, sorted."""
    return sorted(file.name.removesuffix(".yaml") for file in _presets().iterdir() if file.name.endswith(".yaml"))


def load_recipe(recipe: "str | Path | Mapping[str, Any] | Recipe") -> Recipe:
    """Find a recipe.

    Args:
        recipe: the name of a shipped recipe, the path of a YAML file, a mapping of fields, or a recipe, which is
            returned as it is.

    Raises:
        ValueError: no such name or file, a file that is not YAML, or anything `Recipe.from_dict` refuses; one line.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return Recipe.from_dict(recipe)
    if not isinstance(recipe, str | Path):
        raise ValueError(f"recipe: {recipe!r}; valid: a name, a path, a mapping or a Recipe")
    if isinstance(recipe, str) and recipe in recipe_names():
        return _from_yaml((_presets() / f"{recipe}.yaml").read_text(encoding="utf-8"), recipe)
    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"recipe: {_unknown(str(recipe), recipe_names(), 'name')}, or the path of a .yaml file")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe: cannot read {str(path)!r} ({type(error).__name__})") from error
    return _from_yaml(text, str(path))


def _presets() -> Traversable:
    return resources.files("sparse_dit") / "recipes"


def _from_yaml(text: str, origin: str) -> Recipe:
    try:
        loaded = yaml.safe_load(text)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where is not None else ""
        raise ValueError(f"recipe: {origin!r} is not YAML{line}") from error
    try:
        return Recipe.from_dict(loaded)
    except ValueError as error:
        raise ValueError(f"{error} (in recipe {origin!r})") from None


def _choice(value: Any, registry: Mapping[str, type[Any]], where: str) -> Any:
    """The dataclass that a name, or a mapping with a name, stands for."""
    settings = {"name": value} if isinstance(value, str) else dict(_mapping(value, where))
    name = settings.pop("name", None)
    if not isinstance(name, str) or name not in registry:
        raise ValueError(f"{where}.name: {_unknown(name, registry, 'name')}")
    return _build(registry[name], settings, where)


def _build(cls: type[Any], settings: Any, where: str) -> Any:
    hints = typing.get_type_hints(cls)
    names = [entry.name for entry in dataclasses.fields(cls)]
    settings = _mapping(settings, where)
    for name in settings:
        if name not in names:
            raise ValueError(f"{where}: {_unknown(name, names, 'field')}")
    exclusive = [name for name in getattr(cls, "EXCLUSIVE", ()) if settings.get(name) is not None]
    if len(exclusive) > 1:
        raise ValueError(f"{where}: {' and '.join(exclusive)} exclude each other; valid: one of them")
    prefix = "" if where == "recipe" else f"{where}."
    return cls(**{name: _typed(value, hints[name], prefix + name) for name, value in settings.items()})


_KINDS: dict[Any, tuple[Any, str]] = {
    int: (int, "a whole number"),
    float: (int | float, "a number"),
    str: (str, "text"),
    bool: (bool, "true or false"),
}


def _typed(value: Any, hint: Any, where: str) -> Any:
    """`value` as the kind a field declares, or a one-line error."""
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        lists = isinstance(value, list | tuple)
        hint = next((kind for kind in kinds if (typing.get_origin(kind) is tuple) == lists), kinds[0])
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where}: {value!r}; valid: a list")
        return tuple(_typed(entry, typing.get_args(hint)[0], where) for entry in value)
    if hint not in _KINDS:
        return value
    kind, words = _KINDS[hint]
    if not isinstance(value, kind) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{where}: {value!r}; valid: {words}")
    return float(value) if hint is float else value


def _plain_choice(chosen: Any, registry: Mapping[str, type[Any]]) -> Any:
    settings = _plain_fields(chosen)
    return {"name": _name_of(chosen, registry), **settings} if settings else _name_of(chosen, registry)


def _name_of(chosen: Any, registry: Mapping[str, type[Any]]) -> str:
    return next((name for name, cls in registry.items() if cls is type(chosen)), type(chosen).__name__)


def _plain_fields(chosen: Any) -> dict[str, Any]:
    plain = {entry.name: _plain_value(getattr(chosen, entry.name)) for entry in dataclasses.fields(chosen)}
    exclusive = getattr(type(chosen), "EXCLUSIVE", ())
    # The last of several exclusive settings that has a value is the one in force.
    in_force = [name for name in exclusive if plain[name] is not None][-1:]
    defaults = {entry.name: entry.default for entry in dataclasses.fields(chosen)}
    # Settings that a result row does not name while they have their default, so that older rows keep their identity.
    unsaid = [name for name in getattr(type(chosen), "UNSAID", ()) if getattr(chosen, name) == defaults[name]]
    return {
        name: value
        for name, value in plain.items()
        if name not in unsaid and (name not in exclusive or name in in_force)
    }


def _plain_value(value: Any) -> Any:
    return [_plain_value(entry) for entry in value] if isinstance(value, tuple) else value


def _rivals(part: str, name: Any, setting: str) -> list[str]:
    owner = Schedule if part == "schedule" else SELECTIONS.get(name) if part == "selection" else None
    exclusive: tuple[str, ...] = getattr(owner, "EXCLUSIVE", ())
    return [name for name in exclusive if setting in exclusive and name != setting]


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: {value!r}; valid: a mapping of fields")
    return value


def _unknown(value: Any, valid: Iterable[str], what: str) -> str:
    near = difflib.get_close_matches(str(value), list(valid), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return f"unknown {what} {value!r}{hint} valid: {_listed(valid)}"


def _listed(valid: Iterable[Any]) -> str:
    return ", ".join(str(entry) for entry in valid)
