"""Turn frozen dataclasses into flags, JSON and presets: the only file that parses arguments.

A room declares its settings as a frozen keyword-only dataclass of `Settings` whose fields are made
by `option`; a command nests those of the rooms it uses in a dataclass of its own. Nesting shows in
JSON; flags are flat, so field names are unique within a command.
"""

import argparse
import dataclasses
import difflib
import importlib
import json
import logging
import math
import os
import re
import shlex
import signal
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from .errors import SettingError, flag_of, shown_value
from .limits import Limits
from .progress import LogHandler

logger = logging.getLogger(__name__)

ConfigT = TypeVar("ConfigT")


def option(
    default: Any, text: str, limits: Limits | None = None, *, choices: Sequence[str] | None = None
) -> Any:
    """Declare a config field: its default, its help, and the values it may take.

    limits: those of a number; a field may be None beside them.
    """
    return dataclasses.field(
        default=default, metadata={"help": text, "limits": limits, "choices": choices}
    )


class Settings:
    """What every config is: its fields hold what `option` says of them.

    Raises SettingError for a field that does not.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            limits, choices = field.metadata.get("limits"), field.metadata.get("choices")
            if value is None or not (limits or choices):
                continue
            if not (limits.takes(value) if limits else value in choices):
                expected = limits or f"one of {', '.join(choices)}"
                raise SettingError(
                    f"{{{name}}} {shown_value(value)} given; {expected} is needed", name
                )


def to_json(config: Any) -> str:
    """Return a config as indented JSON, nested as the dataclasses are."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n"


def override(config: ConfigT, values: Mapping[str, Any]) -> ConfigT:
    """Return a config with flat field names replaced at whatever depth they are declared.

    Raises SettingError for a value that a field does not take.
    """
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        name, current = field.name, getattr(config, field.name)
        if dataclasses.is_dataclass(current):
            changes[name] = override(current, values)
        elif name in values:
            changes[name] = values[name]
    return dataclasses.replace(config, **changes)


def to_flags(config: Any, *, without: Sequence[str] = ()) -> str:
    """Return the flags that turn the default config into this one, those `without` left out."""
    words = []
    usual = {field.name: value for _, field, _, value in _leaves(type(config)())}
    for _, field, kind, value in _leaves(config):
        if field.name not in without and value != usual[field.name]:
            words.append(flag_of(field.name))
            if kind is not bool or not value:
                words.append(shlex.quote(str(value).lower() if kind is bool else str(value)))
    return " ".join(words)


def parse(
    config_type: type[ConfigT],
    argv: Sequence[str] | None,
    *,
    description: str,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    settings: Callable[[str, Mapping[str, Any]], Mapping[str, Any]] | None = None,
    shown: Sequence[str] | None = None,
) -> ConfigT:
    """Read flags into a config: defaults, then `--preset`, then the flags that were given.

    `--dry-run` prints the config and ends the program. Bad arguments end it with one sentence on
    stderr and exit code 2. Of the processes that torchrun starts the first one alone speaks.

    description: its first line goes above the help.
    settings: (preset, flags that were given) -> the preset's settings, where other flags decide
        them too; none: those in `presets`.
    shown: names of the fields that `--help` shows, all by default; `--help-all` shows all.
    """
    argv = sys.argv[1:] if argv is None else argv
    shows_all = shown is None or "--help-all" in argv
    spec = sys.modules["__main__"].__spec__
    prog = f"python -m {spec.name.removesuffix('.__main__')}" if spec else None
    parser = _Parser(prog=prog, description=description.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and stop")
    if shown is not None:
        parser.add_argument("--help-all", action="help", help="show every setting and stop")
    if presets:
        first = next(iter(presets))
        find = {name: name for name in presets}.__getitem__
        parser.add_argument(
            "--preset",
            type=_reader("preset", find, f"one of {', '.join(presets)}"),
            default=first,
            metavar="|".join(presets),
            help=f"named settings, which the other flags refine (default: {first})",
        )
    defaults = config_type()
    decided = settings(first, {}) if settings else {}
    groups: dict[type, Any] = {}
    for owner, field, kind, value in _leaves(defaults):
        if owner not in groups:
            groups[owner] = parser.add_argument_group(owner.__doc__.splitlines()[0].rstrip("."))
        is_shown = shows_all or field.name in shown
        _add_flag(groups[owner], field, kind, decided.get(field.name, value), is_shown=is_shown)
    known, strangers = parser.parse_known_args(argv)
    if strangers:
        parser.error(_explain_stranger(strangers[0], [leaf[1].name for leaf in _leaves(defaults)]))
    given = vars(known)
    is_dry_run = given.pop("dry_run")
    preset = given.pop("preset", "")
    try:
        usual = settings(preset, given) if settings else (presets or {"": {}})[preset]
        config = override(defaults, {**usual, **given})
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if is_dry_run:
        parser.exit(message=to_json(config))
    return config


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main`: what a user can put right ends it with one sentence and exit code 2.

    Also shows the core's log on stderr; `-X dev` adds where the error was raised. SIGTERM, by which
    a container or a queue ends a process, interrupts as Ctrl+C does: the finished steps are kept.
    What a KeyboardInterrupt says of itself becomes the last line. A second interruption changes
    nothing: what the first began comes to its end; Ctrl+\\ ends a process as it is.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[LogHandler()])
    # Of several processes torchrun ends those that wait for one that failed.
    is_alone = os.environ.get("WORLD_SIZE", "1") == "1"
    if is_alone:
        _heed(_interrupt)
    try:
        main()
    except KeyboardInterrupt as interruption:
        words = str(interruption) or "interrupted; the same command begins or continues again"
        sys.stderr.write(f"{words}\n")
        leave(130)
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    if is_alone:
        # All is done, and Python's own end would tell of an interruption as of an error.
        _heed(_pass_over)


def _heed(handler: Callable[..., None]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        # A shell lets what runs beside it ignore Ctrl+C.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def _interrupt(*_: object) -> NoReturn:
    # `timeout` sends its signal twice.
    _heed(_pass_over)
    raise KeyboardInterrupt


def _pass_over(*_: object) -> None:
    # Not SIG_IGN: of a signal on its way Python would complain.
    pass


def leave(code: int) -> NoReturn:
    """End the program now; what is open has been closed on the way here.

    Python's own end first looks through all objects, PyTorch's among them, several times: seconds,
    on a machine that is busy many, of the ten that a container has after SIGTERM.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def say_that_pytorch_loads() -> None:
    """Log what the next seconds go into, where PyTorch is not there yet; once of all processes."""
    if "torch" not in sys.modules and os.environ.get("RANK", "0") == "0":
        logger.info("loading PyTorch")


def launch(package: str) -> None:
    """Run the `main` of a package's `cli`, which is imported here: what `python -m` runs.

    PyTorch reads the policy when it is imported: threads that spin while they wait slow a command
    down tenfold where anything else computes on the same cores.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    run_command(importlib.import_module(".cli", package).main)


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence, without the usage text."""

    def format_help(self) -> str:
        """Leave the list of all flags out of the usage: they follow, each with its meaning."""
        self.usage = "%(prog)s [flags]"
        return super().format_help()

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """End the program; what is an answer goes to stdout, what is an error to stderr."""
        if message and os.environ.get("RANK", "0") == "0":
            (sys.stderr if status else sys.stdout).write(message)
        sys.exit(status)

    def error(self, message: str) -> NoReturn:
        # What our readers say names the flag already.
        message = re.sub(r"^argument \S+: (?=--)", "", message)
        message = re.sub(
            r"^argument (\S+): expected .*", r"\1 given without a value; see --help", message
        )
        self.exit(2, f"error: {message}\n")


def _add_flag(
    group: Any, field: dataclasses.Field, kind: type, value: Any, *, is_shown: bool
) -> None:
    usual = "none" if value is None else str(value).lower() if kind is bool else value
    read, expected, metavar = _KINDS[kind]
    if choices := field.metadata["choices"]:
        metavar = "|".join(choices)
    text = f"{field.metadata['help']} (default: {usual})".replace("%", "%%")
    group.add_argument(
        flag_of(field.name),
        type=_reader(field.name, read, expected),
        metavar=metavar,
        help=text if is_shown else argparse.SUPPRESS,
        default=argparse.SUPPRESS,
        **({"nargs": "?", "const": True} if kind is bool else {}),
    )


def _explain_stranger(word: str, names: Sequence[str]) -> str:
    if not word.startswith("-"):
        return f"{word!r} given, which belongs to no flag; see --help for the flags"
    flag = word.partition("=")[0]
    known = [flag_of(name) for name in ("preset", "dry_run", "help_all", *names)]
    close = difflib.get_close_matches(flag, known, n=1)
    hint = f"did you mean {close[0]}?" if close else "see --help for the flags"
    return f"{flag} given, which is not a flag of this command; {hint}"


def _leaves(config: Any) -> Iterator[tuple[type, dataclasses.Field, type, Any]]:
    """Yield (dataclass, field, type without None, value) of every option, depth first."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value)
            continue
        kind = hints[field.name]
        if type(None) in typing.get_args(kind):
            kind = next(k for k in typing.get_args(kind) if k is not type(None))
        yield type(config), field, kind, value


def _reader(name: str, read: Callable[[str], Any], expected: str) -> Callable[[str], Any]:
    """Wrap a reader so that its complaint names the flag, what was given and what is needed."""

    def reader(text: str) -> Any:
        try:
            return read(text)
        except (ValueError, KeyError):
            sentence = f"{flag_of(name)} {shown_value(text)} given; {expected} is needed"
            raise argparse.ArgumentTypeError(sentence) from None

    return reader


def _read_bool(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


def _read_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def _read_number_or_text(text: str) -> int | str:
    try:
        return int(text)
    except ValueError:
        return text


def _read_path(text: str) -> Path:
    path = Path(text)
    if not text or any(len(os.fsencode(part)) > _MAX_NAME_BYTES for part in path.parts):
        raise ValueError
    return path


# What file systems take.
_MAX_NAME_BYTES = 255
_KINDS: dict[type | types.UnionType, tuple[Callable[[str], Any], str, str]] = {
    bool: (_read_bool, "true or false (or the flag alone)", "true|false"),
    int: (int, "a whole number", "N"),
    float: (_read_float, "a number", "X"),
    str: (str, "a text", "TEXT"),
    int | str: (_read_number_or_text, "a whole number or a text", "N|TEXT"),
    Path: (_read_path, f"a path, of names of at most {_MAX_NAME_BYTES} bytes,", "PATH"),
}
"""Type of a field -> its reader, what it needs, its name in the help."""
