"""The command line: options from the commands' signatures, recipes by dotted options, every error in one line."""

import inspect
import json
import re
import sys
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from functools import partial
from itertools import zip_longest
from typing import Any, get_args

import docstring_parser
import yaml
from jsonargparse import ArgumentParser

from sparse_dit import __version__
from sparse_dit.app.commands import COMMANDS, GROUPS
from sparse_dit.app.setup import Setup
from sparse_dit.pipelines.loggers import hush_imports


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: arguments without the program's name; None takes the process's own.

    Returns:
        The exit code: that of the command, which is 0 unless it says otherwise, or 2 after a one-line error on stderr.
    """
    hush_imports()
    try:
        return read_command(list(sys.argv[1:] if argv is None else argv))() or 0
    except (ArgumentError, ValueError, OSError) as error:
        print(f"sparse-dit: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sparse-dit: interrupted", file=sys.stderr)
        return 130


def read_command(argv: list[str]) -> Callable[[], int | None]:
    """The command that the arguments ask for, with its settings.

    Raises:
        ArgumentError: an unknown command or option, or a value of the wrong kind.
        ValueError: a recipe or a request that is not valid.
    """
    config = _config(argv)
    if any(option.partition("=")[0] == "--recipe" or option.startswith("--recipe.") for option in argv):
        argv = with_whole_recipe(argv, config.get("recipe", Setup.recipe))
    try:
        chosen = build_parser().parse_args(argv)
    except ArgumentError as error:
        unknown = re.search(r"unrecognized arguments: (\S+)", str(error))
        asked = next((name for name in (" ".join(argv[:words]) for words in (1, 2)) if name in COMMANDS), None)
        if unknown is None or asked is None:
            raise
        raise ValueError(_unknown_option(asked, unknown[1].partition("=")[0])) from None
    name, values = chosen.command, chosen[chosen.command].as_dict()
    if name in GROUPS:
        name, values = f"{name} {values['what']}", values[values["what"]]
    command, _ = COMMANDS[name]
    arguments: list[Any] = []
    settings: dict[str, Any] = {}
    for parameter in inspect.signature(command).parameters.values():
        names = _fields(parameter)
        if names:
            given = {name: values[name] for name in names if name in values}
            settings[parameter.name] = parameter.annotation(**{"prompt": "", **given} if "prompt" in names else given)
        elif parameter.kind is parameter.POSITIONAL_ONLY:
            arguments.append(values[parameter.name])
        else:
            settings[parameter.name] = values[parameter.name]
    return partial(command, *arguments, **settings)


def build_parser() -> ArgumentParser:
    """The parser of all commands. What a command takes is read from its signature and docstring."""
    parser = ArgumentParser(
        prog="sparse-dit",
        description="Sparse attention for diffusers video and image pipelines.",
        version=__version__,
        exit_on_error=False,
        allow_abbrev=False,
    )
    subcommands = {"": parser.add_subcommands(dest="command", title="commands")}
    for name, (command, skipped) in COMMANDS.items():
        text = docstring_parser.parse(command.__doc__ or "")
        subparser = ArgumentParser(description=text.short_description, exit_on_error=False, allow_abbrev=False)
        subparser.add_argument("--config", action="config", help="YAML file of options, as --print_config prints it.")
        described = {entry.arg_name: entry.description for entry in text.params}
        for parameter in inspect.signature(command).parameters.values():
            if _fields(parameter):
                subparser.add_class_arguments(parameter.annotation, skip=set(skipped))
            elif parameter.kind is parameter.POSITIONAL_ONLY:
                subparser.add_argument(parameter.name, type=parameter.annotation, help=described[parameter.name])
            else:
                subparser.add_argument(
                    *dict.fromkeys((f"--{parameter.name}", f"--{parameter.name.replace('_', '-')}")),
                    help=described[parameter.name],
                    **_kind(parameter.annotation, parameter.default),
                )
        home, _, own_name = name.rpartition(" ")
        if home not in subcommands:
            group = ArgumentParser(description=GROUPS[home], exit_on_error=False, allow_abbrev=False)
            subcommands[""].add_subcommand(home, group, help=GROUPS[home])
            subcommands[home] = group.add_subcommands(dest="what", title="what")
        subcommands[home].add_subcommand(own_name, subparser, help=text.short_description)
    return parser


def with_whole_recipe(argv: Sequence[str], base: Any) -> list[str]:
    """The arguments with `--recipe` and all `--recipe.FIELD VALUE` replaced by one `--recipe` that holds every field.

    Args:
        argv: the arguments.
        base: the recipe to change where no `--recipe` names one.

    Raises:
        ValueError: an option without value, or what `load_recipe` and `Recipe.override` refuse.
    """
    from sparse_dit.recipe import load_recipe

    changes: dict[str, Any] = {}
    others: list[str] = []
    tokens = iter(argv)
    for token in tokens:
        option, equals, value = token.partition("=")
        if option != "--recipe" and not option.startswith("--recipe."):
            others.append(token)
            continue
        given = value if equals else next(tokens, None)
        if given is None:
            raise ValueError(f"{option}: there is no value; valid: {option} VALUE")
        if option == "--recipe":
            base = given
        else:
            changes[option.removeprefix("--recipe.")] = _value(given)
    recipe = load_recipe(base).override(changes)
    return [*others, "--recipe", json.dumps(recipe.to_dict())]


def _config(argv: Sequence[str]) -> dict[str, Any]:
    """What stands in the file of the last `--config`, if any; the parser checks it later."""
    file = None
    for token, following in zip_longest(argv, argv[1:], fillvalue=""):
        option, equals, value = token.partition("=")
        if option == "--config":
            file = value if equals else following
    if file is None:
        return {}
    try:
        with open(file, encoding="utf-8") as stream:
            config = yaml.safe_load(stream)
    except (OSError, yaml.YAMLError):
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"config: {file!r}; valid: a YAML file of options that can be read")
    return config


def _value(text: str) -> Any:
    """The value of a dotted option: JSON where it is JSON (YAML 1.1 reads 1e-3 as text), else YAML."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _fields(parameter: inspect.Parameter) -> list[str]:
    """The options that a parameter stands for when it is a dataclass; empty when it is an option itself."""
    return [field.name for field in fields(parameter.annotation)] if is_dataclass(parameter.annotation) else []


def _kind(annotation: Any, default: Any) -> dict[str, Any]:
    """How an option of a type is added: a switch, any number of values, or one value."""
    if annotation is bool:
        return {"action": "store_true"}
    if isinstance(default, list):
        return {"nargs": "*", "type": get_args(annotation)[0], "default": default}
    return {"type": annotation, "default": default}


def _unknown_option(command: str, option: str) -> str:
    function, skipped = COMMANDS[command]
    names = ["config", "print_config", "help"]
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.POSITIONAL_ONLY:
            continue
        names += _fields(parameter) or [parameter.name]
    valid = [f"--{name}" for name in names if name not in skipped]
    near = get_close_matches(option, valid, n=1)
    hint = f" did you mean {near[0]}?" if near else ""
    return f"{command}: unknown option {option};{hint} valid: {', '.join(valid)}"


def _one_line(error: BaseException) -> str:
    """An error in one line; those of the parser in the words of the other ones."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"^(the following arguments are required: )\w+\.", r"\1--", text)
    text = re.sub(r"^argument (\w+): invalid choice: (.*) \(choose from (.*)\)$", r"\1: \2; valid: \3", text)
    found = re.match(r'Parser key "([\w.]+)": (.*)', text)
    if not found:
        return text
    key, why = found.groups()
    value = re.search(r"(?:Given|Got) value: (.*)$", why)
    kinds = [
        kind or literal for kind, literal in re.findall(r"Expected an? (?:<class '(\w+)'>|[\w.]*Literal\[(.*?)\])", why)
    ]
    if not value or not kinds:
        return f"{key}: {why}"
    return f"{key}: {value[1]!r}; valid: {' or '.join(kinds).replace('NoneType', 'null')}"
