"""Measured tables as JSON: `{title, command, date, device, versions, rows, details}`.

`results/tables.py` shows them in Markdown.
"""

import datetime
import json
import platform
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from linvideo_core import __version__
from linvideo_core.run.errors import SettingError
from linvideo_core.run.files import write_json
from linvideo_core.run.folder import check_place
from linvideo_core.run.lock import alone_in
from linvideo_core.run.tables import format_value

REPOSITORY = Path(__file__).parents[1]
RESULTS_FOLDER = REPOSITORY / "results"
SOURCE = ("command", "date", "device", "versions")
# Beside records, locked while a part is put into one: their own folder may be in use for hours.
_LOCK_FOLDER = ".records"
_ADVICE = "leave out --record or choose another"

Row = dict[str, Any]
Change = Callable[[list[Row], Row], tuple[Sequence[Row], Row]]
"""(rows of a part, what is kept beside them) -> both as they are to be; none: of neither"""


def write_record(
    path: Path,
    *,
    title: str,
    command: str,
    rows: Sequence[Row],
    device: torch.device | str,
    details: Row | None = None,
) -> dict[str, Any]:
    """Write a measured table atomically; return what was written.

    command: what to type to measure it again.
    rows: of numbers, words, or lists of them; what is not finite is stored as null.
    details: what is worth keeping but not shown in a table.
    """
    record = {"title": title, **describe_source(command, device), "rows": list(map(dict, rows))}
    if details:
        record["details"] = dict(details)
    write_json(path, record)
    return record


def write_part(
    path: Path,
    part: str,
    *,
    title: str,
    command: str,
    rows: Sequence[Row],
    device: torch.device | str,
    details: Row | None = None,
) -> dict[str, Any]:
    """Replace one part of a record that several commands fill; else as `change_part`."""
    return change_part(
        path, part, lambda *_: (rows, details or {}), title=title, command=command, device=device
    )


def change_part(
    path: Path, part: str, change: Change, *, title: str, command: str, device: torch.device | str
) -> dict[str, Any]:
    """Change one part of a record, nobody else writing meanwhile; return all of the record.

    part: the value of `what` in all its rows. The record's `details["parts"]` says of every part
        where it was measured, and holds what is kept beside its rows. It keeps its place among
        them; without rows it goes.
    change: what it keeps of an earlier command stands before the new one.

    Raises SettingError as `check_parts`.
    """
    check_file(path)
    with alone_in(path.absolute().parent / _LOCK_FOLDER):
        record = _read(path)
        _check_devices(record, path, device)
        rows, details = change(*_find_part(record, part))
        earlier = details["command"].split(" && ") if "command" in details else []
        source = describe_source(_join([*earlier, command]), device)
        kept = {key: details[key] for key in details if key not in SOURCE}
        parts = {**_parts_of(record), part: source | kept}
        if not rows:
            del parts[part]
        found = {name: [row for row in record["rows"] if row["what"] == name] for name in parts}
        found[part] = rows
        return write_record(
            path,
            title=title,
            command=_join(each["command"] for each in parts.values()),
            rows=[row for name in parts for row in found[name]],
            device=device,
            details={"parts": parts},
        )


def replacing(replaced: Sequence[Row], names: Sequence[str], rows: Sequence[Row]) -> Change:
    """Return the change that puts rows in place of others; what is beside kept ones stays."""

    def change(earlier: list[Row], source: Row) -> tuple[list[Row], Row]:
        kept = without(earlier, replaced, names)
        return [*kept, *rows], source if kept else {}

    return change


def without(rows: Iterable[Row], replaced: Iterable[Row], names: Sequence[str]) -> list[Row]:
    """Return the rows that differ in some value of `names` from each that is replaced.

    A row of an earlier time may lack a name that rows have today: there it has None.
    """
    keys = [[row.get(name) for name in names] for row in replaced]
    return [row for row in rows if [row.get(name) for name in names] not in keys]


def check_file(path: Path) -> None:
    """Raise SettingError where a record cannot be written: before anything is measured."""
    if path.is_dir():
        raise SettingError(f"{path} is a folder and a file is needed; {_ADVICE} {{out}}", "out")
    for folder in (path.parent, path.parent / _LOCK_FOLDER):
        check_place(folder, advice=_ADVICE)


def check_parts(path: Path, device: torch.device | str) -> None:
    """Raise SettingError where a part was measured on another device, or a record has no place."""
    check_file(path)
    _check_devices(_read(path), path, device)


def _check_devices(record: Row, path: Path, device: torch.device | str) -> None:
    device_name = describe_device(device)
    for part, source in _parts_of(record).items():
        if source["device"] != device_name:
            raise SettingError(
                f"{path} has rows of {part} measured on {source['device']}, and this is "
                f"{device_name}; {_ADVICE} {{out}}, or delete that file and measure all here",
                "out",
            )


def read_part(path: Path, part: str) -> tuple[list[Row], Row]:
    """Return the rows of a part, and what is kept beside them; none: of neither."""
    return _find_part(_read(path), part)


def _find_part(record: Row, part: str) -> tuple[list[Row], Row]:
    rows = [row for row in record["rows"] if row.get("what") == part]
    return rows, _parts_of(record).get(part, {})


def _read(path: Path) -> Row:
    return read_record(path) if path.is_file() else {"rows": []}


def _parts_of(record: Row) -> dict[str, Any]:
    return record.get("details", {}).get("parts", {})


def _join(commands: Iterable[str]) -> str:
    return " && ".join(dict.fromkeys(commands))


def read_record(path: Path) -> dict[str, Any]:
    """Read a record; raise ValueError for anything else."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    keys = record if isinstance(record, dict) else ()
    missing = [key for key in ("title", *SOURCE, "rows") if key not in keys]
    if missing:
        raise ValueError(f"{path} is not a record: it lacks {', '.join(missing)}")
    rows = record["rows"]
    parts = _parts_of(record) if isinstance(record.get("details", {}), dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} is not a record: its rows are no list of objects")
    sources = parts.values() if isinstance(parts, dict) else [None]
    if not all(isinstance(source, dict) and {*SOURCE} <= {*source} for source in sources):
        raise ValueError(f"{path} is not a record: its parts do not say {', '.join(SOURCE)}")
    return record


def describe_source(command: str, device: torch.device | str) -> dict[str, Any]:
    """Return where a number comes from: command, today's date, device, versions."""
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "device": describe_device(device),
        "versions": describe_versions(),
    }


def describe_versions() -> dict[str, str]:
    """Return the versions that a table is measured with here and now."""
    return {
        "linvideo": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def describe_device(device: torch.device | str) -> str:
    """Return the name of the device that a table is measured on."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type.upper()}, {torch.get_num_threads()} threads"


def show_rows(rows: Sequence[Row]) -> str:
    """Lay rows out for a terminal: a line a row, a column a key."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [keys, *([format_value(row.get(key)) for key in keys] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ([cell.rjust(w) for cell, w in zip(line, widths, strict=True)] for line in lines)
    return "".join(f"{'  '.join(line)}\n" for line in padded)
