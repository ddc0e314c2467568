"""What a visitor may ask for: models on the owner's list, bounded numbers, recipes without paths, plain prompts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sparse_dit.pipelines.generate import TINY_WAN, Request, check_model_folder, find_model
from sparse_dit.recipe import Recipe

MAX_SEED = 2**53 - 1  # what a browser's numbers hold exactly
_MAX_NUMBER = 2**16  # of a recipe: far above every block size, step and layer
_MAX_BRACKETS = 100
_MARKUP = re.compile(r"<\s*[a-zA-Z/!?]")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]")
_SETTING = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_TEXTS = frozenset({"name", "source", "licence", "note"})  # fields of a recipe that are shown and never looked up


@dataclass(frozen=True)
class Limits:
    """How much one run may be.

    Args:
        steps: denoising steps at most.
        pixels: width x height x frames at most.
        prompt: characters at most.
        recipe: characters at most of a recipe's YAML.

    Raises:
        ValueError: a limit is below 1.
    """

    steps: int = 50
    pixels: int = 2**22
    prompt: int = 1000
    recipe: int = 4000

    def __post_init__(self) -> None:
        for name in ("steps", "pixels", "prompt", "recipe"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}; valid: a whole number from 1")

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Holds the arguments of a pipeline's call, the model's defaults filled in, against the limits.

        Raises:
            ValueError: too many steps or pixels.
        """
        steps = arguments.get("num_inference_steps", 1)
        if steps > self.steps:
            raise ValueError(f"steps: {steps}; valid: 1 to {self.steps} on this server")
        pixels = math.prod(arguments.get(name, 1) for name in ("width", "height", "num_frames"))
        if pixels > self.pixels:
            raise ValueError(
                f"size: {pixels:,} pixels (width x height x frames); valid: at most {self.pixels:,} on this server"
            )


def allowed_models(names: Sequence[str]) -> dict[str, str]:
    """What the page may load: the name it shows → what `load_pipeline` takes. Visitors only ever send the name.

    Args:
        names: `tiny-wan`, Hub ids, and folders in diffusers' save format, which are checked and shown by their last
            name.

    Raises:
        ValueError: no name, an unknown or damaged model, weights that are not safetensors, a link that leads out of its
            folder, or two models of one name.
    """
    models: dict[str, str] = {}
    for name in names:
        shown, source = name, find_model(name)
        if name != TINY_WAN and isinstance(source, Path):
            folder = source.resolve()
            _check_links(folder)
            check_model_folder(folder)
            shown, source = folder.name, folder
        if shown in models:
            raise ValueError(f"models: two are called {shown!r}; valid: models of different names")
        models[shown] = TINY_WAN if name == TINY_WAN else str(source)
    if not models:
        raise ValueError(f"models: there is none; valid: at least one, such as {TINY_WAN}")
    return models


def read_request(
    limits: Limits, prompt: Any, seed: Any, steps: Any, width: Any, height: Any, num_frames: Any
) -> Request:
    """A request from what a page sends. Empty numbers are left to the model.

    Raises:
        ValueError: an empty or long prompt, one with markup or control characters, or a number that is none or out of
            its range.
    """
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("prompt: it is empty; valid: a few words on what the clip should show")
    if len(prompt) > limits.prompt:
        raise ValueError(f"prompt: {len(prompt):,} characters; valid: at most {limits.prompt:,}")
    if _MARKUP.search(prompt):
        raise ValueError("prompt: it holds markup (a < in front of a letter); valid: plain text")
    if _CONTROL.search(prompt):
        raise ValueError("prompt: it holds control characters; valid: plain text")
    return Request(
        prompt=" ".join(prompt.split()),
        seed=_whole("seed", 0 if seed is None else seed, 0, MAX_SEED),
        steps=_optional("steps", steps, limits.steps),
        width=_optional("width", width, limits.pixels),
        height=_optional("height", height, limits.pixels),
        num_frames=_optional("frames", num_frames, limits.pixels),
    )


def split_recipe(recipe: Recipe) -> tuple[float | None, int, str, str]:
    """Density, dense steps, precision, and the rest as YAML: what `join_recipe` puts together again.

    The density is None where the recipe's selection does not have one in force.
    """
    plain = recipe.to_dict()
    density = None
    if isinstance(plain["selection"], dict):
        plain["selection"] = dict(plain["selection"])
        density = plain["selection"].pop("density", None)
    schedule = dict(plain["schedule"])
    steps, precision = int(schedule.pop("dense_steps")), str(plain.pop("precision"))
    rest = {**plain, "schedule": schedule}
    return density, steps, precision, yaml.safe_dump(rest, sort_keys=False, allow_unicode=True, width=100)


def takes_density(recipe: Recipe) -> bool:
    """Whether the recipe's selection can be given a density."""
    return hasattr(recipe.selection, "density")


def join_recipe(limits: Limits, density: Any, dense_steps: Any, precision: Any, rest: Any) -> Recipe:
    """A recipe from what a page sends. Empty values are left to the rest.

    Raises:
        ValueError: what `Recipe` refuses, YAML with anchors, tags or paths, numbers that are too large, or a setting
            that is given both by itself and in the rest.
    """
    plain = _read_yaml(limits, rest)
    given = {"selection.density": density, "schedule.dense_steps": dense_steps, "precision": precision}
    settings = {name: value for name, value in given.items() if value not in (None, "")}
    for name in settings:
        head, _, tail = name.partition(".")
        inside = plain.get(head)
        if (isinstance(inside, Mapping) and tail in inside) if tail else head in plain:
            raise ValueError(f"{name}: it stands in its own field and in the YAML; valid: one of them")
    if "schedule.dense_steps" in settings:
        settings["schedule.dense_steps"] = _whole("dense steps", dense_steps, 0, limits.steps)
    if "selection.density" in settings and not _is_number(density):
        raise ValueError(f"density: {_short(density)}; valid: a number above 0, up to 1")
    recipe = Recipe.from_dict(plain)
    if "selection.density" in settings and not takes_density(recipe):
        raise ValueError(f"density: the selection of {recipe.name!r} has none; valid: an empty field")
    return recipe.override(settings)


def _check_links(folder: Path) -> None:
    for file in sorted(folder.rglob("*")):
        if file.is_symlink() and not file.resolve().is_relative_to(folder):
            raise ValueError(f"models: {file} is a link out of its folder; valid: files, or the model's Hub id")


def _read_yaml(limits: Limits, text: Any) -> dict[str, Any]:
    if not isinstance(text, str) or len(text) > limits.recipe:
        raise ValueError(f"recipe: valid: YAML of at most {limits.recipe:,} characters")
    if text.count("[") + text.count("{") > _MAX_BRACKETS:  # YAML's scanner takes seconds for some thousands
        raise ValueError(f"recipe: more than {_MAX_BRACKETS} brackets; valid: plain settings")
    try:
        # Aliases make a small text a huge value; a tag is a constructor's name.
        if any(isinstance(token, yaml.AliasToken | yaml.AnchorToken | yaml.TagToken) for token in yaml.scan(text)):
            raise ValueError("recipe: the YAML holds anchors or tags; valid: plain settings")
        plain = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark is not None else ""
        raise ValueError(f"recipe: it is no YAML{where}; valid: settings as they stand in the field") from None
    if not isinstance(plain, dict):
        raise ValueError("recipe: valid: a YAML mapping of settings")
    for name, value in plain.items():
        if not isinstance(name, str):
            raise ValueError(f"recipe: {_short(name)}; valid: names of settings")
        if name not in _TEXTS:
            _check_plain(name, value)
        elif not isinstance(value, str):
            raise ValueError(f"{name}: {_short(value)}; valid: text")
    return plain


def _check_plain(name: str, value: Any) -> None:
    """Refuses what could name a file or ask for much memory; whether a setting exists is the recipe's business."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            _check_plain(f"{name}.{key}", entry)
    elif isinstance(value, list):
        for entry in value:
            _check_plain(name, entry)
    elif isinstance(value, str):
        if not _SETTING.fullmatch(value):
            raise ValueError(f"{name}: {_short(value)}; valid: a name of letters, digits, - and _; no paths")
    elif value is not None and not isinstance(value, bool) and not (_is_number(value) and abs(value) <= _MAX_NUMBER):
        raise ValueError(f"{name}: {_short(value)}; valid: a number up to {_MAX_NUMBER:,}")


def _optional(name: str, value: Any, largest: int) -> int | None:
    return None if value is None else _whole(name, value, 1, largest)


def _whole(name: str, value: Any, smallest: int, largest: int) -> int:
    if not _is_number(value) or value != int(value) or not smallest <= value <= largest:
        raise ValueError(f"{name}: {_short(value)}; valid: a whole number from {smallest} to {largest:,}")
    return int(value)


def _is_number(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, str | int | float | None) else type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}..."
