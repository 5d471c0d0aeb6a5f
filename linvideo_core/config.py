"""Turn frozen dataclasses into flags, JSON and presets: the only file that parses arguments.

A room declares its settings as a frozen keyword-only dataclass whose fields are made by `option`;
a command nests those of the rooms it uses in a dataclass of its own. Nesting shows in JSON; flags
are flat, so field names are unique within a command.
"""

import argparse
import dataclasses
import json
import logging
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

ConfigT = TypeVar("ConfigT")


def option(default: Any, text: str, *, choices: Sequence[str] | None = None) -> Any:
    """Declare a config field: its default, its help, and the values it may take."""
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


def positive(owner: object, *names: str) -> None:
    """Raise ValueError unless every named field of a config is greater than zero."""
    for name in names:
        value = getattr(owner, name)
        if not value > 0:
            raise ValueError(f"--{_flag(name)} {value} given; a number greater than 0 is needed")


def fraction(owner: object, *names: str) -> None:
    """Raise ValueError unless every named field of a config lies in [0, 1]."""
    for name in names:
        value = getattr(owner, name)
        if not 0 <= value <= 1:
            raise ValueError(f"--{_flag(name)} {value} given; a number from 0 to 1 is needed")


def to_json(config: Any) -> str:
    """Return a config as indented JSON, nested as the dataclasses are."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n"


def override(config: ConfigT, values: Mapping[str, Any]) -> ConfigT:
    """Return a config with flat field names replaced at whatever depth they are declared."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        current = getattr(config, field.name)
        if dataclasses.is_dataclass(current):
            changes[field.name] = override(current, values)
        elif field.name in values:
            changes[field.name] = values[field.name]
    return dataclasses.replace(config, **changes)


def parse(
    config_type: type[ConfigT],
    argv: Sequence[str] | None,
    *,
    description: str,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[ConfigT, bool]:
    """Read flags into a config: defaults, then `--preset`, then the flags that were given.

    Returns the config and whether `--dry-run` was given. Bad arguments end the program with one
    sentence on stderr and exit code 2.
    """
    parser = _Parser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and stop")
    if presets:
        parser.add_argument("--preset", choices=list(presets), default=next(iter(presets)))
    defaults = config_type()
    for field, kind, value in _leaves(defaults):
        text = f"{field.metadata['help']} (default: {value})"
        parser.add_argument(
            f"--{_flag(field.name)}",
            type=_reader(kind),
            choices=field.metadata["choices"],
            help=text.replace("%", "%%"),
            default=argparse.SUPPRESS,
            metavar=None if field.metadata["choices"] else kind.__name__.upper(),
        )
    given = vars(parser.parse_args(argv))
    dry_run = given.pop("dry_run")
    preset = dict(presets[given.pop("preset")]) if presets else {}
    try:
        return override(defaults, {**preset, **given}), dry_run
    except ValueError as error:
        parser.error(str(error))


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main`: what a user can put right ends it with one sentence and exit code 2.

    Also shows the core's log on stderr; `-X dev` adds where the error was raised.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main()
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _leaves(config: Any) -> Iterator[tuple[dataclasses.Field, type, Any]]:
    """Yield (field, type without None, default) of every option, depth first."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value)
            continue
        kind = hints[field.name]
        if typing.get_origin(kind) in (typing.Union, types.UnionType):
            kind = next(k for k in typing.get_args(kind) if k is not type(None))
        yield field, kind, value


def _reader(kind: type) -> Any:
    if kind is bool:
        return _read_bool
    return Path if kind is Path else kind


def _read_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} given; true or false is expected")
    return text.lower() == "true"
