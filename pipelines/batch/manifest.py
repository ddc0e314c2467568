"""Rows of a JSONL or CSV file as requests, each checked on its own."""

import csv
import io
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from sparse_dit.pipelines.batch.identity import digest
from sparse_dit.pipelines.generate import Request
from sparse_dit.recipe import Recipe, load_recipe

SUFFIXES = (".jsonl", ".csv")
RECIPE = "recipe"
_WORDS = {str: "text", int: "a whole number", float: "a number"}


@dataclass(frozen=True)
class Item:
    """A row that can be run.

    Attributes:
        line: where its row begins in the manifest, from 1.
        id: digest of request, recipe, model and video format: rows of equal id make equal videos.
        request: what to generate.
        recipe: with which method.
    """

    line: int
    id: str
    request: Request
    recipe: Recipe

    @property
    def name(self) -> str:
        """Name of its video without suffix: the beginning of the prompt, for people, and the id."""
        words = re.sub(r"[^a-z0-9]+", "-", self.request.prompt.lower())[:40].strip("-")
        return f"{words}-{self.id}" if words else self.id


@dataclass(frozen=True)
class Refused:
    """A row that cannot be run: its line in the manifest, from 1, and why, in one line."""

    line: int
    problem: str


def read_manifest(
    path: Path, request: Request, recipe: Recipe, context: Mapping[str, Any]
) -> tuple[list[Item], list[Refused]]:
    """Reads requests from a file, one a row.

    A row names fields of `Request`, of which `prompt` must be there, `recipe` (a name or YAML file; in JSONL also a
    mapping) and `recipe.FIELD` for any field of the recipe. JSONL: an object a line. CSV: the names stand in the first
    row. An empty cell and null are the same as a field that is not there.

    Args:
        path: ends in .jsonl or .csv, in UTF-8.
        request: what a row has for the fields that it leaves out.
        recipe: what a row runs with, or changes, where it names none.
        context: what makes equal rows different, such as the model: goes into the ids.

    Returns:
        The rows that can be run and the others, each in the order of the file.

    Raises:
        ValueError: the file cannot be read, is of another kind or has no row.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"manifest: {str(path)!r}; valid: a file ending in {' or '.join(SUFFIXES)}")
    try:
        # What is no UTF-8 becomes lone surrogates, so that one bad line is one bad row.
        text = path.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise ValueError(f"manifest: {str(path)!r} ({error.strerror}); valid: a file that can be read") from None
    recipes: dict[str, Recipe] = {}
    items: list[Item] = []
    refused: list[Refused] = []
    for line, row in (_jsonl if path.suffix == ".jsonl" else _csv)(text):
        try:
            if isinstance(row, str):
                raise ValueError(row)
            asked, chosen = _request(row, request), _recipe(row, recipe, recipes)
            what = {"request": {field.name: getattr(asked, field.name) for field in fields(asked)}}
            identity = digest({**what, "recipe": chosen.to_dict(), **context})
            items.append(Item(line, identity, asked, chosen))
        except ValueError as error:
            refused.append(Refused(line, " ".join(str(error).split())))
    if not items and not refused:
        raise ValueError(f"manifest: {str(path)!r} has no row; valid: one request a row")
    return items, refused


def _jsonl(text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Each line that is not blank: its number, and its object or why it is none."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_constant=_no_constant, object_pairs_hook=_object)
        except ValueError as error:
            yield number, f"no JSON ({error})"
            continue
        yield number, row if isinstance(row, dict) else f"{line.strip()[:40]!r}; valid: a JSON object"


def _csv(text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Each row that is not blank: the number of its first line, and its cells that are not empty or what is wrong."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, f"no CSV ({error})"
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            if len(set(header)) < len(header):
                raise ValueError(f"manifest: columns {header}; valid: each name once")
        elif len(cells) > len(header):
            yield line, f"{len(cells)} cells; valid: at most {len(header)}, one a column"
        elif row := {name: _cell(name, cell) for name, cell in zip(header, cells, strict=False) if cell.strip()}:
            yield line, row


def _cell(name: str, cell: str) -> Any:
    """A cell as its field's kind, where it can be read as that; JSON in cells of recipe fields, if it is JSON."""
    if _kinds().get(name) is str or name == RECIPE:
        return cell
    try:
        return json.loads(cell, parse_constant=_no_constant)
    except ValueError:
        return cell


def _request(row: Mapping[str, Any], defaults: Request) -> Request:
    """The request of a row.

    Raises:
        ValueError: no prompt, an unknown field, or a value that is not valid.
    """
    kinds = _kinds()
    changes: dict[str, Any] = {}
    for name, value in row.items():
        if name == RECIPE or name.startswith(f"{RECIPE}.") or value is None:
            continue
        if name not in kinds:
            raise ValueError(f"unknown field {name!r}; valid: {', '.join(kinds)}, {RECIPE}, {RECIPE}.FIELD")
        kind = kinds[name]
        fits = isinstance(value, int | float) if kind is float else isinstance(value, kind)
        if not fits or isinstance(value, bool):
            raise ValueError(f"{name}: {value!r}; valid: {_WORDS[kind]}")
        if kind is str and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ValueError(f"{name}: not all of it is UTF-8; valid: text in UTF-8")
        changes[name] = float(value) if kind is float else value
    if not str(changes.get("prompt", "")).strip():
        raise ValueError("prompt: there is none; valid: text")
    return replace(defaults, **changes)


def _recipe(row: Mapping[str, Any], default: Recipe, known: dict[str, Recipe]) -> Recipe:
    """The recipe of a row; `known` keeps those that other rows asked for.

    Raises:
        ValueError: as `load_recipe` and `Recipe.override`.
    """
    asked = {name: value for name, value in row.items() if name.startswith(RECIPE) and value is not None}
    if not asked:
        return default
    key = json.dumps(asked, sort_keys=True)
    if key not in known:
        base = load_recipe(asked[RECIPE]) if RECIPE in asked else default
        prefix = f"{RECIPE}."
        changes = {name.removeprefix(prefix): value for name, value in asked.items() if name.startswith(prefix)}
        known[key] = base.override(changes)
    return known[key]


def _kinds() -> dict[str, type]:
    """The fields of a request and the kind of each; `None` is not told."""
    kinds = {}
    for name, hint in typing.get_type_hints(Request).items():
        choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        kinds[name] = next(kind for kind in choices if kind is not type(None))
    return kinds


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"fields {', '.join(names)}; valid: each name once")
    return dict(pairs)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")
