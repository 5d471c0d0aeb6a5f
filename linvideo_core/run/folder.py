"""The folder of one run: it explains itself, and repeating the command continues in it."""

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .config import to_json
from .devices import is_same_kind
from .errors import SettingError, shown_value
from .files import write_text
from .limits import COUNT_OR_NONE
from .reading import parse_json, read_json, read_text

CONFIG_NAME = "config.json"
_MOST_METRICS = 2**30


class OtherRunError(SettingError):
    """A folder's run was made with other settings: the first of `fields` differs."""


def open_run(folder: Path, config: Any, *, ignore: tuple[str, ...] = (), new_run: str = "") -> None:
    """Check a folder, see `check_run`; create it with its `config.json` where there is none."""
    check_run(folder, config, ignore=ignore, new_run=new_run)
    if not (path := folder / CONFIG_NAME).exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, to_json(config))


def check_run(
    folder: Path, config: Any, *, ignore: tuple[str, ...] = (), new_run: str = ""
) -> None:
    """Make sure that a folder, if it holds a run, holds one of the same config.

    ignore: field names that may differ between the first call and a later one.
    new_run: what another folder would still have of this one, to be told.

    A run that does not name a setting is older than it, and was made as its default says. It may
    continue on another device of the same kind, which computes the same.

    Raises OtherRunError naming the first setting that differs, and SettingError as `check_place`.
    """
    path = folder / CONFIG_NAME
    if not path.exists():
        check_place(folder)
        return
    found = {**dict(_defaults(config)), **read_settings(folder)}
    for name, value in _leaves(json.loads(to_json(config))):
        if name not in ignore and not _agree(name, found.get(name), value):
            raise OtherRunError(
                f"{folder} was made with {{{name}}} {_shown(found.get(name))} and this run has "
                f"{_shown(value)}; choose another {{out}}{new_run}, or give what it was made with "
                "to continue it",
                name,
                "out",
            )


def _agree(name: str, one: Any, other: Any) -> bool:
    is_device = name == "device" and isinstance(one, str) and isinstance(other, str)
    return is_same_kind(one, other) if is_device else one == other


def _shown(value: Any) -> str:
    return "none" if value is None else shown_value(value)


def check_place(folder: Path, name: str = "out", *, advice: str = "choose another") -> None:
    """Raise SettingError where a folder can neither be made nor written to.

    name: the setting that it comes from; advice: what to do with that.
    """
    place = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not place.is_dir():
        raise SettingError(f"{place} is a file and a folder is needed; {advice} {{{name}}}", name)
    try:
        tempfile.TemporaryDirectory(prefix=".linvideo-", dir=place).cleanup()
    except OSError as error:
        raise SettingError(
            f"{folder} is needed, and nothing can be written to {place} "
            f"({error.strerror}); {advice} {{{name}}}",
            name,
        ) from error


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of a folder's run by the names of their fields; none without a run.

    Raises SettingError for a file that holds none.
    """
    path = folder / CONFIG_NAME
    if not path.exists():
        return {}
    try:
        tree = read_json(path)
        if not isinstance(tree, dict):
            raise ValueError("it holds no settings")
    except ValueError as error:
        raise SettingError(
            f"{path} is damaged ({error}): delete that file, and the command that made the folder "
            "continues what is there, or choose another {out}",
            "out",
        ) from error
    return dict(_leaves(tree))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics.jsonl; what comes after the last end of a line is cut short.

    Raises ValueError naming the file, and the line that is none of a training's.
    """
    advice = "delete the file, and what is there otherwise is continued"
    try:
        text = read_text(path, _MOST_METRICS)
    except ValueError as error:
        raise ValueError(f"{error}; {advice}") from None
    rows = []
    for number, line in enumerate(text.split("\n")[:-1], 1):
        with contextlib.suppress(ValueError):
            rows.append(parse_json(line))
        row = rows[-1] if len(rows) == number else None
        if not isinstance(row, dict) or not COUNT_OR_NONE.takes(row.get("step")):
            raise ValueError(f"line {number} of {path} is damaged; {advice}")
    return rows


def _defaults(config: Any) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _defaults(value)
        elif field.default is not dataclasses.MISSING:
            # As JSON gives it back.
            yield field.name, json.loads(json.dumps(field.default, default=str))


def _leaves(tree: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value)
        else:
            yield name, value
